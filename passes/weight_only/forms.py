"""As which integers a target reads a weight, or why it does not."""

from __future__ import annotations

from typing import Protocol

from torch import fx

from graphopt.ir.graph import tensor_attribute
from graphopt.passes.layers.matrix_sites import MatrixSite
from graphopt.passes.layers.skipping import as_asked
from graphopt.passes.weight_only.blocks import block_size
from graphopt.pipeline.plan import Refusal
from graphopt.quantization.formats import Block, IntegerFormat
from graphopt.targets.description import StoredRule, TargetDescription

_SMALLEST_TABLE = 1 << 16  # bytes; less is not worth more operators
_SCALE = 4  # bytes


class Wanted(Protocol):
    """What of the options decides about forms."""

    @property
    def bits(self) -> int: ...
    @property
    def block(self) -> int: ...
    @property
    def symmetric(self) -> bool | None: ...
    @property
    def tables(self) -> bool: ...
    @property
    def skip(self) -> tuple[str, ...]: ...


def stored_bits(bits: int) -> int:
    """Return the bits that an integer takes in memory: 3 are stored in 4."""
    return 4 if bits == 3 else bits


def form_of(site: MatrixSite, gm: fx.GraphModule, target: TargetDescription, wanted: Wanted) -> IntegerFormat | Refusal:
    """Return the integers that every reader of a weight takes on a target, or why there are none."""
    glob = site.skipped(wanted.skip)
    if glob is not None:
        return Refusal(site.weight_name, *as_asked(glob))
    if site.reads and not wanted.tables:
        return Refusal(site.weight_name, "embedding tables are left float as asked (tables=no)")
    weight = tensor_attribute(gm, site.weight_name)
    if site.reads and not site.calls and weight.nbytes < _SMALLEST_TABLE:
        return Refusal(site.weight_name, "it is a table of less than 64 KiB")
    rules: list[StoredRule] = []
    for operator, readers in (("linear", site.calls), ("embedding", site.reads)):
        rule = target.stored_rule(operator)
        if readers and rule is None:
            what = "products" if operator == "linear" else "embedding tables"
            return Refusal(site.weight_name, f"{target.name} reads no stored integers in {what}")
        if readers and rule is not None:
            rules.append(rule)
    columns = weight.shape[0] if site.turned else weight.shape[1]
    reason = next(filter(None, (_why_not(rule, columns, wanted) for rule in rules)), "")
    if reason:
        return Refusal(site.weight_name, f"{target.name} {reason}")
    symmetric = any(rule.symmetric for rule in rules) if wanted.symmetric is None else wanted.symmetric
    form = IntegerFormat(
        wanted.bits,
        signed=symmetric,
        symmetric=symmetric,
        granularity=Block(wanted.block) if 0 < wanted.block < columns else "channel",
    )
    if (needed := stored_bytes(weight.numel() // columns, columns, form)) >= weight.nbytes:
        return Refusal(site.weight_name, f"it would take {needed} bytes instead of {weight.nbytes}", "not smaller")
    return form


def stored_bytes(rows: int, columns: int, form: IntegerFormat) -> int:
    """Return the bytes of a matrix with its scales and zero points."""
    bits, blocks = stored_bits(form.bits), -(-columns // block_size(form, columns))
    zero_points = 1 if form.symmetric else rows * -(-blocks * bits // 8)
    return rows * -(-columns * bits // 8) + rows * blocks * _SCALE + zero_points


def _why_not(rule: StoredRule, columns: int, wanted: Wanted) -> str:
    """Return why a rule does not take what is wanted, "" if it does."""
    what = "products with weights" if rule.operator == "linear" else "embedding tables"
    if stored_bits(wanted.bits) not in rule.bits:
        known = ", ".join(map(str, rule.bits))
        return f"has {what} of {known} bits, not {wanted.bits}"
    if 0 < wanted.block < columns and wanted.block not in rule.blocks:
        known = ", ".join(map(str, rule.blocks))
        return f"has {what} in blocks of {known} or whole rows (block=0), not {wanted.block}"
    if rule.symmetric and wanted.symmetric is False:
        return f"has {what} with one zero point only (symmetric=yes)"
    if not rule.ragged and wanted.block and columns > wanted.block and columns % wanted.block:
        return f"takes whole blocks only, and {columns} inputs are no multiple of {wanted.block}"
    return ""
