"""What a rule of the oracle sees: one call of the original graph with values for arguments."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from torch import Tensor, fx

from graphopt.axes.proof.value import CannotProveError, Value, Vector
from graphopt.axes.registry import is_pointwise
from graphopt.ir.operators import twins
from graphopt.ir.torch_internals import OpOverload, pytree

Rule: TypeAlias = "Callable[[MaskedStep], Any]"

_RULES: dict[str, Rule] = {}
_COUNTING: dict[Rule, None] = {}


def masked_rule(*names: str, counts: bool = False) -> Callable[[Rule], Rule]:
    """Register the decorated function as what masking means for the named operators.

    A name is a schema name, `aten::linear`, or that of one overload, `aten::max.dim`. The in-place twin of an
    elementwise operator shares its rule. The function runs the call with `step.run`, removed positions taken
    out of every sum and every other reduction, and returns a `Value` (or a list of them, as the operator does)
    that says which positions of the result are removed. It is asked only where an operand has removed positions; with
    `counts` also where it is only known how many they are (`Value.counted`).
    """

    def register(function: Rule) -> Rule:
        for name in names:
            _RULES[name] = function
        if counts:
            _COUNTING[function] = None
        return function

    return register


def find_rule(target: Any) -> Rule | None:
    """Return the rule of an operator: its overload's, its own, its twin's, or the pointwise one."""
    if not isinstance(target, OpOverload):
        return None
    for candidate in twins(target):
        found = _RULES.get(f"{candidate}.{target._overloadname}") or _RULES.get(candidate)
        if found is not None:
            return found
    return _RULES["pointwise"] if is_pointwise(target) else None


def counts(rule: Rule | None) -> bool:
    """Tell whether a rule makes use of numbers of removed positions."""
    return rule in _COUNTING


class MaskedStep:
    """One call of an operator of which some operand has removed positions."""

    def __init__(self, node: fx.Node, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        self.node = node
        self.target: OpOverload = node.target  # type: ignore[assignment]
        self.arguments: dict[str, Any] = {}
        for position, argument in enumerate(self.target._schema.arguments):
            if position < len(args):
                self.arguments[argument.name] = args[position]
            elif argument.name in kwargs:
                self.arguments[argument.name] = kwargs[argument.name]
            elif argument.has_default_value():
                self.arguments[argument.name] = argument.default_value

    def __getitem__(self, name: str) -> Any:
        """Return an argument by schema name, default filled in."""
        return self.arguments[name]

    def get(self, name: str) -> Value | None:
        """Return an optional tensor argument."""
        value = self.arguments.get(name)
        return value if isinstance(value, Value) else None

    def first(self) -> Value:
        """Return the first tensor argument."""
        return self.values()[0]

    def first_name(self) -> str:
        """Return the schema name of the first tensor argument."""
        return next(name for name, value in self.arguments.items() if isinstance(value, Value))

    def values(self) -> list[Value]:
        """Return every tensor argument, those in lists included, in schema order."""
        return [leaf for leaf in pytree.tree_leaves(list(self.arguments.values())) if isinstance(leaf, Value)]

    def dim(self, name: str, rank: int) -> int:
        """Return a dimension argument counted from the front."""
        return int(self.arguments[name]) % max(rank, 1)

    def dims(self, name: str, rank: int) -> list[int]:
        """Return a dimension-list argument counted from the front; none given means all."""
        given = self.arguments.get(name)
        if given is None or given == []:
            return list(range(rank))
        return [int(d) % max(rank, 1) for d in (given if isinstance(given, list | tuple) else [given])]

    def run(self, /, **changed: Any) -> Any:
        """Run the operator, some arguments changed, and return its raw result."""
        args, kwargs = [], {}
        for argument in self.target._schema.arguments:
            if argument.name not in self.arguments and argument.name not in changed:
                continue
            value = raw(changed.get(argument.name, self.arguments.get(argument.name)))
            if argument.kwarg_only:
                kwargs[argument.name] = value
            else:
                args.append(value)
        return self.target(*args, **kwargs)

    def require_whole(self, vectors: Sequence[Vector], what: str) -> None:
        """Refuse removed positions where the operator does not say what masking them means."""
        if any(flags is not None for flags in vectors):
            raise CannotProveError(f"positions of {what} are removed")


def raw(value: Any) -> Any:
    """Replace values by their tensors, in lists and tuples too."""
    return pytree.tree_map_only(Value, lambda leaf: leaf.tensor, value)


def tensor_result(result: Any) -> Tensor:
    """Narrow the raw result of an operator that returns one tensor."""
    assert isinstance(result, Tensor)
    return result
