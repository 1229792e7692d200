"""Calls of operators that their kernels must refuse or survive, for `tools/fuzz_operators.py`.

Of three calls of an operator two are what torch's own tests call it with, something changed, where they do; the others
are made of its schema.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from graphopt.ir.torch_internals import OpOverload

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
Recorded = dict[OpOverload, list[Arguments]]

_INTEGERS = (-1, 0, 1, 2, 3, 7, 77, -77, 1000, 10**6, -(10**6), 2**31 - 1, -(2**31), 2**40)
_FLOATS = (0.0, 1.0, -1.0, 1e-30, 1e30, math.nan, math.inf, 0.5, 1e-8, 100.0)
_DTYPES = (
    *(torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64),
    *(torch.int64, torch.int32, torch.uint8, torch.bool),
)
_TEXTS = (
    *("none", "mean", "sum", "prod", "amax", "linear", "nearest", "bilinear", "bicubic", "reflect", "replicate"),
    *("constant", "circular", "zeros", "border", "valid", "same", "left", "right", "L", "U", "ij", "xy", "i,j->ij"),
    *("gelu", "tanh", "fro", "nuc", "floor", "trunc", "gels", "gelsd", "backward", "ortho", "forward"),
)
_LITERALS: dict[str, tuple[Any, ...]] = {
    "ScalarType": (*_DTYPES, 7, -1, 10**6),
    "Layout": (torch.strided, torch.sparse_coo, 77),
    "MemoryFormat": (torch.contiguous_format, torch.channels_last, torch.preserve_format, 77),
    "Device": ("cpu", "meta"),
    "Generator": (None,),
}
_LARGEST = 3_000_000


def make_call(operator: OpOverload, index: int, seed: int, recorded: Recorded) -> Arguments:
    """Return arguments that depend on nothing else; tensors are allocated anew."""
    rng = random.Random(f"{seed} {operator} {index}")
    torch.manual_seed(index)
    honest = recorded.get(operator)
    if honest and index % 3:
        args, kwargs = pytree.tree_map_only(Tensor, torch.clone, rng.choice(honest))
        return _changed(rng, args, kwargs)
    return _of_schema(rng, operator)


def described(arguments: Arguments) -> str:
    """Return arguments as text, tensors with their shapes and few elements."""

    def shown(tensor: Tensor) -> str:
        elements = f" = {tensor.flatten().tolist()}" if 0 < tensor.numel() < 5 else ""
        strides = "" if tensor.is_contiguous() else f" strides {tensor.stride()}"
        return f"{str(tensor.dtype).removeprefix('torch.')}{tuple(tensor.shape)}{strides}{elements}"

    args, kwargs = pytree.tree_map_only(Tensor, shown, arguments)
    return ", ".join([*map(str, args), *(f"{name}={value}" for name, value in kwargs.items())])


def _tensor(rng: random.Random, shape: list[int], dtype: torch.dtype) -> Tensor:
    if math.prod(shape) > _LARGEST:
        shape = [min(size, 20) for size in shape]
    if dtype.is_floating_point or dtype.is_complex:
        made = torch.rand(shape) if rng.random() < 0.7 else torch.full(shape, rng.choice((*_FLOATS, 1e6, -1e6)))
    elif dtype in (torch.bool, torch.uint8):
        made = torch.randint(0, 256, shape) if rng.random() < 0.5 else torch.randint(0, 2, shape)
    else:
        made = torch.randint(0, 4, shape) if rng.random() < 0.5 else torch.randint(-3, 10, shape)
        if made.numel() and rng.random() < 0.5:
            made.view(-1)[rng.randrange(made.numel())] = rng.choice((-1, -5, 100, 10**6, -(10**6), 2**31 - 1))
    return made.to(dtype)


def _shape(rng: random.Random) -> list[int]:
    return [rng.choice((0, 1, 1, 2, 3, 4, 5, 8, 33)) for _ in range(rng.choice((0, 1, 1, 2, 2, 3, 4, 4, 5)))]


def _changed(rng: random.Random, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    """Change some of the values, and sometimes the length of a list."""
    values, structure = pytree.tree_flatten((args, kwargs))
    for _ in range(rng.choice((1, 1, 1, 2, 3)) if values else 0):
        at = rng.randrange(len(values))
        values[at] = _changed_value(rng, values[at], [value for value in values if isinstance(value, Tensor)])
    new_args, new_kwargs = pytree.tree_unflatten(values, structure)
    lists = [at for at, value in enumerate(new_args) if isinstance(value, list | tuple) and value]
    if lists and rng.random() < 0.25:
        at = rng.choice(lists)
        items = list(new_args[at])
        longer = items + [rng.choice(items)] * rng.choice((1, 1, 5))
        items = longer if rng.random() < 0.5 else items[: rng.randrange(len(items))]
        new_args = (*new_args[:at], items, *new_args[at + 1 :])
    return tuple(new_args), new_kwargs


def _changed_value(rng: random.Random, value: Any, tensors: list[Tensor]) -> Any:
    if isinstance(value, Tensor):
        return _changed_tensor(rng, value)
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return rng.choice(_INTEGERS) if rng.random() < 0.7 else value + rng.choice((-1, 1))
    if isinstance(value, float):
        return rng.choice(_FLOATS)
    if isinstance(value, torch.dtype):
        return rng.choice(_LITERALS["ScalarType"])
    if value is None and tensors and rng.random() < 0.3:
        return _changed_tensor(rng, rng.choice(tensors))
    return value


def _changed_tensor(rng: random.Random, tensor: Tensor) -> Tensor:
    shape, at = list(tensor.shape), rng.randrange(max(tensor.dim(), 1))
    what = rng.choice(("size", "multiple", "dtype", "elements", "scalar", "less", "more", "shape", "strides"))
    if what == "strides" and tensor.dim() > 1:
        return tensor.transpose(0, -1) if rng.random() < 0.5 else tensor[..., :1].expand(tensor.shape)
    if what == "size" and shape:
        shape[at] = rng.choice((0, 1, 2, 3))
    elif what == "multiple" and shape:
        shape[at] *= rng.choice((2, 17, 1000))
    elif what == "less" and shape:
        del shape[at]
    elif what == "more":
        shape.insert(rng.randrange(len(shape) + 1), rng.choice((0, 1, 2, 7)))
    elif what in ("scalar", "shape"):
        shape = [] if what == "scalar" else _shape(rng)
    return _tensor(rng, shape, rng.choice(_DTYPES) if what == "dtype" else tensor.dtype)


def _of_schema(rng: random.Random, operator: OpOverload) -> Arguments:
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    shape, dtype = _shape(rng), rng.choice([*[torch.float32] * 4, *_DTYPES])
    for argument in operator._schema.arguments:
        if argument.has_default_value() and rng.random() < 0.5:
            value = argument.default_value
        else:
            value = _of_type(rng, str(argument.real_type), shape, dtype)
        if argument.kwarg_only:
            kwargs[argument.name] = value
        else:
            args.append(value)
    return tuple(args), kwargs


def _of_type(rng: random.Random, kind: str, shape: list[int], dtype: torch.dtype) -> Any:
    def tensor() -> Tensor:
        usual = rng.random() < 0.7
        return _tensor(rng, shape if rng.random() < 0.5 else _shape(rng), dtype if usual else rng.choice(_DTYPES))

    outer, _, inner = kind.removesuffix("]").partition("[")
    if outer == "Optional":
        return None if rng.random() < 0.6 else _of_type(rng, inner, shape, dtype)
    if outer == "List":
        return [_of_type(rng, inner, shape, dtype) for _ in range(rng.choice((0, 1, 2, 2, 3, 4, 5)))]
    if kind in _LITERALS:
        return rng.choice(_LITERALS[kind])
    integer = rng.choice((*_INTEGERS[:6] * 4, *_INTEGERS))
    makers: dict[str, Callable[[], Any]] = {
        "Tensor": tensor,
        "bool": lambda: rng.random() < 0.5,
        "str": lambda: rng.choice(_TEXTS),
        **dict.fromkeys(("int", "SymInt"), lambda: integer),
        **dict.fromkeys(("float", "SymFloat"), lambda: rng.choice(_FLOATS)),
        **dict.fromkeys(("number", "Scalar"), lambda: rng.choice((*_FLOATS, *_INTEGERS))),
    }
    return makers[kind]() if kind in makers else None
