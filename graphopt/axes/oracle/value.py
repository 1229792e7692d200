"""`Value`, which is in `graphopt.axes.proof.value`."""

from graphopt.axes.proof.value import Value

__all__ = ["Value"]
