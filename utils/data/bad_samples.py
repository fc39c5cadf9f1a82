"""Samples that cannot be read: counted by cause, each cause told once, and too many of them stop the run."""

import logging
import re
from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

from model.structures import PixelLMError
from utils.cli.logs import EVERY_RANK
from utils.data.errors import DataError

_BETWEEN_WORDS = re.compile("(?<=[a-z])(?=[A-Z])")

logger = logging.getLogger(__name__)

BAD_SAMPLES = "bad_samples"
"""Key of Example.info: the list of BadSample another sample stands in for."""

_FEW = 200
"""Shares are taken of at least so many samples: the first bad one is no reason to stop."""


class BadSample(NamedTuple):
    """Why a sample was left out: the kind of trouble, the same for all that have it, and the sentence with the path."""

    cause: str
    message: str


def as_bad_sample(error: Exception) -> BadSample | None:
    """`error` as the reason to leave a sample out, or None where it is a mistake in the program.

    Where an error about what a person can put right names no cause, its class does.
    """
    if not isinstance(error, PixelLMError):
        return None
    kind = _BETWEEN_WORDS.sub(" ", type(error).__name__).lower()
    return BadSample(getattr(error, "cause", kind), " ".join(str(error).split()))


class BadSamples:
    """Keeps count over a run.

    Args:
        most: share of the samples asked for that may be bad; DataError beyond it. Of fewer than 200 samples so many may
            be bad as of 200.
    """

    def __init__(self, most: float) -> None:
        self.most = most
        self.seen = 0
        self.counts: Counter[str] = Counter()
        self.first: dict[str, str] = {}

    def add(self, infos: Iterable[dict[str, Any]]) -> None:
        """Take in the `info` of a batch's examples. DataError, after the table was logged, when too many are bad."""
        for info in infos:
            bad = info[BAD_SAMPLES]
            self.seen += 1 + len(bad)
            for cause, message in bad:
                self._count(cause, message)
        total = self.counts.total()
        if total > self.most * max(self.seen, _FEW):
            logger.error("%s", self.table())
            raise DataError(
                f"{total} of {self.seen} samples cannot be used, more than --max_bad_samples {self.most:g} allows: put "
                f"right what the table lists, or allow more"
            )

    def table(self) -> str:
        """A line per cause: how many samples, and the first of them. Empty when there were none."""
        if not self.counts:
            return ""
        width = max(len(cause) for cause in self.counts)
        lines = [f"{self.counts.total()} of {self.seen} samples were left out:"]
        lines += [
            f"{count:8d}  {cause:{width}}  first: {self.first[cause]}" for cause, count in self.counts.most_common()
        ]
        return "\n".join(lines)

    def _count(self, cause: str, message: str) -> None:
        if cause not in self.first:
            self.first[cause] = message
            logger.warning(
                "a sample is left out, more of the kind are only counted (%s): %s", cause, message, extra=EVERY_RANK
            )
        self.counts[cause] += 1
