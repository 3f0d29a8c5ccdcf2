"""Says what docs/configuration.md should be; run as a program it writes the page.

Everything below the introduction comes from the models in ``antiphon.config``, so a key cannot be
without its type, bounds, default and meaning.
"""

import json
import types
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le
from pydantic import BaseModel, ByteSize
from pydantic.fields import FieldInfo

from antiphon.config import AntiphonConfig, PoolConfig

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/configuration.md"
_INTRODUCTION = """\
# Configuration

Every key of the one document that describes a deployment. Written by `make reference` from
`src/antiphon/config.py`; change it there.

The document is the file of `antiphon serve --config`, the `args` of a Serve application, and
`config` in the chart's values. Unknown keys and wrong values are refused; the error names the key,
the value and what is allowed.

```bash
antiphon config check pools.yaml    # ok and a summary, or every problem; exits with 0 or 1
antiphon config show pools.yaml     # the whole document with its defaults
```

Both take a Serve config file and a values file too. A pool that is named without `replicas` has one
worker. Somebody must decode: `decode.replicas` and `colocated.replicas` cannot both be 0, and
prefill workers need decode workers.
"""
_NAMES: dict[Any, str] = {
    str: "text",
    int: "integer",
    float: "number",
    bool: "true or false",
    ByteSize: "bytes, such as 2GiB",
}
_BOUNDS = ((Ge, "ge", "at least"), (Gt, "gt", "above"), (Le, "le", "at most"))
_HEAD = "| key | type | default | meaning |\n|---|---|---|---|"


def short_row(row: str) -> str:
    """A row without its type, as the README has it."""
    key, _, rest = row.removeprefix("| ").partition(" | ")
    return f"| {key} | {rest.partition(' | ')[2]}"


def page_text() -> str:
    """The page as it should be."""
    parts = [_INTRODUCTION]
    for name, field in AntiphonConfig.model_fields.items():
        section = field.annotation
        assert isinstance(section, type)
        assert issubclass(section, BaseModel)
        if section is not PoolConfig:
            parts.append(_section(f"`{name}`", section, rows(section, f"{name}.")))
    pools = [name for name, field in AntiphonConfig.model_fields.items() if _is_pool(field)]
    heading = ", ".join(f"`{name}`" for name in pools)
    parts.insert(2, _section(heading, PoolConfig, _pool_rows(pools)))
    return "\n".join(parts)


def _section(heading: str, section: type[BaseModel], lines: Iterable[str]) -> str:
    return "\n".join([f"## {heading}\n", f"{section.__doc__}\n", _HEAD, *lines]) + "\n"


def _is_pool(field: FieldInfo) -> bool:
    return field.annotation is PoolConfig


def _pool_rows(pools: list[str]) -> Iterator[str]:
    """Pools differ in the default of ``replicas`` alone."""
    replicas = PoolConfig.model_fields["replicas"]
    for name in pools:
        default = AntiphonConfig.model_fields[name].default.replicas
        yield _row(f"{name}.replicas", replicas, default)
    for row in rows(PoolConfig, "<pool>."):
        if not row.startswith("| `<pool>.replicas`"):
            yield row


def rows(section: type[BaseModel], prefix: str) -> Iterator[str]:
    """One row for each key, those of sections inside it included."""
    for name, field in section.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from rows(kind, f"{prefix}{name}.")
        else:
            yield _row(f"{prefix}{name}", field, field.get_default(call_default_factory=True))


def _row(key: str, field: FieldInfo, default: Any) -> str:
    kind = type_text(field.annotation, field.metadata)
    return f"| `{key}` | {kind} | `{json.dumps(default)}` | {field.description} |"


def type_text(annotation: Any, metadata: Iterable[Any] = ()) -> str:
    """A type with its bounds, in words."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return type_text(arguments[0], arguments[1:])
    if origin in (Union, types.UnionType):
        return "; or ".join(type_text(argument) for argument in arguments)
    if origin is Literal:
        return ", ".join(f"`{choice}`" for choice in arguments)
    if origin is dict:
        return f"{type_text(arguments[0])} to {type_text(arguments[1])}"
    if annotation is type(None):
        return "null"
    return ", ".join([_NAMES[annotation], *_bounds(metadata)])


def _bounds(metadata: Iterable[Any]) -> Iterator[str]:
    for item in metadata:
        if isinstance(item, FieldInfo):
            yield from _bounds(item.metadata)
        for kind, attribute, words in _BOUNDS:
            if isinstance(item, kind):
                yield f"{words} {getattr(item, attribute)}"


if __name__ == "__main__":
    PAGE.write_text(page_text())
