"""Base + options -> a PixelLM ready to train: what is loaded, what is new, what trains, and LoRA in and out again."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers.utils import is_flash_attn_2_available

from model.configuration_pixellm import PixelLMConfig
from model.modeling_pixellm import PixelLMForCausalLM
from model.onednn_linear import use_onednn
from model.processing_pixellm import PixelLMProcessor, check_groups, required_vocab_size
from model.structures import FLASH_ATTENTION, LORA_ALPHA, LORA_DROPOUT, LORA_RANK, LORA_TARGET_MODULES, SDPA
from model.vision_tower import resize_position_table
from utils.checkpoints.bases import LANGUAGE, POSITION_TABLE, TOWER, llava
from utils.checkpoints.folders import BuildError, first_sentence, local_folder, read_config
from utils.checkpoints.from_bases import from_language_model, from_llava
from utils.checkpoints.from_released import build_training_state, is_released_training_state, released
from utils.checkpoints.layouts import LLAVAS, OURS, PUBLISHED_PIXELLM, recognise
from utils.checkpoints.load_report import LoadReport
from utils.checkpoints.options import MASK_PARTS, BuiltModel, Manner, ModelOptions, finish, learn_fusion, token_ids
from utils.checkpoints.published import PublishedRest, lora_alpha_in, merged_lora, sort_published
from utils.checkpoints.tensor_files import Stored, StoredTensor, stored_in
from utils.checkpoints.trainable_token_rows import train_rows_from
from utils.checkpoints.weight_loading import MISMATCH, Origin, Settle, load_weights_into

# What scripts and tests ask of this package comes from here.
__all__ = [
    "MASK_PARTS",
    "BuildError",
    "BuiltModel",
    "LoadReport",
    "ModelOptions",
    "Settle",
    "TrainingRecipe",
    "build_model",
    "build_training_state",
    "choose_trainable",
    "inject_lora",
    "is_released_training_state",
    "load_weights_into",
    "merge_lora",
    "save_model",
]


def build_model(
    version: str,
    vision_tower: str | None = None,
    options: ModelOptions | None = None,
    *,
    dtype: torch.dtype | None = torch.float32,
    attn_implementation: str = SDPA,
    load_weights: bool = True,
    to_train: bool = False,
    settle: Settle | None = None,
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
        settle: called with every parameter as soon as it has its numbers: to keep only a rank's part of them, say, so
            that no process ever holds all.

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
    manner = Manner(dtype, attn_implementation, load_weights, to_train, settle)
    try:
        built = _build(folder, vision_tower, options, manner)
    except BuildError:
        raise
    except (ValueError, KeyError, ImportError) as error:
        raise BuildError(f"cannot build a PixelLM from {folder}: {first_sentence(error)}") from error
    check_groups(built.processor)
    built.model.eval()
    return built


def _build(folder: Path, vision_tower: str | None, options: ModelOptions, manner: Manner) -> BuiltModel:
    checkpoint = recognise(folder)
    if checkpoint.layout is OURS:
        config = read_config(folder, "--version")
        built = _continue_pixellm(folder, config, options, manner)
        if vision_tower:
            built.report.ignored["--vision-tower"] = f"{folder} is a PixelLM, which has its own"
        return built
    if checkpoint.layout is PUBLISHED_PIXELLM:
        return released(checkpoint, f"--version {folder}", vision_tower, options, manner, lora_alpha_in(folder))
    if checkpoint.layout in LLAVAS:
        return from_llava(checkpoint, vision_tower, options, manner)
    return from_language_model(checkpoint, vision_tower, options, manner)


def language_tensors(folder: Path) -> Stored:
    """The language model's tensors in a folder that `build_model` takes, by their names in our model.

    Raises:
        BuildError: the folder holds no weights, or is of a model that this program does not run.
    """
    checkpoint = recognise(folder)
    if checkpoint.layout is OURS:
        return stored_in(folder)
    if checkpoint.layout is PUBLISHED_PIXELLM:
        return sort_published(str(folder), checkpoint.tensors, lora_alpha_in(folder)).model
    tensors, _ = merged_lora(str(folder), checkpoint.tensors, lora_alpha_in(folder))
    if checkpoint.layout in LLAVAS:
        return llava(replace(checkpoint, tensors=tensors)).language.tensors
    return {f"{LANGUAGE}{name}": stored for name, stored in tensors.items()}


# --- a PixelLM that goes on ---------------------------------------------------------------------------------------


def _continue_pixellm(folder: Path, saved: PixelLMConfig, options: ModelOptions, manner: Manner) -> BuiltModel:
    processor = _changed_processor(_saved_processor(folder, saved), options)
    rows = saved.text_config.vocab_size
    config = _changed_config(saved, processor, options)
    config.text_config.vocab_size = max(rows, required_vocab_size(processor.tokenizer))
    if manner.to_train:
        learn_fusion(config, options)
    tensors = stored_in(folder) if manner.load_weights else {}
    if POSITION_TABLE in tensors:
        tensors[POSITION_TABLE] = _on_the_grid(tensors, config)
    may_lack = {
        part: f"not in {folder}, initialised"
        for part in MASK_PARTS
        if not any(name.startswith(f"{part}.") for name in tensors)
    }
    built = finish(config, processor, tensors, [Origin("", str(folder), advice=MISMATCH)], may_lack, manner, rows)
    built.published = PublishedRest.load(folder)
    built.report.layout = OURS.title
    return built


def _on_the_grid(tensors: Stored, config: PixelLMConfig) -> StoredTensor:
    """The tower's stored position table, brought to the config's grid."""
    table = tensors[POSITION_TABLE]
    class_tokens = int(f"{TOWER}embeddings.class_embedding" in tensors)
    grid, method = config.grid_size, config.position_resize
    return table.made(
        (class_tokens + grid**2, *table.shape[1:]),
        lambda value: resize_position_table(value, grid, class_tokens, method),
    )


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
    fields.update(token_ids(processor))
    return PixelLMConfig(**fields)


# --- what trains --------------------------------------------------------------------------------------------------


@dataclass
class TrainingRecipe:
    """What trains. The defaults are the paper's recipe: LoRA on a frozen language model plus everything around it.

    lora_target_modules: comma-separated names of linear layers of the language model, or "all-linear".
    train_mask_neck: whether what stands between the decoder's feature maps and its transformers trains, the neck and
        the no-mask embedding. False is the release, which left them at their random start (golden fact M10).
    train_new_tokens_only: of the embedding table and lm_head only the rows of seg tokens and those after them train.
    """

    lora_r: int = LORA_RANK
    lora_alpha: int = LORA_ALPHA
    lora_dropout: float = LORA_DROPOUT
    lora_target_modules: str = LORA_TARGET_MODULES
    train_projector: bool = True
    train_mask_decoder: bool = True
    train_mask_neck: bool = True
    train_vision_tower: bool = False
    train_language_model: bool = False
    train_new_tokens_only: bool = False


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
        if not recipe.train_mask_neck:
            kept_frozen += [model.pixel_decoder.neck, model.pixel_decoder.no_mask_embed]
    if recipe.train_vision_tower:
        parts.append(model.vision_tower)
        kept_frozen += model.vision_tower.parts_without_loss()
    for part in parts:
        part.requires_grad_(True)
    for part in kept_frozen:
        part.requires_grad_(False)
    if recipe.train_new_tokens_only:
        train_rows_from([model.get_input_embeddings(), model.get_output_embeddings()], min(model.config.seg_token_ids))
    use_onednn(model)
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
