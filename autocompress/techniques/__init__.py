"""Ways to compress, one file each. Every file in this folder is imported and registers itself."""

import importlib
import pkgutil

_ORDER = ("structure", "channels", "activation", "activation_bits", "sparsity", "floats", "integers")


def names() -> list[str]:
    """The files of techniques, in the order in which what they do is applied."""
    found = [module.name for module in pkgutil.iter_modules(__path__) if module.name != "base"]
    return sorted(found, key=lambda name: (_ORDER.index(name) if name in _ORDER else len(_ORDER), name))


for _name in names():
    importlib.import_module(f"{__name__}.{_name}")
