"""Base + options -> a PixelLM ready to train: what is loaded, what is new, what trains, and LoRA in and out again."""

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import is_flash_attn_2_available

from ..configuration_pixellm import PixelLMConfig
from ..modeling_pixellm import ExpandedRows, PixelLMForCausalLM
from ..processing_pixellm import IMAGE_TOKEN, PixelLMProcessor, check_groups
from ..vision_tower import resize_position_table
from .bases import (
    LANGUAGE,
    POSITION_TABLE,
    TOWER,
    Part,
    llava,
    plain_language_model,
    resized,
    stand_alone_tower,
    tower_of,
)
from .filling import MISMATCH, Origin, empty_model, fill, refuse_mismatch
from .folders import (
    BuildError,
    first_sentence,
    load_tokenizer,
    load_whole,
    local_folder,
    quiet_transformers,
    read_config,
)
from .layouts import (
    LLAVAS,
    OURS,
    PUBLISHED_PIXELLM,
    Checkpoint,
    describe_unknown,
    layout_of,
    read_json_config,
    recognise,
    refuse_relatives,
    unwrapped,
)
from .load_report import LoadReport
from .published import (
    TABLE,
    PublishedRest,
    PublishedTensors,
    lora_alpha_in,
    merged_lora,
    prepare_release_tokenizer,
    rows_needed,
    small_files,
    sort_published,
)
from .released_checkpoints import (
    RELEASE_CONSTANTS,
    RELEASE_IMAGE_MEAN,
    RELEASE_IMAGE_STD,
    config_from_release,
    name_in_pixellm,
)
from .tensor_files import Stored, all_finite, stored_in

# Language models whose states and head we know to be all there is between tokens and logits; others are probed.
KNOWN_LANGUAGE_MODELS = ("llama", "mistral", "qwen2", "qwen3")
# What only masks need; a base that only ever learned words lacks it.
MASK_PARTS = ("mask_projector", "codebook", "pixel_decoder")
NEW_PARTS = ("projector", *MASK_PARTS)
_NEW = "new in a PixelLM, initialised"
_WIDER = "half of its hidden units, as ours has twice LLaVA's; multiplied by zeros, they change nothing at first"
_NEW_ROWS = "rows of the added tokens are drawn around the mean of the others"
# The probe makes logits as large as a trained model's: a soft cap leaves small ones as they are.
PROBE_LOGIT, PROBE_TOLERANCE, PROBE_ROUNDINGS, PROBE_TOKENS = 100.0, 1e-3, 10, 8
FLASH_ATTENTION = "flash_attention_2"


@dataclass
class ModelOptions:
    """What may be chosen when a model is built.

    None keeps what a PixelLM folder says, or takes the field's default for a new one.

    The fields that `PixelLMConfig` or `PixelLMProcessor` have too mean the same as there.
    """

    image_size: int | None = None
    image_token_pool: int | None = None
    vision_feature_layers: list[int] | None = None
    num_scales: int | None = None
    tokens_per_scale: int | None = None
    embedding_dim: int | None = None
    decoder_depth: int | None = None
    decoder_num_heads: int | None = None
    decoder_mlp_dim: int | None = None
    token_fusion: str | None = None
    scale_fusion: str | None = None
    refinement_alpha: float | None = None
    ce_loss_weight: float | None = None
    bce_loss_weight: float | None = None
    dice_loss_weight: float | None = None
    conversation_format: str | None = None
    use_mm_start_end: bool | None = None
    model_max_length: int | None = None
    image_mean: list[float] | None = None
    image_std: list[float] | None = None
    pad_before_normalize: bool | None = None

    def chosen(self, owner: type) -> dict[str, Any]:
        """The options that were set and that `owner`'s constructor takes."""
        names = set(inspect.signature(owner).parameters)
        return {name: value for name, value in asdict(self).items() if value is not None and name in names}


@dataclass
class BuiltModel:
    """A model in evaluation mode, the processor that belongs to it, and where the weights came from.

    published: what a published PixelLM held beside them, to be saved with the model; None for any other.
    """

    model: PixelLMForCausalLM
    processor: PixelLMProcessor
    report: LoadReport
    published: PublishedRest | None = None


@dataclass(frozen=True)
class _Manner:
    """How a model is built, whatever it is built from."""

    dtype: torch.dtype | None
    attn_implementation: str
    load_weights: bool
    to_train: bool


def build_model(
    version: str,
    vision_tower: str | None = None,
    options: ModelOptions | None = None,
    *,
    dtype: torch.dtype | None = torch.float32,
    attn_implementation: str = "sdpa",
    load_weights: bool = True,
    to_train: bool = False,
) -> BuiltModel:
    """Build from local folders.

    Args:
        version: a PixelLM folder that we saved (to train on, or to enlarge), a published PixelLM, a LLaVA, or a plain
            language model's folder; README.md lists all layouts.
        vision_tower: a CLIP or SigLIP folder; needed where `version` holds no tower.
        dtype: what weights are loaded into, read one by one; None leaves each in the type it is stored in, and what is
            new in float32, for callers that choose themselves.
        load_weights: False leaves the weights as initialised, for callers that load all of them themselves.
        to_train: the fusion weights that a release holds constant become learned and start at those constants, unless
            the options say otherwise.

    Raises:
        BuildError: a folder is missing or is not what is expected, tensors do not fit, or parts do not work together.
    """
    options = options or ModelOptions()
    folder = local_folder(version, "--version")
    if attn_implementation == FLASH_ATTENTION and not is_flash_attn_2_available():
        raise BuildError(
            f"--attn_implementation {FLASH_ATTENTION} needs the package flash-attn and a CUDA GPU, which are not here: "
            "install it, or choose sdpa"
        )
    manner = _Manner(dtype, attn_implementation, load_weights, to_train)
    try:
        built = _build(folder, vision_tower, options, manner)
    except BuildError:
        raise
    except (ValueError, KeyError, ImportError) as error:
        raise BuildError(f"cannot build a PixelLM from {folder}: {first_sentence(error)}") from error
    check_groups(built.processor)
    built.model.eval()
    return built


def build_training_state(
    weight: str,
    version: str,
    vision_tower: str | None,
    options: ModelOptions | None = None,
    *,
    lora_alpha: float,
    dtype: torch.dtype | None = torch.float32,
) -> BuiltModel:
    """Build what the original's training left: the PEFT-wrapped state of a published PixelLM, its LoRA merged.

    Args:
        weight: the file or folder with the state. version: the LLaVA it was trained over, for config and tokenizer.
        vision_tower: the tower's folder, for its config.

    Raises:
        BuildError: as `build_model`.
    """
    folder = local_folder(version, "--version")
    place = Path(weight).expanduser()
    tensors, wrapped = unwrapped(stored_in(place))
    config = read_json_config(folder)
    if name := "model.embed_tokens.weight" if "model.embed_tokens.weight" in tensors else "":
        config = {**config, "vocab_size": tensors[name].shape[0]}
    checkpoint = Checkpoint(folder, PUBLISHED_PIXELLM, config, tensors, wrapped)
    manner = _Manner(dtype, "sdpa", True, False)
    try:
        built = _released(checkpoint, f"--weight {weight}", vision_tower, options or ModelOptions(), manner, lora_alpha)
    except BuildError:
        raise
    except (ValueError, KeyError) as error:
        raise BuildError(f"cannot build a PixelLM from {place}: {first_sentence(error)}") from error
    check_groups(built.processor)
    built.model.eval()
    return built


def is_released_training_state(weight: str) -> bool:
    """Whether --weight is what the original's training left. BuildError for one of LISA, GSVA, GLaMM or Sa2VA."""
    place = Path(weight).expanduser()
    if not place.exists() or (
        place.is_dir() and not any(place.glob("*.bin*")) and not any(place.glob("*.safetensors*"))
    ):
        return False
    tensors, wrapped = unwrapped(stored_in(place))
    if wrapped:
        refuse_relatives(place, {}, tensors)
    return wrapped and layout_of(tensors) is PUBLISHED_PIXELLM


def _build(folder: Path, vision_tower: str | None, options: ModelOptions, manner: _Manner) -> BuiltModel:
    checkpoint = recognise(folder)
    if checkpoint.layout is OURS:
        config = read_config(folder, "--version")
        built = _continue_pixellm(folder, config, options, manner)
        if vision_tower:
            built.report.ignored["--vision-tower"] = f"{folder} is a PixelLM, which has its own"
        return built
    if checkpoint.layout is PUBLISHED_PIXELLM:
        return _released(checkpoint, f"--version {folder}", vision_tower, options, manner, lora_alpha_in(folder))
    if checkpoint.layout in LLAVAS:
        return _from_llava(checkpoint, vision_tower, options, manner)
    return _from_language_model(checkpoint, vision_tower, options, manner)


def _finish(
    config: PixelLMConfig,
    processor: PixelLMProcessor,
    tensors: Stored,
    origins: list[Origin],
    may_lack: Mapping[str, str],
    manner: _Manner,
    rows: int,
) -> BuiltModel:
    """The model of a config, filled. rows: of the stored embedding table."""
    if not manner.load_weights:
        config._attn_implementation = manner.attn_implementation
        model = PixelLMForCausalLM(config).to(manner.dtype or torch.float32)
        return BuiltModel(model, processor, LoadReport())
    model = empty_model(config, manner.attn_implementation)
    report = fill(model, tensors, origins, dtype=manner.dtype, may_lack=may_lack, rows=rows)
    if model.get_input_embeddings().num_embeddings > rows:
        report.fresh["language_model.embeddings"] = _NEW_ROWS
    if manner.to_train:
        # Random Fourier features lose what they are for in 16 bits, whatever type they were saved in.
        for buffer in model.buffers():
            if buffer.is_floating_point():
                buffer.data = buffer.data.float()
    return BuiltModel(model, processor, report)


# --- a PixelLM that goes on ---------------------------------------------------------------------------------------


def _continue_pixellm(folder: Path, saved: PixelLMConfig, options: ModelOptions, manner: _Manner) -> BuiltModel:
    processor = _changed_processor(_saved_processor(folder, saved), options)
    rows = saved.text_config.vocab_size
    config = _changed_config(saved, processor, options)
    config.text_config.vocab_size = max(rows, rows_needed(processor.tokenizer))
    if manner.to_train:
        _learn_fusion(config, options)
    tensors = stored_in(folder) if manner.load_weights else {}
    if POSITION_TABLE in tensors:
        tensors[POSITION_TABLE] = _on_the_grid(tensors, config)
    may_lack = {
        part: f"not in {folder}, initialised"
        for part in MASK_PARTS
        if not any(name.startswith(f"{part}.") for name in tensors)
    }
    built = _finish(config, processor, tensors, [Origin("", str(folder), advice=MISMATCH)], may_lack, manner, rows)
    built.published = PublishedRest.load(folder)
    built.report.layout = OURS.title
    return built


def _on_the_grid(tensors: Stored, config: PixelLMConfig) -> Any:
    """The tower's stored position table, brought to the config's grid."""
    table = tensors[POSITION_TABLE]
    class_tokens = int(f"{TOWER}embeddings.class_embedding" in tensors)
    grid, method = config.grid_size, config.position_resize
    return table.made(
        (class_tokens + grid**2, *table.shape[1:]),
        lambda value: resize_position_table(value, grid, class_tokens, method),
    )


def _learn_fusion(config: PixelLMConfig, options: ModelOptions) -> None:
    """What the release holds constant is learned in the paper's recipe, and starts at the release's constants."""
    if config.position_resize == "release":  # the mark of the release's numerics
        config.token_fusion = options.token_fusion or "learned"
        config.scale_fusion = options.scale_fusion or "learned"


def _saved_processor(folder: Path, saved: PixelLMConfig) -> PixelLMProcessor:
    """The processor of a PixelLM folder; BuildError where it is not the one that belongs to the model."""
    path = folder / "processor_config.json"
    if not path.is_file():
        raise BuildError(f"{path} is missing: the folder must hold the processor that was saved with the model")
    try:
        processor = PixelLMProcessor.from_pretrained(folder)
    except Exception as error:  # the tokenizers library raises Exception itself
        raise BuildError(f"the processor in {folder} cannot be read: {first_sentence(error)}") from error
    shared = ("image_size", "patch_size", "image_token_pool", "num_scales", "tokens_per_scale")
    for name in (*shared, "seg_token_ids", "image_token_id"):
        found, expected = getattr(processor, name), getattr(saved, name)
        if found != expected:
            raise BuildError(
                f"{folder}: the processor's {name} is {found}, the model's {expected}: its files are not of one model"
            )
    return processor


def _changed_processor(saved: PixelLMProcessor, options: ModelOptions) -> PixelLMProcessor:
    """The saved processor with the chosen options changed."""
    settings = {**saved.settings(), **options.chosen(PixelLMProcessor)}
    PixelLMProcessor.prepare_tokenizer(saved.tokenizer, settings["num_scales"], settings["tokens_per_scale"])
    return PixelLMProcessor(saved.tokenizer, **settings)


def _changed_config(saved: PixelLMConfig, processor: PixelLMProcessor, options: ModelOptions) -> PixelLMConfig:
    fields = saved.to_dict()
    chosen = options.chosen(PixelLMConfig)
    for name, owner in (("token_fusion_value", "tokens_per_scale"), ("scale_fusion_value", "num_scales")):
        if owner in chosen and chosen[owner] != fields[owner]:
            fields[name] = None
    fields.update(chosen)
    fields["vision_config"] = {**fields["vision_config"], "image_size": fields["image_size"]}
    fields.update(_token_ids(processor))
    return PixelLMConfig(**fields)


def _token_ids(processor: PixelLMProcessor) -> dict[str, Any]:
    return {"seg_token_ids": list(processor.seg_token_ids), "image_token_id": processor.image_token_id}


def load_weights_into(
    model: nn.Module, weights: dict[str, torch.Tensor], source: str, new_parts: Iterable[str] = ()
) -> LoadReport:
    """Fill a model strictly.

    Args:
        new_parts: parts that may be missing as a whole and stay as initialised.

    Raises:
        BuildError: a tensor is missing, superfluous, of another shape, or not finite; the sentence names it.
    """
    own = model.state_dict()
    optional = tuple(f"{part}." for part in new_parts)
    lacking = [name for name in own if name not in weights]
    tied = {name for name in lacking if _is_tied(own, name, weights)}
    refuse_mismatch(
        [Origin("", source, advice=MISMATCH)],
        {name: (value.shape, own[name].shape) for name, value in weights.items() if name in own},
        [name for name in lacking if name not in tied and not (optional and name.startswith(optional))],
        [(name, name) for name in weights if name not in own],
    )
    for name, value in weights.items():
        if not all_finite(value):
            raise BuildError(
                f"{source}: tensor {name!r} holds values that are not finite: take a checkpoint from before that"
            )
    model.load_state_dict(weights, strict=False)
    report = LoadReport(loaded=list(weights))
    report.fresh = {name: f"not in {source}, initialised" for name in lacking if name not in tied}
    return report


def _is_tied(own: dict[str, torch.Tensor], name: str, weights: dict[str, torch.Tensor]) -> bool:
    """Whether a tensor that a file leaves out is the same storage as one it holds."""
    return any(other in weights and own[other].data_ptr() == own[name].data_ptr() for other in own if other != name)


# --- a published PixelLM ------------------------------------------------------------------------------------------


def _released(
    checkpoint: Checkpoint,
    place: str,
    vision_tower: str | None,
    options: ModelOptions,
    manner: _Manner,
    lora_alpha: float,
) -> BuiltModel:
    """A published PixelLM, or the training state of one, with the release's numerics.

    place: where its tensors are, as a flag names it; config and tokenizer are in the checkpoint's folder.
    """
    folder, raw = checkpoint.folder, checkpoint.config
    if not raw:
        raise BuildError(
            f"{place} holds {checkpoint.title} and no config.json that can be read: copy config and tokenizer beside "
            "it, or hand the file to merge_lora_weights_and_save_hf_model.py with --weight"
        )
    if not vision_tower:
        named = raw.get("mm_vision_tower") or raw.get("vision_tower")
        raise BuildError(
            f"{place} is {checkpoint.title}, which needs its vision tower beside it (its config names {named!r}): "
            "give the tower's folder with --vision-tower"
        )
    found = sort_published(place, checkpoint.tensors, lora_alpha)
    tower = stand_alone_tower(vision_tower)
    if found.tower:
        tower.tensors, tower.origin = found.tower, Origin(TOWER, place)
    tokenizer = load_tokenizer(folder)
    rows = _stored_rows(found, raw)
    per_scale = prepare_release_tokenizer(tokenizer, rows, options.tokens_per_scale, place)
    processor, config = _release_numerics(tokenizer, per_scale, raw, tower, options)
    vision_config, eye = resized(tower, config.image_size, config.position_resize)
    config.vision_config = vision_config
    if manner.to_train:
        _learn_fusion(config, options)
    origins = [tower.origin, Origin("", place, lambda name: name_in_pixellm(name) or name)]
    why = (
        "a number in the release's code, kept"
        if config.token_fusion == "constant"
        else "starts at the release's number"
    )
    may_lack = dict.fromkeys(RELEASE_CONSTANTS, why)
    built = _finish(config, processor, {**found.model, **eye}, origins, may_lack, manner, rows)
    merged = f", LoRA of {found.lora_layers} layers merged with alpha {lora_alpha:g}" if found.lora_layers else ""
    built.report.layout = f"{checkpoint.title}{merged}; release numerics"
    built.report.ignored |= {**found.ignored, **tower.ignored}
    built.published = PublishedRest({n: t.read().clone() for n, t in found.unused.items()}, small_files(folder))
    return built


def _stored_rows(found: PublishedTensors, raw: Mapping[str, Any]) -> int:
    """Rows of the embedding table, which must be as many as the config says; filling compares them."""
    table = found.model.get(TABLE)
    return int(raw.get("vocab_size") or (table.shape[0] if table is not None else 0))


def _release_numerics(
    tokenizer: Any, per_scale: int, raw: Mapping[str, Any], tower: Part, options: ModelOptions
) -> tuple[PixelLMProcessor, PixelLMConfig]:
    """Processor and config with which a published PixelLM gives its published numbers; BuildError where options differ
    in what its weights fix."""
    dims = {name: value for name, value in tower.config.to_dict().items() if name != "model_type"}
    ids = [tokenizer.convert_tokens_to_ids(f"[SEG{number}]") for number in range(2 * per_scale)]
    image_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    release = config_from_release(raw, dims, seg_token_ids=ids, image_token_id=image_id)
    chosen = options.chosen(PixelLMConfig)
    for name in ("num_scales", "embedding_dim", "decoder_depth", "decoder_num_heads", "decoder_mlp_dim"):
        if name in chosen and chosen[name] != getattr(release, name):
            raise BuildError(
                f"{name} is asked to be {chosen[name]}, but a published PixelLM has {getattr(release, name)}: "
                "leave it out"
            )
    config = config_from_release(raw, dims, seg_token_ids=ids, image_token_id=image_id, **chosen)
    settings = {
        "image_mean": RELEASE_IMAGE_MEAN,
        "image_std": RELEASE_IMAGE_STD,
        "pad_before_normalize": False,
        **options.chosen(PixelLMProcessor),
    }
    shared = ("image_size", "patch_size", "image_token_pool", "num_scales", "tokens_per_scale")
    settings |= {name: getattr(config, name) for name in shared}
    return PixelLMProcessor(tokenizer, **settings), config


# --- a new PixelLM ------------------------------------------------------------------------------------------------


def _from_llava(checkpoint: Checkpoint, vision_tower: str | None, options: ModelOptions, manner: _Manner) -> BuiltModel:
    folder = checkpoint.folder
    tensors, layers = merged_lora(str(folder), checkpoint.tensors, lora_alpha_in(folder))
    made = llava(replace(checkpoint, tensors=tensors))
    tower, not_taken = tower_of(made, vision_tower, folder, checkpoint.title)
    may_lack = dict.fromkeys(MASK_PARTS, _NEW)
    if not made.projector:
        may_lack["projector"] = f"new: {made.why_new}"
    built = _assembled(folder, made.language, tower, made.projector, may_lack, options, manner)
    built.report.layout = f"{checkpoint.title}, LoRA of {layers} layers merged" if layers else checkpoint.title
    if made.projector:
        built.report.fresh["projector.hidden_units"] = _WIDER
    if not_taken:
        built.report.ignored["--vision-tower"] = not_taken
    return built


def _from_language_model(
    checkpoint: Checkpoint, vision_tower: str | None, options: ModelOptions, manner: _Manner
) -> BuiltModel:
    folder = checkpoint.folder
    try:
        config = read_config(folder, "--version")
    except BuildError as error:
        if checkpoint.tensors:
            raise BuildError(f"{error}; {describe_unknown(checkpoint.tensors)}") from error
        raise
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        near = f"; {describe_unknown(checkpoint.tensors)}" if checkpoint.tensors else ""
        raise BuildError(f"--version {folder} is of type {config.model_type!r}: expected a language model{near}")
    if not vision_tower:
        raise BuildError(
            f"{folder} is a plain language model ({config.model_type}): --vision-tower is needed beside it"
        )
    tower = stand_alone_tower(vision_tower)
    if config.model_type not in KNOWN_LANGUAGE_MODELS:
        return _around_unknown(folder, config, tower, options, manner)
    if not checkpoint.tensors:
        stored_in(folder)
    language = plain_language_model(checkpoint, config)
    built = _assembled(folder, language, tower, {}, dict.fromkeys(NEW_PARTS, _NEW), options, manner)
    built.report.layout = f"{checkpoint.title} ({config.model_type})"
    return built


def _assembled(
    folder: Path,
    language: Part,
    tower: Part,
    projector: Stored,
    may_lack: Mapping[str, str],
    options: ModelOptions,
    manner: _Manner,
) -> BuiltModel:
    """A new PixelLM over a language model and a tower."""
    vision_config, eye = resized(tower, options.image_size or tower.config.image_size, "standard")
    tokenizer = load_tokenizer(folder)
    rows = language.config.vocab_size
    if len(tokenizer) > rows:
        name = language.origin.theirs(TABLE)
        raise BuildError(
            f"{language.origin.place}: tensor {name!r} has {rows} rows, but the tokenizer beside it {len(tokenizer)} "
            "tokens: they are not of one model, copy both from one place"
        )
    processor, fields = _new_processor(tokenizer, vision_config, options)
    language.config.vocab_size = max(rows, len(tokenizer))
    config = PixelLMConfig(text_config=language.config, vision_config=vision_config, **fields)
    tensors = {**language.tensors, **eye, **projector}
    origins = [language.origin, tower.origin, Origin("", str(folder))]
    built = _finish(config, processor, tensors, origins, may_lack, manner, rows)
    built.report.ignored |= {**language.ignored, **tower.ignored}
    return built


def _new_processor(
    tokenizer: Any, vision_config: PretrainedConfig, options: ModelOptions
) -> tuple[PixelLMProcessor, dict[str, Any]]:
    """The processor of a new PixelLM, and the fields of its config beside those of its parts."""
    chosen = {**_default_counts(), **options.chosen(PixelLMConfig)}
    chosen.update(image_size=vision_config.image_size, **_grid_defaults(options, vision_config, chosen["num_scales"]))
    num_scales, tokens_per_scale = chosen["num_scales"], chosen["tokens_per_scale"]
    PixelLMProcessor.prepare_tokenizer(tokenizer, num_scales, tokens_per_scale)
    processor = PixelLMProcessor(
        tokenizer,
        **{
            **options.chosen(PixelLMProcessor),
            "image_size": vision_config.image_size,
            "patch_size": vision_config.patch_size,
            "image_token_pool": chosen["image_token_pool"],
            "num_scales": num_scales,
            "tokens_per_scale": tokens_per_scale,
        },
    )
    return processor, {**chosen, **_token_ids(processor)}


def _around_unknown(
    folder: Path, text: PretrainedConfig, tower: Part, options: ModelOptions, manner: _Manner
) -> BuiltModel:
    """A new PixelLM over a language model of a kind that we only know through transformers, once it is probed."""
    vision_config, eye = resized(tower, options.image_size or tower.config.image_size, "standard")
    language_model, unused = load_whole(
        AutoModelForCausalLM,
        folder,
        "--version",
        text,
        dtype="auto" if manner.dtype is None else manner.dtype,
        attn_implementation=manner.attn_implementation,
    )
    processor, fields = _new_processor(load_tokenizer(folder), vision_config, options)
    config = PixelLMConfig(text_config=language_model.config, vision_config=vision_config, **fields)
    config._attn_implementation = manner.attn_implementation
    model = PixelLMForCausalLM(config, language_model=language_model)
    probe_language_model(model)
    load_weights_into(
        model.vision_tower.model,
        {name.removeprefix(TOWER): stored.read() for name, stored in eye.items()},
        tower.origin.place,
    )
    report = LoadReport(layout=f"a language model of another kind ({text.model_type}), its logits compared")
    report.ignored = {**dict.fromkeys(unused, f"in {folder}, not part of its language model"), **tower.ignored}
    for name in model.state_dict():
        if name.startswith((LANGUAGE, TOWER)):
            report.loaded.append(name)
        else:
            report.fresh[name] = _NEW
    if len(processor.tokenizer) > model.get_input_embeddings().num_embeddings:
        with quiet_transformers():
            model.language_model.resize_token_embeddings(len(processor.tokenizer))
        model.config.text_config = model.language_model.config
        report.fresh["language_model.embeddings"] = _NEW_ROWS
    return BuiltModel(model.to(manner.dtype) if manner.dtype else model, processor, report)


def _default_counts() -> dict[str, int]:
    """How many scales, and tokens per scale, a PixelLM has unless told otherwise."""
    parameters = inspect.signature(PixelLMConfig).parameters
    return {name: parameters[name].default for name in ("num_scales", "tokens_per_scale")}


def _grid_defaults(options: ModelOptions, vision_config: PretrainedConfig, num_scales: int) -> dict[str, Any]:
    """Pool and layers that fit a tower: the release's where they can be, else the nearest that can."""
    grid = vision_config.image_size // vision_config.patch_size
    pool = options.image_token_pool or (2 if grid % 2 == 0 else 1)
    layers = options.vision_feature_layers
    if layers is None:
        depth = vision_config.num_hidden_layers
        last, step = -2, 9  # the release reads hidden states -2 and -11 of 24 layers
        layers = [max(last - scale * step, -depth) for scale in range(num_scales)]
    return {"image_token_pool": pool, "vision_feature_layers": layers}


@torch.no_grad()
def probe_language_model(model: PixelLMForCausalLM) -> None:
    """Refuse a language model whose logits are more than its head on its final states (soft caps, scales and the like).

    Raises:
        BuildError: our logits differ from the model's own, or it cannot be asked as we ask.
    """
    kind = model.config.text_config.model_type
    if kind in KNOWN_LANGUAGE_MODELS:
        return
    supported = (
        f"supported are {', '.join(KNOWN_LANGUAGE_MODELS)} and any whose logits are its head on its final states"
    )
    try:
        difference = _probe_difference(model)
    except Exception as error:  # a model of an unknown kind may fail in any way
        raise BuildError(
            f"language models of type {kind!r} are not supported ({first_sentence(error)}): {supported}"
        ) from error
    tolerance = max(PROBE_TOLERANCE, PROBE_ROUNDINGS * torch.finfo(model.language_model.dtype).eps)
    if not difference <= tolerance * PROBE_LOGIT:
        raise BuildError(
            f"language models of type {kind!r} are not supported: our logits differ from the model's own by "
            f"{difference:.3g} where they are up to {PROBE_LOGIT:.0f}: {supported}"
        )


def _probe_difference(model: PixelLMForCausalLM) -> float:
    """How far our logits are from the language model's own, made PROBE_LOGIT large at most.

    The probe is two conversations about one picture, which we compute together and the language model apart.
    """
    head = model.get_output_embeddings()
    first = torch.arange(min(PROBE_TOKENS, model.config.text_config.vocab_size))
    second = first.clone()
    second[len(first) // 2 :] = first[len(first) // 2 :].flip(0)
    ids = torch.stack([first, second])
    rows = ExpandedRows(ids, model.get_input_embeddings()(ids), torch.ones_like(ids).bool(), None)
    states = model.hidden_states(rows, image_index=torch.zeros(2, dtype=torch.long))
    gain = PROBE_LOGIT / head(states).abs().max()
    louder = head.register_forward_hook(lambda _module, _inputs, logits: logits * gain)
    try:
        return (head(states).float() - model.language_model(ids).logits.float()).abs().max().item()
    finally:
        louder.remove()


# --- what trains --------------------------------------------------------------------------------------------------


@dataclass
class TrainingRecipe:
    """What trains. The defaults are the paper's recipe: LoRA on a frozen language model plus everything around it.

    lora_target_modules: comma-separated names of linear layers of the language model, or "all-linear".
    """

    lora_r: int = 8
    lora_alpha: int = 16
    lora_dropout: float = 0.05
    lora_target_modules: str = "q_proj,v_proj"
    train_mask_decoder: bool = True
    train_vision_tower: bool = False
    train_language_model: bool = False


def choose_trainable(model: PixelLMForCausalLM, recipe: TrainingRecipe) -> list[str]:
    """Inject LoRA and set what requires gradients.

    Returns:
        Names of the parameters that train.
    """
    model.requires_grad_(False)
    if recipe.train_language_model:
        model.language_model.requires_grad_(True)
    elif recipe.lora_r > 0:
        inject_lora(model, recipe)
    parts = [model.projector, model.get_input_embeddings(), model.get_output_embeddings()]
    without_loss: list[nn.Module] = []
    if recipe.train_mask_decoder:
        parts += model.mask_parts()
        without_loss += model.pixel_decoder.parts_without_loss()
    if recipe.train_vision_tower:
        parts.append(model.vision_tower)
        without_loss += model.vision_tower.parts_without_loss()
    for part in parts:
        part.requires_grad_(True)
    for part in without_loss:
        part.requires_grad_(False)
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def inject_lora(model: PixelLMForCausalLM, recipe: TrainingRecipe) -> None:
    """Put LoRA into the language model in place; parameter names gain no wrapper prefix."""
    linear = {
        name for name, module in model.language_model.get_decoder().named_modules() if isinstance(module, nn.Linear)
    }
    leaves = {name.split(".")[-1] for name in linear}
    wanted = [name.strip() for name in recipe.lora_target_modules.split(",") if name.strip()]
    if wanted == ["all-linear"]:
        wanted = sorted(leaves)
    unknown = [name for name in wanted if name not in leaves]
    if unknown or not wanted:
        raise BuildError(
            f"--lora_target_modules names {', '.join(unknown) or 'nothing'}: expected some of "
            f"{', '.join(sorted(leaves))}, or all-linear"
        )
    lora = LoraConfig(
        r=recipe.lora_r, lora_alpha=recipe.lora_alpha, lora_dropout=recipe.lora_dropout, target_modules=wanted
    )
    inject_adapter_in_model(lora, model.language_model.get_decoder())


def merge_lora(model: nn.Module) -> int:
    """Add every adapter to the weight it belongs to and take it out. A second call finds nothing to do.

    Returns:
        How many layers were merged.
    """
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)]
    for name, layer in layers:
        layer.merge()
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, layer.get_base_layer())
    return len(layers)


def save_model(
    model: PixelLMForCausalLM,
    processor: PixelLMProcessor,
    folder: str | Path,
    max_shard_size: str = "5GB",
    left_out: tuple[str, ...] = (),
    published: PublishedRest | None = None,
) -> None:
    """One Hugging Face folder: safetensors, config, processor, and the code that both need.

    Args:
        published: what a published PixelLM held beside, kept with the model.
        left_out: parts whose weights are not written, such as `MASK_PARTS` of a base that only ever learned words: they
            are new when it is trained on.
    """
    weights = model.state_dict()
    kept = {name: value for name, value in weights.items() if name.split(".")[0] not in left_out}
    # Names as in the model; by itself transformers writes some kinds under the names of their first release.
    model.save_pretrained(
        folder,
        state_dict=kept if left_out else None,
        max_shard_size=max_shard_size,
        save_original_format=False,
    )
    processor.save_pretrained(folder)
    if published is not None:
        published.save(Path(folder))
