"""Evaluation: metrics against values worked out by hand, over every form of data and outputs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from graphopt.capturing.capture import capture
from graphopt.data import InputSpec
from graphopt.data.batches import Labelled
from graphopt.errors import DataError, UsageError
from graphopt.ir.program import Program
from graphopt.ir.training import is_training
from graphopt.measure.evaluate import evaluator
from graphopt.measure.metrics import METRICS, find_metric

# Scores of seven classes; the right class ranks 1st, 2nd, 6th and 1st.
SCORES = torch.tensor(
    [[9, 1, 2, 3, 4, 5, 6], [9, 8, 2, 3, 4, 5, 6], [6, 5, 4, 3, 2, 1, 0], [0, 0, 0, 9, 0, 0, 0]], dtype=torch.float32
)
CLASSES = torch.tensor([0, 1, 5, 3])


def identity(x: torch.Tensor) -> torch.Tensor:
    """Return the inputs: they are the scores."""
    return x


def test_top1_and_top5() -> None:
    assert evaluator((SCORES, CLASSES))(identity) == 50.0
    assert evaluator((SCORES, CLASSES, "top5"))(identity) == 75.0


def test_ties_are_decided_as_argmax_does() -> None:
    flat = torch.zeros(4, 7)
    assert evaluator((flat, torch.tensor([0, 0, 1, 6])))(identity) == 50.0


def test_nan_is_never_right() -> None:
    scores = SCORES.clone()
    scores[0, 3] = float("nan")
    assert evaluator((SCORES, CLASSES))(lambda x: scores) == 25.0


def test_f1_is_the_mean_over_classes() -> None:
    # predicted 0 0 1, true 0 1 1: both classes have F1 of 2/3
    scores = torch.eye(2)[torch.tensor([0, 0, 1])]
    assert evaluator((scores, torch.tensor([0, 1, 1]), "f1"))(identity) == pytest.approx(100 * 2 / 3)


def test_errors_are_negated() -> None:
    values, targets = torch.tensor([[1.0], [4.0]]), torch.tensor([2.0, 2.0])
    assert evaluator((values, targets, "mse"))(identity) == -2.5
    assert evaluator((values, targets, "mae"))(identity) == -1.5


def test_spearman() -> None:
    values, targets = torch.tensor([1.0, 2, 3, 4, 5]), torch.tensor([10.0, 30, 20, 50, 40])
    # 1 - 6 sum(d^2) / (n (n^2 - 1)) with d^2 = 0 1 1 1 1
    assert evaluator((values, targets, "spearman"))(identity) == pytest.approx(80.0)
    assert evaluator((values, targets, "spearman"))(lambda x: x * 0) == 0.0
    # ranks 1.5 1.5 3 4 5 against 1 3 2 5 4: covariance 7, variances 9.5 and 10
    tied = torch.tensor([1.0, 1, 2, 3, 4])
    assert evaluator((tied, targets, "spearman"))(identity) == pytest.approx(100 * 7 / 95**0.5)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda x: x,
        lambda x: x.numpy(),
        lambda x: (x, None),
        lambda x: [x],
        lambda x: {"hidden": None, "logits": x},
        lambda x: {"out": x},
        lambda x: SimpleNamespace(logits=x),
        lambda x: x.bfloat16(),
    ],
)
def test_outputs_of_any_form(wrap: Any) -> None:
    assert evaluator((SCORES, CLASSES))(wrap) == 50.0


@pytest.mark.parametrize(
    "data",
    [
        (SCORES, CLASSES),
        (SCORES.numpy(), CLASSES.numpy()),
        (SCORES, CLASSES[:, None]),
        (SCORES, nn.functional.one_hot(CLASSES, 7)),
        (SCORES, nn.functional.one_hot(CLASSES, 7).bool()),
        (SCORES, nn.functional.one_hot(CLASSES, 7).double()),
        ((SCORES,), CLASSES),
        ({"x": SCORES}, CLASSES),
        {"x": SCORES, "labels": CLASSES},
        DataLoader(TensorDataset(SCORES, CLASSES), batch_size=3),
        [(SCORES[:1], CLASSES[:1]), (SCORES[1:], CLASSES[1:])],
        ({"x": SCORES, "y": CLASSES}, "top1"),
        (DataLoader(TensorDataset(SCORES, CLASSES), batch_size=3), "top1"),
        (SCORES, CLASSES.double()),
    ],
)
def test_labelled_data_of_any_form(data: Any) -> None:
    assert evaluator(data)(identity) == 50.0
    assert evaluator(data, ["x"], batch_size=3)(identity) == 50.0


def test_regression_batches_need_no_class_numbers() -> None:
    loader = DataLoader(TensorDataset(torch.ones(4, 3), torch.zeros(4, 3)), batch_size=2)
    assert evaluator((loader, "mse"))(identity) == -1.0


def test_classes_per_pixel_and_per_token() -> None:
    labels = torch.tensor([[0, 1, -100], [2, 2, 2]])
    by_token = nn.functional.one_hot(labels.clamp(0), 4).float()  # (N, T, C), all counted ones right
    assert evaluator((by_token, labels))(identity) == 100.0
    assert evaluator((by_token.transpose(1, 2).contiguous(), labels))(identity) == 100.0  # (N, C, T)
    one_hot = nn.functional.one_hot(torch.tensor([[0, 1, 3], [2, 2, 2]]), 4)
    assert evaluator((by_token, one_hot))(identity) == pytest.approx(100 * 5 / 6)
    channels_first = (by_token.transpose(1, 2).contiguous(), one_hot.transpose(1, 2).contiguous())
    assert evaluator(channels_first)(identity) == pytest.approx(100 * 5 / 6)
    square = torch.tensor([[[1.0, 1, 0], [0, 0, 0], [0, 0, 1]]])  # as many tokens as classes, which lie along axis 1
    assert evaluator((square, square.long()))(identity) == 100.0
    by_token[1, 0] = torch.tensor([9.0, 0, 0, 0])
    assert evaluator((by_token, labels))(identity) == 80.0


def test_all_batches_say_along_which_axis_classes_lie() -> None:
    # images of 2 x 2 pixels, 2 classes; the labels of the first fit the last axis as well as the second
    unclear, clear = torch.tensor([[0, 1], [0, 1]]), torch.tensor([[0, 0], [1, 1]])
    one_hot = torch.stack([nn.functional.one_hot(each, 2).permute(2, 0, 1) for each in (unclear, clear)])
    for seed in range(8):
        scores = torch.rand(one_hot.shape, generator=torch.Generator().manual_seed(seed))
        right = float((scores.argmax(1) == one_hot.argmax(1)).double().mean()) * 100
        assert [evaluator((scores, one_hot), batch_size=size)(identity) for size in (1, 2)] == [right, right]


def test_sizes_of_one_batch_do_not_choose_the_axis_of_classes() -> None:
    # classes along axis 1; the first batch is as long as there are classes
    batches = [(torch.rand(1, 3, length), torch.zeros(1, length, dtype=torch.long)) for length in (3, 5, 3)]
    batches = [(scores.index_fill(1, torch.tensor([0]), 2.0), labels) for scores, labels in batches]
    assert evaluator(batches)(identity) == 100.0
    assert evaluator(batches[::-1])(identity) == 100.0


def test_two_axes_of_classes_are_refused() -> None:
    same = torch.eye(3)[None].expand(2, 3, 3)
    for labels in (same, torch.zeros(2, 3, dtype=torch.long)):
        with pytest.raises(DataError, match=r"may lie along axis 1 or axis 2 of the outputs, of shape \(2, 3, 3\)"):
            evaluator((same, labels))(identity)
    mixed = [(torch.rand(1, 3, 5), torch.zeros(1, 5).long()), (torch.rand(1, 5, 3), torch.zeros(1, 5).long())]
    with pytest.raises(DataError, match="along another axis"):
        evaluator(mixed)(identity)


def test_fixed_batch_is_filled_up_and_cut_again() -> None:
    seen = []

    def model(x: torch.Tensor) -> torch.Tensor:
        seen.append(x.shape[0])
        return x

    assert evaluator((SCORES, CLASSES), takes=lambda _: 3)(model) == 50.0
    assert seen == [3, 3]


def test_limit_scores_only_the_first() -> None:
    assert evaluator((SCORES, CLASSES), limit=1)(identity) == 100.0


def test_module_is_scored_in_eval_mode_and_put_back() -> None:
    model = nn.Sequential(nn.Dropout(0.9))
    assert evaluator((SCORES, CLASSES))(model) == 50.0
    assert model.training
    evaluator((SCORES, CLASSES))(model.eval())
    assert not model.training


def test_path_with_and_without_metric(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.savez(tmp_path / "test.npz", x=SCORES.numpy(), labels=CLASSES.numpy())
    monkeypatch.chdir(tmp_path)
    assert evaluator("test.npz")(identity) == 50.0
    assert evaluator(tmp_path / "test.npz")(identity) == 50.0
    top5 = evaluator("test.npz:top5")
    assert (top5.name, top5.unit, top5(identity)) == ("top5", "%", 75.0)
    with pytest.raises(UsageError, match=r"no metric `topp5`\. Did you mean `top5`"):
        evaluator("test.npz:topp5")
    with pytest.raises(DataError, match="Did you mean"):
        evaluator("tset.npz:top1")


def test_function_by_name_or_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_metric.py").write_text(
        "import torch\ndef score(model):\n    return model(torch.ones(2)).sum()\n"
        "def nothing(model):\n    pass\ndef broken(model):\n    raise KeyError('k')\n"
    )
    monkeypatch.chdir(tmp_path)
    by_name = evaluator("my_metric:score")
    assert (by_name(identity), by_name.name) == (2.0, "my_metric:score")
    assert evaluator(lambda model: 7)(identity) == 7.0
    with pytest.raises(DataError, match="returned a NoneType; it must return one number"):
        evaluator("my_metric:nothing")(identity)
    with pytest.raises(DataError, match="raised KeyError"):
        evaluator("my_metric:broken")(identity)


def test_data_is_checked_against_the_model() -> None:
    with pytest.raises(DataError, match="takes Nx8 float32"):
        evaluator((SCORES, CLASSES), specs=[InputSpec("x", (1, 8))])


@pytest.mark.parametrize(
    ("data", "model", "reason"),
    [
        (SCORES, identity, "has no labels"),
        ({"x": SCORES}, identity, "has no labels"),
        ((SCORES, CLASSES + 4), identity, "Labels reach 9, but the model scores 7 classes"),
        ((SCORES, CLASSES + 0.5), identity, "not class numbers; for a regression"),
        ((SCORES, CLASSES), lambda x: x[:2], "needs one output per sample"),
        ((SCORES, CLASSES), lambda x: x.sum(1), "are not scores of classes"),
        ((SCORES, CLASSES), lambda x: None, "returned a NoneType"),
        ((SCORES, CLASSES, "mse"), identity, "cannot be compared"),
        ((SCORES, torch.full((4,), -100)), identity, "nothing to score"),
        ((SCORES, SCORES + 100), identity, "are not one-hot (zeros and exactly one 1 per row), so they say no classes"),
        ((SCORES, SCORES + 100, "top5"), identity, "for a regression use the metric mse, mae or spearman"),
        ((SCORES, SCORES + 100, "f1"), identity, "else give a function of the model"),
        ((SCORES, SCORES.softmax(1)), identity, "are not one-hot"),
        ((SCORES, torch.zeros(4, 7)), identity, "are not one-hot"),
        ((SCORES, torch.ones(4, 7, dtype=torch.bool)), identity, "are not one-hot"),
        ((SCORES[:, :1], SCORES[:, :1] + 100), identity, "are not one-hot"),
        ((SCORES[:, :1], torch.ones(4, 1)), identity, "one number per label, which is right for every class"),
        ((SCORES[:, :1], torch.zeros(4, dtype=torch.long)), identity, "one number per label"),
        ((SCORES[:, :0], torch.zeros(4, dtype=torch.long)), identity, "score 0 classes"),
        ((SCORES[:, :0], torch.full((4,), -100), "f1"), identity, "score 0 classes"),
        ((SCORES[:, :5], CLASSES.clamp(max=4), "top5"), identity, "One of 5 classes is always among the best 5"),
        ((SCORES[..., None], SCORES[:, None], "mae"), lambda x: x.expand(4, 7, 2), "cannot be compared"),
    ],
)
def test_what_cannot_be_scored(data: Any, model: Any, reason: str) -> None:
    with pytest.raises(DataError) as caught:
        evaluator(data)(model)
    assert reason in str(caught.value)


def test_every_metric_is_found_by_name() -> None:
    for name in METRICS:
        assert find_metric(name).name == name


def test_a_program_in_training_is_judged_on_a_copy() -> None:
    program = capture(nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5)), (torch.eye(3),)).train()

    def modes(model: Program) -> float:
        return 1.0 * is_training(model.graph_module) + 2.0 * is_training(program.graph_module)

    assert evaluator(modes)(program) == 2.0
    assert is_training(program.graph_module)


@pytest.mark.parametrize("spec", [(torch.eye(3), torch.tensor([0, 1, 2])), lambda model: float(model.training)])
def test_every_part_of_a_module_gets_back_the_mode_it_was_in(spec: Any) -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.5)).train()
    model[0].eval()
    found = evaluator(spec)(model)
    assert found in (0.0, 100.0)  # the function saw evaluation mode
    assert [module.training for module in model.modules()] == [True, False, True]


def test_how_far_it_has_come_is_shown() -> None:
    told: list[tuple[str, int | None]] = []

    def track(batches: Iterator[Labelled], label: str, total: int | None) -> Iterator[Labelled]:
        told.append((label, total))
        yield from batches

    evaluate = evaluator((SCORES, CLASSES), batch_size=2, track=track)
    assert evaluate(identity) == evaluate(identity)
    assert told == [("measuring top1", None), ("measuring top1", 2)]
