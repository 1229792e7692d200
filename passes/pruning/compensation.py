"""Least-squares compensation: the layers after a removal make up for what their inputs lost.

    W', b' = argmin  sum over rows |x' W' + b' - (y + e)|^2 + ridge |W' - W|^2

x' is what the layer sees in the pruned program, whose earlier layers are compensated already, and y what it gave in
the original (He, Zhang, Sun, "Channel pruning for accelerating very deep neural networks", ICCV 2017, section 3.1).
Where the output is added to a shortcut, e is the error the shortcut has collected by then, so that it does not grow
from block to block (section 3.2). Both programs are run side by side, once, node by node.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import fx

from graphopt.axes.infer import Axes
from graphopt.axes.layout import Axis, Dims, Layout, Product, size, surviving, surviving_size, touches
from graphopt.data.batches import Batch, batch_count
from graphopt.ir.editor import Editor
from graphopt.ir.finite import all_finite
from graphopt.ir.graph import tensor_attribute
from graphopt.ir.memory import trim
from graphopt.ir.plain_data import Json
from graphopt.ir.program import Program
from graphopt.ir.walker import Walker
from graphopt.passes.layers.recognition import Unweighted
from graphopt.passes.layers.rows import input_rows, output_rows, positions
from graphopt.passes.layers.weighted_call import (
    IN_A_REGION,
    WeightedCall,
    is_layer,
    layer_call,
    other_users,
    regions_with_layers,
    uses,
    weighted_call,
)
from graphopt.passes.layers.weights import by_taps, from_taps
from graphopt.passes.pruning.least_squares import Correction, Sums, solve
from graphopt.passes.pruning.residual_sums import Addend, addend_of, running_mean
from graphopt.pipeline.context import Context
from graphopt.pipeline.plan import Refusal
from graphopt.quantization.histogram import NotFiniteError

WIDEST = 6144  # inputs of a group; the matrices of a wider one would take more than two gigabytes
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
        layers: per weight the relative squared error of its output on the samples that judge, before and with the
            weight fitted to the others alone, and the ridge; the weight that is kept is fitted to all.
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
        pruned: the program after it, its tensors cut from the original's; the new ones take their place.
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
        self._editor = Editor(self._gm, "prune")
        self._unweighted = Unweighted(self._gm)
        self._sizes = [batch_count(batch) for batch in batches]
        self._axes, self._kept = axes, kept
        inputs = [axes.dims(node) for node in original.graph.nodes if node.op == "placeholder"]
        self._batch = [dims[0] for dims in inputs if dims and isinstance(dims[0], Axis)]
        self._before, self._after = (Walker(program).start(batches) for program in (original, pruned))
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
                    self._leave(node.name, self._unweighted.why(layer_call(node, self._gm)))
            self._after.step()
        for node in regions_with_layers(self._gm):
            self._leave(node.name, IN_A_REGION)
        return self._found

    def _layer(self, call: WeightedCall, twin: fx.Node) -> None:
        reason = self._why_not(call, twin)
        if reason:
            self._leave(call.weight_name, reason)
            return
        trim(call.fan_in * call.out_features)  # what the layer before took
        layer = _Layer.of(call, self._gm)
        sums = self._sums(layer, twin)
        if sums is None:
            self._leave(call.weight_name, "its values are not finite on the samples")
            return
        fit, held_out = sums
        if not held_out.rows:
            self._leave(call.weight_name, f"too few samples: every {_HELD_OUT}th judges, and there are fewer")
            return
        if fit.squares + held_out.squares <= _UNCHANGED * (fit.target + held_out.target):
            return
        correction, before, after = solve(fit, held_out, with_bias=layer.bias_name is not None)
        if not after < before:
            self._leave(call.weight_name, "no correction lowers its error on samples it was not fitted to")
            return
        corrected = layer.corrected(correction)
        if not all(map(all_finite, corrected.values())):
            self._leave(call.weight_name, f"what would mend it is not finite in {layer.weight.dtype}")
            return
        for name, tensor in corrected.items():
            self._found.tensors[name] = tensor
            self._after.replace(name, tensor)
            self._editor.put(name, tensor, kind_of=tensor_attribute(self._gm, name))
        self._found.layers[call.weight_name] = {"before": before, "after": after, "ridge": correction.ridge}

    def _leave(self, site: str, reason: str) -> None:
        if all(refusal.site != site for refusal in self._found.refusals):  # a shared weight is met at every use
            self._found.refusals.append(Refusal(site, f"not compensated: {reason}"))

    def _why_not(self, call: WeightedCall, twin: fx.Node) -> str:
        if not tensor_attribute(self._gm, call.weight_name).numel():
            return "its weight has no elements"
        others = other_users(call, self._gm)
        if others:
            return f"weight is shared with `{others[0].name}`"
        if call.bias is not None and len(uses(self._gm, str(call.bias.target))) > 1:
            return f"bias is shared with another layer than `{call.node.name}`"
        dims = self._axes.dims(twin)
        if any(touches(layout, self._kept) and not isinstance(size(layout), int) for layout in dims):
            return "an axis of dynamic size of its output lost positions"
        if max(self._sizes) > 1 and self._batch_place(dims, call.output_axis) is None:
            return "no one axis of its output is known to hold the samples, which have to be told apart"
        return f"{call.fan_in} inputs, more than {WIDEST}" if call.fan_in > WIDEST else ""

    def _sums(self, layer: _Layer, twin: fx.Node) -> tuple[Sums, Sums] | None:
        """Sum up rows to fit and rows to judge by; None if there are values that are not finite."""
        groups, inputs, outputs = layer.matrices.shape
        fit, held_out = Sums(inputs), Sums(inputs)
        first = 0
        for index, samples in enumerate(self._sizes):
            y = self._at_positions_left(twin, index, layer.call.output_axis)
            behind = self._rows_behind(layer.call, twin, y.shape)
            for part in self._parts(positions(layer.call, y), groups * inputs, inputs):
                x = input_rows(layer.call, self._after.values[layer.call.input][index], part, y.shape).flatten(2)
                target = self._target(layer, twin, index, part).view(len(part), groups, outputs)
                residual = target - layer.given(x)
                judge = (first + part // behind % samples) % _HELD_OUT == _HELD_OUT - 1
                for sums, rows in ((fit, ~judge), (held_out, judge)):
                    try:
                        sums.see(x[rows], residual[rows], target[rows])
                    except NotFiniteError:
                        return None
            first += samples
        return fit, held_out

    def _batch_place(self, dims: Dims, features: int) -> tuple[int, int] | None:
        """Return along which axis of a value its samples lie, and as which factor of it, None if that is not clear."""
        ids = {axis.id for axis in self._batch}
        sizes = {axis.size for axis in self._batch if not isinstance(axis.size, int)}  # behind operators without a rule
        places = [
            (d, place)
            for d, layout in enumerate(dims)
            for place, factor in enumerate(_factors(layout))
            if d != features and isinstance(factor, Axis) and (factor.id in ids or factor.size in sizes)
        ]
        return places[0] if len(places) == 1 else None

    def _rows_behind(self, call: WeightedCall, twin: fx.Node, shape: torch.Size) -> int:
        """Return how many rows in a row are of one sample; with one sample it does not matter."""
        dims = self._axes.dims(twin)
        found = self._batch_place(dims, call.output_axis)
        if found is None:
            return 1
        axis, place = found
        inner = math.prod(surviving_size(factor, self._kept) for factor in _factors(dims[axis])[place + 1 :])
        return inner * math.prod(length for d, length in enumerate(shape) if d > axis and d != call.output_axis)

    def _parts(self, total: int, width: int, inputs: int) -> Iterator[torch.Tensor]:
        """Draw positions of one batch, in pieces whose rows fit in memory."""
        wanted = min(max(_ROWS_PER_INPUT * inputs, _FEWEST_ROWS), _MOST_ROWS)
        share = -(-wanted // len(self._sizes))
        if total <= share:
            chosen = torch.arange(total)
        else:
            chosen = torch.randperm(total, generator=self._generator)[:share].sort().values
        rows = max(1, _CHUNK // width)
        for start in range(0, len(chosen), rows):
            yield chosen[start : start + rows]

    def _target(self, layer: _Layer, twin: fx.Node, index: int, part: torch.Tensor) -> torch.Tensor:
        """Return what the layer's output should be at some positions, (rows, groups * outputs)."""
        call, branch = layer.call, layer.branch
        y = self._original_rows(call, twin, index, part)
        other = None if branch is None else self._twins.get(branch.other.name)
        if branch is None or branch.other not in self._after.values or other not in self._before.values:
            return y  # the sum's other operand comes later, and is the one to make up for what is lost here
        lost = self._original_rows(call, other, index, part)
        lost -= output_rows(call, self._after.values[branch.other][index], part)
        return y + lost * branch.factor.to(lost.dtype)

    def _original_rows(self, call: WeightedCall, node: fx.Node, index: int, part: torch.Tensor) -> torch.Tensor:
        """Return what is left of the original value of a node at some positions, (rows, features)."""
        rows = output_rows(call, self._at_positions_left(node, index, call.output_axis), part)
        layout = self._axes.dims(node)[call.output_axis]
        return rows[:, list(surviving(layout, self._kept))]

    def _at_positions_left(self, node: fx.Node, index: int, features: int) -> torch.Tensor:
        """Return the original value of a node in one batch, at the positions that are left, with all its features."""
        value: torch.Tensor = self._before.values[node][index]
        for d, layout in enumerate(self._axes.dims(node)):
            if d != features and touches(layout, self._kept):
                value = value.index_select(d, torch.tensor(surviving(layout, self._kept), device=value.device))
        return value


def _factors(layout: Layout) -> tuple[Layout, ...]:
    return layout.factors if isinstance(layout, Product) else (layout,)


@dataclass(eq=False)
class _Layer:
    """One layer of the pruned program while it is refitted.

    Attributes:
        call: where it is.
        weight: its weight as it is stored.
        matrices: the same as (groups, inputs, outputs).
        bias_name: name of what a change of the bias goes to: the bias, or with the opposite sign the running mean of
            the BatchNorm behind; None if there is neither.
        bias: the stored tensor of that name.
        branch: the sum it ends in.
    """

    call: WeightedCall
    weight: torch.Tensor
    matrices: torch.Tensor
    bias_name: str | None
    bias: torch.Tensor | None
    branch: Addend | None

    @classmethod
    def of(cls, call: WeightedCall, gm: fx.GraphModule) -> _Layer:
        weight = tensor_attribute(gm, call.weight_name).detach()
        name = running_mean(call, gm) if call.bias is None else str(call.bias.target)
        bias = None if name is None else tensor_attribute(gm, name).detach()
        matrices = by_taps(call, weight).flatten(2).transpose(1, 2)
        return cls(call, weight, matrices, name, bias, addend_of(call, gm))

    def given(self, x: torch.Tensor) -> torch.Tensor:
        """Return what the layer gives for rows of its input, (rows, groups, outputs)."""
        y = (x.transpose(0, 1) @ self.matrices.to(x.dtype)).transpose(0, 1)
        return y if self.call.bias is None or self.bias is None else y + self.bias.to(x.dtype).view(y.shape[1:])

    def corrected(self, found: Correction) -> dict[str, torch.Tensor]:
        """Return the corrected tensors by name."""
        rows = (self.matrices.double() + found.weight).transpose(1, 2)  # (groups, outputs, inputs)
        weight = from_taps(self.call, torch.unflatten(rows, 2, (-1, math.prod(self.call.kernel))))
        tensors = {self.call.weight_name: weight.to(self.weight.dtype)}
        if self.bias_name is not None and self.bias is not None:
            sign = -1 if self.call.bias is None else 1
            tensors[self.bias_name] = (self.bias.double() + sign * found.bias.flatten()).to(self.bias.dtype)
        return tensors
