"""Which sample is number i, and what becomes of it: mixture, dataset, batches, loader."""

import pickle
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import cv2
import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from model.image_processing_pixellm import PreparedImage
from model.processing_pixellm import ConversationTooLong, EncodedConversation
from model.structures import IGNORE_TOKEN, TOWER_KEY
from tests.unit import data_sets
from utils.cli.config import DataConfig
from utils.data.collate import Batch, collate
from utils.data.dataset import RankBatches, TrainingDataset, build_loader
from utils.data.errors import DataError
from utils.data.mixture import Mixture, build_mixture
from utils.data.readers.base import Reader, ReaderOptions
from utils.data.samples import NO_IMAGE, Sample, Target, Turn
from utils.engine.stepping import count_step

SIDE = 8
SAIAPR = "refer_seg/images/saiapr_tc-12"


class FakeReader(Reader):
    """Sample `index` is called name/index/draw, the draw being a number of its random stream."""

    def __init__(self, name: str, length: int) -> None:
        super().__init__(name, "train", ReaderOptions())
        self.length = length

    def __len__(self) -> int:
        return self.length

    def read(self, index: int, rng: np.random.Generator) -> Sample:
        turn = Turn("what", "this", (), "text")
        return Sample("image", ((turn,),), self.name, f"{self.name}/{index}/{rng.integers(10**9)}")

    def read_all(self, index: int, rng: np.random.Generator) -> Sample:
        return self.read(index, rng)


def mixture(seed: int = 3) -> Mixture:
    return Mixture([FakeReader("a", 50), FakeReader("b", 7), FakeReader("c", 1000)], [2, 1, 3], seed)


def test_sample_i_depends_on_seed_and_i_alone() -> None:
    wanted = [mixture()[i] for i in range(3000)]
    backwards, revived = mixture(), pickle.loads(pickle.dumps(mixture()))
    for i in (2999, 0, 1024, 1023, 2048, 17, 2500):
        assert backwards[i] == wanted[i] == revived[i]
    other = [mixture(seed=4)[i].sample_id for i in range(100)]
    assert sum(a != b.sample_id for a, b in zip(other, wanted, strict=False)) > 90


def test_rates_are_kept() -> None:
    asked = Counter(mixture().locate(i)[0] for i in range(12_000))
    assert chisquare([asked[which] for which in range(3)], [4000, 2000, 6000]).pvalue > 0.001
    never = Mixture([FakeReader("a", 5), FakeReader("b", 5)], [1, 0], 0)
    assert {never.locate(i)[0] for i in range(500)} == {0}


def test_each_image_comes_once_before_any_comes_twice() -> None:
    drawn: dict[int, list[int]] = {0: [], 1: [], 2: []}
    mixed = mixture()
    for i in range(9000):
        which, image = mixed.locate(i)
        drawn[which].append(image)
    for which, length in ((0, 50), (1, 7), (2, 1000)):
        rounds = [drawn[which][start : start + length] for start in range(0, len(drawn[which]) - length + 1, length)]
        assert len(rounds) > 2
        assert all(sorted(images) == list(range(length)) for images in rounds)
        assert rounds[0] != rounds[1]


README_SETS = {
    "ade20k": (data_sets.write_ade20k, "ade20k/annotations"),
    "cocostuff": (data_sets.write_cocostuff, "cocostuff"),
    "pascal_part": (data_sets.write_parts, "vlpart/pascal_part"),
    "paco_lvis": (lambda root: data_sets.write_parts(root, "paco_lvis"), "vlpart/paco"),
    "mapillary": (data_sets.write_mapillary, "mapillary"),
    "refclef": (lambda root: data_sets.write_refer_seg(root, "refclef"), "refer_seg/refclef"),
    "saiapr": (lambda root: data_sets.write_image(root / SAIAPR / "COCO_1.jpg"), SAIAPR),
    "refcoco": (data_sets.write_refer_seg, "refer_seg/refcoco"),
    "refcoco+": (lambda root: data_sets.write_refer_seg(root, "refcoco+"), "refer_seg/refcoco+"),
    "refcocog": (
        lambda root: data_sets.write_refer_seg(root, "refcocog", refs_file="refs(umd).p"),
        "refer_seg/refcocog",
    ),
    "llava_instruct_150k": (data_sets.write_vqa, "llava_dataset"),
    "MUSE": (data_sets.write_muse, "muse"),
}


def test_the_readmes_data_are_read_and_each_is_missed_by_its_path(tmp_path: Path) -> None:
    """With the defaults of --dataset, --sem_seg_data and the others, which are those of the README's command."""
    data = DataConfig(dataset_dir=str(tmp_path))
    for write, _ in README_SETS.values():
        write(tmp_path)
    mixed = build_mixture(data, seed=0)
    names = {reader.name for reader in mixed.readers}
    assert names == {"MultiReasonSeg", *README_SETS} - {"MUSE", "saiapr"}
    shares = dict(zip([reader.name for reader in mixed.readers], mixed.shares * 17, strict=True))
    assert shares["ade20k"] == pytest.approx(2 / 5) and shares["refclef"] == pytest.approx(9 / 4)
    assert shares["MultiReasonSeg"] == pytest.approx(4)
    for _, path in README_SETS.values():
        (tmp_path / path).rename(tmp_path / "away")
        with pytest.raises(DataError, match=rf"{re.escape(path)}.* is missing; it comes with ") as caught:
            build_mixture(data, seed=0)
        assert "\n" not in str(caught.value)
        (tmp_path / "away").rename(tmp_path / path)


def test_wrong_rates_are_refused(tmp_path: Path) -> None:
    data_sets.write_muse(data_sets.write_refer_seg(tmp_path))

    def build(dataset: str, rates: str) -> Mixture:
        data = DataConfig(
            dataset_dir=str(tmp_path),
            dataset=dataset,
            sample_rates=rates,
            sem_seg_data="ade20k",
            refer_seg_data="refcoco||refcoco",
        )
        return build_mixture(data, seed=0)

    both = build("refer_seg||multi_reason_seg", "3,1")
    assert both.shares.tolist() == [0.375, 0.375, 0.25]
    assert "MultiReasonSeg (train): 25.0% of samples, 2 images; left out: 1 × " in both.describe()
    assert both.fingerprint == build("refer_seg||multi_reason_seg", "1,1").fingerprint
    data_sets.write_muse(tmp_path, data_sets.muse_records()[:1])
    assert both.fingerprint != build("refer_seg||multi_reason_seg", "3,1").fingerprint
    for dataset, rates, said in (
        ("refer_seg||multi_reason_seg", "1", "has 1 numbers, --dataset .* has 2 families"),
        ("refer_seg", "1,2", "2 numbers"),
        ("refer_seg", "x", "expected numbers joined by commas"),
        ("refer_seg", "", "expected numbers joined by commas"),
        ("refer_seg", "-1", "0 or more"),
        ("refer_seg", "nan", "0 or more"),
        ("refer_seg", "0", "not all 0"),
        ("refer_seg||", "1,1", "--dataset names ''"),
        ("vqa", "1", "llava_instruct_150k.json is missing"),
    ):
        with pytest.raises(DataError, match=said):
            build(dataset, rates)
    with pytest.raises(DataError, match="2 rates are given for 1"):
        Mixture([FakeReader("a", 1)], [1, 2], 0)
    with pytest.raises(DataError, match="seed of the data is -1"):
        Mixture([FakeReader("a", 1)], [1], -1)


class FakeProcessor:
    """One token per word; keeps whole turns up to `most` tokens."""

    def __init__(self, most: int = 10**6) -> None:
        self.most = most

    def open_image(self, source: Any) -> np.ndarray:
        return cv2.imread(source)

    def prepare_image(self, source: Any) -> PreparedImage:
        array = self.open_image(source) if isinstance(source, str) else source
        resized = np.full((6, SIDE, 3), int(array.mean()), dtype=np.uint8)
        return PreparedImage(resized, SIDE, array.shape[:2])

    @staticmethod
    def pixel_statistics(pixels: torch.Tensor, resized_sizes: torch.Tensor) -> torch.Tensor:
        """The height of the image in its square is taken off every number."""
        return pixels.float() - resized_sizes[:, :1, None, None]

    def encode_conversation(self, turns: list[tuple[str, str]], with_image: bool) -> EncodedConversation:
        ids: list[int] = [] if with_image else [3]
        groups: list[int] = []
        kept = 0
        for number, (question, answer) in enumerate(turns):
            if len(ids) + len(question.split()) + len(answer.split()) > self.most:
                break
            ids += [1] * len(question.split()) + [2] * len(answer.split())
            groups += [number] * answer.count("{seg}")
            kept += 1
        if not kept:
            raise ConversationTooLong
        tokens = torch.tensor(ids)
        return EncodedConversation(tokens, tokens.where(tokens == 2, IGNORE_TOKEN), groups, kept, len(turns) - kept)


@dataclass
class Square:
    """A mask with so many pixels set."""

    pixels: int
    shape: tuple[int, int] = (4, 5)

    def __call__(self) -> np.ndarray:
        mask = np.zeros(self.shape, dtype=np.uint8)
        mask.flat[: self.pixels] = 1
        return mask


def turn(*pixels: int, words: int = 3) -> Turn:
    targets = tuple(Target(f"thing {number}", Square(number)) for number in pixels)
    kind = ("no_target", "direct")[len(pixels)] if len(pixels) < 2 else "several"
    return Turn("q " * words, "a " + "{seg} " * len(pixels), targets, kind)


@dataclass
class Listed:
    """A mixture of given samples, over and over."""

    samples: list[Sample]

    def __getitem__(self, i: int) -> Sample:
        return self.samples[i % len(self.samples)]


@pytest.fixture
def image(tmp_path: Path) -> str:
    return str(data_sets.write_image(tmp_path / "image.png", 4, 5))


def dataset(samples: list[Sample], processor: FakeProcessor, length: int = 8) -> TrainingDataset:
    return TrainingDataset(Listed(samples), processor, length)  # type: ignore[arg-type]


def test_a_batch_orders_targets_by_image_row_and_place(image: str) -> None:
    samples = [
        Sample(image, ((turn(1, 2), turn(), turn(3)), (turn(4, words=9),)), "d", "first"),
        Sample(image, ((turn(),),), "d", "second"),
        Sample(image, ((turn(5),),), "d", "third"),
    ]
    made = dataset(samples, FakeProcessor())
    batch = collate([made[i] for i in range(3)], pad_token_id=9)
    assert batch.image_index.tolist() == [0, 0, 1, 2]
    assert [masks.shape for masks in batch.masks] == [(4, 4, 5), (0, 4, 5), (1, 4, 5)]
    assert [masks.sum(dim=(1, 2)).tolist() for masks in batch.masks] == [[1, 2, 3, 4], [], [5]]
    assert all(masks.dtype == torch.uint8 for masks in batch.masks)
    assert batch.target_questions.tolist() == [0, 0, 1, 2, 3]
    assert batch.pixel_values[TOWER_KEY].shape == (3, 3, SIDE, SIDE)
    assert batch.original_sizes.tolist() == [[4, 5]] * 3 and batch.resized_sizes.tolist() == [[6, SIDE]] * 3
    lengths = batch.attention_mask.sum(1).tolist()
    assert lengths == [15, 11, 4, 5]
    for row, length in enumerate(lengths):
        assert (batch.input_ids[row, length:] == 9).all() and (batch.input_ids[row, :length] != 9).all()
        assert (batch.labels[row, length:] == IGNORE_TOKEN).all()
        assert not batch.attention_mask[row, length:].any()
    assert batch.info[0]["kinds"] == ["several", "no_target", "direct", "direct"]
    assert batch.info[2]["sample_id"] == "third" and batch.info[0]["dropped_turns"] == 0


def test_batches_without_any_target_and_moving_them(image: str) -> None:
    batch = collate([dataset([Sample(image, ((turn(),),), "d", "s")], FakeProcessor())[0]])
    assert batch.target_questions.shape == (0,) and batch.target_questions.dtype == torch.long
    moved = batch.to("cpu", torch.bfloat16)
    assert moved.pixel_values[TOWER_KEY].dtype == torch.bfloat16 and moved.input_ids.dtype == torch.long
    assert batch.pixel_values[TOWER_KEY].dtype == torch.uint8, "the batch itself must not change"
    for done in (batch.to("cpu"), batch.to("cpu").to("cpu")):
        assert done.pixel_values[TOWER_KEY].dtype == torch.float32 and done.normalise is None
        pixels = done.pixel_values[TOWER_KEY]
        assert (pixels[:, :, :6] == 90 - 6).all(), "normalised once: 90 less the height of 6"
        assert (pixels[:, :, 6:] == -6).all(), "black beside the image"
    assert torch.equal(batch.as_kwargs()["pixel_values"][TOWER_KEY], done.pixel_values[TOWER_KEY])
    assert list(batch.as_kwargs()) == [
        *("input_ids", "attention_mask", "labels", "pixel_values", "resized_sizes", "original_sizes"),
        *("image_index", "masks", "target_questions"),
    ]


def test_losses_are_counted_without_touching_an_image(image: str) -> None:
    """A step asks every micro-batch for its counts: to normalise its images for that took half of its CPU time."""
    sample = Sample(image, ((turn(1, 2),),), "d", "s")
    batch = collate([dataset([sample], FakeProcessor())[0], dataset([sample], FakeProcessor())[0]])
    normalised: list[int] = []
    batch.normalise = lambda pixels, _: normalised.append(1) or pixels.float()  # type: ignore[func-returns-value]
    model = Mock(loss_weights={"ce": 1.0})
    model.count_losses = lambda labels, masks: {"ce": float((labels[:, 1:] != IGNORE_TOKEN).sum())}
    labelled = int((batch.labels[:, 1:] != IGNORE_TOKEN).sum())
    assert labelled > 0
    assert count_step(model, [batch, batch], lambda numbers: numbers) == {"ce": 2 * labelled}
    assert not normalised
    batch.as_kwargs()
    assert normalised == [1], "forward's arguments are what needs them"


def test_a_batch_is_the_same_after_a_journey_between_processes(image: str) -> None:
    samples = [Sample(image, ((turn(1, 2),),), "d", "first"), Sample(image, ((turn(),),), "d", "second")]
    made = dataset(samples, FakeProcessor())
    batch = collate([made[0], made[1]])
    batch.pixel_values[TOWER_KEY][0, 1, 2, 3] = 7
    batch.masks[0][0, 3, 4] = 255
    floating = batch.to("cpu", torch.bfloat16)
    for sent in (batch, floating):
        received = pickle.loads(pickle.dumps(sent))
        assert received.info == sent.info and received.normalise == sent.normalise
        for name, value in sent.as_kwargs().items():
            other = received.as_kwargs()[name]
            if isinstance(value, torch.Tensor):
                value, other = [value], [other]
            elif isinstance(value, dict):
                value, other = list(value.values()), list(other.values())
            for one, two in zip(value, other, strict=True):
                assert one.dtype == two.dtype and torch.equal(one, two), name


def test_dropped_turns_take_their_masks_along_and_are_counted(image: str) -> None:
    sample = Sample(image, ((turn(1), turn(2, 3), turn(4)), (turn(5, words=50),), (turn(6),)), "d", "s")
    example = dataset([sample], FakeProcessor(most=11))[0]
    assert example.masks.sum(dim=(1, 2)).tolist() == [1, 2, 3, 6]
    assert [conversation.group_turns for conversation in example.conversations] == [[0, 1, 1], [0]]
    lost = {name: example.info[name] for name in ("dropped_turns", "dropped_targets", "dropped_conversations")}
    assert lost == {"dropped_turns": 2, "dropped_targets": 2, "dropped_conversations": 1}
    assert example.info["kinds"] == ["direct", "several", "direct"]


def test_a_sample_that_is_too_long_altogether_is_replaced_by_one_that_follows_from_i(image: str) -> None:
    long, short = (Sample(image, ((turn(1, words=n),),), "d", f"{n} words") for n in (50, 2))
    made = dataset([long, short], FakeProcessor(most=20), length=3)
    assert [made[i].info["sample_id"] for i in (0, 1, 2)] == ["2 words"] * 3
    assert [made[i].info["replaced_samples"] for i in (0, 1, 2)] == [1, 0, 1]
    with pytest.raises(DataError, match=r"^9 samples in a row, from number 0 on.*raise --model_max_length"):
        dataset([long], FakeProcessor(most=20))[0]


def test_a_mask_of_another_size_is_refused(image: str) -> None:
    odd = Turn("q", "a {seg}", (Target("thing", Square(1, (5, 4))),), "direct")
    with pytest.raises(DataError, match=r"mask of 'thing' in s1 has 5×4 pixels, its image .*image\.png 4×5"):
        dataset([Sample(image, ((odd,),), "d", "s1")], FakeProcessor())[0]


def test_a_sample_without_a_image(image: str) -> None:
    samples = [
        Sample(NO_IMAGE, ((turn(), turn()),), "d", "words alone"),
        Sample(image, ((turn(2),),), "d", "shown"),
    ]
    made = dataset(samples, FakeProcessor())
    batch = collate([made[0], made[1]])
    assert batch.image_index.tolist() == [0, 1] and batch.input_ids[:, 0].tolist() == [3, 1]
    assert [masks.shape for masks in batch.masks] == [(0, 1, 1), (1, 4, 5)]
    assert (batch.pixel_values[TOWER_KEY][0] == 0).all() and batch.original_sizes.tolist() == [[1, 1], [4, 5]]
    with pytest.raises(ValueError, match="words has targets but no image"):
        Sample(NO_IMAGE, ((turn(1),),), "d", "words")


def samples_in_order(batches: list[list[Batch]]) -> list[str]:
    return [info["sample_id"] for ranks in batches for batch in ranks for info in batch.info]


@pytest.mark.parametrize(("ranks", "batch_size"), [(1, 8), (2, 4), (4, 2), (2, 1)])
def test_the_order_over_all_ranks_is_that_of_one(image: str, ranks: int, batch_size: int) -> None:
    samples = [Sample(image, ((turn(1),),), "d", f"{number}") for number in range(16)]
    made = dataset(samples, FakeProcessor(), length=16)
    common = {"world_size": ranks, "batch_size": batch_size, "pad_token_id": 0, "workers": 0}
    loaders = [list(build_loader(made, rank=rank, **common)) for rank in range(ranks)]  # type: ignore[arg-type]
    assert samples_in_order(list(map(list, zip(*loaders, strict=True)))) == [f"{number}" for number in range(16)]
    later = [list(build_loader(made, rank=rank, first=8, **common)) for rank in range(ranks)]  # type: ignore[arg-type]
    assert samples_in_order(list(map(list, zip(*later, strict=True)))) == [f"{number}" for number in range(8, 16)]


def test_the_order_does_not_depend_on_workers(tmp_path: Path) -> None:
    data_sets.write_muse(data_sets.write_refer_seg(tmp_path))
    data = DataConfig(
        dataset_dir=str(tmp_path),
        dataset="refer_seg||multi_reason_seg",
        sample_rates="1,1",
        refer_seg_data="refcoco",
        num_classes_per_question=1,
    )
    mixed = build_mixture(data, seed=5)
    made = TrainingDataset(mixed, FakeProcessor(), 12)
    alone, shared = (
        list(build_loader(made, rank=0, world_size=1, batch_size=3, pad_token_id=0, workers=workers))
        for workers in (0, 2)
    )
    assert len(alone) == len(shared) == 4
    for one, other in zip(alone, shared, strict=True):
        assert one.info == other.info
        assert torch.equal(one.input_ids, other.input_ids)
        assert all(torch.equal(a, b) for a, b in zip(one.masks, other.masks, strict=True))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_loader_gives_its_batches_as_often_as_asked(image: str, workers: int) -> None:
    made = dataset([Sample(image, ((turn(1),),), "d", "s")], FakeProcessor(), length=34)
    loader = build_loader(made, rank=0, world_size=1, batch_size=2, pad_token_id=0, workers=workers)
    assert len(loader) == 17
    for _ in range(2):
        numbers = [[info["number"] for info in batch.info] for batch in loader]
        assert numbers == [[2 * place, 2 * place + 1] for place in range(17)]


def test_batches_that_do_not_come_out_even_are_refused() -> None:
    assert list(RankBatches(1, 2, 3, stop=12)) == [[3, 4, 5], [9, 10, 11]]
    for wrong in ({"stop": 13}, {"stop": 12, "first": 3}):
        with pytest.raises(ValueError, match="do not part into batches of 2 ranks × 3"):
            RankBatches(0, 2, 3, **wrong)
    with pytest.raises(ValueError, match="rank 2 of 2"):
        RankBatches(2, 2, 3, stop=12)
