"""evaluate.py over MUSE with a judge: behind an endpoint, in a folder, and none."""

import json
from pathlib import Path
from typing import Any

import pytest

import evaluate
from model.predictor import Predictor
from tests.unit import data_sets
from tests.unit.judge_server import Reply, judge_server, says
from tests.unit.test_judge import KEY
from tests.unit.tiny_bases import write_language_model
from tests.unit.tiny_pixellm import make_model, saying
from utils.checkpoints.builder import save_model
from utils.cli.errors import run_script
from utils.evaluation.judge import local


@pytest.fixture(scope="module")
def muse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and MUSE's data, and results of a model that names two things whatever it is asked."""
    root = tmp_path_factory.mktemp("muse")
    data_sets.write_muse(root / "data", split="val")
    built = make_model()
    save_model(built.model, built.processor, root / "model")
    return root


@pytest.fixture(autouse=True)
def talkative(monkeypatch: pytest.MonkeyPatch) -> None:
    load = Predictor.from_pretrained.__func__  # type: ignore[attr-defined]

    def loaded(kind: type, *args: Any, **more: Any) -> Any:
        predictor = load(kind, *args, **more)
        answer = predictor.answer

        def talk(images: Any, questions: Any, *rest: Any) -> Any:
            with saying(predictor, ["the red circle {seg} and the star {seg}."] * len(questions)):
                return answer(images, questions, *rest)

        predictor.answer = talk
        return predictor

    monkeypatch.setattr(Predictor, "from_pretrained", classmethod(loaded))


def run(*flags: object) -> int:
    try:
        return run_script(evaluate.main, [*map(str, flags)])
    except SystemExit as stop:
        return int(stop.code or 0)


def scored(muse: Path, out: Path, *flags: object) -> dict[str, Any]:
    where = [f"--dataset_dir={muse / 'data'}", "--val_dataset=MultiReasonSeg|val", f"--out={out}", "--gallery=0"]
    assert run(muse / "model", *where, "--protocol=free", "--no_shuffled", "--max_new_tokens=40", *flags) == 0
    result: dict[str, Any] = json.loads((out / "results.json").read_text())
    return result


def leaks() -> list[str]:
    """Processes whose command line shows the key."""
    shown = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
    return [line.decode(errors="replace") for line in shown if KEY.encode() in line]


def test_a_judge_behind_an_endpoint(
    muse: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUDGE_API_KEY", KEY)
    seen: list[str] = []

    def respond(number: int, prompt: str) -> Reply:
        seen.extend(leaks())
        if number == 0:
            return Reply(429, KEY.encode())
        return says(f"SCORE: {8 if 'to serve?' in prompt else 2}" if "burns" not in prompt else f"Hm, {KEY}.")

    with judge_server(respond) as server:
        flags = [f"--judge_url={server.url}", "--judge_model=judge-1", "--judge_parallel=1"]
        result = scored(muse, tmp_path, *flags)
        asked = len(server.requests)
        assert asked == 4 + 1 and not seen  # four questions, one asked again
        again = scored(muse, tmp_path, *flags)
        assert len(server.requests) == asked
        assert run("--judge", tmp_path, *flags, "--judge_threshold=9") == 0
        assert len(server.requests) == asked
        assert all(headers["Authorization"] == f"Bearer {KEY}" for _, headers, _ in server.requests)
    entry, judge = result["datasets"]["MultiReasonSeg"]["muse"], result["judge"]
    assert (judge["kind"], judge["model"], judge["threshold"], judge["asked"]) == ("endpoint", "judge-1", 5.0, 4)
    assert len(judge["prompt_sha256"]) == 64
    lines = [json.loads(text) for text in (tmp_path / "samples.jsonl").read_text().splitlines()]
    ious = {line["question"]: line["muse"]["iou"] for line in lines}
    assert entry["pre_judge"]["giou"] == pytest.approx(sum(ious.values()) / 4)
    judged = entry["judged"]
    assert (judged["n"], judged["unparsable"], judged["unanswered"]) == (3, 1, 0)
    assert judged["giou"] == pytest.approx(ious["What is needed to serve?"] / 3)
    assert again["datasets"]["MultiReasonSeg"]["muse"] == entry and again["judge"]["asked"] == 0
    last = json.loads((tmp_path / "results.json").read_text())
    assert last["datasets"]["MultiReasonSeg"]["muse"]["judged"]["giou"] == 0.0 and last["judge"]["threshold"] == 9
    said = capsys.readouterr()
    assert "MultiReasonSeg, MUSE after judge" in said.out
    for path in tmp_path.iterdir():
        assert KEY.encode() not in path.read_bytes(), path
    assert KEY not in said.out + said.err
    assert {"judge_cache.jsonl", "verdicts.jsonl"} <= {path.name for path in tmp_path.iterdir()}


def test_the_answer_is_judged_with_what_its_masks_were_matched_with(muse: Path, tmp_path: Path) -> None:
    with judge_server(lambda number, prompt: says("SCORE: 10")) as server:
        prompt = tmp_path / "prompt.txt"
        prompt.write_text("$question -> $answer")
        scored(muse, tmp_path / "out", f"--judge_url={server.url}", "--judge_model=m", f"--judge_prompt={prompt}")
        prompts = sorted(server.prompts)
    assert prompts[0] == "What burns? -> the red circle (none) and the star (none)."
    one = next(text for text in prompts if "drink" in text)
    assert one.count("(the cup [2, 2, 6, 6])") == 1 and one.count("(none)") == 1


def test_without_a_judge_the_scores_before_one_are_told(muse: Path, tmp_path: Path) -> None:
    result = scored(muse, tmp_path)
    entry = result["datasets"]["MultiReasonSeg"]["muse"]
    assert result["judge"] == {"kind": "none"} and list(entry) == ["pre_judge"]
    low, high = entry["pre_judge"]["giou_interval"]
    assert low <= entry["pre_judge"]["giou"] <= high
    assert not (tmp_path / "judge_cache.jsonl").exists()


def test_a_judge_in_a_folder(muse: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A language model of random weights: no verdict of it can be read, and none is guessed."""
    monkeypatch.setattr(local, "MAX_NEW_TOKENS", 12)
    judge = write_language_model(tmp_path / "judge", "llama", max_position_embeddings=4096)
    result = scored(muse, tmp_path / "out", f"--judge_model={judge}")
    judged = result["datasets"]["MultiReasonSeg"]["muse"]["judged"]
    assert (judged["n"], judged["unparsable"], judged["giou"]) == (0, 4, None)
    assert result["judge"]["kind"] == "local" and len(result["judge"]["model_sha256"]) == 64
    assert scored(muse, tmp_path / "out", f"--judge_model={judge}")["judge"]["asked"] == 0


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--judge_url=http://127.0.0.1:1/v1"], "--judge_url is given without --judge_model"),
        (["--judge_model={place}/gone"], "is no folder"),
        (["--judge_model={place}"], "cannot load --judge_model"),
        (["--judge_model=m", "--judge_url=nowhere"], "must be an address"),
        (["--judge_model=m", "--judge_url=http://h/v1", "--judge_prompt={place}/gone"], "cannot read --judge_prompt"),
        (["--judge={place}"], "--judge is given without --judge_model"),
        (["--judge={place}", "--judge_model={place}"], "give a folder that evaluate.py wrote"),
    ],
)
def test_judges_that_cannot_be_had(
    muse: Path, tmp_path: Path, capsys: pytest.CaptureFixture, flags: list[str], said: str
) -> None:
    given = [flag.format(place=tmp_path) for flag in flags]
    where = [f"--dataset_dir={muse / 'data'}", "--val_dataset=MultiReasonSeg|val", f"--out={tmp_path / 'out'}"]
    assert run(muse / "model", *where, "--limit=1", "--max_new_tokens=2", *given) == 2
    assert said in capsys.readouterr().err.strip().splitlines()[-1]


def test_a_judge_that_is_of_no_use_is_said_to_be(muse: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    data_sets.write_refer_seg(tmp_path)
    where = [f"--dataset_dir={tmp_path}", "--val_dataset=refcoco|unc|val", f"--out={tmp_path / 'out'}", "--gallery=0"]
    flags = ["--judge_model=m", "--judge_url=http://127.0.0.1:1/v1", "--protocol=free", "--max_new_tokens=2"]
    assert run(muse / "model", *where, *flags) == 0
    assert "--judge_model: no effect, only free-running answers to MultiReasonSeg|SPLIT" in capsys.readouterr().err
    where = [f"--dataset_dir={muse / 'data'}", "--val_dataset=MultiReasonSeg|val", f"--out={tmp_path / 'out'}"]
    assert run(muse / "model", *where, *flags, "--protocol=teacher", "--gallery=0") == 0
    assert "teacher on MultiReasonSeg|val gives none" in capsys.readouterr().err
