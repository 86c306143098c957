"""A profile is measured once for the same model, data and space, and again when any of them changes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import small_digits

from autocompress.search.profile_cache import measured_profile
from autocompress.space import SearchSpace
from autocompress.task import Task
from autocompress.trial import Workshop


@pytest.fixture
def measurements(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Workshop]:
    """The workshops that really measured."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    seen: list[Workshop] = []
    measure = Workshop.base_profile

    def spy(self: Workshop, *given: object) -> object:
        seen.append(self)
        return measure(self, *given)  # type: ignore[arg-type]

    monkeypatch.setattr(Workshop, "base_profile", spy)
    return seen


def workshop(task: Task, space: str = "layers: {'*': {weights: [float32, int4]}}") -> Workshop:
    return Workshop.on(task, SearchSpace.parse(space), Path())


def test_the_same_is_measured_once(measurements: list[Workshop]) -> None:
    first, second = measured_profile(workshop(small_digits())), measured_profile(workshop(small_digits()))
    assert first == second
    assert len(measurements) == 1


def test_another_model_sample_or_space_is_measured_again(measurements: list[Workshop]) -> None:
    measured_profile(workshop(small_digits()))
    other = small_digits()
    assert isinstance(other.model, torch.nn.Module)
    model = other.build()
    with torch.no_grad():
        model[1].weight[0, 0] += 1
    changed = Task(model, other.train, other.val, other.test, name=other.name)
    measured_profile(workshop(changed))
    sample = list(other.batches("train"))[1:]
    measured_profile(workshop(Task(other.model, sample, other.val, other.test, name=other.name)))
    measured_profile(workshop(small_digits(), "layers: {'*': {weights: [float32, int3]}}"))
    assert len(measurements) == 4


def test_a_broken_file_in_the_cache_is_measured_again(measurements: list[Workshop], tmp_path: Path) -> None:
    known = measured_profile(workshop(small_digits()))
    (file,) = (tmp_path / "autocompress" / "profiles").iterdir()
    file.write_text("{")
    assert measured_profile(workshop(small_digits())) == known
    assert len(measurements) == 2


def test_progress_is_told(measurements: list[Workshop]) -> None:
    told: list[str] = []
    measured_profile(Workshop.on(small_digits(), SearchSpace.named("default"), Path()), told.append)
    assert told[0] == "profiling every choice: 10%"
    assert len(told) == len(set(told)) >= 5
