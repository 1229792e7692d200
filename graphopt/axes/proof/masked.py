"""Masked equivalence: the proof that removing channels removed nothing else.

A pruned program is right if it equals the original in which the removed positions are masked: the removed slices of
every consuming weight are zero, and every reduction over a removed dimension is taken over the survivors. It is
checked in float64 with all parameters and statistics drawn at random, at every value of the graph:

    original --- removed positions masked --- live elements ---+
                                                                +--- equal to 1e-6 of the largest
    pruned, its tensors cut from the same random ones ---------+

The only thing taken from the pruning is which indices of which parameter are kept. Which positions of every other
value are gone follows from those, operator by operator (`graphopt.axes.proof`).
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from graphopt.axes.proof.randomise import randomise
from graphopt.axes.proof.run import KeptByName, MaskedRun, PlainRun, branching_depth, names
from graphopt.axes.proof.value import Value, compact, known_or_counted
from graphopt.errors import VerifyError
from graphopt.ir.finite import computable
from graphopt.ir.graph import tensor_attribute
from graphopt.ir.provenance import user_line
from graphopt.ir.regions import graph_modules
from graphopt.ir.torch_internals import flat_arguments, pytree

logger = logging.getLogger(__name__)

# Of the largest element of a value. Float64 rounding over a thousand operators stays under 1e-10; one channel taken
# for another shows at 1e-2 and more with parameters of scale 1.
TOLERANCE = 1e-6
_DEFAULT_SEED = 0


@dataclass(slots=True)
class _Findings:
    """What the comparison has seen so far."""

    error: float = 0.0
    compared: int = 0
    # The first value that is smaller in the pruned program than its surviving elements. That is no mistake where
    # nothing was known to be removed (zeros, an expanded mask, repeated heads); what it leads to is compared below.
    other_shape: str = ""


def masked_outputs(gm: fx.GraphModule, removed: KeptByName, inputs: Sequence[Any]) -> tuple[Tensor, ...]:
    """Run a program in float64 with removed positions masked; return its flat tensor outputs.

    Of branches (`torch.cond`) the first is taken, whatever the data say.

    Args:
        gm: the original program's graph module.
        removed: for each parameter or buffer by name, for each dimension, the sorted indices that are kept.
        inputs: flat inputs, one for each placeholder.

    Raises:
        VerifyError: an output has removed positions.
        CannotProveError: an operator takes removed positions and has no rule that says what masking means.
    """
    run = MaskedRun(gm, removed, inputs, _Reader(gm), [0] * branching_depth(gm))
    with torch.no_grad():
        outputs = next(value for _, node, value in run if node.op == "output")
    return tuple(_whole_output(leaf) for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Value))


def check_masked_equivalence(
    original: fx.GraphModule,
    pruned: fx.GraphModule,
    kept: KeptByName,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    *,
    generator: torch.Generator | None = None,
) -> float:
    """Prove in float64, all parameters drawn at random, that `pruned` is `original` with removed positions masked.

    Args:
        original: the program before the removal.
        pruned: the program after it; nodes keep their names.
        kept: for each parameter or buffer that was cut, for each dimension, the sorted kept indices.
        args: example inputs; floating-point ones are used in double precision.
        kwargs: example keyword inputs.
        generator: for the random parameters; a fixed seed if not given.

    Returns:
        The largest error of any value of the graph, relative to the value's largest element.

    Raises:
        VerifyError: a tensor of `pruned` is not cut from that of `original`, or a value differs; the message names
            the first such node.
        CannotProveError: an operator takes removed positions and has no rule that says what masking means.
    """
    if generator is None:
        generator = torch.Generator().manual_seed(_DEFAULT_SEED)
    _check_kinds(original, pruned, kept)
    random = randomise(original, generator)
    inputs = _flat_inputs(random, args, kwargs or {})
    findings = _Findings()
    both = frozenset(names(original)), frozenset(names(pruned))
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)  # what tensor factories without a dtype make
    try:
        # Every branch is proved, whichever the data would take.
        for branches in itertools.product((0, 1), repeat=branching_depth(original)):
            left = MaskedRun(random, kept, _copies(inputs), _Reader(random), branches)
            right = PlainRun(pruned, _copies(inputs), _Reader(random, kept), branches)
            with torch.no_grad():
                _compare_runs(left, right, *both, findings)
    finally:
        torch.set_default_dtype(default)
    logger.debug("masked equivalence: %d values compared, largest error %.2g", findings.compared, findings.error)
    return findings.error


def check_slices(original: fx.GraphModule, pruned: fx.GraphModule, kept: KeptByName) -> None:
    """Check that every tensor of `pruned` is the kept part of that of `original`, bit for bit.

    Raises:
        VerifyError: a tensor is missing in `original`, has another shape or dtype, or other elements.
    """
    _check_kinds(original, pruned, kept)
    for name in _tensor_names(pruned):
        found = tensor_attribute(pruned, name).detach()
        expected = _cut(tensor_attribute(original, name).detach(), kept.get(name, {}))
        if not torch.equal(computable(found), computable(expected)) and not _same_with_nan(found, expected):
            raise VerifyError(f"`{name}` ({_kind(found)}) does not hold the kept elements of the original in order.")


def _check_kinds(original: fx.GraphModule, pruned: fx.GraphModule, kept: KeptByName) -> None:
    """Check names, shapes and dtypes; the elements may have been refitted since the removal."""
    known = frozenset(_tensor_names(original))
    for name in _tensor_names(pruned):
        if name not in known:
            raise VerifyError(f"The pruned program reads `{name}`, which the original does not have.")
        found, whole = tensor_attribute(pruned, name), tensor_attribute(original, name)
        shape = tuple(len(kept.get(name, {}).get(dim, range(size))) for dim, size in enumerate(whole.shape))
        if tuple(found.shape) != shape or found.dtype != whole.dtype:
            raise VerifyError(
                f"`{name}` is {_kind(found)} in the pruned program; what is kept of the original's {_kind(whole)} is "
                f"{shape}."
            )


def _compare_runs(
    left: MaskedRun, right: PlainRun, original: frozenset[str], pruned: frozenset[str], findings: _Findings
) -> None:
    """Step through both programs side by side; nodes that only one of them has are run but not compared.

    Args:
        left: the original program.
        right: the pruned one.
        original: the names of all nodes of the former.
        pruned: those of the latter.
        findings: what has been seen so far, brought up to date.
    """
    steps = iter(right)
    for name, node, value in left:
        if name not in pruned:
            continue
        for twin, _, found in steps:
            if twin == name:
                _compare(node, value, found, findings)
                break
            if twin in original:
                raise VerifyError(
                    f"The pruned program runs `{twin}` before `{name}`, unlike the original: a removal keeps names and "
                    "order of nodes, so this is a bug in the rewriting."
                )


def _compare(node: fx.Node, value: Any, found: Any, findings: _Findings) -> None:
    expected = pytree.tree_leaves(value)
    leaves = pytree.tree_leaves(found)
    if node.op == "output":
        for leaf in expected:
            if isinstance(leaf, Value):
                _check_informative(_whole_output(leaf))
    if len(expected) != len(leaves):
        raise VerifyError(f"{_where(node)} returns {len(leaves)} values, the original {len(expected)}.")
    for want, got in zip(expected, leaves, strict=True):
        if isinstance(want, Value) and isinstance(got, Tensor):
            _adopt_size(want, got)
            _compare_tensors(node, compact(want.tensor, known_or_counted(want)), got, findings)


def _adopt_size(value: Value, found: Tensor) -> None:
    """Let a dimension along which all elements are equal be as short as in the pruned program.

    Zeros made anew, or one element expanded, do not say of which axis they are; what they are combined with does. A
    sum or a softmax over them needs no more than their number.

    Flags that are there and leave as many positions stay: values that happen to be equal, like the rows of a mask,
    must not put others in their place. Flags that leave another number were guessed wrongly before a reshape.
    """
    tensor = value.tensor
    if tensor.dim() != found.dim():
        return
    counted = dict(value.counted)
    for d, (was, now) in enumerate(zip(tensor.shape, found.shape, strict=True)):
        if value.dead[d] is not None or (d in counted and int((~counted[d]).sum()) == now):
            continue
        counted.pop(d, None)
        if 0 < now < was and bool((tensor == tensor.narrow(d, 0, 1)).all()):
            counted[d] = torch.arange(was) >= now
    value.counted = counted


def _compare_tensors(node: fx.Node, want: Tensor, got: Tensor, findings: _Findings) -> None:
    if want.shape != got.shape:
        text = f"{_where(node)} is {tuple(got.shape)}, the survivors of the original are {tuple(want.shape)}"
        # Positions that were removed from what it is computed of cannot have stayed in it.
        grown = want.dim() != got.dim() or any(g > w for w, g in zip(want.shape, got.shape, strict=True))
        if grown or node.op == "output":
            raise VerifyError(f"Masked equivalence fails: {text}.{_hint(findings, text)}")
        findings.other_shape = findings.other_shape or text
        return
    error = _relative_error(want, got)
    findings.compared += 1
    if not error <= TOLERANCE:
        raise VerifyError(
            f"Masked equivalence fails: {_where(node)} differs from the masked original by {error:.2g} of its largest "
            f"element (shape {tuple(got.shape)}; allowed {TOLERANCE:g}).{_hint(findings)} The removal did not do to "
            "this operator what it did to its inputs: keep this group whole and report it."
        )
    findings.error = max(findings.error, error)


def _hint(findings: _Findings, told: str = "") -> str:
    earlier = findings.other_shape
    return f" It may have begun where {earlier}." if earlier and earlier != told else ""


def _relative_error(want: Tensor, got: Tensor) -> float:
    """Return max |want - got| / max |want|; 1 or more where what is not a finite number differs."""
    if not want.numel():
        return 0.0
    if not (want.is_floating_point() or want.is_complex()):
        return 0.0 if torch.equal(want, got) else 1.0
    want, got = computable(want), computable(got)
    finite = torch.isfinite(want)
    if not bool(finite.all()):
        if not _same_with_nan(want.masked_fill(finite, 0), got.masked_fill(finite, 0)):
            return float("inf")
        want, got = want[finite], got[finite]
        if not want.numel():
            return 0.0
    scale = float(want.abs().max())
    difference = float((want - got).abs().max())
    return difference / scale if scale > 0 else difference


def _same_with_nan(a: Tensor, b: Tensor) -> bool:
    a, b = computable(a), computable(b)
    return a.shape == b.shape and bool(torch.isclose(a, b, rtol=0, atol=0, equal_nan=True).all())


def _whole_output(value: Value) -> Tensor:
    if value.masked:
        dims = [dim for dim, flags in enumerate(value.dead) if flags is not None]
        raise VerifyError(
            f"An output of shape {tuple(value.tensor.shape)} loses positions of its dimensions {dims}. Outputs must "
            "keep their shapes: what they are made of is to be left whole."
        )
    return value.tensor


def _check_informative(output: Tensor) -> None:
    """Refuse outputs that say nothing. Rows that are NaN as a whole, in both, take nothing from what others say.

    Raises:
        VerifyError: no value is finite, or NaN lies among the values of a row.
    """
    output = computable(output)
    if not output.is_floating_point() or not output.numel():
        return
    nan = output.isnan()
    rows = nan.any(-1) if nan.dim() else nan
    mixed = bool((nan != rows[..., None]).any()) if nan.dim() else False
    if mixed or not bool(output.isfinite().any()):
        raise VerifyError(
            f"With random parameters an output of shape {tuple(output.shape)} is not a number, so comparing it proves "
            "nothing. Try another seed; if it stays so, the model takes roots or logarithms of what may be negative, "
            "or a softmax over what is masked as a whole in every sample."
        )


class _Reader:
    """Reads tensors of the randomised original, cut to what is kept where asked to."""

    def __init__(self, gm: fx.GraphModule, kept: KeptByName | None = None) -> None:
        self._gm = gm
        self._kept = kept or {}
        self._own: dict[str, Tensor] = {}
        # A program that writes to its buffers must not change those of the other run.
        self._mutates = any(_is_mutable(node) for module in graph_modules(gm) for node in module.graph.nodes)

    def attribute(self, name: str) -> Any:
        """Return what the graph module holds under a qualified name: a tensor or the body of a region."""
        value: Any = self._gm
        for part in name.split("."):
            value = getattr(value, part)
        return value

    def __call__(self, name: str) -> Any:
        value = self.attribute(name)
        if not isinstance(value, Tensor):
            return value
        if not self._mutates:
            return _cut(value, self._kept.get(name, {}))
        if name not in self._own:
            self._own[name] = _cut(value, self._kept.get(name, {})).clone()
        return self._own[name]


def _is_mutable(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and bool(schema.is_mutable)


def _cut(tensor: Tensor, kept: Mapping[int, Sequence[int]]) -> Tensor:
    for dim, indices in kept.items():
        tensor = tensor.index_select(dim, torch.as_tensor(list(indices), dtype=torch.long))
    return tensor


def _tensor_names(gm: fx.GraphModule) -> list[str]:
    names = dict.fromkeys(str(node.target) for node in gm.graph.nodes if node.op == "get_attr")
    reader = _Reader(gm)
    return [name for name in names if isinstance(reader.attribute(name), Tensor)]


def _flat_inputs(gm: fx.GraphModule, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """Arrange inputs as the placeholders stand."""
    leaves = flat_arguments(gm, tuple(args), dict(kwargs))
    count = sum(node.op == "placeholder" for node in gm.graph.nodes)
    if len(leaves) != count:
        raise VerifyError(f"The program has {count} inputs, {len(leaves)} examples were given.")
    return leaves


def _copies(inputs: Sequence[Any]) -> list[Any]:
    return [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in inputs]


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def _where(node: fx.Node) -> str:
    if node.op == "output":
        return "an output"
    place = user_line(node)
    return f"node `{node.name}` ({node.target}{', ' + place if place else ''})"
