"""Which tensors of a program training may change, and putting changed ones in place."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from graphopt.ir.graph import constant
from graphopt.ir.operators import short_name
from graphopt.ir.program import Program


def trainable(program: Program) -> list[str]:
    """List the floating parameters that have a gradient, tied ones under their first name."""
    return [
        name
        for name, parameter in program.graph_module.named_parameters()
        if parameter.requires_grad and parameter.is_floating_point() and parameter.numel()
    ]


def integer_weights(program: Program) -> list[str]:
    """List the stored tensors that dequantize calls read: weights that quantization has frozen."""
    return [
        str(source.target)
        for node in program.graph.nodes
        if node.op == "call_function" and short_name(node) == "dequantize"
        for source in node.all_input_nodes[:1]
        if source.op == "get_attr"
    ]


def held_in_single_precision(program: Program) -> Program:
    """Store the trainable parameters of half precision in float32 and cast them where they are read, in place.

    The program computes what it did. In half precision itself the epsilon of Adam is 0 and most steps are less than
    the spacing of the weights (Micikevicius et al. 2018, section 3.1). The program must own its tensors.
    """
    gm = program.graph_module
    read = [(node, constant(node, gm)) for node in gm.graph.nodes]
    masters: dict[int, torch.nn.Parameter] = {}
    for node, tensor in read:
        half = isinstance(tensor, torch.nn.Parameter) and tensor.dtype in (torch.float16, torch.bfloat16)
        if tensor is None or not half or not tensor.requires_grad:
            continue
        master = masters.setdefault(id(tensor), torch.nn.Parameter(tensor.detach().float()))
        path, _, leaf = str(node.target).rpartition(".")
        setattr(gm.get_submodule(path), leaf, master)
        with gm.graph.inserting_after(node):
            cast = gm.graph.call_function(torch.ops.aten._to_copy.default, (node,), {"dtype": tensor.dtype})
        cast.meta = dict(node.meta)
        node.replace_all_uses_with(cast, delete_user_cb=lambda user, cast=cast: user is not cast)
    gm.recompile()
    return program


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
