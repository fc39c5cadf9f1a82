"""Compiled answers: the same as uncompiled ones, and where nothing can be compiled it is said and nothing changes."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from model.answers import Answer
from model.compiling import compile_for_answers
from model.predictor import Predictor
from tests.unit.tiny_pixellm import make_model, noise, same, saying
from tools.bench.baselines import training_step
from tools.bench.measured_training import TRAINED_SHAPES, batch_to_train, model_to_train


def test_a_machine_that_cannot_compile_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    built = make_model()
    before = built.model.pixel_decoder.decode_scale

    def broken(function: Any, **_: Any) -> Any:
        def fails(*arguments: Any) -> Any:
            raise RuntimeError("no C++ compiler\nwas found")

        return fails

    monkeypatch.setattr(torch, "compile", broken)
    assert Predictor(built.model, built.processor).compile() == (
        "answering uncompiled, because this machine cannot compile the model: no C++ compiler was found"
    )
    assert built.model.vector_kernel is None and built.model.pixel_decoder.decode_scale == before


@pytest.mark.parametrize("checkpointing", [pytest.param(False, marks=pytest.mark.long), True])
def test_compiled_layers_give_the_same_losses_and_gradients(checkpointing: bool) -> None:
    """Batches of different lengths. What the compiler would make is left out: that takes minutes."""
    compare_layers("aot_eager", checkpointing, (1, 2))


def compare_layers(backend: str, checkpointing: bool, sizes: tuple[int, ...]) -> None:
    """sizes: images of each batch. Layers that are compiled in training, without dropout in front of LoRA."""
    model, names = model_to_train(TRAINED_SHAPES["tiny"], torch.device("cpu"), checkpointing)
    model = model.float()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    batches = [batch_to_train(model, images) for images in sizes]
    found = []
    for compiled in (False, True):
        if compiled:
            model.compile_layers(backend)
        for batch in batches:
            model.zero_grad()
            loss = training_step(model, batch)
            gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
            found.append((float(loss), torch.cat(gradients)))
    assert [name for name, p in model.named_parameters() if p.requires_grad] == names
    for (loss, gradient), (again, other) in zip(found[: len(sizes)], found[len(sizes) :], strict=True):
        assert again == pytest.approx(loss, rel=1e-6)
        assert (gradient - other).norm() <= 1e-5 * gradient.norm()


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch compiles with g++, which is not installed")
def test_compiled_answers_are_the_same(repository: Path, child_env: dict[str, str]) -> None:
    """In a process of its own: the compiler starts others, in environments of its making."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.unit.test_compiling"],
        cwd=repository,
        env=child_env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("compiled the model in") == 2


def compare_kernel() -> None:
    """In float32 the products of one row are compiled: answers, said and free, stay what they are."""
    built = make_model()
    predictor = Predictor(built.model, built.processor)

    def answers() -> list[Answer]:
        predictor.set_image(noise(20, 30))
        with saying(built, ["It is the red circle {seg} and the blue square {seg} {seg}."]):
            said = predictor.ask("Where?")
        return [said, predictor.ask("Where?", 8)]

    plain = answers()
    print(predictor.compile())
    assert len(plain[0].masks) == 3 and built.model.vector_kernel is not None
    assert all(same(one, other) for one, other in zip(answers(), plain, strict=True))


def compare_decoder() -> None:
    """In bfloat16 the decoder is: its 8 bits let masks differ by some hundredths."""
    model = make_model().model.to(torch.bfloat16)
    config = model.config
    torch.manual_seed(0)
    maps = torch.randn(1, config.text_config.hidden_size, config.grid_size, config.grid_size, dtype=torch.bfloat16)
    embeddings = torch.randn(3, config.num_scales, config.embedding_dim, dtype=torch.bfloat16)

    def decoded() -> torch.Tensor:
        prepared = model.pixel_decoder.prepare([maps] * config.num_scales)
        return model.pixel_decoder.decode(embeddings, prepared, torch.zeros(1, dtype=torch.long)).float()

    with torch.inference_mode():
        plain = decoded()
        print(compile_for_answers(model))
        assert "decode_scale" in vars(model.pixel_decoder)
        assert float((decoded() - plain).abs().max()) < 0.05 * float(plain.abs().max())


if __name__ == "__main__":
    compare_kernel()
    compare_decoder()
    compare_layers("inductor", False, (1,))
