"""How far off calls are when they are run in another way: the program itself goes on from what it computes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from graphopt.data.batches import Batch
from graphopt.ir.program import Program
from graphopt.ir.walker import Walker


@dataclass(frozen=True, eq=False)
class Alternative:
    """Another way to run a call.

    Attributes:
        run: takes the arguments of the call and returns another result for it.
        compared: takes such a result, or the call's own, and returns what is compared, with samples first.
    """

    run: Callable[[tuple[Any, ...], dict[str, Any]], Any]
    compared: Callable[[Any], Tensor] = lambda result: result


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
    return {
        node: {name: _decibels(shares) for name, shares in by_name.items()} for node, by_name in walker.shares.items()
    }


class _Comparer(Walker):
    """Runs alternatives beside calls and keeps each sample's share of noise."""

    def __init__(self, program: Program, alternatives: Mapping[fx.Node, Mapping[str, Alternative]]) -> None:
        super().__init__(program)
        self._alternatives = alternatives
        self.shares: dict[fx.Node, dict[str, list[float]]] = {
            node: {name: [] for name in by_name} for node, by_name in alternatives.items()
        }

    def call(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one call and what is to be compared with it; the program goes on with its own result."""
        result = super().call(node, args, kwargs)
        for name, alternative in self._alternatives.get(node, {}).items():
            found = alternative.run(args, kwargs)
            self.shares[node][name] += _noise_shares(alternative.compared(result), alternative.compared(found))
        return result


def _noise_shares(wanted: Tensor, found: Tensor) -> list[float]:
    """Return the power of the difference over that of the signal, of each index of the first axis."""
    signal, noise = (
        part.double().reshape(len(part) if part.dim() else 1, -1).square().sum(1) for part in (wanted, found - wanted)
    )
    shares = torch.where(noise == 0, 0.0, noise / signal)  # what should be 0 and is not is off without bound
    return [float(share) for share in shares]


def _decibels(shares: Sequence[float]) -> float:
    mean = sum(shares) / len(shares) if shares else 0.0
    return -10 * math.log10(mean) if mean else math.inf
