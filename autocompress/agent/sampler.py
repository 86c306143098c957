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

import math
import random
from collections.abc import Container, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState

from autocompress.agent.acquisition import Region, drawn_fronts, expected_improvement
from autocompress.agent.aim import ENOUGH, Aim
from autocompress.agent.candidate import Point, Proposal, Stopped, front_of, identity
from autocompress.agent.forecast import Forecast, Step
from autocompress.agent.moves import Moves
from autocompress.agent.profile import Profile
from autocompress.agent.race import RACE, Race, has_learning_rates
from autocompress.agent.suspects import Suspects
from autocompress.agent.walk import LONGEST, Walk
from autocompress.errors import SamplerError
from autocompress.recipe import Choice
from autocompress.space import BoundSpace

_SHARES = (0.97, 0.9, 0.8, 0.65, 0.5, LONGEST)
"""Of the parent's bytes: the steps that are weighed against each other. Improving goes both ways, so the shortest swaps
one layer's level for another's at about equal bytes (EvoPress, Sieberling et al., 2024)."""
_AIMED = 0.98
"""Share of a size to meet that a step towards it aims at."""
_RACE_FROM = 20
"""Trials of the smallest budget with a race."""
_VARIED, _MORE_VARIED = 0.5, (0.4, 0.8, 1.6)
"""Noise of the effects by which a plan differs from one of the same bytes; and those that are tried, one after the
other, until a recipe is new."""


def distributions(space: BoundSpace) -> dict[str, BaseDistribution]:
    """The space as Optuna is asked for it."""
    return {d.key: CategoricalDistribution(d.choices) for d in space}


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
        self.profile, self.seed, self.trains = profile, seed, trains
        self.aim = Aim(profile, base_accuracy, chance_accuracy, max_size_bytes, min_accuracy)
        self.walk = Walk(profile, self.aim, budget)
        self.race = next((Race(d, base_accuracy) for d in profile.space if has_learning_rates(d)), None)
        self.moves = Moves(profile, self.walk, self.race, self.aim.skill)
        self._random = RandomSampler(seed=seed)
        self._points: dict[int, Point] = {}
        self._stopped: dict[int, Stopped] = {}
        self._suspects = Suspects(profile.default())

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
        others = [t for t in study.get_trials(deepcopy=False) if t.number != number]
        self._note(others)
        done = [self._points[known] for known in sorted(self._points)]
        running = [t for t in others if t.state == TrialState.RUNNING]
        proposal = self.propose(done, running, number, random.Random(f"{self.seed} {number}"))
        assert proposal.chosen is not None
        return proposal.chosen, proposal.attributes()

    def _note(self, trials: Sequence[FrozenTrial]) -> None:
        """Learn of those that have ended since."""
        for trial in trials:
            if trial.state == TrialState.COMPLETE and trial.number not in self._points:
                point = self._points[trial.number] = Point(trial, self.profile.dimensions)
                if point.move == "train" and point.parent in self._points:
                    point.trained = self._points[point.parent].trained + 1
            if trial.state == TrialState.PRUNED and trial.number not in self._stopped:
                stopped = Stopped.of(trial, self.profile.dimensions)
                if stopped is not None:
                    self._stopped[trial.number] = stopped
        self._suspects.note(trials)
        if self.race:
            self.race.note(trials)

    def propose(
        self, done: Sequence[Point], running: Sequence[FrozenTrial], number: int, rng: random.Random
    ) -> Proposal:
        workers = 1 + len(running)
        self.moves.avoided = self._suspects.drawn(rng)
        limit = self.aim.max_size_bytes
        if limit is not None and number >= self.walk.budget - 1 and all(p.size > limit for p in done):
            # now or never, so not within reach of a parent
            return self._new_step([], ENOUGH * limit, rng, (0.0, *_MORE_VARIED), self._known(done, running))
        if self.race and self.walk.budget >= _RACE_FROM:
            learning_rate = self.race.next(len(running))
            if learning_rate is not None:
                racer = self.moves.step([], self.walk.raced_bytes(), rng, noise=0.0)
                assert racer.chosen is not None
                return replace(racer, move=RACE, chosen={**racer.chosen, self.race.key: learning_rate})
            number -= self.race.trials
        walked = [p for p in done if p.move != RACE]
        first, _, steps = self.walk.ends(workers)
        if number >= steps or self.aim.over(walked):
            return self._improve(done, running, rng) if done else self.moves.step(done, first, rng, _VARIED)
        going = [t.user_attrs["target_bytes"] for t in running if t.user_attrs.get("move", RACE) != RACE]

        def ancestor(size_bytes: float) -> float | None:
            found = self.moves.ancestor(done, size_bytes)
            return found.size if found else None

        target, again = self.walk.target(number, workers, [p.size for p in walked], going, ancestor)
        noises = (_VARIED if again else 0.0, *_MORE_VARIED)
        return self._new_step(done, target, rng, noises, self._suspects.failed)

    def _improve(self, done: Sequence[Point], running: Sequence[FrozenTrial], rng: random.Random) -> Proposal:
        """What is expected to add most to the front, whatever comes of those that are on their way, and none of them
        once more."""
        front, region = front_of(done), self.aim.region(done)
        going = [t.user_attrs for t in running if t.user_attrs.get("deviation") is not None]
        taken = {identity(attributes) for attributes in going}
        every = self._proposals(front, done, rng)
        proposals = [p for p in every if identity(p.attributes()) not in taken and not self._doubtful(p)] or every
        steps = [self._as_step(p.move, p.parent, p.target_bytes, region) for p in proposals]
        mean, deviation = self._forecast(done, region)(steps)
        mean += math.log(region.ceiling - self.aim.base_accuracy)
        sizes = np.array([p.target_bytes for p in proposals])
        pending = [(told["target_bytes"], told["expected_accuracy"], told["deviation"]) for told in going]
        fronts = drawn_fronts([(p.size, p.accuracy) for p in front], pending, region.ceiling, rng)
        gains = np.mean([expected_improvement(drawn, region, sizes, mean, deviation) for drawn in fronts], axis=0)
        at = int(gains.argmax()) if gains.max() > 0 else int(sizes.argmin())
        best = proposals[at]
        if best.chosen is None:
            known = self._known(done, running)
            best = self._new_step(done, best.target_bytes, rng, _MORE_VARIED, known, best.parent)
        elif best.parent is not None:
            best.chosen = best.parent.as_asked(best.chosen)
        best.expected_accuracy = region.ceiling - math.exp(mean[at])
        best.deviation = float(deviation[at])
        return best

    def _known(self, done: Sequence[Point], running: Sequence[FrozenTrial]) -> list[Mapping[str, Choice]]:
        """Recipes that have been asked for."""
        known = [p.chosen for p in done] + [p.chosen for p in self._stopped.values()] + [t.params for t in running]
        return known + self._suspects.failed

    def _new_step(
        self,
        done: Sequence[Point],
        target: float,
        rng: random.Random,
        noises: Sequence[float],
        known: Container[Mapping[str, Choice]],
        parent: Point | None = None,
    ) -> Proposal:
        """A step whose recipe is not among the known ones, by the first noise that makes one, or the last."""
        for noise in noises:
            proposal = self.moves.step(done, target, rng, noise, parent)
            if proposal.chosen not in known:
                break
        return proposal

    def _doubtful(self, proposal: Proposal) -> bool:
        """Whether it would fail again, or has a choice to keep away from."""
        if not self._suspects.failed or proposal.chosen is None or proposal.parent is None:
            return False
        asked = proposal.parent.as_asked(proposal.chosen)
        return asked in self._suspects.failed or not self.moves.avoided.isdisjoint(asked.items())

    def _proposals(self, front: list[Point], done: Sequence[Point], rng: random.Random) -> list[Proposal]:
        """What could be tried next; steps are planned once one is chosen."""
        least = self.aim.least_accuracy(done)
        useful = [p for p in front if p.accuracy >= least] or front
        out = [Proposal("step", p, p.size * share) for p in useful for share in _SHARES]
        limit = self.aim.max_size_bytes
        if limit is not None:
            out += [Proposal("step", p, _AIMED * limit) for p in useful if p.size > limit]
        if self.trains:
            out += [self.moves.train(p, done, rng) for p in useful]
        for larger in rng.sample(useful[:-1], min(len(useful) - 1, 3)):
            out.append(self.moves.cross(larger, useful[useful.index(larger) + 1], done, rng))
        if self.moves.tried:
            out += [self.moves.rebuild(p, done, rng) for p in rng.sample(useful, min(len(useful), 2))]
        return out

    def _forecast(self, done: Sequence[Point], region: Region) -> Forecast:
        """From all pairs of parent and child, in the order of their trials."""
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
        unit = region.ceiling - self.aim.base_accuracy
        return Forecast(
            [
                (self._as_step(move, parent, size, region), (region.ceiling - accuracy) / unit)
                for _, move, parent, size, accuracy in sorted(children, key=lambda child: child[0])
            ]
        )

    def _as_step(self, move: str, parent: Point | None, size: float, region: Region) -> Step:
        assert parent is not None
        level = math.log2(self.aim.original_bytes / parent.size)
        lacking = (region.ceiling - parent.accuracy) / (region.ceiling - self.aim.base_accuracy)
        return Step(move, math.log2(parent.size / size), level, lacking, parent.trained, parent.number)
