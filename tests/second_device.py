"""A second device for machines without one: tensors that lie on `twin:0` are a CPU's inside, and refuse to be mixed.

As with an accelerator: an operator takes tensors of one device (single numbers of the CPU besides, and indices), NumPy
sees none of them, and what is made without a device is on the CPU. `torch.export` captures models that lie there.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

aten = torch.ops.aten
_MOVES = (aten._to_copy.default, aten.copy_.default, aten._copy_from.default)
_INDEXED = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._unsafe_index.Tensor)
_NUMBERS = (aten._local_scalar_dense.default, aten.equal.default)


class Twin(Tensor):
    """A tensor on the second device."""

    raw: Tensor

    @staticmethod
    def __new__(cls, raw: Tensor) -> Twin:
        made: Twin = Tensor._make_wrapper_subclass(
            cls, raw.size(), raw.stride(), raw.storage_offset(), dtype=raw.dtype, device="twin:0"
        )
        made.raw = raw
        return made

    def __init__(self, raw: Tensor) -> None:
        super().__init__()

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, *args, **(kwargs or {}))

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if id(self) not in memo:
            memo[id(self)] = type(self)(self.raw.clone()).requires_grad_(self.requires_grad)
            if isinstance(self, torch.nn.Parameter):
                memo[id(self)] = torch.nn.Parameter(memo[id(self)], self.requires_grad)
        return memo[id(self)]  # type: ignore[no-any-return]

    def __repr__(self, **_: Any) -> str:
        return f"Twin({self.raw})"

    def __getitem__(self, index: Any) -> Tensor:
        return super().__getitem__(pytree.tree_map(_unlisted, index, is_leaf=lambda item: isinstance(item, list)))

    def __setitem__(self, index: Any, value: Any) -> None:
        super().__setitem__(pytree.tree_map(_unlisted, index, is_leaf=lambda item: isinstance(item, list)), value)

    def tolist(self) -> Any:
        return self.raw.tolist()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.raw.untyped_storage()

    def data_ptr(self) -> int:
        return self.raw.data_ptr()


def _unlisted(index: Any) -> Any:
    """Make a tensor of a list of indices, which torch does past all hooks."""
    return torch.tensor(index) if isinstance(index, list) else index


def _run(func: Any, *args: Any, **kwargs: Any) -> Any:
    leaves = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    there = [leaf for leaf in leaves if isinstance(leaf, Twin)]
    indices = args[1] if func in _INDEXED else ()
    mixed = (leaf for leaf in leaves if not isinstance(leaf, Twin) and leaf.dim())
    here = [leaf for leaf in mixed if all(leaf is not index for index in indices)]
    if here and there and func not in _MOVES:
        raise RuntimeError(f"Expected all tensors to be on the same device, but {func} got two")
    wanted = kwargs.get("device")
    if wanted is not None:
        kwargs["device"] = torch.device("cpu")
    known = {id(tensor.raw): tensor for tensor in there}
    args_here, kwargs_here = pytree.tree_map_only(Twin, lambda tensor: tensor.raw, (args, kwargs))
    result = func(*args_here, **kwargs_here)
    if func is aten.copy_.default and not isinstance(args[0], Twin):
        return args[0]
    if func in _NUMBERS or (wanted is not None and torch.device(wanted).type == "cpu"):
        return result

    def wrapped(tensor: Tensor) -> Tensor:
        return known[id(tensor)] if id(tensor) in known else Twin(tensor)

    return pytree.tree_map_only(Tensor, wrapped, result)


class _Module:
    """What torch asks the module of a device."""

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return True

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return 1

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        pass

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


@functools.cache
def _registered() -> list[torch.library.Library]:
    """Register the device with torch; there is no way back, and nothing that asks for no device sees it."""
    _setup_privateuseone_for_python_backend("twin", backend_module=_Module())
    every = torch.library.Library("_", "IMPL")
    every.fallback(_run, "PrivateUse1")
    made = torch.library.Library("aten", "IMPL")
    for operator in (aten.empty.memory_format, aten.empty_strided.default):
        made.impl(operator.name(), functools.partial(_run, operator), "PrivateUse1")
    return [every, made]


@contextlib.contextmanager
def second_device() -> Iterator[torch.device]:
    """Give the device, with `torch.tensor` and `as_tensor` that make tensors there, which torch does past all hooks."""
    _registered()
    originals = torch.tensor, torch.as_tensor

    def there(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        @functools.wraps(make)
        def tensor(*args: Any, device: Any = None, **kwargs: Any) -> Tensor:
            made = make(*args, **kwargs)
            return made if device is None else made.to(device)

        return tensor

    torch.tensor, torch.as_tensor = map(there, originals)
    try:
        yield torch.device("twin", 0)
    finally:
        torch.tensor, torch.as_tensor = originals
