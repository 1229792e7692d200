"""Whether a model's tensors can take the values a file has for them: by their types, and the memory they share."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from graphopt.ir.ownership import storage_key
from graphopt.loading.state_dicts import dtype_name


def same_kind(one: torch.dtype, other: torch.dtype) -> bool:
    """Tell whether types differ in width at most; integers for other numbers are quantised, their scales elsewhere."""
    return (one.is_complex, one.is_floating_point) == (other.is_complex, other.is_floating_point)


def has_room(dtype: torch.dtype, value: torch.Tensor) -> bool:
    """Tell whether values can be stored as a type of their kind: integers as they are, others rounded at most."""
    if value.is_complex() or value.is_floating_point():
        return dtype == value.dtype or torch.equal(_wide(value).isfinite(), _wide(value.to(dtype)).isfinite())
    return not loses(dtype, value)


def loses(dtype: torch.dtype, value: torch.Tensor) -> bool:
    """Tell whether values are others when they are stored as a type."""
    return dtype != value.dtype and bool(_differences(value, value.to(dtype)).any())


def _differences(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Return where two tensors of one shape differ; what is no number in both does not."""
    one, other = _wide(one), _wide(other)
    return (one != other) & ~(one.isnan() & other.isnan())


def _wide(value: torch.Tensor) -> torch.Tensor:
    """Return values in a type that all operators have kernels for."""
    return value.to(torch.complex128 if value.is_complex() else torch.float64)


def types_of(name: str, stored: torch.Tensor, own: torch.Tensor) -> str:
    """Return of which types a tensor is, in words."""
    return f"{name} is {dtype_name(stored.dtype)} in the file and {dtype_name(own.dtype)} in the model"


def overwritten(tensors: Mapping[str, torch.Tensor], values: Mapping[str, torch.Tensor]) -> list[str]:
    """Return which tensors of a model would not keep their values: other names for the same memory have others.

    Args:
        tensors: of the model, in the order in which they are loaded.
        values: of the file, by the same names and of the same shapes.
    """
    sharing: dict[Any, list[str]] = defaultdict(list)
    for name, tensor in tensors.items():
        sharing[storage_key(tensor), tensor.dtype, tensor.is_conj(), tensor.is_neg()].append(name)
    return [said for names in sharing.values() if len(names) > 1 for said in _lost(names, tensors, values)]


def _lost(
    names: Sequence[str], tensors: Mapping[str, torch.Tensor], values: Mapping[str, torch.Tensor]
) -> Iterator[str]:
    """Store values one after the other, as loading does, and name those that are not there in the end."""
    first = tensors[names[0]]
    memory = torch.empty(first.untyped_storage().nbytes() // first.dtype.itemsize, dtype=first.dtype)
    writers = torch.empty(len(memory), dtype=torch.int32)
    places = [(tensor.shape, tensor.stride(), tensor.storage_offset()) for tensor in map(tensors.__getitem__, names)]
    for index, (name, place) in enumerate(zip(names, places, strict=True)):
        memory.as_strided(*place).copy_(values[name])
        writers.as_strided(*place).fill_(index)
    for name, place in zip(names, places, strict=True):
        differs = _differences(memory.as_strided(*place), values[name].to(first.dtype))
        if differs.any():
            yield f"{name} in that of {names[int(writers.as_strided(*place)[differs][0])]}"
