"""Pruning a model, and making it smaller without changing its answers."""

import math

import keras
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from keras import layers

Dense = layers.Dense
RULES = ("weight_mask", "unit_mask")
ACTIVATIONS = ("relu", "tanh", "sigmoid", "gelu", "linear")
WEIGHING = (Dense, layers.Conv1D, layers.Conv2D, layers.Conv3D)
BETWEEN = ("MaxPooling", "AveragePooling", "Dropout", "")
hidden_layers = st.lists(
    st.tuples(st.integers(1, 32), st.sampled_from(ACTIVATIONS), st.booleans()),
    min_size=1,
    max_size=5,
)
blocks = st.lists(
    st.fixed_dictionaries(
        {
            "filters": st.integers(2, 8),
            "kernel_size": st.integers(2, 3),
            "padding": st.sampled_from(("valid", "same", "causal")),
            "steps": st.sampled_from(({}, {"strides": 2}, {"dilation": 2})),
            "use_bias": st.booleans(),
            "normalized": st.booleans(),
            "activation": st.sampled_from(ACTIVATIONS),
            "between": st.sampled_from(BETWEEN),
            "pooling": st.sampled_from(("valid", "same")),
        }
    ),
    min_size=1,
    max_size=3,
)
heads = st.sampled_from(
    ("Flatten", "Flatten, normalized", "GlobalMax", "GlobalAverage")
)


def randomized(model, seed=0):
    """Give all weights of a model, statistics too, random values."""
    random = np.random.default_rng(seed)
    for variable in model.weights:
        scale = math.sqrt(math.prod(variable.shape[:-1]))
        values = random.normal(0, 1 / scale, variable.shape)
        variance = variable.name == "moving_variance"
        variable.assign(0.5 + np.abs(values) if variance else values)
    return model


def network(*hidden, inputs=(6,), seed=0):
    """Return a chain of layers with random weights and three outputs."""
    chain = [keras.Input(inputs), *hidden, Dense(3, name="last")]
    return randomized(keras.Sequential(chain), seed)


def convolutional():
    """Return a network of two convolutions and two Dense layers."""
    return network(
        layers.Conv2D(5, 3, activation="relu"),
        layers.Conv2D(8, 2),
        layers.Flatten(),
        Dense(10, "relu"),
        inputs=(6, 6, 2),
    )


def block_layers(rank, side, block):
    """Return the layers of a block for images of so many axes and pixels."""
    padding, dilation = block["padding"], block["steps"].get("dilation", 1)
    if side < 5 or (padding == "causal" and rank > 1):
        padding = "same"
    convolution = getattr(layers, f"Conv{rank}D")(
        block["filters"],
        block["kernel_size"],
        strides=block["steps"].get("strides", 1),
        padding=padding,
        dilation_rate=dilation if rank < 3 else 1,
        use_bias=block["use_bias"],
        activation=None if block["normalized"] else block["activation"],
    )
    yield convolution
    if block["normalized"]:
        yield layers.BatchNormalization()
        yield layers.Activation(block["activation"])
    if block["between"] == "Dropout":
        yield layers.Dropout(0.5)
    elif block["between"]:
        pooling = "same" if side < 5 else block["pooling"]
        kind = getattr(layers, f"{block['between']}{rank}D")
        yield kind(2, padding=pooling)


def chain(rank, described, head, hidden, seed):
    """Return the random convolutional chain that was described."""
    x = inputs = keras.Input((9,) * rank + (2,))
    for block in described:
        for layer in block_layers(rank, x.shape[1], block):
            x = layer(x)
    if head.startswith("Global"):
        x = getattr(layers, f"{head}Pooling{rank}D")()(x)
    else:
        x = layers.Flatten()(x)
    if head.endswith("normalized"):
        x = layers.BatchNormalization()(x)
    for units, *options in hidden:
        x = Dense(units, *options)(x)
    return randomized(keras.Model(inputs, Dense(3)(x)), seed)


def weighing_layers(model):
    """Return the Dense and convolutional layers of a model."""
    return [layer for layer in model.layers if type(layer) in WEIGHING]


def units_of(model):
    """Return the number of units of each layer that has a kernel."""
    return [layer.kernel.shape[-1] for layer in weighing_layers(model)]


def kernels_of(model):
    """Return the kernels of a model as arrays, the output's last."""
    return [w for w in model.get_weights() if w.ndim > 1]


def biases_of(model):
    """Return the biases of a model as arrays, the output's last."""
    return [w for w in model.get_weights() if w.ndim == 1]


def random_rows(model, seed=1):
    """Return eight random rows for a model."""
    shape = (8, *model.inputs[0].shape[1:])
    rows = np.random.default_rng(seed).normal(size=shape)
    return rows.astype("float32")


def answers(model):
    """Return a model's outputs for eight random rows."""
    return keras.ops.convert_to_numpy(model(random_rows(model)))


def assert_same_function(model, other):
    """Assert that two models answer alike, to 1e-5 of the largest answer."""
    expected = answers(model)
    error = np.abs(answers(other) - expected).max()
    assert error <= 1e-5 * np.abs(expected).max()


def wires(model):
    """Return for each kernel whether an input is wired to a unit."""
    kernels = [layer.kernel.numpy() != 0 for layer in weighing_layers(model)]
    return [k.any(axis=tuple(range(k.ndim - 2))) for k in kernels]


def varying_units(model):
    """Return for each kernel which units are wired to the model's inputs."""
    varying = [np.ones(model.inputs[0].shape[-1], bool)]
    for wired in wires(model):
        positions = len(wired) // len(varying[-1])
        varying.append(wired[np.tile(varying[-1], positions)].any(axis=0))
    return varying[1:]


def needed_units(model):
    """Return for each kernel which units vary and are read.

    Found by following the weights that are not zero, both ways.
    """
    needed, read = [], None
    for wired, varies in zip(wires(model)[::-1], varying_units(model)[::-1]):
        if needed:
            varies = varies & read.reshape(-1, len(varies)).any(axis=0)
        needed.insert(0, varies if needed else np.ones_like(varies))
        read = wired[:, needed[0]].any(axis=1)
    return needed


def needs_a_spokesman(model):
    """Return whether a padded convolution reads constants, not all zero."""
    readers = weighing_layers(model)[1:]
    for layer, varies in zip(readers, varying_units(model)):
        if getattr(layer, "padding", "valid") != "valid":
            before = keras.Model(model.inputs[0], layer.input)
            if answers(before)[..., ~varies].any():
                return True
    return False


def with_biases_of(model, pruned):
    """Return the pruned model itself, its vectors again as they were."""
    pairs = zip(pruned.get_weights(), model.get_weights())
    pruned.set_weights([w if w.ndim > 1 else b for w, b in pairs])
    return pruned


# prune


@pytest.mark.parametrize("name", RULES)
def test_the_output_layer_is_never_pruned(nb, name):
    model = network(Dense(7, "relu"), Dense(5, "relu"))
    empty = nb.prune(model, getattr(nb, name), 1)
    for before, after in zip(model.get_weights()[-2:], empty.get_weights()[-2:]):
        assert (before == after).all()
    assert not any(weights.any() for weights in empty.get_weights()[:-2])


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("sparsity", [0, 0.25, 0.5, 0.8, 0.97, 1])
def test_every_kernel_is_ranked_by_itself(nb, name, sparsity):
    model, rule = network(Dense(12), Dense(9), Dense(4)), getattr(nb, name)
    scales = [1000, 1, 1, 1, 0.001, 1, 1, 1]
    model.set_weights([s * w for s, w in zip(scales, model.get_weights())])
    pruned = nb.prune(model, rule, sparsity)
    for before, after in zip(kernels_of(model)[:-1], kernels_of(pruned)):
        assert (after == before * rule(before, sparsity)).all()


@pytest.mark.parametrize("name", RULES)
def test_zeros_have_no_sign(nb, name):
    """Else gzip finds two patterns of bytes where one would do."""
    model = network(Dense(12), Dense(9))
    pruned = nb.prune(model, getattr(nb, name), 0.5)
    for weights in pruned.get_weights():
        assert not np.signbit(weights[weights == 0]).any()


@pytest.mark.parametrize("name", RULES)
def test_the_sparsity_asked_for_is_there(nb, name):
    model = network(Dense(12), Dense(9), Dense(4))
    shapes = [(6, 12), (12, 9), (9, 4)]
    total = sum(math.prod(shape) for shape in shapes)
    for sparsity in (0, 0.1, 0.25, 0.5, 0.66, 0.8, 0.95, 1):
        if name == "weight_mask":
            zeros = sum(round(sparsity * math.prod(s)) for s in shapes)
        else:
            zeros = sum(s[0] * round(sparsity * s[1]) for s in shapes)
        pruned = nb.prune(model, getattr(nb, name), sparsity)
        assert math.isclose(nb.measured_sparsity(pruned), zeros / total)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("build", [lambda: network(Dense(9)), convolutional])
def test_the_model_is_untouched(nb, name, build):
    model = build()
    before = model.get_weights()
    pruned = nb.prune(model, getattr(nb, name), 0.7)
    pruned.set_weights([w + 1 for w in pruned.get_weights()])
    for weights, now in zip(before, model.get_weights()):
        assert (weights == now).all()


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("sparsity", [0.3, 0.7, 0.95])
def test_a_unit_without_weights_loses_its_bias(nb, name, sparsity):
    for model in (network(Dense(30, "relu"), Dense(20)), convolutional()):
        pruned = nb.prune(model, getattr(nb, name), sparsity)
        pairs = list(zip(kernels_of(pruned), biases_of(pruned)))
        for (kernel, bias), before in zip(pairs[:-1], biases_of(model)):
            alive = kernel.reshape(-1, len(bias)).any(axis=0)
            assert (bias == np.where(alive, before, 0)).all()
        assert (pairs[-1][1] == biases_of(model)[-1]).all()


def test_convolutions_lose_whole_filters(nb):
    model = convolutional()
    kernels = kernels_of(nb.prune(model, nb.unit_mask, 0.5))
    for kernel, before in zip(kernels[:2], kernels_of(model)):
        filters = before.shape[-1]
        norms = np.sqrt((before.astype(float) ** 2).sum(axis=(0, 1, 2)))
        gone = np.argsort(norms)[: round(0.5 * filters)]
        assert not kernel[..., gone].any()
        kept = np.delete(np.arange(filters), gone)
        assert (kernel[..., kept] == before[..., kept]).all()


def test_prunable_kernels_leave_out_what_is_not_a_kernel(nb):
    model = network(layers.BatchNormalization(), Dense(7), Dense(5))
    shapes = [tuple(k.shape) for k in nb.prunable_kernels(model)]
    assert shapes == [(6, 7), (7, 5)]


def test_masks_of_asks_the_rule_for_each_kernel(nb):
    model = network(Dense(7), Dense(5))
    asked = []

    def rule(kernel, sparsity):
        asked.append((kernel.shape, sparsity))
        return kernel > 0

    masks = nb.masks_of(model, rule, 0.3)
    assert asked == [((6, 7), 0.3), ((7, 5), 0.3)]
    for mask, kernel in zip(masks, kernels_of(model)):
        assert (mask == (kernel > 0)).all()


def test_apply_masks_changes_the_model_itself(nb):
    model = network(Dense(7), Dense(5))
    expected = nb.prune(model, nb.unit_mask, 0.6).get_weights()
    nb.apply_masks(model, nb.masks_of(model, nb.unit_mask, 0.6))
    for weights, now in zip(expected, model.get_weights()):
        assert (weights == now).all()


@pytest.mark.parametrize("hidden", [[], [layers.Flatten], [lambda: Dense(1, "relu")]])
def test_a_model_with_nothing_to_prune_is_named(nb, hidden):
    parts = [keras.Input((6,)), *(layer() for layer in hidden), Dense(3)]
    model = keras.Sequential(parts, name="tiny")
    for function in (nb.prunable_kernels, nb.measured_sparsity):
        with pytest.raises(ValueError, match="tiny"):
            function(model)
    with pytest.raises(ValueError, match="tiny"):
        nb.prune(model, nb.weight_mask, 0.5)


def test_a_copy_has_weights_of_its_own(nb):
    model = network(Dense(7, "tanh"), Dense(5))
    copy, before = nb.copy_of(model), answers(model)
    assert (answers(copy) == before).all()
    copy.set_weights([0 * w for w in copy.get_weights()])
    assert (answers(model) == before).all() and not answers(copy).any()


# shrink


def assert_shrinks_to_what_is_needed(nb, pruned):
    """Assert that only needed units are left, or that one layer has none."""
    units = [int(needed.sum()) for needed in needed_units(pruned)]
    spoken = needs_a_spokesman(pruned)
    if all(units):
        shrunk = nb.shrink(pruned)
        assert spoken or units_of(shrunk) == units
        assert_same_function(pruned, shrunk)
    elif not spoken:
        with pytest.raises(ValueError) as error:
            nb.shrink(pruned)
        named = weighing_layers(pruned)
        named = [x.name for x, n in zip(named, units) if not n]
        assert any(repr(name) in str(error.value) for name in named)


@settings(max_examples=200)
@given(
    hidden_layers,
    st.sampled_from(RULES),
    st.integers(0, 95),
    st.booleans(),
    st.integers(0, 2**32 - 1),
)
def test_a_shrunk_network_computes_the_same(
    nb, hidden, name, percent, biases_stay, seed
):
    assume(any(units > 1 for units, *_ in hidden))
    model = network(*(Dense(n, *options) for n, *options in hidden), seed=seed)
    pruned = nb.prune(model, getattr(nb, name), percent / 100)
    if biases_stay:
        pruned = with_biases_of(model, pruned)
    assert_shrinks_to_what_is_needed(nb, pruned)


@settings(max_examples=150)
@given(
    st.integers(1, 3),
    blocks,
    heads,
    st.lists(st.tuples(st.integers(2, 9), st.sampled_from(ACTIVATIONS)), max_size=2),
    st.sampled_from(RULES),
    st.integers(0, 90),
    st.booleans(),
    st.integers(0, 2**32 - 1),
)
def test_a_shrunk_convolutional_network_computes_the_same(
    nb, rank, described, head, hidden, name, percent, biases_stay, seed
):
    model = chain(rank, described, head, hidden, seed)
    pruned = nb.prune(model, getattr(nb, name), percent / 100)
    if biases_stay:
        pruned = with_biases_of(model, pruned)
    assert_shrinks_to_what_is_needed(nb, pruned)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("use_bias", [True, False])
def test_a_constant_unit_is_folded_into_the_next_bias(nb, activation, use_bias):
    model = network(Dense(5, activation), Dense(4, "tanh", use_bias))
    kernel, bias = model.layers[0].get_weights()
    kernel[:, 2], bias[2] = 0, 3
    model.layers[0].set_weights([kernel, bias])
    shrunk = nb.shrink(model)
    assert shrunk.layers[0].units == 4 and shrunk.layers[1].use_bias
    assert_same_function(model, shrunk)


def test_a_unit_that_nobody_reads_goes_too(nb):
    model = network(Dense(5, "relu"), Dense(4, "relu"))
    kernel, bias = model.layers[1].get_weights()
    kernel[3] = 0
    model.layers[1].set_weights([kernel, bias])
    shrunk = nb.shrink(model)
    assert [layer.units for layer in shrunk.layers] == [4, 4, 3]
    assert_same_function(model, shrunk)


def test_a_dead_unit_takes_its_readers_along(nb):
    model = network(*(Dense(4, "relu", False) for _ in range(3)))
    weights = model.get_weights()
    weights[0][:, 0] = 0
    weights[1][1:, 2] = 0
    weights[2][:3, 1] = 0
    weights[2][:, 1] *= [0, 0, 1, 0]
    model.set_weights(weights)
    shrunk = nb.shrink(model)
    assert [layer.units for layer in shrunk.layers] == [3, 3, 3, 3]
    assert_same_function(model, shrunk)


def test_unit_pruning_leaves_the_parameters_of_the_kept_units(nb):
    model = nb.build_mlp((20, 10))
    shrunk = nb.shrink(nb.prune(model, nb.unit_mask, 0.8))
    assert shrunk.count_params() == 784 * 4 + 4 * 2 + 2 * 10
    assert shrunk.layers[-1].name == "logits"


def test_layers_without_weights_stay_in_the_chain(nb):
    model = network(
        layers.Reshape((6,)),
        Dense(12),
        layers.Activation("sigmoid"),
        layers.Dropout(0.5),
        Dense(9, use_bias=False),
        layers.LeakyReLU(0.3),
        Dense(8),
        layers.ReLU(),
        Dense(5),
        layers.ELU(),
    )
    pruned = nb.prune(model, nb.unit_mask, 0.6)
    shrunk = nb.shrink(pruned)
    kinds = [type(layer) for layer in model.layers]
    assert [type(layer) for layer in shrunk.layers] == kinds
    dense = [x.units for x in shrunk.layers if isinstance(x, Dense)]
    assert dense == [5, 4, 3, 2, 3]
    assert_same_function(pruned, shrunk)


def test_what_stands_outside_the_weighing_layers_is_kept(nb):
    scaled = layers.Normalization(mean=1.0, variance=4.0)
    model = keras.Sequential(
        [
            *(keras.Input((6, 6, 1)), scaled, layers.Flatten()),
            *(layers.BatchNormalization(), Dense(10, "relu"), Dense(3)),
            *(layers.BatchNormalization(), layers.Softmax()),
        ]
    )
    pruned = nb.prune(randomized(model), nb.unit_mask, 0.5)
    shrunk = nb.shrink(pruned)
    names = [layer.name for layer in model.layers]
    assert [layer.name for layer in shrunk.layers] == names
    assert units_of(shrunk) == [5, 3]
    assert_same_function(pruned, shrunk)


def test_a_normalization_that_was_adapted_is_kept(nb):
    scaled = layers.Normalization()
    scaled.adapt(np.random.default_rng(0).normal(3, 2, (20, 6)))
    parts = [keras.Input((6,)), scaled, Dense(10, "relu"), Dense(3)]
    model = keras.Sequential(parts)
    assert_same_function(model, nb.prune(model, nb.unit_mask, 0))
    assert_same_function(model, nb.shrink(model))
    pruned = nb.prune(model, nb.unit_mask, 0.5)
    shrunk = nb.shrink(pruned)
    assert units_of(shrunk) == [5, 3]
    assert_same_function(pruned, shrunk)


def test_layers_behind_a_backbone_are_shrunk(nb):
    inputs = keras.Input((6, 6, 2))
    ends = [layers.Conv2D(4, 3)(inputs), layers.Conv2D(4, 3)(inputs)]
    backbone = keras.Model(inputs, layers.Concatenate()(ends))
    pooling = layers.GlobalAveragePooling2D()
    model = network(backbone, pooling, Dense(8, "relu"), inputs=(6, 6, 2))

    def hidden_kernel(model):
        return nb.all_kernels(model)[-2:-1]

    pruned = nb.prune(model, nb.unit_mask, 0.5, hidden_kernel)
    shrunk = nb.shrink(pruned)
    assert units_of(shrunk) == [4, 3]
    assert_same_function(pruned, shrunk)
    with pytest.raises(ValueError, match=repr(backbone.name)[1:-1]):
        nb.shrink(nb.prune(model, nb.unit_mask, 0.5))


def test_filters_take_what_belongs_to_them_along(nb):
    model = network(
        layers.Conv2D(6, 3, padding="same"),
        layers.BatchNormalization(),
        layers.ReLU(),
        layers.MaxPooling2D(),
        layers.Conv2D(4, 2, use_bias=False),
        layers.Flatten(),
        layers.BatchNormalization(),
        Dense(10, "relu"),
        inputs=(6, 6, 2),
    )
    kernel = model.layers[0].kernel
    kernel.assign(kernel * [1, 0, 1, 0, 1, 1])
    last_filter = model.layers[4].kernel
    last_filter.assign(last_filter * [1, 1, 1, 0])
    shrunk = nb.shrink(model)
    assert units_of(shrunk) == [4, 3, 10, 3]
    assert [len(w) for w in shrunk.layers[1].get_weights()] == [4] * 4
    assert [len(w) for w in shrunk.layers[6].get_weights()] == [12] * 4
    for before, after in zip(
        model.layers[1].get_weights(), shrunk.layers[1].get_weights()
    ):
        assert (after == before[[0, 2, 4, 5]]).all()
    assert_same_function(model, shrunk)


@pytest.mark.parametrize("padding", ["valid", "same", "causal"])
def test_one_constant_unit_stays_for_a_padded_border(nb, padding):
    model = network(
        layers.Conv1D(6, 3, activation="sigmoid", bias_initializer="ones"),
        layers.Conv1D(4, 3, padding=padding, activation="relu"),
        layers.GlobalAveragePooling1D(),
        inputs=(12, 2),
    )
    kernel = model.layers[0].kernel
    kernel.assign(kernel * [1, 0, 0, 1, 0, 0])
    shrunk = nb.shrink(model)
    spokesmen = 0 if padding == "valid" else 1
    assert units_of(shrunk) == [2 + spokesmen, 4, 3]
    assert_same_function(model, shrunk)


@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_constants_of_zero_need_no_spokesman(nb, activation):
    model = network(
        layers.Conv1D(6, 3, activation=activation, use_bias=False),
        layers.Conv1D(4, 3, padding="same"),
        layers.Flatten(),
        inputs=(12, 2),
    )
    pruned = nb.prune(model, nb.unit_mask, 0.5)
    shrunk = nb.shrink(pruned)
    assert units_of(shrunk) == [3, 2, 3]
    assert_same_function(pruned, shrunk)


def test_a_window_of_one_pixel_has_no_border_and_no_spokesman(nb):
    model = network(
        layers.Conv2D(6, 3, activation="sigmoid"),
        layers.Conv2D(4, 1, padding="same"),
        layers.Flatten(),
        inputs=(6, 6, 2),
    )
    pruned = nb.prune(model, nb.unit_mask, 0.5)
    shrunk = nb.shrink(pruned)
    assert_same_function(pruned, shrunk)
    assert units_of(shrunk) == [3, 2, 3]


def test_the_last_axis_of_batch_normalization_may_be_counted(nb):
    model = network(
        layers.Conv2D(6, 3),
        layers.BatchNormalization(axis=3),
        layers.Flatten(),
        inputs=(6, 6, 2),
    )
    pruned = nb.prune(model, nb.unit_mask, 0.5)
    assert_same_function(pruned, nb.shrink(pruned))


def test_a_functional_chain_is_shrunk(nb):
    inputs = keras.Input((6,))
    hidden = Dense(10, "relu")(inputs)
    model = keras.Model(inputs, Dense(3)(layers.Dropout(0.2)(hidden)))
    pruned = nb.prune(randomized(model), nb.unit_mask, 0.7)
    shrunk = nb.shrink(pruned)
    assert shrunk.layers[0].units == 3
    assert_same_function(pruned, shrunk)


@pytest.mark.parametrize("name", RULES)
def test_shrink_leaves_the_model_as_it_is(nb, name):
    pruned = nb.prune(network(Dense(9), Dense(5)), getattr(nb, name), 0.6)
    before = pruned.get_weights()
    shrunk = nb.shrink(pruned)
    shrunk.set_weights([w + 1 for w in shrunk.get_weights()])
    for weights, now in zip(before, pruned.get_weights()):
        assert (weights == now).all()


def test_a_model_of_live_units_is_rebuilt_as_it_is(nb):
    for model in (network(Dense(9, "tanh"), Dense(5)), convolutional()):
        shrunk = nb.shrink(model)
        assert shrunk is not model and units_of(shrunk) == units_of(model)
        assert_same_function(model, shrunk)


def test_chain_of_returns_the_layers_in_order(nb):
    model = network(Dense(9, name="one"), Dense(5, name="two"))
    assert [x.name for x in nb.chain_of(model)] == ["one", "two", "last"]


class OwnDense(Dense):
    """A user's Dense layer: whatever it does, `shrink` cannot know."""


class Subclassed(keras.Model):
    """A model that is not made of a graph of layers."""

    def __init__(self):
        """Make two layers."""
        super().__init__(name="culprit")
        self.first, self.second = Dense(4), Dense(3)

    def call(self, inputs):
        """Return the second layer's outputs."""
        return self.second(self.first(inputs))


@keras.saving.register_keras_serializable("tests")
def each_by_the_sum(values):
    """Return values over the sum of their magnitudes."""
    total = keras.ops.sum(keras.ops.abs(values), axis=-1, keepdims=True)
    return values / total


BY_NAME = {"name": "culprit"}
FIRST = {"data_format": "channels_first", **BY_NAME}
IN_BETWEEN = {
    "softmax layer": lambda: layers.Softmax(**BY_NAME),
    "softmax": lambda: layers.Activation("softmax", **BY_NAME),
    "Dense softmax": lambda: Dense(4, "softmax", **BY_NAME),
    "Dense log_softmax": lambda: Dense(4, "log_softmax", **BY_NAME),
    "Dense Softmax": lambda: Dense(4, layers.Softmax(), **BY_NAME),
    "unknown activation": lambda: Dense(4, each_by_the_sum, **BY_NAME),
    "LayerNormalization": lambda: layers.LayerNormalization(**BY_NAME),
    "UnitNormalization": lambda: layers.UnitNormalization(**BY_NAME),
    "Reshape": lambda: layers.Reshape((3, 2), **BY_NAME),
    "PReLU": lambda: layers.PReLU(**BY_NAME),
    "EinsumDense": lambda: layers.EinsumDense("ab,bc->ac", 4, **BY_NAME),
    "subclass of Dense": lambda: OwnDense(6, **BY_NAME),
    "nested chain": lambda: keras.Sequential([Dense(4)], **BY_NAME),
}
BETWEEN_FILTERS = {
    "groups": lambda: layers.Conv2D(4, 3, groups=2, **BY_NAME),
    "channels_first": lambda: layers.Conv2D(4, 3, **FIRST),
    "pooling of channels_first": lambda: layers.MaxPooling2D(2, **FIRST),
    "flat channels_first": lambda: layers.Flatten(**FIRST),
    "global channels_first": lambda: layers.GlobalMaxPooling2D(**FIRST),
    "BatchNormalization": lambda: layers.BatchNormalization(1, **BY_NAME),
    "GroupNormalization": lambda: layers.GroupNormalization(2, **BY_NAME),
    "depthwise": lambda: layers.DepthwiseConv2D(3, **BY_NAME),
    "separable": lambda: layers.SeparableConv2D(4, 3, **BY_NAME),
    "transposed": lambda: layers.Conv2DTranspose(4, 3, **BY_NAME),
    "zero padding": lambda: layers.ZeroPadding2D(1, **BY_NAME),
    "recurrent": lambda: layers.ConvLSTM1D(4, 3, **BY_NAME),
}


def assert_refused(nb, model):
    """Assert that `shrink` names the culprit, says what to do instead."""
    with pytest.raises(ValueError, match=r"'culprit.*keep the zeros"):
        nb.shrink(model)


@pytest.mark.parametrize("kind", IN_BETWEEN)
def test_a_layer_that_cannot_be_followed_is_named(nb, kind):
    model = network(Dense(6, "relu"), IN_BETWEEN[kind](), layers.Flatten())
    assert_refused(nb, model)


@pytest.mark.parametrize(
    "change",
    [lambda layer: layer.quantize("int8"), lambda layer: layer.enable_lora(2)],
    ids=["int8", "LoRA"],
)
def test_a_layer_with_more_than_kernel_and_bias_is_named(nb, change):
    model = network(Dense(6, "relu"), Dense(5, name="culprit"))
    change(model.layers[1])
    assert_refused(nb, model)


def test_a_layer_that_is_given_a_mask_is_named(nb):
    words = layers.Embedding(9, 4, mask_zero=True)
    mean = layers.GlobalAveragePooling1D(name="culprit")
    parts = [words, Dense(8, "relu"), mean, Dense(6, "relu"), Dense(3)]
    assert_refused(nb, keras.Sequential([keras.Input((5,)), *parts]))


@pytest.mark.parametrize("kind", BETWEEN_FILTERS)
def test_a_layer_that_cannot_follow_filters_is_named(nb, kind):
    layer, flat = BETWEEN_FILTERS[kind](), layers.Flatten()
    model = network(layers.Conv2D(6, 3), layer, flat, inputs=(9, 9, 2))
    assert_refused(nb, model)


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "SimpleRNN"])
def test_a_recurrent_layer_is_named(nb, kind):
    recurrent = getattr(layers, kind)(4, name="culprit")
    assert_refused(nb, network(layers.Conv1D(6, 3), recurrent, inputs=(9, 2)))


@pytest.mark.parametrize("place", ["first", "last"])
def test_dead_units_of_a_layer_outside_the_chain_are_named(nb, place):
    parts = [OwnDense(6, name="culprit"), Dense(5, "relu")]
    if place == "last":
        parts = [*parts[::-1], OwnDense(4)]
    model = keras.Sequential([keras.Input((6,)), *parts])
    nb.shrink(model)
    assert_refused(nb, nb.prune(randomized(model), nb.unit_mask, 0.5))


def two_branches(inputs):
    """Return the outputs of two branches, together."""
    both = [Dense(4, name=f"culprit_{i}")(inputs) for i in (1, 2)]
    return layers.Concatenate(name="culprit")(both)


def around(inputs):
    """Return inputs, added to what a layer makes of them."""
    added = layers.Add(name="culprit")
    return added([Dense(6, name="culprit_1")(inputs), inputs])


def twice(inputs):
    """Return the outputs of a layer that reads its own."""
    shared = Dense(6, name="culprit")
    return shared(shared(inputs))


def attentive(inputs):
    """Return what attends to itself."""
    rows = layers.Reshape((2, 3), name="culprit_1")(inputs)
    seen = layers.MultiHeadAttention(2, 3, name="culprit")(rows, rows)
    return layers.Flatten(name="culprit_2")(seen)


def multiplied(inputs):
    """Return inputs, multiplied without a layer."""
    return Dense(6, name="culprit")(inputs * 2)


@pytest.mark.parametrize("part", [two_branches, around, twice, attentive, multiplied])
def test_what_is_no_chain_is_named(nb, part):
    inputs = keras.Input((6,))
    hidden = Dense(6, "relu", name="culprit_0")(inputs)
    outputs = Dense(3, name="culprit_3")(part(hidden))
    assert_refused(nb, keras.Model(inputs, outputs))


def test_a_second_output_is_refused(nb):
    inputs = keras.Input((6,))
    hidden = Dense(6, "relu", name="culprit_1")(inputs)
    outputs = [hidden, Dense(3, name="culprit_2")(hidden)]
    assert_refused(nb, keras.Model(inputs, outputs))


def test_a_second_input_is_refused(nb):
    inputs = keras.Input((3,)), keras.Input((3,))
    hidden = layers.Concatenate(name="culprit_1")(inputs)
    hidden = Dense(6, "relu", name="culprit_2")(hidden)
    model = keras.Model(inputs, Dense(3, name="culprit_3")(hidden))
    assert_refused(nb, model)


def test_a_subclassed_model_is_named(nb):
    model = Subclassed()
    model(np.ones((1, 6)))
    assert_refused(nb, model)


@pytest.mark.parametrize("name", RULES)
def test_a_layer_that_loses_all_units_is_named(nb, name):
    model = network(Dense(9), Dense(5, name="culprit"))
    rule = getattr(nb, name)

    def second(model):
        return nb.prunable_kernels(model)[1:]

    assert_refused(nb, nb.prune(model, rule, 1, second))


def test_what_comes_after_the_last_kernel_may_mix(nb):
    for end in (layers.Softmax(), layers.LayerNormalization()):
        parts = [keras.Input((6,)), Dense(8, "relu"), Dense(3), end]
        pruned = nb.prune(keras.Sequential(parts), nb.unit_mask, 0.5)
        assert units_of(nb.shrink(pruned)) == [4, 3]
        assert_same_function(pruned, nb.shrink(pruned))


def test_an_unbuilt_model_is_named(nb):
    model = keras.Sequential([Dense(4), Dense(3)], name="culprit")
    assert_refused(nb, model)


def test_a_shrunk_model_is_saved_and_loaded(nb, tmp_path):
    model = network(Dense(12, "gelu"), layers.Dropout(0.5), Dense(9))
    shrunk = nb.shrink(nb.prune(model, nb.unit_mask, 0.7))
    shrunk.save(tmp_path / "shrunk.keras")
    path = tmp_path / "shrunk.keras"
    loaded = keras.models.load_model(path, safe_mode=True)
    assert (answers(loaded) == answers(shrunk)).all()


def test_a_model_of_convolutions_only_is_shrunk(nb):
    inputs = keras.Input((8, 8, 1))
    hidden = layers.Conv2D(3, 3)(layers.Conv2D(8, 3, padding="same")(inputs))
    outputs = layers.GlobalAveragePooling2D()(hidden)
    pruned = nb.prune(keras.Model(inputs, outputs), nb.unit_mask, 0.5)
    assert units_of(nb.shrink(pruned)) == [4, 3]
    assert_same_function(pruned, nb.shrink(pruned))


def test_a_model_without_a_layer_to_shrink_is_named(nb):
    inputs = keras.Input((8, 8, 1))
    hidden = layers.DepthwiseConv2D(3)(inputs)
    outputs = layers.GlobalAveragePooling2D()(hidden)
    assert_refused(nb, keras.Model(inputs, outputs, name="culprit"))


def test_equal_layer_names_in_nested_models_keep_their_biases_apart(nb):
    def part(inputs, units):
        ends = keras.Input((inputs,))
        dense = Dense(units, bias_initializer="ones", name="same")
        return keras.Model(ends, dense(ends))

    inputs = keras.Input((3,))
    outputs = Dense(2)(part(8, 4)(part(3, 8)(inputs)))
    pruned = nb.prune(keras.Model(inputs, outputs), nb.unit_mask, 0.5)
    weights = pruned.get_weights()
    for kernel, bias in (weights[0:2], weights[2:4]):
        assert (kernel.any(axis=0) == (bias == 1)).all()


def test_frozen_layers_do_not_move_the_output_layer(nb):
    parts = [keras.Input((6,)), Dense(5), Dense(4), Dense(3)]
    model = keras.Sequential(parts)
    shapes = [tuple(k.shape) for k in nb.prunable_kernels(model)]
    for layer in model.layers:
        layer.trainable = False
        found = [tuple(k.shape) for k in nb.prunable_kernels(model)]
        assert found == shapes == [(6, 5), (5, 4)]
        layer.trainable = True
