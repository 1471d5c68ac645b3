"""What tells one model from another without reading all of it."""

import hashlib

from nowag_pl.models.checkpoint import Checkpoint

_PAGES = 64
_PAGE_BYTES = 4096


def fingerprint(checkpoint: Checkpoint) -> str:
    """Return a hash of the configuration and of every weight file's size, beginning, and evenly spaced pages.

    A retrained model of the same shapes differs in nearly every page; reading 140 GB to be surer would take longer
    than some compressions.
    """
    digest = hashlib.sha256((checkpoint.folder / "config.json").read_bytes())
    for file in sorted(set(checkpoint.weight_map.values())):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with open(file, "rb") as opened:
            for page in range(_PAGES):
                opened.seek(page * size // _PAGES)
                digest.update(opened.read(_PAGE_BYTES))
    return digest.hexdigest()
