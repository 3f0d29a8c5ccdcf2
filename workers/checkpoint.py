"""Loads a checkpoint through transformers, and refuses what that would load as another model.

transformers fills in at random what a checkpoint lacks, drops what the model has no place for, and
says so in a log of its own that no replica shows. Code that comes with a checkpoint is never run.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig
from transformers import AutoModelForCausalLM as AutoModel

from antiphon.errors import ConfigError
from antiphon.kernels.kernel_set import KernelSet
from antiphon.workers.paged_model import PagedModel

logger = logging.getLogger(__name__)

_MAX_NAMED = 5


def load_model(
    folder: Path, dtype: torch.dtype | None, device: torch.device, kernels: KernelSet
) -> PagedModel:
    """Load weights from a folder, in the checkpoint's own dtype if ``dtype`` is None.

    Raises:
        ConfigError: The folder does not hold a causal language model, or not all of its weights.
        UnsupportedModelError: The family cannot be served.
    """
    from_pretrained: Any = AutoModel.from_pretrained
    with telling_why(folder):
        model, info = from_pretrained(
            folder,
            config=read_family(folder),
            dtype=dtype or "auto",
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are in the information, and refused below
        )
    _check_weights(folder, info)
    return PagedModel(model.to(device).eval(), kernels)


def read_family(folder: Path) -> Any:
    """Return transformers' configuration of the model in a folder."""
    return AutoConfig.from_pretrained(folder, trust_remote_code=False)


@contextmanager
def telling_why(folder: Path) -> Iterator[None]:
    """Turn what transformers raises about a folder into ``ConfigError``."""
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        if "trust_remote_code" in str(error):
            raise ConfigError(
                f"{folder}: its model code comes with the checkpoint (auto_map in config.json) and "
                "is not run; only families that are part of transformers are served"
            ) from error
        raise ConfigError(
            f"{folder}: cannot be loaded as a causal language model: {error}"
        ) from error


def _check_weights(folder: Path, info: dict[str, Any]) -> None:
    problems = [f"no {name}" for name in sorted(info["missing_keys"])]
    problems += [
        f"{name} of shape {tuple(found)} in place of {tuple(wanted)}"
        for name, found, wanted in sorted(info["mismatched_keys"])
    ]
    if problems:
        raise ConfigError(
            f"{folder}: its weights are not those of the model that its config.json describes: it "
            f"has {_some(problems)}"
        )
    if unread := sorted(info["unexpected_keys"]):
        logger.warning("the model has no place for these weights of its folder: %s", _some(unread))


def _some(names: list[str]) -> str:
    more = len(names) - _MAX_NAMED
    return ", ".join(names[:_MAX_NAMED]) + (f" and {more} more" if more > 0 else "")
