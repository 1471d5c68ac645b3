"""A few sampled answers for people to read, in TensorBoard and the report."""

from collections.abc import Sequence
from html import escape
from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger

from nowag_pl.lit.objectives.controller import Controller
from nowag_pl.lit.text_module import TextModule

_NUM_SHOWN = 4
_EVERY = 10  # steps


def show_answers(
    module: TextModule, controller: Controller, answers: Sequence[dict[str, Any]], group_size: int
) -> None:
    """Keep the first answer to each of a few prompts for the report, and write it to TensorBoard now and then.

    Args:
        module: gives the loggers.
        controller: knows the step.
        answers: of this rank, those to each prompt one after the other.
        group_size: answers to a prompt.
    """
    chosen = list(answers[::group_size][:_NUM_SHOWN])
    controller.show(chosen)
    if controller.step % _EVERY or not module.trainer.is_global_zero:
        return
    for logger in module.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_text("policy/answers", _markdown(chosen), controller.step)


def _markdown(answers: Sequence[dict[str, Any]]) -> str:
    rows = [
        f"| {_cell(row['prompt'])} | {_cell(row['answer'])} | {row['reward']:.2f} | {row['tokens']} |"
        for row in answers
    ]
    return "\n".join(["| prompt | answer | reward | tokens |", "| --- | --- | ---: | ---: |", *rows])


def _cell(text: str) -> str:
    return escape(text).replace("|", "&#124;").replace("\n", "<br>")
