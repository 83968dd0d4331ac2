"""I prune my own network, whatever it looks like, and the small one answers alike."""

import functools
import math
import operator
import random

import keras
import numpy as np
import pytest
from conftest import run_on_two_devices
from helpers import (
    Closed,
    answers,
    difference,
    ends_of,
    expected_weights,
    randomized,
    reloaded,
    rows_of,
    same_weights,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import Input, Model, Sequential, layers
from keras.layers import (
    BatchNormalization,
    Conv1D,
    Conv2D,
    Conv3D,
    Dense,
    Flatten,
    GlobalAveragePooling1D,
    GlobalAveragePooling2D,
)

RULES = ("weight", "unit")


# networks of all kinds: (build, units that go together, kernels that lose only weights)


def dense_chain():
    """Return a chain of Dense layers."""
    parts = [Dense(8, "relu", name="a"), Dense(7, "tanh", name="b"), Dense(3)]
    return Sequential([Input((6,), name="rows"), *parts])


def cnn():
    """Return a small convolutional network with a batch normalisation."""
    return Sequential(
        [
            Input((9, 9, 2), name="rows"),
            Conv2D(6, 3, padding="same", use_bias=False, name="a"),
            BatchNormalization(name="a_norm"),
            layers.ReLU(),
            layers.MaxPooling2D(),
            Conv2D(5, 3, activation="sigmoid", name="b"),
            Flatten(),
            Dense(7, "relu", name="c"),
            Dense(3, "softmax"),
        ]
    )


def normalized(x, layer):
    """Return what a layer and a batch normalisation make of `x`."""
    return BatchNormalization(name=f"{layer.name}_norm")(layer(x))


def pooled(inputs, x, classes=3):
    """Return a model whose head averages the positions of `x`."""
    return Model(inputs, Dense(classes)(GlobalAveragePooling2D()(x)))


def residual():
    """Return a network whose blocks add what they read."""
    own = {"padding": "same", "use_bias": False}
    inputs = Input((8, 8, 3), name="rows")
    x = layers.ReLU()(normalized(inputs, Conv2D(8, 3, **own, name="a")))
    y = layers.ReLU()(normalized(x, Conv2D(6, 3, **own, name="b")))
    x = layers.ReLU()(layers.Add()([normalized(y, Conv2D(8, 3, **own, name="c")), x]))
    y = layers.ReLU()(normalized(x, Conv2D(6, 3, 2, **own, name="d")))
    y = normalized(y, Conv2D(9, 3, **own, name="e"))
    shortcut = normalized(x, Conv2D(9, 1, 2, **own, name="f"))
    return pooled(inputs, layers.ReLU()(layers.Add()([y, shortcut])))


def concatenating():
    """Return a network of branches that are concatenated."""
    inputs = Input((8, 8, 3), name="rows")
    a = Conv2D(4, 1, activation="relu", name="a")(inputs)
    b = Conv2D(6, 3, padding="same", activation="relu", name="b")(inputs)
    both = BatchNormalization(name="norm")(layers.Concatenate()([a, b]))
    c = Conv2D(5, 3, name="c", activation="relu")(both)
    return pooled(inputs, layers.Concatenate()([c, c]))


def mobile():
    """Return a network of inverted residuals, as MobileNetV2 has them."""
    own = {"padding": "same", "use_bias": False}
    inputs = Input((8, 8, 3), name="rows")
    x = layers.ReLU(6)(normalized(inputs, Conv2D(6, 3, **own, name="a")))
    y = layers.ReLU(6)(normalized(x, Conv2D(8, 1, **own, name="b")))
    y = layers.ReLU(6)(normalized(y, layers.DepthwiseConv2D(3, **own, name="dw")))
    return pooled(inputs, layers.Add()([x, normalized(y, Conv2D(6, 1, name="c"))]))


def squeeze_and_excite():
    """Return a network whose channels are gated, by operations in place of layers."""
    inputs = Input((8, 8, 3), name="rows")
    x = Conv2D(8, 3, padding="same", name="a")(inputs)
    x = keras.activations.relu(x)
    gate = layers.Reshape((1, 1, 8))(GlobalAveragePooling2D()(x))
    gate = keras.activations.relu(Dense(4, name="b")(gate))
    gate = keras.activations.sigmoid(Dense(8, name="c")(gate))
    x = Conv2D(6, 3, activation="relu", name="d")(x * gate)
    return Model(inputs, Dense(3)(Flatten()(x)))


def siamese():
    """Return a network that looks at two inputs with the same layers."""
    left, right = Input((6,), name="left"), Input((6,), name="right")
    parts = Dense(8, "sigmoid", name="a"), Dense(5, "relu", name="b")
    one, other = (parts[1](parts[0](x)) for x in (left, right))
    x = Dense(6, "relu", name="c")(layers.Subtract()([one, other]))
    return Model([left, right], Dense(2)(x))


def nested():
    """Return a model with a Sequential and a functional one inside."""
    inputs, inner = Input((6,), name="rows"), Input((5,))
    part = [Input((8,)), Dense(7, "relu", name="b"), Dense(5, name="c")]
    hidden = Dense(9, "sigmoid", name="d")(inner)
    hidden = layers.Add()([Dense(6, name="e")(hidden), Dense(6, name="f")(inner)])
    functional = Model(inner, Dense(4, "tanh", name="g")(layers.ReLU()(hidden)))
    x = Sequential(part)(Dense(8, "relu", name="a")(inputs))
    return Model(inputs, Dense(3)(Dense(6, "relu", name="h")(functional(x))))


def two_in_two_out():
    """Return a model of dicts: an image and a number in, two answers out."""
    inputs = {"image": Input((8, 8, 2), name="image"), "age": Input((1,), name="age")}
    x = Conv2D(6, 3, activation="relu", name="a")(inputs["image"])
    x = layers.Concatenate()([GlobalAveragePooling2D()(x), inputs["age"]])
    x = Dense(8, "relu", name="b")(x)
    ends = {"kind": Dense(3, "softmax", name="kind"), "size": Dense(1, name="size")}
    ends = {name: layer(x) for name, layer in ends.items()}
    return Model(inputs, ends)


def text():
    """Return a network that reads words."""
    return Sequential(
        [
            Input((9,), dtype="int32", name="rows"),
            layers.Embedding(10, 4),
            Conv1D(8, 3, padding="causal", activation="relu", name="a"),
            layers.GlobalMaxPooling1D(),
            layers.Dropout(0.1, seed=0),
            Dense(6, "relu", name="b"),
            Dense(2),
        ]
    )


def recurrent():
    """Return a network that remembers."""
    return Sequential(
        [
            Input((5, 3), name="rows"),
            Dense(6, "relu", name="a"),
            layers.Bidirectional(layers.LSTM(4, return_sequences=True), name="b"),
            layers.GRU(6, name="c"),
            Dense(8, "relu", name="d"),
            Dense(3),
        ]
    )


def transformer():
    """Return a block of a transformer."""
    inputs = Input((5, 4), name="rows")
    x = Dense(8, name="a")(inputs)
    seen = layers.MultiHeadAttention(2, 4, name="b")(x, x)
    x = layers.LayerNormalization()(layers.Add()([x, seen]))
    y = Dense(8, name="d")(Dense(12, "gelu", name="c")(x))
    x = layers.LayerNormalization()(x + y)
    return Model(inputs, Dense(3)(GlobalAveragePooling1D()(x)))


def autoencoder():
    """Return an autoencoder that ends in a transposed convolution."""
    return Sequential(
        [
            Input((8, 8, 1), name="rows"),
            Conv2D(6, 3, 2, padding="same", activation="relu", name="a"),
            Flatten(),
            Dense(5, "relu", name="b"),
            Dense(32, "relu", name="c"),
            layers.Reshape((2, 2, 8)),
            layers.Conv2DTranspose(4, 3, 2, "same", activation="relu", name="d"),
            layers.Conv2DTranspose(2, 3, 2, padding="same"),
        ]
    )


def wide_and_deep():
    """Return a network whose inputs also lead straight to the end."""
    inputs = Input((6,), name="rows")
    x = Dense(7, "softplus", name="b")(Dense(8, "relu", name="a")(inputs))
    return Model(inputs, Dense(1)(layers.Concatenate()([inputs, x])))


def sum_of_heads():
    """Return a network whose output is the sum of two layers."""
    inputs = Input((6,), name="rows")
    heads = [Dense(3)(Dense(8, "relu", name=name)(inputs)) for name in "ab"]
    return Model(inputs, heads[0] + heads[1])


def backbone():
    """Return a network that ends in features."""
    inputs = Input((8, 8, 3), name="rows")
    x = layers.ReLU()(normalized(inputs, Conv2D(6, 3, name="a")))
    x = layers.ReLU()(normalized(x, Conv2D(8, 3, name="end")))
    return Model(inputs, GlobalAveragePooling2D()(x))


def video():
    """Return a network of images in a row."""
    inputs = Input((3, 6, 6, 2), name="rows")
    x = layers.ConvLSTM2D(4, 3, padding="same", name="a")(inputs)
    return pooled(inputs, Conv2D(6, 3, activation="relu", name="b")(x))


def volume():
    """Return a network of three-dimensional images."""
    inputs = Input((6, 6, 6, 2), name="rows")
    x = Conv3D(6, 3, activation="relu", name="a")(inputs)
    x = Conv3D(5, 2, activation="relu", padding="same", name="b")(x)
    return Model(inputs, Dense(3)(layers.GlobalMaxPooling3D()(x)))


def grouped():
    """Return a network of grouped convolutions, one of them depthwise."""
    inputs = Input((8, 8, 3), name="rows")
    x = Conv2D(8, 3, activation="relu", name="a")(inputs)
    x = layers.ReLU()(normalized(x, Conv2D(8, 3, padding="same", groups=8, name="b")))
    x = Conv2D(6, 3, activation="relu", name="c")(x)
    return pooled(inputs, Conv2D(4, 1, groups=2, activation="relu")(x))


def separable():
    """Return a network of separable convolutions."""
    inputs = Input((8, 8, 3), name="rows")
    own = {"activation": "relu", "depth_multiplier": 2}
    x = layers.SeparableConv2D(8, 3, padding="same", **own, name="a")(inputs)
    x = layers.SeparableConv2D(6, 3, **own, name="b")(x)
    return Model(inputs, Dense(3)(Flatten()(x)))


def mixed_precision():
    """Return a network that computes in half precision."""
    own = {"dtype": "mixed_float16"}
    inputs = Input((8, 8, 3), name="rows")
    x = Conv2D(6, 3, name="a", **own)(inputs)
    x = layers.ReLU(**own)(BatchNormalization(name="norm", **own)(x))
    x = Dense(8, "relu", name="b", **own)(Flatten(**own)(x))
    return Model(inputs, Dense(3, dtype="float32")(x))


def u_net():
    """Return a network that puts small and large images together."""
    inputs = Input((8, 8, 2), name="rows")
    a = Conv2D(4, 3, padding="same", activation="relu", name="a")(inputs)
    b = layers.MaxPooling2D()(a)
    b = Conv2D(6, 3, padding="same", activation="relu", name="b")(b)
    up = layers.UpSampling2D(interpolation="bilinear")(b)
    x = layers.Concatenate()([a, up])
    x = Conv2D(5, 3, padding="same", activation="relu", name="c")(x)
    return Model(inputs, Conv2D(1, 1, activation="sigmoid")(x))


NETWORKS = {
    dense_chain: (["a", "b"], ""),
    cnn: (["a a_norm", "b", "c"], ""),
    residual: (
        ["a a_norm c c_norm", "b b_norm", "d d_norm", "e e_norm f f_norm"],
        "",
    ),
    concatenating: (["a norm", "b norm@4", "c"], ""),
    mobile: (["a a_norm c c_norm", "b b_norm dw dw_norm"], ""),
    squeeze_and_excite: (["a c", "b", "d"], ""),
    siamese: (["a", "b", "c"], ""),
    nested: (["b", "d", "e f", "h"], "acg"),
    two_in_two_out: (["a", "b"], ""),
    text: (["a", "b"], ""),
    recurrent: (["d"], "abc"),
    transformer: (["c"], "abd"),
    autoencoder: (["a", "b"], "cd"),
    wide_and_deep: (["a", "b"], ""),
    sum_of_heads: (["a", "b"], ""),
    backbone: (["a a_norm"], ""),
    video: (["b"], "a"),
    volume: (["a", "b"], ""),
    grouped: (["a b b_norm"], "c"),
    separable: (["a", "b"], ""),
    mixed_precision: (["a norm", "b"], ""),
    u_net: (["a", "b", "c"], ""),
}
every_network = pytest.mark.parametrize("build", NETWORKS, ids=lambda x: x.__name__)
both_rules = pytest.mark.parametrize("rule", RULES)


@functools.cache
def random_network(build):
    """Return a network with random weights, built once."""
    keras.utils.set_random_seed(0)
    return randomized(build())


def recalibrated(model, rows=None):
    """Give a model's batch normalisations the statistics of rows; return it.

    Otherwise what was pruned may answer the same to everything.
    """
    for layer in model._flatten_layers():
        if isinstance(layer, BatchNormalization):
            layer.momentum = 0.0
    model(rows_of(model) if rows is None else rows, training=True)
    return model


def assert_answers_vary(model, count=8, least=0.02):
    """Assert that each output of a model depends on what the rows are."""
    for output in answers(model, rows_of(model, count=count)):
        assert np.ptp(output, axis=0).max() > least * np.abs(output).max()


def interface(model):
    """Return names, shapes and types of what a model takes and returns."""
    described = keras.tree.map_structure(lambda x: (x.shape, x.dtype), ends_of(model))
    names = [x.name for x in model.inputs]
    names += [x._keras_history.operation.name for x in model.outputs]
    return described, names


def nodes(model):
    """Return how often each layer and each operation of a model is called."""
    called = getattr(model, "operations", model.layers)
    return [len(operation._inbound_nodes) for operation in called]


@every_network
@both_rules
def test_what_is_due_goes_and_nothing_else(nb, build, rule):
    model = random_network(build)
    before, calls = model.get_weights(), nodes(model)
    for sparsity in (0, 0.5, 0.7):
        pruned = nb.prune(model, rule, sparsity)
        due = expected_weights(model, *NETWORKS[build], rule, sparsity)
        assert same_weights(pruned, due)
        assert interface(pruned) == interface(model)
    assert same_weights(model, before) and nodes(model) == calls


@every_network
@both_rules
def test_fit_ends_with_the_zeros_due(nb, tmp_path, build, rule):
    model = nb.copy_of(random_network(build))
    due = expected_weights(model, *NETWORKS[build], rule, 0.5)
    rows = rows_of(model)
    targets = keras.tree.map_structure(lambda x: np.ones(x.shape), model(rows))
    model.compile(keras.optimizers.SGD(1e-3), "mse", jit_compile=False)
    pruner = nb.Pruner(rule, nb.constant_sparsity(0.5))
    model.fit(rows, targets, 4, 2, 0, callbacks=[pruner])
    for values, expected in zip(model.get_weights(), due, strict=True):
        assert ((values == 0) == (expected == 0)).all()
    assert not same_weights(model, due), "nothing was trained"
    assert not any(getattr(v, "constraint", None) for v in model.variables)
    again = reloaded(model, tmp_path)
    assert same_weights(again, model.get_weights())
    assert difference(model, again) == 0


@every_network
@both_rules
def test_a_shrunk_network_answers_alike(nb, tmp_path, build, rule):
    groups, alone = NETWORKS[build]
    pruned = recalibrated(nb.prune(random_network(build), rule, 0.5))
    before = pruned.get_weights()
    small = nb.shrink(pruned)
    assert same_weights(pruned, before)
    assert_answers_vary(pruned)
    tolerance = 5e-3 if build is mixed_precision else 1e-5
    assert difference(pruned, small) <= tolerance
    assert interface(small) == interface(pruned)
    assert difference(small, reloaded(small, tmp_path)) == 0
    sizes, left = ({x.name: x for x in m._flatten_layers()} for m in (pruned, small))
    for name in {*alone, *" ".join(groups).split()} - {"norm", "norm@4"}:
        units, kept = (x[name].output.shape[-1] for x in (sizes, left))
        goes = rule == "unit" and name not in alone
        assert kept == units - round(0.5 * units) if goes else kept <= units


@every_network
def test_a_model_is_left_as_it_was(nb, build):
    model = random_network(build)
    before, calls = model.get_weights(), nodes(model)
    one, other = nb.Units(model), nb.Units(model)
    assert one.outer == other.outer
    for layer, pair in one.layers.items():
        assert all(map(np.array_equal, pair, other.layers[layer]))
    nb.shrink(nb.prune(model, "unit", 0.5))
    nb.shrink(model)
    assert same_weights(model, before) and nodes(model) == calls
    assert all(layer.output is not None for layer in model.layers)


# networks at random


FUNCTIONS = {
    "add": operator.add,
    "subtract": operator.sub,
    "multiply": operator.mul,
    "maximum": keras.ops.maximum,
}
MERGES = {name: getattr(layers, name.capitalize()) for name in FUNCTIONS}
MERGES |= {"average": layers.Average, "minimum": layers.Minimum}
ACTIVATIONS = ("relu", "sigmoid", "softplus", "tanh", "gelu", "relu6", "linear")
UNKNOWN = {
    "softmax": lambda: layers.Softmax(),
    "layer normalization": lambda: layers.LayerNormalization(),
    "glu-like": lambda: layers.UnitNormalization(),
}


class Program:
    """A random graph: inputs, and steps (what is called, on which earlier results)."""

    def __init__(self, random):
        """Draw the graph, and build it as a model."""
        self.random, self.steps = random, []
        count = random.randint(1, 2)
        self.inputs = [Input((6, 6, random.randint(2, 3))) for _ in range(count)]
        self.tensors = [*self.inputs]
        for _ in range(random.randint(2, 9)):
            random.choice((self.write, self.write, self.write, self.change))(0)
            random.choice((self.change, self.merge, self.gate, self.again))(0)
        ends = [self.head(random.randint(0, 3)) for _ in range(random.randint(1, 2))]
        outputs = [self.tensors[end] for end in ends]
        self.model, self.ends = Model(self.inputs, outputs), ends
        self.needed = {*ends}
        for place in reversed(range(count, len(self.tensors))):
            if place in self.needed:
                self.needed.update(self.steps[place - count][1])

    def pick(self, fits=lambda x: len(x.shape) == 4):
        """Return the place of a result, preferably a late one, None if none fits."""
        places = [i for i, x in enumerate(self.tensors) if fits(x)]
        return self.random.choice(places + places[-2:]) if places else None

    def do(self, what, *places):
        """Append a step, and return the place of its result."""
        args = [self.tensors[i] for i in places]
        self.steps.append((what, places))
        self.tensors.append(call(what, args))
        return len(self.tensors) - 1

    def write(self, _, units=None, place=None):
        """Add a layer with a kernel."""
        random = self.random
        place = self.pick() if place is None else place
        _, side, _, size = self.tensors[place].shape
        units = units or random.randint(2, 6)
        own = {
            "activation": random.choice(ACTIVATIONS),
            "use_bias": random.random() < 0.7,
            "padding": "same" if side < 4 else random.choice(("same", "valid")),
            "strides": random.choice((1, 1, 1, 2)),
        }
        window, times = random.choice((1, 2, 3)), random.choice((1, 1, 2))
        kinds = ["conv", "dense", "depthwise", "separable"] * 5 + ["conv", "grouped"]
        match random.choice(kinds):
            case "conv":
                layer = Conv2D(units, window, **own)
            case "dense":
                layer = Dense(units, own["activation"], own["use_bias"])
            case "depthwise":
                layer = layers.DepthwiseConv2D(window, depth_multiplier=times, **own)
            case "grouped":
                layer = Conv2D(times * size, window, groups=size, **own)
            case _:
                layer = layers.SeparableConv2D(
                    units, window, depth_multiplier=times, **own
                )
        return self.do(layer, place)

    def change(self, _):
        """Add a layer without a kernel."""
        random, place = self.random, self.pick()
        activation = random.choice(ACTIVATIONS)
        same = random.choice(("same", "valid"))
        if self.tensors[place].shape[1] < 4:
            same = "same"
        choices = [
            BatchNormalization,
            BatchNormalization,
            lambda: layers.Activation(activation),
            lambda: getattr(keras.activations, activation),
            lambda: layers.MaxPooling2D(2, padding=same),
            lambda: layers.AveragePooling2D(2, 1, padding=same),
            lambda: layers.ZeroPadding2D(1),
            lambda: layers.Dropout(0.5),
            lambda: layers.PReLU(shared_axes=[1, 2]),
            plus_some,
            random.choice([*UNKNOWN.values()]),
        ]
        made = random.choice(choices)
        return self.do(made if made is plus_some else made(), place)

    def merge(self, _):
        """Put two results of the same size together."""
        random, one = self.random, self.pick()
        shape = self.tensors[one].shape
        other = self.pick(lambda x: x.shape[:3] == shape[:3] and len(x.shape) == 4)
        if random.random() < 0.25:
            return self.do(layers.Concatenate(), one, other)
        if self.tensors[other].shape != shape or other == one:
            layer = Conv2D(shape[-1], 3, padding="same", activation="relu")
            other = self.do(layer, other)
        name = random.choice([*FUNCTIONS])
        own = FUNCTIONS[name] if random.random() < 0.5 else MERGES[name]()
        return self.do(own, one, other)

    def gate(self, _):
        """Multiply a result by what is made of its averages."""
        place = self.pick()
        units = self.tensors[place].shape[-1]
        gate = self.do(GlobalAveragePooling2D(keepdims=True), place)
        gate = self.do(Dense(self.random.choice((units, 1)), "sigmoid"), gate)
        return self.do(
            self.random.choice((operator.mul, layers.Multiply())), place, gate
        )

    def again(self, _):
        """Call a layer a second time."""
        written = [(x, p) for x, p in self.steps if hasattr(x, "kernel")]
        if not written:
            return self.change(0)
        layer, (before,) = self.random.choice(written)
        size = self.tensors[before].shape[-1]
        place = self.pick(
            lambda x: len(x.shape) == 4 and x.shape[1] > 2 and x.shape[-1] == size
        )
        return self.change(0) if place is None else self.do(layer, place)

    def head(self, number):
        """Add layers that end in an output."""
        pooling = Flatten if number % 2 else GlobalAveragePooling2D
        place = self.do(pooling(), self.pick())
        if number > 1:
            place = self.do(Dense(5, self.random.choice(ACTIVATIONS)), place)
            place = self.do(BatchNormalization(), place)
        return self.do(Dense(2), place)

    def run_masked(self, rows, gone_in):
        """Return what the model answers when the units that are gone are held at 0.

        `gone_in` tells which of a layer's units have no weights in the pruned model.
        This is worked out step by step, and knows nothing of `Units`.
        """
        results = [(x, np.zeros(x.shape[-1], bool)) for x in rows]
        for what, places in self.steps:
            if len(results) not in self.needed:
                results.append(None)
                continue
            args, masks = zip(*(results[i] for i in places))
            results.append(masked_step(what, args, masks, gone_in))
        return [results[end][0] for end in self.ends]


def plus_some(x):
    """Return x, a constant added."""
    return x + 1.5


def call(what, args):
    """Return what a layer or function makes of its arguments."""
    own = isinstance(what, layers.Layer) and len(args) > 1
    return what(args) if own else what(*args)


def masked_step(what, args, masks, gone_in):
    """Return what a layer answers, and which of its units are gone."""
    gone, kernel = masks[0], getattr(what, "kernel", None)
    if isinstance(what, layers.SeparableConv2D):
        kernel = what.pointwise_kernel
    if isinstance(what, BatchNormalization):
        gamma, beta, mean, variance = (w.copy() for w in what.get_weights())
        zero = ~args[0].reshape(-1, len(gone)).any(axis=0)
        beta[gone] = mean[gone & zero] = 0
        return gamma * (args[0] - mean) / np.sqrt(variance + 1e-3) + beta, gone
    if kernel is not None:
        repeats = isinstance(what, layers.DepthwiseConv2D)
        repeats = repeats or getattr(what, "groups", 1) > 1
        activation, what.activation = what.activation, keras.activations.linear
        sums = np.array(what(args[0]))
        what.activation = activation
        size = sums.shape[-1]
        gone = np.repeat(gone, size // len(gone)) if repeats else gone_in(kernel)
        sums[..., gone] = 0
        return np.array(activation(sums)), gone
    answer = np.asarray(call(what, args))
    if type(what) in {type(make()) for make in UNKNOWN.values()}:
        assert not gone.any(), "a layer that mixes units reads one that is gone"
    if isinstance(what, layers.Concatenate):
        gone = np.concatenate(masks)
    elif len(args) > 1 and len(masks[0]) == len(masks[1]):
        assert (masks[0] == masks[1]).all(), "one of two units is gone"
    elif len(args) > 1:
        gone = max(masks, key=len)
        assert not min(masks, key=len).any(), "a gate of all units is gone"
    if isinstance(what, Flatten):
        gone = np.tile(gone, answer.shape[-1] // len(gone))
    return answer, gone


@pytest.mark.slow
@settings(max_examples=150)
@given(st.integers(0, 2**32 - 1), st.sampled_from((0.2, 0.5, 0.8, 1)))
def test_any_graph_is_pruned_and_shrunk(nb, seed, sparsity):
    program = Program(random.Random(seed))
    model = randomized(program.model, seed)
    rows = keras.tree.flatten(rows_of(model, count=3))
    for rule in RULES:
        try:
            pruned = nb.prune(model, rule, sparsity)
        except ValueError as error:
            assert "no kernel" in str(error) or "no units" in str(error)
            continue
        small = nb.shrink(pruned)
        assert difference(pruned, small, rows) <= 1e-5
        if rule == "unit":
            now = {id(v): x for v, x in zip(model.weights, pruned.get_weights())}

            def gone_in(kernel, now=now):
                own = now[id(kernel)]
                return ~own.reshape(-1, own.shape[-1]).any(axis=0)

            masked = program.run_masked(rows, gone_in)
            for expected, found in zip(masked, answers(pruned, rows), strict=True):
                assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


# the networks of Keras


APPLICATIONS = {
    "MobileNetV2": 0.35,
    "DenseNet121": 0.35,
    "ConvNeXtTiny": 0.60,
}
SLOW = ("MobileNetV3Small", "EfficientNetB0", "InceptionV3", "ResNet50", "ResNet50V2")
SLOW += ("Xception", "NASNetMobile", "VGG16", "MobileNet", "EfficientNetV2B0")
SLOW = [pytest.param(name, 0.35, marks=pytest.mark.slow) for name in SLOW]


@pytest.mark.parametrize(("name", "share"), [*APPLICATIONS.items(), *SLOW])
def test_a_network_of_keras_loses_half_of_its_units(nb, name, share):
    side = 224 if name == "NASNetMobile" else 96
    own = {"weights": None, "classes": 10, "input_shape": (side, side, 3)}
    model = randomized(getattr(keras.applications, name)(**own), 0, 2**0.5, 0.1)
    pruned = nb.prune(model, "unit", 0.5)
    recalibrated(pruned, rows_of(pruned, count=4))
    small, rows = nb.shrink(pruned), rows_of(pruned, count=4)
    assert small.count_params() <= share * model.count_params()
    assert_answers_vary(pruned, 4, 0.001)
    assert difference(pruned, small, rows) <= 1e-5
    keras.utils.clear_session()


def test_a_residual_network_loses_as_much_as_other_tools_take(nb):
    """Torch-Pruning removes 74.5 % of the parameters at half of the units."""
    own = {"padding": "same", "use_bias": False}
    inputs, numbers = Input((16, 16, 3)), iter(range(99))

    def convolved(x, units, size=3, strides=1):
        layer = Conv2D(units, size, strides, **own, name=f"conv_{next(numbers)}")
        return normalized(x, layer)

    x = layers.ReLU()(convolved(inputs, 16))
    for units, strides in ((16, 1), (32, 2), (64, 2)):
        y = layers.ReLU()(convolved(x, units, 3, strides))
        x = convolved(x, units, 1, strides) if strides > 1 else x
        x = layers.ReLU()(layers.Add()([convolved(y, units), x]))
    model = randomized(pooled(inputs, x, 10))
    pruned = recalibrated(nb.prune(model, "unit", 0.5))
    small = nb.shrink(pruned)
    assert abs(1 - small.count_params() / model.count_params() - 0.745) <= 0.03
    assert difference(pruned, small) <= 1e-5


# units that always answer the same


def chain(*hidden, shape=(8, 8, 2), end=Flatten):
    """Return a chain of layers with random weights, the end a Dense layer of three."""
    return randomized(Sequential([Input(shape), *hidden, end(), Dense(3)]))


def kill(layer, *units):
    """Take the weights of units of a layer, and leave their biases."""
    kernel = layer.kernel.numpy()
    kernel[..., units] = 0
    layer.kernel.assign(kernel)


READERS = {
    "Flatten, Dense": ([], 4),
    "Dense": ([Dense(5, "relu", use_bias=False)], 4),
    "unpadded": ([Conv2D(5, 3, use_bias=False)], 4),
    "strided": ([Conv2D(5, 2, 2)], 4),
    "one pixel": ([Conv2D(5, 1, padding="same", use_bias=False)], 4),
    "normalized": ([BatchNormalization(), layers.ReLU(), Conv2D(5, 3)], 4),
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
    model = chain(Conv2D(6, 3, activation=activation, name="a"), *readers)
    first = model.layers[0]
    first.bias.assign([1, 2, -3, -4, 5, 6.0])
    kill(first, 1, 4)
    small = nb.shrink(model)
    assert small.layers[0].filters == left
    assert difference(model, small) <= 1e-5
    for reader, twin in zip(model.layers, small.layers):
        if hasattr(reader, "use_bias") and not reader.use_bias:
            assert twin.use_bias and twin.bias.numpy().any()
    first.bias.assign([1, 0, -3, -4, 0, 6.0])
    small = nb.shrink(model)
    zero = activation == "relu" and case not in ("transposed", "mixed")
    assert small.layers[0].filters == (4 if zero else left)
    assert difference(model, small) <= 1e-5


@pytest.mark.parametrize("merge", [operator.mul, layers.multiply, keras.ops.multiply])
@pytest.mark.parametrize("is_list", [False, True])
def test_what_a_dead_gate_multiplies_is_dead(nb, merge, is_list):
    inputs = Input((6,))
    values, gate = (
        Dense(8, name="values")(inputs),
        Dense(8, "relu", name="gate")(inputs),
    )
    x = merge([values, gate]) if merge is layers.multiply else merge(values, gate)
    if is_list:
        x = layers.Add()([x, Dense(8, name="other")(inputs)])
    model = randomized(Model(inputs, Dense(3)(Dense(5, "sigmoid")(x))))
    gate = model.get_layer("gate")
    kill(gate, 0, 3, 6)
    gate.bias.assign([-1, 1, 1, 0, 1, 1, 2, 1])  # the last of them answers 2
    small = nb.shrink(model)
    assert small.get_layer("values").units == (8 if is_list else 6)
    assert difference(model, small) <= 1e-5


@pytest.mark.parametrize(("second", "left"), [(2.0, 7), (3.0, 8)])
def test_a_shared_layer_takes_over_what_is_the_same_in_all_calls(nb, second, left):
    inputs = Input((6,))
    branches = [Dense(8, "sigmoid", name=name) for name in "ab"]
    shared = Dense(5, "relu", use_bias=False, name="shared")
    ends = [shared(branch(inputs)) for branch in branches]
    model = randomized(Model(inputs, Dense(3)(layers.Concatenate()(ends))))
    for branch, bias in zip(branches, (2.0, second)):
        kill(branch, 3)
        branch.bias.assign([1.0] * 3 + [bias] + [1.0] * 4)
    small = nb.shrink(model)
    assert [small.get_layer(name).units for name in "ab"] == [left] * 2
    assert small.get_layer("shared").use_bias == (left == 7)
    assert difference(model, small) <= 1e-5


def test_what_nobody_reads_goes_with_all_that_it_reads(nb):
    model = chain(Dense(7, "relu"), Dense(6, "tanh"), Dense(5), shape=(4,))
    last = model.layers[2]
    kernel = last.kernel.numpy()
    kernel[2:] = 0
    last.kernel.assign(kernel)
    small = nb.shrink(model)
    assert [x.units for x in small.layers if isinstance(x, Dense)] == [7, 2, 5, 3]
    assert difference(model, small) <= 1e-5


@both_rules
def test_a_network_without_any_units_keeps_one_of_each_layer(nb, rule):
    model = chain(
        Conv2D(6, 3, activation="sigmoid"), Conv2D(5, 3), Dense(4, "softplus")
    )
    pruned = nb.prune(model, rule, 1)
    small = nb.shrink(pruned)
    kernels = [layer.kernel.shape for layer in small.layers if hasattr(layer, "kernel")]
    assert [shape[-1] for shape in kernels] == [1, 1, 1, 3]
    assert difference(pruned, small) <= 1e-5


# what is not understood stays


@keras.saving.register_keras_serializable("tests")
class OwnDense(Dense):
    """A user's Dense layer: whatever it does, nobody can know."""


@keras.saving.register_keras_serializable("tests")
class OwnKernel(layers.Layer):
    """A user's layer whose kernel has its units first, and whose bias is a shift."""

    def build(self, shape):
        """Add the weights."""
        self.kernel = self.add_weight((shape[-1], 4, 4), name="kernel")
        self.shift = self.add_weight((4,), name="shift")

    def call(self, inputs):
        """Return what the weights make of the inputs."""
        return keras.ops.einsum("bi,ijk->bj", inputs, self.kernel) + self.shift


@keras.saving.register_keras_serializable("tests")
def each_by_the_sum(values):
    """Return values over the sum of their magnitudes."""
    return values / keras.ops.sum(keras.ops.abs(values), axis=-1, keepdims=True)


def attended(x):
    """Return what attends to itself."""
    return layers.MultiHeadAttention(2, 3)(x, x)


def split(x):
    """Return the product of both halves."""
    one, other = keras.ops.split(x, 2, axis=-1)
    return one * other


def normalized_twice(x):
    """Return what a normalisation makes of `x`, and of it in training."""
    layer = BatchNormalization()
    twice = layer(x, training=False), layer(Dense(8)(x), training=True)
    return layers.Concatenate()(twice)


UNCLEAR = {
    "softmax": lambda: layers.Softmax(),
    "softmax activation": lambda: layers.Activation("softmax"),
    "log_softmax": lambda: Dense(8, "log_softmax"),
    "softmax of a layer": lambda: Dense(8, layers.Softmax()),
    "own activation": lambda: Dense(8, each_by_the_sum),
    "LayerNormalization": lambda: layers.LayerNormalization(),
    "GroupNormalization": lambda: layers.GroupNormalization(2),
    "normalized positions": lambda: BatchNormalization(axis=1),
    "EinsumDense": lambda: layers.EinsumDense("abc,cd->abd", (6, 8)),
    "own layer": lambda: OwnDense(6),
    "TimeDistributed": lambda: layers.TimeDistributed(Dense(6, "relu")),
    "two groups": lambda: Conv1D(4, 3, groups=2),
    "transposed": lambda: layers.Conv1DTranspose(4, 3),
    "permuted": lambda: layers.Permute((2, 1)),
    "recurrent": lambda: layers.LSTM(4, return_sequences=True),
    "attention": lambda: attended,
    "split": lambda: split,
    "constants of units": lambda: lambda x: x + np.arange(8, dtype="float32"),
    "gate of one": lambda: lambda x: x * Dense(1, "sigmoid")(x),
    "other rank": lambda: lambda x: x + Dense(8)(Flatten()(x))[:, None],
    "mean": lambda: lambda x: keras.ops.mean(x, axis=-1, keepdims=True),
    "slice": lambda: lambda x: x[:, :, 1:4],
    "halves": lambda: layers.Reshape((12, 4)),
    "in training": lambda: normalized_twice,
}


@pytest.mark.parametrize("case", UNCLEAR)
def test_what_is_not_understood_keeps_its_units(nb, case):
    inputs = Input((6, 3))
    x = Conv1D(8, 1, activation="sigmoid", name="before")(inputs)
    x = UNCLEAR[case]()(x)
    x = Flatten()(Dense(6, "sigmoid", name="after")(x))
    model = randomized(Model(inputs, Dense(3)(x)))
    kill(model.get_layer("before"), 2, 5)
    kill(model.get_layer("after"), 4)
    small = nb.shrink(model)
    is_read_by_dense = case in ("log_softmax", "softmax of a layer", "own activation")
    assert small.get_layer("before").filters == (6 if is_read_by_dense else 8)
    assert small.get_layer("after").units == 5
    assert difference(model, small) <= 1e-5
    pruned = nb.prune(model, "unit", 0.5)
    assert difference(pruned, nb.shrink(pruned)) <= 1e-5


def test_channels_first_is_not_understood(nb):
    inputs = Input((2, 7, 8))
    own = {"data_format": "channels_first"}
    x = layers.ReLU()(Conv2D(6, 3, **own, name="before")(inputs))
    model = Model(inputs, Dense(3)(Flatten(**own)(x)))
    kill(model.get_layer("before"), 2, 5)
    assert nb.shrink(model).get_layer("before").filters == 6
    with pytest.raises(ValueError, match="no units"):
        nb.prune(model, "unit", 0.5)


def test_constants_that_are_concatenated_are_not_taken_for_units(nb):
    inputs = Input(batch_shape=(8, 6))
    x = Dense(8, "relu", name="before")(inputs)
    x = keras.ops.concatenate([x, np.ones((8, 2), "float32")], axis=-1)
    model = randomized(Model(inputs, Dense(3)(Dense(5, "relu")(x))))
    pruned = nb.prune(model, "unit", 0.5)
    assert difference(pruned, nb.shrink(pruned)) <= 1e-5


@pytest.mark.parametrize("build", [Closed, lambda: Sequential([Dense(4)])])
@pytest.mark.parametrize("ask", ["Units", "shrink", "prunable", "flops"])
def test_a_model_without_a_graph_is_named(nb, build, ask):
    model = build()
    model.build((None, 6)) if build is Closed else None
    with pytest.raises(ValueError, match=repr(model.name)):
        getattr(nb, ask)(model)


# what feeds the outputs is never pruned


def names_of(nb, model):
    """Return the names of the layers that can be pruned."""
    return {kernel.path.split("/")[-2] for kernel in nb.prunable_kernels(model)}


def with_end(*ends, tail=()):
    """Return a model of a hidden layer and an end."""
    parts = [Input((6,)), Dense(8, "relu", name="a"), Dense(8, name="b"), *ends]
    return Sequential([*parts, *tail])


def tied_to_an_embedding():
    """Return a language model that ends in the transposed matrix of its words."""
    words, inputs = layers.Embedding(11, 8), Input((5,), dtype="int32")
    x = Dense(8, name="b")(Dense(7, "relu", name="a")(words(inputs)))
    return Model(inputs, keras.ops.matmul(x, keras.ops.transpose(words.embeddings)))


def answered_early():
    """Return a model that puts out a hidden layer, too."""
    inputs = Input((6,))
    a = Dense(8, "relu", name="a")(inputs)
    b = Dense(7, "relu", name="b")(a)
    return Model(inputs, [a, Dense(3)(b)])


def residual_end():
    """Return a model whose last part adds what it reads to what it finds."""
    inputs, inner = Input((6,)), Input((8,))
    last = Model(inner, layers.Add()([inner, Dense(8, name="c")(inner)]))
    x = Dense(8, name="b")(Dense(7, "relu", name="a")(inputs))
    return Model(inputs, last(x))


def decoder():
    """Return what draws images, as a GAN does."""
    return Sequential(
        [
            Input((4,)),
            Dense(32, "relu", name="a"),
            layers.Reshape((2, 2, 8)),
            layers.UpSampling2D(),
            Conv2D(6, 3, padding="same", activation="relu", name="b"),
            layers.Conv2DTranspose(3, 3, 2, padding="same", activation="tanh"),
        ]
    )


ENDS = {
    "autoencoder": (autoencoder, "abcd"),
    "decoder": (decoder, "ab"),
    "sum of heads": (sum_of_heads, "ab"),
    "tied to an embedding": (tied_to_an_embedding, "ab"),
    "backbone": (backbone, "a"),
    "answered early": (answered_early, "b"),
    "two outputs": (two_in_two_out, "ab"),
    "wide and deep": (wide_and_deep, "ab"),
    "Dense": (lambda: with_end(Dense(3)), "ab"),
    "nothing": (with_end, "a"),
    "ReLU": (lambda: with_end(layers.ReLU()), "a"),
    "Softmax": (lambda: with_end(layers.Softmax()), "a"),
    "normalisations": (
        lambda: with_end(layers.LayerNormalization(), BatchNormalization()),
        "a",
    ),
    "Reshape": (lambda: with_end(layers.Reshape((2, 4))), "a"),
    "PReLU": (lambda: with_end(layers.PReLU()), "a"),
    "own layer": (lambda: with_end(OwnDense(3)), "ab"),
    "TimeDistributed": (
        lambda: with_end(layers.Reshape((2, 4)), layers.TimeDistributed(Dense(3))),
        "ab",
    ),
    "LSTM": (lambda: with_end(layers.Reshape((2, 4)), layers.LSTM(3)), "ab"),
    "nested Dense": (lambda: with_end(Sequential([Input((8,)), Dense(3)])), "ab"),
    "nested Softmax": (
        lambda: with_end(Sequential([Input((8,)), layers.Softmax()])),
        "a",
    ),
    "nested residual": (residual_end, "a"),
}


@pytest.mark.parametrize("case", ENDS)
def test_what_feeds_the_outputs_stays_whole(nb, case):
    build, expected = ENDS[case]
    model = randomized(build())
    assert names_of(nb, model) == {*expected}
    pruned = nb.prune(model, "weight", 0.5)
    shares = {
        k.path.split("/")[-2]: np.mean(k.numpy() == 0) for k in nb.kernels_in(pruned)
    }
    for name, zeros in shares.items():
        assert math.isclose(zeros, 0.5 if name in expected else 0, abs_tol=0.03)
    chosen = [k for k in nb.kernels_in(pruned) if k.path.split("/")[-2] in expected]
    zeros = sum(np.sum(k.numpy() == 0) for k in chosen)
    size = sum(k.numpy().size for k in chosen)
    assert math.isclose(nb.measured_sparsity(pruned), zeros / size)


# a kernel is not a name


def test_transforms_and_layers_of_ones_own_are_not_pruned(nb):
    inputs = Input((64, 1))
    x = layers.STFTSpectrogram("log", 8, 4, 8)(inputs)
    x = OwnKernel(name="own")(Dense(8, "relu", name="a")(Flatten()(x)))
    model = randomized(Model(inputs, Dense(3)(Dense(6, "relu", name="b")(x))))
    assert names_of(nb, model) == {"a", "b"}
    for rule in RULES:
        pruned = nb.prune(model, rule, 0.5)
        for before, now in zip(model.weights, pruned.weights):
            if before.path.split("/")[-2] not in ("a", "b"):
                assert (before.numpy() == now.numpy()).all()
    own = [v.path for v in model.weights if v.path == "own/kernel"]
    pruned = nb.prune(model, "weight", 0.25, own)
    assert math.isclose(nb.measured_sparsity(pruned, own), 0.25)


@both_rules
def test_a_depthwise_convolution_by_another_name_is_one(nb, rule):
    def network(layer):
        model = chain(Conv2D(6, 3), layer, layers.ReLU(), Conv2D(4, 1))
        return randomized(model)

    one = network(layers.DepthwiseConv2D(3))
    other = network(Conv2D(6, 3, groups=6))
    shapes = [w.shape for w in one.get_weights()]
    other.set_weights(
        [w.reshape(np.shape(o)) for w, o in zip(one.get_weights(), other.get_weights())]
    )
    models = [nb.prune(model, rule, 0.5) for model in (one, other)]
    for values, same, shape in zip(*(m.get_weights() for m in models), shapes):
        assert (values == same.reshape(shape)).all()
    sizes = {nb.shrink(model).count_params() for model in models}
    assert len(sizes) == 1 and nb.measured_sparsity(models[0]) == 0.5


@pytest.mark.parametrize("bits", ["int8", "int4"])
def test_quantized_kernels_are_refused(nb, bits):
    model = chain(Dense(8, "relu", name="culprit"), Dense(6), shape=(6,))
    model.layers[0].quantize(bits)
    for ask in (nb.prunable_kernels, lambda own: nb.prune(own, "weight", 0.5)):
        with pytest.raises(ValueError, match=r"culprit.*prune before you quantize"):
            ask(model)


def test_transposed_kernels_of_a_single_channel_or_unit(nb):
    """Their last axis is what they read: it does not tell their units."""
    own = {"padding": "same", "activation": "relu"}
    model = Sequential(
        [
            Input((4, 4, 1)),
            layers.Conv2DTranspose(8, 3, **own, name="of_one"),
            layers.Conv2DTranspose(1, 3, **own, name="to_one"),
            Flatten(),
            Dense(3),
        ]
    )
    assert names_of(nb, model) == {"of_one"}


@both_rules
def test_a_depthwise_kernel_can_be_named(nb, rule):
    model = chain(Conv2D(6, 3, name="a"), layers.DepthwiseConv2D(3, name="dw"))
    paths = [v.path for v in model.weights if v.name == "kernel"][:2]
    pruned = nb.prune(model, rule, 0.5, paths)
    zeros = [np.mean(v.numpy() == 0) for v in pruned.weights if v.name == "kernel"]
    assert zeros == [0.5, 0.5 * (rule == "weight"), 0]


# what a network costs


def called(layer, *shapes):
    """Return a model of a layer that is called on inputs of shapes."""
    inputs = [Input(shape) for shape in shapes]
    return Model(inputs, [layer(x) for x in inputs])


FIRST = {"data_format": "channels_first"}
COUNTED = {  # 2 for each weight of a kernel and each place where it is applied
    "Dense": (Dense(5), [(3,)], 2 * 3 * 5),
    "Dense of places": (Dense(5), [(4, 6, 3)], 2 * 4 * 6 * 3 * 5),
    "Conv1D": (Conv1D(5, 3, padding="same"), [(9, 2)], 2 * 9 * 3 * 2 * 5),
    "Conv2D": (Conv2D(5, 3), [(8, 7, 2)], 2 * 6 * 5 * 9 * 2 * 5),
    "strides": (Conv2D(5, 3, 2, "same"), [(8, 7, 2)], 2 * 4 * 4 * 9 * 2 * 5),
    "Conv3D": (Conv3D(5, 2), [(4, 4, 4, 2)], 2 * 27 * 8 * 2 * 5),
    "groups": (Conv2D(6, 3, groups=2), [(8, 8, 4)], 2 * 36 * 9 * 2 * 6),
    "depthwise": (
        layers.DepthwiseConv2D(3, depth_multiplier=2),
        [(8, 8, 4)],
        2 * 36 * 9 * 4 * 2,
    ),
    "separable": (
        layers.SeparableConv2D(5, 3, depth_multiplier=2),
        [(8, 8, 4)],
        2 * 36 * (9 * 4 * 2 + 4 * 2 * 5),
    ),
    "transposed": (
        layers.Conv2DTranspose(5, 3, 2, padding="same"),
        [(4, 6, 2)],
        2 * 4 * 6 * 9 * 2 * 5,
    ),
    "channels first": (Conv2D(4, 3, **FIRST), [(3, 8, 10)], 2 * 6 * 8 * 9 * 3 * 4),
    "two calls": (Conv2D(4, 3), [(8, 8, 2), (5, 5, 2)], 2 * (36 + 9) * 9 * 2 * 4),
    "nested": (
        Sequential(
            [Input((6,)), Dense(8, "relu"), Sequential([Input((8,)), Dense(3)])]
        ),
        [(6,), (6,)],
        2 * 2 * (6 * 8 + 8 * 3),
    ),
    "no kernel": (layers.LayerNormalization(), [(6,)], 0),
    "activation": (layers.ReLU(), [(6, 5, 4)], 0),
    "batch norm": (BatchNormalization(), [(6, 5, 4)], 0),
    "dropout": (layers.Dropout(0.5), [(6, 5, 4)], 0),
    "words": (layers.Embedding(9, 4), [(5,)], 0),
    "slopes": (layers.PReLU(), [(5, 4)], 0),
}


@pytest.mark.parametrize("case", COUNTED)
def test_work_is_counted_for_each_call(nb, case):
    layer, shapes, expected = COUNTED[case]
    assert nb.flops(called(layer, *shapes)) == expected


def test_work_of_branches_and_operations_is_added(nb):
    assert nb.flops(mobile()) == 2 * (64 * (27 * 6 + 6 * 8 + 9 * 8 + 8 * 6) + 6 * 3)
    pruned = nb.prune(random_network(mobile), "unit", 0.5)
    small = 2 * (64 * (27 * 3 + 3 * 4 + 9 * 4 + 4 * 3) + 3 * 3)
    assert nb.flops(nb.shrink(pruned)) == small


NAMED = {"name": "culprit"}
UNCOUNTED = {
    "LSTM": (layers.LSTM(4, **NAMED), (5, 2)),
    "ConvLSTM": (layers.ConvLSTM1D(4, 3, **NAMED), (3, 5, 2)),
    "EinsumDense": (layers.EinsumDense("abc,cd->abd", (None, 4), **NAMED), (5, 2)),
    "TimeDistributed": (layers.TimeDistributed(Dense(4), **NAMED), (5, 2)),
    "own layer": (OwnDense(4, **NAMED), (5, 2)),
    "Lambda": (layers.Lambda(lambda x: x @ keras.ops.transpose(x), **NAMED), (5, 5)),
    "Dot": (lambda x: layers.Dot(1, **NAMED)([x, x]), (4, 4)),
    "spectrogram": (layers.STFTSpectrogram("log", 8, 4, 8, **NAMED), (64, 1)),
    "free size": (Conv2D(4, 3, **NAMED), (None, None, 2)),
    "free length": (Dense(4, **NAMED), (None, 2)),
}


@pytest.mark.parametrize("case", UNCOUNTED)
def test_work_that_cannot_be_counted_is_named(nb, case):
    with pytest.raises(ValueError, match="culprit"):
        nb.flops(called(*UNCOUNTED[case]))


FREE = np.ones((3, 3, 2, 4), "float32")
OPERATIONS = {
    "attention": (attended, (5, 4)),
    "product": (lambda x: x @ np.ones((4, 7), "float32"), (5, 4)),
    "einsum": (lambda x: keras.ops.einsum("abc,adc->abd", x, x), (5, 4)),
    "Dot": (lambda x: layers.Dot(2)([x, x]), (5, 4)),
    "conv": (lambda x: keras.ops.conv(x, FREE), (8, 8, 2)),
    "inner": (lambda x: keras.ops.inner(x, np.ones((7, 4), "float32")), (5, 4)),
}


@pytest.mark.parametrize("case", OPERATIONS)
def test_products_without_a_layer_are_not_counted_as_nothing(nb, case):
    function, shape = OPERATIONS[case]
    with pytest.raises(ValueError, match="cannot count"):
        nb.flops(called(function, shape))


# a shrunk model is called as the model was


def named(*names):
    """Return inputs of six numbers with names."""
    return {name: Input((6,), name=name) for name in names}


def hidden(tensors):
    """Return what a layer makes of all tensors."""
    return Dense(8, "relu")(layers.Concatenate()([*keras.tree.flatten(tensors)]))


def heads(x):
    """Return two outputs, by their names."""
    return {name: Dense(units, name=name)(x) for name, units in (("p", 2), ("q", 3))}


def interfaces():
    """Return models whose inputs and outputs have all kinds of structures."""
    for make in (dict, lambda x: [*x.values()], lambda x: (*x.values(),)):
        for give in (dict, lambda x: [*x.values()], lambda x: (*x.values(),)):
            inputs = make(named("b", "a"))
            yield Model(inputs, give(heads(hidden(inputs))))
    inputs = {"deep": [*named("c").values()], **named("a")}
    yield Model(inputs, {"deep": [heads(hidden(inputs))["p"]]})


@pytest.mark.parametrize("number", range(10))
def test_the_interface_stays(nb, number):
    model = randomized([*interfaces()][number])
    pruned = nb.prune(model, "unit", 0.5)
    small, rows = nb.shrink(pruned), rows_of(model)
    assert small.count_params() < model.count_params()
    assert interface(small) == interface(pruned) == interface(model)
    expected, found = (own.predict(rows, verbose=0) for own in (pruned, small))
    keras.tree.assert_same_structure(expected, found)
    for one, other in zip(*map(keras.tree.flatten, (expected, found))):
        assert np.abs(one - other).max() <= 1e-5 * np.abs(one).max()


# no other errors


def ended_by_another_axis():
    """Return a model whose last activation needs its axes."""
    inputs = Input((6, 6, 2))
    x = Conv2D(4, 3, name="b")(Conv2D(6, 3, activation="relu", name="a")(inputs))
    return Model(inputs, layers.Softmax(axis=1)(x))


def used_on_two_sizes():
    """Return a model that uses a layer on inputs of two sizes."""
    inputs, layer = Input((8, 8, 2)), Conv2D(6, 3, activation="sigmoid", name="a")
    pool, flat = layers.GlobalMaxPooling2D(), Flatten()
    ends = pool(layer(inputs)), flat(layer(layers.AveragePooling2D(2)(inputs)))
    return Model(inputs, Dense(3)(layers.Concatenate()(ends)))


def reshaped_twice():
    """Return a model that uses a layer without weights on two tensors."""
    inputs, layer = Input((4, 3)), layers.Reshape((2, 16))
    ends = [layer(Dense(8, "relu", name=name)(inputs)) for name in "ab"]
    return Model(inputs, Dense(3)(layers.Add()(ends)))


def begun_with_values():
    """Return a model whose layers begin with values of their own."""
    inputs, values = Input((6,)), keras.initializers.Constant(np.arange(8.0))
    return Model(inputs, Dense(3)(Dense(8, "relu", bias_initializer=values)(inputs)))


def masked_words():
    """Return a model that leaves out the padding of its sentences."""
    parts = layers.Embedding(10, 4, mask_zero=True), Dense(8, "sigmoid", name="a")
    parts += (GlobalAveragePooling1D(), Dense(6, "relu", name="b"), Dense(3))
    return Sequential([Input((5,), dtype="int32"), *parts])


@pytest.mark.parametrize(
    "build",
    [
        ended_by_another_axis,
        used_on_two_sizes,
        reshaped_twice,
        begun_with_values,
        masked_words,
    ],
)
def test_unusual_networks_are_shrunk_too(nb, build):
    pruned = nb.prune(randomized(build()), "unit", 0.5)
    small = nb.shrink(pruned)
    assert small.count_params() < 0.8 * pruned.count_params()
    assert difference(pruned, small) <= 1e-5
    assert_answers_vary(pruned)


# the last part of the notebook


SUPPORT = {  # zeros by weights and by units (%), and if the model gets smaller
    "Dense": (Dense(8), (6,), (50, 50), True),
    "EinsumDense": (layers.EinsumDense("ab,bc->ac", 8), (6,), (50, 0), False),
    "Conv1D": (Conv1D(8, 3), (9, 2), (50, 50), True),
    "Conv2D": (Conv2D(8, 3), (9, 9, 2), (50, 50), True),
    "Conv3D": (Conv3D(8, 3), (5, 5, 5, 2), (50, 50), True),
    "depthwise": (layers.DepthwiseConv2D(3), (9, 9, 2), None, False),
    "transposed": (layers.Conv2DTranspose(8, 3), (9, 9, 2), (50, 0), False),
    "separable": (layers.SeparableConv2D(8, 3), (9, 9, 2), (50, 50), True),
    "attention": (layers.MultiHeadAttention(2, 4), (9, 8), (50, 0), False),
    "LSTM": (layers.LSTM(8), (9, 2), (50, 0), False),
    "GRU": (layers.GRU(8), (9, 2), (50, 0), False),
}


@pytest.mark.parametrize("kind", SUPPORT)
def test_support_says_what_works(nb, kind):
    layer, shape, zeros, shrinks = SUPPORT[kind]
    if zeros is None:  # there is no kernel to look at
        zeros = (0, 0)
    row = nb.support(layer, shape)
    weights, units, left = row.values()
    assert [*row] == [*(f"{r}s: zeros (%)" for r in RULES), "parameters left (%)"]
    assert math.isclose(weights, zeros[0]) and math.isclose(units, zeros[1])
    assert left < 75 if shrinks else left == 100


def test_support_hides_no_other_error_than_a_refusal(nb, monkeypatch):
    monkeypatch.setattr(nb, "shrink", lambda model: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        nb.support(Dense(4), (3,))


@pytest.mark.parametrize(
    ("name", "share"), [("build_cnn", 0.35), ("build_residual_cnn", 0.35)]
)
def test_the_convolutional_networks_of_the_notebook_shrink(nb, name, share):
    model = randomized(getattr(nb, name)((8, 12), seed=3))
    images = np.random.default_rng(0).integers(0, 256, (8, 28, 28)).astype("uint8")
    pruned = recalibrated(nb.prune(model, "unit", 0.5), images)
    small = nb.shrink(pruned)
    assert small.count_params() <= share * model.count_params()
    assert difference(pruned, small, images) <= 1e-5
    assert np.ptp(answers(small, images)[0], axis=0).max() > 0.01
    again, other = (getattr(nb, name)((8, 12), seed=seed) for seed in (3, 4))
    assert same_weights(getattr(nb, name)((8, 12), seed=3), again.get_weights())
    assert not same_weights(other, again.get_weights())


TWO_DEVICES = """
import keras, numpy as np
from helpers import difference
data = nb.load_dataset("digits")
images, labels = data.x_train[:64], data.y_train[:64]
for names in (["CPU:0"], ["CPU:0", "CPU:1"]):
    strategy = tf.distribute.MirroredStrategy(names)
    assert strategy.num_replicas_in_sync == len(names)
    with strategy.scope():
        model = nb.copy_of(nb.build_mlp((12, 8)))
        model.compile(keras.optimizers.SGD(0.05), nb.LOSS, jit_compile=False)
    schedule = nb.polynomial_sparsity(0.5, begin=1, end=6)
    pruner = nb.Pruner("unit", schedule, frequency=2)
    model.fit(images, labels, 16, 2, 0, shuffle=False, callbacks=[pruner])
    assert nb.measured_sparsity(model) == 0.5
    assert not any(getattr(v, "constraint", None) for v in model.variables)
    weights.append(model.get_weights())
    small = nb.shrink(model)
    assert [x.units for x in small.layers[-3:]] == [6, 4, 10]
    assert difference(model, small, images) <= 1e-5
for single, mirrored in zip(*weights):
    assert np.allclose(single, mirrored, atol=1e-4)
    assert ((single == 0) == (mirrored == 0)).all()
"""


def test_two_devices_train_and_prune_like_one():
    run_on_two_devices(TWO_DEVICES)
