"""Where the files of a source lie: a local folder, or any address that fsspec knows; and the pictures that records name."""

import base64
import binascii
import posixpath
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO

import fsspec
import numpy as np
import pyarrow as pa
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from transfusion.codecs.pictures import PictureError, pixels_of, read_picture
from transfusion.data.raw import Fault

COMPRESSED = {".gz": "gzip", ".tgz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd"}
HIDDEN = (".", "_", "README", "LICENSE")  # files that begin so are no data


@dataclass(frozen=True)
class Files:
    """A file system and the folder (or file) in it that a source is."""

    fs: fsspec.AbstractFileSystem
    root: str
    pictures: str | None = None  # the folder from which the paths of pictures are counted; None: that of their record

    @classmethod
    def at(cls, address: str, pictures: str | None = None) -> "Files":
        """The files at a path (with * for any letters), an address of fsspec, or `owner/name` on Hugging Face's hub.

        OSError when there is nothing. What is on this disk is never taken for a name on the hub.
        """
        fs, root = _connect(address)
        if "*" in root:
            if not fs.glob(root):
                raise FileNotFoundError(f"nothing is called {address}")
        elif isinstance(fs, LocalFileSystem) and not fs.exists(root):
            if address.count("/") != 1 or address.startswith((".", "/", "~")):
                raise FileNotFoundError(f"there is nothing at {address}")
            try:
                fs, root = _connect(f"hf://datasets/{address}")
                exists = fs.exists(root)
            except Exception as error:  # no network, or no such name: whatever the hub's client raises
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                raise FileNotFoundError(f"there is nothing at {address}, and the hub says: {reason}") from None
            if not exists:
                raise FileNotFoundError(f"there is nothing at {address}, here or on the hub")
        elif not fs.exists(root):
            raise FileNotFoundError(f"there is nothing at {address}")
        base = None
        if pictures is not None:
            other, base = _connect(pictures)
            if type(other) is not type(fs):
                raise ValueError(f"the pictures at {pictures} lie on another kind of disk than {address}")
        return cls(fs, root.rstrip("/"), base)

    @property
    def local(self) -> bool:
        return isinstance(self.fs, LocalFileSystem)

    def list(self) -> list[str]:
        """Every file, sorted by path; hidden ones and those of hidden folders are left out."""
        if "*" in self.root:
            return sorted(path for path in self.fs.glob(self.root) if self.fs.isfile(path))
        if self.fs.isfile(self.root):
            return [self.root]
        found = self.fs.find(self.root)
        return sorted(path for path in found if not any(part.startswith(HIDDEN) for part in self.shown(path).split("/")))

    def shown(self, path: str) -> str:
        """A path as it stands in messages: from the source's folder on."""
        folder = posixpath.dirname(self.root.partition("*")[0]) if "*" in self.root else self.root
        inside = path.removeprefix(folder).lstrip("/")
        return inside or posixpath.basename(path)

    def row(self, path: str, row: int) -> str:
        """File and row as a message says it, rows counted from 1."""
        return f"{self.shown(path)}:{row + 1}"

    @contextmanager
    def open(self, path: str, offset: int = 0) -> Iterator[BinaryIO]:
        """The file from that byte of its content on; compression is undone."""
        packed = next((kind for suffix, kind in COMPRESSED.items() if path.lower().endswith(suffix)), None)
        with self.fs.open(path, "rb", compression=packed) as file:
            if offset:
                file.seek(offset)
            yield file

    def read(self, path: str) -> bytes:
        """All of a file."""
        with self.open(path) as file:
            return file.read()

    def begins(self, path: str, content: bytes) -> bool:
        """Does the file begin so?"""
        with self.open(path) as file:
            return file.read(len(content)) == content

    def exists(self, path: str) -> bool:
        return self.fs.exists(path)

    def map(self, path: str):
        """The file for Arrow: mapped where it is local, else read."""
        return pa.memory_map(path) if self.local else pa.BufferReader(self.fs.cat_file(path))

    def beside(self, path: str) -> "Beside":
        """The pictures that a record of this file names."""
        return Beside(self, self.pictures or posixpath.dirname(path))


@dataclass(frozen=True)
class Beside:
    """Pictures by the values that records hold for them."""

    files: Files
    folder: str

    def read(self, value: Any) -> np.ndarray:
        """(Y, X, 3 | 1) uint8 of bytes, {"bytes", "path"}, {"url"}, a data: address, a path or an address.

        Fault when it is not there or is no picture; OSError when a disk or a network fails.
        """
        if isinstance(value, dict):
            value = next((value[name] for name in ("bytes", "path", "url") if value.get(name) is not None), None)
        if isinstance(value, str):
            name, content = (value, self._fetch(value)) if not value.startswith("data:") else ("data:", _inline(value))
        elif isinstance(value, bytes | bytearray | memoryview):
            name, content = "its picture", bytes(value)
        else:
            raise Fault("missing picture", f"a picture must be bytes, a path or an address, not {str(value)[:40]!r}")
        try:
            return pixels_of(read_picture(content, name))
        except PictureError as error:
            raise Fault("unreadable picture", str(error)) from None

    def _fetch(self, address: str) -> bytes:
        """What lies at a path beside the record, or at an address."""
        if "::" in address or "\x00" in address or not address:
            raise Fault("missing picture", f"{address!r} is no path and no plain address")
        try:
            if "://" not in address:
                if address.startswith("/") and not self.files.local:
                    raise Fault("missing picture", f"{address} is a path on another disk than the data")
                return self.files.fs.cat_file(posixpath.normpath(posixpath.join(self.folder, address)))
            fs, path = _connect(address)
            if isinstance(fs, LocalFileSystem) and not self.files.local:
                raise Fault("missing picture", f"{address} is a path on another disk than the data")
            return fs.cat_file(path)
        except Fault:
            raise
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError) as error:
            reason = error.strerror or "it is not there"
            raise Fault("missing picture", f"{address}: {reason}") from None
        except OSError:
            raise
        except Exception as error:  # each protocol has its own
            raise OSError(f"cannot fetch {address}: {str(error).splitlines()[0] if str(error) else error!r}") from None


def _connect(address: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of an address, and the path there. ValueError when fsspec does not know it."""
    try:
        fs, path = url_to_fs(address)
    except ImportError as error:
        raise ValueError(f"{address} needs another package: {error}") from None
    except ValueError as error:
        raise ValueError(f"{address}: {error}") from None
    return fs, path


def _inline(address: str) -> bytes:
    """The bytes in a data: address."""
    head, _, body = address.partition(",")
    if not head.endswith(";base64"):
        raise Fault("missing picture", "a data: address must be in base64")
    try:
        return base64.b64decode(body, validate=True)
    except binascii.Error:
        raise Fault("unreadable picture", "the base64 of a data: address is damaged") from None
