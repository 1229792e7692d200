"""The device of a program: where its tensors lie, and what its graph says of devices.

zeros(2, device=cpu)               zeros(2, device=cuda:0)
x.to("cpu")                        x.to("cuda:0")
wrap_with_autocast("cpu", ..)      wrap_with_autocast("cuda", ..)
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx

from graphopt.ir.graph import arguments, fake_mode_of
from graphopt.ir.operators import kinds_of_arguments
from graphopt.ir.ownership import change_tensors
from graphopt.ir.regions import every_graph_module, region
from graphopt.ir.torch_internals import FakeTensor, OpOverload, pytree
from graphopt.ir.training import set_argument


def place(gm: fx.GraphModule, device: torch.device) -> None:
    """Move what a graph module holds to a device, in place: tensors, tied ones once, and what its graphs name.

    What it computes on several devices is on one afterwards.
    """
    change_tensors([gm], lambda tensor: tensor.to(device))
    mode = fake_mode_of(gm)
    for module in every_graph_module(gm):
        for node in module.graph.nodes:
            for name in _devices(node):
                set_argument(node, name, device)
            found = region(node, module)
            if found is not None and found.form == "block":
                node.update_arg(0, device.type)
            with mode:
                for key in ("val", "example_value") & node.meta.keys():
                    node.meta[key] = pytree.tree_map_only(FakeTensor, lambda value: value.to(device), node.meta[key])
        module.recompile()


def _devices(node: fx.Node) -> Iterator[str]:
    """Yield the arguments of a call that name a device."""
    if isinstance(node.target, OpOverload):
        given = arguments(node, ())
        kinds = kinds_of_arguments(node.target)
        yield from (name for name, kind in kinds.items() if kind == "Device" and given.get(name) is not None)
