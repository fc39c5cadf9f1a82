"""Which sample is number i: a function of (seed, i) alone, whatever the ranks, workers and restarts."""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from utils.cli.config import DataConfig
from utils.data.errors import DataError
from utils.data.readers.base import Reader
from utils.data.readers.registry import build_training_readers
from utils.data.requested_sets import reader_options, requested_families
from utils.data.samples import Sample

_BLOCK = 1024
_CHOICE, _ORDER, _WORDS = range(3)
"""What a stream of random numbers is for; streams of different use never meet."""


class Mixture:
    """An endless row of samples drawn from `readers` with probabilities proportional to `rates`.

    Which reader is asked is drawn independently for every i. Within a reader images come in a seeded permutation, a
    new one per epoch of its own: each once before any twice.
    """

    def __init__(self, readers: list[Reader], rates: list[float], seed: int) -> None:
        if len(readers) != len(rates) or not readers:
            raise DataError(f"{len(rates)} rates are given for {len(readers)} data sets; expected one rate each")
        if not all(math.isfinite(rate) and rate >= 0 for rate in rates) or not sum(rates) > 0:
            raise DataError(f"the sample rates are {rates}; expected numbers of 0 or more, not all 0")
        if seed < 0:
            raise DataError(f"the seed of the data is {seed}; expected 0 or more")
        self.readers = readers
        self.shares = np.asarray(rates, dtype=np.float64) / sum(rates)
        self.seed = seed
        # Row b: how often each reader was asked before block b.
        self._asked_before = [np.zeros(len(readers), dtype=np.int64)]
        self._block = _Block(-1, np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64))
        self._order = lru_cache(maxsize=2 * len(readers))(self._shuffle)

    def locate(self, i: int) -> tuple[int, int]:
        """(reader, image) of sample i."""
        block, place = divmod(i, _BLOCK)
        if self._block.number != block:
            self._block = self._count_block(block)
        which = int(self._block.choices[place])
        epoch, position = divmod(int(self._block.turns[place]), len(self.readers[which]))
        return which, int(self._order(which, epoch)[position])

    def __getitem__(self, i: int) -> Sample:
        """Sample i. DataError if its files cannot be read."""
        which, image = self.locate(i)
        return self.readers[which].read(image, np.random.default_rng((self.seed, _WORDS, i)))

    @property
    def fingerprint(self) -> str:
        """Changes when any annotation file that was read does."""
        return "; ".join(f"{reader.name}|{reader.split} {len(reader)} {reader.fingerprint}" for reader in self.readers)

    def describe(self) -> str:
        """One line per data set: its share of the samples, its images, and what was left out and why."""
        lines = []
        for reader, share in zip(self.readers, self.shares, strict=True):
            skipped = "".join(
                f"; left out: {count} × {cause}" for cause, count in sorted(reader.skipped.items()) if count
            )
            lines.append(f"{reader.name} ({reader.split}): {share:.1%} of samples, {len(reader)} images{skipped}")
        return "\n".join(lines)

    def __getstate__(self) -> dict:
        return {key: value for key, value in self.__dict__.items() if key != "_order"}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._order = lru_cache(maxsize=2 * len(self.readers))(self._shuffle)

    def _draw_choices(self, block: int) -> np.ndarray:
        rng = np.random.default_rng((self.seed, _CHOICE, block))
        return rng.choice(len(self.readers), size=_BLOCK, p=self.shares)

    def _count_block(self, block: int) -> "_Block":
        while len(self._asked_before) <= block:
            done = np.bincount(self._draw_choices(len(self._asked_before) - 1), minlength=len(self.readers))
            self._asked_before.append(self._asked_before[-1] + done)
        choices = self._draw_choices(block)
        turns = np.empty(_BLOCK, dtype=np.int64)
        for which, before in enumerate(self._asked_before[block]):
            places = np.flatnonzero(choices == which)
            turns[places] = before + np.arange(len(places))
        return _Block(block, choices, turns)

    def _shuffle(self, which: int, epoch: int) -> np.ndarray:
        return np.random.default_rng((self.seed, _ORDER, which, epoch)).permutation(len(self.readers[which]))


@dataclass(frozen=True, slots=True)
class _Block:
    """For each place of a block of samples: which reader is asked, and how often it was asked before."""

    number: int
    choices: np.ndarray
    turns: np.ndarray


def build_mixture(data: DataConfig, seed: int) -> Mixture:
    """The mixture the command line asks for: the families of --dataset by --sample_rates, a family's sets equally
    often.

    DataError in one sentence when rates and families do not match or a data set cannot be read.
    """
    families = requested_families(data)
    rates = _parse_rates(data.sample_rates)
    if len(families) != len(rates):
        raise DataError(
            f"--sample_rates {data.sample_rates} has {len(rates)} numbers, --dataset {data.dataset} has "
            f"{len(families)} families; expected one number each"
        )
    options = reader_options(data)
    readers: list[Reader] = []
    shares: list[float] = []
    for (family, names), rate in zip(families, rates, strict=True):
        found = build_training_readers(family, names, data.dataset_dir, options)
        readers += found
        shares += [rate / len(found)] * len(found)
    return Mixture(readers, shares, seed)


def _parse_rates(sample_rates: str) -> list[float]:
    try:
        rates = [float(part) for part in sample_rates.split(",")]
    except ValueError as error:
        raise DataError(
            f"--sample_rates is {sample_rates!r}; expected numbers joined by commas, such as 2,9,2,4"
        ) from error
    if not all(math.isfinite(rate) and rate >= 0 for rate in rates) or not sum(rates) > 0:
        raise DataError(f"--sample_rates is {sample_rates!r}; expected numbers of 0 or more, not all 0")
    return rates
