"""Which combinations of a test's parameters ``make test`` tries, and which only ``make nightly``."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import pytest
from allpairspy import AllPairs


def pairwise(*quick: tuple[Any, ...], **choices: Sequence[Any]) -> Any:
    """Parametrize a test by all combinations of these choices; ``make test`` tries each pair of values.

    Args:
        quick: combinations for the quick lane, too.
        choices: values by the name of the argument.
    """
    tested = {_key(found) for found in AllPairs(OrderedDict(choices))} | {_key(found) for found in quick}
    return _parametrized(tuple(choices), itertools.product(*choices.values()), tested, {_key(found) for found in quick})


def in_turn(first: str, values: Sequence[Any], others: str, combinations: Sequence[Any]) -> Any:
    """Parametrize a test by all values and combinations; ``make test`` tries each value with one of them, in turn.

    Args:
        first, others: names of arguments, separated by commas.
    """
    names = (first, *(name.strip() for name in others.split(",")))
    flat = [found if isinstance(found, tuple) else (found,) for found in combinations]
    tested = {_key((value, *flat[index % len(flat)])) for index, value in enumerate(values)}
    return _parametrized(names, ((value, *found) for value in values for found in flat), tested, set())


def _parametrized(names: tuple[str, ...], found: Any, tested: set[str], quick: set[str]) -> Any:
    def marks(values: tuple[Any, ...]) -> list[Any]:
        if _key(values) in quick:
            return []
        return [pytest.mark.slow] if _key(values) in tested else [pytest.mark.slow, pytest.mark.nightly]

    params = [pytest.param(*values, marks=marks(values), id="-".join(map(str, values))) for values in found]
    return pytest.mark.parametrize(names, params)


def _key(values: Any) -> str:
    return repr(tuple(values))
