"""Train a small residual CNN on scikit-learn's handwritten digits and save it with its data.

    python tools/train_digits.py OUT    # OUT/model.pt, OUT/calibration.npz, OUT/test.npz

The digits are real data that ship inside scikit-learn: 1,797 images of 8x8 pixels, 16 grey levels. The model is
saved as an exported program, which loads anywhere without trusting a pickle.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

WIDTH = 64  # wide enough that integer kernels have something to win; at 16 the runtime gains nothing
EPOCHS = 12
BATCH = 64
SEED = 0


class Block(nn.Module):
    """conv-bn-relu-conv-bn plus the input, then relu."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (N, width, H, W) to the same shape."""
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(x + self.bn2(self.conv2(y)))


class DigitsNet(nn.Module):
    """A stem, two stages of residual blocks, and a linear classifier of 10 digits."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.stage1 = nn.Sequential(Block(width), Block(width))
        self.down = nn.Sequential(
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(2 * width), nn.ReLU()
        )
        self.stage2 = nn.Sequential(Block(2 * width), Block(2 * width))
        self.hidden = nn.Linear(2 * width, 2 * width)
        self.classifier = nn.Linear(2 * width, 10)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Map images (N, 1, 8, 8) in [0, 1] to logits (N, 10)."""
        y = self.stage2(self.down(self.stage1(self.stem(image))))
        y = torch.relu(self.hidden(y.mean(dim=(2, 3))))
        logits: torch.Tensor = self.classifier(y)
        return logits


def digits() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return train images, test images (N, 1, 8, 8) in [0, 1], train labels, test labels."""
    bunch = load_digits()
    images = (bunch.images / 16).astype(np.float32)[:, None]
    labels = bunch.target.astype(np.int64)
    x, x_test, y, y_test = train_test_split(images, labels, test_size=0.3, random_state=SEED, stratify=labels)
    return x, x_test, y, y_test


def train(x: torch.Tensor, y: torch.Tensor) -> nn.Module:
    """Train with Adam and a one-cycle schedule; images are shifted by up to one pixel."""
    torch.manual_seed(SEED)
    model = DigitsNet()
    steps = EPOCHS * -(-len(x) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
    model.train()
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(x)).split(BATCH):
            shift = tuple(torch.randint(-1, 2, (2,)).tolist())
            loss = nn.functional.cross_entropy(model(torch.roll(x[rows], shift, (2, 3))), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def main(out: Path) -> None:
    """Train, save and say how good the model is."""
    started = time.perf_counter()
    x, x_test, y, y_test = digits()
    model = train(torch.from_numpy(x), torch.from_numpy(y))
    with torch.no_grad():
        accuracy = float((model(torch.from_numpy(x_test)).argmax(1).numpy() == y_test).mean())
    out.mkdir(parents=True, exist_ok=True)
    batch = torch.export.Dim("batch")
    program = torch.export.export(model, (torch.from_numpy(x[:2]),), dynamic_shapes={"image": {0: batch}})
    with (out / "model.pt").open("wb") as stream:
        torch.export.save(program, stream)
    np.savez_compressed(out / "calibration.npz", image=x)
    np.savez_compressed(out / "test.npz", image=x_test, labels=y_test)
    print(
        f"trained in {time.perf_counter() - started:.0f} s, {accuracy:.2%} of {len(x_test)} test digits right: "
        f"{out / 'model.pt'}"
    )
    if accuracy < 0.98:
        sys.exit("The model is below 98 %; something is wrong with this installation.")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "demo"))
