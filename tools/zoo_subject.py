"""What every file of the zoo is written in: a model with the arguments of one call, and how inputs are made."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

_BATCH = 2


@dataclass(frozen=True, slots=True)
class Subject:
    """A model and the arguments of one call."""

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)


Build = Callable[[], Subject]


def image(size: int, channels: int = 3) -> torch.Tensor:
    """Return a batch of random square images."""
    return torch.randn(_BATCH, channels, size, size, generator=torch.Generator().manual_seed(0))


def without_torchvision_operators() -> None:
    """Make torchvision importable: the PyPI wheel's operators are not built for a CPU torch, and nothing needs them."""
    name = "torchvision._meta_registrations"
    sys.modules.setdefault(name, types.ModuleType(name))
