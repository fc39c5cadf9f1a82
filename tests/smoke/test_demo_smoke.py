"""`python -m demo --size smoke` from end to end, as a person runs it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image


@pytest.mark.long
@pytest.mark.timeout(900)
def test_the_whole_pipeline(tmp_path: Path, repository: Path, child_env: dict[str, str]) -> None:
    command = [sys.executable, "-m", "demo", "--size", "smoke", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=repository, env=child_env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["n"] == 100 and set(summary["giou_by_kind"]) == {"direct", "several", "reasoning", "no_target"}
    assert summary["engine"] == "deepspeed" and (Path(summary["model"]) / "config.json").is_file()
    for name in ("answer.png", "gallery.png"):
        with Image.open(tmp_path / name) as image:
            assert min(image.size) > 100
