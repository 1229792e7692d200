"""What torch's own tests call its operators with, for `tools/fuzz_operators.py`."""

from __future__ import annotations

import contextlib
import functools
import pickle
import random
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from graphopt.ir.torch_internals import OpOverload, make_fx
from tools.fuzz_operator_calls import Arguments, Recorded, described
from tools.zoo_operators import described_by_torch

_MOST = 4  # calls of an operator
_LARGEST = 100_000  # elements of a tensor


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, wanted: Collection[OpOverload]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: dict[OpOverload, dict[str, Arguments]] = {operator: {} for operator in wanted}

    def note(self, operator: Any, args: Any, kwargs: Any) -> None:
        """Keep a call, unless there are enough of its operator or it holds what no file does."""
        known = self.calls.get(operator)
        if known is None or len(known) >= _MOST:
            return
        tensors = [value for value in pytree.tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        if all(t.layout == torch.strided and not t.is_meta and t.numel() <= _LARGEST for t in tensors):
            copied = pytree.tree_map_only(Tensor, lambda t: t.detach().clone(), (tuple(args), dict(kwargs)))
            copied = pytree.tree_map_only(torch.Generator, lambda _: None, copied)
            known[described(copied)] = copied

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.note(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))


class _Interpreter(fx.Interpreter):
    def __init__(self, gm: fx.GraphModule, recorder: _Recorder) -> None:
        super().__init__(gm)
        self._recorder = recorder

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        self._recorder.note(target, args, kwargs)
        return super().call_function(target, args, kwargs)


def recorded_calls(file: Path, wanted: Collection[OpOverload]) -> Recorded:
    """Read what torch's tests of operators and modules call operators with from a file, recorded where it is missing.

    Recorded are the calls in their graphs, and those that these become when they are run.
    """
    if not file.exists():
        file.write_bytes(pickle.dumps({str(target): calls for target, calls in _record(wanted).items() if calls}))
    read = pickle.loads(file.read_bytes())
    return {target: read[str(target)] for target in wanted if str(target) in read}


def _record(wanted: Collection[OpOverload]) -> Recorded:
    recorder = _Recorder(wanted)
    for function, arguments in _samples():
        values, structure = pytree.tree_flatten(arguments)
        places = [at for at, value in enumerate(values) if isinstance(value, Tensor)]
        tensors = [values[at].detach() for at in places]
        call = functools.partial(_call_on, function, values, structure, places)
        with torch.no_grad(), contextlib.suppress(Exception):  # some samples are of errors
            with recorder:
                call(*tensors)
            _Interpreter(make_fx(call, pre_dispatch=True)(*tensors), recorder).run(*tensors)
    return {target: [*calls.values()] for target, calls in recorder.calls.items()}


def _call_on(
    function: Callable[..., Any], values: list[Any], structure: pytree.TreeSpec, places: list[int], *tensors: Tensor
) -> Any:
    given = dict(zip(places, tensors, strict=True))
    args, kwargs = pytree.tree_unflatten([given.get(at, value) for at, value in enumerate(values)], structure)
    return function(*args, **kwargs)


def _samples() -> Iterator[tuple[Callable[..., Any], Arguments]]:
    random.seed(0)
    torch.manual_seed(0)
    for info in described_by_torch():
        with contextlib.suppress(Exception):  # some have none without a GPU
            yield from _samples_of_operator(info)
    from torch.testing._internal.common_modules import module_db  # which needs what the function above stands in for

    for info in module_db:
        with contextlib.suppress(Exception):
            for sample in info.module_inputs_func(info, "cpu", torch.float32, requires_grad=False, training=False):
                made, given = sample.constructor_input, sample.forward_input
                module = info.module_cls(*made.args, **made.kwargs).eval()
                yield module.__call__, (given.args, given.kwargs)


def _samples_of_operator(info: Any) -> Iterator[tuple[Callable[..., Any], Arguments]]:
    dtype = next(d for d in (torch.float32, torch.int64, torch.bool, torch.complex64) if d in info.dtypes)
    samples = [*info.sample_inputs("cpu", dtype)][:12:3]
    for sample in samples:
        given = (sample.input, *sample.args), sample.kwargs
        yield info.op, given
        if info.inplace_variant and sample is samples[0]:
            yield info.inplace_variant, given
