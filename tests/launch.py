"""The programs of real processes, started as a reader starts them."""

import functools
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
SCRIPT = str(ROOT / "pipedream_distributed.py")


@functools.cache
def launch(*flags, script="pipedream_distributed.py"):
    """What it does with these flags: started once, as starting it takes seconds."""
    command = [sys.executable, str(ROOT / script), *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)
