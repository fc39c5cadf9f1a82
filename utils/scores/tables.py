"""Scores for people: the table a run prints, and rows to paste into Markdown and LaTeX."""

from collections.abc import Mapping, Sequence
from typing import Any

COLUMNS = {
    "n": "n",
    "giou": "gIoU",
    "ciou": "cIoU",
    "giou_teacher_forced": "gIoU, teacher-forced",
    "giou_shuffled": "gIoU, other picture",
    "target_count_accuracy": "count",
    "text_accuracy": "text",
}
_LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"} | {
    sign: f"\\{sign}" for sign in "&%$#_{}"
}


def score_table(scores: Mapping[str, Any]) -> str:
    """The scores over all questions and by kind, in columns."""
    kinds = list(scores["n_by_kind"])
    rows = [["kind", *COLUMNS.values()], ["all", *(_number(scores[name]) for name in COLUMNS)]]
    rows += [[kind, *(_number(scores[f"{name}_by_kind"][kind]) for name in COLUMNS)] for kind in kinds]
    return columns(rows)


def columns(rows: Sequence[Sequence[str]]) -> str:
    """Rows of equally many cells as lines, the first column to the left and the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    )


def quotable(result: Mapping[str, Any]) -> tuple[str, str]:
    """(Markdown, LaTeX) of a results.json: a row per data set and protocol, per cent, with 95% intervals."""
    rows = _rows(result)
    head = ("data set", "protocol", "n", "gIoU", "cIoU")
    markdown = ["| " + " | ".join(head) + " |", "|---|---|--:|--:|--:|"]
    markdown += ["| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |" for row in rows]
    latex = [" & ".join(_latex(cell) for cell in row) + r" \\" for row in (head, *rows)]
    return "\n".join(markdown), "\n".join(latex)


def _rows(result: Mapping[str, Any]) -> list[tuple[str, ...]]:
    rows = []
    for name, entry in result["datasets"].items():
        n = str(entry["n"])
        if entry["giou"] is not None:
            cells = [_percent(entry[key], entry.get(f"{key}_interval")) for key in ("giou", "ciou")]
            rows.append((name, "free", n, *cells))
        if entry.get("giou_teacher_forced") is not None:
            keys = ("giou_teacher_forced", "ciou_teacher_forced")
            cells = [_percent(entry[key], entry.get(f"{key}_interval")) for key in keys]
            rows.append((name, "teacher", str(entry["n_teacher_forced"]), *cells))
    for loop, entry in (result.get("release") or {}).items():
        if entry["giou"] is not None:
            rows.append(("all", f"release, {loop}", str(result["n"]), _percent(entry["giou"]), _percent(entry["ciou"])))
    return rows


def _percent(value: float | None, interval: Sequence[float] | None = None) -> str:
    if value is None:
        return "-"
    around = f" [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]" if interval else ""
    return f"{100 * value:.1f}{around}"


def _latex(text: str) -> str:
    return "".join(_LATEX.get(sign, sign) for sign in text)


def _number(value: float | int | None) -> str:
    return "-" if value is None else str(value) if isinstance(value, int) else f"{value:.3f}"
