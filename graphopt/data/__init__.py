"""Calibration and evaluation data, from arrays, batches or files, checked against a model's inputs."""

from graphopt.data.input_spec import InputSpec, parse_input_spec
from graphopt.data.samples import Samples

__all__ = ["InputSpec", "Samples", "parse_input_spec"]
