"""Images and questions in; text, masks, scores and boxes out.

    predictor = Predictor.from_pretrained("folder")
    predictor.set_image("image.jpg")
    answer = predictor.ask("Where is the red circle?")

    predictor.ask_many([...])       several questions together, each answered as if it were asked alone
    predictor.stream("...")         the answer while it is made
    predictor.chat()                a conversation about the image
    predictor.session(image)      the same for an image of its own, beside others

Axes: B images, C conversations, T tokens, Q targets of one answer, H W pixels of the image itself.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from threading import RLock
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError

from .answers import Answer, mask_box, mask_scores
from .compiling import compile_for_answers
from .configuration_pixellm import PixelLMConfig
from .generation import GeneratedAnswer
from .geometry import restore_masks
from .modeling_pixellm import PixelLMForCausalLM
from .processing_pixellm import EncodedConversation, EncodedImage, PixelLMProcessor, PromptError
from .quantization import bits_config
from .session import MAX_NEW_TOKENS, AnswerOptions, Asked, MaskReady, Session
from .structures import IGNORE_TOKEN, TOWER_KEY, Box, PixelLMError, Question

__all__ = ["Answer", "AnswerOptions", "Box", "ModelFolderError", "Predictor", "mask_box", "mask_scores"]


class ModelFolderError(PixelLMError):
    """A folder is not a model that can be loaded."""


def _model_type(config: Path) -> str | None:
    """What a config.json says the model is; None where it says nothing that can be read."""
    try:
        content = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content.get("model_type") if isinstance(content, dict) else None


class Predictor(Asked):
    """A model and its processor, asked in words.

    Safe to share between threads, which take turns at the model; but `set_image` chooses one image for all of them,
    so threads with images of their own take a `session` each. Errors of the processor pass through: ImageError,
    PromptError and ConversationTooLong, all ValueErrors of one sentence.
    """

    def __init__(self, model: Any, processor: Any) -> None:
        """model: a PixelLMForCausalLM, put into eval mode here while it answers. processor: its PixelLMProcessor."""
        self.model = model
        self.processor = processor
        self._session: Session | None = None
        self._turn = RLock()

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        device: str | torch.device = "auto",
        dtype: torch.dtype | None = None,
        attn_implementation: str | None = None,
        bits: int | None = None,
    ) -> "Predictor":
        """Load a folder this project saved.

        device: "auto" is CUDA where there is one, else Apple's GPU, else the CPU. dtype: None keeps the precision it
            was saved in.
        attn_implementation: None leaves the choice to transformers.
        bits: 8 or 4 hold the language model's linear layers in so many (see `low_bits`); None in `dtype`.
        Raises ModelFolderError when `folder` does not hold a whole PixelLM, or `device` is not there.
        """
        if not (Path(folder) / "config.json").is_file():
            raise ModelFolderError(
                f"{folder} holds no config.json, so it is no saved model; give the folder that "
                "merge_lora_weights_and_save_hf_model.py wrote"
            )
        kind = _model_type(Path(folder) / "config.json")
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
            how = {} if bits is None else {"quantization_config": bits_config(bits, dtype), "device_map": {"": device}}
            model, report = PixelLMForCausalLM.from_pretrained(
                str(folder),
                dtype="auto" if dtype is None else dtype,
                attn_implementation=attn_implementation,
                output_loading_info=True,
                **how,
            )
            model = model.to(device) if bits is None else model
        except (OSError, ValueError, RuntimeError, ImportError, AssertionError, SafetensorError) as error:
            # AssertionError is what torch raises for a device it was not compiled for.
            reason = " ".join(str(error).split())
            raise ModelFolderError(f"cannot load the model in {folder} on {device}: {reason}") from error
        lost = sorted(report["missing_keys"]) + sorted(str(key) for key in report["mismatched_keys"])
        if lost:
            raise ModelFolderError(
                f"{folder} lacks {len(lost)} of the model's tensors or holds them in another shape, first {lost[0]}; "
                "export the model again"
            )
        return cls(model, processor)

    def compile(self) -> str:
        """Make answers quicker at the price of some seconds now; see `compiling.compile_for_answers`."""
        with self.inference():
            return compile_for_answers(self.model)

    # --- one image ----------------------------------------------------------------------------------------------

    def session(self, image: Any) -> Session:
        """Questions about `image` (path, bytes, PIL image, array (H, W, 3) uint8 or tensor), beside any others."""
        return Session(self, image)

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

    # --- many images --------------------------------------------------------------------------------------------

    def answer(
        self,
        images: Sequence[Any],
        questions: Sequence[Question],
        image_index: Sequence[int],
        max_new_tokens: int = MAX_NEW_TOKENS,
        options: AnswerOptions | None = None,
    ) -> list[Answer]:
        """Answer a batch of questions, the model saying its seg groups itself.

        images: B, each as `set_image` takes it. questions: C, each one question, or turns (question, answer) of
        which the last has the answer None. image_index: for each question which image it is about.
        """
        encoded = self._encode(images)
        order = _by_image(image_index, len(questions), len(encoded))
        if not order:
            return []
        decoding = (options or AnswerOptions()).decoding(self.processor.tokenizer, len(order))
        seeds = decoding.seeds and [decoding.seeds[row] for row in order]
        with self.inference():
            generated = self.model.generate_answers(
                prompts=[self.prompt(questions[row]) for row in order],
                image_index=torch.tensor([image_index[row] for row in order], device=self.model.device),
                end_token_id=self.processor.end_token_id,
                max_new_tokens=max_new_tokens,
                decoding=replace(decoding, seeds=seeds),
                **self.image_inputs(encoded),
            )
            answers = {
                row: self.finish(one, encoded[image_index[row]]) for row, one in zip(order, generated, strict=True)
            }
        return [answers[row] for row in range(len(questions))]

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
        encoded = self._encode(images)
        order = _by_image(image_index, len(conversations), len(encoded))
        tokens = [self.processor.encode_conversation(list(conversations[row])) for row in order]
        for row, conversation in zip(order, tokens, strict=True):
            if conversation.dropped_turns:
                raise ValueError(
                    f"conversation {row} is too long: {conversation.dropped_turns} of its "
                    f"{len(conversations[row])} turns do not fit into model_max_length; give fewer turns"
                )
        if not order:
            return []
        input_ids, attention_mask = _pad_right([one.input_ids for one in tokens], self.processor.end_token_id)
        device = self.model.device
        with self.inference():
            output = self.model(
                input_ids=input_ids.to(device),
                attention_mask=attention_mask.to(device),
                original_sizes=torch.tensor([image.original_size for image in encoded], device=device),
                image_index=torch.tensor([image_index[row] for row in order], device=device),
                **self.image_inputs(encoded),
            )
        logits = _split_rows(
            output.mask_logits, [(image_index[row], len(t.group_turns)) for row, t in zip(order, tokens, strict=True)]
        )
        answers = {
            row: self._to_answer(self._given_answers(conversation), logits_QHW)
            for row, conversation, logits_QHW in zip(order, tokens, logits, strict=True)
        }
        return [answers[row] for row in range(len(conversations))]

    def _given_answers(self, conversation: EncodedConversation) -> list[list[int]]:
        """The tokens of every answer of an encoded conversation, without their end tokens."""
        answers: list[list[int]] = [[]]
        for token in conversation.input_ids[conversation.labels != IGNORE_TOKEN].tolist():
            if token == self.processor.end_token_id:
                answers.append([])
            else:
                answers[-1].append(token)
        return answers[:-1]

    def _encode(self, images: Sequence[Any]) -> list[Any]:
        return [self.processor.encode_image(self.processor.open_image(image)) for image in images]

    # --- what sessions are made of --------------------------------------------------------------------------------

    @contextmanager
    def inference(self) -> Iterator[None]:
        """A thread's turn at the model: eval mode and no gradients inside; the mode found is put back, so that training
        can ask in between.
        """
        with self._turn:
            was_training = self.model.training
            if was_training:
                self.model.eval()
            try:
                with torch.inference_mode():
                    yield
            finally:
                if was_training:
                    self.model.train()

    def image_inputs(self, encoded: Sequence[EncodedImage]) -> dict[str, Any]:
        """What the model is told about images."""
        device = self.model.device
        pixels = torch.stack([image.pixel_values for image in encoded])
        return {
            "pixel_values": {TOWER_KEY: pixels.to(device, self.model.dtype)},
            "resized_sizes": torch.tensor([image.resized_size for image in encoded], device=device),
        }

    def prompt(self, question: Question) -> torch.Tensor:
        """(T,) ids of a question, or of turns of which the last is to be answered."""
        turns = [(question, None)] if isinstance(question, str) else list(question)
        for asked, _ in turns:
            self.processor.check_user_text(asked)
            if any("\ud800" <= letter <= "\udfff" for letter in asked):
                raise PromptError("the prompt holds half a letter (a lone surrogate): leave it out")
        return self.processor.encode_prompt(turns).to(self.model.device)

    def finish(self, one: GeneratedAnswer, image: EncodedImage) -> Answer:
        """What was generated about an image, in words and in the image's own pixels."""
        logits_QHW = restore_masks(one.low_res_mask_logits, image.resized_size, image.original_size)
        return self._to_answer([one.ids.tolist()], logits_QHW)

    def compose(self, turns: Sequence[list[int]], logits_QHW: torch.Tensor) -> Answer:
        """An answer from the tokens of its turns and float32 mask logits in the image's own pixels."""
        return self._to_answer(turns, logits_QHW)

    def mask_ready(self, number: int, phrase: str, logits_HW: torch.Tensor) -> MaskReady:
        """One mask of an answer that goes on."""
        mask = (logits_HW > 0).cpu().numpy()
        return MaskReady(number, phrase, mask, mask_scores(logits_HW[None])[0], mask_box(mask), logits_HW)

    def _to_answer(self, turns: Sequence[list[int]], logits_QHW: torch.Tensor) -> Answer:
        """An answer from the tokens of its turns (one, unless several were given) and the masks of all of them."""
        decoded = [self.processor.decode_answer(ids) for ids in turns]
        masks = (logits_QHW > 0).cpu().numpy()
        groups = sum(turn.num_groups for turn in decoded)
        phrases = [phrase for turn in decoded for phrase in turn.phrases]
        if self.model.config.group_rule == "release":
            # Groups of the question come first and have no words in the answer; a broken one costs all of them.
            phrases = ([""] * len(masks) + phrases)[len(phrases) :]
        elif groups != len(masks):
            raise RuntimeError(
                f"the model decoded {len(masks)} masks where the processor reads {groups} seg groups; "
                "the processor's seg tokens are not those of the model's config"
            )
        return Answer(
            text=" ".join(turn.text for turn in decoded),
            marked_text=" ".join(turn.marked_text for turn in decoded),
            phrases=phrases,
            masks=masks,
            scores=mask_scores(logits_QHW),
            boxes=[mask_box(mask) for mask in masks],
            areas=[int(np.count_nonzero(mask)) for mask in masks],
            num_broken=sum(turn.num_broken for turn in decoded),
        )


def _by_image(image_index: Sequence[int], rows: int, images: int) -> list[int]:
    """Row numbers ordered by image, as the model wants them; ValueError when the indices do not fit."""
    if len(image_index) != rows or any(not 0 <= index < images for index in image_index):
        raise ValueError(
            f"image_index {list(image_index)[:8]} does not fit {rows} questions about {images} images; "
            "give for every question the number of its image, from 0"
        )
    return sorted(range(rows), key=lambda row: image_index[row])


def _pad_right(rows: Sequence[torch.Tensor], filler: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of token ids -> (C, T) ids and (C, T) bool, False where `filler` stands."""
    lengths = torch.tensor([len(row) for row in rows])
    ids = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=filler)
    return ids, torch.arange(ids.shape[1])[None] < lengths[:, None]


def _split_rows(logits: Sequence[torch.Tensor], rows: Sequence[tuple[int, int]]) -> list[torch.Tensor]:
    """Per image (Q, H, W) -> per conversation, given each one's (image, number of groups) in the model's order."""
    used = [0] * len(logits)
    parts = []
    for image, count in rows:
        parts.append(logits[image][used[image] : used[image] + count])
        used[image] += count
    return parts
