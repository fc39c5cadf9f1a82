"""Who may import whom: one way down, no circle. Kept by reading the source."""

import ast
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Rooms from the ground up. A room imports itself and rooms on lower floors, nothing beside or above it.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("model",),
    ("utils.cli", "utils.drawing"),
    ("utils.checkpoints", "utils.data"),
    ("utils.engine",),
    ("utils.evaluation",),
    ("utils.serving",),
    ("scripts", "tools", "demo"),
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
SCRIPT_NAMES = {path.stem for path in ROOT.glob("*.py")}
OURS = {"model", "utils", "demo", "tools", "tests"} | SCRIPT_NAMES
# Libraries that only some rooms know; everything else works without them.
ONLY_IN = {"deepspeed": "utils.engine", "gradio": "utils.serving", "fastapi": "utils.serving"}
WRITES_RUN_LENGTHS = "answers"  # no saved model needs it to load: pycocotools may be absent elsewhere


def python_files() -> list[Path]:
    rooms = ("model", "utils", "demo", "tools")
    return sorted([*ROOT.glob("*.py"), *(path for room in rooms for path in (ROOT / room).rglob("*.py"))])


def module_of(path: Path) -> str:
    """utils/data/masks.py -> "utils.data.masks"; a package is named by its folder."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def room_of(module: str) -> str:
    """The room a module of ours lies in, as FLOORS names it."""
    parts = module.split(".")
    if parts[0] == "utils":
        return ".".join(parts[:2])
    return "scripts" if parts[0] in SCRIPT_NAMES else parts[0]


def imports(source: str, module: str, is_package: bool = False) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted name) of every import, inside functions too; `import_module("x")` counts.

    `from a import b` gives "a.b", which may name a module or something in it.
    """
    package = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            start = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                yield node.lineno, f"{start}.{alias.name}"
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in {"import_module", "__import__"}:
                yield node.lineno, str(node.args[0].value)


def broken_rules(path: Path, source: str) -> list[str]:
    """Every sentence that says how `source`, standing at `path`, breaks the import rules."""
    module, found = module_of(path), []
    room = room_of(module)
    for line, name in imports(source, module, path.name == "__init__.py"):
        top, where = name.split(".")[0], f"{path.relative_to(ROOT)}:{line} imports {name}"
        if top in ONLY_IN and room != ONLY_IN[top]:
            found.append(f"{where}: {top} is imported in {ONLY_IN[top]} only")
        if top == "pycocotools" and room == "model" and module != f"model.{WRITES_RUN_LENGTHS}":
            found.append(f"{where}: in model/ only {WRITES_RUN_LENGTHS}.py writes run lengths")
        if top not in OURS:
            continue
        other = room_of(name)
        if room == other == "scripts":
            found.append(f"{where}: scripts do not import each other")
        elif other not in FLOOR_OF:
            found.append(f"{where}: {other} is no room of the product")
        elif other != room and FLOOR_OF[other] >= FLOOR_OF[room]:
            found.append(f"{where}: {room} lies no higher than {other}")
    return found + wrong_form(path, source)


def wrong_form(path: Path, source: str) -> list[str]:
    """What is not `from .name import ...` in the flat files that a saved model carries."""
    if path.parent != ROOT / "model" or path.name == "__init__.py":
        return []
    found = []
    for node in ast.walk(ast.parse(source)):
        relative = isinstance(node, ast.ImportFrom) and node.level > 0
        nested = relative and (node.level > 1 or not node.module or "." in node.module)
        absolute = isinstance(node, ast.ImportFrom) and not node.level and str(node.module).split(".")[0] == "model"
        if nested or absolute:
            found.append(f"model/{path.name}:{node.lineno}: a saved model carries flat files (from .losses import ...)")
    return found


def import_graph(files: Iterable[Path]) -> dict[str, set[str]]:
    """Module -> the modules of ours that it imports."""
    sources = {module_of(path): path for path in files}
    graph: dict[str, set[str]] = {}
    for module, path in sources.items():
        named = {name for _, name in imports(path.read_text(encoding="utf-8"), module, path.name == "__init__.py")}
        # "a.b.c" may be the module a.b.c, or the name c in the module a.b.
        found = {name if name in sources else name.rpartition(".")[0] for name in named}
        graph[module] = (found & sources.keys()) - {module}
    return graph


def find_circle(graph: dict[str, set[str]]) -> list[str]:
    """Modules that import each other in a ring, the first again at the end; empty where there is none."""
    done: set[str] = set()

    def walk(module: str, way: list[str]) -> list[str]:
        if module in way:
            return [*way[way.index(module) :], module]
        if module in done:
            return []
        for other in sorted(graph.get(module, ())):
            if circle := walk(other, [*way, module]):
                return circle
        done.add(module)
        return []

    return next((circle for module in sorted(graph) if (circle := walk(module, []))), [])


def test_imports_go_one_way_down() -> None:
    files = python_files()
    assert len(files) > 100, f"only {len(files)} Python files were found below {ROOT}"
    broken = [sentence for path in files for sentence in broken_rules(path, path.read_text(encoding="utf-8"))]
    assert not broken, "\n".join(broken)


def test_no_files_import_each_other_in_a_circle() -> None:
    circle = find_circle(import_graph(python_files()))
    assert not circle, " -> ".join(circle)


@pytest.mark.parametrize(
    ("place", "source"),
    [
        ("model/losses.py", "import utils.evaluation.metrics"),
        ("model/losses.py", "def f():\n    from utils.data import masks"),
        ("model/losses.py", "from .parts.builder import build_model"),
        ("model/losses.py", "from ..utils import metrics"),
        ("model/losses.py", "from model.geometry import resized_shape"),
        ("model/losses.py", "import pycocotools.mask"),
        ("utils/data/collate.py", "from utils.engine import fit"),
        ("utils/data/collate.py", "from utils.checkpoints.builder import build_model"),
        ("utils/data/collate.py", "import importlib\nimportlib.import_module('utils.serving.batch')"),
        ("utils/data/collate.py", "import deepspeed"),
        ("utils/engine/fit.py", "from demo.muon import Muon"),
        ("utils/engine/fit.py", "from tests.unit import tiny_batches"),
        ("utils/cli/errors.py", "from utils.drawing.pages import page"),
        ("train_ds.py", "import deepspeed"),
        ("train_ds.py", "import chat"),
        ("tools/convert_checkpoint.py", "from demo.tiny import make"),
    ],
)
def test_a_broken_rule_is_found(place: str, source: str) -> None:
    assert broken_rules(ROOT / place, source)


@pytest.mark.parametrize(
    ("place", "source"),
    [
        ("model/losses.py", "from .geometry import resized_shape"),
        ("model/answers.py", "def f():\n    from pycocotools import mask"),
        ("utils/checkpoints/builder.py", "from model.modeling_pixellm import PixelLMForCausalLM"),
        ("utils/engine/deepspeed_engine.py", "import deepspeed"),
        ("utils/data/masks.py", "import pycocotools.mask"),
        ("demo/stages.py", "from utils.evaluation.results import read_results"),
        ("train_ds.py", "from utils.checkpoints.builder import build_model"),
    ],
)
def test_what_the_rules_allow_is_let_through(place: str, source: str) -> None:
    assert not broken_rules(ROOT / place, source)


def test_a_circle_is_found() -> None:
    assert find_circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert find_circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []
