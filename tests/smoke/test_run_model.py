"""A run's folder says what was trained: merging needs no flag and no base, and runs of before merge as they did."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import merge_lora_weights_and_save_hf_model as merge
import train_ds
from model.predictor import Predictor
from tests.smoke.conftest import training_flags
from tests.unit.tiny_pixellm import make_model
from utils.checkpoints.builder import BuildError, TrainingRecipe, build_model, choose_trainable, save_model
from utils.checkpoints.export import export_model
from utils.checkpoints.run_model import ADAPTER_SETTINGS, MODEL_FOLDER, RunModel, save_run_model
from utils.cli.errors import run_script

Weights = dict[str, torch.Tensor]
RECIPE = TrainingRecipe(lora_r=2, lora_alpha=6)
LAYER = "language_model.model.layers.1.self_attn.v_proj"
IN_BASE = "language_model.model.layers."


def random_weights(shapes: dict[str, list[int]]) -> Weights:
    torch.manual_seed(0)
    return {name: 0.1 * torch.randn(shape) for name, shape in shapes.items()}


def merged_weight(weights: Weights) -> torch.Tensor:
    low, high = (weights[f"{LAYER}.lora_{part}.default.weight"] for part in "AB")
    return weights[f"{LAYER}.base_layer.weight"] + 6 / 2 * high @ low


@pytest.fixture
def trained(tmp_path: Path) -> Weights:
    """A base in `base`, a run of RECIPE on it in `run`, its checkpoint in run/pytorch_model.bin."""
    built = make_model(seed=1)
    save_model(built.model, built.processor, tmp_path / "base")
    choose_trainable(built.model, RECIPE)
    weights = random_weights({name: list(value.shape) for name, value in built.model.state_dict().items()})
    save_run_model(tmp_path / "run", built, RECIPE, None, str(tmp_path / "base"))
    torch.save(weights, tmp_path / "run" / "pytorch_model.bin")
    return weights


def run_merge(place: Path, *flags: str, weight: str = "run/pytorch_model.bin") -> int:
    return run_script(
        merge.main, [f"--weight={place / weight}", f"--save_path={place / 'merged'}", "--precision=fp32", *flags]
    )


def test_a_run_is_merged_after_its_base_has_moved(smoke_base: Path, smoke_data: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(smoke_base, base)
    flags = [*training_flags(base, smoke_data, tmp_path, "run"), "--max_steps=1", "--no_eval", "--engine=plain"]
    flags += ["--lora_r=4", "--lora_alpha=12", "--seg_token_num=3", "--model_max_length=200"]
    assert run_script(train_ds.main, flags) == 0
    base.rename(tmp_path / "elsewhere")
    assert {path.name for path in (tmp_path / "run" / MODEL_FOLDER).iterdir()} >= {
        *("config.json", "processor_config.json", "tokenizer.json", ADAPTER_SETTINGS)
    }
    assert run_script(merge.main, [f"--weight={tmp_path}/run/ckpt_model", f"--save_path={tmp_path}/merged"]) == 0
    built = build_model(str(tmp_path / "merged"))
    assert built.processor.model_max_length == 200
    kept = torch.load(tmp_path / "run" / "ckpt_model" / "step1" / "pytorch_model.bin", weights_only=True)
    low, high = (kept[f"{LAYER}.lora_{part}.default.weight"] for part in "AB")
    expected = kept[f"{LAYER}.base_layer.weight"] + 12 / 4 * high @ low
    torch.testing.assert_close(built.model.state_dict()[f"{LAYER}.weight"], expected, atol=1e-6, rtol=0)


def test_flags_that_say_what_the_run_says_do_no_harm(
    trained: Weights, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    shutil.rmtree(tmp_path / "base")
    flags = ["--version=gone", "--vision-tower=gone", "--lora_r=2", "--lora_alpha=6", "--seg_token_num=3"]
    assert run_merge(tmp_path, *flags) == 0
    assert "--version, --vision_tower: no effect" in capsys.readouterr().err
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    torch.testing.assert_close(merged[f"{LAYER}.weight"], merged_weight(trained))


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("--lora_r=4", "holds LoRA of rank 2: leave it out"),
        ("--lora_alpha=4", "training had 6: leave it out"),
        ("--seg_token_num=2", "another shape"),
    ],
)
def test_flags_that_contradict_the_run_are_refused(
    flag: str, said: str, trained: Weights, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert run_merge(tmp_path, flag) == 2
    assert said in capsys.readouterr().err.strip().splitlines()[-1]


def test_layers_that_were_quantised_come_from_the_base(
    trained: Weights, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    base, run = tmp_path / "base", tmp_path / "run"
    save_run_model(run, make_model(), RECIPE, 4, str(base))
    kept = {n: v for n, v in trained.items() if not n.startswith(IN_BASE) or "lora" in n or "norm" in n}
    torch.save(kept, run / "pytorch_model.bin")
    frozen = load_file(base / "model.safetensors")
    assert run_merge(tmp_path) == 0
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert torch.equal(merged[f"{IN_BASE}0.mlp.up_proj.weight"], frozen[f"{IN_BASE}0.mlp.up_proj.weight"])
    whole = {**trained, f"{LAYER}.base_layer.weight": frozen[f"{LAYER}.weight"]}
    torch.testing.assert_close(merged[f"{LAYER}.weight"], merged_weight(whole))
    assert torch.equal(merged["codebook.token_weights"], trained["codebook.token_weights"])

    base.rename(tmp_path / "elsewhere")
    capsys.readouterr()
    assert run_merge(tmp_path) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "4 bits" in said and str(base) in said and said.endswith("where the base is now with --version")
    assert run_merge(tmp_path, f"--version={tmp_path / 'elsewhere'}") == 0


def test_a_record_that_is_broken_is_one_sentence(trained: Weights, tmp_path: Path) -> None:
    (tmp_path / "run" / MODEL_FOLDER / ADAPTER_SETTINGS).write_text('{"recipe": 3')
    with pytest.raises(BuildError, match="is not what training wrote"):
        RunModel.find(tmp_path / "run" / "pytorch_model.bin")


# --- what was saved before runs had such a record --------------------------------------------------------------------


@pytest.fixture
def saved_before(repository: Path, tmp_path: Path) -> Path:
    """A model folder and a run on it as they were written then, with random weights."""
    shutil.copytree(repository / "tests" / "fixtures" / "saved_before", tmp_path / "before")
    shapes = json.loads((tmp_path / "before" / "shapes.json").read_text())
    save_file(random_weights(shapes["model"]), tmp_path / "before" / "model" / "model.safetensors")
    lora = [name.removesuffix(".base_layer.weight") for name in shapes["trained"] if ".base_layer." in name]
    both = {name: shape for name, shape in shapes["model"].items() if name.removesuffix(".weight") not in lora}
    torch.save(random_weights(both | shapes["trained"]), tmp_path / "before" / "pytorch_model.bin")
    return tmp_path / "before"


def test_a_run_of_before_is_merged(saved_before: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(saved_before)  # its card names the base from there
    assert run_merge(tmp_path, weight="before/pytorch_model.bin") == 0
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    weights = torch.load(saved_before / "pytorch_model.bin", weights_only=True)
    torch.testing.assert_close(merged[f"{LAYER}.weight"], merged_weight(weights))


def test_a_model_of_before_is_trained_on_and_exported(saved_before: Path, smoke_data: Path, tmp_path: Path) -> None:
    model = saved_before / "model"
    flags = [*training_flags(model, smoke_data, tmp_path, "run"), "--max_steps=1", "--no_eval", "--engine=plain"]
    assert run_script(train_ds.main, flags) == 0
    assert run_merge(tmp_path, weight="run/ckpt_model") == 0
    built = build_model(str(model))
    export_model(built, tmp_path / "again")
    before, after = load_file(model / "model.safetensors"), load_file(tmp_path / "again" / "model.safetensors")
    assert all(torch.equal(after[name], value) for name, value in before.items()) and set(before) == set(after)
    assert Predictor.from_pretrained(tmp_path / "again", device="cpu").model.config.num_scales == 2
