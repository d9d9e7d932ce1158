"""One answer for every reader: the list of the README, applied. And fit agrees with its advice."""

import re
from itertools import product

import pytest
from conftest import ROOT

from pipedream.commands.fit import PYTORCH
from pipedream.planning.decide import (
    CLOSE,
    MORE,
    MUCH,
    SIMPLEST,
    TITLES,
    Case,
    choose,
    enough_gpus,
    walk,
)
from pipedream.planning.layouts import NO_PIPELINE, RECOMPUTE, Layout, Need, Way

README = (ROOT / "README.md").read_text("utf-8")
DECIDE = (ROOT / "examples" / "README.md").read_text("utf-8").partition("**Decide.**")[2]
DECIDE = DECIDE.partition("\n## ")[0]
ROWS = [row.strip("| ").split(" | ") for row in re.findall(r"^\| `llama.*$", DECIDE, re.M)]


def answer_of(out):
    """(the answer, GB on the fullest GPU, the flags that show it), from what fit prints."""
    text = " ".join(out.partition("\nAnswer: ")[2].split())
    answer, number = re.match(r"(.*?)\. GPU\d+ holds (\S+) GB", text).groups()
    return answer, number, *re.findall(r"To see it, add (.*)$", text)


# --------------------------------------------------------------------------------- the list


def test_the_list_of_the_readme_is_that_of_the_program():
    assert tuple(re.findall(r"^\d\. \*\*(.*?)\*\*", DECIDE, re.M)) == TITLES
    assert len(ROWS) == 6


@pytest.mark.parametrize(("flags", "answer", "gigabytes"), ROWS)
def test_the_table_of_the_readme_has_the_answers_of_the_program(run, flags, answer, gigabytes):
    found, number, *_ = answer_of(run("fit", *flags.strip("`").split()).out)
    assert (re.sub(r" \(PyTorch.*?\)", "", found), number) == (answer, gigabytes)


@pytest.mark.parametrize(
    "flags",
    [
        *(flags.strip("`") for flags, *_ in ROWS),
        "--gpus 7",
        "--gpus 2 --microbatch_size 4",  # smaller ones fit
        "--gpus 16 --machine 2 --memory 24e9 --microbatch_size 2",
        "llama-2-13b --gpus 16 --machine 1 --num_microbatches 16 --memory 32e9",  # with recompute
        "gemma-2-9b --gpus 32 --machine 4 --memory 24e9",
        "mixtral-8x7b --gpus 64 --machine 4",
        f"{ROOT}/examples/my_model.py --gpus 2",
        f"{ROOT}/examples/my_model.py --gpus 2 --memory 3e6",
    ],
)
def test_fit_with_the_flags_of_its_answer_gives_that_answer(run, flags):
    answer, gigabytes, *shown = answer_of(run("fit", *flags.split()).out)
    assert shown or "pipeline" in answer  # over all GPUs: that is its table
    out = run("fit", *flags.split(), *" ".join(shown).split()).out
    assert answer_of(out) == (answer, gigabytes)
    assert f" {gigabytes}+" in out  # in the table
    assert "as you gave" in out or not shown


# ------------------------------------------------------------------------------------ steps 1 to 4


def gigabytes(layout, kind):
    """Of a model with 2 + 4 + 12 of state and 16 of activations."""
    divided = [layout.shards if layout.zero >= stage else 1 for stage in (3, 2, 1)]
    state = sum(size / by for size, by in zip((2, 4, 12), divided, strict=True))
    return state / (layout.tensor * layout.stages) + {"none": 16, "layer": 2}[kind] / layout.tensor


def every_layout(gpus, machine, heads, number):
    """Without a pipeline and with each stage of ZeRO; in parts, with as much of it as is free."""
    for zero in range(4 if gpus > 1 else 1):
        yield Layout(gpus, 1, 1, zero, machine, number)
    for tensor, stages in product(range(1, gpus + 1), repeat=2):
        parts = tensor * stages
        most = max(t for t in range(1, parts + 1) if not parts % t + machine % t + heads % t)
        if parts > 1 and gpus % parts == 0 and tensor == most:
            yield Layout(gpus // parts, tensor, stages, int(gpus > parts), machine, number)


@pytest.mark.parametrize("gpus", [1, 2, 3, 4, 6, 8, 16])
def test_the_answer_is_the_simplest_of_all_layouts_that_fit(gpus):
    """No recompute, no parts, a low stage of ZeRO: in this order."""
    steps = set()
    for machine, heads, number, memory in product((1, 2, 8), (1, 4), (1, 4, 6, 16), range(4, 36)):
        said, found = walk(Case(gpus, machine, heads, memory, [number], gigabytes))
        can = [
            (kind == "layer", layout.tensor * layout.stages, layout.zero, layout)
            for layout in every_layout(gpus, machine, heads, number)
            for kind in ("none", "layer")
            if gigabytes(layout, kind) <= memory and number % layout.replicas == 0
        ]
        again, parts, zero, layout = min(can, default=(True, 0, 0, None))
        step = 4 if again else 3 if parts > 1 else 2 if zero else 1
        assert [int(line[0]) for line in said] == [*range(1, step + 1)]
        assert ["? Yes: " in line for line in said] == [False] * (len(said) - 1) + [bool(can)]
        assert found.fits == bool(can)
        steps.add(step)
        if layout:
            assert found.layout == layout._replace(zero=max(zero, gpus > parts))
    assert steps == ({1, 4} if gpus == 1 else {1, 2, 3, 4})


def test_smaller_microbatches_come_before_any_other_layout(run):
    """Half as large, half of the activations, twice as many of them."""
    answer, _, flags = answer_of(run("fit", "--gpus", 2, "--microbatch_size", 4).out)
    assert answer == "tensor parallelism over 2 GPUs"
    assert flags == "--tensor 2 --num_microbatches 128 --microbatch_size 1"
    case = Case(8, 8, 8, 26, [8, 16, 32], lambda layout, kind: 18 + 16 * 8 / layout.microbatches)
    _, found = walk(case)
    assert (found.layout, found.need) == (Layout(8, 1, 1, 1, 8, 16), 26)


def test_as_many_gpus_as_it_says_are_enough_and_half_of_them_are_not():
    for memory, number in product(range(3, 30), (4, 64)):
        case = Case(2, 8, 8, memory, [number], gigabytes)
        if not walk(case)[1].fits and (enough := enough_gpus(case)):
            assert walk(case._replace(gpus=enough))[1].fits
            assert not walk(case._replace(gpus=enough // 2))[1].fits
    assert enough_gpus(Case(2, 8, 8, 0.1, [64], gigabytes)) == 0
    parts = Case(2, 8, 8, 0.5, [4, 64], lambda each, _: 100 / each.microbatches / each.tensor)
    assert enough_gpus(parts) == 4  # with the smaller ones


# ------------------------------------------------------------------------------------ steps 5 and 6


def ways(times, gigabytes=1.0, **others):
    """Schedules with these times; others: their memory, where it is another one."""
    return [
        Way(
            name,
            {kind: Need(0, 0, 0, 0, 0, others.get(name, gigabytes), 0) for kind in RECOMPUTE},
            dict.fromkeys(RECOMPUTE, time),
            {},
        )
        for name, time in times.items()
    ]


PIPELINE = Layout(1, 1, 4, 0, 8, 16)


def test_only_what_pytorch_has_is_advised():
    have = {name for name, pytorch in PYTORCH.items() if pytorch != "-"}
    assert {*SIMPLEST} == have | {NO_PIPELINE}
    said, best, _ = choose(ways({"1f1b": 2, "zb-h2": 1, "pipedream 2BW": 1}), PIPELINE, 1)
    assert best.name == "1f1b"
    assert "zb-h2" not in said[0]


@pytest.mark.parametrize(
    ("times", "best"),
    [
        ({"1f1b": 1.04, "zb-v": 1.0}, "1f1b"),  # within 5 %
        ({"zb-v": 1.0, "1f1b": 1.06, "interleaved": 1.04}, "interleaved"),
        ({"1f1b": 1.2, "interleaved": 1.1, "zb-v": 1.0, "dualpipe-v": 1.0}, "zb-v"),
        ({"gpipe": 1.0, "1f1b": 1.0}, "1f1b"),
    ],
)
def test_of_schedules_that_are_nearly_the_fastest_the_simplest_is_taken(times, best):
    assert CLOSE == 1.05
    assert choose(ways(times), PIPELINE, 1)[1].name == best


def test_a_schedule_that_does_not_fit_is_not_advised_and_recompute_comes_last():
    two = ways({"1f1b": 1.5, "zb-v": 1.0}, **{"zb-v": 3})
    assert choose(two, PIPELINE, 2)[1:] == (two[0], "none")
    smaller = two[0]._replace(needs={**two[0].needs, "layer": Need(0, 0, 0, 0, 0, 0.5, 0)})
    assert choose([smaller, two[1]], PIPELINE, 0.7)[1:] == (smaller, "layer")
    assert choose(two, PIPELINE, 0.7) == ([], None, "stage")


def test_old_gradients_are_worth_a_try_where_the_time_is_what_a_late_batch_costs_adam():
    """The README's table of prices: at most about so many times as many batches, one late."""
    (row,) = re.findall(r"^\| one batch late[^|]*\|(.*)\|$", README, re.M)
    prices = [float(price.strip(" ~")) for price in row.split("|")[2].split("/")]  # of Adam
    assert abs(max(prices) - MUCH) < 0.1
    (row,) = re.findall(r"^\| seven late on the first[^|]*\|(.*)\|$", README, re.M)
    assert abs(max(float(price.strip(" ~")) for price in row.split("|")[2].split("/")) - MORE) < 0.1
    for time, answer in (
        (1.4, "No: 1f1b takes 1.40 times"),
        (1.6, "Perhaps: 1f1b takes 1.60 times"),
    ):
        said, *_ = choose(ways({"1f1b": time, "pipedream 2BW": 1.0}), PIPELINE, 1)
        assert said[1].startswith(f"6. {TITLES[5]} {answer} as long as pipedream 2BW")


def test_pipedream_2bw_is_compared_where_it_delays_by_one_batch_and_else_pipedream():
    found = ways({"gpipe": 2, "pipedream 2BW": 1.0, "pipedream 2019": 0.5})
    for number, name in ((3, "pipedream 2BW"), (2, "pipedream 2019")):  # four stages
        said, *_ = choose(found, PIPELINE._replace(microbatches=number), 1)
        assert f"times as long as {name}." in said[1]
    said, *_ = choose(ways({"1f1b": 2, "pipedream 2BW": 1.0}, **{"pipedream 2BW": 2}), PIPELINE, 1)
    assert said[1].endswith("No: pipedream 2BW does not fit.")


@pytest.mark.parametrize(
    "flags",
    [
        "llama-3.2-1b --memory 17.3e9 --machine 1 --num_microbatches 3 --microbatch_size 3"
        " --sequence 2048 --layers 20",
        "--gpus 96 --memory 3.06e9 --machine 1 --num_microbatches 24 --microbatch_size 8"
        " --sequence 128 --layers 16",
        "--gpus 2 --machine 1 --num_microbatches 5 --layers 8 --sequence 2048 --memory 20.582e9",
    ],
)
def test_the_answer_fits_as_the_step_before_has_said(run, flags):
    """Also with fewer microbatches than stages, or a number that PyTorch refuses for some."""
    text = " ".join(run("fit", *flags.split()).out.partition("\n1. ")[2].split())
    assert "Yes: " in text
    assert "nothing fits" not in text
    assert ("recompute per" in text) == ("4. Does it fit with recompute? Yes" in text)
    assert not ("--num_microbatches 5" in flags and "zb-h1" in text.partition("5. ")[2])


def test_so_many_gpus_would_do_and_they_do(run):
    small = ["--microbatch_size", 64, "--num_microbatches", 8, "--sequence", 512]
    small += ["--memory", 0.95e9]
    said = " ".join(run("fit", "--gpus", 16, *small).out.split())
    enough = re.search(r"(Not even )?(\d+) GPUs would do", said)
    assert enough[1] or "nothing fits" not in run("fit", "--gpus", enough[2], *small).out


def test_1f1b_is_not_advised_with_fewer_microbatches_than_pytorch_takes():
    found = ways({"1f1b": 1.0, "gpipe": 1.5})
    for number, name in ((4, "1f1b"), (3, "gpipe")):  # four stages
        _, best, _ = choose(found, PIPELINE._replace(microbatches=number), 1)
        assert best.name == name
