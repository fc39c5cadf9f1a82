"""Compile what DeepSpeed compiles when it first starts on a CPU, so that no run waits for it. `make setup` calls this.

python -m utils.engine.prepare
"""

import logging
import subprocess
import sys

from utils.cli.errors import UserError, run_script
from utils.engine.runtime import current_device, deepspeed_problem, remove_stale_locks

logger = logging.getLogger(__name__)


def main(argv: list[str] | None = None) -> None:
    """Start DeepSpeed once, alone; where it cannot run here, say so and leave it at that."""
    device = current_device()
    problem = deepspeed_problem(device)
    if problem is not None:
        logger.warning(f"{problem}: training will be in one process, with the plain engine")
    elif device.type == "cpu":
        remove_stale_locks()
        from utils.engine.deepspeed_engine import init_distributed  # not installed on every laptop

        try:
            init_distributed()
        except (RuntimeError, OSError, subprocess.SubprocessError) as error:
            reason = str(error).strip()
            raise UserError(
                "DeepSpeed could not compile its communication: repair the C++ compiler, or take it off PATH and "
                f"training will be with the plain engine. What went wrong: {reason}"
            ) from None


if __name__ == "__main__":
    sys.exit(run_script(main))
