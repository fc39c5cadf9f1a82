"""The DeepSpeed engine: ZeRO 0 to 3, one process or many. Beside resharding.py the only file that imports
deepspeed.
"""

import json
import logging
import math
import os
import socket
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.checkpoint.constants import FROZEN_PARAM_FRAGMENTS, FROZEN_PARAM_SHAPES
from deepspeed.runtime.zero.utils import ZeRORuntimeException
from deepspeed.utils import logger as deepspeed_logger
from torch import nn

from model.losses import LossTerm
from model.structures import DTYPES
from utils.cli.errors import UserError
from utils.data.collate import Batch
from utils.engine.base import Engine
from utils.engine.plain_engine import WEIGHTS
from utils.engine.process_group import ProcessGroup, explain_lost_peer
from utils.engine.resharding import load_full_state, read_full_state, read_layout
from utils.engine.stepping import (
    OptimizerSettings,
    evaluation_mode,
    full_numel,
    make_optimizer,
    set_learning_rate,
    to_precision,
    trainable_parameters,
)

logger = logging.getLogger(__name__)

# What the loop decides; a --deepspeed_config may not say otherwise.
RESERVED_KEYS = {
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "optimizer",
    "scheduler",
    "bf16",
    "fp16",
    "torch_autocast",
    "steps_per_print",
}
GROUP_NAMES = "parameters_by_optimizer_group"
LARGEST_BUCKET = 500_000_000  # elements; DeepSpeed's own default


def init_distributed() -> None:
    """Join the other processes; alone, become a world of one. Safe to call twice."""
    if dist.is_initialized():
        return
    deepspeed_logger.setLevel(logging.WARNING)
    if "RANK" not in os.environ:
        os.environ.update(
            RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(_free_port())
        )
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    deepspeed.init_distributed(verbose=False)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def read_user_config(path: str, zero_stage: int | None) -> dict[str, Any]:
    """The JSON of --deepspeed_config, {} without one.

    zero_stage: what --zero_stage said, None when it was not given. UserError where the file says what flags decide.
    """
    if not path:
        return {}
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read --deepspeed_config {path}: {error.strerror}") from None
    except ValueError:
        raise UserError(f"--deepspeed_config {path} is not valid JSON") from None
    if not isinstance(config, dict):
        raise UserError(f"--deepspeed_config {path} must hold a JSON object")
    taken = [key for key in config if key in RESERVED_KEYS and config[key] != "auto"]
    if taken:
        raise UserError(
            f"--deepspeed_config {path} sets {', '.join(taken)}, which flags decide: take it out of the file"
        )
    stage = config.get("zero_optimization", {}).get("stage")
    if zero_stage is not None and stage is not None and stage != zero_stage:
        raise UserError(f"--zero_stage is {zero_stage}, but {path} says {stage}: give one of them")
    return {key: value for key, value in config.items() if key not in RESERVED_KEYS}


def deepspeed_config(
    user: dict[str, Any],
    *,
    zero_stage: int,
    precision: str,
    micro_batch: int,
    gradient_accumulation_steps: int,
    world_size: int,
    clip: float,
    numel: int,
) -> dict[str, Any]:
    """The configuration DeepSpeed gets: what the loop decides on top of `user`.

    bf16 is autocast over float32 weights that train and bfloat16 ones that do not, with gradients summed in float32,
    exactly as in the plain engine. Buckets are no larger than the `numel` elements that train: DeepSpeed allocates
    them whole.
    """
    bucket = max(1, min(LARGEST_BUCKET, numel))
    zero = {"stage": zero_stage, "reduce_bucket_size": bucket, "allgather_bucket_size": bucket}
    config = user | {"zero_optimization": user.get("zero_optimization", zero) | {"stage": zero_stage}}
    config |= {
        "train_batch_size": micro_batch * gradient_accumulation_steps * world_size,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": gradient_accumulation_steps,
        "gradient_clipping": clip,
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,  # SGD, whose state is kept and cut up as AdamW's is
    }
    if precision == "bf16":
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    if precision == "fp16":
        config["fp16"] = {"enabled": True}
    return config


def zero3_partitioner(user_config: dict[str, Any]) -> Callable[[nn.Parameter], None]:
    """What ZeRO-3 does with a finished parameter: every rank keeps its part, the first rank's numbers count.

    A model whose parameters go through it one by one is never whole in any process.
    """
    init_distributed()
    ProcessGroup(torch.device("cpu")).barrier()  # see DeepSpeedEngine: what follows makes groups
    config = user_config | {"zero_optimization": user_config.get("zero_optimization", {}) | {"stage": 3}}
    init = deepspeed.zero.Init(config_dict_or_path=config | {"train_micro_batch_size_per_gpu": 1})

    def keep_part(parameter: nn.Parameter) -> None:
        parameter.data = parameter.data.to(init.local_device)
        init._zero_init_param(parameter)

    return keep_part


class DeepSpeedEngine(Engine):
    """A model under ZeRO. See `Engine`."""

    name = "deepspeed"

    def __init__(
        self,
        model: nn.Module,
        settings: OptimizerSettings,
        precision: str,
        device: torch.device,
        *,
        micro_batch: int,
        gradient_accumulation_steps: int,
        zero_stage: int = 2,
        user_config: dict[str, Any] | None = None,
    ) -> None:
        init_distributed()
        super().__init__(settings, precision, device)
        self.gradient_accumulation_steps = gradient_accumulation_steps
        if precision != "fp16":  # DeepSpeed itself halves everything then
            to_precision(model, precision)
        config = deepspeed_config(
            user_config or {},
            zero_stage=zero_stage,
            precision=precision,
            micro_batch=micro_batch,
            gradient_accumulation_steps=gradient_accumulation_steps,
            world_size=self.world_size,
            clip=0.0 if zero_stage == 0 and precision != "fp16" else settings.gradient_clip,
            numel=sum(full_numel(parameter) for parameter in trainable_parameters(model).values()),
        )
        optimizer = make_optimizer(model, settings)
        names = {parameter: name for name, parameter in model.named_parameters()}
        self.group_names = [[names[parameter] for parameter in group["params"]] for group in optimizer.param_groups]
        # DeepSpeed makes groups, for which ranks wait up to half an hour; a barrier notices that one is gone.
        self.barrier()
        self.deepspeed, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        self.model: Any = self.deepspeed.module

    @property
    def zero_stage(self) -> int:
        return self.deepspeed.zero_optimization_stage()

    def accumulate(self, micro_batches: list[Batch]) -> tuple[dict[str, float], dict[str, float]]:
        """See `Engine.accumulate`."""
        if len(micro_batches) != self.gradient_accumulation_steps:
            expected = self.gradient_accumulation_steps
            raise ValueError(f"a step has {expected} micro-batches, found {len(micro_batches)}")
        return super().accumulate(micro_batches)

    def forward(self, batch: Batch) -> Mapping[str, LossTerm]:
        """See `Engine.forward`."""
        dtype = DTYPES["fp16"] if self.precision == "fp16" else None
        return self.deepspeed(**batch.to(self.device, dtype).as_kwargs()).losses

    def backward(self, loss: torch.Tensor, *, is_last: bool) -> None:
        """See `Engine.backward`. DeepSpeed sends gradients while it makes them."""
        # DeepSpeed divides by the number of micro-batches and of ranks; the counts have already done both.
        self.deepspeed.backward(loss * self.world_size * self.gradient_accumulation_steps)
        if not is_last:
            self.deepspeed.step()  # only counts

    def update(self, learning_rate: float) -> tuple[float, bool]:
        """See `Engine.update`."""
        set_learning_rate(self.deepspeed.optimizer, learning_rate)
        norm = self._clip_or_skip() if self.zero_stage == 0 and self.precision != "fp16" else None
        self.deepspeed.step()
        if norm is None:
            norm = float(self.deepspeed.get_global_grad_norm() or 0.0)
        return norm, self.deepspeed.was_step_applied() and math.isfinite(norm)

    def _clip_or_skip(self) -> float:
        """Under stage 0, whose steps are not left out by DeepSpeed: drop a gradient that is not finite, else clip it.

        DeepSpeed's own clipping fails where there is none left. Returns the norm before.
        """
        trained = list(trainable_parameters(self.model).values())
        norm = float(nn.utils.clip_grad_norm_(trained, self.settings.gradient_clip or math.inf))
        if not math.isfinite(norm):
            self.model.zero_grad(set_to_none=True)
        return norm

    @contextmanager
    def inference(self) -> Iterator[None]:
        """See `Engine.inference`. Under stage 3 every rank has the whole weights inside."""
        with self._whole_weights(), evaluation_mode(self.model, self.device, self.precision):
            yield

    @contextmanager
    def _whole_weights(self) -> Iterator[None]:
        """Gather what stage 3 spreads out, and keep DeepSpeed from taking it away again after every layer: ranks whose
        answers differ in length would wait for each other's layers for ever."""
        if self.zero_stage < 3:
            yield
            return
        hooks = self.deepspeed.optimizer.parameter_offload
        with explain_lost_peer(), deepspeed.zero.GatheredParameters(list(self.model.parameters())):
            hooks._remove_module_hooks()
            hooks.forward_hooks, hooks.backward_hooks = [], []
            try:
                yield
            finally:
                hooks.setup_zero_stage3_hooks()

    def save(self, place: Path, client_state: dict[str, Any]) -> None:
        """See `Engine.save`. DeepSpeed's own layout, with zero_to_fp32.py beside the folder."""
        state = {"client": client_state, GROUP_NAMES: self.group_names, **self._frozen_weights()}
        with explain_lost_peer():
            # DeepSpeed would point to the tag before it has its manifest.
            self.deepspeed.save_checkpoint(str(place.parent), tag=place.name, client_state=state, save_latest=False)
        if self.zero_stage == 0 and self.rank == 0:
            # zero_to_fp32.py has nothing to put together then; merging reads this file as it is.
            torch.save(self.model.state_dict(), place / WEIGHTS)

    def _frozen_weights(self) -> dict[str, Any]:
        """Weights that do not train: under stage 1 alone DeepSpeed leaves out what zero_to_fp32.py reads of them."""
        if self.zero_stage != 1:
            return {}
        frozen = {name: p.detach().cpu() for name, p in self.model.named_parameters() if not p.requires_grad}
        return {FROZEN_PARAM_SHAPES: {name: p.shape for name, p in frozen.items()}, FROZEN_PARAM_FRAGMENTS: frozen}

    def load(self, place: Path) -> dict[str, Any]:
        """See `Engine.load`. Another stage or number of ranks takes its parts of the whole."""
        if not list(place.glob("*model_states.pt")):
            raise UserError(f"{place} was not written by DeepSpeed: go on with --engine plain, or leave --resume out")
        written = read_layout(place)
        try:
            if written == ((self.zero_stage, self.world_size) if self.zero_stage else (0, 0)):
                _, state = self.deepspeed.load_checkpoint(str(place.parent), tag=place.name)
            else:
                state = self._load_reshaped(place, written)
        except (ZeRORuntimeException, RuntimeError, KeyError, ValueError) as error:
            if isinstance(error, UserError):
                raise
            first = " ".join(" ".join(str(error).splitlines()[:2]).split())
            raise UserError(
                f"the checkpoint {place} does not fit this model ({first}): use the flags it was trained with, or "
                "another --exp_name"
            ) from error
        return state["client"]

    def _load_reshaped(self, place: Path, written: tuple[int, int]) -> dict[str, Any]:
        stage, ranks = written
        logger.info(
            f"{place} was written under ZeRO stage {stage}{f' by {ranks} processes' if ranks else ''}, this run has "
            f"stage {self.zero_stage} and {self.world_size}: each process takes its part of the whole"
        )
        first = next(iter(sorted(place.glob("*model_states.pt"))))
        state = torch.load(first, map_location="cpu", weights_only=False)
        whole = read_full_state(place, state[GROUP_NAMES])
        with explain_lost_peer():
            load_full_state(self.deepspeed, whole, self.rank)
        return state
