"""Models whose scores are known, on every kind of data set, under every protocol where they apply."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.unit import data_sets, test_data_custom
from utils.evaluation.ask import ask, summary
from utils.evaluation.questions import EvalQuestion, Plan, decode_truths, make_plan
from utils.evaluation.records import make_record
from utils.evaluation.run import with_muse
from utils.evaluation.sets import ScoredSets

PIXELS = 24 * 32
LOGIT = np.float32(40.0)
ALL = ("free", "teacher", "release")
# The release adds 1e-5 to unions and to counts.
EPS = 2e-5


@dataclass(frozen=True)
class Asked:
    """What a question asks for: the areas of its targets, of their union, and of what does not count."""

    areas: tuple[int, ...]
    ignored: int = 0
    united: int | None = None

    @property
    def union(self) -> int:
        return sum(self.areas) if self.united is None else self.united

    @property
    def counted(self) -> int:
        return PIXELS - self.ignored


@dataclass(frozen=True)
class Kind:
    """A data set and what its images' questions ask for. ignored: pixels that a surplus mask is not charged for."""

    spec: str
    write: Callable[[Path], Path]
    images: tuple[tuple[Asked, ...], ...]

    @property
    def questions(self) -> list[Asked]:
        return [one for image in self.images for one in image]

    @property
    def with_targets(self) -> list[Asked]:
        return [one for one in self.questions if one.areas]


GREFS = [
    data_sets.ref(1, 1, [11, 12], "both things"),
    data_sets.ref(2, 1, [-1], "the dog"),
    data_sets.ref(3, 2, [21], "big cup"),
]
CUP, POT = [1, 1, 5, 1, 5, 5, 1, 5], [9, 9, 12, 9, 12, 12, 9, 12]
SPOKEN = [
    test_data_custom.line("Which two?", "A cup {seg} and a pot {seg}.", masks=[CUP, POT]),
    test_data_custom.line("Where is the pot?", "Here, the pot {seg}.", masks=[POT]),
]

# In the images of these sets: squares of 6, 8 and 4, and two squares of 6 that share 9 pixels.
KINDS = [
    Kind(
        "refcoco|unc|train",
        data_sets.write_refer_seg,
        ((Asked((36,)), Asked((36,)), Asked((63,))), (Asked((64,)),)),
    ),
    Kind("refcoco|unc|val", data_sets.write_refer_seg, ((Asked((16,)),),)),
    Kind(
        "refcoco|google|train",
        lambda root: data_sets.write_refer_seg(root, refs_file="refs(google).p"),
        ((Asked((36,)), Asked((36,)), Asked((63,))), (Asked((64,)),)),
    ),
    Kind(
        "refcocog|umd|train",
        lambda root: data_sets.write_refer_seg(root, "refcocog", refs_file="refs(umd).p"),
        ((Asked((36,)), Asked((36,)), Asked((63,))), (Asked((64,)),)),
    ),
    Kind(
        "refcoco+|unc|train",
        lambda root: data_sets.write_refer_seg(root, "refcoco+"),
        ((Asked((36,)), Asked((36,)), Asked((63,))), (Asked((64,)),)),
    ),
    Kind(
        "multirefcoco|unc|train",  # two phrases are about one thing
        data_sets.write_refer_seg,
        ((Asked((36, 36, 63), united=36 + 63),), (Asked((64,)),)),
    ),
    Kind(
        "grefcoco|unc|train",
        lambda root: data_sets.write_refer_seg(root, "grefcoco", GREFS, "grefs(unc).json"),
        ((Asked((36, 63)), Asked(())), (Asked((64,)),)),
    ),
    Kind(
        "MultiReasonSeg|val",
        lambda root: data_sets.write_muse(root, split="val"),
        ((Asked((16,)), Asked((16, 25))), (Asked((25,)), Asked(()))),
    ),
    Kind("ReasonSeg|val", lambda root: data_sets.write_reason_seg(root, "val"), ((Asked((72,), ignored=25),),)),
    Kind(
        "ade20k|train",  # rows of 32 pixels, four of them unlabelled
        data_sets.write_ade20k,
        ((Asked((10 * 32,), 4 * 32), Asked((6 * 32,), 4 * 32), Asked((4 * 32,), 4 * 32)),),
    ),
    Kind("cocostuff|train", data_sets.write_cocostuff, ((Asked((3 * 32,), 11 * 32), Asked((10 * 32,), 11 * 32)),)),
    Kind("pascal_part|train", data_sets.write_parts, ((Asked((79,), 129), Asked((17,))),)),
    Kind(
        "custom|mine|train",
        lambda root: test_data_custom.write_coco(root, spoken=True),
        ((Asked((36,)), Asked((36,)), Asked((36,))),),
    ),
    Kind(
        "custom|mine|train",
        lambda root: test_data_custom.write_lines(root, SPOKEN),
        ((Asked((16, 9)), Asked((9,))),),
    ),
]


def answer(masks: Sequence[np.ndarray], phrases: Sequence[str], broken: int = 0) -> Any:
    drawn = np.array(masks, dtype=bool).reshape(len(masks), 24, 32)
    words = " and ".join(f"{phrase} {{seg}}" for phrase in phrases) or "Nothing."
    return SimpleNamespace(
        text=words.replace(" {seg}", ""),
        marked_text=words,
        phrases=list(phrases),
        masks=drawn,
        logits=np.where(drawn, LOGIT, -LOGIT),
        scores=[1.0] * len(masks),
        boxes=[(0, 0, 1, 1)] * len(masks),
        num_broken=broken,
    )


Respond = Callable[[np.ndarray, list[str], bool], Any]


class Known:
    """Answers by respond(true masks bool, names, whether the answer is given)."""

    def __init__(self, plan: Plan, respond: Respond) -> None:
        self._known = {(one.image_path, one.turn.question): one for one in plan.questions}
        self._respond = respond

    def _one(self, path: str, question: str, given: bool) -> Any:
        known: EvalQuestion = self._known[path, question]
        names = [target.name for target in known.turn.targets]
        return self._respond(decode_truths(known, (24, 32)) == 1, names, given)

    def answer(self, images: Any, questions: Any, image_index: Any, max_new_tokens: int) -> list[Any]:
        return [self._one(images[at], text, False) for at, text in zip(image_index, questions, strict=True)]

    def segment(self, images: Any, conversations: Any, image_index: Any) -> list[Any]:
        asked = zip(image_index, conversations, strict=True)
        return [self._one(images[at], question, True) for at, ((question, _),) in asked]


def oracle(truths: np.ndarray, names: list[str], given: bool) -> Any:
    return answer(truths, names)


def silent(truths: np.ndarray, names: list[str], given: bool) -> Any:
    """Says nothing; where the groups are given, their masks are empty."""
    return answer(np.zeros_like(truths), names) if given else answer([], [])


def everything(truths: np.ndarray, names: list[str], given: bool) -> Any:
    """Masks the whole image for each target, and for one that is not there."""
    most = len(truths) if given else max(1, len(truths))
    return answer(np.ones((most, 24, 32)), names or ["it"] * most)


def repeats(truths: np.ndarray, names: list[str], given: bool) -> Any:
    return answer(truths, names) if given else answer([*truths, *truths], names * 2)


def breaks(truths: np.ndarray, names: list[str], given: bool) -> Any:
    return answer(truths, names) if given else answer([], [], broken=len(truths))


def shuffles(truths: np.ndarray, names: list[str], given: bool) -> Any:
    return answer(truths[::-1], names[::-1])


def scores(kind: Kind, root: Path, respond: Respond) -> tuple[dict[str, Any], dict[str, Any]]:
    """(all scores, those of the data set) under all protocols."""
    kind.write(root)
    sets = ScoredSets(kind.spec, str(root))
    plan = make_plan(sets, protocols=ALL, shuffled=False, pair=True)
    scored = list(ask(Known(plan, respond), plan, plan.batches))
    found = with_muse(summary(plan, [one.figures for one in scored]), [make_record(one) for one in scored])
    (entry,) = found["datasets"].values()
    return found, entry


def loops(found: dict[str, Any]) -> dict[str, float]:
    return {name: found["release"][name]["giou"] for name in ("validate", "ar_validate")}


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


about = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: f"{kind.spec}-{len(kind.questions)}")


@about
def test_the_table_is_what_the_reader_gives(kind: Kind, tmp_path: Path) -> None:
    kind.write(tmp_path)
    plan = make_plan(ScoredSets(kind.spec, str(tmp_path)), shuffled=False)
    found = [[int((mask == 1).sum()) for mask in decode_truths(one, (24, 32))] for one in plan.questions]
    assert found == [list(one.areas) for one in kind.questions]


@about
def test_an_oracle_scores_one(kind: Kind, tmp_path: Path) -> None:
    found, entry = scores(kind, tmp_path, oracle)
    for name in ("giou", "ciou", "giou_matched", "giou_teacher_forced", "target_count_accuracy", "text_accuracy"):
        assert found[name] == 1.0, name
    assert entry["giou"] == entry["ciou"] == entry["giou_teacher_forced"] == entry["ciou_teacher_forced"] == 1.0
    assert set(entry["free"]["precision"].values()) == set(entry["teacher"]["precision"].values()) == {1.0}
    assert entry["free"]["box_accuracy"] in {1.0, None} and entry["free"]["n_acc"] in {1.0, None}
    assert entry["free"]["t_acc"] == 1.0 and entry["free"]["calibration_error"] == 0.0
    assert loops(found) == pytest.approx({"validate": 1.0, "ar_validate": 1.0}, abs=EPS)
    if "class_iou" in entry:
        assert entry["miou"] == entry["miou_teacher_forced"] == 1.0
    if "muse" in entry:
        assert entry["muse"]["pre_judge"]["giou"] == entry["muse"]["pre_judge"]["ciou"] == 1.0


@about
def test_silence_is_right_where_nothing_fits(kind: Kind, tmp_path: Path) -> None:
    found, entry = scores(kind, tmp_path, silent)
    nothing = len(kind.questions) - len(kind.with_targets)
    assert entry["giou"] == nothing / len(kind.questions)
    assert entry["ciou"] == 0.0 == entry["giou_teacher_forced"]
    assert entry["free"]["n_acc"] == (1.0 if nothing else None) and entry["free"]["t_acc"] == 0.0
    assert entry["free"]["groups"]["questions_with_too_few"] == len(kind.with_targets)
    assert loops(found) == {"validate": 0.0, "ar_validate": 0.0}
    if "muse" in entry:
        assert entry["muse"]["pre_judge"]["giou"] == nothing / len(kind.questions)
        assert entry["muse"]["pre_judge"]["ciou"] == 0.0


@about
def test_masking_everything(kind: Kind, tmp_path: Path) -> None:
    found, entry = scores(kind, tmp_path, everything)
    asked = kind.questions
    assert entry["giou"] == pytest.approx(mean([one.union / one.counted for one in asked]))
    assert entry["ciou"] == pytest.approx(sum(one.union for one in asked) / sum(one.counted for one in asked))
    forced = [one.union / one.counted for one in kind.with_targets]
    assert entry["giou_teacher_forced"] == pytest.approx(mean(forced))
    assert entry["free"]["precision"]["0.5"] == mean([float(one.union / one.counted >= 0.5) for one in asked])
    assert entry["free"]["n_acc"] in {0.0, None} and entry["free"]["t_acc"] == 1.0
    each = [area / one.counted for one in asked for area in one.areas]
    assert loops(found)["validate"] == pytest.approx(mean(each), abs=EPS)
    # A surplus mask's raw logits of 40 lie outside of the release's histogram: an empty pair, which counts as right.
    surplus = len(asked) - len(kind.with_targets)
    most = sum(
        max(sum(max(1, len(one.areas)) for one in image), sum(len(one.areas) for one in image)) for image in kind.images
    )
    assert loops(found)["ar_validate"] == pytest.approx((sum(each) + surplus) / most, abs=EPS)
    if "class_iou" in entry:  # each class is in one image
        assert entry["miou"] == pytest.approx(mean([one.areas[0] / one.counted for one in asked]))
    if "muse" in entry:
        pairs = [sum(one.areas) / PIXELS / max(1, len(one.areas)) for one in asked]
        assert entry["muse"]["pre_judge"]["giou"] == pytest.approx(mean(pairs))
        masks = sum(max(1, len(one.areas)) for one in asked)
        assert entry["muse"]["pre_judge"]["ciou"] == pytest.approx(
            sum(sum(one.areas) for one in asked) / (masks * PIXELS)
        )


@about
def test_repeated_groups_cost_half_where_masks_are_matched(kind: Kind, tmp_path: Path) -> None:
    found, entry = scores(kind, tmp_path, repeats)
    nothing = len(kind.questions) - len(kind.with_targets)
    half = (0.5 * len(kind.with_targets) + nothing) / len(kind.questions)
    assert entry["giou"] == entry["ciou"] == entry["giou_teacher_forced"] == 1.0
    assert found["giou_matched"] == pytest.approx(half)
    assert found["target_count_accuracy"] == nothing / len(kind.questions)
    assert entry["free"]["groups"]["emitted"] == 2 * entry["free"]["groups"]["true"]
    assert entry["free"]["groups"]["questions_with_too_many"] == len(kind.with_targets)
    assert entry["free"]["calibration_error"] == 0.5  # half the masks of score 1 belong to nothing
    # G pairs and G surplus masks that count as right, over 2 G.
    assert loops(found) == pytest.approx({"validate": 1.0, "ar_validate": 1.0}, abs=EPS)
    if "muse" in entry:
        assert entry["muse"]["pre_judge"]["giou"] == pytest.approx(half)
        assert entry["muse"]["pre_judge"]["ciou"] == 0.5


@about
def test_broken_groups_give_no_masks_and_are_counted(kind: Kind, tmp_path: Path) -> None:
    found, entry = scores(kind, tmp_path, breaks)
    nothing = len(kind.questions) - len(kind.with_targets)
    targets = sum(len(one.areas) for one in kind.questions)
    assert entry["giou"] == nothing / len(kind.questions)
    assert entry["giou_teacher_forced"] == 1.0
    groups = entry["free"]["groups"]
    assert (groups["broken"], groups["questions_with_broken_groups"]) == (targets, len(kind.with_targets))
    assert groups["emitted"] == 0
    assert loops(found) == pytest.approx({"validate": 1.0, "ar_validate": 0.0}, abs=EPS)


@about
def test_the_order_of_instances_costs_only_the_releases_forced_loop(kind: Kind, tmp_path: Path) -> None:
    found, entry = scores(kind, tmp_path, shuffles)
    for name in ("giou", "ciou", "giou_matched", "giou_teacher_forced", "target_count_accuracy", "text_accuracy"):
        assert found[name] == 1.0, name
    # By place, the first target meets the last, and only a middle one itself; none of these share a pixel.
    targets = sum(len(one.areas) for one in kind.questions)
    alone = sum(len(one.areas) % 2 for one in kind.questions)
    assert loops(found) == pytest.approx({"validate": alone / targets, "ar_validate": 1.0}, abs=EPS)
    if "muse" in entry:
        assert entry["muse"]["pre_judge"]["giou"] == entry["muse"]["pre_judge"]["ciou"] == 1.0


def test_a_set_that_is_asked_for_twice_goes_by_its_split(tmp_path: Path) -> None:
    data_sets.write_refer_seg(tmp_path)
    found = ScoredSets("refcoco|unc|train||refcoco|unc|val", str(tmp_path))
    assert found.labels == ["refcoco|unc|train", "refcoco|unc|val"]
    assert [sample.dataset for sample in found] == ["refcoco|unc|train"] * 2 + ["refcoco|unc|val"]
    assert ScoredSets("refcoco|unc|val", str(tmp_path)).labels == ["refcoco"]


def test_queries_of_reasonseg_are_told_apart(tmp_path: Path) -> None:
    data_sets.write_reason_seg(tmp_path, "test")
    folder = tmp_path / "reason_seg" / "ReasonSeg" / "test"
    data_sets.write_json(folder / "b.json", data_sets.reason_record("a cup", "the jug", is_sentence=False))
    data_sets.write_image(folder / "b.jpg")
    kind = Kind("ReasonSeg|test", lambda root: root, ())
    _, entry = scores(kind, tmp_path, breaks)
    queries = entry["by_query"]
    assert (entry["n"], queries["short"]["n"], queries["long"]["n"]) == (3, 2, 1)
    assert queries["short"]["giou"] == queries["long"]["giou"] == 0.0
    assert queries["short"]["giou_teacher_forced"] == queries["long"]["giou_teacher_forced"] == 1.0
    assert queries["long"]["free"]["groups"]["true"] == 1 and "by_query" not in queries["long"]


def test_phrases_are_joined_six_five_four(tmp_path: Path) -> None:
    told = [data_sets.ref(1, 1, 11, *[f"cup number {n}" for n in range(17)]), data_sets.ref(2, 2, 21, "big cup")]
    data_sets.write_refer_seg(tmp_path, found=told)
    first, second = ScoredSets("multirefcoco|unc|train", str(tmp_path))
    assert [len(turn.targets) for (turn,) in first.conversations] == [6, 5, 4, 2]
    assert [len(turn.targets) for (turn,) in second.conversations] == [1]
    (start,) = first.conversations[0]
    assert all(f"cup number {n}" in start.question for n in range(6)) and "number 6" not in start.question


def test_joined_phrases_without_a_target_are_left_out_and_counted(tmp_path: Path) -> None:
    data_sets.write_refer_seg(tmp_path, "grefcoco", GREFS, "grefs(unc).json")
    sets = ScoredSets("multigrefcoco|unc|train", str(tmp_path))
    assert sets.readers[0].skipped["phrase without a target, among several in a question"] == 1
    assert [[len(turn.targets) for (turn,) in one.conversations] for one in sets] == [[2], [1]]
