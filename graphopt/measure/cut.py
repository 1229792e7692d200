"""Cut: which operators run on integers and which in float, so that all of them with what lies between take least time.

Every operator pays for the form it takes; a value that passes from float to integers is quantized once, and one that
passes back dequantized once, however many read it. That is a minimum cut, and the best of all assignments:

    integers -> operator     seconds as float          operator -> float     seconds as integers
    producer -> a            to dequantize             a -> reader           without limit       for each value
    reader   -> b            without limit             b -> producer         to quantize

The auxiliary nodes a and b, two for each value, let it pay once (Lawler 1973, "Cutsets and partitions of hypergraphs").
"""

from __future__ import annotations

from collections.abc import Collection, Sequence, Set
from dataclasses import dataclass

_TICK = 1e-12  # seconds: capacities are whole numbers, so that the cut is exact
_INTEGERS, _FLOAT = ("side", "integers"), ("side", "float")


@dataclass(frozen=True, slots=True)
class Operator:
    """An operator that may take either form.

    Attributes:
        name: of it.
        integer: seconds on integers.
        floating: seconds in float, None where it cannot be float.
    """

    name: str
    integer: float
    floating: float | None


@dataclass(frozen=True, slots=True)
class Crossing:
    """A value that may have to change its form.

    Attributes:
        producer: the operator that makes it; "" for one that is float whatever is chosen.
        readers: likewise, those that read it.
        quantize: seconds to turn it into integers, where it is made as floats and some reader runs on integers.
        dequantize: seconds to turn it back, where it is made as integers and some reader is float.
    """

    producer: str
    readers: tuple[str, ...]
    quantize: float
    dequantize: float

    def seconds(self, integers: Collection[str]) -> float:
        """Return what it costs where these operators run on integers."""
        wanted = [reader in integers for reader in self.readers]
        if self.producer in integers:
            return 0.0 if all(wanted) else self.dequantize
        return self.quantize if any(wanted) else 0.0


@dataclass(frozen=True, slots=True)
class Island:
    """Operators next to each other that are faster as floats.

    Attributes:
        operators: their names.
        integer: seconds on integers, of them and of what turns the values around them.
        floating: likewise in float.
    """

    operators: tuple[str, ...]
    integer: float
    floating: float


def on_integers(operators: Sequence[Operator], crossings: Sequence[Crossing]) -> set[str]:
    """Return the operators that run on integers in the fastest assignment; where two are as fast, more of them."""
    import networkx as nx  # not before it is needed

    graph: nx.DiGraph[tuple[str, str | int]] = nx.DiGraph()
    graph.add_nodes_from((_INTEGERS, _FLOAT))
    for operator in operators:
        own = _node(operator.name)
        limit = {} if operator.floating is None else {"capacity": _ticks(operator.floating)}
        graph.add_edge(_INTEGERS, own, **limit)
        graph.add_edge(own, _FLOAT, capacity=_ticks(operator.integer))
    for number, crossing in enumerate(crossings):
        back, there = ("dequantized", number), ("quantized", number)
        graph.add_edge(_node(crossing.producer), back, capacity=_ticks(crossing.dequantize))
        graph.add_edge(there, _node(crossing.producer), capacity=_ticks(crossing.quantize))
        for reader in dict.fromkeys(crossing.readers):
            graph.add_edge(back, _node(reader))
            graph.add_edge(_node(reader), there)
    _, (chosen, _) = nx.minimum_cut(graph, _INTEGERS, _FLOAT)
    return {operator.name for operator in operators if _node(operator.name) in chosen}


def islands(operators: Sequence[Operator], crossings: Sequence[Crossing], integers: Set[str]) -> list[Island]:
    """Return those that are left float, in groups that hang together, with what each group takes in either form."""
    import networkx as nx

    left = {operator.name: operator for operator in operators if operator.name not in integers}
    together: nx.Graph[str] = nx.Graph()
    together.add_nodes_from(left)
    for crossing in crossings:
        ends = [name for name in (crossing.producer, *crossing.readers) if name in left]
        nx.add_path(together, ends)
    found = []
    for names in nx.connected_components(together):
        within = [operator for name, operator in left.items() if name in names]
        touching = [one for one in crossings if not names.isdisjoint((one.producer, *one.readers))]
        ways = [seconds(within, touching, chosen) for chosen in (integers | names, integers)]
        found.append(Island(tuple(one.name for one in within), *ways))
    return found


def seconds(operators: Sequence[Operator], crossings: Sequence[Crossing], integers: Collection[str]) -> float:
    """Return what operators and what lies between them take where some run on integers."""
    own = sum(one.integer if one.name in integers else one.floating or 0.0 for one in operators)
    return own + sum(crossing.seconds(integers) for crossing in crossings)


def _node(name: str) -> tuple[str, str]:
    return ("operator", name) if name else _FLOAT


def _ticks(seconds: float) -> int:
    return round(seconds / _TICK)
