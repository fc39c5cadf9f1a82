"""What we measure ourselves against says and draws what was recorded from the release: it is no straw man."""

from collections.abc import Iterator

import pytest
import torch

from model import PixelLMForCausalLM
from model.geometry import restore_masks
from model.structures import TOWER_KEY
from tests.golden import recipe, released_model, vectors
from tests.golden.test_evaluate import CASES, EMBEDDINGS, GROUP, prompts_of
from tools.bench.baselines import Questions, plain_cache, release_without_cache


@pytest.fixture
def model() -> Iterator[PixelLMForCausalLM]:
    """The released model with the embeddings that force answers; its own tables put back after."""
    model = released_model.build()
    tables = (model.get_input_embeddings(), model.get_output_embeddings())
    own = [table.weight.data for table in tables]
    tables[0].weight.data = vectors.read_tensors(GROUP)[EMBEDDINGS]
    yield model
    for table, weight in zip(tables, own, strict=True):
        table.weight.data = weight


# Without a cache this one takes a hundred passes and more.
LONG = "stray_seg_token_in_one_prompt"


@pytest.mark.parametrize("case", [pytest.param(case, marks=pytest.mark.long if case == LONG else ()) for case in CASES])
@pytest.mark.parametrize("way", [release_without_cache, plain_cache])
def test_the_record(way: type, case: str, model: PixelLMForCausalLM) -> None:
    common, dims = vectors.read_json(GROUP), vectors.read_json("weights")["model_dims"]
    (resized,), (original,) = common["clip_resize_hw"], common["original_hw"]
    tensors, facts = vectors.read_tensors(GROUP), common["cases"][case]
    model.get_output_embeddings().weight.data = tensors[facts["lm_head"]]
    pixels = recipe.make_pixels(common["seed"], facts["images_clip_recipe"], [resized])
    prompts = prompts_of(tensors[f"{case}.in.input_ids"], dims["pad_token_id"])
    masks = []
    for number, prompt in enumerate(prompts):
        ids = released_model.input_ids(prompt)
        images = {TOWER_KEY: pixels}, torch.tensor([resized])
        (answer,) = way(model, Questions(*images, [ids], dims["eos_token_id"], facts["max_new_tokens"]))
        assert torch.equal(torch.cat([prompt, answer.ids])[None], tensors[f"{case}.out.output_ids.{number}"])
        masks.append(restore_masks(answer.low_res_mask_logits, resized, original))
        # The baselines read groups as we do; where the release counts a prompt's groups too, its masks are more.
        if torch.isin(ids, torch.tensor(model.config.seg_token_ids)).any() or answer.num_broken:
            return
    torch.testing.assert_close(torch.cat(masks), tensors[f"{case}.out.pred_masks"], atol=vectors.MASK_ATOL, rtol=0)
