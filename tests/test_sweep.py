"""Training, measuring and sweeping, on the stand-in for MNIST."""

import dataclasses
import gzip
import itertools
import statistics
from copy import deepcopy
from types import SimpleNamespace

import keras
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from conftest import run_cell
from scipy.sparse import csr_matrix

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
    return pd.concat([results, other], keys=[0, 1])


@pytest.fixture
def ledger(nb, monkeypatch):
    """Return a ledger in which part "One" has begun."""
    monkeypatch.setattr(nb, "LEDGER", {})
    nb.begin("One")
    return nb.LEDGER


@pytest.fixture
def judged(nb, ledger, monkeypatch):
    """Let every check of a cell pass: its results are made up."""
    monkeypatch.setattr(nb, "check", lambda claim, holds: None)


def same_weights(model, other):
    """Return whether two models have equal weights."""
    pairs = zip(model.get_weights(), other.get_weights(), strict=True)
    return all(np.array_equal(one, two) for one, two in pairs)


def measured_by_keras(model, data):
    """Return loss and accuracy on the test rows, computed by Keras alone."""
    copy = keras.models.clone_model(model)
    copy.set_weights(model.get_weights())
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    copy.compile(loss=loss, metrics=["accuracy"])
    return copy.evaluate(data.x_test, data.y_test, verbose=0)


def measured_by_numpy(model, data):
    """Return loss and accuracy on the test rows, computed by NumPy alone."""
    *hidden, last = model.get_weights()
    values = data.x_test.reshape(len(data.x_test), -1) / 255
    for kernel in hidden:
        values = np.maximum(values @ kernel, 0)
    logits = values @ last
    right = np.take_along_axis(logits, data.y_test[:, None], axis=1)[:, 0]
    loss = np.mean(np.logaddexp.reduce(logits, axis=1) - right)
    return loss, np.mean(logits.argmax(axis=1) == data.y_test)


def trained_alone(nb, model, data, epochs, seed):
    """Return a copy of a model that was compiled and trained by itself."""
    rows, copy = nb.holdout(data), keras.models.clone_model(model)
    for variable, start in zip(copy.variables, model.variables, strict=True):
        variable.assign(start)
    for layer in copy.layers:
        if isinstance(layer, keras.layers.Normalization):
            layer.finalize_state()
    steps = epochs * -(-len(rows.x_train) // nb.BATCH_SIZE)
    learner, _ = nb.learner_for.__wrapped__(model.to_json(), 0.0)
    warmup = {"warmup_steps": steps // 6, "warmup_target": nb.LEARNING_RATE}
    schedule = keras.optimizers.schedules.CosineDecay(
        0.0, steps - steps // 6, **warmup
    )
    settings = learner.optimizer.get_config()
    optimizer = keras.optimizers.SGD.from_config(
        {**settings, "learning_rate": schedule}
    )
    copy.compile(optimizer, nb.LOSS, jit_compile=False)
    keras.utils.set_random_seed(seed)
    options = {"batch_size": nb.BATCH_SIZE, "epochs": epochs, "verbose": 0}
    copy.fit(rows.x_train, rows.y_train, **options)
    return copy


def lines_of(ax):
    """Return {label: (x, y)} of the lines of a plot."""
    return {line.get_label(): line.get_data() for line in ax.get_lines()}


# networks


def test_the_network_is_drawn_from_its_seed(nb, model):
    assert same_weights(model, nb.build_mlp((12, 8), seed=0))
    assert not same_weights(model, nb.build_mlp((12, 8), seed=1))


def test_the_network_has_no_biases_and_ends_in_logits(nb, model):
    shapes = [weights.shape for weights in model.get_weights()]
    assert shapes == [(784, 12), (12, 8), (8, 10)]
    assert model.layers[-1].name == "logits"
    images = np.full((2, 28, 28), 255, "uint8")
    hidden = np.ones((2, 784))
    for kernel in model.get_weights()[:-1]:
        hidden = np.maximum(hidden @ kernel, 0)
    logits = hidden @ model.get_weights()[-1]
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


@pytest.mark.parametrize(("dropout", "names"), [(0, ""), (0.1, "drop ")])
def test_networks_of_equal_architecture_have_equal_names(nb, dropout, names):
    one, other = (nb.build_mlp((12, 8), s, dropout=dropout) for s in (0, 1))
    assert one.to_json() == other.to_json()
    names = f"scaled flat {names}hidden_1 hidden_2 logits"
    assert [layer.name for layer in one.layers] == names.split()


# training


def test_the_last_twelfth_is_held_out(nb, data):
    rows, total = nb.holdout(data), len(data.x_train)
    held_out = round(total / 12)
    assert len(rows.x_train) == len(rows.y_train) == total - held_out
    assert (rows.x_train == data.x_train[:-held_out]).all()
    assert (rows.y_train == data.y_train[:-held_out]).all()
    assert (rows.x_test == data.x_train[-held_out:]).all()
    assert (rows.y_test == data.y_train[-held_out:]).all()
    assert rows.title == data.title


def test_training_teaches(nb, data, model, trained):
    before = nb.evaluate(model, data)["accuracy"]
    assert nb.evaluate(trained, data)["accuracy"] > before + 0.2


def frozen(nb):
    """Return a network whose first kernel is not trained."""
    model = nb.build_mlp((12, 8), seed=0)
    model.get_layer("hidden_1").trainable = False
    return model


NETWORKS = {
    "plain": lambda nb: nb.build_mlp((12, 8), seed=0),
    "L1": lambda nb: nb.build_mlp((12,), 0, keras.regularizers.L1(1e-3)),
    "dropout": lambda nb: nb.build_mlp((12, 8), seed=0, dropout=0.3),
    "convolutional": lambda nb: nb.build_cnn((4,), 8),
    "frozen": frozen,
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_learner_trains_as_the_model_itself_would(nb, data, name):
    model = NETWORKS[name](nb)
    expected = trained_alone(nb, model, data, 2, seed=1)
    for _ in range(2):
        assert same_weights(nb.train(model, data, 2, seed=1), expected)


def pruned(nb, data, model):
    """Prune while training."""
    nb.prune_in_training(model, data, nb.unit_mask, 0.9, EPOCHS, seed=1)


def fine_tuned(nb, data, model):
    """Train what another rule has pruned."""
    nb.fine_tune(nb.prune(model, nb.weight_mask, 0.5), data, EPOCHS, seed=1)


def stopped(nb, data, model):
    """Stop a training early, at its first epoch's weights."""
    options = {"monitor": "loss", "restore_best_weights": True}
    stop = keras.callbacks.EarlyStopping(mode="max", patience=1, **options)
    nb.train(model, data, EPOCHS, 1, [stop])


def broken_off(nb, data, model, error=KeyboardInterrupt):
    """Break off a training under masks."""
    pruner = nb.Pruner(nb.unit_mask, nb.ConstantSparsity(0.9, 0))
    with pytest.raises(error, match="enough"):
        nb.train(model, data, EPOCHS, 1, [pruner, Stop(error("enough"))])


def failed(nb, data, model):
    """Let a callback fail under masks."""
    broken_off(nb, data, model, ValueError)


def other_architecture(nb, data, model):
    """Train another network."""
    nb.train(nb.build_mlp((8, 12), seed=1), data, EPOCHS, seed=1)


def other_seed(nb, data, model):
    """Train from other weights with another seed."""
    other = nb.build_mlp((12, 8), seed=1, dropout=0.3)
    assert other.to_json() == model.to_json()
    nb.train(other, data, EPOCHS, seed=1)


BETWEEN = (pruned, fine_tuned, stopped, broken_off, failed)
BETWEEN += (other_architecture, other_seed)


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


def test_networks_of_one_architecture_share_a_learner(nb, data):
    nb.learner_for.cache_clear()
    for seed in (0, 1):
        nb.train(nb.build_mlp((12, 8), seed), data, EPOCHS, seed)
    assert nb.learner_for.cache_info().currsize == 1
    nb.train(nb.build_mlp((8, 12)), data, EPOCHS, seed=0)
    assert nb.learner_for.cache_info().currsize == 2


def normalized(images):
    """Return a network behind a normalization adapted to images."""
    keras.utils.set_random_seed(0)
    parts = [
        keras.Input((28, 28), name="images"),
        keras.layers.Normalization(axis=None, name="scaled"),
        keras.layers.Flatten(name="flat"),
        keras.layers.Dense(10, name="logits"),
    ]
    parts[1].adapt(images)
    return keras.Sequential(parts, name="normalized")


def test_networks_that_share_a_learner_keep_their_normalization(nb, data):
    nb.learner_for.cache_clear()
    images = data.x_train.astype("float32")
    networks = [normalized(images * factor) for factor in (1, 3, 1)]
    for network in networks:
        expected = trained_alone(nb, network, data, EPOCHS, seed=1)
        assert same_weights(nb.train(network, data, EPOCHS, 1), expected)
    assert nb.learner_for.cache_info().currsize == 1


@pytest.mark.parametrize("dropout", [0, 0.3])
def test_another_seed_trains_other_weights(nb, data, dropout):
    model = nb.build_mlp((12, 8), seed=0, dropout=dropout)
    one, other = (nb.train(model, data, EPOCHS, seed) for seed in (0, 1))
    assert not same_weights(one, other)


def test_validation_and_test_rows_are_never_trained_on(
    nb, data, model, trained
):
    held_out = round(len(data.x_train) / 12)
    x_train, y_train = data.x_train.copy(), data.y_train.copy()
    x_train[-held_out:] = 255 - x_train[-held_out:]
    y_train[-held_out:] = 9 - y_train[-held_out:]
    poisoned = dataclasses.replace(
        data,
        x_train=x_train,
        y_train=y_train,
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
    output, accuracies = capsys.readouterr().out, []
    for model, seed in zip(models, (0, 3), strict=True):
        alone = nb.train(nb.build_mlp((12, 8), seed), data, 2, seed)
        assert same_weights(model, alone)
        accuracies.append(measured_by_numpy(model, nb.holdout(data))[1])
    found = f"2 trained, validation accuracy {np.mean(accuracies):.1%}"
    assert output == f"{data.title}: {found}\n"


# measuring


def test_evaluate_agrees_with_keras(nb, data, trained):
    model = nb.prune(trained, nb.weight_mask, 0.9)
    loss, accuracy = measured_by_keras(model, data)
    weights = itertools.chain(*(w.flat for w in model.get_weights()))
    assert nb.evaluate(model, data) == {
        "accuracy": pytest.approx(accuracy, abs=1e-5),
        "loss": pytest.approx(loss, abs=1e-5),
        "parameters": sum(weight != 0 for weight in weights),
    }


def test_evaluate_survives_huge_logits(nb, data, trained):
    model = nb.copy_of(trained)
    model.set_weights([100 * weights for weights in trained.get_weights()])
    before, measures = nb.evaluate(trained, data), nb.evaluate(model, data)
    assert measures["accuracy"] == before["accuracy"]
    assert np.isfinite(measures["loss"])


@pytest.mark.parametrize("rows", [1, 3, 7, 10, 500])
def test_logits_do_not_depend_on_the_batches(nb, data, trained, rows):
    few = {"x_test": data.x_test[:10], "y_test": data.y_test[:10]}
    few = dataclasses.replace(data, **few)
    logits, sizes = nb.logits_of(trained, few.x_test, rows), []
    np.testing.assert_allclose(logits, trained(few.x_test), atol=1e-5)

    def watched(images, training):
        sizes.append(len(images))
        return trained(images, training=training)

    measures = nb.evaluate(trained, few, watched, rows)
    assert measures == pytest.approx(nb.evaluate(trained, few))
    assert nb.disagreement(watched, trained, few, rows) <= 1e-5
    assert sum(sizes) == 20 and max(sizes) <= rows


# sweeping


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
        loss, accuracy = measured_by_numpy(pruned, data)
        assert row.accuracy == pytest.approx(accuracy, abs=1e-5)
        assert row.loss == pytest.approx(loss, abs=1e-5)


def test_a_sweep_counts_the_parameters_left(results, trained):
    left = results.set_index(["rule", "sparsity"]).parameters
    whole = sum(np.count_nonzero(w) for w in trained.get_weights())
    assert left["weight", 0] == left["unit", 0] == whole
    assert left["unit", 0.5] == 784 * 6 + 6 * 4 + 4 * 10
    assert left["unit", 0.9] == 784 * 1 + 1 * 1 + 1 * 10
    assert left["weight", 0.5] <= 784 * 6 + 6 * 8 + 8 * 10
    assert left["weight", 1] == left["unit", 1] == 8 * 10


def test_without_any_weights_all_images_get_one_answer(results, data):
    empty = results[results.sparsity == 1]
    assert len(empty) == 2
    assert empty.loss.to_numpy() == pytest.approx(np.log(10))
    assert (empty.accuracy == (data.y_test == 0).mean()).all()


def test_a_sweep_leaves_the_model_as_it_is(nb, data, trained):
    copy = nb.copy_of(trained)
    nb.sweep(trained, data, nb.RULES, (0.5, 1))
    assert same_weights(trained, copy)


@pytest.mark.parametrize("rule", ["weight", "unit"])
def test_points_lost_are_a_mean_over_seeds(nb, seeds, rule):
    both = {"One": seeds.assign(accuracy=0.5), "Two": seeds}
    costs = run_cell(nb, "points_lost = ", sweeps=both)[f"{rule}s_cost"]
    rows = [row for row in seeds.itertuples() if row.rule == rule]
    own = {s: [r.accuracy for r in rows if r.sparsity == s] for s in (0, 0.9)}
    lost = 100 * (statistics.mean(own[0]) - statistics.mean(own[0.9]))
    assert len(own[0]) == len(own[0.9]) == 2
    assert costs.loc[0.9].tolist() == [0, pytest.approx(lost)]
    assert costs.loc[0].tolist() == [0, 0]


@pytest.mark.parametrize("rule", ["weight", "unit"])
def test_the_norm_removed_and_the_norm_left_make_the_whole(nb, trained, rule):
    kernels = trained.get_weights()[:-1]
    whole = sum(np.sum(kernel**2) for kernel in kernels)
    for sparsity in SPARSITIES:
        pruned = nb.prune(trained, nb.RULES[rule], sparsity)
        left = sum(np.sum(kernel**2) for kernel in pruned.get_weights()[:-1])
        gone = nb.removed_norm(trained, nb.RULES[rule], sparsity)
        assert gone == pytest.approx(1 - left / whole, abs=1e-5)


@pytest.mark.parametrize("strong", [None, (3, 5)])
def test_the_weights_kept_are_counted_by_pixel(
    nb, model, figures, judged, strong
):
    kernel = np.abs(model.get_weights()[0])
    if strong:
        kernel = np.full((784, 12), 0.1)
        kernel[28 * strong[0] + strong[1]] = -1
    model.set_weights([kernel, *model.get_weights()[1:]])
    networks = {"One": [model], "Two": [nb.copy_of(model), None]}
    one = SimpleNamespace(title="One")
    names = run_cell(nb, "pixel row", networks=networks, mnist=one)
    expected = np.zeros((28, 28), int)
    ranked = np.argsort(np.abs(kernel), axis=None, kind="stable")
    for place in ranked[round(0.97 * kernel.size) :]:
        expected[divmod(place // 12, 28)] += 1
    assert not strong or expected[strong] == 12
    pictures = [ax for ax in plt.gcf().axes if ax.get_title()]
    for ax, title in zip(pictures, networks, strict=True):
        assert (names["kept_97"][title] == expected).all()
        assert ax.get_title() == title
        assert (ax.images[0].get_array() == expected).all()
        assert ax.get_xlabel() == "pixel column"
        assert ax.get_ylabel() == "pixel row"


def test_moves_are_medians_in_typical_initial_weights(nb, model, trained):
    pairs = zip(trained.get_weights(), model.get_weights(), strict=True)
    for after, before in list(pairs)[:-1]:
        found = nb.moves(after, before)
        after, before = after.ravel().tolist(), before.ravel().tolist()
        typical = statistics.mean(weight**2 for weight in before) ** 0.5
        moved = [abs(a - b) / typical for a, b in zip(after, before)]
        ranked = sorted(range(len(after)), key=lambda i: abs(after[i]))
        largest = [moved[i] for i in ranked[round(0.97 * len(after)) :]]
        assert found == {
            "all": pytest.approx(statistics.median(moved), 1e-4),
            "largest 3 %": pytest.approx(statistics.median(largest), 1e-4),
        }


def test_what_was_not_trained_has_not_moved(nb, model):
    for kernel in model.get_weights():
        assert set(nb.moves(kernel, kernel.copy()).values()) == {0}


def test_moves_are_tabled_by_kernel(nb, model, trained, judged):
    names = run_cell(
        nb, "moved.round", networks={"One": [trained]}, HIDDEN_UNITS=(12, 8)
    )
    pairs = list(zip(trained.get_weights(), model.get_weights()))
    expected = [nb.moves(*pair) for pair in pairs[:-1]]
    assert names["moved"]["One"].to_dict("records") == expected


# speed


CHAINS = {
    "dense": ((6,), ["Dense", 5], ["Dense", 3]),
    "dense on a sequence": ((7, 4), ["Dense", 5], ["Dense", 3]),
    "one axis": ((9, 2), ["Conv1D", 3, 4], ["Conv1D", 2, 2]),
    "strides": ((9, 8, 2), ["Conv2D", 4, 3, 2], ["Conv2D", 3, (1, 2)]),
    "three axes": ((5, 4, 6, 2), ["Conv3D", 3, 2], ["Dense", 2]),
    "mixed": ((8, 8, 1), ["Conv2D", 2, 3], ["Flatten"], ["Dense", 4]),
    "pooled": ((9, 2), ["Conv1D", 4, 2], ["MaxPooling1D"], ["Conv1D", 3, 2]),
}


@pytest.mark.parametrize("name", CHAINS)
def test_flops_count_each_product_and_its_addition(nb, name):
    shape, *layers = CHAINS[name]
    layers = [getattr(keras.layers, kind)(*args) for kind, *args in layers]
    model = keras.Sequential([keras.Input(shape), *layers])
    products = 0
    for layer in model.layers:
        if layer.weights:
            kernel, bias = layer.weights
            layer.set_weights([np.ones(kernel.shape), np.zeros(bias.shape)])
            products += np.sum(layer(np.ones((1, *layer.input.shape[1:]))))
    assert nb.flops(model) == 2 * products > 0


def test_flops_count_padding_and_zeros_like_other_numbers(nb):
    layer = keras.layers.Conv2D(4, 3, padding="same")
    model = keras.Sequential([keras.Input((6, 5, 2)), layer])
    assert nb.flops(model) == 2 * (3 * 3 * 2 * 4) * (6 * 5)
    mlp = nb.prune(nb.build_mlp((12, 8)), nb.weight_mask, 1)
    assert nb.flops(mlp) == 2 * mlp.count_params()


def test_a_sparse_model_computes_the_same(nb, data, trained):
    for sparsity in SPARSITIES:
        pruned = nb.prune(trained, nb.weight_mask, sparsity)
        kernels = [csr_matrix(k.T) for k in pruned.get_weights()]
        logits = nb.sparse_logits(kernels, data.x_test[:20])
        np.testing.assert_allclose(logits, pruned(data.x_test[:20]), atol=1e-4)


def test_what_is_timed_computes_what_it_should(nb, data, trained, monkeypatch):
    found, images = {}, data.x_test[:20]

    def medians(calls, repeats):
        found.update({way: call() for way, call in calls.items()})
        return dict.fromkeys(calls, 2)

    monkeypatch.setattr(nb, "medians", medians)
    zeros, units = (nb.prune(trained, r, 0.5) for r in nb.RULES.values())
    times = nb.latency(trained, zeros, nb.shrink(units), images)
    assert times == dict.fromkeys(["dense", *nb.WAYS], 1)
    models = {"dense": trained, "masked": zeros, "CSR": zeros, "shrunk": units}
    for way, model in models.items():
        np.testing.assert_allclose(found[way], model(images), atol=1e-4)


@pytest.mark.parametrize("write", ["keras", "gzip", "csr", "int8"])
@pytest.mark.parametrize("sparsity", [0, 0.9])
def test_what_is_stored_can_be_read_back(
    nb, data, trained, tmp_path, write, sparsity
):
    pruned = nb.prune(trained, nb.weight_mask, sparsity)
    restored = getattr(nb, f"as_{write}")(pruned, tmp_path)
    difference = nb.disagreement(pruned, restored, data)
    if write == "int8":
        weighing = [layer for layer in restored.layers if layer.weights]
        assert {x.quantization_mode for x in weighing} == {"int8"}
        assert len(weighing) == 3 and 0 < difference < 0.05
    else:
        assert same_weights(pruned, restored) and difference == 0
    if write in ("gzip", "int8"):
        (file,) = tmp_path.iterdir()
        file.write_bytes(gzip.decompress(file.read_bytes()))
        loaded = keras.models.load_model(file)
        assert nb.disagreement(restored, loaded, data) == 0


@pytest.mark.parametrize("write", ["keras", "gzip", "csr", "int8"])
def test_bytes_are_those_of_what_is_written(
    nb, data, trained, tmp_path, write
):
    pruned = nb.prune(trained, nb.unit_mask, 0.8)
    both = {"pruned": pruned, "shrunk": nb.shrink(pruned)}
    both = {name: {data.title: network} for name, network in both.items()}
    names = run_cell(nb, "written_as =", model=trained, mnist=data, **both)
    columns = dict(zip(("keras", "gzip", "csr", "int8"), names["written_as"]))
    for version, network in names["versions"].items():
        getattr(nb, f"as_{write}")(network, tmp_path)
        size = sum(file.stat().st_size for file in tmp_path.iterdir())
        found = names["stored"].loc[version]
        assert found["kB", columns[write]] == round(size / 1000) > 0
        accuracy = 100 * nb.evaluate(network, data)["accuracy"]
        error = abs(found["accuracy (%)", columns[write]] - accuracy)
        assert error < (5 if write == "int8" else 1e-9)


def test_every_way_to_run_a_model_is_timed(nb, data, trained):
    zeros, units = (nb.prune(trained, r, 0.5) for r in nb.RULES.values())
    images = data.x_test[:101]
    times = nb.latency(trained, zeros, nb.shrink(units), images)
    assert set(times) == {"dense", *nb.WAYS}
    assert times["dense"] == 1 and min(times.values()) > 0


# claims


def test_a_true_claim_is_printed_and_recorded(nb, ledger, capsys):
    nb.check("MNIST: two is more than one.", 2 > 1)
    assert ledger == {"One": {"MNIST: two is more than one.": "checked"}}
    output = capsys.readouterr().out
    assert output == "checked: MNIST: two is more than one.\n"


@pytest.mark.parametrize("false", [False, np.False_, 0])
def test_a_false_claim_stops(nb, ledger, capsys, false):
    with pytest.raises(AssertionError, match="one is more than two"):
        nb.check("one is more than two", false)
    assert ledger == {"One": {}} and not capsys.readouterr().out


def test_a_claim_is_entered_in_the_part_begun_last(nb, ledger):
    nb.check("one", True)
    nb.begin("Two")
    nb.check("two", True)
    nb.check("three", True)
    both = {"two": "checked", "three": "checked"}
    assert ledger == {"One": {"one": "checked"}, "Two": both}


def test_a_claim_before_any_part_is_entered_in_none(nb, monkeypatch):
    monkeypatch.setattr(nb, "LEDGER", deepcopy(nb.LEDGER))
    nb.check("one", True)
    assert nb.LEDGER == {"": {"one": "checked"}}


def test_a_part_run_again_starts_empty(nb, ledger):
    nb.check("old", True)
    nb.begin("Two")
    nb.check("other", True)
    nb.begin("One")
    two = {"other": "checked"}
    assert ledger == {"One": {}, "Two": two}
    nb.check("new", True)
    assert ledger == {"One": {"new": "checked"}, "Two": two}


@pytest.mark.parametrize("name", ["MNIST", "Fashion-MNIST"])
@pytest.mark.parametrize("holds", [True, False])
def test_a_stand_in_judges_no_claim_about_the_real_data(
    nb, monkeypatch, ledger, capsys, name, holds
):
    monkeypatch.setattr(nb, "STAND_IN", True)
    claim, verdict = f"{name}: accuracy is high", "not checked on a stand-in"
    nb.check(claim, holds)
    assert capsys.readouterr().out == f"{verdict}: {claim}\n"
    assert ledger == {"One": {claim: verdict}}


@pytest.mark.parametrize("holds", [True, False])
def test_a_gpu_judges_no_claim_about_a_cpu(
    nb, monkeypatch, ledger, capsys, holds
):
    monkeypatch.setattr(nb, "ON_GPU", True)
    claim, verdict = "It is fast on a CPU.", "not checked on a GPU"
    nb.check(claim, holds)
    assert capsys.readouterr().out == f"{verdict}: {claim}\n"
    assert ledger == {"One": {claim: verdict}}


@pytest.mark.parametrize("place", ["STAND_IN", "ON_GPU"])
def test_other_claims_are_judged_anywhere(
    nb, monkeypatch, ledger, capsys, place
):
    monkeypatch.setattr(nb, place, True)
    nb.check("two is more than one", True)
    assert capsys.readouterr().out == "checked: two is more than one\n"
    with pytest.raises(AssertionError):
        nb.check("one is more than two", False)


# figures


@pytest.mark.parametrize("count", [1, 2, 3])
def test_panels_stand_side_by_side(nb, figures, count):
    axes = nb.panels(count, 2.5, sharey=True)
    assert list(axes) == plt.gcf().axes and len(axes) == count
    assert plt.gcf().get_size_inches().tolist() == [8, 2.5]
    axes[0].set_ylim(0, 7)
    assert all(ax.get_ylim() == (0, 7) for ax in axes)
    columns = [ax.get_subplotspec().colspan.start for ax in axes]
    assert columns == list(range(count))


@pytest.mark.parametrize(("count", "rows"), [(1, 1), (3, 1), (6, 2), (4, 4)])
def test_images_are_drawn_in_rows_under_their_captions(
    nb, data, figures, count, rows
):
    captions = [f"image {number}" for number in range(count)]
    nb.show_images(data.x_train[:count], captions, rows)
    axes = plt.gcf().axes
    assert [ax.get_title() for ax in axes] == captions
    for number, ax in enumerate(axes):
        assert (ax.images[0].get_array() == data.x_train[number]).all()
        place = ax.get_subplotspec()
        place = place.rowspan.start, place.colspan.start
        assert place == divmod(number, count // rows)


@pytest.mark.parametrize("captions", [3, 5])
def test_every_image_has_one_caption(nb, data, figures, captions):
    with pytest.raises(ValueError):
        nb.show_images(data.x_train[:4], ["a digit"] * captions, rows=2)


def test_a_line_is_a_mean_and_its_band_the_range(nb, figures):
    rows = [("a", 2, 1.0), ("a", 1, 5.0), ("a", 2, 4.0), ("a", 2, 10.0)]
    rows += [("b", 1, 7.0), ("a", 1, 6.0)]
    results = pd.DataFrame(rows, columns=["kind", "size", "value"])
    ax, color = plt.subplots()[1], (1.0, 0.0, 0.0, 1.0)
    nb.plot_lines(ax, results, "size", "value", "kind", {"a": {"c": color}})
    lines = lines_of(ax)
    assert list(lines) == ["a", "b"] and ax.get_lines()[0].get_color() == color
    assert np.array_equal(lines["a"], ([1, 2], [5.5, 5]))
    assert np.array_equal(lines["b"], ([1], [7]))
    band, point = ax.collections
    corners = {(1, 5), (1, 6), (2, 1), (2, 10)}
    assert set(map(tuple, band.get_paths()[0].vertices)) == corners
    assert set(map(tuple, point.get_paths()[0].vertices)) == {(1, 7)}
    assert tuple(band.get_facecolor()[0]) == (*color[:3], 0.2)


def test_a_sweep_is_plotted(nb, seeds, figures):
    nb.plot_sweep(seeds, "Digits")
    axes = plt.gcf().axes
    assert [ax.get_title() for ax in axes] == ["Digits"] * 2
    assert [ax.get_xlabel() for ax in axes] == ["sparsity (%)"] * 2
    labels = [ax.get_ylabel() for ax in axes]
    assert labels == ["test accuracy (%)", "test loss (nats)"]
    per_cent = seeds.assign(accuracy=100 * seeds.accuracy)
    chances = {"accuracy": 10, "loss": np.log(10)}
    for ax, column in zip(axes, chances):
        lines = lines_of(ax)
        assert set(lines) == {*nb.RULES, "dense", "chance"}
        for rule in nb.RULES:
            rows = per_cent[per_cent.rule == rule]
            means = rows.groupby("sparsity")[column].mean()[::-1]
            np.testing.assert_allclose(lines[rule][0], 1 - means.index)
            np.testing.assert_allclose(lines[rule][1], means)
        dense = per_cent[per_cent.sparsity == 0][column].mean()
        assert lines["dense"][1][0] == pytest.approx(dense)
        assert lines["chance"][1][0] == chances[column]


@pytest.mark.parametrize("titles", [["One"], ["One", "Two"]])
def test_accuracy_is_plotted_by_size(nb, seeds, figures, judged, titles):
    both = dict(zip(titles, [seeds, seeds.iloc[::-1]]))
    one = SimpleNamespace(title="One")
    run_cell(nb, "by_size", sweeps=both, mnist=one)
    axes = [ax for ax in plt.gcf().axes if ax.get_title()]
    assert [ax.get_title() for ax in axes] == titles
    assert {ax.get_xlabel() for ax in axes} == {"parameters left"}
    assert {ax.get_ylabel() for ax in axes} == {"test accuracy (%)"}
    assert axes[-1].get_legend()
    for ax, rule in itertools.product(axes, nb.RULES):
        means = seeds[seeds.rule == rule].groupby("parameters").accuracy.mean()
        size, accuracy = lines_of(ax)[rule]
        np.testing.assert_allclose(size, means.index)
        np.testing.assert_allclose(accuracy, 100 * means)


def test_times_are_plotted_by_batch(nb, data, figures):
    model = nb.build_mlp((100, 100), seed=0)
    ways = ["dense", *nb.WAYS]
    made_up = {
        (batch, sparsity): np.random.default_rng(batch).random(4) + sparsity
        for batch, sparsity in itertools.product((1, 32, 1000), nb.TIMED)
    }

    def latency(dense, masked, shrunk, images):
        assert dense is model and images.shape[1:] == (28, 28)
        sparsity = round(nb.measured_sparsity(masked), 2)
        units = nb.shrink(nb.prune(model, nb.unit_mask, sparsity))
        assert shrunk.count_params() == units.count_params()
        return dict(zip(ways, made_up[len(images), sparsity]))

    names = run_cell(nb, "batch of", model=model, mnist=data, latency=latency)
    assert list(names["times"].index) == list(made_up)
    assert names["times"].index.names == ["batch", "sparsity"]
    assert (names["times"][ways].to_numpy() == [*made_up.values()]).all()
    axes = plt.gcf().axes
    titles = [f"batch of {batch}" for batch in (1, 32, 1000)]
    assert [ax.get_title() for ax in axes] == titles
    assert {ax.get_xlabel() for ax in axes} == {"sparsity (%)"}
    assert {ax.get_ylabel() for ax in axes} == {"time (dense = 1)"}
    assert axes[0].get_legend()
    for ax, batch in zip(axes, (1, 32, 1000)):
        lines = lines_of(ax)
        assert set(lines) == {"dense", *nb.WAYS}
        assert list(lines["dense"][1]) == [1, 1]
        for way in nb.WAYS:
            assert list(lines[way][0]) == [100 * s for s in nb.TIMED]
            assert list(lines[way][1]) == list(names["times"].loc[batch, way])


def test_masks_are_drawn(nb, model, figures):
    mnist = SimpleNamespace(title="MNIST")
    results = {"networks": {"MNIST": [model]}, "mnist": mnist}
    run_cell(nb, "RULES[name](last_hidden, 0.8)", **results)
    kernel = model.get_weights()[1]
    axes = plt.gcf().axes
    for ax, (name, rule) in zip(axes, nb.RULES.items(), strict=True):
        assert (ax.get_xlabel(), ax.get_ylabel()) == ("unit", "input")
        assert ax.get_title() == f"{name} pruning, 80%"
        assert (ax.images[0].get_array() == rule(kernel, 0.8)).all()


def test_histograms_hold_every_weight_and_unit(nb, figures, judged):
    model = nb.build_mlp((40, 20))
    run_cell(nb, "(mean = 1)", model=model)
    kernel, axes = model.get_weights()[1], plt.gcf().axes
    sizes = np.abs(kernel).ravel(), np.sqrt(np.sum(kernel**2, axis=0))
    for ax, rule, own in zip(axes, nb.RULES, sizes, strict=True):
        assert ax.get_xlabel() == f"size of a {rule} (mean = 1)"
        assert ax.get_ylabel() == f"number of {rule}s"
        assert sum(bar.get_height() for bar in ax.patches) == len(own)
        lines = lines_of(ax)
        assert list(lines) == ["50% cut", "90% cut"] and ax.get_legend()
        cuts = np.quantile(own, (0.5, 0.9)) / np.mean(own)
        found = [line[0][0] for line in lines.values()]
        np.testing.assert_allclose(found, cuts, rtol=1e-5)
