"""The decoding loop: prompts about images together, nothing computed twice, masks decoded at the end or on the way.

What all prompts about an image begin with (system text, the image's positions) goes through the language model once;
its keys and values are kept with the encoded image. Padded positions of the image are not fed at all: nothing may
attend to them, and the positions of the others are given, so that every state is what it is with them (docs/facts.md,
M7).
Once the first token of a seg group is chosen, the rest of the group is fed with it in one pass and every choice is
checked afterwards, so that the answer is the same as token by token. Sequences that are done leave the batch.

Axes: C prompts, R sequences still being answered, P positions of a prompt, N tokens fed in one pass, Q targets, H
language width, V vocabulary.
"""

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from transformers import Cache, DynamicCache, LogitsProcessorList, PretrainedConfig, StoppingCriteriaList
from transformers.cache_utils import DynamicLayer

from .modeling_base import EncodedImages, PixelLMPreTrainedModel, Prefix, PrefixKey
from .onednn_linear import onednn_linear
from .seg_codebook import release_groups, whole_groups

CHECKED, FORCED, STEPWISE = "checked", "forced", "stepwise"
GROUP_DECODINGS = (CHECKED, FORCED, STEPWISE)

_HEADROOM = 64  # tokens a cache grows by beyond what it needs, so that few of its steps copy it


@dataclass(frozen=True)
class Decoding:
    """How tokens are chosen: the most likely one, unless seeds are given.

    processors, stopping: transformers' own. They are called for one sequence at a time, with the ids (1, T) of its
    prompt and its answer so far (the placeholder standing for the whole image) and its logits (1, V), so that an answer
    does not depend on the prompts beside it. An answer for which `stopping` holds ends there, its last token kept.
    seeds: one per prompt; tokens are then drawn from the softmax of the processed logits.
    groups: "checked" feeds a group in one pass and keeps what the model would have chosen itself. "forced" appends
    the rest of a group once its first token is chosen, whatever the model thinks. "stepwise" goes token by token.
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
            self._key_room = _make_room(self.keys if used else None, key_states, end + _HEADROOM)
            self._value_room = _make_room(self.values if used else None, value_states, end + _HEADROOM)
        assert self._value_room is not None
        self._key_room[:, :, used:end] = key_states
        self._value_room[:, :, used:end] = value_states
        self.keys, self.values = self._key_room[:, :, :end], self._value_room[:, :, :end]
        return self.keys, self.values

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these sequences only."""
        super().batch_select_indices(indices)
        self._key_room = self._value_room = None


def _make_room(kept: torch.Tensor | None, like: torch.Tensor, length: int) -> torch.Tensor:
    room = like.new_empty((*like.shape[:2], length, like.shape[3]))
    if kept is not None:
        room[:, :, : kept.shape[2]] = kept
    return room


def keeps_all_positions(text_config: PretrainedConfig) -> bool:
    """Whether a language model's cache keeps every position, so that it may be shared and have gaps.

    Not where attention looks back over a limited window: it counts the cache's columns.
    """
    return all(type(layer) is DynamicLayer for layer in DynamicCache(config=text_config).layers)


def cache_argument(decoder: torch.nn.Module) -> str:
    """The name a language model gives its cache: there was one for long, of which those warn that have another."""
    return "cache" if "cache" in inspect.signature(decoder.forward).parameters else "past_key_values"


@dataclass
class SequenceState:
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
    """A batch of prompts being answered: `decode_steps` goes on, `sequences` say how far each is.

    is_final: whether a token once chosen stays chosen; with beams it may be dropped again.
    """

    is_final = True

    def __init__(
        self,
        model: PixelLMPreTrainedModel,
        images: EncodedImages,
        prompts: list[torch.Tensor],
        image_index: torch.Tensor,
        end_token_id: int,
        max_new_tokens: int,
        decoding: Decoding | None = None,
    ) -> None:
        """Prepare to answer.

        Args:
            images: encoded; prefixes met here are kept in them.
            prompts: C sequences of token ids (T,), each with at most one placeholder. image_index: (C,) their images.
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
        self._keeps_all = keeps_all_positions(model.config.text_config)
        self.sequences = [SequenceState(number, prompt.tolist(), 0) for number, prompt in enumerate(prompts)]
        self._prompts = prompts
        self._live: list[SequenceState] = list(self.sequences)
        device = image_index.device
        if decoding.seeds is not None:
            for sequence, seed in zip(self.sequences, decoding.seeds, strict=True):
                sequence.generator = torch.Generator(device).manual_seed(seed)
        self._cache = (
            Cache(layer_class_to_replicate=GrowingLayer)
            if self._keeps_all
            else DynamicCache(config=model.config.text_config)
        )
        self._mask = torch.zeros((len(prompts), 0), dtype=torch.bool, device=device)
        self._gaps = False

    def run(self) -> list[GeneratedAnswer]:
        """One answer per prompt, the same as if it had been asked alone.

        Which seg tokens get masks is the config's `group_rule`; by that of the release the groups of a prompt come
        first.
        """
        for _ in self.decode_steps():
            pass
        return self.answers() if self.sequences else []

    def decode_steps(self) -> Iterator[None]:
        """Run the language model until every sequence is done, pausing after each step."""
        if not self.sequences:
            return
        self._choose(self._read_prompts())
        yield
        while self._live:
            self._choose(self._feed_waiting())
            yield

    def _read_prompts(self) -> torch.Tensor:
        """(C, 1, H): the state after each prompt."""
        cuts = [self._prefix_end(sequence.prompt) for sequence in self.sequences]
        keys: list[PrefixKey | None] = [
            (int(self.image_index[sequence.number]), tuple(sequence.prompt[:cut])) if cut else None
            for sequence, cut in zip(self.sequences, cuts, strict=True)
        ]
        self._compute_prefixes([key for key in dict.fromkeys(keys) if key and key not in self.images.prefixes])
        self._fill_cache([self.images.prefixes[key] if key else None for key in keys])
        tails = []
        for sequence, cut in zip(self.sequences, cuts, strict=True):
            tails.append(self._embed(self._prompts[sequence.number][cut:], sequence.number))
        length = max(len(embeddings) for embeddings, _ in tails)
        first = tails[0][0]
        inputs = first.new_zeros((len(tails), length, first.shape[-1]))
        valid = torch.zeros((len(tails), length), dtype=torch.bool, device=first.device)
        positions = torch.zeros((len(tails), length), dtype=torch.long, device=first.device)
        for sequence, (embeddings, mask) in zip(self.sequences, tails, strict=True):
            # The last tokens of all prompts stand in one column.
            start = length - len(embeddings)
            inputs[sequence.number, start:], valid[sequence.number, start:] = embeddings, mask
            positions[sequence.number, start:] = torch.arange(len(embeddings), device=first.device) + sequence.position
            sequence.position += len(embeddings)
        states = self._forward(inputs, valid, positions)
        if self.model.config.group_rule == "release":
            for sequence, cut in zip(self.sequences, cuts, strict=True):
                self._keep_prompt_states(sequence, cut, states[sequence.number])
        return states[:, -1:]

    def _prefix_end(self, prompt: list[int]) -> int:
        """How many tokens of a prompt are its prefix: all up to the image, unless nothing can be gained from it."""
        placeholder = self.model.config.image_token_id
        if not self._keeps_all or placeholder not in prompt:
            return 0
        end = prompt.index(placeholder) + 1
        # Of what is in the prefix no states are kept, and a seg token needs that of the token before it.
        return 0 if end == len(prompt) or self._seg_set & set(prompt[: end + 1]) else end

    def _embed(self, ids: torch.Tensor, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(P, H) embeddings and (P,) mask of tokens whose placeholder, if any, is the image of prompt `number`."""
        index = self.image_index[number : number + 1]
        merged = self.model.merge_multimodal_embeddings(ids[None], torch.ones_like(ids)[None], self.images, index)
        return merged.embeddings[0], merged.attention_mask[0]

    def _compute_prefixes(self, keys: list[PrefixKey]) -> None:
        """Run prefixes through the language model and keep their keys and values with the images."""
        if not keys:
            return
        device = self.image_index.device
        embeddings, positions, lengths = [], [], []
        for image, ids in keys:
            tokens = torch.tensor(ids, device=device)
            merged = self.model.merge_multimodal_embeddings(
                tokens[None], torch.ones_like(tokens)[None], self.images, torch.tensor([image], device=device)
            )
            valid = merged.attention_mask[0]
            embeddings.append(merged.embeddings[0, valid])
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

    def _fill_cache(self, prefixes: list[Prefix | None]) -> None:
        """Fill the cache with every prompt's prefix, their ends in one column."""
        known = [prefix for prefix in prefixes if prefix is not None]
        if not known:
            return
        length = max(prefix.width for prefix in known)
        count, device = len(prefixes), self._mask.device
        self._mask = torch.zeros((count, length), dtype=torch.bool, device=device)
        for sequence, prefix in zip(self.sequences, prefixes, strict=True):
            if prefix is not None:
                self._mask[sequence.number, length - prefix.width :] = True
                sequence.position = prefix.length
        self._gaps = any(prefix is None or prefix.width < length for prefix in prefixes)
        for number, parts in enumerate(known[0].layers):
            filled = [part.new_zeros((count, part.shape[0], length, part.shape[2])) for part in parts]
            for sequence, prefix in zip(self.sequences, prefixes, strict=True):
                if prefix is not None:
                    for target, source in zip(filled, prefix.layers[number], strict=True):
                        target[sequence.number, :, length - prefix.width :] = source
            self._cache.update(*filled, number)

    def _keep_prompt_states(self, sequence: SequenceState, cut: int, states: torch.Tensor) -> None:
        """states: (P, H) of the prompt's last positions. A token's state is that of the position before it."""
        tail = sequence.prompt[cut:]
        column = len(states)
        for place in range(len(tail) - 1, 0, -1):
            column -= self.model.config.num_image_tokens if tail[place] == self.model.config.image_token_id else 1
            if tail[place] in self._seg_set:
                sequence.prompt_states[cut + place] = states[column - 1].clone()

    def _feed_waiting(self) -> torch.Tensor:
        """(R, N, H): the states after each sequence's waiting tokens, of which it may have fewer than N."""
        length = max(len(sequence.waiting) for sequence in self._live)
        device = self._mask.device
        ids = torch.tensor(
            [sequence.waiting + [0] * (length - len(sequence.waiting)) for sequence in self._live], device=device
        )
        counts = torch.tensor([len(sequence.waiting) for sequence in self._live], device=device)
        steps = torch.arange(length, device=device)
        starts = torch.tensor([sequence.position for sequence in self._live], device=device)
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
        with onednn_linear(inputs.device, self.model.vector_kernel):
            return decoder(
                inputs_embeds=inputs,
                attention_mask=mask,
                position_ids=positions,
                use_cache=True,
                **{cache_argument(decoder): cache},
            ).last_hidden_state

    def _choose(self, states: torch.Tensor) -> None:
        """Take the tokens that (R, N, H) states choose, then let sequences that are done leave."""
        live = self._live
        wanted = [(index, column) for index, sequence in enumerate(live) for column in self._columns(sequence)]
        chooser = _TokenChooser(self, states, wanted)
        rejected: list[tuple[int, int]] = []
        for index, sequence in enumerate(live):
            guesses = sequence.waiting[1:]
            fed = max(1, len(sequence.waiting))
            for column in range(fed):
                unchecked = self.decoding.groups == FORCED and column < len(guesses)
                token = guesses[column] if unchecked else chooser.token(index, column)
                self._append(sequence, token, states[index, column])
                if sequence.done or column == len(guesses) or token != guesses[column]:
                    break
            rejected += [(index, late) for late in range(column + 1, fed)]
            sequence.position += column + 1 if sequence.waiting else 0
            sequence.waiting = [sequence.answer[-1], *self._guess(sequence)]
        self._mask_rejected(rejected, states.shape[1])
        self._drop_finished()

    def _columns(self, sequence: SequenceState) -> range:
        """Columns of a sequence's states that need logits."""
        fed = max(1, len(sequence.waiting))
        return range(fed - 1, fed) if self.decoding.groups == FORCED else range(fed)

    def _append(self, sequence: SequenceState, token: int, state: torch.Tensor) -> None:
        if token in self._seg_set:
            sequence.states[len(sequence.answer)] = state.clone()  # the pass's other states are not kept
            sequence.run += 1
        else:
            sequence.run = 0
        sequence.answer.append(token)
        sequence.finished = token == self.end_token_id
        sequence.done = sequence.finished or len(sequence.answer) == self.max_new_tokens or self._should_stop(sequence)

    def _should_stop(self, sequence: SequenceState) -> bool:
        if not self.decoding.stopping:
            return False
        ids = torch.tensor([sequence.prompt + sequence.answer], device=self._mask.device)
        # Criteria that look at scores are rare; transformers itself hands None where none are kept.
        return bool(self.decoding.stopping(ids, None)[0])

    def _guess(self, sequence: SequenceState) -> list[int]:
        """What will follow a group's first token, as far as the answer may go on."""
        opened = sequence.run % len(self.seg_token_ids) == 1
        if self.decoding.groups == STEPWISE or not self._keeps_all or not opened:
            return []
        left = self.max_new_tokens - len(sequence.answer)
        # The last guess that is checked chooses one token more.
        return self.seg_token_ids[1:][: left if self.decoding.groups == FORCED else left - 1]

    def _mask_rejected(self, rejected: list[tuple[int, int]], length: int) -> None:
        """Mask guesses that did not come true; columns count from the first of the last pass."""
        for index, column in rejected:
            self._mask[index, column - length] = False
            self._gaps = True

    def _drop_finished(self) -> None:
        staying = [index for index, sequence in enumerate(self._live) if not sequence.done]
        if len(staying) == len(self._live):
            return
        self._live = [self._live[index] for index in staying]
        self._select(staying)

    def _select(self, indices: list[int]) -> None:
        """Let the cache hold these of its sequences, in this order; one may be named more than once."""
        if indices and indices != list(range(len(self._mask))):
            kept = torch.tensor(indices, device=self._mask.device)
            self._cache.batch_select_indices(kept)
            self._mask = self._mask[kept]
            self._gaps = not bool(self._mask.all())

    def group_states(self, sequence: SequenceState) -> tuple[list[torch.Tensor], int]:
        """The (S * K, H) states of each whole group of a sequence so far, and how many groups are broken."""
        size = len(self.seg_token_ids)
        if self.model.config.group_rule == "release":
            groups, broken = release_groups(sequence.prompt + sequence.answer, self.seg_token_ids)
            first = len(sequence.prompt)
            found = [
                [sequence.states[place - first] if place >= first else sequence.prompt_states[place] for place in group]
                for group in groups
            ]
        else:
            starts, broken = whole_groups(sequence.answer, self.seg_token_ids)
            found = [[sequence.states[place] for place in range(start, start + size)] for start in starts]
        return [torch.stack(states) for states in found], broken

    def decode_groups(self, groups: list[torch.Tensor], owners: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """(Q, S, D) embeddings and (Q, h, w) mask logits of groups of the prompts `owners`."""
        owner_index = torch.tensor(owners, dtype=torch.long, device=self.image_index.device)
        if groups:
            with onednn_linear(owner_index.device):
                return self.model.decode_masks(torch.stack(groups), self.images, self.image_index[owner_index])
        config, table = self.model.config, self.model.get_input_embeddings().weight
        side = config.grid_size * 2**config.num_scales
        return table.new_zeros((0, config.num_scales, config.embedding_dim)), table.new_zeros((0, side, side))

    def answers(self) -> list[GeneratedAnswer]:
        """The answers of all sequences, their masks decoded together."""
        groups: list[torch.Tensor] = []
        counts, broken = [], []
        for sequence in self.sequences:
            found, num_broken = self.group_states(sequence)
            groups += found
            counts.append(len(found))
            broken.append(num_broken)
        owners = [sequence.number for sequence, count in zip(self.sequences, counts, strict=True) for _ in range(count)]
        embeddings, logits = self.decode_groups(groups, owners)
        parts = zip(self.sequences, logits.split(counts), embeddings.split(counts), broken, strict=True)
        return [
            GeneratedAnswer(self.answer_ids(sequence), mask_logits, embeddings_QSD, num_broken, sequence.finished)
            for sequence, mask_logits, embeddings_QSD, num_broken in parts
        ]

    def answer_ids(self, sequence: SequenceState) -> torch.Tensor:
        """(n,) the tokens of an answer so far."""
        return torch.tensor(sequence.answer, dtype=torch.long, device=self._mask.device)


class _TokenChooser:
    """The tokens that the states of one pass choose: all at once where they are simply the most likely ones.

    wanted: (sequence among the live ones, column) of the states to choose by.
    """

    def __init__(self, loop: DecodingLoop, states: torch.Tensor, wanted: list[tuple[int, int]]) -> None:
        self._loop = loop
        live_index, columns = (torch.tensor(part, device=states.device) for part in zip(*wanted, strict=True))
        live = [loop._live[index] for index, _ in wanted]
        places = [
            (sequence.number, len(sequence.answer) + column) for sequence, (_, column) in zip(live, wanted, strict=True)
        ]
        self._logits = compute_logits(loop.model, states[live_index, columns], places)
        self._number = {place: number for number, place in enumerate(wanted)}
        simple = not loop.decoding.processors and loop.decoding.seeds is None
        self._best = self._logits.argmax(dim=-1).tolist() if simple else None

    def token(self, index: int, column: int) -> int:
        """The choice of one state; with processors and seeds, of a sequence's states in order."""
        number = self._number[index, column]
        if self._best is not None:
            return self._best[number]
        sequence = self._loop._live[index]
        logits = process_logits(self._loop.decoding.processors, sequence, self._logits[number : number + 1])
        if sequence.generator is None:
            return int(logits.argmax(dim=-1))
        return int(torch.multinomial(logits.float().softmax(dim=-1), 1, generator=sequence.generator))


def process_logits(processors: LogitsProcessorList, sequence: SequenceState, logits: torch.Tensor) -> torch.Tensor:
    """(1, V) logits of a sequence's next token after `processors`, float32 where there are any."""
    if not processors:
        return logits
    ids = torch.tensor([sequence.prompt + sequence.answer], device=logits.device)
    return processors(ids, logits.float())


def compute_logits(model: PixelLMPreTrainedModel, states: torch.Tensor, places: list[tuple[int, int]]) -> torch.Tensor:
    """(K, H) states -> (K, V) logits of the next tokens. places: for each the prompt's number and the place in the
    answer that its token would take.
    """
    with onednn_linear(states.device, model.vector_kernel):
        return model.get_output_embeddings()(states)
