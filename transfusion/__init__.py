"""Transfusion: one transformer over text tokens and image patches, for understanding and generating both."""

from importlib import import_module
from importlib.metadata import version

MODULES = {  # name -> the module that defines it; imported on first use, because these modules import torch
    "Engine": "transfusion.inference.engine", "Request": "transfusion.inference.request",
    "Transfusion": "transfusion.model.transfusion", "open_run": "transfusion.inference.engine",
}  # fmt: skip
__all__ = ["__version__", *MODULES]


def __getattr__(name: str):
    if name == "__version__":
        return version("open-transfusion")
    if name in MODULES:
        return getattr(import_module(MODULES[name]), name)
    raise AttributeError(f"module 'transfusion' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
