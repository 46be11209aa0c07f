"""Packages that take long to import and that few tests need: imported when one of these first asks for something in them."""

from importlib import import_module
from typing import Any


class Lazy:
    """Stands for a package: `Lazy("diffusers").DDPMScheduler`."""

    def __init__(self, name: str):
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(import_module(self._name), attribute)
