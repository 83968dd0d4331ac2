"""Every kind of layer and of model: pruned, trained, shrunk and saved."""

import math

import keras
import numpy as np
import pytest
from conftest import run_cell, run_on_two_devices
from keras import layers
from test_training import Watch, compiled, constraints, zeros

RULES = ("weight_mask", "unit_mask")
KEEPERS = ("KeepZeros", "Pruner")
RANDOM = np.random.default_rng(0)
LABELS = RANDOM.integers(0, 3, 32)


def attention(name):
    """Return a function that lets its inputs attend to themselves."""
    layer = layers.MultiHeadAttention(2, 3, name=name)
    return lambda inputs: layer(inputs, inputs)


KINDS = {
    "Dense": ((5,), lambda name: layers.Dense(7, name=name)),
    "EinsumDense": (
        (5,),
        lambda name: layers.EinsumDense("ab,bc->ac", 7, None, "c", name=name),
    ),
    "Conv1D": ((7, 2), lambda name: layers.Conv1D(5, 3, name=name)),
    "Conv2D": ((6, 6, 2), lambda name: layers.Conv2D(5, 3, name=name)),
    "Conv3D": ((4, 4, 4, 2), lambda name: layers.Conv3D(5, 3, name=name)),
    "DepthwiseConv2D": (
        (6, 6, 2),
        lambda name: layers.DepthwiseConv2D(3, name=name),
    ),
    "Conv1DTranspose": (
        (6, 2),
        lambda name: layers.Conv1DTranspose(5, 3, name=name),
    ),
    "Conv2DTranspose": (
        (6, 6, 2),
        lambda name: layers.Conv2DTranspose(5, 3, name=name),
    ),
    "Conv3DTranspose": (
        (4, 4, 4, 2),
        lambda name: layers.Conv3DTranspose(5, 3, name=name),
    ),
    "SeparableConv2D": (
        (6, 6, 2),
        lambda name: layers.SeparableConv2D(5, 3, name=name),
    ),
    "MultiHeadAttention": ((5, 4), attention),
    "LSTM": ((5, 2), lambda name: layers.LSTM(4, name=name)),
    "GRU": ((5, 2), lambda name: layers.GRU(4, name=name)),
}
POINTWISE = "pointwise_kernel"
PRUNED = {
    "DepthwiseConv2D": set(),
    "Conv1DTranspose": set(),
    "Conv2DTranspose": set(),
    "Conv3DTranspose": set(),
    "SeparableConv2D": {POINTWISE},
    "LSTM": {"kernel", "recurrent_kernel"},
    "GRU": {"kernel", "recurrent_kernel"},
}
SHRINKING = ("Dense", "Conv1D", "Conv2D", "Conv3D")
IN_FRONT = sorted({*KINDS} - {*SHRINKING, "MultiHeadAttention"})


def varied(model, seed=0):
    """Add a little to all weights of a model, so that none is zero."""
    random = np.random.default_rng(seed)
    for variable in model.weights:
        variable.assign_add(random.uniform(0.1, 0.2, variable.shape))
    return model


def model_of(kind, first=True):
    """Return a model with a layer between Dense layers, or before them."""
    keras.utils.set_random_seed(0)
    shape, layer = KINDS[kind]
    x = inputs = keras.Input(shape)
    if first:
        x = layers.Dense(4, "relu", name="first")(x)
    x = layers.Flatten()(layer("layer")(x))
    x = layers.Dense(6, "relu", name="hidden")(x)
    return varied(keras.Model(inputs, layers.Dense(3, name="logits")(x)))


def is_pruned(variable, kind):
    """Return whether a variable of `model_of(kind)` is a kernel to prune."""
    layer, *_, name = variable.path.split("/")
    names = PRUNED.get(kind, {"kernel"}) if layer == "layer" else {"kernel"}
    return layer != "logits" and name in names


def zeros_due(shape, name, sparsity):
    """Return how many zeros a rule puts into a kernel of a shape."""
    size, units = math.prod(shape), shape[-1]
    if name == "unit_mask":
        return round(sparsity * units) * (size // units)
    return round(sparsity * size)


def rows_of(model, seed=1):
    """Return 32 random rows for a model."""
    shape = (32, *model.inputs[0].shape[1:])
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def answers(model, rows):
    """Return the outputs of a model as an array."""
    return keras.ops.convert_to_numpy(model(rows, training=False))


def difference(model, other, rows):
    """Return how far two models differ, relative to the largest answer."""
    expected = answers(model, rows)
    error = np.abs(answers(other, rows) - expected).max()
    return error / np.abs(expected).max()


def callback(nb, name, rule, **options):
    """Return a callback that keeps at zero what is, or half by a rule."""
    if name == "KeepZeros":
        return nb.KeepZeros(**options)
    return nb.Pruner(rule, nb.constant_sparsity(0.5), **options)


def fit(model, rows, *callbacks, epochs=3):
    """Train a model itself by two steps an epoch."""
    options = {"verbose": 0, "shuffle": False, "callbacks": [*callbacks]}
    model.fit(rows, LABELS, 16, epochs, **options)


def kernel_of(layer):
    """Return a function that chooses the kernel of a layer."""
    return lambda model: [model.get_layer(layer).kernel]


def reloaded(model, folder):
    """Return a model, saved and loaded."""
    model.save(folder / "model.keras")
    return keras.models.load_model(folder / "model.keras")


# every layer and rule


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_rule_leaves_the_zeros_due_in_each_kernel(nb, kind, name):
    model = model_of(kind)
    before = model.get_weights()
    pruned = nb.prune(model, getattr(nb, name), 0.4)
    for values, now in zip(before, model.get_weights()):
        assert (values == now).all()
    total = size = 0
    for variable, values in zip(pruned.weights, before):
        now = variable.numpy()
        assert ((now == 0) | (now == values)).all()
        if is_pruned(variable, kind):
            assert (now == 0).sum() == zeros_due(now.shape, name, 0.4)
            total, size = total + (now == 0).sum(), size + now.size
        elif variable.name != "bias":
            assert (now == values).all()
    assert math.isclose(nb.measured_sparsity(pruned), total / size)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_bias_goes_with_its_unit_but_not_with_a_gate(nb, kind, name):
    model = model_of(kind)
    pruned = nb.prune(model, getattr(nb, name), 0.8)
    now = {v.path: v.numpy() for v in pruned.weights}
    pruned_paths = {v.path for v in pruned.weights if is_pruned(v, kind)}
    biases = [v for v in model.weights if v.name == "bias"]
    assert len(biases) >= 4
    for bias in biases:
        owner, expected = bias.path.removesuffix("bias"), bias.numpy()
        for path in pruned_paths & {owner + "kernel", owner + POINTWISE}:
            if not owner.endswith("_cell/"):
                kernel = now[path].reshape(-1, now[path].shape[-1])
                expected = expected * kernel.any(axis=0)
        assert (now[bias.path] == expected).all()


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_zeros_due_are_held_at_every_step(nb, kind, name):
    model = compiled(model_of(kind))
    kernels = [v for v in model.weights if is_pruned(v, kind)]

    def count(model):
        return [int((kernel.numpy() == 0).sum()) for kernel in kernels]

    schedule = nb.polynomial_sparsity(0.6, begin=1, end=3, initial=0.2, power=1)
    counts, places = Watch(count), Watch(zeros)
    pruner = nb.Pruner(getattr(nb, name), schedule, frequency=2)
    fit(model, rows_of(model), pruner, counts, places)
    few, some, many = (
        [zeros_due(kernel.shape, name, sparsity) for kernel in kernels]
        for sparsity in (0.2, 0.4, 0.6)
    )
    assert counts.noted == [few, some, many, many, many, many]
    for earlier, later in zip(places.noted, places.noted[1:]):
        assert later[earlier].all(), "a zero has come back"
    assert count(model) == many
    assert not any(constraints(model))


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_pruned_is_shrunk_or_refused_by_name(nb, kind, name):
    pruned = nb.prune(model_of(kind), getattr(nb, name), 0.5)
    if kind in SHRINKING:
        small = nb.shrink(pruned)
        assert difference(pruned, small, rows_of(pruned)) <= 1e-5
        if name == "unit_mask":
            units = pruned.get_layer("layer").kernel.shape[-1]
            left = units - round(0.5 * units)
            assert small.get_layer("layer").kernel.shape[-1] == left
            assert small.count_params() < pruned.count_params() / 2
    else:
        layer = rf"{kind} 'layer'.*keep the zeros"
        with pytest.raises(ValueError, match=layer):
            nb.shrink(pruned)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("kind", IN_FRONT)
def test_a_layer_in_front_stays_whole_and_the_rest_is_shrunk(nb, kind, name):
    model, hidden = model_of(kind, first=False), kernel_of("hidden")
    pruned = nb.prune(model, getattr(nb, name), 0.5, hidden)
    small = nb.shrink(pruned)
    assert difference(pruned, small, rows_of(pruned)) <= 1e-5
    if name == "unit_mask":
        assert small.get_layer("hidden").units == 3


@pytest.mark.parametrize("name", RULES)
def test_no_depthwise_kernel_is_ever_pruned(nb, name):
    inputs = keras.Input((6, 6, 2))
    x = layers.DepthwiseConv2D(3, depth_multiplier=3, name="whole")(inputs)
    x = layers.SeparableConv2D(4, 3, depth_multiplier=2, name="half")(x)
    outputs = layers.Dense(3)(layers.Flatten()(x))
    model = varied(keras.Model(inputs, outputs))
    pruned = nb.prune(model, getattr(nb, name), 0.5)
    for layer in ("whole", "half"):
        assert pruned.get_layer(layer).get_weights()[0].all()
    assert not pruned.get_layer("half").get_weights()[1].all()


# the models that people have


def two_branches():
    """Return a functional model whose branches are added."""
    inputs = keras.Input((6,))
    x = layers.Dense(8, "relu")(inputs)
    wide = layers.Dense(7, "relu")(x)
    deep = layers.Dense(7, "tanh")(layers.Dense(5, "relu")(x))
    return keras.Model(inputs, layers.Dense(3)(layers.Add()([wide, deep])))


def nested():
    """Return a functional model with a Sequential one inside."""
    inner = [keras.Input((8,)), layers.Dense(7, "relu"), layers.Dense(5)]
    inputs = keras.Input((6,))
    x = layers.Dense(8, "relu")(inputs)
    x = keras.Sequential(inner)(x)
    return keras.Model(inputs, layers.Dense(3)(x))


def shared():
    """Return a model that uses a layer twice."""
    inputs, twice = keras.Input((6,)), layers.Dense(6, "tanh")
    return keras.Model(inputs, layers.Dense(3)(twice(twice(inputs))))


def mixed_precision():
    """Return a model that computes in float16 and keeps float32 weights."""
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_float16")
    parts = [keras.Input((6,)), layers.Dense(8, "relu"), layers.Dense(7)]
    model = keras.Sequential([*parts, layers.Dense(3, dtype="float32")])
    keras.config.set_dtype_policy(before)
    return model


def normalized():
    """Return a model that normalizes what it concatenates."""
    inputs = keras.Input((6,))
    parts = [layers.Dense(4, "relu")(inputs), layers.Dense(5)(inputs)]
    x = layers.BatchNormalization()(layers.Concatenate()(parts))
    return keras.Model(inputs, layers.Dense(3)(layers.Dropout(0.2)(x)))


@keras.saving.register_keras_serializable("tests")
class Subclassed(keras.Model):
    """A model with a `call` of its own."""

    def __init__(self, **options):
        """Make three layers."""
        super().__init__(**options)
        self.first = layers.Dense(8, "relu")
        self.second = layers.Dense(7, "relu")
        self.third = layers.Dense(3)

    def call(self, inputs):
        """Return logits."""
        hidden = self.first(inputs)
        return self.third(self.second(hidden) + hidden[:, :7])


def subclassed():
    """Return a subclassed model that is built."""
    model = Subclassed()
    model(np.zeros((1, 6), "float32"))
    return model


MODELS = (two_branches, nested, shared, mixed_precision, normalized)
ROWS = RANDOM.normal(size=(32, 6)).astype("float32")


@pytest.mark.parametrize("loaded", [False, True], ids=["built", "loaded"])
@pytest.mark.parametrize("keeper", KEEPERS)
@pytest.mark.parametrize("build", [*MODELS, subclassed])
def test_any_model_is_pruned_trained_saved_and_loaded(
    nb, tmp_path, build, keeper, loaded
):
    keras.utils.set_random_seed(0)
    model = compiled(varied(build()))
    if loaded:
        fit(model, ROWS, epochs=1)
        model = reloaded(model, tmp_path)
    nb.apply_masks(model, nb.masks_of(model, "unit", 0.5))
    expected, start = zeros(model), model.get_weights()
    places = Watch(zeros)
    fit(model, ROWS, callback(nb, keeper, "unit"), places)
    assert len(places.noted) == 6
    assert (np.array(places.noted) == expected).all()
    assert (zeros(model) == expected).all()
    assert not any(constraints(model))
    assert any((w != s).any() for w, s in zip(model.get_weights(), start))
    again = reloaded(model, tmp_path)
    assert (answers(again, ROWS) == answers(model, ROWS)).all()
    assert (zeros(again) == expected).all()
    assert nb.measured_sparsity(again) == nb.measured_sparsity(model)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("build", [*MODELS, subclassed])
def test_a_copy_of_any_model_is_pruned(nb, build, name):
    model, rule = varied(build()), getattr(nb, name)
    before = model.get_weights()
    pruned = nb.prune(model, rule, 0.5)
    kernels = nb.prunable_kernels(pruned)
    assert len(kernels) == len(nb.all_kernels(model)) - 1
    for kernel in kernels:
        found = np.count_nonzero(kernel.numpy() == 0)
        assert found == zeros_due(kernel.shape, name, 0.5)
    for values, now in zip(before, model.get_weights()):
        assert (values == now).all()


class Closed(keras.Model):
    """A model that Keras cannot build again: it takes no arguments."""

    def __init__(self):
        """Hold two layers."""
        super().__init__(name="own")
        self.first, self.last = layers.Dense(4), layers.Dense(3)

    def call(self, inputs):
        """Pass the inputs through both."""
        return self.last(self.first(inputs))


class Sized(Closed):
    """One that must be told its size, and does not say which it has."""

    def __init__(self, units):
        """Hold layers of a size."""
        super().__init__()
        self.first = layers.Dense(units)


@pytest.mark.parametrize("build", [Closed, lambda: Sized(3)])
def test_a_class_that_keras_cannot_copy_is_named(nb, build):
    model = build()
    model(np.zeros((1, 2)))
    with pytest.raises(ValueError, match=r"'own'.*get_config.*apply_masks"):
        nb.prune(model, nb.weight_mask, 0.5)


def test_a_class_that_keras_copies_into_another_is_named(nb):
    class Doubled(keras.Sequential):
        def call(self, inputs, training=None, mask=None):
            return 2 * super().call(inputs)

    model = Doubled([keras.Input((2,)), layers.Dense(4), layers.Dense(3)])
    with pytest.raises(ValueError, match="'doubled'") as error:
        nb.prune(model, nb.weight_mask, 0.5)
    assert str(error.value.__cause__) == "its copy is a Sequential"
    with pytest.raises(ValueError, match="Doubled 'doubled': it is not built"):
        nb.shrink(model)


class Holder(layers.Layer):
    """A layer that holds a normalization."""

    def __init__(self, **options):
        """Hold it."""
        super().__init__(**options)
        self.inner = layers.Normalization()

    def call(self, inputs):
        """Pass the inputs through it."""
        return self.inner(inputs)


HOLDERS = {
    "layer": lambda own: own.inner,
    "model": lambda own: keras.Sequential([keras.Input((4, 6)), own.inner]),
    "wrapper": lambda own: layers.TimeDistributed(own.inner),
    "own layer": lambda own: own,
}


def normalized(holder, seed):
    """Return a network behind a normalization adapted to random data."""
    random, own = np.random.default_rng(seed), Holder()
    own.inner.adapt(random.normal(3, 2, (50, 6)))
    parts = HOLDERS[holder](own), layers.Dense(8, "relu"), layers.Dense(3)
    return keras.Sequential([keras.Input((4, 6)), *parts])


@pytest.mark.parametrize("holder", HOLDERS)
def test_copies_normalize_by_the_statistics_of_the_original(nb, holder):
    model, other = normalized(holder, 0), normalized(holder, 1)
    rows = np.random.default_rng(2).normal(3, 2, (20, 4, 6)).astype("float32")
    expected = answers(model, rows)
    assert not np.allclose(answers(other, rows), expected)
    for copy in (nb.copy_of(model), nb.prune(model, "weight", 0)):
        assert (answers(copy, rows) == expected).all()
        copy.compile("adam", "mse", jit_compile=False)
        assert np.allclose(copy.predict(rows, verbose=0), expected, atol=1e-5)
        assert copy.evaluate(rows, expected, verbose=0) < 1e-9
    for own, variable in zip(other.variables, model.variables):
        own.assign(variable)
    assert not np.allclose(answers(other, rows), expected)
    nb.settle(other)
    assert (answers(other, rows) == expected).all()


def test_low_rank_weights_must_be_merged(nb, model):
    model.layers[-1].enable_lora(2)
    for ask in (nb.measured_sparsity, nb.prunable_kernels):
        with pytest.raises(ValueError, match=r"'mlp' has LoRA.*merge"):
            ask(model)


def test_a_model_that_is_not_built_is_told_so(nb):
    model = keras.Sequential([layers.Dense(4), layers.Dense(3)])
    with pytest.raises(ValueError, match="not built"):
        nb.prune(model, nb.weight_mask, 0.5)


def test_scores_must_be_one_for_each_filter(nb):
    model = keras.Sequential([keras.Input((9, 9, 2)), layers.Conv2D(4, 3)])
    model.add(layers.Conv2D(2, 3))
    with pytest.raises(ValueError, match="broadcast"):
        nb.prune(model, nb.ByScores([np.ones((3, 1, 4))]), 0.5)


def test_masks_must_be_as_many_as_kernels(nb, model):
    masks = nb.masks_of(model, nb.weight_mask, 0.5)
    for given in (masks[:1], [*masks, masks[-1]]):
        before = model.get_weights()
        with pytest.raises(ValueError, match="zip"):
            nb.apply_masks(model, given)
        assert all(map(np.array_equal, before, model.get_weights()))
    scores = nb.ByScores([np.arange(12)])
    with pytest.raises(ValueError, match="zip"):
        nb.masks_of(model, scores, 0.5)


def test_what_is_quantized_is_not_shrunk(nb, model):
    pruned = nb.prune(model, nb.unit_mask, 0.5)
    for layer in filter(nb.all_kernels, pruned.layers):
        layer.quantize("int8")
    with pytest.raises(ValueError, match=r"'hidden_1': .* a kernel and a bias"):
        nb.shrink(pruned)


# which kernels


def three_layers():
    """Return a chain of three Dense layers with biases."""
    keras.utils.set_random_seed(0)
    parts = [
        layers.Dense(units, activation="tanh", name=name)
        for units, name in ((8, "first"), (7, "second"), (3, "last"))
    ]
    return varied(keras.Sequential([keras.Input((6,)), *parts]))


@pytest.mark.parametrize(("name", "left"), [("first", 4), ("second", 3), ("last", 1)])
def test_only_what_is_chosen_is_pruned(nb, name, left):
    model, choose = three_layers(), kernel_of(name)
    pruned = nb.prune(model, nb.unit_mask, 0.5, choose)
    for layer, before in zip(pruned.layers, model.layers):
        (kernel, bias), (whole, own) = (
            layer.get_weights(),
            before.get_weights(),
        )
        kept = np.ones(len(own), bool)
        if layer.name == name:
            kept = kernel.any(axis=0)
            assert kept.sum() == left
            share = nb.measured_sparsity(pruned, choose)
            assert math.isclose(share, 1 - left / len(kept))
        assert (kernel == whole * kept).all() and (bias == own * kept).all()


def test_all_kernels_include_the_output_and_kernels_of_one_unit(nb):
    parts = [keras.Input((6,)), layers.Dense(1), layers.Dense(5)]
    model = keras.Sequential([*parts, layers.Dense(3)])
    shapes = [tuple(kernel.shape) for kernel in nb.all_kernels(model)]
    assert shapes == [(6, 1), (1, 5), (5, 3)]
    shapes = [tuple(kernel.shape) for kernel in nb.prunable_kernels(model)]
    assert shapes == [(1, 5)]
    empty = nb.prune(model, nb.unit_mask, 1, nb.all_kernels)
    assert not any(weights.any() for weights in empty.get_weights())


@pytest.mark.parametrize("keeper", KEEPERS)
def test_only_what_is_chosen_is_held(nb, keeper):
    chosen, other = kernel_of("second"), kernel_of("first")
    model = nb.prune(three_layers(), nb.weight_mask, 0.5, nb.all_kernels)
    expected = chosen(model)[0].numpy() == 0
    shares = Watch(lambda model: chosen(model)[0].numpy() == 0)
    own = callback(nb, keeper, "weight", choose=chosen)
    fit(compiled(model), ROWS, own, shares)
    assert (np.array(shares.noted) == expected).all()
    assert nb.measured_sparsity(model, other) < 0.1


def equal_names():
    """Return a model whose two nested parts have variables of equal paths."""

    def part(inputs, units):
        ends = keras.Input((inputs,))
        dense = layers.Dense(units, "tanh", name="same")
        return keras.Model(ends, dense(ends))

    inputs = keras.Input((6,))
    hidden = part(8, 5)(part(6, 8)(inputs))
    return varied(keras.Model(inputs, layers.Dense(3)(hidden)))


@pytest.mark.parametrize("name", RULES)
def test_equal_paths_are_told_apart_when_pruned(nb, name):
    model = equal_names()
    paths = [variable.path for variable in model.weights]
    assert paths[:2] == paths[2:4]
    pruned = nb.prune(model, getattr(nb, name), 0.75)
    first, own, second, others, *_ = pruned.get_weights()
    for kernel, bias in ((first, own), (second, others)):
        assert (kernel == 0).sum() == zeros_due(kernel.shape, name, 0.75)
        assert ((bias != 0) == kernel.any(axis=0)).all()


def test_equal_paths_are_told_apart_in_training_and_in_files(nb, tmp_path):
    model = compiled(equal_names())
    schedule, places = nb.constant_sparsity(0.5), Watch(zeros)
    fit(model, ROWS, nb.Pruner("unit", schedule), places)
    kernels = model.get_weights()[0:4:2]
    assert [int((k == 0).sum()) for k in kernels] == [24, 16]
    for earlier, later in zip(places.noted, places.noted[1:]):
        assert later[earlier].all()
    again = reloaded(model, tmp_path)
    assert (answers(again, ROWS) == answers(model, ROWS)).all()


# the last part


@pytest.fixture(scope="module")
def small_cnn(nb):
    """Return a small convolutional network, its statistics not trivial."""
    return varied(nb.build_cnn((4, 6), 8))


def test_build_cnn_has_the_layers_and_the_parameters_it_should(nb):
    model = nb.build_cnn((4, 6), 8, seed=3)
    convolutions = (1 * 9 + 1) * 4 + (4 * 9 + 1) * 6
    statistics = 4 * (4 + 6)
    dense = (7 * 7 * 6 + 1) * 8 + (8 + 1) * 10
    assert model.count_params() == convolutions + statistics + dense
    assert model.layers[-1].name == "logits"
    images = np.zeros((5, 28, 28), "uint8")
    assert model(images).shape == (5, 10)
    again = nb.build_cnn((4, 6), 8, seed=3).get_weights()
    other = nb.build_cnn((4, 6), 8, seed=4).get_weights()
    for values, same in zip(model.get_weights(), again):
        assert (values == same).all()
    assert any((a != b).any() for a, b in zip(again, other))


def test_a_convolutional_network_shrinks_after_pruning_in_training(nb, data):
    model = nb.train(nb.build_cnn((4, 6), 8), data, 1, 0)
    pruned = nb.prune_in_training(model, data, nb.unit_mask, 0.5, 1, 0)
    assert nb.measured_sparsity(pruned) == 0.5
    small = nb.shrink(pruned)
    *units, classes = [k.shape[-1] for k in nb.all_kernels(small)]
    assert classes == 10
    assert all(n <= most for n, most in zip(units, (2 + 1, 3, 4), strict=True))
    assert difference(pruned, small, data.x_test) <= 1e-5
    trained = nb.train(small, data, 1, 0)
    assert trained.count_params() == small.count_params()
    test = data.x_test, data.y_test
    losses = [nb.evaluate(own, *test)["loss"] for own in (trained, small)]
    assert losses[0] < losses[1]


def test_a_convolutional_network_is_pruned_shrunk_and_compared(
    nb, data, small_cnn, capsys
):
    own = {"fashion": data, "cnn": small_cnn}
    names = run_cell(nb, "cnn_pruned = prune_in_training(", **own)
    table, cnns = names["compared"], names["cnns"]
    assert [*table.index] == [*cnns] == ["dense", "pruned", "shrunk"]
    assert cnns["dense"] is small_cnn
    assert nb.measured_sparsity(cnns["pruned"]) == 0.5
    assert difference(cnns["pruned"], cnns["shrunk"], data.x_test) <= 1e-5
    columns = ["accuracy (%)", "parameters", "MFLOPs", "ms for 250 images"]
    assert [*table.columns] == columns
    for name, model in cnns.items():
        right = answers(model, data.x_test).argmax(axis=1) == data.y_test
        assert math.isclose(table["accuracy (%)"][name], 100 * right.mean())
        assert table.parameters[name] == model.count_params()
    products = 28**2 * 9 * 4 + 14**2 * 9 * 4 * 6 + 7**2 * 6 * 8 + 8 * 10
    assert math.isclose(table.MFLOPs["dense"], 2 * products / 1e6)
    assert table.MFLOPs["shrunk"] < table.MFLOPs["dense"] == table.MFLOPs["pruned"]
    assert (table[columns[-1]] > 0).all()
    again = run_cell(nb, "gently = Pruner(", **own)
    yours = again["yours"]
    assert nb.measured_sparsity(yours) == 0.5 and yours is not small_cnn
    said = capsys.readouterr().out.splitlines()[-2:]
    for line, model in zip(said, (small_cnn, nb.shrink(yours)), strict=True):
        right = answers(model, data.x_test).argmax(axis=1) == data.y_test
        expected = f"{model.count_params():,} parameters, {right.mean():.1%} right"
        assert line == expected


def test_models_disagree_by_their_largest_difference(nb, small_cnn, data):
    pruned = nb.prune(small_cnn, "weight", 0.2)
    images = data.x_test[:41]
    expected = difference(small_cnn, pruned, images)
    assert expected > 0.001
    for rows in (2000, 41, 7):
        found = nb.disagreement(small_cnn, pruned, images, rows)
        assert math.isclose(found, expected, rel_tol=1e-3)
        assert nb.disagreement(small_cnn, small_cnn, images, rows) == 0
    logits = small_cnn.layers[-1]
    doubled = nb.copy_of(small_cnn)
    doubled.layers[-1].set_weights([2 * w for w in logits.get_weights()])
    assert math.isclose(nb.disagreement(small_cnn, doubled, images), 1, rel_tol=1e-5)


@pytest.mark.parametrize("name", RULES)
def test_a_pruned_model_is_pruned_further(nb, name):
    model, rule = varied(two_branches()), getattr(nb, name)
    expected = nb.prune(model, rule, 0.75)
    for sparsity in (0.25, 0.5, 0.75):
        nb.apply_masks(model, nb.masks_of(model, rule, sparsity))
        for kernel in nb.prunable_kernels(model):
            due = zeros_due(kernel.shape, name, sparsity)
            assert np.count_nonzero(kernel.numpy() == 0) == due
    for once, again in zip(expected.get_weights(), model.get_weights()):
        assert (once == again).all()


def test_support_hides_no_other_error_than_a_refusal(nb, monkeypatch):
    monkeypatch.setattr(nb, "shrink", lambda model: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        nb.support(layers.Dense(4), (3,))


@pytest.mark.parametrize("kind", KINDS)
def test_support_says_what_works(nb, kind):
    shape, layer = KINDS[kind]
    own = layers.MultiHeadAttention(2, 3) if layer is attention else None
    row = nb.support(own or layer("layer"), shape)
    assert list(row) == ["weight", "unit", "shrinks"]
    assert row["shrinks"] == ("yes" if kind in SHRINKING else "refused")
    inputs = keras.Input(shape)
    model = keras.Model(inputs, layer("layer")(inputs))
    shapes = [v.shape for v in model.weights if is_pruned(v, kind)]
    for name, rule in (("weight", "weight_mask"), ("unit", "unit_mask")):
        if not shapes:
            assert row[name] == "kept whole"
            continue
        due = sum(zeros_due(s, rule, 0.5) for s in shapes)
        assert math.isclose(row[name], due / sum(map(math.prod, shapes)))


TWO_DEVICES = """
from test_layers import *
data = nb.load_dataset("digits")
images, labels = data.x_train[:64], data.y_train[:64]
for names in (["CPU:0"], ["CPU:0", "CPU:1"]):
    strategy = tf.distribute.MirroredStrategy(names)
    assert strategy.num_replicas_in_sync == len(names)
    with strategy.scope():
        model = nb.copy_of(nb.build_mlp((12, 8)))
        model.compile(keras.optimizers.SGD(0.05), nb.LOSS, jit_compile=False)
    schedule = nb.polynomial_sparsity(0.5, begin=1, end=6)
    pruner, places = nb.Pruner("unit", schedule, frequency=2), Watch(zeros)
    options = {"callbacks": [pruner, places], "shuffle": False}
    model.fit(images, labels, 16, 2, 0, **options)
    for earlier, later in zip(places.noted, places.noted[1:]):
        assert later[earlier].all()
    assert nb.measured_sparsity(model) == 0.5
    assert not any(constraints(model))
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
