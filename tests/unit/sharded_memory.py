"""Run under a launcher: build a model as train_ds.py does, and tell the most anonymous memory that took on this rank.

sharded_memory.py OUT FLAGS...
"""

import sys
from pathlib import Path

from tests.unit.loading_memory import most_above_before
from utils.cli.commands import parse_train
from utils.engine.runtime import open_runtime
from utils.engine.setup import make_on_parameter_loaded
from utils.engine.stepping import full_numel
from utils.engine.train import build_for_training


def main() -> None:
    out, *flags = sys.argv[1:]
    config = parse_train(flags)
    runtime = open_runtime(config.engine.engine, config.engine.local_rank, config.engine.precision)
    settle = make_on_parameter_loaded(config, runtime)
    (built, _), most = most_above_before(lambda: build_for_training(config, settle))
    numbers = sum(full_numel(parameter) for parameter in built.model.parameters())
    Path(f"{out}.rank{runtime.rank}").write_text(f"{most} {numbers}")


if __name__ == "__main__":
    main()
