"""Scores for people: the table a run prints, and rows to paste into Markdown and LaTeX."""

from collections.abc import Mapping, Sequence
from typing import Any

COLUMNS = {
    "n": "n",
    "giou": "gIoU",
    "ciou": "cIoU",
    "giou_teacher_forced": "gIoU, teacher-forced",
    "giou_shuffled": "gIoU, other image",
    "target_count_accuracy": "count",
    "text_accuracy": "text",
}
_FURTHER = ("P@.5", "P@.7", "P@.9", "box", "N-acc", "T-acc", "mIoU", "ECE")
_TEXT_COLUMNS = ("exact", "VQA", "BLEU", "perplexity")
_STAGES = {"pre_judge": "before judge", "judged": "after judge"}
_LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"} | {
    sign: f"\\{sign}" for sign in "&%$#_{}"
}


def score_table(result: Mapping[str, Any]) -> str:
    """The scores of a results.json for a person: of masks over all questions and by kind; MUSE's; of words."""
    found = []
    if kinds := list(result["n_by_kind"]):
        rows = [["kind", *COLUMNS.values()], ["all", *(_number(result[name]) for name in COLUMNS)]]
        rows += [[kind, *(_number(result[f"{name}_by_kind"][kind]) for name in COLUMNS)] for kind in kinds]
        found.append(columns(rows))
    rows = [["MUSE", "n", "gIoU", "cIoU"]]
    for name, entry in result["datasets"].items():
        for stage, told in entry.get("muse", {}).items():
            rows.append([f"{name}, {_STAGES[stage]}", *(_number(told[key]) for key in ("n", "giou", "ciou"))])
    if len(rows) > 1:
        found.append(columns(rows))
    if text := result.get("text"):
        keys = ("n", "exact_match", "vqa_accuracy", "bleu", "perplexity")
        found.append(columns([["in words alone", "n", *_TEXT_COLUMNS], ["all", *(_number(text[key]) for key in keys)]]))
    return "\n\n".join(found)


def columns(rows: Sequence[Sequence[str]]) -> str:
    """Rows of equally many cells as lines, the first column to the left and the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    )


def quotable(result: Mapping[str, Any]) -> tuple[str, ...]:
    """Tables of a results.json, each in Markdown and then in LaTeX, with 95% intervals: per cent by data set and
    protocol; what else is told of each data set; and scores of answers in words alone."""
    found: list[str] = []
    tables = (
        (("data set", "protocol", "n", "gIoU", "cIoU"), _rows(result)),
        (("data set", "protocol", *_FURTHER), _further_rows(result)),
        (("data set", "n", *_TEXT_COLUMNS), _text_rows(result)),
    )
    for head, rows in tables:
        if rows:
            numbers = sum(name not in ("data set", "protocol") for name in head)
            lines = ["| " + " | ".join(head) + " |", "|" + "---|" * (len(head) - numbers) + "--:|" * numbers]
            lines += ["| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |" for row in rows]
            latex = [" & ".join(_latex(cell) for cell in row) + r" \\" for row in (head, *rows)]
            found += ["\n".join(lines), "\n".join(latex)]
    return tuple(found)


def _further_rows(result: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Rows of what `_FURTHER` names."""
    rows = []
    for name, entry in result["datasets"].items():
        for protocol, miou in (("free", "miou"), ("teacher", "miou_teacher_forced")):
            told = entry.get(protocol)
            if told is not None:
                precision = [told["precision"][at] for at in ("0.5", "0.7", "0.9")]
                values = [*precision, told["box_accuracy"], told.get("n_acc"), told.get("t_acc"), entry.get(miou)]
                ece = told.get("calibration_error")
                rows.append((name, protocol, *map(_percent, values), "-" if ece is None else f"{ece:.3f}"))
    return rows


def _text_rows(result: Mapping[str, Any]) -> list[tuple[str, ...]]:
    rows = []
    for name, entry in result["datasets"].items():
        if told := entry.get("text"):
            cells = [_percent(told[key], told.get(f"{key}_interval")) for key in ("exact_match", "vqa_accuracy")]
            perplexity = _plain(told["perplexity"], told.get("perplexity_interval"), digits=2)
            rows.append((name, str(told["n"]), *cells, _plain(told["bleu"], None, digits=1), perplexity))
    return rows


def _plain(value: float | None, interval: Sequence[float] | None, digits: int) -> str:
    if value is None:
        return "-"
    around = f" [{interval[0]:.{digits}f}, {interval[1]:.{digits}f}]" if interval else ""
    return f"{value:.{digits}f}{around}"


def _rows(result: Mapping[str, Any]) -> list[tuple[str, ...]]:
    rows = []
    for name, entry in result["datasets"].items():
        rows += _rows_of_set(name, entry)
        for query, part in entry.get("by_query", {}).items():
            rows += _rows_of_set(f"{name}, {query} queries", part)
        for stage, told in entry.get("muse", {}).items():
            if told["giou"] is not None:
                rows.append((f"{name}, MUSE {_STAGES[stage]}", "free", str(told["n"]), *_cells(told, "giou", "ciou")))
    return rows


def _rows_of_set(name: str, entry: Mapping[str, Any]) -> list[tuple[str, ...]]:
    rows = []
    if entry["giou"] is not None:
        rows.append((name, "free", str(entry["n"]), *_cells(entry, "giou", "ciou")))
    if entry.get("giou_teacher_forced") is not None:
        cells = _cells(entry, "giou_teacher_forced", "ciou_teacher_forced")
        rows.append((name, "teacher", str(entry["n_teacher_forced"]), *cells))
    for loop, told in entry.get("release", {}).items():
        if told["giou"] is not None:
            rows.append((name, f"release, {loop}", str(entry["n"]), *_cells(told, "giou", "ciou")))
    return rows


def _cells(entry: Mapping[str, Any], *keys: str) -> list[str]:
    return [_percent(entry[key], entry.get(f"{key}_interval")) for key in keys]


def _percent(value: float | None, interval: Sequence[float] | None = None) -> str:
    if value is None:
        return "-"
    around = f" [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]" if interval else ""
    return f"{100 * value:.1f}{around}"


def _latex(text: str) -> str:
    return "".join(_LATEX.get(sign, sign) for sign in text)


def _number(value: float | int | None) -> str:
    return "-" if value is None else str(value) if isinstance(value, int) else f"{value:.3f}"
