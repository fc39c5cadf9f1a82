"""RefCOCO, RefCOCO+, RefCOCOg, gRefCOCO and RefClef: a phrase refers to one object, to several, or to none.

Layout: refer_seg/<set>/{instances.json, refs(<split_by>).p or grefs(unc).json} over refer_seg/images/….
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from utils.data.coco_json import (
    CocoPicture,
    category_name,
    index_annotations,
    index_categories,
    index_pictures,
    is_crowd,
    note_odd_box,
)
from utils.data.errors import NO_SUCH_SPLIT, DataError
from utils.data.files import DataRoot, digest, expect, parse_json, read_bytes
from utils.data.files import field as json_field
from utils.data.masks import CocoMask, coco_mask
from utils.data.phrase_reader import Asked, PhraseReader
from utils.data.pickles import load_plain_pickle
from utils.data.presence import Part, file_part, folder_part
from utils.data.reader import ReaderOptions
from utils.data.samples import SEG_MARKER, Target
from utils.data.templates import target_name

_FOLDER = "refer_seg"
_TRAIN2014 = ("images", "mscoco", "images", "train2014")
_TRAIN_SPLIT = "train"
_NO_ANNOTATION = -1


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where a referring set lies: its ways of being split, the default first; its refs files; its pictures."""

    split_by: tuple[str, ...]
    refs: tuple[str, ...] = ("refs({}).p",)
    pictures: tuple[str, ...] = _TRAIN2014


REFER_SETS = {
    "refcoco": _Layout(("unc", "google")),
    "refcoco+": _Layout(("unc",)),
    "refcocog": _Layout(("umd", "google")),
    "grefcoco": _Layout(("unc",), refs=("grefs({}).json", "grefs({}).p")),
    "refclef": _Layout(("unc", "berkeley"), pictures=("images", "saiapr_tc-12")),
}


@dataclass(slots=True)
class _Picture:
    """A picture listed in instances.json and what is asked about it."""

    listed: CocoPicture
    asked: list[Asked] = field(default_factory=list)


class ReferSegReader(PhraseReader):
    """One split of a referring set, grouped by picture. `split_by` names the authors of the split (unc, umd,
    google).
    """

    def __init__(
        self, name: str, root: DataRoot, split: str, options: ReaderOptions, split_by: str | None = None
    ) -> None:
        super().__init__(name, split, options)
        layout = REFER_SETS[name]
        refs_path, refs, refs_digest = _read_refs(root, name, split_by or layout.split_by[0])
        instances_path = root.file(_FOLDER, name, "instances.json")
        content = read_bytes(instances_path)
        instances = parse_json(content, instances_path)
        self.fingerprint = f"{refs_digest} {digest(content)}"
        self._root = root
        self._folder = root.folder(_FOLDER, *layout.pictures)
        self._instances_path = instances_path
        self.source = refs_path
        chosen = [ref for ref in refs if json_field(ref, "split", str, f"a ref of {refs_path}") == split]
        if not chosen:
            found = ", ".join(sorted({ref["split"] for ref in refs})) or "none"
            raise DataError(f"{refs_path} has no split {split!r}; it has {found}: name one of these", NO_SUCH_SPLIT)
        if options.exclude_val and split == _TRAIN_SPLIT:
            chosen = self._without_held_out(chosen, root, refs_path)
        self._pictures = self._index(chosen, refs_path, instances)
        self._refuse_if_empty(self._pictures, refs_path)

    def __len__(self) -> int:
        return len(self._pictures)

    def picture(self, index: int) -> str:
        return f"{self._folder}/{self._pictures[index].listed.file_name}"

    def _asked(self, index: int) -> Sequence[Asked]:
        return self._pictures[index].asked

    def _located(self, index: int) -> tuple[str, str]:
        listed = self._pictures[index].listed
        return self._root.picture(self._folder, listed.file_name, self._instances_path), str(listed.number)

    def _without_held_out(self, refs: list[dict[str, Any]], root: DataRoot, refs_path: str) -> list[dict[str, Any]]:
        held_out = _held_out_pictures(root, self.name)
        kept = [ref for ref in refs if json_field(ref, "image_id", int, f"a ref of {refs_path}") not in held_out]
        self.skipped["ref about a picture of a val or test split"] += len(refs) - len(kept)
        return kept

    def _index(self, refs: list[dict[str, Any]], refs_path: str, instances: Any) -> list[_Picture]:
        path = self._instances_path
        wanted = {json_field(ref, "image_id", int, f"a ref of {refs_path}") for ref in refs}
        listed = index_pictures(instances, path, self.skipped, wanted)
        pictures = {number: _Picture(picture) for number, picture in listed.items()}
        names = index_categories(instances, path)
        annotations = index_annotations(instances, path, self.skipped, wanted)
        masks: dict[int, CocoMask | None] = {}
        for ref in refs:
            picture = pictures.get(ref["image_id"])
            if picture is None:
                self.skipped["ref about a picture instances.json does not list"] += 1
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
                if number not in masks:
                    note_odd_box(annotations[number], self.noted)
                    where = f"annotation {number} of {path}"
                    segmentation = json_field(annotations[number], "segmentation", object, where)
                    masks[number] = coco_mask(segmentation, picture.listed.height, picture.listed.width, where)
            sources = [mask for number in ids if (mask := masks[number]) is not None]
            if len(sources) < len(ids):
                self.skipped["ref to an annotation without a polygon that has an inside"] += 1
                continue
            labels = [
                category_name(annotations[number], names, f"annotation {number} of {self._instances_path}")
                for number in ids
            ]
            picture.asked += self._phrases(ref, refs_path, sources, labels)
        return [picture for picture in pictures.values() if picture.asked]

    def _phrases(
        self, ref: dict[str, Any], refs_path: str, sources: list[CocoMask], labels: list[str]
    ) -> Iterator[Asked]:
        where = f"ref {ref.get('ref_id')} of {refs_path}"
        for sentence in json_field(ref, "sentences", list, where):
            text = json_field(sentence, "sent", str, f"a sentence of {where}")
            phrase = target_name(text)
            if not phrase or SEG_MARKER in phrase:
                self.skipped["sentence that is empty or holds a marker"] += 1
                continue
            names = [phrase] if len(sources) == 1 else [target_name(label) for label in labels]
            yield Asked(phrase, tuple(Target(name, mask) for name, mask in zip(names, sources, strict=True)))


def needed_parts(name: str, split_by: str | None = None) -> tuple[Part, ...]:
    """What the referring set `name` is made of, split by the authors `split_by`."""
    layout = REFER_SETS[name]
    return (
        _refs_part(name, split_by or layout.split_by[0]),
        file_part(f"{_FOLDER}/{name}/instances.json"),
        folder_part("/".join((_FOLDER, *layout.pictures))),
    )


def _refs_part(name: str, split_by: str) -> Part:
    layout = REFER_SETS[name]
    if split_by not in layout.split_by:
        raise DataError(f"{name} is split by {' or '.join(layout.split_by)}, not by {split_by!r}: name one of these")
    return file_part(*(f"{_FOLDER}/{name}/{pattern.format(split_by)}" for pattern in layout.refs))


def _read_refs(root: DataRoot, name: str, split_by: str) -> tuple[str, list[dict[str, Any]], str]:
    """Path of the refs file, its refs, its content hash."""
    refs = _refs_part(name, split_by)
    path = root.file(refs.found(root.path) or refs.paths[0])
    content = read_bytes(path)
    loaded = parse_json(content, path) if path.endswith(".json") else load_plain_pickle(content, path)
    found = expect(loaded, list, path)
    for ref in found:
        expect(ref, dict, f"a ref of {path}")
    return path, found, digest(content)


def pictures_by_split(root: DataRoot, name: str, split_by: str) -> dict[str, set[int]]:
    """Picture ids of every split, from the refs alone. DataError where they cannot be read."""
    path, refs, _ = _read_refs(root, name, split_by)
    found: dict[str, set[int]] = {}
    for ref in refs:
        where = f"a ref of {path}"
        found.setdefault(json_field(ref, "split", str, where), set()).add(json_field(ref, "image_id", int, where))
    return found


def _held_out_pictures(root: DataRoot, name: str) -> set[int]:
    """Picture ids of the val and test splits of every referring set in the root that shares `name`'s pictures."""
    held_out: set[int] = set()
    for other, layout in REFER_SETS.items():
        if layout.pictures != REFER_SETS[name].pictures:
            continue
        for split_by in layout.split_by:
            if any(os.path.isfile(os.path.join(root.path, _FOLDER, other, p.format(split_by))) for p in layout.refs):
                path, refs, _ = _read_refs(root, other, split_by)
                held_out |= {
                    json_field(ref, "image_id", int, f"a ref of {path}")
                    for ref in refs
                    if ref.get("split") != _TRAIN_SPLIT
                }
    return held_out


def _annotation_ids(ref: dict[str, Any], refs_path: str) -> list[int]:
    """The annotations a ref refers to: none for −1, one, or several."""
    where = f"ref {ref.get('ref_id')} of {refs_path}"
    found = json_field(ref, "ann_id", object, where)
    ids = [expect(number, int, f"'ann_id' of {where}") for number in (found if isinstance(found, list) else [found])]
    return [number for number in ids if number != _NO_ANNOTATION]
