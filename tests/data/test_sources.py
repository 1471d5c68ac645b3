import json

import pytest

from nowag_pl.data.sources import HubDataset, read_text_file


@pytest.fixture
def offline(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


@pytest.fixture
def json_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"text": "first\nlines", "title": "A"}, {"text": "second", "title": "B"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.usefixtures("offline")
def test_rows_are_documents_in_their_order(json_file):
    assert HubDataset("json", data_files=json_file).documents() == ["first\nlines", "second"]
    assert HubDataset("json", data_files=[json_file], column="title").documents() == ["A", "B"]


@pytest.mark.usefixtures("offline")
def test_split_is_respected(json_file):
    assert HubDataset("json", data_files=json_file, split="train[1:]").documents() == ["second"]


@pytest.mark.usefixtures("offline")
def test_text_builder(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    assert HubDataset("text", data_files=str(tmp_path / "a.txt")).documents() == ["one", "two"]


@pytest.mark.usefixtures("offline")
def test_missing_column_is_refused(json_file):
    with pytest.raises(ValueError, match=r"'json' to have a column 'body', but got \['text', 'title'\]"):
        HubDataset("json", data_files=json_file, column="body").documents()


@pytest.mark.usefixtures("offline")
def test_missing_split_is_refused(json_file):
    with pytest.raises(ValueError, match=r"Could not open dataset 'json' .*split 'test'"):
        HubDataset("json", data_files=json_file, split="test").documents()


@pytest.mark.usefixtures("offline")
def test_missing_dataset_is_refused(tmp_path):
    missing = str(tmp_path / "missing")
    with pytest.raises(ValueError, match=r"Could not open dataset '.*missing'.*data\.calibration_files"):
        HubDataset(missing).documents()


def test_text_file_is_read_as_utf8(tmp_path):
    (tmp_path / "a.txt").write_bytes("é\n".encode())
    assert read_text_file(tmp_path / "a.txt") == "é\n"
    assert read_text_file(str(tmp_path / "a.txt")) == "é\n"


def test_text_file_that_cannot_be_read_is_refused(tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "folder").mkdir()
    for name in ("missing.txt", "latin.txt", "folder"):
        with pytest.raises(ValueError, match=f"Expected .*{name} to be a readable UTF-8 text file"):
            read_text_file(tmp_path / name)
