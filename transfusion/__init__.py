"""Transfusion: one transformer over text tokens and image patches, that reads, writes and draws."""

from importlib import import_module

PLACES = {  # what `import transfusion` offers, and where it is
    "open_run": "transfusion.inference.engine", "Request": "transfusion.inference.engine",
    "Transfusion": "transfusion.model.transfusion",
}  # fmt: skip
__all__ = list(PLACES)


def __getattr__(name: str):
    """Imported only when it is asked for: the package itself loads nothing heavy."""
    if name in PLACES:
        return getattr(import_module(PLACES[name]), name)
    raise AttributeError(f"module 'transfusion' has no attribute {name!r}")
