import hashlib
from itertools import islice

import pytest

from nowag_pl.data.python_docs import docs_state, python_docs
from nowag_pl.data.sources import PythonDocs

PACKAGE = "documented_for_a_test"


def docstring(name):
    return f"Describe {name}. " + "Say more about it. " * 15


def is_held_out(name):
    return hashlib.sha256(f"{PACKAGE} {name}".encode()).digest()[0] / 256 < 0.1


NAMES = sorted(f"module_{i:02}.py" for i in range(40))
HELD_OUT = [name for name in NAMES if is_held_out(name)]
TRAINED = [name for name in NAMES if not is_held_out(name)]


@pytest.fixture
def package(tmp_path, monkeypatch):
    root = tmp_path / PACKAGE
    root.mkdir()
    (root / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    return root


def read_both():
    return [document for split in ("train", "eval") for document in python_docs(split, [PACKAGE])]


def test_each_document_is_in_one_split_in_the_order_of_names(package):
    for name in reversed(NAMES):
        (package / name).write_text(f'"""{docstring(name)}"""')
    assert len(HELD_OUT) > 1
    held_out, trained = list(python_docs("eval", [PACKAGE])), list(python_docs("train", [PACKAGE]))
    assert [text.split()[1].rstrip(".") for text in held_out] == HELD_OUT
    assert [text.split()[1].rstrip(".") for text in trained] == TRAINED


@pytest.mark.parametrize("first", [HELD_OUT[0], TRAINED[0]])
def test_repeated_docstrings_stay_in_one_split(package, first):
    shared = docstring("what both have")
    others = [HELD_OUT[-1], TRAINED[-1]]
    for name in {first, *others}:
        (package / name).write_text(f'"""{docstring(name)}"""\ndef f():\n    """{shared}"""')
    assert sum(shared.strip() in document for document in read_both()) == 1


def test_docstrings_of_a_module_come_in_their_order(package):
    texts = [docstring(name).strip() for name in ("the module", "the class", "the method", "the function")]
    (package / TRAINED[0]).write_text(
        f'"""{texts[0]}"""\n'
        f'class C:\n    """{texts[1]}"""\n    def method(self):\n        """{texts[2]}"""\n'
        f'async def function():\n    """{texts[3]}"""\n'
        "raise SystemExit('never executed')\n"
    )
    assert list(python_docs("train", [PACKAGE])) == ["\n\n".join(texts)]


def test_tests_stubs_and_broken_files_are_left_out(package):
    for folder in ("tests", "sub"):
        (package / folder).mkdir()
        for name in NAMES[:20]:
            (package / folder / name).write_text(f'"""{docstring(folder)}{name}"""')
    (package / "broken.py").write_text(f'"""{docstring("broken")}"""\ndef')
    (package / "nul.py").write_bytes(b'"""' + docstring("nul").encode() + b'"""\0')
    (package / "latin.py").write_bytes(b'"""' + docstring("latin").encode() + b'\xff"""')
    (package / "stub.py").write_text('"""Too short."""')
    documents = read_both()
    assert len(documents) == 20
    assert all(document.startswith("Describe sub.") for document in documents)


def test_standard_library_starts_with_topics_that_differ_between_splits():
    trained, held_out = (list(islice(python_docs(split), 5)) for split in ("train", "eval"))
    assert len({*trained, *held_out}) == 10
    assert trained == list(islice(python_docs("train"), 5))
    assert any("assert" in document for document in trained + held_out)


@pytest.mark.parametrize("package_name", ["no_such_package", "no_such_package.part"])
def test_package_that_is_not_installed_is_refused(package_name):
    with pytest.raises(ValueError, match=f"Expected an installed Python package, but got '{package_name}'"):
        next(python_docs("train", [package_name]))


@pytest.mark.parametrize("module_name", ["sys", "single_file_for_a_test"])
def test_module_that_is_no_package_does_not_read_the_folder_around_it(module_name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "single_file_for_a_test.py").touch()
    (tmp_path / "neighbour.py").write_text(f'"""{docstring("neighbour")}"""')
    with pytest.raises(ValueError, match=f"Expected an installed Python package, but got '{module_name}'"):
        list(python_docs("train", [module_name]))


def test_state_changes_with_the_files_without_reading_them(package):
    (package / "a.py").write_text("not (Python")
    before = docs_state([PACKAGE])
    assert docs_state([PACKAGE]) == before
    (package / "a.py").write_text("still not (Python")
    changed = docs_state([PACKAGE])
    (package / "b.py").touch()
    assert len({before, changed, docs_state([PACKAGE])}) == 3
    keys = {PythonDocs(split, (PACKAGE,)).cache_key for split in ("train", "eval")}
    assert len(keys) == 2
