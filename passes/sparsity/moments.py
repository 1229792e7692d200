"""Second moments of what weights are multiplied with: for a convolution the patch under its kernel.

Gathered in one run over the samples for all layers, in several where their matrices would not fit in memory at once.
A layer so wide that its matrix would not fit alone has one for each block of consecutive inputs: what inputs of two
blocks have in common is left out, so what is settled in one block is not made up for in another.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from graphopt.data.batches import Batch
from graphopt.errors import DataError
from graphopt.ir.finite import all_finite
from graphopt.ir.program import Program
from graphopt.ir.walker import Walker
from graphopt.passes.layers.rows import input_rows, positions
from graphopt.passes.layers.weighted_call import WeightedCall
from graphopt.passes.sparsity.layers import Site
from graphopt.pipeline.context import Progress
from graphopt.statistics.covariance import MEMORY, WIDEST, portions

_ROWS_PER_SAMPLE = 64  # positions of one sample (pixels, tokens) are alike: more cost time and say little


class Moments:
    """Second moments about zero of the inputs of one weight.

    Attributes:
        rows: how many input vectors were taken in.
        block: how many inputs share a matrix; the last block may be smaller.
    """

    def __init__(self, block: int) -> None:
        self.rows = 0
        self.block = block
        self._products: list[torch.Tensor] = []

    def update(self, call: WeightedCall, x: torch.Tensor, output: torch.Tensor) -> None:
        """Take in one batch of inputs of `call`."""
        count = positions(call, output)
        samples = max(1, output.shape[0])
        most = min(count, _ROWS_PER_SAMPLE * samples)
        if not most:
            return
        chosen = torch.arange(most) * count // most
        met = input_rows(call, x.detach(), chosen, output.shape)  # (rows, groups, inputs, taps)
        seen = met.transpose(2, 3).flatten(2).movedim(1, 0)  # (groups, rows, inputs), ordered as in `as_rows`
        products = [(part.transpose(1, 2) @ part).double() for part in torch.split(seen, self.block, 2)]
        before = self._products if self.rows else [torch.zeros(1)] * len(products)
        self._products = [old + new for old, new in zip(before, products, strict=True)]
        self.rows += most

    def matrices(self) -> list[torch.Tensor]:
        """Return for each block the moments (groups, inputs of the block, inputs of the block) in float64."""
        return [products / self.rows for products in self._products]


class _Walk(Walker):
    """Runs a program and takes in the inputs of weights."""

    def __init__(self, program: Program, wanted: Mapping[fx.Node, tuple[WeightedCall, Moments]]) -> None:
        super().__init__(program)
        self._wanted = wanted

    def call(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one call."""
        output = super().call(node, args, kwargs)
        if node in self._wanted:
            call, moments = self._wanted[node]
            moments.update(call, self.values[call.input][0], output)
        return output


def block_of(site: Site, multiple: int) -> int:
    """Return how many inputs share a matrix: all where that fits in memory, else a multiple of `multiple`."""
    if site.calls[0].fan_in <= WIDEST:
        return site.calls[0].fan_in
    return max(1, MEMORY // 2 // (8 * site.calls[0].fan_in) // multiple) * multiple


def gather(
    program: Program, sites: Sequence[Site], batches: Sequence[Batch], multiple: int, progress: Progress
) -> Iterator[tuple[Site, Moments]]:
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
        found = {site.weight_name: Moments(block_of(site, multiple)) for site in portion}
        wanted = {call.node: (call, found[site.weight_name]) for site in portion for call in site.calls}
        walker = _Walk(program, wanted)
        for batch in progress.track(batches, "measuring inputs", len(batches)):
            walker.run(batch)
        for site in portion:
            moments = found[site.weight_name]
            if not all(map(all_finite, moments.matrices())):
                raise DataError(
                    f"The calibration data makes the input of `{site.weight_name}` NaN or infinite. Leave out the "
                    "samples that do, or check that they are scaled as in training."
                )
            yield site, moments
