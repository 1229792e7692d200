"""Integers that a program stores of a weight or a bias, and where it reads them as real numbers.

dequantize(q, s, z)                              q, s, z: stored
dequantize(unpack(q), s, unpack(z))              several integers to a byte
dequantize(unpack(embedding(q, ids)), ..)        some rows of them
dequantize(t(q), s, z)                           the table of an embedding, for a product
to(embedding(q, ids)) * embedding(s, ids)        some rows, a scale for each
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from graphopt.ir.graph import arguments, constant, tensor_attribute
from graphopt.ir.operators import CASTS
from graphopt.quantization.ops import DEQUANTIZE, UNPACK, dequantize, pack, rounded, spread, to_integers, unpack
from graphopt.quantization.stored_range import recorded_range

aten = torch.ops.aten

_WHOLE = (UNPACK, aten.t.default, aten.embedding.default, aten.unsqueeze.default)
_UNSAID = {torch.int8: (-127, 127), torch.int32: (-(2**31) + 1, 2**31 - 1)}
_WITHIN = 0.499  # of a step: what is further from an integer may round to the next


@dataclass(frozen=True, eq=False)
class StoredIntegers:
    """Integers under one name, as they lie in a program.

    Attributes:
        name: of the integers, or of the bytes that they are packed in.
        scale: name of their scale.
        zero: their zero point, as `dequantize` takes it.
        axis: the axis that scales differ along, None for one scale.
        block: how many along it share one, None where each has its own.
        packing: how many a row of bytes holds, of how many bits, from which on; None where each is a number of its own.
        low: the smallest they may be.
        high: the largest.
    """

    name: str
    scale: str
    zero: Tensor
    axis: int | None
    block: int | None
    packing: tuple[int, int, int] | None
    low: int
    high: int

    def reals(self, gm: fx.GraphModule) -> Tensor:
        """Return what the integers of a program stand for."""
        integers, scale = unpacked(tensor_attribute(gm, self.name), self.packing), tensor_attribute(gm, self.scale)
        found: Tensor = dequantize(integers, scale, self.zero, self.axis, self.block)
        return found

    def near(self, wanted: Sequence[Tensor], gm: fx.GraphModule) -> Tensor:
        """Return the numbers nearest those wanted, either way round, that round to the integers of a program.

        Args:
            wanted: what they would best be: the nearest of these that has their shape.
            gm: the program.
        """
        reals = self.reals(gm)
        ways = [way for one in wanted for way in ((one, one.mT) if one.dim() == 2 else (one,))]
        off = [way.to(reals) - reals for way in ways if way.shape == reals.shape]
        if not off:
            return reals
        steps = spread(tensor_attribute(gm, self.scale), reals, self.axis, self.block)
        nearest = min(off, key=lambda one: float(one.square().sum()))
        return reals + nearest.clamp(-_WITHIN * steps, _WITHIN * steps)

    def of(self, reals: Tensor, scale: Tensor) -> Tensor:
        """Return what is stored of real numbers."""
        zero = self.zero.to(reals.device)
        integers = rounded(reals, scale, zero, self.axis, self.low, self.high, self.block)
        if self.packing is None:
            return to_integers(integers, self.zero.dtype)
        _, bits, low = self.packing
        return pack(integers, bits, low)


@dataclass(frozen=True, eq=False)
class IntegerRead:
    """Where stored integers become real numbers.

    Attributes:
        node: the numbers.
        integers: what is read.
        rows: the look-up of some of their rows, None where all are read.
        turned: whether they are transposed.
    """

    node: fx.Node
    integers: StoredIntegers
    rows: fx.Node | None
    turned: bool


def find_reads(gm: fx.GraphModule) -> list[IntegerRead]:
    """List where a graph reads stored integers, in graph order."""
    known: dict[str, StoredIntegers] = {}
    reads = []
    for node in gm.graph.nodes:
        found = _dequantization(node) or _scaled_rows(node)
        way, base = stored_way(found["q"]) if found is not None else ((), None)
        if found is None or base is None:
            continue
        rows = next((step for step in way if step.target is aten.embedding.default), None)
        turned = any(step.target is aten.t.default for step in way)
        name = str(base.target)
        if name not in known:
            unpacking = next((step for step in way if step.target is UNPACK), None)
            packing = None if unpacking is None else tuple(unpacking.args[1:])
            axis = 1 - found["axis"] if turned and found["axis"] is not None else found["axis"]
            known[name] = _described(node, name, found, axis, packing, gm)
        reads.append(IntegerRead(node, known[name], rows, turned))
    return reads


def stored_way(value: Any) -> tuple[list[fx.Node], fx.Node | None]:
    """Return the calls by which a value is read of a stored tensor, last first, and its read; None where it is not."""
    way = []
    while isinstance(value, fx.Node) and value.target in _WHOLE:
        way.append(value)
        value = value.args[0]
    return way, value if isinstance(value, fx.Node) and value.op == "get_attr" else None


def unpacked(stored: Tensor, packing: tuple[int, int, int] | None) -> Tensor:
    """Return the integers in bytes."""
    if packing is None:
        return stored
    found: Tensor = unpack(stored, *packing)
    return found


def _dequantization(node: fx.Node) -> dict[str, Any] | None:
    return arguments(node, ()) if node.target is DEQUANTIZE else None


def _scaled_rows(node: fx.Node) -> dict[str, Any] | None:
    """Return what `dequantize` would take of all rows of an embedding table, where a call scales some of them."""
    if node.target is not aten.mul.Tensor or node.args[0] not in CASTS:
        return None
    integers, scale = (stored_way(value) for value in (node.args[0].args[0], node.args[1]))  # type: ignore[union-attr]
    if None in (integers[1], scale[1]) or integers[0][0].meta["val"].is_floating_point():
        return None
    return {"q": integers[0][0], "scale": node.args[1], "zero_point": None, "axis": 0, "block": None}


def _described(
    read: fx.Node, name: str, found: dict[str, Any], axis: int | None, packing: Any, gm: fx.GraphModule
) -> StoredIntegers:
    stored = tensor_attribute(gm, name)
    scale, (way, zero_read) = stored_way(found["scale"])[1], stored_way(found["zero_point"])
    assert scale is not None  # scales are stored
    zero = constant(zero_read, gm)
    if zero is None:
        zero = torch.zeros_like(tensor_attribute(gm, str(scale.target)), dtype=stored.dtype)
    unpacking = next((step for step in way if step.target is UNPACK), None)
    zero = unpacked(zero, None if unpacking is None else tuple(unpacking.args[1:]))  # type: ignore[arg-type]
    low, high = _range(read, stored.dtype, packing)
    return StoredIntegers(name, str(scale.target), zero, axis, found["block"], packing, low, high)


def _range(read: fx.Node, dtype: torch.dtype, packing: tuple[int, int, int] | None) -> tuple[int, int]:
    """Return the range of integers: as the call that reads them says, or as wide as what they are stored in."""
    if packing is not None:
        _, bits, low = packing
        widest = low, low + (1 << bits) - 1
    else:
        widest = torch.iinfo(dtype).min, torch.iinfo(dtype).max
    least, most = recorded_range(read) or _UNSAID.get(dtype, widest)
    return max(least, widest[0]), min(most, widest[1])
