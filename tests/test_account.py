"""The account: of everything in a source, what is read and what is passed over add up to what is there."""

import io
import json
import os
import tarfile
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.documents import few
from tests.fixtures.make import png
from tests.reading import EXPECTED, FIXTURES, close_account, read
from transfusion.data.raw import Fault
from transfusion.data.reading.account import MAX_REASONS, Account, counted
from transfusion.data.reading.archives import TarArchives
from transfusion.data.reading.listing import NOT_A_FILE, Listing, walk
from transfusion.data.reading.readers import ReaderOptions, open_reader

GOOD = png(1)


def count_files(root: Path) -> int:
    """Files, hidden folders, and links to folders below a folder, or 1 for a file."""
    if root.is_file():
        return 1
    total = 0
    for folder, folders, files in os.walk(root):
        closed = [name for name in folders if name[0] in "._" or (Path(folder) / name).is_symlink()]
        folders[:] = [name for name in folders if name not in closed]
        total += len(files) + len(closed)
    return total


def count_members(paths: Sequence[str]) -> int:
    """Members of archives that are no folders."""
    total = 0
    for path in paths:
        with suppress(tarfile.TarError), tarfile.open(path, ignore_zeros=True) as archive:
            total += sum(not member.isdir() for member in archive.getmembers())
    return total


def check_account(source: Path, max_rows: int = 1000, **options) -> Account:
    """The account of a source: it closes, and its totals are what is there, counted in another way."""
    reader = open_reader(str(source), ReaderOptions(**options))
    account = close_account(reader, max_rows)
    totals = {kind: tally.total for kind, tally in account.tallies.items()}
    assert totals["files"] == count_files(source)
    documents = read(reader, max_rows)
    faults = [item.kind for item in documents if isinstance(item, Fault)]
    records = account.tallies["records"]
    assert records.read["document"] == account.forms.total() == len(documents) - len(faults)
    no_faults = sum(records.passed_over[reason] for reason in ("not downloaded by img2dataset", "of another split"))
    assert records.passed_over.total() - no_faults == len(faults)
    archives = [container.paths for container in reader.containers.values() if isinstance(container, TarArchives)]
    assert totals.get("members", 0) == sum(map(count_members, archives))
    assert all("unknown" not in line for line in account.lines())
    return account


@pytest.mark.parametrize("title", [title for title in EXPECTED if "*" not in EXPECTED[title]["source"]])
def test_account_of_every_fixture_closes(title):
    source, options = FIXTURES / EXPECTED[title]["source"], EXPECTED[title]["options"]
    accounts = [check_account(source, max_rows, **options).to_json() for max_rows in (1, 2, 1000)]
    assert accounts[0] == accounts[1] == accounts[2]  # it does not depend on the units


# Random folders

names = st.sampled_from(("a", "b", "a.b", "1", "README", ".c", "train", "test"))
folders = st.sampled_from(("", "", "x/", "x/y/", "train/", "val/", "images/", ".git/", "_tmp/", "10_dog/"))
suffixes = st.sampled_from((
    ".png", ".png", ".PNG", ".txt", ".TXT", ".caption", ".png.txt", ".json", ".jsonl", ".csv", ".tar", ".zip", ".heic", "",
    ".md",
))  # fmt: skip
records = st.lists(st.sampled_from((
    {"text": "one"}, {"file_name": "a.png", "text": "two"}, {"image": "x/b.png"}, {"image": "none.png", "caption": "three"},
    {"step": 1, "loss": 0.5}, {"url": "http://127.0.0.1:9/a", "text": "four", "lang": None},
    {"photo": "a.png", "caption": "c"},
    {"image": "a.png", "captions": ["five", "six", ""]}, {"key": "1", "url": "x.jpg", "status": "failed_to_download"},
)), max_size=4)  # fmt: skip
members = st.lists(st.tuples(st.sampled_from((
    "1.png", "1.txt", "2.png", "2.caption", "2.cls", "a.b.png", "a.b.txt", "a.mask.png", "x/1.jpg", "x/1.npy", ".d", "e",
    "1.json",
)), st.sampled_from(("good", "good", "empty", "damaged"))), max_size=7)  # fmt: skip


kinds = st.sampled_from(("good", "good", "empty", "damaged"))


def build(suffix: str, kind: str, rows: list[dict], members: list[tuple[str, str]]) -> bytes:
    """The content of a file."""
    if kind == "empty" or (kind == "damaged" and suffix != ".jsonl"):
        return b"" if kind == "empty" else b"\xff damaged"
    match suffix.lower().rpartition(".")[2]:
        case "png":
            return GOOD
        case "csv":
            columns = sorted({key for row in rows for key in row})
            lines = [",".join(columns), *(",".join(str(row.get(key, "")) for key in columns) for row in rows)]
            return "\n".join(lines).encode()
        case "jsonl":
            return "\n".join([*map(json.dumps, rows), "{"] if kind == "damaged" else map(json.dumps, rows)).encode()
        case "json":
            return json.dumps(rows if rows else {"editor": "x"}).encode()
        case "tar":
            buffer = io.BytesIO()
            with tarfile.open(fileobj=buffer, mode="w") as archive:
                for member, member_kind in members:
                    content = build(member.lower(), member_kind, [{"caption": "seven"}], [])
                    info = tarfile.TarInfo(member)
                    info.size = len(content)
                    archive.addfile(info, io.BytesIO(content))
            return buffer.getvalue()
    return b"a caption"


entries = st.tuples(folders, names, suffixes, kinds, records, members)
trees = st.lists(entries, min_size=1, max_size=12, unique_by=lambda entry: entry[:3])


@few
@given(trees, st.booleans(), st.sampled_from((1, 3, 1000)))
def test_account_of_a_random_folder_closes(tree, has_link, max_rows):
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "source"
        for inner, name, suffix, *content in sorted(tree, key=lambda entry: entry[:3]):
            path = root / f"{inner}{name}{suffix}"
            with suppress(FileExistsError, IsADirectoryError):  # the name of a file and of a folder
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(build(suffix, *content))
        if has_link:
            (root / "link").symlink_to(root)
        try:
            check_account(root, max_rows)
        except (ValueError, OSError) as error:  # nothing can be read
            assert "does not close" not in str(error)
            assert str(error).isprintable()


def test_accounts_of_parts_add_up_to_the_same():
    whole, parts = Account(), Account()
    for n in range(100):
        part = Account()
        for account in (whole, part):
            account.find("fields", 3)
            account.read("fields", "value")
            account.pass_over("fields", f"in {n % 60}", f"name {n}", count=2)
            account.name_file(7 * n % 100)
        parts.add(Account.from_json(json.loads(json.dumps(part.to_json()))))
    assert parts.to_json() == whole.to_json()
    whole.check()
    assert len(whole.tallies["fields"].passed_over) == MAX_REASONS + 1
    assert whole.to_json()["named"] == [(0, 100)]
    whole.find("fields")
    with pytest.raises(ValueError, match="the account of fields does not close: 301 there, 100 read, 200 passed over"):
        whole.check()
    lines = ["fields: 100 of 301 read; not read:", "  40 other reasons: name 40, name 41, name 42, ..."]
    assert list(whole.lines())[:2] == lines


def test_one_thing_is_not_plural():
    counts = [counted(number, "picture") for number in (0, 1, 2, 1204)]
    assert counts == ["0 pictures", "1 picture", "2 pictures", "1,204 pictures"]


# Walking


def test_linked_folders_are_entered_once(tmp_path):
    root, outside = tmp_path / "root", tmp_path / "outside"
    for path in ("a/1.txt", "z.txt", ".hidden/2.txt"):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text("text")
    (outside / "more").mkdir(parents=True)
    (outside / "more/3.txt").write_text("text")
    links = {"b": outside, "c": outside / "more", "d": root / "a", "e": root, "f": tmp_path, "gone.txt": tmp_path / "none"}
    for name, target in links.items():
        (root / name).symlink_to(target)
    (outside / "back").symlink_to(root)
    expected = {
        ".hidden/": "hidden", "a/1.txt": "", "b/back/": "linked folder, listed already", "b/more/3.txt": "",
        "c/": "linked folder, listed already", "d/": "linked folder, listed already", "e/": "linked folder, listed already",
        "f/": "linked folder, listed already", "gone.txt": "neither a file nor a folder", "z.txt": "",
    }  # fmt: skip
    assert dict(walk(str(root))) == expected
    assert list(Listing(str(root), walk(str(root)))) == sorted(expected)


@pytest.mark.parametrize("name", ["1.txt", "1.caption", "1.png.txt", "1.json", "2.png", "metadata.jsonl", "state.json"])
def test_pipe_in_a_folder_is_never_opened(name, tmp_path):
    """Reading a pipe without a writer never ends; a link to nothing cannot be read."""
    for number, make in enumerate((lambda path: path.symlink_to(tmp_path / "none"), os.mkfifo)):
        root = tmp_path / str(number)
        root.mkdir()
        (root / "1.png").write_bytes(GOOD)
        before = open_reader(str(root)).fingerprint()
        make(root / name)
        account = check_account(root)
        assert account.tallies["files"].passed_over == {NOT_A_FILE: 1} and account.forms == {"image": 1}
        assert open_reader(str(root)).fingerprint() == before  # prepare does not look at it, either
    os.mkfifo(tmp_path / "a.jsonl")
    with pytest.raises(OSError, match="a.jsonl is neither a file nor a folder: save its content as a file"):
        open_reader(str(tmp_path / "a.jsonl"))


@few
@given(st.lists(st.text(st.characters(exclude_characters="\0/", exclude_categories=["Cs"]), min_size=1, max_size=9).map(
    lambda name: name.replace(".", "_")), unique=True, max_size=20))  # fmt: skip
def test_listing_finds_every_path_and_no_other(paths):
    listing = Listing("/root", ((path, "") for path in paths))
    assert sorted(listing) == sorted(paths)
    assert [listing.find(path) for path in listing] == list(range(len(paths)))
    assert all(listing.find(path + "x") is None for path in paths if path + "x" not in paths)
    assert listing.index_of("/root/none.txt") is listing.index_of("/other/" + "".join(paths[:1])) is None


def test_listing_of_a_million_files_takes_few_bytes_for_each():
    listing = Listing("/root", ((f"{n:07d}.jpg", "") for n in range(100_000)))
    assert len(listing._names) + listing._ends.itemsize * len(listing._ends) + len(listing._fates) <= 20 * 100_000 + 8
