"""Tensors of `torch.save` files, held against torch's own reader."""

from __future__ import annotations

import io
import re
from collections import Counter, OrderedDict, defaultdict, deque
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from graphopt.loading import pickles, stored_tensors
from graphopt.loading.pickles import load_plain_pickle, load_stock_pickle
from graphopt.loading.refusal import DamagedError, HostileError

OLD = (
    *(torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
)
NEW = (torch.float8_e4m3fn, torch.uint16)  # torch writes them into archives only


def written(value: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def theirs(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), weights_only=True)


@pytest.mark.parametrize(
    ("dtype", "zipped"), [*((t, zipped) for t in OLD for zipped in (True, False)), *((t, True) for t in NEW)], ids=str
)
def test_each_type_in_both_formats(dtype: torch.dtype, zipped: bool) -> None:
    base = (torch.rand(4, 6) * 4).to(dtype)
    value = {
        "whole": base,
        "view": base[1:, ::2].T,
        "again": base,
        "empty": base[:0],
        "one": base[0, 0],
        "expanded": base[0].expand(3, 6),
        "parameter": nn.Parameter(base, requires_grad=False),
    }
    data = written(value, _use_new_zipfile_serialization=zipped)
    found, wanted = load_plain_pickle(data), theirs(data)
    assert list(found) == list(wanted)
    for name, tensor in wanted.items():
        bits = found[name].contiguous().reshape(-1).view(torch.uint8), tensor.contiguous().reshape(-1).view(torch.uint8)
        assert torch.equal(*bits), name
        assert (found[name].dtype, found[name].shape, found[name].stride()) == (
            tensor.dtype,
            tensor.shape,
            tensor.stride(),
        )
    assert found["whole"] is found["again"]
    assert found["view"].untyped_storage().data_ptr() == found["whole"].untyped_storage().data_ptr()


WRITTEN: tuple[dict[str, Any], ...] = (
    {},
    {"_use_new_zipfile_serialization": False},
    *({"pickle_protocol": protocol} for protocol in (3, 4, 5)),
    *({"_use_new_zipfile_serialization": False, "pickle_protocol": protocol} for protocol in (3, 4, 5)),
)


@pytest.mark.parametrize("options", WRITTEN, ids=str)
def test_plain_data_beside_tensors(options: dict[str, Any]) -> None:
    value = {
        "epoch": 3,
        "best": 0.5,
        "name": "m\u00fcller",
        "none": None,
        "bytes": b"\xff\x00",
        "large": 2**70,
        "complex": 1 + 2j,
        "shape": torch.Size([1, 2]),
        "type": torch.float16,
        "set": {1, 2},
        "frozen": frozenset({"a"}),
        "no bytes": b"",
        "milestones": Counter([30, 30, 60]),
        "row": (1, [2, {3: "a"}]),
        "ordered": OrderedDict(b=1, a=2),
        "conjugate": torch.randn(3, dtype=torch.complex64).conj(),
        "negated": torch.randn(3, dtype=torch.complex64).conj().imag,
        "state": nn.BatchNorm1d(3).state_dict(),
    }
    data = written(value, **options)
    found, wanted = load_plain_pickle(data), torch.load(io.BytesIO(data), weights_only=False)
    assert all(torch.equal(found.pop(name), wanted.pop(name)) for name in ("conjugate", "negated"))
    state, expected = found.pop("state"), wanted.pop("state")
    assert list(state) == list(expected)
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    assert found == wanted
    assert list(map(type, found.values())) == list(map(type, wanted.values()))


@pytest.mark.parametrize("options", WRITTEN, ids=str)
def test_what_comes_back_as_what_it_holds(options: dict[str, Any]) -> None:
    marked = nn.Parameter(torch.ones(2))
    marked.no_weight_decay = True  # type: ignore[attr-defined]
    lists = defaultdict(list, a=[1])
    found = load_plain_pickle(written({"lists": lists, "state": bytearray(b"\x01\xff"), "marked": marked}, **options))
    assert (found["lists"], found["state"]) == ({"a": [1]}, b"\x01\xff")
    assert isinstance(found["marked"], nn.Parameter)
    assert torch.equal(found["marked"], marked)
    assert not vars(found["marked"])


@pytest.mark.parametrize("options", WRITTEN, ids=str)
def test_queues_are_lists(options: dict[str, Any]) -> None:
    queues = {"last": deque([0.5, 0.25], maxlen=2), "all": deque([{"a": 1}]), "none": deque()}
    assert load_plain_pickle(written(queues, **options)) == {"last": [0.5, 0.25], "all": [{"a": 1}], "none": []}


@pytest.mark.parametrize("options", WRITTEN, ids=str)
def test_numbers_of_numpy(options: dict[str, Any]) -> None:
    scalars = [np.float64(0.1), np.float32(0.5), np.int64(-3), np.uint8(200), np.bool_(True), np.complex128(1 + 2j)]
    square = np.arange(6, dtype=np.float16).reshape(2, 3)
    arrays = [square, np.asfortranarray(square), np.ones(()), np.zeros((0, 4), np.int32), np.arange(4)[::2]]
    found = load_plain_pickle(written({"scalars": scalars, "arrays": arrays}, **options))
    assert found["scalars"] == [value.item() for value in scalars]
    assert [*map(type, found["scalars"])] == [float, float, int, int, bool, complex]
    for ours, theirs in zip(found["arrays"], arrays, strict=True):
        np.testing.assert_array_equal(ours, theirs, strict=True)


def test_numbers_of_numpy_before_version_2() -> None:
    written_by = written({"a": np.arange(3), "b": np.float64(2)}, _use_new_zipfile_serialization=False)
    found = load_plain_pickle(written_by.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n"))
    assert (found["a"].tolist(), found["b"]) == ([0, 1, 2], 2)


@pytest.mark.parametrize("options", WRITTEN, ids=str)
def test_modules_of_every_format(options: dict[str, Any]) -> None:
    relu, tanh = (nn.TransformerEncoderLayer(4, 1, 4, activation=function) for function in (torch.relu, torch.tanh))
    numbers = nn.ParameterDict({"weight": torch.ones(2), "epsilon": 1e-3})
    synced = nn.SyncBatchNorm.convert_sync_batchnorm(nn.BatchNorm2d(4))
    model = nn.Sequential(relu, tanh, numbers, synced).eval()
    found = load_stock_pickle(written(model, **options))
    x, image = torch.randn(2, 3, 4), torch.randn(2, 4, 3, 3)
    assert all(torch.equal(ours(x), layer(x)) for ours, layer in zip(found[:2], model[:2], strict=True))
    assert (found[1].activation, found[2]["epsilon"]) == (torch.tanh, 1e-3)
    assert torch.equal(found[3](image), synced(image))


class Rows(list[int]):
    """A list of a class of its own."""


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (torch.eye(2).to_sparse(), "sparse tensor"),
        (torch.empty(2, device="meta"), "it holds a meta tensor, a shape without values, which"),
        (nn.Linear(1, 1), "it holds a whole module (`torch.nn.modules.linear.Linear`)"),
        (np.array(["a"]), "something of NumPy other than numbers"),
        (np.array([None]), "something of NumPy other than numbers"),
        (np.zeros(2, [("a", "f4")]), "something of NumPy other than numbers"),
        (np.zeros(2, ">f4"), "something of NumPy other than numbers"),
        (np.array([True, False]), "truth values of NumPy"),
        (Rows([1]), f"{__name__}.Rows"),
        (Path("a"), "pathlib"),
    ],
)
def test_what_is_no_plain_data_is_named(value: object, reason: str) -> None:
    with pytest.raises(HostileError, match=re.escape(reason)):
        load_plain_pickle(written({"a": value}))


@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_that_is_cut_off_anywhere(zipped: bool) -> None:
    data = written({"a": torch.ones(3), "b": torch.ones(2).long()}, _use_new_zipfile_serialization=zipped)
    for length in range(20, len(data) - 1, 37):
        with pytest.raises((DamagedError, HostileError)):
            load_plain_pickle(data[:length])


def test_elements_that_are_repeated_count_together(monkeypatch: pytest.MonkeyPatch) -> None:
    data = written({name: torch.ones(1).expand(60) for name in "ab"})
    assert load_plain_pickle(data)["a"].shape == (60,)
    monkeypatch.setattr(stored_tensors, "MAX_REPEATED", 100)
    with pytest.raises(HostileError, match="repeat the few elements they have to 120"):
        load_plain_pickle(data)


def test_truth_values_are_checked_once_however_many_views_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of 10 MB with 50,000 views of it took minutes."""
    values = torch.arange(12) % 3 == 0
    checked, real = [], torch.Tensor.any
    monkeypatch.setattr(torch.Tensor, "any", lambda tensor: checked.append(len(tensor)) or real(tensor))
    found = load_plain_pickle(written([values[start:] for start in range(10)]))
    assert torch.equal(found[3], values[3:])
    assert checked == [12]


def test_modules_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    data = written(nn.Sequential(*(nn.ReLU() for _ in range(5))))
    assert len(load_stock_pickle(data)) == 5
    monkeypatch.setattr(pickles, "MAX_MODULES", 4)
    with pytest.raises(HostileError, match="more than 4 modules"):
        load_stock_pickle(data)
