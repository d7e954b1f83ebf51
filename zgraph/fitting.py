"""Least squares of a few positive parameters on measured times, in the logarithm of the time.

Damped Gauss-Newton steps (Levenberg-Marquardt) with bounds, on the logarithm of the parameters as well: an error of a
tenth counts the same for a short time and a long one. Outliers, which timings have, count by their square root.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Vector: TypeAlias = NDArray[np.float64]

OUTLIER = 0.15
"""Relative error beyond which an error counts as an outlier, and grows only linearly in the sum."""


def fit(
    times: Callable[[Sequence[float]], Sequence[float]],
    measured: Sequence[float],
    start: Sequence[float],
    bounds: Sequence[tuple[float, float]],
    steps: int = 60,
) -> list[float]:
    """The parameters, within their bounds, whose predicted times fit the measured ones best.

    Args:
        times: predicted seconds of every measurement, given the parameters.
        measured: seconds.
        start: first guess of each parameter.
        bounds: lowest and highest of each parameter, all positive.
        steps: at most so many.
    """
    low, high = np.log(np.array(bounds)).T
    target = np.log(np.array(measured))

    def errors(point: Vector) -> Vector:
        found: Vector = np.log(np.array(times(np.exp(point).tolist()))) - target
        return found

    def loss(error: Vector) -> float:
        return float(np.sum(np.sqrt(1 + (error / OUTLIER) ** 2) - 1))

    point = np.clip(np.log(np.array(start)), low, high)
    error, damping = errors(point), 1e-2
    for _ in range(steps):
        slopes = np.array([(errors(point + shift) - error) / 1e-4 for shift in 1e-4 * np.eye(len(point))]).T
        weight = 1 / np.sqrt(1 + (error / OUTLIER) ** 2)
        gradient = slopes.T @ (weight * error)
        # A parameter at a bound that the step would cross stays there, and the others move.
        free = ~((point <= low) & (gradient > 0) | (point >= high) & (gradient < 0))
        if not free.any():
            break
        normal = (slopes.T * weight) @ slopes
        improved = False
        while damping < 1e8 and not improved:
            damped = normal + damping * np.diag(np.diag(normal) + 1e-9)
            step = np.zeros(len(point))
            step[free] = np.linalg.solve(damped[np.ix_(free, free)], -gradient[free])
            candidate = np.clip(point + np.clip(step, -1, 1), low, high)
            candidate_error = errors(candidate)
            improved = loss(candidate_error) < loss(error)
            damping *= 0.2 if improved else 5
        if not improved:
            break
        gained = loss(error) - loss(candidate_error)
        point, error = candidate, candidate_error
        if gained < 1e-9 * (1 + loss(error)):
            break
    return [math.exp(value) for value in point]
