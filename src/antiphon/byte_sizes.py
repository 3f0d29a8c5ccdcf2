"""Sizes in bytes as people write them: 2147483648, 2GiB, 500 MB, and 2Gi as Kubernetes has it.

Units with an i are powers of 1024, the others of 1000, as in both. The chart's schema is made from
these types, so ``helm`` refuses what this refuses.
"""

import re
from typing import Annotated, Any

from pydantic import BeforeValidator, ByteSize, Field, WithJsonSchema

_PATTERN = r"^\s*\d*\.?\d+\s*([kKmMgGtTpPeE]i?)?[bB]?\s*$"


def _with_unit(value: Any) -> Any:
    """Write a size as pydantic reads it: it knows no Ki, and overlooks what follows a unit."""
    if not isinstance(value, str):
        return value
    if re.match(_PATTERN, value) is None:
        raise ValueError(
            f"got {value!r}; a size is a number of bytes, or has a unit such as 2GiB, 2Gi or 500MB"
        )
    text = value.strip()
    return f"{text}B" if text.endswith("i") else text


def _schema(minimum: int) -> WithJsonSchema:
    text = {"type": "string", "pattern": _PATTERN}
    return WithJsonSchema({"anyOf": [text, {"type": "integer", "minimum": minimum}]})


Bytes = Annotated[ByteSize, BeforeValidator(_with_unit), Field(ge=0), _schema(0)]
PositiveBytes = Annotated[ByteSize, BeforeValidator(_with_unit), Field(gt=0), _schema(1)]
