"""Precisions, attention implementations and gradient checkpointing: the same model, other arithmetic."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.unit.tiny_bases import options, write_language_model, write_tower
from tests.unit.tiny_batches import NONE, ONE, TWO, make_batch, total_loss
from tests.unit.tiny_pixellm import make_model
from utils.checkpoints.builder import TrainingRecipe, build_model, choose_trainable, save_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A PixelLM over Qwen3 and SigLIP."""
    place = tmp_path_factory.mktemp("precision")
    base, tower = write_language_model(place / "base", "qwen3"), write_tower(place / "tower", "siglip")
    built = build_model(str(base), str(tower), options())
    save_model(built.model, built.processor, place / "saved")
    return place / "saved"


def batch_for(processor: Any) -> dict[str, Any]:
    return make_batch(processor, [(0, ONE), (0, TWO), (1, NONE)], [(20, 40), (24, 24)], text_only=[2], ignored=0.1)


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[str, float]:
    """Losses in float32 with sdpa."""
    built = build_model(str(folder))
    with torch.no_grad():
        losses = built.model(**batch_for(built.processor)).losses
    return {name: (term.sum / term.count).item() for name, term in losses.items()}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def test_precisions_and_attentions(
    dtype: torch.dtype, attention: str, folder: Path, expected: dict[str, float]
) -> None:
    built = build_model(str(folder), dtype=dtype, attn_implementation=attention)
    model = built.model.train()
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert model.language_model.config._attn_implementation == attention
    assert model.vision_tower.model.config._attn_implementation == attention
    trained = choose_trainable(model, TrainingRecipe(lora_dropout=0))
    losses = model(**batch_for(built.processor)).losses
    rounding = 1e-5 if dtype == torch.float32 else 0.05
    for name, term in losses.items():
        assert term.sum.dtype == torch.float32, "losses are summed in full precision"
        assert (term.sum / term.count).item() == pytest.approx(expected[name], rel=rounding)
    total_loss(model, losses).backward()
    gradients = [model.get_parameter(name).grad for name in trained]
    assert all(gradient is not None and bool(gradient.isfinite().all()) for gradient in gradients)

    prompt = built.processor.encode_prompt([("the red circle", None)])
    batch = batch_for(built.processor)
    answer = model.eval().generate_answers(
        batch["pixel_values"], batch["resized_sizes"], [prompt], torch.tensor([0]), built.processor.end_token_id, 3
    )[0]
    assert 1 <= len(answer.ids) <= 3


@pytest.mark.parametrize("recipe", [TrainingRecipe(lora_dropout=0), TrainingRecipe(train_vision_tower=True, lora_r=0)])
def test_gradient_checkpointing_changes_nothing_but_memory(recipe: TrainingRecipe) -> None:
    def run(checkpointing: bool) -> tuple[dict[str, float], dict[str, torch.Tensor], int]:
        built = make_model()
        model = built.model
        choose_trainable(model, recipe)
        torch.manual_seed(0)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        calls = []
        layers = [model.language_model.get_decoder().layers[0].mlp, model.vision_tower.model.encoder.layers[0].mlp]
        for layer in layers:
            layer.register_forward_pre_hook(lambda module, _: calls.append(module))
        losses = model.train()(**batch_for(built.processor)).losses
        total_loss(model, losses).backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        return {name: term.sum.item() for name, term in losses.items()}, gradients, len(calls)

    losses, gradients, calls = run(checkpointing=False)
    same_losses, same_gradients, more_calls = run(checkpointing=True)
    again = 2 if recipe.train_vision_tower else 1  # a frozen tower runs without gradient
    assert more_calls == calls + again == 2 + again, "layers are computed again on the way back"
    assert same_losses == pytest.approx(losses, rel=1e-6)
    assert gradients.keys() == same_gradients.keys()
    difference = sum((same_gradients[name] - gradient).norm() ** 2 for name, gradient in gradients.items()) ** 0.5
    assert difference <= 1e-5 * sum(gradient.norm() ** 2 for gradient in gradients.values()) ** 0.5
