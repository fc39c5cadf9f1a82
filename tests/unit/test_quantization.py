"""Weights in 8 and 4 bits: only the language model's, close to the whole ones; a clear word where they cannot."""

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from model.predictor import ModelFolderError, Predictor
from model.quantization import quantization_config
from tests.unit.tiny_bases import options, write_language_model, write_tower
from tests.unit.tiny_pixellm import noise
from utils.checkpoints.builder import BuiltModel, build_model, save_model

needs_library = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose layers are as wide as the blocks that weights are held in."""
    place = tmp_path_factory.mktemp("low_bits")
    wide = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 32, "initializer_range": 0.1}
    base, tower = write_language_model(place / "base", "llama", **wide), write_tower(place / "tower", "siglip")
    built: BuiltModel = build_model(str(base), str(tower), options())
    save_model(built.model, built.processor, place / "model")
    return place / "model"


@pytest.mark.parametrize("bits", [8, 4])
def test_without_the_library_it_is_said(bits: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ModelFolderError, match=f"weights in {bits} bits need the package bitsandbytes.*pip install"):
        Predictor.from_pretrained(folder, "cpu", bits=bits)


def test_other_numbers_of_bits_are_refused() -> None:
    with pytest.raises(ValueError, match="8 or 4 bits, found 3"):
        quantization_config(3, None)


@needs_library
@pytest.mark.parametrize(("bits", "off"), [(8, 0.03), (4, 0.25)])
def test_masks_are_close_to_those_of_whole_weights(bits: int, off: float, folder: Path) -> None:
    """A weight is off by up to 1 / 254 of its row's largest in 8 bits, by some 1 / 10 of its block's in 4."""
    asked: tuple[Any, ...] = ([noise(20, 30)], [[("Where?", "a {seg} and b {seg}")]], [0])
    whole = Predictor.from_pretrained(folder, "cpu", torch.float32)
    held = Predictor.from_pretrained(folder, "cpu", torch.float32, bits=bits)
    kinds = {name: type(module).__name__ for name, module in held.model.named_modules()}
    low = {name for name, kind in kinds.items() if kind in ("Linear8bitLt", "Linear4bit")}
    assert len(low) == 2 * 7 and all(name.startswith("language_model.model.layers") for name in low)
    logits = [logits_of(one, asked) for one in (whole, held)]
    scale = float(logits[0].abs().max())
    assert 0 < float((logits[0] - logits[1]).abs().max()) < off * scale
    held.set_image(noise(20, 30))
    assert held.ask("Where?", 4).text == "".join(held.ask_many(["Where?"], 4)[0].text)


def logits_of(predictor: Predictor, asked: tuple[Any, ...]) -> torch.Tensor:
    """(Q, H, W) of answers that are given."""
    kept: list[torch.Tensor] = []
    compose = predictor._compose

    def keep(turns: Any, logits: torch.Tensor) -> Any:
        kept.append(logits)
        return compose(turns, logits)

    predictor._compose = keep  # type: ignore[method-assign]
    predictor.segment(*asked)
    return kept[0]
