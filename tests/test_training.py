"""Pruning while a model is trained, and rules between weights and units."""

import dataclasses
import itertools
import json
import math
import operator

import keras
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import tensorflow as tf
from conftest import run_cell, run_on_two_devices
from hypothesis import given
from hypothesis import strategies as st

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
    "accumulating": lambda: keras.optimizers.Adam(
        0.01, gradient_accumulation_steps=3
    ),
    "clipping": lambda: keras.optimizers.SGD(
        0.1, momentum=0.9, nesterov=True, global_clipnorm=0.1
    ),
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
    make = {**OPTIMIZERS, **UNUSUAL}[optimizer]
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


def planned(step):
    """Return the number of zeros in each kernel after a step of GOLDEN."""
    due = [sparsity for start, sparsity in GOLDEN.items() if start <= step]
    return rounded(due[-1] if due else 0)


def constraints(model):
    """Return the weights' constraints, masks that keep everything aside."""
    found = [v.constraint for v in model.weights]
    free = [hasattr(c, "mask") and c.mask.numpy().all() for c in found]
    return [c.inner if own else c for c, own in zip(found, free)]


def all_ones(model):
    """Return whether every mask that a model has is one throughout."""
    found = [v.constraint for v in model.weights]
    masks = [c.mask.numpy() for c in found if hasattr(c, "mask")]
    return bool(masks) and all(mask.all() for mask in masks)


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


def prune_here(nb, model, sparsity, choose):
    """Set to zero, in the model itself, a share of the chosen kernels."""
    masks = nb.masks_of(model, nb.weight_mask, sparsity, choose)
    nb.apply_masks(model, masks, choose)


def same(weights, others):
    """Return whether two lists of arrays are equal."""
    return all(np.array_equal(a, b) for a, b in zip(weights, others))


@pytest.fixture
def golden(nb):
    """Return the schedule of GOLDEN."""
    return nb.PolynomialDecay(0.2, 0.8, begin=10, end=30, frequency=5)


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
    model = nb.prune(network(), nb.weight_mask, 0.8)
    before, expected = model.get_weights(), zeros(model)
    assert kernel_zeros(model) == rounded(0.8)
    compiled(model, optimizer)
    for steps in (1, 9, 990):
        watch = Watch(zeros)
        fit(model, steps, nb.ZeroKeeper(), watch)
        assert len(watch.noted) == steps
        assert (np.array(watch.noted) == expected).all()
        assert (zeros(model) == expected).all()
    changed = np.concatenate(
        [(w != v).ravel() for w, v in zip(model.get_weights(), before)]
    )
    assert changed[~expected].mean() > 0.9


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_biases_of_pruned_units_stay_zero(nb, optimizer):
    model = compiled(nb.prune(network(), nb.unit_mask, 0.75), optimizer)
    expected, watch = zeros(model), Watch(zeros)
    biases = [w for w in model.get_weights() if w.ndim == 1]
    assert [(b == 0).sum() for b in biases] == [12, 9, 0]
    fit(model, 12, nb.ZeroKeeper(), watch)
    assert (np.array(watch.noted) == expected).all()
    assert (zeros(model) == expected).all()


@pytest.mark.parametrize("optimizer", [*OPTIMIZERS, *UNUSUAL])
def test_sparsity_follows_the_schedule_after_every_step(nb, golden, optimizer):
    model = compiled(network(), optimizer)
    watch = Watch(lambda model: (kernel_zeros(model), zeros(model)))
    fit(model, 10, nb.Pruner(nb.weight_mask, golden), watch, epochs=4)
    counts, places = zip(*watch.noted)
    assert [*counts] == [planned(step) for step in range(1, STEPS + 1)]
    for before, after in itertools.pairwise(places):
        assert after[before].all(), "a zero has come back"
    assert (zeros(model) == places[-1]).all()


@pytest.mark.parametrize("settings", SETTINGS)
def test_sparsity_follows_the_schedule_however_it_is_run(nb, golden, settings):
    model = compiled(network(), **SETTINGS[settings])
    watch = Watch(lambda m: (int(m.optimizer.iterations), kernel_zeros(m)))
    fit(model, 10, nb.Pruner(nb.weight_mask, golden), watch, epochs=4)
    assert watch.noted[-1][0] == STEPS
    assert watch.noted == [(step, planned(step)) for step, _ in watch.noted]
    assert kernel_zeros(model) == rounded(0.8)


def test_zeros_stay_in_a_model_that_is_run_in_bulk(nb):
    model = nb.prune(network(), nb.unit_mask, 0.5)
    expected, watch = zeros(model), Watch(zeros)
    model = compiled(model, **SETTINGS["XLA, five at once"])
    fit(model, 10, nb.ZeroKeeper(), watch)
    assert (np.array(watch.noted) == expected).all()
    assert (zeros(model) == expected).all()


def test_zeros_stay_in_mixed_precision(nb, golden, half_precision):
    model = compiled(network())
    assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
    watch = Watch(kernel_zeros)
    fit(model, 10, nb.Pruner(nb.weight_mask, golden), watch, epochs=4)
    assert watch.noted == [planned(step) for step in range(1, STEPS + 1)]
    expected, watch = zeros(model), Watch(zeros)
    fit(model, 10, nb.ZeroKeeper(), watch)
    assert (np.array(watch.noted) == expected).all()
    assert (zeros(model) == expected).all()
    fit(model, 10)
    prune_here(nb, model, 0.9, nb.prunable_kernels)
    expected, watch = zeros(model), Watch(zeros)
    fit(model, 10, nb.ZeroKeeper(), watch)
    assert (np.array(watch.noted) == expected).all()


def test_a_constraint_of_the_users_is_applied_and_stays(nb, golden):
    limit = keras.constraints.MaxNorm(0.7, axis=0)
    positive = keras.constraints.NonNeg()
    model = network(kernel_constraint=limit, bias_constraint=positive)
    model = compiled(model, "momentum")
    own, watch = constraints(model), Watch(lambda m: m.get_weights())
    assert own == [limit, positive] * 2 + [None] * 2
    fit(model, STEPS, nb.Pruner(nb.unit_mask, golden), watch)
    for weights in (*watch.noted, model.get_weights()):
        for kernel, bias in (weights[0:2], weights[2:4]):
            assert np.linalg.norm(kernel, axis=0).max() < 0.701
            assert (bias >= 0).all()
    biases = model.get_weights()[1:4:2]
    assert [np.count_nonzero(bias == 0) for bias in biases] == [13, 10]
    for before, after in zip(own, constraints(model)):
        assert before is after


def test_masks_follow_a_schedule_that_gives_weights_back(nb):
    schedule = {0: 0.8, 5: 0.25}.get
    model, watch = compiled(network(activation="tanh")), Watch(kernel_zeros)
    fit(model, 20, nb.Pruner(nb.weight_mask, schedule), watch)
    assert watch.noted[:5] == [rounded(0.8)] * 5
    assert watch.noted[-1] == kernel_zeros(model) == rounded(0.25)


def test_a_model_that_was_trained_before_is_held(nb):
    model = compiled(network(activation="tanh"))
    fit(model, 3)
    prune_here(nb, model, 0.7, nb.prunable_kernels)
    expected, watch = zeros(model), Watch(zeros)
    fit(model, 5, nb.ZeroKeeper(), watch)
    assert (np.array(watch.noted) == expected).all()
    fit(model, 5)
    assert kernel_zeros(model) == [0, 0], "nothing is held any longer"
    fit(model, 5, nb.Pruner(nb.weight_mask, nb.ConstantSparsity(0.6)))
    assert kernel_zeros(model) == rounded(0.6)


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
def test_a_model_is_held_as_often_as_one_likes(nb, between, settings):
    model = compiled(network(activation="tanh"), **SETTINGS[settings])
    for sparsity in (0.2, 0.7, 0.4):
        prune_here(nb, model, sparsity, nb.prunable_kernels)
        expected, watch = zeros(model), Watch(zeros)
        fit(model, 5, nb.ZeroKeeper(), watch)
        assert (np.array(watch.noted) == expected).all()
        assert (zeros(model) == expected).all()
        assert constraints(model) == [None] * 6 and all_ones(model)
        BETWEEN[between](model)
        assert kernel_zeros(model) == [0, 0] or "training" not in between


def test_a_model_is_held_on_batches_that_it_saw_when_it_was_free(nb):
    model = compiled(network(activation="tanh"))
    fit(model, 2, nb.ZeroKeeper())
    model.fit(ROWS[:16], LABELS[:16], verbose=0)
    prune_here(nb, model, 0.5, nb.prunable_kernels)
    expected, watch = zeros(model), Watch(zeros)
    callbacks = [nb.ZeroKeeper(), watch]
    model.fit(ROWS[:16], LABELS[:16], verbose=0, callbacks=callbacks)
    assert (np.array(watch.noted) == expected).all()


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("name", ["Pruner", "ZeroKeeper"])
def test_training_after_holding_is_ordinary_training(nb, name, again):
    model = compiled(network(activation="tanh"))
    schedule = nb.ConstantSparsity(0.5, frequency=2)
    options = (nb.weight_mask, schedule) if name == "Pruner" else ()
    prune_here(nb, model, 0.3, nb.prunable_kernels)
    fit(model, 5, getattr(nb, name)(*options))
    model = compiled(model) if again else model
    model.optimizer.build(model.trainable_variables)
    other = twin(model)
    for part in (model, other):
        fit(part, 9)
    for own, weight in zip(model.get_weights(), other.get_weights()):
        assert np.allclose(own, weight, atol=1e-6)
    assert kernel_zeros(model) == [0, 0]


def test_a_model_is_held_by_hand_until_it_is_released(nb):
    model = network(activation="tanh")
    nb.hold(model, nb.unit_mask, 0.5)
    expected = zeros(model)
    assert kernel_zeros(model) == rounded(0.5)
    for _ in range(2):
        fit(compiled(model), 3)
        assert (zeros(model) == expected).all()
    nb.release(model)
    assert (zeros(model) == expected).all()
    assert constraints(model) == [None] * 6 and all_ones(model)
    fit(model, 3)
    assert kernel_zeros(model) == [0, 0]


@pytest.mark.parametrize("settings", ["plain", "XLA", "five at once"])
def test_a_training_step_is_compiled_for_the_first_holding_only(nb, settings):
    model = compiled(network(activation="tanh"), **SETTINGS[settings])
    traced = traces(model)
    fit(model, 5, nb.ZeroKeeper())
    first = len(traced)
    assert first
    for sparsity in (0.3, 0.8):
        prune_here(nb, model, sparsity, nb.prunable_kernels)
        fit(model, 5, nb.ZeroKeeper())
        schedule = nb.ConstantSparsity(sparsity, frequency=1)
        fit(model, 5, nb.Pruner(nb.unit_mask, schedule))
    assert len(traced) == first


def test_changing_masks_compiles_nothing(nb, golden):
    model = compiled(network())
    traced, watch = traces(model), Watch(lambda model: len(traced))
    fit(model, STEPS, nb.Pruner(nb.weight_mask, golden), watch)
    assert {*watch.noted} == {len(traced)}


def test_what_is_chosen_may_change_between_trainings(nb):
    model = compiled(network(activation="tanh"))
    kernels = nb.all_kernels(model)
    for chosen in ((0, 1), (0, 1, 2), (0,), (1, 2), (2,), (0, 1)):
        prune_here(nb, model, 0.5, nb.all_kernels)
        keeper = nb.ZeroKeeper(lambda _, c=chosen: [kernels[i] for i in c])
        before = [kernel.numpy() == 0 for kernel in kernels]
        fit(model, 5, keeper)
        for number, (kernel, expected) in enumerate(zip(kernels, before)):
            expected = expected & (number in chosen)
            assert ((kernel.numpy() == 0) == expected).all()
        assert constraints(model) == [None] * 6 and all_ones(model)


def test_a_constraint_may_be_set_and_changed_between_trainings(nb):
    model = compiled(network(activation="tanh"))
    kernels = nb.prunable_kernels(model)
    positive, short = keras.constraints.NonNeg(), keras.constraints.MaxNorm(1)
    for own in (None, positive, short, positive, None):
        for kernel in kernels:
            kernel.constraint = own
            kernel.assign(kernel_of(kernel.shape))
        prune_here(nb, model, 0.5, nb.prunable_kernels)
        expected, watch = zeros(model), Watch(lambda m: m.get_weights()[:3:2])
        fit(model, 3, nb.ZeroKeeper(), watch)
        for kernel in (k for noted in watch.noted for k in noted):
            assert (kernel >= 0).all() == (own is positive)
            norms = np.linalg.norm(kernel, axis=0)
            assert (norms.max() < 1.001) == (own is short)
        assert zeros(model)[expected].all()
        assert constraints(model)[:4:2] == [own] * 2


def test_a_constraint_set_later_is_applied_after_a_new_compile(nb):
    model = compiled(network(activation="tanh"))
    fit(model, 3, nb.ZeroKeeper())
    kernel = model.layers[0].kernel
    kernel.constraint = keras.constraints.NonNeg()
    for callbacks in ([], [nb.ZeroKeeper()], []):
        kernel.assign(kernel_of(kernel.shape))
        watch = Watch(lambda model: kernel.numpy().min())
        fit(compiled(model), 3, *callbacks, watch)
        assert min(watch.noted) >= 0


@pytest.mark.parametrize("steps", [0, 1, 5])
@pytest.mark.parametrize("again", [False, True])
def test_an_interrupted_training_is_forgotten(nb, steps, again):
    model = compiled(network(activation="tanh"))
    prune_here(nb, model, 0.5, nb.prunable_kernels)
    expected = zeros(model)
    with pytest.raises(KeyboardInterrupt):
        fit(model, 10, nb.ZeroKeeper(), Interrupt(steps))
    assert (zeros(model) == expected).all()
    nb.release(model)
    assert (zeros(model) == expected).all()
    assert constraints(model) == [None] * 6 and all_ones(model)
    model = compiled(model) if again else model
    fit(model, 5)
    assert kernel_zeros(model) == [0, 0]
    prune_here(nb, model, 0.3, nb.prunable_kernels)
    expected, watch = zeros(model), Watch(zeros)
    fit(model, 5, nb.ZeroKeeper(), watch)
    assert (np.array(watch.noted) == expected).all()


def test_a_training_without_epochs_changes_nothing(nb):
    model = compiled(network(activation="tanh"))
    before = model.get_weights()
    fit(model, 5, nb.ZeroKeeper(), epochs=1, initial_epoch=1)
    assert same(model.get_weights(), before)
    fit(model, 5)
    prune_here(nb, model, 0.5, nb.prunable_kernels)
    watch = Watch(kernel_zeros)
    fit(model, 5, nb.ZeroKeeper(), watch)
    assert watch.noted == [rounded(0.5)] * 5


def test_an_interrupted_training_leaves_no_old_masks(nb):
    model = compiled(network(activation="tanh"))
    first = nb.Pruner(nb.weight_mask, nb.ConstantSparsity(0.5))
    with pytest.raises(KeyboardInterrupt):
        fit(model, 10, first, Interrupt())
    assert kernel_zeros(model) == rounded(0.5)
    second = nb.Pruner(nb.weight_mask, nb.ConstantSparsity(0.3, begin=8))
    watch = Watch(kernel_zeros)
    fit(model, 10, second, watch)
    assert watch.noted[6:] == [[0, 0], *[rounded(0.3)] * 3]
    assert constraints(model) == [None] * 6


def test_kernels_that_are_no_longer_chosen_are_set_free(nb):
    model = compiled(network(activation="tanh"))
    schedule = nb.ConstantSparsity(0.5)
    first = nb.Pruner(nb.weight_mask, schedule, nb.all_kernels)
    with pytest.raises(KeyboardInterrupt):
        fit(model, 10, first, Interrupt())
    assert (model.layers[-1].kernel.numpy() == 0).sum() == 18
    fit(model, 10, nb.Pruner(nb.weight_mask, schedule))
    assert model.layers[-1].kernel.numpy().all()


def test_a_frozen_layer_is_set_free_too(nb):
    model = network()
    model.layers[0].trainable = False
    fit(compiled(model), 3, nb.Pruner(nb.weight_mask, nb.ConstantSparsity(1)))
    assert constraints(model) == [None] * 6


def test_what_training_leaves_is_an_ordinary_model(nb, golden, tmp_path):
    model, path = compiled(network()), tmp_path / "pruned.keras"
    fit(model, STEPS, nb.Pruner(nb.weight_mask, golden))
    plain = compiled(network())
    fit(plain, 1)
    assert constraints(model) == [None] * 6
    for part, other in ((model, plain), (model.optimizer, plain.optimizer)):
        shapes = [v.shape for v in part.variables]
        assert shapes == [v.shape for v in other.variables]
    assert "Held" not in json.dumps([model.to_json(), model.get_config()])
    model.save(path)
    loaded = keras.models.load_model(path, safe_mode=True)
    assert (loaded.predict(ROWS) == model.predict(ROWS)).all()
    assert kernel_zeros(loaded) == rounded(0.8)


def test_a_checkpoint_taken_on_the_way_is_sparse(nb, golden, tmp_path):
    path = tmp_path / "epoch_{epoch}.keras"
    checkpoint = keras.callbacks.ModelCheckpoint(path)
    pruner = nb.Pruner(nb.weight_mask, golden)
    fit(compiled(network()), 10, pruner, checkpoint, epochs=4)
    for epoch in (1, 2, 3, 4):
        name = str(path).format(epoch=epoch)
        loaded = keras.models.load_model(name, safe_mode=True)
        assert kernel_zeros(loaded) == planned(10 * epoch)


def test_zeros_that_were_held_have_no_sign(nb, golden):
    model = compiled(network(activation="tanh"))
    fit(model, STEPS, nb.Pruner(nb.weight_mask, golden))
    for weights in model.get_weights():
        assert not np.signbit(weights[weights == 0]).any()


@pytest.mark.parametrize("rule", ["weight_mask", "unit_mask"])
def test_fine_tuning_keeps_exactly_the_zeros(nb, data, model, rule):
    pruned = nb.prune(model, getattr(nb, rule), 0.8)
    before, expected = pruned.get_weights(), zeros(pruned)
    tuned = nb.fine_tune(pruned, data, 2, seed=0)
    assert (zeros(tuned) == expected).all()
    assert same(pruned.get_weights(), before)
    assert not same(tuned.get_weights(), before)
    after, before = (nb.evaluate(m, data)["loss"] for m in (tuned, pruned))
    assert after < before


def test_trainings_of_all_kinds_do_not_touch_each_other(nb, data, model):
    pruned = nb.prune(model, nb.unit_mask, 0.5)
    dense = nb.build_mlp((12, 8), seed=1)
    arguments = (data, nb.weight_mask, 0.8, 1, 3)
    ways = (
        lambda: nb.train(dense, data, 1, 3),
        lambda: nb.fine_tune(pruned, data, 1, 3),
        lambda: nb.prune_in_training(dense, *arguments),
        lambda: nb.prune_in_training(dense, *arguments, choose=nb.all_kernels),
    )
    alone = []
    for way in ways:
        nb.learner_for.cache_clear()
        alone.append(way().get_weights())
    all_pairs = (0, 1, 2, 3, 1, 3, 0, 2, 1, 0, 3, 2, 0)
    for number in all_pairs:
        assert same(ways[number]().get_weights(), alone[number])
    with pytest.raises(KeyboardInterrupt):
        nb.train(pruned, data, 1, 3, [nb.ZeroKeeper(), Interrupt(3)])
    assert same(ways[0]().get_weights(), alone[0])


def test_fine_tuning_again_compiles_nothing(nb, data, model):
    nb.learner_for.cache_clear()
    learner, _ = nb.learner_for(model.to_json(), nb.LEARNING_RATE)
    traced = traces(learner)
    for sparsity in (0.3, 0.8, 0.5):
        pruned = nb.prune(model, nb.weight_mask, sparsity)
        tuned = nb.fine_tune(pruned, data, 2, seed=0)
        assert (zeros(tuned) == zeros(pruned)).all()
        assert constraints(learner) == [None] * 3 and all_ones(learner)
        if sparsity == 0.3:
            first = len(traced)
    assert first == len(traced) > 0


DISTRIBUTED = """
import contextlib
from test_training import *
strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
assert strategy.num_replicas_in_sync == 2
for scope in (contextlib.nullcontext(), strategy.scope()):
    with scope:
        model = compiled(network(activation="tanh"))
    traced, rows = traces(model), (ROWS, LABELS, 16, 5, 0)
    schedule = nb.PolynomialDecay(0.2, 0.8, 2, 6, power=1, frequency=2)
    watch = Watch(kernel_zeros)
    pruner = nb.Pruner(nb.weight_mask, schedule)
    model.fit(*rows, callbacks=[pruner, watch], shuffle=False)
    shares = (0, 0.2, 0.2, 0.5, 0.5, 0.8, 0.8, 0.8, 0.8, 0.8)
    assert watch.noted == [rounded(share) for share in shares]
    assert kernel_zeros(model) == rounded(0.8)
    assert constraints(model) == [None] * 6 and all_ones(model)
    weights.append(model.get_weights())
    model.fit(*rows, shuffle=False)
    assert kernel_zeros(model) == [0, 0]
    prune_here(nb, model, 0.3, nb.prunable_kernels)
    expected, before, watch = zeros(model), len(traced), Watch(zeros)
    model.fit(*rows, callbacks=[nb.ZeroKeeper(), watch], shuffle=False)
    assert (np.array(watch.noted) == expected).all()
    assert len(traced) == before
    weights.append(model.get_weights())
for single, mirrored in ((0, 2), (1, 3)):
    for own, other in zip(weights[single], weights[mirrored]):
        assert np.allclose(own, other, atol=1e-4)
        assert ((own == 0) == (other == 0)).all()
"""


def test_zeros_stay_on_two_devices():
    run_on_two_devices(DISTRIBUTED)


# the callbacks' manners


def test_the_sparsity_is_logged_for_every_epoch(nb, golden, tmp_path):
    logger = keras.callbacks.CSVLogger(tmp_path / "log.csv")
    pruner = nb.Pruner(nb.weight_mask, golden)
    history = fit(compiled(network()), 10, pruner, logger, epochs=4)
    steps = (10, 20, 30, 40)
    expected = [sum(planned(step)) / sum(SIZES) for step in steps]
    assert np.allclose(history["sparsity"], expected)
    log = pd.read_csv(tmp_path / "log.csv")
    assert np.allclose(log.sparsity, expected)
    assert {"epoch", "loss"} < {*log.columns}


def test_the_keeper_logs_the_sparsity_of_what_it_watches(nb):
    model = compiled(nb.prune(network(), nb.weight_mask, 0.5, nb.all_kernels))
    for choose in (nb.all_kernels, nb.prunable_kernels):
        history = fit(model, 2, nb.ZeroKeeper(choose), epochs=3)
        assert history["sparsity"] == [0.5] * 3


def test_training_may_start_at_a_later_epoch(nb, golden):
    model, watch = compiled(network()), Watch(kernel_zeros)
    schedule = dataclasses.replace(golden, begin=0, end=20)
    pruner = nb.Pruner(nb.weight_mask, schedule)
    fit(model, 10, pruner, watch, epochs=5, initial_epoch=3)
    expected = [rounded(GOLDEN[10 + step // 5 * 5]) for step in range(1, 21)]
    assert watch.noted == expected


def test_a_pruner_can_be_used_again(nb, golden):
    pruner = nb.Pruner(nb.weight_mask, golden)
    for seed in (0, 1):
        watch = Watch(kernel_zeros)
        fit(compiled(network(seed)), STEPS, pruner, watch)
        assert watch.noted == [planned(s) for s in range(1, STEPS + 1)]


@pytest.mark.parametrize(
    "settings, numbers, options",
    [
        ({"begin": 21, "end": 30}, (30, 20), {"epochs": 2}),
        ({"begin": 10, "end": 30}, (30, 20), {"epochs": 2}),
        ({"begin": 0, "end": 21}, (21, 20), {"epochs": 2}),
        ({"begin": 0, "end": 11}, (11, 10), {"epochs": 8, "initial_epoch": 7}),
        ({"target": 0.5, "begin": 21}, (21, 20), {"epochs": 2}),
        ({"target": 0.5, "begin": 7, "end": 42}, (42, 20), {"epochs": 2}),
    ],
)
def test_a_schedule_that_cannot_be_followed_is_refused(
    nb, settings, numbers, options
):
    if "target" in settings:
        schedule = nb.ConstantSparsity(**settings)
    else:
        schedule = nb.PolynomialDecay(0.2, 0.8, **settings)
    model, watch = compiled(network()), Watch(zeros)
    before = model.get_weights()
    with pytest.raises(ValueError) as error:
        fit(model, 10, nb.Pruner(nb.weight_mask, schedule), watch, **options)
    assert all(str(number) in str(error.value) for number in numbers)
    assert not watch.noted and same(model.get_weights(), before)
    assert constraints(model) == [None] * 6


@pytest.mark.parametrize("settings", [{"end": 20}, {"begin": 20, "end": 20}])
def test_a_schedule_may_end_with_the_last_step(nb, settings):
    schedule = nb.PolynomialDecay(0.2, 0.8, **{"begin": 0, **settings})
    model = compiled(network())
    fit(model, 10, nb.Pruner(nb.weight_mask, schedule), epochs=2)
    assert kernel_zeros(model) == rounded(0.8)


@pytest.mark.parametrize("name", ["Pruner", "ZeroKeeper"])
def test_a_model_with_nothing_to_prune_is_named(nb, name):
    ends = [keras.Input((8,)), keras.layers.Dense(3)]
    model = compiled(keras.Sequential(ends, name="tiny"))
    before = model.get_weights()
    options = (nb.weight_mask, nb.ConstantSparsity(0.5))
    callback = getattr(nb, name)(*(options if name == "Pruner" else ()))
    with pytest.raises(ValueError, match="tiny"):
        fit(model, 2, callback)
    assert same(model.get_weights(), before)


@pytest.mark.filterwarnings("ignore:Your input ran out of data")
def test_data_of_unknown_length_are_trained_on(nb, golden):
    for steps in (20, STEPS):
        model, watch = compiled(network()), Watch(kernel_zeros)
        generator = ((ROWS, LABELS) for _ in range(steps))
        callbacks = [nb.Pruner(nb.weight_mask, golden), watch]
        model.fit(generator, callbacks=callbacks, shuffle=False, verbose=0)
        assert watch.noted == [planned(s) for s in range(1, steps + 1)]


# schedules


def due_steps(schedule, last):
    """Return the steps, up to the last, at which a schedule is due."""
    return [s for s in range(last + 1) if schedule(s) is not None]


def test_polynomial_decay_has_the_golden_values(golden):
    assert due_steps(golden, 100) == [*GOLDEN]
    for step, sparsity in GOLDEN.items():
        assert math.isclose(golden(step), sparsity)


def test_constant_sparsity_is_due_at_begin_multiples_and_end(nb):
    schedule = nb.ConstantSparsity(0.7, begin=3, end=14, frequency=4)
    assert due_steps(schedule, 40) == [3, 7, 11, 14]
    assert {schedule(step) for step in (3, 7, 11, 14)} == {0.7}
    endless = nb.ConstantSparsity(0.7, begin=3, frequency=4)
    assert due_steps(endless, 40) == [*range(3, 41, 4)]
    assert due_steps(nb.ConstantSparsity(0.7), 250) == [0, 100, 200]


@given(
    st.floats(0, 1),
    st.floats(0, 1),
    st.integers(0, 30),
    st.integers(0, 30),
    st.sampled_from([1, 2, 3, 0.5]),
    st.integers(1, 12),
)
def test_polynomial_decay_is_the_formula(
    nb, initial, final, begin, length, power, frequency
):
    end = begin + length
    decay = nb.PolynomialDecay(initial, final, begin, end, power, frequency)
    constant = nb.ConstantSparsity(final, begin, end, frequency)
    due = sorted({*range(begin, end + 1, frequency), end})
    assert due_steps(decay, end + 30) == due_steps(constant, end + 30) == due
    for step in due:
        progress = (step - begin) / length if length else 1
        expected = final + (initial - final) * (1 - progress) ** power
        assert math.isclose(decay(step), expected, abs_tol=1e-12)
        assert 0 <= decay(step) <= 1
        assert constant(step) == final
    assert decay(end) == final


def test_a_power_of_one_is_a_straight_line(nb):
    decay = nb.PolynomialDecay(0.1, 0.9, 0, 8, power=1, frequency=2)
    values = [decay(step) for step in (0, 2, 4, 6, 8)]
    assert np.allclose(values, [0.1, 0.3, 0.5, 0.7, 0.9])


def test_a_schedule_of_one_step_goes_to_the_end_at_once(nb):
    decay = nb.PolynomialDecay(0.1, 0.9, 5, 5)
    assert due_steps(decay, 200) == [5] and decay(5) == 0.9


@pytest.mark.parametrize("sparsity", [1.2, -0.1, math.nan, math.inf])
def test_a_sparsity_out_of_range_is_named(nb, sparsity):
    for make in (
        lambda: nb.ConstantSparsity(sparsity),
        lambda: nb.PolynomialDecay(sparsity, 0.8, 0, 10),
        lambda: nb.PolynomialDecay(0.2, sparsity, 0, 10),
    ):
        with pytest.raises(ValueError, match=str(sparsity)):
            make()


@pytest.mark.parametrize(
    "settings, names",
    [
        ({"begin": 11, "end": 10}, ("11", "10")),
        ({"begin": -1, "end": 10}, ("-1", "10")),
        ({"begin": 0, "end": 10, "frequency": 0}, ("frequency", "0")),
        ({"begin": 0, "end": 10, "frequency": -5}, ("frequency", "-5")),
        ({"begin": 0, "end": -2}, ("0", "-2")),
    ],
)
def test_impossible_settings_are_named(nb, settings, names):
    for make in (nb.ConstantSparsity, nb.PolynomialDecay):
        sparsities = (0.8,) if make is nb.ConstantSparsity else (0.2, 0.8)
        with pytest.raises(ValueError) as error:
            make(*sparsities, **settings)
        assert all(name in str(error.value) for name in names)


def test_only_a_constant_sparsity_may_have_no_end(nb):
    for initial in (0.2, 0.8):
        with pytest.raises(ValueError):
            nb.PolynomialDecay(initial, 0.8, 0, -1)


def test_schedules_are_values(nb, golden):
    constant = nb.ConstantSparsity(0.7)
    for schedule, text in (
        (constant, "target=0.7, begin=0, end=-1, frequency=100"),
        (golden, "initial=0.2, final=0.8, begin=10, end=30, power=3, freq"),
    ):
        assert repr(schedule).startswith(f"{type(schedule).__name__}({text}")
        assert schedule == dataclasses.replace(schedule)
        assert schedule != dataclasses.replace(schedule, frequency=7)
        assert len({schedule, dataclasses.replace(schedule)}) == 1
        with pytest.raises(dataclasses.FrozenInstanceError):
            schedule.begin = 1
    assert constant(-1) is None


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
def test_blocks_are_removed_as_by_hand(
    nb, shape, draws, pooling, sparsity, seed
):
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
        "together": nb.Together(nb.magnitudes),
    }


KINDS = ("blocks", "largest blocks", "n:m", "together")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sparsity", [1.01, -0.5, math.nan, "half", None])
def test_no_rule_takes_a_sparsity_out_of_range(nb, kind, sparsity):
    with pytest.raises(ValueError, match="sparsity"):
        makers(nb)[kind](kernel_of((4, 6)), sparsity)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_no_rule_ranks_what_is_not_finite(nb, kind, value):
    kernel = kernel_of((4, 6))
    kernel[2, 3] = value
    with pytest.raises(ValueError, match=str(value)):
        makers(nb)[kind](kernel, 0.5)


@pytest.mark.parametrize("kind", KINDS)
def test_every_rule_leaves_the_kernel_and_knows_its_ends(nb, kind):
    kernel, rule = kernel_of((4, 6)), makers(nb)[kind]
    before = kernel.copy()
    assert rule(kernel, 0).all()
    assert kind == "n:m" or not rule(kernel, 1).any()
    assert (kernel == before).all()


@pytest.mark.parametrize("kind", KINDS)
def test_every_rule_works_in_prune(nb, kind):
    model, rule = network(), makers(nb)[kind]
    before = model.get_weights()
    pruned = nb.prune(model, rule, 0.5, nb.all_kernels)
    kernels = [w for w in pruned.get_weights() if w.ndim > 1]
    masks = nb.masks_of(model, rule, 0.5, nb.all_kernels)
    for kernel, mask, dense in zip(kernels, masks, before[::2]):
        assert (kernel == dense * mask).all() and not mask.all()
    assert same(model.get_weights(), before)


@pytest.mark.parametrize("kind", KINDS)
def test_every_rule_works_in_a_sweep(nb, data, model, kind):
    few = {"x_test": data.x_test[:50], "y_test": data.y_test[:50]}
    data, rule = dataclasses.replace(data, **few), makers(nb)[kind]
    table = nb.sweep(model, data, {kind: rule}, (0, 0.5))
    pruned = nb.prune(model, rule, 0.5)
    assert table.rule.tolist() == [kind] * 2
    assert np.allclose(table.loss[1], nb.evaluate(pruned, data)["loss"])
    assert abs(nb.measured_sparsity(pruned) - 0.5) < 0.01
    left = (nb.compact(m).get_weights() for m in (model, pruned))
    expected = [sum(np.count_nonzero(w) for w in weights) for weights in left]
    assert table.parameters.tolist() == expected


@pytest.mark.parametrize("kind", KINDS)
def test_every_rule_works_while_training(nb, kind):
    model, rule = compiled(network()), makers(nb)[kind]
    choose, watch = nb.all_kernels, Watch(zeros)
    schedule = nb.ConstantSparsity(0.5, begin=2, end=8, frequency=3)
    fit(model, 10, nb.Pruner(rule, schedule, choose), watch)
    kernels = [kernel.numpy() for kernel in choose(model)]
    for kernel, mask in zip(kernels, nb.masks_of(model, rule, 0.5, choose)):
        assert (mask == (kernel != 0)).all()
    for before, after in itertools.pairwise(watch.noted):
        assert after[before].all(), "a zero has come back"


# ranked together


def slow_together(kernels, sparsity):
    """Return the masks that `Together` should make of magnitudes."""
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
    masks = nb.Together(nb.magnitudes).masks(kernels, sparsity)
    assert same(masks, slow_together(kernels, sparsity))
    assert [m.shape for m in masks] == [k.shape for k in kernels]
    size = sum(kernel.size for kernel in kernels)
    assert sum((~mask).sum() for mask in masks) == round(sparsity * size)


@given(st.floats(0, 1), st.integers(0, 99))
def test_one_kernel_together_is_one_by_itself(nb, sparsity, seed):
    kernel = np.round(kernel_of((7, 5), seed), 1)
    mask = nb.Together(nb.magnitudes)(kernel, sparsity)
    assert (mask == nb.weight_mask(kernel, sparsity)).all()


@pytest.mark.parametrize("choose", ["prunable_kernels", "all_kernels"])
def test_a_model_pruned_together_has_the_sparsity_asked_for(nb, choose):
    choose, rule = getattr(nb, choose), nb.Together(nb.magnitudes)
    model = network()
    model.layers[0].kernel.assign(10 * model.layers[0].kernel)
    pruned = nb.prune(model, rule, 0.6, choose)
    size = sum(math.prod(k.shape) for k in choose(model))
    assert nb.measured_sparsity(pruned, choose) == round(0.6 * size) / size
    first, second = kernel_zeros(pruned)
    assert first / SIZES[0] < 0.2 < 0.8 < second / SIZES[1]


def test_units_are_ranked_together(nb, golden):
    rule = nb.Together(nb.unit_norms)
    masks = rule.masks([kernel_of((3, 6)), 5 * kernel_of((4, 2))], 0.5)
    assert [m.shape for m in masks] == [(3, 6), (4, 2)]
    assert [int(m.all(axis=0).sum()) for m in masks] == [2, 2]
    model = compiled(network())
    fit(model, STEPS, nb.Pruner(rule, golden))
    norms = [np.linalg.norm(k, axis=0) for k in model.get_weights()[:4:2]]
    assert sum((norm == 0).sum() for norm in norms) == round(0.8 * 28)


# experiments


def test_gradual_pruning_ends_after_three_fifths_of_the_training(nb, data):
    assert len(nb.holdout(data).x_train) == 1189, "ten batches of 128"
    for epochs, due in ((1, [0, 6]), (4, [0, 20, 24]), (10, [0, 20, 40, 60])):
        schedule = nb.gradual(0.9, data, epochs)
        assert due_steps(schedule, 10 * epochs) == due
        shares = [0.9 * (1 - (1 - step / due[-1]) ** 3) for step in due]
        assert np.allclose([schedule(step) for step in due], shares)


def test_pruning_in_training_takes_the_planned_way(nb, data, model):
    before, watch = model.get_weights(), Watch(nb.measured_sparsity)
    pruner = nb.Pruner(nb.weight_mask, nb.gradual(0.9, data, 4))
    watched = nb.train(model, data, 4, 0, [pruner, watch])
    pruned = nb.prune_in_training(model, data, nb.weight_mask, 0.9, 4, 0)
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
    options = {"choose": nb.all_kernels}
    pruned = nb.prune_in_training(
        model, data, nb.Together(nb.magnitudes), 0.9, 1, 0, **options
    )
    size = 784 * 12 + 12 * 8 + 8 * 10
    sparsity = nb.measured_sparsity(pruned, **options)
    assert math.isclose(sparsity, round(0.9 * size) / size)


@pytest.mark.parametrize("epochs", [1, 2])
def test_pruning_in_training_is_repeatable(nb, data, model, epochs):
    one, two = (
        nb.prune_in_training(model, data, nb.unit_mask, 0.75, epochs, 3)
        for _ in range(2)
    )
    assert same(one.get_weights(), two.get_weights())
    assert nb.compact(one).layers[-3].units == 3


@pytest.fixture(scope="module")
def recovered(nb, data):
    """Return two prunings of a small network, with their ways back."""
    model = nb.train(nb.build_mlp((12, 8), seed=0), data, 2, 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nb, "EPOCHS", 1)
        return {
            name: dict(nb.recover(model, data, rule, 0.75, 1, 0))
            for name, rule in nb.RULES.items()
        }


@pytest.fixture(scope="module")
def frontier(nb, data, recovered):
    """Return the measures of what was recovered, a row per network."""
    return pd.DataFrame(
        [
            {"data": data.title, "rule": rule, "sparsity": 0.75, "way": way}
            | nb.evaluate(model, data)
            for rule, ways in recovered.items()
            for way, model in ways.items()
        ]
    )


def test_each_rule_has_its_ways_back(recovered):
    ways = ["one-shot", "fine-tuned", "in training"]
    assert [*recovered["weight"]] == ways
    assert [*recovered["unit"]] == [*ways, "from scratch"]


def test_recovered_networks_are_as_sparse_as_the_pruned_one(recovered):
    ways = recovered["weight"]
    assert (zeros(ways["fine-tuned"]) == zeros(ways["one-shot"])).all()
    for model in ways.values():
        kernels = model.get_weights()[:-1]
        assert sum(np.count_nonzero(k) for k in kernels) <= 2352 + 24
    for model in recovered["unit"].values():
        shapes = [w.shape for w in model.get_weights()]
        assert shapes == [(784, 3), (3, 2), (2, 10)]


def test_a_network_from_scratch_is_an_ordinary_one(nb, data, recovered):
    start = nb.build_mlp((3, 2), seed=0)
    expected = nb.train(start, data, 2, 0).get_weights()
    weights = [model.get_weights() for model in recovered["unit"].values()]
    assert same(weights[-1], expected)
    assert not any(same(expected, others) for others in weights[:-1])


def test_ways_back_from_one_pruning_are_what_they_are_called(nb, data, model):
    ways = dict(nb.recover(model, data, nb.weight_mask, 0.5, 1, 4))
    small = nb.compact(nb.prune(model, nb.weight_mask, 0.5))
    tuned = nb.fine_tune(small, data, 1, 4)
    later = nb.prune_in_training(model, data, nb.weight_mask, 0.5, 1, 4)
    expected = (small, tuned, nb.compact(later))
    for way, own in zip(ways.values(), expected):
        assert same(way.get_weights(), own.get_weights())


@pytest.mark.parametrize("kept", [5, 2])
def test_the_error_of_lenet_is_that_of_a_network_so_sparse(
    nb, data, monkeypatch, kept
):
    evaluate, evaluated = nb.evaluate, []
    monkeypatch.setattr(
        nb, "evaluate", lambda *pair: evaluated.append(pair) or evaluate(*pair)
    )
    error = nb.lenet_error(data, kept, 1, 3)
    ((lenet, rows),) = evaluated
    measures = evaluate(lenet, data)
    assert rows is data
    assert math.isclose(error, 100 * (1 - measures["accuracy"]))
    sizes = [w.size for w in lenet.get_weights()]
    assert sizes == [784 * 300, 300 * 100, 100 * 10]
    assert measures["parameters"] == round(kept / 100 * sum(sizes))
    penalties = [x.kernel_regularizer for x in lenet.layers[-3:]]
    penalties = [penalty and float(penalty.l1) for penalty in penalties]
    assert np.allclose(penalties[:2], nb.LENET_L1) and penalties[2] is None
    drop = [x for x in lenet.layers if isinstance(x, keras.layers.Dropout)]
    assert [layer.rate for layer in drop] == [nb.LENET_DROPOUT]


def test_the_error_of_lenet_depends_on_its_seed_only(nb, data):
    one, other, again = (nb.lenet_error(data, 5, 1, s) for s in (0, 1, 0))
    assert one == again != other


def test_a_schedule_is_drawn_as_planned_and_as_measured(nb, data, figures):
    names = run_cell(nb, "gradual(0.95, mnist, 2)", mnist=data)
    (ax,) = plt.gcf().axes
    planned, measured = ax.lines
    steps, due = planned.get_xdata(), np.isfinite(planned.get_ydata())
    assert steps.tolist() == [*range(20)]
    assert steps[due].tolist() == [0, 12]
    assert np.allclose(planned.get_ydata()[due], [0, 95])
    assert measured.get_xdata().tolist() == [10, 20]
    assert planned.get_linestyle() == "None"
    assert measured.get_drawstyle() == "steps-post"
    zeros = 100 * names["is_zero"].mean(axis=1)
    assert np.allclose(measured.get_ydata(), zeros)
    assert np.allclose(measured.get_ydata(), [0, 95], atol=0.01)
    assert ax.get_xlabel() == "step of training"
    assert ax.get_ylabel() == "sparsity (%)"
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert labels == ["planned", "measured"]


def test_a_frontier_shows_the_sweep_and_every_network(
    nb, data, recovered, frontier, figures
):
    model = recovered["weight"]["one-shot"]
    first = nb.sweep(model, data, nb.RULES, (0, 0.75))
    other = first.assign(accuracy=first.accuracy / 2)
    results = {data.title: pd.concat([first, other], keys=nb.SEEDS[:2])}
    elsewhere = frontier.assign(data="another", accuracy=0.1)
    table = pd.concat([frontier[frontier.way != "one-shot"], elsewhere])
    run_cell(nb, "markers = {", sweeps=results, frontier=table)
    axes = plt.gcf().axes
    own = table[table.data == data.title]
    shown = pd.concat([first.assign(way="one-shot"), own])
    shown["kept"] = 1 - shown.sparsity
    for ax, column in zip(axes, ("kept", "parameters"), strict=True):
        drawn = {line.get_label(): line for line in ax.lines}
        for (rule, way), rows in shown.groupby(["rule", "way"]):
            line = drawn.pop(f"{rule}, {way}")
            assert np.allclose(line.get_xdata(), rows[column])
            assert np.allclose(line.get_ydata(), 100 * rows.accuracy)
            assert line.get_color() == nb.STYLES[rule]["color"]
            assert (line.get_linestyle() == "None") == (way != "one-shot")
        assert not drawn and ax.get_title() == data.title
        assert ax.get_ylabel() == "test accuracy (%)"
    assert axes[0].get_xlabel() == "sparsity (%)"
    assert axes[1].get_xlabel() == "parameters left"
    labels = [text.get_text() for text in axes[1].get_legend().get_texts()]
    assert labels == [line.get_label() for line in axes[1].lines]


def test_grains_are_a_line_per_sparsity(nb, data, figures):
    model = nb.build_mlp((32, 64), seed=0)
    names = run_cell(nb, "pieces = {", model=model, mnist=data)
    grains, (ax,) = names["grains"], plt.gcf().axes
    for line, (_, rows) in zip(
        ax.lines, grains.groupby("sparsity"), strict=True
    ):
        assert np.allclose(line.get_ydata(), 100 * rows.accuracy)
    kinds = [text.get_text() for text in ax.get_xticklabels()]
    assert kinds == rows.rule.tolist()
    for rule, sparsity in itertools.product(grains.rule[::2], (0.5, 0.75)):
        pruned = nb.prune(model, names["pieces"][rule], sparsity)
        assert abs(nb.measured_sparsity(pruned) - sparsity) < 0.01
    assert ax.get_title() == data.title and ax.get_xlabel()
    assert ax.get_ylabel() == "test accuracy (%)"
    assert ax.get_legend().get_title().get_text() == "sparsity"
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert labels == ["0.5", "0.75"]
