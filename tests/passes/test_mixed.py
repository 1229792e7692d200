"""Mixed precision: what each form of a weight costs, which are chosen, and what happens where no choice is enough."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from graphopt.backends.onnxruntime.description import DESCRIPTION as TARGET
from graphopt.backends.tensorrt.description import DESCRIPTION as TENSORRT
from graphopt.capturing.capture import capture
from graphopt.data import Samples
from graphopt.errors import DataError, PassError, UsageError
from graphopt.ir.program import Program
from graphopt.job.job import Job
from graphopt.measure.bench import Spread
from graphopt.measure.cost import cost
from graphopt.passes import mixed
from graphopt.passes.mixed import Mixed, MixedOptions, MixedPlan
from graphopt.passes.mixing.forms import FLOAT, Form, compose, find_sites
from graphopt.passes.mixing.goal import Candidate
from graphopt.passes.mixing.search import FormSearch
from graphopt.pipeline.context import Context
from graphopt.pipeline.options import build
from graphopt.pipeline.pipeline import Pipeline
from graphopt.statistics.sensitivity import Altered, sensitivities
from graphopt.targets.description import TargetDescription
from graphopt.testing import TensorSamples, check_pass
from tests.passes.int8_models import WITHOUT_COSTS as WIDE
from tests.passes.int8_models import Mobile, folded, images

WIDTH = 64
FORMS: tuple[Form, ...] = ("weights2", "weights4", "weights8", "codebook4", "int8", "half")


class Words(nn.Module):
    """A table that a layer is tied to, an LSTM, and layers of which the middle one has to be exact."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.recurrent = nn.Embedding(600, WIDTH), nn.LSTM(WIDTH, WIDTH, 2, batch_first=True)
        self.wide, self.fine, self.back = nn.Linear(WIDTH, 128), nn.Linear(128, 128), nn.Linear(128, WIDTH)
        self.head = nn.Linear(WIDTH, 600, bias=False)
        self.head.weight = self.table.weight
        with torch.no_grad():
            self.fine.weight[:, ::7] *= 30

    def forward(self, ids: Tensor) -> Tensor:
        x, _ = self.recurrent(self.table(ids))
        return self.head(self.back(self.fine(self.wide(x).relu()).tanh()))


IDS = torch.randint(0, 600, (48, 5), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def words() -> Program:
    return capture(Words().eval(), IDS[:4])


def context(program: Program, target: TargetDescription = TARGET, **fields: Any) -> Context:
    samples = TensorSamples((IDS[:32],))
    return Context(
        program, targets=(target,), target=target, samples=samples, held_out=TensorSamples((IDS[32:],)), **fields
    )


def plan_of(program: Program, ctx: Context | None = None, **options: object) -> MixedPlan:
    return Mixed(build("mixed", MixedOptions, options)).plan(program, ctx or context(program))


@pytest.mark.parametrize("target", [TARGET, TENSORRT], ids=lambda target: target.name)
def test_a_site_computes_as_the_pass_makes_it(words: Program, target: TargetDescription) -> None:
    """Alone in its form, each site gives what the program gives in which its pass has rewritten it alone."""
    ctx = context(words, target)
    forms = [form for form in FORMS if target is TARGET or form in ("int8", "half", "weights4")]
    sites = find_sites(words, ctx, forms, ())
    floats = {site.name: FLOAT for site in sites}
    seen = set()
    exact = words.call_flat((IDS[:3],))[0].detach()
    for site in sites:
        for form, knob in site.knobs.items():
            _, made = compose(words, ctx, sites, {**floats, site.name: form})
            with torch.no_grad():
                found, wanted = Altered(words, [knob]).call_flat((IDS[:3],))[0], made.call_flat((IDS[:3],))[0]
            noise = float((wanted - exact).square().mean())
            assert noise > 0
            # other values are rounded with it, of an LSTM the states between its steps
            if form == "int8" or (form == "half" and target is TENSORRT):
                assert 1 / 16 < float((found - exact).square().mean()) / noise < 8, (site.name, form)
            else:
                assert torch.allclose(found, wanted, atol=1e-5), (site.name, form)
            saved = cost(words).bytes - cost(made).bytes
            assert knob.saves["bytes"] == pytest.approx(saved, rel=0.1), (site.name, form)
            seen.add((site.name, form))
    names = {name for name, _ in seen}
    assert {"head.weight", "wide.weight", "fine.weight", "back.weight"} <= names
    assert len({form for _, form in seen}) == len(forms)
    if target is TARGET:
        assert ("lstm", "int8") in seen
        assert set(next(site for site in sites if site.name == "head.weight").knobs) == set(FORMS)


class Convolutions(nn.Module):
    """Layers of every layout of a weight."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.grouped = nn.Conv2d(3, 32, 3), nn.Conv2d(32, 64, 3, groups=4)
        self.turned, self.flat = nn.ConvTranspose2d(64, 32, 3, groups=2), nn.Conv1d(32, 64, 3)
        self.matrix = nn.Parameter(torch.randn(64, 100))

    def forward(self, x: Tensor) -> Tensor:
        y = self.turned(self.grouped(self.first(x).relu()).relu()).relu()
        return self.flat(y.flatten(2)).relu().mean(2) @ self.matrix


def test_codes_are_what_is_looked_up_in_every_layout() -> None:
    x = torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(0))
    program = capture(Convolutions().eval(), x)
    ctx = Context(program, targets=(TARGET,), target=TARGET, samples=TensorSamples((x,)))
    sites = find_sites(program, ctx, ["codebook3"], ())
    assert [site.name for site in sites] == [f"{name}.weight" for name in ("first", "grouped", "turned", "flat")] + [
        "matrix"
    ]
    _, made = compose(program, ctx, sites, {site.name: "codebook3" for site in sites})
    with torch.no_grad():
        found, wanted = Altered(program, [site.knobs["codebook3"] for site in sites])(x), made(x)
    assert torch.equal(found, wanted)
    assert not torch.allclose(found, program(x), rtol=1e-3)


def test_calls_of_one_lstm_are_one_site() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.inner = nn.LSTM(32, 32, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(self.inner(x)[0])[0]

    x = torch.randn(8, 3, 32, generator=torch.Generator().manual_seed(0))
    program = capture(Twice().eval(), x)
    ctx = Context(program, targets=(TARGET,), target=TARGET, samples=TensorSamples((x,)))
    (site,) = find_sites(program, ctx, ["int8"], ())
    _, made = compose(program, ctx, [site], {site.name: "int8"})
    assert len(site.knobs["int8"].alternatives) == 2
    assert site.knobs["int8"].saves["bytes"] == pytest.approx(cost(program).bytes - cost(made).bytes, rel=0.05)


def test_it_keeps_the_contract(words: Program) -> None:
    checked = check_pass(
        Mixed(MixedOptions(min_sqnr=20.0, forms=("weights4", "int8"))), words, IDS[:4], data=[IDS], target=TARGET
    )
    assert isinstance(checked.plan, MixedPlan)
    assert checked.plan.unmet == ()
    assert cost(checked.after).bytes < cost(words).bytes / 3


def test_what_must_be_exact_stays_so(words: Program) -> None:
    loose, tight = plan_of(words, min_sqnr=8), plan_of(words, min_sqnr=30)
    assert loose.forms["fine.weight"] == "weights4" or loose.forms["wide.weight"] == "weights4"
    order = ["weights4", "int8", "weights8", FLOAT]
    assert all(order.index(tight.forms[site]) >= order.index(form) for site, form in loose.forms.items())
    assert tight.forms != loose.forms
    for plan, least in ((loose, 8), (tight, 30)):
        assert plan.unmet == ()
        found = [trial["sqnr"] for name, trial in plan.measured.items() if name.startswith("trial")]  # type: ignore[index,call-overload]
        assert found[-1] >= least


def test_bytes_are_what_is_left(words: Program) -> None:
    ctx = context(words)
    plan = plan_of(words, ctx, bytes=0.23)
    left = cost(Mixed(MixedOptions(bytes=0.23)).apply(words, plan)).bytes / cost(words).bytes
    assert 0.2 < left <= 0.23
    assert plan.unmet == ()
    assert set(plan.forms.values()) >= {"weights4"}


class Site(NamedTuple):
    name: str
    noise: Mapping[str, float]
    weight: float

    def saves(self, form: str, unit: str) -> float:
        return self.weight if (form, unit) == ("int8", "bytes") else 0.0


def test_another_choice_is_tried_where_one_saves_less_than_it_seemed_to() -> None:
    """Two of three seem to save enough, and all but one do."""

    class Dearer:
        def attempt(self, sites: Sequence[Site], chosen: Mapping[str, str]) -> Candidate:
            saved = sum(site.saves(chosen[site.name], "bytes") for site in sites) - 20
            return Candidate(chosen, {}, {"bytes": 60 - saved} if saved < 60 else {})

    weights = {"a": 34.0, "b": 42.0, "c": 23.0, "d": 200.0}
    noise = {"a": 1e-3, "b": 1e-3, "c": 2e-3, "d": 1.0}
    sites = [Site(name, {FLOAT: 0.0, "int8": noise[name]}, weights[name]) for name in weights]
    search = FormSearch(sites, Dearer(), runs=1, trials=2)  # type: ignore[arg-type]
    best = search.closest({"bytes": 60.0})
    assert [site for site, form in best.chosen.items() if form != FLOAT] == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("asked", "widths"),
    [({"bytes": 0.5}, {}), ({"bytes": 0.5, "min_speedup": 6.5}, {}), ({"min_speedup": 6.5}, {"expand:width": 16})],
)
def test_channels_are_added_for_time_alone(asked: dict[str, float], widths: dict[str, int]) -> None:
    def timer(program: Program, reference: Program) -> Spread:
        one, other = (1 + sum(name.endswith(".weight") for name in made.state_dict()) for made in (program, reference))
        share = one / other
        return Spread(share, share, share, share, share)

    x = images()
    program = folded(Mobile(), x)
    ctx = Context(program, targets=(WIDE,), target=WIDE, samples=TensorSamples((x,)), timers={WIDE.name: timer})
    plan = plan_of(program, ctx, forms="int8", **asked)
    assert plan.unmet == ()
    assert [step["widths"] for step in plan.steps] == [widths]


def test_what_it_stored_itself_is_no_refusal(words: Program) -> None:
    sites = find_sites(words, context(words), ["weights4", "int8"], ())
    chosen = {site.name: "int8" for site in sites} | {"head.weight": "weights4"}
    (stored, integers), _ = compose(words, context(words), sites, chosen)
    assert stored.pass_name == "weights"
    there = {node.name for node in words.graph.nodes} | set(words.state_dict())
    assert {refusal.site for refusal in integers.refusals} <= there


def test_what_cannot_be_met_is_said(words: Program) -> None:
    plan = plan_of(words, bytes=0.01)
    assert plan.unmet[0].startswith("bytes=0.01: ")
    assert plan.sites  # the nearest that there is
    both = plan_of(words, bytes=0.23, min_sqnr=60)
    assert [text.partition(":")[0] for text in both.unmet] == ["min_sqnr=60.0"]
    small = plan_of(words, bytes=0.01, min_sqnr=30)
    assert [text.partition(":")[0] for text in small.unmet] == ["bytes=0.01"]
    assert small.sites


def test_points_of_the_metric_are_those_of_the_labels_it_gets(words: Program) -> None:
    asked: list[Any] = []

    def metric(model: Callable[..., Any]) -> float:
        asked.append(model)
        return 100 - 1e4 * float((model(IDS[32:]) - words(IDS[32:])).detach().abs().max())

    ctx = context(words, metric=metric)
    assert metric(words) == 100
    plan = plan_of(words, ctx, max_drop=1e9)
    assert FLOAT not in plan.forms.values()
    nothing = plan_of(words, ctx, max_drop=0)
    assert set(nothing.forms.values()) == {FLOAT}
    assert len(nothing.refusals) == len(nothing.forms)
    assert "others take what may be lost; weights4 alone leaves the outputs" in nothing.refusals[0].reason
    with pytest.raises(DataError, match=r"needs labelled data to see how much is lost \(min_sqnr=25 needs none\)"):
        plan_of(words, max_drop=1)


class Clock:
    """A runtime in which what is stored in 4 bits takes no time, and all else a time by what it is."""

    def __init__(self) -> None:
        self.timed = 0

    def __call__(self, program: Program, reference: Program) -> Spread:
        self.timed += 1
        share = self._seconds(program) / self._seconds(reference)
        return Spread(share, share, share, share, share)

    def _seconds(self, program: Program) -> float:
        floats = dict.fromkeys(("wide.weight", "fine.weight", "back.weight"), 1.0)
        held = {name for name, _ in (*program.graph_module.named_parameters(), *program.graph_module.named_buffers())}
        return 1 + sum(floats[name] for name in floats if name in held)


def test_a_speed_up_is_measured(words: Program) -> None:
    clock = Clock()
    ctx = context(words, timers={TARGET.name: clock})
    plan = plan_of(words, ctx, min_speedup=1.5, forms="weights4")
    stored = [site for site, form in plan.forms.items() if form == "weights4"]
    assert plan.unmet == ()
    assert len([site for site in stored if site in ("wide.weight", "fine.weight", "back.weight")]) >= 2
    assert FLOAT in plan.forms.values()
    assert any(name.startswith("weights4: all but") for name in plan.measured)
    too_much = plan_of(words, ctx, min_speedup=9, forms="weights4")
    assert too_much.unmet == ("min_speedup=9.0: it is 4.00x as fast",)
    with pytest.raises(PassError, match="is not timed on this machine"):
        plan_of(words, min_speedup=2)


def test_what_is_skipped_stays_float(words: Program) -> None:
    plan = plan_of(words, min_sqnr=5, skip="wide+table*")
    assert {site for site, form in plan.forms.items() if form == FLOAT} >= {"wide.weight", "head.weight"}
    assert any(refusal.reason == "left float as asked (skip=wide)" for refusal in plan.refusals)
    after = Mixed(MixedOptions(min_sqnr=5, skip=("wide", "table*"))).apply(words, plan)
    assert {"wide.weight", "head.weight"} <= set(after.state_dict())
    with pytest.raises(UsageError, match="Did you mean `wide"):
        plan_of(words, skip="wdie")


def test_options() -> None:
    with pytest.raises(UsageError, match="give one of them"):
        build("mixed", MixedOptions, {"max_drop": "1", "min_sqnr": "20"})
    with pytest.raises(UsageError, match="the least noise is looked for"):
        build("mixed", MixedOptions, {"bytes": "0.2", "minimize": "latency"})
    pipeline = Pipeline.parse("mixed:max_drop=1.0:bytes=0.2:forms=int8+half")
    assert Pipeline.parse(pipeline.text).text == pipeline.text
    assert pipeline.steps[-1].instance.chooses_by_metric
    with pytest.raises(UsageError, match="int8"):
        Pipeline.parse("mixed,int8")


def test_a_plan_is_read_back(words: Program) -> None:
    plan = plan_of(words, min_sqnr=15)
    again = MixedPlan.from_json(plan.to_json(), plan.tensors)
    assert again.to_json() == plan.to_json()
    found, wanted = (Mixed(MixedOptions(min_sqnr=15)).apply(words, one).call_flat((IDS[:2],)) for one in (again, plan))
    assert torch.equal(found[0], wanted[0])
    ratios = [ratio for known in plan.sensitivity.values() for ratio in known.values()]
    assert all(ratio is None or math.isfinite(ratio) for ratio in ratios)


def test_a_stored_plan_holds_no_other_pass(words: Program) -> None:
    plan = plan_of(words, min_sqnr=15, forms="weights8")
    for step in ({**plan.steps[0], "pass_name": "mixed"}, {**plan.steps[0], "options": 3}, {}):
        with pytest.raises(PassError, match="no pass that makes a form"):
            Mixed(MixedOptions(min_sqnr=15)).apply(words, dataclasses.replace(plan, steps=(step,)))


def test_sensitivity_is_measured_once(words: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAPHOPT_CACHE", str(tmp_path))
    measured: list[int] = []
    real = sensitivities
    monkeypatch.setattr(mixed, "sensitivities", lambda *args: (measured.append(1), real(*args))[1])

    def run(data: Tensor) -> None:
        Job(words, Samples.open(data, ["ids"])).run(Pipeline.parse("mixed:forms=weights8:min_sqnr=15"))

    with monkeypatch.context() as patched:
        patched.setattr(mixed, "compose", lambda *_, **__: 1 / 0)  # the run dies behind it
        with pytest.raises(ZeroDivisionError):
            run(IDS)
    run(IDS)
    assert measured == [1]
    run(IDS.flip(0))
    assert measured == [1, 1]
