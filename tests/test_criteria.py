"""Criteria for units, sparsities of single layers, and lottery tickets."""

import dataclasses
import itertools

import keras
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

CRITERIA = ["L1 norm", "mean activation", "APoZ", "Taylor", "random"]
TITLES = {"mnist": "MNIST", "fashion_mnist": "Fashion-MNIST"}
KERNELS = [
    np.array([[1.0, -1, 0.5, -2], [2, 1, -0.5, -2]]),
    np.array([[1.0, -1, 2], [0.5, 3, -1], [2, -2, 1], [1, 1, 1]]),
    np.array([[0.25, -0.25], [0.125, 0.5], [-0.5, 0.25]]),
]
ROWS = np.array([[1.0, 2], [2, 0.5], [0, 3], [3, 1], [0.5, 0.25]])
LABELS = np.array([0, 1, 1, 0, 1])


def network(kernels):
    """Return a network of Dense layers, without biases, of given kernels."""
    layers = [keras.Input((len(kernels[0]),))]
    for kernel in kernels:
        activation = "relu" if kernel is not kernels[-1] else None
        units = kernel.shape[1]
        layers.append(keras.layers.Dense(units, activation, use_bias=False))
    model = keras.Sequential(layers)
    model.set_weights(kernels)
    return model


def puts_out(kernels, values):
    """Return the output of each layer, by NumPy alone."""
    outputs = []
    for kernel in kernels:
        outputs.append(values @ kernel)
        values = np.maximum(outputs[-1], 0)
    return [*(np.maximum(o, 0) for o in outputs[:-1]), outputs[-1]]


def mean_loss(logits):
    """Return the mean cross-entropy on LABELS, by NumPy alone."""
    log_sum = np.log(np.exp(logits).sum(axis=1))
    return np.mean(log_sum - logits[range(len(LABELS)), LABELS])


def slopes(kernels, values, step=1e-6):
    """Return d loss / d value by differences, the values read by kernels."""
    result = np.zeros(values.shape)
    for place in np.ndindex(values.shape):
        losses = []
        for sign in (1, -1):
            moved = values.copy()
            moved[place] += sign * step
            losses.append(mean_loss(puts_out(kernels, moved)[-1]))
        result[place] = (losses[0] - losses[1]) / (2 * step)
    return result


def rows_of(nb, images, labels):
    """Return a data set whose test rows are the given ones."""
    return nb.Dataset("rows", images, labels, images, labels, ())


def poisoned(data):
    """Return `data` with useless test rows."""
    return dataclasses.replace(
        data,
        x_test=np.zeros_like(data.x_test),
        y_test=np.zeros_like(data.y_test),
    )


def same(scores, others):
    """Return whether two lists of arrays are equal."""
    return all(np.array_equal(a, b) for a, b in zip(scores, others))


def zeros(model):
    """Return the number of zeros in each kernel of a model."""
    return [int((kernel == 0).sum()) for kernel in model.get_weights()]


@pytest.fixture
def few(data):
    """Return a small part of the stand-in."""
    rows = {name: getattr(data, name)[:240] for name in ("x_train", "y_train")}
    return dataclasses.replace(data, **rows)


# criteria


def test_scores_are_those_of_a_slow_reference(nb):
    scores = nb.unit_scores(network(KERNELS), rows_of(nb, ROWS, LABELS))
    assert [*scores] == CRITERIA
    for layer, seen in enumerate(puts_out(KERNELS, ROWS)[:-1]):
        change = np.abs(seen * slopes(KERNELS[layer + 1 :], seen))
        expected = {
            "L1 norm": np.abs(KERNELS[layer]).sum(axis=0),
            "mean activation": seen.mean(axis=0),
            "APoZ": 1 - (seen == 0).mean(axis=0),
            "Taylor": change.mean(axis=0),
        }
        for name, values in expected.items():
            assert scores[name][layer] == pytest.approx(values, 1e-4, 1e-7)


def test_derivatives_are_those_of_the_mean_loss(nb):
    model = network(KERNELS)
    seen = puts_out(KERNELS, ROWS)[:-1]
    found = nb.gradients(model, ROWS.astype("float32"), LABELS)
    assert len(found) == len(nb.activations(model, ROWS)) == len(seen)
    for layer, values in enumerate(seen):
        expected = slopes(KERNELS[layer + 1 :], values)
        alive = values > 0
        assert np.array(found[layer])[alive] == pytest.approx(
            expected[alive], rel=1e-3, abs=1e-6
        )


def test_a_unit_that_never_fires_goes_first(nb):
    model = network(KERNELS)
    scores = nb.unit_scores(model, rows_of(nb, ROWS, LABELS))
    for name in ("mean activation", "APoZ", "Taylor"):
        assert scores[name][0][3] == 0
        pruned = nb.prune(model, nb.ByScores(scores[name]), 0.25)
        dead = (pruned.layers[0].kernel.numpy() == 0).all(axis=0)
        assert dead.tolist() == [False, False, False, True]
    assert scores["L1 norm"][0].argmax() == 3


def test_the_scale_of_a_kernel_does_not_matter_to_norms(nb, model, data):
    scaled = nb.copy_of(model)
    weights = model.get_weights()
    scaled.set_weights([w * 2.0 ** (i + 1) for i, w in enumerate(weights)])
    rules = []
    for network in (model, scaled):
        scores = nb.unit_scores(network, nb.holdout(data))
        rules.append((nb.unit_mask, nb.ByScores(scores["L1 norm"])))
    for rule, other in zip(*rules):
        masks = nb.masks_of(model, rule, 0.5)
        assert same(masks, nb.masks_of(scaled, other, 0.5))


def test_scores_are_of_validation_rows(nb, model, data, monkeypatch):
    found = nb.unit_scores(model, nb.holdout(data))
    blind = nb.unit_scores(model, nb.holdout(poisoned(data)))
    assert all(same(found[name], blind[name]) for name in CRITERIA)
    of_test_rows = nb.unit_scores(model, data)
    assert not same(found["Taylor"], of_test_rows["Taylor"])
    monkeypatch.setattr(nb, "sweep", lambda *given: given)
    _, measured, rules, _ = nb.sweep_criteria(model, poisoned(data), [0.5])
    assert not measured.x_test.any(), "test rows measure the result"
    assert [*rules] == ["L2 norm", *CRITERIA]
    assert rules["L2 norm"] is nb.unit_mask
    assert all(same(rules[name].scores, found[name]) for name in CRITERIA)


def test_only_so_many_rows_are_seen(nb, model, data):
    first = rows_of(nb, data.x_test[:50], data.y_test[:50])
    scores = nb.unit_scores(model, first)
    others = nb.unit_scores(model, data, rows=50)
    assert all(same(scores[name], others[name]) for name in CRITERIA)


def test_the_lowest_scores_go_and_ties_by_position(nb, model):
    scores = [np.array([5, 1, 1, 1] * 3), np.array([0, 7, 0, 3, 2, 9, 4, 1])]
    rule = nb.ByScores(scores)
    masks = nb.masks_of(model, rule, 0.4)
    gone = [[1, 2, 3, 5, 6], [0, 2, 7]]
    for mask, units, kernel in zip(masks, gone, model.get_weights()):
        assert mask.shape == kernel.shape and mask.dtype == bool
        assert np.flatnonzero(~mask.any(axis=0)).tolist() == units
        assert (mask == mask[0]).all(), "units go whole"
    pruned = nb.prune(model, rule, 0.4)
    assert zeros(pruned) == [784 * 5, 12 * 3, 0]


def test_criteria_are_swept(nb, model, data):
    results = nb.sweep_criteria(model, data, (0, 0.5))
    assert results.rule.unique().tolist() == ["L2 norm", *CRITERIA]
    whole, half = (results[results.sparsity == s] for s in (0, 0.5))
    assert whole.accuracy.nunique() == 1
    assert (whole.parameters == model.count_params()).all()
    assert (half.parameters <= nb.parameters_left((12, 8), (0.5, 0.5))).all()


def test_the_first_loss_is_read_from_the_means(nb):
    accuracies = {
        "early": [(0.9, 0.9), (0.7, 1.0), (0.9, 0.9)],
        "late": [(0.9, 0.9), (0.9, 0.895), (0.3, 0.9)],
        "never": [(0.9, 0.9), (0.95, 0.95), (0.9, 0.892)],
        "passing": [(0.9, 0.9), (0.8, 0.8), (0.9, 0.9)],
    }
    results = pd.DataFrame(
        [
            {"rule": rule, "sparsity": sparsity, "accuracy": accuracy}
            for rule, rows in accuracies.items()
            for sparsity, both in zip((0, 0.5, 0.75), rows)
            for accuracy in both
        ]
    )
    found = nb.first_loss(results, 1)
    expected = {"early": 50, "late": 75, "passing": 50}
    assert found.dropna().to_dict() == expected
    assert np.isnan(found["never"])


# layers


@pytest.mark.parametrize("sparsity", [0, 0.3, 0.8, 0.9])
@pytest.mark.parametrize("least", [0, 0.05, 0.1])
def test_every_kernel_keeps_its_largest_share(nb, sparsity, least):
    random = np.random.default_rng(0)
    kernels = [random.normal(0, s, (20, 10)) for s in (1, 100, 0.01)]
    rule = nb.Together(nb.magnitudes, least)
    masks = rule.masks(kernels, sparsity)
    assert sum((~mask).sum() for mask in masks) == round(sparsity * 600)
    for kernel, mask in zip(kernels, masks):
        sizes, count = np.abs(kernel), round(least * 200)
        largest = np.argsort(-sizes, axis=None)[:count]
        assert mask.ravel()[largest].all()
        others = np.delete(sizes.ravel(), largest)
        own = np.delete(mask.ravel(), largest)
        if own.any() and not own.all():
            assert others[own].min() > others[~own].max()


def test_rules_for_all_kernels_prune_a_model(nb, model, data):
    before = model.get_weights()
    scores = nb.unit_scores(model, nb.holdout(data))["Taylor"]
    total = before[0].size + before[1].size
    rules = {
        nb.Together(nb.magnitudes): round(0.5 * total),
        nb.GUARDED: round(0.5 * total),
        nb.Allotted(nb.unit_mask, (0.75, 0.25)): 784 * 9 + 12 * 2,
        nb.Allotted(nb.weight_mask, (0.75, 0)): 784 * 9,
    }
    assert sum(zeros(nb.prune(model, nb.ByScores(scores), 0.5))) == total / 2
    for rule, count in rules.items():
        assert sum(zeros(nb.prune(model, rule, 0.5))) == count
    assert same(model.get_weights(), before)


def test_an_allotment_asks_its_rule_layer_by_layer(nb, model):
    rule = nb.Allotted(nb.weight_mask, (0.9, 0.4))
    for common in (None, 0.5):
        masks = nb.masks_of(model, rule, common)
        for mask, kernel, own in zip(masks, model.get_weights(), (0.9, 0.4)):
            assert (mask == nb.weight_mask(kernel, own)).all()


@pytest.mark.parametrize("rule", ["weight_mask", "unit_mask"])
def test_each_layer_is_pruned_alone(nb, model, data, rule):
    before, rule = model.get_weights(), getattr(nb, rule)
    lost = nb.sensitivity(model, data, rule, (0, 0.5, 0.75))
    assert lost.index.tolist() == [1, 2]
    assert lost.columns.tolist() == [0, 0.5, 0.75]
    assert (lost[0] == 0).all()
    assert same(model.get_weights(), before)
    whole = (nb.logits_of(model, data.x_test).argmax(1) == data.y_test).mean()
    for layer, sparsity in itertools.product((0, 1), (0.5, 0.75)):
        weights = [w.copy() for w in before]
        weights[layer] *= rule(weights[layer], sparsity)
        pruned = nb.copy_of(model)
        pruned.set_weights(weights)
        answers = nb.logits_of(pruned, data.x_test).argmax(axis=1)
        points = 100 * (whole - (answers == data.y_test).mean())
        assert lost.loc[layer + 1, sparsity] == pytest.approx(points)


@pytest.mark.parametrize("sparsities", [(0, 0), (0.5, 0.25), (0.4, 0.8)])
def test_parameters_left_are_those_of_the_shrunk_network(
    nb, model, sparsities
):
    pruned = nb.prune(model, nb.Allotted(nb.unit_mask, sparsities), None)
    left = nb.parameters_left((12, 8), sparsities)
    assert left == nb.shrink(pruned).count_params()


def test_the_shortlist_is_that_of_brute_force(nb):
    lost = pd.DataFrame(
        [[-1.0, 2.5, 11], [0.25, 1, 30.5], [0.5, 4, 4.75]],
        index=[1, 2, 3],
        columns=(0.25, 0.5, 0.75),
    )
    units, budget = (16, 12, 8), 7000
    expected = {}
    for choice in itertools.product((0, 0.25, 0.5, 0.75), repeat=3):
        sizes = [n - round(s * n) for n, s in zip(units, choice)]
        a, b, c = sizes
        if 784 * a + a * b + b * c + 10 * c <= budget:
            losses = [
                max(row[s], 0) if s else 0
                for s, (_, row) in zip(choice, lost.iterrows())
            ]
            expected[choice] = sum(losses)
    found = nb.shortlist(lost, units, budget, count=5)
    assert len(found) == 5
    costs = [expected[choice] for choice in found]
    assert costs == sorted(expected.values())[:5]
    assert {*nb.shortlist(lost, units, budget, 100)} == {*expected}
    assert nb.shortlist(lost, units, budget=0) == []


def test_the_best_of_the_shortlist_is_allotted(nb, model, data, monkeypatch):
    choices = [(0.75, 0.75), (0.25, 0), (0.5, 0.5)]
    monkeypatch.setattr(nb, "shortlist", lambda *given: choices)
    accuracies = [
        nb.evaluate(
            nb.prune(model, nb.Allotted(nb.unit_mask, choice), None), data
        )[0]
        for choice in choices
    ]
    assert len({*accuracies}) > 1
    best = nb.allot(model, data, None, None)
    assert best.sparsities == choices[np.argmax(accuracies)]


def test_an_allotment_keeps_to_its_budget(nb, model, data):
    before = model.get_weights()
    budget = nb.parameters_left((12, 8), (0.5, 0.5))
    lost = nb.sensitivity(model, data, nb.unit_mask, (0.5, 0.75))
    best = nb.allot(model, data, lost, budget)
    assert nb.parameters_left((12, 8), best.sparsities) <= budget
    assert same(model.get_weights(), before)


# tickets


def test_a_masked_network_is_a_copy(nb, model):
    before = model.get_weights()
    masks = nb.masks_of(model, nb.weight_mask, 0.5)
    weights = nb.masked(model, masks).get_weights()
    assert same(weights[:2], [w * m for w, m in zip(before, masks)])
    assert same([weights[2], *model.get_weights()], [before[2], *before])


def test_shuffled_masks_keep_as_many_weights(nb, model):
    masks = nb.masks_of(model, nb.Together(nb.magnitudes), 0.8)
    before = [mask.copy() for mask in masks]
    found = nb.shuffled(masks, 1)
    assert [m.shape for m in found] == [m.shape for m in masks]
    assert [m.sum() for m in found] == [m.sum() for m in masks]
    assert same(masks, before) and not same(found, masks)
    assert same(found, nb.shuffled(masks, 1))
    assert not same(found, nb.shuffled(masks, 2))


@pytest.mark.parametrize("kept", [33, 11, 3.6])
def test_a_small_dense_network_fills_its_budget(nb, kept):
    small = nb.small_dense(kept, seed=0)
    budget = kept / 100 * 266_200
    units = small.layers[-2].units
    larger = nb.build_mlp((3 * units + 3, units + 1))
    assert small.layers[-3].units == 3 * units
    assert small.count_params() <= budget < larger.count_params()
    same_again = nb.small_dense(kept, seed=0)
    assert same(small.get_weights(), same_again.get_weights())


def test_tickets_are_rewound(nb, few, monkeypatch):
    monkeypatch.setattr(nb, "TICKET_SIZES", (50, 20))
    monkeypatch.setattr(nb, "LENET_UNITS", (30, 12))
    fine_tune, starts, finals = nb.fine_tune, [], []

    def noted(model, *settings):
        starts.append(model.get_weights())
        final = fine_tune(model, *settings)
        finals.append(final.get_weights())
        return final

    monkeypatch.setattr(nb, "fine_tune", noted)
    rows = nb.find_tickets(few, seed=3)
    names = ["ticket", "other initial weights", "random mask", "small dense"]
    assert [row[:3] for row in rows] == [
        (3, 100, "ticket"),
        *((3, kept, name) for kept in (50, 20) for name in names),
    ]
    assert all(0 <= row[3] <= 1 for row in rows)
    first = nb.build_mlp((30, 12), 3).get_weights()
    other = nb.build_mlp((30, 12), 103).get_weights()
    size = first[0].size + first[1].size
    for kept, before in ((50, starts[:4]), (20, starts[4:])):
        ticket, elsewhere, random, small = before
        masks = [kernel != 0 for kernel in ticket]
        counts = [mask.sum() for mask in masks]
        assert sum(counts[:2]) == size - round((1 - kept / 100) * size)
        assert same(ticket, [w * m for w, m in zip(first, masks)])
        assert same(elsewhere, [w * m for w, m in zip(other, masks)])
        places = [kernel != 0 for kernel in random]
        assert [m.sum() for m in places] == counts
        assert same(random, [w * m for w, m in zip(first, places)])
        assert not same(masks, places)
        assert sum(w.size for w in small) <= kept / 100 * (size + 120)
    for start, final in zip(starts, finals):
        assert same([w == 0 for w in start], [w == 0 for w in final])
    lasting = [np.abs(kernel) for kernel in finals[0][:2]]
    ranks = nb.Together(nb.magnitudes).masks(lasting, 0.8)
    assert same(ranks, [w != 0 for w in starts[4][:2]])


# pictures


def test_pictures_name_their_axes(nb, model, data, figures):
    results = nb.sweep(model, data, nb.RULES, (0, 0.5))
    both = pd.concat([results.assign(seed=seed) for seed in (0, 1)])
    nb.plot_criteria(dict.fromkeys(TITLES, both), TITLES)
    nb.plot_layer_sparsities(model, nb.GUARDED, (0.5, 0.8))
    lost = nb.sensitivity(model, data, nb.unit_mask, (0.5, 0.75))
    keys = itertools.product(TITLES, nb.RULES)
    nb.show_scans(dict.fromkeys(keys, lost), TITLES)
    kinds = itertools.product((100, *nb.TICKET_SIZES), ("ticket", "other"))
    rows = [(seed, *kind, 0.9) for kind in kinds for seed in (0, 1)]
    columns = ["seed", "kept", "start", "accuracy"]
    nb.plot_tickets(pd.DataFrame(rows, columns=columns))
    labels = [("sparsity of units (%)", "test accuracy (%)")]
    labels += [("hidden layer", "sparsity (%)")]
    labels += [("sparsity (%)", "hidden layer")]
    labels += [("weights kept (%)", "test accuracy (%)")]
    for number, (x, y) in zip(plt.get_fignums(), labels, strict=True):
        ax, *others = plt.figure(number).axes
        assert (ax.get_xlabel(), ax.get_ylabel()) == (x, y)
        assert all(other.get_xlabel() == x for other in others)


def test_layer_sparsities_are_drawn_as_they_are(nb, model, figures):
    nb.plot_layer_sparsities(model, nb.GUARDED, (0.5, 0.8))
    for line, sparsity in zip(plt.gca().lines, (0.5, 0.8), strict=True):
        counts = zeros(nb.prune(model, nb.GUARDED, sparsity))
        sizes = [kernel.size for kernel in model.get_weights()]
        shares = [100 * n / size for n, size in zip(counts, sizes)]
        assert line.get_ydata() == pytest.approx(shares[:2])
