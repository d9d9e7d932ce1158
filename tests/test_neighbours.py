"""The neighbours of pipelines on PyTorch's engines, and the file that a reader copies."""

import importlib.util
import re
import subprocess
import sys

import pytest
import torch
from launch import ROOT
from torch import nn
from torch.nn.functional import cross_entropy

TEMPLATE = "torchrun --nproc-per-node 2 examples/my_model.py"


def test_the_template_trains_as_one_process_does():
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--local-addr=127.0.0.1"]
    command = [*torchrun, *TEMPLATE.split()[1:]]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    printed = [float(loss) for loss in re.findall(r"^batch \d+: loss (.*)$", done.stdout, re.M)]

    spec = importlib.util.spec_from_file_location("my_model", ROOT / "examples" / "my_model.py")
    template = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(template)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = nn.Sequential(*template.my_layers())
    optimizer, losses = torch.optim.Adam(network.parameters(), lr=0.01), []
    for x, y in template.my_batches():
        loss = cross_entropy(network(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert printed == pytest.approx(losses, abs=1e-4)
    assert losses[-1] < 0.8 * losses[0]  # it learns
    text = (ROOT / "examples" / "my_model.py").read_text()
    assert TEMPLATE in text
    assert TEMPLATE in (ROOT / "README.md").read_text()
    assert text.count("\n") <= 60
    assert not re.search(r"\b_[a-z]", text.replace("__", ""))  # public names only
