"""PromQL that the panels have in common.

Samples carry ``job`` (one scrape job is one deployment), and from service discovery ``pool``,
``worker`` and ``node``. What an ingress says of workers and pools carries their labels instead of
its own, because the scrape configuration honours labels.
"""

JOB = 'job="$job"'
WORKERS = f'{JOB}, pool=~"$pool", worker=~"$worker"'
INGRESS = f'{JOB}, role="ingress"'
_WINDOW = "$__rate_interval"


def rate(metric: str, *, by: str = "", where: str = JOB) -> str:
    """Increase per second of a counter, summed over processes but for the labels in ``by``."""
    return f"{_sum(by)}(rate({metric}{{{where}}}[{_WINDOW}]))"


def share(part: str, whole: str) -> str:
    """One rate over another, without labels to match."""
    return f"{part} / {whole}"


def quantile(q: float, histogram: str, *, by: str = "", where: str = JOB) -> str:
    """An estimate from a histogram's buckets."""
    labels = f"le, {by}" if by else "le"
    return f"histogram_quantile({q}, {rate(f'{histogram}_bucket', by=labels, where=where)})"


def quantiles(histogram: str, *, where: str = JOB) -> tuple[tuple[str, str], ...]:
    """Median, 90th and 99th percentile, each with its legend."""
    return tuple(
        (legend, quantile(q, histogram, where=where))
        for legend, q in (("median", 0.5), ("90 %", 0.9), ("99 %", 0.99))
    )


def mean(histogram: str, *, by: str = "", where: str = JOB) -> str:
    """Mean of what a histogram observed."""
    total = rate(f"{histogram}_sum", by=by, where=where)
    return f"{total} / {rate(f'{histogram}_count', by=by, where=where)}"


def total(gauge: str, *, by: str = "", where: str = JOB) -> str:
    """Sum of a gauge over processes."""
    return f"{_sum(by)}({gauge}{{{where}}})"


def _sum(by: str) -> str:
    return f"sum by ({by}) " if by else "sum"
