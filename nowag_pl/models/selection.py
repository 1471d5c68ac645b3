"""Which linears of a model are compressed: every linear of every decoder block, or those that patterns name."""

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from nowag_pl.modules.experts import RoutedExperts

_MOST_SHOWN = 6  # names in a message


@dataclass(frozen=True)
class Selection:
    r"""Patterns of the linears that are compressed.

    A pattern is one of

    - a glob for a whole name or for its end: `model.layers.*.mlp.*`, `mlp.*`, `down_proj`;
    - `re:` and a regular expression for a whole name: `re:.*layers\.[0-3]\..*`;
    - `blocks:` and a number or a slice, as Python counts: `blocks:0`, `blocks:-1`, `blocks:2:10`.

    Attributes:
        targets: patterns of the linears that are compressed; None: all.
        ignore: patterns of those that stay dense all the same.
    """

    targets: tuple[str, ...] | None = None
    ignore: tuple[str, ...] = ()

    def of(self, names: Sequence[Sequence[str]]) -> set[str]:
        """Return the selected names.

        Args:
            names: for each block, the whole names of its linears.

        Raises:
            ValueError: a pattern is wrong or matches nothing, or nothing is left.
        """
        everything = {name for block in names for name in block}
        if not everything:
            raise ValueError(
                "Expected decoder blocks with linears (nn.Linear), but found none: this family is not supported."
            )
        selected = everything
        if self.targets is not None:
            selected = set().union(*(matching(pattern, names, "compression.targets") for pattern in self.targets))
        for pattern in self.ignore:
            selected = selected - matching(pattern, names, "compression.ignore")
        if not selected:
            raise ValueError("Expected compression.targets and compression.ignore to leave a linear, but none is left.")
        return selected


def matching(pattern: str, names: Sequence[Sequence[str]], option: str) -> set[str]:
    """Return the names that a pattern matches, at least one.

    Args:
        pattern: as for :class:`Selection`.
        names: for each block, the whole names of its linears.
        option: what messages call the pattern, such as "compression.targets".

    Raises:
        ValueError: the pattern is wrong, or matches nothing; the message shows near names.

    Example:
        >>> sorted(matching("blocks:-1", [["layers.0.up", "layers.0.down"], ["layers.1.up"]], "targets"))
        ['layers.1.up']
    """
    everything = [name for block in names for name in block]
    if pattern.startswith("blocks:"):
        found = {name for block in _blocks(pattern, names, option) for name in block}
    elif pattern.startswith("re:"):
        try:
            expression = re.compile(pattern.removeprefix("re:"))
        except re.error as error:
            raise ValueError(f"Expected a regular expression in {option}, but got {pattern!r}: {error}.") from error
        found = {name for name in everything if expression.fullmatch(name)}
    else:
        found = {name for name in everything if fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")}
    if not found:
        raise ValueError(
            f"Expected {option} to match a linear, but {pattern!r} matches none. {_near(pattern, everything)}"
        )
    return found


def _blocks(pattern: str, names: Sequence[Sequence[str]], option: str) -> list[Sequence[str]]:
    """Return the blocks that `blocks:...` names."""
    parts = pattern.removeprefix("blocks:").split(":")
    try:
        bounds = [int(part) if part else None for part in parts]
    except ValueError:
        bounds = [None] * 4
    if len(bounds) == 1 and bounds[0] is not None:
        number = bounds[0]
        return [names[number]] if -len(names) <= number < len(names) else []
    if len(bounds) not in (2, 3):
        raise ValueError(f"Expected {option} of the form blocks:3, blocks:-1 or blocks:2:10, but got {pattern!r}.")
    return list(names[slice(*bounds)])


def _near(pattern: str, names: Iterable[str]) -> str:
    """Return a sentence with names that are like a pattern, or with the kinds of names that there are."""
    kinds = list(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in names))
    # The longest word of the pattern says most of what was meant.
    words = sorted(re.findall(r"\w+", pattern), key=len)
    by_end = {kind.rpartition(".")[2]: kind for kind in kinds}
    near = difflib.get_close_matches(words[-1], by_end, n=1, cutoff=0.6) if words else []
    shown = [by_end[end] for end in near] or kinds[:_MOST_SHOWN]
    return f"Did you mean {shown[0]}?" if near else f"There are {', '.join(shown)}."


def find_linears(block: nn.Module) -> dict[str, nn.Linear]:
    """Return the linears of a block that may be compressed by name, in the block's order: none of its gates."""
    gates = find_gates(block)
    return {name: each for name, each in block.named_modules() if isinstance(each, nn.Linear) and name not in gates}


def find_gates(block: nn.Module) -> dict[str, nn.Module]:
    """Return what stands beside the experts of a block and decides on them: routers, and the gates of shared experts.

    They take a share of the memory that does not count, and an error of theirs sends tokens elsewhere.
    """
    experts = {name for name, each in block.named_modules() if isinstance(each, RoutedExperts)}
    beside = {name.rpartition(".")[0] for name in experts}
    return {
        name: each
        for name, each in block.named_modules()
        if name and name.rpartition(".")[0] in beside and name not in experts and [*each.parameters(recurse=False)]
    }
