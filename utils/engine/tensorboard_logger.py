"""Curves and images of a run, in TensorBoard's files."""

from pathlib import Path
from typing import Any

import numpy as np

from utils.engine.base import StepReport


class TensorBoardLogger:
    """TensorBoard events of a run, on rank 0 only; a resumed run hides what it does again."""

    def __init__(self, folder: Path, first_step: int, active: bool) -> None:
        self.writer: Any = None
        if active:
            from torch.utils.tensorboard import SummaryWriter  # takes a second: not for the other ranks

            self.writer = SummaryWriter(str(folder), purge_step=first_step + 1 if first_step else None)

    def step(self, number: int, report: StepReport) -> None:
        """Losses, learning rate and gradient norm after optimizer step `number`."""
        if self.writer is None:
            return
        for name, value in report.losses.items():
            self.writer.add_scalar(f"loss/{name}", value, number)
        self.writer.add_scalar("loss/total", report.total, number)
        self.writer.add_scalar("train/learning_rate", report.learning_rate, number)
        self.writer.add_scalar("train/gradient_norm", report.gradient_norm, number)

    def throughput(self, number: int, metrics: dict[str, float]) -> None:
        """Speed, memory, and the seconds of a step, by the names of their curves."""
        if self.writer is not None:
            for name, value in metrics.items():
                self.writer.add_scalar(name, value, number)

    def scores(self, number: int, scores: dict[str, float]) -> None:
        """Validation scores."""
        if self.writer is not None:
            for name, value in scores.items():
                self.writer.add_scalar(f"validation/{name}", value, number)

    def images(self, number: int, images: dict[str, np.ndarray]) -> None:
        """Images by name, (H, W, 3) uint8."""
        if self.writer is not None:
            for name, image in images.items():
                self.writer.add_image(name, image, number, dataformats="HWC")

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()
