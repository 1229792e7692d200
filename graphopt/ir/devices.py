"""Devices: the one that tensors lie on, and the one that a user names."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import nn

from graphopt.errors import CaptureError, GraphOptError, PassError, UsageError, cut, first_line


def device_of(tensors: Mapping[str, torch.Tensor]) -> torch.device:
    """Return where tensors lie, the CPU where there are none; single numbers may be on the CPU, as torch lets them.

    Raises:
        CaptureError: they lie on several devices.
    """
    found: dict[torch.device, str] = {}
    for name, tensor in tensors.items():
        if tensor.dim():
            found.setdefault(tensor.device, name)
    if len(found) > 1:
        places = ", ".join(f"`{name}` on {device}" for device, name in found.items())
        raise CaptureError(f"The model lies on several devices ({places}). Move it to one: `model.to(...)`.")
    return next(iter(found), torch.device("cpu"))


def check_values(tensors: Mapping[str, torch.Tensor]) -> None:
    """Refuse tensors that are shapes alone, or sparse.

    Raises:
        CaptureError: naming one.
    """
    sparse = next((name for name, tensor in tensors.items() if tensor.layout is not torch.strided), None)
    if sparse is not None:
        raise CaptureError(
            f"`{sparse}` of the model is stored as {str(tensors[sparse].layout).removeprefix('torch.')}, which no "
            "runtime reads. Store it as `.to_dense()`."
        )
    name = next((name for name, tensor in tensors.items() if tensor.is_meta), None)
    if name is not None:
        raise CaptureError(
            f"`{name}` of the model lies on the device `meta` and has no values. Load what is stored of it "
            "(`model.load_state_dict(..., assign=True)`), and make anew what is not."
        )


def held_by(module: nn.Module) -> dict[str, torch.Tensor]:
    """Return parameters and buffers by name."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def device_called(name: str | torch.device) -> torch.device:
    """Return the device of a name; "auto" is the accelerator, where there is one that computes all that passes need.

    Raises:
        UsageError: there is none of that name here, or it has no double precision.
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if name == "auto":
        return torch.device(accelerator.type, 0) if accelerator and _doubles(accelerator) else torch.device("cpu")
    here = ["cpu"]
    if accelerator is not None:
        here += [f"{accelerator.type}:{index}" for index in range(torch.accelerator.device_count())]
    advice = f"Here there is {', '.join(here)}; `auto` is the accelerator where there is one."
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError) as err:
        raise UsageError(f"`{cut(str(name), 40)}` is no name of a device. {advice}") from err
    if device.type != "cpu":
        device = torch.device(device.type, device.index or 0)
    elif not device.index:
        device = torch.device("cpu")
    if str(device) not in here:
        raise UsageError(f"There is no device `{device}` that torch {torch.__version__} can use. {advice}")
    if not _doubles(device):
        raise UsageError(f"`{device}` has no double precision, which passes compute in. {advice}")
    return device


OUT_OF_MEMORY = (MemoryError, torch.OutOfMemoryError)  # tells nothing of what was run: to be passed on

_FOR_PASSES = (
    "Let the passes run on the CPU (--device cpu, or device='cpu'), or on fewer samples (such as prune:samples=64)."
)


@contextlib.contextmanager
def device_memory(error: type[GraphOptError] = PassError, advice: str = _FOR_PASSES) -> Iterator[None]:
    """Raise `error`, with what to do, where a device runs out of memory."""
    try:
        yield
    except torch.OutOfMemoryError as err:
        raise error(f"The device ran out of memory: {first_line(err)}. {advice}") from err


def _doubles(device: torch.device) -> bool:
    try:
        return torch.ones(1, dtype=torch.float64, device=device).tolist() == [1.0]
    except (RuntimeError, TypeError):  # as MPS raises
        return False
