"""What a user would say: "My pruned model is neither smaller nor faster."

"I counted its bytes, timed it as it is, by SciPy, shrunk, and on LiteRT. Tell me which
of these help, and give me numbers that I can trust: of models that compute the same."
"""

import itertools
import os
import sys
import tempfile
import types
import warnings
import zipfile
from pathlib import Path

import keras
import matplotlib.pyplot as plt
import numpy as np
import pytest
from conftest import run_cell
from helpers import answers, difference, randomized, same_weights
from matplotlib.colors import same_color

SPARSE, ROUNDED = "EXPERIMENTAL_SPARSITY", "DEFAULT"


@pytest.fixture(scope="module")
def trained(nb, data):
    """Return a small network after a brief training on the stand-in."""
    return nb.train(nb.build_mlp((40, 30), seed=0), data, 2, seed=0)


@pytest.fixture(scope="module")
def large(nb):
    """Return {what: a model}, large enough that its weights make up its file."""
    dense = nb.build_mlp((400, 300), seed=1)
    return {
        "dense": dense,
        "zeros": nb.prune(dense, "weight", 0.9),
        "blocks": nb.prune(dense, nb.block_mask((4, 1)), 0.9),
        "units": nb.shrink(nb.prune(dense, "unit", 0.8)),
    }


@pytest.fixture(scope="module")
def contents(nb, large):
    """Return {what: the bytes of its LiteRT file}, zeros not stored."""
    options = {"zeros": [SPARSE], "blocks": [SPARSE]}
    return {n: nb.exported(own, *options.get(n, [])) for n, own in large.items()}


# work


CHAINS = {
    "dense": ((6,), ["Dense", 5], ["Dense", 3]),
    "dense on a sequence": ((7, 4), ["Dense", 5], ["Dense", 3]),
    "one axis": ((9, 2), ["Conv1D", 3, 4], ["Conv1D", 2, 2]),
    "strides": ((9, 8, 2), ["Conv2D", 4, 3, 2], ["Conv2D", 3, (1, 2)]),
    "three axes": ((5, 4, 6, 2), ["Conv3D", 3, 2], ["Dense", 2]),
    "mixed": ((8, 8, 1), ["Conv2D", 2, 3], ["Flatten"], ["Dense", 4]),
    "transposed": ((5, 4, 2), ["Conv2DTranspose", 3, 2, 3]),
    "depthwise": ((6, 5, 3), ["DepthwiseConv2D", 3], ["DepthwiseConv2D", 2, 2]),
    "pooled": ((9, 2), ["Conv1D", 4, 2], ["MaxPooling1D"], ["Conv1D", 3, 2]),
}


@pytest.mark.parametrize("name", CHAINS)
def test_flops_count_each_product_and_its_addition(nb, name):
    shape, *layers = CHAINS[name]
    layers = [getattr(keras.layers, kind)(*args) for kind, *args in layers]
    model = keras.Sequential([keras.Input(shape), *layers])
    products = 0
    for layer in model.layers:
        if layer.weights:
            kernel, bias = layer.weights
            layer.set_weights([np.ones(kernel.shape), np.zeros(bias.shape)])
            products += np.sum(layer(np.ones((1, *layer.input.shape[1:]))))
    assert nb.flops(model) == 2 * products > 0


def test_flops_count_padding_and_zeros_like_other_numbers(nb):
    layer = keras.layers.Conv2D(4, 3, padding="same")
    model = keras.Sequential([keras.Input((6, 5, 2)), layer])
    assert nb.flops(model) == 2 * (3 * 3 * 2 * 4) * (6 * 5)
    mlp = nb.prune(nb.build_mlp((12, 8)), "weight", 1)
    assert nb.flops(mlp) == 2 * mlp.count_params()


def test_networks_are_compared_by_size_work_and_time(nb, data, monkeypatch):
    networks = {"large": nb.build_mlp((12, 8)), "small": nb.build_mlp((2, 1))}
    images, found = data.x_test[:20], []

    def medians(calls, repeats):
        found.extend((repeats, calls["large"](), calls["small"]()))
        return {"large": 0.5, "small": 0.25}

    monkeypatch.setattr(nb, "medians", medians)
    table = nb.compared(networks, images, 7)
    assert table.index.tolist() == [*networks]
    assert table["parameters"].tolist() == [9584, 1580]
    assert table["MFLOPs"].tolist() == pytest.approx([2 * 9.584e-3, 2 * 1.58e-3])
    assert table["milliseconds"].tolist() == [500, 250]
    assert found[0] == 7
    for logits, model in zip(found[1:], networks.values(), strict=True):
        np.testing.assert_allclose(logits, model(images), atol=1e-5)


# time


def test_a_call_of_sparse_matrices_computes_the_same(nb, data, trained):
    images = data.x_test[:20]
    for sparsity in (0, 0.5, 0.9, 1):
        pruned = nb.prune(trained, "weight", sparsity)
        logits = nb.csr_call(pruned, images)()
        np.testing.assert_allclose(logits, pruned(images), atol=1e-4)


def test_a_compiled_call_computes_the_same(nb, data, trained):
    images = data.x_test[:20]
    np.testing.assert_allclose(
        nb.compiled(trained, images)(), trained(images), atol=1e-5
    )


def test_times_are_medians_of_calls_in_turn(nb, monkeypatch):
    clock, calls = [0.0], []
    lasting = {"a": [90, 90, 1, 7, 2, 3, 30], "b": [90, 90, 5, 5, 4, 60, 6]}

    def call(name):
        clock[0] += lasting[name][calls.count(name)]
        calls.append(name)

    monkeypatch.setattr(
        nb, "time", types.SimpleNamespace(perf_counter=lambda: clock[0])
    )
    functions = {name: lambda name=name: call(name) for name in lasting}
    assert nb.medians(functions, 5) == {"a": 3, "b": 5}
    assert calls == [*"ab"] * 7


def test_every_way_is_timed_on_every_batch_and_drawn(nb, data, trained, figures):
    sizes, levels, asked = (1, 32, 1000), (0.5, 0.8, 0.9, 0.95, 0.99), []
    ways = ["zeros, as they are", "zeros, CSR", "units gone"]
    random = np.random.default_rng(0)

    def medians(calls, repeats):
        asked.append({way: call() for way, call in calls.items()} | {"n": repeats})
        return dict.fromkeys(calls, 2) | dict(zip(ways, random.random(3) + 0.1))

    names = run_cell(nb, "TIMED, rows = ", model=trained, mnist=data, medians=medians)
    times, random = names["times"], np.random.default_rng(0)
    assert times.index.tolist() == [*itertools.product(sizes, levels)]
    assert times.index.names == ["batch", "sparsity"] and {*times} == {*ways}
    for (batch, s), row, found in zip(times.index, times.to_dict("records"), asked):
        assert row == pytest.approx(dict(zip(ways, (random.random(3) + 0.1) / 2)))
        images = np.resize(data.x_test, (batch, 28, 28))
        weights, units = (nb.prune(trained, rule, s) for rule in nb.RULES)
        models = {"dense": trained, "units gone": units} | dict.fromkeys(
            ways[:2], weights
        )
        assert found.keys() == {*models, "n"}
        for way, model in models.items():
            np.testing.assert_allclose(found[way], model(images), atol=1e-4)
    axes = plt.gcf().axes
    for ax, batch in zip(axes, sizes, strict=True):
        assert ax.get_title().replace(",", "").endswith(f" {batch}")
        lines = {line.get_label(): line for line in ax.lines}
        assert lines.keys() == {*ways, "dense"} and {*lines["dense"].get_ydata()} == {1}
        labels = [float(text.get_text()) for text in ax.get_xticklabels()]
        assert labels == [100 * s for s in levels]
        for way in ways:
            assert lines[way].get_ydata().tolist() == times.loc[batch][way].tolist()
            assert lines[way].get_xdata().tolist() == ax.get_xticks().tolist()
    (legend,) = plt.gcf().legends
    assert {text.get_text() for text in legend.get_texts()} == {*ways, "dense"}


# files


@pytest.mark.parametrize("rule", ["weight", "unit"])
def test_a_size_is_that_of_the_file(nb, trained, tmp_path, rule):
    model, path = nb.prune(trained, rule, 0.9), tmp_path / "own.keras"
    model.save(path)
    size = nb.stored(model, packed=False)
    assert size == pytest.approx(path.stat().st_size / 1000, rel=0.01)
    with zipfile.ZipFile(tmp_path / "own.zip", "w", zipfile.ZIP_DEFLATED) as packed:
        packed.write(path, "all")
    expected = (tmp_path / "own.zip").stat().st_size / 1000
    assert nb.stored(model, packed=True) == pytest.approx(expected, rel=0.03)


def test_networks_are_shrunk_and_stored_in_two_forms(nb, data):
    model, check = nb.build_mlp((60, 50, 40, 30), seed=0), lambda *args, **options: None
    own = {"model": model, "mnist": data, "IMAGES": 100, "check": check}
    names = run_cell(nb, "units_zero = ", **own)
    assert nb.measured_sparsity(names["weights_gone"]) == pytest.approx(0.9, abs=0.001)
    pruned = nb.prune(model, "weight", 0.9)
    assert not same_weights(names["weights_gone"], pruned.get_weights()), "repaired"
    kernels = [variable.shape[-1] for variable in names["units_gone"].weights]
    assert kernels == [12, 10, 8, 6, 10]
    assert difference(names["units_gone"], names["units_zero"], data.x_test) <= 1e-5
    own = {name: names[name] for name in (*NETWORKS.values(), "check")}
    files = run_cell(nb, "\nfiles = pd", **own)["files"]
    assert files.index.tolist() == [*NETWORKS] and [*files] == ["kB", "kB, gzip"]
    for version, name in NETWORKS.items():
        sizes = [nb.stored(names[name], packed) for packed in (False, True)]
        assert files.loc[version].tolist() == pytest.approx(sizes, rel=0.02)


NETWORKS = {
    "dense": "model",
    "90 % of the weights zero": "weights_gone",
    "80 % of the units zero": "units_zero",
    "80 % of the units gone": "units_gone",
}


# LiteRT


@pytest.mark.parametrize("count", [1, 3, 50])
@pytest.mark.parametrize("what", ["dense", "zeros", "blocks", "units"])
def test_litert_computes_what_keras_does(nb, data, large, contents, what, count):
    images = data.x_test[:count]
    (expected,) = answers(large[what], images)
    found = nb.lite_call(contents[what], images)()
    assert found.shape == (count, 10) and expected.any()
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


def test_a_call_may_be_repeated(nb, data, contents):
    call = nb.lite_call(contents["blocks"], data.x_test[:5])
    assert np.array_equal(call(), call())


def test_biases_and_inputs_that_are_flat_numbers_are_exported(nb):
    layers = (
        keras.layers.Dense(32, "relu"),
        keras.layers.Dense(16),
        keras.layers.Dense(3),
    )
    model = randomized(keras.Sequential([keras.Input((24,)), *layers]))
    model = nb.prune(model, nb.block_mask((4, 1)), 0.75)
    rows = np.random.default_rng(0).normal(size=(7, 24)).astype("float32")
    (expected,) = answers(model, rows)
    found = nb.lite_call(nb.exported(model, SPARSE), rows)()
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


def test_zeros_that_are_not_stored_make_the_file_smaller(nb, large, contents):
    sizes = {what: len(content) for what, content in contents.items()}
    weights = 4 * large["dense"].count_params()
    assert sizes["dense"] == pytest.approx(weights, rel=0.02)
    assert len(nb.exported(large["blocks"])) == pytest.approx(sizes["dense"], rel=0.02)
    # 4 bytes for each weight left, and at most as many for its place
    left = {
        what: 4 * np.count_nonzero(flat(large[what])) for what in ("zeros", "blocks")
    }
    assert left["zeros"] < sizes["zeros"] <= 2 * left["zeros"] + 5000
    assert left["blocks"] < sizes["blocks"] <= 1.25 * left["blocks"] + 5000
    left_over = 4 * large["units"].count_params()
    assert sizes["units"] == pytest.approx(left_over, abs=5000)


def flat(model):
    """Return all weights of a model in one array."""
    return np.concatenate([weight.ravel() for weight in model.get_weights()])


def test_eight_bits_are_a_quarter_and_nearly_the_same(nb, data, large, contents):
    content = nb.exported(large["dense"], ROUNDED)
    assert len(content) == pytest.approx(len(contents["dense"]) / 4, rel=0.05)
    (expected,) = answers(large["dense"], data.x_test)
    found = nb.lite_call(content, data.x_test)()
    moved = np.abs(found - expected).max() / np.abs(expected).max()
    assert 1e-4 < moved < 0.05


def test_nothing_is_left_behind_and_nothing_is_said(
    nb, data, trained, tmp_path, monkeypatch, capfd
):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    fds = Path("/proc/self/fd")  # where Linux lists open files
    opened = []
    for _ in range(3):
        with warnings.catch_warnings(action="error"):
            nb.lite_call(nb.exported(trained, SPARSE), data.x_test[:2])()
        opened.append(len([*fds.iterdir()] if fds.exists() else []))
    left = [path.name for path in tmp_path.iterdir()]  # TensorFlow clears up at exit
    assert [name for name in left if not name.startswith("__autograph")] == []
    assert opened[1] == opened[2]
    assert capfd.readouterr() == ("", "")


def test_stderr_is_hidden_and_comes_back(nb, capfd):
    for error in (None, ValueError("mine")):
        try:
            with nb.quiet():
                os.write(2, b"hidden ")
                warnings.warn("hidden", stacklevel=1)
                if error:
                    raise error
        except ValueError as caught:
            assert caught is error
        os.write(2, b"seen ")
    assert capfd.readouterr().err == "seen seen "


def test_the_interpreters_own_package_comes_first(nb, data, monkeypatch):
    asked = {}

    class Interpreter:
        """Note the arguments and stop."""

        def __init__(self, **options):
            asked.update(options)
            raise InterruptedError

    own = types.ModuleType("ai_edge_litert.interpreter")
    own.Interpreter = Interpreter
    monkeypatch.setitem(
        sys.modules, "ai_edge_litert", types.ModuleType("ai_edge_litert")
    )
    monkeypatch.setitem(sys.modules, own.__name__, own)
    with pytest.raises(InterruptedError):
        nb.lite_call(b"content", data.x_test[:2])
    assert asked == {"model_content": b"content", "num_threads": 1}


STORY = [
    "\nexports = {",
    "\ndecide, batches = ",
    'looks = {"dense": (GRAY',
    "block, gone = ",
]
TRIED = ["dense", "dense, int8", "90 % zeros", "90 % zeros in blocks"]
TRIED += ["95 % zeros in blocks", "80 % of units gone", "80 % of units gone, int8"]
OTHERS = ["dense, Keras", "units gone, Keras", "zeros, SciPy"]
REFUSED = "90 % zeros in blocks, int8"


@pytest.fixture
def story(nb, data, trained, figures):
    """Return a function that runs cells about LiteRT; it returns all names."""
    few = data._replace(x_test=data.x_test[:200], y_test=data.y_test[:200])
    given = {
        "model": trained,
        "networks": {few.title: [trained]},
        "weights_gone": nb.prune(trained, "weight", 0.9),
        "units_gone": nb.shrink(nb.prune(trained, "unit", 0.8)),
        "inputs": {1000: np.resize(few.x_test, (1000, 28, 28))},
        "seen": few.x_train[:200],
        "mnist": few,
    }

    def run(cells=STORY, **changed):
        """Run cells one after the other; small networks need not keep claims."""
        asked, claims = [], []

        def medians(calls, repeats):
            asked.append({way: call() for way, call in calls.items()})
            return {way: 0.001 * (i + 1) for i, way in enumerate(calls)}

        own = {
            "medians": medians,
            "check": lambda claim, *_, **options: claims.append(claim),
        }
        names = {
            **vars(nb),
            **given,
            **own,
            "asked": asked,
            "claims": claims,
            **changed,
        }
        for text in cells:
            names = run_cell(types.SimpleNamespace(**names), text)
        return types.SimpleNamespace(**names)

    return run


def test_all_ways_are_compared_and_the_refusal_is_printed(nb, story, capsys):
    names = story(STORY[:2])
    (said,) = capsys.readouterr().out.splitlines()
    assert said.startswith(f"{REFUSED}: LiteRT cannot do that here. ")
    decide, order = names.decide, [*TRIED, *OTHERS]
    assert decide.index.tolist() == order and [*names.lite] == TRIED
    models = {way: what[0] for way, what in names.exports.items()} | names.others
    for way, row in decide.iterrows():
        plain = 1000 * nb.stored(models[way], packed=True)
        size = len(names.lite[way]) if way in TRIED else plain
        assert row["kB"] == pytest.approx(size / 1000, rel=0.02)
        right = nb.test_accuracy(models[way], names.mnist)
        assert row["%"] == pytest.approx(right, abs=2 if "int8" in way else 1e-9)
    for batch, found in zip((1, 32, 256), names.asked, strict=True):
        assert decide[batch].tolist() == pytest.approx(
            [i + 1 for i in range(len(order))]
        )
        for way, logits in found.items():
            (expected,) = answers(models[way], names.inputs[1000][:batch])
            off = np.abs(logits - expected).max() / np.abs(expected).max()
            assert off <= (0.1 if "int8" in way else 1e-4), way
    for sparsity, own in names.blocks.items():
        kept = own.get_weights()[0].reshape(-1, 4, 40).any(axis=1).mean()
        assert kept == pytest.approx(1 - sparsity, abs=0.01), "blocks of four"


def points(ax):
    """Return [((x, y), whether filled, colour)] of the points in axes."""
    lines = [line for line in ax.lines if len(line.get_xdata()) == 1]
    return [
        (
            (line.get_xdata()[0], line.get_ydata()[0]),
            not same_color(line.get_markerfacecolor(), "white"),
            line.get_color(),
        )
        for line in lines
    ]


def test_each_way_is_a_point_of_size_and_of_time(story):
    names = story(STORY[:3])
    kinds = {"dense": names.GRAY, "units": names.ORANGE, "zeros": names.BLUE}
    for ax, column in zip(plt.gcf().axes, ("kB", 1), strict=True):
        drawn = points(ax)
        assert len(drawn) == len(names.decide) == 10
        for (way, row), (place, filled, color) in zip(names.decide.iterrows(), drawn):
            assert place == (row[column], row["%"]) and filled == (way in TRIED)
            own = [kinds[kind] for kind in kinds if kind in way and "blocks" not in way]
            assert all(same_color(color, expected) for expected in own), way
        assert [text.get_text() for text in ax.texts] == TRIED


def test_without_litert_the_part_says_so_and_goes_on(story, capsys):
    def exported(model, *optimizations):
        raise AttributeError("no such flag")

    names = story(exported=exported)
    said = capsys.readouterr().out.splitlines()
    assert said == [
        f"{w}: LiteRT cannot do that here. no such flag" for w in names.exports
    ]
    assert names.decide.index.tolist() == OTHERS
    assert [len(points(ax)) for ax in plt.gcf().axes] == [3, 3]
    assert len(names.claims) == 1, "only that on repaired networks"


@pytest.mark.parametrize("refused", ["dense", "80 % of units gone"])
def test_nothing_is_judged_if_something_to_compare_with_is_refused(nb, story, refused):
    def exported(model, *optimizations):
        if model is named[refused] and not optimizations:
            raise RuntimeError("refused")
        return nb.exported(model, *optimizations)

    named = {way: what[0] for way, what in story(STORY[:1]).exports.items()}
    names = story(exported=exported)
    assert refused not in names.lite and len(names.lite) == 6
    assert len(names.claims) == 1, "only that on repaired networks"


def test_what_cannot_be_exported_is_an_error(nb, trained):
    with pytest.raises(AttributeError, match="FASTER"):
        nb.exported(trained, "FASTER")
