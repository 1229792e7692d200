"""The state dicts in files: tensors by name, what modules keep beside them, and which versions of modules wrote them.

`load_state_dict` of a model is to see what the file holds, all of it: modules that changed what they store look at the
version, and those that keep more than tensors take it back (`set_extra_state`).
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import nn

from graphopt.errors import LoadError, cut, foreign_code, printable
from graphopt.ir.torch_internals import pytree
from graphopt.loading.contents import FileKind, identify
from graphopt.loading.functions import importable
from graphopt.loading.pickles import load_plain_pickle, load_trusted_pickle
from graphopt.loading.refusal import DamagedError, HostileError

logger = logging.getLogger(__name__)

# Keys under which training scripts keep the state dict of a checkpoint.
_CHECKPOINT_KEYS = ("state_dict", "model_state_dict", "model", "net", "weights")
_SHOWN = 3
_MOST_PREFIXES = 4  # that wrap a model one inside the other; a stranger's names may have any number of dots
_PLAIN = (bool, int, float, complex, str, type(None), torch.dtype, torch.device, torch.Size)
_BYTES = (torch.uint8, torch.int8)


@dataclass(frozen=True)
class StateDict:
    """What a file gives a model.

    Attributes:
        values: tensors by name; what a module keeps beside its tensors as `_extra_state`.
        versions: of the modules, by name, as torch writes them; None where the file has none.
    """

    values: Mapping[str, Any]
    versions: Any = None

    @classmethod
    def of(cls, found: Mapping[str, Any]) -> StateDict:
        """Return what a dictionary holds that `Module.state_dict` made."""
        return cls(dict(found.items()), getattr(found, "_metadata", None))

    def as_torch(self) -> OrderedDict[str, Any]:
        """Return it as `Module.state_dict` makes it."""
        made = OrderedDict(self.values)
        if self.versions is not None:
            made._metadata = self.versions  # type: ignore[attr-defined]
        return made

    def without_prefixes(self) -> Iterator[tuple[str, StateDict]]:
        """Yield it as it is, then without each prefix that all of its names share, up to one of its dots."""
        yield "", self
        named = {name: value for name, value in self.values.items() if name != "n_averaged"}  # AveragedModel's own
        first = next(iter(named), "")
        for end in [position for position, char in enumerate(first, 1) if char == "."][:_MOST_PREFIXES]:
            if all(name.startswith(first[:end]) for name in named):
                values = {name[end:]: value for name, value in named.items()}
                yield first[:end], StateDict(values, self._versions_below(first[:end]))

    def _versions_below(self, prefix: str) -> Any:
        if not isinstance(self.versions, Mapping):
            return self.versions
        named = ((f"{name}.", entry) for name, entry in self.versions.items())
        return {name[len(prefix) : -1]: entry for name, entry in named if name.startswith(prefix)}


def read_weights(data: bytes, source: str, *, trust: bool = False) -> StateDict:
    """Return the state dict in a safetensors or torch file.

    Args:
        data: the file's bytes.
        source: its path, for messages.
        trust: let a torch file run code: it may then hold objects of any class beside the weights, and modules.

    Raises:
        LoadError: it is another kind of file, damaged, or holds no state dict.
        HostileError: it holds more than tensors and plain data, and is not trusted.
    """
    try:
        kind, _ = identify(data)
        if kind is FileKind.SAFETENSORS:
            found = StateDict(safetensors.torch.load(data))
        elif kind is FileKind.TORCH_PICKLE:
            found = _state_dict(_trusted(data) if trust else load_plain_pickle(data), source)
        else:
            raise LoadError(
                f"`{source}` is {kind.value}; with `--factory` it must be weights alone, in a `.safetensors` file or a "
                "`.pt` file that `torch.save(model.state_dict(), ...)` wrote."
            )
    except (DamagedError, SafetensorError) as err:
        raise LoadError(f"Cannot read the weights in `{source}`: {err}.") from err
    if not trust:
        for name, value in found.values.items():
            _check_plain(name, value)
    return found


def _trusted(data: bytes) -> Any:
    with importable(Path.cwd()):
        return load_trusted_pickle(data)


def _check_plain(name: str, value: Any) -> None:
    """Check what a module's own code is handed beside tensors: some unpickle the bytes that they find there."""
    if not is_extra_state(name):
        return
    for leaf in pytree.tree_leaves(value):
        if type(leaf) not in _PLAIN and not (isinstance(leaf, torch.Tensor) and leaf.dtype not in _BYTES):
            kind = f"tensor of {dtype_name(leaf.dtype)}" if isinstance(leaf, torch.Tensor) else type(leaf).__name__
            raise HostileError(
                f"its `{cut(printable(name), 80)}` holds a value of the kind {kind}, in which the model's own code "
                "could find more than plain data"
            )


def _state_dict(value: Any, source: str) -> StateDict:
    """Return the state dict that a value is, or holds under one of the names that training scripts give it."""
    value = _of_module(value)
    if is_state_dict(value):
        return StateDict.of(value)
    entries = value if isinstance(value, Mapping) else {}
    named = {key: _of_module(entries.get(key)) for key in _CHECKPOINT_KEYS}
    states = {key: state for key, state in named.items() if is_state_dict(state)}
    if len(states) > 1:
        raise LoadError(f"`{source}` holds several state dicts ({some(list(states))}). Save the one to use by itself.")
    if not states:
        raise LoadError(f"`{source}` holds {describe(value)}, not a state dict (names and tensors).")
    ((taken, state),) = states.items()
    models = (str(key) for key, item in entries.items() if isinstance(item, nn.Module) or is_state_dict(item))
    others = [name for name in models if name != taken]
    if others:
        logger.warning("`%s` holds several state dicts: `%s` is taken, and not %s.", source, taken, some(others))
    return StateDict.of(state)


def _of_module(value: Any) -> Any:
    """Return the state dict of a module, and anything else as it is; only a trusted file holds modules here."""
    if not isinstance(value, nn.Module):
        return value
    with foreign_code(lambda said, _: DamagedError(f"its module has no state dict ({said})")):
        return value.state_dict()


def is_state_dict(value: object) -> bool:
    """Tell whether `value` maps names to tensors (or to a module's `_extra_state`)."""
    return isinstance(value, Mapping) and any(isinstance(item, torch.Tensor) for item in value.values()) and all(
        isinstance(key, str) and (isinstance(item, torch.Tensor) or is_extra_state(key))
        for key, item in value.items()
    )  # fmt: skip


def is_extra_state(name: str) -> bool:
    """Tell whether a name in a state dict is that of what a module keeps beside its tensors."""
    return name.rpartition(".")[2] == "_extra_state"


def describe(value: object) -> str:
    """Return what a loaded value is, in words."""
    if is_state_dict(value):
        return f"a state dict ({len(value)} tensors: {some(list(value))})"  # type: ignore[call-overload,arg-type]
    if isinstance(value, Mapping):
        return f"a dictionary with the keys {some([str(key) for key in value])}"
    return f"a {type(value).__module__}.{type(value).__qualname__}".replace("builtins.", "")


def dtype_name(dtype: torch.dtype) -> str:
    """Return what a type is called."""
    return str(dtype).removeprefix("torch.")


def some(names: Sequence[str]) -> str:
    """Return the first few names, and how many more there are."""
    more = f", and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(cut(printable(name), 80) for name in names[:_SHOWN]) + more
