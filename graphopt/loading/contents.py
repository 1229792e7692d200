"""What a model file is, told from its first bytes and its members, never from its name."""

from __future__ import annotations

import enum
import re

from graphopt.loading.archive import Archive, member_names

# The first of several pickles, a number of torch's own; from protocol 4 on each is in a frame.
_LEGACY_TORCH = re.compile(rb"\x80[\x02-\x05](\x95.{8})?\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19\.", re.DOTALL)


class FileKind(enum.Enum):
    """The kinds of file a user may hand over as a model; the value says it in words."""

    TORCH_PICKLE = "a torch.save file"
    EXPORTED = "an exported program"
    EXPORTED_OLD = "an exported program in the format of torch 2.7 and older"
    TORCHSCRIPT = "a TorchScript archive"
    SAFETENSORS = "a safetensors file"
    ONNX = "an ONNX model"
    PICKLE = "a Python pickle that torch.save did not write"
    NUMPY = "a NumPy file"
    HDF5 = "an HDF5 file, as Keras writes"
    TFLITE = "a TensorFlow Lite model"
    GGUF = "a GGUF model"
    COMPRESSED = "a gzip, bzip2, xz or zstd archive"
    TAR = "a tar archive"
    ZIP = "a zip archive that is not a model"
    LFS_POINTER = "a Git LFS pointer, not the file itself"
    HTML = "a web page"
    TEXT = "a text file"
    EMPTY = "an empty file"
    UNKNOWN = "a file of unknown kind"


_MAGIC: tuple[tuple[bytes, FileKind], ...] = (
    (b"\x93NUMPY", FileKind.NUMPY),
    (b"\x89HDF\r\n\x1a\n", FileKind.HDF5),
    (b"GGUF", FileKind.GGUF),
    (b"\x1f\x8b", FileKind.COMPRESSED),
    (b"BZh", FileKind.COMPRESSED),
    (b"\xfd7zXZ\x00", FileKind.COMPRESSED),
    (b"\x28\xb5\x2f\xfd", FileKind.COMPRESSED),
    (b"version https://git-lfs.github.com/spec", FileKind.LFS_POINTER),
)
# What a zip archive is, by a member that it has; the first that is found decides.
_MEMBERS = (
    ("archive_format", FileKind.EXPORTED),
    ("serialized_exported_program.json", FileKind.EXPORTED_OLD),
    ("constants.pkl", FileKind.TORCHSCRIPT),
    ("data.pkl", FileKind.TORCH_PICKLE),
)


def identify(data: bytes) -> tuple[FileKind, Archive | None]:
    """Return what `data` is, and its opened archive where it is a zip; raises `DamagedError` for a broken zip."""
    if not data:
        return FileKind.EMPTY, None
    if data.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return _identify_zip(data)
    if is_legacy_torch(data):
        return FileKind.TORCH_PICKLE, None
    for magic, kind in _MAGIC:
        if data.startswith(magic):
            return kind, None
    if data[4:8] == b"TFL3":
        return FileKind.TFLITE, None
    if data[257:262] == b"ustar":
        return FileKind.TAR, None
    if _is_safetensors(data):
        return FileKind.SAFETENSORS, None
    if data[0] == 0x80 and len(data) > 1 and data[1] <= 5:
        return FileKind.PICKLE, None
    if _is_onnx(data):
        return FileKind.ONNX, None
    return _identify_text(data[:4096]), None


def is_legacy_torch(data: bytes) -> bool:
    """Tell a file of the older format of `torch.save`, pickles one behind the other."""
    return _LEGACY_TORCH.match(data) is not None


def _identify_zip(data: bytes) -> tuple[FileKind, Archive | None]:
    if _is_numpy_zip(data):
        return FileKind.NUMPY, None
    names = member_names(data)
    kind = next((kind for name, kind in _MEMBERS if name in names), FileKind.ZIP)
    # What is not read may be compressed, TorchScript always is: only what is read must be as `Archive` wants it.
    return kind, Archive(data) if kind not in (FileKind.TORCHSCRIPT, FileKind.ZIP) else None


def _is_numpy_zip(data: bytes) -> bool:
    """Tell an `.npz` by its first member, without opening it (it may be compressed)."""
    length = int.from_bytes(data[26:28], "little")
    return data[30 : 30 + length].endswith(b".npy")


def _is_safetensors(data: bytes) -> bool:
    header = int.from_bytes(data[:8], "little")
    return len(data) > 8 and header + 8 <= len(data) and data[8:9] == b"{"


def _is_onnx(data: bytes) -> bool:
    """Tell an ONNX ModelProto: field 1 (`ir_version`, a small varint), then one of its other fields."""
    return (
        len(data) > 3 and data[0] == 0x08 and data[1] <= 0x20 and data[2] in (0x12, 0x1A, 0x22, 0x28, 0x32, 0x3A, 0x42)
    )


def _identify_text(head: bytes) -> FileKind:
    try:
        text = head.decode("utf-8")
    except UnicodeDecodeError as err:
        # A multi-byte character may be cut at the end of the sample; anything else is not text.
        if err.start < len(head) - 4:
            return FileKind.UNKNOWN
        text = head[: err.start].decode("utf-8")
    if any(ord(char) < 32 and char not in "\t\n\r\f" for char in text):
        return FileKind.UNKNOWN
    return FileKind.HTML if text.lstrip().lower().startswith(("<!doctype html", "<html")) else FileKind.TEXT
