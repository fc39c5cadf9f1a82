"""LLaVA's instruction data: conversations of several turns in words, without masks.

Layout: llava_dataset/<name>.json over coco/train2017.
"""

from typing import Any

import numpy as np

from utils.data.files import DataRoot, digest, expect, field, parse_json, read_bytes
from utils.data.reader import Reader, ReaderOptions, draw
from utils.data.samples import SEG_MARKER, TEXT, Conversation, Sample, Turn

VQA_SETS = ("llava_instruct_150k",)

_IMAGE_MARKER = "<image>"
_ROLES = ("human", "gpt")


class VqaReader(Reader):
    """LLaVA JSON, grouped by picture; every record is one conversation. There is one split, "train"."""

    def __init__(self, name: str, root: DataRoot, split: str, options: ReaderOptions) -> None:
        super().__init__(name, split, options)
        self._path = root.file("llava_dataset", f"{name}.json")
        content = read_bytes(self._path)
        self.fingerprint = digest(content)
        self._root = root
        self._folder = root.folder("coco", "train2017")
        pictures: dict[str, list[Conversation]] = {}
        for number, record in enumerate(expect(parse_json(content, self._path), list, self._path)):
            where = f"record {number} of {self._path}"
            if "image" not in expect(record, dict, where):
                self.skipped["conversation without a picture"] += 1
                continue
            conversation = self._conversation(field(record, "conversations", list, where), where)
            if conversation:
                pictures.setdefault(field(record, "image", str, where), []).append(conversation)
        self._pictures = list(pictures.items())
        self._refuse_if_empty(self._pictures, self._path)

    def __len__(self) -> int:
        return len(self._pictures)

    def read(self, index: int, rng: np.random.Generator) -> Sample:
        name, conversations = self._pictures[index]
        return self._sample(name, draw(rng, conversations, self.options.num_classes_per_sample))

    def read_all(self, index: int, rng: np.random.Generator) -> Sample:
        name, conversations = self._pictures[index]
        return self._sample(name, conversations)

    def _sample(self, name: str, conversations: list[Conversation]) -> Sample:
        path = self._root.picture(self._folder, name, self._path)
        return Sample(path, tuple(conversations), self.name, f"{self.name}/{self.split}/{name}")

    def _conversation(self, messages: list[Any], where: str) -> Conversation:
        """The turns, or none where roles do not alternate or words are missing (counted)."""
        roles = tuple(field(message, "from", str, f"a message of {where}") for message in messages)
        texts = [_words(field(message, "value", str, f"a message of {where}")) for message in messages]
        if not roles or roles != _ROLES * (len(roles) // 2):
            self.skipped["conversation that does not alternate between human and gpt"] += 1
            return ()
        if not all(texts) or any(SEG_MARKER in text for text in texts):
            self.skipped["conversation with an empty message or a marker"] += 1
            return ()
        return tuple(Turn(asked, told, (), TEXT) for asked, told in zip(texts[::2], texts[1::2], strict=True))


def _words(text: str) -> str:
    """Without the place of the picture, which the processor decides."""
    return text.replace(_IMAGE_MARKER, "").strip()
