from . import techniques as techniques
from .agent.preparation import Progress
from .agent.profile import Profile
from .agent.sampler import FrontierSampler
from .artifact import Artifact, load, read_artifact
from .errors import AutocompressError
from .evaluation import Evaluation, evaluate
from .exporting import Exported, export
from .front import FrontPoint, ParetoFront
from .metric import WholeSplit
from .recipe import Recipe
from .searching import profile, resume, search
from .space import SearchSpace
from .task import Task
from .trial.workshop import Workshop
from .version import __version__

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
    "WholeSplit",
    "Workshop",
    "__version__",
    "evaluate",
    "export",
    "load",
    "profile",
    "read_artifact",
    "resume",
    "search",
    "techniques",
]
