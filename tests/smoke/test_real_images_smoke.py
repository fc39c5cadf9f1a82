"""`python -m demo.real_images` from end to end, with steps too few to learn anything."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image


@pytest.mark.long
def test_the_whole_pipeline(tmp_path: Path, repository: Path, realdata: Path, child_env: dict[str, str]) -> None:
    env = {**child_env, "PIXELLM_REALDATA": str(realdata)}
    command = [sys.executable, "-m", "demo.real_images", "--steps", "2", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=repository, env=env, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout[-4000:] + done.stderr[-4000:]
    assert "real-images: missed: giou is " in done.stderr and "Traceback" not in done.stderr
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["n"] == 13 and set(summary["giou_by_kind"]) == {"direct", "no_target"}
    with Image.open(tmp_path / "gallery.png") as image:
        assert min(image.size) > 100
