"""What is not typical of samples is said before passes fit them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from graphopt.capturing.capture import capture
from graphopt.ir.program import Program
from graphopt.job.job import Job
from graphopt.job.sample_notes import sample_notes
from graphopt.pipeline.pipeline import Pipeline
from graphopt.testing import TensorSamples


class Net(nn.Module):
    """Two BatchNorms in a row, the first trained on values around 0."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.first, self.second = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        for norm in (self.first, self.second):
            norm.momentum = None  # the average of all that it sees

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(self.conv(x))))


def pictures(count: int = 24, seed: int = 1) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def program() -> Program:
    torch.manual_seed(0)
    model = Net()
    with torch.no_grad():
        model(pictures(64, seed=0))
    return capture(model.eval(), (pictures(2),))


def notes(program: Program, *data: Tensor) -> list[str]:
    return sample_notes(program, TensorSamples(data))


def test_nothing_is_said_of_what_is_like_training(program: Program) -> None:
    assert notes(program, pictures()) == []


@pytest.mark.parametrize("factor", [0.2, 64.0])
def test_another_scale_than_the_first_batch_norm_saw(program: Program, factor: float) -> None:
    """The second sees what the first makes of it, and is not blamed as well."""
    (note,) = notes(program, pictures() * factor)
    assert note.startswith(f"the values that BatchNorm `first` gets deviate {factor:.2g} times as much as in training")
    assert f"`x` holds {float((pictures() * factor).min()):.3g} to " in note


def test_another_mean(program: Program) -> None:
    (note,) = notes(program, pictures() + 20)
    assert "deviations off (medians of channels)" in note


def test_few_samples_may_be_unlike_the_rest(program: Program) -> None:
    assert notes(program, pictures(7) * 64) == []


def test_statistics_that_were_never_trained_are_no_measure() -> None:
    fresh = capture(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).eval(), (pictures(2),))
    assert notes(fresh, pictures() * 64) == []
    (note,) = notes(fresh, torch.full((24, 3, 8, 8), 0.5))
    assert note == (
        "`input` is 0.5 everywhere in the first samples, and what is measured on them holds for that alone. Give "
        "typical inputs."
    )


def test_the_report_says_it_where_a_pass_fits_data(program: Program) -> None:
    job = Job.open(program, pictures() * 64, target=None, cache=False)
    said = {passes: job.run(Pipeline.parse(passes)).report.notes for passes in ("svd", "fold")}
    about = {passes: [note for note in notes if "gets deviate" in note] for passes, notes in said.items()}
    assert about["svd"][0].startswith("data: the values that BatchNorm `first`")
    assert about["fold"] == []


def test_samples_that_the_original_gives_no_numbers_for_are_counted() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)).eval()
    with torch.no_grad():
        model[1].weight[0, 0], model[1].weight[0, 1:], model[0].bias[0] = 3e38, 0, 0
        model[0].weight[0] = torch.tensor([9.0, 0, 0, 0])
    x = torch.zeros(40, 4)
    x[::2, 0] = 1.0
    job = Job.open(model, x, target=None)
    (note,) = [note for note in job.run(Pipeline.parse("")).report.notes if "infinite" in note]
    bad, of = int((~model(job._probe.batch[0]).isfinite()).any(1).sum()), len(job._probe.batch[0])
    assert note == f"data: outputs of the original are NaN or infinite for {bad} of {of} samples"
