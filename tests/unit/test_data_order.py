"""The flags' shares are kept, and sample i is the same whoever makes it: any ranks, any workers, any restart."""

import hashlib
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from scipy.stats import chisquare

from tests.unit import data_sets
from tests.unit.tokenizer_kinds import make_processor
from utils.cli.config import DataConfig
from utils.data.collate import Batch
from utils.data.dataset import TrainingDataset, build_loader
from utils.data.mixture import Mixture, build_mixture

LENGTH = 24


def mixture(root: Path, rates: str = "2,9,2,4") -> Mixture:
    for write in (data_sets.write_ade20k, data_sets.write_parts, data_sets.write_refer_seg, data_sets.write_vqa):
        write(root)
    data_sets.write_muse(root)
    return build_mixture(
        DataConfig(
            dataset_dir=str(root),
            sample_rates=rates,
            sem_seg_data="ade20k||pascal_part",
            refer_seg_data="refcoco",
        ),
        seed=11,
    )


@pytest.mark.parametrize("rates", ["2,9,2,4", "1,1,1,1", "0.5,3,0,7"])
def test_sample_rates_are_kept(tmp_path: Path, rates: str) -> None:
    """Families by their rates, the sets of a family equally often; a rate of 0 is never drawn."""
    mixed = mixture(tmp_path, rates)
    drawn = Counter(mixed.locate(i)[0] for i in range(20_000))
    sem_seg, refer_seg, vqa, muse = (float(rate) for rate in rates.split(","))
    whole = sem_seg + refer_seg + vqa + muse
    expected = [20_000 * rate / whole for rate in (sem_seg / 2, sem_seg / 2, refer_seg, vqa, muse)]
    wanted = [number for number, count in enumerate(expected) if count]
    assert set(drawn) == set(wanted)
    assert chisquare([drawn[number] for number in wanted], [expected[number] for number in wanted]).pvalue > 0.001


def content(batch: Batch) -> str:
    """A hash of all that a batch holds."""
    hashed = hashlib.sha256(repr(batch.info).encode())
    for value in batch.to("cpu").as_kwargs().values():
        values = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
        for tensor in values:
            hashed.update(tensor.contiguous().view(torch.uint8).numpy().tobytes() if tensor.numel() else b"nothing")
    return hashed.hexdigest()


def contents(root: Path, ranks: int, workers: int, first: int = 0) -> list[str]:
    """Of samples `first` to LENGTH in order, each made afresh by the rank and worker whose turn it is."""
    dataset = TrainingDataset(mixture(root), make_processor("fast_llama"), LENGTH)
    loaders = [
        build_loader(dataset, rank=rank, world_size=ranks, batch_size=1, pad_token_id=0, workers=workers, first=first)
        for rank in range(ranks)
    ]
    return [content(batch) for turn in zip(*loaders, strict=True) for batch in turn]


def test_a_sample_is_the_same_for_all_ranks_workers_and_restarts(tmp_path: Path) -> None:
    wanted = contents(tmp_path, ranks=1, workers=0)
    assert len(set(wanted)) > LENGTH // 2, "the samples differ from each other"
    for ranks, workers in ((1, 4), (2, 1), (4, 0)):
        assert contents(tmp_path, ranks, workers) == wanted, (ranks, workers)
    for ranks, workers in ((1, 0), (2, 1), (4, 0)):
        assert contents(tmp_path, ranks, workers, first=12) == wanted[12:], (ranks, workers)


def test_a_process_ends_although_its_workers_leave_signals_to_it(tmp_path: Path) -> None:
    """With batches still wanted: what multiprocessing sends to workers at the end, they do not hear."""
    program = (
        "import sys; from pathlib import Path\n"
        "from tests.unit.test_data_order import *\n"
        "made = TrainingDataset(mixture(Path(sys.argv[1])), make_processor('fast_llama'), LENGTH)\n"
        "left = iter(build_loader(made, rank=0, world_size=1, batch_size=1, pad_token_id=0, workers=2))\n"
        "next(left); sys.modules['keeps_it'] = left\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], cwd=Path(__file__).parents[2], timeout=100)
    assert done.returncode == 0
