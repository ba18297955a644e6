"""The summary entry of a codistilled run that compares its arms."""

import pytest

from distill.run.codistill import gap_closed


def test_the_share_of_a_gap():
    assert gap_closed(2.0, 3.0, 2.25) == {"gap_closed": pytest.approx(0.75)}
    assert gap_closed(2.0, 3.0, 3.5) == {"gap_closed": pytest.approx(-0.5)}


@pytest.mark.parametrize("teacher", [3.0, 3.5])
def test_there_is_no_gap_where_the_teacher_is_no_better_than_hard_labels(teacher):
    assert gap_closed(teacher, 3.0, 2.5) == {}
