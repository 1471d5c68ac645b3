"""Flip bits in, and cut, every kind of file of a finished run, and run the same command again: is any used silently?

    python tests/attack/corruption.py [--seed 0] [--number 200] [--output FILE]

A damaged file is fine where the command refuses it by name, or says so and makes it anew to the same bytes; and where
it is not read, as nothing is made of it then. It is used silently where the command succeeds without a word and any
artefact, figure or exported file differs. The runs are in forked children (see forked.py).
"""

import argparse
import json
import os
import random
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "attack")]

from forked import ENVIRONMENT, command, ending_of, finished, preload, workplaces  # noqa: E402

if __name__ == "__main__":
    os.environ |= ENVIRONMENT

from attack_runs import arguments_of, products  # noqa: E402
from tiny_models import save_tiny_model, write_text  # noqa: E402

# The last stages of which one is begun anew, so that artefacts of the stages before it are read.
_BEGUN_ANEW = (
    ("export", "export_finetuned", "report.json"),
    ("finetuned", "training", "export_finetuned"),
    ("training",),
    (),
)


@dataclass
class Harm:
    """What was done to a file, and what followed.

    Attributes:
        kind: folder and suffix of the file.
        file: its name.
        change: "flip" or "cut".
        again: folders that were deleted, so that the command had to do something.
        ended: "refused", "made anew", "not read", "used silently", "traceback" or "hang".
        said: the end of what the command said.
    """

    kind: str
    file: str
    change: str
    again: tuple[str, ...]
    ended: str
    said: str


def harm(path: Path, draw: random.Random) -> str:
    """Flip a bit of a file or cut it, and return which."""
    content = bytearray(path.read_bytes())
    if draw.random() < 0.3 or not content:
        path.write_bytes(content[: draw.randrange(max(len(content), 1))])
        return "cut"
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)
    return "flip"


def kinds_of(run: Path) -> dict[str, list[Path]]:
    """Return the files of a run by their kind; the pages and curves for people are none that anything is made of."""
    kinds: dict[str, list[Path]] = {}
    for path in sorted(path for path in run.rglob("*") if path.is_file()):
        name = path.relative_to(run)
        if path.suffix in {".html", ".yaml"} or "tfevents" in path.name or path.name == ".lock":
            continue
        kinds.setdefault(f"{name.parts[0] if len(name.parts) > 1 else '.'}/*{path.suffix}", []).append(path)
    return kinds


def attack(work: Path, seed: int, number: int) -> Iterator[Harm]:
    """Yield what followed from each harm."""
    draw = random.Random(seed)
    write_text(work / "calibration.txt", 2000, seed=0)
    write_text(work / "eval.txt", 100, seed=1)
    model = save_tiny_model(work / "model", num_blocks=2)
    whole = work / "whole"
    arguments = arguments_of(work, model, work / "run")
    preload(arguments, work / "log")
    (work / "run").rename(whole)
    expected = products(whole)
    kinds = kinds_of(whole)
    for index in range(number):
        kind = sorted(kinds)[index % len(kinds)]
        path = draw.choice(kinds[kind])
        shutil.copytree(whole, work / "run")
        damaged = work / "run" / path.relative_to(whole)
        change, again = harm(damaged, draw), draw.choice(_BEGUN_ANEW)
        for name in again:
            target = work / "run" / name
            if target.is_dir() and target not in damaged.parents:
                shutil.rmtree(target)
        code, said = finished(command(arguments), work / "log")
        ended = ending_of(code, said)
        if ended == "ok":
            ended = _judged(work / "run", damaged, said, expected)
        yield Harm(kind, damaged.name, change, again, ended, said[-300:])
        shutil.rmtree(work / "run")


def _judged(run: Path, damaged: Path, said: str, expected: dict[str, str]) -> str:
    made = products(run)
    name = str(damaged.relative_to(run))
    differing = [key for key, digest in expected.items() if made.get(key) != digest]
    if "damaged" in said:
        return "used silently" if [key for key in differing if key != name] else "made anew"
    # Nothing was made of it, and it still is what was left: the next reader finds it.
    return "used silently" if [key for key in differing if key != name] else "not read"


def main() -> None:
    """Attack, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--number", type=int, default=200)
    parser.add_argument("--output", type=Path, default=Path("corruption.json"))
    chosen = parser.parse_args()
    output, found = chosen.output.resolve(), []
    with workplaces(None) as (work,):
        for each in attack(work, chosen.seed, chosen.number):
            found.append(asdict(each))
            print(
                f"{each.ended:14} {each.kind:34} {each.change:5} {each.file[:40]:40} {each.said[-120:]!r}", flush=True
            )
    output.write_text(json.dumps(found, indent=1))
    for kind in sorted({each["kind"] for each in found}):
        print(f"{kind:34} {dict(Counter(each['ended'] for each in found if each['kind'] == kind))}")
    print(f"{len(found)} corruptions: {dict(Counter(each['ended'] for each in found))}")


if __name__ == "__main__":
    main()
