"""The file on disk: the truth about size and accuracy."""

from autocompress.artifact.container import Artifact, StoredTensor, read_artifact
from autocompress.artifact.pack import Weights, load, pack, unpack

__all__ = [
    "Artifact",
    "StoredTensor",
    "Weights",
    "load",
    "pack",
    "read_artifact",
    "unpack",
]
