"""Register the quantizer with transformers as soon as that is imported, and import nothing before.

A finder in `sys.meta_path` waits for the module in which transformers keeps its quantizers, which is imported with the
first model class.
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

_AWAITED = "transformers.quantizers.auto"


def install() -> None:
    """Register now if transformers' quantizers are there, or when they come; once is enough."""
    if _AWAITED in sys.modules:
        _register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _register() -> None:
    import_module("nowag_pl.models.format.quantizer")


class _Finder:
    """Finds the awaited module where it is, and registers when it has run."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the module's own spec with a loader that registers, and nothing for other modules."""
        spec = PathFinder.find_spec(fullname, path, target) if fullname == _AWAITED else None
        if spec is None or spec.loader is None:
            return None
        run = spec.loader.exec_module

        def run_and_register(module: ModuleType) -> None:
            run(module)
            _register()

        spec.loader.exec_module = run_and_register  # type: ignore[method-assign]
        return spec
