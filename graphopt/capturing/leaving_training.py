"""Putting what a stranger exported in training mode in evaluation mode.

native_group_norm(x, w, b, n, c, size, 4, eps)                  group_norm(x, 4, w, b, eps), which looks at sizes
native_dropout(x, 0.5, True)                                    dropout(x, 0.5, False)
_native_batch_norm_legit_no_training(x, .., mean, var)          batch_norm(x, .., mean, var, False)
_native_batch_norm_legit_functional(x, .., mean, var, True)     batch_norm(x, .., mean, var, False)
copy_(running_mean, getitem(.., 3))                             nothing
scaled_dot_product_attention(q, k, v, None, 0.1)                scaled_dot_product_attention(q, k, v, None, 0.0)
bernoulli(..), batch_norm_stats(..)                             refused: they say nothing of evaluation
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from graphopt.errors import CaptureError
from graphopt.ir.graph import arguments
from graphopt.ir.operators import EXPANSIONS, NORMALISATIONS, plain_name, short_name
from graphopt.ir.regions import every_graph_module
from graphopt.ir.training import argument_called, set_argument, training_flag

_RATE = "dropout_p"  # attention has a rate in place of a flag

# What core ATen writes for a module: results besides the first, in training statistics returned instead of written.
_PLAIN = {
    "native_group_norm": torch.ops.aten.group_norm.default,
    "native_dropout": torch.ops.aten.dropout.default,
    "rrelu_with_noise": torch.ops.aten.rrelu.default,
    "rrelu_with_noise_functional": torch.ops.aten.rrelu.default,
    "native_batch_norm": torch.ops.aten.batch_norm.default,
    "_native_batch_norm_legit": torch.ops.aten.batch_norm.default,
    "_native_batch_norm_legit_functional": torch.ops.aten.batch_norm.default,
    "_native_batch_norm_legit_no_training": torch.ops.aten.batch_norm.default,
    "cudnn_batch_norm": torch.ops.aten.batch_norm.default,
    "_batch_norm_impl_index": torch.ops.aten.batch_norm.default,
    "_batch_norm_no_update": torch.ops.aten.batch_norm.default,
    "_batch_norm_with_update": torch.ops.aten.batch_norm.default,
    "_batch_norm_with_update_functional": torch.ops.aten.batch_norm.default,
}
_ALWAYS_TRAINING = frozenset({"_batch_norm_with_update", "_batch_norm_with_update_functional"})  # they have no flag
# parts of a training step that say neither a flag nor what to compute in its place
_TRAINING_ONLY = frozenset(
    {
        "_fill_mem_eff_dropout_mask_",
        "_fused_dropout",
        "batch_norm_gather_stats",
        "batch_norm_gather_stats_with_counts",
        "batch_norm_stats",
        "batch_norm_update_stats",
    }
)


def leave_training(gm: fx.GraphModule) -> list[str]:
    """Put what a stranger exported, maybe in training mode, in evaluation mode, in place; name the operators switched.

    Nothing tells in it what training mode had switched on from what is always on. A normalisation by the batch stays
    where there are no statistics to take its place.

    Raises:
        CaptureError: it has operators of training that evaluation has none for.
    """
    switched: dict[str, None] = {}
    for guards in gm.graph.find_nodes(op="call_module", target="_guards_fn"):  # they fix sizes, such as the batch
        gm.graph.erase_node(guards)
    for body in every_graph_module(gm):
        statistics: set[str] = set()
        for node in list(body.graph.nodes):
            if _trains(node):
                statistics |= _statistics(node)
                switched[_switch_off(node)] = None
            elif plain_name(node) in _PLAIN:  # as modules are captured
                _switch_off(node)
        for node in list(body.graph.nodes):
            written = _written(node)
            if written in statistics or written.rpartition(".")[2] == "num_batches_tracked":
                body.graph.erase_node(node)
        body.recompile()
    return list(switched)


def _trains(node: fx.Node) -> bool:
    """Whether a call behaves otherwise than in evaluation mode, and evaluation mode has something in its place."""
    name = plain_name(node)
    if name in _TRAINING_ONLY:
        raise CaptureError(
            f"The model was exported in training mode, and `{name}` does not say what it does in evaluation mode. "
            "Export it after `model.eval()`."
        )
    if name in _ALWAYS_TRAINING:
        return True
    flag, rate = training_flag(node), argument_called(node.target, (_RATE,)) if node.op == "call_function" else None
    given = arguments(node, ()) if flag or rate else {}
    if rate:
        return bool(given[rate])
    on = flag is not None and given[flag] is not False  # native_dropout takes None for True
    return on and not (node in NORMALISATIONS and given.get("running_mean") is None)


def _switch_off(node: fx.Node) -> str:
    """Put a call in evaluation mode; return the name of what it calls then."""
    flag = training_flag(node)
    plain = _PLAIN.get(plain_name(node))
    if plain is None:
        set_argument(node, *((flag, False) if flag else (_RATE, 0.0)))
        return short_name(node).removesuffix("_")
    given: dict[str, Any] = {"running_mean": None, "running_var": None, **arguments(node, ())}
    batch = plain is torch.ops.aten.batch_norm.default and given["running_mean"] is None  # it has no other statistics
    given |= {"train": False, "training": batch, "cudnn_enabled": True, "num_groups": given.get("group")}
    wanted = [argument.name for argument in plain._schema.arguments if not argument.kwarg_only]
    with node.graph.inserting_before(node):
        result = node.graph.call_function(plain, (node.args[0], *(given[name] for name in wanted[1:])))
    result.meta = dict(node.meta)
    returned = [returns.name.removesuffix("_out") for returns in node.target._schema.returns]  # type: ignore[union-attr]
    for user in list(node.users) if len(returned) > 1 else []:
        name = returned[int(user.args[1])]  # type: ignore[arg-type]
        if user.args[1] == 0:
            result.meta.update({key: user.meta[key] for key in ("val", "tensor_meta") if key in user.meta})
            user.replace_all_uses_with(result)
        elif name in given:  # evaluation hands on the statistics that it is given
            user.replace_all_uses_with(given[name])
        if not user.users:
            node.graph.erase_node(user)
    if len(returned) == 1:
        node.replace_all_uses_with(result)
    if node.users:
        raise CaptureError(
            f"The model uses what `{short_name(node)}` returns besides its result, as it does in training mode. Export "
            "it after `model.eval()`."
        )
    node.graph.erase_node(node)
    return short_name(result)


def _statistics(node: fx.Node) -> set[str]:
    """Return the buffers that a normalisation moves in training, repeated as instance normalisation does or not."""
    given = arguments(node, ())
    read = [given.get("running_mean"), given.get("running_var")]
    sources = [value.args[0] if value in EXPANSIONS else value for value in read if isinstance(value, fx.Node)]
    return {str(source.target) for source in sources if isinstance(source, fx.Node) and source.op == "get_attr"}


def _written(node: fx.Node) -> str:
    """Return the buffer that a call only serves to write to, "" if it is not such a call."""
    writes = node.target in (torch.ops.aten.copy_.default, torch.ops.aten.add_.Tensor) and not node.users
    buffer = node.args[0] if writes else None
    return str(buffer.target) if isinstance(buffer, fx.Node) and buffer.op == "get_attr" else ""
