"""Data: every form in, the same batches out; what does not fit ends in one sentence."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, TensorDataset

from graphopt.data import InputSpec, Samples, parse_input_spec
from graphopt.errors import DataError, UsageError

X = torch.arange(60.0).reshape(10, 2, 3)
MASK = torch.arange(10) % 2
Y = torch.arange(10) % 3
SPEC_X = InputSpec("x", (1, 2, 3))
SPEC_MASK = InputSpec("mask", (1,), torch.int64)


def gathered(samples: Samples, batch_size: int = 4, **options: Any) -> tuple[torch.Tensor, ...]:
    """Return all samples of all batches, joined."""
    return tuple(torch.cat(parts) for parts in zip(*samples.batches(batch_size, **options), strict=True))


def same(samples: Samples, *expected: torch.Tensor) -> None:
    """Assert that the samples are exactly these tensors, however they are cut, and twice."""
    for batch_size in (1, 3, 4, 10, 99):
        sizes = [batch[0].shape[0] for batch in samples.batches(batch_size)]
        assert sizes[:-1] == [batch_size] * (len(sizes) - 1)
        found = gathered(samples, batch_size)
        assert len(found) == len(expected)
        for tensor, want in zip(found, expected, strict=True):
            assert torch.equal(tensor, want)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A folder with one file of each kind."""
    np.savez(tmp_path / "named.npz", x=X.numpy(), mask=MASK.numpy(), labels=Y.numpy())
    np.savez_compressed(tmp_path / "unnamed.npz", X.numpy(), MASK.numpy())
    np.save(tmp_path / "x.npy", X.numpy())
    safetensors.torch.save_file({"x": X, "mask": MASK, "y": Y}, tmp_path / "all.safetensors")
    return tmp_path


def generator() -> Iterator[torch.Tensor]:
    yield from X.split(3)


# --- forms


@pytest.mark.parametrize(
    "source",
    [
        X,
        X.numpy(),
        (X,),
        {"x": X},
        {"x": X.numpy(), "labels": Y},
        (X, Y),
        DataLoader(TensorDataset(X), batch_size=3),
        DataLoader(TensorDataset(X, Y), batch_size=3),
        [X[:4], X[4:]],
        [{"x": X[:7]}, {"x": X[7:]}],
        [(X[:7], Y[:7]), (X[7:], Y[7:])],
        [([X], Y)],
        [({"x": X}, Y)],
        generator,
        X.flip(0).numpy()[::-1],
        X.numpy().astype(">f4"),
    ],
    ids=lambda source: type(source).__name__,
)
def test_one_input(source: Any) -> None:
    same(Samples.open(source, ["x"]), X)


@pytest.mark.parametrize("name", ["named.npz", "unnamed.npz", "all.safetensors"])
def test_files_of_two_inputs(files: Path, name: str) -> None:
    same(Samples.open(files / name, ["x", "mask"]), X, MASK)
    same(Samples.open(str(files / name), ["x", "mask"]).check([SPEC_X, SPEC_MASK]), X, MASK)


def test_by_name_takes_the_models_order(files: Path) -> None:
    same(Samples.open(files / "named.npz", ["mask", "x"]), MASK, X)


def test_npy(files: Path) -> None:
    same(Samples.open(files / "x.npy", ["anything"]), X)


def test_one_shot_iterator_can_be_gone_through_again() -> None:
    same(Samples.open(generator(), ["x"]), X)


def test_function_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "calibration_batches.py").write_text(
        "import torch\nX = torch.arange(60.0).reshape(10, 2, 3)\n"
        "def batches():\n    yield from X.split(3)\ndef whole():\n    return {'x': X}\n"
        "def broken():\n    raise RuntimeError('disk gone')\n"
    )
    monkeypatch.chdir(tmp_path)
    same(Samples.open("calibration_batches:batches", ["x"]), X)
    same(Samples.open("calibration_batches:whole", ["x"]), X)
    with pytest.raises(DataError, match="raised RuntimeError: disk gone"):
        Samples.open("calibration_batches:broken", ["x"])
    with pytest.raises(UsageError, match="Did you mean `batches`"):
        Samples.open("calibration_batches:batchs", ["x"])


def test_folder_of_chunks_streams(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, part in enumerate(X.split(4)):
        np.savez(tmp_path / f"part{number}.npz", x=part.numpy(), y=Y[4 * number : 4 * number + 4].numpy())
    (tmp_path / "README.txt").write_text("not data")
    samples = Samples.open(tmp_path, ["x"])
    same(samples, X)
    assert samples.count == 10
    assert samples.labels is not None
    assert torch.equal(samples.labels, Y)
    opened: list[str] = []
    real = zipfile.ZipFile
    monkeypatch.setattr(zipfile, "ZipFile", lambda path: opened.append(Path(path).name) or real(path))
    samples.first(2)
    assert set(opened) == {"part0.npz"}


def test_folder_with_one_array_per_input(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", X.numpy())
    np.save(tmp_path / "mask.npy", MASK.numpy())
    np.save(tmp_path / "labels.npy", Y.numpy())
    samples = Samples.open(tmp_path, ["x", "mask"])
    same(samples, X, MASK)
    assert samples.labels is not None


@given(st.lists(st.integers(0, 5), min_size=1, max_size=8).filter(sum), st.integers(1, 9), st.integers(1, 20))
def test_rebatching_keeps_every_sample_in_order(lengths: list[int], batch_size: int, limit: int) -> None:
    total = sum(lengths)
    data = list(torch.arange(total).split(lengths))
    labelled = [(part[:, None].float(), part) for part in data]
    batches = list(Samples.open(labelled, ["x"]).labelled_batches(batch_size, limit))
    wanted = min(limit, total)
    assert [len(labels) for _, labels in batches if labels is not None] == [
        min(batch_size, wanted - start) for start in range(0, wanted, batch_size)
    ]
    assert torch.equal(torch.cat([labels for _, labels in batches if labels is not None]), torch.arange(wanted))
    assert torch.equal(torch.cat([inputs[0][:, 0] for inputs, _ in batches]).long(), torch.arange(wanted))


# --- labels


@pytest.mark.parametrize("key", ["labels", "label", "y", "target"])
def test_labels_by_name(tmp_path: Path, key: str) -> None:
    np.savez(tmp_path / "d.npz", **{"x": X.numpy(), key: Y.numpy()})
    samples = Samples.open(tmp_path / "d.npz", ["x"])
    assert samples.labels is not None
    assert torch.equal(samples.labels, Y)
    for inputs, labels in samples.labelled_batches(3):
        assert labels is not None
        assert torch.equal(Y[inputs[0][:, 0, 0].long() // 6], labels)


def test_input_called_labels_is_an_input(tmp_path: Path) -> None:
    same(Samples.open({"x": X, "labels": Y}, ["x", "labels"]), X, Y)


def test_element_after_the_inputs_is_noted() -> None:
    samples = Samples.open([(X, Y)], ["x"])
    assert samples.notes == ["the element after the inputs was taken as labels"]
    assert samples.labels is not None


def test_optional_inputs_do_not_swallow_labels() -> None:
    samples = Samples.open((X, Y), ["x", "mask"], required=1)
    assert samples.names == ("x",)
    assert Samples.open((X, MASK), ["x", "mask"], required=2).names == ("x", "mask")
    assert Samples.open({"x": X}, ["x", "mask"], required=1).names == ("x",)


def test_no_labels() -> None:
    assert Samples.open(X, ["x"]).labels is None


# --- limits


def test_samples_for_a_device_leave_the_others_where_they_are() -> None:
    samples = Samples.open(X, ["x"])
    there = samples.on(torch.device("meta"))
    there.notes.append("of these alone")
    assert [one.first(1)[0].device.type for one in (samples, there)] == ["cpu", "meta"]
    assert samples.notes == []


def test_limit_and_first() -> None:
    samples = Samples.open([X[:4], X[4:]], ["x"])
    assert torch.equal(gathered(samples, 3, limit=7)[0], X[:7])
    assert torch.equal(samples.first(6)[0], X[:6])
    assert samples.first(99)[0].shape[0] == 10


def test_limit_draws_no_more_than_needed() -> None:
    drawn = []

    def batches() -> Iterator[torch.Tensor]:
        for number in range(5):
            drawn.append(number)
            yield X

    samples = Samples.open(batches(), ["x"])
    samples.first(10)
    assert drawn == [0]
    gathered(samples, 4, limit=11)
    assert drawn == [0, 1]


def test_batches_of_unlike_lengths_are_not_joined() -> None:
    samples = Samples.open([torch.ones(3, 5), torch.ones(3, 7), torch.ones(2, 7)], ["ids"])
    assert [tuple(batch[0].shape) for batch in samples.batches(4)] == [(3, 5), (4, 7), (1, 7)]


def test_count(files: Path) -> None:
    assert Samples.open(files / "x.npy", ["x"]).count == 10
    assert Samples.open(X, ["x"]).count == 10
    assert Samples.open([X], ["x"]).count is None


# --- what does not fit


@pytest.mark.parametrize(
    ("data", "specs", "reason"),
    [
        ({"x": X[:, 0]}, [SPEC_X], "takes Nx2x3 float32, but the data has Nx3 float32. The first axis must count"),
        ({"x": X[..., None, None]}, [SPEC_X], "Reshape the data to 3 axes"),
        ({"x": X[:, :, :2]}, [SPEC_X], "let that axis vary where the model is captured: --dynamic x:2, or dynamic"),
        (
            {"x": X[:, :, :2], "y": X[:, 0, :2, None], "z": X[:, :, :2]},
            [SPEC_X, InputSpec("y", (1, 2, 3), torch.float32), InputSpec("z", (1, 2, 3), torch.float32)],
            '--dynamic x:2 --dynamic z:2, or dynamic_shapes={"x": {2: "length"}, "z": {2: "length"}}.',
        ),
        ({"x": X.transpose(1, 2)}, [SPEC_X], "takes Nx2x3 float32, but the data has Nx3x2 float32. Resize"),
        ({"x": torch.ones(2, 8, 9, 3)}, [InputSpec("x", (1, 3, 8, 9))], "move them with `x.transpose(0, 3, 1, 2)`"),
        ({"x": X.to(torch.uint8)}, [SPEC_X], "has uint8: whether they must be scaled"),
        ({"x": X}, [InputSpec("x", (1, 2, 3), torch.int64)], "takes int64, but the data has float32"),
        ({"x": X.long() + 300}, [InputSpec("x", (1, 2, 3), torch.uint8)], "values up to 359 do not fit"),
        ({"x": X.double() * 1e300}, [SPEC_X], "a value too large for float32"),
        ({"x": X}, [SPEC_X, SPEC_MASK], "lacks the model's input `mask` (N int64); it has `x`"),
        ({"x": X, "mask": MASK[:5]}, [SPEC_X, SPEC_MASK], "different numbers of samples: `x` 10, `mask` 5"),
    ],
)
def test_data_that_does_not_fit(data: Any, specs: list[InputSpec], reason: str) -> None:
    with pytest.raises(DataError) as caught:
        Samples.open(data, [spec.name for spec in specs]).check(specs)
    assert reason in str(caught.value)
    assert caught.value.exit_code == 6


@pytest.mark.parametrize(("value", "word"), [(float("nan"), "NaN"), (float("inf"), "an infinite value")])
def test_values_that_are_not_finite_name_the_sample(files: Path, value: float, word: str) -> None:
    broken = X.clone()
    broken[7, 0, 1] = value
    np.save(files / "x.npy", broken.numpy())
    with pytest.raises(DataError, match=rf"`x` has {word} in sample 7 of `.*x\.npy` \(1 such values in 1 samples"):
        Samples.open(files / "x.npy", ["x"]).check([SPEC_X])


def test_later_batches_are_checked_as_they_are_read() -> None:
    samples = Samples.open([X, X * float("nan")], ["x"]).check([SPEC_X], limit=10)
    with pytest.raises(DataError, match="batch 1 of the data"):
        gathered(samples)


@pytest.mark.parametrize(
    ("found", "wanted", "noted"),
    [
        (torch.float64, torch.float32, True),
        (torch.float16, torch.float32, True),
        (torch.int32, torch.int64, True),
        (torch.bool, torch.int64, True),
        (torch.float32, torch.float32, False),
    ],
)
def test_safe_conversions_are_noted(found: torch.dtype, wanted: torch.dtype, noted: bool) -> None:
    samples = Samples.open([MASK.to(found)] * 3, ["m"]).check([InputSpec("m", (1,), wanted)])
    assert all(batch[0].dtype == wanted for batch in samples.batches(4))
    text = f"`m` was converted from {str(found)[6:]} to {str(wanted)[6:]}"
    assert samples.notes == ([text] if noted else [])


def test_named_dynamic_axes_must_agree() -> None:
    class Named:
        def __init__(self, name: str) -> None:
            self.name, self.shape, self.dtype = name, ("batch", "seq"), torch.float32

    data = {"a": torch.ones(2, 5), "b": torch.ones(2, 6)}
    with pytest.raises(DataError, match=r"`a` and `b` must have the same size along `seq`.*5 and 6"):
        Samples.open(data, ["a", "b"]).check([Named("a"), Named("b")])


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ({"images": X}, "has `images`, but the model's inputs are `x`. Rename the arrays"),
        ({"X": X, "masks": MASK}, "has `X`, `masks`"),
        ((X, MASK, Y), "has 3 arrays for the model's 1 inputs (`x`)"),
        ({"x": torch.tensor(3.0)}, "the first axis must count samples"),
        ([], "holds no batches"),
        (X[:0], "holds no samples"),
        ({}, "has , but"),
        (3.5, "Data of type float is not understood"),
        ([["a", "b"]], "element 0 of batch 0 of the data is a str"),
        (np.array(["a", "b"]), "is not numbers"),
    ],
)
def test_data_that_is_not_understood(data: Any, reason: str) -> None:
    with pytest.raises(DataError) as caught:
        Samples.open(data, ["x"]).first(2)
    assert reason in str(caught.value)


def test_slip_of_a_name_suggests_the_input() -> None:
    with pytest.raises(DataError, match="Did you mean `attention_mask` by `atention_mask`"):
        Samples.open({"ids": X, "atention_mask": X}, ["ids", "attention_mask"])


# --- files that do not fit


def test_missing_file_suggests_the_nearest(files: Path) -> None:
    with pytest.raises(DataError, match=r"no data file .*Did you mean `.*named\.npz`"):
        Samples.open(files / "nmaed.npz", ["x"])


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is empty"),
        (b"some text, not data", "is not data that graphopt reads"),
        (b"PK\x03\x04rest", "Cannot read"),
    ],
)
def test_files_of_other_kinds(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "data.npz").write_bytes(content)
    with pytest.raises(DataError, match=reason):
        Samples.open(tmp_path / "data.npz", ["x"])


def test_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no \.npz"):
        Samples.open(tmp_path, ["x"])


class TouchOnUnpickle:
    """Creates `marker` when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("form", ["npy", "npz"])
def test_pickled_arrays_are_never_unpickled(tmp_path: Path, form: str) -> None:
    marker, path = tmp_path / "ran", tmp_path / f"data.{form}"
    array = np.array([TouchOnUnpickle(marker)], dtype=object)
    if form == "npy":
        np.save(path, array, allow_pickle=True)
    else:
        np.savez(path, x=array)
    with pytest.raises(DataError, match="graphopt does not unpickle data"):
        Samples.open(path, ["x"]).first(1)
    assert not marker.exists()
    loaded = np.load(path, allow_pickle=True)
    if form == "npz":
        loaded["x"]
    assert marker.exists(), "the attack is real"


def test_array_of_objects_beside_the_inputs_does_not_matter_until_used(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=X.numpy(), text=np.array(["a", "b"]))
    same(Samples.open(tmp_path / "d.npz", ["x"]), X)


def test_header_that_lies_about_its_size(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", X.numpy())
    raw = (tmp_path / "x.npy").read_bytes().replace(b"(10, 2, 3)", b"(99, 2, 3)")
    with zipfile.ZipFile(tmp_path / "d.npz", "w") as archive:
        archive.writestr("x.npy", raw)
    with pytest.raises(DataError, match="its header says"):
        Samples.open(tmp_path / "d.npz", ["x"])


def test_truncated_npy(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", X.numpy())
    (tmp_path / "x.npy").write_bytes((tmp_path / "x.npy").read_bytes()[:200])
    with pytest.raises(DataError, match="its size says otherwise"):
        Samples.open(tmp_path / "x.npy", ["x"])


def test_chunks_with_other_inputs_than_the_first(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=X.numpy(), mask=MASK.numpy())
    np.savez(tmp_path / "b.npz", x=X.numpy())
    with pytest.raises(DataError, match=r"The inputs of `.*b\.npz` are"):
        gathered(Samples.open(tmp_path, ["x", "mask"]))


# --- --input


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("x=1x3x224x224:float32", InputSpec("x", (1, 3, 224, 224), torch.float32)),
        ("x=1x3", InputSpec("x", (1, 3), torch.float32)),
        (" input_ids = 2x128 : int64 ", InputSpec("input_ids", (2, 128), torch.int64)),
        ("t=7:bool", InputSpec("t", (7,), torch.bool)),
    ],
)
def test_input_specs(text: str, expected: InputSpec) -> None:
    assert parse_input_spec(text) == expected


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("1x3x224x224", "does not name the input"),
        ("x=1x3:flaot32", "Did you mean `float32`?"),
        ("x=1,3,4", "is not a shape"),
        ("x=", "is not a shape"),
        ("x=1x0", "size of 0"),
        ("x=1x-3", "is not a shape"),
    ],
)
def test_bad_input_specs(text: str, reason: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_input_spec(text)
    assert reason in str(caught.value)
    assert text in str(caught.value)
    assert "1x3x224x224" in str(caught.value) or "Known:" in str(caught.value)


SCALED = [InputSpec("t", ()), InputSpec("x", (1, 3))]


@pytest.mark.parametrize("form", ["dict", "tuple", "arrays", "npz", "safetensors"])
def test_a_value_without_axes_is_in_every_batch_as_it_is(form: str, tmp_path: Path) -> None:
    t, x = torch.tensor(2.0), torch.arange(15.0).view(5, 3)
    np.savez(tmp_path / "data.npz", t=t.numpy(), x=x.numpy())
    safetensors.torch.save_file({"t": t, "x": x}, tmp_path / "data.safetensors")
    forms = {
        "dict": {"t": t, "x": x},
        "tuple": (t, x),
        "arrays": {"t": np.array(2.0, np.float32), "x": x.numpy()},
        "npz": tmp_path / "data.npz",
        "safetensors": tmp_path / "data.safetensors",
    }
    samples = Samples.open(forms[form], ["t", "x"]).check(SCALED)
    assert samples.count == 5
    found = list(samples.batches(2))
    assert [tuple(batch[1].shape) for batch in found] == [(2, 3), (2, 3), (1, 3)]
    assert all(torch.equal(batch[0], t) for batch in found)


def test_batches_with_other_values_without_axes_are_not_joined() -> None:
    data = [(torch.tensor(value), torch.ones(2, 3)) for value in (1.0, 1.0, 2.0)]
    found = list(Samples.open(data, ["t", "x"]).batches(8))
    assert [(float(t), len(x)) for t, x in found] == [(1.0, 4), (2.0, 2)]


def test_one_value_per_sample_for_an_input_without_axes() -> None:
    reason = "takes a single number float32, but the data has N float32. Give one value for all samples, without axes"
    with pytest.raises(DataError, match=reason):
        Samples.open({"t": torch.ones(5), "x": torch.ones(5, 3)}, ["t", "x"]).check(SCALED)


def test_a_single_number_for_an_input_with_axes() -> None:
    with pytest.raises(DataError, match="takes Nx3 float32, but the data has a single number float32"):
        Samples.open({"t": torch.ones(5), "x": torch.tensor(1.0)}, ["t", "x"]).check([InputSpec("t", (1,)), SCALED[1]])


def shuffled(**options: Any) -> torch.utils.data.DataLoader[Any]:
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X), batch_size=3, shuffle=True, **options)


def test_shuffled_batches_come_in_one_order() -> None:
    """Which samples judge is a matter of their place; the caller's generators are left alone."""
    samples = Samples.open(shuffled(), ["x"])
    before = torch.get_rng_state()
    one, two = gathered(samples), gathered(samples)
    torch.testing.assert_close(one, two, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(one[0], X)
    torch.testing.assert_close(one[0].sort(0).values, X.sort(0).values)


def test_batches_in_another_order_each_time_are_refused() -> None:
    samples = Samples.open(shuffled(generator=torch.Generator().manual_seed(3)), ["x"])
    with pytest.raises(DataError, match="come in another order, or as other numbers, each time"):
        [gathered(samples) for _ in range(4)]


class Disguised:
    """One-shot, though no iterator itself."""

    def __init__(self) -> None:
        self.batches = iter([X[:4], X[4:]])

    def __iter__(self) -> Iterator[Any]:
        return self.batches


@pytest.mark.parametrize("raised", [ValueError("boom"), SystemExit(0), GeneratorExit(), StopIteration(3)])
def test_batches_and_functions_that_raise(raised: BaseException) -> None:
    class Batches:
        def __iter__(self) -> Iterator[torch.Tensor]:
            return self

        def __next__(self) -> torch.Tensor:
            raise raised

    def function() -> torch.Tensor:
        raise raised

    if not isinstance(raised, StopIteration):  # which ends the batches
        with pytest.raises(DataError, match=f"Drawing the next batch of the data raised {type(raised).__name__}"):
            Samples.open(Batches(), ["x"])
    with pytest.raises(DataError, match=f"The data function `function` raised {type(raised).__name__}"):
        Samples.open(function, ["x"])


def test_an_iterable_that_is_spent_once_read_is_kept() -> None:
    samples = Samples.open(Disguised(), ["x"])
    same(samples, X)
    same(samples, X)


def test_bytes_whose_channels_come_last_are_advised_to_be_served() -> None:
    images = torch.zeros(8, 16, 16, 3, dtype=torch.uint8)
    with pytest.raises(DataError, match="--served x:uint8:nhwc:scale=1/255:mean="):
        Samples.open({"x": images}, ["x"]).check([InputSpec("x", (1, 3, 16, 16))])
