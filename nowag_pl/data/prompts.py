"""Prompts with right answers: rows of tables with a request and an answer, or chats that end with one."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from nowag_pl.data.chats import Document, Message
from nowag_pl.data.expansion import named_files
from nowag_pl.data.sources import HubDataset, LocalFiles


class Prompt(NamedTuple):
    """A prompt and its right answer.

    Attributes:
        messages: turns of the chat, the last one the user's.
        answer: the right answer, as the data gives it.
    """

    messages: list[Message]
    answer: str

    @property
    def text(self) -> str:
        """All turns, without their roles."""
        return "\n\n".join(str(message["content"]) for message in self.messages)


@dataclass(frozen=True)
class PromptSource:
    r"""Where prompts come from.

    Attributes:
        files: .json, .jsonl, .ndjson, .parquet, .csv or .tsv, each also as .gz, or a folder that `save_to_disk` wrote,
            with columns such as question and answer, problem and answer, prompt and response, or with chats whose last
            turn is the right answer. null: the dataset.
        dataset: a Hugging Face dataset with such columns. null: the files.
        system: text of a system turn before each prompt. null: none.
        suffix: text after each request, such as "Put the final answer in \boxed{}.".
        max_prompts: number of prompts to take, the first ones. null: all.
    """

    files: str | list[str] | None = None
    dataset: HubDataset | None = None
    system: str | None = None
    suffix: str = ""
    max_prompts: int | None = None

    def __post_init__(self) -> None:
        if bool(self.files) == (self.dataset is not None):
            raise ValueError(
                "Expected prompts.files or prompts.dataset, but got " + ("both." if self.files else "none.")
            )

    def read(self) -> list[Prompt]:
        """Read all prompts.

        Raises:
            ValueError: a file cannot be read, or a row is no prompt with an answer.
        """
        source = self.dataset if self.dataset is not None else LocalFiles(named_files(self.files or []))
        documents = source.documents()[: self.max_prompts]
        return [self._prompt(document, index) for index, document in enumerate(documents)]

    def _prompt(self, document: Document, index: int) -> Prompt:
        is_chat = isinstance(document, list) and len(document) > 1 and document[-1]["role"] == "assistant"
        if isinstance(document, str) or not is_chat or not str(document[-1]["content"]).strip():
            raise ValueError(
                "Expected prompts with right answers, in columns such as question and answer or in chats that end "
                f"with the assistant, but row {index} is another: {str(document)[:100]!r}."
            )
        *turns, answer = document
        last = {**turns[-1], "content": f"{turns[-1]['content']}{self.suffix}"}
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return Prompt([*system, *turns[:-1], last], str(answer["content"]))


def prompts_digest(prompts: Sequence[Prompt]) -> str:
    """Return the SHA-256 of prompts and answers."""
    content = json.dumps([[prompt.messages, prompt.answer] for prompt in prompts], sort_keys=True)
    return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()
