import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nowag_pl.data.tokens import random_windows, tokenize, tokens_digest, whole_windows
from nowag_pl.files import read_tensors, write_tensors

WORDS = ["<unk>", "<s>", "a", "b", "c", "\n"]
BOS = WORDS.index("<s>")


@pytest.fixture
def make_tokenizer():
    """Make tokenizers of single characters that would put the first token before each text by themselves."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    def make(words=WORDS, **special):
        backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", BOS)]
        )
        return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", **special)

    return make


@pytest.fixture
def tokenizer(make_tokenizer):
    return make_tokenizer(bos_token="<s>")


def only_file(folder):
    (path,) = folder.iterdir()
    return path


def test_documents_are_joined_by_a_blank_line_after_one_first_token(tokenizer):
    tokens = tokenize(["ab", "c"], tokenizer)
    assert tokens.dtype == torch.int32
    assert [WORDS[token] for token in tokens] == ["<s>", "a", "b", "\n", "\n", "c"]


def test_no_first_token_where_the_tokenizer_has_none(make_tokenizer):
    assert [WORDS[token] for token in tokenize(["ab"], make_tokenizer())] == ["a", "b"]


def test_text_longer_than_the_model_takes_is_whole(make_tokenizer):
    tokenizer = make_tokenizer(bos_token="<s>", model_max_length=4)
    assert len(tokenize(["abc" * 10], tokenizer)) == 31


def test_embedded_tokenizer_starts_once():
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained("nowag_pl/assets/embedded")
    tokens = tokenize(["Return the value.", "Raise an error."], tokenizer).tolist()
    assert tokens[0] == tokenizer.bos_token_id
    assert tokens.count(tokenizer.bos_token_id) == 1
    assert tokenizer.decode(tokens[1:]).strip() == "Return the value.\n\nRaise an error."


def test_cache_is_used_the_second_time(tokenizer, make_tokenizer, tmp_path):
    folder = tmp_path / "cache"
    first = tokenize(["abc"], tokenizer, folder)
    assert torch.equal(read_tensors(only_file(folder))[0]["tokens"], first)
    write_tensors(only_file(folder), {"tokens": torch.tensor([7], dtype=torch.int32)})
    assert tokenize(["abc"], make_tokenizer(bos_token="<s>"), folder).tolist() == [7]


def test_cache_knows_text_and_tokenizer(tokenizer, make_tokenizer, tmp_path):
    expected = tokenize(["abc"], tokenizer, tmp_path)
    assert len(tokenize(["abca"], tokenizer, tmp_path)) == len(expected) + 1
    assert len(tokenize(["abc"], make_tokenizer(), tmp_path)) == len(expected) - 1
    assert len(tokenize(["abc"], make_tokenizer(eos_token="<s>"), tmp_path)) == len(expected) - 1
    swapped = make_tokenizer(["<unk>", "<s>", "b", "a", "c", "\n"], bos_token="<s>")
    assert tokenize(["abc"], swapped, tmp_path).tolist() == [1, 3, 2, 4]
    assert len(list(tmp_path.iterdir())) == 5


def test_damaged_cache_is_made_again(tokenizer, tmp_path, caplog):
    expected = tokenize(["abc"], tokenizer, tmp_path)
    os.truncate(only_file(tmp_path), 20)
    assert torch.equal(tokenize(["abc"], tokenizer, tmp_path), expected)
    assert "damaged" in caplog.text
    assert torch.equal(read_tensors(only_file(tmp_path))[0]["tokens"], expected)


def test_cache_that_cannot_be_written_is_only_a_warning(tokenizer, tmp_path, caplog):
    (tmp_path / "file").touch()
    assert len(tokenize(["abc"], tokenizer, tmp_path / "file")) == 4
    assert "Tokens are not cached" in caplog.text


def test_digest_is_that_of_the_values():
    tokens = torch.tensor([1, 2, 300])
    assert tokens_digest(tokens) == tokens_digest(tokens.int())
    assert tokens_digest(tokens) == tokens_digest(torch.tensor([1, 0, 2, 0, 300])[::2])
    assert tokens_digest(tokens) != tokens_digest(torch.tensor([1, 300, 2]))


@given(num_tokens=st.integers(1, 60), seq_len=st.integers(1, 20))
def test_whole_windows_drop_the_tail(num_tokens, seq_len):
    tokens = torch.arange(num_tokens, dtype=torch.int32)
    if num_tokens < seq_len:
        with pytest.raises(ValueError, match=f"at least seq_len = {seq_len} tokens, but got {num_tokens}"):
            whole_windows(tokens, seq_len)
        return
    windows = whole_windows(tokens, seq_len)
    assert windows.dtype == torch.int32
    assert windows.shape == (num_tokens // seq_len, seq_len)
    assert windows.flatten().tolist() == list(range(num_tokens // seq_len * seq_len))


@given(
    num_tokens=st.integers(5, 60),
    seq_len=st.integers(1, 5),
    num_sequences=st.integers(1, 9),
    seed=st.integers(0, 99),
)
def test_random_windows_are_consecutive_and_in_bounds(num_tokens, seq_len, num_sequences, seed):
    tokens = torch.arange(num_tokens, dtype=torch.int32)
    windows = random_windows(tokens, seq_len, num_sequences, seed)
    assert windows.dtype == torch.int32
    assert windows.shape == (num_sequences, seq_len)
    assert torch.equal(windows - windows[:, :1], torch.arange(seq_len).expand_as(windows).int())
    assert windows.min() >= 0
    assert windows.max() < num_tokens


def test_random_windows_reach_both_ends():
    starts = random_windows(torch.arange(6), seq_len=3, num_sequences=200, seed=0)[:, 0]
    assert sorted(set(starts.tolist())) == [0, 1, 2, 3]


def test_seed_decides_the_windows_and_global_state_stays():
    tokens, before = torch.arange(1000), torch.get_rng_state()
    first, same, other = (random_windows(tokens, 4, 8, seed) for seed in (1, 1, 2))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)


def test_random_windows_of_too_short_a_text_are_refused():
    with pytest.raises(ValueError, match=r"at least seq_len = 5 tokens, but got 4.*smaller data\.seq_len"):
        random_windows(torch.arange(4), 5, 1, seed=0)


@pytest.mark.parametrize("num_sequences", [0, -1])
def test_no_random_windows_are_refused(num_sequences):
    with pytest.raises(ValueError, match=f"num_sequences of at least 1, but got {num_sequences}"):
        random_windows(torch.arange(9), 5, num_sequences, seed=0)
