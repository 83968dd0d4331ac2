"""The rules: which weights, which units, and how many of them."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

RULES = ("weight_mask", "unit_mask")
DTYPES = ("float32", "float64", "float16", "int32", "int8")
sparsities = st.floats(0, 1) | st.sampled_from([i / 20 for i in range(21)])
rule_names = st.sampled_from(RULES)


@st.composite
def tied_arrays(draw, least_axes=2):
    """Draw an array of few axes, small sides and many ties."""
    shape = draw(array_shapes(min_dims=least_axes, max_dims=4, max_side=5))
    dtype = draw(st.sampled_from(DTYPES))
    return draw(arrays(dtype, shape, elements=st.integers(-3, 3)))


def lowest(scores, sparsity):
    """Return the positions to remove, found by sorting pairs."""
    ranked = sorted((score, i) for i, score in enumerate(scores))
    return {i for _, i in ranked[: round(sparsity * len(ranked))]}


def removed(mask):
    """Return the positions that a mask does not keep."""
    return {i for i, kept in enumerate(mask.ravel().tolist()) if not kept}


def squared_norms(kernel):
    """Return the exact squared L2 norm of each unit of whole numbers."""
    columns = kernel.reshape(-1, kernel.shape[-1]).T.tolist()
    return [sum(int(weight) ** 2 for weight in column) for column in columns]


@given(tied_arrays(least_axes=1), sparsities)
def test_kept_mask_removes_the_lowest_scores(nb, scores, sparsity):
    mask = nb.kept_mask(scores, sparsity)
    assert mask.shape == scores.shape and mask.dtype == bool
    assert removed(mask) == lowest(scores.ravel().tolist(), sparsity)


@given(tied_arrays(), sparsities)
def test_weight_mask_removes_the_smallest_weights(nb, kernel, sparsity):
    mask = nb.weight_mask(kernel, sparsity)
    scores = [abs(weight) for weight in kernel.ravel().tolist()]
    assert mask.shape == kernel.shape and mask.dtype == bool
    assert removed(mask) == lowest(scores, sparsity)


@given(
    arrays("float32", (5, 7), elements=st.floats(-1e9, 1e9, width=32)),
    sparsities,
)
def test_weight_mask_ranks_any_number(nb, kernel, sparsity):
    scores = [abs(weight) for weight in kernel.ravel().tolist()]
    expected = lowest(scores, sparsity)
    assert removed(nb.weight_mask(kernel, sparsity)) == expected


@given(tied_arrays(), sparsities)
def test_unit_mask_removes_the_smallest_units(nb, kernel, sparsity):
    mask = nb.unit_mask(kernel, sparsity)
    expected = lowest(squared_norms(kernel), sparsity)
    assert mask.shape == kernel.shape and mask.dtype == bool
    for unit in range(kernel.shape[-1]):
        assert (mask[..., unit] == (unit not in expected)).all()


@given(
    arrays("float32", (3, 3, 2, 6), elements=st.floats(-1e3, 1e3, width=32)),
    sparsities,
)
def test_unit_mask_ranks_any_number(nb, kernel, sparsity):
    keep = nb.unit_mask(kernel, sparsity)[0, 0, 0]
    columns = kernel.reshape(-1, 6).T.tolist()
    norms = np.array([math.hypot(*column) for column in columns])
    assert len(keep) - keep.sum() == round(sparsity * 6)
    least_kept = norms[keep].min(initial=np.inf)
    assert norms[~keep].max(initial=0) <= least_kept * (1 + 1e-9)


@given(tied_arrays(), st.integers(0, 31))
def test_a_unit_is_kept_with_all_its_weights(nb, kernel, number):
    keep = np.array([number >> i & 1 for i in range(kernel.shape[-1])], bool)
    mask = nb.whole_units(keep, kernel)
    assert mask.shape == kernel.shape and mask.dtype == bool
    assert all((row == keep).all() for row in mask.reshape(-1, len(keep)))
    assert mask.flags.writeable and not np.shares_memory(mask, keep)


@given(rule_names, tied_arrays(), sparsities, sparsities)
def test_masks_are_nested(nb, name, kernel, one, other):
    rule = getattr(nb, name)
    less, more = sorted((one, other))
    assert removed(rule(kernel, less)) <= removed(rule(kernel, more))


@given(rule_names, tied_arrays())
def test_the_ends_keep_all_and_nothing(nb, name, kernel):
    rule = getattr(nb, name)
    assert rule(kernel, 0).all() and not rule(kernel, 1).any()


@given(rule_names, tied_arrays(), sparsities)
def test_nothing_is_mutated_or_shared(nb, name, kernel, sparsity):
    before = kernel.copy()
    kernel.flags.writeable = False
    mask = getattr(nb, name)(kernel, sparsity)
    assert (kernel == before).all()
    assert mask.flags.writeable and not np.shares_memory(mask, kernel)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8, 10])
def test_halves_are_rounded_as_python_does(nb, count):
    for removals in range(2 * count + 1):
        sparsity = removals / 2 / count
        mask = nb.kept_mask(np.arange(count), sparsity)
        assert count - mask.sum() == round(sparsity * count)


def test_of_equal_scores_the_first_goes(nb):
    kept = nb.kept_mask(np.array([2, 1, 1, 1, 3]), 0.4)
    assert kept.tolist() == [True, False, False, True, True]
    units = nb.unit_mask(np.ones((2, 3, 4)), 0.5)
    assert units[0, 0].tolist() == [False, False, True, True]


def test_one_large_weight_saves_its_unit(nb):
    kernel = np.array([[9.0, 5.0], [0.0, 5.0]])
    assert nb.unit_mask(kernel, 0.5).tolist() == [[True, False]] * 2
    assert not nb.weight_mask(kernel, 0.5)[1, 0]


@pytest.mark.parametrize(
    ("dtype", "large"), [("int8", 90), ("float16", 300), ("float32", 1e30)]
)
def test_squares_of_large_weights_do_not_overflow(nb, dtype, large):
    kernel = np.array([[2, 1.5, 1], [2, 1, 2]], dtype=float) * large / 2
    mask = nb.unit_mask(kernel.astype(dtype), 1 / 3)
    assert mask.tolist() == [[True, False, True]] * 2


@pytest.mark.parametrize("number", [np.float32(0.5), np.float64(0.5), 0.5])
def test_any_real_number_is_a_sparsity(nb, number):
    assert nb.weight_mask(np.eye(2), number).sum() == 2


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize(
    "bad", [-0.1, 1.2, -1e-9, 2, math.nan, math.inf, -math.inf, "0.5", None]
)
def test_a_bad_sparsity_is_named(nb, name, bad):
    with pytest.raises(ValueError, match="sparsity") as error:
        getattr(nb, name)(np.eye(3), bad)
    assert repr(bad) in str(error.value)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("sparsity", [0, 0.5, 1])
def test_a_kernel_that_is_not_finite_is_refused(nb, name, bad, sparsity):
    kernel = np.ones((3, 4), "float32")
    kernel[1, 2] = bad
    with pytest.raises(ValueError, match="nan" if bad != bad else "inf"):
        getattr(nb, name)(kernel, sparsity)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("shape", [(), (3,)])
def test_a_kernel_of_too_few_axes_is_refused(nb, name, shape):
    with pytest.raises(ValueError, match="axes") as error:
        getattr(nb, name)(np.ones(shape), 0.5)
    assert str(shape) in str(error.value)


def test_the_least_integer_is_the_largest_weight(nb):
    kernel = np.array([[-128, 5], [3, 100]], "int8")
    mask = nb.weight_mask(kernel, 0.5)
    assert mask.tolist() == [[True, False], [False, True]]
