"""I prune without training: repair gets the accuracy back, from images alone."""

import collections
import itertools

import keras
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from conftest import run_cell
from helpers import (
    Closed,
    DenseOfMyOwn,
    difference,
    equal,
    lowest,
    randomized,
    reloaded,
    rows_of,
)
from hypothesis import given
from hypothesis import strategies as st
from keras import Input, Model, Sequential, layers
from keras.layers import Concatenate, Conv1D, Conv2D, Conv3D, Dense, Flatten

# what a slow reference finds


def patches(layer, x):
    """Return what a layer multiplies by its kernel, cut out by hand."""
    if isinstance(layer, Dense):
        return x
    pads, cuts, sizes = [], [], (layer.kernel_size, layer.strides, layer.dilation_rate)
    for size, taps, step, gap in zip(x.shape[1:-1], *sizes):
        span = (taps - 1) * gap + 1
        lacking = max(0, (-(-size // step) - 1) * step + span - size)
        ways = {"same": (lacking // 2, -(-lacking // 2)), "causal": (span - 1, 0)}
        pads.append(ways.get(layer.padding, (0, 0)))
        end = size + sum(pads[-1]) - span + 1
        cuts.append([slice(tap * gap, tap * gap + end, step) for tap in range(taps)])
    padded = np.pad(x, [(0, 0), *pads, (0, 0)])
    return np.concatenate([padded[:, *cut] for cut in itertools.product(*cuts)], -1)


def reads(model, layer, images):
    """Return what the units of a layer read, a row for each time, 1 for a bias."""
    values = Model(model.inputs, layer.input)(images, training=False)
    rows = patches(layer, np.asarray(values, float))
    rows = rows.reshape(-1, rows.shape[-1])
    return np.hstack([rows, np.ones((len(rows), int(layer.use_bias)))])


def columns(layer):
    """Return the weights of the units of a layer, a column for each, the bias last."""
    return np.vstack([v.numpy().reshape(-1, v.shape[-1]) for v in layer.weights])


def fitted(model):
    """Return the layers of a model that are to be fitted: some are named "stays"."""
    own = (x for x in model.layers if isinstance(x, Dense | Conv1D | Conv2D | Conv3D))
    return [layer for layer in own if not layer.name.startswith("stays")]


def errors(x, weights, wanted, start=0, hold=0):
    """Return the squared error of each unit, and `hold` times its squared moves."""
    moved = hold * np.square(weights - start).sum(axis=0)
    return np.square(x @ weights - wanted).sum(axis=0) + moved


def assert_best(pruned, dense, images, repaired, damping=0.001, near=0.001):
    """Assert that each layer is the best for what it reads, by damped least squares."""
    images = keras.tree.flatten(images)
    for old, teacher, new in zip(*map(fitted, (pruned, dense, repaired)), strict=True):
        x, wanted = reads(repaired, new, images), reads(dense, teacher, images)
        wanted, start, found = wanted @ columns(teacher), columns(old), columns(new)
        keep, exact = start != 0, np.zeros(start.shape)
        keep[-1] |= new.use_bias & keep.any(axis=0)
        hold = damping * np.square(x).mean() * len(x)  # what a move by 1 costs
        gram, aim = x.T @ x + hold * np.eye(x.shape[1]), x.T @ wanted + hold * start
        for unit, kept in enumerate(keep.T):
            exact[kept, unit] = np.linalg.lstsq(gram[kept][:, kept], aim[kept, unit])[0]
        ways = start, found, exact
        lost, left, least = (errors(x, own, wanted, start, hold) for own in ways)
        least = (1 + near) * least + 1e-9 * np.square(wanted).sum(axis=0)
        assert (found[~keep] == 0).all(), f"{new.name} has weights that were zero"
        assert (left <= least).all(), f"{new.name} is not the best"
        assert lost.sum() > 1.01 * least.sum(), f"{new.name} needed no repair"


def thinned(nb, model):
    """Return a copy without half of the weights, biases too, and every fifth unit."""
    pruned, random = nb.copy_of(model), np.random.default_rng(2)
    for v in pruned.weights:
        if v.name in ("kernel", "bias"):
            keep = random.random(v.shape) < 0.5
            v.assign(v * (keep & (np.arange(v.shape[-1]) % 5 < 4)))
    return pruned


def images_for(model, count):
    """Return random images for a model, brighter than 0 on average."""
    return keras.tree.map_structure(lambda x: x + 1, rows_of(model, count=count))


# one layer

KINDS = (
    (Dense, (4, 7)),
    (Conv1D, (10, 3), 4, 3, "same"),
    (Conv1D, (9, 3), 3, 1, "causal", None, 2),
    (Conv2D, (7, 6, 2), (3, 2), (1, 2)),
    (Conv2D, (6, 5, 2), (2, 3), 2, "same"),
    (Conv2D, (7, 6, 3), 3, 1, "same", None, (2, 1)),
    (Conv3D, (4, 5, 4, 2), (2, 3, 2), 1, "same"),
)


@pytest.mark.parametrize("damping", [1e-8, 0.1])
def test_each_kind_of_layer_comes_as_close_as_least_squares_can(nb, damping):
    inputs, outputs = [], []
    for (kind, shape, *own), bias in itertools.product(KINDS, (True, False)):
        inputs.append(Input(shape))
        layer = kind(5, *own, activation="relu", use_bias=bias)
        outputs.append(layer(inputs[-1]))
    dense = randomized(Model(inputs, outputs))
    images, pruned = images_for(dense, 120), thinned(nb, dense)
    repaired = nb.repair(pruned, dense, images, steps=100, damping=damping)
    assert_best(pruned, dense, images, repaired, damping)


def dense_chain(use_bias=True, kind=Dense, **size):
    """Return a chain of Dense layers with random weights."""
    own = {"activation": "relu", "use_bias": use_bias}
    parts = kind(20, **own), kind(15, **own), kind(4, use_bias=use_bias)
    return randomized(Sequential([Input((12,)), *parts]), **size)


def test_a_unit_of_three_weights_takes_three_steps_and_thirty_are_usual(nb):
    dense, random = dense_chain(use_bias=False), np.random.default_rng(0)
    pruned, images = nb.copy_of(dense), rows_of(dense, count=100)
    for kernel in pruned.weights:
        kernel.assign(kernel * (random.random(kernel.shape).argsort(axis=0) < 3))
    none, two, three = (nb.repair(pruned, dense, images, n, 1e-8) for n in (0, 2, 3))
    assert equal(none.get_weights(), pruned.get_weights())
    with pytest.raises(AssertionError, match="not the best"):
        assert_best(pruned, dense, images, two, damping=0)
    assert_best(pruned, dense, images, three, damping=0)
    assert nb.repair.__defaults__ == (30, 0.001), "steps and damping, if not given"


def test_of_many_patches_some_are_enough_whatever_the_seed(nb):
    dense = Sequential([Input((12, 12, 2)), Conv2D(4, 3, padding="same")])
    images, pruned = rows_of(randomized(dense), count=100), thinned(nb, dense)
    images[:75] = images[:75, :1, :1]  # of one color: more than 10,000 patches
    repaired = nb.repair(pruned, dense, images)
    assert_best(pruned, dense, images, repaired, damping=0, near=0.01)
    keras.utils.set_random_seed(1)
    assert equal(nb.repair(pruned, dense, images).get_weights(), repaired.get_weights())


@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 0.001, 1e-6, 1e-9, 0]))
def test_no_unit_gets_worse_whatever_it_reads(nb, seed, damping):
    random = np.random.default_rng(seed)
    rows, inputs, units = random.integers(1, (40, 30, 6))
    x = random.normal(size=(rows, inputs)) * 10.0 ** random.integers(-3, 4)
    x += random.choice([0, 10]) * x[:, :1]  # nearly equal
    x[:, random.random(inputs) < 0.2] = x[0, 0] if seed % 2 else 0
    z = x + random.choice([0, np.abs(x).mean()]) * random.normal(size=x.shape)
    weights = random.normal(size=(inputs, units))
    keep = random.random((inputs, units)) < random.choice([0.2, 0.5, 1])
    x, z, weights, start = map(np.float32, (x, z, weights, weights * keep))
    sums = x.T @ x / rows, x.T @ z @ weights / rows
    found = nb.refitted(start, keep, *sums, random.choice([1, 2, 5, 30, 100]), damping)
    x, wanted = x.astype(float), z.astype(float) @ weights
    rounding = 1e-5 * np.square(wanted).sum(axis=0)
    assert np.isfinite(found).all() and (found[~keep] == 0).all()
    assert (errors(x, found, wanted) <= errors(x, start, wanted) + rounding).all()
    assert (found == start)[~x.any(axis=0)].all(), "a weight of what is always 0 moved"


# a whole network


def in_halves():
    """Return a chain of convolutions and Dense layers in half precision."""
    own, less = {"dtype": "mixed_float16"}, {"dtype": "mixed_bfloat16"}
    parts = Conv2D(8, 3, activation="relu", **own), layers.BatchNormalization(**own)
    parts += Flatten(**own), Dense(12, "relu", **own), Dense(12, "relu", **less)
    return Sequential([Input((6, 6, 2)), *parts, Dense(3)])


def branching():
    """Return a network of dicts and branches, with layers that stay among others."""
    same, first = {"padding": "same"}, {"data_format": "channels_first"}
    image, age = Input((8, 8, 4), name="image"), Input((3,), dtype="string", name="age")
    x = Conv2D(6, 3, activation="relu", **same)(image)
    x = layers.Add()([layers.BatchNormalization()(x), Conv2D(6, 3, **same)(x)])
    twice = Dense(6, "tanh", name="stays_twice")
    sides = layers.SeparableConv2D(5, 3, **same), layers.DepthwiseConv2D(3, **same)
    sides += Conv2D(6, 3, **same, groups=2, name="stays"), Conv2D(4, 1, 1, "same")
    sides += (
        Conv2D(8, 1, **first, name="stays_first"),
        DenseOfMyOwn(5, name="stays_own"),
    )
    sides += twice, twice, layers.Conv2DTranspose(4, 3, **same)
    x = layers.ReLU()(Concatenate()([side(x) for side in sides]))
    words = layers.Embedding(3, 6)(layers.StringLookup(vocabulary=["0", "1"])(age))
    words = words + layers.MultiHeadAttention(2, 4)(words, words)
    y = layers.LSTM(6)(Conv1D(8, 3, padding="causal")(words))
    part = Sequential([Input((3, 6)), Dense(7, "relu"), Flatten()])
    z = Model(part.inputs, Dense(5)(part.outputs[0]))(words)
    x = Concatenate()([Flatten()(Conv2D(5, 3, 2, activation="relu")(x)), y, z])
    ends = {"image": image, "age": age}, [Dense(1)(x), Dense(3)(Dense(8, "gelu")(x))]
    return Model(*ends, name="branching")


def state(model):
    """Return whether a model is compiled, how often layers are called, and weights."""
    called = [len(layer._inbound_nodes) for layer in model.layers]
    return model.compiled, called, model.get_weights()


@pytest.fixture(scope="module", params=[dense_chain, in_halves, branching])
def case(nb, request):
    """Return two compiled networks, images, what is repaired, and how they were."""
    keras.utils.set_random_seed(0)
    dense = randomized(request.param())
    models = thinned(nb, dense), dense
    for own in models:
        own.compile("sgd", lambda targets, outputs: keras.ops.sum(outputs - targets))
    images = images_for(dense, 2300 if request.param is dense_chain else 130)
    if request.param is branching:
        images["age"] = images["age"].astype(int).astype(str)  # "0", "1" and others
    before = [state(own) for own in models]
    return *models, images, nb.repair(*models, images, steps=150), before


def test_every_layer_is_the_best_for_what_it_reads(case):
    assert_best(*case[:4], near=0.005)


def test_other_layers_and_both_models_stay_as_they_are(case):
    pruned, dense, _, repaired, before = case
    for layer, now in zip(pruned.layers, repaired.layers, strict=True):
        if layer not in fitted(pruned):
            assert equal(layer.get_weights(), now.get_weights()), layer.name
    for own, (compiled, called, values) in zip((pruned, dense), before):
        assert state(own)[:2] == (compiled, called) and equal(own.get_weights(), values)


def test_what_comes_back_is_a_model_like_any_other(nb, tmp_path, case):
    pruned, dense, images, repaired, ((_, called, _), _) = case
    assert type(repaired) is type(pruned) and state(repaired)[:2] == (False, called)
    assert difference(repaired, reloaded(repaired, tmp_path), images) == 0
    small, halves = nb.shrink(repaired), "float16" in repaired.layers[0].compute_dtype
    assert difference(repaired, small, images) <= (5e-3 if halves else 1e-5)
    same = nb.repair(dense, dense, images)
    assert difference(dense, same, images) < (0.02 if halves else 0.003)


# images of all kinds, what is refused, and accuracy


def two():
    """Return a network with two inputs."""
    ends = [Input((12,), name="z"), Input((12,), name="a")]
    return randomized(Model(ends, Dense(3)(Concatenate()([Dense(9)(x) for x in ends]))))


def test_images_are_bytes_or_floats_in_the_order_of_the_inputs_or_named(nb):
    dense, random = two(), np.random.default_rng(0)
    pruned, images = thinned(nb, dense), random.integers(0, 256, (2, 200, 12))
    few, many, named = map(images.astype, ("uint8", "float32", "float64"))
    asked = [*few], tuple(many), {"a": named[1], "z": named[0]}
    ways = [nb.repair(pruned, dense, x).get_weights() for x in asked]
    assert equal(ways[0], ways[1]) and equal(ways[0], ways[2])
    assert not equal(ways[0], pruned.get_weights())


BOTH, NAN = ("pruned", "dense"), "finite, not nan"
COUNT = "images for each input, equally many"
REFUSED = {
    "shrunk": ("not shrunk", lambda small, x: {"pruned": small}),
    "other kinds": (
        "`pruned` was",
        lambda *_: {"dense": dense_chain(kind=DenseOfMyOwn)},
    ),
    "unbuilt": ("a graph", lambda *_: dict.fromkeys(BOTH, Sequential([Dense(4)]))),
    "own class": ("cannot copy 'own'", lambda *_: {"dense": Closed()}),
    "no image": (COUNT, lambda _, x: {"images": x[:0]}),
    "two arrays": (COUNT, lambda _, x: {"images": [x, x]}),
    "uneven": (COUNT, lambda _, x: dict.fromkeys(BOTH, two()) | {"images": [x, x[1:]]}),
    "no dict": ("dict.*'branching'", lambda *_: {"dense": branching()}),
    "too narrow": ("shape", lambda _, x: {"images": x[:, :5]}),
    "damping": ("damping .* not -0.1", lambda *_: {"damping": -0.1}),
    "nan damping": (NAN, lambda *_: {"damping": np.nan}),
    "inf in images": ("finite, not inf", lambda _, x: {"images": x + np.inf}),
    "nan in a bias": (NAN, lambda *_: {"pruned": dense_chain(shift=np.nan)}),
    "nan before": (NAN, lambda *_: {"dense": dense_chain(gain=np.nan)}),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_repaired_is_named(nb, case):
    (match, change), dense = REFUSED[case], dense_chain()
    pruned, images = nb.prune(dense, "unit", 0.5), rows_of(dense)
    whole = {"pruned": pruned, "dense": dense, "images": images}
    with pytest.raises(ValueError, match=match):
        nb.repair(**whole | change(nb.shrink(pruned), images))


def test_accuracy_comes_back_without_labels(nb, data):
    dense = nb.train(nb.build_mlp((60, 30)), data, 3, seed=0)
    for rule, sparsity, gain in (("weight", 0.9, 5), ("unit", 0.7, 10)):
        pruned = nb.prune(dense, rule, sparsity)
        ways = pruned, nb.repair(pruned, dense, data.x_train), dense
        lost, left, right = (nb.test_accuracy(x, data, 250) for x in ways)
        assert left >= lost + gain and left > (lost + right) / 2, rule


# cells and their pictures


def test_a_unit_is_shown_as_it_was_and_with_better_weights(nb, data, figures):
    model = nb.build_mlp((30, 64, 48), seed=0)
    run_cell(nb, "repair-steps", model=model, mnist=data)
    x = reads(model, model.get_layer("hidden_3"), [data.x_train])
    kernel, axes = model.get_weights()[-2], plt.gcf().axes
    sums, left = axes[0].lines[0].get_xdata(), ~lowest(np.abs(kernel), 0.97)
    unit = np.abs(x[::20] @ kernel - sums[:, None]).sum(axis=0).argmin()
    keep, wanted = left[:, unit], x @ kernel[:, unit]
    assert keep.sum() == np.sort(left.sum(axis=0))[24] > 0, "it is the median"
    ways = kernel[keep, unit], np.linalg.lstsq(x[:, keep], wanted)[0]
    for ax, own, how in zip(axes, ways, ("as they were", "chosen anew"), strict=True):
        assert ax.get_title() == f"{keep.sum()} of 64 weights, {how}"
        dots = np.transpose([wanted, x[:, keep] @ own])[::20]
        assert np.allclose(ax.lines[0].get_xydata(), dots, atol=1e-4)


def slow_functions():
    """Return accuracies, drawn for each way to get there, and what draws them."""
    drawn = collections.defaultdict(np.random.default_rng(0).random)
    own = {"prune": lambda *x: x, "repair": lambda *x: x, "check": lambda *x: None}
    own["evaluate"] = lambda *x: {"accuracy": drawn[x]}
    return drawn, own | {"test_accuracy": lambda x, data: drawn[x, data.title]}


def test_repaired_networks_are_tabled_as_means_and_drawn(nb, data, figures):
    datasets = {x: data._replace(title=x, x_train=range(6000)) for x in "AB"}
    networks, (drawn, given) = {"A": "ab", "B": "cd"}, slow_functions()
    cases = [*itertools.product("AB", ("weight", "unit"))]
    places = pd.MultiIndex.from_tuples([("accuracy", *case) for case in cases])
    shot = pd.DataFrame(np.arange(40).reshape(10, 4) / 100, nb.SPARSITIES, places)
    given |= {"networks": networks, "datasets": datasets, "by_sparsity": shot}
    table = run_cell(nb, "repairs", **given).recovered.sort_index()
    assert [*table.loc[cases[0]].index] == ["best public", "one-shot", "repaired"]
    assert [*table] == [0.8, 0.9, 0.95, 0.97, 0.99]
    assert [*table.xs("best public", level=2)[0.8]] == [90.8, 97.8, 66.2, 88.0]
    for (title, rule), s in itertools.product(cases, table):
        _, once, mean = table[s][title, rule]
        each = [((n, rule, s), n, range(5000)) for n in networks[title]]
        assert once == 100 * shot["accuracy", title, rule][s]
        assert mean == pytest.approx(sum(drawn[n, title] for n in each) / 2)
    assert len(drawn) == 40, "nothing else is measured"
    given["baseline"] = pd.DataFrame({("accuracy", "mean"): [0.9, 0.8]}, [*"AB"])
    run_cell(nb, "repairs-drawn", recovered=table, **given)
    for ax, title, whole in zip(plt.gcf().axes, "AB", (90, 80), strict=True):
        *lines, dense = ax.lines
        assert ax.get_title() == title and np.allclose(dense.get_ydata(), whole)
        assert all([*line.get_xdata()] == [*table] for line in lines)
        rows = table.loc[title].iterrows()
        due = {f"{way}, {rule}s": [*x] for (rule, way), x in rows}
        assert due == {line.get_label(): [*line.get_ydata()] for line in lines}


def test_fewer_images_are_tried_on_validation_rows(nb, data):
    rows = data._replace(x_train=range(6000), x_val="x", y_val="y")
    drawn, given = slow_functions()
    given |= {"model": "m", "mnist": rows}
    few = run_cell(nb, "few-images", **given).few
    cases = ("90% of the units", "unit", 0.9), ("95% of the weights", "weight", 0.95)
    assert [*few] == [0, 100, 250, 1000, 5000] and len(few) == 2
    for (name, *case), n in itertools.product(cases, few):
        own = (("m", *case), "m", range(n)) if n else ("m", *case)
        assert few[n][name] == 100 * drawn[own, "x", "y"]
    assert len(drawn) == 10, "nothing else is measured"
