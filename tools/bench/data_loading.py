"""How fast samples are made, and what a large data set costs in time and memory, on this machine, in one run.

What shares the machine slows all of it alike: speeds are told as ratios of medians of rounds that take turns.
"""

import json
import multiprocessing
import os
import random
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image

from model.processing_pixellm import PixelLMProcessor
from tools.bench.measure import forget_peak, peak_bytes
from utils.data.dataset import TrainingDataset, build_loader
from utils.data.mixture import Mixture
from utils.data.readers.base import ReaderOptions
from utils.data.readers.registry import MUSE, build_reader
from utils.evaluation.thresholds import Expectations, Threshold

THRESHOLDS: Expectations = (
    Threshold("loader_vs_imread", ">=", 0.35),
    "loader_fast_vs_imread",
    Threshold("muse_second_open_s", "<=", 1.0),
    Threshold("muse_index_pss_mb", "<=", 50.0),
    "workers_1_to_2",
    "muse_first_index_s",
    "muse_first_index_peak_mb",
)

WIDTH, HEIGHT = 640, 480
SIDE_OF_SQUARE = 448
IMAGES_GENERATED = 8
PER_ROUND, ROUNDS, BATCH = 120, 9, 2
PER_IMAGE = 3
"""Conversations about an image, with one mask each."""

MUSE_PAIRS = 50_000
"""Pairs of records with 2 and 3 questions, which name 3, 4, 4, 3 and 4 instances: 250,000 and 900,000 in all."""
_INSTANCES = ((3, 4), (4, 3, 4))
PSS_WORKERS, PSS_READS = 8, 2000

_CORNERS = 24
_TRAIN2014 = "refer_seg/images/mscoco/images/train2014"
_MEGABYTE = 1e6


def find_images(real_data: str, folder: Path) -> tuple[list[Path], str]:
    """Photographs of 640×480 or 480×640 pixels below `real_data`, each once, else images made in `folder`; and which
    of the two they are.
    """
    found: dict[tuple[str, int], Path] = {}
    for path in sorted(Path(real_data).rglob("*.jpg")) if real_data else ():
        with Image.open(path) as image:
            if sorted(image.size) == [HEIGHT, WIDTH]:
                found.setdefault((path.name[-16:], path.stat().st_size), path)
    if found:
        return list(found.values()), f"{len(found)} photographs of 640×480 in {real_data}"
    folder.mkdir(parents=True, exist_ok=True)
    made = [_generated(folder / f"{number}.jpg", number) for number in range(IMAGES_GENERATED)]
    return made, f"{len(made)} generated images of 640×480"


def _generated(path: Path, seed: int) -> Path:
    """A JPEG of 150 to 200 KB: large shapes with grain, as photographs have it."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC), dtype=np.float64)
    grain = rng.normal(0, 20, (HEIGHT, WIDTH, 1))
    Image.fromarray(np.clip(smooth + grain, 0, 255).astype(np.uint8)).save(path, quality=88)
    return path


def instance(rng: random.Random, name: str) -> dict[str, Any]:
    """A round outline of 24 corners somewhere in an image."""
    x, y, radius = rng.uniform(150, 450), rng.uniform(150, 330), rng.uniform(40, 140)
    outline = []
    for corner in range(_CORNERS):
        angle, reach = 2 * np.pi * corner / _CORNERS, radius * rng.uniform(0.8, 1.0)
        outline += [round(x + reach * float(np.cos(angle)), 2), round(y + reach * float(np.sin(angle)), 2)]
    box = [x - radius, y - radius, 2 * radius, 2 * radius]
    return {"segmentation": [outline], "bbox": box, "category_id": 1, "category_name": name}


def write_asked(root: Path, images: Sequence[Path], count: int) -> None:
    """A MUSE of `count` records over `images`, each with PER_IMAGE questions for one thing, no two alike."""
    folder = root / _TRAIN2014
    folder.mkdir(parents=True, exist_ok=True)
    sizes = {}
    for path in images:
        shutil.copy(path, folder / path.name)
        with Image.open(path) as image:
            sizes[path.name] = {"width": image.width, "height": image.height}
    rng = random.Random(0)
    records = []
    for number in range(count):
        name = images[number % len(images)].name
        labels = [f"second cup of row {number} on the left of the man in red" for _ in range(PER_IMAGE)]
        asked = [f"Which of the things on table {number} would one of {n} guests drink from first?" for n in range(3)]
        records.append(
            {
                "id": number,
                "file_name": name,
                **sizes[name],
                "questions": asked,
                "answers": [[instance(rng, label)] for label in labels],
                "text_answers": [f"They would take the {label} {{seg}}, as it is the fullest." for label in labels],
            }
        )
    _write_list(root / "muse" / "muse_train.json", map(json.dumps, records))


def write_large(root: Path, image: Path, pairs: int) -> None:
    """A MUSE of 2 · `pairs` records with 2.5 questions each that name 3.6 instances each."""
    folder = root / _TRAIN2014
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(image, folder / image.name)
    rng = random.Random(1)
    drawn = [json.dumps(instance(rng, f"thing of kind {number}")) for number in range(500)]

    def records() -> Iterator[str]:
        for pair in range(pairs):
            for which, counts in enumerate(_INSTANCES):
                asked = [f"What belongs to case {pair}, part {which}, item {n}?" for n in range(len(counts))]
                answers = ",".join(f"[{','.join(rng.choices(drawn, k=count))}]" for count in counts)
                head = {"id": 2 * pair + which, "file_name": image.name, "height": HEIGHT, "width": WIDTH}
                yield f'{json.dumps({**head, "questions": asked})[:-1]}, "answers": [{answers}]}}'

    _write_list(root / "muse" / "muse_train.json", records())


def _write_list(path: Path, items: Iterator[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as stream:
        stream.write("[")
        for number, item in enumerate(items):
            stream.write(f",\n{item}" if number else item)
        stream.write("]")


def measure_loader(
    root: Path, images: Sequence[Path], processor: PixelLMProcessor, rounds: int = ROUNDS
) -> dict[str, Any]:
    """Samples per second of cv2.imread, and of one and two workers on either path; ratios of the medians."""
    reader = build_reader(MUSE, root, "train", ReaderOptions(num_classes_per_sample=PER_IMAGE))
    mixture = Mixture([reader], [1.0], seed=0)
    files = [str(root / _TRAIN2014 / path.name) for path in images]
    cv2.setNumThreads(1)

    def imread() -> None:
        for number in range(PER_ROUND):
            cv2.imread(files[number % len(files)])

    def loaded(workers: int, fast: bool) -> Callable[[], None]:
        dataset = TrainingDataset(mixture, processor, PER_ROUND, strict=True, fast_resize=fast)
        loader = build_loader(dataset, rank=0, world_size=1, batch_size=BATCH, pad_token_id=0, workers=workers)

        def work() -> None:
            for batch in loader:
                if batch.input_ids.shape[0] != BATCH * PER_IMAGE:
                    raise RuntimeError(f"a batch of {batch.input_ids.shape[0]} conversations was not asked for")

        return work

    measured = {
        "imread": imread,
        "exact": loaded(1, False),
        "fast": loaded(1, True),
        "exact_2_workers": loaded(2, False),
    }
    seconds: dict[str, list[float]] = {name: [] for name in measured}
    for turn in range(rounds + 1):
        for name, work in measured.items():
            start = time.perf_counter()
            work()
            if turn:  # the first starts workers and fills caches
                seconds[name].append(time.perf_counter() - start)
    speeds = {name: PER_ROUND / statistics.median(times) for name, times in seconds.items()}
    return {
        "loader_vs_imread": speeds["exact"] / speeds["imread"],
        "loader_fast_vs_imread": speeds["fast"] / speeds["imread"],
        "workers_1_to_2": speeds["exact_2_workers"] / speeds["exact"],
        "samples_per_second": {name: round(speed, 1) for name, speed in speeds.items()},
        "rounds": rounds,
        "samples_per_round": PER_ROUND,
        "batch_size": BATCH,
    }


def measure_muse(folder: Path, image: Path, pairs: int = MUSE_PAIRS) -> dict[str, Any]:
    """What a MUSE of `pairs` pairs of records costs to index, to open again, and in each of 8 workers."""
    large, tiny = folder / "large", folder / "tiny"
    write_large(large, image, pairs)
    write_large(tiny, image, 1)
    first, second = _in_a_process(_opened, large), _in_a_process(_opened, large)
    (index,) = large.glob(".index/*.index")
    pss = [_in_a_process(_anonymous_memory, root) for root in (large, tiny)]
    return {
        "muse_first_index_s": first["seconds"],
        "muse_first_index_peak_mb": (first["peak"] - first["before"]) / _MEGABYTE,
        "muse_second_open_s": second["seconds"],
        "muse_index_pss_mb": (pss[0] - pss[1]) / _MEGABYTE,
        "muse_workers_pss_mb": {"large": pss[0] / _MEGABYTE, "empty": pss[1] / _MEGABYTE},
        "muse_questions": 5 * pairs,
        "muse_instances": 18 * pairs,
        "muse_json_mb": (large / "muse" / "muse_train.json").stat().st_size / _MEGABYTE,
        "muse_index_mb": index.stat().st_size / _MEGABYTE,
    }


def _in_a_process(work: Callable[[Path], Any], root: Path) -> Any:
    """What `work(root)` gives in a process that is started afresh."""
    spawning = multiprocessing.get_context("spawn")
    with spawning.Pool(1) as pool:
        return pool.apply(work, (root,))


def _opened(root: Path) -> dict[str, float]:
    """Seconds to open the large data set, and the largest memory of the process in bytes, before and after."""
    before, start = forget_peak(), time.perf_counter()
    build_reader(MUSE, root, "train")
    return {"seconds": time.perf_counter() - start, "before": before, "peak": peak_bytes()}


def _anonymous_memory(root: Path) -> float:
    """Pss_Anon in bytes of 8 workers together, each after 2,000 samples that it drew at random and whose masks it
    decoded.
    """
    mixture = Mixture([build_reader(MUSE, root, "train")], [1.0], seed=0)
    forking = multiprocessing.get_context("fork")
    read, leave = forking.Barrier(PSS_WORKERS + 1), forking.Barrier(PSS_WORKERS + 1)

    def work(number: int) -> None:
        rng = np.random.default_rng(number)
        for place in rng.integers(len(mixture.readers[0]), size=PSS_READS):
            for conversation in mixture[int(place)].conversations:
                for turn in conversation:
                    for target in turn.targets:
                        target.decode()
        read.wait()
        leave.wait()

    workers = [_forked(work, number) for number in range(PSS_WORKERS)]
    read.wait()
    total = sum(_pss_anon(worker) for worker in workers)
    leave.wait()
    for worker in workers:
        os.waitpid(worker, 0)
    return total


def _forked(work: Callable[[int], None], number: int) -> int:
    """The id of a copy of this process that does `work(number)` and ends. (Those of a pool have no children.)"""
    child = os.fork()
    if child == 0:
        try:
            work(number)
        finally:
            os._exit(0)
    return child


def _pss_anon(process: int) -> float:
    for line in Path(f"/proc/{process}/smaps_rollup").read_text(encoding="utf-8").splitlines():
        if line.startswith("Pss_Anon:"):
            return float(line.split()[1]) * 1024
    raise RuntimeError(
        "this system does not tell how much memory is anonymous (Pss_Anon): measure on Linux 5.4 or newer"
    )
