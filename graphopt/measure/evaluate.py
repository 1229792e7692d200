"""How good a model is: labelled data and a metric, or the user's own function, as one callable."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx, nn

from graphopt.capturing.model_calls import in_eval_mode
from graphopt.data.batches import Batch, Labelled, SampleSource, Takes, any_number, batch_count
from graphopt.data.input_spec import Spec
from graphopt.data.samples import Samples
from graphopt.data.split import halves
from graphopt.errors import DataError, foreign_code
from graphopt.ir.contents import as_array
from graphopt.ir.program import Program
from graphopt.ir.torch_internals import output_structure, pytree
from graphopt.loading.functions import is_function_name, resolve_function
from graphopt.measure.metrics import METRICS, Metric, Scoring, find_metric

Model = Callable[..., Any]
Array = NDArray[Any]
Track = Callable[[Iterator[Labelled], str, int | None], Iterator[Labelled]]
DEFAULT_METRIC = "top1"


class Evaluator:
    """Calls a model on labelled data and returns a metric.

    Attributes:
        name: The metric's name, or the function's.
        unit: What a drop is counted in, such as "%".
        batch_size: Samples per call of the model.
    """

    def __init__(
        self, samples: SampleSource, metric: Metric, *, batch_size: int, takes: Takes, limit: int | None, track: Track
    ) -> None:
        """Use `evaluator`."""
        self._samples = samples
        self._metric = metric
        self.batch_size = takes(batch_size)
        self._takes = takes
        self._limit = limit
        self._track = track
        self._calls: int | None = None  # that one evaluation takes, once it is known
        self.name = metric.name
        self.unit = metric.unit

    def halves(self) -> tuple[Evaluator, Evaluator]:
        """Return two evaluators of half of the samples each: one to choose by, and one for reports."""
        batch, takes, limit = self.batch_size, self._takes, self._limit
        limit = None if limit is None else -(-limit // 2)
        one, other = (
            Evaluator(half, self._metric, batch_size=batch, takes=takes, limit=limit, track=self._track)
            for half in halves(self._samples, takes(1))
        )
        return one, other

    def batches(self) -> Iterator[Labelled]:
        """Yield the inputs and labels that models are judged by."""
        return self._samples.labelled_batches(self.batch_size, self._limit)

    def __call__(self, model: Model) -> float:
        """Return the metric of `model`, a callable that takes the inputs' tensors in order."""
        scoring = Scoring(self._metric)
        with _evaluated(model) as judged, torch.no_grad():
            calls = 0
            for inputs, labels in self._track(self.batches(), f"measuring {self.name}", self._calls):
                if labels is None:
                    raise DataError(f"The data for `{self.name}` has no labels (`labels`, `label` or `y`).")
                count = labels.shape[0]
                whole = count if self._takes(count) == count else self.batch_size
                outputs = main_output(judged(*(_padded(inputs, whole) if whole > count else inputs)))
                if outputs.shape[:1] != (whole,):
                    raise DataError(
                        f"The model returned {outputs.shape} for {count} samples; `{self.name}` needs one output "
                        "per sample along the first axis."
                    )
                scoring.add(outputs[:count], as_array(labels))
                calls += 1
        self._calls = calls
        return scoring.score()


class FunctionEvaluator:
    """The user's own function of a model, checked to return a number.

    Attributes:
        name: The function's name.
        unit: Empty; only the user knows.
    """

    def __init__(self, function: Callable[[Model], Any], name: str) -> None:
        """Use `evaluator`."""
        self._function = function
        self.name = name
        self.unit = ""

    def __call__(self, model: Model) -> float:
        """Return what the function says about `model`."""
        failed = foreign_code(lambda said, _: DataError(f"The evaluation function `{self.name}` raised {said}."))
        with failed, _evaluated(model) as judged:
            value = self._function(judged)
        if isinstance(value, torch.Tensor | np.ndarray) and np.prod(value.shape) == 1:
            value = value.item()
        if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
            raise DataError(
                f"The evaluation function `{self.name}` returned a {type(value).__name__}; it must return one number, "
                "higher is better."
            )
        return float(value)


def evaluator(
    spec: Any,
    names: Sequence[str] | None = None,
    *,
    specs: Sequence[Spec] | None = None,
    batch_size: int = 64,
    takes: Takes = any_number,
    limit: int | None = None,
    device: str | torch.device = "cpu",
    track: Track | None = None,
) -> Evaluator | FunctionEvaluator:
    """Return a function from a model to a number, higher is better.

    >>> evaluate = evaluator((torch.eye(3), torch.tensor([0, 1, 1])))
    >>> round(evaluate(lambda x: x), 2)
    66.67

    Args:
        spec: A callable that takes a model and returns a number, as it is; text: `PATH`, `PATH:metric` or
            `package.module:function`; or labelled data: anything `Samples.open` takes, `(inputs, labels)`, or
            `(data, "metric")`, `(inputs, labels, "metric")`.
        names: The model's inputs, in order; None takes the data's own.
        specs: What the model takes; the data is checked against it.
        batch_size: Samples per call of the model, as far as it takes so many.
        takes: How many it takes, see `Program.takes`; the last batch is filled up by repetition.
        limit: Score only this many samples.
        device: Where the model takes its inputs.
        track: Shows how far it has come: called with batches, what is done, and how many batches there are, if known.

    Raises:
        UsageError: An unknown metric or function.
        DataError: The data cannot be read, has no labels, or does not fit.
    """
    if isinstance(spec, str | Path):
        found = _from_text(str(spec))
        if not isinstance(found, tuple):
            return found
        data, metric_name = found
    elif callable(spec) and not isinstance(spec, nn.Module):
        return FunctionEvaluator(spec, getattr(spec, "__name__", type(spec).__name__))
    else:
        data, metric_name = _from_data(spec)
    metric = find_metric(metric_name)
    samples = Samples.open(data, names if specs is None else [one.name for one in specs])
    if specs is not None:
        samples.check(specs)
    if specs is None and names is None and not _labelled(samples) and len(samples.names) > 1:
        # Positional data of a model whose inputs are not known: what comes last is the labels.
        samples = Samples.open(samples, samples.names[:-1])
    if not _labelled(samples):
        raise DataError(
            f"The evaluation data has no labels. Store them as `labels` beside the inputs "
            f"({', '.join(samples.names)}), or give (inputs, labels)."
        )
    track = track or (lambda batches, label, total: batches)
    on = samples.on(torch.device(device))
    return Evaluator(on, metric, batch_size=batch_size, takes=takes, limit=limit, track=track)


@contextlib.contextmanager
def _evaluated(model: Model) -> Iterator[Model]:
    """Give a model in evaluation mode, and leave each part of the user's in the mode it was in."""
    exported = isinstance(model, fx.GraphModule)  # which refuse eval()
    with in_eval_mode(model) if isinstance(model, nn.Module) and not exported else contextlib.nullcontext():
        yield model.evaluated().copy() if isinstance(model, Program) else model  # a function may do as it likes


def as_model(call: Callable[[Batch], Batch], program: Program) -> Model:
    """Let what takes and returns flat tensors be called like the model: same arguments, same output structure."""
    structure = output_structure(program.graph_module)

    def model(*args: Any, **kwargs: Any) -> Any:
        ordered = {name: kwargs[name] for name in program.example_kwargs if name in kwargs}
        leaves = pytree.tree_leaves((args, {**ordered, **kwargs}))
        outputs = call(tuple(leaf for leaf in leaves if isinstance(leaf, torch.Tensor)))
        return pytree.tree_unflatten(list(outputs), structure) if len(outputs) == structure.num_leaves else outputs

    return model


def main_output(outputs: Any) -> Array:
    """Return the output that a metric looks at, as an array.

    `logits` of a dictionary (or of an object that has it), else its first value; the first of a tuple or list.
    """
    while not isinstance(outputs, torch.Tensor | np.ndarray):
        if isinstance(outputs, Mapping) and outputs:
            outputs = outputs["logits"] if "logits" in outputs else next(iter(outputs.values()))
        elif hasattr(outputs, "logits"):
            outputs = outputs.logits
        elif isinstance(outputs, tuple | list) and outputs:
            outputs = outputs[0]
        else:
            raise DataError(f"A metric needs tensors; the model returned a {type(outputs).__name__}.")
    if isinstance(outputs, torch.Tensor):
        outputs = as_array(outputs.float() if outputs.dtype == torch.bfloat16 else outputs)
    array: Array = outputs
    return array


def _labelled(samples: Samples) -> bool:
    return next(samples.labelled_batches(1, 1), (None, None))[1] is not None


def _from_text(text: str) -> FunctionEvaluator | tuple[str, str]:
    path, colon, last = text.rpartition(":")
    if os.path.exists(text) or not colon:  # unlike Path.exists, it takes any text
        return text, DEFAULT_METRIC
    if os.path.exists(path) or last in METRICS:
        return path, find_metric(last).name
    if is_function_name(text):
        return FunctionEvaluator(resolve_function(text, "--eval"), text)
    return text, DEFAULT_METRIC


def _from_data(spec: Any) -> tuple[Any, str]:
    """Split off a metric's name; pairs of inputs and labels become what `Samples.open` takes for one batch."""
    name = DEFAULT_METRIC
    if isinstance(spec, tuple) and spec and isinstance(spec[-1], str):
        spec, name = (spec[:-1] if len(spec) > 2 else spec[0]), spec[-1]
    if isinstance(spec, tuple) and len(spec) == 2 and _is_array(spec[0]) and _is_array(spec[1]):
        spec = ((spec[0],), spec[1])
    return spec, name


def _is_array(value: Any) -> bool:
    return isinstance(value, torch.Tensor | np.ndarray)


def _padded(inputs: Batch, size: int) -> Batch:
    missing = size - batch_count(inputs)
    return tuple(torch.cat([x, x[-1:].expand(missing, *x.shape[1:])]) if missing and x.dim() else x for x in inputs)
