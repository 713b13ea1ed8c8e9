"""Positions and numbers of charts."""

import itertools
import re

import pytest

from gamayun_jax.report import charts


def test_a_scale_has_round_numbers_with_as_many_digits_as_they_need():
    scale = charts.Scale(0.0, 1.0, 100.0, 4)
    assert [scale(x) for x in (0.0, 0.25, 1.0)] == [0.0, 25.0, 100.0]
    assert scale.ticks == [
        (0.0, "0.00"), (25.0, "0.25"), (50.0, "0.50"), (75.0, "0.75"), (100.0, "1.00")
    ]  # fmt: skip
    upwards = charts.Scale(-3.0, 1.0, 80.0, 4, upwards=True)
    assert (upwards(1.0), upwards(-3.0)) == (0.0, 80.0)
    assert [text for _, text in upwards.ticks] == ["−3", "−2", "−1", "0", "1"]


@pytest.mark.parametrize("value", [5.0, -1e17, 1e-12])
def test_a_scale_of_one_value_has_it_in_the_middle_and_begins_at_0(value):
    scale = charts.Scale(value, value, 100.0, 4)
    assert (scale(0.0), scale(value)) == (0.0 if value > 0 else 100.0, 50.0)


def test_values_that_are_all_0_have_none_below_but_changes_of_0_have():
    shares = charts.Panel("", {"en": [charts.Dot(0.0)]}, None, form=charts.percent)
    changes = charts.Panel("", {"en": [charts.Dot(0.0)]})
    for panel, numbers in (
        (shares, ["0 %", "25 %", "50 %", "75 %", "100 %"]),
        (changes, ["−0.50", "−0.25", "0.00", "0.25", "0.50"]),
    ):
        scale = charts.Scale(*panel.limits(["en"]), 100.0, 4, panel.form)
        assert [text for _, text in scale.ticks] == numbers


def test_names_at_the_ends_of_lines_do_not_overlap():
    lines = [(50.0, str(n), "") for n in range(5)] + [(99.0, "low", "")]
    ends = charts.spread(lines, 100)
    places = [place for _, place, *_ in ends]
    assert all(b - a > 10.5 for a, b in itertools.pairwise(places))
    assert max(places) <= 100.0
    assert [y for y, *_ in ends] == [50.0] * 5 + [99.0]


def test_panels_that_share_x_place_the_same_value_alike():
    panels = [charts.Panel(t, {"en": [charts.Dot(x, low=-1.0, high=x)]}) for t, x in
              (("<a>", 1.0), ("b", 9.0))]  # fmt: skip

    def zeros(shared):
        svg = charts.dots_chart("t", panels, ["en", "ru"], ["en"], shared=shared)
        assert "<a>" not in svg
        return re.findall(r'class="zero" d="M([\d.]+) ', svg)

    assert len(set(zeros(True))) == 1
    assert len(set(zeros(False))) == 2
