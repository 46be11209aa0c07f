"""The images that records name: bytes, base64, paths and addresses to pixels."""

import base64
import errno
import os
import posixpath
import stat
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import fsspec
import numpy as np
from fsspec.implementations.local import LocalFileSystem

from transfusion.codecs.pictures import PictureError, pixels_of, read_picture
from transfusion.data.raw import Fault
from transfusion.data.reading.files import Files, connect
from transfusion.data.reading.streams import POINTER_ERROR, error_line, is_pointer
from transfusion.data.reading.values import is_inline_picture, possible_paths

IMAGE_KEYS = ("bytes", "data", "path", "url")  # of an image that is an object; the first with a value is read
MAX_IMAGE_BYTES = 256 * 2**20  # of an image file
BAD_PATH_ERRORS = (errno.ENAMETOOLONG, errno.EINVAL, errno.ELOOP)  # of strings that cannot be paths


@dataclass(frozen=True)
class ListedPath:
    """Path of an image in the source's file system, as listed there."""

    path: str


@dataclass(frozen=True)
class RecordImageReader:
    """Reads the images of records."""

    files: Files
    folder: str  # of relative paths
    on_file: Callable[[str], None] = lambda path: None  # gets the path of each that is read
    on_note: Callable[[str, str], None] = lambda note, name: None  # what is wrong with one that is read, its name or ""

    @classmethod
    def of(cls, files: Files, path: str, *callbacks: Callable[..., None]) -> "RecordImageReader":
        """A reader of the images that records of this file name."""
        return cls(files, files.image_root or posixpath.dirname(path), *callbacks)

    def read(self, value: Any) -> np.ndarray:
        """(Y, X, 3 | 1) uint8 of bytes, base64, a data: URL, a path, a URL, an object with one of these as `bytes`, `data`,
        `path` or `url`, or a `ListedPath`. Fault when it does not exist or is not an image; OSError when a disk or a network
        fails."""
        name = ""
        if isinstance(value, dict):
            name = _shorten(path) if isinstance(path := value.get("path"), str) else ""
            value = next((value[key] for key in IMAGE_KEYS if value.get(key) is not None), None)
        if isinstance(value, ListedPath):
            name = self.files.relative_path(value.path)
            content = self._fetch(value.path, name, is_listed=True)
        elif isinstance(value, str) and (value.startswith("data:") or is_inline_picture(value)):
            name, content = name or "an image in base64", _decode_base64(value)
        elif isinstance(value, str) or type(value) is int:  # the name of a picture may be a number
            name = _shorten(str(value))
            content = self._fetch(str(value), name)
        elif isinstance(value, bytes | bytearray | memoryview):
            content = bytes(value)
        else:
            raise Fault("missing image", f"an image must be bytes, a path or a URL, not {str(value)[:40]!r}")
        try:
            return pixels_of(read_picture(content, name or "its image", on_note=lambda note: self.on_note(note, name)))
        except PictureError as error:
            raise Fault("unreadable image", POINTER_ERROR.format(name) if is_pointer(content) else str(error)) from None

    def exists(self, address: str) -> bool:
        """Whether there is a file at this path or URL."""
        try:
            fs, path = self._locate(address)
            return fs.isfile(path)
        except (Fault, OSError):
            return False

    def _fetch(self, address: str, name: str, is_listed: bool = False) -> bytes:
        """The content at a path relative to the record, at a URL, or at a listed path. `name`: in messages."""
        try:
            fs, path = (self.files.fs, address) if is_listed else self._locate(address)
            if fs is self.files.fs:
                self.on_file(path)
            if isinstance(fs, LocalFileSystem):
                info = os.stat(path)
                if not stat.S_ISREG(info.st_mode):  # reading a device may never end
                    raise Fault("missing image", f"{name} is not a file")
                if info.st_size > MAX_IMAGE_BYTES:
                    raise Fault("too large", f"{name} has {info.st_size:,} bytes; at most {MAX_IMAGE_BYTES:,}")
                with open(path, "rb", buffering=0) as file:
                    return file.read()
            return fs.cat_file(path)
        except Fault:
            raise
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError) as error:
            hint = "" if self.files.image_root or "://" in address else " (--pictures sets the folder of relative paths)"
            raise Fault("missing image", f"{name}: {error.strerror or 'it does not exist'}{hint}") from None
        except Exception as error:  # each protocol has its own exceptions
            if "://" not in address and isinstance(error, OSError) and error.errno not in BAD_PATH_ERRORS:
                raise  # the source's own disk fails
            if "://" not in address and not isinstance(error, OSError | ValueError):
                raise OSError(f"cannot fetch {name}: {error_line(error)}") from None
            # single URLs may be dead: a fault of the data, limited by max_faults
            raise Fault("missing image", f"{name}: {error_line(error)}") from None

    def _locate(self, address: str) -> tuple[fsspec.AbstractFileSystem, str]:
        """File system and path of an image address. Fault when it is not valid or not allowed."""
        if "::" in address or "\x00" in address or not address:
            raise Fault("missing image", f"{_shorten(repr(address))} is neither a path nor a plain URL")
        if "://" in address:
            fs, path = connect(address)
            if isinstance(fs, LocalFileSystem) and not self.files.is_local:
                raise Fault("missing image", f"{_shorten(address)} is not on the file system of the data")
            return fs, path
        if address.startswith("/") and not self.files.is_local:
            raise Fault("missing image", f"{_shorten(address)} is not on the file system of the data")
        protocol, separator, folder = self.folder.rpartition("://")  # normpath would shorten "//"
        path = posixpath.normpath(posixpath.join(folder, address))
        if path.startswith("../"):
            raise Fault("missing image", f"{_shorten(address)} is outside the folder of the data")
        first, *others = possible_paths(protocol + separator + path)
        fs = self.files.fs
        return fs, next((other for other in others if fs.exists(other)), first) if others and not fs.exists(first) else first


def _shorten(address: str) -> str:
    """An address for messages: it may be a whole image, or have half a surrogate pair."""
    address = address.encode(errors="replace").decode()
    return address if len(address) <= 200 else f"{address[:100]}... ({len(address):,} characters)"


def _decode_base64(value: str) -> bytes:
    """The bytes of base64, alone or in a data: URL."""
    head, comma, body = value.rpartition(",")
    if comma and not head.endswith(";base64"):
        raise Fault("missing image", "a data: URL must be in base64")
    try:
        return base64.b64decode("".join(body.split()), validate=True)
    except ValueError:
        raise Fault("unreadable image", "the base64 of an image is damaged") from None
