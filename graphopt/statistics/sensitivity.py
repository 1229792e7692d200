"""Sensitivity: how far off a program's outputs are when one site alone computes otherwise.

    noise(knob) = mean over samples of |outputs with the knob - outputs|^2 / |outputs|^2        of the worst output

To first order the noise of several sites adds up, which is what whoever weighs them against each other relies on, and
has to check afterwards. Forward passes only: what comes before a site runs once for all, what it does not reach never.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from graphopt.data.batches import Batch
from graphopt.errors import DataError
from graphopt.ir.aliasing import Storages
from graphopt.ir.program import Program
from graphopt.ir.torch_internals import pytree
from graphopt.ir.walker import Walker
from graphopt.measure.equivalence import not_finite
from graphopt.measure.evaluate import as_model
from graphopt.pipeline.context import NoProgress, Progress
from graphopt.pipeline.knobs import Knob


def sensitivities(
    program: Program, batches: Iterable[Batch], knobs: Sequence[Knob], progress: Progress | None = None
) -> list[float]:
    """Return for each knob the noise it alone brings into the outputs, as a share of their power; inf if not finite.

    Args:
        program: what the knobs are of.
        batches: flat inputs; all values of one batch are held at once.
        knobs: what is tried, one at a time.
        progress: is told of each batch.

    Raises:
        DataError: the outputs hold NaN, so that nothing can be told.
    """
    shares: list[list[float]] = [[] for _ in knobs]
    batches = list(batches)
    for batch in (progress or NoProgress()).track(batches, "measuring sensitivity", len(batches)):
        run = _Recorded(program)
        wanted = _outputs(run.run_all(batch))
        if any(bool(tensor.isnan().any()) for tensor in wanted):
            raise DataError(not_finite("an output of the program"))
        for found, knob in zip(shares, knobs, strict=True):
            found += noise_shares(wanted, _outputs(run.again(knob)))
    return [sum(found) / len(found) if found else 0.0 for found in shares]


def noise_shares(wanted: Sequence[Tensor], found: Sequence[Tensor]) -> list[float]:
    """Return of each sample the power of the difference over that of the signal, of the worst output.

    Of integers (classes, places) it is the share that differ.
    """
    each = [_noise_shares(*pair) for pair in zip(wanted, found, strict=True) if pair[0].numel()]
    rows = max((len(shares) for shares in each), default=0)
    return [max(shares[row if len(shares) == rows else 0] for shares in each) for row in range(rows)]


def _noise_shares(wanted: Tensor, found: Tensor) -> list[float]:
    rows = len(wanted) if wanted.dim() else 1
    wanted, found = wanted.reshape(rows, -1), found.reshape(rows, -1)
    if wanted.is_complex():
        wanted, found = torch.view_as_real(wanted).flatten(1), torch.view_as_real(found).flatten(1)
    if not wanted.is_floating_point():
        return [float(share) for share in (wanted != found).double().mean(1)]
    signal, noise = (part.double().square().sum(1) for part in (wanted, found.double() - wanted.double()))
    shares = torch.where(noise == 0, 0.0, noise / signal)  # what should be 0 and is not is off without bound
    return [float(share) for share in shares.nan_to_num(nan=math.inf, posinf=math.inf)]  # as is what is no number


class Altered(Walker):
    """A program some calls of which compute otherwise, to be called like the model it was captured from."""

    def __init__(self, program: Program, knobs: Iterable[Knob]) -> None:
        super().__init__(program)
        self._alternatives = {call: found for knob in knobs for call, found in knob.alternatives.items()}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run it: the arguments and results of the model."""
        return as_model(self.call_flat, self.program)(*args, **kwargs)

    def call_flat(self, batch: Batch) -> Batch:
        """Run it on flat inputs; return its tensors, flat, as `Program.call_flat` does."""
        return tuple(_outputs(self.run(batch)))

    def call(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one call, its own way or another."""
        alternative = self._alternatives.get(node)
        return super().call(node, args, kwargs) if alternative is None else alternative.run(args, kwargs)


class _Recorded(Walker):
    """Holds every value of a run, from which parts are run again."""

    def __init__(self, program: Program) -> None:
        super().__init__(program)
        storages = Storages(program.graph)
        # memory that is written to is not what it was when the value before it was taken
        self._whole = any(storages.writes(node) for node in self._nodes)
        self._batch: Batch = ()

    def run_all(self, batch: Batch) -> Any:
        """Run the program; return its outputs."""
        self._batch = batch
        self.start([batch])
        for _ in self._nodes:
            self.step()
        return self.values[self._nodes[-1]][0]

    @torch.no_grad()
    def again(self, knob: Knob) -> Any:
        """Run it with a knob, from the first call that this changes; return its outputs."""
        if self._whole:
            return Altered(self.program, [knob]).run(self._batch)
        changed: dict[fx.Node, Any] = {}

        def value(node: fx.Node) -> Any:
            return changed[node] if node in changed else self.values[node][0]

        for node in self._nodes:
            alternative = knob.alternatives.get(node)
            if alternative is None and not any(used in changed for used in node.all_input_nodes):
                continue
            args, kwargs = fx.map_arg((node.args, node.kwargs), value)
            if node.op == "output":
                return args[0]
            changed[node] = self.call(node, args, kwargs) if alternative is None else alternative.run(args, kwargs)
        return self.values[self._nodes[-1]][0]

    def _read_last(self, node: fx.Node) -> list[fx.Node]:
        return []


def _outputs(flat: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(flat) if isinstance(leaf, Tensor)]
