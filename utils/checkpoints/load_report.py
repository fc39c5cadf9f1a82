"""Where every weight of a model came from, for a person and for the run card."""

from dataclasses import dataclass, field
from typing import Any


@dataclass
class LoadReport:
    """Names of the tensors that were loaded, of those that are new and why, and of those that were ignored and why.

    layout: what the checkpoint was recognised as.
    """

    loaded: list[str] = field(default_factory=list)
    newly_initialized: dict[str, str] = field(default_factory=dict)
    ignored: dict[str, str] = field(default_factory=dict)
    layout: str = ""

    def as_dict(self) -> dict[str, Any]:
        """For the run card: the layout, counts of what was loaded, and groups of the rest."""
        return {
            "layout": self.layout,
            "loaded": len(self.loaded),
            "loaded_parts": self._loaded_parts(),
            "newly_initialized": _by_part(self.newly_initialized),
            "ignored": _by_part(self.ignored),
        }

    def table(self) -> str:
        """Lines for a person: what was recognised, loaded, new and why, ignored and why."""
        lines = [f"layout   {self.layout}"] if self.layout else []
        parts = ", ".join(self._loaded_parts())
        lines.append(f"loaded   {len(self.loaded)} tensors" + (f": {parts}" if parts else ""))
        for title, groups in (("new", _by_part(self.newly_initialized)), ("ignored", _by_part(self.ignored))):
            lines += [f"{title:<8} {name}: {reason}" for name, reason in groups.items()]
        return "\n".join(lines)

    def _loaded_parts(self) -> list[str]:
        return list(_by_part(dict.fromkeys(self.loaded, "")))


def _by_part(reasons: dict[str, str]) -> dict[str, str]:
    """Tensor names with a reason, gathered under the part they belong to."""
    groups: dict[tuple[str, str], int] = {}
    for name, reason in reasons.items():
        part = name.split(".")[0]
        groups[part, reason] = groups.get((part, reason), 0) + 1
    return {f"{part} ({count})": reason for (part, reason), count in groups.items()}
