"""What is measured on a real model: which text, how long, how calibrated.

The figures that are shown come from `STANDARD`. Settings are chosen by `HELD_OUT`: another stretch of the evaluation
text and other calibration sequences, so that no figure that is shown has helped to choose what is shown.
"""

import hashlib
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
SEQ_LEN, NUM_SEQUENCES = 512, 128
EVAL_FILE, CALIBRATION_FILE = "wikitext2-raw-test.txt", "prose-calibration.txt"
BUILT_IN = "python-docs"


class Protocol(NamedTuple):
    """A stretch of the evaluation text, in bytes, and the seed of the calibration sequences."""

    name: str
    start: int
    stop: int
    seed: int


STANDARD = Protocol("standard", 0, 150_000, 0)
HELD_OUT = Protocol("held_out", 400_000, 550_000, 1)


class Texts(NamedTuple):
    """The files of a protocol; None where the built-in text takes their place."""

    evaluation: Path | None
    calibration: Path | None

    @property
    def eval_name(self) -> str:
        """Name of the evaluation text in reports."""
        return "wikitext2" if self.evaluation else BUILT_IN


def texts(protocol: Protocol, shared: Path, folder: Path) -> Texts:
    """Return the texts of a protocol.

    Args:
        protocol: which stretch.
        shared: folder with data/wikitext2-raw-test.txt and data/prose-calibration.txt; without them Python's
            documentation is the text.
        folder: where the stretch is written.
    """
    whole, calibration = shared / "data" / EVAL_FILE, shared / "data" / CALIBRATION_FILE
    if not (whole.is_file() and calibration.is_file()):
        return Texts(None, None)
    stretch = folder / f"wikitext2-{protocol.start}-{protocol.stop}.txt"
    if not stretch.is_file():
        stretch.parent.mkdir(parents=True, exist_ok=True)
        # A character that the cut goes through is left out.
        text = whole.read_bytes()[protocol.start : protocol.stop].decode("utf-8", errors="ignore")
        stretch.write_text(text, encoding="utf-8", newline="")
    return Texts(stretch, calibration)


def arguments(protocol: Protocol, chosen: Texts, windows: int | None) -> list[str]:
    """Return the options of `main.py` that make it measure by a protocol."""
    options = [f"--data.seq_len={SEQ_LEN}", f"--calibration.num_sequences={NUM_SEQUENCES}"]
    options += [f"--calibration.seed={protocol.seed}"]
    if chosen.evaluation is not None:
        options += [f"--data.calibration_files=[{chosen.calibration}]"]
        options += [f"--data.eval_files.{chosen.eval_name}={chosen.evaluation}"]
    return options + ([f"--data.max_eval_windows={windows}"] if windows else [])


def described(protocol: Protocol, chosen: Texts, windows: int | None) -> dict[str, object]:
    """Return a protocol as JSON values, with the digest of the text that it measures on."""
    digest = None
    if chosen.evaluation is not None:
        digest = hashlib.sha256(chosen.evaluation.read_bytes()).hexdigest()
    return {
        "name": protocol.name,
        "text": f"{EVAL_FILE}, bytes {protocol.start} to {protocol.stop}" if digest else BUILT_IN,
        "text_sha256": digest,
        "seq_len": SEQ_LEN,
        "max_windows": windows,
        "calibration": f"{NUM_SEQUENCES} sequences of {SEQ_LEN} tokens, seed {protocol.seed}, of "
        f"{CALIBRATION_FILE if digest else BUILT_IN}",
    }
