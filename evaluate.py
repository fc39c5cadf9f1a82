"""Score a saved PixelLM on questions it did not see, by protocol and by kind of question; compare and quote scores.

python evaluate.py runs/demo/model --dataset_dir runs/demo/dataset --val_dataset "refcoco|unc|val" --out runs/eval/demo
python evaluate.py --compare runs/eval/demo runs/eval/other
python evaluate.py --table runs/eval/demo
"""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from model.overlay import GalleryItem, draw_gallery, draw_overlay
from model.predictor import Answer, Predictor
from utils.arguments import EvaluateArguments, parse_evaluate
from utils.data.readers import EvalReader, build_eval_reader
from utils.engine.run_card import versions
from utils.evaluation import Scored, evaluate
from utils.scoreboard import write_json
from utils.scores import fingerprints, pages
from utils.scores.compare import compare_folders
from utils.scores.figures import Figures
from utils.scores.lines import SAMPLES, Lines
from utils.scores.protocols import RELEASE
from utils.scores.results import RESULTS, protocol_facts, read_results, with_intervals
from utils.scores.tables import quotable, score_table
from utils.scripts import note, run_script

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SETTINGS = ("batch_size", "limit", "max_new_tokens", "shuffled", "precision", "attn_implementation", "device")


@dataclass(frozen=True)
class AnswerWithLogits(Answer):
    """logits: float32 (Q, H, W), what the masks were made of."""

    logits: np.ndarray


class LogitPredictor(Predictor):
    """Answers keep the logits of their masks, which the release's loops count."""

    def _to_answer(self, turns: Sequence[list[int]], logits_QHW: torch.Tensor) -> AnswerWithLogits:
        return AnswerWithLogits(**vars(super()._to_answer(turns, logits_QHW)), logits=logits_QHW.float().cpu().numpy())


def main(argv: list[str] | None = None) -> int:
    """Score, compare or quote as the command line says; returns the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    args = parse_evaluate(words)
    if args.compare:
        print(compare_folders(*args.compared()))
    elif args.table:
        print("\n\n".join(quotable(read_results(Path(args.table)))))
    else:
        score(args, words)
    return 0


def score(args: EvaluateArguments, words: list[str]) -> None:
    """Ask every question and write what came of it into --out."""
    reader = build_eval_reader(args.val_dataset, args.dataset_dir)
    dtype = DTYPES[args.precision] if "precision" in args.given else None
    kind = LogitPredictor if RELEASE in args.protocols() else Predictor
    predictor = kind.from_pretrained(args.version, args.device, dtype, args.attn_implementation)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    facts = circumstances(args, words, reader)
    start = time.perf_counter()
    shown, chosen = pages.ByKind(args.gallery), pages.Chosen()
    figures: list[Figures] = []
    with Lines(out, {name: value for name, value in facts.items() if name != "command"}) as lines:
        if lines.earlier:
            note(f"evaluate.py: {len(lines.earlier)} questions were scored before an earlier run ended: going on there")

        def keep(scored: Scored) -> None:
            figures.append(scored.figures)
            lines.add(scored)
            if args.gallery:
                shown.add(scored)
                chosen.add(scored)

        scores = evaluate(
            predictor,
            reader,
            batch_size=args.batch_size,
            limit=args.limit,
            protocols=args.protocols(),
            shuffled=args.shuffled,
            max_new_tokens=args.max_new_tokens,
            on_scored=keep,
            restore=lines.earlier.restore,
        )
    seconds = time.perf_counter() - start
    facts |= {"data": fingerprints.of_data(reader.readers), "seconds": seconds, "resumed_after": len(lines.earlier)}
    facts |= {"seconds_per_sample": seconds / len(figures)}
    write_json(out / RESULTS, with_intervals(scores, figures) | facts)
    written = [RESULTS, SAMPLES]
    if kept := shown.chosen():
        open_picture = predictor.processor.open_picture
        Image.fromarray(draw_gallery([card(predictor, scored) for scored in kept])).save(out / "gallery.png")
        title = f"{args.version} on {args.val_dataset}: {','.join(args.protocols())}"
        draw = partial(draw_overlay, min_side=pages.SIDE)
        pages.write_page(out / pages.PAGE, title, chosen.sections(), draw, open_picture)
        written += ["gallery.png", pages.PAGE]
    print(score_table(scores))
    print(f"written to {out}: {', '.join(written)}")


def circumstances(args: EvaluateArguments, words: list[str], reader: EvalReader) -> dict[str, Any]:
    """How the scores come about."""
    return protocol_facts(args.protocols()) | {
        "model": args.version,
        "model_fingerprint": fingerprints.of_model(args.version),
        "dataset_dir": args.dataset_dir,
        "val_dataset": args.val_dataset,
        "data": fingerprints.of_data(reader.readers),
        "command": ["evaluate.py", *words],
        "settings": {name: getattr(args, name) for name in SETTINGS},
        "versions": versions(),
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
        note=f"{turn.kind}, {scored.protocol}, IoU {scored.shown.iou:.2f}",
    )


if __name__ == "__main__":
    sys.exit(run_script(main))
