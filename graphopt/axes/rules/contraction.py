"""Contractions: every operator that multiplies and sums, written as an einsum over labelled dimensions.

A label names one index. Dimensions with the same label are the same positions; a label that is missing from
the result is summed over. A weight operand consumes what is summed and produces what it alone brings in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from graphopt.axes.call import Call
from graphopt.axes.layout import ONE, Dims, Layout, leaves
from graphopt.axes.registry import rule


@dataclass(frozen=True, slots=True)
class Operand:
    """One factor of a contraction."""

    node: Any
    dims: Dims
    labels: tuple[str, ...]


def contract(call: Call, operands: Sequence[Operand], result: Sequence[str]) -> Dims:
    """State the equations of an einsum and who produces and consumes what; return the result's layouts."""
    by_label: dict[str, Layout] = {}
    for operand in operands:
        for label, layout in zip(operand.labels, operand.dims, strict=True):
            if by_label.get(label, ONE) == ONE:
                by_label[label] = layout
            else:
                call.unify(by_label[label], layout)
    _assign_roles(call, operands, result, by_label)
    return tuple(by_label[label] for label in result)


def _assign_roles(call: Call, operands: Sequence[Operand], result: Sequence[str], by_label: dict[str, Layout]) -> None:
    activations = [op for op in operands if not call.is_weight(op.node)]
    if len(activations) == 2:
        _mark_attention(call, activations, result, by_label)
    for label in by_label:
        holders = [op for op in operands if label in op.labels]
        if label not in result and len(holders) > 1 and all(op in activations for op in holders):
            call.sums(by_label[label])
        for place, operand in enumerate(holders):
            if not call.is_weight(operand.node):
                continue
            dim = operand.labels.index(label)
            if not activations:
                # One weight computed from others: what they share, the first makes and the rest use up.
                if label not in result:
                    (call.consumes if place else call.produces)(operand.node, dim)
            elif label not in result:
                call.consumes(operand.node, dim)
            elif len(holders) == 1:
                call.produces(operand.node, dim)


def _mark_attention(
    call: Call, activations: Sequence[Operand], result: Sequence[str], by_label: dict[str, Layout]
) -> None:
    """Name the axes of a product of two activations: what it is done for each of, heads; the rest, head_dim."""
    shared = [label for label in by_label if all(label in op.labels for op in activations)]
    heads = [label for label in shared if label in result]
    for label in heads:
        call.mark(by_label[label], "heads")
    if any(isinstance(axis.size, int) for label in heads for axis in leaves(by_label[label])):
        for label, layout in by_label.items():
            if label not in heads:
                call.mark(layout, "head_dim")


def _labels(prefix: str, count: int) -> tuple[str, ...]:
    return tuple(f"{prefix}{count - index}" for index in range(count))  # counted from the last: broadcasting


@rule("aten::linear")
def linear(call: Call) -> Dims:
    x, weight = call.dims("input"), call.dims("weight")
    batch = _labels("b", len(x) - 1)
    out = ("o",) if len(weight) == 2 else ()
    dims = contract(
        call,
        [
            Operand(call.arg("input"), x, (*batch, "i")),
            Operand(call.arg("weight"), weight, (*out, "i")),
        ],
        (*batch, *out),
    )
    if call.has("bias"):
        call.broadcast([dims, call.dims("bias")])
    return dims


@rule("aten::matmul", "aten::mm", "aten::bmm", "aten::mv", "aten::dot", "aten::vdot")
def matmul(call: Call) -> Dims:
    left, right = _tensor_names(call)
    return _product(call, call.arg(left), call.arg(right))


@rule("aten::addmm", "aten::baddbmm", "aten::addbmm", "aten::addmv")
def addmm(call: Call) -> Dims:
    _, left, right = _tensor_names(call)
    dims = _product(call, call.arg(left), call.arg(right))
    if len(dims) > len(call.shape()):  # addbmm sums over the batch
        dims = dims[1:]
    return call.broadcast([dims, call.dims("self")])


def _product(call: Call, left: Any, right: Any) -> Dims:
    a, b = call.dims_of(left), call.dims_of(right)
    rows = ("m",) if len(a) > 1 else ()
    columns = ("n",) if len(b) > 1 else ()
    batch_a, batch_b = _labels("b", max(len(a) - 2, 0)), _labels("b", max(len(b) - 2, 0))
    batch = batch_a if len(batch_a) > len(batch_b) else batch_b
    operands = [
        Operand(left, a, (*batch_a, *rows, "k")),
        Operand(right, b, (*batch_b, "k", *columns)),
    ]
    return contract(call, operands, (*batch, *rows, *columns))


def _tensor_names(call: Call) -> list[str]:
    return [name for name in call.names() if call.has(name)]


@rule("aten::outer", "aten::ger")
def outer(call: Call) -> Dims:
    (a,), (b,) = call.dims("self"), call.dims("vec2")
    operands = [Operand(call.arg("self"), (a,), ("m",)), Operand(call.arg("vec2"), (b,), ("n",))]
    return contract(call, operands, ("m", "n"))


@rule("aten::bilinear")
def bilinear(call: Call) -> Dims:
    x, y = call.dims("input1"), call.dims("input2")
    batch = _labels("b", len(x) - 1)
    operands = [
        Operand(call.arg("input1"), x, (*batch, "i")),
        Operand(call.arg("input2"), y, (*batch, "j")),
        Operand(call.arg("weight"), call.dims("weight"), ("o", "i", "j")),
    ]
    dims = contract(call, operands, (*batch, "o"))
    if call.has("bias"):
        call.broadcast([dims, call.dims("bias")])
    return dims


@rule("aten::tensordot")
def tensordot(call: Call) -> Dims:
    a, b = call.dims("self"), call.dims("other")
    dims_a, dims_b = call.positions("dims_self", len(a)), call.positions("dims_other", len(b))
    if not call.arg("dims_self"):
        dims_a, dims_b = [], []
    labels_a = [f"a{index}" for index in range(len(a))]
    labels_b = [f"b{index}" for index in range(len(b))]
    for i, j in zip(dims_a, dims_b, strict=True):
        labels_b[j] = labels_a[i]
    result = [lab for i, lab in enumerate(labels_a) if i not in dims_a]
    result += [lab for j, lab in enumerate(labels_b) if j not in dims_b]
    operands = [
        Operand(call.arg("self"), a, tuple(labels_a)),
        Operand(call.arg("other"), b, tuple(labels_b)),
    ]
    return contract(call, operands, result)


@rule("aten::einsum")
def einsum(call: Call) -> Dims:
    nodes = list(call.arg("tensors"))
    shapes = [call.dims_of(node) for node in nodes]
    terms, result = parse_equation(str(call.arg("equation")), [len(dims) for dims in shapes])
    operands = [Operand(n, d, t) for n, d, t in zip(nodes, shapes, terms, strict=True)]
    return contract(call, operands, result)


def parse_equation(equation: str, ranks: Sequence[int]) -> tuple[list[tuple[str, ...]], tuple[str, ...]]:
    """Split an einsum equation into labels per operand and of the result; `...` becomes numbered labels."""
    left, arrow, right = equation.replace(" ", "").partition("->")
    terms = [_expand(term, rank) for term, rank in zip(left.split(","), ranks, strict=True)]
    every = [label for term in terms for label in term]
    ellipsis = max(([lab for lab in term if lab.startswith("b")] for term in terms), key=len)
    if not arrow:
        once = sorted(lab for lab in set(every) if not lab.startswith("b") and every.count(lab) == 1)
        return terms, (*ellipsis, *once)
    before, dots, after = right.partition("...")
    return terms, (*_letters(before), *(ellipsis if dots else ()), *_letters(after))


def _expand(term: str, rank: int) -> tuple[str, ...]:
    before, dots, after = term.partition("...")
    count = rank - len(before) - len(after) if dots else 0
    return (*_letters(before), *_labels("b", count), *_letters(after))


def _letters(term: str) -> tuple[str, ...]:
    return tuple(f"l{letter}" for letter in term)


@rule("aten::cdist")
def cdist(call: Call) -> Dims:
    """Compare every row of one with every row of the other."""
    a, b = call.dims("x1"), call.dims("x2")
    call.unify(a[-1], b[-1])
    call.sums(a[-1])
    return (*call.broadcast([a[:-2], b[:-2]]), a[-2], b[-2])


@rule("aten::_grouped_mm", "transformers::grouped_mm_fallback")
def grouped_mm(call: Call) -> Dims:
    """Multiply runs of rows, each by its own expert's matrix: (rows, in) and (experts, in, out)."""
    left, right, offsets = (name for name in _tensor_names(call)[:3])
    x, weight = call.dims(left), call.dims(right)
    if len(x) != 2 or len(weight) != 3:
        call.freeze((*x, *weight), "grouped otherwise than by rows")
        return call.axes(call.shape(), call.because("grouped otherwise than by rows"))
    call.freeze((x[0], weight[0], *call.dims(offsets)), "rows are assigned to experts")
    operands = [Operand(call.arg(left), x, ("t", "i")), Operand(call.arg(right), weight, ("e", "i", "o"))]
    return contract(call, operands, ("t", "o"))
