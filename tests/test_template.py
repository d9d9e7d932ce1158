"""examples/my_model.py and pipeline.py train as one process without any pipeline does."""

import functools
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import template
import torch
from conftest import ROOT
from ranks import in_processes, torchrun
from template import plain, work
from torch import nn

from pipedream.commands.fit import PYTORCH

EXAMPLES = ROOT / "examples"
BY_HAND = "python examples/my_model.py --processes 2"
TORCHRUN = "torchrun --nproc-per-node 2 examples/my_model.py"

# What a reader may have done to his model. It has 8 layers: an embedding, 6 blocks, a head.
FREEZE = "for place in {}: model.LAYERS[place] = frozen(model.LAYERS[place])"
CHANGES = {
    "": "",  # tied, padded, and clipped
    "untied": "model.TIED = []",
    "not clipped": "model.CLIP = float('inf')",
    "first stages frozen": "model.TIED = []\n" + FREEZE.format("range(4)"),
    "middle frozen": FREEZE.format("(3, 4)"),
    "tied and frozen": FREEZE.format("(0, 7)"),
    "head frozen": "model.TIED = []\n" + FREEZE.format("[7]"),
    "no weights": "model.LAYERS = [model.Embed, *[nn.Tanh] * 3, nn.Identity, nn.Tanh, model.Block,"
    "model.head]\nmodel.TIED = [((0, 'token.weight'), (7, '1.weight'))]",
    "turned": "model.LAYERS = [x for make in model.LAYERS for x in (make, Turned)][:-1]\n"
    "model.TIED = [((0, 'token.weight'), (14, '1.weight'))]",
    "three are one": "model.LAYERS[4] = Again\n"
    "model.TIED = [((0, 'token.weight'), (4, 'weight'), (7, '1.weight'))]",
    "dropout": "model.DROPOUT = 0.2\nmodel.LAYERS[2] = Luck\n"
    "model.LAYERS[3] = lambda: model.Block().eval()",
    "in place": "model.LAYERS[4] = lambda: nn.ReLU(inplace=True)",
    "views": "model.LAYERS[1] = model.LAYERS[3] = model.LAYERS[5] = View",  # ends of stages
    "two dtypes": "model.LAYERS[2:5] = [Single] * 3",  # of three processes, one has no other
    "sgd": "model.my_optimizer = lambda weights: torch.optim.SGD(weights, 0.1, momentum=0.9)",
}


@pytest.fixture(autouse=True)
def same_default_type():
    """One process alone is this one."""
    yield
    torch.set_default_dtype(torch.float32)


def cases(processes):
    """(flags, name of a change): each schedule; with two processes, also what meets in it."""
    same = {"microbatches": {1: 2, 2: 4, 3: 6, 4: 12}[processes]}  # 12: for dualpipe-v
    for schedule in template.pipeline.SCHEDULES:
        yield {"schedule": schedule, **same}, ""
        yield {"schedule": schedule, "recompute": True, **same}, "dropout"
        if processes < 3:
            yield {"schedule": schedule, **same}, "first stages frozen"
    for change in CHANGES if processes == 2 else ():
        yield {"schedule": "1f1b", **same}, change
        yield {"schedule": "zb-v", **same}, change
    if processes == 3:
        yield same, "two dtypes"
    yield {"schedule": "1f1b", "microbatches": 12}, "untied"  # more of them: no accumulation
    yield {"schedule": "gpipe", "microbatches": 1}, ""
    cut = {1: [], 2: [1], 3: [2, 3], 4: [0, 1, 2, 7]}[processes]
    yield {"schedule": "1f1b", "cut": cut, **same}, "turned"
    if processes in (2, 4):
        half = {"replicas": 2, "microbatches": 3}
        yield half, ""
        yield {**half, "schedule": "zb-v", "recompute": True}, "dropout"
        yield {**half, "schedule": "interleaved-zb"}, "first stages frozen"
        yield {**half, "schedule": "gpipe"}, "three are one"


@functools.cache
def expected(change, slices):
    return plain(CHANGES[change], slices=slices if change == "dropout" else None)


@pytest.mark.parametrize("processes", [1, 2, 3, 4])
def test_losses_are_those_of_one_process_without_a_pipeline(processes):
    jobs = [*cases(processes)]
    changed = [(flags, CHANGES[change]) for flags, change in jobs]
    for of_rank in in_processes(processes, work, changed):
        for (flags, change), losses in zip(jobs, of_rank, strict=True):
            slices = flags["microbatches"] * flags.get("replicas", 1)
            exact = 1e-6 if change == "two dtypes" else 1e-12
            assert losses == pytest.approx(expected(change, slices), abs=exact), (flags, change)


def test_a_tied_weight_with_two_names_in_its_layer_stays_one_wherever_it_is_cut():
    change = CHANGES["three are one"].replace("Again", "Alias")
    alone, both = (in_processes(number, work, [({}, change)])[0][0] for number in (1, 2))
    assert alone == pytest.approx(both, abs=1e-12)


def test_the_template_and_fit_name_the_same_classes_of_pytorch():
    names = template.pipeline.SCHEDULES
    assert names == {name: PYTORCH[name] for name in names}


def test_bf16_is_autocast_of_layers_and_loss():
    change = "torch.set_default_dtype(torch.float32)"
    change += (
        "\nloss = model.my_loss\nmodel.my_loss = lambda output, y: loss(output @ torch.eye(256), y)"
    )
    found = in_processes(2, work, [({"bf16": True}, change), ({}, change)])[0]
    wanted = plain(change, slices=4, bf16=True)
    assert found[0] == pytest.approx(wanted, abs=3e-3)
    assert found[0] != pytest.approx(found[1], abs=1e-4)


def runs(pipe):
    return template.Counted.runs


def test_recompute_runs_each_layer_again():
    change = "model.LAYERS[3] = Counted; Counted.runs = 0"
    ((_, without), (_, again)) = in_processes(
        1, work, [({}, change), ({"recompute": True}, change)], runs
    )[0]
    assert again - without == 3 * 4  # steps, microbatches


def test_what_counts_is_what_the_batch_says():
    draw = "draw = model.my_batch\nmodel.my_batch = lambda number, train=True: "
    part = draw + "(*draw(number, train)[:2], draw(number, train)[2] * 0.37)"
    nothing = draw + "(draw(number, train)[0], draw(number, train)[1] * 0 - 100, 0)"
    less, none = in_processes(1, work, [({"steps": 1}, part), ({"steps": 1}, nothing)])[0]
    assert less[0] * 0.37 == pytest.approx(expected("", 4)[0], abs=1e-12)
    assert none == [0.0]


def tied_weights(pipe):
    """Of this process, after training: the tied weight, as numbers."""
    (weight, _), *_ = pipe.tied
    return weight.detach().tolist()


def test_tied_weights_are_equal_to_the_bit():
    (first, last) = in_processes(2, work, [({"steps": 5}, CHANGES["dropout"])], tied_weights)
    assert first == last


def statistics(pipe):
    """After training: the batch norm's averages, as numbers."""
    return {
        place: [*map(torch.Tensor.tolist, stage.buffers())] for place, stage in pipe.stages.items()
    }


BATCH_NORM = """
class Norm(nn.BatchNorm1d):
    def __init__(self): super().__init__(model.WIDTH)
    def forward(self, x): return super().forward(x.transpose(1, 2)).transpose(1, 2)
model.LAYERS[4], model.LAYERS[5] = Norm, Average
"""


def test_buffers_count_each_microbatch_once():
    flags = {"steps": 2, "microbatches": 4}
    both = [(flags, BATCH_NORM), ({**flags, "recompute": True}, BATCH_NORM)]
    model = template.load(BATCH_NORM)
    layers = template.made(model)
    weights = [*nn.ModuleList(layers).parameters()]
    optimizer = model.my_optimizer(weights)
    for step in range(2):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * model.my_rate(step, 2)
        x, y, count = model.my_batch(step)
        optimizer.zero_grad()
        for part, target in zip(x.tensor_split(4), y.tensor_split(4), strict=True):
            (model.my_loss(nn.Sequential(*layers)(part), target) / count).backward()
        nn.utils.clip_grad_norm_(weights, model.CLIP)
        optimizer.step()
    for _, counted in in_processes(2, work, both, statistics)[1]:
        wanted = [*layers[4].buffers(), *layers[5].buffers()]
        for ours, theirs in zip(counted[1], wanted, strict=True):
            assert ours == pytest.approx(theirs.tolist(), abs=1e-12)


def test_buffers_are_those_of_the_first_replica():
    flags = {"replicas": 2, "microbatches": 2}
    first, second = in_processes(2, work, [(flags, BATCH_NORM)], statistics)
    assert first == second
    assert isinstance(first[0][0], list)


# -------------------------------------------------------------------------------- checkpoints


def test_a_run_goes_on_as_if_uninterrupted_on_other_processes(tmp_path):
    change, save = CHANGES["dropout"], {"steps": 6, "save": tmp_path / "run"}
    whole = in_processes(2, work, [({"steps": 6}, change)])[0][0]
    begun = in_processes(2, work, [({**save, "until": 3}, change)])[0][0]
    assert len(begun) == 4  # one is an evaluation
    for processes, flags in (
        (1, {"schedule": "zb-v"}),
        (3, {"cut": [2, 7]}),
        (4, {"replicas": 2, "microbatches": 2, "schedule": "interleaved-zb"}),
    ):
        folder = shutil.copytree(tmp_path / "run", tmp_path / str(processes))
        flags |= {"steps": 6, "save": folder, "resume": folder}
        rest = in_processes(processes, work, [(flags, change)])[0][0]
        assert begun + rest == pytest.approx(whole, abs=1e-12)
        assert os.listdir(folder) == ["step00000006"]


def test_what_is_refused_when_it_is_resumed_or_saved(tmp_path):
    in_processes(1, work, [({"until": 2, "save": tmp_path}, "")])
    here = {"resume": tmp_path}
    lines = in_processes(
        2,
        work,
        [
            ({"save": tmp_path}, ""),
            ({"resume": tmp_path / "nothing"}, ""),
            (here, "model.LAYERS[3] = nn.Tanh"),
            (here, "del model.LAYERS[3]; model.TIED = []"),
            (here, CHANGES["sgd"]),
            (here, "model.TIED = []"),
            ({**here, "steps": 2}, ""),
        ],
    )
    assert lines[0] == lines[1]
    whole = tmp_path / "step00000002"
    assert lines[0] == [
        f"--save {tmp_path} holds another run: take a new folder, or --resume",
        f"--resume {tmp_path / 'nothing'}: no checkpoint is there",
        f"--resume {whole} is of another model: 3.linear1.bias is only in one",
        f"--resume {whole} is of another model: 6.0.bias is only in one",
        f"--resume {whole} is of another model: optimizer.0.place.weight.exp_avg is only in one",
        f"--resume {whole} is of another model: TIED [((0, 'token.weight'), (7, '1.weight'))]"
        " is only in one",
        [],
    ]


# ------------------------------------------------------------------------------------- errors

DIFFERS = "draw = model.my_batch\nmodel.my_batch = lambda number, train=True: {}"
SHARED = "shared = nn.Linear(16, 16)\nmodel.LAYERS[2] = model.LAYERS[6] = lambda: shared"


def takes(cut, schedule, stages, layers=8):
    rule = f"--schedule {schedule} on 2 processes takes {stages} stages, none empty"
    return f"--cut {cut} of {layers} layers: {rule}"


TIED = "model.TIED = [{}]"
DIFFER = " differ in shape or dtype, or only one is frozen"
RULE = "the same for all steps, rows a multiple of replicas * microbatches,"
WRONG = [  # flags, change, the line on each process
    (
        {},
        DIFFERS.format("draw(number + (number == 1) * dist.get_rank(), train)"),
        "my_batch(1, True) of processes [1] is not that of 0",
    ),
    (
        {},
        "model.BATCH = 10",
        "my_batch(0): x is [10, 12], must be " + RULE + " 4",
    ),
    (
        {},
        DIFFERS.format("(*[z[: 12 - 4 * (number == 2)] for z in draw(number)[:2]], 9)"),
        "my_batch(2): x is [8, 12], must be " + RULE + " 4",
    ),
    (
        {},
        DIFFERS.format("(draw(number)[0][:, : 12 - number], *draw(number)[1:])"),
        "my_batch(1): x is [12, 11], must be " + RULE + " 4",
    ),
    (
        {},
        DIFFERS.format("(*draw(number)[:2], 3 + dist.get_rank())"),
        "my_batch(0, True) of processes [1] is not that of 0",
    ),
    (
        {},
        DIFFERS.format("(draw(number)[0], torch.tensor(1), 1)"),
        "my_batch must return two tensors of as many rows, and what counts",
    ),
    ({}, "model.EVAL_EVERY = 0", "EVAL_EVERY=0 must be a number above 0 (inf: never)"),
    ({}, "model.CLIP = None", "CLIP=None must be a number above 0 (inf: never)"),
    ({"cut": [8]}, "", takes([0, 8], "1f1b", "2")),
    (
        {"cut": [2, 4], "schedule": "interleaved"},
        "",
        takes([0, 2, 4], "interleaved", "a multiple of 2"),
    ),
    ({"cut": [-1]}, "", takes([-1, 0], "1f1b", "2")),
    ({"cut": [2, 4, 6]}, "", takes([0, 2, 4, 6], "1f1b", "2")),
    ({"cut": [2, 4], "schedule": "zb-v"}, "", takes([0, 2, 4], "zb-v", "4")),
    (
        {},
        "del model.LAYERS[1:]; model.TIED = []",
        takes([0], "1f1b", "2", layers=1),
    ),
    ({"replicas": 3}, "", "--replicas 3 must divide the 2 processes"),
    (
        {"microbatches": 1},
        "",
        "--schedule 1f1b --microbatches 1, 2 stages: Number of microbatches (1) must be greater"
        " than or equal to the number of stages (2).",
    ),
    (
        {},
        "model.LAYERS[3] = model.LAYERS[3]()",
        "LAYERS[3] is a layer: it must be a function that makes one",
    ),
    ({}, SHARED, "layers 2 and 6 share weight: it must be in TIED"),
    (
        {},
        TIED.format("((0, 'tokens'), (7, '1.weight'))"),
        "TIED: ((0, 'tokens'), (7, '1.weight')): Embed has no attribute `tokens`",
    ),
    (
        {},
        TIED.format("((0, 'token.weight'), (8, 'weight'))"),
        "TIED: ((0, 'token.weight'), (8, 'weight')): list index out of range",
    ),
    (
        {},
        TIED.format("((0, 'place.weight'), (7, '1.weight'))"),
        "TIED: ((0, 'place.weight'), (7, '1.weight'))" + DIFFER,
    ),
    (
        {},
        CHANGES["head frozen"].replace("[]", "[((0, 'token.weight'), (7, '1.weight'))]"),
        "TIED: ((0, 'token.weight'), (7, '1.weight'))" + DIFFER,
    ),
    (
        {},
        TIED.format("((0, 'token.weight'), (7, '1.weight')), ((0, 'token.weight'), (4, 'x'))"),
        "TIED: ((0, 'token.weight'), (4, 'x')): Block has no attribute `x`",
    ),
    (
        {},
        TIED.format("*[((0, 'token.weight'), (7, '1.weight'))] * 2"),
        "TIED names a parameter twice: want all that are one in one line",
    ),
    (
        {},
        "model.LAYERS[3] = lambda: nn.Threshold(1e9, float('nan'))",
        "step 0: loss nan, norm of the gradient nan",
    ),
]


def test_all_processes_say_the_same_of_a_mistake():
    of_ranks = in_processes(2, work, [(flags, change) for flags, change, _ in WRONG])
    for lines in of_ranks:
        for (flags, change, line), said in zip(WRONG, lines, strict=True):
            assert said == line, (flags, change)


MEAN = """
def my_loss(output, target):
    return nn.functional.cross_entropy(output.flatten(0, 1), target.flatten())
model.my_loss = my_loss
def hidden(x, y, count):
    y[::3] = -100  # nothing counts in the first row of each microbatch
    return x, y, count
"""
NO_SUM = "my_loss must be a sum: it is divided by what counts"
NO_NUMBER = "my_loss must return one number with a gradient: a sum"
ALONE = [
    ({}, MEAN, NO_SUM),
    ({}, MEAN + DIFFERS.format("hidden(*draw(number))"), NO_SUM),
    ({}, "model.my_loss = lambda output, target: output.sum().detach()", NO_NUMBER),
    ({}, "model.my_loss = lambda output, target: output.sum(0)", NO_NUMBER),
    ({}, "model.my_loss = lambda output, target: None", NO_NUMBER),
    (
        {},
        "model.LAYERS[3] = type('Two', (nn.Module,), {'forward': lambda self, x: (x, x)})",
        "layer 3 returns a tuple: want one tensor",
    ),
    (
        {},
        "model.LAYERS[3] = lambda: nn.Linear(3, 4)",
        "layer 3: RuntimeError: mat1 and mat2 shapes cannot be multiplied (36x16 and 3x4)",
    ),
]


def test_mistakes_that_one_process_sees():
    (lines,) = in_processes(1, work, [(flags, change) for flags, change, _ in ALONE])
    assert lines == [line for *_, line in ALONE]


# ------------------------------------------------------------------------------- as a program


def copied(tmp_path, *changes):
    """A copy of the example, with (text, new text) in my_model.py."""
    shutil.copytree(EXAMPLES, tmp_path / "examples", ignore=shutil.ignore_patterns("__*"))
    shutil.copy(ROOT / "README.md", tmp_path)
    text = (EXAMPLES / "my_model.py").read_text()
    for old, new in (
        ("WIDTH, DEPTH, LENGTH", "torch.set_num_threads(1)\nWIDTH, DEPTH, LENGTH"),
        *changes,
    ):
        assert old in text
        text = text.replace(old, new, 1)
    path = tmp_path / "examples" / "my_model.py"
    path.write_text(text)
    return path


def started(path, *flags, **environment):
    """The example as a program, in a session of its own."""
    return subprocess.Popen(
        [sys.executable, path, *map(str, flags)],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def ended(process):
    """Its status, lines and errors."""
    out, err = process.communicate(timeout=120)
    return process.returncode, out.splitlines(), err.splitlines()


def processes_of(path):
    """The numbers of the processes that run this file."""
    listed = subprocess.run(["ps", "-ewwo", "pid,args"], capture_output=True, text=True).stdout
    return [int(line.split()[0]) for line in listed.splitlines() if str(path) in line]


def losses_of(lines):
    return {int(step): float(loss) for step, loss in re.findall(r"step (\d+): loss (\S+)", lines)}


def test_the_example_learns_more_than_how_frequent_each_byte_is():
    status, lines, errors = ended(started(EXAMPLES / "my_model.py", "--steps", 100))
    assert (status, errors) == (0, [])
    assert lines[0] == "starting 2 processes"
    assert [line.split(":")[0] for line in lines[1:3]] == ["step 0", "step 1"]
    text = torch.tensor([*(ROOT / "README.md").read_bytes()])
    share = text.bincount() / len(text)
    unigram = -(share * share.clamp(min=1e-9).log()).sum().item()
    assert 3.2 < unigram < 3.6
    assert lines[-1].startswith("evaluation: loss ")
    assert float(lines[-1].split()[-1]) < unigram - 0.4  # it also knows what comes before


def test_killed_at_any_moment_it_goes_on_from_the_last_checkpoint(tmp_path):
    path = copied(tmp_path, ("EVAL_EVERY, SAVE_EVERY = 50, 50", "EVAL_EVERY, SAVE_EVERY = 50, 1"))
    flags = ("--steps", 12, "--save", tmp_path / "run")
    whole = losses_of("\n".join(ended(started(path, "--steps", 12))[1]))
    said, first = "", 0
    for attempt in range(2):
        resume = ("--resume", tmp_path / "run") if attempt else ()
        process = started(path, *flags, *resume)
        while "saved" not in (line := process.stdout.readline()):
            assert line, process.stderr.read()
            said += line
        time.sleep(0.1 * attempt)  # at a moment of its own
        for number in processes_of(path):
            os.kill(number, signal.SIGKILL)
        said += line + process.communicate(timeout=20)[0]
        (*_, last) = re.findall(r"saved .*step(\d+)", said)
        found = sorted((tmp_path / "run").glob("step*"))
        assert first < int(last) <= int(found[-1].name[4:]) <= int(last) + 1
        first = int(last)
    status, lines, _ = ended(started(path, *flags, "--resume", tmp_path / "run"))
    assert status == 0
    assert os.listdir(tmp_path / "run") == ["step00000012"]
    rest = losses_of("\n".join(lines))
    assert min(rest) == int(found[-1].name[4:])
    assert {**losses_of(said), **rest} == pytest.approx(whole, abs=2e-6)


@pytest.mark.parametrize(
    ("changes", "flags", "status", "line"),
    [
        (
            (
                (
                    "x, y = ",
                    "if number and torch.distributed.get_rank(): raise KeyError('x')\n    x, y = ",
                ),
            ),
            (),
            1,
            "process 1: line 71 of my_model.py: KeyError: 'x'",
        ),
        (
            (("        return self.dropout(", "        return 2, self.dropout("),),
            (),
            2,
            "process 0: layer 0 returns a tuple: want one tensor",
        ),
        (
            (),
            ("--microbatches", 3),
            2,
            f"process 0: my_batch(0): x is [32, 64], must be {RULE} 3",
        ),
    ],
)
def test_a_mistake_is_one_line_and_ends_all_processes(tmp_path, changes, flags, status, line):
    path = copied(tmp_path, *changes)
    assert ended(started(path, *flags, "--steps", 5))[::2] == (status, [line])
    assert not processes_of(path)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_stopped_while_its_processes_import_torch_it_says_nothing(tmp_path, name):
    path, number = copied(tmp_path), getattr(signal, name)
    process = started(path, "--steps", 500)
    assert process.stdout.readline().startswith("starting")
    for _ in range(1000):
        if any(b"libtorch" in maps_of(child) for child in processes_of(path)[1:]):
            break
        time.sleep(0.01)
    os.killpg(process.pid, number)
    assert ended(process) == (128 + number, [], [])
    assert not processes_of(path)


def maps_of(number):
    try:
        with open(f"/proc/{number}/maps", "rb") as file:
            return file.read()
    except OSError:
        return b""


def test_flags_that_are_wrong_are_one_line(tmp_path):
    path = EXAMPLES / "my_model.py"
    (tmp_path / "file").write_text("mine")
    for flags, line in (
        (("--step", 3), "process 0: unrecognized arguments: --step 3"),
        (("--steps", 0), "process 0: argument --steps: must be 1 or more"),
        (("--until", 3), "process 0: --until needs --save"),
        (("--save", tmp_path / "file"), f"process 0: --save {tmp_path / 'file'} is not a folder"),
        (("--schedule", "zb-h1"), "process 0: argument --schedule: invalid choice: 'zb-h1'"),
    ):
        status, _, (said,) = ended(started(path, *flags))
        assert status == 2
        assert said.startswith(line)


def test_torchrun_starts_it_and_a_variable_that_is_left_over_does_not(monkeypatch, capfd):
    monkeypatch.chdir(ROOT)
    torchrun(TORCHRUN.removeprefix("torchrun ") + " --steps 2 --schedule zb-v", monkeypatch)
    by_torchrun = capfd.readouterr().out
    status, lines, errors = ended(started(EXAMPLES / "my_model.py", "--steps", 2, RANK="0"))
    assert (status, errors) == (0, [])
    assert losses_of("\n".join(lines)) == pytest.approx(losses_of(by_torchrun), abs=1e-4)


def test_the_files_are_short_and_take_public_names_only():
    model, trainer = ((EXAMPLES / name).read_text() for name in ("my_model.py", "pipeline.py"))
    assert model.count("\n") <= 95
    assert BY_HAND in model
    assert TORCHRUN in model
    for text in (model, trainer):
        text = text.replace("__", "").replace("os._exit", "")
        assert not re.search(r"\b_[a-z]", text)
    readme = (EXAMPLES / "README.md").read_text()
    assert BY_HAND in readme
    assert TORCHRUN in readme


def test_state_that_is_no_tensor_is_resumed_too(tmp_path):
    change = "model.my_optimizer = lambda weights: WithNumber(weights, 0.5)"
    whole = in_processes(1, work, [({"steps": 4}, change)])[0][0]
    save = {"steps": 4, "save": tmp_path}
    begun = in_processes(1, work, [({**save, "until": 2}, change)])[0][0]
    rest = in_processes(1, work, [({**save, "resume": tmp_path}, change)])[0][0]
    assert begun + rest == pytest.approx(whole, abs=1e-12)
