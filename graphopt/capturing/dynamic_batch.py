"""Which axes of example inputs are dynamic, and examples of a batch that is large enough to be traced as any.

The first axis of the first tensor that has one is the batch, and so is that of every tensor of the same first size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.export import Dim

from graphopt.capturing.axis_names import declared_ranges, within
from graphopt.capturing.leaf_names import input_names
from graphopt.errors import CaptureError, UsageError
from graphopt.ir.dynamic_axes import LeafShapes
from graphopt.ir.sizes import MOST_AT_LEAST
from graphopt.ir.torch_internals import SMALLEST_TRACED, arguments_by_name, pytree, range_asked


def with_dynamic_batch(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], requested: Any
) -> tuple[tuple[Any, ...], dict[str, Any], LeafShapes]:
    """Enlarge a batch that is too small and say which axes are dynamic.

    Args:
        model: takes the arguments.
        args: positional examples.
        kwargs: keyword examples.
        requested: further dynamic axes, as `torch.export.export` takes them.

    Raises:
        CaptureError: there is no tensor among the examples, or no sample.
        UsageError: what is requested is not there, or larger than examples are made.
    """
    asked = _requested_axes(model, args, kwargs, requested)
    leaves, structure = pytree.tree_flatten((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    if not tensors:
        raise CaptureError("There is no tensor among the example inputs. Give at least one.")
    batch = next((tensor.shape[0] for tensor in tensors if tensor.dim()), None)
    if batch == 0:
        raise CaptureError("The example inputs hold no samples. Give at least one.")
    shapes: LeafShapes = []
    for tensor, wanted, declared in zip(tensors, asked, declared_ranges(model, len(tensors)), strict=True):
        batched = tensor.shape[:1] == (batch,)
        axes = [*([0] if batched else []), *(axis for axis in declared if tensor.shape[axis] >= SMALLEST_TRACED)]
        dims = {**dict.fromkeys(axes, Dim.DYNAMIC), **wanted}
        shapes.append(
            {
                axis: within(dim, declared[axis]) if axis in declared else dim
                for axis, dim in dims.items()
                if dim is not None and dim != Dim.STATIC
            }
        )
    _check_sizes(input_names(model, args, kwargs), shapes)
    growing = [
        axes.get(0) if tensor.shape[:1] == (batch,) else None for tensor, axes in zip(tensors, shapes, strict=True)
    ]
    rows = max([SMALLEST_TRACED, *(range_asked(dim).least for dim in growing)])
    grown = iter(_grown(tensor, dim, rows) for tensor, dim in zip(tensors, growing, strict=True))
    leaves = [next(grown) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
    args, kwargs = pytree.tree_unflatten(leaves, structure)
    return args, kwargs, shapes


def _grown(tensor: torch.Tensor, dim: Any, rows: int) -> torch.Tensor:
    """Return so many rows, or as many as an axis may have; those that are there where they are more, or it is fixed."""
    rows = range_asked(dim).nearest(rows)
    if dim is None or len(tensor) >= rows:
        return tensor
    return tensor.repeat(-(-rows // len(tensor)), *[1] * (tensor.dim() - 1))[:rows]


def _check_sizes(names: list[str], shapes: LeafShapes) -> None:
    for name, axes in zip(names, shapes, strict=True):
        for axis, dim in axes.items():
            if (least := range_asked(dim).least) > MOST_AT_LEAST:
                raise UsageError(
                    f"Axis {axis} of input `{name}` is to have a size of {least} or more, and inputs are made up of "
                    f"sizes up to {MOST_AT_LEAST}. Let its range begin below."
                )


def _requested_axes(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], requested: Any) -> LeafShapes:
    """Bring a `dynamic_shapes` argument to one dictionary per tensor leaf."""
    combined = arguments_by_name(model, args, kwargs)
    if requested is not None and not isinstance(requested, Mapping):
        requested = dict(zip(combined, requested, strict=False))
    requested = dict(requested or {})
    unknown = sorted(set(requested) - set(combined))
    if unknown:
        raise UsageError(
            f"dynamic_shapes names {unknown}, but the model's inputs are {list(combined)}. Use those names."
        )
    found: LeafShapes = []
    for name, value in combined.items():
        _collect_axes(name, value, requested.get(name), found)
    return found


def _collect_axes(name: str, value: Any, asked: Any, found: LeafShapes) -> None:
    if isinstance(value, torch.Tensor):
        axes = dict(enumerate(asked)) if isinstance(asked, list | tuple) else dict(asked or {})
        unknown = [axis for axis in axes if not 0 <= axis < value.dim()]
        if unknown:
            raise UsageError(
                f"Axis {unknown[0]} of input `{name}` cannot be dynamic: its example has the shape "
                f"{tuple(value.shape)}, whose axes are {', '.join(map(str, range(value.dim()))) or 'none'}."
            )
        found.append({axis: Dim.DYNAMIC if isinstance(dim, str) else dim for axis, dim in axes.items()})
    elif isinstance(value, Mapping):
        for key, item in value.items():
            _collect_axes(f"{name}_{key}", item, asked.get(key) if isinstance(asked, Mapping) else None, found)
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            _collect_axes(f"{name}_{index}", item, asked[index] if isinstance(asked, list | tuple) else None, found)
    elif asked and asked != Dim.STATIC:
        raise UsageError(f"Input `{name}` is no tensor; only sizes of tensors can be dynamic.")
