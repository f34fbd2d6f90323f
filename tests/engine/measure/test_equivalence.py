"""Output equivalence: cosine, signal to noise, largest error, and outputs that are not numbers."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from worker.engine.errors import StepFailed
from worker.engine.measure.equivalence import LOWEST_SNR_DB, compare_outputs

floats = arrays(np.float32, (6, 5), elements=st.floats(-1e3, 1e3, width=32))


@given(floats)
def test_equal_outputs_have_no_error(output: np.ndarray) -> None:
    (result,) = compare_outputs(["y"], [((output,), (output.copy(),))])
    assert (result.cosine, result.snr_db, result.max_abs_error, result.num_examples) == (1.0, None, 0.0, 6)


@given(floats, floats)
def test_batches_add_up_to_the_whole(expected: np.ndarray, actual: np.ndarray) -> None:
    (whole,) = compare_outputs(["y"], [((expected,), (actual,))])
    (parts,) = compare_outputs(["y"], [((expected[:2],), (actual[:2],)), ((expected[2:],), (actual[2:],))])
    assert parts.cosine == pytest.approx(whole.cosine)
    assert parts.snr_db == (None if whole.snr_db is None else pytest.approx(whole.snr_db))
    assert (parts.max_abs_error, parts.num_examples) == (whole.max_abs_error, whole.num_examples)


def test_numbers_are_the_definitions() -> None:
    expected = np.array([[3.0, 4.0], [1.0, 0.0]])
    actual = np.array([[3.0, 4.5], [0.0, 1.0]])
    (result,) = compare_outputs(["y"], [((expected,), (actual,))])
    first = (9 + 18) / (5 * np.hypot(3, 4.5))
    assert result.cosine == pytest.approx((first + 0) / 2)
    assert result.snr_db == pytest.approx(10 * np.log10(26 / 2.25))
    assert result.max_abs_error == 1.0


def test_a_silent_original_gives_a_finite_number() -> None:
    (result,) = compare_outputs(["y"], [((np.zeros((2, 3)),), (np.ones((2, 3)),))])
    assert (result.cosine, result.snr_db) == (0.0, LOWEST_SNR_DB)


def test_masked_logits_of_the_original_are_left_out() -> None:
    expected = np.array([[1.0, -np.inf, np.nan]])
    (result,) = compare_outputs(["y"], [((expected,), (np.array([[1.0, -np.inf, 7.0]]),))])
    assert result.snr_db is None


def test_a_result_that_is_not_a_number_is_a_failure() -> None:
    with pytest.raises(StepFailed, match=r"1 of 3 numbers of output 'y' are not finite") as caught:
        compare_outputs(["y"], [((np.ones((1, 3)),), (np.array([[1.0, np.nan, 1.0]]),))])
    assert caught.value.code == "outputs_not_finite"


def test_a_changed_shape_is_a_failure() -> None:
    with pytest.raises(StepFailed, match=r"shape \[1, 2\], the original's is \[1, 3\]"):
        compare_outputs(["y"], [((np.ones((1, 3)),), (np.ones((1, 2)),))])


def test_values_at_padded_positions_do_not_count() -> None:
    expected = np.ones((2, 3, 4))
    actual = expected.copy()
    actual[1, 2] = np.nan
    mask = np.array([[True, True, True], [True, True, False]])
    (result,) = compare_outputs(["y"], [((expected,), (actual,))], [mask])
    assert (result.cosine, result.snr_db, result.max_abs_error) == (1.0, None, 0.0)
