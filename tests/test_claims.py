"""Every claim of the notebook has teeth: there are results it fails on.

The results are made up, much like those of the real data, or come from a
small experiment. What leads from them to a claim is the notebook's own code.
"""

import ast
import dataclasses
import itertools
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from test_notebook_style import CLAIMS, CODE, bound_names, tree_of

TITLES = "MNIST", "Fashion-MNIST"
STATEMENTS = [statement for cell in CODE for statement in tree_of(cell).body]
LABELS = np.tile(np.arange(10), 200)
HARD = np.arange(2000) % 7 == 0
SURE = np.where(HARD, 0.55, 0.97)

# Each claim, and statements that spoil the results it is about.

SABOTAGES = """
The network has 2,386,000 parameters.
    HIDDEN_UNITS = (300, 100)
The dense networks reach 98.2 % on MNIST, 88.8 % on Fashion-MNIST.
    put(dense, "accuracy", 0.981, data="MNIST")
    put(dense, "accuracy", 0.887, data="Fashion-MNIST")
Without 80 % of its units the network has 221,200 parameters.
    networks = {**networks, "MNIST": [build_mlp((300, 100))]}
    networks = {**networks, "Fashion-MNIST": [build_mlp((300, 100))]}
MNIST: four of five weights set to zero cost less than 1 point.
    put(sweeps["MNIST"], "accuracy", 0.975, rule="weight", sparsity=0.8)
MNIST: half of the units deleted cost less than 1 point.
    put(sweeps["MNIST"], "accuracy", 0.97, rule="unit", sparsity=0.5)
Fashion-MNIST: 80 % of weights, or half of the units, cost < 3 points.
    put(sweeps["Fashion-MNIST"], "accuracy", 0.85, sparsity=0.8)
    put(sweeps["Fashion-MNIST"], "accuracy", 0.85, sparsity=0.5)
MNIST, Fashion-MNIST: at 90 % units cost 10 points more than weights.
    put(sweeps["MNIST"], "accuracy", 0.9, sparsity=0.9)
    put(sweeps["Fashion-MNIST"], "accuracy", 0.8, sparsity=0.9)
MNIST, Fashion-MNIST: at 99 % both rules cost at least 20 points.
    put(sweeps["MNIST"], "accuracy", 0.8, rule="weight", sparsity=0.99)
    put(sweeps["Fashion-MNIST"], "accuracy", 0.8, rule="unit", sparsity=0.99)
The smaller half of the weights holds < 15 % of the squared norm.
    removed["Fashion-MNIST", "weight"] = 0.16
The smaller half of the units holds at least 3 times that share.
    removed["MNIST", "unit"] = 0.3
Unit pruning at 50 % leaves 793,000 parameters, at 90 % 94,600.
    put(sweeps["MNIST"], "parameters", 793_001, sparsity=0.5)
    put(sweeps["MNIST"], "parameters", 94_599, sparsity=0.9)
MNIST, Fashion-MNIST: at a tenth of the parameters weights win by 3 points.
    put(sweeps["MNIST"], "accuracy", 0.97, rule="unit", sparsity=0.8)
    put(sweeps["Fashion-MNIST"], "accuracy", 0.7, rule="weight", sparsity=0.9)
MNIST: at 97 % two rings of border pixels keep < 2 % of the weights.
    kept_97["MNIST"][:2] = 10
MNIST, Fashion-MNIST: half of the weights move < 40 % of a typical initial one.
    moved.loc[3, ("Fashion-MNIST", "all")] = 0.41
Zeros make a .keras file no smaller.
    stored.iloc[1, 0] = 1806
With 90 % zeros, gzip makes the file 6 times smaller.
    stored.iloc[1, 1] = 2902
The shrunk file is 9 times smaller as it is.
    stored.iloc[3, 0] = 1100
Eight bits a weight cost none of the four models 1 point.
    stored.iloc[2, 3] = 85
On a CPU zeros are no faster; 80 % fewer units are, large batches threefold.
    times["masked"] = 0.5
    times["masked"] = 1.5
    times.loc[1, "masked"] = 0.7
    times.loc[(1000, 0.8), "shrunk"] = 0.4
On a CPU, one image: shrunk by 80 %, or CSR at 99 %, is 1.5 times faster.
    times.loc[(1, 0.8), "shrunk"] = 0.7
    times.loc[(1, 0.99), "CSR"] = 0.7
On a CPU, in batches of 1,000, CSR at 80 % is slower than dense.
    times.loc[(1000, 0.8), "CSR"] = 0.9
On a CPU, `predict` of one image gains < 50 % speed.
    speed_up = 1.6
One step of training brings back at least a third of the zeros.
    leaking = prune(leaking, weight_mask, 0.61)
While a network is pruned in training, no zero comes back.
    is_zero[1] = is_zero[1, ::-1]
    is_zero[2] = True
MNIST: at 75 % large blocks cost at least 2 points more than the rest.
    put(grains, "accuracy", 0.9, rule="blocks of 16 x 16")
    put(grains, "accuracy", 0.8, rule="units")
MNIST: the L1 penalty costs less than half a point of dense accuracy.
    cliffs.loc[0, "L1"] = 98.0
MNIST: after L1, 95 % of the weights can go one-shot for < 1 point.
    cliffs.loc[0.95, "L1"] = 97.4
MNIST: at 97 %, L1 leaves at least 3 points more than plain training.
    cliffs.loc[0.97, "plain"] = 95
MNIST: deleting nine of ten units and retraining costs < 1 point.
    put(frontier, "accuracy", 0.97, rule="unit", way="fine-tuned")
    put(frontier, "accuracy", 0.97, rule="unit", way="in training")
MNIST: 99 % of the weights pruned in training cost < 1.5 points.
    put(frontier, "accuracy", 0.97, way="in training", sparsity=0.99)
Fashion-MNIST: retrained, 95 % of weights or 90 % of units cost < 2 points.
    put(frontier, "accuracy", 0.86, way="in training", sparsity=0.95)
    put(frontier, "accuracy", 0.86, way="in training", sparsity=0.9)
    put(frontier, "accuracy", 0.86, way="fine-tuned", sparsity=0.9)
MNIST: LeNet-300-100 with 5 % of its weights errs < 1.8 %, with 2 % < 2.2 %.
    ours[5] = [1.9, 1.8]
    ours[2] = [2.3, 2.2]
MNIST, Fashion-MNIST: at 80 % the L2 norm beats random by 10 points.
    put(criteria["MNIST"], "accuracy", 0.85, sparsity=0.8)
    put(criteria["Fashion-MNIST"], "accuracy", 0.7, sparsity=0.8)
MNIST: at 70 % APoZ is at least 10 points worse than random.
    put(criteria["MNIST"], "accuracy", 0.85, rule="APoZ", sparsity=0.7)
MNIST, Fashion-MNIST: allotted by the scan, 80 % cost 1 point less.
    allotted.loc["MNIST", ("accuracy", "allotted")] = 0.914
    allotted.loc["Fashion-MNIST", ("accuracy", "uniform")] = 0.779
    allotted.loc["MNIST", ("parameters", "allotted")] = 221_201
MNIST: with 3.6 % of the weights the ticket wins by a point, every time.
    put(tickets, "accuracy", 0.93, kept=3.6, start="ticket", seed=1)
    put(tickets, "accuracy", 0.96, kept=3.6, start="small dense", seed=2)
MNIST: with 11 % the ticket is within half a point of the dense network.
    put(tickets, "accuracy", 0.965, kept=11, start="ticket")
Fashion-MNIST: between dense halves the test finds at most one class.
    answers[0][1::2, HARD & (LABELS < 5)] = 9
Fashion-MNIST: at 90 % at least three classes fare differently.
    answers[0.9] = answers[0]
Fashion-MNIST: 90 % of weights gone, one class loses twice the average.
    answers[0.9] = answers_given(SURE - 0.1, seed=1)
Fashion-MNIST: accuracy falls < 12 points, the recall of one class > 12.
    answers[0.9] = answers_given(SURE - 0.05, seed=1)
    answers[0.9] = answers_given(SURE - 0.2, seed=1)
Fashion-MNIST: up to 70 %, dense networks do 20 points worse on PIEs.
    answers[0.3][:, ::9] = 0
    answers[0.7] = answers[0]
Fashion-MNIST: at 90 % a rare class loses 1 point more than if common.
    rare_answers = answers
Fashion-MNIST: at 99 %, one epoch brings every class within 15 points.
    remembered.loc[6, "fine-tuned"] = 72
A shrunk convolutional network computes what the pruned one does.
    cnn_small = shrink(prune(cnn_pruned, unit_mask, 0.75))
With half of its filters and units a CNN has 3 times fewer parameters.
    compared.loc["shrunk", "parameters"] = 40_000
Fashion-MNIST: half of a CNN's filters and units cost < 3 points.
    compared.loc["shrunk", "accuracy (%)"] = 86
InceptionV3 takes each sparsity in each layer, within 1 %.
    thinner.iloc[2, 1] = 0.68
"""


def sabotages():
    """Return [(claim, statement that spoils it)]."""
    pairs, claim = [], None
    for line in SABOTAGES.strip().splitlines():
        if line.startswith(" "):
            pairs.append((claim, line.strip()))
        else:
            claim = line
    return pairs


# From results to a claim.


def bound(statement):
    """Return the names that a top-level statement binds."""
    return {name for name, _ in bound_names(statement)}


def used(statement):
    """Return the names that a statement uses and does not bind inside."""
    names = [n for n in ast.walk(statement) if isinstance(n, ast.Name)]
    stored = {n.id for n in names if isinstance(n.ctx, ast.Store)}
    loaded = {n.id for n in names if isinstance(n.ctx, ast.Load)}
    return loaded - (stored - bound(statement))


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
        if not way or bound(statement) & needed:
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
def ledger(nb, monkeypatch):
    """Judge all claims, also those about a CPU, in a ledger of their own."""
    monkeypatch.setattr(nb, "LEDGER", {"claims": {}})
    monkeypatch.setattr(nb, "ON_GPU", False)


# Results like those of the real data.


def put(table, column, value, **place):
    """Set a column of a table in the rows that are at a place."""
    rows = (table[[*place]] == pd.Series(place)).all(axis=1)
    assert rows.any(), place
    table.loc[rows, column] = value


def tidy(columns, keys, values):
    """Return a table of accuracies, a row per key."""
    rows = [(*key, value) for key, value in zip(keys, values, strict=True)]
    return pd.DataFrame(rows, columns=[*columns.split(), "accuracy"])


def answers_given(chance, seed):
    """Return answers of ten networks, right with a chance per image."""
    right = np.random.default_rng(seed).random((10, 2000)) < chance
    return np.where(right, LABELS, (LABELS + 1) % 10)


def curves(rules, sparsities, *accuracies):
    """Return {title: a sweep} of accuracies, one list per data set."""
    keys = list(itertools.product(rules, sparsities))
    tables = [tidy("rule sparsity", keys, own) for own in accuracies]
    return dict(zip(TITLES, tables, strict=True))


def first_parts(nb):
    """Return results of parts 2 to 5."""
    sweeps = curves(
        ("weight", "unit"),
        (0, 0.5, 0.8, 0.9, 0.99),
        [0.986, 0.986, 0.983, 0.980, 0.541, 0.986, 0.984, 0.905, 0.546, 0.106],
        [0.890, 0.887, 0.873, 0.854, 0.256, 0.890, 0.884, 0.705, 0.355, 0.096],
    )
    for results in sweeps.values():
        results["loss"] = 1 - results.accuracy
        results["parameters"] = [
            nb.parameters_left(nb.HIDDEN_UNITS, [sparsity] * 4)
            for sparsity in results.sparsity
        ]
    columns = pd.MultiIndex.from_product([TITLES, ("weight", "unit")])
    center = np.pad(np.full((24, 24), 30), 2)
    moved = {(t, "all"): [0.14, 0.21, 0.15, 0.13] for t in TITLES}
    return {
        "dense": tidy("data loss", zip(TITLES, (0.06, 0.31)), (0.986, 0.89)),
        "sweeps": sweeps,
        "removed": pd.DataFrame([[0.1, 0.43] * 2], ["50%"], columns),
        "kept_97": {title: center.copy() for title in TITLES},
        "moved": pd.DataFrame(moved),
    }


def sizes_and_times():
    """Return results of part 6."""
    stored = {
        ("kB", ".keras"): [9573, 9572, 9572, 913],
        ("kB", ".keras + gzip"): [8829, 1219, 2902, 822],
        ("accuracy (%)", ".keras"): [98.6, 97.8, 86.2, 86.2],
        ("accuracy (%)", "int8 + gzip"): [98.6, 97.7, 86.1, 86.2],
    }
    places = {"batch": (1, 1000), "sparsity": (0.8, 0.99)}
    index = pd.MultiIndex.from_product(places.values(), names=[*places])
    times = {
        "masked": [1.0, 0.98, 0.86, 1.04],
        "CSR": [0.52, 0.13, 3.15, 0.43],
        "shrunk": [0.34, 0.25, 0.17, 0.11],
    }
    return {
        "stored": pd.DataFrame(stored),
        "times": pd.DataFrame(times, index),
        "speed_up": 1.02,
    }


def recovery():
    """Return results of part 7."""
    cliffs = {"plain": [98.6, 95.4, 89.4], "L1": [98.5, 98.4, 97.8]}
    pieces = "weights", "n:m", "blocks of 4 x 4", "blocks of 16 x 16", "units"
    prunings = ("weight", 0.95), ("weight", 0.99), ("unit", 0.9)
    ways = "fine-tuned", "in training"
    return {
        "is_zero": np.arange(20) < [[10], [16], [19]],
        "grains": tidy(
            "rule sparsity",
            itertools.product(pieces, [0.75]),
            [0.985, 0.98, 0.97, 0.85, 0.92],
        ),
        "cliffs": pd.DataFrame(cliffs, [0, 0.95, 0.97]),
        "frontier": tidy(
            "data rule sparsity way",
            [(t, *p, w) for t in TITLES for p in prunings for w in ways],
            [
                *(0.985, 0.986, 0.977, 0.981, 0.982, 0.982),
                *(0.889, 0.889, 0.870, 0.874, 0.884, 0.885),
            ],
        ),
        "ours": {5: [1.54, 1.41], 2: [1.79, 1.77]},
    }


def choices(nb):
    """Return results of parts 8 and 9."""
    allotted = {
        ("accuracy", "uniform"): [0.905, 0.705],
        ("accuracy", "allotted"): [0.921, 0.788],
        ("parameters", "uniform"): [221_200, 221_200],
        ("parameters", "allotted"): [214_733, 219_267],
    }
    trained = {
        (100, "ticket"): 0.971,
        **{(11, start): 0.95 for start in nb.STARTS},
        **{(3.6, start): 0.92 for start in nb.STARTS},
        (11, "ticket"): 0.975,
        (3.6, "ticket"): 0.968,
    }
    tickets = [tidy("kept start", trained, trained.values()) for _ in range(3)]
    return {
        "criteria": curves(
            ("L2 norm", "random", "APoZ"),
            (0, 0.7, 0.8),
            [0.986, 0.957, 0.905, 0.986, 0.90, 0.70, 0.986, 0.75, 0.60],
            [0.890, 0.857, 0.705, 0.890, 0.75, 0.55, 0.890, 0.70, 0.50],
        ),
        "allotted": pd.DataFrame(allotted, TITLES),
        "tickets": pd.concat(
            table.assign(seed=seed) for seed, table in enumerate(tickets)
        ),
    }


def forgetting():
    """Return results of part 10: two populations and their answers."""
    paying = np.array([2, 2, 10, 2, 20, 2, 30, 2, 2, 2])[LABELS] / 100
    chances = {
        **{s: SURE - 0.2 * s * HARD for s in (0, 0.3, 0.5, 0.7)},
        0.9: SURE - paying,
        0.99: SURE / 2,
    }
    answers = {s: answers_given(c, seed=2) for s, c in chances.items()}
    rare = {s: own - s * 0.2 * (LABELS == 8) for s, own in chances.items()}
    dense, tuned = np.full(10, 88), np.full(10, 83)
    return {
        "labels": LABELS,
        "answers": answers,
        "rare_answers": {s: answers_given(c, seed=2) for s, c in rare.items()},
        "remembered": pd.DataFrame({"dense": dense, "fine-tuned": tuned}),
    }


def own_model():
    """Return results of part 11."""
    compared = {
        "accuracy (%)": [90, 89, 89],
        "parameters": [105_000, 105_000, 27_000],
    }
    sparsities = np.repeat([[0.3], [0.5], [0.7], [0.9], [0.99]], 3, axis=1)
    return {
        "compared": pd.DataFrame(compared, ["dense", "pruned", "shrunk"]),
        "thinner": pd.DataFrame(sparsities),
    }


@pytest.fixture(scope="module")
def models(nb):
    """Return models, {name: value}, none of them trained."""
    large = nb.build_mlp(nb.HIDDEN_UNITS)
    cnn_pruned = nb.prune(nb.build_cnn((4, 8), 8), nb.unit_mask, 0.5)
    return {
        "networks": {title: [large] for title in TITLES},
        "leaking": nb.prune(nb.build_mlp((12, 8)), nb.weight_mask, 0.59),
        "cnn_pruned": cnn_pruned,
        "cnn_small": nb.shrink(cnn_pruned),
    }


@pytest.fixture
def honest(nb, data, models):
    """Return results, {name: value}, on which all claims hold."""
    fashion = {"class_names": range(10), "x_test": data.x_test[:50]}
    return {
        "mnist": SimpleNamespace(title=TITLES[0]),
        "fashion": SimpleNamespace(title=TITLES[1], **fashion),
        **models,
        **first_parts(nb),
        **sizes_and_times(),
        **recovery(),
        **choices(nb),
        **forgetting(),
        **own_model(),
    }


def test_every_claim_has_a_sabotage():
    assert {claim for claim, _ in sabotages()} == set(CLAIMS)


@pytest.mark.parametrize("claim", CLAIMS)
def test_claims_hold_on_honest_results(nb, honest, claim):
    judge(nb, claim, honest)
    assert nb.LEDGER == {"claims": {claim: "checked"}}


@pytest.mark.parametrize("claim, sabotage", sabotages())
def test_claims_fail_on_spoiled_results(nb, honest, claim, sabotage):
    helpers = {"put": put, "answers_given": answers_given}
    arrays = {"LABELS": LABELS, "HARD": HARD, "SURE": SURE}
    spoiled = {**vars(nb), **helpers, **arrays, **honest}
    exec(sabotage, spoiled)
    with pytest.raises(AssertionError) as failure:
        judge(nb, claim, spoiled)
    assert str(failure.value) == f"does not hold: {claim}"


# A small experiment, measured on the rows that it was trained on.

ABOUT_RULES = (
    "MNIST, Fashion-MNIST: at 90 % units cost 10 points more than weights.",
    "MNIST, Fashion-MNIST: at a tenth of the parameters weights win by 3 "
    "points.",
    "The smaller half of the weights holds < 15 % of the squared norm.",
    "The smaller half of the units holds at least 3 times that share.",
)
ABOUT_ACCURACY = (
    "The dense networks reach 98.2 % on MNIST, 88.8 % on Fashion-MNIST."
)


def experiment(nb, rows, y_train):
    """Return data sets and networks; both are trained on labels y_train."""
    own = dataclasses.replace(
        rows, x_test=rows.x_train, y_test=rows.y_train, y_train=y_train
    )
    network = nb.train(nb.build_mlp((200, 100)), own, epochs=30, seed=0)
    return {
        "datasets": dict.fromkeys(TITLES, own),
        "networks": {title: [network] for title in TITLES},
        "SEEDS": (0,),
        "SPARSITIES": (0, 0.8, 0.9),
    }


@pytest.fixture(scope="module")
def experimented(nb, data):
    """Return an experiment on the small stand-in for MNIST."""
    return experiment(nb, data, data.y_train)


@pytest.mark.parametrize("claim", ABOUT_RULES)
def test_claims_about_the_rules_fail_if_these_are_swapped(
    nb, experimented, claim
):
    judge(nb, claim, experimented)
    swapped = {"weight": nb.unit_mask, "unit": nb.weight_mask}
    with pytest.raises(AssertionError, match="does not hold"):
        judge(nb, claim, {**experimented, "RULES": swapped})


def test_the_claim_about_accuracy_fails_on_shuffled_labels(
    nb, data, experimented
):
    judge(nb, ABOUT_ACCURACY, experimented)
    shuffled = np.random.default_rng(0).permutation(data.y_train)
    with pytest.raises(AssertionError, match="does not hold"):
        judge(nb, ABOUT_ACCURACY, experiment(nb, data, shuffled))
