"""Take the definitions out of the notebook, so that tests can call them."""

import ast
import gc
import json
import os
import subprocess
import sys
import tempfile
import types
from pathlib import Path

import hypothesis
import matplotlib
import matplotlib.pyplot as plt
import pytest

NOTEBOOK = Path(__file__).parents[1] / "Model_pruning_exploration.ipynb"
DEFINING = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef)
RUN_TIME = {"STAND_IN": False}

matplotlib.use("Agg")
if "PRUNING_EXPORT" not in os.environ:  # the notebook writes a module: not here
    os.environ["PRUNING_EXPORT"] = tempfile.mkdtemp(prefix="pruning-")
hypothesis.settings.register_profile("tests", deadline=None, derandomize=True)
hypothesis.settings.load_profile("tests")


def sets_constants(statement):
    """Return whether a statement sets constants, or a named tuple, and nothing else."""
    if not isinstance(statement, ast.Assign | ast.AugAssign):
        return False
    if "namedtuple" in ast.unparse(statement.value):
        return True
    return all(map(str.isupper, names_set(statement)))


def names_set(statement):
    """Return the names in the targets of an assignment."""
    targets = getattr(statement, "targets", None) or [statement.target]
    nodes = [node for target in targets for node in ast.walk(target)]
    return [node.id for node in nodes if isinstance(node, ast.Name)]


def defines(statement):
    """Return whether a statement defines something and runs nothing."""
    if sets_constants(statement):
        return not RUN_TIME.keys() & names_set(statement)
    if ast.unparse(statement) == "import pruning":
        return False  # the notebook writes this module itself
    return isinstance(statement, DEFINING)


def code_cells(path):
    """Return [(source, tags)] of a notebook's code cells."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    return [("".join(c["source"]), c["metadata"].get("tags", [])) for c in code]


def cell_tagged(tag):
    """Return the source of the one code cell of the notebook with a tag."""
    (source,) = (source for source, tags in code_cells(NOTEBOOK) if tag in tags)
    return source


def cell_defining(name):
    """Return the source of the one code cell of the notebook that defines a name."""
    (found,) = (
        source
        for source, _ in code_cells(NOTEBOOK)
        if any(getattr(s, "name", "") == name for s in ast.parse(source).body)
    )
    return found


def definitions(path):
    """Return a notebook's imports, constants, functions and classes."""
    tree = ast.parse("\n".join(source for source, _ in code_cells(path)))
    kept = []
    for statement in tree.body:
        if isinstance(statement, ast.With):
            statement.body = [s for s in statement.body if defines(s)]
            kept += [statement] if statement.body else []
        elif defines(statement):
            kept.append(statement)
    return ast.Module(kept, type_ignores=[])


def load():
    """Return a module that holds the notebook's definitions."""
    module = types.ModuleType("notebook_definitions")
    sys.modules[module.__name__] = module
    vars(module).update(RUN_TIME)
    exec(compile(definitions(NOTEBOOK), NOTEBOOK.name, "exec"), vars(module))
    gc.freeze()  # as the notebook does
    return module


def run_cell(module, tag, **results):
    """Run the code cell with a tag on results; return all names, as attributes."""
    names = types.SimpleNamespace(**{**vars(module), **results})
    exec(compile(cell_tagged(tag), f"<cell {tag}>", "exec"), vars(names))
    return names


TWO_DEVICES = """
import conftest
import tensorflow as tf
cpu = tf.config.list_physical_devices("CPU")[0]
two = [tf.config.LogicalDeviceConfiguration()] * 2
tf.config.set_logical_device_configuration(cpu, two)
nb = conftest.load()
"""


def run_on_two_devices(script):
    """Run a script, with the definitions as `nb`, on two logical CPUs."""
    done = subprocess.run(
        [sys.executable, "-c", TWO_DEVICES + script],
        cwd=Path(__file__).parent,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "-1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="session")
def nb():
    """Return the notebook's definitions."""
    return load()


@pytest.fixture(scope="session")
def data(nb):
    """Return the small stand-in for MNIST."""
    return nb.load_dataset("digits")


@pytest.fixture
def model(nb):
    """Return a small untrained network."""
    return nb.build_mlp((12, 8), seed=0)


@pytest.fixture(autouse=True)
def forgotten():
    """Collect the garbage of a test, and do not look at what stays again.

    Each copy of a model collects garbage, which takes seconds among many objects.
    """
    yield
    gc.collect()
    gc.freeze()


@pytest.fixture
def figures(monkeypatch):
    """Let `plt.show` keep the figures; close all before and afterwards."""
    plt.close("all")
    monkeypatch.setattr(plt, "show", lambda: None)
    yield
    plt.close("all")
