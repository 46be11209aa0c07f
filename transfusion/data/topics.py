"""`topics`: the language reference that Python carries inside itself (`pydoc_data.topics`), as text-only documents."""

import hashlib
import platform

from transfusion.data.readers import RawDocument, RawText

EVERY = 20  # of the topics in sorted order, each 20th is held out


class Topics:
    """One document per topic; the text depends a little on the version of Python, so `describe` it in the results."""

    name = "topics"

    def __init__(self, split: str = "train"):
        from pydoc_data.topics import topics

        chosen = [name for n, name in enumerate(sorted(topics)) if (n % EVERY == 0) == (split == "heldout")]
        self.texts = [topics[name] for name in chosen]

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, id: int) -> RawDocument:
        return RawDocument((RawText(self.texts[id]),), id=id)

    def describe(self) -> dict:
        """The Python version and the hash of the text."""
        digest = hashlib.sha256("\x00".join(self.texts).encode()).hexdigest()
        return {"python": platform.python_version(), "sha256": digest, "bytes": sum(len(t.encode()) for t in self.texts)}
