"""An evaluation that was ended goes on where it stopped, and ends as if it never had been."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.unit.test_evaluation import ALL, Fake, answer, region, samples
from utils.evaluation import ask as evaluation
from utils.evaluation.aggregate import QuestionScores, WordScores
from utils.evaluation.questions import make_plan
from utils.evaluation.records import RecordWriter
from utils.evaluation.resume import question_key, read_dataclass, scores_of_entry

RUN = {"model": "m", "limit": 0}


class Tired(Fake):
    """Draws what is asked for, a pixel beside it; ends the run at a batch."""

    def __init__(self, end_at: int = -1) -> None:
        super().__init__(lambda names: answer(names, [np.roll(region(name), 1, axis=1) for name in names]))
        self.end_at = end_at

    def answer(self, *args: Any) -> list[Any]:
        if len(self.calls) == self.end_at:
            raise KeyboardInterrupt
        return super().answer(*args)


def score(folder: Path, predictor: Fake, run: dict[str, Any] = RUN) -> tuple[dict[str, Any], list[QuestionScores]]:
    """The summary and the figures, as a session makes them."""
    plan = make_plan(samples(), batch_size=2, protocols=ALL, shuffled=False)
    with RecordWriter(folder, run) as lines:
        batches = [batch for batch in plan.batches if not all(question_key(one) in lines.earlier for one in batch)]
        for scored in evaluation.ask(predictor, plan, batches):
            lines.add(scored)
        figures = [scores_of_entry(record) for record in lines.finish(plan.questions)]
    return evaluation.summary(plan, figures), figures


@pytest.fixture
def ended(tmp_path: Path) -> Path:
    """A folder in which a run was ended before its third batch of two, two and one; each takes two calls."""
    with pytest.raises(KeyboardInterrupt):
        score(tmp_path, Tired(end_at=4))
    assert [path.name for path in tmp_path.iterdir()] == ["samples.jsonl.part"]
    return tmp_path


def test_it_ends_as_if_it_had_never_stopped(ended: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere, predictor = tmp_path_factory.mktemp("whole"), Tired()
    expected, whole = score(elsewhere, Tired())
    found, resumed = score(ended, predictor)
    assert [name for name, *_ in predictor.calls] == ["answer", "segment"]  # the third batch alone
    assert found == expected and resumed == whole
    assert (ended / "samples.jsonl").read_bytes() == (elsewhere / "samples.jsonl").read_bytes()
    assert [path.name for path in ended.iterdir()] == ["samples.jsonl"]


def test_a_run_that_is_ended_again_keeps_what_it_had(ended: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        score(ended, Tired(end_at=0))
    assert len(RecordWriter(ended, RUN).earlier) == 4


def test_what_other_ranks_left_counts_too(ended: Path) -> None:
    """Four questions in the files of ranks 0 and 11; one process goes on, and no file is left behind."""
    part = ended / "samples.jsonl.part"
    head, *records = part.read_text().splitlines(keepends=True)
    part.write_text("".join([head, *records[:2]]))
    (ended / "samples.jsonl.part11").write_text("".join([head, *records[2:]]))
    (ended / "samples.jsonl.part3").write_text("not a run\n")
    predictor = Tired()
    found, _ = score(ended, predictor)
    assert len(predictor.calls) == 2 and found["n"] == 5
    assert [path.name for path in ended.iterdir()] == ["samples.jsonl"]


def test_another_run_starts_anew(ended: Path) -> None:
    predictor = Tired()
    score(ended, predictor, RUN | {"limit": 3})
    assert len(predictor.calls) == 2 * 3


def test_a_line_that_was_cut_off_is_scored_again_with_its_batch(ended: Path) -> None:
    part = ended / "samples.jsonl.part"
    part.write_bytes(part.read_bytes()[:-10])
    predictor = Tired()
    found, _ = score(ended, predictor)
    assert len(predictor.calls) == 2 * 2 and found["n"] == 5


def test_figures_survive_json() -> None:
    plan = make_plan(samples(), protocols=ALL)
    for one in evaluation.ask(Tired(), plan, plan.batches):
        assert read_dataclass(QuestionScores, json.loads(json.dumps(dataclasses.asdict(one.figures)))) == one.figures
    words = WordScores("yes", ("yes", "no"), True, None, 1.25, 3)
    told = QuestionScores("text", "d", "a.png", 0, words=words)
    assert read_dataclass(QuestionScores, json.loads(json.dumps(dataclasses.asdict(told)))) == told
