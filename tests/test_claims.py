"""Every claim of the notebook has teeth: there are results it fails on.

The results are made up, much like those of the real data, or come from a
small experiment. What leads from them to a claim is the notebook's own code.
"""

import ast
import itertools

import numpy as np
import pandas as pd
import pytest
from test_notebook_style import CLAIMS, CODE, bound_names, tree_of

TITLES = "MNIST", "Fashion-MNIST"
RULES, HIGH = ("weight", "unit"), (0.8, 0.9, 0.95, 0.97, 0.99)
STATEMENTS = [  # also those under an `if`
    inner
    for cell in CODE
    for statement in tree_of(cell).body
    for inner in (statement.body if isinstance(statement, ast.If) else [statement])
]
LABELS = np.tile(np.arange(10), 200)
HARD = np.arange(2000) % 7 == 0
SURE = np.where(HARD, 0.55, 0.97)

# Each claim, and statements that spoil the results it is about.

SABOTAGES = """
The dense networks reach 98.2 % on MNIST and 88.8 % on Fashion-MNIST.
    scores[0]["accuracy"] = 0.981
    scores[1]["accuracy"] = 0.887
On MNIST, zeroing 80 % of the weights without retraining costs less than 1 point.
    put(sweeps["MNIST"], "accuracy", 0.975, rule="weight", sparsity=0.8)
On MNIST, deleting half of the units without retraining costs less than 1 point.
    put(sweeps["MNIST"], "accuracy", 0.97, rule="unit", sparsity=0.5)
On Fashion-MNIST, zeroing 80 % of the weights or deleting half of the units
without retraining costs less than 3 points.
    put(sweeps["Fashion-MNIST"], "accuracy", 0.85, rule="weight", sparsity=0.8)
    put(sweeps["Fashion-MNIST"], "accuracy", 0.85, rule="unit", sparsity=0.5)
On both data sets, deleting 90 % of the units costs at least 10 points more than
zeroing 90 % of the weights, without retraining.
    put(sweeps["MNIST"], "accuracy", 0.9, sparsity=0.9)
    put(sweeps["Fashion-MNIST"], "accuracy", 0.8, sparsity=0.9)
On both data sets, both rules cost at least 20 points at 99 % without retraining.
    put(sweeps["MNIST"], "accuracy", 0.8, rule="weight", sparsity=0.99)
    put(sweeps["MNIST"], "accuracy", 0.8, rule="unit", sparsity=0.99)
    put(sweeps["Fashion-MNIST"], "accuracy", 0.8, rule="weight", sparsity=0.99)
    put(sweeps["Fashion-MNIST"], "accuracy", 0.8, rule="unit", sparsity=0.99)
On both data sets, the smaller half of the weights holds less than 15 % of the
squared norm.
    removed["MNIST", "weight"] = 16
    removed["Fashion-MNIST", "weight"] = 16
On both data sets, the smaller half of the units holds at least 3 times the squared
norm of the smaller half of the weights.
    removed["MNIST", "unit"] = 29
    removed["Fashion-MNIST", "unit"] = 29
Without half of its units the network has 793,000 of 2,386,000 parameters, and
without 90 % it has 94,600.
    put(sweeps["MNIST"], "parameters", 2_386_001, rule="unit", sparsity=0)
    put(sweeps["MNIST"], "parameters", 793_001, rule="unit", sparsity=0.5)
    put(sweeps["MNIST"], "parameters", 94_599, rule="unit", sparsity=0.9)
On both data sets, without retraining, zeroing 90 % of the weights costs at least 3
points less than deleting 80 % of the units, which leaves about as many parameters.
    put(sweeps["MNIST"], "accuracy", 0.97, rule="unit", sparsity=0.8)
    put(sweeps["Fashion-MNIST"], "accuracy", 0.7, rule="weight", sparsity=0.9)
In an MNIST network without 97 % of its weights, the two outer rings of pixels keep
less than 2 % of the first layer's weights.
    kept_97["MNIST"][:2] = 10
    kept_97["MNIST"][:, -1] = 13
On both data sets, training moves half of the weights of each hidden layer by less
than 40 % of a typical initial weight.
    moved.loc[("MNIST", "median of all"), 1] = 0.41
    moved.loc[("Fashion-MNIST", "median of all"), 3] = 0.41
On MNIST, networks without 95 % of their weights or 80 % of their units lose less than 1
point of accuracy once they are repaired, without labels or training.
    repairs["MNIST", "weight", 0.95] = 97.5
    repairs["MNIST", "unit", 0.8] = 97.5
On MNIST, repair without labels or training brings networks without 99 % of their
weights to 94.5 %, and networks without 90 % of their units to 95.5 %.
    repairs["MNIST", "weight", 0.99] = 94.4
    repairs["MNIST", "unit", 0.9] = 95.4
On Fashion-MNIST, networks without 95 % of their weights or 80 % of their units lose
less than 2 points once they are repaired, without labels or training.
    repairs["Fashion-MNIST", "weight", 0.95] = 86.9
    repairs["Fashion-MNIST", "unit", 0.8] = 86.9
From 80 to 97 %, by both rules and on both data sets, repaired networks are more
accurate than one-shot networks and than the best public solutions.
    repairs["MNIST", "weight", 0.8] = 98.2
    repairs["MNIST", "unit", 0.97] = 12.9
    repairs["Fashion-MNIST", "weight", 0.97] = 66
    repairs["Fashion-MNIST", "unit", 0.97] = 14.9
On MNIST, 250 images without labels are enough to bring a network without 95 % of its
weights to 97 % on the validation rows.
    few.loc["95 % of the weights", 250] = 96.9
One step of Adam brings back a third of the zeros or more in a small new network.
    leaking = prune(leaking, "weight", 0.61)
While a small network is pruned in training, no zero comes back.
    is_zero[1] = is_zero[1, ::-1]
    is_zero[2] = True
    is_zero[:] = is_zero[0]
On MNIST, a network that loses nine of ten hidden units and is trained for three
more epochs loses less than 1 point of accuracy.
    put_way(rows, 97.5, "MNIST", "unit", 0.9, "fine-tuned")
    put_way(rows, 97.5, "MNIST", "unit", 0.9, "in training")
On MNIST, a network that loses 99 % of its weights in three more epochs of training
loses less than 1.5 points.
    put_way(rows, 97, "MNIST", "weight", 0.99, "in training")
On Fashion-MNIST, a network that loses 95 % of its weights or 90 % of its units and
is trained for three more epochs loses less than 2 points.
    put_way(rows, 86.9, "Fashion-MNIST", "weight", 0.95, "in training")
    put_way(rows, 86.9, "Fashion-MNIST", "weight", 0.95, "fine-tuned")
    put_way(rows, 86.9, "Fashion-MNIST", "unit", 0.9, "in training")
    put_way(rows, 86.9, "Fashion-MNIST", "unit", 0.9, "fine-tuned")
On MNIST, the L1 penalty costs the dense network less than half a point.
    cliffs.loc[0, "L1"] = 98.0
On MNIST, a network trained with the L1 penalty loses 95 % of its weights for less
than 1 point without retraining.
    cliffs.loc[0.95, "L1"] = 97.4
On MNIST, with 97 % of the weights zeroed without retraining, the network trained with
the L1 penalty is at least 3 points more accurate than the plain one.
    cliffs.loc[0.97, "plain"] = 95
Shrinking the challenge's network without 80 % of its units leaves less than a tenth of
its parameters, and its answers stay the same up to rounding.
    units_gone = units_zero
    units_gone = shrink(prune(units_zero, "unit", 0.9))
Zeros make a .keras file no smaller.
    files.iloc[1, 0] = 9200
    files.iloc[2, 0] = 9200
With 90 % zeros, gzip makes the file of the challenge's network at least 5 times
smaller. Without 80 % of its units it is 10 times smaller as it is.
    files.loc["90 % of the weights zero", "kB, gzip"] = 2000
    files.loc["80 % of the units gone", "kB"] = 970
On a CPU, deleting 80 % of the units makes `predict` of one image less than twice as
fast.
    whole = 2.1
On a CPU, in batches of 1,000, sparse matrices with half of their weights zero are
slower than the dense network.
    times.loc[(1000, 0.5), "zeros, CSR"] = 0.9
On MNIST, each of three networks that lost 90 % of its weights in blocks of four loses
less than 1 point once it is repaired.
    costs[1] = 1.1
On a CPU, zeroed weights run no faster in Keras. On LiteRT, 90 % zeros in blocks of four
make a network 8 times smaller and single images at least 1.5 times as fast. Without
80 % of its units, it runs large batches at least three times as fast in both.
    times["zeros, as they are"] = 0.5
    times["zeros, as they are"] = 1.5
    times.loc[1, "zeros, as they are"] = 0.7
    times.loc[(1000, 0.8), "units gone"] = 0.4
    decide.loc["90 % zeros in blocks", "kB"] = 1200
    decide.loc["90 % zeros in blocks", 1] = 0.2
    decide.loc["80 % of units gone", 256] = 4
LiteRT answers like Keras: with 90 % zeros in blocks of four no logit of the challenge's
network moves by more than 0.0001 of the largest.
    blocks = {0.9: prune(blocks[0.9], "weight", 0.95)}
On Fashion-MNIST, between two halves of the dense population the test finds at most
one class that fares differently.
    answers[0][1::2, HARD & (LABELS < 5)] = 9
On Fashion-MNIST, when 90 % of the weights are zeroed without retraining, at least
three classes fare differently from the average.
    answers[0.9] = answers[0]
    answers[0.9] = answers_given(SURE - 0.1, seed=1)
On Fashion-MNIST, when 90 % of the weights are zeroed without retraining, one class
loses at least twice as much recall as the average class.
    answers[0.9] = answers_given(SURE - 0.1, seed=1)
On Fashion-MNIST, dense networks are at least 20 points worse on the PIEs of up to 70 %
zeroed weights than on other images.
    answers[0.3][:, ::9] = 0
    answers[0.5][:, ::9] = 0
    answers[0.7] = answers[0]
On Fashion-MNIST, at 90 % zeroed weights, a class with few training images loses at
least 1 point of relative recall more than the same class with all its images.
    rare_answers = answers
On Fashion-MNIST, after 99 % of the weights are zeroed, one epoch of training brings
every class to within 15 points of its dense recall.
    stages["one more epoch"] = answers_given(SURE - 0.2 * (LABELS == 6), seed=2)
On both data sets, with 80 % of the units deleted without retraining, the L2 norm costs
at least 10 points less than random choice.
    put(criteria, "accuracy", 0.8, data="MNIST", rule="L2 norm", sparsity=0.8)
    put(criteria, "accuracy", 0.7, data="Fashion-MNIST", rule="random", sparsity=0.8)
On MNIST, with 70 % of the units deleted without retraining, APoZ costs at least 10
points more than random choice.
    put(criteria, "accuracy", 0.85, data="MNIST", rule="APoZ", sparsity=0.7)
On both data sets, if a network is repaired, greedy choice of its units is at least 3
points more accurate than the norm at 95 %, and within 1 point at 80 %.
    choices.loc[("MNIST", "unit, greedy"), ("repaired", 0.95)] = 90
    choices.loc[("Fashion-MNIST", "unit, greedy"), ("repaired", 0.95)] = 70
    choices.loc[("MNIST", "unit, greedy"), ("repaired", 0.8)] = 99.1
    choices.loc[("Fashion-MNIST", "unit, greedy"), ("repaired", 0.8)] = 87.1
On MNIST, greedy choice and repair bring networks without 90 % of their units to 96.5 %,
and networks without 95 % to 92 %, without labels.
    choices.loc[("MNIST", "unit, greedy"), ("repaired", 0.9)] = 96.4
    choices.loc[("MNIST", "unit, greedy"), ("repaired", 0.95)] = 91.9
On both data sets, with 95 % of the weights zeroed, choice by magnitude is more accurate
than by magnitude times input, before repair and after it.
    choices.loc[("MNIST", "weight times input"), ("one-shot", 0.95)] = 96.1
    choices.loc[("Fashion-MNIST", "weight times input"), ("repaired", 0.95)] = 88.5
On MNIST, at 75 % without retraining, blocks of 16 x 16 cost at least 2 points more
than any other grain.
    put(grains, "accuracy", 0.9, rule="blocks of 16 x 16")
    put(grains, "accuracy", 0.86, rule="units")
    put(grains, "accuracy", 0.86, rule="blocks of 4 x 4")
On MNIST, LeNet-300-100 pruned in training has an error below 1.8 % with 5 % of its
weights, and below 2.2 % with 2 %.
    ours[5] = [1.9, 1.8]
    ours[2] = [2.3, 2.2]
On MNIST, with 3.6 % of the weights of LeNet-300-100 and one epoch of training, the
ticket beats every control by 1 point, for each of three seeds.
    put(tickets, "accuracy", 93, kept=3.6, start="ticket", seed=1)
    put(tickets, "accuracy", 96, kept=3.6, start="small dense", seed=2)
    put(tickets, "accuracy", 96, kept=3.6, start="random mask", seed=0)
    put(tickets, "accuracy", 96, kept=3.6, start="other weights", seed=0)
On MNIST, after one epoch, the ticket with 11 % of the weights of LeNet-300-100 is
within half a point of the dense network.
    put(tickets, "accuracy", 96.5, kept=11, start="ticket")
Shrinking a small convolutional network without half of its filters and units makes it
at least 3 times smaller, and its answers stay the same up to rounding.
    cnn_small = cnn_tuned
    cnn_small = shrink(prune(cnn_tuned, "unit", 0.75))
On Fashion-MNIST, a small convolutional network that lost half of its filters and units
loses less than 4 points when it is repaired without labels, and less than 1.5 points
after one more epoch.
    cnn_costs.loc["repaired", "accuracy (%)"] = 86.7
    cnn_costs.loc["and fine-tuned", "accuracy (%)"] = 89.2
Shrinking a small residual network without half of its filters makes it at least 3 times
smaller, and its answers stay the same up to rounding.
    residual_small = residual_pruned
    residual_small = shrink(prune(residual_pruned, "unit", 0.75))
On Fashion-MNIST, pruning half of the filters of a small residual network in one more
epoch costs less than 5 points.
    in_branches.loc["shrunk", "accuracy (%)"] = 84
Shrinking ResNet50, MobileNetV2 and InceptionV3 without half of their units leaves less
than 36 % of their parameters, and their answers stay the same up to rounding.
    tables["MobileNetV2"].loc["after", "parameters"] = 36
    differences["InceptionV3"] = 2e-5
"""


def sabotages():
    """Return [(claim, statement that spoils it)]; claims may take several lines."""
    pairs, claim, spoiled = [], "", True
    for line in SABOTAGES.strip().splitlines():
        if line.startswith(" "):
            pairs.append((claim, line.strip()))
        else:
            claim = line if spoiled else f"{claim} {line}"
        spoiled = line.startswith(" ")
    return pairs


# From results to a claim.


def bound(statement):
    """Return the names that a top-level statement binds."""
    return {name for name, _ in bound_names(statement)}


def filled(statement):
    """Return the names whose items or attributes a statement sets."""
    places = [
        n for n in ast.walk(statement) if isinstance(n, ast.Subscript | ast.Attribute)
    ]
    places = [n.value for n in places if isinstance(n.ctx, ast.Store)]
    return {place.id for place in places if isinstance(place, ast.Name)}


def used(statement):
    """Return the names that a statement uses and does not bind before.

    A statement such as `a += b` uses both.
    """
    names = [n for n in ast.walk(statement) if isinstance(n, ast.Name)]
    stored = {n.id for n in names if isinstance(n.ctx, ast.Store)}
    loaded = {n.id for n in names if isinstance(n.ctx, ast.Load)}
    bound_last = set() if isinstance(statement, ast.For) else bound(statement)
    changed = bound_last if isinstance(statement, ast.AugAssign) else set()
    return changed | loaded - (stored - bound_last)


def checks(statement, claim):
    """Tell whether a statement is the check of a claim."""
    call = getattr(statement, "value", None)
    name = getattr(getattr(call, "func", None), "id", None)
    return name == "check" and call.args[0].value == claim


def way_to(claim, given):
    """Return the statements that lead from given names to a claim's check."""
    places = [i for i, s in enumerate(STATEMENTS) if checks(s, claim)]
    assert len(places) == 1, f"the notebook does not check {claim!r}"
    way, needed = [], set()
    for statement in reversed(STATEMENTS[: places[0] + 1]):
        if not way or (bound(statement) | filled(statement)) & needed:
            way.insert(0, statement)
            needed -= bound(statement)
            needed |= used(statement) - given
    return ast.Module(way, type_ignores=[])


def judge(nb, claim, results):
    """Check a claim on results, {name: value}; no data are loaded."""
    names = {**vars(nb), "load_dataset": None, **results}
    way = way_to(claim, names.keys())
    exec(compile(way, "<way to a claim>", "exec"), names)


@pytest.fixture(autouse=True)
def judged(nb, figures, monkeypatch):
    """Return the verdicts; all claims are judged, also those about a CPU."""
    monkeypatch.setattr(nb, "CLAIMS", [])
    monkeypatch.setattr(nb, "ON_GPU", False)
    return nb.CLAIMS


# Results like those of the real data.


def put(table, column, value, **place):
    """Set a column of a table in the rows that are at a place."""
    rows = (table[[*place]] == pd.Series(place)).all(axis=1)
    assert rows.any(), place
    table.loc[rows, column] = value


def put_way(rows, accuracy, *place):
    """Set the last item of the tuple in a list that begins with a place."""
    (index,) = (i for i, row in enumerate(rows) if row[:-1] == place)
    rows[index] = *place, accuracy


def tidy(columns, keys, values):
    """Return a table of accuracies, a row per key."""
    rows = [(*key, value) for key, value in zip(keys, values, strict=True)]
    return pd.DataFrame(rows, columns=[*columns.split(), "accuracy"])


def answers_given(chance, seed):
    """Return answers of ten networks, right with a chance per image."""
    right = np.random.default_rng(seed).random((10, 2000)) < chance
    return np.where(right, LABELS, (LABELS + 1) % 10)


def first_parts():
    """Return results of parts 3 to 6."""
    keys = [*itertools.product(RULES, (0, 0.5, *HIGH))]
    accuracies = (
        *(0.986, 0.986, 0.983, 0.980, 0.960, 0.905, 0.541),
        *(0.986, 0.984, 0.905, 0.546, 0.182, 0.113, 0.106),
        *(0.890, 0.887, 0.873, 0.854, 0.790, 0.666, 0.256),
        *(0.890, 0.884, 0.705, 0.355, 0.170, 0.139, 0.096),
    )
    sizes = [2_386_000, 1_193_500, 479_000, 241_000, 121_000, 74_000, 25_000]
    sizes += [2_386_000, 793_000, 221_200, 94_600, 43_300, 25_020, 8_000]
    sweeps = {
        title: tidy("rule sparsity", keys, own).assign(loss=1.0, parameters=sizes)
        for title, own in zip(TITLES, (accuracies[:14], accuracies[14:]))
    }
    columns = pd.MultiIndex.from_product([TITLES, ("weight", "unit")])
    kinds = "median of all", "median of the largest 3 %"
    index = pd.MultiIndex.from_product([TITLES, kinds])
    moved = [[0.14, 0.21, 0.15, 0.13], [1.4, 1.9, 1.3, 1.2]] * 2
    center = np.pad(np.full((24, 24), 30), 2)
    return {
        "scores": [
            {"data": title, "accuracy": best, "loss": 0.06}
            for title, best in zip(TITLES, (0.986, 0.89))
        ],
        "sweeps": sweeps,
        "removed": pd.DataFrame([[10.0, 43.0] * 2], [50], columns),
        "kept_97": {title: center.copy() for title in TITLES},
        "moved": pd.DataFrame(moved, index, range(1, 5)),
    }


def recovery():
    """Return results of part 7."""
    places = pd.MultiIndex.from_product([TITLES, RULES, HIGH])
    repaired = [98.6, 98.5, 98.3, 97.9, 95.6, 98.0, 96.4, 87.2, 57.7, 16.0]
    repaired += [88.8, 88.7, 88.4, 87.9, 84.9, 88.2, 85.9, 67.5, 45.9, 15.1]
    few = {"90 % of the units": [63.7, 95.0, 96.9]}
    few |= {"95 % of the weights": [96.0, 98.0, 98.3]}
    cliffs = {"plain": [98.6, 95.4, 89.4], "L1": [98.5, 98.4, 97.8]}
    prunings = ("weight", 0.95), ("weight", 0.99), ("unit", 0.9)
    ways = "one-shot", "repaired", "fine-tuned", "in training"
    accuracies = (
        *(95.4, 98.3, 98.5, 98.6, 54.1, 95.6, 97.7, 98.1, 54.6, 96.4, 98.2, 98.2),
        *(70.3, 88.4, 88.9, 88.9, 25.6, 84.9, 87.0, 87.4, 35.5, 85.9, 88.4, 88.5),
    )
    cases = itertools.product(TITLES, prunings, ways)
    rows = [(t, *p, way, own) for (t, p, way), own in zip(cases, accuracies)]
    return {
        "repairs": pd.Series(repaired, places),
        "few": pd.DataFrame(few, [0, 250, 5000]).T,
        "is_zero": np.arange(20) < [[10], [16], [19]],
        "rows": rows,
        "cliffs": pd.DataFrame(cliffs, [0, 0.95, 0.97]),
    }


def sizes_and_times():
    """Return results of part 8."""
    files = {"kB": [9573, 9572, 9572, 913], "kB, gzip": [8829, 1300, 2445, 823]}
    versions = "dense", "90 % of the weights zero"
    versions += "80 % of the units zero", "80 % of the units gone"
    places = {"batch": (1, 1000), "sparsity": (0.5, 0.8, 0.99)}
    index = pd.MultiIndex.from_product(places.values(), names=[*places])
    times = {
        "zeros, as they are": [1.0, 1.0, 0.98, 0.99, 0.86, 1.04],
        "zeros, CSR": [0.8, 0.52, 0.13, 4.1, 1.4, 0.43],
        "units gone": [0.5, 0.34, 0.25, 0.4, 0.17, 0.11],
    }
    decide = {
        "dense": [9547, 98.6, 0.28, 1.8, 11.4],
        "90 % zeros in blocks": [1031, 98.2, 0.1, 1.1, 8.4],
        "80 % of units gone": [888, 98.0, 0.04, 0.2, 1.2],
    }
    return {
        "files": pd.DataFrame(files, versions),
        "times": pd.DataFrame(times, index),
        "decide": pd.DataFrame(decide, ["kB", "%", 1, 32, 256]).T,
        "batches": [1, 32, 256],
        "costs": [0.4, 0.5, 0.4],
        "whole": 1.02,
        "fewer": 1.0,
    }


def forgetting():
    """Return results of part 9: two populations and their answers."""
    paying = np.array([2, 2, 10, 2, 20, 2, 30, 2, 2, 2])[LABELS] / 100
    chances = {
        **{s: SURE - 0.2 * s * HARD for s in (0, 0.3, 0.5, 0.7)},
        0.9: SURE - paying,
        0.99: SURE / 2,
    }
    answers = {s: answers_given(c, seed=2) for s, c in chances.items()}
    rare = {s: own - s * 0.2 * (LABELS == 8) for s, own in chances.items()}
    return {
        "labels": LABELS,
        "answers": answers,
        "rare_answers": {s: answers_given(c, seed=2) for s, c in rare.items()},
        "stages": {
            "99 % zero": answers[0.99],
            "repaired": answers_given(SURE - 0.1, seed=2),
            "one more epoch": answers_given(SURE - 0.05, seed=2),
            "dense": answers[0],
        },
    }


def choices_and_records():
    """Return results of parts 10 and 11."""
    rules = "L2 norm", "random", "APoZ"
    accuracies = (
        *(0.986, 0.957, 0.905, 0.986, 0.90, 0.70, 0.986, 0.75, 0.60),
        *(0.890, 0.857, 0.705, 0.890, 0.75, 0.55, 0.890, 0.70, 0.50),
    )
    kinds = "unit", "unit, greedy", "weight", "weight times input"
    levels = pd.MultiIndex.from_product([("one-shot", "repaired"), (0.8, 0.9, 0.95)])
    choices = [
        *([90.5, 54.6, 18.2, 98.0, 96.4, 87.2], [91.1, 65.8, 27.9, 98.1, 97.2, 93.7]),
        *([98.3, 98.0, 96.0, 98.6, 98.5, 98.3], [97.8, 95.1, 87.8, 98.5, 98.1, 97.2]),
        *([70.5, 35.5, 17.0, 88.2, 85.9, 67.5], [76.9, 53.4, 17.6, 88.5, 87.2, 81.1]),
        *([87.3, 85.4, 79.0, 88.8, 88.7, 88.4], [86.9, 82.0, 69.6, 88.5, 87.9, 86.6]),
    ]
    pieces = "weights", "n:m", "blocks of 4 x 4", "blocks of 16 x 16", "units"
    starts = "ticket", "other weights", "random mask", "small dense"
    trained = {(100, "ticket"): 97.1}
    trained |= {(kept, start): 95.0 for kept in (11, 3.6) for start in starts}
    trained |= {(11, "ticket"): 97.5, (3.6, "ticket"): 96.8}
    tickets = [tidy("kept start", trained, trained.values()) for _ in range(3)]
    return {
        "criteria": tidy(
            "data rule sparsity",
            itertools.product(TITLES, rules, (0, 0.7, 0.8)),
            accuracies,
        ),
        "choices": pd.DataFrame(
            choices, pd.MultiIndex.from_product([TITLES, kinds]), levels
        ),
        "grains": tidy(
            "rule sparsity",
            itertools.product(pieces, [0.75]),
            [0.985, 0.98, 0.97, 0.85, 0.92],
        ),
        "ours": {5: [1.54, 1.41], 2: [1.79, 1.77]},
        "tickets": pd.concat(t.assign(seed=n) for n, t in enumerate(tickets)),
    }


def own_model():
    """Return results of part 12."""
    applications = "ResNet50", "MobileNetV2", "InceptionV3"
    sizes = pd.DataFrame({"parameters": [100, 30]}, ["before", "after"])
    steps = "dense", "half is zero", "repaired", "and fine-tuned", "and shrunk"
    accuracies = {"accuracy (%)": [90.8, 74.0, 89.5, 90.3, 90.3]}
    in_branches = pd.DataFrame({"accuracy (%)": [90, 88]}, ["dense", "shrunk"])
    return {
        "cnn_costs": pd.DataFrame(accuracies, steps),
        "in_branches": in_branches,
        "tables": {name: sizes.copy() for name in applications},
        "differences": dict.fromkeys(applications, 1e-6),
    }


@pytest.fixture(scope="module")
def models(nb):
    """Return models, {name: value}, none of them trained."""
    model, small = nb.build_mlp(nb.HIDDEN_UNITS), nb.build_mlp((40, 30))
    units_zero = nb.prune(model, "unit", 0.8)
    blocks = nb.prune(small, nb.block_mask((4, 1)), 0.9)
    cnn = nb.build_cnn((4, 8), 8)
    cnn_tuned = nb.prune(cnn, "unit", 0.5)
    residual = nb.build_residual_cnn((4, 8))
    residual_pruned = nb.prune(residual, "unit", 0.5)
    return {
        "leaking": nb.prune(nb.build_mlp((12, 8)), "weight", 0.59),
        "model": model,
        "units_zero": units_zero,
        "units_gone": nb.shrink(units_zero),
        "blocks": {0.9: blocks},
        "lite": {"90 % zeros in blocks": nb.exported(blocks, "EXPERIMENTAL_SPARSITY")},
        "cnn": cnn,
        "cnn_tuned": cnn_tuned,
        "cnn_small": nb.shrink(cnn_tuned),
        "residual": residual,
        "residual_pruned": residual_pruned,
        "residual_small": nb.shrink(residual_pruned),
    }


@pytest.fixture(scope="module")
def datasets(data):
    """Return {name: data set} of a few images, under the real titles."""
    few = data._replace(x_test=data.x_test[:50], y_test=data.y_test[:50])
    names = "mnist", "fashion"
    return {n: few._replace(title=title) for n, title in zip(names, TITLES)}


@pytest.fixture
def honest(models, datasets):
    """Return results, {name: value}, on which all claims hold."""
    return {
        **models,
        **datasets,
        **first_parts(),
        **recovery(),
        **sizes_and_times(),
        **forgetting(),
        **choices_and_records(),
        **own_model(),
    }


def test_every_claim_has_a_sabotage():
    assert {claim for claim, _ in sabotages()} == set(CLAIMS)


@pytest.mark.parametrize("claim", CLAIMS)
def test_claims_hold_on_honest_results(nb, honest, judged, claim):
    judge(nb, claim, honest)
    assert judged == [(claim, "checked")]


@pytest.mark.parametrize("claim, sabotage", sabotages())
def test_claims_fail_on_spoiled_results(nb, honest, claim, sabotage):
    helpers = {"put": put, "put_way": put_way, "answers_given": answers_given}
    arrays = {"LABELS": LABELS, "HARD": HARD, "SURE": SURE}
    spoiled = {**vars(nb), **helpers, **arrays, **honest}
    exec(sabotage, spoiled)
    with pytest.raises(AssertionError) as failure:
        judge(nb, claim, spoiled)
    assert str(failure.value) == f"does not hold: {claim}"


# A small experiment, measured on the rows that it was trained on.

ABOUT_RULES = (
    "On both data sets, deleting 90 % of the units costs at least 10 points more than "
    "zeroing 90 % of the weights, without retraining.",
    "On both data sets, without retraining, zeroing 90 % of the weights costs at least "
    "3 points less than deleting 80 % of the units, which leaves about as many "
    "parameters.",
    "On both data sets, the smaller half of the weights holds less than 15 % of the "
    "squared norm.",
    "On both data sets, the smaller half of the units holds at least 3 times the "
    "squared norm of the smaller half of the weights.",
)
ABOUT_ACCURACY = "The dense networks reach 98.2 % on MNIST and 88.8 % on Fashion-MNIST."


def experiment(nb, rows, y_train):
    """Return data sets and networks; both are trained on labels y_train."""
    own = rows._replace(x_test=rows.x_train, y_test=rows.y_train, y_train=y_train)
    network = nb.train(nb.build_mlp((200, 100)), own, epochs=30, seed=0)
    return {
        "mnist": own._replace(title=TITLES[0]),
        "fashion": own._replace(title=TITLES[1]),
        "networks": {title: [network] for title in TITLES},
        "SEEDS": (0,),
        "SPARSITIES": (0, 0.5, 0.8, 0.9),
    }


@pytest.fixture(scope="module")
def experimented(nb, data):
    """Return an experiment on the small stand-in for MNIST."""
    return experiment(nb, data, data.y_train)


@pytest.mark.parametrize("claim", ABOUT_RULES)
def test_claims_about_the_rules_fail_if_these_are_swapped(
    nb, experimented, monkeypatch, claim
):
    judge(nb, claim, experimented)
    swapped = {"weight": nb.unit_mask, "unit": nb.weight_mask}
    monkeypatch.setattr(nb, "RULES", swapped)
    with pytest.raises(AssertionError, match="does not hold"):
        judge(nb, claim, experimented)


def test_the_claim_about_accuracy_fails_on_shuffled_labels(nb, data, experimented):
    judge(nb, ABOUT_ACCURACY, experimented)
    shuffled = np.random.default_rng(0).permutation(data.y_train)
    with pytest.raises(AssertionError, match="does not hold"):
        judge(nb, ABOUT_ACCURACY, experiment(nb, data, shuffled))
