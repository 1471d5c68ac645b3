"""Model, data and run directory lie apart, so that a run never writes among what it reads."""

from collections.abc import Iterable
from pathlib import Path


def check_apart(run_dir: Path, sources: Iterable[tuple[str, Path]], may_hold: bool = False) -> None:
    """Refuse a run directory that holds something that the run reads, or lies in it. Symbolic links are resolved.

    Args:
        run_dir: where the run writes.
        sources: name and place of each file or folder that it reads, such as "model.path".
        may_hold: whether the run directory may hold them, as for a command that writes beside them only.

    Raises:
        ValueError: there is an overlap; the message names both.
    """
    place = run_dir.expanduser().resolve()
    for name, source in sources:
        real = source.expanduser().resolve()
        if real == place or real in place.parents or (place in real.parents and not may_hold):
            raise ValueError(
                f"Expected run_dir and {name} to be apart, as a run deletes and replaces what it has written, but got "
                f"{run_dir} and {source}. Choose another run_dir."
            )
