import gzip
import json
from dataclasses import replace

import pytest

from nowag_pl.data.sources import HubDataset, LocalFiles, read_text_file


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
    with pytest.raises(ValueError, match=r"rows\.jsonl to have a column 'body', but got \['text', 'title'\]"):
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


def write_jsonl(path, documents, **more):
    path.parent.mkdir(exist_ok=True)
    text = "".join(json.dumps({"text": document, **more}) + "\n" for document in documents)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return str(path)


@pytest.fixture
def repository(tmp_path):
    """Make a folder as the hub would hold it, whose description counts more documents than one of its files has."""
    folder = tmp_path / "repository"
    write_jsonl(folder / "a-train.jsonl.gz", ["a0", "a1", "a2"])
    write_jsonl(folder / "b-train.jsonl.gz", ["b0"])
    write_jsonl(folder / "test.jsonl.gz", ["t0"])
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n"
        "  - {split: train, path: '*-train.jsonl.gz'}\n  - {split: test, path: 'test.jsonl.gz'}\n"
        "dataset_info:\n  features:\n  - {name: text, dtype: string}\n"
        "  splits:\n  - {name: train, num_examples: 4}\n  - {name: test, num_examples: 1}\n---\n"
    )
    return str(folder)


@pytest.mark.usefixtures("offline")
def test_folder_is_read_by_splits_and_by_files(repository):
    assert HubDataset(repository).documents() == ["a0", "a1", "a2", "b0"]
    assert HubDataset(repository, split="test").documents() == ["t0"]
    part = HubDataset(repository, data_files="b-train.jsonl.gz")
    assert part.documents() == ["b0"]
    assert replace(part, split="validation").documents() == ["b0"]
    assert replace(part, data_files=["a-train.jsonl.gz", "test.jsonl.gz"], split="train[1:]").documents() == [
        "a1",
        "a2",
        "t0",
    ]


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_local_files_stand_in_for_those_of_the_hub(split, tmp_path):
    files = [write_jsonl(tmp_path / f"{name}.jsonl.gz", [f"{name}0", f"{name}1"]) for name in "ba"]
    assert HubDataset("nobody/nothing", data_files=files, split=split).documents() == ["b0", "b1", "a0", "a1"]
    assert HubDataset("nobody/nothing", data_files=files[1], split=f"{split}[1:]").documents() == ["a1"]
    assert HubDataset(files[1], split=split).documents() == ["a0", "a1"]


@pytest.mark.usefixtures("offline")
def test_local_text_that_stands_in_is_one_document(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    assert HubDataset("nobody/nothing", data_files=str(tmp_path / "a.txt"), split="test").documents() == [
        "one\n\ntwo\n"
    ]


@pytest.mark.usefixtures("offline")
def test_saved_dataset_is_read_by_its_split(tmp_path):
    from datasets import Dataset, DatasetDict

    rows = {"body": ["one", "two", "three"]}
    DatasetDict({"test": Dataset.from_dict(rows)}).save_to_disk(tmp_path / "saved")
    source = HubDataset(str(tmp_path / "saved"), split="test", column="body")
    assert source.documents() == rows["body"]
    assert replace(source, max_documents=2).documents() == ["one", "two"]
    with pytest.raises(ValueError, match=r"Expected split 'train' .*saved, but got \['test'\]"):
        replace(source, split="train").documents()


@pytest.mark.usefixtures("offline")
def test_rows_of_wikitext_keep_their_line_ends_and_empty_rows(tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = ["", " = Title = \n", "", " A paragraph . \n"]
    folder = tmp_path / "wikitext" / "wikitext-2-raw-v1"
    folder.mkdir(parents=True)
    pyarrow.parquet.write_table(pyarrow.table({"text": rows}), folder / "test-00000-of-00001.parquet")
    (folder.parent / "README.md").write_text(
        "---\nconfigs:\n- config_name: wikitext-2-raw-v1\n  data_files:\n"
        "  - {split: test, path: 'wikitext-2-raw-v1/test-*'}\n---\n"
    )
    assert HubDataset(str(folder.parent), name="wikitext-2-raw-v1", split="test").documents() == rows


@pytest.mark.usefixtures("offline")
def test_stream_mixes_files_of_unequal_columns_by_its_seed(tmp_path):
    for name, meta in (("a", {"stars": 3}), ("b", "none"), ("c", {"url": ["x"]})):
        write_jsonl(tmp_path / f"{name}_sample.jsonl", [f"{name}{i}" for i in range(200)], meta=meta)
    files = str(tmp_path / "*_sample.jsonl")
    source = HubDataset("json", data_files=files, streaming=True, max_documents=60, shuffle_seed=0)
    drawn = source.documents()
    assert len(set(drawn)) == 60
    assert {name[0] for name in drawn} == {"a", "b", "c"}
    assert drawn == source.documents()
    assert drawn != replace(source, shuffle_seed=1).documents()
    assert replace(source, shuffle_seed=None).documents() == [f"a{i}" for i in range(60)]
    with pytest.raises(ValueError, match=r"'json' to have a column 'body', but got \['text', 'meta'\]"):
        replace(source, column="body").documents()
    with pytest.raises(ValueError, match=r"Could not open dataset 'json' .*it has the splits \['train'\]"):
        replace(source, split="test").documents()


@pytest.mark.usefixtures("offline")
def test_missing_hub_dataset_names_the_file_and_the_option():
    source = HubDataset("nobody/nothing", split="validation", data_files="en/part.json.gz")
    for settings in ({}, {"streaming": True, "max_documents": 1}):
        with pytest.raises(
            ValueError, match=r"en/part\.json\.gz of nobody/nothing and give it as data_files"
        ) as caught:
            replace(source, **settings).documents()
        assert "Could not open dataset 'nobody/nothing'" in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("offline")
def test_missing_files_of_a_builder_are_named():
    url = "hf://datasets/nobody/nothing/part.jsonl"
    with pytest.raises(ValueError, match=rf"Could not open dataset 'json'.*download {url} and give it as data_files"):
        HubDataset("json", data_files=url).documents()
    with pytest.raises(ValueError, match=r"Could not open dataset 'json'.*Check that no\.jsonl can be read"):
        HubDataset("json", data_files="no.jsonl").documents()


@pytest.mark.usefixtures("offline")
def test_stream_that_breaks_is_refused(tmp_path, monkeypatch):
    import datasets

    def rows():
        raise RuntimeError("connection lost")
        yield

    monkeypatch.setattr(datasets, "load_dataset", lambda **_: datasets.IterableDataset.from_generator(rows))
    with pytest.raises(ValueError, match=r"Could not open dataset 'a/b' .*connection lost"):
        HubDataset("a/b", streaming=True, max_documents=1).documents()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_documents": 0}, "max_documents of at least 1, but got 0"),
        ({"streaming": True}, "max_documents with streaming"),
        ({"protocol": "c4", "max_documents": 5}, "with protocol 'c4'.* but got 5 and None"),
        ({"protocol": "c4-new", "shuffle_seed": 0}, "with protocol 'c4-new'.* but got None and 0"),
    ],
)
def test_settings_that_contradict_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        HubDataset("a/b", **settings)


def test_every_setting_is_part_of_what_tokens_are_kept_under():
    source = HubDataset("a/b")
    changed = [
        replace(source, **{name: value})
        for name, value in {
            "path": "a/c",
            "name": "en",
            "split": "test",
            "column": "body",
            "data_files": "x.json",
            "protocol": "c4",
            "max_documents": 5,
            "shuffle_seed": 0,
        }.items()
    ]
    keys = [each.cache_key for each in (source, *changed, replace(changed[-2], streaming=True))]
    assert len(set(keys)) == len(keys)
    assert None not in keys
    assert source.cache_key == HubDataset("a/b").cache_key


def test_local_data_is_kept_under_its_text(json_file, tmp_path):
    local = [
        HubDataset("json", data_files=json_file),
        HubDataset("a/b", data_files=json_file),
        HubDataset(json_file),
        HubDataset(str(tmp_path)),
        LocalFiles((json_file,)),
    ]
    assert [source.cache_key for source in local] == [None] * len(local)
    assert HubDataset("json", data_files="hf://datasets/a/b/*.jsonl").cache_key
    assert HubDataset("a/b", data_files=["no_such_file.jsonl"]).cache_key


@pytest.mark.usefixtures("offline")
def test_local_files_follow_each_other(json_file, tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    assert LocalFiles((str(tmp_path / "a.txt"), json_file)).documents() == ["one\ntwo\n", "first\nlines", "second"]


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


@pytest.mark.usefixtures("offline")
def test_other_columns_of_local_files_need_not_agree(tmp_path):
    rows = [{"text": "a", "meta": None}, {"text": "b", "meta": {"n": 1}}, {"text": "c", "meta": "x", "late": [1]}]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows))
    for path_, files in (("json", str(path)), (str(path), None), ("a/b", str(path))):
        source = HubDataset(path_, data_files=files)
        assert source.documents() == ["a", "b", "c"]
        assert replace(source, split="train[1:]+train[:1]").documents() == ["b", "c", "a"]
        drawn = replace(source, shuffle_seed=3, max_documents=2).documents()
        assert drawn == replace(source, shuffle_seed=3, max_documents=2).documents()
        assert len(set(drawn)) == 2
