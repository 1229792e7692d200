"""Convolutions and linear layers as calls with a stored weight, whatever operator and layout they use.

operator            weight                  features of the output
linear              (out, in)               last axis
addmm, mm, matmul   (in, out)               last axis
convN               (out, in/groups, *k)    axis before the N spatial ones
conv_transposeN     (in, out/groups, *k)    axis before the N spatial ones
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx

from graphopt.ir.graph import arguments, constant, tensor_attribute
from graphopt.ir.regions import inside, regions

aten = torch.ops.aten
LayerKind = Literal["linear", "matmul", "conv", "transposed conv"]

# operator -> (kind, input, weight, bias), the last three by the names of the operator's schema
_OPERATORS: Mapping[Any, tuple[LayerKind, str, str, str]] = {
    aten.linear.default: ("linear", "input", "weight", "bias"),
    aten.addmm.default: ("matmul", "mat1", "mat2", "self"),
    aten.mm.default: ("matmul", "self", "mat2", ""),
    aten.matmul.default: ("matmul", "self", "other", ""),
    aten.conv1d.default: ("conv", "input", "weight", "bias"),
    aten.conv2d.default: ("conv", "input", "weight", "bias"),
    aten.conv3d.default: ("conv", "input", "weight", "bias"),
    aten.conv1d.padding: ("conv", "input", "weight", "bias"),
    aten.conv2d.padding: ("conv", "input", "weight", "bias"),
    aten.conv3d.padding: ("conv", "input", "weight", "bias"),
    aten.conv_transpose1d.default: ("transposed conv", "input", "weight", "bias"),
    aten.conv_transpose2d.input: ("transposed conv", "input", "weight", "bias"),
    aten.conv_transpose3d.input: ("transposed conv", "input", "weight", "bias"),
    aten.convolution.default: ("conv", "input", "weight", "bias"),
}

IN_A_REGION = "its layers run inside a region"


@dataclass(frozen=True, eq=False)
class WeightedCall:
    """One call of a convolution or linear layer.

    Attributes:
        node: the call.
        kind: which layout the weight has, see the module's table.
        input: the value it is applied to.
        weight: its weight; of a `weighted_call` the read of a stored tensor.
        bias: its bias likewise, None where it has none.
        input_argument: name of the input in the operator's schema.
        weight_argument: name of the weight likewise.
        bias_argument: likewise; "" where the operator cannot take a bias.
        groups: convolution groups, 1 for linear layers.
    """

    node: fx.Node
    kind: LayerKind
    input: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    input_argument: str
    weight_argument: str
    bias_argument: str
    groups: int

    @property
    def weight_name(self) -> str:
        """Qualified name of the weight."""
        return str(self.weight.target)

    @property
    def input_axis(self) -> int:
        """Axis of the input that the weight contracts over."""
        return int(self.input.meta["val"].dim()) - self._features_from_end

    @property
    def output_axis(self) -> int:
        """Axis of the output that the weight produces."""
        return int(self.node.meta["val"].dim()) - self._features_from_end

    @property
    def _features_from_end(self) -> int:
        return len(self.kernel) + 1

    @property
    def kernel(self) -> tuple[int, ...]:
        """Size of a convolution's kernel along each spatial axis, () for linear layers."""
        return tuple(int(size) for size in self.weight.meta["val"].shape[2:]) if "conv" in self.kind else ()

    @property
    def fan_in(self) -> int:
        """Number of values that an output sums over: the inputs of one group, at every tap of the kernel."""
        return self.in_features // self.groups * math.prod(self.kernel)

    @property
    def weight_axis(self) -> int:
        """Axis of the weight that runs over output features, over those of one group where it is transposed."""
        return 1 if self.kind in ("matmul", "transposed conv") else 0

    @property
    def out_features(self) -> int:
        """Number of output channels or features."""
        return int(self.node.meta["val"].shape[self.output_axis])

    @property
    def in_features(self) -> int:
        """Number of input channels or features."""
        return int(self.input.meta["val"].shape[self.input_axis])

    @property
    def scaled(self) -> bool:
        """Whether an `addmm` multiplies its product or its bias with a factor."""
        given = arguments(self.node, ())
        return any(given.get(factor, 1) != 1 for factor in ("alpha", "beta"))

    @property
    def strides(self) -> tuple[int, ...]:
        """Step of a convolution along each spatial axis, () for linear layers."""
        stride = arguments(self.node, ()).get("stride", ())
        steps = [stride] if isinstance(stride, int) else list(stride)
        return tuple(steps * len(self.kernel) if len(steps) == 1 else steps)

    @property
    def zero_padded(self) -> bool:
        """Whether a convolution sees zeros around its input."""
        padding = arguments(self.node, ()).get("padding", 0)
        if isinstance(padding, str):
            return padding == "same" and any(size != 1 for size in self.kernel)
        return any(pad != 0 for pad in ([padding] if isinstance(padding, int) else padding))


def is_layer(node: fx.Node) -> bool:
    """Tell whether `node` is a convolution or linear layer, wherever its weight comes from."""
    if node.op != "call_function" or node.target not in _OPERATORS:
        return False
    return node.target not in (aten.mm.default, aten.matmul.default)  # products of two values as often as layers


def regions_with_layers(gm: fx.GraphModule) -> list[fx.Node]:
    """List the regions (`torch.cond`, loops, autocast) inside which layers run, where no layer-wise pass reaches."""
    return [found.node for found in regions(gm) if any(is_layer(node) for node in inside(found))]


def layer_call(node: fx.Node, gm: fx.GraphModule) -> WeightedCall | None:
    """Describe `node` if it is a convolution or linear layer, wherever its weight and bias come from.

    A product of two values is a layer where the second is a stored matrix.
    """
    known = _OPERATORS.get(node.target) if node.op == "call_function" else None
    if known is None:
        return None
    kind, input_name, weight_name, bias_name = known
    given = arguments(node, ())
    source, weight, bias = given[input_name], given[weight_name], given.get(bias_name)
    if not isinstance(source, fx.Node) or not isinstance(weight, fx.Node):
        return None
    if not is_layer(node) and (constant(weight, gm) is None or weight.meta["val"].dim() != 2):
        return None
    if given.get("transposed") is True:
        kind = "transposed conv"
    groups = int(given.get("groups", 1))
    return WeightedCall(node, kind, source, weight, bias, input_name, weight_name, bias_name, groups)


def weighted_call(node: fx.Node, gm: fx.GraphModule) -> WeightedCall | None:
    """Describe `node` if it is a convolution or linear layer with a stored floating-point weight.

    A bias that is computed, an `addmm` with factors, and products whose stored operand is not a matrix are not.
    """
    call = layer_call(node, gm)
    tensor = None if call is None else constant(call.weight, gm)
    if call is None or tensor is None or not tensor.is_floating_point() or call.input.op == "get_attr":
        return None
    if call.bias is not None and (constant(call.bias, gm) is None or call.bias.meta["val"].dim() != 1):
        return None
    least = len(call.kernel) + 1  # axes of an input, that of the samples left out
    return None if call.scaled or tensor.dim() < 2 or call.input.meta["val"].dim() < least else call


def other_users(call: WeightedCall, gm: fx.GraphModule) -> list[fx.Node]:
    """List who else reads the weight of `call`."""
    return [user for user in uses(gm, call.weight_name) if user is not call.node]


def set_argument(node: fx.Node, name: str, value: fx.Node) -> None:
    """Set the argument called `name` in the operator's schema, given or not so far."""
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    position = names.index(name)
    if position < len(node.args):
        node.update_arg(position, value)
    elif position == len(node.args) and name not in node.kwargs:
        node.args = (*node.args, value)
    else:
        node.update_kwarg(name, value)


def uses(gm: fx.GraphModule, name: str) -> list[fx.Node]:
    """List the calls that read the tensor called `name`, or another name it is tied to, in graph order."""
    tensor = tensor_attribute(gm, name)
    reads = [node for node in gm.graph.find_nodes(op="get_attr", sort=False) if constant(node, gm) is tensor]
    return sorted({user for read in reads for user in read.users})
