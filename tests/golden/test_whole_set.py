"""Every file of a set is there, and every file there belongs to a group that is tested."""

import pytest

from tests.golden import vectors

TENSOR_GROUPS = (
    "collate",
    "decoder",
    "evaluate",
    "forward_inference",
    "forward_train",
    "lora",
    "losses",
    "matcher",
    "metrics",
    "postprocess",
    "preprocess",
    "vision",
)
FACT_GROUPS = (
    "published_config",
    "published_generation_config",
    "state_dict_keys_lora_wrapped",
    "state_dict_keys_published",
    "weights",
)
KINDS = (".json", ".safetensors", ".png", ".model")  # anything else is no record: a README, say
OTHERS = ("tokenizer.model", "tokenizer_config.json")
FILES = (
    *(f"{group}.{kind}" for group in TENSOR_GROUPS for kind in ("json", "safetensors")),
    *(f"{group}.json" for group in FACT_GROUPS),
    *OTHERS,
)


@pytest.mark.parametrize("file", FILES)
def test_file_is_there(file: str) -> None:
    assert vectors.path_of(file).stat().st_size


def test_no_file_is_left_out() -> None:
    recorded = vectors.read_json("preprocess")["images"]
    images = {name for image, entry in recorded.items() for name in (image, entry["resized_uint8_file"])}
    found = {path.name for path in vectors.folder().iterdir() if path.suffix in KINDS}
    assert found == {*FILES, *images}


def test_the_copy_here_is_small() -> None:
    from tests.golden.trim import MOST_BYTES

    here = vectors.DATA.parent
    sizes = [path.stat().st_size for path in here.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sum(sizes) <= MOST_BYTES, f"tests/golden takes {sum(sizes)} bytes, more than {MOST_BYTES}"
