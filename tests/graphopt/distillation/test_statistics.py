"""BatchNorm re-estimation: the exact mean and variance of everything seen, not an average of batches."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from graphopt.capturing.capture import capture
from graphopt.distillation.statistics import batch_norms, estimate_statistics
from graphopt.testing import fingerprint


class Norms(nn.Module):
    """One norm on its own, one shared by two values, one without statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.shared, self.free = nn.BatchNorm2d(3), nn.BatchNorm2d(4, track_running_stats=False)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        twice = self.shared(x) + self.shared(2 * x + 1)
        return self.free(self.norm(self.conv(self.drop(x)))).mean((1, 2, 3)) + twice.mean((1, 2, 3))


def test_statistics_are_those_of_all_samples_in_float64() -> None:
    torch.manual_seed(0)
    model = Norms().double()
    program = capture(model, torch.randn(2, 3, 6, 6, dtype=torch.float64))
    before = fingerprint(program)
    samples = torch.randn(23, 3, 6, 6, dtype=torch.float64) * 3 + torch.arange(23).view(-1, 1, 1, 1)
    found = estimate_statistics(program, [(part,) for part in samples.split([10, 10, 3])])
    with torch.no_grad():
        values = model.conv(samples).transpose(0, 1).flatten(1)
    both = torch.cat([samples, 2 * samples + 1]).transpose(0, 1).flatten(1)
    torch.testing.assert_close(found["norm.running_mean"], values.mean(1), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found["norm.running_var"], values.var(1), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found["shared.running_mean"], both.mean(1), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found["shared.running_var"], both.var(1), rtol=1e-12, atol=1e-12)
    assert sorted(found) == ["norm.running_mean", "norm.running_var", "shared.running_mean", "shared.running_var"]
    assert fingerprint(program) == before


def test_later_norms_see_what_earlier_ones_normalise_now() -> None:
    torch.manual_seed(0)
    program = capture(nn.Sequential(nn.BatchNorm1d(2), nn.ReLU(), nn.BatchNorm1d(2)), torch.randn(4, 2))
    samples = torch.randn(4096, 2) * 5 + 7  # far from the stored mean 0 and variance 1
    found = estimate_statistics(program, [(samples,)])
    normal = (samples - samples.mean(0)) / samples.var(0, correction=0).add(1e-5).sqrt()
    torch.testing.assert_close(found["2.running_mean"], normal.relu().mean(0), rtol=1e-4, atol=1e-5)


def test_keyword_inputs_and_precision() -> None:
    class Keyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(2)

        def forward(self, x: Tensor, *, scale: Tensor) -> Tensor:
            return self.norm(x * scale)

    program = capture(Keyword().half(), (torch.randn(4, 2).half(),), {"scale": torch.ones(4, 1).half()})
    assert len(batch_norms(program)) == 1
    found = estimate_statistics(program, [(torch.ones(6, 2).half(), torch.full((6, 1), 3.0).half())])
    assert found["norm.running_mean"].dtype == torch.float16
    torch.testing.assert_close(found["norm.running_mean"], torch.full((2,), 3.0).half())
