"""What is wrong with a configuration, in words."""

import difflib
import types
from typing import get_args, get_origin

from pydantic import BaseModel, ValidationError


def explain(error: ValidationError, document: type[BaseModel], origin: str) -> str:
    """Name every offending key of a document, its value, and what is allowed."""
    lines = []
    for item in error.errors(include_url=False):
        path = tuple(str(part) for part in item["loc"])
        key = ".".join(path) or "(whole document)"
        if item["type"] == "extra_forbidden":
            allowed = sorted(_section_at(document, path[:-1]).model_fields)
            close = difflib.get_close_matches(path[-1], allowed, n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            lines.append(f"{key}: unknown key; {hint}allowed: {', '.join(allowed)}")
        elif item["type"] == "value_error":
            lines.append(f"{key}: {item['ctx']['error']}")
        else:
            lines.append(f"{key}: got {item['input']!r}; {item['msg'][0].lower()}{item['msg'][1:]}")
    return f"{origin}:\n" + "\n".join(f"  {line}" for line in lines)


def _section_at(document: type[BaseModel], path: tuple[str, ...]) -> type[BaseModel]:
    section = document
    for part in path:
        annotation = section.model_fields[part].annotation
        candidates = (
            get_args(annotation) if get_origin(annotation) is types.UnionType else (annotation,)
        )
        for candidate in candidates:
            if isinstance(candidate, type) and issubclass(candidate, BaseModel):
                section = candidate
    return section
