"""Looks into data sets: what is missing, what is broken, what is left out, as training would meet it."""

import os
from collections.abc import Callable, Iterator, Sequence

from torch.utils.data import DataLoader
from tqdm import tqdm

from utils.data.check.examine import Examination, ExaminedSample, describe_error
from utils.data.check.leaks import image_key
from utils.data.check.report import BROKEN, HARMLESS, LEFT_OUT, MISSING, SetReport
from utils.data.files import DataRoot
from utils.data.readers.base import Reader, ReaderOptions
from utils.data.readers.registry import build_reader, required_files_of
from utils.data.requested_sets import RequestedSet
from utils.data.required_files import find_missing

QUICK_SAMPLES = 32
"""Samples of a data set that are opened without --full, spread over it."""

_BATCH = 16
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_ABSENT = ("missing file", "missing folder")


def survey(
    asked: RequestedSet, root: str, options: ReaderOptions, *, full: bool, workers: int
) -> tuple[SetReport, Reader | None]:
    """The report on one data set, and its reader where one could be made.

    full: open every sample, in `workers` processes and with a bar, and hash the images; else QUICK_SAMPLES of them.
    """
    report = SetReport(asked.name, asked.split, asked.is_training)
    reader = _try_build(report, lambda: _read(report, asked, root, options))
    if reader is None:
        return report, None
    report.images = len(reader)
    for level, counted in ((LEFT_OUT, reader.skipped), (HARMLESS, reader.noted)):
        for cause, count in sorted(counted.items()):
            if count:
                report.add(level, cause, f"in {reader.source}", count)
    report.keys = {image_key(path) for path in map(reader.image_path, range(len(reader))) if path}
    for found in _examine_samples(report, reader, full, workers):
        report.opened += 1
        report.questions += found.questions
        report.targets += found.targets
        if found.content:
            report.contents[found.content] = found.path
        for level, cause, sentence in found.findings:
            report.add(level, cause, sentence)
    return report, reader


def spread_evenly(length: int, wanted: int) -> list[int]:
    """Up to `wanted` of the numbers below `length`, evenly spread."""
    count = min(length, wanted)
    return [place * length // count for place in range(count)]


def _try_build(report: SetReport, make: Callable[[], Reader]) -> Reader | None:
    """What `make` gives, or None with the reason in the report."""
    try:
        return make()
    except Exception as error:
        reason = describe_error(error)
        if reason is None:
            raise
        cause, sentence = reason
        if not (report.absent and cause in _ABSENT):
            report.add(MISSING if "missing" in cause else BROKEN, cause, sentence)
        return None


def _read(report: SetReport, asked: RequestedSet, root: str, options: ReaderOptions) -> Reader:
    path = DataRoot(root).path
    parts = required_files_of(asked.name, asked.split)
    report.absent = find_missing(path, str(asked), parts)
    for part in parts:
        found = part.find(path)
        if found is not None:
            _note_texts(report, os.path.join(path, found))
    return build_reader(asked.name, root, asked.split, options)


def _note_texts(report: SetReport, path: str) -> None:
    """Annotation files that are not plain UTF-8. Readers take a byte order mark, ReasonSeg's takes cp1252 as well."""
    if os.path.isfile(path):
        files = [path]
    else:
        with os.scandir(path) as entries:
            files = [entry.path for entry in entries if entry.name.endswith((".json", ".jsonl"))]
    for file in files:
        if not file.endswith((".json", ".jsonl")) or not os.access(file, os.R_OK):
            continue
        with open(file, "rb") as stream:
            start = stream.read(1 << 20)
        if start.startswith(_BYTE_ORDER_MARK):
            report.add(HARMLESS, "byte order mark", file)
        try:
            start.decode("utf-8")
        except UnicodeDecodeError as error:
            if error.start < len(start) - 4:  # else a letter is cut by the end of what was read
                report.add(HARMLESS, "text in cp1252 or another encoding than UTF-8", file)


def _examine_samples(report: SetReport, reader: Reader, full: bool, workers: int) -> Iterator[ExaminedSample]:
    indices: Sequence[int] = range(len(reader)) if full else spread_evenly(len(reader), QUICK_SAMPLES)
    examination = Examination(reader, indices, with_content=full)
    processes = min(workers, len(indices), os.cpu_count() or 1) if full else 0
    loader = DataLoader(examination, batch_size=_BATCH, num_workers=processes, collate_fn=list)
    with tqdm(total=len(indices), desc=str(report), disable=None if full else True, leave=False) as bar:
        for batch in loader:
            yield from batch
            bar.update(len(batch))
