"""How deviations are measured: nothing that is wrong may look small."""

import math

import numpy as np
import pytest
import torch

from cavmae.benchmarks.conformance.tolerances import (
    Deviation,
    array_deviation,
    check_deviations,
    mismatches,
    relative,
    value_deviation,
    worst,
)


def test_a_deviation_that_is_not_a_number_is_never_within_and_is_the_worst() -> None:
    broken = Deviation("loss", math.nan, 1.0)
    assert not broken.within
    assert worst([Deviation("a", 0.5, 1.0), broken, Deviation("b", 3.0, 1.0)]) is broken


def test_worst_is_nearest_to_its_own_limit() -> None:
    near, large = Deviation("near", 9e-6, 1e-5), Deviation("large", 1e-3, 1.0)
    assert worst([large, near]) is near


def test_relative_deviation_from_zero_must_be_zero() -> None:
    assert relative("loss", 0.0, 0.0, 1e-5).within
    assert not relative("loss", 1e-12, 0.0, 1e-5).within
    assert relative("loss", 1.1, 1.0, 1e-5).value == pytest.approx(0.1)


def test_array_deviation_is_on_the_scale_of_the_largest_reference() -> None:
    deviation = array_deviation("x", torch.tensor([1.0, 4.2]), np.array([1.0, 4.0]), 1e-5)
    assert deviation.value == pytest.approx(0.05)


@pytest.mark.parametrize("shape", [(3,), (1, 2), ()])
def test_arrays_of_another_shape_never_agree(shape: tuple[int, ...]) -> None:
    assert not array_deviation("x", torch.zeros(2), np.zeros(shape), 1e-5).within
    assert not mismatches("x", np.zeros(2), np.zeros(shape)).within


def test_values_below_the_floor_are_judged_on_the_floor() -> None:
    measured = np.array([1.0, 1.1e-6])
    assert value_deviation("x", measured, [1.0, 1e-6], floor=1.0, limit=1e-5).within
    assert not value_deviation("x", measured, [1.0, 1e-6], floor=1e-9, limit=1e-5).within


def test_check_values_notice_each_kind_of_change() -> None:
    tensor = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    expected = {"sum": 15.0, "l2": math.sqrt(55), "first4": [1.0, 2.0, 3.0, 4.0]}
    assert all(deviation.within for deviation in check_deviations("x", tensor, expected))
    for key, value in (("sum", 15.001), ("l2", 7.42), ("first4", [1.0, 2.0, 3.0, 4.1])):
        changed = check_deviations("x", tensor, expected | {key: value})
        assert [d.quantity for d in changed if not d.within] == [f"x {key}"]
