"""Which judge the flags ask for."""

import os
from pathlib import Path

from utils.cli.config import JudgeConfig
from utils.cli.errors import UserError
from utils.evaluation.judge.asking import Judge
from utils.evaluation.judge.local import LocalJudge


def refuse_judge(config: JudgeConfig) -> None:
    """UserError where the flags name a judge that cannot be; nothing is loaded or asked."""
    if config.judge_url:
        _endpoint(config)
    elif not Path(config.judge_model).is_dir():
        raise UserError(
            f"--judge_model {config.judge_model} is no folder: give the folder of a language model, or --judge_url for "
            "a model behind an endpoint"
        )


def choose_judge(config: JudgeConfig, device: str = "auto") -> Judge:
    """The endpoint of --judge_url, else the model in the folder --judge_model. UserError where it cannot be had."""
    refuse_judge(config)
    return _endpoint(config) if config.judge_url else LocalJudge(config.judge_model, device)


def _endpoint(config: JudgeConfig) -> Judge:
    try:
        from utils.evaluation.judge.endpoint import KEY_VARIABLE, Endpoint, RequestSettings
    except ModuleNotFoundError:
        raise UserError("--judge_url needs the client of such endpoints: pip install openai") from None
    settings = RequestSettings(
        timeout=config.judge_timeout,
        tries=config.judge_tries,
        rate=config.judge_rate,
        parallel=config.judge_parallel,
        temperature=config.judge_temperature,
    )
    return Endpoint(config.judge_url, config.judge_model, os.environ.get(KEY_VARIABLE, ""), settings)
