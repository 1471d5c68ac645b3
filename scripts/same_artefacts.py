"""Show that a change leaves every artefact as it was: run the same commands in two checkouts and compare the bytes.

python scripts/same_artefacts.py record <checkout> <runs> digests_before.json
python scripts/same_artefacts.py record <checkout> <runs> digests_after.json
python scripts/same_artefacts.py compare digests_before.json digests_after.json

The commands are every method file on the embedded default, blockwise finetuning, end-to-end distillation, and two
processes. `record` takes the Python of this process, so that both checkouts run with the same packages.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from safetensors import safe_open

_STAGES = ("moments", "compressed", "finetuned", "reference", "export", "export_finetuned", "training")
_SMALL = "--calibration.num_sequences=32 --data.max_eval_windows=16"
_METHODS = (
    "nowag_p_50",
    "nowag_p_2_4",
    "nowag_p_4_8",
    "nowag_vq_2bit_small",
    "wanda_50",
    "magnitude_50",
    "armor_2_4",
    "nowag_p_50_plus",
    "nowag_p_2_4_plus",
    "nowag_vq_2bit_small_plus",
)
_FINETUNING = "--finetuning.num_sequences=16 --finetuning.num_held_out=8 --finetuning.max_epochs=2"
_TRAINING = "--trainer.max_epochs=1 --data.max_train_windows=32"
CASES = {
    **{name: f"--config configs/method/{name}.yaml {_SMALL}" for name in _METHODS},
    "propagated": f"--config configs/method/nowag_vq_2bit_small.yaml {_SMALL} --calibration.mode=propagated",
    "budget": f"--config configs/method/nowag_p_50.yaml --config configs/budget/sensitivity.yaml {_SMALL}",
    "blockwise": f"--config configs/method/nowag_p_2_4.yaml --config configs/finetuning/embedded.yaml {_SMALL} "
    f"{_FINETUNING}",
    "blockwise to blocks": f"--config configs/method/nowag_p_2_4.yaml --config configs/finetuning/blockwise.yaml "
    f"{_SMALL} {_FINETUNING}",
    "distillation": f"--config configs/method/nowag_p_2_4.yaml --config configs/finetuning/embedded_distillation.yaml "
    f"{_SMALL} {_TRAINING}",
    "next token": f"--config configs/method/nowag_p_2_4.yaml {_SMALL} {_TRAINING}",
    "dense export": f"--config configs/method/nowag_p_50.yaml {_SMALL} --export.format=dense",
    "two processes": f"--config configs/method/nowag_vq_2bit_small.yaml --config configs/finetuning/embedded.yaml "
    f"{_SMALL} {_FINETUNING} --trainer.devices=2 --trainer.strategy=ddp --trainer.accelerator=cpu",
    "two processes, corrected": f"--config configs/method/nowag_p_50_plus.yaml {_SMALL} --trainer.devices=2 "
    "--trainer.strategy=ddp --trainer.accelerator=cpu",
}


def record(checkout: Path, runs: Path, output: Path, names: list[str]) -> None:
    """Run the cases and write the digest of every artefact."""
    digests: dict[str, dict[str, str]] = json.loads(output.read_text()) if output.is_file() else {}
    for name in names or CASES:
        started, run_dir = time.monotonic(), runs.resolve() / name.replace(" ", "_").replace(",", "")
        if (run_dir / "report.json").is_file():
            digests[name] = digests_of(run_dir)
            output.write_text(json.dumps(digests, indent=1))
            continue
        command = [sys.executable, "main.py", "fit", *CASES[name].split(), f"--run_dir={run_dir}"]
        environment = {**os.environ, "PYTHONPATH": str(checkout.resolve()), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"{name}: {' '.join(command)}\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
        digests[name] = digests_of(run_dir)
        output.write_text(json.dumps(digests, indent=1))
        print(f"{name}: {len(digests[name])} files, {time.monotonic() - started:.0f} s", flush=True)


def digests_of(run_dir: Path) -> dict[str, str]:
    """Return the digest of every artefact by its path; the seconds that a block took are left out."""
    return {
        path.relative_to(run_dir).as_posix(): digest(path)
        for stage in _STAGES
        for path in sorted((run_dir / stage).rglob("*"))
        if path.is_file()
    }


def digest(path: Path) -> str:
    """Return the SHA-256 of tensors and metadata of an artefact, or of the bytes of another file."""
    found = hashlib.sha256()
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as file:
            metadata = json.loads((file.metadata() or {}).get("nowag_pl", "{}"))
            found.update(json.dumps({k: v for k, v in metadata.items() if k != "seconds"}).encode())
            tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
    elif path.suffix == ".ckpt":
        tensors = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    else:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    for name, tensor in tensors.items():
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def compare(before: Path, after: Path) -> int:
    """Print how many artefacts of each case and stage are equal; return how many are not."""
    first, second = (json.loads(path.read_text()) for path in (before, after))
    table, differing = Table(title="Artefacts with equal bytes"), 0
    for column in ("case", "stage", "files", "equal", "first that differs"):
        table.add_column(column)
    for name in [name for name in CASES if name in first and name in second]:
        for stage in _STAGES:
            files = sorted(file for file in first[name].keys() | second[name].keys() if file.startswith(f"{stage}/"))
            unequal = [file for file in files if first[name].get(file) != second[name].get(file)]
            differing += len(unequal)
            if files:
                table.add_row(name, stage, str(len(files)), str(len(files) - len(unequal)), *unequal[:1])
    Console(width=140).print(table)
    return differing


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    of_record = commands.add_parser("record", help="run the cases in a checkout")
    of_record.add_argument("checkout", type=Path)
    of_record.add_argument("runs", type=Path, help="folder for the run directories")
    of_record.add_argument("output", type=Path, help="JSON file; cases that it lacks are added")
    of_record.add_argument("--cases", nargs="*", default=[], choices=CASES, help="only these")
    of_compare = commands.add_parser("compare", help="compare two files of digests")
    of_compare.add_argument("before", type=Path)
    of_compare.add_argument("after", type=Path)
    arguments = parser.parse_args()
    if arguments.command == "record":
        record(arguments.checkout, arguments.runs, arguments.output, arguments.cases)
    else:
        sys.exit(min(compare(arguments.before, arguments.after), 1))


if __name__ == "__main__":
    main()
