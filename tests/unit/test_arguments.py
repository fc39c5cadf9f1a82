"""Command lines as people type them: spellings, switches, files, limits, and the sentence when something is wrong."""

import dataclasses
import json
from pathlib import Path

import pytest
import yaml

from utils.cli.commands import CHAT, MERGE, TRAIN, parse_chat, parse_evaluate, parse_merge, parse_train
from utils.cli.config import ModelConfig, TrainConfig, preprocessor_side
from utils.cli.errors import UserError
from utils.cli.logs import configure_logging
from utils.cli.parser import flags_of, flatten

ROOT = Path(__file__).resolve().parents[2]

# The table of the originals' flags: name -> a value to type (None: a switch).
TRAIN_FLAGS = {
    "auto_resume": None, "batch_size": "2", "bce_loss_weight": "2.0", "beta1": "0.9", "beta2": "0.95",
    "ce_loss_weight": "1",
    "conv_type": "llava_v1", "dataset": "vqa", "dataset_dir": "d", "dice_loss_weight": "0.5", "epochs": "10",
    "exclude_val": None, "exp_name": "e", "explanatory": "0.1", "grad_accumulation_steps": "10",
    "gradient_checkpointing": None, "image_feature_scale_num": "2", "image_size": "1024", "load_in_4bit": None,
    "load_in_8bit": None, "local_rank": "0", "log_base_dir": "./runs", "lora_alpha": "16", "lora_dropout": "0.05",
    "lora_r": "8", "lora_target_modules": "q_proj,v_proj", "lr": "0.0003", "masks_process_with_clip": None,
    "model_max_length": "512", "no_eval": None, "num_classes_per_question": "1", "num_classes_per_sample": "3",
    "out_dim": "256", "pad_train_clip_images": None, "precision": "bf16", "preprocessor_config": "", "print_freq": "1",
    "reason_seg_data": "ReasonSeg|train", "refer_seg_data": "refcoco", "resize_vision_tower": None,
    "resize_vision_tower_size": "224", "resume": "", "sample_rates": "1", "seg_token_num": "1",
    "sem_seg_data": "ade20k", "separate_mm_projector": None, "start_epoch": "0", "steps_per_epoch": "500",
    "train_mask_decoder": None, "use_expand_question_list": None, "use_mm_start_end": None, "val_batch_size": "1",
    "val_dataset": "ReasonSeg|val", "version": "v", "vis_save_path": "./vis_output", "vision_tower": "t",
    "vision_pretrained": "sam", "vision_tower_for_mask": None, "vqa_data": "llava_instruct_150k", "weight": "",
    "workers": "4",
}  # fmt: skip
CHAT_FLAGS = [
    "conv_type", "image_feature_scale_num", "image_size", "load_in_4bit", "load_in_8bit", "local_rank", "lora_r",
    "model_max_length", "pad_train_clip_images", "precision", "preprocessor_config", "resize_vision_tower",
    "resize_vision_tower_size", "seg_token_num", "separate_mm_projector", "use_mm_start_end", "version",
    "vis_save_path", "vision_tower", "vision_tower_for_mask",
]  # fmt: skip
MERGE_FLAGS = [
    "conv_type", "image_feature_scale_num", "image_size", "local_rank", "lora_alpha", "lora_dropout", "lora_r",
    "lora_target_modules", "model_max_length", "out_dim", "pad_train_clip_images", "precision",
    "preprocessor_config", "resize_vision_tower", "resize_vision_tower_size", "save_path", "seg_token_num",
    "separate_mm_projector", "train_mask_decoder", "use_mm_start_end", "version", "vis_save_path", "vision_tower",
    "vision_pretrained", "vision_tower_for_mask", "weight",
]  # fmt: skip

README_TRAIN = [
    "--version=llava", "--dataset_dir=./dataset", "--dataset=sem_seg||refer_seg||vqa||multi_reason_seg",
    "--sample_rates=2,9,2,4", "--exp_name=pixellm-7b", "--vision-tower=openai/clip-vit-large-patch14-336",
    "--seg_token_num=3", "--num_classes_per_question=3", "--batch_size=2", "--pad_train_clip_images",
    "--preprocessor_config=./configs/preprocessor_448.json", "--resize_vision_tower",
    "--resize_vision_tower_size=448", "--vision_tower_for_mask", "--use_expand_question_list",
    "--image_feature_scale_num=2", "--separate_mm_projector",
]  # fmt: skip


@pytest.fixture(autouse=True)
def without_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)


def complaint(capsys: pytest.CaptureFixture, parse, *words: str) -> str:
    """The one sentence a bad command line leaves on stderr."""
    with pytest.raises(SystemExit) as stop:
        parse(list(words))
    assert stop.value.code == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and "Traceback" not in said.err
    return said.err


def words_of(flags: dict[str, str | None], dash: str) -> list[str]:
    words: list[str] = []
    for name, value in flags.items():
        words += [f"--{name.replace('_', dash)}" + ("" if value is None else f"={value}")]
    return words


def float_of(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


@pytest.mark.parametrize("dash", ["_", "-"])
def test_every_flag_of_the_table_is_accepted_in_both_spellings(dash: str) -> None:
    config = flatten(parse_train(words_of(TRAIN_FLAGS, dash)))
    typed = {name: TRAIN_FLAGS[name] for name in set(TRAIN_FLAGS) - {"vis_save_path"}}
    for name, value in typed.items():
        assert config[name] is True if value is None else config[name] in (value, float_of(value)), name
    assert parse_train(["--version=v", f"--eval{dash}only"]).validation.eval_only
    for bits in ("load_in_4bit", "load_in_8bit"):
        parse_chat(words_of({name: TRAIN_FLAGS[name] for name in CHAT_FLAGS if name != bits}, dash))
    merge = {name: {"save_path": "s", "weight": "w"}.get(name, TRAIN_FLAGS.get(name)) for name in MERGE_FLAGS}
    parse_merge(words_of(merge, dash))


def test_the_readme_commands_parse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    train = parse_train(["--local_rank=1", *README_TRAIN])
    model = train.model
    assert (model.seg_token_num, model.image_feature_scale_num, model.vision_tower) == (
        3, 2, "openai/clip-vit-large-patch14-336",
    )  # fmt: skip
    assert model.image_side() == 448 and train.optimizer.total_steps() == 5000 and train.engine.local_rank == 1
    assert train.data.families() == [("sem_seg", 2.0), ("refer_seg", 9.0), ("vqa", 2.0), ("multi_reason_seg", 4.0)]
    merge = parse_merge(["--version=base", "--weight=w.bin", "--save_path=out"])
    assert (merge.model, merge.weight, merge.save_path) == (ModelConfig(version="base"), "w.bin", "out")
    assert parse_evaluate(["--version=m"]).val_dataset == "ReasonSeg|val"


def test_switches_turn_on_and_off() -> None:
    on = [name for name, flag in flags_of(TrainConfig).items() if flag.field.default is True]
    assert {"auto_resume", "train_mask_decoder", "gradient_checkpointing"} <= set(on)
    for name in on:
        for spelling in (f"--no_{name}", f"--no-{name}", f"--no-{name.replace('_', '-')}"):
            assert flatten(parse_train(["--version=v", spelling]))[name] is False
    assert parse_train(["--version=v", "--no-use_mm_start_end"]).model.use_mm_start_end is False
    assert parse_train(["--version=v"]).model.use_mm_start_end is None


def test_a_file_fills_in_and_the_command_line_wins(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("version: base\nlr: 3e-5\nvision-tower: tower\ndataset: [refer_seg, vqa]\nsample_rates: [3, 1]\n")
    given = parse_train(["--config", str(config), "--lr", "1e-3"])
    assert (given.model.version, given.optimizer.lr, given.model.vision_tower) == ("base", 1e-3, "tower")
    assert given.data.families() == [("refer_seg", 3.0), ("vqa", 1.0)]
    with pytest.raises(SystemExit) as stop:
        parse_train(["--config", str(config), "--print_config", "--batch-size=7"])
    assert stop.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["optimizer"]["batch_size"] == 7 and printed["optimizer"]["lr"] == 3e-5
    config.write_text(yaml.safe_dump(printed))
    assert dataclasses.asdict(parse_train(["--config", str(config)])) == printed


def test_several_files_later_ones_win_and_files_include_others(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model, run, both = tmp_path / "model.yaml", tmp_path / "run.yaml", tmp_path / "both.yaml"
    model.write_text("model: {version: base, seg-token-num: 2}\nlr: 1e-5\n")
    run.write_text("optimizer:\n  lr: 3e-5\nadapter: {train_map_entry: false}\n")
    both.write_text("include: [model.yaml, run.yaml]\nseed: 4\n")
    separate = parse_train(["--config", str(model), str(run), "--seed=4"])
    assert separate == parse_train(["--config", str(both)])
    assert (separate.model.seg_token_num, separate.optimizer.lr) == (2, 3e-5) and not separate.adapter.train_mask_neck
    assert "--train_map_entry is called --train_mask_neck now" in capsys.readouterr().err
    run.write_text("optimizer: {version: v}\n")
    assert "section optimizer, sets 'version', which is no flag" in complaint(capsys, parse_train, "--config", str(run))
    assert not parse_train(["--version=v", "--no-train-map-entry"]).adapter.train_mask_neck


def test_every_file_in_configs_can_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for path in sorted((ROOT / "configs").rglob("*.yaml")):
        assert parse_train(["--config", str(path), "--version=v"]) != parse_train(["--version=v"])
    assert {preprocessor_side(path) for path in (ROOT / "configs").glob("preprocessor_*.json")} == {448, 512}


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--version=v", "--seg_token_nun=3"], "did you mean --seg_token_num?"),
        (["--version=v", "--seg_token"], "there is no flag --seg_token"),
        (["--version=v", "stray"], "do not know what to do with 'stray'"),
        (["--version=v", "--batch_size=two"], "--batch_size must be a whole number, found 'two'"),
        (["--version=v", "--batch_size=0"], "--batch_size must be at least 1, found 0"),
        (["--version=v", "--lr=nan"], "not a number"),
        (["--version=v", "--precision=int4"], "--precision must be one of fp32, bf16, fp16"),
        (["--version=v", "--sample_rates=1,2"], "give one rate for each"),
        (["--version=v", "--sample_rates=1,2,x,4"], "--sample_rates must be numbers"),
        (["--version=v", "--sample_rates=0,0,0,0"], "not be negative nor all zero"),
        (["--version=v", "--exp_name=a/b"], "--exp_name must be a plain folder name"),
        (["--version=v", "--eval_only", "--no_eval"], "contradict"),
        (["--version=v", "--start_epoch=10"], "but the run ends at step 5000"),
        (["--version=v", "--vision_feature_layers=-2,x"], "--vision_feature_layers must be numbers"),
        (["--version"], "expected one argument"),
        (["--config=absent.yaml"], "cannot read the config file absent.yaml"),
        ([], "--version is missing"),
    ],
)
def test_a_bad_command_line_gets_one_sentence(words: list[str], part: str, capsys: pytest.CaptureFixture) -> None:
    assert part in complaint(capsys, parse_train, *words)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("lr: [1", "is not valid YAML (line"),
        ("- lr", "must hold `name: value` lines"),
        ("learning_rate: 1", "sets 'learning_rate', which is no flag"),
        ("bathc_size: 1", "did you mean batch_size?"),
        ("batch_size: 1.5", "--batch_size must be a whole number"),
        ("auto_resume: 3", "--auto_resume must be true or false"),
        ("lr: true", "--lr must be a number"),
        ("version: {a: 1}", "--version must be text"),
    ],
)
def test_a_bad_file_gets_one_sentence(text: str, part: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(text)
    assert part in complaint(capsys, parse_train, "--version=v", f"--config={config}")


def test_merge_needs_what_and_where(capsys: pytest.CaptureFixture) -> None:
    assert "--weight and --save_path missing" in complaint(capsys, parse_merge, "--version=v")


def test_flags_without_effect_say_why_once_on_rank_0(capsys: pytest.CaptureFixture, monkeypatch) -> None:
    words = ["--version=v", "--image_size=1024", "--vision_pretrained=sam", "--no-pad_train_clip_images"]
    words += ["--strict_data", "--max_bad_samples=0.1"]
    parse_train([*words, "--resize_vision_tower_size=448", "--no-separate_mm_projector", "--masks_process_with_clip"])
    said = capsys.readouterr().err
    for flag in ("--image_size", "--vision_pretrained", "--no_pad_train_clip_images", "--resize_vision_tower_size"):
        assert flag in said
    assert "--max_bad_samples: no effect, --strict_data" in said
    assert said.count("no SAM") == 1 and "--no_separate_mm_projector" in said and "--masks_process_with_clip" in said
    parse_train(words)
    assert capsys.readouterr().err == ""
    configure_logging()
    monkeypatch.setenv("RANK", "1")
    parse_train(words)
    assert capsys.readouterr().err == ""


def test_what_is_not_given_comes_from_the_run_card(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    words = [f"--weight={tmp_path / 'w'}", "--save_path=s", "--lora_alpha=4"]
    recorded = {"lora_r": 16, "lora_alpha": 32, "seg_token_num": 3, "version": "base", "unknown": 1, "model": 2}
    (tmp_path / "run.json").write_text(json.dumps({"arguments": recorded}))
    merge = parse_merge(words)
    assert (merge.lora_r, merge.lora_alpha, merge.model.seg_token_num, merge.model.version) == (None, 4, 3, "base")
    assert parse_merge(words[:2]).lora_alpha == 32
    card = flatten(parse_train(["--version=v", "--seg_token_num=3"])) | {"train_map_entry": False}
    (tmp_path / "run.json").write_text(json.dumps({"arguments": card}))
    assert parse_merge(words).model == ModelConfig(version="v", seg_token_num=3)
    (tmp_path / "run.json").write_text(json.dumps({"arguments": recorded | {"lora_alpha": "many"}}))
    assert "--lora_alpha must be a whole number" in complaint(capsys, parse_merge, *words[:2])


@pytest.mark.parametrize(
    ("content", "side"),
    [
        ('{"crop_size": 448, "size": 224}', 448),
        ('{"size": {"height": 96, "width": 96}}', 96),
        ('{"size": {"shortest_edge": 336}}', 336),
        ('{"size": {"height": 96, "width": 48}}', None),
        ('{"size": "big"}', None),
        ("[]", None),
        ("{", None),
    ],
)
def test_the_side_in_a_preprocessor_file(content: str, side: int | None, tmp_path: Path) -> None:
    path = tmp_path / "preprocessor.json"
    path.write_text(content)
    if side is None:
        with pytest.raises(UserError, match=r"preprocessor\.json"):
            preprocessor_side(path)
    else:
        assert preprocessor_side(path) == side
        words = ["--version=v", f"--preprocessor_config={path}"]
        assert parse_train(words).model.image_side() == side
        with pytest.raises(UserError, match="give the same side"):
            parse_train([*words, "--resize_vision_tower", "--resize_vision_tower_size=7"]).model.image_side()


def test_every_option_is_documented_and_has_one_home() -> None:
    for parse in (parse_train, parse_merge, parse_chat, parse_evaluate):
        with pytest.raises(SystemExit) as stop:
            parse(["--help"])
        assert stop.value.code == 0
    for script in (TRAIN, MERGE, CHAT):
        for name, flag in flags_of(script.config, script.ignored).items():
            assert flag.field.metadata["help"], name
