"""Ask a saved PixelLM about images: once, in a conversation with the keyboard or a pipe, or a file of questions.

python chat.py --version runs/demo/model
python chat.py --version runs/demo/model --image photo.jpg --prompt "the red circle" --out answer.png
echo "the red circle" | python chat.py --version runs/demo/model --image photo.jpg
python chat.py --version runs/demo/model --batch questions.jsonl --out runs/answers

Exit status: 0 when all went well, 1 when a line of a pipe or a file could not be answered, 2 when nothing could be
done, 130 after Ctrl-C at the question.
"""

import sys

from utils.cli.commands import parse_chat
from utils.cli.errors import run_script
from utils.serving.chat import chat


def main(argv: list[str] | None = None) -> int:
    """Chat as the command line says; returns the exit status."""
    return chat(parse_chat(argv))


if __name__ == "__main__":
    sys.exit(run_script(main))
