"""When a tensor computed ahead of time is worth its bytes in the file.

The rule looks at one tensor alone, so that a second run decides as the first did.
"""

from __future__ import annotations

SMALL = 1 << 20  # bytes that are never too many: masks, position tables, weights of small layers
LARGEST = 16 << 20  # bytes above which a tensor must be no larger than what it replaces
MAY_GROW = 4  # times the bytes it replaces, in between


def too_large(stored: int, replaced: int) -> str:
    """Return why a tensor of `stored` bytes in place of `replaced` is not worth it, "" if it is."""
    if stored <= max(replaced, SMALL) or stored <= min(MAY_GROW * replaced, LARGEST):
        return ""
    return f"it would store {_shown(stored)} in place of {_shown(replaced)}"


def _shown(size: float) -> str:
    for unit in ("bytes", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:.3g} GiB"
