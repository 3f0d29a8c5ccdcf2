"""Modules of benchmarks/, which is no package and must not be on the import path.

It holds a folder ``kernels``, which transformers would take for the package of that name.
"""

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

_FOLDER = Path(__file__).parents[2] / "benchmarks"


def load_benchmark(name: str) -> ModuleType:
    """Import one module that imports no other of its folder."""
    if name not in sys.modules:
        spec = spec_from_file_location(name, _FOLDER / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = module_from_spec(spec)  # dataclasses look themselves up there
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]
