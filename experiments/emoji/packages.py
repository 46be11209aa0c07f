"""The four packages of emoji: fetched by npm or read from a folder, checked, and opened as pictures on white.

| style | package | artists | licence of the pictures |
|---|---|---|---|
| noto | emoji-datasource-google | Google, Noto Emoji | Apache-2.0 |
| twemoji | emoji-datasource-twitter | Twitter and contributors, Twemoji | CC BY 4.0 |
| fluent | @lobehub/fluent-emoji-3d | Microsoft, Fluent Emoji | MIT |
| openmoji | openmoji | the OpenMoji project | CC BY-SA 4.0 |
"""

import base64
import hashlib
import io
import json
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

STYLES = "noto", "twemoji", "fluent", "openmoji"
OPENMOJI_WIDTH = 128  # pixels of a rendered OpenMoji; the others have 64, 64 and 256
READ_SUFFIXES = {".json", ".png", ".webp", ".svg"}
NPM_SECONDS = 600


@dataclass(frozen=True)
class Package:
    """A package of npm, one version of it, and the SHA-512 of its archive as npm writes it."""

    name: str
    version: str
    integrity: str

    @property
    def archive(self) -> str:
        """The file name that `npm pack` gives it."""
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"


PACKAGES = {
    "noto": Package("emoji-datasource-google", "16.0.0", "sha512-"
                    "ZRexfzs7MVoLnmzZmNsO4TKhnAJp5D++Vm6PpUpH/jEQQlemp3l88CjZ+DoZ2faM9R4QxZkOPJCoT8DlPhfQ3A=="),
    "twemoji": Package("emoji-datasource-twitter", "16.0.0", "sha512-"
                       "7F+uCuHH+7Qnrc15P5tnbvKkg9E6tlzi4MnT2uW1RlN4pLYTza6cP/dstIfSDMtpjFLWuZewWg8jBbuL2eyELQ=="),
    "fluent": Package("@lobehub/fluent-emoji-3d", "1.1.0", "sha512-"
                      "Wlq2lVStTnr8BDpIJ0pEnTKO4LuDxxqTEhTvRtD1DLRF0me7ogeRQjKoehDHXuVJ2Qaecgl5wRBv60lUAG3h7g=="),
    "openmoji": Package("openmoji", "17.0.0", "sha512-"
                        "EBnYrNGdcdw+OSXmENeNE1yBNRu6tOraTmoOyUbJkTmvT/+XETp8RZLSJFzD3lrPc5N9CzsyPnRTk0Vp4UaI9w=="),
}  # fmt: skip


class DataError(ValueError):
    """Data that cannot be fetched, read or written; the message says why in one line, and what to do."""


@dataclass(frozen=True)
class Emoji:
    """One emoji: its code points ("1f355"), its name, and whether it is a flag of a country or region."""

    code: str
    name: str
    is_flag: bool


@dataclass(frozen=True)
class Drawing:
    """One emoji in one style. `identity` is equal for drawings of one style whose pixels are equal."""

    emoji: Emoji
    style: str
    image: Image.Image
    """RGB on white, square."""
    identity: str


def fetch(folder: Path) -> None:
    """Fetch the archives that the folder does not hold. DataError without npm or when npm fails."""
    folder.mkdir(parents=True, exist_ok=True)
    missing = [package for package in PACKAGES.values() if not (folder / package.archive).exists()]
    if missing and shutil.which("npm") is None:
        raise DataError(f"npm is not installed, and {folder} does not hold {missing[0].archive}: install Node.js with npm, "
                           "or give the archives of `npm pack` with --packages")  # fmt: skip
    for package in missing:
        print(f"fetching {package.name} {package.version}", flush=True)
        command = ["npm", "pack", f"{package.name}@{package.version}", "--pack-destination", str(folder.resolve())]
        try:
            result = subprocess.run(command, capture_output=True, text=True, timeout=NPM_SECONDS)
            failure = result.returncode and (result.stderr.strip().splitlines() or ["no message"])[-1]
        except subprocess.TimeoutExpired:
            failure = f"no answer in {NPM_SECONDS} seconds"
        if failure:
            raise DataError(f"npm cannot fetch {package.name}@{package.version}: {failure}")


def unpack(archive: Path, package: Package) -> dict[str, bytes]:
    """The files of an archive that this data set reads, by path below package/. DataError for a missing or changed one."""
    try:
        content = archive.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {archive}: {error.strerror}") from None
    integrity = "sha512-" + base64.b64encode(hashlib.sha512(content).digest()).decode()
    if integrity != package.integrity:
        raise DataError(f"{archive} is not the published {package.name} {package.version}: its SHA-512 differs; delete it "
                           "to fetch it again")  # fmt: skip
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        wanted = (member for member in tar if member.isfile() and Path(member.name).suffix in READ_SUFFIXES)
        return {member.name.removeprefix("package/"): tar.extractfile(member).read() for member in wanted}


def read_drawings(folder: Path) -> Iterator[Drawing]:
    """Every emoji in every style that has it, in Unicode's order of the emoji. DataError as `unpack` raises it."""
    files = {style: unpack(folder / PACKAGES[style].archive, PACKAGES[style]) for style in STYLES}
    finders = {
        "noto": _by_file_name(files["noto"], "img/google/64/"),
        "twemoji": _by_file_name(files["twemoji"], "img/twitter/64/"),
        "fluent": _by_file_name(files["fluent"], "assets/"),
        "openmoji": _by_file_name(files["openmoji"], "color/svg/"),
    }
    names = {_bare(row["hexcode"]): row["annotation"] for row in json.loads(files["openmoji"]["data/openmoji.json"])}
    rows = sorted(json.loads(files["noto"]["emoji.json"]), key=lambda row: row["sort_order"])
    for row in rows:
        code = _bare(row["unified"])
        name = names.get(code, row["name"].lower()).translate({ord("’"): "'", ord("“"): None, ord("”"): None})
        emoji = Emoji(code, name, is_flag=row["subcategory"] in {"country-flag", "subdivision-flag"})
        for style in STYLES:
            content = finders[style](code)
            if content is not None:
                image = on_white(_open_svg(content) if style == "openmoji" else Image.open(io.BytesIO(content)))
                yield Drawing(emoji, style, image, hashlib.sha256(image.tobytes()).hexdigest())


def on_white(image: Image.Image) -> Image.Image:
    """RGB; what is transparent becomes white."""
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    white.alpha_composite(image)
    return white.convert("RGB")


def _open_svg(content: bytes) -> Image.Image:
    try:
        import resvg_py
    except ImportError:
        raise DataError("OpenMoji's drawings need resvg-py: pip install resvg-py") from None
    return Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=content.decode(), width=OPENMOJI_WIDTH))))


def _by_file_name(files: dict[str, bytes], folder: str) -> Callable[[str], bytes | None]:
    """Finds a file of a folder by the code points of its name."""
    named = {_bare(Path(path).stem): content for path, content in files.items() if path.startswith(folder)}
    return named.get


def _bare(code: str) -> str:
    """Code points in lower case without the variation selector U+FE0F, which packages write or leave out."""
    return "-".join(point for point in code.lower().split("-") if point != "fe0f")
