"""The guard: leaves in float what integers would not make faster, by the costs of the target's kernels.

A placement becomes the question of `graphopt.measure.cut`: each site may be float instead, each value between them may
have to change its form. Sites that spell one operator anew stand together: they are float as that operator, or none
is. What the table does not know stays where it was placed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import fx

from graphopt.ir.graph import constant
from graphopt.ir.operators import SIZES, plain_name
from graphopt.measure.cut import Crossing, Operator, islands, on_integers, seconds
from graphopt.measure.work import Workload, is_map, special_kernel, special_move
from graphopt.passes.quantization.kernels import kernel_of
from graphopt.passes.quantization.placement import Placement, Site
from graphopt.passes.quantization.prepare import Prepared
from graphopt.pipeline.plan import Refusal
from graphopt.targets.costs import CostTable, Form, Work

# Float times count for more: a kernel that is timed alone finds its values in the caches, and in a model float ones do
# not. EfficientNet-B0 took 1.37 times what the table says as float, and 0.98 times as integers (AVX2, 8 samples).
_SURELY = 1.4
_WORTH = 0.002  # of the time of all that is placed, that less is not worth an island


@dataclass(frozen=True, slots=True)
class Charge:
    """One call that is to be paid for: what a cost table is asked."""

    kernel: str
    form: Form
    work: Work


@dataclass(frozen=True, slots=True)
class Handover:
    """A value that may have to change its form on its way from who makes it to who reads it.

    Attributes:
        node: what computes it.
        producer: the unit that does, "" for a float operator.
        readers: likewise what reads it.
        form: whether its scale is static or dynamic.
    """

    node: fx.Node
    producer: str
    readers: tuple[str, ...]
    form: Form


class Accounts:
    """What the sites of a placement would have to pay for, in either form."""

    def __init__(self, placement: Placement, prepared: Prepared) -> None:
        """Prepare to count what is placed in a program."""
        self.any_batch = prepared.source.batch_size is None  # whether a call may have any number of samples
        self._placement = placement
        self._prepared = prepared
        self._gm = prepared.program.graph_module
        self._work, self._work_before = Workload(prepared.program), Workload(prepared.source)
        self._present = {node.name for node in prepared.program.graph.nodes}
        self._before = {node.name: node for node in prepared.source.graph.nodes}
        self._sums_behind = self._find_sums_behind()
        self.sites: dict[str, list[Site]] = {}  # by unit
        for site in placement.sites:
            self.sites.setdefault(prepared.unit(site.node), []).append(site)

    def on_integers(self, unit: str) -> list[Charge]:
        """Return what a unit pays for where it is placed; what only moves values pays as much in either form."""
        return [self._charge(site) for site in self.sites[unit] if site.rule.role != "move"]

    def as_float(self, unit: str) -> list[Charge]:
        """Return what it pays for as it was written, with what nobody else reads of that."""
        charges, left = list[Charge](), [self._before[unit]]
        if all(site.rule.role == "move" for site in self.sites[unit]):
            return charges
        while left:
            node = left.pop()
            kernel = kernel_of(node, self._prepared.source.graph_module)
            name = plain_name(node) if kernel is None else special_kernel(kernel.name, node)
            charges.append(Charge(name, "float", self._work_before.of(node)))
            inputs = [read for read in node.all_input_nodes if read.op == "call_function"]
            left += [read for read in inputs if read.name not in self._present and read.name not in self.sites]
        return charges

    def _charge(self, site: Site) -> Charge:
        form: Form = "dynamic" if site.dynamic else "static"
        return Charge(special_kernel(site.kernel.name, site.node), form, self._work.of(site.node))

    def handovers(self) -> list[Handover]:
        """Return every value that may change its form."""
        ends = {site.end: self._prepared.unit(site.node) for site in self._placement.sites if site.end is not None}
        static = {site.node: self._prepared.unit(site.node) for site in self._placement.sites if not site.dynamic}
        operands, dynamic = dict.fromkeys(ends), dict[fx.Node, list[str]]()
        for site in self._placement.sites:
            for operand in site.kernel.operands:
                if site.dynamic:
                    dynamic.setdefault(operand, []).append(self._prepared.unit(site.node))
                elif constant(operand, self._gm) is None:
                    operands[operand] = None
        found = []
        for node in operands:
            producer = ends.get(node, "")
            readers = tuple(static.get(user, "") for user in node.users if user not in SIZES)
            if any(reader != producer for reader in readers):
                found.append(Handover(node, producer, readers, "static"))
        return found + [Handover(node, "", tuple(readers), "dynamic") for node, readers in dynamic.items()]

    def moving(self, what: str, value: Handover) -> Charge:
        """Return what is paid for turning a value into integers or back."""
        return self._move(what, value.node, value.form)

    def relaid(self, value: Handover) -> list[Charge]:
        """Return what is paid besides for a map that floats make: what is added to it takes their layout, on and on.

        Both sides of each sum are laid out anew (a ResNet-20 whose stem is float: 18 transposes, 2 without it).
        """
        if value.form != "static" or not is_map(value.node):
            return []
        return 2 * [self._move("quantize", total, "static") for total in self._sums_behind[value.node]]

    def _find_sums_behind(self) -> dict[fx.Node, dict[fx.Node, None]]:
        """Return by value the results of all sums that its layout spreads to, up to the next layer."""
        on = {site.node: (site, site.end) for site in self._placement.sites if site.rule.role != "compute"}
        behind: dict[fx.Node, dict[fx.Node, None]] = {}
        for node in reversed(self._prepared.program.graph.nodes):
            behind[node] = {}
            for site, end in (on[user] for user in node.users if user in on):
                if end is not None:
                    behind[node] |= {**({end: None} if self._sums_maps(site) else {}), **behind[end]}
        return behind

    def _sums_maps(self, site: Site) -> bool:
        maps = [read for read in site.kernel.operands if is_map(read) and constant(read, self._gm) is None]
        return len(maps) > 1

    def _move(self, what: str, node: fx.Node, form: Form) -> Charge:
        return Charge(special_move(what, node), form, Work(0, self._work.elements(node)))


def unpaying(accounts: Accounts, table: CostTable) -> dict[str, Refusal]:
    """Return the units that take surely less time in float, however many samples a call has, with what was found.

    Args:
        accounts: of a placement.
        table: the target's.
    """
    handovers = accounts.handovers()
    questions = [
        (
            [_operator(unit, accounts, table, samples) for unit in accounts.sites],
            [_crossing(value, accounts, table, samples) for value in handovers],
        )
        for samples in (table.batches if accounts.any_batch else table.batches[:1])
    ]
    kept = set[str]().union(*(on_integers(list(map(_doubted, question[0])), question[1]) for question in questions))
    worth = [_WORTH * seconds(*question, accounts.sites) for question in questions]
    found = {}
    for alike in zip(*(islands(*question, kept) for question in questions), strict=True):
        if any(island.integer - island.floating < least for island, least in zip(alike, worth, strict=True)):
            continue
        names = alike[0].operators
        others = {1: "", 2: " with 1 other"}.get(len(names), f" with {len(names) - 1} others")
        times = f"{1e6 * alike[0].integer:.0f} us as integers, {1e6 * alike[0].floating:.0f} us as float"
        reason = f"it takes{others} {times}, by the costs of {table.target} ({table.processor})"
        found.update({unit: Refusal(unit, reason, f"faster as float on {table.target}") for unit in names})
    return found


def _doubted(operator: Operator) -> Operator:
    return operator if operator.floating is None else replace(operator, floating=_SURELY * operator.floating)


def _operator(unit: str, accounts: Accounts, table: CostTable, samples: int) -> Operator:
    integer, floating = (
        [_seconds(charge, table, samples) for charge in charges]
        for charges in (accounts.on_integers(unit), accounts.as_float(unit))
    )
    if None not in integer and None not in floating:
        return Operator(unit, sum(filter(None, integer)), sum(filter(None, floating)))
    placed = any(site.rule.role == "compute" for site in accounts.sites[unit])
    return Operator(unit, 0.0, None if placed else 0.0)


def _seconds(charge: Charge, table: CostTable, samples: int) -> float | None:
    return table.seconds(charge.kernel, charge.form, charge.work, samples)


def _crossing(value: Handover, accounts: Accounts, table: CostTable, samples: int) -> Crossing:
    to, back = (_seconds(accounts.moving(way, value), table, samples) or 0.0 for way in ("quantize", "dequantize"))
    relaid = sum(_seconds(charge, table, samples) or 0.0 for charge in accounts.relaid(value))
    return Crossing(value.producer, value.readers, quantize=to + relaid, dequantize=back)
