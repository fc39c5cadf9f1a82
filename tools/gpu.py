"""Everything that needs a GPU, on one command: the tests marked gpu, the benches, a decode of 7B's shape. `make gpu`.

python tools/gpu.py               writes runs/gpu/summary.json; a part that fails does not end the others

Exit status: 0 where every part went well, 1 where one failed, 2 without CUDA.
"""

import argparse
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch

from utils.cli.atomic_files import write_json
from utils.cli.errors import run_script
from utils.cli.run_card import versions

LONGEST_PART = 3600  # seconds
KEPT_OUTPUT = 4000  # characters of what a part that failed printed


@dataclass(frozen=True)
class Part:
    """One command of this interpreter. result: the JSON file it writes, if any."""

    name: str
    arguments: tuple[str, ...]
    result: Path | None = None


def list_parts(out: Path) -> list[Part]:
    """What is run, in order. out: folder for results."""
    report = out / "tests.xml"
    return [
        Part("tests", ("-m", "pytest", "-m", "gpu", "tests/gpu", f"--junitxml={report}"), report),
        Part("bench", ("-m", "tools.bench.answering", "--out", str(out)), out / "summary.json"),
        Part("bench-training", ("-m", "tools.bench.training", "--out", str(out)), out / "training.json"),
        Part("decode-7b", ("-m", "tools.bench.decoding", "--out", str(out)), out / "decoding.json"),
    ]


def run_part(part: Part) -> dict[str, Any]:
    """Run one part; its seconds, exit status, result (or the file with it), and last output where it failed."""
    print(f"\n{part.name}: {' '.join(part.arguments)}", flush=True)
    start = time.perf_counter()
    try:
        done = subprocess.run(
            [sys.executable, *part.arguments],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=LONGEST_PART,
            check=False,
        )
        status, output = done.returncode, done.stdout
    except subprocess.TimeoutExpired as error:
        status, output = 124, str(error)
    found: dict[str, Any] = {"status": status, "seconds": round(time.perf_counter() - start, 1)}
    if part.result is not None and part.result.is_file():
        text = part.result.read_text(encoding="utf-8")
        found["result"] = json.loads(text) if part.result.suffix == ".json" else str(part.result)
    if status:
        found["output"] = output[-KEPT_OUTPUT:]
    print(f"{part.name}: {'ok' if not status else 'FAILED'}, {found['seconds']} s", flush=True)
    return found


def main(argv: list[str] | None = None) -> int:
    """Run all parts and write the summary; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="folder for summary.json and all results")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("gpu: torch finds no CUDA device here; run this on a machine that has one", file=sys.stderr)
        return 2
    out = (ROOT / args.out).resolve()
    parts: dict[str, Any] = {}
    facts = {"device": torch.cuda.get_device_name(), "cuda": torch.version.cuda, "versions": versions()}
    for part in list_parts(out / "parts"):
        parts[part.name] = run_part(part)
        write_json(out / "summary.json", facts | {"parts": parts})
    print(f"\nwritten to {out / 'summary.json'}")
    return int(any(part["status"] for part in parts.values()))


if __name__ == "__main__":
    sys.exit(run_script(main))
