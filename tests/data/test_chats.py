import json

import pytest

from nowag_pl.data.chats import as_texts, text_columns
from nowag_pl.data.documents import read_documents
from nowag_pl.data.protocols import stream_tokens
from nowag_pl.data.sources import LocalFiles

TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"
CHAT = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2 w3"}]


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    "row",
    [
        {"messages": CHAT, "tools": None},
        {"conversations": [{"from": "human", "value": "w1"}, {"from": "gpt", "value": "w2 w3", "weight": None}]},
        {"instruction": "w1", "response": "w2 w3", "category": "x"},
        {"instruction": "w1", "input": "", "output": "w2 w3"},
        {"prompt": "w1", "completion": "w2 w3"},
    ],
)
def test_chats_of_every_dialect_are_the_same(row, tmp_path):
    assert read_documents(write(tmp_path / "chats.jsonl", row)) == [CHAT]


def test_what_a_request_is_about_belongs_to_it(tmp_path):
    path = write(tmp_path / "a.jsonl", {"instruction": "w1", "context": "w4", "response": "w2 w3"})
    assert read_documents(path)[0][0] == {"role": "user", "content": "w1\n\nw4"}


def test_text_is_preferred_and_a_column_chooses(tmp_path):
    path = write(tmp_path / "a.jsonl", {"text": "plain", "messages": CHAT, "body": "other"})
    assert read_documents(path) == ["plain"]
    assert read_documents(path, "messages") == [CHAT]
    assert read_documents(path, "body") == ["other"]
    assert text_columns(["messages", "prompt", "response"], None, "a") == ("messages",)


def test_chats_of_parquet_are_read(tmp_path):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"messages": CHAT}]), tmp_path / "a.parquet")
    assert read_documents(tmp_path / "a.parquet") == [CHAT]


def test_template_of_the_model_writes_them_after_one_first_token(tokenizer, tmp_path):
    tokenizer.chat_template = TEMPLATE
    assert as_texts(["w9", CHAT], tokenizer) == ["w9", "<s>user w1 assistant w2 w3 "]
    source = LocalFiles((str(write(tmp_path / "a.jsonl", {"messages": CHAT})),))
    tokens = stream_tokens(source, tokenizer, tmp_path / "cache").tolist()
    assert tokens.count(tokenizer.bos_token_id) == 1
    assert [tokens[0], tokens[2], *tokens[4:]] == [1, 4, 5, 6]
    tokenizer.chat_template = TEMPLATE.replace("m.role", "'w7'")
    assert stream_tokens(source, tokenizer, tmp_path / "cache").tolist() != tokens


def test_chats_are_refused_where_they_cannot_be_written(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="Expected a model with a chat template"):
        as_texts([CHAT], tokenizer)
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ValueError, match=r"refuses chat 1, whose roles are \['user', 'assistant'\]: roles must"):
        as_texts(["text", CHAT], tokenizer)
    path = write(tmp_path / "a.jsonl", {"messages": [{"speaker": "me"}]})
    with pytest.raises(ValueError, match=r"Expected messages with role and content.*row 0 holds one with \['speaker'"):
        read_documents(path)
    path = write(tmp_path / "b.jsonl", {"prompt": "w1", "response": None})
    with pytest.raises(ValueError, match=r"Expected text in columns \['prompt', 'response'\]"):
        read_documents(path)
