"""Seeded mutations of files: bytes, JSON, the opcodes of a pickle, the members of a zip archive."""

from __future__ import annotations

import copy
import io
import json
import pickletools
import random
import struct
import zipfile
from collections.abc import Callable, Sequence
from typing import Any

Mutation = Callable[[bytes, random.Random], bytes]

_EXTREMES = (0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1, 2**64 - 1)
_DEEP = "@deep@"  # stands for lists within lists until the JSON is text
_ODD: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 3, 10**6, 2**31, 2**63, 10**30, 0.5, -0.0, 1e308, float("nan"), float("inf"),
    "", " ", "x", "0", "-1", "None", "\x00", "\x1b[2J", "é", "\ud800", "../../x", "/etc/passwd", "a/b", "os:system",
    "__import__('os').getcwd()", '"""', "x" * 100_000, [], [[]], [None], {}, {"": ""}, {"x": {"x": 1}}, _DEEP,
)  # fmt: skip
_GLOBALS = (
    b"cos\nsystem\n", b"cbuiltins\neval\n", b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch\nFloatStorage\n",
    b"ctorch._tensor\n_rebuild_from_type_v2\n", b"ctorch.nn.modules.linear\nLinear\n", b"ccollections\nOrderedDict\n",
    b"cbuiltins\nbytearray\n", b"ctorch.nn.modules.container\nSequential\n", b"ctorch.serialization\n_get_layout\n",
)  # fmt: skip
_OPCODES = (
    *_GLOBALS, b"R", b"b", b"\x81", b"(", b"t", b")", b"]", b"}", b"s", b"u", b"e", b"a", b"0", b"1", b"2", b".", b"N",
    b"\x88", b"Q", b"q\x00", b"q\x05", b"h\x00", b"h\x05", b"r\xff\xff\xff\x7f", b"j\xff\xff\xff\x7f", b"K\x07",
    b"J\xff\xff\xff\x7f", b"M\xff\xff", b"G\x7f\xf0\x00\x00\x00\x00\x00\x00", b"\x8a\x09" + b"\xff" * 8 + b"\x7f",
    b"\x8b\xff\xff\xff\x7f", b"B\xff\xff\xff\x7f", b"\x8e" + b"\xff" * 7 + b"\x7f", b"X\x03\x00\x00\x00abc",
    b"X\xff\xff\xff\x7f", b"\x8d" + b"\xff" * 7 + b"\x7f", b"\x93", b"\x92", b"\x82\x01", b"i", b"o", b"P1\n",
    b"\x80\x05", b"\x95" + b"\xff" * 8, b"\x96\xff\xff\xff\x7f\x00\x00\x00\x00", b"\x8f", b"\x90", b"\x91", b"\x94",
    b"}q\x07X\x04\x00\x00\x00selfh\x07s", b"]q\x08h\x08a", b"(" * 2000, b"]" * 2000, b"\x85" * 2000, b"\x85\x86" * 60,
)  # fmt: skip


def bytes_mutated(content: bytes, rng: random.Random) -> bytes:
    """Flip, set, cut, repeat, drop and insert a few bytes; put extreme integers in their place."""
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        start = rng.randrange(len(content) + 1)
        if rng.random() < 0.5:  # most that can be wrong stands at the start and the end
            start = min(start, rng.randrange(200)) if rng.random() < 0.5 else max(0, len(content) - rng.randrange(200))
        end = min(len(content), start + rng.choice((1, 1, 2, 4, 8, 16, 100)))
        form = rng.choice(("<B", "<H", "<I", "<Q"))
        number = struct.pack(form, rng.choice(_EXTREMES) % 256 ** struct.calcsize(form))
        flipped = bytes(byte ^ (1 << rng.randrange(8)) for byte in content[start:end])
        middle = rng.choice((flipped, flipped, rng.randbytes(end - start), b"", rng.randbytes(5), number, number))
        deed = rng.random()
        if deed < 0.7:
            content = content[:start] + middle + content[start + len(middle) :]
        elif deed < 0.85:
            content = content[:start] + middle + content[end:]
        elif deed < 0.95:
            content = content[:end] + content[start:]
        else:
            content = content[:start]
    return content


def json_mutated(content: bytes, rng: random.Random) -> bytes:
    """Replace, drop, rename, repeat or exchange fields; or change the text."""
    if rng.random() < 0.15:
        return bytes_mutated(content, rng)
    root: list[Any] = [json.loads(content)]
    for _ in range(rng.choice((1, 1, 1, 2))):
        holder, key = _place(root, rng)
        deed = rng.random()
        if deed < 0.6:
            holder[key] = copy.deepcopy(rng.choice(_ODD))
        elif deed < 0.7:
            other, there = _place(root, rng)
            holder[key] = copy.deepcopy(other[there])
        elif deed < 0.8 and holder is not root:
            del holder[key]
        elif isinstance(holder, dict):
            holder[str(rng.choice([odd for odd in _ODD if isinstance(odd, str)]))] = (
                holder.pop(key) if rng.random() < 0.7 else holder[key]
            )
        elif isinstance(holder, list) and holder is not root:
            holder[key:key] = [holder[key]] * rng.choice((1, 2, 1000))
    depth = rng.choice((50, 900, 5000, 100_000))
    return json.dumps(root[0]).replace(f'"{_DEEP}"', "[" * depth + "]" * depth).encode()


def _place(value: Any, rng: random.Random) -> tuple[Any, Any]:
    """Go down from the root of JSON data, at each fork by chance; return what holds a value, and under which key."""
    while True:
        key = rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
        inner = value[key]
        if not isinstance(inner, dict | list) or not inner or rng.random() < 0.15:
            return value, key
        value = inner


def pickle_mutated(content: bytes, rng: random.Random) -> bytes:
    """Drop, repeat, exchange, replace and insert opcodes; or change bytes."""
    if rng.random() < 0.2:
        return bytes_mutated(content, rng)
    starts = [start for _, _, start in pickletools.genops(content) if start is not None]
    opcodes = [content[start:end] for start, end in zip(starts, [*starts[1:], len(content)], strict=True)]
    for _ in range(rng.choice((1, 1, 2, 3, 5))):
        at, other = rng.randrange(len(opcodes)), rng.randrange(len(opcodes))
        deed = rng.randrange(6)
        if deed == 0:
            opcodes[at] = rng.choice(_OPCODES)
        elif deed == 1:
            opcodes.insert(at, rng.choice(_OPCODES))
        elif deed == 2 and len(opcodes) > 1:
            del opcodes[at]
        elif deed == 3:
            opcodes[at], opcodes[other] = opcodes[other], opcodes[at]
        elif deed == 4:
            opcodes.insert(at, opcodes[other])
        else:
            opcodes[at:at] = opcodes[other : other + rng.randrange(20)]
    return b"".join(opcodes)


def text_mutated(content: bytes, rng: random.Random) -> bytes:
    """Drop, repeat and exchange lines, put odd values behind `=`; or change bytes."""
    lines = content.splitlines(keepends=True)
    at, other = rng.randrange(len(lines)), rng.randrange(len(lines))
    deed = rng.randrange(5)
    if deed == 0:
        del lines[at]
    elif deed == 1:
        lines.insert(at, lines[other])
    elif deed == 2:
        odd = rng.choice(_ODD)
        value = "[" * 3000 if odd == _DEEP else json.dumps(odd)
        lines[at] = lines[at].partition(b"=")[0] + b"= " + value.encode() + b"\n"
    elif deed == 3:
        lines[at] = rng.choice((b"[[pass]]\n", b"[pass]\n", b"pass = 3\n", b"[a.b]\n", b"name = 1\n", b"a.b = 1\n"))
    else:
        return bytes_mutated(content, rng)
    return b"".join(lines)


def npy_mutated(content: bytes, rng: random.Random) -> bytes:
    """Change the text of an array's header, its length kept true; or change bytes."""
    if rng.random() < 0.4:
        return bytes_mutated(content, rng)
    length = struct.unpack_from("<H", content, 8)[0]
    text, body = content[10 : 10 + length], content[10 + length :]
    words = (
        b"-1",
        b"True",
        b"None",
        b"9" * 30,
        b"1.5",
        b"'<f8'",
        b"'|O'",
        b"'V0'",
        b"(2, 3)",
        b"()",
        b"[",
        b"{}",
        b"'",
    )
    part = rng.choice(
        [word for word in (b"'<f4'", b"False", b"8", b"2", b"3", b"(", b")", b",", b"shape") if word in text]
    )
    text = text.replace(part, rng.choice(words), 1)
    return content[:8] + struct.pack("<H", len(text) % 65536) + text + body


def safetensors_mutated(content: bytes, rng: random.Random) -> bytes:
    """Change the JSON of a safetensors header, its length kept true; or change bytes."""
    if rng.random() < 0.3:
        return bytes_mutated(content, rng)
    length = struct.unpack_from("<Q", content)[0]
    text = json_mutated(content[8 : 8 + length], rng)
    return struct.pack("<Q", len(text)) + text + content[8 + length :]


def zip_mutated(members: Sequence[tuple[str, Mutation]], compression: int = zipfile.ZIP_STORED) -> Mutation:
    """Make the mutation of a zip archive: of a member's content, the archive around it whole, or of its bytes.

    Args:
        members: how a name ends, and how to change what ends so; the first that fits.
        compression: how the archive is packed again.
    """

    def mutated(content: bytes, rng: random.Random) -> bytes:
        if rng.random() < 0.3:
            return bytes_mutated(content, rng)
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            files = [(info.filename, archive.read(info)) for info in archive.infolist()]
        at = rng.randrange(len(files))
        if rng.random() < 0.7:  # what holds structure, not numbers
            structured = [i for i, (name, _) in enumerate(files) if name.endswith(tuple(end for end, _ in members))]
            at = rng.choice(structured or [at])
        name, inner = files[at]
        change = next((change for end, change in members if name.endswith(end)), bytes_mutated)
        deed = rng.random()
        if deed < 0.9:
            files[at] = name, change(inner, rng)
        elif deed < 0.93:
            del files[at]
        elif deed < 0.96:
            files[at] = rng.choice(("x", "../x", "a/../b", "", name.upper(), "x\x1b[2J.npy")), inner
        else:
            files[at] = name, files[rng.randrange(len(files))][1]
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w", compression) as archive:
            for key, data in files:
                archive.writestr(zipfile.ZipInfo(key), data, compression)
        return stream.getvalue()

    return mutated
