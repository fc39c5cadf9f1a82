"""Small made-up data sets in the official layouts, for the tests of the readers."""

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

HEIGHT, WIDTH = 24, 32
COCO = "refer_seg/images/mscoco/images"


def square(left: int, top: int, side: int) -> list[float]:
    """A square as a COCO polygon; it covers side × side pixels."""
    return [left, top, left + side, top, left + side, top + side, left, top + side]


def write_json(path: Path, content: Any, encoding: str = "utf-8") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, ensure_ascii=False), encoding=encoding)
    return path


def write_image(path: Path, height: int = HEIGHT, width: int = WIDTH) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((height, width, 3), 90, dtype=np.uint8)).save(path)
    return path


def annotation(number: int, image_id: int, polygons: Any, category_id: int = 7, iscrowd: int = 0) -> dict[str, Any]:
    return {
        "id": number,
        "image_id": image_id,
        "category_id": category_id,
        "iscrowd": iscrowd,
        "segmentation": polygons,
    }


def ref(number: int, image_id: int, ann_id: Any, *sentences: str, split: str = "train") -> dict[str, Any]:
    told = [{"sent": sentence, "raw": sentence, "tokens": sentence.split()} for sentence in sentences]
    return {"ref_id": number, "image_id": image_id, "ann_id": ann_id, "split": split, "sentences": told}


def instances() -> dict[str, Any]:
    """Three images; annotations of one that is not listed, of a crowd, and of polygons without an inside."""
    images = [{"id": n, "file_name": f"COCO_{n}.jpg", "height": HEIGHT, "width": WIDTH} for n in (1, 2, 3)]
    return {
        "images": images,
        "categories": [{"id": 7, "name": "cup"}, {"id": 90, "name": "traffic light"}],
        "annotations": [
            annotation(11, 1, [square(2, 2, 6)]),
            annotation(12, 1, [square(10, 2, 6), square(13, 5, 6)], 90),
            annotation(21, 2, [square(4, 4, 8)]),
            annotation(22, 2, {"size": [HEIGHT, WIDTH], "counts": [0, HEIGHT * WIDTH]}, iscrowd=1),
            annotation(31, 3, [[1, 1, 5, 5]]),
            annotation(32, 3, [square(1, 1, 4)]),
            annotation(99, 404, [square(0, 0, 3)]),
        ],
    }


def refs() -> list[dict[str, Any]]:
    return [
        ref(1, 1, 11, "cup on the left", "the left one."),
        ref(2, 1, 12, "a light, high up"),
        ref(3, 2, 21, "big cup"),
        ref(4, 2, 22, "all the cups"),
        ref(5, 3, 31, "nothing to see"),
        ref(6, 3, 32, "small cup", split="val"),
        ref(7, 404, 99, "in an image that is not listed"),
        ref(8, 1, 1000, "to an annotation that is not there"),
    ]


def write_refer_seg(root: Path, name: str = "refcoco", found: Any = None, refs_file: str = "refs(unc).p") -> Path:
    """A referring set; `found` are its refs."""
    folder = root / "refer_seg" / name
    write_json(folder / "instances.json", instances())
    found = refs() if found is None else found
    if refs_file.endswith(".json"):
        write_json(folder / refs_file, found)
    else:
        (folder / refs_file).write_bytes(pickle.dumps(found, protocol=2))
    for number in (1, 2, 3):
        write_image(root / COCO / "train2014" / f"COCO_{number}.jpg")
    return root


def muse_instance(name: str, polygons: Any, **more: Any) -> dict[str, Any]:
    return {"segmentation": polygons, "bbox": [0, 0, 1, 1], "category_id": 1, "category_name": name, **more}


def muse_records() -> list[dict[str, Any]]:
    cup, tray = (
        muse_instance("cup", [square(2, 2, 4)]),
        muse_instance("tray", [square(8, 8, 5)], rephrased_name="blue tray"),
    )
    size = {"height": HEIGHT, "width": WIDTH}
    return [
        {
            "id": 1,
            "file_name": "COCO_1.jpg",
            **size,
            "questions": ["What can I drink from?", "What is needed to serve?", "Count wrongly."],
            "answers": [[cup], [cup, tray], [cup, tray]],
            "text_answers": ["Use the cup {seg}.", None, "Just one {seg}."],
        },
        {
            "id": 2,
            "coco_url": "http://images.cocodataset.org/val2017/0002.jpg",
            **size,
            "questions": ["What carries cups?", "What burns?"],
            "answers": [[tray], []],
        },
        {"id": 3, "file_name": "COCO_3.jpg", **size, "answers": []},
        {"id": 4, "file_name": "COCO_3.jpg", **size, "questions": ["One?", "Two?"], "answers": [[cup]]},
    ]


def write_muse(root: Path, records: Any = None, split: str = "train") -> Path:
    write_json(root / "muse" / f"muse_{split}.json", muse_records() if records is None else records)
    write_image(root / COCO / "train2014" / "COCO_1.jpg")
    write_image(root / COCO / "val2017" / "0002.jpg")
    return root


def message(role: str, text: str) -> dict[str, str]:
    return {"from": role, "value": text}


def vqa_records() -> list[dict[str, Any]]:
    return [
        {
            "id": "1",
            "image": "0001.jpg",
            "conversations": [
                message("human", "<image>\nWhat is it?"),
                message("gpt", "A cup."),
                message("human", "Which colour?"),
                message("gpt", "Blue."),
            ],
        },
        {
            "id": "2",
            "image": "0001.jpg",
            "conversations": [message("human", "Why?\n<image>"), message("gpt", "Because.")],
        },
        {"id": "3", "conversations": [message("human", "No image?"), message("gpt", "None.")]},
        {"id": "4", "image": "0001.jpg", "conversations": [message("gpt", "I begin.")]},
        {"id": "5", "image": "0001.jpg", "conversations": [message("human", "<image>"), message("gpt", "To what?")]},
    ]


def write_vqa(root: Path, records: Any = None) -> Path:
    write_json(root / "llava_dataset" / "llava_instruct_150k.json", vqa_records() if records is None else records)
    write_image(root / "coco" / "train2017" / "0001.jpg")
    return root


MIXED_FOLDERS = ("coco/train2017", "gqa/images", "ocr_vqa/images", "textvqa/train_images", "vg/VG_100K", "vg/VG_100K_2")


def mixed_records() -> list[dict[str, Any]]:
    """A record about an image of each folder, another about the first, and two in words alone."""
    names = [f"{folder}/0001.jpg" for folder in MIXED_FOLDERS]
    asked = [message("human", "<image>\nWhat is it?"), message("gpt", "A cup.")]
    words = [
        message("human", "Who wrote it?"),
        message("gpt", "Nobody."),
        message("human", "When?"),
        message("gpt", "Never."),
    ]
    shown = [{"id": name, "image": name, "conversations": asked} for name in [*names, names[0]]]
    return [*shown[:3], {"id": "w", "conversations": words}, *shown[3:], {"id": "v", "conversations": words[:2]}]


def write_mixed(root: Path, records: Any = None) -> Path:
    write_json(root / "llava_dataset" / "llava_v1_5_mix665k.json", mixed_records() if records is None else records)
    for folder in MIXED_FOLDERS:
        write_image(root / folder / "0001.jpg")
    return root


def shape(label: str, *points: tuple[float, float]) -> dict[str, Any]:
    return {"label": label, "points": [list(point) for point in points], "shape_type": "polygon"}


def corners(left: int, top: int, side: int) -> tuple[tuple[int, int], ...]:
    return (left, top), (left + side, top), (left + side, top + side), (left, top + side)


def reason_record(*texts: str, is_sentence: bool = True) -> dict[str, Any]:
    shapes = [
        shape("target", *corners(12, 12, 3)),
        shape("ignore_part", *corners(4, 4, 4)),
        shape("target", *corners(2, 2, 8)),
        shape("flag", (0, 0), (31, 0), (31, 23)),
        shape("target", (0, 0), (5, 5)),
    ]
    return {"text": list(texts), "is_sentence": is_sentence, "shapes": shapes}


def write_reason_seg(root: Path, split: str = "train", record: Any = None, encoding: str = "utf-8") -> Path:
    folder = root / "reason_seg" / "ReasonSeg" / split
    write_json(folder / f"{split}_a.json", record or reason_record("What would Zoë’s café need?"), encoding)
    write_image(folder / f"{split}_a.jpg")
    return root


def write_ade20k(root: Path, labels: np.ndarray | None = None, folder: str = "training") -> Path:
    if labels is None:
        labels = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
        labels[:10], labels[10:16], labels[16:20] = 1, 3, 150
    write_image(root / "ade20k" / "images" / folder / "ADE_1.jpg")
    (root / "ade20k" / "annotations" / folder).mkdir(parents=True, exist_ok=True)
    Image.fromarray(labels).save(root / "ade20k" / "annotations" / folder / "ADE_1.png")
    return root


def write_labels(path: Path, labels: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(labels).save(path)
    return path


def striped(*stripes: tuple[int, int], rest: int = 255) -> np.ndarray:
    """A label map of (label, rows) from the top; the rows below have `rest`."""
    labels = np.full((HEIGHT, WIDTH), rest, dtype=np.uint8)
    top = 0
    for label, rows in stripes:
        labels[top : top + rows] = label
        top += rows
    return labels


def write_cocostuff(root: Path, labels: np.ndarray | None = None) -> Path:
    """Sky, a wall that is "other", a person, and unlabelled pixels."""
    write_image(root / "coco/train2017/0001.jpg")
    write_labels(
        root / "cocostuff/train2017/0001.png", striped((156, 10), (172, 5), (0, 3)) if labels is None else labels
    )
    return root


MAPILLARY_LABELS = [
    {"name": "nature--sky", "readable": "Sky", "evaluate": True},
    {"name": "marking--discrete--stop-line", "readable": "Lane Marking - Stop Line", "evaluate": True},
    {"name": "object--sign--ambiguous", "readable": "Ambiguous Sign", "evaluate": True},
    {"name": "object--traffic-sign--back", "readable": "Traffic Sign (Back)"},
    {"name": "object--bench", "readable": "Bench", "evaluate": False},
    {"name": "void--unlabeled", "readable": "Unlabeled", "evaluate": False},
]


def write_mapillary(root: Path, config: str = "config_v2.0.json", labels: str = "v2.0/labels", label: int = 1) -> Path:
    """Sky, rows of `label`, an ambiguous sign, a bench that does not count, and nothing."""
    write_json(root / "mapillary" / config, {"labels": MAPILLARY_LABELS, "version": "2.0"})
    write_image(root / "mapillary/training/images/a.jpg")
    write_labels(
        root / "mapillary/training" / labels / "a.png", striped((0, 6), (label, 4), (2, 3), (3, 2), (4, 1), rest=5)
    )
    return root


def rle(mask: np.ndarray) -> dict[str, Any]:
    """Uncompressed run lengths of a mask (H, W)."""
    flat = mask.astype(np.uint8).ravel(order="F")
    edges = np.flatnonzero(np.diff(flat)) + 1
    runs = np.diff(np.concatenate([[0], edges, [flat.size]])).tolist()
    return {"size": list(mask.shape), "counts": [0, *runs] if flat[0] else runs}


def parts(images: dict[int, str], categories: dict[int, str]) -> dict[str, Any]:
    """Annotations of two images in COCO's form, of categories 3 (a thing), 8 and 40 (its parts, numbered alike)."""
    crowd = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    crowd[0:12, 0:16] = 1
    sizes = {"height": HEIGHT, "width": WIDTH}
    return {
        "images": [{"id": number, "file_name": name, **sizes} for number, name in images.items()],
        "categories": [{"id": number, "name": name} for number, name in categories.items()],
        "annotations": [
            annotation(1, 5, [square(2, 2, 6), square(5, 5, 6)], 3),
            annotation(2, 5, [square(20, 2, 4)], 3),
            annotation(3, 5, rle(crowd), 3, iscrowd=1),
            annotation(4, 5, [square(2, 2, 3)], 8),
            annotation(5, 5, [square(4, 4, 3)], 40),
            annotation(6, 5, [[1, 1, 5, 5]], 8),
            annotation(7, 5, [[1, 1, 5, 5, 9, 9]], 8),
            annotation(8, 6, rle(crowd), 3, iscrowd=1),
            annotation(9, 6, [], 8),
            annotation(10, 404, [square(0, 0, 3)], 3),
        ],
    }


PART_IMAGES = {
    "pascal_part": ("vlpart/pascal_part/VOCdevkit/VOC2010/JPEGImages", "2008_1.jpg"),
    "paco_lvis": ("coco", "train2017/0001.jpg"),
    "partimagenet": ("vlpart/partimagenet/train", "n01_1.jpg"),
}
PART_FILES = {
    "pascal_part": "vlpart/pascal_part/train.json",
    "paco_lvis": "vlpart/paco/annotations/paco_lvis_v1_train.json",
    "partimagenet": "vlpart/partimagenet/train.json",
}
PART_CATEGORIES = {
    "pascal_part": {3: "cow", 8: "cow:lfleg", 40: "cow:lfleg_2"},
    "paco_lvis": {3: "mouse_(computer_equipment)", 8: "mouse_(computer_equipment):left_button", 40: "can:inner_body"},
    "partimagenet": {3: "Car", 8: "Car Side Mirror", 40: "Bicycle Tier"},
}


def write_parts(root: Path, name: str = "pascal_part", content: Any = None) -> Path:
    folder, image = PART_IMAGES[name]
    images = {5: image, 6: image.replace("1.jpg", "2.jpg")}
    for file in images.values():
        write_image(root / folder / file)
    write_json(root / PART_FILES[name], parts(images, PART_CATEGORIES[name]) if content is None else content)
    return root
