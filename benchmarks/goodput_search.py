"""The highest rate at which enough requests are inside their targets.

    guess --pass--> up by a step until a rate fails   --+
          --fail--> down by a step until a rate passes --+--> bisect --> interpolate

Every measurement is expensive, so the bracket is left wide and the crossing is interpolated.
"""

import math
import statistics
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

WANTED_ATTAINMENT = 0.9
HOPELESS_ATTAINMENT = 0.8  # a measurement ends when it cannot reach this any more
_STEP = 1.3
_NUM_SMALL_STEPS = 3  # then the guess was far off, and steps are twice as large
_BRACKET = 1.16  # one bisection of a step
_MAX_POINTS = 12


@dataclass(frozen=True, slots=True)
class Point:
    """One measurement; of one that ended early ``attainment`` is an upper bound."""

    rate: float
    attainment: float

    @property
    def passes(self) -> bool:
        """Whether enough requests were inside their targets."""
        return self.attainment >= WANTED_ATTAINMENT


def median_of_rounds(rounds: Sequence[float]) -> float:
    """What a system reached in several searches.

    Where there are more, the first only chose between systems: the best of several owes some of it
    to luck.
    """
    return statistics.median(rounds[1:] or rounds)


async def find_goodput(
    measure: Callable[[float], Awaitable[float]], guess: float, at_least: float = 0.0
) -> tuple[float, list[Point]]:
    """Return the rate at which attainment crosses what is wanted, and what was measured.

    Args:
        measure: Returns the attainment at a rate of requests per second.
        guess: Where to begin.
        at_least: A lower result is of no interest: 0.0 is returned as soon as it is sure.
    """
    points: list[Point] = []

    async def try_rate(rate: float) -> Point:
        points.append(Point(rate, await measure(rate)))
        return points[-1]

    low, high = await _bracket(try_rate, guess, at_least)
    if low is None or high is None:
        return (low.rate if low else 0.0), points
    while high.rate / low.rate > _BRACKET and len(points) < _MAX_POINTS:
        middle = await try_rate(math.sqrt(low.rate * high.rate))
        low, high = (middle, high) if middle.passes else (low, middle)
    return crossing(low, high), points


def crossing(low: Point, high: Point) -> float:
    """Interpolate, on a logarithmic scale, between a rate that passes and one that fails."""
    share = (low.attainment - WANTED_ATTAINMENT) / (low.attainment - high.attainment)
    return low.rate * (high.rate / low.rate) ** share


async def _bracket(
    try_rate: Callable[[float], Awaitable[Point]], guess: float, at_least: float
) -> tuple[Point | None, Point | None]:
    low: Point | None = None
    high: Point | None = None
    rate = guess
    for index in range(_MAX_POINTS - 2):
        step = _STEP if index < _NUM_SMALL_STEPS else _STEP**2
        point = await try_rate(rate)
        if point.passes:
            low = point
            rate *= step
        else:
            high = point
            if rate <= at_least:
                return None, high
            rate /= step
        if low is not None and high is not None:
            break
    return low, high
