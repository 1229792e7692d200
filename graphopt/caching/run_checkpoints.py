"""Checkpoints of a run that is no step of a pipeline, kept on disk beside plans, by all that the run depends on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from graphopt.caching.digests import digest_of
from graphopt.caching.store import CacheEntry, Store
from graphopt.ir.plain_data import Json
from graphopt.pipeline.checkpoints import State


@dataclass(frozen=True)
class RunCheckpoints:
    """Keeps the last state of each stage of a run, so that a killed one goes on there, and one that ended is over.

    Attributes:
        store: where.
        key: digest of all that the run depends on.
    """

    store: Store
    key: str

    def load(self, stage: str) -> State | None:
        """Return the state of a stage, if a run on the same things has come to it."""
        entries = self.store.entries(digest_of("stage", self.key, stage))
        return next(((entry.content, tensors) for entry, tensors in entries), None)

    def save(self, stage: str, content: Mapping[str, Json], tensors: Mapping[str, torch.Tensor]) -> None:
        """Keep the state of a stage in place of the one before."""
        entry = CacheEntry.model_validate({"content": dict(content)})
        self.store.add(digest_of("stage", self.key, stage), entry, tensors, instead=True)
