"""Models that quantizers are compared on, with data: trained ones from `--data DIR`, the others with random weights.

Random weights get BatchNorm statistics of three forward passes. Nothing is downloaded; timm, transformers and
facenet-pytorch are asked for where a model is theirs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import zoo_own
from cifar10 import images, trained_resnet
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention
from zoo_subject import without_torchvision_operators
from zoo_transformers import CAUSAL, FirstTensor, make

_TESTED = 16  # samples of random models that outputs are compared on
_WORDS = 8192
_SMALL = {  # transformers of the zoo
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 1024,
    "vocab_size": _WORDS,
}


@dataclass(frozen=True)
class Subject:
    """A model, what quantizers see of its inputs, and what they are judged by; labels where it is trained."""

    model: nn.Module
    calibration: tuple[Tensor, ...]
    test: tuple[Tensor, ...]
    labels: Tensor | None = None


Build = Callable[[int], Subject]  # takes the number of calibration samples


class Encoder(nn.Module):
    """BERT's layout: embeddings, post-norm attention and feed-forward, pooled classes."""

    def __init__(self, vocabulary: int = _WORDS, width: int = 384, layers: int = 4, classes: int = 6) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(vocabulary, width), nn.Embedding(512, width)
        self.norm = nn.LayerNorm(width)
        self.layers = nn.ModuleList(EncoderLayer(width, 6, 4 * width) for _ in range(layers))
        self.pool, self.classes = nn.Linear(width, width), nn.Linear(width, classes)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Map ids and mask (batch, tokens) to logits (batch, classes)."""
        x = self.norm(self.words(ids) + self.places(torch.arange(ids.shape[1])))
        bias = (1.0 - mask[:, None, None, :].float()) * -1e4
        for layer in self.layers:
            x = layer(x, bias)
        return self.classes(torch.tanh(self.pool(x[:, 0])))


class EncoderLayer(nn.Module):
    """Self-attention and feed-forward, each followed by a LayerNorm over the sum with its input."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out, self.norm = nn.Linear(width, width), nn.LayerNorm(width)
        self.up, self.down, self.last = nn.Linear(width, hidden), nn.Linear(hidden, width), nn.LayerNorm(width)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """Map (batch, tokens, width) to the same shape."""
        b, t, c = x.shape
        q, k, v = (f(x).view(b, t, self.heads, -1).transpose(1, 2) for f in (self.query, self.key, self.value))
        y = scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).reshape(b, t, c)
        x = self.norm(x + self.out(y))
        return self.last(x + self.down(gelu(self.up(x))))


class Tagger(nn.Module):
    """Embedding, recurrent layers, a product for each token."""

    def __init__(self, cell: type[nn.LSTM] | type[nn.GRU], width: int = 256, tags: int = 32) -> None:
        super().__init__()
        self.words = nn.Embedding(_WORDS, width)
        self.layers = cell(width, width, 2, batch_first=True)
        self.tags = nn.Linear(width, tags)

    def forward(self, ids: Tensor) -> Tensor:
        """Map ids (batch, tokens) to (batch, tokens, tags)."""
        tags: Tensor = self.tags(self.layers(self.words(ids))[0])
        return tags


def named(data: Path | None) -> dict[str, Build]:
    """Return the models that are reported one by one; the ResNets of CIFAR-10 need `data`."""
    vision = {
        name: _vision("torchvision", name)
        for name in ("resnet18", "resnet50", "mobilenet_v2", "efficientnet_b0", "mobilenet_v3_large", "convnext_tiny")
    }
    bert = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
    return {
        **({f"cifar_resnet{depth}": _trained(data, depth) for depth in (20, 56)} if data is not None else {}),
        **vision,
        "bert_base": _text("BertConfig", "BertForSequenceClassification", {**bert, "vocab_size": 30522}, tokens=128),
        "vit_b_16": _vision("torchvision", "vit_b_16"),
        "lstm_tagger": _tokens(lambda: Tagger(nn.LSTM)),
        **{name: _detector(name, size) for name, size in (("PNet", 128), ("RNet", 24), ("ONet", 48))},
    }


def zoo() -> dict[str, Build]:
    """Return forty architectures."""
    return {
        **{name: _vision("torchvision", name) for name in _TORCHVISION},
        **{name: _vision("timm", name, size) for name, size in _TIMM.items()},
        **{name: _text(*names, {**_SMALL, **options}) for name, (names, options) in _TRANSFORMERS.items()},
        "own_encoder": _tokens(Encoder, masked=True),
        "gru_tagger": _tokens(lambda: Tagger(nn.GRU)),
        "unet": _module(lambda: zoo_own.UNet(32), (3, 128, 128)),
        "yolo_c2f": _module(zoo_own.Detector, (3, 256, 256)),
        "super_resolution": _module(zoo_own.SuperResolution, (3, 96, 96)),
    }


_TORCHVISION = (
    "alexnet", "densenet121", "efficientnet_v2_s", "googlenet", "inception_v3", "mnasnet1_0", "mobilenet_v3_small",
    "regnet_x_800mf", "regnet_y_400mf", "resnext50_32x4d", "shufflenet_v2_x1_0", "squeezenet1_1", "swin_t", "vgg11_bn",
)  # fmt: skip
_TIMM = {
    "cspdarknet53": 224, "deit_tiny_patch16_224": 224, "edgenext_xx_small": 224, "efficientformer_l1": 224,
    "fastvit_t8": 224, "ghostnet_100": 224, "hrnet_w18_small": 224, "lcnet_100": 224, "mixer_s32_224": 224,
    "mobilenetv4_conv_small": 224, "mobilevit_xxs": 224, "poolformer_s12": 224, "repvit_m0_9": 224, "rexnet_100": 224,
}  # fmt: skip
_TRANSFORMERS: dict[str, tuple[tuple[str, str], dict[str, Any]]] = {
    "albert": (("AlbertConfig", "AlbertForSequenceClassification"), {"embedding_size": 128}),
    "distilbert": (
        ("DistilBertConfig", "DistilBertForSequenceClassification"),
        {"dim": 256, "n_layers": 4, "n_heads": 4, "hidden_dim": 1024},
    ),
    "electra": (("ElectraConfig", "ElectraForSequenceClassification"), {"embedding_size": 128}),
    "gpt2": (("GPT2Config", "GPT2LMHeadModel"), {"n_embd": 256, "n_layer": 4, "n_head": 4, **CAUSAL}),
    "llama": (("LlamaConfig", "LlamaForCausalLM"), {"num_key_value_heads": 2, **CAUSAL}),
    "mpnet": (("MPNetConfig", "MPNetForSequenceClassification"), {}),
    "roberta": (("RobertaConfig", "RobertaForSequenceClassification"), {}),
}


def _trained(data: Path, depth: int) -> Build:
    def build(samples: int) -> Subject:
        calibration, _ = images(data, "cifar10_train_5k")
        test, labels = images(data, "cifar10_test")
        return Subject(trained_resnet(data, depth), (calibration[:samples],), (test,), labels)

    return build


def _vision(library: str, name: str, size: int = 0) -> Build:
    def model() -> nn.Module:
        without_torchvision_operators()
        if library == "timm":
            import timm

            made: nn.Module = timm.create_model(name, pretrained=False)
            return made
        from torchvision import models  # type: ignore[import-untyped]

        options = {"init_weights": True} if name in ("googlenet", "inception_v3") else {}
        found: nn.Module = models.get_model(name, weights=None, **options)
        return found

    size = size or (299 if name == "inception_v3" else 224)
    return _module(model, (3, size, size))


def _detector(name: str, size: int) -> Build:
    def model() -> nn.Module:
        without_torchvision_operators()
        from facenet_pytorch.models import mtcnn

        made: nn.Module = getattr(mtcnn, name)()
        return made

    return _module(model, (3, size, size), settle=False)


def _module(make_model: Callable[[], nn.Module], shape: tuple[int, ...], *, settle: bool = True) -> Build:
    """Build a model of images, with statistics of random ones."""

    def build(samples: int) -> Subject:
        torch.manual_seed(0)
        model = _settled(make_model(), shape) if settle else make_model()
        return Subject(model.eval(), (torch.randn(samples, *shape),), (torch.randn(_TESTED, *shape),))

    return build


def _settled(model: nn.Module, shape: tuple[int, ...]) -> nn.Module:
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.momentum = None  # average over all passes
    for module in model.modules():
        if isinstance(module, nn.Linear) and not bool(module.weight.any()):
            nn.init.normal_(module.weight, std=0.02)  # a head that starts at zero
    if norms:
        model.train()
        with torch.no_grad():
            for _ in range(3):
                model(torch.randn(4, *shape))
    return model


def _text(config: str, kind: str, options: dict[str, Any], tokens: int = 64) -> Build:
    def model() -> nn.Module:
        return FirstTensor(make(config, options, kind), ("input_ids", "attention_mask"))

    return _tokens(model, tokens, options["vocab_size"], masked=True)


def _tokens(
    make_model: Callable[[], nn.Module], length: int = 64, words: int = _WORDS, *, masked: bool = False
) -> Build:
    """Build a model of token ids, and of a mask."""

    def build(samples: int) -> Subject:
        torch.manual_seed(0)
        model = make_model().eval()

        def drawn(count: int) -> tuple[Tensor, ...]:
            ids = torch.randint(3, words, (count, length))
            return (ids, torch.ones_like(ids)) if masked else (ids,)

        return Subject(model, drawn(samples), drawn(_TESTED))

    return build
