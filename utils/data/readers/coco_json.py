"""Annotation files in COCO's form: images, categories and annotations by their ids, which may have holes.

Real files list things twice and hold annotations of images they do not list; both are counted and do no harm.
"""

from collections import Counter
from collections.abc import Container
from dataclasses import dataclass
from typing import Any

from utils.data.errors import EMPTY_CLASS_LIST, DataError
from utils.data.files import require_field

TWICE_A_IMAGE = "image id listed twice for different images"
ODD_BOX = "box of negative size (masks are read, boxes are not)"
TWICE_AN_ANNOTATION = "annotation id listed twice for different annotations"


@dataclass(frozen=True, slots=True)
class CocoImage:
    """An image as "images" lists it: its name inside the images' folder and its size in pixels."""

    number: int
    file_name: str
    height: int
    width: int
    record: dict[str, Any]


def index_images(
    content: Any, path: str, skipped: Counter[str], wanted: Container[int] | None = None
) -> dict[int, CocoImage]:
    """The images of the file `path` by id, only the `wanted` ones if given, in the file's order.

    An id that stands for two different images is left out and counted in `skipped`. DataError for anything malformed.
    """
    images: dict[int, CocoImage] = {}
    ambiguous = set()
    for record in require_field(content, "images", list, path):
        number = require_field(record, "id", int, f"an image of {path}")
        if wanted is not None and number not in wanted:
            continue
        if number in images and images[number].record != record:
            ambiguous.add(number)
            continue
        where = f"image {number} of {path}"
        name = require_field(record, "file_name", str, where)
        height, width = (require_field(record, side, int, where) for side in ("height", "width"))
        images[number] = CocoImage(number, name, height, width, record)
    if ambiguous:
        skipped[TWICE_A_IMAGE] += len(ambiguous)
    return {number: image for number, image in images.items() if number not in ambiguous}


def index_categories(content: Any, path: str) -> dict[int, str]:
    """Names by id, in the file's order. DataError when there is none, one id has two names, or a name is empty."""
    names: dict[int, str] = {}
    for record in require_field(content, "categories", list, path):
        number = require_field(record, "id", int, f"a category of {path}")
        name = require_field(record, "name", str, f"category {number} of {path}").strip()
        if not name or names.get(number, name) != name:
            raise DataError(
                f"category {number} of {path} is called {name!r}, and {names.get(number)!r} before; expected one name: "
                f"correct the file"
            )
        names[number] = name
    if not names:
        raise DataError(f"{path} lists no category; expected at least one: correct the file", EMPTY_CLASS_LIST)
    return names


def index_annotations(
    content: Any, path: str, skipped: Counter[str], wanted: Container[int]
) -> dict[int, dict[str, Any]]:
    """The annotations of the `wanted` images by id.

    An id that stands for two different annotations is left out and counted in `skipped`. DataError for anything
    malformed.
    """
    where = f"an annotation of {path}"
    annotations: dict[int, dict[str, Any]] = {}
    ambiguous = set()
    for record in require_field(content, "annotations", list, path):
        number = require_field(record, "id", int, where)
        if require_field(record, "image_id", int, where) not in wanted:
            continue
        if number in annotations and annotations[number] != record:
            ambiguous.add(number)
        annotations[number] = record
    if ambiguous:
        skipped[TWICE_AN_ANNOTATION] += len(ambiguous)
    return {number: record for number, record in annotations.items() if number not in ambiguous}


def category_name(annotation: dict[str, Any], names: dict[int, str], where: str) -> str:
    """The name of an annotation's category. DataError, starting with `where`, when "categories" does not list it."""
    number = require_field(annotation, "category_id", int, where)
    if number not in names:
        raise DataError(
            f"{where} has category {number}, which 'categories' does not list: correct the file", "unlisted category"
        )
    return names[number]


def note_odd_box(record: dict[str, Any], noted: Counter[str]) -> None:
    """Count a box of negative or no finite size; boxes are not read, masks are."""
    box = record.get("bbox")
    if isinstance(box, list) and any(not isinstance(side, int | float) or not side >= 0 for side in box[2:4]):
        noted[ODD_BOX] += 1


def is_crowd(annotation: dict[str, Any]) -> bool:
    """Whether the annotation marks a region in which things are not told apart, or one to ignore."""
    return bool(annotation.get("iscrowd") or annotation.get("ignore"))
