"""Pruning while a model is trained, and rules between weights and units."""

import itertools
import json
import math
import operator
import re

import keras
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import tensorflow as tf
from conftest import run_cell, run_on_two_devices
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.colors import same_color

STEPS = 40
GOLDEN = {10: 0.2, 15: 0.546875, 20: 0.725, 25: 0.790625, 30: 0.8}
SIZES = (8 * 16, 16 * 12)
random = np.random.default_rng(0)
ROWS = random.normal(size=(32, 8)).astype("float32")
LABELS = np.digitize(ROWS @ random.normal(size=8), (-1, 1))
OPTIMIZERS = {
    "momentum": lambda: keras.optimizers.SGD(0.05, momentum=0.9),
    "Adam": lambda: keras.optimizers.Adam(0.01),
    "AdamW": lambda: keras.optimizers.AdamW(0.01, weight_decay=0.1),
    "average": lambda: keras.optimizers.Adam(0.01, use_ema=True),
}
UNUSUAL = {
    "overwriting": lambda: keras.optimizers.SGD(
        0.05, use_ema=True, ema_overwrite_frequency=3
    ),
    "accumulating": lambda: keras.optimizers.Adam(0.01, gradient_accumulation_steps=3),
    "clipping": lambda: keras.optimizers.SGD(
        0.1, momentum=0.9, nesterov=True, global_clipnorm=0.1
    ),
}
SPECIAL = ["Optimizer", "LossScaleOptimizer", "MultiOptimizer", "OptimizerMap"]
SPECIAL += ["Adafactor", "ScheduleFreeAdamW"]  # make NaN and 0 of dead or all units
KERAS = {
    name: lambda make=make: make(0.01)
    for name, make in vars(keras.optimizers).items()
    if isinstance(make, type) and name not in SPECIAL
}
SETTINGS = {
    "plain": {},
    "XLA": {"jit_compile": True},
    "eager": {"run_eagerly": True},
    "five at once": {"steps_per_execution": 5},
    "four at once": {"steps_per_execution": 4},
    "XLA, five at once": {"jit_compile": True, "steps_per_execution": 5},
}


class Watch(keras.callbacks.Callback):
    """Note what `measure` says of the model after each step."""

    def __init__(self, measure):
        """Start with nothing noted."""
        super().__init__()
        self.measure, self.noted = measure, []

    def on_train_batch_end(self, batch, logs=None):
        """Note the measure."""
        self.noted.append(self.measure(self.model))


class Interrupt(keras.callbacks.Callback):
    """Interrupt the training, as a user would, after so many steps."""

    def __init__(self, steps=5):
        """Wait for so many steps."""
        super().__init__()
        self.steps = steps

    def on_train_begin(self, logs=None):
        """Raise at once if no step is waited for."""
        self.on_train_batch_end(-1)

    def on_train_batch_end(self, batch, logs=None):
        """Raise what a user's Ctrl-C raises."""
        if batch >= self.steps - 1:
            raise KeyboardInterrupt


class Stop(keras.callbacks.Callback):
    """Let the training stop early, after so many steps."""

    def __init__(self, steps):
        """Wait for so many steps."""
        super().__init__()
        self.left = steps

    def on_train_batch_end(self, batch, logs=None):
        """Count down."""
        self.left -= 1
        self.model.stop_training = self.left <= 0


class Shifted(keras.constraints.Constraint):
    """A user's constraint that leaves nothing at zero."""

    def __call__(self, value):
        """Add one."""
        return value + 1


def network(seed=0, **options):
    """Return an untrained network of three Dense layers, biases not zero."""
    keras.utils.set_random_seed(seed)
    options = {"activation": "relu", "bias_initializer": "ones", **options}
    return keras.Sequential(
        [
            keras.Input((8,)),
            keras.layers.Dense(16, **options),
            keras.layers.Dense(12, **options),
            keras.layers.Dense(3, bias_initializer="ones"),
        ]
    )


def compiled(model, optimizer="Adam", **options):
    """Return the model itself, compiled."""
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    make = {**KERAS, **OPTIMIZERS, **UNUSUAL}[optimizer]
    model.compile(make(), loss, **{"jit_compile": False, **options})
    return model


def batches(steps):
    """Return a data set of so many equal batches."""
    return tf.data.Dataset.from_tensors((ROWS, LABELS)).repeat(steps)


def fit(model, steps, *callbacks, **options):
    """Train a model by `steps` an epoch and return the history."""
    options = {"callbacks": [*callbacks], "verbose": 0, **options}
    options["shuffle"] = False
    return model.fit(batches(steps), **options).history


def zeros(model):
    """Return where the weights of a model are zero, in one flat array."""
    return np.concatenate([w.ravel() == 0 for w in model.get_weights()])


def kernel_zeros(model):
    """Return the number of zeros in each kernel but the output's."""
    kernels = [w for w in model.get_weights() if w.ndim > 1]
    return [int((kernel == 0).sum()) for kernel in kernels[:-1]]


def rounded(sparsity):
    """Return the number of zeros in each kernel at a sparsity."""
    return [round(sparsity * size) for size in SIZES]


def planned(steps, frequency=5):
    """Return the zeros in each kernel after each of the steps that are seen."""
    counts, pruned = [], 0
    for before, step in itertools.pairwise((0, *steps)):
        passed = range(before + 1, step + 1)
        if any(s % frequency == 0 or s == 30 for s in passed):
            pruned = step
        left = 1 - (min(max(pruned, 10), 30) - 10) / 20
        counts.append(rounded(0.8 - 0.6 * left**3))
    return counts


EACH_STEP = planned(range(1, STEPS + 1))


def constraints(model):
    """Return the constraints of a model's weights."""
    return [variable.constraint for variable in model.weights]


def traces(model):
    """Return a list that grows whenever the training step is traced."""
    step, traced = model.train_step, []

    def noted_step(data):
        traced.append(len(traced))
        return step(data)

    model.train_step = noted_step
    return traced


def twin(model):
    """Return a compiled model with a model's weights and optimizer state."""
    other = compiled(network(activation="tanh"))
    other.optimizer.build(other.trainable_variables)
    for part in ("variables", "optimizer.variables"):
        pairs = map(operator.attrgetter(part), (other, model))
        for own, variable in zip(*pairs, strict=True):
            own.assign(variable)
    return other


def prune_here(nb, model, sparsity, kernels=None):
    """Set to zero, in the model itself, a share of the kernels of these paths."""
    for variable, mask in nb.masks_of(nb.prunable(model, kernels), "weight", sparsity):
        variable.assign(np.where(mask, variable.numpy(), 0))


def every(model):
    """Return the paths of all kernels of a model, the output's included."""
    return [weight.path for weight in model.weights if weight.ndim > 1]


def keep_zeros(nb, model, steps, *callbacks, **options):
    """Train a model with its zeros kept, and assert that they were."""
    expected, watch = zeros(model), Watch(zeros)
    fit(model, steps, nb.KeepZeros(), *callbacks, watch, **options)
    assert watch.noted and (np.array(watch.noted) == expected).all()
    assert (zeros(model) == expected).all()
    return watch.noted


def assert_ordinary(model):
    """Assert that nothing is left of a training with masks."""
    assert constraints(model) == [None] * 6
    assert model.train_function is None


def same(weights, others):
    """Return whether two lists of arrays are equal."""
    return all(map(np.array_equal, weights, others))


@pytest.fixture
def golden(nb):
    """Return the schedule of GOLDEN."""
    return nb.polynomial_sparsity(0.8, begin=10, end=30, initial=0.2)


@pytest.fixture
def pruner(nb, golden):
    """Return a callback that prunes weights by the schedule of GOLDEN."""
    return nb.Pruner("weight", golden, frequency=5)


@pytest.fixture
def half_precision():
    """Let new layers compute in float16."""
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_float16")
    yield
    keras.config.set_dtype_policy(before)


# zeros that hold


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_zeros_stay_through_one_ten_and_a_thousand_steps(nb, optimizer):
    model = nb.prune(network(), "weight", 0.8)
    before, expected = model.get_weights(), zeros(model)
    assert kernel_zeros(model) == rounded(0.8)
    compiled(model, optimizer)
    for steps in (1, 9, 990):
        assert len(keep_zeros(nb, model, steps)) == steps
        assert (zeros(model) == expected).all()
    pairs = zip(model.get_weights(), before)
    changed = np.concatenate([(w != v).ravel() for w, v in pairs])
    assert changed[~expected].mean() > 0.9


def test_steps_are_planned_as_the_golden_values_say():
    for number, counts in enumerate(EACH_STEP, start=1):
        due = [GOLDEN[10], *(GOLDEN[s] for s in GOLDEN if s <= number)]
        assert counts == rounded(due[-1])


@pytest.mark.parametrize("optimizer", [*OPTIMIZERS, *UNUSUAL])
def test_sparsity_follows_the_schedule_after_every_step(pruner, optimizer):
    model = compiled(network(), optimizer)
    watch = Watch(lambda model: (kernel_zeros(model), zeros(model)))
    fit(model, 10, pruner, watch, epochs=4)
    counts, places = zip(*watch.noted)
    assert [*counts] == EACH_STEP
    for before, after in itertools.pairwise(places):
        assert after[before].all(), "a zero has come back"
    assert (zeros(model) == places[-1]).all()


@pytest.mark.parametrize("settings", SETTINGS)
def test_sparsity_follows_the_schedule_however_it_is_run(pruner, settings):
    model = compiled(network(), **SETTINGS[settings])
    watch = Watch(lambda m: (int(m.optimizer.iterations), kernel_zeros(m)))
    fit(model, 10, pruner, watch, epochs=4)
    steps, counts = zip(*watch.noted)
    assert steps[-1] == STEPS
    assert [*counts] == planned(steps)
    assert kernel_zeros(model) == rounded(0.8)


@pytest.mark.parametrize("frequency", [1, 7, 25, 100])
def test_the_end_of_a_schedule_is_never_missed(nb, golden, frequency):
    model, watch = compiled(network()), Watch(kernel_zeros)
    fit(model, STEPS, nb.Pruner("weight", golden, frequency), watch)
    assert watch.noted == planned(range(1, STEPS + 1), frequency)
    assert watch.noted[28:30] == [planned(range(1, 30), frequency)[-1], rounded(0.8)]


@pytest.mark.parametrize("settings", SETTINGS)
def test_zeros_stay_however_a_model_is_run(nb, settings):
    model = nb.prune(network(), "unit", 0.5)
    keep_zeros(nb, compiled(model, **SETTINGS[settings]), 10)


def test_zeros_stay_in_mixed_precision(nb, pruner, half_precision):
    model = compiled(network())
    assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
    watch = Watch(kernel_zeros)
    fit(model, 10, pruner, watch, epochs=4)
    assert watch.noted == EACH_STEP
    keep_zeros(nb, model, 10)
    fit(model, 10)
    prune_here(nb, model, 0.9)
    keep_zeros(nb, model, 10)


def test_a_step_that_is_skipped_is_a_step(nb, half_precision):
    model, watch = compiled(network()), Watch(kernel_zeros)
    model.optimizer.initial_scale = 2.0**60
    schedule = nb.constant_sparsity(0.5, begin=6)
    fit(model, 10, nb.Pruner("weight", schedule), watch)
    assert int(model.optimizer.iterations) < 6
    assert watch.noted == [[0, 0]] * 5 + [rounded(0.5)] * 5


def test_a_mask_comes_after_the_constraint_before_it(nb):
    variable = keras.Variable(np.ones((2, 2), "float32"))
    variable.constraint = shifted = Shifted()
    constraint = nb.Masked(variable)
    assert np.array(constraint(variable)).tolist() == [[2, 2], [2, 2]]
    constraint.mask.assign([[True, False], [False, True]])
    assert np.array(constraint(variable)).tolist() == [[2, 0], [0, 2]]
    assert constraint.before is shifted


def test_a_constraint_of_the_users_is_applied_and_stays(nb, golden):
    limit = keras.constraints.MaxNorm(0.7, axis=0)
    positive = keras.constraints.NonNeg()
    model = network(kernel_constraint=limit, bias_constraint=positive)
    model = compiled(model, "momentum")
    own, watch = constraints(model), Watch(lambda m: m.get_weights())
    assert own == [limit, positive] * 2 + [None] * 2
    with pytest.raises(KeyboardInterrupt):
        fit(model, 5, nb.KeepZeros(), Interrupt(2))
    fit(model, STEPS, nb.Pruner("unit", golden, 5), watch)
    for weights in (*watch.noted, model.get_weights()):
        for kernel, bias in (weights[0:2], weights[2:4]):
            assert np.linalg.norm(kernel, axis=0).max() < 0.701
            assert (bias >= 0).all()
    biases = model.get_weights()[1:4:2]
    assert [np.count_nonzero(bias == 0) for bias in biases] == [13, 10]
    for before, after in zip(own, constraints(model)):
        assert before is after


def test_masks_follow_a_schedule_that_gives_weights_back(nb):
    model, watch = compiled(network(activation="tanh")), Watch(kernel_zeros)
    rule = nb.Pruner("weight", lambda step: 0.8 if step < 5 else 0.25, frequency=5)
    fit(model, 20, rule, watch)
    assert watch.noted[:5] == [rounded(0.8)] * 5
    assert watch.noted[-1] == kernel_zeros(model) == rounded(0.25)


def test_any_function_of_steps_is_a_schedule(nb):
    model, watch = compiled(network()), Watch(kernel_zeros)
    fit(model, 20, nb.Pruner("weight", lambda step: step / 100, 8), watch)
    pruned = [step // 8 * 8 for step in range(1, 21)]
    assert watch.noted == [rounded(step / 100) for step in pruned]
    assert kernel_zeros(model) == rounded(0.2), "at the end of training, too"


BETWEEN = {
    "nothing": lambda model: None,
    "compile": compiled,
    "training": lambda model: fit(model, 2),
    "training on rows": lambda model: model.fit(ROWS, LABELS, verbose=0),
    "training, compile": lambda model: [fit(model, 2), compiled(model)],
    "compile, training": lambda model: fit(compiled(model), 2),
}


@pytest.mark.parametrize(
    "between, settings",
    [
        *itertools.product(BETWEEN, ["plain"]),
        *itertools.product(["training"], ["eager", "XLA, five at once"]),
    ],
)
def test_zeros_are_kept_as_often_as_one_likes(nb, between, settings):
    model = compiled(network(activation="tanh"), **SETTINGS[settings])
    for sparsity in (0.2, 0.7, 0.4):
        prune_here(nb, model, sparsity)
        keep_zeros(nb, model, 5)
        assert_ordinary(model)
        BETWEEN[between](model)
        assert kernel_zeros(model) == [0, 0] or "training" not in between
    fit(model, 5, nb.Pruner("weight", nb.constant_sparsity(0.6)))
    assert kernel_zeros(model) == rounded(0.6) or between in ("nothing", "compile")


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("name", ["Pruner", "KeepZeros"])
def test_training_afterwards_is_ordinary_training(nb, name, again):
    model = compiled(network(activation="tanh"))
    options = ("weight", nb.constant_sparsity(0.5)) if name == "Pruner" else ()
    prune_here(nb, model, 0.3)
    fit(model, 5, getattr(nb, name)(*options))
    assert_ordinary(model)
    assert kernel_zeros(model) == rounded(0.5 if name == "Pruner" else 0.3)
    model = compiled(model) if again else model
    model.optimizer.build(model.trainable_variables)
    other = twin(model)
    for part in (model, other):
        fit(part, 9)
    for own, weight in zip(model.get_weights(), other.get_weights()):
        assert np.allclose(own, weight, atol=1e-6)
    assert kernel_zeros(model) == [0, 0]


def test_single_batches_may_follow(nb):
    model = compiled(nb.prune(network(activation="tanh"), "weight", 0.5))
    keep_zeros(nb, model, 3)
    model.train_on_batch(ROWS, LABELS)
    assert kernel_zeros(model) == [0, 0]


def test_changing_masks_compiles_nothing(pruner):
    model = compiled(network())
    traced, watch = traces(model), Watch(lambda model: len(traced))
    fit(model, STEPS, pruner, watch)
    assert {*watch.noted} == {len(traced)}


def test_what_is_chosen_may_change_between_trainings(nb):
    model = compiled(network(activation="tanh"))
    kernels = [weight for weight in model.weights if weight.ndim > 1]
    for chosen in ((0, 1), (0, 1, 2), (0,), (1, 2), (2,), (0, 1)):
        prune_here(nb, model, 0.5, every(model))
        keeper = nb.KeepZeros([kernels[i].path for i in chosen])
        before = [kernel.numpy() == 0 for kernel in kernels]
        fit(model, 5, keeper)
        for number, (kernel, expected) in enumerate(zip(kernels, before)):
            expected = expected & (number in chosen)
            assert ((kernel.numpy() == 0) == expected).all()
        assert_ordinary(model)


def test_a_constraint_may_be_set_and_changed_between_trainings(nb):
    model = compiled(network(activation="tanh"))
    kernels = nb.prunable_kernels(model)
    positive, short = keras.constraints.NonNeg(), keras.constraints.MaxNorm(1)
    for own in (None, positive, short, positive, None):
        for keeps in (True, False):
            for kernel in kernels:
                kernel.constraint = own
                kernel.assign(kernel_of(kernel.shape))
            prune_here(nb, model, 0.5)
            expected, watch = zeros(model), Watch(lambda m: m.get_weights()[:3:2])
            fit(model, 3, *[nb.KeepZeros()] * keeps, watch)
            for kernel in itertools.chain(*watch.noted):
                assert (kernel >= 0).all() == (own is positive)
                norms = np.linalg.norm(kernel, axis=0)
                assert (norms.max() < 1.001) == (own is short)
            assert zeros(model)[expected].all() == keeps
            assert constraints(model)[:4:2] == [own] * 2


def test_a_training_without_epochs_changes_nothing(nb):
    model = compiled(network(activation="tanh"))
    before = model.get_weights()
    fit(model, 5, nb.KeepZeros(), epochs=1, initial_epoch=1)
    assert same(model.get_weights(), before)
    assert_ordinary(model)
    fit(model, 5)
    prune_here(nb, model, 0.5)
    keep_zeros(nb, model, 5)


# what belongs to a unit


def branched(seed=0):
    """Return an untrained model whose first eight units are tied, nothing in it 0.

    "first", "depthwise" and "second" have the same units. Each is normalized.
    """
    keras.utils.set_random_seed(seed)
    biases, layers = {"bias_initializer": "ones"}, keras.layers
    means = {"beta_initializer": "ones", "moving_mean_initializer": "ones"}

    def normalized(x, layer):
        x = layer(x)
        return layers.BatchNormalization(name=f"{layer.name}_norm", **means)(x)

    inputs = keras.Input((8,))
    x = layers.Reshape((4, 2))(inputs)
    first = layers.Conv1D(8, 3, padding="same", name="first", **biases)
    x = layers.ReLU()(normalized(x, first))
    own = layers.DepthwiseConv1D(3, padding="same", name="depthwise", **biases)
    y = layers.ReLU()(normalized(x, own))
    y = normalized(y, layers.Conv1D(8, 1, name="second", **biases))
    x = layers.GlobalAveragePooling1D()(layers.ReLU()(layers.Add()([x, y])))
    x = layers.ReLU()(normalized(x, layers.Dense(6, name="last", **biases)))
    return keras.Model(inputs, layers.Dense(3, name="logits")(x))


def gone(model):
    """Return which of the tied units are gone, and which of the last layer's.

    Of a unit whose kernel column is 0 everything else that is its own has to be 0.
    """
    dead = []
    for names in (("first", "depthwise", "second"), ("last",)):
        columns = model.get_layer(names[0]).kernel.numpy()
        dead.append(~columns.reshape(-1, columns.shape[-1]).any(axis=0))
        for name in names:
            layer, norm = model.get_layer(name), model.get_layer(f"{name}_norm")
            kernel = layer.kernel.numpy()
            kernel = kernel[..., 0] if name == "depthwise" else kernel
            assert (~kernel.reshape(-1, len(dead[-1])).any(axis=0) == dead[-1]).all()
            for variable in (layer.bias, norm.beta, norm.moving_mean):
                assert ((variable.numpy() == 0) == dead[-1]).all(), variable.path
    return np.concatenate(dead)


def never_back(noted, counts):
    """Assert that units go, so many after each step, and none of them comes back."""
    assert [int(dead.sum()) for dead in noted] == counts
    for before, after in itertools.pairwise(noted):
        assert after[before].all(), "a unit has come back"


RUNS = {name: (name, {}) for name in (*KERAS, "average", *UNUSUAL)}
ONCE = "XLA", "eager", "four at once", "XLA, five at once"
RUNS |= {name: ("Adam", SETTINGS[name]) for name in ONCE}


@pytest.mark.parametrize("run", RUNS)
def test_units_go_with_all_that_is_theirs_and_stay_away(nb, run):
    optimizer, options = RUNS[run]
    model, watch = compiled(branched(), optimizer, **options), Watch(gone)
    pruner = nb.Pruner("unit", nb.polynomial_sparsity(0.5, 2, 6, power=1), 2)
    fit(model, 5, pruner, watch, epochs=2)
    due, pruned, k = [], 0, options.get("steps_per_execution", 1)
    for before, step in itertools.pairwise(
        [0, *range(k, 5, k), 5, *range(5 + k, 10, k), 10]
    ):
        pruned = step if step // 2 > before // 2 else pruned
        sparsity = min(max(pruned - 2, 0), 4) / 8
        due.append(round(8 * sparsity) + round(6 * sparsity))
    never_back(watch.noted, due)
    assert gone(model).sum() == 4 + 3
    assert constraints(model) == [None] * len(model.weights)
    smaller = nb.shrink(model)
    assert smaller.get_layer("second").filters == 4
    assert np.allclose(smaller(ROWS), model(ROWS), atol=1e-5)
    model = compiled(nb.prune(model, "unit", 0.75), optimizer, **options)
    expected, watch = gone(model), Watch(gone)
    assert expected.sum() == 6 + 4
    fit(model, 5, nb.KeepZeros(), watch)
    never_back(watch.noted, [6 + 4] * len(watch.noted))
    assert (gone(model) == expected).all()


def test_units_go_in_mixed_precision(nb, half_precision):
    model, watch = compiled(branched()), Watch(gone)
    assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
    fit(model, 9, nb.Pruner("unit", nb.constant_sparsity(0.5, begin=3)), watch)
    never_back(watch.noted, [0, 0, *[7] * 7])
    fit(model, 5, nb.KeepZeros(), watch)
    never_back(watch.noted[9:], [7] * 5)


def test_units_go_ever_further_from_fit_to_fit(nb):
    model, watch = compiled(branched()), Watch(gone)
    for sparsity in (0.25, 0.5, 0.75):
        fit(model, 3, nb.Pruner("unit", nb.constant_sparsity(sparsity)), watch)
    never_back(watch.noted, [4] * 3 + [7] * 3 + [10] * 3)
    with pytest.raises(KeyboardInterrupt):
        fit(model, 9, nb.KeepZeros(), watch, Interrupt(2))
    never_back(watch.noted[9:], [10] * 2)
    fit(model, 3, nb.KeepZeros(), watch)
    assert (gone(model) == watch.noted[0]).sum() == 14 - 6
    expected = zeros(model)
    fit(model, 3)
    assert zeros(model).sum() < expected.sum(), "nothing holds them any more"


@pytest.mark.parametrize("own", ["first_norm", "depthwise", "last"])
def test_units_of_frozen_layers_go_too(nb, own):
    model = branched()
    model.get_layer(own).trainable = False
    watch = Watch(gone)
    fit(compiled(model), 3, nb.Pruner("unit", nb.constant_sparsity(0.5)), watch)
    never_back(watch.noted, [7] * 3)


def test_a_layer_without_any_weights_left_is_gone_by_weights_too(nb):
    model, watch = compiled(branched()), Watch(gone)
    schedule = nb.constant_sparsity(1, begin=2)
    fit(model, 3, nb.Pruner("weight", schedule), watch)
    never_back(watch.noted, [0, 14, 14])


def test_only_the_kernels_named_are_pruned(nb):
    model = branched()
    last = [model.get_layer("last").kernel.path]
    fit(compiled(model), 3, nb.Pruner("unit", nb.constant_sparsity(0.5), kernels=last))
    assert np.flatnonzero(gone(model)).min() >= 8 and gone(model).sum() == 3
    assert nb.measured_sparsity(model, last) == 0.5
    first, biases = [model.get_layer("first").kernel.path], model.get_layer("first")
    before = nb.measured_sparsity(model, first)
    fit(model, 3, nb.Pruner("weight", nb.constant_sparsity(1), kernels=first))
    assert before == 0 and nb.measured_sparsity(model, first) == 1
    assert biases.bias.numpy().all(), "its units are not gone: others are tied to them"
    with pytest.raises(ValueError, match="no units"):
        fit(model, 3, nb.Pruner("unit", nb.constant_sparsity(0.5), kernels=first))


def test_a_depthwise_kernel_that_is_named_is_pruned_by_weights(nb):
    model = branched()
    path = [model.get_layer("depthwise").kernel.path]
    schedule, watch = nb.constant_sparsity(0.5), Watch(zeros)
    fit(compiled(model), 3, nb.Pruner("weight", schedule, kernels=path), watch)
    assert [noted.sum() for noted in watch.noted] == [3 * 8 / 2] * 3
    assert nb.measured_sparsity(model, path) == 0.5


@pytest.mark.parametrize("name", ["Pruner", "KeepZeros"])
def test_a_dead_unit_that_is_not_zero_is_the_same_in_training_and_after(nb, name):
    layers = [keras.Input((8,)), keras.layers.Dense(16, "sigmoid")]
    layers.append(keras.layers.BatchNormalization(momentum=0.5))
    model = keras.Sequential([*layers, keras.layers.Dense(3)])
    if name == "Pruner":
        holder = nb.Pruner("unit", nb.constant_sparsity(0.25))
    else:
        model, holder = nb.prune(model, "unit", 0.25), nb.KeepZeros()
    fit(compiled(model), 40, holder)
    both = [model(ROWS, training=training) for training in (True, False)]
    assert np.abs(np.subtract(*both)).max() < 0.5


class Own(keras.Model):
    """A model with a `call` of its own."""

    def __init__(self, hidden=16):
        """Make two layers."""
        super().__init__()
        self.hidden = keras.layers.Dense(hidden, "relu", bias_initializer="ones")
        self.logits = keras.layers.Dense(3, bias_initializer="ones")

    def call(self, inputs):
        """Return logits."""
        return self.logits(self.hidden(inputs))


def test_a_model_without_a_graph_loses_weights_of_the_kernels_named(nb):
    model, watch = Own(), Watch(zeros)
    model(ROWS)
    path = [model.hidden.kernel.path]
    schedule = nb.constant_sparsity(0.5, begin=2)
    history = fit(compiled(model), 4, nb.Pruner("weight", schedule, 1, path), watch)
    assert [int(noted.sum()) for noted in watch.noted] == [0, 64, 64, 64]
    assert nb.measured_sparsity(model, path) == 0.5 == history["sparsity"][-1]
    expected = zeros(model)
    fit(model, 4, nb.KeepZeros(path), watch)
    assert (watch.noted[4:] == expected).all() and (zeros(model) == expected).all()
    assert constraints(model) == [None] * 4


@pytest.mark.parametrize(
    "rule, named, reason",
    [
        ("weight", False, "a `call` of its own"),
        ("unit", False, "a `call` of its own"),
        ("unit", True, "no units"),
        ("column", True, "'column'"),
        (lambda kernel, sparsity: kernel[:1] > 0, True, "the kernel's shape"),
    ],
)
def test_what_cannot_be_pruned_is_refused_and_left_alone(nb, rule, named, reason):
    model = Own()
    model(ROWS)
    before, watch = model.get_weights(), Watch(zeros)
    paths = [model.hidden.kernel.path] if named else None
    pruner = nb.Pruner(rule, nb.constant_sparsity(0.5), kernels=paths)
    with pytest.raises(ValueError, match=reason):
        fit(compiled(model), 3, pruner, watch)
    assert not watch.noted and same(model.get_weights(), before)
    assert constraints(model) == [None] * 4


# trainings that do not end as planned


@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize("again", [False, True])
def test_after_an_interrupt_masks_stay_until_the_next_callback(nb, steps, again):
    model = compiled(network(activation="tanh"))
    prune_here(nb, model, 0.5)
    expected = zeros(model)
    with pytest.raises(KeyboardInterrupt):
        fit(model, 10, nb.KeepZeros(), Interrupt(steps))
    assert (zeros(model) == expected).all()
    model = compiled(model) if again else model
    fit(model, 5)
    assert (zeros(model) == expected).all()
    fit(model, 5, nb.KeepZeros())
    assert (zeros(model) == expected).all()
    assert_ordinary(model)
    fit(model, 5)
    assert kernel_zeros(model) == [0, 0]
    prune_here(nb, model, 0.3)
    keep_zeros(nb, model, 5)


def test_an_interrupt_before_the_first_step_holds_nothing(nb):
    model = compiled(network(activation="tanh"))
    prune_here(nb, model, 0.5)
    expected = zeros(model)
    with pytest.raises(KeyboardInterrupt):
        fit(model, 10, nb.KeepZeros(), Interrupt(0))
    assert (zeros(model) == expected).all()
    fit(model, 5)
    assert kernel_zeros(model) == [0, 0]
    keep_zeros(nb, model, 5)
    assert_ordinary(model)


def test_an_interrupted_training_leaves_no_old_masks(nb):
    model = compiled(network(activation="tanh"))
    first = nb.Pruner("weight", nb.constant_sparsity(0.5))
    with pytest.raises(KeyboardInterrupt):
        fit(model, 10, first, Interrupt())
    assert kernel_zeros(model) == rounded(0.5)
    second, watch = (
        nb.Pruner("weight", nb.constant_sparsity(0.3, begin=8)),
        Watch(kernel_zeros),
    )
    fit(model, 10, second, watch)
    assert watch.noted[6:] == [[0, 0], *[rounded(0.3)] * 3]
    assert_ordinary(model)


def test_kernels_that_are_no_longer_chosen_are_set_free(nb):
    model = compiled(network(activation="tanh"))
    schedule = nb.constant_sparsity(0.5)
    first = nb.Pruner("weight", schedule, kernels=every(model))
    with pytest.raises(KeyboardInterrupt):
        fit(model, 10, first, Interrupt())
    assert (model.layers[-1].kernel.numpy() == 0).sum() == 18
    fit(model, 10, nb.Pruner("weight", schedule))
    assert model.layers[-1].kernel.numpy().all()
    assert_ordinary(model)


@pytest.mark.parametrize("rule", ["weight", "unit"])
@pytest.mark.parametrize("optimizer", ["Adam", "average"])
@pytest.mark.parametrize("steps", [1, 12, 28])
def test_a_training_that_stops_early_ends_at_the_final_sparsity(
    nb, golden, steps, optimizer, rule
):
    model, watch = compiled(network(), optimizer), Watch(zeros)
    fit(model, 10, nb.Pruner(rule, golden, 5), watch, Stop(steps), epochs=4)
    assert len(watch.noted) == steps
    assert zeros(model)[watch.noted[-1]].all(), "a zero has come back"
    units = (8 * round(0.8 * 16), 16 * round(0.8 * 12))
    assert kernel_zeros(model) == (rounded(0.8) if rule == "weight" else [*units])
    biases = model.get_weights()[1:4:2]
    kernels = model.get_weights()[0:4:2]
    for kernel, bias in zip(kernels, biases):
        assert ((bias != 0) == kernel.any(axis=0)).all()
    assert_ordinary(model)


@pytest.mark.parametrize("begin", [0, 40])
def test_the_best_weights_are_pruned_when_they_are_put_back(nb, begin):
    kept = keras.callbacks.EarlyStopping(
        "loss", patience=2, mode="max", restore_best_weights=True
    )
    model, weights = compiled(network()), Watch(lambda model: model.get_weights())
    schedule = nb.polynomial_sparsity(0.8, begin, max(begin, 20))
    history = fit(model, 10, weights, kept, nb.Pruner("weight", schedule, 5), epochs=9)
    assert len(history["loss"]) == 3
    assert kernel_zeros(model) == rounded(0.8)
    for own, best in zip(model.get_weights(), weights.noted[9]):
        assert ((own == best) | (own == 0)).all()
    assert_ordinary(model)


def test_a_frozen_layer_is_pruned_and_set_free_too(nb):
    model = network()
    model.layers[0].trainable = False
    before = model.get_weights()[0]
    fit(compiled(model), 3, nb.Pruner("weight", nb.constant_sparsity(0.5)))
    assert kernel_zeros(model) == rounded(0.5)
    assert (model.get_weights()[0] == before * nb.weight_mask(before, 0.5)).all()
    assert_ordinary(model)


def test_what_training_leaves_is_an_ordinary_model(nb, pruner, tmp_path):
    model, path = compiled(network()), tmp_path / "pruned.keras"
    fit(model, STEPS, pruner)
    plain = compiled(network())
    fit(plain, 1)
    assert_ordinary(model)
    for part, other in ((model, plain), (model.optimizer, plain.optimizer)):
        shapes = [v.shape for v in part.variables]
        assert shapes == [v.shape for v in other.variables]
    assert "Masked" not in json.dumps([model.to_json(), model.get_config()])
    model.save(path)
    loaded = keras.models.load_model(path, safe_mode=True)
    assert (loaded.predict(ROWS) == model.predict(ROWS)).all()
    assert kernel_zeros(loaded) == rounded(0.8)
    keep_zeros(nb, loaded, 5)


def test_a_checkpoint_taken_on_the_way_is_sparse(pruner, tmp_path):
    path = tmp_path / "epoch_{epoch}.keras"
    checkpoint = keras.callbacks.ModelCheckpoint(path)
    fit(compiled(network()), 10, pruner, checkpoint, epochs=4)
    for epoch in (1, 2, 3, 4):
        name = str(path).format(epoch=epoch)
        loaded = keras.models.load_model(name, safe_mode=True)
        assert kernel_zeros(loaded) == EACH_STEP[10 * epoch - 1]


def test_zeros_that_were_held_have_no_sign(pruner):
    model = compiled(network(activation="tanh"))
    fit(model, STEPS, pruner)
    for weights in model.get_weights():
        assert not np.signbit(weights[weights == 0]).any()


DISTRIBUTED = """
import contextlib
from test_03_training import *
strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
assert strategy.num_replicas_in_sync == 2
for scope in (contextlib.nullcontext(), strategy.scope()):
    with scope:
        model = compiled(network(activation="tanh"))
        units = compiled(branched())
    rows, watch = (ROWS, LABELS, 16, 5, 0), Watch(kernel_zeros)
    schedule = nb.polynomial_sparsity(0.8, 2, 6, initial=0.2, power=1)
    pruner = nb.Pruner("weight", schedule, frequency=2)
    model.fit(*rows, callbacks=[pruner, watch], shuffle=False)
    shares = (0.2, 0.2, 0.2, 0.5, 0.5, 0.8, 0.8, 0.8, 0.8, 0.8)
    assert watch.noted == [rounded(share) for share in shares]
    assert kernel_zeros(model) == rounded(0.8)
    assert_ordinary(model)
    weights.append(model.get_weights())
    model.fit(*rows, shuffle=False)
    assert kernel_zeros(model) == [0, 0]
    prune_here(nb, model, 0.3)
    expected, watch = zeros(model), Watch(zeros)
    model.fit(*rows, callbacks=[nb.KeepZeros(), watch], shuffle=False)
    assert (np.array(watch.noted) == expected).all()
    assert_ordinary(model)
    weights.append(model.get_weights())
    watch, schedule = Watch(gone), nb.constant_sparsity(0.5, begin=2)
    callbacks = [nb.Pruner("unit", schedule), watch]
    units.fit(ROWS, LABELS, 16, 2, 0, callbacks)
    units.fit(ROWS, LABELS, 16, 2, 0, [nb.KeepZeros(), watch])
    never_back(watch.noted, [0] + [7] * 7)
for single, mirrored in ((0, 2), (1, 3)):
    for own, other in zip(weights[single], weights[mirrored]):
        assert np.allclose(own, other, atol=1e-4)
        assert ((own == 0) == (other == 0)).all()
"""


def test_zeros_stay_on_two_devices():
    run_on_two_devices(DISTRIBUTED)


# the callbacks' manners


def test_the_sparsity_is_logged_for_every_epoch(pruner, tmp_path):
    logger = keras.callbacks.CSVLogger(tmp_path / "log.csv")
    history = fit(compiled(network()), 10, pruner, logger, epochs=4)
    expected = [sum(counts) / sum(SIZES) for counts in EACH_STEP[9::10]]
    assert np.allclose(history["sparsity"], expected)
    log = pd.read_csv(tmp_path / "log.csv")
    assert np.allclose(log.sparsity, expected)
    assert {"epoch", "loss"} < {*log.columns}


def test_the_sparsity_of_what_is_watched_is_logged(nb):
    model = network()
    model = compiled(nb.prune(model, "weight", 0.5, every(model)[1:]))
    for kernels, share in ((every(model)[1:], 0.5), (every(model)[:1], 0)):
        history = fit(model, 2, nb.KeepZeros(kernels), epochs=3)
        assert history["sparsity"] == [share] * 3


def test_training_may_start_at_a_later_epoch(nb):
    model, watch = compiled(network()), Watch(kernel_zeros)
    schedule = nb.polynomial_sparsity(0.8, begin=0, end=20, initial=0.2)
    rising = nb.Pruner("weight", schedule, frequency=5)
    fit(model, 10, rising, watch, epochs=3, initial_epoch=1)
    expected = [rounded(GOLDEN[min(30, 10 + step // 5 * 5)]) for step in range(11, 31)]
    assert watch.noted == expected


def test_a_pruner_can_be_used_again(pruner):
    model = compiled(network())
    for own in (model, compiled(network(1)), model):
        watch = Watch(kernel_zeros)
        own.set_weights(network(2).get_weights())
        fit(own, STEPS, pruner, watch)
        assert watch.noted == EACH_STEP


@pytest.mark.parametrize(
    "settings, numbers, options",
    [
        ({"begin": 21, "end": 30}, (30, 20), {"epochs": 2}),
        ({"begin": 10, "end": 30}, (30, 20), {"epochs": 2}),
        ({"begin": 0, "end": 21}, (21, 20), {"epochs": 2}),
        ({"begin": 0, "end": 81}, (81, 80), {"epochs": 8, "initial_epoch": 7}),
        ({"begin": 0, "end": 9}, (9, 8), {"epochs": 2, "steps_per_epoch": 4}),
        ({"begin": 21}, (21, 20), {"epochs": 2}),
    ],
)
def test_a_schedule_that_cannot_be_followed_is_refused(nb, settings, numbers, options):
    make = nb.polynomial_sparsity if "end" in settings else nb.constant_sparsity
    model, watch = compiled(network()), Watch(zeros)
    before = model.get_weights()
    with pytest.raises(ValueError) as error:
        fit(model, 10, nb.Pruner("weight", make(0.8, **settings)), watch, **options)
    assert {*map(str, numbers)} <= {*re.findall(r"\d+|inf", str(error.value))}
    assert not watch.noted and same(model.get_weights(), before)
    assert_ordinary(model)


@pytest.mark.parametrize("begin", [0, 20])
@pytest.mark.parametrize("options", [{}, {"steps_per_execution": 4}])
def test_a_schedule_may_end_with_the_last_step(nb, begin, options):
    model, schedule = (
        compiled(network(), **options),
        nb.polynomial_sparsity(0.8, begin, 20),
    )
    watch = Watch(kernel_zeros)
    fit(model, 10, nb.Pruner("weight", schedule), watch, epochs=2)
    assert watch.noted == [[0, 0]] * (len(watch.noted) - 1) + [rounded(0.8)]
    assert kernel_zeros(model) == rounded(0.8)


@pytest.mark.parametrize("frequency", [0, -5, 0.5])
def test_a_frequency_below_one_is_named(nb, golden, frequency):
    with pytest.raises(ValueError, match=rf"frequency .* {frequency}"):
        nb.Pruner("weight", golden, frequency)


@pytest.mark.parametrize("name", ["Pruner", "KeepZeros"])
def test_a_model_with_nothing_to_prune_is_named(nb, name):
    ends = [keras.Input((8,)), keras.layers.Dense(3)]
    model = compiled(keras.Sequential(ends, name="tiny"))
    before = model.get_weights()
    options = ("weight", nb.constant_sparsity(0.5)) if name == "Pruner" else ()
    with pytest.raises(ValueError, match="tiny"):
        fit(model, 2, getattr(nb, name)(*options))
    assert same(model.get_weights(), before)


@pytest.mark.filterwarnings("ignore:Your input ran out of data")
@pytest.mark.parametrize("steps", [20, STEPS])
def test_data_of_unknown_length_are_trained_on(pruner, steps):
    model, watch = compiled(network()), Watch(kernel_zeros)
    generator = ((ROWS, LABELS) for _ in range(steps))
    callbacks = [pruner, watch]
    model.fit(generator, callbacks=callbacks, shuffle=False, verbose=0)
    assert watch.noted == EACH_STEP[:steps]
    assert kernel_zeros(model) == rounded(0.8)


@pytest.mark.filterwarnings("ignore:Your input ran out of data")
def test_steps_of_epochs_of_unknown_length_are_counted(pruner):
    model, watch = compiled(network()), Watch(kernel_zeros)
    unknown = batches(10).filter(lambda *_: True)
    assert unknown.cardinality() == tf.data.UNKNOWN_CARDINALITY
    model.fit(unknown, None, None, 4, 0, [pruner, watch], shuffle=False)
    assert watch.noted == EACH_STEP


# schedules


def test_a_polynomial_schedule_has_the_golden_values(golden):
    for step, sparsity in GOLDEN.items():
        assert math.isclose(golden(step), sparsity)
    assert np.allclose([golden(step) for step in (0, 1, 9)], 0.2, atol=1e-15)
    assert [golden(step) for step in (30, 31, 1000)] == [0.8] * 3
    assert golden.end == 30


@given(
    st.floats(0, 1),
    st.floats(0, 1),
    st.integers(0, 30),
    st.integers(0, 30),
    st.sampled_from([1, 2, 3, 0.5]),
)
def test_a_polynomial_schedule_is_the_formula(nb, initial, final, begin, length, power):
    end = begin + length
    schedule = nb.polynomial_sparsity(final, begin, end, initial, power)
    constant = nb.constant_sparsity(final, begin)
    assert (schedule.end, constant.end) == (end, begin)
    for step in range(end + 30):
        progress = (step - begin) / length if length else step >= begin
        progress = min(max(progress, 0), 1)
        expected = final + (initial - final) * (1 - progress) ** power
        assert math.isclose(schedule(step), expected, abs_tol=1e-12)
        assert 0 <= schedule(step) <= 1
        assert constant(step) == (final if step >= begin else 0)
    assert schedule(end) == final


def test_a_schedule_begins_with_nothing_and_is_a_cubic_unless_told(nb):
    schedule = nb.polynomial_sparsity(0.8, 0, 2)
    assert schedule(0) == 0 and math.isclose(schedule(1), 0.7)
    assert nb.constant_sparsity(0.7)(0) == 0.7
    line = nb.polynomial_sparsity(0.9, 0, 8, initial=0.1, power=1)
    values = [line(step) for step in (0, 2, 4, 6, 8)]
    assert np.allclose(values, [0.1, 0.3, 0.5, 0.7, 0.9])


@pytest.mark.parametrize("sparsity", [1.2, -0.1, math.nan, math.inf, "half", None])
def test_a_sparsity_out_of_range_is_named(nb, sparsity):
    for make in (
        lambda: nb.constant_sparsity(sparsity),
        lambda: nb.polynomial_sparsity(sparsity, 0, 10),
        lambda: nb.polynomial_sparsity(0.8, 0, 10, initial=sparsity),
    ):
        with pytest.raises(ValueError, match=str(sparsity)):
            make()


@pytest.mark.parametrize("begin, end", [(11, 10), (-1, 10), (0, -2), (-1, -1)])
def test_impossible_steps_are_named(nb, begin, end):
    with pytest.raises(ValueError, match=f"step {begin} to step {end}"):
        nb.polynomial_sparsity(0.8, begin, end)
    with pytest.raises(ValueError, match="step -1"):
        nb.constant_sparsity(0.8, begin=-1)


# rules between weights and units


def kernel_of(shape, seed=0):
    """Return a random kernel."""
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def slow_block_mask(kernel, sparsity, block_size, pool):
    """Return the mask that `block_mask` should make, block by block."""
    flat = np.abs(kernel).reshape(-1, kernel.shape[-1]).astype(float)
    (rows, columns), scores = block_size, {}
    for row in range(0, flat.shape[0], rows):
        for column in range(0, flat.shape[1], columns):
            place = np.s_[row : row + rows, column : column + columns]
            scores[row, column] = pool(flat[place]), place
    mask, count = np.ones(flat.shape, bool), round(sparsity * len(scores))
    for start in sorted(scores, key=lambda s: (scores[s][0], s))[:count]:
        mask[scores[start][1]] = False
    return mask.reshape(kernel.shape)


def slow_n_m_mask(kernel, n, m):
    """Return the mask that `n_m_mask` should make, group by group."""
    flat = np.abs(kernel).reshape(-1, kernel.shape[-1])
    mask = np.zeros(flat.shape, bool)
    for unit in range(flat.shape[1]):
        for start in range(0, len(flat), m):
            inputs = range(start, min(start + m, len(flat)))
            by_size = sorted(inputs, key=lambda i: (flat[i, unit], i))
            mask[by_size[-n:], unit] = True
    return mask.reshape(kernel.shape)


@given(
    st.lists(st.integers(1, 9), min_size=2, max_size=4),
    st.data(),
    st.sampled_from(["avg", "max"]),
    st.floats(0, 1),
    st.integers(0, 99),
)
def test_blocks_are_removed_as_by_hand(nb, shape, draws, pooling, sparsity, seed):
    kernel = kernel_of(shape, seed)
    fan_in = math.prod(shape[:-1])
    rows = draws.draw(st.integers(1, fan_in))
    columns = draws.draw(st.integers(1, shape[-1]))
    block_size, pool = (rows, columns), {"avg": np.mean, "max": np.max}
    mask = nb.block_mask(block_size, pooling)(kernel, sparsity)
    expected = slow_block_mask(kernel, sparsity, block_size, pool[pooling])
    assert mask.dtype == bool and mask.shape == kernel.shape
    assert (mask == expected).all()


def test_a_small_block_at_the_edge_counts_by_its_own_mean(nb):
    kernel = np.array([[1.0, 1, 3], [1, 1, 3], [2, 2, 9]])
    mask = nb.block_mask((2, 2))(kernel, 0.75)
    assert (kernel * mask).tolist() == [[0, 0, 0], [0, 0, 0], [0, 0, 9]]
    equal = nb.block_mask((2, 2))(np.ones((3, 3)), 0.5)
    assert equal.tolist() == [[0, 0, 0], [0, 0, 0], [1, 1, 1]]


def test_pooling_decides_which_block_goes(nb):
    kernel = np.array([[5.0, 3], [0, 3]])
    rows = {"avg": [False, True], "max": [True, False]}
    for pooling, kept in rows.items():
        mask = nb.block_mask((2, 1), pooling)(kernel, 0.5)
        assert mask[0].tolist() == mask[1].tolist() == kept


@pytest.mark.parametrize("shape", [(10, 8), (3, 2, 2, 8)])
def test_a_block_of_all_inputs_is_a_unit(nb, shape):
    kernel, fan_in = kernel_of(shape), math.prod(shape[:-1])
    mask = nb.block_mask((fan_in, 1))(kernel, 0.75)
    kept = mask.reshape(fan_in, 8)
    assert (kept.all(axis=0) | ~kept.any(axis=0)).all()
    means = np.abs(kernel).reshape(fan_in, 8).mean(axis=0)
    assert {*np.flatnonzero(kept[0])} == {*np.argsort(means)[6:]}


def test_a_block_of_one_weight_is_a_weight(nb):
    kernel = kernel_of((7, 5))
    for pooling in ("avg", "max"):
        mask = nb.block_mask((1, 1), pooling)(kernel, 0.6)
        assert (mask == nb.weight_mask(kernel, 0.6)).all()


@pytest.mark.parametrize(
    "block_size, pooling",
    [((0, 1), "avg"), ((1, 0), "max"), ((-1, 2), "avg"), ((2, 2), "median")],
)
def test_an_unknown_kind_of_block_is_refused(nb, block_size, pooling):
    with pytest.raises(ValueError):
        nb.block_mask(block_size, pooling)


@pytest.mark.parametrize("block_size", [(7, 1), (1, 6), (7, 6)])
def test_a_block_larger_than_the_kernel_is_refused(nb, block_size):
    with pytest.raises(ValueError, match=r"6, 5"):
        nb.block_mask(block_size)(kernel_of((6, 5)), 0.5)


@given(
    st.lists(st.integers(1, 9), min_size=2, max_size=4),
    st.integers(1, 6),
    st.integers(0, 5),
    st.booleans(),
    st.integers(0, 99),
)
def test_n_of_m_are_kept_as_by_hand(nb, shape, n, more, ties, seed):
    kernel = kernel_of(shape, seed)
    kernel = np.round(kernel) if ties else kernel
    mask = nb.n_m_mask(n, n + more)(kernel, 0.5)
    assert mask.dtype == bool and mask.shape == kernel.shape
    assert (mask == slow_n_m_mask(kernel, n, n + more)).all()


def test_of_equal_weights_the_first_is_removed(nb):
    mask = nb.n_m_mask(2, 4)(np.ones((6, 1)), 0.5)
    assert mask.ravel().tolist() == [0, 0, 1, 1, 1, 1]


def test_n_m_keeps_everything_at_no_sparsity_only(nb):
    kernel, rule = kernel_of((8, 3)), nb.n_m_mask(2, 4)
    assert rule(kernel, 0).all()
    for sparsity in (0.01, 0.5, 1):
        assert rule(kernel, sparsity).mean() == 0.5


@pytest.mark.parametrize("n, m", [(3, 2), (0, 4), (-1, 4), (0, 0)])
def test_impossible_n_and_m_are_named(nb, n, m):
    with pytest.raises(ValueError, match=f"{n}:{m}"):
        nb.n_m_mask(n, m)


def makers(nb):
    """Return rules of all kinds between weights and units."""
    return {
        "blocks": nb.block_mask((2, 3)),
        "largest blocks": nb.block_mask((3, 2), "max"),
        "n:m": nb.n_m_mask(2, 4),
        "together": nb.Globally(nb.magnitudes),
    }


def mask_by(rule, kernel, sparsity):
    """Return the mask that a rule gives to a single kernel."""
    if hasattr(rule, "masks"):
        return rule.masks([kernel], sparsity)[0]
    return rule(kernel, sparsity)


KINDS = ("blocks", "largest blocks", "n:m", "together")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sparsity", [1.01, -0.5, math.nan, "half", None])
def test_no_rule_takes_a_sparsity_out_of_range(nb, kind, sparsity):
    with pytest.raises(ValueError, match="sparsity"):
        mask_by(makers(nb)[kind], kernel_of((4, 6)), sparsity)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_no_rule_ranks_what_is_not_finite(nb, kind, value):
    kernel = kernel_of((4, 6))
    kernel[2, 3] = value
    with pytest.raises(ValueError, match=str(value)):
        mask_by(makers(nb)[kind], kernel, 0.5)


@pytest.mark.parametrize("kind", KINDS)
def test_every_rule_leaves_the_kernel_and_knows_its_ends(nb, kind):
    kernel, rule = kernel_of((4, 6)), makers(nb)[kind]
    before = kernel.copy()
    assert mask_by(rule, kernel, 0).all()
    assert kind == "n:m" or not mask_by(rule, kernel, 1).any()
    assert (kernel == before).all()


@pytest.mark.parametrize("kind", KINDS)
def test_every_rule_works_in_prune(nb, kind):
    model, rule = network(), makers(nb)[kind]
    before, paths = model.get_weights(), every(model)
    pruned = nb.prune(model, rule, 0.5, paths)
    kernels = [w for w in pruned.get_weights() if w.ndim > 1]
    masks = nb.masks_of(nb.prunable(model, paths), rule, 0.5)[:3]
    for kernel, (_, mask), dense in zip(kernels, masks, before[::2], strict=True):
        assert (kernel == dense * mask).all() and not mask.all()
    assert same(model.get_weights(), before)


@pytest.mark.parametrize("kind", KINDS)
def test_every_rule_works_in_a_sweep(nb, data, model, kind):
    data = data._replace(x_test=data.x_test[:50], y_test=data.y_test[:50])
    rule = makers(nb)[kind]
    table = nb.sweep(model, data, {kind: rule}, (0, 0.5))
    pruned = nb.prune(model, rule, 0.5)
    assert table.rule.tolist() == [kind] * 2
    scores = nb.evaluate(pruned, data.x_test, data.y_test)
    assert np.allclose(table.loss[1], scores["loss"])
    assert abs(nb.measured_sparsity(pruned) - 0.5) < 0.01
    left = (nb.shrink(m).get_weights() for m in (model, pruned))
    expected = [sum(np.count_nonzero(w) for w in weights) for weights in left]
    assert table.parameters.tolist() == expected


@pytest.mark.parametrize("kind", KINDS)
def test_every_rule_works_while_training(nb, kind):
    model, rule = compiled(network()), makers(nb)[kind]
    paths, watch = every(model), Watch(zeros)
    schedule = nb.constant_sparsity(0.5, begin=2)
    fit(model, 10, nb.Pruner(rule, schedule, 3, paths), watch)
    for variable, mask in nb.masks_of(nb.prunable(model, paths), rule, 0.5):
        assert (mask == (variable.numpy() != 0)).all()
    for before, after in itertools.pairwise(watch.noted):
        assert after[before].all(), "a zero has come back"


# ranked together


def slow_global(kernels, sparsity):
    """Return the masks that `Globally` should make of magnitudes."""
    places = [
        (abs(float(value)), number, place)
        for number, kernel in enumerate(kernels)
        for place, value in np.ndenumerate(kernel)
    ]
    masks = [np.ones(kernel.shape, bool) for kernel in kernels]
    for _, number, place in sorted(places)[: round(sparsity * len(places))]:
        masks[number][place] = False
    return masks


@given(
    st.lists(
        st.lists(st.integers(1, 6), min_size=2, max_size=3),
        min_size=1,
        max_size=4,
    ),
    st.floats(0, 1),
    st.booleans(),
)
def test_kernels_are_ranked_together_as_by_hand(nb, shapes, sparsity, ties):
    kernels = [(i + 1) * kernel_of(s, i) for i, s in enumerate(shapes)]
    kernels = [np.round(k) if ties else k for k in kernels]
    masks = nb.Globally(nb.magnitudes).masks(kernels, sparsity)
    assert same(masks, slow_global(kernels, sparsity))
    assert [m.shape for m in masks] == [k.shape for k in kernels]
    size = sum(kernel.size for kernel in kernels)
    assert sum((~mask).sum() for mask in masks) == round(sparsity * size)


@given(st.floats(0, 1), st.integers(0, 99))
def test_one_kernel_together_is_one_by_itself(nb, sparsity, seed):
    kernel = np.round(kernel_of((7, 5), seed), 1)
    (mask,) = nb.Globally(nb.magnitudes).masks([kernel], sparsity)
    assert (mask == nb.weight_mask(kernel, sparsity)).all()


@pytest.mark.parametrize("output_too", [False, True])
def test_a_model_pruned_together_has_the_sparsity_asked_for(nb, output_too):
    model, rule = network(), nb.Globally(nb.magnitudes)
    paths = every(model) if output_too else None
    model.layers[0].kernel.assign(10 * model.layers[0].kernel)
    pruned = nb.prune(model, rule, 0.6, paths)
    size = sum(SIZES) + 12 * 3 * output_too
    assert nb.measured_sparsity(pruned, paths) == round(0.6 * size) / size
    first, second = kernel_zeros(pruned)
    assert first / SIZES[0] < 0.2 < 0.8 < second / SIZES[1]


def test_units_are_ranked_together(nb, golden):
    rule = nb.Globally(nb.unit_norms)
    masks = rule.masks([kernel_of((3, 6)), 5 * kernel_of((4, 2))], 0.5)
    assert [m.shape for m in masks] == [(3, 6), (4, 2)]
    assert [int(m.all(axis=0).sum()) for m in masks] == [2, 2]
    model = compiled(network())
    fit(model, STEPS, nb.Pruner(rule, golden, 5))
    norms = [np.linalg.norm(k, axis=0) for k in model.get_weights()[:4:2]]
    assert sum((norm == 0).sum() for norm in norms) == round(0.8 * 28)


@given(st.floats(0, 1), st.integers(0, 99))
def test_globally_the_smallest_of_all_kernels_go(nb, sparsity, seed):
    kernels = [kernel_of((20, 5), seed), 9 * kernel_of((8, 5), seed), kernel_of((4, 5))]
    masks = nb.Globally(nb.magnitudes).masks(kernels, sparsity)
    gone = sum((~mask).sum() for mask in masks)
    assert gone == round(sparsity * sum(kernel.size for kernel in kernels))
    sizes = [np.abs(k[m]).min() for k, m in zip(kernels, masks) if m.any()]
    removed = [np.abs(k[~m]).max() for k, m in zip(kernels, masks) if not m.all()]
    assert not sizes or not removed or min(sizes) >= max(removed)
    for kernel, mask in zip(kernels, masks):
        assert (mask == nb.weight_mask(kernel, 1 - mask.mean())).all()


def test_a_rule_may_be_called_by_its_name(nb):
    model, named, given = network(), [], []
    for name, rule in {"weight": nb.weight_mask, "unit": nb.unit_mask}.items():
        for found, asked in ((named, name), (given, rule)):
            found += [m for _, m in nb.masks_of(nb.prunable(model), asked, 0.5)]
            found += nb.prune(model, asked, 0.5).get_weights()
            trained = compiled(nb.copy_of(model))
            fit(trained, 3, nb.Pruner(asked, nb.constant_sparsity(0.5)))
            found += trained.get_weights()
    assert len(named) == 34 and same(named, given)


# experiments


@pytest.mark.parametrize("rule", ["weight", "unit"])
def test_fine_tuning_keeps_exactly_the_zeros(nb, data, model, rule):
    pruned = nb.prune(model, rule, 0.8)
    before, expected = pruned.get_weights(), zeros(pruned)
    tuned = nb.fine_tune(pruned, data, 2, seed=0)
    assert (zeros(tuned) == expected).all()
    assert same(pruned.get_weights(), before)
    assert not same(tuned.get_weights(), before)
    test = data.x_test, data.y_test
    after, before = (nb.evaluate(m, *test)["loss"] for m in (tuned, pruned))
    assert after < before


def test_trainings_of_all_kinds_do_not_touch_each_other(nb, data, model):
    pruned = nb.prune(model, "unit", 0.5)
    dense = nb.build_mlp((12, 8), seed=1)
    before = pruned.get_weights(), dense.get_weights()
    arguments = (data, "weight", 0.8, 1, 3)
    ways = (
        lambda: nb.train(dense, data, 1, 3),
        lambda: nb.fine_tune(pruned, data, 1, 3),
        lambda: nb.prune_in_training(dense, *arguments),
        lambda: nb.prune_in_training(dense, *arguments, kernels=every(dense)),
    )
    alone = [way().get_weights() for way in ways]
    assert not any(itertools.starmap(same, itertools.combinations(alone, 2)))
    with pytest.raises(KeyboardInterrupt):
        nb.train(pruned, data, 1, 3, [nb.KeepZeros(), Interrupt(3)])
    assert constraints(pruned) == [None] * 3
    for way, weights in zip(ways[::-1], alone[::-1]):
        assert same(way().get_weights(), weights)
    for own, weights in zip((pruned, dense), before):
        assert same(own.get_weights(), weights)


def test_pruning_in_training_takes_the_planned_way(nb, data, model):
    assert nb.steps_of(data, 1) == 10, "1189 rows in batches of 128"
    before, watch = model.get_weights(), Watch(nb.measured_sparsity)
    way = nb.Pruner("weight", nb.polynomial_sparsity(0.9, 0, 24), frequency=20)
    watched = nb.train(model, data, 4, 0, [way, watch])
    pruned = nb.prune_in_training(model, data, "weight", 0.9, 4, 0)
    assert same(pruned.get_weights(), watched.get_weights())
    assert same(model.get_weights(), before)
    sizes = np.array([784 * 12, 12 * 8])
    at_20 = 0.9 * (1 - (1 - 20 / 24) ** 3)
    on_the_way, final = (
        np.round(share * sizes).sum() / sizes.sum() for share in (at_20, 0.9)
    )
    every_tenth_step = [0, on_the_way, final, final]
    assert np.allclose(watch.noted, every_tenth_step)
    assert math.isclose(nb.measured_sparsity(pruned), final)
    assert constraints(pruned) == [None] * 3


def test_pruning_in_training_takes_the_options_of_the_pruner(nb, data, model):
    rule, options = nb.Globally(nb.magnitudes), {"kernels": every(model)}
    pruned = nb.prune_in_training(model, data, rule, 0.9, 1, 0, **options)
    size = 784 * 12 + 12 * 8 + 8 * 10
    sparsity = nb.measured_sparsity(pruned, **options)
    assert math.isclose(sparsity, round(0.9 * size) / size)


@pytest.mark.parametrize("epochs", [1, 2])
def test_pruning_in_training_is_repeatable(nb, data, model, epochs):
    one, two = (
        nb.prune_in_training(model, data, "unit", 0.75, epochs, 3) for _ in range(2)
    )
    assert same(one.get_weights(), two.get_weights())
    assert nb.shrink(one).layers[-3].units == 3


@pytest.fixture(scope="module")
def recovered(nb, data):
    """Return two prunings of a small network, with their ways back."""
    model = nb.train(nb.build_mlp((12, 8), seed=0), data, 2, 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nb, "EPOCHS", 1)
        return {r: dict(nb.recover(model, data, r, 0.75, 1, 4)) for r in nb.RULES}


def test_each_rule_has_its_ways_back(recovered):
    ways = ["one-shot", "repaired", "fine-tuned", "in training"]
    assert [*recovered["weight"]] == ways
    assert [*recovered["unit"]] == [*ways, "from scratch"]


def test_recovered_networks_are_as_sparse_as_the_pruned_one(recovered):
    for ways in recovered.values():
        for way in ("repaired", "fine-tuned"):
            assert (zeros(ways[way]) == zeros(ways["one-shot"])).all()
    for network in recovered["weight"].values():
        assert kernel_zeros(network) == [round(0.75 * 784 * 12), round(0.75 * 96)]
    *ways, scratch = recovered["unit"].values()
    for network in ways:
        assert kernel_zeros(network) == [784 * 9, 12 * 6]
    assert [w.shape for w in scratch.get_weights()] == [(784, 3), (3, 2), (2, 10)]


def test_ways_back_are_what_they_are_called(nb, data, recovered):
    model = nb.train(nb.build_mlp((12, 8), seed=0), data, 2, 0)
    for rule, ways in recovered.items():
        pruned = nb.prune(model, rule, 0.75)
        expected = {
            "one-shot": pruned,
            "repaired": nb.repair(pruned, model, data.x_train),
            "fine-tuned": nb.fine_tune(pruned, data, 1, 4),
            "in training": nb.prune_in_training(model, data, rule, 0.75, 1, 4),
        }
        if rule == "unit":
            start = nb.build_mlp((3, 2), seed=4)
            expected["from scratch"] = nb.train(start, data, 2, 4)
        assert [*expected] == [*ways]
        for way, own in expected.items():
            assert same(own.get_weights(), ways[way].get_weights())


def test_a_network_is_repaired_with_5000_training_images(nb, data, model, monkeypatch):
    many, asked = np.resize(data.x_train, (5003, 28, 28)), []
    monkeypatch.setattr(nb, "repair", lambda *given: asked.append(given) or model)
    ways = nb.recover(model, data._replace(x_train=many), "unit", 0.5, 1, 0)
    (_, pruned), (_, repaired) = itertools.islice(ways, 2)
    ((found, dense, images),) = asked
    assert found is pruned and dense is repaired is model
    assert np.array_equal(images, many[:5000])


@pytest.mark.parametrize("kept", [5, 2])
def test_the_error_of_lenet_is_that_of_a_network_so_sparse(nb, data, monkeypatch, kept):
    evaluate, evaluated = nb.evaluate, []
    monkeypatch.setattr(
        nb, "evaluate", lambda *three: evaluated.append(three) or evaluate(*three)
    )
    error = nb.lenet_error(data, kept, 1, 3)
    ((lenet, *rows),) = evaluated
    assert rows[0] is data.x_test and rows[1] is data.y_test
    accuracy = evaluate(lenet, *rows)["accuracy"]
    assert math.isclose(error, 100 * (1 - accuracy))
    sizes = [w.size for w in lenet.get_weights()]
    assert sizes == [784 * 300, 300 * 100, 100 * 10]
    left = sum(map(np.count_nonzero, lenet.get_weights()))
    assert left == round(kept / 100 * sum(sizes))
    penalties = [x.kernel_regularizer for x in lenet.layers[-3:]]
    penalties = [penalty and float(penalty.l1) for penalty in penalties]
    assert np.allclose(penalties[:2], 1e-5) and penalties[2] is None
    drop = [x for x in lenet.layers if isinstance(x, keras.layers.Dropout)]
    assert [layer.rate for layer in drop] == [0.1]


def test_the_error_of_lenet_depends_on_its_seed_only(nb, data):
    one, other, again = (nb.lenet_error(data, 5, 1, s) for s in (0, 1, 0))
    assert one == again != other


# cells and their pictures


def test_a_unit_is_shown_as_it_was_and_with_better_weights(nb, data, figures):
    model = nb.build_mlp((30, 64, 48), seed=0)
    run_cell(nb, '"chosen anew"', model=model, mnist=data)
    *first, kernel, _ = model.get_weights()
    read = data.x_train.reshape(-1, 784) / 255
    for weights in first:
        read = np.maximum(read @ weights, 0)
    gone = np.abs(kernel) <= np.sort(np.abs(kernel), axis=None)[round(0.97 * 3072) - 1]
    axes = plt.gcf().axes
    dots = [ax.lines[0].get_xydata() for ax in axes]
    drawn = read[::20]
    unit = np.abs(drawn @ kernel - dots[0][:, :1]).sum(axis=0).argmin()
    keep, wanted = ~gone[:, unit], read @ kernel[:, unit]
    assert keep.sum() == np.sort((~gone).sum(axis=0))[24] > 0
    best = drawn[:, keep] @ np.linalg.lstsq(read[:, keep], wanted)[0]
    for own, expected in zip(dots, (drawn @ (kernel * ~gone)[:, unit], best)):
        assert np.allclose(own, np.transpose([wanted[::20], expected]), atol=1e-4)
    titles = [
        f"{keep.sum()} of 64 weights, {x}" for x in ("as they were", "chosen anew")
    ]
    assert [ax.get_title() for ax in axes] == titles
    for ax in axes:
        assert ax.get_xlabel() == "sum in the dense network"
        assert ax.lines[1].get_slope() == 1 and ax.lines[1].get_xy1() == (0, 0)


def repairing(networks, datasets):
    """Return names that take the place of slow functions; accuracies depend on all."""

    def repair(pruned, dense, images):
        """Note how many of the first training images repair a network pruned."""
        (title,) = (t for t, own in networks.items() if dense in own)
        assert pruned[0] == dense, "what was pruned is repaired"
        assert np.array_equal(images, datasets[title].x_train[: len(images)])
        return *pruned, len(images)

    def accuracy(pruned, *_):
        """Return a number of its own for each way of pruning and repairing."""
        own, rule, sparsity, *images = pruned
        rules = ["weight", "unit", "score", "greedy"]
        return 10 * rules.index(rule) + own / 2 + sparsity + sum(images) / 1e4

    return {
        **{"networks": networks, "datasets": datasets, "repair": repair},
        "prune": lambda own, rule, sparsity: (own, rule, sparsity),
        "test_accuracy": accuracy,
        "check": lambda claim, holds: None,
    }


def test_repaired_networks_are_tabled_as_means(nb, data):
    rows = data._replace(x_train=np.resize(data.x_train, (5001, 28, 28)))
    networks, datasets = {"A": [1, 2], "B": [3, 4]}, {"A": rows, "B": rows}
    cases = [*itertools.product("AB", ("weight", "unit"))]
    columns = pd.MultiIndex.from_tuples([("accuracy", *case) for case in cases])
    shot = np.arange(40).reshape(10, 4) / 100
    given = repairing(networks, datasets)
    given["by_sparsity"] = pd.DataFrame(shot, nb.SPARSITIES, columns)
    names = run_cell(nb, "recovered = ", **given)
    levels, found = [0.8, 0.9, 0.95, 0.97, 0.99], names["recovered"]
    assert names["IMAGES"] == 5000 and names["HIGH"] == [*found] == levels
    ways = "best public", "one-shot", "repaired"
    assert [*found.index] == [(*c, w) for c, w in itertools.product(cases, ways)]
    public = found.xs("best public", level=2)[0.8]
    assert public.tolist() == [97.8, 90.8, 88.0, 66.2]
    for (title, rule), once in zip(cases, shot[5:].T, strict=True):
        assert np.allclose(found.loc[title, rule, "one-shot"], 100 * once)
        for s, mean in found.loc[title, rule, "repaired"].items():
            both = [given["test_accuracy"]((n, rule, s, 5000)) for n in networks[title]]
            assert math.isclose(mean, sum(both) / 2)


def test_repaired_networks_are_drawn_beside_others(nb, data, figures):
    cases = [
        *itertools.product("AB", nb.RULES, ("best public", "one-shot", "repaired"))
    ]
    table = np.arange(60).reshape(12, 5)
    recovered = pd.DataFrame(table, pd.MultiIndex.from_tuples(cases), nb.HIGH)
    baseline = pd.DataFrame({("accuracy", "mean"): [0.9, 0.8]}, [*"AB"])
    given = {"recovered": recovered, "baseline": baseline, "datasets": [*"AB"]}
    run_cell(nb, 'pens["repaired"]', **given)
    for ax, title, best in zip(plt.gcf().axes, "AB", (90, 80), strict=True):
        assert ax.get_title() == title and ax.get_xlim()[0] > 0.7
        *lines, dense = ax.lines
        assert np.allclose(dense.get_ydata(), best)
        looks = {}
        for line in lines:
            way, rule = line.get_label().split(", ")
            own = recovered.loc[title, rule.removesuffix("s"), way]
            assert line.get_ydata().tolist() == own.tolist()
            assert line.get_xdata().tolist() == [*nb.HIGH]
            color = nb.STYLES[rule.removesuffix("s")]["color"]
            assert same_color(line.get_color(), color)
            looks[way, rule] = line.get_linestyle(), line.get_marker()
        assert len(looks) == len(lines) == 6
        assert len({look for (_, rule), look in looks.items() if rule == "units"}) == 3
    (legend,) = plt.gcf().legends
    assert {text.get_text() for text in legend.get_texts()} == {
        line.get_label() for line in lines
    }


def test_fewer_images_are_tried_on_validation_rows(nb, data):
    rows = data._replace(x_train=np.resize(data.x_train, (5001, 28, 28)))
    given = repairing({"A": [7]}, {"A": rows})

    def evaluate(model, images, labels):
        """Return the accuracy on the validation rows."""
        assert images is rows.x_val and labels is rows.y_val
        return {"accuracy": given["test_accuracy"](model) / 100}

    given |= {"model": 7, "mnist": rows, "evaluate": evaluate}
    few = run_cell(nb, "few = {}", **given)["few"]
    assert [*few] == [0, 100, 250, 1000, 5000]
    cases = {
        "95 % of the weights": ("weight", 0.95),
        "90 % of the units": ("unit", 0.9),
    }
    assert {*few.index} == {*cases}
    for name, case in cases.items():
        due = [given["test_accuracy"]((7, *case, n)) for n in few]
        assert np.allclose(few.loc[name], due)


def test_two_lines_prune_a_network_in_training(nb, data, capsys):
    names = run_cell(nb, "halfway = steps_of(", mnist=data)
    assert names["halfway"] == names["rising"].end == 10
    assert round(nb.measured_sparsity(names["sparse"]), 3) == 0.95
    right = nb.evaluate(names["sparse"], data.x_test, data.y_test)["accuracy"]
    said = capsys.readouterr().out
    assert f"95.0% of the weights are zero, {100 * right:.1f} % right" in said


def test_a_schedule_is_drawn_as_planned_and_as_measured(nb, data, figures):
    rising = nb.Pruner("weight", nb.polynomial_sparsity(0.95, 0, 20), frequency=10)
    names = run_cell(nb, "noted = []", mnist=data, rising=rising)
    (ax,) = plt.gcf().axes
    planned, measured = ax.lines
    assert planned.get_xdata().tolist() == measured.get_xdata().tolist() == [10, 20]
    assert np.allclose(planned.get_ydata(), [95 * 7 / 8, 95])
    assert measured.get_drawstyle() == "steps-post"
    assert np.allclose(measured.get_ydata(), 100 * names["is_zero"].mean(axis=1))
    assert np.allclose(measured.get_ydata(), [95 * 7 / 8, 95], atol=0.01)
    assert ax.get_xlabel() == "step of training"
    assert ax.get_ylabel() == "sparsity (%)"
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert labels == ["schedule", "measured"]


def test_a_recovery_is_an_arrow_from_one_shot_to_each_way(nb, figures):
    cases = {
        ("weight", 0.95): {"one-shot": 20, "repaired": 60, "fine-tuned": 90},
        ("unit", 0.9): {"one-shot": 50, "fine-tuned": 80, "from scratch": 45},
    }
    ax = plt.figure().subplots()
    nb.draw_recovery(ax, pd.DataFrame(cases).T, 95)
    titles = {0: "95 % of the weights removed", 4: "90 % of the units removed"}
    rows = {1: ("weight", "one-shot"), 2: ("weight", "repaired")}
    rows |= {3: ("weight", "fine-tuned"), 5: ("unit", "one-shot")}
    rows |= {6: ("unit", "fine-tuned"), 7: ("unit", "from scratch")}
    assert [*ax.get_yticks()] == [*rows]
    ticks = [text.get_text() for text in ax.get_yticklabels()]
    assert ticks == [way for _, way in rows.values()]
    low, high = sorted(ax.get_ylim())
    assert low < 0 and 7 < high and ax.yaxis.get_inverted()
    arrows = {t.xy[1]: t for t in ax.texts if isinstance(t, plt.Annotation)}
    texts = {t.get_position()[1]: t for t in ax.texts if t.get_text()}
    *points, dense = ax.lines
    assert [*dense.get_xdata()] == [95, 95] and dense.get_linestyle() == ":"
    points = {int(y): (x, own) for own in points for x, y in own.get_xydata()}
    assert {*points} == {1, 5, 7} and {*arrows} == {2, 3, 6}
    assert {*texts} == {*titles, *rows}
    for y, (rule, way) in rows.items():
        numbers = next(own for (name, _), own in cases.items() if name == rule)
        color = nb.STYLES[rule]["color"]
        assert texts[y].get_text() == f"{numbers[way]:.1f}"
        if y in arrows:
            assert arrows[y].xy == (numbers[way], y)
            assert arrows[y].xyann == (numbers["one-shot"], y)
            edge = arrows[y].arrow_patch.get_edgecolor()
            assert edge == plt.matplotlib.colors.to_rgba(color)
        else:
            accuracy, point = points[y]
            assert accuracy == numbers[way] and point.get_color() == color
            hollow = point.get_markerfacecolor() == "white"
            assert hollow == (way == "from scratch"), "it was never pruned"
    for y, title in titles.items():
        assert texts[y].get_text() == title


def test_each_data_set_has_its_recovery_drawn(nb, data, recovered, figures):
    test, titles = (data.x_test, data.y_test), (data.title, "another")
    cases = {
        (rule, 0.75): {
            way: nb.evaluate(m, *test)["accuracy"] for way, m in ways.items()
        }
        for rule, ways in recovered.items()
    }
    dense = recovered["unit"]["from scratch"]
    best = 100 * nb.evaluate(dense, *test)["accuracy"]
    table = pd.DataFrame(cases).T
    names = {"frontier": pd.concat([100 * table, 50 * table], keys=titles)}
    names["datasets"] = dict.fromkeys(titles, data)
    names["networks"] = {title: [dense] for title in titles}
    run_cell(nb, "draw_recovery(ax, frontier", **names)
    for ax, title in zip(plt.gcf().axes, titles, strict=True):
        assert ax.get_title() == f"{title}, dense {best:.1f}"
        assert "test accuracy (%)" in ax.get_xlabel()
        found = {t.xy for t in ax.texts if isinstance(t, plt.Annotation)}
        own = names["frontier"].loc[title]
        own = own[["repaired", "fine-tuned", "in training"]].stack()
        assert sorted(x for x, _ in found) == sorted(own)


def test_an_axis_of_errors_gives_every_error_its_room(nb, figures):
    ax = plt.figure().subplots()
    nb.error_axis(ax, [0, 50, 90, 99], 99.5)
    assert [text.get_text() for text in ax.get_xticklabels()] == ["0", "50", "90", "99"]
    transform = ax.xaxis.get_transform()
    accuracies = np.array([0.0, 50, 75, 87.5])
    places = transform.transform(accuracies)
    assert np.allclose(np.diff(places), np.log(2)), "half of the errors, one step"
    assert np.allclose(transform.inverted().transform(places), accuracies)
    low, high = ax.get_xlim()
    assert low == 0 and 99.5 < high < 100


def test_choices_for_repair_are_tabled_as_means(nb, data):
    rows = data._replace(x_train=np.resize(data.x_train, (10_001, 28, 28)))
    networks, datasets = {"A": [1, 2], "B": [3, 4]}, {"A": rows, "B": rows}
    given = repairing(networks, datasets)

    def choosing(name):
        """Return a function that notes that it may look at 10,000 training images."""

        def choose(model, images):
            assert model in (1, 2, 3, 4)
            assert np.array_equal(images, rows.x_train[:10_000])
            return name

        return choose

    cases = [
        *itertools.product("AB", nb.RULES, ("best public", "one-shot", "repaired"))
    ]
    places = pd.MultiIndex.from_tuples(cases)
    recovered = pd.DataFrame(np.arange(60).reshape(12, 5), places, nb.HIGH)
    given |= {"weights_times_inputs": choosing("score"), "Greedy": choosing("greedy")}
    given |= {"ByScores": lambda scores: scores, "recovered": recovered}
    found = run_cell(nb, "choices = ", SEEDS=(0, 1), **given)["choices"]
    levels = [0.8, 0.9, 0.95]
    assert [*found] == [*itertools.product(("one-shot", "repaired"), levels)]
    kinds = {"weight times input": "score", "unit, greedy": "greedy"}
    assert {*found.index} == {*itertools.product("AB", (*nb.RULES, *kinds))}
    for (title, kind), row in found.iterrows():
        for (way, s), mean in row.items():
            if kind in nb.RULES:
                assert mean == recovered.loc[title, kind, way][s]
                continue
            more = (5000,) * (way == "repaired")
            ways = [(own, kinds[kind], s, *more) for own in networks[title]]
            assert math.isclose(mean, sum(map(given["test_accuracy"], ways)) / 2)


def test_grains_are_a_row_each_and_a_point_per_sparsity(nb, data, figures, monkeypatch):
    monkeypatch.setattr(nb, "STAND_IN", True)
    model = nb.build_mlp((32, 64), seed=0)
    names = run_cell(nb, "pieces = {", model=model, mnist=data)
    grains, (ax,) = names["grains"], plt.gcf().axes
    lines = [line for line in ax.lines if line.get_marker() == "o"]
    for line, (_, rows) in zip(lines, grains.groupby("sparsity"), strict=True):
        assert np.allclose(line.get_xdata(), 100 * rows.accuracy)
        assert [*line.get_ydata()] == [0, 1, 2, 3, 4]
    kinds = [text.get_text() for text in ax.get_yticklabels()]
    assert kinds == rows.rule.tolist() == [*names["pieces"]]
    assert ax.yaxis.get_inverted()
    for rule, sparsity in itertools.product(names["pieces"].values(), (0.5, 0.75)):
        pruned = nb.prune(model, rule, sparsity)
        assert abs(nb.measured_sparsity(pruned) - sparsity) < 0.01
    assert ax.get_title() == f"{data.title}, one-shot"
    assert ax.get_xlabel() == "test accuracy (%)"
    assert ax.get_legend().get_title().get_text() == "sparsity"
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert labels == ["50%", "75%"]
