"""``antiphon plan``: reads a model's config.json, asks ``capacity_plan``, prints the answer."""

import json
import logging
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

from antiphon.config import DEFAULT_MODEL, KVDtype
from antiphon.deployment.capacity_model import ITEM_BYTES, Assumptions, Formats, GpuModel
from antiphon.deployment.capacity_plan import Plan, make_plan
from antiphon.deployment.capacity_pools import Demand
from antiphon.deployment.gpus import GPUS, find_gpu
from antiphon.deployment.plan_report import as_json, as_text
from antiphon.errors import ConfigError
from antiphon.workers.model_shape import ModelShape
from antiphon.workers.model_source import config_folder, with_name

_UNITS = {"ms": 1e-3, "s": 1.0}
_DEFAULTS = Assumptions()
WeightDtype = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass(frozen=True, slots=True)
class Dtypes:
    """As they were asked for; ``auto`` is the checkpoint's."""

    weights: WeightDtype
    kv_cache: KVDtype
    wire: KVDtype


def plan(
    model: Annotated[
        str,
        typer.Argument(
            help=f"Folder with config.json (weights are not read), hub name, or {DEFAULT_MODEL}."
        ),
    ],
    gpu: Annotated[str, typer.Option(help=f"One of {', '.join(GPUS)}.")],
    ttft: Annotated[str, typer.Option(help="Time to the first token, such as 500ms.")],
    tpot: Annotated[str, typer.Option(help="Time for each further token, such as 50ms.")],
    rate: Annotated[float, typer.Option(help="Requests per second.")],
    prompt_tokens: Annotated[
        int, typer.Option(help="Mean, without what caches hold.", min=2)
    ] = 1024,
    output_tokens: Annotated[int, typer.Option(help="Mean.", min=1)] = 256,
    dtype: Annotated[WeightDtype, typer.Option(help="Of the weights.")] = "auto",
    kv_cache_dtype: Annotated[KVDtype, typer.Option(help="Of both pools' caches.")] = "auto",
    wire_dtype: Annotated[KVDtype, typer.Option(help="Between the pools.")] = "auto",
    compute_share: Annotated[
        float, typer.Option(help="Of peak FLOPs that prefill reaches.", min=0.01, max=1)
    ] = _DEFAULTS.compute_share,
    memory_share: Annotated[
        float, typer.Option(help="Of peak bandwidth that decode reaches.", min=0.01, max=1)
    ] = _DEFAULTS.memory_share,
    utilisation: Annotated[
        float, typer.Option(help="Of each pool and link that is planned for.", min=0.01, max=0.95)
    ] = _DEFAULTS.utilisation,
    step_overhead: Annotated[
        str, typer.Option(help="Of every step, beside the GPU's work.")
    ] = f"{_DEFAULTS.step_overhead_seconds * 1e3:g}ms",
    link_bytes_per_second: Annotated[
        float, typer.Option(help="KV that a worker can send, or receive.", min=1)
    ] = _DEFAULTS.link_bytes_per_second,
    is_json: Annotated[bool, typer.Option("--json", help="Print numbers for programs.")] = False,
) -> None:
    """Say how many GPUs meet two latencies at a rate, by data sheets and stated assumptions."""
    try:
        demand = Demand(
            ttft_seconds=seconds("--ttft", ttft),
            tpot_seconds=seconds("--tpot", tpot),
            requests_per_second=_positive("--rate", rate),
            prompt_tokens=prompt_tokens,
            output_tokens=output_tokens,
        )
        assumptions = Assumptions(
            compute_share=compute_share,
            memory_share=memory_share,
            utilisation=utilisation,
            step_overhead_seconds=seconds("--step-overhead", step_overhead),
            link_bytes_per_second=link_bytes_per_second,
        )
        model = _source(model)
        chosen = find_gpu(gpu)
        shape = _read(model)
        formats = resolve(shape, Dtypes(dtype, kv_cache_dtype, wire_dtype))
        answer = make_plan(GpuModel(shape, chosen, formats, assumptions), demand)
    except ConfigError as error:
        typer.secho(f"error: {error}", fg="red", err=True)
        raise typer.Exit(2) from None
    typer.echo(_print(answer, model, is_json))


def _print(answer: Plan, model: str, is_json: bool) -> str:
    return json.dumps(as_json(answer, model), indent=2) if is_json else as_text(answer, model)


def _source(model: str) -> str:
    """What serves is the folder of a config.json."""
    path = Path(model).expanduser()
    return str(path.parent.resolve()) if path.name == "config.json" else with_name(model)


def _read(model: str) -> ModelShape:
    folder = config_folder(model, lambda line: typer.echo(line, err=True))
    # torch and transformers take seconds to import: only now, so that bad options answer at once.
    from antiphon.workers.shape_reader import read_shape

    logging.getLogger("transformers").setLevel(logging.ERROR)  # it comments on configurations
    return read_shape(folder)


def resolve(shape: ModelShape, dtypes: Dtypes) -> Formats:
    """Fill in what is ``auto``.

    Raises:
        ConfigError: The checkpoint's dtype is wanted, and config.json does not name a known one.
    """
    weights = dtypes.weights if dtypes.weights != "auto" else shape.dtype
    if weights is None or weights not in ITEM_BYTES:
        raise ConfigError(
            f"config.json says that weights are {weights or 'of no named dtype'}; give --dtype"
        )
    kv_cache, wire = (
        weights if given == "auto" else given for given in (dtypes.kv_cache, dtypes.wire)
    )
    return Formats(weights, kv_cache, wire)


def seconds(option: str, text: str) -> float:
    """Read a time such as 500ms or 0.5s.

    Raises:
        ConfigError: Names the option, and what is allowed.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(ms|s)", text.strip())
    value = float(found[1]) * _UNITS[found[2]] if found else 0.0
    if value <= 0:
        raise ConfigError(f"{option}: got {text!r}; a time above 0, such as 500ms or 0.5s")
    return value


def _positive(option: str, value: float) -> float:
    if not 0 < value < math.inf:  # false of nan too
        raise ConfigError(f"{option}: got {value:g}; a finite number above 0")
    return value
