"""Decides which kernels run on integers and which values therefore pass through quantize and dequantize.

It reads nothing but the graph and the target description. A value is in one of three states:

    float       its producer is a float operator and nobody wants integers
    read        its producer is a float operator; some readers take dequantize(quantize(value))
    integer     its producer is an integer kernel; every reader takes dequantize of the stored integers

Refused, each with its reason: operators without an integer kernel on the target, weights computed at run time,
values that are not float32 or have no elements, values written in place, kernels that would stand alone between float
operators, and modules the user asked to leave.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from graphopt.ir.aliasing import Storages
from graphopt.ir.finite import all_finite
from graphopt.ir.graph import constant
from graphopt.ir.operators import plain_name, short_name
from graphopt.ir.provenance import module_path
from graphopt.passes.layers.recognition import Unweighted
from graphopt.passes.layers.skipping import why_skipped
from graphopt.passes.layers.weighted_call import IN_A_REGION, regions_with_layers
from graphopt.passes.quantization.kernels import HEAVY, Kernel, clamp_range, kernel_of
from graphopt.pipeline.globs import check_globs
from graphopt.pipeline.plan import Refusal
from graphopt.quantization.ops import DEQUANTIZE
from graphopt.targets.description import OperatorRule, Scales, TargetDescription

Choice = Scales | Refusal


@dataclass(frozen=True, eq=False)
class Site:
    """A call that runs on integers.

    Attributes:
        node: the call.
        kernel: how it is read.
        rule: the target's rule for it.
        end: the value whose quantization ends it: the call itself or the activation it absorbs. None when its
            result stays float.
        dynamic: whether its kernel chooses the scale of its operand.
    """

    node: fx.Node
    kernel: Kernel
    rule: OperatorRule
    end: fx.Node | None
    dynamic: bool = False


@dataclass(eq=False)
class Placement:
    """Where integers stand.

    Attributes:
        sites: calls on integers, in graph order.
        integers: values produced by integer kernels; mapped to the value whose scale they share, or None.
        reads: values of float producers (constants included), with the calls that read them quantized.
        dropped: absorbed activations that the integer range carries out, with the range they clamp to.
        refusals: what was matched and left alone.
    """

    sites: list[Site] = field(default_factory=list)
    integers: dict[fx.Node, fx.Node | None] = field(default_factory=dict)
    reads: dict[fx.Node, list[fx.Node]] = field(default_factory=dict)
    dropped: dict[fx.Node, tuple[float, float]] = field(default_factory=dict)
    refusals: list[Refusal] = field(default_factory=list)

    def root(self, value: fx.Node) -> fx.Node:
        """Return the value whose scale `value` has."""
        source = self.integers.get(value)
        while source is not None:
            value, source = source, self.integers.get(source)
        return value


def place(
    gm: fx.GraphModule,
    target: TargetDescription,
    skip: Sequence[str] = (),
    choice: Mapping[fx.Node, Choice] | None = None,
    default: Scales | None = None,
) -> Placement:
    """Decide where integers stand in `gm`.

    Args:
        gm: a prepared graph (`prepare.respell`).
        target: what the runtime can do.
        skip: glob patterns of module paths or node names to leave float.
        choice: of layers, when their scales are chosen, or why they stay float.
        default: when those of all other layers are; None for what the target's kernel is best at.

    Raises:
        UsageError: a pattern matches neither.
    """
    return _Placer(gm, target, skip, choice or {}, default).run()


class _Placer:
    def __init__(
        self,
        gm: fx.GraphModule,
        target: TargetDescription,
        skip: Sequence[str],
        choice: Mapping[fx.Node, Choice],
        default: Scales | None,
    ) -> None:
        self._gm = gm
        self._target = target
        self._skip = skip
        self._choice = choice
        self._default = default
        self._kernels = {node: kernel for node in gm.graph.nodes if (kernel := kernel_of(node, gm)) is not None}
        self._problems: dict[fx.Node, Refusal | None] = {}
        self._storages = Storages(gm.graph)
        self._unweighted = Unweighted(gm)
        self._only_integers: dict[fx.Node, bool] = {}
        self._result = Placement()

    def run(self) -> Placement:
        self._check_skip()
        for node in reversed(self._gm.graph.nodes):
            self._only_integers[node] = bool(node.users) and all(self._reads_integers(u, node) for u in node.users)
        for node, kernel in self._kernels.items():
            rule = self._target.rule(kernel.name)
            if rule is None or rule.role == "read":
                self._refuse_float(node, kernel, rule)
            elif rule.role == "compute":
                self._place_compute(node, kernel, rule)
            else:
                self._place_follower(node, kernel, rule)
        self._place_reads()
        self._result.refusals.extend(Refusal(node.name, IN_A_REGION) for node in regions_with_layers(self._gm))
        return self._result

    def _check_skip(self) -> None:
        nodes = [node for node in self._gm.graph.nodes if node.op == "call_function"]
        layers = [module_path(node) or node.name for node, kernel in self._kernels.items() if kernel.parameters]
        others = [name for node in nodes for name in (module_path(node), node.name)]
        check_globs("skip", self._skip, layers, kind="module or operator", others=others)

    def _place_compute(self, node: fx.Node, kernel: Kernel, rule: OperatorRule) -> None:
        problem = self._problem(node)
        if problem is not None:
            self._result.refusals.append(problem)
            return
        if self._scales(node, rule) == "dynamic":
            self._result.sites.append(Site(node, kernel, rule, None, dynamic=True))
            return
        end = self._end(node, rule)
        if rule.output == "never" or (rule.output == "wanted" and not self._only_integers[end]):
            self._accept(Site(node, kernel, rule, None))
        else:
            self._accept(Site(node, kernel, rule, end))

    def _place_follower(self, node: fx.Node, kernel: Kernel, rule: OperatorRule) -> None:
        operands = [operand for operand in kernel.operands if constant(operand, self._gm) is None]
        ready = [operand in self._result.integers for operand in operands]
        if not any(ready):
            return
        problem = self._problem(node)
        if problem is None and kernel.name == "hardsigmoid" and self._has_given_range(kernel.operands[0]):
            problem = Refusal(node.name, "the range of its operand cannot be chosen for it")
        end = node if rule.role in ("same_scale", "move") else self._end(node, rule)
        if problem is None and not all(ready) and not self._only_integers[end]:
            reason = "some of its operands are float, and float operators read its result"
            problem = Refusal(node.name, reason)
        if problem is not None:
            self._result.refusals.append(problem)
            return
        self._accept(Site(node, kernel, rule, end))

    def _accept(self, site: Site) -> None:
        result = self._result
        result.sites.append(site)
        for operand in dict.fromkeys(site.kernel.operands):
            if operand not in result.integers:
                result.reads.setdefault(operand, []).append(site.node)
        if site.end is None:
            return
        shares = site.rule.role in ("same_scale", "move")
        result.integers[site.end] = site.kernel.operands[0] if shares else None
        if site.end is not site.node and not self._target.activation.symmetric:
            limits = clamp_range(site.end)
            assert limits is not None  # only clamps are absorbed where the range is asymmetric
            result.dropped[site.end] = limits

    def _has_given_range(self, value: fx.Node) -> bool:
        """Whether the scale of a value follows from something else than what was observed of it."""
        root = self._result.root(value)
        kernel = self._kernels.get(root)
        return root in self._result.dropped or (kernel is not None and kernel.name == "hardsigmoid")

    def _place_reads(self) -> None:
        """Let float operators that may do so read what was quantized for others."""
        for node, kernel in self._kernels.items():
            rule = self._target.rule(kernel.name)
            if rule is None or rule.role != "read":
                continue
            for operand in dict.fromkeys(kernel.operands):
                readers = self._result.reads.get(operand)
                if readers is not None and constant(operand, self._gm) is None:
                    readers.append(node)

    def _refuse_float(self, node: fx.Node, kernel: Kernel, rule: OperatorRule | None) -> None:
        if rule is not None or not any(_floats(node)):  # of a maximum the place is none
            return
        chained = any(operand in self._result.integers for operand in kernel.operands)
        absorbed = node in self._result.integers
        if node in HEAVY or (chained and not absorbed):
            reason = f"`{short_name(node)}` has no integer kernel on {self._target.name}"
            self._result.refusals.append(Refusal(node.name, reason, reason.replace("`", "")))

    def _end(self, node: fx.Node, rule: OperatorRule) -> fx.Node:
        """Return the activation that `node` absorbs, or `node`."""
        if len(node.users) != 1:
            return node
        activation = next(iter(node.users))
        if plain_name(activation) not in rule.absorbs or self._problem(activation) is not None:
            return node
        if self._target.activation.symmetric:
            return activation
        limits = clamp_range(activation)
        # the integer range starts at 0 and ends at the limit exactly; a range on both sides of 0 would not
        return activation if limits is not None and limits[0] == 0.0 < limits[1] else node

    def _reads_integers(self, user: fx.Node, value: fx.Node) -> bool:
        """Whether `user` takes `value` as an operand of an integer kernel, whatever else is placed."""
        kernel = self._kernels.get(user)
        rule = self._target.rule(kernel.name) if kernel is not None else None
        if kernel is None or rule is None or value not in kernel.operands or self._problem(user) is not None:
            return False
        if rule.role == "compute" and self._scales(user, rule) == "dynamic":
            return False
        if rule.role == "compute":
            return kernel.layer is None or value not in (kernel.layer.weight, kernel.layer.bias)
        return self._only_integers[user]  # a follower of integers, which it is placed behind

    def _problem(self, node: fx.Node) -> Refusal | None:
        """Return why `node` has to stay float."""
        if node not in self._problems:
            reason, kind = self._reason(node, self._kernels[node])
            self._problems[node] = Refusal(node.name, reason, kind) if reason else None
        return self._problems[node]

    def _reason(self, node: fx.Node, kernel: Kernel) -> tuple[str, str]:
        """Return (reason, reason without particulars), empty if there is none."""
        if reasons := why_skipped(node, self._skip):
            return reasons
        chosen, rule = self._choice.get(node), self._target.rule(kernel.name)
        if isinstance(chosen, Refusal):
            return str(chosen.reason), chosen.kind
        if rule is not None and rule.role == "compute" and self._scales(node, rule) not in rule.scales:
            return f"no kernel of {self._target.name} takes it with {self._default} scales", ""
        if kernel.problem:
            return kernel.problem, ""
        if not kernel.operands:
            return "it has no tensor operand", ""
        for value in (*kernel.operands, node):
            if not _is_float(value):
                return f"`{value.name}` is {_dtype(value)}, not float32", "a value is not float32"
            if _is_empty(value):
                return f"`{value.name}` has no elements", "a value has no elements"
            if reason := self._written(value):
                return reason, "written in place"
        for role, parameter in kernel.parameters.items():
            if parameter.target is DEQUANTIZE:
                return "it is quantized already", ""
            if constant(parameter, self._gm) is None:
                return self._unweighted.why_computed(role, parameter), ""
            if not _is_float(parameter):
                return f"its {role} is {_dtype(parameter)}, not float32", f"its {role} is not float32"
            if reason := self._written(parameter):
                return reason, "written in place"
            if not all_finite(constant(parameter, self._gm)):  # type: ignore[arg-type]
                return f"its {role} holds NaN or infinite values", ""
        return "", ""

    def _scales(self, node: fx.Node, rule: OperatorRule) -> Scales:
        chosen = self._choice.get(node)
        return chosen if isinstance(chosen, str) else self._default or rule.scales[0]

    def _written(self, value: fx.Node) -> str:
        writers = self._storages.writes(value)
        return f"`{value.name}` shares memory with what `{writers[0].name}` writes in place" if writers else ""


def _is_float(node: fx.Node) -> bool:
    return all(_floats(node))


def _floats(node: fx.Node) -> Iterator[bool]:
    return (isinstance(leaf, torch.Tensor) and leaf.dtype is torch.float32 for leaf in _leaves(node))


def _is_empty(node: fx.Node) -> bool:
    return any(isinstance(size, int) and size == 0 for leaf in _leaves(node) for size in leaf.shape)


def _leaves(node: fx.Node) -> Sequence[Any]:
    value = node.meta.get("val")
    return value if isinstance(value, list | tuple) else [value]


def _dtype(node: fx.Node) -> str:
    value = node.meta.get("val")
    return str(value.dtype).removeprefix("torch.") if isinstance(value, torch.Tensor) else "no tensor"
