"""Pictures and questions in; text, masks, scores and boxes out.

    predictor = Predictor.from_pretrained("folder")
    predictor.set_image("picture.jpg")
    answer = predictor.ask("Where is the red circle?")

Axes: B pictures, C conversations, T tokens, Q targets of one answer, H W pixels of the picture itself.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError

from .configuration_pixellm import PixelLMConfig
from .geometry import restore_masks
from .losses import IGNORE_TOKEN
from .modeling_pixellm import TOWER_KEY, PixelLMForCausalLM
from .processing_pixellm import EncodedConversation, PixelLMProcessor

Question = str | Sequence[tuple[str, str | None]]
Box = tuple[int, int, int, int]

MAX_NEW_TOKENS = 256
_EPSILON = 1e-6


@dataclass(frozen=True)
class Answer:
    """What the model said about a picture, and a mask for every seg group in it.

    text: without groups; marked_text: with "{seg}" where each group stood; phrases: the words each group belongs to.
    masks: bool (Q, H, W) in the picture's own pixels. scores: mean probability inside each mask, 0 for an empty one.
    boxes: (x0, y0, x1, y1) pixels, x1 and y1 exclusive, so that x1 - x0 is a width; all 0 for an empty mask.
    areas: pixels of each mask. num_broken: runs of seg tokens that were no whole groups and gave no mask.
    """

    text: str
    marked_text: str
    phrases: list[str]
    masks: np.ndarray
    scores: list[float]
    boxes: list[Box]
    areas: list[int]
    num_broken: int


def mask_scores(mask_logits: torch.Tensor) -> list[float]:
    """(Q, H, W) logits -> mean probability over each mask's pixels, those with logit > 0 (golden fact M12)."""
    inside = mask_logits > 0
    summed = (mask_logits.sigmoid() * inside).sum((1, 2))
    return (summed / (inside.sum((1, 2)) + _EPSILON)).tolist()


def mask_box(mask: np.ndarray) -> Box:
    """The smallest box around a bool mask (H, W) as (x0, y0, x1, y1), end exclusive; all 0 when nothing is set."""
    columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
    if not len(rows):
        return 0, 0, 0, 0
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


class ModelFolderError(ValueError):
    """A folder is not a model that can be loaded. One sentence."""

    user_message = True


def _model_type(config: Path) -> str | None:
    """What a config.json says the model is; None where it says nothing that can be read."""
    try:
        content = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content.get("model_type") if isinstance(content, dict) else None


class Predictor:
    """A model and its processor, asked in words. Not safe to share between threads.

    Errors of the processor pass through: PictureError, PromptError and ConversationTooLong, all ValueErrors of one
    sentence.
    """

    def __init__(self, model: Any, processor: Any) -> None:
        """model: a PixelLMForCausalLM, put into eval mode here while it answers. processor: its PixelLMProcessor."""
        self.model = model
        self.processor = processor
        self.picture: np.ndarray | None = None
        """What `set_image` chose, uint8 RGB (H, W, 3), turned the way it is viewed."""
        self._encoded: Any = None

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        device: str | torch.device = "auto",
        dtype: torch.dtype | None = None,
        attn_implementation: str | None = None,
    ) -> "Predictor":
        """Load a folder this project saved.

        device: "auto" is CUDA where there is one, else the CPU. dtype: None keeps the precision it was saved in.
        attn_implementation: None leaves the choice to transformers.
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
            device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            processor = PixelLMProcessor.from_pretrained(str(folder))
            model, report = PixelLMForCausalLM.from_pretrained(
                str(folder),
                dtype="auto" if dtype is None else dtype,
                attn_implementation=attn_implementation,
                output_loading_info=True,
            )
            model = model.to(device)
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

    def set_image(self, picture: Any) -> None:
        """Choose the picture `ask` is about: path, bytes, PIL image, array (H, W, 3) uint8 or tensor."""
        array = self.processor.open_picture(picture)
        self.picture, self._encoded = array, self.processor.encode_picture(array)

    def ask(self, question: Question, max_new_tokens: int = MAX_NEW_TOKENS) -> Answer:
        """Answer one question about the picture of `set_image`; RuntimeError when there is none."""
        if self._encoded is None:
            raise RuntimeError("No picture is set; call set_image(picture) before ask(question).")
        return self._answer([self._encoded], [question], [0], max_new_tokens)[0]

    def answer(
        self,
        pictures: Sequence[Any],
        questions: Sequence[Question],
        image_index: Sequence[int],
        max_new_tokens: int = MAX_NEW_TOKENS,
    ) -> list[Answer]:
        """Answer a batch of questions, the model saying its seg groups itself.

        pictures: B, each as `set_image` takes it. questions: C, each one question, or turns (question, answer) of
        which the last has the answer None. image_index: for each question which picture it is about.
        """
        return self._answer(self._encode(pictures), questions, image_index, max_new_tokens)

    def segment(
        self,
        pictures: Sequence[Any],
        conversations: Sequence[Sequence[tuple[str, str]]],
        image_index: Sequence[int],
    ) -> list[Answer]:
        """Masks for answers that are given (teacher-forced).

        conversations: C, each its turns (question, answer with a "{seg}" for every target). An Answer holds the masks
        of all turns in order; its words are the given ones. ValueError when a conversation exceeds the processor's
        model_max_length: the masks of its lost turns would be missing unnoticed.
        """
        encoded = self._encode(pictures)
        order = _by_picture(image_index, len(conversations), len(encoded))
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
        with _inference(self.model):
            output = self.model(
                input_ids=input_ids.to(self.model.device),
                attention_mask=attention_mask.to(self.model.device),
                original_sizes=torch.tensor([picture.original_size for picture in encoded], device=self.model.device),
                **self._inputs(encoded, [image_index[row] for row in order]),
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

    def _encode(self, pictures: Sequence[Any]) -> list[Any]:
        return [self.processor.encode_picture(self.processor.open_picture(picture)) for picture in pictures]

    def _inputs(self, encoded: Sequence[Any], image_index: Sequence[int]) -> dict[str, Any]:
        """What both ways of asking hand to the model about the pictures."""
        device = self.model.device
        pixels = torch.stack([picture.pixel_values for picture in encoded])
        return {
            "pixel_values": {TOWER_KEY: pixels.to(device, self.model.dtype)},
            "resized_sizes": torch.tensor([picture.resized_size for picture in encoded], device=device),
            "image_index": torch.tensor(list(image_index), device=device),
        }

    def _prompt(self, question: Question) -> torch.Tensor:
        turns = [(question, None)] if isinstance(question, str) else list(question)
        for asked, _ in turns:
            self.processor.check_user_text(asked)
        return self.processor.encode_prompt(turns).to(self.model.device)

    def _answer(
        self, encoded: Sequence[Any], questions: Sequence[Question], image_index: Sequence[int], max_new_tokens: int
    ) -> list[Answer]:
        order = _by_picture(image_index, len(questions), len(encoded))
        if not order:
            return []
        with _inference(self.model):
            generated = self.model.generate_answers(
                prompts=[self._prompt(questions[row]) for row in order],
                end_token_id=self.processor.end_token_id,
                max_new_tokens=max_new_tokens,
                **self._inputs(encoded, [image_index[row] for row in order]),
            )
        answers = {}
        for row, one in zip(order, generated, strict=True):
            picture = encoded[image_index[row]]
            logits_QHW = restore_masks(one.low_res_mask_logits, picture.resized_size, picture.original_size)
            answers[row] = self._to_answer([one.ids.tolist()], logits_QHW)
        return [answers[row] for row in range(len(questions))]

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


def _by_picture(image_index: Sequence[int], rows: int, pictures: int) -> list[int]:
    """Row numbers ordered by picture, as the model wants them; ValueError when the indices do not fit."""
    if len(image_index) != rows or any(not 0 <= index < pictures for index in image_index):
        raise ValueError(
            f"image_index {list(image_index)[:8]} does not fit {rows} questions about {pictures} pictures; "
            "give for every question the number of its picture, from 0"
        )
    return sorted(range(rows), key=lambda row: image_index[row])


def _pad_right(rows: Sequence[torch.Tensor], filler: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of token ids -> (C, T) ids and (C, T) bool, False where `filler` stands."""
    lengths = torch.tensor([len(row) for row in rows])
    ids = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=filler)
    return ids, torch.arange(ids.shape[1])[None] < lengths[:, None]


def _split_rows(logits: Sequence[torch.Tensor], rows: Sequence[tuple[int, int]]) -> list[torch.Tensor]:
    """Per picture (Q, H, W) -> per conversation, given each one's (picture, number of groups) in the model's order."""
    used = [0] * len(logits)
    parts = []
    for picture, count in rows:
        parts.append(logits[picture][used[picture] : used[picture] + count])
        used[picture] += count
    return parts


@contextmanager
def _inference(model: torch.nn.Module) -> Iterator[None]:
    """Eval mode and no gradients inside; the mode found is put back, so that training can ask in between."""
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(was_training)
