"""Ask a saved PixelLM about images: once, in a conversation with the keyboard or a pipe, or a file of questions.

python chat.py --version runs/demo/model
python chat.py --version runs/demo/model --image photo.jpg --prompt "the red circle" --out answer.png
echo "the red circle" | python chat.py --version runs/demo/model --image photo.jpg
python chat.py --version runs/demo/model --batch questions.jsonl --out runs/answers

Exit status: 0 when all went well, 1 when a line of a pipe or a file could not be answered, 2 when nothing could be
done, 130 after Ctrl-C at the question.
"""

import contextlib
import logging
import os
import sys
from pathlib import Path

from model.answer_page import answer_page
from model.overlay import draw_overlay, target_colour
from model.predictor import Predictor
from model.session import AnswerOptions, Finished, TargetStarted, TextPiece
from model.structures import DTYPES
from utils.cli.arguments import ChatArguments, parse_chat
from utils.cli.errors import UserError, run_script
from utils.serving.batch import BatchModel, answer_file
from utils.serving.conversation import Conversation, Manner
from utils.serving.files import check_image_name, free_name, target_lines, write_answer
from utils.serving.terminal import Terminal, one_line

logger = logging.getLogger("utils")

NOT_ALL_DONE = 1


def main(argv: list[str] | None = None) -> int:
    """Chat as the command line says; returns the exit status."""
    args = parse_chat(argv)
    once = "prompt" in args.given
    check(args, once)
    given = "precision" in args.given
    predictor = Predictor.from_pretrained(
        args.version, args.device, DTYPES[args.precision] if given else None, args.attn_implementation, args.bits
    )
    if args.compile:
        logger.info(predictor.compile())
    try:
        if args.batch:
            return answer_batch(predictor, args)
        return answer_once(predictor, args) if once else converse(predictor, args)
    except BrokenPipeError:
        # Who reads has left; nothing more can be said, not even at the end of the program.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return NOT_ALL_DONE


def check(args: ChatArguments, once: bool) -> None:
    """UserError when flags do not go together."""
    if args.load_in_8bit and args.load_in_4bit:
        raise UserError("--load_in_8bit and --load_in_4bit contradict each other: drop one")
    if args.batch and (once or args.image):
        raise UserError("--batch names images and questions in its lines: leave --image and --prompt out")
    if args.batch and not args.out:
        raise UserError("--batch is given without --out: name the folder for the answers")
    if args.batch:
        return
    if once and not args.image:
        raise UserError("--prompt is given without --image: say which image it is about")
    if args.out and not once:
        raise UserError("--out is for one answer: give --image and --prompt too, or --vis_save_path for a conversation")
    if args.out:
        check_image_name(Path(args.out), "--out")


def answer_once(predictor: Predictor, args: ChatArguments) -> int:
    """One image, one question; errors pass through."""
    predictor.processor.check_user_text(args.prompt)
    session = predictor.session(args.image)
    answer = session.ask(args.prompt, args.max_new_tokens, AnswerOptions(num_beams=args.num_beams))
    target = Path(args.out) if args.out else free_name(Path(args.vis_save_path), args.image)
    write_answer(target, session.image, answer, draw_overlay)
    terminal = Terminal()
    for line in (f"Answer: {one_line(answer.text)}", *target_lines(answer, target), f"  overlay: {target}"):
        terminal.say(line)
    return 0


def converse(predictor: Predictor, args: ChatArguments) -> int:
    """Questions until they end; a person has seen what went wrong, who reads a pipe is told by the status."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (gives input() a history and line editing)
    terminal = Terminal(echo=args.echo)
    options = AnswerOptions(num_beams=args.num_beams)
    conversation = Conversation(manner(predictor, options), terminal, Path(args.vis_save_path), args.max_new_tokens)
    if args.image:
        conversation.take(args.image)
    conversation.run()
    return NOT_ALL_DONE if conversation.num_failed and not terminal.interactive else 0


def manner(predictor: Predictor, options: AnswerOptions) -> Manner:
    """What a conversation asks of the model."""

    def open_talk(image: str) -> tuple:
        session = predictor.session(image)
        return session.image, session.chat(options)

    return Manner(
        open=open_talk,
        draw=draw_overlay,
        page=answer_page,
        colour=target_colour,
        text=lambda event: event.text if isinstance(event, TextPiece) else None,
        target=lambda event: event.number if isinstance(event, TargetStarted) else None,
        answer=lambda event: event.answer if isinstance(event, Finished) else None,
    )


def answer_batch(predictor: Predictor, args: ChatArguments) -> int:
    """Every question of a file."""
    options = AnswerOptions(num_beams=args.num_beams)
    model = BatchModel(
        open=predictor.processor.open_image,
        check=predictor.prompt,
        answer=lambda images, asked, index: predictor.answer(images, asked, index, args.max_new_tokens, options),
        draw=draw_overlay,
    )
    names = ("version", "max_new_tokens", "num_beams", "bits", "attn_implementation")
    settings = {name: getattr(args, name) for name in names} | {"precision": str(predictor.model.dtype)}
    return NOT_ALL_DONE if answer_file(Path(args.batch), Path(args.out), model, settings) else 0


if __name__ == "__main__":
    sys.exit(run_script(main))
