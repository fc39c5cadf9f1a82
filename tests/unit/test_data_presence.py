"""What is not there is named before anything is loaded: all of it, with where it comes from."""

from pathlib import Path

import pytest

from tests.unit import data_sets
from utils.cli.config import DataConfig, ValidationConfig
from utils.cli.errors import explain
from utils.data.errors import DataError
from utils.data.readers.registry import FAMILIES, build_reader, required_files_of
from utils.data.requested_sets import find_missing_files, requested_for_evaluation, requested_for_training
from utils.data.required_files import missing_sentence, missing_table
from utils.engine.setup import refuse_missing_data

EVERY_SET = [name for family, names in FAMILIES.items() if family != "custom" for name in names]


def refuse(root: Path, validation: ValidationConfig | None = None, **flags: str) -> None:
    refuse_missing_data(DataConfig(dataset_dir=str(root), **flags), validation or ValidationConfig())


def test_all_of_the_readmes_data_are_named_at_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data_sets.write_refer_seg(tmp_path)
    with pytest.raises(DataError, match=r"ade20k/images/training is missing, and \d+ more of what was asked") as caught:
        refuse(tmp_path)
    assert "\n" not in str(caught.value)
    (table,) = caplog.messages
    for path in ("ade20k/annotations/training", "mapillary/config_v2.0.json", "refer_seg/refcoco+/refs(unc).p"):
        assert str(tmp_path / path) in table
    assert "llava_instruct_150k.json of liuhaotian" in table and "ReasonSeg archive" in table
    assert "refer_seg/refcoco/" not in table
    assert sum(str(tmp_path / "coco/train2017") in line for line in table.splitlines()) == 1


def test_what_is_there_is_no_matter(tmp_path: Path) -> None:
    data_sets.write_refer_seg(tmp_path)
    flags = {"dataset": "refer_seg", "sample_rates": "1", "refer_seg_data": "refcoco"}
    refuse(tmp_path, ValidationConfig(val_dataset="refcoco|unc|val"), **flags)
    with pytest.raises(DataError, match="reason_seg/ReasonSeg/val is missing; it comes with"):
        refuse(tmp_path, **flags)


def test_only_what_the_run_needs_is_asked_for(tmp_path: Path) -> None:
    data_sets.write_reason_seg(tmp_path, "val")
    refuse(tmp_path, ValidationConfig(eval_only=True))
    with pytest.raises(DataError, match="ReasonSeg/train is missing"):
        refuse(tmp_path, ValidationConfig(no_eval=True), dataset="reason_seg", sample_rates="1")


def test_a_missing_root_is_told_first(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no data root") as caught:
        refuse(tmp_path / "nowhere")
    assert caught.value.cause == "missing data root" and explain(caught.value)


@pytest.mark.parametrize("name", EVERY_SET)
def test_a_reader_refuses_what_the_table_names(tmp_path: Path, name: str) -> None:
    """The table and the readers have one idea of what a data set is made of."""
    missing = find_missing_files(requested_for_evaluation(f"{name}|train"), tmp_path)
    assert (
        len(missing) == len([part for part in required_files_of(name, "train") if part.is_required(str(tmp_path))]) >= 1
    )
    with pytest.raises(DataError) as caught:
        build_reader(name, tmp_path, "train")
    assert caught.value.cause in ("missing file", "missing folder")
    assert any(one.path in str(caught.value) for one in missing)


def test_folders_of_images_are_needed_where_a_record_names_them(tmp_path: Path) -> None:
    data_sets.write_muse(tmp_path)
    assert find_missing_files(requested_for_evaluation("MultiReasonSeg|train"), tmp_path) == []
    (tmp_path / data_sets.COCO / "val2017").rename(tmp_path / "away")
    (missing,) = find_missing_files(requested_for_evaluation("MultiReasonSeg|train"), tmp_path)
    assert missing.path.endswith("val2017") and missing.archive == "val2017.zip of COCO"
    data_sets.write_mixed(tmp_path, data_sets.mixed_records()[:1])
    (tmp_path / "gqa/images").rename(tmp_path / "gqa/away")
    assert (
        find_missing_files(requested_for_training(DataConfig(dataset="vqa", vqa_data="llava_v1_5_mix665k")), tmp_path)
        == []
    )


def test_table_and_sentence(tmp_path: Path) -> None:
    flags = {"dataset": "custom||refer_seg", "sample_rates": "1,1", "custom_data": "mine", "refer_seg_data": "refcoco"}
    missing = find_missing_files(requested_for_training(DataConfig(**flags)), tmp_path)
    table = missing_table(missing)
    assert len(table.splitlines()) == len(missing) == 5
    assert "custom|mine (train)" in table and "put it there as dataset/README.md draws it" in table
    assert missing_table([]) == ""
    assert missing_sentence(missing[:1]).startswith(f"the folder {tmp_path}/custom/mine/train is missing; put it there")
