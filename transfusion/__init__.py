"""Transfusion: one transformer over text tokens and image patches, that reads, writes and draws."""

__all__ = ["open_run"]


def __getattr__(name: str):
    """`transfusion.open_run`, imported only when it is asked for: the package itself loads nothing heavy."""
    if name == "open_run":
        from transfusion.inference.engine import open_run

        return open_run
    raise AttributeError(f"module 'transfusion' has no attribute {name!r}")
