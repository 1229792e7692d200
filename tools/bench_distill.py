"""What a teacher is worth: ResNet-56 teaches a MobileNet of an eighth of its FLOPs, from scratch, on CIFAR-10.

    python tools/bench_distill.py --data DIR [--epochs 15] [--images 5120] [--seeds 0 1 2] [--rows labels distilled]
                                  [--results FILE.json]

One row for each way to learn: labels alone, soft labels and labels (T=4, alpha 0.7), and with them the ends of stages,
attention maps and relations of samples. Prints top-1 on the 10,000 test images, which are scored once, after training,
how often student and teacher agree on them, and seconds. Rows that FILE.json holds are not run again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from cifar10 import images, top1, trained_resnet, training_images
from torch import nn

import graphopt
from graphopt.measure.cost import cost

_SOFT = {"temperature": 4.0, "alpha": 0.7, "features": "none"}
_ROWS: dict[str, dict[str, Any]] = {
    "labels": {"alpha": 0.0, "features": "none"},
    "distilled": _SOFT,
    "unlabelled": {**_SOFT, "alpha": 1.0},
    "features": {**_SOFT, "features": "stages", "feature_loss": "values"},
    "attention": {**_SOFT, "features": "stages", "feature_loss": "attention"},
    "similarity": {**_SOFT, "features": "stages", "feature_loss": "similarity"},
    "dist": {**_SOFT, "outputs": [{"student": "output", "loss": "dist"}]},
}


class InvertedResidual(nn.Module):
    """1x1 convolution that widens, 3x3 depthwise, 1x1 that narrows (Sandler et al. 2018, section 3.3)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        wide = 4 * inputs
        self.adds = stride == 1 and inputs == outputs
        self.layers = nn.Sequential(
            *(nn.Conv2d(inputs, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.ReLU6()),
            *(nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False), nn.BatchNorm2d(wide), nn.ReLU6()),
            *(nn.Conv2d(wide, outputs, 1, bias=False), nn.BatchNorm2d(outputs)),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (batch, inputs, h, w) to (batch, outputs, h / stride, w / stride)."""
        return x + self.layers(x) if self.adds else self.layers(x)


class SmallMobileNet(nn.Module):
    """MobileNetV2 for 32x32 images: stages of 16x16, 8x8 and 4x4."""

    def __init__(self) -> None:
        super().__init__()
        widths = [(24, 32, 1), (32, 32, 1), (32, 64, 2), (64, 64, 1), (64, 64, 1), (64, 96, 2), (96, 96, 1)]
        self.stem = nn.Sequential(nn.Conv2d(3, 24, 3, 2, 1, bias=False), nn.BatchNorm2d(24), nn.ReLU6())
        self.blocks = nn.Sequential(*(InvertedResidual(*width) for width in widths))
        self.head = nn.Sequential(nn.Conv2d(96, 256, 1, bias=False), nn.BatchNorm2d(256), nn.ReLU6())
        self.linear = nn.Linear(256, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map images (batch, 3, 32, 32) to logits (batch, 10)."""
        return self.linear(self.head(self.blocks(self.stem(x))).mean((2, 3)))


def main() -> None:
    """Run the benchmark and print its table."""
    options = _arguments()
    torch.set_num_threads(options.threads)
    pictures, labels = images(options.data, "cifar10_test")
    training, answers = training_images(options.data, options.images)
    teacher = graphopt.capture(trained_resnet(options.data, 56), (training[:2],))
    student = graphopt.capture(SmallMobileNet(), (training[:2],))
    ratio = cost(student).flops / cost(teacher).flops
    print(f"student: {cost(student).parameters:,} parameters, {ratio:.3f} of the teacher's FLOPs")
    with torch.no_grad():
        said = torch.cat([teacher(part).argmax(1) for part in pictures.split(500)])
    print(f"teacher: {100 * float((said == labels).float().mean()):.2f} % top-1")
    found = json.loads(options.results.read_text()) if options.results and options.results.exists() else {}
    for row in options.rows:
        scores = []
        for seed in options.seeds:
            key = f"{row}, {options.images} images, {options.epochs} epochs, seed {seed}"
            if key not in found:
                plan = {"epochs": options.epochs, **_ROWS[row], **options.plan}
                found[key] = _run(plan, teacher, (training, answers), (pictures, labels, said), seed, options.device)
                if options.results:
                    options.results.write_text(json.dumps(found, indent=1))
            _print(key, **found[key])
            scores.append(found[key]["top1"])
        print(f"{row:55s} mean {statistics.mean(scores):6.2f}  spread {max(scores) - min(scores):.2f}", flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="directory with CIFAR-10 and the trained ResNets")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument(
        "--images", type=int, default=50000, help="of the training set; up to 5120 come from a small file"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--rows", nargs="+", choices=_ROWS, default=["labels", "distilled"])
    parser.add_argument("--plan", type=json.loads, default={}, help='further fields of the plan, {"lr": 0.01}')
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default=None)
    parser.add_argument("--results", type=Path, default=None)
    return parser.parse_args()


def _run(
    plan: dict[str, Any],
    teacher: graphopt.Program,
    training: tuple[torch.Tensor, torch.Tensor],
    test: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    seed: int,
    device: str | None,
) -> dict[str, float]:
    torch.manual_seed(seed)
    start = time.perf_counter()
    result = graphopt.distill(
        SmallMobileNet(),
        teacher,
        training[0],
        plan,
        labels=training[1],
        target=None,
        bench=False,
        seed=seed,
        device=device,
    )
    seconds = time.perf_counter() - start
    print(f"  held-out losses: {result.distillation['held_out_losses']}")
    pictures, labels, said = test
    agreement = top1(result.program, pictures, said)
    return {"top1": top1(result.program, pictures, labels), "agreement": agreement, "seconds": seconds}


def _print(key: str, *, top1: float, agreement: float, seconds: float) -> None:
    print(f"{key:55s} top-1 {top1:6.2f}  agreement {agreement:6.2f}  {seconds:6.0f} s", flush=True)


if __name__ == "__main__":
    main()
