"""Torch-Pruning on the models of `bench_prune.py`: the peer that its table shows beside graphopt.

Needs `pip install --no-deps torch-pruning` (1.6.0 was measured); nothing else of graphopt's tools does.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

_HALVINGS = 8  # of the interval in which the pruning ratio is looked for


def pruned_by_peer(
    model: nn.Module, criterion: str, flops: float, scope: str, data: torch.Tensor, ignored: list[nn.Module]
) -> tuple[nn.Module, float]:
    """Prune a copy of `model` to at most a share of its operations with Torch-Pruning.

    Args:
        model: in evaluation mode; not changed.
        criterion: l1, l2, lamp, fpgm, random or taylor, as graphopt names them.
        flops: share of the operations to keep at most.
        scope: local or global.
        data: unlabelled images; what taylor follows gradients on.
        ignored: layers whose outputs stay whole.

    Returns:
        The pruned model and the share of operations it has left.
    """
    low, high = 0.0, 0.95
    best, left = model, 1.0
    places = [name for name, module in model.named_modules() if any(module is other for other in ignored)]
    for _ in range(_HALVINGS):
        ratio = (low + high) / 2
        candidate, share = _pruned(model, criterion, ratio, scope, data, places)
        if share <= flops:
            best, left, high = candidate, share, ratio
        else:
            low = ratio
    return best, left


def _pruned(
    model: nn.Module, criterion: str, ratio: float, scope: str, data: torch.Tensor, places: list[str]
) -> tuple[nn.Module, float]:
    import torch_pruning as tp

    twin = copy.deepcopy(model)
    before, _ = tp.utils.count_ops_and_params(twin, data[:1])
    pruner = tp.pruner.MetaPruner(
        twin,
        data[:1],
        importance=_importances()[criterion](),
        global_pruning=scope == "global",
        pruning_ratio=ratio,
        ignored_layers=[twin.get_submodule(place) for place in places],
    )
    if criterion == "taylor":  # it has no form without labels: the model's own classes are taken for them
        for batch in data.split(64):
            logits = twin(batch)
            nn.functional.cross_entropy(logits, logits.detach().argmax(1), reduction="sum").backward()
    pruner.step()
    twin.zero_grad()
    after, _ = tp.utils.count_ops_and_params(twin, data[:1])
    return twin.eval(), float(after / before)


def _importances() -> dict[str, Callable[[], object]]:
    import torch_pruning as tp

    found = tp.importance
    return {
        "l1": partial(found.GroupMagnitudeImportance, p=1),
        "l2": partial(found.GroupMagnitudeImportance, p=2),
        "lamp": partial(found.LAMPImportance, p=2),
        "fpgm": partial(found.FPGMImportance, p=2),
        "random": found.RandomImportance,
        "taylor": found.GroupTaylorImportance,
    }


def with_statistics(model: nn.Module, data: torch.Tensor) -> nn.Module:
    """Re-estimate the BatchNorm statistics of a copy on the images, which the peer leaves to its user."""
    twin = copy.deepcopy(model).train()
    for module in twin.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None
    with torch.no_grad():
        for batch in data.split(128):
            twin(batch)
    return twin.eval()
