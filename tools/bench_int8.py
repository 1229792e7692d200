"""What `int8` costs and brings, beside ONNX Runtime's own quantizer at its best settings.

    python tools/bench_int8.py --data DIR [--models resnet20 resnet56 resnet50 ...] [--json FILE]

Accuracy (trained ResNets, 10,000 CIFAR-10 test images, run in ONNX Runtime), bytes of the file over the float32 file,
kernels after ONNX Runtime's optimizer, single-thread batch-1 latency in interleaved rounds, and, where tensorrt-rtx is
installed, the memory of the weights its builder reports over the float32 engine's. Models without trained weights are
random, with BatchNorm statistics of a few forward passes; for them the signal-to-noise ratio of the outputs is shown.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import types
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from cifar10 import images, trained_resnet
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention

from graphopt.backends.onnx_execution.session import SessionSettings
from graphopt.backends.onnxruntime import OnnxRuntimeBackend
from graphopt.backends.onnxruntime.fusion import kernel_counts
from graphopt.backends.tensorrt import TensorRTBackend
from graphopt.capturing.capture import capture
from graphopt.errors import LoweringError
from graphopt.ir.program import Program
from graphopt.measure.bench import Spread, time_in_turn
from graphopt.measure.equivalence import measure
from graphopt.pipeline.context import Context
from graphopt.pipeline.pipeline import Pipeline
from graphopt.pipeline.runner import run
from graphopt.targets.backend import Artifact, Session
from graphopt.testing import TensorSamples

_FLOAT_KERNELS = ("Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul", "FusedMatMul", "Add")
_RANDOM_SAMPLES = 64


@dataclass(frozen=True)
class Subject:
    """A model with its calibration and, where it is trained, test data."""

    model: nn.Module
    calibration: tuple[Tensor, ...]
    test: tuple[Tensor, Tensor] | None = None


@dataclass(frozen=True)
class Row:
    """What was measured of one model."""

    model: str
    float_top1: float | None
    int8_top1: float | None
    peer_top1: float | None  # onnxruntime.quantization.quantize_static
    sqnr: float  # dB, int8 against float32 outputs
    size: float  # int8 file over float32 file
    integer: dict[str, int]  # integer kernels
    left_float: dict[str, int]  # kernels that could be integer and are not
    milliseconds: float
    over_float: tuple[float, float, float]  # float32 time over ours: lower quartile, median, upper quartile
    over_peer: tuple[float, float, float] | None  # quantize_static's time over ours
    engine: float | None  # TensorRT: weights memory over float32


def main() -> None:
    """Measure, print the table, write the JSON."""
    options = _arguments()
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in options.models:
            rows.append(_measure(name, _subject(name, options.data), Path(folder), options))
            print(json.dumps(asdict(rows[-1])), file=sys.stderr, flush=True)
    Console(width=160).print(_table(rows))
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="directory with CIFAR-10 and the trained ResNets")
    parser.add_argument("--models", nargs="+", default=["resnet20", "resnet56", "resnet50", "bert"])
    parser.add_argument("--passes", default="int8:samples=1024")
    parser.add_argument("--seconds", type=float, default=4.0, help="per timed pair")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--no-engine", action="store_true", help="leave TensorRT out")
    return parser.parse_args()


def _measure(name: str, subject: Subject, folder: Path, options: argparse.Namespace) -> Row:
    backend = OnnxRuntimeBackend()
    original = capture(subject.model, tuple(tensor[:2] for tensor in subject.calibration))
    folded = _optimise("fold", original, subject)[""]
    programs = _optimise(options.passes, original, subject)
    plain = backend.lower(folded, folder / f"{name}.onnx")
    ours = backend.lower(programs["onnxruntime"], folder / f"{name}.int8.onnx")
    backend.verify(ours, programs["onnxruntime"], tuple(t.numpy() for t in subject.calibration))
    peer = backend.open(_peer(plain.path, folder / f"{name}.peer.onnx", subject)) if _is_image(subject) else None
    counts = kernel_counts(ours.path, SessionSettings.of(ours.session_options))
    batch = tuple(tensor[:16] for tensor in subject.calibration)
    found = measure(original, lambda flat: _run(ours.session(threads=1), flat), batch)
    feed = tuple(tensor[:1].numpy() for tensor in subject.calibration)
    over_float = _ratio(plain, ours, feed, options.seconds)
    return Row(
        model=name,
        float_top1=_top1(plain, subject),
        int8_top1=_top1(ours, subject),
        peer_top1=_top1(peer, subject) if peer else None,
        sqnr=found.sqnr,
        size=ours.size / plain.size,
        integer={key: n for key, n in counts.items() if key.startswith(("QLinear", "QGemm", "MatMulInteger"))},
        left_float={key: n for key, n in counts.items() if key in _FLOAT_KERNELS},
        milliseconds=over_float[1],
        over_float=over_float[0],
        over_peer=_ratio(peer, ours, feed, options.seconds)[0] if peer else None,
        engine=None if options.no_engine else _engine(folded, programs["tensorrt"], folder),
    )


def _optimise(passes: str, program: Program, subject: Subject) -> dict[str, Program]:
    targets = (OnnxRuntimeBackend().description, TensorRTBackend().description) if "int8" in passes else ()
    ctx = Context(original=program, targets=targets).with_data(TensorSamples(subject.calibration))
    return run(Pipeline.parse(passes), program, ctx).programs


def _run(session: Session, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(torch.from_numpy(array) for array in session(*(tensor.numpy() for tensor in tensors)))


def _top1(artifact: Artifact, subject: Subject) -> float | None:
    if subject.test is None:
        return None
    pictures, labels = subject.test
    session = artifact.session(threads=2)
    parts = [torch.from_numpy(session(x.numpy())[0]).argmax(1) for x in pictures.split(500)]
    return 100 * float((torch.cat(parts) == labels).double().mean())


def _ratio(
    baseline: Artifact, artifact: Artifact, feed: tuple[object, ...], seconds: float
) -> tuple[tuple[float, float, float], float]:
    """Return how many times faster `artifact` is (quartiles of interleaved rounds, CPU time), and its milliseconds."""
    first, second = (one.session(threads=1) for one in (baseline, artifact))
    pair = time_in_turn(lambda: first(*feed), lambda: second(*feed), seconds=seconds)  # type: ignore[arg-type]
    spread: Spread = pair.cpu_ratio
    return (spread.lower, spread.median, spread.upper), pair.second.cpu.median


def _is_image(subject: Subject) -> bool:
    return len(subject.calibration) == 1 and subject.calibration[0].dim() == 4


def _peer(source: Path, target: Path, subject: Subject) -> Path:
    """Quantize with ONNX Runtime's quantizer: uint8 activations, int8 weights per channel, QDQ, min-max."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self, name: str) -> None:
            self._batches: Iterator[Tensor] = iter(subject.calibration[0].split(1))
            self._name = name

        def get_next(self) -> dict[str, object] | None:
            batch = next(self._batches, None)
            return None if batch is None else {self._name: batch.numpy()}

    prepared = target.with_suffix(".prepared.onnx")
    quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
    quantize_static(
        str(prepared),
        str(target),
        Reader(OnnxRuntimeBackend().open(source).inputs[0].name),
        quant_format=QuantFormat.QDQ,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        per_channel=True,
    )
    return target


def _engine(plain: Program, quantized: Program, folder: Path) -> float | None:
    """Return TensorRT's weights memory of the int8 engine over the float32 one, None where it is not installed."""
    sizes = []
    for program in (plain, quantized):
        try:
            facts = TensorRTBackend().lower(program, folder / "engine.onnx").facts
        except LoweringError as err:
            print(err, file=sys.stderr)
            return None
        size = facts.get("weights_memory")
        if not isinstance(size, int):
            return None
        sizes.append(size)
    return sizes[1] / sizes[0]


def _subject(name: str, data: Path | None) -> Subject:
    if name in ("resnet20", "resnet56"):
        if data is None:
            raise SystemExit(f"{name} needs --data DIR.")
        calibration, _ = images(data, "cifar10_train_5k")
        return Subject(trained_resnet(data, int(name[6:])), (calibration[:1024],), images(data, "cifar10_test"))
    torch.manual_seed(0)
    if name == "bert":
        ids = torch.randint(0, 8192, (_RANDOM_SAMPLES, 128))
        return Subject(Encoder().eval(), (ids, torch.ones_like(ids)))
    return _random_vision(name)


def _random_vision(name: str) -> Subject:
    """Return a torchvision model with BatchNorm statistics of a few forward passes."""
    # torchvision's compiled part does not fit every torch build; its models do not need it
    sys.modules.setdefault("torchvision._meta_registrations", types.ModuleType("_meta_registrations"))
    import torchvision.models

    build: Callable[..., nn.Module] = getattr(torchvision.models, name)
    model = build(weights=None)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # average over all passes
        if isinstance(module, nn.Linear) and name.startswith("vit") and not bool(module.weight.any()):
            nn.init.normal_(module.weight, std=0.02)  # the head starts at zero
    model.train()
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(4, 3, 224, 224))
    return Subject(model.eval(), (torch.randn(_RANDOM_SAMPLES, 3, 224, 224),))


class Encoder(nn.Module):
    """BERT's layout, four layers of width 384: embeddings, post-norm attention and feed-forward, pooled classes."""

    def __init__(self, vocabulary: int = 8192, width: int = 384, layers: int = 4, classes: int = 6) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(vocabulary, width), nn.Embedding(512, width)
        self.norm = nn.LayerNorm(width)
        self.layers = nn.ModuleList(EncoderLayer(width, 6, 4 * width) for _ in range(layers))
        self.pool, self.classes = nn.Linear(width, width), nn.Linear(width, classes)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Map ids and mask (batch, tokens) to logits (batch, classes)."""
        x = self.norm(self.words(ids) + self.places(torch.arange(ids.shape[1])))
        bias = (1.0 - mask[:, None, None, :].float()) * -1e4
        for layer in self.layers:
            x = layer(x, bias)
        return self.classes(torch.tanh(self.pool(x[:, 0])))


class EncoderLayer(nn.Module):
    """Self-attention and feed-forward, each followed by a LayerNorm over the sum with its input."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out, self.norm = nn.Linear(width, width), nn.LayerNorm(width)
        self.up, self.down, self.last = nn.Linear(width, hidden), nn.Linear(hidden, width), nn.LayerNorm(width)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """Map (batch, tokens, width) to the same shape."""
        b, t, c = x.shape
        q, k, v = (f(x).view(b, t, self.heads, -1).transpose(1, 2) for f in (self.query, self.key, self.value))
        y = scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).reshape(b, t, c)
        x = self.norm(x + self.out(y))
        return self.last(x + self.down(gelu(self.up(x))))


def _table(rows: list[Row]) -> Table:
    table = Table(title="int8")
    for heading in ("model", "top-1 f32/int8/peer", "SQNR dB", "bytes", "integer kernels", "left float"):
        table.add_column(heading)
    for heading in ("ms", "x over f32", "x over peer", "engine"):
        table.add_column(heading, justify="right")
    for row in rows:
        scores = [row.float_top1, row.int8_top1, row.peer_top1]
        table.add_row(
            row.model,
            " / ".join("-" if score is None else f"{score:.2f}" for score in scores),
            f"{row.sqnr:.1f}",
            f"{row.size:.3f}",
            ", ".join(f"{n} {key}" for key, n in row.integer.items()),
            ", ".join(f"{n} {key}" for key, n in row.left_float.items()) or "none",
            f"{row.milliseconds:.2f}",
            _quartiles(row.over_float),
            _quartiles(row.over_peer),
            "-" if row.engine is None else f"{row.engine:.3f}",
        )
    return table


def _quartiles(spread: tuple[float, float, float] | None) -> str:
    return "-" if spread is None else f"{spread[1]:.2f} ({spread[0]:.2f}-{spread[2]:.2f})"


if __name__ == "__main__":
    main()
