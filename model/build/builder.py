"""Base + options -> a PixelLM ready to train: what is loaded, what is new, what trains, and LoRA in and out again."""

import inspect
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import is_flash_attn_2_available

from ..configuration_pixellm import PixelLMConfig
from ..modeling_pixellm import ExpandedRows, PixelLMForCausalLM
from ..processing_pixellm import PixelLMProcessor, check_groups
from ..vision_tower import SUPPORTED_TOWERS, resize_position_table
from .folders import (
    BuildError,
    first_sentence,
    load_tokenizer,
    load_whole,
    local_folder,
    quiet_transformers,
    read_config,
    read_weights,
)

# Language models whose states and head we know to be all there is between tokens and logits; others are probed.
KNOWN_LANGUAGE_MODELS = ("llama", "mistral", "qwen2", "qwen3")
# What only masks need; a base that only ever learned words lacks it.
MASK_PARTS = ("mask_projector", "codebook", "pixel_decoder")
POSITION_TABLE = "embeddings.position_embedding.weight"
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
    group_rule: str | None = None
    refinement_alpha: float | None = None
    ce_loss_weight: float | None = None
    bce_loss_weight: float | None = None
    dice_loss_weight: float | None = None
    conversation_format: str | None = None
    use_mm_start_end: bool | None = None
    model_max_length: int | None = None
    text_rules: str | None = None
    image_mean: list[float] | None = None
    image_std: list[float] | None = None
    pad_before_normalize: bool | None = None

    def chosen(self, owner: type) -> dict[str, Any]:
        """The options that were set and that `owner`'s constructor takes."""
        names = set(inspect.signature(owner).parameters)
        return {name: value for name, value in asdict(self).items() if value is not None and name in names}


@dataclass
class LoadReport:
    """Where every weight came from: names loaded, names new and why, names ignored and why."""

    loaded: list[str] = field(default_factory=list)
    fresh: dict[str, str] = field(default_factory=dict)
    ignored: dict[str, str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """For the run card: counts of what was loaded, and groups of the rest."""
        return {"loaded": len(self.loaded), "fresh": _by_part(self.fresh), "ignored": _by_part(self.ignored)}

    def table(self) -> str:
        """Lines for a person."""
        lines = [f"loaded   {len(self.loaded)} tensors"]
        for title, groups in (("new", _by_part(self.fresh)), ("ignored", _by_part(self.ignored))):
            lines += [f"{title:<8} {name}: {reason}" for name, reason in groups.items()]
        return "\n".join(lines)


def _by_part(reasons: dict[str, str]) -> dict[str, str]:
    """Tensor names with a reason, gathered under the part they belong to."""
    groups: dict[tuple[str, str], int] = {}
    for name, reason in reasons.items():
        part = name.split(".")[0]
        groups[part, reason] = groups.get((part, reason), 0) + 1
    return {f"{part} ({count})": reason for (part, reason), count in groups.items()}


@dataclass
class BuiltModel:
    """A model in evaluation mode, the processor that belongs to it, and where the weights came from."""

    model: PixelLMForCausalLM
    processor: PixelLMProcessor
    report: LoadReport


def build_model(
    version: str,
    vision_tower: str | None = None,
    options: ModelOptions | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    attn_implementation: str = "sdpa",
    load_weights: bool = True,
) -> BuiltModel:
    """Build from local folders.

    Args:
        version: a PixelLM folder that we saved (to train on, or to enlarge), or a plain language model's folder.
        vision_tower: a CLIP or SigLIP folder; needed beside a plain language model, and not with a PixelLM.
        load_weights: False leaves the PixelLM's weights as initialised, for callers that load all of them themselves.

    Raises:
        BuildError: a folder is missing or is not what is expected, tensors do not fit, or parts do not work together.
    """
    options = options or ModelOptions()
    folder = local_folder(version, "--version")
    config = read_config(folder, "--version")
    if attn_implementation == FLASH_ATTENTION and not is_flash_attn_2_available():
        raise BuildError(
            f"--attn_implementation {FLASH_ATTENTION} needs the package flash-attn and a CUDA GPU, which are not here: "
            "install it, or choose sdpa"
        )
    try:
        if config.model_type == PixelLMConfig.model_type:
            built = _continue_pixellm(folder, config, options, attn_implementation, load_weights)
            if vision_tower:
                built.report.ignored["--vision-tower"] = f"{folder} is a PixelLM, which has its own"
        else:
            built = _new_pixellm(folder, config, vision_tower, options, dtype, attn_implementation)
    except BuildError:
        raise
    except (ValueError, KeyError, ImportError) as error:
        raise BuildError(f"cannot build a PixelLM from {folder}: {first_sentence(error)}") from error
    check_groups(built.processor)
    built.model.to(dtype).eval()
    return built


# --- a PixelLM that goes on ---------------------------------------------------------------------------------------


def _continue_pixellm(
    folder: Path, saved: PixelLMConfig, options: ModelOptions, attn_implementation: str, load_weights: bool
) -> BuiltModel:
    processor = _changed_processor(_saved_processor(folder, saved), options)
    config = _changed_config(saved, processor, options)
    config._attn_implementation = attn_implementation
    model = PixelLMForCausalLM(config)
    report = LoadReport()
    if load_weights:
        weights = read_weights(folder)
        table = f"vision_tower.model.{POSITION_TABLE}"
        if table in weights:
            tower = model.vision_tower
            weights[table] = resize_position_table(
                weights[table], tower.grid_size, tower.num_class_tokens, config.position_resize
            )
        report = load_weights_into(model, weights, str(folder), new_parts=_new_parts(weights))
    _fit_vocabulary(model, processor, report)
    return BuiltModel(model, processor, report)


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


def _new_parts(weights: dict[str, torch.Tensor]) -> tuple[str, ...]:
    """Parts that a folder may lack altogether: a base that only ever learned words has no mask parts."""
    present = {name.split(".")[0] for name in weights}
    return tuple(part for part in MASK_PARTS if part not in present)


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
    new_parts = tuple(new_parts)
    missing = [
        name for name in own if name not in weights and not name.startswith(tuple(f"{part}." for part in new_parts))
    ]
    tied = {name for name in missing if _is_tied(model, name, weights)}
    missing = [name for name in missing if name not in tied]
    unexpected = [name for name in weights if name not in own]
    shapes = [name for name, value in weights.items() if name in own and own[name].shape != value.shape]
    broken = [
        name for name, value in weights.items() if value.is_floating_point() and not bool(torch.isfinite(value).all())
    ]
    mismatch = "the checkpoint and the flags that shape the model do not match"
    for names, problem, advice in (
        (shapes, "has another shape than this model", mismatch),
        (missing, "is missing", mismatch),
        (unexpected, "is not part of this model", mismatch),
        (broken, "holds values that are not finite", "take a checkpoint from before that"),
    ):
        if names:
            detail = ""
            if names is shapes:
                detail = f" (found {list(weights[names[0]].shape)}, expected {list(own[names[0]].shape)})"
            more = f", and {len(names) - 1} more" if len(names) > 1 else ""
            raise BuildError(f"{source}: tensor {names[0]!r} {problem}{detail}{more}: {advice}")
    model.load_state_dict(weights, strict=False)
    report = LoadReport(loaded=list(weights))
    report.fresh = {name: f"not in {source}, initialised" for name in own if name not in weights and name not in tied}
    return report


def _is_tied(model: nn.Module, name: str, weights: dict[str, torch.Tensor]) -> bool:
    """Whether a tensor that a file leaves out is the same storage as one it holds."""
    own = model.state_dict()
    return any(other in weights and own[other].data_ptr() == own[name].data_ptr() for other in own if other != name)


# --- a new PixelLM ------------------------------------------------------------------------------------------------


def _new_pixellm(
    folder: Path,
    text_config: PretrainedConfig,
    vision_tower: str | None,
    options: ModelOptions,
    dtype: torch.dtype,
    attn_implementation: str,
) -> BuiltModel:
    if not vision_tower:
        raise BuildError(
            f"{folder} is a plain language model ({text_config.model_type}): --vision-tower is needed beside it"
        )
    if text_config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise BuildError(f"--version {folder} is of type {text_config.model_type!r}: expected a language model")
    tower_folder = local_folder(vision_tower, "--vision-tower")
    loading: dict[str, Any] = {"dtype": dtype, "attn_implementation": attn_implementation}
    language_model, unused = load_whole(AutoModelForCausalLM, folder, "--version", text_config, **loading)
    vision_model, unused_in_tower = load_vision_model(tower_folder, options.image_size, **loading)
    vision_config = vision_model.config
    tokenizer = load_tokenizer(folder)
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
    config = PixelLMConfig(
        text_config=language_model.config, vision_config=vision_config, **{**chosen, **_token_ids(processor)}
    )
    config._attn_implementation = attn_implementation
    model = PixelLMForCausalLM(config, language_model=language_model, vision_model=vision_model)
    probe_language_model(model)
    report = LoadReport(
        ignored={
            **dict.fromkeys(unused, f"in {folder}, not part of its language model"),
            **dict.fromkeys(unused_in_tower, f"in {tower_folder}, not part of its vision tower"),
        }
    )
    for name in model.state_dict():
        if name.startswith(("language_model.", "vision_tower.")):
            report.loaded.append(name)
        else:
            report.fresh[name] = "new in a PixelLM, initialised"
    _fit_vocabulary(model, processor, report)
    return BuiltModel(model, processor, report)


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


def load_vision_model(
    folder: Path, image_size: int | None, dtype: torch.dtype, attn_implementation: str
) -> tuple[PreTrainedModel, list[str]]:
    """A CLIP or SigLIP tower from its folder, its position table brought to pictures of `image_size`.

    Returns:
        The tower, and the names of tensors in the folder that are not part of it.
    """
    config = read_config(folder, "--vision-tower")
    config = getattr(config, "vision_config", config)
    if config.model_type not in SUPPORTED_TOWERS:
        raise BuildError(
            f"--vision-tower {folder} is of type {config.model_type!r}: expected one of {', '.join(SUPPORTED_TOWERS)}"
        )
    implementation = "eager" if attn_implementation == "eager" else "sdpa"
    native, unused = load_whole(AutoModel, folder, "--vision-tower", config, dtype, implementation)
    if image_size is None or image_size == config.image_size:
        return native, unused
    enlarged_config = type(config).from_dict({**config.to_dict(), "image_size": image_size})
    enlarged = AutoModel.from_config(enlarged_config, attn_implementation=implementation)
    weights = native.state_dict()
    class_tokens = int(hasattr(native.embeddings, "class_embedding"))
    weights[POSITION_TABLE] = resize_position_table(
        weights[POSITION_TABLE], image_size // config.patch_size, class_tokens, method="standard"
    )
    enlarged.load_state_dict(weights)
    return enlarged, unused


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


def _fit_vocabulary(model: PixelLMForCausalLM, processor: PixelLMProcessor, report: LoadReport) -> None:
    """Give every token of the tokenizer a row; some models have more rows than tokens already."""
    if len(processor.tokenizer) <= model.get_input_embeddings().num_embeddings:
        return
    with quiet_transformers():
        model.language_model.resize_token_embeddings(len(processor.tokenizer))
    model.config.text_config = model.language_model.config
    report.fresh["language_model.embeddings"] = "rows of the added tokens are drawn around the mean of the others"


# --- what trains --------------------------------------------------------------------------------------------------


@dataclass
class TrainingRecipe:
    """What trains. The defaults are the paper's recipe: LoRA on a frozen language model plus everything around it.

    lora_target_modules: comma-separated names of linear layers of the language model, or "all-linear".
    train_map_entry: whether what stands between the decoder's feature maps and its transformers trains, the neck and
        the no-mask embedding. False is the release, which left them at their random start (golden fact M10).
    """

    lora_r: int = 8
    lora_alpha: int = 16
    lora_dropout: float = 0.05
    lora_target_modules: str = "q_proj,v_proj"
    train_projector: bool = True
    train_mask_decoder: bool = True
    train_map_entry: bool = True
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
    parts = [model.get_input_embeddings(), model.get_output_embeddings()]
    if recipe.train_projector:
        parts.append(model.projector)
    kept_frozen: list[nn.Module] = []
    if recipe.train_mask_decoder:
        parts += model.mask_parts()
        kept_frozen += model.pixel_decoder.parts_without_loss()
        if not recipe.train_map_entry:
            kept_frozen += [model.pixel_decoder.neck, model.pixel_decoder.no_mask_embed]
    if recipe.train_vision_tower:
        parts.append(model.vision_tower)
        kept_frozen += model.vision_tower.parts_without_loss()
    for part in parts:
        part.requires_grad_(True)
    for part in kept_frozen:
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
) -> None:
    """One Hugging Face folder: safetensors, config, processor, and the code that both need.

    Args:
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
