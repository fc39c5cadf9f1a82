"""The command line of each script: its config, and the flags that do nothing there, always or beside others."""

import itertools
import logging
import sys
from pathlib import Path
from typing import Any

from utils.cli.config import (
    SEPARATOR,
    AdapterConfig,
    ChatConfig,
    CheckConfig,
    EngineConfig,
    EvaluateConfig,
    MergeConfig,
    ModelConfig,
    TrainConfig,
)
from utils.cli.parser import Ignored, Script, WithoutEffect, parse
from utils.cli.run_card import RUN_CARD, find_run_card

logger = logging.getLogger(__name__)

_DATA_RULES = (
    WithoutEffect[Any](
        lambda c: c.data.strict_data,
        ("max_bad_samples",),
        "--strict_data stops at the first sample that cannot be read",
    ),
)
_MODEL_RULES = (
    WithoutEffect[Any](
        lambda c: not c.model.resize_vision_tower, ("resize_vision_tower_size",), "--resize_vision_tower is not set"
    ),
)
_OF_ENDPOINT = ("judge_timeout", "judge_tries", "judge_rate", "judge_parallel", "judge_temperature")

TRAIN = Script(
    "train_ds.py",
    "Train a PixelLM.",
    TrainConfig,
    ignored=(Ignored(ChatConfig, "training shows its images in TensorBoard", ("vis_save_path",)),),
    without_effect=(
        *_MODEL_RULES,
        *_DATA_RULES,
        WithoutEffect(
            lambda c: c.adapter.load_in_4bit and c.adapter.load_in_8bit, ("load_in_4bit",), "--load_in_8bit is set"
        ),
        WithoutEffect(
            lambda c: c.adapter.train_language_model and c.adapter.lora_r,
            ("lora_r",),
            "--train_language_model trains the whole language model instead of LoRA",
        ),
        WithoutEffect(lambda c: c.optimizer.max_steps, ("epochs",), "--max_steps says when to end"),
        WithoutEffect(
            lambda c: c.engine.engine == "plain",
            ("zero_stage", "deepspeed_config"),
            "it is DeepSpeed's and --engine is plain",
        ),
        WithoutEffect(
            lambda c: c.validation.no_eval,
            ("val_dataset", "val_batch_size", "val_limit", "validate_every", "max_new_tokens"),
            "--no_eval is set",
        ),
    ),
)
MERGE = Script(
    "merge_lora_weights_and_save_hf_model.py",
    "Turn what training left into one Hugging Face folder.",
    MergeConfig,
    ignored=(
        Ignored(ChatConfig, "merging draws nothing", ("vis_save_path",)),
        Ignored(EngineConfig, "merging computes no attention", ("attn_implementation",)),
        Ignored(EngineConfig, "merging runs in one process", ("local_rank",)),
        Ignored(AdapterConfig, "the checkpoint says which layers have LoRA", ("lora_target_modules",)),
        Ignored(AdapterConfig, "all weights of the checkpoint are taken", ("train_projector",)),
        Ignored(AdapterConfig, "merging does not train", ("lora_dropout", "train_mask_neck")),
    ),
    without_effect=_MODEL_RULES,
)
CHAT = Script(
    "chat.py",
    "Ask a saved PixelLM about an image.",
    ChatConfig,
    ignored=(
        Ignored(ModelConfig, "a saved model carries this setting itself"),
        Ignored(AdapterConfig, "a saved model has LoRA merged in", ("lora_r",)),
        Ignored(EngineConfig, "chat runs in one process", ("local_rank",)),
    ),
)
EVALUATE = Script(
    "evaluate.py",
    "Score a saved PixelLM, compare scores or print them as rows of a table.",
    EvaluateConfig,
    ignored=(
        Ignored(EngineConfig, "the launcher's environment says which process this is", ("local_rank",)),
        Ignored(ChatConfig, "evaluation draws its gallery into --out", ("vis_save_path",)),
    ),
    without_effect=(
        WithoutEffect(
            lambda c: not c.judging.judge_model,
            ("judge_prompt", "judge_threshold", "judge_cache", *_OF_ENDPOINT),
            "--judge_model is not set",
        ),
        WithoutEffect(
            lambda c: c.judging.judge_model and not c.judging.judge_url, _OF_ENDPOINT, "--judge_url is not set"
        ),
    ),
)
CHECK = Script(
    "check_data.py",
    "Look at the data before training does.",
    CheckConfig,
    without_effect=(
        WithoutEffect(lambda c: True, ("sample_rates",), "every data set is looked at"),
        WithoutEffect(lambda c: True, ("max_bad_samples", "strict_data"), "all bad samples are counted"),
        WithoutEffect(lambda c: True, ("fast_resize",), "images are opened, not prepared"),
    ),
)


def parse_train(argv: list[str] | None = None) -> TrainConfig:
    """The config of train_ds.py."""
    return parse(TRAIN, argv)


def parse_chat(argv: list[str] | None = None) -> ChatConfig:
    """The config of chat.py."""
    return parse(CHAT, argv)


def parse_check(argv: list[str] | None = None) -> CheckConfig:
    """The config of check_data.py."""
    return parse(CHECK, argv)


def parse_evaluate(argv: list[str] | None = None) -> EvaluateConfig:
    """The config of evaluate.py. A first word that is no flag is the model's folder; --compare takes two words."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words and not words[0].startswith("-"):
        words = ["--version", *words]
    if "--compare" in words:
        place = words.index("--compare") + 1
        folders = list(itertools.takewhile(lambda word: not word.startswith("-"), words[place:]))
        words[place : place + len(folders)] = [SEPARATOR.join(folders)] if folders else []
    return parse(EVALUATE, words)


def parse_merge(argv: list[str] | None = None) -> MergeConfig:
    """The config of merge_lora_weights_and_save_hf_model.py; the run card near --weight says what is not given."""
    weight = parse(MERGE, argv).weight
    card = find_run_card(Path(weight)) or {}
    if not card:
        logger.warning(f"no {RUN_CARD} near --weight {weight}: what the flags leave out has its default")
    recorded = card.get("arguments", {})
    # LoRA's rank is that of the weights; one that was given is checked against it.
    return parse(MERGE, argv, {name: value for name, value in recorded.items() if name != "lora_r"})
