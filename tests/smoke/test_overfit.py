"""Eight samples learned by heart: what every part has to do for that, wired as train_ds.py wires it."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from demo.tiny import TinyShape, make_tiny
from model.predictor import Predictor
from utils.checkpoints.builder import MASK_PARTS, save_model
from utils.cli.commands import parse_train
from utils.cli.config import TrainConfig
from utils.data.readers.registry import build_eval_reader
from utils.data.samples import DIRECT, SEVERAL, Sample
from utils.engine.fit import Run
from utils.engine.runtime import open_runtime
from utils.engine.setup import StepBatches, make_engine, make_plan, seed_everything
from utils.engine.train import build_for_training, probe

SINGLE, TOGETHER = 5, 3  # samples that ask for one thing, and for several
STEPS = 400
SHAPE = TinyShape(
    image_size=48,
    patch_size=8,
    vision_width=32,
    vision_layers=3,
    vision_feature_layers=(-2, -2),
    width=32,
    layers=2,
    num_heads=2,
    text_num_heads=2,
    text_head_dim=16,
    mlp_width=64,
    vocab_size=400,
    embedding_dim=32,
    decoder_num_heads=2,
    decoder_mlp_dim=64,
    model_max_length=256,
)
RECIPE = """--dataset=refer_seg --sample_rates=1 --engine=plain --precision=fp32 --no_eval --workers=0 --lora_r=16
    --lora_alpha=32 --lora_dropout=0 --lora_target_modules=all-linear --train_vision_tower --no_gradient_checkpointing
    --batch_size=8 --grad_accumulation_steps=1 --lr=3e-3 --lr_schedule=cosine --warmup_steps=20"""


class Eight:
    """A mixture of the same few samples, again and again."""

    def __init__(self, samples: list[Sample]) -> None:
        self.samples = samples

    def __getitem__(self, i: int) -> Sample:
        return self.samples[i % len(self.samples)]


@pytest.fixture(scope="module")
def samples(smoke_data: Path) -> list[Sample]:
    """Eight images with one question each."""
    found = []
    for name, kind, count in (("refcoco", DIRECT, SINGLE), ("grefcoco", SEVERAL, TOGETHER)):
        every = [
            dataclasses.replace(sample, conversations=(conversation,))
            for sample in build_eval_reader(f"{name}|unc|train", smoke_data)
            for conversation in sample.conversations
            if conversation[0].kind == kind
        ]
        # One question an image and no image twice: the second kind is taken from the other end.
        images = {sample.image_path: sample for sample in every}
        ordered = sorted(images.values(), key=lambda sample: sample.image_path, reverse=kind == SEVERAL)
        found += ordered[:count]
    assert len({sample.image_path for sample in found}) == SINGLE + TOGETHER
    return found


def mean_iou(predictor: Predictor, samples: list[Sample]) -> float:
    """Over all targets, the answers being given."""
    turns = [sample.conversations[0][0] for sample in samples]
    images, conversations = [sample.image_path for sample in samples], [[(t.question, t.answer)] for t in turns]
    ious = []
    for turn, answer in zip(turns, predictor.segment(images, conversations, list(range(len(samples)))), strict=True):
        for target, mask in zip(turn.targets, answer.masks, strict=True):
            truth = target.decode() == 1
            ious.append((mask & truth).sum() / (mask | truth).sum())
    assert len(ious) >= SINGLE + 2 * TOGETHER
    return float(np.mean(ious))


def arguments(samples: list[Sample], folder: Path, data: Path) -> TrainConfig:
    """Those of a run on a base with random weights, which is written to `folder`."""
    words = [text for sample in samples for (turn,) in sample.conversations for text in (turn.question, turn.answer)]
    base = make_tiny(words, SHAPE, seed=0)
    save_model(base.model, base.processor, folder / "base", left_out=MASK_PARTS)
    places = [f"--version={folder / 'base'}", f"--dataset_dir={data}", f"--log_base_dir={folder}", "--exp_name=eight"]
    return parse_train([*places, *RECIPE.split(), f"--max_steps={STEPS}", f"--steps_per_epoch={STEPS}"])


def exchanged(samples: list[Sample]) -> list[Sample]:
    """Every question with the image of the next one."""
    shown = [*samples[1:], samples[0]]
    return [dataclasses.replace(s, image_path=other.image_path) for s, other in zip(samples, shown, strict=True)]


def test_eight_samples_are_learned_by_heart(
    samples: list[Sample], smoke_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    args = arguments(samples, tmp_path, smoke_data)
    runtime = open_runtime(args.engine.engine, args.engine.local_rank, args.engine.precision)
    seed_everything(args.engine.seed)
    built, trained = build_for_training(args)
    batches = StepBatches(args, runtime, Eight(samples), built.processor)
    probe(args, runtime, built, trained, batches)
    engine = make_engine(args, runtime, built.model)
    predictor = Predictor(built.model, built.processor)
    with engine.inference():
        assert mean_iou(predictor, samples) < 0.3
    Run(engine, make_plan(args, 1), args.run.folder).fit(batches)
    with engine.inference():
        assert mean_iou(predictor, samples) > 0.9
        assert mean_iou(predictor, exchanged(samples)) < 0.5
