"""A new PixelLM over what others published: a LLaVA, or a language model and a tower."""

import inspect
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from model.configuration_pixellm import PixelLMConfig
from model.modeling_base import MultimodalSequences
from model.modeling_pixellm import PixelLMForCausalLM
from model.processing_pixellm import PixelLMProcessor
from utils.checkpoints.bases import (
    LANGUAGE,
    TOWER,
    Part,
    llava,
    plain_language_model,
    resized,
    stand_alone_tower,
    tower_of,
)
from utils.checkpoints.folders import (
    BuildError,
    first_sentence,
    load_tokenizer,
    load_whole,
    quiet_transformers,
    read_config,
)
from utils.checkpoints.layouts import Checkpoint, describe_unknown
from utils.checkpoints.load_report import LoadReport
from utils.checkpoints.options import (
    MASK_PARTS,
    NEW_PARTS,
    NEW_ROWS,
    BuiltModel,
    Manner,
    ModelOptions,
    finish,
    token_ids,
)
from utils.checkpoints.published import TABLE, lora_alpha_in, merged_lora
from utils.checkpoints.tensor_files import Stored, stored_in
from utils.checkpoints.weight_loading import Origin, load_weights_into

# Language models whose states and head we know to be all there is between tokens and logits; others are probed.
KNOWN_LANGUAGE_MODELS = ("llama", "mistral", "qwen2", "qwen3")
_NEW = "new in a PixelLM, initialised"
_WIDER = "half of its hidden units, as ours has twice LLaVA's; multiplied by zeros, they change nothing at first"
# The probe makes logits as large as a trained model's: a soft cap leaves small ones as they are.
PROBE_LOGIT, PROBE_TOLERANCE, PROBE_ROUNDINGS, PROBE_TOKENS = 100.0, 1e-3, 10, 8


def from_llava(checkpoint: Checkpoint, vision_tower: str | None, options: ModelOptions, manner: Manner) -> BuiltModel:
    """A PixelLM over a LLaVA in any of its layouts; vision_tower as in `builder.build_model`.

    Raises BuildError where the tower is needed and absent, or tensors do not fit.
    """
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


def from_language_model(
    checkpoint: Checkpoint, vision_tower: str | None, options: ModelOptions, manner: Manner
) -> BuiltModel:
    """A PixelLM over a plain language model; vision_tower as in `builder.build_model`.

    Raises BuildError where the folder holds no language model that can be read, or the tower is absent.
    """
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
    manner: Manner,
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
    built = finish(config, processor, tensors, origins, may_lack, manner, rows)
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
    return processor, {**chosen, **token_ids(processor)}


def _around_unknown(
    folder: Path, text: PretrainedConfig, tower: Part, options: ModelOptions, manner: Manner
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
        report.fresh["language_model.embeddings"] = NEW_ROWS
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

    The probe is two conversations about one image, which we compute together and the language model apart.
    """
    head = model.get_output_embeddings()
    first = torch.arange(min(PROBE_TOKENS, model.config.text_config.vocab_size))
    second = first.clone()
    second[len(first) // 2 :] = first[len(first) // 2 :].flip(0)
    ids = torch.stack([first, second])
    rows = MultimodalSequences(ids, model.get_input_embeddings()(ids), torch.ones_like(ids).bool(), None)
    states = model.hidden_states(rows, image_index=torch.zeros(2, dtype=torch.long))
    gain = PROBE_LOGIT / head(states).abs().max()
    louder = head.register_forward_hook(lambda _module, _inputs, logits: logits * gain)
    try:
        return (head(states).float() - model.language_model(ids).logits.float()).abs().max().item()
    finally:
        louder.remove()
