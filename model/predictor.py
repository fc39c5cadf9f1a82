"""Images and questions in; text, masks, scores and boxes out.

    predictor = Predictor.from_pretrained("folder")
    predictor.set_image("image.jpg")
    answer = predictor.ask("Where is the red circle?")

    predictor.ask_many([...])       several questions together, each answered as if it were asked alone
    predictor.stream("...")         the answer while it is made
    predictor.chat()                a conversation about the image
    predictor.session(image)        the same for an image of its own, beside others

Axes: B images, C conversations, T tokens, Q targets of one answer, H W pixels of the image itself.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from threading import RLock
from typing import Any, TypeVar

import numpy as np
import torch
from safetensors import SafetensorError

from .answers import Answer, Event, compose_answer, mask_box, mask_scores
from .compiling import compile_for_answers
from .configuration_pixellm import PixelLMConfig
from .geometry import restore_masks
from .modeling_pixellm import PixelLMForCausalLM
from .processing_pixellm import EncodedConversation, EncodedImage, PixelLMProcessor
from .quantization import quantization_config
from .session import MAX_NEW_TOKENS, AnswerOptions, Chat, Session, inference
from .structures import IGNORE_TOKEN, Box, PixelLMError, Question

__all__ = ["Answer", "AnswerOptions", "Box", "ModelFolderError", "Predictor", "mask_box", "mask_scores"]


P = TypeVar("P", bound="Predictor")


class ModelFolderError(PixelLMError):
    """A folder is not a model that can be loaded."""


def _read_model_type(config: Path) -> str | None:
    """What a config.json says the model is; None where it says nothing that can be read."""
    try:
        content = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content.get("model_type") if isinstance(content, dict) else None


class Predictor:
    """A model and its processor, asked in words.

    Safe to share between threads, which take turns at the model; but `set_image` chooses one image for all of them,
    so threads with images of their own take a `session` each. Errors of the processor pass through: ImageError,
    PromptError and ConversationTooLong, all of them PixelLMErrors.
    """

    def __init__(self, model: PixelLMForCausalLM, processor: PixelLMProcessor) -> None:
        """model: is in eval mode while it answers."""
        self.model = model
        self.processor = processor
        self._session: Session | None = None
        self._lock = RLock()

    @classmethod
    def from_pretrained(
        cls: type[P],
        folder: str | Path,
        device: str | torch.device = "auto",
        dtype: torch.dtype | None = None,
        attn_implementation: str | None = None,
        bits: int | None = None,
    ) -> P:
        """Load a folder this project saved.

        device: "auto" is CUDA where there is one, else Apple's GPU, else the CPU. dtype: None keeps the precision it
            was saved in.
        attn_implementation: None leaves the choice to transformers.
        bits: 8 or 4 quantise the language model's linear layers (see `quantization`); None does not.
        Raises ModelFolderError when `folder` does not hold a whole PixelLM, or `device` is not there.
        """
        if not (Path(folder) / "config.json").is_file():
            raise ModelFolderError(
                f"{folder} holds no config.json, so it is no saved model; give the folder that "
                "merge_lora_weights_and_save_hf_model.py wrote"
            )
        kind = _read_model_type(Path(folder) / "config.json")
        if kind not in (None, PixelLMConfig.model_type):
            raise ModelFolderError(
                f"{folder} holds a model of type {kind!r}, not a PixelLM saved by this project; convert a published "
                "PixelLM with tools/convert_checkpoint.py, or train on another model with train_ds.py"
            )
        if device == "auto":
            found = [("cuda", torch.cuda.is_available()), ("mps", torch.backends.mps.is_available()), ("cpu", True)]
            device = next(name for name, there in found if there)
        try:
            processor = PixelLMProcessor.from_pretrained(str(folder))
            quantized = (
                {"quantization_config": quantization_config(bits, dtype), "device_map": {"": device}} if bits else {}
            )
            model, report = PixelLMForCausalLM.from_pretrained(
                str(folder),
                dtype="auto" if dtype is None else dtype,
                attn_implementation=attn_implementation,
                output_loading_info=True,
                **quantized,
            )
            model = model if bits else model.to(device)
        except (OSError, ValueError, RuntimeError, ImportError, AssertionError, SafetensorError) as error:
            # AssertionError is what torch raises for a device it was not compiled for.
            reason = " ".join(str(error).split())
            raise ModelFolderError(f"cannot load the model in {folder} on {device}: {reason}") from error
        missing = sorted(report["missing_keys"]) + sorted(str(key) for key in report["mismatched_keys"])
        if missing:
            raise ModelFolderError(
                f"{folder} lacks {len(missing)} of the model's tensors or has them in another shape, first "
                f"{missing[0]}; export the model again"
            )
        return cls(model, processor)

    def compile(self) -> str:
        """Make answers quicker at the price of some seconds now; see `compiling.compile_for_answers`."""
        with self.inference():
            return compile_for_answers(self.model)

    def session(self, image: Any) -> Session:
        """Questions about `image` (path, bytes, PIL image, array (H, W, 3) uint8 or tensor), beside any others."""
        return Session(self.model, self.processor, image, self._lock)

    def set_image(self, image: Any) -> None:
        """Choose the image that `ask`, `ask_many`, `stream` and `chat` are about; as `session` takes it."""
        self._session = self.session(image)

    @property
    def image(self) -> np.ndarray | None:
        """What `set_image` chose, uint8 RGB (H, W, 3), turned the way it is viewed."""
        return None if self._session is None else self._session.image

    @property
    def current(self) -> Session:
        """The session of `set_image`; RuntimeError when there is none."""
        if self._session is None:
            raise RuntimeError("No image is set; call set_image(image) before asking about it.")
        return self._session

    def ask(
        self, question: Question, max_new_tokens: int = MAX_NEW_TOKENS, options: AnswerOptions | None = None
    ) -> Answer:
        """See `Session.ask`, as for the next three; RuntimeError when no image was set."""
        return self.current.ask(question, max_new_tokens, options)

    def ask_many(
        self,
        questions: Sequence[Question],
        max_new_tokens: int = MAX_NEW_TOKENS,
        options: AnswerOptions | None = None,
    ) -> list[Answer]:
        """See `Session.ask_many`."""
        return self.current.ask_many(questions, max_new_tokens, options)

    def stream(
        self, question: Question, max_new_tokens: int = MAX_NEW_TOKENS, options: AnswerOptions | None = None
    ) -> Iterator[Event]:
        """See `Session.stream`."""
        return self.current.stream(question, max_new_tokens, options)

    def chat(self, options: AnswerOptions | None = None) -> Chat:
        """See `Session.chat`."""
        return self.current.chat(options)

    def answer(
        self,
        images: Sequence[Any],
        questions: Sequence[Question],
        image_index: Sequence[int],
        max_new_tokens: int = MAX_NEW_TOKENS,
        options: AnswerOptions | None = None,
    ) -> list[Answer]:
        """Answer a batch of questions.

        images: B, each as `set_image` takes it. questions: C, each one question, or turns (question, answer) of
        which the last has the answer None. image_index: for each question which image it is about.
        """
        encoded = self.encode_images(images)
        order = sort_by_image(image_index, len(questions), len(encoded))
        if not order:
            return []
        decoding = (options or AnswerOptions()).make_decoding(self.processor.tokenizer, len(order))
        seeds = decoding.seeds and [decoding.seeds[number] for number in order]
        with self.inference():
            generated = self.model.generate_answers(
                prompts=[self.processor.encode_question(questions[number]).to(self.model.device) for number in order],
                image_index=torch.tensor([image_index[number] for number in order], device=self.model.device),
                end_token_id=self.processor.end_token_id,
                max_new_tokens=max_new_tokens,
                decoding=replace(decoding, seeds=seeds),
                **self.processor.stack_images(encoded, self.model.device, self.model.dtype),
            )
            answers: dict[int, Answer] = {}
            for number, one in zip(order, generated, strict=True):
                image = encoded[image_index[number]]
                logits_QHW = restore_masks(one.low_res_mask_logits, image.resized_size, image.original_size)
                answers[number] = self._compose([one.ids.tolist()], logits_QHW)
        return [answers[number] for number in range(len(questions))]

    def segment(
        self,
        images: Sequence[Any],
        conversations: Sequence[Sequence[tuple[str, str]]],
        image_index: Sequence[int],
    ) -> list[Answer]:
        """Masks for answers that are given (teacher-forced).

        conversations: C, each its turns (question, answer with a "{seg}" for every target). An Answer holds the masks
        of all turns in order; its words are the given ones. ValueError when a conversation exceeds the processor's
        model_max_length: the masks of its lost turns would be missing unnoticed.
        """
        encoded = self.encode_images(images)
        order = sort_by_image(image_index, len(conversations), len(encoded))
        tokens = [self.processor.encode_conversation(list(conversations[number])) for number in order]
        for number, conversation in zip(order, tokens, strict=True):
            if conversation.dropped_turns:
                raise ValueError(
                    f"conversation {number} is too long: {conversation.dropped_turns} of its "
                    f"{len(conversations[number])} turns do not fit into model_max_length; give fewer turns"
                )
        if not order:
            return []
        input_ids, attention_mask = pad_right([one.input_ids for one in tokens], self.processor.end_token_id)
        device = self.model.device
        with self.inference():
            output = self.model(
                input_ids=input_ids.to(device),
                attention_mask=attention_mask.to(device),
                original_sizes=torch.tensor([image.original_size for image in encoded], device=device),
                image_index=torch.tensor([image_index[number] for number in order], device=device),
                **self.processor.stack_images(encoded, device, self.model.dtype),
            )
        # Masks of an image follow each other in the order of its conversations.
        rest = list(output.mask_logits)
        answers: dict[int, Answer] = {}
        for number, conversation in zip(order, tokens, strict=True):
            image, count = image_index[number], len(conversation.group_turns)
            logits_QHW, rest[image] = rest[image].tensor_split([count])
            answers[number] = self._compose(self._answers_in(conversation), logits_QHW)
        return [answers[number] for number in range(len(conversations))]

    def _answers_in(self, conversation: EncodedConversation) -> list[list[int]]:
        """The tokens of every answer of an encoded conversation, without their end tokens."""
        answers: list[list[int]] = [[]]
        for token in conversation.input_ids[conversation.labels != IGNORE_TOKEN].tolist():
            if token == self.processor.end_token_id:
                answers.append([])
            else:
                answers[-1].append(token)
        return answers[:-1]

    def encode_images(self, images: Sequence[Any]) -> list[EncodedImage]:
        """Images, each as `set_image` takes it, as the vision tower takes them."""
        return [self.processor.encode_image(self.processor.open_image(image)) for image in images]

    def inference(self) -> AbstractContextManager[None]:
        """This thread's turn at the model; see `session.inference`."""
        return inference(self.model, self._lock)

    def _compose(self, turns: Sequence[list[int]], logits_QHW: torch.Tensor) -> Answer:
        """An answer from the tokens of its turns (one, unless several were given) and the masks of all of them."""
        decoded = [self.processor.decode_answer(ids) for ids in turns]
        return compose_answer(decoded, logits_QHW, release_groups=self.model.config.group_rule == "release")


def sort_by_image(image_index: Sequence[int], count: int, images: int) -> list[int]:
    """Numbers of `count` questions ordered by image, as the model takes them; ValueError when indices do not fit."""
    if len(image_index) != count or any(not 0 <= index < images for index in image_index):
        raise ValueError(
            f"image_index {list(image_index)[:8]} does not fit {count} questions about {images} images; "
            "give for every question the number of its image, from 0"
        )
    return sorted(range(count), key=lambda number: image_index[number])


def pad_right(sequences: Sequence[torch.Tensor], filler: int) -> tuple[torch.Tensor, torch.Tensor]:
    """C sequences of token ids -> (C, T) ids and (C, T) bool, False where `filler` stands."""
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    ids = torch.nn.utils.rnn.pad_sequence(list(sequences), batch_first=True, padding_value=filler)
    return ids, torch.arange(ids.shape[1])[None] < lengths[:, None]
