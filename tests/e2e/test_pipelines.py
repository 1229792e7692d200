"""`prune,svd,int8` from module to artifact on the families people deploy, small."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from torch import nn

import graphopt


class Encoder(nn.Module):
    """A BERT-like encoder: embeddings, a layer of attention with a padding mask, a pooled classifier."""

    def __init__(self, width: int = 64, heads: int = 4, layers: int = 1) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(100, width), nn.Embedding(32, width)
        self.norm = nn.LayerNorm(width)
        layer = nn.TransformerEncoderLayer(width, heads, 4 * width, batch_first=True, activation="gelu")
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.classifier = nn.Linear(width, 5)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Map token ids and a mask of real tokens, both (N, T), to logits (N, 5)."""
        places = torch.arange(ids.shape[1], device=ids.device)
        x = self.norm(self.tokens(ids) + self.positions(places))
        x = self.layers(x, src_key_padding_mask=~mask)
        logits: torch.Tensor = self.classifier(x[:, 0])
        return logits


class Patches(nn.Module):
    """A ViT: patches by a strided convolution, a class token, an encoder layer."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 8, stride=8)
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.positions = nn.Parameter(torch.randn(1, 17, width) * 0.1)
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, batch_first=True, activation="gelu", norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head = nn.Linear(width, 10)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Map images (N, 3, 32, 32) to logits (N, 10)."""
        x = self.patches(image).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.positions
        logits: torch.Tensor = self.head(self.layers(x)[:, 0])
        return logits


class Cnn(nn.Module):
    """A residual CNN: stem, one block, a strided convolution, a pooled classifier."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.inner, self.inner_norm = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.outer, self.down = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, 2 * width, 3, 2, 1)
        self.hidden, self.head = nn.Linear(2 * width, 2 * width), nn.Linear(2 * width, 10)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Map images (N, 3, H, W) to logits (N, 10)."""
        x = torch.relu(self.norm(self.stem(image)))
        x = torch.relu(x + self.outer(torch.relu(self.inner_norm(self.inner(x)))))
        x = torch.relu(self.down(x)).mean((2, 3))
        logits: torch.Tensor = self.head(torch.relu(self.hidden(x)))
        return logits


def _cnn() -> nn.Module:
    model = Cnn()
    model(torch.randn(16, 3, 32, 32))  # statistics that are not 0 and 1
    return model


def _case(name: str) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    if name == "encoder":
        ids = torch.randint(0, 100, (32, 12))
        return Encoder().eval(), {"ids": ids, "mask": torch.arange(12) < torch.randint(4, 13, (32, 1))}
    image = torch.randn(32, 3, 32, 32)
    return (Patches().eval(), {"image": image}) if name == "vit" else (_cnn().eval(), {"image": image})


@functools.cache
def _captured(name: str) -> graphopt.Program:
    model, data = _case(name)
    return graphopt.capture(model, tuple(value[:4] for value in data.values()))


@pytest.mark.parametrize("name", ["cnn", "vit", "encoder"])
def test_prune_svd_int8_to_both_targets(name: str) -> None:
    _, data = _case(name)
    job = graphopt.Job.open(_captured(name), data, target=["onnxruntime", "tensorrt"])
    pipeline = graphopt.Pipeline.parse("prune:ratio=0.25:round_to=4,svd:ratio=0.3,int8")
    result = job.deliver(job.run(pipeline, check="full" if name == "cnn" else "fast"), bench=False, sizes=True)
    before, after = result.report.original, result.report.artifact_rows()
    assert [row.target for row in after] == ["onnxruntime", "tensorrt"]
    assert all(row.size is not None and before.size is not None and row.size < 0.6 * before.size for row in after)
    assert result.report.rows[1].cost.parameters < before.cost.parameters  # type: ignore[union-attr]
    session, program = result.artifact.session(), result.programs["onnxruntime"]
    for batch in (1, 3, 8):  # what the artifact computes is what the program computes
        arrays = [value[:batch].numpy() for value in data.values()]
        (found,) = session(*arrays)
        (wanted,) = program.call_flat(tuple(value[:batch] for value in data.values()))
        assert found.shape == (batch, *wanted.shape[1:])
        error = np.abs(found - wanted.detach().numpy()).max() / wanted.abs().max().item()
        assert error < 0.05  # steps of 1/255 may flip at every layer; segment by segment they are checked when lowering


@pytest.mark.parametrize("name", ["cnn", "vit", "encoder"])
def test_an_optimised_program_still_trains(name: str) -> None:
    _, data = _case(name)
    result = graphopt.optimize(_captured(name), data, "prune:ratio=0.25:round_to=4", None)
    student = result.program.copy(share_tensors=False).train()
    target = torch.zeros(32, dtype=torch.int64)
    optimizer = torch.optim.Adam(student.parameters(), lr=1e-3)
    losses = []
    for _ in range(8):
        loss = nn.functional.cross_entropy(student(*data.values()), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]
