"""README and docs: every command parses, every link resolves, nothing is said twice, every cited fact exists."""

import argparse
import ast
import importlib
import importlib.util
import itertools
import re
import shlex
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from utils.cli.commands import CHAT, CHECK, EVALUATE, MERGE, TRAIN, parse_chat, parse_check, parse_evaluate, parse_train
from utils.cli.errors import UserError
from utils.cli.parser import flags_of, parse

ROOT = Path(__file__).resolve().parents[2]
CHANGES = ROOT / "CHANGELOG.md"  # it names what is gone
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "dataset" / "README.md"])
CODE = [
    *ROOT.glob("*.py"),
    *(path for room in ("model", "utils", "demo", "tools", "tests") for path in (ROOT / room).rglob("*.py")),
]
README_LINES = 200
REPEATED_WORDS = 16
REPEATED_LINE = 80

PARSERS = {
    TRAIN.name: parse_train,
    MERGE.name: lambda words: parse(MERGE, words),  # `parse_merge` wants the run card that training left
    EVALUATE.name: parse_evaluate,
    CHAT.name: parse_chat,
    CHECK.name: parse_check,
}
LAUNCHERS = {"deepspeed", "torchrun"}
PYTHON = {"python", "python3"}
NOT_OURS = {"zero_to_fp32.py"}  # DeepSpeed writes it beside its checkpoints
OTHER_PROGRAMS = {"cd", "echo", "export", "git", "printf", "tensorboard", "source", "conda", "ls", "sbatch", "scp"}
PLACEHOLDERS = {"...", "…"}
LAUNCHER_FLAGS = {"--hostfile", "--num_gpus", "--include", "--master_addr", "--master_port", "--nproc_per_node"}
FOREIGN_FLAGS = LAUNCHER_FLAGS | {"--no-build-isolation", "--logdir", "--help"}


class CommandError(ValueError):
    """A command of a page that could not run."""


# --- pages ------------------------------------------------------------------------------------------------------------


def split_page(text: str) -> tuple[list[tuple[str, str]], str]:
    """([(language, code)], prose): fenced and indented code, and the text with all code blocks left out."""
    blocks: list[tuple[str, str]] = []
    prose: list[str] = []
    fence, language, lines = "", "", list[str]()
    indented: list[str] = []
    for line in [*text.splitlines(), ""]:
        stripped = line.strip()
        if fence:
            if stripped == fence:
                blocks.append((language, "\n".join(lines)))
                fence = ""
            else:
                lines.append(line)
            continue
        if match := re.match(r"(```+)(\w*)$", stripped):
            fence, language, lines = match[1], match[2], []
            continue
        after_blank = not prose or not prose[-1].strip()
        if line.startswith("    ") and stripped and (indented or after_blank):
            indented.append(line[4:])
            continue
        if indented and stripped:
            blocks.append(("", "\n".join(indented)))
            indented = []
        prose.append(line)
    if fence:
        raise AssertionError("a code block is opened and never closed")
    if indented:
        blocks.append(("", "\n".join(indented)))
    return blocks, "\n".join(prose)


def inline_code(prose: str) -> list[str]:
    """What stands between single backticks."""
    return re.findall(r"(?<!`)`([^`\n]+)`(?!`)", prose)


def heading_slugs(text: str) -> set[str]:
    """The anchors GitHub gives the headings of a page."""
    slugs: dict[str, int] = {}
    found = set()
    for line in split_page(text)[1].splitlines():
        if match := re.match(r"#{1,6} (.+)", line):
            plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", match[1]).replace("`", "")
            slug = re.sub(r"[^\w\- ]", "", plain.strip().lower()).replace(" ", "-")
            number = slugs.get(slug, 0)
            slugs[slug] = number + 1
            found.add(f"{slug}-{number}" if number else slug)
    return found


def broken_links(page: Path, text: str) -> list[str]:
    """Relative links and anchors that lead nowhere."""
    prose = re.sub(r"`[^`\n]*`", "", split_page(text)[1])
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose) + re.findall(r"(?:src|href)=\"([^\"]+)\"", prose):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if path and not file.exists():
            broken.append(f"{page.name}: {target}: no such file")
        elif anchor and anchor not in heading_slugs(text if file == page else file.read_text(encoding="utf-8")):
            broken.append(f"{page.name}: {target}: no such heading")
    return broken


# --- commands ---------------------------------------------------------------------------------------------------------


def shell_commands(code: str) -> Iterator[list[str]]:
    """The simple commands of a shell block, without comments, variables set in front, pipes and redirections."""
    for line in re.sub(r"\\\n\s*", " ", code).splitlines():
        if not line.strip():
            continue
        reader = shlex.shlex(re.sub(r"\$\([^)]*\)", "VALUE", line), posix=True, punctuation_chars=True)
        reader.whitespace_split = True
        words: list[str] = []
        for word in [*reader, ";"]:
            if word and set(word) <= set("|;&"):
                while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                    words.pop(0)
                if words:
                    yield words[: words.index(">")] if ">" in words else words
                words = []
            else:
                words.append(word)


def looks_like_command(line: str) -> bool:
    """Whether a code block's line starts a program that we know: trees and output lines do not."""
    words = [word for word in line.split() if not re.fullmatch(r"[A-Z_]+=\S*", word)]
    first = words[0].rpartition("/")[2] if words else ""
    return first in LAUNCHERS | PYTHON | OTHER_PROGRAMS | {"make", "pip", "srun"}


def commands_of(text: str) -> list[list[str]]:
    """Every command of a page: of shell blocks, and inline ones that name a script or a make target."""
    blocks, prose = split_page(text)
    found: list[list[str]] = []
    for language, code in blocks:
        lines = re.sub(r"\\\n\s*", " ", code).splitlines()
        if language in {"bash", "sh"} or (not language and any(looks_like_command(line) for line in lines)):
            found += [words for line in lines if looks_like_command(line) for words in shell_commands(line)]
    for code in inline_code(prose):
        if looks_like_command(code) and len(code.split()) > 1:
            found += shell_commands(code)
    return found


class _Parsed(BaseException):
    """Raised where a script would begin to work."""


def parse_script(script: str, words: Sequence[str], root: Path = ROOT) -> None:
    """Give `words` to the script's own parser, and stop there. CommandError where it refuses them."""
    if not (root / script).is_file():
        raise CommandError(f"there is no {script}")
    try:
        if script in PARSERS:
            PARSERS[script](list(words))
            return
        module = load_script(root / script)
        parse = argparse.ArgumentParser.parse_args

        def parse_only(
            self: argparse.ArgumentParser, args: Sequence[str] | None = None, namespace: object = None
        ) -> None:
            parse(self, args)
            raise _Parsed

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(argparse.ArgumentParser, "parse_args", parse_only)
            module.main(list(words))
        raise CommandError(f"{script} has no parser of its own")
    except _Parsed:
        return
    except SystemExit as error:
        raise CommandError(f"{script} ends with {error.code}") from None
    except UserError as error:
        raise CommandError(f"{script}: {error}") from None


def load_script(path: Path) -> object:
    """The module of a script, loaded once."""
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return importlib.import_module(name)


def check_command(words: list[str]) -> None:
    """CommandError where a command of a page names a script, module, target, file or flag that is not there."""
    elided = any(word in PLACEHOLDERS for word in words)
    words = [word for word in words if word not in PLACEHOLDERS]
    program, rest = words[0].rpartition("/")[2], words[1:]
    if program in PYTHON and rest and rest[0] == "-m":
        check_module(rest[1], rest[2:])
    elif program in PYTHON or program in LAUNCHERS:
        place = next((number for number, word in enumerate(rest) if word.endswith(".py")), None)
        if place is None:
            raise CommandError(f"{program} runs no script")
        if program in PYTHON and place:
            raise CommandError(f"{program} has options before {rest[place]}")
        for flag in rest[:place]:
            if flag.startswith("--") and flag.partition("=")[0] not in LAUNCHER_FLAGS | {"--nnodes", "--node_rank"}:
                raise CommandError(f"{program} has no option {flag} that these pages use")
        if rest[place] not in NOT_OURS:
            # What "..." stands for names a model at least.
            given = ["--version", "MODEL"] if elided and not any(w.startswith("--version") for w in rest) else []
            parse_script(rest[place], [*given, *rest[place + 1 :]])
    elif program == "srun":
        for inner in shell_commands(rest[-1].removeprefix("exec ")):
            check_command(inner)
    elif program == "make":
        check_targets(rest)
    elif program == "pip":
        for flag, value in itertools.pairwise(rest):
            if flag == "-r" and not (ROOT / value).is_file():
                raise CommandError(f"pip reads {value}, which is not there")
    elif program not in OTHER_PROGRAMS:
        raise CommandError(f"{program} is no program these pages may name")


def check_module(name: str, words: Sequence[str]) -> None:
    """`python -m NAME words`: a module of ours parses its words, another one is there."""
    script = f"{name.replace('.', '/')}.py"
    if (ROOT / name.replace(".", "/")).is_dir():
        script = f"{name.replace('.', '/')}/__main__.py"
    if name.split(".")[0] in {"demo", "tools", "utils", "tests", "model"}:
        if name.startswith("tests."):
            if not (ROOT / script).is_file():
                raise CommandError(f"there is no {script}")
            return
        parse_script(script, words)
    elif importlib.util.find_spec(name.split(".")[0]) is None:
        raise CommandError(f"there is no module {name}")


def check_targets(words: Sequence[str]) -> None:
    """`make words`: targets of the Makefile, and variables it reads."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z][a-z-]*):", makefile, re.MULTILINE))
    variables = set(re.findall(r"^([A-Z_]+) \?=", makefile, re.MULTILINE))
    for word in words:
        name, equals, _ = word.partition("=")
        if (equals and name not in variables) or (not equals and name not in targets):
            raise CommandError(f"make has no {word}")


def refused_commands(text: str) -> list[str]:
    """The commands of a page that would not run, and why."""
    refused = []
    for words in commands_of(text):
        try:
            check_command(list(words))
        except CommandError as error:
            refused.append(f"{shlex.join(words)}\n    {error}")
    return refused


# --- words ------------------------------------------------------------------------------------------------------------


def unknown_flags(prose: str, known: set[str]) -> list[str]:
    """`--flags` in running text that no script has."""
    flags = [flag for code in inline_code(prose) for flag in re.findall(r"(?<![\w-])--[A-Za-z][\w-]*", code)]
    return sorted({flag for flag in flags if flag not in FOREIGN_FLAGS and underscored(flag) not in known})


def underscored(flag: str) -> str:
    """--vision-tower -> --vision_tower"""
    return "--" + flag.removeprefix("--").replace("-", "_")


def missing_paths(prose: str) -> list[str]:
    """Paths of the repository in running text that are not there."""
    paths = {
        code.rstrip("/")
        for code in inline_code(prose)
        if re.fullmatch(r"(model|utils|demo|tools|tests|configs|docs)/[\w./*-]*", code)
    }
    return sorted(path for path in paths if not list(ROOT.glob(path)))


def unknown_names(prose: str, sources: str) -> list[str]:
    """`some_name`, `some_name()` and `SomeName` in running text that stand nowhere in the code."""
    names = {match[1] for code in inline_code(prose) if (match := re.fullmatch(r"([A-Za-z]\w*)(\(\))?", code))}
    ours = {name for name in names if re.search(r"[a-z]_[a-z]|[a-z][A-Z]", name)}
    return sorted(name for name in ours if not re.search(rf"\b{name}\b", sources))


def repeated_passages(pages: dict[str, str]) -> list[str]:
    """Lines of more than REPEATED_LINE characters, and REPEATED_WORDS words of running text, that stand twice."""
    lines, passages = defaultdict(set), defaultdict(set)
    for name, text in pages.items():
        for line in text.splitlines():
            if len(line.strip()) > REPEATED_LINE:
                lines[line.strip()].add(name)
        words = re.findall(r"[\w'.-]+", re.sub(r"\|.*", "", split_page(text)[1]))
        for start in range(len(words) - REPEATED_WORDS + 1):
            passages[" ".join(words[start : start + REPEATED_WORDS])].add(name)
    found = [*lines.items(), *passages.items()]
    return [f"{', '.join(sorted(names))}: {what}" for what, names in found if len(names) > 1]


def numbered_facts() -> set[str]:
    """The numbers of docs/facts.md, and the letters of its sections."""
    numbers = set(
        re.findall(r"^- \*\*([A-Z]\d+)\*\*", (ROOT / "docs" / "facts.md").read_text(encoding="utf-8"), re.MULTILINE)
    )
    return numbers | {number[0] for number in numbers}


def cited_facts(source: str) -> set[str]:
    """Facts that a file cites: `docs/facts.md, M7`, `facts M3, E3`, `fact C1`."""
    lists = re.findall(r"(?:facts\.md,?|\bfacts?)\s+((?:[A-Z]\d*\b(?:,\s+|\s+and\s+)?)+)", source)
    return {number for numbers in lists for number in re.findall(r"\b[MLECPVR]\d*\b", numbers)}


def uneven_tables(prose: str) -> list[str]:
    """Rows of tables that have other cells than the row above them."""
    uneven, above = [], 0
    for line in prose.splitlines():
        cells = len(re.split(r"(?<!\\)\|", re.sub(r"`[^`]*`", "", line))) if line.startswith("|") else 0
        if above and cells and cells != above:
            uneven.append(line)
        above = cells
    return uneven


# --- the pages as they are --------------------------------------------------------------------------------------------


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def known_flags() -> set[str]:
    """Flags of all scripts, with underscores."""
    sources = [*(ROOT / "demo").glob("*.py"), *(ROOT / "tools").rglob("*.py")]
    flags = {flag for path in sources for flag in re.findall(r'"(--[\w-]+)"', read(path))}
    for script in (TRAIN, MERGE, EVALUATE, CHAT, CHECK):
        flags |= {f"--{prefix}{name}" for name in flags_of(script.config, script.ignored) for prefix in ("", "no_")}
    return {underscored(flag) for flag in flags} | {"--config", "--print_config"}


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page != CHANGES], ids=lambda page: str(page.relative_to(ROOT))
)
def test_every_command_of_a_page_parses(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    refused = refused_commands(read(page))
    assert not refused, "\n".join(refused)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_flags_and_paths_of_a_page_are_there(page: Path, known_flags: set[str]) -> None:
    text = read(page)
    prose = split_page(text)[1]
    assert not (broken := broken_links(page, text)), "\n".join(broken)
    assert not (uneven := uneven_tables(prose)), "\n".join(uneven)
    assert len(re.findall(r"^# ", prose, re.MULTILINE)) == 1, "a page has one title"
    if page != CHANGES:
        assert not (unknown := unknown_flags(prose, known_flags)), unknown
        assert not (missing := missing_paths(prose)), missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_of_a_page_compiles_and_imports_what_is_there(page: Path) -> None:
    for language, code in split_page(read(page))[0]:
        if language != "python":
            continue
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] in {
                "model",
                "utils",
                "transformers",
            }:
                module = importlib.import_module(str(node.module))
                missing = [alias.name for alias in node.names if not hasattr(module, alias.name)]
                assert not missing, f"{page.name}: {node.module} has no {missing}"


def test_the_pages_of_the_house_are_there_and_linked() -> None:
    readme = read(ROOT / "README.md")
    assert len(readme.splitlines()) <= README_LINES
    missing = [page.name for page in (ROOT / "docs").glob("*.md") if f"docs/{page.name}" not in readme]
    assert not missing, f"README links to all of docs/, but not to {missing}"


def test_no_page_says_what_another_says() -> None:
    repeated = repeated_passages({str(page.relative_to(ROOT)): read(page) for page in PAGES})
    assert not repeated, "\n".join(repeated[:20])


def test_names_of_functions_and_classes_are_in_the_code() -> None:
    sources = "\n".join(read(path) for path in [*CODE, *ROOT.glob("configs/**/*.yaml")] if path != Path(__file__))
    exempt = {CHANGES, ROOT / "docs" / "facts.md"}  # these name what is gone, or the release's
    unknown = {page.name: unknown_names(split_page(read(page))[1], sources) for page in PAGES if page not in exempt}
    assert not any(unknown.values()), {page: names for page, names in unknown.items() if names}


def test_messages_that_troubleshooting_explains_are_in_the_code() -> None:
    sources = "\n".join(read(path) for path in [*CODE, ROOT / "Makefile"] if "tests" not in path.parts)
    sources = re.sub(r"\"\s*\n\s*f?\"", "", sources)  # a sentence over two lines of source
    rows = [line.split("|")[1] for line in read(ROOT / "docs" / "troubleshooting.md").splitlines() if line[:3] == "| `"]
    messages = [code for row in rows for code in inline_code(row)]
    assert len(messages) > 10
    # "…", N and numbers stand for what differs from run to run.
    parts = [max(re.split(r"…|\b[A-Z]\b|\d+|Traceback", message), key=len).strip(" :") for message in messages]
    assert not (missing := [part for part in parts if part not in sources]), missing


def test_every_fact_that_code_cites_is_numbered() -> None:
    facts, cited = numbered_facts(), {path: cited_facts(read(path)) for path in CODE if path != Path(__file__)}
    missing = [f"{path.relative_to(ROOT)}: {sorted(names - facts)}" for path, names in cited.items() if names - facts]
    assert not missing, "\n".join(missing)
    assert len(set().union(*cited.values())) > 15, "citations are no longer found"


# --- the checker itself -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command",
    [
        "python train_ds.py --no_such_flag 1",
        "python train_ds.py --zero_stage 7 --version x",
        "python no_such_script.py",
        "deepspeed train_ds.py --config configs/absent.yaml",
        "torchrun --nproc_per_node 8 evaluate.py x --no_such_flag",
        "python -m demo --size huge",
        "python -m utils.no_such_module",
        "make no-such-target",
        "make demo NO_SUCH_VARIABLE=1",
        "pip install -r absent.txt",
        "srun bash -c 'exec torchrun --nnodes 2 absent.py'",
    ],
)
def test_checker_refuses(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert refused_commands(f"Text\n\n```bash\n{command}\n```\n")
    assert refused_commands(f"Text\n\n    {command}\n")


def test_checker_reads_pipes_comments_variables_and_continued_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    block = (
        'echo "x; y" | python chat.py --version=a --image=b --echo   # a comment\n'
        'CUDA_VISIBLE_DEVICES="" python train_ds.py \\\n  --version a \\\n  --no_such_flag && make demo DEMO=smoke\n'
        "tree/        # no command\n"
    )
    text = f"Text\n\n```bash\n{block}```\n"
    assert [words[0] for words in commands_of(text)] == ["echo", "python", "python", "make"]
    assert len(refused_commands(text)) == 1


def test_checker_finds_broken_links_paths_flags_and_repetitions(tmp_path: Path, known_flags: set[str]) -> None:
    page = tmp_path / "page.md"
    text = "# A `b` c, d\n\n[a](absent.md) [b](#a-b-c-d) [c](#absent) [d](https://x.y) `[e](in_code.md)`\n"
    assert broken_links(page, text) == ["page.md: absent.md: no such file", "page.md: #absent: no such heading"]
    assert unknown_flags("`--lr 1` `--learning-rate`", known_flags) == ["--learning-rate"]
    assert missing_paths("`utils/engine/fit.py`, `utils/engine/absent.py`, `model/`") == ["utils/engine/absent.py"]
    assert unknown_names("`some_name`, `SomeName`, `other_name()`, `plain`", "def other_name():") == [
        "SomeName",
        "some_name",
    ]
    sentence = " ".join(f"word{number}" for number in range(REPEATED_WORDS))
    assert repeated_passages({"a": sentence, "b": f"Other. {sentence}\nmore"})
    assert not repeated_passages({"a": sentence, "b": sentence.replace("word7", "word")})
    assert uneven_tables("| a | b |\n|---|---|\n| `x | y` | c |\n| c |\n\n| d |") == ["| c |"]


def test_checker_finds_cited_facts() -> None:
    source = '"""As docs/facts.md, M7 and E3 say. (golden facts C) # that (fact P1), artefact A1, facts M3,\n    E2."""'
    assert cited_facts(source) == {"M7", "E3", "C", "P1", "M3", "E2"}
