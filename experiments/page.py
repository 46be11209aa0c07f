"""Write the output of a command into a page of the docs, between two comments that name the command."""

from pathlib import Path

END = "<!-- end -->\n"


def write_output(page: Path, command: str, text: str) -> None:
    """Print the text, and put it in place of what is between the comments. ValueError if the page has no such comments."""
    begin = f"<!-- begin: {command} -->\n"
    before, found, rest = page.read_text(encoding="utf-8").partition(begin)
    _, end, after = rest.partition(END)
    if not found or not end:
        raise ValueError(
            f"{page} has no place for the output of {command!r}; add the lines {begin.strip()} and {END.strip()}"
        )
    print(text, end="")
    page.write_text(before + begin + text + END + after, encoding="utf-8")
