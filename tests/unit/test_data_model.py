"""What the data give goes through a PixelLM: conversations in words alone, by themselves and beside images."""

from pathlib import Path

import torch

from model.structures import TOWER_KEY
from tests.unit import data_sets
from tests.unit.tiny_pixellm import make_model
from utils.data.collate import Batch, collate
from utils.data.dataset import TrainingDataset
from utils.data.mixture import Mixture
from utils.data.readers.base import ReaderOptions
from utils.data.readers.registry import build_reader


def test_conversations_in_words_alone_train_the_language_model(tmp_path: Path) -> None:
    built = make_model()
    reader = build_reader("llava_v1_5_mix665k", data_sets.write_mixed(tmp_path), "train", ReaderOptions())
    made = TrainingDataset(Mixture([reader], [1.0], seed=0), built.processor, length=8)
    examples = [made[i] for i in range(8)]
    alone = [example for example in examples if example.original_size == (1, 1)]
    assert len(alone) == 2 and all(example.info["image_path"] == "" for example in alone)

    def text_loss(batch: Batch) -> torch.Tensor:
        losses = built.model(**batch.as_kwargs()).losses
        assert float(losses["ce"].count) == built.model.count_losses(**batch.as_kwargs())["ce"] > 0
        return losses["ce"].sum + losses["bce"].sum + losses["dice"].sum

    built.model.train()
    text_loss(collate(alone)).backward()
    parts = ("projector.", "mask_projector.", "codebook.", "language_model.")
    missing = [name for name, p in built.model.named_parameters() if name.startswith(parts) and p.grad is None]
    assert not missing, "another rank would wait for these forever"
    built.model.eval()
    with torch.no_grad():
        unseen = text_loss(collate(alone[:1]))
        batch = collate(alone[:1]).to("cpu")
        batch.pixel_values[TOWER_KEY] += 1.0
        assert torch.equal(text_loss(batch), unseen), "the stand-in image must not be seen"
        shown = next(example for example in examples if example.original_size != (1, 1))
        both, one = text_loss(collate([shown, alone[0]])), text_loss(collate([shown]))
        torch.testing.assert_close(both, one + unseen)
