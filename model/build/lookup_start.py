"""Where the language model of a tiny base starts: looking up in the picture what words name.

From random weights, attention and what it passes on wait for each other, and a bag of words about the whole picture is
where that leaves training. Image tokens are already sums of words (`PatchReader`); here heads of every layer but the
first start to compare them with the words of the text. What a state holds is read by least squares, from the states of
some conversations as the untrained layers make them; all weights train on. Nothing is learned from answers.

Axes: N image tokens, M words of the text, H language width, W words that patches bear.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from ..modeling_pixellm import ExpandedRows, PixelLMForCausalLM
from .builder import BuildError, BuiltModel
from .tiny import embeddings_of, without_marks, word_id

# What a query's agreement with a key is worth, before softmax: for a word of a name, for being where a shape's centre
# is, for places (from -1 to 1, squared distance), for size (-1 to 1), for coming first from
# the left (-1 to 1), for the same word, for being the name that was said last.
NAME, CENTRE, PLACE, SIZE, LEFTMOST, SAME_WORD, LAST_NAME = 5.0, 12.0, 20.0, 5.0, 6.0, 6.0, 8.0
# The rotation, counted from the fastest, that tells a name just said from earlier ones: 0.075 radians per word at 32
# channels.
RECENCY = 3
# How far off, in places, a shape is looked for in a direction. How many words back one looks for what to look for.
A_STEP, WINDOW = 0.7, 5
# What other patches are worth beside a centre. How much of each word of a name the first token answers to: a shape that
# bears both words of a name outdoes it, a shape that bears one does not.
# The first token's say, beside that of one shape, where shapes are counted.
ELSEWHERE, NOT_FOUND, COUNT = 0.6, 0.6, 1.0
# How much of a word is added where it is found, of what is told about the name said last, and of random weights left in
# queries and keys.
PASSED_ON, TOLD_ON, LEFT_RANDOM = 0.2, 0.5, 0.3
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
    and -1. directions: words for steps to the right and down, as (1, 0), (0, 1) and so on."""

    plurals: Mapping[str, str]
    sizes: Mapping[str, float]
    directions: Mapping[str, tuple[float, float]]


@dataclass(frozen=True)
class Said:
    """What words of the text mean.

    beside (M, beside): for names that end here, the words that such shapes bear beside their size, the mean over them.
    own (M, names): the words of a name that end here: one, or a form with the colour before it. named (M, names): the
    same, after a name its last word, and with a colour a form up to three words before it ("the star that is red").
    recent (M, names), size (M, 1), in_order (M, 1): names and the extreme of size among the last WINDOW words, and
    whether there is no such extreme. at (M, 2), known (M, 2):
    column and row among these, and whether there is one; after a word of direction, a step from there.
    first (M, 1): the first token of all. ids, previous (M,): of the token and of the one before it, -1 where that is no
    word.
    """

    beside: torch.Tensor
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
            may stand others that centres bear beside these.
        meant: which words say what to look for.
        examples: arguments of forward, of one conversation about each of B pictures.
        labels: (B, kinds, patches) what each patch bears, numbers of `words`, -1 for none.

    Returns:
        For each layer that was started, how much of colours and forms its queries read in the text: the share of
        variance explained.

    Raises:
        BuildError: a word is not one token, or the language model has fewer or narrower heads than are started.
    """
    model = built.model
    rows = _rows(model, examples)
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
        sizes = len(words[2]) - 1
        heads = list(_heads(reader, embeddings, torch.cat([away, not_found]), counting, sizes))
        _check_room(model, len(heads), max(len(head.query) for head in heads))
        for place, head in enumerate(heads):
            _write_head(layers[number].self_attn, place, head)
        read[number] = reader.share_of_names_read()
    return read


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
        self.named, self.own, self.recent = (_read(text, facts) for facts in (said.named, said.own, said.recent))
        name = said.own.sum(dim=1) > 0
        self.is_name = of_text(name[:, None].float())
        self.beside = _read(text[name], said.beside[name])
        self.wanted_size, self.in_order = _read(text, said.size), _read(text, said.in_order)
        self.at, self.known = _read(text, said.at), _read(text, said.known)
        self.code = _read(text, codes[said.ids])
        self.previous_code = _read(text, codes[said.previous.clamp(min=0)] * known[:, None])

    def share_of_names_read(self) -> float:
        missed = (self._text @ self.named.T - self._said.named).square().mean()
        return float(1 - missed / self._said.named.var(dim=0).mean())


@dataclass(frozen=True)
class _Head:
    """Query, key and value (channels, H) and output (H, channels) of a head.

    rotation: the one, counted from the fastest, that query and key turn with; None: the slowest there are.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    output: torch.Tensor
    rotation: int | None = None


def _heads(
    reader: _Reader, embeddings: torch.Tensor, away: torch.Tensor, counting: torch.Tensor, sizes: int
) -> Iterator[_Head]:
    """The heads that are started.

    All heads that look at the picture have the same keys, so that training may turn any of them to anything.
    """
    names = len(reader.own)
    looks = names + sizes + len(reader.beside)  # what a head passes on together; places are another head's

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
    whether_found = torch.cat([reader.words[:looks], reader.is_first])
    seen, places = (reader.words[:looks], embeddings[:looks].T), (reader.words[looks:], embeddings[looks:].T)
    # What is found by its name is kept apart from the name, and whether anything was; the rest is added as words are.
    yield _Head(named, key, whether_found, PASSED_ON * torch.cat([away[:looks], away[-1:]]).T)
    yield _Head(named, key, places[0], PASSED_ON * places[1])
    yield _Head(counted, key, whether_found, PASSED_ON * torch.cat([embeddings[:looks], counting]).T)
    yield _Head(near, key, seen[0], PASSED_ON * seen[1])
    yield _Head(near, key, places[0], PASSED_ON * places[1])
    yield _Head(extreme, key, places[0], PASSED_ON * places[1])
    same = SAME_WORD**0.5
    yield _Head(reader.code * same, reader.previous_code * same, reader.own, PASSED_ON * embeddings[:names].T)
    # With the name said last goes what was found there about it: whether a list goes on, and with what.
    told, tells = (
        torch.cat([reader.own, reader.beside]),
        torch.cat([embeddings[:names], embeddings[names + sizes : looks]]),
    )
    last = LAST_NAME**0.5
    yield _Head(reader.is_text * last, reader.is_name * last, told, TOLD_ON * tells.T, RECENCY)


def _check_room(model: PixelLMForCausalLM, heads: int, channels: int) -> None:
    text = model.config.text_config
    if text.num_attention_heads < heads or text.head_dim < channels:
        raise BuildError(
            f"the language model has {text.num_attention_heads} heads of {text.head_dim} channels: looking up takes at "
            f"least {heads} of {channels}"
        )


def _write_head(attention: Any, place: int, head: _Head) -> None:
    """Put query and key of head number `place` where they belong: what they compare may be far apart, or must be near.

    Where more is passed on than a head has channels, these get what comes nearest to it.
    """
    channels = attention.head_dim
    half, first = channels // 2, place * channels
    pairs = range(half - 1, -1, -1) if head.rotation is None else [head.rotation]
    turned = [channel for pair in pairs for channel in (pair, pair + half)]
    own, compared = slice(first, first + channels), [first + channel for channel in turned[: len(head.query)]]
    for projection, rows in ((attention.q_proj, head.query), (attention.k_proj, head.key)):
        projection.weight[own] *= LEFT_RANDOM
        projection.weight[compared] += rows * channels**0.25  # attention divides by the root of its channels
    value, output = _fitted(head.value, head.output, channels)
    attention.v_proj.weight[first : first + len(value)] = value
    attention.o_proj.weight[:, first : first + len(value)] = output


def _fitted(value: torch.Tensor, output: torch.Tensor, channels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(at most `channels`, H) and (H, as many) whose product is nearest to that of output and value."""
    if len(value) <= channels:
        return value, output
    left, strengths, right = torch.linalg.svd(output @ value)
    roots = strengths[:channels].sqrt()
    return right[:channels] * roots[:, None], left[:, :channels] * roots


def _read(states: torch.Tensor, facts: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
    """(facts, H) the linear map that tells facts (…, facts) from states (…, H) by weighted least squares."""
    if weights is not None:
        states, facts = states * weights, facts * weights
    gram = states.T @ states
    gram += RIDGE * gram.diagonal().mean() * torch.eye(len(gram))
    return torch.linalg.solve(gram, states.T @ facts).T


def _rows(model: PixelLMForCausalLM, examples: Mapping[str, Any]) -> ExpandedRows:
    pictures = model.encode_pictures(examples["pixel_values"], examples["resized_sizes"])
    return model.expand_rows(examples["input_ids"], examples["attention_mask"], pictures, examples["image_index"])


def _in_picture(model: PixelLMForCausalLM, rows: ExpandedRows) -> torch.Tensor:
    return rows.ids == model.config.image_token_id


def _normed_states(model: PixelLMForCausalLM, rows: ExpandedRows, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(N, H) and (M, H): what a layer's attention is given of image tokens and of words."""
    seen: list[torch.Tensor] = []
    norm = model.language_model.get_decoder().layers[layer].input_layernorm
    with norm.register_forward_hook(lambda module, given, output: seen.append(output)):
        model.hidden_states(rows, torch.arange(len(rows.ids)))
    # Rows that share nothing are packed one after the other, without their padding.
    states = seen[0][0] if model.shares_prefixes else seen[0][rows.attention_mask]
    in_picture = _in_picture(model, rows)[rows.attention_mask]
    return states[in_picture], states[~in_picture]


def _shown(words: Sequence[Sequence[str]], labels: torch.Tensor) -> Shown:
    kinds = [kind.flatten(0, 1) for kind in _one_hot(words, labels)]
    ordered = [kind @ torch.tensor(_spread(kind.shape[1])) for kind in (kinds[2], *kinds[-2:])]
    centre = kinds[2].sum(dim=1, keepdim=True)
    return Shown(torch.cat(kinds, dim=1), centre, ordered[0][:, None], torch.stack(ordered[1:], dim=1))


def _said(
    built: BuiltModel, words: Sequence[Sequence[str]], meant: Meant, rows: ExpandedRows, labels: torch.Tensor
) -> Said:
    colours, forms, *places = (kind[1:] for kind in (*words[:2], *words[-2:]))
    names = [*colours, *forms]
    in_picture = _in_picture(built.model, rows)
    ids = rows.ids.masked_fill(in_picture, -1)

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
    text = rows.attention_mask & ~in_picture
    return Said(
        beside=_beside(own, words, labels)[text],
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


def _beside(own: torch.Tensor, words: Sequence[Sequence[str]], labels: torch.Tensor) -> torch.Tensor:
    """(B, P, beside) what the shapes bear, beside their size, whose name ends here: the mean over them."""
    kinds = _one_hot(words, labels)
    names, beside = torch.cat(kinds[:2], dim=-1), torch.cat(kinds[3:-2], dim=-1)
    asked = own.sum(dim=-1, keepdim=True)
    meant = (own @ names.mT == asked) & (asked > 0) & (kinds[2].sum(dim=-1)[:, None] > 0)
    return meant.float() @ beside / meant.sum(dim=-1, keepdim=True).clamp(min=1)


def _one_hot(words: Sequence[Sequence[str]], labels: torch.Tensor) -> list[torch.Tensor]:
    """For each kind (B, patches, words) of 0 and 1, without the word for nothing."""
    shown = labels.clamp(min=0).unbind(1)
    return [F.one_hot(numbers, len(kind))[..., 1:].float() for kind, numbers in zip(words, shown, strict=True)]


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
