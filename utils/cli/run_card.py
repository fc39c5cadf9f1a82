"""The run card: run.json beside the checkpoints says what a run was, and lets later steps read what flags leave out."""

import json
import platform
import subprocess
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from utils.cli.atomic_files import write_json
from utils.cli.errors import UserError

RUN_CARD = "run.json"
REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "deepspeed",
    "tokenizers",
    "safetensors",
    "numpy",
    "pillow",
    "opencv-python-headless",
)


def versions() -> dict[str, str | None]:
    """Python and the packages that results depend on; None for what is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version(), "platform": platform.platform()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def git_state(repository: Path) -> dict[str, Any]:
    """Commit of the code and whether it was changed since; None where git or the repository is not there."""
    commit = _git(repository, "rev-parse", "HEAD")
    changes = _git(repository, "status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "changed": None if changes is None else bool(changes)}


def _git(repository: Path, *command: str) -> str | None:
    try:
        done = subprocess.run(["git", *command], cwd=repository, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def write_run_card(folder: Path, *, arguments: dict[str, Any], facts: dict[str, Any]) -> None:
    """Write folder/run.json; UserError where it cannot be.

    Args:
        arguments: every flag's value. facts: what else there is to record, by name.
    """
    card = {
        "arguments": arguments,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "versions": versions(),
        "git": git_state(REPOSITORY),
        **facts,
    }
    try:
        write_json(folder / RUN_CARD, card)
    except OSError as error:
        raise UserError(f"cannot write {folder / RUN_CARD}: {error.strerror}; choose another --log_base_dir") from error


def find_run_card(start: Path, levels: int = 4) -> dict[str, Any] | None:
    """The run card in `start` or the nearest of its parents, at most `levels` up; None where there is none.

    `start` may be a checkpoint folder, a file that zero_to_fp32.py wrote, or the run's folder.
    """
    place = start.absolute()
    for folder in [place, *place.parents][: levels + 1]:
        path = folder / RUN_CARD
        if path.is_file():
            try:
                card = json.loads(path.read_text(encoding="utf-8"))
            except ValueError:
                raise UserError(f"the run card {path} is not valid JSON: it was changed or cut off") from None
            if not isinstance(card, dict):
                raise UserError(f"the run card {path} must hold a JSON object")
            return card
    return None
