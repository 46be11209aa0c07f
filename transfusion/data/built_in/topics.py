"""`topics`: Python's own language reference (`pydoc_data.topics`), as text-only documents."""

import hashlib
import platform

from transfusion.data.raw import RawDocument, RawText

MAX_CHARS = 1_500  # characters in a passage
HELDOUT_EVERY = 20  # of the topics in sorted order, every 20th is held out


class Topics:
    """One document per passage of a topic. Whole topics are too few and too long to mix evenly with other documents. The
    text depends slightly on the version of Python: `describe` returns the version and a hash."""

    name = "topics"

    def __init__(self, split: str = "train"):
        from pydoc_data.topics import topics

        names = [name for n, name in enumerate(sorted(topics)) if (n % HELDOUT_EVERY == 0) == (split == "heldout")]
        self.texts = [topics[name] for name in names]
        self.passages = [passage for text in self.texts for passage in split_text(text, MAX_CHARS)]

    def __len__(self) -> int:
        return len(self.passages)

    def __getitem__(self, id: int) -> RawDocument:
        return RawDocument((RawText(self.passages[id]),), id=id)

    def describe(self) -> dict:
        """The Python version and the hash of the text."""
        digest = hashlib.sha256("\x00".join(self.texts).encode()).hexdigest()
        return {"python": platform.python_version(), "sha256": digest, "bytes": sum(len(t.encode()) for t in self.texts)}


def split_text(text: str, max_chars: int) -> list[str]:
    """Passages of whole paragraphs, each of at most `max_chars` characters. A longer paragraph is one passage."""
    passages = [""]
    for paragraph in text.replace("\n\n", "\n\n\0").split("\0"):
        if passages[-1] and len(passages[-1]) + len(paragraph) > max_chars:
            passages.append("")
        passages[-1] += paragraph
    return passages
