"""I want to know exactly which weights and units a rule takes from my network."""

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
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from keras import layers
from keras.layers import Conv2D, Dense, Flatten

MASKS = ("weight_mask", "unit_mask")
RULES = ("weight", "unit")
DTYPES = ("float32", "float64", "float16", "int32", "int8")
sparsities = st.floats(0, 1) | st.sampled_from([i / 20 for i in range(21)])
rule_names = st.sampled_from(MASKS)


@st.composite
def tied_arrays(draw, least_axes=2):
    """Draw an array of few axes, small sides and many ties."""
    shape = draw(array_shapes(min_dims=least_axes, max_dims=4, max_side=5))
    dtype = draw(st.sampled_from(DTYPES))
    return draw(arrays(dtype, shape, elements=st.integers(-3, 3)))


def lowest_places(scores, sparsity):
    """Return the positions of the lowest scores, as a set."""
    return removed(~lowest(scores, sparsity))


def removed(mask):
    """Return the positions that a mask does not keep."""
    return {i for i, kept in enumerate(mask.ravel().tolist()) if not kept}


def squared_norms(kernel):
    """Return the exact squared L2 norm of each unit of whole numbers."""
    columns = kernel.reshape(-1, kernel.shape[-1]).T.tolist()
    return [sum(int(weight) ** 2 for weight in column) for column in columns]


@given(tied_arrays(least_axes=1), sparsities)
def test_kept_mask_removes_the_lowest_scores(nb, scores, sparsity):
    mask = nb.kept_mask(scores, sparsity)
    assert mask.shape == scores.shape and mask.dtype == bool
    assert removed(mask) == lowest_places(scores.ravel().tolist(), sparsity)


@given(tied_arrays(), sparsities)
def test_weight_mask_removes_the_smallest_weights(nb, kernel, sparsity):
    mask = nb.weight_mask(kernel, sparsity)
    scores = [abs(weight) for weight in kernel.ravel().tolist()]
    assert mask.shape == kernel.shape and mask.dtype == bool
    assert removed(mask) == lowest_places(scores, sparsity)


@given(
    arrays("float32", (5, 7), elements=st.floats(-1e9, 1e9, width=32)),
    sparsities,
)
def test_weight_mask_ranks_any_number(nb, kernel, sparsity):
    scores = [abs(weight) for weight in kernel.ravel().tolist()]
    expected = lowest_places(scores, sparsity)
    assert removed(nb.weight_mask(kernel, sparsity)) == expected


@given(tied_arrays(), sparsities)
def test_unit_mask_removes_the_smallest_units(nb, kernel, sparsity):
    mask = nb.unit_mask(kernel, sparsity)
    expected = lowest_places(squared_norms(kernel), sparsity)
    assert mask.shape == kernel.shape and mask.dtype == bool
    for unit in range(kernel.shape[-1]):
        assert (mask[..., unit] == (unit not in expected)).all()


@given(
    arrays("float32", (3, 3, 2, 6), elements=st.floats(-1e3, 1e3, width=32)),
    sparsities,
)
def test_unit_mask_ranks_any_number(nb, kernel, sparsity):
    keep = nb.unit_mask(kernel, sparsity)[0, 0, 0]
    columns = kernel.reshape(-1, 6).T.tolist()
    norms = np.array([math.hypot(*column) for column in columns])
    assert len(keep) - keep.sum() == round(sparsity * 6)
    least_kept = norms[keep].min(initial=np.inf)
    assert norms[~keep].max(initial=0) <= least_kept * (1 + 1e-9)


@given(tied_arrays(), st.integers(0, 31))
def test_a_unit_is_kept_with_all_its_weights(nb, kernel, number):
    keep = np.array([number >> i & 1 for i in range(kernel.shape[-1])], bool)
    mask = nb.whole_units(keep, kernel)
    assert mask.shape == kernel.shape and mask.dtype == bool
    assert all((row == keep).all() for row in mask.reshape(-1, len(keep)))
    assert mask.flags.writeable and not np.shares_memory(mask, keep)


@given(rule_names, tied_arrays(), sparsities, sparsities)
def test_masks_are_nested(nb, name, kernel, one, other):
    rule = getattr(nb, name)
    less, more = sorted((one, other))
    assert removed(rule(kernel, less)) <= removed(rule(kernel, more))


@given(rule_names, tied_arrays())
def test_the_ends_keep_all_and_nothing(nb, name, kernel):
    rule = getattr(nb, name)
    assert rule(kernel, 0).all() and not rule(kernel, 1).any()


@given(rule_names, tied_arrays(), sparsities)
def test_nothing_is_mutated_or_shared(nb, name, kernel, sparsity):
    before = kernel.copy()
    kernel.flags.writeable = False
    mask = getattr(nb, name)(kernel, sparsity)
    assert (kernel == before).all()
    assert mask.flags.writeable and not np.shares_memory(mask, kernel)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8, 10])
def test_halves_are_rounded_as_python_does(nb, count):
    for removals in range(2 * count + 1):
        sparsity = removals / 2 / count
        mask = nb.kept_mask(np.arange(count), sparsity)
        assert count - mask.sum() == round(sparsity * count)


def test_of_equal_scores_the_first_goes(nb):
    kept = nb.kept_mask(np.array([2, 1, 1, 1, 3]), 0.4)
    assert kept.tolist() == [True, False, False, True, True]
    units = nb.unit_mask(np.ones((2, 3, 4)), 0.5)
    assert units[0, 0].tolist() == [False, False, True, True]


def test_one_large_weight_saves_its_unit(nb):
    kernel = np.array([[9.0, 5.0], [0.0, 5.0]])
    assert nb.unit_mask(kernel, 0.5).tolist() == [[True, False]] * 2
    assert not nb.weight_mask(kernel, 0.5)[1, 0]


@pytest.mark.parametrize(
    ("dtype", "large"), [("int8", 90), ("float16", 300), ("float32", 1e30)]
)
def test_squares_of_large_weights_do_not_overflow(nb, dtype, large):
    kernel = np.array([[2, 1.5, 1], [2, 1, 2]], dtype=float) * large / 2
    mask = nb.unit_mask(kernel.astype(dtype), 1 / 3)
    assert mask.tolist() == [[True, False, True]] * 2


@pytest.mark.parametrize("number", [np.float32(0.5), np.float64(0.5), 0.5])
def test_any_real_number_is_a_sparsity(nb, number):
    assert nb.weight_mask(np.eye(2), number).sum() == 2


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize(
    "bad", [-0.1, 1.2, -1e-9, 2, math.nan, math.inf, -math.inf, "0.5", None]
)
def test_a_bad_sparsity_is_named(nb, name, bad):
    with pytest.raises(ValueError, match="sparsity") as error:
        getattr(nb, name)(np.eye(3), bad)
    assert repr(bad) in str(error.value)


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("sparsity", [0, 0.5, 1])
def test_a_kernel_that_is_not_finite_is_refused(nb, name, bad, sparsity):
    kernel = np.ones((3, 4), "float32")
    kernel[1, 2] = bad
    with pytest.raises(ValueError, match="nan" if bad != bad else "inf"):
        getattr(nb, name)(kernel, sparsity)


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("shape", [(), (3,)])
def test_a_kernel_of_too_few_axes_is_refused(nb, name, shape):
    with pytest.raises(ValueError, match="axes") as error:
        getattr(nb, name)(np.ones(shape), 0.5)
    assert str(shape) in str(error.value)


def test_the_least_integer_is_the_largest_weight(nb):
    kernel = np.array([[-128, 5], [3, 100]], "int8")
    mask = nb.weight_mask(kernel, 0.5)
    assert mask.tolist() == [[True, False], [False, True]]


# prune


both_rules = pytest.mark.parametrize("rule", RULES)


def network(*hidden, inputs=(6,), seed=0):
    """Return a chain of layers with random weights and three outputs."""
    chain = [keras.Input(inputs), *hidden, Dense(3, name="last")]
    return randomized(keras.Sequential(chain), seed)


def convolutional():
    """Return a network of two convolutions and two Dense layers."""
    hidden = Conv2D(5, 3, activation="relu"), Conv2D(8, 2), Flatten(), Dense(10, "relu")
    return network(*hidden, inputs=(6, 6, 2))


def kernels_of(model):
    """Return the kernels of a model as arrays, the output's last."""
    return [w for w in model.get_weights() if w.ndim > 1]


@both_rules
@pytest.mark.parametrize("sparsity", [0, 0.1, 0.25, 0.5, 0.66, 0.97, 1])
@pytest.mark.parametrize("build", [lambda: network(Dense(12), Dense(9)), convolutional])
def test_every_kernel_but_the_last_is_ranked_by_itself(nb, rule, sparsity, build):
    model, before = build(), None
    scales = [1000, 1, 0.001, 1, 1, 1, 1, 1]
    model.set_weights([s * w for s, w in zip(scales, model.get_weights())])
    before = model.get_weights()
    pruned = nb.prune(model, rule, sparsity)
    *pairs, last = zip(before[::2], before[1::2])
    expected, zeros, total = [], 0, 0
    for kernel, bias in pairs:
        if rule == "weight":
            mask = ~lowest(np.abs(kernel), sparsity)
            zeros += round(sparsity * kernel.size)
        else:
            norms = np.square(kernel.astype(float)).reshape(-1, len(bias)).sum(axis=0)
            mask = ~lowest(norms, sparsity)
            zeros += round(sparsity * len(bias)) * kernel.size // len(bias)
        now, total = kernel * mask, total + kernel.size
        expected += [now, bias * now.reshape(-1, len(bias)).any(axis=0)]
    assert same_weights(pruned, [*expected, *last])
    assert math.isclose(nb.measured_sparsity(pruned), zeros / total)
    assert not any(np.signbit(w[w == 0]).any() for w in pruned.get_weights())
    assert same_weights(model, before)
    pruned.set_weights([w + 1 for w in pruned.get_weights()])
    assert same_weights(model, before)


@both_rules
def test_a_pruned_model_is_pruned_further(nb, rule):
    model = convolutional()
    gradually = model
    for sparsity in (0.25, 0.5, 0.75):
        gradually = nb.prune(gradually, rule, sparsity)
    assert same_weights(gradually, nb.prune(model, rule, 0.75).get_weights())


@pytest.mark.parametrize("name", MASKS)
def test_a_rule_has_a_name_or_is_a_function(nb, name):
    model, rule = convolutional(), name.removesuffix("_mask")
    expected = nb.prune(model, rule, 0.6).get_weights()
    mask = getattr(nb, name)
    assert same_weights(nb.prune(model, mask, 0.6), expected)
    assert same_weights(nb.prune(model, lambda *asked: mask(*asked), 0.6), expected)


class Together:
    """A rule that sees all kernels."""

    def masks(self, kernels, sparsity):
        """Return masks that keep what is above the mean of all kernels."""
        mean = np.concatenate(kernels, axis=None).mean() + sparsity
        return [kernel > mean for kernel in kernels]


def test_a_rule_may_see_one_kernel_or_all(nb):
    model = network(Dense(7), Dense(5))
    asked = []

    def rule(kernel, sparsity):
        asked.append((kernel.shape, sparsity))
        return kernel > 0

    found = nb.masks_of(nb.prunable(model), rule, 0.3)
    assert asked == [((6, 7), 0.3), ((7, 5), 0.3)]
    first, second, _ = kernels_of(model)
    names = ["kernel"] * 2 + ["bias"] * 3
    assert [variable.name for variable, _ in found] == names
    assert (found[0][1] == (first > 0)).all() and (found[1][1] == (second > 0)).all()
    mean = np.concatenate([first, second], axis=None).mean() + 0.01
    pruned = nb.prune(model, Together(), 0.01)
    for before, now in zip((first, second), kernels_of(pruned)):
        assert (now == np.where(before > mean, before, 0)).all()


def test_a_rule_that_is_none_is_named(nb):
    model = network(Dense(7), Dense(5))
    with pytest.raises(ValueError, match="'weights'"):
        nb.prune(model, "weights", 0.5)
    for bad in (lambda kernel, _: kernel[0] > 0, lambda kernel, _: kernel.T > 0):
        with pytest.raises(ValueError, match="shape"):
            nb.prune(model, bad, 0.5)


def test_only_the_rule_unit_ranks_tied_units_together(nb):
    inputs = keras.Input((6,))
    x, other = (Dense(8, name=name)(inputs) for name in "ab")
    model = keras.Model(inputs, Dense(3)(layers.ReLU()(layers.Add()([x, other]))))
    a, b = (randomized(model, 1).get_layer(name) for name in "ab")
    norms = [np.square(x.kernel.numpy()).sum(axis=0) for x in (a, b)]
    together = lowest_places((norms[0] + norms[1]).tolist(), 0.5)
    apart = [lowest_places(n.tolist(), 0.5) for n in norms]
    assert apart[0] != apart[1] and together not in apart
    for rule in ("unit", nb.unit_mask):
        pruned = nb.prune(model, rule, 0.5)
        for name in "ab":
            kernel, bias = pruned.get_layer(name).get_weights()
            assert {*np.flatnonzero(~kernel.any(axis=0))} == together
            assert {*np.flatnonzero(bias == 0)} == together
    pruned = nb.prune(model, lambda *asked: nb.unit_mask(*asked), 0.5)
    assert 0 < len(apart[0] & apart[1]) < 4
    for name, own in zip("ab", apart):
        kernel, bias = pruned.get_layer(name).get_weights()
        assert {*np.flatnonzero(~kernel.any(axis=0))} == own
        assert {*np.flatnonzero(bias == 0)} == apart[0] & apart[1]


@pytest.mark.parametrize("hidden", [[], [Flatten], [lambda: Dense(1, "relu")]])
def test_a_model_with_nothing_to_prune_is_named(nb, hidden):
    parts = [keras.Input((6,)), *(layer() for layer in hidden), Dense(3)]
    model = keras.Sequential(parts, name="tiny")
    for ask in (nb.prunable_kernels, nb.measured_sparsity):
        with pytest.raises(ValueError, match="tiny"):
            ask(model)
    with pytest.raises(ValueError, match="tiny"):
        nb.prune(model, "weight", 0.5)


def test_units_that_all_have_to_stay_are_said_to(nb):
    model = network(Dense(7), layers.LayerNormalization(), inputs=(6,))
    with pytest.raises(ValueError, match="no units that can be deleted"):
        nb.prune(model, "unit", 0.5)
    assert nb.measured_sparsity(nb.prune(model, "weight", 0.5)) == 0.5


# which kernels


@pytest.mark.parametrize(("number", "left"), [(0, 4), (1, 3), (2, 3)])
@both_rules
def test_only_kernels_that_are_named_are_pruned(nb, rule, number, left):
    model = network(Dense(8, "tanh"), Dense(6, "tanh"))
    paths = [v.path for v in model.weights if v.name == "kernel"]
    if (rule, number) == ("unit", 2):  # what the model puts out stays
        with pytest.raises(ValueError, match="no units"):
            nb.prune(model, rule, 0.5, paths[2:])
        return
    pruned = nb.prune(model, rule, 0.5, [paths[number]])
    zeros = [np.mean(kernel == 0) for kernel in kernels_of(pruned)]
    assert zeros == [0.5 * (i == number) for i in range(3)]
    assert nb.measured_sparsity(pruned, [paths[number]]) == 0.5
    assert nb.measured_sparsity(model, paths) == 0
    if rule == "unit":
        assert kernels_of(pruned)[number].any(axis=0).sum() == left


@pytest.mark.parametrize("bad", [["no/kernel"], [], ["last/kernel", "no/kernel"]])
def test_a_path_that_is_not_there_is_named(nb, bad):
    model = keras.Model(inputs := keras.Input((6,)), Dense(3, name="last")(inputs))
    with pytest.raises(ValueError, match="no/kernel" if bad else "no kernel"):
        nb.prune(model, "weight", 0.5, bad)


@both_rules
def test_equal_paths_are_told_apart(nb, rule):
    def part(inputs, units):
        ends = keras.Input((inputs,))
        hidden = Dense(units, "tanh", name="same")(ends)
        return keras.Model(ends, Dense(units, name="end")(hidden))

    inputs = keras.Input((6,))
    model = keras.Model(inputs, Dense(3)(part(8, 4)(part(6, 8)(inputs))))
    weights = randomized(model).weights
    assert weights[0].path == weights[4].path and weights[0].shape != weights[4].shape
    pruned = nb.prune(model, rule, 0.75)
    for place in (0, 4):
        kernel, bias = pruned.get_weights()[place : place + 2]
        assert np.mean(kernel == 0) == 0.75
        assert ((bias != 0) == kernel.any(axis=0)).all()


def test_frozen_layers_are_pruned_like_others(nb):
    model = network(Dense(5), Dense(4))
    for layer in model.layers:
        layer.trainable = False
        shapes = [tuple(kernel.shape) for kernel in nb.prunable_kernels(model)]
        assert shapes == [(6, 5), (5, 4)]
        layer.trainable = True


def test_low_rank_weights_must_be_merged(nb):
    model = network(Dense(5), Dense(4))
    model.layers[0].enable_lora(2)
    with pytest.raises(ValueError, match=r"dense.*merge LoRA"):
        nb.prune(model, "weight", 0.5)


# copies


@keras.saving.register_keras_serializable("tests")
class Branching(keras.Model):
    """A model with a `call` of its own, which Keras can build again."""

    def __init__(self, units=7, **options):
        """Make three layers."""
        super().__init__(**options)
        self.units = units
        self.first, self.second, self.third = Dense(8), Dense(units), Dense(3)

    def call(self, inputs):
        """Return logits."""
        hidden = self.first(inputs)
        return self.third(self.second(hidden) + hidden[:, : self.units])

    def get_config(self):
        """Return what it was made of."""
        return {"units": self.units, "name": self.name}


def test_a_model_without_a_graph_loses_weights_that_are_named(nb, tmp_path):
    model = Branching(5)
    model(np.zeros((1, 6), "float32"))
    before = randomized(model).get_weights()
    paths = [v.path for v in model.weights if v.name == "kernel"][:2]
    pruned = nb.prune(model, "weight", 0.5, paths)
    assert [np.mean(k == 0) for k in kernels_of(pruned)] == [0.5, 0.5, 0]
    own = [v.path for v in pruned.weights if v.name == "kernel"][:2]
    assert nb.measured_sparsity(pruned, own) == 0.5
    assert same_weights(model, before)
    rows = np.ones((2, 6), "float32")
    again = reloaded(pruned, tmp_path)
    assert (again(rows).numpy() == pruned(rows).numpy()).all()
    with pytest.raises(ValueError, match="no units"):
        nb.prune(model, "unit", 0.5, paths)
    with pytest.raises(ValueError, match=rf"{model.name!r}.*`call` of its own"):
        nb.prune(model, "weight", 0.5)


class Sized(Closed):
    """One that must be told its size, and does not say which it has."""

    def __init__(self, units=3):
        """Hold layers of a size."""
        super().__init__()
        self.first = Dense(units)


class Doubled(keras.Sequential):
    """A chain that answers twice of what its layers do."""

    def call(self, inputs, training=None, mask=None):
        """Return twice the answer."""
        return 2 * super().call(inputs)


@pytest.mark.parametrize("build", [Closed, lambda: Sized(4)])
def test_a_class_that_keras_cannot_copy_is_named(nb, build):
    model = build()
    model(np.zeros((1, 2), "float32"))
    paths = [model.weights[0].path]
    with pytest.raises(ValueError, match=r"'own'.*get_config"):
        nb.prune(model, "weight", 0.5, paths)


def test_a_chain_with_a_call_of_its_own_is_copied_with_it(nb):
    model = Doubled([Dense(4), Dense(3)])
    rows = np.ones((1, 2), "float32")
    expected = model(rows).numpy()
    copy = nb.prune(model, "weight", 0, [model.weights[0].path])
    assert (copy(rows).numpy() == expected).all()


def test_functions_without_a_name_are_refused_in_plain_words(nb):
    model = network(Dense(5), layers.Lambda(lambda x: 2 * x, name="own"))
    with pytest.raises(ValueError, match="Keras cannot copy"):
        nb.prune(model, "weight", 0.5)


@keras.saving.register_keras_serializable("tests")
class Functional(keras.Model):
    """A functional model with a constructor of its own."""

    def __init__(self, units=5, **options):
        """Build the graph."""
        inputs = keras.Input((6,))
        hidden = Dense(units, "relu")(inputs)
        super().__init__(inputs, Dense(2)(hidden), **options)
        self.units = units

    def get_config(self):
        """Return what it was made of."""
        return {"units": self.units, "name": self.name}


@both_rules
def test_a_functional_model_of_ones_own_class_is_copied(nb, rule):
    model = randomized(Functional(8))
    pruned = nb.prune(model, rule, 0.5)
    assert type(pruned) is Functional and nb.measured_sparsity(pruned) == 0.5
    assert difference(model, nb.prune(model, rule, 0)) == 0


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
    parts = HOLDERS[holder](own), Dense(8, "relu"), Dense(3)
    return keras.Sequential([keras.Input((4, 6)), *parts])


@pytest.mark.parametrize("holder", HOLDERS)
def test_copies_normalize_by_the_statistics_of_the_original(nb, holder):
    model, other = normalized(holder, 0), normalized(holder, 1)
    rows = rows_of(model, count=20) * 2 + 3
    (expected,) = answers(model, rows)
    assert difference(other, model, rows) > 0.01
    for copy in (nb.copy_of(model), nb.prune(model, "weight", 0), nb.shrink(model)):
        assert difference(copy, model, rows) <= 1e-6
        copy.compile("adam", "mse", jit_compile=False)
        assert np.allclose(copy.predict(rows, verbose=0), expected, atol=1e-5)
        assert copy.evaluate(rows, expected, verbose=0) < 1e-9
    for own, variable in zip(other.variables, model.variables):
        own.assign(variable)
    assert difference(other, model, rows) > 0.01
    nb.carry_over(model, other)
    assert difference(other, model, rows) == 0


def test_a_copy_has_weights_of_its_own(nb):
    model = network(Dense(7, "tanh"), Dense(5))
    copy, before = nb.copy_of(model), answers(model)[0]
    assert (answers(copy)[0] == before).all()
    copy.set_weights([0 * w for w in copy.get_weights()])
    assert (answers(model)[0] == before).all() and not answers(copy)[0].any()
