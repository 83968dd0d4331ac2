"""What pruned populations forget: classes, single images, rare classes."""

import collections
import dataclasses
import types

import matplotlib.pyplot as plt
import numpy as np
import pytest
import scipy.stats
from conftest import run_cell
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

CLASSES = 4
LABELS = np.arange(200) % CLASSES
UNEVEN = np.repeat(range(CLASSES), [90, 60, 40, 10])


def guesses(networks, accuracy, seed, labels=LABELS):
    """Return answers that are right with a probability, else any label."""
    random = np.random.default_rng(seed)
    shape = networks, len(labels)
    wrong = random.integers(0, CLASSES, shape)
    return np.where(random.random(shape) < accuracy, labels, wrong)


def tables(images):
    """Return a strategy for answers of one to six networks."""
    shapes = st.tuples(st.integers(1, 6), st.just(images))
    return arrays(int, shapes, elements=st.integers(0, CLASSES - 1))


def slow_modal(answers):
    """Return the commonest answer per image, the lowest of a tie."""
    counts = [collections.Counter(column) for column in answers.T.tolist()]
    return [min(c, key=lambda label: (-c[label], label)) for c in counts]


def slow_disputed(before, after):
    """Return all images, the surest of different answers first."""
    sure = []
    for own, others in zip(before.T.tolist(), after.T.tolist()):
        (one,), (other,) = (slow_modal(np.c_[x]) for x in (own, others))
        shares = own.count(one) / len(own) + others.count(other) / len(others)
        sure.append(-1 if one == other else shares)
    return sorted(range(len(sure)), key=lambda image: -sure[image])


def slow_recalls(answers, labels):
    """Return the recall of each class, (networks, classes), by loops."""
    result = np.zeros((len(answers), CLASSES))
    for row, own in enumerate(answers):
        for label in range(CLASSES):
            hits = [a == label for a, b in zip(own, labels) if b == label]
            result[row, label] = sum(hits) / len(hits)
    return result


def welch(a, b):
    """Return the p-value of Welch's t-test of two samples."""
    parts = [np.var(x, ddof=1) / len(x) for x in (a, b)]
    t = (np.mean(a) - np.mean(b)) / np.sqrt(sum(parts))
    freedom = sum(parts) ** 2 / sum(
        part**2 / (len(x) - 1) for part, x in zip(parts, (a, b))
    )
    return 2 * scipy.stats.t.sf(abs(t), freedom)


def benjamini_hochberg(p):
    """Return p-values corrected for false discoveries."""
    corrected = np.empty(len(p))
    for place, value in enumerate(p):
        corrected[place] = min(
            1,
            *(q * len(p) / np.sum(np.array(p) <= q) for q in p if q >= value),
        )
    return corrected


@pytest.fixture
def few(data):
    """Return a small part of the stand-in."""
    rows = {name: getattr(data, name)[:240] for name in ("x_train", "y_train")}
    return dataclasses.replace(data, **rows)


# populations


def test_a_population_differs_in_its_seeds(nb, few, capsys):
    one, two = nb.train_several(few, (6, 4), 1, (0, 1))
    again = nb.train_several(few, (6, 4), 1, (0, 1))
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 2 and not err, "one line for each"
    for network, other in zip((one, two), again, strict=True):
        assert [v.shape[-1] for v in network.weights] == [6, 4, 10]
        pairs = zip(network.get_weights(), other.get_weights())
        assert all(np.array_equal(a, b) for a, b in pairs)
    first, second = (n.get_weights()[0] for n in (one, two))
    assert not np.array_equal(first, second)


def test_answers_are_predicted_labels(nb, data):
    population = [nb.build_mlp((12, 8), seed) for seed in (0, 1)]
    answers = nb.answers_of(population, data)
    assert answers.shape == (2, len(data.x_test))
    for network, own in zip(population, answers):
        logits = network.predict(data.x_test, verbose=0)
        assert (own == logits.argmax(axis=1)).all()


def test_pruned_answers_are_those_of_pruned_copies(nb, data):
    population = [nb.build_mlp((12, 8), seed) for seed in (0, 1)]
    before = [network.get_weights() for network in population]
    half, whole, none = (
        nb.answers_of(population, data, sparsity) for sparsity in (0.5, 0, 1)
    )
    assert (whole == nb.answers_of(population, data)).all()
    assert none.shape == whole.shape and not none.any()
    for network, weights, own in zip(population, before, half):
        values = data.x_test.reshape(-1, 784) / 255
        for kernel in weights[:2]:
            kept = np.abs(kernel) > np.median(np.abs(kernel))
            values = np.maximum(values @ (kernel * kept), 0)
        assert (own == (values @ weights[2]).argmax(axis=1)).all()
        pairs = zip(network.get_weights(), weights)
        assert all(np.array_equal(a, b) for a, b in pairs)


# classes


def test_recalls_are_those_of_a_loop(nb):
    for labels in (LABELS, UNEVEN):
        answers = guesses(5, 0.6, seed=0, labels=labels)
        expected = slow_recalls(answers, labels)
        assert nb.recalls(answers, labels) == pytest.approx(expected)


@pytest.mark.parametrize("labels", [LABELS, UNEVEN])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_damage_is_that_of_a_slow_reference(nb, seed, labels):
    before = guesses(6, 0.9, seed, labels)
    after = guesses(7, 0.7, seed + 10, labels)
    after[:, labels == 1] = guesses(7, 0.3, seed + 20, labels)[:, labels == 1]
    own = [slow_recalls(answers, labels) for answers in (before, after)]
    lost = 100 * (own[0].mean(axis=0) - own[1].mean(axis=0))
    one, two = (
        recalls - np.mean(answers == labels)
        for recalls, answers in zip(own, (before, after))
    )
    change = [100 * (b.mean() - a.mean()) for a, b in zip(one.T, two.T)]
    p = benjamini_hochberg([welch(a, b) for a, b in zip(one.T, two.T)])
    damage = nb.class_damage(before, after, labels)
    assert [*damage] == ["lost", "change", "p"]
    for name, expected in zip(damage, (lost, change, p)):
        assert damage[name].to_numpy() == pytest.approx(expected)


def test_the_same_population_is_not_damaged(nb):
    answers = guesses(6, 0.8, seed=0)
    damage = nb.class_damage(answers, answers, LABELS)
    assert not damage[["lost", "change"]].any(axis=None)
    assert (damage.p == 1).all()


@pytest.mark.filterwarnings("ignore:Precision loss:RuntimeWarning")
def test_perfect_populations_are_not_damaged(nb):
    perfect = np.tile(LABELS, (4, 1))
    damage = nb.class_damage(perfect, perfect, LABELS)
    assert not damage[["lost", "change"]].any(axis=None)
    assert (damage.p == 1).all()


@pytest.mark.filterwarnings("ignore:Precision loss:RuntimeWarning")
def test_a_class_that_every_network_loses_is_damaged(nb):
    before, after = np.tile(LABELS, (4, 1)), np.tile(LABELS, (4, 1))
    after[:, LABELS == 2] = 0
    damage = nb.class_damage(before, after, LABELS)
    assert damage.lost.tolist() == [0, 0, 100, 0]
    assert damage.change.tolist() == [25, 25, -75, 25]
    assert (damage.p < 0.001).all()


@pytest.mark.parametrize("hurt", range(CLASSES))
def test_a_damaged_class_is_found(nb, hurt):
    before, after = guesses(10, 0.8, seed=1), guesses(10, 0.8, seed=2)
    where = hurt == LABELS
    after[:, where] = guesses(10, 0.2, seed=3)[:, where]
    damage = nb.class_damage(before, after, LABELS)
    assert damage.change.idxmin() == hurt and damage.p[hurt] < 0.001
    assert (damage.change.drop(hurt) > 0).all(), "the others gain"
    assert damage.change.sum() == pytest.approx(0, abs=1e-9)


def test_losses_are_in_points(nb):
    before, after = guesses(5, 0.9, seed=0), guesses(5, 0.5, seed=1)
    damage = nb.class_damage(before, after, LABELS)
    overall = 100 * (np.mean(before == LABELS) - np.mean(after == LABELS))
    assert damage.lost.mean() == pytest.approx(overall), "equal classes"
    assert (damage.lost + damage.change).to_numpy() == pytest.approx(overall)


# images


def show_exemplars(nb, answers, labels=LABELS):
    """Return the names that the cell about exemplars binds, {name: value}."""
    quiet = {"check": lambda claim, holds: None}
    return run_cell(nb, "votes = ", answers=answers, labels=labels, **quiet)


@given(st.integers(1, 8).flatmap(tables))
def test_modal_labels_are_those_of_a_count(nb, answers):
    labels = np.zeros(answers.shape[1], int)
    names = show_exemplars(nb, {0: answers, 0.5: answers}, labels)
    assert names["modal"][0].tolist() == slow_modal(answers)


def test_of_a_tie_the_lowest_label_is_modal(nb):
    answers = np.array([[3, 2, 1], [1, 2, 0], [3, 0, 2], [1, 0, 3]])
    names = show_exemplars(nb, {0: answers, 0.5: answers}, np.zeros(3, int))
    assert names["modal"][0.5].tolist() == [1, 0, 0]


def test_exemplars_are_those_of_a_slow_reference(nb):
    answers = {s: guesses(5, 0.9 - s, seed=9) for s in (0, 0.8, 0.5)}
    found = show_exemplars(nb, answers)["pies"]
    assert found.index.tolist() == [0.8, 0.5]
    dense = slow_modal(answers[0])
    for sparsity, row in zip((0.8, 0.5), found.to_numpy()):
        pruned = slow_modal(answers[sparsity])
        hits = {True: [], False: []}
        for image, label in enumerate(LABELS):
            moved = dense[image] != pruned[image]
            hits[moved] += [own[image] == label for own in answers[0]]
        counts = (
            len(hits[True]) / 5,
            *(100 * np.mean(h) for h in hits.values()),
        )
        assert row == pytest.approx(counts)


@pytest.mark.filterwarnings("error")
def test_where_there_is_no_image_there_is_no_accuracy(nb):
    answers = np.tile(LABELS, (5, 1))
    answers[0, :20] = (LABELS[:20] + 1) % CLASSES
    others = {0.5: answers, 0.9: (answers + 2) % CLASSES}
    found = show_exemplars(nb, {0: answers, **others})["pies"].to_numpy()
    right = 100 * (answers == LABELS).mean()
    expected = [[0, np.nan, right], [len(LABELS), right, np.nan]]
    assert found == pytest.approx(np.array(expected), nan_ok=True)


def show_disputed(nb, before, after, labels=LABELS):
    """Run the cells about exemplars, return the disputed images."""
    images = np.arange(labels.size * 4, dtype="uint8").reshape(-1, 2, 2)
    names = show_exemplars(nb, {0: before, 0.9: after}, labels)
    classes = types.SimpleNamespace(class_names=[*"abcd"], x_test=images)
    given = {"fashion": classes, "show_images": lambda *_, rows: None}
    return run_cell(nb, "disputed = ", **{**names, **given})["disputed"]


@given(st.tuples(tables(30), tables(30)))
def test_the_most_disputed_are_those_of_a_slow_reference(nb, both):
    networks = min(map(len, both))
    both = [own[:networks] for own in both]
    expected = slow_disputed(*both)[:12]
    found = show_disputed(nb, *both, labels=np.zeros(30, int))
    assert found.tolist() == expected


def test_the_most_disputed_images_come_first(nb):
    before, after = np.tile(LABELS, (4, 1)), np.tile(LABELS, (4, 1))
    for image, networks in zip((7, 3, 11), (4, 3, 3)):
        after[:networks, image] = (LABELS[image] + 1) % CLASSES
    before[0, 11] = (LABELS[11] + 2) % CLASSES
    kept = before.copy(), after.copy()
    found = show_disputed(nb, before, after)
    assert found.tolist() == [7, 3, 11, 0, 1, 2, 4, 5, 6, 8, 9, 10]
    assert (before == kept[0]).all() and (after == kept[1]).all()


# the long tail


@pytest.mark.parametrize("share", [0, 0.05, 0.5, 1])
def test_one_class_is_thinned(nb, data, share):
    before = data.x_train.copy(), data.y_train.copy()
    found = nb.thinned(data, 8, share)
    rare = data.y_train == 8
    assert np.sum(found.y_train == 8) == round(share * rare.sum())
    assert np.array_equal(
        found.y_train[found.y_train != 8], data.y_train[~rare]
    )
    left = iter(zip(data.x_train, data.y_train))
    for image, label in zip(found.x_train, found.y_train):
        assert any((i == image).all() and n == label for i, n in left)
    assert found.x_test is data.x_test and found.y_test is data.y_test
    assert np.array_equal(data.x_train, before[0])
    assert np.array_equal(data.y_train, before[1])


def test_a_rare_class_is_still_validated(nb, data):
    rows, rare = nb.holdout(data), nb.holdout(nb.thinned(data, 8, 0.5))
    expected = np.sum(rows.y_test == 8) / 2
    assert expected / 2 <= np.sum(rare.y_test == 8) <= 2 * expected


@pytest.mark.parametrize("rare", range(CLASSES))
def test_a_rare_class_is_compared_with_itself_if_common(nb, data, rare):
    before, after = guesses(6, 0.9, seed=0), guesses(6, 0.6, seed=1)
    at_90 = nb.class_damage(before, before, LABELS).set_axis([*"abcd"])
    names = run_cell(
        nb,
        "tail = ",
        fashion=data,
        train_several=lambda rows, **settings: (rows, settings),
        answers_of=lambda rare, rows, s: {0: before, 0.9: after}[s],
        check=lambda claim, holds: None,
        at_90=at_90,
        labels=LABELS,
        RARE=rare,
    )
    found, settings = names["rare_population"]
    assert settings == nb.POPULATION
    expected = nb.thinned(data, rare, 0.05)
    assert np.array_equal(found.x_train, expected.x_train)
    assert np.array_equal(found.y_train, expected.y_train)
    assert found.x_test is data.x_test and found.y_test is data.y_test
    damage = nb.class_damage(before, after, LABELS)
    expected = {"common": at_90.iloc[rare], "rare": damage.iloc[rare]}
    for kind, row in expected.items():
        assert (names["tail"].loc[kind] == row).all()


# pictures


def test_damage_is_drawn_with_stars(nb, figures):
    before, after = guesses(8, 0.8, seed=1), guesses(8, 0.8, seed=2)
    after[:, LABELS == 0] = guesses(8, 0.1, seed=3)[:, LABELS == 0]
    drawn = run_cell(
        nb,
        "drawn = heat_map(",
        answers={0: before, 0.5: before, 0.9: after},
        labels=LABELS,
        fashion=types.SimpleNamespace(class_names=("a", "b", "c", "d")),
        FORGETTING=(0.5, 0.9),
    )
    ax, bar = plt.gcf().axes
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("sparsity (%)", "class")
    assert bar.get_ylabel() == "change of relative recall (points)"
    ticks = ax.get_xticklabels(), ax.get_yticklabels()
    assert [t.get_text() for t in ticks[0]] == ["50", "90"]
    assert [t.get_text() for t in ticks[1]] == ["a", "b", "c", "d"]
    assert len(ax.texts) == 8
    damage = [nb.class_damage(before, x, LABELS) for x in (before, after)]
    for text in ax.texts:
        column, row = text.get_position()
        own = damage[column].loc[row]
        assert text.get_text().endswith("*") == (own.p <= 0.05)
        assert int(text.get_text().strip("*")) == round(own.change)
        dark = abs(own.change) > 18
        assert text.get_color() == ("white" if dark else "black")
    assert (drawn["damage"].to_numpy() == np.hstack(damage)).all()


def test_captions_are_the_three_labels_of_the_disputed(nb, figures):
    before, after = np.tile(LABELS, (3, 1)), np.tile(LABELS, (3, 1))
    after[:, :12] = (LABELS[:12] + 1) % CLASSES
    names = "a", "b", "c", "d"
    images = np.zeros((200, 28, 28), "uint8")
    answers, true_labels = {0: before, 0.9: after}, (LABELS + 2) % CLASSES
    voted = show_exemplars(nb, answers, true_labels)
    voted["fashion"] = types.SimpleNamespace(class_names=names, x_test=images)
    run_cell(nb, "disputed = ", **voted)
    for image, ax in enumerate(plt.gcf().axes):
        true, dense, pruned = (
            names[(image + shift) % CLASSES] for shift in (2, 0, 1)
        )
        expected = f"true {true}\ndense {dense}\npruned {pruned}"
        assert ax.get_title() == expected
