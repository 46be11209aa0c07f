"""Files as Python streams. Decoded content stays open for the next span: no decoder can start in the middle."""

import codecs
import gzip
import io
import lzma
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

BUFFER_SIZE = 2**16  # bytes of one request to a file system
WINDOW = 4 * 2**20  # bytes of decoded content that can be read again: a reader stops behind the next span's start
HEAD_SIZE = 64  # bytes of a file that show whether it is in UTF-16 or a pointer
POINTER_ERROR = "{} is a Git LFS pointer without its content: run git lfs pull"
BYTE_ORDER_MARKS = {  # that of UTF-32 starts with that of UTF-16
    codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16",
}  # fmt: skip


class RawFile(io.RawIOBase):
    """An fsspec file as a Python raw file: some fsspec files do not support `readline` with a limit. OSError without errno
    for damaged content."""

    def __init__(self, file: Any, name: str):
        self.file, self.name = file, name

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        with as_os_error(self.name):  # read1 returns what was decompressed before the damage
            content = getattr(self.file, "read1", self.file.read)(len(buffer))
        buffer[: len(content)] = content
        return len(content)

    def seek(self, offset: int, whence: int = 0) -> int:
        with as_os_error(self.name):
            self.file.seek(offset, whence)
            return self.file.tell()

    def tell(self) -> int:
        return self.file.tell()

    def close(self) -> None:
        self.file.close()
        super().close()


class Recoded(io.RawIOBase):
    """UTF-16 or UTF-32 as UTF-8. Half of a surrogate pair becomes bytes that are not UTF-8: a fault of its row alone."""

    def __init__(self, file: io.RawIOBase, encoding: str, name: str):
        self.file, self.name = file, name
        self._decoder = codecs.getincrementaldecoder(encoding)("surrogatepass")
        self._content = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._content:
            content = self.file.read(BUFFER_SIZE)
            try:
                self._content = self._decoder.decode(content, final=not content).encode(errors="surrogatepass")
            except UnicodeDecodeError as error:
                raise OSError(f"{self.name} is not valid {error.encoding}: {error.reason}") from None
            if not content:
                break
        size = min(len(buffer), len(self._content))
        buffer[:size], self._content = self._content[:size], self._content[size:]
        return size

    def close(self) -> None:
        self.file.close()
        super().close()


class Decoded(io.RawIOBase):
    """Content that is decompressed or recoded. The last `WINDOW` bytes are kept, so a small step back does not decode it
    from the start."""

    def __init__(self, file: io.RawIOBase):
        self.file = file
        self.is_damaged = False
        self._kept, self._end = bytearray(), 0  # the last content, and the offset behind it
        self._position = 0

    @property
    def start(self) -> int:
        """The first offset that can still be read."""
        return self._end - len(self._kept)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if self._position == self._end and not self._decode():
            return 0
        first = self._position - self.start
        content = self._kept[first : first + len(buffer)]
        buffer[: len(content)] = content
        self._position += len(content)
        return len(content)

    def seek(self, offset: int, whence: int = 0) -> int:
        """To an offset from the start (0) or from here (1), or to the end of the file when that is nearer."""
        offset += self._position if whence == 1 else 0
        if offset < self.start or whence == 2:
            raise RuntimeError(f"cannot seek to {offset} of decoded content, only forward from {self.start}")
        while self._end < offset and self._decode():
            pass
        self._position = min(offset, self._end)
        return self._position

    def close(self) -> None:
        self.file.close()
        super().close()

    def _decode(self) -> int:
        """Decode more; the number of bytes, 0 at the end."""
        content = bytearray(BUFFER_SIZE)
        try:
            size = self.file.readinto(content)
        except BaseException:
            self.is_damaged = True
            raise
        if len(self._kept) > 2 * WINDOW:
            del self._kept[:-WINDOW]
        self._kept += memoryview(content)[:size]
        self._end += size
        return size


@contextmanager
def as_os_error(name: str) -> Iterator[None]:
    """Turn exceptions of compressions and protocols into the OSErrors that `Files.open` documents."""
    try:
        yield
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise OSError(f"the compression of {name} is damaged: {error_line(error)}") from None
    except (OSError, ValueError):
        raise
    except Exception as error:  # each protocol has its own exceptions
        raise ConnectionError(f"cannot read {name}: {error_line(error)}") from None


def encoding_of(head: bytes) -> str | None:
    """The encoding that the byte order mark at the start of a file names, unless it is UTF-8."""
    return next((encoding for mark, encoding in BYTE_ORDER_MARKS.items() if head.startswith(mark)), None)


def is_pointer(head: bytes) -> bool:
    """Whether Git LFS has not downloaded the content of a file that starts with `head`."""
    return head.startswith(b"version https://git-lfs.github.com/spec/")


def check_content(head: bytes, name: str) -> None:
    """OSError when a file is only a pointer to its content."""
    if is_pointer(head):
        raise OSError(POINTER_ERROR.format(name))


def error_line(error: Exception) -> str:
    """The message of an exception in one line."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
