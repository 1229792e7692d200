"""Which tensors of a program training may change, and putting changed ones in place."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from graphopt.ir.operators import short_name
from graphopt.ir.program import Program
from graphopt.ir.zeros import held_zeros


def trainable(program: Program) -> list[str]:
    """List the floating parameters that have a gradient, tied ones under their first name."""
    return [
        name
        for name, parameter in program.graph_module.named_parameters()
        if parameter.requires_grad and parameter.is_floating_point() and parameter.numel()
    ]


def integer_weights(program: Program) -> list[str]:
    """List the stored integers that are dequantized or unpacked: weights that quantization has frozen."""
    return [
        str(source.target)
        for node in program.graph.nodes
        if node.op == "call_function" and short_name(node) in ("dequantize", "unpack")
        for source in node.all_input_nodes[:1]
        if source.op == "get_attr"
    ]


def keep_zeros(program: Program) -> None:
    """Let no training of a program's parameters change the zeros that a pass has chosen (`graphopt.ir.zeros`)."""
    parameters = dict(program.graph_module.named_parameters())
    for name, mask in held_zeros(program.graph_module).items():

        def masked(parameter: torch.Tensor, mask: torch.Tensor = mask) -> None:
            assert parameter.grad is not None  # it has just been computed
            parameter.grad.mul_(mask)

        if parameters[name].requires_grad:
            parameters[name].register_post_accumulate_grad_hook(masked)  # type: ignore[no-untyped-call]


def overwrite(program: Program, tensors: Mapping[str, torch.Tensor]) -> None:
    """Copy `tensors` into those of `program`, in place, so that tied names stay tied. The program must own them."""
    stored = program.state_dict()
    with torch.no_grad():
        for name, tensor in tensors.items():
            stored[name].copy_(tensor)


def snapshot(program: Program, names: list[str]) -> dict[str, torch.Tensor]:
    """Copy the tensors called `names` to the CPU."""
    stored = program.state_dict()
    return {name: stored[name].detach().cpu().clone() for name in names}


def floating(program: Program) -> dict[str, torch.Tensor]:
    """Copy all floating tensors to the CPU."""
    return snapshot(program, [name for name, tensor in program.state_dict().items() if tensor.is_floating_point()])
