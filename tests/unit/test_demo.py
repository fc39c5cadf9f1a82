"""The demo: its stages under both engines, the keys of its summary, its exit status, and DeepSpeed lacking."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from demo import __main__ as script
from demo.__main__ import SIZES, THRESHOLDS, Demo
from demo.scenes import HELD_OUT_SPEC, SceneDataSettings, write_scene_data
from demo.stages import Stage, Stages
from utils.data.readers.registry import build_eval_reader
from utils.evaluation.thresholds import Threshold

KINDS = ("direct", "several", "reasoning", "no_target")
KEYS = {
    *("giou", "ciou", "giou_teacher_forced", "giou_by_kind", "giou_shuffled", "target_count_accuracy", "text_accuracy"),
    *("n", "baselines", "engine", "model", "dataset_dir", "val_dataset", "seconds"),
}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo")
    write_scene_data(out / "dataset", SceneDataSettings(train=20, heldout=50, questions=100))
    return out


def make_demo(out: Path, engine: str = "deepspeed", size: str = "smoke") -> Demo:
    return Demo(out, engine, SIZES[size], {})


def scores(value: float) -> dict[str, Any]:
    names = ("giou", "ciou", "giou_teacher_forced", "target_count_accuracy", "text_accuracy")
    by_kind = dict.fromkeys(KINDS, value)
    return dict.fromkeys(names, value) | {"giou_by_kind": by_kind, "giou_shuffled": 0.2, "n": 1000, "left_out": {}}


@pytest.mark.parametrize("engine", ["deepspeed", "plain"])
def test_the_plan_names_scripts_that_are_there_and_counts_its_stages(
    drawn: Path, repository: Path, engine: str
) -> None:
    demo = make_demo(drawn, engine)
    stages = list(demo.stages())
    names = [stage.name if isinstance(stage, Stage) else stage for stage in stages]
    expected = ["data", "check", "base", "train", "zero_to_fp32", "merge", "evaluate", "chat"]
    assert names == [name for name in expected if engine == "deepspeed" or name != "zero_to_fp32"]
    assert len(names) == demo.count()
    for stage in stages:
        if isinstance(stage, Stage):
            modules = [f"{word.replace('.', '/')}.py" for word in stage.command if word.startswith("demo.")]
            scripts = [word for word in stage.command if word.endswith(".py") and word != "zero_to_fp32.py"]
            assert all((repository / name).is_file() for name in (*scripts, *modules)), (scripts, modules)
    (train,) = (stage for stage in stages if isinstance(stage, Stage) and stage.name == "train")
    assert ("--num_gpus" in train.command) == (engine == "deepspeed")
    # Images per step and threads are the same: 2 ranks x 1 round x 1 thread, or 1 process x 2 rounds x 2 threads.
    assert ("--grad_accumulation_steps" in train.command) == (engine == "plain")
    assert train.env["OMP_NUM_THREADS"] == ("1" if engine == "deepspeed" else "2")


def test_it_talks_about_several_things_that_can_be_told_apart(drawn: Path) -> None:
    image, (first, *rest) = make_demo(drawn).choose_questions()
    turns = {
        turn.question: turn
        for sample in build_eval_reader(HELD_OUT_SPEC, drawn / "dataset")
        for (turn,) in sample.conversations
        if sample.image_path == image
    }
    assert rest and {turns[question].kind for question in rest} <= {"reasoning", "direct"}
    names = [target.name for target in turns[first].targets]
    assert turns[first].kind == "several" and 2 <= len(set(names)) == len(names)


def test_the_summary_has_its_keys(drawn: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    demo = make_demo(drawn)

    def pretend(stages: Stages, stage: Stage) -> None:
        with stages.timed(stage.name, stage.title):
            if stage.name == "evaluate":
                demo.evaluation.mkdir()
                (demo.evaluation / "results.json").write_text(json.dumps(scores(0.5)))
                (demo.evaluation / "gallery.png").write_bytes(b"drawn")

    monkeypatch.setattr(Stages, "run", pretend)
    summary = demo.run()
    assert set(summary) == KEYS
    assert set(summary["giou_by_kind"]) == set(KINDS)
    assert summary["val_dataset"] == HELD_OUT_SPEC and summary["engine"] == "deepspeed"
    assert Path(summary["dataset_dir"]) == drawn / "dataset" and Path(summary["model"]) == drawn / "model"
    assert {"mask everything", "largest shape"} <= set(summary["baselines"])
    stages = {"data", "check", "base", "train", "zero_to_fp32", "merge", "evaluate", "chat"}
    assert set(summary["seconds"]) == stages | {"total"}


@pytest.mark.parametrize(("size", "value", "status"), [("full", 0.96, 0), ("full", 0.7799, 1), ("smoke", 0.0, 0)])
def test_only_the_full_demo_must_reach_its_thresholds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], size: str, value: float, status: int
) -> None:
    summary = scores(value) | {"baselines": {"mask everything": 0.1, "largest shape": 0.3}, "seconds": {"total": 800}}
    assert make_demo(tmp_path, size=size).report(summary, SIZES[size].with_thresholds) == status
    said = capsys.readouterr()
    assert ("missed: giou is 0.7799, not >= 0.7800" in said.err) == (status == 1)
    assert "giou_by_kind.several" in said.out and f"{value:.3f}" in said.out


def test_every_threshold_of_the_full_demo_can_fail_it(tmp_path: Path) -> None:
    good = scores(0.96) | {"baselines": {"mask everything": 0.1, "largest shape": 0.3}, "seconds": {"total": 800}}
    demo = make_demo(tmp_path, size="full")
    for threshold in (item for item in THRESHOLDS if isinstance(item, Threshold)):
        bad = json.loads(json.dumps(good))
        *path, last = threshold.path.split(".")
        place = bad
        for name in path:
            place = place[name]
        place[last] = threshold.value + (-0.001 if threshold.relation == ">=" else 0.001)
        assert demo.report(bad) == 1, threshold


def test_a_failing_stage_ends_the_demo_with_its_status_and_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def broken(demo: Demo) -> Any:
        yield Stage("data", "breaks", [sys.executable, "-c", "import sys; sys.exit('no pencil')"], tmp_path)

    monkeypatch.setattr(Demo, "stages", broken)
    assert script.main(["--size", "smoke", "--out", str(tmp_path / "demo")]) == 1
    said = capfd.readouterr().err
    assert "no pencil" in said and "To repeat it:\n  cd " in said
    assert not (tmp_path / "demo" / "summary.json").exists()


def test_without_a_compiler_the_plain_engine_is_used_and_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert script.choose_engine() == "plain"
    (line,) = capsys.readouterr().out.splitlines()
    assert "g++" in line and "plain engine" in line


def test_clearing_removes_only_what_a_demo_wrote(tmp_path: Path) -> None:
    for name in ("dataset/a.png", "model/config.json", "notes.txt", "answer.png", "summary.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    make_demo(tmp_path).clear()
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
