"""Which process this is, on which device, and which engine runs here."""

import contextlib
import importlib.util
import logging
import os
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils.cpp_extension import get_default_build_root

from utils.cli.errors import UserError

logger = logging.getLogger(__name__)

STALE_AFTER = 600.0  # seconds; a build takes two minutes at most


@dataclass(frozen=True)
class Runtime:
    """One process of a run. engine: "deepspeed" or "plain"."""

    engine: str
    rank: int
    local_rank: int
    world_size: int
    device: torch.device


def open_runtime(engine: str, local_rank: int, precision: str, deterministic: bool = False) -> Runtime:
    """Find out where this process stands, choose the engine and the device, and look after threads.

    Args:
        engine: "auto" (DeepSpeed under a launcher, else plain), "deepspeed" or "plain".
        local_rank: what --local_rank said; the launcher's LOCAL_RANK wins.
        deterministic: whether equal calls shall give equal bits on a GPU too.
    """
    if deterministic:
        _only_deterministic()
    launched = "WORLD_SIZE" in os.environ
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", str(max(local_rank, 0))))
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"this is local rank {local_rank}, but there are only {torch.cuda.device_count()} GPUs here"
            )
        torch.cuda.set_device(device)
    if precision == "fp16" and device.type == "cpu":
        raise UserError("--precision fp16 needs a GPU: use bf16 or fp32 on a CPU")
    _share_cores(int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1"))))
    chosen = _choose(engine, launched, world_size, device)
    if chosen == "deepspeed" and local_rank == 0:
        remove_stale_locks()
    if world_size > 1:
        _join_others(chosen, device)
    return Runtime(chosen, int(os.environ.get("RANK", "0")), local_rank, world_size, device)


def _join_others(engine: str, device: torch.device) -> None:
    """Meet the other ranks before anything that may fail on one of them: who waits for a connection waits up to half an
    hour, who has one sees it break."""
    if engine == "deepspeed":
        from utils.engine.deepspeed_engine import init_distributed  # not installed on every laptop

        init_distributed()
    elif not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")


def current_device() -> torch.device:
    """The device that `open_runtime` chose for this process."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def _only_deterministic() -> None:
    """From here on equal calls give equal bits on a GPU too; to be called before anything runs there.

    An operation that has no such way raises torch's own error, which names it.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    torch.backends.cuda.enable_mem_efficient_sdp(False)  # its backward pass adds up in any order


def _share_cores(processes: int) -> None:
    """Threads for this process, unless OMP_NUM_THREADS already says how many."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // processes))


def _choose(engine: str, launched: bool, world_size: int, device: torch.device) -> str:
    if engine == "plain":
        return engine
    if engine == "auto" and not launched:
        return "plain"
    problem = deepspeed_problem(device)
    if problem is None:
        return "deepspeed"
    if engine == "deepspeed" or world_size > 1:
        raise UserError(f"{problem}; without it, add --engine plain")
    logger.warning(f"{problem}: using the plain engine")
    return "plain"


def deepspeed_problem(device: torch.device) -> str | None:
    """Why DeepSpeed cannot run here, or None. On a CPU it compiles its shared-memory communication when it starts."""
    if importlib.util.find_spec("deepspeed") is None:
        return "DeepSpeed is not installed (pip install deepspeed)"
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else it warns that it found nothing better
        add_programs_to_path()
        lacking = [name for name in ("g++", "ninja") if shutil.which(name) is None]
        if lacking:
            return f"DeepSpeed on a CPU needs {' and '.join(lacking)}, not found on PATH"
    return None


def add_programs_to_path() -> None:
    """Let the programs of this Python's environment (ninja) be found even where it was not activated."""
    programs = str(Path(sys.executable).parent)
    if programs not in os.environ.get("PATH", "").split(os.pathsep):
        os.environ["PATH"] = os.pathsep.join([programs, os.environ.get("PATH", "")])


def remove_stale_locks() -> None:
    """Remove the locks of builds that were killed: the next build would wait for them for ever."""
    folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    for lock in folder.glob("**/deepspeed_*/lock"):
        with contextlib.suppress(FileNotFoundError):  # a build that ends removes its own
            if time.time() - lock.stat().st_mtime > STALE_AFTER:
                lock.unlink()
                logger.warning(f"removed {lock}, which a build that was killed had left")
