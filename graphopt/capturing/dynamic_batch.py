"""Which axes of example inputs are dynamic, and examples of a batch that is large enough to be traced as any.

The first axis of the first tensor that has one is the batch, and so is that of every tensor of the same first size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.export import Dim

from graphopt.capturing.axis_names import declared_axes
from graphopt.capturing.leaf_names import input_names
from graphopt.capturing.tied_axes import TiedAxis
from graphopt.errors import CaptureError, UsageError
from graphopt.ir.dynamic_axes import LeafShapes
from graphopt.ir.size_expressions import Linear
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
    every = declared_axes(model, len(tensors))
    of_batch = {own[0].line.name for t, own in zip(tensors, every, strict=True) if 0 in own and len(t) == batch}
    for leaf, (tensor, wanted, declared) in enumerate(zip(tensors, asked, every, strict=True)):
        batched = tensor.shape[:1] == (batch,) or (0 in declared and declared[0].line.name in of_batch)
        axes = [*([0] if batched else []), *(axis for axis in declared if tensor.shape[axis] >= SMALLEST_TRACED)]
        dims = {**dict.fromkeys(axes, Dim.DYNAMIC), **wanted}
        shapes.append(
            {
                axis: _tied(dim, declared.get(axis), f"axis_{leaf}_{axis}" if axis else "batch")
                for axis, dim in dims.items()
                if dim is not None and dim != Dim.STATIC
            }
        )
    _check_sizes(input_names(model, args, kwargs), shapes)
    grown = iter(_grown(tensors, [axes.get(0) for axes in shapes], batch))
    leaves = [next(grown) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
    args, kwargs = pytree.tree_unflatten(leaves, structure)
    return args, kwargs, shapes


def _tied(dim: Any, declared: TiedAxis | None, name: str) -> Any:
    """Return an axis as it is asked for, within what is declared, and with a name where torch takes it so only."""
    sizes, given = range_asked(dim), getattr(dim, "__name__", "")
    if declared is not None and not hasattr(dim, "root"):
        return dataclasses.replace(declared, sizes=declared.sizes & sizes, given=given)
    return dim if given or sizes.most != SMALLEST_TRACED else TiedAxis(Linear(name, 1, 0), sizes)


def _grown(tensors: Sequence[torch.Tensor], firsts: Sequence[Any], batch: int | None) -> Iterator[torch.Tensor]:
    """Yield tensors of a batch that is large enough to be traced as any, with what depends on it."""
    growing = [dim for tensor, dim in zip(tensors, firsts, strict=True) if tensor.shape[:1] == (batch,)]
    rows = max([SMALLEST_TRACED, *(range_asked(dim).least for dim in growing)])
    values = {dim.line.name: max(SMALLEST_TRACED, dim.value(rows)) for dim in growing if isinstance(dim, TiedAxis)}
    for tensor, dim in zip(tensors, firsts, strict=True):
        if isinstance(dim, TiedAxis) and dim.line.name in values:
            yield _repeated(tensor, dim.sizes.nearest(dim.at(values[dim.line.name])))
        elif dim is not None and tensor.shape[:1] == (batch,):
            yield _repeated(tensor, range_asked(dim).nearest(rows))
        else:
            yield tensor


def _repeated(tensor: torch.Tensor, rows: int) -> torch.Tensor:
    """Return so many rows; those that are there where they are more."""
    if len(tensor) >= rows:
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
        if not isinstance(requested, list | tuple):
            raise UsageError(
                f"dynamic_shapes cannot be {requested!r}. Give the axes of each input by its name: "
                '{"x": {1: torch.export.Dim.DYNAMIC}}.'
            )
        if len(requested) > len(combined):
            raise UsageError(
                f"dynamic_shapes describes {len(requested)} inputs, and the model takes {', '.join(combined)}."
            )
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
        if asked and not isinstance(asked, Mapping | list | tuple):
            raise UsageError(f'dynamic_shapes gives input `{name}` {asked!r}. Give its axes: {{1: "{name}_1"}}.')
        axes = dict(enumerate(asked)) if isinstance(asked, list | tuple) else dict(asked or {})
        unknown = [axis for axis in axes if not 0 <= axis < value.dim()]
        if unknown:
            raise UsageError(
                f"Axis {unknown[0]} of input `{name}` cannot be dynamic: its example has the shape "
                f"{tuple(value.shape)}, whose axes are {', '.join(map(str, range(value.dim()))) or 'none'}."
            )
        found.append({axis: _called(dim) if isinstance(dim, str) else dim for axis, dim in axes.items()})
    elif isinstance(value, Mapping):
        if asked is not None and not (isinstance(asked, Mapping) and asked.keys() <= value.keys()):
            raise UsageError(
                f"Input `{name}` is a dictionary of {', '.join(map(str, value))}, and dynamic_shapes gives it {asked}. "
                "Give a dictionary with some of these names."
            )
        for key, item in value.items():
            _collect_axes(f"{name}_{key}", item, None if asked is None else asked.get(key), found)
    elif isinstance(value, list | tuple):
        if asked is not None and not (isinstance(asked, list | tuple) and len(asked) == len(value)):
            raise UsageError(
                f"Input `{name}` is a list of {len(value)}, and dynamic_shapes gives it {asked}. Give a list of "
                f"{len(value)}, None where an axis keeps its size."
            )
        for index, item in enumerate(value):
            _collect_axes(f"{name}_{index}", item, None if asked is None else asked[index], found)
    elif asked and asked != Dim.STATIC:
        raise UsageError(f"Input `{name}` is no tensor; only sizes of tensors can be dynamic.")


def _called(name: str) -> TiedAxis:
    if not name.isidentifier():
        raise UsageError(f"An axis cannot be called {name!r}. Give it a name of letters, digits and underscores.")
    return TiedAxis(Linear(name, 1, 0), given=name)
