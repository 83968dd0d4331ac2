"""What is copied computes the same, and what is wrong is refused by its name."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import (
    Closed,
    answers,
    difference,
    randomized,
    reloaded,
    rows_of,
    same_weights,
)
from keras import layers
from keras.layers import Dense

registered = keras.saving.register_keras_serializable("faults")


def network(*parts, shape=(6,), **options):
    """Return a chain of layers with random weights."""
    return randomized(keras.Sequential([keras.Input(shape, **options), *parts]))


# classes of one's own


@registered
class Scaled(keras.Model):
    """A model that does not tell what its constructor was given."""

    def __init__(self, scale=1.0, activation="relu", **options):
        """Make two layers."""
        super().__init__(**options)
        self.scale = scale
        self.first, self.last = Dense(5, activation), Dense(3)

    def call(self, inputs):
        """Return scaled answers."""
        return self.scale * self.last(self.first(inputs))


@registered
class Telling(Scaled):
    """One that tells."""

    def get_config(self):
        """Return both arguments."""
        activation = self.first.activation.__name__
        return {"name": self.name, "scale": self.scale, "activation": activation}


@registered
class Options(keras.Model):
    """A model that takes its argument out of the others."""

    def __init__(self, **options):
        """Make two layers."""
        self.scale = options.pop("scale", 1.0)
        super().__init__(**options)
        self.first, self.last = Dense(5), Dense(3)

    def call(self, inputs):
        """Return scaled answers."""
        return self.scale * self.last(self.first(inputs))


@registered
class Forgetful(layers.Layer):
    """A layer that forgets to tell its factor."""

    def __init__(self, factor=1.0, **options):
        """Keep the factor."""
        super().__init__(**options)
        self.factor = factor

    def call(self, inputs):
        """Multiply."""
        return self.factor * inputs

    def compute_output_shape(self, shape):
        """Return the shape of what is read."""
        return shape

    def get_config(self):
        """Tell less than all."""
        return super().get_config()


class Table(layers.Layer):
    """A layer with numbers that no variable holds, set after it was made."""

    numbers = 1.0

    def call(self, inputs):
        """Multiply."""
        return self.numbers * inputs


class Pair(keras.Model):
    """A model of two positional inputs."""

    def __init__(self, name="pair"):
        """Hold a layer for each."""
        super().__init__(name=name)
        self.first, self.second = Dense(4), Dense(4)

    def call(self, one, other):
        """Add what becomes of both."""
        return self.first(one) + self.second(other)


def with_table(numbers):
    """Return a network with a layer whose numbers are set by hand."""
    table = Table()
    table.numbers = numbers
    return network(Dense(4), table, Dense(2))


def called(model, *rows):
    """Return a model that was called on rows, with random weights."""
    model(*(rows or (np.ones((2, 6), "float32"),)))
    return randomized(model)


ROWS = np.ones((2, 6), "float32")
REFUSED = {
    "defaults": lambda: called(Scaled(2.0, "tanh")),
    "the same as the defaults": lambda: called(Scaled()),
    "inside": lambda: network(called(Scaled(2.0)), Dense(3)),
    "inside twice": lambda: network(network(called(Scaled(2.0))), Dense(3)),
    "an option": lambda: called(Options(scale=2.0)),
    "a layer": lambda: network(Dense(5), Forgetful(3.0), Dense(2)),
    "a layer inside": lambda: network(network(Dense(5), Forgetful(3.0)), Dense(2)),
    "a wrapped layer": lambda: network(
        layers.TimeDistributed(Forgetful(3.0)), Dense(2), shape=(4, 6)
    ),
    "numbers": lambda: with_table(3.0),
    "a wrapped function": lambda: network(
        Dense(5), layers.TimeDistributed(layers.Lambda(lambda x: 2 * x)), shape=(4, 6)
    ),
    "two positional inputs": lambda: called(Pair(), ROWS, ROWS[:, :4]),
    "closed": lambda: called(Closed()),
}


@pytest.mark.parametrize("build", REFUSED.values(), ids=REFUSED)
def test_what_would_be_copied_wrongly_is_refused(nb, build):
    model = build()
    before, kernel = model.get_weights(), model.trainable_weights[0].path
    with pytest.raises(ValueError, match=f"Keras cannot copy {model.name!r}"):
        nb.prune(model, "weight", 0.5, [kernel])
    assert same_weights(model, before)


ADVISED = ("defaults", "inside", "an option", "a layer", "numbers")


@pytest.mark.parametrize("case", ADVISED)
def test_the_way_to_a_copy_is_named(nb, case):
    with pytest.raises(ValueError, match="get_config"):
        nb.copy_of(REFUSED[case]())


@pytest.mark.parametrize("factor", [2, 3])
def test_a_function_is_copied_or_refused(nb, factor):
    """Some versions of Keras copy it, others find that unsafe."""
    model = network(Dense(5), layers.Lambda(lambda x: factor * x), Dense(2))
    try:
        assert difference(model, nb.copy_of(model)) == 0
    except ValueError as error:
        assert f"Keras cannot copy {model.name!r}" in str(error)


def test_a_model_that_tells_its_arguments_is_copied(nb):
    model = called(Telling(2.0, "tanh"))
    copy = nb.prune(model, "weight", 0.0, [model.first.kernel.path])
    rows = np.random.default_rng(0).normal(size=(4, 6)).astype("float32")
    assert difference(model, copy, rows) == 0 and copy.scale == 2.0
    numbers = with_table(1.0)
    assert difference(numbers, nb.copy_of(numbers)) == 0


# functional models of one's own classes, in the manner of KerasHub


@registered
class Backbone(keras.Model):
    """A functional model with a constructor of its own."""

    def __init__(self, width, depth=1, **options):
        """Build the graph: tokens in, a sequence of features out."""
        inputs = {
            name: keras.Input((None,), dtype="int32", name=name)
            for name in ("token_ids", "padding_mask")
        }
        x = layers.Embedding(10, width)(inputs["token_ids"])
        for _ in range(depth):
            x = layers.LayerNormalization()(x + Dense(width, "gelu")(x))
        mask = keras.ops.expand_dims(inputs["padding_mask"], -1)
        super().__init__(inputs, x * keras.ops.cast(mask, x.dtype), **options)
        self.width, self.depth = width, depth

    def get_config(self):
        """Return what it was made of."""
        return {"name": self.name, "width": self.width, "depth": self.depth}


@registered
class Classifier(keras.Model):
    """A functional model around another, with a constructor of its own."""

    def __init__(self, backbone, classes, **options):
        """Build the graph."""
        x = Dense(backbone.width, "tanh")(backbone(backbone.input)[:, 0])
        super().__init__(backbone.input, Dense(classes)(x), **options)
        self.backbone, self.classes = backbone, classes

    def get_config(self):
        """Return what it was made of."""
        backbone = keras.saving.serialize_keras_object(self.backbone)
        return {"name": self.name, "backbone": backbone, "classes": self.classes}

    @classmethod
    def from_config(cls, config):
        """Build the inner model first."""
        backbone = keras.saving.deserialize_keras_object(config["backbone"])
        return cls(**config | {"backbone": backbone})


@registered
class Trained(keras.Model):
    """A functional model that is only trained in a way of its own."""

    def __init__(self, *args, **options):
        """Hold a metric."""
        super().__init__(*args, **options)
        self.seen = keras.metrics.Mean("seen")


def trained():
    """Return one of these."""
    inputs = keras.Input((6,))
    return Trained(inputs, Dense(2)(Dense(5)(inputs)))


def of_features():
    """Return a model behind features that a FeatureSpace encodes."""
    kinds = {"color": "string_categorical", "size": "float_normalized"}
    space = keras.utils.FeatureSpace(kinds, output_mode="concat")
    colors, sizes = ["red", "blue", "red", "green"], [1.0, 2.0, 7.0, 3.0]
    rows = tf.data.Dataset.from_tensor_slices({"color": colors, "size": sizes})
    space.adapt(rows)
    x = space.get_encoded_features()
    return keras.Model(space.get_inputs(), Dense(2)(Dense(5, "tanh")(x)))


def test_features_are_encoded_by_the_copy_as_by_the_model(nb):
    model = of_features()
    color, size = (
        tf.constant([["red"], ["green"], ["?"]]),
        tf.constant([[1.0], [4], [9]]),
    )
    rows = {"color": color, "size": size}
    for copy in (nb.copy_of(model), nb.prune(model, "weight", 0), nb.shrink(model)):
        assert difference(model, copy, rows) <= 1e-6


@pytest.mark.parametrize(
    "build",
    [lambda: Backbone(6, 2), lambda: Classifier(Backbone(6, depth=2), 3), trained],
)
def test_functional_models_of_ones_own_classes_are_copied(nb, build):
    model = randomized(build())
    number = next(i for i, v in enumerate(model.weights) if v.name == "kernel")
    copy = nb.prune(model, "weight", 0.5, [model.weights[number].path])
    assert type(copy) is type(model)
    assert (copy.weights[number].numpy() == 0).mean() == 0.5
    assert difference(model, nb.copy_of(model)) == 0


# tables and states


def adapted(layer, words):
    """Return a layer, adapted."""
    layer.adapt(np.array(words))
    return layer


WORDS, LINES = [["x"], ["y"], ["x"]], ["a b c a", "b b d"]
LOOKUPS = {
    "words": lambda: adapted(layers.StringLookup(), WORDS),
    "words, masked": lambda: adapted(layers.StringLookup(mask_token=""), WORDS),
    "two unknown": lambda: adapted(layers.StringLookup(num_oov_indices=2), WORDS),
    "many hot": lambda: adapted(layers.StringLookup(output_mode="multi_hot"), WORDS),
    "listed": lambda: layers.StringLookup(vocabulary=["x", "y"]),
    "text": lambda: adapted(layers.TextVectorization(output_sequence_length=4), LINES),
    "rare words": lambda: adapted(
        layers.TextVectorization(output_mode="tf_idf"), LINES
    ),
    "numbers": lambda: adapted(layers.IntegerLookup(), [[5], [9]]),
    "bins": lambda: adapted(
        layers.Discretization(num_bins=4), [[0.1], [0.4], [0.7], [3.0]]
    ),
    "hashed": lambda: layers.Hashing(5),
}
ASKED = {
    "float32": np.float32([[0.2], [5], [9]]),
    "int64": np.array([[5], [9], [1]]),
    "string": tf.constant([["x"], ["b a b"], ["new"]]),
}
NUMERIC = {"numbers": "int64", "bins": "float32"}


def behind_lookup(case):
    """Return (a model behind a layer that looks things up, rows for it)."""
    dtype = NUMERIC.get(case, "string")
    inputs = keras.Input((1,), dtype=dtype)
    x = LOOKUPS[case]()(inputs)
    x = layers.Embedding(9, 3)(x) if x.dtype.startswith("int") else x
    hidden = Dense(6, "relu")(layers.Flatten()(x))
    return randomized(keras.Model(inputs, Dense(2)(hidden))), ASKED[dtype]


@pytest.mark.parametrize("case", LOOKUPS)
def test_tables_are_copied(nb, tmp_path, case):
    model, rows = behind_lookup(case)
    try:
        reloaded(model, tmp_path)
    except (AttributeError, ValueError):  # an older Keras
        with pytest.raises(ValueError, match="cannot copy the table"):
            nb.copy_of(model)
        return
    for copy in (nb.copy_of(model), nb.prune(model, "unit", 0.0), nb.shrink(model)):
        assert difference(model, copy, rows) <= 1e-6
    pruned = nb.prune(model, "unit", 0.5)
    assert difference(pruned, nb.shrink(pruned), rows) <= 1e-6


def test_a_table_without_entries_is_named(nb):
    lookup = layers.StringLookup(name="words")
    model = keras.Sequential([keras.Input((1,), dtype="string"), lookup])
    model.add(layers.Embedding(4, 3))
    model.add(Dense(2))
    with pytest.raises(ValueError, match="cannot copy the table of 'words'"):
        nb.copy_of(model)


def test_asking_a_model_changes_nothing_in_it(nb):
    """A stateful layer has seen nothing, and the next random numbers are the same."""
    inputs = keras.Input(batch_shape=(1, 4, 6))
    x = layers.LSTM(3, stateful=True)(layers.GaussianNoise(0.1, seed=3)(inputs))
    model = randomized(keras.Model(inputs, Dense(2)(x)))
    before = [variable.numpy().copy() for variable in model.variables]
    copy = nb.copy_of(model)
    for own in (model, copy):
        after = [variable.numpy() for variable in own.variables]
        assert all(map(np.array_equal, before, after))


@registered
class Sampling(layers.Layer):
    """A layer that adds noise from a generator that is not its own."""

    def call(self, inputs):
        """Add noise."""
        return inputs + np.random.default_rng().normal()


def test_a_model_whose_answers_are_random_is_copied(nb):
    model = network(Dense(5), Sampling(), Dense(2))
    assert same_weights(nb.copy_of(model), model.get_weights())


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_a_model_that_cannot_be_asked_is_copied(nb):
    """The random example holds a word that it does not know."""
    parts = layers.Embedding(1, 3), layers.Flatten(), Dense(4), Dense(2)
    model = network(*parts, shape=(5,), dtype="int32")
    assert np.isnan(nb.answer(model)).all()
    assert same_weights(nb.copy_of(model), model.get_weights())


# logits, kernels, and other things that have a name


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@pytest.mark.parametrize("sparsity", [0, 0.5])
def test_probabilities_are_not_taken_for_logits(nb, data, activation, sparsity):
    shape = {"shape": (28, 28), "dtype": "uint8"}
    ends = Dense(7, "relu"), Dense(10, activation)
    model = network(layers.Rescaling(1 / 255), layers.Flatten(), *ends, **shape)
    pruned = nb.prune(model, "weight", sparsity)
    with pytest.raises(ValueError, match=f"{model.name!r} .*probabilities"):
        nb.evaluate(pruned, data.x_test, data.y_test)


def test_logits_that_are_all_zero_are_logits(nb, data, model):
    model.set_weights([0 * w for w in model.get_weights()])
    scores = nb.evaluate(model, data.x_test, data.y_test)
    assert np.isclose(scores["loss"], np.log(10))


@pytest.mark.parametrize("rule", ["weight", "unit", "blocks", "together"])
def test_a_kernel_that_cannot_be_ranked_is_named(nb, rule):
    model = network(Dense(5), Dense(4, name="bad"), Dense(2))
    rules = {"blocks": nb.block_mask((2, 2)), "together": nb.Globally(nb.magnitudes)}
    model.get_layer("bad").kernel.assign(np.full((5, 4), np.nan))
    with pytest.raises(
        ValueError, match=r"finite.*nan" if rule == "together" else "bad"
    ):
        nb.prune(model, rules.get(rule, rule), 0.5)


def test_a_kernel_smaller_than_a_block_is_named(nb):
    model = network(Dense(8), Dense(3, name="small"), Dense(2))
    with pytest.raises(ValueError, match=r"small/kernel.*block \(4, 4\).*\(8, 3\)"):
        nb.prune(model, nb.block_mask((4, 4)), 0.5)


@pytest.mark.parametrize("part", [Dense(4), layers.Conv1D(4, 2)])
def test_sparse_rows_are_for_kernels_alone(nb, part):
    model = network(part, shape=(4, 6) if isinstance(part, layers.Conv1D) else (6,))
    with pytest.raises(ValueError, match=f"{model.name!r}.*without biases"):
        nb.csr_call(model, rows_of(model))


def test_sparse_rows_answer_like_the_network(nb, model):
    rows = rows_of(model)
    pruned = nb.prune(model, "weight", 0.5)
    assert np.allclose(nb.csr_call(pruned, rows)(), answers(pruned, rows)[0], atol=1e-5)
