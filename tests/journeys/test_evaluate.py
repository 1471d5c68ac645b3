"""Tasks of lm-evaluation-harness from the command line, on tiny models and a local task."""

import functools
import json
import random
import re

import pytest
import torch
import yaml
from tiny_models import fit_arguments, load_whole

from nowag_pl import load_compressed
from nowag_pl.lit import evaluation
from nowag_pl.lit.evaluation import PAPER_TASKS, TaskSettings, task_manager
from nowag_pl.models.checkpoint import Checkpoint
from nowag_pl.reports.needs_table import Available

pytest.importorskip("lm_eval", reason="needs the extra eval")
pytest_plugins = ["tiny_fixtures"]

WORDS = ["weight", "block", "row", "column", "matrix", "class", "returns a list", "the model", "in memory", "of"]
NUM_QUESTIONS = 40
KEYS = {"model", "dtype", "tasks", "groups", "average", "settings", "versions", "seconds", "sha256"}


@pytest.fixture(scope="session")
def tasks_folder(tmp_path_factory):
    """Two tasks, questions with four and with two choices, and a group of both."""
    folder = tmp_path_factory.mktemp("tasks")
    for name, num_choices in (("four_choices", 4), ("two_choices", 2)):
        drawn = random.Random(num_choices)
        rows = [
            {
                "question": " ".join(drawn.choices(WORDS, k=5)),
                "choices": drawn.sample(WORDS, num_choices),
                "answer": drawn.randrange(num_choices),
            }
            for _ in range(NUM_QUESTIONS)
        ]
        file = folder / f"{name}.jsonl"
        file.write_text("\n".join(map(json.dumps, rows)))
        task = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(file)}, "cache_dir": str(folder / "cache")},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "Question: {{question}}\nAnswer:",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "{{answer}}",
            "metric_list": [
                {"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in ("acc", "acc_norm")
            ],
            "metadata": {"version": 3},
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(task))
    means = [{"metric": "acc", "weight_by_size": True}]
    group = {"group": "both", "task": ["four_choices", "two_choices"], "aggregate_metric_list": means}
    (folder / "both.yaml").write_text(yaml.safe_dump(group))
    return folder


@pytest.fixture
def own_tasks_only(monkeypatch):
    """Leave out the harness's own 14,000 files, which take seconds to read."""
    import lm_eval.tasks

    monkeypatch.setattr(
        lm_eval.tasks, "TaskManager", functools.partial(lm_eval.tasks.TaskManager, include_defaults=False)
    )


@pytest.fixture
def evaluate(command_line, own_tasks_only, model_folder, tasks_folder, tmp_path):
    def run(*more, model=None, tasks="[four_choices]"):
        return command_line(
            [
                "evaluate",
                f"--model.path={model or model_folder()}",
                f"--run_dir={tmp_path / 'evaluation'}",
                f"--tasks={tasks}",
                f"--include_path={tasks_folder}",
                "--trainer.accelerator=cpu",
                *more,
            ]
        )

    return run


@pytest.fixture
def result(tmp_path):
    return lambda: json.loads((tmp_path / "evaluation" / "evaluation.json").read_text())


@torch.no_grad()
def log_likelihood(model, tokenizer, context: str, continuation: str) -> float:
    """Sum the log-probabilities of the tokens of `continuation`, one question at a time, unpadded."""
    tokens, num_context = tokenizer(context + continuation)["input_ids"], len(tokenizer(context)["input_ids"])
    log_probabilities = model(torch.tensor([tokens]), use_cache=False).logits[0].double().log_softmax(dim=-1)
    return sum(float(log_probabilities[place - 1, tokens[place]]) for place in range(num_context, len(tokens)))


def accuracies(model, folder, file, limit: int | None = None) -> dict[str, float]:
    """Return the fraction of questions whose answer is the likeliest choice, whole and per character."""
    tokenizer = Checkpoint(str(folder)).tokenizer
    rows = [json.loads(line) for line in file.read_text().splitlines()][:limit]
    right = {"acc": 0, "acc_norm": 0}
    for row in rows:
        context = f"Question: {row['question']}\nAnswer:"
        scores = [log_likelihood(model, tokenizer, context, f" {choice}") for choice in row["choices"]]
        per_character = [score / len(choice) for score, choice in zip(scores, row["choices"], strict=True)]
        right["acc"] += scores.index(max(scores)) == row["answer"]
        right["acc_norm"] += per_character.index(max(per_character)) == row["answer"]
    return {name: count / len(rows) for name, count in right.items()}


def test_dense_model_gets_the_accuracies_of_the_oracle(evaluate, result, model_folder, tasks_folder):
    outcome = evaluate(model=model_folder("qwen2"))
    assert outcome.code == 0
    task = result()["tasks"]["four_choices"]
    expected = accuracies(load_whole(model_folder("qwen2")), model_folder("qwen2"), tasks_folder / "four_choices.jsonl")
    assert expected["acc"] != expected["acc_norm"]  # else the test could mistake one for the other
    assert task["metrics"] == pytest.approx(expected)
    assert (task["num_examples"], task["num_examples_total"]) == (NUM_QUESTIONS, NUM_QUESTIONS)
    error = (expected["acc"] * (1 - expected["acc"]) / (NUM_QUESTIONS - 1)) ** 0.5
    assert task["standard_errors"]["acc"] == pytest.approx(error)
    assert re.search(rf"acc\s+│\s+{expected['acc']:.4f}\s+│\s+{error:.4f}", outcome.output), outcome.output


def test_compressed_model_gets_the_accuracies_of_the_oracle(
    evaluate, result, command_line, model_folder, workplace, tasks_folder, tmp_path
):
    assert command_line(fit_arguments(workplace, model_folder(), tmp_path / "run")).code == 0
    folder = tmp_path / "run" / "export"
    assert evaluate(model=folder, tasks="[two_choices, four_choices]").code == 0
    model, dense = load_compressed(folder), load_whole(model_folder())
    differs = False
    for name in ("two_choices", "four_choices"):
        file = tasks_folder / f"{name}.jsonl"
        expected = accuracies(model, folder, file)
        assert result()["tasks"][name]["metrics"] == pytest.approx(expected)
        differs |= expected != accuracies(dense, folder, file)
    assert differs  # else the dense model would have passed as well


def test_file_says_what_was_asked_and_by_what(evaluate, result, model_folder, tasks_folder):
    assert evaluate("--batch_size=3").code == 0
    content = result()
    assert set(content) == KEYS
    assert content["model"] == str(model_folder())
    assert content["dtype"] == "float32"
    assert content["settings"] == {
        "tasks": ["four_choices"],
        "num_fewshot": None,
        "chat_template": False,
        "limit": None,
        "batch_size": 3,
        "include_path": str(tasks_folder),
    }
    assert set(content["versions"]) == {"lm_eval", "transformers", "datasets", "torch"}
    assert content["tasks"]["four_choices"]["version"] == 3
    assert content["tasks"]["four_choices"]["num_fewshot"] == 0
    assert content["average"] == content["tasks"]["four_choices"]["metrics"]["acc_norm"]
    assert content["seconds"] > 0


def test_shots_are_given_by_task(evaluate, result, model_folder):
    folder = model_folder(max_position_embeddings=512)
    assert evaluate("--num_fewshot={four_choices: 2}", model=folder, tasks="[four_choices, two_choices]").code == 0
    tasks = result()["tasks"]
    assert {name: task["num_fewshot"] for name, task in tasks.items()} == {"four_choices": 2, "two_choices": 0}
    assert result()["average"] == pytest.approx(
        sum(task["metrics"]["acc_norm"] for task in tasks.values()) / len(tasks)
    )
    message = evaluate("--num_fewshot={other: 2}").message
    assert message == "Expected num_fewshot of tasks that are asked, but got other."


def test_a_chat_template_writes_the_questions(evaluate, result, model_folder):
    folder = model_folder(seed=3)
    assert evaluate(model=folder).code == 0
    plain = result()["tasks"]["four_choices"]["metrics"]
    message = evaluate("--chat_template=true", model=folder).message
    assert message.startswith("Expected a model with a chat template")
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }} matrix block row {% endfor %}"
    (folder / "chat_template.jinja").write_text(template)
    assert evaluate(model=folder).code == 0
    assert result()["settings"]["chat_template"] is True
    assert result()["tasks"]["four_choices"]["metrics"] != plain
    assert evaluate("--chat_template=false", model=folder).code == 0
    assert result()["tasks"]["four_choices"]["metrics"] == plain


def test_limit_takes_the_first_examples_and_is_told(evaluate, result, model_folder, tasks_folder):
    outcome = evaluate("--limit=7")
    task = result()["tasks"]["four_choices"]
    expected = accuracies(load_whole(model_folder()), model_folder(), tasks_folder / "four_choices.jsonl", limit=7)
    assert task["metrics"] == pytest.approx(expected)
    assert (task["num_examples"], task["num_examples_total"]) == (7, NUM_QUESTIONS)
    assert "only the first 7 examples of each task" in " ".join(outcome.output.split())


def test_a_single_example_has_no_standard_error(evaluate, result):
    assert evaluate("--limit=1").code == 0
    task = result()["tasks"]["four_choices"]
    assert set(task["metrics"]) == {"acc", "acc_norm"}
    assert task["standard_errors"] == {}


def test_group_has_the_mean_of_its_tasks(evaluate, result):
    assert evaluate(tasks="[both]").code == 0
    content = result()
    values = [content["tasks"][name]["metrics"]["acc"] for name in ("four_choices", "two_choices")]
    assert values[0] != values[1]
    assert content["groups"]["both"]["metrics"] == {"acc": pytest.approx(sum(values) / 2)}


def test_solved_examples_change_what_is_asked(evaluate, result, model_folder):
    folder, found = model_folder(max_position_embeddings=512), []
    for number in (0, 5):
        assert evaluate(f"--num_fewshot={number}", model=folder, tasks="[four_choices, two_choices]").code == 0
        tasks = result()["tasks"]
        assert {task["num_fewshot"] for task in tasks.values()} == {number}
        found.append([task["metrics"] for task in tasks.values()])
    assert found[0] != found[1]


def test_needs_of_the_whole_model_are_shown_with_a_warning(evaluate, monkeypatch, caplog):
    monkeypatch.setattr(Available, "here", classmethod(lambda cls, folder, device: cls(None, 2**14, 2**40)))
    outcome = evaluate("--limit=1", "--batch_size=2")
    assert outcome.code == 0
    assert "questions" in outcome.message
    assert re.search("questions may need .* of host memory.*; change batch_size", caplog.text)


def test_embedded_model_is_asked_as_well(evaluate, result):
    assert evaluate("--limit=2", model="embedded").code == 0
    assert result()["model"] == "embedded"


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("--limit=0", "Expected limit of at least 1, but got 0."),
        ("--limit=-3", "Expected limit of at least 1, but got -3."),
        ("--batch_size=0", "Expected batch_size of at least 1, but got 0."),
        ("--num_fewshot=-1", "Expected num_fewshot of at least 0, but got -1."),
        ("--tasks=[]", "Expected at least one task, but got none."),
        ("--include_path=nowhere", "Expected include_path to be a folder, but got 'nowhere'."),
    ],
)
def test_bad_setting_is_refused(setting, message, evaluate, tmp_path):
    outcome = evaluate(setting)
    assert outcome.code == 1
    assert outcome.message == message
    assert not (tmp_path / "evaluation").exists()


def test_part_of_an_example_is_refused(evaluate):
    assert evaluate("--limit=0.5").code != 0


def test_unknown_tasks_are_named_in_one_line(evaluate, tmp_path):
    outcome = evaluate(tasks="[four_choices, four_chioces, arc_eazy]")
    assert outcome.code == 1
    assert re.fullmatch(r"Expected tasks that lm_eval \S+ .* but got arc_eazy, four_chioces\. .*", outcome.message)
    assert not (tmp_path / "evaluation").exists()


def test_data_that_cannot_be_had_are_an_error_in_one_line(evaluate, tasks_folder, tmp_path):
    folder = tmp_path / "more"
    folder.mkdir()
    task = yaml.safe_load((tasks_folder / "four_choices.yaml").read_text())
    task |= {"task": "lost", "dataset_kwargs": {"data_files": {"test": str(tmp_path / "no-such-data.jsonl")}}}
    (folder / "lost.yaml").write_text(yaml.safe_dump(task))
    outcome = evaluate(f"--include_path={folder}", tasks="[lost]")
    assert outcome.code == 1
    assert "no-such-data.jsonl" in outcome.message
    assert "\n" not in outcome.message


def test_without_the_harness_the_extra_is_named(evaluate, monkeypatch):
    monkeypatch.setattr(evaluation, "find_spec", lambda name: None)
    outcome = evaluate()
    assert outcome.code == 1
    assert "pip install -c constraints.txt -e '.[eval]'" in outcome.message


@pytest.mark.slow
def test_harness_knows_the_tasks_of_the_paper():
    manager = task_manager(TaskSettings())
    assert set(PAPER_TASKS) <= set(manager.all_tasks)
    assert "mmlu" in manager.all_tasks
