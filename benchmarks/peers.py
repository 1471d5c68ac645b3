"""What people would use instead, on the same model, text and calibration sequences.

python -m benchmarks.peers [--peers hqq llama.cpp] [--python PATH] [--model smollm2] [--windows N]

Each peer has an environment of its own, runs/peers/<peer>/venv, unless --python names one that has its packages (listed
in `PEERS`); none of them is a dependency of this project. A script of benchmarks/peer_scripts/ runs there and writes a
dense folder, whose linears hold what is left of the weights; benchmarks.folder_quality measures it against the dense
model. Finished settings are read. Figures go to benchmarks/results/peers.json.
"""

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from benchmarks.folder_quality import compare, opened, windows_of
from benchmarks.prose_llama import second_moments
from benchmarks.protocol import NUM_SEQUENCES, ROOT, SEQ_LEN, STANDARD, Texts, described, texts
from benchmarks.results import RESULTS, hardware, keep_rows, read_results
from nowag_pl.data.protocols import stream_tokens
from nowag_pl.data.sources import LocalFiles, PythonDocs, TextSource
from nowag_pl.data.tokens import random_windows
from nowag_pl.files import read_json, write_json, write_tensors
from nowag_pl.models.checkpoint import Checkpoint
from nowag_pl.models.streaming import StreamedModel

SCRIPTS = Path(__file__).resolve().parent / "peer_scripts"
SOURCE = "python -m benchmarks.peers"


class Peer(NamedTuple):
    """A program, what it takes to run it, and its settings by the name of their row."""

    script: str
    requirements: tuple[str, ...]
    settings: dict[str, tuple[str, ...]]


PEERS = {
    "llm-compressor": Peer(
        "llm_compressor_script.py",
        ("llmcompressor",),
        {
            "llm-compressor SparseGPT 50 %": ("--method=sparsegpt",),
            "llm-compressor SparseGPT 2:4": ("--method=sparsegpt", "--structure=2:4"),
            "llm-compressor Wanda 50 %": ("--method=wanda",),
            "llm-compressor GPTQ 2 bits, groups of 64": ("--method=gptq", "--bits=2"),
            "llm-compressor GPTQ 3 bits, groups of 64": ("--method=gptq", "--bits=3"),
        },
    ),
    "auto-round": Peer(
        "auto_round_script.py",
        ("auto-round",),
        {
            "AutoRound 2 bits, groups of 64": ("--bits=2",),
            "AutoRound 3 bits, groups of 64": ("--bits=3",),
        },
    ),
    "hqq": Peer(
        "hqq_script.py",
        ("hqq", "safetensors"),
        {
            "HQQ 2 bits, groups of 64": ("--bits=2",),
            "HQQ 3 bits, groups of 64": ("--bits=3",),
        },
    ),
    "llama.cpp": Peer(
        "llama_cpp_script.py",
        ("libggml-python", "gguf", "torch", "safetensors"),
        {f"llama.cpp {kind}, importance matrix": (f"--type={kind}",) for kind in ("IQ2_XXS", "IQ2_S", "Q2_K", "Q3_K")},
    ),
}


def interpreter(name: str, folder: Path, given: str | None) -> str:
    """Return the Python that has a peer's packages, made once."""
    if given is not None:
        return given
    python = folder / "venv" / "bin" / "python"
    if not (folder / "venv" / ".installed").is_file():
        subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *PEERS[name].requirements], check=True)
        (folder / "venv" / ".installed").touch()
    return str(python)


def prepare(checkpoint: Checkpoint, chosen: Texts, work: Path) -> None:
    """Write what the scripts are given: calibration sequences, and second moments of every linear's input."""
    if (work / "moments.safetensors").is_file():
        return
    calibration = chosen.calibration
    source: TextSource = PythonDocs("train") if calibration is None else LocalFiles((str(calibration),))
    tokens = random_windows(stream_tokens(source, checkpoint.tokenizer), SEQ_LEN, NUM_SEQUENCES, STANDARD.seed)
    write_tensors(work / "calibration.safetensors", {"tokens": tokens})
    model = StreamedModel(checkpoint)
    moments = {
        f"{model.block_name(index)}.{name}": moment
        for index, block in enumerate(second_moments(checkpoint, tokens))
        for name, moment in block.items()
    }
    write_tensors(work / "moments.safetensors", moments)


def run(python: str, script: str, options: tuple[str, ...], model: Path, work: Path, output: Path) -> None:
    """Run a peer's script unless its folder is finished.

    Raises:
        RuntimeError: it fails.
    """
    if (output / "peer.json").is_file():
        return
    output.mkdir(parents=True, exist_ok=True)
    places = ["--model", str(model), "--work", str(work), "--output", str(output)]
    # The checkout is not on the path: a peer sees its own packages and its script alone.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    with open(output / "log.txt", "wb") as log:
        command = [python, str(SCRIPTS / script), *places, *options]
        done = subprocess.run(command, env=environment, stdout=log, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        raise RuntimeError(f"Expected {script} to succeed, but it ended with {done.returncode}: see {log.name}.")


def row_of(name: str, output: Path, figures: dict[str, Any]) -> dict[str, Any]:
    """Return the figures of a measured folder."""
    about = read_json(output / "peer.json")
    return {
        "method": name,
        "bits_per_weight": about["bits_per_weight"],
        "sparsity": about["sparsity"],
        **figures,
        "seconds": about["seconds"],
        "versions": about["versions"],
        "hardware": hardware(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1))),
        "source": SOURCE,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--settings", help="only those whose name matches this regular expression")
    parser.add_argument("--python", help="interpreter that has the packages of the chosen peers")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--windows", type=int, help="evaluate the first windows only")
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument("--output", type=Path, default=Path("runs/peers"))
    parser.add_argument("--results", type=Path, default=RESULTS / "peers.json")
    args = parser.parse_args()
    os.chdir(ROOT)
    console, checkpoint = Console(width=140), Checkpoint(args.model)
    place = args.output.resolve() / Path(args.model).name
    chosen = texts(STANDARD, args.shared, Path("runs/real_model/texts"))
    prepare(checkpoint, chosen, place)
    windows = windows_of(checkpoint, chosen, SEQ_LEN, args.windows)
    reference, head = opened(checkpoint), protocol_of(args.model, chosen)
    for name in args.peers:
        peer = PEERS[name]
        python = interpreter(name, args.output.resolve() / name, args.python)
        for row, options in peer.settings.items():
            if args.settings and not re.search(args.settings, row):
                continue
            output = place / re.sub(r"[^A-Za-z0-9.-]+", "_", row)
            try:
                run(python, peer.script, options, checkpoint.folder, place, output)
            except RuntimeError as error:
                console.print(f"{row} failed: {error}")
                continue
            file = output / f"quality-{len(windows)}.json"
            if not file.is_file():
                write_json(file, compare(opened(Checkpoint(str(output))), reference, windows))
            keep_rows(args.results, head, [row_of(row, output, read_json(file))])
            console.print(row, read_json(file))
    console.print(f"{len(read_results('peers')['rows'])} rows in {args.results}")


def protocol_of(model: str, chosen: Texts) -> dict[str, Any]:
    """Return what holds of all rows."""
    return {"model": Path(model).name, "protocol": described(STANDARD, chosen, None)}


if __name__ == "__main__":
    main()
