"""Signal-to-noise ratios."""

from __future__ import annotations

import math


def decibels(signal: float, noise: float) -> float:
    """Return the power of a signal over that of noise, in dB: infinite where there is no noise, or nothing else."""
    if not noise:
        return math.inf
    return 10 * (math.log10(signal) - math.log10(noise)) if signal else -math.inf
