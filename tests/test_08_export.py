"""What a user would say of `pruning.py`: it is one file, and all that I need.

"The notebook writes it, I put it beside my code and import it. It has the notebook's
functions and nothing of its experiments, and `help` tells me how to call them."
"""

import ast
import contextlib
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import nbformat
import pytest
from conftest import NOTEBOOK, cell_with, code_cells
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

TESTS = Path(__file__).parent
FUNCTIONS = "weight_mask unit_mask prune measured_sparsity shrink polynomial_sparsity"
FUNCTIONS = [*FUNCTIONS.split(), "constant_sparsity", "block_mask", "n_m_mask"]
FUNCTIONS.append("repair")
CLASSES = ["Units", "Pruner", "KeepZeros", "Globally"]
WRITING = '(folder / "pruning.py").write_text('
ALONE = """
import sys
for absent in ("IPython", "ipykernel", "matplotlib", "sklearn", "get_ipython"):
    sys.modules[absent] = None  # an import of it fails
import pruning
"""
RANDOM = """
import numpy as np

from keras import Input, Model, Sequential, layers


def random_weights(model):
    random = np.random.default_rng(0)
    for weight in model.weights:
        weight.assign(random.uniform(0.1, 1, weight.shape) * random.choice((-1, 1)))
    return model
"""
MODELS = """
def cnn():
    own = layers.Conv2D(8, 3, padding="same"), layers.BatchNormalization()
    own += layers.ReLU(), layers.MaxPooling2D(), layers.Conv2D(6, 3, activation="relu")
    ends = layers.Flatten(), layers.Dense(10, "relu"), layers.Dense(3)
    return Sequential([Input((8, 8, 2)), *own, *ends])


def residual():
    x = inputs = Input((8, 8, 2))
    x = layers.Conv2D(8, 3, activation="relu")(x)
    y = layers.BatchNormalization()(layers.Conv2D(8, 3, padding="same")(x))
    x = layers.GlobalAveragePooling2D()(layers.ReLU()(layers.Add()([x, y])))
    return Model(inputs, layers.Dense(3)(x))


images = np.random.default_rng(1).normal(size=(16, 8, 8, 2)).astype("float32")
for model, left in ((cnn(), (4, 3, 5)), (residual(), (4, 4))):
    pruned = pruning.prune(random_weights(model), "unit", 0.5)
    small = pruning.shrink(pruned)
    kernels = [weight for weight in small.weights if weight.name == "kernel"]
    assert tuple(kernel.shape[-1] for kernel in kernels[:-1]) == left
    expected = np.array(pruned(images))
    assert expected.any(), "there is something to compare"
    assert np.abs(small(images) - expected).max() <= 1e-5 * np.abs(expected).max()
"""
REPAIR = """
import re

ends = Input((4,)), layers.Dense(5, "relu"), layers.Dense(1)
model = random_weights(Sequential(ends))
x = np.random.default_rng(1).normal(size=(999, 4)).cumsum(axis=1)  # they rise together
pruned = pruning.prune(model, "weight", 0.5)
before, dense = pruned.get_weights(), model.get_weights()
repaired = pruning.repair(pruned, model, x, steps=100, damping=0).get_weights()
for unit, start in enumerate(before[0].T):
    keep = np.append(start != 0, start.any())  # the bias is free if there are weights
    wanted = x @ dense[0][:, unit] + dense[1][unit]
    best = np.linalg.lstsq(np.hstack([x, np.ones((999, 1))])[:, keep], wanted)[0]
    found = np.append(repaired[0][:, unit], repaired[1][unit])
    assert np.allclose(found[keep], best, atol=1e-3) and not found[~keep].any()
assert not np.allclose(repaired[0], before[0], atol=0.1), "there is something to repair"
(example,) = re.findall("Example: `(.*)`", pruning.repair.__doc__)
names = {**vars(pruning), "model": model, "images": x}
exec(example, names)
assert (names["repaired"].get_weights()[0] == 0).all(axis=0).sum() == round(0.5 * 5)
"""
# Tests of the notebook's functions, which the module has to pass as well.
SHARED = """
del sys.modules["matplotlib"]  # the tests draw
sys.path.append(TESTS)
import test_03_training as training

golden = pruning.polynomial_sparsity(0.8, begin=10, end=30, initial=0.2)
training.test_a_polynomial_schedule_has_the_golden_values(golden)
training.test_sparsity_follows_the_schedule_after_every_step(
    pruning.Pruner("weight", golden, frequency=5), "Adam"
)
training.test_a_constraint_of_the_users_is_applied_and_stays(pruning, golden)
training.test_units_go_with_all_that_is_theirs_and_stay_away(pruning, "average")
training.test_only_the_kernels_named_are_pruned(pruning)
training.test_of_equal_weights_the_first_is_removed(pruning)
training.test_a_small_block_at_the_edge_counts_by_its_own_mean(pruning)
training.test_a_rule_may_be_called_by_its_name(pruning)
training.test_a_training_that_stops_early_ends_at_the_final_sparsity(
    pruning, golden, 12, "Adam", "unit"
)
for kind in training.KINDS:
    training.test_every_rule_works_in_prune(pruning, kind)
assert "notebook_definitions" not in sys.modules
"""
EXAMPLE = """
import textwrap

import keras
import numpy as np

x, y = np.ones((6400, 4), "float32"), np.ones((6400, 1), "float32")
ends = keras.Input((4,)), keras.layers.Dense(6, "relu"), keras.layers.Dense(1)
model = keras.Sequential(ends)
model.compile("sgd", "mse")
example = pruning.__doc__.partition("Example:")[2]
steps = textwrap.dedent(example).splitlines()
assert len([step for step in steps if "pruning." in step]) >= 3
exec("\\n".join(steps), {"model": model, "x": x, "y": y})
saved = keras.models.load_model("small.keras")
assert [layer.units for layer in saved.layers] == [3, 1]
assert np.allclose(saved(x[:1]), model(x[:1]), atol=1e-5)
"""


def cell_of(function):
    """Return the one code cell of the notebook file that defines a function."""
    name, _, method = function.__qualname__.partition(".")
    return cell_with(f"\nclass {name}" if method else f"\ndef {name}(")


@pytest.fixture(scope="module")
def source(nb):
    """Return the module that is made of the cells in the notebook file."""
    return nb.module_of(map(cell_of, nb.parts()))


@pytest.fixture(scope="module")
def tree(source):
    """Return the syntax tree of the module."""
    return ast.parse(source)


@pytest.fixture
def alone(source, tmp_path):
    """Return a function that runs a script beside the module, without the notebook."""
    (tmp_path / "pruning.py").write_text(source, encoding="utf-8")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PRUNING", "PY"))}

    def run(script):
        done = subprocess.run(
            [sys.executable, "-c", ALONE + script],
            cwd=tmp_path,
            env={**kept, "CUDA_VISIBLE_DEVICES": "-1"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    return run


def documented(nodes):
    """Return {name: docstring} of the functions and classes among nodes."""
    kinds = ast.FunctionDef | ast.ClassDef
    own = [node for node in nodes if isinstance(node, kinds)]
    return {node.name: ast.get_docstring(node) or "" for node in own}


def test_it_has_what_the_notebook_has_to_offer(tree, nb):
    defined = [n.name for n in tree.body if isinstance(n, ast.FunctionDef)]
    classes = [n.name for n in tree.body if isinstance(n, ast.ClassDef)]
    assert {*FUNCTIONS} <= {*defined} and {*CLASSES} <= {*classes}
    every = defined + classes
    assert len(every) == len({*every}), "nothing is defined twice"
    assert all(hasattr(nb, name) for name in every)


def test_it_has_nothing_of_the_experiments(tree):
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    experiments = "datasets networks mnist fashion build_mlp train evaluate check plt"
    assert not names & {*experiments.split(), "SEEDS", "LOSS", "tf", "get_ipython"}


def test_it_runs_nothing_when_it_is_imported(alone, tmp_path):
    assert alone("") == ""
    left = {path.name for path in tmp_path.iterdir()} - {"__pycache__"}
    assert left == {"pruning.py"}


def test_every_name_in_it_is_defined_and_used_and_every_line_fits(source):
    ruff = [sys.executable, "-m", "ruff", "check", "--isolated", "--line-length=88"]
    rules = ["--select=F,E,W", "--ignore=E402", "--stdin-filename=pruning.py", "-"]
    done = subprocess.run(ruff + rules, input=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_it_names_no_place_on_a_machine(source, tree):
    here = str(Path.home()), str(NOTEBOOK.parent), tempfile.gettempdir(), os.getcwd()
    assert not [place for place in here if place != "/" and place in source]
    texts = [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant)]
    texts = "\n".join(text for text in texts if isinstance(text, str))
    assert not re.search(r"(^|[\s\"'(=])(/\w|~/|[A-Z]:\\)", texts)
    assert "MIT License" in source


def test_everything_in_it_has_a_docstring(tree):
    assert ast.get_docstring(tree)
    texts = documented(ast.walk(tree))
    assert not [name for name in texts if not texts[name] and name != "__init__"]


@pytest.mark.parametrize("name", FUNCTIONS + CLASSES)
def test_help_tells_how_to_call_it(tree, name):
    text = documented(tree.body)[name]
    assert re.search(r"^Args(, \w+)*:", text, re.MULTILINE)
    if name in FUNCTIONS:
        assert text.startswith("Return ")
        assert re.search(r"^(\w+, )*Raises(, \w+)*:", text, re.MULTILINE)


def test_networks_are_pruned_and_shrunk_by_it(alone):
    alone(RANDOM + MODELS)


def test_networks_are_repaired_by_it(alone):
    alone(RANDOM + REPAIR)


def test_the_example_at_its_top_runs(alone):
    alone(EXAMPLE)


def test_it_passes_tests_of_the_notebooks_functions(alone):
    alone(SHARED.replace("TESTS", repr(str(TESTS))))


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    """Return a client that has run the cells of tools, and the folder it works in."""
    folder = tmp_path_factory.mktemp("working")
    cells = [cell for cell in code_cells(NOTEBOOK) if "# @title Tools:" in cell]
    cells = [code_cells(NOTEBOOK)[0], *cells, cell_with(WRITING)]
    book = nbformat.v4.new_notebook(cells=[*map(nbformat.v4.new_code_cell, cells)])
    client = NotebookClient(
        book, timeout=600, resources={"metadata": {"path": str(folder)}}
    )
    env = {**os.environ, "PRUNING_OFFLINE": "1"}
    env.pop("PRUNING_EXPORT", None)
    with client.setup_kernel(env=env):
        for index, cell in enumerate(book.cells[:-1]):
            with contextlib.suppress(CellExecutionError):  # some need results
                client.execute_cell(cell, index)
        yield client, folder


def written(client, place):
    """Let a kernel run the cell that writes, and return what it printed."""
    export = "os.environ.pop('PRUNING_EXPORT', None)"
    if place:
        export = f"os.environ['PRUNING_EXPORT'] = {str(place)!r}"
    before = nbformat.v4.new_code_cell(f"import os\n{export}")
    client.nb.cells.append(before)
    client.execute_cell(before, len(client.nb.cells) - 1)
    last = nbformat.v4.new_code_cell(cell_with(WRITING))
    client.nb.cells.append(last)
    return client.execute_cell(last, len(client.nb.cells) - 1).outputs[0].text


def test_the_notebook_writes_it_where_it_is_told(kernel, source, tmp_path):
    client, folder = kernel
    text = written(client, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["pruning.py"]
    assert (tmp_path / "pruning.py").read_text(encoding="utf-8") == source
    assert str(len(source.splitlines())) in text
    assert not (folder / "pruning.py").exists()


def test_otherwise_the_notebook_writes_it_where_it_works(kernel, source):
    client, folder = kernel
    written(client, None)
    assert (folder / "pruning.py").read_text(encoding="utf-8") == source
    assert [path.name for path in folder.iterdir()] == ["pruning.py"]


def test_a_cell_that_was_changed_and_run_again_counts(kernel, tmp_path):
    client, _ = kernel
    cell = cell_with("\nclass KeepZeros")
    for changed in (cell + "\n\nMINE = 1\n", cell):
        own = nbformat.v4.new_code_cell(changed)
        client.nb.cells.append(own)
        client.execute_cell(own, len(client.nb.cells) - 1)
        written(client, tmp_path)
        text = (tmp_path / "pruning.py").read_text(encoding="utf-8")
        assert ("MINE = 1" in text) == (changed is not cell)
