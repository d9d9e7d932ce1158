"""One thread; which tests need a newer PyTorch than the scripts do; and the fixture run."""

import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import pipedream.__main__
from pipedream_simple import run_main

ROOT = Path(__file__).parent.parent

# The matrices are small: a second thread brings nothing, and costs a lot on a busy machine.
torch.set_num_threads(1)

# What starts processes needs torch 2.13, and so do the names in tests/pytorch.py.
NEED_2_13 = ("test_distributed", "test_neighbours", "pytorch", "[README.md]", "command")


def pytest_collection_modifyitems(items):
    if torch.__version__ < "2.13":  # a TorchVersion: "2.9" < "2.13"
        for item in items:
            if any(name in item.nodeid for name in NEED_2_13):
                item.add_marker(pytest.mark.skip(reason="needs torch 2.13"))


class Result(NamedTuple):
    """What a program left behind."""

    status: int
    out: str
    err: str


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """run("why", "--gpu", 1) or run("pipedream_simple.py", "--seed", 1): a Result.

    In this process, where torch is imported already; with process=True in one of its own. The
    current folder is cwd, or an empty one.
    """

    def run(command, *flags, cwd=tmp_path, process=False, env=None):
        flags, env = [*map(str, flags)], {"COLUMNS": "80", **(env or {})}
        script = command.endswith(".py")
        if process:
            what = [str(ROOT / command)] if script else ["-m", "pipedream", command]
            done = subprocess.run(
                [sys.executable, *what, *flags],
                cwd=cwd,
                env={**os.environ, "PYTHONPATH": str(ROOT), **env},
                capture_output=True,
                text=True,
                timeout=120,
            )
            return Result(done.returncode, done.stdout, done.stderr)
        monkeypatch.chdir(cwd)
        for key, value in env.items():
            monkeypatch.setenv(key, value)
        capsys.readouterr()
        if script:
            module = importlib.import_module(command.removesuffix(".py"))
            monkeypatch.setattr(sys, "argv", [command, *flags])
            status = run_main(module.main)
        else:
            monkeypatch.setattr(sys, "argv", ["pipedream", command, *flags])
            status = pipedream.__main__.main()
        return Result(status, *capsys.readouterr())

    return run
