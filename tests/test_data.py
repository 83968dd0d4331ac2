"""Data: what is official, what is a stand-in, and what is an error."""

import gzip
import hashlib
import http.client
import os
import subprocess
import sys
import zlib

import keras
import numpy as np
import pytest

NAMES = ("mnist", "fashion_mnist")
KEYS = ("x_train", "y_train", "x_test", "y_test")
GIVEN = os.environ.get("PRUNING_DATA_DIR")


def digest_of(arrays):
    """Return the SHA-256 digest of arrays: dtypes and shapes, then contents."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype} {array.shape}".encode())
    for array in arrays:
        digest.update(array.tobytes())
    return digest.hexdigest()


@pytest.fixture(autouse=True)
def quiet_surroundings(monkeypatch, tmp_path):
    """Start without settings, with an empty cache, and without a network to reach."""
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("PRUNING_DATA_DIR", raising=False)
    monkeypatch.delenv("PRUNING_OFFLINE", raising=False)
    for name in NAMES:
        set_loader(monkeypatch, name, AssertionError("asked Keras"))


def set_loader(monkeypatch, name, answer):
    """Let Keras's loader of a data set return or raise `answer`."""

    def load_data():
        if isinstance(answer, BaseException):
            raise answer
        x_train, y_train, x_test, y_test = answer
        return (x_train, y_train), (x_test, y_test)

    monkeypatch.setattr(getattr(keras.datasets, name), "load_data", load_data)


@pytest.fixture(scope="module")
def made_up():
    """Return four arrays that look like the official ones."""
    images = np.arange(70000, dtype="uint8")[:, None, None]
    images = np.broadcast_to(images, (70000, 28, 28))
    labels = (np.arange(70000) % 10).astype("uint8")
    return [images[:60000], labels[:60000], images[60000:], labels[60000:]]


@pytest.fixture
def accepted(nb, monkeypatch, made_up):
    """Make the made-up arrays the official ones, of both data sets."""
    monkeypatch.setattr(nb, "DIGESTS", dict.fromkeys(NAMES, digest_of(made_up)))
    return made_up


@pytest.fixture
def folder(monkeypatch, tmp_path):
    """Name a folder, still empty, in PRUNING_DATA_DIR."""
    monkeypatch.setenv("PRUNING_DATA_DIR", str(tmp_path))
    return tmp_path


def write(path, arrays, keys=KEYS, save=np.savez_compressed):
    """Write arrays to an .npz file."""
    save(path, **dict(zip(keys, arrays)))


def small():
    """Return four little arrays of the right dtype."""
    return [np.zeros((3, 28, 28), "uint8"), np.zeros(3, "uint8")] * 2


def assert_holds(data, title, arrays):
    """Assert that a data set holds the arrays, split, with integer labels.

    The last twelfth of the training rows is for validation.
    """
    x_train, y_train, x_test, y_test = arrays
    n = len(x_train) - round(len(x_train) / 12)
    parts = {
        "train": (x_train[:n], y_train[:n]),
        "val": (x_train[n:], y_train[n:]),
        "test": (x_test, y_test),
    }
    assert data.title == title and len(data.class_names) == 10
    for part, (images, labels) in parts.items():
        x, y = getattr(data, f"x_{part}"), getattr(data, f"y_{part}")
        assert np.array_equal(x, images) and np.array_equal(y, labels)
        assert x.dtype == np.uint8 and y.dtype == int
    assert len(data.x_val) > 0


def assert_declared(output, data):
    """Assert that one line was printed, which names the data set."""
    assert output.startswith(f"{data.title}: ") and output.count("\n") == 1


# a folder


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.skipif(not GIVEN, reason="PRUNING_DATA_DIR is not set")
def test_the_official_files_are_accepted(nb, monkeypatch, capsys, name):
    monkeypatch.setenv("PRUNING_DATA_DIR", GIVEN)
    data = nb.load_dataset(name)
    assert_declared(capsys.readouterr().out, data)
    assert data.title == {"mnist": "MNIST"}.get(name, "Fashion-MNIST")
    for part, count in (("train", 55000), ("val", 5000), ("test", 10000)):
        x, y = getattr(data, f"x_{part}"), getattr(data, f"y_{part}")
        assert x.shape == (count, 28, 28) and y.shape == (count,)
        assert x.dtype == np.uint8 and x.max() == 255
        assert y.dtype == int and set(y) == set(range(10))


def test_the_class_names_are_the_official_ones(nb, accepted, monkeypatch):
    names = []
    for name in NAMES:
        set_loader(monkeypatch, name, accepted)
        names.append(nb.load_dataset(name).class_names)
    digits, clothes = names
    assert clothes[0] == "T-shirt" and clothes[9] == "Boot"
    assert len(set(clothes)) == 10 and digits == tuple("0123456789")


def test_a_folder_with_official_arrays_is_read(nb, folder, accepted, capsys):
    write(folder / "mnist.npz", accepted)
    data = nb.load_dataset("mnist")
    assert_holds(data, "MNIST", accepted)
    assert_declared(capsys.readouterr().out, data)


@pytest.mark.parametrize("name", NAMES)
def test_official_arrays_are_as_they_were_read(nb, folder, accepted, name):
    write(folder / f"{name}.npz", accepted)
    found = nb.official_arrays(name)
    for array, expected in zip(found, accepted, strict=True):
        assert array.dtype == np.uint8 and np.array_equal(array, expected)


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_folder_is_an_error(nb, monkeypatch, tmp_path, name):
    monkeypatch.setenv("PRUNING_DATA_DIR", str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError) as error:
        nb.load_dataset(name)
    assert str(tmp_path / "nowhere" / f"{name}.npz") in str(error.value)


def test_a_missing_file_is_an_error(nb, folder):
    write(folder / "mnist.npz", small())
    with pytest.raises(FileNotFoundError) as error:
        nb.load_dataset("fashion_mnist")
    assert str(folder / "fashion_mnist.npz") in str(error.value)


def empty(path):
    """Write nothing."""
    path.write_bytes(b"")


def text(path):
    """Write something else."""
    path.write_text("<html>not found</html>")


def truncated(path):
    """Write the first half of a good file."""
    write(path, small())
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def one_byte_short(path):
    """Write a good file without its last byte."""
    write(path, small())
    path.write_bytes(path.read_bytes()[:-1])


def flipped(path):
    """Write a good file, then change bytes in the middle of an array."""
    write(path, small(), save=np.savez)
    content = bytearray(path.read_bytes())
    content[1000:1010] = b"x" * 10
    path.write_bytes(content)


def pickled(path):
    """Write an array of Python objects."""
    objects = np.array([{"not": "a number"}, None], dtype=object)
    write(path, [objects, *small()[1:]])


def key_missing(path):
    """Leave out the test labels."""
    write(path, small()[:3])


def wrong_shape(path):
    """Write too few images."""
    write(path, small())


def flat_images(path):
    """Write images as rows of 784 pixels."""
    images, labels = np.zeros((60000, 784), "uint8"), np.zeros(60000, "uint8")
    write(path, [images, labels, images[:10000], labels[:10000]])


def garbled(path):
    """Write a good file, then change bytes of a compressed array."""
    images = np.random.default_rng(0).integers(0, 30, (1000, 28, 28), "uint8")
    np.savez_compressed(path, x_train=images)
    content = bytearray(path.read_bytes())
    content[200:240] = bytes(40)
    path.write_bytes(content)


def one_array(path):
    """Write a single array under the name of an archive."""
    with path.open("wb") as file:
        np.save(file, np.zeros(3))


FAULTS = (empty, text, truncated, one_byte_short, flipped, pickled)
FAULTS += (key_missing, wrong_shape, flat_images, garbled, one_array)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
@pytest.mark.parametrize("name", NAMES)
def test_a_faulty_file_is_named(nb, folder, capsys, fault, name):
    fault(folder / f"{name}.npz")
    with pytest.raises(ValueError) as error:
        nb.load_dataset(name)
    assert str(folder / f"{name}.npz") in str(error.value)
    assert not capsys.readouterr().out


class MakesFolder:
    """What is unpickled from one makes a folder."""

    def __init__(self, path):
        """Take the folder's path."""
        self.path = path

    def __reduce__(self):
        """Name the call that the unpickling makes."""
        return os.mkdir, (str(self.path),)


def test_code_in_a_file_is_not_run(nb, folder, tmp_path):
    made = tmp_path / "made"
    objects = np.array([MakesFolder(made)], dtype=object)
    write(folder / "mnist.npz", [objects, *small()[1:]])
    with pytest.raises(ValueError, match=r"mnist\.npz"):
        nb.load_dataset("mnist")
    assert not made.exists()


def test_a_folder_in_place_of_the_file_is_an_error(nb, folder):
    (folder / "mnist.npz").mkdir()
    with pytest.raises(OSError, match=r"mnist\.npz"):
        nb.load_dataset("mnist")


@pytest.mark.parametrize("error", [PermissionError, TimeoutError, ConnectionError])
def test_a_file_that_cannot_be_read_is_no_failed_download(
    nb, folder, monkeypatch, error
):
    def refuse(path, **options):
        raise error(13, "no", str(path))

    monkeypatch.setattr(np, "load", refuse)
    with pytest.raises(error, match=r"mnist\.npz"):
        nb.load_dataset("mnist")


def test_a_file_of_huge_arrays_is_not_read(nb, folder, monkeypatch):
    arrays = [np.zeros(2 * 10**8, "uint8"), *small()[1:]]
    write(folder / "mnist.npz", arrays)
    assert (folder / "mnist.npz").stat().st_size < 10**6
    monkeypatch.setattr(np.lib.npyio.NpzFile, "__getitem__", None)
    with pytest.raises(ValueError, match=r"mnist\.npz.* more than 100 MB"):
        nb.load_dataset("mnist")


def test_a_page_in_place_of_the_file_calls_for_no_pickles(nb, folder):
    text(folder / "mnist.npz")
    with pytest.raises(ValueError) as error:
        nb.load_dataset("mnist")
    assert "damaged" in str(error.value) and error.value.__suppress_context__


@pytest.mark.parametrize("position", range(4))
@pytest.mark.parametrize("dtype", ["float32", "int64", "int8"])
def test_a_wrong_dtype_is_named(nb, folder, accepted, position, dtype):
    arrays = list(accepted)
    arrays[position] = arrays[position][:1].astype(dtype)
    write(folder / "mnist.npz", arrays)
    with pytest.raises(ValueError, match=rf"mnist\.npz.*{dtype}"):
        nb.load_dataset("mnist")


RESHAPED = {
    "flat": lambda arrays: [a.reshape(len(a), -1) for a in arrays],
    "signed": lambda arrays: [a.view("int8") for a in arrays],
    "split elsewhere": lambda arrays: [
        np.concatenate(arrays[::2])[:10000],
        np.concatenate(arrays[1::2])[:60000],
        np.concatenate(arrays[::2])[10000:],
        np.concatenate(arrays[1::2])[60000:],
    ],
}


@pytest.mark.parametrize("name", RESHAPED)
def test_the_same_bytes_in_another_shape_or_dtype_are_an_error(
    nb, folder, accepted, name
):
    write(folder / "mnist.npz", RESHAPED[name](accepted))
    with pytest.raises(ValueError, match=r"mnist\.npz.* not the official MNIST"):
        nb.load_dataset("mnist")


@pytest.mark.parametrize("position", range(4))
def test_one_changed_value_is_an_error(nb, folder, accepted, position):
    arrays = [array.copy() for array in accepted]
    arrays[position][-1] += 200
    write(folder / "mnist.npz", arrays)
    with pytest.raises(ValueError, match="not the official MNIST") as error:
        nb.load_dataset("mnist")
    assert str(folder / "mnist.npz") in str(error.value)


def test_one_data_set_is_not_taken_for_the_other(nb, folder, monkeypatch, made_up):
    for name, arrays in zip(NAMES, (made_up, [a[::-1] for a in made_up])):
        monkeypatch.setitem(nb.DIGESTS, name, digest_of(arrays))
    for name in NAMES:
        write(folder / f"{name}.npz", made_up)
    assert_holds(nb.load_dataset("mnist"), "MNIST", made_up)
    with pytest.raises(ValueError, match="not the official Fashion-MNIST"):
        nb.load_dataset("fashion_mnist")


# Keras


@pytest.mark.parametrize("name", NAMES)
def test_kerass_copy_is_accepted(nb, monkeypatch, accepted, capsys, name):
    set_loader(monkeypatch, name, accepted)
    data = nb.load_dataset(name)
    assert_holds(data, nb.TITLES[name], accepted)
    assert_declared(capsys.readouterr().out, data)


NO_NETWORK = (
    Exception("URL fetch failure on https://example.org/a.npz: None -- down"),
    Exception("URL fetch failure on https://example.org/a.npz: 403 -- no"),
    ConnectionResetError("reset by peer"),
    TimeoutError("timed out"),
    http.client.IncompleteRead(b"half"),
)


@pytest.mark.parametrize("failure", NO_NETWORK, ids=repr)
@pytest.mark.parametrize("name", NAMES)
def test_without_a_network_a_declared_stand_in_is_used(
    nb, monkeypatch, capsys, failure, name
):
    set_loader(monkeypatch, name, failure)
    assert nb.official_arrays(name) is None
    data = nb.load_dataset(name)
    assert_stand_in_for(nb, data, name)
    assert_declared(capsys.readouterr().out, data)


DAMAGE = (
    EOFError("Compressed file ended before the end-of-stream marker"),
    gzip.BadGzipFile("Not a gzipped file"),
    zlib.error("Error -3 while decompressing data"),
    ValueError("Incomplete or corrupted file detected."),
)


@pytest.mark.parametrize("failure", DAMAGE, ids=repr)
@pytest.mark.parametrize("name", NAMES)
def test_a_damaged_cache_is_an_error(nb, monkeypatch, failure, name):
    set_loader(monkeypatch, name, failure)
    with pytest.raises(ValueError, match=f"{name} is damaged"):
        nb.load_dataset(name)


def test_a_cached_file_that_cannot_be_replaced_is_an_error(tmp_path):
    """Keras finds that its file is damaged, and cannot download it again."""
    (tmp_path / "datasets").mkdir()
    text(tmp_path / "datasets" / "mnist.npz")
    unset = ("PRUNING_DATA_DIR", "PRUNING_OFFLINE", "no_proxy", "NO_PROXY")
    own = {name: v for name, v in os.environ.items() if name not in unset}
    own |= {"KERAS_HOME": str(tmp_path), "https_proxy": "http://127.0.0.1:9"}
    script = "import conftest; conftest.load().load_dataset('mnist')"
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=os.path.dirname(__file__),
        env=own,
        capture_output=True,
        text=True,
    )
    assert done.stderr.strip().endswith("Keras's mnist is damaged, replace it")


@pytest.mark.parametrize("name", NAMES)
def test_a_cache_that_cannot_be_read_is_an_error(nb, monkeypatch, name):
    failure = PermissionError(13, "Permission denied", "/cache")
    set_loader(monkeypatch, name, failure)
    with pytest.raises(PermissionError) as error:
        nb.load_dataset(name)
    assert error.value is failure


@pytest.mark.parametrize("name", NAMES)
def test_a_changed_cache_is_an_error(nb, monkeypatch, accepted, name):
    arrays, official = [*accepted[:3], accepted[3][::-1]], nb.TITLES[name]
    set_loader(monkeypatch, name, arrays)
    with pytest.raises(ValueError, match=f"{name} is not the official {official}"):
        nb.load_dataset(name)
    set_loader(monkeypatch, name, small())
    with pytest.raises(ValueError, match=rf"{name} .* \(3, 28, 28\)"):
        nb.load_dataset(name)


# stand-ins


def assert_stand_in_for(nb, data, name):
    """Assert that a data set is the one that stands for a real one."""
    other = {"mnist": "digits", "fashion_mnist": "noisy_digits"}[name]
    assert_holds(data, nb.TITLES[other], nb.stand_in(other))
    assert "stand-in" in data.title and nb.TITLES[name] in data.title


@pytest.mark.parametrize("folder_too", [False, True])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("said", ["1", "true", "YES"])
def test_offline_goes_to_the_stand_in_at_once(
    nb, monkeypatch, capsys, tmp_path, folder_too, name, said
):
    monkeypatch.setenv("PRUNING_OFFLINE", said)
    if folder_too:
        monkeypatch.setenv("PRUNING_DATA_DIR", str(tmp_path))
    data = nb.load_dataset(name)
    assert_stand_in_for(nb, data, name)
    assert_declared(capsys.readouterr().out, data)


@pytest.mark.parametrize("said", ["", "0", "False", "no"])
def test_online_asks_keras(nb, monkeypatch, accepted, said):
    monkeypatch.setenv("PRUNING_OFFLINE", said)
    set_loader(monkeypatch, "mnist", accepted)
    assert_holds(nb.load_dataset("mnist"), "MNIST", accepted)


@pytest.mark.parametrize("folder_too", [False, True])
@pytest.mark.parametrize("name", ["digits", "noisy_digits"])
def test_a_stand_in_can_be_asked_for(
    nb, monkeypatch, capsys, tmp_path, folder_too, name
):
    if folder_too:
        monkeypatch.setenv("PRUNING_DATA_DIR", str(tmp_path))
    data = nb.load_dataset(name)
    assert_declared(capsys.readouterr().out, data)
    assert_holds(data, nb.TITLES[name], nb.stand_in(name))
    assert "stand-in" in data.title and data.class_names == tuple("0123456789")


@pytest.mark.parametrize("name", ["digits", "noisy_digits"])
def test_a_stand_in_looks_like_the_real_data(nb, name):
    arrays, again = nb.stand_in(name), nb.stand_in(name)
    for images, labels in (arrays[:2], arrays[2:]):
        assert images.shape == (len(labels), 28, 28)
        assert images.dtype == np.uint8 and images.max() == 255
        assert labels.dtype.kind == "i" and set(labels) == set(range(10))
    assert len(arrays[0]) + len(arrays[2]) == 1797
    assert all(map(np.array_equal, arrays, again))


def test_the_two_stand_ins_differ_in_their_images_only(nb):
    digits, noisy = nb.stand_in("digits"), nb.stand_in("noisy_digits")
    for part in (0, 2):
        assert (noisy[part] != digits[part]).any(axis=(1, 2)).all()
        assert (noisy[part + 1] == digits[part + 1]).all()


def test_a_digit_is_enlarged_in_place(nb):
    digit, enlarged = nb.load_digits().images[0], nb.stand_in("digits")[0][0]
    corners = enlarged[2:26:3, 2:26:3]
    assert (corners == (digit * 255 / 16).astype("uint8")).all()
    blocks = enlarged[2:26, 2:26].reshape(8, 3, 8, 3)
    assert (blocks == corners[:, None, :, None]).all()
    border = np.ones((28, 28), bool)
    border[2:26, 2:26] = False
    assert not enlarged[border].any()


@pytest.mark.parametrize("name", ["cifar10", "MNIST", "", "fashion"])
@pytest.mark.parametrize("offline", ["0", "1"])
def test_an_unknown_name_is_an_error(nb, monkeypatch, name, offline):
    monkeypatch.setenv("PRUNING_OFFLINE", offline)
    with pytest.raises(ValueError, match="unknown data set") as error:
        nb.load_dataset(name)
    assert repr(name) in str(error.value)


def test_a_data_set_cannot_be_changed(data):
    with pytest.raises(AttributeError):
        data.title = "MNIST"


def test_the_parts_of_a_data_set_can_be_taken_in_order(data):
    assert data[1] is data.x_train and data[3] is data.x_val
    images, labels = data[5:7]
    assert images is data.x_test and labels is data.y_test
