"""Profiles that were measured before: kept by the content that they were measured on.

In `$XDG_CACHE_HOME/autocompress/profiles` (`~/.cache` by default), one JSON file each; safe to delete.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import pickle
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import autocompress
from autocompress.errors import ArtifactError
from autocompress.files import write_file
from autocompress.model.surgery import tensors
from autocompress.nested import leaves
from autocompress.trial.probing import MANY_PROBES, choice_count, needed_choices
from autocompress.trial.workshop import Workshop


def measured_profile(
    workshop: Workshop, measure: Callable[[], dict[str, Any]] | None = None, probes: int = MANY_PROBES
) -> dict[str, Any]:
    """What `measure` (`workshop.base_profile` by default) gives, from the cache where the same was measured before, by
    as many choices as `probes` allow."""
    path = _folder() / f"{_digest(workshop)}.json"
    known = known_profile(path)
    if known and known["probes"] >= choice_count(needed_choices(workshop.space, workshop.anatomy, probes)):
        return known
    measured = (measure or workshop.base_profile)()
    try:
        write_file(path, json.dumps(measured).encode())
    except ArtifactError as error:  # no home, or a full one: measured again the next time
        logging.getLogger("autocompress").info("the profile was not kept in %s: %s", path, error)
    return measured


def known_profile(path: Path) -> dict[str, Any] | None:
    """What is in a file of a profile; None where it is not there, or broken."""
    try:
        known: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return known


def _folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "autocompress" / "profiles"


def _digest(workshop: Workshop) -> str:
    """Of the model, the calibration batches, the space, and every line that measures."""
    digest = hashlib.sha256(_sources())
    for name, tensor in tensors(workshop.original).items():
        digest.update(name.encode())
        digest.update(_bytes(tensor))
    for leaf in leaves(list(workshop.calibration.batches)):
        digest.update(_bytes(leaf))
    forward = workshop.task.forward
    asked = [workshop.task.name, str(forward and getattr(forward, "__qualname__", forward)), str(workshop.original)]
    asked += [f"{d.key} {d.choices}" for d in workshop.space]
    digest.update("\n".join(asked).encode())
    return digest.hexdigest()[:32]


@cache
def _sources() -> bytes:
    """Digest of this package: another technique, probe or coder measures something else."""
    digest = hashlib.sha256()
    for file in sorted(Path(autocompress.__file__).parent.rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.digest()


def _bytes(leaf: Any) -> bytes:
    """Of a tensor, or of whatever else batches are made of."""
    if isinstance(leaf, Tensor) and leaf.layout == torch.sparse_coo:
        known = leaf.detach().coalesce()
        return _bytes(known.indices()) + _bytes(known.values())
    if isinstance(leaf, Tensor) and leaf.layout == torch.strided:
        data = leaf.detach().cpu().contiguous()
        return f"{data.dtype} {tuple(data.shape)}".encode() + data.flatten().view(torch.uint8).numpy().tobytes()
    try:
        return pickle.dumps(leaf)
    except Exception:  # nobody knows whether it is the same: measured again
        return os.urandom(32)
