"""Mask losses by hand: pixels labelled 255, counts, and target refinement."""

import math
from typing import Any

import pytest
import torch

from model.losses import bce_loss, count_masks, dice_loss, refinement_weights
from model.structures import IGNORE_LABEL
from tests.unit.tiny_batches import NONE, ONE, THREE, TWO, make_batch
from tests.unit.tiny_pixellm import make_model
from utils.checkpoints.builder import BuiltModel


@pytest.fixture(scope="module")
def built() -> BuiltModel:
    """Tests leave it as it is."""
    return make_model()


def masks_and_logits(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """(3, 6, 5) logits and masks; a third of the pixels is labelled 255, all of them in the last mask."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, 6, 5, generator=generator)
    masks = torch.randint(0, 2, (3, 6, 5), dtype=torch.uint8, generator=generator)
    masks[torch.rand(3, 6, 5, generator=generator) < 1 / 3] = IGNORE_LABEL
    masks[2] = IGNORE_LABEL
    return logits, masks


# --- pixels labelled 255 ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [bce_loss, dice_loss])
def test_pixels_labelled_255_take_no_part(loss: Any) -> None:
    logits, masks = masks_and_logits()
    logits.requires_grad_()
    term = loss(logits, masks)
    assert term.count == 2 == count_masks(masks), "a mask that is 255 everywhere is not counted"
    (gradient,) = torch.autograd.grad(term.sum, logits)
    hidden = masks == IGNORE_LABEL
    assert bool((gradient[hidden] == 0).all()) and bool((gradient[~hidden] != 0).all())
    changed = torch.where(hidden, torch.randn(3, 6, 5) * 100, logits)
    assert loss(changed, masks).sum.item() == pytest.approx(term.sum.item(), rel=1e-6)
    apart = sum(loss(logits[number : number + 1], masks[number : number + 1]).sum.item() for number in range(2))
    assert term.sum.item() == pytest.approx(apart, rel=1e-6)


def test_bce_and_dice_by_hand() -> None:
    logits = torch.tensor([[[0.0, 2.0], [-1.0, 5.0]]])
    masks = torch.tensor([[[1, 0], [1, IGNORE_LABEL]]], dtype=torch.uint8)
    p = [1 / (1 + math.exp(-x)) for x in (0.0, 2.0, -1.0)]
    bce = -(math.log(p[0]) + math.log(1 - p[1]) + math.log(p[2])) / 3
    assert bce_loss(logits, masks).sum.item() == pytest.approx(bce, rel=1e-6)
    smooth = 1e-3
    dice = 1 - (2 * (p[0] + p[2]) + smooth) / (sum(p) + 2 + smooth)
    assert dice_loss(logits, masks).sum.item() == pytest.approx(dice, rel=1e-5)


def test_in_the_model_predictions_under_255_change_nothing(built: BuiltModel) -> None:
    """The whole way: masks of noise and the same masks with every other label under 255."""
    batch = make_batch(built.processor, [(0, TWO), (1, ONE)], [(20, 40), (24, 24)], ignored=0.3)
    batch["masks"][1][0] = IGNORE_LABEL
    output = built.model(**batch)
    assert output.losses["bce"].count == output.losses["dice"].count == 2
    for logits in output.mask_logits:
        logits.retain_grad()
    losses = built.model._mask_losses(output.mask_logits, batch["masks"], batch["target_questions"], torch.zeros(()))
    (losses["bce"].sum + losses["dice"].sum).backward()
    for logits, masks in zip(output.mask_logits, batch["masks"], strict=True):
        hidden = masks == IGNORE_LABEL
        assert bool((logits.grad[hidden] == 0).all())
        assert bool((logits.grad[~hidden] != 0).all())
    built.model.zero_grad()


# --- counts -------------------------------------------------------------------------------------------------------


def test_counts_are_known_before_the_forward_pass(built: BuiltModel) -> None:
    """Over random batches, some of their rows text only, some masks 255 everywhere."""
    generator = torch.Generator().manual_seed(0)

    def below(limit: int) -> int:
        return int(torch.randint(limit, (), generator=generator))

    seen = set()
    for seed in range(25):
        images = 1 + below(3)
        sizes = [(1 + below(40), 1 + below(40)) for _ in range(images)]
        conversations = [
            (image, (ONE, TWO, THREE, NONE)[below(4)]) for image in range(images) for _ in range(1 + below(3))
        ]
        text_only = [row for row, (_, turns) in enumerate(conversations) if turns is NONE and below(2)]
        batch = make_batch(built.processor, conversations, sizes, text_only=text_only, ignored=0.2, seed=seed)
        for masks in batch["masks"]:
            if len(masks) and below(2):
                masks[below(len(masks))] = IGNORE_LABEL
        with torch.no_grad():
            losses = built.model(**batch).losses
        counts = built.model.count_losses(**batch)
        assert counts == {name: term.count.item() for name, term in losses.items()}
        seen.add(counts["bce"])
    assert 0 in seen and len(seen) > 3, "the batches differ"


def test_counts_of_what_is_left_out(built: BuiltModel) -> None:
    assert built.model.count_losses() == {"ce": 0, "bce": 0, "dice": 0}
    labels = torch.tensor([[5, -100, 7], [-100, -100, 1]])
    assert built.model.count_losses(labels=labels)["ce"] == 2, "the first position is predicted by nothing"


# --- target refinement --------------------------------------------------------------------------------------------

ON, OFF = 3.0, -3.0


def test_one_prediction_of_a_question_overlaps_nothing() -> None:
    weights = refinement_weights(torch.full((1, 2, 2), ON), torch.tensor([4]), 2.0)
    assert bool((weights == 1).all())


def test_two_and_three_predictions_of_a_question() -> None:
    logits = torch.tensor([[[ON, ON, OFF, ON]], [[OFF, ON, ON, 0.0]], [[OFF, ON, ON, OFF]]])
    two = refinement_weights(logits[:2], torch.tensor([0, 0]), 2.0)
    assert two[:, 0].tolist() == [[1, 2, 1, 1]] * 2, "a logit of 0 is not positive"
    three = refinement_weights(logits, torch.tensor([7, 7, 7]), 3.5)
    assert three[:, 0].tolist() == [[1, 3.5, 3.5, 1]] * 3, "three predictions weigh no more than two"


def test_predictions_of_different_questions_may_overlap() -> None:
    logits = torch.full((4, 1, 2), ON)
    logits[3, 0, 1] = OFF
    assert bool((refinement_weights(logits[:2], torch.tensor([1, 2]), 2.0) == 1).all())
    weights = refinement_weights(logits, torch.tensor([5, 9, 5, 9]), 2.0)
    assert weights[:, 0].tolist() == [[2, 2], [2, 1], [2, 2], [2, 1]], "questions need not be adjacent"


def test_refined_bce_by_hand_and_no_gradient_through_the_weights() -> None:
    logits = torch.tensor([[[1.0, 2.0, -1.0]], [[0.5, -2.0, -3.0]]], requires_grad=True)
    masks = torch.tensor([[[1, 0, IGNORE_LABEL]], [[0, 1, 1]]], dtype=torch.uint8)
    weights = refinement_weights(logits, torch.tensor([0, 0]), 2.0)
    assert not weights.requires_grad and weights[:, 0].tolist() == [[2, 1, 1], [2, 1, 1]]
    loss = bce_loss(logits, masks, weights).sum
    softplus = [[math.log1p(math.exp(x)) for x in row] for row in ((1.0, 2.0), (0.5, -2.0, -3.0))]
    first = (2 * (softplus[0][0] - 1.0) + softplus[0][1]) / 2
    second = (2 * softplus[1][0] + (softplus[1][1] + 2.0) + (softplus[1][2] + 3.0)) / 3
    assert loss.item() == pytest.approx(first + second, rel=1e-6)
    loss.backward()
    valid = torch.tensor([[[1.0, 1, 0]], [[1, 1, 1]]])
    plain = (logits.detach().sigmoid() - (masks == 1).float()) * valid / torch.tensor([2.0, 3.0])[:, None, None]
    assert logits.grad is not None and torch.allclose(logits.grad, weights * plain, atol=1e-7)


def test_the_model_refines_within_questions_and_alpha_1_is_plain_bce() -> None:
    """Images of one size are put together for speed; their questions stay apart."""
    built = make_model()
    batch = make_batch(built.processor, [(0, TWO), (0, THREE), (1, TWO)], [(24, 30), (24, 30)])

    def bce(alpha: float) -> tuple[float, torch.Tensor]:
        built.model.config.refinement_alpha = alpha
        with torch.no_grad():
            output = built.model(**batch)
        return output.losses["bce"].sum.item(), torch.cat(output.mask_logits)

    plain, logits = bce(1.0)
    masks, questions = torch.cat(batch["masks"]), batch["target_questions"]
    assert questions.tolist() == [0, 0, 10, 10, 11, 20, 20]
    assert plain == pytest.approx(bce_loss(logits, masks).sum.item(), rel=1e-6)
    expected = 0.0
    for question in (0, 10, 11, 20):
        members = questions == question
        overlap = (logits[members] > 0).sum(0) >= 2
        weights = 1 + 2.0 * overlap.float()
        expected += bce_loss(logits[members], masks[members], weights.expand(int(members.sum()), -1, -1)).sum.item()
    refined, _ = bce(3.0)
    assert refined == pytest.approx(expected, rel=1e-6) and refined > plain * 1.001
