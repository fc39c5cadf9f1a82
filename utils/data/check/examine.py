"""One sample looked at as training would: its image opened, its masks decoded, its conversations counted."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import UnidentifiedImageError
from torch.utils.data import Dataset

from model.image_processing_pixellm import open_image
from utils.data.bad_samples import as_bad_sample
from utils.data.check.report import BROKEN, HARMLESS
from utils.data.dataset import decode_masks
from utils.data.files import hash_bytes, image_size, read_bytes
from utils.data.masks import pixels_outside_image
from utils.data.readers.base import Reader
from utils.data.samples import NO_IMAGE, Sample

_FIRST_BYTES = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n")

_FAR_OUTSIDE = 2.0
"""Pixels; annotation tools overshoot the border by less."""


@dataclass(slots=True)
class ExaminedSample:
    """What a sample holds, its image's hash, and what is wrong with it: (level, cause, sentence) triples."""

    path: str
    questions: int = 0
    targets: int = 0
    content: str = ""
    findings: list[tuple[str, str, str]] = field(default_factory=list)


class Examination(Dataset):
    """Samples `indices` of `reader`, examined; `with_content` hashes their images too."""

    def __init__(self, reader: Reader, indices: Sequence[int], with_content: bool) -> None:
        self.reader, self.indices, self.with_content = reader, indices, with_content

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, place: int) -> ExaminedSample:
        index = self.indices[place]
        found = ExaminedSample(self.reader.image_path(index))
        try:
            sample = self.reader.read_all(index, np.random.default_rng(0))
            self._look_into(sample, found)
        except Exception as error:
            reason = describe_error(error, found.path)
            if reason is None:
                raise
            found.findings.append((BROKEN, *reason))
        return found

    def _look_into(self, sample: Sample, found: ExaminedSample) -> None:
        turns = [turn for conversation in sample.conversations for turn in conversation]
        found.questions = len(turns)
        if sample.image_path == NO_IMAGE:
            return
        image_size(sample.image_path)
        size = open_image(sample.image_path).shape[:2]
        if self.with_content:
            found.content = hash_bytes(read_bytes(sample.image_path))
        for target in (target for turn in turns for target in turn.targets):
            decode_masks([target], (size[0], size[1]), sample)
            found.targets += 1
            if pixels_outside_image(target.decode) > _FAR_OUTSIDE:
                sentence = f"{target.name!r} in {sample.sample_id} of {sample.image_path}"
                found.findings.append((HARMLESS, "target that reaches out of its image", sentence))


def describe_error(error: Exception, image: str = NO_IMAGE) -> tuple[str, str] | None:
    """(cause, sentence) of an error that a person can put right; None where it is a mistake in the program.

    Files that cannot be opened and files that are no images are told from damaged ones: `image` is the one at hand.
    """
    reason = as_bad_sample(error)
    if reason is None:
        return None
    below = error.__cause__
    if isinstance(below, UnidentifiedImageError) and not _begins_as_image(image):
        return "file that is no image", reason.message
    if isinstance(below, OSError) and below.errno is not None:
        return "unreadable file", reason.message
    return ("damaged image" if reason.cause == "image error" else reason.cause), reason.message


def _begins_as_image(path: str) -> bool:
    """Whether the file has the first bytes of a JPEG or a PNG: then it was one once."""
    try:
        with open(path, "rb") as stream:
            return stream.read(8).startswith(_FIRST_BYTES)
    except OSError:
        return False
