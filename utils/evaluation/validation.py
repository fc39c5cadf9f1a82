"""Scores during training: the questions dealt out to the ranks, their figures gathered, some answers drawn."""

from typing import Any

import numpy as np

from model.image_processing_pixellm import open_image
from model.overlay import draw_overlay
from model.predictor import Predictor
from utils.checkpoints.builder import BuiltModel
from utils.cli.config import TrainConfig
from utils.data.readers.registry import build_eval_reader
from utils.engine.base import Engine
from utils.evaluation.ask import QuestionScores, Scored, evaluate, summarise

# Scores by kind that get a curve of their own.
BY_KIND = "giou_by_kind"


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
    )


class Validation:
    """Free-running and teacher-forced scores of the model in training.

    Args:
        samples: indexed, the same on every rank. limit: questions to score over all ranks; 0 for all.
        shown: answers kept to be drawn.
    """

    def __init__(
        self,
        engine: Engine,
        predictor: Predictor,
        samples: Any,
        *,
        batch_size: int,
        limit: int,
        max_new_tokens: int,
        shown: int = 4,
    ) -> None:
        self.engine, self.predictor = engine, predictor
        self.samples, self.indices = samples, range(engine.rank, len(samples), engine.world_size)
        self.batch_size, self.max_new_tokens = batch_size, max_new_tokens
        self.limit = -(-limit // engine.world_size)
        self.shown = shown
        self.kept: list[Scored] = []

    def scores(self) -> dict[str, float]:
        """Scores by name over all ranks' questions, the same on every rank. All ranks call this together."""
        self.kept, figures = [], []

        def keep(scored: Scored) -> None:
            figures.append(scored.figures)
            if len(self.kept) < self.shown:
                self.kept.append(scored)

        if self.indices:
            evaluate(
                self.predictor,
                (self.samples[index] for index in self.indices),
                batch_size=self.batch_size,
                limit=self.limit,
                shuffled=False,
                max_new_tokens=self.max_new_tokens,
                on_scored=keep,
                progress=False,
            )
        everywhere: list[QuestionScores] = [one for part in self.engine.gather(figures) for one in part]
        summary = summarise(everywhere)
        scores = {name: value for name, value in summary.items() if isinstance(value, float)}
        return scores | {f"giou/{kind}": value for kind, value in summary[BY_KIND].items() if value is not None}

    def images(self) -> dict[str, np.ndarray]:
        """The first answers of this rank's last `scores`, drawn over their images."""
        return {
            f"answers/{number}": draw_overlay(open_image(one.question.image_path), one.answer.masks, one.answer.phrases)
            for number, one in enumerate(self.kept)
        }
