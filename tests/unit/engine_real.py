"""One optimizer step of a true PixelLM on drawn scenes, cut as a test wants it: words alone, one target, several."""

import contextlib
import dataclasses
import io
from pathlib import Path

import torch

from demo.scenes import SceneSettings, write_scene_data
from demo.scenes.planning import SceneDataSettings
from demo.tiny import make_tiny
from model.modeling_pixellm import PixelLMForCausalLM
from model.structures import IGNORE_TOKEN
from tests.unit.tiny_pixellm import SHAPE, TEXTS
from utils.checkpoints.builder import save_model
from utils.cli.commands import parse_train
from utils.data.collate import Batch
from utils.data.mixture import build_mixture
from utils.engine.runtime import Runtime
from utils.engine.setup import StepBatches, seed_everything
from utils.engine.train import build_for_training

IMAGES = 8
# The decoder's last layer norm stands over an eighth of its width. Over two channels it is all but a step function,
# where rounding shows in a gradient's fifth digit; over four it is as smooth as any.
WIDTH = 32


def write_real(folder: Path) -> None:
    """Drawn data and a tiny base with random weights."""
    with contextlib.redirect_stderr(io.StringIO()):
        scenes = SceneDataSettings(train=24, heldout=10, questions=20, scene=SceneSettings(side=48))
        write_scene_data(folder / "data", scenes)
        base = make_tiny(TEXTS, dataclasses.replace(SHAPE, embedding_dim=WIDTH), seed=0)
        save_model(base.model, base.processor, folder / "base")


def real_step(folder: Path, runtime: Runtime, rounds: int) -> tuple[PixelLMForCausalLM, list[Batch]]:
    """The model as training starts with it, and this rank's micro-batches of a step of IMAGES images.

    folder: where `write_real` wrote.
    """
    size = IMAGES // (runtime.world_size * rounds)
    flags = [f"--version={folder / 'base'}", f"--dataset_dir={folder / 'data'}", "--precision=fp32", "--lora_dropout=0"]
    flags += ["--dataset=refer_seg||vqa", "--sample_rates=1,1", "--refer_seg_data=refcoco||grefcoco", "--workers=0"]
    flags += ["--num_classes_per_sample=2", f"--batch_size={size}", f"--grad_accumulation_steps={rounds}"]
    config = parse_train(flags)
    seed_everything(config.engine.seed)  # LoRA starts at random
    with contextlib.redirect_stderr(io.StringIO()):
        built, _ = build_for_training(config)
    mixture = build_mixture(config.data, config.engine.seed)
    batches = StepBatches(config, runtime, mixture, built.processor)
    return built.model.train(), next(batches(0))


def words_and_targets(folder: Path) -> tuple[PixelLMForCausalLM, Batch, Batch]:
    """The same model, a micro-batch of one image with words alone, and one with something to mark."""
    model, batches = real_step(folder, Runtime("plain", 0, 0, 1, torch.device("cpu")), IMAGES)
    marks = [model.count_losses(**batch.as_kwargs())["bce"] > 0 for batch in batches]
    return model, batches[marks.index(False)], batches[marks.index(True)]


def answer_length(model: PixelLMForCausalLM, batch: Batch, tokens: int) -> int:
    """How many tokens an answer to the first question of `batch` has that nothing but `tokens` ends."""
    prompt = batch.input_ids[0][: int((batch.labels[0] != IGNORE_TOKEN).nonzero()[0])]
    kwargs = batch.as_kwargs()
    images = {name: kwargs[name] for name in ("pixel_values", "resized_sizes")}
    (answer,) = model.generate_answers(
        **images, prompts=[prompt], image_index=torch.tensor([0]), end_token_id=-1, max_new_tokens=tokens
    )
    return len(answer.ids)
