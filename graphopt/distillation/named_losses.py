"""The losses that a distillation plan names: which function each is, and what must agree for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Literal

import torch
from torch.nn.functional import cross_entropy, mse_loss

from graphopt.distillation.losses import (
    angles,
    attention,
    attention_probabilities,
    attention_scores,
    cosine,
    dist,
    distances,
    gumbel_labels,
    relative_error,
    similarity,
    soft_labels,
    value_relations,
)
from graphopt.distillation.objective import OutputKind, log_of
from graphopt.errors import DataError, UsageError, foreign_code
from graphopt.loading.functions import is_function_name, resolve_function

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # of a student's value and its teacher's

# What two values must share for a loss: all sizes; all but that of the channels; the number of samples; or, of fused
# attention, the number of heads and of tokens.
Agreement = Literal["sizes", "places", "samples", "heads"]

AGREEMENTS: Mapping[str, Agreement] = {
    "values": "sizes",
    "cosine": "sizes",
    "attention": "places",
    "similarity": "samples",
    "distances": "samples",
    "angles": "samples",
    "attention_scores": "heads",
    "attention_probabilities": "heads",
    "value_relations": "heads",
}

_LEFT_OUT = -100  # the class number that cross-entropy leaves out


def pair_loss(name: str, axis: int) -> Loss:
    """Return the loss of a pair, whose channels lie along `axis`."""
    known: Mapping[str, Loss] = {
        "values": relative_error,
        "cosine": partial(cosine, axis=axis),
        "attention": partial(attention, axis=axis),
        "similarity": similarity,
        "distances": distances,
        "angles": angles,
        "attention_scores": attention_scores,
        "attention_probabilities": attention_probabilities,
        "value_relations": value_relations,
    }
    return known[name] if name in known else users_loss(name, "pairs.loss")


def output_loss(name: str, kinds: tuple[OutputKind, OutputKind], temperature: float) -> Loss:
    """Return the loss of an output.

    Args:
        name: its name in the plan.
        kinds: what the student's output is, and the teacher's.
        temperature: softens logits.

    Raises:
        UsageError: the user's function cannot be found.
    """
    if name == "auto":
        name = "values" if "values" in kinds else "soft_labels"
    of_classes: Mapping[str, Loss] = {
        "soft_labels": partial(soft_labels, temperature=temperature),
        "gumbel_labels": partial(_drawn_labels, temperature=temperature),
        "dist": partial(dist, temperature=temperature),
    }
    if name in of_classes:
        return _of_logits(of_classes[name], kinds)
    if name == "cosine":
        return partial(cosine, axis=-1)
    return relative_error if name == "values" else users_loss(name, "outputs.loss")


def label_loss(name: str, kind: OutputKind) -> Loss:
    """Return the loss of an output of a kind against labels; it looks at their shapes, and says if they do not fit.

    Raises:
        UsageError: the user's function cannot be found.
    """
    if name not in ("auto", "cross_entropy", "mse"):
        return users_loss(name, "label_loss")
    of_classes = _of_logits(_cross_entropy, (kind, "logits"))

    def loss(output: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        regresses = labels.is_floating_point() and labels.numel() == output.numel()
        return (
            _squared_error(output, labels)
            if name == "mse" or (name == "auto" and regresses)
            else of_classes(output, labels)
        )

    return loss


def check_classes(output: torch.Tensor, labels: torch.Tensor) -> None:
    """Compare the class numbers of all samples with the classes of an output.

    Raises:
        DataError: there are others.
    """
    known = labels[labels != _LEFT_OUT]
    if known.numel() and not 0 <= int(known.min()) <= int(known.max()) < output.shape[-1]:
        raise DataError(
            f"The output has {output.shape[-1]} classes, and the labels go from {int(known.min())} to "
            f"{int(known.max())}. Give labels of its own classes, or a student with as many outputs."
        )


def users_loss(name: str, field: str) -> Loss:
    """Return a function of the user's.

    Raises:
        UsageError: there is none of that name.
    """
    assert is_function_name(name)
    function = resolve_function(name, field)

    def loss(found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        with foreign_code(lambda said, _: UsageError(f"The loss `{name}` raised {said}.")):
            value = function(found, wanted)
        if not isinstance(value, torch.Tensor) or value.dim():
            said = f"of shape {list(value.shape)}" if isinstance(value, torch.Tensor) else f"a {type(value).__name__}"
            raise UsageError(f"The loss `{name}` returned a value {said}. Return a tensor without axes: its mean.")
        return value

    return loss


def _cross_entropy(output: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the cross-entropy of logits against class numbers, or against shares of the classes."""
    wanted = output.shape if labels.is_floating_point() else output.shape[:-1]
    if labels.shape != wanted:
        raise DataError(
            f"Cross-entropy is of class numbers {list(output.shape[:-1])} for outputs {list(output.shape)}, and the "
            f"labels are {str(labels.dtype).removeprefix('torch.')} {list(labels.shape)}. Give others, or say "
            'label_loss = "mse" or a function of yours.'
        )
    logits = output.reshape(-1, output.shape[-1]).float()
    if labels.is_floating_point():
        return cross_entropy(logits, labels.reshape(logits.shape).float())
    return cross_entropy(logits, labels.reshape(-1).long(), ignore_index=_LEFT_OUT)


def _squared_error(output: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    if labels.numel() != output.numel():
        raise DataError(
            f"The mean squared error is of as many labels as outputs: {list(output.shape)}, and the labels are "
            f"{list(labels.shape)}. Give others, or a student with as many outputs."
        )
    return mse_loss(output, labels.to(output.dtype).view_as(output))


def _drawn_labels(found: torch.Tensor, wanted: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return Gumbel labels, with noise of torch's own generator as Dropout draws it; without gradients soft labels."""
    return (gumbel_labels if torch.is_grad_enabled() else soft_labels)(found, wanted, temperature)


def _of_logits(loss: Loss, kinds: tuple[OutputKind, OutputKind]) -> Loss:
    """Return a loss of logits for what is of these kinds: logarithms of probabilities are logits."""
    if "probabilities" not in kinds:
        return loss

    def logits(value: torch.Tensor, kind: OutputKind) -> torch.Tensor:
        return log_of(value) if kind == "probabilities" else value

    return lambda found, wanted: loss(logits(found, kinds[0]), logits(wanted, kinds[1]))
