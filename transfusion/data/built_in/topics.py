"""`topics`: the language reference that Python carries inside itself (`pydoc_data.topics`), as text-only documents."""

import hashlib
import platform

from transfusion.data.raw import RawDocument, RawText

LONGEST = 1_500  # letters of a passage
EVERY = 20  # of the topics in sorted order, each 20th is held out


class Topics:
    """One document per passage of a topic: whole topics are so few and so long that they would come in clumps.

    The text depends a little on the version of Python, so the results `describe` it.
    """

    name = "topics"

    def __init__(self, split: str = "train"):
        from pydoc_data.topics import topics

        chosen = [name for n, name in enumerate(sorted(topics)) if (n % EVERY == 0) == (split == "heldout")]
        self.texts = [topics[name] for name in chosen]
        self.passages = [passage for text in self.texts for passage in split_text(text, LONGEST)]

    def __len__(self) -> int:
        return len(self.passages)

    def __getitem__(self, id: int) -> RawDocument:
        return RawDocument((RawText(self.passages[id]),), id=id)

    def describe(self) -> dict:
        """The Python version and the hash of the text."""
        digest = hashlib.sha256("\x00".join(self.texts).encode()).hexdigest()
        return {"python": platform.python_version(), "sha256": digest, "bytes": sum(len(t.encode()) for t in self.texts)}


def split_text(text: str, longest: int) -> list[str]:
    """Whole paragraphs, as many as fit into so many letters; a paragraph that is longer by itself stays whole."""
    passages = [""]
    for paragraph in text.replace("\n\n", "\n\n\0").split("\0"):
        if passages[-1] and len(passages[-1]) + len(paragraph) > longest:
            passages.append("")
        passages[-1] += paragraph
    return passages
