"""What all tests share: a trained run, prepared data, an exported run, ranks that wait for work; and the order of files."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from filelock import FileLock

from tests.profile import few_samples


def pytest_collection_modifyitems(items):
    """Files that hold slow tests come first, so that no core is left alone with one in the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)  # a stable sort: else the order stays


@pytest.fixture(scope="session", autouse=True)
def quick_loaders():
    with few_samples():
        yield


@pytest.fixture(scope="session")
def made_once(tmp_path_factory, worker_id) -> Callable[[str, Callable[[Path], None]], Path]:
    """`made_once(name, make)` is the folder that `make(folder)` fills, once for all workers. Tests only change copies."""
    root = tmp_path_factory.getbasetemp()
    root = root if worker_id == "master" else root.parent

    def made(name: str, make: Callable[[Path], None]) -> Path:
        folder = root / "shared" / name
        folder.parent.mkdir(exist_ok=True)
        with FileLock(folder.with_suffix(".lock")):
            if not folder.exists():
                try:
                    make(folder)
                except BaseException:
                    shutil.rmtree(folder, ignore_errors=True)  # the next worker shall not take half of it
                    raise
        return folder

    return made


@pytest.fixture(scope="session")
def trained(made_once) -> Path:
    """A run on digits, trained for four steps by the command."""
    from tests.test_cli import TINY, command

    return made_once("digits", lambda folder: command("train", "digits", "--out", folder, *TINY))


@pytest.fixture(scope="session")
def written(made_once) -> Path:
    """A run that was never trained: all its weights, average and raw, are random numbers."""
    from tests.tiny import write_run

    return made_once("tiny", lambda folder: write_run(folder, (7,)))


@pytest.fixture(scope="session")
def exported(made_once, written) -> Path:
    """That run, exported."""
    from transfusion.checkpoint.export import export

    return made_once("exported", lambda folder: export(written, folder))


@pytest.fixture(scope="session")
def prepared(made_once) -> Path:
    """A folder of captioned pictures, one of them cut short, and lines of text; `prepared` in it was made from both."""
    from tests.sources import write_photos, write_texts
    from tests.test_cli import command
    from tests.test_cli_data import PREPARE

    def make(folder: Path) -> None:
        write_photos(folder / "photos", 120)
        path = folder / "photos" / "0007.png"
        path.write_bytes(path.read_bytes()[:60])
        write_texts(folder / "texts.jsonl", 90)
        command("data", "prepare", folder / "photos", folder / "texts.jsonl", "--out", folder / "prepared", *PREPARE)

    return made_once("data", make)


@pytest.fixture(scope="session")
def pair() -> Iterator["World"]:  # noqa: F821 (tests.ranks imports torch)
    """Two ranks."""
    from tests.ranks import World

    world = World(2)
    yield world
    world.close()
