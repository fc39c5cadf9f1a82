"""What trains: LoRA in and out again, and which parts of the model beside it."""

from dataclasses import dataclass

from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn

from model.modeling_pixellm import PixelLMForCausalLM
from model.onednn_linear import use_onednn
from model.structures import LORA_ALPHA, LORA_DROPOUT, LORA_RANK, LORA_TARGET_MODULES
from utils.checkpoints.folders import BuildError
from utils.checkpoints.trainable_token_rows import make_rows_trainable


@dataclass
class TrainingRecipe:
    """What trains. The defaults are the paper's recipe: LoRA on a frozen language model plus everything around it.

    lora_target_modules: comma-separated names of linear layers of the language model, or "all-linear".
    train_mask_neck: whether what stands between the decoder's feature maps and its transformers trains, the neck and
        the no-mask embedding. False is the release, which left them at their random start (docs/facts.md, M10).
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
        make_rows_trainable(
            [model.get_input_embeddings(), model.get_output_embeddings()], min(model.config.seg_token_ids)
        )
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
