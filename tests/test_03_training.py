"""My zeros stay zero, whoever trains, and they come when my schedule says so."""

import functools
import itertools
import math

import keras
import matplotlib.pyplot as plt
import numpy as np
import pytest
import tensorflow as tf
from conftest import run_cell, run_on_two_devices
from helpers import Closed, chain, equal
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from keras import callbacks as kc
from keras import layers as kl
from keras import optimizers as ko

SIZES = {"weight": ((128, 1), (192, 1)), "unit": ((16, 8), (12, 16))}
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
random = np.random.default_rng(0)
ROWS = random.normal(size=(32, 8)).astype("float32")
LABELS = np.digitize(ROWS @ random.normal(size=8), (-1, 1))
ONES = {"bias_initializer": "ones"}
slow = pytest.mark.slow


def watch(measure):
    """Return a callback, and the list of what `measure` says of the model by steps."""
    callback, noted = kc.LambdaCallback(), []
    callback.on_train_batch_end = lambda *_, **__: noted.append(measure(callback.model))
    return callback, noted


interrupt, _ = watch(lambda _: 1 / 0)  # with a ZeroDivisionError after one step


def network(seed=0, **options):
    """Return an untrained network of three Dense layers, no weight zero."""
    keras.utils.set_random_seed(seed)
    own = {"activation": "tanh", **ONES, **options}
    hidden = kl.Dense(16, **own), kl.Dense(12, **own)
    return keras.Sequential([keras.Input((8,)), *hidden, kl.Dense(3, **ONES)])


def compiled(model, optimizer=None, **options):
    """Return the model itself, compiled; with Adam if no optimizer is given."""
    options = {"jit_compile": False, **options}
    model.compile(optimizer or ko.Adam(0.01), LOSS, **options)
    return model


def fit(model, steps, *callbacks, unknown=False, **options):
    """Train a model by `steps` an epoch and return the history."""
    rows = tf.data.Dataset.from_tensors((ROWS, LABELS)).repeat(steps)
    rows = rows.filter(lambda *_: True) if unknown else rows  # of unknown length
    options = {"callbacks": callbacks, "verbose": 0, "shuffle": False, **options}
    return model.fit(rows, **options).history


def zeros(model):
    """Return where the weights of a model are zero, in one flat array."""
    return np.concatenate([w.ravel() == 0 for w in model.get_weights()])


def kernel_zeros(model):
    """Return the number of zeros in each hidden kernel; a dead unit has no bias."""
    *hidden, _, _ = model.get_weights()
    for kernel, bias in zip(hidden[::2], hidden[1::2]):
        assert (kernel.any(axis=0) == (bias != 0)).all(), "biases go with units only"
    return [int((kernel == 0).sum()) for kernel in hidden[::2]]


def rounded(sparsity, rule="weight"):
    """Return the number of zeros in each hidden kernel at a sparsity."""
    return [round(sparsity * count) * size for count, size in SIZES[rule]]


def due(plan, rule="weight", frequency=5, steps=10, epochs=(0, 4), at_once=1):
    """Return the zeros in each kernel that are due after each call of a callback."""
    ends = [*range(at_once, steps, at_once), steps]
    noted, before, sparsity = [], epochs[0] * steps, plan(epochs[0] * steps)
    for epoch, end in itertools.product(range(*epochs), ends):
        passed = range(before + 1, 1 + (before := epoch * steps + end))
        if any(step % frequency == 0 or step == plan.end for step in passed):
            sparsity = plan(before)
        noted.append(rounded(sparsity, rule))
    return noted


def assert_ordinary(model):
    """Assert that nothing is left of a training with masks."""
    assert {v.constraint for v in model.variables} == {None}
    assert model.train_function is None, "the next `fit` should not use old masks"


def keep_zeros(nb, model, steps, *kernels):
    """Train a model with its zeros kept, assert that they were; return the history."""
    expected, (look, noted) = zeros(model), watch(zeros)
    history = fit(model, steps, nb.KeepZeros(*kernels), look)
    assert noted and (np.array(noted) == expected).all()
    assert (zeros(model) == expected).all(), "zeros were not held to the end"
    assert_ordinary(model)
    return history


@pytest.fixture(scope="session")
def golden(nb):
    """Return a schedule whose values are known."""
    return nb.polynomial_sparsity(0.8, begin=10, end=30, initial=0.2)


# schedules


shares, counts = st.floats(0, 1), st.integers(0, 30)


@given(shares, shares, counts, counts, st.sampled_from([1, 2, 3, 0.5]))
def test_a_polynomial_schedule_is_the_formula(nb, initial, final, begin, length, power):
    schedule = nb.polynomial_sparsity(final, begin, begin + length, initial, power)
    constant = nb.constant_sparsity(final, begin)
    assert nb.constant_sparsity(final)(0) == final
    cubic = nb.polynomial_sparsity(final, 0, 2)  # from nothing
    assert np.allclose([cubic(0), cubic(1)], [0, 7 / 8 * final])
    assert (schedule.end, constant.end) == (begin + length, begin)
    for step in range(begin + length + 30):
        progress = (step - begin) / length if length else step >= begin
        left = 1 - min(max(progress, 0), 1)
        expected = final + (initial - final) * left**power
        assert math.isclose(schedule(step), expected, abs_tol=1e-12)
        assert constant(step) == (final if step >= begin else 0)
        assert step < schedule.end or schedule(step) == final, "exactly"


WRONG = [(x, str(x)) for x in (1.2, -0.1, math.nan, math.inf, "half", None)]
STEPS = [(11, 10), (-1, 10), (0, -2), (-1, -1)]
REFUSED = [("constant", (x,), words) for x, words in WRONG]
REFUSED += [("polynomial", (x, 0, 10), words) for x, words in WRONG]
REFUSED += [("polynomial", (0.8, 0, 10, x), words) for x, words in WRONG]
REFUSED += [("polynomial", (0.8, *x), "step {} to step {}".format(*x)) for x in STEPS]
REFUSED += [("polynomial", (0.8, 0, 10, 0, x), f"power .* {x}") for x in (0, -1)]
REFUSED += [("constant", (0.8, -1), "step -1")]
REFUSED += [("Pruner", ("unit", abs, x), f"frequency .* {x}") for x in (0, -5, 0.5)]


@pytest.mark.parametrize("name, given, words", REFUSED)
def test_a_schedule_that_cannot_be_is_refused(nb, name, given, words):
    with pytest.raises(ValueError, match=words):
        getattr(nb, name if name == "Pruner" else f"{name}_sparsity")(*given)


# zeros come when they are due, and stay


def separate():
    """Return averaging optimizers, one for kernels and one for biases, with scaling."""
    if not hasattr(ko, "MultiOptimizer"):
        pytest.skip("an older Keras")
    slowly, fast = ko.SGD(0.05, use_ema=True), ko.Adam(0.01, use_ema=True)
    both = ko.OptimizerMap(slowly, {".*/kernel": fast})
    return ko.LossScaleOptimizer(ko.MultiOptimizer(both))


ABSTRACT = "Optimizer", "LossScaleOptimizer", "MultiOptimizer", "OptimizerMap"
ZEROS = "Adafactor", "ScheduleFreeAdamW", "Ftrl"  # put NaN or 0 beside dead units
MAKERS = {x: m for x, m in vars(ko).items() if isinstance(m, type)}
RUNS = {  # the scaled optimizer skips its first steps: the losses are too large
    "momentum": (lambda: ko.SGD(0.05, momentum=0.9), {}),
    "mixed": (lambda: ko.LossScaleOptimizer(ko.Adam(0.01), initial_scale=2.0**30), {}),
    "average": (lambda: ko.Adam(0.01, use_ema=True), {"steps_per_execution": 4}),
    "XLA, five at once": (ko.Adam, {"jit_compile": True, "steps_per_execution": 5}),
    "eager": (ko.Adam, {"run_eagerly": True}),
    "overwriting": (lambda: ko.SGD(0.05, use_ema=True, ema_overwrite_frequency=3), {}),
    "accumulating": (lambda: ko.AdamW(gradient_accumulation_steps=3, clipnorm=0.1), {}),
    "separate": (separate, {}),
    **{x: (lambda m=m: m(0.01), {}) for x, m in MAKERS.items() if x not in ABSTRACT},
}
NAMES = [*RUNS][:3] + [pytest.param(name, marks=slow) for name in [*RUNS][3:]]


@pytest.mark.parametrize("name", NAMES)
def test_sparsity_follows_the_schedule_and_stays(nb, golden, name):
    (optimizer, options), traced = RUNS[name], []
    rule = "weight" if name in ("momentum", "mixed", *ZEROS) else "unit"
    half = {"dtype": "mixed_float16"} if name == "mixed" else {}
    model = compiled(network(**half), optimizer(), **options)
    step, model.train_step = model.train_step, lambda d: traced.append(d) or step(d)
    look, noted = watch(lambda m: (kernel_zeros(m), zeros(m), len(traced)))
    function = {"weight": "weight", "unit": nb.unit_mask}[rule]  # by name or not
    history = fit(model, 10, nb.Pruner(function, golden, 5), look, epochs=4)
    counts, places, traces = zip(*noted)
    assert [*counts] == due(golden, rule, at_once=options.get("steps_per_execution", 1))
    for before, after in itertools.pairwise([*places, zeros(model)]):
        assert after[before].all(), "a zero has come back"
    assert kernel_zeros(model) == rounded(0.8, rule)
    assert len({*traces}) == 1 or name == "eager", "new masks compile nothing"
    often = len(counts) // 4
    assert np.allclose(history["sparsity"], np.sum(counts, 1)[often - 1 :: often] / 320)
    assert_ordinary(model)
    before = model.get_weights()
    assert keep_zeros(nb, model, 5)["sparsity"] == history["sparsity"][-1:]
    for old, new in zip(before, model.get_weights()):
        assert not np.signbit(new[new == 0]).any(), "-0 is not 0 to everyone"
        assert new.ndim > 1 or (old != new)[old != 0].all(), "the rest is trained"


def test_zeros_are_held_after_each_of_many_steps_at_once(nb):
    ends = []
    for at_once in (1, 4):
        model = compiled(network(), ko.SGD(0.1), steps_per_execution=at_once)
        fit(model, 4)  # so that it was traced before there are masks
        model.set_weights(nb.prune(model, "weight", 0.8).get_weights())
        keep_zeros(nb, model, 8)
        ends.append(model.get_weights())
    for own, other in zip(*ends):
        np.testing.assert_allclose(own, other, atol=1e-5)


@settings(max_examples=20, phases=[Phase.generate])  # to shrink takes minutes
@given(st.data())
def test_a_schedule_is_followed_however_callbacks_are_called(nb, data):
    steps, epochs, frequency = (data.draw(st.integers(1, n)) for n in (9, 4, 40))
    known = data.draw(st.sets(st.sampled_from(("steps", "epochs"))))
    params = {x: n for x, n in zip(("steps", "epochs"), (steps, epochs)) if x in known}
    first = late = 0  # steps at once, but one; where the steps are unknown, only this
    if "steps" in known:
        first, late = (data.draw(st.integers(0, n)) for n in (epochs - 1, 4))
    last = data.draw(st.integers(first + 1, epochs))  # it may be stopped early
    end = data.draw(st.integers(0, steps * epochs))
    schedule = nb.polynomial_sparsity(0.8, data.draw(st.integers(0, end)), end, 0.2)
    expected = due(schedule, "weight", frequency, steps, (first, last), late + 1)
    pruner = nb.Pruner("weight", schedule, frequency)
    for seed in (0, 1):
        model = compiled(network(seed))
        pruner.set_params(params)
        pruner.set_model(model)
        pruner.on_train_begin()
        noted = []
        for epoch in range(first, last):
            pruner.on_epoch_begin(epoch)
            for batch in range(late, steps + late, late + 1):
                pruner.on_train_batch_end(batch)
                noted.append(kernel_zeros(model))
        pruner.on_train_end()
        assert noted == expected
        assert kernel_zeros(model) == rounded(schedule(max(end, last * steps)))
        assert_ordinary(model)


@pytest.mark.parametrize("order", [1, pytest.param(-1, marks=slow)])
def test_a_training_that_was_cut_off_goes_on(nb, golden, tmp_path, order):
    backup = kc.BackupAndRestore(tmp_path / "backup", 3 if order > 0 else "epoch")
    parts = [nb.Pruner("weight", golden, 5), backup][::order]
    broken, _ = watch(lambda m: 1 / (25 - int(m.optimizer.iterations)))
    with pytest.raises(ZeroDivisionError):
        fit(compiled(network()), 10, *parts, broken, epochs=4)
    look, noted = watch(kernel_zeros)
    fit(compiled(network(1)), 10, *parts, look, epochs=4)
    assert noted == due(golden)[20:]


@pytest.mark.parametrize("patience", [1, 3])
def test_the_best_weights_are_put_back_and_pruned_to_the_end(nb, golden, patience):
    best = {"patience": patience, "mode": "max", "restore_best_weights": True}
    model, (look, noted) = compiled(network()), watch(lambda m: m.get_weights())
    calls = kc.EarlyStopping("loss", **best), nb.Pruner("unit", golden, 5), look
    fit(model, 10, *calls, unknown=True, epochs=9)
    assert len(noted) == 10 + 10 * patience, "it was not stopped"
    assert kernel_zeros(model) == rounded(0.8, "unit")
    for counts, weights in zip(due(golden, "unit"), noted):
        assert counts == [(kernel == 0).sum() for kernel in weights[:4:2]]
    for own, old in zip(model.get_weights(), noted[9]):
        assert ((own == old) | (own == 0)).all()


# what else writes weights


def test_the_users_constraint_comes_before_the_mask_and_comes_back(nb, golden):
    variable = keras.Variable(np.ones((2, 2), "float32"))
    add = {"__call__": lambda self, value: value + 1}
    variable.constraint = type("Plus", (keras.constraints.Constraint,), add)()
    masked = nb.Masked(variable)
    assert np.array(masked(variable)).tolist() == [[2, 2], [2, 2]]
    masked.mask.assign([[True, False], [False, True]])
    assert np.array(masked(variable)).tolist() == [[2, 0], [0, 2]]
    limit = {"kernel_constraint": "max_norm", "bias_constraint": "non_neg"}
    model = compiled(network(**limit), ko.SGD(0.5))
    look, noted = watch(lambda m: m.get_weights()[:4])
    own = [v.constraint for v in model.weights]
    with pytest.raises(ZeroDivisionError):
        fit(model, 5, nb.KeepZeros(), interrupt)
    fit(model, 40, nb.Pruner("unit", golden, 5), look)
    for kernel, bias in itertools.chain(*((w[:2], w[2:]) for w in noted)):
        assert np.linalg.norm(kernel, axis=0).max() < 2.001 and bias.min() >= 0
    assert own == [v.constraint for v in model.weights]
    assert [(w == 0).all(axis=0).sum() for w in noted[-1][::2]] == [13, 10]


def test_each_of_two_callbacks_holds_the_kernels_named_whoever_writes_weights(nb):
    model = compiled(Closed())  # a model without a graph loses weights, but no units
    model(ROWS)
    first, _, last, _ = own = model.trainable_variables
    last.assign(np.arange(12).reshape(4, 3) % 2)
    model.inner = ko.Adam(use_ema=True)  # an optimizer for a train_step of its own
    model.inner.build(own)
    ones = [keras.ops.ones_like(v) for v in own]
    write, _ = watch(lambda m: (m.inner.apply(ones), [v.assign(v + 1) for v in own]))
    look, noted = watch(lambda m: [int((w == 0).sum()) for w in m.get_weights()])
    any_function = {0: 0, 3: 0.8, 6: 0.25, 9: 0.5, 11: 0.75}.get  # gives weights back
    pruner = nb.Pruner("weight", any_function, 3, kernels=[first.path])
    history = fit(model, 11, write, pruner, nb.KeepZeros([last.path]), look)
    expected = 0, 0, 26, 26, 26, 26, 8, 8, 16, 16, 16
    assert noted == [[count, 0, 6, 0] for count in expected]
    assert nb.zeros_in([first]) == 0.75, "the end is a time to prune"
    assert history["sparsity"] == [0.5], "of what the last one watches"
    model.inner.finalize_variable_values(own)
    assert nb.zeros_in([last]) == 0.5, "averages are zero, too"
    assert_ordinary(model)


SWAPS = ("CSP", "average"), ("SCP", "average"), ("SPC", "overwriting")
SWAPS = [("PSC", "separate"), *(pytest.param(*swap, marks=slow) for swap in SWAPS)]


@pytest.mark.parametrize("order, name", SWAPS)
def test_averages_validation_and_files_are_sparse(nb, golden, tmp_path, order, name):
    path, look, tested = str(tmp_path / "{epoch}.keras"), kc.LambdaCallback(), []
    look.on_test_begin = lambda logs=None: tested.append(kernel_zeros(look.model))
    parts = {"P": nb.Pruner("unit", golden, 5), "C": kc.ModelCheckpoint(path)}
    parts["S"] = kc.SwapEMAWeights(swap_on_epoch=True)
    model = compiled(network(), RUNS[name][0]())
    given = {"validation_data": (ROWS, LABELS), "epochs": 4}
    fit(model, 10, *(parts[key] for key in order), look, **given)
    files = [path.format(epoch=epoch) for epoch in (1, 2, 3, 4)]
    saved = [keras.models.load_model(file, safe_mode=True) for file in files]
    assert [*map(kernel_zeros, saved)] == tested == due(golden, "unit")[9::10]
    model.save(path)
    loaded = keras.models.load_model(path, safe_mode=True)
    assert equal(loaded.get_weights(), model.get_weights())
    fit(loaded, 5)
    assert kernel_zeros(loaded) == [0, 0], "it is trained like any"


def test_after_an_interrupt_masks_stay_until_the_next_callback(nb):
    model, (look, noted) = compiled(network()), watch(kernel_zeros)
    every, half = [v.path for v in model.weights[::2]], nb.constant_sparsity(0.5)
    with pytest.raises(ZeroDivisionError):
        fit(model, 10, nb.Pruner("weight", half, kernels=every), interrupt)
    expected = zeros(model)
    assert kernel_zeros(model) == rounded(0.5) and expected.sum() == 160 + 18
    fit(model, 5)
    assert (zeros(model) == expected).all(), "they are held"
    second = nb.Pruner("weight", nb.constant_sparsity(0.3, begin=8))
    fit(model, 10, second, look)
    assert noted[6:] == [[0, 0], *[rounded(0.3)] * 3], "nothing stays of old masks"
    assert model.layers[-1].kernel.numpy().all(), "it is no longer chosen"
    with pytest.raises(ZeroDivisionError):
        fit(model, 10, nb.KeepZeros(), nb.KeepZeros(), interrupt)
    second.release()
    assert_ordinary(model)
    assert kernel_zeros(model) == rounded(0.3)
    fit(model, 5, nb.KeepZeros(), epochs=1, initial_epoch=1)  # without any step
    fit(model, 5)
    assert kernel_zeros(model) == [0, 0], "nothing holds them any longer"


# what is chosen


def branched():
    """Return an untrained model: "first" and "second" have tied units, none is zero."""
    keras.utils.set_random_seed(0)
    shifts = {"beta_initializer": "ones", "moving_mean_initializer": "ones"}

    def block(x, layer):
        """Return what a layer, with ones as biases, and a normalisation make of x."""
        layer.bias_initializer = keras.initializers.Ones()
        norm = kl.BatchNormalization(momentum=0.5, name=f"{layer.name}_norm", **shifts)
        return kl.ReLU()(norm(layer(x)))

    x = kl.Reshape((4, 2))(inputs := keras.Input((8,)))
    x = block(x, kl.Conv1D(8, 3, padding="same", name="first"))
    y = block(x, kl.DepthwiseConv1D(3, padding="same", name="depthwise"))
    y = block(y, kl.Conv1D(8, 1, name="second"))
    x = kl.GlobalAveragePooling1D()(kl.Add()([x, y]))
    x = block(x, kl.Dense(6, "sigmoid", name="last"))
    return keras.Model(inputs, kl.Dense(3, **ONES)(x))


CHOICES = [("unit", [], ["first_norm", "last"]), ("weight", ["first", "depthwise"], [])]
CHOICES += [pytest.param("unit", names, [], marks=slow) for names in ([], ["last"])]


@pytest.mark.parametrize("rule, names, frozen", CHOICES)
def test_what_goes_in_training_is_what_prune_takes(nb, rule, names, frozen):
    model, (look, noted) = branched(), watch(zeros)
    for name in frozen:
        model.get_layer(name).trainable = False
    paths = [model.get_layer(name).kernel.path for name in names] or None
    expected = zeros(nb.prune(model, rule, 0.5, paths))
    assert expected.any() and not zeros(model).any()
    pruner = nb.Pruner(rule, nb.constant_sparsity(0.5), 2, paths)
    fit(compiled(model), 9, pruner, look)
    assert (np.array(noted) == expected).all()
    keep_zeros(nb, model, 3, paths)
    both = [model(ROWS, training=training) for training in (True, False)]
    assert np.abs(np.subtract(*both)).max() < 1, "dead units answer alike in training"


tiny = functools.partial(chain, [np.ones((8, 3))])
NOW, TWO = (0, 0), {"epochs": 2}
IMPOSSIBLE = [
    (Closed, "weight", None, NOW, "a `call` of its own", {}),
    (Closed, "unit", "first", NOW, "no units", {}),
    (Closed, "column", "first", NOW, "'column'", {}),
    (Closed, lambda k, s: k[:1] > 0, "first", NOW, "the kernel's shape", {}),
    (tiny, "unit", None, NOW, "'sequential.* no kernel", {}),
    (tiny, None, None, NOW, "'sequential.* no kernel", {}),
    (network, "weight", None, (0, 21), r"\b21\b.* 20\b", TWO),
    (network, "weight", None, (0, 9), r"\b9\b.* 8\b", {**TWO, "steps_per_epoch": 4}),
    (network, "unit", None, (0, 81), r"81\b.* 80\b", {"epochs": 8, "initial_epoch": 7}),
]


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_what_cannot_be_pruned_is_refused_and_left_alone(nb, case):
    make, rule, name, steps, words, options = case
    model, (look, noted) = compiled(make()), watch(zeros)
    model(ROWS)
    before, paths = model.get_weights(), name and [getattr(model, name).kernel.path]
    pruner = nb.Pruner(rule, nb.polynomial_sparsity(0.5, *steps), kernels=paths)
    with pytest.raises(ValueError, match=words):
        fit(model, 10, pruner if rule else nb.KeepZeros(), look, **options)
    assert not noted and equal(model.get_weights(), before)
    assert {v.constraint for v in model.variables} == {None}


ON_TWO_DEVICES = """
from test_03_training import *
with tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]).scope():
    model = compiled(branched(), RUNS["average"][0]())
(look, noted), swap = watch(zeros), kc.SwapEMAWeights(swap_on_epoch=True)
count, half = zeros(nb.prune(model, "unit", 0.5)).sum(), nb.constant_sparsity(0.5, 2)
for callback in (nb.Pruner("unit", half, 1), nb.KeepZeros()):
    model.fit(ROWS, LABELS, 16, 2, callbacks=[callback, swap, look])
    assert (zeros(model) == noted[-1]).all() and zeros(model).sum() == count
    assert_ordinary(model)
assert [places.sum() for places in noted] == [0] + [count] * 7
"""


@slow
def test_zeros_stay_on_two_devices():
    run_on_two_devices(ON_TWO_DEVICES)


# ways back, and pictures


@pytest.mark.parametrize("rule", ["weight", "unit"])
def test_ways_back_are_what_they_are_called(nb, data, model, monkeypatch, rule):
    monkeypatch.setattr(nb, "EPOCHS", 1)
    monkeypatch.setattr(nb, "IMAGES", 500)
    before, pruned = model.get_weights(), nb.prune(model, rule, 0.75)
    ways = dict(nb.recover(model, data, rule, 0.75, 4, 5))
    pruner = nb.Pruner(rule, nb.polynomial_sparsity(0.75, 0, 24), 20)
    expected = {
        "one-shot": pruned,
        "repaired": nb.repair(pruned, model, data.x_train[:500]),
        "fine-tuned": nb.train(pruned, data, 4, 5, [nb.KeepZeros()]),
        "in training": nb.train(model, data, 4, 5, [pruner]),
    }
    if rule == "unit":
        fresh = nb.build_mlp((3, 2), seed=5)
        expected["from scratch"] = nb.train(fresh, data, 1 + 4, 5)
    assert [*ways] == [*expected] and equal(model.get_weights(), before)
    for way, own in expected.items():
        assert equal(own.get_weights(), ways[way].get_weights()), way
    assert (zeros(ways["fine-tuned"]) == zeros(pruned)).all()


def test_pruning_in_training_takes_the_options_of_the_pruner(nb, data, model):
    rule, every = nb.Globally(nb.magnitudes), [w.path for w in model.weights]
    pruned = nb.prune_in_training(model, data, rule, 0.9, 1, 0, kernels=every)
    assert round(nb.measured_sparsity(pruned, every), 4) == 0.9


def test_two_lines_prune_a_network_and_show_a_staircase(nb, data, figures, capsys):
    names = run_cell(nb, "schedules", mnist=data)
    assert names.halfway == names.rising.end == 10
    assert round(nb.measured_sparsity(names.sparse), 3) == 0.95
    right = f"{nb.test_accuracy(names.sparse, data):.1f}% right"
    assert f"95.0% of the weights are zero, {right}" in capsys.readouterr().out
    rising = nb.Pruner("weight", nb.polynomial_sparsity(0.95, 0, 20), frequency=10)
    run_cell(nb, "in-training", mnist=data, rising=rising)
    for line, name in zip(plt.gcf().axes[0].lines, ("schedule", "measured")):
        assert line.get_label() == name and line.get_xdata().tolist() == [10, 20]
        assert np.allclose(line.get_ydata(), [95 * 7 / 8, 95], atol=0.01)
    assert line.get_drawstyle() == "steps-post"


def test_ways_back_are_tabled_and_drawn_as_arrows_from_one_shot(nb, figures):
    ways = {"weight": {"one-shot": 20, "repaired": 60, "fine-tuned": 90}}
    ways["unit"] = {"one-shot": 50, "repaired": 80, "from scratch": 45}
    dense, plan = {"A": 97.5, "B": 87.5}, (3, nb.SEEDS[0])

    def recover(network, lower, rule, s, *own):
        assert network in dense and own == plan
        return ((way, x - lower) for way, x in ways[rule].items())

    names = {"datasets": {"b": 0, "a": 1}, "networks": {"b": ["A", 0], "a": ["B", 0]}}
    names |= {"recover": recover, "test_accuracy": lambda x, _: dense.get(x, x)}
    names = run_cell(nb, "frontier", **names)
    for (title, rule, _), row in names.frontier.iterrows():
        assert {**row.dropna() + "ba".index(title)} == ways[rule]
    run_cell(names, "recovery-drawn")
    for ax, title, best, lower in zip(plt.gcf().axes, "ba", dense.values(), (0, 1)):
        assert ax.get_title() == f"{title}, dense {best}"
        said = [float(t.get_text()) for t in ax.texts if t.get_text()[2:3] == "."]
        assert [x + lower for x in said] == [20, 60, 90, 20, 60, 90, 50, 80, 45]
        *dots, line = ax.lines
        places = [(x + lower, y) for x, y in (dot.get_xydata()[0] for dot in dots)]
        assert places == [(20, 1), (20, 5), (50, 9), (45, 11)]
        assert [*line.get_xdata()] == [best] * 2, "the dense network"
        arrows = [t for t in ax.texts if isinstance(t, plt.Annotation)]
        ends = [(t.xyann[0] + lower, t.xy[0] + lower) for t in arrows]
        assert ends == [(20, 60), (20, 90), (20, 60), (20, 90), (50, 80)]
        scale, right = ax.xaxis.get_transform(), np.array([0.0, 50, 75, 87.5])
        assert np.allclose(np.diff(scale.transform(right)), np.log(2)), "errors halve"
