"""Multiple-choice and other tasks by EleutherAI's lm-evaluation-harness, which the extra `eval` installs."""

import logging
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.table import Table
from torch import nn

from nowag_pl.run.wording import shown

_ACCURACIES = ("acc_norm", "acc", "exact_match")
PAPER_TASKS = ("winogrande", "piqa", "hellaswag", "arc_easy", "arc_challenge", "rte")


@dataclass(frozen=True)
class TaskSettings:
    """The questions that a model is asked.

    Attributes:
        tasks: names of tasks or groups of tasks of the harness.
        num_fewshot: solved examples before each question, of all tasks or by the name of a task. None: each task's own
            number.
        chat_template: write questions as the model's chat template does. None: if the model has one.
        limit: use only the first examples of each task. None: all.
        batch_size: sequences that pass through the model together.
        include_path: folder with further task definitions (YAML). None: only those of the harness.
    """

    tasks: tuple[str, ...] = PAPER_TASKS
    num_fewshot: int | dict[str, int] | None = None
    chat_template: bool | None = None
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
        shots = self.num_fewshot if isinstance(self.num_fewshot, dict) else {"num_fewshot": self.num_fewshot}
        if isinstance(self.num_fewshot, dict) and (unknown := sorted(set(shots) - set(self.tasks))):
            raise ValueError(f"Expected num_fewshot of tasks that are asked, but got {', '.join(unknown)}.")
        numbers = {**dict.fromkeys(shots, 0), "limit": 1, "batch_size": 1}
        for name, least in numbers.items():
            value = shots[name] if name in shots else getattr(self, name)
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
    shots, templated = settings.num_fewshot, _is_templated(tokenizer, settings)
    by_task = shots if isinstance(shots, dict) else {}
    results = simple_evaluate(
        wrapped,
        tasks=[
            task
            for name in settings.tasks
            for task in (_with_shots(name, by_task[name], manager) if name in by_task else [name])
        ],
        num_fewshot=None if isinstance(shots, dict) else shots,
        limit=settings.limit,
        log_samples=False,
        task_manager=manager,
        apply_chat_template=templated,
        fewshot_as_multiturn=templated,
    )
    assert results is not None  # so only on ranks above zero
    tasks = {name: _task_result(name, results) for name in results["n-samples"]}
    return {
        "tasks": tasks,
        "groups": {name: _metrics(row) for name, row in results.get("groups", {}).items()},
        "average": mean_accuracy(tasks),
        "settings": {**asdict(settings), "tasks": list(settings.tasks), "chat_template": templated},
        "versions": {name: version(name) for name in ("lm_eval", "transformers", "datasets", "torch")},
        "seconds": time.perf_counter() - started,
    }


def mean_accuracy(tasks: Mapping[str, Mapping[str, Any]]) -> float | None:
    """Return the mean over tasks of their accuracy, the normalised one where a task has both; None if one has neither.

    It is the average of tables of zero-shot tasks in the papers.

    Args:
        tasks: results by task, each with `metrics`.

    Example:
        >>> mean_accuracy({"a": {"metrics": {"acc": 0.5, "acc_norm": 0.6}}, "b": {"metrics": {"acc": 0.8}}})
        0.7
    """
    found = [
        next((task["metrics"][name] for name in _ACCURACIES if name in task["metrics"]), None)
        for task in tasks.values()
    ]
    values = [value for value in found if value is not None]
    return sum(values) / len(values) if values and len(values) == len(found) else None


def _with_shots(name: str, shots: int, manager: Any) -> list[Any]:
    """Return a task, or the group or tasks of that name, with a number of solved examples before each question."""
    loaded = manager.load([name])
    for task in loaded["tasks"].values():
        task.set_config(key="num_fewshot", value=shots)
    return [loaded["groups"][name]] if name in loaded["groups"] else list(loaded["tasks"].values())


def _is_templated(tokenizer: Any, settings: TaskSettings) -> bool:
    """Tell whether questions are written by the chat template.

    Raises:
        ValueError: they should be, and the model has none.
    """
    has_template = bool(tokenizer.chat_template)
    if settings.chat_template and not has_template:
        raise ValueError("Expected a model with a chat template for evaluate.chat_template=true, but it has none.")
    return has_template if settings.chat_template is None else settings.chat_template


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
    if (average := evaluation.get("average")) is not None and len(evaluation["tasks"]) > 1:
        table.add_row("mean of the tasks", "", "", "", "accuracy", f"{average:.4f}", "")
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
