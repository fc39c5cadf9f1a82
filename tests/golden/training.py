"""One training forward of the released model on recorded inputs, and its losses and gradients beside the recorded."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from model.modeling_pixellm import PixelLMForCausalLM, PixelLMOutput
from model.structures import TOWER_KEY
from tests.golden import kinks, recipe, released_model, vectors

LOSS_NAMES = {"ce_loss": "ce", "mask_bce_loss": "bce", "mask_dice_loss": "dice"}
UNREGISTERED = "<unregistered> "

Translate = Callable[[str], str | None]


@contextmanager
def watched_constants(model: PixelLMForCausalLM) -> Iterator[None]:
    """Train mode, the fusion constants watched as the release watches them; all put back after."""
    constants = (model.codebook.token_weights, model.pixel_decoder.scale_weights)
    model.train()
    for constant in constants:
        constant.requires_grad_(True)
    try:
        yield
    finally:
        model.zero_grad(set_to_none=True)
        for constant in constants:
            constant.requires_grad_(False)
            constant.grad = None
        model.eval()


def inputs(golden: vectors.Reading, seed: int) -> dict[str, Any]:
    """What a case gives to the forward, under the names of our forward's arguments."""
    facts = golden.facts
    resized = facts["clip_resize_hw"]
    pixels = recipe.make_pixels(seed, facts["images_clip_recipe"].read_all(), resized)
    counts = facts["target_counts_per_conversation"]
    golden.same("rows of each image", golden.tensor("in.offset").diff().tolist(), [len(rows) for rows in counts])
    per_row = torch.tensor([count for rows in counts for count in rows])
    return {
        "input_ids": released_model.input_ids(golden.tensor("in.input_ids")),
        "attention_mask": golden.tensor("in.attention_masks"),
        "pixel_values": {TOWER_KEY: pixels},
        "resized_sizes": torch.tensor(resized),
        "original_sizes": torch.tensor(facts["original_hw"]),
        "image_index": torch.repeat_interleave(torch.tensor([len(rows) for rows in counts])),
        "labels": golden.tensor("in.labels"),
        "masks": golden.per_image("in.masks"),
        "target_questions": torch.repeat_interleave(per_row),
    }


def run(golden: vectors.Reading, model: PixelLMForCausalLM, seed: int) -> PixelLMOutput:
    """Our forward on the inputs that a case records."""
    return model(**inputs(golden, seed))


def weighted_losses(model: PixelLMForCausalLM, output: PixelLMOutput) -> dict[str, torch.Tensor]:
    """The release's losses by its names: each weighted and divided by its count."""
    losses = {
        name: model.loss_weights[ours] * output.losses[ours].sum / output.losses[ours].count.clamp(min=1)
        for name, ours in LOSS_NAMES.items()
    }
    losses["mask_loss"] = losses["mask_bce_loss"] + losses["mask_dice_loss"]
    losses["loss"] = losses["ce_loss"] + losses["mask_loss"]
    return losses


def compare_losses(golden: vectors.Reading, losses: dict[str, torch.Tensor]) -> None:
    recorded = golden.facts["outputs"]
    for name in recorded:
        golden.number(name, losses[name], recorded[name], rtol=vectors.LOSS_RTOL)


@dataclass(frozen=True)
class Gradient:
    """A recorded number about a gradient, and ours; None where no gradient arrives."""

    label: str
    found: float | None
    recorded: float | None
    atol: float

    @property
    def fits(self) -> bool:
        if self.recorded is None:
            return self.found is None
        if self.found is None:
            # Mask tokens whose masks nobody asks for are not even decoded here; in the release their gradient is zero.
            return self.recorded == 0
        return abs(self.found - self.recorded) <= self.atol + vectors.GRADIENT_RTOL * abs(self.recorded)


def compare_gradients(
    golden: vectors.Reading,
    model: PixelLMForCausalLM,
    forward: Callable[[], PixelLMOutput],
    output: PixelLMOutput,
    near: list[kinks.Kink],
    translate: Translate,
) -> None:
    """Every recorded gradient. Where some do not fit, ReLU inputs next to zero may lie on their other side.

    forward: makes `output` once more. near: the kinks it came by. translate: recorded name of a parameter -> ours.
    """
    recorded = golden.facts["grad_norms"].read_all()
    names = {translate(name) for name in recorded if not name.startswith(UNREGISTERED)}
    ours = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    golden.same("parameters without a recorded gradient", sorted(ours - names), [])
    best = gradients(model, output, recorded, translate)
    for flipped in kinks.choices(near):
        if all(gradient.fits for gradient in best):
            break
        with kinks.watch(flipped):
            other = gradients(model, forward(), recorded, translate)
        best = min(best, other, key=lambda attempt: sum(not gradient.fits for gradient in attempt))
    for gradient in best:
        if gradient.found is None or gradient.recorded is None:
            golden.check(gradient.fits, f"{gradient.label}: found {gradient.found}, expected {gradient.recorded}")
        else:
            golden.number(
                gradient.label, gradient.found, gradient.recorded, atol=gradient.atol, rtol=vectors.GRADIENT_RTOL
            )


def gradients(
    model: PixelLMForCausalLM, output: PixelLMOutput, recorded: dict[str, Any], translate: Translate
) -> list[Gradient]:
    """Backward through the total loss, then every recorded number beside ours."""
    model.zero_grad(set_to_none=True)
    fusion = {"multiseg_scalar": model.codebook.token_weights, "multiscale_scalar": model.pixel_decoder.scale_weights}
    for constant in fusion.values():
        constant.grad = None
    weighted_losses(model, output)["loss"].backward()
    parameters = dict(model.named_parameters())
    compared = []
    for published, value in recorded.items():
        label = f"gradient of {published}"
        if published.startswith(UNREGISTERED):
            compared += fusion_gradients(label, fusion[published.removeprefix(UNREGISTERED)], value)
            continue
        name = translate(published)
        gradient = None if name is None else parameters[name].grad
        found = None if gradient is None else float(gradient.norm())
        compared.append(Gradient(label, found, value, vectors.GRADIENT_ATOL))
    return compared


def fusion_gradients(label: str, constant: torch.Tensor, recorded: list[float | None]) -> list[Gradient]:
    """The release's fusion scalars: one per token, shared by all scales, in a list that is too long (fact M1); or one
    per scale. They are signed sums, so that the largest of them tells the rounding of all.
    """
    shared = None if constant.grad is None else constant.grad.reshape(-1, constant.shape[-1]).sum(0).tolist()
    found = [None] * len(recorded) if shared is None else [*shared, *[None] * (len(recorded) - len(shared))]
    atol = vectors.GRADIENT_ATOL + vectors.GRADIENT_RTOL * max(abs(value) for value in recorded if value is not None)
    return [
        Gradient(f"{label}[{index}]", ours, theirs, atol)
        for index, (ours, theirs) in enumerate(zip(found, recorded, strict=True))
    ]
