import errno
import json
import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import save_file

from nowag_pl import files
from nowag_pl.files import (
    new_array,
    read_array,
    read_metadata,
    read_sealed_json,
    read_tensors,
    replacing,
    set_aside,
    write_json,
    write_sealed_json,
    write_tensors,
)


def disk_full(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


def save_half_then_disk_full(tensors, filename, metadata):
    save_file(tensors, filename, metadata)
    os.truncate(filename, os.path.getsize(filename) // 2)
    disk_full()


def safetensors_fails(tensors, filename, metadata):
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def folder_content(folder):
    return sorted(path.name for path in folder.iterdir())


@settings(max_examples=8)
@given(metadata=st.dictionaries(st.text("abcé", min_size=1), st.none() | st.integers() | st.lists(st.text())))
def test_metadata_of_any_json_value_comes_back(tmp_path_factory, metadata):
    path = tmp_path_factory.mktemp("files") / "a.safetensors"
    write_tensors(path, {"a": torch.ones(1)}, metadata)
    assert read_metadata(path) == metadata
    assert read_tensors(path)[1] == metadata


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.int32, torch.bool])
def test_tensors_come_back(tmp_path, dtype):
    path = tmp_path / "new" / "folder" / "a.safetensors"
    tensors = {"matrix": torch.arange(6).view(2, 3).to(dtype), "empty": torch.zeros(0, dtype=dtype)}
    write_tensors(path, tensors)
    restored, metadata = read_tensors(path)
    assert metadata == {}
    assert restored.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert restored[name].dtype == dtype
        assert torch.equal(restored[name], tensor)


def test_views_and_parameters_are_written(tmp_path):
    parameter = torch.nn.Parameter(torch.arange(6.0).view(2, 3))
    write_tensors(tmp_path / "a.safetensors", {"transposed": parameter.T})
    assert torch.equal(read_tensors(tmp_path / "a.safetensors")[0]["transposed"], parameter.T)


def test_json_comes_back_and_is_replaced(tmp_path):
    path = tmp_path / "folder" / "a.json"
    for content in ({"a": [1, None]}, {"b": "é"}):
        write_json(path, content)
        assert json.loads(path.read_text(encoding="utf-8")) == content
    assert folder_content(path.parent) == ["a.json"]


def test_equal_tensors_have_equal_bytes(tmp_path):
    for name in "abcdef":
        write_tensors(tmp_path / name, {"ä": torch.arange(7), "z": torch.ones(2, 3)}, {"block": "é", "count": 3})
    assert len({(tmp_path / name).read_bytes() for name in "abcdef"}) == 1


@pytest.mark.parametrize("failing", [save_half_then_disk_full, safetensors_fails])
def test_tensors_that_do_not_fit_leave_the_old_file(tmp_path, monkeypatch, failing):
    path = tmp_path / "a.safetensors"
    write_tensors(path, {"a": torch.zeros(9)})
    monkeypatch.setattr(files, "save_file", failing)
    with pytest.raises(OSError, match=r"Could not write .*a\.safetensors .*No space left"):
        write_tensors(path, {"a": torch.ones(9)})
    assert read_tensors(path)[0]["a"].tolist() == [0.0] * 9
    assert folder_content(tmp_path) == ["a.safetensors"]


def test_what_a_killed_writer_of_tensors_leaves_is_known_as_ours(tmp_path, monkeypatch):
    """Its own temporary file has a random name, which nobody may delete; the folder around it has one of ours."""

    def killed(tensors, filename, metadata):
        filename.with_name(".tmpH6FY5i").write_bytes(b"half")
        raise SystemExit

    monkeypatch.setattr(files, "save_file", killed)
    # A killed process cleans nothing up.
    with monkeypatch.context() as patched:
        patched.setattr(files.shutil, "rmtree", lambda *args, **settings: None)
        with pytest.raises(SystemExit):
            write_tensors(tmp_path / "a.safetensors", {"a": torch.zeros(9)})
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == [".tmpH6FY5i"]
    files.remove_temporary(tmp_path)
    assert folder_content(tmp_path) == []


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_disk_full_at_the_end_leaves_the_old_file(tmp_path, monkeypatch, function):
    path = tmp_path / "a.json"
    write_json(path, 1)
    monkeypatch.setattr(files.os, function, disk_full)
    with pytest.raises(OSError, match=r"Could not write .*a\.json \(No space left on device\)") as caught:
        write_json(path, 2)
    assert caught.value.errno == errno.ENOSPC
    assert path.read_text() == "1\n"
    assert folder_content(tmp_path) == ["a.json"]


def test_any_exception_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, 1)
    with pytest.raises(TypeError, match="not JSON serializable"):
        write_json(path, {"a": object()})
    assert path.read_text() == "1\n"
    assert folder_content(tmp_path) == ["a.json"]


@pytest.mark.parametrize("exception", [KeyboardInterrupt, RuntimeError])
def test_an_interrupt_leaves_nothing_behind(tmp_path, exception):
    def interrupted():
        with replacing(tmp_path / "a") as temporary:
            temporary.write_text("half")
            raise exception

    with pytest.raises(exception):
        interrupted()
    assert folder_content(tmp_path) == []


def test_file_appears_only_when_whole(tmp_path):
    path = tmp_path / "a"
    path.write_text("old")
    with replacing(path) as temporary:
        temporary.write_text("new")
        assert temporary.parent == path.parent  # a rename is atomic only within one file system
        assert path.read_text() == "old"
    assert path.read_text() == "new"


def test_data_reach_the_disk_before_the_name(tmp_path, monkeypatch):
    events, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(files.os, "fsync", lambda fd: (events.append("fsync"), fsync(fd)))
    monkeypatch.setattr(files.os, "replace", lambda a, b: (events.append("replace"), replace(a, b)))
    write_json(tmp_path / "a.json", 1)
    assert events == ["fsync", "replace", "fsync"]


def test_folder_that_is_a_file_is_an_os_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        write_json(tmp_path / "file" / "a.json", 1)


@pytest.mark.parametrize("size", [0, 4, 20, -1])
@pytest.mark.parametrize("read", [read_tensors, read_metadata])
def test_file_that_was_cut_short_is_refused(tmp_path, size, read):
    path = tmp_path / "a.safetensors"
    write_tensors(path, {"a": torch.ones(100)}, {"b": 1})
    os.truncate(path, size % path.stat().st_size)
    with pytest.raises(ValueError, match=r"Expected .*a\.safetensors to be a whole safetensors file.*cut short"):
        read(path)


@pytest.mark.parametrize("read", [read_tensors, read_metadata])
def test_file_that_is_missing_or_something_else_is_refused(tmp_path, read):
    (tmp_path / "text").write_text("no tensors here, but more than eight bytes")
    for name in ("missing", "text"):
        with pytest.raises(ValueError, match=f"Expected .*{name} to be a whole safetensors file"):
            read(tmp_path / name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int32])
@pytest.mark.parametrize("shape", [(4, 3, 2), (0, 3)])
def test_array_comes_back(dtype, shape, tmp_path):
    values = torch.arange(torch.Size(shape).numel()).view(shape).to(dtype)
    with files.new_array(tmp_path / "folder" / "array.npy", shape, dtype) as array:
        array[:] = values
    back = files.read_array(tmp_path / "folder" / "array.npy", dtype)
    assert back.dtype == dtype
    assert torch.equal(back, values)


def test_array_appears_only_when_it_is_whole(tmp_path):
    with pytest.raises(RuntimeError, match="dies"), files.new_array(tmp_path / "array.npy", (3,), torch.float32):
        raise RuntimeError("the process dies")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", [b"", b"no array", None])
def test_damaged_array_is_refused_by_name(content, tmp_path):
    path = tmp_path / "array.npy"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"array\.npy to be a whole array"):
        files.read_array(path, torch.float32)


@pytest.mark.parametrize("place", [0.1, 0.4, 0.8, -3])
def test_flipped_bit_in_an_array_is_found(place, tmp_path):
    path = tmp_path / "array.npy"
    with new_array(path, (40, 3), torch.float32) as array:
        array[:] = torch.arange(120.0).view(40, 3)
    assert np.array_equal(np.load(path), np.arange(120.0).reshape(40, 3))
    content = bytearray(path.read_bytes())
    content[int(place * len(content)) if isinstance(place, float) else place] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"array\.npy to be a whole array, but got: .*digest"):
        read_array(path, torch.float32)


@pytest.mark.parametrize("change", ["value", "metadata", "name"])
def test_change_of_an_artefact_is_found_once_it_is_read(change, tmp_path):
    """Values, names and metadata that a safetensors reader would take as they are."""
    path = tmp_path / "a.safetensors"
    write_tensors(path, {"weight": torch.ones(7, dtype=torch.bfloat16), "scalar": torch.tensor(2.0)}, {"seconds": 12})
    assert read_metadata(path) == {"seconds": 12}
    content = path.read_bytes()
    old, new = {"value": (b"\x80\x3f", b"\x81\x3f"), "metadata": (b"12", b"13"), "name": (b"weight", b"weighs")}[change]
    path.write_bytes(content.replace(old, new, 1))
    assert len(path.read_bytes()) == len(content)
    for read in (read_tensors, read_metadata):
        with pytest.raises(ValueError, match=r"a\.safetensors to be a whole.* digest"):
            read(path)


def test_full_disk_is_told_before_an_array_is_mapped(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with (
        pytest.raises(OSError, match=r"array\.npy .*No space left"),
        new_array(tmp_path / "array.npy", (4,), torch.float32),
    ):
        pytest.fail("The array must not be given out.")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("number", "word"), [(float("nan"), "nan"), (float("inf"), "inf")])
def test_json_never_holds_what_is_no_number(number, word, tmp_path):
    path = tmp_path / "report.json"
    write_json(path, {"perplexity": {"wiki": [1.5, 2.5]}})
    before = path.read_bytes()
    with pytest.raises(ValueError, match=rf"finite numbers in .*report\.json, but got {word} for perplexity\.wiki\.1"):
        write_json(path, {"perplexity": {"wiki": [1.5, number]}})
    assert path.read_bytes() == before


def test_damaged_file_or_folder_is_kept_by_name(tmp_path):
    for round_number in range(2):
        (tmp_path / "last.ckpt").mkdir()
        (tmp_path / "last.ckpt" / str(round_number)).touch()
        set_aside(tmp_path / "last.ckpt")
    names = sorted(path.name for path in tmp_path.iterdir())
    assert len(names) == 2
    assert all(name.startswith("last.ckpt.") and name.endswith(".damaged") for name in names)


def test_sealed_json_is_believed_unchanged_alone(tmp_path):
    path = tmp_path / "a.json"
    write_sealed_json(path, {"b": 1.5, "a": {"n": [1, None]}})
    assert read_sealed_json(path) == {"b": 1.5, "a": {"n": [1, None]}}
    for other in (path.read_text().replace("1.5", "1.6"), path.read_text().replace('"n"', '"m"'), "[]", "{}", "{"):
        path.write_text(other)
        with pytest.raises(ValueError, match=r"Expected .*a\.json"):
            read_sealed_json(path)
    path.write_text('{"b": 1}')
    assert read_sealed_json(path, required=False) == {"b": 1}
