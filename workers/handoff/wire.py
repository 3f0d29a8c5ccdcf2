"""What sender and receiver must agree on before a byte of KV crosses."""

import json
from dataclasses import dataclass

from antiphon.errors import LayoutMismatchError

WIRE_VERSION = 1
# What a difference counts as; the first that applies, and otherwise as one of the layout.
_REASONS = {"wire version": "version", "model fingerprint": "model"}


@dataclass(frozen=True, slots=True)
class WireFormat:
    """The meaning of a segment's bytes.

    Args:
        model_fingerprint: Equal for equal weights.
        layers: Per layer the number of KV heads, the width of K and the width of V.
        dtype: Of the elements on the wire, such as ``float32``.
    """

    model_fingerprint: str
    layers: tuple[tuple[int, int, int], ...]
    dtype: str

    def describe(self) -> bytes:
        """The format as the handshake sends it; ``check_peer`` reads it."""
        fields = {
            "wire version": WIRE_VERSION,
            "model fingerprint": self.model_fingerprint,
            "number of layers": len(self.layers),
            "layers (KV heads, K width, V width)": [list(layer) for layer in self.layers],
            "wire dtype": self.dtype,
        }
        return json.dumps(fields, sort_keys=True).encode()

    def check_peer(self, description: bytes, peer: str) -> None:
        """Compare with what the other end says of itself.

        Raises:
            LayoutMismatchError: Names every field that differs, with both values.
        """
        if description == self.describe():
            return
        ours = json.loads(self.describe())
        try:
            theirs = dict(json.loads(description))
        except (ValueError, TypeError):
            message = f"{peer} sent no readable wire format"
            raise LayoutMismatchError("version", message) from None
        names = {name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)}
        differences = [
            f"{name} is {_shorten(ours.get(name))} here and {_shorten(theirs.get(name))} there"
            for name in sorted(names)
        ]
        raise LayoutMismatchError(
            _reason(names),
            f"{peer} has another KV layout: {'; '.join(differences)}. "
            "Prefill and decode workers must serve the same model with the same handoff.wire_dtype",
        )


def _reason(names: set[str]) -> str:
    for name, reason in _REASONS.items():
        if name in names:
            return reason
    return "dtype" if names == {"wire dtype"} else "layout"


def _shorten(value: object, max_chars: int = 80) -> str:
    text = json.dumps(value)
    return text if len(text) <= max_chars else f"{text[:max_chars]}..."
