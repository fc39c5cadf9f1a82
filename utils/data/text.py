"""Messages as LLaVA writes them: {"from": "human" or "gpt", "value": text}, taking turns."""

from collections import Counter
from typing import Any

from utils.data.files import require_field

_IMAGE_MARKER = "<image>"
_ROLES = ("human", "gpt")


def parse_turns(messages: list[Any], where: str, skipped: Counter[str]) -> list[tuple[str, str]]:
    """(question, answer) pairs, or none where roles do not alternate or words are missing (counted in `skipped`).

    The words are `remove_image_marker`. DataError, naming `where`, for what is no
    message.
    """
    roles = tuple(require_field(message, "from", str, f"a message of {where}") for message in messages)
    values = (require_field(message, "value", str, f"a message of {where}") for message in messages)
    texts = [remove_image_marker(value) for value in values]
    if not roles or roles != _ROLES * (len(roles) // 2):
        skipped["conversation that does not alternate between human and gpt"] += 1
        return []
    if not all(texts):
        skipped["conversation with an empty message"] += 1
        return []
    return list(zip(texts[::2], texts[1::2], strict=True))


def remove_image_marker(text: str) -> str:
    """The words of a message: the place of the image, which the processor decides, is left out."""
    return text.replace(_IMAGE_MARKER, "").strip()
