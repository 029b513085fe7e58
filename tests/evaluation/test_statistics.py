"""Standard errors against their definitions, and pairs against their differences."""

from __future__ import annotations

import math

import numpy as np
import pytest

from popjax.evaluation.statistics import Mean, mean_of, paired, ratio

SUMS, WEIGHTS = [3.0, 8.0, 4.0, 9.5], [2.0, 4.0, 1.0, 3.0]


def test_pairs_are_means_of_differences() -> None:
    found = paired([2.0, 4.0, 9.0], [1.0, 3.0, 8.0])
    # Items differ widely, yet each is exactly 1 above its pair.
    assert found == Mean(1.0, 0.0, 3)
    assert mean_of([1.0, 2.0, 3.0, 4.0]).standard_error == pytest.approx(math.sqrt(5 / 3) / 2)


def test_equal_weights_make_a_ratio_a_mean() -> None:
    found, wanted = ratio(SUMS, [2.0] * 4), mean_of([x / 2 for x in SUMS])
    assert found.mean == pytest.approx(wanted.mean)
    assert found.standard_error == pytest.approx(wanted.standard_error)


def test_the_error_of_a_ratio_is_about_that_of_leaving_one_out() -> None:
    """The jackknife agrees to first order: many items of like weight."""
    rng = np.random.default_rng(0)
    weights = rng.uniform(0.9, 1.1, 400)
    sums = weights * (3 + rng.standard_normal(400))
    left = (sums.sum() - sums) / (weights.sum() - weights)
    jackknife = math.sqrt(399 / 400 * float(((left - left.mean()) ** 2).sum()))
    assert ratio(sums.tolist(), weights.tolist()).standard_error == pytest.approx(jackknife, 0.01)


def test_one_item_has_no_error() -> None:
    for found in (mean_of([2.0]), ratio([2.0], [1.0])):
        assert math.isnan(found.standard_error)
        assert found.to_json() == {"mean": 2.0, "standard_error": None, "n": 1}
        assert found.words() == "2.000 ± -"
    assert Mean(-0.5, 0.25, 9).words(2, sign=True) == "-0.50 ± 0.25"
