import gzip
import json

import pytest
import torch

from nowag_pl.data.documents import read_documents
from nowag_pl.data.tables import read_table
from nowag_pl.data.tokens import check_variety

MIXED = [
    {"id": None, "text": "first", "meta": {"stars": 1}},
    {"text": "second\nline", "id": 5, "meta": None},
    {"id": "x", "meta": [1, "two"], "text": "", "late": {"deep": [None]}},
]
TEXTS = ["first", "second\nline", ""]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.jsonl.gz"])
def test_other_columns_may_hold_anything(name, tmp_path):
    text = json.dumps(MIXED, indent=1) if name == "a.json" else "\r\n".join(map(json.dumps, MIXED)) + "\r\n\r\n"
    (tmp_path / name).write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    assert read_documents(tmp_path / name) == TEXTS
    assert read_table(tmp_path / name, "text")[0] == {"text": "first"}


def test_texts_of_csv_stay_as_they_are(tmp_path):
    (tmp_path / "a.csv").write_text('id,text\n1,007\n,NA\nx,"two\nlines, and a comma"\n3,\n')
    assert read_documents(tmp_path / "a.csv") == ["007", "NA", "two\nlines, and a comma", ""]
    (tmp_path / "a.tsv").write_text("id\ttext\n1\tone, two\n")
    assert read_documents(tmp_path / "a.tsv") == ["one, two"]
    (tmp_path / "long.csv").write_text("id,text\n1," + "word " * 400_000 + "\n")
    assert len(read_documents(tmp_path / "long.csv")[0]) == 2_000_000


def test_single_object_over_several_lines_is_one_row(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"text": "one"}, indent=2))
    assert read_documents(tmp_path / "a.json") == ["one"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\n{"text": "b"\n', "line 2 is no JSON"),
        ('{"text": "a"}\n{"body": "b"}\n', r"row 1 of \S+a\.jsonl to have a column 'text', but got \[\]"),
        ('{"text": "a"}\n[1]\n', "a list in place of row 1"),
        ('{"text": "a"}\n{"text": null}\n', r"column 'text' of \S+a\.jsonl, but row 1 holds NoneType"),
        ("[" * 100_000, "a.jsonl"),
        ('{"body": "a"}\n', r"a\.jsonl to have a column 'text' or one of chats .* got \['body'\]"),
    ],
)
def test_damaged_rows_are_named(content, message, tmp_path):
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_documents(tmp_path / "a.jsonl")


def test_text_without_variety_is_told(caplog):
    with pytest.raises(ValueError, match=r"data.x: Expected text to calibrate on, but got 2 different .* \(0\.20%\)"):
        check_variety(torch.tensor([1, 2]).repeat(500), "data.x")
    check_variety(torch.arange(20).repeat(50), "data.x")
    assert "data.x: only 20 different tokens among 1000 (2.00%)" in caplog.text
    caplog.clear()
    check_variety(torch.arange(900), "data.x")
    assert not caplog.text
