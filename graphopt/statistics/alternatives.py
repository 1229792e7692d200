"""How far off calls are when they are run in another way: the program itself goes on from what it computes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from graphopt.data.batches import Batch
from graphopt.ir.graph import constant
from graphopt.ir.program import Program
from graphopt.ir.walker import Walker
from graphopt.measure.decibels import decibels
from graphopt.pipeline.knobs import Alternative
from graphopt.statistics.sensitivity import noise_shares

Shares = dict[fx.Node, dict[str, list[float]]]  # of noise, of each alternative, by sample


def compare(
    program: Program, batches: Iterable[Batch], alternatives: Mapping[fx.Node, Mapping[str, Alternative]]
) -> dict[fx.Node, dict[str, float]]:
    """Return the signal-to-noise ratio of each alternative of each call in dB, over the samples' mean share of noise.

    Args:
        program: what is run, call by call for all batches.
        batches: flat inputs.
        alternatives: by name, of calls of the program.
    """
    if not alternatives:
        return {}
    walker = _Comparer(program, alternatives)
    walker.start(list(batches))
    for _ in program.graph.nodes:  # one call after the other, each for every batch
        walker.step()
    return _ratios(walker.shares)


@torch.no_grad()
def compare_on(
    gm: fx.GraphModule,
    values: Mapping[fx.Node, Sequence[Tensor]],
    alternatives: Mapping[fx.Node, Mapping[str, Alternative]],
) -> dict[fx.Node, dict[str, float]]:
    """Do as `compare` does where it is known what calls read, without running anything else.

    Args:
        gm: whose calls they are.
        values: of what they read, one for each batch; the rest of it is constant.
        alternatives: as in `compare`.
    """
    shares: Shares = {node: {name: [] for name in by_name} for node, by_name in alternatives.items()}
    for node, by_name in alternatives.items():
        batches = max(len(values[used]) for used in node.all_input_nodes if used in values)
        for index in range(batches):
            args, kwargs = fx.map_arg(
                (node.args, node.kwargs),
                lambda used: values[used][index] if used in values else constant(used, gm),  # noqa: B023
            )
            result = node.target(*args, **kwargs)  # type: ignore[operator]
            _add_shares(shares[node], by_name, result, args, kwargs)
    return _ratios(shares)


class _Comparer(Walker):
    """Runs alternatives beside calls and keeps each sample's share of noise."""

    def __init__(self, program: Program, alternatives: Mapping[fx.Node, Mapping[str, Alternative]]) -> None:
        super().__init__(program)
        self._alternatives = alternatives
        self.shares: Shares = {node: {name: [] for name in by_name} for node, by_name in alternatives.items()}

    def call(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one call and what is to be compared with it; the program goes on with its own result."""
        result = super().call(node, args, kwargs)
        if node in self._alternatives:
            _add_shares(self.shares[node], self._alternatives[node], result, args, kwargs)
        return result


def _add_shares(
    shares: dict[str, list[float]],
    by_name: Mapping[str, Alternative],
    result: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    for name, alternative in by_name.items():
        found = alternative.run(args, kwargs)
        shares[name] += noise_shares([alternative.compared(result)], [alternative.compared(found)])


def _ratios(shares: Shares) -> dict[fx.Node, dict[str, float]]:
    return {node: {name: _ratio(each) for name, each in by_name.items()} for node, by_name in shares.items()}


def _ratio(shares: Sequence[float]) -> float:
    return decibels(1.0, sum(shares) / len(shares) if shares else 0.0)
