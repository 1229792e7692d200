"""How the odd structures of the zoo are written down: layers by name, inputs, one function that applies them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from zoo_subject import Build, Subject

Layers = dict[str, nn.Module | nn.Parameter | Tensor]
Forward = Callable[..., Any]


class Structure(nn.Module):
    """Holds layers, parameters and buffers by name and lets a function apply them."""

    def __init__(self, layers: Layers, forward: Forward) -> None:
        super().__init__()
        self.apply_layers = forward
        for name, layer in layers.items():
            if isinstance(layer, Tensor) and not isinstance(layer, nn.Parameter):
                self.register_buffer(name, layer)
            else:
                setattr(self, name, layer)

    def forward(self, *inputs: Tensor) -> Any:
        return self.apply_layers(self, *inputs)


class Table:
    """Collects structures under the names of their functions."""

    def __init__(self) -> None:
        self.subjects: dict[str, Build] = {}

    def add(self, layers: Callable[[], Layers], *inputs: tuple[int, ...] | Tensor) -> Callable[[Forward], Forward]:
        """Register the decorated function: it gets the layers as attributes of its first argument, then the inputs.

        Args:
            layers: makes them anew.
            inputs: example tensors, or the shapes of random ones; dimension 0 is the batch.
        """

        def register(forward: Forward) -> Forward:
            def build() -> Subject:
                generator = torch.Generator().manual_seed(0)
                args = [i if isinstance(i, Tensor) else torch.randn(i, generator=generator) for i in inputs]
                return Subject(Structure(layers(), forward), tuple(args))

            self.subjects[forward.__name__] = build
            return forward

        return register


def parameter(*shape: int) -> nn.Parameter:
    """Return a random parameter."""
    return nn.Parameter(torch.randn(shape) * 0.3)


def words(*shape: int, count: int = 30) -> Tensor:
    """Return random indices of words."""
    return torch.randint(0, count, shape, generator=torch.Generator().manual_seed(0))


def rows_model(width: int = 12, **more: nn.Module | nn.Parameter | Tensor) -> Layers:
    """Return a linear layer from 10 features to `width`, a head to 5, and what else is given."""
    return {"first": nn.Linear(10, width), "head": nn.Linear(width, 5), **more}


def image_model(width: int = 12, **more: nn.Module | nn.Parameter | Tensor) -> Layers:
    """Return a stem from 3 channels to `width`, its normalization, a head to 5, and what else is given."""
    return {"stem": conv(3, width), "norm": nn.BatchNorm2d(width), "head": nn.Linear(width, 5), **more}


def conv(inputs: int, outputs: int, kernel: int = 3, **options: Any) -> nn.Conv2d:
    """Return a convolution that keeps the image's size at stride 1."""
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2 * int(options.get("dilation", 1)), **options)


def pooled(m: Any, x: Tensor) -> Tensor:
    """Return the head of the mean over the image."""
    logits: Tensor = m.head(x.mean((2, 3)))
    return logits
