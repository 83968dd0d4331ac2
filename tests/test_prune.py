"""Pruning a model, and making it smaller without changing its answers."""

import math

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

Dense = keras.layers.Dense
RULES = ("weight_mask", "unit_mask")
ACTIVATIONS = ("relu", "tanh", "sigmoid", "gelu", "linear")
hidden_layers = st.lists(
    st.tuples(st.integers(1, 32), st.sampled_from(ACTIVATIONS), st.booleans()),
    min_size=1,
    max_size=5,
)


def randomized(model, seed=0):
    """Give all weights of a model, biases too, random values."""
    random = np.random.default_rng(seed)
    shapes = [weights.shape for weights in model.get_weights()]
    scales = [math.sqrt(math.prod(s[:-1])) for s in shapes]
    model.set_weights(
        [random.normal(0, 1 / s, n) for s, n in zip(scales, shapes)]
    )
    return model


def network(*layers, inputs=(6,), seed=0):
    """Return a chain of layers with random weights and three outputs."""
    chain = [keras.Input(inputs), *layers, Dense(3, name="last")]
    return randomized(keras.Sequential(chain), seed)


def convolutional():
    """Return a network of two convolutions and two Dense layers."""
    return network(
        keras.layers.Conv2D(5, 3, activation="relu"),
        keras.layers.Conv2D(8, 2),
        keras.layers.Flatten(),
        Dense(10, "relu"),
        inputs=(6, 6, 2),
    )


def kernels_of(model):
    """Return the kernels of a model as arrays, the output's last."""
    return [w for w in model.get_weights() if w.ndim > 1]


def biases_of(model):
    """Return the biases of a model as arrays, the output's last."""
    return [w for w in model.get_weights() if w.ndim == 1]


def answers(model, seed=1):
    """Return a model's outputs for eight random rows."""
    shape = (8, *model.inputs[0].shape[1:])
    rows = np.random.default_rng(seed).normal(size=shape)
    return np.array(model(rows.astype("float32")))


def assert_same_function(model, other):
    """Assert that two models answer alike, to 1e-5 of the largest answer."""
    expected = answers(model)
    error = np.abs(answers(other) - expected).max()
    assert error <= 1e-5 * np.abs(expected).max()


def needed_units(model):
    """Return for each Dense kernel which units vary and are read.

    Found by following the weights that are not zero, both ways.
    """
    kernels = [kernel != 0 for kernel in kernels_of(model)]
    vary, needed = [np.ones(len(kernels[0]), bool)], []
    for kernel in kernels:
        vary.append(kernel[vary[-1]].any(axis=0))
    read = np.ones(kernels[-1].shape[1], bool)
    for kernel, varies in zip(kernels[::-1], vary[:0:-1]):
        needed.insert(0, varies & read if needed else read)
        read = kernel[:, needed[0]].any(axis=1)
    return needed


# prune


@pytest.mark.parametrize("name", RULES)
def test_the_output_layer_is_never_pruned(nb, name):
    model = network(Dense(7, "relu"), Dense(5, "relu"))
    empty = nb.prune(model, getattr(nb, name), 1)
    for before, after in zip(
        model.get_weights()[-2:], empty.get_weights()[-2:]
    ):
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
        assert nb.measured_sparsity(pruned) == zeros / total


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
    layers = [keras.layers.BatchNormalization(), Dense(7), Dense(5)]
    model = network(*layers)
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


@pytest.mark.parametrize("layers", [[], [keras.layers.Flatten]])
def test_a_model_with_nothing_to_prune_is_named(nb, layers):
    chain = [keras.Input((6,)), *(layer() for layer in layers), Dense(3)]
    model = keras.Sequential(chain, name="tiny")
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
    layers = [Dense(units, *options) for units, *options in hidden]
    model = network(*layers, seed=seed)
    pruned = nb.prune(model, getattr(nb, name), percent / 100)
    if biases_stay:
        pairs = zip(pruned.get_weights(), model.get_weights())
        pruned.set_weights([w if w.ndim > 1 else b for w, b in pairs])
    units = [int(needed.sum()) for needed in needed_units(pruned)]
    if all(units):
        shrunk = nb.shrink(pruned)
        assert [layer.units for layer in shrunk.layers] == units
        assert_same_function(pruned, shrunk)
    else:
        with pytest.raises(ValueError) as error:
            nb.shrink(pruned)
        layers = [x.name for x, n in zip(pruned.layers, units) if not n]
        assert any(repr(layer) in str(error.value) for layer in layers)
        assert nb.compact(pruned) is pruned


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("use_bias", [True, False])
def test_a_constant_unit_is_folded_into_the_next_bias(
    nb, activation, use_bias
):
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
        keras.layers.Reshape((6,)),
        Dense(12),
        keras.layers.Activation("sigmoid"),
        keras.layers.Dropout(0.5),
        Dense(9, use_bias=False),
        keras.layers.LeakyReLU(0.3),
        Dense(8),
        keras.layers.ReLU(),
        Dense(5),
        keras.layers.ELU(),
    )
    pruned = nb.prune(model, nb.unit_mask, 0.6)
    shrunk = nb.shrink(pruned)
    kinds = [type(layer) for layer in model.layers]
    assert [type(layer) for layer in shrunk.layers] == kinds
    dense = [x.units for x in shrunk.layers if isinstance(x, Dense)]
    assert dense == [5, 4, 3, 2, 3]
    assert_same_function(pruned, shrunk)


def test_what_stands_outside_the_dense_layers_is_kept(nb):
    layers = [
        keras.Input((6, 6, 1)),
        keras.layers.Conv2D(4, 3, activation="relu"),
        keras.layers.BatchNormalization(),
        keras.layers.Flatten(),
        Dense(10, "relu"),
        Dense(3),
        keras.layers.Softmax(),
    ]
    model = randomized(keras.Sequential(layers))
    model.set_weights([np.abs(w) for w in model.get_weights()])
    pruned = nb.prune(model, nb.unit_mask, 0.5)
    shrunk = nb.shrink(pruned)
    names = [layer.name for layer in model.layers]
    assert [layer.name for layer in shrunk.layers] == names
    assert shrunk.layers[3].units == 5
    assert_same_function(pruned, shrunk)


def test_a_functional_chain_is_shrunk(nb):
    inputs = keras.Input((6,))
    hidden = Dense(10, "relu")(inputs)
    model = keras.Model(inputs, Dense(3)(keras.layers.Dropout(0.2)(hidden)))
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


def test_compact_returns_the_smaller_model_or_the_same(nb):
    model = network(Dense(9, "relu"), Dense(5))
    assert nb.compact(model) is model
    for whole in (model, convolutional()):
        pruned = nb.prune(whole, nb.unit_mask, 0.6)
        assert nb.compact(pruned).count_params() < pruned.count_params()
        assert_same_function(pruned, nb.compact(pruned))


def test_chain_of_returns_the_layers_in_order(nb):
    model = network(Dense(9, name="one"), Dense(5, name="two"))
    assert [x.name for x in nb.chain_of(model)] == ["one", "two", "last"]


@pytest.mark.parametrize(
    "layer",
    [
        lambda: keras.layers.BatchNormalization(name="culprit"),
        lambda: keras.layers.LayerNormalization(name="culprit"),
        lambda: keras.layers.Softmax(name="culprit"),
        lambda: keras.layers.Activation("softmax", name="culprit"),
        lambda: keras.layers.Reshape((3, 2), name="culprit"),
        lambda: Dense(4, "softmax", name="culprit"),
        lambda: Dense(4, "log_softmax", name="culprit"),
    ],
)
def test_a_layer_that_mixes_units_is_named(nb, layer):
    model = network(Dense(6, "relu"), layer(), Dense(4))
    with pytest.raises(ValueError, match="culprit"):
        nb.shrink(model)
    assert nb.compact(model) is model


def test_a_branch_is_named(nb):
    inputs = keras.Input((6,))
    hidden = Dense(6, "relu")(inputs)
    total = keras.layers.Add(name="branch")([Dense(6)(hidden), hidden])
    model = keras.Model(inputs, Dense(3)(total))
    with pytest.raises(ValueError, match="branch"):
        nb.shrink(model)
    assert nb.compact(model) is model


def test_a_subclassed_model_is_named(nb):
    class Subclassed(keras.Model):
        def __init__(self):
            super().__init__(name="own_way")
            self.first, self.second = Dense(4), Dense(3)

        def call(self, inputs):
            return self.second(self.first(inputs))

    model = Subclassed()
    model(np.ones((1, 6)))
    with pytest.raises(ValueError, match="own_way"):
        nb.shrink(model)


def test_an_unbuilt_model_is_named(nb):
    model = keras.Sequential([Dense(4), Dense(3)], name="unbuilt")
    with pytest.raises(ValueError, match="unbuilt"):
        nb.shrink(model)


def test_a_shrunk_model_is_saved_and_loaded(nb, tmp_path):
    model = network(Dense(12, "gelu"), keras.layers.Dropout(0.5), Dense(9))
    shrunk = nb.shrink(nb.prune(model, nb.unit_mask, 0.7))
    shrunk.save(tmp_path / "shrunk.keras")
    path = tmp_path / "shrunk.keras"
    loaded = keras.models.load_model(path, safe_mode=True)
    assert (answers(loaded) == answers(shrunk)).all()


def test_a_model_without_dense_layers_is_named(nb):
    inputs = keras.Input((8, 8, 1))
    hidden = keras.layers.Conv2D(4, 3)(inputs)
    outputs = keras.layers.GlobalAveragePooling2D()(hidden)
    model = keras.Model(inputs, outputs, name="no_dense")
    with pytest.raises(ValueError, match="no_dense"):
        nb.shrink(model)
    assert nb.compact(model) is model


def test_a_second_output_is_refused(nb):
    inputs = keras.Input((6,))
    hidden = Dense(6, "relu")(inputs)
    model = keras.Model(inputs, [hidden, Dense(3)(hidden)])
    with pytest.raises(ValueError, match="cannot follow"):
        nb.shrink(model)


def test_a_second_input_is_refused(nb):
    inputs = keras.Input((3,)), keras.Input((3,))
    hidden = Dense(6, "relu")(keras.layers.Concatenate()(inputs))
    model = keras.Model(inputs, Dense(3)(hidden))
    with pytest.raises(ValueError, match="cannot follow"):
        nb.shrink(model)


def test_a_layer_used_twice_is_refused(nb):
    inputs, twice = keras.Input((6,)), Dense(6, name="twice")
    hidden = Dense(6, "relu")(inputs)
    model = keras.Model(inputs, twice(twice(hidden)))
    with pytest.raises(ValueError, match="twice"):
        nb.shrink(model)


def test_a_mixing_layer_as_an_activation_is_named(nb):
    culprit = Dense(6, activation=keras.layers.Softmax(), name="culprit")
    model = keras.Sequential([keras.Input((6,)), culprit, Dense(3)])
    with pytest.raises(ValueError, match="culprit"):
        nb.shrink(nb.prune(model, nb.unit_mask, 0.5))


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
    layers = [keras.Input((6,)), Dense(5), Dense(4), Dense(3)]
    model = keras.Sequential(layers)
    shapes = [tuple(k.shape) for k in nb.prunable_kernels(model)]
    for layer in model.layers:
        layer.trainable = False
        found = [tuple(k.shape) for k in nb.prunable_kernels(model)]
        assert found == shapes == [(6, 5), (5, 4)]
        layer.trainable = True
