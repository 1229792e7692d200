"""recover: it learns from the unoptimised program alone, keeps only what is better, and replays byte for byte."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graphopt.caching.steps import Memory, StepCache
from graphopt.caching.store import Store
from graphopt.capturing.capture import capture
from graphopt.distillation.recovery import Stage
from graphopt.distillation.taps import taps_of
from graphopt.errors import DataError, PassError
from graphopt.ir.editor import Editor
from graphopt.ir.program import Program
from graphopt.passes.distill_hooks import DistillHooks, DistillHooksOptions
from graphopt.passes.recover import Recover, RecoverOptions, RecoverPlan
from graphopt.pipeline.context import Context, NoProgress
from graphopt.pipeline.pipeline import Pipeline
from graphopt.pipeline.runner import run
from graphopt.testing import TensorSamples, check_pass, fingerprint
from tests.graphopt.distillation.models import Encoder, Mlp, ResidualNet, settled

SMALL = RecoverOptions(epochs=3, batch_size=32, lr=0.02)


@pytest.fixture(scope="module")
def samples() -> Tensor:
    return torch.randn(384, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def teacher(samples: Tensor) -> Program:
    torch.manual_seed(0)
    model = settled(ResidualNet(), samples)
    nn.init.normal_(model.get_parameter("head.weight"))
    return capture(model, samples[:2])


@pytest.fixture(scope="module")
def pruned(teacher: Program) -> Program:
    pipeline = Pipeline.parse("prune:ratio=0.5:round_to=1:skip=stem*+down*")
    return run(pipeline, teacher, Context(original=teacher)).programs[""]


def recovered(
    program: Program, original: Program, *data: Tensor, options: RecoverOptions = SMALL, seed: int = 0
) -> tuple[Program, RecoverPlan]:
    recover = Recover(options)
    plan = recover.plan(program, Context(original=original, seed=seed).with_data(TensorSamples(data)))
    return recover.apply(program, plan), plan


def stages(plan: RecoverPlan) -> list[Any]:
    return list(plan.measured["stages"])  # type: ignore[arg-type]


def worse_mlp() -> tuple[Program, Program, Tensor]:
    """A small network, what became of it, and samples."""
    torch.manual_seed(0)
    x = torch.randn(128, 24)
    original = capture(Mlp(), x[:2])
    program = original.copy(share_tensors=False)
    with torch.no_grad():
        program.state_dict()["second.weight"].mul_(0.5)
    return original, program, x


@pytest.fixture(scope="module")
def learnt(teacher: Program, pruned: Program, samples: Tensor) -> tuple[Program, RecoverPlan]:
    return recovered(pruned, teacher, samples)


def test_it_brings_the_outputs_closer_by_a_margin(
    teacher: Program, pruned: Program, learnt: tuple[Program, RecoverPlan]
) -> None:
    result, plan = learnt
    fresh = torch.randn(256, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        wanted = teacher(fresh)
        before, after = (float((program(fresh) - wanted).square().mean()) for program in (pruned, result))
    assert after < 0.5 * before
    assert plan.measured["after"] < 0.5 * plan.measured["before"]  # type: ignore[operator]
    assert plan.outputs == {"output": "logits"}
    assert plan.taps == {"layer1.relu:relu#1": "values", "layer2.relu:relu#1": "values"}
    assert plan.views == ()


def test_the_same_seed_gives_the_same_bytes_another_does_not_and_what_was_given_is_untouched_to_the_bit(
    teacher: Program, pruned: Program, samples: Tensor
) -> None:
    shared = teacher.copy()  # as passes hand programs on: its tensors are the teacher's own
    before = fingerprint(teacher), fingerprint(pruned)
    options = dataclasses.replace(SMALL, epochs=1)
    torch.manual_seed(5)
    one, _ = recovered(pruned, shared, samples, options=options)
    torch.manual_seed(6)  # the state of torch's own generator does not matter, and is left alone
    state = torch.get_rng_state()
    again, _ = recovered(pruned, teacher, samples, options=options)
    assert torch.equal(torch.get_rng_state(), state)
    other, _ = recovered(pruned, teacher, samples, options=options, seed=1)
    assert fingerprint(one) == fingerprint(again)
    assert fingerprint(one) != fingerprint(other)
    assert (fingerprint(teacher), fingerprint(pruned)) == before


def test_the_contract_of_a_pass(samples: Tensor) -> None:
    torch.manual_seed(3)
    original = capture(settled(ResidualNet(), samples), samples[:2])
    program = original.copy(share_tensors=False)
    with torch.no_grad():
        program.state_dict()["layer1.conv1.weight"].mul_(0.7)
    recover = _Taught(dataclasses.replace(SMALL, epochs=1), original)
    checked = check_pass(recover, program, program.example_args, data=[samples], idempotent=False)
    assert set(checked.plan.sites) == set(checked.plan.tensors)


class _Taught(Recover):
    """Recover with a teacher of its own, where a test runs the pass on a program that no pass has touched."""

    def __init__(self, options: RecoverOptions, original: Program) -> None:
        super().__init__(options)
        self._original = original

    def plan(self, program: Program, ctx: Context) -> RecoverPlan:
        return super().plan(program, dataclasses.replace(ctx, original=self._original))


def test_without_epochs_only_statistics_change(teacher: Program, pruned: Program, samples: Tensor) -> None:
    result, plan = recovered(pruned, teacher, samples, options=RecoverOptions(epochs=0))
    assert all(name.endswith(("running_mean", "running_var")) for name in plan.sites)
    assert [(stage["stage"], stage["kept"]) for stage in stages(plan)] == [("statistics", True)]
    assert plan.measured["after"] == stages(plan)[0]["loss"] < plan.measured["before"]  # type: ignore[operator]
    assert plan.taps == {}
    before, after = pruned.state_dict(), result.state_dict()
    assert {name for name in before if not torch.equal(before[name], after[name])} <= set(plan.sites)


def test_a_program_that_lost_nothing(teacher: Program, samples: Tensor) -> None:
    plan = Recover(SMALL).plan(teacher.copy(), Context(original=teacher).with_data(TensorSamples((samples,))))
    assert plan.sites == ()
    assert plan.refusals[0].reason == "outputs already agree: there is nothing to recover"


def test_what_is_worse_than_before_is_refused(
    teacher: Program, learnt: tuple[Program, RecoverPlan], samples: Tensor
) -> None:
    good, _ = learnt
    context = Context(original=teacher).with_data(TensorSamples((samples,)))
    plan = Recover(RecoverOptions(epochs=1, lr=1.0, batch_size=32)).plan(good, context)
    assert plan.sites == ()
    assert plan.refusals[-1].counted_as == "nothing tried is better"


def test_a_rate_is_chosen_on_a_few_steps(
    teacher: Program, pruned: Program, samples: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Recover, "rates", (1e30, 0.03))
    options = dataclasses.replace(SMALL, lr=None, stages=("end-to-end",))
    _, plan = recovered(pruned, teacher, samples, options=options)
    (stage,) = stages(plan)
    tried = [(trial["rate"], trial["frozen"], trial["loss"] < math.inf) for trial in stage["tried"]]
    assert tried == [(0.03, False, True), (1e30, False, False), (0.03, True, True)]
    assert {trial["steps"] for trial in stage["tried"]} == {12}
    assert stage["rate"] == pytest.approx(0.03 * 33 / 12)  # as many steps are taken in all
    assert stage["frozen"] == (stage["tried"][2]["loss"] < stage["tried"][0]["loss"])
    monkeypatch.setattr(Recover, "rates", (0.03, 1e-9))  # what is tried is scaled up to the highest at most
    _, plan = recovered(pruned, teacher, samples, options=options)
    assert stages(plan)[0]["rate"] == 0.03
    at_once = dataclasses.replace(options, lr=0.03)
    _, again = recovered(pruned, teacher, samples, options=at_once)
    assert stages(again)[0]["tried"] == []
    if not stages(plan)[0]["frozen"]:
        assert stages(again)[0]["epochs"] == stages(plan)[0]["epochs"]  # a trial leaves nothing behind


@pytest.mark.parametrize("stage", ["blocks", "end-to-end"])
def test_what_diverges_leaves_the_program_as_it_was(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graphopt.distillation.recovery._BLOCK_RATE", 1e30)
    original, program, x = worse_mlp()
    _, plan = recovered(program, original, x, options=dataclasses.replace(SMALL, lr=1e30, stages=(stage,)))
    assert plan.sites == ()
    assert [(one.site, one.counted_as) for one in plan.refusals] == [
        (stage, "Training diverged"),
        ("program", "nothing tried is better"),
    ]
    assert "Try a tenth of the rate (lr=1e+29)" in plan.refusals[0].reason
    again = RecoverPlan.from_json(plan.to_json(), plan.tensors)  # JSON has no number for its loss
    assert f"{stage} diverged (not kept, " in again.summary()


def test_the_loss_that_is_noted_is_that_of_what_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Recover, "rates", (1e3, 0.03))  # scaled it is too high: training wins less than the trial
    original, program, x = worse_mlp()
    options = dataclasses.replace(SMALL, lr=None, epochs=40, patience=3)
    result, plan = recovered(program, original, x, options=options)
    (stage,) = stages(plan)
    before: Any = plan.measured["before"]
    assert before > min(stage["epochs"]) > stage["loss"] == plan.measured["after"]
    _, again = recovered(result, original, x, options=dataclasses.replace(SMALL, epochs=0))
    assert again.measured["before"] == pytest.approx(plan.measured["after"], rel=1e-5)


def test_a_weight_that_two_layers_share_stays_one() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encode, self.decode = nn.Linear(12, 12, bias=False), nn.Linear(12, 12, bias=False)
            self.decode.weight = self.encode.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.decode(self.encode(x).tanh()).tanh()

    torch.manual_seed(0)
    x = torch.randn(128, 12)
    original = capture(Tied(), x[:2])
    program = original.copy(share_tensors=False)
    with torch.no_grad():
        next(program.parameters()).mul_(0.5)
    result, plan = recovered(program, original, x)
    assert len(list(result.parameters())) == 1
    assert plan.sites == tuple(name for name, _ in result.graph_module.named_parameters())
    assert plan.outputs == {"output": "values"}


def test_factorised_layers_and_texts_of_unlike_length_learn() -> None:
    torch.manual_seed(0)
    inputs = (torch.randint(0, 11, (2, 6)), torch.ones(2, 6, dtype=torch.long))
    original = capture(Encoder(), inputs, dynamic_shapes={"tokens": {1: "length"}, "mask": {1: "length"}})
    program = run(Pipeline.parse("svd:rank=4"), original, Context(original=original)).programs[""]

    class Texts:
        def batches(self, batch_size: int, limit: int | None = None) -> list[tuple[Tensor, ...]]:
            drawn = torch.Generator().manual_seed(0)
            ids = [torch.randint(0, 11, (24, length), generator=drawn) for length in (5, 6, 7)]
            return [(part, torch.ones_like(part)) for part in ids]

    plan = Recover(SMALL).plan(program, Context(original=original).with_data(Texts()))  # type: ignore[arg-type]
    assert plan.measured["after"] < plan.measured["before"]  # type: ignore[operator]
    assert list(plan.taps) == ["layers.0:add#1", "layers.0:add#2", "layers.1:add#1", "layers.1:add#2"]
    assert plan.outputs == {"output": "values"}


def test_taps_of_the_user_stay_outputs(teacher: Program, pruned: Program, samples: Tensor) -> None:
    hooks = DistillHooks(DistillHooksOptions(taps=("layer1",)))
    tapped = hooks.apply(pruned, hooks.plan(pruned, Context(original=teacher)))
    options = dataclasses.replace(SMALL, epochs=1, taps=("layer2",))
    result, plan = recovered(tapped, teacher, samples, options=options)
    assert [tap.address for tap in taps_of(result)] == ["layer1.relu:relu#1"]
    assert list(plan.taps) == ["layer2.relu:relu#1"]


def test_outputs_without_a_gradient_are_refused(samples: Tensor) -> None:
    class Classes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Mlp()

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            scores = self.net(x).softmax(-1)
            return scores, scores.argmax(-1)

    torch.manual_seed(0)
    x = torch.randn(64, 24)
    original = capture(Classes(), x[:2])
    program = original.copy(share_tensors=False)
    with torch.no_grad():
        program.state_dict()["net.second.weight"].mul_(0.5)
    _, plan = recovered(program, original, x)
    assert plan.outputs == {"output_0": "probabilities"}
    assert [(refusal.site, refusal.kind) for refusal in plan.refusals] == [("output_1", "output has no gradient")]


def test_integer_weights_are_refused() -> None:
    import graphopt.quantization.ops  # noqa: F401  (registers the operators)

    original = capture(nn.Linear(4, 3), torch.randn(2, 4))
    program = original.copy()
    editor = Editor(program.graph_module, "test")
    weight = next(node for node in program.graph.nodes if node.target == "weight")
    editor.put("weight_int8", torch.ones(3, 4, dtype=torch.int8), trainable=False)
    editor.put("scale", torch.ones(3), trainable=False)
    editor.put("zero", torch.zeros(3, dtype=torch.int32), trainable=False)
    with editor.graph.inserting_after(weight):
        reads = [editor.read(name, like=weight) for name in ("zero", "scale", "weight_int8")]
    with editor.graph.inserting_before(next(node for node in program.graph.nodes if node.name == "linear")):
        found = editor.call(torch.ops.graphopt.dequantize.default, *reversed(reads), 0, like=weight)
    editor.replace(weight, found)
    frozen = program.with_graph(editor.finish())
    plan = Recover().plan(frozen, Context(original=original))
    assert plan.sites == ()
    assert plan.refusals[0].reason == (
        "weights are stored as integers: `weight_int8` is trained by qat, or put recover before int8"
    )


def test_a_program_without_parameters_is_refused() -> None:
    program = capture(nn.ReLU(), torch.randn(2, 4))
    plan = Recover().plan(program, Context(original=program))
    assert plan.refusals[0].counted_as == "there is no trainable parameter"


def test_data_is_needed_and_enough_of_it(teacher: Program, pruned: Program, samples: Tensor) -> None:
    with pytest.raises(DataError, match="Pass `recover` needs data to imitate the unoptimised program on"):
        Recover().plan(pruned, Context(original=teacher))
    with pytest.raises(DataError, match="and of this data none can be spared: it takes at least 16"):
        recovered(pruned, teacher, samples[:7])


def test_values_that_are_not_finite(teacher: Program, pruned: Program, samples: Tensor) -> None:
    broken = samples.clone()
    broken[:, 0, 0, 0] = float("nan")
    with pytest.raises(PassError, match=r"cannot start: the loss on \d+ held-out samples is nan"):
        recovered(pruned, teacher, broken)


def test_views_of_something_else_than_images() -> None:
    original = capture(nn.Linear(4, 3), torch.randn(2, 4))
    with pytest.raises(PassError, match=r"recover:augment=flip moves images, and the first input is input: batchx4"):
        recovered(original, original, torch.randn(32, 4), options=RecoverOptions(augment=("flip",)))


def test_a_static_batch_is_trained_at_its_own_size() -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 24)
    original = capture(Mlp(), (x[:8],), dynamic_shapes={"x": {0: None}})
    program = original.copy(share_tensors=False)
    with torch.no_grad():
        program.state_dict()["second.weight"].mul_(0.5)
    assert program.batch_size == 8
    _, plan = recovered(program, original, x)
    assert plan.measured["after"] < plan.measured["before"]  # type: ignore[operator]
    with pytest.raises(PassError, match="takes 8 samples at a time, and recover:parts=2 would divide them"):
        recovered(program, original, x, options=RecoverOptions(parts=2))


def test_blocks_learn_by_themselves_where_the_values_between_them_are_the_same(
    teacher: Program, pruned: Program, samples: Tensor
) -> None:
    _, plan = recovered(pruned, teacher, samples, options=dataclasses.replace(SMALL, stages=("blocks",), lr=0.01))
    (stage,) = stages(plan)
    assert (stage["blocks"], stage["kept"], len(stage["epochs"])) == (3, True, 1)
    assert plan.measured["after"] == stage["loss"] < plan.measured["before"]  # type: ignore[operator]
    assert re.search(r"; held-out loss [\d.]+, blocks [\d.]+ \(3 blocks, [\d.]+ s each\)$", plan.summary())
    narrower = run(Pipeline.parse("prune:ratio=0.5:round_to=1"), teacher, Context(original=teacher)).programs[""]
    _, plan = recovered(narrower, teacher, samples, options=dataclasses.replace(SMALL, stages=("blocks",)))
    assert plan.refusals[0].reason.startswith("no value between blocks has the shape it had")


def test_dropout_is_off_while_it_imitates() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 64), nn.Dropout(0.5), nn.ReLU(), nn.Linear(64, 4)).eval()
    x = torch.randn(128, 12)
    original = capture(model, x[:2])
    program = original.copy(share_tensors=False)
    with torch.no_grad():
        next(program.parameters()).mul_(1.01)
    _, plan = recovered(program, original, x, options=dataclasses.replace(SMALL, lr=0.003, epochs=8))
    assert plan.measured["after"] < 0.3 * plan.measured["before"]  # type: ignore[operator]


class Killed(NoProgress):
    """Ends the run in the middle of its training."""

    def __init__(self, at: float) -> None:
        self.at, self.taken = at, 0

    def track(self, steps: Iterable[Any], label: str, total: int | None = None) -> Iterator[Any]:
        for step in steps:
            self.taken += label == "recover: training"
            if self.taken > self.at:
                raise KeyboardInterrupt
            yield step


def test_a_killed_run_goes_on_where_it_was(teacher: Program, pruned: Program, samples: Tensor, tmp_path: Path) -> None:
    def taken(progress: Killed, folder: str) -> tuple[str, int]:
        kept = StepCache(Memory(), Store(tmp_path / folder))
        ctx = Context(original=teacher, progress=progress).with_data(TensorSamples((samples,)))
        ctx = dataclasses.replace(kept.reads.watch(ctx), checkpoints=kept)
        pipeline = Pipeline.parse("recover:epochs=3:lr=0.03:batch_size=64:stages=end-to-end")
        return fingerprint(run(pipeline, pruned, ctx, cache=kept).programs[""]), progress.taken

    whole, steps = taken(Killed(math.inf), "one")
    assert steps == 18
    with pytest.raises(KeyboardInterrupt):
        taken(Killed(14), "another")
    assert taken(Killed(math.inf), "another") == (whole, 6)  # the third epoch
    names = [len([*(tmp_path / folder).glob("*.safetensors")]) for folder in ("one", "another")]
    assert names == [1, 1]  # the plan's; no checkpoint outlives it
