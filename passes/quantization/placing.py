"""Places integers where they pay: respells, places, and takes back what the target's kernels do faster in float.

What one of the three changes, the others see again: a layer that goes back to float may be the only one to read the
integers of another, and what does not end up on integers keeps its spelling.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import fx

from graphopt.ir.program import Program
from graphopt.passes.quantization.paying import Accounts, unpaying
from graphopt.passes.quantization.placement import Choice, Placement, place
from graphopt.passes.quantization.prepare import Prepared, spellings, stays_respelled
from graphopt.pipeline.plan import Refusal
from graphopt.targets.costs import CostTable
from graphopt.targets.description import Scales, TargetDescription


@dataclass
class Placer:
    """Places the integers of one program.

    Attributes:
        target: what the runtime can do.
        skip: glob patterns of module paths or node names to leave float.
        default: when the scales of layers are chosen; None for what the target's kernel is best at.
        costs: by which layers stay float that are faster so; None where all that can be are integers.
        refused: those found so far, by their names in the program.
    """

    target: TargetDescription
    skip: Sequence[str] = ()
    default: Scales | None = None
    costs: CostTable | None = None
    refused: dict[str, Refusal] = field(default_factory=dict)

    def run(self, program: Program) -> tuple[Prepared, Placement]:
        """Return the program as it is to be spelled, and where its integers stand."""
        respelled = spellings(program.graph_module, self.target)
        while True:
            prepared = Prepared.of(program, respelled)
            placement = self._place(prepared, {})
            kept = stays_respelled(respelled, prepared.originals, placement)
            if kept == respelled and not self._refuse(prepared, placement):
                return prepared, self._with_reasons(placement)
            respelled = kept

    def again(self, prepared: Prepared, choice: Mapping[fx.Node, Choice]) -> tuple[Prepared, Placement]:
        """Return what `run` does with what was chosen for layers since: what is float now is spelled as it was.

        Layers of an LSTM stay apart, some of which may be on integers.
        """
        chosen = {node.name: form for node, form in choice.items()}
        while True:
            nodes = prepared.program.graph.nodes
            placement = self._place(prepared, {node: chosen[node.name] for node in nodes if node.name in chosen})
            apart = {name: how for name, how in prepared.respelled.items() if how == "lstm_layers"}
            kept = {**stays_respelled(prepared.respelled, prepared.originals, placement), **apart}
            if kept == prepared.respelled and not self._refuse(prepared, placement):
                return prepared, self._with_reasons(placement)
            prepared = Prepared.of(prepared.source, kept)

    def without(self, refused: Mapping[str, Refusal]) -> Placer:
        """Return what places others than these, by their names in the program."""
        return replace(self, refused={**self.refused, **refused})

    def _place(self, prepared: Prepared, choice: Mapping[fx.Node, Choice]) -> Placement:
        gm = prepared.program.graph_module
        nodes = [node for node in gm.graph.nodes if prepared.unit(node) in self.refused]
        left = {node: self.refused[prepared.unit(node)] for node in nodes}
        return place(gm, self.target, self.skip, {**choice, **left}, self.default)

    def _refuse(self, prepared: Prepared, placement: Placement) -> bool:
        """Find what does not pay where it is placed; return whether there is any."""
        found = {} if self.costs is None else unpaying(Accounts(placement, prepared), self.costs)
        self.refused.update(found)
        return bool(found)

    def _with_reasons(self, placement: Placement) -> Placement:
        """Say why an operator is float that was respelled and is not any more, too."""
        said = [self.refused.get(refusal.site, refusal) for refusal in placement.refusals]
        return replace(placement, refusals=said)
