"""Second moments of what weights are multiplied with: for a convolution the patch under its kernel.

Gathered in one run over the samples for all layers: layer by layer for all samples, where their values between two
layers take less memory than all matrices; else batch by batch, in several runs where the matrices do not fit at once.
A layer so wide that its matrix would not fit alone has one for each block of consecutive inputs: what inputs of two
blocks have in common is left out, so what is settled in one block is not made up for in another.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol, TypeVar

import torch

from graphopt.data.batches import Batch, batch_count
from graphopt.errors import DataError
from graphopt.ir.program import Program
from graphopt.ir.walker import Walker
from graphopt.passes.layers.rows import input_rows, positions
from graphopt.passes.layers.weighted_call import WeightedCall
from graphopt.pipeline.context import Progress
from graphopt.quantization.histogram import NotFiniteError
from graphopt.statistics.covariance import MEMORY, WIDEST, portions
from graphopt.statistics.memory import peak_bytes_per_sample
from graphopt.statistics.moments import Moments, representative


class Shared(Protocol):
    """A weight and the calls that read it, all in the same layout."""

    @property
    def weight_name(self) -> str:
        """Qualified name of the weight."""

    @property
    def calls(self) -> Sequence[WeightedCall]:
        """In graph order."""


SharedT = TypeVar("SharedT", bound=Shared)


class InputMoments:
    """Second moments about zero of the inputs of one weight.

    Attributes:
        block: how many inputs share a matrix; the last block may be smaller.
    """

    def __init__(self, block: int) -> None:
        self.block = block
        self._blocks: dict[int, Moments] = {}

    @property
    def rows(self) -> int:
        """How many input vectors were taken in."""
        return self._blocks[0].rows if self._blocks else 0

    def update(self, call: WeightedCall, x: torch.Tensor, output: torch.Tensor) -> None:
        """Take in one batch of inputs of `call`.

        Raises:
            NotFiniteError: they are not finite.
        """
        chosen = representative(positions(call, output), max(1, output.shape[0]))
        met = input_rows(call, x.detach(), chosen, output.shape)  # (rows, groups, inputs, taps)
        seen = met.transpose(2, 3).flatten(2)  # (rows, groups, inputs), ordered as in `as_rows`
        for index, part in enumerate(torch.split(seen, self.block, 2)):
            self._blocks.setdefault(index, Moments()).add(part)

    def matrices(self) -> list[torch.Tensor]:
        """Return for each block the moments (groups, inputs of the block, inputs of the block) in float64."""
        return [moments.about_zero() for moments in self._blocks.values()]


def block_of(site: Shared, multiple: int) -> int:
    """Return how many inputs share a matrix: all where that fits in memory, else a multiple of `multiple`."""
    if site.calls[0].fan_in <= WIDEST:
        return site.calls[0].fan_in
    return max(1, MEMORY // 2 // (8 * site.calls[0].fan_in) // multiple) * multiple


def gather(
    program: Program, sites: Sequence[SharedT], batches: Sequence[Batch], multiple: int, progress: Progress
) -> Iterator[tuple[SharedT, InputMoments]]:
    """Yield each site with the moments of its inputs, in an order that keeps memory bounded.

    Args:
        program: what the batches are run through.
        sites: of it.
        batches: calibration samples.
        multiple: blocks of inputs, where not all fit in one, are a multiple of this.
        progress: is told.

    Raises:
        DataError: a value on the way is NaN or infinite.
    """

    def held(site: SharedT) -> int:
        return 8 * site.calls[0].groups * site.calls[0].fan_in * block_of(site, multiple)

    matrices = [held(site) for site in sites]
    samples = sum(map(batch_count, batches))
    if samples * peak_bytes_per_sample(program) + max(matrices, default=0) < min(sum(matrices), MEMORY):
        found = {site.weight_name: InputMoments(block_of(site, multiple)) for site in sites}
        for site in _walk(program, sites, found, batches):
            yield site, found.pop(site.weight_name)
        return
    for portion in portions(sites, held):
        found = {site.weight_name: InputMoments(block_of(site, multiple)) for site in portion}
        for batch in progress.track(batches, "measuring inputs", len(batches)):
            list(_walk(program, portion, found, [batch]))
        yield from ((site, found[site.weight_name]) for site in portion)


def _walk(
    program: Program, sites: Sequence[SharedT], found: Mapping[str, InputMoments], batches: Sequence[Batch]
) -> Iterator[SharedT]:
    """Walk through the program with all batches at once; yield each site when `found` has all that its calls read."""
    left = {site.weight_name: len(site.calls) for site in sites}
    wanted = {call.node: (site, call) for site in sites for call in site.calls}
    walker = Walker(program).start(batches)
    for node in program.graph.nodes:
        if node not in wanted:
            walker.step()
            continue
        site, call = wanted[node]
        inputs = list(walker.values[call.input])  # the walker may let go of them
        walker.step()
        for x, output in zip(inputs, walker.values[node], strict=True):
            _update(found[site.weight_name], call, x, output)
        left[site.weight_name] -= 1
        if not left[site.weight_name]:
            yield site


def _update(moments: InputMoments, call: WeightedCall, x: torch.Tensor, output: torch.Tensor) -> None:
    try:
        moments.update(call, x, output)
    except NotFiniteError as err:
        raise DataError(
            f"The calibration data makes the input of `{call.weight_name}` NaN or infinite. Leave out the samples that "
            "do, or check that they are scaled as in training."
        ) from err
