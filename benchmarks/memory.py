"""How much memory does it take to compress and measure a model of Llama-2-7B's shapes?

python -m benchmarks.memory [--method 2:4] [--blocks 4] [--sequences 4] [--seq_len 512] [--folder runs/benchmark_memory]

Writes a random model with Llama-2-7B's exact shapes, fewer blocks, a file for each block; calibrates, compresses,
writes the compressed model, and measures a random text with the dense and the compressed model. Shows the highest
resident memory of the process in each stage, less what it had before it opened the model, in multiples of a dense
block in bfloat16, and what the preflight of a `fit` expects at most. The bound: 2.5 blocks, the activations, and
embeddings and head, which stay in memory. NoWag-VQ is cut short, which changes its time and not its memory.
"""

import argparse
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from nowag_pl import NoWagPruner, NoWagQuantizer, needs
from nowag_pl.files import write_json, write_tensors
from nowag_pl.models.checkpoint import Checkpoint
from nowag_pl.models.streaming import StreamedModel
from nowag_pl.reports.needs_table import Available, host_bytes
from nowag_pl.stages.compression_run import CompressionRun
from nowag_pl.stages.hidden import Passage, passed
from nowag_pl.stages.plan import CalibrationSettings, CompressionSettings, Plan
from nowag_pl.stages.sizes import Holding, ModelSizes, methods_of

BATCH = 1
METHODS = {
    "50%": NoWagPruner(sparsity=0.5),
    "2:4": NoWagPruner(pattern=(2, 4)),
    "vq": NoWagQuantizer(subvector_dim=4, codebook_size=256, max_iters=2),
}


def write_model(folder: Path, num_blocks: int) -> None:
    """Write a random model a block at a time."""
    config = LlamaConfig(num_hidden_layers=num_blocks, dtype="bfloat16", max_position_embeddings=4096)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    Checkpoint("embedded").tokenizer.save_pretrained(folder)  # goes along with an export
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    groups: dict[str, list[str]] = {}
    for name in shapes:
        groups.setdefault(".".join(name.split(".")[:3]) if ".layers." in name else "rest", []).append(name)
    weight_map = {}
    for number, names in enumerate(groups.values(), 1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        write_tensors(folder / file, {n: torch.randn(shapes[n], dtype=torch.bfloat16) * 0.02 for n in names})
        weight_map.update(dict.fromkeys(names, file))
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})


class Resident:
    """The highest resident memory of this process in each stage, sampled."""

    def __init__(self) -> None:
        self.peaks: dict[str, int] = {}
        self.seconds: dict[str, float] = {}
        self._process = psutil.Process()
        self._start = self._process.memory_info().rss

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Sample until the stage ends."""
        ended, started = threading.Event(), time.perf_counter()

        def sample() -> None:
            while not ended.wait(0.01):
                now = self._process.memory_info()
                self.peaks[name] = max(self.peaks.get(name, 0), now.rss - self._start)

        thread = threading.Thread(target=sample)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            self.seconds[name] = time.perf_counter() - started


def _expected(run: CompressionRun, num_sequences: int, seq_len: int) -> dict[str, int]:
    """Return what the preflight expects of each stage on a CPU."""
    sizes = ModelSizes.of(run.checkpoint, methods_of(run))
    data = needs.DataShape(seq_len, {"random": num_sequences}, BATCH)
    settings = CalibrationSettings(num_sequences, batch_size=BATCH)
    calibration, compression = needs.compression(sizes, settings, seq_len)
    validation = needs.validation(sizes, data, Holding())
    stages = {
        "calibrate": calibration,
        "compress": compression,
        "measure dense": needs.reference(sizes, data, BATCH),
        "measure compressed": validation,
        "export": needs.export(sizes, 1),
        "measure export": validation,
    }
    on_cpu = Available(device=None, host=0, disk=0)
    return {stage: host_bytes(each, on_cpu, 1) for stage, each in stages.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=METHODS, default="2:4")
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--seq_len", type=int, default=512)
    parser.add_argument("--folder", type=Path, default=Path("runs/benchmark_memory"))
    args = parser.parse_args()
    dense = args.folder / "dense"
    if not (dense / "model.safetensors.index.json").is_file():
        write_model(dense, args.blocks)
    windows = torch.randint(3, 32000, (args.sequences, args.seq_len), generator=torch.Generator().manual_seed(0))
    for made in ("run", "export"):
        shutil.rmtree(args.folder / made, ignore_errors=True)
    resident = Resident()
    with resident.stage("open"):
        plan = Plan(CalibrationSettings(len(windows), batch_size=BATCH), CompressionSettings(METHODS[args.method]))
        run = CompressionRun(Checkpoint(str(dense)), args.folder / "run", plan)
        model = run.model
    with resident.stage("calibrate"):
        run.calibrate(windows)
    with resident.stage("compress"):
        run.compress()
    with resident.stage("measure dense"):
        run.reference({"random": windows}, BATCH)
    with resident.stage("measure compressed"):
        passed(Passage(model, run.compressed().load_block, "Compressed"), windows, BATCH, run.store.ranks)
    with resident.stage("export"):
        run.compressed().save(args.folder / "export")
    with resident.stage("measure export"):
        exported = StreamedModel(Checkpoint(str(args.folder / "export")))
        passed(Passage(exported, exported.load_block, "Export"), windows, BATCH, run.store.ranks)
    block = sum(parameter.numel() for parameter in model.blocks[0].parameters()) * 2
    skeleton = sum(parameter.nbytes for parameter in model.skeleton.parameters())
    config = run.checkpoint.config
    activations = 2 * windows.numel() * config.hidden_size + 2 * 4 * BATCH * args.seq_len * config.intermediate_size
    bound = 2.5 * block + skeleton + activations
    block_mib, skeleton_mib, activations_mib = (round(size / 2**20) for size in (block, skeleton, activations))
    name, method = args.method, METHODS[args.method]
    if isinstance(method, NoWagQuantizer):
        name += f" (d = {method.subvector_dim}, k = {method.codebook_size}, {method.max_iters} iterations)"
    title = f"{name}: {args.blocks} blocks of {block_mib} MiB, embeddings and head {skeleton_mib} MiB"
    table = Table(title=f"{title}, activations {activations_mib} MiB")
    expected = _expected(run, *windows.shape)
    columns = (
        "stage",
        "seconds",
        "MiB",
        "expected MiB",
        "blocks, less embeddings and activations",
        "share of the bound",
    )
    for column in columns:
        table.add_column(column, justify="left" if column == "stage" else "right")
    for name, peak in resident.peaks.items():
        own = (peak - skeleton - activations) / block
        at_most = f"{expected[name] / 2**20:.0f}" if name in expected else ""
        numbers = f"{resident.seconds[name]:.1f}", f"{peak / 2**20:.0f}", at_most, f"{own:.2f}", f"{peak / bound:.2f}"
        table.add_row(name, *numbers)
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
