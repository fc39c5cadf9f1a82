"""Turn what training left into one Hugging Face folder, LoRA merged, vision tower and processor included.

python merge_lora_weights_and_save_hf_model.py --weight=RUN/pytorch_model.bin --save_path=RUN/hf_model
"""

import sys
from pathlib import Path

from utils.checkpoints.merge import merge_run, merge_without_record
from utils.checkpoints.run_model import RunModel
from utils.cli.commands import MERGE, parse_merge
from utils.cli.errors import run_script
from utils.cli.parser import parse


def main(argv: list[str] | None = None) -> int:
    """Merge as the command line and the run's own records say; returns the exit status."""
    config = parse_merge(argv)
    run = RunModel.find(Path(config.weight))
    print(merge_without_record(config) if run is None else merge_run(run, config, parse(MERGE, argv)))
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
