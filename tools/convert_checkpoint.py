"""A published PixelLM into a folder of ours, and a folder of ours into the published layout.

python tools/convert_checkpoint.py PUBLISHED OURS --vision-tower TOWER
python tools/convert_checkpoint.py OURS PUBLISHED --to published
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from utils.checkpoints.builder import build_model
from utils.checkpoints.export import export_model, export_published
from utils.cli.errors import run_script


def main(argv: list[str] | None = None) -> None:
    """Convert as the command line says; no number changes on the way."""
    parser = argparse.ArgumentParser(description="Convert between the published layout of PixelLM and ours.")
    parser.add_argument("source", help="folder to read")
    parser.add_argument("target", type=Path, help="folder to write")
    parser.add_argument("--to", choices=("ours", "published"), default="ours", help="layout to write")
    parser.add_argument("--vision-tower", "--vision_tower", help="CLIP folder: a published PixelLM holds none")
    parser.add_argument("--max_shard_size", default="5GB", help="largest file to write")
    args = parser.parse_args(argv)
    # Every tensor stays in the type it is stored in.
    built = build_model(args.source, args.vision_tower, dtype=None)
    print(built.report.table())
    if args.to == "ours":
        export_model(built, args.target, args.max_shard_size)
    else:
        for sentence in export_published(built, args.target, args.max_shard_size):
            print(sentence)
    print(f"{args.target}: written")


if __name__ == "__main__":
    sys.exit(run_script(main))
