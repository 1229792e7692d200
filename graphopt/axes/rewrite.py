"""Removing indices from axes: slice parameters and buffers, bring the graph's literals up to date, propagate.

`remove` returns a new graph module that shares every tensor it does not slice; `reindex`, which it shares with
`widening.widen`, may repeat indices. After the rewrite fake tensors are propagated through everything downstream of a
change, and every shape is compared with what the layouts predict: a mismatch is an error, never a result.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from graphopt.axes.edit import Edit
from graphopt.axes.infer import Axes
from graphopt.axes.layout import Dims, describe, leaves, shape_of, surviving, surviving_size, to_size, touches
from graphopt.axes.solver import equal
from graphopt.errors import PassError
from graphopt.ir.editor import Editor
from graphopt.ir.graph import copy_graph_module, erase_dead, tensor_attribute
from graphopt.ir.ownership import memory_key
from graphopt.ir.provenance import user_line
from graphopt.ir.regions import graph_modules, inside, region

Kept = Mapping[int, Sequence[int]]


def slices(axes: Axes, kept: Kept) -> dict[str, dict[int, list[int]]]:
    """Return the sorted kept positions of every dimension of every parameter and buffer that shrinks.

    Args:
        axes: the inferred axes.
        kept: for each axis id the sorted indices it keeps; an axis that is absent keeps all.
    """
    return positions(axes, _checked(axes, kept))


def positions(axes: Axes, indices: Kept) -> dict[str, dict[int, list[int]]]:
    """Return which positions each changing dimension of each parameter and buffer has then, unchecked."""
    result: dict[str, dict[int, list[int]]] = {}
    for name, dims in axes.parameters.items():
        changing = {d: layout for d, layout in enumerate(dims) if touches(layout, indices)}
        if changing:
            result[name] = {d: list(surviving(layout, indices)) for d, layout in changing.items()}
    return result


def remove(
    gm: fx.GraphModule,
    axes: Axes,
    kept: Kept,
    made_by: str = "prune",
    *,
    instead: Mapping[str, torch.Tensor] | None = None,
) -> fx.GraphModule:
    """Return a copy of the graph in which each axis has only the given indices.

    Args:
        gm: the graph the axes were inferred on; it is not changed.
        axes: the inferred axes.
        kept: for each axis id the sorted indices it keeps; an axis that is absent keeps all.
        made_by: the pass on whose behalf nodes are inserted.
        instead: by name, what stands where slices would be copied: where it has their shape and type.

    Raises:
        PassError: an axis may not shrink or an index does not exist, or a shape after the rewrite is not what
            the layouts predict.
    """
    return reindex(gm, axes, _checked(axes, kept), made_by, instead=instead)


def reindex(
    gm: fx.GraphModule,
    axes: Axes,
    indices: Kept,
    made_by: str,
    *,
    instead: Mapping[str, torch.Tensor] | None = None,
) -> fx.GraphModule:
    """Return a copy of the graph in which each axis has the given indices, unchecked: an index may come repeatedly.

    Raises:
        PassError: a shape after the rewrite is not what the layouts predict.
    """
    result = copy_graph_module(gm)
    new_of = {
        old: new
        for one, other in zip(graph_modules(gm), graph_modules(result), strict=True)
        for old, new in zip(one.graph.nodes, other.graph.nodes, strict=True)
    }
    starts = _slice_parameters(axes, indices, new_of, result, instead or {})
    for old, rule in axes.rules.items():
        if rule.rewrite is not None and _concerned(axes, old, indices):
            edit = Edit(new_of[old], old, axes, indices, new_of, made_by)
            rule.rewrite(edit)
            starts.extend((*edit.inserted, new_of[old]))
    _propagate(Editor(result, made_by), starts)
    for old, dims in axes.layouts.items():
        _check(old, new_of[old], dims, indices)
    for module in graph_modules(result):
        erase_dead(module.graph)
        module.graph.lint()
        module.recompile()
    return result


def _checked(axes: Axes, kept: Kept) -> dict[int, list[int]]:
    """Return the entries that remove something, after checking that each is possible."""
    sizes: dict[int, int] = {}
    for dims in axes.layouts.values():
        for layout in dims:
            sizes.update({axis.id: axis.size for axis in leaves(layout) if isinstance(axis.size, int)})
    wanted: dict[int, list[int]] = {}
    for number, indices in kept.items():
        if number not in sizes:
            raise PassError(f"Axis {number} does not exist in this graph. Infer the axes of this very graph.")
        chosen = [int(index) for index in indices]
        if not chosen or chosen != sorted(set(chosen)) or chosen[0] < 0 or chosen[-1] >= sizes[number]:
            raise PassError(
                f"Axis {number} has {sizes[number]} indices; what it keeps must be a non-empty, strictly "
                f"increasing list of them, found {chosen[:8]}."
            )
        if len(chosen) == sizes[number]:
            continue
        if number in axes.frozen:
            raise PassError(f"Axis {number} must stay whole: {axes.frozen[number]}.")
        wanted[number] = chosen
    return wanted


def _slice_parameters(
    axes: Axes,
    indices: Kept,
    new_of: Mapping[fx.Node, fx.Node],
    gm: fx.GraphModule,
    instead: Mapping[str, torch.Tensor],
) -> list[fx.Node]:
    """Replace every tensor that changes; one tensor under several names stays one. Return the reads of them."""
    mode = Editor(gm, "")
    made: dict[tuple[object, ...], torch.Tensor] = {}
    todo = positions(axes, indices)
    reads: list[fx.Node] = []
    for old, new in new_of.items():
        if old.op != "get_attr" or old.graph is not axes.gm.graph or str(old.target) not in todo:
            continue
        name = str(old.target)
        original = tensor_attribute(axes.gm, name)
        key = memory_key(original)
        if key not in made:
            made[key] = _sliced(original, todo[name], instead.get(name))
        _store(gm, name, made[key])
        new.meta["val"] = mode.fake(made[key])
        new.meta.pop("tensor_meta", None)
        reads.append(new)
    return reads


def _sliced(tensor: torch.Tensor, positions: Mapping[int, Sequence[int]], instead: torch.Tensor | None) -> torch.Tensor:
    shape = tuple(len(positions[d]) if d in positions else size for d, size in enumerate(tensor.shape))
    if instead is not None and (instead.shape, instead.dtype, instead.device) == (shape, tensor.dtype, tensor.device):
        result = instead.detach()
    else:
        result = taken(tensor, positions)
    if isinstance(tensor, torch.nn.Parameter):
        return torch.nn.Parameter(result, requires_grad=tensor.requires_grad)
    return result


def taken(tensor: torch.Tensor, positions: Mapping[int, Sequence[int]]) -> torch.Tensor:
    """Return what is at the given positions of some dimensions, detached."""
    result = tensor.detach()
    for d, indices in positions.items():
        result = result.index_select(d, torch.tensor(indices, device=result.device))
    return result


def _store(gm: fx.GraphModule, name: str, tensor: torch.Tensor) -> None:
    *path, leaf = name.split(".")
    owner: torch.nn.Module = gm
    for part in path:
        owner = getattr(owner, part)
    if leaf in owner._parameters or leaf in owner._buffers:
        table = owner._parameters if leaf in owner._parameters else owner._buffers
        table[leaf] = tensor  # type: ignore[assignment]
    else:
        setattr(owner, leaf, tensor)


def _concerned(axes: Axes, node: fx.Node, kept: Kept) -> bool:
    """Tell whether a call has to do with anything that shrinks, its own notes and arguments included."""
    if axes.touched(node, kept) or any(touches(note, kept) for note in axes.notes.get(node, {}).values()):
        return True
    return any(axes.touched(argument, kept) or axes.stale(argument, kept, {}) for argument in node.all_input_nodes)


def _propagate(editor: Editor, starts: Iterable[fx.Node]) -> None:
    """Recompute metadata downstream of `starts`, as far as it changes: what is data-dependent keeps its symbols."""
    dirty = set(starts)
    for node in editor.graph.nodes:
        if node.op != "call_function":
            continue
        found = region(node, editor.gm)
        within = inside(found) if found is not None else ()
        if not (node in dirty or dirty.intersection(node.all_input_nodes) or dirty.intersection(within)):
            continue
        before = node.meta.get("val")
        editor.propagate(node)
        if _same(before, node.meta["val"]):
            node.meta["val"] = before
            dirty.discard(node)
        else:
            dirty.add(node)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return (
            a.dtype == b.dtype
            and len(a.shape) == len(b.shape)
            and all(map(equal, shape_of(a), shape_of(b)))
            and all(map(equal, map(to_size, a.stride()), map(to_size, b.stride())))
        )
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, int | torch.SymInt) and isinstance(b, int | torch.SymInt):
        return equal(to_size(a), to_size(b))
    return False


def _check(old: fx.Node, new: fx.Node, dims: Dims, kept: Kept) -> None:
    value = new.meta.get("val")
    found = shape_of(value) if isinstance(value, torch.Tensor) else ()
    expected = tuple(surviving_size(layout, kept) for layout in dims)
    unchanged = not any(touches(layout, kept) for layout in dims)
    if len(found) == len(expected) and all(
        equal(a, b) or (unchanged and not isinstance(b, int)) for a, b in zip(found, expected, strict=True)
    ):
        return
    raise PassError(
        f"After removal `{old.format_node()}` ({user_line(old) or 'line unknown'}) has the shape {found}, its layout "
        f"({', '.join(map(describe, dims))}) predicts {expected}. Please report this as a bug in the axis rule of "
        "this operator; naming its weights in an exclusion avoids it."
    )
