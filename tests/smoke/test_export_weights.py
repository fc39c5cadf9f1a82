"""Every form that trained weights are left in, every way they can be wrong, and disks that are full."""

import errno
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

import merge_lora_weights_and_save_hf_model as merge
from model.predictor import Predictor
from tests.unit.tiny_pixellm import make_model
from utils.checkpoints import export
from utils.checkpoints.builder import BuildError, TrainingRecipe, choose_trainable
from utils.checkpoints.export import export_model, find_lora, load_and_merge, read_trained_weights
from utils.cli.errors import run_script
from utils.cli.run_card import write_run_card

Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def weights() -> Weights:
    """The state dict of a tiny model with LoRA of rank 4, no number of which is 0 by construction."""
    model = make_model(seed=1).model
    choose_trainable(model, TrainingRecipe(lora_r=4))
    torch.manual_seed(0)
    return {name: value + 0.01 * torch.randn_like(value) for name, value in model.state_dict().items()}


def shard(weights: Weights, folder: Path, form: str) -> None:
    """Two files and their index, named as DeepSpeed or transformers names them."""
    names = sorted(weights)
    stem, suffix = form.split(".")
    parts = {f"{stem}-00001-of-00002.{suffix}": names[::2], f"{stem}-00002-of-00002.{suffix}": names[1::2]}
    for file, members in parts.items():
        part = {name: weights[name].contiguous() for name in members}
        if suffix == "safetensors":
            save_file(part, folder / file)
        else:
            torch.save(part, folder / file)
    index = {"weight_map": {name: file for file, members in parts.items() for name in members}}
    (folder / f"{form}.index.json").write_text(json.dumps(index))


def leave(weights: Weights, place: Path, form: str) -> Path:
    """Leave weights under `place` in one of the forms below; returns what --weight is then given."""
    if form == "file":
        torch.save(weights, place / "x.bin")
        return place / "x.bin"
    if form == "safetensors":
        save_file({name: value.contiguous() for name, value in weights.items()}, place / "x.safetensors")
        return place / "x.safetensors"
    folder = place / "pytorch_model.bin"
    folder.mkdir()
    if form == "folder":
        torch.save(weights, folder / "pytorch_model.bin")
    elif form == "plain checkpoint":
        (folder / "step4").mkdir()
        torch.save(weights, folder / "step4" / "pytorch_model.bin")
        (folder / "latest").write_text("step4")
    else:
        shard(weights, folder, form)
    return folder


@pytest.mark.parametrize(
    "form", ["file", "safetensors", "folder", "plain checkpoint", "pytorch_model.bin", "model.safetensors"]
)
def test_weights_are_read_in_every_form(weights: Weights, tmp_path: Path, form: str) -> None:
    found = read_trained_weights(leave(weights, tmp_path, form))
    assert set(found) == set(weights)
    assert all(torch.equal(found[name], weights[name]) for name in weights)


def test_lora_is_read_off_the_weights(weights: Weights) -> None:
    assert find_lora(weights, "x") == (4, "q_proj,v_proj")
    assert find_lora({"a.weight": torch.zeros(1)}, "x") is None
    uneven = {"a.q_proj.lora_A.default.weight": torch.zeros(2, 3), "a.v_proj.lora_A.default.weight": torch.zeros(4, 3)}
    with pytest.raises(BuildError, match="several ranks"):
        find_lora(uneven, "x")


class Surprise:
    """Something that unpickling would run."""

    def __reduce__(self) -> Any:
        return (print, ("run",))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda place: place / "nothing", "does not exist"),
        (lambda place: place, "holds no weights"),
        (lambda place: _bytes(place / "x.bin", b"not a file of weights"), "not a whole file of weights"),
        (lambda place: _bytes(place / "x.safetensors", b"cut"), "not a whole file of weights"),
        (lambda place: _pickled(place / "x.bin", {"a": Surprise()}), "not a whole file of weights"),
        (lambda place: _pickled(place / "x.bin", [torch.zeros(1)]), "does not hold tensors by name"),
        (lambda place: _pickled(place / "x.bin", {"a": 1}), "does not hold tensors by name"),
        (lambda place: _bytes(place / "model.safetensors.index.json", b"{}").parent, "not an index of weights"),
        (lambda place: _index(place, "gone.bin"), "not beside it"),
        (lambda place: _index(place, "../x.bin"), "not beside it"),
        (lambda place: _checkpoint(place), "run `cd .*zero_to_fp32.py"),
    ],
)
def test_what_holds_no_weights_is_refused(make: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=said) as error:
        read_trained_weights(make(tmp_path))
    assert "\n" not in str(error.value)


def _bytes(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def _pickled(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


def _index(place: Path, shard_name: str) -> Path:
    (place / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"a": shard_name}}))
    return place


def _checkpoint(place: Path) -> Path:
    (place / "step2").mkdir()
    (place / "step2" / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt").touch()
    (place / "latest").write_text("step2\n")
    return place


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda weights: weights.pop("codebook.token_weights"), "'codebook.token_weights' is missing"),
        (lambda weights: weights.update({"sam.weight": torch.zeros(1)}), "'sam.weight' is not part of this model"),
        (
            lambda weights: weights.update({"codebook.token_weights": torch.zeros(2, 1)}),
            r"found \[2, 1\], expected \[2, 3\]",
        ),
    ],
)
def test_weights_that_do_not_fit_are_named(weights: Weights, change: Any, said: str) -> None:
    changed = dict(weights)
    change(changed)
    with pytest.raises(BuildError, match=said):
        load_and_merge(make_model(), changed, "the checkpoint", lora_alpha=16)


def base_folder(place: Path) -> Path:
    export_model(make_model(), place / "base")
    return place / "base"


def test_merging_reads_the_run_card(weights: Weights, tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = {"version": str(base_folder(tmp_path)), "lora_r": 4, "lora_alpha": 2, "precision": "fp32"}
    write_run_card(run, arguments=arguments, facts={})
    weight = leave(weights, run, "folder")
    assert merge.main([f"--weight={weight}", f"--save_path={tmp_path / 'merged'}"]) == 0
    loaded = Predictor.from_pretrained(tmp_path / "merged", device="cpu").model
    name = "language_model.model.layers.1.self_attn.v_proj"
    low, high = (weights[f"{name}.lora_{part}.default.weight"] for part in "AB")
    expected = weights[f"{name}.base_layer.weight"] + 2 / 4 * high @ low
    torch.testing.assert_close(loaded.state_dict()[f"{name}.weight"], expected, atol=1e-6, rtol=0)


def test_flags_win_over_the_run_card_and_a_missing_card_is_said(
    weights: Weights, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    weight = leave(weights, tmp_path, "file")
    flags = [f"--version={base_folder(tmp_path)}", f"--weight={weight}", f"--save_path={tmp_path / 'merged'}"]
    assert merge.main([*flags, "--precision=fp16", "--max_shard_size=100KB"]) == 0
    assert "no run.json near" in capsys.readouterr().err
    assert len(list((tmp_path / "merged").glob("model-*.safetensors"))) > 1
    assert Predictor.from_pretrained(tmp_path / "merged", device="cpu").model.dtype == torch.float16
    # A second export replaces the shards of the first.
    assert merge.main([*flags, "--precision=fp32"]) == 0
    assert [path.name for path in (tmp_path / "merged").glob("*.safetensors*")] == ["model.safetensors"]
    assert Predictor.from_pretrained(tmp_path / "merged", device="cpu").model.dtype == torch.float32


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--weight={weight}"], "--save_path missing"),
        (["--weight={weight}", "--save_path={place}/out"], "no run card near --weight names the base"),
        (["--weight={weight}", "--save_path={place}/out", "--version={place}/gone"], "not a folder on this machine"),
        (["--weight={weight}", "--save_path={place}/out", "--version={base}", "--lora_r=16"], "LoRA of rank 4"),
        (["--weight={weight}", "--save_path={weight}", "--version={base}"], "is a file"),
        (
            ["--weight={weight}", "--save_path={place}/out", "--version={base}", "--max_shard_size=big"],
            "--max_shard_size",
        ),
        (["--weight={weight}", "--save_path={place}/out", "--version={base}", "--seg_token_num=1"], "another shape"),
    ],
)
def test_bad_merges_get_one_sentence(
    weights: Weights, tmp_path: Path, capsys: pytest.CaptureFixture, flags: list[str], said: str
) -> None:
    weight, base = leave(weights, tmp_path, "file"), base_folder(tmp_path)
    capsys.readouterr()
    try:
        status = run_script(merge.main, [flag.format(weight=weight, base=base, place=tmp_path) for flag in flags])
    except SystemExit as stop:
        status = stop.code
    assert status == 2
    assert said in capsys.readouterr().err.strip().splitlines()[-1]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("I/O error: No space left (os error 28)")],
)
def test_a_full_disk_is_one_sentence_and_leaves_nothing(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(export, "save_model", fail)
    with pytest.raises(BuildError, match="no space left to write the model"):
        export_model(make_model(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_earlier_export_survives_a_failed_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = base_folder(tmp_path)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def fail(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(export, "save_model", fail)
    with pytest.raises(BuildError):
        export_model(make_model(seed=2), folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
