"""I prune without training: repair gets the accuracy back, from images alone."""

import collections
import itertools
import math

import keras
import numpy as np
import pytest
from helpers import (
    Closed,
    answers,
    difference,
    lowest,
    randomized,
    reloaded,
    rows_of,
    same_weights,
)
from keras import Input, Model, Sequential
from keras.layers import Concatenate, Conv1D, Conv2D, Conv3D, Dense, Flatten
from test_02_units import (
    NETWORKS,
    OwnDense,
    mixed_precision,
    nodes,
    random_network,
    siamese,
)

FITTED = Dense, Conv1D, Conv2D, Conv3D
Case = collections.namedtuple("Case", "build dense pruned images repaired values calls")


# what a slow reference finds


def patches(layer, x):
    """Return what a layer multiplies by its kernel, cut out by hand."""
    if isinstance(layer, Dense):
        return x
    pads, cuts, sizes = [], [], (layer.kernel_size, layer.strides, layer.dilation_rate)
    for size, taps, step, gap in zip(x.shape[1:-1], *sizes):
        span = (taps - 1) * gap + 1
        lacking = max(0, (math.ceil(size / step) - 1) * step + span - size)
        same = lacking // 2, lacking - lacking // 2
        ways = {"valid": (0, 0), "same": same, "causal": (span - 1, 0)}
        pads.append(ways[layer.padding])
        end = size + sum(pads[-1]) - span + 1
        cuts.append([slice(tap * gap, tap * gap + end, step) for tap in range(taps)])
    padded = np.pad(x, [(0, 0), *pads, (0, 0)])
    return np.concatenate([padded[:, *cut] for cut in itertools.product(*cuts)], -1)


def rows_for(layer, x):
    """Return what the units of a layer read, a row for each time, 1 for a bias."""
    rows = patches(layer, np.asarray(x, float))
    rows = rows.reshape(-1, rows.shape[-1])
    return np.hstack([rows, np.ones((len(rows), int(layer.use_bias)))])


def columns(layer):
    """Return the weights of the units of a layer, a column for each, the bias last."""
    return np.vstack([v.numpy().reshape(-1, v.shape[-1]) for v in layer.weights])


def free(layer):
    """Return which weights of a layer may change."""
    keep = columns(layer) != 0
    if layer.use_bias:
        keep[-1] |= keep[:-1].any(axis=0)
    return keep


def errors(x, weights, wanted):
    """Return the squared error of each unit."""
    return np.square(x @ weights - wanted).sum(axis=0)


def best(x, wanted, start, keep, damping):
    """Return what is best for each unit by itself, and a function for what it costs.

    That is the squared error, and `damping` times the mean square of `x` for each row
    and each weight that moves by 1.
    """
    hold = np.sqrt(damping * np.square(x).mean() * len(x))
    small = np.linalg.qr(np.hstack([x, wanted]), "r")  # fewer rows, the same errors
    rows, aims = np.hsplit(small, [x.shape[1]])
    found = np.zeros(start.shape)
    for unit, kept in enumerate(keep.T):
        held = np.vstack([rows[:, kept], hold * np.eye(kept.sum())])
        aim = np.append(aims[:, unit], hold * start[kept, unit])
        found[kept, unit] = np.linalg.lstsq(held, aim)[0]

    def cost(weights):
        """Return what weights cost, for each unit."""
        moved = np.square(hold * (weights - start)).sum(axis=0)
        return errors(x, weights, wanted) + moved

    return found, cost


def read_by(model, layer, images):
    """Return what a layer of a model reads."""
    images = keras.tree.flatten(images)
    return Model(model.inputs, layer.input)(images, training=False).numpy()


def is_fitted(layer):
    """Return whether a layer, called once, is to be fitted."""
    return type(layer) in FITTED and getattr(layer, "groups", 1) == 1


def problems(pruned, dense, images, repaired):
    """Yield what each layer reads, should sum, may change, had and has."""
    for old, teacher, new in zip(pruned.layers, dense.layers, repaired.layers):
        if is_fitted(old) and not np.array_equal(columns(old), columns(new)):
            x = rows_for(new, read_by(repaired, new, images))
            z = rows_for(teacher, read_by(dense, teacher, images))
            yield x, z @ columns(teacher), free(old), columns(old), columns(new)


def slowly_repaired(pruned, dense, images, damping):
    """Return the answers of a chain, whose layers are fitted one after another."""
    x = z = np.asarray(images, float)
    for layer, teacher in zip(pruned.layers, dense.layers):
        if isinstance(layer, Flatten):
            x, z = x.reshape(len(x), -1), z.reshape(len(z), -1)
            continue
        shape = *patches(layer, x).shape[:-1], -1
        reads, aims = rows_for(layer, x), rows_for(teacher, z) @ columns(teacher)
        weights, _ = best(reads, aims, columns(layer), free(layer), damping)
        x, z = (reads @ weights).reshape(shape), aims.reshape(shape)
        if layer.activation is keras.activations.relu:
            x, z = np.maximum(x, 0), np.maximum(z, 0)
    return x


def thinned(nb, model, seed=2):
    """Return a copy without half of the weights of each kernel, by chance."""
    pruned, random = nb.copy_of(model), np.random.default_rng(seed)
    for variable in pruned.weights:
        if variable.name == "kernel":
            variable.assign(variable * (random.random(variable.shape) < 0.5))
    return pruned


def images_for(model, count):
    """Return random images for a model, each lighter or darker as a whole."""
    images = rows_of(model, count=count)
    light = np.random.default_rng(0).normal(0, 2, count).astype("float32")
    return images + light.reshape(-1, *[1] * (images.ndim - 1))


def half_and_third(kernel, sparsity):
    """Return a mask without half of the weights, and without every third unit."""
    keep = ~lowest(np.abs(kernel), sparsity)
    keep[..., ::3] = False
    return keep


def dense_chain(use_bias=True):
    """Return a chain of Dense layers with random weights."""
    own = {"activation": "relu", "use_bias": use_bias}
    parts = Dense(20, **own), Dense(15, **own), Dense(4, use_bias=use_bias)
    return randomized(Sequential([Input((12,)), *parts]))


def conv_chain():
    """Return a chain of convolutions and Dense layers with random weights."""
    parts = Conv2D(6, 3, padding="same", activation="relu"), Conv2D(5, 3, 2, "same")
    parts += Flatten(), Dense(9, "relu"), Dense(3)
    return randomized(Sequential([Input((6, 6, 2)), *parts]))


def sequences():
    """Return a chain that begins with Dense layers on sequences."""
    parts = Dense(10, "relu"), Dense(6, "relu"), Flatten(), Dense(8, "relu"), Dense(3)
    return randomized(Sequential([Input((4, 5)), *parts]))


# one layer

ONE = {
    "dense": (Dense, (9,), {}),
    "sequence": (Dense, (4, 7), {}),
    "1D": (Conv1D, (9, 3), {"kernel_size": 3}),
    "1D, same, strides": (
        Conv1D,
        (10, 3),
        {"kernel_size": 4, "padding": "same", "strides": 3},
    ),
    "1D, causal, dilated": (
        Conv1D,
        (9, 3),
        {"kernel_size": 3, "padding": "causal", "dilation_rate": 2},
    ),
    "2D": (Conv2D, (7, 6, 2), {"kernel_size": (3, 2), "strides": (1, 2)}),
    "2D, same, even": (
        Conv2D,
        (6, 5, 2),
        {"kernel_size": (2, 3), "padding": "same", "strides": 2},
    ),
    "2D, same, dilated": (
        Conv2D,
        (7, 6, 3),
        {"kernel_size": 3, "padding": "same", "dilation_rate": (2, 1)},
    ),
    "3D": (Conv3D, (4, 5, 4, 2), {"kernel_size": (2, 3, 2), "padding": "same"}),
}


@pytest.mark.parametrize("case", ONE)
@pytest.mark.parametrize("use_bias", [True, False])
def test_a_layer_comes_as_close_as_least_squares_can(nb, case, use_bias):
    kind, shape, own = ONE[case]
    layer = kind(5, **own, use_bias=use_bias, activation="relu")
    dense = randomized(Sequential([Input(shape), layer]))
    images, pruned = images_for(dense, 60), thinned(nb, dense)
    repaired = nb.repair(pruned, dense, images, steps=100, damping=1e-8)
    ((x, wanted, keep, start, found),) = problems(pruned, dense, images, repaired)
    exact, _ = best(x, wanted, start, keep, 0)
    assert (found[~keep] == 0).all()
    lost, least = (errors(x, weights, wanted) for weights in (start, exact))
    assert lost.sum() > 1.5 * least.sum() and (least > 1e-4 * lost).all()
    assert (errors(x, found, wanted) <= 1.001 * least).all()


def test_a_unit_of_three_weights_takes_three_steps(nb):
    dense = dense_chain(use_bias=False)
    pruned, images = nb.copy_of(dense), rows_of(dense, count=100)
    random = np.random.default_rng(0)
    for kernel in pruned.weights:
        order = random.random(kernel.shape).argsort(axis=0)
        kernel.assign(kernel * (order < 3))
    repaired = nb.repair(pruned, dense, images, steps=3, damping=1e-8)
    tasks = [*problems(pruned, dense, images, repaired)]
    assert len(tasks) == 3
    for x, wanted, keep, start, found in tasks:
        least = errors(x, best(x, wanted, start, keep, 0)[0], wanted)
        assert (errors(x, found, wanted) <= 1.001 * least).all()


def test_damping_holds_weights_at_the_values_that_they_had(nb):
    dense = dense_chain()
    pruned, images = thinned(nb, dense), 100 * rows_of(dense, count=60)
    ways = [nb.repair(pruned, dense, images, 50, d) for d in (1e-3, 1, 100, 1e6)]
    moved = []
    for d, repaired in zip((1e-3, 1, 100, 1e6), ways):
        x, wanted, keep, start, found = next(problems(pruned, dense, images, repaired))
        assert found == pytest.approx(best(x, wanted, start, keep, d)[0], 1e-3, 1e-4)
        moved.append(np.abs(found - start).max())
    assert moved == sorted(moved, reverse=True) and moved[0] > 1000 * moved[-1] > 0
    assert same_weights(nb.repair(pruned, dense, images, 0), pruned.get_weights())


def test_of_many_patches_some_are_enough(nb):
    layer = Conv2D(4, 3, padding="same")
    dense = randomized(Sequential([Input((12, 12, 2)), layer]))
    images, pruned = rows_of(dense, count=100), thinned(nb, dense)
    images[60:] = images[60:, :1, :1]  # of one color
    repaired = nb.repair(pruned, dense, images)
    ((x, wanted, keep, start, found),) = problems(pruned, dense, images, repaired)
    assert len(x) == 14_400, "a batch of 100 has more than 10,000 patches"
    least = errors(x, best(x, wanted, start, keep, 0)[0], wanted)
    assert (errors(x, found, wanted) <= 1.01 * least).all()
    for seed in (1, 2):
        keras.utils.set_random_seed(seed)
        again = nb.repair(pruned, dense, images)
        assert same_weights(again, repaired.get_weights())


# a whole network


@pytest.mark.parametrize(
    ("build", "count"), [(dense_chain, 1500), (conv_chain, 250), (sequences, 230)]
)
def test_layers_are_fitted_one_after_another(nb, build, count):
    dense = build()
    pruned, images = thinned(nb, dense), images_for(dense, count)
    repaired = nb.repair(pruned, dense, images, steps=100, damping=0.01)
    slow = slowly_repaired(pruned, dense, images, 0.01)
    found, *_ = answers(repaired, images)
    assert np.abs(found - slow).max() <= 1e-3 * np.abs(slow).max()
    lost, left = (difference(dense, own, images) for own in (pruned, repaired))
    assert left < 0.8 * lost


@pytest.fixture(scope="module", params=NETWORKS, ids=lambda build: build.__name__)
def case(nb, request):
    """Return a network of any kind, pruned and repaired, and how it was before."""
    dense = random_network(request.param)
    pruned, images = nb.prune(dense, half_and_third, 0.5), rows_of(dense, count=24)
    both = pruned, dense
    before = [own.get_weights() for own in both], [nodes(own) for own in both]
    repaired = nb.repair(pruned, dense, images, steps=100, damping=0.01)
    return Case(request.param, dense, pruned, images, repaired, *before)


def test_every_layer_is_the_best_for_what_it_reads(case):
    found = [*problems(case.pruned, case.dense, case.images, case.repaired)]
    shared = 2 if case.build is siamese else 0
    assert len(found) == sum(map(is_fitted, case.dense.layers)) - shared
    for x, wanted, keep, start, weights in found:
        exact, cost = best(x, wanted, start, keep, 0.01)
        total = np.square(wanted).sum(axis=0)
        assert (weights[~keep] == 0).all()
        assert (cost(weights) <= 1.001 * cost(exact) + 1e-9 * total).all()


def test_other_layers_stay_as_they_are_and_zeros_zero(case):
    for layer, now in zip(case.pruned.layers, case.repaired.layers, strict=True):
        if not is_fitted(layer):
            assert same_weights(layer, now.get_weights())
    for old, new in zip(case.pruned.weights, case.repaired.weights, strict=True):
        if old.name == "kernel":
            assert ((old.numpy() == 0) == (new.numpy() == 0)).all()


def test_both_models_are_left_as_they_were(case):
    for own, values, calls in zip((case.pruned, case.dense), case.values, case.calls):
        assert same_weights(own, values) and nodes(own) == calls


def test_what_comes_back_is_a_model_like_any_other(nb, tmp_path, case):
    repaired = case.repaired
    assert type(repaired) is type(case.pruned) and not repaired.compiled
    assert nodes(repaired) == nodes(case.pruned)
    assert difference(repaired, reloaded(repaired, tmp_path)) == 0
    small = nb.shrink(repaired)
    assert small.count_params() == nb.shrink(case.pruned).count_params()
    assert difference(repaired, small) <= (
        5e-3 if case.build is mixed_precision else 1e-5
    )
    assert nb.measured_sparsity(nb.prune(repaired, "weight", 0.9)) > 0.85


def test_what_was_not_pruned_answers_as_before(nb, case):
    repaired = nb.repair(case.dense, case.dense, case.images)
    assert difference(case.dense, repaired) < 0.003


# what stays, and what never gets worse


@pytest.mark.parametrize("name", ["weight", "unit", "blocks", "n:m"])
def test_kernels_keep_their_pattern_and_living_units_get_a_bias(nb, name):
    rule = {"blocks": nb.block_mask((4, 4)), "n:m": nb.n_m_mask(1, 4)}.get(name, name)
    parts = Conv2D(8, 3, activation="relu"), Flatten(), Dense(12, "relu")
    parts += Dense(8, "relu"), Dense(4)
    keras.utils.set_random_seed(0)
    dense = Sequential([Input((6, 6, 4)), *parts])  # all biases are 0
    pruned, images = nb.prune(dense, rule, 0.9), rows_of(dense, count=60)
    repaired, dead = nb.repair(pruned, dense, images), 0
    for own, now in zip(pruned.layers, repaired.layers):
        if own.weights:
            kernel, alive = own.kernel.numpy(), free(own)[-1]
            assert ((now.kernel.numpy() == 0) == (kernel == 0)).all()
            assert ((now.bias.numpy() != 0) == alive).all()
            dead += np.count_nonzero(~alive)
    assert not same_weights(repaired, pruned.get_weights())
    assert dead > 0 or name == "n:m"


def assert_nothing_gets_worse(pruned, dense, images, repaired):
    """Assert that no unit's error grows, given what it reads in the repaired model."""
    for x, wanted, _, start, found in problems(pruned, dense, images, repaired):
        rounding = 1e-6 * np.square(wanted).sum(axis=0)
        assert (errors(x, found, wanted) <= errors(x, start, wanted) + rounding).all()


@pytest.mark.parametrize("build", [dense_chain, conv_chain, sequences])
@pytest.mark.parametrize(("steps", "count"), [(1, 2), (1, 30), (30, 2), (30, 30)])
def test_no_unit_gets_worse(nb, build, steps, count):
    dense = randomized(build())
    pruned, images = thinned(nb, dense), rows_of(dense, count=count)
    repaired = nb.repair(pruned, dense, images, steps)
    assert_nothing_gets_worse(pruned, dense, images, repaired)
    assert not same_weights(repaired, pruned.get_weights())


HARD = {
    "few": lambda x: x[:3],
    "one": lambda x: x[:1],
    "zeros": lambda x: 0 * x,
    "equal inputs": lambda x: np.repeat(x[:, :1], 12, axis=1),
    "nearly equal": lambda x: 5 + x[:, :1] + 1e-4 * x,
    "other sizes": lambda x: x * 10.0 ** np.arange(-3, 3, 0.5),
    "large": lambda x: 1e6 * x,
}


@pytest.mark.parametrize("damping", [0.001, 0])
@pytest.mark.parametrize("kind", HARD)
def test_hard_images_do_no_harm(nb, kind, damping):
    dense, images = dense_chain(), np.random.default_rng(0).normal(size=(60, 12))
    pruned, images = thinned(nb, dense), HARD[kind](images).astype("float32")
    repaired = nb.repair(pruned, dense, images, damping=damping)
    assert all(np.isfinite(values).all() for values in repaired.get_weights())
    assert_nothing_gets_worse(pruned, dense, images, repaired)


@pytest.mark.parametrize("damping", [1, 0.001, 1e-6, 1e-9, 0])
def test_random_problems_get_no_worse(nb, damping):
    for seed in range(100):
        random = np.random.default_rng(seed)
        rows, inputs, units = random.integers(1, (40, 30, 6))
        x = random.normal(size=(rows, inputs)) * 10.0 ** random.integers(-3, 4)
        x += random.choice([0, 10]) * x[:, :1]
        x[:, random.random(inputs) < 0.2] = x[0, 0] if seed % 2 else 0
        z = x + random.choice([0, np.abs(x).mean()]) * random.normal(size=x.shape)
        weights = random.normal(size=(inputs, units))
        keep = random.random((inputs, units)) < random.choice([0.2, 0.5, 1])
        x, z, weights, start = map(np.float32, (x, z, weights, weights * keep))
        steps = random.choice([1, 2, 5, 30, 100])
        sums = x.T @ x / rows, x.T @ z @ weights / rows
        found = nb.refitted(start, keep, *sums, steps, damping)
        x, wanted = x.astype(float), z.astype(float) @ weights
        rounding = 1e-5 * np.square(wanted).sum(axis=0)
        assert np.isfinite(found).all() and (found[~keep] == 0).all()
        assert (errors(x, found, wanted) <= errors(x, start, wanted) + rounding).all()


@pytest.mark.parametrize("damping", [0.001, 0])
def test_what_reads_a_unit_that_is_always_0_keeps_its_weights(nb, damping):
    dense = dense_chain()
    first = dense.layers[0]
    first.kernel.assign(first.kernel * (np.arange(20) != 3))
    first.bias.assign(np.where(np.arange(20) == 3, -1, first.bias))
    pruned = thinned(nb, dense)
    repaired = nb.repair(pruned, dense, rows_of(dense, count=90), damping=damping)
    old, new = (own.layers[1].kernel.numpy() for own in (pruned, repaired))
    assert np.array_equal(old[3], new[3]) and not np.array_equal(old[2], new[2])
    assert all(np.isfinite(values).all() for values in repaired.get_weights())


# models and images of all kinds


@pytest.mark.parametrize(
    ("takes", "give"), [(list, list), (list, tuple), (list, dict), (dict, dict)]
)
def test_images_come_in_any_structure_that_the_model_takes(nb, takes, give):
    inputs = {name: Input((5,), name=name) for name in "za"}
    sides = [Dense(9, "relu", name=f"reads_{name}")(x) for name, x in inputs.items()]
    tensors = inputs if takes is dict else [*inputs.values()]
    dense = randomized(Model(tensors, Dense(3)(Concatenate()(sides))))
    random = np.random.default_rng(0)
    rows = {"z": random.normal(3, 1, (80, 5)), "a": random.normal(0, 1, (80, 5))}
    pruned, images = thinned(nb, dense), rows if give is dict else give(rows.values())
    repaired = nb.repair(pruned, dense, images, steps=100)
    for name, x in rows.items():
        layer, teacher, start = (
            own.get_layer(f"reads_{name}") for own in (repaired, dense, pruned)
        )
        x = rows_for(layer, x)
        task = x, x @ columns(teacher), columns(start), free(start)
        exact, cost = best(*task, 0.001)
        assert (cost(columns(layer)) <= 1.001 * cost(exact)).all()


def test_a_list_is_not_taken_for_a_dict(nb):
    """Its order is not that of the names, and Keras refuses it, too."""
    ends = {name: keras.Input((3,), name=name) for name in ("b", "a")}
    x = keras.layers.Subtract()([ends["b"], ends["a"]])
    dense = randomized(keras.Model(ends, keras.layers.Dense(4)(x), name="two"))
    rows = rows_of(dense)
    with pytest.raises(ValueError, match=r"dict.*'two'"):
        nb.repair(dense, dense, [rows["b"], rows["a"]])


def test_images_may_be_words(nb):
    lookup = keras.layers.StringLookup(vocabulary=list("abcdefgh"))
    parts = lookup, keras.layers.Embedding(9, 6), keras.layers.Flatten()
    ends = keras.layers.Dense(20, "tanh"), keras.layers.Dense(3)
    inputs = keras.Input((2,), dtype="string")
    dense = randomized(keras.Sequential([inputs, *parts, *ends]))
    words = np.random.default_rng(0).choice([*"abcdefgh"], (200, 2))
    pruned = nb.prune(dense, "weight", 0.5)
    better = nb.repair(pruned, dense, words)
    assert difference(better, dense, words) < difference(pruned, dense, words) / 2


def test_images_are_bytes_or_floats(nb, model, data):
    pruned, images = nb.prune(model, "weight", 0.9), data.x_train[:200]
    ways = [nb.repair(pruned, model, x) for x in (images, images.astype("float32"))]
    assert same_weights(ways[0], ways[1].get_weights())
    dense = dense_chain()
    pruned, images = thinned(nb, dense), images[:, 9, 8:20]
    ways = [nb.repair(pruned, dense, x) for x in (images, images.astype("float64"))]
    assert same_weights(ways[0], ways[1].get_weights())
    assert_nothing_gets_worse(pruned, dense, images.astype("float32"), ways[0])


@keras.saving.register_keras_serializable("tests")
class Sized(Model):
    """A model with a graph, of a class that only notes how large it is."""

    def __init__(self, size, **kwargs):
        """Build the graph."""
        inputs = Input((6,))
        super().__init__(inputs, Dense(3)(Dense(size, "relu")(inputs)), **kwargs)
        self.size = size

    def get_config(self):
        """Return the size."""
        return {"size": self.size}


def test_a_model_of_a_class_of_ones_own_that_has_a_graph(nb):
    dense = randomized(Sized(12))
    pruned, images = nb.prune(dense, "unit", 0.5), rows_of(dense, count=60)
    repaired = nb.repair(pruned, dense, images)
    assert difference(dense, repaired, images) < difference(dense, pruned, images)


@pytest.mark.parametrize(
    "layer", [OwnDense(8), Conv2D(4, 3, data_format="channels_first")]
)
def test_what_is_not_understood_stays(nb, layer):
    inputs = Input((6, 8, 3))
    x = Flatten()(layer(Conv2D(6, 1, activation="relu")(inputs)))
    dense = randomized(Model(inputs, Dense(3)(x)))
    pruned, images = thinned(nb, dense), rows_of(dense, count=30)
    repaired = nb.repair(pruned, dense, images)
    left = pruned.layers[2].get_weights()
    assert len(left) == 2 and same_weights(repaired.layers[2], left)
    assert len([*problems(pruned, dense, images, repaired)]) == 2
    assert_nothing_gets_worse(pruned, dense, images, repaired)


def test_layers_in_half_precision_are_repaired(nb):
    own = {"activation": "relu", "dtype": "mixed_bfloat16"}
    parts = Conv2D(8, 3, **own), Flatten(dtype="mixed_bfloat16"), Dense(12, **own)
    dense = randomized(Sequential([Input((6, 6, 2)), *parts, Dense(3)]))
    pruned, images = thinned(nb, dense), rows_of(dense, count=100)
    repaired, same = (nb.repair(x, dense, images) for x in (pruned, dense))
    assert difference(dense, same, images) < 0.02
    lost, left = (difference(dense, x, images) for x in (pruned, repaired))
    assert left < 0.8 * lost


def test_compiled_models_stay_compiled_and_what_comes_back_is_not(nb):
    dense = dense_chain()
    pruned = thinned(nb, dense)
    for own in (pruned, dense):
        own.compile("sgd", lambda targets, outputs: keras.ops.sum(outputs - targets))
    repaired = nb.repair(pruned, dense, rows_of(dense))
    assert [x.compiled for x in (pruned, dense, repaired)] == [True, True, False]


# what is refused


def halved(nb, model):
    """Return a model without half of its units."""
    return nb.shrink(nb.prune(model, "unit", 0.5))


def spoiled(nb, model, number, value):
    """Return a copy of a model with one value in one of its weights changed."""
    copy = nb.copy_of(model)
    values = copy.weights[number].numpy()
    values.flat[0] = value
    copy.weights[number].assign(values)
    return copy


def both(model, **others):
    """Return what to repair if both models are the same."""
    return {"pruned": model, "dense": model, **others}


REFUSED = {
    "shrunk": ("not shrunk", lambda nb, x, m: {"pruned": halved(nb, m)}),
    "shrunk before": ("not shrunk", lambda nb, x, m: {"dense": halved(nb, m)}),
    "other layers": ("`pruned` was", lambda nb, x, m: {"dense": sequences()}),
    "no input": ("with a graph", lambda nb, x, m: both(Sequential([Dense(4)]))),
    "own class": ("cannot copy 'own'", lambda nb, x, m: both(Closed())),
    "no image": ("images for each input", lambda nb, x, m: {"images": x[:0]}),
    "no array": ("images for each input", lambda nb, x, m: {"images": []}),
    "two arrays": ("images for each input", lambda nb, x, m: {"images": [x, x]}),
    "one of two": ("for each input", lambda nb, x, m: both(siamese(), images=[x])),
    "unequal": ("equally many", lambda nb, x, m: both(siamese(), images=[x, x[:3]])),
    "too narrow": ("shape", lambda nb, x, m: {"images": x[:, :5]}),
    "too few axes": ("shape", lambda nb, x, m: {"images": x[0]}),
    "damping": ("damping .* not -0.1", lambda nb, x, m: {"damping": -0.1}),
    "nan damping": ("finite, not nan", lambda nb, x, m: {"damping": np.nan}),
    "nan in images": ("finite, not nan", lambda nb, x, m: {"images": x + np.nan}),
    "inf in images": ("finite, not inf", lambda nb, x, m: {"images": x + np.inf}),
    "nan in a kernel": (
        "not nan",
        lambda nb, x, m: {"pruned": spoiled(nb, m, 0, np.nan)},
    ),
    "nan in a bias": (
        "not nan",
        lambda nb, x, m: {"pruned": spoiled(nb, m, 5, np.nan)},
    ),
    "nan before": ("not nan", lambda nb, x, m: {"dense": spoiled(nb, m, 4, np.nan)}),
    "inf before": (
        "finite, not",
        lambda nb, x, m: {"dense": spoiled(nb, m, 1, np.inf)},
    ),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.filterwarnings("ignore:invalid value")
def test_what_cannot_be_repaired_is_named(nb, case):
    match, change = REFUSED[case]
    dense = dense_chain()
    images = rows_of(dense)
    whole = {"pruned": thinned(nb, dense), "dense": dense, "images": images}
    with pytest.raises(ValueError, match=match):
        nb.repair(**whole | change(nb, images, dense))


# accuracy


@pytest.fixture(scope="module")
def trained(nb, data):
    """Return a small network and a small convolutional one, both trained."""
    return [
        nb.train(nb.build_mlp((60, 30)), data, 8, seed=0),
        nb.train(nb.build_cnn((4, 8), 24), data, 4, seed=0),
    ]


@pytest.mark.parametrize(
    ("which", "rule", "sparsity", "gain"),
    [(0, "weight", 0.9, 5), (0, "unit", 0.7, 20), (1, "unit", 0.5, 20)],
)
def test_accuracy_comes_back_without_labels(
    nb, data, trained, which, rule, sparsity, gain
):
    dense = trained[which]
    pruned = nb.prune(dense, rule, sparsity)
    repaired = nb.repair(pruned, dense, data.x_train)
    right, lost, left = (
        nb.test_accuracy(x, data, 250) for x in (dense, pruned, repaired)
    )
    assert right > 80 and left >= lost + gain and left > (lost + right) / 2


# choosing units and weights for repair


def gram(outputs):
    """Return the mean products of what two units put out."""
    return outputs.T @ outputs / len(outputs)


def slowly_chosen(outputs, kernel, count):
    """Return which units forward selection takes, by least squares for each choice."""
    keep, target = [], outputs @ kernel
    for _ in range(count):
        left = {}
        for unit in {*range(outputs.shape[1])} - {*keep}:
            x = outputs[:, [*keep, unit]]
            left[unit] = errors(x, np.linalg.lstsq(x, target)[0], target).sum()
        keep.append(min(left, key=left.get))
    return np.isin(np.arange(outputs.shape[1]), keep)


@pytest.mark.parametrize("seed", range(6))
def test_units_are_chosen_by_forward_selection(nb, seed):
    random = np.random.default_rng(seed)
    outputs = np.maximum(random.normal(size=(60, 9)) @ random.normal(size=(9, 9)), 0)
    kernel = random.normal(size=(9, 1 + seed))
    products, single = gram(outputs), gram(outputs.astype("float32"))
    before = products.copy(), kernel.copy()
    for count in range(10):
        keep = nb.chosen(products, kernel, count)
        assert keep.dtype == bool and keep.sum() == count
        assert np.array_equal(keep, slowly_chosen(outputs, kernel, count))
        found = nb.chosen(single, kernel.astype("float32"), count)
        assert np.array_equal(found, keep)
    assert np.array_equal(products, before[0]) and np.array_equal(kernel, before[1])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_of_units_that_do_the_same_one_is_chosen(nb, dtype):
    random = np.random.default_rng(0)
    outputs, kernel = random.normal(size=(50, 4)), random.normal(size=(8, 3))
    twice = np.hstack([outputs, outputs * [1, -2, 0.5, 3]]).astype(dtype)
    for count in range(1, 5):
        keep = nb.chosen(gram(twice), kernel.astype(dtype), count).reshape(2, 4)
        assert keep.sum() == count and (keep.sum(axis=0) <= 1).all()
    for count in range(5, 9):
        assert nb.chosen(gram(twice), kernel.astype(dtype), count).sum() == count
    silent = np.hstack([0 * outputs, outputs]).astype(dtype)
    assert np.array_equal(
        nb.chosen(gram(silent), kernel.astype(dtype), 4), np.arange(8) > 3
    )
    for count in range(9):
        assert nb.chosen(gram(0 * silent), kernel.astype(dtype), count).sum() == count


def hidden_outputs(model, images):
    """Return what the layers of a chain of Dense layers put out, by NumPy alone."""
    seen = [images.astype(float)]
    for layer in model.layers:
        seen.append(np.maximum(rows_for(layer, seen[-1]) @ columns(layer), 0))
    return seen


@pytest.mark.parametrize("sparsity", [0, 0.3, 0.5, 0.9, 1])
@pytest.mark.parametrize("use_bias", [True, False])
def test_greedy_looks_at_what_is_kept_behind(nb, sparsity, use_bias):
    model = dense_chain(use_bias)
    images = rows_of(model, count=120)
    pruned = nb.prune(model, nb.Greedy(model, images), sparsity)
    after, outputs = model.layers[-1].kernel.numpy(), hidden_outputs(model, images)
    for number in (1, 0):
        kernel = model.layers[number].kernel.numpy()
        count = kernel.shape[1] - round(sparsity * kernel.shape[1])
        keep = slowly_chosen(outputs[number + 1], after, count)
        assert np.array_equal(pruned.layers[number].kernel, kernel * keep)
        after = kernel[:, keep]
    assert same_weights(pruned.layers[2], model.layers[2].get_weights())


@pytest.mark.parametrize("sparsity", [-0.1, 1.1, np.nan, "half"])
def test_greedy_refuses_what_is_no_sparsity(nb, sparsity):
    model = dense_chain()
    with pytest.raises(ValueError, match="sparsity should be from 0 to 1"):
        nb.prune(model, nb.Greedy(model, rows_of(model)), sparsity)


def test_weights_count_by_what_they_read(nb):
    model = dense_chain()
    images = rows_of(model, count=2100) * np.arange(12)
    scores, read = nb.weights_times_inputs(model, images), hidden_outputs(model, images)
    expected = [
        np.sqrt(np.square(x).mean(axis=0))[:, None] * np.abs(layer.kernel.numpy())
        for x, layer in zip(read[:2], model.layers)
    ]
    for found, due in zip(scores, expected, strict=True):
        assert found == pytest.approx(due, 1e-4)
    pruned = nb.prune(model, nb.ByScores(scores), 0.6)
    for own, layer, due in zip(pruned.layers, model.layers, expected):
        kernel = np.where(lowest(due, 0.6), 0, layer.kernel)
        assert np.array_equal(own.kernel, kernel)


def test_scores_are_of_units_or_of_single_weights(nb):
    random = np.random.default_rng(0)
    kernels = [random.normal(size=(6, 5)), random.normal(size=(3, 2, 4))]
    scores = [random.normal(size=k.shape) for k in kernels]
    by_weight = nb.ByScores(scores).masks(kernels, 0.3)
    assert all(map(np.array_equal, by_weight, [~lowest(s, 0.3) for s in scores]))
    gone = lowest(scores[1][0, 0], 0.3)
    assert np.array_equal(
        nb.ByScores([scores[1][0, 0]]).masks(kernels[1:], 0.3)[0],
        np.broadcast_to(~gone, (3, 2, 4)),
    )
    with pytest.raises(ValueError, match="finite, not nan"):
        nb.ByScores([scores[0] + np.nan]).masks(kernels[:1], 0.3)
    with pytest.raises(ValueError, match="broadcast"):
        nb.ByScores([scores[0][:5]]).masks(kernels[:1], 0.3)
