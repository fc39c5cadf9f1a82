"""The gradient of one optimizer step of a true PixelLM, however its images are cut into micro-batches."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.unit.engine_real import IMAGES, real_step, write_real
from tests.unit.engine_toys import gradients
from utils.data.collate import Batch
from utils.engine import base
from utils.engine.plain_engine import PlainEngine
from utils.engine.runtime import Runtime
from utils.engine.stepping import OptimizerSettings, count_step

CPU = torch.device("cpu")
ALONE = Runtime("plain", 0, 0, 1, CPU)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("real")
    write_real(folder)
    return folder


def gradient_of(folder: Path, rounds: int, dtype: torch.dtype) -> tuple[torch.Tensor, list[Batch]]:
    """All gradients as one vector, and the micro-batches they are of."""
    model, step = real_step(folder, ALONE, rounds)
    engine = PlainEngine(model, OptimizerSettings(), "fp32", CPU)
    model.to(dtype)
    for batch in step:
        batch.pixel_values = {key: value.to(dtype) for key, value in batch.pixel_values.items()}
    engine.accumulate(step)
    return gradients(model), step


@pytest.mark.parametrize(("dtype", "within"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_the_gradient_does_not_depend_on_the_cut(folder: Path, dtype: torch.dtype, within: float) -> None:
    whole, _ = gradient_of(folder, 1, dtype)
    for rounds in (2, IMAGES):
        found, step = gradient_of(folder, rounds, dtype)
        assert (found - whole).norm() <= within * whole.norm()
    targets = [len(batch.target_questions) for batch in step]
    assert min(targets) == 0 and len(set(targets)) > 2, "the step should hold uneven and zero target counts"


def test_a_mean_of_means_would_be_noticed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, _ = gradient_of(folder, 1, torch.float32)
    rounds = 2

    def own_counts(model: object, step: list[Batch], add: Callable) -> dict[str, float]:
        return {name: rounds * count for name, count in count_step(model, step[:1], add).items()}

    monkeypatch.setattr(base, "count_step", own_counts)
    found, _ = gradient_of(folder, rounds, torch.float32)
    assert (found - whole).norm() > 1e-2 * whole.norm()
