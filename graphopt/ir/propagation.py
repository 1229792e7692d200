"""Running calls on fake tensors, equal calls once.

A fake tensor with a symbolic size costs a millisecond to make, and most calls of a deep network are like an earlier
one: of the 122 of a folded ResNet-50 42 differ, and a pass leaves most as they were. Calls are equal where operator,
arguments, and shapes, strides and types of their tensors are; what they give is then one fake tensor, in every program
of one fake mode. Who checks what is recorded knows nothing of who recorded it.

What a kernel asks about sizes meanwhile (`s < 16`) is not noted: a trace has asked what matters, and whether a device's
kernels ask must not be seen in what is made.

What depends on data has sizes of its own, and is run every time: torch gives two such results of one fake tensor the
same size, so what they are made of is not shared either.

BatchNorm in inference gives what its input is like. Of torch it is known by running a decomposition of ten steps: half
of what propagating a pruned ResNet-50 takes.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Hashable, Iterator, Set
from typing import Any

import torch
from torch import fx

from graphopt.ir.aliasing import shared_inputs, written_inputs
from graphopt.ir.torch_internals import (
    FakeTensor,
    FakeTensorMode,
    OpOverload,
    enable_python_dispatcher,
    free_unbacked_symbols,
    pytree,
    recurrent_results,
)

_OURS = ("aten", "graphopt")  # operators whose shapes follow from their arguments: who knows what a stranger's do
_BINDS = "unbacked_bindings"  # torch's note on a call whose result has sizes that depend on data
_MOST_KNOWN = 4096  # results of a mode, a few kilobytes each
_KNOWN = "graphopt.propagated"  # in a mode's own dictionary, so that what is known goes with it


class Propagation:
    """Runs calls in one fake mode."""

    def __init__(self, mode: FakeTensorMode, purpose: str) -> None:
        """Prepare to run calls.

        Args:
            mode: of their tensors.
            purpose: what for; tensors are shared with those who run calls for the same.
        """
        self._mode = mode
        self._known: dict[Hashable, Any] = vars(mode).setdefault(f"{_KNOWN} {purpose}", {})

    def call(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return what the call of `node` gives for these arguments; calls of plain operators may share a result."""
        described = _described((args, kwargs)) if _is_plain(node) else None
        key = None if described is None else (node.target, described, _surroundings())
        if key is not None and key in self._known:
            return self._known[key]
        # Without the Python dispatcher aten.pad, among others, fixes a symbolic batch to its example size.
        env = self._mode.shape_env
        with enable_python_dispatcher(), self._mode, env.suppress_guards() if env else contextlib.nullcontext():
            like = _like_its_input(node.target, args) if key is not None else None
            value = torch.empty_like(like) if like is not None else recurrent_results(node.target, args)
            if value is None:
                value = node.target(*args, **kwargs)  # type: ignore[operator]
        if key is not None and not unbacked(value):
            if len(self._known) >= _MOST_KNOWN:
                self._known.clear()
            self._known[key] = value
        return value


def unbacked(value: Any) -> Set[object]:
    """Return the symbols of the sizes and numbers in a recorded value that depend on data."""
    return free_unbacked_symbols([leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, _WITH_SYMBOLS)])


def _like_its_input(target: object, args: tuple[Any, ...]) -> torch.Tensor | None:
    """Return the operand that the result of a call is like in shape, strides and type; None where only a run tells."""
    if target is not torch.ops.aten.batch_norm.default:
        return None
    x, weight, bias, mean, variance, training = args[:6]
    if training or mean is None or variance is None or not x.is_floating_point() or _cast_there(x.device.type):
        return None
    vectors = [vector for vector in (weight, bias, mean, variance) if vector is not None]
    fitting = x.dim() > 1 and isinstance(x.shape[1], int)
    return x if fitting and all((*v.shape, v.dtype) == (x.shape[1], x.dtype) for v in vectors) else None


def _is_plain(node: fx.Node) -> bool:
    """Whether a call gives new memory, which nobody writes to or reads sizes from.

    A write in place may change the shape that a tensor is known by: `x.t_()`.
    """
    target = node.target
    if not isinstance(target, OpOverload) or target.namespace not in _OURS:
        return False
    if any(result in written_inputs(user) or _BINDS in user.meta for result in _results(node) for user in result.users):
        return False
    return not (shared_inputs(node) or written_inputs(node))


def _results(node: fx.Node) -> Iterator[fx.Node]:
    yield node
    for user in node.users:
        if user.target is operator.getitem:
            yield from _results(user)


def _surroundings() -> Hashable:
    """Return what else the type of a result, or whether it is trained, may depend on."""
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype()


def _described(value: Any) -> Hashable | None:
    """Return all of an argument that the shape of a result may depend on; None for what is not known here."""
    if isinstance(value, list | tuple):
        items = tuple(map(_described, value))
        return None if None in items else (type(value), items)
    if isinstance(value, dict):
        return _described(tuple(value.items()))
    if isinstance(value, torch.Tensor):
        return _tensor(value)
    if isinstance(value, torch.SymInt):
        return torch.SymInt, value.node.expr
    known = isinstance(value, _CONSTANTS) or value is None
    return (type(value), value) if known else None  # with the type: 1, 1.0 and True are equal


_WITH_SYMBOLS = (torch.Tensor, torch.SymInt, torch.SymFloat, torch.SymBool)
_CONSTANTS = (bool, int, float, str, torch.dtype, torch.device, torch.layout, torch.memory_format)


def _tensor(value: torch.Tensor) -> Hashable | None:
    if type(value) is not FakeTensor or value.layout is not torch.strided or value.constant is not None:
        return None
    sizes = _described((*value.shape, *value.stride(), value.storage_offset()))
    flags = value.is_conj(), value.is_neg(), value.requires_grad
    return FakeTensor, value.dtype, value.device, _cast_there(value.device.type), value.dim(), sizes, flags


def _cast_there(kind: str) -> torch.dtype | None:
    """Return the type that autocast computes in on a kind of device, None where it is off."""
    known = torch.amp.is_autocast_available(kind)
    return torch.get_autocast_dtype(kind) if known and torch.is_autocast_enabled(kind) else None
