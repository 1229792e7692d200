"""graphopt.distill: any teacher, any student, labels or none; its result goes on, replays, and errors are sentences."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import graphopt
from graphopt.capturing.capture import capture
from graphopt.distillation import label_losses, synthesis, teaching
from graphopt.distillation.adversarial import adversarial
from graphopt.distillation.augment import LabelColumn, view_of
from graphopt.distillation.loop import Trainer
from graphopt.distillation.synthesis import synthesised
from graphopt.errors import DataError, GraphOptError, PassError, UsageError
from graphopt.ir.program import Program
from graphopt.job.result import Result
from graphopt.pipeline.context import NoProgress
from graphopt.testing import assert_same_program, fingerprint
from tests.graphopt.distillation.models import ResidualNet, settled

IMAGES = torch.randn(320, 3, 8, 8, generator=torch.Generator().manual_seed(1))
SHORT: dict[str, Any] = {"epochs": 2, "batch_size": 32}


class Slim(nn.Module):
    """A student that shares nothing with the teacher."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.stem, self.norm, self.down = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, 2, 1)
        self.drop, self.head = nn.Dropout(0.1), nn.Linear(6, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(self.norm(self.stem(x)).relu()).relu()
        return self.head(self.drop(x.mean((2, 3))))


class Bytes(nn.Module):
    """Takes images as they are stored."""

    def forward(self, x: Tensor) -> Tensor:
        return x.float() / 255


class Compared(nn.Module):
    """Reads where its input is positive."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(192, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((x > 0).flatten(1).float())


@pytest.fixture(scope="module")
def teacher() -> nn.Module:
    torch.manual_seed(0)
    model = settled(ResidualNet(), IMAGES[:64])
    nn.init.normal_(model.get_parameter("head.weight"))
    with torch.no_grad():
        model.get_parameter("head.bias").sub_(model(IMAGES).mean(0))  # every class is some sample's
    return model


@pytest.fixture(scope="module")
def labels(teacher: nn.Module) -> Tensor:
    with torch.no_grad():
        return teacher(IMAGES).argmax(1)


def slim(classes: int = 5) -> nn.Module:
    torch.manual_seed(3)
    return Slim(classes)


@functools.cache
def captured(model: nn.Module) -> Program:
    """Capture what many tests begin with."""
    return capture(model.eval(), IMAGES[:2])


STUDENT = slim()


def distilled(teacher: Any, plan: dict[str, Any] | None = None, **options: Any) -> Result:
    options = {"target": None, "bench": False, "cache": False, **options}
    teacher = captured(teacher) if isinstance(teacher, ResidualNet) else teacher
    return graphopt.distill(captured(STUDENT), teacher, IMAGES, {**SHORT, **(plan or {})}, **options)


@pytest.fixture(scope="module")
def artifact(teacher: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    return graphopt.optimize(teacher, IMAGES[:2], passes="", bench=False).save(folder / "onnx")[0]


@pytest.fixture(scope="module")
def result(artifact: Path, labels: Tensor) -> Result:
    test = {"x": IMAGES[:64], "labels": labels[:64]}
    plan = {"epochs": 4, "alpha": 0.7}
    return distilled(artifact, plan, labels=labels, eval=test, passes="int8", target="onnxruntime")


def test_an_artifact_teaches_and_the_student_is_quantized_lowered_and_replayed(
    result: Result, labels: Tensor, tmp_path: Path
) -> None:
    losses = result.distillation["held_out_losses"]
    assert isinstance(losses, list)
    assert min(losses) < 0.95 * losses[0]
    assert result.distillation["labels"] == pytest.approx(0.3)
    assert [plan.pass_name for plan in result.plans] == ["fold", "int8"]
    assert any(
        "of top1 the student had" in note and "onnxruntime.onnx has 100.00" in note for note in result.report.notes
    )
    result.save(tmp_path / "out")
    opened = graphopt.open(tmp_path / "out")
    assert opened.distillation == result.distillation
    again = graphopt.replay(capture(slim(), IMAGES[:2]), tmp_path / "out" / "manifest.json")
    assert fingerprint(again["onnxruntime"]) == fingerprint(result.program)
    learned = slim()
    learned.load_state_dict(load_file(tmp_path / "out" / "distilled.safetensors"))
    assert result.original is not None
    with torch.no_grad():
        torch.testing.assert_close(learned.eval()(IMAGES), result.original(IMAGES))


def test_features_leave_no_trace_and_neither_student_nor_teacher_is_changed(teacher: nn.Module) -> None:
    student, given = slim(), capture(teacher, IMAGES[:2])
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    mark = fingerprint(given)
    result = graphopt.distill(student, given, IMAGES, {**SHORT, "features": "stages"}, target=None, bench=False)
    assert result.distillation["pairs"] == [
        "`:relu#0` by `layer1.relu:relu#1`: values, weight 0.5, adapter 4 to 8 channels",
        "`:relu#1` by `layer2.relu:relu#1`: values, weight 0.5, adapter 6 to 8 channels",
    ]
    assert_same_program(result.program, capture(student, IMAGES[:2]), compare_tensors=False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in student.state_dict().items())
    assert fingerprint(given) == mark
    assert student.training


def test_what_teachers_say_is_kept_where_no_view_changes_the_samples_and_makes_no_difference(
    teacher: nn.Module, labels: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[bool] = []
    asked = teaching.Teaching.wanted

    def counted(self: teaching.Teaching, batch: Any) -> Any:
        calls.append(self.cached)
        return asked(self, batch)

    monkeypatch.setattr(teaching.Teaching, "wanted", counted)
    kept = distilled(teacher, labels=labels)
    assert calls.count(False) < len(calls) / 2
    monkeypatch.setattr(teaching, "_MOST_CACHED", 0)
    calls.clear()
    asked_anew = distilled(teacher, labels=labels)
    assert not any(calls)
    for name, tensor in kept.program.state_dict().items():
        torch.testing.assert_close(tensor, asked_anew.program.state_dict()[name])


def test_the_same_seed_gives_the_same_tensors(teacher: nn.Module, labels: Tensor) -> None:
    first, second, other = (
        distilled(teacher, {"features": "stages", "epochs": 1}, labels=labels, seed=seed).program for seed in (4, 4, 5)
    )
    assert fingerprint(first) == fingerprint(second) != fingerprint(other)


def test_the_student_teaches_itself_from_its_depths(labels: Tensor) -> None:
    pair = {"student": "stem", "teacher": "down", "by": "student", "loss": "values"}
    result = distilled(None, {"pairs": [pair], "heads": [{"student": "down"}]}, labels=labels)
    assert result.distillation["heads"] == ["down:conv2d"]
    assert result.distillation["pairs"] == [
        "`stem:conv2d` by `down:conv2d`: values, weight 1, adapter resized to 4x4, 4 to 6 channels"
    ]
    assert result.distillation["teachers"] == []


def test_a_teacher_of_other_inputs_gets_its_own_samples(labels: Tensor) -> None:
    signals = IMAGES.mean((2, 3))
    paired = nn.Sequential(nn.Linear(3, 5)).eval()
    result = distilled(paired, teacher_data=signals)
    losses = result.distillation["held_out_losses"]
    assert isinstance(losses, list)
    assert min(losses) < losses[0]
    plan = {"teachers": [{"inputs": "own"}, {"inputs": "student"}]}
    both = distilled([paired, slim().eval()], plan, teacher_data=signals)
    assert both.distillation["outputs"] == {"output by Sequential": 0.5, "output by Slim": 0.5}
    with pytest.raises(UsageError, match="There are data of teachers, and no teacher takes them"):
        distilled(slim().eval(), {"teachers": [{"inputs": "student"}]}, teacher_data=signals)
    with pytest.raises(DataError, match="The teacher's data does not go with the student's: from sample 256 on"):
        distilled(paired, teacher_data=signals[:256])


def test_a_regression_learns_from_labels_by_the_squared_error(teacher: nn.Module) -> None:
    with torch.no_grad():
        wanted = teacher(IMAGES)
    result = distilled(None, {"epochs": 3}, labels=wanted)
    losses = result.distillation["held_out_losses"]
    assert isinstance(losses, list)
    with torch.no_grad():
        assert losses[0] == pytest.approx(float((slim().eval()(IMAGES) - wanted).square().mean()), rel=0.5)
    assert min(losses) < losses[0]


@pytest.mark.parametrize("name", ["mixup", "cutmix"])
def test_mixed_images_have_mixed_labels(name: str) -> None:
    images, numbers = torch.zeros(8, 3, 16, 16), torch.arange(8)
    images += numbers.view(-1, 1, 1, 1)
    program = capture(nn.Sequential(nn.Flatten(), nn.Linear(768, 8)), images)
    mixed, shares = view_of([name], program, LabelColumn(1, 8))((images, numbers), torch.Generator().manual_seed(2))
    assert shares.sum(1).tolist() == pytest.approx([1.0] * 8)
    torch.testing.assert_close(mixed.mean((1, 2, 3)), shares @ numbers.float())
    assert 0 < float(shares.trace()) < 8


@pytest.mark.parametrize("name", ["mixup", "cutmix"])
def test_mixed_bytes_are_bytes(name: str) -> None:
    images = torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    view = view_of([name], capture(Bytes().eval(), images[:2]))
    (mixed,) = view((images,), torch.Generator().manual_seed(1))
    assert mixed.dtype is torch.uint8
    assert not torch.equal(mixed, images)
    assert images.min() <= mixed.min() <= mixed.max() <= images.max()


def test_an_adversarial_view_of_what_is_only_compared_is_refused(labels: Tensor) -> None:
    student = capture(Compared().eval(), IMAGES[:2])
    with pytest.raises(UsageError, match="nothing that is learned depends on the first input"):
        graphopt.distill(
            student,
            None,
            IMAGES,
            {**SHORT, "augment": ["adversarial"]},
            labels=labels,
            bench=False,
            target=None,
            cache=False,
        )


def test_views_are_trained_on(teacher: nn.Module, labels: Tensor) -> None:
    images = nn.functional.interpolate(IMAGES[:64], scale_factor=2)
    plan = {"epochs": 1, "augment": ["auto", "cutmix"]}
    result = graphopt.distill(slim(), teacher, images, plan, labels=labels[:64], target=None, bench=False)
    assert result.distillation["views"] == ["flip", "shift", "cutmix"]


def test_adversarial_views_are_where_the_student_errs_more_and_leave_its_statistics(teacher: nn.Module) -> None:
    paired = graphopt.pair_for_training(slim(), teacher, data=IMAGES[:2]).train()
    before = {name: tensor.clone() for name, tensor in paired.program.state_dict().items()}
    lesson = paired._prepared.lesson
    torch.manual_seed(0)  # of its Dropout
    (moved,) = adversarial(lambda batch, _: batch, paired.program, lesson)((IMAGES,), torch.Generator())
    assert all(torch.equal(tensor, before[name]) for name, tensor in paired.program.state_dict().items())
    torch.testing.assert_close((moved - IMAGES).abs().max(), 0.1 * IMAGES.std())
    paired.eval()
    assert float(paired(moved).loss.detach()) > 1.01 * float(paired(IMAGES).loss.detach())
    result = distilled(teacher, {"epochs": 1, "augment": ["adversarial"]}, labels=torch.arange(320) % 5)
    assert result.distillation["views"] == ["adversarial"]


def test_views_leave_labels_alone_that_may_say_where_something_is(teacher: nn.Module) -> None:
    images = nn.functional.interpolate(IMAGES[:64], scale_factor=2)
    with torch.no_grad():
        wanted = teacher(IMAGES[:64])
    result = graphopt.distill(slim(), None, images, SHORT, labels=wanted, target=None, bench=False, cache=False)
    assert result.distillation["views"] == []


def test_mixed_classes_are_trained_on_by_their_cross_entropy(labels: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(label_losses, "_squared_error")
    images = nn.functional.interpolate(IMAGES[:64], scale_factor=2)
    plan = {**SHORT, "augment": ["mixup"]}
    result = graphopt.distill(slim(), None, images, plan, labels=labels[:64], target=None, bench=False, cache=False)
    assert result.distillation["views"] == ["mixup"]


def test_labels_left_out_weigh_nothing_in_whichever_part_of_a_step_they_are(labels: Tensor) -> None:
    images, numbers = IMAGES[:128].mean((2, 3)), labels[:128].clone()
    numbers[::2] = -100
    torch.manual_seed(0)
    student = nn.Linear(3, 5)
    whole, parts = (
        graphopt.distill(student, None, images, {**SHORT, "parts": count}, labels=numbers, target=None, bench=False)
        for count in (1, 32)
    )
    assert parts.distillation["held_out_losses"] == pytest.approx(whole.distillation["held_out_losses"], rel=1e-5)


def test_no_batch_norm_is_trained_on_a_single_sample() -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.norm, self.head = nn.Embedding(9, 6), nn.BatchNorm1d(6), nn.Linear(6, 4)

        def forward(self, words: Tensor) -> Tensor:
            return self.head(self.norm(self.embed(words).mean(1)))

    torch.manual_seed(0)
    words = [torch.randint(0, 9, (count, length)) for count, length in ((24, 4), (17, 6), (1, 8))]
    options: dict[str, Any] = {"dynamic_shapes": {"words": {1: "length"}}, "target": None, "bench": False}
    result = graphopt.distill(Words(), Words(), words, {**SHORT, "batch_size": 2, "parts": 2}, **options)
    assert len(result.distillation["held_out_losses"]) == 3
    assert any("samples: alone in their shape" in note and "1 of" in note for note in result.report.notes)


def test_without_batch_norm_a_rate_is_chosen_that_a_student_from_scratch_learns_at(labels: Tensor) -> None:
    signals = IMAGES.mean((2, 3))
    torch.manual_seed(0)
    student, teacher = (nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 5)) for _ in range(2))
    nn.init.constant_(teacher[2].bias, 3.0)
    result = graphopt.distill(student, teacher, signals, {"epochs": 8}, target=None, bench=False, cache=False)
    losses, tried = result.distillation["held_out_losses"], result.distillation["tried"]
    assert isinstance(losses, list)
    assert isinstance(tried, list)
    assert min(losses) < 0.2 * losses[0]
    assert [one["rate"] for one in tried] == [0.01, 0.03, 0.1]
    assert result.distillation["lr"] == 0.1


def test_what_a_trial_won_is_kept_where_training_diverges() -> None:
    _spoiled.clear()
    signals = IMAGES.mean((2, 3))
    plan = {**SHORT, "outputs": [{"student": "output", "loss": f"{HERE}:spoiled"}]}
    torch.manual_seed(0)
    result = graphopt.distill(nn.Linear(3, 5), nn.Linear(3, 5), signals, plan, target=None, bench=False, cache=False)
    losses = result.distillation["held_out_losses"]
    assert isinstance(losses, list)
    assert losses[1] < losses[0]
    assert any("it ended early: Training diverged" in note for note in result.report.notes)


_spoiled: list[None] = []  # steps


def spoiled(found: Tensor, wanted: Tensor) -> Tensor:
    """Return a loss that is not a number after three trials of twelve steps."""
    _spoiled.extend([None] * torch.is_grad_enabled())
    return (found - wanted).square().mean() * (float("nan") if len(_spoiled) > 36 else 1.0)


def never(found: Tensor, wanted: Tensor) -> Tensor:
    """Return a loss that is not a number once training has started."""
    return (found * float("nan")).mean() if found.requires_grad and torch.is_grad_enabled() else found.square().mean()


def wrong(found: Tensor, wanted: Tensor) -> Tensor:
    """Return a loss for each sample."""
    return found.square().mean(1)


def apart(found: Tensor, wanted: Tensor) -> Tensor:
    """Return a loss that no gradient comes from."""
    return (found - wanted).square().mean().detach()


def ordinal(found: Tensor, wanted: Tensor) -> Tensor:
    """Return a loss of numbers that are no classes."""
    return (found.mean(1) - wanted.float() / 10).square().mean()


def test_what_labels_mean_to_a_loss_of_the_users_own_is_up_to_it() -> None:
    numbers = torch.arange(320) % 40
    result = distilled(None, {"epochs": 1, "label_loss": f"{HERE}:ordinal"}, labels=numbers)
    assert result.distillation["labels"] == 1.0


HERE = "tests.graphopt.job.test_distilling"
Case = tuple[Callable[[nn.Module, Tensor], object], type[GraphOptError], str]
BAD: dict[str, Case] = {
    "no data": (lambda t, y: graphopt.distill(slim(), t, None), DataError, "Distillation needs data to learn on"),
    "too few": (
        lambda t, y: graphopt.distill(slim(), t, IMAGES[:8]),
        DataError,
        "Pass `distill` needs samples to learn",
    ),
    "no labels": (
        lambda t, y: distilled(t, {"alpha": 0.5}),
        DataError,
        r"The plan learns from labels \(alpha below 1, label_loss or label_output\), and the data has none",
    ),
    "too few labels": (lambda t, y: distilled(t, labels=y[:100]), DataError, "There are 100 labels, and more samples"),
    "too many labels": (
        lambda t, y: distilled(t, labels=torch.cat([y, y])),
        DataError,
        "There are 640 labels for 320 samples",
    ),
    "other classes of a fixed batch": (
        lambda t, y: graphopt.distill(
            capture(slim(), IMAGES[:2], dynamic_shapes={"x": {0: None}}), t, IMAGES, SHORT, labels=y + 1
        ),
        DataError,
        "The output has 5 classes, and the labels go from 1 to 5",
    ),
    "other classes": (
        lambda t, y: distilled(t, labels=y + 1),
        DataError,
        "The output has 5 classes, and the labels go from 1 to 5",
    ),
    "no address": (
        lambda t, y: distilled(t, {"pairs": [{"student": "stem", "teacher": "layer7"}]}),
        UsageError,
        r"Nothing in the program is at `layer7`. Nearest: `layer2`",
    ),
    "shapes": (
        lambda t, y: distilled(t, {"pairs": [{"student": "stem", "teacher": "head", "loss": "attention"}]}),
        UsageError,
        "cannot be: the student's value is Nx4x8x8, the teacher's Nx5: they have other axes",
    ),
    "not a number": (
        lambda t, y: distilled(t, {"outputs": [{"student": "output", "loss": f"{HERE}:never"}]}),
        PassError,
        "Training diverged: the loss is not finite after 9 steps. Try a tenth of the rate",
    ),
    "a loss of its own": (
        lambda t, y: distilled(t, {"outputs": [{"student": "output", "loss": f"{HERE}:wrong"}]}),
        UsageError,
        r"The loss `tests.graphopt.job.test_distilling:wrong` returned a value of shape \[",
    ),
    "a structure of its own": (
        lambda t, y: distilled(nn.Sequential(t, nn.Unflatten(1, (5, 1))), {"features": "none"}),
        UsageError,
        "Nothing of Sequential teaches the student: `output`: it is output: batchx5 float32, and that of the teacher",
    ),
    "itself": (
        lambda t, y: graphopt.distill(t, t, IMAGES, SHORT),
        UsageError,
        "The student gives what its teacher gives already",
    ),
    "integers": (
        lambda t, y: graphopt.distill(
            graphopt.optimize(t, IMAGES, passes="int8", target=None, bench=False).program, t, IMAGES
        ),
        UsageError,
        "The student cannot be trained: its weight `.*` is stored as integers",
    ),
    "no file": (lambda t, y: distilled("gone.onnx"), GraphOptError, "There is no gone.onnx. Give the teacher's file"),
    "an artifact's insides": (
        lambda t, y: distilled(
            graphopt.optimize(t, IMAGES[:2], passes="", bench=False).artifact,
            {"pairs": [{"student": "stem", "teacher": "layer1"}]},
        ),
        UsageError,
        "is run by its runtime, which gives its outputs alone: the value `layer1` cannot be read",
    ),
    "a label": (lambda t, y: distilled(t, labels=3), DataError, "The labels are a single value, 3"),
    "words": (
        lambda t, y: distilled(t, labels=["a"] * 320),
        DataError,
        "No tensor can be made of the labels: too many",
    ),
    "a loss apart": (
        lambda t, y: distilled(t, {"outputs": [{"student": "output", "loss": f"{HERE}:apart"}]}),
        UsageError,
        "apart` returned a value without a gradient",
    ),
    "labels left out": (
        lambda t, y: distilled(t, labels=torch.full_like(y, -100)),
        DataError,
        "Of the samples to learn from none has a label: all are -100",
    ),
    "views of what has no gradient": (
        lambda t, y: graphopt.distill(
            nn.Embedding(9, 5), nn.Embedding(9, 5), torch.arange(64) % 9, {"augment": ["adversarial"]}
        ),
        UsageError,
        'augment = "adversarial", and input: batch int64 has no gradient',
    ),
    "views of labels": (
        lambda t, y: graphopt.distill(
            nn.Conv2d(3, 5, 1), None, IMAGES, {"augment": ["flip"]}, labels=torch.zeros(320, 8, 8, dtype=torch.long)
        ),
        UsageError,
        'augment = "flip", which moves what is in images, and labels of 3 axes say where it is',
    ),
    "views of no images": (
        lambda t, y: graphopt.distill(nn.Linear(3, 5), nn.Linear(3, 5), IMAGES.mean((2, 3)), {"augment": ["flip"]}),
        UsageError,
        'The plan says augment = "flip", which changes images, and the first input is input: batchx3 float32',
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_what_cannot_be_is_one_sentence(teacher: nn.Module, labels: Tensor, what: str) -> None:
    call, kind, said = BAD[what]
    with pytest.raises(kind, match=said):
        call(teacher, labels)


def test_an_output_of_another_task_is_not_taught_and_labels_are_its_own(teacher: nn.Module) -> None:
    numbers = torch.arange(320) % 7
    plan = {**SHORT, "epochs": 1}
    result = graphopt.distill(slim(7), teacher, IMAGES, plan, labels=numbers, target=None, bench=False)
    assert result.distillation["outputs"] == {}
    assert result.distillation["labels"] == 1.0
    assert result.distillation["pairs"]
    assert any("output: it is output: batchx7 float32" in note for note in result.report.notes)


def test_a_teacher_elsewhere_is_brought_to_the_student(teacher: nn.Module) -> None:
    from graphopt.distillation.teachers import Teacher

    moved = Teacher.open(teacher, data=IMAGES[:2]).to(torch.device("meta"))
    assert moved.program is not None
    assert moved.program.device.type == "meta"
    assert dataclasses.replace(moved, program=None, artifact=None).to(torch.device("meta")).program is None


def test_a_new_head_learns_the_labels_of_another_task_and_is_replayed(teacher: nn.Module, tmp_path: Path) -> None:
    numbers = torch.arange(320) % 7
    plan = {**SHORT, "epochs": 1, "head": 7}
    result = graphopt.distill(slim(), teacher, IMAGES, plan, labels=numbers, bench=False)
    assert result.program(IMAGES).shape == (320, 7)
    assert result.artifact.outputs[0].shape[1:] == (7,)
    assert result.distillation["pairs"]
    result.save(tmp_path / "out")
    again = graphopt.replay(capture(slim(), IMAGES[:2]), tmp_path / "out" / "manifest.json")
    assert fingerprint(again["onnxruntime"]) == fingerprint(result.program)
    with pytest.raises(UsageError, match="The output `output` cannot have a new head: no Linear is behind it"):
        graphopt.distill(nn.Sequential(slim(), nn.ReLU()), teacher, IMAGES, plan, labels=numbers)


def test_without_data_samples_are_made_up_of_what_batch_norms_know(
    teacher: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = nn.Sequential(nn.BatchNorm2d(3), teacher).eval()
    told[0].running_mean.copy_(torch.tensor([2.0, -3.0, 0.5]))
    told[0].running_var.copy_(torch.tensor([4.0, 0.25, 1.0]))
    program = capture(told, IMAGES[:2])
    made = synthesised(program, 80, torch.Generator().manual_seed(0), NoProgress())
    assert made.shape == (80, 3, 8, 8)
    torch.testing.assert_close(made.mean((0, 2, 3)), told[0].running_mean, atol=0.3, rtol=0)
    torch.testing.assert_close(made.var((0, 2, 3)), told[0].running_var, atol=0, rtol=0.5)
    with torch.no_grad():
        assert len(told(made).argmax(1).unique()) == 5  # of every class some
    monkeypatch.setattr(synthesis, "_STEPS", 5)
    plan = {**SHORT, "synthesised": 80}
    result = graphopt.distill(capture(slim(), IMAGES[:2]), program, None, plan, target=None, bench=False)
    losses = result.distillation["held_out_losses"]
    assert isinstance(losses, list)
    assert len(losses) == 3
    with pytest.raises(UsageError, match="Samples are made up of the statistics of BatchNorms"):
        synthesised(capture(nn.Linear(3, 5), torch.randn(2, 3)), 80, torch.Generator(), NoProgress())


class Killed(NoProgress):
    """Ends a run as ^C does, in the second epoch of training."""

    def track(self, steps: Any, label: str, total: int | None = None) -> Any:
        for at, step in enumerate(super().track(steps, label, total)):
            if at == 12:
                raise KeyboardInterrupt
            yield step


def test_a_killed_run_goes_on_and_a_finished_one_is_over(
    teacher: nn.Module, labels: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = {"features": "stages", "clip": 1.0, "average": 0.9, "parts": 2}
    whole = distilled(teacher, plan, labels=labels)
    monkeypatch.setenv("GRAPHOPT_CACHE", str(tmp_path))
    with pytest.raises(KeyboardInterrupt):
        distilled(teacher, plan, labels=labels, cache=True, progress=Killed())
    steps: list[int] = []
    taken = Trainer._step
    monkeypatch.setattr(Trainer, "_step", lambda self, *args: (steps.append(1), taken(self, *args))[1])
    resumed = distilled(teacher, plan, labels=labels, cache=True)
    assert len(steps) == 9  # of 18: the second epoch
    assert fingerprint(resumed.program) == fingerprint(whole.program)
    assert resumed.distillation == whole.distillation
    again = distilled(teacher, plan, labels=labels, cache=True, passes="fold")
    assert len(steps) == 9
    assert again.original is not None
    assert fingerprint(again.original) == fingerprint(whole.program)
    distilled(teacher, plan, labels=labels, cache=True, seed=1)
    assert len(steps) == 27


def test_probabilities_of_a_file_are_not_taken_for_logits(tmp_path: Path) -> None:
    torch.manual_seed(0)
    data = torch.randn(48, 8)
    model = nn.Sequential(nn.Linear(8, 5), nn.Softmax(-1)).eval()
    plan = {"epochs": 1, "lr": 0.01}
    student = nn.Linear(8, 5).eval()
    graphopt.optimize(model, data, "", bench=False).save(tmp_path)
    found = [
        graphopt.distill(student, teacher, data, plan, target=None, cache=False).report.notes
        for teacher in (model, tmp_path / "onnxruntime.onnx")
    ]
    losses = [re.findall(r"held-out loss ([\d.]+)", " ".join(notes)) for notes in found]
    assert losses[0]
    assert losses[0] == losses[1]


class Named(nn.Module):
    """Two outputs of one size by names."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        self.names, self.layers = names, nn.ModuleList(nn.Linear(8, 4) for _ in names)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {name: layer(x) for name, layer in zip(self.names, self.layers, strict=True)}


def test_outputs_of_equal_names_go_together_where_others_differ() -> None:
    torch.manual_seed(0)
    data, teacher = torch.randn(96, 8), Named("box", "score").eval()
    with torch.no_grad():
        for value, layer in zip((5.0, -5.0), teacher.layers, strict=True):
            nn.init.zeros_(layer.weight)
            nn.init.constant_(layer.bias, value)
    plan = {"epochs": 30, "batch_size": 8, "lr": 0.1, "outputs": [{"student": "box", "loss": "values"}]}
    student = graphopt.distill(Named("logits", "box"), teacher, data, plan, target=None, cache=False).original
    assert student is not None
    assert student(data)["box"].mean() > 1


def test_labels_alone_have_no_features_beside_them() -> None:
    torch.manual_seed(0)
    data, labels = torch.randn(64, 3, 8, 8), torch.arange(64) % 5
    plan = {"epochs": 1, "alpha": 0.0}
    found = graphopt.distill(ResidualNet(4), ResidualNet().eval(), data, plan, labels=labels, target=None, cache=False)
    assert found.distillation["pairs"] == []
    assert found.distillation["labels"] == 1.0
