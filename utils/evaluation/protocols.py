"""The ways of asking a model, by name; what each is for is told in `utils.evaluation.ask`."""

from collections.abc import Mapping

from utils.cli.errors import UserError

FREE, TEACHER, RELEASE = "free", "teacher", "release"
PROTOCOLS: Mapping[str, str] = {
    FREE: "free-running, greedy: the model says its seg groups itself",
    TEACHER: "teacher-forced: the true answer with its seg groups is given, the model only draws",
    RELEASE: "the release's two validation loops with their quirks, not comparable with the others",
}


def split_protocols(text: str) -> tuple[str, ...]:
    """The protocols of "free,teacher" in the order of PROTOCOLS. UserError names one that is not there."""
    asked = [part.strip() for part in text.split(",")]
    for name in asked:
        if name not in PROTOCOLS:
            raise UserError(f"--protocol names {name!r}; expected {', '.join(PROTOCOLS)}, or several joined by commas")
    return tuple(name for name in PROTOCOLS if name in asked)
