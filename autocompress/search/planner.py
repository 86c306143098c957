"""From effects and bytes to recipes: the cheapest distortion for a given size.

For a price per byte every dimension picks the choice of least effect + price x bytes (Lagrangian
bit allocation, Shoham and Gersho, 1988); the price is found by bisection on the predicted bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from autocompress.recipe import Choice
from autocompress.search.profile import Profile

Effects = Mapping[str, Mapping[str, float]]
Allowed = Mapping[str, tuple[Choice, ...]]


def plan(
    profile: Profile,
    effects: Effects,
    target_bytes: float,
    start: Mapping[str, Choice],
    allowed: Allowed,
    predict: Callable[[Mapping[str, Choice]], float] | None = None,
) -> dict[str, Choice]:
    """The recipe of least total effect whose predicted bytes are at most `target_bytes`.

    start: the point to leave from; what is not in `allowed` stays as there. predict: bytes of a recipe,
    `profile.predict` unless a better calibrated one is at hand. When even the heaviest allowed choices
    are larger than the target, these are returned.
    """
    predict = predict or profile.predict
    low, high = 0.0, 1e-9
    best = _relax(profile, effects, high, start, allowed)
    while predict(best) > target_bytes and high < 1e6:
        low, high = high, high * 10
        best = _relax(profile, effects, high, best, allowed)
    for _ in range(14):
        middle = (low * high) ** 0.5 if low else high / 2
        tried = _relax(profile, effects, middle, best, allowed)
        if predict(tried) > target_bytes:
            low = middle
        else:
            high, best = middle, tried
    return best


def _relax(
    profile: Profile, effects: Effects, price: float, start: Mapping[str, Choice], allowed: Allowed
) -> dict[str, Choice]:
    """Coordinate descent on effect + price x bytes from `start`."""
    chosen = dict(start)
    for _ in range(3):
        changed = False
        for key, choices in allowed.items():
            known = effects.get(key, {})
            present = chosen[key]
            costs = []
            for choice in choices:
                chosen[key] = choice
                costs.append(known.get(str(choice), 0.0) + price * profile.affected_bytes(key, chosen))
            chosen[key] = choices[costs.index(min(costs))]
            changed = changed or chosen[key] != present
        if not changed:
            break
    return chosen
