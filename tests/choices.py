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


def in_turn(first: str, values: Sequence[Any], others: str, combinations: Sequence[Any], *quick: Any) -> Any:
    """Parametrize a test by all values and combinations; ``make test`` tries each value with one of them, in turn.

    Args:
        first, others: names of arguments, separated by commas.
        values, combinations: what these are; tuples where they are several.
        quick: those of the values that the quick lane tries, too.
    """
    names = tuple(name.strip() for name in f"{first}, {others}".split(","))

    def flat(value: Any, of: str) -> tuple[Any, ...]:
        return value if "," in of else (value,)

    found = [flat(combination, others) for combination in combinations]
    size = len(found)
    turns = [found[(i + i // size) % size] for i in range(len(values))]  # each round begins one further on
    tested = {_key((*flat(v, first), *turn)): v in quick for v, turn in zip(values, turns, strict=True)}
    every = ((*flat(value, first), *combination) for value in values for combination in found)
    return _parametrized(names, every, set(tested), {key for key, is_quick in tested.items() if is_quick})


def _parametrized(names: tuple[str, ...], found: Any, tested: set[str], quick: set[str]) -> Any:
    def marks(values: tuple[Any, ...]) -> list[Any]:
        if _key(values) in quick:
            return []
        return [pytest.mark.slow] if _key(values) in tested else [pytest.mark.slow, pytest.mark.nightly]

    params = [pytest.param(*values, marks=marks(values), id="-".join(map(_name, values))) for values in found]
    return pytest.mark.parametrize(names, params)


def _name(value: Any) -> str:
    return getattr(value, "__name__", None) or str(value)


def _key(values: Any) -> str:
    return repr(tuple(values))
