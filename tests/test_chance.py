"""What a model that knows nothing would score, and what follows for metrics and losses of any scale."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from autocompress.chance import chance_accuracy, loss_unit
from autocompress.front import Base, ParetoFront, format_accuracy, skill
from autocompress.space import SearchSpace
from autocompress.task import Calibration, Task
from autocompress.trial.workshop import Workshop, calibration_batches
from tests.conftest import small_digits

SPACE = SearchSpace.parse("layers: {'*': {weights: [float32, int4]}}\nmodel: {rate_penalty: [0, 0.25]}", "here")


def regression(scale: float = 1.0, shift: float = 0.0) -> Task:
    """y is `scale` times a linear function, whose weights are the model's, and `shift`."""
    torch.manual_seed(0)
    model, inputs = nn.Linear(6, 2), torch.randn(256, 6)
    with torch.no_grad():
        model.weight.mul_(scale)
        model.bias.mul_(scale).add_(shift)
        target = model(inputs) + 0.1 * scale * torch.randn(256, 2)
    batches = [*zip(inputs.split(128), target.split(128), strict=True)]
    loss = nn.functional.mse_loss

    def metric(output: Tensor, target: Tensor) -> float:
        return -loss(output, target).item()

    return Task(model, batches, batches, batches, loss, metric, epochs=2)


def calibrated(task: Task) -> Calibration:
    return calibration_batches(task, torch.device("cpu"))


@pytest.mark.parametrize(
    ("targets", "samples"), [((), 192), ((1,), 192), ((63,), 192), ((128,), 48), ((1024,), 8), ((64, 64), 8)]
)
def test_samples_of_many_targets_count_more(targets: tuple[int, ...], samples: int) -> None:
    batches = [(torch.randn(8, 3), torch.randint(10, (8, *targets))) for _ in range(40)]
    task = Task(nn.Linear(3, 10), batches, batches, batches)
    assert sum(len(x) for x, _ in calibrated(task).batches) == samples


def test_chance_of_ten_classes() -> None:
    task = small_digits()
    calibration = calibrated(task)
    assert 0.05 < chance_accuracy(calibration, task.build()) < 0.2
    assert loss_unit(calibration, task.build()) == 1, "nats already"


def test_cross_entropies_of_any_unit_are_in_nats() -> None:
    def smoothed(output: Tensor, target: Tensor) -> Tensor:
        return nn.functional.cross_entropy(output, target, label_smoothing=0.2)

    def summed(output: Tensor, target: Tensor) -> Tensor:
        return nn.functional.cross_entropy(output, target, reduction="sum")

    def of_probabilities(output: Tensor, target: Tensor) -> Tensor:
        return 100 * nn.functional.nll_loss(output.log(), target)

    task = small_digits()
    samples = len(calibrated(task).run(task.build())[1])
    assert loss_unit(calibrated(replace(task, loss=smoothed)), task.build()) == 1
    assert loss_unit(calibrated(replace(task, loss=summed)), task.build()) == pytest.approx(samples)
    task.model, task.loss = nn.Sequential(task.build(), nn.Softmax(1)), of_probabilities
    assert loss_unit(calibrated(task), task.build()) == pytest.approx(100)


def test_chance_of_a_squared_error_is_the_variance_wherever_the_mean_is() -> None:
    for shift in (0.0, 1000.0):
        task = regression(10.0, shift)
        target = torch.cat([batch[1] for batch in task.val])
        variance = float(target.var(0, correction=0).mean())
        assert chance_accuracy(calibrated(task), task.build()) == pytest.approx(-variance, rel=0.05)
        assert loss_unit(calibrated(task), task.build()) == pytest.approx(variance, rel=0.2)


def test_outputs_without_a_mean_are_measured_by_what_the_model_has_and_loses() -> None:
    def forward(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[object, Tensor]:
        class Answer:
            scores = model(batch[0])

        return Answer(), batch[1]

    task = regression()
    task = replace(
        task,
        forward=forward,
        loss=lambda output, target: (output.scores - target).square().mean(),
        metric=lambda output, target: -float((output.scores - target).square().mean()),
    )
    calibration, model = calibrated(task), task.build()
    assert loss_unit(calibration, model) == pytest.approx(calibration.loss(model).item())
    base = Base(100, -0.25, -0.25, chance_accuracy(calibration, model))
    assert base.skill == pytest.approx(0.25), "the size of the accuracy itself, where chance is no worse"


def test_a_metric_and_a_loss_that_cannot_do_with_one_output_for_all() -> None:
    def varied(output: Tensor, target: Tensor) -> Tensor:
        if float(output.std(0).max()) == 0:
            raise ValueError("constant")
        return (output - target).square().mean()

    task = replace(regression(), loss=varied, metric=lambda output, target: -float(varied(output, target)))
    assert chance_accuracy(calibrated(task), task.build()) == 0
    assert loss_unit(calibrated(task), task.build()) == 1


def test_a_trial_trains_alike_whatever_the_unit_of_the_target(tmp_path: Path) -> None:
    sizes, lost = [], []
    for scale in (2.0**-8, 1.0, 2.0**8):
        task = regression(scale)
        workshop = Workshop.on(task, SPACE, tmp_path / str(scale))
        chosen = {d.key: d.choices[-1] for d in workshop.space}
        result = workshop.finish(0, workshop.space.recipe(chosen))
        sizes.append(result.size_bytes)
        lost.append(result.val_accuracy / scale**2)
    assert max(sizes) <= min(sizes) + 8
    assert max(lost) - min(lost) < 0.3 * abs(lost[1])


def test_skill() -> None:
    assert skill(0.9, 0.1) == pytest.approx(0.8)
    assert skill(-0.01, -0.2) == pytest.approx(0.19)
    assert skill(-0.5, 0.0) == 0.5
    assert skill(0.0, 0.0) == 1


def test_accuracies_are_shown_with_four_digits() -> None:
    shown = [format_accuracy(value) for value in (0.985, 1, 0, -0.011624, 0.0035851, -3.5852e-6, -3585.2)]
    assert shown == ["0.9850", "1.0000", "0.0000", "-0.01162", "0.003585", "-3.585e-06", "-3585.2000"]


def test_a_front_of_errors_is_told_as_it_is(tmp_path: Path) -> None:
    front = ParetoFront("errors", "default", 0, Base(9000, -0.0036, -0.004, -1.0), (), tmp_path)
    assert "-0.003600" in repr(front)
    assert not front.base.in_shares
    assert Base(9000, 0.98, 0.97, 0.1).in_shares


class Loses(nn.Module):
    """Gives its own loss, as models that are trained to restore what was hidden do."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.inner, self.scale = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 6)), scale

    def forward(self, x: Tensor) -> Tensor:
        loss: Tensor = self.scale * (self.inner(x) - x).square().mean()
        return loss


def test_models_that_give_their_loss_are_measured_by_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    batches = [torch.randn(128, 6) for _ in range(2)]
    distances = []
    for scale in (1e-3, 1.0):
        torch.manual_seed(0)
        task = Task(
            Loses(scale),
            batches,
            batches,
            batches,
            loss=lambda output, _: output,
            metric=lambda output, _: -output.item(),
            forward=lambda model, x: (model(x), None),
        )
        workshop = Workshop(task, task.build(), SPACE, tmp_path, 0)
        rounded = task.build()
        with torch.no_grad():
            rounded.inner[0].weight.zero_()
            own, lost = (
                workshop.original(batches[0]),
                [sum(m(x) for x in batches) for m in (workshop.original, rounded)],
            )
        assert workshop.prober.distance(workshop.original) == 0
        distances.append(workshop.prober.distance(rounded))
        assert distances[-1] == pytest.approx(float((lost[1] - lost[0]) / 2 / own), rel=1e-3)
    assert distances[0] == pytest.approx(distances[1], rel=1e-3)
