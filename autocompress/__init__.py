"""autocompress: give it a trained PyTorch model, data and a budget; it returns the Pareto front of size
versus accuracy, as files that can be shipped.

The public names are those of `__init__.pyi`. Each is imported when it is first used, so that a command which needs no
torch does not wait for it (scientific Python's SPEC 1).
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
