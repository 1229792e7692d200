"""The architectures that pruning is proved on: random weights, small sizes, nothing downloaded.

Each entry builds a model and the arguments of one call with a batch of 2.
"""

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


def families() -> dict[str, Callable[[], dict[str, Build]]]:
    """Return each family by name with the function that lists its members."""
    import zoo_attention
    import zoo_convolution
    import zoo_own
    import zoo_sequence
    import zoo_timm
    import zoo_transformers
    import zoo_transformers_more

    return {
        "torchvision": torchvision_classification,
        "timm": zoo_timm.subjects,
        "transformers": lambda: zoo_transformers.subjects() | zoo_transformers_more.subjects(),
        "own": zoo_own.subjects,
        "attention": lambda: zoo_attention.subjects,
        "convolution": lambda: zoo_convolution.subjects,
        "sequence": lambda: zoo_sequence.subjects,
    }


def image(size: int, channels: int = 3) -> torch.Tensor:
    """Return a batch of random square images."""
    return torch.randn(_BATCH, channels, size, size, generator=torch.Generator().manual_seed(0))


def without_torchvision_operators() -> None:
    """Make torchvision importable: the PyPI wheel's operators are not built for a CPU torch, and nothing needs them."""
    name = "torchvision._meta_registrations"
    sys.modules.setdefault(name, types.ModuleType(name))


def torchvision_classification() -> dict[str, Build]:
    """Return all of torchvision's classification architectures, `weights=None`."""
    without_torchvision_operators()
    from torchvision import models  # type: ignore[import-untyped]

    def builder(name: str) -> Build:
        return lambda: Subject(models.get_model(name, weights=None), (image(_torchvision_size(name)),))

    return {name: builder(name) for name in models.list_models(module=models)}


def _torchvision_size(name: str) -> int:
    """Return the smallest convenient image an architecture takes and still uses all of its parts on."""
    if name.startswith(("vit", "maxvit")):
        return 224  # the position embedding fixes it
    if name.startswith(("swin", "inception")):
        return 128  # several windows per image; five reductions of an inception stem
    return 64
