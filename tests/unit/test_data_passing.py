"""Batches between processes: the same bytes through shared slots and in messages, slots freed and used again."""

import multiprocessing
import pickle
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from model.structures import TOWER_KEY
from utils.data import passing
from utils.data.collate import Batch, EncodedRow, Example, collated, parcel
from utils.data.masks import Window, WindowedMasks
from utils.data.passing import Corner, SharedSlots, make_slots

needs_fork = pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="workers are not forked")


def make_batch(seed: int = 0, side: int = 16) -> Batch:
    """Two images, channels last in memory; masks without and with ignored pixels, of odd sizes; no target at all."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (2, side, side, 3), generator=generator, dtype=torch.uint8).permute(0, 3, 1, 2)
    masks = [torch.randint(0, 2, (3, 7, 5), generator=generator, dtype=torch.uint8), torch.zeros(0, 4, 9).byte()]
    masks[0][1, 2] = 255
    ids = torch.randint(0, 99, (3, 6), generator=generator)
    return Batch(
        input_ids=ids,
        attention_mask=ids > 50,
        labels=ids - 100,
        pixel_values={TOWER_KEY: pixels},
        resized_sizes=torch.tensor([[16, 8], [4, 16]]),
        original_sizes=torch.tensor([[7, 5], [4, 9]]),
        image_index=torch.tensor([0, 0, 1]),
        masks=masks,
        target_questions=torch.empty(0, dtype=torch.long),
        info=[{"number": seed}, {}],
    )


def assert_same(one: Batch, other: Batch) -> None:
    assert one.info == other.info and len(one.masks) == len(other.masks)
    pairs = [
        (one.pixel_values[TOWER_KEY], other.pixel_values[TOWER_KEY]),
        *zip(one.masks, other.masks, strict=True),
    ]
    names = ("input_ids", "attention_mask", "labels", "resized_sizes", "original_sizes", "image_index")
    pairs += [(getattr(one, name), getattr(other, name)) for name in (*names, "target_questions")]
    for a, b in pairs:
        assert a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    assert one.pixel_values[TOWER_KEY].stride() == other.pixel_values[TOWER_KEY].stride()


@pytest.fixture
def own_slots(monkeypatch: pytest.MonkeyPatch) -> Iterator[SharedSlots]:
    """This process sends through slots, as a worker does, and receives from them, as the run does."""
    slots = SharedSlots(slots=2, slot_bytes=1 << 14)
    monkeypatch.setattr(SharedSlots, "_own", None)
    slots.send_through()
    yield slots


@needs_fork
def test_a_batch_is_the_same_through_a_slot_and_in_a_message(own_slots: SharedSlots) -> None:
    small, large = make_batch(), make_batch(side=80)  # which does not fit into a slot
    through_slot, in_message = pickle.dumps(small), pickle.dumps(large)
    assert len(through_slot) < 2000 < 2 * 80 * 80 * 3 < len(in_message)
    for content, batch in ((through_slot, small), (in_message, large)):
        assert_same(pickle.loads(content), batch)


def make_example(number: int) -> Example:
    """An image of 3 by 5 pixels in a square of 8, with a row of `number` tokens, and masks of which one has 255."""
    rng = np.random.default_rng(number)
    corner = Corner(rng.integers(1, 256, (3, 5, 3), dtype=np.uint8), 8)
    windows = [Window(2, 1, np.ones((4, 3), dtype=np.uint8)), Window(0, 0, np.full((1, 9), 255, dtype=np.uint8))]
    ids = torch.arange(number)
    rows = [EncodedRow(ids, -ids, [0, 0])]
    return Example(corner, (3, 5), (7, 9), rows, WindowedMasks((7, 9), windows[: number % 3]), {"number": number})


@needs_fork
@pytest.mark.parametrize("slot_bytes", [1 << 14, 1 << 8])
def test_a_parcel_arrives_as_its_batches(monkeypatch: pytest.MonkeyPatch, slot_bytes: int) -> None:
    """Squares and masks are drawn by who receives them; three examples are a batch of two and one of one."""
    monkeypatch.setattr(SharedSlots, "_own", None)
    SharedSlots(slots=1, slot_bytes=slot_bytes).send_through()
    examples = [make_example(number) for number in (4, 5, 6)]
    arrived, expected = pickle.loads(pickle.dumps(parcel(examples, 2, 9))), collated(examples, 2, 9)
    assert [len(batch.masks) for batch in arrived] == [2, 1]
    for one, other in zip(arrived, expected, strict=True):
        assert_same(one, other)
    pixels, masks = arrived[0].pixel_values[TOWER_KEY], arrived[0].masks
    np.testing.assert_array_equal(pixels[1, :, :3, :5].permute(1, 2, 0), examples[1].pixel_values.pixels)
    assert not pixels[:, :, 3:].any() and not pixels[:, :, :, 5:].any(), "black beside the images"
    assert [one.shape for one in masks] == [(1, 7, 9), (2, 7, 9)]
    assert masks[1].sum(dim=(1, 2)).tolist() == [4 * 3, 9 * 255] and masks[1][0, 2:6, 1:4].all()
    assert arrived[0].input_ids.tolist() == [[0, 1, 2, 3, 9], [0, 1, 2, 3, 4]]
    assert arrived[0].attention_mask.sum(1).tolist() == [4, 5] and arrived[0].labels[0].tolist() == [
        0,
        -1,
        -2,
        -3,
        -100,
    ]


@needs_fork
def test_slots_are_used_again_and_what_finds_none_goes_in_a_message(own_slots: SharedSlots) -> None:
    batches = [make_batch(seed) for seed in range(3)]
    contents = [pickle.dumps(batch) for batch in batches]
    assert len(contents[0]) == len(contents[1]) < len(contents[2]), "there are two slots"
    received = [pickle.loads(content) for content in contents]
    again = [make_batch(seed) for seed in (7, 8)]
    after = [pickle.dumps(batch) for batch in again]
    assert [len(content) for content in after] == [len(content) for content in contents[:2]]
    for batch, found in zip(batches + again, received + [pickle.loads(content) for content in after], strict=True):
        assert_same(found, batch)  # the first ones too, whose slots hold others by now


@needs_fork
def test_a_forked_worker_sends_through_the_slots_of_the_run() -> None:
    (slots,) = make_slots(1)
    forking = multiprocessing.get_context("fork")
    results = forking.SimpleQueue()
    made = [make_batch(seed) for seed in range(8)]

    def work() -> None:
        slots.send_through()
        for batch in made:
            results.put(batch)

    worker = forking.Process(target=work)
    worker.start()
    for batch in made:
        assert_same(results.get(), batch)
    worker.join()
    assert np.asarray(slots._memory).any(), "nothing went through the slots"


def test_without_slots_batches_go_in_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where workers are spawned, to which no memory is handed down."""
    assert SharedSlots._own is None
    assert_same(pickle.loads(pickle.dumps(make_batch())), make_batch())
    monkeypatch.setattr(passing.multiprocessing, "get_all_start_methods", lambda: ["spawn"])
    assert make_slots(2) == []
    monkeypatch.undo()

    def full(*_: object) -> None:
        raise OSError("no memory")

    monkeypatch.setattr(passing.mmap, "mmap", full)
    assert make_slots(2) == []


@needs_fork
def test_slots_do_not_follow_into_a_process_that_is_not_forked() -> None:
    assert pickle.loads(pickle.dumps(make_slots(1))) == [None]
