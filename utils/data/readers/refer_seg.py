"""RefCOCO, RefCOCO+, RefCOCOg, gRefCOCO and RefClef: a phrase refers to one object, to several, or to none.

Layout: refer_seg/<set>/{instances.json, refs(<split_by>).p or grefs(unc).json} over refer_seg/images/….
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from model.structures import SEG_MARKER
from utils.data.errors import NO_SUCH_SPLIT, DataError
from utils.data.files import DataRoot, parse_json, read_bytes, require
from utils.data.files import require_field as json_field
from utils.data.masks import PlainMask, mask_from_plain, parse_coco_mask
from utils.data.readers.base import ReaderOptions
from utils.data.readers.coco_json import (
    CocoImage,
    category_name,
    index_annotations,
    index_categories,
    index_images,
    is_crowd,
    note_odd_box,
)
from utils.data.readers.phrase_reader import PhraseReader, RequestedPhrase
from utils.data.readers.pickles import load_plain_pickle
from utils.data.required_files import RequiredPath, required_file, required_folder
from utils.data.samples import Target
from utils.data.templates import target_name

_FOLDER = "refer_seg"
_TRAIN2014 = ("images", "mscoco", "images", "train2014")
_TRAIN_SPLIT = "train"
_NO_ANNOTATION = -1

_RECORDS = 1
"""Layout of the index."""

_PlainAsked = tuple[str, tuple[tuple[str, int], ...]]
"""A phrase; the name and the number of the mask of each thing it refers to."""
_Record = tuple[str, int, tuple[PlainMask, ...], tuple[_PlainAsked, ...]]
"""File and number of an image, its masks, what is asked about it."""


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where a referring set lies: its ways of being split, the default first; its refs files; its images."""

    split_by: tuple[str, ...]
    refs: tuple[str, ...] = ("refs({}).p",)
    images: tuple[str, ...] = _TRAIN2014


REFER_SETS = {
    "refcoco": _Layout(("unc", "google")),
    "refcoco+": _Layout(("unc",)),
    "refcocog": _Layout(("umd", "google")),
    "grefcoco": _Layout(("unc",), refs=("grefs({}).json", "grefs({}).p")),
    "refclef": _Layout(("unc", "berkeley"), images=("images", "saiapr_tc-12")),
}


class _Image:
    """An image listed in instances.json and what is asked about it, while it is gathered."""

    def __init__(self, listed: CocoImage) -> None:
        self.listed = listed
        self.masks: dict[int, PlainMask | None] = {}
        self.asked: list[tuple[str, list[tuple[str, int]]]] = []

    def record(self) -> _Record:
        """Only masks that are asked for are kept, by their place."""
        used = dict.fromkeys(number for _, targets in self.asked for _, number in targets)
        places = {number: place for place, number in enumerate(used)}
        masks = tuple(mask for number in used if (mask := self.masks[number]) is not None)
        asked = tuple((said, tuple((name, places[number]) for name, number in targets)) for said, targets in self.asked)
        return self.listed.file_name, self.listed.number, masks, asked


class ReferSegReader(PhraseReader):
    """One split of a referring set, grouped by image. `split_by` names the authors of the split (unc, umd,
    google).
    """

    def __init__(
        self, name: str, root: DataRoot, split: str, options: ReaderOptions, split_by: str | None = None
    ) -> None:
        super().__init__(name, split, options)
        layout = REFER_SETS[name]
        split_by = split_by or layout.split_by[0]
        self.source = _refs_path(root, name, split_by)
        self._instances_path = root.file(_FOLDER, name, "instances.json")
        self._root = root
        self._folder = root.folder(_FOLDER, *layout.images)
        self._excluding = _held_out_refs(root, name) if options.exclude_val and split == _TRAIN_SPLIT else []
        self._images: Sequence[_Record] = self._index(
            root,
            [self.source, self._instances_path, *self._excluding],
            self._parse,
            _RECORDS,
            f"{split_by}-excluding-held-out" if self._excluding else split_by,
        )
        self._refuse_if_empty(self._images, self.source)

    def __len__(self) -> int:
        return len(self._images)

    def image_path(self, index: int) -> str:
        return f"{self._folder}/{self._images[index][0]}"

    def _requested_phrases(self, index: int) -> Sequence[RequestedPhrase]:
        _, _, plain, asked = self._images[index]
        masks = [mask_from_plain(one) for one in plain]
        return [
            RequestedPhrase(said, tuple(Target(name, masks[place]) for name, place in targets))
            for said, targets in asked
        ]

    def _locate(self, index: int) -> tuple[str, str]:
        file_name, number, _, _ = self._images[index]
        return self._root.image_path(self._folder, file_name, self._instances_path), str(number)

    def _parse(self) -> Iterator[_Record]:
        path, split = self.source, self.split
        refs = _read_refs(path)
        chosen = [ref for ref in refs if json_field(ref, "split", str, f"a ref of {path}") == split]
        if not chosen:
            found = ", ".join(sorted({ref["split"] for ref in refs})) or "none"
            raise DataError(f"{path} has no split {split!r}; it has {found}: name one of these", NO_SUCH_SPLIT)
        if self._excluding:
            chosen = self._drop_held_out(chosen, path)
        instances = parse_json(read_bytes(self._instances_path), self._instances_path)
        for image in self._group_by_image(chosen, path, instances):
            if image.asked:
                yield image.record()

    def _drop_held_out(self, refs: list[dict[str, Any]], refs_path: str) -> list[dict[str, Any]]:
        held_out = _held_out_images(self._excluding)
        kept = [ref for ref in refs if json_field(ref, "image_id", int, f"a ref of {refs_path}") not in held_out]
        self.skipped["ref about an image of a val or test split"] += len(refs) - len(kept)
        return kept

    def _group_by_image(self, refs: list[dict[str, Any]], refs_path: str, instances: Any) -> Iterable[_Image]:
        path = self._instances_path
        wanted = {json_field(ref, "image_id", int, f"a ref of {refs_path}") for ref in refs}
        listed = index_images(instances, path, self.skipped, wanted)
        images = {number: _Image(image) for number, image in listed.items()}
        names = index_categories(instances, path)
        annotations = index_annotations(instances, path, self.skipped, wanted)
        for ref in refs:
            image = images.get(ref["image_id"])
            if image is None:
                self.skipped["ref about an image instances.json does not list"] += 1
                continue
            ids = _annotation_ids(ref, refs_path)
            unknown = [number for number in ids if number not in annotations]
            if unknown:
                self.skipped["ref to an annotation instances.json does not hold"] += 1
                continue
            if any(is_crowd(annotations[number]) for number in ids):
                self.skipped["ref to a crowd"] += 1
                continue
            for number in ids:
                if number not in image.masks:
                    image.masks[number] = self._mask(annotations[number], image.listed)
            if any(image.masks[number] is None for number in ids):
                self.skipped["ref to an annotation without a polygon that has an inside"] += 1
                continue
            labels = [category_name(annotations[number], names, f"annotation {number} of {path}") for number in ids]
            for phrase in self._phrases(ref, refs_path):
                said = [phrase] if len(ids) == 1 else [target_name(label) for label in labels]
                image.asked.append((phrase, list(zip(said, ids, strict=True))))
        return images.values()

    def _mask(self, annotation: dict[str, Any], listed: CocoImage) -> PlainMask | None:
        note_odd_box(annotation, self.noted)
        where = f"annotation {annotation['id']} of {self._instances_path}"
        source = parse_coco_mask(
            json_field(annotation, "segmentation", object, where), listed.height, listed.width, where
        )
        return None if source is None else source.to_plain()

    def _phrases(self, ref: dict[str, Any], refs_path: str) -> Iterator[str]:
        where = f"ref {ref.get('ref_id')} of {refs_path}"
        for sentence in json_field(ref, "sentences", list, where):
            text = json_field(sentence, "sent", str, f"a sentence of {where}")
            phrase = target_name(text)
            if not phrase or SEG_MARKER in phrase:
                self.skipped["sentence that is empty or holds a marker"] += 1
                continue
            yield phrase


def required_files(name: str, split_by: str | None = None) -> tuple[RequiredPath, ...]:
    """What the referring set `name` is made of, split by the authors `split_by`."""
    layout = REFER_SETS[name]
    return (
        _refs_part(name, split_by or layout.split_by[0]),
        required_file(f"{_FOLDER}/{name}/instances.json"),
        required_folder("/".join((_FOLDER, *layout.images))),
    )


def _refs_part(name: str, split_by: str) -> RequiredPath:
    layout = REFER_SETS[name]
    if split_by not in layout.split_by:
        raise DataError(f"{name} is split by {' or '.join(layout.split_by)}, not by {split_by!r}: name one of these")
    return required_file(*(f"{_FOLDER}/{name}/{pattern.format(split_by)}" for pattern in layout.refs))


def _refs_path(root: DataRoot, name: str, split_by: str) -> str:
    refs = _refs_part(name, split_by)
    return root.file(refs.find(root.path) or refs.paths[0])


def _read_refs(path: str) -> list[dict[str, Any]]:
    content = read_bytes(path)
    loaded = parse_json(content, path) if path.endswith(".json") else load_plain_pickle(content, path)
    found = require(loaded, list, path)
    for ref in found:
        require(ref, dict, f"a ref of {path}")
    return found


def images_by_split(root: DataRoot, name: str, split_by: str) -> dict[str, set[int]]:
    """Image ids of every split, from the refs alone. DataError where they cannot be read."""
    path = _refs_path(root, name, split_by)
    found: dict[str, set[int]] = {}
    for ref in _read_refs(path):
        where = f"a ref of {path}"
        found.setdefault(json_field(ref, "split", str, where), set()).add(json_field(ref, "image_id", int, where))
    return found


def _held_out_refs(root: DataRoot, name: str) -> list[str]:
    """The refs files of every referring set in the root that shares `name`'s images."""
    parts = [
        _refs_part(other, split_by)
        for other, layout in REFER_SETS.items()
        if layout.images == REFER_SETS[name].images
        for split_by in layout.split_by
    ]
    return [root.file(found) for part in parts if (found := part.find(root.path)) is not None]


def _held_out_images(paths: Sequence[str]) -> set[int]:
    """Image ids of the val and test splits of these refs files."""
    return {
        json_field(ref, "image_id", int, f"a ref of {path}")
        for path in paths
        for ref in _read_refs(path)
        if ref.get("split") != _TRAIN_SPLIT
    }


def _annotation_ids(ref: dict[str, Any], refs_path: str) -> list[int]:
    """The annotations a ref refers to: none for −1, one, or several."""
    where = f"ref {ref.get('ref_id')} of {refs_path}"
    found = json_field(ref, "ann_id", object, where)
    ids = [require(number, int, f"'ann_id' of {where}") for number in (found if isinstance(found, list) else [found])]
    return [number for number in ids if number != _NO_ANNOTATION]
