"""Reads a configuration from a file or a mapping, and says in words what is wrong with it.

Unknown keys are errors. An error names every offending key, its value, and what is allowed.
"""

import difflib
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from antiphon.config import AntiphonConfig
from antiphon.errors import ConfigError


def parse_config(data: Mapping[str, Any] | None, origin: str = "configuration") -> AntiphonConfig:
    """Check a configuration document.

    Raises:
        ConfigError: Names every offending key with its value and what is allowed.
    """
    try:
        return AntiphonConfig.model_validate(dict(data or {}))
    except ValidationError as error:
        raise ConfigError(_explain(error, origin)) from None


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping.

    Raises:
        ConfigError: The file is missing, is not YAML, or holds something other than a mapping.
    """
    try:
        data = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: is not valid YAML: {error}") from None
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected a mapping at the top, got {type(data).__name__}")
    return data


def _explain(error: ValidationError, origin: str) -> str:
    """Name every offending key, its value, and what is allowed."""
    lines = []
    for item in error.errors(include_url=False):
        path = tuple(str(part) for part in item["loc"])
        key = ".".join(path) or "(whole document)"
        if item["type"] == "extra_forbidden":
            allowed = sorted(_section_at(path[:-1]).model_fields)
            close = difflib.get_close_matches(path[-1], allowed, n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            lines.append(f"{key}: unknown key; {hint}allowed: {', '.join(allowed)}")
        elif item["type"] == "value_error":
            lines.append(f"{key}: {item['ctx']['error']}")
        else:
            lines.append(f"{key}: got {item['input']!r}; {item['msg'][0].lower()}{item['msg'][1:]}")
    return f"{origin}:\n" + "\n".join(f"  {line}" for line in lines)


def _section_at(path: tuple[str, ...]) -> type[BaseModel]:
    section: type[BaseModel] = AntiphonConfig
    for part in path:
        annotation = section.model_fields[part].annotation
        candidates = (
            get_args(annotation) if get_origin(annotation) is types.UnionType else (annotation,)
        )
        for candidate in candidates:
            if isinstance(candidate, type) and issubclass(candidate, BaseModel):
                section = candidate
    return section
