"""I prune unusual networks, and what is pruned, counted and kept is what is due."""

import math

import keras
import numpy as np
import pytest
from helpers import difference, lowest, randomized, reloaded
from keras import Input, Model, Sequential, layers, ops
from keras.layers import Dense, Flatten

RULES = ("weight", "unit")
ROW = np.array([[0.5, -1.0, 2.0]], "float32")
GRID = np.linspace(-1, 1, 15, dtype="float32").reshape(5, 3)
CHOICE = np.array([[0, 1], [1, 2]])


def chain(*parts, shape=(6,)):
    """Return a Sequential model."""
    return Sequential([Input(shape), *parts])


def is_in(variable, names):
    """Return whether a variable belongs to one of the layers named."""
    return not {*names.split()}.isdisjoint(variable.path.split("/"))


def assert_only_these_lose_weights(nb, model, names):
    """Assert that the smaller half of the kernels in these layers goes, no others."""
    pruned, zeros, size = nb.prune(model, "weight", 0.5), 0, 0
    for before, after in zip(model.weights, pruned.weights, strict=True):
        value, left = before.numpy(), after.numpy()
        gone = np.zeros(value.shape, bool)
        if before.name in nb.KERNELS and is_in(before, names):
            gone = lowest(np.abs(value), 0.5)
            zeros, size = zeros + gone.sum(), size + gone.size
        silent = value.ndim == 1 and left == 0  # the bias of a unit without weights
        assert np.array_equal(left, np.where(gone | silent, 0, value)), before.path
    assert math.isclose(nb.measured_sparsity(pruned), zeros / size)


def assert_shrinks_alike(nb, model, folder):
    """Assert that what is pruned, shrunk and loaded again answers alike."""
    for rule in RULES:
        pruned = nb.prune(model, rule, 0.5)
        small = nb.shrink(pruned)
        left = sum(map(np.count_nonzero, pruned.get_weights()))
        assert nb.parameters_left(pruned) <= left
        assert difference(pruned, small) <= 1e-5
        assert difference(small, reloaded(small, folder)) <= 1e-6


# what feeds the outputs


def settled():
    """Return a normalisation of positions and units that has seen data."""
    layer = layers.Normalization(axis=(1, 2))
    layer.adapt(np.random.default_rng(0).normal(size=(9, 5, 3)).astype("float32"))
    return layer


FIXED = {  # what comes after the head: none of it is a product with a matrix
    "shift": lambda x: x + ROW,
    "mask of logits": lambda x: ops.softmax(x - 1e9 * (ROW > 1)),
    "temperature": lambda x: x / ROW,
    "anchors": lambda x: x + GRID,
    "where": lambda x: ops.where(ROW > 0, x, 0.0),
    "take": lambda x: ops.take(x, CHOICE, axis=-1),
    "LayerNormalization": lambda x: layers.LayerNormalization(axis=[1, 2])(x),
    "Normalization": lambda x: settled()(x),
}


@pytest.mark.parametrize("case", FIXED)
def test_a_constant_behind_the_head_does_not_make_it_hidden(nb, case):
    inputs = Input((5, 6))
    x = Dense(3, name="head")(Dense(8, "relu", name="a")(inputs))
    model = randomized(Model(inputs, FIXED[case](x)))
    if case == "Normalization":
        model.layers[-1].finalize_state()
    assert_only_these_lose_weights(nb, model, "a")


ENDS = {
    "slice": lambda x: x[:, 0],
    "operation": lambda x: ops.log_softmax(x),
    "maxout": lambda x: ops.max(layers.Reshape((5, 2, 3))(x), axis=-1),
    "shuffle": lambda x: ops.reshape(ops.transpose(x, (0, 2, 1)), (-1, 30)),
    "GroupNormalization": lambda x: layers.GroupNormalization(2)(x),
    "heads in a mean": lambda x: ops.mean(
        ops.stack([x, Dense(6, name="other")(x)]), axis=0
    ),
}


@pytest.mark.parametrize("case", ENDS)
def test_operations_behind_the_head_leave_it_whole(nb, tmp_path, case):
    inputs = Input((5, 6))
    x = Dense(6, name="head")(Dense(8, "relu", name="a")(inputs))
    model = randomized(Model(inputs, ENDS[case](x)))
    assert_only_these_lose_weights(nb, model, "a")
    assert_shrinks_alike(nb, model, tmp_path)


def features_and_logits():
    """Return a model around one that puts out features and logits."""
    inner, inputs = Input((8,)), Input((6,))
    x = Dense(6, "relu", name="features")(inner)
    both = Model(inner, [x, Dense(3, name="logits")(x)])
    x, logits = both(Dense(8, "relu", name="a")(inputs))
    return Model(inputs, [Dense(4, name="end")(x), logits])


def one_way_through():
    """Return a model around one of two ways, of which one has a layer."""
    ends = {"i": Input((8,), name="i"), "j": Input((5,), name="j")}
    plain, head = layers.ReLU()(ends["i"]), Dense(4, name="head")(ends["j"])
    both, inputs = Model(ends, {"p": plain, "q": head}), Input((6,))
    x = {"i": Dense(8, name="whole")(inputs), "j": Dense(5, "relu", name="a")(inputs)}
    return Model(inputs, both(x))


def called_twice():
    """Return a model that ends in a part that it calls twice."""
    part = chain(Dense(8, "sigmoid", name="b"), Dense(8, name="head"), shape=(8,))
    inputs = Input((6,))
    return Model(inputs, part(part(Dense(8, "relu", name="a")(inputs))))


NESTED = {
    "features and logits": (features_and_logits, "a features"),
    "one way through": (one_way_through, "a"),
    "called twice": (called_twice, "a b"),
}


@pytest.mark.parametrize("case", NESTED)
def test_each_output_of_a_part_has_its_own_kernels(nb, case):
    build, names = NESTED[case]
    assert_only_these_lose_weights(nb, randomized(build()), names)


# what is a kernel


def seen(kind, *sizes):
    """Return a function that attends to what it reads."""
    return lambda x: kind(*sizes, name="m")(x, x)


BETWEEN = {  # layers between `a` and `b`, and whether theirs are pruned
    "attention of single units": seen(layers.MultiHeadAttention, 4, 1),
    "grouped queries": seen(layers.GroupQueryAttention, 4, 2, 2),
    "cells": layers.RNN(
        [layers.LSTMCell(4), layers.GRUCell(5)], return_sequences=True, name="m"
    ),
    "spectral": layers.SpectralNormalization(Dense(6, name="m")),
    "steps": layers.TimeDistributed(chain(Dense(6, name="m"), shape=(8,))),
    "turned": layers.EinsumDense("abc,dc->abd", (5, 6), name="m"),
    "scale": layers.EinsumDense("abc,c->abc", (5, 8), name="none"),
    "separable": layers.SeparableConv1D(6, 3, name="m"),
    "transposed": layers.Conv1DTranspose(6, 3, name="m"),
    "sorted": lambda x: ops.sort(x, axis=-1),
    "glu": lambda x: ops.glu(x),
    "slopes": layers.PReLU(shared_axes=[1, 2]),
    "threshold": layers.ReLU(threshold=0.4, negative_slope=0.3, max_value=0.6),
}


@pytest.mark.parametrize("case", BETWEEN)
def test_kernels_are_found_in_layers_of_all_kinds(nb, tmp_path, case):
    keras.utils.set_random_seed(0)
    layer, inputs = BETWEEN[case], Input((5, 6))
    if isinstance(layer, keras.Layer):
        layer = type(layer).from_config(layer.get_config())
    x = layer(Dense(8, "sigmoid", name="a")(inputs))
    x = Flatten()(Dense(6, "relu", name="b")(x))
    model = randomized(Model(inputs, Dense(3)(x)))
    assert_only_these_lose_weights(nb, model, "a m b")
    assert_shrinks_alike(nb, model, tmp_path)


@pytest.mark.parametrize("policy", ["bfloat16", "mixed_bfloat16", "float64"])
def test_half_of_the_weights_go_in_any_precision(nb, policy):
    own = Dense(8, "relu", name="a", dtype=policy), Dense(6, name="b", dtype=policy)
    model = randomized(chain(*own, Dense(3, dtype="float32"), shape=(8,)))
    assert_only_these_lose_weights(nb, model, "a b")
    for rule in nb.n_m_mask(2, 4), nb.block_mask((2, 2)), nb.Globally(nb.magnitudes):
        assert math.isclose(nb.measured_sparsity(nb.prune(model, rule, 0.5)), 0.5)


# refused, by name


def broken(value=1.0):
    """Return a chain with a value in the kernel of its narrow layer."""
    parts = [Dense(6, name="a"), Dense(3, name="narrow"), Dense(5, name="b")]
    model = randomized(chain(*parts, Dense(2)))
    kernel = model.get_layer("narrow").kernel
    kernel.assign(np.full(kernel.shape, value))
    return model


def test_the_kernel_that_a_rule_refuses_is_named(nb):
    with pytest.raises(ValueError, match=r"narrow/kernel.*exceeds"):
        nb.prune(broken(), nb.block_mask((1, 4)), 0.5)
    with pytest.raises(ValueError, match=r"narrow/kernel.*nan"):
        nb.prune(broken(np.nan), "weight", 0.5)


def test_parts_that_share_a_layer_are_copied(nb):
    shared, inputs = Dense(8, "sigmoid", name="shared"), Input((6,))
    x = Dense(8, "relu", name="a")(inputs)
    part = chain(shared, layers.ReLU(), shape=(8,))
    x = layers.Add()([part(x), shared(x)])
    model = randomized(Model(inputs, Dense(3)(x)))
    assert difference(model, nb.copy_of(model)) == 0
    pruned = nb.prune(model, "weight", 0.5)
    assert len(pruned.weights) == len(model.weights)
    assert nb.measured_sparsity(pruned) >= 0.5
    assert difference(pruned, nb.shrink(pruned)) <= 1e-6


def test_kernels_for_eight_bits_are_refused_or_copied(nb):
    model = randomized(chain(Dense(8, "relu", name="culprit"), Dense(3)))
    model.get_layer("culprit").quantize("float8")
    with pytest.raises(ValueError, match=r"culprit.*before you quantize"):
        nb.prune(model, "weight", 0.5)


def test_kernels_of_a_part_keep_their_paths(nb):
    part = chain(Dense(8, "relu", name="b"), Dense(7, name="c"), shape=(8,))
    model = randomized(chain(Dense(8, name="a"), part, Dense(3)))
    paths = [v.path for v in model.weights if v.path.endswith("b/kernel")]
    pruned = nb.prune(model, "weight", 0.5, paths)
    assert nb.measured_sparsity(pruned, paths) == 0.5


# what a network costs


def windows(x):
    """Return what a layer makes of four windows, as a Swin transformer cuts them."""
    x = ops.transpose(ops.reshape(x, (-1, 2, 4, 2, 4, 6)), (0, 1, 3, 2, 4, 5))
    return ops.reshape(Dense(5)(ops.reshape(x, (-1, 16, 6))), (-1, 64, 5))


WORK = {
    "windows": (windows, 2 * 64 * 6 * 5),
    "by keyword": (
        lambda x: layers.Conv2DTranspose(4, 3)(inputs=x),
        2 * 64 * 9 * 6 * 4,
    ),
    "norm of places": (
        lambda x: layers.LayerNormalization(axis=[2, 3])(x),
        0,
    ),
}


@pytest.mark.parametrize("case", WORK)
def test_work_is_counted_for_one_example(nb, case):
    function, expected = WORK[case]
    inputs = Input((8, 8, 6))
    assert nb.flops(Model(inputs, function(inputs))) == expected


def test_products_in_a_function_of_an_operation_are_not_nothing(nb):
    matrix, inputs = np.ones((6, 4), "float32"), Input((5, 6))
    each = ops.vectorized_map(lambda row: ops.matmul(row, matrix), inputs)
    with pytest.raises(ValueError, match="cannot count"):
        nb.flops(Model(inputs, each))


# what a shrunk model answers


def test_a_part_that_is_called_twice_shrinks_where_both_calls_allow_it(nb):
    model = randomized(called_twice())
    layer = next(x for x in model._flatten_layers() if x.name == "b")
    kernel, bias = layer.get_weights()
    kernel[:, :3], bias[:3] = 0, (0, 1, -1)  # sigmoids of constants
    layer.set_weights([kernel, bias])
    small = nb.shrink(model)
    units = {x.name: x.units for x in small._flatten_layers() if hasattr(x, "units")}
    assert units == {"a": 8, "b": 5, "head": 8}
    assert difference(model, small) <= 1e-5
