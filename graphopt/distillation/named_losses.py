"""The losses that a distillation plan names: which function each is, and what must agree for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Literal

import torch

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
from graphopt.distillation.objective import OutputKind, logits_of
from graphopt.errors import UsageError, foreign_code
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


def output_loss(
    name: str, kinds: tuple[OutputKind, OutputKind], axis: int, temperature: float, *, anchored: bool
) -> Loss:
    """Return the loss of an output.

    Args:
        name: its name in the plan.
        kinds: what the student's output is, and the teacher's.
        axis: of its classes or channels.
        temperature: softens logits.
        anchored: whether "auto" adds the relative error to soft labels. They do not see a constant added to all logits,
            and where no labels say that an output is of classes, it may be a regression or an embedding.

    Raises:
        UsageError: the user's function cannot be found.
    """
    chosen = _chosen(name, kinds)
    of_classes: Mapping[str, Loss] = {
        "soft_labels": partial(soft_labels, temperature=temperature),
        "gumbel_labels": partial(_drawn_labels, temperature=temperature),
        "dist": partial(dist, temperature=temperature),
    }
    if chosen in of_classes:
        loss = _of_logits(of_classes[chosen], kinds, axis)
        both = name == "auto" and anchored and kinds == ("logits", "logits")
        return _sum(loss, relative_error) if both else loss
    if chosen == "cosine":
        return partial(cosine, axis=axis)
    return relative_error if chosen == "values" else users_loss(chosen, "outputs.loss")


def is_softened(name: str, kinds: tuple[OutputKind, OutputKind]) -> bool:
    """Whether the loss of an output reads the temperature."""
    return _chosen(name, kinds) in ("soft_labels", "gumbel_labels", "dist")


def _chosen(name: str, kinds: tuple[OutputKind, OutputKind]) -> str:
    return ("values" if "values" in kinds else "soft_labels") if name == "auto" else name


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
        if torch.is_grad_enabled() and found.requires_grad and not value.requires_grad:
            raise UsageError(
                f"The loss `{name}` returned a value without a gradient. Compute it of its first argument."
            )
        return value

    return loss


def _drawn_labels(found: torch.Tensor, wanted: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return Gumbel labels, with noise of torch's own generator as Dropout draws it; without gradients soft labels."""
    return (gumbel_labels if torch.is_grad_enabled() else soft_labels)(found, wanted, temperature)


def _of_logits(loss: Loss, kinds: tuple[OutputKind, OutputKind], axis: int) -> Loss:
    """Return a loss of logits with classes last, for what is of these kinds and has them elsewhere."""
    return lambda found, wanted: loss(logits_of(found, kinds[0], axis), logits_of(wanted, kinds[1], axis))


def _sum(one: Loss, other: Loss) -> Loss:
    return lambda found, wanted: one(found, wanted) + other(found, wanted)
