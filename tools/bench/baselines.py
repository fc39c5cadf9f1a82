"""What answering and training are measured against, and the model they are measured on; not for use.

`release_without_cache` does what the release does when it answers: the image and the whole text go through both
models again for every token (docs/facts.md, E1). `plain_cache` is the usual way since: a key-value cache, one question
at a time, one token at a time. `release_training_loss` is a training step with a row of its own for every conversation,
its image encoded for each, and logits of every position. All share our weights and modules, and their results are
ours.

Axes: C prompts, T tokens, H language width, Q targets, V vocabulary.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList

from model.compiling import compile_for_answers
from model.configuration_pixellm import PixelLMConfig
from model.generation import Decoding, GeneratedAnswer, cache_argument
from model.losses import LossTerm, text_loss
from model.modeling_base import EncodedImages
from model.modeling_pixellm import PixelLMForCausalLM
from model.onednn_linear import FrozenLinear
from model.seg_codebook import whole_groups
from model.structures import IGNORE_TOKEN, TOWER_KEY
from utils.checkpoints.builder import TrainingRecipe, choose_trainable

END_TOKEN = 2  # of the model made here
RESIZED = (336, 448)  # what 480 x 640 becomes
ORIGINAL = (480, 640)


@dataclass(frozen=True)
class Shape:
    """How large the measured model is; the full one is the release's in small: some 170 million parameters."""

    width: int
    layers: int
    heads: int
    mlp_width: int
    vocabulary: int
    vision_width: int
    vision_layers: int
    embedding_dim: int
    decoder_mlp_dim: int


SHAPES = {
    "full": Shape(768, 12, 12, 2048, 32000, 384, 12, 256, 2048),
    "smoke": Shape(64, 2, 2, 96, 400, 32, 12, 32, 32),
}


def measured_model(shape: Shape, seed: int = 0) -> PixelLMForCausalLM:
    """Random weights in float32 at 448 pixels; its seg tokens and placeholder stand behind the words."""
    torch.manual_seed(seed)
    first = shape.vocabulary
    config = PixelLMConfig(
        text_config={
            "model_type": "llama",
            "hidden_size": shape.width,
            "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.heads,
            "intermediate_size": shape.mlp_width,
            "vocab_size": shape.vocabulary + 8,
            "max_position_embeddings": 4096,
        },
        vision_config={
            "model_type": "clip_vision_model",
            "hidden_size": shape.vision_width,
            "num_hidden_layers": shape.vision_layers,
            "num_attention_heads": shape.vision_width // 16 if shape.vision_width < 64 else shape.vision_width // 64,
            "intermediate_size": 4 * shape.vision_width,
            "image_size": 448,
            "patch_size": 14,
        },
        seg_token_ids=[first + number for number in range(6)],
        image_token_id=first + 6,
        embedding_dim=shape.embedding_dim,
        decoder_num_heads=8 if shape.embedding_dim >= 128 else 2,
        decoder_mlp_dim=shape.decoder_mlp_dim,
    )
    return PixelLMForCausalLM(config).eval()


def trainable_model(shape: Shape) -> tuple[PixelLMForCausalLM, dict[str, Any]]:
    """The same with LoRA and checkpointing, as the release trains, and a batch: three conversations of 80 text tokens
    about one image.
    """
    model = measured_model(shape)
    choose_trainable(model, TrainingRecipe(lora_dropout=0.0))
    model.activation_checkpointing_enable({"use_reentrant": False})
    return model.train(), training_batch(model, 3, 80)


def bytes_read_per_token(model: PixelLMForCausalLM) -> int:
    """What decoding one token must read: every weight of the language model but the table of embeddings."""
    used = {id(one): one for one in model.language_model.parameters()}
    used.pop(id(model.get_input_embeddings().weight))
    return sum(one.numel() * one.element_size() for one in used.values())


def measured_images(count: int) -> dict[str, Any]:
    """`count` images of 640 x 480 as `generate_answers` and `forward` take them."""
    pixels = torch.randn(count, 3, 448, 448, generator=torch.Generator().manual_seed(1))
    pixels[:, :, RESIZED[0] :] = 0
    return {"pixel_values": {TOWER_KEY: pixels}, "resized_sizes": torch.tensor([RESIZED] * count)}


def measured_prompts(model: PixelLMForCausalLM, count: int, question_length: int = 20) -> list[torch.Tensor]:
    """`count` prompts: 35 tokens of system text, the image, a question of its own."""
    words = torch.Generator().manual_seed(2)
    low, high = 10, model.config.seg_token_ids[0]
    system = torch.randint(low, high, (35,), generator=words)
    image = torch.tensor([model.config.image_token_id])
    return [
        torch.cat([system, image, torch.randint(low, high, (question_length,), generator=words)]) for _ in range(count)
    ]


def measured_answer(model: PixelLMForCausalLM, length: int, targets: int) -> list[int]:
    """The ids of an answer of `length` tokens, the end token last, with seg groups spread evenly among its words."""
    group = model.config.seg_token_ids
    words = length - 1 - targets * len(group)
    if words < 0:
        raise ValueError(f"{targets} targets need {targets * len(group) + 1} tokens, but the answer has {length}")
    ids, said = [], 0
    for target in range(targets + 1):
        share = (target + 1) * words // (targets + 1)
        ids += [10 + number % (group[0] - 10) for number in range(said, share)]
        said = share
        ids += group if target < targets else []
    return [*ids, END_TOKEN]


class Says(LogitsProcessor):
    """Makes every row say `answer` and remembers what it would have said itself, by prompt and place.

    It finds out where an answer begins from the lengths of the prompts, which must be equal.
    """

    def __init__(self, answer: Sequence[int], prompt_length: int) -> None:
        self.answer, self.prompt_length = list(answer), prompt_length
        self.wanted: dict[tuple[int, ...], int] = {}

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        forced = torch.full_like(scores, -torch.inf)
        for row, ids in enumerate(input_ids.tolist()):
            place = len(ids) - self.prompt_length
            self.wanted[(*ids[self.prompt_length - 4 : self.prompt_length], place)] = int(scores[row].argmax())
            forced[row, self.answer[place]] = 0.0
        return forced


@dataclass(frozen=True)
class Questions:
    """Prompts about images, as `generate_answers` takes them; baselines take one image. says: chooses the tokens,
    or None for the likeliest.
    """

    pixel_values: dict[str, torch.Tensor]
    resized_sizes: torch.Tensor
    prompts: Sequence[torch.Tensor]
    end_token_id: int
    max_new_tokens: int
    says: LogitsProcessor | None = None

    def images(self, model: PixelLMForCausalLM) -> EncodedImages:
        """The images, encoded anew."""
        return model.encode_images(self.pixel_values, self.resized_sizes)

    def ends(self, answer: list[int]) -> bool:
        """Whether nothing comes after the tokens of an answer."""
        return len(answer) == self.max_new_tokens or answer[-1:] == [self.end_token_id]


@dataclass(frozen=True)
class Answered:
    """What came of `answered`. wanted: what the model would have said itself, by prompt and place."""

    answers: list[GeneratedAnswer]
    wanted: dict[tuple[int, ...], int]


@torch.inference_mode()
def answered(
    model: PixelLMForCausalLM, way: Any, count: int, length: int, targets: int, num_images: int = 1
) -> Answered:
    """Ask `count` questions about one image, or about `num_images` in turn, in one of the ways of this file."""
    prompts = measured_prompts(model, count)
    says = Says(measured_answer(model, length, targets), len(prompts[0]))
    asked = Questions(
        **measured_images(num_images), prompts=prompts, end_token_id=END_TOKEN, max_new_tokens=length, says=says
    )
    return Answered(way(model, asked), says.wanted)


def compiled_answer(model: PixelLMForCausalLM, length: int, targets: int) -> dict[str, Any]:
    """What compiling costs and gives: what was said of it, its seconds, and the least of three answers' after it."""
    start = time.perf_counter()
    said = compile_for_answers(model)
    compiled, seconds = time.perf_counter(), []
    for _ in range(3):
        before = time.perf_counter()
        answered(model, ours, 1, length, targets)
        seconds.append(time.perf_counter() - before)
    return {"said": said, "compile_seconds": compiled - start, "answer_seconds": min(seconds)}


def apart(one: Answered, other: Answered) -> dict[str, Any]:
    """Whether two ways said the same, would have said the same left alone, and the largest distance of mask logits."""
    pairs = list(zip(one.answers, other.answers, strict=True))
    masks = [float((a.low_res_mask_logits - b.low_res_mask_logits).abs().max()) for a, b in pairs]
    same = all(torch.equal(a.ids, b.ids) for a, b in pairs) and one.wanted == other.wanted
    return {"same_text": same, "mask_logits": max(masks)}


def ours(model: PixelLMForCausalLM, asked: Questions) -> list[GeneratedAnswer]:
    """`generate_answers`, called as the baselines are; prompts are about the images in turn."""
    index = torch.arange(len(asked.prompts)) % len(asked.resized_sizes)
    decoding = Decoding(LogitsProcessorList([asked.says] if asked.says else []))
    return model.generate_answers(
        asked.pixel_values,
        asked.resized_sizes,
        list(asked.prompts),
        index,
        asked.end_token_id,
        asked.max_new_tokens,
        decoding,
    )


@torch.no_grad()
def release_without_cache(model: PixelLMForCausalLM, asked: Questions) -> list[GeneratedAnswer]:
    """Answers about one image, question by question, everything encoded again for every token."""
    index = torch.zeros(1, dtype=torch.long)
    said: list[tuple[list[int], torch.Tensor]] = []
    for prompt in asked.prompts:
        answer: list[int] = []
        while not asked.ends(answer):
            ids = torch.cat([prompt, torch.tensor(answer, dtype=torch.long)])[None]
            images = asked.images(model)
            rows = model.merge_multimodal_embeddings(ids, torch.ones_like(ids), images, index)
            hidden = model.language_model.get_decoder()(
                inputs_embeds=rows.embeddings,
                attention_mask=rows.attention_mask.long(),
                position_ids=torch.arange(rows.ids.shape[1])[None],
                use_cache=False,
            ).last_hidden_state
            answer.append(_choose(model, ids, hidden[:, -1], asked.says))
        said.append((answer, hidden[0, -len(answer) :]))
    return _with_masks(model, asked, said)


@torch.no_grad()
def plain_cache(model: PixelLMForCausalLM, asked: Questions) -> list[GeneratedAnswer]:
    """Answers about one image, question by question and token by token with a key-value cache of transformers."""
    decoder, index = model.language_model.get_decoder(), torch.zeros(1, dtype=torch.long)
    said: list[tuple[list[int], torch.Tensor]] = []
    for prompt in asked.prompts:
        images = asked.images(model)
        rows = model.merge_multimodal_embeddings(prompt[None], torch.ones_like(prompt)[None], images, index)
        inputs, mask = rows.embeddings, rows.attention_mask.long()
        positions = torch.arange(mask.shape[1])[None]
        cache, answer, states = DynamicCache(config=model.config.text_config), list[int](), []
        while not asked.ends(answer):
            if answer:
                inputs = model.get_input_embeddings()(torch.tensor([[answer[-1]]]))
                mask = torch.cat([mask, mask.new_ones((1, 1))], dim=1)
                positions = positions[:, -1:] + 1
            state = decoder(
                inputs_embeds=inputs,
                attention_mask=mask,
                position_ids=positions,
                use_cache=True,
                **{cache_argument(decoder): cache},
            ).last_hidden_state[:, -1]
            ids = torch.cat([prompt, torch.tensor(answer, dtype=torch.long)])[None]
            answer.append(_choose(model, ids, state, asked.says))
            states.append(state[0])
        said.append((answer, torch.stack(states)))
    return _with_masks(model, asked, said)


@torch.inference_mode()
def decode_plainly(model: PixelLMForCausalLM, length: int) -> None:
    """The language model alone as `plain_cache` runs it, after 300 tokens of text."""
    decoder, ids = model.language_model.get_decoder(), torch.arange(300)[None] + 10
    cache, positions = DynamicCache(config=model.config.text_config), torch.arange(300)[None]
    mask = torch.ones_like(ids)
    for _ in range(length):
        state = decoder(
            inputs_embeds=model.get_input_embeddings()(ids),
            attention_mask=mask,
            position_ids=positions,
            use_cache=True,
            **{cache_argument(decoder): cache},
        ).last_hidden_state[:, -1]
        ids = model.get_output_embeddings()(state).argmax(dim=-1)[:, None]
        mask, positions = torch.cat([mask, mask.new_ones((1, 1))], dim=1), positions[:, -1:] + 1


@torch.inference_mode()
def decode_with_generate(model: PixelLMForCausalLM, length: int) -> None:
    """The same with transformers' own loop."""
    ids = torch.arange(300)[None] + 10
    model.language_model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=length,
        min_new_tokens=length,
        do_sample=False,
        pad_token_id=0,
    )


def _choose(model: PixelLMForCausalLM, ids: torch.Tensor, state: torch.Tensor, says: LogitsProcessor | None) -> int:
    logits = model.get_output_embeddings()(state)
    return int((logits if says is None else says(ids, logits)).argmax())


def _with_masks(
    model: PixelLMForCausalLM, asked: Questions, said: Sequence[tuple[list[int], torch.Tensor]]
) -> list[GeneratedAnswer]:
    """All targets of all answers decoded together, with a copy of the maps for each."""
    images = asked.images(model)
    group, states, counts, broken = model.config.seg_token_ids, [], [], []
    for answer, hidden in said:
        starts, num_broken = whole_groups(answer, group)
        states += [hidden[start : start + len(group)] for start in starts]
        counts.append(len(starts))
        broken.append(num_broken)
    config, table = model.config, model.get_input_embeddings().weight
    embeddings = table.new_zeros((0, config.num_scales, config.embedding_dim))
    logits = table.new_zeros((0, 0, 0))
    if states:
        embeddings = model.codebook(torch.stack(states))
        prepared = model.pixel_decoder.prepare(model.feature_maps(images))
        logits = model.pixel_decoder.decode(embeddings, prepared, torch.zeros(len(states), dtype=torch.long))
    parts = zip(said, logits.split(counts), embeddings.split(counts), broken, strict=True)
    return [
        GeneratedAnswer(torch.tensor(answer), row_logits, row_embeddings, num_broken, answer[-1] == asked.end_token_id)
        for (answer, _), row_logits, row_embeddings, num_broken in parts
    ]


def training_batch(model: PixelLMForCausalLM, conversations: int, length: int) -> dict[str, Any]:
    """Arguments of `forward`: conversations of `length` text tokens each about one image, a target in each."""
    words = torch.Generator().manual_seed(3)
    group = model.config.seg_token_ids
    prompts = measured_prompts(model, conversations, 14)
    rows, labels = [], []
    for prompt in prompts:
        answer = torch.randint(10, group[0], (length - len(prompt) + 1,), generator=words)
        answer[6 : 6 + len(group)] = torch.tensor(group)
        rows.append(torch.cat([prompt, answer]))
        labels.append(torch.cat([torch.full_like(prompt, IGNORE_TOKEN), answer]))
    masks = torch.randint(0, 2, (conversations, *ORIGINAL), dtype=torch.uint8, generator=words)
    return measured_images(1) | {
        "input_ids": torch.stack(rows),
        "attention_mask": torch.ones(len(rows), len(rows[0]), dtype=torch.bool),
        "labels": torch.stack(labels),
        "original_sizes": torch.tensor([ORIGINAL]),
        "image_index": torch.zeros(conversations, dtype=torch.long),
        "masks": [masks],
        "target_questions": torch.arange(conversations),
    }


def training_step(model: PixelLMForCausalLM, batch: dict[str, Any]) -> torch.Tensor:
    """Gradients of a step, left in the parameters, and the loss they are of."""
    loss = _loss(model, batch)
    loss.backward()
    return loss.detach()


def _loss(model: PixelLMForCausalLM, batch: dict[str, Any]) -> torch.Tensor:
    losses, weights = model(**batch).losses, model.loss_weights
    return torch.stack([weights[name] * term.sum / term.count.clamp(min=1) for name, term in losses.items()]).sum()


def release_training_step(model: PixelLMForCausalLM, batch: dict[str, Any]) -> torch.Tensor:
    """The same number, each conversation in a row of its own with the image encoded for it."""
    count = len(batch["input_ids"])
    (masks,) = batch["masks"]
    apart = batch | {
        "pixel_values": {name: pixels.repeat(count, 1, 1, 1) for name, pixels in batch["pixel_values"].items()},
        "resized_sizes": batch["resized_sizes"].repeat(count, 1),
        "original_sizes": batch["original_sizes"].repeat(count, 1),
        "image_index": torch.arange(count),
        "masks": list(masks.split(1)),
    }
    with _as_released(model):
        return training_step(model, apart)


class ReleasedTraining(PixelLMForCausalLM):
    """Every conversation a sequence of its own, logits at every position."""

    prefix_sharing = False

    def _text_loss(self, hidden: torch.Tensor, labels: torch.Tensor) -> LossTerm:
        logits = self.get_output_embeddings()(hidden)[:, :-1].float()
        wanted = labels[:, 1:] != IGNORE_TOKEN
        return text_loss(logits[wanted], labels[:, 1:][wanted])


@contextmanager
def _as_released(model: PixelLMForCausalLM) -> Iterator[None]:
    """Inside, the model trains as `ReleasedTraining` does, and its linear layers are torch's own."""
    own = type(model)
    frozen: list[nn.Linear] = [layer for layer in model.modules() if type(layer) is FrozenLinear]
    model.__class__ = ReleasedTraining
    for layer in frozen:
        layer.__class__ = nn.Linear
    try:
        yield
    finally:
        model.__class__ = own
        for layer in frozen:
            layer.__class__ = FrozenLinear


WAYS: dict[str, Callable[..., Any]] = {"ours": ours, "plain_cache": plain_cache, "release": release_without_cache}
STEPS: dict[str, Callable[..., Any]] = {"ours": training_step, "release": release_training_step}


def work_of(kind: str, shape: Shape, length: int, targets: int) -> Callable[[], Any]:
    """Load a model; what is returned answers four questions or trains a step with it.

    kind: "answer_" and one of WAYS, or "train_" and one of STEPS.
    """
    what, name = kind.split("_", 1)
    if what == "answer":
        return partial(answered, measured_model(shape), WAYS[name], 4, length, targets)
    model, batch = trainable_model(shape)
    return lambda: STEPS[name](model, batch)
