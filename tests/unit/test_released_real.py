"""Real weights and a real tokenizer, from plain folders to a chat; they skip where PIXELLM_REALDATA is not set."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoModelForCausalLM

import chat
import merge_lora_weights_and_save_hf_model as merge
import train_ds
from model.modeling_base import MultimodalSequences
from model.processing_pixellm import PixelLMProcessor, check_groups, seg_token_names
from tests.unit.real_weights import tokenizer_cases, write_stories
from tests.unit.tiny_bases import options, write_tower
from tests.unit.tiny_pixellm import noise
from utils.checkpoints.builder import BuiltModel, build_model
from utils.checkpoints.folders import BuildError, load_tokenizer

SMALL = ("--out_dim=16", "--decoder_depth=1", "--decoder_num_heads=2", "--decoder_mlp_dim=16")


@pytest.fixture(scope="module")
def stories(realdata: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_stories(tmp_path_factory.mktemp("stories"), realdata)


@pytest.fixture(scope="module")
def eye(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tower(tmp_path_factory.mktemp("eye"), "clip")


@pytest.fixture(scope="module")
def recorded(realdata: Path) -> dict:
    return json.loads((realdata / "reference" / "stories260K.json").read_text(encoding="utf-8"))


@torch.no_grad()
def compute_logits(built: BuiltModel, ids: list[int]) -> torch.Tensor:
    """Logits of what follows, computed as the model computes them in training."""
    model, row = built.model, torch.tensor([ids])
    rows = MultimodalSequences(row, model.get_input_embeddings()(row), torch.ones_like(row).bool(), None)
    states = model.hidden_states(rows, image_index=torch.zeros(1, dtype=torch.long))
    return model.get_output_embeddings()(states)[0]


def test_stories_are_told_as_recorded(stories: Path, eye: Path, recorded: dict) -> None:
    built = build_model(str(stories), str(eye), options("llava_v1"))
    expected = recorded["greedy_ids_200"]
    # Our decoding loop, from the beginning token alone; the row is about no image.
    blank = built.processor.encode_image(noise(32, 32))
    (answer,) = built.model.generate_answers(
        pixel_values={"vision_tower": blank.pixel_values[None]},
        resized_sizes=torch.tensor([blank.resized_size]),
        prompts=[torch.tensor(expected[:1])],
        image_index=torch.tensor([0]),
        end_token_id=built.processor.end_token_id,
        max_new_tokens=len(expected) - 1,
    )
    told = list(answer.ids)
    assert [*expected[:1], *told] == expected
    assert built.processor.tokenizer.decode(told).strip() == recorded["expected_stdout"].strip()
    # And the path of training.
    logits = compute_logits(built, expected)
    assert logits[:-1, :].argmax(dim=-1).tolist() == expected[1:]
    first = recorded["logits_pos15_first16"]
    torch.testing.assert_close(logits[15, : len(first)], torch.tensor(first), atol=1e-4, rtol=1e-4)


def test_stories_become_a_pixellm_that_trains_and_chats(
    stories: Path, eye: Path, realdata: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = ("--log_base_dir", str(tmp_path), "--exp_name", "stories", "--dataset_dir", str(realdata / "dataset"))
    data = ("--dataset=refer_seg", "--sample_rates=1", "--refer_seg_data=refcoco", "--workers=0", "--no_eval")
    steps = ("--max_steps=10", "--batch_size=1", "--grad_accumulation_steps=1", "--warmup_steps=1", "--lr=1e-3")
    how = ("--engine=plain", "--precision=fp32", "--conv_type=llava_v1", *SMALL)
    train_ds.main([f"--version={stories}", f"--vision-tower={eye}", *place, *data, *steps, *how])
    card = json.loads((tmp_path / "stories" / "run.json").read_text(encoding="utf-8"))
    assert card["loaded"]["layout"] == "a plain language model (llama)" and card["loaded"]["newly_initialized"]
    run = tmp_path / "stories"
    assert merge.main([f"--weight={run / 'ckpt_model'}", f"--save_path={tmp_path / 'model'}", "--precision=fp32"]) == 0
    built = build_model(str(tmp_path / "model"))
    assert built.processor.seg_token_ids == list(range(512, 518))
    start = build_model(str(stories), str(eye), options("llava_v1"))
    name = "language_model.model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(built.model.state_dict()[name], start.model.state_dict()[name]), "LoRA has trained"
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    own = built.model.state_dict()
    assert all(torch.equal(value, own[name]) for name, value in loaded.state_dict().items())
    Image.fromarray(noise(40, 60)).save(tmp_path / "image.png")
    capsys.readouterr()
    ask = (f"--image={tmp_path / 'image.png'}", "--prompt=Where is the ball?", "--max_new_tokens=8", "--device=cpu")
    assert chat.main([f"--version={tmp_path / 'model'}", *ask, f"--out={tmp_path / 'answer.png'}"]) == 0
    assert capsys.readouterr().out.startswith("Answer: ") and (tmp_path / "answer.png").is_file()


def test_llama_2_makes_the_recorded_ids_with_and_without_seg_tokens(realdata: Path) -> None:
    folder = realdata / "weights" / "llama2_tokenizer"
    tokenizer = load_tokenizer(folder)
    spoken = json.loads((realdata / "reference" / "llama2_tokenizer.json").read_text(encoding="utf-8"))
    cases = tokenizer_cases(realdata)
    assert len(spoken) > 3 and len(cases) > 40
    for _ in range(2):
        for case in spoken:
            ids = tokenizer.encode(case["text"], add_special_tokens=False)
            assert [tokenizer.bos_token_id, *ids] == case["ids"]
        for text, expected in cases:
            assert tokenizer.encode(text, add_special_tokens=False) == expected, text
        PixelLMProcessor.prepare_tokenizer(tokenizer, 2, 3)
    assert tokenizer.convert_tokens_to_ids(seg_token_names(2, 3)) == list(range(32000, 32006))
    check_groups(PixelLMProcessor(tokenizer))


def test_the_ids_survive_saving(realdata: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(realdata / "weights" / "llama2_tokenizer")
    processor = PixelLMProcessor(PixelLMProcessor.prepare_tokenizer(tokenizer, 2, 3))
    processor.save_pretrained(tmp_path)
    again = PixelLMProcessor.from_pretrained(tmp_path)
    assert again.seg_token_ids == processor.seg_token_ids
    for text, expected in tokenizer_cases(realdata):
        assert again.tokenizer.encode(text, add_special_tokens=False) == expected, text


def test_tokens_added_by_others_keep_their_ids(realdata: Path, tmp_path: Path) -> None:
    """LLaVA v1 had added three before PixelLM's came."""
    shutil.copy(realdata / "weights" / "llama2_tokenizer" / "tokenizer.model", tmp_path)
    added = {"<im_patch>": 32000, "<im_start>": 32001, "<im_end>": 32002}
    (tmp_path / "added_tokens.json").write_text(json.dumps(added))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    tokenizer = PixelLMProcessor.prepare_tokenizer(load_tokenizer(tmp_path), 2, 3)
    assert tokenizer.convert_tokens_to_ids(list(added)) == list(added.values())
    assert tokenizer.convert_tokens_to_ids(seg_token_names(2, 3)) == list(range(32003, 32009))
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<im_start>": 32001}))
    with pytest.raises(BuildError, match="'<im_start>' has the id 32001 in its files, but 32000"):
        load_tokenizer(tmp_path)
