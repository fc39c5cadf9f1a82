"""Mask sources, the careful unpickler, paths that stay inside, and the words of questions."""

import os
import pickle
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_rle

from model.structures import IGNORE_LABEL, SEG_MARKER
from tests.unit.data_sets import HEIGHT, WIDTH, square, write_image
from utils.data.errors import DataError
from utils.data.files import DataRoot, image_size
from utils.data.masks import CocoMask, LabelMask, PaintedMask, UnionMask, parse_coco_mask
from utils.data.readers.pickles import load_plain_pickle
from utils.data.readers.sem_seg.label_map_classes import ADE20K_CLASSES, COCO_STUFF_CLASSES
from utils.data.samples import Target, Turn
from utils.data.templates import join_names, number_word, pick_phrasing, target_name


def source_of(segmentation: object) -> CocoMask:
    found = parse_coco_mask(segmentation, HEIGHT, WIDTH, "it")
    assert found is not None
    return found


def test_overlapping_parts_are_a_union() -> None:
    mask = source_of([square(2, 2, 6), square(5, 5, 6)])()
    assert mask.shape == (HEIGHT, WIDTH) and mask.dtype == np.uint8
    assert mask.max() == 1 and mask.sum() == 36 + 36 - 9
    both = UnionMask((source_of([square(2, 2, 6)]), source_of([square(5, 5, 6)])))
    assert np.array_equal(both(), mask)


def test_run_lengths_compressed_or_not_or_listed_give_the_same_mask() -> None:
    truth = np.zeros((HEIGHT, WIDTH), dtype=np.uint8, order="F")
    truth[3:9, 4:20] = 1
    flat = truth.ravel(order="F")
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flat, [1 - flat[-1]]])))
    counts = np.diff(np.concatenate([[0], edges])).tolist()
    packed = coco_rle.encode(truth)
    size = [HEIGHT, WIDTH]
    for rle in (
        {"size": size, "counts": counts},
        {"size": size, "counts": packed["counts"]},
        {"size": size, "counts": packed["counts"].decode()},
        [{"size": size, "counts": counts}],
    ):
        assert np.array_equal(source_of(rle)(), truth)


def drawn_masks() -> dict[str, np.ndarray]:
    """Masks of every kind: empty, full, single pixels in corners, bars that touch the borders, noise, discs."""
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    masks = {"empty": rows < 0, "full": rows >= 0, "all but the first": rows + columns > 0, "column": columns == 5}
    masks |= {f"corner {r} {c}": (rows == r) & (columns == c) for r in (0, HEIGHT - 1) for c in (0, WIDTH - 1)}
    masks |= {"to the top": rows < 7, "to the bottom": rows >= 7, "two columns": (columns > 3) & (columns < 6)}
    masks |= {f"disc {n}": (rows - 9) ** 2 + (columns - 3 * n) ** 2 < 40 for n in range(6)}
    masks |= {f"noise {n}": rng.random((HEIGHT, WIDTH)) < n / 6 for n in range(1, 6)}
    return masks


@pytest.mark.parametrize("name", drawn_masks())
def test_masks_come_out_as_pycocotools_has_them(name: str) -> None:
    truth = np.asfortranarray(drawn_masks()[name].astype(np.uint8))
    found = source_of(coco_rle.encode(truth))()
    assert np.array_equal(found, truth) and found.dtype == np.uint8 and found.flags.c_contiguous


@pytest.mark.parametrize(
    "counts", [[0, 0, 0, 5], [3, 0, 0, 4], [3, 2, 0, 4], [0, 24, 0, 24], [23, 1, 0, 1], [24, 0, 0, 2]]
)
def test_runs_without_a_pixel(counts: list[int]) -> None:
    counts = [*counts, HEIGHT * WIDTH - sum(counts)]
    written = {"size": [HEIGHT, WIDTH], "counts": counts}
    flat = np.repeat(np.arange(len(counts)) % 2, counts).reshape(WIDTH, HEIGHT).T
    assert np.array_equal(source_of(written)(), flat)


def test_many_outlines_come_out_as_pycocotools_has_them() -> None:
    rng = np.random.default_rng(1)
    for corners in rng.integers(3, 9, size=300):
        outlines = [rng.uniform(-4, 36, size=2 * corners).round(2) for _ in range(rng.integers(1, 4))]
        expected = coco_rle.decode(coco_rle.merge(coco_rle.frPyObjects(outlines, HEIGHT, WIDTH)))
        assert np.array_equal(CocoMask(HEIGHT, WIDTH, tuple(outlines))(), expected)


def test_outlines_and_run_lengths_of_one_target_are_a_union() -> None:
    """Empty masks, whole ones, several outlines, runs without a pixel."""
    rng = np.random.default_rng(2)
    rles = [coco_rle.encode(np.asfortranarray(mask.astype(np.uint8))) for mask in drawn_masks().values()]
    for counts in ([0, 0, 0, 5], [3, 2, 0, 4], [24, 0, 0, 2], [HEIGHT * WIDTH]):
        whole = [*counts, HEIGHT * WIDTH - sum(counts)]
        rles.append(coco_rle.frPyObjects({"size": [HEIGHT, WIDTH], "counts": whole}, HEIGHT, WIDTH))
    for _ in range(300):
        outlines = [rng.uniform(-4, 36, size=2 * rng.integers(3, 9)) for _ in range(rng.integers(0, 3))]
        chosen = rng.choice(len(rles), size=rng.integers(0 if outlines else 1, 3))
        source = CocoMask(HEIGHT, WIDTH, tuple(outlines), tuple(rles[place] for place in chosen))
        parts = [*source.rles, *(coco_rle.frPyObjects([outline], HEIGHT, WIDTH)[0] for outline in outlines)]
        expected = np.maximum.reduce([coco_rle.decode(part) for part in parts])
        assert np.array_equal(source(), expected)


def test_polygons_without_an_inside_are_left_out() -> None:
    # Four numbers would be a box to pycocotools, and a box first makes boxes of all that follow.
    assert source_of([[1, 1, 20, 20], square(2, 2, 5), []])().sum() == 25
    assert parse_coco_mask([[1, 1, 20, 20]], HEIGHT, WIDTH, "it") is None
    assert parse_coco_mask([], HEIGHT, WIDTH, "it") is None
    assert parse_coco_mask([[3, 3] * 5, [1, 1, 4, 4, 9, 9, 2, 2]], HEIGHT, WIDTH, "it") is None
    # A bow's two halves have areas of opposite sign, but an inside all the same.
    assert source_of([[2, 2, 10, 10, 2, 10, 10, 2]])().sum() > 0


def test_pixels_of_a_crowd_are_ignored_but_where_the_thing_is() -> None:
    thing, crowd = source_of([square(2, 2, 6)]), source_of([square(0, 0, 10)])
    mask = UnionMask((thing, thing), (crowd,))()
    assert (mask == 1).sum() == 36 and (mask == IGNORE_LABEL).sum() == 100 - 36


def test_compressed_run_lengths_are_added_up_as_they_decode() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        height, width = (int(side) for side in rng.integers(1, 300, 2))
        blocks = rng.random((height // 7 + 1, width // 7 + 1)) < rng.random()
        mask = np.kron(blocks, np.ones((7, 7))).astype(np.uint8)[:height, :width]
        packed = {"size": [height, width], "counts": coco_rle.encode(np.asfortranarray(mask))["counts"]}
        source = parse_coco_mask(packed, height, width, "it")
        assert source is not None and np.array_equal(source(), mask)


@pytest.mark.parametrize(
    ("segmentation", "said"),
    [
        ([[0, 0, float("nan"), 1, 2, 2]], "not finite"),
        ([[0, 0, 1, 1, 2, 2, 3]], "x0 y0"),
        ([["a", "b"]], "not made of numbers"),
        ([[0, 0, 1e9, 1, 2, 2]], "beyond 1000000 pixels"),
        ([1, 2, 3], "x0 y0"),
        ("abc", "neither polygons nor run lengths"),
        (None, "neither polygons nor run lengths"),
        ({"size": [WIDTH, HEIGHT], "counts": [0, HEIGHT * WIDTH]}, "its image has"),
        ({"size": [HEIGHT, WIDTH], "counts": [5, 5]}, "add up"),
        ({"size": [HEIGHT, WIDTH], "counts": "0"}, "add up"),
        ({"size": [HEIGHT, WIDTH], "counts": b"\xff\xfe"}, "add up"),
        ({"size": [HEIGHT, WIDTH], "counts": "o" * 40 + "0"}, "add up"),
        (
            {"size": [HEIGHT, WIDTH], "counts": coco_rle.encode(np.ones((9, 9), np.uint8, order="F"))["counts"]},
            "add up",
        ),
        ({"size": [HEIGHT, WIDTH], "counts": [-1, HEIGHT * WIDTH + 1]}, "add up"),
        ({"size": [HEIGHT, WIDTH]}, "without counts"),
    ],
)
def test_malformed_segmentations_are_refused(segmentation: object, said: str) -> None:
    with pytest.raises(DataError, match=f"^annotation 3 .*{said}"):
        parse_coco_mask(segmentation, HEIGHT, WIDTH, "annotation 3")


def test_painted_polygons_lie_largest_first_whatever_their_order() -> None:
    large, small = np.array([[2, 2], [12, 2], [12, 12], [2, 12]]), np.array([[4, 4], [7, 4], [7, 7], [4, 7]])
    for polygons, ignored in (((large, small), (False, True)), ((small, large), (True, False))):
        mask = PaintedMask(HEIGHT, WIDTH, polygons, ignored)()
        assert (mask == IGNORE_LABEL).sum() == 16 and (mask == 1).sum() == 121 - 16
    assert PaintedMask(HEIGHT, WIDTH, (), ())().sum() == 0


def test_sources_can_be_pickled() -> None:
    labels = np.arange(6, dtype=np.uint8).reshape(2, 3)
    for source in (
        source_of([square(2, 2, 6)]),
        LabelMask(labels, 2, 0),
        PaintedMask(4, 4, (np.ones((3, 2)),), (False,)),
    ):
        assert np.array_equal(pickle.loads(pickle.dumps(source))(), source())
    assert LabelMask(labels, 2, 0)().tolist() == [[IGNORE_LABEL, 0, 1], [0, 0, 0]]


def test_plain_pickles_are_read_and_others_refused() -> None:
    plain = [
        {"a": (1, 2.5, "x", None, True), "b": np.float64(2.0), "c": np.arange(3), "d": {1, 2}, "e": b"\xff"},
        OrderedDict(z=1),
    ]
    for protocol in (0, 2, 4):
        read = load_plain_pickle(pickle.dumps(plain, protocol=protocol), "refs.p")
        assert read[0]["c"].tolist() == [0, 1, 2] and read[0]["b"] == 2.0 and read[0]["e"] == b"\xff"
        assert read[1]["z"] == 1 and read[0]["d"] == {1, 2}
    # Text as Python 2 wrote it, in protocol 2: in UTF-8, or in latin1.
    assert load_plain_pickle(b"\x80\x02U\x05caf\xc3\xa9.", "refs.p") == "café"
    assert load_plain_pickle(b"\x80\x02U\x04caf\xe9.", "refs.p") == "café"
    for evil in (
        b"cos\nsystem\n(S'true'\ntR.",
        pickle.dumps(os.getcwd),
        pickle.dumps(Path("x")),
        pickle.dumps(eval, protocol=4),
        pickle.dumps(np.load),
        pickle.dumps(range(3)),
        pickle.dumps(1j),
        pickle.dumps(np.random.default_rng(0)),
        b"cnumpy\nload\n(Vx\ntR.",
        b"cbuiltins\ngetattr\n(cnumpy\nndarray\nVdump\ntR.",
        b"cnumpy.core.multiarray\nfromfile\n(Vx\ntR.",
        b"\x82\x01.",
        b"Px\n.",
        b"c_codecs\nencode\n(Vx\nVzlib\ntR.",
    ):
        with pytest.raises(DataError, match=r"^refs\.p is not a pickle of plain data"):
            load_plain_pickle(evil, "refs.p")
    for broken in (b"", pickle.dumps(plain)[:-5], b"not a pickle", b"\x80\x02}."[:-1]):
        with pytest.raises(DataError, match=r"^refs\.p is not a pickle"):
            load_plain_pickle(broken, "refs.p")


def test_images_cannot_leave_the_root(tmp_path: Path) -> None:
    outside = write_image(tmp_path / "outside.jpg")
    elsewhere = tmp_path / "disk" / "images"
    write_image(elsewhere / "a.jpg")
    folder = tmp_path / "root" / "own"
    write_image(folder / "b.jpg")
    (folder / "link.jpg").symlink_to(outside)
    (folder / "twin.jpg").symlink_to(folder / "b.jpg")
    (tmp_path / "root" / "mounted").symlink_to(elsewhere)
    root = DataRoot(tmp_path / "root")
    assert root.image_path(root.folder("own"), "twin.jpg", "x.json").endswith("twin.jpg")
    assert os.path.isfile(root.image_path(root.folder("mounted"), "a.jpg", "x.json"))
    for name in ("../outside.jpg", str(outside), "", "a\0b", "link.jpg"):
        with pytest.raises(DataError, match=r"x\.json"):
            root.image_path(str(folder), name, "x.json")
    with pytest.raises(DataError, match=r"absent\.jpg.*x\.json.*is missing"):
        root.image_path(str(folder), "absent.jpg", "x.json")
    with pytest.raises(DataError, match="no data root"):
        DataRoot(tmp_path / "nowhere")


def test_image_size_follows_the_exif_rotation(tmp_path: Path) -> None:
    image = Image.new("RGB", (30, 20))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.jpg", exif=exif)
    image.save(tmp_path / "upright.jpg")
    assert image_size(str(tmp_path / "turned.jpg")) == (30, 20)
    assert image_size(str(tmp_path / "upright.jpg")) == (20, 30)


def test_names_and_phrasings() -> None:
    assert target_name("cup on the wall, second row.") == "the cup on the wall second row"
    assert target_name("a cup") == "a cup"
    assert target_name(" ?!. ") == ""
    assert [number_word(number) for number in (0, 3, 10, 11, 34)] == ["zero", "three", "ten", "11", "34"]
    assert join_names(["a"]) == "a" and join_names(["a", "b", "c"]) == "a and b and c"
    rng = np.random.default_rng(0)
    targets = tuple(Target(name, lambda: np.zeros((1, 1), np.uint8)) for name in ("the cup", "the tray"))
    for more, expected in ((False, 8), (True, 24)):
        phrasings = {pick_phrasing(rng, more) for _ in range(400)}
        assert len(phrasings) == expected
        assert len({phrasing.asking for phrasing in phrasings}) == expected
    for phrasing in phrasings:
        turn = phrasing.turn(["the cup", "the tray"], targets)
        assert "the cup and the tray" in turn.question and turn.kind == "several"
        assert f"he cup {SEG_MARKER} and the tray {SEG_MARKER}" in turn.answer
        before = turn.answer.split(f"he cup {SEG_MARKER}")[0][:-1].strip()
        assert before.lower().endswith("two:"), "a name must stand behind a punctuation mark, the number before it"
        assert phrasing.turn(["the cup"], targets[:1]).answer.lower().count("two: ") == 0
        none = phrasing.turn(["the cup"], ())
        assert none.kind == "no_target" and SEG_MARKER not in none.answer and "the cup" in none.answer
    with pytest.raises(ValueError, match="marks 1 targets, but 0"):
        Turn("q", f"a {SEG_MARKER}", (), "direct")


def test_class_list() -> None:
    assert len(ADE20K_CLASSES) == len(set(ADE20K_CLASSES)) == 150
    assert [ADE20K_CLASSES[label - 1] for label in (1, 13, 46, 81, 146, 150)] == [
        *("wall", "person", "counter", "bus", "shower", "flag"),
    ]
    assert "" not in ADE20K_CLASSES
    assert len(COCO_STUFF_CLASSES) == len(set(COCO_STUFF_CLASSES)) == 182
    assert [COCO_STUFF_CLASSES[label] for label in (0, 2, 37, 50, 89, 91, 95, 144, 156, 168, 181)] == [
        *("person", "car", "kite", "bowl", "toothbrush", "banner", "building-other", "playing field", "sky", "tree"),
        "wood",
    ]
