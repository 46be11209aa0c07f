"""Hooks of mkdocs: pages from the repository's root, and links that work on the site as they do in the repository."""

import re
from pathlib import Path
from posixpath import dirname, join, normpath, relpath

from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
ROOT_PAGES = {"README.md": "index.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
MARKDOWN_LINK = re.compile(r"(?P<text>!?\[[^\[\]]*\])\((?P<target>[^\s()#:]+)(?P<anchor>#[^\s()]*)?\)")
HTML_LINK = re.compile(r'(?P<start>\b(?:src|href)=")(?P<target>[^"#:]+)(?=["#])')


def on_files(files, config):
    for path, page in ROOT_PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Links are written for the repository: relative to the file, to any file. A link to a missing file is left alone, so
    that `mkdocs build --strict` fails on it."""
    uri = page.file.src_uri
    path = next((path for path, root_page in ROOT_PAGES.items() if root_page == uri), f"docs/{uri}")

    def resolve(target: str) -> str:
        """The address on the site, or in the repository; empty: there is no address."""
        file = normpath(join(dirname(path), target))
        if not (ROOT / file).exists():
            return target
        if file in ROOT_PAGES or file.startswith("docs/"):
            return relpath(ROOT_PAGES.get(file, file.removeprefix("docs/")), dirname(uri) or ".")
        return f"{config.repo_url.rstrip('/')}/blob/main/{file}" if config.repo_url else ""

    def in_markdown(match: re.Match) -> str:
        target = resolve(match["target"])
        return f"{match['text']}({target}{match['anchor'] or ''})" if target else match["text"][1:-1]

    markdown = MARKDOWN_LINK.sub(in_markdown, markdown)
    return HTML_LINK.sub(lambda match: match["start"] + resolve(match["target"]), markdown)
