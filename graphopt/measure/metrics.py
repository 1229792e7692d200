"""Metrics of outputs against labels, each higher-is-better.

Those that count right answers are in percent, so that a drop of 0.5 means half a point; `mse` and `mae` are
negated and in the units of the outputs.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from graphopt.errors import DataError, UsageError

Array = NDArray[Any]
# Labels that training code writes where there is nothing to predict.
IGNORED_LABEL = -100


@dataclass(frozen=True)
class Metric:
    """One number for outputs and labels.

    Attributes:
        name: What `--eval DATA:name` calls it.
        unit: What a drop is counted in.
        of_classes: Whether outputs are scores of classes: of shape (predictions, classes) for `reduce`.
        reduce: Turns a batch's outputs and labels into rows that are kept, one per prediction.
        score: Turns all kept rows into the number; higher is better.
    """

    name: str
    unit: str
    of_classes: bool
    reduce: Callable[[Array, Array], Array]
    score: Callable[[Array], float]


class Scoring:
    """A metric of the batches of one evaluation, along whose outputs classes lie on the same axis in each.

    Classes lie along the last axis (text: N, T, C) or along the second (images: N, C, H, W). Batches that fit both
    wait for one that fits only one of them.
    """

    def __init__(self, metric: Metric) -> None:
        """Start with no batch."""
        self._metric = metric
        self._axes: list[int] | None = None  # that fit every batch
        self._waiting: list[tuple[Array, Array]] = []
        self._rows: list[Array] = []

    def add(self, outputs: Array, labels: Array) -> None:
        """Take the outputs and labels of a batch; raises `DataError` where they do not fit."""
        if not self._metric.of_classes:
            self._rows.append(self._metric.reduce(outputs, labels))
            return
        fitting = _class_axes(outputs, labels)
        self._axes = fitting if self._axes is None else [axis for axis in self._axes if axis in fitting]
        if not self._axes:
            raise DataError(
                f"Classes lie along another axis of this batch's outputs, of shape {outputs.shape}, than of those "
                f"before; {_OTHERWISE}."
            )
        self._waiting.append((outputs, labels))
        if len(self._axes) == 1:
            kept = [_scores_and_classes(*batch, self._axes[0]) for batch in self._waiting]
            self._rows += [self._metric.reduce(*pair) for pair in kept]
            self._waiting.clear()

    def score(self) -> float:
        """Return the number; raises `DataError` where there is nothing to score, or classes may lie along two axes."""
        if self._waiting:
            raise DataError(
                f"Classes may lie along axis 1 or axis {self._waiting[0][0].ndim - 1} of the outputs, of shape "
                f"{self._waiting[0][0].shape}: all labels fit both. Give more samples, or a function of the model."
            )
        rows = np.concatenate(self._rows) if self._rows else np.empty(0)
        if not len(rows):
            raise DataError(f"The data for `{self._metric.name}` holds nothing to score.")
        return float(self._metric.score(rows))


def find_metric(name: str) -> Metric:
    """Return a metric by name; raises `UsageError` with the nearest name."""
    if name in METRICS:
        return METRICS[name]
    near = difflib.get_close_matches(name, list(METRICS), 1)
    hint = f" Did you mean `{near[0]}`?" if near else ""
    raise UsageError(f"There is no metric `{name}`.{hint} Known: {', '.join(METRICS)}.")


_OTHERWISE = "for a regression use the metric mse, mae or spearman, else give a function of the model"


def _class_axes(outputs: Array, labels: Array) -> list[int]:
    """Return the axes of outputs along which classes may lie, as far as a batch tells: the second, the last, or both.

    Labels are class numbers, or one-hot.
    """
    axes = list(dict.fromkeys((1, outputs.ndim - 1))) if outputs.ndim > 1 else []
    if axes and labels.shape == outputs.shape:
        binary = bool(((labels == 0) | (labels == 1)).all())
        fitting = [axis for axis in axes if binary and bool((labels.sum(axis) == 1).all())]
        if not fitting:
            raise DataError(
                f"The labels have the shape of the outputs, {labels.shape}, and are not one-hot (zeros and exactly "
                f"one 1 per row), so they say no classes; {_OTHERWISE}."
            )
        return fitting
    shape = _numbers(outputs, labels).shape
    fitting = [axis for axis in axes if outputs.shape[:axis] + outputs.shape[axis + 1 :] == shape]
    if not fitting:
        raise DataError(f"Outputs of shape {outputs.shape} are not scores of classes for labels {shape}.")
    return fitting


def _numbers(outputs: Array, labels: Array) -> Array:
    """Return class numbers without a last axis of size 1 that the predictions do not have."""
    return labels[..., 0] if labels.ndim == outputs.ndim and labels.shape[-1] == 1 else labels


def _scores_and_classes(outputs: Array, labels: Array, axis: int) -> tuple[Array, Array]:
    """Return scores of shape (predictions, classes) and classes of shape (predictions,), ignored ones left out."""
    scores = np.moveaxis(outputs, axis, -1)
    labels = labels.argmax(axis) if labels.shape == outputs.shape else _numbers(outputs, labels)
    if not np.issubdtype(labels.dtype, np.integer) and not np.array_equal(labels, np.floor(labels)):
        raise DataError(f"The labels are not class numbers; {_OTHERWISE}.")
    if not scores.shape[-1]:
        raise DataError(f"The model's outputs, of shape {outputs.shape}, score 0 classes.")
    if scores.shape[-1] == 1:
        raise DataError(f"The model gives one number per label, which is right for every class; {_OTHERWISE}.")
    scores, labels = scores.reshape(-1, scores.shape[-1]), labels.reshape(-1).astype(np.int64)
    counted = labels != IGNORED_LABEL
    if labels[counted].size and (labels[counted].min() < 0 or labels[counted].max() >= scores.shape[-1]):
        raise DataError(f"Labels reach {labels[counted].max()}, but the model scores {scores.shape[-1]} classes.")
    return scores[counted], labels[counted]


def _in_top(k: int) -> Callable[[Array, Array], Array]:
    def reduce(scores: Array, classes: Array) -> Array:
        if scores.shape[1] <= k:
            raise DataError(f"One of {scores.shape[1]} classes is always among the best {k}; use the metric top1.")
        own = np.take_along_axis(scores, classes[:, None], 1)
        # Ties are decided by the class number, as argmax does; a score of NaN is never right.
        earlier = np.arange(scores.shape[1])[None] < classes[:, None]
        better = (scores > own) | ((scores == own) & earlier)
        finite = ~np.isnan(scores).any(1)
        right: Array = (better.sum(1) < k) & finite
        return right

    return reduce


def _predicted_and_true(scores: Array, classes: Array) -> Array:
    return np.stack([scores.argmax(1), classes], 1)


def _values_and_targets(outputs: Array, labels: Array) -> Array:
    if [size for size in outputs.shape if size != 1] != [size for size in labels.shape if size != 1]:
        raise DataError(f"Outputs of shape {outputs.shape} and labels of shape {labels.shape} cannot be compared.")
    return np.stack([outputs.reshape(-1).astype(np.float64), labels.reshape(-1).astype(np.float64)], 1)


def _macro_f1(rows: Array) -> float:
    """Return the mean over the classes that occur of 2 TP / (2 TP + FP + FN), in percent."""
    predicted, true = rows[:, 0], rows[:, 1]
    classes = np.union1d(predicted, true)
    hits = np.array([np.sum((predicted == c) & (true == c)) for c in classes])
    total = np.array([np.sum(predicted == c) + np.sum(true == c) for c in classes])
    return float(100 * np.mean(2 * hits / total))


def _spearman(rows: Array) -> float:
    """Return the correlation of ranks, ties sharing their mean rank, times 100; 0 for a constant."""
    ranks = np.stack([_mean_ranks(rows[:, 0]), _mean_ranks(rows[:, 1])])
    centred = ranks - ranks.mean(1, keepdims=True)
    scale = np.sqrt((centred[0] ** 2).sum() * (centred[1] ** 2).sum())
    return float(100 * (centred[0] * centred[1]).sum() / scale) if scale else 0.0


def _mean_ranks(values: Array) -> Array:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    mean: Array = last - (counts - 1) / 2
    ranks: Array = mean[inverse]
    return ranks


def _percent(rows: Array) -> float:
    return float(100 * np.mean(rows))


def _negated_mean_square(rows: Array) -> float:
    return -float(np.mean((rows[:, 0] - rows[:, 1]) ** 2))


def _negated_mean_absolute(rows: Array) -> float:
    return -float(np.mean(np.abs(rows[:, 0] - rows[:, 1])))


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("top1", "%", True, _in_top(1), _percent),
        Metric("top5", "%", True, _in_top(5), _percent),
        Metric("f1", "%", True, _predicted_and_true, _macro_f1),
        Metric("spearman", "%", False, _values_and_targets, _spearman),
        Metric("mse", "", False, _values_and_targets, _negated_mean_square),
        Metric("mae", "", False, _values_and_targets, _negated_mean_absolute),
    )
}
