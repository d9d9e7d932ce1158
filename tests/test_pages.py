"""The pages say what the program prints now: change a number in them by hand, and this fails."""

import re
from pathlib import Path

import pytest

from pipedream_simple import (
    CONFIG,
    GradientAudit,
    Run,
    build_schedule,
    check_config,
    format_batch,
    format_comparison,
    format_timeline,
    make_parser,
    mismatches,
    parse_config,
    peak_in_flight,
    simulate,
    train,
    utilization,
)

ROOT = Path(__file__).parent.parent
PAGES = {name: (ROOT / name).read_text("utf-8") for name in ("README.md", "QUICKSTART.md")}


def blocks(page, language=""):
    """The fenced blocks of a page in that language."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", PAGES[page], re.M | re.S)
    return [text for name, text in fenced if name == language]


def config_of(flags):
    return parse_config(make_parser(""), flags.split())[0]


def test_every_output_block_is_what_the_program_prints():
    events = simulate(build_schedule(CONFIG), CONFIG)
    printed = format_timeline(events).splitlines() + format_comparison(CONFIG).splitlines()

    def on_batch(batch: int, run: Run):
        printed.extend(format_batch(batch, run, CONFIG, events, {}).splitlines())

    train(CONFIG, on_batch=on_batch)
    for page in PAGES:
        assert blocks(page)
        for line in "".join(blocks(page)).splitlines():
            assert line in printed, f"{page} shows a line that the program does not print: {line}"


@pytest.mark.parametrize("page", PAGES)
def test_every_flag_that_a_page_shows_exists_and_is_accepted(page):
    shown = re.findall(r"`(--[^`]+)`", PAGES[page])
    shown += re.findall(r"python pipedream_simple.py (--[^\n`]+)", PAGES[page])
    assert shown
    for flags in shown:
        if flags != "--help":
            check_config(config_of(flags))


def test_every_percentage_in_the_table_of_experiments_is_the_simulated_one():
    rows = re.findall(r"^\| `(--[^`]+)` \| (.*) \|$", PAGES["QUICKSTART.md"], re.M)
    checked = 0
    for flags, text in rows:
        figures = re.findall(r"(\d+\.\d)%", text)
        config = config_of(flags)
        for figure in figures[-1:]:  # where two stand there, the first is the default's
            assert f"{100 * utilization(simulate(build_schedule(config), config)):.1f}" == figure
            checked += 1
        for figure in figures[:-1]:
            assert f"{100 * utilization(simulate(build_schedule(CONFIG), CONFIG)):.1f}" == figure
    assert checked == 5


def test_the_versions_in_the_table_of_experiments_are_the_counted_ones():
    rows = dict(re.findall(r"^\| `(--[^`]+)` \| (.*) \|$", PAGES["QUICKSTART.md"], re.M))
    paper = "--num_microbatches 1 --num_batches 20"
    assert "4, 3, 2 and 1 versions" in rows[paper]
    assert train(config_of(paper)).peak_versions == [4, 3, 2, 1]
    assert "4 on every GPU" in rows[paper + " --vertical_sync True"]
    assert train(config_of(paper + " --vertical_sync True")).peak_versions == [4, 4, 4, 4]


def test_the_figures_in_the_readmes_story_are_the_computed_ones():
    story = " ".join(PAGES["README.md"].split())
    wrong = len(mismatches(build_schedule({**CONFIG, "weight_stashing": False})))
    assert f"{wrong} of the {4 * 4 * 5} backwards" in story
    eight = {**CONFIG, "num_microbatches": 8}
    assert max(peak_in_flight(build_schedule({**eight, "schedule": "gpipe"}))) == 8
    assert "(with `--num_microbatches 8` GPipe holds eight)" in story
    assert max(peak_in_flight(build_schedule({**eight, "schedule": "1f1b"}))) == 4
    assert "at most four microbatches in flight" in story
    slow = {**eight, "comm_time": 1}
    busy = {
        name: utilization(simulate(build_schedule({**slow, "schedule": name}), slow))
        for name in ("gpipe", "1f1b", "pipedream")
    }
    assert busy["gpipe"] > max(busy["1f1b"], busy["pipedream"])
    assert "GPipe overtakes them" in story


def test_the_gradient_error_grows_as_the_readme_says():
    def worst(**settings):
        config = {**CONFIG, "weight_stashing": False, **settings}
        audit = GradientAudit(config)
        train(config, watch=audit)
        return max(audit.error.values())

    default = worst()
    for settings in ({"num_stages": 8}, {"num_microbatches": 1}, {"learning_rate": 0.3}):
        assert worst(**settings) > 1.1 * default, settings
    assert "grows with more stages, with more staleness" in " ".join(PAGES["README.md"].split())


@pytest.mark.parametrize("page", PAGES)
def test_every_file_that_a_page_links_to_exists(page):
    for target in re.findall(r"\]\((?!https?://)([^)#]+)\)", PAGES[page]):
        assert (ROOT / target).exists(), target


def test_the_rooms_that_the_readme_lists_are_the_banners_of_the_file():
    source = (ROOT / "pipedream_simple.py").read_text("utf-8")
    banners = re.findall(r"^# -{20,} (.+)$", source, re.M)
    table = re.search(r"\| room of .*?\n\n", PAGES["README.md"], re.S)[0]
    rows = [row for row in table.splitlines() if row.startswith("|")][2:]
    listed = [name for row in rows for name in row.split("|")[1].split(",")]
    assert [name.strip() for name in listed if name.strip()] == banners
    for name in re.findall(r"`([A-Za-z_]+)`", table):
        assert re.search(rf"^(def|class) {name}\b", source, re.M) or name == "pipedream_simple"
