"""Plans are found where everything they were made of is the same, and nowhere else."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import importlib.metadata
import itertools
import json
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import graphopt
from graphopt.axes import registry
from graphopt.caching import digests
from graphopt.caching.steps import Memory, StepCache
from graphopt.caching.store import Store
from graphopt.capturing.load import with_data
from graphopt.data import Samples
from graphopt.errors import PassError
from graphopt.ir.program import Program
from graphopt.job.job import Job, Outcome
from graphopt.measure.evaluate import Evaluator
from graphopt.pipeline.context import Context
from graphopt.pipeline.order import Step
from graphopt.pipeline.pipeline import Pipeline
from graphopt.pipeline.plan import Plan
from graphopt.pipeline.registry import PassRegistry, backends_named

PLUGIN = '''"""Scale weights by the data, and write down that it was asked to."""

from dataclasses import dataclass
from pathlib import Path

import graphopt
from graphopt import Editor, Pass, Plan
from graphopt.ir.graph import tensor_attribute

ASKED = Path(__file__).with_suffix(".asked")


@dataclass(frozen=True, slots=True)
class Options:
    factor: float = 2.0
    reads: bool = True
    times: bool = False
    loss: bool = False


class Counted(Pass[Options, Plan]):
    """Scale every matrix."""

    name = "counted"
    options_type = Options
    cached = True

    def plan(self, program, ctx):
        with ASKED.open("a") as file:
            file.write("x")
        shift = 0.0
        if self.options.reads:
            shift = sum(float(batch[0].sum()) for batch in ctx.need_samples(self.name, "").batches(4, 8))
        if self.options.times:
            ctx.timers["onnxruntime"]
        if self.options.loss:
            ctx.loss(None, None)
        gm = program.graph_module
        names = [name for name, tensor in gm.named_parameters() if tensor.dim() > 1]
        tensors = {name: tensor_attribute(gm, name).detach() * self.options.factor + shift for name in names}
        tensors = {name: tensor.t().contiguous().t() for name, tensor in tensors.items()}  # which files do not keep
        return self.new_plan(sites=names, tensors=tensors)

    def apply(self, program, plan):
        program = program.copy()
        editor = Editor(program.graph_module, self.name)
        for name in plan.sites:
            editor.put(name, plan.tensors[name], trainable=True)
        return program.with_graph(editor.finish())
'''
NUMBERS = itertools.count()
X = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3)).eval()


CAPTURED = graphopt.capture(net(), X[:2])


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GRAPHOPT_CACHE", str(tmp_path / "cache"))
    return written(tmp_path, PLUGIN)


def written(folder: Path, source: str) -> Path:
    file = folder / f"plugin{next(NUMBERS)}.py"
    file.write_text(source)
    return file


def asked(plugin: Path) -> int:
    record = plugin.with_suffix(".asked")
    return len(record.read_text()) if record.exists() else 0


def run(plugin: Path, passes: str = "counted", program: Program = CAPTURED, data: Any = X, **more: Any) -> Outcome:
    """Run passes as another process would: the job is a new one."""
    samples = Samples.open(data, ["input"]).check(program.inputs)
    return Job(program, samples, **more).run(Pipeline.parse(passes, PassRegistry([plugin])))


def tensors(outcome: Outcome) -> dict[str, Tensor]:
    return outcome.programs[""].state_dict()


def test_a_plan_is_made_once(plugin: Path) -> None:
    first = run(plugin)
    again = run(plugin)
    assert asked(plugin) == 1
    assert tensors(first).keys() == tensors(again).keys()
    for name, tensor in tensors(first).items():
        assert torch.equal(tensor, tensors(again)[name])
        assert tensor.stride() == tensors(again)[name].stride()
    for one, other in zip(first.report.rows, again.report.rows, strict=True):
        assert dataclasses.replace(one, seconds=None) == dataclasses.replace(other, seconds=None)
    (note,) = [note for note in again.report.notes if note.startswith("cache")]
    assert "`counted`" in note
    assert not [note for note in first.report.notes if note.startswith("cache")]
    assert run(plugin, cache=False).report.rows[-1].error == first.report.rows[-1].error
    assert asked(plugin) == 2


def test_what_is_judged_by_data_is_judged_once(plugin: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The original too; a function of the user's may answer anything, and is asked again."""
    judged: list[int] = []
    call = Evaluator.__call__
    monkeypatch.setattr(Evaluator, "__call__", lambda self, model: (judged.append(1), call(self, model))[1])
    labels = torch.arange(len(X)) % 2
    rows = [run(plugin, evaluation=(X, labels)).report.rows for _ in range(2)]
    assert len(judged) == 2
    assert [row.metric for row in rows[0]] == [row.metric for row in rows[1]]
    run(plugin, evaluation=(X, 1 - labels))
    run(plugin, evaluation=(X, labels), cache=False)
    assert len(judged) == 6
    for _ in range(2):
        run(plugin, evaluation=lambda model: (judged.append(1), 0.5)[1])
    assert len(judged) == 10


def test_what_comes_after_a_changed_pass_is_made_again_and_what_comes_before_is_not(plugin: Path) -> None:
    run(plugin, "counted:factor=3,counted:factor=5")
    run(plugin, "counted:factor=3,counted:factor=7")
    assert asked(plugin) == 3
    run(plugin, "counted:factor=4,counted:factor=7")
    assert asked(plugin) == 5


def test_a_job_finds_its_own_without_a_disk(plugin: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAPHOPT_CACHE", "")
    job = Job(CAPTURED, Samples.open(X, ["input"]).check(CAPTURED.inputs))
    for factor in (5, 7, 5):
        job.run(Pipeline.parse(f"counted:factor=3,counted:factor={factor}", PassRegistry([plugin])))
    assert asked(plugin) == 3
    run(plugin, "counted:factor=3")
    assert asked(plugin) == 4


def test_batches_that_are_gone_through_are_known_by_what_was_read(plugin: Path) -> None:
    def batches(tail: float) -> Iterator[Tensor]:
        yield from X[:36].split(4)
        yield X[36:] + tail

    run(plugin, data=list(batches(0.0)))
    run(plugin, data=list(batches(0.0)))
    assert asked(plugin) == 1
    changed = X.clone()
    changed[1] += 1
    run(plugin, data=list(changed.split(4)))
    assert asked(plugin) == 2


def changed_byte(tensor: Tensor, place: int, bit: int) -> Tensor:
    copied = tensor.detach().clone().contiguous()
    content = copied.view(torch.uint8).flatten()
    content[place % len(content)] ^= 1 << bit
    return copied


def other_weights(place: int, bit: int) -> dict[str, Any]:
    model = net()
    names = sorted(model.state_dict())
    name = names[place % len(names)]
    value = changed_byte(model.state_dict()[name], place, bit)
    if not bool(value.isfinite().all()):
        value = value.nan_to_num(0.125)
    model.load_state_dict({**model.state_dict(), name: value})
    return {"program": graphopt.capture(model, X[:2])}


def other_data(place: int, bit: int) -> dict[str, Any]:
    read = changed_byte(X[1:3], place, bit).nan_to_num(0.125).clamp(-1e6, 1e6)  # of what passes may fit
    return {"data": torch.cat([X[:1], read, X[3:]])}


def other_examples(place: int, bit: int) -> dict[str, Any]:
    example = changed_byte(X[:2], place, bit).nan_to_num(0.125)
    return {"program": dataclasses.replace(CAPTURED, example_args=(example,))}


OTHERS: dict[str, Callable[[int, int], dict[str, Any]]] = {
    "weights": other_weights,
    "data": other_data,
    "examples": other_examples,
    "options": lambda place, bit: {"passes": f"counted:factor={2 + 2.0 ** -(place % 40)}"},
    "seed": lambda place, bit: {"seed": 1 + place},
    "axes": lambda place, bit: {"program": graphopt.capture(net(), X[:2], dynamic_shapes={"input": {0: None}})},
    "names": lambda place, bit: {"program": graphopt.capture(nn.Sequential(net()), X[:2])},
}


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
@given(kind=st.sampled_from(sorted(OTHERS)), place=st.integers(0, 10_000), bit=st.integers(0, 7))
def test_anything_else_makes_another_plan(plugin: Path, kind: str, place: int, bit: int) -> None:
    run(plugin)
    other = OTHERS[kind](place, bit)
    if kind == "data" and torch.equal(other["data"], X):
        return
    if kind == "weights" and digests.of_program(other["program"]) == digests.of_program(CAPTURED):
        assert all(torch.equal(a, b) for a, b in zip(other["program"].parameters(), CAPTURED.parameters(), strict=True))
        return
    before = asked(plugin)
    run(plugin, **other, cache=True)
    after = asked(plugin)
    fresh = run(plugin, **other, cache=False)
    kept = run(plugin, **other, cache=True)
    assert asked(plugin) == after + 1
    assert all(torch.equal(tensor, tensors(kept)[name]) for name, tensor in tensors(fresh).items())
    assert after in (before, before + 1)  # an example that was drawn before is known


@pytest.mark.parametrize("kind", sorted(OTHERS))
def test_each_kind_of_change_is_seen(plugin: Path, kind: str) -> None:
    run(plugin)
    run(plugin, **OTHERS[kind](3, 5))
    assert asked(plugin) == 2


def test_another_source_of_a_plugin(plugin: Path, tmp_path: Path) -> None:
    run(plugin)
    plugin.write_text(PLUGIN.replace("+ shift", "- shift"))
    run(plugin)
    assert asked(plugin) == 2


def test_another_source_of_what_a_plugin_imports(plugin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its plan is made again, and those that follow on the program that it makes: what it applies may be another."""
    monkeypatch.setattr(graphopt, "IMPORTED", float("inf"))
    helper, before = tmp_path / f"helper{next(NUMBERS)}.py", set(sys.modules)
    source = PLUGIN.replace("import graphopt\n", f"import graphopt\nfrom {helper.stem} import MORE\n")
    first = written(tmp_path, source.replace("plan.tensors[name],", "plan.tensors[name] * MORE,"))
    second = written(tmp_path, PLUGIN.replace("counted", "again"))
    found = []
    for more in (1, 1, 3):
        helper.write_text(f"MORE = {more}\n")
        samples = Samples.open(X, ["input"]).check(CAPTURED.inputs)
        pipeline = Pipeline.parse("counted,again", PassRegistry([first, second]))
        found.append((Job(CAPTURED, samples).run(pipeline), asked(first), asked(second)))
        for name in set(sys.modules) - before:
            del sys.modules[name]
    assert [made for _, *made in found] == [[1, 1], [1, 1], [2, 2]]
    weights = [tensors(outcome)["0.weight"] for outcome, *_ in found]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_a_function_of_the_users_that_an_option_names_is_asked_each_time(
    plugin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may read anything; those of libraries are known by their version, and names of another kind are none."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(graphopt, "IMPORTED", float("inf"))
    source = PLUGIN.replace("    loss: bool = False\n", '    loss: bool = False\n    function: str = ""\n')
    plugin = written(tmp_path, source)
    losses = tmp_path / f"losses{plugin.stem}.py"
    losses.write_text("smooth = print\n")
    of_libraries = "torch.nn.functional:cross_entropy", "operator:add", "layer1:channels"
    for text in (*of_libraries, f"{losses.stem}:smooth"):
        for _ in range(2):
            run(plugin, f"counted:function={text}")
    assert asked(plugin) == len(of_libraries) + 2
    prune = PassRegistry().pass_class("prune")
    (step,) = Pipeline.parse(f"prune:criterion=taylor:loss={losses.stem}:smooth").steps
    assert isinstance(step.instance, prune)
    assert digests.of_pass(step.instance) is None


KEPT = "\n    cached = True\n"


@pytest.mark.parametrize("said", ["\n", KEPT.replace("True", "False")])
def test_a_plugin_that_does_not_say_that_its_plans_may_be_kept_is_asked_each_time(
    plugin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str
) -> None:
    """Its plan may read a file, the environment, or variables of modules; what comes after it is found all the same."""
    reads = PLUGIN.replace("self.options.factor", 'float(os.environ["FACTOR"])').replace(
        '"""\n\n', '"""\n\nimport os\n', 1
    )
    asking, after = written(tmp_path, reads.replace(KEPT, said)), written(tmp_path, PLUGIN.replace("counted", "after"))
    samples = Samples.open(X, ["input"]).check(CAPTURED.inputs)
    found = []
    for factor in ("2", "3", "3"):
        monkeypatch.setenv("FACTOR", factor)
        pipeline = Pipeline.parse("counted,after", PassRegistry([asking, after]))
        found.append(tensors(Job(CAPTURED, samples).run(pipeline))["0.weight"])
    assert (asked(asking), asked(after)) == (3, 2)
    assert not torch.equal(found[0], found[1])
    assert torch.equal(found[1], found[2])


@pytest.mark.parametrize("name", ["counted", "prune"])
def test_a_class_says_so_itself(plugin: Path, name: str) -> None:
    """What it adds to one whose plans may be kept may read anything."""
    kind = PassRegistry([plugin]).pass_class(name)
    assert digests.of_pass(kind()) is not None
    assert digests.of_pass(type("Mine", (kind,), {"__module__": kind.__module__})()) is None


def test_other_libraries(plugin: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(plugin)
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: real(name) + ".1" * (name == "numpy"))
    digests.of_libraries.cache_clear()
    run(plugin)
    assert asked(plugin) == 2
    monkeypatch.undo()
    digests.of_libraries.cache_clear()


def test_times_are_of_one_machine(plugin: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backends = backends_named("onnxruntime")
    for passes in ("counted:times=yes", "counted"):
        run(plugin, passes, backends=backends)
        run(plugin, passes, backends=backends)
    assert asked(plugin) == 2
    monkeypatch.setattr(digests, "of_machine", lambda: "another")
    run(plugin, "counted:times=yes", backends=backends)
    run(plugin, "counted", backends=backends)
    assert asked(plugin) == 3


def test_a_loss_is_known_in_its_process_alone(plugin: Path) -> None:
    def loss(output: Any, labels: Any) -> Tensor:
        return torch.zeros(())

    job = Job(CAPTURED, Samples.open(X, ["input"]).check(CAPTURED.inputs), loss=loss)
    pipeline = Pipeline.parse("counted:loss=yes", PassRegistry([plugin]))
    job.run(pipeline)
    job.run(pipeline)
    assert asked(plugin) == 1
    run(plugin, "counted:loss=yes", loss=loss)
    assert asked(plugin) == 2


def test_operators_of_the_users_are_known_in_their_process_alone(plugin: Path) -> None:
    @torch.library.custom_op(f"users{next(NUMBERS)}::twice", mutates_args=())
    def twice(x: Tensor) -> Tensor:
        return x * 2

    twice.register_fake(torch.empty_like)

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 3)

        def forward(self, input: Tensor) -> Tensor:
            return twice(self.linear(input))

    program = graphopt.capture(Twice().eval(), X[:2])
    in_memory_alone(plugin, program)
    made = Memory()  # of a pass that puts in an operator
    made.follows(program, "of a plan")
    assert made.alone


def test_rules_of_the_users_are_known_in_their_process_alone(plugin: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(plugin)
    monkeypatch.setitem(registry._RULES, "aten::relu", registry.Rule(lambda call: call.dims("self")))
    plugin.with_suffix(".asked").unlink()
    in_memory_alone(plugin, CAPTURED)


def in_memory_alone(plugin: Path, program: Program) -> None:
    job = Job(program, Samples.open(X, ["input"]).check(program.inputs))
    for _ in range(2):
        job.run(Pipeline.parse("counted", PassRegistry([plugin])))
    assert asked(plugin) == 1
    run(plugin, program=program)
    assert asked(plugin) == 2


def test_backends_of_the_users_are_timed_in_each_process(plugin: Path) -> None:
    class Mine(type(backends_named("onnxruntime")[0])):  # type: ignore[misc]
        """Another that is called the same."""

    for backend in (Mine(), Mine(), backends_named("onnxruntime")[0], backends_named("onnxruntime")[0]):
        run(plugin, "counted:times=yes", backends=(backend,))
    assert asked(plugin) == 3


def test_another_target(plugin: Path) -> None:
    pass_ = PassRegistry([plugin]).pass_class("counted")()
    step = Step(pass_)
    keys = set()
    known = backends_named("onnxruntime")[0].description
    for target in (None, known, dataclasses.replace(known, name="another")):
        ctx = graphopt.Context(CAPTURED, target=target)
        cache = StepCache(Memory())
        cache.find(step, CAPTURED, ctx)
        keys.add(cache._key)
    assert len(keys) == 3


def test_what_one_pass_read_counts_for_those_after_it(plugin: Path) -> None:
    """An analysis may have kept it."""
    passes = "counted,counted:reads=no"
    run(plugin, passes)
    run(plugin, passes)
    assert asked(plugin) == 2
    changed = X.clone()
    changed[1] += 1
    run(plugin, passes, data=changed)
    assert asked(plugin) == 4


def test_a_class_without_a_file_is_asked_each_time(plugin: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("nowhere")
    monkeypatch.setitem(sys.modules, "nowhere", module)
    space = vars(module) | {"__file__": str(plugin)}
    exec(compile(PLUGIN, "<text>", "exec"), space)  # as a notebook does
    assert digests.of_pass(space["Counted"]()) is None


@pytest.mark.parametrize("name", PassRegistry().names())
def test_plans_of_built_in_passes_are_kept(name: str) -> None:
    assert digests.of_pass(PassRegistry().pass_class(name)()) is not None


def test_what_weights_were_before_they_were_rounded_counts_for_who_reads_it() -> None:
    """Other weights may round to the same integers."""
    other = CAPTURED.copy(share_tensors=False)
    with torch.no_grad():
        next(other.parameters()).mul_(1.01)
    cache, found = StepCache(Memory()), {}
    for name in ("qat", "recover"):
        step = Step(PassRegistry().pass_class(name)())
        ctx = Context(original=CAPTURED, floating=CAPTURED)
        assert cache.find(step, CAPTURED, ctx) is None
        cache.keep(step.instance.new_plan(sites=("x",)))
        assert cache.find(step, CAPTURED, ctx) is not None
        found[name] = cache.find(step, CAPTURED, dataclasses.replace(ctx, floating=other)) is not None
    assert found == {"qat": False, "recover": True}


def test_an_instance_that_holds_more_than_options_is_asked_each_time(plugin: Path) -> None:
    kind = PassRegistry([plugin]).pass_class("counted")
    one, other = kind(), kind()
    assert digests.of_pass(one) == digests.of_pass(other) is not None
    other.__dict__["threshold"] = 3
    assert digests.of_pass(one) != digests.of_pass(other) is not None
    other.__dict__["threshold"] = [3]
    assert digests.of_pass(other) is None


def test_a_plan_that_a_pass_no_longer_reads_is_made_anew(plugin: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(plugin)
    kind = PassRegistry([plugin]).pass_class("counted").plan_type

    def refuse(*_: Any) -> Any:
        raise PassError("of another form")

    monkeypatch.setattr(kind, "from_json", refuse)
    run(plugin)
    assert asked(plugin) == 2


def test_what_is_measured_is_checked_where_it_is_found(tmp_path: Path) -> None:
    def check(content: dict[str, Any]) -> None:
        if content.keys() != {"cost"}:
            raise ValueError

    store = Store(tmp_path / "cache")
    for made, expected in (({}, {}), ({"cost": 1}, {"cost": 1}), ({"cost": 2}, {"cost": 1})):
        assert StepCache(Memory(), store).measured(CAPTURED, "", lambda made=made: made, check) == expected


def test_entries_whose_content_is_of_another_form_are_made_anew(plugin: Path, tmp_path: Path) -> None:
    first = run(plugin)
    for file in (tmp_path / "cache").glob("*.json"):
        text = json.dumps(json.loads(file.read_text()) | {"content": {}}).encode()
        file.unlink()
        file.with_name(f"{file.name[:64]}-{hashlib.sha256(text).hexdigest()}.json").write_bytes(text)
    again = run(plugin)
    assert asked(plugin) == 2
    assert again.report.rows[-1].error == first.report.rows[-1].error


def test_tensors_of_a_plan_are_as_they_are_stored() -> None:
    one = torch.arange(6.0).view(2, 3)
    plan = Plan(pass_name="any", tensors={"a": one, "b": one, "c": one.t(), "d": one[1]}).on(torch.device("cpu"))
    assert plan.tensors["a"].data_ptr() == one.data_ptr()
    assert len({tensor.untyped_storage().data_ptr() for tensor in plan.tensors.values()}) == 4
    assert all(tensor.is_contiguous() for tensor in plan.tensors.values())
    assert torch.equal(plan.tensors["c"], one.t())


class Pair(nn.Module):
    """Two layers of one size, whose weights are equal."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)
        self.second.weight = nn.Parameter(self.first.weight.data.clone())

    def forward(self, input: Tensor) -> Tensor:
        return self.second(self.first(input).relu())


def tied(pair: Pair) -> None:
    pair.second.weight = pair.first.weight


def one_memory(pair: Pair) -> None:
    pair.second.weight = nn.Parameter(pair.first.weight.data)


def one_storage(pair: Pair) -> None:
    flat = torch.cat([weight.data.flatten() for weight in pair.parameters()])
    pair.first.weight.data, pair.second.weight.data = flat.view(2, 6, 6)


def one_storage_the_other_way_round(pair: Pair) -> None:
    flat = torch.cat([weight.data.flatten() for weight in pair.parameters()])
    pair.second.weight.data, pair.first.weight.data = flat.view(2, 6, 6)


def other_strides(pair: Pair) -> None:
    pair.second.weight.data = pair.second.weight.data.t().contiguous().t()


LAYOUTS = (lambda pair: None, tied, one_memory, one_storage, one_storage_the_other_way_round, other_strides)


def test_programs_whose_tensors_share_memory_in_other_ways_have_other_digests() -> None:
    """What is one axis, and what may be pruned at all, follows from it."""
    found = []
    for arrange in (*LAYOUTS, one_storage):
        pair = Pair().eval()
        arrange(pair)
        found.append(digests.of_program(with_data(pair, X[:2], share_tensors=True)[0]))
    assert len(set(found)) == len(LAYOUTS)
    assert found.index(found[-1]) == LAYOUTS.index(one_storage)


@pytest.mark.parametrize("arranged", [(one_memory, None), (None, one_storage), (one_storage, None)])
def test_plans_of_shared_weights_are_not_those_of_unshared_ones(
    plugin: Path, arranged: tuple[Callable[[Pair], None] | None, ...]
) -> None:
    for arrange in arranged:
        models = []
        for _ in range(2):
            pair = Pair().eval()
            if arrange is not None:
                arrange(pair)
            models.append(pair)
        found, fresh = (
            graphopt.optimize(model, X, passes="prune:ratio=0.5:round_to=1", lower=False, target=None, cache=cache)
            for model, cache in zip(models, (True, False), strict=True)
        )
        assert found.plans[0].to_json() == fresh.plans[0].to_json()


def test_digests_tell_values_apart() -> None:
    values: list[Any] = [
        *(
            1,
            1.0,
            "1",
            True,
            None,
            [1],
            [[1]],
            ["1"],
            {"1": 1},
            {"a": [1, 2]},
            {"a": [1], "b": [2]},
            ["ab"],
            ["a", "b"],
        ),
        *(torch.ones(2), torch.ones(2).double(), torch.ones(2, 1), torch.ones(0), torch.ones(0, 2)),
        *(frozenset({1, 2}), frozenset({1, 3}), X, copy.deepcopy(CAPTURED.inputs)),
    ]
    found = [digests.digest_of(value) for value in values]
    assert len(set(found)) == len(values)
    assert found == [digests.digest_of(copy.deepcopy(value)) for value in values]


CHOOSING = PLUGIN.replace("    cached = True", "    cached = True\n    chooses_by_metric = True").replace(
    "        if self.options.times:", "        shift += ctx.metric(program)\n        if self.options.times:"
)
LABELS = torch.arange(40) % 3


def test_what_passes_choose_by_is_part_of_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAPHOPT_CACHE", str(tmp_path / "cache"))
    plugin = written(tmp_path, CHOOSING)
    first = run(plugin, evaluation=(X, LABELS))
    assert torch.equal(tensors(run(plugin, evaluation=(X, LABELS)))["0.weight"], tensors(first)["0.weight"])
    assert asked(plugin) == 1
    run(plugin, evaluation=(X, LABELS.flip(0)))
    assert asked(plugin) == 2
    for _ in range(2):  # a function may ask anything
        run(plugin, evaluation=lambda model: float(model(X).detach().sum()))
    assert asked(plugin) == 4


def test_what_a_process_is_told_of_how_to_compute_counts(plugin: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(plugin)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        run(plugin)
    finally:
        torch.set_float32_matmul_precision(before)
    assert asked(plugin) == 2
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    run(plugin)
    assert asked(plugin) == 3
    with torch.autocast("cpu", torch.bfloat16):
        assert digests.of_computing() != digests.of_libraries()
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")
    run(plugin)
    assert asked(plugin) == 3
