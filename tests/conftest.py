"""Shared by all tests: no network in any process they start, one thread each, and where the real images are."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from utils.cli.logs import configure_logging

ROOT = Path(__file__).resolve().parent.parent
OFFLINE = ROOT / "tests" / "offline"

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# A shell that runs the tests in the background makes them, and all they start, deaf to Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)
# The programs of this environment (ninja, deepspeed, torchrun) are found even where it was not activated.
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])


def python_path(*folders: Path) -> str:
    """PYTHONPATH for a child process: the folder that cuts its network first, then `folders`."""
    return os.pathsep.join(str(folder) for folder in (OFFLINE, *folders))


def _cut_network_here() -> None:
    spec = importlib.util.spec_from_file_location("_pixellm_offline", OFFLINE / "sitecustomize.py")
    assert spec is not None and spec.loader is not None
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    os.environ["PYTHONPATH"] = python_path(ROOT)


def _refuse_children_with_network() -> None:
    """A test that builds an environment of its own for a child must not lose the cut on the way."""
    start = subprocess.Popen.__init__

    def checked(self, *args, **kwargs):
        env = kwargs.get("env")
        if env is not None and str(OFFLINE) not in env.get("PYTHONPATH", "").split(os.pathsep):
            raise AssertionError(
                "a child process was given an environment without tests/offline on PYTHONPATH and would have network; "
                "use the fixture `child_env` (repository on the path) or `elsewhere_env` (repository not on the path)"
            )
        start(self, *args, **kwargs)

    subprocess.Popen.__init__ = checked  # type: ignore[method-assign]


_cut_network_here()
_refuse_children_with_network()


@pytest.fixture(autouse=True)
def fresh_log() -> None:
    """Every test hears what a fresh process would say."""
    configure_logging()


@pytest.fixture
def child_env() -> dict[str, str]:
    """Environment for a script of this repository run as a child process: network cut, one thread."""
    return {**os.environ, "PYTHONPATH": python_path(ROOT)}


@pytest.fixture
def elsewhere_env(tmp_path: Path) -> dict[str, str]:
    """Environment for a process elsewhere: network cut, this repository not on the path, an empty module cache."""
    return {**os.environ, "PYTHONPATH": python_path(), "HF_HOME": str(tmp_path / "hf_home")}


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of this repository."""
    return ROOT


@pytest.fixture(scope="session")
def realdata() -> Path:
    """Folder with real images, annotations and weights. Unset: the test skips. Set but broken: the test fails."""
    named = os.environ.get("PIXELLM_REALDATA", "")
    if not named:
        pytest.skip("PIXELLM_REALDATA is not set: tests on real images and weights are left out")
    folder = Path(named)
    absent = [name for name in ("dataset", "weights", "reference", "expected.json") if not (folder / name).exists()]
    if absent:
        pytest.fail(f"PIXELLM_REALDATA={named} is set, but there is no {', '.join(absent)} in it", pytrace=False)
    try:
        json.loads((folder / "expected.json").read_text(encoding="utf-8"))
    except ValueError as error:
        pytest.fail(f"PIXELLM_REALDATA={named} is set, but its expected.json cannot be read: {error}", pytrace=False)
    return folder
