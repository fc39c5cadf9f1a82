"""Golden group `matcher`: which prediction belongs to which target, and what every pair costs."""

import pytest
import torch

from tests.golden import vectors
from utils.evaluation.matching import match, matching_cost

GROUP = "matcher"
CASES = vectors.case_names(GROUP, "cases")
POINTS = "point_coords"  # of all cases


def test_every_entry_belongs_to_a_case() -> None:
    vectors.assert_all_in_cases(GROUP, CASES, [("note",), *(("cases", case) for case in CASES)], tensors=[POINTS])


@pytest.mark.parametrize("case", CASES)
def test_matcher(case: str) -> None:
    (points,) = vectors.read_tensors(GROUP)[POINTS].numpy()
    with vectors.read_case(GROUP, case, "cases", case) as golden:
        logits, targets = golden.tensor("in.pred_logits"), golden.tensor("in.gt")
        cost = matching_cost(logits.numpy(), targets.numpy(), points)
        golden.same("cost shape", cost.shape, (len(logits), len(targets)))
        if "out.cost" in golden:  # the release makes none where a side is empty
            golden.close("out.cost", torch.from_numpy(cost), atol=vectors.COST_ATOL)
        pairs = match(cost)
        golden.same("pred_indices", [p for p, _ in pairs], golden.facts["pred_indices"])
        golden.same("gt_indices", [t for _, t in pairs], golden.facts["gt_indices"])
        golden.check("out.cost" in golden or cost.size == 0, "a cost matrix that is not empty was not stored")
