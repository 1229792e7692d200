"""The table of rules: one small function per family of operators, found by the operator's schema name.

A rule states the equations of one call and returns the layouts of its results; a rewrite, where the call has
literals that follow from layouts, brings them up to date after a removal. Adding an operator is one function:

    @rule("mylib::scale_channels")
    def scale_channels(call: Call) -> Dims:
        call.unify(call.dims("input")[1], call.dims("scale")[0])
        return call.dims("input")

A name is `namespace::operator` or, for one overload alone, `namespace::operator.overload`. The in-place twin of
an operator (trailing underscore) and a copying one (`permute_copy`) share its rule. A distribution offers rules for
its custom operators by an entry point in the group `graphopt.axis_rules` that names a module or a callable; loading
it registers them.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from graphopt.axes.layout import Dims
from graphopt.ir.operators import schema_name, twins
from graphopt.ir.torch_internals import OpOverload

if TYPE_CHECKING:
    from graphopt.axes.call import Call
    from graphopt.axes.edit import Edit

logger = logging.getLogger(__name__)

# One tensor, several results (None for those that are not tensors), or no tensor at all.
Result: TypeAlias = Dims | list[Dims | None] | None
Infer: TypeAlias = "Callable[[Call], Result]"
Rewrite: TypeAlias = "Callable[[Edit], None]"

ENTRY_POINTS = "graphopt.axis_rules"
_BUILT_IN = (
    "attention",
    "contraction",
    "convolution",
    "creation",
    "elementwise",
    "indexing",
    "join",
    "linear_algebra",
    "loss",
    "normalization",
    "recurrent",
    "reduction",
    "repetition",
    "scalar",
    "spatial",
    "stacking",
    "transform",
    "view",
)


@dataclass(frozen=True, slots=True)
class Rule:
    """What is known about one operator."""

    infer: Infer
    rewrite: Rewrite | None = None
    resizes: bool = False  # the rewrite recomputes the sizes among its arguments from layouts


Rules: TypeAlias = Mapping[str, Rule]
_RULES: dict[str, Rule] = {}


def rule(*names: str, rewrite: Rewrite | None = None, resizes: bool = False) -> Callable[[Infer], Infer]:
    """Register the decorated function as the rule of the named operators.

    Args:
        names: schema names, `aten::linear` or `aten::max.dim`.
        rewrite: brings the call's literals up to date after a removal, if it has any.
        resizes: whether the rewrite recomputes the sizes among the arguments from the layouts, so that the
            size of a dimension that shrinks may be among them.
    """

    def register(infer: Infer) -> Infer:
        for name in names:
            _RULES[name] = Rule(infer, rewrite, resizes)
        return infer

    return register


def built_in_rules() -> Rules:
    """Return every registered rule: the built-in ones and those of installed plugins."""
    _load()
    return _RULES


@functools.cache
def _load() -> None:
    for module in _BUILT_IN:
        importlib.import_module(f"graphopt.axes.rules.{module}")
    for entry in sorted(importlib.metadata.entry_points(group=ENTRY_POINTS), key=lambda e: e.name):
        try:
            loaded = entry.load()
            if callable(loaded):
                loaded()
        except Exception as err:  # a stranger's module may raise anything; its operators stay without a rule
            logger.warning("The axis rules `%s` cannot be loaded: %s: %s", entry.name, type(err).__name__, err)


def find(rules: Rules, target: Any) -> Rule | None:
    """Return the rule of an operator: its overload's, its own, its twin's, or the pointwise one."""
    if not isinstance(target, OpOverload):
        return rules.get(schema_name(target))
    for candidate in twins(target):
        found = rules.get(f"{candidate}.{target._overloadname}") or rules.get(candidate)
        if found is not None:
            return found
    return rules.get("pointwise") if is_pointwise(target) else None


def is_pointwise(target: OpOverload) -> bool:
    """Tell whether torch tags an operator, or what it is the in-place twin of, as pointwise."""
    if torch.Tag.pointwise in target.tags:
        return True
    namespace, _, name = target._schema.name.partition("::")
    packet = getattr(getattr(torch.ops, namespace), name.removesuffix("_"), None) if name.endswith("_") else None
    twin = getattr(packet, target._overloadname, None)
    return isinstance(twin, OpOverload) and torch.Tag.pointwise in twin.tags
