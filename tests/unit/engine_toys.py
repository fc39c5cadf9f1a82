"""A toy that obeys the forward protocol: two losses with uneven counts, a frozen matrix, LoRA-like parts."""

from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

WIDTH, CLASSES = 6, 5


class Term(NamedTuple):
    sum: torch.Tensor
    count: torch.Tensor


@dataclass
class Output:
    losses: dict[str, Term]


@dataclass
class ToyBatch:
    """features (N, WIDTH); labels (N,) with -100; targets: per sample (Q,) floats, any number of them."""

    features: torch.Tensor
    labels: torch.Tensor
    targets: list[torch.Tensor]
    info: list[dict[str, Any]] = field(default_factory=list)

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> "ToyBatch":
        features = self.features.to(device, dtype)
        return replace(
            self, features=features, labels=self.labels.to(device), targets=[t.to(device) for t in self.targets]
        )

    def as_kwargs(self) -> dict[str, Any]:
        return {"features": self.features, "labels": self.labels, "targets": self.targets}

    def counted(self) -> dict[str, Any]:
        return {"labels": self.labels, "targets": self.targets}


class Adapter(nn.Module):
    """y = W x + B A x with W frozen; B starts at zero, as LoRA's does."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(WIDTH, WIDTH)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(WIDTH, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, WIDTH, bias=False)})
        nn.init.zeros_(self.lora_B["default"].weight)
        self.base.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.lora_B["default"](self.lora_A["default"](x))


class Toy(nn.Module):
    """Text loss on labelled rows, mask loss on every target; without a target the mask part is still touched."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = Adapter()
        self.head = nn.Linear(WIDTH, CLASSES)
        self.mask_part = nn.Linear(WIDTH, 1)
        self.register_buffer("frequencies", torch.linspace(0.1, 1.0, WIDTH))

    @property
    def loss_weights(self) -> dict[str, float]:
        return {"ce": 1.0, "mask": 2.0}

    def count_losses(self, labels: torch.Tensor, targets: list[torch.Tensor], **_: Any) -> dict[str, float]:
        return {"ce": float((labels != -100).sum()), "mask": float(sum(len(t) for t in targets))}

    def forward(self, features: torch.Tensor, labels: torch.Tensor, targets: list[torch.Tensor]) -> Output:
        hidden = torch.tanh(self.trunk(features) + self.frequencies.to(features.dtype))
        wanted = labels != -100
        ce = F.cross_entropy(self.head(hidden[wanted]).float(), labels[wanted], reduction="sum")
        drawn = self.mask_part(hidden).float().squeeze(1)
        mask = drawn.sum() * 0.0
        for value, truth in zip(drawn, targets, strict=True):
            mask = mask + F.softplus(value * (truth * 2 - 1)).sum()
        count = torch.tensor(float(sum(map(len, targets))))
        return Output({"ce": Term(ce, wanted.sum().float()), "mask": Term(mask, count)})


def make_toy(seed: int = 0, warm: bool = False) -> Toy:
    """A toy with fixed weights; `warm` gives LoRA's B values."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        toy = Toy()
        if warm:
            nn.init.normal_(toy.trunk.lora_B["default"].weight)
    return toy


def make_samples(count: int, seed: int = 1) -> list[tuple[torch.Tensor, int, torch.Tensor]]:
    """Samples with zero to three targets; some without a label, some with neither."""
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for number in range(count):
        features = torch.randn(WIDTH, generator=generator)
        label = -100 if number % 4 == 3 else int(torch.randint(CLASSES, (), generator=generator))
        targets = torch.rand(number * 7 % 4, generator=generator).round()
        samples.append((features, label, targets))
    return samples


def collate(samples: list[tuple[torch.Tensor, int, torch.Tensor]]) -> ToyBatch:
    return ToyBatch(
        torch.stack([s[0] for s in samples]), torch.tensor([s[1] for s in samples]), [s[2] for s in samples]
    )


def cut(samples: list[Any], ranks: int, rounds: int, rank: int) -> list[ToyBatch]:
    """This rank's micro-batches when one step's samples are dealt out to `ranks` x `rounds`, in order."""
    size = len(samples) // (ranks * rounds)
    pieces = [samples[start : start + size] for start in range(0, len(samples), size)]
    return [collate(pieces[number * ranks + rank]) for number in range(rounds)]


def gradients(model: nn.Module) -> torch.Tensor:
    """All gradients as one vector, in order of names."""
    found = [p.grad for _, p in sorted(model.named_parameters()) if p.grad is not None]
    return torch.cat([g.flatten() for g in found])
