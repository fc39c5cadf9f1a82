"""What is read of an answer by those who have never met the model that gave it."""

from typing import Protocol

import numpy as np


class Answered(Protocol):
    """An answer's words, and a bool mask (Q, H, W) for every group with its phrase, score and box (x0, y0, x1, y1)."""

    @property
    def text(self) -> str: ...
    @property
    def marked_text(self) -> str: ...
    @property
    def phrases(self) -> list[str]: ...
    @property
    def masks(self) -> np.ndarray: ...
    @property
    def scores(self) -> list[float]: ...
    @property
    def boxes(self) -> list[tuple[int, int, int, int]]: ...
    @property
    def num_broken(self) -> int: ...
