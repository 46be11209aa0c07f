"""The folder of `generate`: images 000.png, 001.png and so on, and output.json with an entry for each call."""

import re
from pathlib import Path

import numpy as np

from transfusion.cli.screen import UsageError
from transfusion.codecs.pictures import encode_picture
from transfusion.disk import read_json, write_json


class OutputFolder:
    """Images are numbered after those of earlier calls; with `overwrite` these, and output.json, are removed first.
    UsageError when output.json is not of `generate`."""

    def __init__(self, path: Path, overwrite: bool):
        self.path, self.index = path, path / "output.json"
        path.mkdir(parents=True, exist_ok=True)
        for file in [*self._images(), self.index] if overwrite else ():
            file.unlink(missing_ok=True)
        self._read_calls()  # an unusable folder is refused before anything is generated
        self.next_number = max((int(file.stem) + 1 for file in self._images()), default=0)

    def _read_calls(self) -> list[dict]:
        calls = read_json(self.index).get("calls") if self.index.exists() else []
        if not isinstance(calls, list):
            raise UsageError(f"{self.index} was not written by generate: give another --out, or --overwrite to replace it")
        return calls

    def _images(self) -> list[Path]:
        return [file for file in self.path.glob("*.png") if re.fullmatch(r"\d{3}|[1-9]\d{3,9}", file.stem, re.ASCII)]

    def save(self, pixels: np.ndarray) -> str:
        """Save an image (Y, X, channels) uint8. Returns its name, which no file had before."""
        while True:
            name = f"{self.next_number:03d}.png"
            self.next_number += 1
            try:
                with (self.path / name).open("xb") as file:  # another call may write into the same folder
                    file.write(encode_picture(pixels))
                return name
            except FileExistsError:
                continue

    def add(self, call: dict) -> None:
        """Add the entry of a call to output.json, which another call may have changed meanwhile."""
        write_json(self.index, {"calls": [*self._read_calls(), call]})
