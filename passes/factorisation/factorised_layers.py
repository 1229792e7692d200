"""Layers that can be written as two smaller ones in a row, and the rewrite that does it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphopt.errors import PassError
from graphopt.ir.editor import Editor
from graphopt.ir.finite import all_finite
from graphopt.ir.graph import arguments, tensor_attribute
from graphopt.ir.program import Program
from graphopt.ir.provenance import origin
from graphopt.passes.layers.recognition import Unweighted
from graphopt.passes.layers.weighted_call import (
    IN_A_REGION,
    WeightedCall,
    layer_call,
    other_users,
    regions_with_layers,
    uses,
    weighted_call,
)
from graphopt.passes.layers.weights import from_taps
from graphopt.pipeline.globs import check_globs, is_named
from graphopt.pipeline.plan import Refusal

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class FactorNames:
    """Where the factors of a weight are kept: in the program, and in a plan's payload."""

    u: str
    v: str
    u_payload: str
    v_payload: str
    bias_payload: str


def factor_names(weight: str) -> FactorNames:
    """Return `fc.u.weight` and `fc.v.weight` for `fc.weight`, `name_u` and `name_v` for any other name."""
    stem, _, leaf = weight.rpartition(".")
    if leaf == "weight":
        u, v = (".".join(filter(None, (stem, part, "weight"))) for part in ("u", "v"))
    else:
        u, v = f"{weight}_u", f"{weight}_v"
    return FactorNames(u, v, f"{weight}/u", f"{weight}/v", f"{weight}/bias")


def factorisable(gm: fx.GraphModule, skip: Sequence[str]) -> tuple[list[WeightedCall], list[Refusal]]:
    """List the linear layers and 1x1 convolutions that could be factorised, and why the others cannot.

    Raises:
        UsageError: a glob of `skip` matches no weight.
    """
    found: list[WeightedCall] = []
    others: list[str] = []
    refusals = [Refusal(node.name, IN_A_REGION) for node in regions_with_layers(gm)]
    unweighted = Unweighted(gm)
    for node in gm.graph.nodes:
        call = layer_call(node, gm)
        if call is None:
            if reason := unweighted.why_of_product(node):
                refusals.append(Refusal(node.name, reason))
            continue
        if call.kind == "transposed conv" or any(size != 1 for size in call.kernel):
            others.append(call.weight_name)  # neither linear nor 1x1
            continue
        missing = unweighted.why(call)
        reason = missing or _why_not(gm, call, skip)
        if reason:
            refusals.append(Refusal(node.name if missing else call.weight_name, reason))
        else:
            found.append(call)
    others += [refusal.site for refusal in refusals]
    check_globs("skip", skip, [call.weight_name for call in found], kind="weight", others=others)
    return found, refusals


def replace_by_factors(program: Program, weights: Mapping[str, str], tensors: Mapping[str, torch.Tensor]) -> Program:
    """Put two calls in the place of each layer.

    Args:
        program: the program; it is left as it is.
        weights: name of the weight by the name of the node that reads it.
        tensors: U (out, rank) under "WEIGHT/u", V (rank, in) under "WEIGHT/v", and maybe a bias under "WEIGHT/bias".
    """
    program = program.copy()
    gm = program.graph_module
    editor = Editor(gm, "svd")
    nodes = {node.name: node for node in gm.graph.nodes}
    for node_name, weight in weights.items():
        call = weighted_call(nodes[node_name], gm) if node_name in nodes else None
        if call is None or call.weight_name != weight:
            raise PassError(
                f"Pass `svd` planned to factorise `{weight}` at `{node_name}`, which is no such layer in this program. "
                "The plan belongs to another program; make it again."
            )
        _replace(editor, call, tensors)
    return program.with_graph(editor.finish())


def _replace(editor: Editor, call: WeightedCall, tensors: Mapping[str, torch.Tensor]) -> None:
    names = factor_names(call.weight_name)
    weight = tensor_attribute(editor.gm, call.weight_name)
    site = call.weight_name

    def read(wanted: str, payload: str) -> fx.Node:
        factor = from_taps(call, tensors[payload][None, :, :, None])
        name = editor.put(editor.new_name(wanted), factor, kind_of=weight)
        return editor.read(name, like=call.weight, site=site)

    with editor.graph.inserting_before(call.node):
        v, u = read(names.v, names.v_payload), read(names.u, names.u_payload)
        bias = call.bias
        if bias is not None and names.bias_payload in tensors:
            bias = _stored_bias(editor, call, tensors[names.bias_payload])
        first = _first_call(editor, call, v)
        second = _second_call(editor, call, first, u, bias)
    editor.replace(call.node, second)


def _stored_bias(editor: Editor, call: WeightedCall, bias: torch.Tensor) -> fx.Node:
    """Store the corrected bias under the old name, under a new one if somebody else reads the old."""
    assert call.bias is not None
    name = str(call.bias.target)
    old = tensor_attribute(editor.gm, name)
    if len(uses(editor.gm, name)) > 1:
        name = editor.new_name(f"{name}_own")
    editor.put(name, bias, kind_of=old)
    return editor.read(name, like=call.bias, site=call.weight_name)


def _first_call(editor: Editor, call: WeightedCall, v: fx.Node) -> fx.Node:
    """Insert V x: the layer without its bias. It keeps the stride of a convolution, so that less is computed."""
    if call.node.target is aten.addmm.default:
        return editor.call(aten.mm.default, call.input, v, like=call.node, site=call.weight_name)
    changes: dict[str, Any] = {call.weight_argument: v}
    if call.bias_argument:
        changes[call.bias_argument] = None
    return _call_with(editor, call, changes)


def _second_call(editor: Editor, call: WeightedCall, first: fx.Node, u: fx.Node, bias: fx.Node | None) -> fx.Node:
    """Insert U (V x) + b, at every position there is."""
    changes: dict[str, Any] = {call.input_argument: first, call.weight_argument: u}
    if call.bias_argument:
        changes[call.bias_argument] = bias
    if call.kind == "conv":
        changes["stride"] = [1] * len(call.strides)
    return _call_with(editor, call, changes)


def _call_with(editor: Editor, call: WeightedCall, changes: Mapping[str, Any]) -> fx.Node:
    """Insert the layer's call with other arguments, trailing defaults left out."""
    schema = call.node.target._schema  # type: ignore[union-attr]
    given = {**arguments(call.node, ()), **changes}
    names = [argument.name for argument in schema.arguments if not argument.kwarg_only]
    defaults = {argument.name: argument.default_value for argument in schema.arguments if argument.has_default_value()}
    while names and names[-1] in defaults and _same(given[names[-1]], defaults[names[-1]]):
        names.pop()
    args = tuple(given[name] for name in names)
    return editor.call(call.node.target, *args, like=call.node, site=call.weight_name)  # type: ignore[arg-type]


def _same(value: Any, default: Any) -> bool:
    """Whether `value` says what `default` says; schemas write 1 for [1, 1]."""
    if isinstance(value, list | tuple) and isinstance(default, int):
        return all(item == default for item in value)
    if isinstance(value, list | tuple) and isinstance(default, list | tuple):
        return list(value) == list(default)
    return value is default or (not isinstance(value, fx.Node) and bool(value == default))


def _why_not(gm: fx.GraphModule, call: WeightedCall, skip: Sequence[str]) -> str:
    matching = next((glob for glob in skip if is_named(call.weight_name, glob)), None)
    if matching is not None:
        return f"`skip={matching}` names it"
    if any(known is not None and known.made_by == "svd" for known in (origin(call.node), origin(call.weight))):
        return "it is a factor already"
    others = other_users(call, gm)
    if others:
        return f"its weight is shared with `{others[0].name}`"
    if call.groups != 1:
        return f"the convolution has {call.groups} groups"
    if call.zero_padded:
        return "the convolution pads its input"
    if not all_finite(tensor_attribute(gm, call.weight_name)):
        return "its weight holds NaN or infinite values"
    if not bool(tensor_attribute(gm, call.weight_name).any()):
        return "its weight is zero"
    return ""
