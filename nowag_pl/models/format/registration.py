"""Register with transformers and PEFT as soon as they are imported, and import nothing before.

A finder in `sys.meta_path` waits for the modules in which transformers keeps its quantizers, which is imported with the
first model class, and PEFT the configuration of LoRA.
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

# What must have run before the module that extends it is imported.
_AWAITED = {
    "transformers.quantizers.auto": "nowag_pl.models.format.quantizer",
    "peft.tuners.lora.config": "nowag_pl.models.lora_registration",
}


def install() -> None:
    """Register now what is there, and the rest when it comes; once is enough."""
    for awaited, extension in _AWAITED.items():
        if awaited in sys.modules:
            import_module(extension)
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder:
    """Finds the awaited modules where they are, and registers when they have run."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return a module's own spec with a loader that registers, and nothing for other modules."""
        spec = PathFinder.find_spec(fullname, path, target) if fullname in _AWAITED else None
        if spec is None or spec.loader is None:
            return None
        run = spec.loader.exec_module

        def run_and_register(module: ModuleType) -> None:
            run(module)
            import_module(_AWAITED[fullname])

        spec.loader.exec_module = run_and_register  # type: ignore[method-assign]
        return spec
