"""Finding and reading a data set's files without trusting them: every failure is one sentence that names the file."""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image, UnidentifiedImageError

from utils.data.archives import archive_of
from utils.data.errors import DataError

REAL_DATA = "PIXELLM_REALDATA"
"""Environment variable: a folder with real images and weights for tests, benchmarks and one training run."""
OTHER_EDITION = "label map of another edition"
"""Cause of a label map that is none, or that holds labels its data set does not have."""

_MALFORMED = "malformed annotation"

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")

_DIGEST = 16
"""Hexadecimal digits of a content hash that are kept."""

_EXIF_ORIENTATION = 0x0112
_EXIF_TURNED_SIDEWAYS = (5, 6, 7, 8)

FieldType = TypeVar("FieldType")


class DataRoot:
    """The folder that holds all data sets.

    Folders the project names may be links (a mounted coco, say); names found inside annotation files may neither climb
    out nor be absolute, and where links take them must lie in the folder they were looked up in or in the root.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.path = os.fspath(folder)
        if not os.path.isdir(self.path):
            raise DataError(
                f"there is no data root {self.path}; expected a folder laid out as in dataset/README.md: set "
                f"--dataset_dir",
                cause="missing data root",
            )
        self._real_root = os.path.realpath(self.path)
        self._real_folders: dict[str, str] = {}
        self._folders: dict[tuple[str, ...], str] = {}

    def file(self, *parts: str) -> str:
        """Path of a file of the official layout. DataError, with the archive that holds it, when it is not there."""
        path = os.path.join(self.path, *parts)
        if not os.path.isfile(path):
            raise DataError(_missing(path, parts), cause="missing file")
        return path

    def folder(self, *parts: str) -> str:
        """Path of a folder of the official layout. DataError, with the archive that holds it, when it is not there."""
        known = self._folders.get(parts)  # asked for with every sample, and looked up on the disk once
        if known is None:
            known = os.path.join(self.path, *parts)
            if not os.path.isdir(known):
                raise DataError(_missing(known, parts, "the folder "), cause="missing folder")
            self._folders[parts] = known
        return known

    def has(self, *parts: str) -> bool:
        """Whether the official layout's file or folder is there."""
        return os.path.exists(os.path.join(self.path, *parts))

    def resolve_folder(
        self, base: tuple[str, ...], folders: Sequence[str], name: str, named_by: str
    ) -> tuple[str, str]:
        """The folder, and the rest of the name, of an image whose name begins with one of the official `folders`.

        `folders` lie below `base` and may be links of their own (a mounted train2017, say). DataError for a name that
        begins otherwise and for a folder that is not there.
        """
        for folder in folders:
            rest = name.removeprefix(f"{folder}/")
            if rest != name:
                return self.folder(*base, *folder.split("/")), rest
        raise DataError(
            f"{named_by} names the image {name!r}; expected a path that begins with {' or '.join(folders)}: correct "
            f"the file",
            cause="image name outside the known folders",
        )

    def image_path(self, folder: str, name: str, named_by: str) -> str:
        """Path of the image an annotation file calls `name`, inside `folder`.

        DataError when the name leaves the folder (absolute, "..", a link out of the root) or nothing is there;
        `named_by` is the annotation file, for the message.
        """
        path = self.resolve_inside(folder, name, named_by, "the image")
        if not os.path.isfile(path):
            raise DataError(
                f"the image {path}, named by {named_by}, is missing; add it or take its entries out",
                cause="missing image",
            )
        return path

    def resolve_inside(self, folder: str, name: str, named_by: str, what: str) -> str:
        """Path of `name` in `folder`, whether it is there or not; the one place that keeps names inside the root.

        DataError when the name is absolute, climbs up or is a link out of both the folder and the root; `what` is
        "the image" or "the file".
        """
        if not name or "\0" in name or os.path.isabs(name) or ".." in Path(name).parts:
            raise DataError(
                f"{named_by} names {what} {name!r}; expected a path inside {folder}: correct the file",
                cause="path out of the data root",
            )
        path = os.path.join(folder, name)
        if os.sep not in name and not os.path.islink(path):
            return path  # most names are plain, and looking up all folders above takes longer than reading
        real = os.path.realpath(path)
        if not (_is_below(real, self._real_folder(folder)) or _is_below(real, self._real_root)):
            raise DataError(
                f"{path}, named by {named_by}, is a link to {real}, outside the data root {self.path}: put a copy in "
                f"its place",
                cause="path out of the data root",
            )
        return path

    def _real_folder(self, folder: str) -> str:
        known = self._real_folders.get(folder)
        if known is None:
            known = self._real_folders[folder] = os.path.realpath(folder)
        return known


def _missing(path: str, parts: tuple[str, ...], what: str = "") -> str:
    archive = archive_of("/".join(parts))
    source = f"it comes with {archive}: put it there" if archive else "put it there"
    return f"{what}{path} is missing; {source} as dataset/README.md draws it, or set --dataset_dir"


def _is_below(path: str, folder: str) -> bool:
    return path.startswith(folder + os.sep)


def read_bytes(path: str) -> bytes:
    """The whole file. DataError when it cannot be read."""
    try:
        with open(path, "rb") as stream:
            return stream.read()
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: str, error: OSError) -> DataError:
    return DataError(f"{path} cannot be read ({error.strerror}); make it a readable file", cause="unreadable file")


def hash_bytes(content: bytes) -> str:
    """A short content hash, for fingerprints."""
    return hashlib.sha256(content).hexdigest()[:_DIGEST]


def hash_file(path: str) -> str:
    """`hash_bytes` of what the file holds, read piece by piece. DataError when it cannot be read."""
    try:
        with open(path, "rb") as stream:
            hashed = hashlib.sha256()
            while piece := stream.read(1 << 20):
                hashed.update(piece)
            return hashed.hexdigest()[:_DIGEST]
    except OSError as error:
        raise _unreadable(path, error) from error


def parse_json(content: bytes, path: str, encodings: tuple[str, ...] = ("utf-8-sig",)) -> Any:
    """`content` of the file `path` as JSON, in the first of `encodings` that fits; a byte order mark is no harm."""
    text = _decode(content, path, encodings)
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path} is not valid JSON at line {error.lineno}, column {error.colno} ({error.msg}); it may have been "
            f"cut short: fetch it again",
            cause="broken JSON",
        ) from error
    except RecursionError as error:
        raise DataError(
            f"{path} nests deeper than any annotation file does: fetch it again", cause="broken JSON"
        ) from error


def _decode(content: bytes, path: str, encodings: tuple[str, ...]) -> str:
    for encoding in encodings:
        try:
            return content.decode(encoding)
        except UnicodeDecodeError:
            continue
    raise DataError(
        f"{path} is not text in {' or '.join(encodings)}: store it in UTF-8", cause="text in another encoding"
    )


def require(value: Any, kind: type[FieldType], where: str) -> FieldType:
    """`value` if it is a `kind`, else a DataError that says so; `where` names the file and the place in it."""
    if isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    raise DataError(
        f"{where} is {_described(value)}; expected {_KIND_NAMES.get(kind, 'a value')}: correct the file", _MALFORMED
    )


def require_field(record: Any, key: str, kind: type[FieldType], where: str) -> FieldType:
    """`record[key]`, which must be there and be a `kind`; `where` names the file and the record."""
    if not isinstance(record, dict):
        raise DataError(
            f"{where} is {_described(record)}; expected an object with {key!r}: correct the file", _MALFORMED
        )
    if key not in record:
        raise DataError(
            f"{where} has no {key!r}; expected {_KIND_NAMES.get(kind, 'a value')}: correct the file", _MALFORMED
        )
    value = record[key]
    if isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    return require(value, kind, f"{key!r} of {where}")


_KIND_NAMES: dict[type, str] = {list: "a list", dict: "an object", str: "text", int: "a whole number"}


def _described(value: Any) -> str:
    if isinstance(value, bool):
        return "true or false"
    for kind, name in _KIND_NAMES.items():
        if isinstance(value, kind):
            return name
    return "null" if value is None else type(value).__name__


def image_size(path: str) -> tuple[int, int]:
    """(height, width) an image has once its EXIF rotation is applied, from its header. DataError if it is no
    image.
    """
    try:
        with Image.open(path) as image:
            width, height = image.size
            if image.getexif().get(_EXIF_ORIENTATION) in _EXIF_TURNED_SIDEWAYS:
                return width, height
            return height, width
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise _no_image(path, error) from error


def _no_image(path: str, error: Exception) -> DataError:
    return DataError(f"{path} is not an image that can be opened ({error}): replace it", cause="damaged image")


def read_label_map(path: str) -> np.ndarray:
    """A PNG of class numbers as uint8 (H, W). DataError unless it has one 8-bit channel (a palette's indices are
    kept).
    """
    try:
        with Image.open(path) as image:
            labels = np.asarray(image)
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise _no_image(path, error) from error
    if labels.ndim != 2 or labels.dtype != np.uint8:
        raise DataError(
            f"{path} holds {labels.dtype} of shape {labels.shape}; expected one class number of 8 bits per pixel: it "
            f"may belong to another edition of the data set",
            cause=OTHER_EDITION,
        )
    return labels


def read_binary_mask(path: str) -> np.ndarray:
    """An image of any kind as uint8 (H, W): 1 where it is not black. DataError if it is none."""
    try:
        with Image.open(path) as image:
            return (np.asarray(image.convert("L")) > 0).astype(np.uint8)
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise _no_image(path, error) from error


def list_images(folder: str) -> list[str]:
    """Names of the images that lie directly in `folder`, sorted. DataError when it cannot be read."""
    try:
        with os.scandir(folder) as entries:
            return sorted(entry.name for entry in entries if entry.name.lower().endswith(IMAGE_SUFFIXES))
    except OSError as error:
        raise DataError(
            f"the folder {folder} cannot be read ({error.strerror}); make it readable", cause="unreadable file"
        ) from error
