"""What a router assumes of a worker whose rates nobody measured, or that were measured long ago.

    measured lately, or busy         what the worker says
    never measured                   the median of its peers, which have its role
    measured long ago, idle since    that median, if it is better

A rate is measured by working. Without this, who has not worked yet counts as slow as the default,
and who was slow once, in a first step or while the machine did something else, as slow as it was
then: neither is given work while its peers are better, so neither is ever measured. A worker that
really is slower than its peers is found out again at each trial, once in ``_OLD_SECONDS``.
"""

import statistics
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from msgspec.structs import replace

from antiphon.messages import Load

_OLD_SECONDS = 10.0


@dataclass(slots=True)
class MeasuredRates:
    """One worker's rates as it reported them, and what is assumed in their place."""

    load: Load
    prefill_at: float  # when its rate changed, so when it was measured
    decode_at: float
    assumed_prefill: float | None = None
    assumed_decode: float | None = None

    def report(self, load: Load, now: float) -> Load:
        """Take in a report; return it with what is assumed."""
        if load.prefill_tokens_per_second != self.load.prefill_tokens_per_second:
            self.prefill_at, self.assumed_prefill = now, None
        if load.decode_step_seconds != self.load.decode_step_seconds:
            self.decode_at, self.assumed_decode = now, None
        self.load = load
        return self.believed()

    def is_valid(self, measured_at: float, now: float) -> bool:
        """Whether a measurement tells of now; who is busy and measures nothing is slow indeed."""
        is_busy = self.load.num_running or self.load.num_waiting
        return bool(is_busy) or now - measured_at < _OLD_SECONDS

    def believed(self) -> Load:
        """The last report, with what is assumed."""
        load = self.load
        if self.assumed_prefill is not None:
            load = replace(load, prefill_tokens_per_second=self.assumed_prefill)
        if self.assumed_decode is not None:
            load = replace(load, decode_step_seconds=self.assumed_decode)
        return load


def assume(peers: Iterable[MeasuredRates], now: float) -> None:
    """Decide anew what is assumed of workers of one role."""
    peers = tuple(peers)
    rates = [(e.load.prefill_tokens_per_second, e.is_valid(e.prefill_at, now)) for e in peers]
    steps = [(e.load.decode_step_seconds, e.is_valid(e.decode_at, now)) for e in peers]
    prefills, decodes = _assumed(rates, max), _assumed(steps, min)
    for each, prefill, decode in zip(peers, prefills, decodes, strict=True):
        each.assumed_prefill, each.assumed_decode = prefill, decode


def _assumed(
    measured: list[tuple[float, bool]], better: Callable[[float, float], float]
) -> Iterator[float | None]:
    """For each value, and whether it is valid, another one or None; 0 was never measured."""
    known = [value for value, _ in measured if value]
    valid = [value for value, is_valid in measured if value and is_valid]
    typical = statistics.median(valid or known) if known else 0.0
    for value, is_valid in measured:
        stands = value and (is_valid or better(value, typical) == value)
        yield typical if known and not stands else None
