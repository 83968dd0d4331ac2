"""I prune my own network, whatever it looks like, and the small one answers alike."""

import functools
import operator
import random

import keras
import numpy as np
import pytest
from helpers import (
    KERNELS,
    Closed,
    DenseOfMyOwn,
    answers,
    difference,
    ends_of,
    equal,
    expected_weights,
    lowest,
    randomized,
    reloaded,
    rows_of,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import Input, Model, Sequential, layers, ops

Dense, Flatten, ReLU = layers.Dense, layers.Flatten, layers.ReLU
Conv1D, Conv2D, Conv3D = layers.Conv1D, layers.Conv2D, layers.Conv3D
Add, Concatenate, BatchNorm = layers.Add, layers.Concatenate, layers.BatchNormalization
Mean1D, Mean2D = layers.GlobalAveragePooling1D, layers.GlobalAveragePooling2D
SAME = {"padding": "same"}
PLAIN, RELU = SAME | {"use_bias": False}, SAME | {"activation": "relu"}
NETWORKS = {}  # {function: (units that go together, layers that lose no units)}
SLOW = pytest.mark.slow
both_rules = pytest.mark.parametrize("rule", ["weight", "unit"])


def network(*groups, alone=""):
    """Enter a function into NETWORKS, with the units that have to go together."""

    def enter(build):
        """Note what belongs to a function, and return it."""
        NETWORKS[build] = groups, alone
        return build

    return enter


def late(cases, names):
    """Return cases to run a test with; those named are slow."""
    return [pytest.param(x, marks=SLOW) if x in names else x for x in cases]


def normed(x, layer):
    """Return what a layer and a batch normalisation make of `x`."""
    return BatchNorm(name=f"{layer.name}_norm")(layer(x))


def stack(*hidden, shape=(8, 8, 2)):
    """Return layers in a row with random weights, the last a Dense layer of three."""
    return randomized(Sequential([Input(shape), *hidden, Flatten(), Dense(3)]))


# networks of all kinds: each layer's units, and which of them go together


@network("a", "b")
def dense_chain():
    """Return a chain of Dense layers, which begins with values of its own."""
    values = keras.initializers.Constant(np.arange(8.0))
    parts = [Dense(8, "relu", bias_initializer=values, name="a")]
    parts += [Dense(7, "tanh", name="b"), Dense(3)]
    return Sequential([Input((6,), name="rows"), *parts])


@network("a a_norm", "b", "c")
def cnn():
    """Return a small convolutional network with a batch normalisation."""
    parts = [Input((9, 9, 2), name="rows"), Conv2D(6, 3, **PLAIN, name="a")]
    parts += [BatchNorm(name="a_norm"), ReLU(), layers.MaxPooling2D()]
    parts += [Conv2D(5, 3, activation="sigmoid", name="b"), Flatten()]
    return Sequential([*parts, Dense(7, "relu", name="c"), Dense(3, "softmax")])


@network("a a_norm c c_norm", "b b_norm", "d d_norm", "e e_norm f f_norm")
def residual():
    """Return a network whose blocks add what they read."""
    inputs = Input((8, 8, 3))
    x = ReLU()(normed(inputs, Conv2D(8, 3, **PLAIN, name="a")))
    y = ReLU()(normed(x, Conv2D(6, 3, **PLAIN, name="b")))
    x = ReLU()(Add()([normed(y, Conv2D(8, 3, **PLAIN, name="c")), x]))
    y = ReLU()(normed(x, Conv2D(6, 3, 2, **PLAIN, name="d")))
    y = normed(y, Conv2D(9, 3, **PLAIN, name="e"))
    shortcut = normed(x, Conv2D(9, 1, 2, **PLAIN, name="f"))
    return Model(inputs, Dense(3)(Mean2D()(ReLU()(Add()([y, shortcut])))))


@network("a norm", "b norm@4", "c")
def u_net():
    """Return a network that puts small and large images side by side."""
    inputs = Input((8, 8, 2))
    a = Conv2D(4, 3, **RELU, name="a")(inputs)
    b = Conv2D(6, 3, **RELU, name="b")(layers.MaxPooling2D()(a))
    b = layers.UpSampling2D(interpolation="bilinear")(b)
    c = Conv2D(5, 3, **RELU, name="c")(BatchNorm(name="norm")(Concatenate()([a, b])))
    return Model(inputs, Dense(3)(Mean2D()(Concatenate()([c, c]))))


@network("a a_norm c c_norm", "b b_norm dw dw_norm e", "d")
def mobile():
    """Return an inverted residual with a gate, as MobileNetV3 has them."""
    inputs = Input((8, 8, 3))
    x = ReLU(6)(normed(inputs, Conv2D(6, 3, **PLAIN, name="a")))
    y = ReLU(6)(normed(x, Conv2D(8, 1, **PLAIN, name="b")))
    y = keras.activations.relu(normed(y, layers.DepthwiseConv2D(3, **SAME, name="dw")))
    gate = layers.Reshape((1, 1, 8))(Mean2D()(y))
    gate = keras.activations.relu(Dense(4, name="d")(gate))
    y = y * keras.activations.sigmoid(Dense(8, name="e")(gate))
    x = Add()([x, normed(y, Conv2D(6, 1, name="c"))])
    return Model(inputs, Dense(3)(Mean2D()(x)))


@network("a b b_norm", "d", "e", alone="c")
def grouped():
    """Return a network of separable and grouped convolutions, one of them depthwise."""
    inputs, own = Input((8, 8, 3)), {"activation": "relu", "depth_multiplier": 6}
    x = Conv2D(8, 3, activation="relu", name="a")(inputs)
    x = ReLU()(normed(x, Conv2D(8, 3, **SAME, groups=8, name="b")))
    x = layers.SeparableConv2D(7, 3, **SAME, **own, name="d")(x)
    x = layers.SeparableConv2D(6, 3, **own, name="e")(x)
    x = Conv2D(6, 3, activation="relu", name="c")(x)
    x = Conv2D(4, 1, groups=2, activation="relu")(x)
    return Model(inputs, Dense(3)(Mean2D()(x)))


@network("b", "d", "e f", "h", alone="acg")
def nested():
    """Return a model with a Sequential and a functional one inside."""
    inputs, inner = Input((6,)), Input((5,))
    part = [Input((8,)), Dense(7, "relu", name="b"), Dense(5, name="c")]
    hidden = Dense(9, "sigmoid", name="d")(inner)
    hidden = Add()([Dense(6, name="e")(hidden), Dense(6, name="f")(inner)])
    functional = Model(inner, Dense(4, "tanh", name="g")(ReLU()(hidden)))
    x = Sequential(part)(Dense(8, "relu", name="a")(inputs))
    return Model(inputs, Dense(3)(Dense(6, "relu", name="h")(functional(x))))


@network("a", "b", "c")
def siamese():
    """Return a model that looks at two inputs alike; its ends are dicts and lists."""
    pair, age = [Input((6,), name="z"), Input((6,), name="y")], Input((2,), name="age")
    a, b = Dense(8, "sigmoid", name="a"), Dense(5, "relu", name="b")
    x = Concatenate()([layers.Subtract()([b(a(own)) for own in pair]), age])
    x = Dense(6, "relu", name="c")(x)
    ends = {"size": Dense(1, name="size")(x), "kind": Dense(3, name="kind")(x)}
    return Model({"pair": pair, "age": age}, ends)


@network("a", "e", "h", alone="bcdfg")
def text():
    """Return a network that reads words, attends to them, and remembers."""
    inputs = Input((4,), dtype="int32")
    a = Dense(8, "relu", name="a")(layers.Embedding(10, 3, mask_zero=True)(inputs))
    x = Dense(6, name="b")(layers.Dropout(0.1, seed=0)(a))
    x = Add()([x, layers.MultiHeadAttention(2, 4, name="c")(x, x)])
    y = Dense(12, "gelu", name="e")(layers.LayerNormalization()(x))
    x, lstm = x + Dense(6, name="d")(y), layers.LSTM(4, return_sequences=True)
    x = layers.Bidirectional(lstm, name="f")(x)
    x = Concatenate()([layers.GRU(6, name="g")(x), Mean1D()(a)])  # without padding
    return Model(inputs, Dense(3)(Dense(8, "sigmoid", name="h")(x)))


@network("a", "b c")
def reused():
    """Return a model that calls a layer for two sizes, and a Reshape layer twice."""
    inputs, conv = Input((8, 3)), Conv1D(6, 1, activation="sigmoid", name="a")
    large, small = conv(inputs), conv(layers.AveragePooling1D(2)(inputs))
    turned = layers.Reshape((4, 16))
    ends = [turned(Dense(8, "relu", name=name)(large)) for name in "bc"]
    return Model(inputs, Dense(3)(Flatten()(Concatenate()([*ends, small]))))


@functools.cache
def random_network(build):
    """Return a network with random weights, its batch normalisations settled."""
    keras.utils.set_random_seed(0)
    return recalibrated(randomized(build()))


@functools.cache
def pruned_network(nb, build, rule, sparsity):
    """Return a pruned copy of a network with random weights."""
    return nb.prune(random_network(build), rule, sparsity)


def recalibrated(model, rows=None):
    """Give a model's batch normalisations the statistics of rows; return it."""
    norms = [x for x in model._flatten_layers() if isinstance(x, BatchNorm)]
    for layer in norms:
        layer.momentum = 0.0
    model(rows_of(model) if rows is None else rows, training=True)
    for layer in norms:
        layer.momentum = 0.9
    return model


def assert_answers_vary(model, rows, least=0.001):
    """Assert that each output of a model depends on what the rows are."""
    for output in answers(model, rows):
        assert np.ptp(output, axis=0).max() > least * np.abs(output).max()


def interface(model):
    """Return names, shapes and types of what a model takes and returns."""
    described = keras.tree.map_structure(lambda x: (x.shape, x.dtype), ends_of(model))
    names = [x.name for x in model.inputs]
    names += [x._keras_history.operation.name for x in model.outputs]
    return described, names


def sizes(model):
    """Return how many units each layer has, by its name."""
    called = [x for x in model._flatten_layers() if x._inbound_nodes]
    return {x.name: keras.tree.flatten(x.output)[0].shape[-1] for x in called}


every_network = pytest.mark.parametrize("build", NETWORKS, ids=lambda x: x.__name__)
LATE = {*NETWORKS} - {mobile, nested}
CASES = ("weight", 0.6), ("unit", 0.5), pytest.param("unit", 0.3, marks=SLOW)
pruned_somehow = pytest.mark.parametrize(("rule", "sparsity"), CASES)


@every_network
@pruned_somehow
def test_what_is_due_goes_and_nothing_else(nb, build, rule, sparsity):
    model = random_network(build)
    before = model.get_weights()
    pruned = pruned_network(nb, build, rule, sparsity)
    due = expected_weights(model, *NETWORKS[build], rule, sparsity)
    assert equal(pruned.get_weights(), due)
    assert interface(pruned) == interface(model)
    small = nb.shrink(model) if rule == "weight" else model
    assert equal(small.get_weights(), before), "a unit was cut that does something"
    assert equal(model.get_weights(), before), "the model itself was changed"


@every_network
@pruned_somehow
def test_a_shrunk_network_answers_alike(nb, tmp_path, build, rule, sparsity):
    pruned, (groups, alone) = pruned_network(nb, build, rule, sparsity), NETWORKS[build]
    before, rows = pruned.get_weights(), rows_of(pruned)
    small = nb.shrink(pruned)
    assert equal(pruned.get_weights(), before), "the pruned model was changed"
    assert_answers_vary(pruned, rows)
    assert difference(pruned, small, rows) <= 1e-5
    assert interface(small) == interface(pruned)
    keras.tree.assert_same_structure(small(rows), pruned(rows))
    if rule == "unit":
        assert difference(small, reloaded(small, tmp_path), rows) == 0
    units, left = sizes(pruned), sizes(small)
    for name in {*alone, *" ".join(groups).split()} - {"norm", "norm@4"}:
        goes = rule == "unit" and name not in alone
        due = units[name] - round(sparsity * units[name])
        assert left[name] == due if goes else left[name] <= units[name]


@pytest.mark.parametrize("build", late(NETWORKS, LATE), ids=lambda x: x.__name__)
def test_units_that_go_in_training_are_those_that_can_be_shrunk(nb, build):
    model, rule = nb.copy_of(random_network(build)), "unit"
    due = expected_weights(model, *NETWORKS[build], rule, 0.5)
    rows = rows_of(model)
    targets = keras.tree.map_structure(lambda x: np.ones(x.shape), model(rows))
    model.compile(keras.optimizers.SGD(1e-3), "mse", jit_compile=False)
    model.fit(rows, targets, 4, 1, 0, [nb.Pruner(rule, nb.constant_sparsity(0.5))])
    for value, expected in zip(model.get_weights(), due, strict=True):
        assert ((value == 0) == (expected == 0)).all(), "others than prune would take"
    assert not equal(model.get_weights(), due), "nothing was trained"
    small = nb.shrink(model)
    assert difference(model, small) <= 1e-5
    assert sizes(small) == sizes(nb.shrink(pruned_network(nb, build, rule, 0.5)))


def test_a_part_of_the_units_is_ranked_with_all_that_are_tied_to_others(nb):
    inputs = Input((6,))
    both = Concatenate()([Dense(4, name="a")(inputs), Dense(6, name="b")(inputs)])
    x = Add()([both, Dense(10, "sigmoid", name="c")(inputs)])
    model = randomized(Model(inputs, Dense(3)(BatchNorm(name="norm")(x))))
    a, b, c = (model.get_layer(name).kernel.numpy() for name in "abc")
    norms = np.square(np.concatenate([np.concatenate([a, b], axis=1), c])).sum(axis=0)
    pruned, due = nb.prune(model, "unit", 0.5), lowest(norms, 0.5)
    for name, own in zip("abc", (due[:4], due[4:], due)):
        assert np.array_equal(~pruned.get_layer(name).kernel.numpy().any(axis=0), own)
    norm = pruned.get_layer("norm")
    assert np.array_equal(norm.beta.numpy() == 0, due)
    assert norm.moving_mean.numpy().all(), "a unit that answers sigmoid(0) has a mean"
    with pytest.raises(ValueError, match="no units"):
        nb.prune(model, "unit", 0.5, [model.get_layer("c").kernel.path])


# networks at random


MERGES = Add, layers.Subtract, layers.Multiply, layers.Average, layers.Minimum
OPERATIONS = operator.add, operator.sub, operator.mul, ops.maximum
SILENT, LOUD = ("relu", "tanh", "gelu", "relu6", "linear"), ("sigmoid", "softplus")


class RandomGraph:
    """A random model: the images that it has made so far, and what can come next."""

    def __init__(self, seed, loud):
        """Draw the graph. If it is not loud, a unit without weights answers 0."""
        self.pick, self.written = random.Random(seed).choice, []
        self.activations = SILENT + loud * LOUD
        self.constant = (lambda x: x + 1.5) if loud else (lambda x: x / 1.5)
        self.images = [Input((6, 6, n)) for n in self.pick(((2,), (2, 3)))]
        inputs = [*self.images]
        steps = self.write, self.write, self.change, self.merge, self.gate, self.again
        for _ in range(self.pick(range(4, 18))):
            x = self.pick(self.images + 2 * self.images[-2:])
            self.images.append(self.pick(steps)(x))
        ends = [self.pick((Flatten(), Mean2D()))(x) for x in self.images[-2:]]
        self.model = Model(inputs, [Dense(2)(x) for x in ends])

    def write(self, x):
        """Return what a layer with a kernel makes of an image."""
        pick, size = self.pick, x.shape[-1]
        units, window, times = pick(range(2, 7)), pick((1, 2, 3)), pick((1, 1, 2))
        own = {"activation": pick(self.activations), "use_bias": pick((True, False))}
        there = own | {"padding": pick(("same", "valid")), "strides": pick((1, 1, 2))}
        there |= SAME if x.shape[1] < 4 else {}
        choices = [Dense(units, **own), Conv2D(units, window, **there)]
        choices += [Conv2D(times * size, window, groups=size, **there)]
        there["depth_multiplier"] = times
        choices += [layers.DepthwiseConv2D(window, **there)]
        choices += [layers.SeparableConv2D(units, window, **there)]
        self.written.append((pick(choices), size))
        return self.written[-1][0](x)

    def change(self, x):
        """Return what a layer without a kernel makes of an image."""
        pick, name = self.pick, self.pick(self.activations)
        choices = [BatchNorm(), self.constant, layers.MaxPooling2D(2, **SAME)]
        choices += [layers.Activation(name), getattr(keras.activations, name)]
        choices += [layers.PReLU(shared_axes=[1, 2]), layers.ZeroPadding2D()]
        choices += [layers.Softmax(), layers.AveragePooling2D(2, 1, **SAME)]
        return pick(choices)(x)

    def merge(self, x):
        """Return what is made of an image and another one of its size."""
        pick = self.pick
        y = pick([y for y in self.images if y.shape[:3] == x.shape[:3]])
        if pick((True, False, False)):
            return Concatenate()([x, y])
        if y is x or y.shape != x.shape:
            y = Conv2D(x.shape[-1], 3, **RELU)(x)
        return pick((pick(OPERATIONS), lambda x, y: pick(MERGES)()([x, y])))(x, y)

    def gate(self, x):
        """Return the product of an image and of what is made of its averages."""
        units = self.pick((x.shape[-1], 1))
        return x * Dense(units, "sigmoid")(Mean2D(keepdims=True)(x))

    def again(self, x):
        """Return what a layer that was called makes of another image, if any can."""
        fit = [layer for layer, size in self.written if size == x.shape[-1]]
        return self.pick(fit)(x) if fit and x.shape[1] > 2 else self.change(x)


@SLOW
@settings(max_examples=40)
@given(st.integers(0, 2**32 - 1), st.sampled_from((0.2, 0.5, 0.8, 1)), st.booleans())
def test_any_graph_is_pruned_and_shrunk(nb, seed, sparsity, loud):
    model = randomized(RandomGraph(seed, loud).model, seed)
    rows = rows_of(model, count=3)
    for rule in ("weight", "unit"):
        try:
            pruned = nb.prune(model, rule, sparsity)
        except ValueError as error:
            assert "no kernel" in str(error) or "no units" in str(error)
            continue
        small = nb.shrink(pruned)
        assert difference(pruned, small, rows) <= 1e-5
        if rule == "unit" and sparsity < 0.8 and not loud:
            left = sizes(small)
            for kernel in nb.kernels_in(pruned):
                units = kernel.numpy().reshape(-1, kernel.shape[-1]).any(axis=0)
                assert left[kernel.path.split("/")[-2]] <= units.sum(), kernel.path


# the networks of Keras, and those of the notebook


FAMILIES = ("MobileNetV3Small", "EfficientNetB0", "DenseNet121", "ResNet50V2")
FAMILIES = {**dict.fromkeys(FAMILIES, 0.35), "InceptionV3": 0.35, "ConvNeXtTiny": 0.6}


@SLOW
@pytest.mark.parametrize(("name", "share"), FAMILIES.items())
def test_a_network_of_keras_loses_half_of_its_units(nb, name, share):
    own = {"weights": None, "classes": 10, "input_shape": (96, 96, 3)}
    model = randomized(getattr(keras.applications, name)(**own), 0, 2**0.5, 0.1)
    pruned, rows = nb.prune(model, "unit", 0.5), rows_of(model, count=4)
    recalibrated(pruned, rows)
    small = nb.shrink(pruned)
    assert small.count_params() <= share * model.count_params()
    assert_answers_vary(pruned, rows)
    assert difference(pruned, small, rows) <= 1e-5
    keras.utils.clear_session()


@pytest.mark.parametrize("name", ["build_cnn", "build_residual_cnn"])
def test_half_of_the_units_hold_three_quarters_of_the_weights(nb, name):
    build = functools.partial(getattr(nb, name), (16, 32, 64))
    model, same, other = (build(seed=seed) for seed in (3, 3, 4))
    assert equal(model.get_weights(), same.get_weights()), "a seed tells the weights"
    assert not equal(model.get_weights(), other.get_weights())
    images = np.random.default_rng(0).integers(0, 256, (8, 28, 28)).astype("uint8")
    pruned = recalibrated(nb.prune(randomized(model), "unit", 0.5), images)
    small = nb.shrink(pruned)
    gone = 1 - small.count_params() / model.count_params()
    assert abs(gone - 0.745) < 0.03  # what Torch-Pruning takes of a residual network
    assert difference(pruned, small, images) <= 1e-5
    assert_answers_vary(small, images)


# units that always answer the same


def kill(layer, *units):
    """Take the weights of units of a layer, and leave their biases."""
    kernel = layer.kernel.numpy()
    kernel[..., units] = 0
    layer.kernel.assign(kernel)


READERS = {  # what reads a unit, and how many of six stay if two are constants
    "Flatten, Dense": ([], 4),
    "Dense": ([Dense(5, "relu", use_bias=False)], 4),
    "unpadded": ([Conv2D(5, 3, use_bias=False)], 4),
    "one pixel": ([Conv2D(5, 1, **PLAIN)], 4),
    "normalized": ([BatchNorm(), ReLU(), Conv2D(5, 3)], 4),
    "pooled": ([layers.AveragePooling2D(3, 1, "same"), layers.MaxPooling2D(2)], 4),
    "activations": ([layers.LeakyReLU(), layers.Activation("softplus")], 4),
    "upsampled": ([layers.UpSampling2D(interpolation="bilinear")], 4),
    "padded": ([Conv2D(5, 3, padding="same")], 6),
    "zeros around": ([layers.ZeroPadding2D(), Conv2D(5, 3)], 6),
    "separable": ([layers.SeparableConv2D(5, 3)], 6),
    "depthwise": ([layers.DepthwiseConv2D(3)], 6),
    "grouped": ([Conv2D(6, 3, groups=6)], 6),
    "scaled by weights": ([layers.PReLU(shared_axes=[1, 2])], 6),
    "transposed": ([layers.Conv2DTranspose(5, 3)], 6),
    "mixed": ([layers.LayerNormalization()], 6),
}


@pytest.mark.parametrize("case", READERS)
@pytest.mark.parametrize("activation", ["sigmoid", "relu"])
def test_a_constant_goes_into_the_next_bias_if_it_can(nb, case, activation):
    readers, left = READERS[case]
    readers = [type(x).from_config(x.get_config()) for x in readers]
    model = stack(Conv2D(6, 3, activation=activation), *readers)
    first = model.layers[0]
    first.bias.assign([1, 2, -3, -4, 5, 6.0])
    kill(first, 1, 4)
    small = nb.shrink(model)
    assert small.layers[0].filters == left
    assert difference(model, small) <= 1e-5
    for reader, twin in zip(model.layers, small.layers):
        if hasattr(reader, "use_bias") and not reader.use_bias:
            assert twin.use_bias and twin.bias.numpy().any()
    if activation == "relu":  # and some constants are zeros
        first.bias.assign([1, 0, -3, -4, 0, 6.0])
        small = nb.shrink(model)
        unread = case not in ("transposed", "mixed")
        assert small.layers[0].filters == (4 if unread else 6)
        assert difference(model, small) <= 1e-5


@pytest.mark.parametrize("merge", [operator.mul, ops.multiply, layers.multiply])
@pytest.mark.parametrize("is_added", [False, True])
def test_what_a_dead_gate_multiplies_is_dead(nb, merge, is_added):
    inputs = Input((6,))
    values = Dense(8, name="values")(inputs)
    gate = Dense(8, "relu", name="gate")(inputs)
    x = merge([values, gate]) if merge is layers.multiply else merge(values, gate)
    x = Add()([x, Dense(8)(inputs)]) if is_added else x
    model = randomized(Model(inputs, Dense(3)(Dense(5, "sigmoid")(x))))
    gate = model.get_layer("gate")
    kill(gate, 0, 3, 6)
    gate.bias.assign([-1, 1, 1, 0, 1, 1, 2, 1])  # the last of them answers 2
    small = nb.shrink(model)
    assert small.get_layer("values").units == (8 if is_added else 6)
    assert difference(model, small) <= 1e-5


@pytest.mark.parametrize(("second", "left"), [(2.0, 7), (3.0, 8)])
def test_a_shared_layer_takes_over_what_is_the_same_in_all_calls(nb, second, left):
    inputs, shared = Input((6,)), Dense(5, "relu", use_bias=False, name="shared")
    ends = [shared(Dense(8, "sigmoid", name=name)(inputs)) for name in "ab"]
    model = randomized(Model(inputs, Dense(3)(Concatenate()(ends))))
    for name, bias in zip("ab", (2.0, second)):
        branch = model.get_layer(name)
        kill(branch, 3)
        branch.bias.assign([1.0] * 3 + [bias] + [1.0] * 4)
    small = nb.shrink(model)
    assert [small.get_layer(name).units for name in "ab"] == [left] * 2
    assert small.get_layer("shared").use_bias == (left == 7)
    assert difference(model, small) <= 1e-5


def test_what_nobody_reads_goes_with_all_that_it_reads(nb):
    model = stack(Dense(7, "relu"), Dense(6, "tanh"), Dense(5), shape=(4,))
    _, middle, last, *_ = model.layers
    read = np.arange(6) < 2  # the first unit of all is read by the others only
    last.kernel.assign(last.kernel * read[:, None])
    middle.kernel.assign(middle.kernel * ~np.outer(np.arange(7) == 0, read))
    small = nb.shrink(model)
    assert [x.units for x in small.layers if isinstance(x, Dense)] == [6, 2, 5, 3]
    assert difference(model, small) <= 1e-5


@both_rules
def test_a_network_without_any_units_keeps_one_of_each_layer(nb, rule):
    hidden = Conv2D(6, 3, activation="sigmoid"), Conv2D(5, 3), Dense(4, "softplus")
    pruned = nb.prune(stack(*hidden), rule, 1)
    small = nb.shrink(pruned)
    kernels = [layer.kernel.shape for layer in small.layers if hasattr(layer, "kernel")]
    assert [shape[-1] for shape in kernels] == [1, 1, 1, 3]
    assert difference(pruned, small) <= 1e-5


# what is not understood stays


@keras.saving.register_keras_serializable("tests")
def each_by_the_sum(values):
    """Return values over the sum of their magnitudes."""
    return values / ops.sum(ops.abs(values), axis=-1, keepdims=True)


def normed_twice(x):
    """Return what a normalisation makes of `x`, and of it in training."""
    layer = BatchNorm()
    twice = layer(x, training=False), layer(Dense(8, name="m")(x), training=True)
    return Concatenate()(twice)


CELLS = layers.LSTMCell, layers.GRUCell
BETWEEN = {  # what reads eight units; its kernels are pruned if it is called `m`
    "softmax": lambda x: layers.Softmax()(x),
    "softmax activation": lambda x: layers.Activation("softmax")(x),
    "LayerNormalization": lambda x: layers.LayerNormalization()(x),
    "normalized positions": lambda x: BatchNorm(axis=1)(x),
    "in training": normed_twice,
    "turned": lambda x: layers.EinsumDense("abc,cd->abd", (6, 8), name="m")(x),
    "scale": lambda x: layers.EinsumDense("abc,c->abc", (6, 8))(x),
    "own layer": lambda x: DenseOfMyOwn(6)(x),
    "steps": lambda x: layers.TimeDistributed(Dense(6, "relu", name="m"))(x),
    "two groups": lambda x: Conv1D(4, 3, groups=2)(x),
    "transposed": lambda x: layers.Conv1DTranspose(4, 3, name="m")(x),
    "spectral": lambda x: layers.SpectralNormalization(Dense(6, name="m"))(x),
    "causal": lambda x: Conv1D(6, 2, padding="causal", name="m")(x),
    "video": lambda x: layers.ConvLSTM1D(4, 2, name="m")(layers.Reshape((6, 4, 2))(x)),
    "permuted": lambda x: layers.Permute((2, 1))(x),
    "cells": lambda x: layers.RNN([own(4) for own in CELLS], True, name="m")(x),
    "single units": lambda x: layers.MultiHeadAttention(4, 1, name="m")(x, x),
    "split": lambda x: operator.mul(*ops.split(x, 2, axis=-1)),
    "glu": lambda x: ops.glu(x),
    "constants of units": lambda x: x + np.arange(8, dtype="float32"),
    "more constants": lambda x: ops.concatenate([x, np.ones((8, 6, 2), "f")], axis=-1),
    "gate of one": lambda x: x * Dense(1, "sigmoid")(x),
    "other rank": lambda x: x + Dense(8, name="m")(Flatten()(x))[:, None],
    "mean": lambda x: ops.mean(x, axis=-1, keepdims=True),
    "halves": lambda x: layers.Reshape((12, 4))(x),
}
UNDERSTOOD = {  # these take a constant, although their own units stay
    "log_softmax": lambda x: Dense(8, "log_softmax", name="m")(x),
    "own activation": lambda x: Dense(8, each_by_the_sum, name="m")(x),
    "threshold": lambda x: ReLU(threshold=0.4, negative_slope=0.3, max_value=0.6)(x),
}


def is_in(variable, names):
    """Return whether a variable belongs to one of the layers named."""
    return not {*names.split()}.isdisjoint(variable.path.split("/"))


def assert_only_these_lose_weights(nb, model, names):
    """Assert that the smaller half of the kernels in these layers goes, no others."""
    pruned, gone, size = nb.prune(model, "weight", 0.5), 0, 0
    for before, after in zip(model.weights, pruned.weights, strict=True):
        value, left = before.numpy(), after.numpy()
        due = np.zeros(value.shape, bool)
        if before.name in KERNELS and is_in(before, names):
            due = lowest(np.abs(value), 0.5)
            gone, size = gone + due.sum(), size + due.size
        silent = value.ndim == 1 and left == 0  # the bias of a unit without weights
        assert np.array_equal(left, np.where(due | silent, 0, value)), before.path
    assert np.isclose(nb.measured_sparsity(pruned), gone / size)


@pytest.mark.parametrize("case", late([*BETWEEN, *UNDERSTOOD], ["cells", "video"]))
def test_what_is_not_understood_keeps_the_units_that_it_reads(nb, case):
    keras.utils.set_random_seed(0)
    inputs = Input(batch_shape=(8, 6, 3))
    x = Conv1D(8, 1, activation="sigmoid", name="before")(inputs)
    x = (BETWEEN | UNDERSTOOD)[case](x)
    x = Flatten()(Dense(6, "sigmoid", name="after")(x))
    model = randomized(Model(inputs, Dense(3)(x)))
    kill(model.get_layer("before"), 2, 5)
    kill(model.get_layer("after"), 4)
    assert_only_these_lose_weights(nb, model, "before m after")
    for own in model, nb.prune(model, "unit", 0.5):
        small = nb.shrink(own)
        left = sum(map(np.count_nonzero, small.get_weights()))
        assert nb.parameters_left(own) <= left
        assert difference(own, small) <= 1e-5
        if own is model:
            assert small.get_layer("before").filters == (6 if case in UNDERSTOOD else 8)
            assert small.get_layer("after").units == 5


def test_channels_first_is_not_understood(nb):
    inputs, own = Input((2, 7, 8)), {"data_format": "channels_first"}
    x = ReLU()(Conv2D(6, 3, **own, name="before")(inputs))
    model = Model(inputs, Dense(3)(Flatten(**own)(x)))
    kill(model.get_layer("before"), 2, 5)
    assert nb.shrink(model).get_layer("before").filters == 6
    with pytest.raises(ValueError, match="no units"):
        nb.prune(model, "unit", 0.5)


@pytest.mark.parametrize("build", [Closed, lambda: Sequential([Dense(4)])])
@pytest.mark.parametrize("ask", ["Units", "shrink", "prunable"])
def test_a_model_without_a_graph_is_named(nb, build, ask):
    model = build()
    model.build((None, 6)) if build is Closed else None
    with pytest.raises(ValueError, match=repr(model.name)):
        getattr(nb, ask)(model)


# what feeds the outputs is never pruned


def inside(*parts):
    """Return a part of layers."""
    return Sequential([Input((5, 6)), *parts])


def two_ways(x):
    """Return one end of a part of two ways, and what follows the other end."""
    ends = {"j": Input((5, 6), name="j"), "i": Input((5, 8), name="i")}
    ways = {"p": ReLU()(ends["j"]), "q": Dense(4, name="d")(ends["i"])}
    both = Model(ends, ways)({"i": Dense(8, name="c")(x), "j": x})
    return [both["p"], Dense(3)(both["q"])]


def called_again(x):
    """Return what a part makes that is called twice, and its layers outside of it."""
    c, head = Dense(8, "sigmoid", name="c"), Dense(6, name="head")
    part = inside(c, head)
    return part(part(x)) + head(c(x))


ROW = np.array([[0.5, -1.0, 2.0, 0.3, 1.5, -0.7]], "float32")
GRID = np.linspace(-1, 1, 30, dtype="float32").reshape(5, 6)
CHOICE = np.array([[0, 1], [1, 2]])
LAST = {  # what comes after `b`, whose kernel feeds the outputs
    "nothing": lambda x: x,
    "ReLU": lambda x: ReLU()(x),
    "PReLU": lambda x: layers.PReLU()(x),
    "Softmax": lambda x: layers.Softmax()(x),
    "softmax of places": lambda x: layers.Softmax(axis=1)(x),
    "Reshape": lambda x: layers.Reshape((10, 3))(x),
    "pooled": lambda x: Mean1D()(ReLU()(BatchNorm()(x))),
    "normalisations": lambda x: BatchNorm()(layers.LayerNormalization()(x)),
    "LayerNormalization": lambda x: layers.LayerNormalization(axis=[1, 2])(x),
    "Normalization": lambda x: layers.Normalization(axis=(1, 2))(x),
    "anchors": lambda x: x + GRID,
    "where": lambda x: ops.where(ROW > 0, x, 0.0),
    "take": lambda x: ops.take(x, CHOICE, axis=-1),
    "shuffle": lambda x: ops.reshape(ops.transpose(x, (0, 2, 1)), (-1, 30)),
    "slice": lambda x: x[:, 0],
    "mean": lambda x: ops.mean(ops.stack([x, Dense(6)(x)]), axis=0),
    "residual": lambda x: Add()([x, inside(Dense(6))(x)]),
    "nested Softmax": lambda x: inside(layers.Softmax())(x),
}
HIDDEN = {  # what comes after `b`, whose kernel does not feed the outputs
    "Dense": lambda x: Dense(3)(x),
    "sum of heads": lambda x: Dense(3)(x) + Dense(3)(x),
    "own layer": lambda x: DenseOfMyOwn(3)(x),
    "TimeDistributed": lambda x: layers.TimeDistributed(Dense(3))(x),
    "LSTM": lambda x: layers.LSTM(3)(x),
    "transposed": lambda x: layers.Conv1DTranspose(3, 3)(x),
    "nested Dense": lambda x: inside(Dense(3))(x),
    "words": lambda x: ops.matmul(x, ops.transpose(GRID)),
    "called again": called_again,
}
BOTH = {  # `b` feeds an output, `c` and `d` do not
    "answered early": lambda x: [x, Dense(3)(Dense(8, "relu", name="c")(x))],
    "two ways": two_ways,
}


@pytest.mark.parametrize("case", [*LAST, *HIDDEN, *BOTH])
def test_what_feeds_the_outputs_stays_whole(nb, case):
    inputs = Input((5, 6))
    x = Dense(6, name="b")(Dense(8, "relu", name="a")(inputs))
    model = randomized(Model(inputs, (LAST | HIDDEN | BOTH)[case](x)))
    if case == "Normalization":
        model.layers[-1].finalize_state()
    names = "a" if case in LAST else "a c d" if case in BOTH else "a b c"
    assert_only_these_lose_weights(nb, model, names)
    pruned = nb.prune(model, "unit", 0.5)
    small = nb.shrink(pruned)
    assert difference(pruned, small) <= 1e-5
    left, whole = sizes(small), case == "two ways"  # where a part reads the units
    assert left["a"] == 4 and left.get("c", 4) == (8 if whole else 4)


# which kernels are pruned


def test_transforms_are_not_pruned_and_own_kernels_only_if_they_are_named(nb):
    inputs = Input((64, 1))
    x = layers.STFTSpectrogram("log", 8, 4, 8)(inputs)
    x = DenseOfMyOwn(4, name="own")(Dense(8, "relu", name="a")(x))
    model = randomized(Model(inputs, Dense(3)(Dense(6, "relu", name="b")(x))))
    assert_only_these_lose_weights(nb, model, "a b")
    pruned = nb.prune(model, "weight", 0.25, ["own/kernel"])
    assert nb.measured_sparsity(pruned, ["own/kernel"]) == 0.25


@both_rules
def test_depthwise_kernels_and_those_of_a_part_can_be_named(nb, rule):
    part = Sequential([Input((8, 8, 2)), Conv2D(6, 3, name="b"), ReLU()], name="part")
    model = stack(part, Conv2D(4, 1, name="a"), layers.DepthwiseConv2D(3, name="dw"))
    paths = [v.path for v in model.weights if v.name == "kernel"][:3]
    pruned = nb.prune(model, rule, 0.5, paths)
    zeros = [np.mean(v.numpy() == 0) for v in pruned.weights if v.path in paths]
    assert zeros == ([0.5] * 3 if rule == "weight" else [0, 0.5, 0]), "units that stay"


@both_rules
def test_a_depthwise_convolution_by_another_name_is_one(nb, rule):
    layer = layers.DepthwiseConv2D(3), Conv2D(6, 3, groups=6)
    one, other = (stack(Conv2D(6, 3), x, ReLU(), Conv2D(4, 1)) for x in layer)
    pairs = zip(one.get_weights(), other.get_weights())
    other.set_weights([values.reshape(own.shape) for values, own in pairs])
    one, other = (nb.prune(model, rule, 0.5) for model in (one, other))
    for values, same in zip(one.get_weights(), other.get_weights()):
        assert np.array_equal(values.ravel(), same.ravel())
    assert nb.shrink(one).count_params() == nb.shrink(other).count_params()
    assert nb.measured_sparsity(one) == nb.measured_sparsity(other) == 0.5


@pytest.mark.parametrize("mode", ["int8", "int4", "float8"])
def test_quantized_kernels_are_refused(nb, mode):
    model = stack(Dense(8, "relu", name="culprit"), Dense(6), shape=(6,))
    model.layers[0].quantize(mode)
    with pytest.raises(ValueError, match=r"culprit.*prune before you quantize"):
        nb.prune(model, "weight", 0.5)


def test_transposed_kernels_have_units_on_the_last_axis_but_one(nb):
    names, own = ("of_one", "to_one"), {"padding": "same", "activation": "relu"}
    parts = [layers.Conv2DTranspose(n, 3, **own, name=x) for n, x in zip((8, 1), names)]
    model = stack(*parts, shape=(4, 4, 1))
    assert [v.path.split("/")[-2] for v in nb.prunable_kernels(model)] == ["of_one"]


@pytest.mark.parametrize("policy", ["bfloat16", "mixed_float16", "float64"])
def test_half_of_the_weights_go_in_any_precision(nb, policy):
    own = Dense(8, "relu", name="a", dtype=policy), Dense(6, name="b", dtype=policy)
    model = randomized(Sequential([Input((8,)), *own, Dense(3, dtype="float32")]))
    assert_only_these_lose_weights(nb, model, "a b")
    for rule in nb.n_m_mask(2, 4), nb.block_mask((2, 2)), nb.Globally(nb.magnitudes):
        assert np.isclose(nb.measured_sparsity(nb.prune(model, rule, 0.5)), 0.5)
    pruned = nb.prune(model, "unit", 0.5)
    small = nb.shrink(pruned)
    assert [x.units for x in small.layers[-3:]] == [4, 3, 3]
    assert difference(pruned, small) <= (1e-5 if policy == "float64" else 2e-2)


# what a network costs


BARE = {"use_bias": False}
COUNTED = {  # products: each weight of a kernel, at each place where it is applied
    "Dense": (Dense(5, **BARE), (4, 6, 3), 4 * 6 * 3 * 5),
    "Conv2D": (Conv2D(5, 3, **BARE), (8, 7, 2), 6 * 5 * 9 * 2 * 5),
    "strides": (Conv2D(5, 3, 2, "same", **BARE), (8, 7, 2), 4 * 4 * 9 * 2 * 5),
    "depthwise": (layers.DepthwiseConv2D(3, **BARE), (8, 8, 4), 36 * 9 * 4),
    "flatten": (layers.Flatten(), (6, 5, 4), 0),
}


@pytest.mark.parametrize("case", COUNTED)
def test_work_is_counted(nb, case):
    layer, shape, products = COUNTED[case]
    inputs, images = Input(shape), np.ones((2, *shape), "float32")
    twice = Model(inputs, [layer(inputs), layer(inputs)])
    assert nb.flops(twice, images[:1]) == 2 * 2 * products
    assert nb.flops(twice, images) == 2 * 2 * 2 * products


def test_a_shrunk_network_does_the_work_of_what_is_left(nb):
    small = nb.shrink(pruned_network(nb, mobile, "unit", 0.5))
    for model, a, b, d in ((mobile(), 6, 8, 4), (small, 3, 4, 2)):
        products = 64 * (27 * a + a * b + 9 * b + b * a) + b * d + d * b + a * 3
        found = nb.flops(model, np.ones((1, 8, 8, 3), "float32"))
        assert 2 * products <= found <= 2.5 * products, "biases are counted, too"


SUPPORT = {  # zeros by weights and by units (%), and if the model gets smaller
    "Dense": (Dense(8), (6,), (50, 50), True),
    "EinsumDense": (layers.EinsumDense("ab,bc->ac", 8), (6,), (50, 0), False),
    "Conv3D": (Conv3D(8, 3), (5, 5, 5, 2), (50, 50), True),
    "depthwise": (layers.DepthwiseConv2D(3), (9, 9, 2), (0, 0), False),
    "transposed": (layers.Conv2DTranspose(8, 3), (9, 9, 2), (50, 0), False),
    "separable": (layers.SeparableConv2D(8, 3), (9, 9, 2), (50, 50), True),
    "attention": (layers.MultiHeadAttention(2, 4), (9, 8), (50, 0), False),
}


@pytest.mark.parametrize("kind", SUPPORT)
def test_support_says_what_works(nb, kind):
    layer, shape, zeros, shrinks = SUPPORT[kind]
    row = nb.support(layer, shape)
    left = row.pop("parameters left (%)")
    assert row == {"weights: zeros (%)": zeros[0], "units: zeros (%)": zeros[1]}
    assert left < 75 if shrinks else left == 100


@pytest.mark.parametrize("name", ["prune", "shrink"])
def test_support_hides_no_other_error_than_a_refusal(nb, monkeypatch, name):
    monkeypatch.setattr(nb, name, lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        nb.support(Dense(4), (3,))
