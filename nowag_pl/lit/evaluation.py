"""Multiple-choice and other tasks by EleutherAI's lm-evaluation-harness, which the extra `eval` installs."""

import logging
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.table import Table
from torch import nn

from nowag_pl.run.wording import shown

PAPER_TASKS = ("winogrande", "piqa", "hellaswag", "arc_easy", "arc_challenge", "rte")


@dataclass(frozen=True)
class TaskSettings:
    """The questions that a model is asked.

    Attributes:
        tasks: names of tasks or groups of tasks of the harness.
        num_fewshot: solved examples before each question. None: each task's own number.
        limit: use only the first examples of each task. None: all.
        batch_size: sequences that pass through the model together.
        include_path: folder with further task definitions (YAML). None: only those of the harness.
    """

    tasks: tuple[str, ...] = PAPER_TASKS
    num_fewshot: int | None = None
    limit: int | None = None
    batch_size: int = 8
    include_path: str | None = None

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            ValueError: no task is given, a number is out of its range, or there is no folder `include_path`.
        """
        if not self.tasks:
            raise ValueError("Expected at least one task, but got none.")
        for name, least in {"num_fewshot": 0, "limit": 1, "batch_size": 1}.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"Expected {name} of at least {least}, but got {value}.")
        if self.include_path is not None and not Path(self.include_path).is_dir():
            raise ValueError(f"Expected include_path to be a folder, but got {self.include_path!r}.")


def task_manager(settings: TaskSettings) -> Any:
    """Return the harness's index of tasks.

    Args:
        settings: the questions.

    Raises:
        ValueError: the harness is not installed, or does not know a task.
    """
    if find_spec("lm_eval") is None:
        raise ValueError(
            "Expected lm-evaluation-harness (lm_eval), but it is not installed. Install the extra with "
            "pip install -c constraints.txt -e '.[eval]'."
        )
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=settings.include_path)
    unknown = sorted(set(settings.tasks) - set(manager.all_tasks))
    if unknown:
        raise ValueError(
            f"Expected tasks that lm_eval {version('lm_eval')} or include_path defines, but got {', '.join(unknown)}. "
            "lm_eval ls tasks lists them."
        )
    return manager


def evaluate_tasks(model: nn.Module, tokenizer: Any, settings: TaskSettings, manager: Any) -> dict[str, Any]:
    """Ask the model the questions of the settings.

    Args:
        model: a transformers model, dense or compressed, on the device on which it will run.
        tokenizer: its tokenizer.
        settings: the questions.
        manager: from :func:`task_manager`.

    Returns:
        JSON values: `tasks` (and `groups`, the means over the tasks of a group) with metrics, standard errors,
        version, number of solved examples and of questions; `settings`, `versions` and `seconds`.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    started = time.perf_counter()
    logger = logging.getLogger("lm_eval.models.huggingface")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it warns that a model object is given
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=settings.batch_size)
    logger.setLevel(level)
    results = simple_evaluate(
        wrapped,
        tasks=list(settings.tasks),
        num_fewshot=settings.num_fewshot,
        limit=settings.limit,
        log_samples=False,
        task_manager=manager,
    )
    assert results is not None  # so only on ranks above zero
    return {
        "tasks": {name: _task_result(name, results) for name in results["n-samples"]},
        "groups": {name: _metrics(row) for name, row in results.get("groups", {}).items()},
        "settings": {**asdict(settings), "tasks": list(settings.tasks)},
        "versions": {name: version(name) for name in ("lm_eval", "transformers", "datasets", "torch")},
        "seconds": time.perf_counter() - started,
    }


def evaluation_table(evaluation: dict[str, Any]) -> Table:
    """Lay out the figures of :func:`evaluate_tasks`."""
    limit = evaluation["settings"]["limit"]
    title = shown(f"{evaluation['model']}: lm_eval {evaluation['versions']['lm_eval']}")
    table = Table(title=title, caption=None if limit is None else f"only the first {limit} examples of each task")
    for column in ("task", "version", "shots", "examples", "metric", "value", "standard error"):
        table.add_column(column, justify="left" if column in ("task", "metric") else "right")
    for name, task in evaluation["tasks"].items():
        leading = [name, *(str(task[key]) for key in ("version", "num_fewshot", "num_examples"))]
        _add_rows(table, leading, task)
    for name, group in evaluation["groups"].items():
        _add_rows(table, [f"{name} (mean)", "", "", ""], group)
    return table


def _add_rows(table: Table, leading: list[str], result: dict[str, Any]) -> None:
    for metric, value in result["metrics"].items():
        error = result["standard_errors"].get(metric)
        table.add_row(*map(shown, leading), metric, f"{value:.4f}", "" if error is None else f"{error:.4f}")


def _task_result(name: str, results: Any) -> dict[str, Any]:
    """Gather the figures of one task, which the harness gives in several places."""
    return {
        **_metrics(results["results"][name]),
        "version": results["versions"].get(name),
        "num_fewshot": results["n-shot"].get(name),
        "num_examples": results["n-samples"][name]["effective"],
        "num_examples_total": results["n-samples"][name]["original"],
    }


def _metrics(row: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Split the harness's "acc,none" and "acc_stderr,none" into metrics and standard errors by metric.

    A filter other than "none" stays in the name, as in "exact_match,strict-match".
    """
    metrics: dict[str, float] = {}
    errors: dict[str, float] = {}
    for key, value in row.items():
        name, comma, filter_name = key.partition(",")
        if not comma or not isinstance(value, (int, float)):
            continue
        suffix = "" if filter_name == "none" else f",{filter_name}"
        if name.endswith("_stderr"):
            errors[name.removesuffix("_stderr") + suffix] = float(value)
        else:
            metrics[name + suffix] = float(value)
    return {"metrics": metrics, "standard_errors": errors}
