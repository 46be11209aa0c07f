"""Slow packages that few tests need, imported on first use."""

from importlib import import_module
from typing import Any


class Lazy:
    """A package that is imported on first use: `Lazy("diffusers").DDPMScheduler`."""

    def __init__(self, name: str):
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(import_module(self._name), attribute)
