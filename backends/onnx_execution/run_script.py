"""The `run.py` written beside an artifact: a few lines of numpy and onnxruntime, no graphopt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnxruntime  # type: ignore[import-untyped]
import torch

from graphopt.backends.onnx_execution.saturating_products import ACTIVATION, EXACT, SIZE, WEIGHT, probe
from graphopt.backends.onnx_execution.session import SessionSettings
from graphopt.ir.batch_sizes import BatchSizes
from graphopt.ir.plain_data import Json
from graphopt.ir.signature import TensorSpec

_TEMPLATE = '''"""Run {file} in ONNX Runtime. Needs: pip install numpy onnxruntime=={version}

    python run.py [NAME=ARRAY.npy ...]

Inputs: {inputs}
Inputs that are not given are zeros.{remark}
"""

import os
import sys
from pathlib import Path

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # before the import, or it reports that it was started
import numpy as np
import onnxruntime

options = onnxruntime.SessionOptions()
{options}
session = onnxruntime.InferenceSession(
    str(Path(__file__).resolve().parent / {file!r}), options, providers=["CPUExecutionProvider"]{disabled}
)
if not all("=" in word for word in sys.argv[1:]):
    print(__doc__)
    sys.exit(sys.argv[1:] not in (["--help"], ["-h"]))
feed = {{
{zeros}
}}
feed.update((name, np.load(file)) for name, file in (word.split("=", 1) for word in sys.argv[1:]))
for output, value in zip(session.get_outputs(), session.run(None, feed)):
    print(output.name, value.shape, value.dtype)
    print(value)
'''

_SATURATION = """
# x86 without VNNI adds up products of integers in 16 bits, where they saturate unless the session is precise.
product = onnxruntime.InferenceSession({probe!r}, providers=["CPUExecutionProvider"])
largest = {{"a": np.full(({size}, {size}), {activation}, "uint8"), "b": np.full(({size}, {size}), {weight}, "int8")}}
if (product.run(None, largest)[0] != {exact}).any():
{entries}"""


def run_script(file: str, inputs: Sequence[TensorSpec], options: Mapping[str, Json], *, remark: str = "") -> str:
    """Return the script.

    Args:
        file: name of the artifact, which lies beside the script.
        inputs: its inputs.
        options: recorded session options.
        remark: a sentence for the script's docstring.
    """
    settings = SessionSettings.of(options)
    sizes, lines = BatchSizes(inputs), []
    if settings.threads:
        lines.append(f"options.intra_op_num_threads = {settings.threads}")
    level = "ORT_DISABLE_ALL" if settings.optimization == "disabled" else f"ORT_ENABLE_{settings.optimization.upper()}"
    lines.append(f"options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.{level}")
    config = {**({} if settings.spinning else {"session.intra_op.allow_spinning": "0"}), **(settings.config or {})}
    lines += [f"options.add_session_config_entry({key!r}, {value!r})" for key, value in config.items()]
    if settings.where_products_saturate:
        entries = "\n".join(
            f"    options.add_session_config_entry({key!r}, {value!r})"
            for key, value in settings.where_products_saturate.items()
        )
        lines.append(
            _SATURATION.format(
                probe=probe(), size=SIZE, activation=ACTIVATION, weight=WEIGHT, exact=EXACT, entries=entries
            )
        )
    disabled = f", disabled_optimizers={list(settings.disabled_optimizers)!r}" if settings.disabled_optimizers else ""
    return _TEMPLATE.format(
        file=file,
        version=onnxruntime.__version__,
        inputs=_quoted("; ".join(map(str, inputs))),
        options="\n".join(lines),
        disabled=disabled,
        zeros="\n".join(
            f"    {spec.name!r}: np.zeros({_shape(spec, sizes)}, dtype={_numpy_name(spec.dtype)!r})," for spec in inputs
        ),
        remark=f"\n{remark}" if remark else "",
    )


def _quoted(text: str) -> str:
    """Return text as it may stand in a docstring: names come from files, and must not end it."""
    return text.encode("unicode_escape").decode().replace('"', "'")


def _shape(spec: TensorSpec, sizes: BatchSizes) -> str:
    others = [spec.range_of(axis).nearest(1) for axis in range(len(spec.shape))]
    return repr(tuple(sizes.shape(spec, 1, others)))


def _numpy_name(dtype: torch.dtype) -> str:
    return str(torch.empty(0, dtype=dtype).numpy().dtype)
