"""One and two ranks, killed on the way or not, write the same bytes."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.unit import data_sets, evaluation_ranks
from tests.unit.test_evaluation_kinds import GREFS
from tests.unit.tiny_pixellm import make_model
from utils.checkpoints.builder import save_model


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("ranks")
    data_sets.write_refer_seg(root, "grefcoco", GREFS, "grefs(unc).json")
    data_sets.write_muse(root, split="val")
    return data_sets.write_vqa(root)


def launch(env: dict[str, str], data: Path, out: Path, most: tuple[int, ...]) -> list[int]:
    """Exit statuses of as many ranks as `most` has numbers, each killed before that batch."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(len(most))}
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.unit.evaluation_ranks", str(data), str(out), str(limit)],
            env={**env, **where, "RANK": str(rank)},
            stderr=subprocess.DEVNULL,
        )
        for rank, limit in enumerate(most)
    ]
    if any(limit >= 0 for limit in most):  # what a launcher does: one rank is gone, all are ended
        number = next(rank for rank, limit in enumerate(most) if limit >= 0)
        started[number].wait(timeout=250)
        for process in started:
            process.kill()
    return [process.wait(timeout=250) for process in started]


def test_ranks_and_kills_do_not_show(data: Path, tmp_path: Path, child_env: dict[str, str]) -> None:
    evaluation_ranks.main(str(data), str(tmp_path / "one"), "-1")
    # Two ranks of which the second dies at its second batch, then one that is ended at its second, then two to the end.
    assert launch(child_env, data, tmp_path / "many", (-1, 1))[1] == -9
    parts = sorted(path.name for path in (tmp_path / "many").iterdir())
    assert "samples.jsonl.part1" in parts and "samples.jsonl" not in parts
    before = sum(path.read_bytes().count(b"\n") - 1 for path in (tmp_path / "many").glob("*.part*"))
    with pytest.raises(KeyboardInterrupt):
        evaluation_ranks.main(str(data), str(tmp_path / "many"), "1")
    (part,) = (tmp_path / "many").glob("*.part*")
    assert part.read_bytes().count(b"\n") - 1 > before
    assert launch(child_env, data, tmp_path / "many", (-1, -1)) == [0, 0]
    one, many = (tmp_path / name for name in ("one", "many"))
    assert (one / "samples.jsonl").read_bytes() == (many / "samples.jsonl").read_bytes()
    assert (one / "index.html").read_bytes() == (many / "index.html").read_bytes()
    assert sorted(path.name for path in one.iterdir()) == sorted(path.name for path in many.iterdir())
    first, second = (json.loads((folder / "results.json").read_text()) for folder in (one, many))
    assert (first.pop("ranks"), second.pop("ranks")) == (1, 2)
    assert first.pop("resumed_after") == 0 and second.pop("resumed_after") > before
    for result in (first, second):
        for name in ("seconds", "seconds_per_sample", "command"):
            result.pop(name)
    assert first == second
    # Three questions of gRefCOCO and four of MUSE, and three in words.
    assert first["n"] == 3 + 4 and first["text"]["n"] == 3
    # −ln p was said to be half of each letter, a token: "A cup.", "Blue.", "Because.".
    assert first["text"]["tokens_read"] == 6 + 5 + 8 and first["text"]["nll"] == 0.5


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_a_real_model_on_two_ranks_killed_twice_and_in_other_batches(
    data: Path, tmp_path: Path, child_env: dict[str, str], repository: Path
) -> None:
    built = make_model()
    save_model(built.model, built.processor, tmp_path / "model")
    flags = [str(tmp_path / "model"), f"--dataset_dir={data}", f"--val_dataset={evaluation_ranks.SPEC}"]
    flags += ["--protocol=free,teacher,release", "--max_new_tokens=40", "--gallery=0"]

    def start(out: str, ranks: int, batch: int) -> subprocess.Popen:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
        return subprocess.Popen(
            [sys.executable, *launcher, "evaluate.py", *flags, f"--out={tmp_path / out}", f"--batch_size={batch}"],
            env=child_env,
            cwd=repository,
            start_new_session=True,
        )

    def finish(out: str, ranks: int, batch: int) -> None:
        assert start(out, ranks, batch).wait(timeout=250) == 0

    def kill_once_there_are(lines: int, out: str, ranks: int) -> None:
        running = start(out, ranks, 1)
        while running.poll() is None and count(tmp_path / out) < lines:
            time.sleep(0.02)
        os.killpg(running.pid, signal.SIGKILL)
        running.wait()

    def count(folder: Path) -> int:
        return sum(max(0, path.read_bytes().count(b"\n") - 1) for path in folder.glob("*.part*"))

    finish("one", 1, 1)
    finish("two", 2, 1)
    kill_once_there_are(2, "killed", 2)
    kill_once_there_are(4, "killed", 1)
    finish("killed", 2, 1)
    whole = (tmp_path / "one" / "samples.jsonl").read_bytes()
    assert whole == (tmp_path / "two" / "samples.jsonl").read_bytes()
    assert whole == (tmp_path / "killed" / "samples.jsonl").read_bytes()
    finish("four", 1, 4)
    lines, others = (
        [json.loads(text) for text in (tmp_path / name / "samples.jsonl").read_text().splitlines()]
        for name in ("one", "four")
    )
    assert [(one["id"], one["answer"]) for one in lines] == [(one["id"], one["answer"]) for one in others]
    first, second = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("one", "four"))
    assert first["giou"] == pytest.approx(second["giou"], abs=1e-3)
    assert first["giou_teacher_forced"] == pytest.approx(second["giou_teacher_forced"], abs=1e-3)
    assert first["text"]["perplexity"] == pytest.approx(second["text"]["perplexity"], rel=1e-3)
