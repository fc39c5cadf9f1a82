"""How tensors and numerics of a published PixelLM become ours."""

import pytest
import torch

from tests.golden import released_model, vectors
from tests.golden.release_names import name_from_clip
from utils.checkpoints.layouts.published_names import config_from_release, name_from_pixellm


def test_no_two_published_tensors_become_one() -> None:
    weights = vectors.read_json("weights")
    names = [name_from_pixellm(name) for name in weights["model_tensors"]]
    names += [name_from_clip(name) for name in weights["clip_tensors"]]
    kept = [name for name in names if name is not None]
    assert len(kept) == len(set(kept))
    assert set(kept) <= set(released_model.build().state_dict())


@pytest.mark.parametrize("translate", [name_from_pixellm, name_from_clip])
@pytest.mark.parametrize("name", ["model.mm_projector2.weight", "model.mask_decoder.unheard_of", ""])
def test_a_tensor_nobody_published_is_refused_by_name(translate, name) -> None:
    with pytest.raises(ValueError, match=f"tensor {name!r} does not belong to a"):
        translate(name)


def test_seg_tokens_must_fill_all_scales() -> None:
    published, clip_dims = vectors.read_json("published_config"), vectors.read_json("weights")["clip_dims"]
    with pytest.raises(ValueError, match="5 seg token ids were given"):
        config_from_release(published, clip_dims, seg_token_ids=range(5), image_token_id=published["vocab_size"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fusion_constant_rounds_with_the_model(dtype: torch.dtype) -> None:
    """Fact M1: 1 / number of seg tokens, rounded to the type the model is loaded in."""
    config = released_model.build().config
    expected = torch.tensor(1 / len(config.seg_token_ids)).to(dtype)
    assert (released_model.build().codebook.token_weights.to(dtype) == expected).all()
    if config.group_size == 6:
        assert float(expected) == {torch.bfloat16: 0.1669921875, torch.float16: 0.1666259765625}[dtype]
