"""autocompress: give it a trained PyTorch model, data and a budget; it returns the Pareto front of size
versus accuracy, as files that can be shipped.
"""

from autocompress import techniques as techniques
from autocompress.artifact import Artifact, load, read_artifact
from autocompress.errors import AutocompressError
from autocompress.evaluate import Evaluation, evaluate
from autocompress.export import Exported, export
from autocompress.front import FrontPoint, ParetoFront
from autocompress.recipe import Recipe
from autocompress.search.controller import Progress, profile, resume, search
from autocompress.search.profile import Profile
from autocompress.search.sampler import FrontierSampler
from autocompress.space import SearchSpace
from autocompress.task import Task
from autocompress.trial import Workshop
from autocompress.version import __version__

__all__ = [
    "Artifact",
    "AutocompressError",
    "Evaluation",
    "Exported",
    "FrontPoint",
    "FrontierSampler",
    "ParetoFront",
    "Profile",
    "Progress",
    "Recipe",
    "SearchSpace",
    "Task",
    "Workshop",
    "__version__",
    "evaluate",
    "export",
    "load",
    "profile",
    "read_artifact",
    "resume",
    "search",
]
