"""Answers written down: COCO's run lengths and JSON."""

import json

import numpy as np
from pycocotools import mask as coco

from model.answers import Answer, encode_rle, mask_box


def read(rle: dict) -> np.ndarray:
    return coco.decode({"size": rle["size"], "counts": rle["counts"].encode()}).astype(bool)


def test_run_lengths_by_hand() -> None:
    # Down the columns: 0, 1 | 1, 0 | 1, 1: runs of 1, 2, 1, 2. From the third on less the run two before: 1, 2, 1, 0
    # (the third has none two before it that counts: 1 - 1 is not taken of the first).
    mask = np.array([[0, 1, 1], [1, 0, 1]], dtype=bool)
    assert encode_rle(mask) == {"size": [2, 3], "counts": "1210"}
    assert encode_rle(np.ones((2, 2), bool)) == {"size": [2, 2], "counts": "04"}
    assert encode_rle(np.zeros((2, 2), bool)) == {"size": [2, 2], "counts": "4"}


def test_an_answer_as_json() -> None:
    masks = np.zeros((2, 4, 5), bool)
    masks[0, 1:3, 2:4] = True
    answer = Answer(
        "an “é” and b",
        "an “é” {seg} and b {seg}",
        ["an “é”", "b"],
        masks,
        [0.75, 0.0],
        [mask_box(m) for m in masks],
        [4, 0],
        1,
    )
    line = answer.to_json()
    assert "\n" not in line and "é" in line
    told = json.loads(line)
    assert told == answer.to_dict()
    assert [(one["phrase"], one["score"], one["box"], one["area"]) for one in told["targets"]] == [
        ("an “é”", 0.75, [2, 1, 4, 3], 4),
        ("b", 0.0, [0, 0, 0, 0], 0),
    ]
    assert np.array_equal(read(told["targets"][0]["segmentation"]), masks[0])
    assert (told["text"], told["marked_text"], told["num_broken"]) == (answer.text, answer.marked_text, 1)
