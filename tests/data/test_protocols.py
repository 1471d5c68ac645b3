"""The protocols for C4 against a naive reading of their description on a local file of C4's format."""

import gzip
import json
import random
from dataclasses import replace

import pytest
import torch

from nowag_pl.data.protocols import c4_crops, c4_new_stream, evaluation_windows, stream_tokens
from nowag_pl.data.sources import HubDataset, LocalFiles

SEQ_LEN = 12
BOS, EOS = 1, 2
pytestmark = pytest.mark.usefixtures("offline")


def make_documents(count, seed=0, longest=40):
    draw = random.Random(seed)
    return [" ".join(f"w{draw.randrange(500)}" for _ in range(draw.randint(1, longest))) for _ in range(count)]


def write_c4(path, documents):
    rows = [
        {"text": text, "timestamp": "2019-04-25T12:57:54Z", "url": f"https://a/{i}"} for i, text in enumerate(documents)
    ]
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    return HubDataset(str(path), split="validation", protocol="c4")


def ids(text):
    return [int(word[1:]) + 3 for word in text.split()]


def crops_by_the_book(documents, seq_len):
    """Draw with the module's own functions; a text of just seq_len tokens is taken whole."""
    state = random.getstate()
    random.seed(0)
    crops = []
    for _ in range(256):
        while True:
            i = random.randint(0, len(documents) - 1)
            tokens = [BOS, *ids(documents[i]), EOS]
            if len(tokens) >= seq_len:
                break
        if len(tokens) > seq_len:
            i = random.randint(0, len(tokens) - seq_len - 1)
            tokens = tokens[i : i + seq_len]
        crops.append(tokens)
    random.setstate(state)
    return crops


@pytest.fixture
def documents():
    return make_documents(1200)


@pytest.mark.parametrize("seq_len", [5, SEQ_LEN, 30])
def test_c4_is_the_256_crops(seq_len, documents, tokenizer, tmp_path):
    before = random.getstate()
    windows = evaluation_windows(write_c4(tmp_path / "c4.json.gz", documents), tokenizer, seq_len)
    assert windows.dtype == torch.int32
    assert windows.tolist() == crops_by_the_book(documents, seq_len)
    assert random.getstate() == before
    assert tokenizer.model_max_length == 16


def test_c4_holds_texts_of_just_the_length_and_tokens_of_the_tokenizer(documents, tokenizer):
    crops = c4_crops(documents, tokenizer, SEQ_LEN)
    whole = (crops[:, 0] == BOS) & (crops[:, -1] == EOS)
    assert 0 < int(whole.sum()) < 256
    assert any(EOS not in crop and BOS not in crop for crop in crops.tolist())


def test_c4_goes_on_where_most_texts_are_short(tokenizer):
    documents = [*make_documents(50, longest=5), "w1 " * 30]
    assert c4_crops(documents, tokenizer, SEQ_LEN).tolist() == crops_by_the_book(documents, SEQ_LEN)


def test_c4_says_when_it_is_not_the_papers_file(documents, tokenizer, caplog):
    c4_crops(documents, tokenizer, SEQ_LEN)
    assert "expected the 45576 documents of en/c4-validation.00000-of-00008.json.gz, but got 1200" in caplog.text


def test_c4_without_a_long_text_is_refused(tokenizer):
    with pytest.raises(
        ValueError, match=r"at least seq_len = 43 tokens for protocol 'c4', but got 20 shorter.*en/c4-val"
    ):
        c4_crops(make_documents(20), tokenizer, 43)


def test_c4_new_is_the_beginning_of_the_file_as_one_stream(documents, tokenizer, tmp_path):
    source = replace(write_c4(tmp_path / "c4.json.gz", documents), protocol="c4-new")
    stream = [BOS, *ids(" ".join(documents[:1100]))]
    windows = evaluation_windows(source, tokenizer, SEQ_LEN)
    assert windows.shape == (256, SEQ_LEN)
    assert windows.flatten().tolist() == stream[: 256 * SEQ_LEN]
    few = evaluation_windows(source, tokenizer, 100)
    assert few.flatten().tolist() == stream[: len(stream) // 100 * 100]
    assert len(few) < 256


def test_c4_new_takes_the_1100th_and_no_further_text(documents, tokenizer):
    assert c4_new_stream(documents, tokenizer)[-1] == ids(documents[1099])[-1]


def test_c4_new_of_fewer_texts_is_refused(tokenizer):
    with pytest.raises(ValueError, match=r"at least 1100 documents for protocol 'c4-new', but got 1099.*en/c4-val"):
        c4_new_stream(make_documents(1099), tokenizer)


def test_stream_joins_by_a_blank_line_and_drops_the_tail(documents, tokenizer, tmp_path):
    source = replace(write_c4(tmp_path / "c4.json.gz", documents), protocol="stream")
    stream = [BOS, *ids("\n\n".join(documents))]
    windows = evaluation_windows(source, tokenizer, SEQ_LEN)
    assert windows.flatten().tolist() == stream[: len(stream) // SEQ_LEN * SEQ_LEN]
    assert stream_tokens(source, tokenizer).tolist() == stream


@pytest.mark.parametrize("protocol", ["stream", "c4", "c4-new"])
def test_hub_dataset_is_opened_once(protocol, documents, tokenizer, tmp_path, monkeypatch):
    opened = []
    monkeypatch.setattr(HubDataset, "documents", lambda self: opened.append(self) or documents)
    source = HubDataset("a/b", protocol=protocol)
    windows = evaluation_windows(source, tokenizer, SEQ_LEN, tmp_path)
    assert torch.equal(evaluation_windows(source, tokenizer, SEQ_LEN, tmp_path), windows)
    assert opened == [source]
    evaluation_windows(replace(source, split="test"), tokenizer, SEQ_LEN, tmp_path)
    assert len(opened) == 2
    evaluation_windows(source, tokenizer, SEQ_LEN + 1, tmp_path)
    assert len(opened) == (3 if protocol == "c4" else 2)
    tokenizer.add_tokens(["more"])
    evaluation_windows(source, tokenizer, SEQ_LEN, tmp_path)
    assert len(opened) == (4 if protocol == "c4" else 3)


def test_protocols_do_not_share_what_is_kept(documents, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(HubDataset, "documents", lambda self: documents)
    results = {
        protocol: evaluation_windows(HubDataset("a/b", protocol=protocol), tokenizer, SEQ_LEN, tmp_path)
        for protocol in ("stream", "c4", "c4-new")
    }
    for protocol, windows in results.items():
        assert torch.equal(evaluation_windows(HubDataset("a/b", protocol=protocol), tokenizer, SEQ_LEN), windows)


@pytest.mark.parametrize("protocol", ["stream", "c4", "c4-new"])
def test_local_file_is_kept_under_its_text(protocol, tokenizer, tmp_path):
    path, cache = tmp_path / "c4.json.gz", tmp_path / "cache"
    source = replace(write_c4(path, make_documents(1200)), protocol=protocol)
    first = evaluation_windows(source, tokenizer, SEQ_LEN, cache)
    assert torch.equal(evaluation_windows(source, tokenizer, SEQ_LEN, cache), first)
    assert len(list(cache.iterdir())) == 1
    write_c4(path, make_documents(1200, seed=1))
    assert not torch.equal(evaluation_windows(source, tokenizer, SEQ_LEN, cache), first)


def test_files_are_a_stream(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("w1 w2")
    (tmp_path / "b.txt").write_text("w3")
    source = LocalFiles((str(tmp_path / "a.txt"), str(tmp_path / "b.txt")))
    assert stream_tokens(source, tokenizer).tolist() == [BOS, 4, 5, 6]
