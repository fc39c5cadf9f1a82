"""The decoding loop: prompts about images together, nothing computed twice, masks decoded at the end or on the way.

What all prompts about an image begin with (system text, the image's positions) goes through the language model once;
its keys and values are kept with the encoded image. Padded positions of the image are not fed at all: nothing may
attend to them, and the positions of the others are given, so that every state is what it is with them (golden fact M7).
Once the first token of a seg group is chosen, the rest of the group is fed with it in one pass and every choice is
checked afterwards, so that the answer is the same as token by token. Rows that are done leave the batch.

Axes: C prompts, R rows still being answered, P positions of a prompt, N tokens fed in one pass, Q targets, H language
width, V vocabulary.
"""

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from transformers import Cache, DynamicCache, LogitsProcessorList, PretrainedConfig, StoppingCriteriaList
from transformers.cache_utils import DynamicLayer

from .onednn_linear import quick_linear
from .seg_codebook import release_groups, whole_groups

if TYPE_CHECKING:
    from .modeling_pixellm import EncodedImages, PixelLMForCausalLM

CHECKED, FORCED, STEPWISE = "checked", "forced", "stepwise"
GROUP_DECODINGS = (CHECKED, FORCED, STEPWISE)

_HEADROOM = 64  # tokens a cache grows by beyond what it needs, so that few of its steps copy it


@dataclass(frozen=True)
class Decoding:
    """How tokens are chosen: the most likely one, unless seeds are given.

    processors, stopping: transformers' own. They are called for one row at a time, with the ids (1, T) of its prompt
    and its answer so far (the placeholder standing for the whole image) and its logits (1, V), so that what a row
    says does not depend on the rows beside it. An answer for which `stopping` holds ends there, its last token kept.
    seeds: one per prompt; tokens are then drawn from the softmax of the processed logits.
    groups: "checked" feeds a group in one pass and keeps what the model would have chosen itself. "forced" takes the
    rest of a group as said once its first token is chosen, whatever the model thinks. "stepwise" goes token by token.
    num_beams: above 1 that many answers of a prompt are followed at once, token by token, and the best is kept; see
    `beams.BeamLoop`.
    """

    processors: LogitsProcessorList = field(default_factory=LogitsProcessorList)
    stopping: StoppingCriteriaList = field(default_factory=StoppingCriteriaList)
    seeds: Sequence[int] | None = None
    groups: str = CHECKED
    num_beams: int = 1

    def __post_init__(self) -> None:
        if self.groups not in GROUP_DECODINGS:
            raise ValueError(f"groups must be one of {', '.join(GROUP_DECODINGS)}, found {self.groups!r}")
        if self.num_beams < 1:
            raise ValueError(f"num_beams must be at least 1, found {self.num_beams}")
        if self.num_beams > 1 and (self.seeds is not None or self.groups == FORCED):
            wish = "seeds to draw with" if self.seeds is not None else f"{FORCED} groups"
            raise ValueError(
                f"{self.num_beams} beams and {wish} were asked for: beams follow the likeliest answers only"
            )


@dataclass
class GeneratedAnswer:
    """An answer as tokens and masks.

    ids: (n,) the answer's tokens, the end token included if it was reached. low_res_mask_logits: (Q, h, w) over the
    square, one per seg group; embeddings: (Q, S, D) they were made from. num_broken: broken groups, which have no mask.
    finished: the end token was reached.
    """

    ids: torch.Tensor
    low_res_mask_logits: torch.Tensor
    embeddings: torch.Tensor
    num_broken: int
    finished: bool


@dataclass(frozen=True)
class Prefix:
    """What prompts about one image begin with, as the language model remembers it.

    layers: keys and values of each layer, (heads, positions that may be attended to, channels). length: positions it
    takes, padded ones included.
    """

    layers: list[tuple[torch.Tensor, torch.Tensor]]
    length: int

    @property
    def width(self) -> int:
        """Positions that are remembered."""
        return self.layers[0][0].shape[1]


PrefixKey = tuple[int, tuple[int, ...]]
"""An image's number and the ids of a prefix."""


class GrowingLayer(DynamicLayer):
    """A cache layer with room for tokens to come: transformers' own copies all it holds at every step."""

    keys: torch.Tensor
    values: torch.Tensor
    _key_room: torch.Tensor | None = None
    _value_room: torch.Tensor | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append (R, heads, N, channels) keys and values; returns all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        used = self.get_seq_length()
        end = used + key_states.shape[2]
        if self._key_room is None or self._key_room.shape[2] < end:
            self._key_room = _roomier(self.keys if used else None, key_states, end + _HEADROOM)
            self._value_room = _roomier(self.values if used else None, value_states, end + _HEADROOM)
        assert self._value_room is not None
        self._key_room[:, :, used:end] = key_states
        self._value_room[:, :, used:end] = value_states
        self.keys, self.values = self._key_room[:, :, :end], self._value_room[:, :, :end]
        return self.keys, self.values

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these rows only."""
        super().batch_select_indices(indices)
        self._key_room = self._value_room = None


def _roomier(held: torch.Tensor | None, like: torch.Tensor, length: int) -> torch.Tensor:
    room = like.new_empty((*like.shape[:2], length, like.shape[3]))
    if held is not None:
        room[:, :, : held.shape[2]] = held
    return room


def remembers_everything(text_config: PretrainedConfig) -> bool:
    """Whether a language model's cache keeps every position, so that it may be shared and have gaps.

    Not where attention looks back over a limited window: it counts the cache's columns.
    """
    return all(type(layer) is DynamicLayer for layer in DynamicCache(config=text_config).layers)


def cache_argument(decoder: torch.nn.Module) -> str:
    """The name a language model gives its cache: there was one for long, of which those warn that have another."""
    return "cache" if "cache" in inspect.signature(decoder.forward).parameters else "past_key_values"


@dataclass
class Row:
    """One prompt while it is answered.

    answer: tokens chosen so far. states: the state that chose each seg token, by its place in the answer.
    prompt_states: the states before the prompt's seg tokens, by their place in the prompt, where the config's
    `group_rule` asks for them. run: how many seg tokens the answer ends with. waiting: tokens to feed next, chosen ones
    first; those after the first chosen one are a guess. position: of the first of them. log_probability: of the answer
    so far, where several are weighed against each other.
    """

    number: int
    prompt: list[int]
    position: int
    answer: list[int] = field(default_factory=list)
    states: dict[int, torch.Tensor] = field(default_factory=dict)
    prompt_states: dict[int, torch.Tensor] = field(default_factory=dict)
    run: int = 0
    waiting: list[int] = field(default_factory=list)
    finished: bool = False
    done: bool = False
    generator: torch.Generator | None = None
    log_probability: float = 0.0


class DecodingLoop:
    """One batch of prompts on its way; `passes` goes on, the rows say how far each is.

    settled: whether what a row has said stays said while the loop goes on.
    """

    settled = True

    def __init__(
        self,
        model: "PixelLMForCausalLM",
        images: "EncodedImages",
        prompts: list[torch.Tensor],
        image_index: torch.Tensor,
        end_token_id: int,
        max_new_tokens: int,
        decoding: Decoding | None = None,
    ) -> None:
        """Answers to begin.

        Args:
            images: encoded; prefixes met here are kept in it.
            prompts: C rows of token ids, each with at most one image placeholder. image_index: (C,) their images.
            max_new_tokens: an answer stops there if the end token has not come.

        Raises:
            ValueError: a number is impossible, or seeds and prompts differ in number.
        """
        decoding = decoding or Decoding()
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, found {max_new_tokens}")
        if decoding.seeds is not None and len(decoding.seeds) != len(prompts):
            raise ValueError(f"{len(decoding.seeds)} seeds were given for {len(prompts)} prompts; expected one each")
        self.model, self.images, self.decoding = model, images, decoding
        self.image_index, self.end_token_id, self.max_new_tokens = image_index, end_token_id, max_new_tokens
        self.seg_token_ids: list[int] = model.config.seg_token_ids
        self._seg_set = set(self.seg_token_ids)
        self._remembers = remembers_everything(model.config.text_config)
        self.rows = [Row(number, prompt.tolist(), 0) for number, prompt in enumerate(prompts)]
        self._prompts = prompts
        self._live: list[Row] = list(self.rows)
        device = image_index.device
        if decoding.seeds is not None:
            for row, seed in zip(self.rows, decoding.seeds, strict=True):
                row.generator = torch.Generator(device).manual_seed(seed)
        self._cache = (
            Cache(layer_class_to_replicate=GrowingLayer)
            if self._remembers
            else DynamicCache(config=model.config.text_config)
        )
        self._mask = torch.zeros((len(prompts), 0), dtype=torch.bool, device=device)
        self._gaps = False

    # --- going on -------------------------------------------------------------------------------------------------

    def run(self) -> list[GeneratedAnswer]:
        """One answer per prompt, the same as if it had been asked alone.

        Which seg tokens get masks is the config's `group_rule`; by that of the release the groups of a prompt come
        first.
        """
        for _ in self.passes():
            pass
        return self.answers() if self.rows else []

    def passes(self) -> Iterator[None]:
        """Run the language model until every row is done, pausing after each pass."""
        if not self.rows:
            return
        self._choose(self._read_prompts())
        yield
        while self._live:
            self._choose(self._feed_waiting())
            yield

    def _read_prompts(self) -> torch.Tensor:
        """(C, 1, H): the state after each prompt."""
        cuts = [self._prefix_end(row.prompt) for row in self.rows]
        keys: list[PrefixKey | None] = [
            (int(self.image_index[row.number]), tuple(row.prompt[:cut])) if cut else None
            for row, cut in zip(self.rows, cuts, strict=True)
        ]
        self._remember([key for key in dict.fromkeys(keys) if key and key not in self.images.prefixes])
        self._start_from([self.images.prefixes[key] if key else None for key in keys])
        tails = []
        for row, cut in zip(self.rows, cuts, strict=True):
            tails.append(self._expanded(self._prompts[row.number][cut:], row.number))
        length = max(len(embeddings) for embeddings, _ in tails)
        first = tails[0][0]
        inputs = first.new_zeros((len(tails), length, first.shape[-1]))
        valid = torch.zeros((len(tails), length), dtype=torch.bool, device=first.device)
        positions = torch.zeros((len(tails), length), dtype=torch.long, device=first.device)
        for row, (embeddings, mask) in zip(self.rows, tails, strict=True):
            # The last tokens of all rows stand in one column.
            start = length - len(embeddings)
            inputs[row.number, start:], valid[row.number, start:] = embeddings, mask
            positions[row.number, start:] = torch.arange(len(embeddings), device=first.device) + row.position
            row.position += len(embeddings)
        states = self._forward(inputs, valid, positions)
        if self.model.config.group_rule == "release":
            for row, cut in zip(self.rows, cuts, strict=True):
                self._keep_prompt_states(row, cut, states[row.number])
        return states[:, -1:]

    def _prefix_end(self, prompt: list[int]) -> int:
        """How many tokens of a prompt are its prefix: all up to the image, unless nothing can be gained from it."""
        placeholder = self.model.config.image_token_id
        if not self._remembers or placeholder not in prompt:
            return 0
        end = prompt.index(placeholder) + 1
        # Of what is in the prefix no states are kept, and a seg token needs that of the token before it.
        return 0 if end == len(prompt) or self._seg_set & set(prompt[: end + 1]) else end

    def _expanded(self, ids: torch.Tensor, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(P, H) embeddings and (P,) mask of tokens whose placeholder, if any, is the image of prompt `number`."""
        index = self.image_index[number : number + 1]
        rows = self.model.expand_rows(ids[None], torch.ones_like(ids)[None], self.images, index)
        return rows.embeddings[0], rows.attention_mask[0]

    def _remember(self, keys: list[PrefixKey]) -> None:
        """Run prefixes through the language model and keep their keys and values with the images."""
        if not keys:
            return
        device = self.image_index.device
        embeddings, positions, lengths = [], [], []
        for image, ids in keys:
            tokens = torch.tensor(ids, device=device)
            rows = self.model.expand_rows(
                tokens[None], torch.ones_like(tokens)[None], self.images, torch.tensor([image], device=device)
            )
            valid = rows.attention_mask[0]
            embeddings.append(rows.embeddings[0, valid])
            positions.append(valid.nonzero()[:, 0])
            lengths.append(len(valid))
        pad = torch.nn.utils.rnn.pad_sequence
        cache = DynamicCache()
        # Padding comes after, where no position looks back at it: no mask is needed.
        self._decode(pad(embeddings, batch_first=True), pad(positions, batch_first=True), cache, None)
        for number, (key, length) in enumerate(zip(keys, lengths, strict=True)):
            width = len(positions[number])
            layers = [(x.keys[number, :, :width].clone(), x.values[number, :, :width].clone()) for x in cache.layers]
            self.images.prefixes[key] = Prefix(layers, length)

    def _start_from(self, prefixes: list[Prefix | None]) -> None:
        """Fill the cache with every row's prefix, their ends in one column."""
        known = [prefix for prefix in prefixes if prefix is not None]
        if not known:
            return
        length = max(prefix.width for prefix in known)
        count, device = len(prefixes), self._mask.device
        self._mask = torch.zeros((count, length), dtype=torch.bool, device=device)
        for row, prefix in zip(self.rows, prefixes, strict=True):
            if prefix is not None:
                self._mask[row.number, length - prefix.width :] = True
                row.position = prefix.length
        self._gaps = any(prefix is None or prefix.width < length for prefix in prefixes)
        for number, parts in enumerate(known[0].layers):
            filled = [part.new_zeros((count, part.shape[0], length, part.shape[2])) for part in parts]
            for row, prefix in zip(self.rows, prefixes, strict=True):
                if prefix is not None:
                    for target, source in zip(filled, prefix.layers[number], strict=True):
                        target[row.number, :, length - prefix.width :] = source
            self._cache.update(*filled, number)

    def _keep_prompt_states(self, row: Row, cut: int, states: torch.Tensor) -> None:
        """states: (P, H) of the prompt's last positions. A token's state is that of the position before it."""
        tail = row.prompt[cut:]
        column = len(states)
        for place in range(len(tail) - 1, 0, -1):
            column -= self.model.config.num_image_tokens if tail[place] == self.model.config.image_token_id else 1
            if tail[place] in self._seg_set:
                row.prompt_states[cut + place] = states[column - 1].clone()

    def _feed_waiting(self) -> torch.Tensor:
        """(R, N, H): the states after each row's waiting tokens, of which it may have fewer than N."""
        length = max(len(row.waiting) for row in self._live)
        device = self._mask.device
        ids = torch.tensor([row.waiting + [0] * (length - len(row.waiting)) for row in self._live], device=device)
        counts = torch.tensor([len(row.waiting) for row in self._live], device=device)
        steps = torch.arange(length, device=device)
        starts = torch.tensor([row.position for row in self._live], device=device)
        # Filling has a position too, one that exists in any table of positions.
        positions = starts[:, None] + torch.minimum(steps[None], counts[:, None] - 1)
        return self._forward(self.model.get_input_embeddings()(ids), steps[None] < counts[:, None], positions)

    def _forward(self, inputs: torch.Tensor, valid: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """(R, N, H) states after (R, N, H) inputs; valid: (R, N) bool, where they may be attended to."""
        self._mask = torch.cat([self._mask, valid], dim=1)
        self._gaps = self._gaps or not bool(valid.all())
        return self._decode(inputs, positions, self._cache, self._mask.long() if self._gaps else None)

    def _decode(
        self, inputs: torch.Tensor, positions: torch.Tensor, cache: Cache, mask: torch.Tensor | None
    ) -> torch.Tensor:
        decoder = self.model.language_model.get_decoder()
        with quick_linear(inputs.device, self.model.row_kernel):
            return decoder(
                inputs_embeds=inputs,
                attention_mask=mask,
                position_ids=positions,
                use_cache=True,
                **{cache_argument(decoder): cache},
            ).last_hidden_state

    # --- choosing -------------------------------------------------------------------------------------------------

    def _choose(self, states: torch.Tensor) -> None:
        """Take the tokens that (R, N, H) states choose, then let rows that are done leave."""
        rows = self._live
        wanted = [(index, column) for index, row in enumerate(rows) for column in self._columns(row)]
        chooser = _Chooser(self, states, wanted)
        rejected: list[tuple[int, int]] = []
        for index, row in enumerate(rows):
            guesses = row.waiting[1:]
            fed = max(1, len(row.waiting))
            for column in range(fed):
                taken_on_trust = self.decoding.groups == FORCED and column < len(guesses)
                token = guesses[column] if taken_on_trust else chooser.token(index, column)
                self._take(row, token, states[index, column])
                if row.done or column == len(guesses) or token != guesses[column]:
                    break
            rejected += [(index, late) for late in range(column + 1, fed)]
            row.position += column + 1 if row.waiting else 0
            row.waiting = [row.answer[-1], *self._guess(row)]
        self._forget(rejected, states.shape[1])
        self._leave()

    def _columns(self, row: Row) -> range:
        """Columns of a row's states that need logits."""
        fed = max(1, len(row.waiting))
        return range(fed - 1, fed) if self.decoding.groups == FORCED else range(fed)

    def _take(self, row: Row, token: int, state: torch.Tensor) -> None:
        if token in self._seg_set:
            row.states[len(row.answer)] = state.clone()  # the pass's other states are not kept
            row.run += 1
        else:
            row.run = 0
        row.answer.append(token)
        row.finished = token == self.end_token_id
        row.done = row.finished or len(row.answer) == self.max_new_tokens or self._stops(row)

    def _stops(self, row: Row) -> bool:
        if not self.decoding.stopping:
            return False
        ids = torch.tensor([row.prompt + row.answer], device=self._mask.device)
        # Criteria that look at scores are rare; transformers itself hands None where none are kept.
        return bool(self.decoding.stopping(ids, None)[0])

    def _guess(self, row: Row) -> list[int]:
        """What will follow a group's first token, as far as the answer may go on."""
        opened = row.run % len(self.seg_token_ids) == 1
        if self.decoding.groups == STEPWISE or not self._remembers or not opened:
            return []
        left = self.max_new_tokens - len(row.answer)
        # The last guess that is checked chooses one token more.
        return self.seg_token_ids[1:][: left if self.decoding.groups == FORCED else left - 1]

    def _forget(self, rejected: list[tuple[int, int]], length: int) -> None:
        """Mask guesses that did not come true; columns count from the first of the last pass."""
        for index, column in rejected:
            self._mask[index, column - length] = False
            self._gaps = True

    def _leave(self) -> None:
        staying = [index for index, row in enumerate(self._live) if not row.done]
        if len(staying) == len(self._live):
            return
        self._live = [self._live[index] for index in staying]
        self._keep(staying)

    def _keep(self, indices: list[int]) -> None:
        """Let the cache hold these of its rows, in this order; one may be named more than once."""
        if indices and indices != list(range(len(self._mask))):
            kept = torch.tensor(indices, device=self._mask.device)
            self._cache.batch_select_indices(kept)
            self._mask = self._mask[kept]
            self._gaps = not bool(self._mask.all())

    # --- masks ----------------------------------------------------------------------------------------------------

    def group_states(self, row: Row) -> tuple[list[torch.Tensor], int]:
        """The (S * K, H) states of each of a row's whole groups so far, and how many groups are broken."""
        size = len(self.seg_token_ids)
        if self.model.config.group_rule == "release":
            groups, broken = release_groups(row.prompt + row.answer, self.seg_token_ids)
            first = len(row.prompt)
            found = [
                [row.states[place - first] if place >= first else row.prompt_states[place] for place in group]
                for group in groups
            ]
        else:
            starts, broken = whole_groups(row.answer, self.seg_token_ids)
            found = [[row.states[place] for place in range(start, start + size)] for start in starts]
        return [torch.stack(states) for states in found], broken

    def decode_groups(self, groups: list[torch.Tensor], owners: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """(Q, S, D) embeddings and (Q, h, w) mask logits of groups of the prompts `owners`."""
        owner_rows = torch.tensor(owners, dtype=torch.long, device=self.image_index.device)
        if groups:
            with quick_linear(owner_rows.device):
                return self.model.decode_masks(torch.stack(groups), self.images, self.image_index[owner_rows])
        config, table = self.model.config, self.model.get_input_embeddings().weight
        side = config.grid_size * 2**config.num_scales
        return table.new_zeros((0, config.num_scales, config.embedding_dim)), table.new_zeros((0, side, side))

    def answers(self) -> list[GeneratedAnswer]:
        """What all rows said, the masks of all of them decoded together."""
        groups: list[torch.Tensor] = []
        counts, broken = [], []
        for row in self.rows:
            found, num_broken = self.group_states(row)
            groups += found
            counts.append(len(found))
            broken.append(num_broken)
        owners = [row.number for row, count in zip(self.rows, counts, strict=True) for _ in range(count)]
        embeddings, logits = self.decode_groups(groups, owners)
        parts = zip(self.rows, logits.split(counts), embeddings.split(counts), broken, strict=True)
        return [
            GeneratedAnswer(self.answer_ids(row), row_logits, row_embeddings, num_broken, row.finished)
            for row, row_logits, row_embeddings, num_broken in parts
        ]

    def answer_ids(self, row: Row) -> torch.Tensor:
        """(n,) the tokens a row has said."""
        return torch.tensor(row.answer, dtype=torch.long, device=self._mask.device)


class _Chooser:
    """The tokens that the states of one pass choose: all at once where they are simply the most likely ones.

    wanted: (row among the live ones, column) of the states to choose by.
    """

    def __init__(self, loop: DecodingLoop, states: torch.Tensor, wanted: list[tuple[int, int]]) -> None:
        self._loop = loop
        rows, columns = (torch.tensor(part, device=states.device) for part in zip(*wanted, strict=True))
        live = [loop._live[index] for index, _ in wanted]
        places = [(row.number, len(row.answer) + column) for row, (_, column) in zip(live, wanted, strict=True)]
        self._logits = next_logits(loop.model, states[rows, columns], places)
        self._number = {place: number for number, place in enumerate(wanted)}
        simple = not loop.decoding.processors and loop.decoding.seeds is None
        self._best = self._logits.argmax(dim=-1).tolist() if simple else None

    def token(self, index: int, column: int) -> int:
        """The choice of one state; with processors and seeds, of a row's states in order."""
        number = self._number[index, column]
        if self._best is not None:
            return self._best[number]
        row = self._loop._live[index]
        logits = processed(self._loop.decoding.processors, row, self._logits[number : number + 1])
        if row.generator is None:
            return int(logits.argmax(dim=-1))
        return int(torch.multinomial(logits.float().softmax(dim=-1), 1, generator=row.generator))


def processed(processors: LogitsProcessorList, row: Row, logits: torch.Tensor) -> torch.Tensor:
    """(1, V) logits of a row's next token after `processors`, float32 where there are any."""
    if not processors:
        return logits
    ids = torch.tensor([row.prompt + row.answer], device=logits.device)
    return processors(ids, logits.float())


def next_logits(model: "PixelLMForCausalLM", states: torch.Tensor, places: list[tuple[int, int]]) -> torch.Tensor:
    """(K, H) states -> (K, V) logits of the next tokens. places: for each the prompt's number and the place in the
    answer that its token would take.
    """
    with quick_linear(states.device, model.row_kernel):
        return model.get_output_embeddings()(states)
