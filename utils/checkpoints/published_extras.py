"""What a published PixelLM holds and our model has no place for, kept so that it can be given back unchanged.

It stands in `published/` of our folder: tensors that no number depends on, its config, its tokenizer's files.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from utils.checkpoints.folders import BuildError, first_sentence

EXTRAS_FOLDER, EXTRAS_TENSORS = "published", "extras.safetensors"
EXTRAS_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)


@dataclass
class PublishedExtras:
    """What a published PixelLM holds beside what our model has a place for.

    tensors: by their published names. files: content of its small files by name.
    """

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)

    def save(self, folder: Path) -> None:
        """Write it into a folder of ours."""
        place = folder / EXTRAS_FOLDER
        place.mkdir(exist_ok=True)
        # Old files may hold one storage twice, which safetensors does not write.
        save_file({name: value.clone() for name, value in self.tensors.items()}, place / EXTRAS_TENSORS)
        for name, content in self.files.items():
            (place / name).write_bytes(content)

    @classmethod
    def load(cls, folder: Path) -> "PublishedExtras | None":
        """Read it from a folder of ours; None where there is none. BuildError where it cannot be read."""
        place = folder / EXTRAS_FOLDER
        if not (place / EXTRAS_TENSORS).is_file():
            return None
        try:
            return cls(load_file(place / EXTRAS_TENSORS), read_small_files(place))
        except (SafetensorError, OSError) as error:
            raise BuildError(
                f"{place / EXTRAS_TENSORS} cannot be read ({first_sentence(error)}): copy it again, or remove the "
                f"folder {place} if the published layout is never to be written again"
            ) from error


def read_small_files(folder: Path) -> dict[str, bytes]:
    """Config and tokenizer files of a folder, by name."""
    return {name: (folder / name).read_bytes() for name in EXTRAS_FILES if (folder / name).is_file()}
