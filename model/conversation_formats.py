"""What stands around the questions and answers of a conversation."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .structures import CHAT_TEMPLATE, CONVERSATION_FORMATS, LLAVA_LLAMA_2, LLAVA_V1, PixelLMError

IMAGE_TOKEN, IMAGE_START_TOKEN, IMAGE_END_TOKEN = "<image>", "<im_start>", "<im_end>"

# Fixed by the checkpoints that were trained with them.
_LLAVA_V1_SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
_LLAVA_LLAMA_2_SYSTEM = (
    "You are a helpful language and vision assistant. "
    "You are able to understand the visual content that the user provides, "
    "and assist the user with a variety of tasks using natural language."
)

# Stand-ins that show where a chat template puts the texts it is given.
_QUESTION, _ANSWER, _NEXT_QUESTION = "FIRSTQUESTION", "FIRSTANSWER", "NEXTQUESTION"


class ConversationFormatError(PixelLMError):
    """A tokenizer and a conversation format do not go together."""


@dataclass(frozen=True)
class ConversationFormat:
    """The scaffold of a conversation: opening, question, asking, answer + answer_end, end token, between, question, ...

    opening: before the image and the first question. asking: between a question and its answer. answer_end: between
    an answer's last word and the end token; learned with the answer. between: from an end token to the next question.
    bos_at_start, bos_at_turns: the tokenizer's beginning token stands before the opening; before each later turn.
    opening_of_text: the opening where words follow at once, and the image's place is somewhere among them.
    """

    opening: str
    asking: str
    answer_end: str
    between: str
    bos_at_start: bool
    bos_at_turns: bool
    opening_of_text: str

    def write(self, turns: Sequence[tuple[str, str | None]], begin: str, end: str) -> str:
        """A conversation as one text, less the beginning token before it.

        Args:
            turns: (question, answer) pairs, written as they are; an answer of None or "" is one to come.
            begin, end: names of the beginning and end tokens.
        """
        text = ""
        for index, (question, answer) in enumerate(turns):
            if index:
                text += (begin if self.bos_at_turns else "") + self.between
            else:
                text += self.opening_of_text
            text += question + (self.asking + answer + self.answer_end + end if answer else self.asking.rstrip(" "))
        return text


def build_format(name: str, tokenizer: Any) -> ConversationFormat:
    """The scaffold called `name` for this tokenizer.

    Raises:
        ConversationFormatError: the name is unknown, or a chat template is asked for and the tokenizer has none that
            shows questions and answers as they are.
    """
    if name == LLAVA_V1:
        bos = _has_own_bos(tokenizer)
        opening = f"{_LLAVA_V1_SYSTEM} USER: "
        return ConversationFormat(opening, " ASSISTANT: ", "", "USER: ", bos, False, opening)
    if name == LLAVA_LLAMA_2:
        bos = _has_own_bos(tokenizer)
        opening = f"[INST] <<SYS>>\n{_LLAVA_LLAMA_2_SYSTEM}\n<</SYS>>"
        return ConversationFormat(f"{opening} ", " [/INST] ", " ", "[INST] ", bos, bos, f"{opening}\n\n")
    if name == CHAT_TEMPLATE:
        return _from_chat_template(tokenizer)
    raise ConversationFormatError(
        f"the conversation format {name!r} is not known: choose one of {', '.join(CONVERSATION_FORMATS)}"
    )


def _has_own_bos(tokenizer: Any) -> bool:
    """Whether there is a beginning token worth writing; GPT-2's is its end token under another name."""
    return tokenizer.bos_token_id is not None and tokenizer.bos_token_id != tokenizer.eos_token_id


def _from_chat_template(tokenizer: Any) -> ConversationFormat:
    """Read the scaffold off the tokenizer's own template.

    What stands between question and answer is taken from the prompt the template gives for generation, so that training
    and answering see the same tokens. The answer ends with the tokenizer's end token; where the template ends an answer
    with that token itself, it is not written twice.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ConversationFormatError(
            f"the tokenizer of this model has no chat template, which the conversation format {CHAT_TEMPLATE!r} needs: "
            f"choose {LLAVA_V1!r} or {LLAVA_LLAMA_2!r}"
        )
    question, answer = {"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _ANSWER}
    single = _render(tokenizer, [question])
    double = _render(tokenizer, [question, answer, {"role": "user", "content": _NEXT_QUESTION}])
    opening, asking = _split_once(single, _QUESTION)
    between = _split_once(_split_once(double, _ANSWER)[1], _NEXT_QUESTION)[0]
    ending = between.lstrip()
    if ending.startswith(tokenizer.eos_token):
        between = ending.removeprefix(tokenizer.eos_token)
    return ConversationFormat(opening, asking, "", between, False, False, opening)


def _render(tokenizer: Any, messages: list[dict[str, str]]) -> str:
    import jinja2

    try:
        # Templates that know the switch would otherwise ask for an answer that thinks first; others ignore it.
        return tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
    except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
        raise ConversationFormatError(
            f"the tokenizer's chat template cannot show a question and its answer ({error}): "
            "choose another conversation format"
        ) from error


def _split_once(text: str, mark: str) -> tuple[str, str]:
    if text.count(mark) != 1:
        raise ConversationFormatError(
            f"the tokenizer's chat template shows a text {text.count(mark)} times instead of once: "
            "choose another conversation format"
        )
    before, after = text.split(mark)
    return before, after
