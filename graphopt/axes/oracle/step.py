"""`masked_rule` and `Step`, which are in `graphopt.axes.proof.step`."""

from graphopt.axes.proof.step import Step, masked_rule

__all__ = ["Step", "masked_rule"]
