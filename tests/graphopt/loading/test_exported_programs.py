"""Exported programs: honest ones load, hostile ones are refused before anything in them runs."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import random
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import graphopt
from graphopt.errors import LoadError
from graphopt.loading import exported, load_model
from graphopt.loading.operators import check_operator
from graphopt.loading.refusal import HostileError

Edit = Callable[[dict[str, bytes]], None]
Write = Callable[..., Path]
EditProgram = Callable[[Callable[[dict[str, Any]], None]], Edit]


def nothing(members: dict[str, bytes]) -> None:
    """Leave the archive as it is."""


def assert_refused(path: Path, marker: Path, reason: str) -> None:
    """Assert that a file is refused for `reason`, with both ways forward, and that its payload did not run."""
    with pytest.raises(LoadError) as caught:
        load_model(path)
    message = str(caught.value)
    assert reason in message
    assert "--factory package.module:function" in message
    assert "--trust" in message
    assert "safetensors" in message
    assert not marker.exists()


def run_raw(path: Path) -> None:
    """Do with a file what an unsuspecting user does: load it with torch and run it."""
    program = torch.export.load(io.BytesIO(path.read_bytes()))
    program.module()(torch.randn(2, 3, 6, 6), shift=torch.randn(2, 2))


def node(program: dict[str, Any], operator: str) -> dict[str, Any]:
    nodes = program["graph_module"]["graph"]["nodes"]
    return next(entry for entry in nodes if entry["target"] == operator)


def first_expression(value: Any) -> dict[str, Any] | None:
    """Return the first object with an `expr_str` in a JSON value."""
    if isinstance(value, dict) and "expr_str" in value:
        return value
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return next((found for child in children if (found := first_expression(child))), None)


@pytest.mark.parametrize("name", ["model.pt2", "model.pt", "no-ending"])
def test_honest_program_loads_whatever_its_name(write_exported: Write, name: str) -> None:
    path = write_exported(nothing, name)
    loaded = load_model(path)
    expected = torch.export.load(io.BytesIO(path.read_bytes()))
    assert isinstance(loaded.model, torch.export.ExportedProgram)
    assert loaded.example_inputs is not None
    args, kwargs = loaded.example_inputs.args, loaded.example_inputs.kwargs
    batch5 = (torch.randn(5, 3, 6, 6),), {"shift": torch.randn(5, 2)}
    for positional, keywords in ((args, kwargs), batch5):
        actual = loaded.model.module()(*positional, **keywords)["logits"]
        torch.testing.assert_close(actual, expected.module()(*positional, **keywords)["logits"], rtol=0, atol=0)
    assert loaded.extra_files == {"note.txt": "hello"}


def test_loaded_program_keeps_what_export_recorded(write_exported: Write) -> None:
    loaded = load_model(write_exported(nothing)).model
    assert isinstance(loaded, torch.export.ExportedProgram)
    raw = torch.export.load(io.BytesIO(write_exported(nothing).read_bytes()))
    assert str(loaded.graph) == str(raw.graph)
    assert str(loaded.graph_signature) == str(raw.graph_signature)
    assert str(loaded.range_constraints) == str(raw.range_constraints)
    for ours, theirs in zip(loaded.graph.nodes, raw.graph.nodes, strict=True):
        for key in ("stack_trace", "nn_module_stack", "torch_fn"):
            assert ours.meta.get(key) == theirs.meta.get(key)


@pytest.mark.parametrize("derived", [lambda n: n + 1, lambda n: 2 * n])
def test_a_size_that_follows_from_another(derived: Callable[[Any], Any], tmp_path: Path) -> None:
    class Sums(nn.Module):
        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return a.sum(0) + b.sum(0)

    size = torch.export.Dim("n", min=2, max=100)
    args = torch.randn(4, 8), torch.randn(derived(4), 8)
    program = torch.export.export(Sums(), args, dynamic_shapes=({0: size}, {0: derived(size)}))
    torch.export.save(program, tmp_path / "model.pt2")
    loaded = load_model(tmp_path / "model.pt2").model
    assert isinstance(loaded, torch.export.ExportedProgram)
    assert str(loaded.range_constraints) == str(program.range_constraints)


@pytest.mark.parametrize("key", ["__import__('os').system('true')", "u999999999", "s0 if s1 else s2", "s0 + " * 9000])
def test_bounds_of_what_is_no_size(write_exported: Write, edit_program: EditProgram, key: str, marker: Path) -> None:
    """Torch counts up to the number of a symbol, and `u999999999` kept it busy for a minute."""

    def change(program: dict[str, Any]) -> None:
        program["range_constraints"][key] = {"min_val": 0, "max_val": None}

    assert_refused(write_exported(edit_program(change)), marker, "which is not integer arithmetic over sizes")


def test_pickle_in_sample_inputs(write_exported: Write, marker: Path, touch_on_unpickle: object) -> None:
    def edit(members: dict[str, bytes]) -> None:
        buffer = io.BytesIO()
        torch.save(((touch_on_unpickle,), {}), buffer)
        members["data/sample_inputs/model.pt"] = buffer.getvalue()

    path = write_exported(edit)
    assert_refused(path, marker, "sample inputs are a pickle")
    with contextlib.suppress(Exception):
        run_raw(path)
    assert marker.exists(), "the attack is real: torch.export.load runs it"


def test_python_in_size_expression(write_exported: Write, edit_program: EditProgram, marker: Path) -> None:
    def change(program: dict[str, Any]) -> None:
        found = first_expression(program)
        assert found is not None
        found["expr_str"] = f"__import__('os').system('touch {marker}')"

    path = write_exported(edit_program(change))
    assert_refused(path, marker, "size expression")
    with contextlib.suppress(Exception):
        run_raw(path)
    assert marker.exists(), "the attack is real: sympy evaluates it"


@pytest.mark.parametrize("folder", ["weights", "constants"])
def test_pickled_payload(write_exported: Write, marker: Path, touch_on_unpickle: object, folder: str) -> None:
    def edit(members: dict[str, bytes]) -> None:
        name = f"data/{folder}/model_{folder}_config.json"
        config = json.loads(members[name])
        entry = next(iter(config["config"].values()))
        entry["use_pickle"] = True
        members[name] = json.dumps(config).encode()
        buffer = io.BytesIO()
        torch.save(touch_on_unpickle, buffer)
        members[f"data/{folder}/{entry['path_name']}"] = buffer.getvalue()

    path = write_exported(edit)
    assert_refused(path, marker, "is a pickle")
    with contextlib.suppress(Exception):
        run_raw(path)
    assert marker.exists(), "the attack is real"


@pytest.mark.parametrize("prefix", ["opaque_obj_", "custom_obj_"])
def test_pickled_object_among_constants(write_exported: Write, marker: Path, prefix: str) -> None:
    def edit(members: dict[str, bytes]) -> None:
        name = "data/constants/model_constants_config.json"
        config = json.loads(members[name])
        config["config"]["evil"] = {
            "path_name": f"{prefix}0",
            "is_param": False,
            "use_pickle": True,
            "tensor_meta": None,
        }
        members[name] = json.dumps(config).encode()
        members[f"data/constants/{prefix}0"] = f"cos\nsystem\n(S'touch {marker}'\ntR.".encode()

    path = write_exported(edit)
    assert_refused(path, marker, "pickled object")
    if prefix == "opaque_obj_" and torch.__version__ >= "2.13":  # before, torch knew no such objects
        with contextlib.suppress(Exception):
            run_raw(path)
        assert marker.exists(), "the attack is real"


@pytest.mark.parametrize(
    "target",
    ["torch.os.system", "torch.hub.load", "_operator.methodcaller", "torch.ops.aten.save.str", "math.__loader__",
     "torch.ops.aten.from_file.default", "torch.ops.aten.relu.__class__", "#ext:evil", "os.system",
     "torch.ops.higher_order.triton_kernel_wrapper_mutation"],
)  # fmt: skip
def test_targets_beyond_the_allow_list(
    write_exported: Write, edit_program: EditProgram, marker: Path, target: str
) -> None:
    def change(program: dict[str, Any]) -> None:
        relu = node(program, "torch.ops.aten.relu.default")
        relu["target"] = target
        relu["inputs"] = [{"name": "", "arg": {"as_string": f"touch {marker}"}, "kind": 1}]

    path = write_exported(edit_program(change))
    assert_refused(path, marker, f"`{target}`")


def test_custom_operator_needs_trust(write_exported: Write, edit_program: EditProgram, marker: Path) -> None:
    def change(program: dict[str, Any]) -> None:
        node(program, "torch.ops.aten.relu.default")["target"] = "torch.ops.torchvision.nms.default"

    assert_refused(write_exported(edit_program(change)), marker, "custom operator `torch.ops.torchvision.nms")


def test_quantized_program_of_graphopt_loads(tmp_path: Path) -> None:
    class Quantized(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            scale, zero = torch.tensor(0.5), torch.tensor(0)
            q = torch.ops.graphopt.quantize(torch.ops.graphopt.observe(x, "here"), scale, zero, None, -128, 127)
            packed = torch.tensor([[0x21]], dtype=torch.uint8)
            weight = torch.ops.graphopt.dequantize(
                torch.ops.graphopt.unpack(packed, 2, 4, 0), torch.ones(1, 1), torch.tensor(0, dtype=torch.uint8), 1, 2
            )
            return torch.ops.graphopt.dequantize(q, scale, zero, None) + weight.sum()  # type: ignore[no-any-return]

    importlib.import_module("graphopt.quantization.ops")
    with (tmp_path / "q.pt2").open("wb") as file:
        torch.export.save(torch.export.export(Quantized(), (torch.ones(2, 3),)), file)
    loaded = load_model(tmp_path / "q.pt2").model
    assert isinstance(loaded, torch.export.ExportedProgram)
    torch.testing.assert_close(loaded.module()(torch.full((2, 3), 0.7)), torch.full((2, 3), 3.5))


def test_control_flow_and_sizes_from_data_load(tmp_path: Path) -> None:
    class Net(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            with torch.no_grad():
                y = x * 2
            branch = torch.cond(x.sum() > 0, lambda v: v + 1, lambda v: v - 1, (y,))
            picked = x[x > 0]
            height = x.shape[0] // 2 + x.shape[0] % 3
            return branch, picked.sum(), torch.zeros(height) + max(x.shape[0], x.shape[1])

    example = torch.tensor([[1.0, -2, 3, 4], [5, 6, 7, -8], [1, 1, 1, 1]])
    shapes = ({0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC},)
    program = torch.export.export(Net(), (example,), dynamic_shapes=shapes, strict=False)
    with (tmp_path / "m.pt").open("wb") as file:
        torch.export.save(program, file)
    loaded = load_model(tmp_path / "m.pt").model
    assert isinstance(loaded, torch.export.ExportedProgram)
    for inputs in (example, torch.randn(6, 5)):
        torch.testing.assert_close(loaded.module(check_guards=False)(inputs), Net()(inputs))


@pytest.mark.parametrize("called", ["torch.os.system", "torch.ops.aten._native_batch_norm_legit_no_training.default"])
def test_operator_in_an_argument(called: str, write_exported: Write, edit_program: EditProgram, marker: Path) -> None:
    for argument in ({"as_operator": called}, {"as_string_to_argument": {"a": {"as_operator": called}}}):

        def change(program: dict[str, Any], argument: dict[str, Any] = argument) -> None:
            relu = node(program, "torch.ops.aten.relu.default")
            relu["target"] = "torch.ops.higher_order.invoke_subgraph"
            relu["inputs"].insert(0, {"name": "op", "arg": argument, "kind": 1})

        assert_refused(write_exported(edit_program(change)), marker, "to another operator to call")


def test_value_name_that_is_source(write_exported: Write, edit_program: EditProgram, marker: Path) -> None:
    def change(program: dict[str, Any]) -> None:
        graph = program["graph_module"]["graph"]
        evil = json.loads(json.dumps(node(program, "torch.ops.aten.relu.default")))
        injected = f"__import__('os').mkdir('{marker}') if not __import__('os').path.exists('{marker}') else 0;z"
        graph["tensor_values"][injected] = graph["tensor_values"][evil["outputs"][0]["as_tensor"]["name"]]
        evil["outputs"] = [{"as_tensor": {"name": injected}}]
        evil["name"] = injected
        position = graph["nodes"].index(node(program, "torch.ops.aten.relu.default"))
        graph["nodes"].insert(position + 1, evil)

    path = write_exported(edit_program(change))
    assert_refused(path, marker, "could be run as source")


def test_parameter_name_that_is_source(write_exported: Write, marker: Path) -> None:
    payload = list(f"import os; os.mkdir({str(marker)!r})".encode())
    injected = f'head.bias"),exec(bytes({payload})),getattr(self,"head'

    def edit(members: dict[str, bytes]) -> None:
        for name in ("models/model.json", "data/weights/model_weights_config.json"):
            members[name] = members[name].replace(b'"head.weight"', json.dumps(injected).encode())

    path = write_exported(edit)
    assert_refused(path, marker, "could be run as source")
    with contextlib.suppress(Exception):
        run_raw(path)
    assert marker.exists(), "the attack is real: parameter names are pasted into generated source"


def test_guards_are_dropped(write_exported: Write, edit_program: EditProgram, marker: Path) -> None:
    def change(program: dict[str, Any]) -> None:
        program["guards_code"] = [f"__import__('os').mkdir('{marker}') is None"]

    path = write_exported(edit_program(change))
    loaded = load_model(path).model
    assert isinstance(loaded, torch.export.ExportedProgram)
    loaded.module()(torch.randn(2, 3, 6, 6), shift=torch.randn(2, 2))
    assert not marker.exists()
    run_raw(path)
    assert marker.exists(), "the attack is real: torch compiles guards and runs them"


def test_input_nesting_that_imports_a_module(
    write_exported: Write, edit_program: EditProgram, marker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "evil_on_import.py").write_text(f"import os\nos.mkdir({str(marker)!r})\nfactory = dict\n")
    monkeypatch.syspath_prepend(tmp_path)

    def change(program: dict[str, Any]) -> None:
        signature = program["graph_module"]["module_call_graph"][0]["signature"]
        context = {
            "default_factory_module": "evil_on_import",
            "default_factory_name": "factory",
            "dict_context": ["logits"],
        }
        leaf = {"type": None, "context": None, "children_spec": []}
        tree = {"type": "collections.defaultdict", "context": context, "children_spec": [leaf]}
        signature["out_spec"] = json.dumps([1, tree])

    path = write_exported(edit_program(change))
    assert_refused(path, marker, "collections.defaultdict")
    run_raw(path)
    assert marker.exists(), "the attack is real"


def test_enum_key_that_imports_a_module(write_exported: Write, edit_program: EditProgram, marker: Path) -> None:
    def change(program: dict[str, Any]) -> None:
        signature = program["graph_module"]["module_call_graph"][0]["signature"]
        context = json.dumps([{"__enum__": True, "fqn": "evil_on_import:E", "name": "A"}])
        leaf = {"type": None, "context": None, "children_spec": []}
        signature["out_spec"] = json.dumps([1, {"type": "builtins.dict", "context": context, "children_spec": [leaf]}])

    assert_refused(write_exported(edit_program(change)), marker, "name a Python class")


@pytest.mark.parametrize(
    ("member", "reason"),
    [
        ("data/aotinductor/model/kernel.so", "compiled code"),
        ("data/weights/model.pt", "pickle of an older format"),
        ("data/constants/model.pt", "pickle of an older format"),
        ("data/constants/custom_obj_0", "pickled object"),
        ("data/executorch/model.pte", "not part of a plain exported program"),
        ("xl_model_weights/w", "not part of a plain exported program"),
    ],
)
def test_members_that_a_plain_program_lacks(write_exported: Write, marker: Path, member: str, reason: str) -> None:
    assert_refused(write_exported(lambda members: members.update({member: b"\x7fELF"})), marker, reason)


def test_custom_object_argument(write_exported: Write, edit_program: EditProgram, marker: Path) -> None:
    def change(program: dict[str, Any]) -> None:
        relu = node(program, "torch.ops.aten.relu.default")
        relu["inputs"][0]["arg"] = {"as_custom_obj": {"name": "x", "class_fqn": "evil"}}

    assert_refused(write_exported(edit_program(change)), marker, "custom object")


def test_trust_skips_the_checks(write_exported: Write, edit_program: EditProgram, marker: Path) -> None:
    def change(program: dict[str, Any]) -> None:
        program["guards_code"] = [f"__import__('os').mkdir('{marker}') is None"]

    loaded = load_model(write_exported(edit_program(change)), trust=True).model
    assert isinstance(loaded, torch.export.ExportedProgram)
    loaded.module()(torch.randn(2, 3, 6, 6), shift=torch.randn(2, 2))
    assert marker.exists()


class Ends:
    """Ends the process when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return sys.exit, ("gone",)


def test_a_trusted_program_whose_code_ends_the_process(write_exported: Write) -> None:
    def edit(members: dict[str, bytes]) -> None:
        buffer = io.BytesIO()
        torch.save(Ends(), buffer)
        members["data/sample_inputs/model.pt"] = buffer.getvalue()

    with pytest.raises(LoadError, match=r"torch could not rebuild its program \(SystemExit: gone\)\.$"):
        load_model(write_exported(edit), trust=True)


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (lambda members: members.pop("models/model.json"), "no program"),
        (lambda members: members.update({"models/two.json": b"{}"}), "2 programs (model, two)"),
        (lambda members: members.pop("data/weights/weight_0"), "missing"),
        (lambda members: members.update({"data/weights/weight_0": b""}), "missing"),
        (lambda members: members.update({"models/model.json": b"{"}), "not JSON"),
        (lambda members: members.update({"models/model.json": b"[" * 100_000}), "not JSON"),
        (lambda members: members.update({"models/model.json": b"{}"}), "lacks the field"),
        (lambda members: members.update({"archive_version": b"99"}), "not in the format"),
        (lambda members: members.update({"byteorder": b"big"}), "big-endian"),
    ],
)
def test_damaged_programs(write_exported: Write, edit: Edit, reason: str) -> None:
    with pytest.raises(LoadError, match=r"Cannot load") as caught:
        load_model(write_exported(edit))
    assert reason in str(caught.value)


class Cast(nn.Module):
    """Names its device in a call, in a block and in its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast(x.device.type, dtype=torch.bfloat16):
            y = self.head(x)
        return y + torch.arange(3, device=x.device)


def test_what_was_exported_on_an_accelerator_is_read_to_the_cpu(tmp_path: Path) -> None:
    shapes = {"x": {0: torch.export.Dim.DYNAMIC}}
    program = torch.export.export(Cast().eval(), (torch.randn(2, 4),), dynamic_shapes=shapes)
    torch.export.save(program, tmp_path / "cpu.pt2")
    changes = (
        (b'"type": "cpu", "index": null', b'"type": "cuda", "index": 3'),
        (b'"as_string": "cpu"', b'"as_string": "cuda"'),
        (b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:3"),  # in the pickle of the sample inputs
    )
    found = [0, 0, 0]

    def moved(data: bytes) -> bytes:
        if data.startswith(b"PK"):
            return rewritten(data)
        for index, (old, new) in enumerate(changes):
            found[index] += data.count(old)
            data = data.replace(old, new)
        return data

    def rewritten(archive: bytes) -> bytes:
        buffer = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(archive)) as old, zipfile.ZipFile(buffer, "w") as new:
            for name in old.namelist():
                new.writestr(name, moved(old.read(name)))
        return buffer.getvalue()

    (tmp_path / "cuda.pt2").write_bytes(rewritten((tmp_path / "cpu.pt2").read_bytes()))
    assert all(found)
    here, there = (graphopt.load(tmp_path / name) for name in ("cpu.pt2", "cuda.pt2"))
    assert there.graph_module.code == here.graph_module.code
    assert there.devices == {torch.device("cpu")}
    x = torch.randn(5, 4)
    assert torch.equal(there(x), here(x))


def test_wrong_types_in_the_program_are_damage(write_exported: Write, edit_program: EditProgram) -> None:
    def change(program: dict[str, Any]) -> None:
        found = first_expression(program)
        assert found is not None
        found["hint"] = {"as_int": "__import__('os')"}

    with pytest.raises(LoadError, match="where an integer is expected"):
        load_model(write_exported(edit_program(change)))


@pytest.mark.parametrize("kind", ["compressed", "duplicate", "case"])
def test_archives_that_torch_does_not_write(tmp_path: Path, exported_members: dict[str, bytes], kind: str) -> None:
    path = tmp_path / "model.pt2"
    compression = zipfile.ZIP_DEFLATED if kind == "compressed" else zipfile.ZIP_STORED
    with zipfile.ZipFile(path, "w", compression) as archive:
        for member, data in exported_members.items():
            archive.writestr(f"archive/{member}", data)
        if kind == "duplicate":
            with pytest.warns(UserWarning, match="Duplicate"):
                archive.writestr("archive/models/model.json", b"{}")
        if kind == "case":
            archive.writestr("archive/MODELS/model.json", b"{}")
    reason = "compressed" if kind == "compressed" else "two members"
    with pytest.raises(LoadError, match=reason):
        load_model(path)


def test_old_format_names_the_way_forward(tmp_path: Path) -> None:
    path = tmp_path / "old.pt2"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("version", "8.1")
        archive.writestr("serialized_exported_program.json", "{}")
    with pytest.raises(LoadError, match=r"torch 2\.7 and older.*torch\.export\.save"):
        load_model(path)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of everything inside a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in items:
        yield (*path, key)
        yield from places(child, (*path, key))


def test_any_field_may_be_wrong(write_exported: Write, exported_members: dict[str, bytes]) -> None:
    rng = random.Random(0)
    wrong = [None, True, -1, 10**30, "", "two words", [], {}, 1.5, {"as_int": 3}, "__import__('os')"]
    outcomes = {"loaded": 0, "refused": 0}
    for _ in range(150):
        member = rng.choice([name for name in exported_members if name.endswith(".json")])
        value = json.loads(exported_members[member])
        *parents, last = rng.choice(list(places(value)))
        holder = value
        for key in parents:
            holder = holder[key]
        holder[last] = rng.choice(wrong)
        data = json.dumps(value).encode()
        try:
            load_model(write_exported(lambda members, m=member, d=data: members.update({m: d})))
            outcomes["loaded"] += 1
        except LoadError:
            outcomes["refused"] += 1
    assert outcomes["refused"] > 75, outcomes


CONFIG = "data/weights/model_weights_config.json"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The members of a program that graphopt saved."""
    path = tmp_path_factory.mktemp("saved") / "p.pt2"
    graphopt.capture(nn.Linear(4, 2), (torch.ones(2, 4),)).save(path)
    with zipfile.ZipFile(path) as archive:
        return {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}


@pytest.mark.parametrize(
    "inputs",
    [
        ((torch.ones(2, 5),), {}),
        ((torch.ones(2, 4, dtype=torch.int64),), {}),
        ((torch.ones(2, 4), torch.ones(2, 4)), {}),
        ((), {"self": torch.ones(2, 4)}),
        (([torch.ones(2, 4)],), {}),
        ((3,), {}),
    ],
)
def test_a_program_that_does_not_run_on_its_inputs(
    inputs: Any, saved: dict[str, bytes], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    content = io.BytesIO()
    torch.save(inputs, content)
    path = tmp_path / "p.pt2"
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in saved.items():
            archive.writestr(f"p/{name}", content.getvalue() if name.startswith("data/sample_inputs/") else data)
    with pytest.raises(LoadError, match=r"p\.pt2"):
        graphopt.load(path)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("name", ["self", "torch", "class", "a b", "\uff53elf"])
def test_names_that_source_means_something_else_by(name: str, saved: dict[str, bytes], tmp_path: Path) -> None:
    path = tmp_path / "p.pt2"
    with zipfile.ZipFile(path, "w") as archive:
        for member, data in saved.items():
            named = data.replace(b'"input"', f'"{name}"'.encode()) if member.startswith("models/") else data
            archive.writestr(f"p/{member}", named)
    with pytest.raises(LoadError, match=f"a value in it is called '{name}'"):
        graphopt.load(path)


TRUSTING = """
    _sparse_coo_tensor_unsafe.default set_.source_Tensor resize_.default _index_put_impl_.default _reshape_alias.default
    _foreach_add.List fbgemm_linear_int8_weight.default mkldnn_convolution.default _cudnn_rnn.default
    _convert_weight_to_int4pack.default _fused_adam_.default _test_optional_intlist.default convolution_backward.default
    _stack.default special_legendre_polynomial_p.n_scalar
    slice_inverse.default values.default to_mkldnn.default as_strided_.default _nested_view_from_buffer.default
    lu_unpack.default linalg_ldl_solve.default linalg_eigvals.default _ctc_loss.default ctc_loss.Tensor
    _chunk_cat.default
    _weight_norm_interface.default _native_multi_head_attention.default _scaled_dot_product_attention_math.default
    _scaled_dot_product_flash_attention_for_cpu.default native_batch_norm.default _batch_norm_with_update.default
    lstm.data gru.data _pack_padded_sequence.default to.prim_dtype combinations.default
"""
CHECKING = """
    _unsafe_view.default as_strided.default index_put.default index_put_.default add_.Tensor relu_.default
    __and__.Tensor __iand__.Scalar linalg_inv.default fft_rfft.default special_erf.default _log_softmax.default
    scaled_dot_product_attention.default lstm.input gru.input _embedding_bag.default embedding_renorm_.default
    upsample_bicubic2d.vec _upsample_nearest_exact2d.vec stack.default uniform.default masked_fill_.Scalar
"""


@pytest.mark.parametrize("target", TRUSTING.split())
def test_operators_that_trust_what_is_said_of_memory(target: str) -> None:
    with pytest.raises(HostileError, match="no public function of torch for dense tensors"):
        check_operator(f"torch.ops.aten.{target}")


def test_results_in_memory_of_others() -> None:
    with pytest.raises(HostileError, match=r"writes to memory of another result \(`out=`\).*run_decompositions"):
        check_operator("torch.ops.aten.mm.out")


@pytest.mark.parametrize("target", CHECKING.split())
def test_operators_that_check_memory_themselves(target: str) -> None:
    check_operator(f"torch.ops.aten.{target}")


def test_the_core_operators_but_gradients_and_one_that_leaves_memory_as_it_was() -> None:
    packets = [getattr(torch.ops.aten, name) for name in dir(torch.ops.aten) if not name.startswith("__")]
    every = [getattr(packet, name) for packet in packets if hasattr(packet, "overloads") for name in packet.overloads()]
    core = [
        str(overload)
        for overload in every
        if torch.Tag.core in overload.tags and not any(argument.is_out for argument in overload._schema.arguments)
    ]
    for target in core:
        if "backward" not in target and target != "aten.resize_.default":
            check_operator(f"torch.ops.{target}")


def test_an_operator_that_reads_beyond_its_tensor(
    write_exported: Write, edit_program: EditProgram, marker: Path
) -> None:
    def edit(program: dict[str, Any]) -> None:
        node(program, "torch.ops.aten.relu.default")["target"] = "torch.ops.aten._reshape_alias.default"

    assert_refused(write_exported(edit_program(edit)), marker, "aten._reshape_alias.default")


def test_keys_that_quote(tmp_path: Path) -> None:
    class Keyed(nn.Module):
        def forward(self, x: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            return {'"""': x["it's"] + 1, "\\": x["it's"] * 2}

    x = torch.randn(2, 3)
    torch.export.save(torch.export.export(Keyed(), ({"it's": x},)), tmp_path / "keys.pt2")
    program = graphopt.load(tmp_path / "keys.pt2")
    found = program({"it's": x})
    assert list(found) == ['"""', "\\"]
    assert torch.equal(found["\\"], x * 2)


def test_weights_that_repeat_a_few_elements_are_counted_together(
    saved: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sizes that go with strides of zero, which torch fills in as soon as a weight is copied."""
    config = json.loads(saved[CONFIG])
    for entry in config["config"].values():
        meta = entry["tensor_meta"]
        meta["sizes"], meta["strides"] = ([{"as_int": n} for n in row] for row in ((2**10, 2**10), (0, 0)))
    path = tmp_path / "p.pt2"
    with zipfile.ZipFile(path, "w") as archive:
        for member, data in saved.items():
            archive.writestr(f"p/{member}", json.dumps(config) if member == CONFIG else data)
    monkeypatch.setattr(exported, "MAX_REPEATED", 2**20)
    with pytest.raises(LoadError, match=f"repeat the few elements they have to {2**21}"):
        graphopt.load(path)
