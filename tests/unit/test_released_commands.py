"""The commands with which docs/checkpoints.md loads checkpoints, on small made-up folders, as a person types them."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from demo.scenes import SceneSettings, write_scene_data
from demo.scenes.planning import SceneDataSettings
from tests.unit import released_folders as folders
from tests.unit.tiny_bases import write_language_model, write_tower
from tests.unit.tiny_pixellm import noise
from utils.checkpoints.tensor_files import open_tensors

pytestmark = pytest.mark.timeout(900)  # programs in a row, each of which loads torch

SECTION = ("## Commands", "## A published PixelLM")
DATA = "--dataset=refer_seg --sample_rates=1 --refer_seg_data=refcoco --workers=0 --no_eval --model_max_length=2048"
STEPS = "--max_steps=1 --batch_size=1 --grad_accumulation_steps=1 --warmup_steps=1 --precision=fp32 --engine=plain"
SMALL = "--out_dim=16 --decoder_depth=1 --decoder_num_heads=2 --decoder_mlp_dim=16"


def commands(repository: Path) -> list[str]:
    """The commands of the page's section, joined where they take several lines."""
    text = (repository / "docs" / "checkpoints.md").read_text(encoding="utf-8")
    section = text[text.index(SECTION[0]) : text.index(SECTION[1])].replace("\\\n", " ")
    return [" ".join(line.split()) for line in re.findall(r"^(python .*)$", section, re.MULTILINE)]


class Shell:
    """A folder with made-up checkpoints and drawn data in which commands run, and what its placeholders stand for."""

    def __init__(self, place: Path, repository: Path, env: dict[str, str]) -> None:
        self.place, self.repository, self.env = place, repository, env
        self.runs = 0

    def run(self, command: str, further: str = "", **names: object) -> str:
        """What a command prints; names: placeholder -> what is typed for it."""
        for name, value in names.items():
            assert name in command, f"{name} is not in {command}"
            command = command.replace(name, str(value))
        program, script, *flags = shlex.split(f"{command.removesuffix(' ...')} {further}")
        assert program == "python" and "PATH_TO" not in command, command
        done = subprocess.run(
            [sys.executable, str(self.repository / script), *flags],
            cwd=self.place,
            env=self.env,
            capture_output=True,
            text=True,
            timeout=280,
            check=False,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}"
        return done.stdout + done.stderr

    def train(self, command: str, further: str = "", **names: object) -> str:
        """One step of training; returns the name of the run."""
        self.runs += 1
        name = f"run{self.runs}"
        said = self.run(command, f"--dataset_dir=data --exp_name={name} {DATA} {STEPS} {further}", **names)
        assert "gradients reach all of the" in said and "layout" in said
        assert (self.place / "runs" / name / "run.json").is_file()
        return name


@pytest.fixture
def shell(repository: Path, child_env: dict[str, str], tmp_path: Path) -> Shell:
    scenes = SceneDataSettings(train=12, heldout=6, questions=12, scene=SceneSettings(side=48))
    write_scene_data(tmp_path / "data", scenes)
    folders.write_eye(tmp_path / "clip")
    return Shell(tmp_path, repository, {**child_env, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")})


def test_the_section_holds_the_commands(repository: Path) -> None:
    scripts = [command.split()[1] for command in commands(repository)]
    assert scripts == [
        *["train_ds.py"] * 3,
        "tools/convert_checkpoint.py",
        "merge_lora_weights_and_save_hf_model.py",
        "tools/convert_checkpoint.py",
    ]


@pytest.mark.long
@pytest.mark.parametrize("base", ["v1", "1.5", "llama", "mistral", "qwen2", "qwen3"])
def test_training_from_a_llava_or_a_language_model(base: str, shell: Shell) -> None:
    command = commands(shell.repository)[0]
    version, tower = shell.place / "base", shell.place / "clip"
    if base in ("v1", "1.5"):
        folders.write_llava(version, base, "sharded pytorch_model.bin")
    else:
        write_language_model(version, base)
        tower = write_tower(shell.place / "tower", "siglip" if base == "qwen3" else "clip")
    shell.train(command, SMALL, PATH_TO_LLaVA=version, PATH_TO_CLIP=tower)


@pytest.mark.long
@pytest.mark.parametrize("layout", ["old transformers", "new transformers"])
def test_training_from_what_holds_its_own_tower(layout: str, shell: Shell) -> None:
    command = commands(shell.repository)[1]
    folders.write_llava(shell.place / "base", layout, "sharded model.safetensors")
    name = shell.train(command, SMALL, **{"PATH_TO_llava-1.5-7b-hf": shell.place / "base"})
    # And from the PixelLM that this run left.
    merge = f"python merge_lora_weights_and_save_hf_model.py --weight=runs/{name}/ckpt_model --save_path=saved"
    shell.run(merge, "--precision=fp32")
    shell.train(command, **{"PATH_TO_llava-1.5-7b-hf": "saved"})


def test_training_a_published_pixellm_on(shell: Shell) -> None:
    folders.write_published(shell.place / "published")
    shell.train(commands(shell.repository)[2], PATH_TO_PUBLISHED="published", PATH_TO_CLIP=shell.place / "clip")


@pytest.mark.long
def test_converting_there_and_back(shell: Shell) -> None:
    *_, there, merge, back = commands(shell.repository)
    tower = shell.place / "clip"
    tensors = folders.write_published(shell.place / "published")
    shell.run(there, PATH_TO_PUBLISHED="published", PATH_TO_CLIP=tower)
    Image.fromarray(noise(40, 60)).save(shell.place / "image.png")
    ask = "python chat.py --version=runs/released --image=image.png --prompt='What is it?' --out=answer.png"
    assert "Answer: " in shell.run(ask, "--max_new_tokens=4 --device=cpu")
    assert (shell.place / "answer.png").is_file()
    score = "python evaluate.py runs/released --dataset_dir=data --val_dataset='refcoco|unc|val' --out=scores"
    shell.run(score, "--limit=2 --max_new_tokens=4 --device=cpu")
    assert (shell.place / "scores" / "results.json").is_file()
    shell.run(back, PATH_TO_WRITE="written")
    found = {name: stored.read() for name, stored in open_tensors(shell.place / "written").items()}
    assert set(found) == set(tensors) and all(torch.equal(found[name], tensors[name]) for name in tensors)

    # The original's training state takes the same way.
    folders.write_training_state(shell.place / "pytorch_model.bin")
    folders.write_llava(shell.place / "base", "v1", "pytorch_model.bin")
    said = shell.run(merge, PATH_TO_LLaVA="base", PATH_TO_CLIP=tower)
    assert "LoRA of 6 layers merged with alpha 16" in said
    shell.run(back, PATH_TO_WRITE="written_again")
    assert set(open_tensors(shell.place / "written_again")) == set(tensors)
