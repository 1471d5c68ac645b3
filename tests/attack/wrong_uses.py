"""Use the program in some three hundred wrong ways, and tell how each ended.

    python tests/attack/wrong_uses.py [--seed 0] [--only PART] [--output FILE]

A good message: no traceback, refused before anything is computed, short, and it names file or key. Each use is a forked
child (see forked.py), without the checks of types that tests have.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "attack")]

from forked import ENVIRONMENT, command, ending_of, finished, preload, workplaces  # noqa: E402

if __name__ == "__main__":
    os.environ |= ENVIRONMENT

import uses  # noqa: E402
from tiny_models import fit_arguments, save_tiny_model, write_text  # noqa: E402

MOST_CHARACTERS, MOST_LINES = 700, 3
LONGEST = 120  # seconds


@dataclass
class Found:
    """How a wrong use ended.

    Attributes:
        use: what was wrong.
        ended: "refused", "ok", "traceback" or "hang".
        before: whether nothing had been computed.
        short: whether the message is short.
        names: whether it says what it should.
        message: its beginning, or the last line of the traceback.
    """

    use: str
    ended: str
    before: bool
    short: bool
    names: bool
    message: str

    @property
    def good(self) -> bool:
        """Whether a user is helped."""
        return self.names and self.before and self.short and self.ended in ("ok", "refused")


class Attack:
    """The uses over a tiny model.

    Args:
        work: a folder to fill.
    """

    def __init__(self, work: Path) -> None:
        self._work = work
        self._number = 0
        write_text(work / "calibration.txt", 2000, seed=0)
        write_text(work / "eval.txt", 300, seed=1)
        self.model = save_tiny_model(work / "model", num_blocks=2)
        preload(fit_arguments(work, self.model, self.folder() / "run"), work / "log")

    def fit(self, *more: str, model: Path | None = None) -> Found:
        """Run a `fit` with wrong options."""
        folder = self.folder()
        options = [self._filled(option, folder) for option in more]
        arguments = fit_arguments(self._work, model or self.model, folder / "run", *options)
        return self._judged(" ".join(more), command(arguments), folder)

    def command(self, arguments: str) -> Found:
        """Run another command."""
        folder = self.folder()
        words = [self._filled(word, folder) for word in shlex.split(arguments)]
        return self._judged(arguments, command(words), folder)

    def python(self, expression: str) -> Found:
        """Evaluate an expression over the Python interface."""
        import torch

        import nowag_pl

        folder = self.folder()
        names: dict[str, Any] = {name: getattr(nowag_pl, name) for name in nowag_pl.__all__}
        moment = nowag_pl.SecondMoment(48)
        names |= {"torch": torch, "nowag_pl": nowag_pl, "linear": torch.nn.Linear(48, 32), "moment": torch.ones(48)}
        names |= {"folder": folder / "export", "dense": str(self.model)}
        names["moment_of_nan"] = lambda: (moment.update(torch.full((2, 48), float("nan"))), moment.compute())
        return self._judged(expression, lambda: _evaluated(expression, names), folder)

    def folder(self) -> Path:
        """Return a new folder."""
        self._number += 1
        folder = self._work / f"use_{self._number}"
        folder.mkdir()
        return folder

    def damaged(self, change: uses.Change) -> Path:
        """Return a copy of the model with a fault."""
        copy = shutil.copytree(self.model, self.folder() / "model")
        change(copy)
        return copy

    def _filled(self, text: str, folder: Path) -> str:
        (folder / "here").mkdir(exist_ok=True)
        return text.replace("@", str(folder / "here")).replace("~m", str(self.model))

    def _judged(self, use: str, run: Callable[[], object], folder: Path) -> Found:
        code, said = finished(run, self._work / "log", folder, LONGEST)
        ended = ending_of(code, said)
        message = said.strip()
        if ended == "traceback":
            place = re.findall(r'File "[^"]*?([^/"]+)", line (\d+)', said)[-1:]
            message = f"{message.splitlines()[-1]} {place}"
        message = message.partition("\n(NOWAG_PL_TRACEBACK")[0].strip()
        message = re.split(r"^(?:\S+: )?error: ", message, flags=re.MULTILINE)[-1]
        shortened = re.sub(r"/[\w./-]+", "/path", message)
        computed = [path for path in folder.glob("run/*/*") if path.suffix in (".safetensors", ".npy", ".ckpt")]
        short = len(shortened) <= MOST_CHARACTERS and message.count("\n") < MOST_LINES
        return Found(use, ended, ended == "ok" or not computed, ended == "ok" or short, False, message)


def _evaluated(expression: str, names: dict[str, Any]) -> None:
    """Let an expression raise what is meant for users as a refusal; anything else is a traceback."""
    try:
        eval(expression, names)
    except (ValueError, TypeError, AttributeError, OSError, RuntimeError) as error:
        inside = traceback.extract_tb(error.__traceback__)[-1].filename
        # A message of torch or Python about a line of theirs or ours does not say what was wrong.
        if str(error).startswith("Expected") or "nowag_pl" in str(error):
            sys.exit(f"error: {error}")
        raise RuntimeError(f"{type(error).__name__}: {error} ({Path(inside).name})") from error


def _options(log: Path) -> list[str]:
    """Return the options of `fit` that take a value."""
    _, said = finished(command(["fit", "--help"]), log)
    found = re.findall(r"^ +(?:ARG: +)?(--[a-z_.]+) (?!CONFIG)\S", said, re.MULTILINE)
    ours = {"--trainer.accelerator", "--trainer.enable_progress_bar", "--run_dir", "--print_config"}
    return sorted(option for option in set(found) - ours if not option.endswith(".help"))


def attack(work: Path, seed: int, only: str) -> Iterator[tuple[str, Found]]:
    """Yield the kind of each use, and how it ended."""
    made = Attack(work)
    parts: dict[str, Iterator[tuple[Found, str]]] = {
        "options": ((made.fit(*re.split(r" (?=--)", use)), words) for use, words in uses.OPTIONS.items()),
        "commands": ((made.command(use), words) for use, words in uses.COMMANDS.items()),
        "config.json": (
            (_titled(made.fit(model=made.damaged(uses.with_json(changes))), str(changes)), words)
            for changes, words in uses.CONFIGS
        ),
        "model files": (
            (_titled(made.fit(model=made.damaged(uses.with_file(name, text))), f"{name}: {text[:30]}"), words)
            for name, text, words in uses.FILES
        ),
        "yaml": (
            (_titled(made.fit(f"--config={_written(made, 'wrong.yaml', text.encode())}"), text), words)
            for text, words in uses.YAMLS
        ),
        "texts": (
            (_titled(made.fit(f"--data.calibration_files=[{_written(made, name, content)}]"), name), words)
            for name, content, words in uses.TEXTS
        ),
        "reports": (
            (_titled(made.command(f"compare {_written(made, 'report.json', text.encode()).parent}"), text[:60]), words)
            for text, words in uses.REPORTS
        ),
        "python": ((made.python(use), words) for use, words in uses.PYTHON.items()),
        "seeded": (
            (made.fit(use), words) for use, words in uses.seeded_options(_options(work / "log"), 60, seed).items()
        ),
    }
    for kind, found in parts.items():
        for each, words in found if only in kind else ():
            text = "OK" if each.ended == "ok" else each.message
            each.names = re.search(words, text, re.DOTALL) is not None
            yield kind, each


def _titled(found: Found, use: str) -> Found:
    found.use = use
    return found


def _written(made: Attack, name: str, content: bytes) -> Path:
    path = made.folder() / name
    path.write_bytes(content)
    return path


def main() -> None:
    """Attack, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="part of the kind of use")
    parser.add_argument("--output", type=Path, default=Path("wrong_uses.json"))
    chosen = parser.parse_args()
    chosen.output = chosen.output.resolve()
    found = []
    with workplaces(None) as (work,):
        for kind, each in attack(work, chosen.seed, chosen.only):
            found.append({"kind": kind, "good": each.good, **asdict(each)})
            marks = {"before": each.before, "short": each.short, "names": each.names}
            said = " ".join(name if value else f"NO-{name}" for name, value in marks.items())
            mark = "     " if each.good else "BAD  "
            print(f"{mark}{kind:12} {each.ended:9} {said:22} {each.use[:110]!r}", flush=True)
            print(f"        {each.message[:300]!r}", flush=True)
    chosen.output.write_text(json.dumps(found, indent=1))
    tracebacks = sum(each["ended"] in ("traceback", "hang") for each in found)
    print(f"{len(found)} wrong uses: {tracebacks} tracebacks, {sum(each['good'] for each in found)} good messages")


if __name__ == "__main__":
    main()
