"""The frontier sampler: profile, plan, walk with lineage, improve.

An Optuna sampler like any other: `FrontierSampler(...)` goes into `optuna.create_study(sampler=...)`; docs/search.md
has an example.
Each proposal also names the finished trial whose fine-tuned weights it should start from (user attribute
`parent`), which turns a search into gradual compression along many paths at once.

    race      at first, and where the space leaves learning rates open: one heavy recipe at several of them;
    walk      from large to small: each step plans a somewhat smaller recipe around the nearest larger
              finished trial, with the effects that were probed at that trial's own weights;
    improve   where the front is expected to gain most hypervolume, as the trials so far tell: a step down from
              one of its members, a crossover of neighbours, another structure of one part, or more training.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState

from autocompress.agent.acquisition import Region, drawn_fronts, expected_improvement
from autocompress.agent.forecast import MOVES, BytesForecast, Forecast, Step
from autocompress.agent.planner import plan
from autocompress.agent.profile import Floats, Profile
from autocompress.agent.race import RACE, Race, has_learning_rates
from autocompress.errors import SamplerError
from autocompress.front import non_dominated, skill
from autocompress.recipe import Choice
from autocompress.space import BoundSpace, without_void
from autocompress.techniques.base import structures, trainings

WALK, _WALKERS = 0.5, 2
"""Share of the budget that the walk may take, and workers from which it takes less, by the root of their number: its
steps cannot wait for each other, so they are long anyway, and the time is better spent from one finished trial to the
next."""
_FEWEST, _MOST, _LONGEST = 6, 60, 0.35
"""Steps of the walk of a small and of a large budget, and the smallest share of its bytes that one step leaves."""
_SHARES = (0.97, 0.9, 0.8, 0.65, 0.5, _LONGEST)
"""Of the parent's bytes: the steps that are weighed against each other. Improving goes both ways, so the shortest swaps
one layer's level for another's at about equal bytes (EvoPress, Sieberling et al., 2024)."""
_USEFUL, _UNIT = 1 / 15, 0.05
"""Share of the original's skill that a file may lose and still be of use; and share of that by which the ceiling
lies above the best accuracy."""
_RACED, _RACE_FROM = 0.65, 20
"""How far down the walk, in logarithms of bytes, the recipe is that learning rates are raced by; and trials of the
smallest budget with a race."""
_ENOUGH, _AIM = 0.8, 0.98
"""Of a size to meet: the share below which smaller files earn no more, and the share that is aimed at."""
_FAR, _NEARLY = 2.0, 0.1
"""Of an accuracy to keep: times the smallest file that does, above which more accurate files earn nothing; and the
share of what is of use that parents may miss it by."""
_SIZE_MET, _ACCURACY_MET = 0.5, 0.5
"""What it is worth that a file is as small or as accurate as asked: log2 bytes, and a share of what is of use."""
_STEP, _LEAP = 0.0135, 0.056
"""Of its skill, that a file is thought to lose with half its bytes, times the step and times its square."""
_PLANNED = ("channels", "sparsity", "weights")
"""Dimensions that step from one choice to the next."""
_REACH = 0.2
"""Share of its levels that one dimension may move in one step."""


def _is_permanent(dimension: str) -> bool:
    """Whether its choices take something away for good."""
    technique = structures().get(dimension)
    return technique is not None and technique.permanent


def _rebuilds(dimension: str) -> bool:
    """Whether its choices take something away for good, in ways that shapes alone do not tell."""
    return _is_permanent(dimension) and structures()[dimension].restores


def distributions(space: BoundSpace) -> dict[str, BaseDistribution]:
    """The space as Optuna is asked for it."""
    return {d.key: CategoricalDistribution(d.choices) for d in space}


def _chosen(trial: FrozenTrial, keys: Container[str]) -> dict[str, Choice]:
    """Of the space, without what a foreign study asks beside it."""
    return {key: choice for key, choice in trial.params.items() if key in keys}


class Point:
    """A finished trial as the sampler sees it."""

    def __init__(self, trial: FrozenTrial, keys: Container[str]) -> None:
        self.number = trial.number
        self.chosen = _chosen(trial, keys)
        reached = trial.user_attrs.get("reached", {})
        self.reached = self.chosen | {key: choice for key, choice in reached.items() if key in keys}
        """What its weights amount to: a price of bits prunes more than the recipe asks."""
        self.size: float = trial.values[0]
        self.accuracy: float = trial.values[1]
        self.rungs = {name: float(value) for name, value in trial.user_attrs.items() if name.startswith("rung_")}
        self.effects: dict[str, dict[str, float]] = trial.user_attrs.get("effects", {})
        self.parent: int | None = trial.user_attrs.get("parent")
        self.move: str = trial.user_attrs.get("move", MOVES[0])
        self.trained = 0
        """How often it was trained on, one time after the other."""

    def as_asked(self, chosen: Mapping[str, Choice]) -> dict[str, Choice]:
        """A child's choices; what the weights came to by themselves need not be asked of them."""
        return {key: self.chosen[key] if choice == self.reached[key] else choice for key, choice in chosen.items()}

    @cached_property
    def rebuilt(self) -> list[tuple[str, str]]:
        """(dimension, site) of the parts that are not as they were."""
        made = [(key.rpartition(":")[2], key.rpartition(":")[0], c) for key, c in without_void(self.chosen).items()]
        return [(name, site) for name, site, c in made if _rebuilds(name) and c != structures()[name].default]


@dataclass(frozen=True)
class Stopped:
    """A trial that was stopped at a rung. size: the bytes that it was to have. accuracy: at the rung."""

    chosen: dict[str, Choice]
    move: str
    parent: int
    size: float
    rung: str
    accuracy: float

    @staticmethod
    def of(trial: FrozenTrial, keys: Container[str]) -> Stopped | None:
        """None of one that began from the original, or was stopped by someone else."""
        told = trial.user_attrs
        rungs = [name for name in told if name.startswith("rung_")]
        if told.get("parent") is None or told.get("predicted_bytes") is None or not rungs:
            return None
        return Stopped(
            _chosen(trial, keys),
            told["move"],
            told["parent"],
            told["predicted_bytes"],
            rungs[-1],
            float(told[rungs[-1]]),
        )


_TOLD = ("move", "target_bytes", "predicted_bytes", "expected_accuracy", "deviation")
ATTRIBUTES = ("parent", *_TOLD)
"""User attributes of a trial that tell of its proposal."""


@dataclass
class Proposal:
    """A candidate, and why. target_bytes: aimed at. chosen: the recipe, None until it is planned. deviation: of the
    logarithm of what the accuracy lacks, about what is expected of it."""

    move: str
    parent: Point | None
    target_bytes: float
    chosen: dict[str, Choice] | None = None
    predicted_bytes: float = 0.0
    expected_accuracy: float | None = None
    deviation: float | None = None

    def attributes(self) -> dict[str, Any]:
        """What the trial is told of it."""
        return {"parent": self.parent.number if self.parent else None, **{name: getattr(self, name) for name in _TOLD}}


def _key(told: Mapping[str, Any]) -> tuple[str, int | None, float]:
    """The same for proposals of the same trial: to train on is one, whatever is foretold of its bytes by now."""
    return told["move"], told["parent"], 0.0 if told["move"] == "train" else told["target_bytes"]


class FrontierSampler(BaseSampler):
    """profile: effects and bytes measured on the original. budget: trials in all. base_accuracy, chance_accuracy: of
    the original, and of what knows nothing, on the validation split. max_size_bytes, min_accuracy: where the search
    should look. trains: whether trials fine-tune, so that one more of the same recipe is worth a thought.
    """

    def __init__(
        self,
        profile: Profile,
        budget: int,
        base_accuracy: float,
        seed: int = 0,
        max_size_bytes: float | None = None,
        min_accuracy: float | None = None,
        chance_accuracy: float = 0.0,
        trains: bool = True,
    ) -> None:
        self.profile, self.budget, self.base_accuracy, self.seed = profile, budget, base_accuracy, seed
        self.max_size_bytes, self.min_accuracy, self.trains = max_size_bytes, min_accuracy, trains
        self._skill = skill(base_accuracy, chance_accuracy)
        self._useful = _USEFUL * self._skill
        """Accuracy that a file may lose and still be of use."""
        self.dimensions = profile.dimensions
        self._sites = sorted({d.site for d in profile.space})
        self._default_bytes = profile.predict(profile.default())
        self._random = RandomSampler(seed=seed)
        self._points: dict[int, Point] = {}
        self._stopped: dict[int, Stopped] = {}
        self._ratios: dict[int, float] = {}
        self._bytes_forecast: tuple[int, BytesForecast] | None = None
        self._training = {key: d for key, d in self.dimensions.items() if d.name in trainings()}
        self.race = next((Race(d, base_accuracy) for d in profile.space if has_learning_rates(d)), None)
        self._permanent = {key: structures()[d.name] for key, d in self.dimensions.items() if _is_permanent(d.name)}
        rebuilding = [key for key, d in self.dimensions.items() if _rebuilds(d.name)]
        # fine-tuning makes good for a pruned part more than for a rebuilt one, and what is rebuilt does not come
        # back: where there are other ways to fewer bytes it is not planned, but tried, one part at a time
        self.tried = rebuilding if any(d.name in _PLANNED for d in profile.space) else []

    # ------------------------------------------------------------ Optuna's protocol

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return distributions(self.profile.space)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """For what a foreign study asks beside the space: at random."""
        return self._random.sample_independent(study, trial, param_name, param_distribution)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        chosen, attributes = self.next(study, trial.number)
        for name, value in attributes.items():
            study._storage.set_trial_user_attr(trial._trial_id, name, value)
            trial.set_user_attr(name, value)  # what the objective sees was read before
        return {key: chosen[key] for key in search_space}

    # ------------------------------------------------------------ proposals

    def next(self, study: Study, number: int) -> tuple[dict[str, Choice], dict[str, Any]]:
        """(choices, user attributes) of trial `number` of the study, which need not be there yet. Raises SamplerError
        when the study is not one of bytes and accuracy."""
        if study.directions != [StudyDirection.MINIMIZE, StudyDirection.MAXIMIZE]:
            raise SamplerError(
                "this sampler needs a study of two objectives, bytes and accuracy: "
                'optuna.create_study(directions=["minimize", "maximize"])'
            )
        trials = study.get_trials(deepcopy=False)
        for finished in trials:
            if finished.state == TrialState.COMPLETE and finished.number not in self._points:
                point = self._points[finished.number] = Point(finished, self.dimensions)
                if point.move == "train" and point.parent in self._points:
                    point.trained = self._points[point.parent].trained + 1
            if finished.state == TrialState.PRUNED and finished.number not in self._stopped:
                stopped = Stopped.of(finished, self.dimensions)
                if stopped is not None:
                    self._stopped[finished.number] = stopped
        if self.race:
            self.race.note([t for t in trials if t.number != number])
        done = [self._points[known] for known in sorted(self._points)]
        running = [t for t in trials if t.state == TrialState.RUNNING and t.number != number]
        proposal = self.propose(done, running, number, random.Random(f"{self.seed} {number}"))
        assert proposal.chosen is not None
        return proposal.chosen, proposal.attributes()

    def propose(
        self, done: Sequence[Point], running: Sequence[FrozenTrial], number: int, rng: random.Random
    ) -> Proposal:
        first, last, count = self._walk(1 + len(running))
        if self.race and self.budget >= _RACE_FROM:
            learning_rate = self.race.next(len(running))
            if learning_rate is not None:
                racer = self._step([], self._raced_bytes(), rng, noise=0.0)
                assert racer.chosen is not None
                return replace(racer, move=RACE, chosen={**racer.chosen, self.race.key: learning_rate})
            number -= self.race.trials
        walked = [p for p in done if p.move != RACE]
        if number >= count or self._over(walked):
            if done:
                return self._improve(done, running, rng)
            return self._step(done, first, rng, noise=0.5)
        going = [t.user_attrs["target_bytes"] for t in running if t.user_attrs.get("move", RACE) != RACE]
        taken = [*going, *(p.size for p in walked)]
        if not taken:
            return self._step(done, first, rng, noise=0.0)
        lowest = min(taken)
        target = lowest * min(last / lowest, 0.97) ** (1 / (count - number))
        ancestor = self._ancestor(done, target)
        largest = ancestor.size if ancestor else first
        shortest = largest * _LONGEST ** max(1.0, 0.0 if ancestor else len(going) / count)
        if target >= shortest:
            return self._step(done, target, rng, noise=0.0)
        # many workers, few ancestors: the same bytes in different ways, where they are fewest
        marks = sorted([shortest, largest, *(size for size in taken if shortest < size < largest)])
        below, above = max(itertools.pairwise(marks), key=lambda pair: pair[1] / pair[0])
        return self._step(done, math.sqrt(below * above), rng, noise=0.5)

    def _walk(self, workers: int = 1) -> tuple[float, float, int]:
        """Bytes at which it begins and ends, and its steps: geometric, from light to heavy compression."""
        default, smallest = self._default_bytes, self.profile.smallest_bytes()
        first = min(0.22 * default, self._uniform_bytes)
        last = max(smallest * 1.1, default / 1200)
        if self.max_size_bytes is not None:
            last = max(smallest, min(first, self.max_size_bytes) * _ENOUGH)
            first = max(first, last * 1.5)
        first = max(first, last * 1.2)
        share = WALK / math.sqrt(max(workers / _WALKERS, 1.0))
        count = min(max(1, round(share * self.budget), min(self.budget, _FEWEST)), _MOST)
        return first, max(last, first * _LONGEST ** (count - 1)), count

    def _raced_bytes(self) -> float:
        """Of the recipe that learning rates are raced by."""
        first, last, _ = self._walk()
        return first * math.exp(_RACED * math.log(last / first))

    @cached_property
    def _uniform_bytes(self) -> float:
        """Bytes of a mild recipe: every dimension of bytes one third of the way."""
        chosen = self.profile.default()
        for key, d in self.dimensions.items():
            if d.name in ("weights", "sparsity"):
                chosen[key] = d.choices[len(d.choices) // 3]
        return self.profile.predict(chosen)

    def _over(self, done: Sequence[Point]) -> bool:
        """Whether the walk has come where accuracy, or fewer bytes, are no longer of use to anyone."""
        smallest = sorted(done, key=lambda p: p.size)[:2]
        return len(done) >= 4 and all(p.accuracy < self._least_useful or p.size <= self._least_bytes for p in smallest)

    def _step(
        self, done: Sequence[Point], target: float, rng: random.Random, noise: float, parent: Point | None = None
    ) -> Proposal:
        """A planned recipe of about `target` bytes, around the best ancestor."""
        parent = parent or self._ancestor(done, target)
        chosen = parent.reached if parent else self.profile.default()
        start = self._trained(chosen, parent, target, rng, change=noise > 0)
        correction = self._correction(done, parent, start)
        effects, allowed = self._effects(parent, rng, noise), self._allowed(parent, noise > 0)
        chosen = plan(self.profile, effects, target / correction, start, allowed)
        predicted = self.profile.predict(chosen) * correction
        return Proposal("step", parent, target, parent.as_asked(chosen) if parent else chosen, predicted)

    def _improve(self, done: Sequence[Point], running: Sequence[FrozenTrial], rng: random.Random) -> Proposal:
        """What is expected to add most to the front, whatever comes of those that are on their way, and none of them
        once more."""
        front, region = self._front(done), self._region(done)
        going = [t.user_attrs for t in running if t.user_attrs.get("deviation") is not None]
        taken = {_key(told) for told in going}
        every = self._proposals(front, done, rng)
        proposals = [p for p in every if _key(p.attributes()) not in taken] or every
        steps = [self._as_step(p.move, p.parent, p.target_bytes, region) for p in proposals]
        mean, deviation = self._forecast(done, region)(steps)
        mean += math.log(region.ceiling - self.base_accuracy)
        sizes = np.array([p.target_bytes for p in proposals])
        pending = [(told["target_bytes"], told["expected_accuracy"], told["deviation"]) for told in going]
        fronts = drawn_fronts([(p.size, p.accuracy) for p in front], pending, region.ceiling, rng)
        gains = np.mean([expected_improvement(drawn, region, sizes, mean, deviation) for drawn in fronts], axis=0)
        at = int(gains.argmax()) if gains.max() > 0 else int(sizes.argmin())
        best = proposals[at]
        if best.chosen is None:
            known = [p.chosen for p in done] + [p.chosen for p in self._stopped.values()] + [t.params for t in running]
            for noise in (0.4, 0.8, 1.6):
                best = self._step(done, best.target_bytes, rng, noise, best.parent)
                if best.chosen not in known:
                    break
        elif best.parent is not None:
            best.chosen = best.parent.as_asked(best.chosen)
        best.expected_accuracy = region.ceiling - math.exp(mean[at])
        best.deviation = float(deviation[at])
        return best

    def _proposals(self, front: list[Point], done: Sequence[Point], rng: random.Random) -> list[Proposal]:
        """What could be tried next; steps are planned once one is chosen."""
        useful = [p for p in front if p.accuracy >= self._least_useful] or front
        out = [Proposal("step", p, p.size * share) for p in useful for share in _SHARES]
        if self.max_size_bytes is not None:
            out += [Proposal("step", p, _AIM * self.max_size_bytes) for p in useful if p.size > self.max_size_bytes]
        if self.trains:
            out += [self._as_it_is("train", p.reached, p, done, rng) for p in useful]
        for larger in rng.sample(useful[:-1], min(len(useful) - 1, 3)):
            out.append(self._crossover(larger, useful[useful.index(larger) + 1], done, rng))
        if self.tried:
            out += [self._rebuild(p, done, rng) for p in rng.sample(useful, min(len(useful), 2))]
        return out

    @cached_property
    def _least_useful(self) -> float:
        """An accuracy from which a file of use may still come."""
        if self.min_accuracy is None:
            return self.base_accuracy - self._useful
        return self.min_accuracy - _NEARLY * self._useful

    @cached_property
    def _least_bytes(self) -> float:
        """Smaller files earn no more."""
        if self.max_size_bytes is None or self.min_accuracy is not None:
            return self.profile.smallest_bytes() / 4
        return _ENOUGH * self.max_size_bytes

    def _region(self, done: Sequence[Point]) -> Region:
        """What is asked for is worth most when it is met."""
        least, accuracy_margin = self.base_accuracy - self._useful, 0.0
        largest, size_margin = self._default_bytes, 0.0
        if self.max_size_bytes is not None:
            largest, size_margin = self.max_size_bytes, _SIZE_MET
        if self.min_accuracy is not None:
            least, accuracy_margin = self.min_accuracy, _ACCURACY_MET * self._useful
            largest = min([largest, *(p.size * _FAR for p in done if p.accuracy >= least)])
        best = max([self.base_accuracy, *(p.accuracy for p in done)])
        ceiling = best + _UNIT * self._useful
        return Region(self._least_bytes, largest, least, ceiling, size_margin, accuracy_margin)

    def _forecast(self, done: Sequence[Point], region: Region) -> Forecast:
        known = {p.number: p for p in done}
        children = [(p.number, p.move, known[p.parent], p.size, p.accuracy) for p in done if p.parent in known]
        gains: dict[str, list[float]] = {}
        for p in done:
            for rung, accuracy in p.rungs.items():
                gains.setdefault(rung, []).append(p.accuracy - accuracy)
        # stopped ones would have gained by the rest of their training what others did
        gained = {rung: float(np.median(each)) for rung, each in gains.items()}
        for number, s in self._stopped.items():
            if s.parent in known and s.rung in gained:
                parent = known[s.parent]
                children.append((number, s.move, parent, s.size, min(s.accuracy + gained[s.rung], parent.accuracy)))
        unit = region.ceiling - self.base_accuracy
        return Forecast(
            [
                (self._as_step(move, parent, size, region), (region.ceiling - accuracy) / unit)
                for _, move, parent, size, accuracy in sorted(children, key=lambda child: child[0])
            ]
        )

    def _as_step(self, move: str, parent: Point | None, size: float, region: Region) -> Step:
        assert parent is not None
        level = math.log2(self._default_bytes / parent.size)
        lacking = (region.ceiling - parent.accuracy) / (region.ceiling - self.base_accuracy)
        return Step(move, math.log2(parent.size / size), level, lacking, parent.trained, parent.number)

    def _rebuild(self, parent: Point, done: Sequence[Point], rng: random.Random) -> Proposal:
        """The parent with another structure of one part."""
        key = rng.choice(self.tried)
        others = [c for c in self.dimensions[key].choices if c != parent.chosen[key] and self._follows(key, parent, c)]
        chosen = {**parent.reached, key: rng.choice(others)} if others else parent.reached
        return self._as_it_is("rebuild", chosen, parent, done, rng)

    def _crossover(self, larger: Point, smaller: Point, done: Sequence[Point], rng: random.Random) -> Proposal:
        """Each layer from one of two neighbours on the front; weights from the one whose channels allow."""
        pick = {site: rng.random() < 0.5 for site in self._sites}
        chosen = {key: (smaller if pick[d.site] else larger).reached[key] for key, d in self.dimensions.items()}
        for key in self._permanent:
            if not self._follows(key, larger, chosen[key]):
                chosen[key] = larger.reached[key]
        return self._as_it_is("cross", chosen, larger, done, rng)

    def _as_it_is(
        self, move: str, chosen: Mapping[str, Choice], parent: Point, done: Sequence[Point], rng: random.Random
    ) -> Proposal:
        """A recipe that is not planned: its bytes are what they are."""
        chosen = self._trained(chosen, parent, parent.size, rng)
        predicted = self.profile.predict(chosen) * self._correction(done, parent, chosen)
        return Proposal(move, parent, predicted, chosen, predicted)

    # ------------------------------------------------------------ judgement

    def _front(self, done: Sequence[Point]) -> list[Point]:
        """Non-dominated points, largest first."""
        keep = non_dominated([(p.size, p.accuracy) for p in done])
        return sorted((done[i] for i in keep), key=lambda p: -p.size)

    def _follows(self, key: str, parent: Point, choice: Choice) -> bool:
        """Whether the parent can go on with this choice of a permanent dimension: what was taken away for good does
        not come back."""
        technique, site = self._permanent[key], key.rpartition(":")[0]
        return technique.follows(parent.chosen[key], choice) and not any(
            technique.voids(choice, site, dimension, other) for dimension, other in parent.rebuilt if other != site
        )

    def _ancestor(self, done: Sequence[Point], target: float) -> Point | None:
        """The member of the front that is larger than the target by least, in bytes and in lost accuracy."""
        larger = [p for p in self._front(done) if p.size >= 0.98 * target]
        if not larger:
            return None

        def expected(p: Point) -> float:
            step = max(math.log2(p.size / target), 0.0)
            return p.accuracy - self._skill * (_STEP * step + _LEAP * step**2)

        return max(larger, key=expected)

    def _correction(self, done: Sequence[Point], parent: Point | None, chosen: Mapping[str, Choice]) -> float:
        """File over predicted bytes: the parent's own, moved by what training usually does to it."""
        if parent is None:
            return 1.0
        if self._bytes_forecast is None or self._bytes_forecast[0] != len(done):
            known = {p.number: p for p in done}
            pairs = [
                (known[p.parent].chosen, p.chosen, math.log(self._ratio(p) / self._ratio(known[p.parent])))
                for p in done
                if p.parent in known
            ]
            self._bytes_forecast = (
                len(done),
                BytesForecast({key: d.choices for key, d in self._training.items()}, pairs),
            )
        return self._ratio(parent) * self._bytes_forecast[1](parent.chosen, chosen)

    def _ratio(self, point: Point) -> float:
        """File over predicted bytes."""
        if point.number not in self._ratios:
            self._ratios[point.number] = point.size / self.profile.predict(point.reached)
        return self._ratios[point.number]

    def _effects(self, parent: Point | None, rng: random.Random, noise: float) -> Floats:
        """float64 [dimensions, choices]: those of the profile, scaled per dimension by what was probed at the parent's
        weights."""
        effects, scale = self.profile.effect_table, np.ones(len(self.dimensions))
        least, zero = np.full(effects.shape, 1e-6), np.zeros(len(effects))
        if parent:
            present = np.arange(len(effects)), self.profile.place(parent.reached)
            least[present], zero = 0.0, effects[present]
        for key, known in self.profile.effects.items():
            at = self.profile.at[key]
            for choice, effect in (parent.effects.get(key, {}) if parent else {}).items():
                foreseen = max(known.get(choice, 0.0) - zero[at], 1e-5)
                scale[at] = min(max((effect + 1e-5) / foreseen, 0.02), 50.0)
            scale[at] *= math.exp(noise * rng.gauss(0, 1))
        rises: Floats = np.maximum(effects - zero[:, None], -zero[:, None] * 0.5) * scale[:, None]
        rises += least
        return rises

    def _allowed(self, parent: Point | None, both_ways: bool) -> dict[str, tuple[Choice, ...]]:
        """Choices within reach of the parent's: heavier ones, and lighter ones when refining."""
        allowed = {}
        for key, d in self.dimensions.items():
            if d.name in trainings() or key in self.tried:
                continue
            if parent is None:
                allowed[key] = d.choices
                continue
            at = d.choices.index(parent.reached[key])
            low = at if d.name in ("sparsity", "weights") else 0
            if low and both_ways and parent.reached[key] == parent.chosen[key]:
                low -= 1
            high = at + 1 + math.ceil(_REACH * len(d.choices)) if d.name in _PLANNED else len(d.choices)
            near = d.choices[low:high]
            permanent = key in self._permanent
            allowed[key] = tuple(c for c in near if self._follows(key, parent, c)) if permanent else near
        return allowed

    def _trained(
        self, chosen: Mapping[str, Choice], parent: Point | None, target: float, rng: random.Random, change: bool = True
    ) -> dict[str, Choice]:
        """Choices without a measurable effect are inherited and, where they may, sometimes changed, few at a time; a
        learning rate is the race's, the more so the smaller the file."""
        chosen = dict(chosen)
        for key, d in self._training.items():
            if self.race and key == self.race.key:
                first, raced = self._walk()[0], self._raced_bytes()
                share = math.log(first / target) / math.log(first / raced) if raced < first else 0.0
                chosen[key] = self.race.learning_rate(min(max(share, 0.0), 1.0))
            elif parent is None:
                # a price of bits pays from the start: the middle one
                priced = trainings()[d.name].penalty(d.choices[-1])
                chosen[key] = d.choices[len(d.choices) // 2 if priced else 0]
            elif change and rng.random() < min(0.2, 0.8 / len(self._training)):
                chosen[key] = rng.choice(d.choices)
            else:
                chosen[key] = parent.chosen[key]
        return chosen
