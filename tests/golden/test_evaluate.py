"""Golden group `evaluate`: greedy answers and the masks of their seg groups, counted as the release counts them."""

from collections.abc import Iterator

import pytest
import torch

from model import PixelLMForCausalLM
from model.geometry import restore_masks
from model.predictor import mask_scores
from model.structures import TOWER_KEY
from tests.golden import recipe, released_model, vectors

GROUP = "evaluate"
CASES = vectors.case_names(GROUP, "cases")
COMMON = ("seed", "facts", "clip_resize_hw", "original_hw")
EMBEDDINGS, HEADS = "embed_tokens_override", "lm_head_variant"


def heads() -> list[str]:
    """Names of the stored heads, each of which forces another answer."""
    return [name for name in vectors.read_tensors(GROUP) if name.startswith(HEADS)]


def test_every_entry_belongs_to_a_case() -> None:
    facts = [*((name,) for name in COMMON), *(("cases", case) for case in CASES)]
    vectors.assert_all_in_cases(GROUP, CASES, facts, tensors=[EMBEDDINGS, *heads()])
    used = {entry["lm_head"] for entry in vectors.read_json(GROUP)["cases"].values()}
    assert used == set(heads()), f"heads that no case uses: {sorted(set(heads()) - used)}"


def test_what_the_release_says_of_its_own_loading() -> None:
    """It loses its loss weights when it is loaded (fact M18) and has no cache (E1); ours has both at any time."""
    with vectors.Reading(GROUP, vectors.read_json(GROUP)["facts"], {}, "facts") as golden:
        golden.same("loss weight after loading", golden.facts["has_ce_loss_weight_when_loaded_from_published"], False)
        golden.same("model's cache", golden.facts["config_use_cache"], False)
        golden.same("generation's cache", golden.facts["generation_use_cache"], True)
        golden.same("our loss weights", set(released_model.build().loss_weights), {"ce", "bce", "dice"})


@pytest.fixture
def model() -> Iterator[PixelLMForCausalLM]:
    """The released model with the embeddings that force answers; its own put back after."""
    model = released_model.build()
    tables = (model.get_input_embeddings(), model.get_output_embeddings())
    own = [table.weight.data for table in tables]
    tables[0].weight.data = vectors.read_tensors(GROUP)[EMBEDDINGS]
    yield model
    for table, weight in zip(tables, own, strict=True):
        table.weight.data = weight


def prompts_of(rows: torch.Tensor, padding: int) -> list[torch.Tensor]:
    """Right-padded rows without their padding: a row ends at its first padding id (fact E2)."""
    return [row[: int((row != padding).long().cumprod(0).sum())] for row in rows]


@pytest.mark.parametrize("case", CASES)
def test_evaluate(case: str, model: PixelLMForCausalLM) -> None:
    common, weights = vectors.read_json(GROUP), vectors.read_json("weights")
    (resized,), (original,) = common["clip_resize_hw"], common["original_hw"]
    with vectors.read_case(GROUP, case, "cases", case) as golden:
        facts = golden.facts
        model.get_output_embeddings().weight.data = vectors.read_tensors(GROUP)[facts["lm_head"]]
        margins: list[float] = []
        watch = model.get_output_embeddings().register_forward_hook(lambda *call: margins.append(margin(call[-1])))
        padding, end = (weights["model_dims"][name] for name in ("pad_token_id", "eos_token_id"))
        prompts = prompts_of(golden.tensor("in.input_ids"), padding)
        answers = []
        for prompt in prompts:  # one by one, so that the margins are of live rows only
            answers += model.generate_answers(
                pixel_values={
                    TOWER_KEY: recipe.make_pixels(common["seed"], facts["images_clip_recipe"].read_all(), [resized])
                },
                resized_sizes=torch.tensor([resized]),
                prompts=[released_model.input_ids(prompt)],
                image_index=torch.zeros(1, dtype=torch.long),
                end_token_id=end,
                max_new_tokens=facts["max_new_tokens"],
            )
        watch.remove()
        golden.number("margin", min(margins), facts["min_top2_logit_margin"], atol=vectors.LOGIT_ATOL)
        for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            golden.close(f"out.output_ids.{number}", torch.cat([prompt, answer.ids])[None])
        embeddings = torch.cat([answer.embeddings for answer in answers])
        masks = torch.cat([restore_masks(answer.low_res_mask_logits, resized, original) for answer in answers])
        golden.same("mask shapes", [list(masks.shape)], facts["mask_shapes"])
        golden.close("out.pred_embeddings", embeddings, atol=vectors.HIDDEN_ATOL)
        golden.close("out.pred_masks", masks, atol=vectors.MASK_ATOL)
        golden.close("out.mask_scores", torch.tensor(mask_scores(masks)), atol=vectors.score_atol(masks))
        counts = torch.tensor([len(answer.embeddings) for answer in answers])
        golden.close("out.batch_seg_token_counts", counts)


def margin(logits: torch.Tensor) -> float:
    """By how much the best token leads, (…, vocabulary) logits."""
    best, second = logits.detach().topk(2).values.unbind(-1)
    return float((best - second).min())
