"""Golden group `lora`: the language model under LoRA, what trains in the release, and the merged weights."""

import torch

from model import PixelLMForCausalLM
from tests.golden import kinks, recipe, released_model, training, vectors
from tests.golden.released_model import name_from_training
from utils.checkpoints.builder import TrainingRecipe, choose_trainable, merge_lora

GROUP = "lora"
ADAPTED = ".base_layer."  # where the weight under an adapter is today
MERGED = "merged."


def adapted_model(golden: vectors.Reading) -> PixelLMForCausalLM:
    """A released model with the recorded LoRA, ready to train as the release trains it."""
    facts = golden.facts
    model = released_model.make()
    entries = facts["lora_tensors"].read_all()
    leaves = sorted({name.split(".lora_")[0].rpartition(".")[2] for name in entries})
    rules = TrainingRecipe(
        lora_r=facts["r"],
        lora_alpha=facts["lora_alpha"],
        lora_dropout=facts["lora_dropout_here"],
        lora_target_modules=",".join(leaves),
        train_mask_neck=False,
    )
    choose_trainable(model, rules)
    tensors = recipe.make_tensors(facts["seed"], entries)
    _, unexpected = model.load_state_dict(
        {name_from_training(name): value for name, value in tensors.items()}, strict=False
    )
    golden.same("adapters without a place in our model", list(unexpected), [])
    lora = [name for name, _ in model.named_parameters() if ".lora_" in name]
    golden.same("adapters", sorted(lora), sorted(str(name_from_training(name)) for name in entries))
    return model


def compare_what_trains(golden: vectors.Reading, model: PixelLMForCausalLM) -> None:
    """Every parameter of the release's recipe, save heads that no loss reaches: those are frozen here."""
    ours = {name.replace(ADAPTED, "."): parameter.requires_grad for name, parameter in model.named_parameters()}
    tower = {name for name in ours if name.startswith("vision_tower.")}
    golden.same("tower", len(tower), golden.facts["frozen_vision_tower_parameter_count"])
    unreached = {id(parameter) for part in model.pixel_decoder.parts_without_loss() for parameter in part.parameters()}
    idle = {name for name, parameter in model.named_parameters() if id(parameter) in unreached}
    trainable = {name_from_training(name) for name in golden.facts["trainable_parameters"]}
    frozen = {name_from_training(name) for name in golden.facts["frozen_parameters_excluding_vision_tower"]} - {None}
    golden.same("what trains", sorted(name for name, trains in ours.items() if trains), sorted(trainable - idle))
    golden.same(
        "what is frozen", sorted(name for name, trains in ours.items() if not trains), sorted(frozen | tower | idle)
    )


def test_lora() -> None:
    with vectors.read_group(GROUP) as golden:
        inputs_group, case = golden.facts["case"].split()
        inputs = vectors.read_case(inputs_group, case, "cases", case)
        seed = golden.facts["seed"]
        model = adapted_model(golden)
        compare_what_trains(golden, model)

        def forward() -> training.PixelLMOutput:
            return training.run(inputs, model, seed)

        with training.watched_constants(model):
            with kinks.watch() as near:
                output = forward()
            training.compare_losses(golden, training.weighted_losses(model, output))
            for image, logits in enumerate(output.mask_logits):
                golden.close(f"out.pred_masks.{image}", logits, atol=vectors.MASK_ATOL)
            training.compare_gradients(golden, model, forward, output, near, name_from_training)
        compare_merged(golden, model)
        with torch.no_grad():
            for image, logits in enumerate(forward().mask_logits):
                golden.close(f"out.pred_masks.{image}", logits, atol=vectors.MASK_ATOL)


def compare_merged(golden: vectors.Reading, model: PixelLMForCausalLM) -> None:
    """Weights after the adapters were added to them."""
    merge_lora(model)
    merged = model.state_dict()
    golden.same("adapters left", [name for name in merged if ".lora_" in name], [])
    names = golden.names(rf"^{MERGED}")
    golden.check(bool(names), "no merged weight was stored")
    for name in names:
        golden.close(name, merged[str(name_from_training(name.removeprefix(MERGED)))], atol=vectors.MERGED_ATOL)
