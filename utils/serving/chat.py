"""Answers on a terminal or into files: one, a conversation, or a file of questions."""

import contextlib
import logging
import os
import sys
from pathlib import Path

from model.predictor import Predictor
from model.session import AnswerOptions
from model.structures import DTYPES
from utils.cli.config import ChatConfig
from utils.serving.batch import answer_file
from utils.serving.conversation import Conversation
from utils.serving.files import check_image_name, choose_free_name, describe_targets, write_answer
from utils.serving.terminal import Terminal, one_line

logger = logging.getLogger(__name__)

NOT_ALL_DONE = 1


def chat(config: ChatConfig) -> int:
    """Chat as the config says; 0 when all went well, NOT_ALL_DONE when something could not be answered."""
    if config.out and not config.batch:
        check_image_name(Path(config.out), "--out")
    model = config.model
    dtype = DTYPES[model.precision] if model.precision else None
    predictor = Predictor.from_pretrained(model.version, model.device, dtype, model.attn_implementation, config.bits)
    if config.compile:
        logger.info(predictor.compile())
    try:
        if config.batch:
            return answer_batch(predictor, config)
        return answer_once(predictor, config) if config.prompt is not None else converse(predictor, config)
    except BrokenPipeError:
        # Who reads has left; nothing more can be said, not even at the end of the program.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return NOT_ALL_DONE


def answer_once(predictor: Predictor, config: ChatConfig) -> int:
    """One image, one question; errors pass through."""
    question = config.prompt or ""
    predictor.processor.check_user_text(question)
    session = predictor.session(config.image)
    answer = session.ask(question, config.max_new_tokens, AnswerOptions(num_beams=config.num_beams))
    target = Path(config.out) if config.out else choose_free_name(Path(config.vis_save_path), config.image)
    write_answer(target, session.image, answer)
    terminal = Terminal()
    for line in (f"Answer: {one_line(answer.text)}", *describe_targets(answer, target), f"  overlay: {target}"):
        terminal.say(line)
    return 0


def converse(predictor: Predictor, config: ChatConfig) -> int:
    """Questions until they end; a person has seen what went wrong, who reads a pipe is told by the status."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (gives input() a history and line editing)
    terminal = Terminal(echo=config.echo)
    options = AnswerOptions(num_beams=config.num_beams)
    conversation = Conversation(predictor, options, terminal, Path(config.vis_save_path), config.max_new_tokens)
    if config.image:
        conversation.open_image(config.image)
    conversation.run()
    return NOT_ALL_DONE if conversation.num_failed and not terminal.interactive else 0


def answer_batch(predictor: Predictor, config: ChatConfig) -> int:
    """Every question of a file."""
    options = AnswerOptions(num_beams=config.num_beams)
    settings = {name: getattr(config, name) for name in ("max_new_tokens", "num_beams", "bits")}
    settings |= {name: getattr(config.model, name) for name in ("version", "attn_implementation")}
    settings["precision"] = str(predictor.model.dtype)
    num_failed = answer_file(Path(config.batch), Path(config.out), predictor, config.max_new_tokens, options, settings)
    return NOT_ALL_DONE if num_failed else 0
