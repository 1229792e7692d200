"""Knobs: what a pass would do to one site alone, how the program would compute then, and what that saves.

Who decides site by site asks passes for them, runs the program with one changed at a time, weighs what each costs
against what it saves, and leaves the others out by the option `skip`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx


@dataclass(frozen=True, eq=False)
class Alternative:
    """Another way to run a call.

    Attributes:
        run: takes the arguments of the call and returns another result for it.
        compared: takes such a result, or the call's own, and returns what is compared, with samples first.
    """

    run: Callable[[tuple[Any, ...], dict[str, Any]], Any]
    compared: Callable[[Any], Tensor] = lambda result: result


@dataclass(frozen=True, eq=False)
class Knob:
    """One site that a pass rewrites or leaves; what it does to a call is done to it by no other of its knobs.

    Attributes:
        site: the weight that is stored otherwise, or the call where there are several.
        skip: what the pass's option `skip` takes to leave it as it is.
        alternatives: how calls of the program compute once it is rewritten.
        saves: by unit of a budget what rewriting it saves, below zero where it costs: "bytes"; of "latency" a share of
            the original's.
    """

    site: str
    skip: tuple[str, ...]
    alternatives: Mapping[fx.Node, Alternative]
    saves: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of_all(cls, knobs: Sequence[Knob]) -> Knob:
        """Return several of one pass as one, called as the first."""
        saves: Counter[str] = Counter()
        for knob in knobs:
            saves.update(knob.saves)
        skip = dict.fromkeys(name for knob in knobs for name in knob.skip)
        calls = {call: found for knob in knobs for call, found in knob.alternatives.items()}
        return cls(knobs[0].site, tuple(skip), calls, dict(saves))


def on_changed(node: fx.Node, changed: Mapping[fx.Node, Callable[[Tensor], Tensor]]) -> Alternative:
    """Return a call with some of its arguments changed, each by a function of its value."""

    def given(argument: Any, value: Any) -> Any:
        if isinstance(argument, list | tuple):
            return type(value)(map(given, argument, value))
        change = changed.get(argument) if isinstance(argument, fx.Node) else None
        return value if change is None else change(value).to(value.device)

    def run(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        args = tuple(given(argument, value) for argument, value in zip(node.args, args, strict=True))
        return node.target(*args, **{name: given(node.kwargs[name], value) for name, value in kwargs.items()})  # type: ignore[operator]

    return Alternative(run)
