"""Every public class of torch.nn, with its options, through capture: the program computes what the module does."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.errors import CaptureError

Case = tuple[Callable[[], nn.Module], tuple[Any, ...]]


def _x(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def _classes(*shape: int, count: int = 5) -> Tensor:
    return torch.randint(0, count, shape, generator=torch.Generator().manual_seed(0))


VECTOR, SIGNAL, IMAGE, VOLUME = _x(3, 8), _x(3, 4, 12), _x(3, 4, 8, 8), _x(3, 4, 6, 6, 6)
BY_RANK = {1: SIGNAL, 2: IMAGE, 3: VOLUME}

_POINTWISE = """
    CELU Dropout ELU GELU Hardshrink Hardsigmoid Hardswish Hardtanh Identity LeakyReLU LogSigmoid Mish PReLU RReLU ReLU
    ReLU6 SELU SiLU Sigmoid Softmax LogSoftmax Softmin Softplus Softshrink Softsign Tanh Tanhshrink AlphaDropout
    FeatureAlphaDropout GLU Flatten
"""
_BY_DIMENSIONS = {
    "AdaptiveAvgPool": [(2,)], "AdaptiveMaxPool": [(2,)], "AvgPool": [(2,)], "MaxPool": [(2,)], "Conv": [(4, 6, 3)],
    "ConvTranspose": [(4, 6, 3)], "BatchNorm": [(4,)], "InstanceNorm": [(4,)], "Dropout": [()], "ConstantPad": [(1, 2)],
    "ReflectionPad": [(1,)], "ReplicationPad": [(1,)], "ZeroPad": [(1,)], "CircularPad": [(1,)], "LPPool": [(2, 2)],
}  # fmt: skip


def _attention(**options: Any) -> Callable[[], nn.Module]:
    return lambda: nn.MultiheadAttention(8, 2, batch_first=True, **options)


def _encoder(nested: bool = True, layers: int = 1, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, **options)
        return nn.TransformerEncoder(layer, layers, enable_nested_tensor=nested)

    return build


MASK = torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [False] * 4 + [True]])  # of keys: (batch, length)
CAUSAL = torch.triu(torch.ones(5, 5, dtype=torch.bool), 1)
SEQUENCE = _x(3, 5, 8)
_SCORES, _LABELS = _x(6, 5), _classes(6)
_SIGNS = _LABELS.remainder(2) * 2.0 - 1

_LENGTHS = torch.full((3,), 12), torch.full((3,), 4)

CASES: dict[str, list[Case]] = {
    "AdaptiveLogSoftmaxWithLoss": [(lambda: nn.AdaptiveLogSoftmaxWithLoss(8, 10, [4]), (_x(6, 8), _classes(6)))],
    "BCELoss": [(nn.BCELoss, (_SCORES.sigmoid(), _SCORES.sigmoid()))],
    "BCEWithLogitsLoss": [(nn.BCEWithLogitsLoss, (_SCORES, _SCORES.sigmoid()))],
    "Bilinear": [(lambda: nn.Bilinear(8, 8, 4), (VECTOR, VECTOR))],
    "CTCLoss": [(nn.CTCLoss, (_x(12, 3, 5).log_softmax(-1), _classes(3, 4) + 1, *_LENGTHS))],
    "ChannelShuffle": [(lambda: nn.ChannelShuffle(2), (IMAGE,))],
    "CosineEmbeddingLoss": [(nn.CosineEmbeddingLoss, (_SCORES, _SCORES + 1, _SIGNS))],
    "CosineSimilarity": [(nn.CosineSimilarity, (_SCORES, _SCORES + 1))],
    "CrossEntropyLoss": [(lambda r=r: nn.CrossEntropyLoss(reduction=r), (_SCORES, _LABELS)) for r in ("mean", "none")],
    "Embedding": [(lambda: nn.Embedding(5, 4, padding_idx=0), (_classes(3, 4),))],
    "EmbeddingBag": [(lambda m=m: nn.EmbeddingBag(5, 4, mode=m), (_classes(3, 4),)) for m in ("sum", "mean", "max")],
    "Fold": [(lambda: nn.Fold((4, 4), 2), (_x(3, 8, 9),))],
    "FractionalMaxPool2d": [(lambda: nn.FractionalMaxPool2d(2, 5), (IMAGE,))],
    "FractionalMaxPool3d": [(lambda: nn.FractionalMaxPool3d(2, 4), (VOLUME,))],
    "GaussianNLLLoss": [(nn.GaussianNLLLoss, (_SCORES, _SCORES + 1, _SCORES.exp()))],
    "GroupNorm": [(lambda: nn.GroupNorm(2, 4), (IMAGE,))],
    "HingeEmbeddingLoss": [(nn.HingeEmbeddingLoss, (_SCORES, _SIGNS[:, None].expand(6, 5)))],
    "KLDivLoss": [(lambda: nn.KLDivLoss(reduction="batchmean"), (_SCORES.log_softmax(1), _SCORES.softmax(1)))],
    "LayerNorm": [(lambda: nn.LayerNorm(8), (VECTOR,))],
    "Linear": [(lambda b=b: nn.Linear(8, 4, bias=b), (VECTOR,)) for b in (True, False)],
    "LocalResponseNorm": [(lambda: nn.LocalResponseNorm(2), (IMAGE,))],
    "MarginRankingLoss": [(nn.MarginRankingLoss, (_SCORES[:, 0], _SCORES[:, 1], _SIGNS))],
    "MaxUnpool1d": [(lambda: nn.MaxUnpool1d(2), nn.functional.max_pool1d(SIGNAL, 2, return_indices=True))],
    "MaxUnpool2d": [(lambda: nn.MaxUnpool2d(2), nn.functional.max_pool2d(IMAGE, 2, return_indices=True))],
    "MaxUnpool3d": [(lambda: nn.MaxUnpool3d(2), nn.functional.max_pool3d(VOLUME, 2, return_indices=True))],
    "MultiLabelMarginLoss": [(nn.MultiLabelMarginLoss, (_SCORES, _classes(6, 5)))],
    "MultiLabelSoftMarginLoss": [(nn.MultiLabelSoftMarginLoss, (_SCORES, _SCORES.sigmoid().round()))],
    "MultiMarginLoss": [(nn.MultiMarginLoss, (_SCORES, _LABELS))],
    "MultiheadAttention": [
        (_attention(**options), (SEQUENCE, SEQUENCE, SEQUENCE, *mask))
        for options in ({}, {"bias": False}, {"add_bias_kv": True}, {"add_zero_attn": True}, {"dropout": 0.1})
        for mask in ((), (MASK,), (MASK, False), (None, False, CAUSAL))
    ],
    "NLLLoss": [(nn.NLLLoss, (_SCORES.log_softmax(1), _LABELS))],
    "NLLLoss2d": [(nn.NLLLoss2d, (_x(2, 5, 3, 3).log_softmax(1), _classes(2, 3, 3)))],
    "PairwiseDistance": [(nn.PairwiseDistance, (_SCORES, _SCORES + 1))],
    "PixelShuffle": [(lambda: nn.PixelShuffle(2), (IMAGE,))],
    "PixelUnshuffle": [(lambda: nn.PixelUnshuffle(2), (IMAGE,))],
    "PoissonNLLLoss": [(nn.PoissonNLLLoss, (_SCORES, _SCORES.exp()))],
    "RMSNorm": [(lambda: nn.RMSNorm(8), (VECTOR,))],
    "SoftMarginLoss": [(nn.SoftMarginLoss, (_SCORES, _SIGNS[:, None].expand(6, 5)))],
    "Softmax2d": [(nn.Softmax2d, (IMAGE,))],
    "SyncBatchNorm": [(lambda: nn.SyncBatchNorm(4), (IMAGE,))],
    "Threshold": [(lambda: nn.Threshold(0.1, 2.0), (VECTOR,))],
    "Transformer": [
        (lambda: nn.Transformer(8, 2, 1, 1, 16, batch_first=True), (SEQUENCE, SEQUENCE, None, None, None, *masks))
        for masks in ((), (MASK,), (MASK, MASK, MASK))
    ],
    "TransformerDecoder": [
        (lambda: nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2, 16, batch_first=True), 2), (SEQUENCE,) * 2),
    ],
    "TransformerDecoderLayer": [
        (lambda f=f: nn.TransformerDecoderLayer(8, 2, 16, batch_first=True, norm_first=f), (SEQUENCE, SEQUENCE))
        for f in (True, False)
    ],
    "TransformerEncoder": [
        (_encoder(nested, **options), (SEQUENCE, *mask))
        for nested in (True, False)
        for options in ({"layers": 2}, {"norm_first": True}, {"activation": "gelu"}, {"bias": False})
        for mask in ((), (None, MASK), (CAUSAL,))
        if not (nested and options.get("norm_first"))
    ],
    "TransformerEncoderLayer": [
        (lambda f=f: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=f), (SEQUENCE, *mask))
        for f in (True, False)
        for mask in ((), (None, MASK), (CAUSAL,))
    ],
    "TripletMarginLoss": [(nn.TripletMarginLoss, (_SCORES, _SCORES + 1, _SCORES - 1))],
    "TripletMarginWithDistanceLoss": [(nn.TripletMarginWithDistanceLoss, (_SCORES, _SCORES + 1, _SCORES - 1))],
    "Unflatten": [(lambda: nn.Unflatten(1, (2, 4)), (VECTOR,))],
    "Unfold": [(lambda: nn.Unfold(2), (IMAGE,))],
    "Upsample": [(lambda m=m: nn.Upsample(None, 2, m), (IMAGE,)) for m in ("nearest", "bilinear", "bicubic")],
    "UpsamplingBilinear2d": [(lambda: nn.UpsamplingBilinear2d(scale_factor=2), (IMAGE,))],
    "UpsamplingNearest2d": [(lambda: nn.UpsamplingNearest2d(scale_factor=2), (IMAGE,))],
}  # fmt: skip
CASES |= {name: [(getattr(nn, name), (VECTOR,))] for name in _POINTWISE.split()}
CASES |= {
    name: [(getattr(nn, name), (_SCORES, _SCORES + 1))] for name in ("HuberLoss", "L1Loss", "MSELoss", "SmoothL1Loss")
}
for stem, given in _BY_DIMENSIONS.items():
    for rank, value in BY_RANK.items():
        if hasattr(nn, f"{stem}{rank}d"):
            kind = getattr(nn, f"{stem}{rank}d")
            CASES[f"{stem}{rank}d"] = [(lambda kind=kind, a=a: kind(*a), (value,)) for a in given]
for stem in ("LSTM", "GRU", "RNN"):
    kind, cell = getattr(nn, stem), getattr(nn, f"{stem}Cell")
    CASES[stem] = [
        (lambda kind=kind, b=b, n=n: kind(8, 6, n, batch_first=True, bidirectional=b), (SEQUENCE,))
        for b, n in ((True, 2), (False, 1))
    ]
    CASES[f"{stem}Cell"] = [(lambda cell=cell: cell(8, 6), (VECTOR,))]
# containers compute nothing, bases are abstract, lazy classes become others at their first call
_NONE = {"Container", "Module", "ModuleDict", "ModuleList", "ParameterDict", "ParameterList", "Sequential", "Buffer"}
_NONE |= {"CrossMapLRN2d", "RNNBase", "RNNCellBase"}
_NONE |= {"DataParallel"}  # a way to run another module
if hasattr(nn, "LinearCrossEntropyLoss"):  # since torch 2.13
    CASES["LinearCrossEntropyLoss"] = [(lambda: nn.LinearCrossEntropyLoss(8, 5), (_x(6, 8), _LABELS))]
BRANCHES = "branches on the values of a tensor"
REFUSED = {
    "AdaptiveLogSoftmaxWithLoss": BRANCHES,  # on which clusters are empty
    "CTCLoss": "could not trace the model",  # its result has a size that depends on data
    "FractionalMaxPool2d": "draws random numbers",
    "FractionalMaxPool3d": "draws random numbers",
    "GaussianNLLLoss": BRANCHES,  # on whether a variance is negative
}


def test_every_public_class_has_a_case() -> None:
    public = {
        name
        for name, kind in vars(nn).items()
        if inspect.isclass(kind) and issubclass(kind, nn.Module) and not name.startswith("Lazy")
    }
    assert public - _NONE == CASES.keys()


class SideBySide(nn.Module):
    """Modules of the same inputs, captured at once: tracing is what takes time."""

    def __init__(self, modules: list[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(modules)

    def forward(self, *args: Any) -> tuple[Any, ...]:
        return tuple(part(*args) for part in self.parts)


def _refusal(name: str, args: tuple[Any, ...]) -> str | None:
    looks = name == "TransformerEncoder" and len(args) > 1 and args[1] is CAUSAL  # whether its mask is the causal one
    return BRANCHES if looks else REFUSED.get(name)


def _groups() -> list[list[tuple[str, int]]]:
    """Group the cases that can be captured by the inputs they share."""
    found: dict[object, list[tuple[str, int]]] = {}
    for name in sorted(CASES):
        for number, (_, args) in enumerate(CASES[name]):
            if _refusal(name, args) is None:
                found.setdefault(tuple(map(id, args)), []).append((name, number))
    return list(found.values())


@pytest.mark.parametrize("cases", _groups(), ids=lambda cases: f"{cases[0][0]}-{len(cases)}")
def test_stock_modules_are_captured_as_they_compute(cases: list[tuple[str, int]]) -> None:
    torch.manual_seed(0)
    model = SideBySide([CASES[name][number][0]() for name, number in cases]).eval()
    args = CASES[cases[0][0]][cases[0][1]][1]
    program = graphopt.capture(model, args)
    # with gradients on, modules take the path that is defined by their layers, none fused for inference
    for case, found, wanted in zip(cases, program(*args), model(*args), strict=True):
        torch.testing.assert_close(found, wanted, msg=lambda text, case=case: f"{case}: {text}")


@pytest.mark.parametrize(
    ("name", "number"),
    [(name, i) for name in sorted(CASES) for i, (_, args) in enumerate(CASES[name]) if _refusal(name, args)],
)
def test_what_cannot_be_captured_says_why(name: str, number: int) -> None:
    build, args = CASES[name][number]
    with pytest.raises(CaptureError, match=_refusal(name, args)):
        graphopt.capture(build().eval(), args)


def test_the_fast_path_is_switched_on_again_for_the_caller() -> None:
    model = _encoder()().eval()
    assert torch.backends.mha.get_fastpath_enabled()
    result = graphopt.optimize(graphopt.capture(model, (SEQUENCE, None, MASK)), passes="", bench=False)
    assert torch.backends.mha.get_fastpath_enabled()
    with torch.no_grad():
        fast = model(SEQUENCE, None, MASK)
    kept = ~MASK
    torch.testing.assert_close(result.program(SEQUENCE, None, MASK)[kept], fast[kept])
