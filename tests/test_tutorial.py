"""The tutorial notebook: it was executed, it is small, and `make test-all` executes it again."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.profile import THOROUGH

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "docs" / "tutorial.ipynb"


def code_cells() -> list[dict]:
    return [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]


def test_notebook_was_executed_in_order_and_is_small():
    assert [cell["execution_count"] for cell in code_cells()] == [*range(1, len(code_cells()) + 1)]
    assert all(output["output_type"] != "error" for cell in code_cells() for output in cell["outputs"])
    assert NOTEBOOK.stat().st_size < 500_000


@pytest.mark.slow
@pytest.mark.skipif(not THOROUGH, reason="make test-all")
def test_notebook_runs(tmp_path):
    """All cells in one namespace; a %%bash cell as a shell script."""
    script = ["import subprocess"]
    for cell in code_cells():
        source = "".join(cell["source"])
        shell = source.removeprefix("%%bash\n")
        script.append(source if shell == source else f"subprocess.run(['bash', '-euc', {shell!r}], check=True)")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    env = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, "-c", "\n".join(script)], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "step 600/600" in result.stdout and "a red circle" in result.stdout
