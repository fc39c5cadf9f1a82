"""Measure how data are read: speeds beside cv2.imread, and a large MUSE's index. `make bench-data`.

Writes runs/bench/data.json, and removes the data it made.
"""

import argparse
import os
import platform
import shutil
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
import PIL
import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import LlamaTokenizer, PreTrainedTokenizerFast

from model.processing_pixellm import PixelLMProcessor
from tools.bench import data_loading as bench
from utils.cli.atomic_files import write_json
from utils.cli.errors import run_script
from utils.data.files import REAL_DATA
from utils.data.index import INDEX_FOLDER
from utils.evaluation.thresholds import compare, format_table, list_misses

VOCABULARY = 2000


def train_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer for English, trained on the README."""
    tokenizer = ByteLevelBPETokenizer()
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    tokenizer.train_from_iterator(lines, VOCABULARY, special_tokens=["<pad>", "<s>", "</s>"], show_progress=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer._tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def make_processor(real_data: str) -> tuple[PixelLMProcessor, str]:
    """A processor for 448 pixels, with LLaVA's tokenizer where it is, else a small one; and which of the two it is."""
    folder = Path(real_data) / "weights" / "llama2_tokenizer"
    if real_data and (folder / "tokenizer.model").is_file():
        tokenizer, which = LlamaTokenizer.from_pretrained(folder), "Llama 2"
    else:
        tokenizer, which = train_tokenizer(), "byte-level BPE trained on the README"
    tokenizer = PixelLMProcessor.prepare_tokenizer(tokenizer, num_scales=2, tokens_per_scale=3)
    return PixelLMProcessor(tokenizer, image_size=bench.SIDE_OF_SQUARE), which


def measure(folder: Path, rounds: int, pairs: int) -> dict[str, Any]:
    """All numbers of the summary."""
    real_data = os.environ.get(REAL_DATA, "")
    images, which = bench.find_images(real_data, folder / "images")
    processor, tokenizer = make_processor(real_data)
    bench.write_asked(folder / "asked", images, bench.PER_ROUND)
    print(f"speed on {which} ...", flush=True)
    speeds = bench.measure_loader(folder / "asked", images, processor, rounds)
    print(f"a MUSE of {5 * pairs:,} questions ...", flush=True)
    return {
        **speeds,
        **bench.measure_muse(folder, images[0], pairs),
        "images": which,
        "tokenizer": tokenizer,
        "machine": {
            "cpus": os.cpu_count(),
            "cpu": torch.backends.cpu.get_cpu_capability(),
            "system": platform.platform(),
        },
        "versions": {"torch": torch.__version__, "pillow": PIL.__version__},
    }


def main(argv: list[str] | None = None) -> int:
    """Measure, write and print; returns the exit status: 1 when a threshold is missed."""
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder for data.json")
    parser.add_argument("--rounds", type=int, default=bench.ROUNDS, help="rounds whose median counts")
    parser.add_argument(
        "--pairs", type=int, default=bench.MUSE_PAIRS, help="size of the made-up MUSE: 5 questions each"
    )
    args = parser.parse_args(argv)
    os.environ.pop(INDEX_FOLDER, None)  # what is made here is kept here, and removed
    out = (ROOT / args.out).resolve()
    folder = out / "data"
    shutil.rmtree(folder, ignore_errors=True)
    try:
        summary = measure(folder, args.rounds, args.pairs)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    write_json(out / "data.json", summary)
    rows = compare(summary, bench.THRESHOLDS)
    print(f"\n{format_table(rows)}\n\nSee {out}/data.json.")
    for sentence in list_misses(rows):
        print(f"bench-data: missed: {sentence}", file=sys.stderr)
    return 1 if list_misses(rows) else 0


if __name__ == "__main__":
    sys.exit(run_script(main))
