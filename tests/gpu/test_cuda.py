"""On a GPU: training with both engines, resuming bit for bit, export, answers in every precision, synchronisations."""

import importlib.util
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.gpu import steps
from tests.unit.tiny_batches import TWO, make_batch
from tests.unit.tiny_pixellm import make_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device here"),
]
# Where forward waits for the device today: sizes of masks, places of seg groups, indices of packed sequences.
MOST_SYNCHRONISATIONS = 20


def installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def to_cuda(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: to_cuda(one) for name, one in value.items()}
    return [to_cuda(one) for one in value] if isinstance(value, list) else value.cuda()


@pytest.fixture(scope="module")
def exported(smoke_base: Path, smoke_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model trained on the GPU by the plain engine."""
    out = tmp_path_factory.mktemp("gpu")
    return steps.export(steps.train(smoke_base, smoke_data, out, "plain", "--precision=bf16"), out / "model")


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("engine", ["plain", "deepspeed"])
def test_ten_steps(smoke_base: Path, smoke_data: Path, tmp_path: Path, engine: str, precision: str) -> None:
    if engine == "deepspeed" and not installed("deepspeed"):
        pytest.skip("deepspeed is not installed")
    run = steps.train(smoke_base, smoke_data, tmp_path, "run", f"--precision={precision}", engine=engine)
    assert (run / "ckpt_model" / f"step{steps.STEPS}").is_dir()


def test_a_resumed_run_repeats_bit_for_bit(smoke_base: Path, smoke_data: Path, tmp_path: Path) -> None:
    assert steps.resumed_repeats(smoke_base, smoke_data, tmp_path, "--precision=bf16") == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_an_exported_model_answers(exported: Path, dtype: torch.dtype) -> None:
    steps.answer(exported, "cuda", dtype)


def test_words_are_those_of_the_cpu(exported: Path) -> None:
    assert steps.answer(exported, "cuda", torch.float32) == steps.answer(exported, "cpu", torch.float32)


def test_flash_attention(exported: Path) -> None:
    if not installed("flash_attn"):
        pytest.skip("flash-attn is not installed")
    steps.answer(exported, "cuda", torch.bfloat16, "flash_attention_2")


def test_compiled_decoding_says_the_same(exported: Path) -> None:
    plain = steps.answer(exported, "cuda", torch.float32)
    assert steps.answer(exported, "cuda", torch.float32, compiled=True) == plain


def test_a_forward_waits_for_the_device_a_few_times() -> None:
    built = make_model()
    model, batch = built.model.cuda().train(), to_cuda(make_batch(built.processor, [(0, TWO)], [(40, 56)]))
    model(**batch)  # what is made at the first use
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            model(**batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [str(one.message) for one in heard if "synchroniz" in str(one.message)]
    print(f"{len(waits)} synchronisations in one forward")
    assert len(waits) <= MOST_SYNCHRONISATIONS, "\n".join(waits)
