"""Where we differ from the release on purpose: both behaviours, and the field that chooses between them.

Its text rules are compared in `test_collate.py`, its scores in `test_metrics.py`; both are functions or fields of
their own.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import pytest
import torch

from model.configuration_pixellm import PixelLMConfig
from model.losses import bce_loss, refinement_weights
from model.modeling_pixellm import PixelLMForCausalLM, PixelLMOutput
from model.processing_pixellm import CLIP_MEAN, CLIP_STD, RELEASE_RULES, ConversationTooLong, PixelLMProcessor
from model.seg_codebook import whole_groups
from model.structures import TOWER_KEY
from model.vision_tower import resize_position_table
from tests.golden import recipe, released_model, test_collate, training, vectors
from utils.checkpoints.builder import TrainingRecipe, choose_trainable
from utils.checkpoints.layouts.published_names import RELEASE_IMAGE_MEAN, RELEASE_IMAGE_STD
from utils.engine.stepping import OptimizerSettings, count_step, loss_divisors, weighted_loss


def default_of(owner: type, field: str) -> Any:
    """What a field is where nobody chooses."""
    return inspect.signature(owner).parameters[field].default


def shown(difference: float) -> bool:
    """Whether the two ways came out apart; the set that is kept here must show it, another need not."""
    return bool(difference) or vectors.folder() != vectors.DATA


@contextmanager
def chosen(model: PixelLMForCausalLM, **values: Any) -> Iterator[None]:
    """The shared model with other values in its config; its own come back after."""
    before = {name: getattr(model.config, name) for name in values}
    model.config.update(values)
    try:
        yield
    finally:
        model.config.update(before)


# --- broken groups ------------------------------------------------------------------------------------------------


def answer(case: str, group_rule: str) -> tuple[list[list[int]], list[int], int]:
    """Tokens of each answer to a recorded question, how many masks each has, and how many groups broke."""
    model, common = released_model.build(), vectors.read_json("evaluate")
    facts, tensors = common["cases"][case], vectors.read_tensors("evaluate")
    tables = (model.get_input_embeddings(), model.get_output_embeddings())
    own = [table.weight.data for table in tables]
    dims = vectors.read_json("weights")["model_dims"]
    resized = common["clip_resize_hw"]
    rows = tensors[f"{case}.in.input_ids"]
    try:
        for table, name in zip(tables, ("embed_tokens_override", facts["lm_head"]), strict=True):
            table.weight.data = tensors[name]
        with chosen(model, group_rule=group_rule):
            answers = model.generate_answers(
                pixel_values={TOWER_KEY: recipe.make_pixels(common["seed"], facts["images_clip_recipe"], resized)},
                resized_sizes=torch.tensor(resized),
                prompts=[released_model.input_ids(row[row != dims["pad_token_id"]]) for row in rows],
                image_index=torch.zeros(len(rows), dtype=torch.long),
                end_token_id=dims["eos_token_id"],
                max_new_tokens=facts["max_new_tokens"],
            )
    finally:
        for table, weight in zip(tables, own, strict=True):
            table.weight.data = weight
    masks = [len(one.low_res_mask_logits) for one in answers]
    return [one.ids.tolist() for one in answers], masks, sum(one.num_broken for one in answers)


def test_broken_groups() -> None:
    """`group_rule`: the release drops all masks of an answer with a broken group and counts the prompt's (fact E3);
    ours are those of the answer's whole groups.
    """
    assert default_of(PixelLMConfig, "group_rule") == "adjacent"
    seg_token_ids = released_model.build().config.seg_token_ids
    differing = 0
    for case in vectors.case_names("evaluate", "cases"):
        texts, ours, broken = answer(case, "adjacent")
        same_texts, theirs, _ = answer(case, "release")
        assert texts == same_texts, "the rule changes masks, not words"
        found = [whole_groups(text, seg_token_ids) for text in texts]
        assert ours == [len(starts) for starts, _ in found] and broken == sum(number for _, number in found), case
        assert theirs == vectors.read_tensors("evaluate")[f"{case}.out.batch_seg_token_counts"].tolist(), case
        differing += ours != theirs
    assert shown(differing), "in no case do the two rules give different masks"


# --- losses -------------------------------------------------------------------------------------------------------


def forward(case: str, **values: Any) -> tuple[PixelLMOutput, list[torch.Tensor], list[list[int]]]:
    """The training forward on a recorded case under other config values, its targets and their numbers by row."""
    model, group = released_model.build(), vectors.read_json("forward_train")
    inputs = vectors.read_case("forward_train", case, "cases", case)
    with torch.no_grad(), chosen(model, **values):
        output = training.run(inputs, model, group["seed"])
    return output, inputs.per_image("in.masks"), group["cases"][case]["target_counts_per_conversation"]


def cases_with_targets() -> list[str]:
    cases = vectors.read_json("forward_train")["cases"]
    return [name for name, case in cases.items() if sum(map(sum, case["target_counts_per_conversation"]))]


def test_target_refinement() -> None:
    """`refinement_alpha`: the release trains without (1); the paper, and our default, weigh contested pixels (L2)."""
    alpha = default_of(PixelLMConfig, "refinement_alpha")
    assert alpha == 2.0
    contested = 0.0
    for case in cases_with_targets():
        plain, targets, counts = forward(case, refinement_alpha=1.0)
        refined, _, _ = forward(case, refinement_alpha=alpha)
        expected = 0.0
        for logits, masks, rows in zip(plain.mask_logits, targets, counts, strict=True):
            questions = torch.repeat_interleave(torch.tensor(rows))
            extra = refinement_weights(logits, questions, 2.0) - 1  # 1 on contested pixels
            expected += float(bce_loss(logits, masks, (alpha - 1) * extra).sum)
        found = float(refined.losses["bce"].sum - plain.losses["bce"].sum)
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-6), case
        assert refined.losses["dice"].sum == plain.losses["dice"].sum
        contested += expected
    assert shown(contested), "in no case do two masks of a question overlap"


class Recorded:
    """A micro-batch as the engines see it, of a recorded case."""

    def __init__(self, case: str) -> None:
        tensors = vectors.read_tensors("forward_train")
        images = sorted(name for name in tensors if name.startswith(f"{case}.in.masks."))
        self.inputs = {"labels": tensors[f"{case}.in.labels"], "masks": [tensors[name] for name in images]}

    def counted(self) -> dict[str, Any]:
        return self.inputs


def test_losses_of_a_step() -> None:
    """The release divides each micro-batch by its own numbers and averages (fact L1), so that a token or mask in a
    small one weighs more; ours divides by those of the whole step. `loss_normalisation` chooses.
    """
    assert OptimizerSettings().loss_normalisation == "step"
    model = released_model.build()
    facts = vectors.read_json("forward_train")["cases"]
    cases = sorted(facts)
    outputs = [forward(case)[0].losses for case in cases]
    weights = model.loss_weights
    step = count_step(model, [Recorded(case) for case in cases], lambda numbers: numbers)
    ours, theirs = (
        sum(
            float(weighted_loss(losses, weights, loss_divisors(losses, step, len(cases), normalisation)))
            for losses in outputs
        )
        for normalisation in ("step", "micro_batch")
    )
    recorded = [facts[case]["outputs"]["loss"] for case in cases]
    assert theirs == pytest.approx(sum(recorded) / len(recorded), rel=vectors.LOSS_RTOL)
    by_hand = sum(
        weights[name] * sum(float(losses[name].sum) for losses in outputs) / max(step[name], 1.0) for name in weights
    )
    assert ours == pytest.approx(by_hand, rel=1e-5)
    assert shown(abs(ours - theirs) > 10 * vectors.LOSS_RTOL * theirs), "these cases are of one size"


# --- what trains --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trains", [True, False])
def test_what_trains(trains: bool) -> None:
    """`train_mask_neck`: the release leaves neck and no-mask embedding at their random start (fact M10)."""
    assert {field.name: field.default for field in fields(TrainingRecipe)}["train_mask_neck"] is True
    names = choose_trainable(released_model.make(), TrainingRecipe(train_mask_neck=trains))
    entry = [name for name in names if name.startswith(("pixel_decoder.neck.", "pixel_decoder.no_mask_embed."))]
    assert bool(entry) is trains
    assert any(name.startswith("pixel_decoder.transformers.") for name in names)


# --- numerics that a new model does not take over ------------------------------------------------------------------


def test_fusion() -> None:
    """`token_fusion`, `scale_fusion`: constants in the release (fact M1), learned in the paper and by default."""
    released = released_model.build()
    constants = dict(released.named_buffers())
    for name in released_model.CONSTANTS:
        assert name in constants and name not in dict(released.named_parameters())
    config = {**released.config.to_dict(), "token_fusion_value": None, "scale_fusion_value": None}
    for field in ("token_fusion", "scale_fusion"):
        assert default_of(PixelLMConfig, field) == "learned"
        config[field] = "learned"
    learned = PixelLMForCausalLM(PixelLMConfig(**config))
    parameters = dict(learned.named_parameters())
    assert set(parameters) >= released_model.CONSTANTS
    tokens = parameters["codebook.token_weights"].detach()
    assert tokens.sum(dim=1).tolist() == pytest.approx([1.0] * len(tokens))  # a mean; in the release half of one
    recorded = released.codebook.token_weights
    assert recorded.sum(dim=1).tolist() == pytest.approx([1 / released.config.num_scales] * len(recorded))


def test_position_table() -> None:
    """`position_resize`: the release takes the last patch's row for the class row (fact M6); we take the first."""
    weights = vectors.read_json("weights")
    assert default_of(PixelLMConfig, "position_resize") == "standard"
    name = "vision_model.embeddings.position_embedding.weight"
    entry = weights["clip_tensors"][name]
    table = recipe.make_tensor(weights["seed"], name, entry["shape"], entry["center"], entry["scale"])
    grid = released_model.build().config.grid_size
    ours, theirs = (resize_position_table(table, grid, 1, method) for method in ("standard", "release"))
    assert ours.shape == theirs.shape
    assert torch.equal(ours[0], table[0]) and torch.equal(theirs[-1], table[-1])
    if len(table) != len(ours):  # a table that is large enough stays as it is, either way
        assert not torch.allclose(ours, theirs, atol=vectors.HIDDEN_ATOL)


def test_pixel_statistics() -> None:
    """`image_mean`, `image_std`: the release normalises by SAM's (fact P1), a new model by those of its CLIP."""
    assert (default_of(PixelLMProcessor, "image_mean"), default_of(PixelLMProcessor, "image_std")) == (
        CLIP_MEAN,
        CLIP_STD,
    )
    recorded = vectors.read_json("preprocess")
    assert (recorded["mean"], recorded["std"]) == (list(RELEASE_IMAGE_MEAN), list(RELEASE_IMAGE_STD))
    assert list(CLIP_MEAN) != recorded["mean"]


# --- text ---------------------------------------------------------------------------------------------------------


def test_long_conversations() -> None:
    """`text_rules`: the release cuts tokens anywhere (fact C4), we leave whole turns out."""
    assert default_of(PixelLMProcessor, "text_rules") == "turns"
    words = "It is the large dog on the left side of the image."
    turns = [("What is it?", words), ("And then?", words)]
    whole = test_collate.processor("llava_v1").encode_conversation(turns)
    first = test_collate.processor("llava_v1").encode_conversation(turns[:1])
    longest = len(whole.input_ids) - 3 + test_collate.processor("llava_v1").num_image_tokens - 1
    ours = test_collate.processor("llava_v1", model_max_length=longest).encode_conversation(turns)
    assert torch.equal(ours.input_ids, first.input_ids) and ours.dropped_turns == 1
    theirs = test_collate.processor("llava_v1", RELEASE_RULES, longest).encode_conversation(turns)
    assert torch.equal(theirs.input_ids, whole.input_ids[:-3]) and theirs.dropped_turns == 0
    assert torch.equal(theirs.labels, whole.labels[:-3])
    named = [(question, f"{words} {{seg}}.") for question, words in turns]
    with pytest.raises(ConversationTooLong, match="seg tokens for 2 targets"):
        test_collate.processor("llava_v1", RELEASE_RULES, longest).encode_conversation(named)
