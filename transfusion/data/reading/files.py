"""Where the files of a source lie: a local folder, or any address that fsspec knows; and the pictures that records name."""

import base64
import errno
import gzip
import io
import lzma
import posixpath
import zlib
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
NO_DATA = ("README", "LICENSE")  # files of these names, whatever their suffix
MOST_PICTURE = 256 * 2**20  # bytes of a file that is read as a picture
BUFFER = 2**16  # bytes asked of a file system at a time
IMPOSSIBLE = (errno.ENAMETOOLONG, errno.EINVAL, errno.ELOOP)  # a disk's answers to what can be no path


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
            with _as_os_error(address):
                found = fs.glob(root)
            if not found:
                raise FileNotFoundError(f"nothing is called {address}")
        elif isinstance(fs, LocalFileSystem) and not fs.exists(root):
            if address.count("/") != 1 or address.startswith((".", "/", "~")):
                raise FileNotFoundError(f"there is nothing at {address}")
            try:
                fs, root = _connect(f"hf://datasets/{address}")
                exists = fs.exists(root)
            except Exception as error:  # no network, or no such name: whatever the hub's client raises
                raise FileNotFoundError(f"there is nothing at {address}, and the hub says: {reason_of(error)}") from None
            if not exists:
                raise FileNotFoundError(f"there is nothing at {address}, here or on the hub")
        else:
            with _as_os_error(address):
                exists = fs.exists(root)
            if not exists:
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
        """Every file, sorted by path; hidden ones, those of hidden folders, README and LICENSE are left out."""
        if "*" in self.root:
            return sorted(path for path in self.fs.glob(self.root) if self.fs.isfile(path))
        if self.fs.isfile(self.root):
            return [self.root]
        found = self.fs.find(self.root)
        return sorted(path for path in found if not _is_hidden(self.shown(path)))

    def marks(self) -> Iterator[tuple[str, Any, Any]]:
        """Path, size and time of every file: what tells whether they are still the same."""
        about = {} if "*" in self.root else self.fs.find(self.root, detail=True)
        for path in self.list():
            found = about.get(path) or self.fs.info(path)
            changed = next((found[name] for name in ("mtime", "ETag", "LastModified", "last_commit") if name in found), "")
            yield self.shown(path), found.get("size"), str(changed)

    def shown(self, path: str) -> str:
        """A path as it stands in messages: from the source's folder on."""
        folder = posixpath.dirname(self.root.partition("*")[0]) if "*" in self.root else self.root
        inside = path.removeprefix(folder).lstrip("/") or posixpath.basename(path)
        return inside.encode(errors="replace").decode()  # a name on a disk need not be UTF-8

    def row(self, path: str, row: int) -> str:
        """File and row as a message says it, rows counted from 1."""
        return f"{self.shown(path)}:{row + 1}"

    @contextmanager
    def open(self, path: str, offset: int = 0) -> Iterator[BinaryIO]:
        """The file from that byte of its content on; compression is undone.

        A plain OSError without a number says that its content is damaged, any other that a disk or a network failed.
        """
        packed = next((kind for suffix, kind in COMPRESSED.items() if path.lower().endswith(suffix)), None)
        with _as_os_error(self.shown(path)):
            opened = self.fs.open(path, "rb", compression=packed)
        with opened, io.BufferedReader(_Raw(opened, self.shown(path)), BUFFER) as file:
            if offset:
                file.seek(offset)
            yield file

    def read(self, path: str) -> bytes:
        """All of a file."""
        with self.open(path) as file:
            return file.read()

    def exists(self, path: str) -> bool:
        return self.fs.exists(path)

    def map(self, path: str):
        """The file for Arrow: mapped where it is local, else read."""
        return pa.memory_map(path) if self.local else pa.BufferReader(self.fs.cat_file(path))

    def beside(self, path: str) -> "Beside":
        """The pictures that a record of this file names."""
        return Beside(self, self.pictures or posixpath.dirname(path))


class _Raw(io.RawIOBase):
    """A file of any file system as one of Python's own: not all of theirs can read a line of limited length."""

    def __init__(self, file: Any, name: str):
        self.file, self.name = file, name

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        with _as_os_error(self.name):  # read1: what was unpacked before the damage is not lost
            content = getattr(self.file, "read1", self.file.read)(len(buffer))
        buffer[: len(content)] = content
        return len(content)

    def seek(self, offset: int, whence: int = 0) -> int:
        with _as_os_error(self.name):
            self.file.seek(offset, whence)
            return self.file.tell()

    def tell(self) -> int:
        return self.file.tell()


@dataclass(frozen=True)
class Found:
    """A picture by its path in the file system of the source, as its listing gives it."""

    path: str


@dataclass(frozen=True)
class Beside:
    """Pictures by the values that records hold for them."""

    files: Files
    folder: str

    def read(self, value: Any) -> np.ndarray:
        """(Y, X, 3 | 1) uint8 of bytes, {"bytes", "path"}, {"url"}, a data: address, a path, an address, or `Found`.

        Fault when it is not there or is no picture; OSError when a disk or a network fails.
        """
        if isinstance(value, dict):
            value = next((value[name] for name in ("bytes", "path", "url") if value.get(name) is not None), None)
        if isinstance(value, Found):
            name, content = self.files.shown(value.path), self._fetch(value.path, found=True)
        elif isinstance(value, str) and value.startswith("data:"):
            name, content = "data:", _inline(value)
        elif isinstance(value, str):
            name, content = _short(value), self._fetch(value)
        elif isinstance(value, bytes | bytearray | memoryview):
            name, content = "its picture", bytes(value)
        else:
            raise Fault("missing picture", f"a picture must be bytes, a path or an address, not {str(value)[:40]!r}")
        try:
            return pixels_of(read_picture(content, name))
        except PictureError as error:
            raise Fault("unreadable picture", str(error)) from None

    def has(self, address: str) -> bool:
        """Is there anything at this path beside the record, or at this address?"""
        try:
            fs, path = self._locate(address)
            return fs.exists(path)
        except (Fault, OSError):
            return False

    def _fetch(self, address: str, found: bool = False) -> bytes:
        """What lies at a path beside the record, at an address, or where a listing found it."""
        try:
            fs, path = (self.files.fs, address) if found else self._locate(address)
            if isinstance(fs, LocalFileSystem):
                about = fs.info(path)
                if about["type"] != "file":  # a device may never end
                    raise Fault("missing picture", f"{_short(address)} is no file")
                if about["size"] > MOST_PICTURE:
                    raise Fault("too large", f"{_short(address)} has {about['size']:,} bytes")
            return fs.cat_file(path)
        except Fault:
            raise
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError) as error:
            hint = "" if self.files.pictures or "://" in address else " (--pictures names the folder that paths count from)"
            raise Fault("missing picture", f"{_short(address)}: {error.strerror or 'it is not there'}{hint}") from None
        except Exception as error:  # each protocol has its own
            if "://" not in address and isinstance(error, OSError) and error.errno not in IMPOSSIBLE:
                raise  # the source's own disk fails
            if "://" not in address and not isinstance(error, OSError | ValueError):
                raise OSError(f"cannot fetch {_short(address)}: {reason_of(error)}") from None
            # addresses die one by one: that is the data's fault, and max_faults says how many may be dead
            raise Fault("missing picture", f"{_short(address)}: {reason_of(error)}") from None

    def _locate(self, address: str) -> tuple[fsspec.AbstractFileSystem, str]:
        """The file system and the path that a record means. Fault when it may not, or means nothing."""
        if "::" in address or "\x00" in address or not address:
            raise Fault("missing picture", f"{_short(repr(address))} is no path and no plain address")
        if "://" in address:
            fs, path = _connect(address)
            if isinstance(fs, LocalFileSystem) and not self.files.local:
                raise Fault("missing picture", f"{_short(address)} is a path on another disk than the data")
            return fs, path
        if address.startswith("/") and not self.files.local:
            raise Fault("missing picture", f"{_short(address)} is a path on another disk than the data")
        protocol, mark, folder = self.folder.rpartition("://")  # whose two strokes must stay
        path = posixpath.normpath(posixpath.join(folder, address))
        if path.startswith("../"):
            raise Fault("missing picture", f"{_short(address)} lies outside of where the data is")
        return self.files.fs, protocol + mark + path


def _is_hidden(shown: str) -> bool:
    *folders, name = shown.split("/")
    hidden = name.startswith(".") or any(folder.startswith((".", "_")) for folder in folders)
    return hidden or name.partition(".")[0].upper() in NO_DATA


@contextmanager
def _as_os_error(name: str) -> Iterator[None]:
    """What a compression or a protocol raises, as the OSErrors that `Files.open` promises."""
    try:
        yield
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise OSError(f"the compression of {name} is damaged: {reason_of(error)}") from None
    except (OSError, ValueError):
        raise
    except Exception as error:  # each protocol has its own
        raise ConnectionError(f"cannot read {name}: {reason_of(error)}") from None


def reason_of(error: Exception) -> str:
    """What an exception says, in one line."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _short(address: str) -> str:
    """An address in a message: some hold a whole picture, some half a character."""
    address = address.encode(errors="replace").decode()
    return address if len(address) <= 200 else f"{address[:100]}... ({len(address):,} letters)"


def _connect(address: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of an address, and the path there. ValueError when fsspec does not know it."""
    try:
        return url_to_fs(address)
    except ImportError as error:
        raise ValueError(f"{address} needs another package: {reason_of(error)}") from None
    except Exception as error:  # ValueErrors of fsspec's, and what each file system says of its arguments
        raise ValueError(f"{address}: {reason_of(error)}") from None


def _inline(address: str) -> bytes:
    """The bytes in a data: address."""
    head, _, body = address.partition(",")
    if not head.endswith(";base64"):
        raise Fault("missing picture", "a data: address must be in base64")
    try:
        return base64.b64decode(body, validate=True)
    except ValueError:
        raise Fault("unreadable picture", "the base64 of a data: address is damaged") from None
