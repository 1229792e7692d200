"""Run a program from a runtime's own integers, so that errors do not add up from one quantization to the next.

Two correct runtimes may round a value that lies between two integers differently; whatever comes after then differs
too, by more with every layer. So a program is cut at its quantizations: each piece starts from the integers the
runtime computed, and must arrive at the integers the runtime computed next, to one step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphopt.backends.onnx_execution.agreement import WORSE_THAN_TORCH, half_of_the_digits, relative_error
from graphopt.ir.aliasing import shared_inputs, written_inputs
from graphopt.ir.devices import OUT_OF_MEMORY
from graphopt.ir.operators import MOVES, SILENT_VIEWS
from graphopt.ir.program import Program
from graphopt.ir.torch_internals import pytree
from graphopt.ir.walker import Walker
from graphopt.quantization.ops import DEQUANTIZE, DYNAMIC_QUANTIZE, QUANTIZE
from graphopt.quantization.recurrent import DYNAMIC_LSTM, lstm
from graphopt.targets.backend import Array

Tensors = tuple[torch.Tensor, ...]
# By quantization: its integers, of a dynamic one their scale and zero point too. By LSTM on integers: its results,
# which depend on integers of every step that no one sees.
Codes = Mapping[str, Tensors]

_MOST_KEPT = 1 << 27  # bytes of dequantized weights
_SHAKEN_UNITS = 64


@dataclass(frozen=True, slots=True)
class Deviation:
    """How far a runtime's integers are from those the program computes out of the runtime's previous ones.

    Attributes:
        node: the program's quantize node.
        largest: largest difference in steps.
        share: share of the elements that differ at all.
    """

    node: str
    largest: int
    share: float


@dataclass(frozen=True, slots=True)
class Drift:
    """How far the results of an LSTM on integers are from those of the same weights without rounding what they read.

    Attributes:
        node: the program's node.
        error: that of the runtime's, relative to the largest value.
        allowed: what rounding explains: a few times what it does to the program's own.
    """

    node: str
    error: float
    allowed: float


class Replay(Walker):
    """Runs a program on flat tensors, taking the runtime's integers over after comparing with them."""

    def __init__(
        self, program: Program, *, exact: bool = False, noise: torch.Generator | None = None, everywhere: bool = False
    ) -> None:
        """Prepare to run.

        Args:
            program: what to run.
            exact: compute every float32 value in float64.
            noise: change the last digits of what is computed out of a runtime's integers, and of what is rounded to 16
                bits: values that are equal by these then come in either order.
            everywhere: change those of all that is computed, by as many as the sum of a thousand terms may lose.
        """
        super().__init__(program)
        self._codes: Codes = {}
        self._exact = exact
        self._noise = noise
        self._everywhere = everywhere
        self._weights: dict[fx.Node, torch.Tensor] = {}
        self.steps: list[Deviation] = []
        self.drifts: list[Drift] = []

    def outputs(self, inputs: Tensors, codes: Codes | None = None) -> Tensors:
        """Return the flat outputs; `steps` and `drifts` then say how far each quantization and LSTM was off.

        Args:
            inputs: flat inputs.
            codes: what the runtime has by quantization of the original program. Nodes without are computed.
        """
        self.steps, self.drifts = [], []
        self._codes = codes or {}
        result = self.run([self._widened(tensor) for tensor in inputs])
        # a parameter that is returned as it is would still ask for gradients
        return tuple(leaf.detach() for leaf in pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor))

    def read(self, node: fx.Node) -> Any:
        """Return a tensor, in float64 where that is computed in."""
        return self._widened(super().read(node))

    def call(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one call; weights are dequantized once for all runs, as many as fit in `_MOST_KEPT`."""
        if node in self._weights:
            return self._weights[node]
        if node.target is torch.ops.aten._assert_tensor_metadata.default:
            return None  # it asserts the dtype of the trace, which an exact run widens
        recurrent = node.target is DYNAMIC_LSTM
        result: Any = lstm(*args, read=_unrounded) if recurrent and self._exact else super().call(node, args, kwargs)
        if node.target is DEQUANTIZE and _is_stored(node.args[0]):
            result = self._widened(result)
            if sum(known.nbytes for known in self._weights.values()) + result.nbytes <= _MOST_KEPT:
                self._weights[node] = result
            return result
        if node.target is DEQUANTIZE and self._noise is not None:
            return perturbed(result, self._noise)
        codes = self._codes.get(node.name)
        if codes is not None and recurrent:
            self.drifts.append(_drift(node.name, lstm(*args, read=_unrounded), result, codes))
            return self._widened(codes)
        if codes is not None:
            dynamic = isinstance(result, tuple)
            self.steps.append((_dynamic_step if dynamic else _step)(node.name, result if dynamic else (result,), codes))
            return self._widened(codes) if dynamic else codes[0]
        if self._noise is not None and node not in MOVES:
            if _is_half(result):
                return perturbed(result, self._noise, units=4)
            if self._everywhere and not shared_inputs(node) and not written_inputs(node) and node not in SILENT_VIEWS:
                return self._shaken(result, self._noise)
        return self._widened(result)

    def _shaken(self, value: Any, noise: torch.Generator) -> Any:
        if isinstance(value, tuple | list):
            return type(value)(self._shaken(item, noise) for item in value)
        return perturbed(value, noise, units=_SHAKEN_UNITS) if isinstance(value, torch.Tensor) else value

    def _widened(self, value: Any) -> Any:
        if self._exact and (_is_half(value) or (isinstance(value, torch.Tensor) and value.dtype is torch.float32)):
            return value.double()
        if isinstance(value, tuple | list):
            return type(value)(self._widened(item) for item in value)
        return value


def quantize_nodes(program: Program) -> list[str]:
    """List the quantizations of a program whose integers a runtime can be asked for."""
    return [node.name for node in program.graph.nodes if node.target in (QUANTIZE, DYNAMIC_QUANTIZE, DYNAMIC_LSTM)]


def _is_stored(argument: object) -> bool:
    if isinstance(argument, fx.Node) and argument.target is torch.ops.graphopt.unpack.default:
        argument = argument.args[0]
    return isinstance(argument, fx.Node) and argument.op == "get_attr"


def _step(source: str, computed: Tensors, codes: Tensors) -> Deviation:
    (mine,), (found,) = computed, codes
    if torch.equal(mine, found):
        return Deviation(source, 0, 0.0)
    wide = torch.int64 if mine.dtype is torch.int32 else torch.int16
    difference = mine.to(wide).sub_(found).abs_()
    return Deviation(source, int(difference.max()), int(difference.count_nonzero()) / difference.numel())


def _dynamic_step(source: str, computed: Tensors, codes: Tensors) -> Deviation:
    """Compare what two sets of integers stand for, in steps of the runtime's scale: their scales need not be equal."""
    if computed[0].numel() == 0:
        return Deviation(source, 0, 0.0)
    (mine, own_scale, own_zero), (found, scale, zero) = (
        [part.double() for part in parts] for parts in (computed, codes)
    )
    steps = ((mine - own_zero) * (own_scale / scale) - (found - zero)).abs_().round_()
    return Deviation(source, int(steps.max()), int(steps.count_nonzero()) / steps.numel())


def _drift(source: str, exact: Tensors, computed: Tensors, codes: Tensors) -> Drift:
    own, found = (
        max(relative_error(want, have) for want, have in zip(exact, results, strict=True))
        for results in (computed, codes)
    )
    return Drift(source, found, WORSE_THAN_TORCH * own + half_of_the_digits(torch.float32))


def _unrounded(value: torch.Tensor) -> torch.Tensor:
    return value


def _is_half(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype in (torch.float16, torch.bfloat16)


def perturbed(tensor: torch.Tensor, generator: torch.Generator, *, units: int = 8) -> torch.Tensor:
    """Change each number by up to so many units in the last place."""
    if not tensor.is_floating_point():
        return tensor
    noise = torch.rand(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.dtype) - 0.5
    return tensor * (1 + 2 * units * torch.finfo(tensor.dtype).eps * noise)


def takes(program: Program, arrays: Sequence[Array]) -> bool:
    """Whether a program runs on inputs."""
    try:
        Replay(program).outputs(tuple(torch.from_numpy(array) for array in arrays))
    except OUT_OF_MEMORY:
        raise
    except Exception:  # an operator may raise anything where a size or a value does not suit it
        return False
    return True
