"""Antiphon: disaggregated prefill/decode serving of large language models on Ray Serve."""

from importlib.metadata import version

__version__ = version("antiphon")
