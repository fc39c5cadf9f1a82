"""How the tower of a tiny model learns to see: an image token becomes the sum of the words of its patch."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from demo.patch_reader import EARLY_WEIGHT, SCORE_SHARPNESS, SUM_WEIGHT, PatchBatch, PatchReader
from demo.tiny import make_tiny
from tests.unit.tiny_pixellm import SHAPE
from utils.checkpoints.builder import BuildError, BuiltModel
from utils.engine.plain_engine import PlainEngine
from utils.engine.stepping import OptimizerSettings

WORDS = {"colour": ("nothing", "red", "blue"), "form": ("nothing", "circle", "square")}
TEXTS = [" ".join(word for kind in WORDS.values() for word in kind)] * 3
PATCHES = 16


@pytest.fixture
def built() -> BuiltModel:
    return make_tiny(TEXTS, replace(SHAPE, vocab_size=400), seed=0)


def test_a_tower_learns_to_tell_words_of_patches(built: BuiltModel) -> None:
    """Images whose patches are red or blue or empty, named so: a few steps, and the losses fall."""
    generator = torch.Generator().manual_seed(0)
    kinds = torch.randint(0, 3, (6, PATCHES), generator=generator)
    signs = torch.tensor([[0.0, 0, 0], [2, -1, -1], [-1, -1, 2]])[kinds]  # (B, patches, channels)
    images = signs.transpose(1, 2).reshape(6, 3, 4, 4).repeat_interleave(8, dim=2).repeat_interleave(8, dim=3)
    batch = PatchBatch(images, torch.stack([kinds, kinds], dim=1))
    embeddings = built.model.get_input_embeddings().weight.clone()
    built.model.requires_grad_(False)
    for part in (built.model.vision_tower, built.model.projector):
        part.requires_grad_(True)
    for part in built.model.vision_tower.parts_without_loss():
        part.requires_grad_(False)
    engine = PlainEngine(PatchReader(built, WORDS), OptimizerSettings(), "fp32", torch.device("cpu"))
    reports = [engine.train_step([batch], 3e-3) for _ in range(30)]
    assert reports[-1].total < 0.5 * reports[0].total
    for name in ("sum", "colour", "form"):
        assert reports[-1].losses[name] < reports[0].losses[name], name
    assert torch.equal(built.model.get_input_embeddings().weight, embeddings), "words stay where they are"


def test_where_there_is_no_word_only_the_sum_is_asked_for(built: BuiltModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens that are the sums they should be: no distance is left, and a red patch without a form is asked no form."""
    reader = PatchReader(built, WORDS)
    labels = torch.zeros(1, 2, PATCHES, dtype=torch.long)
    labels[0, 0, 3], labels[0, :, 7] = 1, 2  # red; a blue square
    colours, forms = reader.words("colour"), reader.words("form")
    sums = colours[labels[:, 0]] + forms[labels[:, 1]]
    monkeypatch.setattr(reader.projector, "forward", lambda maps: sums)
    losses = reader(torch.zeros(1, 3, 32, 32), labels).losses
    counts = {name: float(term.count) for name, term in losses.items()}
    assert counts == {"sum": PATCHES, "colour": PATCHES, "form": 1} == reader.count_losses(labels)
    assert set(counts) == set(reader.loss_weights) and losses["sum"].sum == 0
    told = F.cross_entropy((sums @ colours.T / SCORE_SHARPNESS)[0], labels[0, 0], reduction="sum")
    torch.testing.assert_close(losses["colour"].sum, told)
    form = F.cross_entropy(sums[0, 7] @ forms.T / SCORE_SHARPNESS, torch.tensor(2))
    torch.testing.assert_close(losses["form"].sum, form)


def test_earlier_states_are_asked_too_where_that_is_wanted(built: BuiltModel) -> None:
    """On every patch, for nothing too; a hint is no word of a token. What is learned there trains the layers before it,
    and is no part of the model."""
    hints = {"order": ("nothing", "only", "first", "last")}
    reader = PatchReader(built, WORDS, hints, early={"form": 1, "order": 0})
    labels = torch.randint(0, 3, (2, 3, PATCHES), generator=torch.Generator().manual_seed(0))
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    losses = reader(images, labels).losses
    counts = {name: float(term.count) for name, term in losses.items()}
    formed = int((labels[:, 1] > 0).sum())
    assert counts == {"sum": 32, "colour": 32, "form": formed, "early_form": 32, "early_order": 32}
    assert counts == reader.count_losses(labels)
    early = {"early_form": EARLY_WEIGHT, "early_order": EARLY_WEIGHT}
    assert reader.loss_weights == {"sum": SUM_WEIGHT, "colour": 1, "form": 1, **early}
    size = torch.tensor([[32, 32]] * 2)
    last = built.model.vision_tower.layer_indices[0]
    assert [state for _, state, _ in reader.early] == [last - 1, last]
    (state,) = built.model.vision_tower.hidden_states(images, size, [last])
    asked = reader.maps[1](state[:, built.model.vision_tower.num_class_tokens :])
    assert asked.shape == (2, PATCHES, 4)
    torch.testing.assert_close(
        losses["early_order"].sum, F.cross_entropy(asked.flatten(0, 1), labels[:, 2].flatten(), reduction="sum")
    )
    losses["early_form"].sum.backward()
    layers = built.model.vision_tower.model.encoder.layers
    assert layers[last - 2].mlp.fc1.weight.grad is not None and layers[last - 1].mlp.fc1.weight.grad is None
    assert not any("maps" in name for name in built.model.state_dict())


def test_a_word_of_several_tokens_is_refused(built: BuiltModel) -> None:
    with pytest.raises(BuildError, match=r"the word 'xylophone' takes \d+ tokens, expected one: raise .* vocab_size"):
        PatchReader(built, {"colour": ("red", "xylophone")})
