"""Logging of every script: plain sentences on stderr, each once, those of the launcher's first process only."""

import logging
import os
import sys

OURS = ("model", "utils", "demo", "tools", "__main__")
"""Loggers that are heard from INFO on; other libraries' from WARNING on, as ever."""

EVERY_RANK = {"every_rank": True}
"""For `extra=` of a message that differs between processes: none of them keeps it to itself."""


def rank() -> int:
    """This process's number among those of the launcher; 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


class OnceFilter(logging.Filter):
    """Lets a message of ours through once per process, and on rank 0 only, errors and EVERY_RANK excepted."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        if record.name.partition(".")[0] not in OURS:
            return True
        if rank() and record.levelno < logging.ERROR and not getattr(record, "every_rank", False):
            return False
        message = record.getMessage()
        if message in self._seen:
            return False
        self._seen.add(message)
        return True


class StderrHandler(logging.Handler):
    """Writes to what sys.stderr is at that moment."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            sys.stderr.write(self.format(record).rstrip() + "\n")
            sys.stderr.flush()
        except Exception:
            self.handleError(record)


def configure_logging() -> None:
    """Send messages to stderr; called again, it forgets what was said before."""
    root = logging.getLogger()
    for handler in root.handlers[:]:
        if isinstance(handler, StderrHandler):
            root.removeHandler(handler)
    handler = StderrHandler()
    handler.addFilter(OnceFilter())
    root.addHandler(handler)
    for name in OURS:
        logging.getLogger(name).setLevel(logging.INFO)
