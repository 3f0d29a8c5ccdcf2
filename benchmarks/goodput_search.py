"""The highest rate at which enough requests are inside their targets.

One system alone is searched for:

    guess --pass--> up by a step until a rate fails   --+
          --fail--> down by a step until a rate passes --+--> bisect --> interpolate

Every measurement is expensive, so the bracket is left wide and the crossing is interpolated.

Two systems that take turns are measured a little above and below where their crossing is by all
measurements so far. Those are pooled: attainment cannot rise with the rate, so the closest curve
that does not rise (isotonic regression) says where it crosses.
"""

import math
import random
import statistics
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

WANTED_ATTAINMENT = 0.9
HOPELESS_ATTAINMENT = 0.8  # a measurement ends when it cannot reach this any more
_STEP = 1.3
_NUM_SMALL_STEPS = 3  # then the guess was far off, and steps are twice as large
FINE_BRACKET = 1.16  # one bisection of a step
COARSE_BRACKET = 1.35  # none after small steps, where systems take turns afterwards
_ASIDE = 1.1  # how far from the crossing systems that take turns are measured
_NUM_RESAMPLES = 1000
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


def pooled_goodput(points: Sequence[Point]) -> float:
    """Return where the closest curve that does not rise crosses the wanted attainment.

    Where no rate passes, or none fails, one step below the lowest or above the highest.
    """
    points = sorted(points, key=lambda point: point.rate)
    fitted = [
        Point(point.rate, attainment)
        for point, attainment in zip(points, _not_rising(points), strict=True)
    ]
    passing = [point for point in fitted if point.passes]
    failing = [point for point in fitted if not point.passes]
    if not passing:
        return failing[0].rate / _ASIDE**2
    if not failing:
        return passing[-1].rate * _ASIDE**2
    return crossing(passing[-1], failing[0])


def rates_around(goodput: float) -> tuple[float, float]:
    """Return the rates that say most about a crossing there."""
    return goodput / _ASIDE, goodput * _ASIDE


def ratio_interval(rounds: Sequence[tuple[Sequence[Point], Sequence[Point]]]) -> list[float]:
    """Return between which ratios of two systems 80 % of what the rounds could have given lie.

    Whole rounds are drawn again with replacement, because what differs between rounds is the
    machine, which the points of one round share.

    Args:
        rounds: Points of the one and of the other system, for each round.
    """
    rng = random.Random(0)
    ratios = []
    for _ in range(_NUM_RESAMPLES):
        drawn = rng.choices(rounds, k=len(rounds))
        one, other = ([point for row in drawn for point in row[side]] for side in (0, 1))
        ratios.append(pooled_goodput(one) / pooled_goodput(other))
    tenths = statistics.quantiles(ratios, n=10)
    return [tenths[0], tenths[-1]]


def _not_rising(points: Sequence[Point]) -> list[float]:
    """Pool neighbours that rise until none does; points are in the order of their rates."""
    means: list[float] = []
    sizes: list[int] = []
    for point in points:
        means.append(point.attainment)
        sizes.append(1)
        while len(means) > 1 and means[-2] <= means[-1]:
            mean, size = means.pop(), sizes.pop()
            means[-1] = (means[-1] * sizes[-1] + mean * size) / (sizes[-1] + size)
            sizes[-1] += size
    return [mean for mean, size in zip(means, sizes, strict=True) for _ in range(size)]


async def find_goodput(
    measure: Callable[[float], Awaitable[float]],
    guess: float,
    bracket: float = FINE_BRACKET,
    at_least: float = 0.0,
) -> tuple[float, list[Point]]:
    """Return the rate at which attainment crosses what is wanted, and what was measured.

    Args:
        measure: Returns the attainment at a rate of requests per second.
        guess: Where to begin.
        bracket: How far apart the rates may lie that the crossing is interpolated between.
        at_least: A lower result is of no interest: 0.0 is returned as soon as it is sure.
    """
    points: list[Point] = []

    async def try_rate(rate: float) -> Point:
        points.append(Point(rate, await measure(rate)))
        return points[-1]

    low, high = await _bracket(try_rate, guess, at_least)
    if low is None or high is None:
        return (low.rate if low else 0.0), points
    while high.rate / low.rate > bracket and len(points) < _MAX_POINTS:
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
