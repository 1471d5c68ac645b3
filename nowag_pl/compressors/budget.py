"""Settings of one method from which a budget of bits chooses one for each linear."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nowag_pl.compressors.base import Compressor
from nowag_pl.functional.ranges import check_real, check_whole


@dataclass(frozen=True)
class Budget:
    """Spread the bits of a compressor over the linears by how much the model's predictions depend on each.

    Args:
        candidates: settings that a linear may get instead of the compressor's own, given by the fields that differ,
            such as [{sparsity: 0.4}, {sparsity: 0.6}]. null: the candidates that the method offers.
        num_sequences: calibration sequences, the first ones, on which sensitivities are measured and the result is
            compared with the compressor's own settings everywhere.
        bits_per_weight: the most that all linears may take on average, such as 2.5 between the 2 and 3 bits of a
            trellis. null: what the compressor's own settings take everywhere.
    """

    candidates: list[dict[str, Any]] | None = None
    num_sequences: int = 16
    bits_per_weight: float | None = None

    def __post_init__(self) -> None:
        if self.bits_per_weight is not None:
            check_real("compression.budget.bits_per_weight", self.bits_per_weight, above=True)
        check_whole("compression.budget.num_sequences", self.num_sequences, 1)


def settings_of(compressor: Compressor, budget: Budget) -> list[Compressor]:
    """Return the compressor and its candidates, each once.

    Raises:
        ValueError: there are none, a candidate has a field that the compressor lacks, or a value is out of its range.
    """
    candidates = compressor.alternatives() if budget.candidates is None else budget.candidates
    if not candidates:
        raise ValueError(
            f"Expected settings among which compression.budget can choose, but {compressor!r} offers none. Give "
            "compression.budget.candidates, such as [{sparsity: 0.4}, {sparsity: 0.6}] or, for a pattern, "
            "[{pattern: [1, 4]}, {pattern: [3, 4]}]."
        )
    settings = [compressor]
    for changes in candidates:
        candidate = changed(compressor, changes, "compression.budget.candidates")
        if candidate not in settings:
            settings.append(candidate)
    return settings


def titles(settings: Sequence[Compressor]) -> list[str]:
    """Return the fields that distinguish each setting, such as "sparsity=0.4"; all fields for another method."""
    kind = type(settings[0])
    described = [_fields(compressor) for compressor in settings if type(compressor) is kind]
    differing = [name for name in described[0] if any(each[name] != described[0][name] for each in described)]
    return [
        ", ".join(f"{name}={getattr(each, name)}" for name in differing) if type(each) is kind else repr(each)
        for each in settings
    ]


def changed(compressor: Compressor, changes: Mapping[str, Any], option: str) -> Compressor:
    """Return a compressor with other settings.

    Args:
        compressor: a dataclass.
        changes: field to value.
        option: name of the changes in messages, such as "compression.budget.candidates".

    Raises:
        ValueError: the compressor is no dataclass, lacks a field, or a value is out of its range.
    """
    known = _fields(compressor)
    assert dataclasses.is_dataclass(compressor)
    if unknown := sorted(changes.keys() - known.keys()):
        raise ValueError(
            f"Expected fields of {type(compressor).__name__} in {option}, which are {', '.join(known)}, but got "
            f"{', '.join(unknown)}."
        )
    try:
        return dataclasses.replace(compressor, **changes)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{option}: {dict(changes)}: {error}") from error


def _fields(compressor: Compressor) -> dict[str, Any]:
    if not dataclasses.is_dataclass(compressor):
        raise ValueError(f"Expected a dataclass with compression.budget, but got {type(compressor).__name__}.")
    return {field.name: getattr(compressor, field.name) for field in dataclasses.fields(compressor)}
