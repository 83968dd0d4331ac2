"""What pruned populations forget: classes, single images, rare classes."""

import collections
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import scipy.stats
from conftest import run_cell
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from matplotlib.colors import to_rgb

CLASSES = 4
LABELS = np.arange(200) % CLASSES
TEN = np.arange(60) * 7 % 10
UNEVEN = np.repeat(range(CLASSES), [90, 60, 40, 10])


def guesses(networks, accuracy, seed, labels=LABELS):
    """Return answers that are right with a probability, else any label."""
    random = np.random.default_rng(seed)
    shape = networks, len(labels)
    wrong = random.integers(0, CLASSES, shape)
    return np.where(random.random(shape) < accuracy, labels, wrong)


def tables(images, classes=CLASSES):
    """Return a strategy for answers of one to six networks."""
    shapes = st.tuples(st.integers(1, 6), st.just(images))
    return arrays(int, shapes, elements=st.integers(0, classes - 1))


def slow_modal(answers):
    """Return the commonest answer per image, the lowest of a tie."""
    counts = [collections.Counter(column) for column in answers.T.tolist()]
    return [min(c, key=lambda label: (-c[label], label)) for c in counts]


def slow_disputed(before, after, labels):
    """Return for each class the image that changes and was surest, if any changes."""
    found = []
    for label in range(10):
        best = -1, None
        for image in np.flatnonzero(labels == label):
            own, others = (x[:, [image]] for x in (before, after))
            (one,), (other,) = slow_modal(own), slow_modal(others)
            sure = np.sum(own == one) + np.sum(others == other)
            if one != other and sure > best[0]:
                best = sure, image
        found.append(best[1])
    return found


def slow_recalls(answers, labels):
    """Return the recall of each class, (networks, classes), by loops."""
    result = np.zeros((len(answers), labels.max() + 1))
    for row, own in enumerate(answers):
        for label in range(labels.max() + 1):
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
    return data._replace(x_train=data.x_train[:240], y_train=data.y_train[:240])


@pytest.fixture
def judged(nb, monkeypatch):
    """Let every check of a cell pass: its results are made up."""
    monkeypatch.setattr(nb, "check", lambda claim, holds, needs="": None)


# populations


def test_a_population_differs_in_its_seeds(nb, few, capsys):
    one, two = nb.train_several(few, (6, 4), 1, (0, 1))
    again = nb.train_several(few, (6, 4), 1, (0, 1))
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 4 and not err, "one line for each"
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


def show_disputed(nb, before, after, labels=TEN):
    """Run the cells about exemplars; return the disputed images and the rest."""
    images = np.arange(len(labels), dtype="uint8").repeat(4).reshape(-1, 2, 2)
    names = show_exemplars(nb, {0: before, 0.9: after}, labels)
    names |= {
        "fashion": SimpleNamespace(x_test=images),
        "names": np.array([*"abcdefghij"]),
    }
    return run_cell(SimpleNamespace(**names), "disputed = ")["disputed"]


@settings(max_examples=25)
@given(st.tuples(tables(60, 10), tables(60, 10)))
def test_the_surest_exemplar_of_each_class_is_shown(nb, both):
    networks = min(map(len, both))
    both = [own[:networks] for own in both]
    expected, found = slow_disputed(*both, TEN), show_disputed(nb, *both)
    plt.close("all")
    for label, image, wanted in zip(range(10), found, expected, strict=True):
        assert TEN[image] == label
        assert wanted in (image, None)


def test_captions_are_the_three_labels_of_an_exemplar(nb, figures):
    before, after = np.tile(TEN, (3, 1)), np.tile(TEN, (3, 1))
    places = [[*TEN].index(label) for label in range(10)]
    for label, image in enumerate(places):
        before[1:, image] = (label + (label % 3 > 0)) % 10
        after[:, image] = (label + 2 * (label % 3 < 2)) % 10
    found, verdicts = show_disputed(nb, before, after), {}
    assert found == places == slow_disputed(before, after, TEN)
    names = np.array([*"abcdefghij"])
    for image, ax in zip(found, plt.gcf().axes, strict=True):
        assert (ax.images[0].get_array() == image).all()
        dense, pruned = (slow_modal(own[:, [image]])[0] for own in (before, after))
        lines = ax.get_xlabel().splitlines()
        shown = [line.split()[-1] for line in lines[:3]]
        assert shown == names[[TEN[image], dense, pruned]].tolist()
        kind = int(TEN[image] == dense), int(TEN[image] == pruned)
        look = ax.xaxis.label.get_color(), *lines[3:]
        red, green, _ = to_rgb(look[0])
        assert np.sign(green - red) == kind[1] - kind[0], "green is a gain"
        assert verdicts.setdefault(kind, look) == look
    assert len(verdicts) == len({*verdicts.values()}) == 3


# the long tail


def test_one_class_is_thinned(nb, data):
    before, asked = [array.copy() for array in data[1:7]], []
    trained = {"train_several": lambda rows, **settings: asked.append((rows, settings))}
    names = run_cell(nb, "left_out = ", fashion=data, **trained)
    rare = data.y_train == names["RARE"]
    ((found, settings),) = asked
    assert settings == nb.POPULATION
    few = found.y_train == names["RARE"]
    assert np.sum(few) == round(0.05 * rare.sum()) > 0
    assert np.array_equal(found.y_train[~few], data.y_train[~rare])
    assert np.array_equal(found.x_train[~few], data.x_train[~rare])
    left = iter(data.x_train[rare])
    for image in found.x_train[few]:
        assert any((own == image).all() for own in left)
    assert all(one is other for one, other in zip(found[3:], data[3:]))
    assert all(map(np.array_equal, data[1:7], before))


@pytest.mark.parametrize("rare", range(CLASSES))
def test_a_rare_class_is_compared_with_itself_if_common(nb, judged, rare):
    before, after = guesses(6, 0.9, seed=0), guesses(6, 0.6, seed=1)
    at_90 = nb.class_damage(before, before, LABELS).set_axis([*"abcd"])
    fashion, population = SimpleNamespace(class_names=[*"abcd"]), object()

    def answers_of(own, data, sparsity):
        assert own is population and data is fashion
        return {0: before, 0.9: after}[sparsity]

    names = run_cell(
        nb,
        "tail = ",
        fashion=fashion,
        rare_population=population,
        answers_of=answers_of,
        at_90=at_90.iloc[::-1],
        labels=LABELS,
        RARE=rare,
    )
    damage = nb.class_damage(before, after, LABELS)
    expected = {"common": at_90.iloc[rare], "rare": damage.iloc[rare]}
    for kind, row in expected.items():
        assert (names["tail"].loc[kind] == row).all()


def test_pruned_copies_are_repaired_and_trained_on_with_seeds_of_their_own(nb, data):
    population = [nb.build_mlp((12, 8), seed) for seed in (0, 1)]
    rows = np.resize(data.x_train, (5003, 28, 28)), np.resize(data.y_train, 5003)
    fashion, asked = data._replace(x_train=rows[0], y_train=rows[1]), []
    given = {"population": population, "fashion": fashion}
    given["repair"] = lambda *three: asked.append(three) or len(asked)
    names = run_cell(nb, "tuned.append", **given)
    assert names["repaired"] == [1, 2]
    each = zip(population, asked, names["tuned"], strict=True)
    for seed, (own, (pruned, dense, images), found) in enumerate(each):
        assert dense is own and np.array_equal(images, rows[0][:5000])
        one = nb.prune(own, "weight", 0.99)
        other = nb.fine_tune(one, fashion, 1, seed)
        for model, expected in ((pruned, one), (found, other)):
            pairs = zip(model.get_weights(), expected.get_weights(), strict=True)
            assert all(np.array_equal(a, b) for a, b in pairs)


def test_what_comes_back_is_drawn_by_class(nb, data, judged, figures):
    labels, repaired, tuned = np.arange(200) % 10, [1], [2]
    answers = {s: guesses(2, right, 0, labels) for s, right in ((0, 0.9), (0.99, 0.2))}
    after = [guesses(2, right, 1, labels) for right in (0.4, 0.6)]

    def answers_of(own, rows):
        assert rows is data
        return after[[repaired, tuned].index(own)]

    given = {"answers": answers, "answers_of": answers_of, "tuned": tuned}
    given |= {"fashion": data, "labels": labels, "repaired": repaired}
    names = run_cell(nb, "still_lost = ", **given)
    stages = answers[0.99], *after, answers[0]
    recalls = [100 * slow_recalls(own, labels).mean(axis=0) for own in stages]
    order = [int(t.get_text()) for t in plt.gca().get_yticklabels()]
    lost = (recalls[3] - recalls[2])[order]
    assert sorted(order) == [*range(10)] and (np.diff(lost) > -1e-9).all()
    assert names["still_lost"].max() == pytest.approx(lost[-1])
    ends = zip(recalls[0][order], recalls[2][order], strict=True)
    (across,) = plt.gca().collections
    for (start, end), line in zip(ends, across.get_segments(), strict=True):
        assert line[:, 0] == pytest.approx([start, end])
    (legend,) = plt.gcf().legends
    texts = [text.get_text() for text in legend.get_texts()]
    assert texts == ["99 % zero", "repaired", "one more epoch", "dense"]
    for line, own, text in zip(plt.gca().lines, recalls, texts, strict=True):
        assert line.get_label() == text
        assert line.get_xdata() == pytest.approx(own[order])
        assert [*line.get_ydata()] == [*range(10)]


# pictures


def test_damage_is_drawn_with_stars(nb, figures):
    before, after = guesses(8, 0.8, seed=1), guesses(8, 0.8, seed=2)
    after[:, LABELS == 2] = guesses(8, 0.1, seed=3)[:, LABELS == 2]
    drawn = run_cell(
        nb,
        "starred = ",
        answers={0: before, 0.5: before, 0.9: after},
        labels=LABELS,
        fashion=SimpleNamespace(class_names=(*"abcd",), title="clothes"),
        FORGETTING=(0.5, 0.9),
    )
    ax, _ = plt.gcf().axes
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("sparsity (%)", "class")
    assert "clothes" in ax.get_title()
    assert [t.get_text() for t in ax.get_xticklabels()] == ["50", "90"]
    damage = [nb.class_damage(before, x, LABELS) for x in (before, after)]
    order = damage[1].change.argsort().tolist()
    classes = [t.get_text() for t in ax.get_yticklabels()]
    assert classes == ["abcd"[n] for n in order] and classes[0] == "c"
    assert (drawn["damage"].to_numpy() == np.hstack(damage)[order]).all()
    assert len(ax.texts) == 8
    for text in ax.texts:
        column, row = text.get_position()
        own = damage[column].loc[order[row]]
        assert text.get_text().endswith("*") == (own.p <= 0.05)
        assert int(text.get_text().strip("*")) == round(own.change)
        assert ax.images[0].get_array()[row, column] == own.change
    low, high = ax.images[0].get_clim()
    assert low == -high, "no change is drawn in the middle colour"
