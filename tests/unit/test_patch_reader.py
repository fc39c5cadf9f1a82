"""How the tower of a tiny model learns to see: words once at a shape's centre in tokens, on all of it in maps."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from model.build.builder import BuildError, BuiltModel
from model.build.patch_reader import SCORE_SHARPNESS, PatchBatch, PatchReader, at_centres
from model.build.tiny import make_tiny
from tests.unit.tiny_pixellm import SHAPE
from utils.engine.plain_engine import PlainEngine
from utils.engine.stepping import OptimizerSettings

WORDS = {
    "colour": ("nothing", "red", "blue"),
    "form": ("nothing", "circle", "square"),
    "size": ("nothing", "small", "large"),
}
TEXTS = [" ".join(word for kind in WORDS.values() for word in kind)] * 3
PATCHES = 16


@pytest.fixture
def built() -> BuiltModel:
    return make_tiny(TEXTS, replace(SHAPE, vocab_size=400), seed=0)


def labels_of(*shown: tuple[int, tuple[int, int, int]]) -> torch.Tensor:
    """(1, 3, patches): at each place its colour, form and size."""
    labels = torch.zeros(1, len(WORDS), PATCHES, dtype=torch.long)
    for place, words in shown:
        labels[0, :, place] = torch.tensor(words)
    return labels


def test_a_tower_learns_to_tell_words_of_patches(built: BuiltModel) -> None:
    """Pictures whose patches are red or blue or empty, named so: a few steps, and the losses fall."""
    generator = torch.Generator().manual_seed(0)
    kinds = torch.randint(0, 3, (6, PATCHES), generator=generator)
    signs = torch.tensor([[0.0, 0, 0], [2, -1, -1], [-1, -1, 2]])[kinds]  # (B, patches, channels)
    pictures = signs.transpose(1, 2).reshape(6, 3, 4, 4).repeat_interleave(8, dim=2).repeat_interleave(8, dim=3)
    batch = PatchBatch(pictures, torch.stack([kinds, kinds, kinds], dim=1))
    embeddings = built.model.get_input_embeddings().weight.clone()
    built.model.requires_grad_(False)
    for part in (built.model.vision_tower, built.model.projector, built.model.mask_projector):
        part.requires_grad_(True)
    for part in built.model.vision_tower.parts_without_loss():
        part.requires_grad_(False)
    engine = PlainEngine(PatchReader(built, WORDS), OptimizerSettings(), "fp32", torch.device("cpu"))
    reports = [engine.train_step([batch], 3e-3) for _ in range(40)]
    for name in ("token", "map", "colour", "form", "size", "map_colour", "map_form"):
        assert reports[-1].losses[name] < 0.6 * reports[0].losses[name], name
    assert torch.equal(built.model.get_input_embeddings().weight, embeddings), "words stay where they are"


def test_where_there_is_no_word_only_the_sum_is_asked_for(built: BuiltModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens and maps that are the sums they should be: no distance is left, and each kind is asked where it is."""
    reader = PatchReader(built, WORDS)
    labels = labels_of((3, (1, 1, 0)), (7, (2, 2, 1)), (8, (2, 2, 0)))  # part of a red circle; a blue square and part
    colours, forms, sizes = (reader.get_buffer(f"words{number}") for number in range(3))
    of_tokens = torch.zeros(1, PATCHES, colours.shape[1]) + colours[0]
    of_tokens[0, 7] = colours[2] + forms[2] + sizes[1]
    of_maps = colours[labels[:, 0]] + forms[labels[:, 1]]
    marks = torch.zeros(1, PATCHES, 2)
    reader.tower.layer_indices = (0, 1)
    told: dict[torch.nn.Module, Any] = {reader.tower: ["coarse", "fine"]}
    for part, vectors in ((reader.projector, of_tokens), (reader.mask_projector, of_maps)):
        told[part] = torch.cat([vectors, marks], dim=-1)
    for part, vectors in told.items():
        monkeypatch.setattr(part, "forward", lambda *_, vectors=vectors: vectors)
    losses = reader(torch.zeros(1, 3, 32, 32), labels).losses
    assert {name for name, term in losses.items() if term.sum == 0} == {"token", "no_token", "map", "no_map"}
    counts = {name: float(term.count) for name, term in losses.items()}
    # Two scales of maps: twice 16 patches, of which three show something.
    assert counts == {
        "token": 1,
        "no_token": 15,
        "colour": 16,
        "form": 1,
        "size": 1,
        "map": 6,
        "no_map": 26,
        "map_colour": 32,
        "map_form": 6,
    }
    assert counts == reader.count_losses(labels) and set(counts) == set(reader.loss_weights)
    form = F.cross_entropy(of_tokens[0, 7] @ forms.T / SCORE_SHARPNESS, torch.tensor(2))
    torch.testing.assert_close(losses["form"].sum, form)
    scores = of_maps[0, [3, 7, 8]] @ forms.T / SCORE_SHARPNESS
    torch.testing.assert_close(
        losses["map_form"].sum, 2 * F.cross_entropy(scores, torch.tensor([1, 2, 2]), reduction="sum")
    )


def test_words_are_told_where_all_kinds_are() -> None:
    labels = labels_of((3, (1, 1, 0)), (7, (2, 2, 1)))
    assert torch.equal(at_centres(labels), labels_of((7, (2, 2, 1))))


def test_a_word_of_several_tokens_is_refused(built: BuiltModel) -> None:
    with pytest.raises(BuildError, match=r"the word 'xylophone' takes \d+ tokens, expected one: raise .* vocab_size"):
        PatchReader(built, {"colour": ("red", "xylophone")})
