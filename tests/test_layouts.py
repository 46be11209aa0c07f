"""Each layout of data that docs/data.md names is read as it says, and what is passed over is named."""

from pathlib import Path

import pytest

from tests.layouts import LAYOUTS, Layout, table, write
from tests.reading import read
from tests.test_account import check_account
from transfusion.data.raw import Fault, RawImage
from transfusion.data.reading.readers import ReaderOptions, open_reader


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.data)
@pytest.mark.parametrize("max_rows", [1, 1000])
def test_layout_is_read_as_documented(layout: Layout, max_rows, tmp_path):
    write(tmp_path, layout.files)
    items = read(open_reader(str(tmp_path), ReaderOptions(**layout.options)), max_rows)
    documents = [item.kind if isinstance(item, Fault) else
                 "|".join("#" if isinstance(part, RawImage) else part.text for part in item.segments) +
                 " (held out)" * (item.split == "heldout") for item in items]  # fmt: skip
    assert documents == layout.documents
    account = check_account(tmp_path, max_rows, **layout.options)
    passed_over = {f"{kind}: {reason}": count for kind, tally in account.tallies.items() if kind != "fields"
                   for reason, count in tally.passed_over.items()}  # fmt: skip
    assert passed_over == layout.passed_over


def test_table_of_the_docs_is_written_from_the_layouts():
    """After a change: python -c "from tests.layouts import table; print(table())"."""
    assert table() in (Path(__file__).parent.parent / "docs" / "data.md").read_text()
