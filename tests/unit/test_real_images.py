"""Learning real images by heart: where they are looked for, its stages, the enlarged base, its exit status."""

import json
from pathlib import Path
from typing import Any

import pytest

from demo import real_images as script
from demo.real_images import THRESHOLDS, RealImages, find_dataset
from demo.stages import Stage, Stages
from demo.tiny import TinyShape, make_tiny
from utils.checkpoints.builder import MASK_PARTS, ModelOptions, build_model, save_model
from utils.cli.commands import parse_train
from utils.cli.config import model_options
from utils.cli.errors import UserError, run_script
from utils.data.files import REAL_DATA
from utils.evaluation.thresholds import Threshold

CONFIG = "configs/runs/real_images.yaml"
SCORES = ("giou", "ciou", "giou_teacher_forced", "giou_shuffled", "target_count_accuracy", "text_accuracy")


def make_plan(out: Path, engine: str = "deepspeed", version: Path | None = None) -> RealImages:
    return RealImages(out, engine, out / "data", version=version)


@pytest.mark.parametrize(
    ("named", "part"), [(None, "is not set"), ("", "is not set"), ("/nowhere", "/nowhere/dataset")]
)
def test_no_real_images_get_one_sentence(
    named: str | None, part: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv(REAL_DATA, raising=False)
    if named is not None:
        monkeypatch.setenv(REAL_DATA, named)
    assert run_script(script.main, []) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert REAL_DATA in line and part in line
    with pytest.raises(UserError):
        find_dataset(named)


@pytest.mark.parametrize("engine", ["deepspeed", "plain"])
@pytest.mark.parametrize("version", [None, Path("/a/base")])
def test_the_plan_names_scripts_that_are_there(
    tmp_path: Path, repository: Path, engine: str, version: Path | None
) -> None:
    plan = make_plan(tmp_path, engine, version)
    stages = list(plan.stages())
    assert len(stages) == plan.count() and ("base" in stages) == (version is None)
    commands = {stage.name: stage for stage in stages if isinstance(stage, Stage)}
    assert list(commands) == [
        name for name in ("train", "zero_to_fp32", "merge", "evaluate") if engine == "deepspeed" or "zero" not in name
    ]
    for stage in commands.values():
        files = [word for word in stage.command if word.endswith((".py", ".yaml")) and word != "zero_to_fp32.py"]
        assert all((repository / name).is_file() for name in files), files
    train = commands["train"]
    assert str(version or tmp_path / "base") in train.command and str(tmp_path / "data") in train.command
    # Images per step and threads are the same: 2 ranks x 1 round x 1 thread, or 1 process x 2 rounds x 2 threads.
    assert ("--grad_accumulation_steps" in train.command) == (engine == "plain")
    assert train.env["OMP_NUM_THREADS"] == ("1" if engine == "deepspeed" else "2")


def test_the_config_enlarges_a_tiny_base(tmp_path: Path, repository: Path) -> None:
    built = make_tiny(["the person on the left"], TinyShape(), 0)
    save_model(built.model, built.processor, tmp_path, left_out=MASK_PARTS)
    config = parse_train(["--config", str(repository / CONFIG), "--version", str(tmp_path)])
    large = build_model(str(tmp_path), None, ModelOptions(**model_options(config.model)))
    assert large.processor.num_image_tokens == large.model.config.num_image_tokens == 7 * 7
    assert large.processor.image_size == large.model.config.image_size == large.model.config.vision_config.image_size
    assert large.model.config.image_size == 224 and large.model.config.grid_size == 14
    table = large.model.vision_tower.model.embeddings.position_embedding.weight
    own = built.model.vision_tower.model.embeddings.position_embedding.weight
    assert table.shape == (1 + 14 * 14, own.shape[1])
    # A patch of the small grid lies between four of the large one, which average to about what it was.
    between = table[1:].unflatten(0, (7, 2, 7, 2)).mean(dim=(1, 3)).flatten(0, 1)
    assert (between - own[1:]).norm() < 0.1 * own[1:].norm()
    assert {name.split(".")[0] for name in large.report.newly_initialized} == set(MASK_PARTS)


def test_several_kinds_of_data_are_mixed_and_sentences_dominate(repository: Path) -> None:
    config = parse_train(["--config", str(repository / CONFIG), "--version", "base"])
    rates = dict(config.data.families())
    assert set(rates) == {"refer_seg", "sem_seg", "vqa", "multi_reason_seg", "reason_seg"} and min(rates.values()) > 0
    assert rates["refer_seg"] > sum(rates.values()) / 2


def summary_of(value: float, shuffled: float = 0.2, seconds: float = 500) -> dict[str, Any]:
    return dict.fromkeys(SCORES, value) | {"giou_shuffled": shuffled, "n": 13, "seconds": {"total": seconds}}


@pytest.mark.parametrize(
    ("summary", "missed"),
    [
        (summary_of(0.75), None),
        (summary_of(0.6999), "giou is 0.6999"),
        (summary_of(0.75, shuffled=0.41), "giou_shuffled is 0.4100"),
        (summary_of(0.75, seconds=901), "seconds.total is 901"),
        (summary_of(float("nan")), "giou is nan"),
    ],
)
def test_every_missed_threshold_fails_it(
    summary: dict[str, Any], missed: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert [item.path for item in THRESHOLDS if isinstance(item, Threshold)] == [
        "giou",
        "giou_shuffled",
        "seconds.total",
    ]
    assert make_plan(tmp_path).report(summary) == (missed is not None)
    said = capsys.readouterr()
    assert "giou_teacher_forced" in said.out and (missed or "") in said.err and bool(said.err) == bool(missed)


def test_the_summary_says_what_was_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = make_plan(tmp_path)

    def pretend(stages: Stages, stage: Stage) -> None:
        with stages.timed(stage.name, stage.title):
            if stage.name == "evaluate":
                plan.evaluation.mkdir()
                scores = summary_of(0.8) | {"giou_by_kind": {"direct": 0.8}}
                (plan.evaluation / "results.json").write_text(json.dumps(scores))
                (plan.evaluation / "gallery.png").write_bytes(b"drawn")

    monkeypatch.setattr(Stages, "run", pretend)
    summary = plan.run()
    assert summary["base"] == "random weights" and (plan.base / "config.json").is_file()
    assert summary["giou"] == 0.8 and set(summary["seconds"]) == {
        *("base", "train", "zero_to_fp32", "merge", "evaluate", "total")
    }
    assert (tmp_path / "gallery.png").is_file()
    (tmp_path / "notes.txt").write_text("mine")
    plan.clear()
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
