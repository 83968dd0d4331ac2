"""A lone copy of the notebook runs without any network, also in part."""

import contextlib
import os
import re
import shutil
import signal
import threading

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from update_images import NOTEBOOK

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder that holds nothing but a copy of the notebook."""
    folder = tmp_path_factory.mktemp("alone")
    shutil.copy(NOTEBOOK, folder)
    return folder


@pytest.fixture(scope="module")
def offline(folder, tmp_path_factory):
    """Return a context manager: a new client whose kernel is offline."""
    home = tmp_path_factory.mktemp("keras")
    environment = {**os.environ, "PRUNING_OFFLINE": "1"}
    environment["KERAS_HOME"] = str(home)
    environment.pop("PRUNING_DATA_DIR", None)

    @contextlib.contextmanager
    def new_client():
        book = nbformat.read(folder / NOTEBOOK.name, as_version=4)
        path = {"metadata": {"path": str(folder)}}
        client = NotebookClient(book, timeout=None, resources=path)
        with client.setup_kernel(env=environment):
            yield client
        assert not (home / "datasets").exists(), "nothing is downloaded"

    return new_client


@pytest.fixture(scope="module")
def client(offline):
    """Return a client with a kernel that has executed the copy offline."""
    with offline() as client:
        for index, cell in enumerate(client.nb.cells):
            client.execute_cell(cell, index)
        yield client


@pytest.fixture(scope="module")
def outputs(client):
    """Return all outputs of the executed copy."""
    cells = client.nb.cells
    return [output for cell in cells for output in cell.get("outputs", [])]


@pytest.fixture(scope="module")
def lines(outputs):
    """Return the lines of text and the rows of tables in these outputs."""
    found = []
    for output in outputs:
        data = output.get("data", {})
        rows = re.findall("<tr.*?</tr>", data.get("text/html", ""), re.DOTALL)
        text = output.get("text", data.get("text/plain", ""))
        found += rows or text.splitlines()
    return found


def test_no_errors_and_no_stderr(outputs):
    assert not [o for o in outputs if o.output_type == "error"]
    assert not [o.text for o in outputs if o.get("name") == "stderr"]


def test_claims_about_the_real_data_are_not_judged(lines):
    unjudged = [x for x in lines if x.startswith("not checked without the real data")]
    assert len(unjudged) >= 25
    assert not [x for x in lines if x.startswith("checked: ") and "MNIST" in x]


def test_the_stand_in_is_named_wherever_mnist_is(lines):
    naming = [line for line in lines if "MNIST" in line]
    named = "stand-in", "not checked without the real data"
    assert naming and all(any(n in line for n in named) for line in naming)


def test_nothing_is_left_behind(client, folder):
    assert [path.name for path in folder.iterdir()] == [NOTEBOOK.name]


def part(client, number):
    """Return [(index, cell)] of a part of the notebook."""
    found, current = [], 0
    for index, cell in enumerate(client.nb.cells):
        if head := re.search(r"^## (\d+)\.", cell.source, re.MULTILINE):
            current = int(head[1])
        if cell.cell_type == "code" and current == number:
            found.append((index, cell))
    return found


def texts(cells):
    """Return the lines and the tables, but not the pictures, of cells."""
    outputs = [output for _, cell in cells for output in cell.outputs]
    tables = [o["data"].get("text/html", "") for o in outputs if "data" in o]
    lines = "".join(o["text"] for o in outputs if "text" in o)
    return lines, tables


@pytest.mark.parametrize("number", [6, 11])
def test_a_part_that_runs_again_says_the_same(client, number):
    cells = part(client, number)
    before = texts(cells)
    for index, cell in cells:
        client.execute_cell(cell, index)
    assert all(before) and texts(cells) == before


def test_a_training_that_was_interrupted_can_be_run_again(client, offline):
    expected = texts(part(client, 3))
    with offline() as other:
        cells = part(other, 3)
        for index, cell in part(other, 1) + part(other, 2) + cells:
            if "networks = {" in cell.source:
                interrupt = os.kill, (other.km.provisioner.pid, signal.SIGINT)
                threading.Timer(2, *interrupt).start()
                with pytest.raises(CellExecutionError, match="Interrupt"):
                    other.execute_cell(cell, index)
            other.execute_cell(cell, index)
    assert texts(cells) == expected
