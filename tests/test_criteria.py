"""Criteria for units, sparsities of single layers, and lottery tickets."""

import dataclasses
import itertools
from types import SimpleNamespace

import keras
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from conftest import run_cell

CRITERIA = [
    "L2 norm",
    "L1 norm",
    "mean activation",
    "APoZ",
    "Taylor",
    "random",
]
TITLES = ("MNIST", "Fashion-MNIST")
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
    pairs = zip(scores, others, strict=True)
    return all(np.array_equal(a, b) for a, b in pairs)


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
            "L2 norm": np.sqrt((KERNELS[layer] ** 2).sum(axis=0)),
            "L1 norm": np.abs(KERNELS[layer]).sum(axis=0),
            "mean activation": seen.mean(axis=0),
            "APoZ": 1 - (seen == 0).mean(axis=0),
            "Taylor": change.mean(axis=0),
        }
        for name, values in expected.items():
            assert scores[name][layer] == pytest.approx(values, 1e-4, 1e-7)


def test_activity_is_that_of_the_hidden_layers(nb):
    outputs, gradients = nb.activity(network(KERNELS), ROWS, LABELS)
    hidden = puts_out(KERNELS, ROWS)[:-1]
    triples = zip(hidden, outputs, gradients, strict=True)
    for layer, (values, found, gradient) in enumerate(triples, start=1):
        assert found == pytest.approx(values, 1e-5)
        expected, alive = slopes(KERNELS[layer:], values), values > 0
        assert gradient[alive] == pytest.approx(expected[alive], 1e-3, 1e-6)


def test_activity_is_seen_without_dropout(nb, model, data):
    dropping = nb.build_mlp((12, 8), dropout=0.5)
    dropping.set_weights(model.get_weights())
    rows = data.x_test[:50], data.y_test[:50]
    both = [nb.activity(own, *rows) for own in (model, dropping)]
    assert all(same(seen, own) for seen, own in zip(*both))


def test_random_scores_differ_and_are_repeatable(nb, model, data):
    scores = nb.unit_scores(model, data)["random"]
    assert len(np.unique(np.concatenate(scores))) == 12 + 8
    again = nb.unit_scores(model, nb.holdout(data))["random"]
    assert same(scores, again)


def test_scores_are_those_of_the_layers_that_are_pruned(nb, data):
    model = nb.build_mlp((12, 1, 8))
    units = [kernel.shape[-1] for kernel in nb.prunable_kernels(model)]
    for scores in nb.unit_scores(model, data).values():
        assert [len(own) for own in scores] == units == [12, 8]


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
    both = [nb.unit_scores(own, nb.holdout(data)) for own in (model, scaled)]
    for name in ("L2 norm", "L1 norm"):
        rule, other = (nb.ByScores(scores[name]) for scores in both)
        masks = nb.masks_of(model, rule, 0.5)
        assert same(masks, nb.masks_of(scaled, other, 0.5))
        if name == "L2 norm":
            assert same(masks, nb.masks_of(model, nb.unit_mask, 0.5))


def test_scores_are_of_validation_rows(nb, model, data, monkeypatch):
    found = nb.unit_scores(model, nb.holdout(data))
    blind = nb.unit_scores(model, nb.holdout(poisoned(data)))
    assert all(same(found[name], blind[name]) for name in CRITERIA)
    of_test_rows = nb.unit_scores(model, data)
    assert not same(found["Taylor"], of_test_rows["Taylor"])
    sweep, given = nb.sweep, []
    monkeypatch.setattr(nb, "sweep", lambda *a: given.extend(a) or sweep(*a))
    nb.sweep_criteria(model, poisoned(data), [0.5])
    _, measured, rules, _ = given
    assert not measured.x_test.any(), "test rows measure the result"
    assert [*rules] == CRITERIA
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
    assert results.rule.tolist() == np.repeat(CRITERIA, 2).tolist()
    assert [*nb.CRITERIA_STYLES] == CRITERIA
    whole, half = (results[results.sparsity == s] for s in (0, 0.5))
    scores = nb.unit_scores(model, nb.holdout(data))
    rules = [nb.ByScores(scores[name]) for name in CRITERIA]
    pruned = [nb.prune(model, rule, 0.5) for rule in rules]
    expected = [nb.evaluate(network, data)["accuracy"] for network in pruned]
    assert half.accuracy.tolist() == pytest.approx(expected)
    assert whole.accuracy.nunique() == 1
    assert (whole.parameters == model.count_params()).all()
    assert (half.parameters <= nb.parameters_left((12, 8), (0.5, 0.5))).all()


def test_accuracies_are_tabled_as_means(nb):
    keys = [*itertools.product(("L2 norm", "APoZ", "random"), (0, 0.7, 0.8))]
    both = [
        pd.DataFrame(
            [(*key, place / 10 + n) for place, key in enumerate(keys)]
        )
        for n in (0, 0.25)
    ]
    table = pd.concat(both).set_axis(["rule", "sparsity", "accuracy"], axis=1)
    told = {"begin": list, "check": lambda claim, holds: claim}
    names = run_cell(
        nb,
        "by_criterion = ",
        criteria={"MNIST": table, "other": table},
        mnist=SimpleNamespace(title="MNIST"),
        **told,
    )
    for title in ("MNIST", "other"):
        for place, (rule, sparsity) in enumerate(keys):
            found = names["by_criterion"][title, rule][sparsity]
            assert found == pytest.approx(place / 10 + 0.125)


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
        nb.Together(nb.magnitudes, 0.005): round(0.5 * total),
    }
    assert sum(zeros(nb.prune(model, nb.ByScores(scores), 0.5))) == total / 2
    for rule, count in rules.items():
        assert sum(zeros(nb.prune(model, rule, 0.5))) == count
    assert same(model.get_weights(), before)


def without(nb, model, sparsities):
    """Return a copy of a model without a share of each layer's units."""
    masks = map(nb.unit_mask, model.get_weights(), sparsities)
    return nb.masked(model, [*masks])


@pytest.mark.parametrize("each", [(0.5, 0.25), (0.75, 0), (0, 0)])
def test_each_layer_is_pruned_to_its_own_sparsity(nb, model, data, each):
    before = model.get_weights()
    for rule in nb.RULES.values():
        masks = [rule(w, s) for w, s in zip(before, each)]
        expected = [*(w * m for w, m in zip(before, masks)), before[2]]
        small = nb.prune_each(model, rule, each)
        network = nb.copy_of(model)
        network.set_weights(expected)
        logits = nb.logits_of(network, data.x_test)
        found = nb.logits_of(small, data.x_test)
        assert found == pytest.approx(logits, rel=1e-4, abs=1e-5)
        if small.count_params() == model.count_params():
            assert same(small.get_weights(), expected)
    assert small.count_params() == (
        model.count_params()
        if max(each) < 0.5
        else nb.parameters_left((12, 8), each)
    )
    assert same(model.get_weights(), before)


@pytest.mark.parametrize("rule", ["weight_mask", "unit_mask"])
def test_each_layer_is_pruned_alone(nb, model, data, rule):
    before, rule = model.get_weights(), getattr(nb, rule)
    lost = nb.sensitivity(model, data, rule, (0.5, 0.75))
    assert lost.index.tolist() == [1, 2]
    assert lost.columns.tolist() == [0.5, 0.75]
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


def test_a_layer_left_whole_loses_nothing(nb, model, data):
    lost = nb.sensitivity(model, data, nb.unit_mask, (0, 0.5))
    assert lost.columns.tolist() == [0, 0.5]
    assert (lost[0] == 0).all()


@pytest.mark.parametrize("sparsities", [(0, 0), (0.5, 0.25), (0.4, 0.8)])
def test_parameters_left_are_those_of_the_shrunk_network(
    nb, model, sparsities
):
    left = nb.parameters_left((12, 8), sparsities)
    assert left == nb.shrink(without(nb, model, sparsities)).count_params()


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
    smallest = min(nb.parameters_left(units, choice) for choice in expected)
    assert nb.shortlist(lost, units, smallest) == [(0.75, 0.75, 0.75)]


def test_a_budget_that_nothing_meets_is_an_error(nb, model, data):
    lost = nb.sensitivity(model, data, nb.unit_mask, (0.5, 0.75))
    budget = nb.parameters_left((12, 8), (0.75, 0.75)) - 1
    with pytest.raises(ValueError, match=f"no choice leaves {budget} param"):
        nb.allot(model, data, lost, budget)


def test_the_best_of_the_shortlist_is_allotted(nb, model, data, monkeypatch):
    choices, asked = [(0.75, 0.75), (0.25, 0), (0.5, 0.5)], []
    monkeypatch.setattr(
        nb, "shortlist", lambda *given: asked.extend(given) or choices
    )
    pruned = [nb.prune_each(model, nb.unit_mask, c) for c in choices]
    accuracies = [nb.evaluate(own, data)["accuracy"] for own in pruned]
    assert len({*accuracies}) > 1
    best = nb.allot(model, data, "lost", "budget")
    assert asked == ["lost", [12, 8], "budget"]
    assert best == choices[np.argmax(accuracies)]


def test_an_allotment_keeps_to_its_budget(nb, model, data):
    before = model.get_weights()
    budget = nb.parameters_left((12, 8), (0.5, 0.5))
    lost = nb.sensitivity(model, data, nb.unit_mask, (0.5, 0.75))
    best = nb.allot(model, data, lost, budget)
    assert nb.parameters_left((12, 8), best) <= budget
    assert same(model.get_weights(), before)


def test_the_choice_is_of_validation_rows_the_result_of_test_rows(nb, data):
    model, asked, holds = nb.build_mlp((12, 8, 6, 5)), [], []
    best = 0.75, 0.5, 0.5, 0.75

    def choose(network, rows, lost, budget):
        asked.append((network, len(rows.x_test), lost, budget))
        return best

    given = {
        "networks": {"digits": [model]},
        "datasets": {"digits": data},
        "scans": {("digits", "unit"): "lost"},
        "HIDDEN_UNITS": (12, 8, 6, 5),
        "allot": choose,
        "check": lambda claim, held: holds.append(held),
    }
    allotted = run_cell(nb, "allotted = ", **given)["allotted"].loc["digits"]
    budget = nb.parameters_left((12, 8, 6, 5), [0.8] * 4)
    rows = len(nb.holdout(data).x_test)
    assert asked == [(model, rows, "lost", budget)] and len(holds) == 1
    pruned = nb.prune(model, nb.unit_mask, 0.8), without(nb, model, best)
    for name, network in zip(("uniform", "allotted"), pruned):
        expected = nb.evaluate(network, data)["accuracy"]
        assert allotted["accuracy", name] == pytest.approx(expected)
    assert allotted["parameters", "uniform"] == budget


# tickets


def test_a_masked_network_is_a_copy(nb, model):
    before = model.get_weights()
    masks = nb.masks_of(model, nb.weight_mask, 0.5)
    weights = nb.masked(model, masks).get_weights()
    assert same(weights[:2], [w * m for w, m in zip(before, masks)])
    assert same([weights[2], *model.get_weights()], [before[2], *before])


@pytest.mark.parametrize("units", [1, 2, 12, 36])
def test_a_small_dense_network_is_the_least_that_is_large_enough(nb, units):
    exact = nb.build_mlp((3 * units, units), seed=5)
    weights = exact.count_params()
    next_larger = nb.build_mlp((3 * units + 3, units + 1), seed=5)
    for asked, expected in ((weights, exact), (weights + 1, next_larger)):
        found = nb.small_dense(asked, seed=5)
        assert same(found.get_weights(), expected.get_weights())
    other = nb.small_dense(weights, seed=6)
    assert not same(other.get_weights(), exact.get_weights())


def test_the_smallest_dense_network_has_one_unit_last(nb):
    assert [v.shape[1] for v in nb.small_dense(1, 0).weights] == [3, 1, 10]


def test_tickets_are_rewound_and_tabled(nb, few, monkeypatch):
    monkeypatch.setattr(nb, "TICKET_SIZES", (50, 20))
    monkeypatch.setattr(nb, "LENET_UNITS", (30, 12))
    fine_tune, starts, finals = nb.fine_tune, [], []

    def noted(model, *settings):
        starts.append(model.get_weights())
        finals.append(fine_tune(model, *settings))
        return finals[-1]

    monkeypatch.setattr(nb, "fine_tune", noted)
    table = nb.find_tickets(few, seed=3)
    whole = nb.train(nb.build_mlp((30, 12), 3), few, nb.TICKET_EPOCHS, 3)
    accuracies = [nb.evaluate(m, few)["accuracy"] for m in (whole, *finals)]
    assert [*table] == ["kept", "start", "accuracy"]
    assert table.kept.tolist() == [100, *[50] * 4, *[20] * 4]
    assert table.start.tolist() == ["ticket", *[*nb.STARTS] * 2]
    assert table.accuracy.tolist() == accuracies
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
        draws = np.random.default_rng(3)
        assert same(places[:2], [draws.permuted(m) for m in masks[:2]])
        fewest = nb.small_dense(sum(counts), 3)
        assert same(small, fewest.get_weights())
    for start, final in zip(starts, finals):
        lasting = [w == 0 for w in final.get_weights()]
        assert same(lasting, [w == 0 for w in start])
    before = (whole, starts[0], 0.5), (finals[0], starts[4], 0.8)
    for trained, start, sparsity in before:
        largest = nb.Together(nb.magnitudes)
        masks = largest.masks(trained.get_weights()[:2], sparsity)
        assert same(masks, [w != 0 for w in start[:2]])


# pictures


def labels_of(ax):
    """Return the labels of both axes."""
    return ax.get_xlabel(), ax.get_ylabel()


def draw_criteria(nb, model, data, swept):
    """Run the cell that draws the criteria, on one model and given sweeps."""
    given = {
        "networks": {title: [model] for title in TITLES},
        "datasets": dict.fromkeys(TITLES, data),
        "sweep_criteria": lambda *_: swept.pop(0),
    }
    return run_cell(nb, "criteria = {", **given)


def test_criteria_are_drawn_as_they_are(nb, model, data, figures):
    results = nb.sweep_criteria(model, data, (0, 0.5, 0.75))
    draw_criteria(nb, model, data, [results.iloc[:6], results])
    other, one = plt.gcf().axes
    assert (other.get_title(), one.get_title()) == TITLES
    for ax in (one, other):
        assert labels_of(ax) == ("sparsity of units (%)", "test accuracy (%)")
    means = results.groupby(["rule", "sparsity"]).accuracy.mean()
    for line in one.lines:
        assert line.get_xdata() == pytest.approx([0, 50, 75])
        expected = 100 * means[line.get_label()].to_numpy()
        assert line.get_ydata() == pytest.approx(expected)
        color = nb.CRITERIA_STYLES[line.get_label()]["color"]
        assert line.get_color() == color
    names = [text.get_text() for text in one.get_legend().get_texts()]
    assert names == results.rule.unique().tolist()
    assert [line.get_label() for line in other.lines] == names[:2]


def test_layer_sparsities_are_drawn_as_they_are(nb, data, figures):
    model = nb.build_mlp((12, 8, 6, 4))
    given = {"networks": {"digits": [model]}, "datasets": {"digits": data}}
    names = run_cell(nb, "together = ", model=model, mnist=data, **given)
    assert labels_of(plt.gca()) == ("hidden layer", "sparsity (%)")
    assert plt.gca().get_title() == data.title
    guarded = nb.Together(nb.magnitudes, least=0.005)
    sizes = [kernel.size for kernel in model.get_weights()]
    sparsities, lines = (0.5, 0.8, 0.95), plt.gca().lines
    for line, sparsity in zip(lines, sparsities, strict=True):
        counts = zeros(nb.prune(model, guarded, sparsity))
        shares = [100 * n / size for n, size in zip(counts, sizes)]
        assert line.get_xdata().tolist() == [1, 2, 3, 4]
        assert line.get_ydata() == pytest.approx(shares[:4])
        assert line.get_label() == f"{100 * sparsity:.0f}% in all"
    legend = [text.get_text() for text in plt.gca().get_legend().get_texts()]
    assert legend == [line.get_label() for line in lines]
    together = names["together"]["digits"]
    assert together.index.tolist() == [0.8, 0.9, 0.95, 0.97, 0.99]
    rules = {"layer by layer": nb.weight_mask, "together": guarded}
    for (name, rule), s in itertools.product(rules.items(), (0.8, 0.99)):
        expected = nb.evaluate(nb.prune(model, rule, s), data)["accuracy"]
        assert together[name][s] == pytest.approx(expected)


def test_a_heat_map_is_the_table_with_texts(nb, figures):
    values = np.array([[-30, 4, 25.4], [-24.6, 0, 24]])
    table = pd.DataFrame(values, ["a", "b"], [0.5, 0.9, 0.99])
    texts = table.map("<{}>".format)
    (ax,) = nb.panels(1)
    for given in (texts, texts.to_numpy()):
        ax.clear()
        picture = nb.heat_map(ax, table, given, vmin=-50, vmax=40)
        assert (picture.get_array() == values).all()
        assert picture.get_clim() == (-50, 40)
        assert len(ax.texts) == values.size
        for text in ax.texts:
            column, row = text.get_position()
            assert text.get_text() == f"<{values[row, column]}>"
            dark = abs(values[row, column]) > 24
            assert text.get_color() == ("white" if dark else "black")
    ticks = ax.get_xticklabels(), ax.get_yticklabels()
    assert [t.get_text() for t in ticks[0]] == ["50", "90", "99"]
    assert [t.get_text() for t in ticks[1]] == ["a", "b"]


def test_scans_are_drawn_in_whole_points(nb, data, figures):
    keys, asked = [*itertools.product(TITLES, nb.RULES)], []

    def scan(model, data, rule, sparsities):
        asked.append((model, len(data.x_test), rule))
        return pd.DataFrame([[len(asked) - 1.4, 30.0]], [1], [0.5, 0.9])

    networks = {title: [title] for title in TITLES}
    given = {"networks": networks, "datasets": dict.fromkeys(TITLES, data)}
    names = run_cell(nb, "scans = {", sensitivity=scan, **given)
    held_out = len(nb.holdout(data).x_test)
    assert asked == [(t, held_out, nb.RULES[rule]) for t, rule in keys]
    assert [*names["scans"]] == keys
    panels = zip(plt.gcf().axes, keys, strict=True)
    for n, (ax, (title, rule)) in enumerate(panels):
        assert ax.get_title() == f"points lost, {title}, by {rule}"
        assert labels_of(ax) == ("sparsity (%)", "hidden layer")
        assert [t.get_text() for t in ax.texts] == [str(n), "30"]
        assert ax.images[0].get_clim() == (0, 40)


def test_tickets_are_drawn_as_they_are(nb, figures):
    kinds = [(100, "ticket"), *itertools.product(nb.TICKET_SIZES, nb.STARTS)]

    def search(data, seed):
        rows = [(k, s, (k + len(s) + 2 * seed) / 200) for k, s in kinds]
        return pd.DataFrame(rows, columns=["kept", "start", "accuracy"])

    mnist = SimpleNamespace(title="MNIST")
    given = {"find_tickets": search, "SEEDS": (0, 1), "mnist": mnist}
    table = run_cell(nb, "tickets = ", **given)["tickets"]
    assert table.seed.tolist() == [0] * len(kinds) + [1] * len(kinds)
    ax = plt.gca()
    assert labels_of(ax) == ("weights kept (%)", "test accuracy (%)")
    *lines, dense = ax.lines
    means = 100 * table.groupby(["start", "kept"]).accuracy.mean()
    sizes = sorted(nb.TICKET_SIZES)
    for line, start in zip(lines, nb.STARTS, strict=True):
        assert line.get_label() == start
        assert line.get_xdata().tolist() == sizes
        assert line.get_ydata() == pytest.approx(means[start][sizes])
        assert line.get_color() == nb.STARTS[start]["color"]
    assert dense.get_label() == "dense"
    assert dense.get_ydata() == pytest.approx([means["ticket"][100]] * 2)
    assert ax.get_title() == "MNIST"
    assert [t.get_text() for t in ax.get_xticklabels()] == ["33", "11", "3.6"]
    left, right = ax.get_xlim()
    assert left > right, "ever fewer weights to the right"
