"""Stop tiny runs at random times by random signals until they end: are the bytes those of one that was never stopped?

    python tests/attack/kills.py [--seed 0] [--kills 500] [--signals 300] [--output FILE]

Every start is the same command in a forked child (see forked.py). A place is where run_dir and TMPDIR lie: "tmpfs" is
/dev/shm, another file system than the disk. After a signal nothing of the processes may be left, and in TMPDIR nothing
of the size of a checkpoint; a finished run has the files, and all bytes, of the undisturbed one.
"""

import argparse
import json
import os
import random
import resource
import shutil
import signal
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "attack")]

from forked import ENVIRONMENT, Child, command, preload, workplaces  # noqa: E402

if __name__ == "__main__":
    os.environ |= ENVIRONMENT

from attack_runs import STAGES, arguments_of, products  # noqa: E402
from tiny_models import fit_arguments, save_tiny_model, write_text  # noqa: E402

GOOD_EXITS = {signal.SIGKILL: {-9}, signal.SIGTERM: {143, -15}, signal.SIGINT: {130, -2}}
LONGEST = 120  # seconds of a start, and of an end after a signal; more is a hang
LITTER = 10_000  # bytes of a file in TMPDIR
ROUNDS = 10
COUNTS = ("stopped", "finished", "equal", "wrong_exits", "hangs", "litter")
ONE_SHOT = ("--trainer.logger=false",)
BLOCKWISE = (
    "--trainer.logger=false",
    "--finetuning.enabled=true",
    "--finetuning.num_sequences=3",
    "--finetuning.num_held_out=1",
    "--finetuning.max_epochs=1",
)
END_TO_END = ("--trainer.logger=false", "--trainer.max_epochs=2", "--data.max_train_windows=8")
TWO_RANKS = ("--trainer.devices=2", "--trainer.strategy=ddp")


@dataclass(frozen=True)
class Scenario:
    """A run that is stopped.

    Attributes:
        name: of what it does.
        options: of `fit`.
        run_dir, temporary: "disk" or "tmpfs".
        ranks: number of processes, started as torchrun does.
        share: of all kills and signals.
    """

    name: str
    options: tuple[str, ...]
    run_dir: str = "disk"
    temporary: str = "disk"
    ranks: int = 1
    share: float = 1.0


SCENARIOS = (
    Scenario("one-shot", ONE_SHOT, share=0.2),
    Scenario("blockwise", BLOCKWISE, share=0.2),
    Scenario("end to end, TMPDIR on tmpfs", END_TO_END, temporary="tmpfs", share=0.2),
    Scenario("end to end, run_dir on tmpfs", END_TO_END, run_dir="tmpfs", share=0.2),
    Scenario("budget, both finetunings", STAGES, share=0.16),
    Scenario("the same, two ranks", (*STAGES, *TWO_RANKS), ranks=2, share=0.04),
)


@dataclass
class Tally:
    """What followed from stopping one scenario by some signals.

    Attributes:
        scenario, signals: of the runs.
        stopped: starts that a signal ended.
        finished, equal: runs that ended, and those of them with the bytes and files of the undisturbed one.
        wrong_exits, hangs, litter: starts that ended otherwise than they should.
        longest_end_s: between a signal and the end of all processes.
        problems: what went wrong.
    """

    scenario: str
    signals: str
    stopped: int = 0
    finished: int = 0
    equal: int = 0
    wrong_exits: int = 0
    hangs: int = 0
    litter: int = 0
    longest_end_s: float = 0.0
    problems: list[str] = field(default_factory=list)

    def note(self, kind: str, problem: str) -> None:
        """Count a problem."""
        setattr(self, kind, getattr(self, kind) + 1)
        self.problems.append(f"{kind}: {problem}")


def _of_children() -> float:
    """Return the processor seconds of all children that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


class Run:
    """One scenario in its places.

    Args:
        scenario: what is run.
        disk, tmpfs: folders on two file systems; `disk` holds the model and the texts.
    """

    def __init__(self, scenario: Scenario, disk: Path, tmpfs: Path) -> None:
        places = {"disk": disk, "tmpfs": tmpfs}
        self.scenario = scenario
        name = scenario.name.replace(" ", "_").replace(",", "")
        self.folder = places[scenario.run_dir] / f"run_{name}"
        self.temporary = places[scenario.temporary] / f"temporary_{name}"
        self._logs = [disk / f"log_{name}_{rank}" for rank in range(scenario.ranks)]
        make = fit_arguments(disk, disk / "model", self.folder, *scenario.options)
        self._command = command(make)
        self.clear()
        before = _of_children()
        codes = [child.wait(LONGEST) for child in self.start()]
        assert codes == [0] * scenario.ranks, self.said()
        self.seconds = (_of_children() - before) / scenario.ranks
        self._expected = self._content()
        self.clear()

    def start(self) -> list[Child]:
        """Start the command on all ranks."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        children = []
        for rank, log in enumerate(self._logs):
            environment = {"TMPDIR": str(self.temporary)}
            if self.scenario.ranks > 1:
                environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NODE_RANK": "0"}
                environment |= {"WORLD_SIZE": str(self.scenario.ranks), "LOCAL_RANK": str(rank)}
            children.append(Child(self._command, log, environment=environment))
        return children

    def said(self) -> str:
        """Return the end of the output of all ranks."""
        return "\n".join(log.read_text(errors="replace")[-3000:] for log in self._logs)

    def clear(self) -> None:
        """Remove everything."""
        for folder in (self.folder, self.temporary):
            shutil.rmtree(folder, ignore_errors=True)
        self.temporary.mkdir(parents=True)

    def differing(self) -> list[str]:
        """Return the files that the run has otherwise than the undisturbed one."""
        made = self._content()
        return [name for name in sorted({*made, *self._expected}) if made.get(name) != self._expected.get(name)]

    def litter(self) -> list[str]:
        """Return the large files in TMPDIR."""
        files = [path for path in self.temporary.rglob("*") if path.is_file()]
        return [f"{path.name} {path.stat().st_size}" for path in files if path.stat().st_size > LITTER]

    def _content(self) -> dict[str, str]:
        files = {str(path.relative_to(self.folder)) for path in self.folder.rglob("*") if path.is_file()}
        # A curve of each start; the seconds of a run and its command differ by nature.
        return {name: "" for name in files if "tfevents" not in name} | products(self.folder)


def stop_often(run: Run, signals: Sequence[signal.Signals], number: int, draw: random.Random, tally: Tally) -> None:
    """Stop a run so often, each time after a random time, and start it again; then let it end."""
    until = tally.stopped + number
    while tally.stopped < until:
        chosen, after, pause = draw.choice(signals), draw.uniform(0, 1.05) * run.seconds, draw.uniform(0, 0.05)
        children = run.start()
        aimed = draw.sample(children, draw.randint(1, len(children)))
        _stop(run, children, aimed, chosen, (after, pause), tally)
    _judge(run, [child.wait(LONGEST) for child in run.start()], tally)


def _stop(
    run: Run,
    children: list[Child],
    aimed: list[Child],
    chosen: signal.Signals,
    times: tuple[float, float],
    tally: Tally,
) -> None:
    """Send a signal to some ranks at their time, and judge how all of them end."""
    after, pause = times
    # Processor time finds the same places on a busy machine; the wait after it also those at which a run waits.
    while all(child.poll() is None for child in children) and aimed[0].seconds() < after:
        time.sleep(0.002)
    time.sleep(pause)
    running = [child for child in aimed if child.poll() is None]
    for child in running:
        child.send(chosen)
    sent = time.monotonic()
    codes = [child.wait(LONGEST) for child in children]
    for child in children:
        child.end()
    tally.longest_end_s = max(tally.longest_end_s, round(time.monotonic() - sent, 2))
    if None in codes:
        return tally.note("hangs", f"{chosen.name} after {after:.2f} s: {run.said()[-600:]}")
    if not running or set(codes) == {0}:
        return _judge(run, codes, tally)
    tally.stopped += 1
    if any(child.poll() not in GOOD_EXITS[chosen] | {0} for child in running) or "Traceback" in run.said():
        tally.note("wrong_exits", f"{chosen.name} after {after:.2f} s: {codes} {run.said()[-1500:]}")
    if found := run.litter():
        tally.note("litter", str(found))
    return None


def _judge(run: Run, codes: list[int | None], tally: Tally) -> None:
    """Compare a run that was not stopped with the undisturbed one, and begin anew."""
    if set(codes) != {0}:
        tally.note("wrong_exits", f"not stopped: {codes} {run.said()[-1500:]}")
        return
    tally.finished += 1
    if differing := run.differing():
        tally.problems.append(f"other bytes: {differing}")
    else:
        tally.equal += 1
    run.clear()


def attack(disk: Path, tmpfs: Path, seed: int, kills: int, signals: int) -> Iterator[list[Tally]]:
    """Yield the table, a row for every scenario and kind of signal, as it grows in several rounds."""
    write_text(disk / "calibration.txt", 2000, seed=0)
    write_text(disk / "eval.txt", 100, seed=1)
    model = save_tiny_model(disk / "model", num_blocks=2)
    preload(arguments_of(disk, model, disk / "run"), disk / "preload")
    runs = [Run(scenario, disk, tmpfs) for scenario in SCENARIOS]
    kinds = (([signal.SIGKILL], kills), ([signal.SIGTERM, signal.SIGINT], signals))
    rows = {
        (run.scenario.name, number): Tally(run.scenario.name, "/".join(each.name for each in kind))
        for run in runs
        for kind, number in kinds
    }
    for turn in range(ROUNDS):
        for run in runs:
            for kind, number in kinds:
                tally, wanted = rows[run.scenario.name, number], number * run.scenario.share
                draw = random.Random(f"{seed} {turn} {tally.scenario} {tally.signals}")
                until = round(wanted * (turn + 1) / ROUNDS) - round(wanted * turn / ROUNDS)
                if until:
                    stop_often(run, kind, until, draw, tally)
                    yield list(rows.values())


def main() -> None:
    """Attack, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kills", type=int, default=500, help="SIGKILLs")
    parser.add_argument("--signals", type=int, default=300, help="SIGTERMs and SIGINTs")
    parser.add_argument("--output", type=Path, default=Path("kills.json"))
    chosen = parser.parse_args()
    output = chosen.output.resolve()
    with workplaces(None, "/dev/shm") as (disk, tmpfs):
        for table in attack(disk, tmpfs, chosen.seed, chosen.kills, chosen.signals):
            output.write_text(json.dumps([asdict(tally) for tally in table], indent=1))
            print(f"{sum(tally.stopped for tally in table)} starts stopped", flush=True)
        show(table)


def show(table: list[Tally]) -> None:
    """Print the table and its sums."""
    total = Tally("all", "")
    for tally in table:
        for name in COUNTS:
            setattr(total, name, getattr(total, name) + getattr(tally, name))
    print(f"{'scenario':30} {'signals':16}", *(f"{name:>12}" for name in COUNTS))
    for tally in [*table, total]:
        print(f"{tally.scenario:30} {tally.signals:16}", *(f"{getattr(tally, name):12}" for name in COUNTS))
        for problem in tally.problems:
            print(f"    {problem}")


if __name__ == "__main__":
    main()
