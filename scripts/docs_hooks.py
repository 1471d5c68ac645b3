"""What mkdocs calls while it builds the documentation."""

import re
from typing import Any


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    """Drop the roles that docstrings have for other tools, such as `:class:` in front of a name."""
    return re.sub(r":(?:class|func|meth):<code>~?(?:[\w.]+\.)?(\w+)</code>", r"<code>\1</code>", html)
