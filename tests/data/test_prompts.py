"""Prompts with right answers out of tables."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nowag_pl.data.prompts import PromptSource, prompts_digest
from nowag_pl.data.sources import HubDataset

ROWS = [{"question": "1+1", "answer": "2", "id": 0}, {"question": "2+2", "answer": "4", "id": "x"}]


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(path)


def test_prompt_is_the_request_with_what_stands_around_it(table):
    first, second = PromptSource(table, system="Be brief.", suffix=" = ?").read()
    turns = [("system", "Be brief."), ("user", "1+1 = ?")]
    assert [(message["role"], message["content"]) for message in first.messages] == turns
    assert (first.answer, second.answer) == ("2", "4")


def test_other_files_and_a_dataset_give_the_same_prompts(table, tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(ROWS))
    chats = [[{"role": "user", "content": row["question"]}, {"from": "gpt", "value": row["answer"]}] for row in ROWS]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    problems = {"problem": [row["question"] for row in ROWS], "answer": [row["answer"] for row in ROWS]}
    pq.write_table(pa.table(problems), tmp_path / "a.parquet")
    sources = [PromptSource(str(tmp_path / name)) for name in ("a.jsonl", "a.json", "chats.jsonl", "a.parquet")]
    sources.append(PromptSource(dataset=HubDataset(table)))
    assert len({prompts_digest(source.read()) for source in sources}) == 1
    assert prompts_digest(PromptSource(table, max_prompts=1).read()) != prompts_digest(PromptSource(table).read())


def test_row_without_an_answer_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "no prompt"}) + "\n")
    with pytest.raises(ValueError, match="row 0 is another: 'no prompt'"):
        PromptSource(str(tmp_path / "a.jsonl")).read()


def test_one_source_is_wanted(table):
    with pytest.raises(ValueError, match="but got none"):
        PromptSource()
    with pytest.raises(ValueError, match="but got both"):
        PromptSource(table, HubDataset(table))
