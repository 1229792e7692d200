"""Which modules a file may hold without trust: torch.nn's own classes, with the attributes torch.nn gives them.

A module in a file is a dictionary of attributes, and Python lets an attribute stand in for a method: a `forward` among
them would run in place of the class's, a hook whenever the module does. So a module is made of what was read only if
its class is stock, none of its attributes shadows one of the class, it has no hooks, every attribute that its class
gives a new instance is there, and the values are tensors, plain data, and functionals of torch.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from graphopt.errors import cut, printable
from graphopt.ir.torch_internals import pytree
from graphopt.loading.recurrent_weights import recurrent_weights
from graphopt.loading.refusal import DamagedError, HostileError

_FUNCTIONAL_NAMES = """
    relu relu6 leaky_relu gelu silu mish elu selu celu sigmoid tanh hardtanh hardswish hardsigmoid logsigmoid
    softplus softsign softmin softmax log_softmax glu tanhshrink softshrink
"""
# Some have another home of their own in this version of torch, and in the next; some are in torch itself as well.
FUNCTIONAL_OF: dict[str, Callable[..., Any]] = {
    f"{module}.{name}": getattr(functional, name)
    for name in _FUNCTIONAL_NAMES.split()
    for module in ("torch.nn.functional", getattr(functional, name).__module__)
} | {f"torch.{name}": getattr(torch, name) for name in _FUNCTIONAL_NAMES.split() if hasattr(torch, name)}
_PLAIN_TYPES = (
    *(bool, int, float, complex, str, bytes, type(None)),
    *(torch.dtype, torch.device, torch.Size, torch.layout, torch.memory_format),
)
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
_TABLES = ("_parameters", "_buffers", "_modules")
_MODES = {
    nn.LSTM: ("LSTM",),
    nn.GRU: ("GRU",),
    nn.RNN: ("RNN_TANH", "RNN_RELU"),
    nn.RNNBase: ("LSTM", "GRU", "RNN_TANH", "RNN_RELU"),
}
MOST = 2**31 - 1  # of a size or step: torch 2.13 multiplies some without looking whether the product wraps
MOST_OF_WINDOWS = 2**15  # where it does so in 32 bits
_WINDOWS = (nn.Fold, nn.Unfold)
_RECURRENT_OPTIONS = ("input_size", "hidden_size", "num_layers", "bias", "bidirectional", "proj_size")


def _stock_classes() -> tuple[type[nn.Module], ...]:
    """Return torch.nn's module classes, less those that run hooks or nothing of their own."""
    classes = [vars(nn.modules)[name] for name in nn.modules.__all__]
    stock = [
        cls
        for cls in classes
        if inspect.isclass(cls)
        and issubclass(cls, nn.Module)
        and cls is not nn.Module
        and not cls.__name__.startswith("Lazy")
    ]
    # The output projection inside MultiheadAttention, a Linear that torch's own quantization skips.
    return (*stock, nn.modules.linear.NonDynamicallyQuantizableLinear)


CLASSES = _stock_classes()
CLASS_OF = {f"{cls.__module__}.{cls.__qualname__}": cls for cls in CLASSES}


def make_module(cls: type[nn.Module], state: Mapping[Any, Any], path: str) -> nn.Module:
    """Make a module of its attributes, without its constructor.

    Args:
        cls: one of `CLASSES`.
        state: attributes by name, the three tables among them; values are plain data, tensors and modules.
        path: where it lies, for messages.

    Raises:
        HostileError: an attribute is not what a stock module has.
        DamagedError: one is missing.
    """
    for key, value in state.items():
        _check_attribute(path, cls, key, value)
    tables = {key: _table(path, state, key) for key in _TABLES}
    _check_names(path, cls, state, tables["_parameters"])
    module = cls.__new__(cls)
    nn.Module.__init__(module)
    own = {key: value for key, value in state.items() if key not in vars(module)}
    own |= {key: dict(table) for key, table in tables.items()}
    own["training"] = state.get("training", False) is True
    own["_non_persistent_buffers_set"] = set(_names(path, state, "_non_persistent_buffers_set"))
    try:
        module.__setstate__(own)  # type: ignore[no-untyped-call] # fills in what files of older versions of torch lack
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as err:
        raise DamagedError(f"{_where(path)} is no complete `{cls.__name__}` ({err})") from err
    _check_complete(path, module)
    return module


def _check_attribute(path: str, cls: type[nn.Module], key: object, value: object) -> None:
    if not isinstance(key, str):
        raise HostileError(f"{_where(path)} has an attribute called {cut(str(key), 40)!r}")
    if key in ("_parameters", "_buffers"):
        for name, tensor in _dictionary(path, key, value).items():
            _check_name(path, cls, name)
            if tensor is not None and not isinstance(tensor, torch.Tensor):
                raise HostileError(f"{_where(path)} has a `{_name(tensor)}` as its tensor `{name}`")
    elif key == "_modules":
        for name, child in _dictionary(path, key, value).items():
            _check_name(path, cls, name)
            if child is not None and not isinstance(child, nn.Module):
                raise HostileError(
                    f"its module `{f'{path}.{name}'.lstrip('.')}` is a `{_name(child)}`, which is not one of "
                    "torch.nn's own classes"
                )
    elif "hooks" in key:
        if value is not None and (type(value) not in (dict, OrderedDict) or value):
            raise HostileError(f"{_where(path)} carries hooks (`{key}`), code that would run with it")
    elif key == "_compiled_call_impl" or _shadows(cls, key) or (hasattr(cls, key) and callable(value)):
        raise HostileError(f"{_where(path)} has its own `{key}` in place of `{cls.__name__}.{key}`")
    else:
        _check_value(path, key, value)
        _check_sizes(path, cls, key, value)


def _check_sizes(path: str, cls: type[nn.Module], key: str, value: Any) -> None:
    most = MOST_OF_WINDOWS if issubclass(cls, _WINDOWS) else MOST
    for number in pytree.tree_leaves(value):
        if type(number) is int and abs(number) > most:
            raise HostileError(f"{_where(path)} has {number} in its `{key}`, which is beyond all sizes")
        if isinstance(number, torch.Tensor) and not (number.is_floating_point() or number.is_complex()):
            raise HostileError(
                f"{_where(path)} has a tensor of integers in its `{key}`, which could stand for any size"
            )
    if key == "divisor_override" and value is not None and not (type(value) is int and value > 0):
        raise HostileError(f"{_where(path)} divides by `{key}` = {cut(str(value), 40)}, which is no count")


def _check_name(path: str, cls: type[nn.Module], name: str) -> None:
    """Check the name of a tensor or child, which torch.nn looks up as an attribute."""
    if not name or "." in name or hasattr(cls, name) or name in _OF_EVERY_MODULE:
        said = cut(printable(name), 40)
        raise HostileError(f"{_where(path)} calls a part of it `{said}`, which torch.nn does not allow")


def _table(path: str, state: Mapping[Any, Any], key: str) -> Mapping[str, Any]:
    if key not in state:
        raise DamagedError(f"{_where(path)} has no `{key}`")
    return _dictionary(path, key, state[key])


def _dictionary(path: str, key: str, value: object) -> Mapping[str, Any]:
    if type(value) not in (dict, OrderedDict) or not all(type(name) is str for name in value):  # type: ignore[attr-defined]
        raise HostileError(f"{_where(path)} keeps its `{key}` in something other than a plain dictionary")
    return value  # type: ignore[return-value]


def _names(path: str, state: Mapping[str, Any], key: str) -> list[str]:
    found = state.get(key)
    if found is None:
        return []
    if not isinstance(found, list | tuple | set | frozenset | dict) or not all(isinstance(name, str) for name in found):
        raise DamagedError(f"{_where(path)} keeps something other than names in its `{key}`")
    return list(found)


def _check_names(path: str, cls: type[nn.Module], state: Mapping[str, Any], parameters: Mapping[str, Any]) -> None:
    """Check what names attributes: torch looks them up on the module."""
    held = {*parameters, *(key for key, value in state.items() if isinstance(value, torch.Tensor))}
    names = []
    if issubclass(cls, nn.ParameterDict):  # it may hold numbers, too
        names = _names(path, state, "_keys")
        held |= {key for key in state if key not in _OF_EVERY_MODULE}
    if issubclass(cls, nn.RNNBase):
        rows = state.get("_all_weights", state.get("all_weights"))
        if not isinstance(rows, list) or not all(isinstance(row, list) for row in rows):
            raise DamagedError(f"{_where(path)} does not say which weights belong to which layer")
        names = [*_names(path, state, "_flat_weights_names"), *(name for row in rows for name in row)]
    unknown = [name for name in names if not isinstance(name, str) or name not in held]
    if unknown:
        raise DamagedError(f"{_where(path)} has no `{cut(printable(str(unknown[0])), 40)}`, which it says it has")


def _check_complete(path: str, module: nn.Module) -> None:
    """Check that a module has the attributes of a new instance of its class: it would fail while it runs."""
    new = _new(type(module))  # type: ignore[arg-type] # torch declares the hash of an instance
    held = {name for table in _TABLES for name in vars(module)[table]} | vars(module).keys()
    own = vars(module).keys() | module._modules.keys()  # a tensor in the place of an option could stand for a size
    missing = [name for name in vars(new) if name not in own]
    if not isinstance(module, nn.RNNBase):  # its tensors depend on how many layers it has, and were checked
        missing += [name for table in _TABLES for name in vars(new)[table] if name not in held]
    if missing:
        raise DamagedError(
            f"{_where(path)} has no `{missing[0]}`, which every `{type(module).__name__}` of torch {torch.__version__} "
            "has; save it again with that, or give its weights to a --factory"
        )
    if isinstance(module, nn.RNNBase):
        _check_recurrent(path, module)


def _check_recurrent(path: str, module: nn.RNNBase) -> None:
    """Check the weights a recurrent layer runs with: torch 2.13 reads beyond those that are smaller.

    Raises:
        DamagedError: one has another shape than the options say, or there are more or fewer.
    """
    weights = [tuple(weight.shape) for weight in module._flat_weights if weight is not None]
    options = {name: getattr(module, name) for name in _RECURRENT_OPTIONS}
    known = module.mode in _MODES.get(type(module), ())
    wanted = recurrent_weights(module.mode, options, most=len(module._flat_weights)) if known else None
    said = cut(printable(", ".join(f"{name}={value!r}" for name, value in options.items())), 160)
    layer = f"{_where(path)}, {type(module).__name__}({said}),"
    if wanted is None:
        raise DamagedError(f"{layer} has options that no such layer has; save it again")
    if module._flat_weights_names != list(wanted) or weights != list(wanted.values()):
        raise DamagedError(
            f"{layer} has weights of the shapes {cut(str(weights), 120)} instead of "
            f"{cut(str(list(wanted.values())), 120)}; save it again"
        )


@functools.cache
def _new(cls: type[nn.Module]) -> nn.Module:
    """Return an instance of a class, the smallest, without memory for its tensors."""
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of classes that are no longer recommended
        return cls(*smallest_arguments(cls))


def smallest_arguments(cls: type[nn.Module]) -> tuple[Any, ...]:
    """Return arguments that make the smallest instance of a stock class."""
    if cls in _ARGUMENTS:
        return _ARGUMENTS[cls]()
    parameters = inspect.signature(cls).parameters.values()
    return tuple(1 for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD)


def _layer(cls: type[nn.Module]) -> Callable[[], tuple[Any, ...]]:
    return lambda: (cls(1, 1), 1)


_ARGUMENTS: dict[type[nn.Module], Callable[[], tuple[Any, ...]]] = {
    nn.RNNBase: lambda: ("LSTM", 1, 1),
    **dict.fromkeys((nn.RNN, nn.LSTM, nn.GRU), lambda: (1, 1)),
    nn.TransformerEncoder: _layer(nn.TransformerEncoderLayer),
    nn.TransformerDecoder: _layer(nn.TransformerDecoderLayer),
    nn.Transformer: lambda: (1, 1, 1, 1, 1),
    nn.AdaptiveLogSoftmaxWithLoss: lambda: (2, 2, [1]),
    nn.Unflatten: lambda: (1, (1,)),
    nn.Threshold: lambda: (1, 1),
    nn.FractionalMaxPool2d: lambda: (1, 1),
    nn.FractionalMaxPool3d: lambda: (1, 1),
}


def _shadows(cls: type, key: str) -> bool:
    """Tell whether an instance attribute `key` would hide something of the class that can run."""
    found = inspect.getattr_static(cls, key, None)
    return callable(found) or hasattr(type(found), "__get__")


def _check_value(path: str, key: str, value: Any) -> None:
    kind = type(value)
    if kind in _PLAIN_TYPES or kind in (torch.Tensor, nn.Parameter):
        return
    if kind in (list, tuple, set, frozenset):
        for item in value:
            _check_value(path, key, item)
    elif kind in (dict, OrderedDict):
        for item in value.values():
            _check_value(path, key, item)
    elif not any(value is function for function in FUNCTIONAL_OF.values()):
        raise HostileError(f"{_where(path)} holds a `{_name(value)}` as `{key}`, which is neither data nor stock")


def _name(value: object) -> str:
    """Return the class of a value, or a function's own name."""
    named = value if inspect.isroutine(value) or inspect.isclass(value) else type(value)
    return f"{named.__module__}.{named.__qualname__}"


def _where(path: str) -> str:
    return f"its module `{path}`" if path else "the model itself"
