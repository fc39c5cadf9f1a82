"""Samples that cannot be read in training: replaced, counted, told once, and too many of them stop the run."""

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from model.processing_pixellm import EncodedConversation
from model.structures import PixelLMError
from tests.unit import data_sets
from tests.unit.data_sets import HEIGHT, WIDTH, square
from tests.unit.test_data_mixture import FakeProcessor
from utils.cli.commands import parse_train
from utils.data.bad_samples import BAD_SAMPLES, BadSamples
from utils.data.dataset import TrainingDataset
from utils.data.errors import DataError
from utils.data.mixture import Mixture
from utils.data.readers.base import ReaderOptions
from utils.data.readers.registry import build_reader
from utils.engine.runtime import Runtime
from utils.engine.setup import StepBatches

IMAGES = 40
GONE, DAMAGED, SMALL, EMPTY = 3, 11, 17, 23


class ImageError(PixelLMError):
    """As the processor's."""


class StrictEyes(FakeProcessor):
    """Says of an image that it cannot be opened, as the processor does."""

    tokenizer = SimpleNamespace(pad_token_id=0)

    def open_image(self, source: Any) -> np.ndarray:
        array = super().open_image(source)
        if array is None:
            raise ImageError(f"{source} is damaged:\nreplace it")
        return array


def write_forty(root: Path, broken: bool = True) -> Path:
    """A referring set of 40 images with one thing each; four of them are broken, each in its own way."""
    sizes = {"height": HEIGHT, "width": WIDTH}
    images = [{"id": number, "file_name": f"p{number}.jpg", **sizes} for number in range(IMAGES)]
    marked = [data_sets.annotation(number, number, [square(2, 2, 6)]) for number in range(IMAGES)]
    if broken:
        marked[EMPTY]["segmentation"] = [square(500, 500, 6)]
    content = {"images": images, "categories": [{"id": 7, "name": "cup"}], "annotations": marked}
    refs = [data_sets.ref(number, number, number, f"cup {number}") for number in range(IMAGES)]
    data_sets.write_refer_seg(root, found=refs)
    data_sets.write_json(root / "refer_seg/refcoco/instances.json", content)
    folder = root / data_sets.COCO / "train2014"
    for number in range(IMAGES):
        data_sets.write_image(folder / f"p{number}.jpg")
    if broken:
        (folder / f"p{GONE}.jpg").unlink()
        (folder / f"p{DAMAGED}.jpg").write_bytes(b"no image")
        data_sets.write_image(folder / f"p{SMALL}.jpg", HEIGHT, WIDTH - 1)
    return root


def mixture(root: Path) -> Mixture:
    return Mixture([build_reader("refcoco", root, "train", ReaderOptions())], [1.0], seed=7)


CAUSES = {
    GONE: "missing image",
    DAMAGED: "image error",
    SMALL: "mask of another size than its image",
    EMPTY: "target without a pixel",
}


def test_bad_samples_are_replaced_by_others_that_follow_from_their_number(tmp_path: Path) -> None:
    mixed = mixture(write_forty(tmp_path))
    made = TrainingDataset(mixed, StrictEyes(), IMAGES)
    wanted = [mixed.locate(i)[1] for i in range(IMAGES)]
    infos = [made[i].info for i in range(IMAGES)]
    for number, info in zip(wanted, infos, strict=True):
        own = f"refcoco/train/{number}"
        if number in CAUSES:
            bad = info[BAD_SAMPLES]
            assert info["sample_id"] != own and info["replaced_samples"] == len(bad) >= 1
            assert bad[0].cause == CAUSES[number] and f"p{number}.jpg" in bad[0].message and "\n" not in bad[0].message
        else:
            assert info["sample_id"] == own and info[BAD_SAMPLES] == [] and info["replaced_samples"] == 0
    again = TrainingDataset(mixture(tmp_path), StrictEyes(), IMAGES)
    assert [again[i].info for i in reversed(range(IMAGES))] == infos[::-1], "a stand-in must depend on i alone"


def test_a_mistake_in_the_program_is_not_skipped(tmp_path: Path) -> None:
    class Mistaken(FakeProcessor):
        def encode_conversation(self, turns: list[tuple[str, str]], with_image: bool) -> EncodedConversation:
            raise KeyError("oops")

    with pytest.raises(KeyError, match="oops"):
        TrainingDataset(mixture(write_forty(tmp_path)), Mistaken(), 1)[0]

    class Forgetful(FakeProcessor):
        def encode_conversation(self, turns: list[tuple[str, str]], with_image: bool) -> EncodedConversation:
            tokens = torch.ones(3, dtype=torch.long)
            return EncodedConversation(tokens, tokens, [], len(turns), 0)

    with pytest.raises(RuntimeError, match="seg groups for turns"):
        TrainingDataset(mixture(tmp_path), Forgetful(), 1)[0]


def test_when_all_are_bad_it_ends(tmp_path: Path) -> None:
    root = write_forty(tmp_path)
    mixed = mixture(root)
    for image in (root / data_sets.COCO / "train2014").iterdir():
        image.unlink()
    with pytest.raises(DataError, match=r"^9 samples in a row, from number 5 on, cannot be used; .*p\d+\.jpg.*missing"):
        TrainingDataset(mixed, StrictEyes(), IMAGES)[5]


def info(*bad: tuple[str, str]) -> dict[str, Any]:
    return {BAD_SAMPLES: list(bad)}


def test_each_cause_is_told_once_and_all_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    bad = BadSamples(1.0)
    bad.add(
        [info(("missing", "a.jpg is missing"), ("cut", "b.jpg is cut")), info(), info(("missing", "c.jpg is missing"))]
    )
    bad.add([info(("missing", "d.jpg is missing"))])
    told = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(told) == 2 and "a.jpg is missing" in told[0] and "b.jpg is cut" in told[1]
    assert bad.seen == 8 and bad.counts == {"missing": 3, "cut": 1}
    assert bad.table().splitlines() == [
        "4 of 8 samples were left out:",
        "       3  missing  first: a.jpg is missing",
        "       1  cut      first: b.jpg is cut",
    ]
    assert BadSamples(0.02).table() == ""


def test_too_many_stop_the_run_with_a_table(caplog: pytest.LogCaptureFixture) -> None:
    bad = BadSamples(0.02)
    bad.add([info(("missing", f"{number}.jpg")) for number in range(4)])
    with pytest.raises(DataError, match=r"^5 of 10 samples cannot be used, more than --max_bad_samples 0\.02 allows"):
        bad.add([info(("missing", "4.jpg"))])
    assert "5  missing  first: 0.jpg" in caplog.records[-1].getMessage()
    later = BadSamples(0.02)
    later.add([info()] * 490)
    later.add([info(("missing", "x.jpg"))] * 10)
    with pytest.raises(DataError, match=r"^11 of 512 samples"):
        later.add([info(("missing", "x.jpg"))])
    with pytest.raises(DataError, match="--max_bad_samples 0 allows"):
        BadSamples(0.0).add([info(("missing", "x.jpg"))])


def step_batches(root: Path, *flags: str) -> StepBatches:
    config = parse_train(
        [
            *("--version=base", f"--dataset_dir={root}", "--dataset=refer_seg", "--sample_rates=1"),
            *("--refer_seg_data=refcoco", "--batch_size=4", "--grad_accumulation_steps=1", "--max_steps=10"),
            *flags,
        ]
    )
    runtime = Runtime("plain", 0, 0, 1, torch.device("cpu"))
    return StepBatches(config, runtime, mixture(root), StrictEyes())


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_counts_what_its_workers_could_not_read(
    tmp_path: Path, workers: int, capsys: pytest.CaptureFixture
) -> None:
    batches = step_batches(write_forty(tmp_path), f"--workers={workers}", "--max_bad_samples=0.5")
    steps = list(batches(0))
    assert len(steps) == 10 and all(len(batch.info) == 4 for (batch,) in steps)
    assert set(batches.bad.counts) == set(CAUSES.values()) and batches.bad.seen == 40 + batches.bad.counts.total()
    batches.report_losses()
    assert "samples were left out:" in capsys.readouterr().err


@pytest.mark.parametrize("workers", [0, 2])
def test_strict_data_stops_at_the_first_with_its_sentence(tmp_path: Path, workers: int) -> None:
    batches = step_batches(write_forty(tmp_path), f"--workers={workers}", "--strict_data")
    with pytest.raises(DataError, match=r"^[^\n]*p\d+\.jpg[^\n]*$") as caught:
        list(batches(0))
    assert "Traceback" not in str(caught.value)
    assert batches.bad.counts == {}
    whole = step_batches(write_forty(tmp_path, broken=False), f"--workers={workers}", "--strict_data")
    assert len(list(whole(0))) == 10


def test_by_default_two_in_a_hundred_may_be_bad(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    batches = step_batches(write_forty(tmp_path), "--workers=0", "--max_steps=20")
    with pytest.raises(DataError, match=r"^[56] of \d+ samples cannot be used, more than --max_bad_samples 0\.02"):
        list(batches(0))
    assert "samples were left out:" in caplog.records[-1].getMessage()
