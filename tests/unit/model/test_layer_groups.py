"""Layers with the same window in groups of equal size: few groups, little padding."""

import pytest

from pageframe.executor.model.layer_groups import group_layers, one_group

GEMMA3_1B = [0 if layer % 6 == 5 else 512 for layer in range(26)]
GEMMA3_4B = [0 if layer % 6 == 5 else 1024 for layer in range(34)]


def test_layers_that_see_alike_are_one_group():
    assert group_layers([0] * 4) == one_group(4)
    assert group_layers([9] * 3) == one_group(3, 9)
    assert one_group(2).places == ((0, 0), (0, 1))


def test_layers_that_take_turns_are_two_groups_without_padding():
    groups = group_layers([7, 0, 7, 0])
    assert (groups.windows, groups.num_layers_each, groups.num_layers) == ((0, 7), 2, 4)
    assert groups.places == ((1, 0), (0, 0), (1, 1), (0, 1))


def test_the_more_frequent_kind_is_split_into_groups_of_the_size_of_the_other():
    groups = group_layers([9, 9, 0, 9, 9, 0])
    assert (groups.windows, groups.num_layers_each) == ((0, 9, 9), 2)
    assert groups.places == ((1, 0), (1, 1), (0, 0), (2, 0), (2, 1), (0, 1))


@pytest.mark.parametrize(
    ("windows", "num_groups", "num_layers_each"),
    [
        # 4 layers see everything, 22 slide: 6 groups of 4 with two places empty.
        (GEMMA3_1B, 7, 4),
        # 5 and 29: with 6 to a group one place of the former is empty, and one of the latter.
        (GEMMA3_4B, 6, 6),
        # One and two: padding to pairs would waste a fourth.
        ([0, 9, 9], 3, 1),
        # Three kinds.
        ([0, 8, 4, 0, 8, 4], 3, 2),
    ],
)
def test_as_few_groups_as_waste_little(windows, num_groups, num_layers_each):
    groups = group_layers(windows)
    assert (len(groups.windows), groups.num_layers_each) == (num_groups, num_layers_each)
    assert groups.num_layers <= 1.125 * len(windows)
    # Each layer has a place of its own, in a group with its window.
    assert len(set(groups.places)) == len(windows)
    assert [groups.windows[group] for group, _ in groups.places] == windows
    assert all(place < num_layers_each for _, place in groups.places)


def test_one_layer_of_many_is_not_worth_a_group_for_each_of_the_others():
    groups = group_layers([0, *[9] * 61])
    # The layer that sees everything has six empty places beside it, and the others two in all.
    assert (len(groups.windows), groups.num_layers_each) == (10, 7)
