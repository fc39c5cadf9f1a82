"""Scores during training: the questions dealt out to the ranks, their figures gathered, some answers drawn."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from model.overlay import draw_overlay
from model.predictor import Predictor
from utils.checkpoints.builder import BuiltModel
from utils.cli.config import TrainConfig
from utils.data.readers.registry import build_eval_reader
from utils.data.samples import Sample
from utils.engine.base import Engine
from utils.evaluation.ask import Asked, Figures, Scored, evaluate, summarise

# Scores by kind that get a curve of their own.
BY_KIND = "giou_by_kind"
Overlay = Callable[[np.ndarray, np.ndarray, Sequence[str]], np.ndarray]


def build_validation(config: TrainConfig, engine: Engine, built: BuiltModel) -> "Validation | None":
    """Validation of a run as its config says; None with --no_eval."""
    if config.validation.no_eval:
        return None
    return Validation(
        engine,
        Predictor(built.model, built.processor),
        build_eval_reader(config.validation.val_dataset, config.data.dataset_dir, index_dir=config.data.index_dir),
        batch_size=config.validation.val_batch_size,
        limit=config.validation.val_limit,
        max_new_tokens=config.validation.max_new_tokens,
        open_image=built.processor.open_image,
        overlay=draw_overlay,
    )


class _Share:
    """Every `step`-th sample from `first` on."""

    def __init__(self, samples: Any, first: int, step: int) -> None:
        self.samples, self.indices = samples, range(first, len(samples), step)

    def __iter__(self) -> Iterator[Sample]:
        return (self.samples[index] for index in self.indices)


class Validation:
    """Free-running and teacher-forced scores of the model in training.

    Args:
        samples: indexed, the same on every rank. limit: questions to score over all ranks; 0 for all.
        open_image: path -> uint8 (H, W, 3). overlay: (image, bool masks, phrases) -> uint8 image.
        shown: answers kept to be drawn.
    """

    def __init__(
        self,
        engine: Engine,
        predictor: Asked,
        samples: Any,
        *,
        batch_size: int,
        limit: int,
        max_new_tokens: int,
        open_image: Callable[[str], np.ndarray],
        overlay: Overlay,
        shown: int = 4,
    ) -> None:
        self.engine, self.predictor = engine, predictor
        self.share = _Share(samples, engine.rank, engine.world_size)
        self.batch_size, self.max_new_tokens = batch_size, max_new_tokens
        self.limit = -(-limit // engine.world_size)
        self.open_image, self.overlay, self.shown = open_image, overlay, shown
        self.kept: list[Scored] = []

    def scores(self) -> dict[str, float]:
        """Scores by name over all ranks' questions, the same on every rank. All ranks call this together."""
        self.kept, figures = [], []

        def keep(scored: Scored) -> None:
            figures.append(scored.figures)
            if len(self.kept) < self.shown:
                self.kept.append(scored)

        if self.share.indices:
            evaluate(
                self.predictor,
                self.share,
                batch_size=self.batch_size,
                limit=self.limit,
                shuffled=False,
                max_new_tokens=self.max_new_tokens,
                on_scored=keep,
                progress=False,
            )
        everywhere: list[Figures] = [one for part in self.engine.gather(figures) for one in part]
        summary = summarise(everywhere)
        scores = {name: value for name, value in summary.items() if isinstance(value, float)}
        return scores | {f"giou/{kind}": value for kind, value in summary[BY_KIND].items() if value is not None}

    def images(self) -> dict[str, np.ndarray]:
        """The first answers of this rank's last `scores`, drawn over their images."""
        return {
            f"answers/{number}": self.overlay(
                self.open_image(one.question.image_path), one.answer.masks, one.answer.phrases
            )
            for number, one in enumerate(self.kept)
        }
