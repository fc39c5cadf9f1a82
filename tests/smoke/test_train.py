"""train_ds.py on a tiny model and drawn scenes: what a run leaves, how it goes on, what it says about bad input."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoTokenizer, CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

import train_ds
from demo.stages import launcher
from tests.smoke.conftest import ROOT, STEPS, SmokeRun, training_flags
from tests.unit import data_sets
from utils.checkpoints.builder import load_weights_into
from utils.checkpoints.export import read_trained_weights
from utils.cli.commands import parse_train
from utils.cli.errors import run_script
from utils.engine.checkpoints import find_problem, latest_tag, step_of
from utils.engine.fit import Run
from utils.engine.sample_log import read_consumed
from utils.engine.train import build_for_training


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a process of its own would start: no launcher."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def plain_run(smoke_base: Path, smoke_data: Path, tmp_path_factory: pytest.TempPathFactory) -> SmokeRun:
    """One process, the plain engine: the same samples per step as the two ranks have."""
    out = tmp_path_factory.mktemp("plain")
    flags = [*training_flags(smoke_base, smoke_data, out, "alone"), "--grad_accumulation_steps=2"]
    done = subprocess.run(
        [sys.executable, "train_ds.py", *flags], cwd=ROOT, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return SmokeRun(out / "alone", smoke_base, smoke_data, done.stdout + done.stderr)


def scalars(folder: Path, name: str) -> list[float]:
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return [event.value for event in events.Scalars(name)]


def refusal(capsys: pytest.CaptureFixture, flags: list[str]) -> str:
    """The sentence a run that cannot start leaves; its exit status is 2."""
    try:
        status = run_script(train_ds.main, flags)
    except SystemExit as stop:
        status = stop.code
    assert status == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    return last.partition(": ")[2]


def test_a_plain_run_leaves_checkpoints_curves_images_and_a_card(plain_run: SmokeRun) -> None:
    folder = plain_run.folder
    assert latest_tag(folder / "ckpt_model") == f"step{STEPS}"
    assert latest_tag(folder / "ckpt_model_best") in {"step2", f"step{STEPS}"}
    for name in ("loss/ce", "loss/bce", "loss/dice", "loss/total", "train/learning_rate", "train/gradient_norm"):
        assert len(scalars(folder, name)) == STEPS
    assert len(scalars(folder, "validation/giou")) == 2
    events = EventAccumulator(str(folder))
    events.Reload()
    assert events.Tags()["images"]
    card = json.loads((folder / "run.json").read_text())
    assert card["arguments"]["version"] == str(plain_run.base) and card["engine"] == "plain"
    assert card["samples_per_step"] == 4 and "refcoco" in card["data"] and card["versions"]["torch"]
    assert card["trained"] and card["loaded"]["loaded"] > 0 and card["packs_conversations"] is True
    assert "gradients reach all of the" in plain_run.said


def test_two_ranks_learn_what_one_process_learns(plain_run: SmokeRun, deepspeed_run: SmokeRun) -> None:
    folder = deepspeed_run.folder
    card = json.loads((folder / "run.json").read_text())
    assert (card["engine"], card["world_size"], card["samples_per_step"]) == ("deepspeed", 2, 4)
    assert (folder / "ckpt_model" / "zero_to_fp32.py").is_file()
    for name in ("loss/ce", "loss/bce", "loss/dice"):
        one, two = scalars(plain_run.folder, name), scalars(folder, name)
        assert two[0] == pytest.approx(one[0], rel=1e-5)
        assert two == pytest.approx(one, rel=1e-3)
    assert deepspeed_run.said.count("gradients reach all of the") == 1


def test_a_run_goes_on_by_itself_and_then_knows_its_end(
    smoke_base: Path, smoke_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    flags = [*training_flags(smoke_base, smoke_data, tmp_path, "on"), "--grad_accumulation_steps=1", "--no_eval"]
    assert run_script(train_ds.main, [*flags, "--max_steps=1"]) == 0
    assert latest_tag(tmp_path / "on" / "ckpt_model") == "step1"
    assert run_script(train_ds.main, [*flags, "--max_steps=2"]) == 0
    assert "going on from step 1" in capsys.readouterr().err
    assert run_script(train_ds.main, [*flags, "--max_steps=2"]) == 0
    assert "is complete" in capsys.readouterr().err
    assert run_script(train_ds.main, [*flags, "--max_steps=1", "--no-auto_resume"]) == 0
    assert "going on" not in capsys.readouterr().err
    sentence = refusal(capsys, [*flags, "--lora_r=4", "--max_steps=2"])
    assert "does not fit this model" in sentence and "lora" in sentence


def test_engines_do_not_read_each_others_checkpoints(deepspeed_run: SmokeRun, tmp_path, capsys) -> None:
    flags = training_flags(deepspeed_run.base, deepspeed_run.data, tmp_path, "other")
    sentence = refusal(capsys, [*flags, f"--resume={deepspeed_run.folder / 'ckpt_model'}"])
    assert "was not written by the plain engine" in sentence


def test_eval_only_scores_a_checkpoint(plain_run: SmokeRun, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    flags = training_flags(plain_run.base, plain_run.data, tmp_path, "scores")
    assert run_script(train_ds.main, [*flags, "--eval_only", f"--resume={plain_run.folder / 'ckpt_model'}"]) == 0
    said = capsys.readouterr()
    assert f"step {STEPS}: giou" in said.out and not (tmp_path / "scores" / "ckpt_model").exists()
    assert len(scalars(tmp_path / "scores", "validation/giou")) == 1


def test_pretraining_in_words_and_starting_from_its_weights(
    smoke_base: Path, smoke_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    flags = training_flags(smoke_base, smoke_data, tmp_path, "words")
    words = ["--dataset=vqa", "--sample_rates=1", "--train_language_model", "--train_vision_tower", "--no_eval"]
    words += ["--no-train_mask_decoder", "--max_steps=1", "--grad_accumulation_steps=1", "--precision=bf16"]
    assert run_script(train_ds.main, [*flags, *words]) == 0
    card = json.loads((tmp_path / "words" / "run.json").read_text())
    assert any(name.startswith("vision_tower.") for name in card["trained"])
    assert not any(name.startswith(("codebook.", "pixel_decoder.", "mask_projector.")) for name in card["trained"])
    assert not any("lora" in name for name in card["trained"])
    checkpoint = tmp_path / "words" / "ckpt_model"
    weights = read_trained_weights(checkpoint)
    args = parse_train(
        [*training_flags(smoke_base, smoke_data, tmp_path, "next"), "--lora_r=0", f"--weight={checkpoint}"]
    )
    built, trained = build_for_training(args)
    assert all(torch.equal(value, weights[name].to(value.dtype)) for name, value in built.model.state_dict().items())
    assert not any("lora" in name for name in trained)
    assert load_weights_into(built.model, weights, "the same").newly_initialized == {}


@pytest.fixture(scope="module")
def plain_parts(smoke_base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A plain Llama with its tokenizer, and a CLIP tower whose images are of another size."""
    folder = tmp_path_factory.mktemp("parts")
    tokenizer = AutoTokenizer.from_pretrained(smoke_base)
    width = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    language = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), num_hidden_layers=2, **width))
    tower = CLIPVisionModel(CLIPVisionConfig(num_hidden_layers=12, image_size=168, patch_size=56, **width))
    language.save_pretrained(folder / "llava")
    tokenizer.save_pretrained(folder / "llava")
    tower.save_pretrained(folder / "clip")
    return folder / "llava", folder / "clip"


README = """--seg_token_num=3 --num_classes_per_question=3 --batch_size=2 --pad_train_clip_images
    --preprocessor_config=./configs/preprocessor_448.json --resize_vision_tower --resize_vision_tower_size=448
    --vision_tower_for_mask --use_expand_question_list --image_feature_scale_num=2 --separate_mm_projector"""


def test_the_readme_command_builds_a_new_pixellm(
    plain_parts: tuple[Path, Path], smoke_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.chdir(ROOT)
    language, tower = plain_parts
    flags = [f"--version={language}", f"--vision-tower={tower}", f"--dataset_dir={smoke_data}", *README.split()]
    flags += [f"--log_base_dir={tmp_path}", "--exp_name=pixellm-7b", "--out_dim=16", "--decoder_mlp_dim=16"]
    families = ["--dataset=sem_seg||refer_seg||vqa||multi_reason_seg", "--sample_rates=2,9,2,4"]
    assert "cocostuff/train2017 is missing" in refusal(capsys, [*flags, *families, "--sem_seg_data=cocostuff"])
    families = ["--dataset=refer_seg||vqa||multi_reason_seg", "--sample_rates=9,2,4", "--refer_seg_data=refcoco"]
    short = ["--max_steps=1", "--grad_accumulation_steps=1", "--no_eval", "--workers=1", "--decoder_num_heads=2"]
    assert run_script(train_ds.main, [*flags, *families, *short]) == 0, capsys.readouterr().err
    weights = read_trained_weights(tmp_path / "pixellm-7b" / "ckpt_model")
    assert weights["vision_tower.model.embeddings.position_embedding.weight"].shape == (65, 16)
    assert any("lora_A" in name for name in weights)


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        (["--version=nowhere/llava"], "--version 'nowhere/llava' is not a folder"),
        (["--dataset_dir=nowhere"], "there is no data root nowhere"),
        (["--dataset=imagenet", "--sample_rates=1"], "imagenet"),
        (["--dataset=refer_seg", "--sample_rates=1,2"], "one rate for each"),
        (["--refer_seg_data=refcoco9"], "refcoco9"),
        (["--val_dataset=ReasonSeg|val"], "reason_seg"),
        (["--resume=nowhere"], "there is no checkpoint in nowhere"),
        (["--weight=nowhere"], "--weight nowhere does not exist"),
        (["--lora_target_modules=q_prj"], "--lora_target_modules names q_prj"),
        (["--log_base_dir=/dev/null"], "cannot write /dev/null/bad/run.lock"),
        (["--precision=fp16"], "fp16 needs a GPU"),
        (["--attn_implementation=flash_attention_2"], "lash"),
        (["--dataset=vqa", "--sample_rates=1", "--batch_size=4"], "something to learn for the loss of bce"),
    ],
)
def test_bad_input_gets_one_sentence(
    changes: list[str], part: str, smoke_base: Path, smoke_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    sentence = refusal(capsys, [*training_flags(smoke_base, smoke_data, tmp_path, "bad"), *changes])
    assert part in sentence and "\n" not in sentence
    assert not (tmp_path / "bad" / "ckpt_model").exists()


def test_damaged_images_are_passed_over_until_they_are_too_many(
    smoke_base: Path, smoke_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture
) -> None:
    data = shutil.copytree(smoke_data, tmp_path / "data")
    for image in sorted((data / "refer_seg/images/mscoco/images/train2014").iterdir())[:16:2]:
        image.write_bytes(image.read_bytes()[:200])
    flags = [*training_flags(smoke_base, data, tmp_path, "damaged"), "--no_eval", "--workers=1"]
    assert run_script(train_ds.main, [*flags, "--max_bad_samples=1"]) == 0
    assert "samples were left out:" in capsys.readouterr().err
    flags += ["--exp_name=damaged2"]
    sentence = refusal(capsys, [*flags, "--max_bad_samples=0"])
    assert "more than --max_bad_samples 0 allows" in sentence and "first: " in caplog.text
    sentence = refusal(capsys, [*flags, "--strict_data"])
    assert "train2014" in sentence and "Traceback" not in sentence


def test_a_data_root_that_vanishes_ends_a_run_in_a_sentence(
    smoke_base: Path, smoke_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And once it is back the same command goes on."""
    data = shutil.copytree(smoke_data, tmp_path / "data")
    flags = [*training_flags(smoke_base, data, tmp_path, "broken"), "--no_eval", "--grad_accumulation_steps=1"]
    flags += ["--save_every=1"]
    after_step = Run._after_step

    def vanish(run: Run, *args: Any) -> None:
        after_step(run, *args)
        if run.progress.step == 2:
            data.rename(tmp_path / "elsewhere")

    monkeypatch.setattr(Run, "_after_step", vanish)
    assert "9 samples in a row" in refusal(capsys, flags)
    monkeypatch.setattr(Run, "_after_step", after_step)
    (tmp_path / "elsewhere").rename(data)
    assert run_script(train_ds.main, flags) == 0
    assert "going on from step 2" in capsys.readouterr().err
    assert read_consumed(tmp_path / "broken") == list(range(STEPS * 2))


@pytest.mark.long
def test_a_worker_that_is_killed_ends_a_run_in_a_sentence(smoke_base: Path, smoke_data: Path, tmp_path: Path) -> None:
    flags = [*training_flags(smoke_base, smoke_data, tmp_path, "lost"), "--max_steps=100000", "--no_eval"]
    flags += ["--grad_accumulation_steps=1", "--save_every=2", "--workers=1"]
    started = subprocess.Popen(
        [sys.executable, "train_ds.py", *flags], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    wait_for(tmp_path / "lost" / "ckpt_model" / "latest", started)
    (worker,) = psutil.Process(started.pid).children()
    worker.kill()
    _, said = started.communicate(timeout=60)
    assert started.returncode == 2, said[-2000:]
    assert "a data worker ended after step" in said.splitlines()[-1] and "Traceback" not in said


def test_ones_own_images_are_trained_on(smoke_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """A COCO export and a folder of masks below custom/, as dataset/README.md says."""
    data = tmp_path / "data"
    for split in ("train", "val"):
        write_own(data / "custom" / "cups" / split, masks=False)
        write_own(data / "custom" / "trays" / split, masks=True)
    flags = [*training_flags(smoke_base, data, tmp_path, "own"), "--dataset=custom", "--sample_rates=1"]
    flags += ["--custom_data=cups||trays", "--val_dataset=custom|cups|val||custom|trays|val", "--max_steps=2"]
    assert run_script(train_ds.main, [*flags, "--grad_accumulation_steps=1"]) == 0
    card = json.loads((tmp_path / "own" / "run.json").read_text(encoding="utf-8"))
    assert "custom|cups|train 4" in card["data"] and "custom|trays|train 4" in card["data"]
    assert latest_tag(tmp_path / "own" / "ckpt_model") == "step2"
    assert "left out" not in capsys.readouterr().err


def write_own(folder: Path, masks: bool) -> None:
    """Four images with a square each, marked by polygons or by class numbers."""
    for number in range(4):
        data_sets.write_image(folder / "images" / f"{number}.jpg", 48, 48)
        labels = np.zeros((48, 48), dtype=np.uint8)
        labels[8:24, 8 + number : 24 + number] = 3
        if masks:
            data_sets.write_labels(folder / "masks" / f"{number}.png", labels)
    if masks:
        data_sets.write_json(folder / "masks" / "classes.json", {"3": "tray"})
    else:
        listed = [{"id": n, "file_name": f"{n}.jpg", "height": 48, "width": 48} for n in range(4)]
        marked = [data_sets.annotation(n, n, [data_sets.square(8 + n, 8, 16)]) for n in range(4)]
        found = {"images": listed, "annotations": marked, "categories": [{"id": 7, "name": "cup"}]}
        data_sets.write_json(folder / "annotations.json", found)


def test_ctrl_c_ends_in_good_order(smoke_base: Path, smoke_data: Path, tmp_path: Path) -> None:
    flags = [*training_flags(smoke_base, smoke_data, tmp_path, "stopped"), "--max_steps=100000", "--no_eval"]
    flags += ["--grad_accumulation_steps=1", "--save_every=2", "--workers=1"]
    started = subprocess.Popen(
        [sys.executable, "train_ds.py", *flags], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    folder = tmp_path / "stopped" / "ckpt_model"
    wait_for(folder / "latest", started)
    started.send_signal(signal.SIGINT)
    _, said = started.communicate(timeout=60)
    assert started.returncode == 0, said[-2000:]
    assert "stopped by SIGINT after step" in said and "the same command goes on" in said and "Traceback" not in said
    tag = latest_tag(folder)
    assert tag is not None and find_problem(folder / tag) is None and f"after step {step_of(tag)} of" in said


MOST_SECONDS = 10.0  # from the signal to the end of the last rank; two threads of one core need two to three


def wait_for(path: Path, started: subprocess.Popen[str]) -> None:
    """Until a file is there or the process has ended, which would be too early."""
    deadline = time.monotonic() + 240
    while not path.exists() and started.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    assert path.exists()


@pytest.mark.parametrize(
    ("whom", "ranks"),
    [
        ("deepspeed", 2),
        pytest.param("deepspeed", 1, marks=pytest.mark.long),
        pytest.param("its launcher", 2, marks=pytest.mark.long),
        pytest.param("all", 2, marks=pytest.mark.long),
    ],
)
def test_sigterm_under_deepspeed_ends_in_good_order(
    whom: str, ranks: int, smoke_base: Path, smoke_data: Path, tmp_path: Path, child_env: dict[str, str]
) -> None:
    """Whichever of the processes hears it: the one in front, the one that started the ranks, or every one."""
    flags = [*training_flags(smoke_base, smoke_data, tmp_path, "stopped"), "--max_steps=100000", "--no_eval"]
    flags += ["--grad_accumulation_steps=1", "--save_every=1", "--keep_last=3"]
    said = tmp_path / "said.txt"
    with said.open("w") as file:
        command = [*launcher("deepspeed", ranks), "train_ds.py", *flags]
        started = subprocess.Popen(
            command, cwd=ROOT, stdout=file, stderr=file, text=True, start_new_session=True, env=child_env
        )
    try:
        stopped_in_good_order(started, whom, ranks, flags, said, tmp_path / "stopped" / "ckpt_model")
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(started.pid, signal.SIGKILL)


def stopped_in_good_order(
    started: subprocess.Popen[str], whom: str, count: int, flags: list[str], said: Path, folder: Path
) -> None:
    """Send the signal once there is a checkpoint, and look at what the ranks do."""
    wait_for(folder / "latest", started)
    everyone = [psutil.Process(started.pid), *psutil.Process(started.pid).children(recursive=True)]
    ranks = [process for process in everyone if process.cmdline()[-1:] == flags[-1:] and "-u" in process.cmdline()]
    ranks = [process for process in ranks if "train_ds.py" in process.cmdline()[2]]
    assert len(ranks) == count
    asked = time.monotonic()
    if whom == "all":
        os.killpg(started.pid, signal.SIGTERM)
    else:
        (started if whom == "deepspeed" else ranks[0].parent()).send_signal(signal.SIGTERM)
    _, alive = psutil.wait_procs(ranks, timeout=60)
    seconds = time.monotonic() - asked
    text = said.read_text()
    print(f"{whom}, {count} ranks: {seconds:.1f} s")
    assert not alive and seconds < MOST_SECONDS, f"{seconds:.1f} s: {text[-2000:]}"
    started.wait(timeout=60)
    tag = latest_tag(folder)
    assert tag is not None and find_problem(folder / tag) is None
    why = "the end of its launcher" if whom == "deepspeed" else "(SIGTERM|another of its processes)"
    assert re.search(rf"stopped by {why} after step {step_of(tag)} of", text), text[-2000:]
    assert "Traceback" not in text
