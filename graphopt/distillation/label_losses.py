"""Losses against labels: the cross-entropy of classes, wherever their axis is, the squared error, and users' own.

    outputs (N, classes), (N, T, classes), (N, classes, H, W)     labels (N,), (N, T), (N, H, W), or shares of classes

Labels may be left out, one by one: class number -100, or no share of any class. The mean is over those that are not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch.nn.functional import cross_entropy, log_softmax, mse_loss, one_hot

from graphopt.distillation.named_losses import Loss, users_loss
from graphopt.distillation.objective import Target, logits_of
from graphopt.errors import DataError

_LEFT_OUT = -100  # the class number of what has no label


@dataclass(frozen=True)
class LabelLoss:
    """The loss of an output against labels; it looks at their shapes, and says if they do not fit.

    Attributes:
        name: in the plan.
        target: the output.
        fixed: whether its axis of classes is the user's word.
    """

    name: str
    target: Target
    fixed: bool = False
    function: Loss | None = field(init=False)

    def __post_init__(self) -> None:
        """Find the user's function.

        Raises:
            UsageError: there is none of that name.
        """
        known = self.name in ("auto", "cross_entropy", "mse")
        object.__setattr__(self, "function", None if known else users_loss(self.name, "label_loss"))

    def __call__(self, output: torch.Tensor, labels: torch.Tensor, density: torch.Tensor | None = None) -> torch.Tensor:
        """Return the mean over all labels that are not left out; 0 without any.

        Args:
            output: of the student.
            labels: of the same samples.
            density: labels for each sample of the batch that these are a part of: then the parts' means make that of
                the whole. None: they are all.

        Raises:
            DataError: the two do not fit.
        """
        if self.function is not None:
            return self.function(output, labels)
        labels = _numbers(labels)
        regresses = labels.is_floating_point() and _beside_ones(labels) == _beside_ones(output)
        if self.name == "mse" or (self.name == "auto" and regresses):
            return _squared_error(output, labels)
        axis = self._axis(output, labels)
        logits = logits_of(output, self.target.kind, axis)
        total = _cross_entropy(logits, labels.movedim(axis, -1) if labels.is_floating_point() else labels)
        if density is None:
            density = self.density([labels])
        return total / (density * len(labels)).clamp_min(torch.finfo(torch.float32).tiny)

    def axis_in(self, sizes: Sequence[int | torch.SymInt], labels: torch.Tensor) -> int | None:
        """Return the axis of the classes in outputs of these sizes whose class numbers labels are; None: they are not.

        It is where the layer has it that the output comes from, unless labels are of the shape of another alone.
        """
        if labels.is_floating_point():
            return None
        fits = [at for at in range(1, len(sizes)) if _agree([*sizes[:at], *sizes[at + 1 :]], labels.shape)]
        if self.target.axis in fits or self.fixed:
            return self.target.axis if self.target.axis in fits else None
        return fits[0] if len(fits) == 1 else None

    def density(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return how many labels that are not left out there are for a sample."""
        counts = [
            (part.movedim(self.target.axis, -1).any(-1) if part.is_floating_point() else part != _LEFT_OUT).sum()
            for part in map(_numbers, parts)
        ]
        return torch.stack(counts).sum() / sum(map(len, parts))

    def _axis(self, output: torch.Tensor, labels: torch.Tensor) -> int:
        if labels.is_floating_point() and labels.shape == output.shape:
            return self.target.axis
        axis = self.axis_in(output.shape, labels)
        if axis is None:
            own = [size for at, size in enumerate(output.shape) if at != self.target.axis]
            raise DataError(
                f"Cross-entropy is of class numbers {own} for outputs {list(output.shape)}, and the labels are "
                f"{str(labels.dtype).removeprefix('torch.')} {list(labels.shape)}. Give others, say which `axis` of "
                'the output holds its classes, or label_loss = "mse" or a function of yours.'
            )
        return axis


def of_classes(classes: int, labels: torch.Tensor) -> bool:
    """Whether labels are numbers of so many classes, or left out."""
    known = _known(labels)
    return not known.numel() or 0 <= int(known.min()) <= int(known.max()) < classes


def check_classes(classes: int, labels: torch.Tensor) -> None:
    """Compare the class numbers of all samples with the classes of an output.

    Raises:
        DataError: there are others.
    """
    if not of_classes(classes, labels):
        known = _known(labels)
        raise DataError(
            f"The output has {classes} classes, and the labels go from {int(known.min())} to {int(known.max())}. Give "
            "labels of its own classes, or a student with as many outputs."
        )


def shares_of(labels: torch.Tensor, classes: int, axis: int) -> torch.Tensor:
    """Return class numbers as shares of the classes along an axis: 1 of one, of what is left out 0 of all."""
    labels = _numbers(labels)
    shares = one_hot(labels.clamp_min(0), classes).float()
    return (shares * (labels != _LEFT_OUT)[..., None]).movedim(-1, axis)


def _numbers(labels: torch.Tensor) -> torch.Tensor:
    """Return class numbers in a type that -100 fits in: of bytes it would be class 156.

    Raises:
        DataError: labels are complex.
    """
    if labels.is_complex():
        raise DataError("Labels are complex numbers. Give class numbers, shares of classes or real values.")
    return labels if labels.is_floating_point() else labels.long()


def _known(labels: torch.Tensor) -> torch.Tensor:
    labels = _numbers(labels)
    return labels[labels != _LEFT_OUT]


def _beside_ones(tensor: torch.Tensor) -> list[int]:
    """Return the sizes of the axes that order a tensor's elements."""
    return [size for size in tensor.shape if size != 1]


def _agree(sizes: Sequence[int | torch.SymInt], others: Sequence[int]) -> bool:
    """Whether two shapes may be one, as far as they are known before there are values."""
    pairs = zip(sizes, others, strict=False)
    return len(sizes) == len(others) and all(a == b for a, b in pairs if isinstance(a, int))


def _cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the sum over all labels of their cross-entropies; classes are last."""
    rows = logits.reshape(-1, logits.shape[-1])
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    if labels.is_floating_point():
        return -(labels.reshape(rows.shape) * log_softmax(rows, -1)).sum()
    return cross_entropy(rows, labels.reshape(-1).long(), ignore_index=_LEFT_OUT, reduction="sum")


def _squared_error(output: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    if _beside_ones(labels) != _beside_ones(output):
        raise DataError(
            f"The mean squared error is of as many labels as outputs: {list(output.shape)}, and the labels are "
            f"{list(labels.shape)}. Give others, or a student with as many outputs."
        )
    return mse_loss(output, labels.to(output.dtype).view_as(output))
