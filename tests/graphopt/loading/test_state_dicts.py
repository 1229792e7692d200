"""State dicts are loaded as `load_state_dict` of the model would load them, or refused in one sentence."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

import graphopt
from graphopt.data import parse_input_spec
from graphopt.errors import CaptureError, LoadError
from graphopt.loading import load_model
from graphopt.loading.factories import apply_weights
from graphopt.loading.state_dicts import StateDict

FACTORIES = """
import torch
from torch import nn

class Scaled(nn.Module):
    "Keeps a number that is no tensor."
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.scale = 1.0
    def get_extra_state(self):
        return {"scale": self.scale}
    def set_extra_state(self, state):
        self.scale = state["scale"]

class Migrated(nn.Linear):
    "Version 1 stored the roots of its weights; there is no version 0."
    _version = 2
    def _load_from_state_dict(self, state, prefix, metadata, *others):
        version = metadata.get("version")
        if version not in (1, 2):
            raise ValueError(f"version should be 1 or 2 instead of {version}")
        if version == 1:
            state[prefix + "weight"] = state[prefix + "weight"] ** 2
        super()._load_from_state_dict(state, prefix, metadata, *others)

class Shared(nn.Module):
    "One memory under two names, once as it is and once transposed."
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(4, 4)
        self.head = nn.Linear(4, 4, bias=False)
        self.head.weight = self.table.weight
        self.back = nn.Parameter(self.table.weight.detach().t())

class Repeated(nn.Module):
    "A buffer of one element that looks like four."
    def __init__(self):
        super().__init__()
        self.register_buffer("mask", torch.zeros(1).expand(4))

def scaled(): return Scaled()
def nested(): return nn.Sequential(Scaled())
def migrated(): return nn.Sequential(Migrated(3, 2))
def shared(): return Shared()
def repeated(): return Repeated()
def lazy(): return nn.Sequential(nn.LazyLinear(4), nn.ReLU())
def linear(): return nn.Linear(3, 2)
def half(): return nn.Linear(3, 2).half()
def norm(): return nn.BatchNorm1d(2)
def spectral(): return nn.utils.spectral_norm(nn.Linear(3, 2))
def counting():
    model = nn.Module()
    model.register_buffer("places", torch.arange(3, dtype=torch.int32))
    return model
"""


class Loader:
    """Loads weights into models of `FACTORIES`, written to a file first."""

    def __init__(self, folder: Path, name: str) -> None:
        self.path = folder / "w.pt"
        self.name = name
        self.scope: dict[str, Any] = {}
        exec(FACTORIES, self.scope)

    def make(self, factory: str) -> Any:
        return self.scope[factory]()

    def load(self, factory: str, state: Any, *, trust: bool = False) -> Any:
        torch.save(state, self.path)
        return load_model(self.path, factory=f"{self.name}:{factory}", trust=trust).model


@pytest.fixture
def loader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Loader:
    """Load into factories of the current directory."""
    name = f"state_dicts_{abs(hash(tmp_path))}"
    (tmp_path / f"{name}.py").write_text(FACTORIES)
    monkeypatch.chdir(tmp_path)
    return Loader(tmp_path, name)


def as_checkpoint(state: Any) -> Any:
    return {"epoch": 1, "model": state}


def as_parallel(state: Any) -> Any:
    wrapped = OrderedDict((f"module.{name}", value) for name, value in state.items())
    versions = {f"module.{name}".rstrip("."): entry for name, entry in state._metadata.items()}
    wrapped._metadata = {"": {"version": 1}, **versions}  # type: ignore[attr-defined]
    return wrapped


FORMS = (copy.copy, as_checkpoint, as_parallel)


@pytest.mark.parametrize("trust", [False, True])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("factory", ["scaled", "nested"])
def test_state_that_is_no_tensor_is_loaded(factory: str, form: Callable[..., Any], trust: bool, loader: Loader) -> None:
    model = loader.make(factory)
    scaled = model if factory == "scaled" else model[0]
    scaled.scale = 3.0
    loaded = loader.load(factory, form(model.state_dict()), trust=trust)
    torch.testing.assert_close(dict(loaded.state_dict()), dict(model.state_dict()))


@pytest.mark.parametrize("trust", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_versions_of_modules_are_handed_on(form: Callable[..., Any], trust: bool, loader: Loader) -> None:
    state = loader.make("migrated").state_dict()
    assert torch.equal(loader.load("migrated", form(state), trust=trust)[0].weight, state["0.weight"])
    state._metadata["0"]["version"] = 1
    assert torch.equal(loader.load("migrated", form(state), trust=trust)[0].weight, state["0.weight"] ** 2)


def test_versions_that_loading_left_marks_in(loader: Loader) -> None:
    """`load_state_dict(..., assign=True)` writes into the versions of what it is given."""
    state = loader.make("migrated").state_dict()
    loader.make("migrated").load_state_dict(state, assign=True)
    assert state._metadata["0"].keys() == {"version", "assign_to_params_buffers"}
    assert torch.equal(loader.load("migrated", state)[0].weight, state["0.weight"])


def test_what_hooks_of_torch_write_beside_the_versions(loader: Loader) -> None:
    state = loader.make("spectral").state_dict()
    assert state._metadata[""]["spectral_norm"] == {"weight.version": 1}
    torch.testing.assert_close(dict(loader.load("spectral", state).state_dict()), dict(state))


def test_a_model_that_asks_for_a_version_and_finds_none(loader: Loader) -> None:
    state = dict(loader.make("migrated").state_dict())
    said = r"cannot be put into the model that the factory built: ValueError: version should be 1 or 2 instead of None"
    with pytest.raises(LoadError, match=said):
        loader.load("migrated", state)
    safetensors.torch.save_file(state, loader.path)
    with pytest.raises(LoadError, match=r"does not say of which versions its modules are, .*torch.save"):
        load_model(loader.path, factory=f"{loader.name}:migrated")


@pytest.mark.parametrize(
    "versions",
    [
        3,
        ["0"],
        {1: {"version": 1}},
        {"0": 2},
        {"0": {"version": [2]}},
        {"0": {"version": b"2"}},
        {"0": {"more": {2: 2}}},
    ],
    ids=str,
)
def test_versions_of_another_form_are_refused(versions: Any, loader: Loader) -> None:
    state = loader.make("migrated").state_dict()
    state._metadata = versions
    with pytest.raises(LoadError, match="not weights alone: it keeps something other than versions of modules"):
        loader.load("migrated", state)


def test_versions_are_read_as_data(loader: Loader, touch_on_unpickle: object, marker: Path) -> None:
    state = loader.make("migrated").state_dict()
    state._metadata = {"0": {"version": touch_on_unpickle}}
    with pytest.raises(LoadError, match="not weights alone: it needs"):
        loader.load("migrated", state)
    assert not marker.exists()
    shared: list[Any] = []
    for _ in range(25):
        shared = [shared, shared]
    state._metadata = {"0": {"version": shared}}
    with pytest.raises(LoadError, match="not weights alone: it holds more than 1000000 values"):
        loader.load("migrated", state)


@pytest.mark.parametrize("held", [b"\x80\x02.", [b"x"], torch.zeros(3, dtype=torch.uint8), {"a": {1, 2}}], ids=str)
def test_state_that_a_model_may_unpickle_needs_trust(held: Any, loader: Loader) -> None:
    state = loader.make("scaled").state_dict()
    state["_extra_state"] = {"scale": held}
    with pytest.raises(LoadError, match=r"not weights alone: its `_extra_state` holds .*, pass `--trust`"):
        loader.load("scaled", state)
    assert str(loader.load("scaled", state, trust=True).scale) == str(held)
    if isinstance(held, torch.Tensor):
        safetensors.torch.save_file({**state, "_extra_state": held}, loader.path)
        with pytest.raises(LoadError, match="not weights alone: its `_extra_state` holds"):
            load_model(loader.path, factory=f"{loader.name}:scaled")


def test_state_that_is_missing_left_over_or_not_taken(loader: Loader) -> None:
    state = loader.make("scaled").state_dict()
    state["_extra_state"] = {}
    with pytest.raises(LoadError, match=r"cannot be put into the model that the factory built: KeyError: 'scale'\.$"):
        loader.load("scaled", state)
    del state["_extra_state"]
    with pytest.raises(LoadError, match=r"1 of the model's tensors are not in the file \(_extra_state\)"):
        loader.load("scaled", state)
    with pytest.raises(LoadError, match=r"1 of the file's are not in the model \(_extra_state\)"):
        loader.load("linear", {**loader.make("linear").state_dict(), "_extra_state": 1})


def test_models_whose_tensors_have_no_shape_yet(loader: Loader) -> None:
    said = r"`0.weight`, `0.bias` of the model have no shape yet.*Run the model once"
    with pytest.raises(CaptureError, match=said):
        loader.load("lazy", {"0.weight": torch.ones(4, 3), "0.bias": torch.ones(4)})
    torch.save(loader.make("lazy"), loader.path)
    for model in (loader.make("lazy"), load_model(loader.path, trust=True).model):
        with pytest.raises(CaptureError, match=said):
            graphopt.optimize(model, torch.ones(4, 3))
    for given in ({"factory": f"{loader.name}:lazy"}, {"path": loader.path, "trust": True}):
        with pytest.raises(CaptureError, match=said):
            graphopt.load(**given, inputs=[parse_input_spec("x=4x3:float32")])


def test_buffers_that_nothing_can_be_copied_into(loader: Loader) -> None:
    with pytest.raises(LoadError, match=r'parameter named "mask".* refers to a single memory location. Please clone'):
        loader.load("repeated", {"mask": torch.ones(4)})


TYPE, RANGE = "differ in type", "have values beyond the range of the model's type"


@pytest.mark.parametrize(
    ("factory", "name", "value", "matter", "said"),
    [
        (
            "linear",
            "weight",
            torch.ones(2, 3, dtype=torch.int8),
            TYPE,
            "weight is int8 in the file and float32 in the model",
        ),
        ("linear", "weight", torch.ones(2, 3, dtype=torch.bool), TYPE, "weight is bool in the file"),
        (
            "linear",
            "bias",
            torch.ones(2, dtype=torch.cfloat),
            TYPE,
            "bias is complex64 in the file and float32 in the model",
        ),
        ("counting", "places", torch.ones(3), TYPE, "places is float32 in the file and int32 in the model"),
        (
            "counting",
            "places",
            torch.tensor([0, 1, 2**40]),
            RANGE,
            "places is int64 in the file and int32 in the model",
        ),
        (
            "linear",
            "bias",
            torch.ones(2).double() * 1e300,
            RANGE,
            "bias is float64 in the file and float32 in the model",
        ),
        ("half", "bias", torch.tensor([1.0, -1e5]), RANGE, "bias is float32 in the file and float16 in the model"),
    ],
    ids=str,
)
def test_types_that_do_not_hold_what_the_file_says(
    factory: str, name: str, value: torch.Tensor, matter: str, said: str, loader: Loader
) -> None:
    state = loader.make(factory).state_dict()
    with pytest.raises(LoadError, match=rf"do not fit the model that the factory built: 1 {matter} \({said}"):
        loader.load(factory, {**state, name: value})
    with pytest.raises(LoadError, match="built: 1 differ in shape"):
        loader.load(factory, {**state, name: value[:1]})


def test_types_of_another_width_and_what_they_lose(loader: Loader, caplog: pytest.LogCaptureFixture) -> None:
    state = loader.make("linear").state_dict()
    for dtype in (torch.float16, torch.bfloat16, torch.float8_e4m3fn):
        loaded = loader.load("linear", {name: value.to(dtype) for name, value in state.items()})
        assert torch.equal(loaded.weight, state["weight"].to(dtype).float())
    loaded = loader.load("half", {name: value.double() for name, value in loader.make("half").state_dict().items()})
    assert loaded.weight.dtype == torch.float16
    assert loader.load("counting", {"places": torch.tensor([5, 6, 7])}).places.tolist() == [5, 6, 7]
    assert loader.load("norm", {**loader.make("norm").state_dict(), "num_batches_tracked": torch.tensor(1.0)})
    assert not caplog.messages
    state["bias"] = torch.tensor([1.0, float("nan")])
    assert torch.equal(loader.load("half", state).weight, state["weight"].half())
    assert caplog.messages == [
        f"1 tensors of `{loader.path}` are rounded to the type that the model has for them (weight is float32 in the "
        "file and float16 in the model)."
    ]


def test_one_tensor_of_the_model_is_given_other_values_under_each_of_its_names(loader: Loader) -> None:
    model = loader.make("shared")
    with torch.no_grad():
        model.head.weight.copy_(torch.arange(16.0).reshape(4, 4))
    state = model.state_dict()
    assert torch.equal(loader.load("shared", state).back, state["table.weight"].t())
    apart = {name: value.clone() for name, value in state.items()}
    assert torch.equal(loader.load("shared", apart).back, state["table.weight"].t())
    said = r"1 lie in the memory of others, which have other values in the file \(table.weight in that of head.weight\)"
    with pytest.raises(LoadError, match=said):
        loader.load("shared", {**state, "table.weight": state["table.weight"] + 1})
    with pytest.raises(
        LoadError, match=r"2 lie .*\(back in that of head.weight, table.weight in that of head.weight\)"
    ):
        loader.load("shared", {**state, "head.weight": state["table.weight"] + 1})
    with pytest.raises(LoadError, match=r"1 lie .*\(back in that of (table|head).weight\)"):
        loader.load("shared", {**state, "back": state["back"].t().contiguous()})


def test_which_of_several_state_dicts_is_taken_is_said(loader: Loader, caplog: pytest.LogCaptureFixture) -> None:
    state = loader.make("linear").state_dict()
    other = {name: value + 1 for name, value in state.items()}
    taken = loader.load("linear", {"epoch": 3, "ema": other, "model": state, "optimizer": {"state": {}}})
    assert torch.equal(taken.weight, state["weight"])
    assert caplog.messages == [f"`{loader.path}` holds several state dicts: `model` is taken, and not ema."]
    with pytest.raises(LoadError, match=r"holds several state dicts \(model, net\)"):
        loader.load("linear", {"net": other, "model": state})


class OnMeta(nn.Module):
    """Built without memory: two layers that are tied, statistics, and a buffer that no file holds."""

    def __init__(self, stored: bool = True) -> None:
        super().__init__()
        with torch.device("meta"):
            self.one, self.norm, self.two = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4)
            self.two.weight = self.one.weight
            self.register_buffer("scale", torch.ones(4), persistent=stored)


def test_weights_are_put_into_what_was_built_on_meta() -> None:
    torch.manual_seed(0)
    wanted = {name: torch.randn(tensor.shape) for name, tensor in OnMeta().state_dict().items()}
    wanted["norm.num_batches_tracked"] = torch.tensor(7)
    wanted["two.weight"] = wanted["one.weight"]
    model = OnMeta()
    apply_weights(model, StateDict(wanted), "w.pt")
    assert model.two.weight is model.one.weight
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, wanted[name])
    with pytest.raises(LoadError, match=r"1 of the model's tensors are not in the file \(norm.weight\)"):
        apply_weights(OnMeta(), StateDict({name: one for name, one in wanted.items() if name != "norm.weight"}), "w.pt")
    without = OnMeta(stored=False)
    apply_weights(without, StateDict({name: one for name, one in wanted.items() if name != "scale"}), "w.pt")
    assert without.scale.is_meta
