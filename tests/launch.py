"""The program of real processes, started as a reader starts it."""

import functools
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
SCRIPT = str(ROOT / "pipedream_distributed.py")


@functools.cache
def launch(*flags):
    """What it does with these flags: started once, as starting it takes seconds."""
    command = [sys.executable, SCRIPT, *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)
