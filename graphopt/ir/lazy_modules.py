"""Modules that take the shapes of their tensors from their first input."""

from __future__ import annotations

from torch import nn
from torch.nn.parameter import is_lazy

from graphopt.errors import CaptureError
from graphopt.ir.devices import held_by


def check_initialized(model: nn.Module) -> None:
    """Raise `CaptureError` if a tensor of `model` has no shape yet."""
    lazy = [name for name, tensor in held_by(model).items() if is_lazy(tensor)]
    if lazy:
        named = ", ".join(f"`{name}`" for name in lazy[:3]) + (f" and {len(lazy) - 3} more" if len(lazy) > 3 else "")
        raise CaptureError(
            f"{named} of the model have no shape yet, as in lazy modules before their first input. Run the model once "
            "before it is saved or handed over, in the function that builds it for instance."
        )
