"""Scaled dot-product attention: softmax(q k^T * scale + mask) v over (.., heads, tokens, head_dim)."""

from __future__ import annotations

import math

from graphopt.axes.call import Call
from graphopt.axes.edit import Edit
from graphopt.axes.layout import Dims, product
from graphopt.axes.registry import rule


def keep_scale(edit: Edit) -> None:
    """Freeze the default scale, 1 / sqrt(head_dim), to what it was before head_dim shrank."""
    if edit.arg("scale") is None and edit.changed(edit.note("head_dim")):
        edit.set("scale", 1.0 / math.sqrt(edit.old_size(edit.note("head_dim"))))


@rule("aten::scaled_dot_product_attention", rewrite=keep_scale)
def attention(call: Call) -> Dims:
    query, key, value = call.dims("query"), call.dims("key"), call.dims("value")
    call.unify(query[-1], key[-1])
    call.note("head_dim", query[-1])
    call.sums(query[-1])
    call.unify(key[-2], value[-2])
    call.sums(key[-2])
    batch = _batch(call, query, key, value)
    if call.has("attn_mask"):
        call.broadcast([(*batch, query[-2], key[-2]), call.dims("attn_mask")])
    if call.arg("is_causal"):
        call.freeze((query[-2], key[-2]), "causal order of tokens")
    for layout in batch:
        call.mark(layout, "heads")
    call.mark(query[-1], "head_dim")
    call.mark(value[-1], "head_dim")
    return (*batch, query[-2], value[-1])


def _batch(call: Call, query: Dims, key: Dims, value: Dims) -> Dims:
    if not call.arg("enable_gqa"):
        return call.broadcast([query[:-2], key[:-2], value[:-2]])
    # Query heads h * rep + r attend to key head h.
    call.unify(key[-3], value[-3])
    if not call.same_size(query[-3], key[-3]):
        repeat = call.axis(call.ratio(query[-3], key[-3]))
        call.unify(query[-3], product([key[-3], repeat]))
    else:
        call.unify(query[-3], key[-3])
    return (*call.broadcast([query[:-3], key[:-3], value[:-3]]), query[-3])
