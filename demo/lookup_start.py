"""Where the language model of a tiny base starts: looking up in the image what words name.

From random weights, attention and what it passes on wait for each other, and a bag of words about the whole image is
where that leaves training. Image tokens are already sums of words (`PatchReader`); here heads of every layer but the
first start to compare them with the words of the text. What a state holds is read by least squares, from the states of
some conversations as the untrained layers make them; all weights train on. Nothing is learned from answers.

Axes: N image tokens, M words of the text, H language width, W words that patches bear.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn

from demo.tiny import ROTARY_BASE, embeddings_of, without_marks, word_id
from model.modeling_base import MultimodalSequences
from model.modeling_pixellm import PixelLMForCausalLM
from utils.checkpoints.builder import BuildError, BuiltModel

# What a query's agreement with a key is worth, before softmax: for a word of a name, for being where a shape's centre
# is, for places (from -1 to 1, squared distance), for size (-1 to 1), for coming first from
# the left (-1 to 1), for the same word, for any name in the text, and for having been said last.
NAME, CENTRE, PLACE, SIZE, LEFTMOST, SAME_WORD, ANY_NAME, SAID_LAST = 5.0, 12.0, 20.0, 5.0, 6.0, 6.0, 12.0, 8.0
# Over how many words "said last" fades.
FADES_OVER = 100
# How far off, in places, a shape is looked for in a direction. How many words back one looks for what to look for.
A_STEP, WINDOW = 0.7, 5
# What other patches are worth beside a centre. How much of each word of a name the first token answers to: a shape that
# bears both words of a name outdoes it, a shape that bears one does not.
# The first token's say, beside that of one shape, where shapes are counted.
ELSEWHERE, NOT_FOUND, COUNT = 0.6, 0.6, 1.0
# How much of a word is added where it is found, and of random weights left in queries and keys.
PASSED_ON, LEFT_RANDOM = 0.2, 0.3
# How many times as much of a number goes with a name; how much the rows that score numbers take from the words for so
# many of a colour or a form.
WITH_NAME, SCORED_AS = 2.0, 0.06
# How many times as much a name turned round ("the star that is red") counts, where reading names is fitted: there are
# few, and one has to look farther back for them.
TURNED_ROUND = 10.0
# Numbers a word is told by, where any word of the text may be meant.
CODE_SIZE = 18
RIDGE = 1e-4


@dataclass(frozen=True)
class Shown:
    """What image tokens show: words (N, W) of 0 and 1, centre (N, 1), size and place (N, 1) and (N, 2) in -1 to 1."""

    words: torch.Tensor
    centre: torch.Tensor
    size: torch.Tensor
    place: torch.Tensor


@dataclass(frozen=True)
class Meant:
    """Words that say what to look for. plurals: other spellings of names. sizes: words for the extremes of size, as 1
    and -1. directions: words for steps to the right and down, as (1, 0), (0, 1) and so on. numbers: from words that
    patches bear to the numbers that answers say.
    """

    plurals: Mapping[str, str]
    sizes: Mapping[str, float]
    directions: Mapping[str, tuple[float, float]]
    numbers: Mapping[str, str]


@dataclass(frozen=True)
class Said:
    """What words of the text mean.

    counts (M, counts): for names that end here, the words for how many such shapes their image shows.
    own (M, names): the words of a name that end here: one, or a form with the colour before it. named (M, names): the
    same, after a name its last word, and with a colour a form up to three words before it ("the star that is red").
    recent (M, names), size (M, 1), in_order (M, 1): names and the extreme of size among the last WINDOW words, and
    whether there is no such extreme. at (M, 2), known (M, 2):
    column and row among these, and whether there is one; after a word of direction, a step from there.
    first (M, 1): the first token of all. ids, previous (M,): of the token and of the one before it, -1 where that is no
    word.
    """

    counts: torch.Tensor
    own: torch.Tensor
    named: torch.Tensor
    recent: torch.Tensor
    size: torch.Tensor
    in_order: torch.Tensor
    at: torch.Tensor
    known: torch.Tensor
    first: torch.Tensor
    ids: torch.Tensor
    previous: torch.Tensor


@torch.no_grad()
def start_looking_up(
    built: BuiltModel,
    words: Sequence[Sequence[str]],
    meant: Meant,
    examples: Mapping[str, Any],
    labels: torch.Tensor,
) -> dict[int, float]:
    """Let heads of a model with a trained projector look for what words name, for its place, and for words said before.

    Args:
        words: of colours, forms, sizes (from small to large), columns and rows, as `PatchReader` had them; after sizes
            may stand how many share a colour, how many a form, and others that are said beside these.
        meant: which words say what to look for.
        examples: arguments of forward, of one conversation about each of B images.
        labels: (B, kinds, patches) what each patch bears, numbers of `words`.

    Returns:
        For each layer that was started, how much of colours and forms its queries read in the text: the share of
        variance explained.

    Raises:
        BuildError: a word is not one token, or the language model has fewer or narrower heads than are started.
    """
    model = built.model
    rows = _rows(model, examples)
    names = [*words[0][1:], *words[1][1:]]
    shown, said = _shown(words, labels), _said(built, words, meant, rows, labels)
    embeddings = torch.cat([kind[1:] for kind in embeddings_of(built, words)])
    width = embeddings.shape[1]
    away = without_marks(embeddings @ torch.linalg.qr(torch.randn(width, width))[0])
    not_found, counting = without_marks(torch.randn(2, 1, width) * embeddings.square().mean().sqrt())
    codes = torch.randn(model.config.text_config.vocab_size, CODE_SIZE) / CODE_SIZE**0.5
    read = {}
    layers = model.language_model.get_decoder().layers
    for number in range(1, len(layers)):
        image, text = _normed_states(model, rows, number)
        reader = _Reader(image, text, shown, said, codes)
        beside = sum(len(kind) - 1 for kind in words[2:-2])
        looks = torch.cat([away, not_found])
        heads = list(_heads(reader, embeddings, looks, counting, len(names), beside, model.config.text_config.head_dim))
        _check_room(model, len(heads), max(max(len(query), len(value)) for query, _, value, _ in heads))
        for head, (query, key, value, output) in enumerate(heads):
            _write_head(layers[number].self_attn, head, query, key, value, PASSED_ON * output)
        read[number] = reader.share_of_names_read()
    _score_numbers(built, meant.numbers)
    return read


def _score_numbers(built: BuiltModel, numbers: Mapping[str, str]) -> None:
    """Let the head take what patches say of how many there are for the number itself."""
    head = cast(nn.Linear, built.model.get_output_embeddings())
    (scored_by,) = embeddings_of(built, [list(numbers)])
    for row, number in zip(scored_by, numbers.values(), strict=True):
        head.weight[word_id(built.processor, number)] += SCORED_AS * row


class _Reader:
    """Linear maps (…, H) that read facts off a layer's states, image tokens' (N, H) and words' (M, H)."""

    def __init__(self, image: torch.Tensor, text: torch.Tensor, shown: Shown, said: Said, codes: torch.Tensor) -> None:
        both, self._text, self._said = torch.cat([image, text]), text, said
        first, known = said.first[:, 0] > 0, said.previous >= 0
        of_centres = 1 + torch.cat([shown.centre, torch.zeros(len(text), 1)])
        names = said.named.shape[1]

        def of_image(facts: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
            return _read(both, torch.cat([facts, torch.zeros(len(text), facts.shape[1])]), weights)

        def of_text(facts: torch.Tensor) -> torch.Tensor:
            return _read(both, torch.cat([torch.zeros(len(image), facts.shape[1]), facts]))

        not_found = torch.full((int(first.sum()), names), NOT_FOUND)
        may_be_named = 1 + torch.cat([shown.centre, torch.zeros(len(not_found), 1)])
        self.image_names = _read(
            torch.cat([image, text[first]]), torch.cat([shown.words[:, :names], not_found]), may_be_named
        )
        worth = ELSEWHERE + (1 - ELSEWHERE) * shown.centre
        self.centre = _read(both, torch.cat([worth, said.first]))
        self.geometry = of_image(torch.cat([shown.size, shown.place, shown.place**2], dim=1))
        self.words = of_image(shown.words, of_centres)
        self.is_text, self.is_first = of_text(torch.ones_like(said.first)), of_text(said.first)
        turned_round = (said.own.sum(dim=1) > 0) & (said.named.sum(dim=1) > said.own.sum(dim=1))
        self.named = _read(text, said.named, torch.where(turned_round, TURNED_ROUND, 1.0).sqrt()[:, None])
        self.own, self.recent = _read(text, said.own), _read(text, said.recent)
        self.counts = self._read_of_names(said.counts)
        self.wanted_size, self.in_order = _read(text, said.size), _read(text, said.in_order)
        self.at, self.known = _read(text, said.at), _read(text, said.known)
        self.is_name = of_text((said.own.sum(dim=1, keepdim=True) > 0).float())
        self.code = _read(text, codes[said.ids])
        self.previous_code = _read(text, codes[said.previous.clamp(min=0)] * known[:, None])

    def _read_of_names(self, facts: torch.Tensor) -> torch.Tensor:
        """Read facts where names end, the only place where they are asked for. Colours alone, forms alone and both
        count alike, however rare."""
        ends = self._said.own.sum(dim=1) > 0
        own = self._said.own[ends]
        alone = own * (own.sum(dim=1, keepdim=True) == 1)
        shares = alone @ (1 / alone.sum(dim=0).clamp(min=1)) / own.shape[1]
        both = (shares == 0).float()
        weights = shares + both / (2 * both.sum().clamp(min=1))
        return _read(self._text[ends], facts[ends], (weights / weights.mean()).sqrt()[:, None])

    def share_of_names_read(self) -> float:
        missed = (self._text @ self.named.T - self._said.named).square().mean()
        return float(1 - missed / self._said.named.var(dim=0).mean())


def _heads(
    reader: _Reader,
    embeddings: torch.Tensor,
    away: torch.Tensor,
    counting: torch.Tensor,
    names: int,
    beside: int,
    channels: int,
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Query, key and value (channels, H) and output (H, channels) of each head that is started.

    All heads that look at the image have the same keys, so that training may turn any of them to anything.
    """
    looks = names + beside  # colour, form, size …, which a head passes on together; places are another head's

    def nothing(channels: int) -> torch.Tensor:
        return torch.zeros(channels, embeddings.shape[1])

    def query(named: torch.Tensor, geometry: torch.Tensor, first: float = 0.0) -> torch.Tensor:
        parts = named * NAME**0.5, geometry * PLACE**0.5, reader.is_text * CENTRE**0.5, reader.is_text * first
        return torch.cat(parts)

    key = torch.cat(
        [reader.image_names * NAME**0.5, reader.geometry * PLACE**0.5, reader.centre * CENTRE**0.5, reader.is_first]
    )
    named = query(reader.named, nothing(5))
    counted = query(reader.own, nothing(5), (1 - NOT_FOUND) * NAME + COUNT)
    near = query(reader.recent, torch.cat([nothing(1), 2 * reader.at, -reader.known]))
    leftmost = -reader.in_order * LEFTMOST / PLACE
    extreme = query(reader.recent, torch.cat([reader.wanted_size * SIZE / PLACE, leftmost, nothing(3)]))
    # What is found by its name is kept apart from the name, and whether anything was; the rest is added as words are.
    yield named, key, torch.cat([reader.words[:looks], reader.is_first]), torch.cat([away[:looks], away[-1:]]).T
    yield named, key, reader.words[looks:], embeddings[looks:].T
    yield counted, key, torch.cat([reader.words[:looks], reader.is_first]), torch.cat([embeddings[:looks], counting]).T
    yield near, key, reader.words[:looks], embeddings[:looks].T
    yield near, key, reader.words[looks:], embeddings[looks:].T
    yield extreme, key, reader.words[looks:], embeddings[looks:].T
    same = SAME_WORD**0.5
    yield reader.code * same, reader.previous_code * same, reader.own, embeddings[:names].T
    # With a name goes what was found there about it: who says how many there are says it later.
    counts = slice(looks - len(reader.counts), looks)
    told = torch.cat([reader.own, reader.counts])
    tells = torch.cat([embeddings[:names], WITH_NAME * embeddings[counts]])
    yield _fading(reader.is_text, channels), _fading(reader.is_name, channels), told, tells.T


def _fading(asked: torch.Tensor, channels: int) -> torch.Tensor:
    """(rows, H) a query or key that agrees in `asked` (1, H) wherever it stands, and the more so the nearer.

    The last row lands, see `_write_head`, on the pair of channels that makes half a turn in about FADES_OVER words.
    """
    half = channels // 2
    pair = round(half * math.log(FADES_OVER / math.pi) / math.log(ROTARY_BASE))
    between = torch.zeros(2 * (half - 1 - pair) - 1, asked.shape[1])
    return torch.cat([asked * ANY_NAME**0.5, between, asked * SAID_LAST**0.5])


def _check_room(model: PixelLMForCausalLM, heads: int, channels: int) -> None:
    text = model.config.text_config
    if text.num_attention_heads < heads or text.head_dim < channels:
        raise BuildError(
            f"the language model has {text.num_attention_heads} heads of {text.head_dim} channels: looking up takes at "
            f"least {heads} of {channels}"
        )


def _write_head(
    attention: Any, head: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, output: torch.Tensor
) -> None:
    """Put a head's query and key where rotations are slowest, as what they compare may be far apart."""
    channels = attention.head_dim
    half, first = channels // 2, head * channels
    slowest = [channel for pair in range(half - 1, -1, -1) for channel in (pair, pair + half)]
    own, places = slice(first, first + channels), [first + channel for channel in slowest[: len(query)]]
    for projection, rows in ((attention.q_proj, query), (attention.k_proj, key)):
        projection.weight[own] *= LEFT_RANDOM
        projection.weight[places] += rows * channels**0.25  # attention divides by the root of its channels
    attention.v_proj.weight[first : first + len(value)] = value
    attention.o_proj.weight[:, first : first + len(value)] = output


def _read(states: torch.Tensor, facts: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
    """(facts, H) the linear map that tells facts (…, facts) from states (…, H) by weighted least squares."""
    if weights is not None:
        states, facts = states * weights, facts * weights
    gram = states.T @ states
    gram += RIDGE * gram.diagonal().mean() * torch.eye(len(gram))
    return torch.linalg.solve(gram, states.T @ facts).T


def _rows(model: PixelLMForCausalLM, examples: Mapping[str, Any]) -> MultimodalSequences:
    images = model.encode_images(examples["pixel_values"], examples["resized_sizes"])
    return model.merge_multimodal_embeddings(
        examples["input_ids"], examples["attention_mask"], images, examples["image_index"]
    )


def _in_image(model: PixelLMForCausalLM, rows: MultimodalSequences) -> torch.Tensor:
    return rows.ids == model.config.image_token_id


def _normed_states(
    model: PixelLMForCausalLM, rows: MultimodalSequences, layer: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(N, H) and (M, H): what a layer's attention is given of image tokens and of words."""
    decoder = model.language_model.get_decoder()
    layers, seen = decoder.layers, list[torch.Tensor]()
    decoder.layers = layers[:layer]  # this layer and those after it would be computed for nothing
    try:
        with decoder.norm.register_forward_pre_hook(lambda module, given: seen.append(given[0])):
            model.hidden_states(rows, torch.arange(len(rows.ids)))
    finally:
        decoder.layers = layers
    found = layers[layer].input_layernorm(seen[0])
    # Rows that share nothing are packed one after the other, without their padding.
    states = found[0] if model.shares_prefixes else found[rows.attention_mask]
    in_image = _in_image(model, rows)[rows.attention_mask]
    return states[in_image], states[~in_image]


def _shown(words: Sequence[Sequence[str]], labels: torch.Tensor) -> Shown:
    kinds = [
        F.one_hot(numbers.flatten(), len(kind))[:, 1:].float()
        for kind, numbers in zip(words, labels.unbind(1), strict=True)
    ]
    ordered = [kind @ torch.tensor(_spread(kind.shape[1])) for kind in (kinds[2], *kinds[-2:])]
    centre = kinds[2].sum(dim=1, keepdim=True)
    return Shown(torch.cat(kinds, dim=1), centre, ordered[0][:, None], torch.stack(ordered[1:], dim=1))


def _said(
    built: BuiltModel, words: Sequence[Sequence[str]], meant: Meant, rows: MultimodalSequences, labels: torch.Tensor
) -> Said:
    colours, forms, *places = (kind[1:] for kind in (*words[:2], *words[-2:]))
    names = [*colours, *forms]
    in_image = _in_image(built.model, rows)
    ids = rows.ids.masked_fill(in_image, -1)

    def facts(meaning: Mapping[str, Sequence[float]]) -> torch.Tensor:
        """(B, P, …) what each word means, 0 for words without a meaning."""
        table = torch.zeros(built.model.config.text_config.vocab_size + 1, len(next(iter(meaning.values()))))
        for word, values in meaning.items():
            table[word_id(built.processor, word)] = torch.tensor(values)
        return table[ids]

    one_hot = dict(zip(names, torch.eye(len(names)).tolist(), strict=True))
    here = facts(one_hot | {other: one_hot[name] for other, name in meant.plurals.items()})
    form = torch.tensor([0.0] * len(colours) + [1.0] * len(forms))
    before, two, three = (_earlier(here, distance) for distance in (1, 2, 3))
    is_form, is_colour = ((here * share).sum(dim=-1, keepdim=True) for share in (form, 1 - form))
    own = here + before * (1 - form) * is_form
    named = own + before * (1 - here.sum(dim=-1, keepdim=True)) + (two + three) * form * is_colour
    size = facts({word: (value,) for word, value in meant.sizes.items()})
    at = [
        _latest(facts({word: (value, 1.0) for word, value in zip(kind, _spread(len(kind)), strict=True)}))
        for kind in places
    ]
    value, known = torch.stack(at, dim=-1).unbind(-2)
    step = A_STEP * facts(meant.directions)
    first = torch.zeros(*ids.shape, 1).index_fill(1, torch.tensor([0]), 1.0)
    text = rows.attention_mask & ~in_image
    return Said(
        counts=(own @ _counts(words, labels))[text],
        own=own[text],
        named=named[text],
        recent=_window(here).amax(dim=0)[text],
        size=_window(size).sum(dim=0).clamp(-1, 1)[text],
        in_order=1.0 - _window(size).abs().amax(dim=0)[text],
        at=(known * (value + step))[text],
        known=known[text],
        first=first[text],
        ids=rows.ids[text],
        previous=_earlier(ids[..., None] + 1, 1)[..., 0][text] - 1,
    )


def _counts(words: Sequence[Sequence[str]], labels: torch.Tensor) -> torch.Tensor:
    """(B, names, counts) what patches of each colour say beside their size about colours, of each form about forms."""
    kinds = [
        F.one_hot(numbers, len(kind))[..., 1:].float() for kind, numbers in zip(words, labels.unbind(1), strict=True)
    ]
    tables = []
    for own, names in enumerate(kinds[:2]):
        said = [names.new_zeros(len(labels), names.shape[-1], 0)]
        for other, beside in enumerate(kinds[3:-2]):
            said.append((names.mT @ beside).clamp(max=1) * (other == own or other > 1))
        tables.append(torch.cat(said, dim=-1))
    return torch.cat(tables, dim=1)


def _earlier(facts: torch.Tensor, distance: int) -> torch.Tensor:
    """(B, P, …) what was said `distance` words before each, 0 before the beginning."""
    earlier = torch.roll(facts, distance, dims=1)
    earlier[:, :distance] = 0
    return earlier


def _window(facts: torch.Tensor) -> torch.Tensor:
    """(WINDOW, B, P, …) what the last words said, from the last one on."""
    return torch.stack([_earlier(facts, distance) for distance in range(WINDOW)])


def _latest(facts: torch.Tensor) -> torch.Tensor:
    """(B, P, 2) the last of (value, 1.0) in the window, or 0."""
    found = torch.zeros_like(facts)
    for said in _window(facts).flip(0):
        found = torch.where(said[..., 1:] > 0, said, found)
    return found


def _spread(count: int) -> list[float]:
    return torch.linspace(-1, 1, count).tolist()
