"""Kinds of faults found on a first version: masks that were not obeyed in training."""

import keras
import numpy as np
import pytest
import tensorflow as tf
import test_03_training as basic
from conftest import run_on_two_devices
from keras import callbacks as own
from keras import optimizers as kinds
from test_03_training import EACH_STEP, LABELS, ROWS, Watch, fit, kernel_zeros, network

LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
PRUNED = basic.rounded(0.8)


def separate(**options):
    """Return an optimizer that trains kernels in another way than biases."""
    if not hasattr(kinds, "MultiOptimizer"):
        pytest.skip("an older Keras")
    slow, fast = kinds.SGD(0.05, **options), kinds.Adam(0.01, **options)
    return kinds.MultiOptimizer(kinds.OptimizerMap(slow, {".*/kernel": fast}))


AVERAGES = {
    "one": lambda: kinds.Adam(0.01, use_ema=True),
    "written back": lambda: kinds.AdamW(0.01, use_ema=True, ema_overwrite_frequency=3),
    "scaled": lambda: kinds.LossScaleOptimizer(kinds.Adam(0.01, use_ema=True)),
    "many, scaled": lambda: kinds.LossScaleOptimizer(separate(use_ema=True)),
}


class Averaging(kinds.Adam):
    """A user's optimizer: it leaves means, or steps back to them every fifth time."""

    back = False

    def build(self, variables):
        """Make room for the means."""
        super().build(variables)
        self.means = [self.add_variable_from_reference(v, "mean") for v in variables]

    def apply(self, gradients, trainable_variables=None):
        """Take a step, count it in, and step back if it is time."""
        super().apply(gradients, trainable_variables)
        back = tf.cast(self.back and self.iterations % 5 == 0, "float32")
        for mean, weight in zip(self.means, self._trainable_variables):
            mean.assign((mean + weight) / 2)
            weight.assign(back * mean + (1 - back) * weight)

    def finalize_variable_values(self, variables):
        """Put the means into the model."""
        for mean, weight in zip(self.means, variables):
            weight.assign(mean)


class Around(keras.Model):
    """A model that trains a model of its own; another one follows."""

    def __init__(self, **options):
        """Make the two, and an optimizer."""
        super().__init__()
        self.student, self.teacher = network(activation="tanh"), network(1)
        self.inner = kinds.Adam(0.01, **options)
        self.inner.build(self.student.trainable_variables)
        self.compile()

    @tf.function
    def learn(self, rows, labels):
        """Train the student, and return the loss; traced once."""
        with tf.GradientTape() as tape:
            loss = LOSS(labels, self.student(rows))
        weights = self.student.trainable_weights
        self.inner.apply_gradients(zip(tape.gradient(loss, weights), weights))
        return loss

    def train_step(self, data):
        """Train the student, and let the teacher come nearer."""
        loss = self.learn(*data)
        for old, new in zip(self.teacher.weights, self.student.weights):
            old.assign(0.9 * old + 0.1 * new)
        return {"loss": loss}


def trained(optimizer="adam", **options):
    """Return a network that is compiled."""
    model = network(activation="tanh")
    model.compile(optimizer, LOSS, **{"jit_compile": False, **options})
    return model


def averaged(model):
    """Return the number of zeros in the average of each kernel but the output's."""
    optimizer, found = getattr(model.optimizer, "inner_optimizer", model.optimizer), {}
    for each in getattr(optimizer, "optimizers", [optimizer]):
        pairs = each._trainable_variables, each._model_variables_moving_average
        found |= {id(weight): average.numpy() for weight, average in zip(*pairs)}
    return [int((found[id(kernel)] == 0).sum()) for kernel in model.weights[:4:2]]


def assert_free(model, path):
    """Assert that a model trained with masks is saved, loaded and trained like any."""
    assert not any(type(v.constraint).__name__ == "Masked" for v in model.variables)
    model.save(path)
    for free in (keras.models.load_model(path, safe_mode=True), model):
        assert kernel_zeros(free) == PRUNED
        fit(free, 5)
        assert all(n < p / 2 for n, p in zip(kernel_zeros(free), PRUNED))


@pytest.fixture
def pruner(nb):
    """Return a callback that follows the schedule of EACH_STEP."""
    schedule = nb.polynomial_sparsity(0.8, begin=10, end=30, initial=0.2)
    return nb.Pruner("weight", schedule, frequency=5)


SWAPS = [(order, "one") for order in ("PSC", "CSP", "SCP")]
SWAPS += [("SPC", optimizer) for optimizer in [*AVERAGES][1:]]


@pytest.mark.parametrize("order, optimizer", SWAPS)
def test_files_and_validation_are_sparse(pruner, tmp_path, order, optimizer):
    """Averages have the zeros after every step, in validation and in files."""
    path, look, seen = str(tmp_path / "{epoch}.keras"), own.LambdaCallback(), []
    look.on_test_begin = lambda logs=None: seen.append(kernel_zeros(look.model))
    parts = {"P": pruner, "C": own.ModelCheckpoint(path)}
    parts["S"] = own.SwapEMAWeights(swap_on_epoch=True)
    watch = Watch(lambda m: (kernel_zeros(m), averaged(m)))
    given = {"validation_data": basic.batches(1), "epochs": 4}
    model = trained(AVERAGES[optimizer]())
    fit(model, 10, *(parts[key] for key in order), watch, look, **given)
    assert watch.noted == [(due, due) for due in EACH_STEP]
    files = [path.format(epoch=epoch) for epoch in (1, 2, 3, 4)]
    saved = [kernel_zeros(keras.models.load_model(file)) for file in files]
    assert seen == saved == EACH_STEP[9::10]
    assert_free(model, files[0])


def test_averages_of_a_unit_go_with_it(nb, tmp_path):
    """Swapped averages of biases and shifts obey, for both callbacks."""
    model, path = basic.compiled(basic.branched(), "average"), tmp_path / "saved.keras"
    swap, save = own.SwapEMAWeights(swap_on_epoch=True), own.ModelCheckpoint(path)
    fit(model, 5)
    for callback in (nb.Pruner("unit", nb.constant_sparsity(0.5)), nb.KeepZeros()):
        fit(model, 3, callback, swap, save, epochs=2)
        assert basic.gone(keras.models.load_model(path)).sum() == 7


ON_TWO_DEVICES = """
from test_faults_training import *
with tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]).scope():
    model = trained(AVERAGES["one"]())
pruner, watch = nb.Pruner("weight", nb.constant_sparsity(0.8, 2), 1), Watch(averaged)
model.fit(ROWS, LABELS, 16, 2, 0, [pruner, watch], shuffle=False)
assert watch.noted == [[0, 0]] + [PRUNED] * 3 and kernel_zeros(model) == PRUNED
"""


@pytest.mark.slow
def test_averages_obey_on_two_devices():
    """Averages that are spread over devices obey the masks."""
    run_on_two_devices(ON_TWO_DEVICES)


@pytest.mark.parametrize("options", [{}, {"steps_per_execution": 4}])
def test_a_later_epoch_goes_on_with_the_schedule(pruner, options):
    """A fit from epoch 2 prunes as the first did there; one from epoch 0, anew."""
    model = trained(**options)
    for first in (0, 2, 0):
        watch = Watch(lambda m: (int(m.optimizer.iterations), kernel_zeros(m)))
        before = int(getattr(model.optimizer, "iterations", 0)) - 10 * first
        fit(model, 10, pruner, watch, epochs=4, initial_epoch=first)
        steps, noted = zip(*watch.noted)
        due = basic.planned([10 * first, *(step - before for step in steps)])[1:]
        assert [*noted] == due, first


def test_the_end_of_a_schedule_is_an_absolute_step(nb):
    """The last step of training is epochs times steps, wherever it begins."""
    model, watch = trained(), Watch(kernel_zeros)
    late = {"initial_epoch": 7, "epochs": 8}
    rising = [nb.Pruner("weight", nb.constant_sparsity(0.8, e), 1) for e in (75, 81)]
    with pytest.raises(ValueError, match=r"81.* 80"):
        fit(model, 10, rising[1], watch, **late)
    fit(model, 10, rising[0], watch, **late)
    assert watch.noted == [[0, 0]] * 4 + [PRUNED] * 6


@pytest.mark.parametrize("often", ["epoch", 3])
@pytest.mark.parametrize("order", [1, -1])
def test_a_training_that_was_cut_off_goes_on(pruner, tmp_path, order, often):
    """With BackupAndRestore, another process goes on as if nothing had happened."""
    parts = [pruner, own.BackupAndRestore(tmp_path / "backup", often)][::order]
    places = Watch(lambda m: np.hstack([*map(np.ravel, m.get_weights()[:4:2])]) == 0)
    cut, left = own.LambdaCallback(), [0] * 24
    cut.on_train_batch_end = lambda *_, **__: left.pop()
    with pytest.raises(IndexError):
        fit(trained(), 10, *parts, cut, epochs=4)
    other = basic.compiled(network(1, activation="tanh"))
    fit(other, 10, *parts, places, epochs=4)
    basic.never_back(places.noted, [*map(sum, EACH_STEP[20:])])
    basic.assert_ordinary(other)


@pytest.mark.parametrize("params", [{}, {"epochs": 4}, {"steps": 10}])
def test_callbacks_may_be_called_by_hand(pruner, params):
    """A loop of one's own need not say how many steps and epochs there are."""
    model, noted = trained(), []
    every = own.CallbackList([pruner], model=model, **params)
    every.on_train_begin()
    for epoch in range(4):
        every.on_epoch_begin(epoch)
        for batch in range(10):
            model.train_on_batch(ROWS, LABELS)
            every.on_train_batch_end(batch)
            noted.append(kernel_zeros(model))
        every.on_epoch_end(epoch)
    every.on_train_end()
    assert noted == EACH_STEP


def test_masks_can_be_taken_off_after_an_interrupt(nb, tmp_path):
    """`release` leaves the zeros and an ordinary model."""
    model, pruner = trained(), nb.Pruner("weight", nb.constant_sparsity(0.8))
    with pytest.raises(KeyboardInterrupt):
        fit(model, 5, pruner, basic.Interrupt(3))
    pruner.release()
    assert_free(model, tmp_path / "free.keras")


OTHERS = {"Adafactor", "ScheduleFreeAdamW", "Muon", "Lamb", "Ftrl"} & {*dir(kinds)}
RUNS = [(getattr(kinds, name), {"learning_rate": 0.01}, {}) for name in sorted(OTHERS)]
RUNS += [(separate, {}, {"class_weight": {0: 1.0, 1: 2.0, 2: 3.0}})]
RUNS += [(Averaging, {}, {"validation_data": (ROWS, LABELS)})]
RUNS += [(kinds.AdamW, {"gradient_accumulation_steps": 3, "clipnorm": 0.1}, {})]


@pytest.mark.parametrize("kind, options, given", RUNS)
def test_other_optimizers_obey_too(pruner, kind, options, given):
    """Masks obey, and an ordinary model is left, whatever the optimizer."""
    model, watch = trained(kind(**options)), Watch(kernel_zeros)
    fit(model, 10, pruner, watch, epochs=4, **given)
    assert watch.noted == EACH_STEP and kernel_zeros(model) == PRUNED
    basic.assert_ordinary(model)


def test_two_callbacks_share_a_training(nb):
    """Each of two callbacks holds the kernels that it was given."""
    model, watch = trained(), Watch(kernel_zeros)
    first, second, _ = basic.every(model)
    basic.prune_here(nb, model, 0.5, [second])
    jump = nb.Pruner("weight", nb.constant_sparsity(0.8, 3), kernels=[first])
    fit(model, 9, jump, nb.KeepZeros([second]), watch)
    assert watch.noted == [[0, 96]] * 2 + [[PRUNED[0], 96]] * 7


@pytest.mark.parametrize("part", ["student", "teacher", "model"])
def test_zeros_stay_whoever_writes_weights(nb, part):
    """Neither a step traced before nor what assigns weights brings zeros back."""
    slow = type("Slow", (Averaging,), {"back": True})
    model = trained(slow(0.01)) if part == "model" else Around()
    kernel = getattr(model, part, model).layers[0].kernel
    fit(model, 7)
    jump = nb.Pruner("weight", nb.constant_sparsity(0.5, 3), kernels=[kernel.path])
    fit(model, 9, jump, watch := Watch(lambda m: (kernel.numpy() == 0).sum()))
    assert watch.noted == [0] * 2 + [64] * 7


def test_averages_of_an_optimizer_in_a_train_step_obey(nb):
    """Averages are zero in optimizers that a model holds beside its own."""
    model, half = Around(use_ema=True), nb.constant_sparsity(0.5, 2)
    kernel = model.student.layers[0].kernel
    fit(model, 9, nb.Pruner("weight", half, kernels=[kernel.path]))
    model.inner.finalize_variable_values(model.student.trainable_weights)
    assert (kernel.numpy() == 0).sum() == 64
