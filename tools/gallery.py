"""Ask a saved PixelLM some questions of a data set and draw picture, truth and answer side by side on one sheet.

python tools/gallery.py --version runs/demo/model --dataset_dir runs/demo/dataset \
    --val_dataset "refcoco|unc|val||MultiReasonSeg|val" --count 12 --out gallery.png
"""

import argparse
import sys
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from model.overlay import GalleryItem, draw_gallery
from model.predictor import Predictor
from utils.data.readers import build_eval_reader
from utils.evaluation import Scored, evaluate
from utils.scripts import run_script


def gallery_item(predictor: Predictor, scored: Scored) -> GalleryItem:
    """One card: what was asked, what is true, what was answered."""
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


def main(argv: list[str] | None = None) -> int:
    """Write the sheet; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", required=True, help="folder of a saved PixelLM")
    parser.add_argument("--dataset_dir", default="./dataset", help="the data root")
    parser.add_argument("--val_dataset", default="ReasonSeg|val", help="where the questions come from, joined by ||")
    parser.add_argument("--count", type=int, default=12, help="how many, evenly spread over all questions")
    parser.add_argument("--out", type=Path, required=True, help="the picture to write")
    args = parser.parse_args(argv)
    items: list[GalleryItem] = []
    predictor = Predictor.from_pretrained(args.version)
    evaluate(
        predictor,
        build_eval_reader(args.val_dataset, args.dataset_dir),
        limit=max(1, args.count),
        teacher_forced=False,
        shuffled=False,
        on_scored=lambda scored: items.append(gallery_item(predictor, scored)),
    )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(draw_gallery(items)).save(args.out)
    print(f"{len(items)} answers are drawn in {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
