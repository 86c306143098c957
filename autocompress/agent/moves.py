"""The moves from a finished trial to a candidate: plan a step, train on, cross with a neighbour, rebuild one part.

A candidate may only ask of its parent's weights what they can still become: what was taken away for good does not come
back. Its bytes are those predicted by the profile, corrected by what the file of its parent was.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence

import numpy as np

from autocompress.agent.candidate import Point, Proposal, front_of, is_permanent, rebuilds
from autocompress.agent.forecast import BytesForecast
from autocompress.agent.planner import plan
from autocompress.agent.profile import Floats, Profile
from autocompress.agent.race import Race
from autocompress.agent.suspects import Suspect
from autocompress.agent.walk import Walk
from autocompress.recipe import Choice
from autocompress.techniques.base import structures, trainings

_PLANNED = ("channels", "sparsity", "weights")
"""Dimensions that step from one choice to the next."""
_REACH = 0.2
"""Share of its levels that one dimension may move in one step."""
_STEP, _LEAP = 0.0135, 0.056
"""Share of its skill that a file is thought to lose with half its bytes, times the step and times its square."""


class Moves:
    """skill: the original's, the unit of accuracies. race: for a learning rate, if the space leaves one open.

    avoided: choices that candidates keep away from, where their parents do not have them.
    """

    def __init__(self, profile: Profile, walk: Walk, race: Race | None, skill: float) -> None:
        self.profile, self.walk, self.race, self.skill = profile, walk, race, skill
        self.dimensions = profile.dimensions
        self._sites = sorted({d.site for d in profile.space})
        self._training = {key: d for key, d in self.dimensions.items() if d.name in trainings()}
        self._permanent = {key: structures()[d.name] for key, d in self.dimensions.items() if is_permanent(d.name)}
        rebuilding = [key for key, d in self.dimensions.items() if rebuilds(d.name)]
        # fine-tuning repairs a pruned part better than a rebuilt one, and what is rebuilt does not come back: where
        # there are other ways to fewer bytes it is not planned, but tried, one part at a time
        self.tried = rebuilding if any(d.name in _PLANNED for d in profile.space) else []
        self.avoided: set[Suspect] = set()
        self._ratios: dict[int, float] = {}
        self._bytes_forecast: tuple[int, BytesForecast] | None = None

    def ancestor(self, done: Sequence[Point], target: float) -> Point | None:
        """The member of the front that is larger than the target by least, in bytes and in lost accuracy."""
        larger = [p for p in front_of(done) if p.size >= 0.98 * target]
        if not larger:
            return None

        def expected(p: Point) -> float:
            step = max(math.log2(p.size / target), 0.0)
            return p.accuracy - self.skill * (_STEP * step + _LEAP * step**2)

        return max(larger, key=expected)

    def step(
        self, done: Sequence[Point], target: float, rng: random.Random, noise: float, parent: Point | None = None
    ) -> Proposal:
        """A planned recipe of about `target` bytes, around the parent, or the best ancestor. noise: standard deviation
        of the logarithm that effects are multiplied by, so that plans differ."""
        parent = parent or self.ancestor(done, target)
        chosen = parent.reached if parent else self.profile.default()
        start = self._trained(chosen, parent, target, rng, change=noise > 0)
        correction = self._correction(done, parent, start)
        effects, allowed = self._effects(parent, rng, noise), self._allowed(parent, noise > 0)
        chosen = plan(self.profile, effects, target / correction, start, allowed)
        predicted = self.profile.predict(chosen) * correction
        return Proposal("step", parent, target, parent.as_asked(chosen) if parent else chosen, predicted)

    def train(self, parent: Point, done: Sequence[Point], rng: random.Random) -> Proposal:
        """The parent once more, from its own weights."""
        return self._as_it_is("train", parent.reached, parent, done, rng)

    def rebuild(self, parent: Point, done: Sequence[Point], rng: random.Random) -> Proposal:
        """The parent with another structure of one part."""
        key = rng.choice(self.tried)
        others = [c for c in self.dimensions[key].choices if c != parent.chosen[key] and self._follows(key, parent, c)]
        chosen = {**parent.reached, key: rng.choice(others)} if others else parent.reached
        return self._as_it_is("rebuild", chosen, parent, done, rng)

    def cross(self, larger: Point, smaller: Point, done: Sequence[Point], rng: random.Random) -> Proposal:
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

    def _follows(self, key: str, parent: Point, choice: Choice) -> bool:
        """Whether the parent can go on with this choice of a permanent dimension: what was taken away for good does
        not come back."""
        technique, site = self._permanent[key], key.rpartition(":")[0]
        return technique.follows(parent.chosen[key], choice) and not any(
            technique.voids(choice, site, dimension, other) for dimension, other in parent.rebuilt if other != site
        )

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
            choices = {key: d.choices for key, d in self._training.items()}
            self._bytes_forecast = len(done), BytesForecast(choices, pairs)
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
                expected = max(known.get(choice, 0.0) - zero[at], 1e-5)
                scale[at] = min(max((effect + 1e-5) / expected, 0.02), 50.0)
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
                allowed[key] = self._offered(key)
                continue
            at = d.choices.index(parent.reached[key])
            low = at if d.name in ("sparsity", "weights") else 0
            if low and both_ways and parent.reached[key] == parent.chosen[key]:
                low -= 1
            high = at + 1 + math.ceil(_REACH * len(d.choices)) if d.name in _PLANNED else len(d.choices)
            near = [c for c in d.choices[low:high] if c == parent.reached[key] or (key, c) not in self.avoided]
            permanent = key in self._permanent
            allowed[key] = tuple(c for c in near if not permanent or self._follows(key, parent, c))
        return allowed

    def _offered(self, key: str) -> tuple[Choice, ...]:
        """Choices of a dimension that need not be avoided; the default, which is never suspected, is one."""
        return tuple(c for c in self.dimensions[key].choices if (key, c) not in self.avoided)

    def _trained(
        self, chosen: Mapping[str, Choice], parent: Point | None, target: float, rng: random.Random, change: bool = True
    ) -> dict[str, Choice]:
        """Choices without a measurable effect are inherited and, where they may, sometimes changed, few at a time; a
        learning rate is the race's, the more so the smaller the file."""
        chosen = dict(chosen)
        for key, d in self._training.items():
            if self.race and key == self.race.key:
                chosen[key] = self.race.learning_rate(self.walk.depth(target))
            elif parent is None:
                # a price of bits pays from the start: the middle one
                priced, offered = trainings()[d.name].penalty(d.choices[-1]), self._offered(key)
                chosen[key] = offered[len(offered) // 2 if priced else 0]
            elif change and rng.random() < min(0.2, 0.8 / len(self._training)):
                chosen[key] = rng.choice(self._offered(key))
            else:
                chosen[key] = parent.chosen[key]
        return chosen
