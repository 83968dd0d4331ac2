"""Data: what is official, what is a stand-in, and what is an error."""

import gzip
import hashlib
import http.client
import os
import zlib

import keras
import numpy as np
import pytest

NAMES = ("mnist", "fashion_mnist")
KEYS = ("x_train", "y_train", "x_test", "y_test")
GIVEN = os.environ.get("PRUNING_DATA_DIR")


def digest_of(arrays):
    """Return the SHA-256 digest of arrays, one after the other."""
    return hashlib.sha256(b"".join(a.tobytes() for a in arrays)).hexdigest()


@pytest.fixture(autouse=True)
def quiet_surroundings(monkeypatch):
    """Start without settings, and without a network to reach."""
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
    """Make the made-up arrays the official ones."""
    for name in NAMES:
        monkeypatch.setitem(nb.DIGESTS, name, digest_of(made_up))
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


def assert_official(data, title, arrays):
    """Assert that a data set holds the arrays, with integer labels."""
    found = [data.x_train, data.y_train, data.x_test, data.y_test]
    assert data.title == title and len(data.class_names) == 10
    for array, expected in zip(found, arrays):
        assert np.array_equal(array, expected)
    assert data.x_train.dtype == data.x_test.dtype == np.uint8
    assert data.y_train.dtype == data.y_test.dtype == int


# a folder


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.skipif(not GIVEN, reason="PRUNING_DATA_DIR is not set")
def test_the_official_files_are_accepted(nb, monkeypatch, capsys, name):
    monkeypatch.setenv("PRUNING_DATA_DIR", GIVEN)
    data = nb.load_dataset(name)
    assert data.x_train.shape == (60000, 28, 28)
    assert data.x_test.shape == (10000, 28, 28)
    assert data.x_train.dtype == data.x_test.dtype == np.uint8
    assert data.x_train.max() == data.x_test.max() == 255
    assert data.y_train.shape == (60000,) and data.y_test.shape == (10000,)
    assert data.y_train.dtype == data.y_test.dtype == int
    assert set(data.y_train) == set(data.y_test) == set(range(10))
    assert len(set(data.class_names)) == 10
    output = capsys.readouterr().out
    title = nb.TITLES[name]
    assert output == f"{title}: 60,000 images (PRUNING_DATA_DIR)\n"


def test_the_class_names_are_the_official_ones(nb, accepted):
    digits, clothes = (
        nb.verified(accepted, name, "somewhere").class_names for name in NAMES
    )
    assert clothes[0] == "T-shirt" and clothes[9] == "Boot"
    assert len(set(clothes)) == 10 and digits == tuple("0123456789")


def test_a_folder_with_official_arrays_is_read(nb, folder, accepted, capsys):
    write(folder / "mnist.npz", accepted)
    assert_official(nb.load_dataset("mnist"), "MNIST", accepted)
    output = capsys.readouterr().out
    assert output == "MNIST: 60,000 images (PRUNING_DATA_DIR)\n"


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
    with pytest.raises(FileNotFoundError, match=r"mnist\.npz"):
        nb.load_dataset("mnist")


@pytest.mark.parametrize("position", range(4))
@pytest.mark.parametrize("dtype", ["float32", "int64", "int8"])
def test_a_wrong_dtype_is_named(nb, accepted, position, dtype):
    arrays = list(accepted)
    arrays[position] = arrays[position].astype(dtype)
    with pytest.raises(ValueError, match=rf"somewhere.*{dtype}"):
        nb.verified(arrays, "mnist", "somewhere")


@pytest.mark.parametrize("position", range(4))
def test_one_changed_value_is_an_error(nb, folder, accepted, position):
    arrays = [array.copy() for array in accepted]
    arrays[position][-1] += 200
    write(folder / "mnist.npz", arrays)
    with pytest.raises(ValueError, match="not the official MNIST") as error:
        nb.load_dataset("mnist")
    assert str(folder / "mnist.npz") in str(error.value)


@pytest.mark.skipif(not GIVEN, reason="PRUNING_DATA_DIR is not set")
def test_one_data_set_is_not_taken_for_the_other(nb, folder):
    (folder / "mnist.npz").symlink_to(f"{GIVEN}/fashion_mnist.npz")
    with pytest.raises(ValueError, match="not the official MNIST"):
        nb.load_dataset("mnist")


# Keras


@pytest.mark.parametrize("name", NAMES)
def test_kerass_copy_is_accepted(nb, monkeypatch, accepted, capsys, name):
    set_loader(monkeypatch, name, accepted)
    title = nb.TITLES[name]
    assert_official(nb.load_dataset(name), title, accepted)
    assert capsys.readouterr().out == f"{title}: 60,000 images (Keras)\n"


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
    data, output = nb.load_dataset(name), capsys.readouterr().out
    assert "stand-in" in data.title and nb.TITLES[name] in data.title
    end = "1,297 images (scikit-learn, no download)"
    assert output == f"{data.title}: {end}\n"


DAMAGE = (
    EOFError("Compressed file ended before the end-of-stream marker"),
    gzip.BadGzipFile("Not a gzipped file"),
    zlib.error("Error -3 while decompressing data"),
    ValueError("Incomplete or corrupted file detected."),
    OSError("cannot read"),
)


@pytest.mark.parametrize("failure", DAMAGE, ids=repr)
@pytest.mark.parametrize("name", NAMES)
def test_a_damaged_cache_is_an_error(nb, monkeypatch, failure, name):
    set_loader(monkeypatch, name, failure)
    with pytest.raises(ValueError, match=f"{name} is damaged") as error:
        nb.load_dataset(name)
    assert str(failure) in str(error.value)


@pytest.mark.parametrize("name", NAMES)
def test_a_changed_cache_is_an_error(nb, monkeypatch, accepted, name):
    arrays = [*accepted[:3], accepted[3][::-1]]
    set_loader(monkeypatch, name, arrays)
    with pytest.raises(ValueError, match="Keras's copy: not the official"):
        nb.load_dataset(name)
    set_loader(monkeypatch, name, small())
    with pytest.raises(ValueError, match=r"Keras's copy: .* \(3, 28, 28\)"):
        nb.load_dataset(name)


# stand-ins


@pytest.mark.parametrize("folder_too", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_offline_goes_to_the_stand_in_at_once(
    nb, monkeypatch, capsys, tmp_path, folder_too, name
):
    monkeypatch.setenv("PRUNING_OFFLINE", "1")
    if folder_too:
        monkeypatch.setenv("PRUNING_DATA_DIR", str(tmp_path))
    data, output = nb.load_dataset(name), capsys.readouterr().out
    assert f"stand-in for {nb.TITLES[name]}" in data.title
    assert output == f"{data.title}: 1,297 images (scikit-learn, offline)\n"


@pytest.mark.parametrize("name", ["digits", "noisy_digits"])
def test_a_stand_in_can_be_asked_for(nb, capsys, name):
    data, output = nb.load_dataset(name), capsys.readouterr().out
    assert "stand-in" in data.title and data.title == nb.TITLES[name]
    assert output == f"{data.title}: 1,297 images (scikit-learn)\n"


@pytest.mark.parametrize("name", ["digits", "noisy_digits"])
def test_a_stand_in_looks_like_the_real_data(nb, name):
    data, again = nb.stand_in(name), nb.stand_in(name)
    sets = [(data.x_train, data.y_train), (data.x_test, data.y_test)]
    for images, labels in sets:
        assert images.shape == (len(labels), 28, 28)
        assert images.dtype == np.uint8 and images.max() == 255
        assert labels.dtype.kind == "i" and set(labels) == set(range(10))
    assert len(data.x_train) + len(data.x_test) == 1797
    assert (data.x_train == again.x_train).all()
    assert (data.x_test == again.x_test).all()
    assert data.class_names == nb.DIGITS


def test_the_two_stand_ins_differ_in_their_images_only(nb, data):
    noisy = nb.stand_in("noisy_digits")
    assert (noisy.y_train == data.y_train).all()
    assert (noisy.x_train != data.x_train).any(axis=(1, 2)).all()


def test_a_digit_is_enlarged_in_place(nb, data):
    small_digit = nb.load_digits().images[0]
    corners = data.x_train[0][2:26:3, 2:26:3]
    assert (corners == (small_digit * 255 / 16).astype("uint8")).all()
    border = np.ones((28, 28), bool)
    border[2:26, 2:26] = False
    assert not data.x_train[0][border].any()


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
