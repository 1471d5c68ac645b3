"""Settings of one method among which a budget of bits chooses for each linear."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nowag_pl.compressors.base import Compressor


@dataclass(frozen=True)
class Budget:
    """Spread the bits of a compressor over the linears by how much the model's predictions depend on each.

    Args:
        candidates: settings among which each linear gets one, beside the compressor's own: what differs from it, such
            as [{sparsity: 0.4}, {sparsity: 0.6}]. null: those that the method offers.
        num_sequences: calibration sequences, the first ones, on which sensitivities are measured and the result is
            compared with the compressor's own settings everywhere.
    """

    candidates: list[dict[str, Any]] | None = None
    num_sequences: int = 16

    def __post_init__(self) -> None:
        if self.num_sequences < 1:
            raise ValueError(f"Expected compression.budget.num_sequences of at least 1, but got {self.num_sequences}.")


@dataclass(frozen=True)
class Allocation:
    """A setting for each linear of a model.

    Attributes:
        settings: the compressor itself and its candidates.
        selection: for each block, linear to number of its setting.
    """

    settings: Sequence[Compressor]
    selection: Sequence[Mapping[str, int]]

    @property
    def full_second_moment(self) -> bool:
        """Whether a setting needs the matrix of x x^T."""
        return any(setting.full_second_moment for setting in self.settings)

    def of(self, index: int, name: str) -> Compressor:
        """Return the method for a linear of a block."""
        return self.settings[self.selection[index][name]]


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
        candidate = _changed(compressor, changes)
        if candidate not in settings:
            settings.append(candidate)
    return settings


def titles(settings: Sequence[Compressor]) -> list[str]:
    """Return what tells each setting from the others, such as "sparsity=0.4"."""
    described = [_fields(compressor) for compressor in settings]
    differing = [name for name in described[0] if any(each[name] != described[0][name] for each in described)]
    return [", ".join(f"{name}={each[name]}" for name in differing) for each in described]


def _changed(compressor: Compressor, changes: dict[str, Any]) -> Compressor:
    known = _fields(compressor)
    assert dataclasses.is_dataclass(compressor)
    if unknown := sorted(changes.keys() - known.keys()):
        raise ValueError(
            f"Expected fields of {type(compressor).__name__} in compression.budget.candidates, which are "
            f"{', '.join(known)}, but got {', '.join(unknown)}."
        )
    try:
        return dataclasses.replace(compressor, **changes)
    except (TypeError, ValueError) as error:
        raise ValueError(f"compression.budget.candidates: {changes}: {error}") from error


def _fields(compressor: Compressor) -> dict[str, Any]:
    if not dataclasses.is_dataclass(compressor):
        raise ValueError(f"Expected a dataclass with compression.budget, but got {type(compressor).__name__}.")
    return {field.name: getattr(compressor, field.name) for field in dataclasses.fields(compressor)}
