"""Files of `torch.save`: whole modules of torch.nn, state dicts, plain data and tensors.

Without trust no unpickler is run, torch's restricted one included: a file of allowed names alone could make that one
call anything. The pickle is read as records (`pickle_records`), the tables here and in `stock_modules` say what each
may become, and the rest is refused.
"""

from __future__ import annotations

import io
import re
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch

from graphopt.errors import cut, foreign_code, printable
from graphopt.loading import numpy_records
from graphopt.loading.pickle_records import Global, Made, Stored, is_key
from graphopt.loading.refusal import DamagedError, HostileError
from graphopt.loading.stock_modules import CLASS_OF, FUNCTIONAL_OF, make_module
from graphopt.loading.stored_tensors import StoredTensors, read_torch_file

MAX_DEPTH = 150  # records inside one another; a layer inside a layer is two
MAX_MODULES = 20_000
MAX_SIZE = 1_000_000  # values in all, those that are shared counted wherever they stand
_SCALARS = (bool, int, float, complex, str, bytes, type(None))
_DTYPES = {str(value): value for value in vars(torch).values() if isinstance(value, torch.dtype)}
_LAYOUTS = {str(value): value for value in vars(torch).values() if isinstance(value, torch.layout)}
_DEVICE = re.compile(r"[a-z]{2,12}(:\d{1,3})?", re.ASCII)


def load_stock_pickle(data: bytes) -> Any:
    """Read a `torch.save` file that may hold modules of torch.nn.

    Returns:
        A module, or whatever else the file holds (of plain data and tensors).

    Raises:
        HostileError: It needs a class or function beyond the allow-list, or a module in it is not as stock.
        DamagedError: It is cut off, or contradicts itself.
    """
    return _load(data, modules=True)


def load_plain_pickle(data: bytes) -> Any:
    """Read a `torch.save` file of tensors and plain data alone; raises as `load_stock_pickle`."""
    return _load(data, modules=False)


def load_trusted_pickle(data: bytes) -> Any:
    """Unpickle a `torch.save` file that the user trusts; this runs whatever is in it.

    Raises:
        DamagedError: A class in it cannot be imported, or it cannot be unpickled.
    """

    def failed(said: str, err: BaseException) -> DamagedError:
        if isinstance(err, AttributeError | ImportError):
            return DamagedError(
                f"a class or function in it cannot be imported ({said}); run from the directory of the code that "
                "saved it, or use `--factory package.module:function`"
            )
        return DamagedError(f"it cannot be unpickled ({said})")

    with foreign_code(failed):
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=False)


def _load(data: bytes, *, modules: bool) -> Any:
    record, stored = read_torch_file(data)
    return _Builder(stored, modules=modules).value(record, "")


class _Builder:
    """Makes values of records, each once."""

    def __init__(self, stored: StoredTensors, *, modules: bool) -> None:
        self._stored = stored
        self._modules = modules
        self._made: dict[int, Any] = {}
        self._encoded: dict[str, bytes] = {}
        self._sizes: dict[int, int] = {}
        self._size = self._count = 0
        self._open: set[int] = set()

    def value(self, record: Any, path: str) -> Any:
        """Return what a record stands for; `path` says in which module it lies."""
        key = id(record)
        self._size += self._sizes.get(key, 1)
        if self._size > MAX_SIZE:  # little by sharing, and without end where it is walked
            raise HostileError(f"it holds more than {MAX_SIZE} values")
        if type(record) in _SCALARS:
            return record
        if key in self._made:
            return self._made[key]
        if key in self._open:
            raise HostileError("something in it contains itself")
        if len(self._open) > MAX_DEPTH:
            raise HostileError(f"it is nested deeper than {MAX_DEPTH} levels")
        before = self._size
        self._open.add(key)
        self._made[key] = made = self._make(record, path)
        self._open.remove(key)
        self._sizes[key] = self._size - before + 1
        return made

    def _make(self, record: Any, path: str) -> Any:
        if isinstance(record, tuple | list):
            return type(record)(self.value(item, path) for item in record)
        if isinstance(record, dict):
            return {key: self.value(item, path) for key, item in record.items()}
        if isinstance(record, Global):
            return self._named(record)
        if isinstance(record, Stored):
            raise DamagedError("it holds bytes without saying which tensor they are")
        assert isinstance(record, Made)  # nothing else is read
        # a call takes of its arguments, which may be shared, a copy each time
        self._size += sum(len(item) for item in record.arguments if isinstance(item, tuple | list | dict))
        make = _Builder._module if record.instance else _function(record)
        try:
            return make(self, record, path)
        except (TypeError, ValueError, RuntimeError, OverflowError, LookupError) as err:
            said = "has a `{}` of the wrong attributes" if record.instance else "calls `{}` with the wrong arguments"
            raise DamagedError(f"it {said.format(record.maker.name)}") from err

    def _named(self, record: Global) -> Any:
        for table in (_DTYPES, FUNCTIONAL_OF if self._modules else {}):
            if record.name in table:
                return table[record.name]
        raise _unknown(record)

    def _module(self, record: Made, path: str) -> torch.nn.Module:
        cls = CLASS_OF.get(record.maker.name)
        if not self._modules and (cls or (type(record.state) is dict and "_modules" in record.state)):
            advice = ", which goes without `--factory`" if len(self._open) == 1 else ""
            raise HostileError(f"it {'is' if advice else 'holds'} a whole module ({_shown(record.maker)}){advice}")
        if cls is None:
            raise _unknown(record.maker)
        if record.arguments or record.items or record.appended or type(record.state) is not dict:
            raise HostileError(f"it makes a `{record.maker.name}` as torch.save never does")
        self._count += 1
        if self._count > MAX_MODULES:
            raise HostileError(f"it holds more than {MAX_MODULES} modules")
        state = {key: self._attribute(key, item, path) for key, item in record.state.items()}
        return make_module(cls, state, path)

    def _attribute(self, key: Any, record: Any, path: str) -> Any:
        if key != "_modules":
            return self.value(record, path)
        children = _table(record)
        if children is None:
            return self.value(record, path)  # `make_module` says what is wrong with it
        return {name: self.value(child, f"{path}.{name}".lstrip(".")) for name, child in children.items()}

    def ordered(self, record: Made, path: str) -> OrderedDict[Any, Any]:
        made = OrderedDict((key, self.value(item, path)) for key, item in _pairs(record))
        if record.state is not None:  # `_function` let no other through
            made._metadata = _versions(self.value(record.state["_metadata"], path))  # type: ignore[attr-defined]
        return made

    def tensor(self, record: Made, path: str) -> torch.Tensor:
        stored, offset, size, stride, requires_grad, hooks, *rest = record.arguments
        if not isinstance(stored, Stored):
            raise DamagedError("it holds a tensor without its bytes")
        dtype = None
        if record.maker.name.endswith("_v3"):
            dtype = self.value(rest.pop(0), path)
        metadata = self.value(rest[0], path) if rest else None
        _check_no_hooks(hooks, path)
        tensor = self._stored.tensor(stored.key, dtype, int(offset), tuple(size), tuple(stride))
        if metadata:
            if not isinstance(metadata, dict) or any(metadata[mark] is not True for mark in metadata):
                raise DamagedError("it holds a tensor with marks that are no marks")
            if not _LAZY.keys() >= metadata.keys():
                raise HostileError(f"it holds a tensor with the marks {sorted(map(str, metadata))}")
            for mark in metadata:
                tensor = _LAZY[mark](tensor)
        return tensor.requires_grad_(requires_grad is True)

    def parameter(self, record: Made, path: str) -> torch.nn.Parameter:
        data, requires_grad, hooks = record.arguments
        _check_no_hooks(hooks, path)
        return torch.nn.Parameter(self._only_tensor(data, path), requires_grad=requires_grad is True)

    def parameter_with_state(self, record: Made, path: str) -> torch.nn.Parameter:
        """Make a parameter that was saved with attributes of its own, without them."""
        *arguments, state = record.arguments
        self._check_attributes(state, path)
        return self.parameter(Made(record.maker, tuple(arguments), instance=False), path)

    def with_attributes(self, record: Made, path: str) -> torch.Tensor:
        """Make a tensor that was saved with attributes of its own, without them: torch.export leaves marks there."""
        function, kind, arguments, state = record.arguments
        self._check_attributes(state, path)
        if function not in _TENSORS or kind not in _TENSOR_CLASSES or not isinstance(arguments, tuple):
            raise HostileError("it holds a tensor of a class of its own")
        return self.tensor(Made(function, arguments, instance=False), path)

    def _check_attributes(self, state: Any, path: str) -> None:
        attributes = self.value(state, path)
        if not isinstance(attributes, dict) or any(map(callable, attributes.values())):
            raise HostileError(
                f"a tensor of {f'its module `{path}`' if path else 'the model itself'} has methods of its own"
            )

    def _only_tensor(self, record: Any, path: str) -> torch.Tensor:
        value = self.value(record, path)
        if not isinstance(value, torch.Tensor):
            raise DamagedError("it holds a parameter that is no tensor")
        return value.detach()

    def refused_tensor(self, record: Made, path: str) -> Any:
        kind = _REFUSED[record.maker.name]
        raise HostileError(f"it holds a {kind}, which graphopt does not read from files that are not trusted")

    def counter(self, record: Made, path: str) -> Counter[Any]:
        (counts,) = record.arguments
        if type(counts) is not dict or not all(type(count) is int for count in counts.values()):
            raise HostileError("it makes a counter of something other than numbers")
        return Counter(counts)

    def default_dictionary(self, record: Made, path: str) -> dict[Any, Any]:
        """Make what a dictionary holds that makes its missing values; nothing here asks for one that is missing."""
        return {key: self.value(item, path) for key, item in record.items}

    def queue(self, record: Made, path: str) -> list[Any]:
        match record.arguments:
            case () | ((), int()):  # nothing, and the most it may hold
                return [self.value(item, path) for item in record.appended]
        raise HostileError(f"it makes a `{record.maker.name}` as torch.save never does")

    def numpy(self, record: Made, path: str) -> Any:
        return numpy_records.CALLS[record.maker.name](record, lambda item: self.value(item, path))

    def encoded(self, record: Made, path: str) -> bytes:
        """Return bytes that are stored as text; once of a text that is shared."""
        text, encoding = record.arguments
        if encoding != "latin1" or type(text) is not str:
            raise HostileError("it encodes text otherwise than bytes are stored")
        if text not in self._encoded:
            self._encoded[text] = text.encode("latin1")
        return self._encoded[text]

    def function(self, record: Made, path: str) -> Any:
        """Return a functional of torch that is stored as an attribute of the class that torch keeps its own in."""
        owner, name = record.arguments
        found = FUNCTIONAL_OF.get(f"torch.{name}") if self._modules and owner == _FUNCTIONS else None
        if found is None:
            raise HostileError("it takes an attribute of something other than torch's own functions")
        return found

    def collection(self, record: Made, path: str) -> Any:
        (items,) = record.arguments
        kind: Any = {"set": set, "frozenset": frozenset}[record.maker.name.rpartition(".")[2]]
        if type(items) is not list or not all(type(item) in _SCALARS for item in items):
            raise HostileError("it holds a set of something other than text and numbers")
        return kind(items)


def _bytes(builder: _Builder, record: Made, path: str) -> bytes:
    (content,) = (builder.value(item, path) for item in record.arguments or (b"",))
    if type(content) is not bytes:
        raise HostileError("it makes bytes of something other than bytes")
    return content


def _device(_: _Builder, record: Made, __: str) -> torch.device:
    name = ":".join(map(str, record.arguments))
    if not _DEVICE.fullmatch(name):
        raise DamagedError("it names a device that there is not")
    return torch.device(name)


def _size(_: _Builder, record: Made, __: str) -> torch.Size:
    (sizes,) = record.arguments
    if not all(type(size) is int for size in sizes):
        raise DamagedError("it holds a shape of something other than numbers")
    return torch.Size(sizes)


def _complex(_: _Builder, record: Made, __: str) -> complex:
    real, imaginary = record.arguments
    if type(real) is not float or type(imaginary) is not float:
        raise DamagedError("it holds a complex number of something other than numbers")
    return complex(real, imaginary)


_ORDERED = "collections.OrderedDict"
_DEFAULT = "collections.defaultdict"
_QUEUE = "collections.deque"
_REFUSED = {
    "torch._utils._rebuild_sparse_tensor": "sparse tensor",
    "torch._utils._rebuild_qtensor": "quantized tensor",
    "torch._utils._rebuild_meta_tensor_no_storage": "meta tensor, a shape without values",
}
_FUNCTIONS = Global("torch._C._VariableFunctionsClass")
_LAZY: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"conj": torch.conj, "neg": torch.neg}
_TENSORS = (Global("torch._utils._rebuild_tensor_v2"), Global("torch._utils._rebuild_tensor_v3"))
_TENSOR_CLASSES = (Global("torch.Tensor"), Global("torch._tensor.Tensor"))
_CALLS: dict[str, Callable[[_Builder, Made, str], Any]] = {
    _ORDERED: _Builder.ordered,
    **{known.name: _Builder.tensor for known in _TENSORS},
    "torch._tensor._rebuild_from_type_v2": _Builder.with_attributes,
    "torch._utils._rebuild_parameter": _Builder.parameter,
    "torch._utils._rebuild_parameter_with_state": _Builder.parameter_with_state,
    **dict.fromkeys(_REFUSED, _Builder.refused_tensor),
    **dict.fromkeys(numpy_records.CALLS, _Builder.numpy),
    _DEFAULT: _Builder.default_dictionary,
    _QUEUE: _Builder.queue,
    "collections.Counter": _Builder.counter,
    "builtins.getattr": _Builder.function,
    "builtins.set": _Builder.collection,
    "builtins.frozenset": _Builder.collection,
    "builtins.complex": _complex,
    "builtins.bytes": _bytes,
    "builtins.bytearray": _bytes,
    "_codecs.encode": _Builder.encoded,
    "torch.Size": _size,
    "torch.device": _device,
    "torch.serialization._get_layout": lambda _, record, __: _LAYOUTS[record.arguments[0]],
}


def _function(record: Made) -> Callable[[_Builder, Made, str], Any]:
    """Return what does a call's work, if nothing is done to its result that no file of torch does."""
    name = record.maker.name
    if name not in _CALLS:
        raise _unknown(record.maker)
    if record.items and name not in (_ORDERED, _DEFAULT):
        raise HostileError(f"it puts items into what `{name}` returns")
    if record.appended and name != _QUEUE:
        raise HostileError(f"it appends to what `{name}` returns")
    if record.state is not None and name not in numpy_records.STATEFUL and not _is_version_data(record):
        raise HostileError(f"it keeps attributes in what `{name}` returns, which is no plain data")
    return _CALLS[name]


def _table(record: Any) -> Mapping[Any, Any] | None:
    """Return the records of a plain or ordered dictionary, None for anything else."""
    if isinstance(record, dict):
        return record
    if isinstance(record, Made) and record.maker.name == _ORDERED and not record.instance:
        return dict(_pairs(record)) if record.state is None and not record.appended else None
    return None


def _pairs(record: Made) -> list[tuple[Any, Any]]:
    """Return the records of an ordered dictionary; its keys are hashed at once."""
    given = record.arguments[0] if record.arguments else []
    plain = type(given) is list and len(record.arguments) < 2
    pairs: list[Any] = [*given, *record.items] if plain else []
    if not plain or not all(type(pair) in (tuple, list) and len(pair) == 2 and is_key(pair[0]) for pair in pairs):
        raise HostileError("it makes an ordered dictionary as torch.save never does")
    return [(key, value) for key, value in pairs]


def _is_version_data(record: Made) -> bool:
    """Whether the attributes are those that `Module.state_dict` gives its dictionary: versions of modules."""
    return record.maker.name == _ORDERED and isinstance(record.state, dict) and set(record.state) == {"_metadata"}


def _versions(found: Any) -> dict[str, dict[str, Any]]:
    """Return what a state dict says of each module, by the module's name: its version, and numbers of its hooks."""
    if not _is_table_of(found, lambda entry: _is_table_of(entry, _is_note)):
        raise HostileError("it keeps something other than versions of modules in the `_metadata` of a state dict")
    # what `load_state_dict(..., assign=True)` writes there says how that loaded
    marked = "assign_to_params_buffers"
    return {name: {key: note for key, note in entry.items() if key != marked} for name, entry in found.items()}


def _is_note(value: Any) -> bool:
    return type(value) in (bool, int, float, str, type(None)) or _is_table_of(value, _is_note)


def _is_table_of(value: Any, good: Callable[[Any], bool]) -> bool:
    return isinstance(value, dict) and all(type(key) is str and good(item) for key, item in value.items())


def _check_no_hooks(hooks: Any, path: str) -> None:
    found = _table(hooks)
    if hooks is not None and (found is None or found):
        raise HostileError(f"a tensor of {f'its module `{path}`' if path else 'the model itself'} carries hooks")


def _unknown(record: Global) -> HostileError:
    return HostileError(
        f"it needs {_shown(record)}, which is not among the classes and functions that graphopt reads from files "
        "that are not trusted"
    )


def _shown(record: Global) -> str:
    return f"`{cut(printable(record.name), 120)}`"
