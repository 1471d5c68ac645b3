"""What mkdocs calls while it builds the documentation."""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

_BENCHMARKS = Path(__file__).parents[1] / "benchmarks" / "README.md"


def on_files(files: Any, config: Any) -> Any:
    """Add the page of the benchmarks, which lies beside their programs."""
    files.append(File.generated(config, "benchmarks.md", content=_BENCHMARKS.read_text(encoding="utf-8")))
    return files


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    """Drop the roles that docstrings have for other tools, such as `:class:` in front of a name."""
    return re.sub(r":(?:class|func|meth):<code>~?(?:[\w.]+\.)?(\w+)</code>", r"<code>\1</code>", html)
