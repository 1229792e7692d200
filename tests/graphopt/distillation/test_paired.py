"""pair_for_training and finish: any student learns from any teacher in a plain loop, and is itself again afterwards."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import graphopt
from graphopt.capturing.capture import capture
from graphopt.distillation.heads import with_head
from graphopt.distillation.losses import soft_labels
from graphopt.distillation.paired import PairedModule, finish, pair_for_training
from graphopt.distillation.plan import DistillPlan
from graphopt.distillation.preparing import prepare
from graphopt.distillation.teachers import Teacher
from graphopt.errors import DataError, GraphOptError, UsageError
from graphopt.ir.program import Program
from graphopt.testing import assert_same_program, fingerprint
from tests.graphopt.distillation.models import ResidualNet, settled

IMAGES = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(1))
LABELS = torch.randint(0, 5, (64,), generator=torch.Generator().manual_seed(2))


class Slim(nn.Module):
    """A chain of convolutions that shares nothing with the teacher, with a stage of 2x2 where that has one of 4x4."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.stem, self.down, self.mix = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 6, 3, 4, 1), nn.Conv2d(6, 6, 1)
        self.norm, self.drop, self.head = nn.BatchNorm2d(6), nn.Dropout(0.1), nn.Linear(6, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.mix(self.down(self.stem(x).relu()).relu())).relu()
        return self.head(self.drop(x.mean((2, 3))))


class Attending(nn.Module):
    """Two layers of fused attention over tokens, with a mask of any kind."""

    def __init__(self, width: int, layers: int = 2, **options: Any) -> None:
        super().__init__()
        self.options = options
        self.embed = nn.Linear(5, width)
        self.layers = nn.ModuleList(nn.ModuleList([nn.Linear(width, 3 * width)]) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for (layer,) in self.layers:
            q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in layer(x).chunk(3, -1))
            x = x + scaled_dot_product_attention(q, k, v, **self.options).transpose(1, 2).flatten(2)
        return x


@pytest.fixture(scope="module")
def teacher() -> Program:
    torch.manual_seed(0)
    model = settled(ResidualNet(), IMAGES)
    nn.init.normal_(model.get_parameter("head.weight"))
    return capture(model, IMAGES[:2])


@pytest.fixture(scope="module")
def student() -> Program:
    torch.manual_seed(3)
    return capture(Slim(), IMAGES[:2])


def taught(paired: PairedModule, steps: int = 30, **columns: Tensor) -> list[float]:
    optimizer = torch.optim.AdamW(paired.train().parameters(), 1e-2)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        found = paired(IMAGES, **columns)
        found.loss.backward()
        optimizer.step()
        losses.append(float(found.loss.detach()))
    return losses


FEATURES = {"features": "stages", "alpha": 0.5}
PAIRS = {
    "pairs": [
        {"student": "down", "teacher": "layer2", "loss": "values"},
        {"student": "stem", "teacher": "layer1", "loss": "attention"},
        {"student": "mix", "teacher": "layer1", "loss": "distances"},
        {"student": "stem", "teacher": "norm:batch_norm", "loss": "cosine", "by": "student"},
    ]
}


@pytest.mark.parametrize("plan", [{}, FEATURES, PAIRS], ids=["outputs", "stages", "pairs"])
def test_a_plain_loop_teaches_and_the_deployed_graph_is_the_students_own(
    teacher: Program, student: Program, plan: dict[str, Any]
) -> None:
    before = fingerprint(teacher), fingerprint(student)
    paired = pair_for_training(student, teacher, plan, labelled=True)
    losses = taught(paired, labels=LABELS)
    assert losses[-1] < 0.8 * losses[0]
    deployed = finish(paired)
    assert (fingerprint(teacher), fingerprint(student)) == before
    assert_same_program(deployed, student, compare_tensors=False)
    assert [(node.name, node.meta["val"].shape) for node in deployed.graph.nodes if "val" in node.meta] == [
        (node.name, node.meta["val"].shape) for node in student.graph.nodes if "val" in node.meta
    ]
    assert deployed.state_dict().keys() == student.state_dict().keys()
    assert deployed.outputs == student.outputs
    with torch.no_grad():
        torch.testing.assert_close(deployed(IMAGES), paired.eval()(IMAGES, labels=LABELS).outputs)


def test_terms_are_named_and_weighted_and_adapters_are_trained_and_counted(teacher: Program, student: Program) -> None:
    paired = pair_for_training(student, teacher, {**PAIRS, "alpha": 0.7})
    found = paired(IMAGES, labels=LABELS)
    assert list(found.losses) == [
        "output output",
        "labels",
        *(f"pair {name}" for name in ("down:conv2d values", "stem:conv2d attention", "mix:conv2d distances")),
        "pair stem:conv2d cosine",
    ]
    torch.testing.assert_close(found.loss, sum(found.losses.values()))
    logits, wanted = found.outputs, teacher(IMAGES)
    labels_term = 0.3 * nn.functional.cross_entropy(logits, LABELS)
    output_term = (
        0.7
        * 16
        * nn.functional.kl_div(
            (logits / 4).log_softmax(1), (wanted / 4).log_softmax(1), reduction="batchmean", log_target=True
        )
    )
    torch.testing.assert_close(found.losses["labels"], labels_term)
    torch.testing.assert_close(found.losses["output output"], output_term)
    own = dict(student.graph_module.named_parameters())
    extra = {name for name, _ in paired.program.graph_module.named_parameters() if name not in own}
    assert extra == {"distill_adapters.0.weight", "distill_adapters.0.bias"} | {
        f"distill_adapters.3.{leaf}" for leaf in ("weight", "bias")
    }
    found.loss.backward()
    gradients = dict(paired.program.graph_module.named_parameters())
    assert all(gradients[name].grad is not None for name in gradients)
    assert not any("teacher" in name or "layer1" in name for name in paired.state_dict())


def test_heads_on_shallow_values_learn_from_labels_and_from_the_students_own_output(student: Program) -> None:
    plan = {"alpha": 0.25, "temperature": 2, "heads": [{"student": "stem", "weight": 0.5}, {"student": "*:relu"}]}
    paired = pair_for_training(student, None, plan)
    found = paired(IMAGES, labels=LABELS)
    names = ["stem:conv2d", ":relu#0", ":relu#1", ":relu#2"]
    assert list(found.losses) == [
        "labels",
        *(f"head {name}" for name in names),
        *(f"labels of head {name}" for name in names),
    ]
    weights = paired.state_dict()
    value = paired.program.graph_module.get_submodule("stem")
    stem = nn.functional.conv2d(IMAGES, value.weight, value.bias, padding=1).mean((2, 3))
    head = stem @ weights["student.distill_adapters.0.weight"].T + weights["student.distill_adapters.0.bias"]
    wanted = found.outputs.detach()
    divergence = nn.functional.kl_div(
        (head / 2).log_softmax(1), (wanted / 2).log_softmax(1), reduction="batchmean", log_target=True
    )
    torch.testing.assert_close(found.losses["head stem:conv2d"], 0.5 * 0.25 * 4 * divergence)
    by_labels = 0.5 * 0.75 * nn.functional.cross_entropy(head, LABELS)
    torch.testing.assert_close(found.losses["labels of head stem:conv2d"], by_labels)
    assert_same_program(finish(paired), student, compare_tensors=False)


def test_a_gather_of_the_teachers_channels_takes_the_place_of_an_adapter(teacher: Program, student: Program) -> None:
    pair = {"student": "stem", "teacher": "layer1", "loss": "values", "channels": [1, 3, 5, 7]}
    paired = pair_for_training(student, teacher, {"pairs": [pair]})
    found = paired(IMAGES).losses["pair stem:conv2d values"]
    tapped = graphopt.optimize(
        teacher, passes="distill_hooks:taps=layer1", target=None, bench=False, cache=False
    ).program(IMAGES)[1]
    wanted = next(iter(tapped.values()))[:, [1, 3, 5, 7]]
    own = nn.functional.conv2d(
        IMAGES, *(student.state_dict()[f"stem.{leaf}"] for leaf in ("weight", "bias")), padding=1
    )
    torch.testing.assert_close(found, (own - wanted).square().sum() / wanted.square().sum())
    assert paired.state_dict().keys() == {f"student.{name}" for name in student.state_dict()}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_causal": True},
        {"scale": 0.3},
        {"attn_mask": torch.tensor([[0.0, -9.0, 0.0, 0.5]])},
        {"attn_mask": torch.tensor([[True, True, True, False]])},
    ],
    ids=["plain", "causal", "scaled", "added mask", "boolean mask"],
)
def test_fused_attention_is_opened_in_the_training_graph_alone(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    tokens = torch.randn(3, 4, 5)
    wide, slim = (capture(Attending(width, **options), tokens) for width in (16, 8))
    fused = "*:scaled_dot_product_attention"
    plan = {
        "alpha": 1,
        "features": "none",
        "pairs": [
            {"student": fused, "teacher": fused, "loss": loss}
            for loss in ("attention_scores", "attention_probabilities", "value_relations")
        ],
    }
    paired = pair_for_training(slim, wide, plan)
    found = paired(tokens)
    assert len(found.losses) == 6  # of two calls of attention
    found.loss.backward()
    names = [node.name for node in paired.program.graph.nodes]
    assert sum("scaled_dot_product_attention" in name for name in names) == 2
    probabilities = list(paired.program(tokens)[1].values())[2:4]
    q, k, v = (p.unflatten(-1, (2, -1)).transpose(1, 2) for p in _projected(slim, tokens).chunk(3, -1))
    attended = scaled_dot_product_attention(q, k, v, **options)
    torch.testing.assert_close(probabilities[0] @ v, attended)
    assert_same_program(finish(paired), slim, compare_tensors=False)


def _projected(program: Program, tokens: Tensor) -> Tensor:
    weights = program.state_dict()
    embedded = nn.functional.linear(tokens, weights["embed.weight"], weights["embed.bias"])
    return nn.functional.linear(embedded, weights["layers.0.0.weight"], weights["layers.0.0.bias"])


def test_several_teachers_weigh_as_the_plan_says(teacher: Program, student: Program) -> None:
    torch.manual_seed(9)
    other = capture(settled(ResidualNet(), IMAGES), IMAGES[:2])
    alone = [float(pair_for_training(student, one).eval()(IMAGES).loss.detach()) for one in (teacher, other)]
    both = pair_for_training(student, [teacher, other], {"teachers": [{"weight": 3.0}, {}]}).eval()
    assert float(both(IMAGES).loss.detach()) == pytest.approx(0.75 * alone[0] + 0.25 * alone[1], rel=1e-5)


def test_a_new_head_is_said_of_all_that_comes_from_it() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(8, 7)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            logits = self.head(x)
            return {"logits": logits, "probabilities": logits.softmax(-1), "x": x}

    program = with_head(capture(Both().eval(), torch.randn(2, 8)), 3, "", torch.Generator())
    assert [spec.shape for spec in program.outputs] == [("batch", 3), ("batch", 3), ("batch", 8)]


def test_a_head_of_other_classes_learns_from_labels_and_features_alone(teacher: Program) -> None:
    student = capture(Slim(classes=7), IMAGES[:2])
    paired = pair_for_training(student, teacher, labelled=True)
    names = list(paired(IMAGES, labels=LABELS).losses)
    assert names[0] == "labels"
    assert len(names) == 3  # and a pair for each of two stages


def test_the_teacher_ends_where_it_is_read_and_holds_no_batch_norm(teacher: Program, student: Program) -> None:
    plan = {"outputs": [{"student": "output", "weight": 0}], "pairs": [{"student": "stem", "teacher": "layer1"}]}
    reader = pair_for_training(student, teacher, plan)._prepared.lesson.readers[0].program
    assert reader is not None
    called = [node.name for node in reader.graph.nodes if node.op == "call_function"]
    assert not any(name.startswith(("batch_norm", "linear", "mean")) for name in called)
    assert len(called) < 10


BAD: dict[str, tuple[dict[str, Any], type[GraphOptError], str]] = {
    "nothing there": (
        {"pairs": [{"student": "stemm", "teacher": "layer1"}]},
        UsageError,
        r"Nothing in the program is at `stemm`. Nearest: `stem`",
    ),
    "shapes": (
        {"pairs": [{"student": "stem", "teacher": "head", "loss": "values"}]},
        UsageError,
        r"The pair `stem:conv2d` by `head:linear` of the plan cannot be: the student's value is Nx4x8x8, the teacher's "
        r"Nx5: they have other axes. A loss that compares samples alone",
    ),
    "no adapter": (
        {"pairs": [{"student": "stem", "teacher": "layer1", "adapter": "none", "loss": "cosine"}]},
        UsageError,
        "there is to be no adapter",
    ),
    "a teacher too many": (
        {"pairs": [{"student": "stem", "teacher": "layer1", "by": 1}]},
        UsageError,
        "a pair by teacher 1, and there are 1, counted from 0",
    ),
    "weights": ({"teachers": [{}, {}]}, UsageError, "The plan is of 2 teachers, and 1 were given"),
    "an output": ({"outputs": [{"student": "logits"}]}, UsageError, "no output `logits`. It has output"),
    "a channel": (
        {"pairs": [{"student": "stem", "teacher": "layer1", "channels": [8]}]},
        UsageError,
        "channel 8 is asked of the teacher's Nx8x8x8",
    ),
    "no head": (
        {"heads": [{"student": "stemm"}]},
        UsageError,
        "Nothing in the program is at `stemm`",
    ),
    "channels": (
        {"pairs": [{"student": "stem", "teacher": "layer1", "channels": [1, 2]}]},
        UsageError,
        "2 channels are asked of the teacher's Nx8x8x8, and the student's value is Nx4x8x8, with 4",
    ),
    "itself": (
        {"pairs": [{"student": "stem", "teacher": "stem", "by": "student"}]},
        UsageError,
        "has `stem:conv2d` of the student taught by itself",
    ),
    "no weight": (
        {"outputs": [{"student": "output", "weight": 0}], "features": "none"},
        UsageError,
        "Nothing of program teaches the student: all weights are 0",
    ),
    "a function": ({"label_loss": "nowhere:loss"}, UsageError, "importing `nowhere` failed"),
}


@pytest.mark.parametrize("what", BAD)
def test_what_cannot_be_is_said(teacher: Program, student: Program, what: str) -> None:
    plan, kind, said = BAD[what]
    with pytest.raises(kind, match=said):
        pair_for_training(student, teacher, plan)


def test_what_is_not_taken_is_said(teacher: Program, student: Program) -> None:
    paired = pair_for_training(student, teacher)
    calls: list[tuple[tuple[Any, ...], dict[str, Any], str]] = [
        ((), {}, r"The student takes x: batchx3x8x8 float32: 1 tensors, and 0 were given"),
        ((IMAGES, IMAGES), {}, "1 tensors, and 2 were given"),
        (([1],), {}, "and list was given"),
        ((IMAGES.double(),), {}, r"and \[64, 3, 8, 8\] torch.float64 was given"),
        ((IMAGES,), {"labels": LABELS}, "Labels are given that nothing learns from. Say labelled=True"),
        ((IMAGES,), {"teacher_inputs": (IMAGES,)}, "Teachers take 0 tensors of their own, and 1 were given"),
    ]
    for inputs, columns, said in calls:
        with pytest.raises(UsageError, match=said):
            paired(*inputs, **columns)
    with torch.autocast("cpu", torch.bfloat16):
        assert paired(IMAGES).outputs.dtype == torch.bfloat16
    for convert in (paired.double, paired.half, lambda: paired.to(torch.bfloat16)):
        with pytest.raises(UsageError, match=r"computes in its own types, here torch\.float32, as its teachers do"):
            convert()
    assert next(paired.parameters()).dtype == torch.float32
    with pytest.raises(UsageError, match="A teacher cannot be of type int"):
        pair_for_training(student, 3)  # type: ignore[arg-type]


def test_a_copy_and_a_moving_average_train_and_are_finished_by_themselves(teacher: Program, student: Program) -> None:
    paired = pair_for_training(student, teacher, FEATURES, labelled=True)
    average = torch.optim.swa_utils.AveragedModel(paired, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    copied = copy.deepcopy(paired)
    start = copied(IMAGES, labels=LABELS).loss.detach()
    taught(copied, steps=5, labels=LABELS)
    assert copied.training
    assert float(copied.eval()(IMAGES, labels=LABELS).loss.detach()) < float(start)
    torch.testing.assert_close(paired(IMAGES, labels=LABELS).loss.detach(), start)
    average.update_parameters(copied)
    averaged, last = finish(average.module).state_dict(), finish(copied).state_dict()
    torch.testing.assert_close(averaged["head.weight"], last["head.weight"])
    assert not torch.equal(averaged["head.weight"], student.state_dict()["head.weight"])


def test_a_pair_moves_as_a_whole(teacher: Program, student: Program) -> None:
    paired = pair_for_training(student, teacher, FEATURES, labelled=True)
    reader = paired._prepared.lesson.readers[0].program
    assert reader is not None
    stays = copy.deepcopy(paired)
    paired.to("meta")
    assert {str(device) for device in paired.program.devices} == {"meta"}
    assert {tensor.device.type for tensor in reader.parameters()} == {"meta"}
    assert {str(device) for device in stays.program.devices} == {"cpu"}
    assert stays(IMAGES, labels=LABELS).loss.device.type == "cpu"


def test_labels_that_are_missing_or_of_another_shape_are_said_to_be(teacher: Program, student: Program) -> None:
    paired = pair_for_training(student, teacher, {"alpha": 0.5})
    with pytest.raises(DataError, match="The plan learns from labels, and the batch came without"):
        paired(IMAGES)
    with pytest.raises(DataError, match=r"Cross-entropy is of class numbers \[64\].* labels are int64 \[64, 1\]"):
        paired(IMAGES, labels=LABELS[:, None])
    with pytest.raises(DataError, match="The plan learns from labels"):
        pair_for_training(student, teacher, {"alpha": 0.5}, labelled=False)


def test_a_teacher_that_takes_something_else_is_refused_and_given_its_own(student: Program) -> None:
    flat = capture(nn.Sequential(nn.Linear(4, 5)), torch.randn(2, 4))
    with pytest.raises(UsageError, match=r"The teacher `program` takes input: batchx4 float32, and the student"):
        pair_for_training(student, flat)
    signals = torch.randn(64, 4)
    paired = pair_for_training(student, flat, teacher_data=signals[:2])
    assert float(paired(IMAGES, teacher_inputs=(signals,)).loss.detach()) > 0
    with pytest.raises(DataError, match=r"the student gives \[64, 5\] for this batch, and what teaches it \[8, 5\]"):
        paired(IMAGES, teacher_inputs=(signals[:8],))


def test_of_several_teachers_some_take_inputs_of_their_own(teacher: Program, student: Program) -> None:
    flat = capture(nn.Sequential(nn.Linear(4, 5)), torch.randn(2, 4))
    signals = torch.randn(64, 4)
    plan = {"teachers": [{"inputs": "student"}, {}]}
    paired = pair_for_training(student, [teacher, flat], plan, teacher_data=signals[:2])
    alone = [
        pair_for_training(student, teacher)(IMAGES).loss,
        pair_for_training(student, flat, teacher_data=signals[:2])(IMAGES, teacher_inputs=(signals,)).loss,
    ]
    torch.testing.assert_close(paired(IMAGES, teacher_inputs=(signals,)).loss, torch.stack(alone).mean())
    with pytest.raises(UsageError, match="The plan has teacher 1, counted from 0, take inputs of its own, and there"):
        pair_for_training(student, [teacher, flat], {"teachers": [{}, {"inputs": "own"}]})


def test_nothing_to_learn_from_is_an_error(student: Program) -> None:
    with pytest.raises(UsageError, match="Nothing teaches the student: give a teacher, or labels"):
        pair_for_training(student, None)
    with pytest.raises(UsageError, match="Tensor is no program"):
        finish(IMAGES)  # type: ignore[arg-type]


def test_noise_of_gumbel_labels_is_torchs_own_and_judges_nobody(teacher: Program, student: Program) -> None:
    plan = {"outputs": [{"student": "output", "loss": "gumbel_labels"}]}
    paired = pair_for_training(student, teacher, plan).eval()
    torch.manual_seed(1)
    drawn = [float(paired(IMAGES).loss.detach()) for _ in range(2)]
    torch.manual_seed(1)
    assert float(paired(IMAGES).loss.detach()) == drawn[0] != drawn[1]
    with torch.no_grad():
        judged = paired(IMAGES).loss
    soft = pair_for_training(student, teacher, {"outputs": [{"student": "output", "loss": "soft_labels"}]}).eval()
    torch.testing.assert_close(judged, soft(IMAGES).loss.detach())


def test_taps_of_distill_hooks_are_no_outputs_of_a_student_or_a_teacher(teacher: Program, student: Program) -> None:
    def tapped(program: Program) -> Program:
        return graphopt.optimize(program, passes="distill_hooks", target=None, bench=False, cache=False).program

    paired = pair_for_training(tapped(student), tapped(teacher))
    assert list(paired(IMAGES).losses) == ["output output"]
    assert_same_program(finish(paired), student, compare_tensors=False)


def test_a_regression_is_taught_its_values_where_no_labels_say_that_it_is_of_classes() -> None:
    torch.manual_seed(0)
    one, other = nn.Linear(3, 5), nn.Linear(3, 5)
    other.load_state_dict({**one.state_dict(), "bias": one.bias.detach() + 10})
    rows = torch.randn(8, 3)
    student, teacher = (capture(model, rows) for model in (one, other))
    error = (one(rows) - other(rows)).square().sum() / other(rows).square().sum()
    torch.testing.assert_close(pair_for_training(student, teacher)(rows).loss, error)  # no temperature sees it
    named = pair_for_training(student, teacher, {"outputs": [{"student": "output", "loss": "soft_labels"}]})
    assert float(named(rows).loss.detach()) == pytest.approx(0, abs=1e-5)
    labelled = pair_for_training(student, teacher, labelled=True)(rows, labels=LABELS[:8])
    assert float(labelled.losses["output output"].detach()) == pytest.approx(0, abs=1e-5)
    sure = capture(nn.Sequential(other, nn.Softmax(1)), rows)  # its values are no logits'
    assert float(pair_for_training(sure, student)(rows).loss.detach()) == pytest.approx(0, abs=1e-5)


def test_classes_of_maps_are_taught_and_labelled_where_the_convolution_has_them() -> None:
    torch.manual_seed(0)
    maps = torch.randn(4, 3, 5, 5)
    student, teacher = (capture(nn.Conv2d(3, 5, 1), maps) for _ in range(2))
    labels = torch.randint(0, 5, (4, 5, 5))
    plan = {"temperature": 1, "outputs": [{"student": "output", "loss": "soft_labels"}]}
    found = pair_for_training(student, teacher, plan, labelled=True)(maps, labels=labels)
    own, wanted = student(maps), teacher(maps)
    divergence = (wanted.softmax(1) * (wanted.log_softmax(1) - own.log_softmax(1))).sum(1).mean()
    torch.testing.assert_close(found.losses["output output"], 0.5 * divergence)
    torch.testing.assert_close(found.losses["labels"], 0.5 * nn.functional.cross_entropy(own, labels))
    with pytest.raises(UsageError, match=r"axis 4 of the output `output` holds its classes.*: its last is 3"):
        pair_for_training(student, teacher, {"outputs": [{"student": "output", "axis": 4}]})


class Named(nn.Module):
    """Two inputs and two outputs by name."""

    def __init__(self) -> None:
        super().__init__()
        self.classes, self.box = nn.Linear(6, 3), nn.Linear(6, 3)

    def forward(self, a: Tensor, b: Tensor) -> dict[str, Tensor]:
        return {"classes": self.classes(a - 2 * b), "box": self.box(a + b)}


class Turned(Named):
    """The same, in another order."""

    def forward(self, b: Tensor, a: Tensor) -> dict[str, Tensor]:
        found = super().forward(a, b)
        return {"box": found["box"], "classes": found["classes"]}


class Places(nn.Module):
    """Classes of eight places from one product, in either order, scaled by what was learned."""

    def __init__(self, view: tuple[int, int], seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.fc, self.view, self.scale = nn.Linear(6, 40), view, nn.Parameter(torch.tensor(1.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x).view(-1, *self.view) * self.scale.exp()


@pytest.mark.parametrize(("view", "labels", "axis"), [((5, 8), (4, 8), 1), ((8, 5), (4, 8), 2), ((5, 8), (4, 5), 2)])
def test_the_teachers_classes_are_where_labels_have_theirs(
    view: tuple[int, int], labels: tuple[int, int], axis: int
) -> None:
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    one, other = (capture(Places(view, seed).eval(), x[:2]) for seed in (1, 2))
    plan, numbers = DistillPlan(temperature=2.0), torch.zeros(labels, dtype=torch.long)
    found = prepare(
        plan, one, [Teacher.open(other, data=(x,))], torch.Generator(), labelled=True, labels=numbers, apart=[False]
    )
    outputs, wanted = one.call_flat((x,)), other.call_flat((x,))
    (term,) = found.lesson.outputs
    expected = soft_labels(outputs[0].movedim(axis, -1), wanted[0].movedim(axis, -1), 2.0)
    torch.testing.assert_close(term(outputs, [wanted]), 0.5 * expected)


@pytest.mark.parametrize(("loss", "labels"), [("auto", torch.zeros(4, 5)), ("mse", None)])
def test_labels_that_are_values_leave_the_teachers_values_taught(loss: str, labels: Tensor | None) -> None:
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    one, other = (capture(nn.Linear(6, 5).eval(), x[:2]) for _ in range(2))
    plan, given = DistillPlan.of({"label_loss": loss}), [Teacher.open(other, data=(x,))]
    found = prepare(plan, one, given, torch.Generator(), labelled=True, labels=labels, apart=[False])
    with torch.no_grad():
        outputs, wanted = one.call_flat((x,)), other.call_flat((x,))
    (term,) = found.lesson.outputs
    shifted = (wanted[0] + 3.0,)  # soft labels do not see it
    assert float(term(shifted, [wanted])) > 0.1 > 1e-6 > float(term(wanted, [wanted]))
    assert float(term(outputs, [wanted])) > 0


def test_of_labels_of_a_loss_of_the_users_own_nothing_is_known() -> None:
    """One score for each sample is no class, though its labels are integers."""
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    one, other = (capture(nn.Linear(6, 1).eval(), x[:2]) for _ in range(2))
    plan, given = DistillPlan.of({"label_loss": "torch.nn.functional:l1_loss"}), [Teacher.open(other, data=(x,))]
    numbers = torch.ones(4, dtype=torch.long)
    found = prepare(plan, one, given, torch.Generator(), labelled=True, labels=numbers, apart=[False])
    with torch.no_grad():
        (term,) = found.lesson.outputs
        assert float(term(one.call_flat((x,)), [other.call_flat((x,))])) > 0.01


def test_a_temperature_that_softens_nothing_is_said(teacher: Program) -> None:
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    squashed = capture(nn.Sequential(nn.Linear(6, 5), nn.Tanh()).eval(), x[:2])
    plan, given = DistillPlan(temperature=2.0), [Teacher.open(squashed, data=(x,))]
    said = prepare(plan, squashed, given, torch.Generator(), labelled=False, apart=[False]).refusals
    assert [(refusal.site, refusal.reason) for refusal in said] == [
        ("temperature", "no output is taught by soft labels: it softens nothing")
    ]


def test_a_pair_says_that_it_is_not_pickled(teacher: Program, student: Program) -> None:
    with pytest.raises(UsageError, match=r"state_dict\(\)"):
        pickle.dumps(paired := pair_for_training(student, teacher))
    assert copy.copy(paired).program is paired.program


@pytest.mark.parametrize("captured", [False, True])
def test_inputs_and_outputs_are_matched_by_their_names(captured: bool) -> None:
    torch.manual_seed(0)
    student, teacher = Named(), Turned()
    a, b = torch.randn(2, 8, 6)
    given = capture(teacher, (b, a)) if captured else teacher
    plan = {"outputs": [{"student": name, "loss": "values"} for name in ("classes", "box")]}
    found = pair_for_training(student, given, plan, data=(a, b))(a, b).losses
    own, wanted = student(a, b), teacher(b, a)
    for name in own:
        error = 0.5 * (own[name] - wanted[name]).square().sum() / wanted[name].square().sum()
        torch.testing.assert_close(found[f"output {name}"], error)


def test_what_a_pass_set_to_zero_stays_so_in_a_loop_of_ones_own() -> None:
    torch.manual_seed(0)
    data = torch.randn(64, 8)
    dense = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)).eval()
    sparse = graphopt.optimize(dense, data, "sparsify:ratio=0.7", None).program
    held = sparse.state_dict()["0.weight"] == 0
    paired = graphopt.pair_for_training(sparse, nn.Linear(8, 3).eval(), {})
    for module in (paired, copy.deepcopy(paired)):
        optimizer = torch.optim.AdamW(module.train().parameters(), 1e-2)
        for _ in range(3):
            optimizer.zero_grad()
            module(data).loss.backward()
            optimizer.step()
        trained = graphopt.finish(module).state_dict()["0.weight"]
        assert torch.equal(trained == 0, held)
