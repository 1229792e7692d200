"""Carries out a plan of `codebook`: in the place of a weight stands what is looked up of it.

codes                = digits[bytes], those of parts added up, and where the table of their rows begins
w                    = table[codes] * scale, cut to its columns, in the shape of the weight
embedding(w, ids)    = table[codes] * scale[ids], with the bytes of the rows `ids`

In plain ATen operators, whose bytes `passes.layers.codes` tells from the ids of an embedding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from graphopt.errors import PassError
from graphopt.ir.editor import Editor
from graphopt.ir.graph import tensor_attribute
from graphopt.ir.torch_internals import OpOverload
from graphopt.passes.codes.plan import CodebookPlan, CodesRecord, codes_name
from graphopt.passes.layers.code_packing import BYTE, digits, digits_of, per_byte
from graphopt.passes.layers.weighted_call import WeightedCall, weighted_call

aten = torch.ops.aten


class CodesRewriter:
    """Rewrites the graph of one program."""

    def __init__(self, editor: Editor, plan: CodebookPlan) -> None:
        self._editor = editor
        self._plan = plan
        self._nodes = {node.name: node for node in editor.graph.nodes}
        self._digits: dict[str, str] = {}  # what the tables that take bytes apart are stored under

    def run(self) -> None:
        """Let every reader of a weight read what is looked up."""
        for weight in self._plan.sites:  # in graph order, which a mapping out of a file has not
            record = self._plan.weights[weight]
            reads = self._store(weight, record)
            readers = [self._node(site) for site in record["sites"]]
            rows = [node for node in readers if node.target is aten.embedding.default]
            for node in rows:
                with self._editor.graph.inserting_before(node):
                    new = _Lookup(self._editor, node, record, reads).some_rows()
                self._editor.replace(node, new)
            if calls := [self._call(node) for node in readers if node not in rows]:
                with self._editor.graph.inserting_before(calls[0].node):
                    whole = _Lookup(self._editor, calls[0].node, record, reads).whole(calls[0])
                for call in calls:
                    call.node.replace_input_with(call.weight, whole)

    def _node(self, name: str) -> fx.Node:
        if name not in self._nodes:
            raise PassError(f"The plan names `{name}`, which this program has not. Make the plan again.")
        node: fx.Node = self._nodes[name]
        return node

    def _call(self, node: fx.Node) -> WeightedCall:
        call = weighted_call(node, self._editor.gm)
        if call is None:
            raise PassError(f"The plan takes `{node.name}` for a layer with a stored weight. Make the plan again.")
        return call

    def _store(self, weight: str, record: CodesRecord) -> dict[str, fx.Node]:
        """Store the tensors of a weight, and return the reads of them at the top of the graph."""
        stem, editor = record["name"], self._editor
        old = tensor_attribute(editor.gm, weight)
        own = sorted(name for name in self._plan.tensors if name.startswith(f"{stem}."))
        names = {name.removeprefix(f"{stem}."): name for name in own}
        for name in names.values():
            editor.put(name, self._plan.tensors[name], kind_of=old)
        for key, (base, place) in digits_of(record["parts"]).items():
            if base < BYTE:
                names[key] = self._digits.setdefault(key, f"{stem}.{key}")
                editor.put(names[key], digits(base) * place)
        like = self._node(record["sites"][0])
        with editor.graph.inserting_before(next(iter(editor.graph.nodes))):
            return {key: editor.read(name, like=like, site=weight) for key, name in names.items()}


class _Lookup:
    """Inserts what looks up one weight, before the node it is for."""

    def __init__(self, editor: Editor, node: fx.Node, record: CodesRecord, reads: dict[str, fx.Node]) -> None:
        self._editor = editor
        self._node = node
        self._record = record
        self._reads = reads
        vectors = math.ceil(record["columns"] / record["vector"])
        self._count = vectors * record["rows"] // record["packed_rows"]  # codes of a packed row
        self._width = vectors * record["vector"]

    def some_rows(self) -> fx.Node:
        """Insert the rows that an embedding reads, in the place of it."""
        ids = self._node.args[1]
        assert isinstance(ids, fx.Node)  # an embedding is of a tensor
        parts = [self._call(aten.embedding.default, part, ids) for part in self._stored_codes]
        values = self._in_rows(self._entries(parts), [-1, self._record["columns"]])
        flat = self._call(aten.reshape.default, ids, [-1])
        scale = self._call(aten.index_select.default, self._reads["scale"], 0, flat)  # no embedding of the model's
        scaled = self._call(aten.mul.Tensor, values, scale)
        return self._call(aten.view.default, scaled, [*self._sizes(ids), self._record["columns"]])

    def whole(self, call: WeightedCall) -> fx.Node:
        """Insert all of the weight, in the layout that `call` takes."""
        shape = [int(size) for size in call.weight.meta["val"].shape]
        straight = call.kind in ("linear", "conv")
        rows = shape if straight else [self._record["rows"], self._record["columns"]]
        values = self._in_rows(self._entries(self._stored_codes), rows)
        if "scale" in self._reads:
            values = self._call(aten.mul.Tensor, values, self._reads["scale"])
        if straight:
            return values
        if call.kind == "matmul":
            return self._call(aten.permute.default, values, [1, 0])
        grouped = [call.groups, shape[1], shape[0] // call.groups, *shape[2:]]
        turned = self._call(aten.transpose.int, self._call(aten.view.default, values, grouped), 1, 2)
        return self._call(aten.reshape.default, turned, shape)

    @property
    def _stored_codes(self) -> list[fx.Node]:
        return [self._reads[codes_name(base)] for base in self._record["parts"]]

    def _entries(self, parts: Sequence[fx.Node]) -> fx.Node:
        """Insert the entries that packed rows stand for, one after another in any shape."""
        codes = None
        for packed, base, name in zip(parts, self._record["parts"], digits_of(self._record["parts"]), strict=True):
            digit = self._digit(packed, base, name, alone=len(parts) == 1)
            codes = digit if codes is None else self._call(aten.add.Tensor, codes, digit)
        assert codes is not None  # there is at least one part
        if "tables" in self._reads:
            first = self._reads["tables"]
            grouped = self._call(aten.view.default, codes, [first.meta["val"].shape[0], -1])
            codes = self._call(aten.add.Tensor, grouped, first)
        return self._call(aten.embedding.default, self._reads["table"], codes)

    def _digit(self, packed: fx.Node, base: int, name: str, *, alone: bool) -> fx.Node:
        """Insert the digits to a base of packed rows, int64; (packed rows, codes of each), or in any shape if alone."""
        found = self._call(aten._to_copy.default, packed, dtype=torch.int64)
        if base < BYTE:
            found = self._call(aten.embedding.default, self._reads[name], found)
            stored = math.ceil(self._count / per_byte(base)) * per_byte(base)
            if stored != self._count or not alone:
                found = self._cut(self._call(aten.view.default, found, [-1, stored]), self._count)
            found = self._call(aten._to_copy.default, found, dtype=torch.int64)
        return found

    def _in_rows(self, entries: fx.Node, shape: Sequence[int]) -> fx.Node:
        """Insert entries as rows of the weight, without what fills up the last of each, in a shape."""
        if self._width == self._record["columns"]:
            return self._call(aten.view.default, entries, list(shape))
        rows = self._cut(self._call(aten.view.default, entries, [-1, self._width]), self._record["columns"])
        return rows if len(shape) == 2 else self._call(aten.reshape.default, rows, list(shape))

    def _cut(self, rows: fx.Node, columns: int) -> fx.Node:
        if rows.meta["val"].shape[1] == columns:
            return rows
        return self._call(aten.slice.Tensor, rows, 1, 0, columns)

    def _sizes(self, value: fx.Node) -> list[Any]:
        sizes = enumerate(value.meta["val"].shape)
        return [size if isinstance(size, int) else self._call(aten.sym_size.int, value, axis) for axis, size in sizes]

    def _call(self, target: OpOverload, *args: Any, **kwargs: Any) -> fx.Node:
        return self._editor.call(target, *args, like=self._node, site=self._node.name, **kwargs)
