"""`pip install nowag_pl`, without the extra `train`, is enough to load, run and finetune adapters."""

import json
import runpy
import subprocess
import sys
import tomllib

import pytest
from tiny_models import ROOT, subprocess_environment

from nowag_pl import console

PROGRAM = ROOT / "tests" / "core_program.py"
EXPECTED = {"same": True, "trained": 4, "train": []}


def outcome(command, **environment):
    """Run the program of the core, and return what it saw but for rounding errors, which are checked."""
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=280, check=False, env=subprocess_environment() | environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen.pop("error") < 1e-4
    return seen


def test_the_core_needs_no_package_of_the_extra(tmp_path):
    """Packages of the extra cannot be imported, as if they were not installed."""
    extra = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["train"]
    names = {"".join(part if part.isalnum() else " " for part in each).split()[0] for each in extra}
    # transformers itself imports the last one.
    blocked = sorted(names - {"transformers", "jinja2"})
    assert {"lightning", "datasets", "tensorboard"} <= set(blocked)
    code = (
        f"import runpy, sys\nsys.modules.update(dict.fromkeys({blocked!r}))\n"
        f"sys.argv = ['program', {str(tmp_path)!r}]\nrunpy.run_path({str(PROGRAM)!r}, run_name='__main__')\n"
    )
    assert outcome([sys.executable, "-c", code], PYTHONPATH=str(ROOT)) == EXPECTED


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("constraints", ["constraints-oldest.txt", "constraints.txt"])
def test_the_core_in_an_environment_of_its_own(constraints, tmp_path):
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    install = [python, "-m", "pip", "install", "-q", "-c", ROOT / constraints, f"{ROOT}[lora]"]
    subprocess.run(install, check=True, cwd=tmp_path)
    assert outcome([python, str(PROGRAM), str(tmp_path / "model")], PYTHONPATH="") == EXPECTED


def bounds(dependencies):
    """Return the lower bound of each package."""
    return dict(each.split(">=") for each in dependencies)


def test_oldest_constraints_are_the_lower_bounds():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (ROOT / "constraints-oldest.txt").read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if not line.startswith("#"))
    lower = bounds([*project["dependencies"], *project["optional-dependencies"]["lora"]])
    assert pinned.keys() == lower.keys()
    assert all(pinned[name] in (bound, f"{bound}.0") for name, bound in lower.items())


def test_the_command_runs_main(monkeypatch):
    ran = {}
    monkeypatch.setattr(runpy, "run_path", lambda path, run_name: ran.update(path=path, name=run_name))
    monkeypatch.setattr(sys, "argv", ["nowag", "--help"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    console.main()
    assert ran == {"path": str(ROOT / "main.py"), "name": "__main__"}
    assert sys.argv == [str(ROOT / "main.py"), "--help"]


def test_the_command_says_what_is_missing(monkeypatch, tmp_path):
    monkeypatch.setattr(console, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="Expected the extra `train`"):
        console.main()
    monkeypatch.setattr(console, "_PROGRAM", tmp_path / "main.py")
    with pytest.raises(SystemExit, match=r"Expected main.py beside the package"):
        console.main()
