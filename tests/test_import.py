"""What `import pyfacts` needs."""

import shutil
import subprocess
import sys
from pathlib import Path

import pyfacts


def test_a_source_tree_that_was_not_built_says_so(tmp_path: Path) -> None:
    """Python looks for packages where it was started first: installed or not, pyfacts is what lies there."""
    sources = Path(pyfacts.__file__).parent
    shutil.copytree(sources, tmp_path / "pyfacts", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    command = [sys.executable, "-S", "-c", "import pyfacts"]  # -S: without site-packages
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert f"ImportError: pyfacts in {tmp_path / 'pyfacts'} is not built" in done.stderr
