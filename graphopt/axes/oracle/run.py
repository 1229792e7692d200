"""Running graphs in float64 node by node: the original with removed positions masked, the pruned one plainly."""

from __future__ import annotations

import importlib
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch.utils import _pytree as pytree

from graphopt.axes.oracle.step import Step, counts, find_rule, raw
from graphopt.axes.oracle.value import CannotProveError, Dead, Value, broadcast, union, vector, whole
from graphopt.provenance import user_line

Read = Callable[[str], Any]
Kept = Mapping[str, Mapping[int, Sequence[int]]]

# Half and single precision are computed in double: a proof is not to depend on rounding.
_DOUBLE = {
    torch.float32: torch.float64,
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.complex64: torch.complex128,
}
# Checks of dtypes and sizes that tracing left behind; they compute nothing.
_CHECKS = frozenset({"aten::_assert_tensor_metadata"})

for _module in ("elementwise", "contraction", "movement", "mixing", "reduction", "spatial", "indexing", "recurrent"):
    importlib.import_module(f"graphopt.axes.oracle.{_module}")


def doubled(value: Any) -> Any:
    """Return a tensor in double precision on the CPU, or the twin of a dtype or device; anything else unchanged."""
    if isinstance(value, torch.dtype):
        return _DOUBLE.get(value, value)
    if isinstance(value, torch.device):
        return torch.device("cpu")
    return value.detach().to("cpu", _DOUBLE.get(value.dtype, value.dtype)) if isinstance(value, Tensor) else value


class PlainRun:
    """Runs a graph one node at a time, letting go of values after their last use."""

    def __init__(self, gm: fx.GraphModule, inputs: Sequence[Any], read: Read) -> None:
        self.nodes = list(gm.graph.nodes)
        self._inputs = iter(inputs)
        self._read = read
        self._values: dict[fx.Node, Any] = {}
        last: dict[fx.Node, fx.Node] = {}
        for node in self.nodes:
            for used in node.all_input_nodes:
                last[used] = node
        self._done_after: dict[fx.Node, list[fx.Node]] = {}
        for used, user in last.items():
            self._done_after.setdefault(user, []).append(used)

    def __iter__(self) -> Iterator[tuple[fx.Node, Any]]:
        """Yield each node with what it computes, in graph order."""
        for node in self.nodes:
            args, kwargs = fx.map_arg((node.args, node.kwargs), self._values.__getitem__)
            args, kwargs = pytree.tree_map_only((torch.dtype, torch.device), doubled, (args, kwargs))
            value = self._compute(node, args, kwargs)
            if node.users:
                self._values[node] = value
            yield node, value
            for used in self._done_after.get(node, ()):
                del self._values[used]

    def _compute(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        if node.op == "placeholder":
            return self._input(doubled(next(self._inputs)))
        if node.op == "get_attr":
            return self._attribute(str(node.target))
        if node.op == "output":
            return args[0]
        if node.op != "call_function":
            raise CannotProveError(f"`{node.format_node()}` is no operator call")
        if isinstance(node.target, OpOverload) and node.target._schema.name in _CHECKS:
            return None
        return self._call(node, args, kwargs)

    def _input(self, value: Any) -> Any:
        return value

    def _attribute(self, name: str) -> Any:
        return self._read(name)

    def _call(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        return node.target(*args, **kwargs)  # type: ignore[operator]


class MaskedRun(PlainRun):
    """Runs the original graph on values that know which of their positions are removed."""

    def __init__(self, gm: fx.GraphModule, kept: Kept, inputs: Sequence[Any], read: Read) -> None:
        super().__init__(gm, inputs, read)
        self._kept = kept

    def _input(self, value: Any) -> Any:
        return whole(value) if isinstance(value, Tensor) else value

    def _attribute(self, name: str) -> Any:
        value = self._read(name)
        return Value(value, removed(value, self._kept.get(name, {}))) if isinstance(value, Tensor) else value

    def _call(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        if node.target is operator.getitem:
            return args[0][args[1]]
        operands = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Value)]
        counted = any(value.counted for value in operands) and counts(find_rule(node.target))
        if counted or any(value.masked for value in operands):
            result = self._masked_call(node, args, kwargs)
        else:
            result = super()._call(node, raw(args), raw(kwargs))
        result = pytree.tree_map_only(Tensor, whole, result)
        for leaf in pytree.tree_leaves(result):
            if isinstance(leaf, Value):
                _settle(node, leaf, operands)
        return result

    def _masked_call(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        rule = find_rule(node.target)
        if rule is None:
            raise _cannot_prove(node, "no rule says what masking means for it")
        try:
            return rule(Step(node, args, kwargs))
        except CannotProveError as err:
            raise _cannot_prove(node, str(err)) from err
        except Exception as err:  # rules are plugins: whatever one raises is about this call
            raise _cannot_prove(node, f"its rule failed ({type(err).__name__}: {err})") from err


def removed(tensor: Tensor, kept: Mapping[int, Sequence[int]]) -> Dead:
    """Return which positions of a parameter are removed when each given dimension keeps the given indices."""
    dead: list[Tensor | None] = [None] * tensor.dim()
    for dim, indices in kept.items():
        flags = torch.ones(tensor.size(dim), dtype=torch.bool)
        flags[torch.as_tensor(list(indices), dtype=torch.long)] = False
        dead[dim] = vector(flags)
    return tuple(dead)


def _settle(node: fx.Node, value: Value, operands: Sequence[Value]) -> None:
    """Find whose memory a result shows, and tell the owner of what an in-place call newly removed."""
    schema = getattr(node.target, "_schema", None)
    memory = value.tensor.untyped_storage().data_ptr()
    source = next((v for v in operands if v.tensor.untyped_storage().data_ptr() == memory), None)
    if source is None or source is value:
        return
    value.owner = source.owner
    if schema is not None and schema.is_mutable and value.masked:
        _tell_owner(node, value)
        source.dead = broadcast([source.dead, value.dead])


def _tell_owner(node: fx.Node, written: Value) -> None:
    """Mark in a tensor what a write through a view of it removed, where the view is of slices and single positions."""
    owner, view = written.owner.tensor, written.tensor
    dead = list(written.owner.dead)
    offset = view.storage_offset() - owner.storage_offset()
    for dim, flags in enumerate(written.dead):
        if flags is None:
            continue
        place = _shown_dimension(owner, view, dim) if owner.dtype == view.dtype else None
        if place is None:
            raise _cannot_prove(node, "it writes removed positions through a view that is not made of slices")
        start = 0 if view.size(dim) == owner.size(place) else offset // owner.stride(place) % owner.size(place)
        places = start + torch.arange(view.size(dim)) * (view.stride(dim) // owner.stride(place))
        whole_flags = torch.zeros(owner.size(place), dtype=torch.bool)
        whole_flags[places] = flags
        dead[place] = union(dead[place], whole_flags)
    written.owner.dead = tuple(dead)


def _shown_dimension(owner: Tensor, view: Tensor, dim: int) -> int | None:
    """Return the dimension of a tensor that one of a view of it runs along, None if that is none of them alone."""
    found = []
    for place, (length, stride) in enumerate(zip(owner.shape, owner.stride(), strict=True)):
        if length > 1 and stride and view.stride(dim) % stride == 0:
            step = view.stride(dim) // stride
            if step * (view.size(dim) - 1) < length:
                found.append((stride, place))
    return max(found)[1] if found else None


def _cannot_prove(node: fx.Node, why: str) -> CannotProveError:
    name = node.target._schema.name if isinstance(node.target, OpOverload) else node.target
    place = user_line(node)
    return CannotProveError(
        f"Masked equivalence cannot be proved: {str(name).replace('::', '.')} (node `{node.name}`"
        f"{', ' + place if place else ''}): {why}. Register what masking means for it with "
        "`graphopt.axes.oracle.step.masked_rule`, or leave the channels it touches in place."
    )
