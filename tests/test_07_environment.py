"""It installs as it says, and the data are those that I think they are."""

import ast
import hashlib
import http.client
import importlib.metadata
import io
import os
import re
import subprocess
import sys
import zlib
from unittest import mock

import numpy as np
import pytest
import yaml
from conftest import NOTEBOOK, code_cells
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from update_images import ROOT

TESTS = sorted((ROOT / "tests").glob("*.py"))
PINS, COLAB = ROOT / "requirements.txt", ROOT / "tests" / "colab.txt"
BINDER = ROOT / "binder" / "requirements.txt"
PACKAGES = {"sklearn": "scikit-learn", "yaml": "pyyaml"}


# the environments agree, and hold all that is needed


def pins(path):
    """Return {package: version} of a file of exact pins."""
    lines = re.findall("^[^#\n]+", path.read_text(), re.MULTILINE)
    wanted = [*map(Requirement, lines)]
    exact = [re.fullmatch("==[^*,]+", str(r.specifier)) for r in wanted]
    found = {canonicalize_name(r.name): str(r.specifier)[2:] for r in wanted}
    assert all(exact) and len(found) == len(wanted), f"{path}: pin each exactly, once"
    return found


def imported(source):
    """Return the packages, outside the standard library, that a source imports."""
    nodes = [*ast.walk(ast.parse(source))]
    names = [a.name for n in nodes if isinstance(n, ast.Import) for a in n.names]
    names += [n.module for n in nodes if isinstance(n, ast.ImportFrom)]
    names = {name.partition(".")[0] for name in names} - sys.stdlib_module_names
    names -= {"pruning", "ai_edge_litert", "IPython", *(path.stem for path in TESTS)}
    return {PACKAGES.get(name, name) for name in names}


def python(*arguments, **options):
    """Run this Python in the repository; return its status and what it prints."""
    options = {"cwd": ROOT, "stdout": -1, "stderr": -2, "text": True, **options}
    done = subprocess.run([sys.executable, *arguments], **options)
    return done.returncode, done.stdout


def test_the_pins_agree_are_installed_and_hold_what_is_imported():
    wanted, binder, colab = map(pins, (PINS, BINDER, COLAB))
    assert not {n for n in binder if n.startswith(("jupyter", "ipy"))}, "a second one"
    binder["tensorflow"] = binder.pop("tensorflow-cpu")
    assert binder.items() <= wanted.items()
    tools = COLAB.read_text().partition("# The tests' own tools")[2].split("\n")[1:]
    assert any(tools) and {*tools} <= {*PINS.read_text().split("\n")}
    needed = imported("\n".join(source for source, _ in code_cells(NOTEBOOK)))
    assert needed <= binder.keys() and needed <= wanted.keys(), needed
    assert needed - {"scipy"} <= colab.keys(), "scikit-learn brings SciPy"
    assert imported("\n".join(p.read_text() for p in TESTS)) <= wanted.keys()
    wanted = pins(ROOT / os.environ.get("PRUNING_PINS", PINS.name))
    found = {name: importlib.metadata.version(name) for name in wanted}
    assert found == wanted, "install the pins, or name others: PRUNING_PINS"


def test_conda_binder_and_ci_install_the_pins():
    conda = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    assert conda == ["python=3.12", "pip", {"pip": [f"-r {PINS.name}"]}]
    runtime = (ROOT / "binder" / "runtime.txt").read_text()
    assert re.fullmatch(r"python-3\.1[123]\n", runtime), "no patch level"
    for path in (ROOT / "README.md", ROOT / ".ci" / "run"):
        lines = path.read_text().splitlines()
        assert "pip install -r requirements.txt && pytest" in lines, path
    for script in (ROOT / ".ci" / "run", ROOT / "binder" / "start"):
        assert os.access(script, os.X_OK)


def test_binder_starts_with_an_allocator_that_gives_memory_back():
    command = [ROOT / "binder" / "start", "env"]
    started = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "TF_ONEDNN_USE_SYSTEM_ALLOCATOR=1" in started.stdout.splitlines()


def test_repo2docker_picks_pip_and_python_3_12():
    no_build = "--no-build", "--debug", "--Repo2Docker.default_buildpack=None"
    status, printed = python("-m", "repo2docker", *no_build, ".")
    assert not status and "environment for python=3.12" in printed, printed
    assert '-r "binder/requirements.txt"' in printed and ".yml" not in printed


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]])
def test_ruff_finds_nothing(command):
    status, printed = python("-m", "ruff", *command, NOTEBOOK.name, "tests")
    assert not status, printed


# official data: from a folder or from Keras

GIVEN = os.environ.get("PRUNING_DATA_DIR")
REAL = {"mnist": "MNIST", "fashion_mnist": "Fashion-MNIST"}
STAND_INS = {"mnist": "digits", "fashion_mnist": "noisy_digits"}
OF_BOTH = pytest.mark.parametrize("name", REAL)


def digest_of(arrays):
    """Return the SHA-256 digest of arrays: dtypes and shapes, then contents."""
    kinds = [f"{array.dtype} {array.shape}".encode() for array in arrays]
    content = [np.ascontiguousarray(array).tobytes() for array in arrays]
    return hashlib.sha256(b"".join([*kinds, *content])).hexdigest()


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    """Start without settings, without a network; return the folder of a cache."""
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "keras"))
    monkeypatch.delenv("PRUNING_DATA_DIR", raising=False)
    monkeypatch.delenv("PRUNING_OFFLINE", raising=False)
    for name in REAL:
        set_loader(monkeypatch, name, AssertionError("asked Keras"))
    return tmp_path / "keras" / "datasets"


def set_loader(monkeypatch, name, answer):
    """Let Keras's loader of a data set return or raise `answer`."""
    fails = isinstance(answer, BaseException)
    pairs = None if fails else (tuple(answer[:2]), tuple(answer[2:]))
    load = mock.Mock(return_value=pairs, side_effect=answer if fails else None)
    monkeypatch.setattr(f"keras.datasets.{name}.load_data", load)


@pytest.fixture
def accepted(nb, monkeypatch):
    """Return made-up arrays that are the official ones now, of both data sets."""
    images = np.random.default_rng(0).integers(0, 256, (140, 28, 28), "uint8")
    labels = (np.arange(140) % 10).astype("uint8")
    arrays = [images[:120], labels[:120], images[120:], labels[120:]]
    monkeypatch.setattr(nb, "DIGESTS", dict.fromkeys(REAL, digest_of(arrays)))
    return arrays


@pytest.fixture
def folder(monkeypatch, tmp_path):
    """Return an empty folder that PRUNING_DATA_DIR names."""
    monkeypatch.setenv("PRUNING_DATA_DIR", str(tmp_path))
    return tmp_path


def packed(*arrays, save=np.savez_compressed):
    """Return the bytes of an .npz file."""
    file = io.BytesIO()
    save(file, **dict(zip(("x_train", "y_train", "x_test", "y_test"), arrays)))
    return file.getvalue()


def assert_holds(data, title, arrays, capsys):
    """Assert that data are arrays, a twelfth to validate, and that a line says so."""
    x, y, x_test, y_test = arrays
    n = len(x) - round(len(x) / 12)
    named = data.x_train, data.y_train, data.x_val, data.y_val, data.x_test, data.y_test
    expected = x[:n], y[:n], x[n:], y[n:], x_test, y_test
    for found, own, array in zip(named, data[1:7], expected, strict=True):
        assert found is own and np.array_equal(found, array) and len(found)
        assert found.dtype == (np.uint8 if found.ndim > 1 else int)
    assert re.fullmatch(rf"{re.escape(title)}: .*\n", capsys.readouterr().out)
    assert data.title == title


@OF_BOTH
@pytest.mark.skipif(not GIVEN, reason="PRUNING_DATA_DIR is not set")
def test_the_official_files_are_accepted(nb, monkeypatch, capsys, name):
    monkeypatch.setenv("PRUNING_DATA_DIR", GIVEN)
    with np.load(os.path.join(GIVEN, f"{name}.npz")) as file:
        arrays = [file[f"{x}_{part}"] for part in ("train", "test") for x in "xy"]
    assert_holds(data := nb.load_dataset(name), REAL[name], arrays, capsys)
    assert [len(part) for part in data[1:7]] == [55000, 55000, 5000, 5000, 10000, 10000]


@OF_BOTH
@pytest.mark.parametrize("source", ["a folder", None, "", "0", "False", "no"])
def test_a_folder_is_read_or_keras_is_asked(
    nb, monkeypatch, folder, accepted, capsys, name, source
):
    if source == "a folder":
        (folder / f"{name}.npz").write_bytes(packed(*accepted))
    else:
        set_loader(monkeypatch, name, accepted)
        monkeypatch.delenv("PRUNING_DATA_DIR")
        monkeypatch.setenv("PRUNING_OFFLINE", source) if source is not None else None
    assert_holds(data := nb.load_dataset(name), REAL[name], accepted, capsys)
    for array, own in zip(nb.official_arrays(name), accepted, strict=True):
        assert array.dtype == np.uint8 and np.array_equal(array, own)
    ends = ("0", "9") if name == "mnist" else ("T-shirt", "Boot")
    assert data.class_names[::9] == ends and len({*data.class_names}) == 10
    with pytest.raises(AttributeError):
        data.title = "another"


# faulty data: never taken for official ones, nor for a failed download

FEW = [np.zeros((3, 28, 28), "uint8"), np.zeros(3, "uint8")] * 2
SEEN = np.random.default_rng(0).integers(0, 30, (500, 28, 28), "uint8")
GOOD, PLAIN = packed(SEEN, *FEW[1:]), packed(SEEN, *FEW[1:], save=np.savez)
MAKES = type("MakesFolder", (), {"__reduce__": lambda own: (os.mkdir, ("made",))})
WORDS = {"too few": "not the official", "flat": "official .* \\(500, 784"}
WORDS["huge"] = "official .* more than 100 MB"
FAULTS = {
    "empty": b"",
    "a page": b"<html>not found</html>",
    "one array": packed(SEEN, save=lambda file, x_train: np.save(file, x_train)),
    "one byte short": GOOD[:-1],
    "flipped": PLAIN[:1000] + b"x" * 10 + PLAIN[1010:],
    "garbled": GOOD[:200] + bytes(40) + GOOD[240:],
    "pickled": packed(np.array([MAKES()], object), *FEW[1:]),
    "without a key": packed(*FEW[:3]),
    "too few": packed(*FEW),
    "flat": packed(SEEN.reshape(500, 784), *FEW[1:]),
    "huge": packed(np.zeros(10**8, "uint8"), *FEW[1:]),
}


@OF_BOTH
@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_file_is_named(nb, folder, capsys, monkeypatch, fault, name):
    path, words = folder / f"{name}.npz", WORDS.get(fault, "damaged")
    path.write_bytes(FAULTS[fault])
    monkeypatch.chdir(folder)
    if fault == "huge":  # it is not even read
        monkeypatch.setattr(np.lib.npyio.NpzFile, "__getitem__", None)
    with pytest.raises(ValueError, match=words) as error:
        nb.load_dataset(name)
    assert str(path) in str(error.value) and not capsys.readouterr().out
    assert error.value.__suppress_context__ == (words == "damaged"), "and no pickles"
    assert [*folder.iterdir()] == [path], "code in the file was run"


def test_a_file_that_is_not_there_or_cannot_be_read_is_named(nb, folder, monkeypatch):
    path = folder / "mnist.npz"
    with pytest.raises(FileNotFoundError, match=re.escape(str(path))):
        nb.load_dataset("mnist")
    path.mkdir()
    with pytest.raises(OSError, match=re.escape(str(path))):
        nb.load_dataset("mnist")
    for kind in (PermissionError, TimeoutError, ConnectionError):
        monkeypatch.setattr(np, "load", mock.Mock(side_effect=kind(13, "no", path)))
        with pytest.raises(kind, match=re.escape(str(path))):
            nb.load_dataset("mnist")


CHANGES = {
    "flat": lambda arrays: [a.reshape(len(a), -1) for a in arrays],
    "signed": lambda arrays: [a.view("int8") for a in arrays],
    "floats": lambda arrays: [arrays[0].astype("float32"), *arrays[1:]],
    "wide labels": lambda arrays: [*arrays[:3], arrays[3].astype("int64")],
}


@pytest.mark.parametrize("change", [*CHANGES, 0, 1, 2, 3])
def test_other_arrays_are_not_official(nb, monkeypatch, folder, accepted, change):
    arrays = [array.copy() for array in accepted]
    if change in CHANGES:
        arrays = CHANGES[change](accepted)
    else:
        arrays[change].flat[-1] ^= 1
    monkeypatch.setitem(nb.DIGESTS, "another", digest_of(arrays))
    (folder / "mnist.npz").write_bytes(packed(*arrays))
    kind = re.escape(f"{arrays[0].dtype} {arrays[0].shape}")
    words = f"mnist.npz is not the official MNIST: {kind}"
    with pytest.raises(ValueError, match=words):
        nb.load_dataset("mnist")
    monkeypatch.delenv("PRUNING_DATA_DIR")
    set_loader(monkeypatch, "fashion_mnist", arrays)
    words = f"Keras's fashion_mnist is not the official Fashion-MNIST: {kind}"
    with pytest.raises(ValueError, match=words):
        nb.load_dataset("fashion_mnist")


# without a network: a declared stand-in

FAILURES = [
    Exception("URL fetch failure on https://example.org/a.npz: 403 -- no"),
    ConnectionResetError("reset by peer"),
    TimeoutError("timed out"),
    http.client.IncompleteRead(b"half"),
]
DAMAGE = [EOFError("early"), OSError("Not gzipped"), zlib.error("Error -3")]
DAMAGE += [ValueError("Incomplete or corrupted file"), PermissionError(13, "no entry")]


@OF_BOTH
@pytest.mark.parametrize("failure", [*FAILURES, *DAMAGE], ids=repr)
def test_a_failed_download_is_no_damage(nb, monkeypatch, capsys, cache, failure, name):
    set_loader(monkeypatch, name, failure)
    if failure in FAILURES:
        assert nb.official_arrays(name) is None
        data, other = nb.load_dataset(name), STAND_INS[name]
        assert_holds(data, nb.TITLES[other], nb.stand_in(other), capsys)
        cache.mkdir(parents=True)  # a file is there, and Keras cannot replace it
        (cache / f"{name}.npz").write_text("<html>not found</html>")
    refused = isinstance(failure, PermissionError)
    words = "no entry" if refused else f"Keras's {name} is damaged, replace it"
    with pytest.raises(PermissionError if refused else ValueError, match=words):
        nb.load_dataset(name)


@pytest.mark.slow
def test_keras_cannot_replace_a_damaged_file_without_a_network(cache):
    cache.mkdir(parents=True)
    (cache / "mnist.npz").write_text("<html>not found</html>")
    script = "import conftest; conftest.load().load_dataset('mnist')"
    own = os.environ | {"https_proxy": "http://127.0.0.1:9", "no_proxy": ""}
    _, printed = python("-c", script, cwd=ROOT / "tests", env=own)
    assert printed.strip().endswith("Keras's mnist is damaged, replace it")


@OF_BOTH
@pytest.mark.parametrize("said, folder", [("1", ""), ("true", "/no"), ("", "/no")])
def test_a_stand_in_is_declared(nb, monkeypatch, capsys, name, said, folder):
    monkeypatch.setenv("PRUNING_DATA_DIR", folder)
    monkeypatch.setenv("PRUNING_OFFLINE", said)
    other = STAND_INS[name]
    data = nb.load_dataset(name if said else other)  # one can also ask for it
    assert_holds(data, nb.TITLES[other], nb.stand_in(other), capsys)
    assert f"stand-in for {REAL[name]}" in data.title
    assert data.class_names == tuple("0123456789")


def test_stand_ins_look_like_the_real_data_and_differ_in_their_images_only(nb):
    digits, noisy = nb.stand_in("digits"), nb.stand_in("noisy_digits")
    assert all(map(np.array_equal, noisy, nb.stand_in("noisy_digits"))), "always"
    assert len(digits[0]) + len(digits[2]) == 1797
    for images, labels in (digits[:2], digits[2:], noisy[:2], noisy[2:]):
        assert images.shape == (len(labels), 28, 28) and images.dtype == np.uint8
        assert images.max() == 255 and {*labels} == {*range(10)}
    for part in (0, 2):
        assert (noisy[part] != digits[part]).any(axis=(1, 2)).all()
        assert np.array_equal(noisy[part + 1], digits[part + 1])
    small, shown = nb.load_digits().images[0], np.zeros((28, 28))  # enlarged in place
    for row, column in np.ndindex(24, 24):
        shown[2 + row, 2 + column] = small[row // 3, column // 3]
    assert np.array_equal(digits[0][0], (shown * 255 / 16).astype("uint8"))


@pytest.mark.parametrize("name", ["cifar10", "MNIST", "", "fashion"])
def test_an_unknown_name_is_an_error(nb, monkeypatch, name):
    for offline in ("0", "1"):
        monkeypatch.setenv("PRUNING_OFFLINE", offline)
        with pytest.raises(ValueError, match=f"unknown data set {name!r}"):
            nb.load_dataset(name)
