"""Pickles whose every name is one that torch.save writes, and that attack what reads them."""

from __future__ import annotations

import codecs
import pickle
import sys
import tracemalloc
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from graphopt.errors import LoadError
from graphopt.loading import load_model, pickles
from graphopt.loading.stock_modules import CLASSES

PROTOCOL = b"\x80\x02"


def named(name: str) -> bytes:
    module, _, attribute = name.rpartition(".")
    return f"c{module}\n{attribute}\n".encode()


def text(value: str) -> bytes:
    return b"X" + len(value.encode()).to_bytes(4, "little") + value.encode()


def row(*items: bytes) -> bytes:
    return b"(" + b"".join(items) + b"t"


def called(name: str, *arguments: bytes) -> bytes:
    return named(name) + row(*arguments) + b"R"


def plain(value: Any) -> bytes:
    return pickle.dumps(value, protocol=2)[2:-1]


def with_state(made: bytes, **state: bytes) -> bytes:
    return made + b"}(" + b"".join(text(key) + value for key, value in state.items()) + b"ub"


def instance(name: str) -> bytes:
    return named(name) + b")\x81"


LINEAR = "torch.nn.modules.linear.Linear"
IDENTITY = "torch.nn.modules.linear.Identity"
EMPTY_MODULE = {"training": b"\x89", "_parameters": b"}", "_buffers": b"}", "_modules": b"}"}


def identity(**attributes: bytes) -> bytes:
    return with_state(instance(IDENTITY), **EMPTY_MODULE, **attributes)


def encoded(content: str) -> bytes:
    return called("_codecs.encode", text(content), text("latin1"))


def numpy_type(name: str, order: str = "<") -> bytes:
    state = row(plain(3), text(order), b"N", b"N", b"N", plain(-1), plain(-1), plain(0))
    return called("numpy.dtype", text(name), b"\x89", b"\x88") + state + b"b"


def numpy_array(shape: tuple[int, ...], content: bytes, of: str = "numpy.ndarray") -> bytes:
    made = called("numpy._core.multiarray._reconstruct", named(of), plain((0,)), encoded("b"))
    return made + row(plain(1), plain(shape), numpy_type("f4"), b"\x89", content) + b"b"


DOUBLED = b")" + b"".join(b"q" + bytes([n]) + b"h" + bytes([n]) + b"\x86" for n in range(60))
ATTACKS: dict[str, bytes] = {
    # setattr on any object: what torch calls `as_subclass` of is a module with such an attribute
    "setattr": called(
        "torch._tensor._rebuild_from_type_v2",
        named(IDENTITY),
        named("torch._tensor.Tensor"),
        row(identity(as_subclass=named("torch.nn.functional.relu"))),
        b"}",
    ),
    "getitem": called("torch.serialization._get_layout.cache", text("torch.strided")),
    "getattr": called("torch.nn.modules.container.ParameterDict", plain({"a": 1})),
    "deepcopy": called("torch.nn.modules.transformer.TransformerEncoder", identity(), plain(2)),
    "the class itself": with_state(named(LINEAR), forward=named("torch.nn.functional.relu")),
    "a method of a class": with_state(called("collections.OrderedDict"), forward=named("torch.nn.functional.relu")),
    "a module called": called(LINEAR, plain(1), plain(2)),
    "memory": called("__builtin__.bytearray", plain(2**31 - 1)),
    "memory of a tensor": called(
        "torch._utils._rebuild_tensor_v2",
        row(text("storage"), named("torch.FloatStorage"), text("0"), text("cpu"), plain(2**40)) + b"Q",
        *(plain(0), plain((2**40,)), plain((1,)), b"\x89", called("collections.OrderedDict")),
    ),
    "memory of an expanded tensor": called(
        "torch._utils._rebuild_tensor_v2",
        row(text("storage"), named("torch.FloatStorage"), text("0"), text("cpu"), plain(1)) + b"Q",
        *(plain(0), plain((2**40,)), plain((0,)), b"\x89", called("collections.OrderedDict")),
    ),
    "a tensor beyond its bytes": called(
        "torch._utils._rebuild_tensor_v2",
        row(text("storage"), named("torch.FloatStorage"), text("0"), text("cpu"), plain(1)) + b"Q",
        *(plain(0), plain((2,)), plain((1,)), b"\x89", called("collections.OrderedDict")),
    ),
    "a member outside": called(
        "torch._utils._rebuild_tensor_v2",
        row(text("storage"), named("torch.FloatStorage"), text("../version"), text("cpu"), plain(1)) + b"Q",
        *(plain(0), plain((1,)), plain((1,)), b"\x89", called("collections.OrderedDict")),
    ),
    "a long text": b"X\xff\xff\xff\x7f" + b"a",
    "doubled tuples": DOUBLED,
    "doubled tuples as a key": b"}(" + DOUBLED + b"K\x01u",
    "doubled tuples in a module": identity(extra=DOUBLED),
    "doubled tuples as a key of an argument": called(
        "collections.OrderedDict", b"](" + DOUBLED + b"K\x01\x86e"
    ),
    "a record as a key": called("collections.OrderedDict", b"](" + called("collections.OrderedDict") + b"K\x01\x86e"),
    "an ordered dictionary of numbers": called("collections.OrderedDict", plain([1])),
    "an ordered dictionary of nothing": called("collections.OrderedDict", plain([[]])),
    "a layout of nothing": called("torch.serialization._get_layout"),
    "a parameter of nothing": called("torch._utils._rebuild_parameter_with_state"),
    "a child called training": with_state(
        instance(IDENTITY), **{**EMPTY_MODULE, "_modules": b"}" + text("training") + identity() + b"s"}
    ),
    "a part called forward": with_state(
        instance(IDENTITY), **{**EMPTY_MODULE, "_buffers": b"}" + text("forward") + b"Ns"}
    ),
    "a list in itself": b"]q\x00h\x00a",
    "a module in itself": instance(IDENTITY)
    + b"q\x01}("
    + b"".join(text(key) + value for key, value in EMPTY_MODULE.items() if key != "_modules")
    + text("_modules")
    + b"}"
    + text("a")
    + b"h\x01sub",
    "nesting": b"]" * 5000 + b"a" * 4999,
    "another protocol": b"\x80\x04\x95" + (20).to_bytes(8, "little") + b"\x8c\x02os\x8c\x06system\x93.",
    "a long row of bytes": b"\x80\x04\x8e" + (2**62).to_bytes(8, "little") + b"a.",
    "a long array of bytes": b"\x80\x05\x96" + (2**62).to_bytes(8, "little") + b"a.",
    "a set of doubled tuples": b"\x80\x04\x8f(" + DOUBLED + b"\x90.",
    "items for a set of nothing": b"\x80\x04" + called("builtins.set") + b"(K\x01\x90.",
    "a call by keyword": b"\x80\x04" + named(LINEAR) + b")}\x92.",
    "a name that is no text": b"\x80\x04K\x01K\x02\x93.",
    "an attribute of the class itself": called("__builtin__.getattr", named(LINEAR), text("forward")),
    "an attribute of torch": called(
        "__builtin__.getattr", named("torch._C._VariableFunctionsClass"), text("from_file")
    ),
    "a counter of layers": called("collections.Counter", b"}" + text("a") + identity() + b"s"),
    "missing values from a function": called("collections.defaultdict", named("os.getcwd")) + b"(" + identity() + b"Nu",
    "marks of doubled tuples": called(
        "torch._utils._rebuild_tensor_v2",
        row(text("storage"), named("torch.FloatStorage"), text("0"), text("cpu"), plain(1)) + b"Q",
        *(plain(0), plain((1,)), plain((1,)), b"\x89", called("collections.OrderedDict"), DOUBLED),
    ),
    "a queue of one row": called("collections.deque", plain([1])),
    "a queue with attributes": with_state(called("collections.deque"), append=named("os.system")),
    "a queue in itself": called("collections.deque") + b"q\x00h\x00a",
    "a queue of functions": called("collections.deque") + named("os.system") + b"a",
    "a counter that is appended to": called("collections.Counter", b"}") + b"K\x01a",
    "a module that is appended to": identity() + b"K\x01a",
    "children that are appended to": with_state(
        instance(IDENTITY), **{**EMPTY_MODULE, "_modules": called("collections.OrderedDict") + b"K\x01a"}
    ),
    "a function that is appended to": named("torch.nn.functional.relu") + b"K\x01a",
    "a type of objects": numpy_type("O8", "|"),
    "a type of texts": numpy_type("U8"),
    "a type of many numbers": numpy_type("f4,(1000000000,)f4"),
    "a type that is a function": called("numpy.dtype", named("os.system"), b"\x89", b"\x88"),
    "a type without a state": called("numpy.dtype", text("f4"), b"\x89", b"\x88"),
    "a type with fields": called("numpy.dtype", text("f4"), b"\x89", b"\x88")
    + row(plain(3), text("<"), b"N", plain(("a",)), plain({"a": 1}), plain(4), plain(1), plain(16))
    + b"b",
    "a number of too few bytes": called("numpy._core.multiarray.scalar", numpy_type("f8"), encoded("1234")),
    "a number of an object": called("numpy._core.multiarray.scalar", numpy_type("f8"), named("os.system")),
    "a number of no type": called("numpy._core.multiarray.scalar", plain(1), encoded("1234")),
    "a number with a state": with_state(
        called("numpy._core.multiarray.scalar", numpy_type("f4"), encoded("1234")), item=named("os.system")
    ),
    "a truth value of two": called("numpy._core.multiarray.scalar", numpy_type("b1", "|"), encoded("\x02")),
    "an array of nothing": called("numpy._core.multiarray._reconstruct"),
    "an array without a state": called(
        "numpy._core.multiarray._reconstruct", named("numpy.ndarray"), plain((0,)), encoded("b")
    ),
    "an array of another class": numpy_array((1,), encoded("1234"), of="torch.Tensor"),
    "an array of a file": numpy_array((1,), encoded("1234"), of="numpy.memmap"),
    "an array of objects": numpy_array((1,), b"]" + named("os.system") + b"a"),
    "memory of an array": numpy_array((2**40,), encoded("1234")),
    "a negative array": numpy_array((-1, -1), encoded("1234")),
    "an array of many axes": numpy_array((1,) * 90, encoded("1234")),
    "an array of no bytes without end": numpy_array((0, 2**62, 2**62), encoded("")),
    "an array in no order": called(
        "numpy._core.numeric._frombuffer", encoded("1234"), numpy_type("f4"), plain((1,)), text("K")
    ),
    "an array among the tensors": with_state(
        instance(IDENTITY), **{**EMPTY_MODULE, "_buffers": b"}" + text("a") + numpy_array((1,), encoded("1234")) + b"s"}
    ),
    "an array as an attribute": identity(extra=numpy_array((1,), encoded("1234"))),
    "bytes of one text again and again": b"](" + text("a" * 2**18) + b"q\x07"
    + called("_codecs.encode", b"h\x07", text("latin1")) * 100
    + named("os.system") + b"e",
    "an opcode of text": b"cos\nsystem\n(S'true'\ntR",
    "an instance of old classes": b"(ios\nsystem\n",
    "an extension": b"\x82\x01",
    "hooks": identity(_forward_hooks=plain({0: 1})),
    "hooks that are none": identity(_forward_hooks=text("x")),
    "a layer that is half made": with_state(instance(LINEAR), **EMPTY_MODULE, in_features=plain(1)),
    "recurrent weights without end": with_state(
        instance("torch.nn.modules.rnn.LSTM"),
        **EMPTY_MODULE,
        num_layers=plain(2**31 - 1),
        bidirectional=b"\x88",
        _all_weights=plain([[1]]),
    ),
    "a name of something else": with_state(
        instance("torch.nn.modules.rnn.LSTM"),
        **EMPTY_MODULE,
        _flat_weights_names=plain(["__class__"]),
        _all_weights=plain([["__class__"]]),
    ),
    **{
        f"{key} that is {value}": with_state(
            instance(name), **{**EMPTY_MODULE, **more, key: plain(value)}
        )
        for name, key, more in (
            (IDENTITY, "_non_persistent_buffers_set", {}),
            ("torch.nn.modules.container.ParameterDict", "_keys", {}),
            ("torch.nn.modules.rnn.LSTM", "_flat_weights_names", {"_all_weights": plain([[]])}),
        )
        for value in (5, [[1]], [None], "name", {1: 2})
    },
}  # fmt: skip


def snapshot(folder: Path) -> dict[str, Any]:
    """Everything that an attack could have changed."""
    classes = {cls: dict(vars(cls)) for cls in (*CLASSES, nn.Module, torch.Tensor, nn.Parameter)}
    return {"modules": set(sys.modules), "classes": classes, "files": sorted(folder.rglob("*"))}


@pytest.fixture
def unchanged(tmp_path: Path) -> Iterator[dict[str, Any]]:
    load_all_of(tmp_path)
    codecs.lookup("cp437")  # zipfile reads names of members by it
    before = snapshot(tmp_path)
    yield before
    after = snapshot(tmp_path)
    assert after.pop("modules") - before.pop("modules") == set()
    assert after == before


def load_all_of(folder: Path) -> None:
    """Write the attacks; load a good file first, so that what loading imports is there."""
    torch.save(nn.Sequential(nn.Linear(1, 1)), folder / "good.pt")
    load_model(folder / "good.pt")
    (folder / "good.pt").unlink()
    for name, attack in ATTACKS.items():
        pickled = attack if attack.startswith(b"\x80") else PROTOCOL + attack + b"."
        for suffix, content in (("", pickled), (" inside", PROTOCOL + b"}" + text("a") + pickled[2:-1] + b"s.")):
            with zipfile.ZipFile(folder / f"{name}{suffix}.pt", "w") as archive:
                archive.writestr("archive/data.pkl", content)
                archive.writestr("archive/version", "3\n")
                archive.writestr("archive/byteorder", "little")
                archive.writestr("archive/data/0", bytes(4))


def test_each_attack_is_refused_and_changes_nothing(tmp_path: Path, unchanged: dict[str, Any]) -> None:
    refused = {}
    tracemalloc.start()
    for path in sorted(tmp_path.glob("*.pt")):
        with pytest.raises(LoadError) as caught:
            load_model(path)
        refused[path] = str(caught.value)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(refused) == 2 * len(ATTACKS)
    for path, message in refused.items():
        assert message.startswith((f"Refused to load `{path}`", f"Cannot load `{path}`"))
        assert "\n" not in message
    assert peak < 2**24


@pytest.mark.parametrize(
    ("maker", "shared"), [("collections.Counter", dict.fromkeys(range(100), 1)), ("builtins.set", [*range(100)])]
)
def test_what_a_call_copies_of_a_shared_value_counts(
    maker: str, shared: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = b"](" + plain(shared) + b"q\xff" + called(maker, b"h\xff") * 20 + b"e"
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        archive.writestr("archive/data.pkl", PROTOCOL + content + b".")
    with pytest.raises(LoadError, match="holds a list, not a model"):
        load_model(tmp_path / "a.pt")
    monkeypatch.setattr(pickles, "MAX_SIZE", 1000)
    with pytest.raises(LoadError, match="more than 1000 values"):
        load_model(tmp_path / "a.pt")


@pytest.mark.parametrize("attack", ["setattr", "memory", "deepcopy"])
def test_weights_are_read_the_same_way(attack: str, tmp_path: Path, unchanged: dict[str, Any]) -> None:
    with pytest.raises(LoadError, match="not weights alone"):
        load_model(tmp_path / f"{attack} inside.pt", factory=f"{__name__}:linear")


def linear() -> nn.Module:
    return nn.Linear(1, 1)
