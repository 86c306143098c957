from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autocompress.errors import RunError, TargetError
from autocompress.front import Base, FrontPoint, ParetoFront, hypervolume, non_dominated

pairs = st.lists(st.tuples(st.integers(1, 50), st.integers(0, 20)), max_size=30)


def front(*points: tuple[int, float], folder: Path = Path()) -> ParetoFront:
    made = tuple(
        FrontPoint(i, s, a, a - 0.01, f"trials/{i}/model.acz", {}, None, 1.0) for i, (s, a) in enumerate(points)
    )
    return ParetoFront("digits", "default", 0, Base(100_000, 0.99, 0.98), made, folder)


@given(pairs)
def test_non_dominated_is_what_brute_force_says(points: list[tuple[int, int]]) -> None:
    keep = non_dominated(points)
    for i in keep:
        assert not any(p[0] <= points[i][0] and p[1] >= points[i][1] and p != points[i] for p in points), (
            "a kept point is dominated"
        )
    for i, p in enumerate(points):
        if i not in keep:
            assert any(points[k][0] <= p[0] and points[k][1] >= p[1] for k in keep), "a lost point is not"
    assert [points[i] for i in keep] == sorted({points[i] for i in keep})


def test_hypervolume_of_rectangles() -> None:
    assert hypervolume([(50, 1.0)], 100, 0.0) == 1.0
    assert hypervolume([(50, 0.5), (25, 0.25)], 100, 0.0) == pytest.approx(2 * 0.25 + 1 * 0.25)
    assert hypervolume([(200, 1.0)], 100, 0.0) == 0.0
    assert hypervolume([], 100, 0.0) == 0.0


@given(pairs, st.tuples(st.integers(1, 50), st.integers(0, 20)))
def test_hypervolume_never_falls(points: list[tuple[int, int]], extra: tuple[int, int]) -> None:
    assert hypervolume([*points, extra], 64, 0) >= hypervolume(points, 64, 0) - 1e-9


def test_a_front_shows_its_table() -> None:
    shown = str(front((1000, 0.8), (5000, 0.95)))
    assert "state_dict" in shown
    assert shown.index("1/20") < shown.index("1/100")
    assert "trials/1/model.acz" in shown


def test_best_within_constraints() -> None:
    f = front((1000, 0.8), (5000, 0.95), (20000, 0.98))
    assert f.best(max_size="6KB").size_bytes == 5000
    assert f.best(min_accuracy=0.9).size_bytes == 5000
    assert f.best(max_size=30000, min_accuracy=0.97).size_bytes == 20000
    assert f.best().size_bytes == 20000
    with pytest.raises(TargetError, match="smallest of this run is 1000 bytes"):
        f.best(max_size=10)
    with pytest.raises(TargetError, match=r"at most 6 KB: the best has 0.9500"):
        f.best(max_size="6KB", min_accuracy=0.97)


def test_overfitting_is_what_selection_gained_on_validation_alone() -> None:
    """The original is at 0.99 and 0.98, each file at a and a - 0.01: the same gap, so nothing was overfitted."""
    honest = front((1000, 0.8), (5000, 0.95))
    assert honest.overfitting() == pytest.approx(0)
    lucky = replace(honest, points=tuple(replace(p, val_accuracy=p.val_accuracy + 0.02) for p in honest))
    assert lucky.overfitting() == pytest.approx(0.02)
    assert math.isnan(replace(honest, points=(replace(honest.points[0], test_accuracy=None),)).overfitting())


def test_knee_is_where_accuracy_starts_to_fall_fast() -> None:
    assert front((1000, 0.5), (2000, 0.9), (4000, 0.93), (64000, 0.95)).knee().size_bytes == 2000
    assert front((1000, 0.5)).knee().size_bytes == 1000
    with pytest.raises(TargetError, match="empty"):
        front().knee()


def test_written_and_read_back(tmp_path: Path) -> None:
    f = front((1000, 0.8), (5000, 0.95), folder=tmp_path)
    (tmp_path / "front.json").write_text(json.dumps(f.to_json()))
    back = ParetoFront.read(tmp_path)
    assert back.to_json() == f.to_json()
    assert back.points[0].path == tmp_path / "trials/0/model.acz"


@pytest.mark.parametrize("text", ["{", "[]", '{"front": [{}]}'])
def test_a_broken_front_is_one_sentence(text: str, tmp_path: Path) -> None:
    (tmp_path / "front.json").write_text(text)
    with pytest.raises(RunError):
        ParetoFront.read(tmp_path)


def test_pictures_and_tables(tmp_path: Path) -> None:
    f = front((1000, 0.8), (5000, 0.95), (20000, 0.98))
    assert f.plot(tmp_path / "a" / "front.png").read_bytes().startswith(b"\x89PNG")
    assert b"<svg" in f.plot(tmp_path / "front.svg").read_bytes()
    front().plot(tmp_path / "empty.png")
    with pytest.raises(TargetError, match=r"ends in \.png"):
        f.plot(tmp_path / "front.gif")
    assert f.table().row_count == 4


def test_of_a_file_that_is_too_bad_to_be_drawn_nothing_is_drawn(tmp_path: Path) -> None:
    bad, good = front((1000, 0.5), (5000, 0.95)).points

    def picture(test_accuracy: float | None, of: FrontPoint) -> bytes:
        points = tuple(replace(point, test_accuracy=test_accuracy) if point is of else point for point in (bad, good))
        return replace(front(), points=points).plot(tmp_path / "front.svg").read_bytes()

    assert picture(0.9, bad) == picture(None, bad)
    assert picture(0.9, good) != picture(None, good)
