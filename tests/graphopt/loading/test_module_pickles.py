"""Pickled modules: stock ones load, anything that could run code is refused before it runs."""

from __future__ import annotations

import io
import pickle
import sys
import types
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from graphopt.errors import LoadError
from graphopt.loading import load_model, pickles
from graphopt.loading.refusal import HostileError
from graphopt.loading.stock_modules import CLASSES, make_module, smallest_arguments


def save(value: object, path: Path, **options: Any) -> Path:
    torch.save(value, path, **options)
    return path


def assert_refused(path: Path, reason: str) -> None:
    with pytest.raises(LoadError) as caught:
        load_model(path)
    message = str(caught.value)
    assert reason in message
    assert "--factory package.module:function" in message
    assert "--trust" in message


class Stranger(nn.Module):
    """A module class that is not torch.nn's."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


STOCK: list[tuple[Callable[[], nn.Module], tuple[torch.Tensor, ...]]] = [
    (
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 3, padding="same", padding_mode="reflect"),
            nn.BatchNorm2d(8),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Dropout(0.1),
            nn.Linear(8, 4),
            nn.Softmax(-1),
        ),
        (torch.randn(2, 3, 8, 8),),
    ),
    (lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, activation="gelu"), (torch.randn(2, 3, 8),)),
    (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, activation=functional.silu), 2),
        (torch.randn(3, 2, 8),),
    ),
    (lambda: nn.MultiheadAttention(8, 2), (torch.randn(3, 2, 8),) * 3),
    (lambda: nn.LSTM(4, 5, 2, bidirectional=True), (torch.randn(3, 2, 4),)),
    (lambda: nn.Sequential(nn.Unflatten(1, (2, 2)), nn.Upsample(scale_factor=2.0)), (torch.randn(2, 4, 3),)),
    (lambda: nn.Sequential(OrderedDict(emb=nn.Embedding(5, 4), norm=nn.LayerNorm(4))), (torch.ones(2, 3).long(),)),
    (lambda: nn.Sequential(nn.GroupNorm(2, 4), nn.PReLU(4), nn.PixelShuffle(2)), (torch.randn(1, 4, 2, 2),)),
]  # fmt: skip


@pytest.mark.parametrize(("build", "inputs"), STOCK)
def test_stock_modules_load_without_trust(
    build: Callable[[], nn.Module], inputs: tuple[torch.Tensor, ...], tmp_path: Path
) -> None:
    module = build().eval()
    path = save(module, tmp_path / "model.pt")
    loaded = load_model(path).model
    assert isinstance(loaded, nn.Module)
    torch.testing.assert_close(loaded(*inputs), module(*inputs), rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_every_stock_class_comes_back_as_it_was(cls: type[nn.Module], tmp_path: Path) -> None:
    module = cls(*smallest_arguments(cls)).eval()
    loaded = load_model(save(module, tmp_path / "model.pt")).model
    assert type(loaded) is cls
    assert isinstance(loaded, nn.Module)
    assert repr(loaded) == repr(module)
    assert not loaded.training
    for made, read in zip(module.modules(), loaded.modules(), strict=True):
        assert {key: value for key, value in vars(made).items() if is_plain(value)} == {
            key: value for key, value in vars(read).items() if is_plain(value)
        }
        assert set(vars(made)) == set(vars(read))
    for made, read in zip(tensors(module), tensors(loaded), strict=True):
        assert torch.equal(made, read)
        assert (type(made), made.requires_grad) == (type(read), read.requires_grad)


def is_plain(value: object) -> bool:
    return isinstance(value, bool | int | float | str | tuple | set) or value is None


def tensors(module: nn.Module) -> list[torch.Tensor]:
    return [*module.parameters(), *module.buffers()]


def short_bias(module: nn.RNNBase) -> None:
    module.bias_hh_l0 = nn.Parameter(torch.ones(1))


def short_weight(module: nn.RNNBase) -> None:
    module._flat_weights[1] = nn.Parameter(torch.ones(2, 1))


def fewer_weights(module: nn.RNNBase) -> None:
    module.num_layers = 3


def other_gates(module: nn.RNNBase) -> None:
    module.mode = "GRU" if module.mode == "LSTM" else "LSTM"


@pytest.mark.parametrize("spoil", [short_bias, short_weight, fewer_weights, other_gates])
@pytest.mark.parametrize("cls", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_weights_that_torch_would_read_beyond(
    cls: type[nn.RNNBase], spoil: Callable[[nn.RNNBase], None], tmp_path: Path
) -> None:
    module = cls(4, 3, 2)
    spoil(module)
    said = "has options that no such layer" if spoil is other_gates else r"has weights of the shapes \[.*instead of \["
    with pytest.raises(LoadError, match=said):
        load_model(save(module, tmp_path / "model.pt"))


@pytest.mark.parametrize(("module", "key"), [(nn.Fold(4, 2), "padding"), (nn.Conv1d(2, 2, 1), "groups")])
def test_sizes_whose_products_wrap(module: nn.Module, key: str, tmp_path: Path) -> None:
    setattr(module, key, 2**16 if isinstance(module, nn.Fold) else 2**31)
    with pytest.raises(LoadError, match=f"in its `{key}`, which is beyond all sizes"):
        load_model(save(module, tmp_path / "model.pt"))


def own(module: nn.Module, name: str, value: Any) -> None:
    """Put a value in the place of an attribute."""
    del module.__dict__[name]
    setattr(module, name, value)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda m: setattr(m, "padding", torch.tensor([2**31, 2**31])), "a tensor of integers in its `padding`"),
        (lambda m: setattr(m, "padding", (torch.tensor(2**31), 1)), "a tensor of integers in its `padding`"),
        (lambda m: own(m, "padding", nn.Parameter(torch.ones(2))), "has no `padding`, which every `Fold`"),
    ],
)
def test_tensors_that_stand_for_sizes(spoil: Callable[[nn.Module], None], said: str, tmp_path: Path) -> None:
    module = nn.Fold(4, 2)
    spoil(module)
    with pytest.raises(LoadError, match=said):
        load_model(save(module, tmp_path / "model.pt"))


@pytest.mark.parametrize("divisor", [-1, 0, True, "3"])
def test_a_pool_that_divides_by_no_count(divisor: Any, tmp_path: Path) -> None:
    module = nn.AvgPool2d(2, divisor_override=3)
    assert load_model(save(module, tmp_path / "model.pt")).model
    module.divisor_override = divisor
    with pytest.raises(LoadError, match="divides by `divisor_override`"):
        load_model(save(module, tmp_path / "model.pt"))


def test_shared_module_and_tied_weight_stay_shared(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    model.append(model[0])
    loaded = load_model(save(model, tmp_path / "m.pt")).model
    assert isinstance(loaded, nn.Sequential)
    assert loaded[2] is loaded[0]
    assert loaded[1].weight is loaded[0].weight


def test_allow_list_has_the_usual_and_not_the_lazy() -> None:
    names = {cls.__name__ for cls in CLASSES}
    assert {"Conv2d", "Linear", "BatchNorm2d", "ModuleDict", "GRU", "Transformer"} <= names
    assert not any(name.startswith("Lazy") for name in names)
    assert nn.Module not in CLASSES


def test_os_system_in_a_pickle(tmp_path: Path, touch_on_unpickle: object, marker: Path) -> None:
    path = save(nn.Sequential(nn.Linear(2, 2)), tmp_path / "good.pt")
    load_model(path)
    evil = save({"model": touch_on_unpickle}, tmp_path / "evil.pt")
    assert_refused(evil, "posix.system")
    assert not marker.exists()
    torch.load(evil, weights_only=False)
    assert marker.exists(), "the attack is real"


def test_legacy_format_is_checked_as_well(tmp_path: Path, touch_on_unpickle: object, marker: Path) -> None:
    for protocol in (2, 3, 4, 5):
        options = {"_use_new_zipfile_serialization": False, "pickle_protocol": protocol}
        assert_refused(save(touch_on_unpickle, tmp_path / "evil.pt", **options), "posix.system")
        assert not marker.exists()


@pytest.mark.parametrize("name", ["builtins.eval", "subprocess.Popen", "torch.hub.load", "torch.jit.load"])
def test_functions_beyond_the_allow_list(name: str, tmp_path: Path) -> None:
    module, _, function = name.rpartition(".")
    path = tmp_path / "evil.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(
            "archive/data.pkl", b"\x80\x02c" + f"{module}\n{function}\n".encode() + b"(X\x01\x00\x00\x001tR."
        )
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/byteorder", "little")
    assert_refused(path, function)


def shadowed_forward(layer: Any) -> None:
    layer.forward = functional.relu


def forward_hook(layer: Any) -> None:
    layer._forward_hooks[0] = functional.relu


def pre_hook_in_a_plain_dict(layer: Any) -> None:
    layer.__dict__["_forward_pre_hooks"] = {0: functional.silu}


def state_dict_hook(layer: Any) -> None:
    layer._state_dict_hooks[0] = functional.relu


def shadowed_call_impl(layer: Any) -> None:
    layer.__dict__["_call_impl"] = functional.relu


def function_as_child(layer: Any) -> None:
    layer._modules["child"] = functional.relu


def function_as_parameter(layer: Any) -> None:
    layer._parameters["weight"] = functional.relu


def module_outside_the_children(layer: Any) -> None:
    layer.__dict__["other"] = nn.ReLU()


def children_with_attributes_of_their_own(layer: Any) -> None:
    modules = OrderedDict()
    modules.found = functional.relu  # type: ignore[attr-defined]
    layer.__dict__["_modules"] = modules


def tensor_with_a_method_of_its_own(layer: Any) -> None:
    layer.weight.size = functional.relu


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (shadowed_forward, "own `forward` in place of `Linear.forward`"),
        (forward_hook, "hooks (`_forward_hooks`)"),
        (pre_hook_in_a_plain_dict, "hooks (`_forward_pre_hooks`)"),
        (state_dict_hook, "hooks (`_state_dict_hooks`)"),
        (shadowed_call_impl, "own `_call_impl`"),
        (function_as_child, "which is not one of torch.nn's own classes"),
        (function_as_parameter, "as its tensor `weight`"),
        (module_outside_the_children, "holds a `torch.nn.modules.activation.ReLU` as `other`"),
        (tensor_with_a_method_of_its_own, "a tensor of its module `1` has methods of its own"),
    ],
)
def test_modules_that_are_not_as_torch_made_them(change: Callable[[Any], None], reason: str, tmp_path: Path) -> None:
    model = nn.Sequential(nn.ReLU(), nn.Linear(2, 2))
    change(model[1])
    assert_refused(save(model, tmp_path / "model.pt"), reason)


@pytest.mark.parametrize("name", ["\x1b[2J\n", "a" * 5000], ids=["obeyed by a terminal", "long"])
@pytest.mark.parametrize("kind", ["child", "attribute", "tensor", "function", "hooks"])
def test_names_of_a_stranger_in_a_message(kind: str, name: str, tmp_path: Path) -> None:
    model: Any = nn.Sequential(nn.ReLU())
    if kind == "child":
        model.add_module(name, nn.ReLU())
        shadowed_forward(model[1])
    else:
        table = {"tensor": model._parameters, "function": model._modules}.get(kind, vars(model))
        table[f"{name}hooks" if kind == "hooks" else name] = functional.relu if table is not vars(model) else nn.ReLU()
    path = save(model, tmp_path / "model.pt")
    with pytest.raises(LoadError) as caught:
        load_model(path)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1000


def test_children_kept_in_a_dictionary_with_attributes_of_its_own(tmp_path: Path) -> None:
    model = nn.Sequential(nn.ReLU())
    children_with_attributes_of_their_own(model)
    assert_refused(save(model, tmp_path / "model.pt"), "keeps attributes in what `collections.OrderedDict` returns")


def test_compiled_call_of_its_own() -> None:
    state = {**vars(nn.ReLU()), "_compiled_call_impl": functional.relu}
    with pytest.raises(HostileError, match="own `_compiled_call_impl`"):
        make_module(nn.ReLU, state, "")


def test_a_module_in_the_older_format_brings_source_that_nobody_reads(tmp_path: Path) -> None:
    options = {"_use_new_zipfile_serialization": False}
    assert isinstance(load_model(save(nn.Linear(2, 2), tmp_path / "model.pt", **options)).model, nn.Linear)
    assert_refused(save(nn.Sequential(Stranger()), tmp_path / "stranger.pt", **options), f"{__name__}.Stranger")


def test_module_without_its_tables_is_damaged(tmp_path: Path) -> None:
    model = nn.Sequential(nn.ReLU())
    del model[0].__dict__["_modules"]
    with pytest.raises(LoadError, match="module `0` has no `_modules`"):
        load_model(save(model, tmp_path / "model.pt"))


def test_an_attribute_that_no_check_thought_of_is_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise TypeError

    monkeypatch.setattr(pickles, "make_module", fails)
    with pytest.raises(LoadError, match=r"it has a `torch.nn.modules.activation.ReLU` of the wrong attributes"):
        load_model(save(nn.ReLU(), tmp_path / "model.pt"))


def test_stranger_needs_trust(tmp_path: Path) -> None:
    path = save(Stranger(), tmp_path / "model.pt")
    assert_refused(path, "Stranger")
    assert isinstance(load_model(path, trust=True).model, Stranger)


def test_bare_module_is_not_stock(tmp_path: Path) -> None:
    assert_refused(save(nn.Module(), tmp_path / "model.pt"), "torch.nn.modules.module.Module")


def test_trusted_class_that_cannot_be_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("a_module_that_is_gone")
    exec("import torch\nclass Net(torch.nn.Module): pass", vars(module))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    save(module.Net(), tmp_path / "net.pt")
    monkeypatch.delitem(sys.modules, module.__name__)
    with pytest.raises(LoadError, match=r"cannot be imported .*--factory"):
        load_model(tmp_path / "net.pt", trust=True)


class Ends:
    """Ends the process when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return sys.exit, ("gone\nfor good",)


def test_a_trusted_file_whose_code_ends_the_process(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match=r"it cannot be unpickled \(SystemExit: gone\)\.$"):
        load_model(save(Ends(), tmp_path / "model.pt"), trust=True)


def test_state_dict_asks_for_a_factory(tmp_path: Path) -> None:
    path = save(nn.Linear(2, 3).state_dict(), tmp_path / "weights.pt")
    with pytest.raises(
        LoadError, match=r"a state dict \(2 tensors: weight, bias\).*--factory package\.module:function"
    ):
        load_model(path)


def test_checkpoint_asks_for_a_factory(tmp_path: Path) -> None:
    path = save({"epoch": 3, "state_dict": nn.Linear(2, 3).state_dict()}, tmp_path / "last.pt")
    with pytest.raises(LoadError, match=r"a dictionary with the keys epoch, state_dict.*--factory"):
        load_model(path)


@pytest.mark.parametrize("trust", [False, True])
def test_a_model_in_a_dictionary_is_to_be_saved_alone(trust: bool, tmp_path: Path) -> None:
    path = save({"epoch": 3, "net": nn.Linear(2, 3)}, tmp_path / "last.pt")
    with pytest.raises(LoadError, match=r"the keys epoch, net, not a model; save what it holds as 'net' alone"):
        load_model(path, trust=trust)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("wrap", "named"),
    [(nn.DataParallel, "parallel.data_parallel.DataParallel"), (nn.utils.weight_norm, "utils.weight_norm.WeightNorm")],
)
def test_classes_of_torch_that_are_not_read_are_not_called_strangers(
    wrap: Callable[[nn.Module], nn.Module], named: str, tmp_path: Path
) -> None:
    path = save(wrap(nn.Linear(2, 2)), tmp_path / "model.pt")
    assert_refused(path, f"torch.nn.{named}`, which is not among the classes and functions that graphopt reads")


@pytest.mark.parametrize("trust", [False, True])
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_the_older_format_in_every_protocol(protocol: int, trust: bool, tmp_path: Path) -> None:
    options = {"_use_new_zipfile_serialization": False, "pickle_protocol": protocol}
    assert isinstance(load_model(save(nn.Linear(2, 2), tmp_path / "m.pt", **options), trust=trust).model, nn.Linear)


def test_tensor_is_not_a_model(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match=r"holds a torch\.Tensor, not a model"):
        load_model(save(torch.ones(2), tmp_path / "t.pt"))


def test_garbage_pickles_end_in_one_sentence(tmp_path: Path) -> None:
    for position, pickled in enumerate(
        [b"", b"\x80\x02", b"\x80\x02.", b"\x80\x02]R.", b"\x80\x02K\x01K\x02b.", b"\x80\x04\x95" + bytes(9)]
    ):
        path = tmp_path / f"{position}.pt"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", pickled)
            archive.writestr("archive/version", "3\n")
            archive.writestr("archive/byteorder", "little")
        with pytest.raises(LoadError, match=rf"`{path}`"):
            load_model(path)


def test_plain_python_pickle(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(pickle.dumps({"a": 1}, protocol=4))
    with pytest.raises(LoadError, match=r"Python pickle that torch\.save did not write"):
        load_model(path)


def test_truncated_torch_file(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    torch.save(nn.Linear(64, 64), buffer)
    path = tmp_path / "model.pt"
    path.write_bytes(buffer.getvalue()[:5000])
    with pytest.raises(LoadError, match="no readable directory"):
        load_model(path)
