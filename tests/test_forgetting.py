"""What pruned populations forget: classes, single images, rare classes."""

import collections
import dataclasses
import warnings

import matplotlib.pyplot as plt
import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

CLASSES = 4
LABELS = np.arange(200) % CLASSES
TABLES = arrays(
    int,
    st.tuples(st.integers(1, 6), st.integers(1, 8)),
    elements=st.integers(0, 3),
)


def guesses(networks, accuracy, seed, labels=LABELS):
    """Return answers that are right with a probability, else any label."""
    random = np.random.default_rng(seed)
    shape = networks, len(labels)
    wrong = random.integers(0, CLASSES, shape)
    return np.where(random.random(shape) < accuracy, labels, wrong)


def slow_modal(answers):
    """Return the commonest answer per image, the lowest of a tie."""
    counts = [collections.Counter(column) for column in answers.T.tolist()]
    return [min(c, key=lambda label: (-c[label], label)) for c in counts]


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


@pytest.fixture
def populations(nb, few, monkeypatch):
    """Return a population of two, and the same once more."""
    monkeypatch.setattr(nb, "POPULATION", (0, 1))
    monkeypatch.setattr(nb, "POPULATION_EPOCHS", 1)
    monkeypatch.setattr(nb, "LENET_UNITS", (6, 4))
    return nb.populate(few), nb.populate(few)


# populations


def test_a_population_differs_in_its_seeds(nb, populations, few, capsys):
    assert capsys.readouterr() == ("", "")
    (one, two), again = populations
    for network, other in zip((one, two), again, strict=True):
        assert [v.shape[-1] for v in network.weights] == [6, 4, 10]
        pairs = zip(network.get_weights(), other.get_weights())
        assert all(np.array_equal(a, b) for a, b in pairs)
    first, second = (n.get_weights()[0] for n in (one, two))
    assert not np.array_equal(first, second)
    answers = nb.answers_of([one, two], few)
    assert answers.shape == (2, len(few.x_test))
    for network, own in zip((one, two), answers):
        logits = network.predict(few.x_test, verbose=0)
        assert (own == logits.argmax(axis=1)).all()


# classes


def test_recalls_are_those_of_a_loop(nb):
    answers, labels = guesses(5, 0.6, seed=0), LABELS
    expected = slow_recalls(answers, labels)
    assert nb.recalls(answers, labels) == pytest.approx(expected)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_damage_is_that_of_a_slow_reference(nb, seed):
    before, after = guesses(6, 0.9, seed), guesses(7, 0.7, seed + 10)
    after[:, LABELS == 1] = guesses(7, 0.3, seed + 20)[:, LABELS == 1]
    one, two = (
        slow_recalls(answers, LABELS) - np.mean(answers == LABELS)
        for answers in (before, after)
    )
    damage = nb.class_damage(before, after, LABELS)
    change = [100 * (b.mean() - a.mean()) for a, b in zip(one.T, two.T)]
    p = benjamini_hochberg([welch(a, b) for a, b in zip(one.T, two.T)])
    assert damage.change.to_numpy() == pytest.approx(change)
    assert damage.p.to_numpy() == pytest.approx(p)


def test_the_same_population_is_not_damaged(nb):
    answers = guesses(6, 0.8, seed=0)
    damage = nb.class_damage(answers, answers, LABELS)
    assert (damage.change == 0).all() and (damage.p == 1).all()


@pytest.mark.filterwarnings("ignore:Precision loss:RuntimeWarning")
def test_perfect_populations_are_not_damaged(nb):
    perfect = np.tile(LABELS, (4, 1))
    damage = nb.class_damage(perfect, perfect, LABELS)
    assert (damage.change == 0).all() and (damage.p == 1).all()


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
    lost, overall = nb.loss_per_class(before, after, LABELS)
    means = [slow_recalls(a, LABELS).mean(axis=0) for a in (before, after)]
    assert lost == pytest.approx(100 * (means[0] - means[1]))
    assert overall == pytest.approx(lost.mean()), "classes of equal size"


# images


@given(TABLES)
def test_modal_labels_are_those_of_a_count(nb, answers):
    assert nb.modal_labels(answers).tolist() == slow_modal(answers)


def test_of_a_tie_the_lowest_label_is_modal(nb):
    answers = np.array([[3, 2, 1], [1, 2, 0], [3, 0, 2], [1, 0, 3]])
    assert nb.modal_labels(answers).tolist() == [1, 0, 0]


def test_exemplars_are_those_of_a_slow_reference(nb):
    answers = {s: guesses(5, 0.9 - s, seed=9) for s in (0.0, 0.5, 0.8)}
    found = nb.exemplars(answers, LABELS)
    assert found.index.tolist() == ["50 %", "80 %"]
    dense = slow_modal(answers[0.0])
    for sparsity, row in zip((0.5, 0.8), found.to_numpy()):
        pruned = slow_modal(answers[sparsity])
        hits = {True: [], False: []}
        for image, label in enumerate(LABELS):
            moved = dense[image] != pruned[image]
            hits[moved] += [own[image] == label for own in answers[0.0]]
        counts = (
            len(hits[True]) / 5,
            *(100 * np.mean(h) for h in hits.values()),
        )
        assert row == pytest.approx(counts)


def test_nothing_moved_is_no_exemplar(nb):
    answers = guesses(5, 0.8, seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        found = nb.exemplars({0.0: answers, 0.5: answers}, LABELS)
    count, moved, rest = found.loc["50 %"]
    assert count == 0 and np.isnan(moved)
    assert rest == pytest.approx(100 * (answers == LABELS).mean())


# the long tail


@pytest.mark.parametrize("share", [0, 0.05, 0.5, 1])
def test_one_class_is_thinned(nb, data, share):
    before = data.x_train.copy(), data.y_train.copy()
    found = nb.thinned(data, 8, share)
    quota = round(share * np.sum(data.y_train == 8))
    kept = []
    for row, label in enumerate(data.y_train):
        if label != 8 or quota > 0:
            kept.append(row)
        quota -= label == 8
    assert np.array_equal(found.x_train, data.x_train[kept])
    assert np.array_equal(found.y_train, data.y_train[kept])
    assert found.x_test is data.x_test and found.y_test is data.y_test
    assert np.array_equal(data.x_train, before[0])
    assert np.array_equal(data.y_train, before[1])


def test_the_extra_loss_is_that_of_a_reference(nb):
    before, after = guesses(6, 0.9, seed=0), guesses(6, 0.6, seed=1)
    found = nb.extra_loss(before, after, LABELS, 2)
    lost = slow_recalls(before, LABELS) - slow_recalls(after, LABELS)
    extra = 100 * (lost[:, 2] - lost[:, [0, 1, 3]].mean(axis=1))
    reach = 2.570582 * np.std(extra, ddof=1) / np.sqrt(6)
    assert found == pytest.approx(
        {
            "accuracy lost (points)": 100 * lost.mean(),
            "extra loss (points)": extra.mean(),
            "from": extra.mean() - reach,
            "to": extra.mean() + reach,
        }
    )


# pictures


def test_damage_is_drawn_with_stars(nb, figures):
    before, after = guesses(8, 0.8, seed=1), guesses(8, 0.8, seed=2)
    after[:, LABELS == 0] = guesses(8, 0.1, seed=3)[:, LABELS == 0]
    damage = {
        0.5: nb.class_damage(before, before, LABELS),
        0.9: nb.class_damage(before, after, LABELS),
    }
    nb.show_damage(damage, ("a", "b", "c", "d"))
    ax, bar = plt.gcf().axes
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("sparsity (%)", "class")
    assert bar.get_ylabel() == "change of relative recall (points)"
    ticks = ax.get_xticklabels(), ax.get_yticklabels()
    assert [t.get_text() for t in ticks[0]] == ["50", "90"]
    assert [t.get_text() for t in ticks[1]] == ["a", "b", "c", "d"]
    assert len(ax.texts) == 8
    for text in ax.texts:
        column, row = text.get_position()
        change, p = [*damage.values()][column].loc[row]
        assert text.get_text().endswith("*") == (p <= 0.05)
        assert int(text.get_text().strip("*")) == round(change)


def test_the_most_disputed_images_are_drawn(nb, data, figures):
    truth, count = data.y_test, len(data.y_test)
    before, after = np.tile(truth, (4, 1)), np.tile(truth, (4, 1))
    disputed = [7, 3, 11]
    for image, networks in zip(disputed, (4, 3, 3)):
        after[:networks, image] = (truth[image] + 1) % 10
    before[0, 11] = (truth[11] + 2) % 10
    nb.show_exemplars(data, before, after, count=4)
    axes = plt.gcf().axes
    assert len(axes) == 4 and count > 12
    for ax, image in zip(axes, disputed):
        picture = ax.images[0].get_array()
        assert np.array_equal(picture, data.x_test[image])
        label, other = truth[image], (truth[image] + 1) % 10
        title = f"true {label}\ndense {label}\npruned {other}"
        assert ax.get_title() == title


def test_pictures_need_no_exemplar(nb, data, figures):
    answers = np.tile(data.y_test, (2, 1))
    nb.show_exemplars(data, answers, answers)
    assert len(plt.gcf().axes) == 12
