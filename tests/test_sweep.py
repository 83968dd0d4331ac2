"""Training, measuring and sweeping, on the stand-in for MNIST."""

import dataclasses
import itertools

import keras
import matplotlib.pyplot as plt
import numpy as np
import pytest

EPOCHS = 4
SPARSITIES = (0, 0.5, 0.9, 1.0)
COLUMNS = ["rule", "sparsity", "accuracy", "loss", "parameters"]


@pytest.fixture(scope="module")
def trained(nb, data):
    """Return a small network after a brief training on the stand-in."""
    return nb.train(nb.build_mlp((12, 8), seed=0), data, EPOCHS, seed=0)


@pytest.fixture(scope="module")
def results(nb, data, trained):
    """Return a sweep of both rules over a few sparsities."""
    return nb.sweep(trained, data, nb.RULES, SPARSITIES)


def same_weights(model, other):
    """Return whether two models have equal weights."""
    pairs = zip(model.get_weights(), other.get_weights())
    return all(np.array_equal(one, two) for one, two in pairs)


def measured_by_keras(model, data):
    """Return accuracy and loss on the test rows, computed by Keras alone."""
    logits = model.predict(data.x_test, verbose=0)
    losses = keras.losses.sparse_categorical_crossentropy(
        data.y_test, logits, from_logits=True
    )
    accuracy = (logits.argmax(axis=1) == data.y_test).mean()
    return float(accuracy), float(np.mean(losses))


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


def test_training_teaches(nb, data, trained):
    before, _ = nb.evaluate(nb.build_mlp((12, 8), seed=0), data)
    after, _ = nb.evaluate(trained, data)
    assert after > before + 0.2


def test_the_same_seed_trains_the_same_weights(nb, data, model, trained):
    before = model.get_weights()
    assert same_weights(nb.train(model, data, EPOCHS, seed=0), trained)
    for weights, now in zip(before, model.get_weights()):
        assert (weights == now).all()
    assert not model.compiled


def test_another_seed_trains_other_weights(nb, data, model, trained):
    assert not same_weights(nb.train(model, data, EPOCHS, seed=1), trained)


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


def test_callbacks_are_called_and_the_result_is_printed(
    nb, data, model, capsys
):
    epochs = []
    callback = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: epochs.append(epoch)
    )
    trained = nb.train(model, data, 2, seed=3, callbacks=[callback])
    accuracy, _ = nb.evaluate(trained, nb.holdout(data))
    assert epochs == [0, 1]
    assert capsys.readouterr().out == (
        f"{data.title}, seed 3: validation accuracy {accuracy:.1%}\n"
    )


# measuring


def test_evaluate_agrees_with_keras(nb, data, trained):
    model = nb.copy_of(trained)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(loss=loss, metrics=["accuracy"])
    expected = model.evaluate(data.x_test, data.y_test, verbose=0)
    np.testing.assert_allclose(
        nb.evaluate(trained, data)[::-1], expected, atol=1e-5
    )


def test_evaluate_survives_huge_logits(nb, data, trained):
    model = nb.copy_of(trained)
    model.set_weights([100 * weights for weights in trained.get_weights()])
    accuracy, loss = nb.evaluate(model, data)
    assert accuracy == nb.evaluate(trained, data)[0]
    assert np.isfinite(loss)


@pytest.mark.parametrize("rows", [1, 3, 7, 10, 500])
def test_logits_do_not_depend_on_the_batches(nb, data, trained, rows):
    images = data.x_test[:10]
    logits = nb.logits_of(trained, images, rows)
    np.testing.assert_allclose(logits, trained(images), atol=1e-5)


def test_the_baseline_counts_the_commonest_training_class(nb, data, trained):
    other = nb.build_mlp((4,), seed=0)
    row = nb.baseline([trained, other], data)
    labels = data.y_train.tolist()
    commonest = max(range(10), key=labels.count)
    accuracies, losses = zip(
        *(nb.evaluate(network, data) for network in (trained, other))
    )
    assert row == {
        "data": data.title,
        "accuracy": np.mean(accuracies),
        "lowest": min(accuracies),
        "highest": max(accuracies),
        "loss": np.mean(losses),
        "always the commonest class": np.mean(data.y_test == commonest),
    }


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
        accuracy, loss = measured_by_keras(pruned, data)
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


def test_the_table_holds_means_over_seeds(nb, results):
    other = results.assign(accuracy=results.accuracy / 2, seed=1)
    both = nb.pd.concat([results.assign(seed=0), other])
    table = nb.sweep_table({"digits": both}, {"digits": "Title"})
    assert list(table.index) == ["0%", "50%", "90%", "100%"]
    for row in results.itertuples():
        column = table["Title", "accuracy", row.rule]
        value = column[f"{row.sparsity:.0%}"]
        assert value == pytest.approx(0.75 * row.accuracy)


def test_at_is_the_mean_over_seeds_of_one_point(nb, results):
    other = results.assign(loss=results.loss / 2)
    both = nb.pd.concat([results, other])
    for row in results.itertuples():
        point = nb.at(both, row.rule, row.sparsity, "loss")
        assert point == pytest.approx(0.75 * row.loss)
        accuracy = nb.at(both, row.rule, row.sparsity)
        assert accuracy == pytest.approx(row.accuracy)


@pytest.mark.parametrize("rule", ["weight", "unit"])
def test_the_norm_removed_and_the_norm_left_make_the_whole(nb, trained, rule):
    kernels = trained.get_weights()[:-1]
    whole = sum(np.sum(kernel**2) for kernel in kernels)
    for sparsity in SPARSITIES:
        pruned = nb.prune(trained, nb.RULES[rule], sparsity)
        left = sum(np.sum(kernel**2) for kernel in pruned.get_weights()[:-1])
        gone = nb.removed_norm(trained, nb.RULES[rule], sparsity)
        assert gone == pytest.approx(1 - left / whole, abs=1e-5)


# claims


def test_a_true_claim_is_printed_and_recorded(nb, monkeypatch, capsys):
    monkeypatch.setattr(nb, "LEDGER", [])
    nb.check("MNIST: two is more than one.", 2 > 1)
    expected = {"claim": "MNIST: two is more than one.", "verdict": "checked"}
    assert nb.LEDGER == [expected]
    output = capsys.readouterr().out
    assert output == "checked: MNIST: two is more than one.\n"


def test_a_false_claim_stops(nb, monkeypatch, capsys):
    monkeypatch.setattr(nb, "LEDGER", [])
    with pytest.raises(AssertionError, match="one is more than two"):
        nb.check("one is more than two", 1 > 2)
    assert not nb.LEDGER and not capsys.readouterr().out


@pytest.mark.parametrize("name", ["MNIST", "Fashion-MNIST"])
@pytest.mark.parametrize("holds", [True, False])
def test_a_stand_in_judges_no_claim_about_the_real_data(
    nb, monkeypatch, capsys, name, holds
):
    monkeypatch.setattr(nb, "LEDGER", [])
    monkeypatch.setattr(nb, "STAND_IN", True)
    nb.check(f"{name}: accuracy is high", holds)
    output = capsys.readouterr().out
    expected = f"not checked on a stand-in: {name}: accuracy is high\n"
    assert output == expected
    assert nb.LEDGER[0]["verdict"] == "not checked on a stand-in"


@pytest.mark.parametrize("holds", [True, False])
def test_a_gpu_judges_no_claim_about_a_cpu(nb, monkeypatch, capsys, holds):
    monkeypatch.setattr(nb, "LEDGER", [])
    monkeypatch.setattr(nb, "ON_GPU", True)
    nb.check("It is fast on a CPU.", holds)
    output = capsys.readouterr().out
    assert output == "not checked on a GPU: It is fast on a CPU.\n"
    with pytest.raises(AssertionError):
        nb.check("One is more than two.", False)


def test_a_stand_in_judges_other_claims(nb, monkeypatch, capsys):
    monkeypatch.setattr(nb, "LEDGER", [])
    monkeypatch.setattr(nb, "STAND_IN", True)
    nb.check("two is more than one", True)
    assert capsys.readouterr().out == "checked: two is more than one\n"
    with pytest.raises(AssertionError):
        nb.check("one is more than two", False)


# figures


def test_a_sweep_is_plotted(nb, results, figures):
    nb.plot_sweep(results, "Digits")
    figure = plt.gcf()
    assert [ax.get_title() for ax in figure.axes] == ["Digits"] * 2
    assert [ax.get_xlabel() for ax in figure.axes] == ["sparsity (%)"] * 2
    labels = [ax.get_ylabel() for ax in figure.axes]
    assert labels == ["test accuracy (%)", "test loss (nats)"]
    per_cent = results.assign(accuracy=100 * results.accuracy)
    for ax, column in zip(figure.axes, ("accuracy", "loss")):
        lines = {line.get_label(): line for line in ax.get_lines()}
        for rule in nb.RULES:
            rows = per_cent[per_cent.rule == rule]
            drawn = lines.pop(f"{rule} pruning")
            np.testing.assert_allclose(drawn.get_xdata(), 1 - rows.sparsity)
            np.testing.assert_allclose(drawn.get_ydata(), rows[column])
        dense = per_cent[per_cent.sparsity == 0][column].mean()
        assert lines["dense"].get_ydata()[0] == pytest.approx(dense)
        assert set(lines) == {"dense", "chance"}


def test_masks_are_drawn(nb, model, figures):
    kernel = model.get_weights()[1]
    nb.show_masks(kernel, nb.RULES, 0.5)
    axes = plt.gcf().axes
    assert [ax.get_xlabel() for ax in axes] == ["unit", "unit"]
    assert axes[0].get_ylabel() == "input"
    for ax, (name, rule) in zip(axes, nb.RULES.items()):
        assert ax.get_title() == f"{name} pruning, 50%"
        assert (ax.images[0].get_array() == rule(kernel, 0.5)).all()


def test_samples_show_each_class_of_each_data_set(nb, data, figures):
    nb.show_samples([data, nb.stand_in("noisy_digits")])
    axes = plt.gcf().axes
    assert [ax.get_title() for ax in axes] == 2 * list(data.class_names)
    for label, ax in enumerate(axes[:10]):
        first = data.x_train[data.y_train.tolist().index(label)]
        assert (ax.images[0].get_array() == first).all()


def test_every_other_figure_labels_its_axes(nb, results, trained, figures):
    titles, networks = {"one": "One", "two": "Two"}, [trained]
    kernel = trained.get_weights()[1]
    rows = [(b, s, w, 1.0) for b in (1, 9) for s in (0, 0.9) for w in nb.WAYS]
    columns = ["batch", "sparsity", "way", "time"]
    timings = nb.pd.DataFrame(rows, columns=columns)
    nb.plot_by_size({name: results for name in titles}, titles)
    nb.show_histograms(kernel, (0.5, 0.9))
    nb.show_pixels({name: networks for name in titles}, titles, 0.9)
    nb.plot_timings(timings)
    assert len(plt.get_fignums()) == 4
    for number in plt.get_fignums():
        axes = [ax for ax in plt.figure(number).axes if ax.get_xlabel()]
        assert len(axes) == 2 and axes[0].get_ylabel()


def test_one_rule_or_one_data_set_can_be_drawn(nb, data, figures):
    nb.show_masks(np.eye(3), {"weight": nb.weight_mask}, 0.5)
    nb.show_samples([data])
