"""What a run trains, kept in the run's folder from before its first step: config, processor and adapter settings.

With it a checkpoint of the run is merged without any flag that training had, and without the base, unless frozen
weights are in the base alone because training held them quantised.
"""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

from utils.checkpoints.builder import BuiltModel, ModelOptions, TrainingRecipe, build_model, language_tensors
from utils.checkpoints.export import load_and_merge
from utils.checkpoints.folders import BuildError
from utils.cli.atomic_files import open_atomic_folder, write_json

MODEL_FOLDER, ADAPTER_SETTINGS = "model_config", "adapter_settings.json"
LEVELS = 4
"""How many folders up from a checkpoint's files the run's folder may be."""


@dataclass(frozen=True)
class RunModel:
    """What was recorded of a run.

    Attributes:
        folder: a PixelLM folder without weights: config, processor, and what a published PixelLM held beside.
        recipe: LoRA, and which parts trained.
        bits: of the language model's frozen layers, which are not in the checkpoints then; None where they are.
        version: the folder the model was built from, where it was then.
    """

    folder: Path
    recipe: TrainingRecipe
    bits: int | None
    version: str

    @classmethod
    def find(cls, weight: Path) -> "RunModel | None":
        """The record beside a checkpoint, a file made of it, or in a folder above; None where there is none.

        BuildError where it cannot be read.
        """
        place = weight.expanduser().absolute()
        for folder in [place, *place.parents][: LEVELS + 1]:
            path = folder / MODEL_FOLDER / ADAPTER_SETTINGS
            if path.is_file():
                return cls._load(path)
        return None

    @classmethod
    def _load(cls, path: Path) -> "RunModel":
        try:
            settings = json.loads(path.read_text(encoding="utf-8"))
            known = {field.name for field in fields(TrainingRecipe)}
            recipe = TrainingRecipe(**{name: value for name, value in settings["recipe"].items() if name in known})
            return cls(path.parent, recipe, settings["bits"], settings["version"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BuildError(f"{path} is not what training wrote: it was changed or cut off") from error

    def merge(
        self, weights: dict[str, torch.Tensor], source: str, options: ModelOptions, base: str = ""
    ) -> tuple[BuiltModel, int]:
        """The model with trained weights in it and LoRA merged, and to how many layers.

        Args:
            source: where the weights are from, for messages. options: what is chosen otherwise than in training.
            base: where the base is now; needed only where frozen layers were quantised and the base has moved.
        """
        built = build_model(str(self.folder), options=options, load_weights=False)
        frozen = language_tensors(self._base(base, source)) if self.bits else {}
        return built, load_and_merge(built, weights, source, self.recipe.lora_alpha, frozen)

    def _base(self, base: str, source: str) -> Path:
        place = Path(base or self.version).expanduser()
        if not place.is_dir():
            raise BuildError(
                f"{source} lacks the frozen layers that training held in {self.bits} bits, and {place}, which has "
                "them, is not there: give the folder where the base is now with --version"
            )
        return place


def save_run_model(run: Path, built: BuiltModel, recipe: TrainingRecipe, bits: int | None, version: str) -> None:
    """Write run/model_config, no weights; the arguments are as in `RunModel`. OSError where it cannot be written."""
    settings = {"recipe": asdict(recipe), "bits": bits, "version": str(Path(version).expanduser().absolute())}
    with open_atomic_folder(run / MODEL_FOLDER) as folder:
        built.model.config.save_pretrained(folder)
        built.processor.save_pretrained(folder)
        if built.published is not None:
            built.published.save(folder)
        write_json(folder / ADAPTER_SETTINGS, settings)
