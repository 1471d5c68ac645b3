"""The tables in the pages are those of the results, and results of different protocols are not mixed."""

import json
import re

import pytest

from benchmarks import results
from benchmarks.results import RESULTS, TABLES, keep_rows, markdown, pages, rendered

ROW = {"method": "a", "perplexity": 2.0}


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.name)
def test_tables_in_the_pages_are_those_of_the_results(page):
    text = page.read_text(encoding="utf-8")
    assert rendered(text) == text, "run python -m benchmarks.results"


def test_every_table_is_shown():
    text = "".join(page.read_text(encoding="utf-8") for page in pages())
    assert set(re.findall(r"<!-- table: (\w+) -->", text)) == set(TABLES)


def test_only_what_stands_between_the_marks_is_replaced(monkeypatch):
    monkeypatch.setitem(TABLES, "one", lambda: markdown(("x", "y"), [("a", "1")]))
    page = "before\n<!-- table: one -->\nold\n<!-- end of table -->\nafter\n"
    table = "| x | y |\n| --- | ---: |\n| a | 1 |\n"
    assert rendered(page) == f"before\n<!-- table: one -->\n{table}<!-- end of table -->\nafter\n"
    assert rendered(rendered(page)) == rendered(page)


def test_a_table_that_is_not_known_is_an_error():
    with pytest.raises(ValueError, match=r"Expected a table of \['first_screen', .*\], but got 'other'"):
        rendered("<!-- table: other -->\n<!-- end of table -->")


def test_new_rows_take_the_place_of_old_ones(tmp_path):
    file = tmp_path / "results.json"
    keep_rows(file, {"model": "m"}, [ROW, {"method": "b", "perplexity": 3.0}])
    keep_rows(file, {"model": "m"}, [{"method": "a", "perplexity": 1.0}])
    rows = json.loads(file.read_text())["rows"]
    assert [(row["method"], row["perplexity"]) for row in rows] == [("a", 1.0), ("b", 3.0)]


def test_results_of_another_protocol_are_refused(tmp_path):
    file = tmp_path / "results.json"
    keep_rows(file, {"model": "m", "protocol": {"windows": 70}}, [ROW])
    with pytest.raises(ValueError, match="to hold results of the same protocol: name another file"):
        keep_rows(file, {"model": "m", "protocol": {"windows": 35}}, [ROW])


@pytest.mark.parametrize("file", sorted(RESULTS.glob("*.json")), ids=lambda file: file.stem)
def test_results_name_no_place_on_a_machine_and_where_they_come_from(file):
    text = file.read_text(encoding="utf-8")
    assert not re.search(r'"/|/home/|/tmp/', text)
    results = json.loads(text)
    for row in results.get("rows", []):
        hardware = row.get("hardware", results.get("hardware"))
        assert row.get("source") or (hardware["cpu"] and hardware["versions"]), row["method"]


def test_hardware_says_what_computed():
    told = results.hardware(3)
    assert told["threads"] == 3
    assert told["cpu"]
    assert {"python", "torch", "transformers"} <= set(told["versions"])
