"""What the kernel says of the processor."""

from __future__ import annotations

from pathlib import Path

X86 = ("x86_64", "AMD64")  # as `platform.machine` says it


def said_of_processor(*names: str) -> list[str]:
    """Return what stands under names, as "flags", once for processors that are alike; nothing where it is not Linux."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []
    pairs = (line.partition(":") for line in lines)
    return sorted({value.strip() for name, _, value in pairs if name.strip() in names})
