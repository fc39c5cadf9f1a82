"""Answers as files: the overlay, a mask for each target, and the words."""

from pathlib import Path

import numpy as np
from PIL import Image

from model.answers import Answer
from model.overlay import draw_overlay
from utils.cli.errors import UserError
from utils.serving.terminal import one_line

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def check_image_name(target: Path, flag: str) -> None:
    """UserError when the overlay's file is not one of an image."""
    if target.suffix.lower() not in IMAGE_SUFFIXES:
        raise UserError(f"{flag} {target} is no image file: give a name that ends in {', '.join(IMAGE_SUFFIXES)}")


def choose_free_name(folder: Path, image: str) -> Path:
    """A file in `folder`, named after the image, that is not there yet."""
    stem, number = Path(image).stem or "image", 1
    while (folder / f"{stem}_{number}.png").exists():
        number += 1
    return folder / f"{stem}_{number}.png"


def name_mask_files(target: Path, count: int) -> list[Path]:
    """The files of an answer's masks beside that of its overlay."""
    return [target.with_name(f"{target.stem}_mask{number}.png") for number in range(1, count + 1)]


def write_answer(target: Path, image: np.ndarray, answer: Answer) -> None:
    """The overlay into `target` and the masks (0 and 255) beside it; UserError when they cannot be written."""
    files = name_mask_files(target, len(answer.masks))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw_overlay(image, answer.masks, answer.phrases)).save(target)
        for file, mask in zip(files, answer.masks, strict=True):
            Image.fromarray(mask).convert("L").save(file)
    except (OSError, ValueError) as error:  # ValueError: a name with a null byte in it
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot write {target}: {reason}; choose another place") from error


def describe_targets(answer: Answer, target: Path | None) -> list[str]:
    """A line for each mask, and one for broken groups. target: the overlay's file, where there is one."""
    files: list[Path | None] = [*name_mask_files(target, len(answer.masks))] if target else [None] * len(answer.masks)
    lines = []
    rows = zip(files, answer.phrases, answer.boxes, answer.areas, answer.scores, strict=True)
    for number, (file, phrase, box, area, score) in enumerate(rows, start=1):
        share = 100 * area / answer.masks[0].size
        where = f", mask {file}" if file else ""
        lines.append(
            f"  {number}. {one_line(phrase) or '(unnamed)'}: box {list(box)}, area {area} px ({share:.1f}%), "
            f"score {score:.3f}{where}"
        )
    if answer.num_broken:
        lines.append(f"  {answer.num_broken} broken seg group(s) gave no mask")
    return lines
