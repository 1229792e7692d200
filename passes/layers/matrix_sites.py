"""Which weights of a graph may be stored in another form, from which they become floating to be multiplied.

linear(x, w, b), addmm, mm, matmul     w, or its transpose, as rows, one for each output
convolutions, where asked for          likewise, a column for each input and tap
embedding(w, ids)                      its rows

A weight that several of them read is one site. Each refusal names the layer or the weight.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from graphopt.ir.aliasing import Storages
from graphopt.ir.finite import all_finite
from graphopt.ir.graph import constant, tensor_attribute
from graphopt.ir.operators import ALL_CONVOLUTIONS, EMBEDDINGS, RECURRENT, short_name
from graphopt.ir.provenance import module_path
from graphopt.passes.layers.codes import is_lookup
from graphopt.passes.layers.recognition import Layers, Unweighted
from graphopt.passes.layers.weighted_call import (
    IN_A_REGION,
    WeightedCall,
    is_layer,
    layer_call,
    regions_with_layers,
    uses,
    weighted_call,
)
from graphopt.passes.layers.weights import by_taps
from graphopt.pipeline.globs import check_globs, is_named
from graphopt.pipeline.plan import Refusal
from graphopt.quantization.ops import DEQUANTIZE

aten = torch.ops.aten


@dataclass(frozen=True, eq=False)
class MatrixSite:
    """One weight and what reads it.

    Attributes:
        weight_name: its first name.
        calls: products with it.
        reads: embeddings of its rows.
        turned: whether it is a matrix stored as (inputs, outputs).
    """

    weight_name: str
    calls: tuple[WeightedCall, ...]
    reads: tuple[fx.Node, ...]
    turned: bool

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        """Everything that reads it."""
        return (*(call.node for call in self.calls), *self.reads)

    def rows(self, gm: fx.GraphModule) -> Tensor:
        """Return the weight as (rows, columns), float32; columns of a convolution are inputs, and taps in each."""
        weight = tensor_attribute(gm, self.weight_name).detach()
        return by_taps(self.calls[0], weight).flatten(0, 1).flatten(1).contiguous() if self.calls else weight

    def skipped(self, globs: Iterable[str]) -> str | None:
        """Return the glob that names a module or operator that reads it, or the weight; None if none does."""
        names = [self.weight_name, *(name for node in self.nodes for name in (module_path(node), node.name))]
        return next((glob for glob in globs if any(is_named(name, glob) for name in names)), None)


def find_sites(gm: fx.GraphModule, *, convolutions: bool = False) -> tuple[list[MatrixSite], list[Refusal]]:
    """List the weights that may be stored as rows of something else, in graph order, and what may not.

    Args:
        gm: the graph.
        convolutions: whether weights of convolutions may.
    """
    readers: dict[int, list[WeightedCall | fx.Node]] = {}
    layers, unweighted = Layers(gm), Unweighted(gm)
    closed = regions_with_layers(gm)
    refusals = [Refusal(node.name, IN_A_REGION) for node in closed]
    for node in gm.graph.nodes:
        call = weighted_call(node, gm)
        read = _is_read(node) and not is_lookup(node, gm)
        table = constant(node.args[0], gm) if read else None
        if call is not None and (convolutions or "conv" not in call.kind):
            readers.setdefault(id(constant(call.weight, gm)), []).append(call)
        elif table is not None and table.is_floating_point():
            readers.setdefault(id(table), []).append(node)
        elif read and table is None:
            refusals.append(Refusal(node.name, "its table is computed at run time"))
        elif _reads_otherwise(node, convolutions):
            text = f"no kernel of `{short_name(node)}` reads stored integers and computes in floating point"
            if convolutions:
                text = f"weights of `{short_name(node)}` are read as they are"
            refusals.append(Refusal(node.name, text, text.replace("`", "")))
        elif is_layer(node):
            refusals.append(Refusal(node.name, _why_no_layer(layer_call(node, gm), unweighted, gm)))
        elif node in layers and node not in closed:
            refusals.append(Refusal(node.name, unweighted.why_of_product(node) or "it is no product with a matrix"))
    storages = Storages(gm.graph)
    sites = []
    for group in readers.values():
        site = _site(group)
        reason = _why_not(site, gm, storages)
        if reason:
            refusals.append(Refusal(site.weight_name, *reason))
        else:
            sites.append(site)
    return sites, refusals


def check_skip(globs: Sequence[str], sites: Iterable[MatrixSite], gm: fx.GraphModule) -> None:
    """Check that every glob names a layer, or at least a call.

    Raises:
        UsageError: one does not.
    """
    layers = [module_path(node) or node.name for site in sites for node in site.nodes]
    calls = [node for node in gm.graph.nodes if node.op == "call_function"]
    others = [name for node in calls for name in (module_path(node), node.name)]
    others += [str(node.target) for node in gm.graph.nodes if node.op == "get_attr"]
    check_globs("skip", globs, layers, kind="layer", others=others)


def _why_no_layer(call: WeightedCall | None, unweighted: Unweighted, gm: fx.GraphModule) -> str:
    """Return why a product with a bias is no layer with a stored weight."""
    if call is not None and constant(call.bias, gm) is not None and call.bias.meta["val"].dim() != 1:  # type: ignore[union-attr]
        return "its bias is no plain vector"
    return unweighted.why(call)


def _reads_otherwise(node: fx.Node, convolutions: bool) -> bool:
    """Whether an operator reads weights in no form that is asked for."""
    if node in ALL_CONVOLUTIONS:
        return not convolutions or not is_layer(node)
    return node in RECURRENT or (node in EMBEDDINGS and not _is_embedding(node))


def _is_read(node: fx.Node) -> bool:
    """Whether rows of a table are read, and not the scales of one that is stored as integers."""
    scales = any(user.target is DEQUANTIZE for user in node.users)
    return _is_embedding(node) and isinstance(node.args[0], fx.Node) and not scales


def _is_embedding(node: fx.Node) -> bool:
    return node.target is aten.embedding.default


def _site(group: Sequence[WeightedCall | fx.Node]) -> MatrixSite:
    calls = tuple(reader for reader in group if isinstance(reader, WeightedCall))
    reads = tuple(reader for reader in group if isinstance(reader, fx.Node))
    name = calls[0].weight_name if calls else str(reads[0].args[0].target)  # type: ignore[union-attr]
    return MatrixSite(name, calls, reads, turned=bool(calls) and calls[0].kind == "matmul")


def _why_not(site: MatrixSite, gm: fx.GraphModule, storages: Storages) -> tuple[str, str] | None:
    """Return why a weight stays as it is, and the same without particulars."""
    weight = tensor_attribute(gm, site.weight_name)
    if weight.dtype is not torch.float32:
        return f"it is {str(weight.dtype).removeprefix('torch.')}, not float32", "it is not float32"
    if not weight.numel():
        return "it has no elements", ""
    if not all_finite(weight):
        return "it holds NaN or infinite values", ""
    known = set(site.nodes)
    others = [user for user in uses(gm, site.weight_name) if user not in known]
    if others:
        return f"`{others[0].name}` reads it too, in floating point", "something else reads it too"
    if (site.turned and site.reads) or len({call.kind for call in site.calls}) > 1:
        return "it is read both ways round", ""
    if len({call.groups for call in site.calls}) > 1:
        return "it is read in other groups, too", ""
    reads = (node for node in gm.graph.nodes if constant(node, gm) is weight)
    if writers := [writer for read in reads for writer in storages.writes(read)]:
        return f"`{writers[0].name}` writes to it", "written in place"
    return None
