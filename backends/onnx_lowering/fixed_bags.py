"""Bags of one fixed size as an embedding and a reduction, which every runtime has.

Given:   embedding_bag(weight, indices (bags * k,), offsets [0, k, 2k, ...], mode)
Result:  reduce(embedding(weight, indices (bags, k)), 1)

That is what `nn.EmbeddingBag` makes of 2-D indices. Entries at `padding_idx` are left out of the reduction, and a bag
of nothing else gives zeros. Bags of different sizes stay as they are: the exporter makes a loop over a sequence.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass

import torch
from torch import fx

from graphopt.ir.editor import Editor
from graphopt.ir.graph import arguments, erase_dead
from graphopt.ir.torch_internals import OpOverload, statically_known_true

aten = torch.ops.aten
_BAGS = (aten.embedding_bag.default, aten.embedding_bag.padding_idx)
_SUM, _MEAN, _MAX = range(3)  # embedding_bag's own numbers


@dataclass(frozen=True, slots=True)
class _Bags:
    """One call that looks up bags of `size` entries each."""

    result: fx.Node
    weight: fx.Node
    indices: fx.Node
    factors: fx.Node | None  # of the entries (bags * size,), None for 1
    mode: int
    padding: int | None
    size: int


def reduce_fixed_bags(gm: fx.GraphModule) -> None:
    """Rewrite the calls in place; results keep their names, which the signature of an exported program holds."""
    editor = Editor(gm, "lowering")
    for node in list(gm.graph.nodes):
        bags = _bags(node)
        if bags is None:
            continue
        with gm.graph.inserting_before(bags.result):
            reduced = _Reduction(editor, bags).build()
        name = bags.result.name
        editor.replace(bags.result, reduced)
        reduced.name = name
        erase_dead(gm.graph)


def _bags(node: fx.Node) -> _Bags | None:
    """Describe a call that looks up bags of one size, and of which nothing but the bags is read."""
    read = [user for user in node.users if user.users]  # exporting adds reads of every result
    if node.target not in _BAGS or len(read) != 1:
        return None
    (result,) = read
    given = arguments(node, ())
    size = _size(given["indices"], given["offsets"])
    if result.target is not operator.getitem or result.args[1] != 0 or size is None or given["include_last_offset"]:
        return None
    padding, weight = given.get("padding_idx"), given["weight"]
    if padding is not None and padding < 0:
        padding += int(weight.meta["val"].shape[0])
    return _Bags(result, weight, given["indices"], given["per_sample_weights"], given["mode"], padding, size)


def _size(indices: fx.Node, offsets: fx.Node) -> int | None:
    """Return how many entries each bag has, None where they differ or that is not known."""
    if offsets.target is not aten.arange.start_step:
        return None
    given = arguments(offsets, ())
    step = given["step"]
    if given["start"] != 0 or not isinstance(step, int):
        return None
    bags, entries = offsets.meta["val"].shape[0], indices.meta["val"].shape[0]
    return step if indices.meta["val"].dim() == 1 and statically_known_true(bags * step == entries) else None


class _Reduction:
    """Builds the calls for one lookup at the graph's insertion point."""

    def __init__(self, editor: Editor, bags: _Bags) -> None:
        self._editor = editor
        self._bags = bags

    def build(self) -> fx.Node:
        """Return the bags (bags, features)."""
        bags = self._bags
        rows = self._call(aten.reshape.default, bags.indices, [-1, bags.size])  # (bags, size)
        values = self._call(aten.embedding.default, bags.weight, rows)  # (bags, size, features)
        if bags.factors is not None:
            factors = self._call(aten.reshape.default, bags.factors, [-1, bags.size])
            values = self._call(aten.mul.Tensor, values, self._call(aten.unsqueeze.default, factors, -1))
        if bags.padding is None:
            reduce = {_SUM: aten.sum.dim_IntList, _MEAN: aten.mean.dim, _MAX: aten.amax.default}[bags.mode]
            return self._call(reduce, values, [1])
        counted = self._call(aten.unsqueeze.default, self._call(aten.ne.Scalar, rows, bags.padding), -1)
        return self._of_counted(values, counted)

    def _of_counted(self, values: fx.Node, counted: fx.Node) -> fx.Node:
        """Reduce the entries that are no padding; `counted` is (bags, size, 1)."""
        if self._bags.mode == _MAX:
            known = self._where(counted, values, -math.inf)
            largest = self._call(aten.amax.default, known, [1])
            return self._where(self._call(aten.any.dim, counted, 1), largest, 0.0)
        total = self._call(aten.sum.dim_IntList, self._where(counted, values, 0.0), [1])
        if self._bags.mode == _SUM:
            return total
        ones = self._call(aten.to.dtype, counted, values.meta["val"].dtype)
        count = self._call(aten.clamp_min.default, self._call(aten.sum.dim_IntList, ones, [1]), 1)
        return self._call(aten.div.Tensor, total, count)

    def _where(self, condition: fx.Node, values: fx.Node, otherwise: float) -> fx.Node:
        return self._call(aten.where.ScalarOther, condition, values, otherwise)

    def _call(self, target: OpOverload, *args: object) -> fx.Node:
        return self._editor.call(target, *args, like=self._bags.result)
