"""Time axis inference over the number of nodes: stacks of 2 to 96 transformer layers, and models of the zoo.

    python tools/bench_axes.py --plot axes.png
    python tools/bench_axes.py --zoo timm/hrnet_w18_small --zoo torchvision/densenet201

Prints a row for each graph: nodes, seconds (the fastest of several runs, of processor time), seconds for 1,000 nodes,
groups found. Near-linear means that the last but one column stays where it is; `--plot` draws it (needs matplotlib).
"""

from __future__ import annotations

import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import fx, nn

sys.path.insert(0, str(Path(__file__).parent))

import zoo_models

from graphopt.axes.infer import infer
from graphopt.capturing.capture import capture

_LAYERS = (2, 4, 8, 16, 32, 64, 96)
_WIDTH, _HEADS, _TOKENS = 48, 4, 8
_ASKED = 0.2  # seconds for 1,000 nodes


@dataclass(frozen=True, slots=True)
class Timing:
    """How long one graph took."""

    name: str
    nodes: int
    seconds: float
    groups: int

    @property
    def per_thousand(self) -> float:
        """Return the seconds for 1,000 nodes."""
        return 1000 * self.seconds / self.nodes


def measure(name: str, gm: fx.GraphModule, repeats: int) -> Timing:
    """Infer several times and keep the fastest; processor time, so that a busy machine matters less."""
    seconds, groups = math.inf, 0
    for _ in range(repeats):
        start = time.process_time()
        groups = len(infer(gm).groups())
        seconds = min(seconds, time.process_time() - start)
    return Timing(name, len(gm.graph.nodes), seconds, groups)


def transformer(layers: int) -> fx.GraphModule:
    """Return the graph of a stack of encoder layers."""
    layer = nn.TransformerEncoderLayer(_WIDTH, _HEADS, 2 * _WIDTH, batch_first=True, norm_first=True)
    model = nn.Sequential(nn.Linear(8, _WIDTH), nn.TransformerEncoder(layer, layers, enable_nested_tensor=False))
    return capture(nn.Sequential(model, nn.Linear(_WIDTH, 5)), (torch.randn(2, _TOKENS, 8),)).graph_module


def from_zoo(path: str) -> fx.GraphModule:
    """Return the graph of a model of the zoo, given as family/name."""
    family, _, name = path.partition("/")
    subject = zoo_models.families()[family]()[name]()
    return capture(subject.model, subject.args, subject.kwargs, share_tensors=True).graph_module


def draw(timings: list[Timing], path: Path) -> None:
    """Plot seconds over nodes on logarithmic axes, with what was asked as a line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    stacks = [t for t in timings if t.name.endswith("layers")]
    others = [t for t in timings if t not in stacks]
    axes.plot([t.nodes for t in stacks], [t.seconds for t in stacks], "o-", label="stacks of transformer layers")
    for t in stacks:
        axes.annotate(t.name.split()[0], (t.nodes, t.seconds), textcoords="offset points", xytext=(6, -10))
    if others:
        axes.plot([t.nodes for t in others], [t.seconds for t in others], "s", label="zoo")
    for t in others:
        axes.annotate(t.name, (t.nodes, t.seconds), textcoords="offset points", xytext=(6, 4), fontsize=7)
    reach = [min(t.nodes for t in timings), max(t.nodes for t in timings)]
    axes.plot(reach, [_ASKED * n / 1000 for n in reach], "--", color="grey", label=f"{_ASKED} s for 1,000 nodes")
    axes.set(xscale="log", yscale="log", xlabel="nodes", ylabel="seconds", title="Axis inference")
    axes.legend()
    axes.grid(True, which="both", alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main(
    plot: Annotated[Path | None, typer.Option(help="where to draw the plot")] = None,
    zoo: Annotated[list[str] | None, typer.Option(help="models of the zoo to time too, as family/name")] = None,
    repeats: Annotated[int, typer.Option(help="runs of each, the fastest counts", min=1)] = 3,
    most: Annotated[int, typer.Option(help="layers at most", min=2)] = 96,
) -> None:
    """Time inference and print a table."""
    torch.manual_seed(0)
    infer(transformer(1))  # rules are imported once
    timings = [measure(f"{n} layers", transformer(n), repeats) for n in _LAYERS if n <= most]
    timings += [measure(path, from_zoo(path), repeats) for path in zoo or []]
    table = Table(title="axis inference")
    for column in ("graph", "nodes", "seconds", "per 1,000 nodes", "groups"):
        table.add_column(column, justify="left" if column == "graph" else "right")
    for t in timings:
        style = "red" if t.per_thousand > _ASKED else ""
        table.add_row(t.name, str(t.nodes), f"{t.seconds:.3f}", f"{t.per_thousand:.3f}", str(t.groups), style=style)
    Console().print(table)
    if plot is not None:
        draw(timings, plot)


if __name__ == "__main__":
    typer.run(main)
