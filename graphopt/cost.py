"""What a program costs: parameters, floating-point operations and bytes of its tensors."""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from graphopt.program import Program


@dataclass(frozen=True, slots=True)
class Cost:
    """Static cost of a program.

    Attributes:
        parameters: elements of weights and biases, in whatever precision, each tensor once.
        flops: floating-point (or integer) operations of convolutions and matrix products for one sample, a
            multiply-add counted as two.
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
    tensors = _distinct_tensors(program)
    return Cost(
        parameters=sum(t.numel() for name, t in tensors.items() if _is_weight(name, t)),
        flops=_flops(program),
        bytes=sum(t.numel() * t.element_size() for t in tensors.values()),
    )


def _distinct_tensors(program: Program) -> dict[str, torch.Tensor]:
    """Return the tensors the graph reads by name, tied ones under their first name."""
    gm = program.graph_module
    found: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    named = [*gm.named_parameters(), *gm.named_buffers()]
    for name, tensor in named:
        if id(tensor) not in seen:
            seen.add(id(tensor))
            found[name] = tensor
    return found


# Buffers that describe statistics or quantization, not learned weights.
_NOT_WEIGHTS = ("running_mean", "running_var", "num_batches_tracked", "scale", "zero_point")


def _is_weight(name: str, tensor: torch.Tensor) -> bool:
    if isinstance(tensor, torch.nn.Parameter):
        return True
    # Weights stored as integers are buffers: only floating tensors can be parameters.
    return (
        tensor.dtype in (torch.int8, torch.uint8) and name.rpartition(".")[2] not in _NOT_WEIGHTS and tensor.dim() > 0
    )


def _flops(program: Program) -> int:
    examples = program.flat_examples()
    # a mode of its own: in the graph's, counting with plain sizes would fix its dynamic axes to them
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode, FlopCounterMode(display=False) as counter, torch.no_grad():
        # detached: the counter runs the branches of torch.cond with gradients on, and trips over weights that have them
        held = program.state_dict()
        weights: dict[str, torch.Tensor] = {name: mode.from_tensor(tensor.detach()) for name, tensor in held.items()}
        args, kwargs = program.unflatten([mode.from_tensor(example) for example in examples])
        torch.func.functional_call(program.graph_module, weights, args, dict(kwargs), strict=False)
    samples = examples[0].shape[0] if program.inputs[0].batched else 1
    return int(counter.get_total_flops()) // samples
