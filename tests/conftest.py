"""One thread; which tests need a newer PyTorch than the scripts do; and a fixture of two files."""

import sys

import pytest
import torch

import pipedream_planner
from pipedream_simple import run_main

# The matrices are small: a second thread brings nothing, and costs a lot on a busy machine.
torch.set_num_threads(1)

# What starts processes needs torch 2.13, and so do the names in tests/pytorch.py.
NEED_2_13 = ("test_distributed", "test_neighbours", "pytorch", "[README.md]", "command")


def pytest_collection_modifyitems(items):
    if torch.__version__ < "2.13":  # a TorchVersion: "2.9" < "2.13"
        for item in items:
            if any(name in item.nodeid for name in NEED_2_13):
                item.add_marker(pytest.mark.skip(reason="needs torch 2.13"))


@pytest.fixture
def planner(monkeypatch, capsys):
    """Run the planner in this process: planner("plan", file, ...) -> (status, stdout, stderr)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["pipedream_planner.py", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "80")
        status = run_main(pipedream_planner.main)
        return status, *capsys.readouterr()

    return run
