"""Batches between processes: the same bytes through shared slots and in messages, slots freed and used again."""

import multiprocessing
import pickle
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from utils.data import passing
from utils.data.collate import PICTURE_KEY, Batch
from utils.data.passing import SharedSlots, make_slots

needs_fork = pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="workers are not forked")


def make_batch(seed: int = 0, side: int = 16) -> Batch:
    """Two pictures, channels last in memory; masks without and with ignored pixels, of odd sizes; no target at all."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (2, side, side, 3), generator=generator, dtype=torch.uint8).permute(0, 3, 1, 2)
    masks = [torch.randint(0, 2, (3, 7, 5), generator=generator, dtype=torch.uint8), torch.zeros(0, 4, 9).byte()]
    masks[0][1, 2] = 255
    ids = torch.randint(0, 99, (3, 6), generator=generator)
    return Batch(
        input_ids=ids,
        attention_mask=ids > 50,
        labels=ids - 100,
        pixel_values={PICTURE_KEY: pixels},
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
        (one.pixel_values[PICTURE_KEY], other.pixel_values[PICTURE_KEY]),
        *zip(one.masks, other.masks, strict=True),
    ]
    names = ("input_ids", "attention_mask", "labels", "resized_sizes", "original_sizes", "image_index")
    pairs += [(getattr(one, name), getattr(other, name)) for name in (*names, "target_questions")]
    for a, b in pairs:
        assert a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    assert one.pixel_values[PICTURE_KEY].stride() == other.pixel_values[PICTURE_KEY].stride()


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
