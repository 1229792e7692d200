"""Calling a user's model without leaving a trace on it."""

from __future__ import annotations

import contextlib
import inspect
import keyword
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import fx, nn

from graphopt.errors import CaptureError, UsageError
from graphopt.ir.devices import check_values, held_by
from graphopt.ir.global_state import outside_inference
from graphopt.ir.lazy_modules import check_initialized
from graphopt.ir.torch_internals import compiled_module, is_compiled, target_of_conversion


def check_module(model: object) -> None:
    """Raise `UsageError` unless `model` is a module, and `CaptureError` while its tensors have no shapes."""
    if not isinstance(model, nn.Module):
        raise UsageError(
            f"The model is a {type(model).__name__}, not an nn.Module. A file is read by graphopt.load(path); a "
            "function becomes the forward of a module."
        )
    check_initialized(model)
    check_values(held_by(model))


def check_names(model: nn.Module) -> None:
    """Raise `CaptureError` if a part of the model bears a name that a captured graph uses itself."""
    taken = vars(fx.GraphModule(nn.Module(), fx.Graph())).keys() | set(dir(fx.GraphModule))
    own = {*vars(nn.Module()).keys(), *dir(nn.Module)}
    for table in (model._parameters, model._buffers, model._modules):
        for name in table:
            if name in taken - own:
                raise CaptureError(
                    f"The model's attribute `{name}` bears a name that captured graphs use themselves. Capture the "
                    f"model as part of a module of yours, where it is `model.{name}`, or rename it, in the weights too."
                )


def check_keywords(kwargs: Mapping[str, Any]) -> None:
    """Raise `UsageError` if an input bears a name that no argument can have, as `forward(**inputs)` takes it."""
    for name in kwargs:
        if not name.isidentifier() or keyword.iskeyword(name):
            raise UsageError(
                f"The model is given an input called {name!r}, and no argument of a program can have that name. Call "
                f"it otherwise, in a module around the model that passes it on: forward(x) calls "
                f"model(**{{{name!r}: x}})."
            )


def uncompiled(model: nn.Module) -> nn.Module:
    """Return the module that `torch.compile` wrapped, whose forward has the user's argument names."""
    return compiled_module(model) or model


@contextlib.contextmanager
def without_compiling(model: nn.Module) -> Iterator[None]:
    """Run the parts of a model that `torch.compile` was put on as they are: compiling them would take minutes."""
    if not any(map(is_compiled, model.modules())):
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


@contextlib.contextmanager
def without_fast_paths() -> Iterator[None]:
    """Let attention of torch.nn run as its layers define it, as it is traced and trained.

    The kernels it takes for inference leave zeros where a padding mask hides a position, and shorten what they return
    to the longest sample.
    """
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


@contextlib.contextmanager
def without_idle_conversions() -> Iterator[None]:
    """Let `module.to(...)` leave alone what is of that type and on that device already.

    A router that converts its layer in `forward` does so on every call; what torch.export puts in the place of
    parameters cannot be converted, not even to what it is.
    """
    convert = nn.Module.to

    def to(module: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        device, dtype, memory_format = target_of_conversion(*args, **kwargs)
        tensors = [*module.parameters(), *module.buffers()]
        moves = device is not None and any(tensor.device != device for tensor in tensors)
        casts = dtype is not None and any(t.dtype != dtype for t in tensors if t.is_floating_point() or t.is_complex())
        return convert(module, *args, **kwargs) if moves or casts or memory_format is not None else module

    nn.Module.to = to  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.to = convert  # type: ignore[method-assign]


@contextlib.contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Put every module in evaluation mode, and back in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextlib.contextmanager
def gradients_recorded() -> Iterator[None]:
    """Record gradients, and make tensors that can be trained, where the caller has switched both off."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


@contextlib.contextmanager
def without_inference_tensors(model: nn.Module) -> Iterator[None]:
    """Put copies in the place of what was made in inference mode, which is neither exported nor trained outside it."""
    tables = [table for module in model.modules() for table in (module._parameters, module._buffers)]
    held = [(table, name, tensor) for table in tables for name, tensor in table.items() if tensor is not None]
    held = [entry for entry in held if entry[2].is_inference()]
    copies: dict[torch.Tensor, Any] = {}  # of tied ones one
    for _, _, tensor in held:
        copies.setdefault(tensor, _trainable_copy(tensor))
    try:
        for table, name, tensor in held:
            table[name] = copies[tensor]
        yield
    finally:
        for table, name, tensor in held:
            table[name] = tensor  # type: ignore[assignment]


def _trainable_copy(tensor: torch.Tensor) -> torch.Tensor:
    copy = outside_inference(tensor.detach())
    return nn.Parameter(copy, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else copy


@contextlib.contextmanager
def spelled_out(model: nn.Module, kwargs: Mapping[str, Any]) -> Iterator[None]:
    """Let `forward(**inputs)` look as if it named each of `kwargs`.

    Without it torch.export (2.13) mistakes the inputs behind `**` for a nested one when axes are dynamic.
    """
    signature = inspect.signature(model.forward)
    extra = [name for name in kwargs if name not in signature.parameters]
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in signature.parameters.values())
    if not extra or not takes_any:
        yield
        return
    named = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    named += [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in extra]
    forward = model.forward

    def explicit(*args: Any, **inputs: Any) -> Any:
        return forward(*args, **inputs)

    explicit.__signature__ = signature.replace(parameters=named)  # type: ignore[attr-defined]
    with called_through(model, explicit):
        yield


@contextlib.contextmanager
def called_through(model: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Call a module through another function."""
    own = model.__dict__.get("forward")
    model.__dict__["forward"] = forward
    try:
        yield
    finally:
        if own is None:
            del model.__dict__["forward"]
        else:
            model.__dict__["forward"] = own
