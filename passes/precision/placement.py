"""Decides which calls compute in 16 bits; where one that does meets one that does not, a cast will stand.

    seeking operators (products, convolutions, attention, ..)     compute in 16 bits
    following ones (sums, activations, moves, ..)                 where an operand does, but for what float32 alone
                                                                  reads; moves of weights, where all do that read them
    all others                                                    compute in float32

Left in float32, each with its reason: what `skip` and `keep` name, values that are not float32 or written in place,
neighbours of integers, regions, numbers that 16 bits cannot hold and what hangs on them (`numbers`), values that were
measured too large.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, fx

from graphopt.ir.aliasing import Storages
from graphopt.ir.graph import arguments, constant
from graphopt.ir.operators import ATTENTION, MOVES, plain_name, writes_in_place
from graphopt.ir.ownership import memory_key
from graphopt.ir.provenance import module_path
from graphopt.ir.regions import region
from graphopt.ir.torch_internals import pytree
from graphopt.passes.layers.skipping import why_skipped
from graphopt.passes.precision.numbers import dangers, of_call
from graphopt.passes.precision.operators import FOLLOWING, PASSING, SEEKING, why_kept
from graphopt.pipeline.globs import check_globs
from graphopt.pipeline.plan import Refusal

HEADROOM = 2.0  # other samples may be as many times larger than those measured


@dataclass(frozen=True, slots=True)
class Wishes:
    """What stays float32 whatever it is.

    Attributes:
        skip: globs of modules or nodes, as the user wants it.
        keep: globs of operators, as the user wants it.
        without: operators that the target has no kernels for.
        target: its name.
    """

    skip: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    target: str = ""

    def check(self, gm: fx.GraphModule) -> None:
        """Refuse globs that match nothing.

        Raises:
            UsageError: it names near ones.
        """
        calls = [node for node in gm.graph.nodes if node.op == "call_function"]
        layers = [module_path(node) or node.name for node in calls if node in SEEKING]
        others = [name for node in calls for name in (module_path(node), node.name)]
        check_globs("skip", self.skip, layers, kind="module or operator", others=others)
        check_globs("keep", self.keep, map(plain_name, calls), kind="operator")


@dataclass(eq=False)
class Halves:
    """What is in 16 bits.

    Attributes:
        calls: calls that compute in them, in graph order.
        weights: names of stored tensors that calls like that alone read.
        refusals: what was matched and stays float32.
    """

    calls: list[fx.Node] = field(default_factory=list)
    weights: list[str] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)


def place_halves(
    gm: fx.GraphModule, dtype: torch.dtype, wishes: Wishes, extents: Mapping[fx.Node, float] | None = None
) -> Halves:
    """Decide what is in 16 bits.

    Args:
        gm: a folded graph.
        dtype: the type of 16 bits.
        wishes: what is to stay float32.
        extents: the largest magnitude of values, where it was measured.
    """
    return _Placer(gm, dtype, wishes, extents or {}).run()


def float32_tensors(node: fx.Node) -> list[Tensor]:
    """List the float32 tensors that a node gives."""
    return [leaf for leaf in _tensors(node) if leaf.dtype is torch.float32]


class _Placer:
    def __init__(
        self, gm: fx.GraphModule, dtype: torch.dtype, wishes: Wishes, extents: Mapping[fx.Node, float]
    ) -> None:
        self._gm = gm
        self._dtype = dtype
        self._wishes = wishes
        self._extents = extents
        self._storages = Storages(gm.graph)
        self._dangers = dangers(gm, dtype)
        self._low: dict[fx.Node, bool] = {}  # of calls; not of moves of weights, until all others are known
        self._moved: list[fx.Node] = []
        self._result = Halves()

    def run(self) -> Halves:
        for node in self._gm.graph.nodes:
            if node.op == "call_function" and (float32_tensors(node) or any(map(self._is_low, node.all_input_nodes))):
                self._place(node)
        for node in reversed(self._gm.graph.nodes):
            if self._pays_in_float32(node):
                self._low[node] = False
        for node in reversed(self._moved):
            self._low[node] = bool(node.users) and all(map(self._is_low, node.users)) and not self._reason(node)[0]
        self._result.calls = [node for node in self._gm.graph.nodes if self._is_low(node)]
        self._result.weights = self._weights()
        return self._result

    def _place(self, node: fx.Node) -> None:
        operands = [source for source in node.all_input_nodes if float32_tensors(source)]
        if node in MOVES and operands and all(self._is_weight(source) for source in operands):
            self._moved.append(node)
            return
        wanted = node in SEEKING or (node in FOLLOWING and any(map(self._is_low, operands)))
        if plain_name(node) == "getitem":
            self._low[node] = any(map(self._is_low, operands))
            return
        computed = [source for source in operands if not self._is_weight(source)]
        reason, kind = (self._reason(node)) if wanted else (self._why_kept(node), "")
        if reason and computed:
            self._result.refusals.append(Refusal(node.name, reason, kind))
        self._low[node] = wanted and not reason

    def _pays_in_float32(self, node: fx.Node) -> bool:
        """Whether a sum, product or move may as well be made of the one operand's float32, which all its users want.

        No cast more stands then, and what a mask makes of scores before their softmax is not rounded.
        """
        single = sum(map(self._is_low, node.all_input_nodes)) == 1 and isinstance(node.meta.get("val"), Tensor)
        movable = node in PASSING and plain_name(node) != "getitem" and self._is_low(node)
        return movable and single and not any(map(self._is_low, node.users))

    def _is_low(self, node: fx.Node) -> bool:
        return self._low.get(node, False)

    def _is_weight(self, node: fx.Node) -> bool:
        return node.op == "get_attr" or node in self._moved

    def _why_kept(self, node: fx.Node) -> str:
        if region(node, self._gm) is not None:
            return "it is a region, which computes in float32"
        return "it writes in place" if writes_in_place(node) else why_kept(node)

    def _reason(self, node: fx.Node) -> tuple[str, str]:
        """Return why a call that would compute in 16 bits must not, and the same without particulars."""
        if reasons := why_skipped(node, self._wishes.skip):
            return reasons
        pattern = next((glob for glob in self._wishes.keep if fnmatchcase(plain_name(node), glob)), None)
        if pattern is not None:
            return f"it computes in float32 as asked (keep={pattern})", "kept as asked"
        if plain_name(node) in self._wishes.without:
            return f"{self._wishes.target} has no kernel of it in {self._name}", ""
        for value in (*node.all_input_nodes, node):
            odd = next((t.dtype for t in _tensors(value) if _other_float(t)), None)
            if odd is not None:
                return f"`{value.name}` is {str(odd).removeprefix('torch.')}, not float32", "a value is not float32"
            if getattr(value.target, "namespace", "") == "graphopt":
                return f"`{value.name}` converts integers, whose scales are float32", "next to integers"
            if writers := self._storages.writes(value):
                return f"`{value.name}` shares memory with what `{writers[0].name}` writes", "written in place"
        if any(getattr(user.target, "namespace", "") == "graphopt" for user in node.users):
            return "its result becomes integers, whose scales are float32", "next to integers"
        if own := of_call(node, self._dtype):
            return f"it computes with what {self._name} cannot hold: {own.reason}", f"{own.kind} numbers"
        return self._danger(node) or self._too_large(node) or ("", "")

    @property
    def _name(self) -> str:
        return str(self._dtype).removeprefix("torch.")

    def _danger(self, node: fx.Node) -> tuple[str, str] | None:
        exempt = clamped_mask(node)
        for source in node.all_input_nodes:
            danger = self._dangers.get(source)
            if danger is None or source is exempt or (danger.kind == "small" and _is_bias(node, source)):
                continue
            name = source.target if source.op == "get_attr" else source.name
            return f"{self._name} cannot hold `{name}`: {danger.reason}", f"{danger.kind} numbers"
        return None

    def _too_large(self, node: fx.Node) -> tuple[str, str] | None:
        limit = torch.finfo(self._dtype).max / HEADROOM
        exempt = clamped_mask(node)
        for value in (*node.all_input_nodes, node):
            if value is not exempt and self._extents.get(value, 0.0) > limit:
                seen = f"`{value.name}` reached {self._extents[value]:.3g} on the data"
                return f"{seen}, and {limit:.5g} leaves room for other samples", "its values were too large"
        return None

    def _weights(self) -> list[str]:
        """List the stored tensors that calls in 16 bits alone read, under whatever name."""
        reads: dict[Any, list[fx.Node]] = {}
        for node in self._gm.graph.find_nodes(op="get_attr"):
            tensor = constant(node, self._gm)
            if tensor is not None and tensor.dtype is torch.float32:
                reads.setdefault(memory_key(tensor), []).append(node)
        masks = {clamped_mask(node) for node in self._result.calls}
        found = [
            str(node.target)
            for nodes in reads.values()
            if all(map(self._is_low, (user for node in nodes for user in node.users))) and masks.isdisjoint(nodes)
            for node in nodes
        ]
        return list(dict.fromkeys(found))


def clamped_mask(node: fx.Node) -> fx.Node | None:
    """Return the floating mask of attention, whose numbers are brought into range before it is rounded."""
    if node not in ATTENTION:
        return None
    mask = arguments(node, ("attn_mask",)).get("attn_mask")
    return mask if isinstance(mask, fx.Node) and float32_tensors(mask) else None


def _is_bias(node: fx.Node, source: fx.Node) -> bool:
    """Whether a value is no more than added to what a layer computes."""
    if node not in SEEKING:
        return False
    given = arguments(node, ())
    return source in (given.get("bias"), given.get("self") if "mat1" in given or "batch1" in given else None)


def _tensors(node: fx.Node) -> Sequence[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(node.meta.get("val")) if isinstance(leaf, Tensor)]


def _other_float(tensor: Tensor) -> bool:
    return (tensor.is_floating_point() or tensor.is_complex()) and tensor.dtype is not torch.float32
