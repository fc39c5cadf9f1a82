"""From nested dataclasses to a command line: flags, switches, YAML files, and one sentence when something is wrong.

A script's config is a dataclass whose fields are made with `option(...)`, or are dataclasses of such: its groups.
Flags are flat (`--lr`), YAML may be flat or have the groups as its sections. Values come from, later ones winning: the
defaults, what an earlier run recorded, the files of --config in their order, the command line.
"""

import argparse
import dataclasses
import difflib
import logging
import sys
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Generic, NoReturn, TypeVar

import yaml

from utils.cli.errors import UserError

logger = logging.getLogger(__name__)

T = TypeVar("T", bound=Any)


def option(
    default: Any,
    help: str,
    *,
    choices: tuple[str, ...] = (),
    low: float | None = None,
    above: float | None = None,
    high: float | None = None,
    join: str = "",
    no_effect: str = "",
    formerly: str = "",
) -> Any:
    """A field of a config.

    Args:
        default: the one home of the default. help: what it does, one line.
        choices: the only values allowed. low, high: inclusive limits. above: exclusive lower limit.
        join: a YAML list becomes one string, joined by this.
        no_effect: why the flag is accepted and does nothing; of a switch, where it differs from its default.
        formerly: an older name of the flag, still accepted.
    """
    limits = {"choices": choices, "low": low, "above": above, "high": high}
    return dataclasses.field(
        default=default,
        metadata={"help": help, "join": join, "no_effect": no_effect, "formerly": formerly} | limits,
    )


@dataclasses.dataclass(frozen=True)
class Ignored:
    """Fields of another config that a script accepts as flags and does nothing with."""

    owner: type
    why: str
    names: tuple[str, ...] = ()
    """Empty: all fields that the script's own config has not."""


@dataclasses.dataclass(frozen=True)
class WithoutEffect(Generic[T]):
    """Flags that do nothing where `when` holds for the config."""

    when: Callable[[T], Any]
    names: tuple[str, ...]
    why: str


@dataclasses.dataclass(frozen=True)
class Script(Generic[T]):
    """A script's command line."""

    name: str
    description: str
    config: type[T]
    ignored: tuple[Ignored, ...] = ()
    without_effect: tuple[WithoutEffect[T], ...] = ()


@dataclasses.dataclass(frozen=True)
class Flag:
    """One option: the name of its group ("" for none), and why it does nothing in this script."""

    field: dataclasses.Field[Any]
    kind: type
    optional: bool
    group: str
    ignored: str = ""

    @property
    def name(self) -> str:
        return self.field.name

    @classmethod
    def of(cls, owner: type, field: dataclasses.Field[Any], group: str, ignored: str = "") -> "Flag":
        hint = typing.get_type_hints(owner)[field.name]
        parts = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        (kind,) = [part for part in parts if part is not types.NoneType]
        return cls(field, kind, len(parts) > 1, group, ignored)

    def convert(self, value: Any) -> Any:
        """`value` (of YAML, JSON or a command line) as this option's type, within its limits; else UserError."""
        if value is None and self.optional:
            return None
        if isinstance(value, list) and self.field.metadata["join"]:
            value = self.field.metadata["join"].join(str(item) for item in value)
        result = _convert(self.name, value, self.kind)
        _check_limits(self.field, result)
        return result


def groups_of(config: type) -> dict[str, type]:
    """The fields of a config that are dataclasses themselves."""
    hints = typing.get_type_hints(config)
    return {f.name: hints[f.name] for f in dataclasses.fields(config) if dataclasses.is_dataclass(hints[f.name])}


def flags_of(config: type, ignored: Iterable[Ignored] = ()) -> dict[str, Flag]:
    """Every option of a config and of its groups by its name, which is unique, and those that a script ignores."""
    found: dict[str, Flag] = {}
    for group, owner in {**groups_of(config), "": config}.items():
        for field in dataclasses.fields(owner):
            if "help" in field.metadata:
                if field.name in found:
                    raise TypeError(f"{config.__name__} has two options named {field.name}")
                found[field.name] = Flag.of(owner, field, group)
    for one in ignored:
        for field in dataclasses.fields(one.owner):
            if field.name not in found and field.name in (one.names or (field.name,)):
                found[field.name] = Flag.of(one.owner, field, "", field.metadata["no_effect"] or one.why)
    return found


def build_config(config: type[T], values: Mapping[str, Any]) -> T:
    """A config from values by flat name; what is not there has its default."""
    flags = {name: flag for name, flag in flags_of(config).items() if name in values}
    groups = {
        group: owner(**{name: values[name] for name, flag in flags.items() if flag.group == group})
        for group, owner in groups_of(config).items()
    }
    return config(**groups, **{name: values[name] for name, flag in flags.items() if not flag.group})


def flatten(config: Any) -> dict[str, Any]:
    """All values of a config by flat name, plain enough for JSON."""
    return {
        name: getattr(getattr(config, flag.group) if flag.group else config, name)
        for name, flag in flags_of(type(config)).items()
    }


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


class _ArgumentParser(argparse.ArgumentParser):
    """argparse whose complaint is one sentence, without the page of usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def _make_parser(script: Script[Any], flags: Mapping[str, Flag]) -> _ArgumentParser:
    parser = _ArgumentParser(
        prog=script.name, description=script.description, allow_abbrev=False, argument_default=argparse.SUPPRESS
    )
    parser.add_argument(
        "--config", metavar="FILE.yaml", nargs="+", action="extend", help="read values from these files; flags win"
    )
    parser.add_argument("--print_config", action="store_true", help="print every value as YAML and stop")
    sections: dict[str, Any] = {"": parser} | {g: parser.add_argument_group(g) for g in groups_of(script.config)}
    for name, flag in flags.items():
        default = flag.field.default
        text = f"no effect: {flag.ignored}" if flag.ignored else flag.field.metadata["help"]
        text += f" (default: {default!r})" if default not in ("", None) and not flag.ignored else ""
        add, text = sections[flag.group].add_argument, text.replace("%", "%%")
        if flag.kind is bool:
            add(f"--{name}", dest=name, action="store_true", help=text)
            add(f"--no_{name}", dest=name, action="store_false", help=argparse.SUPPRESS)
        else:
            add(f"--{name}", dest=name, metavar=flag.kind.__name__.upper(), help=text)
    return parser


def _rename(name: str, flags: Mapping[str, Flag]) -> str:
    """Today's name of a flag, which is said where an older one was given."""
    for flag in flags.values():
        old = flag.field.metadata["formerly"]
        if old and name.removeprefix("no_") == old:
            logger.warning(f"--{old} is called --{flag.name} now")
            return name.replace(old, flag.name)
    return name


def _plain_spelling(word: str, flags: Mapping[str, Flag]) -> str:
    """`--vision-tower=x` -> `--vision_tower=x`; anything that is no long flag stays as it is."""
    if not word.startswith("--") or word == "--":
        return word
    name, equals, value = word[2:].partition("=")
    return f"--{_rename(name.replace('-', '_'), flags)}{equals}{value}"


def _did_you_mean(name: str, known: Iterable[str], dashes: str = "--") -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {dashes}{near[0]}?" if near else ""


def _unknown(words: list[str], flags: Mapping[str, Flag]) -> str:
    """The sentence about words that no flag took."""
    word = words[0]
    if not word.startswith("-"):
        return f"do not know what to do with {word!r}: every value belongs to a flag"
    name = word.lstrip("-").partition("=")[0]
    return f"there is no flag --{name}" + (_did_you_mean(name, flags) or " (--help lists them)")


def read_yaml(path: str | Path, flags: Mapping[str, Flag]) -> dict[str, Any]:
    """The values of a YAML file by flag, flat or in sections named by group; UserError says what is wrong with it.

    `include: [other.yaml]` reads other files first, by their place beside this one; what stands here wins.
    """
    content = _load_yaml(Path(path))
    included = content.pop("include", [])
    result: dict[str, Any] = {}
    for other in [included] if isinstance(included, str) else included:
        result |= read_yaml(Path(path).parent / other, flags)
    groups = {flag.group for flag in flags.values() if flag.group}
    for key, value in content.items():
        if key in groups and isinstance(value, dict):
            section = {name: one for name, one in flags.items() if one.group == key}
            for inner, one in value.items():
                name = _known(f"{path}, section {key},", str(inner), section)
                result[name] = flags[name].convert(one)
        else:
            name = _known(str(path), key, flags)
            result[name] = flags[name].convert(value)
    return result


def _known(where: str, key: str, flags: Mapping[str, Flag]) -> str:
    name = _rename(key.lstrip("-").replace("-", "_"), flags)
    if name not in flags:
        raise UserError(f"the config file {where} sets {key!r}, which is no flag{_did_you_mean(name, flags, '')}")
    return name


def _load_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the config file {path}: {getattr(error, 'strerror', None) or error}") from None
    except yaml.YAMLError as error:
        place = getattr(error, "problem_mark", None)
        line = f" (line {place.line + 1})" if place is not None else ""
        raise UserError(f"the config file {path} is not valid YAML{line}") from None
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise UserError(f"the config file {path} must hold `name: value` lines")
    return values


def parse(script: Script[T], argv: list[str] | None, recorded: Mapping[str, Any] | None = None) -> T:
    """The config of a script.

    Leaves with status 2 and one sentence on a bad command line, with 0 after --help or --print_config.
    Flags that have no effect are named on stderr with the reason.

    Args:
        recorded: values of an earlier run, by flag; what is no flag of this script is passed over.
    """
    flags = flags_of(script.config, script.ignored)
    parser = _make_parser(script, flags)
    words = [_plain_spelling(word, flags) for word in (sys.argv[1:] if argv is None else argv)]
    found, rest = parser.parse_known_args(words)
    if rest:
        parser.error(_unknown(rest, flags))
    values = vars(found)
    files, print_config = values.pop("config", []), values.pop("print_config", False)
    try:
        given: dict[str, Any] = {}
        for path in files:
            given |= read_yaml(path, flags)
        given |= {name: flags[name].convert(value) for name, value in values.items()}
        config = build_config(script.config, _convert_recorded(recorded or {}, flags) | given)
        if print_config:
            sys.stdout.write(yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True))
            parser.exit(0)
        for part in (*(getattr(config, group) for group in groups_of(script.config)), config):
            if hasattr(part, "check"):
                part.check()
    except UserError as error:
        parser.error(str(error))
    for sentence in _list_without_effect(script, flags, config, given):
        logger.warning(f"{script.name}: {sentence}")
    return config


def _convert_recorded(recorded: Mapping[str, Any], flags: Mapping[str, Flag]) -> dict[str, Any]:
    found = {}
    for name, flag in flags.items():
        key = name if name in recorded else flag.field.metadata["formerly"]
        if key in recorded and not flag.ignored:
            found[name] = flag.convert(recorded[key])
    return found


def _list_without_effect(
    script: Script[T], flags: Mapping[str, Flag], config: T, given: Mapping[str, Any]
) -> list[str]:
    """One sentence per reason, naming every given flag it holds for."""
    reasons: dict[str, str] = {}
    for name, value in given.items():
        flag = flags[name]
        changed = flag.kind is not bool or value != flag.field.default
        if flag.ignored or (flag.field.metadata["no_effect"] and changed):
            reasons[name] = flag.ignored or flag.field.metadata["no_effect"]
    for rule in script.without_effect:
        if rule.when(config):
            reasons |= {name: rule.why for name in rule.names if name in given and name not in reasons}
    by_reason: dict[str, list[str]] = {}
    for name, why in reasons.items():
        by_reason.setdefault(why, []).append(f"--no_{name}" if given[name] is False else f"--{name}")
    return [f"{', '.join(named)}: no effect, {why}" for why, named in by_reason.items()]
