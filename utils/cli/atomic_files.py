"""Text files that are there whole or not at all."""

import os
from collections.abc import Iterable
from pathlib import Path


def write_whole(path: Path, texts: Iterable[str]) -> None:
    """Write texts one after the other, in UTF-8; who reads meanwhile sees what was there before, never half a file.

    OSError when it cannot be written.
    """
    draft = path.with_suffix(".draft")  # a name that no pattern for `path` matches
    with draft.open("w", encoding="utf-8") as file:
        file.writelines(texts)
    os.replace(draft, path)
