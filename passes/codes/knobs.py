"""What `codebook` does to each weight of a program by itself: what calls then read, and the bytes it saves."""

from __future__ import annotations

import math

import torch
from torch import Tensor, fx

from graphopt.ir.program import Program
from graphopt.passes.codes.plan import CodebookPlan, CodesRecord, codes_name
from graphopt.passes.layers.code_packing import BYTE, digits, digits_of
from graphopt.passes.layers.weighted_call import WeightedCall, weighted_call
from graphopt.pipeline.knobs import Alternative, Knob, on_changed


def knobs_of(program: Program, plan: CodebookPlan) -> list[Knob]:
    """List what a plan does, weight by weight, in its order."""
    nodes = {node.name: node for node in program.graph.nodes}
    knobs = []
    for weight in plan.sites:
        record = plan.weights[weight]
        rows = _reals(plan, record)
        calls = {nodes[site]: _reading(nodes[site], rows, program) for site in record["sites"]}
        before, after = record["bytes"]
        knobs.append(Knob(weight, tuple(record["sites"]), calls, {"bytes": float(before - after)}))
    return knobs


def _reading(node: fx.Node, rows: Tensor, program: Program) -> Alternative:
    call = weighted_call(node, program.graph_module)
    if call is None:
        return on_changed(node, {node.args[0]: lambda _: rows})  # type: ignore[dict-item]
    weight = _as_weight(call, rows)
    return on_changed(node, {call.weight: lambda _: weight})


def _as_weight(call: WeightedCall, rows: Tensor) -> Tensor:
    """Return rows in the layout that a call takes."""
    shape = [int(size) for size in call.weight.meta["val"].shape]
    if call.kind in ("linear", "conv"):
        return rows.reshape(shape)
    if call.kind == "matmul":
        return rows.t()
    return rows.reshape(call.groups, shape[1], shape[0] // call.groups, *shape[2:]).transpose(1, 2).reshape(shape)


def _reals(plan: CodebookPlan, record: CodesRecord) -> Tensor:
    """Return the numbers that the stored codes stand for, (rows, columns) float32."""
    parts = {name.removeprefix(f"{record['name']}."): tensor for name, tensor in plan.tensors.items()}
    vectors = math.ceil(record["columns"] / record["vector"])
    count = vectors * record["rows"] // record["packed_rows"]  # codes of a packed row
    codes = torch.zeros(record["packed_rows"], count, dtype=torch.int64)
    for base, place in digits_of(record["parts"]).values():
        packed = parts[codes_name(base)].long()
        found = packed if base == BYTE else digits(base)[packed].flatten(1)
        codes += found[:, :count].long() * place
    if "tables" in parts:
        codes = codes.reshape(len(parts["tables"]), -1) + parts["tables"]
    values = parts["table"][codes.reshape(record["rows"], vectors)].flatten(1)[:, : record["columns"]]
    return values * parts["scale"].reshape(-1, 1) if "scale" in parts else values
