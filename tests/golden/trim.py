"""Make the copy of a golden set that lives here, small enough for a repository: whole cases dropped, no number changed.

python -m tests.golden.trim FOLDER [OUT]
"""

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from tests.golden.vectors import DATA

MOST_BYTES = 3_000_000  # of all of tests/golden

# By file: cases that are left out, or single tensors of a group that is one case.
DROPPED = {
    "collate": (r"(llava_v1/|llava_llama_2/)?long(_.*)?",),
    "decoder": (r"n[15]\..*", r"image_feature_neck_out_.*"),
    "evaluate": (r"one_target_then_eos", r"two_.*"),
    "forward_train": (r"zero_conv",),
    "matcher": (r"1x1", r"3x3"),
    "postprocess": (r"landscape", r"portrait", r"square", r"upscale"),
    "preprocess": (r"image_[01](\.png)?",),
    "vision": (r"features_layer_.*",),
}


def is_dropped(file: str, name: str) -> bool:
    """Whether a case, or a tensor by its own name or its case's, is left out of a file."""
    names = (name, name.split(".")[0])
    return any(re.fullmatch(pattern, one) for pattern in DROPPED.get(file, ()) for one in names)


def without_dropped(file: str, facts: Any) -> Any:
    """A JSON tree less the entries of dropped cases."""
    if not isinstance(facts, dict):
        return facts
    return {name: without_dropped(file, value) for name, value in facts.items() if not is_dropped(file, name)}


def trim(source: Path, target: Path) -> None:
    """Write the trimmed copy of the set in `source` into the empty folder `target`."""
    for path in sorted(source.iterdir()):
        if path.suffix == ".safetensors":
            tensors = {name: value for name, value in load_file(path).items() if not is_dropped(path.stem, name)}
            save_file(tensors, target / path.name)
        elif path.name == "tokenizer_config.json" or path.suffix == ".model":
            shutil.copyfile(path, target / path.name)
        elif path.suffix == ".json":
            facts = without_dropped(path.stem, json.loads(path.read_text(encoding="utf-8")))
            text = json.dumps(facts, ensure_ascii=False, separators=(",", ":"))
            (target / path.name).write_text(text + "\n", encoding="utf-8")
    kept = json.loads((target / "preprocess.json").read_text(encoding="utf-8"))["images"]
    for name, entry in kept.items():
        for file in (name, entry["resized_uint8_file"]):
            shutil.copyfile(source / file, target / file)
    for path in target.iterdir():
        path.chmod(0o644)  # safetensors writes files for their owner alone


def main(arguments: list[str]) -> int:
    if len(arguments) not in (1, 2) or not Path(arguments[0]).is_dir():
        print("give the folder of a golden set, and where its trimmed copy belongs if not here", file=sys.stderr)
        return 2
    target = Path(arguments[1]) if len(arguments) == 2 else DATA
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    trim(Path(arguments[0]), target)
    size = sum(
        path.stat().st_size for path in DATA.parent.rglob("*") if path.is_file() and "__pycache__" not in str(path)
    )
    print(f"{target}: {sum(path.stat().st_size for path in target.iterdir()):,} bytes, tests/golden: {size:,}")
    return int(size > MOST_BYTES)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
