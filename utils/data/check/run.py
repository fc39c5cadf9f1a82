"""One check of the data: a report per data set, the leaks between them, and pages to look at."""

import dataclasses
import json
import os
import re
import sys
from pathlib import Path

from model.processing_pixellm import PixelLMProcessor
from utils.cli.atomic_files import write_text
from utils.cli.config import CheckConfig
from utils.data.check.leaks import find_leaks
from utils.data.check.pages import sample_page
from utils.data.check.report import SetReport, format_table
from utils.data.check.survey import survey
from utils.data.requested_sets import reader_options, requested_for_evaluation, requested_for_training


def check_data(config: CheckConfig) -> tuple[bool, str]:
    """Whether all data sets are usable, and what to tell of them; writes the files that were asked for."""
    data, reports, told = config.data, list[SetReport](), list[str]()
    options = reader_options(data, check_index=config.full)
    processor = PixelLMProcessor.from_pretrained(config.version) if config.version else None
    for asked in [*requested_for_training(data), *requested_for_evaluation(config.val_dataset)]:
        report, reader = survey(asked, data.dataset_dir, options, full=config.full, workers=data.workers)
        reports.append(report)
        if config.show and reader is not None:
            target = Path(config.show_dir) / (re.sub(r"[^\w+.-]+", "_", str(report)).strip("_") + ".html")
            write_text(target, sample_page(str(report), reader, config.show, processor))
            told.append(f"written: {target}")
    leaks = find_leaks(reports, data.dataset_dir, data.index_dir)
    told.append(format_table(reports, leaks, colour=sys.stdout.isatty() and not os.environ.get("NO_COLOR")))
    if config.json:
        content = {
            "dataset_dir": data.dataset_dir,
            "full": config.full,
            "sets": [report.as_dict() for report in reports],
            "leaks": [dataclasses.asdict(leak) for leak in leaks],
        }
        write_text(Path(config.json), json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    return all(report.state == "usable" for report in reports), "\n".join(told)
