"""Writes down what ``antiphon doctor`` found, for people and for programs."""

import json
import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from antiphon.deployment.doctor.diagnosis import CHECKS
from antiphon.deployment.doctor.facts import ClusterFacts, Finding, Node, Severity
from antiphon.deployment.doctor.node_checks import gib
from antiphon.deployment.doctor.placement import nodes_for

_WIDTH = 100
_MAX_LINKS = 16  # that are listed; all of them are in the JSON


def as_text(facts: ClusterFacts, findings: Sequence[Finding]) -> str:
    """Nodes, links, findings, and a last line with the verdict."""
    head = ["node", "for", "cores", "memory", "/dev/shm", "GPUs"]
    nodes = _table([head, *(_cells(facts, member) for member in facts.members)])
    return "\n".join([*nodes, "", *_links(facts), *_findings(findings), verdict(findings)])


def as_json(facts: ClusterFacts, findings: Sequence[Finding]) -> str:
    """Findings and facts; keys are those of the dataclasses, units are in their names."""
    document: dict[str, Any] = asdict(facts)
    del document["config"], document["shape"]
    return json.dumps({"findings": [asdict(one) for one in findings], **document}, indent=2)


def verdict(findings: Sequence[Finding]) -> str:
    """One line."""
    problems = num_problems(findings)
    warnings = len(findings) - problems
    if not findings:
        return f"ok: {len(CHECKS)} checks"
    return f"{_count(problems, 'problem')}, {_count(warnings, 'warning')}"


def num_problems(findings: Sequence[Finding]) -> int:
    """How many findings are more than warnings."""
    return sum(finding.severity is Severity.PROBLEM for finding in findings)


def _cells(facts: ClusterFacts, member: Node) -> list[str]:
    roles = [role for role in facts.config.pools if nodes_for(facts.config, role, [member])]
    named = [member.name, " ".join(roles) or "-"]
    node = facts.nodes.get(member.name)
    if node is None:
        return [*named, "?", "?", "?", f"{member.resources.get('GPU', 0):g}, by Ray"]
    gpus = Counter(gpu.name for gpu in node.gpus)
    sizes = [f"{node.cores:g}", gib(node.memory_bytes), gib(node.shared_memory_bytes)]
    return [*named, *sizes, ", ".join(f"{n} x {name}" for name, n in gpus.items()) or "-"]


def _links(facts: ClusterFacts) -> Iterator[str]:
    """The slowest ones."""
    made = [link for link in facts.links if link.error is None]
    made.sort(key=lambda link: link.bytes_per_second)
    rows = [["link", "set-up", "round trip", "rate"]]
    rows += [
        [
            link.where,
            f"{link.setup_seconds * 1e3:.1f} ms",
            f"{link.round_trip_seconds * 1e3:.2f} ms",
            f"{link.bytes_per_second / 1e9:.2f} GB/s",
        ]
        for link in made[:_MAX_LINKS]
    ]
    if made:
        yield from _table(rows)
        if len(made) > _MAX_LINKS:
            yield f"and {len(made) - _MAX_LINKS} faster ones"
        yield ""


def _findings(findings: Sequence[Finding]) -> Iterator[str]:
    failed = {finding.check for finding in findings}
    good = [name for name in CHECKS if name not in failed]
    yield from textwrap.wrap(f"ok: {', '.join(good)}", _WIDTH, subsequent_indent="    ")
    yield ""
    for finding in findings:
        yield f"{finding.severity}: {finding.check}, {finding.where}"
        for word in ("found", "wanted", "mend"):
            indent = f"  {word:<8}"
            yield from textwrap.wrap(
                getattr(finding, word), _WIDTH, initial_indent=indent, subsequent_indent=" " * 10
            )
        yield ""


def _table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        yield "  ".join(cells).rstrip()


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
