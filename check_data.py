"""Look at the data before training does: what is there, missing, broken, or shown by training and evaluation alike.

python check_data.py --dataset_dir ./dataset
python check_data.py --dataset custom --custom_data mine --val_dataset "custom|mine|val" --full --show 8
"""

import sys

from utils.cli.commands import parse_check
from utils.cli.errors import run_script
from utils.data.check.run import check_data


def main(argv: list[str] | None = None) -> int:
    """Check as the command line says; 0 when all that was asked for is usable, 1 when not."""
    usable, told = check_data(parse_check(argv))
    print(told)
    return 0 if usable else 1


if __name__ == "__main__":
    sys.exit(run_script(main))
