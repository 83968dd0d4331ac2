"""What does the notebook cost? Times, memory, and ratios to what has to be done.

Run `python tests/benchmark.py`, or with `--quick` for all but the times and memory of
the notebook, or with `--notebook` for these only; `--record` prunes LeNet-300-100 in a
longer training than the notebook's. Nothing else should be running: all times are
wall-clock times. What a ratio compares runs in turns, so that it says the same on a
slower machine.
"""

import argparse
import resource
import sys
import time
from datetime import datetime

import nbclient
import nbformat
import numpy as np
from conftest import NOTEBOOK, load


def timed(function):
    """Return the seconds that a call of `function` takes."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def interleaved(functions, rounds=3):
    """Return {name: best seconds of some rounds, taken in turns}."""
    times = [{n: timed(f) for n, f in functions.items()} for _ in range(rounds)]
    return {name: min(t[name] for t in times) for name in functions}


def seconds_of(cell):
    """Return the seconds that an executed cell took."""
    stamps = cell.metadata.get("execution", {})
    ends = [stamps.get(f"iopub.{x}") for x in ("execute_input", "status.idle")]
    if None in ends:
        return 0.0
    start, end = (datetime.fromisoformat(e.replace("Z", "")) for e in ends)
    return (end - start).total_seconds()


def notebook(limit=None):
    """Execute the notebook in memory; print its times and peak memory.

    Exits with an error if more than `limit` GB were needed.

    Runs first: the peak is the largest among child processes so far, which
    count as big as this one until they start their own program.
    """
    book = nbformat.read(NOTEBOOK, as_version=4)
    folder = {"metadata": {"path": str(NOTEBOOK.parent)}}
    client = nbclient.NotebookClient(book, timeout=None, resources=folder)
    whole = timed(client.execute)
    parts, part = {}, ""
    for cell in book.cells:
        if cell.cell_type == "code":
            parts[part] = parts.get(part, 0) + seconds_of(cell)
        elif cell.source.startswith("## "):
            part = cell.source.splitlines()[0].removeprefix("## ")
    for part, seconds in parts.items():
        print(f"{seconds:8.1f} s  {part}")
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    peak *= 1 if sys.platform == "darwin" else 1024
    print(f"{whole:8.1f} s  whole notebook, peak memory {peak / 1e9:.2f} GB")
    if limit and peak > limit * 1e9:
        sys.exit(f"more than {limit} GB")


def products(nb, kernels, images, rows, backward=False):
    """Multiply all images by all kernels, `rows` at a time, nothing else.

    With `backward` also the products that training needs: the gradients of
    all kernels, and of all inputs but the images.
    """
    flat = images.reshape(len(images), -1).astype("float32")
    kernels = [nb.tf.constant(kernel) for kernel in kernels]
    starts = range(0, len(flat), rows)
    batches = [nb.tf.constant(flat[s : s + rows]) for s in starts]

    def multiply():
        for x in batches:
            for i, kernel in enumerate(kernels):
                y = nb.tf.matmul(x, kernel)
                if backward:
                    nb.tf.matmul(x, y, transpose_a=True)
                if backward and i:
                    nb.tf.matmul(y, kernel, transpose_b=True)
                x = y
        x.numpy()

    return multiply


def smallest(sizes, sparsity):
    """Return which of an array are the smallest, found by sorting it."""
    mask = np.zeros(sizes.shape, bool)
    mask.flat[np.argsort(sizes, axis=None)[: round(sparsity * sizes.size)]] = 1
    return mask


SORTING = {
    "weight": lambda kernel, s: ~smallest(np.abs(kernel), s),
    "unit": lambda kernel, s: ~smallest(np.linalg.norm(kernel, axis=0), s),
}


def usual(nb, model, data):
    """Return the sweep as commonly written: zeros and Keras's evaluate."""
    model = nb.copy_of(model)
    model.compile(loss=nb.LOSS, metrics=["accuracy"])
    *hidden, last = model.get_weights()

    def evaluate_all():
        for rule in SORTING.values():
            for sparsity in nb.SPARSITIES:
                model.set_weights([*(k * rule(k, sparsity) for k in hidden), last])
                model.evaluate(data.x_test, data.y_test, batch_size=128, verbose=0)

    return evaluate_all


def machine(nb):
    """Print how fast this machine multiplies matrices."""
    x = nb.tf.random.normal((2000, 2000))
    seconds = min(timed(lambda: nb.tf.matmul(x, x).numpy()) for _ in range(15))
    rate = 2 * 2000**3 / seconds / 1e9
    print(f"{rate:8.0f} GFLOP/s in products of large matrices")


def training(nb, data):
    """Print the seconds of an epoch beside its bare products; return the model."""
    untrained, marks = nb.build_mlp(nb.HIDDEN_UNITS), []
    clock = nb.keras.callbacks.LambdaCallback(
        on_epoch_begin=lambda *_: marks.append(time.perf_counter()),
        on_epoch_end=lambda *_: marks.append(time.perf_counter()),
    )
    model = nb.train(untrained, data, 2, seed=0, callbacks=[clock])
    epoch, kernels = marks[-1] - marks[-2], untrained.get_weights()
    bare = timed(products(nb, kernels, data.x_train, nb.BATCH_SIZE, backward=True))
    print(f"{epoch:8.2f} s  an epoch: {epoch / bare:.2f} of its bare products")
    return model


def sweeping(nb, model, data):
    """Print the time of a sweep, beside bare products and the usual way."""
    bare = products(nb, model.get_weights(), data.x_test, 1000)
    points = len(nb.RULES) * len(nb.SPARSITIES)
    calls = {
        "sweep": lambda: nb.sweep(model, data, nb.RULES, nb.SPARSITIES),
        "bare": lambda: [bare() for _ in range(points)],
        "usual": usual(nb, model, data),
    }
    best = interleaved(calls, rounds=2)
    to_bare, to_usual = (best["sweep"] / best[name] for name in ("bare", "usual"))
    print(
        f"{best['sweep']:8.2f} s  a sweep of {points} points: {to_bare:.2f} of as many "
        f"dense passes of bare products (budget 1.5), {to_usual:.2f} of the usual way"
    )


def repairing(nb):
    """Print the time of `repair`, beside a bare forward pass of the same images."""
    dense = nb.build_mlp(nb.HIDDEN_UNITS)
    pruned = nb.prune(dense, "weight", 0.95)
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (5000, 28, 28), dtype="uint8")
    best = interleaved(
        {
            "repair": lambda: nb.repair(pruned, dense, images),
            "bare": products(nb, dense.get_weights(), images, 1000),
        },
        rounds=5,
    )
    ratio = best["repair"] / best["bare"]
    print(
        f"{best['repair']:8.2f} s  repairing a network: {ratio:.1f} of a dense pass of "
        "bare products (budget 15)"
    )


def shrinking(nb):
    """Print the time of `shrink`, beside a plain copy of the same network."""
    large = nb.keras.applications.ResNet50(weights=None, input_shape=(96, 96, 3))
    large = nb.prune(large, "unit", 0.5)

    def copied():
        nb.keras.models.clone_model(large).set_weights(large.get_weights())

    best = interleaved({"shrink": lambda: nb.shrink(large), "copy": copied})
    ratio = best["shrink"] / best["copy"]
    print(
        f"{best['shrink']:8.2f} s  shrinking ResNet50: {ratio:.2f} of clone_model and "
        "set_weights (budget 3)"
    )


def exporting(nb):
    """Print the times of LiteRT with zeros in blocks of four, beside dense ones."""
    dense = nb.build_mlp(nb.HIDDEN_UNITS)
    blocks = nb.prune(dense, nb.block_mask((4, 1)), 0.9)
    contents = nb.exported(dense), nb.exported(blocks, "EXPERIMENTAL_SPARSITY")
    for batch, rounds in (1, 300), (32, 50), (256, 10):
        images = np.zeros((batch, 28, 28), "uint8")
        calls = dict(enumerate(nb.lite_call(content, images) for content in contents))
        whole, sparse = nb.medians(calls, rounds).values()
        print(
            f"{1000 * sparse:8.3f} ms LiteRT, {batch} images, 90% zeros in blocks: "
            f"{whole / sparse:.2f} times as fast as dense"
        )


def record(nb, data, epochs=40, seeds=range(3)):
    """Print the test errors of LeNet-300-100, pruned in a long training."""
    for kept in (5, 2):
        errors = [nb.lenet_error(data, kept, epochs, s) for s in seeds]
        mean, low, high = sum(errors) / len(errors), min(errors), max(errors)
        print(
            f"LeNet-300-100, {kept}% kept, {epochs} epochs: error "
            f"{mean:.2f}% ({low:.2f} to {high:.2f}, {len(errors)} seeds)"
        )


def main():
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--quick", action="store_true", help="no notebook")
    only.add_argument("--notebook", action="store_true", help="nothing else")
    only.add_argument("--record", action="store_true", help="LeNet-300-100")
    parser.add_argument("--limit", type=float, help="GB for the notebook")
    options = parser.parse_args()
    if not (options.quick or options.record):
        notebook(options.limit)
    if options.notebook:
        return
    nb = load()
    data = nb.load_dataset("mnist")
    if options.record:
        record(nb, data)
    else:
        machine(nb)
        sweeping(nb, training(nb, data), data)
        repairing(nb)
        shrinking(nb)
        exporting(nb)


if __name__ == "__main__":
    main()
