"""TEST_RESULTS.md says what a new run measures, but for what belongs to the machine."""

import re

import pytest
import write_results
from test_pages import PAGES, same


@pytest.mark.parametrize(
    "function", write_results.REPEATABLE, ids=lambda function: function.__name__
)
def test_the_results_are_those_of_a_new_run(function):
    measured = write_results.section(function)
    head = measured.splitlines()[0]
    found = re.search(rf"^{head}\n.*?(?=\n\n## )", PAGES["TEST_RESULTS.md"], re.M | re.S)
    shown, new = found[0].splitlines(), measured.splitlines()
    assert len(shown) == len(new)
    for a, b in zip(shown, new, strict=True):
        if function in (write_results.learning, write_results.on_the_way):
            assert close_after_training(a, b), (a, b)
        elif function is write_results.gradients:
            assert same("weight_stashing " + a, "weight_stashing " + b), (a, b)
        else:
            assert same(a, b), (a, b)


def close_after_training(shown, new):
    """Loss within 0.005, accuracy within 0.6 %, which is two of the held-out digits."""
    figure = re.compile(r"\d+\.\d+%?")
    pairs = zip(figure.findall(shown), figure.findall(new), strict=True)
    return figure.sub("#", shown) == figure.sub("#", new) and all(
        abs(float(a.strip("%")) - float(b.strip("%"))) < (0.6 if a.endswith("%") else 0.005)
        for a, b in pairs
    )


@pytest.mark.parametrize(("variant", "count"), write_results.TRAINED)
def test_two_hundred_batches_reach_93_percent_whatever_the_schedule(variant, count):
    assert min(right[200] for _, right in write_results.trained(variant, count)) >= 0.93


def test_how_late_training_is_does_not_follow_the_largest_delay():
    """3 3 3 3 is far behind at batch 50; but 3 2 1 0 is ahead of 1 1 1 1 at 20, with every seed."""
    right = {case: [on for _, on in write_results.trained(*case)] for case in write_results.TRAINED}
    by_stage, on_all = right["pipedream", 1], right["  vertical sync", 4]
    assert all(ours[20] > theirs[20] for ours, theirs in zip(by_stage, on_all, strict=True))
    last = max(on[50] for on in right.pop(("  vertical sync", 1)))
    assert last < 0.75 < 0.85 < min(on[50] for case in right.values() for on in case)


def test_the_results_have_every_section_and_nothing_else():
    page = PAGES["TEST_RESULTS.md"]
    functions = [*write_results.REPEATABLE, *write_results.ONCE]
    expected = [function.__doc__.strip().splitlines()[0] for function in functions]
    assert re.findall(r"^## .*$", page, re.M) == [*expected, "## What this does not show"]
    assert page.startswith(f"{write_results.HEAD}\n\n{write_results.contents()}\n\n")
    assert "first eight sections" in page
    assert len(write_results.REPEATABLE) == 8
    assert page.endswith(write_results.LIMITS + "\n")
