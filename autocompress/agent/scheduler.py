"""Stop a trial early when it is clearly dominated at its rung."""

from __future__ import annotations

from autocompress.agent.study import SearchStudy
from autocompress.trial.workshop import Rung

_SMALLER, _BETTER = 0.85, 0.045
"""Share of the predicted bytes, and share of the original's skill."""


def is_dominated(study: SearchStudy, number: int, rung: Rung, skill: float) -> bool:
    """Whether a finished trial that is clearly smaller was clearly more accurate at the same rung.

    skill: that of the original, the unit of accuracies.
    Bytes are nearly known before training ends, so the predicted bytes stand in for the trial's own;
    the margins leave room for what the rest of fine-tuning may still win.
    """
    predicted = study.get(number).user_attrs.get("predicted_bytes")
    if rung.val_accuracy is None or predicted is None:
        return False
    for other in study.complete():
        then = other.user_attrs.get(f"rung_{rung.epoch}")
        if then is not None and other.values[0] <= _SMALLER * predicted and then >= rung.val_accuracy + _BETTER * skill:
            return True
    return False
