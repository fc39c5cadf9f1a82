"""A published PixelLM, or what its training left, as a model of ours with the release's numerics."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from model.configuration_pixellm import PixelLMConfig
from model.processing_pixellm import IMAGE_TOKEN, RELEASE_RULES, PixelLMProcessor, check_groups
from utils.checkpoints.bases import TOWER, Part, resized, stand_alone_tower
from utils.checkpoints.folders import BuildError, first_sentence, load_tokenizer, local_folder
from utils.checkpoints.layouts import (
    PUBLISHED_PIXELLM,
    Checkpoint,
    layout_of,
    read_json_config,
    refuse_relatives,
    unwrapped,
)
from utils.checkpoints.options import BuiltModel, Manner, ModelOptions, finish, learn_fusion
from utils.checkpoints.published import (
    TABLE,
    PublishedRest,
    PublishedTensors,
    prepare_release_tokenizer,
    small_files,
    sort_published,
)
from utils.checkpoints.released_checkpoints import (
    RELEASE_CONSTANTS,
    RELEASE_IMAGE_MEAN,
    RELEASE_IMAGE_STD,
    config_from_release,
    name_in_pixellm,
)
from utils.checkpoints.tensor_files import stored_in
from utils.checkpoints.weight_loading import Origin


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
    manner = Manner(dtype, "sdpa", True, False)
    try:
        built = released(checkpoint, f"--weight {weight}", vision_tower, options or ModelOptions(), manner, lora_alpha)
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


def released(
    checkpoint: Checkpoint,
    place: str,
    vision_tower: str | None,
    options: ModelOptions,
    manner: Manner,
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
        learn_fusion(config, options)
    origins = [tower.origin, Origin("", place, lambda name: name_in_pixellm(name) or name)]
    why = (
        "a number in the release's code, kept"
        if config.token_fusion == "constant"
        else "starts at the release's number"
    )
    may_lack = dict.fromkeys(RELEASE_CONSTANTS, why)
    built = finish(config, processor, {**found.model, **eye}, origins, may_lack, manner, rows)
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
        "text_rules": RELEASE_RULES,
        **options.chosen(PixelLMProcessor),
    }
    shared = ("image_size", "patch_size", "image_token_pool", "num_scales", "tokens_per_scale")
    settings |= {name: getattr(config, name) for name in shared}
    return PixelLMProcessor(tokenizer, **settings), config
