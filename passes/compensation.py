"""Least-squares compensation: the layers after a removal make up for what their inputs lost.

    W', b' = argmin  sum over rows |x' W' + b' - (y + e)|^2 + ridge |W' - W|^2

x' is what the layer sees in the pruned program, whose earlier layers are compensated already, and y what it gave in
the original (He, Zhang, Sun, "Channel pruning for accelerating very deep neural networks", ICCV 2017, section 3.1).
Where the output is added to a shortcut, e is the error the shortcut has collected by then, so that it does not grow
from block to block (section 3.2). Both programs are run side by side, once, node by node.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import fx

from graphopt.axes.infer import Axes
from graphopt.axes.layout import surviving, touches
from graphopt.context import Batch, Context
from graphopt.graph import tensor_attribute
from graphopt.passes.layer_rows import as_matrices, as_weight, input_rows, output_rows, positions
from graphopt.passes.least_squares import Sums, solve
from graphopt.passes.residual_sums import Branch, branch_of, running_mean
from graphopt.passes.weighted_calls import WeightedCall, is_layer, uses, weighted_call
from graphopt.plan import Json, Refusal
from graphopt.program import Program
from graphopt.stepping import Stepper

logger = logging.getLogger(__name__)

WIDEST = 8192  # inputs of a group; a wider Gram matrix would take more than half a gigabyte
_HELD_OUT = 8  # every so many-th sample judges and is not fitted
_ROWS_PER_INPUT = 24
_FEWEST_ROWS, _MOST_ROWS = 8192, 65536
_CHUNK = 1 << 24  # elements of patches held at once
_UNCHANGED = 1e-10  # of the target's squares: float32 rounding of two ways to compute the same


@dataclass(slots=True)
class Compensation:
    """What the data says the pruned program's tensors should be.

    Attributes:
        tensors: new weights, biases and running means by name.
        layers: per weight the relative squared error of its output on held-out samples before and after, and the ridge.
        refusals: layers left as they are.
    """

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    layers: dict[str, dict[str, Json]] = field(default_factory=dict)
    refusals: list[Refusal] = field(default_factory=list)


def compensate(
    original: Program,
    pruned: Program,
    axes: Axes,
    kept: Mapping[int, Sequence[int]],
    batches: list[Batch],
    ctx: Context,
) -> Compensation:
    """Refit every layer of `pruned` to give what it gave in `original`.

    Args:
        original: the program before the removal.
        pruned: the program after it, its tensors cut from the original's; not changed.
        axes: of `original`.
        kept: the indices each axis keeps.
        batches: samples.
        ctx: for random draws and progress.
    """
    return _Walk(original, pruned, axes, kept, batches, ctx).run()


class _Walk:
    def __init__(
        self,
        original: Program,
        pruned: Program,
        axes: Axes,
        kept: Mapping[int, Sequence[int]],
        batches: list[Batch],
        ctx: Context,
    ) -> None:
        self._gm = pruned.graph_module
        self._axes, self._kept = axes, kept
        self._before, self._after = Stepper(original, batches), Stepper(pruned, batches)
        self._twins = {node.name: node for node in original.graph.nodes}
        self._generator = ctx.generator("compensation")
        self._progress = ctx.progress
        self._found = Compensation()

    def run(self) -> Compensation:
        nodes = list(self._gm.graph.nodes)
        for node in self._progress.track(nodes, "compensating", len(nodes)):
            twin = self._twins.get(node.name)
            if twin is not None:
                self._before.run_until(twin)
                call = weighted_call(node, self._gm)
                if call is not None:
                    self._layer(call, twin)
                elif is_layer(node):
                    self._leave(node.name, "its weight is computed")
            self._after.step()
        return self._found

    def _layer(self, call: WeightedCall, twin: fx.Node) -> None:
        reason = self._why_not(call, twin)
        if reason:
            self._leave(call.weight_name, reason)
            return
        weight = tensor_attribute(self._gm, call.weight_name)
        matrices = as_matrices(call, weight)
        bias = None if call.bias is None else tensor_attribute(self._gm, str(call.bias.target))
        mean = None if bias is not None else running_mean(call, self._gm)
        sums = self._sums(call, twin, matrices, bias)
        if sums is None:
            self._leave(call.weight_name, "its values are not finite on the samples")
            return
        fit, held_out = sums
        if fit.squares + held_out.squares <= _UNCHANGED * (fit.target + held_out.target):
            return
        correction, before, after = solve(fit, held_out, with_bias=bias is not None or mean is not None)
        if not after < before:
            self._leave(call.weight_name, "no correction lowers its error on held-out samples")
            return
        self._put(call.weight_name, as_weight(call, matrices + correction.weight, weight))
        added = correction.bias.flatten()
        if bias is not None and call.bias is not None:
            self._put(str(call.bias.target), (bias.detach().double() + added).to(bias.dtype))
        elif mean is not None:
            stored = tensor_attribute(self._gm, mean)
            self._put(mean, (stored.double() - added).to(stored.dtype))
        self._found.layers[call.weight_name] = {"before": before, "after": after, "ridge": correction.ridge}

    def _leave(self, site: str, reason: str) -> None:
        self._found.refusals.append(Refusal(site, f"not compensated: {reason}"))

    def _put(self, name: str, tensor: torch.Tensor) -> None:
        self._found.tensors[name] = tensor.detach()
        self._after.replace(name, tensor.detach())

    def _why_not(self, call: WeightedCall, twin: fx.Node) -> str:
        others = [user for user in uses(self._gm, call.weight_name) if user is not call.node]
        if others:
            return f"weight is shared with `{others[0].name}`"
        if call.bias is not None and len(uses(self._gm, str(call.bias.target))) > 1:
            return f"bias is shared with another layer than `{call.node.name}`"
        dims = self._axes.dims(twin)
        if any(touches(layout, self._kept) for d, layout in enumerate(dims) if d != call.output_axis):
            return "positions of its output were removed, not only features"
        inputs = as_matrices(call, call.weight.meta["val"]).shape[1]
        return f"{inputs} inputs, more than {WIDEST}" if inputs > WIDEST else ""

    def _sums(
        self, call: WeightedCall, twin: fx.Node, matrices: torch.Tensor, bias: torch.Tensor | None
    ) -> tuple[Sums, Sums] | None:
        """Sum up rows to fit and rows to judge by; None if there are values that are not finite."""
        groups, inputs, outputs = matrices.shape
        fit, held_out = Sums(groups, inputs, outputs), Sums(groups, inputs, outputs)
        wanted = min(max(_ROWS_PER_INPUT * inputs, _FEWEST_ROWS), _MOST_ROWS)
        branch = branch_of(call, self._gm)
        first = 0
        for index in range(self._after.batches):
            y = self._before.values[twin][index]
            samples = y.shape[0]
            total = positions(call, y)
            share = -(-wanted // self._after.batches)
            chosen = torch.arange(total) if total <= share else self._draw(total, share)
            per_chunk = max(1, _CHUNK // (groups * inputs))
            for part in _pieces(chosen, per_chunk):
                x = input_rows(call, self._after.values[call.input][index], part, y.shape)
                target = self._target(call, twin, index, part, branch).view(len(part), groups, outputs)
                if not bool(torch.isfinite(x).all() & torch.isfinite(target).all()):
                    return None
                given = torch.einsum("rgi,gio->rgo", x, matrices)
                if bias is not None:
                    given += bias.detach().double().view(groups, outputs)
                judge = (first + part * samples // total) % _HELD_OUT == _HELD_OUT - 1
                for sums, rows in ((fit, ~judge), (held_out, judge)):
                    sums.add(x[rows], (target - given)[rows], target[rows])
            first += samples
        return fit, held_out

    def _draw(self, total: int, count: int) -> torch.Tensor:
        return torch.randperm(total, generator=self._generator)[:count].sort().values

    def _target(
        self, call: WeightedCall, twin: fx.Node, index: int, part: torch.Tensor, branch: Branch | None
    ) -> torch.Tensor:
        y = output_rows(call, self._before.values[twin][index], part)[:, self._alive(twin, call.output_axis)]
        other = None if branch is None else self._twins.get(branch.other.name)
        if branch is None or branch.other not in self._after.values or other not in self._before.values:
            return y  # the sum's other operand comes later, and is the one to make up for what is lost here
        wanted, found = self._before.values[other][index], self._after.values[branch.other][index]
        lost = output_rows(call, wanted, part)[:, self._alive(other, call.output_axis)] - output_rows(call, found, part)
        return y + lost * branch.factor

    def _alive(self, node: fx.Node, axis: int) -> torch.Tensor:
        return torch.as_tensor(list(surviving(self._axes.dims(node)[axis], self._kept)))


def _pieces(chosen: torch.Tensor, size: int) -> list[torch.Tensor]:
    return [chosen[start : start + size] for start in range(0, len(chosen), size)]
