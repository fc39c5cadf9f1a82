"""One evaluation from its first question to the files it leaves; and judging the answers it left."""

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from model.structures import DTYPES
from utils.cli.atomic_files import write_json
from utils.cli.config import EvaluateConfig
from utils.cli.parser import flatten
from utils.cli.run_card import versions
from utils.data.readers.registry import MUSE
from utils.data.requested_sets import requested_for_evaluation, require_files
from utils.evaluation import fingerprints
from utils.evaluation import html_report as pages
from utils.evaluation.ask import Progress, ask, ask_text, summary
from utils.evaluation.compare import compare_folders
from utils.evaluation.judge import scoring
from utils.evaluation.judge.choice import choose_judge, refuse_judge
from utils.evaluation.judge.prompts import PROMPT_FILE, read_prompt
from utils.evaluation.protocols import FREE, RELEASE
from utils.evaluation.questions import Plan, make_plan
from utils.evaluation.ranks import Ranks, device_of_rank, open_ranks
from utils.evaluation.records import SAMPLES, RecordWriter, read_lines
from utils.evaluation.results import RESULTS, add_intervals, merge_results, protocol_facts, read_results
from utils.evaluation.resume import question_key, scores_of_entry
from utils.evaluation.scored_predictor import LogitPredictor, ScoredPredictor
from utils.evaluation.sets import ScoredSets
from utils.evaluation.tables import quotable, score_table

logger = logging.getLogger(__name__)

GALLERY = "gallery.png"
SETTINGS = ("batch_size", "limit", "max_new_tokens", "shuffled", "precision", "attn_implementation", "device")

Line = Mapping[str, Any]


def evaluate(config: EvaluateConfig, words: Sequence[str]) -> str:
    """Compare, quote, judge or score, and what to tell of it; nothing on ranks but the first.

    words: the command line, for the record.
    """
    if config.compare:
        return compare_folders(*config.compared(), Path(config.out) if config.out else None)
    if config.table:
        return "\n\n".join(quotable(read_results(Path(config.table))))
    if config.judge:
        judge_folder(Path(config.judge), config)
        return "\n\n".join(quotable(read_results(Path(config.judge))))
    ranks = open_ranks()
    evaluation, model = Evaluation(config, words, ranks), config.model
    dtype = DTYPES[model.precision] if model.precision else None
    kind = LogitPredictor if evaluation.needs_logits else ScoredPredictor
    predictor = kind.from_pretrained(model.version, device_of_rank(model.device), dtype, model.attn_implementation)
    told = evaluation.score(predictor)
    ranks.close()
    return told


class Evaluation:
    """What a config asks to score, known before a model is loaded.

    DataError where data are not there, UserError where there is no question to score or the judge cannot be had.
    """

    def __init__(self, config: EvaluateConfig, words: Sequence[str], ranks: Ranks) -> None:
        require_files(requested_for_evaluation(config.val_dataset), config.dataset_dir)
        self.config, self.ranks, self.words = config, ranks, words
        self.sets = ScoredSets(config.val_dataset, config.dataset_dir)
        pair = FREE in config.protocols() and any(reader.name == MUSE for reader in self.sets.readers)
        self._judges = pair and bool(config.judging.judge_model)
        if self._judges:
            refuse_judge(config.judging)
            read_prompt(config.judging.judge_prompt or PROMPT_FILE)
        elif config.judging.judge_model:
            logger.warning(
                f"evaluate.py: --judge_model: no effect, only free-running answers to {MUSE}|SPLIT are judged, and "
                f"{','.join(config.protocols())} on {config.val_dataset} gives none"
            )
        self.plan: Plan = make_plan(
            self.sets,
            batch_size=config.batch_size,
            limit=config.limit,
            protocols=config.protocols(),
            shuffled=config.shuffled,
            max_new_tokens=config.max_new_tokens,
            text=True,
            pair=pair,
        )

    @property
    def needs_logits(self) -> bool:
        """Whether answers have to keep the logits of their masks."""
        return RELEASE in self.plan.protocols or self.plan.pair

    def score(self, predictor: ScoredPredictor) -> str:
        """Ask every question and write what came of it into --out. What a person is told; nothing on ranks but the
        first."""
        out = self.config.folder
        out.mkdir(parents=True, exist_ok=True)
        start = time.perf_counter()
        run = self._circumstances()
        with RecordWriter(out, {name: value for name, value in run.items() if name != "command"}, self.ranks) as lines:
            if lines.earlier:
                logger.info(
                    f"evaluate.py: {len(lines.earlier)} questions were scored before an earlier run ended: going on"
                )
            self._ask(predictor, lines)
            records = lines.finish(self.plan.questions)
        if self.ranks.rank != 0:
            return ""
        seconds = time.perf_counter() - start
        run |= {"data": fingerprints.of_data(self.sets.readers), "ranks": self.ranks.world_size, "seconds": seconds}
        run |= {"resumed_after": len(lines.earlier), "seconds_per_sample": seconds / len(records)}
        figures = [scores_of_entry(record) for record in records]
        shown = [record["line"] for record in records]
        result = add_intervals(summary(self.plan, figures), figures) | run
        write_json(out / RESULTS, with_muse(result, shown))
        written = [RESULTS, SAMPLES, *self._draw(shown)]
        (out / scoring.VERDICTS).unlink(missing_ok=True)  # those of an earlier run
        if self._judges and scoring.muse_lines(shown):
            judge_folder(out, self.config)
            written.append(scoring.VERDICTS)
        return f"{score_table(read_results(out))}\nwritten to {out}: {', '.join(written)}"

    def _ask(self, predictor: Any, lines: RecordWriter) -> None:
        """This rank's share: every batch whole, as one process would ask it, so that the numbers are the same."""
        plan, ranks = self.plan, self.ranks
        mine = plan.batches[ranks.rank :: ranks.world_size]
        last = len(plan.batches)
        in_words = [b for n, b in enumerate(plan.text_batches, last) if n % ranks.world_size == ranks.rank]
        open_batches, open_in_words = (
            [batch for batch in batches if not all(question_key(one) in lines.earlier for one in batch)]
            for batches in (mine, in_words)
        )
        total = sum(len(batch) for batch in (*open_batches, *open_in_words))
        with Progress(total, shown=ranks.rank == 0) as bar:
            for scored in ask(predictor, plan, open_batches):
                lines.add(scored)
                bar.add(scored.shown.iou)
            for spoken in ask_text(predictor, plan, open_in_words):
                lines.add(spoken)
                bar.add(None)

    def _draw(self, lines: list[Line]) -> list[str]:
        """The names of the galleries that were written."""
        config, out = self.config, self.config.folder
        if not config.gallery:
            return []
        shown, chosen = pages.ByKind(config.gallery), pages.Chosen()
        for line in lines:
            shown.add(line)
            chosen.add(line)
        title = f"{config.model.version} on {config.val_dataset}: {','.join(config.protocols())}"
        pages.write_page(out / pages.PAGE, title, chosen.sections())
        if not (kept := shown.chosen()):
            return [pages.PAGE]
        Image.fromarray(pages.draw_answers(kept)).save(out / GALLERY)
        return [GALLERY, pages.PAGE]

    def _circumstances(self) -> dict[str, Any]:
        """How the scores come about."""
        config = self.config
        return protocol_facts(config.protocols()) | {
            "model": config.model.version,
            "model_fingerprint": fingerprints.of_model(config.model.version),
            "dataset_dir": config.dataset_dir,
            "val_dataset": config.val_dataset,
            "data": fingerprints.of_data(self.sets.readers),
            "command": ["evaluate.py", *self.words],
            "settings": {name: flatten(config)[name] for name in SETTINGS},
            "versions": versions(),
        }


def with_muse(result: Mapping[str, Any], lines: list[Line]) -> dict[str, Any]:
    """The results with MUSE's scores before a judge beside its data sets' others."""
    told = scoring.pre_judge(scoring.muse_lines(lines))
    return merge_results(result, {"datasets": {name: {"muse": {"pre_judge": one}} for name, one in told.items()}}) | (
        {"judge": scoring.NO_JUDGE} if told else {}
    )


def judge_folder(folder: Path, config: EvaluateConfig) -> None:
    """Have the answers to MUSE's questions in a results folder judged, and add the scores to its results.

    UserError where there are none, or the judge cannot be had.
    """
    lines = scoring.muse_lines(read_lines(folder))
    if not lines:
        raise scoring.nothing_to_judge(folder)
    result = read_results(folder)
    scores, facts = scoring.judge_answers(
        lines,
        choose_judge(config.judging, config.model.device),
        read_prompt(config.judging.judge_prompt or PROMPT_FILE),
        Path(config.judging.judge_cache) if config.judging.judge_cache else folder / scoring.CACHE,
        folder,
        config.judging.judge_threshold,
    )
    told = {name: {"muse": {"judged": one}} for name, one in scores.items()}
    write_json(folder / RESULTS, merge_results(result, {"datasets": told}) | {"judge": facts})
