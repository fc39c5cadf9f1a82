"""Where a data set of one's own lies and which form it has.

<root>/custom/NAME/SPLIT/images/ holds the images. Beside it lies one of: annotations.json (COCO's form, with or
without sentences), annotations.jsonl (conversations, a line each), masks/ (PNGs).
"""

import os
from collections.abc import Sequence

from utils.data.errors import DataError
from utils.data.files import DataRoot
from utils.data.required_files import RequiredPath, required_folder

CUSTOM = "custom"
IMAGES = "images"
COCO_FILE, LINES_FILE, MASKS = "annotations.json", "annotations.jsonl", "masks"


def required_files(name: str, split: str) -> tuple[RequiredPath, ...]:
    """The folders that every form has. DataError when name or split is no plain folder name."""
    folder = f"{CUSTOM}/{_plain(name)}/{_plain(split)}"
    return required_folder(folder), required_folder(f"{folder}/{IMAGES}")


def find_form(root: DataRoot, name: str, split: str, forms: Sequence[str]) -> str:
    """Which of `forms`, files or folders of annotations, is there. DataError unless exactly one is."""
    parts = (CUSTOM, _plain(name), _plain(split))
    folder = root.folder(*parts)
    found = [form for form in forms if root.has(*parts, form)]
    if len(found) != 1:
        raise DataError(
            f"{folder} holds {' and '.join(found) or 'no annotations'}; expected one of {', '.join(forms)}: "
            f"{'take the others away' if found else 'add one, as dataset/README.md draws it'}",
            cause="no annotations" if not found else "annotations in two forms",
        )
    return found[0]


def mask_file(root: DataRoot, folder: str, name: str, named_by: str) -> str:
    """Path of a mask below `folder`. DataError when it leads out of the root or is not there; `named_by` names it."""
    path = root.resolve_inside(folder, name, named_by, "the mask")
    if not os.path.isfile(path):
        raise DataError(
            f"the mask {path}, named by {named_by}, is missing; add it or take its entries out", cause="missing mask"
        )
    return path


def _plain(name: str) -> str:
    if not name or name in {".", ".."} or "/" in name or os.sep in name or "\0" in name:
        raise DataError(
            f"{name!r} names no folder below {CUSTOM}; expected {CUSTOM}|NAME|SPLIT: write plain names of folders"
        )
    return name
