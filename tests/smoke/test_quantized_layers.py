"""Training on a language model in 4 or 8 bits: what trains, what a checkpoint holds, going on, merging."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import merge_lora_weights_and_save_hf_model as merge
import train_ds
from tests.smoke.conftest import Trainer, training_flags
from tests.unit.tiny_bases import options, write_language_model, write_tower
from utils.checkpoints.builder import build_model, save_model
from utils.cli.commands import parse_train
from utils.cli.errors import run_script
from utils.engine.sample_log import read_losses

needs_library = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
LAYERS = "language_model.model.layers."


@pytest.fixture(scope="module")
def wide_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose layers are as wide as the blocks that weights are held in."""
    place = tmp_path_factory.mktemp("wide")
    wide = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 32, "initializer_range": 0.1}
    base, tower = write_language_model(place / "base", "llama", **wide), write_tower(place / "tower", "siglip")
    built = build_model(str(base), str(tower), options())
    save_model(built.model, built.processor, place / "model")
    return place / "model"


@pytest.mark.parametrize(
    ("flags", "other"),
    [
        (["--train_language_model"], "--train_language_model"),
        (["--weight=x.bin"], "--weight"),
        (["--zero_stage=3"], "--zero_stage 3"),
    ],
)
def test_what_does_not_go_with_few_bits_is_refused(flags: list[str], other: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        parse_train(["--version=x", "--load_in_4bit", *flags])
    assert f"bit and {other} do not go together" in capsys.readouterr().err


@needs_library
@pytest.mark.parametrize("bits", [4, 8])
def test_a_run_in_few_bits_goes_on_and_is_merged(bits: int, wide_base: Path, smoke_data: Path, tmp_path: Path) -> None:
    flags = [*training_flags(wide_base, smoke_data, tmp_path, "straight"), "--grad_accumulation_steps=1", "--no_eval"]
    flags += [f"--load_in_{bits}bit", "--save_every=2", "--engine=plain"]
    assert run_script(train_ds.main, flags) == 0
    broken = [*flags, "--exp_name=broken"]
    assert run_script(train_ds.main, [*broken, f"--resume={tmp_path / 'straight' / 'ckpt_model' / 'step2'}"]) == 0
    assert read_losses(tmp_path / "broken") == {step: read_losses(tmp_path / "straight")[step] for step in (3, 4)}
    kept, again = (
        torch.load(tmp_path / name / "ckpt_model" / "step4" / "pytorch_model.bin") for name in ("straight", "broken")
    )
    assert all(torch.equal(value, again[name]) for name, value in kept.items())
    assert not [name for name in kept if name.startswith(LAYERS) and "lora" not in name and "norm" not in name]
    merged = ["--weight", str(tmp_path / "straight" / "ckpt_model"), "--save_path", str(tmp_path / "model")]
    assert run_script(merge.main, [f"--version={wide_base}", "--precision=fp32", *merged]) == 0
    before, after = (build_model(str(folder)).model.state_dict() for folder in (wide_base, tmp_path / "model"))
    low, high = (kept[f"{LAYERS}0.self_attn.q_proj.lora_{side}.default.weight"] for side in "AB")
    name = f"{LAYERS}0.self_attn.q_proj.weight"
    torch.testing.assert_close(after[name], before[name] + 16 / 8 * high @ low)
    assert torch.equal(after[f"{LAYERS}0.mlp.up_proj.weight"], before[f"{LAYERS}0.mlp.up_proj.weight"])
    name = "codebook.token_weights"
    assert torch.equal(after[name], kept[name]) and not torch.equal(after[name], before[name])


@needs_library
@pytest.mark.long
@pytest.mark.parametrize("bits", [4, 8])
def test_few_bits_under_deepspeed(bits: int, wide_base: Path, trainer: Trainer) -> None:
    """The losses of the plain engine, and from stage 2 on two ranks on to stage 0 on one."""
    flags = (f"--version={wide_base}", f"--load_in_{bits}bit", "--save_every=2", "--lr_schedule=constant")
    assert trainer.run(f"plain {bits}", *flags).statuses == [0], trainer.said
    wanted = read_losses(trainer.out / f"plain {bits}")
    outcome = trainer.run(f"ranks {bits}", *flags, "--engine=deepspeed", ranks=2)
    assert outcome.statuses == [0, 0], trainer.said
    assert read_losses(trainer.out / f"ranks {bits}") == pytest.approx(wanted, rel=1e-3)
    half_way = trainer.out / f"ranks {bits}" / "ckpt_model" / "step2"
    on = trainer.run(f"alone {bits}", *flags, "--engine=deepspeed", "--zero_stage=0", f"--resume={half_way}")
    assert on.statuses == [0], trainer.said
    assert read_losses(trainer.out / f"alone {bits}") == pytest.approx({s: wanted[s] for s in (3, 4)}, rel=1e-3)
