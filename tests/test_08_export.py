"""What a user would say: "My pruned model is neither smaller nor faster."

"I counted its bytes, timed it as it is, by SciPy, shrunk, and on LiteRT. Tell me which
of these help, by numbers that I can trust: of models that compute the same. Then give
me your functions: one file, `pruning.py`, that needs nothing of the notebook."
"""

import inspect
import os
import re
import subprocess
import sys
import tempfile
import warnings
import zlib
from pathlib import Path
from unittest.mock import Mock

import keras
import matplotlib.pyplot as plt
import numpy as np
import pytest
from conftest import NOTEBOOK, cell_defining, cell_tagged, run_cell
from helpers import answers, difference, equal, randomized, rows_of
from IPython.core.interactiveshell import InteractiveShell
from keras import layers

# work and time


def sums(calls, repeats):
    """Return, in place of medians, what tells calls and their repeats."""
    return {way: repeats * np.abs(call()).sum() for way, call in calls.items()}


def test_networks_are_compared_by_size_work_and_time(nb, data, monkeypatch):
    cnn = nb.prune(nb.build_cnn((4,), 3), "weight", 0.5)  # zeros and padding count
    networks = {"dense": nb.build_mlp((12, 8)), "cnn": cnn}
    images, work = data.x_test[:20], [9584, 9 * 4 * 28**2 + 4 * 14**2 * 3 + 3 * 10]
    monkeypatch.setattr(nb, "medians", sums)
    table = nb.compared(networks, images, 7)
    times = [1000 * 7 * np.abs(own(images)).sum() for own in networks.values()]
    assert table["milliseconds"].tolist() == pytest.approx(times, rel=1e-4)
    assert table["parameters"].tolist() == [9584, 36 + 4 + 16 + 2352 + 3 + 30 + 10]
    more = table["MFLOPs"].to_numpy() / np.multiply(2e-6, work)
    assert ((1 <= more) & (more <= 1.25)).all(), "scaling and biases count, too"


def test_sparse_and_compiled_calls_answer_like_a_network_of_kernels(nb, data, model):
    images = data.x_test[:20]
    for sparsity in (0, 0.5, 1):
        pruned = nb.prune(model, "weight", sparsity)
        for call in nb.csr_call, nb.compiled:
            logits, (expected,) = call(pruned, images)(), answers(pruned, images)
            np.testing.assert_allclose(logits, expected, atol=1e-5)
    for part in layers.Dense(4), layers.Conv1D(4, 1, use_bias=False):
        other = keras.Sequential([keras.Input((3, 6)), part])
        with pytest.raises(ValueError, match=f"{other.name!r}.*without biases"):
            nb.csr_call(other, rows_of(other))


def test_times_are_medians_of_calls_in_turn_once_they_are_warm(nb, monkeypatch):
    lasting = {"a": [90, 90, 1, 7, 2, 3, 30], "b": [90, 90, 5, 5, 4, 60, 6]}
    left, spent, turns = {name: iter(x) for name, x in lasting.items()}, [], []

    def call(name):
        turns.append(name)
        spent.append(next(left[name]))

    monkeypatch.setattr(nb.time, "perf_counter", lambda: sum(spent))
    functions = {name: lambda name=name: call(name) for name in lasting}
    assert nb.medians(functions, 5) == {"a": 3, "b": 5}
    assert turns == [*"ab"] * 7


def test_every_way_is_timed_on_every_batch_and_drawn(nb, data, model, figures):
    sizes, levels = (1, 32, 1000), (0.5, 0.8, 0.9, 0.95, 0.99)
    own = {"model": model, "mnist": data, "medians": sums}
    own["csr_call"] = lambda *given: lambda: 2 * nb.csr_call(*given)()  # to tell it by
    names = run_cell(nb, "times", **own)
    assert names.times.index.tolist() == [(n, s) for n in sizes for s in levels]
    pruned = {s: [model, *(nb.prune(model, r, s) for r in nb.RULES)] for s in levels}
    for (batch, s), row in names.times.iterrows():
        images = np.resize(data.x_test, (batch, 28, 28))
        whole, zeros, units = (np.abs(own(images)).sum() for own in pruned[s])
        ways = {"zeros, as they are": zeros, "zeros, CSR": 2 * zeros}
        ways = {way: x / whole for way, x in {**ways, "units gone": units}.items()}
        assert {**row} == pytest.approx(ways, rel=1e-3)
    for ax, (n, own) in zip(plt.gcf().axes, names.times.groupby("batch"), strict=True):
        drawn = {line.get_label(): [*line.get_ydata()] for line in ax.lines}
        assert drawn == {**own.to_dict("list"), "dense": [1, 1]}, f"batches of {n}"


# bytes, and LiteRT


def told(names, first=0, **given):
    """Run cells from number `first` on; return all names, what they print and judge."""
    tags = "shrunk", "files", "exports", "decide", "decide-claims"

    def medians(calls, repeats):
        given["asked"].append({way: call() for way, call in calls.items()})
        return {way: 0.001 * i for i, way in enumerate(calls)}

    given |= {"asked": [], "claims": [], "said": [], "medians": medians}
    given["check"] = lambda claim, holds, needs=0: given["claims"].append(holds)
    given["print"] = given["said"].append
    for tag in tags[first:]:
        names = run_cell(names, tag, **given)
    return names


@pytest.fixture(scope="module")
def story(nb, data):
    """Return the names of the cells on bytes and LiteRT, for a small network."""
    few = data._replace(x_test=data.x_test[:200], y_test=data.y_test[:200])
    model, seen = nb.build_mlp((200, 100), seed=0), few.x_train[:100]
    model = nb.train(model, few, 1, seed=0)

    def repair(pruned, dense, images):
        assert dense is model and np.array_equal(images, seen), "training rows"
        return nb.repair(pruned, dense, images, steps=5)

    given = {"mnist": few, "model": model, "IMAGES": len(seen), "repair": repair}
    given["networks"] = {few.title: [model]}
    given["inputs"] = {1000: np.resize(few.x_test, (1000, 28, 28))}
    times = nb.pd.DataFrame(1.0, [[1000], [0.8]], ["zeros, as they are", "units gone"])
    given["times"] = times.rename_axis(["batch", "sparsity"])
    names = told(nb, **given)
    own = {way: what[0] for way, what in names.exports.items() if way in names.lite}
    names.models = own | names.others  # {way: model}, of all that was compared
    return names


def test_networks_are_repaired_shrunk_and_stored_in_two_forms(nb, story, tmp_path):
    zeroed, repaired = nb.prune(story.model, "weight", 0.9), story.weights_gone
    assert nb.measured_sparsity(repaired) == nb.measured_sparsity(zeroed)
    assert not equal(repaired.get_weights(), zeroed.get_weights()), "it is repaired"
    assert [v.shape[-1] for v in story.units_gone.weights] == [40, 20, 10]
    assert difference(story.units_gone, story.units_zero, story.mnist.x_test) <= 1e-5
    sizes = []
    for own in (story.model, repaired, story.units_zero, story.units_gone):
        own.save(tmp_path / "own.keras")
        content = (tmp_path / "own.keras").read_bytes()
        sizes.append([len(content) / 1000, len(zlib.compress(content)) / 1000])
    np.testing.assert_allclose(story.files, sizes, rtol=0.03)


def test_all_ways_but_one_compute_what_keras_does_and_are_compared(nb, story, figures):
    decide, (_, said) = story.decide, story.said
    assert said.startswith("90% zeros in blocks, int8: LiteRT cannot do that here. ")
    assert decide.index.tolist() == [*story.models] and len(decide) == 10
    columns = zip((1, 32, 256), [*decide][2:], story.asked, strict=True)
    for batch, column, found in columns:
        assert decide[column].tolist() == pytest.approx([*range(10)]), "milliseconds"
        for way, logits in found.items():
            (expected,) = answers(story.models[way], story.inputs[1000][:batch])
            off = np.abs(logits - expected).max() / np.abs(expected).max()
            assert 1e-5 < off < 0.1 if "int8" in way else off <= 1e-4, way
    for way, row in decide.iterrows():
        plain = 1000 * nb.stored(story.models[way], packed=True)
        size = len(story.lite[way]) if way in story.lite else plain
        assert row["kB"] == pytest.approx(size / 1000, rel=0.02)
        right = nb.test_accuracy(story.models[way], story.mnist)
        assert row["accuracy (%)"] == pytest.approx(
            right, abs=2 if "int8" in way else 1e-9
        )
    right = decide["accuracy (%)"]
    cost = right["dense"] - right["90% zeros in blocks"]
    assert story.costs == pytest.approx([cost])
    assert len(story.claims) == 6 and story.claims[-1], "LiteRT answers like Keras"
    run_cell(story, "decide-drawn")
    for ax, column in zip(plt.gcf().axes, ("kB", "ms for one image"), strict=True):
        drawn = [(*x.get_xdata(), *x.get_ydata()) for x in ax.lines]
        assert drawn == [*zip(decide[column], right)], "a point for each way"


def test_zeros_that_are_not_stored_and_eight_bits_make_files_smaller(story):
    sizes = {way: len(content) for way, content in story.lite.items()}
    values = {way: own.get_weights() for way, own in story.models.items()}
    left = {way: 4 * sum(map(np.count_nonzero, own)) for way, own in values.items()}
    for way in ("dense", "80% of units gone"):
        assert sizes[way] == pytest.approx(left[way], abs=5000)
        assert sizes[f"{way}, int8"] == pytest.approx(left[way] / 4, abs=15000)
    # 4 bytes for each weight left, and at most as many for its place
    assert left["90% zeros"] < sizes["90% zeros"] <= 2 * left["90% zeros"] + 5000
    for sparsity, model in story.blocks.items():
        kept = model.get_weights()[0].reshape(-1, 4, 200).any(axis=1).mean()
        assert kept == pytest.approx(1 - sparsity, abs=0.01), "blocks of four"
        way = f"{100 * sparsity:.0f}% zeros in blocks"
        assert left[way] < sizes[way] <= 1.25 * left[way] + 5000


@pytest.mark.parametrize("refused", [None, "dense", "80% of units gone"])
def test_what_litert_refuses_is_said_and_not_judged(story, refused):
    def exported(model, *optimizations):
        if refused and (model is not story.models[refused] or optimizations):
            return story.lite["dense"]
        raise AttributeError("no such flag")

    names = told(story, 2, exported=exported, repair=lambda pruned, *_: pruned)
    ways = [refused] if refused else [*story.exports]
    said = [f"{way}: LiteRT cannot do that here. no such flag" for way in ways]
    assert names.said == said and not {*ways} & names.lite.keys()
    assert names.decide.index.tolist() == [*names.lite, *story.others]
    assert len(names.claims) == 1, "only that on repaired networks"


@pytest.mark.usefixtures("story")  # what is opened once for all is open
def test_an_export_leaves_and_says_nothing(nb, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    parts = keras.Input((24,)), layers.Dense(32, "relu"), layers.Dense(3)  # with biases
    model = nb.prune(randomized(keras.Sequential(parts)), nb.block_mask((4, 1)), 0.75)
    rows, opened = rows_of(model, count=7), []
    for _ in range(2):
        with warnings.catch_warnings(action="error"):
            call = nb.lite_call(nb.exported(model, "EXPERIMENTAL_SPARSITY"), rows)
        np.testing.assert_allclose(call(), answers(model, rows)[0], 1e-3, atol=1e-4)
        assert np.array_equal(call(), call()), "a call may be repeated"
        opened.append(len([*Path("/proc/self/fd").glob("*")]))  # where Linux has them
    left = {path.name[:11] for path in tmp_path.iterdir()}
    assert left <= {"__autograph"}, "but for what TensorFlow clears up at exit"
    assert opened[0] == opened[1], "files are closed"
    with pytest.raises(AttributeError, match="FASTER"):
        nb.exported(model, "FASTER")
    with pytest.raises(InterruptedError), nb.quiet():
        os.write(2, b"hidden")
        raise InterruptedError
    os.write(2, b"seen")
    assert capfd.readouterr() == ("", "seen")


def test_the_interpreters_own_package_comes_first(nb, data, monkeypatch):
    own = Mock()
    for name in ("ai_edge_litert", "ai_edge_litert.interpreter"):
        monkeypatch.setitem(sys.modules, name, own)
    with pytest.raises(TypeError):
        nb.lite_call(b"mine", data.x_test)
    own.Interpreter.assert_called_once_with(model_content=b"mine", num_threads=1)


# the module pruning.py
NAMES = "weight_mask unit_mask block_mask n_m_mask polynomial_sparsity prune shrink "
NAMES += "measured_sparsity constant_sparsity repair Units Pruner KeepZeros Globally"
ALONE = """
import sys
absent = "IPython ipykernel matplotlib sklearn get_ipython".split()
sys.modules.update(dict.fromkeys(absent))  # an import of them fails
import pruning
print("imported")
from helpers import *
{}
np.savez("found.npz", *tour(pruning))
x = np.ones((6400, 4), "float32")
ends = keras.Input((4,)), keras.layers.Dense(6, "relu"), keras.layers.Dense(1)
model = randomized(keras.Sequential(ends))
model.compile("sgd", "mse")
steps = pruning.__doc__.partition("Example:")[2].replace("\\n    ", "\\n")
exec(steps, dict(model=model, x=x, y=x[:, :1]))
assert keras.models.load_model("small.keras").layers[0].units == 3
names = dict(vars(pruning), model=model, images=x[:99])
exec(*re.findall("Example: `(.*)`", pruning.repair.__doc__), names)
assert (names["repaired"].get_weights()[0] == 0).all(axis=0).sum() == 3
"""


def tour(pruning):
    """Return what a module's functions, one after another, make of small networks."""
    layers = keras.layers
    source = keras.Input((6, 6, 2))
    x = layers.Conv2D(8, 3, activation="relu")(source)
    y = layers.BatchNormalization()(layers.Conv2D(8, 3, padding="same")(x))
    x = layers.Dense(6, "relu")(layers.Flatten()(layers.Add()([x, y])))
    model = randomized(keras.Model(source, layers.Dense(3)(x)))
    rules = [pruning.n_m_mask(1, 3), pruning.block_mask((5, 2)), "weight", "unit"]
    rules.append(pruning.Globally(pruning.magnitudes))
    networks = [pruning.prune(model, rule, 0.3) for rule in rules]
    rising, x = pruning.polynomial_sparsity(0.5, begin=0, end=3), rows_of(model)
    pruner = pruning.Pruner("unit", rising, frequency=1)
    for own, callback in zip(networks[2:], (pruning.KeepZeros(), pruner)):
        own.compile("sgd", "mse")
        own.fit(x, model(x), 2, callbacks=[callback], shuffle=False, verbose=0)
    networks += [pruning.shrink(networks[3]), pruning.repair(networks[4], model, x)]
    shares = np.array([pruning.measured_sparsity(own) for own in networks])
    return [shares, *(value for own in networks for value in own.get_weights())]


@pytest.fixture(scope="module")
def cells(nb):
    """Return the cells in the notebook file that make up the module."""
    names = [function.__qualname__.partition(".")[0] for function in nb.parts()]
    return [*map(cell_defining, names)]


def test_alone_it_does_what_the_notebook_does(nb, cells, tmp_path):
    (tmp_path / "pruning.py").write_text(nb.module_of(cells), encoding="utf-8")
    script = [sys.executable, "-c", ALONE.format(inspect.getsource(tour))]
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PRUNING", "PY"))}
    env |= {"PYTHONPATH": str(Path(__file__).parent), "CUDA_VISIBLE_DEVICES": "-1"}
    done = subprocess.run(script, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.startswith("imported"), "an import says nothing"
    left = {path.name for path in tmp_path.iterdir()} - {"__pycache__"}
    assert left == {"pruning.py", "found.npz", "small.keras"}, "an import leaves files"
    found = np.load(tmp_path / "found.npz").values()
    for own, expected in zip(found, tour(nb), strict=True):
        np.testing.assert_allclose(own, expected, atol=1e-6)
        assert np.array_equal(own == 0, expected == 0), "the same zeros"


def test_it_has_what_the_notebook_offers_and_nothing_of_its_experiments(nb, cells):
    source = nb.module_of(cells)
    every = re.findall(r"^(?:def|class) (\w+)", source, re.MULTILINE)
    assert {*NAMES.split()} <= {*every} <= vars(nb).keys()
    assert len(every) == len({*every}), "nothing is defined twice"
    others = r"\b(build_mlp|evaluate|datasets|mnist|fashion|plt|SEEDS|LOSS|tf)\b"
    assert not re.search(others, source) and "MIT License" in source
    here = str(Path.home()), str(NOTEBOOK.parent), tempfile.gettempdir(), os.getcwd()
    assert not [place for place in here if place != "/" and place in source]
    assert not re.search(r"(^|[\s\"'(=])(/\w|~/|[A-Z]:\\)", source), "it is a place"
    ruff = [sys.executable, "-m", "ruff", "check", "--isolated", "--line-length=88"]
    rules = ["--select=F,E,W,D1", "--ignore=E402,D107", "--stdin-filename=a.py", "-"]
    done = subprocess.run(ruff + rules, input=source, capture_output=True, text=True)
    assert done.returncode == 0, "all is defined, used and described: " + done.stdout


def test_help_tells_how_to_call_it(nb):
    for name in NAMES.split():
        text = inspect.getdoc(getattr(nb, name))
        assert re.search(r"^Args(, \w+)*:", text, re.MULTILINE), name
        if name.islower():  # a function
            assert re.search(r"^(\w+, )*Raises(, \w+)*:", text, re.MULTILINE), name
            assert text.startswith("Return "), name


def test_it_is_written_as_run_where_told(nb, cells, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setitem(sys.modules, nb.__name__, nb)  # a shell puts its own there
    shell, cell = InteractiveShell(user_ns={**vars(nb)}), cell_defining("KeepZeros")
    (tmp_path / "own").mkdir()
    for text in (*cells, cell_defining("module_of")):
        shell.run_cell(text).raise_error()
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PRUNING_EXPORT", raising=False)
    for place, text in (".", cell), ("own", cell + "\n\nMINE = 1\n"), ("own", cell):
        shell.run_cell(text).raise_error()
        shell.run_cell(cell_tagged("export")).raise_error()
        written = Path(place, "pruning.py").read_text(encoding="utf-8")
        assert written.replace("\n\nMINE = 1", "") == nb.module_of(cells)
        assert ("MINE" in written) == ("MINE" in text), "a cell that ran again counts"
        assert f" {len(written.splitlines())} " in capsys.readouterr().out
        Path(place, "pruning.py").unlink()
        monkeypatch.setenv("PRUNING_EXPORT", str(tmp_path / "own"))
    assert not [*tmp_path.rglob("pruning.py")], "it is written nowhere else"
