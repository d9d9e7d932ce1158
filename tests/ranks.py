"""A rank of the tests: torchrun --nproc-per-node 2 tests/ranks.py RUNS RESULTS

RUNS is a JSON file with a list of [settings, chunks_per_gpu], run one after the other in one
process group, since starting processes takes longer than all they do. Rank 0 saves a list in
RESULTS: of every run the reports of the ranks, what they saw in memory, and the seconds that
passed. At every operation a rank looks which weight versions still take memory, whether or not
the stage knows of them.
"""

import json
import sys
import time
import weakref
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent.parent))

import pipedream_distributed
from pipedream_lab import make_plan

in_memory = []  # (stage, known versions, versions alive) at every operation
landed_on = []  # (version, versions that have a gradient) after every backward


class WatchedStage(pipedream_distributed.VersionedStage):
    def reset(self):
        super().reset()
        self.seen = {0: self.reference(0)}

    def reference(self, version):
        return weakref.ref(next(self.versions[version].parameters()))

    def update(self, read):
        super().update(read)
        self.seen[self.newest + 1] = self.reference(self.newest + 1)

    def select_version(self, kind, chunk):
        super().select_version(kind, chunk)
        alive = [version for version, reference in self.seen.items() if reference() is not None]
        in_memory.append((self.stage_index, sorted(self.versions), alive))

    def finish_backward(self):
        """A gradient lands where the graph's weights are: that tells which version was read."""
        landed = [v for v, m in self.versions.items() if next(m.parameters()).grad is not None]
        landed_on.append((self.done[-1].version, landed))
        super().finish_backward()


def main():
    runs, results = map(Path, sys.argv[1:])
    torch.set_num_threads(1)
    pipedream_distributed.VersionedStage = WatchedStage
    dist.init_process_group("gloo")
    saved = []
    for settings, chunks in json.loads(runs.read_text()):
        in_memory.clear()
        landed_on.clear()
        plan, start = make_plan(settings, chunks), time.perf_counter()
        report = pipedream_distributed.run_rank(plan, torch.device("cpu"), 2)
        elapsed = time.perf_counter() - start
        reports = pipedream_distributed.gather(report)
        memory = [None] * dist.get_world_size()
        dist.all_gather_object(memory, (in_memory, landed_on))
        saved.append((reports, memory, elapsed))
    if dist.get_rank() == 0:
        torch.save(saved, results)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
