"""Training goes on from a published folder as the release would: the first step's losses are those it recorded.

The whole way of the training script: folders, flags, builder, what trains, precision, engine.
"""

from pathlib import Path

import pytest
import torch

from tests.golden import released_folder, training, vectors
from utils.checkpoints.builder import MASK_PARTS, BuiltModel
from utils.cli.commands import parse_train
from utils.data.collate import Batch
from utils.engine.base import Engine, StepReport
from utils.engine.runtime import Runtime
from utils.engine.setup import make_engine
from utils.engine.train import build_for_training

GROUP = "forward_train"
CASES = vectors.case_names(GROUP, "cases")
ALONE = Runtime("plain", 0, 0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    place = tmp_path_factory.mktemp("published")
    return released_folder.write_pixellm(place / "pixellm"), released_folder.write_tower(place / "tower")


def start(folders: tuple[Path, Path]) -> tuple[BuiltModel, Engine]:
    """What the training script builds: refinement off and no dropout, everything else by default."""
    version, tower = folders
    flags = [f"--version={version}", f"--vision-tower={tower}", "--precision=fp32", "--engine=plain"]
    args = parse_train([*flags, "--refinement_alpha=1", "--lora_dropout=0"])
    built, _ = build_for_training(args)
    engine = make_engine(args, ALONE, built.model, tuple(f"{part}." for part in MASK_PARTS))
    built.model.train()  # as `Run.fit` does
    return built, engine


@pytest.fixture(scope="module")
def started(folders: tuple[Path, Path]) -> tuple[BuiltModel, Engine]:
    """Shared: its steps have a learning rate of 0."""
    return start(folders)


def step(engine: Engine, case: str, learning_rate: float) -> StepReport:
    """One optimizer step of one micro-batch, a recorded case."""
    seed = vectors.read_json(GROUP)["seed"]
    batch = Batch(**training.inputs(vectors.read_case(GROUP, case, "cases", case), seed))
    return engine.train_step([batch], learning_rate)


@pytest.mark.parametrize("case", CASES)
def test_first_losses_are_the_recorded_ones(case: str, started: tuple[BuiltModel, Engine]) -> None:
    built, engine = started
    recorded = vectors.read_json(GROUP)["cases"][case]["outputs"]
    report = step(engine, case, learning_rate=0.0)
    weights = built.model.loss_weights
    for name, ours in training.LOSS_NAMES.items():
        assert weights[ours] * report.losses[ours] == pytest.approx(recorded[name], rel=vectors.LOSS_RTOL), name
    assert report.total == pytest.approx(recorded["loss"], rel=vectors.LOSS_RTOL)
    assert report.applied and report.gradient_norm > 0


def test_what_it_started_as(started: tuple[BuiltModel, Engine]) -> None:
    """The release's numerics, and the paper's recipe: learned fusion from the release's constants on."""
    built, _ = started
    parameters = {name: value for name, value in built.model.named_parameters() if value.requires_grad}
    group = built.model.config.group_size
    assert parameters["codebook.token_weights"].detach().unique().tolist() == pytest.approx([1 / group])
    assert any(".lora_A." in name for name in parameters)
    assert "pixel_decoder.no_mask_embed.weight" in parameters


def test_it_goes_on_from_there(folders: tuple[Path, Path]) -> None:
    built, engine = start(folders)
    case = next(
        name
        for name, entry in vectors.read_json(GROUP)["cases"].items()
        if sum(map(sum, entry["target_counts_per_conversation"]))
    )
    before = {name: value.detach().clone() for name, value in built.model.named_parameters()}
    first, last = (step(engine, case, learning_rate=1e-4) for _ in range(2))
    # One small step downhill on the same images; another set's hills may be steeper.
    assert last.total < first.total or vectors.folder() != vectors.DATA
    moved = {name for name, value in built.model.named_parameters() if not torch.equal(value, before[name])}
    assert {"codebook.token_weights", "pixel_decoder.scale_weights", "pixel_decoder.neck.0.weight"} <= moved
    assert not any(name.startswith("vision_tower.") or ".base_layer." in name for name in moved)
