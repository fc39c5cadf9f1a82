"""Where the language model of a tiny base starts: finding in the image what words name."""

import math
import random
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from demo.lookup_start import (
    ANY_NAME,
    SAID_LAST,
    SCORED_AS,
    Meant,
    _fading,
    _normed_states,
    _write_head,
    start_looking_up,
)
from demo.tiny import MARK, embeddings_of, make_tiny, without_marks, word_id
from model.modeling_base import EncodedImages, MultimodalSequences
from tests.unit.tiny_pixellm import SHAPE
from utils.checkpoints.builder import BuildError

COLOURS, FORMS, SIZES = ("red", "blue", "green"), ("circle", "square", "star"), ("small", "large")
COLUMNS, ROWS = ("c1", "c2", "c3", "c4"), ("r1", "r2", "r3", "r4")
WORDS = [("nothing", *kind) for kind in (COLOURS, FORMS, SIZES, COLUMNS, ROWS)]
MEANT = Meant(
    {f"{form}s": form for form in FORMS}, {"largest": 1.0, "smallest": -1.0}, {"left": (-1.0, 0.0)}, {"small": "yes"}
)
IMAGES, SIDE, SHAPES = 200, 4, 3
PATCHES = SIDE * SIDE


def draw(rng: random.Random) -> tuple[torch.Tensor, list[str]]:
    """(5, patches) what the patches of an image bear, three of them a shape each, and the three names."""
    labels, names = torch.zeros(len(WORDS), PATCHES, dtype=torch.long), []
    kinds = rng.sample([(c, f) for c in range(1, 4) for f in range(1, 4)], SHAPES)
    for place, (colour, form) in zip(rng.sample(range(PATCHES), SHAPES), kinds, strict=True):
        shape = [colour, form, rng.randint(1, 2), 1 + place % SIDE, 1 + place // SIDE]
        labels[:, place] = torch.tensor(shape)
        names.append(f"{COLOURS[colour - 1]} {FORMS[form - 1]}")
    return labels, names


class World:
    """Images whose image tokens are sums of words, with questions for a name that is there or not."""

    def __init__(self) -> None:
        rng = random.Random(0)
        words = (
            " ".join(word for kind in WORDS for word in kind)
            + " "
            + " ".join([*MEANT.plurals, *MEANT.sizes, *MEANT.directions])
            + " is there a ? yes no"
        )
        shape = replace(SHAPE, width=128, text_num_heads=8, text_head_dim=32, vocab_size=420)
        self.built = make_tiny([words, words], shape, seed=0, names=(*COLOURS, *FORMS))
        images = [draw(rng) for _ in range(IMAGES)]
        self.labels = torch.stack([labels for labels, _ in images])
        self.names = [names for _, names in images]
        self.asked = [f"{rng.choice(COLOURS)} {rng.choice(FORMS)}" for _ in images]
        embeddings = embeddings_of(self.built, WORDS)
        tokens = torch.stack([kind[self.labels[:, number]] for number, kind in enumerate(embeddings)]).sum(dim=0)
        tokens[..., -2] = MARK
        self.seen = EncodedImages([], tokens, torch.ones(tokens.shape[:2], dtype=torch.bool))
        ids = [
            self.built.processor.encode_conversation([(f"is there a {name} ?", "yes" if name in names else "no")])
            for name, names in zip(self.asked, self.names, strict=True)
        ]
        self.arguments: dict[str, Any] = {
            "input_ids": pad_sequence([one.input_ids for one in ids], batch_first=True),
            "attention_mask": pad_sequence([torch.ones_like(one.input_ids) for one in ids], batch_first=True),
            "pixel_values": {},
            "resized_sizes": torch.full((IMAGES, 2), 32),
            "image_index": torch.arange(IMAGES),
        }

    def start(self) -> dict[int, float]:
        with patch.object(self.built.model, "encode_images", lambda *_: self.seen):
            return start_looking_up(self.built, WORDS, MEANT, self.arguments, self.labels)

    def rows(self) -> MultimodalSequences:
        ids, mask = self.arguments["input_ids"], self.arguments["attention_mask"]
        return self.built.model.merge_multimodal_embeddings(ids, mask, self.seen, self.arguments["image_index"])


@pytest.fixture(scope="module")
def looked() -> tuple[World, torch.Tensor, torch.Tensor]:
    """A started world; (B, heads, P) where the last word of the asked name looks in layer 1, and (B, P) ids."""
    world = World()
    with torch.no_grad():
        assert all(share > 0.8 for share in world.start().values())
        rows = world.rows()
        decoder = world.built.model.language_model.get_decoder()
        decoder.config._attn_implementation = "eager"
        looks = decoder(
            inputs_embeds=rows.embeddings, attention_mask=rows.attention_mask.long(), output_attentions=True
        ).attentions[1]
    forms = [world.built.processor.tokenizer.encode(f" {form}", add_special_tokens=False)[0] for form in FORMS]
    end_of_name = torch.isin(rows.ids, torch.tensor(forms)).long().argmax(dim=1)
    return world, looks[torch.arange(IMAGES), :, end_of_name], rows.ids


def patch_of(world: World, image: int) -> int | None:
    """The patch that shows what is asked for."""
    colour, form = world.asked[image].split()
    bears = (world.labels[image, 0] == 1 + COLOURS.index(colour)) & (world.labels[image, 1] == 1 + FORMS.index(form))
    return int(bears.long().argmax()) if bears.any() else None


def test_a_name_looks_at_what_it_names(looked: tuple[World, torch.Tensor, torch.Tensor]) -> None:
    """Two heads, one that passes on what is there and one that passes on where."""
    world, looks, ids = looked
    first_patch = int((ids[0] == world.built.model.config.image_token_id).long().argmax())
    on_patches = looks[:, :2, first_patch : first_patch + PATCHES]
    there = [(image, place) for image in range(IMAGES) if (place := patch_of(world, image)) is not None]
    assert 40 < len(there) < 160
    found = torch.stack([on_patches[image, :, place] for image, place in there])
    assert bool((found.mean(dim=0) > 0.6).all()), found.mean(dim=0)


def test_a_name_that_is_not_there_looks_at_the_first_token(looked: tuple[World, torch.Tensor, torch.Tensor]) -> None:
    world, looks, _ = looked
    absent = torch.tensor([patch_of(world, image) is None for image in range(IMAGES)])
    on_first = looks[:, 0, 0]
    assert on_first[absent].mean() > on_first[~absent].mean() + 0.2


def test_the_layers_before_and_the_words_stay_as_they_are() -> None:
    world = World()
    before = {name: value.clone() for name, value in world.built.model.state_dict().items()}
    world.start()
    changed = {name for name, value in world.built.model.state_dict().items() if not torch.equal(value, before[name])}
    own, head = "language_model.model.layers.1.self_attn", "language_model.lm_head.weight"
    assert changed == {head, *(f"{own}.{part}_proj.weight" for part in "qkvo")}
    yes, small = (word_id(world.built.processor, word) for word in ("yes", "small"))
    moved = world.built.model.state_dict()[head] - before[head]
    assert moved.any(dim=1).nonzero().flatten().tolist() == [yes], "only the row of the word that says a number"
    word = without_marks(before["language_model.model.embed_tokens.weight"][small])
    torch.testing.assert_close(moved[yes], SCORED_AS * word, atol=1e-6, rtol=1e-4)


def test_states_are_those_that_the_whole_model_gives_its_layer() -> None:
    world, seen = World(), list[torch.Tensor]()
    model, rows = world.built.model, world.rows()
    layers = model.language_model.get_decoder().layers
    with torch.no_grad(), layers[1].input_layernorm.register_forward_hook(lambda *call: seen.append(call[-1])):
        model.hidden_states(rows, torch.arange(IMAGES))
    with torch.no_grad():
        image, text = _normed_states(model, rows, 1)
    assert len(image) == IMAGES * PATCHES and len(image) + len(text) == seen[0].shape[1]
    in_image = (rows.ids == model.config.image_token_id)[rows.attention_mask]
    assert torch.equal(image, seen[0][0][in_image]) and torch.equal(text, seen[0][0][~in_image])
    assert model.language_model.get_decoder().layers is layers


def test_what_was_said_last_is_looked_back_at_first() -> None:
    """The head that looks for any name: of two names as good, 10 and 50 words back, the nearer one is seen."""
    query = key = _fading(torch.ones(1, 1), channels=32)
    assert query.shape == (23, 1) and float(query.square().sum()) == pytest.approx(ANY_NAME + SAID_LAST)
    # Row 22 lands on pair 4 of 16, which turns by 1e6 ** (-4 / 16) = 0.0316 a word.
    near, far = (SAID_LAST * math.cos(0.0316 * words) for words in (10, 50))
    assert near - far == pytest.approx(8 * (0.9505 + 0.0092), abs=0.01)
    attention = SimpleNamespace(head_dim=32, **{f"{part}_proj": nn.Linear(1, 32, bias=False) for part in "qkv"})
    attention.o_proj = nn.Linear(32, 1, bias=False)
    for part in (attention.q_proj, attention.k_proj):
        nn.init.zeros_(part.weight)
    with torch.no_grad():
        _write_head(attention, 0, query, key, torch.zeros(1, 1), torch.zeros(1, 1))
    written = attention.q_proj.weight[:, 0].nonzero().flatten().tolist()
    assert written == [4, 15], "the pair that fades, and the slowest one"


def test_too_few_heads_are_refused() -> None:
    world = World()
    world.built.model.config.text_config.num_attention_heads = 4
    with pytest.raises(BuildError, match="has 4 heads of 32 channels: looking up takes at least 8 of 23"):
        world.start()


def test_a_plural_of_several_tokens_is_refused() -> None:
    world = World()
    with (
        patch.object(world.built.model, "encode_images", lambda *_: world.seen),
        pytest.raises(BuildError, match="the word 'xylophones' takes"),
    ):
        start_looking_up(
            world.built, WORDS, replace(MEANT, plurals={"xylophones": "circle"}), world.arguments, world.labels
        )
