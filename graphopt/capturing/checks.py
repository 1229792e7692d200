"""Whether a captured program is the model: same outputs, and no memory of earlier calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn

from graphopt.errors import CaptureError, ExampleError, first_line, foreign_code
from graphopt.ir.aliasing import Storages
from graphopt.ir.buffers import with_its_buffers
from graphopt.ir.devices import OUT_OF_MEMORY
from graphopt.ir.finite import computable
from graphopt.ir.graph import arguments
from graphopt.ir.operators import short_name
from graphopt.ir.program import Program
from graphopt.ir.provenance import user_line
from graphopt.ir.regions import graph_modules
from graphopt.ir.torch_internals import pytree
from graphopt.ir.walker import Walker

# Captured and original outputs come from the same kernels in the same order: on a CPU they were equal in every model of
# the tests, of any precision. A device may sum in another order, or take another algorithm, from call to call. The
# tolerance is 1e-4 in single precision, and in what is narrower too.
_CAPTURE_ULPS = 840
_DOUBLES = {torch.float64, torch.complex128}


def run_model(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run the user's model on copies of the inputs; the model is left as it was.

    Raises:
        ExampleError: it fails.
        CaptureError: it returns no tensor.
    """
    args, kwargs = pytree.tree_map_only(torch.Tensor, torch.clone, (args, kwargs))

    def failed(reason: str, _: BaseException) -> ExampleError:
        shapes = [tuple(leaf.shape) for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        return ExampleError(
            f"The model itself fails on the example inputs (shapes {shapes}): {reason}. Check the input shapes and "
            "dtypes (`--input name=1x3x224x224:float32`).",
            reason,
        )

    with foreign_code(failed), torch.random.fork_rng(devices=[]), with_its_buffers(model):
        torch.manual_seed(0)
        result = pytree.tree_map_only(torch.Tensor, torch.clone, model(*args, **kwargs))
    leaves = pytree.tree_leaves(result)
    cache = next((type(leaf).__name__ for leaf in leaves if type(leaf).__name__.endswith("Cache")), None)
    if cache:  # a registered class would have been taken apart
        raise CaptureError(
            f"The model returns a {cache}, which no program can return. Set `model.config.use_cache = False` (a "
            "transformers model: use_cache=False), or wrap the model so that its forward returns tensors only."
        )
    if not any(isinstance(leaf, torch.Tensor) for leaf in leaves):
        raise CaptureError(
            f"The model returns no tensor, but a {type(result).__name__}. Let its forward return a tensor, or a tuple, "
            "list or dict of them; another class is registered with torch.export.register_dataclass."
        )
    return result


def check_equal(program: Program, expected: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Compare the captured outputs with the model's: a trace may silently keep the wrong branch.

    Raises:
        CaptureError: they differ on the examples.
    """
    worst = _disagreement(program, expected, args, kwargs)
    if worst:
        raise CaptureError(
            f"The captured program does not compute what the model does: {worst}. The model is random in eval mode, or "
            "branches in Python on something that changes between calls."
        )


def check_recorded(program: Program) -> None:
    """Run a program on its examples and compare the types of its values with what its graph records, as a file says it.

    Passes believe the record: a cast that it calls one to the same type would go.

    Raises:
        CaptureError: one is of another type.
    """
    for spec, tensor in zip(program.inputs, program.flat_examples(), strict=True):
        if spec.dtype != tensor.dtype:
            raise _misrecorded(spec.name, spec.dtype, tensor.dtype)
    _TypesCompared(program).run(program.flat_examples())


class _TypesCompared(Walker):
    """Compares what each call and read gives with what is recorded of it."""

    def read(self, node: fx.Node) -> Any:
        """Return what a node reads."""
        return self._compared(node, super().read(node))

    def call(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one call."""
        return self._compared(node, super().call(node, args, kwargs))

    def _compared(self, node: fx.Node, found: Any) -> Any:
        recorded = pytree.tree_leaves(node.meta.get("val"))
        for want, got in zip(recorded, pytree.tree_leaves(found), strict=False):
            if isinstance(want, torch.Tensor) and isinstance(got, torch.Tensor) and want.dtype != got.dtype:
                raise _misrecorded(node.name, want.dtype, got.dtype)
        return found


def _misrecorded(name: str, recorded: torch.dtype, found: torch.dtype) -> CaptureError:
    return CaptureError(f"The program records its value `{name}` as {recorded}, and it is {found}. Export it again.")


def check_repeatable(program: Program, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuse a program whose outputs are no function of its inputs.

    Raises:
        CaptureError: they depend on random numbers, or on what earlier calls left in its buffers.
    """
    _check_random(program, args, kwargs)
    storages = Storages(program.graph)
    written = [f"`{n.target}`" for n in program.graph.nodes if n.op == "get_attr" and storages.writes(n)]
    if not written:
        return
    with with_its_buffers(program.graph_module):
        first = run_program(program, args, kwargs)
        worst = _disagreement(program, first, args, kwargs)
    if worst:
        raise CaptureError(
            f"The model remembers earlier calls: it writes to {', '.join(written)}, and the same input then gives "
            f"another output ({worst}). Let it take its state as an input and return it."
        )


def _check_random(program: Program, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    draws = [node for node in program.graph.nodes if _draws(node)]
    if not draws:
        return
    worst = _disagreement(program, run_program(program, args, kwargs, seed=1), args, kwargs)
    if worst:
        line = user_line(draws[0])
        raise CaptureError(
            f"The model draws random numbers in eval mode, by `{short_name(draws[0])}`{f' at {line}' if line else ''}: "
            f"the same input gives another output ({worst}), so that nothing made of it could be checked. Let it "
            "take them as an input, or draw them in training mode only (`training=self.training`); a model that was "
            "exported in training mode is exported after `model.eval()`."
        )


def _draws(node: fx.Node) -> bool:
    if torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
        return False
    given = arguments(node, ())  # a dropout that is switched off is not to be named for what another draws
    return not (given.get("train") is False or given.get("training") is False or given.get("dropout_p") == 0)


def resized(tensor: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Return a tensor of another shape: a part of it, or what repeats."""
    for axis, size in enumerate(shape):
        if size != tensor.shape[axis]:
            tensor = tensor.index_select(axis, torch.arange(size, device=tensor.device) % tensor.shape[axis])
    return tensor


def difference(program: Program, expected: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """Say how a program differs from what the model returned, "" if it does not; that it fails is a difference."""
    try:
        return _disagreement(program, expected, args, kwargs)
    except OUT_OF_MEMORY:
        raise
    except Exception as err:  # the traced graph may fail in any kernel
        return first_line(err)


def _disagreement(program: Program, expected: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """Run the program on what the model returned `expected` for; say how they differ, "" if they do not."""
    with with_its_buffers(program.graph_module):
        found = run_program(program, args, kwargs)
    pairs = zip(pytree.tree_leaves(expected), pytree.tree_leaves(found), strict=True)
    tensors = [pair for pair in pairs if isinstance(pair[0], torch.Tensor)]
    relative = tolerance(program)
    for spec, (want, got) in zip(program.outputs, tensors, strict=True):
        if want.shape != got.shape:
            return f"output `{spec.name}` is {tuple(got.shape)} instead of {tuple(want.shape)}"
        if not close(want, got, relative):
            want, got = computable(want), computable(got)
            difference, scale = float((want.double() - got.double()).abs().max()), _scale(want)
            return f"output `{spec.name}` is off by {difference:.3g} (largest value {scale:.3g})"
    return ""


def tolerance(program: Program) -> float:
    """Return how far, relative to the largest value, results of the same kernels may lie apart."""
    return _CAPTURE_ULPS * torch.finfo(torch.float64 if _all_double(program) else torch.float32).eps


def close(want: torch.Tensor, got: torch.Tensor, relative: float) -> bool:
    """Whether two results of one shape are equal but for a `tolerance`; whole numbers have none."""
    want, got = computable(want), computable(got)
    relative = relative if want.is_floating_point() or want.is_complex() else 0.0
    return torch.allclose(want, got, rtol=relative, atol=relative * _scale(want), equal_nan=True)


def _scale(tensor: torch.Tensor) -> float:
    return _largest(tensor) if tensor.is_floating_point() else 1.0


def _all_double(program: Program) -> bool:
    """Whether every value that a program computes, but for whole numbers, is of double precision."""
    nodes = [node for gm in graph_modules(program.graph_module) for node in gm.graph.nodes]
    values = [leaf for node in nodes for leaf in pytree.tree_leaves(node.meta.get("val"))]
    types = {value.dtype for value in values if isinstance(value, torch.Tensor)}
    return {dtype for dtype in types if dtype.is_floating_point or dtype.is_complex} <= _DOUBLES


def _largest(tensor: torch.Tensor) -> float:
    """Return the largest finite magnitude, 1 where there is none."""
    finite = tensor[torch.isfinite(tensor)].abs()
    return float(finite.max()) if finite.numel() else 1.0


def run_program(program: Program, args: tuple[Any, ...], kwargs: dict[str, Any], *, seed: int = 0) -> Any:
    """Run a program on copies of the inputs and return copies of its outputs.

    Raises:
        CaptureError: it does not run, maybe because it was run before.
    """
    args, kwargs = pytree.tree_map_only(torch.Tensor, torch.clone, (args, kwargs))
    failed = foreign_code(
        lambda said, _: CaptureError(f"The captured program does not run on the example inputs, or not twice: {said}.")
    )
    with failed, torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # not the program itself, which takes back what it writes
        return pytree.tree_map_only(torch.Tensor, torch.clone, program.graph_module(*args, **kwargs))
