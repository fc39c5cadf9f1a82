"""Ask a saved PixelLM about a picture: once, or in a conversation with the keyboard.

python chat.py --version runs/demo/model
python chat.py --version runs/demo/model --image photo.jpg --prompt "the red circle" --out answer.png
"""

import sys
from pathlib import Path

import torch
from PIL import Image

from model.overlay import draw_overlay, printable
from model.predictor import Answer, Predictor
from utils.arguments import ChatArguments, parse_chat
from utils.scripts import UserError, explain, run_script

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
NEW_PICTURE, LEAVE = "/image", "/quit"
INTRODUCTION = f"Ask about the picture; `{NEW_PICTURE} FILE` takes another one, `{LEAVE}` or the end of input leaves."


def main(argv: list[str] | None = None) -> int:
    """Chat as the command line says; returns the exit status."""
    args = parse_chat(argv)
    once = "prompt" in args.given
    if once and not args.image:
        raise UserError("--prompt is given without --image: say which picture it is about")
    if args.out and not once:
        raise UserError("--out is for one answer: give --image and --prompt too, or --vis_save_path for a conversation")
    if args.out and Path(args.out).suffix.lower() not in PICTURE_SUFFIXES:
        raise UserError(f"--out {args.out} is no picture file: give a name that ends in {', '.join(PICTURE_SUFFIXES)}")
    given = "precision" in args.given
    predictor = Predictor.from_pretrained(
        args.version, args.device, DTYPES[args.precision] if given else None, args.attn_implementation
    )
    if once:
        answer_once(predictor, args)
    else:
        converse(predictor, args)
    return 0


def answer_once(predictor: Predictor, args: ChatArguments) -> None:
    """One picture, one question; errors pass through."""
    predictor.processor.check_user_text(args.prompt)
    predictor.set_image(args.image)
    answer = predictor.ask(args.prompt, args.max_new_tokens)
    target = Path(args.out) if args.out else free_name(Path(args.vis_save_path), args.image)
    show(predictor, answer, target)


def converse(predictor: Predictor, args: ChatArguments) -> None:
    """Questions from the keyboard until it ends; what is wrong with one is said, then the next is asked for."""
    for stream in (sys.stdin, sys.stdout):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    image = args.image
    if image:
        predictor.set_image(image)
    print(INTRODUCTION)
    while (line := read_line("Question: " if image else "Picture: ")) is not None:
        command, _, rest = line.partition(" ")
        if line == LEAVE:
            return
        try:
            if not image or command == NEW_PICTURE:
                wanted = rest.strip() if command == NEW_PICTURE else line
                predictor.set_image(wanted)
                image = wanted
            else:
                answer = predictor.ask(line, args.max_new_tokens)
                show(predictor, answer, free_name(Path(args.vis_save_path), image))
        except KeyboardInterrupt:
            print("\nstopped")
        except Exception as error:
            sentence = explain(error)
            if sentence is None:
                raise
            print(printable(sentence))


def read_line(invitation: str) -> str | None:
    """A line from the keyboard without blanks around it, None at the end of input."""
    try:
        return input(invitation).strip()
    except EOFError:
        print()
        return None


def free_name(folder: Path, image: str) -> Path:
    """A file in `folder`, named after the picture, that is not there yet."""
    stem, number = Path(image).stem or "picture", 1
    while (folder / f"{stem}_{number}.png").exists():
        number += 1
    return folder / f"{stem}_{number}.png"


def show(predictor: Predictor, answer: Answer, target: Path) -> None:
    """Print an answer; write its overlay to `target` and its masks (0 and 255) beside it."""
    assert predictor.picture is not None
    files = [target.with_name(f"{target.stem}_mask{number}.png") for number in range(1, len(answer.masks) + 1)]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw_overlay(predictor.picture, answer.masks, answer.phrases)).save(target)
        for file, mask in zip(files, answer.masks, strict=True):
            Image.fromarray(mask).convert("L").save(file)
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror or error}; choose another place") from error
    print(f"Answer: {printable(answer.text)}")
    rows = zip(files, answer.phrases, answer.boxes, answer.areas, answer.scores, strict=True)
    for number, (file, phrase, box, area, score) in enumerate(rows, start=1):
        share = 100 * area / predictor.picture[..., 0].size
        print(
            f"  {number}. {printable(phrase) or '(unnamed)'}: box {list(box)}, area {area} px ({share:.1f}%), "
            f"score {score:.3f}, mask {file}"
        )
    if answer.num_broken:
        print(f"  {answer.num_broken} broken seg group(s) gave no mask")
    print(f"  overlay: {target}")


if __name__ == "__main__":
    sys.exit(run_script(main))
