"""Reading model files that may come from strangers.

`load_model` looks at what a file holds, never at its ending, and hands back a module or an exported program.
Nothing in the file runs before the file has been checked; `trust=True` skips the checks.
"""

from graphopt.loading.model_file import ExampleInputs, LoadedModel, load_model

__all__ = ["ExampleInputs", "LoadedModel", "load_model"]
