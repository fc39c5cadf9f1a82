"""What a published folder and a checkpoint of the release's training hold: names, shapes, and the two config files."""

from collections.abc import Mapping

import torch

from model import PixelLMForCausalLM
from tests.golden import released_model, vectors
from tests.golden.release_names import CLIP_CLASS_TOKENS, CLIP_POSITION_TABLE
from utils.checkpoints.builder import TrainingRecipe, choose_trainable
from utils.checkpoints.layouts.published_names import name_from_pixellm
from utils.checkpoints.tensor_files import WHOLE_NAMES

PUBLISHED, WRAPPED = "state_dict_keys_published", "state_dict_keys_lora_wrapped"
CONFIG, GENERATION = "published_config", "published_generation_config"
CONFIG_FILE, GENERATION_FILE = "config.json", "generation_config.json"

# Where our model has no switch, the value under which it is the release's.
FIXED = {
    "architectures": ["PixelLMForCausalLM"],
    "model_type": "llava",
    "mm_projector_hidden_dim": 2,  # times the language model's width
    "mm_projector_out_dim": 1,
    "mm_use_im_patch_token": False,
    "mm_vision_select_feature": "patch",
    "pad_train_clip_images": True,
    "pretraining_tp": 1,
    "resize_vision_tower": True,
    "separate_mm_projector": True,
    "use_cache": False,
    "use_mm_proj": True,
    "vision_tower_for_mask": True,
}
# Where it came from and how it was trained: no number of the model depends on these.
HISTORY = (
    "_name_or_path",
    "freeze_mm_mlp_adapter",
    "image_aspect_ratio",
    "image_grid_pinpoints",
    "mm_vision_tower",
    "pretrain_mm_mlp_adapter",
    "train_mask_decoder",
    "transformers_version",
    "tune_mm_mlp_adapter",
    "vision_tower",
)
# Named otherwise, or counted from elsewhere, in our config; all others have their own name in the language model's.
OTHER_NAMES = {
    "image_feature_scale_num": lambda model: model.config.num_scales,
    "mm_hidden_size": lambda model: model.config.vision_config.hidden_size,
    "mm_use_im_start_end": lambda model: True,  # the processor's default
    "mm_vision_select_layer": lambda model: model.config.vision_feature_layers[0],
    "out_dim": lambda model: model.config.embedding_dim,
    "resize_vision_tower_size": lambda model: model.config.image_size,
    "torch_dtype": lambda model: str(model.dtype).removeprefix("torch."),
    "rope_theta": lambda model: model.config.text_config.rope_parameters["rope_theta"],
    "rope_scaling": lambda model: None,
}


def shapes(model: PixelLMForCausalLM) -> dict[str, list[int]]:
    """Every parameter and buffer of a checkpoint by name; an adapted weight by the name it has when free."""
    return {name.replace(".base_layer.", "."): list(value.shape) for name, value in model.state_dict().items()}


def compare_shapes(
    golden: vectors.Reading,
    recorded: Mapping[str, list[int]],
    translated: Mapping[str, str | None],
    ours: Mapping[str, list[int]],
) -> None:
    """Every recorded tensor has its place and shape, two never the same, and ours has no place left."""
    kept = {name: own for name, own in translated.items() if own is not None}
    golden.same("places taken twice", len(set(kept.values())), len(kept))
    golden.same("places", sorted(kept.values()), sorted(ours))
    for name, own in kept.items():
        golden.same(f"shape of {name}", ours.get(own), recorded[name])


def test_keys_of_a_published_folder() -> None:
    model = released_model.build()
    constants = set(released_model.CONSTANTS)
    ours = {
        name: shape
        for name, shape in shapes(model).items()
        if not name.startswith("vision_tower.") and name not in constants
    }
    with vectors.Reading(PUBLISHED, vectors.read_json(PUBLISHED), {}, "") as golden:
        recorded = golden.facts["tensors"].read_all()
        translated = {name: name_from_pixellm(name) for name in recorded}
        compare_shapes(golden, {name: entry["shape"] for name, entry in recorded.items()}, translated, ours)
        types = {str(tensor.dtype) for name, tensor in model.state_dict().items() if name in ours}
        golden.same("types", {f"torch.{entry['dtype']}" for entry in recorded.values()}, types)
        unused = [name for name, own in translated.items() if own is None]
        rotary = [name for name in unused if name.endswith("rotary_emb.inv_freq")]
        for name in rotary:
            golden.same(f"shape of {name}", recorded[name]["shape"], [head_width(model) // 2])
        recipe = vectors.read_json("weights")["model_tensors"]
        golden.same("not in the weight recipe", sorted(set(recorded) - set(recipe)), sorted(rotary))
        for name, entry in recipe.items():
            golden.same(f"recipe's shape of {name}", entry["shape"], recorded[name]["shape"])
        files = golden.facts["files_written"]
        golden.same("files", {CONFIG_FILE, GENERATION_FILE} - set(files), set())
        golden.check(any(name in files for name in WHOLE_NAMES), f"no file of weights that we read among {files}")


def head_width(model: PixelLMForCausalLM) -> int:
    text = model.config.text_config
    return text.hidden_size // text.num_attention_heads


def test_keys_under_lora() -> None:
    """What training leaves: PEFT's prefix before every name, the vision tower inside, its table already enlarged."""
    lora = vectors.read_json("lora")
    model = released_model.make()
    leaves = {name.split(".lora_")[0].rpartition(".")[2] for name in lora["lora_tensors"]}
    choose_trainable(model, TrainingRecipe(lora_r=lora["r"], lora_target_modules=",".join(sorted(leaves))))
    ours = {name: shape for name, shape in shapes(model).items() if name not in released_model.CONSTANTS}
    with vectors.Reading(WRAPPED, vectors.read_json(WRAPPED), {}, "") as golden:
        golden.check("strict" in golden.facts["note"], "the note tells of something else")
        recorded = golden.facts["tensors"].read_all()
        translated = {name: released_model.name_from_training(name) for name in recorded}
        compare_shapes(golden, recorded, translated, ours)
        buffers = {name for name, _ in model.named_buffers()}
        own = {translated[name] for name in golden.facts["buffers"]} - {None}
        golden.same("buffers", sorted(own), sorted(buffers & set(ours)))
        unread = {name for name, own in translated.items() if own is None} - set(golden.facts["buffers"])
        golden.check(all(".prompt_encoder." in name for name in unread), f"left out: {sorted(unread)}")


def test_config() -> None:
    model = released_model.build()
    width = model.config.text_config.hidden_size
    with vectors.Reading(CONFIG, vectors.read_json(CONFIG), {}, "") as golden:
        for name in golden.facts:
            if name in HISTORY:
                golden.facts[name]
            elif name in FIXED:
                golden.same(name, golden.facts[name], FIXED[name])
            elif name in OTHER_NAMES:
                golden.same(name, golden.facts[name], OTHER_NAMES[name](model))
            elif hasattr(model.config.text_config, name):
                golden.same(name, golden.facts[name], getattr(model.config.text_config, name))
        for projector in (model.projector, model.mask_projector):
            linear = [part for part in projector.modules() if isinstance(part, torch.nn.Linear)]
            golden.same("projector", [part.out_features // width for part in linear], [2, 1])


def test_sizes_of_the_weights() -> None:
    """The tables of sizes beside the weight recipe tell of the same model as its config."""
    model, weights = released_model.build(), vectors.read_json("weights")
    config = model.config
    other_names = {
        **OTHER_NAMES,
        "seg_token_idx": lambda model: config.seg_token_ids,
        "im_start_id": lambda model: config.seg_token_ids[-1] + 1,  # added in this order (fact C5)
        "im_end_id": lambda model: config.seg_token_ids[-1] + 2,
        "seg_token_num": lambda model: config.tokens_per_scale,
    }
    with vectors.Reading("weights", weights["model_dims"], {}, "model_dims") as golden:
        for name in golden.facts:
            if name in other_names:
                golden.same(name, golden.facts[name], other_names[name](model))
            elif hasattr(config.text_config, name):
                golden.same(name, golden.facts[name], getattr(config.text_config, name))
        golden.check(golden.facts["image_token_index"] < 0, "the release's placeholder is a token")
    with vectors.Reading("weights", weights["clip_dims"], {}, "clip_dims") as golden:
        own_side = golden.facts["image_size"]
        for name in golden.facts:
            if name != "image_size":
                golden.same(name, golden.facts[name], getattr(config.vision_config, name))
        table = weights["clip_tensors"][CLIP_POSITION_TABLE]["shape"]
        rows = (own_side // config.patch_size) ** 2 + CLIP_CLASS_TOKENS
        golden.same("position table", table, [rows, config.vision_config.hidden_size])


def test_generation_config() -> None:
    """Greedy, as ours is: nothing in it asks for drawing or beams."""
    text = released_model.build().config.text_config
    with vectors.Reading(GENERATION, vectors.read_json(GENERATION), {}, "") as golden:
        for name in golden.facts:
            if name.endswith("_token_id"):
                golden.same(name, golden.facts[name], getattr(text, name))
        golden.same("made from the model's config", golden.facts["_from_model_config"], True)
        golden.facts["transformers_version"]
