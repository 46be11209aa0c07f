"""Shared fixtures: a trained run, prepared data, an exported run, two ranks. Also the order of test files."""

import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from filelock import FileLock

from tests.profile import few_samples


def pytest_collection_modifyitems(items):
    """Files with slow tests come first, so that no core ends with a long test alone."""
    slow_files = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow_files)  # stable: the order is otherwise unchanged


@pytest.fixture(scope="session", autouse=True)
def quick_loaders():
    with few_samples():
        yield


@pytest.fixture
def default_signals() -> Iterator[None]:
    """Signal handlers as of a process that a terminal starts."""
    from tests.processes import set_default_signals
    from transfusion.training.signals import SIGNALS

    previous = {number: signal.getsignal(number) for number in SIGNALS}
    set_default_signals()
    yield
    for number, handler in previous.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def made_once(tmp_path_factory, worker_id) -> Callable[[str, Callable[[Path], None]], Path]:
    """`made_once(name, make)` is a folder that `make(folder)` creates once for all workers. Tests change copies only."""
    root = tmp_path_factory.getbasetemp()
    root = root if worker_id == "master" else root.parent

    def get_folder(name: str, make: Callable[[Path], None]) -> Path:
        folder = root / "shared" / name
        folder.parent.mkdir(exist_ok=True)
        with FileLock(folder.with_suffix(".lock")):
            if not folder.exists():
                try:
                    make(folder)
                except BaseException:
                    shutil.rmtree(folder, ignore_errors=True)  # so that the next worker does not use a partial folder
                    raise
        return folder

    return get_folder


@pytest.fixture(scope="session")
def trained(made_once) -> Path:
    """A run on digits, trained for four steps with `transfusion train`."""
    from tests.test_cli import TINY, command

    return made_once("digits", lambda folder: command("train", "digits", "--out", folder, *TINY))


@pytest.fixture(scope="session")
def written(made_once) -> Path:
    """An untrained run with random weights, both ema and raw."""
    from tests.tiny import write_run

    return made_once("tiny", lambda folder: write_run(folder, (7,)))


@pytest.fixture(scope="session")
def exported(made_once, written) -> Path:
    """The run of `written`, exported."""
    from transfusion.checkpoint.export import export

    return made_once("exported", lambda folder: export(written, folder))


@pytest.fixture(scope="session")
def prepared(made_once) -> Path:
    """A folder with captioned images (one truncated), with texts, and with `prepared`, the data prepared from both."""
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
