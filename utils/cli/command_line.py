"""From a documented dataclass to a command line: flags, switches, YAML files, and one sentence when something is wrong.

A script's arguments are a dataclass whose fields are made with `option(...)`. A field's default is written there and
nowhere else. Values come from, later ones winning: the defaults, the file named by --config, the command line.
"""

import argparse
import dataclasses
import difflib
import logging
import sys
import types
import typing
from pathlib import Path
from typing import Any, ClassVar, NoReturn, TypeVar

import yaml

from utils.cli.errors import UserError

logger = logging.getLogger(__name__)

T = TypeVar("T", bound="Arguments")


def option(
    default: Any,
    help: str,
    *,
    choices: tuple[str, ...] = (),
    low: float | None = None,
    above: float | None = None,
    high: float | None = None,
    join: str = "",
) -> Any:
    """A field of an `Arguments` dataclass.

    Args:
        default: the one home of the default. help: what it does, one line.
        choices: the only values allowed. low, high: inclusive limits. above: exclusive lower limit.
        join: a YAML list becomes one string, joined by this.
    """
    metadata = {"help": help, "choices": choices, "low": low, "above": above, "high": high, "join": join}
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass
class Arguments:
    """What a script was told. Subclasses add fields made with `option`, and may say what has no effect."""

    NO_EFFECT: ClassVar[dict[str, str]] = {}
    """Flags that are accepted but do nothing here: name -> why."""

    given: frozenset[str] = dataclasses.field(default=frozenset(), init=False, repr=False, compare=False)
    """Names of the fields that the YAML file or the command line set."""

    def check(self) -> None:
        """Raise UserError where values do not go together."""

    def without_effect(self) -> dict[str, str]:
        """Given flags that do nothing with the values at hand: name -> why."""
        return {name: why for name, why in self.NO_EFFECT.items() if name in self.given}

    def as_dict(self) -> dict[str, Any]:
        """All values by name, plain enough for JSON and YAML."""
        return {field.name: getattr(self, field.name) for field in options_of(type(self))}

    def fill_from(self: T, recorded: dict[str, Any]) -> T:
        """A copy in which fields that nobody gave take their value in `recorded`, a run card's arguments."""
        known = {field.name: field for field in options_of(type(self))}
        changes = {
            name: converted(field, recorded[name], type(self))
            for name, field in known.items()
            if name not in self.given and name in recorded
        }
        filled = dataclasses.replace(self, **changes)
        filled.given = self.given
        return filled


def options_of(kind: type[Arguments]) -> list[dataclasses.Field[Any]]:
    """The fields made with `option`, in order."""
    return [field for field in dataclasses.fields(kind) if "help" in field.metadata]


def _value_type(kind: type[Arguments], field: dataclasses.Field[Any]) -> tuple[type, bool]:
    """(bool | int | float | str, whether None is allowed)."""
    hint = typing.get_type_hints(kind)[field.name]
    if isinstance(hint, types.UnionType):
        (plain,) = [part for part in typing.get_args(hint) if part is not types.NoneType]
        return plain, True
    return hint, False


def converted(field: dataclasses.Field[Any], value: Any, kind: type[Arguments]) -> Any:
    """`value` (of YAML, JSON or a command line) as the type of `kind`'s field, within its limits; else UserError."""
    wanted, may_be_none = _value_type(kind, field)
    if value is None and may_be_none:
        return None
    if isinstance(value, list) and wanted is str and field.metadata["join"]:
        value = field.metadata["join"].join(str(item) for item in value)
    result = _convert(field.name, value, wanted)
    _check_limits(field, result)
    return result


def _convert(name: str, value: Any, wanted: type) -> Any:
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    complaint = UserError(f"--{name} must be {names[wanted]}, found {value!r}")
    if wanted is bool or isinstance(value, bool):
        if wanted is bool and isinstance(value, bool):
            return value
        raise complaint
    if wanted is str:
        if isinstance(value, (str, int, float)):
            return str(value)
        raise complaint
    if not isinstance(value, (str, int, float)) or (wanted is int and isinstance(value, float) and value != int(value)):
        raise complaint
    try:
        return wanted(value)
    except ValueError:
        raise complaint from None


def _check_limits(field: dataclasses.Field[Any], value: Any) -> None:
    limits = field.metadata
    if limits["choices"] and value not in limits["choices"]:
        raise UserError(f"--{field.name} must be one of {', '.join(limits['choices'])}, found {value!r}")
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if value != value:
            raise UserError(f"--{field.name} is not a number")
        if limits["low"] is not None and value < limits["low"]:
            raise UserError(f"--{field.name} must be at least {limits['low']}, found {value}")
        if limits["above"] is not None and value <= limits["above"]:
            raise UserError(f"--{field.name} must be greater than {limits['above']}, found {value}")
        if limits["high"] is not None and value > limits["high"]:
            raise UserError(f"--{field.name} must be at most {limits['high']}, found {value}")


class _Parser(argparse.ArgumentParser):
    """argparse whose complaint is one sentence, without the page of usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def _make_parser(kind: type[Arguments], prog: str, description: str) -> _Parser:
    parser = _Parser(prog=prog, description=description, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser.add_argument("--config", metavar="FILE.yaml", help="read values from this file; flags beside it win")
    parser.add_argument("--print_config", action="store_true", help="print every value as YAML and stop")
    for field in options_of(kind):
        wanted, _ = _value_type(kind, field)
        flag, text = f"--{field.name}", field.metadata["help"].replace("%", "%%")
        text += f" (default: {field.default!r})" if field.default not in ("", None) else ""
        if wanted is bool:
            parser.add_argument(flag, dest=field.name, action="store_true", help=text)
            parser.add_argument(f"--no_{field.name}", dest=field.name, action="store_false", help=argparse.SUPPRESS)
        else:
            parser.add_argument(flag, dest=field.name, metavar=wanted.__name__.upper(), help=text)
    return parser


def _plain_spelling(word: str) -> str:
    """`--vision-tower=x` -> `--vision_tower=x`; anything that is no long flag stays as it is."""
    if not word.startswith("--") or word == "--":
        return word
    name, equals, value = word[2:].partition("=")
    return f"--{name.replace('-', '_')}{equals}{value}"


def _unknown(words: list[str], kind: type[Arguments]) -> str:
    """The sentence about words that no flag took."""
    word = words[0]
    if not word.startswith("-"):
        return f"do not know what to do with {word!r}: every value belongs to a flag"
    name = word.lstrip("-").partition("=")[0]
    near = difflib.get_close_matches(name, [field.name for field in options_of(kind)], n=1)
    return f"there is no flag --{name}" + (f"; did you mean --{near[0]}?" if near else " (--help lists them)")


def read_yaml(path: str | Path, kind: type[Arguments]) -> dict[str, Any]:
    """The values of a YAML file by field name (dashes count as underscores); UserError says what is wrong with it."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the config file {path}: {getattr(error, 'strerror', None) or error}") from None
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        place = getattr(error, "problem_mark", None)
        line = f" (line {place.line + 1})" if place is not None else ""
        raise UserError(f"the config file {path} is not valid YAML{line}") from None
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise UserError(f"the config file {path} must hold `name: value` lines")
    known = {field.name: field for field in options_of(kind)}
    result = {}
    for key, value in values.items():
        name = key.lstrip("-").replace("-", "_")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise UserError(
                f"the config file {path} sets {key!r}, which is no flag"
                + (f"; did you mean {near[0]}?" if near else "")
            )
        result[name] = converted(known[name], value, kind)
    return result


def parse(kind: type[T], argv: list[str] | None, *, prog: str, description: str) -> T:
    """The arguments of a script.

    Leaves with status 2 and one sentence on a bad command line, with 0 after --help or --print_config.
    Flags that have no effect are named on stderr with the reason, once, on rank 0.
    """
    parser = _make_parser(kind, prog, description)
    words = [_plain_spelling(word) for word in (sys.argv[1:] if argv is None else argv)]
    found, rest = parser.parse_known_args(words)
    if rest:
        parser.error(_unknown(rest, kind))
    values = vars(found)
    config, print_config = values.pop("config", None), values.pop("print_config", False)
    fields = {field.name: field for field in options_of(kind)}
    try:
        merged = read_yaml(config, kind) if config is not None else {}
        merged |= {name: converted(fields[name], value, kind) for name, value in values.items()}
        arguments = kind(**merged)
        arguments.given = frozenset(merged)
        if print_config:
            sys.stdout.write(yaml.safe_dump(arguments.as_dict(), sort_keys=False, allow_unicode=True))
            parser.exit(0)
        arguments.check()
    except UserError as error:
        parser.error(str(error))
    for sentence in _effectless(arguments):
        logger.warning(f"{prog}: {sentence}")
    return arguments


def _effectless(arguments: Arguments) -> list[str]:
    """One sentence per reason, naming every given flag it holds for."""
    by_reason: dict[str, list[str]] = {}
    for name, why in arguments.without_effect().items():
        shown = f"--no_{name}" if getattr(arguments, name) is False else f"--{name}"
        by_reason.setdefault(why, []).append(shown)
    return [f"{', '.join(flags)}: no effect, {why}" for why, flags in by_reason.items()]
