"""Look at the data before training does: what is there, missing, broken, or shown by training and evaluation alike.

python check_data.py --dataset_dir ./dataset
python check_data.py --dataset custom --custom_data mine --val_dataset "custom|mine|val" --full --show 8
"""

import json
import os
import re
import sys
from pathlib import Path

from model.image_processing_pixellm import open_image
from model.processing_pixellm import PixelLMProcessor
from utils.cli.atomic_files import write_text
from utils.cli.commands import parse_check
from utils.cli.config import CheckConfig
from utils.cli.errors import run_script
from utils.data.check.leaks import find_leaks
from utils.data.check.pages import sample_page
from utils.data.check.report import SetReport, table
from utils.data.check.survey import survey
from utils.data.readers.base import Reader, ReaderOptions
from utils.data.requested_sets import asked_for_evaluation, asked_for_training


def main(argv: list[str] | None = None) -> int:
    """Check as the command line says; 0 when all that was asked for is usable, 1 when not."""
    config = parse_check(argv)
    processor = PixelLMProcessor.from_pretrained(config.version) if config.version else None
    options = ReaderOptions(
        num_classes_per_sample=config.data.num_classes_per_sample,
        num_classes_per_question=config.data.num_classes_per_question,
        use_expand_question_list=config.data.use_expand_question_list,
        explanatory=config.data.explanatory,
        exclude_val=config.data.exclude_val,
        index_dir=config.data.index_dir,
        check_index=config.full,
    )
    reports: list[SetReport] = []
    root, workers = config.data.dataset_dir, config.data.workers
    for asked in [*asked_for_training(config.data), *asked_for_evaluation(config.val_dataset)]:
        report, reader = survey(asked, root, options, open_image, full=config.full, workers=workers)
        reports.append(report)
        if config.show and reader is not None:
            write_page(config, report, reader, processor)
    leaks = find_leaks(reports, config.data.dataset_dir, config.data.index_dir)
    print(table(reports, leaks, colour=sys.stdout.isatty() and not os.environ.get("NO_COLOR")))
    if config.json:
        content = {
            "dataset_dir": config.data.dataset_dir,
            "full": config.full,
            "sets": [report.as_dict() for report in reports],
            "leaks": [
                {"training": leak.training, "evaluation": leak.evaluation, "by": leak.by, "count": leak.count}
                | {"first": leak.first}
                for leak in leaks
            ],
        }
        write_text(Path(config.json), json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    return int(any(report.state != "usable" for report in reports))


def write_page(config: CheckConfig, report: SetReport, reader: Reader, processor: PixelLMProcessor | None) -> None:
    """Leave the page of a data set in --show_dir."""
    target = Path(config.show_dir) / (re.sub(r"[^\w+.-]+", "_", str(report)).strip("_") + ".html")
    write_text(target, sample_page(str(report), reader, config.show, processor))
    print(f"written: {target}")


if __name__ == "__main__":
    sys.exit(run_script(main))
