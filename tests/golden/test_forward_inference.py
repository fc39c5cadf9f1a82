"""Golden group `forward_inference`: answers are given, the masks are asked for; one image, several questions."""

import pytest
import torch

from model.predictor import mask_scores
from model.seg_codebook import group_positions
from model.structures import TOWER_KEY
from tests.golden import recipe, released_model, vectors

GROUP = "forward_inference"
CASES = vectors.case_names(GROUP, "cases")


def test_every_entry_belongs_to_a_case() -> None:
    vectors.assert_all_in_cases(GROUP, CASES, [("seed",), *(("cases", case) for case in CASES)])


@pytest.mark.parametrize("case", CASES)
def test_forward_inference(case: str) -> None:
    model = released_model.build()
    config = model.config
    with torch.no_grad(), vectors.read_case(GROUP, case, "cases", case) as golden:
        facts = golden.facts
        resized = facts["clip_resize_hw"]
        seed = vectors.read_json(GROUP)["seed"]
        ids = released_model.input_ids(golden.tensor("in.input_ids"))
        output = model(
            input_ids=ids,
            attention_mask=golden.tensor("in.attention_masks"),
            pixel_values={TOWER_KEY: recipe.make_pixels(seed, facts["images_clip_recipe"].read_all(), resized)},
            resized_sizes=torch.tensor(resized),
            original_sizes=torch.tensor(facts["original_hw"]),
            image_index=torch.zeros(len(ids), dtype=torch.long),
        )
        (masks,) = output.mask_logits
        golden.close("out.pred_embeddings", output.embeddings, atol=vectors.HIDDEN_ATOL)
        golden.close("out.pred_masks", masks, atol=vectors.MASK_ATOL)
        golden.close("out.mask_scores", torch.tensor(mask_scores(masks)), atol=vectors.score_atol(masks))

        rows, _ = group_positions(ids, config.seg_token_ids)
        targets = torch.bincount(rows, minlength=len(ids))
        golden.same("targets of each question", targets.tolist(), facts["target_counts_per_question"])
        # The release means to divide by a whole group, but divides by the tokens of a scale and multiplies (fact M17).
        tokens = targets * config.group_size
        counts = tokens // config.tokens_per_scale * config.num_scales
        golden.close("out.batch_seg_token_counts", counts)
