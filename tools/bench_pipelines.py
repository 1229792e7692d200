"""`prune,svd,int8` on four kinds of network, to both targets: are the artifacts what the programs are?

    python tools/bench_pipelines.py --data DIR [--demo demo/model.pt] [--models demo resnet56 vit bert] [--json FILE]

Every artifact is reloaded from disk and compared with its program at batch sizes 1, 3 and 8, dear ones at 1 and 3.
"steps" is the largest difference of an integer on the way, where each piece of the program starts from the runtime's
own integers: the bound is 1. "float" is the largest difference of an output from the last integers on, in units of the
float tolerance: the bound is 1. "end to end" is what both add up to, relative to the largest output, at batch 1. For
tensorrt, tensorrt-rtx parses the artifact and builds its engine; "weights" is the memory its builder reports over that
of the float32 engine.
The exit code is 1 if any artifact is not equal to its program, or not built.

The demo model is the trained file given, or one with random weights; the ResNet is trained; the others are random.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from cifar10 import images, trained_resnet
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from zoo_subject import without_torchvision_operators

import graphopt
from graphopt.backends.onnx_execution.agreement import half_of_the_digits, relative_error
from graphopt.backends.onnx_execution.batches import batches
from graphopt.backends.onnx_execution.replay import Replay, quantize_nodes
from graphopt.backends.onnx_execution.rounded_activations import without_rounding
from graphopt.backends.onnx_execution.session import OnnxSession, SessionSettings
from graphopt.backends.onnx_execution.verification import IntegerProbe
from graphopt.errors import LoweringError
from graphopt.ir.program import Program
from graphopt.pipeline.registry import backend
from graphopt.targets.backend import Artifact

_TARGETS = ("onnxruntime", "tensorrt")
_SAMPLES = 64


@dataclass(frozen=True)
class Subject:
    """A model, and calibration data by input."""

    model: nn.Module | Program
    data: dict[str, Tensor]


@dataclass(frozen=True)
class Row:
    """What became of one model for one target."""

    model: str
    target: str
    before: int  # parameters
    after: int  # parameters and stored integers of the optimised program
    size: float | None = None  # artifact's bytes over those of the float32 artifact
    quantized: int = 0  # quantizations on the way
    steps: int | None = None
    floats: float | None = None  # units of the tolerance
    end_to_end: float | None = None
    engine: str = ""
    weights: float | None = None  # engine's weights memory over the float32 engine's
    seconds: float = 0.0
    problem: str = ""


def main() -> None:
    """Run every model, print the table, write the JSON."""
    options = _arguments()
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in options.models:
            rows += _measure(name, _subject(name, options), Path(folder), options.passes)
            print(json.dumps([asdict(row) for row in rows[-len(_TARGETS) :]]), file=sys.stderr, flush=True)
    Console(width=150).print(_table(rows, options.passes))
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    sys.exit(any(row.problem for row in rows))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="directory with CIFAR-10 and the trained ResNets")
    parser.add_argument("--demo", type=Path, help="model.pt that tools/train_digits.py wrote; random weights without")
    parser.add_argument("--models", nargs="+", default=["demo", "resnet56", "vit", "bert"])
    parser.add_argument("--passes", default="prune,svd,int8")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def _measure(name: str, subject: Subject, folder: Path, passes: str) -> list[Row]:
    started = time.perf_counter()
    result = graphopt.optimize(subject.model, subject.data, passes, _TARGETS, bench=False, lower=False, cache=False)
    shared = (time.perf_counter() - started) / len(_TARGETS)
    return [_lower(name, target, result, subject, folder, shared) for target in _TARGETS]


def _lower(name: str, target: str, result: graphopt.Result, subject: Subject, folder: Path, seconds: float) -> Row:
    started = time.perf_counter()
    item, program = backend(target), result.programs[target]
    found = Row(name, target, _numbers(result.original), _numbers(program))
    try:
        plain = item.lower(result.original, folder / f"{name}.{target}.float.onnx")
        artifact = item.lower(program, folder / f"{name}.{target}.onnx")
        samples = tuple(value.numpy() for value in subject.data.values())
        end_to_end = item.verify(item.open(artifact.path), program, samples)
        steps, floats = _deviation(artifact, program, samples)
    except LoweringError as err:
        return Row(**{**asdict(found), "problem": str(err)})
    memory, before = artifact.facts.get("weights_memory"), plain.facts.get("weights_memory")
    measured = {
        "size": artifact.size / plain.size,
        "quantized": len(quantize_nodes(program)),
        "steps": steps,
        "floats": floats,
        "end_to_end": end_to_end,
        "engine": str(artifact.facts.get("engine", "")),
        "weights": memory / before if isinstance(memory, int) and isinstance(before, int) else None,
        "seconds": seconds + time.perf_counter() - started,
        "problem": "not built" if target == "tensorrt" and not isinstance(memory, int) else "",
    }
    return Row(**{**asdict(found), **measured})


def _deviation(artifact: Artifact, program: Program, samples: tuple[object, ...]) -> tuple[int, float]:
    """Return the largest difference of an integer in steps, and of an output in units of the float tolerance."""
    settings = SessionSettings.of(artifact.session_options)
    session, replay = OnnxSession(artifact.path, settings), Replay(program)
    probe = (
        IntegerProbe(without_rounding(artifact.path), artifact.path, program, settings)
        if quantize_nodes(program)
        else None
    )
    steps, floats = 0, 0.0
    for _, arrays in batches(program, samples):  # type: ignore[arg-type]
        found = session(*arrays)
        codes = probe.codes(arrays, found) if probe else {}
        wanted = replay.outputs(tuple(torch.from_numpy(array) for array in arrays), codes)
        steps = max([steps, *(step.largest for step in replay.steps)])
        for want, got in zip(wanted, found, strict=True):
            error = relative_error(want, torch.from_numpy(got))
            floats = max(floats, error / half_of_the_digits(want.dtype))
    return steps, floats


def _numbers(program: Program) -> int:
    """Count the weights of a program, stored integers included, scales and zero points not."""
    known = {id(t): t for name, t in program.state_dict().items() if not name.endswith(("scale", "zero_point"))}
    return sum(tensor.numel() for tensor in known.values() if tensor.dim())


def _subject(name: str, options: argparse.Namespace) -> Subject:
    torch.manual_seed(0)
    if name == "demo":
        return _demo(options.demo)
    if name.startswith("resnet"):
        if options.data is None:
            raise SystemExit(f"{name} needs --data DIR.")
        calibration, _ = images(options.data, "cifar10_train_5k")
        return Subject(trained_resnet(options.data, int(name[6:])), {"x": calibration[:512]})
    if name == "vit":
        return _vit()
    if name == "bert":
        return _bert()
    raise SystemExit(f"There is no model `{name}`. Known are demo, resnet20, resnet56, vit, bert.")


def _demo(path: Path | None) -> Subject:
    from train_digits import DigitsNet, digits

    data = {"image": torch.from_numpy(digits()[0])}
    if path is not None:
        return Subject(graphopt.load(path), data)
    model = DigitsNet()
    with torch.no_grad():
        model.train()(data["image"][:256])  # statistics of real images
    return Subject(model.eval(), data)


def _vit() -> Subject:
    """Return torchvision's ViT at the width of ViT-S, six layers deep."""
    without_torchvision_operators()
    from torchvision.models import VisionTransformer  # type: ignore[import-untyped]

    model = VisionTransformer(
        image_size=96, patch_size=16, num_layers=6, num_heads=6, hidden_dim=384, mlp_dim=1536, num_classes=100
    )
    nn.init.normal_(model.heads.head.weight, std=0.02)  # it starts at zero
    return Subject(model.eval(), {"x": torch.randn(_SAMPLES, 3, 96, 96)})


def _bert() -> Subject:
    """Return transformers' BERT, four layers of width 256, with padded sentences."""
    without_torchvision_operators()  # transformers imports it
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 1024}
    config = BertConfig(vocab_size=4096, num_labels=6, **sizes)
    ids = torch.randint(0, 4096, (_SAMPLES, 48))
    mask = (torch.arange(48) < torch.randint(8, 49, (_SAMPLES, 1))).long()
    return Subject(BertForSequenceClassification(config).eval(), {"input_ids": ids, "attention_mask": mask})


def _table(rows: list[Row], passes: str) -> Table:
    wrong = sum(bool(row.problem) for row in rows)
    table = Table(title=f"{passes}: {len(rows) - wrong} of {len(rows)} artifacts equal to their programs")
    for heading in ("model", "target"):
        table.add_column(heading)
    for heading in ("parameters", "after", "bytes", "Q", "steps", "float", "end to end", "engine", "weights", "s"):
        table.add_column(heading, justify="right")
    table.add_column("verdict")
    for row in rows:
        table.add_row(
            row.model,
            row.target,
            f"{row.before / 1e6:.3f} M",
            f"{row.after / 1e6:.3f} M",
            _shown(row.size, ".3f"),
            str(row.quantized),
            _shown(row.steps, "d"),
            _shown(row.floats, ".4f"),
            _shown(row.end_to_end, ".2e"),
            "built" if row.weights is not None else "-",
            _shown(row.weights, ".3f"),
            f"{row.seconds:.0f}",
            row.problem or "equal",
            style="red" if row.problem else "",
        )
    return table


def _shown(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


if __name__ == "__main__":
    main()
