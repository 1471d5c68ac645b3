"""Kill a tiny run at random times by random signals until it ends: are the bytes those of one that was never killed?

python tests/attack/kills.py [--seed 0] [--number 40] [--output FILE]
"""

import argparse
import json
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "attack")]

from attack_runs import arguments_of, products  # noqa: E402
from tiny_models import save_tiny_model, start, write_text  # noqa: E402

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
GOOD_EXITS = {signal.SIGKILL: {-9}, signal.SIGTERM: {143, -15}, signal.SIGINT: {130, -2}}
LONGEST = 600  # seconds of one run


def run_once(arguments: list[str], log: Path, kill_after: float | None, number: int) -> tuple[int, bool]:
    """Start the command, perhaps kill it; return its exit code, and whether it was killed."""
    process = start(arguments, log)
    try:
        if kill_after is None:
            return process.wait(LONGEST), False
        deadline = time.monotonic() + kill_after
        while time.monotonic() < deadline:
            if process.poll() is not None:
                return process.returncode, False
            time.sleep(0.02)
        process.send_signal(number)
        return process.wait(LONGEST), True
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def attack(work: Path, seed: int, number: int) -> list[dict[str, Any]]:
    """Kill so often; return a row for every start."""
    draw, rows = random.Random(seed), []
    write_text(work / "calibration.txt", 2000, seed=0)
    write_text(work / "eval.txt", 300, seed=1)
    model = save_tiny_model(work / "model", num_blocks=2)
    log, run = work / "log", work / "run"
    arguments = arguments_of(work, model, run)
    started = time.monotonic()
    code, _ = run_once(arguments, log, None, 0)
    assert code == 0, log.read_text()[-2000:]
    seconds = time.monotonic() - started
    expected = products(run)
    shutil.rmtree(run)
    kills = 0
    while kills < number:
        signal_number = draw.choice(SIGNALS)
        # Most of a start passes before the first stage; later places get as many kills by going on from earlier ones.
        after = draw.uniform(0.2, 1.05) * seconds
        code, killed = run_once(arguments, log, after, signal_number)
        kills += killed
        row: dict[str, Any] = {"signal": signal_number.name if killed else "", "after": round(after, 2), "code": code}
        said = log.read_text(errors="replace")
        row["ended"] = "killed" if killed else "finished"
        if "Traceback" in said or (killed and code not in GOOD_EXITS[signal_number] | {0}) or (not killed and code):
            row["ended"] = "wrong exit"
            row["said"] = said[-600:]
        if code == 0:
            same = products(run) == expected
            row["ended"] = f"finished, {'equal' if same else 'OTHER'} bytes"
            shutil.rmtree(run)
        rows.append(row)
        print(row, flush=True)
    code, _ = run_once(arguments, log, None, 0)
    same = products(run) == expected
    rows.append({"signal": "", "code": code, "ended": f"finished, {'equal' if same else 'OTHER'} bytes"})
    return rows


def main() -> None:
    """Attack, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--number", type=int, default=40, help="of kills")
    parser.add_argument("--output", type=Path, default=Path("kills.json"))
    chosen = parser.parse_args()
    output = chosen.output.resolve()
    with tempfile.TemporaryDirectory() as work:
        rows = attack(Path(work), chosen.seed, chosen.number)
    output.write_text(json.dumps(rows, indent=1))
    print(f"{chosen.number} kills: {dict(Counter(row['ended'] for row in rows))}")


if __name__ == "__main__":
    main()
