"""Messages of libraries: each warning once, and retries of a hub as one line."""

import logging
import warnings

_HUB = ("huggingface_hub", "huggingface_hub.utils._http", "huggingface_hub.file_download", "datasets", "httpx")


class OnlyOnce(logging.Filter):
    """Lets a warning pass if it has not passed before; all else passes."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        """Tell whether a record is shown."""
        if record.levelno < logging.WARNING:
            return True
        message = record.getMessage()
        is_new = message not in self._seen
        self._seen.add(message)
        return is_new


class OneLineOfRetries(logging.Filter):
    """Lets one line pass for all retries of a hub that cannot be reached, which libraries tell one by one."""

    def __init__(self) -> None:
        super().__init__()
        self._is_told = False

    def filter(self, record: logging.LogRecord) -> bool:
        """Tell whether a record is shown, and say it in fewer words."""
        message = record.getMessage()
        if "etrying in" not in message and "thrown while requesting" not in message:
            return True
        if self._is_told:
            return False
        self._is_told = True
        record.msg, record.args = "The hub cannot be reached; trying again a few times.", ()
        return True


def calm() -> None:
    """Show each warning once, whichever library gives it, and one line where a hub cannot be reached."""
    # At the end, so that filters which leave warnings out come first.
    warnings.simplefilter("once", append=True)
    for handler in logging.getLogger().handlers:
        _replace(handler, OnlyOnce())
    retries = OneLineOfRetries()
    for name in _HUB:
        _replace(logging.getLogger(name), retries)


def _replace(place: logging.Filterer, new: logging.Filter) -> None:
    """Add a filter in place of one of its kind, which knows the messages of an earlier command of this process."""
    for each in list(place.filters):
        if isinstance(each, type(new)):
            place.removeFilter(each)
    place.addFilter(new)
