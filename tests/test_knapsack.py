"""What is taken along fits, and nothing that fits is worth more."""

from __future__ import annotations

import itertools
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.programs import few_examples
from zgraph import knapsack
from zgraph.knapsack import Item, best

ITEMS = st.lists(st.builds(Item, st.integers(1, 30), st.tuples(st.integers(0, 9), st.integers(-3, 3))), max_size=8)


def worth(items: list[Item], which: list[int] | tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sum(items[index].value[k] for index in which) for k in range(2))


def by_trying(items: list[Item], capacity: int) -> tuple[int, ...]:
    """The most that any choice which fits is worth."""
    choices = (c for n in range(len(items) + 1) for c in itertools.combinations(range(len(items)), n))
    return max(worth(items, c) for c in choices if sum(items[i].num_bytes for i in c) <= capacity)


@few_examples(200)
@given(ITEMS, st.integers(0, 120))
def test_no_choice_that_fits_is_worth_more(items: list[Item], capacity: int) -> None:
    chosen = best(items, capacity)
    assert sum(items[index].num_bytes for index in chosen) <= capacity
    assert worth(items, chosen) == by_trying(items, capacity)


@few_examples(100)
@given(ITEMS, st.integers(0, 120), st.integers(1, 20))
def test_of_many_items_it_is_the_best_of_a_little_less_and_more_bytes_are_never_worth_less(
    items: list[Item], capacity: int, most_units: int
) -> None:
    with mock.patch.object(knapsack, "FEW", 0), mock.patch.object(knapsack, "MOST_UNITS", most_units):
        chosen, more = best(items, capacity), best(items, capacity + 7)
        unit = -(-sum(item.num_bytes for item in items) // most_units)
    assert sum(items[index].num_bytes for index in chosen) <= capacity
    if capacity >= len(items) * unit:
        assert worth(items, chosen) >= by_trying(items, capacity - len(items) * unit)
    assert worth(items, more) >= worth(items, chosen)


def test_of_equally_large_items_more_bytes_take_what_fewer_do() -> None:
    items = [Item(10, (3, -number)) for number in range(200)]
    taken = [set(best(items, 10 * n)) for n in (0, 1, 50, 199, 200)]
    assert [len(each) for each in taken] == [0, 1, 50, 199, 200]
    assert all(fewer < more for fewer, more in itertools.pairwise(taken))


@pytest.mark.parametrize("capacity", [0, 5])
def test_nothing_comes_of_nothing(capacity: int) -> None:
    assert best([], capacity) == []
