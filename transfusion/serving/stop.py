"""Stop sequences: where a streamed text ends, and how much of it may already be sent."""

from collections.abc import Sequence


class StopMatcher:
    """Ends a text before the first stop word that is complete in it; of words that end together, before the longest.

    Each word has the automaton of Knuth, Morris and Pratt (1977): its state is the length of the longest end of the text
    that begins the word. So the work is linear in the text, whatever the words are.
    """

    def __init__(self, words: Sequence[str]):
        self.words = [word for word in words if word]
        self.borders = [_find_borders(word) for word in self.words]
        self.matched = [0] * len(self.words)  # state of each word's automaton
        self.held = ""  # the end of the text that may begin a stop word

    def feed(self, text: str) -> tuple[str, bool]:
        """The text that can be sent, and whether it ends at a stop word."""
        known = self.held + text
        for end, char in enumerate(text, start=len(self.held) + 1):
            completed = 0  # length of the longest word that ends here
            for k, (word, borders) in enumerate(zip(self.words, self.borders, strict=True)):
                length = self.matched[k]
                while length and word[length] != char:
                    length = borders[length - 1]
                self.matched[k] = length = length + (word[length] == char)
                if length == len(word):
                    completed = max(completed, length)
            if completed:
                self.held = ""
                return known[: end - completed], True
        num_sent = len(known) - max(self.matched, default=0)
        self.held = known[num_sent:]
        return known[:num_sent], False


def _find_borders(word: str) -> list[int]:
    """By position: the length of the longest proper beginning of word[: position + 1] that is also its end."""
    borders = [0]
    for char in word[1:]:
        length = borders[-1]
        while length and word[length] != char:
            length = borders[length - 1]
        borders.append(length + (word[length] == char))
    return borders
