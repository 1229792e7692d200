"""Products whose kernel rounds its activations to int8, a scale for each block: MatMulNBits of accuracy level 4.

The program computes them in floating point. So a copy of the file at level 1, which does too, is what is verified; and
the file itself may be no further from it than that rounding explains.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import torch
from torch import fx

from graphopt.backends.onnx_execution.replay import Replay
from graphopt.ir.program import Program
from graphopt.quantization.ops import DEQUANTIZE

aten = torch.ops.aten
# Of products, where the activations are; the weight comes next.
_ACTIVATIONS: dict[Any, int] = {
    aten.linear.default: 0,
    aten.matmul.default: 0,
    aten.mm.default: 0,
    aten.addmm.default: 1,
}
_TURNS = (aten.t.default, aten.transpose.int, aten.permute.default)
_LEVEL, _ROUNDS, _EXACT = "accuracy_level", 4, 1


def multiplies_blocks(program: Program) -> bool:
    """Whether a program has products with blocks of integers, whose kernels may round."""
    places = ((node, _ACTIVATIONS.get(node.target)) for node in program.graph.nodes)
    return any(place is not None and _block(node.args[place + 1]) for node, place in places)


def without_rounding(path: Path) -> onnx.ModelProto:
    """Read an artifact such that its products take their activations as they are."""
    model = onnx.load(path, load_external_data=False)
    for node in model.graph.node:
        for attribute in node.attribute:
            if node.op_type == "MatMulNBits" and attribute.name == _LEVEL and attribute.i == _ROUNDS:
                attribute.i = _EXACT
    return model


class RoundedActivations(Replay):
    """Runs a program whose products with blocks of integers round what they multiply, as the runtime does."""

    def call(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one call."""
        place = _ACTIVATIONS.get(node.target)
        if place is not None and (block := _block(node.args[place + 1])):
            args = (*args[:place], _rounded(args[place], block), *args[place + 1 :])
        return super().call(node, args, kwargs)


def _block(weight: object) -> int:
    """Return the size of the blocks a weight is dequantized in, 0 for none."""
    while isinstance(weight, fx.Node) and weight.target in _TURNS:
        weight = weight.args[0]
    if not isinstance(weight, fx.Node) or weight.target is not DEQUANTIZE:
        return 0
    block = weight.args[4] if len(weight.args) > 4 else weight.kwargs.get("block")
    return block if isinstance(block, int) else 0


def _rounded(x: torch.Tensor, block: int) -> torch.Tensor:
    size = x.shape[-1]
    blocks = torch.nn.functional.pad(x, (0, -size % block)).reshape(*x.shape[:-1], -1, block)
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    steps = torch.round(blocks / torch.where(scale > 0, scale, 1.0))
    return (steps * scale).flatten(-2)[..., :size]
