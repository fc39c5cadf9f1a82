"""Score a saved PixelLM on questions it did not see, free-running and teacher-forced, by kind of question.

python evaluate.py runs/demo/model --dataset_dir runs/demo/dataset --val_dataset "refcoco|unc|val" --out runs/eval/demo
"""

import json
import sys
import time
from pathlib import Path
from typing import IO, Any

import torch
from PIL import Image

from model.overlay import GalleryItem, draw_gallery
from model.predictor import Predictor
from utils.arguments import EvaluateArguments, parse_evaluate
from utils.data.readers import build_eval_reader
from utils.data.samples import KINDS
from utils.engine.run_card import versions
from utils.evaluation import Scored, evaluate
from utils.scripts import run_script

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
COLUMNS = {
    "n": "n",
    "giou": "gIoU",
    "ciou": "cIoU",
    "giou_teacher_forced": "gIoU, teacher-forced",
    "giou_shuffled": "gIoU, other picture",
    "target_count_accuracy": "count",
    "text_accuracy": "text",
}


class Records:
    """Writes a line per question, and keeps some of every kind for the gallery, one about a picture."""

    def __init__(self, lines: IO[str], wanted: int) -> None:
        self._lines, self._wanted = lines, wanted
        self._kept: dict[str, list[Scored]] = {kind: [] for kind in KINDS}

    def add(self, scored: Scored) -> None:
        """Take in one scored question."""
        self._lines.write(json.dumps(scored.as_dict(), ensure_ascii=False) + "\n")
        kept, path = self._kept[scored.question.turn.kind], scored.question.image_path
        if len(kept) < self._wanted and all(path != other.question.image_path for other in kept):
            kept.append(scored)

    def chosen(self) -> list[Scored]:
        """At most the wanted number, the kinds taking turns."""
        longest = max(len(kept) for kept in self._kept.values())
        turns = [kept[place] for place in range(longest) for kept in self._kept.values() if place < len(kept)]
        return turns[: self._wanted]


def main(argv: list[str] | None = None) -> int:
    """Score as the command line says; returns the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words and not words[0].startswith("-"):
        words = ["--version", *words]
    args = parse_evaluate(words)
    reader = build_eval_reader(args.val_dataset, args.dataset_dir)
    dtype = DTYPES[args.precision] if "precision" in args.given else None
    predictor = Predictor.from_pretrained(args.version, args.device, dtype, args.attn_implementation)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    with (out / "samples.jsonl").open("w", encoding="utf-8") as lines:
        records = Records(lines, args.gallery)
        scores = evaluate(
            predictor,
            reader,
            batch_size=args.batch_size,
            limit=args.limit,
            teacher_forced=args.teacher_forced,
            shuffled=args.shuffled,
            max_new_tokens=args.max_new_tokens,
            on_scored=records.add,
        )
    result = scores | circumstances(args, words, time.perf_counter() - start)
    (out / "results.json").write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if shown := records.chosen():
        Image.fromarray(draw_gallery([card(predictor, scored) for scored in shown])).save(out / "gallery.png")
    print(table(scores))
    print(f"written to {out}: results.json, samples.jsonl{', gallery.png' if shown else ''}")
    return 0


def circumstances(args: EvaluateArguments, words: list[str], seconds: float) -> dict[str, Any]:
    """How the scores came about."""
    return {
        "protocol": "free-running, greedy; the keys that say so are teacher-forced or shuffled",
        "model": args.version,
        "dataset_dir": args.dataset_dir,
        "val_dataset": args.val_dataset,
        "command": ["evaluate.py", *words],
        "versions": versions(),
        "seconds": seconds,
    }


def card(predictor: Predictor, scored: Scored) -> GalleryItem:
    """A scored question as the gallery shows it."""
    turn = scored.question.turn
    return GalleryItem(
        question=turn.question,
        picture=predictor.processor.open_picture(scored.question.image_path),
        true_masks=scored.truths == 1,
        true_names=[target.name for target in turn.targets],
        answer=scored.answer.text,
        masks=scored.answer.masks,
        phrases=scored.answer.phrases,
        note=f"{turn.kind}, IoU {scored.figures.iou:.2f}",
    )


def table(scores: dict[str, Any]) -> str:
    """The scores over all questions and by kind, for a person."""
    kinds = list(scores["n_by_kind"])
    rows = [["kind", *COLUMNS.values()], ["all", *(_number(scores[name]) for name in COLUMNS)]]
    rows += [[kind, *(_number(scores[f"{name}_by_kind"][kind]) for name in COLUMNS)] for kind in kinds]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    )


def _number(value: float | int | None) -> str:
    return "-" if value is None else str(value) if isinstance(value, int) else f"{value:.3f}"


if __name__ == "__main__":
    sys.exit(run_script(main))
