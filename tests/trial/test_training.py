"""Fine-tuning, the rate model and one whole trial on the default task."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import isotonic_regression
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from autocompress.artifact import load, pack
from autocompress.divergence import class_dimension, divergence
from autocompress.errors import TaskError
from autocompress.files import CHECKPOINT, METRICS
from autocompress.recipe import Recipe
from autocompress.space import BoundSpace, SearchSpace
from autocompress.task import Task, measure
from autocompress.techniques.base import IntegerCoding
from autocompress.trial.compression import Candidate
from autocompress.trial.rate import RateModel
from autocompress.trial.training import fine_tune
from autocompress.trial.workshop import Rung, TrialResult, TrialSpec, Workshop
from tests.conftest import small_digits, workshop_of, zoo_task


def candidate_of(task: Task, choices: dict[str, str | int | float]) -> Candidate:
    workshop = workshop_of(task)
    return Candidate(workshop.original, workshop.anatomy, Recipe.of(choices), workshop.calibration)


def test_fine_tuning_repairs_what_compression_broke() -> None:
    task = small_digits()
    candidate = candidate_of(task, {f"{layer}:weights": "int2" for layer in "135"})
    candidate.materialise()
    before = measure(task, candidate.model, "val")
    assert [*fine_tune(task, candidate, task.build(), 4)] == [1, 2, 3, 4]
    assert measure(task, candidate.model, "val") > before + 0.05
    assert len(candidate.model[1].weight.unique()) <= 4


def test_the_masks_and_codes_hold_after_fine_tuning() -> None:
    task = zoo_task("mlp", epochs=2)
    candidate = candidate_of(task, {"1:sparsity": 0.8, "1:weights": "int4", "3:sparsity": 0.5})
    for _ in fine_tune(task, candidate, task.build(), 2):
        pass
    first, second = candidate.model[1].weight, candidate.model[3].weight
    assert (first == 0).float().mean() >= 0.8 - 1 / first.numel()
    assert (second == 0).float().mean() == pytest.approx(0.5, abs=0.01)
    assert len(first.unique()) <= 16


def test_a_model_that_was_not_written_to_be_trained_is_refused() -> None:
    task = zoo_task("mlp", epochs=1)
    candidate = candidate_of(task, {"1:weights": "int4"})
    candidate.model.forward = torch.no_grad()(candidate.model.forward)
    with pytest.raises(TaskError, match=r"the loss has no gradient: .* must do without torch\.no_grad"):
        next(fine_tune(task, candidate, task.build(), 1))


def noisy(model: nn.Module, batch: Any) -> tuple[Any, Any]:
    """As models of diffusion are trained and judged: on noise, which each run draws anew."""
    images, _ = batch
    noise = torch.randn_like(images)
    return model(images + noise), noise


def test_candidates_are_compared_with_the_original_on_the_same_noise() -> None:
    task = zoo_task("mlp", epochs=4)
    task.forward, task.loss, task.metric = noisy, lambda output, noise: 0 * output.sum(), lambda y, t: t.sum().item()
    workshop = Workshop(task, task.build(), BoundSpace(()), Path(), 0)
    candidate = Candidate(workshop.original, workshop.anatomy, Recipe(), workshop.calibration)
    assert workshop.prober.distance(candidate.model) == 0
    (*_,) = fine_tune(task, candidate, workshop.original, 4)  # nothing but the distance has a gradient
    assert workshop.prober.distance(candidate.model) < 2e-3
    assert measure(task, candidate.model, "val") == measure(task, workshop.original, "val")


class Words(nn.Module):
    """Its table has sparse gradients, and its body is run again for its gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 16, sparse=True)
        self.body, self.head = nn.Sequential(nn.Linear(16, 16), nn.ReLU()), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = checkpoint(self.body, self.table(x).mean(1), use_reentrant=False)
        out: Tensor = self.head(hidden)
        return out


@pytest.mark.parametrize("weights", ["float32", "int4"])
def test_sparse_gradients_and_checkpointed_blocks(weights: str) -> None:
    torch.manual_seed(0)
    model, words = Words(), torch.randint(0, 50, (64, 5))
    data = [(words, model(words).argmax(1))]
    task = Task(model, data, data, data, epochs=6, learning_rate=0.01)
    candidate = candidate_of(task, {"table:weights": weights, "model:activity_penalty": "l1-0.001"})
    before = candidate.layers["table"].dense.clone()
    for _ in fine_tune(task, candidate, task.build(), 6):
        pass
    assert not torch.equal(candidate.layers["table"].dense, before)
    assert model.table.sparse, "the user's own model is as it was"


def test_sparsity_rises_from_the_parents() -> None:
    task = zoo_task("mlp")
    candidate = candidate_of(task, {"1:sparsity": 0.9})
    candidate.set_masks(share=0.5, start={"1": 0.5})
    mask = candidate.layers["1"].mask
    assert mask is not None
    assert (mask == 0).float().mean() == pytest.approx(0.7, abs=0.01)


def test_a_rate_penalty_makes_the_file_smaller() -> None:
    sizes = []
    for penalty in (0, 1):
        torch.manual_seed(0)
        task = small_digits()
        candidate = candidate_of(task, {"1:weights": "int4", "3:weights": "int4", "model:rate_penalty": penalty})
        for _ in fine_tune(task, candidate, task.build(), 12):
            pass
        sizes.append(len(pack(candidate.weights(), candidate.recipe)))
    assert sizes[1] < 0.95 * sizes[0]


def test_a_model_of_floats_may_have_a_price_of_bits() -> None:
    task = small_digits()
    candidate = candidate_of(task, {"1:weights": "float16", "model:rate_penalty": 1})
    assert [*fine_tune(task, candidate, task.build(), 1)] == [1]


@pytest.mark.parametrize("choice", ["float16", "int8", "int4", "int2"])
def test_the_rate_model_is_within_three_percent(choice: str) -> None:
    task = small_digits()
    candidate = candidate_of(task, {"1:sparsity": 0.5, **{f"{layer}:weights": choice for layer in "135"}})
    rate = RateModel(candidate)
    for _ in fine_tune(task, candidate, task.build(), 4, rate=rate):
        pass
    rate.refresh()
    assert rate.bytes() == pytest.approx(len(pack(candidate.weights(), candidate.recipe)), rel=0.03)


@pytest.mark.parametrize("choice", ["int3", "int4"])
def test_the_gradient_of_the_price_is_the_slope_of_its_logarithm(choice: str) -> None:
    """Against bits that are interpolated between codes by numpy."""
    candidate = candidate_of(zoo_task("mlp"), {"1:weights": choice, "1:sparsity": 0.5})
    candidate.trainable()
    rate, shadow = RateModel(candidate), candidate.layers["1"]
    assert isinstance(shadow.coding, IntegerCoding)
    rate.backpropagate(torch.tensor(3.0))
    gradient = shadow.dense.grad
    assert gradient is not None
    with torch.no_grad():
        step = float(2 ** (shadow.learned * 32).round().div(32))
        places = (shadow.dense / step).numpy().astype(np.float64)
        found = isotonic_regression(2.0 ** -rate.tables["1"].double().numpy(), increasing=False).x
        table = -np.log2(found / (2 * found.sum() - found[0]))
        inside = (places > 1 - len(table)) & (places < len(table) - 2)  # beyond it nothing is passed on
        every = sum(float(b) for b in rate.bits.values())

        def bits(shift: float) -> np.ndarray[Any, np.dtype[np.float64]]:
            return np.interp(np.abs(places + shift), np.arange(len(table)), table)

        slopes = (bits(1e-6) - bits(-1e-6)) / (2e-6 * step) * 3 / (math.log(2) * every)
        assert shadow.mask is not None
        assert (np.abs(slopes) > 0).mean() > 0.1
        assert gradient.numpy()[inside] == pytest.approx((slopes * shadow.mask.numpy())[inside], rel=1e-3, abs=1e-7)


def test_a_price_makes_weights_cheaper() -> None:
    candidate = candidate_of(zoo_task("mlp"), {"1:weights": "int4"})
    candidate.trainable()
    rate, dense = RateModel(candidate), candidate.layers["1"].dense
    rate.backpropagate(torch.tensor(1.0))
    before = float(rate.bits["1"])
    assert dense.grad is not None
    with torch.no_grad():
        dense -= 0.05 * dense.abs().mean() * dense.grad.sign()
    rate.refresh()
    assert float(rate.bits["1"]) < before


def test_bfloat16_training_runs_and_keeps_float32_weights() -> None:
    task = zoo_task("residual")
    candidate = candidate_of(task, {"model:precision": "bfloat16"})
    for _ in fine_tune(task, candidate, task.build(), 1):
        pass
    assert {p.dtype for p in candidate.model.parameters()} == {torch.float32}


def test_a_loss_that_is_not_finite_is_told() -> None:
    task = zoo_task("mlp")
    task.loss = lambda output, target: output.sum() * math.inf
    with pytest.raises(TaskError, match="the loss became"):
        next(fine_tune(task, candidate_of(task, {}), task.build(), 1))


def test_divergence_is_torchs_kl_divergence() -> None:
    torch.manual_seed(0)
    student, teacher, target = torch.randn(6, 4), torch.randn(6, 4), torch.zeros(6).long()
    expected = nn.functional.kl_div(
        (student / 2).log_softmax(1), (teacher / 2).log_softmax(1), log_target=True, reduction="batchmean"
    )
    torch.testing.assert_close(divergence(student, teacher, target, 2.0), 4 * expected)
    assert float(divergence({"a": student}, {"a": student}, target)) == pytest.approx(0, abs=1e-6)
    assert float(divergence((student, "x"), (student, "x"), None)) == 0


def test_two_numbers_that_are_nearly_alike_weigh_no_more_than_others() -> None:
    """As those of a regression on the last two samples of a split, which were worth a thousand batches."""
    few, many = torch.tensor([[0.7], [0.701]]), torch.randn(64, 1, generator=torch.Generator().manual_seed(0))
    assert float(divergence(few + 0.1, few)) < 3 * float(divergence(many + 0.1, many))
    expected = 0.01 / float(many.var())
    assert float(divergence(many + 0.1, many)) == pytest.approx(expected, rel=1e-3)


def test_one_number_has_no_variance_to_be_measured_by() -> None:
    """As that of a regression on the last sample of a split."""
    one, other, none = torch.tensor([[1.0]]), torch.tensor([[2.0]]), torch.zeros(4, 0)
    assert float(divergence((one, none), (other, none), torch.zeros(1, 1))) == 0
    x = torch.randn(9, 6, generator=torch.Generator().manual_seed(0))
    batches = [(x[:8], x[:8, :1]), (x[8:], x[8:, :1])]
    task = Task(nn.Linear(6, 1), batches, batches, batches, loss=nn.functional.mse_loss)
    assert [*fine_tune(task, candidate_of(task, {}), task.build(), 2)] == [1, 2]


@pytest.mark.parametrize(
    ("output", "target", "classes"),
    [
        ((8, 10), (8,), 1),  # a classifier
        ((8, 5, 12, 10), (8, 12, 10), 1),  # segmentation, as torch has it
        ((8, 12, 65), (8, 12), 2),  # a language model
        ((8, 12, 65), (96,), 2),
        ((8, 12, 12), (8, 12), 1),
        ((8, 1), (8,), None),
        ((8, 10), (8, 1), 1),
        ((8, 10), (8, 10), None),  # several labels a sample
        ((20, 8, 30), (8, 5), None),  # an alignment is to be found
    ],
)
def test_classes_are_where_the_target_has_no_dimension(
    output: tuple[int, ...], target: tuple[int, ...], classes: int | None
) -> None:
    assert class_dimension(torch.randn(output), torch.zeros(target, dtype=torch.int64)) == classes
    assert class_dimension(torch.randn(output), torch.zeros(target)) is None


def test_of_several_outputs_those_that_score_classes_count() -> None:
    student, teacher, target = torch.randn(4, 6, 9), torch.randn(4, 6, 9), torch.randint(9, (4, 6))
    beside = {"loss": torch.tensor(3.0), "cache": ((torch.randn(4, 2, 6, 8),),)}
    other = {"loss": torch.tensor(5.0), "cache": ((torch.randn(4, 2, 6, 8),),)}
    whole = divergence({**beside, "logits": student}, {**other, "logits": teacher}, target)
    torch.testing.assert_close(whole, divergence(student, teacher, target))
    assert float(divergence(beside, other, target)) > 1


def test_outputs_that_only_training_has_are_not_compared() -> None:
    student, teacher, target = torch.randn(8, 5), torch.randn(8, 5), torch.randint(0, 5, (8,))
    alone = divergence(student, teacher, target)
    torch.testing.assert_close(divergence((student, torch.randn(8, 5)), teacher, target), alone)
    torch.testing.assert_close(divergence({"aux": torch.randn(3), "out": student}, {"out": teacher}, target), alone)
    assert float(divergence({"loss": torch.randn(())}, [torch.randn(7, 4)], target)) == 0


def test_divergence_of_a_language_model_is_over_its_tokens() -> None:
    student, teacher = torch.randn(4, 6, 9), torch.randn(4, 6, 9)
    target = torch.randint(9, (4, 6))
    flat = divergence(student.flatten(0, 1), teacher.flatten(0, 1), target.flatten())
    torch.testing.assert_close(divergence(student, teacher, target), flat)


def test_a_trial_leaves_its_files_and_a_child_starts_from_them(tmp_path: Path) -> None:
    task = zoo_task("residual", epochs=4)
    probe = Workshop(task, task.build(), BoundSpace(()), tmp_path, 0)
    space = SearchSpace.parse("layers: {'*': {weights: [float32, int4], sparsity: [0, 0.5]}}").bind(probe.anatomy)
    workshop = Workshop(task, task.build(), space, tmp_path, 0)
    recipe = space.recipe({"conv1:weights": "int4"}).to_json()
    *rungs, result = workshop.run(TrialSpec(0, recipe))
    assert isinstance(result, TrialResult)
    assert [r.epoch for r in rungs if isinstance(r, Rung)] == [1, 2, 3, 4]
    assert [r.epoch for r in rungs if isinstance(r, Rung) and r.val_accuracy is not None] == [2]
    folder = tmp_path / "trials" / "0"
    assert {p.name for p in folder.iterdir()} == {"model.acz", CHECKPOINT, METRICS, "recipe.json"}
    assert json.loads((folder / METRICS).read_text())["size_bytes"] == (folder / "model.acz").stat().st_size
    assert result.estimated_bytes == pytest.approx(result.size_bytes, rel=0.03)
    *_, child = workshop.run(TrialSpec(1, recipe, parent=0, epochs=0))
    assert isinstance(child, TrialResult)
    assert child.val_accuracy == result.val_accuracy
    assert child.size_bytes == pytest.approx(result.size_bytes, rel=0.01)


def test_the_same_seed_gives_the_same_file(tmp_path: Path) -> None:
    files = []
    for folder in ("a", "b"):
        task = zoo_task("residual", epochs=2)
        workshop = Workshop(task, task.build(), BoundSpace(()), tmp_path / folder, 5)
        [*workshop.run(TrialSpec(3, {"conv1": {"weights": "int3", "sparsity": 0.5}}))]
        files.append((tmp_path / folder / "trials" / "3" / "model.acz").read_bytes())
    assert files[0] == files[1]


def test_a_trial_tells_which_zeros_its_weights_already_have(tmp_path: Path) -> None:
    """At two bits many weights of a layer round to zero, whatever sparsity its recipe asks."""
    levels = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 0.98)
    task = small_digits(epochs=1)
    space = SearchSpace.parse(f"layers: {{'*': {{sparsity: {list(levels)}, weights: [float32, int2]}}}}")
    workshop = Workshop(task, task.build(), space, tmp_path, 0)
    result = workshop.finish(0, workshop.space.recipe({"1:sparsity": 0.1, "1:weights": "int2"}))
    stored = load(tmp_path / "trials" / "0" / "model.acz", task.build)
    zeros = float((stored[1].weight == 0).float().mean())
    reached = result.reached["1:sparsity"]
    beyond = levels[levels.index(reached) + 1]
    assert 0.1 < reached <= zeros < beyond
    assert list(result.effects["1:sparsity"]) == [str(beyond)]
    assert "3:sparsity" not in result.reached


def test_the_probes_of_a_trial_see_no_more_batches_than_its_fine_tuning(tmp_path: Path) -> None:
    for epochs, batches in ((1, 1), (4, 2)):  # 9 batches of 128 images each, 2 of them to calibrate
        task = small_digits(epochs)
        workshop = Workshop.on(task, SearchSpace.named("default"), tmp_path)
        assert len(workshop.prober.batches) == 2
        assert len(workshop.trial_prober.batches) == batches
