import gzip
import json

import pytest

from nowag_pl.data.documents import open_saved, read_documents, read_text_file, rows_to_documents

ROWS = [{"text": "first\nlines é", "title": "A"}, {"text": "", "title": "B"}, {"text": "third", "title": "C"}]
TEXTS = [row["text"] for row in ROWS]
pytestmark = pytest.mark.usefixtures("offline")


def write_rows(path, rows=ROWS):
    """Write rows as the suffix says, without the datasets library wherever possible."""
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    if ".parquet" in path.suffixes:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        text = json.dumps(rows) if ".json" in path.suffixes else lines
        path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


@pytest.fixture
def dataset():
    from datasets import Dataset

    return Dataset.from_list(ROWS)


@pytest.mark.parametrize(
    "name", ["a.json", "a.jsonl", "a.ndjson", "a.JSONL", "a.parquet", "a.json.gz", "a.jsonl.gz", "a.b[1]*.jsonl"]
)
def test_rows_of_tables_are_documents_empty_ones_too(name, tmp_path):
    path = write_rows(tmp_path / name)
    assert read_documents(path) == TEXTS
    assert read_documents(str(path), "title") == ["A", "B", "C"]


def test_rows_of_csv_are_documents(tmp_path):
    (tmp_path / "a.csv").write_text('title,text\nA,"one, two"\nB,three\n')
    assert read_documents(tmp_path / "a.csv") == ["one, two", "three"]


def test_json_of_one_row_per_line_is_read_too(tmp_path):
    path = tmp_path / "c4.json.gz"
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in ROWS).encode()))
    assert read_documents(path) == TEXTS


@pytest.mark.parametrize("name", ["a.txt", "no_suffix", "wiki.test.raw", "notes.md", "a.txt.gz", "a.raw.gz"])
def test_any_other_text_is_one_document(name, tmp_path):
    text = "one\n\ntwo é\n".encode()
    (tmp_path / name).write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    assert read_documents(tmp_path / name) == ["one\n\ntwo é\n"]


def test_changed_file_is_read_anew(tmp_path):
    path = write_rows(tmp_path / "a.jsonl")
    assert read_documents(path) == TEXTS
    write_rows(path, [{"text": "changed"}])
    assert read_documents(path) == ["changed"]


def test_saved_dataset_is_read(dataset, tmp_path):
    from datasets import DatasetDict

    dataset.save_to_disk(tmp_path / "single")
    DatasetDict({"validation": dataset}).save_to_disk(tmp_path / "of_one_split")
    assert read_documents(tmp_path / "single") == TEXTS
    assert read_documents(tmp_path / "single", "title") == ["A", "B", "C"]
    assert read_documents(tmp_path / "of_one_split") == TEXTS


def test_saved_dataset_of_several_splits_needs_its_name(dataset, tmp_path):
    from datasets import DatasetDict

    DatasetDict({"train": dataset, "test": dataset.select([2])}).save_to_disk(tmp_path / "both")
    assert list(open_saved(tmp_path / "both", "test")["text"]) == ["third"]
    assert len(open_saved(tmp_path / "both", "train")) == 3
    with pytest.raises(ValueError, match=r"Expected one split .*both, but got \['test', 'train'\].*path and split"):
        read_documents(tmp_path / "both")
    with pytest.raises(ValueError, match=r"Expected split 'validation' .*\['test', 'train'\]"):
        open_saved(tmp_path / "both", "validation")


def test_saved_dataset_without_splits_has_none_to_choose(dataset, tmp_path):
    dataset.save_to_disk(tmp_path / "single")
    assert len(open_saved(tmp_path / "single", "train")) == 3
    for split in ("test", "train[:1]"):
        with pytest.raises(ValueError, match=r"Expected split '.*' .*single, but got \['train'\]"):
            open_saved(tmp_path / "single", split)


def test_damaged_saved_dataset_is_refused(dataset, tmp_path):
    dataset.save_to_disk(tmp_path / "saved")
    (tmp_path / "saved" / "state.json").write_text("{")
    with pytest.raises(ValueError, match=r"Could not read the saved dataset in .*saved: \S+"):
        read_documents(tmp_path / "saved")


def test_other_folder_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"Expected a file or a dataset that save_to_disk wrote, but .* another folder"
    ):
        read_documents(tmp_path)


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "a.json.gz"])
def test_missing_column_is_refused_by_name(name, tmp_path):
    path = write_rows(tmp_path / name)
    with pytest.raises(ValueError, match=rf"Expected .*{name} to have a column 'body', but got \['text', 'title'\]"):
        read_documents(path, "body")


@pytest.mark.parametrize("name", ["missing.jsonl", "missing.parquet", "missing.txt", "missing.bin"])
def test_missing_file_is_refused_by_name(name, tmp_path):
    with pytest.raises(ValueError, match=rf"Expected .*{name} to be a readable"):
        read_documents(tmp_path / name)


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "a.json.gz"])
def test_damaged_table_is_refused_by_name(name, tmp_path):
    (tmp_path / name).write_bytes(b"neither a table nor compressed")
    with pytest.raises(
        ValueError, match=rf"Expected .*{name} to be a readable \w+ file with rows, but got: \S+"
    ) as caught:
        read_documents(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_empty_dataset_is_refused(dataset):
    from datasets import IterableDataset

    for rows in (dataset.select([]), IterableDataset.from_generator(lambda: iter([]))):
        with pytest.raises(ValueError, match="Expected mine to hold documents, but it is empty"):
            rows_to_documents(rows, "text", "mine")


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet"])
def test_empty_table_is_refused_by_name(name, tmp_path):
    import pyarrow
    import pyarrow.parquet

    (tmp_path / "a.jsonl").touch()
    (tmp_path / "a.csv").write_text("title,text\n")
    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=rf"Expected .*{name} to be a readable \w+ file with rows"):
        read_documents(tmp_path / name)


def test_unknown_kind_that_is_no_text_names_the_known_ones(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"\xff\x00")
    with pytest.raises(ValueError, match=r"a\.bin to be a readable UTF-8 text file.*\.json, \.jsonl, .*\.parquet"):
        read_documents(tmp_path / "a.bin")


@pytest.mark.parametrize(("value", "kind"), [(5, "int"), (None, "NoneType"), (["a"], "list")])
def test_column_of_other_things_than_text_is_refused(value, kind, tmp_path):
    from datasets import Dataset

    rows = Dataset.from_list([{"text": value}])
    with pytest.raises(
        ValueError, match=f"Expected text, or a chat of messages, in column 'text' of mine, but row 0 holds {kind}"
    ):
        rows_to_documents(rows, "text", "mine")


@pytest.mark.parametrize("is_stream", [False, True])
def test_only_as_many_rows_as_wanted_in_an_order_that_follows_the_seed(is_stream):
    from datasets import Dataset

    names = [f"row {i}" for i in range(50)]
    rows = Dataset.from_dict({"text": names})
    rows = rows.to_iterable_dataset(num_shards=2) if is_stream else rows

    def read(**settings):
        return rows_to_documents(rows, "text", "mine", **settings)

    assert read() == names
    assert read(max_documents=7) == names[:7]
    assert read(max_documents=70) == names
    drawn = read(max_documents=20, shuffle_seed=1)
    assert drawn == read(max_documents=20, shuffle_seed=1)
    assert drawn != read(max_documents=20, shuffle_seed=2)
    assert len(set(drawn)) == 20
    assert max(int(name.split()[1]) for name in drawn) > 20


def test_stream_is_not_read_to_its_end():
    from datasets import IterableDataset

    read = []

    def rows():
        for i in range(100):
            read.append(i)
            yield {"text": str(i)}

    assert rows_to_documents(IterableDataset.from_generator(rows), "text", "mine", 3) == ["0", "1", "2"]
    assert max(read) < 10


def test_text_file_that_is_no_gzip_is_refused(tmp_path):
    (tmp_path / "a.txt.gz").write_bytes(b"text")
    with pytest.raises(ValueError, match=r"Expected .*a\.txt\.gz to be a readable UTF-8 text file"):
        read_text_file(tmp_path / "a.txt.gz")
    (tmp_path / "cut.txt.gz").write_bytes(gzip.compress(b"text" * 99)[:-9])
    with pytest.raises(ValueError, match=r"Expected .*cut\.txt\.gz to be a readable UTF-8 text file"):
        read_text_file(tmp_path / "cut.txt.gz")


def test_line_ends_are_those_of_plain_text(tmp_path):
    for name in ("a.txt", "a.txt.gz"):
        content = "one\r\ntwo\rthree\n".encode("utf-8-sig")
        (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
        assert read_text_file(tmp_path / name) == "one\ntwo\nthree\n"


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.jsonl", "a.csv", "a.tsv.gz"])
def test_undecodable_text_names_file_and_offset(name, tmp_path):
    content = "\ufefftext\nd".encode() + b"\xe9j\xe0 vu\n"
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    with pytest.raises(ValueError, match=rf"{name} to be .*byte 0xe9 at offset 9, which is no UTF-8"):
        read_documents(tmp_path / name)
