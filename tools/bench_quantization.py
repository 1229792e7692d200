"""What `int8` brings beside other quantizers: speed over float32, and how far outputs are off.

    python tools/bench_quantization.py [--model resnet18 ...] [--zoo] [--target onnxruntime:x86-avx2 ...] [--json FILE]
    python tools/bench_quantization.py --data DIR --model cifar_resnet20 --model cifar_resnet56 --samples 1024

Every file is run by the same ONNX Runtime at its highest level, one thread, with the session options that its quantizer
recommends. All calls of a model take turns; ratios are of processor time within a round: median (quartiles). SQNR is of
the worst output, against the float32 file, on samples that no quantizer saw. "left float" are kernels that could be
integer. Models of --data are trained, and top-1 is of all test images; the others have random weights. The facenet
detectors are from `facenet-pytorch`, whose weights lie in its wheel. Quantizers, see `quantization_peers`.

Every model runs in a process of its own: what dies is a row that says when. Rows in --json are not measured again by
the same source and versions on the same processor.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from quantization_peers import PEERS, Feed, prepare
from quantization_report import report
from quantization_subjects import Subject, named, zoo

import graphopt
from graphopt.backends.onnx_execution.session import OnnxSession, SessionSettings
from graphopt.backends.onnxruntime import OnnxRuntimeBackend
from graphopt.backends.onnxruntime.fusion import kernel_counts
from graphopt.caching.digests import of_libraries
from graphopt.ir.signature import TensorSpec
from graphopt.measure.bench import in_turn
from graphopt.measure.equivalence import compare_outputs
from graphopt.measure.processor import said_of_processor
from graphopt.pipeline.registry import backends_named
from graphopt.targets.backend import Artifact

FLOAT = "float32"
_VERSIONS = ("graphopt", "torch", "onnx", "onnxruntime", "nncf", "amd-quark")


@dataclass
class Tool:
    """What one quantizer made of a model; `note` says why there is nothing."""

    note: str = ""
    size: int = 0  # bytes
    sqnr: float = math.nan  # dB
    top1: float | None = None
    kernels: dict[str, int] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)  # of graphopt's: what the report says of float parts
    engine: float | None = None  # of graphopt's: memory of TensorRT's weights over that of the float32 engine
    milliseconds: dict[str, list[float]] = field(default_factory=dict)  # by batch, a value a round


@dataclass
class Row:
    """What was measured of one model, and how."""

    model: str
    how: dict[str, Any]
    problem: str = ""
    tools: dict[str, Tool] = field(default_factory=dict)


def main(
    model: Annotated[list[str] | None, typer.Option(help="A model; may be repeated. All of them by default.")] = None,
    in_zoo: Annotated[bool, typer.Option("--zoo", help="Forty architectures.")] = False,
    target: Annotated[list[str] | None, typer.Option(help="A target; may be repeated.")] = None,
    passes: Annotated[str, typer.Option(help="The pipeline that is measured.")] = "int8",
    peer: Annotated[list[str] | None, typer.Option(help=f"{', '.join(PEERS)} (all); may be repeated.")] = None,
    batch: Annotated[list[int] | None, typer.Option(help="Samples a call; may be repeated.")] = None,
    samples: Annotated[int, typer.Option(help="Calibration samples.")] = 32,
    seconds: Annotated[float, typer.Option(help="Of timing for each batch size; seven rounds at least.")] = 10.0,
    data: Annotated[Path | None, typer.Option(help="Where CIFAR-10 and the trained ResNets lie.")] = None,
    engine: Annotated[bool, typer.Option("--engine", help="Build TensorRT's engines, too.")] = False,
    results: Annotated[Path | None, typer.Option("--json", help="Where rows are kept.")] = None,
    one: Annotated[Path | None, typer.Option(hidden=True)] = None,
) -> None:
    """Measure what was not measured yet and print the table."""
    data = data and data.resolve()
    known = zoo() if in_zoo else named(data)
    wanted = model or list(known)
    if unknown := [name for name in wanted if name not in known]:
        raise typer.BadParameter(f"There is no model `{unknown[0]}`. Known are {', '.join(known)}.")
    how = {
        "targets": target or ["onnxruntime"],
        "passes": passes,
        "peers": list(PEERS) if peer is None else peer,
        "batches": batch or ([1] if in_zoo else [1, 8]),
        "samples": samples,
        "seconds": seconds,
        "engine": engine,
        "data": data and str(data),
        "machine": _machine(),
    }
    if one is not None:
        os.chdir(one.parent)  # some quantizers leave files where they run
        _Measurement(Row(wanted[0], how), one).run(lambda: known[wanted[0]](samples))
        return
    stored = json.loads(results.read_text()) if results is not None and results.is_file() else {"rows": []}
    rows = {row["model"]: row for row in stored["rows"]}
    for name in wanted:
        if rows.get(name, {}).get("how") != how or rows[name]["problem"]:
            rows[name] = _in_a_process(name)
            if results is not None:
                results.write_text(json.dumps({"rows": list(rows.values())}) + "\n")
    report(how["machine"], [rows[name] for name in wanted], FLOAT, zoo=in_zoo)


def _machine() -> dict[str, str]:
    """Return what measures here: the processor, versions, and a digest of our own source and what it requires."""
    found = {}
    for package in _VERSIONS:
        try:
            found[package] = version(package)
        except ImportError:
            found[package] = "not installed"
    return {"processor": ", ".join(said_of_processor("model name")), **found, "source": of_libraries()[:12]}


def _in_a_process(name: str) -> dict[str, Any]:
    """Measure one model in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / "row.json"
        arguments = [*_without_models(sys.argv[1:]), f"--model={name}", f"--one={written}"]
        command = [sys.executable, __file__, *arguments]
        run = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
        row: dict[str, Any] = {"model": name, "problem": "died before it began", "tools": {}}
        row.update(json.loads(written.read_text()) if written.is_file() else {})
    if run.returncode:
        last = run.stdout.strip().rpartition("\n")[2]
        row["problem"] += f": {signal.Signals(-run.returncode).name if run.returncode < 0 else last}"
    print(f"{name}: {row['problem'] or 'done'}", file=sys.stderr, flush=True)
    return row


def _without_models(arguments: Sequence[str]) -> Iterator[str]:
    words = iter(arguments)
    for word in words:
        if word == "--model":
            next(words)
        elif not word.startswith("--model="):
            yield word


class _Measurement:
    """Measures one model, and writes after every step what it has."""

    def __init__(self, row: Row, written: Path) -> None:
        self._row = row
        self._written = written
        self._home = tempfile.TemporaryDirectory()
        self._sessions: dict[str, OnnxSession] = {}

    def run(self, build: Callable[[], Subject]) -> None:
        torch.set_num_threads(1)
        self._begin("building the model")
        subject = build()
        source = self._optimize(subject)
        self._compete(source, subject)
        self._judge(subject)
        for batch in self._row.how["batches"]:
            self._begin(f"timing at batch {batch}")
            feed = [tensor[:batch].numpy() for tensor in subject.calibration]
            calls = [_call(session, feed) for session in self._sessions.values()]
            _, times = in_turn(calls, seconds=self._row.how["seconds"])
            for name, each in zip(self._sessions, times, strict=True):
                self._row.tools[name].milliseconds[str(batch)] = [round(value, 4) for value in each]
        self._begin("")

    def _begin(self, step: str) -> None:
        self._row.problem = step and f"died while {step}"
        self._written.write_text(json.dumps(dataclasses.asdict(self._row)))

    def _optimize(self, subject: Subject) -> Artifact:
        """Run graphopt; return the float32 file."""
        how = self._row.how
        backends = backends_named(how["targets"])
        self._begin("capturing and lowering float32")
        whole = OnnxRuntimeBackend(external_data_above=1 << 30)  # other quantizers take no second file
        plain = graphopt.optimize(subject.model, subject.calibration, "", whole, bench=False, cache=False)
        folder = plain.artifact.path.parent
        source = plain.artifact
        self._keep(FLOAT, source, Tool())
        for backend in backends:
            name = f"graphopt {backend.name}"
            self._begin(f"optimizing for {backend.name}")
            try:
                result = graphopt.optimize(
                    plain.original, subject.calibration, how["passes"], backend, bench=False, cache=False
                )
            except graphopt.GraphOptError as err:
                self._row.tools[name] = Tool(f"{type(err).__name__}: {err}")
                continue
            notes = [f"{found.site}: {found.reason}" for _, found in result.report.refusals]
            self._keep(name, result.artifact, Tool(left=[*result.report.notes, *notes]))
        if how["engine"]:
            self._begin("building TensorRT's engines")
            self._engine(plain, subject, folder)
        return source

    def _engine(self, plain: graphopt.Result, subject: Subject, folder: Path) -> None:
        (tensorrt,) = backends_named("tensorrt")
        result = graphopt.optimize(plain.original, subject.calibration, self._row.how["passes"], tensorrt, bench=False)
        assert plain.original is not None  # it was not opened
        before = tensorrt.lower(plain.original, folder / "engine.onnx").facts.get("weights_memory")
        after = result.artifact.facts.get("weights_memory")
        size = after / before if isinstance(before, int) and isinstance(after, int) else None
        self._row.tools["TensorRT"] = Tool("an engine alone" if size else "not installed", engine=size)

    def _compete(self, source: Artifact, subject: Subject) -> None:
        """Let every peer quantize the float32 file."""
        names = [spec.name for spec in source.inputs]
        splits = zip(*(tensor.split(1) for tensor in subject.calibration), strict=True)
        feeds: list[Feed] = [dict(zip(names, (part.numpy() for part in parts), strict=True)) for parts in splits]
        self._begin("preparing the file for other quantizers")
        prepared = prepare(source.path)
        for name in self._row.how["peers"]:
            self._begin(f"quantizing with {name}")
            target = source.path.with_name(f"{name.replace(' ', '_')}.onnx")
            try:
                if note := PEERS[name](prepared, target, feeds):
                    self._row.tools[name] = Tool(note)
                    continue
                options = {} if name == "ORT defaults" else source.session_options
                self._keep(
                    name, dataclasses.replace(source, path=target, files=(target,), session_options=options), Tool()
                )
            except Exception as err:  # whatever a quantizer dies of
                self._row.tools[name] = Tool(f"fails: {type(err).__name__}: {err}"[:300])

    def _keep(self, name: str, artifact: Artifact, tool: Tool) -> None:
        settings = SessionSettings.of({"spinning": False, **artifact.session_options, "threads": 1})
        self._sessions[name] = OnnxSession(artifact.path, settings)
        tool.size, tool.kernels = artifact.size, kernel_counts(artifact.path, settings)
        self._row.tools[name] = tool

    def _judge(self, subject: Subject) -> None:
        """Compare what sessions make of the test samples."""
        self._begin("comparing outputs")
        wanted = self._outputs(FLOAT, subject)
        specs = [TensorSpec(f"output {index}", tuple(value.shape), value.dtype) for index, value in enumerate(wanted)]
        for name in list(self._sessions):
            tool = self._row.tools[name]
            found = self._outputs(name, subject)
            if subject.labels is not None:
                tool.top1 = 100 * float((found[0].argmax(1) == subject.labels).double().mean())
            try:
                tool.sqnr = compare_outputs(specs, wanted, found).sqnr
            except graphopt.GraphOptError as err:
                tool.note = str(err)

    def _outputs(self, name: str, subject: Subject) -> tuple[torch.Tensor, ...]:
        rows = zip(*(tensor.split(4 if subject.labels is None else 500) for tensor in subject.test), strict=True)
        parts = [self._sessions[name](*(tensor.numpy() for tensor in row)) for row in rows]
        return tuple(torch.cat([torch.from_numpy(part) for part in each]) for each in zip(*parts, strict=True))


def _call(session: OnnxSession, feed: list[Any]) -> Callable[[], object]:
    return lambda: session(*feed)


if __name__ == "__main__":
    typer.run(main)
