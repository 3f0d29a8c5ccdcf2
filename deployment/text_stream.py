"""Output tokens of one choice to the text that a client may see.

A choice stops where a stop string is first complete: at the smallest end of any occurrence, and of
the stop strings that end there the longest is cut off. That depends on the text alone, so how the
text was cut into chunks never shows. Text that could still become a stop string is held back.

Stop strings are matched by the automaton of Knuth, Morris and Pratt (1977): constant amortised work
per character however long or repetitive a stop string is, and its state is at once the number of
characters that must be held back.
"""

from collections.abc import Collection, Sequence

from antiphon.deployment.backend import Detokenizer


class StopStrings:
    """Cuts a stream of text before the first stop string."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._matchers = [_Matcher(stop) for stop in stops]
        self._held = ""
        self.is_hit = False

    def push(self, text: str) -> str:
        """Return what is now certain to come before any stop string; nothing after a hit."""
        if not self._matchers:
            return text
        if self.is_hit:
            return ""
        held = self._held + text
        for position, char in enumerate(text, start=len(self._held) + 1):
            matched = 0
            for matcher in self._matchers:
                if matcher.advance(char):
                    matched = max(matched, matcher.length)
            if matched:
                self.is_hit = True
                self._held = ""
                return held[: position - matched]
        certain = len(held) - max(matcher.state for matcher in self._matchers)
        self._held = held[certain:]
        return held[:certain]

    def flush(self) -> str:
        """Return what was held back when the text ends without another stop string."""
        held, self._held = self._held, ""
        return held


class TextStream:
    """Assembles the text of one choice and decides when it is finished."""

    def __init__(
        self, detokenizer: Detokenizer, stops: Sequence[str], eos_token_ids: Collection[int]
    ) -> None:
        self._detokenizer = detokenizer
        self._stops = StopStrings(stops)
        self._one_by_one = bool(stops)
        self._eos_token_ids = eos_token_ids
        self.num_tokens = 0  # up to and including the one that completed a stop string
        self.finish_reason: str | None = None

    def push(self, token_ids: Sequence[int], finish_reason: str | None) -> str:
        """Return the new text; tokens after a finish are ignored."""
        if self.finish_reason is not None:
            return ""
        visible = token_ids
        if finish_reason == "stop" and token_ids and token_ids[-1] in self._eos_token_ids:
            visible = token_ids[:-1]
        text = self._decode(visible)
        if self._stops.is_hit:
            self.finish_reason = "stop"
            return text
        self.num_tokens += len(token_ids) - len(visible)
        if finish_reason is not None:
            text += self._stops.push(self._detokenizer.flush())
            text += self._stops.flush()
            self.finish_reason = "stop" if self._stops.is_hit else finish_reason
        return text

    def _decode(self, token_ids: Sequence[int]) -> str:
        if not self._one_by_one:
            self.num_tokens += len(token_ids)
            return self._detokenizer.push(token_ids)
        pieces = []
        for token_id in token_ids:  # one by one, so that it is known which one completes a stop
            self.num_tokens += 1
            pieces.append(self._stops.push(self._detokenizer.push((token_id,))))
            if self._stops.is_hit:
                break
        return "".join(pieces)


class _Matcher:
    """How much of one stop string the text so far ends with."""

    __slots__ = ("_fallback", "_stop", "length", "state")

    def __init__(self, stop: str) -> None:
        self._stop = stop
        self._fallback = _fallback(stop)
        self.length = len(stop)
        self.state = 0  # characters of the stop string that the text ends with

    def advance(self, char: str) -> bool:
        """Take one character; return whether the stop string is complete."""
        state = self.state
        while state and self._stop[state] != char:
            state = self._fallback[state - 1]
        self.state = state + (self._stop[state] == char)
        return self.state == self.length


def _fallback(stop: str) -> list[int]:
    """Return, for each prefix, the length of its longest proper prefix that is also its suffix."""
    table = [0]
    for char in stop[1:]:
        state = table[-1]
        while state and stop[state] != char:
            state = table[state - 1]
        table.append(state + (stop[state] == char))
    return table
