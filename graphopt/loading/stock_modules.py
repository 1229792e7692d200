"""Which modules a pickle may hold without trust: torch.nn's own classes, used as torch.nn made them.

The restricted unpickler of `torch.load(weights_only=True)` creates only allow-listed classes, but it lets the
file set any attribute of them. A `forward` in a module's `__dict__` shadows the method, a hook runs whenever
the module does, and an `OrderedDict` may carry an `items` of its own. So after loading every module is
checked: exactly a stock class, no attribute that shadows one of the class, no hooks, and as values only
tensors, plain data, and functionals of the allow-list.
"""

from __future__ import annotations

import inspect
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from graphopt.loading.refusal import DamagedError, HostileError

_FUNCTIONAL_NAMES = """
    relu relu6 leaky_relu gelu silu mish elu selu celu sigmoid tanh hardtanh hardswish hardsigmoid logsigmoid
    softplus softsign softmin softmax log_softmax glu tanhshrink softshrink
"""
FUNCTIONALS: tuple[Callable[..., Any], ...] = tuple(getattr(functional, name) for name in _FUNCTIONAL_NAMES.split())
_PLAIN_TYPES = (
    *(bool, int, float, complex, str, bytes, type(None)),
    *(torch.dtype, torch.device, torch.Size, torch.layout, torch.memory_format),
)


def _stock_classes() -> tuple[type[nn.Module], ...]:
    """Return torch.nn's module classes, less those that run hooks, processes or nothing of their own."""
    classes = [vars(nn.modules)[name] for name in nn.modules.__all__]
    unsuited = (nn.Module, nn.SyncBatchNorm)
    stock = [
        cls
        for cls in classes
        if inspect.isclass(cls)
        and issubclass(cls, nn.Module)
        and cls not in unsuited
        and not cls.__name__.startswith("Lazy")
    ]
    # The output projection inside MultiheadAttention, a Linear that torch's own quantization skips.
    return (*stock, nn.modules.linear.NonDynamicallyQuantizableLinear)


CLASSES = _stock_classes()


def check_modules(root: nn.Module) -> None:
    """Check every module below `root`; raises `HostileError` with the path of the first that is not stock."""
    pending: list[tuple[str, Any]] = [("", root)]
    seen: set[int] = set()
    while pending:
        path, module = pending.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        if type(module) not in CLASSES:
            raise HostileError(f"{_where(path)} is a `{_name(module)}`, which is not one of torch.nn's own classes")
        for key, value in vars(module).items():
            _check_attribute(path, module, key, value)
        children = _table(path, module, "_modules")
        pending += [(f"{path}.{key}".lstrip("."), child) for key, child in children.items() if child is not None]


def _check_attribute(path: str, module: nn.Module, key: object, value: object) -> None:
    if not isinstance(key, str):
        raise HostileError(f"{_where(path)} has an attribute called {key!r}")
    if key in ("_parameters", "_buffers"):
        for name, tensor in _table(path, module, key).items():
            if tensor is not None and not isinstance(tensor, torch.Tensor):
                raise HostileError(f"{_where(path)} has a `{_name(tensor)}` as its tensor `{name}`")
            _check_value(path, str(name), tensor)
    elif key == "_modules":
        _table(path, module, key)
    elif "hooks" in key:
        if value is not None and (type(value) not in (dict, OrderedDict) or len(value) or _own(value)):  # type: ignore[arg-type]
            raise HostileError(f"{_where(path)} carries hooks (`{key}`), code that would run with it")
    elif _shadows(type(module), key) or (hasattr(type(module), key) and callable(value)):
        raise HostileError(f"{_where(path)} has its own `{key}` in place of `{type(module).__name__}.{key}`")
    else:
        _check_value(path, key, value)


def _table(path: str, module: nn.Module, key: str) -> dict[str, Any]:
    """Return one of a module's three dictionaries, checked to be a plain one."""
    table = vars(module).get(key)
    if not isinstance(table, dict):
        raise DamagedError(f"{_where(path)} has no `{key}`")
    if type(table) not in (dict, OrderedDict) or _own(table) or not all(type(name) is str for name in table):
        raise HostileError(f"{_where(path)} keeps its `{key}` in something other than a plain dictionary")
    return table


def _shadows(cls: type, key: str) -> bool:
    """Tell whether an instance attribute `key` would hide something of the class that can run."""
    found = inspect.getattr_static(cls, key, None)
    return callable(found) or hasattr(type(found), "__get__")


def _check_value(path: str, key: str, value: Any) -> None:
    kind = type(value)
    if kind in _PLAIN_TYPES:
        return
    if kind in (torch.Tensor, nn.Parameter):
        _check_tensor(path, key, value)
    elif kind is weakref.ReferenceType and value.__callback__ is None:
        # Recurrent layers make these of their own weights when they are unpickled; no pickle can bring one.
        _check_value(path, key, value())
    elif kind in (list, tuple, set, frozenset):
        for item in value:
            _check_value(path, key, item)
    elif kind in (dict, OrderedDict) and not _own(value):
        for name, item in value.items():
            _check_value(path, key, name)
            _check_value(path, key, item)
    elif not any(value is function for function in FUNCTIONALS):
        raise HostileError(f"{_where(path)} holds a `{_name(value)}` as `{key}`, which is neither data nor stock")


def _check_tensor(path: str, key: str, tensor: torch.Tensor) -> None:
    if tensor._backward_hooks or getattr(tensor, "_post_accumulate_grad_hooks", None):
        raise HostileError(f"the tensor `{key}` of {_where(path)} carries hooks")
    for name, value in vars(tensor).items():
        if _shadows(type(tensor), name) or type(value) not in _PLAIN_TYPES:
            raise HostileError(f"the tensor `{key}` of {_where(path)} has an attribute `{name}` of its own")


def _own(value: object) -> bool:
    """Tell whether a dictionary has attributes of its own, which could stand in for its methods."""
    return bool(getattr(value, "__dict__", None))


def _name(value: object) -> str:
    """Return the class of a value, or a function's own name."""
    named = value if inspect.isroutine(value) or inspect.isclass(value) else type(value)
    return f"{named.__module__}.{named.__qualname__}"


def _where(path: str) -> str:
    return f"its module `{path}`" if path else "the model itself"
