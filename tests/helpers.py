"""What several test files need: random models, their answers, what should be zero."""

import re

import keras
import numpy as np

KERNELS = ("kernel", "pointwise_kernel", "recurrent_kernel")
FOLLOWING = (*KERNELS, "bias", "beta", "moving_mean")


class Closed(keras.Model):
    """A model that Keras cannot build again: it takes no arguments."""

    def __init__(self):
        """Hold two layers."""
        super().__init__(name="own")
        self.first, self.last = keras.layers.Dense(4), keras.layers.Dense(3)

    def call(self, inputs):
        """Pass the inputs through both."""
        return self.last(self.first(inputs))


@keras.saving.register_keras_serializable("tests")
class DenseOfMyOwn(keras.layers.Dense):
    """A user's Dense layer: whatever it does, nobody can know."""


def randomized(model, seed=0, gain=1.0, shift=0.5):
    """Give all weights of a model, statistics too, random values; return it."""
    random = np.random.default_rng(seed)
    for variable in model.weights:
        shape = variable.shape
        if variable.name in ("gamma", "moving_variance", "variance"):
            variable.assign(random.uniform(0.5, 1.5, shape))
        elif variable.name != "count":
            size = gain * np.prod(shape[:-1]) ** -0.5 if len(shape) > 1 else shift
            variable.assign(random.normal(0, size, shape))
    return model


def ends_of(model):
    """Return the tensors that a model takes and returns, in their structures."""
    if isinstance(model, keras.Sequential):
        return model.inputs[0], model.outputs[0]
    return model.input, model.output


def rows_of(model, seed=1, count=8):
    """Return random rows for a model, in the structure of its inputs."""
    random = np.random.default_rng(seed)

    def values(tensor):
        """Return values for one input."""
        shape = (count, *(size or 7 for size in tensor.shape[1:]))
        if "int" in tensor.dtype:
            return random.integers(1, 10, shape)
        return random.normal(size=shape).astype("float32")

    return keras.tree.map_structure(values, ends_of(model)[0])


def answers(model, rows=None):
    """Return a model's outputs for (random) rows, as a list of arrays."""
    outputs = model(rows_of(model) if rows is None else rows, training=False)
    return [x.numpy() for x in keras.tree.flatten(outputs)]


def difference(model, other, rows=None):
    """Return how far two models differ, relative to the largest answer."""
    pairs = zip(answers(model, rows), answers(other, rows), strict=True)
    return max(np.abs(x - y).max() / np.abs(x).max() for x, y in pairs)


def equal(values, others):
    """Return whether two lists of arrays are the same, value by value."""
    return len(values) == len(others) and all(map(np.array_equal, values, others))


def reloaded(model, folder):
    """Return a model, saved and loaded."""
    model.save(folder / "model.keras")
    return keras.models.load_model(folder / "model.keras")


def chain(kernels, activation="relu"):
    """Return a network of Dense layers, without biases, of given kernels."""
    parts = [keras.Input((len(kernels[0]),))]
    for number, kernel in enumerate(kernels, start=1):
        own = activation if number < len(kernels) else None
        parts.append(keras.layers.Dense(kernel.shape[1], own, use_bias=False))
    model = keras.Sequential(parts)
    model.set_weights(kernels)
    return model


def puts_out(kernels, values):
    """Return what each layer of a chain puts out, by NumPy alone."""
    outputs = []
    for number, kernel in enumerate(kernels, start=1):
        values = values @ kernel
        values = np.maximum(values, 0) if number < len(kernels) else values
        outputs.append(values)
    return outputs


def lowest(scores, sparsity):
    """Return which scores are among the lowest share, found by sorting pairs."""
    ranked = sorted((score, i) for i, score in enumerate(np.ravel(scores).tolist()))
    gone = np.zeros(len(ranked), bool)
    gone[[i for _, i in ranked[: round(sparsity * len(ranked))]]] = True
    return gone.reshape(np.shape(scores))


def expected_weights(model, groups, alone, rule, sparsity):
    """Return the weights that a pruned model should have.

    `groups` are strings of layers with the same units, "a bn dw": the units that go are
    found by hand. "bn@4" is a layer of which only some, from unit 4 on, belong to them.
    The kernels of the layers `alone` lose weights, but no units.
    """
    layers = {layer.name: layer for layer in model._flatten_layers()}
    values = {id(v): v.numpy().copy() for v in model.weights}

    def kernels(name):
        """Return the kernels in a layer."""
        return [v for v in layers[name].weights if v.name in KERNELS]

    def is_ranked(name):
        """Return whether a layer loses weights: depthwise and grouped ones do not."""
        layer = layers[name]
        depthwise = "Depthwise" in type(layer).__name__
        return rule == "unit" or not (depthwise or getattr(layer, "groups", 1) > 1)

    def lose_weights(own):
        """Take the smallest weights of kernels."""
        if rule == "weight":
            for kernel in own:
                values[id(kernel)] *= ~lowest(np.abs(values[id(kernel)]), sparsity)

    for name in alone:
        lose_weights(kernels(name))
    for group in groups:
        names = re.findall(r"(\w+)@?(\d*)", group)
        count = kernels(names[0][0])[0].shape[-1]
        ranked = [k for name, _ in names if is_ranked(name) for k in kernels(name)]
        lose_weights(ranked)
        columns = [values[id(k)].reshape(-1, count) for k in ranked]
        norms = np.square(np.concatenate(columns).astype(float)).sum(axis=0)
        gone = lowest(norms, sparsity) if rule == "unit" else norms == 0
        for name, start in names:
            for v in layers[name].weights:
                if v.name in FOLLOWING:
                    own = values[id(v)]
                    own = own.reshape(-1, count if v.name in KERNELS else len(own))
                    own[:, int(start or 0) :][:, :count][:, gone] = 0
    return [values[id(v)] for v in model.weights]
