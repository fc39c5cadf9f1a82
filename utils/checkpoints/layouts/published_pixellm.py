"""A published PixelLM, or what its training left, as a model of ours with the release's numerics."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.configuration_pixellm import PixelLMConfig
from model.processing_pixellm import IMAGE_TOKEN, RELEASE_RULES, PixelLMProcessor, required_vocab_size
from utils.checkpoints.folders import BuildError, load_tokenizer, local_folder, read_json
from utils.checkpoints.layouts.layout import LANGUAGE_MODEL_NAMES, TOKEN_TABLE, Checkpoint, Layout, ModelSource, Part
from utils.checkpoints.layouts.lora import merge_stored_lora, read_lora_alpha
from utils.checkpoints.layouts.names import has_names, rename_tensors, strip_peft_prefix
from utils.checkpoints.layouts.published_names import (
    RELEASE_CONSTANTS,
    RELEASE_IMAGE_MEAN,
    RELEASE_IMAGE_STD,
    RELEASE_NUM_SCALES,
    RELEASE_TOKENS_PER_SCALE,
    config_from_release,
    name_from_pixellm,
    name_in_pixellm,
)
from utils.checkpoints.layouts.relatives import refuse_relatives
from utils.checkpoints.layouts.towers import TOWER, TOWER_NAMES, read_tower, resize_tower
from utils.checkpoints.options import ModelOptions, make_fusion_learned
from utils.checkpoints.published_extras import PublishedExtras, read_small_files
from utils.checkpoints.tensor_files import StoredTensors, open_tensors
from utils.checkpoints.weight_loading import Origin

TOWER_PREFIX = "model.vision_tower.vision_tower."
_KEPT = "no number depends on it; kept for writing the published layout again"


class PublishedPixelLM(Layout):
    """The release, alone or PEFT-wrapped with its LoRA."""

    title = "a published PixelLM"
    expected_names = (
        *LANGUAGE_MODEL_NAMES,
        "model.mm_projector.0.weight",
        "model.out_mm_projector.0.weight",
        "model.text_hidden_fcs.0.0.weight",
        "model.mask_decoder.level_embed.weight",
        "model.prompt_encoder.no_mask_embed.weight",
        "model.image_feature_neck.0.weight",
    )

    def matches(self, config: dict[str, Any], names: Iterable[str]) -> bool:
        return has_names(names, "model.mask_decoder.*")

    def read(self, checkpoint: Checkpoint, vision_tower: str | None, options: ModelOptions) -> ModelSource:
        alpha = read_lora_alpha(checkpoint.folder)
        return read_published(checkpoint, f"--version {checkpoint.folder}", vision_tower, options, alpha)

    def language_tensors(self, checkpoint: Checkpoint) -> StoredTensors:
        folder = checkpoint.folder
        return sort_tensors(str(folder), checkpoint.tensors, read_lora_alpha(folder)).model


def read_training_state(
    weight: str, version: str, vision_tower: str | None, options: ModelOptions, lora_alpha: float
) -> ModelSource:
    """What is built from what the original's training left: the PEFT-wrapped state of a published PixelLM.

    Args:
        weight: the file or folder with the state. version: the LLaVA it was trained over, for config and tokenizer.
        vision_tower: the tower's folder, for its config.
    """
    folder = local_folder(version, "--version")
    tensors, wrapped = strip_peft_prefix(open_tensors(Path(weight).expanduser()))
    config = read_json(folder / "config.json")
    if table := tensors.get("model.embed_tokens.weight"):
        config = {**config, "vocab_size": table.shape[0]}
    checkpoint = Checkpoint(folder, PublishedPixelLM(), config, tensors, wrapped)
    return read_published(checkpoint, f"--weight {weight}", vision_tower, options, lora_alpha)


def is_released_training_state(weight: str) -> bool:
    """Whether --weight is what the original's training left. BuildError for one of LISA, GSVA, GLaMM or Sa2VA."""
    place = Path(weight).expanduser()
    if not place.exists() or (
        place.is_dir() and not any(place.glob("*.bin*")) and not any(place.glob("*.safetensors*"))
    ):
        return False
    tensors, wrapped = strip_peft_prefix(open_tensors(place))
    if wrapped:
        refuse_relatives(place, {}, tensors)
    return wrapped and PublishedPixelLM().matches({}, tensors)


def read_published(
    checkpoint: Checkpoint, place: str, vision_tower: str | None, options: ModelOptions, lora_alpha: float
) -> ModelSource:
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
    found = sort_tensors(place, checkpoint.tensors, lora_alpha)
    tower = read_tower(vision_tower)
    if found.tower:
        tower.tensors, tower.origin = found.tower, Origin(TOWER, place)
    tokenizer = load_tokenizer(folder)
    table = found.model.get(TOKEN_TABLE)
    rows = int(raw.get("vocab_size") or (table.shape[0] if table is not None else 0))
    per_scale = prepare_release_tokenizer(tokenizer, rows, options.tokens_per_scale, place)
    processor, config = _release_numerics(tokenizer, per_scale, raw, tower, options)
    config.vision_config, tower_tensors = resize_tower(tower, config.image_size, config.position_resize)
    make_fusion_learned(config, options)
    kept = config.token_fusion == "constant"
    why = "a number in the release's code, kept" if kept else "starts at the release's number"
    merged = f", LoRA of {found.lora_layers} layers merged with alpha {lora_alpha:g}" if found.lora_layers else ""
    return ModelSource(
        config,
        processor,
        {**found.model, **tower_tensors},
        [tower.origin, Origin("", place, lambda name: name_in_pixellm(name) or name)],
        rows,
        dict.fromkeys(RELEASE_CONSTANTS, why),
        f"{checkpoint.title}{merged}; release numerics",
        {**dict.fromkeys(found.unused, _KEPT), **tower.ignored},
        published=PublishedExtras(
            {name: stored.read().clone() for name, stored in found.unused.items()}, read_small_files(folder)
        ),
    )


@dataclass
class PublishedTensors:
    """A published PixelLM's tensors under our names, not read yet.

    tower: of the vision tower, where the file holds one. unused: under their own names, those our model has no place
    for. lora_layers: how many had LoRA, merged when they are read.
    """

    model: StoredTensors
    tower: StoredTensors
    unused: StoredTensors
    lora_layers: int


def sort_tensors(place: str, tensors: StoredTensors, lora_alpha: float) -> PublishedTensors:
    """A published PixelLM's tensors, sorted; BuildError that names one that no published PixelLM holds.

    lora_alpha: with which the LoRA among them, if there is any, was trained.
    """
    merged, layers = merge_stored_lora(place, tensors, lora_alpha)
    tower = {name.removeprefix(TOWER_PREFIX): t for name, t in merged.items() if name.startswith(TOWER_PREFIX)}
    found, _, left_over = rename_tensors(tower, TOWER_NAMES, "")
    strange = [name for name, why in left_over.items() if not why]
    model: StoredTensors = {}
    unused: StoredTensors = {}
    for name, stored in merged.items():
        if name.startswith(TOWER_PREFIX):
            continue
        try:
            ours = name_from_pixellm(name)
        except ValueError as error:
            raise BuildError(f"{place}: {error}") from error
        if ours is None:
            unused[name] = stored
        else:
            model[ours] = stored
    if strange:
        raise BuildError(f"{place}: tensor {TOWER_PREFIX + strange[0]!r} does not belong to a vision tower")
    return PublishedTensors(model, found, unused, layers)


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


def prepare_release_tokenizer(tokenizer: Any, rows: int, wanted: int | None, place: str) -> int:
    """Add what a published PixelLM's tokenizer lacks.

    Args:
        rows: of its embedding table. wanted: tokens per scale that were asked for; None takes what is there.

    Returns:
        Tokens per scale: of the seg tokens that are there, else the release's.

    Raises:
        BuildError: the tokenizer does not belong to that table, or its seg tokens are not what was asked for.
    """
    vocabulary = tokenizer.get_vocab()
    count = 0
    while f"[SEG{count}]" in vocabulary:
        count += 1
    if count % RELEASE_NUM_SCALES:
        raise BuildError(
            f"{place}: its tokenizer holds {count} seg tokens: expected as many for each of the release's "
            f"{RELEASE_NUM_SCALES} scales"
        )
    per_scale = count // RELEASE_NUM_SCALES or wanted or RELEASE_TOKENS_PER_SCALE
    if wanted is not None and wanted != per_scale:
        raise BuildError(
            f"{place}: its tokenizer holds {count} seg tokens, {per_scale} for each scale, but --seg_token_num is "
            f"{wanted}: leave that out"
        )
    PixelLMProcessor.prepare_tokenizer(tokenizer, RELEASE_NUM_SCALES, per_scale)
    needed = required_vocab_size(tokenizer)
    if needed > rows or (not count and needed != rows):
        raise BuildError(
            f"{place}: tensor {name_in_pixellm(TOKEN_TABLE)!r} has {rows} rows, but its tokenizer and the tokens of a "
            f"PixelLM are {needed}: they are not of one model, copy both from one place"
        )
    return per_scale
