"""Files that a path, a folder or a pattern names."""

import pytest

from nowag_pl.data.expansion import is_folder_of_texts, named_files
from nowag_pl.data.sources import HubDataset


@pytest.fixture
def folder(tmp_path):
    for name in ("b.txt", "a.txt", "deep/c.txt", ".hidden/d.txt", ".e.txt"):
        (tmp_path / "texts" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "texts" / name).write_text(f"text {name}\nin two lines\n")
    return tmp_path / "texts"


def names(files, folder):
    return [file.removeprefix(f"{folder}/") for file in files]


def test_a_folder_names_its_files_in_their_order(folder):
    assert names(named_files(str(folder)), folder) == ["a.txt", "b.txt", "deep/c.txt"]
    assert named_files([str(folder / "b.txt"), str(folder / "deep")]) == (
        str(folder / "b.txt"),
        str(folder / "deep" / "c.txt"),
    )


def test_a_pattern_names_what_it_matches(folder):
    assert names(named_files(str(folder / "*.txt")), folder) == ["a.txt", "b.txt"]
    assert names(named_files(str(folder / "**" / "*.txt")), folder) == ["a.txt", "b.txt", "deep/c.txt"]


def test_a_file_whose_name_looks_like_a_pattern_is_that_file(folder):
    (folder / "x[1].txt").write_text("text")
    assert named_files(str(folder / "x[1].txt")) == (str(folder / "x[1].txt"),)


def test_what_is_not_there_is_left_to_be_refused_by_its_name(folder):
    assert named_files("missing.txt") == ("missing.txt",)
    with pytest.raises(ValueError, match=r"pattern that matches files, but got '.*\*.csv', which matches none"):
        named_files(str(folder / "*.csv"))
    (folder / "empty").mkdir()
    with pytest.raises(ValueError, match="empty to be a file, a folder of files or a saved dataset, but it is empty"):
        named_files(str(folder / "empty"))


@pytest.mark.usefixtures("offline")
def test_a_file_of_text_in_a_folder_is_one_document_as_a_dataset_too(folder):
    assert is_folder_of_texts(folder)
    documents = HubDataset(str(folder)).documents()
    assert sorted(documents) == [f"text {name}\nin two lines\n" for name in ("a.txt", "b.txt", "deep/c.txt")]
    assert HubDataset(str(folder), data_files="a.txt").documents() == ["text a.txt\nin two lines\n"]


def test_a_folder_of_tables_is_none_of_texts(tmp_path):
    (tmp_path / "README.md").write_text("of tables")
    (tmp_path / "a.jsonl").write_text("{}")
    assert not is_folder_of_texts(tmp_path)
    assert not is_folder_of_texts(tmp_path / "a.jsonl")
