"""Files of a source, in a local folder or at any address that fsspec supports."""

import io
import os
import posixpath
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import fsspec
import pyarrow as pa
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from transfusion.data.reading.listing import Listing, reason_of_name, walk
from transfusion.data.reading.streams import (
    BUFFER_SIZE,
    HEAD_SIZE,
    Decoded,
    RawFile,
    Recoded,
    as_os_error,
    check_content,
    encoding_of,
    error_line,
    is_pointer,
)  # fmt: skip

COMPRESSIONS = {".gz": "gzip", ".tgz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd"}
COMPRESSED_SUFFIXES = tuple(COMPRESSIONS)
MODIFIED = ("mtime", "ETag", "LastModified", "last_commit")  # names of the modification time in file systems


@dataclass(frozen=True)
class Files:
    """The files of a source: a file system, and a folder or file in it."""

    fs: fsspec.AbstractFileSystem
    root: str
    image_root: str | None = None  # the folder that image paths are relative to; None: the folder of their record's file
    _open: dict[str, Decoded] = field(default_factory=dict, repr=False, compare=False)  # the decoded file read last

    def __reduce__(self) -> tuple:
        return Files, (self.fs, self.root, self.image_root)  # another process opens its own files

    @classmethod
    def from_address(cls, address: str, image_root: str | None = None) -> "Files":
        """The files at a path (* matches any characters), an fsspec address, or `owner/name` on Hugging Face's hub. OSError
        if there are no such files. A path that exists on this disk is never looked up on the hub."""
        fs, root = connect(address)
        if "*" in root:
            with as_os_error(address):
                paths = fs.glob(root)
            if not paths:
                raise FileNotFoundError(f"no file matches {address}")
        elif isinstance(fs, LocalFileSystem) and not fs.exists(root):
            if address.count("/") != 1 or address.startswith((".", "/", "~")):
                raise FileNotFoundError(f"{address} does not exist")
            try:
                fs, root = connect(f"hf://datasets/{address}")
                exists = fs.exists(root)
            except Exception as error:  # any error of the hub's client: no network, no such name
                raise FileNotFoundError(f"{address} does not exist; the hub's error: {error_line(error)}") from None
            if not exists:
                raise FileNotFoundError(f"{address} does not exist, neither on this disk nor on the hub")
        else:
            with as_os_error(address):
                exists = fs.exists(root)
            if not exists:
                raise FileNotFoundError(f"{address} does not exist")
        if isinstance(fs, LocalFileSystem) and "*" not in root and not os.path.isfile(root) and not os.path.isdir(root):
            raise FileNotFoundError(f"{address} is neither a file nor a folder: save its content as a file")
        image_path = None
        if image_root is not None:
            image_fs, image_path = connect(image_root)
            if type(image_fs) is not type(fs):
                raise ValueError(f"the image folder {image_root} must be on the same kind of file system as {address}")
        return cls(fs, root.rstrip("/"), image_path)

    @property
    def is_local(self) -> bool:
        return isinstance(self.fs, LocalFileSystem)

    @property
    def folder(self) -> str:
        """The folder that relative paths of messages start from."""
        if "*" in self.root:
            return posixpath.dirname(self.root.partition("*")[0])
        return posixpath.dirname(self.root) if self.fs.isfile(self.root) else self.root

    def list(self) -> Listing:
        """All files. Those of hidden files and folders, README and LICENSE are not to be read."""
        if "*" in self.root:
            paths = [path for path in self.fs.glob(self.root) if self.fs.isfile(path)]
            return Listing(self.folder, ((self.relative_path(path), "") for path in sorted(paths)))
        if self.fs.isfile(self.root):
            return Listing(self.folder, [(posixpath.basename(self.root), "")])
        if self.is_local:
            return Listing(self.root, walk(self.root))
        relative = (path[len(self.root) :].lstrip("/") for path in self.fs.find(self.root))
        return Listing(self.root, ((path, reason_of_name(path)) for path in relative))

    def versions(self, listing: Listing) -> Iterator[tuple[str, Any, Any]]:
        """Path, size and modification time of every file to be read: different after any change."""
        infos = {} if "*" in self.root or self.is_local else self.fs.find(self.root, detail=True)
        for index in range(len(listing)):
            path = listing.path(index)
            if listing.is_file(index) and not reason_of_name(listing[index]) and not path.endswith("/"):
                info = infos.get(path) or self.fs.info(path)
                modified = next((info[name] for name in MODIFIED if name in info), "")
                yield self.relative_path(path), info.get("size"), str(modified)

    def relative_path(self, path: str) -> str:
        """The path relative to the source's folder, for messages. A path that is outside of it stays as it is."""
        folder = posixpath.dirname(self.root.partition("*")[0]) if "*" in self.root else self.root
        relative = posixpath.basename(path) if path == folder else path
        if path.startswith(f"{folder.rstrip('/')}/"):
            relative = path[len(folder) :].lstrip("/")
        return relative.encode(errors="replace").decode()  # file names may not be UTF-8

    def format_row(self, path: str, row: int) -> str:
        """File and row for messages: "file:row", rows counted from 1."""
        return f"{self.relative_path(path)}:{row + 1}"

    @contextmanager
    def open(self, path: str, offset: int = 0) -> Iterator[BinaryIO]:
        """The content of a file from a byte offset, decompressed, and UTF-16 as UTF-8. Damaged content and a pointer of Git
        LFS raise a plain OSError without errno; a failed disk or network raises any other OSError.

        Decoded content stays open until other content is decoded: the next span usually starts where this one ends, and a
        new decoder would have to start from the first byte."""
        stream = self._open.pop(path, None)
        if stream is None or offset < stream.start:
            stream = self._open_stream(path)
        file = io.BufferedReader(stream, BUFFER_SIZE)
        try:
            file.seek(offset)
            yield file
        finally:
            file.detach()
            if isinstance(stream, Decoded):
                while self._open:
                    self._open.popitem()[1].close()
            if isinstance(stream, Decoded) and not stream.is_damaged:
                self._open[path] = stream
            else:
                stream.close()

    def _open_stream(self, path: str) -> RawFile | Decoded:
        compression = next((kind for suffix, kind in COMPRESSIONS.items() if path.lower().endswith(suffix)), None)
        name = self.relative_path(path)
        with as_os_error(name):
            raw = RawFile(self.fs.open(path, "rb", compression=compression), name)
        stream = Decoded(raw) if compression else raw
        try:
            head = stream.read(HEAD_SIZE)
            check_content(head, name)
            stream.seek(0)
        except BaseException:
            stream.close()
            raise
        encoding = encoding_of(head)
        return Decoded(Recoded(stream, encoding, name)) if encoding else stream

    def read(self, path: str) -> bytes:
        """The whole content of a file; errors as of `open`."""
        if self.is_local and not path.lower().endswith(COMPRESSED_SUFFIXES):
            with open(path, "rb", buffering=0) as file:  # not by `open` above: a folder has many small files
                content = file.read()
            if not is_pointer(content) and encoding_of(content) is None:
                return content
        with self.open(path) as file:
            return file.read()

    def is_file(self, path: str) -> bool:
        return self.fs.isfile(path)

    def open_arrow(self, path: str) -> pa.NativeFile:
        """The file for Arrow: memory-mapped if local, otherwise read. OSError for a pointer of Git LFS."""
        source = pa.memory_map(path) if self.is_local else pa.BufferReader(self.fs.cat_file(path))
        check_content(source.read(HEAD_SIZE), self.relative_path(path))
        source.seek(0)
        return source


def connect(address: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """File system and path of an address. ValueError when fsspec does not support it."""
    try:
        return url_to_fs(address)
    except ImportError as error:
        raise ValueError(f"{address} needs another package: {error_line(error)}") from None
    except Exception as error:  # fsspec's ValueErrors, and any error of a file system about its arguments
        raise ValueError(f"{address}: {error_line(error)}") from None
