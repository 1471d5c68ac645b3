"""What README and documentation say can be done, can be done."""

import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from source_messages import VALUE, messages
from tiny_models import ROOT, subprocess_environment

import main as command_line
from nowag_pl.compressors import Compressor

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FOREIGN = {"CUDA out of memory", "Killed"}  # of PyTorch and of the operating system
ELSEWHERE = (
    "meta-llama/",
    "llama_",
    "wikitext2_c4",
    "evaluate",
    "small_moe",
    "small-moe",
)  # what only a hub or a script gives
ENDS_IN_PARSING = {"--help", "--print_config", "--print_completion", "--compression.compressor.help"}
PLACES = {"<folder or hub id>": "embedded", "<model>": "llama_2_7b", "<method>": "nowag_p_50", "<run>": "mine"}
SMALL_VALIDATION = ["--data.max_eval_windows=2", "--trainer.accelerator=cpu"]
SMALL_FIT = [
    *SMALL_VALIDATION,
    "--data.max_train_windows=8",
    "--calibration.num_sequences=2",
    "--finetuning.num_sequences=4",
    "--finetuning.num_held_out=2",
    "--finetuning.max_epochs=1",
]


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def fences(page: Path, language: str = "") -> list[str]:
    """Return the fenced blocks of a page in one language, and without one."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def commands(page: Path) -> list[list[str]]:
    """Return the calls of main.py in the fenced blocks of a page, without what stands behind them."""
    text = "\n".join(fences(page)).replace("\\\n", " ")
    lines = re.findall(r"^(?:srun )?(python main\.py .*)$", text, flags=re.MULTILINE)
    filled = [re.sub(r"<[\w -]+>", lambda place: PLACES.get(place[0], place[0]), line) for line in lines]
    return [shlex.split(line.partition(" > ")[0], comments=True)[2:] for line in filled]


def all_commands() -> list[tuple[str, list[str]]]:
    return [(name_of(page), command) for page in PAGES for command in commands(page)]


class _Parser(Exception):  # noqa: N818 - a way out
    """Carries the parser out of the command line before it runs anything."""


def make_parser():
    """Return the parser of `main.py`."""

    def leave(self, parser, args):
        raise _Parser(parser)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command_line.CompressionCLI, "parse_arguments", leave)
        with pytest.raises(_Parser) as made:
            command_line.main([])
    return made.value.args[0]


@pytest.fixture(scope="module")
def parser():
    """Return a parser that is made once."""
    return make_parser()


def test_there_are_commands_to_check():
    assert len(all_commands()) > 25
    assert {"README.md", "docs/index.md", "docs/guides/several_gpus.md"} <= {page for page, _ in all_commands()}


@pytest.mark.filterwarnings("ignore")  # of what Lightning's own options hold
@pytest.mark.parametrize(("page", "command"), all_commands(), ids=lambda value: str(value)[:60])
def test_every_command_parses(page, command, parser, monkeypatch):
    monkeypatch.chdir(ROOT)
    if ENDS_IN_PARSING & {word.partition("=")[0] for word in command}:
        with pytest.raises(SystemExit) as end:
            (make_parser() if "--print_completion" in command[0] else parser).parse_args(command)
        assert not end.value.code
    else:
        assert parser.parse_args(command).subcommand == command[0]


def small(command: list[str]) -> list[str]:
    """Return what makes a command one of seconds, on two processes where it asks for several devices."""
    if ENDS_IN_PARSING & {word.partition("=")[0] for word in command}:
        return []
    settings = {"fit": SMALL_FIT, "validate": SMALL_VALIDATION}.get(command[0], [])
    if any(".txt" in word for word in command):
        settings = [*settings, "--data.seq_len=64"]  # the embedded model takes the place of the reader's own
    if any("trainer" in word for word in command):
        settings = [*settings, "--trainer.devices=2"]
    if any("laconic" in word for word in command):
        settings = [*settings, "--trainer.limit_train_batches=2"]
    return settings


def write_own_data(folder: Path) -> None:
    """Write text of every kind that the page on a reader's own data names."""
    from datasets import Dataset

    text = (folder / "my_text.txt").read_text(encoding="utf-8")
    paragraphs = text.split("\n\n")
    (folder / "my_texts" / "deep").mkdir(parents=True)
    (folder / "my_texts" / "a.txt").write_text(text, encoding="utf-8")
    (folder / "my_texts" / "deep" / "b.txt").write_text(text, encoding="utf-8")
    rows = [{"text": paragraph, "body": paragraph} for paragraph in paragraphs]
    (folder / "my_rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    lines = [paragraph.replace("\t", " ").replace("\n", " ").replace('"', "") for paragraph in paragraphs]
    (folder / "my_table.tsv").write_text("title\ttext\n" + "".join(f"A\t{line}\n" for line in lines), encoding="utf-8")
    chats = [[{"role": "user", "content": "Go on."}, {"role": "assistant", "content": each}] for each in paragraphs]
    written = "".join(json.dumps({"messages": chat}) + "\n" for chat in chats)
    (folder / "my_chats.jsonl").write_text(written, encoding="utf-8")
    Dataset.from_list(rows).save_to_disk(folder / "my_saved_dataset")


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_that_need_no_network_and_no_gpu_run_one_after_the_other(page, tmp_path):
    """With a few windows and sequences; those that read what an earlier one has written find it."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    for name in ("my_text.txt", "held_out.txt"):
        (tmp_path / name).write_text((ROOT / "docs" / "how_it_works.md").read_text(encoding="utf-8"), encoding="utf-8")
    write_own_data(tmp_path)
    if page.name == "length_budget.md":
        maker = [sys.executable, str(ROOT / "scripts" / "make_arithmetic.py"), "runs/arithmetic"]
        subprocess.run(maker, cwd=tmp_path, env=subprocess_environment() | {"PYTHONPATH": str(ROOT)}, check=True)
    for command in commands(page):
        if any(part in word for word in command for part in ELSEWHERE):
            continue
        for missing in (tmp_path / word for word in command if command[0] == "compare" and word.startswith("runs/")):
            if not missing.exists():
                shutil.copytree(tmp_path / "runs" / "mine", missing)
        done = subprocess.run(
            [sys.executable, str(ROOT / "main.py"), *command, *small(command)],
            cwd=tmp_path,
            env=subprocess_environment(),
            capture_output=True,
            text=True,
            timeout=280,
            check=False,
        )
        assert done.returncode == 0, (command, done.stderr[-2000:])


@pytest.mark.parametrize(
    ("page", "code"),
    [(name_of(page), code) for page in PAGES for code in fences(page, "python")],
    ids=lambda value: str(value)[:40],
)
def test_python_in_the_pages_runs(page, code, capsys):
    """What reads an export that only a reader has is compiled alone."""
    program = compile(code, page, "exec")
    if not any(part in code for part in ("runs/", "adapter")):
        exec(program, {"__name__": "page"})


def test_method_of_the_guide_is_one(generator):
    (code,) = fences(ROOT / "docs" / "guides" / "adding_a_method.md", "python")
    names: dict = {"__name__": "page"}
    exec(code, names)
    linear = torch.nn.Linear(64, 32)
    compressed = names["RandomPruner"](sparsity=0.25).compress(linear, torch.ones(64))
    assert isinstance(names["RandomPruner"](), Compressor)
    assert compressed.sparsity == pytest.approx(0.25, abs=0.05)


def test_example_compresses_any_linear(capsys):
    runpy.run_path(str(ROOT / "examples" / "any_linear.py"), run_name="__main__")
    said = capsys.readouterr().out
    assert re.search(r"NoWagPruner: 16\.75 bits per weight, accuracy 0\.9\d", said)
    assert re.search(r"NoWagQuantizer: 2\.25 bits per weight", said)
    assert all(float(value) > 0.9 for value in re.findall(r"accuracy ([\d.]+)", said))


def quoted_messages() -> list[str]:
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    return re.findall(r"^### `(.+)`$", text, flags=re.MULTILINE)


def test_there_are_quoted_messages():
    assert len(quoted_messages()) > 25


@pytest.mark.parametrize("quoted", quoted_messages())
def test_every_quoted_message_is_in_the_source(quoted):
    """With a value wherever the page has a mark; the text before the first and behind the last may be part of one."""
    pattern = re.compile(re.escape(quoted).replace(re.escape(VALUE), rf"(?:{VALUE}|null|[\w.]+)"))
    assert quoted in FOREIGN or any(pattern.search(message) for message in messages()), quoted
