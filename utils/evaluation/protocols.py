"""The ways of asking a model, by name; what each is for is told in `utils.evaluation.ask`."""

from collections.abc import Mapping

FREE, TEACHER, RELEASE = "free", "teacher", "release"
PROTOCOLS: Mapping[str, str] = {
    FREE: "free-running, greedy: the model says its seg groups itself",
    TEACHER: "teacher-forced: the true answer with its seg groups is given, the model only draws",
    RELEASE: "the release's two validation loops with their quirks, not comparable with the others",
}
