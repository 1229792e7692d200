"""AdamW whose steps are fractions of the size of each tensor, so that one rate suits convolutions and transformers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from graphopt.ir.torch_internals import multiply_each

# Floor of a tensor's root mean square, for biases that start at 0 (Adafactor: Shazeer and Stern 2018, section 8).
_SMALLEST_SIZE = 1e-3
_FUSED = ("cpu", "cuda")  # devices where torch 2.13 takes one step of all tensors in one kernel


class RelativeAdamW(torch.optim.AdamW):
    """AdamW on every tensor over the root mean square that it starts with.

    Adam's steps do not depend on the scale of gradients, so those of a tensor over its size are `size * rate`. All
    tensors are one group, and step together.

    Args:
        parameters: what is trained.
        rate: the largest step of an entry, as a fraction of the root mean square of its tensor.
    """

    def __init__(self, parameters: Iterable[torch.nn.Parameter], rate: float) -> None:
        parameters = list(parameters)
        fused = all(parameter.device.type in _FUSED for parameter in parameters)
        super().__init__(parameters, lr=rate, weight_decay=0.0, fused=fused or None)
        self._sizes = {
            parameter: max(float(parameter.detach().square().mean().sqrt()), _SMALLEST_SIZE) for parameter in parameters
        }

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Take one step."""
        moved = [parameter for parameter in self._sizes if parameter.grad is not None]
        multiply_each(moved, [1 / self._sizes[parameter] for parameter in moved])
        found = super().step(closure)
        multiply_each(moved, [self._sizes[parameter] for parameter in moved])
        return found
