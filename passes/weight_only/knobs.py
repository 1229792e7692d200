"""What `weights` does to each weight of a program by itself: what calls then read, and the bytes it saves."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, fx

from graphopt.ir.program import Program
from graphopt.passes.layers.weighted_call import layer_call
from graphopt.passes.weight_only.plan import RowsRecord, WeightsPlan, stored_as
from graphopt.pipeline.knobs import Knob, on_changed
from graphopt.quantization.ops import dequantize, unpack


def knobs_of(program: Program, plan: WeightsPlan) -> list[Knob]:
    """List what a plan does, weight by weight, in its order."""
    nodes = {node.name: node for node in program.graph.nodes}
    knobs = []
    for name in plan.sites:
        rows = plan.weights[name]
        weight = _reals(plan, name, rows)
        calls = {nodes[site]: on_changed(nodes[site], _read(nodes[site], weight, program)) for site in rows["sites"]}
        before, after = rows["bytes"]
        knobs.append(Knob(name, tuple(rows["sites"]), calls, {"bytes": float(before - after)}))
    return knobs


def _read(node: fx.Node, weight: Tensor, program: Program) -> dict[fx.Node, Callable[[Tensor], Tensor]]:
    layer = layer_call(node, program.graph_module)
    if layer is None:
        return {node.args[0]: lambda _: weight}  # type: ignore[dict-item]
    return {layer.weight: lambda _: weight.t() if layer.kind == "matmul" else weight}


def _reals(plan: WeightsPlan, name: str, rows: RowsRecord) -> Tensor:
    """Return the numbers that the stored integers stand for, (outputs, inputs)."""
    stored = stored_as(name, rows["bits"])
    integers, scale, zero = (plan.tensors[f"{stored}{part}"] for part in ("", "_scale", "_zero_point"))
    if rows["stored_bits"] != 8:
        integers = unpack(integers, rows["columns"], rows["stored_bits"], rows["low"])
        if not rows["symmetric"]:
            blocks = -(-rows["columns"] // rows["block"])
            zero = unpack(zero, blocks, rows["stored_bits"], rows["low"])
    result: Tensor = dequantize(integers, scale, zero, -1, rows["block"])
    return result
