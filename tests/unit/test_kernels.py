"""Triton's kernels against their torch twins, in Triton's interpreter, at odd shapes.

The interpreter must be asked for before Triton is imported, so these run in a process of their own.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not there for this platform")
TESTS = Path(__file__).parent / "interpreted.py"


def test_kernels_are_their_twins_in_the_interpreter() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore", str(TESTS)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-4000:]
