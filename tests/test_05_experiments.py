"""What I am shown is what was measured: networks, sweeps, forgetting, scores."""

import itertools
from types import SimpleNamespace

import keras
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import scipy.stats
from conftest import run_cell
from helpers import chain, equal, lowest, puts_out
from keras import layers
from sklearn.metrics import recall_score

pytestmark = pytest.mark.usefixtures("figures")
ONE, TITLES = SimpleNamespace(title="One"), ("One", "Two")
QUIET = {"check": lambda *claim, **needs: None}  # where results are made up


@pytest.fixture(scope="module")
def three(nb):
    """Return three small networks that differ in their seeds."""
    return [nb.build_mlp((12, 8), seed) for seed in (0, 1, 2)]


def logits_of(model, images):
    """Return the logits of a network of the notebook, by NumPy alone."""
    return puts_out(model.get_weights(), images.reshape(len(images), -1) / 255)[-1]


def measured(model, images, labels):
    """Return accuracy and loss, by NumPy alone."""
    logits = logits_of(model, images)
    losses = np.logaddexp.reduce(logits, axis=1) - logits[range(len(labels)), labels]
    return np.mean(logits.argmax(axis=1) == labels), np.mean(losses)


# networks and training


def test_the_network_is_that_of_the_challenge(nb, model):
    assert [w.shape for w in model.get_weights()] == [(784, 12), (12, 8), (8, 10)]
    assert equal(model.get_weights(), nb.build_mlp((12, 8), seed=0).get_weights())
    assert not equal(model.get_weights(), nb.build_mlp((12, 8), seed=1).get_weights())
    images = np.full((2, 28, 28), 255, "uint8")
    assert np.allclose(model(images), logits_of(model, images), atol=1e-5)
    penalty = keras.regularizers.L1(1e-3)
    *_, drops, first, second, last = nb.build_mlp((12, 8), 0, penalty, 0.3).layers
    assert first.kernel_regularizer is second.kernel_regularizer is penalty
    assert (last.kernel_regularizer, last.name, drops.rate) == (None, "logits", 0.3)


def test_training_is_momentum_along_a_cosine(nb, data, monkeypatch):
    monkeypatch.setattr(nb, "LEARNING_RATE", 0.12)
    model = nb.build_mlp((12, 8), 0, keras.regularizers.L1(1e-3), dropout=0.3)
    model.layers[-2].trainable = False
    found, copy = nb.train(model, data, 2, seed=1), nb.copy_of(model)
    rates = np.float32([0.04 * s for s in range(3)])  # 1,189 rows are ten batches
    rates = [*rates, *np.float32(0.06 + 0.06 * np.cos(np.pi * np.arange(17) / 17))]
    rate = keras.optimizers.schedules.PiecewiseConstantDecay([*range(19)], rates)
    options = {"momentum": 0.9, "nesterov": True, "global_clipnorm": 1}
    copy.compile(keras.optimizers.SGD(rate, **options), nb.LOSS, jit_compile=False)
    keras.utils.set_random_seed(1)
    copy.fit(data.x_train, data.y_train, batch_size=128, epochs=2, verbose=0)
    for own, expected in zip(found.get_weights(), copy.get_weights(), strict=True):
        assert own == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_a_training_leaves_nothing_to_the_next(nb, data, capsys):
    model = nb.build_mlp((12, 8), seed=0, dropout=0.3)
    first = nb.train(model, data, 2, seed=0)
    before = [v.numpy() for v in (*model.variables, *first.variables)]
    pruner = nb.Pruner("unit", nb.constant_sparsity(0.9))
    broken = keras.callbacks.LambdaCallback(on_epoch_end=lambda *own: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        nb.train(model, data, 2, 1, [pruner, broken])
    again, other = (nb.train(model, data, 2, seed) for seed in (0, 1))
    assert equal(before, [v.numpy() for v in (*model.variables, *again.variables)])
    assert equal(before, [v.numpy() for v in (*model.variables, *first.variables)])
    assert not equal(first.get_weights(), other.get_weights())
    for network in (model, first, again):
        assert not network.compiled and not any(v.constraint for v in network.variables)
    assert not capsys.readouterr().out


def test_networks_are_trained_from_their_seeds_on_training_rows_only(nb, data, capsys):
    poison = {name: 255 - getattr(data, name) for name in ("x_val", "x_test")}
    poison |= {name: 9 - getattr(data, name) for name in ("y_val", "y_test")}
    models = nb.train_several(data._replace(**poison), (12, 8), 1, seeds=(0, 3))
    start, _, told = capsys.readouterr().out.partition(": ")
    assert start == f"{data.title}, right on validation images"
    for model, seed, percent in zip(models, (0, 3), told.split(), strict=True):
        alone = nb.train(nb.build_mlp((12, 8), seed), data, 1, seed)
        assert equal(model.get_weights(), alone.get_weights())
        right = measured(model, poison["x_val"], poison["y_val"])[0]
        assert percent == f"{right:.1%}"


# measuring, sweeping, drawing and claiming


def test_the_first_network_loses_its_smallest_weights_and_units(nb, data):
    names = run_cell(nb, "first-network", load_dataset=lambda name: data)
    *whole, last = names.small.get_weights()
    for sparsity in (0.9, 0.5):  # a slider moves down, too
        names = run_cell(names, "first-pruning", sparsity=sparsity)
    half = [k * nb.weight_mask(k, 0.5) for k in whole]
    assert equal(names.small.get_weights(), [*half, last])
    trial = run_cell(names, "trial").trial
    for (way, rule), percent in itertools.product(nb.RULES.items(), trial.index):
        names.small.set_weights([*(k * rule(k, percent / 100) for k in whole), last])
        right = measured(names.small, data.x_test, data.y_test)[0]
        assert trial[f"by {way}s"][percent] == pytest.approx(100 * right, abs=0.21)


@pytest.mark.parametrize("scale", [1, 1000])
def test_a_network_is_measured_as_by_hand(nb, data, three, scale):
    model, n = nb.copy_of(three[1]), []
    model.set_weights([scale * weights for weights in three[1].get_weights()])
    for rows in (data.x_val, data.y_val), (data.x_test, data.y_test):
        found = nb.evaluate(lambda x, **_: n.append(len(x)) or model(x), *rows, 70)
        expected = dict(zip(("accuracy", "loss"), measured(model, *rows)))
        assert found == pytest.approx(expected, 1e-4)
    assert sum(n) == len(data.x_val) + len(data.x_test) and max(n) <= 70
    assert nb.test_accuracy(model, data) == pytest.approx(100 * expected["accuracy"])
    own, other = (logits_of(m, data.x_test[:10]) for m in (model, three[0]))
    difference = np.abs(own - other).max() / np.abs(own).max()
    found = nb.disagreement(model, three[0], data.x_test[:10], rows=3)
    assert found == pytest.approx(difference, 1e-3)


def weights_on_a_path(kernels):
    """Return how many weights lie on a path from inputs to outputs, by matrices."""
    masks = [1.0 * (kernel != 0) for kernel in kernels]
    paths, ways = [np.ones(len(masks[0]))], [np.ones(masks[-1].shape[1])]
    for mask, other in zip(masks, masks[::-1]):
        paths.append(paths[-1] @ mask)
        ways.insert(0, other @ ways[0])
    used = [mask * np.outer(*ends) for mask, *ends in zip(masks, paths, ways[1:])]
    return sum(map(np.count_nonzero, used))


def test_parameters_left_are_those_on_a_path_from_input_to_output(nb):
    for seed in range(25):
        random = np.random.default_rng(seed)
        shapes = itertools.pairwise(random.integers(1, 5, random.integers(3, 6)))
        kernels = [random.choice([0, 0, -1, 0.5], shape) for shape in shapes]
        left = nb.parameters_left(chain(kernels, activation=None))
        assert left == weights_on_a_path(kernels), f"random network {seed}"


def test_elsewhere_too_zeros_and_dead_units_are_left_out(nb):
    dense, flat, rnn = layers.Dense(2), layers.Flatten(), layers.SimpleRNN(3)
    options = {"padding": "same", "use_bias": False}
    filters = [layers.Conv2D(3, 3, **options) for _ in "ab"]
    for expected, shape, *parts in (
        (4 * 2 + 2 + 4 * 2 + 2, (2, 4), layers.Dense(3), flat, dense),
        (9 * 3 * 2 + 9 * 2 * 3, (5, 5, 3), *filters),
        (4 * 2 + 3 * 3 + 3 + 3 * 3 + 3, (5, 4), rnn, layers.Dense(3)),
    ):
        model = keras.Sequential([keras.Input(shape), *parts])
        weights = [np.ones(w.shape) for w in model.get_weights()]
        weights[0][..., 0] = 0
        model.set_weights(weights)
        assert nb.parameters_left(model) == expected, parts


def test_a_sweep_is_the_slow_way(nb, data, three):
    rules = {"a": nb.unit_mask, "b": "weight"}
    results = nb.sweep(three[0], data, rules, (0, 0.8, 1.0))
    assert [*results] == ["rule", "sparsity", "accuracy", "loss", "parameters"]
    keys = itertools.product("ab", (0, 0.8, 1.0))
    for row, key in zip(results.itertuples(index=False), keys, strict=True):
        pruned = nb.prune(three[0], rules[key[0]], key[1])
        left = weights_on_a_path(pruned.get_weights())
        assert (row.rule, row.sparsity, row.parameters) == (*key, left)
        expected = measured(pruned, data.x_test, data.y_test)
        assert (row.accuracy, row.loss) == pytest.approx(expected, abs=1e-5)


def test_tables_hold_means_over_the_seeds_of_each_data_set(nb, data, three):
    networks = {"One": three, "Two": [three[0], *three[:2]]}
    odd = data._replace(x_test=data.x_test[1::2], y_test=data.y_test[1::2])
    given = {"networks": networks, "datasets": {"One": data, "Two": odd}}
    given["SPARSITIES"] = (0, 0.5)
    swept, tabled = (run_cell(nb, tag, **given) for tag in ("sweeps", "baseline"))
    for title, rule, s in itertools.product(TITLES, nb.RULES, (0, 0.5)):
        test = given["datasets"][title][5:7]
        own = [measured(nb.prune(m, rule, s), *test) for m in networks[title]]
        (right, _), means = zip(*own), np.mean(own, axis=0)
        found = swept.by_sparsity.loc[s].xs((title, rule), level=(1, 2))
        assert found.tolist() == pytest.approx([*means], 1e-4)
        if not s:
            always = max(np.mean(test[1] == label) for label in range(10))
            expected = [means[0], min(right), max(right), means[1], always]
            assert tabled.baseline.loc[title].tolist() == pytest.approx(expected, 1e-4)


def test_the_norm_removed_is_a_mean_of_what_is_not_left(nb, three):
    networks = {"One": three[:2], "Two": three[2:]}
    given = {"networks": networks, "datasets": networks, "SPARSITIES": (0, 0.5, 0.9)}
    found = run_cell(nb, "removed-norm", **given, mnist=ONE).removed
    for (title, rule), percent in itertools.product(found, (0, 50, 90, 100)):
        shares = []
        for own in networks[title]:
            both = nb.prune(own, rule, percent / 100), own
            left = [sum(np.sum(k**2) for k in m.get_weights()[:-1]) for m in both]
            shares.append(100 - 100 * left[0] / left[1])
        assert found[title, rule][percent] == pytest.approx(np.mean(shares), abs=1e-4)


def test_moves_are_medians_in_typical_initial_weights(nb):
    units = 12, 8, 6, 5
    start, other = nb.build_mlp(units, nb.SEEDS[0]), nb.build_mlp(units, 9)
    given = {"networks": {"One": [other, None], "Two": [start]}, "HIDDEN_UNITS": units}
    moved = run_cell(nb, "moves", **given, **QUIET).moved
    pairs = zip(range(1, 5), start.get_weights(), other.get_weights())
    for layer, before, after in pairs:
        far = np.abs(after - before) / np.sqrt(np.mean(before**2))
        largest = far[~lowest(np.abs(after), 0.97).reshape(far.shape)]
        expected = np.median(far), np.median(largest)
        assert moved.loc["One", layer].tolist() == pytest.approx(expected, 1e-4)
    assert len(moved) == 8 and not moved.loc["Two"].any(axis=None)


def test_a_line_is_a_mean_and_its_band_the_range(nb):
    rows = [("a", 2, 1.0), ("a", 1, 5.0), ("a", 2, 4.0), ("a", 2, 10.0), ("b", 1, 7.0)]
    results = pd.DataFrame([*rows, ("a", 1, 6.0)], columns=["kind", "size", "value"])
    (ax,) = nb.panels(1)
    nb.plot_lines(ax, results, "size", "value", "kind", {})
    assert np.array_equal(ax.lines[0].get_data(), ([1, 2], [5.5, 5]))
    corners = {(1, 5), (1, 6), (2, 1), (2, 10)}
    assert set(map(tuple, ax.collections[0].get_paths()[0].vertices)) == corners


def test_sweeps_are_drawn_with_the_first_sparsity_that_costs_a_point(nb):
    falling = {"weight": (0.9, 0.895, 0.885, 0.5), "unit": (0.9, 0.878, 0.7, 0.3)}
    rows = [
        (rule, s, right + 0.02 * seed, 2 - right)
        for seed, rule in itertools.product((-1, 0, 1), falling)
        for s, right in zip((0, 0.5, 0.8, 0.9), falling[rule])
    ]
    one = pd.DataFrame(rows, columns=["rule", "sparsity", "accuracy", "loss"])
    nb.draw_sweeps({"One": one, "Two": one.assign(accuracy=one.accuracy / 2)})
    marks = ([0.8, 0.5], 100), ([], -1), ([0.9, 0.5], 50), ([], -1)
    for ax, (expected, scale) in zip(plt.gcf().axes, marks, strict=True):
        lines = {line.get_label(): line.get_ydata() for line in ax.lines}
        for rule, own in {**falling, "dense": [0.9] * 2}.items():
            assert lines[rule] == pytest.approx(scale * np.array(own) + 2 * (scale < 0))
        assert [x.get_xdata()[0] for x in ax.lines if x.get_marker() == "v"] == expected


def test_the_weights_kept_are_counted_by_pixel(nb, data, three):
    networks = {"One": three[:2], "Two": three[2:]}
    given = {"networks": networks, "datasets": dict.fromkeys(TITLES, data)}
    names = run_cell(nb, "kept-pixels", mnist=ONE, **given, **QUIET)
    for title, ax in zip(TITLES, plt.gcf().axes[::2]):
        kept = ~lowest(np.abs(networks[title][0].get_weights()[0]), 0.97)
        kept = kept.sum(axis=1).reshape(28, 28)
        assert equal([names.kept_97[title], ax.images[0].get_array()], [kept, kept])
    assert names.inner == names.kept_97["One"][2:26, 2:26].sum()


@pytest.mark.parametrize("on_gpu", [False, True])
@pytest.mark.parametrize("title", ["MNIST", "UCI digits (stand-in for MNIST)"])
def test_a_claim_is_judged_where_what_it_needs_is_there(nb, capsys, title, on_gpu):
    names = run_cell(nb, "checking", datasets=["another", title], ON_GPU=on_gpu)
    lacks = {"the real data": "stand" in title, "a CPU": on_gpu, "nothing": False}
    for (needs, missing), holds in itertools.product(lacks.items(), (True, False)):
        given = ["two", np.bool_(holds), *[needs] * (needs != "the real data")]
        verdict = f"not checked without {needs}" if missing else "checked"
        if holds or missing:
            names.check(*given)
            assert names.CLAIMS.pop() == ("two", verdict)
            assert capsys.readouterr().out == f"{verdict}: two\n"
            continue
        with pytest.raises(AssertionError, match="does not hold: two"):
            names.check(*given)
        assert not names.CLAIMS and not capsys.readouterr().out
    with pytest.raises(KeyError):
        names.check("two", True, "a GPU")
    told = ("one", "checked"), ("two", "b"), ("six", "checked"), ("one", "c")
    run_cell(names, "all-claims", CLAIMS=told)
    said = "1 of 3 claims were checked\nc: one\nb: two\n"
    assert capsys.readouterr().out == said, "the last verdict of each"


# forgetting

LABELS, UNEVEN = np.arange(200) % 4, np.repeat(range(4), [90, 60, 40, 10])
TEN, LETTERS = np.arange(60) * 7 % 10, np.array([*"abcdefghij"])


def guesses(networks, right, seed, labels=LABELS):
    """Return answers that are right with a probability, else any of four labels."""
    random = np.random.default_rng(seed)
    wrong = random.integers(0, 4, (networks, len(labels)))
    return np.where(random.random(wrong.shape) < right, labels, wrong)


def slow_modal(answers):
    """Return the commonest answer per image, the lowest of a tie."""
    return [np.bincount(column).argmax() for column in answers.T]


@pytest.mark.filterwarnings("ignore:Precision loss:RuntimeWarning")
@pytest.mark.parametrize("labels", [LABELS, UNEVEN], ids=["even", "uneven"])
def test_damage_is_that_of_a_slow_reference(nb, labels):
    both = before, after = guesses(6, 0.9, 0, labels), guesses(7, 0.7, 10, labels)
    after[:, labels == 1] = guesses(7, 0.3, 20, labels)[:, labels == 1]
    own = [np.array([recall_score(labels, y, average=None) for y in x]) for x in both]
    assert nb.recalls(after, labels) == pytest.approx(own[1])
    one, two = (x - np.mean(y == labels) for x, y in zip(own, both))
    tests = [scipy.stats.ttest_ind(a, b, equal_var=False) for a, b in zip(one.T, two.T)]
    p = [test.pvalue for test in tests]
    ranks = {value: sum(other <= value for other in p) for value in p}
    expected = {
        "lost": 100 * (own[0].mean(axis=0) - own[1].mean(axis=0)),
        "change": 100 * (two.mean(axis=0) - one.mean(axis=0)),
        "p": [min(1, *(q * len(p) / ranks[q] for q in p if q >= x)) for x in p],
    }
    damage = nb.class_damage(before, after, labels)
    assert [*damage] == [*expected]
    for name, column in damage.items():
        assert column.tolist() == pytest.approx([*expected[name]])
    perfect = np.tile(labels, (4, 1))
    assert (nb.class_damage(perfect, perfect, labels) == [0, 0, 1]).all(axis=None)


def test_damage_is_drawn_with_stars(nb):
    before, after = guesses(8, 0.8, seed=1), guesses(8, 0.8, seed=2)
    after[:, LABELS == 2] = guesses(8, 0.1, seed=3)[:, LABELS == 2]
    fashion = SimpleNamespace(title="clothes", class_names=[*"abcd"])
    given = {"answers": {0: before, 0.5: before, 0.9: after}, "FORGETTING": (0.5, 0.9)}
    run_cell(nb, "classes-paid", labels=LABELS, fashion=fashion, **given)
    ax, damage = plt.gcf().axes[0], nb.class_damage(before, after, LABELS)
    order = damage.change.argsort().tolist()
    assert [t.get_text() for t in ax.get_yticklabels()] == ["abcd"[n] for n in order]
    for row, (none, text) in enumerate(zip(ax.texts[::2], ax.texts[1::2], strict=True)):
        own = damage.loc[order[row]]
        assert (none.get_text(), text.get_position()) == ("0", (1, row))
        assert text.get_text() == f"{own.change:+.0f}" + "*" * int(own.p <= 0.05)
        assert ax.images[0].get_array()[row].tolist() == [0, own.change]


def test_answers_are_those_of_pruned_copies(nb, data, three):
    both = {0: nb.answers_of(three, data), 0.5: nb.answers_of(three, data, 0.5)}
    for (sparsity, answers), n in itertools.product(both.items(), range(3)):
        logits = logits_of(nb.prune(three[n], "weight", sparsity), data.x_test)
        assert (answers[n] == logits.argmax(axis=1)).all()


@pytest.mark.filterwarnings("error")
def test_exemplars_are_those_of_a_slow_reference(nb):
    answers = {s: guesses(4, 0.9 - s, seed=9) for s in (0, 0.8, 0.5)}
    answers[0.9] = answers[0]
    names = run_cell(nb, "votes", answers=answers, labels=LABELS, **QUIET)
    dense = slow_modal(answers[0])
    for sparsity, row in zip((0.8, 0.5, 0.9), names.pies.to_numpy(), strict=True):
        pruned, hits = slow_modal(answers[sparsity]), {True: [], False: []}
        assert names.modal[sparsity].tolist() == pruned
        for image, label in enumerate(LABELS):
            moved = dense[image] != pruned[image]
            hits[moved] += [own[image] == label for own in answers[0]]
        means = [100 * np.mean(h) if h else np.nan for h in hits.values()]
        assert row.tolist() == pytest.approx([len(hits[True]) / 4, *means], nan_ok=True)


def test_the_surest_exemplar_of_each_class_is_shown(nb):
    before, after = guesses(6, 0.7, 0, TEN), guesses(6, 0.4, 1, TEN)
    given = {"answers": {0: before, 0.9: after}, "labels": TEN, "names": LETTERS}
    given["fashion"] = SimpleNamespace(x_test=TEN[:, None, None])
    names = run_cell(run_cell(nb, "votes", **given, **QUIET), "disputed")
    one, other = slow_modal(before), slow_modal(after)
    for label, (image, ax) in enumerate(zip(names.disputed, plt.gcf().axes)):
        own = [i for i in np.flatnonzero(TEN == label) if one[i] != other[i]]
        sure = [sum(before[:, i] == one[i]) + sum(after[:, i] == other[i]) for i in own]
        assert TEN[image] == label and (not own or image == own[np.argmax(sure)])
        lines = [line.split()[-1] for line in ax.get_xlabel().splitlines()]
        assert lines[:3] == [*LETTERS[[label, one[image], other[image]]]]
        verdict = {one[image]: "wrong", other[image]: "corrected"}.get(label, "times")
        assert not own or lines[3] == verdict


def test_one_class_is_thinned(nb, data):
    before, asked = [array.copy() for array in data[1:7]], []
    trained = {"train_several": lambda rows, **own: asked.append((rows, own))}
    names = run_cell(nb, "left-out", fashion=data, **trained)
    rare, ((found, own),) = data.y_train == names.RARE, asked
    few = found.y_train == names.RARE
    assert own == nb.POPULATION and np.sum(few) == round(0.05 * rare.sum()) > 0
    assert equal([x[~few] for x in found[1:3]], [x[~rare] for x in data[1:3]])
    left = iter(data.x_train[rare])
    for image in found.x_train[few]:
        assert any((own == image).all() for own in left), "in their order"
    assert all(one is other for one, other in zip(found[3:], data[3:]))
    assert equal(data[1:7], before)


def test_a_rare_class_is_compared_with_itself_if_common(nb):
    answers = {0: guesses(6, 0.9, seed=0), 0.9: guesses(6, 0.6, seed=1)}
    common = nb.class_damage(answers[0], guesses(6, 0.7, 2), LABELS)
    given = {"answers_of": lambda own, rows, s: answers[s] if own == "rare" else None}
    given |= {"fashion": SimpleNamespace(class_names="abcd"), "rare_population": "rare"}
    given |= {"at_90": common.set_axis([*"abcd"])[::-1], "labels": LABELS, "RARE": 3}
    tail = run_cell(nb, "tail", **given, **QUIET).tail
    rare = nb.class_damage(answers[0], answers[0.9], LABELS)
    expected = [common.loc[3].tolist(), rare.loc[3].tolist()]
    assert tail.loc[["common", "rare"]].to_numpy().tolist() == expected


def test_copies_are_repaired_and_trained_on_with_their_seeds(nb, data, three, capsys):
    asked, anew = [], lambda *own: asked.append(own) or three[0]
    given = {"population": three, "fashion": data, "IMAGES": 100}
    run_cell(nb, "tuned", **given, repair=anew, fine_tune=anew)
    right = measured(three[0], data.x_val, data.y_val)[0]
    told = capsys.readouterr().out.partition("right on validation images:")[2]
    assert told.split() == [f"{right:.1%}"] * 3
    for seed, own in enumerate(three):
        (pruned, dense, images), (start, *plan) = asked[2 * seed :][:2]
        expected = nb.prune(own, "weight", 0.99).get_weights()
        assert pruned is start and equal(pruned.get_weights(), expected)
        assert dense is own and np.array_equal(images, data.x_train[:100])
        assert plan[0] is data and plan[1:] == [1, seed]


# which units, which layers, which grain, which ticket

KERNELS = [np.random.default_rng(n).normal(size=(n, n - 1)) for n in (9, 8, 7)]
ROWS, ANSWERS = np.random.default_rng(0).random((60, 9)), np.arange(60) % 6


def test_scores_are_those_of_a_slow_reference(nb):
    scores = nb.unit_scores(chain(KERNELS), ROWS, ANSWERS)
    *hidden, logits = puts_out(KERNELS, ROWS)
    slope = np.exp(logits) / np.exp(logits).sum(axis=1)[:, None] - np.eye(6)[ANSWERS]
    for layer in (1, 0):
        slope = slope @ KERNELS[layer + 1].T
        expected = {
            "L2 norm": np.sqrt((KERNELS[layer] ** 2).sum(axis=0)),
            "L1 norm": np.abs(KERNELS[layer]).sum(axis=0),
            "mean activation": hidden[layer].mean(axis=0),
            "APoZ": 1 - (hidden[layer] == 0).mean(axis=0),
            "Taylor": np.abs(hidden[layer] * slope / 60).mean(axis=0),
        }
        assert [*scores] == [*expected, "random"]
        for name, values in expected.items():
            assert scores[name][layer] == pytest.approx(values, 1e-3, 1e-7), name
        slope = slope * (hidden[layer] > 0)


def test_scores_are_repeatable_and_those_of_what_is_pruned(nb, data):
    model, dropping = (nb.build_mlp((12, 1, 8), dropout=rate) for rate in (0, 0.5))
    dropping.set_weights(model.get_weights())
    both = [nb.unit_scores(own, data.x_val, data.y_val) for own in (model, dropping)]
    for name, own in both[0].items():
        assert [len(scores) for scores in own] == [12, 8], name
        assert equal(own, both[1][name]), f"{name} without dropout"
    assert len({*np.concatenate(both[0]["random"])}) == 12 + 8


def test_the_lowest_scores_of_each_kernel_go(nb):
    random = np.random.default_rng(0)
    kernels = [random.normal(size=(6, 5)), random.normal(size=(3, 2, 4))]
    scores = [random.integers(0, 9, size=k.shape[-1]) for k in kernels]
    for k, s, mask in zip(kernels, scores, nb.ByScores(scores).masks(kernels, 0.3)):
        assert np.array_equal(mask, np.broadcast_to(~lowest(s, 0.3), k.shape))
    for own, words in (scores[0] + np.nan, "finite, not nan"), (scores[1], "shape"):
        with pytest.raises(ValueError, match=words):
            nb.ByScores([own]).masks(kernels[:1], 0.3)


def test_criteria_are_measured_on_validation_rows_and_tabled_as_means(nb, data, three):
    given = {"networks": {"One": three[:2]}, "datasets": {"One": data}, "SEEDS": (4, 5)}
    names, tables = run_cell(nb, "criteria", **given), []
    for own in three[:2]:
        scores = nb.unit_scores(own, data.x_val, data.y_val)
        rules = {name: nb.ByScores(values) for name, values in scores.items()}
        tables.append(nb.sweep(own, data, rules, names.levels).accuracy)
    assert [*names.by_criterion.loc["One"].index] == [*rules]
    means = names.by_criterion.to_numpy().ravel().tolist()
    assert means == pytest.approx([*50 * (tables[0] + tables[1])])


def slowly_chosen(outputs, kernel, count):
    """Return which units forward selection takes, by least squares for each choice."""
    keep, target = [], outputs @ kernel
    for _ in range(count):
        left = {}
        for unit in {*range(outputs.shape[1])} - {*keep}:
            x = outputs[:, [*keep, unit]]
            left[unit] = np.sum((x @ np.linalg.lstsq(x, target)[0] - target) ** 2)
        keep.append(min(left, key=left.get))
    return np.isin(np.arange(outputs.shape[1]), keep)


@pytest.mark.parametrize("sparsity", [0, 0.3, 0.6, 1])
def test_choices_for_repair_count_what_is_read(nb, sparsity):
    model, rows, after = chain(KERNELS), ROWS - 0.5, KERNELS[2]
    before, outputs = model.get_weights(), puts_out(KERNELS, rows)
    pruned = nb.prune(model, nb.Greedy(model, rows), sparsity).get_weights()
    for number, units in (1, 7), (0, 8):
        keep = slowly_chosen(outputs[number], after, units - round(sparsity * units))
        assert equal([pruned[number]], [before[number] * keep])
        after = KERNELS[number][:, keep]
    with pytest.raises(ValueError, match="sparsity should be from 0 to 1"):
        nb.prune(model, nb.Greedy(model, rows), sparsity + 1.1)


def test_a_unit_is_chosen_once_and_silent_ones_last(nb):
    random = np.random.default_rng(0)
    outputs = np.maximum(random.normal(size=(60, 9)), 0)
    both = [np.hstack([factor * outputs, outputs]) for factor in (2, 0)]
    twice, half = (x.T @ x / len(x) for x in both)
    kernel = random.normal(size=(18, 4))
    for count in range(10):
        assert nb.chosen(twice, kernel, count).reshape(2, 9).sum(axis=0).max() <= 1
        assert not nb.chosen(half, kernel, count)[:9].any()
        for gram in (twice, half, 0 * half):
            assert nb.chosen(gram, kernel, 9 + count).sum() == 9 + count


def test_choices_for_repair_are_tabled_as_means(nb, data, three):
    def mixed(pruned, dense, images):
        assert np.array_equal(images, data.x_train[:50])
        other, pairs = nb.copy_of(dense), zip(pruned.get_weights(), dense.get_weights())
        other.set_weights([a + b / 9 for a, b in pairs])
        return other

    networks, ways = {"One": three[:2], "Two": three[2:]}, ("one-shot", "repaired")
    every = "best public", *ways
    places = pd.MultiIndex.from_product([TITLES[::-1], [*nb.RULES], every])
    known = pd.DataFrame(np.arange(60).reshape(12, 5), places, nb.HIGH)
    given = {"datasets": dict.fromkeys(TITLES, data), "networks": networks}
    given |= {"recovered": known, "repair": mixed, "IMAGES": 50}
    found, images = run_cell(nb, "patterns", **given).choices, data.x_train[:100]
    rules = *nb.RULES, "unit, greedy"
    assert [*found.index] == [*itertools.product(TITLES, rules, ways)]
    assert found[0.9]["Two", "unit", "repaired"] == known[0.9].iloc[5]
    for title, way, s in itertools.product(TITLES, ways, found):
        both = [(nb.prune(x, nb.Greedy(x, images), s), x) for x in networks[title]]
        both = [mixed(*x, images[:50]) if way == ways[1] else x[0] for x in both]
        mean = np.mean([nb.test_accuracy(x, data) for x in both])
        assert found[s][title, "unit, greedy", way] == pytest.approx(mean)


def test_each_layer_is_pruned_alone_on_validation_rows(nb, model, data, three):
    before, rows = model.get_weights(), (data.x_val, data.y_val)
    lost = nb.sensitivity(model, *rows, (0, 0.5, 0.75))
    assert equal(model.get_weights(), before) and (lost[0] == 0).all()
    whole = measured(model, *rows)[0]
    for layer, sparsity in itertools.product((0, 1), (0.5, 0.75)):
        weights = [w.copy() for w in before]
        weights[layer][:, lowest(np.linalg.norm(weights[layer], axis=0), sparsity)] = 0
        model.set_weights(weights)
        points = 100 * (whole - measured(model, *rows)[0])
        assert lost.loc[layer + 1, sparsity] == pytest.approx(points)
    given = {"networks": {"One": three[1:]}, "datasets": {"One": data}}
    scan = nb.sensitivity(three[1], *rows, nb.SPARSITIES[2:8])
    assert run_cell(nb, "sensitivity", **given).scans["One"].equals(scan)


def test_pieces_are_as_large_as_they_are_called(nb, data):
    model, blocks = nb.build_mlp((32, 64)), [nb.block_mask((n, n)) for n in (4, 16)]
    names = run_cell(nb, "pieces", model=model, mnist=data, **QUIET)
    for s, line in zip((0.5, 0.75), plt.gca().lines):
        rules = nb.weight_mask, nb.n_m_mask(4 - 4 * s, 4), *blocks, nb.unit_mask
        right = [nb.test_accuracy(nb.prune(model, rule, s), data) for rule in rules]
        assert line.get_ydata().tolist() == pytest.approx(right)
        for own, rule in zip(names.pieces.values(), rules, strict=True):
            assert equal(*([x(model.get_weights()[1], s)] for x in (own, rule)))
    ticks = zip(plt.gca().get_xticks(), plt.gca().get_xticklabels())
    labels = {x: t.get_text() for x, t in ticks if t.get_text()}
    assert labels == dict(enumerate(names.pieces))


def test_a_small_dense_network_is_the_least_that_is_large_enough(nb):
    for units, extra in itertools.product((1, 12, 36), (0, 1)):
        exact = 784 * 3 * units + 3 * units * units + units * 10
        expected = nb.build_mlp((3 * (units + extra), units + extra), 5).get_weights()
        assert equal(nb.small_dense(exact + extra, 5).get_weights(), expected)


def test_tickets_are_rewound_and_tabled(nb, data, monkeypatch):
    random, starts, finals = np.random.default_rng(0), [], []

    def trained(model, *plan):
        assert plan[0] is data and plan[1:] == (2, 3)
        starts.append(model.get_weights())
        finals.append(nb.copy_of(model))
        finals[-1].set_weights([w * random.normal(size=w.shape) for w in starts[-1]])
        return finals[-1]

    monkeypatch.setattr(nb, "LENET_UNITS", (30, 12))
    for name in ("train", "fine_tune"):
        monkeypatch.setattr(nb, name, trained)
    table = nb.find_tickets(data, seed=3, sizes=(50, 20), epochs=2)
    names = ["ticket", "other weights", "random mask", "small dense"]
    assert table.kept.tolist() == [100, *[50] * 4, *[20] * 4]
    assert table.start.tolist() == ["ticket", *names * 2]
    assert table.accuracy.tolist() == [nb.test_accuracy(m, data) for m in finals]
    first, other = (nb.build_mlp((30, 12), s).get_weights() for s in (3, 103))
    for kept, place, final in (0.5, 1, finals[0]), (0.2, 5, finals[1]):
        ticket, elsewhere, shuffled, small = starts[place:][:4]
        masks, draws = [k != 0 for k in ticket], np.random.default_rng(3)
        places = [*map(draws.permuted, masks[:2]), True]
        flat = [np.concatenate(x[:2], None) for x in (final.get_weights(), masks)]
        assert equal([flat[1]], [~lowest(np.abs(flat[0]), 1 - kept)]), "the largest"
        assert equal(ticket, [w * m for w, m in zip(starts[0], masks)]), "not rewound"
        assert equal(elsewhere, [w * m for w, m in zip(other, masks)])
        assert equal(shuffled, [w * m for w, m in zip(first, places)])
        assert equal(small, nb.small_dense(weights_on_a_path(ticket), 3).get_weights())
