"""From a run's config to its engine, its schedule and the steps' batches."""

import logging
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from utils.cli.config import DataConfig, EngineConfig, OptimizerConfig, RunConfig, TrainConfig, ValidationConfig
from utils.cli.errors import UserError
from utils.data.bad_samples import BadSamples
from utils.data.collate import Batch
from utils.data.dataset import TrainingDataset, build_loader
from utils.data.errors import DataError, without_traceback
from utils.data.mixture import Mixture
from utils.data.requested_sets import requested_for_evaluation, requested_for_training, require_files
from utils.engine.base import Engine
from utils.engine.checkpoints import tags
from utils.engine.fit import CHECKPOINT, Plan
from utils.engine.plain_engine import PlainEngine
from utils.engine.runtime import Runtime
from utils.engine.stepping import OptimizerSettings, Schedule

logger = logging.getLogger(__name__)

# Steps that float16 may overflow in a row until its loss scale has come down far enough; that is as it should be.
FP16_SEARCH = 40
DEFAULT_ZERO_STAGE = 2


def make_plan(config: TrainConfig, world_size: int) -> Plan:
    """When a run of `world_size` processes steps, saves and validates."""
    optimizer, run, total = config.optimizer, config.run, config.optimizer.total_steps()
    if optimizer.warmup_steps >= total:
        logger.warning(
            f"--warmup_steps {optimizer.warmup_steps} outlasts the run of {total} steps: the full --lr is never reached"
        )
    return Plan(
        Schedule(optimizer.lr, total, optimizer.warmup_steps, optimizer.lr_schedule),
        total_steps=total,
        save_every=run.save_every or optimizer.steps_per_epoch,
        validate_every=config.validation.validate_every or optimizer.steps_per_epoch,
        print_every=run.print_freq,
        save_minutes=run.save_minutes,
        keep_last=run.keep_last,
        max_bad_steps=max(run.max_bad_steps, FP16_SEARCH) if config.engine.precision == "fp16" else run.max_bad_steps,
        profile=run.profile,
        samples_per_step=0 if config.validation.eval_only else optimizer.samples_per_step(world_size),
    )


def make_on_parameter_loaded(config: TrainConfig, runtime: Runtime) -> Callable[[nn.Parameter], None] | None:
    """What a parameter goes through as soon as it is read, so that under ZeRO-3 no rank ever holds the whole model;
    None where every rank holds it anyway, or where what follows needs it whole, which is said."""
    if runtime.engine != "deepspeed":
        return None
    from utils.engine.deepspeed_engine import zero3_partitioner  # not installed on every laptop

    user_config, stage = deepspeed_settings(config.engine)
    if stage != 3:
        return None
    if (bits := config.adapter.bits) is not None:
        raise UserError(f"--load_in_{bits}bit and ZeRO-3 do not go together: take stage 2 in --deepspeed_config")
    needs_whole = {"weight": config.run.weight, "train_new_tokens_only": config.adapter.train_new_tokens_only}
    whole = [name for name, value in needs_whole.items() if value]
    if whole or runtime.world_size == 1:
        if whole:
            logger.warning(f"--{whole[0]}: every rank builds the whole model before ZeRO-3 shares it out")
        return None
    return zero3_partitioner(user_config)


def deepspeed_settings(engine: EngineConfig) -> tuple[dict[str, Any], int]:
    """What --deepspeed_config says, and the ZeRO stage. UserError where flags say otherwise."""
    from utils.engine.deepspeed_engine import read_user_config  # not installed on every laptop

    user_config = read_user_config(engine.deepspeed_config, engine.zero_stage)
    chosen = DEFAULT_ZERO_STAGE if engine.zero_stage is None else engine.zero_stage
    return user_config, user_config.get("zero_optimization", {}).get("stage", chosen)


def zero_stage(engine: EngineConfig, runtime: Runtime) -> int:
    """The ZeRO stage of a run; 0 with the plain engine."""
    return deepspeed_settings(engine)[1] if runtime.engine == "deepspeed" else 0


def optimizer_settings(config: OptimizerConfig, mask_parts: tuple[str, ...] = ()) -> OptimizerSettings:
    """What the optimizer is given. mask_parts: prefixes of the parameter names that --mask_lr_multiplier is for."""
    return OptimizerSettings(
        betas=(config.beta1, config.beta2),
        weight_decay=config.weight_decay,
        gradient_clip=config.grad_clip,
        multipliers=dict.fromkeys(mask_parts, config.mask_lr_multiplier),
        loss_normalisation=config.loss_normalisation,
        name=config.optimizer,
    )


def make_engine(config: TrainConfig, runtime: Runtime, model: Any, mask_parts: tuple[str, ...] = ()) -> Engine:
    """The engine that `runtime` chose, with the model in it. mask_parts: see `optimizer_settings`."""
    settings = optimizer_settings(config.optimizer, mask_parts)
    if runtime.engine == "plain":
        if config.engine.compile:
            model.compile_layers()
        return PlainEngine(model, settings, config.engine.precision, runtime.device)
    from utils.engine.deepspeed_engine import DeepSpeedEngine  # not installed on every laptop

    user_config, stage = deepspeed_settings(config.engine)
    if config.engine.compile and stage == 3:
        raise UserError("--compile and ZeRO-3 do not go together: what fetches weights layer by layer is not compiled")
    if config.engine.compile:
        model.compile_layers()
    return DeepSpeedEngine(
        model,
        settings,
        config.engine.precision,
        runtime.device,
        micro_batch=config.optimizer.batch_size,
        gradient_accumulation_steps=config.optimizer.grad_accumulation_steps,
        zero_stage=stage,
        user_config=user_config,
    )


def checkpoint_to_resume(run: RunConfig) -> Path | None:
    """The folder to go on from: --resume, or the run's own with --auto_resume; None to start afresh."""
    if run.resume:
        return Path(run.resume)
    own = run.folder / CHECKPOINT
    if run.auto_resume and tags(own):
        return own
    return None


def refuse_missing_data(data: DataConfig, validation: ValidationConfig) -> None:
    """DataError before anything is loaded when files the run needs are not there; a table names all of them."""
    asked = [] if validation.eval_only else requested_for_training(data)
    asked += [] if validation.no_eval else requested_for_evaluation(validation.val_dataset)
    require_files(asked, data.dataset_dir)


class StepBatches:
    """The micro-batches of each optimizer step of one rank, from any step on. Step and rank alone say which samples.

    lost: what did not fit into the model's text length so far, counted by what it was. bad: what could not be read.
    """

    def __init__(
        self,
        config: TrainConfig,
        runtime: Runtime,
        mixture: Mixture,
        processor: Any,
    ) -> None:
        self.config, self.runtime = config, runtime
        self.samples_per_step = config.optimizer.samples_per_step(runtime.world_size)
        pad = processor.tokenizer.pad_token_id
        self.pad_token_id = 0 if pad is None else pad
        length = config.optimizer.total_steps() * self.samples_per_step
        self.dataset = TrainingDataset(
            mixture,
            processor,
            length,
            strict=config.data.strict_data,
            fast_resize=config.data.fast_resize,
        )
        self.lost: Counter[str] = Counter()
        self.bad = BadSamples(config.data.max_bad_samples)

    def __call__(self, step: int) -> Iterator[list[Batch]]:
        """A list of micro-batches per step, from optimizer step `step` to the end of the run.

        DataError when a sample cannot be read under --strict_data, or more cannot than --max_bad_samples allows.
        """
        loader = build_loader(
            self.dataset,
            rank=self.runtime.rank,
            world_size=self.runtime.world_size,
            batch_size=self.config.optimizer.batch_size,
            pad_token_id=self.pad_token_id,
            workers=self.config.data.workers,
            first=step * self.samples_per_step,
            pin_memory=self.runtime.device.type == "cuda",
        )
        gathered: list[Batch] = []
        for batch in _sentences_only(loader):
            gathered.append(batch)
            self.bad.add(batch.info)
            for info in batch.info:
                self.lost.update({name: count for name, count in info.items() if name.startswith("dropped_")})
            if len(gathered) == self.config.optimizer.grad_accumulation_steps:
                yield gathered
                gathered = []

    def probes(self) -> Iterator[Batch]:
        """The first batches of the run, the same on every rank, loaded in this process."""
        batch, pad = self.config.optimizer.batch_size, self.pad_token_id
        yield from build_loader(self.dataset, rank=0, world_size=1, batch_size=batch, pad_token_id=pad, workers=0)

    def report_losses(self) -> None:
        """Say what was too long and what could not be read, if anything was."""
        found = {name.removeprefix("dropped_"): count for name, count in self.lost.items() if count}
        if found:
            what = ", ".join(f"{count} {name}" for name, count in found.items())
            logger.warning(f"left out on this rank because they do not fit into --model_max_length: {what}")
        if self.bad.counts:
            logger.info(f"on this rank {self.bad.table()}")


def run_facts(runtime: Runtime, batches: StepBatches, first_step: int) -> dict[str, Any]:
    """What a run card keeps about the processes and the data."""
    return {
        "engine": runtime.engine,
        "world_size": runtime.world_size,
        "device": str(runtime.device),
        "first_step": first_step,
        "samples_per_step": batches.samples_per_step,
        "data": batches.dataset.mixture.fingerprint,
        "threads": torch.get_num_threads(),
    }


def _sentences_only(loader: Iterable[Batch]) -> Iterator[Batch]:
    """The batches of `loader`; what is wrong with the data is told without a worker's traceback."""
    try:
        yield from loader
    except DataError as error:
        raise without_traceback(error) from None


def seed_everything(seed: int) -> None:
    """The random state of weights to come, dropout included, and of libraries that draw in ways of their own."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
