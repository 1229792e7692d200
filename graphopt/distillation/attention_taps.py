"""Taps on attention: what a fused operator computes inside, as nodes of a training graph beside it.

    out = sdpa(q, k, v, mask)     ->     out = sdpa(q, k, v, mask)
                                         scores = q @ k.mT * scale + mask;  probabilities = softmax(scores)

The fused call stays, and what was added goes with the tap that reads it. Of attention that is written out in a model
the scores and the probabilities are values like any other.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from graphopt.errors import UsageError
from graphopt.ir.editor import Editor
from graphopt.ir.graph import arguments
from graphopt.ir.operators import ATTENTION

_ATEN = torch.ops.aten


def read_attention(editor: Editor, node: fx.Node, loss: str, address: str) -> fx.Node:
    """Return what a loss of attention compares: of a fused call its scores, its probabilities or its values.

    Use where the insertion point of the editor's graph is behind the call.

    Raises:
        UsageError: the call is of a form that is not opened.
    """
    if node not in ATTENTION:
        return node
    found = arguments(node, ())
    if loss == "value_relations":
        return _value(found["value"])
    if found["enable_gqa"] or found["dropout_p"]:
        what = "shares keys between heads" if found["enable_gqa"] else "drops scores at random"
        raise UsageError(f"The attention at `{address}` {what}, and is not opened for `{loss}`. Tap what it returns.")
    scores = _scores(editor, node, found)
    if loss == "attention_scores":
        return scores
    return editor.call(_ATEN.softmax.int, scores, -1, like=node)


def _scores(editor: Editor, node: fx.Node, found: dict[str, Any]) -> fx.Node:
    query, key, mask = _value(found["query"]), _value(found["key"]), found["attn_mask"]
    width = query.meta["val"].shape[-1]
    scale = width**-0.5 if found["scale"] is None else found["scale"]
    turned = editor.call(_ATEN.transpose.int, key, -2, -1, like=node)
    product = editor.call(_ATEN.matmul.default, query, turned, like=node)
    scores = editor.call(_ATEN.mul.Tensor, product, scale, like=node)
    if found["is_causal"]:
        hidden = editor.call(_ATEN.full_like.default, scores, float("-inf"), like=node)
        later = editor.call(_ATEN.triu.default, hidden, 1, like=node)
        return editor.call(_ATEN.add.Tensor, scores, later, like=node)
    if mask is None:
        return scores
    if mask.meta["val"].dtype is torch.bool:
        unseen = editor.call(_ATEN.logical_not.default, mask, like=node)
        return editor.call(_ATEN.masked_fill.Scalar, scores, unseen, float("-inf"), like=node)
    return editor.call(_ATEN.add.Tensor, scores, mask, like=node)


def _value(argument: Any) -> fx.Node:
    assert isinstance(argument, fx.Node)
    return argument
