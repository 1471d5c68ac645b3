"""A tiny run with every stage, and what it makes, for the attacks."""

import hashlib
import json
import re
from pathlib import Path

from tiny_models import fit_arguments

STAGES = (
    "--trainer.max_epochs=2",
    "--data.max_train_windows=16",
    "--trainer.logger=false",
    "--finetuning.enabled=true",
    "--finetuning.num_sequences=4",
    "--finetuning.num_held_out=2",
    "--finetuning.max_epochs=2",
    "--compression.budget.num_sequences=2",
    "--compression.budget.candidates=[{sparsity: 0.4}, {sparsity: 0.6}]",
)


def arguments_of(work: Path, model: Path, run_dir: Path) -> list[str]:
    """Return the arguments of a `fit` with a budget, blockwise finetuning and end-to-end training."""
    return fit_arguments(work, model, run_dir, *STAGES)


def products(run: Path) -> dict[str, str]:
    """Return the digest of everything that a run makes, without times: equal for equal work.

    Exports and finished artefacts by their tensors and settings, the report by its figures.
    """
    from nowag_pl.files import read_tensors

    found: dict[str, str] = {}
    for path in sorted(run.rglob("*")):
        name = str(path.relative_to(run))
        if not path.is_file() or ".damaged" in name or "/." in f"/{name}" or path.suffix in {".html", ".yaml"}:
            continue
        if name.startswith(("moments/", "compressed/", "finetuned/block")):
            try:
                tensors, metadata = read_tensors(path)
            except ValueError:
                found[name] = "damaged"
                continue
            metadata.pop("seconds", None)
            digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
            for key in sorted(tensors):
                digest.update(key.encode() + tensors[key].contiguous().view(-1).numpy().tobytes())
            found[name] = digest.hexdigest()
        elif name.startswith("export") and path.name != "README.md":
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        elif name == "report.json":
            found[name] = _figures(path)
    return found


def _figures(path: Path) -> str:
    try:
        report = json.loads(path.read_text())
    except ValueError:
        return "damaged"
    text = json.dumps({key: report.get(key) for key in ("perplexity", "kl_divergence", "bits_per_weight", "sparsity")})
    return re.sub(r"(\.\d{6})\d+", r"\1", text)
