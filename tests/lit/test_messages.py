"""Warnings once, retries in one line."""

import logging
import warnings

from nowag_pl.lit.messages import OneLineOfRetries, OnlyOnce, calm


def record(message, *arguments, level=logging.WARNING):
    return logging.LogRecord("name", level, "file", 1, message, arguments, None)


def test_a_warning_is_shown_once_and_all_else_as_often_as_it_comes():
    once = OnlyOnce()
    shown = [once.filter(record("block %d is large", number)) for number in (1, 2, 1, 2, 3)]
    assert shown == [True, True, False, False, True]
    assert all(once.filter(record("block 1 of 3", level=logging.INFO)) for _ in range(2))


def test_every_command_begins_anew():
    handler = logging.NullHandler()
    logging.getLogger().addHandler(handler)
    try:
        with warnings.catch_warnings():
            for _ in range(2):
                calm()
                assert [bool(handler.filter(record("twice"))) for _ in range(2)] == [True, False]
    finally:
        logging.getLogger().removeHandler(handler)


def test_retries_are_one_line():
    retries = OneLineOfRetries()
    said = []
    for message in ("'ConnectError' thrown while requesting HEAD https://x", "Retrying in 1s [Retry 1/5].", "Other"):
        each = record(message)
        if retries.filter(each):
            said.append(each.getMessage())
    assert said == ["The hub cannot be reached; trying again a few times.", "Other"]
