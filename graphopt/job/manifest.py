"""Manifest: what it takes to trust, repeat and run a result. Plain data, no times, no paths of one machine."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import pydantic
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from graphopt.errors import LoadError, UsageError, cut, first_line, first_problem, printable
from graphopt.files import MANIFEST, MOST_OF_A_MANIFEST, check_digest, read_file
from graphopt.ir.contents import content
from graphopt.ir.program import Program
from graphopt.measure.processor import said_of_processor
from graphopt.pipeline.plan import Plan
from graphopt.targets.backend import TARGET_NAME, Artifact
from graphopt.versions import version_of

SCHEMA = 2
PAYLOAD = "plans.safetensors"
DISTILLED = "distilled.safetensors"  # what a student learned, under the names of its own tensors
_ADVICE = "Optimise again, or give what a whole run wrote."
_LIBRARIES = ("graphopt", "torch", "onnx", "onnx_ir", "onnxscript", "onnxsim", "onnxruntime", "numpy")

# Names come from a file: they stay within its directory, and file systems take none longer.
_FileName = Annotated[str, pydantic.Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.+-]*$", max_length=255)]
_Target = Annotated[str, pydantic.Field(pattern=f"^({TARGET_NAME})?$")]
_Digest = Annotated[str, pydantic.Field(pattern=r"^[0-9a-f]{64}$")]


class StoredArtifact(pydantic.BaseModel, extra="forbid", strict=True, frozen=True):
    """An artifact: its file, and what its backend has to know to run it."""

    file: _FileName
    session_options: dict[str, pydantic.JsonValue]
    facts: dict[str, pydantic.JsonValue]

    @classmethod
    def of(cls, artifact: Artifact) -> StoredArtifact:
        """Describe an artifact."""
        data = {"session_options": dict(artifact.session_options), "facts": dict(artifact.facts)}
        return cls.model_validate({"file": artifact.path.name, **json.loads(json.dumps(data))})


class StoredPlan(pydantic.BaseModel, extra="allow", strict=True, frozen=True):
    """A plan: the target it was made for ("" before the pipeline forks), its pass, and fields that the pass knows."""

    target: _Target
    pass_name: str
    options: dict[str, pydantic.JsonValue]

    @classmethod
    def of(cls, target: str, plan: Plan) -> StoredPlan:
        """Describe a plan."""
        return cls.model_validate({"target": target, **plan.to_json()})

    def fields(self) -> dict[str, Any]:
        """Return what `Plan.from_json` reads."""
        return {"pass_name": self.pass_name, "options": self.options, **(self.model_extra or {})}


class Manifest(pydantic.BaseModel, extra="forbid", strict=True, frozen=True):
    """What `manifest.json` holds.

    Attributes:
        model: what reports call the model.
        original: fingerprint of the unoptimised program.
        pipeline: as the user wrote it.
        served: inputs that the original takes as they are served, as `ServedInput.parse` reads them.
        distillation: how the original was taught; empty where it was not.
        seed: every random draw descended from it.
        libraries: installed versions of what decides the bytes of an artifact.
        cpu: the instruction sets of the machine.
        plans: every plan, in the order they were made.
        programs: file of the optimised program of each target; "" where no pass asked for one.
        artifacts: the lowered program of each target.
        sha256: digest of every other file, by its name; not of the report, which holds times and would bring them here.
    """

    model: str
    original: _Digest
    pipeline: str
    served: list[str] = []
    distillation: dict[str, pydantic.JsonValue] = {}
    seed: int
    libraries: dict[str, str]
    cpu: list[str]
    plans: list[StoredPlan]
    programs: dict[_Target, _FileName]
    sha256: dict[_FileName, _Digest]
    artifacts: dict[_Target, StoredArtifact]

    @pydantic.field_validator("artifacts")
    @classmethod
    def _with_their_programs(
        cls, artifacts: dict[str, StoredArtifact], info: pydantic.ValidationInfo
    ) -> dict[str, StoredArtifact]:
        lost = artifacts.keys() - info.data.get("programs", artifacts).keys()
        if lost:
            raise ValueError(f"the program that was lowered for `{min(lost)}` is not named")
        return artifacts

    def write(self, directory: Path) -> Path:
        """Write `manifest.json`."""
        data = {"schema": SCHEMA, **self.model_dump(mode="json")}
        (directory / MANIFEST).write_text(json.dumps(data, indent=1, sort_keys=True) + "\n")
        return directory / MANIFEST

    def check_files(self, directory: Path, names: Iterable[str] | None = None) -> None:
        """Compare files with the digests they were written with; all of them, or those of the given names.

        Raises:
            LoadError: one is missing or has changed.
        """
        for name in sorted(self.sha256 if names is None else names):
            check_digest(directory / name, self.sha256.get(name, ""))

    def tensors_of(self, directory: Path) -> dict[int, dict[str, torch.Tensor]]:
        """Read what plans carry besides JSON: {index of the plan: {name: tensor}}, digests checked.

        Raises:
            LoadError: the file is missing, has changed, or is damaged.
        """
        found: dict[int, dict[str, torch.Tensor]] = {index: {} for index in range(len(self.plans))}
        if PAYLOAD not in self.sha256:
            return found
        for key, tensor in self._read(directory, PAYLOAD).items():
            index, _, name = key.partition("/")
            try:
                found[int(index)][name] = tensor
            except (ValueError, KeyError) as err:
                raise LoadError(f"{directory / PAYLOAD} is damaged: {first_line(err)}. Optimise again.") from err
        return found

    def distilled(self, directory: Path) -> dict[str, torch.Tensor]:
        """Read what a student learned before the plans were made, digest checked; nothing where it was not taught.

        Raises:
            LoadError: the file is missing, has changed, or is damaged.
        """
        return self._read(directory, DISTILLED) if DISTILLED in self.sha256 else {}

    def _read(self, directory: Path, name: str) -> dict[str, torch.Tensor]:
        self.check_files(directory, [name])
        try:
            return load_file(directory / name)
        except (SafetensorError, ValueError) as err:
            raise LoadError(f"{directory / name} is damaged: {first_line(err)}. Optimise again.") from err

    def other_libraries(self) -> list[str]:
        """Say which libraries are of another version here: what they compute may differ in the last bits."""
        here = library_versions()
        return [
            f"{printable(name)} {printable(there)}, here {here.get(name)}"
            for name, there in self.libraries.items()
            if there != here.get(name)
        ]

    def other_processor(self) -> str:
        """Say where it was made on a processor of other instruction sets, "" where on one of the same."""
        here = cpu_features()
        if set(self.cpu) == set(here):
            return ""
        return f"a processor with {', '.join(map(printable, self.cpu))}; this one has {', '.join(here)}"


def library_versions() -> dict[str, str]:
    """Return the installed versions of what decides the bytes of an artifact."""
    return {name: version_of(name) or "not installed" for name in _LIBRARIES}


def cpu_features() -> list[str]:
    """List the instruction sets that decide which integer kernels run, as the kernel names them."""
    known = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "asimd", "asimddp", "i8mm")
    flags = " ".join(said_of_processor("flags", "Features")).split()
    return [platform.machine(), *(name for name in known if name in flags)]


def fingerprint(program: Program) -> str:
    """Return a SHA-256 over the graph's text and every tensor's bytes."""
    program = program.to("cpu")  # plans are for a model wherever it is
    digest = hashlib.sha256(program.graph_module.code.encode())
    for name, tensor in sorted(program.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(content(tensor))
    return digest.hexdigest()


def write_payload(directory: Path, plans: Iterable[Plan]) -> list[Path]:
    """Write what plans carry besides JSON to `plans.safetensors`; return its path, nothing where they carry nothing.

    Raises:
        OSError: the disk is full.
    """
    payload = {f"{index}/{name}": tensor for index, plan in enumerate(plans) for name, tensor in plan.tensors.items()}
    if not payload:
        return []
    return [_write_tensors(directory / PAYLOAD, dict(sorted(payload.items())))]


def write_learned(directory: Path, student: Program) -> Path:
    """Write the tensors of a student that was taught to `distilled.safetensors`, tied ones under each of their names.

    Raises:
        OSError: the disk is full.
    """
    tensors = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    return _write_tensors(directory / DISTILLED, tensors)


def _write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> Path:
    path.touch()
    mode = path.stat().st_mode  # by the user's mask, which safetensors does not look at
    try:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)
    except SafetensorError as err:
        raise OSError(first_line(err)) from err  # the disk is full, say
    path.chmod(mode)
    return path


def read(path: Path) -> Manifest:
    """Read a manifest.

    Raises:
        UsageError: it is missing, no manifest, damaged, or of a version that is not known.
    """
    try:
        data = read_json(path, "manifest")
    except FileNotFoundError as err:
        raise UsageError(
            f"There is no {path}: the run that wrote there was interrupted, or graphopt did not write there. {_ADVICE}"
        ) from err
    if "schema" not in data:
        raise UsageError(f"{path} is not a manifest: it has no schema. {_ADVICE}")
    schema = data["schema"]
    if type(schema) is not int or schema != SCHEMA:
        raise UsageError(
            f"{path} has manifest schema {cut(repr(schema), 80)}; this version reads {SCHEMA}. Optimise again."
        )
    try:
        return Manifest.model_validate({name: value for name, value in data.items() if name != "schema"})
    except pydantic.ValidationError as err:
        raise UsageError(f"{path} is damaged: {first_problem(err)}. Optimise again.") from err


def read_json(path: Path, what: str) -> Mapping[str, Any]:
    """Read a file of a result that holds an object.

    Raises:
        FileNotFoundError: it is missing.
        UsageError: it is not `what` it should be.
    """
    try:
        data = json.loads(read_file(path, most=MOST_OF_A_MANIFEST))
    except FileNotFoundError:
        raise
    except (OSError, ValueError, RecursionError) as err:
        said = getattr(err, "strerror", None) or first_line(err)
        raise UsageError(f"{path} is not a {what}: {said}. {_ADVICE}") from err
    if not isinstance(data, Mapping):
        raise UsageError(f"{path} is not a {what}: it is no object. {_ADVICE}")
    return data
