"""The page of a run: what stands on it, that it needs nothing beside it, and what it refuses."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import autocompress as ac
from autocompress.errors import RunError
from autocompress.report.trials import failure_sentences, read_trials
from tests import mini
from tests.conftest import trials_run_here


@pytest.fixture(scope="module")
def front(tmp_path_factory: pytest.TempPathFactory) -> ac.ParetoFront:
    with trials_run_here():
        return ac.search(mini.task(), 6, run=tmp_path_factory.mktemp("page") / "run", workers=1)


def test_a_search_leaves_a_page_with_every_file_and_every_layer(front: ac.ParetoFront) -> None:
    page = (front.folder / "report.html").read_text()
    for point in front:
        assert f"{point.size_bytes:,}<td>1/" in page
        assert f'href="{point.artifact}"' in page
        inside = ac.read_artifact(point.path)
        for name, tensor in inside.tensors.items():
            if tensor.value.ndim > 1:
                assert f'<td class="left">{name.removesuffix(".weight")}<' in page
                assert re.search(rf">{tensor.size_bytes:,}[<\n]", page)
    assert page.count("<svg") == 2
    assert "seed: 0" in page
    assert not re.search(r"<(script|link|img)|url\(http", page), "it needs something beside it"


def test_the_trials_are_those_of_the_run(front: ac.ParetoFront) -> None:
    trials = {trial.number: trial for trial in read_trials(front.folder)}
    assert len(trials) == 6
    for point in front:
        trial = trials[point.trial]
        assert (trial.size_bytes, trial.val_accuracy, trial.parent) == (
            point.size_bytes,
            point.val_accuracy,
            point.parent,
        )


def test_what_failed_trials_alone_have_is_told(front: ac.ParetoFront, tmp_path: Path) -> None:
    def trial(number: int, **files: str) -> None:
        for name, text in files.items():
            path = tmp_path / "trials" / str(number) / name.replace("_", ".")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    int8, int2 = (json.dumps({"head": {"weights": w}, "stem": {"sparsity": 0.5}}) for w in ("int8", "int2"))
    metrics = '{"size_bytes": 9, "val_accuracy": 0.5, "parent": null, "seconds": 1}'
    trial(0, recipe_json=int8, metrics_json=metrics)
    for number in (2, 10):
        trial(number, recipe_json=int2, error_txt="Traceback\n  some.errors.ValueError: no bits\n")
    trial(3, recipe_json=int8, error_txt="the worker died")
    trial(4, error_txt="no payload")
    trial(5, recipe_json="{", error_txt="\n")
    told = failure_sentences(tmp_path)
    assert told == [
        "2 trials failed (2, 10): ValueError: no bits; no finished trial has head:weights = int2",
        "trial 4 failed: no payload",
        "trial 5 failed: no reason was kept",
        "trial 3 failed: the worker died",
    ]
    page = replace(front, folder=tmp_path).report(tmp_path / "page.html").read_text()
    assert all(sentence in page for sentence in told)
    assert failure_sentences(front.folder) == []


def test_links_lead_to_the_files_from_anywhere(front: ac.ParetoFront, tmp_path: Path) -> None:
    page = front.report(tmp_path / "elsewhere" / "page.html")
    links = re.findall(r'<a href="([^"]+)"', page.read_text())
    assert [(page.parent / link).resolve() for link in links] == [p.path.resolve() for p in reversed(front.points)]


def test_a_long_front_shows_the_bytes_of_some_of_its_files(front: ac.ParetoFront, tmp_path: Path) -> None:
    points = tuple(replace(front.points[0], size_bytes=1000 + i, val_accuracy=0.01 * i) for i in range(40))
    page = replace(front, points=points).report(tmp_path / "page.html").read_text()
    heads = page.split("bytes of<th>")[1].split("</thead>")[0].split("<th>")
    assert len(heads) == 12
    assert (heads[0], heads[-1]) == ("1.04 KB", "1 KB")
    assert page.count("model.acz</a>") == 40


def test_how_honest_selection_was_is_told_in_the_unit_of_the_metric(front: ac.ParetoFront, tmp_path: Path) -> None:
    points = tuple(replace(point, test_accuracy=point.val_accuracy) for point in front)
    base = replace(front.base, test_accuracy=front.base.val_accuracy + 0.0125)
    told = replace(front, points=points, base=base).report(tmp_path / "page.html").read_text()
    assert "files are 1.25 points worse on test than on validation" in told
    base = replace(base, test_accuracy=base.val_accuracy)
    told = replace(front, points=points, base=base).report(tmp_path / "page.html").read_text()
    assert "files are as good on test as on validation" in told
    base = replace(base, val_accuracy=-5.0, test_accuracy=-5.5)
    told = replace(front, points=points, base=base).report(tmp_path / "page.html").read_text()
    assert "files are 0.5000 better on test" in told


def test_a_tensor_without_values_has_its_row(tmp_path: Path) -> None:
    task = mini.brief_task()
    model = task.build()
    model.register_buffer("none_yet", torch.zeros(0, 3))
    with trials_run_here():
        front = ac.search(replace(task, model=model), 2, run=tmp_path / "run", workers=1, quiet=True)
    assert '<td class="left">none_yet<' in (tmp_path / "run" / "report.html").read_text()
    assert ac.load(front.points[0].path, model).none_yet.shape == (0, 3)


def test_names_are_text(front: ac.ParetoFront, tmp_path: Path) -> None:
    named = replace(front, task="<script>alert(1)</script>")
    page = named.report(tmp_path / "page.html").read_text()
    assert "<script" not in page
    assert "&lt;script&gt;" in page


def test_what_cannot_be_reported_is_told(front: ac.ParetoFront, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no finished trial yet"):
        replace(front, points=()).report(tmp_path / "page.html")
    metrics = front.folder / "trials" / str(front.points[0].trial) / "metrics.json"
    before = metrics.read_text()
    metrics.write_text(json.dumps({"size_bytes": 1}))
    with pytest.raises(RunError, match=r"metrics\.json' cannot be read"):
        front.report(tmp_path / "page.html")
    metrics.write_text(before)
