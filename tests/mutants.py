"""Put faults into a copy of the notebook, one at a time: do the fast tests see them?

Run `python tests/mutants.py`, or give a few words of the faults to try. A fault is seen
if the fast tests of its file fail. All of them take ten minutes.
"""

import concurrent.futures
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
NOTEBOOK = "Model_pruning_exploration.ipynb"
SKIPPED = shutil.ignore_patterns(".git", "__pycache__", ".*_cache")

# A file of tests. Below it faults: what it is, the source as it is, and with the fault.

FAULTS = r"""
test_01_rules.py
  one too few goes
    count = round(share(sparsity) * scores.size)
    count = max(0, round(share(sparsity) * scores.size) - 1)
  < for <=
    keep = scores >= highest_removed
    keep = scores > highest_removed
  the later of equals goes
    keep.flat[ties[: count - np.count_nonzero(~keep)]] = False
    keep.flat[ties[::-1][: count - np.count_nonzero(~keep)]] = False
  rows for units
    np.einsum("iu,iu->u", columns, columns, dtype=float)
    np.einsum("iu,iu->u", columns, columns, dtype=float)[::-1]
  NaN is ranked
    if values.dtype.kind not in "OSU" and not np.isfinite(values).all():
    if False:
  the model itself is pruned
    parts, pruned = prunable(model, kernels), copy_of(model)
    parts, pruned = prunable(model, kernels), model
  the output is pruned
    chosen = {id(k) for k in kernels_in(model, least=2)} - units.outer
    chosen = {id(k) for k in kernels_in(model, least=2)}
  a copy without tables
    carry_over(model, copy)\n    expected
    expected
  a copy that is not asked
    if np.allclose(expected, answer(model), **near):
    if False:
  masks are not nested
    ties = np.flatnonzero(scores == highest_removed)
    ties = np.roll(np.flatnonzero(scores == highest_removed), count)
  n:m counts from the wrong end
    keep = (ranks >= m - n)
    keep = (ranks < n)
  blocks of the other shape
    np.indices(flat.shape), block_size)
    np.indices(flat.shape), block_size[::-1])
test_02_units.py
  a bias stays
    shifts = v.name in ("kernel", "bias", "beta", "moving_mean")
    shifts = v.name in ("kernel", "beta", "moving_mean")
  tied units are ranked apart
    np.hypot.at(norms, own, unit_norms(columns))
    norms[own] = unit_norms(columns)
  units are not tied
    self.parent[high] = low
    self.parent[high] = high
  a dead unit is kept
    keep[read[reached[:, keep[written]].any(axis=1)]] = True
    keep[read[reached.any(axis=1)]] = True
  a unit that is read goes
    & np.isnan(values)[:, None]
    & np.r_[[False], np.isnan(values)[1:]][:, None]
  constants are lost
    bias = sums_of(layer, np.where(read, 0, units.constants[layer]))[written]
    bias = sums_of(layer, 0 * units.constants[layer])[written]
  padding is ignored
    if what.startswith("separable") or (padded and max(layer.kernel_size) > 1):
    if False:
  an unknown layer's units may go
    self.tie(read.numbers, 0)
    pass
  a constant makes a head
    if what in PRODUCTS:\n        fixed
    if not isinstance(layer, keras.Layer):\n        fixed
test_03_training.py
  zeros are not held
    variable.constraint = masked
    pass
  zeros of averages are not held
    for own in variable, averages.get(id(variable)):
    for own in (variable,):
  zeros are not held in the last step
    self.apply()\n        self.release()
    self.release()
  a schedule is late
    if step < end:\n            left
    if step <= end:\n            left
  a schedule is one step late
    before, self.step = self.step, self.earlier + min(batch + 1, self.steps)
    before, self.step = self.step, self.earlier + min(batch, self.steps)
  a schedule begins again
    self.step = epoch * self.steps if self.steps < math.inf else 0
    self.step = 0
  masks stay
    variable.constraint = variable.constraint.before\n
    break\n
  a step later than the training
    if self.end > last:
    if self.end > last + 1:
  a user's constraint is lost
    self.masked(self.before(value) if self.before else value)
    self.masked(value)
test_04_repair.py
  repair ignores the mask
    curved = gram @ direction * keep
    curved = gram @ direction
  repair reads the dense network
    readers = [Reader(own, batches) for own in models]
    readers = [Reader(models[1], batches) for own in models]
test_05_experiments.py
  a seed is ignored in training
    keras.utils.set_random_seed(seed)\n    x, y = data
    keras.utils.set_random_seed(0)\n    x, y = data
  a seed is ignored in the network
    keras.utils.set_random_seed(seed)\n    own = {"use_bias"
    keras.utils.set_random_seed(0)\n    own = {"use_bias"
  validation rows in training
    x, y = data.x_train, data.y_train
    x, y = data.x_val, data.y_val
  test rows in a choice
    accuracy = evaluate(models[-1], data.x_val, data.y_val)["accuracy"]
    accuracy = evaluate(models[-1], data.x_test, data.y_test)["accuracy"]
  parameters of dead units count
    left |= {id(v): cut(v, keep[read], keep[written]) for v in layer.weights}
    left |= {id(v): v.numpy() for v in layer.weights}
  a sweep on validation rows
    scores = evaluate(pruned, data.x_test, data.y_test)
    scores = evaluate(pruned, data.x_val, data.y_val)
  layers are pruned together
    pruned = prune(model, "unit", s, [kernel.path])
    pruned = prune(model, "unit", s)
  a ticket keeps its trained weights
    ticket, random = masked(start, masks)
    ticket, random = masked(trained, masks)
  a claim that does not hold passes
    assert holds or missing, f"does not hold
    assert holds or True, f"does not hold
test_06_notebook.py
  a claim is wider than its sentence
    np.mean(ours[5]) < 1.8 and np.mean(ours[2]) < 2.2
    np.mean(ours[5]) < 1.9 and np.mean(ours[2]) < 2.2
test_07_environment.py
  validation rows are training rows
    x[:n], y[:n], x[n:], y[n:]
    x, y, x[n:], y[n:]
  other data are accepted
    hexdigest() != DIGESTS[name]:
    hexdigest() == DIGESTS[name] and not arrays:
test_08_export.py
  an export without zeros
    chosen = [getattr(tf.lite.Optimize, name) for name in optimizations]
    chosen = []
  a module without a function
    first = clone_of, copy_of,
    first = copy_of,
"""


def faults():
    """Return [(what it is, the source as it is, with the fault, a file of tests)]."""
    found, lines = [], iter(FAULTS.strip().splitlines())
    for line in lines:
        if line.startswith("test_"):
            file = line
            continue
        old, new = (next(lines).strip().replace("\\n", "\n") for _ in range(2))
        found.append((line.strip(), old, new, file))
    return found


def patched(content, old, new):
    """Return a notebook's content with a fault in the one place that it fits."""
    book = json.loads(content)
    sources = ["".join(cell["source"]) for cell in book["cells"]]
    fits = [n for n, source in enumerate(sources) if old in source]
    assert len(fits) == 1 and sources[fits[0]].count(old) == 1, f"one {old!r}: {fits}"
    book["cells"][fits[0]]["source"] = sources[fits[0]].replace(old, new)
    return json.dumps(book)


def first_failure(what, old, new, file):
    """Return what a fault is, and the first fast test that fails because of it."""
    content = (ROOT / NOTEBOOK).read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:
        copy = shutil.copytree(ROOT, Path(folder) / "copy", ignore=SKIPPED)
        (copy / NOTEBOOK).write_text(patched(content, old, new), encoding="utf-8")
        command = [*"-m pytest -x -q -p no:cacheprovider -m".split(), "not slow"]
        done = subprocess.run(
            [sys.executable, *command, f"tests/{file}"],
            cwd=copy,
            capture_output=True,
            text=True,
        )
    failed = [x for x in done.stdout.splitlines() if x.startswith(("FAILED", "ERROR"))]
    return what, failed[0].partition(" - ")[0] if failed else ""


def main():
    """Try the faults that the command line names; exit with how many are not seen."""
    chosen = [f for f in faults() if all(word in f[0] for word in sys.argv[1:])]
    unseen = 0
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for what, test in pool.map(lambda fault: first_failure(*fault), chosen):
            print(f"{what}: {test or 'NOT SEEN'}", flush=True)
            unseen += not test
    sys.exit(unseen)


if __name__ == "__main__":
    main()
