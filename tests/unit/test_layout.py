"""Who may import whom, and that scripts stay thin: the plan of the house, kept by reading the source."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted([*ROOT.glob("*.py"), *(ROOT / "tools").glob("*.py")])
SCRIPT_NAMES = {path.stem for path in ROOT.glob("*.py")} | {"tools"}
LONGEST_SCRIPT = 150
WRITES_RUN_LENGTHS = "answers.py"  # no saved model carries it: its own code must load without pycocotools

# From each room, the top-level names of ours that nothing in it may import.
FORBIDDEN = {
    "model": {"utils", "configs", "tests"} | SCRIPT_NAMES,
    "utils": {"model", "configs", "tests"} | SCRIPT_NAMES,
}


def python_files(room: str) -> list[Path]:
    return sorted((ROOT / room).rglob("*.py"))


def imports(source: str) -> Iterator[tuple[int, int, str]]:
    """(line, leading dots, dotted name) of every import, inside functions too; `import_module("x")` counts."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, 0, alias.name
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, node.level, node.module or ""
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in {"import_module", "__import__"}:
                name = str(node.args[0].value)
                yield node.lineno, len(name) - len(name.lstrip(".")), name.lstrip(".")


def top(name: str) -> str:
    return name.split(".")[0]


def room_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0]


def against_the_plan(path: Path, source: str) -> list[str]:
    """Every sentence that says how `source`, standing at `path`, breaks the import rule."""
    room, place, found = room_of(path), path.relative_to(ROOT), []
    for line, dots, name in imports(source):
        where = f"{place}:{line} imports {'.' * dots}{name}"
        if not dots and top(name) in FORBIDDEN.get(room, set()):
            found.append(f"{where}: {room}/ does not know {top(name)}")
        if path.parent in {ROOT, ROOT / "tools"} and not dots and top(name) in SCRIPT_NAMES:
            found.append(f"{where}: scripts do not import each other")
        if top(name) == "deepspeed" and not dots and not place.is_relative_to("utils/engine"):
            found.append(f"{where}: deepspeed is imported in utils/engine only")
        if top(name) == "pycocotools" and not dots and room == "model" and place.name != WRITES_RUN_LENGTHS:
            found.append(f"{where}: pycocotools is for utils/ and model/{WRITES_RUN_LENGTHS}")
        carried = room == "model" and path.parent == ROOT / "model" and path.name != "__init__.py"
        if carried and (dots > 1 or (dots == 1 and "." in name) or (not dots and top(name) == "model")):
            found.append(f"{where}: files a saved model carries use flat single-dot imports (from .losses import ...)")
    return found


@pytest.mark.parametrize("room", ["model", "utils", "tools", "."])
def test_imports_follow_the_plan(room: str) -> None:
    files = SCRIPTS if room == "." else python_files(room)
    assert files, f"{room}/ holds no Python file"
    broken = [sentence for path in files for sentence in against_the_plan(path, path.read_text(encoding="utf-8"))]
    assert not broken, "\n".join(broken)


def test_scripts_are_thin() -> None:
    lengths = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in SCRIPTS}
    long = {name: length for name, length in lengths.items() if length >= LONGEST_SCRIPT}
    assert not long, f"scripts stay under {LONGEST_SCRIPT} lines; what they do belongs into model/ or utils/: {long}"


@pytest.mark.parametrize(
    ("place", "source"),
    [
        ("model/losses.py", "import utils.evaluation.metrics"),
        ("model/losses.py", "def f():\n    from utils import metrics"),
        ("model/losses.py", "from .build.builder import build_model"),
        ("model/losses.py", "from ..utils import metrics"),
        ("model/losses.py", "from model.geometry import resized_shape"),
        ("model/losses.py", "import pycocotools.mask"),
        ("utils/data/collate.py", "from model import losses"),
        ("utils/data/collate.py", "import importlib\nimportlib.import_module('model.losses')"),
        ("utils/data/collate.py", "import deepspeed"),
        ("train_ds.py", "import deepspeed"),
        ("train_ds.py", "import chat"),
        ("demo/run_demo.py", "from demo.make_base import main"),
    ],
)
def test_the_rule_bites(place: str, source: str) -> None:
    assert against_the_plan(ROOT / place, source)


@pytest.mark.parametrize(
    ("place", "source"),
    [
        ("model/losses.py", "from .geometry import resized_shape"),
        ("utils/checkpoints/builder.py", "from ..modeling_pixellm import PixelLMForCausalLM"),
        ("utils/engine/deepspeed_engine.py", "import deepspeed"),
        ("utils/data/masks.py", "import pycocotools.mask"),
        ("model/answers.py", "def f():\n    from pycocotools import mask"),
        ("train_ds.py", "from utils.checkpoints.builder import build_model\nfrom utils.cli.arguments import parse"),
    ],
)
def test_the_rule_lets_through_what_it_should(place: str, source: str) -> None:
    assert not against_the_plan(ROOT / place, source)
