"""Every number and name a run is told, once: plain dataclasses, one per concern, and one of them per script.

The field's default stands here and nowhere else; `utils.cli.parser` makes flags and YAML keys of the fields. Names and
meanings are those of PixelLM and LISA where those have the flag. None stands for "as the model in --version was saved;
for a new model, the default of PixelLMConfig or PixelLMProcessor".
"""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from model.structures import (
    ADAM_BETAS,
    ATTENTIONS,
    CLASSES_PER_QUESTION,
    CLASSES_PER_SAMPLE,
    CONVERSATION_FORMATS,
    DTYPES,
    GRADIENT_CLIP,
    LORA_ALPHA,
    LORA_DROPOUT,
    LORA_RANK,
    LORA_TARGET_MODULES,
    WEIGHT_DECAY,
)
from utils.cli.errors import UserError
from utils.cli.parser import option

SEPARATOR = "||"
PROTOCOLS = ("free", "teacher", "release")

NO_SAM = "the pixel decoder works on the vision tower's features: there is no SAM here"


def split_list(text: str, separator: str = SEPARATOR) -> list[str]:
    """The parts of "a||b||c" without blanks around them; empty text gives no parts."""
    return [part.strip() for part in text.split(separator) if part.strip()]


def split_numbers(name: str, text: str) -> list[float]:
    """The numbers of "2,9,2,4"; UserError names the flag `name`."""
    try:
        return [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise UserError(f"--{name} must be numbers separated by commas, found {text!r}") from None


def preprocessor_side(path: Path) -> int:
    """The image's side in a preprocessor JSON (`crop_size`, else `size`; a number, or height and width)."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read --preprocessor_config {path}: {error.strerror}") from None
    except ValueError:
        raise UserError(f"--preprocessor_config {path} is not valid JSON") from None
    size = content.get("crop_size", content.get("size")) if isinstance(content, dict) else None
    sides = set(size.values()) if isinstance(size, dict) else {size}
    side = sides.pop() if len(sides) == 1 else None
    if not isinstance(side, int) or isinstance(side, bool) or side < 1:
        raise UserError(f"--preprocessor_config {path} must hold one side as `crop_size` or `size`, found {size!r}")
    return side


@dataclass
class ModelConfig:
    """What a model is: what it is built from, and every number that shapes it."""

    version: str = option("", "folder (or hub id) of the model: a saved PixelLM, or a language model to start from")
    vision_tower: str = option("", "folder (or hub id) of a CLIP or SigLIP tower; not needed for a saved PixelLM")
    resize_vision_tower: bool = option(False, "resize the tower's position table to --resize_vision_tower_size")
    resize_vision_tower_size: int = option(224, "side of the image in pixels, with --resize_vision_tower", low=1)
    preprocessor_config: str = option("", "JSON file with the image's side (`size` or `crop_size`)")
    pad_train_clip_images: bool = option(
        True,
        "pad images to a square instead of cropping them",
        no_effect="images are always resized by their longest side and padded to a square, so no target is cut off",
    )
    vision_tower_for_mask: bool = option(
        True,
        "decode masks from the vision tower's features",
        no_effect="masks are always decoded from the vision tower's features",
    )
    image_size: int = option(1024, "side of SAM's image", low=1, no_effect=NO_SAM)
    seg_token_num: int | None = option(None, "seg tokens per target and scale", low=1)
    image_feature_scale_num: int | None = option(None, "feature maps of the tower, with seg tokens for each", low=1)
    separate_mm_projector: bool = option(
        True,
        "give the pixel decoder a projector of its own",
        no_effect="the language model and the pixel decoder always have a projector each",
    )
    conv_type: str | None = option(None, "how a conversation is written out", choices=CONVERSATION_FORMATS)
    use_mm_start_end: bool | None = option(None, "put <im_start> and <im_end> around the image")
    model_max_length: int | None = option(None, "longest conversation in tokens, those of the image included", low=8)
    vision_feature_layers: str = option(
        "", "hidden states of the tower, one per scale, coarse first, as -2,-11; empty: chosen by the builder", join=","
    )
    image_token_pool: int | None = option(None, "side of the square of patches averaged into one image token", low=1)
    decoder_depth: int | None = option(None, "two-way blocks per scale of the pixel decoder", low=1)
    decoder_num_heads: int | None = option(None, "attention heads of the pixel decoder", low=1)
    decoder_mlp_dim: int | None = option(None, "width of the pixel decoder's MLPs", low=1)
    token_fusion: str | None = option(None, "weights of the tokens of a scale", choices=("learned", "constant"))
    scale_fusion: str | None = option(None, "weights of the masks of the scales", choices=("learned", "constant"))
    text_rules: str | None = option(
        None, "turns: a long conversation loses whole turns; release: it is cut anywhere", choices=("turns", "release")
    )
    group_rule: str | None = option(
        None,
        "adjacent: a broken seg group costs its own mask; release: it costs all masks of its answer",
        choices=("adjacent", "release"),
    )
    out_dim: int | None = option(None, "width of a target's embedding and of the pixel decoder", low=8)
    ce_loss_weight: float | None = option(None, "weight of the text loss", low=0.0)
    bce_loss_weight: float | None = option(None, "weight of the masks' cross entropy", low=0.0)
    dice_loss_weight: float | None = option(None, "weight of the masks' DICE loss", low=0.0)
    refinement_alpha: float | None = option(
        None, "weight of a pixel that two masks of a question claim; 1 for none", low=1.0
    )
    vision_pretrained: str = option("PATH_TO_SAM_ViT-H", "SAM's weights", no_effect=NO_SAM)

    def image_side(self) -> int | None:
        """Side of the square an image is put into; None for the tower's own. UserError where the flags disagree."""
        asked = self.resize_vision_tower_size if self.resize_vision_tower else None
        if not self.preprocessor_config:
            return asked
        written = preprocessor_side(Path(self.preprocessor_config))
        if asked is not None and asked != written:
            raise UserError(
                f"--resize_vision_tower_size is {asked}, but {self.preprocessor_config} says {written}: "
                "give the same side twice, or one of them"
            )
        return written

    def feature_layers(self) -> list[int] | None:
        """vision_feature_layers as numbers, or None when it is empty."""
        numbers = split_numbers("vision_feature_layers", self.vision_feature_layers)
        if any(number != int(number) for number in numbers):
            raise UserError(f"--vision_feature_layers must be whole numbers, found {self.vision_feature_layers!r}")
        return [int(number) for number in numbers] or None


@dataclass
class AdapterConfig:
    """LoRA, which parts train, and in how few bits what does not train is held."""

    lora_r: int = option(LORA_RANK, "rank of LoRA on the language model; 0 for none", low=0)
    lora_alpha: int = option(LORA_ALPHA, "LoRA's scale is alpha / rank", above=0)
    lora_dropout: float = option(LORA_DROPOUT, "dropout in front of LoRA", low=0.0, high=1.0)
    lora_target_modules: str = option(LORA_TARGET_MODULES, "names of the layers LoRA is put on", join=",")
    train_projector: bool = option(True, "train the projector that makes image tokens")
    train_mask_decoder: bool = option(True, "train what predicts masks; off for training in words alone")
    train_mask_neck: bool = option(
        True, "train the pixel decoder's neck and no-mask embedding; off in the release", formerly="train_map_entry"
    )
    train_language_model: bool = option(False, "train all of the language model instead of LoRA")
    train_vision_tower: bool = option(False, "train the vision tower too")
    train_new_tokens_only: bool = option(
        False, "of the embedding table and lm_head train only the rows of new tokens: less memory than all of them"
    )
    load_in_8bit: bool = option(False, "hold the language model's frozen layers in 8 bits (needs bitsandbytes)")
    load_in_4bit: bool = option(False, "hold the language model's frozen layers in 4 bits (needs bitsandbytes)")

    @property
    def bits(self) -> int | None:
        """Bits of a frozen weight of the language model's layers; None for --precision."""
        return 8 if self.load_in_8bit else 4 if self.load_in_4bit else None


@dataclass
class DataConfig:
    """What is trained on."""

    dataset_dir: str = option("./dataset", "the data root; dataset/README.md draws it")
    dataset: str = option("sem_seg||refer_seg||vqa||multi_reason_seg", "families to mix", join=SEPARATOR)
    sample_rates: str = option("2,9,2,4", "share of each family, in the same order", join=",")
    sem_seg_data: str = option("ade20k||cocostuff||pascal_part||paco_lvis||mapillary", "sem_seg's sets", join=SEPARATOR)
    refer_seg_data: str = option("refclef||refcoco||refcoco+||refcocog", "refer_seg's sets", join=SEPARATOR)
    vqa_data: str = option("llava_instruct_150k", "vqa's sets", join=SEPARATOR)
    reason_seg_data: str = option("ReasonSeg|train", "reason_seg's set and splits", join=SEPARATOR)
    custom_data: str = option("", "custom's sets: names of folders below custom/ in the data root", join=SEPARATOR)
    explanatory: float = option(0.1, "share of reason_seg's answers in words alone; negative: none", high=1.0)
    num_classes_per_sample: int = option(
        CLASSES_PER_SAMPLE, "questions (conversations) about one image, at most", low=1
    )
    num_classes_per_question: int = option(CLASSES_PER_QUESTION, "targets asked for in one question, at most", low=1)
    use_expand_question_list: bool = option(False, "ask in more varied words")
    exclude_val: bool = option(False, "leave out training images that validation shows")
    masks_process_with_clip: bool = option(
        False,
        "resize masks like the image",
        no_effect="masks are compared at the image's own size, never resized or cropped",
    )
    workers: int = option(4, "processes that load data; 0 loads in the training process", low=0)
    max_bad_samples: float = option(
        0.02, "share of samples that may be unreadable before training stops", low=0.0, high=1.0
    )
    strict_data: bool = option(False, "stop at the first sample that cannot be read")
    fast_resize: bool = option(False, "prepare images faster: large JPEGs lose fine detail, values may be off by 1")
    index_dir: str = option("", "folder of annotation indexes; empty: PIXELLM_INDEX_DIR, else .index in the data root")

    def families(self) -> list[tuple[str, float]]:
        """(family, rate) pairs; UserError when the two lists do not match."""
        names, rates = split_list(self.dataset), split_numbers("sample_rates", self.sample_rates)
        if not names:
            raise UserError("--dataset names nothing to train on")
        if len(names) != len(rates):
            raise UserError(
                f"--dataset names {len(names)} families ({', '.join(names)}) but --sample_rates has {len(rates)} "
                f"numbers ({self.sample_rates}): give one rate for each"
            )
        if min(rates) < 0 or sum(rates) <= 0:
            raise UserError(f"--sample_rates must not be negative nor all zero, found {self.sample_rates}")
        return list(zip(names, rates, strict=True))


@dataclass
class OptimizerConfig:
    """The recipe of a training run: batches, steps, rates."""

    batch_size: int = option(2, "images per rank and accumulation round", low=1)
    grad_accumulation_steps: int = option(10, "rounds per optimizer step", low=1)
    epochs: int = option(10, "an epoch is --steps_per_epoch optimizer steps", low=1)
    steps_per_epoch: int = option(500, "optimizer steps in an epoch", low=1)
    max_steps: int = option(0, "optimizer steps in all; 0: epochs x steps_per_epoch", low=0)
    start_epoch: int = option(0, "begin data and schedule here when nothing is resumed", low=0)
    lr: float = option(3e-4, "highest learning rate", low=0.0)
    mask_lr_multiplier: float = option(1.0, "times --lr for what predicts masks", low=0.0)
    lr_schedule: str = option("linear", "after warm-up", choices=("linear", "cosine", "constant"))
    warmup_steps: int = option(100, "optimizer steps of linear warm-up", low=0)
    optimizer: str = option("adamw", "adamw, or sgd without momentum", choices=("adamw", "sgd"))
    beta1: float = option(ADAM_BETAS[0], "AdamW", low=0.0, high=1.0)
    beta2: float = option(ADAM_BETAS[1], "AdamW", low=0.0, high=1.0)
    weight_decay: float = option(WEIGHT_DECAY, "AdamW, on matrices only", low=0.0)
    grad_clip: float = option(GRADIENT_CLIP, "largest norm of the gradient; 0 for no limit", low=0.0)
    loss_normalisation: str = option(
        "step",
        "step: every token and mask of a step weighs the same; micro_batch: every micro-batch does, as in the release",
        choices=("step", "micro_batch"),
    )

    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.max_steps or self.epochs * self.steps_per_epoch

    def samples_per_step(self, world_size: int) -> int:
        """Samples of an optimizer step on all ranks together."""
        return self.batch_size * self.grad_accumulation_steps * world_size


@dataclass
class EngineConfig:
    """Who runs the steps, and how numbers are computed."""

    precision: str = option("bf16", "fp32, bf16 or fp16", choices=tuple(DTYPES))
    attn_implementation: str = option("sdpa", "attention of the language model and the tower", choices=ATTENTIONS)
    engine: str = option("auto", "auto: deepspeed under a launcher, else plain", choices=("auto", "deepspeed", "plain"))
    zero_stage: int | None = option(
        None, "ZeRO stage of DeepSpeed; default: that of --deepspeed_config, else 2", low=0, high=3
    )
    deepspeed_config: str = option("", "JSON file with further settings of DeepSpeed, as configs/zero2.json")
    gradient_checkpointing: bool = option(True, "recompute activations in the backward pass to save memory")
    compile: bool = option(
        False, "compile the language model's layers at the first steps: minutes then, quicker steps after"
    )
    seed: int = option(0, "of data order, initial weights and dropout", low=0)
    deterministic: bool = option(
        False,
        "on a GPU only operations whose bits repeat, so that a resumed run repeats too (a CPU always does); slower",
    )
    local_rank: int = option(0, "set by the launcher", low=-1)


@dataclass
class RunConfig:
    """Where a run is kept, what it starts from, and what is written down."""

    exp_name: str = option("pixellm", "name of the run: its folder under --log_base_dir")
    log_base_dir: str = option("./runs", "where runs are kept")
    weight: str = option("", "weights to start from: file or folder with a state dict of this model")
    resume: str = option("", "checkpoint folder to go on from")
    auto_resume: bool = option(True, "go on from the run's own ckpt_model when there is one")
    save_every: int = option(0, "optimizer steps between checkpoints; 0: --steps_per_epoch", low=0)
    save_minutes: float = option(0.0, "minutes after which a checkpoint is due in any case; 0: never", low=0.0)
    keep_last: int = option(2, "checkpoints kept, the newest; ckpt_model_best is kept beside them", low=1)
    max_bad_steps: int = option(5, "steps in a row without a finite gradient that stop the run; 0: never", low=0)
    profile: int = option(0, "steps to record in a trace, in the run's folder; 0: none", low=0)
    print_freq: int = option(1, "optimizer steps between updates of the console line", low=1)

    @property
    def folder(self) -> Path:
        """Where the run's checkpoints, curves and card are."""
        return Path(self.log_base_dir) / self.exp_name

    def check(self) -> None:
        if Path(self.exp_name).name != self.exp_name or self.exp_name in {"", ".", ".."}:
            raise UserError(f"--exp_name must be a plain folder name, found {self.exp_name!r}")
        if self.resume and self.weight:
            raise UserError("--resume and --weight both say which weights to start from: drop one")


@dataclass
class ValidationConfig:
    """Scores during training."""

    val_dataset: str = option("ReasonSeg|val", "what to score on, several joined by ||", join=SEPARATOR)
    val_batch_size: int = option(1, "images per batch when scoring", low=1)
    val_limit: int = option(0, "questions to score, at most; 0: all", low=0)
    validate_every: int = option(0, "optimizer steps between validations; 0: --steps_per_epoch", low=0)
    max_new_tokens: int = option(512, "longest answer in tokens", low=1)
    no_eval: bool = option(False, "never validate")
    eval_only: bool = option(False, "validate once and stop")

    def check(self) -> None:
        if self.eval_only and self.no_eval:
            raise UserError("--eval_only and --no_eval contradict each other: drop one")


@dataclass
class TrainConfig:
    """train_ds.py"""

    model: ModelConfig = field(default_factory=ModelConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    run: RunConfig = field(default_factory=RunConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)

    def check(self) -> None:
        """UserError where values do not go together."""
        _require_version(self.model.version)
        self.data.families()
        self.model.feature_layers()
        self._check_bits()
        first, last = self.optimizer.start_epoch * self.optimizer.steps_per_epoch, self.optimizer.total_steps()
        if first >= last:
            raise UserError(
                f"--start_epoch {self.optimizer.start_epoch} begins at step {first}, but the run ends at step {last}"
            )

    def _check_bits(self) -> None:
        """UserError where weights in few bits do not go with the rest."""
        bits, other = self.adapter.bits, None
        if bits is None:
            return
        if self.adapter.train_language_model:
            other = "--train_language_model"
        elif self.run.weight:
            other = "--weight"
        elif self.engine.zero_stage == 3 and self.engine.engine != "plain":
            other = "--zero_stage 3"
        if other is not None:
            raise UserError(
                f"--load_in_{bits}bit and {other} do not go together: frozen layers in few bits stay as the base has "
                "them"
            )


def _require_version(version: str) -> None:
    if not version:
        raise UserError("--version is missing: give the folder of a model")


@dataclass
class MergeConfig:
    """merge_lora_weights_and_save_hf_model.py"""

    model: ModelConfig = field(default_factory=ModelConfig)
    weight: str = option("", "what training left: pytorch_model.bin, the folder zero_to_fp32.py wrote, or ckpt_model")
    save_path: str = option("", "folder to write the model to")
    max_shard_size: str = option("5GB", "largest file of the saved model")
    precision: str = option("bf16", "fp32, bf16 or fp16", choices=tuple(DTYPES))
    lora_r: int | None = option(None, "rank of LoRA, where it is to be checked", low=0)
    lora_alpha: int | None = option(
        None, f"LoRA's scale is alpha / rank; default: training's, else {LORA_ALPHA}", above=0
    )
    train_mask_decoder: bool = option(True, "off after training in words alone: parts for masks are left out")
    load_in_8bit: bool = option(False, "training held the language model's frozen layers in 8 bits")
    load_in_4bit: bool = option(False, "training held the language model's frozen layers in 4 bits")

    def check(self) -> None:
        missing = [f"--{name}" for name in ("weight", "save_path") if not getattr(self, name)]
        if missing:
            raise UserError(f"{' and '.join(missing)} missing: say what to merge and where to write it")
        if not re.fullmatch(r"\d+[KMGT]B", self.max_shard_size):
            raise UserError(f"--max_shard_size must be a number and KB, MB, GB or TB, found {self.max_shard_size!r}")


@dataclass
class PredictorConfig:
    """Which saved model answers, and how it computes."""

    version: str = option("", "folder (or hub id) of a saved PixelLM")
    precision: str | None = option(None, "fp32, bf16 or fp16; default: as the model was saved", choices=tuple(DTYPES))
    attn_implementation: str = option("sdpa", "attention of the language model and the tower", choices=ATTENTIONS)
    device: str = option("auto", "auto, cpu, mps, cuda or cuda:1")


@dataclass
class ChatConfig:
    """chat.py"""

    model: PredictorConfig = field(default_factory=PredictorConfig)
    load_in_8bit: bool = option(False, "hold the language model in 8 bits (needs bitsandbytes)")
    load_in_4bit: bool = option(False, "hold the language model in 4 bits (needs bitsandbytes)")
    image: str = option("", "image to ask about; without it chat asks for one")
    prompt: str | None = option(None, "the question; without it chat asks")
    batch: str = option("", 'file of questions, a line {"image": ..., "question": ...} each; answers go to --out')
    out: str = option("", "write the overlay to this file (one answer), or all answers to this folder (--batch)")
    max_new_tokens: int = option(512, "longest answer in tokens", low=1)
    num_beams: int = option(1, "answers followed at once, of which the best is kept", low=1)
    compile: bool = option(False, "compile what decodes tokens and masks first: seconds now, quicker answers after")
    echo: bool = option(False, "repeat each line that a pipe gives, as a terminal shows what is typed")
    vis_save_path: str = option("./vis_output", "folder for overlays and masks")

    @property
    def bits(self) -> int | None:
        """Bits of a frozen weight of the language model's layers; None for --precision."""
        return 8 if self.load_in_8bit else 4 if self.load_in_4bit else None

    def check(self) -> None:
        """UserError where flags do not go together."""
        _require_version(self.model.version)
        once = self.prompt is not None
        if self.load_in_8bit and self.load_in_4bit:
            raise UserError("--load_in_8bit and --load_in_4bit contradict each other: drop one")
        if self.batch and (once or self.image):
            raise UserError("--batch names images and questions in its lines: leave --image and --prompt out")
        if self.batch and not self.out:
            raise UserError("--batch is given without --out: name the folder for the answers")
        if once and not self.image:
            raise UserError("--prompt is given without --image: say which image it is about")
        if self.out and not once and not self.batch:
            raise UserError(
                "--out is for one answer: give --image and --prompt too, or --vis_save_path for a conversation"
            )


@dataclass
class JudgeConfig:
    """Who judges MUSE's answers, and how it is asked. The key is read from the environment, never from a flag."""

    judge_model: str = option(
        "", "MUSE's judge: a model's name at --judge_url, or without that the folder of a language model; empty: none"
    )
    judge_url: str = option("", "address of an OpenAI-compatible endpoint, such as https://host/v1")
    judge_prompt: str = option("", "file with the judge's prompt; empty: utils/evaluation/judge/prompt.txt")
    judge_threshold: float = option(5.0, "verdict from 0 to 10 below which an IoU counts 0", low=0.0, high=10.0)
    judge_cache: str = option("", "file that keeps the judge's replies; empty: judge_cache.jsonl beside the results")
    judge_timeout: float = option(60.0, "seconds until a reply of --judge_url counts as late", above=0.0)
    judge_tries: int = option(6, "requests per answer to judge, at most", low=1)
    judge_rate: float = option(0.0, "requests per minute, at most; 0: no limit", low=0.0)
    judge_parallel: int = option(4, "requests at once", low=1)
    judge_temperature: float = option(0.0, "sent to --judge_url; negative: not sent")

    def check(self) -> None:
        """UserError where the judge's flags do not go together."""
        if self.judge_url and not self.judge_model:
            raise UserError("--judge_url is given without --judge_model: name the model to ask for there")


@dataclass
class EvaluateConfig:
    """evaluate.py"""

    model: PredictorConfig = field(default_factory=PredictorConfig)
    judging: JudgeConfig = field(default_factory=JudgeConfig)
    dataset_dir: str = option("./dataset", "the data root; dataset/README.md draws it")
    val_dataset: str = option("ReasonSeg|val", "what to score on, several joined by ||", join=SEPARATOR)
    out: str | None = option(
        None, "folder for results.json, samples.jsonl, gallery.png and index.html; default: ./runs/eval"
    )
    batch_size: int = option(16, "questions answered together", low=1)
    limit: int = option(0, "questions to score, at most; 0: all", low=0)
    max_new_tokens: int = option(512, "longest answer in tokens", low=1)
    protocol: str = option("free,teacher", "how to ask: free, teacher, release, or several joined by commas")
    shuffled: bool = option(True, "with free: also score each question on another image (what guessing gets)")
    teacher_forced: bool = option(True, "--no_teacher_forced takes teacher out of --protocol")
    gallery: int = option(12, "answers drawn in the gallery image; 0: neither that nor index.html", low=0)
    compare: str = option("", "two results folders, A B: paired differences, and the answers that changed most")
    table: str = option("", "a results folder: print its scores as rows of Markdown and LaTeX")
    judge: str = option("", "a results folder: judge its answers to MUSE's questions, with --judge_model")

    @property
    def folder(self) -> Path:
        """Where scores are written."""
        return Path(self.out or "./runs/eval")

    def compared(self) -> tuple[Path, Path]:
        """The two folders of --compare. UserError when there are not two."""
        folders = split_list(self.compare)
        if len(folders) != 2:
            raise UserError(f"--compare takes two results folders, found {len(folders)}: {', '.join(folders)}")
        return Path(folders[0]), Path(folders[1])

    def protocols(self) -> tuple[str, ...]:
        """The ways of asking, in the order of PROTOCOLS. UserError where none is left, or one is not known."""
        asked = split_list(self.protocol, ",")
        for name in asked:
            if name not in PROTOCOLS:
                raise UserError(
                    f"--protocol names {name!r}; expected {', '.join(PROTOCOLS)}, or several joined by commas"
                )
        kept = tuple(name for name in PROTOCOLS if name in asked and (self.teacher_forced or name != "teacher"))
        if not kept:
            raise UserError("--no_teacher_forced leaves no protocol to score by: give --protocol free")
        return kept

    def check(self) -> None:
        if self.compare:
            self.compared()
        elif self.judge:
            if not self.judging.judge_model:
                raise UserError("--judge is given without --judge_model: say who judges")
        elif not self.table:
            _require_version(self.model.version)
            self.protocols()


@dataclass
class CheckConfig:
    """check_data.py: the data flags of train_ds.py, and how to look."""

    data: DataConfig = field(default_factory=DataConfig)
    val_dataset: str = option("ReasonSeg|val", "what is scored on, several joined by ||; empty: none", join=SEPARATOR)
    full: bool = option(False, "open every sample, and compare images by content")
    json: str = option("", "write what was found to this file")
    show: int = option(0, "samples of each data set to draw on a page", low=0)
    show_dir: str = option("./runs/check_data", "folder of the pages")
    version: str = option("", "with --show: a saved PixelLM, to show conversations as it writes them")


def model_options(model: ModelConfig) -> dict[str, Any]:
    """The flags that shape a model, under the names that the model's builder has for them."""
    return {
        "image_size": model.image_side(),
        "image_token_pool": model.image_token_pool,
        "vision_feature_layers": model.feature_layers(),
        "num_scales": model.image_feature_scale_num,
        "tokens_per_scale": model.seg_token_num,
        "embedding_dim": model.out_dim,
        "decoder_depth": model.decoder_depth,
        "decoder_num_heads": model.decoder_num_heads,
        "decoder_mlp_dim": model.decoder_mlp_dim,
        "token_fusion": model.token_fusion,
        "scale_fusion": model.scale_fusion,
        "refinement_alpha": model.refinement_alpha,
        "ce_loss_weight": model.ce_loss_weight,
        "bce_loss_weight": model.bce_loss_weight,
        "dice_loss_weight": model.dice_loss_weight,
        "conversation_format": model.conv_type,
        "use_mm_start_end": model.use_mm_start_end,
        "model_max_length": model.model_max_length,
        "text_rules": model.text_rules,
        "group_rule": model.group_rule,
    }
