"""Which judge the flags ask for."""

import os
from pathlib import Path

from utils.cli.arguments import JudgeArguments
from utils.cli.errors import UserError
from utils.evaluation.judge.asking import Judge
from utils.evaluation.judge.endpoint import KEY_VARIABLE, Endpoint, Manners
from utils.evaluation.judge.local import LocalJudge


def refuse_judge(args: JudgeArguments) -> None:
    """UserError where the flags name a judge that cannot be; nothing is loaded or asked."""
    if args.judge_url:
        _endpoint(args)
    elif not Path(args.judge_model).is_dir():
        raise UserError(
            f"--judge_model {args.judge_model} is no folder: give the folder of a language model, or --judge_url for a "
            "model behind an endpoint"
        )


def choose_judge(args: JudgeArguments, device: str = "auto") -> Judge:
    """The endpoint of --judge_url, else the model in the folder --judge_model. UserError where it cannot be had."""
    refuse_judge(args)
    return _endpoint(args) if args.judge_url else LocalJudge(args.judge_model, device)


def _endpoint(args: JudgeArguments) -> Endpoint:
    manners = Manners(
        timeout=args.judge_timeout,
        tries=args.judge_tries,
        rate=args.judge_rate,
        parallel=args.judge_parallel,
        temperature=args.judge_temperature,
    )
    return Endpoint(args.judge_url, args.judge_model, os.environ.get(KEY_VARIABLE, ""), manners)
