"""Second moments of what weights are multiplied with: for a convolution the patch under its kernel.

Gathered in one run over the samples for all layers, in several where their matrices would not fit in memory at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from graphopt.context import Batch, Progress
from graphopt.covariance import portions
from graphopt.errors import DataError
from graphopt.passes.pruning.layer_rows import input_rows, positions
from graphopt.passes.sparsity.layers import Site
from graphopt.passes.weighted_calls import WeightedCall
from graphopt.program import Program
from graphopt.stepping import Stepper

_ROWS_PER_SAMPLE = 64  # positions of one sample (pixels, tokens) are alike: more cost time and say little


class Moments:
    """Second moments about zero of the inputs of one weight.

    Attributes:
        rows: how many input vectors were taken in.
    """

    def __init__(self) -> None:
        self.rows = 0
        self._products = torch.zeros(0)

    def update(self, call: WeightedCall, x: torch.Tensor, output: torch.Tensor) -> None:
        """Take in one batch of inputs of `call`."""
        count = positions(call, output)
        samples = max(1, output.shape[0])
        most = min(count, _ROWS_PER_SAMPLE * samples)
        if not most:
            return
        chosen = torch.arange(most) * count // most
        seen = input_rows(call, x.detach(), chosen, output.shape)  # (rows, groups, inputs)
        if "conv" in call.kind:  # channels innermost, as in `as_rows`
            channels = call.weight.meta["val"].shape[1]
            seen = seen.reshape(*seen.shape[:2], channels, -1).transpose(2, 3).flatten(2)
        seen = seen.movedim(1, 0)  # (groups, rows, inputs)
        products = (seen.transpose(1, 2) @ seen).double()
        self._products = products if self.rows == 0 else self._products + products
        self.rows += most

    def matrices(self) -> torch.Tensor:
        """Return the moments (groups, inputs, inputs) in float64."""
        return self._products / self.rows


def gather(
    program: Program, sites: Sequence[Site], batches: Sequence[Batch], progress: Progress
) -> Iterator[tuple[Site, Moments]]:
    """Yield each site with the moments of its inputs, in order.

    Raises:
        DataError: a value on the way is NaN or infinite.
    """
    for portion in portions(sites, lambda site: 8 * site.calls[0].groups * site.inputs**2):
        found = {site.weight_name: Moments() for site in portion}
        wanted = {call.node: (call, found[site.weight_name]) for site in portion for call in site.calls}
        for batch in progress.track(batches, "measuring inputs", len(batches)):
            stepper = Stepper(program, [batch])
            for node in program.graph.nodes:
                call, moments = wanted.get(node, (None, None))
                x = stepper.values[call.input][0] if call is not None else None
                stepper.step()
                if call is not None and moments is not None and x is not None:
                    moments.update(call, x, stepper.values[node][0])
        for site in portion:
            moments = found[site.weight_name]
            if moments.rows and not bool(torch.isfinite(moments.matrices()).all()):
                raise DataError(
                    f"The calibration data makes the input of `{site.weight_name}` NaN or infinite. Leave out the "
                    "samples that do, or check that they are scaled as in training."
                )
            yield site, moments
