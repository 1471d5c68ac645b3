"""The messages of jsonargparse and argparse in one line: which option, what was expected, what it got instead."""

import re

_KEY = re.compile(r"Parser key \"([^\"]+)\"")
_OWN = re.compile(r"(Expected [\w.]+ .*, but got .*)")
_OWN_LINE = re.compile(r"^[ -]*(?:\w+: )?(Expected [^<\n]*, but got [^\n]*)", re.MULTILINE)
_SUBTYPES = re.compile(r"Subtypes: \[(.*)\]")
_GIVEN = re.compile(r"Given value: (.*)", re.DOTALL)
_GOT = re.compile(r"Expected an? (<class '[\w.]+'>|typing\.\S.*?)\. Got value: (.*)")
_SHOWN = {
    "int": "a whole number",
    "float": "a number",
    "str": "text",
    "bool": "true or false",
    "NoneType": "null",
    "timedelta": "a time such as 1:30:00",
    "list": "a list, such as [a, b]",
    "dict": "a mapping, such as {name: value}",
    "tuple": "a list of two, such as [2, 4]",
    "Logger": "a logger",
    "Callback": "a callback",
}
_MOST = 120  # characters of a value


def explained(message: str) -> str:
    r"""Return an error message in one line, and one of ours without the words of jsonargparse around it.

    Args:
        message: of jsonargparse, argparse, or this package.

    Example:
        >>> explained("Does not validate against any of the Union subtypes\n  - Expected top_k above 0, but got -1.")
        'Expected top_k above 0, but got -1.'
        >>> explained("Parser key \"a.b\":\n  Expected a <class 'int'>. Got value: x")
        'Expected a.b to be a whole number, but got x.'
    """
    if "Problems parsing config" in message:
        return "Expected a configuration in YAML, but got: " + _in_one_line(message.partition("config:")[2])
    if not (keys := _KEY.findall(message)):
        own = _OWN.search(message) if "Union subtypes" in message else None
        return own[1] if own else message
    key = ".".join(keys)
    if own := _OWN_LINE.search(message):
        return own[1]
    for known in (_unknown_option, _no_class, _wrong_type):
        if said := known(message, key):
            return said + _hint(message)
    return _in_one_line(message)


def _unknown_option(message: str, key: str) -> str | None:
    if not (found := re.search(r"Option '([^']+)' is not accepted", message)):
        return None
    owner = re.findall(r"class_path '([\w.]+)'", message)
    return f"Expected {key} to have options of {owner[-1] if owner else 'its class'}, but got {found[1]!r}."


def _no_class(message: str, key: str) -> str | None:
    """Say of a class_path that it names no class of the right kind."""
    if found := re.search(r"Import path (\S+) does not correspond to a subclass of (\w+)", message):
        return f"Expected {key} to be the class path of one of the kind {found[2]}, but got {found[1]}."
    if found := re.search(r"Expected a dot import path string: (.+)", message):
        return f"Expected {key} to be the class path of something that can be imported, but got {found[1][:_MOST]}."
    if found := re.search(r"class_path '([^']+)':?\s*\n?\s*([^\n]*)", message):
        reason = found[2].strip(" -.:")
        if reason and not reason.startswith("Parser key"):
            return f"Expected {key} to be a class with its options, but got {found[1]}: {reason}."
    return None


def _wrong_type(message: str, key: str) -> str | None:
    """Say which types or words an option takes."""
    subtypes, given = _SUBTYPES.findall(message), _GIVEN.findall(message)
    if subtypes and given:
        value = _in_one_line(given[-1].partition("\ndid you mean")[0])
        return f"Expected {key} to be {_shown_types(subtypes[-1])}, but got {value[:_MOST]}."
    if got := _GOT.findall(message):
        return f"Expected {key} to be {_shown_types(got[-1][0])}, but got {got[-1][1][:_MOST]}."
    return None


def _shown_types(text: str) -> str:
    """Return types as words, such as "a whole number or null"."""
    shown: list[str] = []
    for part in _parts(text):
        if part.startswith("typing.Literal["):
            words = [word.strip().strip("'\"") for word in part.removeprefix("typing.Literal[").rstrip("]").split(",")]
        else:
            name = re.sub(r"^<class '|'>$", "", part).partition("[")[0].rpartition(".")[2]
            words = [_SHOWN.get(name, f"the class path of a {name}")]
        shown += [word for word in words if word not in shown]
    return " or ".join([", ".join(shown[:-1]), shown[-1]] if len(shown) > 1 else shown)


def _parts(text: str) -> list[str]:
    """Return the types between the commas outside of brackets."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter == "[") - (letter == "]")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts]


def _hint(message: str) -> str:
    if re.search(r"Expected a <class 'dict'>.*Given value: \{[^}]*\w:[^\s]", message, re.DOTALL):
        return " YAML wants a space after the colon: {name: file.txt}"
    return ""


def _in_one_line(text: str) -> str:
    return " ".join(text.split())
