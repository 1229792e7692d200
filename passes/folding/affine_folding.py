"""Fold per-channel scales and shifts (BatchNorm above all) into the convolution or linear layer beside them.

    after:   (W x + b) * s + t   =  (s W) x + (s b + t)          s, t over the outputs of W
    before:  W (x * s + t) + b   =  (W s) x + (b + W t)          s, t over the inputs of W

The second needs every output to see every weight: a shift does not pass a zero-padded or transposed convolution, a
scale passes both. Everything is computed in float64 and rounded once to the dtype of the weight.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import fx

from graphopt.errors import PassError
from graphopt.ir.editor import Editor
from graphopt.ir.finite import all_finite
from graphopt.ir.graph import tensor_attribute
from graphopt.ir.program import Program
from graphopt.ir.provenance import origin, record
from graphopt.passes.folding.affine import Affine, affine, is_batch_norm
from graphopt.passes.folding.likeness import indistinguishable
from graphopt.passes.layers.channel_path import path_to_layer
from graphopt.passes.layers.growth import too_large
from graphopt.passes.layers.weighted_call import WeightedCall, set_argument, uses, weighted_call
from graphopt.passes.layers.weights import response_to, scale_inputs, scale_outputs
from graphopt.pipeline.plan import Refusal

Side = Literal["after", "before"]


@dataclass(frozen=True, slots=True)
class AffineFold:
    """One weight that takes in a scale and shift, for every call that shares both.

    Attributes:
        affines: names of the scale-and-shift nodes that go, one per call.
        calls: names of the layers that take them in.
        side: whether the affine stands after or before its layer.
        weight: name of the tensor the scaled weight is stored under.
        bias: name of the bias likewise, "" if none is needed.
    """

    affines: tuple[str, ...]
    calls: tuple[str, ...]
    side: Side
    weight: str
    bias: str


@dataclass(frozen=True, eq=False)
class _Candidate:
    affine: Affine
    call: WeightedCall
    side: Side

    @property
    def key(self) -> tuple[str, ...]:
        bias = str(self.call.bias.target) if self.call.bias is not None else ""
        return (self.side, bias, *self.affine.key)


def find_affine_folds(program: Program) -> tuple[list[AffineFold], list[Refusal]]:
    """List the folds that can be done at once (no two on one layer) and the BatchNorms and scales left alone."""
    gm = program.graph_module
    candidates, refusals = _candidates(gm)
    by_weight: dict[int, list[_Candidate]] = {}
    for candidate in candidates:
        tensor = tensor_attribute(gm, candidate.call.weight_name)
        by_weight.setdefault(id(tensor), []).append(candidate)
    taken: set[str] = set()
    folds = []
    editor = Editor(gm, "fold")
    for group in by_weight.values():
        for same in _groups_of_equals(group):
            outcome = _fold(editor, same, taken)
            if isinstance(outcome, AffineFold):
                folds.append(outcome)
                taken.update((outcome.weight, outcome.bias))
            else:
                refusals += [Refusal(c.affine.result.name, outcome) for c in same]
    return folds, refusals


def apply_affine_folds(program: Program, folds: Sequence[AffineFold]) -> Program:
    """Scale the weights, drop the affines."""
    program = program.copy()
    gm = program.graph_module
    editor = Editor(gm, "fold")
    nodes = {node.name: node for node in gm.graph.nodes}
    changed: list[fx.Node] = []
    for fold in folds:
        pairs = [
            (_described(gm, nodes[a]), _layer(gm, nodes[c])) for a, c in zip(fold.affines, fold.calls, strict=True)
        ]
        weight, bias = folded_tensors(gm, *pairs[0], fold.side)
        stored = tensor_attribute(gm, pairs[0][1].weight_name)
        editor.put(fold.weight, weight, kind_of=stored)
        if fold.bias and bias is not None:
            editor.put(fold.bias, bias, kind_of=stored)
        for found, call in pairs:
            _rewire(editor, fold, found, call)
            if not indistinguishable(found.source, found.result):
                changed += [user for user in found.result.users if user.op == "call_function"]
            found.result.replace_all_uses_with(found.source)
    editor.propagate_from(changed)
    return program.with_graph(editor.finish())


def folded_tensors(
    gm: fx.GraphModule, found: Affine, call: WeightedCall, side: Side
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return weight and bias of `call` with `found` folded in, in the dtype of the weight."""
    stored = tensor_attribute(gm, call.weight_name).detach()
    weight = stored.double()
    bias = tensor_attribute(gm, str(call.bias.target)).detach().double() if call.bias is not None else None
    channels = call.out_features if side == "after" else call.in_features
    scale = found.scale.expand(channels) if found.scale is not None else None
    shift = found.shift.expand(channels) if found.shift is not None else None
    if side == "before" and shift is not None:
        response = response_to(call, weight, shift)
        bias = response if bias is None else bias + response
    if scale is not None:
        if side == "after" and bias is not None:
            bias = bias * scale
        weight = (scale_outputs if side == "after" else scale_inputs)(call, weight, scale)
    if side == "after" and shift is not None:
        bias = shift if bias is None else bias + shift
    return weight.to(stored.dtype).contiguous(), None if bias is None else bias.to(stored.dtype).contiguous()


def _candidates(gm: fx.GraphModule) -> tuple[list[_Candidate], list[Refusal]]:
    """Pair each affine with a layer, one per layer; an affine that waits for its turn is no refusal."""
    found: list[_Candidate] = []
    refusals: list[Refusal] = []
    busy: set[fx.Node] = set()
    for node in gm.graph.nodes:
        described = affine(node, gm)
        if described is None:
            continue
        if isinstance(described, str):
            refusals.append(Refusal(node.name, described))
            continue
        outcome = _pair(gm, described)
        if isinstance(outcome, str):
            if outcome:
                refusals.append(Refusal(node.name, outcome))
        elif outcome.call.node not in busy:
            busy.add(outcome.call.node)
            found.append(outcome)
    return found, refusals


def _pair(gm: fx.GraphModule, found: Affine) -> _Candidate | str:
    """Return the layer that can take `found` in, or why none can ("": a product or sum with no layer near it)."""
    behind, reason = path_to_layer(found.source, found.node, found.axis, gm)
    if behind is not None and not reason:
        if found.shift is None or behind.bias_argument:
            return _Candidate(found, behind, "after")
        reason = f"`{behind.node.name}` cannot take a bias"
    ahead = _layer_ahead(gm, found)
    if isinstance(ahead, WeightedCall):
        return _Candidate(found, ahead, "before")
    if not reason and is_batch_norm(found.node):
        reason = f"it follows {_named(found.source)}, not a convolution or linear layer"
    return f"{reason}; {ahead}" if reason and ahead else reason


def _layer_ahead(gm: fx.GraphModule, found: Affine) -> WeightedCall | str:
    """Return the layer that alone reads `found`, why it cannot take it in, or "" if there is none."""
    readers = list(found.result.users)
    layers = [call for call in (weighted_call(reader, gm) for reader in readers) if call is not None]
    layers = [call for call in layers if call.input is found.result]
    if not layers:
        return ""
    call = layers[0]
    if len(readers) > 1:
        others = next(reader for reader in readers if reader is not call.node)
        return f"`{call.node.name}` after it is not its only reader ({_named(others)})"
    if found.axis is not None and found.axis != call.input_axis:
        return (
            f"it runs along axis {found.axis}, `{call.node.name}` after it reads its features on axis {call.input_axis}"
        )
    if found.shift is not None:
        if not call.bias_argument:
            return f"`{call.node.name}` after it cannot take a bias"
        if call.kind == "transposed conv" or call.zero_padded:
            return f"its shift does not pass the border of `{call.node.name}` after it"
    return call


def _groups_of_equals(group: list[_Candidate]) -> list[list[_Candidate]]:
    """Split the candidates on one weight into those of equal parameters."""
    equal: dict[tuple[str, ...], list[_Candidate]] = {}
    for candidate in group:
        equal.setdefault(candidate.key, []).append(candidate)
    return list(equal.values())


def _fold(editor: Editor, same: list[_Candidate], taken: set[str]) -> AffineFold | str:
    """Decide under which names the tensors of one fold are stored, or why it is refused."""
    call, gm = same[0].call, editor.gm
    weight = tensor_attribute(gm, call.weight_name)
    if not _stays_finite(gm, same[0].affine, call, same[0].side):
        return f"the folded weight of `{call.node.name}` would overflow {str(weight.dtype).removeprefix('torch.')}"
    calls = {candidate.call.node for candidate in same}
    others = [user for user in uses(gm, call.weight_name) if user not in calls]
    weight_name = call.weight_name
    if others or weight_name in taken:
        reason = too_large(weight.numel() * weight.element_size(), 0)
        if reason:
            other = _named(others[0]) if others else "a layer folded otherwise"
            return f"the weight of `{call.node.name}` is shared with {other}; for a copy of its own {reason}"
        weight_name = editor.new_name(weight_name, taken=taken)
    has_bias = call.bias is not None or same[0].affine.shift is not None
    bias_name = _bias_target(editor, call, calls, taken) if has_bias else ""
    affines = tuple(candidate.affine.result.name for candidate in same)
    return AffineFold(affines, tuple(c.call.node.name for c in same), same[0].side, weight_name, bias_name)


def _stays_finite(gm: fx.GraphModule, found: Affine, call: WeightedCall, side: Side) -> bool:
    """Tell whether weight and bias with `found` folded in are finite; computes them only where that is in doubt."""
    weight = tensor_attribute(gm, call.weight_name).detach()
    if side == "after" and weight.numel() and found.scale is not None and all_finite(weight):
        largest = float(weight.abs().max()) * float(found.scale.abs().max())
        bias = tensor_attribute(gm, str(call.bias.target)).detach().double() if call.bias is not None else None
        offset = [t for t in (bias * found.scale if bias is not None else None, found.shift) if t is not None]
        limit = torch.finfo(weight.dtype).max
        if largest < limit and all(float(t.abs().max()) < limit / 2 for t in offset):
            return True
    return all(all_finite(tensor) for tensor in folded_tensors(gm, found, call, side) if tensor is not None)


def _bias_target(editor: Editor, call: WeightedCall, calls: set[fx.Node], taken: set[str]) -> str:
    """Return the name of the bias, a free one if it is new or somebody else reads it."""
    if call.bias is None:
        return editor.new_name(_bias_name(call.weight_name), taken=taken)
    name = str(call.bias.target)
    shared = any(user not in calls for user in uses(editor.gm, name))
    return editor.new_name(name, taken=taken) if shared or name in taken else name


def _rewire(editor: Editor, fold: AffineFold, found: Affine, call: WeightedCall) -> None:
    site = found.result.name
    with editor.graph.inserting_before(call.node):
        if call.weight_name != fold.weight:
            set_argument(call.node, call.weight_argument, editor.read(fold.weight, like=call.weight, site=site))
        if fold.bias and (call.bias is None or call.bias.target != fold.bias):
            bias = editor.read(fold.bias, like=call.bias or call.weight, site=site)
            set_argument(call.node, call.bias_argument, bias)
    known = origin(call.node)
    if fold.side == "after" and known is not None:
        # the layer's value is now that of the affine: its provenance says so by the site
        record(call.node, dataclasses.replace(known, made_by="fold", site=site))


def _described(gm: fx.GraphModule, node: fx.Node) -> Affine:
    """Describe the affine whose value `node` holds; the plan found one there."""
    for candidate in (node, node.args[0]):
        found = affine(candidate, gm) if isinstance(candidate, fx.Node) else None
        if isinstance(found, Affine) and found.result is node:
            return found
    raise PassError(
        f"Pass `fold` planned to fold `{node.name}`, which is no scale and shift in this program. The plan belongs to "
        "another program; make it again."
    )


def _layer(gm: fx.GraphModule, node: fx.Node) -> WeightedCall:
    call = weighted_call(node, gm)
    if call is None:
        raise PassError(
            f"Pass `fold` planned to fold into `{node.name}`, which is no layer with a stored weight in this program. "
            "The plan belongs to another program; make it again."
        )
    return call


def _bias_name(weight: str) -> str:
    stem, dot, leaf = weight.rpartition(".")
    return f"{stem}{dot}{leaf.replace('weight', 'bias')}" if "weight" in leaf else f"{weight}_bias"


def _named(node: fx.Node) -> str:
    return {"output": "an output of the program", "placeholder": f"input `{node.name}`"}.get(node.op, f"`{node.name}`")
