"""A lone copy of the notebook runs to its end without any network."""

import os
import re
import shutil
import subprocess
import sys

import nbformat
import pytest
from update_images import NOTEBOOK


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder in which a lone copy was executed offline."""
    folder = tmp_path_factory.mktemp("alone")
    home = tmp_path_factory.mktemp("keras")
    shutil.copy(NOTEBOOK, folder)
    environment = {**os.environ, "PRUNING_OFFLINE": "1"}
    environment["KERAS_HOME"] = str(home)
    environment.pop("PRUNING_DATA_DIR", None)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "nbconvert", "--log-level=ERROR"),
            *("--to", "notebook", "--execute", "--inplace", NOTEBOOK.name),
        ],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        pytest.fail(done.stderr[-3000:], pytrace=False)
    assert not (home / "datasets").exists(), "nothing is downloaded offline"
    return folder


@pytest.fixture(scope="module")
def outputs(folder):
    """Return all outputs of the executed copy."""
    cells = nbformat.read(folder / NOTEBOOK.name, as_version=4).cells
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
    assert any(
        line.startswith("not checked on a stand-in: ") for line in lines
    )
    assert not [x for x in lines if x.startswith("checked: ") and "MNIST" in x]


def test_the_stand_in_is_named_wherever_mnist_is(lines):
    naming = [line for line in lines if "MNIST" in line]
    assert naming and all("stand-in" in line for line in naming)


def test_nothing_is_left_behind(folder):
    assert [path.name for path in folder.iterdir()] == [NOTEBOOK.name]
