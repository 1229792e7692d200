"""SHA-256 over everything that the plan of a pass may depend on: programs, options, code, libraries, the machine."""

from __future__ import annotations

import dataclasses
import enum
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePath
from typing import Any

import torch
from torch import fx

from graphopt.axes.registry import built_in_rules, find
from graphopt.caching.sources import is_ours, sources_of
from graphopt.ir.contents import content
from graphopt.ir.ownership import memory_key, storage_key
from graphopt.ir.program import Program
from graphopt.ir.provenance import origin, user_line
from graphopt.ir.regions import every_graph_module
from graphopt.ir.torch_internals import OpOverload, pytree
from graphopt.loading.functions import is_function_name
from graphopt.loading.operators import NAMESPACES
from graphopt.measure.evaluate import Evaluator
from graphopt.measure.processor import said_of_processor
from graphopt.pipeline.plan import Plan
from graphopt.versions import version_of


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
        yield content(value)
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
    storages, first = dict[Any, int](), dict[Any, str]()
    held = []
    for name, tensor in (*gm.named_parameters(remove_duplicate=False), *gm.named_buffers(remove_duplicate=False)):
        storage, memory = storage_key(tensor), memory_key(tensor)
        known = first.setdefault(memory, name)  # a tied one is read once
        place = storages.setdefault(storage, len(storages)), memory[len(storage) :]  # what shares memory, and how
        own = type(tensor).__name__, tensor.requires_grad, tensor if known == name else None
        held.append((name, first.setdefault(id(tensor), name), place, own))
    examples, structure = pytree.tree_flatten((program.example_args, dict(program.example_kwargs)))
    returned = program.graph.output_node().args
    return digest_of(graphs, str(returned), held, program.inputs, program.outputs, examples, str(structure))


def asks_the_user(program: Program) -> bool:
    """Whether a program calls operators of another's, or others' rules say where axes of theirs go.

    What they compute follows from source that a program does not name.
    """
    rules = built_in_rules()
    bodies = every_graph_module(program.graph_module)
    for target in {node.target for body in bodies for node in body.graph.nodes if node.op == "call_function"}:
        found = find(rules, target)
        said = [] if found is None else [function for function in (found.infer, found.rewrite) if function is not None]
        by = target.namespace if isinstance(target, OpOverload) else str(target.__module__).partition(".")[0]
        if by not in _NAMESPACES or any(not is_ours(getattr(function, "__module__", "")) for function in said):
            return True
    return False


_NAMESPACES = frozenset({*NAMESPACES, "prims", "torch", "_operator", "math"})


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
        None where that is not all: its class does not say itself that plans may be kept, an option names a function of
        the user's, an instance holds more than options and plain values, or source cannot be followed.
    """
    kind, more = type(instance), {name: value for name, value in vars(instance).items() if name != "options"}
    if vars(kind).get("cached") is not True or not all(
        isinstance(value, _PLAIN) for value in (*more.values(), *_given(instance))
    ):
        return None
    sources, named = sources_of(base.__module__ for base in kind.__mro__), sources_of(_functions(instance))
    if sources is None or named is None or any(map(os.path.isabs, named)):
        return None
    return digest_of(instance.name, f"{kind.__module__}.{kind.__qualname__}", instance.options, more, sources, named)


def modules_of(instance: Any) -> list[str]:
    """Name the modules of a pass: of its classes, and of functions that its options name."""
    return [*(base.__module__ for base in type(instance).__mro__), *_functions(instance)]


def _functions(instance: Any) -> list[str]:
    """Name the modules of functions that options name, or of what looks like one."""
    return [text.split(":")[0] for text in _given(instance) if isinstance(text, str) and is_function_name(text)]


def _given(instance: Any) -> list[Any]:
    options = instance.options
    return pytree.tree_leaves([getattr(options, field.name) for field in dataclasses.fields(options)])


_PLAIN = (bool, int, float, str, type(None), PurePath, enum.Enum)


def own_files() -> list[Path]:
    """List our own source."""
    packages = map(importlib.util.find_spec, ("graphopt", "graphopt.passes", "graphopt.backends"))
    folders = {Path(path).resolve() for one in packages if one for path in one.submodule_search_locations or ()}
    return sorted({file for folder in folders for file in folder.rglob("*.py")})  # two are links in a checkout


@functools.cache
def of_libraries() -> str:
    """Return a digest of what computes: our own source, and the versions of Python and of what we require."""
    sources = [(file.name, hashlib.sha256(file.read_bytes()).hexdigest()) for file in own_files()]
    wanted = importlib.metadata.requires("graphopt") or []
    names = sorted({re.split(r"[^\w.-]", text, maxsplit=1)[0] for text in wanted if "extra ==" not in text})
    return digest_of(sources, [(name, version_of(name)) for name in names], platform.python_version())


def of_computing() -> str:
    """Return a digest of what computes, and of what this process and its environment were told of how."""
    accelerator = torch.accelerator.current_accelerator()
    devices = {"cpu", *([accelerator.type] if accelerator is not None else ())}
    told = [(device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)) for device in sorted(devices)]
    backends = torch.backends.mkldnn.enabled, torch.backends.cudnn.enabled, torch.backends.cudnn.allow_tf32
    environment = sorted(item for item in os.environ.items() if item[0].startswith(_SAYS_HOW))
    threads = torch.get_num_threads()  # sums in another order have other last digits
    return digest_of(
        of_libraries(),
        threads,
        told,
        backends,
        torch.get_float32_matmul_precision(),
        torch.get_default_dtype(),
        environment,
    )


_SAYS_HOW = ("ACCELERATE_", "ATEN_", "DNNL_", "MKL_", "ONEDNN_", "TORCH_")  # names of variables begin so


def of_machine() -> str:
    """Return a digest of what times are measured on."""
    processor = said_of_processor("model name", "flags", "Features", "CPU part") or platform.processor()
    return digest_of(processor, platform.machine(), os.cpu_count(), torch.get_num_threads())
