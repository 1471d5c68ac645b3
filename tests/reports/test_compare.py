import copy
import json
import re
from pathlib import Path

import pytest

from nowag_pl.reports.compare import (
    column_names,
    compare,
    comparison_page,
    comparison_rows,
    differences,
    protocols,
    read_runs,
)
from nowag_pl.reports.page import report_page

REPORT = {
    "model": "some/model",
    "method": "NoWagPruner(sparsity=0.5)",
    "num_parameters": 1000,
    "num_compressed_parameters": 800,
    "seq_len": 128,
    "calibration": {"num_sequences": 6, "num_tokens": 768, "sha256": "c" * 64},
    "bits_per_weight": 9.0,
    "sparsity": 0.5,
    "bytes_on_disk": 900,
    "perplexity": {"held_out": {"dense": 20.0, "one_shot": 25.0, "blockwise": 22.0, "finetuned": None}},
    "kl_divergence": {"held_out": {"one_shot": 0.25, "blockwise": 0.125, "finetuned": None}},
    "top1_agreement": {"held_out": {"one_shot": 0.75, "blockwise": 0.875, "finetuned": None}},
    "seconds": {"calibration": 1.5, "compression": 2.5, "finetuning": 0.0, "evaluation": 3.5},
    "finetuned_blocks": [{"before": 0.2, "after": 0.1, "epochs": 2, "seconds": 1.0, "curve": [0.15, 0.1]}] * 2,
    "damage": {"one_shot": {"alone": [0.1, 0.2], "accumulated": [0.1, 0.3], "divergence": [0.05, 0.15]}},
    "peak_memory_bytes": 2**30,
    "peak_memory": {"calibration": 2**29, "compression": 2**30, "evaluation": 2**30},
    "protocol": {"held_out": {"num_windows": 7, "sha256": "a" * 64}},
    "bytes": {"dense_linears": 1600, "linears": 900, "dense_model": 2000, "model": 1300},
    "settings": {"calibration.mode": "dense"},
    "command": "python main.py fit --model.path 'some model'",
    "versions": {"python": "3.11", "torch": "2.13.0"},
    "device": "a CPU",
    "linears": [
        {
            "name": f"model.layers.{block}.q_proj",
            "shape": [20, 20],
            "loss": loss,
            "bits_per_weight": 9.0,
            "sparsity": 0.5,
        }
        for block, loss in enumerate((0.125, 0.375))
    ],
}


@pytest.fixture
def runs(tmp_path):
    """Write reports and return their folders."""

    def write(*changes):
        folders = []
        for number, change in enumerate(changes):
            folder = tmp_path / f"run_{number}"
            folder.mkdir()
            (folder / "report.json").write_text(json.dumps(copy.deepcopy(REPORT) | change))
            folders.append(str(folder))
        return folders

    return write


def without(*names):
    return {name: value for name, value in REPORT.items() if name not in names}


def test_equal_protocols_share_a_column(runs):
    read = read_runs(runs({}, {"bits_per_weight": 4.0}))
    rows = comparison_rows(read)
    assert [row.run + row.state for row in rows] == [
        "dense", "run_0one-shot", "run_0blockwise", "run_1one-shot", "run_1blockwise"
    ]  # fmt: skip
    assert rows[0].cells(0) == ("some/model", "dense", "20.000", *[""] * 6)
    assert rows[1].cells(0)[2:] == ("25.000", "0.2500", "0.750", "9.00", "50%", "0.00 MiB", "8 s")
    assert rows[4].cells(0)[2:6] == ("22.000", "0.1250", "0.875", "4.00")
    assert differences(read) == []
    assert comparison_page(read).count("<b>22.000</b>") == 2


@pytest.mark.parametrize(
    ("change", "columns", "reason"),
    [
        ({"seq_len": 256}, ["held_out, 128 tokens", "held_out, 256 tokens"], "tokens per window (seq_len) differ"),
        (
            {"protocol": {"held_out": {"num_windows": 7, "sha256": "b" * 64}}},
            ["held_out (a)", "held_out (b)"],
            "the tokens differ",
        ),
        (
            {"protocol": {"held_out": {"num_windows": 5, "sha256": "b" * 64}}},
            ["held_out (a)", "held_out (b)"],
            "numbers of windows, the tokens differ",
        ),
        ({"protocol": {}}, ["held_out (a)", "held_out (b)"], "numbers of windows, the tokens differ"),
    ],
)
def test_different_protocols_never_share_a_column_and_it_is_said_why(change, columns, reason, runs):
    read = read_runs(runs({}, change))
    assert column_names(protocols(read)) == columns
    own = {
        row.run: [row.cells(number)[2] for number in (0, 1)] for row in comparison_rows(read) if row.state == "one-shot"
    }
    assert own == {"run_0": ["25.000", ""], "run_1": ["", "25.000"]}
    notes = differences(read)
    assert any(note.startswith(f"{columns[0]}: run_0;") for note in notes)
    assert any(note.startswith(f"{columns[1]}: run_1;") for note in notes)
    assert reason in notes[-1]
    assert "do not compare" in notes[-1]
    page = comparison_page(read)
    assert all(note.replace("'", "&#39;") in page for note in notes)
    assert page.count("<svg") == 2  # nor are they in one plot
    assert page.count("some/model, dense") == 2


def test_texts_of_different_names_need_no_note(runs):
    other = {"perplexity": {"c4": {"dense": 1.0, "one_shot": 2.0}}, "kl_divergence": {}}
    read = read_runs(runs({}, other | {"protocol": {"c4": {"num_windows": 7, "sha256": "d" * 64}}}))
    assert column_names(protocols(read)) == ["held_out", "c4"]
    assert differences(read) == []


def test_command_prints_the_table_and_writes_the_page(runs, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    compare(runs({}, {"seq_len": 256}), str(tmp_path / "out" / "compare.html"))
    said = capsys.readouterr().out
    assert "held_out, 256 tokens" in said
    assert "do not compare" in said
    assert "25.000" in said
    page = (tmp_path / "out" / "compare.html").read_text()
    assert_stands_alone(page)
    assert "python main.py fit --model.path" in page


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, r"there is no report\.json.*fit --run_dir="), ("{", "JSON"), ('{"model": "x"}', "lacks .*perplexity")],
)
def test_folder_without_a_whole_report(content, message, tmp_path):
    if content is not None:
        (tmp_path / "report.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_runs([tmp_path])


def test_no_folders():
    with pytest.raises(ValueError, match="at least one run directory"):
        read_runs([])


def test_names_have_as_many_parents_as_tell_them_apart(tmp_path):
    for folder in ("a/run", "b/run"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "report.json").write_text(json.dumps(REPORT))
    assert [run.name for run in read_runs([tmp_path / "a/run", tmp_path / "b/run"])] == ["a/run", "b/run"]


def test_older_reports_still_compare(runs):
    read = read_runs(runs({}))
    older = [type(read[0])("old", without("protocol", "bytes", "command", "seconds", "top1_agreement"))]
    row = comparison_rows(older)[1]
    assert row.cells(0)[2:] == ("25.000", "0.2500", "", "9.00", "50%", "", "")
    assert "not recorded" in comparison_page(older)


def assert_stands_alone(page):
    """No reference leads out of the page; namespaces of SVG are names, not addresses."""
    references = re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?([^"')\s>]+)""", page)
    assert all(reference.startswith(("#", "data:image/png;base64,")) for reference in references), references
    assert "<script" not in page
    assert "@import" not in page


def test_report_page_says_everything(tmp_path):
    page = report_page(REPORT)
    assert_stands_alone(page)
    text = " ".join(re.sub(r"<[^>]+>", " ", page).split())
    for part in (
        "20.000", "25.000", "1.25 x", "22.000", "0.1250", "windows of 128 tokens", "127 predictions",
        "56.2 %", "65.0 %",
        "1.5 512 MiB", "python main.py fit --model.path &#39;some model&#39;", "torch 2.13.0", "c" * 16,
        "model.layers.1.q_proj 20 x 20 0.3750", "blockwise 22.000 1.10 x 0.1250 87.5 %", "calibration.mode dense",
        "22.00 perplexity on held_out, dense 20.00", "0.125 KL to dense", "87.5 % same first choice",
        "9.00 bits a weight, 50 % removed", "The same in every linear: sparsity 0.50, bits per weight 9.00.",
    ):  # fmt: skip
        assert part in text, part
    # Loss by block and by linear, two of damage, finetuning before and after and by epoch.
    assert page.count("<svg") == 6
    assert report_page(REPORT | {"finetuned_blocks": []}).count("<svg") == 4
    older = report_page({name: value for name, value in REPORT.items() if name not in ("damage", "top1_agreement")})
    assert older.count("<svg") == 4


def test_tables_of_a_terminal_fit_into_80_columns(runs, tmp_path, capsys):
    folders = runs({}, {"perplexity": {"held_out": REPORT["perplexity"]["held_out"], "other": {"one_shot": 5.0}}})
    long = tmp_path / ("a_name_of_a_run_" * 4)
    Path(folders[1]).rename(long)
    compare([folders[0], str(long)], str(tmp_path / "page.html"))
    lines = capsys.readouterr().out.splitlines()
    assert max(len(line) for line in lines if "page.html" not in line) <= 80
    assert [line.strip() for line in lines if "runs on" in line] == ["2 runs on held_out", "2 runs on other"]
    assert any(line == f"run 2: {long.name}" for line in lines)
    assert any("0.2500" in line and "0.750" in line and "0.00 MiB" in line for line in lines)


def test_report_page_escapes_what_it_is_given():
    page = report_page(REPORT | {"model": "<b>x</b>"})
    assert "<b>x</b>" not in page
    assert "&lt;b&gt;x&lt;/b&gt;" in page


def test_markup_control_characters_and_dollars_of_names_are_shown_as_they_are(tmp_path, capsys):
    for name in ("a", "b"):
        report = {"model": "m[/red]\x1b[31m", "method": "$x$ [bold]", "seq_len": 8, "bits_per_weight": 4.0}
        report["sparsity"] = 0.0
        report["perplexity"] = {"$t[/b]": {"dense": 5.0, "one_shot": 6.0}}
        (tmp_path / name).mkdir()
        (tmp_path / name / "report.json").write_text(json.dumps(report))
    compare([str(tmp_path / "a"), str(tmp_path / "b")], str(tmp_path / "page.html"))
    said = capsys.readouterr().out
    assert "\x1b[31m" not in said
    assert "m[/red]\\x1b[31m" in said
    assert "$t[/b]" in (tmp_path / "page.html").read_text()
