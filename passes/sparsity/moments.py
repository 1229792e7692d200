"""Second moments of what weights are multiplied with: for a convolution the patch under its kernel.

Gathered in one run over the samples for all layers, in several where their matrices would not fit in memory at once.
A layer so wide that its matrix would not fit alone has one for each block of consecutive inputs: what inputs of two
blocks have in common is left out, so what is settled in one block is not made up for in another.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from graphopt.data.batches import Batch
from graphopt.errors import DataError
from graphopt.ir.program import Program
from graphopt.ir.walker import Walker
from graphopt.passes.layers.rows import input_rows, positions
from graphopt.passes.layers.weighted_call import WeightedCall
from graphopt.passes.sparsity.layers import SparseSite
from graphopt.pipeline.context import Progress
from graphopt.quantization.histogram import NotFiniteError
from graphopt.statistics.covariance import MEMORY, WIDEST, portions
from graphopt.statistics.moments import Moments, representative


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


def block_of(site: SparseSite, multiple: int) -> int:
    """Return how many inputs share a matrix: all where that fits in memory, else a multiple of `multiple`."""
    if site.calls[0].fan_in <= WIDEST:
        return site.calls[0].fan_in
    return max(1, MEMORY // 2 // (8 * site.calls[0].fan_in) // multiple) * multiple


def gather(
    program: Program, sites: Sequence[SparseSite], batches: Sequence[Batch], multiple: int, progress: Progress
) -> Iterator[tuple[SparseSite, InputMoments]]:
    """Yield each site with the moments of its inputs, in order.

    Args:
        program: what the batches are run through.
        sites: of it.
        batches: calibration samples.
        multiple: blocks of inputs, where not all fit in one, are a multiple of this.
        progress: is told.

    Raises:
        DataError: a value on the way is NaN or infinite.
    """
    for portion in portions(
        sites, lambda site: 8 * site.calls[0].groups * site.calls[0].fan_in * block_of(site, multiple)
    ):
        found = {site.weight_name: InputMoments(block_of(site, multiple)) for site in portion}
        wanted = {call.node: (call, found[site.weight_name]) for site in portion for call in site.calls}
        walker = Walker(program)
        for batch in progress.track(batches, "measuring inputs", len(batches)):
            walker.start([batch])
            for node in program.graph.nodes:
                call, moments = wanted.get(node, (None, None))
                x = walker.values[call.input][0] if call is not None else None
                walker.step()
                if call is not None and moments is not None and x is not None:
                    _update(moments, call, x, walker.values[node][0])
        yield from ((site, found[site.weight_name]) for site in portion)


def _update(moments: InputMoments, call: WeightedCall, x: torch.Tensor, output: torch.Tensor) -> None:
    try:
        moments.update(call, x, output)
    except NotFiniteError as err:
        raise DataError(
            f"The calibration data makes the input of `{call.weight_name}` NaN or infinite. Leave out the samples that "
            "do, or check that they are scaled as in training."
        ) from err
