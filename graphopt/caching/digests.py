"""SHA-256 over everything that the plan of a pass may depend on: programs, options, code, libraries, the machine."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.metadata
import importlib.util
import inspect
import json
import os
import platform
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import fx

from graphopt.ir.program import Program
from graphopt.ir.provenance import origin, user_line
from graphopt.ir.regions import every_graph_module
from graphopt.ir.torch_internals import pytree
from graphopt.loading.functions import is_function_name
from graphopt.measure.evaluate import Evaluator
from graphopt.pipeline.plan import Plan


def digest_of(*parts: Any) -> str:
    """Return a digest of plain data, dataclasses, tensors and digests, told apart by type and order."""
    digest = hashlib.sha256()
    for part in _flat(parts):
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()


def _flat(value: Any) -> Iterable[bytes | memoryview]:
    """Yield what tells values apart as bytes."""
    if isinstance(value, torch.Tensor):
        yield f"tensor {value.dtype} {tuple(value.shape)}".encode()
        content = value.detach().cpu().contiguous().flatten()
        yield content.view(torch.uint8).numpy().data if content.numel() else b""
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield f"{type(value).__qualname__} {len(dataclasses.fields(value))}".encode()
        for field in dataclasses.fields(value):
            yield from _flat((field.name, getattr(value, field.name)))
    elif isinstance(value, Mapping):
        yield f"mapping {len(value)}".encode()
        for key in sorted(value, key=repr):
            yield from _flat((key, value[key]))
    elif isinstance(value, set | frozenset):
        yield f"set {len(value)}".encode()
        for item in sorted(value, key=repr):
            yield from _flat(item)
    elif isinstance(value, list | tuple):
        yield f"sequence {len(value)}".encode()
        for item in value:
            yield from _flat(item)
    else:
        yield f"{type(value).__qualname__} {value!r}".encode()


def of_program(program: Program) -> str:
    """Return a digest of a program: graphs, tensors, signature and examples, and what passes and messages name."""
    graphs = [
        [
            (node.name, str(node.format_node()), _values(node), origin(node), user_line(node))
            for node in body.graph.nodes
        ]
        for body in every_graph_module(program.graph_module)
    ]
    gm = program.graph_module
    first: dict[int, str] = {}
    held = []
    for name, tensor in (*gm.named_parameters(remove_duplicate=False), *gm.named_buffers(remove_duplicate=False)):
        known = first.setdefault(id(tensor), name)  # a tied one is read once
        held.append((name, known, type(tensor).__name__, tensor.requires_grad, tensor if known == name else None))
    examples, structure = pytree.tree_flatten((program.example_args, dict(program.example_kwargs)))
    returned = program.graph.output_node().args
    return digest_of(graphs, str(returned), held, program.inputs, program.outputs, examples, str(structure))


def _values(node: fx.Node) -> str:
    return str(pytree.tree_map_only(torch.Tensor, _described, node.meta.get("val")))


def of_evaluation(metric: Any) -> str | None:
    """Return a digest of what judges models; None for a function of the user's, which may ask anything."""
    if not isinstance(metric, Evaluator):
        return None
    return digest_of(metric.name, metric.batch_size, [digest_of(batch) for batch in metric.batches()])


def _described(tensor: torch.Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)} {tensor.stride()} {tensor.device.type}"


def of_plan(plan: Plan) -> str:
    """Return a digest of what a plan decides, without the times that steered it."""
    decided = {name: value for name, value in plan.to_json().items() if name != "measured"}
    return digest_of(json.dumps(decided, sort_keys=True), dict(plan.tensors))


def of_pass(instance: Any) -> str | None:
    """Return a digest of a pass: its options, and all source it is made of.

    Returns:
        None where that is not all: a class without a source file or inside a function, whose variables it may read, or
        an instance that holds more than options and plain values.
    """
    more = {name: value for name, value in vars(instance).items() if name != "options"}
    if "<locals>" in type(instance).__qualname__ or not all(isinstance(value, _PLAIN) for value in more.values()):
        return None
    kinds = [kind for kind in type(instance).__mro__ if kind.__module__.partition(".")[0] not in _WITHOUT_SOURCES]
    parts: list[Any] = [
        instance.name,
        f"{type(instance).__module__}.{type(instance).__qualname__}",
        instance.options,
        more,
    ]
    for kind in kinds:
        try:
            parts.append(_source_of(Path(inspect.getfile(kind))))
        except (OSError, TypeError):
            return None
    parts += [_source_of(file) for text in _texts(instance.options) if (file := _file_of_function(text)) is not None]
    return digest_of(parts)


def _file_of_function(text: str) -> Path | None:
    """Return the file that an option says a function is in, as `loss=my_losses:smooth`; None where it is other text."""
    if not is_function_name(text):
        return None
    try:
        found = importlib.util.find_spec(text.partition(":")[0])
    except (ImportError, ValueError):
        return None
    return Path(found.origin) if found is not None and found.has_location and found.origin else None


_PLAIN = (bool, int, float, str, type(None))
_WITHOUT_SOURCES = frozenset({"graphopt", "builtins", *sys.stdlib_module_names})  # or with others, see `of_libraries`


def _texts(options: Any) -> list[str]:
    values = [getattr(options, field.name) for field in dataclasses.fields(options)]
    return [value for value in pytree.tree_leaves(values) if isinstance(value, str)]


def _source_of(file: Path) -> list[tuple[str, str]]:
    """Return digests of a source file, and of the whole package that it is part of."""
    top = file.parent
    while (top / "__init__.py").is_file() and (top.parent / "__init__.py").is_file():
        top = top.parent
    files = sorted(top.rglob("*.py")) if (top / "__init__.py").is_file() else [file]
    return [(str(one.relative_to(top)), hashlib.sha256(one.read_bytes()).hexdigest()) for one in files]


@functools.cache
def of_libraries() -> str:
    """Return a digest of what computes: our own source, and the versions of Python and of what we require."""
    packages = map(importlib.util.find_spec, ("graphopt", "graphopt.passes", "graphopt.backends"))
    own = [path for found in packages if found for path in found.submodule_search_locations or ()]
    sources = [_source_of(Path(path) / "__init__.py") for path in dict.fromkeys(own)]
    wanted = importlib.metadata.requires("graphopt") or []
    names = sorted({re.split(r"[^\w.-]", text, maxsplit=1)[0] for text in wanted if "extra ==" not in text})
    versions = [(name, importlib.metadata.version(name)) for name in names]
    return digest_of(sources, versions, platform.python_version())


def of_machine() -> str:
    """Return a digest of what times are measured on."""
    try:
        processor = re.findall(r"(?m)^(?:model name|flags|Features|CPU part)\s*:.*$", Path("/proc/cpuinfo").read_text())
    except OSError:  # not Linux
        processor = [platform.processor()]
    return digest_of(sorted(set(processor)), platform.machine(), os.cpu_count(), torch.get_num_threads())
