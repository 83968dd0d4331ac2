"""The environments agree, are what they say, and hold all that is needed."""

import ast
import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "Model_pruning_exploration.ipynb"
TESTS = sorted((ROOT / "tests").glob("*.py"))
PINS = ROOT / "requirements.txt"
BINDER = ROOT / "binder" / "requirements.txt"
COLAB = ROOT / "tests" / "colab.txt"
PACKAGES = {"sklearn": "scikit-learn", "yaml": "pyyaml"}


def pins(path):
    """Return {package: version} of a file of exact pins."""
    lines = [line.partition("#")[0] for line in path.read_text().splitlines()]
    wanted = [Requirement(line) for line in lines if line.strip()]
    for requirement in wanted:
        assert re.fullmatch("==[^*,]+", str(requirement.specifier)), (
            f"{path.name}: {requirement} is not an exact pin"
        )
    found = {canonicalize_name(r.name): str(r.specifier)[2:] for r in wanted}
    assert len(found) == len(wanted), f"{path.name}: a package stands twice"
    return found


def imported(source):
    """Return the packages, outside the standard library, a source imports."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.partition(".")[0])
    names -= sys.stdlib_module_names | {path.stem for path in TESTS}
    names -= {"pruning", "ai_edge_litert"}  # written here, taken where it is installed
    return {PACKAGES.get(name, name) for name in names}


def notebook_source():
    """Return the code of the notebook."""
    cells = nbformat.read(NOTEBOOK, as_version=4).cells
    return "\n".join(c.source for c in cells if c.cell_type == "code")


def python(*arguments):
    """Run this Python in the repository; return what it prints."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        pytest.fail(done.stdout, pytrace=False)
    return done.stdout


def test_binder_has_the_same_versions():
    binder = pins(BINDER)
    binder["tensorflow"] = binder.pop("tensorflow-cpu")
    assert binder.items() <= pins(PINS).items()


def test_binder_brings_no_second_jupyter():
    assert not {n for n in pins(BINDER) if n.startswith(("jupyter", "ipy"))}


def test_tools_are_the_same_beside_colabs_versions():
    text = COLAB.read_text().partition("# The tests' own tools")[2]
    tools = set(re.findall(r"^[\w-]+==\S+", text, re.MULTILINE))
    assert tools and tools <= set(PINS.read_text().splitlines())


@pytest.mark.parametrize("path", [PINS, BINDER, COLAB], ids=lambda p: p.name)
def test_pins_hold_what_the_notebook_imports(path):
    needed = imported(notebook_source())
    held = {name.removesuffix("-cpu") for name in pins(path)}
    if path == COLAB:
        needed.discard("scipy")  # scikit-learn brings it
    assert needed <= held, f"add {needed - held} to {path.name}"


def test_pins_hold_what_the_tests_import():
    needed = imported("\n".join(path.read_text() for path in TESTS))
    held = set(pins(PINS))
    assert needed <= held, f"add {needed - held} to {PINS.name}"


def test_installed_versions_are_the_pinned_ones():
    wanted = pins(ROOT / os.environ.get("PRUNING_PINS", PINS.name))
    found = {name: importlib.metadata.version(name) for name in wanted}
    assert found == wanted, "install the pins, or name others: PRUNING_PINS"


def test_conda_installs_the_pins():
    text = (ROOT / "environment.yml").read_text()
    conda = yaml.safe_load(text)["dependencies"]
    assert conda == ["python=3.12", "pip", {"pip": [f"-r {PINS.name}"]}]


def test_runtime_names_no_patch_level():
    runtime = (ROOT / "binder" / "runtime.txt").read_text()
    assert re.fullmatch(r"python-3\.1[123]\n", runtime)


def test_repo2docker_picks_pip_and_python_3_12():
    no_build = "--no-build", "--debug", "--Repo2Docker.default_buildpack=None"
    printed = python("-m", "repo2docker", *no_build, ".")
    assert "environment for python=3.12" in printed
    assert '-r "binder/requirements.txt"' in printed
    assert "environment.yml" not in printed


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]])
def test_ruff_finds_nothing(command):
    python("-m", "ruff", *command, NOTEBOOK.name, "tests")


def test_ci_runs_the_readmes_test_command():
    command = "pip install -r requirements.txt && pytest"
    for path in ["README.md", ".ci/run"]:
        assert command in (ROOT / path).read_text().splitlines(), path
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
