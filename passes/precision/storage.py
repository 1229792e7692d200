"""Which weights are stored in 16 bits where the runtime does not compute in them, and is given float32.

    w    ->    to(w', float32)        w' = w in 16 bits; the runtime converts it back once, when it loads the file

Left in float32, each with its reason: what is written to, what 16 bits cannot hold, scales of integers and what stands
beside them, what `skip` names. Weights of a few kilobytes stay as they are, and go unmentioned beside larger ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, fx

from graphopt.ir.aliasing import Storages
from graphopt.ir.graph import constant
from graphopt.ir.operators import plain_name
from graphopt.ir.ownership import memory_key
from graphopt.passes.layers.skipping import why_skipped
from graphopt.passes.precision.numbers import of_tensor
from graphopt.passes.precision.placement import Wishes
from graphopt.pipeline.plan import Refusal

_FOLDED = 8192  # elements; what is done to no more, the exporter does once and for all: float32 would be stored


def stored_halves(gm: fx.GraphModule, dtype: torch.dtype, wishes: Wishes) -> tuple[list[str], list[Refusal]]:
    """List the weights to store, under every name they are read by, and those that are left.

    Args:
        gm: the graph.
        dtype: the type of 16 bits.
        wishes: what is to stay float32.
    """
    storages = Storages(gm.graph)
    reads: dict[object, list[fx.Node]] = {}
    small = 0
    for node in gm.graph.find_nodes(op="get_attr"):
        tensor = constant(node, gm)
        if tensor is None or tensor.dtype is not torch.float32:
            continue
        if tensor.numel() > _FOLDED:
            reads.setdefault(memory_key(tensor), []).append(node)
        elif not _of_integers([node]):
            small += 1
    if small and not reads:
        return [], [Refusal("the program", f"none of its {small} weights has more than {_FOLDED} numbers")]
    names: list[str] = []
    refusals = []
    for nodes in reads.values():
        tensor = constant(nodes[0], gm)
        assert tensor is not None  # it was listed
        if _of_integers(nodes):
            continue
        reason, kind = _why_not(nodes, tensor, dtype, wishes, storages)
        if reason:
            refusals.append(Refusal(str(nodes[0].target), reason, kind))
        else:
            names += [str(node.target) for node in nodes]
    return list(dict.fromkeys(names)), refusals


def _why_not(
    nodes: Sequence[fx.Node], tensor: Tensor, dtype: torch.dtype, wishes: Wishes, storages: Storages
) -> tuple[str, str]:
    for user in (user for node in nodes for user in node.users):
        if reasons := why_skipped(user, wishes.skip):
            return reasons
        pattern = next((glob for glob in wishes.keep if fnmatchcase(plain_name(user), glob)), None)
        if pattern is not None:
            return f"left float32 as asked (keep={pattern})", "left as asked"
    writers = [writer for node in nodes for writer in storages.writes(node)]
    if writers:
        return f"`{writers[0].name}` writes to it", "written in place"
    danger = of_tensor(tensor, dtype)
    if danger is not None:
        return f"{str(dtype).removeprefix('torch.')} cannot hold it: {danger.reason}", f"{danger.kind} numbers"
    return "", ""


def _of_integers(nodes: Sequence[fx.Node]) -> bool:
    """Whether stored tensors are scales, or what integer kernels read beside integers: to be stored as they are."""
    users = [user for node in nodes for user in node.users]
    around = [*users, *(source for user in users for source in user.all_input_nodes)]
    return any(getattr(node.target, "namespace", "") == "graphopt" for node in around)
