"""Do models learn to answer as rightly in fewer tokens, dense and compressed?

python -m benchmarks.laconic [--variants dense pruned quantized] [--seeds 0 1 2] [--run_dir runs/benchmark_laconic]

Trains the model of configs/recipes/arithmetic.yaml, and then, for each variant and seed, twice by
configs/recipes/laconic_arithmetic.yaml: with its budget and without one. Compressed variants are compressed first, in
the same command: `pruned` by NoWag-P 50 %, `quantized` by NoWag-VQ at 2 bits. Then 200 questions that no training has
seen are answered 4 times each at temperature 1, as in training, before and after. Runs that are finished are not made
again. The table is printed and written to benchmarks/results/laconic.json.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from benchmarks.results import RESULTS, hardware, keep_rows
from nowag_pl.data.prompts import PromptSource
from nowag_pl.data.rewards import ExactNumber
from nowag_pl.models.checkpoint import Checkpoint
from nowag_pl.models.format.saving import is_compressed, load_compressed
from nowag_pl.models.generation import chat_tokens
from nowag_pl.models.rollouts import SamplingSettings, sample_answers, stop_tokens, uniform_draws

ROOT = Path(__file__).resolve().parent.parent
RECIPE = "configs/recipes/laconic_arithmetic.yaml"
COMPRESSIONS = {
    "dense": [],
    "pruned": ["--config=configs/method/nowag_p_50.yaml", "--compression.enabled=true"],
    "quantized": ["--config=configs/method/nowag_vq_2bit_small.yaml", "--compression.enabled=true"],
}
ANSWERS = SamplingSettings(group_size=4, max_new_tokens=84, batch_size=400, seed=1)


def run(*arguments: str) -> None:
    """Run a command of the project, whose output goes nowhere."""
    subprocess.run([sys.executable, *arguments], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def supervised(folder: Path) -> Path:
    """Return the folder of the model that rambles, trained if it is not there."""
    data, trained = ROOT / "runs" / "arithmetic", folder / "supervised"
    if not (data / "model").is_dir():
        run("scripts/make_arithmetic.py", str(data))
    if not (trained / "export_finetuned" / "config.json").is_file():
        run("main.py", "fit", "--config=configs/recipes/arithmetic.yaml", f"--run_dir={trained}")
    return trained / "export_finetuned"


def trained(folder: Path, model: Path, variant: str, seed: int, budget: bool) -> Path:
    """Return the run directory of a training on rewards."""
    run_dir = folder / f"{variant}-{seed}{'' if budget else '-without'}"
    if not (run_dir / "export_finetuned" / "config.json").is_file():
        arguments = [f"--config={RECIPE}", *COMPRESSIONS[variant], f"--run_dir={run_dir}", f"--model.path={model}"]
        arguments += [f"--seed_everything={seed}", f"--model.objective.init_args.sampling.seed={seed}"]
        arguments += [] if budget else ["--model.objective.init_args.budget=null"]
        run("main.py", "fit", *arguments)
    return run_dir


def measured(folder: Path) -> dict[str, float]:
    """Return the share of right answers of a model, and their mean length."""
    checkpoint = Checkpoint(str(folder))
    model: Any = load_compressed(folder) if is_compressed(folder) else checkpoint.load().eval()
    prompts = PromptSource(str(ROOT / "runs" / "arithmetic" / "questions.jsonl")).read()
    samples = [(number, answer) for number in range(len(prompts)) for answer in range(ANSWERS.group_size)]
    tokens = [chat_tokens(checkpoint.tokenizer, prompts[number].messages) for number, _ in samples]
    stops = stop_tokens(model, checkpoint.tokenizer)
    answers = sample_answers(model, tokens, uniform_draws(ANSWERS, 0, samples), ANSWERS, stops)
    rights = 0.0
    for (number, _), row, length in zip(samples, answers.tokens.tolist(), answers.lengths.tolist(), strict=True):
        text = str(checkpoint.tokenizer.decode(row[:length], skip_special_tokens=True))
        rights += ExactNumber().score(text, prompts[number].answer)
    return {"accuracy": rights / len(samples), "mean_length": float(answers.lengths.double().mean())}


def compared(folder: Path, variant: str, seed: int) -> dict[str, Any]:
    """Return the figures of a variant and seed: before, after, and after a training without a budget."""
    model = supervised(folder)
    run_dir = trained(folder, model, variant, seed, budget=True)
    before = measured(model if variant == "dense" else run_dir / "export")
    without = measured(trained(folder, model, variant, seed, budget=False) / "export_finetuned")
    after = measured(run_dir / "export_finetuned")
    report = json.loads((run_dir / ("policy.json" if variant == "dense" else "report.json")).read_text())
    history = (report if variant == "dense" else report["policy"])["history"]
    lengths = history["mean_length"][-20:]
    return {
        "run": f"{variant}, seed {seed}",
        "before": before,
        "without_budget": without,
        "after": after,
        "last_20_steps_length": sum(lengths) / len(lengths),
        "last_price": history["lambda"][-1],
    }


def table(rows: list[dict[str, Any]], budget: int) -> Table:
    """Lay the figures out."""
    made = Table(title=f"Accuracy and tokens of an answer, budget {budget} tokens")
    for column in ("run", "before", "without a budget", "with it", "of the budget", "fewer tokens", "lambda"):
        made.add_column(column, justify="left" if column == "run" else "right")
    for row in rows:
        states = [row[key] for key in ("before", "without_budget", "after")]
        cells = [f"{state['accuracy']:.1%}, {state['mean_length']:.1f}" for state in states]
        length, rambling = row["after"]["mean_length"], row["before"]["mean_length"]
        made.add_row(
            row["run"], *cells, f"{length / budget:.2f}", f"{1 - length / rambling:.0%}", f"{row['last_price']:.3f}"
        )
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", choices=COMPRESSIONS, default=list(COMPRESSIONS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--run_dir", type=Path, default=Path("runs/benchmark_laconic"))
    parser.add_argument("--results", type=Path, default=RESULTS / "laconic.json")
    args = parser.parse_args()
    recipe = yaml.safe_load((ROOT / RECIPE).read_text())["model"]["objective"]["init_args"]
    folder = args.run_dir.resolve()
    head = {"budget": recipe["budget"], "questions": 200, "answers_each": ANSWERS.group_size, "temperature": 1.0}
    rows = []
    for variant in args.variants:
        for seed in args.seeds:
            rows.append(compared(folder, variant, seed))
            keep_rows(args.results, {**head, "hardware": hardware(1)}, rows, key="run")
    Console(width=140).print(table(rows, recipe["budget"]["tokens"]))


if __name__ == "__main__":
    main()
