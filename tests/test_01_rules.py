"""I want to know exactly which weights and units a rule takes from my network."""

import math
import re

import helpers
import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import difference, equal, expected_weights, lowest, randomized, rows_of
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from keras import layers
from keras.layers import Conv2D, Dense, Flatten

DTYPES = st.sampled_from(["float32", "float64", "float16", "int32", "int8"])
SPARSITIES = st.floats(0, 1) | st.sampled_from([i / 20 for i in range(21)])
SHAPES = array_shapes(min_dims=2, max_side=5)
TIED = arrays(DTYPES, SHAPES, elements=st.integers(-3, 3))
EIGHTHS = st.integers(-8000, 8000).map(lambda number: number / 8)  # exact squares
NUMBERS = TIED | arrays("float32", SHAPES, elements=EIGHTHS)
KINDS = {
    "weight": lambda nb: nb.weight_mask,
    "unit": lambda nb: nb.unit_mask,
    "blocks": lambda nb: nb.block_mask((2, 3)),
    "n:m": lambda nb: nb.n_m_mask(2, 4),
    "together": lambda nb: nb.Globally(nb.magnitudes),
    "units together": lambda nb: nb.Globally(nb.unit_norms),
}
ROWS = np.random.default_rng(0).normal(size=(4, 6)).astype("float32")
BAD = -1e-9, 1.2, 2, math.nan, -math.inf, "0.5", None
ENDLESS = math.nan, math.inf, -math.inf
WRONG = [(np.ones((4, 6)), bad, f"from 0 to 1, not {bad!r}") for bad in BAD]
WRONG += [(np.where(np.eye(4, 6, -3), x, 1), 0, f"finite, not {x}") for x in ENDLESS]
WRONG += [(np.ones(shape), 0.5, f"or more, not {shape}") for shape in ((), (3,))]
every_rule = pytest.mark.parametrize("kind", KINDS)
both_rules = pytest.mark.parametrize("rule", ["weight", "unit"])
registered = keras.saving.register_keras_serializable("rules")


def masks_by(rule, kernels, sparsity):
    """Return the masks that a rule, of whatever kind, gives to kernels."""
    if hasattr(rule, "masks"):
        return rule.masks(kernels, sparsity)
    return [rule(kernel, sparsity) for kernel in kernels]


def squares(kernel):
    """Return the squared L2 norm of each unit, exact for whole numbers."""
    return np.square(kernel.astype(float)).reshape(-1, kernel.shape[-1]).sum(axis=0)


# rules, by a slow reference


@given(NUMBERS, SPARSITIES)
def test_the_lowest_go_and_the_first_of_equals(nb, kernel, sparsity):
    sizes, norms = np.abs(1.0 * kernel), squares(kernel)
    ranked = {nb.kept_mask: kernel, nb.weight_mask: sizes, nb.unit_mask: norms}
    for rule, scores in ranked.items():
        mask = rule(kernel, sparsity)
        assert mask.dtype == bool and mask.shape == kernel.shape
        assert (mask == ~lowest(scores, sparsity)).all()


def test_lists_and_large_weights_are_ranked(nb):
    assert nb.weight_mask([[9, 2], [1, 3]], np.float32(0.5)).tolist() == [
        [1, 0],
        [0, 1],
    ]
    for dtype, large in (("int8", 90), ("float16", 300), ("float32", 1e30)):
        kernel = np.array([[2, 1.5, 1], [2, 1, 2]]) * large / 2
        assert nb.unit_mask(kernel.astype(dtype), 1 / 3)[0].tolist() == [1, 0, 1]
    least = np.int8([[-128, 5], [3, 100]])
    assert nb.weight_mask(least, 0.5).tolist() == [[1, 0], [0, 1]]


@given(TIED, st.data(), st.sampled_from(["avg", "max"]), SPARSITIES)
def test_blocks_go_as_by_hand(nb, kernel, draws, pooling, sparsity):
    flat = np.abs(1.0 * kernel).reshape(-1, kernel.shape[-1])
    down, across = (draws.draw(st.integers(1, size)) for size in flat.shape)
    rows = [flat[i : i + down] for i in range(0, len(flat), down)]
    blocks = [r[:, j : j + across] for r in rows for j in range(0, len(r.T), across)]
    scores = [block.max() if pooling == "max" else block.mean() for block in blocks]
    for block, gone in zip(blocks, lowest(scores, sparsity)):
        block[:] = not gone
    mask = nb.block_mask((down, across), pooling)(kernel, sparsity)
    assert mask.dtype == bool and np.array_equal(mask, flat.reshape(kernel.shape))


@given(TIED, st.integers(1, 6), st.integers(0, 5), st.floats(0.01, 1))
def test_the_n_largest_of_m_stay_as_by_hand(nb, kernel, n, more, sparsity):
    sizes = np.abs(1.0 * kernel).reshape(-1, kernel.shape[-1])
    expected = np.zeros(sizes.shape, bool)
    for start in range(0, len(sizes), n + more):
        for unit, column in enumerate(sizes[start : start + n + more].T):
            last = np.argsort(column, kind="stable")[-n:]  # the first of equals goes
            expected[start + last, unit] = True
    mask = nb.n_m_mask(n, n + more)(kernel, sparsity)
    assert mask.dtype == bool and np.array_equal(mask, expected.reshape(kernel.shape))


@given(st.lists(TIED, min_size=1, max_size=4), SPARSITIES, st.booleans())
def test_kernels_are_ranked_together_as_by_hand(nb, kernels, sparsity, by_units):
    scores = [squares(k) if by_units else np.abs(1.0 * k) for k in kernels]
    gone = lowest(np.concatenate(scores, axis=None), sparsity)
    rule = nb.Globally(nb.unit_norms if by_units else nb.magnitudes)
    for mask, own, kernel in zip(rule.masks(kernels, sparsity), scores, kernels):
        lost, gone = gone[: own.size].reshape(own.shape), gone[own.size :]
        assert mask.dtype == bool and mask.shape == kernel.shape
        assert (mask == ~lost).all()
    assert not gone.size


# what all rules have in common


@every_rule
@given(arrays("float32", (4, 6), elements=st.integers(-3, 3)), SPARSITIES, SPARSITIES)
def test_masks_are_nested_and_share_nothing(nb, kind, kernel, one, other):
    rule, before = KINDS[kind](nb), kernel.copy()
    kernel.flags.writeable = False
    asked = (0, *sorted((one, other)), 1)
    whole, less, more, last = (masks_by(rule, [kernel], s)[0] for s in asked)
    assert not (more & ~less).any(), "what went early is back at a higher sparsity"
    assert (kernel == before).all() and not np.shares_memory(less, kernel)
    assert whole.all() and last.mean() == (0.5 if kind == "n:m" else 0)
    assert less.flags.writeable


@every_rule
@pytest.mark.parametrize("kernel, sparsity, words", WRONG)
def test_what_cannot_be_ranked_is_named(nb, kind, kernel, sparsity, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        masks_by(KINDS[kind](nb), [kernel], sparsity)


def test_an_impossible_pattern_is_named(nb):
    for size, pooling in (((0, 1), "avg"), ((1, -1), "max"), ((2, 2), "median")):
        with pytest.raises(ValueError, match=re.escape(f"{size} and {pooling!r}")):
            nb.block_mask(size, pooling)
    for n, m in ((3, 2), (0, 4), (-1, 4), (0, 0)):
        with pytest.raises(ValueError, match=f"{n}:{m}"):
            nb.n_m_mask(n, m)


# prune


def network(*hidden, shape=(6,), **options):
    """Return a chain of layers with random weights and three outputs."""
    parts = [keras.Input(shape, **options), *hidden, Dense(3, name="last")]
    return randomized(keras.Sequential(parts, name="net"))


def dense():
    """Return a network of two hidden layers, `a` and `b`."""
    return network(Dense(7, "relu", name="a"), Dense(5, name="b"))


@both_rules
def test_every_kernel_but_the_last_is_ranked_by_itself(nb, rule):
    first = Conv2D(5, 3, activation="relu", name="a"), Conv2D(8, 2, name="b")
    model = network(*first, Flatten(), Dense(10, name="c"), shape=(6, 6, 2))
    scales = 1000, 1, 0.001, *[1] * 5
    model.set_weights([s * w for s, w in zip(scales, model.get_weights())])
    model.layers[1].trainable, before = False, model.get_weights()
    for sparsity in (0, 0.1, 0.5, 0.66, 0.97, 1):
        pruned = nb.prune(model, rule, sparsity)
        expected = expected_weights(model, "abc", (), rule, sparsity)
        assert equal(pruned.get_weights(), expected)
        zeros = np.concatenate([k.ravel() == 0 for k in pruned.get_weights()[:-2:2]])
        assert math.isclose(nb.measured_sparsity(pruned), zeros.mean())
        assert not any(np.signbit(w[w == 0]).any() for w in pruned.get_weights())
    pruned.set_weights([w + 1 for w in before])
    assert equal(model.get_weights(), before), "the model itself was changed"


@every_rule
def test_prune_takes_what_a_rule_says_at_once_or_in_steps(nb, kind):
    model, rule, expected = dense(), KINDS[kind](nb), []
    weights = model.get_weights()
    masks = masks_by(rule, weights[:-2:2], 0.5)
    for kernel, bias, mask in zip(weights[::2], weights[1::2], masks):
        expected += [kernel * mask, bias * mask.any(axis=0)]
    ways = [rule, kind, lambda *asked: rule(*asked)] if kind in nb.RULES else [rule]
    for way in ways:
        for start in (model, nb.prune(model, way, 0.2)):
            pruned = nb.prune(start, way, 0.5)
            assert equal(pruned.get_weights(), [*expected, *weights[4:]])


def test_only_the_rule_unit_ranks_tied_units_together(nb):
    inputs = keras.Input((6,))
    x = [Dense(8, name=name)(inputs) for name in "ab"]
    model = keras.Model(inputs, Dense(3)(layers.ReLU()(layers.Add()(x))))
    a, b = (squares(k) for k in randomized(model, 1).get_weights()[:4:2])
    together, *apart = (lowest(norms, 0.5) for norms in (a + b, a, b))
    both = apart[0] & apart[1]
    assert 0 < both.sum() < 4 and not equal([together] * 2, apart)
    cases = [(rule, [together] * 2, together) for rule in ("unit", nb.unit_mask)]
    cases.append((lambda *asked: nb.unit_mask(*asked), apart, both))
    for rule, gone, silent in cases:
        pruned = nb.prune(model, rule, 0.5)
        for name, own in zip("ab", gone):
            kernel, bias = pruned.get_layer(name).get_weights()
            assert np.array_equal(~kernel.any(axis=0), own)
            assert np.array_equal(bias == 0, silent)
    with pytest.raises(ValueError, match="no units"):  # those of `b` are not named
        nb.prune(model, "unit", 0.5, ["a/kernel"])


@both_rules
def test_only_kernels_that_are_named_are_pruned(nb, rule):
    model = network(Dense(8, "tanh", name="a"), Dense(6, "tanh", name="b"))
    paths = [f"net/{name}/kernel" for name in ("a", "b", "last")]
    for number, path in enumerate(paths[: 3 if rule == "weight" else 2]):
        pruned = nb.prune(model, rule, 0.5, [path])
        zeros = [np.mean(kernel == 0) for kernel in pruned.get_weights()[::2]]
        assert zeros == [0.5 * (i == number) for i in range(3)]
        assert nb.measured_sparsity(pruned, [path]) == 0.5
        assert nb.measured_sparsity(pruned, paths) < 0.5


@both_rules
def test_equal_paths_are_told_apart(nb, rule):
    x = inputs = keras.Input((6,))
    for size, units in ((6, 8), (8, 4)):
        end = keras.Input((size,))
        x = keras.Model(end, Dense(units)(Dense(units, "tanh", name="same")(end)))(x)
    model = randomized(keras.Model(inputs, Dense(3)(x)))
    first, *_, second = model.weights[:5]
    assert first.path == second.path and first.shape != second.shape
    pruned = nb.prune(model, rule, 0.75)
    for place in (0, 4):
        kernel, bias = pruned.get_weights()[place : place + 2]
        assert np.mean(kernel == 0) == 0.75
        assert ((bias != 0) == kernel.any(axis=0)).all()


# copies


def called(model, *rows):
    """Return a model that was called on rows, with random weights."""
    model(*(rows or (ROWS,)))
    return randomized(model)


class Scaled(keras.Model):
    """A model that takes an argument out of others, and does not tell it."""

    def __init__(self, **options):
        self.scale = options.pop("scale", 1.0)
        super().__init__(**options)
        self.first, self.last = Dense(4, name="first"), Dense(3)

    def call(self, inputs):
        return self.scale * self.last(self.first(inputs))


@registered
class Mute(Scaled):
    """One that takes it by its name, and does not tell it."""

    def __init__(self, scale=1.0, **options):
        super().__init__(scale=scale, **options)


@registered
class Telling(Scaled):
    """One that tells."""

    def get_config(self):
        return {"name": self.name, "scale": self.scale}


class Pair(Telling):
    """A model of two positional inputs."""

    def call(self, one, other):
        return self.first(one) + self.first(other)


class Trained(keras.Model):
    """A functional model that is only trained in a way of its own."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.seen = keras.metrics.Mean("seen")


@registered
class Around(keras.Model):
    """A functional model with a constructor of its own, around others of its kind."""

    def __init__(self, depth=0, **options):
        ends = {name: keras.Input((None,), dtype="int32", name=name) for name in "ab"}
        x = Around(depth - 1)(ends) if depth else layers.Embedding(10, 6)(ends["a"])
        x = layers.LayerNormalization()(x + Dense(6, "gelu")(x))
        x *= keras.ops.cast(ends["b"], x.dtype)[..., None]
        super().__init__(ends, x, **options)
        self.depth = depth

    def get_config(self):
        return {"name": self.name, "depth": self.depth}


@registered
class Doubled(keras.Model):
    """A functional model with a `call` of its own, which tells all that it takes."""

    def __init__(self, **options):
        super().__init__(inputs := keras.Input((6,)), Dense(5)(inputs), **options)

    def call(self, inputs, training=None, mask=None):
        return 2 * super().call(inputs)

    def get_config(self):
        return {"name": self.name}


@registered
class Times(layers.Layer):
    """A layer that forgets to tell its factor."""

    def __init__(self, factor=1.0, **options):
        super().__init__(**options)
        self.factor = factor

    def call(self, inputs):
        return self.factor * inputs

    def get_config(self):
        return super().get_config()


WRAPPED = layers.TimeDistributed(layers.Lambda(lambda x: 2 * x))
OWN = {
    "own call": lambda: called(Telling(name="own", scale=2.0)),
    "own training": lambda: Trained(x := keras.Input((6,)), Dense(2)(Dense(6)(x))),
    "own constructor": Around,
    "around another": lambda: Around(depth=2),
    "inside a network": lambda: network(Doubled(), Dense(4)),
    "forgets what is the default": lambda: network(Dense(4), Times()),
}
MISCOPIED = {
    "argument, get_config": lambda: called(Mute(2.0)),
    "argument inside, get_config": lambda: network(network(called(Mute(1.0)))),
    "default argument, get_config": lambda: called(Mute()),
    "option, get_config": lambda: called(Scaled(scale=2.0)),
    "forgetful layer, get_config": lambda: network(Dense(5), Times(3.0)),
    "forgetful, inside, get_config": lambda: network(network(Dense(5), Times(3.0))),
    "closed, get_config": lambda: called(helpers.Closed()),
    "two positional inputs": lambda: called(Pair(), ROWS, ROWS),
    "function": lambda: network(Dense(5), layers.Lambda(lambda x: 2 * x)),
    "wrapped function": lambda: network(WRAPPED, Dense(4), shape=(4, 6)),
}


@pytest.mark.parametrize("case", OWN)
def test_models_of_ones_own_classes_are_copied(nb, case):
    model = randomized(OWN[case]())
    model.compile("sgd", lambda truth, answer: answer)  # Keras cannot save this loss
    rows, before = ROWS if case == "own call" else rows_of(model), model.get_weights()
    assert difference(model, nb.copy_of(model), rows) == 0
    pruned = nb.prune(model, "weight", 0.5, [model.weights[0].path])
    assert type(pruned) is type(model) and (pruned.get_weights()[0] == 0).mean() == 0.5
    if case == "own training":
        assert nb.measured_sparsity(nb.prune(model, "unit", 0.5)) == 0.5
    assert nb.measured_sparsity(pruned, [pruned.weights[0].path]) == 0.5
    assert model.compiled and equal(model.get_weights(), before)


@pytest.mark.parametrize("case", MISCOPIED)
def test_what_would_be_copied_wrongly_is_refused(nb, case):
    model = MISCOPIED[case]()
    before, paths = model.get_weights(), [model.trainable_weights[0].path]
    words = ".*get_config" if "get_config" in case else ""
    with pytest.raises(ValueError, match=f"Keras cannot copy {model.name!r}{words}"):
        nb.prune(model, "weight", 0.5, paths)
        if case == "function" and difference(model, nb.copy_of(model)) == 0:
            pytest.skip("this Keras copies it as it should")
    assert equal(model.get_weights(), before)


class Noise(layers.Layer):
    """A layer that adds noise from a generator that is not its own."""

    def call(self, inputs):
        return inputs + np.random.default_rng().normal()


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_asking_a_model_changes_nothing_and_needs_no_certain_answer(nb):
    inputs = keras.Input(batch_shape=(1, 4, 6))
    x = layers.LSTM(3, stateful=True)(layers.GaussianNoise(0.1, seed=3)(inputs))
    stateful = randomized(keras.Model(inputs, Dense(2)(x)))
    embedded = layers.Embedding(1, 3), Flatten(), Dense(4)  # it knows a single word
    unknown = network(*embedded, shape=(5,), dtype="int32")
    for model in (stateful, unknown, network(Dense(5), Noise())):
        before = [variable.numpy().copy() for variable in model.variables]
        for own in (model, nb.copy_of(model)):
            assert equal([variable.numpy() for variable in own.variables], before)


@pytest.mark.parametrize("holder", ["layer", "model", "wrapper"])
def test_copies_normalize_by_the_statistics_of_the_original(nb, holder):
    own = layers.Normalization()
    own.adapt(np.random.default_rng(0).normal(3, 2, (50, 6)))
    own = keras.Sequential([keras.Input((4, 6)), own]) if holder == "model" else own
    own = layers.TimeDistributed(own) if holder == "wrapper" else own
    model = keras.Sequential([keras.Input((4, 6)), own, Dense(8, "relu"), Dense(3)])
    rows = rows_of(model, count=20) * 2 + 3
    for copy in (nb.copy_of(model), nb.prune(model, "weight", 0), nb.shrink(model)):
        assert difference(copy, model, rows) <= 1e-6
        assert np.allclose(copy.predict(rows, verbose=0), model(rows), atol=1e-5)


def adapted(layer, *seen):
    """Return a layer, adapted."""
    layer.adapt(np.array(seen))
    return layer


WORDS, LINES = (["x"], ["y"], ["x"]), (["a b c a"], ["b b d"])
LOOKUPS = {
    "words": lambda: adapted(layers.StringLookup(), *WORDS),
    "many hot": lambda: adapted(layers.StringLookup(output_mode="multi_hot"), *WORDS),
    "listed": lambda: layers.StringLookup(vocabulary=["x", "y"]),
    "text": lambda: adapted(layers.TextVectorization(output_sequence_length=4), *LINES),
    "rare": lambda: adapted(layers.TextVectorization(output_mode="tf_idf"), *LINES),
    "int64": lambda: adapted(layers.IntegerLookup(), [5], [9]),
    "float32": lambda: adapted(layers.Discretization(num_bins=3), [0.1], [0.4], [3.0]),
}


def behind_lookup(case):
    """Return a model behind a layer that looks things up, and rows for it."""
    dtype = case if case in ("int64", "float32") else "string"
    x = LOOKUPS[case]()(inputs := keras.Input((1,), dtype=dtype))
    x = layers.Embedding(9, 3)(x) if x.dtype.startswith("int") else x
    x = Dense(2)(Dense(6, "relu")(Flatten()(x)))
    rows = [["x"], ["b a b"], ["new"]] if dtype == "string" else [[5], [9], [1]]
    return randomized(keras.Model(inputs, x)), tf.constant(rows, dtype)


def encoded():
    """Return a model behind features that a FeatureSpace encodes, and rows for it."""
    kinds = {"color": "string_categorical", "size": "float_normalized"}
    space = keras.utils.FeatureSpace(kinds, output_mode="concat")
    seen = {"color": ["red", "blue", "red", "green"], "size": [1.0, 2.0, 7.0, 3.0]}
    space.adapt(tf.data.Dataset.from_tensor_slices(seen))
    x = Dense(6, "relu")(space.get_encoded_features())
    rows = {"color": tf.constant([["red"], ["?"]]), "size": tf.constant([[1.0], [9.0]])}
    return keras.Model(space.get_inputs(), Dense(2)(x)), rows


@pytest.mark.parametrize("case", [*LOOKUPS, "features"])
def test_tables_are_copied(nb, tmp_path, case):
    model, rows = behind_lookup(case) if case in LOOKUPS else encoded()
    try:
        pruned = nb.prune(model, "unit", 0.5)
    except ValueError as error:  # an older Keras cannot load it, either
        assert "cannot copy the table" in str(error)
        with pytest.raises((AttributeError, ValueError)):
            helpers.reloaded(model, tmp_path)
        return
    assert difference(model, nb.copy_of(model), rows) <= 1e-6
    assert difference(pruned, nb.shrink(pruned), rows) <= 1e-6


def test_a_table_without_entries_is_named(nb):
    lookup = layers.StringLookup(name="words"), layers.Embedding(4, 3), Dense(4)
    with pytest.raises(ValueError, match="cannot copy the table of 'words'"):
        nb.copy_of(network(*lookup, shape=(1,), dtype="string"))


# what is refused

REFUSED = [
    ("'net' has no kernel", lambda nb: (network(), "weight")),
    ("'net' has no kernel", lambda nb: (network(Flatten()), "weight")),
    ("'net' has no kernel", lambda nb: (network(Dense(1)), "weight")),
    ("'net' has no kernel", lambda nb: (network(), "weight", [])),
    ("no/kernel", lambda nb: (dense(), "weight", ["net/a/kernel", "no/kernel"])),
    ("no units", lambda nb: (network(Dense(7), layers.LayerNormalization()), "unit")),
    ("no units", lambda nb: (dense(), "unit", ["net/last/kernel"])),
    ("no units", lambda nb: (OWN["own call"](), "unit", ["own/first/kernel"])),
    ("'own' has no Input, or has a `call`", lambda nb: (OWN["own call"](), "weight")),
    ("not 'weights'", lambda nb: (dense(), "weights")),
    ("or a function, not None", lambda nb: (dense(), None)),
    ("'a': merge LoRA", lambda nb: (network(Dense(5, name="a", lora_rank=2)), "unit")),
    ("the kernel's shape", lambda nb: (dense(), lambda kernel, _: kernel[0] > 0)),
    ("a/kernel': block (7, 1) exc", lambda nb: (dense(), nb.block_mask((7, 1)))),
    ("b/kernel': block (1, 6) exc", lambda nb: (dense(), nb.block_mask((1, 6)))),
]


@pytest.mark.parametrize("words, asked", REFUSED)
def test_what_cannot_be_pruned_is_named(nb, words, asked):
    model, rule, *paths = asked(nb)
    with pytest.raises(ValueError, match=re.escape(words)):
        nb.prune(model, rule, 0.5, *paths)
    if words == "'net' has no kernel":
        with pytest.raises(ValueError, match=words):
            nb.measured_sparsity(model, *paths)


@every_rule
def test_a_kernel_that_is_not_finite_is_named(nb, kind):
    model = dense()
    model.get_layer("b").kernel.assign(np.full((7, 5), np.nan))
    with pytest.raises(ValueError, match=r"net/b/kernel'.*finite.*nan"):
        nb.prune(model, KINDS[kind](nb), 0.5)


@pytest.mark.parametrize("last", ["softmax", "sigmoid"])
def test_only_logits_are_measured(nb, last):
    model, labels = dense(), np.array([0, 1, 2, 0])
    model.set_weights([0 * w for w in model.get_weights()])
    assert np.isclose(nb.evaluate(model, ROWS, labels)["loss"], np.log(3))
    model.layers[-1].activation = keras.activations.get(last)
    with pytest.raises(ValueError, match="'net' puts out probabilities"):
        nb.evaluate(nb.prune(randomized(model), "weight", 0.5), ROWS, labels)
