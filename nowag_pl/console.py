"""The command `nowag`: `python main.py` from anywhere, for an installation that has the files beside the package."""

import runpy
import sys
from importlib.util import find_spec
from pathlib import Path

_PROGRAM = Path(__file__).parents[1] / "main.py"


def main() -> None:
    """Run main.py with the arguments of this process."""
    if not _PROGRAM.is_file():
        sys.exit(
            "error: Expected main.py beside the package, but this installation holds the package alone. Install a copy "
            "of the repository: pip install -c constraints.txt -e '.[cpu,train]'"
        )
    if find_spec("lightning") is None:
        sys.exit("error: Expected the extra `train`, but it is not installed: pip install -e '.[cpu,train]'")
    # Further processes of the same run are started by the first argument.
    sys.argv[0] = str(_PROGRAM)
    sys.path.insert(0, str(_PROGRAM.parent))
    runpy.run_path(str(_PROGRAM), run_name="__main__")
