"""What importing the package does by itself."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest


@pytest.mark.parametrize(("directory", "spared"), [(".", False), ("/proc", True)])  # procfs has no room at all
def test_no_bytecode_is_written_where_there_is_no_room(directory: str, spared: bool) -> None:
    code = f"import sys, fastship\nfastship._spare_a_full_disk({directory!r})\nprint(sys.dont_write_bytecode)"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True, check=True)
    assert done.stdout == f"{spared}\n"
