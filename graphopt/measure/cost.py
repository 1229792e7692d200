"""What a program costs: parameters, floating-point operations and bytes of its tensors."""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import fx
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from graphopt.ir.graph import arguments
from graphopt.ir.operators import (
    ADAPTIVE_AVERAGE_POOLS,
    ATTENTION,
    AVERAGE_POOLS,
    CONVOLUTIONS,
    MAX_POOLS,
    NORMALISATIONS,
    RECURRENT_LAYERS,
    SOFTMAXES,
    Family,
)
from graphopt.ir.ownership import memory_key, storage_key
from graphopt.ir.program import Program
from graphopt.ir.regions import Region, region
from graphopt.ir.torch_internals import (
    FakeTensorMode,
    OperatorBase,
    OpOverload,
    ShapeEnv,
    is_composite,
    optimization_hint,
    pytree,
)
from graphopt.measure.flop_formulas import FORMULAS
from graphopt.quantization.ops import DEQUANTIZE, QUANTIZE, UNPACK


@dataclass(frozen=True, slots=True)
class Cost:
    """Static cost of a program.

    Attributes:
        parameters: elements that were learned, trained or frozen, each once however many names it has and whatever it
            is stored as: floating, half precision or complex (one element, as torch counts it) in a parameter, integers
            that are dequantized, and int8 or uint8 buffers, packed ones by the elements they are packed in. Not
            statistics, scales, zero points and masks.
        flops: floating-point (or integer) operations of convolutions, matrix products and distances for one sample, a
            multiply-add counted as two. A size that depends on data counts as 1; of branches the dearer one counts,
            and one round of a loop that data end.
        bytes: bytes of all parameters, buffers and constants, each storage once.
    """

    parameters: int
    flops: int
    bytes: int


# programs are values, so what one costs never changes
_known: weakref.WeakKeyDictionary[Program, Cost] = weakref.WeakKeyDictionary()


def cost(program: Program) -> Cost:
    """Measure `program` without running it: operators see shapes only."""
    if program not in _known:
        _known[program] = _measure(program)
    return _known[program]


def _measure(program: Program) -> Cost:
    gm = program.graph_module
    named = dict([*gm.named_parameters(), *gm.named_buffers()])
    return Cost(
        parameters=sum(tensor.numel() for tensor in weights(program).values()),
        flops=_flops(program),
        bytes=_bytes(named.values()),
    )


def weights(program: Program) -> dict[tuple[Any, ...], torch.Tensor]:
    """Return what is learned, by memory key: parameters, and buffers of small integers that are none of the others."""
    gm = program.graph_module
    integers, scaling = set(), set()
    for node in program.graph.nodes:
        if node.target in (QUANTIZE, DEQUANTIZE):
            first, *others = (_stored(argument) for argument in node.args[:3] if isinstance(argument, fx.Node))
            integers.add(first)
            scaling.update(others)

    def is_weight(name: str, tensor: torch.Tensor) -> bool:
        if isinstance(tensor, torch.nn.Parameter) or name in integers:
            return True
        small = tensor.dtype in (torch.int8, torch.uint8) and tensor.dim() > 0
        return small and name not in scaling and not _is_mask(tensor)

    named = (*gm.named_parameters(), *gm.named_buffers())
    return {memory_key(tensor): tensor for name, tensor in named if is_weight(name, tensor)}


def _stored(node: fx.Node) -> Any:
    """Return the name of a stored tensor, also where it is packed and the node unpacks it."""
    source = node.args[0] if node.target is UNPACK else node
    return source.target if isinstance(source, fx.Node) else None


def _is_mask(tensor: torch.Tensor) -> bool:
    """Tell whether a tensor holds what models stored of truth values before torch had a type for them."""
    return tensor.dtype == torch.uint8 and not bool((tensor > 1).any())


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Count each storage once, and of a view into a larger one only what it spans."""
    spans: dict[Any, int] = {}
    wholes: dict[Any, int] = {}
    for tensor in {id(one): one for one in tensors}.values():
        key, own = storage_key(tensor), tensor.numel() * tensor.element_size()
        spans[key] = spans.get(key, 0) + own
        wholes[key] = tensor.untyped_storage().nbytes() if len(key) > 1 else own
    return sum(min(size, wholes[key]) for key, size in spans.items())


def _flops(program: Program) -> int:
    """Count call by call on the recorded shapes, so that what did not change is not counted again."""
    total = sum(node_flops(node) for node in program.graph.nodes if node.op == "call_function")
    values = (node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder")
    tensors = [value for value in values if isinstance(value, torch.Tensor)]  # others may be flags
    sizes = [_size(value.shape[0]) for spec, value in zip(program.inputs, tensors, strict=True) if spec.batched]
    return total // (sizes[0] if sizes else program.batch_size or 1)


_LAYERS = CONVOLUTIONS | Family("linear")  # of all calls most, and torch's counter takes milliseconds for each
_VECTOR_PRODUCTS = Family("linalg_vecdot")
_WITHOUT_PRODUCTS = NORMALISATIONS | SOFTMAXES | MAX_POOLS | AVERAGE_POOLS | ADAPTIVE_AVERAGE_POOLS
_FREE = {torch.Tag.pointwise, torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output}


def node_flops(node: fx.Node) -> int:
    """Count the operations of one call on its recorded shapes, for all samples of the example together."""
    if not isinstance(node.target, OperatorBase):
        return 0  # arithmetic on sizes
    owner = node.graph.owning_module
    found = region(node, owner) if owner is not None else None
    if found is not None:
        return _region_flops(found)
    if isinstance(node.target, OpOverload) and _is_free(node.target):
        return 0
    if node in _LAYERS:
        return _layer_flops(node)
    if node in RECURRENT_LAYERS:  # torch's counter does not know their kernels
        return _recurrent_flops(node)
    if node in ATTENTION:
        return _attention_flops(node)
    if node in _VECTOR_PRODUCTS:  # which torch writes as a product and a sum
        return 2 * math.prod(np.broadcast_shapes(*(_described(value).shape for value in node.args[:2])))
    if not any(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves(node.meta.get("val"))):
        return 0
    args, kwargs = _described(node.args), tuple((name, _described(value)) for name, value in node.kwargs.items())
    if any(argument.op == "get_attr" and "val" not in argument.meta for argument in node.all_input_nodes):
        return _counted(node.target, args, kwargs)  # branches are not to be kept alive
    return _remembered(node.target, args, kwargs)


@functools.cache
def _is_free(operator: OpOverload[..., Any]) -> bool:
    """Whether calls of an operator count nothing: no formula is known for it, and it is not made of others."""
    if operator.is_view or operator in _WITHOUT_PRODUCTS or _FREE.intersection(operator.tags):
        return True
    known = operator._overloadpacket in FORMULAS or operator._overloadpacket in flop_registry
    return not known and not is_composite(operator)


def _layer_flops(node: fx.Node) -> int:
    """Count every weight of an output channel once for each element of the result, or of the input in its features."""
    given = arguments(node, ("input", "weight"))
    weight = _described(given["weight"]).shape
    if node in CONVOLUTIONS:
        return int(2 * math.prod(_described(node).shape) * math.prod(weight[1:]))
    return int(2 * math.prod(_described(given["input"]).shape) * math.prod(weight[:-1]))


def _region_flops(found: Region) -> int:
    bodies = [sum(node_flops(node) for node in body.graph.nodes if node.op == "call_function") for body in found.bodies]
    if found.form == "branches":
        return max(bodies)
    rounds = _described(found.operands[found.state]).shape[0] if found.sequences else 1
    return rounds * sum(bodies)


def _recurrent_flops(node: fx.Node) -> int:
    """Count every weight matrix once for each step of each sample."""
    weights = _described(arguments(node, ("params",))["params"])
    rows = _described(node.args[0]).shape[:-1]
    return sum(2 * math.prod((*rows, *weight.shape)) for weight in weights if len(weight.shape) == 2)


def _attention_flops(node: fx.Node) -> int:
    """Count query times key and scores times value: torch's counter misses the CPU's fused kernel (torch 2.13)."""
    query, key, value = (_described(node.args[position]).shape for position in range(3))
    scores = math.prod(query[:-1]) * key[-2]
    return int(2 * scores * (query[-1] + value[-1]))


@dataclass(frozen=True, slots=True)
class _Tensor:
    """What counting needs to know of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def _described(value: Any) -> Any:
    """Return an argument with sizes for symbols, tensors as their description, and lists as tuples."""
    if isinstance(value, fx.Node):
        if "val" not in value.meta:
            return getattr(value.graph.owning_module, str(value.target))
        return _described(value.meta["val"])
    if isinstance(value, torch.Tensor):
        return _Tensor(tuple(_size(size) for size in value.shape), value.dtype)
    if isinstance(value, torch.SymInt):
        return _size(value)
    if isinstance(value, list | tuple):
        return tuple(_described(item) for item in value)
    return value


def _size(size: int | torch.SymInt) -> int:
    return int(optimization_hint(size, fallback=1))  # of data: 1, or what the model has checked that it is at least


def _counted(target: Any, args: tuple[Any, ...], kwargs: tuple[tuple[str, Any], ...]) -> int:
    # a mode of its own: in the graph's, counting with plain sizes would fix its dynamic axes to them
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)

    def made(value: Any) -> Any:
        if isinstance(value, _Tensor):
            return torch.empty(value.shape, dtype=value.dtype)
        return [made(item) for item in value] if isinstance(value, tuple) else value

    with mode, FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter, torch.no_grad():
        target(*(made(value) for value in args), **{name: made(value) for name, value in kwargs})
    return int(counter.get_total_flops())


_remembered = functools.lru_cache(maxsize=4096)(_counted)
