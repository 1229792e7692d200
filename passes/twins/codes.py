"""Weights that are looked up in tables of values, as `codebook` stores them, in a form that trains.

table[codes]    ->    table[nearest(w)] + w - detach(w)        w: what each code stands for, in units of its scale

Values go straight through to w, which may get nearer to another entry; entries get the sum of what goes to their codes
(Han et al. 2016, "Deep Compression", section 3). Signs stay signs, with the scale trained: BinaryConnect (Courbariaux
et al. 2015) and ternary weights (Li and Liu 2016).
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn.functional import pad

from graphopt.ir.graph import constant, tensor_attribute
from graphopt.passes.layers.code_packing import bases, pack
from graphopt.passes.layers.codes import is_lookup

_CODES = re.compile(r"(?P<stem>.*)\.codes(?P<base>\d+)")  # what `codebook` calls the parts of codes
_DISTANCES = 1 << 24  # at once
_SIGNS = ([-1.0, 1.0], [-1.0, 0.0, 1.0])


@dataclass(frozen=True, eq=False)
class StoredLookup:
    """A weight that a graph looks up whole.

    Attributes:
        node: the entries, one after another.
        stem: what its tensors are called.
        parts: bases in which codes are packed.
        first: where the table of each run of codes begins, (runs, 1).
        packed_rows: in which bytes are stored.
    """

    node: fx.Node
    stem: str
    parts: tuple[int, ...]
    first: Tensor
    packed_rows: int

    @property
    def entries(self) -> int:
        """How many a table has."""
        return math.prod(self.parts)

    def looked_up(self, gm: fx.GraphModule) -> Tensor:
        """Return the entries, one after another."""
        known: dict[fx.Node, Any] = {}
        for node in gm.graph.nodes:
            if node.op == "get_attr":
                known[node] = constant(node, gm)
            elif node.op == "call_function" and node.all_input_nodes and known.keys() >= set(node.all_input_nodes):
                args, kwargs = fx.map_arg((node.args, node.kwargs), known.__getitem__)
                known[node] = node.target(*args, **kwargs)
            if node is self.node:
                break
        found: Tensor = known[self.node].detach()
        return found

    def signs(self, gm: fx.GraphModule) -> bool:
        """Whether entries are signs."""
        return tensor_attribute(gm, f"{self.stem}.table").flatten().tolist() in _SIGNS

    def near(self, rows: Sequence[Tensor], entries: Tensor, gm: fx.GraphModule) -> Tensor:
        """Return what codes stand for, of what they would best be where that is nearest to the same entries.

        Args:
            rows: weights, (rows, columns), of which the nearest is meant.
            entries: what they stand for.
            gm: the program.
        """
        table, scale = tensor_attribute(gm, f"{self.stem}.table"), getattr(gm.get_submodule(self.stem), "scale", None)
        units = table.new_ones(1, 1) if scale is None else torch.where(scale == 0, 1.0, scale.detach()).reshape(-1, 1)
        known = [one / units for one in rows if len(units) in (1, len(one))]
        wide = [pad(one, (0, -one.shape[1] % table.shape[1])) for one in known]
        ways = [one.reshape(entries.shape).to(entries) for one in wide if one.numel() == entries.numel()]
        if not ways:
            return entries
        wanted = min(ways, key=lambda one: float((one - entries).square().sum()))
        same = nearest(wanted, table, self.first, self.entries) == nearest(entries, table, self.first, self.entries)
        return torch.where(same.reshape(entries.shape[:-1]).unsqueeze(-1), wanted, entries)

    def of(self, reals: Tensor, table: Tensor) -> dict[str, Tensor]:
        """Return the bytes of the codes whose entries are nearest."""
        first = self.first.to(table.device)
        codes = nearest(reals, table, first, self.entries).reshape(len(first), -1) - first
        packed = pack(codes.reshape(self.packed_rows, -1), self.parts)
        return {f"{self.stem}.codes{base}": part for base, part in zip(self.parts, packed, strict=True)}


def find_lookups(gm: fx.GraphModule) -> list[StoredLookup]:
    """List the weights that are looked up whole; of others some rows are read, by their own bytes."""
    found, by_rows = [], set()
    for node in gm.graph.nodes:
        table = constant(node.args[0], gm) if is_lookup(node, gm) else None
        if table is None or not table.is_floating_point():
            continue
        behind = _behind(node.args[1])
        codes = [match for source in behind if (match := _CODES.fullmatch(str(source.target)))]
        if not codes:
            continue
        stem = codes[0]["stem"]
        if any(source.op == "placeholder" for source in behind):
            by_rows.add(stem)
        first = next((constant(source, gm) for source in behind if source.target == f"{stem}.tables"), None)
        parts = bases(math.prod(int(match["base"]) for match in codes))
        packed = tensor_attribute(gm, codes[0].string)
        first = torch.zeros(1, 1, dtype=torch.int64, device=packed.device) if first is None else first
        found.append(StoredLookup(node, stem, parts, first, len(packed)))
    return [lookup for lookup in found if lookup.stem not in by_rows]


@torch.library.custom_op("graphopt::nearest", mutates_args=())
def nearest(values: Tensor, table: Tensor, first: Tensor, entries: int) -> Tensor:
    """Return the numbers of the entries that values are nearest to.

    Args:
        values: (..., size of an entry), in as many runs as there are in `first`.
        table: (tables * entries, size).
        first: (runs, 1), where in `table` that of each run begins.
        entries: of a table.

    Returns:
        The shape of `values` without the last, int64.
    """
    runs = values.reshape(len(first), -1, table.shape[1])
    tables = table[first + torch.arange(entries, device=first.device)]  # (runs, entries, size)
    if table.shape[1] == 1:
        levels, order = tables[..., 0].sort(1)
        found = torch.searchsorted((levels[:, 1:] + levels[:, :-1]) / 2, runs[..., 0].contiguous())
        found = order.gather(1, found)
    else:
        found = torch.stack([_closest(*pair) for pair in zip(runs, tables, strict=True)])
    return (found + first).reshape(values.shape[:-1])


@nearest.register_fake
def _(values: Tensor, table: Tensor, first: Tensor, entries: int) -> Tensor:
    return values.new_empty(values.shape[:-1], dtype=torch.int64)


NEAREST = torch.ops.graphopt.nearest.default


def _closest(vectors: Tensor, table: Tensor) -> Tensor:
    step = max(1, _DISTANCES // len(table))
    parts = torch.split(vectors, step)
    return torch.cat([torch.addmm(table.square().sum(1), part, table.T, alpha=-2).argmin(1) for part in parts])


def _behind(value: object) -> list[fx.Node]:
    """List everything that a value is computed of."""
    found: dict[fx.Node, None] = {}
    waiting = [value]
    while waiting:
        node = waiting.pop()
        if isinstance(node, fx.Node) and node not in found:
            found[node] = None
            waiting += node.all_input_nodes
    return list(found)
