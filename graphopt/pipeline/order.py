"""What a pipeline must hold and in which order: needs are met by inserting passes, orders are checked and explained.

    needs, produces, invalidates    properties of a program, before and after a pass
    after, before                   which of two passes stands first, whichever of them says so
    conflicts                       passes of which a pipeline may hold one

Nothing is reordered: what the user wrote runs in that order or not at all.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import networkx as nx

from graphopt.errors import UsageError
from graphopt.pipeline.options import changed, to_text
from graphopt.pipeline.pass_base import Pass
from graphopt.pipeline.registry import PassRegistry

AnyPass = Pass[Any, Any]
_Properties = frozenset[str]
_MOST_ORDERS = 1000  # all of six passes


@dataclass(frozen=True)
class Step:
    """One pass of a pipeline."""

    instance: AnyPass
    inserted_for: str = ""  # the pass whose need it meets, "" if the user wrote it

    @property
    def name(self) -> str:
        """Name of the pass."""
        return self.instance.name

    @property
    def text(self) -> str:
        """The step as pipeline text, options that differ from their defaults included."""
        options = changed(self.instance.options)
        return ":".join([self.name, *(f"{key}={to_text(value)}" for key, value in options.items())])


def complete(written: Iterable[AnyPass], registry: PassRegistry) -> list[Step]:
    """Insert before each pass the fewest passes that make the program what it needs.

    Raises:
        UsageError: no installed pass does, or what one makes another undoes.
    """
    steps: list[Step] = []
    holds: _Properties = frozenset()
    for instance in written:
        earlier = [step.instance for step in steps]
        inserted = _bridge(holds, instance, earlier, registry)
        if inserted is None:
            raise UsageError(_unmet(holds, instance, earlier, registry))
        for index, producer in enumerate(inserted):
            readers = (*inserted[index + 1 :], instance)
            reader = next((one for one in readers if set(one.needs) & set(producer.produces)), instance)
            steps.append(Step(producer, reader.name))
        steps.append(Step(instance))
        for one in (*inserted, instance):
            holds = _after(holds, one)
    return steps


def check_order(steps: Sequence[Step], registry: PassRegistry) -> None:
    """Check what passes say of each other.

    Raises:
        UsageError: two of them conflict, or stand the wrong way round; it gives an order that is right, or says why
            none is.
    """
    clash = _conflict(steps)
    if clash is not None:
        names = " and ".join(_called(step, registry) for step in clash)
        raise UsageError(f"Passes {names} cannot be in one pipeline. Choose one of them.")
    wrong = _wrong_way_round(steps)
    if wrong is None:
        return
    earlier, later = wrong
    said = f"Pass {_called(later, registry)} must come before {_called(earlier, registry)}"
    if later.name in earlier.instance.after:
        said = f"Pass {_called(earlier, registry)} must come after {_called(later, registry)}"
    better = _right_order(steps, registry)
    if better is not None:
        raise UsageError(f"{said}. Write --passes {','.join(Step(one).text for one in better)}.")
    circle = _circle(steps)
    if circle:
        said = "No order of these passes is right: " + ", ".join(
            f"{_called(first, registry)} must come before {_called(second, registry)}" for first, second in circle
        )
    raise UsageError(f"{said}. Leave one of them out.")


def _bridge(
    holds: _Properties, instance: AnyPass, earlier: Sequence[AnyPass], registry: PassRegistry
) -> tuple[AnyPass, ...] | None:
    """Return the shortest sequence of producers after which a pass has what it needs.

    One that stands where all agree, if there is one; else one that `check_order` then explains.
    """
    if holds.issuperset(instance.needs):
        return ()
    producers = _producers(instance, registry)
    agreeing = [one for one in producers if all(_agree(before, one) for before in earlier) and _agree(one, instance)]
    found = _shortest(holds, instance, agreeing, ordered=True)
    return _shortest(holds, instance, producers, ordered=False) if found is None else found


def _shortest(
    holds: _Properties, instance: AnyPass, producers: Sequence[AnyPass], *, ordered: bool
) -> tuple[AnyPass, ...] | None:
    pending: deque[tuple[_Properties, tuple[AnyPass, ...]]] = deque([(holds, ())])
    seen = {(holds, frozenset[AnyPass]())}
    while pending:
        state, path = pending.popleft()
        if state.issuperset(instance.needs):
            return path
        for producer in producers:
            following = _after(state, producer), (*path, producer)
            known = (following[0], frozenset(following[1]) if ordered else frozenset())
            fits = not ordered or all(_agree(before, producer) for before in path)
            if state.issuperset(producer.needs) and fits and known not in seen:
                seen.add(known)
                pending.append(following)
    return None


def _producers(instance: AnyPass, registry: PassRegistry) -> list[AnyPass]:
    """Return a producer of each property that a pass, or a producer of what it needs, needs."""
    found: dict[str, AnyPass] = {}
    pending = list(instance.needs)
    for needed in pending:
        name = registry.producer_of(needed)
        if name is not None and name not in found:
            found[name] = registry.pass_class(name)()
            pending += found[name].needs
    return list(found.values())


def _after(holds: _Properties, instance: AnyPass) -> _Properties:
    both = [name for name in instance.produces if name in instance.invalidates]
    if both:
        raise UsageError(f"Pass `{instance.name}` says that it both produces and invalidates `{both[0]}`. Repair it.")
    return holds.difference(instance.invalidates).union(instance.produces)


def _unmet(holds: _Properties, instance: AnyPass, earlier: Sequence[AnyPass], registry: PassRegistry) -> str:
    missing = [needed for needed in instance.needs if needed not in holds]
    nobody = next((needed for needed in missing if registry.producer_of(needed) is None), None)
    said = f"Pass `{instance.name}` needs a program that is "
    if nobody is not None:
        undoing = [one.name for one in earlier if nobody in one.invalidates]
        when = f" after `{undoing[-1]}`, which undoes it" if undoing else ""
        return f"{said}`{nobody}`, and no installed pass makes it so{when}."
    producers = []
    for one in _producers(instance, registry):
        words = {"makes": one.produces, "undoes": one.invalidates, "needs": one.needs}
        does = (f"{verb} `{'`, `'.join(names)}`" for verb, names in words.items() if names)
        producers.append(f"`{one.name}` {' and '.join(does)}")
    return f"{said}`{'` and `'.join(instance.needs)}`, which no sequence of passes makes: {'; '.join(producers)}."


def _stands_before(first: AnyPass, second: AnyPass) -> bool:
    """Tell whether one of two passes says that the first must stand before the second."""
    return second.name in first.before or first.name in second.after


def _agree(first: AnyPass, second: AnyPass) -> bool:
    """Tell whether two passes may stand in this order."""
    conflict = second.name in first.conflicts or first.name in second.conflicts
    return not conflict and not _stands_before(second, first)


def _conflict(steps: Sequence[Step]) -> tuple[Step, Step] | None:
    for step, other in itertools.permutations(steps, 2):
        if other.name in step.instance.conflicts:
            return step, other
    return None


def _wrong_way_round(steps: Sequence[Step]) -> tuple[Step, Step] | None:
    for index, earlier in enumerate(steps):
        for later in steps[index + 1 :]:
            if _stands_before(later.instance, earlier.instance):
                return earlier, later
    return None


def _graph(passes: Sequence[AnyPass]) -> nx.DiGraph[int]:
    graph: nx.DiGraph[int] = nx.DiGraph()
    graph.add_nodes_from(range(len(passes)))
    for first, second in itertools.permutations(graph.nodes, 2):
        if _stands_before(passes[first], passes[second]):
            graph.add_edge(first, second)
    return graph


def _right_order(steps: Sequence[Step], registry: PassRegistry) -> list[AnyPass] | None:
    """Return an order of what the user wrote that is right and otherwise as written; or of all that is there.

    Where none of that is, another order of either, which may need other insertions.
    """
    written, everything = [one.instance for one in steps if not one.inserted_for], [one.instance for one in steps]
    graphs = [(passes, _graph(passes)) for passes in (written, everything)]
    graphs = [(passes, graph) for passes, graph in graphs if nx.is_directed_acyclic_graph(graph)]
    as_written = [(passes, nx.lexicographical_topological_sort(graph)) for passes, graph in graphs]
    others = [
        (passes, order)
        for passes, graph in graphs
        for order in itertools.islice(nx.all_topological_sorts(graph), _MOST_ORDERS)
    ]
    for passes, order in (*as_written, *others):
        ordered = [passes[index] for index in order]
        try:
            found = complete(ordered, registry)
        except UsageError:  # in that order a need cannot be met
            continue
        if _conflict(found) is None and _wrong_way_round(found) is None:
            return ordered
    return None


def _circle(steps: Sequence[Step]) -> list[tuple[Step, Step]]:
    try:
        edges = nx.find_cycle(_graph([one.instance for one in steps]))
    except nx.NetworkXNoCycle:
        return []
    return [(steps[first], steps[second]) for first, second, *_ in edges]


def _called(one: Step, registry: PassRegistry) -> str:
    """Name a pass, where it comes from if it is a plugin, and what it was inserted for."""
    source = registry.source(one.name) if one.name in registry.names() else f"class `{type(one.instance).__qualname__}`"
    facts = [] if source == "distribution `graphopt`" else [source]
    facts += [f"inserted for `{one.inserted_for}`"] if one.inserted_for else []
    return f"`{one.name}` ({', '.join(facts)})" if facts else f"`{one.name}`"
