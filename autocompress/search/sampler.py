"""The frontier sampler: profile, plan, walk with lineage, refine.

An Optuna sampler like any other: `FrontierSampler(...)` goes into `optuna.create_study(sampler=...)`; docs/search.md
has an example.
Each proposal also names the finished trial whose fine-tuned weights it should start from (user attribute
`parent`), which turns a search into gradual compression along many paths at once.

    walk     from large to small: each step plans a somewhat smaller recipe around the nearest larger
             finished trial, with the effects that were probed at that trial's own weights;
    refine   around the members of the front, where it gains most: a step into the widest gap, a swap
             at equal bytes (EvoPress's move, Sieberling et al., 2024), a crossover of neighbours;
    polish   the last share of the budget trains front members on, from their own weights.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Container, Sequence
from functools import cached_property
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState

from autocompress.errors import SamplerError
from autocompress.front import non_dominated
from autocompress.recipe import Choice
from autocompress.search.planner import plan
from autocompress.search.profile import Profile
from autocompress.space import without_void
from autocompress.techniques.base import structures, trainings

WALK, POLISH = 0.5, 0.85
"""Shares of the budget at which the walk ends and polishing begins."""
_FEWEST, _LONGEST = 6, 0.35
"""Steps of the walk of a small budget, and the smallest share of its bytes that one step leaves."""
_PLANNED = ("channels", "sparsity", "weights")
"""Dimensions that step from one choice to the next."""
_REACH = 0.35
"""Share of its levels that one dimension may move in one step."""


def _rebuilds(dimension: str) -> bool:
    """Whether its choices take something away for good, in ways that shapes alone do not tell."""
    technique = structures().get(dimension)
    return technique is not None and technique.permanent and technique.restores


class Point:
    """A finished trial as the sampler sees it."""

    def __init__(self, trial: FrozenTrial, keys: Container[str]) -> None:
        self.number = trial.number
        self.chosen: dict[str, Choice] = {key: choice for key, choice in trial.params.items() if key in keys}
        self.size: float = trial.values[0]
        self.accuracy: float = trial.values[1]
        self.effects: dict[str, dict[str, float]] = trial.user_attrs.get("effects", {})
        self.parent: int | None = trial.user_attrs.get("parent")

    @cached_property
    def rebuilt(self) -> list[tuple[str, str]]:
        """(dimension, site) of the parts that are not as they were."""
        made = [(key.rpartition(":")[2], key.rpartition(":")[0], c) for key, c in without_void(self.chosen).items()]
        return [(name, site) for name, site, c in made if _rebuilds(name) and c != structures()[name].default]


class FrontierSampler(BaseSampler):
    """profile: effects and bytes measured on the original. budget: trials in all. base_accuracy: of the
    original on the validation split. max_size_bytes, min_accuracy: where the search should look.
    """

    def __init__(
        self,
        profile: Profile,
        budget: int,
        base_accuracy: float,
        seed: int = 0,
        max_size_bytes: float | None = None,
        min_accuracy: float | None = None,
    ) -> None:
        self.profile, self.budget, self.base_accuracy, self.seed = profile, budget, base_accuracy, seed
        self.max_size_bytes, self.min_accuracy = max_size_bytes, min_accuracy
        self.dimensions = profile.dimensions
        self._random = RandomSampler(seed=seed)
        self._points: dict[int, Point] = {}
        self._ratios: dict[int, float] = {}
        rebuilding = [key for key, d in self.dimensions.items() if _rebuilds(d.name)]
        # fine-tuning makes good for a pruned part more than for a rebuilt one, and what is rebuilt does not come
        # back: where there are other ways to fewer bytes it is not planned, but tried, one part at a time
        self.tried = rebuilding if any(d.name in _PLANNED for d in profile.space) else []

    # ------------------------------------------------------------ Optuna's protocol

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return {key: CategoricalDistribution(d.choices) for key, d in self.dimensions.items()}

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """For what a foreign study asks beside the space: at random."""
        return self._random.sample_independent(study, trial, param_name, param_distribution)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        if study.directions != [StudyDirection.MINIMIZE, StudyDirection.MAXIMIZE]:
            raise SamplerError(
                "this sampler needs a study of two objectives, bytes and accuracy: "
                'optuna.create_study(directions=["minimize", "maximize"])'
            )
        trials = study.get_trials(deepcopy=False)
        for finished in trials:
            if finished.state == TrialState.COMPLETE and finished.number not in self._points:
                self._points[finished.number] = Point(finished, self.dimensions)
        done = [self._points[number] for number in sorted(self._points)]
        running = [t for t in trials if t.state == TrialState.RUNNING and t.number != trial.number]
        rng = random.Random(f"{self.seed} {trial.number}")
        chosen, parent, target, predicted = self.propose(done, running, trial.number, rng)
        attributes = {"parent": parent, "target_bytes": target, "predicted_bytes": predicted}
        for name, value in attributes.items():
            study._storage.set_trial_user_attr(trial._trial_id, name, value)
            trial.set_user_attr(name, value)  # what the objective sees was read before
        return {key: chosen[key] for key in search_space}

    # ------------------------------------------------------------ proposals

    def propose(
        self, done: Sequence[Point], running: Sequence[FrozenTrial], number: int, rng: random.Random
    ) -> tuple[dict[str, Choice], int | None, float, float]:
        """(recipe, parent, bytes aimed at, bytes predicted)."""
        aimed = [float(t.user_attrs["target_bytes"]) for t in running if "target_bytes" in t.user_attrs]
        targets = self.walk_targets()
        progress = number / max(self.budget, 1)
        if number < len(targets) and not self._collapsed(done):
            target = targets[number]
            if done:
                largest = max(p.size for p in done)
                target = min(target, 0.93 * largest) if number else target
            return self._step(done, target, rng, noise=0.0)
        if not done:
            return self._step(done, targets[number % len(targets)], rng, noise=0.5)
        front = self._front(done)
        if progress >= POLISH:
            return self._polish(front, done, running, rng)
        return self._refine(front, done, aimed, rng)

    def walk_targets(self) -> list[float]:
        """Bytes of each step of the walk: geometric, from light to heavy compression."""
        default = self.profile.predict(self.profile.default())
        smallest = self.profile.smallest_bytes()
        first = min(0.22 * default, self._uniform_bytes())
        last = max(smallest * 1.1, default / 1200)
        if self.max_size_bytes is not None:
            last = max(smallest, min(first, self.max_size_bytes) * 0.6)
            first = max(first, last * 1.5)
        first = max(first, last * 1.2)
        count = max(1, round(WALK * self.budget), min(self.budget, _FEWEST))
        last = max(last, first * _LONGEST ** (count - 1))
        return [first * (last / first) ** (i / max(count - 1, 1)) for i in range(count)]

    def _uniform_bytes(self) -> float:
        """Bytes of a mild recipe: every dimension of bytes one third of the way."""
        chosen = self.profile.default()
        for key, d in self.dimensions.items():
            if d.name in ("weights", "sparsity"):
                chosen[key] = d.choices[len(d.choices) // 3]
        return self.profile.predict(chosen)

    def _collapsed(self, done: Sequence[Point]) -> bool:
        """Whether the walk has come where accuracy is no longer of use to anyone."""
        if len(done) < 4:
            return False
        floor = self.base_accuracy - 0.4 * abs(self.base_accuracy)
        if self.min_accuracy is not None:
            floor = min(self.min_accuracy - 0.03, self.base_accuracy)
        tail = sorted(done, key=lambda p: p.size)[:2]
        return all(p.accuracy < floor for p in tail)

    def _step(
        self, done: Sequence[Point], target: float, rng: random.Random, noise: float, parent: Point | None = None
    ) -> tuple[dict[str, Choice], int | None, float, float]:
        """A planned recipe of about `target` bytes, around the best ancestor."""
        parent = parent or self._ancestor(done, target)
        start = dict(parent.chosen) if parent else self.profile.default()
        correction = self._correction(done, parent)
        effects, allowed = self._effects(parent, rng, noise), self._allowed(parent, noise > 0)
        chosen = plan(self.profile, effects, target / correction, start, allowed)
        self._train_choices(chosen, parent, rng)
        return chosen, parent.number if parent else None, target, self.profile.predict(chosen) * correction

    def _refine(
        self, front: list[Point], done: Sequence[Point], aimed: list[float], rng: random.Random
    ) -> tuple[dict[str, Choice], int | None, float, float]:
        parent, room = self._where(front, done, aimed, rng)
        kind = rng.random()
        smaller = [p for p in front if p.size < parent.size]
        if kind < 0.2 and smaller:
            return self._crossover(parent, smaller[-1], done, rng)
        if kind > 0.9 and self.tried:
            return self._rebuild(parent, done, rng)
        target = parent.size * (max(room, 0.6) ** 0.5 if kind < 0.75 else 0.97)
        if self.max_size_bytes is not None and parent.size > self.max_size_bytes:
            target = min(target, self.max_size_bytes * 0.97)
        return self._step(done, target, rng, noise=0.4, parent=parent)

    def _rebuild(
        self, parent: Point, done: Sequence[Point], rng: random.Random
    ) -> tuple[dict[str, Choice], int | None, float, float]:
        """The parent with another structure of one part."""
        key = rng.choice(self.tried)
        others = [c for c in self.dimensions[key].choices if c != parent.chosen[key] and self._follows(key, parent, c)]
        chosen = {**parent.chosen, key: rng.choice(others)} if others else dict(parent.chosen)
        self._train_choices(chosen, parent, rng)
        predicted = self.profile.predict(chosen) * self._correction(done, parent)
        return chosen, parent.number, predicted, predicted

    def _crossover(
        self, larger: Point, smaller: Point, done: Sequence[Point], rng: random.Random
    ) -> tuple[dict[str, Choice], int | None, float, float]:
        """Each layer from one of two neighbours on the front; weights from the one whose channels allow."""
        sites = {key.rpartition(":")[0] for key in self.dimensions}
        pick = {site: rng.random() < 0.5 for site in sorted(sites)}
        chosen = {key: (smaller if pick[key.rpartition(":")[0]] else larger).chosen[key] for key in self.dimensions}
        parent = larger
        for key, choice in chosen.items():
            if not self._follows(key, larger, choice):
                chosen[key] = larger.chosen[key]
        self._train_choices(chosen, parent, rng)
        predicted = self.profile.predict(chosen) * self._correction(done, parent)
        return chosen, parent.number, predicted, predicted

    def _polish(
        self, front: list[Point], done: Sequence[Point], running: Sequence[FrozenTrial], rng: random.Random
    ) -> tuple[dict[str, Choice], int | None, float, float]:
        """Train a front member on: the one with most to win that was not trained on yet."""
        busy = {t.user_attrs.get("parent") for t in running}
        known = {p.number: p for p in done}
        trained = {p.parent for p in done if p.parent in known and self._same_model(p, known[p.parent])}
        fresh = [p for p in front if p.number not in trained and p.number not in busy]
        useful = [p for p in fresh if self._useful(p)] or fresh or front
        parent = max(useful, key=lambda p: self._gain(p, front))
        chosen = dict(parent.chosen)
        self._train_choices(chosen, parent, rng)
        return chosen, parent.number, parent.size, parent.size

    def _same_model(self, one: Point, other: Point) -> bool:
        """Whether two recipes differ in their training alone."""
        return all(other.chosen[k] == c for k, c in one.chosen.items() if k.rpartition(":")[2] not in trainings())

    # ------------------------------------------------------------ judgement

    def _useful(self, point: Point) -> bool:
        if self.max_size_bytes is not None and point.size > 1.5 * self.max_size_bytes:
            return False
        floor = self.min_accuracy
        if floor is None:
            floor = self.base_accuracy - 0.1 * abs(self.base_accuracy)
        return point.accuracy >= floor - 0.03

    def _front(self, done: Sequence[Point]) -> list[Point]:
        """Non-dominated points, largest first."""
        keep = non_dominated([(p.size, p.accuracy) for p in done])
        return sorted((done[i] for i in keep), key=lambda p: -p.size)

    def _gain(self, point: Point, front: list[Point]) -> float:
        """Hypervolume in (log2 bytes, error) that improving this member could add."""
        at = front.index(point)
        below = math.log2(point.size / front[at + 1].size) if at + 1 < len(front) else 0.5
        error = max(self.base_accuracy - point.accuracy, 0.0) + 0.005
        return min(below, 2.0) * (1.0 / (1.0 + 20 * error)) + 4 * min(error, 0.03)

    def _where(
        self, front: list[Point], done: Sequence[Point], aimed: list[float], rng: random.Random
    ) -> tuple[Point, float]:
        """A front member to start from, and the share of its size at which the next smaller one lies."""
        useful = [p for p in front if self._useful(p)] or front
        children = Counter(p.parent for p in done)
        weights = []
        rooms = []
        for p in useful:
            smaller = [q.size for q in front if q.size < p.size and q.accuracy > p.accuracy - 0.05]
            room = max(smaller, default=0.5 * p.size) / p.size
            close = sum(1 for size in aimed if 0.7 * p.size < size < p.size)
            weight = self._gain(p, front) / (1 + children[p.number] + 2 * close)
            if p is useful[-1] or p.accuracy >= self.base_accuracy:
                weight *= 1.5
            if self.max_size_bytes is not None:
                weight *= math.exp(-abs(math.log2(p.size / self.max_size_bytes)))
            weights.append(weight)
            rooms.append(room)
        index = rng.choices(range(len(useful)), weights)[0]
        return useful[index], rooms[index]

    def _follows(self, key: str, parent: Point, choice: Choice) -> bool:
        """Whether the parent can go on with this choice: what it took away for good does not come back."""
        site, _, name = key.rpartition(":")
        technique = structures().get(name)
        if technique is None or not technique.permanent:
            return True
        return technique.follows(parent.chosen[key], choice) and not any(
            technique.voids(choice, site, dimension, other) for dimension, other in parent.rebuilt if other != site
        )

    def _ancestor(self, done: Sequence[Point], target: float) -> Point | None:
        """The finished trial that is larger than the target by least, in bytes and in lost accuracy."""
        larger = [p for p in done if p.size >= 0.98 * target]
        if not larger:
            return None

        def expected(p: Point) -> float:
            step = max(math.log2(p.size / target), 0.0)
            return p.accuracy - 0.012 * step - 0.05 * step**2

        return max(larger, key=expected)

    def _correction(self, done: Sequence[Point], parent: Point | None) -> float:
        """File over predicted bytes: the parent's own ratio, moved by what training usually does to it."""
        known = {p.number: p for p in done}
        moved: list[float] = []
        for p in reversed(done):
            if p.parent in known and len(moved) < 9:
                moved.append(self._ratio(p) / self._ratio(known[p.parent]))
        drift = sorted(moved)[len(moved) // 2] if moved else 1.0
        return (self._ratio(parent) if parent else 1.0) * min(max(drift, 0.6), 1.2)

    def _ratio(self, point: Point) -> float:
        """File over predicted bytes."""
        if point.number not in self._ratios:
            self._ratios[point.number] = point.size / self.profile.predict(point.chosen)
        return self._ratios[point.number]

    def _effects(self, parent: Point | None, rng: random.Random, noise: float) -> dict[str, dict[str, float]]:
        """Effects of the profile, scaled per dimension by what was probed at the parent's weights."""
        out = {}
        for key, base in self.profile.effects.items():
            present = str(parent.chosen[key]) if parent else None
            zero = base.get(present, 0.0) if present is not None else 0.0
            scale = 1.0
            probed = parent.effects.get(key, {}) if parent else {}
            for choice, effect in probed.items():
                rise = max(base.get(choice, 0.0) - zero, 1e-5)
                scale = min(max((effect + 1e-5) / rise, 0.02), 50.0)
            scale *= math.exp(noise * rng.gauss(0, 1))
            out[key] = {
                c: max(e - zero, -zero * 0.5) * scale + (0.0 if c == present else 1e-6) for c, e in base.items()
            }
        return out

    def _allowed(self, parent: Point | None, both_ways: bool) -> dict[str, tuple[Choice, ...]]:
        """Choices within reach of the parent's: heavier ones, and lighter ones when refining."""
        allowed = {}
        for key, d in self.dimensions.items():
            if d.name in trainings() or key in self.tried:
                continue
            if parent is None:
                allowed[key] = d.choices
                continue
            at = d.choices.index(parent.chosen[key])
            low = at if d.name in ("sparsity", "weights") else 0
            if both_ways and d.name in ("sparsity", "weights"):
                low = max(0, at - 1)
            high = at + 1 + math.ceil(_REACH * len(d.choices)) if d.name in _PLANNED else len(d.choices)
            near = d.choices[low:high]
            allowed[key] = tuple(choice for choice in near if self._follows(key, parent, choice))
        return allowed

    def _train_choices(self, chosen: dict[str, Choice], parent: Point | None, rng: random.Random) -> None:
        """Choices without a measurable effect are inherited and sometimes changed, few at a time."""
        training = {key: d for key, d in self.dimensions.items() if d.name in trainings()}
        for key, d in training.items():
            if parent is None:
                numeric = all(isinstance(choice, (int, float)) for choice in d.choices)
                chosen[key] = d.choices[(len(d.choices) - 1) // 2 if numeric else 0]
            elif rng.random() < min(0.2, 0.8 / len(training)):
                chosen[key] = rng.choice(d.choices)
            else:
                chosen[key] = parent.chosen[key]
