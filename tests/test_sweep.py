"""Training, measuring and sweeping, on the stand-in for MNIST."""

import itertools
import re
import statistics
from types import SimpleNamespace

import keras
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from conftest import run_cell
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from matplotlib.colors import same_color

EPOCHS = 4
SPARSITIES = (0, 0.5, 0.8, 0.9, 1.0)
COLUMNS = ["rule", "sparsity", "accuracy", "loss", "parameters"]


class Stop(keras.callbacks.Callback):
    """Raise an error at the end of the third epoch."""

    def __init__(self, error):
        """Remember the error."""
        super().__init__()
        self.error = error

    def on_epoch_end(self, epoch, logs=None):
        """Raise it."""
        if epoch == 2:
            raise self.error


@pytest.fixture(scope="module")
def trained(nb, data):
    """Return a small network after a brief training on the stand-in."""
    return nb.train(nb.build_mlp((12, 8), seed=0), data, EPOCHS, seed=0)


@pytest.fixture(scope="module")
def results(nb, data, trained):
    """Return a sweep of both rules over a few sparsities."""
    return nb.sweep(trained, data, nb.RULES, SPARSITIES)


@pytest.fixture(scope="module")
def seeds(results):
    """Return sweeps of two seeds, the second half as accurate."""
    other = results.assign(accuracy=results.accuracy / 2)
    return pd.concat([results, other], keys=[0, 1], names=["seed"])


@pytest.fixture
def claims(nb, monkeypatch):
    """Return a list of claims of its own, still empty."""
    monkeypatch.setattr(nb, "CLAIMS", [])
    return nb.CLAIMS


@pytest.fixture
def judged(nb, monkeypatch):
    """Let every check of a cell pass: its results are made up."""
    monkeypatch.setattr(nb, "check", lambda claim, holds, needs="": None)


def same_weights(model, other):
    """Return whether two models have equal weights."""
    pairs = zip(model.get_weights(), other.get_weights(), strict=True)
    return all(np.array_equal(one, two) for one, two in pairs)


def measured_by_keras(model, images, labels):
    """Return loss and accuracy, computed by Keras alone."""
    copy = keras.models.clone_model(model)
    copy.set_weights(model.get_weights())
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    copy.compile(loss=loss, metrics=["accuracy"])
    return copy.evaluate(images, labels, verbose=0)


def puts_out(weights, images):
    """Return what each layer puts out, by NumPy alone."""
    values = [images.reshape(len(images), -1) / 255]
    for kernel in weights[:-1]:
        values.append(np.maximum(values[-1] @ kernel, 0))
    return [*values[1:], values[-1] @ weights[-1]]


def measured_by_numpy(model, images, labels):
    """Return loss and accuracy, computed by NumPy alone."""
    logits = puts_out(model.get_weights(), images)[-1]
    right = np.take_along_axis(logits, labels[:, None], axis=1)[:, 0]
    loss = np.mean(np.logaddexp.reduce(logits, axis=1) - right)
    return loss, np.mean(logits.argmax(axis=1) == labels)


def lines_of(ax):
    """Return {label: line} of the lines of a plot."""
    return {line.get_label(): line for line in ax.get_lines()}


def numbers_in(text):
    """Return the numbers in a text."""
    return [float(n) for n in re.findall(r"\d+(?:\.\d+)?", text)]


# networks


def test_the_network_is_drawn_from_its_seed(nb, model):
    assert same_weights(model, nb.build_mlp((12, 8), seed=0))
    assert not same_weights(model, nb.build_mlp((12, 8), seed=1))


def test_the_network_has_no_biases_and_ends_in_logits(nb, model):
    shapes = [weights.shape for weights in model.get_weights()]
    assert shapes == [(784, 12), (12, 8), (8, 10)]
    assert model.layers[-1].name == "logits"
    images = np.full((2, 28, 28), 255, "uint8")
    logits = puts_out(model.get_weights(), images)[-1]
    np.testing.assert_allclose(model(images), logits, atol=1e-5)


def test_the_network_is_regularised_in_its_hidden_layers(nb):
    penalty = keras.regularizers.L1(1e-3)
    *_, first, second, last = nb.build_mlp((12, 8), 0, penalty).layers
    assert first.kernel_regularizer is second.kernel_regularizer is penalty
    assert last.kernel_regularizer is None


@pytest.mark.parametrize("dropout", [0, 0.3])
def test_the_network_drops_inputs_in_training_only(nb, dropout):
    model = nb.build_mlp((12, 8), seed=0, dropout=dropout)
    rates = [getattr(layer, "rate", 0) for layer in model.layers]
    assert sum(rates) == dropout
    images = np.full((2, 28, 28), 255, "uint8")
    whole, dropped = model(images), model(images, training=True)
    assert np.array_equal(whole, dropped) == (not dropout)


# training


def rate_after(step, steps, highest):
    """Return the learning rate of a step: a line up, then half a cosine."""
    warmup = max(1, steps // 6)
    if step < warmup:
        return highest * step / warmup
    done = (step - warmup) / (steps - warmup)
    return highest * (1 + np.cos(np.pi * done)) / 2


def trained_by_numpy(model, images, labels, steps, highest):
    """Return weights after steps of Nesterov's momentum on all rows."""
    weights = [w.astype(float) for w in model.get_weights()]
    speeds = [np.zeros(w.shape) for w in weights]
    for step in range(steps):
        values = [images.reshape(len(images), -1) / 255, *puts_out(weights, images)]
        likely = np.exp(values[-1]) / np.exp(values[-1]).sum(axis=1)[:, None]
        slope, slopes = (likely - np.eye(10)[labels]) / len(labels), []
        for seen, kernel in zip(values[-2::-1], weights[::-1]):
            slopes.insert(0, seen.T @ slope)
            slope = (slope @ kernel.T) * (seen > 0)
        norm = np.sqrt(sum(np.sum(s**2) for s in slopes))
        rate = rate_after(step, steps, highest) / max(1, norm)
        speeds = [0.9 * v - rate * s for v, s in zip(speeds, slopes)]
        weights = [w + 0.9 * v - rate * s for w, v, s in zip(weights, speeds, slopes)]
    return weights


@pytest.mark.parametrize("steps", [3, 30])
def test_training_is_momentum_along_a_cosine(nb, data, model, monkeypatch, steps):
    few = data._replace(x_train=data.x_train[:60], y_train=data.y_train[:60])
    monkeypatch.setattr(nb, "BATCH_SIZE", 60)
    start = nb.copy_of(model)
    start.set_weights([3 * weights for weights in model.get_weights()])
    rows = few.x_train, few.y_train, steps, nb.LEARNING_RATE
    expected = trained_by_numpy(start, *rows)
    found = nb.train(start, few, steps, seed=0).get_weights()
    for weights, own, before in zip(found, expected, start.get_weights()):
        assert weights == pytest.approx(own, abs=1e-4)
        assert np.abs(weights - before).max() > 0.02


def test_training_teaches(nb, data, model, trained):
    before, after = (
        nb.evaluate(m, data.x_test, data.y_test)["accuracy"] for m in (model, trained)
    )
    assert after > before + 0.2


@pytest.mark.parametrize("rows", [1, 127, 128, 129, 1189])
def test_the_steps_are_those_that_training_takes(nb, data, model, rows):
    few = data._replace(x_train=data.x_train[:rows], y_train=data.y_train[:rows])
    counted = keras.callbacks.LambdaCallback(
        on_train_end=lambda logs: steps.append(int(counted.model.optimizer.iterations))
    )
    steps = []
    nb.train(model, few, 2, seed=0, callbacks=[counted])
    assert steps == [nb.steps_of(few, 2)]


def frozen(nb):
    """Return a network whose first kernel is not trained."""
    model = nb.build_mlp((12, 8), seed=0)
    model.get_layer("hidden_1").trainable = False
    return model


def normalized(nb):
    """Return a network behind a normalization adapted to images."""
    keras.utils.set_random_seed(0)
    parts = [
        keras.Input((28, 28), name="images"),
        keras.layers.Normalization(axis=None, name="scaled"),
        keras.layers.Flatten(name="flat"),
        keras.layers.Dense(10, name="logits"),
    ]
    parts[1].adapt(nb.stand_in("digits")[0].astype("float32"))
    return keras.Sequential(parts, name="normalized")


NETWORKS = {
    "plain": lambda nb: nb.build_mlp((12, 8), seed=0),
    "L1": lambda nb: nb.build_mlp((12,), 0, keras.regularizers.L1(1e-3)),
    "dropout": lambda nb: nb.build_mlp((12, 8), seed=0, dropout=0.3),
    "convolutional": lambda nb: nb.build_cnn((4,), 8),
    "frozen": frozen,
    "normalized": normalized,
}


@pytest.mark.parametrize("name", NETWORKS)
def test_any_network_is_trained_as_by_keras_alone(nb, data, name):
    model, epochs = NETWORKS[name](nb), 2
    trained = nb.train(model, data, epochs, seed=1)
    copy = keras.models.clone_model(model)
    for variable, start in zip(copy.variables, model.variables, strict=True):
        variable.assign(start)
    for layer in copy.layers:
        if isinstance(layer, keras.layers.Normalization):
            layer.finalize_state()
    steps = epochs * -(-len(data.x_train) // nb.BATCH_SIZE)

    class Rate(keras.optimizers.schedules.LearningRateSchedule):
        def __call__(self, step):
            rates = [rate_after(s, steps, nb.LEARNING_RATE) for s in range(steps)]
            return keras.ops.take(keras.ops.cast(rates, "float32"), step)

    options = {"momentum": 0.9, "nesterov": True, "global_clipnorm": 1}
    copy.compile(keras.optimizers.SGD(Rate(), **options), nb.LOSS, jit_compile=False)
    keras.utils.set_random_seed(1)
    options = {"batch_size": nb.BATCH_SIZE, "epochs": epochs, "verbose": 0}
    copy.fit(data.x_train, data.y_train, **options)
    for found, expected in zip(trained.get_weights(), copy.get_weights(), strict=True):
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)


def pruned(nb, data, model):
    """Prune while training."""
    nb.prune_in_training(model, data, "unit", 0.9, EPOCHS, seed=1)


def fine_tuned(nb, data, model):
    """Train what another rule has pruned."""
    nb.fine_tune(nb.prune(model, "weight", 0.5), data, EPOCHS, seed=1)


def stopped(nb, data, model):
    """Stop a training early, at its first epoch's weights."""
    options = {"monitor": "loss", "restore_best_weights": True}
    stop = keras.callbacks.EarlyStopping(mode="max", patience=1, **options)
    nb.train(model, data, EPOCHS, 1, [stop])


def broken_off(nb, data, model, error=KeyboardInterrupt):
    """Break off a training under masks."""
    pruner = nb.Pruner("unit", nb.constant_sparsity(0.9))
    with pytest.raises(error, match="enough"):
        nb.train(model, data, EPOCHS, 1, [pruner, Stop(error("enough"))])


def failed(nb, data, model):
    """Let a callback fail under masks."""
    broken_off(nb, data, model, ValueError)


def others(nb, data, model):
    """Train another network, and one from other weights with another seed."""
    for other in nb.build_mlp((8, 12)), nb.build_mlp((12, 8), 1, dropout=0.3):
        nb.train(other, data, EPOCHS, seed=1)


BETWEEN = (pruned, fine_tuned, stopped, broken_off, failed, others)


@pytest.mark.parametrize("between", BETWEEN, ids=lambda f: f.__name__)
def test_a_training_leaves_nothing_to_the_next(nb, data, between):
    model = nb.build_mlp((12, 8), seed=0, dropout=0.3)
    first = nb.train(model, data, EPOCHS, seed=0)
    before = [v.numpy() for v in (*model.variables, *first.variables)]
    between(nb, data, model)
    again = nb.train(model, data, EPOCHS, seed=0)
    assert same_weights(first, again)
    for old, now in zip(before, (*model.variables, *first.variables)):
        assert (old == now.numpy()).all()
    for network in (model, first, again):
        assert not network.compiled
        assert not any(v.constraint for v in network.variables)


def test_networks_trained_alike_go_on_alike(nb, data):
    model = nb.build_mlp((12, 8), seed=0, dropout=0.3)
    twins = [nb.train(model, data, 2, seed=0) for _ in range(2)]
    assert same_weights(*(nb.train(twin, data, 2, seed=1) for twin in twins))


def test_a_changed_learning_rate_counts(nb, data, model, monkeypatch):
    nb.train(model, data, 1, seed=0)
    monkeypatch.setattr(nb, "LEARNING_RATE", 0.0)
    assert same_weights(nb.train(model, data, 1, seed=0), model)


@pytest.mark.parametrize("dropout", [0, 0.3])
def test_another_seed_trains_other_weights(nb, data, dropout):
    model = nb.build_mlp((12, 8), seed=0, dropout=dropout)
    one, other = (nb.train(model, data, EPOCHS, seed) for seed in (0, 1))
    assert not same_weights(one, other)


def test_validation_and_test_rows_are_never_trained_on(nb, data, model, trained):
    poisoned = data._replace(
        x_val=255 - data.x_val,
        y_val=9 - data.y_val,
        x_test=255 - data.x_test,
        y_test=9 - data.y_test,
    )
    assert same_weights(nb.train(model, poisoned, EPOCHS, seed=0), trained)


def test_callbacks_are_called_and_nothing_is_printed(nb, data, model, capsys):
    epochs = []
    callback = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: epochs.append(epoch)
    )
    nb.train(model, data, 2, seed=3, callbacks=[callback])
    assert epochs == [0, 1] and not capsys.readouterr().out


def test_several_networks_are_trained_from_their_seeds(nb, data, capsys):
    models = nb.train_several(data, (12, 8), 2, seeds=(0, 3))
    lines = capsys.readouterr().out.splitlines()
    for model, seed, line in zip(models, (0, 3), lines, strict=True):
        alone = nb.train(nb.build_mlp((12, 8), seed), data, 2, seed)
        assert same_weights(model, alone)
        accuracy = measured_by_numpy(model, data.x_val, data.y_val)[1]
        assert line.startswith(f"{data.title}, seed {seed}: {accuracy:.1%}")


def test_dense_networks_are_tabled_by_data_set(nb, data, trained, model):
    halves = [
        data._replace(x_test=data.x_test[i::2], y_test=data.y_test[i::2])
        for i in (0, 1)
    ]
    sets = dict(zip(("one", "other"), halves))
    networks = {"one": [model, trained], "other": [trained]}
    table = run_cell(nb, "baseline = ", networks=networks, datasets=sets)["baseline"]
    assert table.index.tolist() == ["one", "other"]
    for title, own in networks.items():
        labels = sets[title].y_test
        both = [measured_by_numpy(m, sets[title].x_test, labels) for m in own]
        losses, right = zip(*both)
        found = table.loc[title]
        expected = [statistics.mean(right), min(right), max(right)]
        assert found["accuracy"].tolist() == pytest.approx(expected)
        assert found["loss", "mean"] == pytest.approx(statistics.mean(losses), 1e-4)
        commonest = max((labels == label).mean() for label in range(10))
        assert found["always one class", ""] == pytest.approx(commonest)


# measuring


def test_evaluate_agrees_with_keras(nb, data, trained):
    model = nb.prune(trained, "weight", 0.9)
    for rows in (data.x_test, data.y_test), (data.x_val, data.y_val):
        loss, accuracy = measured_by_keras(model, *rows)
        assert nb.evaluate(model, *rows) == {
            "accuracy": pytest.approx(accuracy, abs=1e-5),
            "loss": pytest.approx(loss, abs=1e-5),
        }


def test_evaluate_survives_huge_logits(nb, data, trained):
    model, rows = nb.copy_of(trained), (data.x_test, data.y_test)
    model.set_weights([100 * weights for weights in trained.get_weights()])
    before, measures = nb.evaluate(trained, *rows), nb.evaluate(model, *rows)
    assert measures["accuracy"] == before["accuracy"]
    assert np.isfinite(measures["loss"])


@pytest.mark.parametrize("rows", [1, 3, 7, 10, 500])
def test_logits_do_not_depend_on_the_batches(nb, data, trained, rows):
    images, labels, sizes = data.x_test[:10], data.y_test[:10], []
    logits = nb.logits_of(trained, images, rows)
    np.testing.assert_allclose(logits, trained(images), atol=1e-5)

    def watched(batch, training):
        sizes.append(len(batch))
        return trained(batch, training=training)

    measures = nb.evaluate(watched, images, labels, rows)
    assert measures == pytest.approx(nb.evaluate(trained, images, labels))
    assert nb.disagreement(watched, trained, images, rows) <= 1e-5
    assert sum(sizes) == 20 and max(sizes) <= rows


def test_disagreement_is_the_largest_difference_as_a_share(nb):
    logits = np.array([[1.0, -8], [2, 3], [0, 4]])
    other = np.array([[1.0, -8], [2, 5], [0, 3]])
    model, second = (
        lambda rows, training, own=own: own[rows] for own in (logits, other)
    )
    for rows in (1, 2, 3):
        assert nb.disagreement(model, second, np.arange(3), rows) == 2 / 8
        assert nb.disagreement(second, model, np.arange(3), rows) == 2 / 8
        assert nb.disagreement(model, model, np.arange(3), rows) == 0


# sweeping


def weights_on_a_path(kernels):
    """Return how many weights are on some path of weights through all layers."""
    places, used = (
        [range(len(kernels[0])), *(range(k.shape[1]) for k in kernels)],
        set(),
    )
    for path in itertools.product(*places):
        steps = [(n, *step) for n, step in enumerate(itertools.pairwise(path))]
        if all(kernels[n][i, j] for n, i, j in steps):
            used.update(steps)
    return len(used)


VALUES = st.sampled_from([0, 0, -1, 0.5])
SIZES = st.lists(st.integers(1, 4), min_size=3, max_size=5)
SHAPES = SIZES.map(lambda sizes: [*itertools.pairwise(sizes)])
CHAINED = SHAPES.flatmap(
    lambda shapes: st.tuples(*(arrays(float, s, elements=VALUES) for s in shapes))
)


def chain(kernels):
    """Return a chain of Dense layers, without biases, of given kernels."""
    layers = [keras.Input((len(kernels[0]),))]
    layers += [keras.layers.Dense(k.shape[1], use_bias=False) for k in kernels]
    model = keras.Sequential(layers)
    model.set_weights(kernels)
    return model


@settings(max_examples=60)
@given(CHAINED)
def test_parameters_left_are_those_on_a_path_from_input_to_output(nb, kernels):
    model, expected = chain(kernels), weights_on_a_path(kernels)
    assert nb.parameters_left(model) == expected
    for weights, kernel in zip(model.get_weights(), kernels):
        assert (weights == kernel).all()


@pytest.mark.parametrize("sparsities", [(0, 0), (0.5, 0.25), (0.4, 0.8)])
def test_parameters_left_are_those_of_the_shrunk_network(nb, model, sparsities):
    masks = map(nb.unit_mask, model.get_weights(), sparsities)
    pruned = nb.masked(model, [*masks])
    assert nb.parameters_left(pruned) == nb.shrink(pruned).count_params()


def with_biases():
    """Return a chain with biases, which go with a unit that has no weights."""
    layers = keras.layers.Dense(3), keras.layers.Dense(3)
    return keras.Sequential([keras.Input((3,)), *layers])


def on_a_sequence():
    """Return a chain in which two rows of units are one row for the next layer."""
    layers = [keras.layers.Dense(n, use_bias=False) for n in (3, 2)]
    source = keras.Input((2, 4))
    return keras.Sequential([source, layers[0], keras.layers.Flatten(), layers[1]])


def with_a_branch():
    """Return a network in which two layers feed the outputs, where no unit goes."""
    source = keras.Input((3,))
    one, other = (keras.layers.Dense(3, use_bias=False)(source) for _ in "ab")
    return keras.Model(source, keras.layers.Add()([one, other]))


def convolutions():
    """Return two convolutions, in which a filter's kernel has four axes."""
    options = {"use_bias": False, "padding": "same"}
    layers = [keras.layers.Conv2D(3, 3, **options) for _ in "ab"]
    return keras.Sequential([keras.Input((5, 5, 3)), *layers])


def in_eight_bits():
    """Return a chain with a scale beside each kernel."""
    model = chain([np.ones((3, 3)), np.ones((3, 3))])
    for layer in model.layers:
        layer.quantize("int8")
    return model


def recurrent():
    """Return a network with a layer whose units are not followed."""
    layers = keras.layers.SimpleRNN(3), keras.layers.Dense(2)
    return keras.Sequential([keras.Input((5, 4)), *layers])


OTHERS = {
    with_biases: (3 * 2 + 2) + (2 * 3 + 3),
    on_a_sequence: 4 * 2 + (2 * 2) * 2,
    with_a_branch: 3 * 2 + 3 * 3,
    convolutions: 9 * 3 * 2 + 9 * 2 * 3,
    in_eight_bits: (3 * 2 + 3) + (3 * 3 + 3),
    recurrent: (4 * 2 + 3 * 3 + 3) + (3 * 2 + 2),
}


@pytest.mark.parametrize("build", OTHERS, ids=lambda build: build.__name__)
def test_elsewhere_too_zeros_and_dead_units_are_left_out(nb, build):
    model = build()
    weights = [np.ones(w.shape, w.dtype) for w in model.get_weights()]
    weights[0][..., 0] = 0
    model.set_weights(weights)
    assert nb.parameters_left(model) == OTHERS[build]


def test_a_sweep_is_tidy(results, nb):
    assert list(results.columns) == COLUMNS
    pairs = list(zip(results.rule, results.sparsity))
    assert pairs == list(itertools.product(nb.RULES, SPARSITIES))
    assert list(results.index) == list(range(len(pairs)))
    assert results.accuracy.between(0, 1).all()
    assert np.isfinite(results.loss).all() and (results.loss > 0).all()


def test_a_sweep_equals_the_slow_way(nb, data, trained, results):
    for row in results.itertuples():
        pruned = nb.prune(trained, nb.RULES[row.rule], row.sparsity)
        loss, accuracy = measured_by_numpy(pruned, data.x_test, data.y_test)
        assert row.accuracy == pytest.approx(accuracy, abs=1e-5)
        assert row.loss == pytest.approx(loss, abs=1e-5)


def test_a_sweep_applies_the_rules_it_is_given(nb, data, trained, results):
    swapped = {"a": nb.unit_mask, "b": nb.weight_mask, "c": nb.Globally(np.abs)}
    found = nb.sweep(trained, data, swapped, (0.8, 0.5)).set_index(["rule", "sparsity"])
    assert found.index.tolist() == [*itertools.product("abc", (0.8, 0.5))]
    expected = results.set_index(["rule", "sparsity"])
    for own, rule in ("a", "unit"), ("b", "weight"):
        for sparsity in (0.8, 0.5):
            assert found.loc[own, sparsity].equals(expected.loc[rule, sparsity])
    together = nb.prune(trained, swapped["c"], 0.8)
    accuracy = measured_by_numpy(together, data.x_test, data.y_test)[1]
    assert found.accuracy["c", 0.8] == pytest.approx(accuracy)


def test_a_sweep_counts_the_parameters_left(results, trained):
    left = results.set_index(["rule", "sparsity"]).parameters
    whole = sum(np.count_nonzero(w) for w in trained.get_weights())
    assert left["weight", 0] == left["unit", 0] == whole
    assert left["unit", 0.5] == 784 * 6 + 6 * 4 + 4 * 10
    assert left["unit", 0.9] == 784 * 1 + 1 * 1 + 1 * 10
    assert left["weight", 0.5] <= 784 * 6 + 6 * 8 + 8 * 10
    assert left["weight", 1] == left["unit", 1] == 0


def test_without_any_weights_all_images_get_one_answer(results, data):
    empty = results[results.sparsity == 1]
    assert len(empty) == 2
    assert empty.loss.to_numpy() == pytest.approx(np.log(10))
    assert (empty.accuracy == (data.y_test == 0).mean()).all()


def test_a_sweep_leaves_the_model_as_it_is(nb, data, trained):
    copy = nb.copy_of(trained)
    nb.sweep(trained, data, nb.RULES, (0.5, 1))
    assert same_weights(trained, copy)


def test_sweeps_are_tabled_as_means_over_seeds(nb, data, model, trained):
    names = run_cell(
        nb,
        "by_sparsity = ",
        datasets={"One": data},
        networks={"One": [model, trained]},
        SEEDS=(5, 7),
        SPARSITIES=(0, 0.5),
    )
    both = [nb.sweep(own, data, nb.RULES, (0, 0.5)) for own in (model, trained)]
    found, table = names["sweeps"]["One"], names["by_sparsity"]
    assert found.index.get_level_values("seed").tolist() == [5] * 4 + [7] * 4
    for seed, own in zip((5, 7), both):
        assert found.loc[seed].equals(own)
    for row, other in zip(*(own.itertuples() for own in both)):
        for column in ("accuracy", "loss"):
            mean = (getattr(row, column) + getattr(other, column)) / 2
            place = table[column]["One", row.rule]
            assert place[row.sparsity] == pytest.approx(mean)


@pytest.mark.parametrize("rule", ["weight", "unit"])
def test_points_lost_are_a_mean_over_seeds(nb, seeds, judged, rule):
    both = {"One": seeds.assign(accuracy=0.5), "Two": seeds}
    table = pd.concat(both, names=["data"])
    table = table.pivot_table(["accuracy", "loss"], "sparsity", ["data", "rule"])
    names = run_cell(
        nb,
        "points_lost = ",
        by_sparsity=table,
        baseline=pd.DataFrame({("accuracy", "mean"): [0.5, 0.5]}),
        mnist=SimpleNamespace(title="One"),
        fashion=SimpleNamespace(title="Two"),
    )
    costs = names[f"{rule}s_cost"]
    rows = [row for row in seeds.itertuples() if row.rule == rule]
    own = {s: [r.accuracy for r in rows if r.sparsity == s] for s in (0, 0.8)}
    lost = 100 * (statistics.mean(own[0]) - statistics.mean(own[0.8]))
    assert len(own[0]) == len(own[0.8]) == 2
    assert costs.loc[0.8].tolist() == [0, pytest.approx(lost)]
    assert costs.loc[0].tolist() == [0, 0]


@pytest.mark.parametrize("rule", ["weight", "unit"])
def test_the_norm_removed_and_the_norm_left_make_the_whole(nb, trained, rule):
    kernels = trained.get_weights()[:-1]
    whole = sum(np.sum(kernel**2) for kernel in kernels)
    for sparsity in SPARSITIES:
        pruned = nb.prune(trained, nb.RULES[rule], sparsity)
        left = sum(np.sum(kernel**2) for kernel in pruned.get_weights()[:-1])
        gone = nb.removed_norm(trained, rule, sparsity)
        assert gone == pytest.approx(1 - left / whole, abs=1e-5)


def test_moves_are_medians_in_typical_initial_weights(nb, data):
    sizes = {"HIDDEN_UNITS": (12, 8, 6, 5)}
    start = nb.build_mlp((12, 8, 6, 5), nb.SEEDS[0])
    networks = {"One": [nb.train(start, data, 1, 0), None], "Two": [start]}
    moved = run_cell(nb, "moved.round", networks=networks, **sizes)["moved"]
    assert moved.columns.tolist() == [1, 2, 3, 4]
    pairs = zip(networks["One"][0].get_weights(), start.get_weights())
    for layer, (after, before) in zip(moved, pairs):
        after, before = after.ravel().tolist(), before.ravel().tolist()
        typical = statistics.mean(weight**2 for weight in before) ** 0.5
        far = [abs(a - b) / typical for a, b in zip(after, before)]
        ranked = sorted(range(len(after)), key=lambda i: abs(after[i]))
        largest = [far[i] for i in ranked[round(0.97 * len(after)) :]]
        expected = statistics.median(far), statistics.median(largest)
        assert moved.loc["One"][layer].tolist() == pytest.approx(expected, 1e-4)
    assert len(moved) == 4 and not moved.loc["Two"].any(axis=None)


# claims

PLACES = {"the real data": "STAND_IN", "a CPU": "ON_GPU"}


@pytest.fixture(params=[(), *itertools.combinations(PLACES, 1), tuple(PLACES)])
def missing(request, nb, monkeypatch):
    """Return what is missing where claims are checked."""
    for need, place in PLACES.items():
        monkeypatch.setattr(nb, place, need in request.param)
    return request.param


@pytest.mark.parametrize("needs", ["the real data", "a CPU", "nothing"])
@pytest.mark.parametrize("holds", [True, np.True_, False, np.False_, 0])
def test_a_claim_is_judged_where_what_it_needs_is_there(
    nb, claims, capsys, missing, needs, holds
):
    claim = "MNIST: two is more than one on a CPU."
    if not holds and needs not in missing:
        with pytest.raises(AssertionError, match=f"does not hold: {claim}"):
            nb.check(claim, holds, needs)
        assert not claims and not capsys.readouterr().out
        return
    nb.check(claim, holds, needs)
    verdict = f"not checked without {needs}" if needs in missing else "checked"
    assert claims == [(claim, verdict)]
    assert capsys.readouterr().out == f"{verdict}: {claim}\n"


def test_a_claim_needs_the_real_data_if_nothing_else_is_said(nb, claims, monkeypatch):
    monkeypatch.setattr(nb, "STAND_IN", True)
    nb.check("one is more than two", False)
    monkeypatch.setattr(nb, "STAND_IN", False)
    with pytest.raises(AssertionError):
        nb.check("one is more than two", False)
    nb.check("two is more than one", True)
    verdicts = [verdict for _, verdict in claims]
    assert verdicts == ["not checked without the real data", "checked"]


@pytest.mark.parametrize("holds", [True, False])
@pytest.mark.parametrize("needs", ["a GPU", "", "the CPU", None])
def test_an_unknown_need_is_an_error(nb, claims, capsys, needs, holds):
    with pytest.raises(KeyError):
        nb.check("two is more than one", holds, needs)
    assert not claims and not capsys.readouterr().out


def test_the_claims_are_listed_once_with_their_last_verdict(nb, capsys):
    told = [("one.", "checked"), ("two.", "not checked"), ("one.", "judged")]
    run_cell(nb, "dict(CLAIMS)", CLAIMS=told)
    assert capsys.readouterr().out == "judged: one.\nnot checked: two.\n"


def test_a_stand_in_is_noticed(nb, data):
    for titles, found in (["MNIST"], False), (["MNIST", data.title], True):
        names = run_cell(nb, "STAND_IN = ", datasets=dict.fromkeys(titles))
        assert names["STAND_IN"] is found


# a first try


def test_the_first_network_loses_its_smallest_weights_and_units(nb, data, figures):
    names = {**vars(nb), "load_dataset": lambda name: data}
    names = run_cell(SimpleNamespace(**names), "small.fit(")
    whole = names["small"].get_weights()
    names = run_cell(SimpleNamespace(**names), "zeroed.append", sparsity=0.5)
    for kernel, own in zip(whole[:2], names["small"].get_weights()):
        assert (own == nb.weight_mask(kernel, 0.5) * kernel).all()
    trial = run_cell(SimpleNamespace(**names), "trial.loc[")["trial"]
    assert [*trial] == ["by weights", "by units"]
    for percent, row in trial.iterrows():
        for rule, found in zip(nb.RULES.values(), row):
            pruned = [k * rule(k, percent / 100) for k in whole[:2]]
            logits = puts_out([*pruned, whole[2]], data.x_test)[-1]
            right = 100 * np.mean(logits.argmax(axis=1) == data.y_test)
            assert found == pytest.approx(right, abs=0.21)
    run_cell(SimpleNamespace(**names), "trial.plot", trial=trial, mnist=data)
    for line, (_, column) in zip(plt.gca().lines, trial.items(), strict=True):
        assert line.get_xdata().tolist() == trial.index.tolist()
        assert line.get_ydata().tolist() == column.tolist()


# figures


def images_in(ax):
    """Return the arrays of the images of a plot."""
    return [np.asarray(image.get_array()) for image in ax.images]


def shown(ax):
    """Return {(x, y): text} of the texts inside a plot."""
    return {text.get_position(): text.get_text() for text in ax.texts}


def on_screen(ax, values):
    """Return where values of the horizontal axis stand, in pixels."""
    return [ax.transData.transform((value, ax.get_ylim()[0]))[0] for value in values]


@pytest.mark.parametrize(("count", "rows"), [(1, 1), (3, 1), (6, 2), (4, 4)])
def test_panels_stand_in_rows(nb, figures, count, rows):
    axes = nb.panels(count, 2.5, rows=rows, sharey=True)
    assert list(axes) == plt.gcf().axes and len(axes) == count
    assert plt.gcf().get_size_inches().tolist() == [8, 2.5]
    axes[0].set_ylim(0, 7)
    assert all(ax.get_ylim() == (0, 7) for ax in axes)
    for number, ax in enumerate(axes):
        place = ax.get_subplotspec()
        place = place.rowspan.start, place.colspan.start
        assert place == divmod(number, count // rows)


KERNELS = (
    np.array([[0.5, 0.0, 1.0], [0.25, 0.0, 0.0]]),
    np.array([[1.0, 0.5], [0.75, 0.25], [0.0, 1.0]]),
)


def test_a_network_is_drawn_with_its_weights_and_its_units(nb, figures):
    ax = plt.subplots()[1]
    nb.draw_network(ax, KERNELS, "slim", "red")
    dotted = [line for line in ax.lines if line.get_linestyle() == ":"]
    solid = [line for line in ax.lines if line not in dotted]
    sizes = [0.5, 1, 0.25, 1, 0.5, 1]
    widths = [line.get_linewidth() for line in solid]
    assert sorted(sizes) == sorted((w / 4) ** (2 / 3) for w in widths)
    assert len(dotted) == 12 - 6 and all(line.get_lw() < 1 for line in dotted)
    assert all(same_color(line.get_color(), "red") for line in solid)
    assert not any(same_color(line.get_color(), "red") for line in dotted)
    units = [c.get_offsets()[0].tolist() for c in ax.collections]
    columns = [sum(x == column for x, _ in units) for column in range(3)]
    assert columns == [2, 3, 2]
    looks = [c.get_linestyle()[0][1] is None for c in ax.collections]
    assert looks == [True, True, True, False, True, True, True]
    ends = {tuple(end) for line in ax.lines for end in line.get_xydata()}
    assert ends == set(map(tuple, units))
    assert ax.get_title() == "slim" and same_color(ax.title.get_color(), "red")
    (text,) = ax.texts
    assert numbers_in(text.get_text()) == [6, 2], "weights and hidden units"


def test_both_pruned_networks_have_half_of_the_weights(nb, figures):
    run_cell(nb, 'draw_network(axes[0], sketch, "dense"')
    dense, weights, units = (
        numbers_in(ax.texts[0].get_text()) for ax in plt.gcf().axes
    )
    assert 2 * weights[0] == 2 * units[0] == dense[0]
    assert weights[1] == dense[1] > units[1]
    colors = [ax.title.get_color() for ax in plt.gcf().axes]
    assert all(map(same_color, colors, (nb.GRAY, nb.BLUE, nb.ORANGE)))


def test_images_of_every_class_are_shown(nb, data, figures):
    given = {"mnist": data, "load_dataset": lambda name: data}
    run_cell(nb, 'fashion = load_dataset("fashion_mnist")', **given)
    axes = plt.gcf().axes
    assert [ax.get_title() for ax in axes] == [*data.class_names] * 2
    for label, ax in zip([*range(10)] * 2, axes):
        first = [*data.y_train].index(label)
        assert (images_in(ax)[0] == data.x_train[first]).all()


def test_two_rules_are_drawn_on_a_kernel(nb, figures):
    names = run_cell(nb, "tiny = ")
    kernel, axes = names["tiny"], plt.gcf().axes
    masks = kernel > 0, nb.weight_mask(kernel, 0.5), nb.unit_mask(kernel, 0.5)
    colors = nb.GRAY, nb.BLUE, nb.ORANGE
    for ax, mask, color in zip(axes, masks, colors, strict=True):
        expected = {(j, i): str(kernel[i, j]) for i, j in np.ndindex(2, 2)}
        assert shown(ax) == expected
        for bar in ax.patches:
            x, y = (round(center) for center in bar.get_center())
            look = same_color(bar.get_facecolor()[:3], color), not bar.get_hatch()
            assert look == (mask[y, x], mask[y, x])


def test_masks_are_drawn(nb, data, figures):
    model = nb.build_mlp((120, 8))
    run_cell(nb, "last_hidden = ", model=model)
    kernel = model.get_weights()[1][:100]
    for ax, rule in zip(plt.gcf().axes, nb.RULES.values(), strict=True):
        assert (ax.get_xlabel(), ax.get_ylabel()) == ("unit", "input")
        assert (images_in(ax)[0] == rule(kernel, 0.8)).all()


def test_a_line_is_a_mean_and_its_band_the_range(nb, figures):
    rows = [("a", 2, 1.0), ("a", 1, 5.0), ("a", 2, 4.0), ("a", 2, 10.0)]
    rows += [("b", 1, 7.0), ("a", 1, 6.0)]
    results = pd.DataFrame(rows, columns=["kind", "size", "value"])
    ax, color = plt.subplots()[1], (1.0, 0.0, 0.0, 1.0)
    drawn = nb.plot_lines(ax, results, "size", "value", "kind", {"a": {"c": color}})
    lines = lines_of(ax)
    assert list(lines) == ["a", "b"] and lines["a"].get_color() == color
    assert np.array_equal(lines["a"].get_data(), ([1, 2], [5.5, 5]))
    assert np.array_equal(lines["b"].get_data(), ([1], [7]))
    means = {name: own.to_dict() for name, own in drawn.items()}
    assert means == {"a": {1: 5.5, 2: 5}, "b": {1: 7}}
    band, point = ax.collections
    corners = {(1, 5), (1, 6), (2, 1), (2, 10)}
    assert set(map(tuple, band.get_paths()[0].vertices)) == corners
    assert set(map(tuple, point.get_paths()[0].vertices)) == {(1, 7)}
    assert tuple(band.get_facecolor()[0]) == (*color[:3], 0.2)


def test_an_axis_of_sparsities_is_spaced_by_what_is_left(nb, figures):
    ax = plt.subplots()[1]
    nb.sparsity_axis(ax)
    ticks = [round(100 * tick) for tick in ax.get_xticks()]
    assert [int(label.get_text()) for label in ax.get_xticklabels()] == ticks
    assert set(ticks) <= {100 * s for s in nb.SPARSITIES}
    assert {0, 50, 90, 99} <= set(ticks)
    whole, tenth, hundredth = on_screen(ax, (0, 0.9, 0.99))
    assert tenth - whole == pytest.approx(hundredth - tenth) and tenth > whole


FALLING = {"weight": (0.9, 0.895, 0.885, 0.5, 0.2), "unit": (0.9, 0.878, 0.7, 0.3, 0.1)}


def test_sweeps_are_drawn(nb, figures):
    rows = [
        {"rule": rule, "sparsity": s, "accuracy": own + 0.002 * seed, "loss": 2 - own}
        for seed in (-1, 0, 1)
        for rule, falling in FALLING.items()
        for s, own in zip((0, 0.5, 0.8, 0.9, 0.99), falling)
    ]
    one = pd.DataFrame(rows)
    other = one.assign(accuracy=one.accuracy / 2, loss=2 * one.loss)
    nb.draw_sweeps({"One": one, "Two": other})
    axes = plt.gcf().axes
    titles = [ax.get_title() for ax in axes]
    assert titles == [f"{t}: {c}" for t in ("One", "Two") for c in COLUMNS[2:4]]
    falls = {"One": {"weight": 0.8, "unit": 0.5}, "Two": {"weight": 0.9, "unit": 0.5}}
    for ax, (title, column) in zip(axes, itertools.product(falls, COLUMNS[2:4])):
        accuracy, lines = column == "accuracy", lines_of(ax)
        table = {"One": one, "Two": other}[title]
        means = table.groupby(["rule", "sparsity"])[column].mean() * 100**accuracy
        for rule in nb.RULES:
            x, y = lines[rule].get_data()
            assert x.tolist() == [0, 0.5, 0.8, 0.9, 0.99]
            assert y == pytest.approx(means[rule].to_numpy())
            assert same_color(lines[rule].get_color(), nb.STYLES[rule]["color"])
        assert set(lines["dense"].get_ydata()) == {means["weight"][0]}
        guess = 10 if accuracy else np.log(10)
        assert lines["guessing"].get_ydata()[0] == pytest.approx(guess, rel=0.002)
        triangles = [line for line in ax.lines if line.get_marker() == "v"]
        found = [(line.get_xdata()[0], line.get_color()) for line in triangles]
        places = falls[title].items() if accuracy else ()
        assert found == [(s, nb.STYLES[rule]["color"]) for rule, s in places]
        for (place, color), text in zip(found, ax.texts, strict=True):
            assert numbers_in(text.get_text()) == [100 * place]
            assert (text.get_position()[0], text.get_color()) == (place, color)
    (legend,) = plt.gcf().legends
    assert len(legend.get_texts()) == 4


@pytest.mark.parametrize("titles", [["One"], ["One", "Two"]])
def test_accuracy_is_drawn_by_size(nb, seeds, figures, judged, titles):
    both = dict(zip(["Two", "One"], [seeds.iloc[::-1], seeds]))
    shown_last = {title: both[title] for title in titles[::-1]}
    if len(titles) < 2:
        shown_last = {"none": seeds, **shown_last}
    costs = {"units_cost": pd.DataFrame({0.8: [5]}).T}
    costs["weights_cost"] = pd.DataFrame({0.9: [3]}).T
    mnist = SimpleNamespace(title="One")
    run_cell(nb, "by_size = results", sweeps=shown_last, mnist=mnist, **costs)
    axes = plt.gcf().axes
    assert [ax.get_title() for ax in axes] == [*shown_last]
    assert {ax.get_xlabel() for ax in axes} == {"parameters left"}
    assert axes[0].get_ylabel() == "test accuracy (%)"
    for ax, rule in itertools.product(axes, nb.RULES):
        own = seeds[seeds.rule == rule]
        means = own.groupby("sparsity")[["parameters", "accuracy"]].mean()
        means = means.groupby("parameters").accuracy.mean()
        size, accuracy = lines_of(ax)[rule].get_data()
        np.testing.assert_allclose(size, means.index)
        np.testing.assert_allclose(accuracy, 100 * means)


def test_the_norm_removed_is_drawn(nb, data, trained, model, figures):
    given = {"networks": {data.title: [model, trained]}, "mnist": data}
    given |= {"datasets": {data.title: data}, "SPARSITIES": (0, 0.5, 0.9)}
    removed = run_cell(nb, "removed.columns", **given)["removed"][data.title]
    assert removed.index.tolist() == [0, 50, 90, 100]
    for rule, percent in itertools.product(nb.RULES, removed.index):
        both = [nb.removed_norm(m, rule, percent / 100) for m in (model, trained)]
        assert removed[rule][percent] == pytest.approx(100 * statistics.mean(both))
    equal, *lines = plt.gca().lines[:3]
    assert (equal.get_xdata() == equal.get_ydata()).all()
    texts = {t.get_color(): numbers_in(t.get_text()) for t in plt.gca().texts}
    for rule, line in zip(nb.RULES, lines, strict=True):
        assert line.get_xdata().tolist() == removed.index.tolist()
        assert line.get_ydata().tolist() == removed[rule].tolist()
        color = nb.STYLES[rule]["color"]
        assert line.get_color() == color
        assert texts[color] == [round(removed[rule][50])]


@pytest.mark.parametrize("strong", [None, (3, 5)])
def test_the_weights_kept_are_counted_by_pixel(
    nb, data, model, figures, judged, strong
):
    kernel = np.abs(model.get_weights()[0])
    if strong:
        kernel = np.full((784, 12), 0.1)
        kernel[28 * strong[0] + strong[1]] = -1
    model.set_weights([kernel, *model.get_weights()[1:]])
    networks = {"One": [model], "Two": [nb.copy_of(model), None]}
    sets = dict.fromkeys(networks, data)
    one = SimpleNamespace(title="One")
    names = run_cell(nb, "kept_97 = ", networks=networks, datasets=sets, mnist=one)
    expected = np.zeros((28, 28), int)
    ranked = np.argsort(np.abs(kernel), axis=None, kind="stable")
    for place in ranked[round(0.97 * kernel.size) :]:
        expected[divmod(place // 12, 28)] += 1
    assert not strong or expected[strong] == 12
    pictures = plt.gcf().axes[:4]
    for ax, average, title in zip(pictures[::2], pictures[1::2], networks, strict=True):
        assert (names["kept_97"][title] == expected).all()
        assert ax.get_title() == title and (images_in(ax)[0] == expected).all()
        assert images_in(average)[0] == pytest.approx(data.x_train.mean(axis=0))
    assert names["inner"] == expected[2:26, 2:26].sum()


def test_answers_are_drawn_as_they_are(nb, data, figures):
    answers = pd.DataFrame([["a", "b"], ["c", "c"], ["b", "a"]], [4, 7, 9], [0, 0.95])
    truths = ["a", "c", "a"]
    nb.draw_answers(data.x_test[:3], truths, answers)
    (ax,) = plt.gcf().axes
    assert [*map(np.ndarray.tolist, images_in(ax))] == data.x_test[:3].tolist()
    assert len(ax.texts) == len(ax.patches) == 6
    bars = {tuple(map(round, b.get_center())): b.get_facecolor() for b in ax.patches}
    looks = {True: set(), False: set()}
    for (x, y), text in shown(ax).items():
        mark, answer = text.split()
        assert answer == answers.iloc[y, x]
        looks[answer == truths[y]].add((mark, bars[x, y]))
    (right,), (wrong,) = looks.values()
    assert right[0] != wrong[0] and right[1] != wrong[1]
    labels = [label.get_text() for label in ax.get_xticklabels()]
    assert [numbers_in(label) for label in labels] == [[], [95]]
    for y, image in enumerate(ax.images):
        _, edge, bottom, top = image.get_extent()
        assert edge < -0.5 and top < y < bottom


def test_images_that_flip_ever_earlier_are_chosen(nb, data, trained, figures):
    given = {"fashion": data, "networks": {data.title: [trained]}}
    chosen = run_cell(nb, "flipping = ", **given)["chosen"]
    levels = (0, 0.8, 0.9, 0.95, 0.97, 0.99)
    weights, right = trained.get_weights(), []
    for s in levels:
        pruned = [*(k * nb.weight_mask(k, s) for k in weights[:2]), weights[2]]
        answers = puts_out(pruned, data.x_test)[-1].argmax(axis=1)
        right.append(answers == data.y_test)
    histories, expected = np.transpose(right).tolist(), []
    for wrong in (4, 3, 2, 0):
        wanted = [True] * (6 - wrong) + [False] * wrong
        expected += [histories.index(wanted)] if wanted in histories else []
    corrected = [i for i, own in enumerate(histories) if own[2] and not own[0]]
    assert chosen == [*expected, *corrected[:1]] and len(chosen) > 2
    assert plt.gca().images
