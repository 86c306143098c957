"""Peak learning rate of fine-tuning, as a multiple of the task's own.

Heavy compression takes larger rates than light, by a factor that differs from task to task; the frontier sampler
finds it by a race of a few trials. A rate is the first thing to tune (Bengio, Practical Recommendations for
Gradient-Based Training of Deep Architectures, 2012).

Not for tasks of no epochs, which train nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from autocompress.recipe import Choice
from autocompress.techniques.base import TrainingTechnique, number_in, register


class LearningRate(TrainingTechnique):
    name = "learning_rate"
    default = 1.0
    about = "peak learning rate of fine-tuning, in multiples of the task's"

    def examples(self) -> Sequence[Choice]:
        return (1.0, 0.5, 2.0)

    def parse(self, raw: Any) -> Choice:
        return number_in(raw, 0.01, 100.0, "give a multiple of the task's rate")

    def learning_rate_factor(self, choice: Choice) -> float:
        return float(choice)


register(LearningRate())
