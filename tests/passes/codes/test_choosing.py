"""Large weights are worked on a few rows at a time: nothing besides is larger than their codes, and nothing differs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from graphopt.passes.codes import choosing, clusters, coded, in_order
from graphopt.passes.codes.choosing import encode
from graphopt.passes.codes.coded import Form
from graphopt.passes.codes.in_order import Inputs
from graphopt.passes.codes.storing import StoredCodes, store
from graphopt.passes.layers.matrix_sites import MatrixSite

ROWS, COLUMNS = 2000, 31


class Largest(TorchDispatchMode):
    """Notes the bytes of the largest tensor that is made."""

    bytes = 0

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        known = {id_of(value) for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)}
        made = [value for value in tree_leaves(result) if isinstance(value, Tensor) and id_of(value) not in known]
        self.bytes = max([self.bytes, *(value.untyped_storage().nbytes() for value in made)])
        return result


def id_of(tensor: Tensor) -> int:
    """Tell whose memory a tensor has."""
    return tensor.untyped_storage().data_ptr()


FORMS = {
    "one table": (Form("kmeans", 16, 1, ROWS), False),
    "large tables, the last of fewer rows": (Form("kmeans", 16, 1, 1500), True),
    "small tables": (Form("kmeans", 4, 1, 9), False),
    "vectors, the last filled up": (Form("kmeans", 8, 2, ROWS), True),
    "ternary": (Form("ternary", 3, 1, ROWS), True),
}


@pytest.mark.parametrize(("form", "known"), FORMS.values(), ids=FORMS)
def test_no_second_copy_of_a_weight_is_made(form: Form, known: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    matrix, x = torch.randn(ROWS, COLUMNS, generator=generator), torch.randn(99, COLUMNS, generator=generator)
    moments = (x.T @ x).double()
    inputs = Inputs(moments.diagonal().float().expand(ROWS, -1), [moments]) if known else None
    for module, name, value in (
        (clusters, "_NUMBERS", 2000),
        (clusters, "_VECTORS_EACH", 100),
        (clusters, "_STEPS", 5),
    ):
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(choosing, "_ELEMENTS", 3000)  # of small tables

    def stored(at_once: int) -> tuple[StoredCodes, int]:
        for module in (coded, in_order):
            monkeypatch.setattr(module, "_AT_ONCE", at_once)
        with Largest() as largest:
            found = encode(matrix, form, inputs, torch.Generator().manual_seed(0))
            result = store(MatrixSite("w", (), (), False), "w", matrix, found, form, weighted=known)
        return result, largest.bytes

    (by_runs, least), (whole, most) = stored(3000), stored(matrix.numel())
    assert least <= matrix.numel() < most
    assert by_runs.record["sqnr"] == pytest.approx(whole.record["sqnr"], rel=1e-9)
    assert all(torch.equal(tensor, whole.tensors[name]) for name, tensor in by_runs.tensors.items())
