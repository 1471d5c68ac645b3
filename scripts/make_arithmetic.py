"""Make a task on which a small model rambles: sums of three digits, answered with needless steps.

python scripts/make_arithmetic.py runs/arithmetic

Writes into the folder: model/, a configuration and a tokenizer of single characters without weights; supervised.jsonl
and held_out.jsonl, requests with answers to imitate; prompts.jsonl and questions.jsonl, requests with the right number,
those of the second in none of the other files. An answer adds one number after the other, goes back over its steps
between 0 and 8 times, for nothing, and ends with the sum:

    7+5+8  ->  7+5=12
               12+8=20
               20-8=12
               20
"""

import json
import random
import sys
from collections.abc import Iterable
from itertools import product
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

SPECIAL = ["<pad>", "<eos>", "<user>", "<model>"]
CHARACTERS = "0123456789+-=\n"
# Both sides of a chat, each by a token of its own; the assistant's ends with <eos>.
TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}<user>{{ message['content'] }}<model>"
    "{% else %}{{ message['content'] }}<eos>{% endif %}{% endfor %}"
)
MOST_CHECKS = 8
NUM_SUPERVISED, NUM_HELD_OUT, NUM_QUESTIONS = 5000, 200, 200


def answer(first: int, second: int, third: int, num_checks: int) -> str:
    """Return an answer with needless steps."""
    total = first + second
    checks = [f"{total + third}-{third}={total}", f"{total}-{second}={first}"]
    needless = [checks[number % 2] for number in range(num_checks)]
    return "\n".join([f"{first}+{second}={total}", f"{total}+{third}={total + third}", *needless, str(total + third)])


def write_model(folder: Path) -> None:
    """Write the configuration and the tokenizer."""
    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<pad>",
        additional_special_tokens=["<user>", "<model>"],
        chat_template=TEMPLATE,
        model_max_length=128,
    ).save_pretrained(folder)
    LlamaConfig(
        vocab_size=32,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
        architectures=["LlamaForCausalLM"],
        dtype="float32",
    ).save_pretrained(folder)
    GenerationConfig(eos_token_id=1, pad_token_id=0).save_pretrained(folder)


def write_rows(path: Path, rows: Iterable[dict[str, str]]) -> None:
    """Write one JSON object a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main(folder: Path) -> None:
    """Write everything into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    write_model(folder / "model")
    draws = random.Random(0)
    sums = list(product(range(10), repeat=3))
    draws.shuffle(sums)
    questions, rest = sums[:NUM_QUESTIONS], sums[NUM_QUESTIONS:]

    def imitated(count: int) -> list[dict[str, str]]:
        chosen = [(*draws.choice(rest), draws.randint(0, MOST_CHECKS)) for _ in range(count)]
        return [{"prompt": f"{a}+{b}+{c}", "response": answer(a, b, c, checks)} for a, b, c, checks in chosen]

    write_rows(folder / "supervised.jsonl", imitated(NUM_SUPERVISED))
    write_rows(folder / "held_out.jsonl", imitated(NUM_HELD_OUT))
    for name, chosen in (("prompts", rest), ("questions", questions)):
        write_rows(
            folder / f"{name}.jsonl", ({"question": f"{a}+{b}+{c}", "answer": str(a + b + c)} for a, b, c in chosen)
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
