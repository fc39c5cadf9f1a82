"""Golden group `losses`: BCE and DICE with gradients, and target refinement through the release's overlap loss."""

import pytest
import torch

from model.losses import LossTerm, bce_loss, dice_loss, refinement_weights
from tests.golden import vectors

GROUP = "losses"
CASES = vectors.case_names(GROUP)
EPS = 1e-8  # with which the release divides by the number of masks
GRADIENT_ATOL = 1e-8
RELEASE_ALPHA = 2.0  # "BCE plus the overlap term" is our form at this alpha
REFUSED = "AssertionError"  # recorded where the release's overlap loss fails on its own counts


def test_every_entry_belongs_to_a_case() -> None:
    vectors.assert_all_in_cases(GROUP, CASES, [(case,) for case in CASES])


def value_and_gradient(loss: LossTerm, logits: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss as the release normalises it, and its gradient with respect to the logits."""
    value = loss.sum / (count + EPS)
    return value.detach(), torch.autograd.grad(value, logits)[0]


@pytest.mark.parametrize("case", CASES)
def test_losses(case: str) -> None:
    with vectors.read_case(GROUP, case, case) as golden:
        facts, count = golden.facts, golden.facts["num_masks"]
        logits = golden.tensor("in.logits").clone().requires_grad_()
        targets = golden.tensor("in.targets")
        golden.same("num_masks", len(logits), count)
        for name, loss in (("dice_loss", dice_loss), ("sigmoid_ce_loss", bce_loss)):
            value, gradient = value_and_gradient(loss(logits, targets), logits, count)
            compare(golden, name, value, gradient, facts[name])

        questions = facts["per_question_mask_counts"]
        if facts["overlap_loss"] == REFUSED:
            golden.check(sum(questions) != count, "the release's overlap loss failed although its counts fit the masks")
            return
        owners = torch.repeat_interleave(torch.arange(len(questions)), torch.tensor(questions))
        weights = refinement_weights(logits, owners, RELEASE_ALPHA)
        # The release's own term weighs 1 where ours weighs alpha, and 0 elsewhere …
        value, gradient = value_and_gradient(bce_loss(logits, targets, weights - 1), logits, count)
        compare(golden, "overlap_loss", value, gradient, facts["overlap_loss"])
        # … so that ours is its BCE and its overlap loss in one.
        value, gradient = value_and_gradient(bce_loss(logits, targets, weights), logits, count)
        together = facts["sigmoid_ce_loss"] + facts["overlap_loss"]
        golden.number("refined BCE", value, together, rtol=vectors.LOSS_RTOL)
        if "grad.sigmoid_ce_loss" in golden:
            parts = golden.tensor("grad.sigmoid_ce_loss") + golden.tensor("grad.overlap_loss")
            golden.compare("gradient of the refined BCE", gradient, parts, rtol=vectors.LOSS_RTOL, atol=GRADIENT_ATOL)


def compare(golden: vectors.Reading, name: str, value: torch.Tensor, gradient: torch.Tensor, expected: float) -> None:
    """A loss by its value and, where one was stored, its gradient."""
    golden.number(name, value, expected, rtol=vectors.LOSS_RTOL)
    if f"grad.{name}" in golden:
        golden.close(f"grad.{name}", gradient, rtol=vectors.LOSS_RTOL, atol=GRADIENT_ATOL)
