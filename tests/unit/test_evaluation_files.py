"""What evaluation writes: lines with causes and masks, pages, tables, comparisons, fingerprints."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as coco_rle

from utils.cli.errors import UserError
from utils.data.samples import Target, Turn
from utils.evaluation import compare, fingerprints, tables
from utils.evaluation import html_report as pages
from utils.evaluation import records as lines
from utils.evaluation.aggregate import PhraseScores, QuestionScores, score_masks
from utils.evaluation.ask import Scored
from utils.evaluation.metrics import count_named, names_exactly
from utils.evaluation.questions import EvalQuestion
from utils.evaluation.results import read_results

SIDE = 8


def square(left: int, width: int = 4) -> np.ndarray:
    mask = np.zeros((SIDE, SIDE), dtype=np.uint8)
    mask[:4, left : left + width] = 1
    return mask


def scored(
    names: list[str],
    phrases: list[str],
    masks: list[np.ndarray],
    *,
    broken: int = 0,
    number: int = 0,
    question: str = "Where?",
    said: str = "There.",
    protocol: str = "free",
) -> Scored:
    """A question whose true masks are squares side by side."""
    truths = np.array([square(4 * place) for place in range(len(names))], dtype=np.uint8).reshape(-1, SIDE, SIDE)
    targets = tuple(Target(name, lambda place=place: square(4 * place)) for place, name in enumerate(names))
    turn = Turn(question, " ".join("{seg}" for _ in names) or "None.", targets, "direct" if names else "no_target")
    predicted = np.array(masks, dtype=bool).reshape(-1, SIDE, SIDE)
    answer: Any = SimpleNamespace(
        text=said,
        marked_text=said,
        phrases=phrases,
        masks=predicted,
        scores=[0.5] * len(masks),
        boxes=[(0, 0, 1, 1)] * len(masks),
        num_broken=broken,
    )
    shown = score_masks(predicted, truths)
    told: dict[str, Any] = {"forced": shown}
    if protocol == "free":
        right = names_exactly(phrases, names)
        words = PhraseScores(len(masks), broken, count_named(phrases, names), right, tuple(answer.scores))
        told = {"free": shown, "said": words}
    figures = QuestionScores(turn.kind, "drawn", "a.png", len(names), **told)
    return Scored(EvalQuestion("a.png", "drawn", "drawn/val/1", number, turn), truths, answer, protocol, shown, figures)


A, B = square(0), square(4)


@pytest.mark.parametrize(
    ("one", "expected"),
    [
        (scored(["cat"], ["the cat"], [A]), []),
        (scored(["cat", "dog"], ["the dog", "a cat"], [B, A]), []),
        (scored(["cat", "dog"], ["cat"], [A]), ["missed"]),
        (scored(["cat"], ["cat", "cat"], [A, A]), ["extra"]),
        (scored([], ["moon"], [A]), ["extra"]),
        (scored([], [], []), []),
        (scored(["cat"], ["dog"], [A]), ["wrong phrase"]),
        (scored(["cat"], [], [], broken=1), ["missed", "broken group"]),
        (scored(["cat"], ["cat"], [B]), ["bad mask"]),
        (scored(["cat"], ["cat"], [square(0, 2)]), []),  # half of it, 8 of 16 pixels, is enough
        (scored(["cat"], ["dog"], [square(0, 1)]), ["wrong phrase", "bad mask"]),
        (scored(["cat"], ["dog"], [B], protocol="teacher"), ["bad mask"]),
    ],
)
def test_causes_of_failure(one: Scored, expected: list[str]) -> None:
    assert lines.causes(one) == expected


def test_a_line_holds_masks_that_pycocotools_reads() -> None:
    line = json.loads(json.dumps(lines.make_record(scored(["cat", "dog"], ["cat"], [A]))))
    (counts,) = line["masks"]
    assert np.array_equal(coco_rle.decode({"size": line["size"], "counts": counts.encode()}), A)
    assert (line["iou"], line["matched_iou"], line["intersection"], line["union"]) == (16 / 32, 1 / 2, 16, 32)
    assert (line["ious_of_masks"], line["ious_of_targets"]) == ([1.0], [1.0, 0.0])
    assert line["causes"] == ["missed"] and line["protocol"] == "free" and line["id"] == "drawn/val/1#0"
    assert lines.make_record(scored(["cat"], ["cat"], [A], protocol="teacher"))["iou"] is None


def test_lines_are_sorted_and_appear_when_all_are_there(tmp_path: Path) -> None:
    with lines.RecordWriter(tmp_path, {}) as written:
        both = [scored(["cat"], ["cat"], [A], number=number) for number in (10, 2)]
        for one in both:
            written.add(one)
        assert not (tmp_path / "samples.jsonl").exists()
        records = written.finish([one.question for one in both])
    assert [record["key"][2] for record in records] == [10, 2]  # as asked for
    assert [line["id"] for line in lines.read_lines(tmp_path)] == ["drawn/val/1#2", "drawn/val/1#10"]
    assert [path.name for path in tmp_path.iterdir()] == ["samples.jsonl"]


@pytest.mark.parametrize(("content", "said"), [(None, "No such file"), ("{}\n", "line 1"), ("{\n", "line 1")])
def test_lines_that_cannot_be_read(tmp_path: Path, content: str | None, said: str) -> None:
    if content is not None:
        (tmp_path / "samples.jsonl").write_text(content)
    with pytest.raises(UserError, match=said):
        lines.read_lines(tmp_path)


def test_results_that_cannot_be_read(tmp_path: Path) -> None:
    for content, said in (("{", "not valid JSON"), ("{}", "no scores")):
        (tmp_path / "results.json").write_text(content)
        with pytest.raises(UserError, match=said):
            read_results(tmp_path)


def noise(path: str) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)


def test_words_of_a_page_are_shown_and_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "open_image", noise)
    hostile = '<script>alert("x")</script><img src=x onerror=alert(1)>'
    one = scored(["cat"], ["cat"], [A], question=hostile, said=hostile)
    told = lines.make_record(one)
    pages.write_page(tmp_path / "index.html", hostile, {hostile: [told], "again": [told]})
    text = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert "<script" not in text and "<img src=x" not in text
    assert text.count("&lt;script&gt;alert(&#34;x&#34;)&lt;/script&gt;") >= 4
    assert text.count('src="data:image/jpeg;base64,') == 3  # drawn once, linked the second time
    assert text.count('href="#a0"') == 1
    assert "http://" not in text and "https://" not in text
    assert "free, IoU 1.000" in text


def test_a_page_stays_small_whatever_it_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise is what a JPEG is worst at, and a quotation mark what escaping is."""
    loud = np.random.default_rng(0).integers(0, 256, (1200, 1600, 3), dtype=np.uint8)
    monkeypatch.setattr(pages, "open_image", lambda path: loud)
    quotes = lines.make_record(scored(["cat"], ["cat"], [A], question='"' * 5000, said='"' * 5000))
    told = [quotes | {"id": str(number), "size": [1200, 1600], "masks": [], "true_masks": []} for number in range(5)]
    pages.write_page(tmp_path / "index.html", "many", {"all": told})
    assert (tmp_path / "index.html").stat().st_size < 5 * 200_000


def test_a_page_keeps_best_worst_random_and_causes() -> None:
    chosen = pages.Chosen(per_section=2)
    right = [scored(["cat"], ["cat"], [A], number=n) for n in range(3)]
    wrong = scored(["cat"], ["dog"], [B], number=3)
    silent = scored([], [], [], number=4)
    for one in (*right, wrong, silent):
        chosen.add(lines.make_record(one))
    sections = {name: [int(line["id"].split("#")[1]) for line in kept] for name, kept in chosen.sections().items()}
    assert sections["best"] == [0, 1]
    assert sections["worst"] == [3, 0]
    assert len(sections["at random"]) == 2
    assert sections["cause: bad mask"] == sections["cause: wrong phrase"] == [3]
    assert "cause: extra" not in sections


def test_rows_to_quote() -> None:
    entry = {"giou": 0.5, "ciou": 0.25, "n": 4, "giou_interval": [0.4, 0.6], "ciou_interval": [0.2, 0.3]}
    forced = {"giou_teacher_forced": 0.75, "ciou_teacher_forced": 1.0, "n_teacher_forced": 3}
    loops = {"validate": {"giou": 0.1, "ciou": 0.2}, "ar_validate": {"giou": None, "ciou": None}}
    judged = {"giou": 0.125, "ciou": 0.0, "n": 2}
    more = {
        "release": loops,
        "by_query": {"long": entry},
        "muse": {"pre_judge": judged, "judged": judged | {"giou": None}},
    }
    (markdown, latex) = tables.quotable({"datasets": {"ref_coco|x": entry | forced | more}})
    assert markdown.splitlines()[2:] == [
        r"| ref_coco\|x | free | 4 | 50.0 [40.0, 60.0] | 25.0 [20.0, 30.0] |",
        r"| ref_coco\|x | teacher | 3 | 75.0 | 100.0 |",
        r"| ref_coco\|x | release, validate | 4 | 10.0 | 20.0 |",
        r"| ref_coco\|x, long queries | free | 4 | 50.0 [40.0, 60.0] | 25.0 [20.0, 30.0] |",
        r"| ref_coco\|x, MUSE before judge | free | 2 | 12.5 | 0.0 |",
    ]
    assert latex.splitlines()[1] == r"ref\_coco|x & free & 4 & 50.0 [40.0, 60.0] & 25.0 [20.0, 30.0] \\"


def test_further_rows_to_quote() -> None:
    free = {"precision": {"0.5": 0.5, "0.7": 0.25, "0.9": 0.0}, "box_accuracy": None, "n_acc": 1.0, "t_acc": 0.75}
    entry = {"giou": None, "ciou": None, "n": 4, "free": free | {"calibration_error": 0.125}, "miou": 0.5}
    text = {"n": 9, "exact_match": 0.5, "vqa_accuracy": None, "bleu": 12.34, "perplexity": 3.0}
    text |= {"exact_match_interval": [0.25, 0.75], "perplexity_interval": [2.5, 3.5]}
    words, _ = tables.quotable({"datasets": {"v": entry | {"free": None, "text": text}}})
    assert words.splitlines()[2:] == ["| v | 9 | 50.0 [25.0, 75.0] | - | 12.3 | 3.00 [2.50, 3.50] |"]
    further = tables.quotable({"datasets": {"d": entry}})[0]
    assert further.splitlines()[2:] == ["| d | free | 50.0 | 25.0 | 0.0 | - | 100.0 | 75.0 | 50.0 | 0.125 |"]


def line(number: int, iou: float | None, **changed: Any) -> dict[str, Any]:
    told = {"id": f"s#{number}", "question": f"q{number}", "answer": "a", "image_path": f"{number // 2}.png"}
    return told | {"dataset": "d", "kind": "direct", "iou": iou, "iou_teacher_forced": None} | changed


def test_compared_runs_are_paired() -> None:
    first = [line(n, 0.5) for n in range(4)] + [line(9, 1.0)]
    second = [line(0, 0.5), line(1, 0.7), line(2, 0.2), line(3, 0.5)]
    found = compare.compare(first, second)
    (whole,) = found.differences
    assert (whole.score, whole.n, found.only_first, found.only_second) == ("free gIoU, all", 4, 1, 0)
    assert whole.first == 0.5 and whole.second == pytest.approx((0.5 + 0.7 + 0.2 + 0.5) / 4)
    # Two images: +0.2 over two questions and -0.3 over two; a quarter of the draws takes only one of them.
    assert whole.interval == pytest.approx((-0.3 / 2, 0.2 / 2))
    assert [pair[0]["id"] for pair in found.changed] == ["s#2", "s#1"]
    assert [compare.change(pair) for pair in found.changed] == pytest.approx([-0.3, 0.2])


def test_runs_that_cannot_be_compared() -> None:
    with pytest.raises(UserError, match="share no question"):
        compare.compare([line(1, 0.5)], [line(2, 0.5)])
    with pytest.raises(UserError, match="of different data"):
        compare.compare([line(1, 0.5)], [line(1, 0.5, question="other")])
    with pytest.raises(UserError, match="no protocol in common"):
        compare.compare([line(1, 0.5)], [line(1, None, iou_teacher_forced=0.5)])


def test_comparing_says_what_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "open_image", noise)
    for name, mask in (("a", A), ("b", B)):
        (tmp_path / name).mkdir()
        with lines.RecordWriter(tmp_path / name, {}) as written:
            one = scored(["cat"], ["cat"], [mask], said="It is\x1b[31m <b>here</b>.")
            written.add(one)
            written.finish([one.question])
    said = compare.compare_folders(tmp_path / "a", tmp_path / "b", tmp_path / "c")
    page = (tmp_path / "c" / "compare.html").read_text(encoding="utf-8")
    assert page.count("data:image/jpeg") == 3 and "IoU 1.000 → 0.000 (-1.000)" in page  # truth, A and B
    assert "&lt;b&gt;here" in page and "<b>here" not in page
    assert "free gIoU, all" in said and "-1.0000" in said and "-1.000  drawn/val/1#0  Where?" in said
    assert "\x1b" not in said


def test_a_models_fingerprint_changes_with_its_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text("{}")
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(bytes(1000))
    found = fingerprints.of_model(tmp_path)
    assert found["files"] == ["config.json", "model.safetensors"] and found["bytes"] == 1002
    assert found == fingerprints.of_model(tmp_path)
    weights.write_bytes(bytes(999) + b"x")
    assert fingerprints.of_model(tmp_path)["sha256"] != found["sha256"]
    # A large file counts by blocks, first and last among them.
    monkeypatch.setattr(fingerprints, "_WHOLE", 100)
    monkeypatch.setattr(fingerprints, "_BLOCK", 10)
    ends = {fingerprints.of_model(tmp_path)["sha256"]}
    for content in (bytes(1000), b"x" + bytes(999), bytes(500)):
        weights.write_bytes(content)
        ends.add(fingerprints.of_model(tmp_path)["sha256"])
    assert len(ends) == 4


def test_the_datas_fingerprint_tells_what_was_left_out() -> None:
    class Reader:
        name, split, fingerprint, skipped = "refcoco", "val", "abc", {"ref to a crowd": 2}

        def __len__(self) -> int:
            return 7

    expected = {"dataset": "refcoco", "split": "val", "images": 7, "fingerprint": "abc"}
    assert fingerprints.of_data([Reader()]) == [expected | {"left_out": {"ref to a crowd": 2}}]
