"""evaluate.py over drawn scenes and a tiny model: what it writes, prints and refuses."""

import contextlib
import io
import json
from pathlib import Path

import pytest
from PIL import Image

import evaluate
import train_ds
from demo.scenes import HELD_OUT_SPEC, SceneSettings, write_scene_data
from demo.scenes.planning import SceneDataSettings
from tests.unit.tiny_pixellm import make_model
from utils.checkpoints.builder import save_model
from utils.cli.errors import run_script

QUESTIONS = 20


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluate") / "model"
    built = make_model()
    save_model(built.model, built.processor, folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("evaluate") / "data"
    with contextlib.redirect_stderr(io.StringIO()):
        write_scene_data(
            root, SceneDataSettings(train=6, heldout=12, questions=QUESTIONS, scene=SceneSettings(side=48))
        )
    return root


def run(*flags: object) -> int:
    try:
        return run_script(evaluate.main, [*map(str, flags)])
    except SystemExit as stop:
        return int(stop.code or 0)


def test_scores_lines_gallery_and_table(model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "runs" / "first"
    flags = [f"--dataset_dir={data}", f"--val_dataset={HELD_OUT_SPEC}", f"--out={out}", "--max_new_tokens=6"]
    assert run(model, *flags, "--gallery=4", "--batch_size=5") == 0
    result = json.loads((out / "results.json").read_text())
    assert result["n"] == QUESTIONS == sum(result["n_by_kind"].values())
    for name in ("giou", "ciou", "giou_teacher_forced", "giou_shuffled", "target_count_accuracy", "text_accuracy"):
        assert 0.0 <= result[name] <= 1.0
    assert set(result["giou_by_kind"]) == {"direct", "several", "reasoning", "no_target"}
    assert result["model"] == str(model) and result["val_dataset"] == HELD_OUT_SPEC
    assert result["protocol"] == "free,teacher" and result["versions"]["torch"]
    assert result["command"][0] == "evaluate.py" and str(model) in result["command"]
    assert result["seconds_per_sample"] == pytest.approx(result["seconds"] / QUESTIONS)
    assert len(result["model_fingerprint"]["sha256"]) == 64 and result["model_fingerprint"]["bytes"] > 0
    assert [one["dataset"] for one in result["data"]] == list(result["datasets"])
    assert all(one["split"] == "val" and one["fingerprint"] and one["images"] for one in result["data"])
    low, high = result["intervals"]["giou"]
    assert low <= result["giou"] <= high
    for one in result["datasets"].values():
        assert one["giou_interval"][0] <= one["giou"] <= one["giou_interval"][1]
    lines = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert len(lines) == QUESTIONS
    assert sum(line["iou"] for line in lines) / QUESTIONS == pytest.approx(result["giou"])
    intersection, union = (sum(line[name] for line in lines) for name in ("intersection", "union"))
    assert intersection / union == pytest.approx(result["ciou"])
    assert not (out / "samples.jsonl.part").exists()
    assert {line["protocol"] for line in lines} == {"free"}
    assert lines == sorted(lines, key=lambda line: (line["dataset"], line["sample_id"], int(line["id"].split("#")[1])))
    assert "free,teacher" in (out / "index.html").read_text(encoding="utf-8")
    with Image.open(out / "gallery.png") as gallery:
        assert gallery.width > gallery.height / 2
    said = capsys.readouterr().out
    assert f"all        {QUESTIONS}" in said and "no_target" in said
    assert str(out) in said


def test_what_was_not_asked_for_is_not_there(model: Path, data: Path, tmp_path: Path) -> None:
    flags = ["--version", model, f"--dataset_dir={data}", "--val_dataset=refcoco|unc|val", f"--out={tmp_path / 'out'}"]
    assert run(*flags, "--no_shuffled", "--no_teacher_forced", "--gallery=0", "--limit=2", "--max_new_tokens=2") == 0
    result = json.loads((tmp_path / "out" / "results.json").read_text())
    assert result["giou_shuffled"] is result["giou_teacher_forced"] is None
    assert result["n"] == 2 and result["left_out"]["limit"] > 0
    assert result["protocol"] == "free"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["results.json", "samples.jsonl"]


def test_runs_that_are_equal_write_equal_lines_and_differ_by_nothing(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    flags = [f"--dataset_dir={data}", f"--val_dataset={HELD_OUT_SPEC}", "--max_new_tokens=6", "--gallery=0"]
    for name, batch in (("a", 5), ("b", 5)):
        assert run(model, *flags, f"--out={tmp_path / name}", f"--batch_size={batch}", "--protocol=free") == 0
    first, second = ((tmp_path / name / "samples.jsonl").read_bytes() for name in "ab")
    assert first == second
    capsys.readouterr()
    assert run("--compare", tmp_path / "a", tmp_path / "b") == 0
    said = capsys.readouterr().out
    assert f"free gIoU, all {QUESTIONS} " in " ".join(said.split())
    assert "+0.0000" in said and "no question's IoU changed" in said
    assert run("--table", tmp_path / "a") == 0
    assert "| refcoco | free | " in capsys.readouterr().out


def test_the_releases_protocol_runs_on_a_model(model: Path, data: Path, tmp_path: Path) -> None:
    flags = [f"--dataset_dir={data}", f"--val_dataset={HELD_OUT_SPEC}", "--max_new_tokens=6", "--gallery=0"]
    assert run(model, *flags, f"--out={tmp_path}", "--protocol=release,teacher", "--limit=6") == 0
    result = json.loads((tmp_path / "results.json").read_text())
    assert result["protocol"] == "teacher,release" and result["giou"] is None
    assert 0.0 <= result["release"]["validate"]["giou"] <= 1.0
    assert result["release"]["ar_validate"]["ciou"] is not None


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["{place}/gone", "--dataset_dir={data}", "--val_dataset=refcoco|unc|val"], "no saved model"),
        (["{model}", "--dataset_dir={place}/gone", "--val_dataset=refcoco|unc|val"], "gone"),
        (["{model}", "--dataset_dir={data}", "--val_dataset=refcoc|unc|val"], "refcoc"),
        (["{model}", "--dataset_dir={data}", "--val_dataset=refcoco"], "refcoco"),
        (["{model}", "--dataset_dir={data}", "--val_dataset=refcoco|unc|val", "--batch_size=0"], "--batch_size"),
        (["{model}", "{model}"], "do not know what to do with"),
        (["{model}", "--protocol=free,fre"], "--protocol names 'fre'"),
        (["{model}", "--protocol=teacher", "--no_teacher_forced"], "leaves no protocol"),
        (["--compare", "{place}"], "--compare takes two results folders, found 1"),
        (["--compare", "{place}/x", "{place}/y"], "give a folder that evaluate.py wrote"),
        (["--table", "{place}/x"], "give a folder that evaluate.py wrote"),
        ([], "--version is missing"),
    ],
)
def test_bad_calls_get_one_sentence(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture, flags: list[str], said: str
) -> None:
    given = [flag.format(model=model, data=data, place=tmp_path) for flag in flags]
    where = [f"--out={tmp_path / 'out'}"] if flags else []
    assert run(*given, *where) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert said in line
    assert not (tmp_path / "out").exists()


def test_train_ds_scores_alike_as_the_releases_users_type_it(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    flags = [f"--dataset_dir={data}", "--val_dataset=grefcoco|unc|val||multirefcoco|unc|val", "--max_new_tokens=6"]
    assert run(model, *flags, f"--out={tmp_path / 'out'}", "--batch_size=4", "--gallery=0", "--no_shuffled") == 0
    result = json.loads((tmp_path / "out" / "results.json").read_text())
    capsys.readouterr()
    place = ["--exp_name=scored", f"--log_base_dir={tmp_path}", "--precision=fp32", "--val_batch_size=4"]
    release = ["--dataset=sem_seg||refer_seg||vqa||multi_reason_seg", "--sample_rates=2,9,2,4", "--seg_token_num=3"]
    release += ["--pad_train_clip_images", "--vision_tower_for_mask", "--image_feature_scale_num=2"]
    assert run_script(train_ds.main, [f"--version={model}", "--eval_only", *flags, *place, *release]) == 0
    (said,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("step 0: "))
    told = dict(part.split(" ") for part in said.removeprefix("step 0: ").split(", "))
    for name in ("giou", "ciou", "giou_teacher_forced", "ciou_teacher_forced", "text_accuracy"):
        assert float(told[name]) == pytest.approx(result[name], abs=1e-4), name
    assert result["giou_teacher_forced"] > 0


@pytest.mark.long
def test_every_protocol_on_every_real_data_set(
    model: Path, realdata: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    sets = ["ReasonSeg|val", "refcoco|unc|val", "multirefcoco|unc|val", "grefcoco|unc|val", "ade20k|train"]
    sets += [f"MultiReasonSeg|{split}" for split in ("val", "test_less", "test_many")]
    sets += ["cocostuff|train", "pascal_part|train", "paco_lvis|train", "llava_instruct_150k|train"]
    flags = [f"--dataset_dir={realdata / 'dataset'}", "--protocol=free,teacher,release", "--max_new_tokens=4"]
    assert run(model, *flags, f"--val_dataset={'||'.join(sets)}", f"--out={tmp_path / 'out'}") == 0
    result = json.loads((tmp_path / "out" / "results.json").read_text())
    names = [name if name.startswith("MultiReasonSeg") else name.split("|")[0] for name in sets]
    assert list(result["datasets"]) == names
    for name, entry in result["datasets"].items():
        if name.startswith("llava"):
            # Few of these conversations fit into the tiny model's 256 positions.
            assert entry["text"]["perplexity"] > 1 and 0 < entry["text"]["n_read"] <= entry["text"]["n"] == 18
            continue
        assert entry["giou_interval"][0] <= entry["giou"] <= entry["giou_interval"][1]
        assert entry["giou_teacher_forced"] is not None and entry["release"]["validate"]["giou"] is not None
        assert ("miou" in entry) == (name in {"ade20k", "cocostuff", "pascal_part", "paco_lvis"})
        assert ("muse" in entry) == name.startswith("MultiReasonSeg")
    capsys.readouterr()
    missing = [f"--dataset_dir={realdata / 'dataset'}", "--val_dataset=refcocog|umd|val||ReasonSeg|test"]
    assert run(model, *missing, f"--out={tmp_path / 'none'}") == 2
    said = capsys.readouterr().err
    assert "refs(umd).p" in said and "ReasonSeg/test" in said and not (tmp_path / "none").exists()
