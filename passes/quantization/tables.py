"""Embedding tables as integers, each row with a scale of its own.

    embedding(w, ids)    ->    to(embedding(w_int, ids), float32) * embedding(s, ids)        s = max|row of w| / 127

A row becomes floating when it is read: what is computed stays float, and the table takes a quarter of its bytes.

Refused: tables that are small, computed at run time, not float32 or written to, whose values rounding would change too
much, or that another call reads as floats, which would be stored beside them; targets that read no integers by rows;
what `skip` names.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from graphopt.ir.aliasing import Storages
from graphopt.ir.editor import Editor
from graphopt.ir.finite import all_finite
from graphopt.ir.graph import constant
from graphopt.ir.operators import REORDERS, Family
from graphopt.ir.torch_internals import OpOverload
from graphopt.measure.decibels import decibels
from graphopt.passes.layers.codes import is_lookup
from graphopt.passes.layers.skipping import why_skipped
from graphopt.passes.quantization.plan import TableRecord, table_name
from graphopt.pipeline.plan import Refusal
from graphopt.quantization.formats import IntegerFormat
from graphopt.quantization.ops import DEQUANTIZE
from graphopt.quantization.qparams import quantize_weight, weight_scales
from graphopt.targets.description import TargetDescription

aten = torch.ops.aten

_SMALLEST = 1 << 16  # bytes; less is not worth three more operators
_BAGS = Family("embedding_bag", "_embedding_bag")
_OF_BAGS = "no bag of embeddings reads stored integers; nn.Embedding and a sum or a mean of what it gives do"
_LEAST_SQNR = 30.0  # dB; rows of a normal distribution have 44


def quantize_tables(
    gm: fx.GraphModule, target: TargetDescription, skip: Sequence[str], integers: Collection[fx.Node]
) -> tuple[list[TableRecord], dict[str, Tensor], list[Refusal]]:
    """Return a record for each read of a table, the integers and scales by name, and what stays float.

    Args:
        gm: the graph.
        target: what the runtime can do.
        skip: glob patterns of module paths or node names to leave float.
        integers: calls that store integers of what they read.
    """
    storages = Storages(gm.graph)
    records: list[TableRecord] = []
    tensors: dict[str, Tensor] = {}
    refusals: list[Refusal] = []
    for node in gm.graph.find_nodes(op="call_function", target=aten.embedding.default):
        source, weight = node.args[0], constant(node.args[0], gm)
        if weight is not None and not _is_large(weight):
            continue
        if is_lookup(node, gm) or any(user.target is DEQUANTIZE for user in node.users):
            continue  # entries, or scales, of what is stored small already
        reason = _why_not(node, weight, target.table, storages, skip) or _read_as_floats(node, skip, integers)
        name = table_name(str(source.target)) if isinstance(source, fx.Node) else ""
        if not reason and weight is not None and target.table is not None and name not in tensors:
            scales = weight_scales(weight.detach(), target.table, 0)
            rows = quantize_weight(weight.detach(), scales, target.table, 0)
            ratio = _sqnr(weight.detach(), rows, scales)
            if ratio < _LEAST_SQNR:
                reason = f"8 bits a row leave it {ratio:.0f} dB, {_LEAST_SQNR:.0f} are wanted", "8 bits are too few"
            else:
                tensors |= {name: rows, f"{name}_scale": scales}
        if reason:
            refusals.append(Refusal(node.name, *reason))
        else:
            records.append(TableRecord(site=node.name, weight=name))
    bags = [node for node in gm.graph.nodes if node.op == "call_function" and node in _BAGS]
    large = [node.name for node in bags if (weight := constant(node.args[0], gm)) is not None and _is_large(weight)]
    return records, tensors, [*refusals, *(Refusal(name, _OF_BAGS, "bags of floats") for name in large)]


def read_integers(editor: Editor, records: Iterable[TableRecord], tensors: Mapping[str, Tensor]) -> None:
    """Let every call that a record names read the stored integers."""
    nodes = {node.name: node for node in editor.graph.nodes}
    for record in records:
        node = nodes[record["site"]]
        dtype = node.meta["val"].dtype
        with editor.graph.inserting_before(node):

            def call(target: OpOverload, *args: Any, node: fx.Node = node) -> fx.Node:
                return editor.call(target, *args, like=node, site=node.name)

            def read(name: str, node: fx.Node = node) -> fx.Node:
                editor.put(name, tensors[name])
                return editor.read(name, like=node.args[0], site=node.name)  # type: ignore[arg-type]

            integers = call(aten.embedding.default, read(record["weight"]), *node.args[1:])
            column = call(aten.unsqueeze.default, read(f"{record['weight']}_scale"), 1)
            scale = call(aten.embedding.default, column, *node.args[1:])
            result = call(aten.mul.Tensor, call(aten.to.dtype, integers, dtype), scale)
        editor.replace(node, result)


def _is_large(weight: Tensor) -> bool:
    return weight.nbytes >= _SMALLEST


def _why_not(
    node: fx.Node, weight: Tensor | None, table: IntegerFormat | None, storages: Storages, skip: Sequence[str]
) -> tuple[str, str] | None:
    """Return why a table stays float, and the same without particulars; None if nothing is known."""
    if reasons := why_skipped(node, skip):
        return reasons
    if weight is None:
        return "its table is computed at run time", ""
    if not weight.is_floating_point():
        return "it is quantized already", ""
    if weight.dtype is not torch.float32:
        return f"its table is {str(weight.dtype).removeprefix('torch.')}, not float32", "its table is not float32"
    if writers := storages.writes(node.args[0]):  # type: ignore[arg-type]
        return f"`{writers[0].name}` writes to its table", "written in place"
    if not all_finite(weight):
        return "its table holds NaN or infinite values", ""
    return None if table is not None else ("the target reads no stored integers by rows", "")


def _read_as_floats(node: fx.Node, skip: Sequence[str], integers: Collection[fx.Node]) -> tuple[str, str] | None:
    """Return why a table stays float where something needs it as floats all the same."""
    table = node.args[0]
    assert isinstance(table, fx.Node)
    waiting = [user for read in node.graph.find_nodes(op="get_attr", target=table.target) for user in read.users]
    while waiting:
        reader = waiting.pop()
        if reader in integers or (reader.target is node.target and not why_skipped(reader, skip)):
            continue
        if reader not in REORDERS:
            return f"`{reader.name}` reads its table as floats, which would lie beside the integers", "read as floats"
        waiting += reader.users
    return None


def _sqnr(weight: Tensor, integers: Tensor, scales: Tensor) -> float:
    """Return the power of what tells rows of a table apart over that of what rounding changes, in dB."""
    noise = float((integers * scales.unsqueeze(1) - weight).square().sum(dtype=torch.float64))
    signal = float((weight - weight.mean(0)).square().sum(dtype=torch.float64))
    return decibels(signal, noise) if signal else math.inf
