"""Mutation test of the golden tests: in a copy of the set one thing is changed, and the group's test must then fail.

python -m tests.golden.mutate [TESTS ...]   (PIXELLM_GOLDEN: the set that is copied, else the one kept here)

For each group: one number, one tensor or fact that nothing asks for, and a file that is missing.
"""

import io
import json
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.golden import vectors

ROOT = Path(__file__).resolve().parents[2]
TESTS_FAILED = 1  # pytest's exit status; others say that it could not even begin
STRANGER = "nobody.asks.for.this"


@dataclass(frozen=True)
class Group:
    """What is changed in a group, and which test file must notice.

    test: the file's name less "test_" and ".py". number: regular expression of a tensor's name, or of a fact's path
    ("a/b/0") where `file` is JSON. by: how much is added to one number there, some ten times the tolerance; what is
    added to a relative tolerance's number is this share of it.
    """

    file: str
    test: str
    number: str
    by: float
    is_share: bool = False


GROUPS = (
    Group("collate.safetensors", "collate", r"\.labels$", 1),
    Group("collate.json", "collate", r"^prompts/.*/input_ids/3$", 1),
    Group("decoder.safetensors", "decoder", r"fused_low_res_mask", 2e-3),
    Group("decoder.json", "decoder", r"^multiscale_scalar/1$", 0.1),
    Group("evaluate.safetensors", "evaluate", r"\.out\.output_ids", 1),
    Group("evaluate.json", "evaluate", r"/min_top2_logit_margin$", 1e-2, True),
    Group("forward_inference.safetensors", "forward_inference", r"\.out\.mask_scores$", 1e-3),
    Group("forward_inference.json", "forward_inference", r"/target_counts_per_question/0$", 1),
    Group("forward_train.safetensors", "forward_train", r"\.out\.pred_masks", 2e-3),
    Group("forward_train.json", "forward_train", r"/grad_norms/model\.lm_head|/grad_norms/lm_head", 2e-2, True),
    Group("lora.safetensors", "lora", r"^merged\.", 1e-5),
    Group("lora.json", "lora", r"^outputs/mask_dice_loss$", 1e-3, True),
    Group("losses.safetensors", "losses", r"\.grad\.dice_loss$", 1e-6),
    Group("losses.json", "losses", r"/sigmoid_ce_loss$", 1e-3, True),
    Group("matcher.safetensors", "matcher", r"\.out\.cost$", 1e-3),
    Group("matcher.json", "matcher", r"/gt_indices/0$", 1),
    Group("metrics.safetensors", "metrics", r"^validate\..*\.gt$", 1),
    Group("metrics.json", "metrics", r"^ar_validate/0/giou$", 1e-4),
    Group("postprocess.safetensors", "postprocess", r"\.out\.masks$", 1e-1),
    Group("postprocess.json", "postprocess", r"/original_size_hw/0$", 1),
    Group("preprocess.safetensors", "preprocess", r"\.clip_tensor", 1e-4),
    Group("preprocess.json", "preprocess", r"/clip_tensor_sum_float64$", 10.0),
    Group("resized_*.png", "preprocess", "", 1),
    Group("published_config.json", "published", r"^mm_projector_hidden_dim$", 1),
    Group("published_generation_config.json", "published", r"^eos_token_id$", 1),
    Group("state_dict_keys_lora_wrapped.json", "published", r"^tensors/.*lora_A.*/0$", 1),
    Group("state_dict_keys_published.json", "published", r"^tensors/.*/shape/0$", 1),
    Group("vision.safetensors", "vision", r"^llm_image_tokens$", 1e-3),
    Group("vision.json", "vision", r"^clip_resize_hw/0/0$", -14),
    Group("weights.json", "recipe", r"^check_values/.*/sum_float64$", 1e-6),
)


def leaves(value: Any, path: str = "") -> list[tuple[str, Any, str | int]]:
    """(path, the list or object a number is in, its key there) of every number in a JSON tree."""
    if not isinstance(value, (dict, list)):
        return []
    found = []
    for key, child in value.items() if isinstance(value, dict) else enumerate(value):
        here = f"{path}/{key}" if path else str(key)
        if isinstance(child, (int, float)) and not isinstance(child, bool):
            found.append((here, value, key))
        found += leaves(child, here)
    return found


def change_fact(path: Path, group: Group) -> str:
    facts = json.loads(path.read_text(encoding="utf-8"))
    where, owner, key = next(found for found in leaves(facts) if re.search(group.number, found[0]))
    owner[key] += group.by * (owner[key] if group.is_share else 1)
    path.write_text(json.dumps(facts), encoding="utf-8")
    return where


def change_tensor(path: Path, group: Group) -> str:
    tensors = load_file(path)
    name = next(name for name in sorted(tensors) if re.search(group.number, name) and tensors[name].numel())
    values = tensors[name].flatten().clone()
    values[len(values) // 2] += torch.tensor(group.by, dtype=values.dtype)
    tensors[name] = values.view_as(tensors[name])
    save_file(tensors, path)
    return name


def change_number(folder: Path, group: Group) -> str:
    """Change one number of a group's file; returns where."""
    path = next(folder.glob(group.file))
    if path.suffix == ".png":
        pixels = np.array(Image.open(path))
        pixels[0, 0, 0] ^= 1
        Image.fromarray(pixels).save(path)
        return f"{path.name}, first pixel"
    return change_fact(path, group) if path.suffix == ".json" else change_tensor(path, group)


def add_stranger(folder: Path, group: Group) -> str:
    """Add something that no test asks for."""
    path = next(folder.glob(group.file))
    if path.suffix == ".safetensors":
        tensors = load_file(path)
        case = next(iter(sorted(tensors))).rpartition(".")[0]
        save_file({**tensors, f"{case}.{STRANGER}".lstrip("."): torch.zeros(1)}, path)
    elif path.suffix == ".json":
        facts = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps({**facts, STRANGER: 1.0}), encoding="utf-8")
    return STRANGER


def remove_file(folder: Path, group: Group) -> str:
    """Take the file away."""
    path = next(folder.glob(group.file))
    path.unlink()
    return path.name


DAMAGES: dict[str, Callable[[Path, Group], str]] = {
    "a number": change_number,
    "a stranger": add_stranger,
    "a missing file": remove_file,
}


def damages_of(group: Group) -> list[str]:
    """What can be done to a file; nothing can be added to an image, and weights have a check of their own alone."""
    if group.file.endswith(".png"):
        return ["a number", "a missing file"]
    return ["a number", "a missing file"] if group.file == "weights.json" else list(DAMAGES)


def run_tests(test: str, folder: Path) -> tuple[int, str]:
    """Exit status and output of one golden test file on the set in `folder`.

    In this process, because loading torch takes longer than most groups; what the tests remember of another set goes.
    """
    for module in [name for name in sys.modules if name == "tests" or name.startswith("tests.")]:
        del sys.modules[module]
    file = ROOT / "tests" / "golden" / f"test_{test}.py"
    output = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(output), redirect_stderr(output):
        patch.setenv(vectors.VARIABLE, str(folder))
        patch.chdir(ROOT)
        status = pytest.main(["-q", "-x", "-p", "no:cacheprovider", "--durations=0", str(file)])
    return int(status), output.getvalue()


@contextmanager
def copied_set() -> Iterator[Path]:
    """A copy of the set that may be damaged."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "set"
        shutil.copytree(vectors.folder(), folder, copy_function=shutil.copyfile)
        folder.chmod(0o755)
        yield folder


def passes(test: str) -> tuple[bool, str]:
    """Whether a test file passes on a copy that was left alone: only then does its failing say anything."""
    with copied_set() as folder:
        status, output = run_tests(test, folder)
        *_, summary = output.strip().splitlines()
        return status == 0, f"test_{test}.py, nothing changed: pytest ended with {status}: {summary}"


def is_noticed(group: Group, damage: str) -> tuple[bool, str]:
    """Whether the group's test fails on a copy of the set with that damage, and a line that says what was done."""
    with copied_set() as folder:
        where = DAMAGES[damage](folder, group)
        status, output = run_tests(group.test, folder)
        reasons = [line.removeprefix("E").strip() for line in output.splitlines() if line.startswith("E  ")]
        reason = " ".join(reasons[:2]) or output[-300:].strip()
        return status == TESTS_FAILED, f"{group.file}: {damage} ({where}): pytest ended with {status}: {reason}"


def main(arguments: list[str]) -> int:
    names = sorted({group.test for group in GROUPS})
    unknown = [name for name in arguments if name not in names]
    if unknown:
        print(f"no tests are called {', '.join(unknown)}: choose from {', '.join(names)}", file=sys.stderr)
        return 2
    chosen = [group for group in GROUPS if not arguments or group.test in arguments]
    tried = (passes(test) for test in dict.fromkeys(group.test for group in chosen))
    wrong = 0
    for fine, line in chain(tried, (is_noticed(group, damage) for group in chosen for damage in damages_of(group))):
        wrong += not fine
        print("ok  " if fine else "FAIL", line, flush=True)
    print("every change was noticed" if not wrong else f"{wrong} of these went wrong")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
