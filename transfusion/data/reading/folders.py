"""Folders of pictures to records."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from transfusion.data.reading.account import Account
from transfusion.data.reading.archives import strip_caption
from transfusion.data.reading.container import Span
from transfusion.data.reading.files import Files, ListedPath


@dataclass(frozen=True)
class ImageFolder:
    """Images, each with a caption from a .txt file of the same name or from its folder's name, or without captions."""

    files: Files
    paths: Sequence[str]
    captions: str  # "text": a .txt file of the same name; "folder": the name of its folder; "": no captions

    def spans(self, max_rows: int, account: Account) -> Iterator[Span]:
        for first in range(0, len(self.paths), max_rows):
            yield Span("", first, min(max_rows, len(self.paths) - first))

    def records(self, span: Span) -> Iterator[tuple[str, Any]]:
        for path in self.paths[span.first : span.first + span.rows]:
            record: dict[str, Any] = {"image": ListedPath(path)}
            if self.captions == "text":
                text_path = path.rpartition(".")[0] + ".txt"
                has_text = self.files.exists(text_path)
                record["caption"] = strip_caption(self.files.read(text_path)) if has_text else None
            elif self.captions == "folder":
                record["caption"] = path.rpartition("/")[0].rpartition("/")[2].replace("_", " ")
            yield self.files.relative_path(path), record
