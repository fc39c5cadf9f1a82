"""What `make gpu` runs is sound: its steps go well on a CPU, and without CUDA it says so."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.gpu import steps
from tests.gpu.conftest import smoke_base, smoke_data  # noqa: F401 (fixtures)
from tools.bench.decoding import measure
from tools.gpu import list_parts, run_part


@pytest.mark.long
@pytest.mark.timeout(900)
def test_the_steps_of_a_gpu_run_on_a_cpu(smoke_base: Path, smoke_data: Path, tmp_path: Path) -> None:  # noqa: F811
    assert steps.resumed_repeats(smoke_base, smoke_data, tmp_path) == []
    model = steps.export(tmp_path / "whole", tmp_path / "model")
    assert steps.answer(model, "cpu", torch.float32) == steps.answer(model, "cpu", torch.float32)


def test_a_decode_is_measured() -> None:
    found = measure("tiny", torch.device("cpu"), runs=1)
    assert found["parameters"] > 1e5 and found["seconds"]["160"]["least"] > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA here")
def test_without_cuda_one_sentence_and_status_2(repository: Path, child_env: dict[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, "tools/gpu.py"], cwd=repository, env=child_env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and done.stdout == ""
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("gpu: ")]
    assert "no CUDA device" in line


def test_a_part_that_fails_is_kept_with_its_output(tmp_path: Path) -> None:
    part = list_parts(tmp_path)[0]
    failed = run_part(type(part)("broken", ("-c", "import sys; print('why'); sys.exit(3)")))
    assert failed["status"] == 3 and failed["output"] == "why\n"
    written = tmp_path / "found.json"  # holds 1
    fine = run_part(type(part)("fine", ("-c", f"open({str(written)!r}, 'w').write('1')"), written))
    assert fine["status"] == 0 and fine["result"] == 1 and "output" not in fine
