"""Criteria for units, sparsities of single layers, and lottery tickets."""

import itertools

import keras
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from conftest import run_cell
from matplotlib.colors import same_color

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


def same(scores, others):
    """Return whether two lists of arrays are equal."""
    pairs = zip(scores, others, strict=True)
    return all(np.array_equal(a, b) for a, b in pairs)


def masks_by(nb, model, rule, sparsity):
    """Return the masks that a rule gives to the kernels of a model."""
    return [mask for _, mask in nb.masks_of(nb.prunable(model), rule, sparsity)]


def zeros(model):
    """Return the number of zeros in each kernel of a model."""
    return [int((kernel == 0).sum()) for kernel in model.get_weights()]


def on_a_path(kernels):
    """Return how many weights lie on a path of weights from input to output."""
    masks, total = [(kernel != 0).astype(int) for kernel in kernels], 0
    for place, mask in enumerate(masks):
        before, after = np.ones(len(masks[0]), int), np.ones(masks[-1].shape[1], int)
        for other in masks[:place]:
            before = np.sign(before @ other)
        for other in masks[:place:-1]:
            after = np.sign(other @ after)
        total += before @ mask @ after
    return total


@pytest.fixture
def few(data):
    """Return a small part of the stand-in."""
    return data._replace(x_train=data.x_train[:240], y_train=data.y_train[:240])


# criteria


def test_scores_are_those_of_a_slow_reference(nb):
    scores = nb.unit_scores(network(KERNELS), ROWS, LABELS)
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
    scores = nb.unit_scores(model, data.x_val, data.y_val)["random"]
    assert len(np.unique(np.concatenate(scores))) == 12 + 8
    again = nb.unit_scores(model, data.x_test, data.y_test)["random"]
    assert same(scores, again)


def test_scores_are_those_of_the_layers_that_are_pruned(nb, data):
    model = nb.build_mlp((12, 1, 8))
    units = [kernel.shape[-1] for kernel in nb.prunable_kernels(model)]
    for scores in nb.unit_scores(model, data.x_val, data.y_val).values():
        assert [len(own) for own in scores] == units == [12, 8]


def test_a_unit_that_never_fires_goes_first(nb):
    model = network(KERNELS)
    scores = nb.unit_scores(model, ROWS, LABELS)
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
    both = [nb.unit_scores(own, data.x_val, data.y_val) for own in (model, scaled)]
    for name in ("L2 norm", "L1 norm"):
        rule, other = (nb.ByScores(scores[name]) for scores in both)
        masks = masks_by(nb, model, rule, 0.5)
        assert same(masks, masks_by(nb, scaled, other, 0.5))
        if name == "L2 norm":
            assert same(masks, masks_by(nb, model, "unit", 0.5))


def test_the_lowest_scores_go_and_ties_by_position(nb, model):
    scores = [np.array([5, 1, 1, 1] * 3), np.array([0, 7, 0, 3, 2, 9, 4, 1])]
    rule = nb.ByScores(scores)
    masks = masks_by(nb, model, rule, 0.4)
    gone = [[1, 2, 3, 5, 6], [0, 2, 7]]
    for mask, units, kernel in zip(masks, gone, model.get_weights()):
        assert mask.shape == kernel.shape and mask.dtype == bool
        assert np.flatnonzero(~mask.any(axis=0)).tolist() == units
        assert (mask == mask[0]).all(), "units go whole"
    pruned = nb.prune(model, rule, 0.4)
    assert zeros(pruned) == [784 * 5, 12 * 3, 0]


def test_criteria_are_swept_and_tabled_as_means(nb, model, data):
    models, swept = (model, nb.build_mlp((12, 8), seed=1)), []
    many = np.resize(data.x_val, (2100, 28, 28)), np.resize(data.y_val, 2100)
    rows = data._replace(x_val=many[0], y_val=many[1])

    def sweep(network, measured, rules, sparsities):
        assert measured is rows and [*rules] == CRITERIA
        scores = nb.unit_scores(network, many[0][:2000], many[1][:2000])
        for name, rule in rules.items():
            assert type(rule) is nb.ByScores and same(rule.scores, scores[name])
        keys = itertools.product(rules, sparsities)
        table = pd.DataFrame(keys, columns=["rule", "sparsity"])
        swept.append(table.assign(accuracy=np.arange(len(table)) + 7 * len(swept) ** 2))
        return swept[-1]

    given = {"networks": dict.fromkeys(TITLES, models), "SEEDS": (4, 5)}
    given |= {"datasets": dict.fromkeys(TITLES, rows), "sweep": sweep}
    names = run_cell(nb, "by_criterion = ", **given)
    found, levels = names["by_criterion"], names["levels"]
    assert found.columns.tolist() == [*levels] and {0, 0.7, 0.8} <= {*levels}
    for title, pair in zip(TITLES, (swept[:2], swept[2:]), strict=True):
        assert found.loc[title].index.tolist() == CRITERIA
        for row, other in zip(*(own.itertuples() for own in pair), strict=True):
            mean = 100 * (row.accuracy + other.accuracy) / 2
            assert found.loc[title, row.rule][row.sparsity] == pytest.approx(mean)


# layers


def test_rules_for_all_kernels_prune_a_model(nb, model, data):
    before = model.get_weights()
    scores = nb.unit_scores(model, data.x_val, data.y_val)["Taylor"]
    total = before[0].size + before[1].size
    assert sum(zeros(nb.prune(model, nb.ByScores(scores), 0.5))) == total / 2
    together = nb.prune(model, nb.Globally(nb.magnitudes), 0.5)
    assert sum(zeros(together)) == round(0.5 * total)
    assert same(model.get_weights(), before)


def test_each_layer_is_pruned_alone(nb, model, data):
    before, rows = model.get_weights(), (data.x_val, data.y_val)
    lost = nb.sensitivity(model, *rows, (0.5, 0.75))
    assert lost.index.tolist() == [1, 2]
    assert lost.columns.tolist() == [0.5, 0.75]
    assert same(model.get_weights(), before)
    whole = (nb.logits_of(model, rows[0]).argmax(axis=1) == rows[1]).mean()
    for layer, sparsity in itertools.product((0, 1), (0.5, 0.75)):
        weights = [w.copy() for w in before]
        sizes = np.linalg.norm(weights[layer], axis=0)
        gone = np.argsort(sizes)[: round(sparsity * len(sizes))]
        weights[layer][:, gone] = 0
        pruned = nb.copy_of(model)
        pruned.set_weights(weights)
        answers = nb.logits_of(pruned, rows[0]).argmax(axis=1)
        points = 100 * (whole - (answers == rows[1]).mean())
        assert lost.loc[layer + 1, sparsity] == pytest.approx(points)


def test_a_layer_left_whole_loses_nothing(nb, model, data):
    lost = nb.sensitivity(model, data.x_test, data.y_test, (0, 0.5))
    assert lost.columns.tolist() == [0, 0.5]
    assert (lost[0] == 0).all()


# tickets


def test_a_masked_network_is_a_copy(nb, model):
    before = model.get_weights()
    masks = masks_by(nb, model, "weight", 0.5)
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


STARTS = ["ticket", "other weights", "random mask", "small dense"]


def test_tickets_are_rewound_and_tabled(nb, few, monkeypatch):
    monkeypatch.setattr(nb, "LENET_UNITS", (30, 12))
    fine_tune, starts, finals = nb.fine_tune, [], []

    def noted(model, *settings):
        assert settings == (few, 2, 3)
        starts.append(model.get_weights())
        finals.append(fine_tune(model, *settings))
        return finals[-1]

    monkeypatch.setattr(nb, "fine_tune", noted)
    table = nb.find_tickets(few, seed=3, sizes=(50, 20), epochs=2)
    whole, test = nb.train(nb.build_mlp((30, 12), 3), few, 2, 3), few[5:7]
    accuracies = [nb.evaluate(m, *test)["accuracy"] for m in (whole, *finals)]
    assert [*table] == ["kept", "start", "accuracy"]
    assert table.kept.tolist() == [100, *[50] * 4, *[20] * 4]
    assert table.start.tolist() == ["ticket", *STARTS * 2]
    assert table.accuracy.tolist() == [100 * own for own in accuracies]
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
        fewest = nb.small_dense(on_a_path(ticket), 3)
        assert same(small, fewest.get_weights())
    for start, final in zip(starts, finals):
        lasting = [w == 0 for w in final.get_weights()]
        assert same(lasting, [w == 0 for w in start])
    before = (whole, starts[0], 0.5), (finals[0], starts[4], 0.8)
    for trained, start, sparsity in before:
        largest = nb.Globally(nb.magnitudes)
        masks = largest.masks(trained.get_weights()[:2], sparsity)
        assert same(masks, [w != 0 for w in start[:2]])


# pictures


def labels_of(ax):
    """Return the labels of both axes."""
    return ax.get_xlabel(), ax.get_ylabel()


def test_criteria_are_drawn_as_they_are(nb, figures):
    index = pd.MultiIndex.from_product([TITLES, CRITERIA])
    values = np.arange(36).reshape(12, 3) + 0.5
    table = pd.DataFrame(values, index, [0, 0.5, 0.75])
    run_cell(
        nb, "by_criterion.loc[title].iterrows()", by_criterion=table, datasets=TITLES
    )
    axes, colors = plt.gcf().axes, set()
    assert tuple(ax.get_title() for ax in axes) == TITLES
    assert axes[0].get_ylabel() == "test accuracy (%)"
    for ax in axes:
        assert ax.get_xlabel() == "sparsity of units (%)"
        for line, name in zip(ax.lines, CRITERIA, strict=True):
            assert line.get_label() == name
            assert line.get_xdata() == pytest.approx([50, 75])
            row = table.loc[ax.get_title(), name]
            assert line.get_ydata().tolist() == row.tolist()[1:]
            colors.add((name, line.get_color()))
    assert len(colors) == len({color for _, color in colors}) == 6
    own = dict(colors)
    assert same_color(own["L2 norm"], nb.STYLES["unit"]["color"])
    (legend,) = plt.gcf().legends
    assert [text.get_text() for text in legend.get_texts()] == CRITERIA


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
    asked = []

    def scan(model, images, labels, sparsities):
        assert images is data.x_val and labels is data.y_val
        asked.append(model)
        return pd.DataFrame([[len(asked) - 1.4, 30.0]], [1], [0.5, 0.9])

    networks = {title: [title, None] for title in TITLES}
    given = {"networks": networks, "datasets": dict.fromkeys(TITLES, data)}
    names = run_cell(nb, "scans = {", sensitivity=scan, **given)
    assert asked == [*names["scans"]] == [*TITLES]
    for n, (ax, title) in enumerate(zip(plt.gcf().axes, TITLES)):
        assert ax.get_title() == title
        assert ax.get_xlabel() == "sparsity (%)"
        assert [t.get_text() for t in ax.texts] == [str(n), "30"]
        assert ax.images[0].get_clim() == (0, 40)


def test_tickets_are_drawn_as_they_are(nb, figures):
    sizes = 3.6, 11, 33
    kinds = [(100, "ticket"), *itertools.product(sizes[::-1], STARTS)]

    def search(data, seed):
        assert data is mnist
        rows = [(k, s, (k + len(s) + 2 * seed) / 2) for k, s in kinds]
        return pd.DataFrame(rows, columns=["kept", "start", "accuracy"])

    mnist = nb.load_dataset("digits")
    given = {"find_tickets": search, "SEEDS": (0, 1), "mnist": mnist}
    table = run_cell(nb, "tickets = ", **given)["tickets"]
    assert table.seed.tolist() == [0] * len(kinds) + [1] * len(kinds)
    ax = plt.gca()
    assert labels_of(ax) == ("weights kept (%)", "test accuracy (%)")
    *lines, dense = ax.lines
    means = table.groupby(["start", "kept"]).accuracy.mean()
    names = {text.get_text(): text for text in ax.texts}
    for line, start in zip(lines, STARTS, strict=True):
        own = means[start]
        assert line.get_label() == start
        assert line.get_xdata().tolist() == own.index.tolist()
        assert line.get_ydata() == pytest.approx(own.to_numpy())
        assert same_color(line.get_color(), names[start].get_color())
        assert names[start].get_position()[1] == pytest.approx(own[3.6])
    assert len({line.get_color() for line in lines}) == 4
    assert dense.get_ydata() == pytest.approx([means["ticket"][100]] * 2)
    assert names["dense"].get_position()[0] == 100
    assert ax.get_title() == mnist.title
    ticks = [t.get_text() for t in ax.get_xticklabels()]
    assert ticks == ["100", "33", "11", "3.6"]
    left, right = ax.get_xlim()
    assert left > right, "ever fewer weights to the right"
