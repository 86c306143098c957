"""The sampler in an Optuna study that is not ours: the example of docs/search.md, as it stands there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import optuna
import pytest

import autocompress as ac
from autocompress.errors import SamplerError
from tests.conftest import small_digits

DOCS = Path(__file__).parents[2] / "docs" / "search.md"


def test_the_example_of_the_documentation(tmp_path: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.S)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    names: dict[str, Any] = {"task": small_digits(epochs=1), "folder": tmp_path}
    exec(code.replace("n_trials=30", "n_trials=8").replace("budget=30", "budget=8"), names)
    study = names["study"]
    assert len(study.trials) == 8
    for trial in study.trials:
        assert (tmp_path / "trials" / str(trial.number) / "model.acz").stat().st_size == trial.values[0]
        assert 2 <= trial.params["epochs"] <= 4
    assert any(trial.user_attrs["parent"] is not None for trial in study.trials)
    sizes = [trial.values[0] for trial in study.trials]
    assert min(sizes) < 0.3 * sizes[0]


def test_a_study_of_other_objectives_is_refused(tmp_path: Path) -> None:
    workshop = ac.Workshop.on(small_digits(), ac.SearchSpace.named("quantize-only"), tmp_path)
    profile = ac.Profile(workshop.space, workshop.anatomy, workshop.base_profile())
    study = optuna.create_study(direction="minimize", sampler=ac.FrontierSampler(profile, 4, 0.9))
    with pytest.raises(SamplerError, match="two objectives"):
        study.ask({d.key: optuna.distributions.CategoricalDistribution(d.choices) for d in workshop.space})
