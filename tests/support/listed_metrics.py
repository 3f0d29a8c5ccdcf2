"""The labels of every metric that docs/monitoring.md lists, with the words that each may have."""

import re
from itertools import product
from pathlib import Path

PAGE = (Path(__file__).parents[2] / "docs/monitoring.md").read_text()
Words = frozenset[str] | None  # None: as many as there are workers, nodes or incarnations

_ROW = re.compile(r"^\| `((?:antiphon_|vllm:)\w+)`[^|]*\| ([^|]*) ?\|$", re.MULTILINE)
_LABEL = re.compile(r"`(\w+)`(?:: ([^`]*))?")


def metric_rows() -> list[str]:
    """The metric of each row."""
    return [name for name, _ in _ROW.findall(PAGE)]


def metric_labels() -> dict[str, dict[str, Words]]:
    """By metric, then by label."""
    found: dict[str, dict[str, Words]] = {}
    labels: dict[str, Words] = {}
    for name, cell in _ROW.findall(PAGE):
        if cell.strip() != "the same":
            plain = re.sub(r" ?\([^)]*\)", "", cell)
            labels = {label: _words(words) for label, words in _LABEL.findall(plain)}
        found[name] = labels
    return found


def combinations(labels: dict[str, Words]) -> set[tuple[str, ...]] | None:
    """Every combination of words, in the order of the labels; None if one of them is open."""
    if not labels or any(words is None for words in labels.values()):
        return None
    return set(product(*(words or () for words in labels.values())))


def _words(text: str) -> Words:
    listed = re.split(r"[,;]\s*", text.strip())
    words = frozenset(word.rpartition(": ")[2] for word in listed if word)  # "4xx: unauthorized"
    assert all(re.fullmatch(r"\w+", word) for word in words), words
    return words or None
