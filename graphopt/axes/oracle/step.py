"""`masked_rule` and `Step`, which are in `graphopt.axes.proof.step`."""

from graphopt.axes.proof.step import MaskedStep as Step
from graphopt.axes.proof.step import masked_rule

__all__ = ["Step", "masked_rule"]
