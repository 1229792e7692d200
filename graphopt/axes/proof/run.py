"""Running graphs in float64 node by node: the original with removed positions masked, the pruned one plainly.

Regions are run node by node too. Data are to decide neither which branch is proved nor how long that takes: of branches
the one asked for runs, and a loop goes a fixed number of rounds, its condition evaluated before each.
"""

from __future__ import annotations

import importlib
import operator
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx

from graphopt.axes.proof.step import MaskedStep, counts, find_rule, raw
from graphopt.axes.proof.value import CannotProveError, Dead, Value, broadcast, joined, union, vector, whole
from graphopt.ir.finite import computable, only_stored
from graphopt.ir.provenance import user_line
from graphopt.ir.regions import Region, region, regions
from graphopt.ir.torch_internals import OpOverload, pytree

Read = Callable[[str], Any]
_Steps: TypeAlias = Generator[tuple[str, fx.Node, Any], None, list[Any]]
KeptByName = Mapping[str, Mapping[int, Sequence[int]]]

# Single precision and less are computed in double: a proof is not to depend on rounding.
_DOUBLE = {
    torch.float32: torch.float64,
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.complex64: torch.complex128,
}
# Checks of dtypes and sizes that tracing left behind; they compute nothing.
_CHECKS = frozenset({"aten::_assert_tensor_metadata"})

for _module in ("elementwise", "contraction", "movement", "mixing", "reduction", "spatial", "indexing", "recurrent"):
    importlib.import_module(f"graphopt.axes.proof.{_module}")


def doubled(value: Any) -> Any:
    """Return a tensor in double precision on the CPU, or the twin of a dtype or device; anything else unchanged."""
    if isinstance(value, torch.dtype):
        return torch.float64 if only_stored(value) else _DOUBLE.get(value, value)
    if isinstance(value, torch.device):
        return torch.device("cpu")
    if isinstance(value, Tensor):
        tensor = computable(value.detach().to("cpu"))
        return tensor.to(doubled(tensor.dtype))
    return value


# What these hold before it is written to is nobody's business, and must not differ between two runs.
_UNINITIALISED = frozenset(
    f"aten::{name}"
    for name in ("empty", "empty_like", "empty_permuted", "empty_strided", "new_empty", "new_empty_strided")
)
_ROUNDS = 2  # of a loop: the second one sees what the first has made


def branching_depth(gm: fx.GraphModule) -> int:
    """Return how deep branches lie in one another: 0 without any."""
    return max(
        ((found.form == "branches") + max(branching_depth(body) for body in found.bodies) for found in regions(gm)),
        default=0,
    )


def names(gm: fx.GraphModule, path: str = "") -> Iterator[str]:
    """Yield the names of all nodes as a run gives them; of one in a region: `cond/true_graph_0/relu`."""
    for node in gm.graph.nodes:
        yield path + node.name
        found = region(node, gm)
        if found is not None:
            for read, body in zip(found.reads, found.bodies, strict=True):
                yield from names(body, _inside(path, found, read))


def _inside(path: str, found: Region, read: fx.Node) -> str:
    return f"{path}{found.node.name}/{read.target}/"


class PlainRun:
    """Runs a graph one node at a time, letting go of values after their last use.

    Args:
        gm: the graph.
        inputs: one for each placeholder.
        read: returns a tensor of the graph module by its qualified name.
        branches: which branch to take at each depth of branches in branches, 0 the first; data decide nothing.
        path: what comes before the names of nodes.
    """

    def __init__(
        self, gm: fx.GraphModule, inputs: Sequence[Any], read: Read, branches: Sequence[int] = (), path: str = ""
    ) -> None:
        self._gm = gm
        self._branches = branches
        self._path = path
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

    def __iter__(self) -> Iterator[tuple[str, fx.Node, Any]]:
        """Yield the name of each node, the node and what it computes, in the order in which they run."""
        for node in self.nodes:
            found = region(node, self._gm)
            if found is not None:
                value = yield from self._region(found)
            else:
                args, kwargs = fx.map_arg((node.args, node.kwargs), self._values.__getitem__)
                args, kwargs = pytree.tree_map_only((torch.dtype, torch.device), doubled, (args, kwargs))
                value = self._compute(node, args, kwargs)
            if node.users:
                self._values[node] = value
            yield self._path + node.name, node, value
            for used in self._done_after.get(node, ()):
                del self._values[used]

    def _region(self, found: Region) -> _Steps:
        """Run a region; return what it computes."""
        operands = [self._values[value] if isinstance(value, fx.Node) else value for value in found.operands]
        if found.form == "branches":
            return (yield from self._body(found, self._branches[0], operands, self._branches[1:]))
        if found.form == "block":
            return (yield from self._body(found, 0, operands))
        if found.form == "loop":
            for _ in range(_ROUNDS):
                yield from self._body(found, 0, operands)
                operands[: found.state] = yield from self._body(found, 1, operands)
            return operands[: found.state]
        state, sequences = operands[: found.state], operands[found.state : found.state + found.sequences]
        made = []
        for i in range(raw(sequences[0]).size(0)):
            slices = [self._slice(sequence, i) for sequence in sequences]
            results = yield from self._body(found, 0, [*state, *slices, *operands[found.state + found.sequences :]])
            state = results[: found.state]
            made.append(results[found.state :])
        return [*state, *(self._stack(list(column)) for column in zip(*made, strict=True))]

    def _body(
        self, found: Region, which: int, operands: Sequence[Any], branches: Sequence[int] | None = None
    ) -> _Steps:
        """Run one body of a region; return what it returns, as a list."""
        body = found.bodies[which]
        path = _inside(self._path, found, found.reads[which])
        run = self._of_body(body, operands, self._branches if branches is None else branches, path)
        value: Any = None
        for name, node, value in run:
            if node.op not in ("placeholder", "output"):
                yield name, node, value
        return list(value) if isinstance(value, list | tuple) else [value]

    def _of_body(self, body: fx.GraphModule, operands: Sequence[Any], branches: Sequence[int], path: str) -> PlainRun:
        return PlainRun(body, operands, _Constants(body), branches, path)

    def _slice(self, value: Any, index: int) -> Any:
        return value[index]

    def _stack(self, values: Sequence[Any]) -> Any:
        return torch.stack(list(values))

    def _compute(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        if node.op == "placeholder":
            return self._input(doubled(next(self._inputs)))
        if node.op == "get_attr":
            return self._attribute(str(node.target))
        if node.op == "output":
            return args[0]
        if node.op != "call_function":
            raise CannotProveError(f"`{node.format_node()}` is no operator call")
        name = node.target._schema.name if isinstance(node.target, OpOverload) else ""
        if name in _CHECKS:
            return None
        value = self._call(node, args, kwargs)
        if name in _UNINITIALISED:
            raw(value).zero_()
        return value

    def _input(self, value: Any) -> Any:
        return value

    def _attribute(self, name: str) -> Any:
        return self._read(name)

    def _call(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        return node.target(*args, **kwargs)  # type: ignore[operator]


class MaskedRun(PlainRun):
    """Runs the original graph on values that know which of their positions are removed."""

    def __init__(
        self,
        gm: fx.GraphModule,
        kept: KeptByName,
        inputs: Sequence[Any],
        read: Read,
        branches: Sequence[int] = (),
        path: str = "",
    ) -> None:
        super().__init__(gm, inputs, read, branches, path)
        self._kept = kept

    def _of_body(self, body: fx.GraphModule, operands: Sequence[Any], branches: Sequence[int], path: str) -> MaskedRun:
        return MaskedRun(body, {}, operands, _Constants(body), branches, path)

    def _slice(self, value: Any, index: int) -> Any:
        if value.dead[0] is not None:
            raise CannotProveError("positions that a region goes through one by one are removed")
        return Value(value.tensor[index], value.dead[1:], {d - 1: flags for d, flags in value.counted.items() if d})

    def _stack(self, values: Sequence[Any]) -> Any:
        dead, counted = joined(values)
        tensor = torch.stack([value.tensor for value in values])
        return Value(tensor, (None, *dead), {d + 1: flags for d, flags in counted.items()})

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
            return rule(MaskedStep(node, args, kwargs))
        except CannotProveError as err:
            raise _cannot_prove(node, str(err)) from err
        except Exception as err:  # rules are plugins: whatever one raises is about this call
            raise _cannot_prove(node, f"its rule failed ({type(err).__name__}: {err})") from err


class _Constants:
    """Reads what a body holds itself, in double precision."""

    def __init__(self, body: fx.GraphModule) -> None:
        self._body = body

    def __call__(self, name: str) -> Any:
        return doubled(operator.attrgetter(name)(self._body))


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
        "`graphopt.axes.proof.step.masked_rule`, or leave the channels it touches in place."
    )
