"""What every script does around its main(): log to stderr, and turn a user's error into one sentence."""

import errno
import os
import sys
import traceback
from collections.abc import Callable

from model.structures import PixelLMError
from utils.cli.logs import configure_logging, rank


class UserError(PixelLMError):
    """A flag, a file or a folder that the person at the keyboard gave cannot be used."""


class Stopped(Exception):
    """A run was asked to stop and has kept everything; its message says how to go on. Not a failure."""


def explain(error: BaseException) -> str | None:
    """The sentence to print instead of a traceback, or None for an error that is a mistake in the program."""
    if isinstance(error, PixelLMError):
        return " ".join(str(error).split())
    if isinstance(error, OSError) and error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EROFS}:
        where = f" while writing {error.filename}" if error.filename else ""
        return (
            f"{os.strerror(error.errno)}{where}: free some space or choose another folder, then run the command again"
        )
    return None


def run_script(main: Callable[[list[str] | None], int | None], argv: list[str] | None = None) -> int:
    """Run `main(argv)` and return the exit status: its own (None counts as 0), 2 for a user's error, 130 for Ctrl-C.

    An error that is not a user's passes through with its traceback; one rank of several ends at once after it, so that
    the others, which wait for it, notice.
    """
    configure_logging()
    try:
        return main(argv) or 0
    except Stopped as stopped:
        if rank() == 0:
            sys.stderr.write(f"\n{stopped}\n")
        return 0
    except KeyboardInterrupt as interrupt:
        if rank() == 0:
            sys.stderr.write(f"\n{str(interrupt) or 'interrupted'}\n")
        return 130
    except Exception as error:
        sentence = explain(error)
        if sentence is None and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            sys.stderr.write(f"\nrank {rank()} failed:\n{traceback.format_exc()}")
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(1)  # threads of the others' connections may keep the interpreter from ending by itself
        if sentence is None:
            raise
        start = "\n" if rank() else ""  # rank 0's progress bar may be in the middle of its line
        sys.stderr.write(f"{start}{os.path.basename(sys.argv[0]) or 'error'}: {sentence}\n")
        return 2
