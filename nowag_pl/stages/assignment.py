"""The method by which each linear of a model is compressed."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from nowag_pl.compressors import Compressor
from nowag_pl.compressors.budget import changed
from nowag_pl.models.selection import Selection, matching
from nowag_pl.stages.plan import CompressionSettings

OPTION = "compression.overrides"


@dataclasses.dataclass(frozen=True)
class Assignment:
    """The method of every linear.

    Attributes:
        methods: the methods.
        numbers: whole name of a linear to the number of its method; those that are not named have the first one.
    """

    methods: Sequence[Compressor]
    numbers: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def method(self, name: str) -> Compressor:
        """Return the method of a linear by its whole name."""
        return self.methods[self.numbers.get(name, 0)]

    @property
    def full_second_moment(self) -> bool:
        """Whether a method needs the matrices of x x^T."""
        return any(method.full_second_moment for method in self.methods)

    @property
    def output_moment(self) -> bool:
        """Whether a method needs second moments of gradients at the outputs."""
        return any(method.output_moment for method in self.methods)


def assignment_of(settings: CompressionSettings, names: Sequence[Sequence[str]]) -> Assignment:
    """Return the method of every linear by the settings, before a budget chooses among candidates.

    Args:
        settings: the method, and its overrides for some linears; of two patterns that match a linear, the later
            one holds.
        names: for each block, the whole names of its linears.

    Raises:
        ValueError: a pattern matches nothing, or settings do not belong to the method.
    """
    methods = [settings.compressor]
    numbers: dict[str, int] = {}
    for pattern, override in settings.overrides.items():
        method = override if isinstance(override, Compressor) else changed(settings.compressor, dict(override), OPTION)
        numbers |= dict.fromkeys(matching(pattern, names, OPTION), len(methods))
        methods.append(method)
    return Assignment(methods, numbers)


def selection_of(settings: CompressionSettings | None) -> Selection | None:
    """Return which linears are compressed; None if none are."""
    return None if settings is None else Selection(settings.targets, settings.ignore)


def describe(settings: CompressionSettings) -> dict[str, Any]:
    """Return method, patterns and overrides as JSON values, for the manifest; patterns only if there are any."""
    described = settings.compressor.describe()
    if settings.targets is not None:
        described["targets"] = list(settings.targets)
    if settings.ignore:
        described["ignore"] = list(settings.ignore)
    if settings.overrides:
        described["overrides"] = {
            pattern: override.describe() if isinstance(override, Compressor) else dict(override)
            for pattern, override in settings.overrides.items()
        }
    return described


def title(settings: CompressionSettings) -> str:
    """Return the method in one line, for the report."""
    parts = [repr(settings.compressor)]
    parts += [f"{pattern}: {override}" for pattern, override in settings.overrides.items()]
    if settings.targets is not None:
        parts.append(f"targets {', '.join(settings.targets)}")
    if settings.ignore:
        parts.append(f"dense: {', '.join(settings.ignore)}")
    return "; ".join(parts)
