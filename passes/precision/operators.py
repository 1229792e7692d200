"""Which operators compute in 16 bits, which stay in float32, and why.

    seeking     their operands are converted for them: most of the time and of the bytes is theirs
    following   they run in the type of what they are given
    kept        they compute in float32: what they sum up, or raise to a power, needs its digits or its range

What is in none of the lists is kept, too.
"""

from __future__ import annotations

from torch import fx

from graphopt.ir.operators import (
    ACTIVATIONS,
    ADAPTIVE_AVERAGE_POOLS,
    ALL_CONVOLUTIONS,
    ATTENTION,
    DIVISIONS,
    DROPOUTS,
    EMBEDDINGS,
    LOG_SOFTMAXES,
    MAX_POOLS,
    MOVES,
    MULTIPLICATIONS,
    NORMALISATIONS,
    PRODUCTS,
    RECURRENT,
    SOFTMAXES,
    SUMS,
    UPSAMPLES,
    Family,
    plain_name,
)

SEEKING = PRODUCTS | ALL_CONVOLUTIONS | ATTENTION | RECURRENT | EMBEDDINGS

_CHOICES = Family("where", "masked_fill", "maximum", "minimum", "cat", "stack", "pad", "neg", "abs")
CLAMPS = Family("clamp", "clamp_min", "clamp_max")
# What they give is as far from 0 as what they are given: a number out of range stays one.
PASSING = MOVES | SUMS | MULTIPLICATIONS | DIVISIONS | _CHOICES

_PICKS = Family(
    *("index", "index_select", "gather", "take_along_dim", "amax", "amin", "max", "min", "argmax", "argmin", "topk"),
    *("sort", "argsort", "tril", "triu", "scatter", "index_put", "slice_scatter", "select_scatter", "masked_select"),
    *("gt", "ge", "lt", "le", "eq", "ne", "sign", "zeros_like", "ones_like", "full_like", "unfold", "im2col", "glu"),
    *("prelu", "avg_pool1d", "avg_pool2d", "rsub"),  # 3-d average pools have no kernel of half in torch (2.13)
)
_EXPONENTIAL = Family("softplus", "log_sigmoid", "mish", "elu", "selu", "celu")
FOLLOWING = PASSING | ACTIVATIONS | CLAMPS | MAX_POOLS | UPSAMPLES | DROPOUTS | _PICKS

_KEPT = (
    (SOFTMAXES | LOG_SOFTMAXES | Family("logsumexp", "logcumsumexp"), "it sums exponentials"),
    (NORMALISATIONS, "it sums squares"),
    (Family("linalg_vector_norm", "norm", "cdist", "pdist", "dist", "var", "var_mean", "std"), "it sums squares"),
    (ADAPTIVE_AVERAGE_POOLS | Family("sum", "mean", "nansum", "cumsum", "cumprod", "prod"), "it sums many values"),
    (
        _EXPONENTIAL | Family("exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "pow", "square", "sqrt"),
        "it leaves the range of 16 bits soon",
    ),
    (Family("rsqrt", "reciprocal", "sinh", "cosh", "tan", "erfinv"), "it leaves the range of 16 bits soon"),
    (Family("sin", "cos"), "its argument needs the digits of float32"),
    (
        Family(
            *("cross_entropy_loss", "nll_loss", "nll_loss_nd", "nll_loss2d", "mse_loss", "l1_loss", "smooth_l1_loss"),
            *("huber_loss", "kl_div", "binary_cross_entropy", "binary_cross_entropy_with_logits", "ctc_loss"),
        ),
        "it is a loss",
    ),
)


def why_kept(node: fx.Node) -> str:
    """Return why an operator computes in float32 whatever it is given; "" for those that need not."""
    reason = next((reason for family, reason in _KEPT if node in family), "")
    if reason or node in SEEKING or node in FOLLOWING:
        return reason
    return f"no rule says that `{plain_name(node)}` computes right in 16 bits"
