"""Scenes: drawn exactly, never repeated, asked about without ambiguity, spoken of in a closed vocabulary."""

import itertools
import random
import re
from collections import Counter

import numpy as np
import pytest

from demo.scenes import (
    HINTS,
    PATCH_WORDS,
    Scene,
    SceneSettings,
    draw_scene,
    find_asks,
    make_conversation,
    named_shape,
    patch_words,
    sample_scenes,
    scene_masks,
    tokenizer_corpus,
)
from demo.scenes.drawing import Background, Shape, shape_glyph
from demo.scenes.planning import SceneDataSettings, plan_held_out, split_exactly
from demo.scenes.questions import FAMILIES, SIZE_RATIO, directly, extreme_shape, has_distractor, training_piles
from demo.scenes.words import COLOURS, FORMS, join_list
from model.structures import SEG_MARKER
from utils.data.templates import NUMBERS

COUNTS = {"direct": {1}, "several": {2, 3, 4, 5, 6}, "reasoning": {1, 2, 3}, "no_target": {0}}
GREY = Background(200, (0, 0, 0), 0, 0)


def take(count: int, side: int = 112, seed: int = 0, split: str = "train") -> list[Scene]:
    return list(itertools.islice(sample_scenes(SceneSettings(side), seed, split, set()), count))


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return take(200)


def shape(name: str, left: int, top: int, side: int = 20) -> Shape:
    colour, form = name.split()
    return Shape(form, colour, "medium", left, top, side, COLOURS[colour])


def scene_of(*shapes: Shape) -> Scene:
    return Scene(112, tuple(sorted(shapes, key=lambda s: s.centre_x)), GREY)


@pytest.mark.parametrize("side", [48, 112, 224])
def test_masks_are_the_pixels_of_the_shapes(side: int) -> None:
    for scene in take(20, side):
        image, masks = draw_scene(scene), scene_masks(scene)
        assert image.shape == (side, side, 3) and image.dtype == np.uint8
        assert masks.sum(axis=0).max() == 1, "shapes overlap"
        for one, mask in zip(scene.shapes, masks, strict=True):
            assert mask.sum() == one.area > 0
            assert (image[mask > 0] == one.shade).all()
        colourless = np.ptp(image[masks.sum(axis=0) == 0].astype(int), axis=1).max()
        assert colourless < 40, "the background has a colour"


def test_shapes_keep_their_distance(scenes: list[Scene]) -> None:
    for scene in scenes:
        assert 3 <= len(scene.shapes) <= 6
        centres = [s.centre_x for s in scene.shapes]
        assert min(np.diff(centres)) >= 4, "reading order is in doubt"
        for a, b in itertools.combinations(scene.shapes, 2):
            gap_x = max(a.left, b.left) - min(a.left + a.side, b.left + b.side)
            gap_y = max(a.top, b.top) - min(a.top + a.side, b.top + b.side)
            assert max(gap_x, gap_y) >= 3


def test_scenes_follow_from_the_seed_and_never_repeat(scenes: list[Scene]) -> None:
    assert take(200) == scenes
    assert take(20, seed=1) != scenes[:20] and take(20, split="val") != scenes[:20]
    taken = {scene.key for scene in scenes}
    again = next(sample_scenes(SceneSettings(), 0, "train", taken))
    assert again.key not in {scene.key for scene in scenes}


def test_key_leaves_out_what_does_not_make_another_scene() -> None:
    scene = scene_of(shape("red circle", 5, 5), shape("blue star", 50, 50))
    other_light = Scene(scene.side, scene.shapes, Background(220, (1, 2, 3), 5, 5))
    moved = scene_of(shape("red circle", 6, 5), shape("blue star", 50, 50))
    assert scene.key == other_light.key != moved.key


def test_impossible_requests_are_refused() -> None:
    with pytest.raises(ValueError, match="40 pixels"):
        SceneSettings(40)
    with pytest.raises(ValueError, match="hexagon"):
        shape_glyph("hexagon", 10)
    with pytest.raises(ValueError, match="heldout is 0"):
        SceneDataSettings(heldout=0)
    with pytest.raises(ValueError, match="ask for more held-out scenes"):
        plan_held_out(take(2), SceneDataSettings(questions=1000))


@pytest.mark.parametrize("form", FORMS)
def test_forms_fill_their_box(form: str) -> None:
    glyph = shape_glyph(form, 24)
    assert glyph.any(axis=0).sum() >= 22 and glyph.any(axis=1).sum() >= 22, "all but the tips reach the edges"
    assert (glyph == glyph[:, ::-1]).mean() > 0.97, "left and right differ"


def test_every_family_is_asked_and_ends_in_names(scenes: list[Scene]) -> None:
    rng, seen = random.Random(0), set()
    for scene in scenes:
        for kind, families in find_asks(scene).items():
            for family, asks in families.items():
                for ask in asks:
                    seen.add((kind, family))
                    assert list(ask.targets) == sorted(set(ask.targets)), "not in reading order"
                    assert len(ask.targets) in COUNTS[kind]
                    phrased = ask.phrase(rng, scene)
                    assert not re.search(r"[{}]", phrased.question)
                    if kind != "reasoning":
                        continue
                    pieces = phrased.answer.split(SEG_MARKER)
                    names = [named_shape(words) for words in pieces[:-1]]
                    assert names == [scene.shapes[i].name for i in ask.targets]
                    assert not re.search(r"[{}]", "".join(pieces))
    assert seen == {(kind, family) for kind, families in FAMILIES.items() for family in families}


def test_direct_questions_have_one_meaning_and_a_distractor(scenes: list[Scene]) -> None:
    for scene in scenes:
        for ask in find_asks(scene)["direct"]["name"]:
            (target,) = ask.targets
            assert [s.name for s in scene.shapes].count(scene.shapes[target].name) == 1
            assert has_distractor(scene, target)
    lonely = scene_of(shape("red circle", 5, 5), shape("blue star", 50, 50), shape("green cross", 80, 5))
    assert not find_asks(lonely)["direct"]["name"]


def test_what_is_absent_is_absent(scenes: list[Scene]) -> None:
    rng = random.Random(0)
    for scene in scenes[:50]:
        names = {s.name for s in scene.shapes}
        colours, forms = {s.colour for s in scene.shapes}, {s.form for s in scene.shapes}
        asks = find_asks(scene)["no_target"]
        for ask in asks["absent_name"] + asks["absent_half"]:
            assert named_shape(ask.phrase(rng, scene).question) not in names
        for ask in asks["absent_colour"]:
            assert not any(colour in ask.phrase(rng, scene).question.split() for colour in colours)
        for ask in asks["absent_form"]:
            words = ask.phrase(rng, scene).question.split()
            assert not any(form in words or FORMS[form] in words for form in forms)


def test_relations() -> None:
    scene = scene_of(shape("red circle", 46, 46), shape("blue star", 5, 50), shape("green cross", 90, 40))
    red = next(i for i, s in enumerate(scene.shapes) if s.name == "red circle")
    named = {d: directly(scene, red, d) for d in ("left", "right", "above", "below")}
    assert {d: i if i is None else scene.shapes[i].name for d, i in named.items()} == {
        "left": "blue star",
        "right": "green cross",
        "above": None,
        "below": None,
    }
    askew = scene_of(shape("red circle", 46, 46), shape("blue star", 5, 90))
    assert directly(askew, 1, "left") is None, "neither left nor below"
    rivals = scene_of(shape("red circle", 80, 46), shape("blue star", 5, 30), shape("green cross", 10, 60))
    assert directly(rivals, 2, "left") is None, "two are about as near"


def test_largest_is_clearly_largest(scenes: list[Scene]) -> None:
    close = scene_of(shape("red circle", 5, 5, 20), shape("blue circle", 40, 40, 22), shape("green circle", 80, 80, 12))
    assert extreme_shape(close, [0, 1, 2], largest=True) is None
    assert extreme_shape(close, [0, 1, 2], largest=False) == 2
    for scene in scenes:
        everything = list(range(len(scene.shapes)))
        largest = extreme_shape(scene, everything, largest=True)
        if largest is not None:
            others = [s.area for i, s in enumerate(scene.shapes) if i != largest]
            assert scene.shapes[largest].area >= SIZE_RATIO * max(others)


def test_counts_and_exclusions_mean_what_they_say() -> None:
    scene = scene_of(shape("red circle", 5, 5), shape("red star", 40, 40), shape("blue circle", 80, 80))
    found = find_asks(scene)["reasoning"]
    asked = {ask.phrase(random.Random(i), scene): ask for ask in found["count"] + found["exclusion"] for i in range(30)}
    targets = {p.question: {scene.shapes[i].name for i in ask.targets} for p, ask in asked.items()}
    assert targets["Find the shapes of the colour that appears exactly twice."] == {"red circle", "red star"}
    assert targets["Find the shapes of the form that appears exactly once."] == {"red star"}
    assert targets["Find all circles except the red one."] == {"blue circle"}
    assert targets["Which red shapes are not circles?"] == {"red star"}
    assert targets["Which shapes are not red?"] == {"blue circle"}
    assert "Which shapes are neither red nor circles?" not in targets, "nothing is left"
    answers = {phrased.question: phrased.answer for phrased in asked}
    circles = "c2 red circle skipped, c12 blue circle {seg}"
    every = "c2 red circle skipped, c7 red star skipped, c12 blue circle {seg}"
    assert answers["Find all circles except the red one."] == f"Here, circles not red: {circles}."
    assert answers["Which shapes are not red?"] == f"Here, not red: {every}.", "goes through all that may be meant"


def test_training_draws_long_lists_and_what_is_left_over_often() -> None:
    """Three red shapes, of them two circles: the list of three and that of two are in two piles each, by colour and by
    form; long lists by form, which are hardest, are a third time, and two of one name a second time."""
    shapes = [shape("red circle", 5, 5), shape("red star", 30, 40), shape("red circle", 55, 70)]
    scene = scene_of(*shapes, shape("blue star", 80, 80))
    asks = find_asks(scene)
    piles = training_piles({family: asks["several"][family] for family in ("form", "colour")})
    assert sorted((len(pile), len(pile[0].targets)) for pile in piles) == [(1, 3), (1, 3), (2, 2), (2, 2)]
    crosses = [
        *(shape("red cross", 5 + 30 * i, 5) for i in range(2)),
        shape("blue cross", 5, 60),
        shape("blue star", 40, 60),
    ]
    lists = find_asks(scene_of(*crosses))["several"]
    assert [len(training_piles({family: lists[family]})) for family in ("form", "double")] == [3, 2]
    exclusions = training_piles({"exclusion": asks["reasoning"]["exclusion"]})
    assert sorted(len(pile[0].targets) for pile in exclusions) == [1, 2, 2, 3, 3]
    assert all(len({len(ask.targets) for ask in pile}) == 1 for pile in exclusions)
    assert len(training_piles({"count": asks["reasoning"]["count"]})) == 1


def test_conversations_tell_the_truth_about_places(scenes: list[Scene]) -> None:
    """Places follow a name, or lead it in what is reasoned about; what is read off begins with what was asked for."""
    named = rf"((?:{'|'.join(COLOURS)}) (?:{'|'.join(FORMS)}))"
    pointer, told = re.compile(rf"{named} c(\d+) r(\d+)\b"), re.compile(rf"c(\d+) r(\d+) {named}")
    by_column, by_row = re.compile(rf"c(\d+) {named} r(\d+)\b"), re.compile(rf"r(\d+) {named} c(\d+)\b")
    checked = Counter[str]()
    for number, scene in enumerate(scenes):
        true = {(s.name, int(s.centre_x // 8) + 1, int(s.centre_y // 8) + 1) for s in scene.shapes}
        for question, answer in make_conversation(scene, random.Random(number), 15):
            if question.startswith("Read "):
                found = [(name, int(c), int(r)) for c, name, r in by_column.findall(answer)]
                found += [(name, int(c), int(r)) for r, name, c in by_row.findall(answer)]
            else:
                found = [(name, int(c), int(r)) for name, c, r in pointer.findall(answer)]
                found += [(name, int(c), int(r)) for c, r, name in told.findall(answer)]
            checked["read" if question.startswith("Read ") else "pointed"] += len(found)
            assert set(found) <= true, (question, answer)
    assert len(checked) == 2 and min(checked.values()) > 100


def order(alike: list[Shape], own: Shape) -> str:
    to_the_left, to_the_right = (any(sign * t.centre_x > sign * own.centre_x for t in alike) for sign in (-1, 1))
    return {(0, 0): "only", (0, 1): "first", (1, 0): "last", (1, 1): "between"}[to_the_left, to_the_right]


def test_patches_bear_their_shape_and_its_centre_size_and_place(scenes: list[Scene]) -> None:
    for scene in scenes[:100]:
        words = patch_words(scene, 16)
        lists = [*PATCH_WORDS.values(), *HINTS.values()]
        said = [[names[i] for names, i in zip(lists, patch, strict=True)] for patch in words.T]
        centres = [patch for patch in said if patch[2] != "nothing"]
        colours, forms = Counter(s.colour for s in scene.shapes), Counter(s.form for s in scene.shapes)
        true = [
            [s.colour, s.form, s.size]
            + [f"k{min(colours[s.colour], 5)}", f"f{min(forms[s.form], 5)}", f"n{len(scene.shapes)}"]
            + [f"c{1 + int(s.centre_x // 8)}", f"r{1 + int(s.centre_y // 8)}"]
            + [order([t for t in scene.shapes if t.colour == s.colour], s)]
            + [order([t for t in scene.shapes if t.form == s.form], s)]
            + [next((t.form for t in scene.shapes if t.colour == s.colour and t.centre_x > s.centre_x), "nothing")]
            + [next((t.colour for t in scene.shapes if t.form == s.form and t.centre_x > s.centre_x), "nothing")]
            for s in scene.shapes
        ]
        assert sorted(centres) == sorted(true), "every shape is said once in full: 14 places of 8 pixels along 112"
        coloured, formed = (words[kind].reshape(7, 7) > 0 for kind in (0, 1))
        shown = scene_masks(scene).any(axis=0).reshape(7, 16, 7, 16).any(axis=(1, 3))
        assert not coloured[~shown].any() and (coloured == formed).all()


def test_a_patch_bears_the_shape_that_covers_most_of_it() -> None:
    red, blue = (
        Shape("square", colour, "medium", left, 0, 40, (9, 9, 9)) for colour, left in (("red", 0), ("blue", 43))
    )
    scene = Scene(112, (red, blue), Background(200, (0, 0, 0), 0, 0))
    colours = [PATCH_WORDS["colour"][number] for number in patch_words(scene, 16)[0, 7:14]]
    # Columns 32 to 47 hold 8 of red and 5 of blue; 80 to 95 hold 3 of blue, 0.19 of the patch.
    assert colours == ["red", "red", "red", "blue", "blue", "blue", "nothing"]
    with pytest.raises(ValueError, match="patches of 15 pixels do not tile an image of 112"):
        patch_words(scene, 15)


def test_conversations_tell_the_truth_about_what_is_there(scenes: list[Scene]) -> None:
    exists = re.compile(r"(?:Is there|Do you see|Does the image show) an? (\w+ \w+)(?: in the image)?\?$")
    compares = re.compile(r"Is the (\w+ \w+) (larger|smaller|left of|right of|above|below) (?:than )?the (.*)\?$")
    checked = Counter[str]()
    for number, scene in enumerate((*scenes, *scenes, *scenes)):
        for question, answer in make_conversation(scene, random.Random(number), 15):
            if found := exists.match(question):
                checked["exists"] += 1
                assert answer.startswith("Yes") == (found[1] in {s.name for s in scene.shapes})
            elif found := compares.match(question):
                checked[found[2]] += 1
                first, second = (next(s for s in scene.shapes if s.name == found[i]) for i in (1, 3))
                truth = {
                    "larger": first.area > second.area,
                    "smaller": first.area < second.area,
                    "left of": first.centre_x < second.centre_x,
                    "right of": first.centre_x > second.centre_x,
                    "above": first.centre_y < second.centre_y,
                    "below": first.centre_y > second.centre_y,
                }
                assert answer.startswith("Yes") == truth[found[2]]
            elif found := re.match(r"(?:How many|Count the) (\w+)( shapes)?(?: are there\?|\.)$", question):
                checked["how many"] += 1
                shape_words = [(s.colour, FORMS[s.form], "shapes") for s in scene.shapes]
                count = sum(found[1] in words for words in shape_words)
                assert f" {NUMBERS[count] if count else 'no'} " in answer
    assert len(checked) == 8 and min(checked.values()) > 3


def test_turns_are_short_and_differ(scenes: list[Scene]) -> None:
    for number, scene in enumerate(scenes):
        turns = make_conversation(scene, random.Random(number), 6)
        assert len({question for question, _ in turns}) == 6
        assert max(len(answer.split()) for _, answer in turns) <= 50


def test_corpus_holds_every_word() -> None:
    words = re.compile(r"\w+|[^\w\s]")
    corpus = tokenizer_corpus()
    known = {word for text in corpus for word in words.findall(text)}
    assert corpus == tokenizer_corpus() and SEG_MARKER not in " ".join(corpus)
    assert len(known) < 300
    for number, scene in enumerate(take(150, seed=7)):
        rng = random.Random(number)
        said = [text for turn in make_conversation(scene, rng, 8, more_phrasings=number % 2 == 0) for text in turn]
        asks = [ask for families in find_asks(scene).values() for asks in families.values() for ask in asks]
        for phrased in (ask.phrase(rng, scene) for ask in asks):
            said += [phrased.question, phrased.answer.replace(SEG_MARKER, "")]
        assert {word for text in said for word in words.findall(text)} <= known


def test_words() -> None:
    assert join_list(["a"]) == "a" and join_list(["a", "b"]) == "a and b" and join_list(["a", "b", "c"]) == "a, b and c"
    assert named_shape("the shape left of the blue star is the red circle") == "red circle"
    assert named_shape("the circle that is red") == "red circle"
    assert named_shape("everything") is None


def test_split_exactly() -> None:
    assert split_exactly(10, {"a": 0.35, "b": 0.27, "c": 0.28, "d": 0.10}) == {"a": 3, "b": 3, "c": 3, "d": 1}
    assert split_exactly(1000, {"a": 0.35, "b": 0.27, "c": 0.28, "d": 0.10}) == {"a": 350, "b": 270, "c": 280, "d": 100}
