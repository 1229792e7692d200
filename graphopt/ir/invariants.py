"""What must hold after every pass.

Measured on a 383-node transformer: lint 1.4 ms, fake propagation 0.4 s; a re-export would cost 1.5 s and adds
nothing that these two do not see.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from graphopt.errors import VerifyError
from graphopt.ir.finite import all_finite
from graphopt.ir.graph import fake_mode_of
from graphopt.ir.program import Program
from graphopt.ir.propagation import Propagation
from graphopt.ir.provenance import user_line
from graphopt.ir.torch_internals import enable_python_dispatcher, pytree, statically_known_true
from graphopt.ir.walker import Walker


def check_invariants(
    before: Program, after: Program, pass_name: str, *, changes_outputs: bool = False, exact: bool = False
) -> None:
    """Check that `after` is a well-formed program with the signature of `before`.

    Args:
        before: what the pass was given.
        after: what it returned.
        pass_name: what messages call it.
        changes_outputs: whether it declares other outputs.
        exact: whether its outputs are compared with those of `before`. It may then store infinite constants that the
            program has computed so far, as those of masks.

    Raises:
        VerifyError: the graph is malformed, the signature changed undeclared, a `meta["val"]` is missing or
            stale, an attribute is dangling, or a tensor that the pass made holds NaN or infinite values.
    """
    _check_graph(after, pass_name)
    _check_signature(before, after, pass_name, changes_outputs)
    _check_dynamic(after, pass_name)
    _check_values(after, pass_name)
    _check_tensors(before, after, pass_name, exact)


def _check_graph(program: Program, pass_name: str) -> None:
    try:
        program.graph.lint()
    except RuntimeError as err:
        raise VerifyError(f"Pass `{pass_name}` left a malformed graph: {err}. This is a bug in the pass.") from err


def _check_signature(before: Program, after: Program, pass_name: str, changes_outputs: bool) -> None:
    if after.inputs != before.inputs:
        raise VerifyError(
            f"Pass `{pass_name}` changed the inputs from {[*map(str, before.inputs)]} to {[*map(str, after.inputs)]}."
        )
    if not changes_outputs and after.outputs != before.outputs:
        raise VerifyError(
            f"Pass `{pass_name}` changed the outputs from {[*map(str, before.outputs)]} to "
            f"{[*map(str, after.outputs)]} without declaring `changes_outputs`."
        )
    results = pytree.tree_leaves(next(n for n in after.graph.nodes if n.op == "output").args[0])
    tensors = [n for n in results if isinstance(n, fx.Node) and isinstance(n.meta.get("val"), torch.Tensor)]
    for spec, node in zip(after.outputs, tensors, strict=False):
        value = node.meta["val"]
        fixed = [
            isinstance(want, int) and _known_different(want, got)
            for want, got in zip(spec.shape, value.shape, strict=False)
        ]
        if len(spec.shape) != value.dim() or any(fixed) or spec.dtype != value.dtype:
            raise VerifyError(
                f"After pass `{pass_name}` output `{spec.name}` is {tuple(value.shape)} {value.dtype}; expected {spec}."
            )
    if len(tensors) != len(after.outputs):
        raise VerifyError(
            f"After pass `{pass_name}` the graph returns {len(tensors)} tensors, not {len(after.outputs)}."
        )


def _check_dynamic(program: Program, pass_name: str) -> None:
    """Check that no dynamic axis of an input has been fixed to a size behind everybody's back.

    Any comparison of a symbolic size with a number may do so, and from then on every propagation agrees with it.
    """
    nodes = [n for n in program.graph.nodes if n.op == "placeholder" and isinstance(n.meta["val"], torch.Tensor)]
    for spec, node in zip(program.inputs, nodes, strict=True):
        for wanted, size in zip(spec.shape, node.meta["val"].shape, strict=True):
            if isinstance(wanted, str) and not (isinstance(size, torch.SymInt) and not size.node.expr.is_number):
                raise VerifyError(
                    f"Pass `{pass_name}` fixed the dynamic axis `{wanted}` of input `{spec.name}` to {size}. It used a "
                    "symbolic size as a number; this is a bug in the pass."
                )


def _check_values(program: Program, pass_name: str) -> None:
    """Compare every recorded `meta["val"]` with a fake propagation of its own, which reads none of them but inputs'."""
    for node in program.graph.nodes:
        if node.op != "output" and "val" not in node.meta and not _is_region(node, program.graph_module):
            raise VerifyError(
                f"Pass `{pass_name}` left node `{node.name}` without meta['val']. Build it with `Editor.call`."
            )
    try:
        stale = _Recorded(program).stale()
    except RuntimeError as err:
        raise VerifyError(f"After pass `{pass_name}` the program cannot run: {err}.") from err
    if stale is not None:
        node, recorded, found = stale
        raise VerifyError(
            f"After pass `{pass_name}` node `{node.name}` ({user_line(node) or 'no source line'}) is {found}, but its "
            f"meta['val'] says {recorded}. Propagate the touched nodes with `Editor.propagate_from`."
        )


def _is_region(node: fx.Node, gm: fx.GraphModule) -> bool:
    """Whether a node reads a branch or loop body of a higher-order operator, which is no value."""
    return node.op == "get_attr" and isinstance(operator.attrgetter(str(node.target))(gm), torch.nn.Module)


class _Recorded(Walker):
    """Runs a program on fake tensors and compares each result with what the node records."""

    def __init__(self, program: Program) -> None:
        super().__init__(program)
        self._stale: tuple[fx.Node, str, str] | None = None
        self._mode = fake_mode_of(program.graph_module)
        self._propagation = Propagation(self._mode, "checking")

    def stale(self) -> tuple[fx.Node, str, str] | None:
        """Return the first node whose recorded value differs, with both descriptions."""
        values = [node.meta["val"] for node in self.program.graph.nodes if node.op == "placeholder"]
        with enable_python_dispatcher(), self._mode:
            self.run([value for value in values if isinstance(value, torch.Tensor)])
        return self._stale

    def read(self, node: fx.Node) -> Any:
        """Return the recorded fake of a tensor, whose shape is compared with the tensor's."""
        value = super().read(node)
        if not isinstance(value, torch.Tensor):
            return value
        self._compare(node, node.meta["val"], value)
        return node.meta["val"]

    def call(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one call and compare what it gives."""
        value = self._propagation.call(node, args, kwargs)
        self._compare(node, node.meta["val"], value)
        return value

    def _compare(self, node: fx.Node, recorded: object, found: object) -> None:
        if self._stale is not None:
            return
        for want, got in zip(pytree.tree_leaves(recorded), pytree.tree_leaves(found), strict=False):
            if isinstance(want, torch.Tensor) and isinstance(got, torch.Tensor) and _differ(want, got):
                self._stale = (node, _shown(want), _shown(got))
                return


def _differ(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.dtype != other.dtype or one.dim() != other.dim():
        return True
    return any(_known_different(a, b) for a, b in zip(one.shape, other.shape, strict=True))


def _known_different(one: int | torch.SymInt, other: int | torch.SymInt) -> bool:
    if isinstance(one, int) and isinstance(other, int):
        return one != other
    return statically_known_true(one != other)


def _shown(value: torch.Tensor) -> str:
    return f"{str(value.dtype).removeprefix('torch.')}[{', '.join(map(str, value.shape))}]"


def _check_tensors(before: Program, after: Program, pass_name: str, exact: bool) -> None:
    gm = after.graph_module
    read = {node.target for node in gm.graph.nodes if node.op == "get_attr"}
    old = _tensors(before.graph_module)
    seen = {id(tensor) for tensor in old.values()}  # of live objects: state_dict() makes new ones
    for name, tensor in _tensors(gm).items():
        if name not in read:
            raise VerifyError(
                f"Pass `{pass_name}` left `{name}`, which no node reads. End the pass with `Editor.finish`."
            )
        if id(tensor) in seen or (exact and not isinstance(tensor, torch.nn.Parameter)):
            continue
        seen.add(id(tensor))
        if not all_finite(tensor) and (name not in old or all_finite(old[name])):
            raise VerifyError(f"After pass `{pass_name}` `{name}` holds NaN or infinite values.")


def _tensors(gm: fx.GraphModule) -> dict[str, torch.Tensor]:
    """Return the parameters and buffers by name, tied ones under each of their names."""
    return {**dict(gm.named_parameters(remove_duplicate=False)), **dict(gm.named_buffers(remove_duplicate=False))}
