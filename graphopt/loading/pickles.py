"""Whole modules and state dicts saved by `torch.save`, unpickled under torch's restricted unpickler."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from graphopt.loading.refusal import DamagedError, HostileError
from graphopt.loading.stock_modules import CLASSES, FUNCTIONALS, check_modules

# What torch.serialization.safe_globals takes.
SafeGlobal = Callable[..., Any] | tuple[Callable[..., Any], str]


def load_stock_pickle(data: bytes) -> Any:
    """Unpickle a `torch.save` file that may hold stock torch.nn modules.

    Returns:
        A checked module, or whatever else the file holds (of plain data and tensors).

    Raises:
        HostileError: It needs a class or function beyond the allow-list, or a module in it is not as stock.
        DamagedError: It cannot be unpickled at all.
    """
    known = set(torch.serialization.get_safe_globals())
    # Leaving the context takes away what it was given, so what the process had allowed before stays out.
    stock = [item for item in _stock() if item not in known]
    with torch.serialization.safe_globals(stock):
        value = _load_restricted(data)
    if isinstance(value, nn.Module):
        check_modules(value)
    return value


def _stock() -> list[SafeGlobal]:
    return [*CLASSES, *FUNCTIONALS]


def load_plain_pickle(data: bytes) -> Any:
    """Unpickle a `torch.save` file of tensors and plain data alone; raises as `load_stock_pickle`."""
    return _load_restricted(data)


def load_trusted_pickle(data: bytes) -> Any:
    """Unpickle a `torch.save` file that the user trusts; this runs whatever is in it.

    Raises:
        DamagedError: A class in it cannot be imported, or it cannot be unpickled.
    """
    try:
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=False)
    except (AttributeError, ImportError) as err:
        raise DamagedError(
            f"a class or function in it cannot be imported ({err}); run from the directory of the code that "
            "saved it, or use `--factory package.module:function`"
        ) from err
    except Exception as err:  # unpickling runs the file's own code, which may raise anything
        raise DamagedError(f"it cannot be unpickled ({type(err).__name__}: {_first_line(err)})") from err


def _load_restricted(data: bytes) -> Any:
    try:
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as err:  # on a crafted pickle the restricted unpickler raises many types
        if "persistent_load of storage" in str(err):
            raise HostileError(
                "it is in the format of torch 1.5 and older, in which a module brings its source code along"
            ) from err
        found = re.search(r"GLOBAL (\S+)", str(err))
        if found:
            raise HostileError(f"it needs `{found[1]}`, which is not one of torch.nn's own classes") from err
        if "reduce" in str(err) or "Can only" in str(err) or "Unsupported operand" in str(err):
            raise HostileError("it asks its reader to call or change what a plain model never does") from err
        raise DamagedError(f"it cannot be unpickled ({type(err).__name__}: {_first_line(err)})") from err


def _first_line(err: BaseException) -> str:
    lines = str(err).strip().splitlines()
    return (lines[0] if lines else "no reason given")[:200]
