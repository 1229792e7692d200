"""Says what is not typical of the samples that passes fit: inputs that never vary, another scale than in training."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx

from graphopt.data.batches import Batch, SampleSource, batch_count, whole_batches
from graphopt.distillation.statistics import batch_norms, pool_channels
from graphopt.ir.graph import constant
from graphopt.ir.program import Program
from graphopt.ir.provenance import module_path
from graphopt.ir.walker import Walker
from graphopt.statistics.moments import Moments

_LOOKED_AT, _AT_ONCE = 32, 8  # samples
_FEWEST = 8  # samples; fewer may well be unlike all others
_FACTOR = 3.0  # that deviations differ by, or that means are off in deviations; unlike samples of one kind reach 2


def sample_notes(program: Program, samples: SampleSource) -> list[str]:
    """Return a sentence for each thing that is not typical of the first samples."""
    batches = list(whole_batches(samples, _AT_ONCE, _LOOKED_AT, takes=program.takes))
    return [*_constants(program, batches), *_scales(program, batches)] if batches else []


def _constants(program: Program, batches: Sequence[Batch]) -> Iterator[str]:
    for spec, values in zip(program.inputs, zip(*batches, strict=True), strict=True):
        if not values[0].is_floating_point() or not values[0].dim() or not all(value.numel() for value in values):
            continue
        low, high = min(float(value.min()) for value in values), max(float(value.max()) for value in values)
        if low == high and values[0][0].numel() > 1:
            yield (
                f"`{spec.name}` is {low:g} everywhere in the first samples, and what is measured on them holds for "
                "that alone. Give typical inputs."
            )


def _scales(program: Program, batches: Sequence[Batch]) -> Iterator[str]:
    """Yield a note for each first BatchNorm that gets values unlike those that its running statistics are of."""
    first = _first_batch_norms(program)
    if not first or sum(map(batch_count, batches)) < _FEWEST:
        return
    seen = _Inputs(program, first)
    for batch in batches:
        seen.start([batch]).run_until(first[-1])
    for node in first:
        mean, variance = (constant(node.args[at], program.graph_module) for at in (3, 4))
        assert mean is not None  # `batch_norms` lists those that have both
        assert variance is not None
        floor = float(node.args[7])  # type: ignore[arg-type]  # eps
        trained = torch.sqrt(variance.detach().double().cpu() + floor)
        moments = seen.moments[node]
        ratio = float((torch.sqrt(moments.about_mean() + floor) / trained).median())
        shift = float(((moments.mean - mean.detach().double().cpu()).abs() / trained).median())
        if not 1 / _FACTOR <= ratio <= _FACTOR or shift > _FACTOR:
            yield (
                f"the values that BatchNorm `{module_path(node) or node.name}` gets deviate {ratio:.2g} times as much "
                f"as in training, and their mean is {shift:.2g} deviations off (medians of channels): "
                f"{_ranges(program, batches)}, which must be scaled as in training."
            )


def _first_batch_norms(program: Program) -> list[fx.Node]:
    """List the BatchNorms with trained statistics that no other one stands before, in graph order."""
    behind: set[fx.Node] = set()
    first = []
    norms = set(batch_norms(program))
    for node in program.graph.nodes:
        if behind.intersection(node.all_input_nodes):
            behind.add(node)
        elif node in norms:
            behind.add(node)
            if _is_trained(node, program.graph_module):
                first.append(node)
    return first


def _is_trained(node: fx.Node, gm: fx.GraphModule) -> bool:
    mean, variance = (constant(node.args[at], gm) for at in (3, 4))
    if mean is None or variance is None:
        return False
    return not (bool((mean == 0).all()) and bool((variance == 1).all()))


class _Inputs(Walker):
    """Pools the moments of what enters some BatchNorms, channel by channel."""

    def __init__(self, program: Program, nodes: Sequence[fx.Node]) -> None:
        super().__init__(program)
        self.moments = {node: Moments() for node in nodes}

    def call(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one call; note what enters it."""
        if node in self.moments:
            pool_channels(self.moments[node], args[0])
        return super().call(node, args, kwargs)


def _ranges(program: Program, batches: Sequence[Batch]) -> str:
    """Say which values the inputs have: "`x` holds 0 to 255"."""
    said = []
    for spec, values in zip(program.inputs, zip(*batches, strict=True), strict=True):
        if values[0].is_floating_point():
            low = min((float(value.min()) for value in values if value.numel()), default=math.nan)
            high = max((float(value.max()) for value in values if value.numel()), default=math.nan)
            said.append(f"`{spec.name}` holds {low:.3g} to {high:.3g}")
    return " and ".join(said) or "the inputs hold other values than then"
