"""Base + options -> a PixelLM ready to train: what is loaded, what is new, what trains, and LoRA in and out again."""

import inspect
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedModel

from ..configuration_pixellm import PixelLMConfig
from ..modeling_pixellm import PixelLMForCausalLM
from ..processing_pixellm import PixelLMProcessor, check_groups
from ..vision_tower import SUPPORTED_TOWERS, resize_position_table

# Language models whose states and head we know to be all there is between tokens and logits; others are probed.
KNOWN_LANGUAGE_MODELS = ("llama", "mistral", "qwen2", "qwen3")
# What only masks need; a base that only ever learned words lacks it.
MASK_PARTS = ("mask_projector", "codebook", "pixel_decoder")
POSITION_TABLE = "embeddings.position_embedding.weight"
PROBE_TOLERANCE = 1e-3


class BuildError(ValueError):
    """A model cannot be built as asked; the message is one sentence for the user."""

    user_message = True


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
    folder = _local_folder(version, "--version")
    config = _read_config(folder, "--version")
    try:
        if config.model_type == PixelLMConfig.model_type:
            built = _continue_pixellm(folder, config, options, attn_implementation, load_weights)
        else:
            built = _new_pixellm(folder, config, vision_tower, options, attn_implementation)
    except BuildError:
        raise
    except (ValueError, KeyError, ImportError) as error:
        raise BuildError(f"cannot build a PixelLM from {folder}: {' '.join(str(error).split())}") from error
    check_groups(built.processor)
    built.model.to(dtype).eval()
    return built


def _local_folder(path: str, flag: str) -> Path:
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise BuildError(
            f"{flag} {path!r} is not a folder on this machine, and no hub is reached from here: download the model "
            "and give its folder"
        )
    return folder


def _read_config(folder: Path, flag: str) -> PretrainedConfig:
    if not (folder / "config.json").is_file():
        raise BuildError(
            f"{flag} {folder} holds no config.json: expected the folder of a model in transformers' layout"
        )
    try:
        return AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BuildError(
            f"{folder / 'config.json'} is not a config this program can use: {' '.join(str(error).split())}"
        ) from error


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder of safetensors, whole or sharded."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    else:
        names = ["model.safetensors"]
    weights: dict[str, torch.Tensor] = {}
    for name in names:
        path = folder / name
        if not path.is_file():
            raise BuildError(
                f"{path} is missing: the folder must hold all safetensors files that its config or index names"
            )
        try:
            weights.update(load_file(path))
        except Exception as error:  # safetensors raises its own class without a common base
            raise BuildError(f"{path} is not a whole safetensors file: {' '.join(str(error).split())}") from error
    return weights


# --- a PixelLM that goes on ---------------------------------------------------------------------------------------


def _continue_pixellm(
    folder: Path, saved: PixelLMConfig, options: ModelOptions, attn_implementation: str, load_weights: bool
) -> BuiltModel:
    processor = _changed_processor(PixelLMProcessor.from_pretrained(folder), options)
    config = _changed_config(saved, processor, options)
    config._attn_implementation = attn_implementation
    model = PixelLMForCausalLM(config)
    _fit_vocabulary(model, processor)
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
    return BuiltModel(model, processor, report)


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
    for names, problem in (
        (shapes, "has another shape than this model"),
        (missing, "is missing"),
        (unexpected, "is not part of this model"),
        (broken, "holds values that are not finite"),
    ):
        if names:
            detail = ""
            if names is shapes:
                detail = f" (found {list(weights[names[0]].shape)}, expected {list(own[names[0]].shape)})"
            more = f", and {len(names) - 1} more" if len(names) > 1 else ""
            raise BuildError(
                f"{source}: tensor {names[0]!r} {problem}{detail}{more}: the checkpoint and the flags that shape the "
                "model do not match"
            )
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
    attn_implementation: str,
) -> BuiltModel:
    if not vision_tower:
        raise BuildError(
            f"{folder} is a plain language model ({text_config.model_type}): --vision-tower is needed beside it"
        )
    tower_folder = _local_folder(vision_tower, "--vision-tower")
    language_model = AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation=attn_implementation, local_files_only=True
    )
    probe_language_model(language_model)
    vision_model = load_vision_model(tower_folder, options.image_size, attn_implementation)
    vision_config = vision_model.config
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    defaults = PixelLMConfig(
        text_config=text_config,
        vision_config=vision_config,
        image_size=vision_config.image_size,
        **_grid_defaults(options, vision_config),
    )
    chosen = {
        **options.chosen(PixelLMConfig),
        "image_size": vision_config.image_size,
        **_grid_defaults(options, vision_config),
    }
    num_scales = chosen.get("num_scales", defaults.num_scales)
    tokens_per_scale = chosen.get("tokens_per_scale", defaults.tokens_per_scale)
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
    report = LoadReport()
    for name in model.state_dict():
        if name.startswith(("language_model.", "vision_tower.")):
            report.loaded.append(name)
        else:
            report.fresh[name] = "new in a PixelLM, initialised"
    if _fit_vocabulary(model, processor):
        report.fresh["language_model.embeddings"] = "rows of the added tokens start at the mean of the others"
    return BuiltModel(model, processor, report)


def _grid_defaults(options: ModelOptions, vision_config: PretrainedConfig) -> dict[str, Any]:
    """Pool and layers that fit a tower: the release's where they can be, else the nearest that can."""
    grid = vision_config.image_size // vision_config.patch_size
    pool = options.image_token_pool or (2 if grid % 2 == 0 else 1)
    layers = options.vision_feature_layers
    if layers is None:
        depth, scales = vision_config.num_hidden_layers, options.num_scales or 2
        last, step = -2, 9  # the release reads hidden states -2 and -11 of 24 layers
        layers = [max(last - scale * step, -depth) for scale in range(scales)]
    return {"image_token_pool": pool, "vision_feature_layers": layers}


def load_vision_model(folder: Path, image_size: int | None, attn_implementation: str) -> PreTrainedModel:
    """A CLIP or SigLIP tower from its folder, its position table brought to pictures of `image_size`."""
    config = _read_config(folder, "--vision-tower")
    config = getattr(config, "vision_config", config)
    if config.model_type not in SUPPORTED_TOWERS:
        raise BuildError(
            f"--vision-tower {folder} is of type {config.model_type!r}: expected one of {', '.join(SUPPORTED_TOWERS)}"
        )
    implementation = "eager" if attn_implementation == "eager" else "sdpa"
    native, loading = AutoModel.from_pretrained(
        folder, config=config, attn_implementation=implementation, local_files_only=True, output_loading_info=True
    )
    if loading["missing_keys"]:
        raise BuildError(f"--vision-tower {folder}: tensor {sorted(loading['missing_keys'])[0]!r} is missing")
    if image_size is None or image_size == config.image_size:
        return native
    enlarged_config = type(config).from_dict({**config.to_dict(), "image_size": image_size})
    enlarged = AutoModel.from_config(enlarged_config, attn_implementation=implementation)
    weights = native.state_dict()
    class_tokens = int(hasattr(native.embeddings, "class_embedding"))
    weights[POSITION_TABLE] = resize_position_table(
        weights[POSITION_TABLE], image_size // config.patch_size, class_tokens, method="standard"
    )
    enlarged.load_state_dict(weights)
    return enlarged


@torch.no_grad()
def probe_language_model(language_model: PreTrainedModel) -> None:
    """Refuse a language model whose logits are more than its head on its final states (soft caps, scales and the like).

    Raises:
        BuildError: our logits differ from the model's own.
    """
    config = language_model.config
    if config.model_type in KNOWN_LANGUAGE_MODELS:
        return
    ids = torch.arange(1, min(9, config.vocab_size))[None]
    embeddings = language_model.get_input_embeddings()(ids)
    states = language_model.get_decoder()(
        inputs_embeds=embeddings, attention_mask=torch.ones_like(ids)
    ).last_hidden_state
    ours = language_model.get_output_embeddings()(states).float()
    own = language_model(ids).logits.float()
    difference = (ours - own).abs().max().item()
    if not difference <= PROBE_TOLERANCE * max(1.0, own.abs().max().item()):
        raise BuildError(
            f"language models of type {config.model_type!r} are not supported: our logits differ from the model's own "
            f"by {difference:.3g}; "
            f"supported are {', '.join(KNOWN_LANGUAGE_MODELS)} and any whose logits are its head on its final states"
        )


def _fit_vocabulary(model: PixelLMForCausalLM, processor: PixelLMProcessor) -> bool:
    """Give every token of the tokenizer a row; some models have more rows than tokens already."""
    if len(processor.tokenizer) <= model.get_input_embeddings().num_embeddings:
        return False
    model.language_model.resize_token_embeddings(len(processor.tokenizer))
    model.config.text_config = model.language_model.config
    return True


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
) -> None:
    """One Hugging Face folder: safetensors, config, processor, and the code that both need.

    Args:
        left_out: parts whose weights are not written, such as `MASK_PARTS` of a base that only ever learned words: they
            are new when it is trained on.
    """
    weights = model.state_dict()
    kept = {name: value for name, value in weights.items() if name.split(".")[0] not in left_out}
    model.save_pretrained(folder, state_dict=kept if left_out else None, max_shard_size=max_shard_size)
    processor.save_pretrained(folder)
