"""A rank of the tests: torchrun --nproc-per-node 2 tests/ranks.py RUNS RESULTS

RUNS is a JSON file with a list of [config, fault], run one after the other in one process group,
since starting processes takes longer than all they do. Rank 0 saves a list in RESULTS: for each
run the reports of the ranks, what they saw in memory, and the seconds that passed. After every op a
rank looks which weight versions still exist, whether or not the stage knows of them.
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
from pipedream_distributed import VersionedStage
from pipedream_lab import make_plan

in_memory = []  # (stage, known versions, versions that exist) after every op


class WatchedStage(VersionedStage):
    def note(self, kind, chunk, version):
        if not self.done or not hasattr(self, "seen"):
            self.seen = {}
        for number, module in self.versions.items():
            self.seen[number] = weakref.ref(next(module.parameters()))
        alive = [number for number, reference in self.seen.items() if reference() is not None]
        in_memory.append((self.stage_index, sorted(self.versions), sorted(alive)))
        super().note(kind, chunk, version)


class Unstashed(VersionedStage):
    """Forwards read the newest version instead of the one that their batch is pinned to."""

    def select_version(self, chunk):
        super().select_version(chunk)
        self.submod = self.versions[max(self.versions)]


class Hoarder(VersionedStage):
    """Somebody holds on to every version that has ever been."""

    def update(self, chunk):
        super().update(chunk)
        self.hoard = [*getattr(self, "hoard", []), self.submod]


FAULTS = {"": WatchedStage, "unstashed": Unstashed, "hoarder": Hoarder}


def main():
    runs, results = map(Path, sys.argv[1:])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    saved = []
    for config, fault in json.loads(runs.read_text()):
        in_memory.clear()
        pipedream_distributed.VersionedStage = FAULTS[fault]
        plan, start = make_plan(config), time.perf_counter()
        report = pipedream_distributed.run_rank(plan, torch.device("cpu"), 2)
        elapsed = time.perf_counter() - start
        reports = pipedream_distributed.gather(report)
        memory = [None] * dist.get_world_size()
        dist.all_gather_object(memory, in_memory)
        saved.append((reports, memory, elapsed))
    if dist.get_rank() == 0:
        torch.save(saved, results)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
