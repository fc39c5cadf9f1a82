"""Stages: timed, stopped with the command to repeat, and nothing left running after an interruption."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from demo.stages import Stage, StageFailed, Stages, run_stage


def stage(tmp_path: Path, code: str, **env: str) -> Stage:
    return Stage("probe", "a probe", [sys.executable, "-c", code], tmp_path, env)


def test_a_stage_runs_where_and_with_what_it_was_told(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    stages = Stages(3)
    code = "import os, sys; print(os.getcwd(), os.environ['PROBE'], repr(sys.stdin.read()))"
    stages.run(stage(tmp_path, code, PROBE="7"))
    said = capfd.readouterr().out
    assert f"{tmp_path} 7 ''" in said and "[1/3] probe: a probe" in said
    assert 0 < stages.seconds["probe"] <= stages.total()


def test_a_stage_reads_what_is_typed_also_when_repeated(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    echo = [sys.executable, "-c", "import sys; print(sys.stdin.buffer.read())"]
    typed = Stage("probe", "reads", echo, tmp_path, typed="é 'a' \\n\nb\n")
    run_stage(typed)
    wanted = str(typed.typed.encode("utf-8"))
    assert capfd.readouterr().out.strip() == wanted
    repeated = subprocess.run(["bash", "-c", typed.repeat()], capture_output=True, text=True)
    assert repeated.stdout.strip() == wanted


def test_a_failing_stage_gives_its_status_and_a_command_that_repeats_it(tmp_path: Path) -> None:
    broken = stage(tmp_path, "import os, sys; print('asked for', os.environ['PROBE']); sys.exit(3)", PROBE="a b")
    with pytest.raises(StageFailed, match="exit status 3") as failed:
        Stages(1).run(broken)
    assert failed.value.status == 3
    repeated = subprocess.run(["bash", "-c", broken.repeat()], capture_output=True, text=True)
    assert (repeated.returncode, repeated.stdout) == (3, "asked for a b\n")


def test_a_program_that_is_not_there_and_one_that_is_killed(tmp_path: Path) -> None:
    with pytest.raises(StageFailed, match="127"):
        run_stage(Stage("probe", "none", ["no-such-program-anywhere"], tmp_path))
    with pytest.raises(StageFailed, match="killed by SIGKILL") as failed:
        run_stage(stage(tmp_path, "import os; os.kill(os.getpid(), 9)"))
    assert failed.value.status == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_takes_the_children_of_a_stage_along(tmp_path: Path, repository: Path, number: int) -> None:
    child = "import os, time; open('grandchild', 'w').write(str(os.getpid())); time.sleep(60)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    script = textwrap.dedent(
        f"""
        import sys
        from pathlib import Path
        from demo.stages import Stage, run_stage
        try:
            run_stage(Stage("probe", "sleeps", [sys.executable, "-c", {parent!r}], Path({str(tmp_path)!r})))
        except KeyboardInterrupt:
            sys.exit(130)
        """
    )
    runner = subprocess.Popen([sys.executable, "-c", script], cwd=repository, stderr=subprocess.DEVNULL)
    note = tmp_path / "grandchild"
    deadline = time.monotonic() + 30
    while not (note.exists() and note.read_text()):
        assert time.monotonic() < deadline and runner.poll() is None
        time.sleep(0.02)
    runner.send_signal(number)
    assert runner.wait(30) == 130
    grandchild = int(note.read_text())
    for _ in range(100):
        try:
            os.kill(grandchild, 0)
        except ProcessLookupError:
            return
        time.sleep(0.02)
    pytest.fail(f"process {grandchild} outlived the interruption")
