"""The page in a real browser: what it shows and says is what the Python functions give."""

import base64
import gzip
import json
import os
import re
import shutil
from functools import cache

import pytest
from playwright.sync_api import expect, sync_playwright
from test_pictures import contrast

from pipedream.backstage.measures import idle_times, short_name
from pipedream.commands.page import page_data, write_page
from pipedream.schedules.plans import PLAN_CONFIG, all_plans
from pipedream.schedules.reasons import Reasons, critical_path, explain_moment, explain_op
from pipedream_simple import Event, makespan, utilization

BROWSERS = "chromium-headless-shell", "chromium", "google-chrome", "chrome"
ALONE = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync"]
CONFIGS = {
    "default": {},
    "two": {"num_stages": 2, "num_microbatches": 2, "comm_time": 0.5, "backward_time": 2},
    "M = 1": {"num_microbatches": 1, "num_batches": 8},
    "tenths": {"num_stages": 2, "forward_time": [0.1, 0.7]},
    "8 x 32": {"num_stages": 8, "num_microbatches": 32},
    "pairs": {"num_stages": 2, "num_microbatches": 4, "layers_per_stage": 2, "overlap_time": 0.8},
    "slow": {"num_batches": 1, "comm_time": 3},
}


@pytest.fixture(scope="session")
def browser():
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if not found:
        missing = f"no browser to try the page in: none of {', '.join(BROWSERS)}"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(missing)
    with sync_playwright() as engine:
        shell = engine.chromium.launch(executable_path=found, args=ALONE)
        yield shell
        shell.close()


@pytest.fixture(scope="session")
def page_of(tmp_path_factory):
    """page_of(name) -> the file of the page at that config, written once."""

    @cache
    def get(name):
        file = tmp_path_factory.mktemp("page") / "pipeline.html"
        write_page({**PLAN_CONFIG, **CONFIGS[name]}, file)
        return file

    return get


@pytest.fixture
def visit(browser, page_of):
    """visit(name) -> the page in the browser. Nothing goes wrong in it, and nothing leaves it."""
    complaints, requests, contexts = [], [], []

    def opens(name="default", **settings):
        context = browser.new_context(**{"viewport": {"width": 1200, "height": 900}, **settings})
        page = context.new_page()
        page.set_default_timeout(10_000)
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(page_of(name).as_uri())
        page.wait_for_selector("svg")
        contexts.append(context)
        return page

    yield opens
    for context in contexts:
        context.close()
    assert complaints == []
    assert not [url for url in requests if not url.startswith(("data:", "file:"))]


def plans_of(name):
    return [plan.rounded() for plan in all_plans({**PLAN_CONFIG, **CONFIGS[name]})[0]]


def pipedream_of(name):
    return next(plan for plan in plans_of(name) if plan.name == "pipedream")


def choose(page, name, below=""):
    page.select_option("#first", label=name.strip())
    page.select_option("#second", **({"label": below} if below else {"value": ""}))


def answer(page):
    return page.locator("#answer p").all_inner_texts()


def clock(page):
    return float(page.inner_text("#clock")[1:])


# --------------------------------------------------------------------------- causes and reasons

POINT_AT_ALL = """() => ["op", "idle"].map((what) =>
  Object.fromEntries([...document.querySelectorAll(`rect[data-${what}]`)].map((box) => {
    box.dispatchEvent(new PointerEvent("pointerover", { bubbles: true }));
    const lines = [...document.querySelectorAll("#answer p")].map((line) => line.textContent);
    return [box.dataset[what], lines];
  })))"""


@pytest.mark.parametrize("name", ["default", "two", "M = 1", "tenths", "pairs", "slow"])
def test_pointing_says_what_the_python_functions_say(visit, name):
    page, plans = visit(name), plans_of(name)
    page.check("#future")
    for plan in plans:
        choose(page, plan.name)
        ops, idle = page.evaluate(POINT_AT_ALL)
        assert len(ops) == len(plan.events)
        gaps, reasons = idle_times(plan.events, plan.links), Reasons(plan)
        assert len(idle) == len(gaps)
        for place, gap in enumerate(gaps):
            assert idle[str(place)] == [reasons.explain_idle(gap)]
        for place in range(0, len(plan.events), max(1, len(plan.events) // 25)):
            event = plan.events[place]
            if event.op.kind == "U":
                assert ops[str(place)] == [reasons.reads(event.op)]
            else:
                first, *more = explain_op(reasons, event)
                assert ops[str(place)][0] == first
                assert sorted(ops[str(place)][1:]) == sorted(more)


# ------------------------------------------------------------------------------ the time so far


@pytest.mark.parametrize(
    ("name", "schedule"),
    [("default", "zb-h2"), ("two", "interleaved"), ("M = 1", "zb-h2"), ("pairs", "dualpipe-v")],
)
def test_every_step_shows_what_was_computed_and_held_until_then(visit, name, schedule):
    page, plan = visit(name), next(plan for plan in plans_of(name) if plan.name == schedule)
    choose(page, schedule)
    page.keyboard.press("Home")
    times = sorted({time for e in plan.events for time in (e.start, e.end)})
    assert clock(page) == 0
    for time in times[1:40]:
        page.click("#forth")
        assert clock(page) == pytest.approx(time)
        cut = [e._replace(end=min(e.end, time)) for e in plan.events if e.start < time]
        heading = page.inner_text("h2")
        spans = {e[1:] for e in cut}  # two ops at once are one
        busy = sum(end - start for _, start, end in spans) / time / len(plan.schedule)
        (shown,) = re.findall(r": ([\d.]+)% busy", heading)
        assert float(shown) == pytest.approx(100 * busy, abs=0.0501)
        for device, row in enumerate(plan.schedule):
            ended = {e.op for e in plan.events if e.device == device and e.end <= time}
            weights = {"F": 1, "B": -1, "W": -1}
            in_flight = sum(weights.get(op.kind, 0) for op in ended) / len({op.stage for op in row})
            made = {0} | {op.version + 1 for op in ended if op.kind == "U"}
            used = {op.version for op in row if op not in ended} | {max(made)}
            kept = " ".join(f"v{v}" for v in sorted(made & used))
            text = page.locator(".names > div").nth(device).inner_text()
            assert f"{in_flight:.3g} in flight, {kept}" in text
    page.keyboard.press("End")
    assert f"{utilization(plan.events):.1%} busy in all, done at t{makespan(plan.events):.12g}" in (
        page.inner_text("h2")
    )


def test_the_future_is_hidden_until_it_is_asked_for(visit):
    page, plan = visit(), pipedream_of("default")
    visible = """() => [...document.querySelectorAll("[data-op], [data-idle]")].filter((box) => {
      const { left, top, width, height } = box.getBoundingClientRect();
      return document.elementFromPoint(left + width / 2, top + height / 2) === box;
    }).map((box) => box.dataset.op ?? "idle " + box.dataset.idle)"""
    gaps = idle_times(plan.events, plan.links)
    boxes = {str(i): event for i, event in enumerate(plan.events) if event.op.kind != "U"}
    boxes |= {f"idle {i}": gap for i, gap in enumerate(gaps)}
    for step in range(9):
        shown, now = set(page.evaluate(visible)), clock(page)
        centers = {label: (box.start + box.end) / 2 for label, box in boxes.items()}
        assert {label for label, center in centers.items() if center < now} <= shown
        assert not {label for label, center in centers.items() if center > now} & shown
        page.keyboard.press("ArrowRight")
        assert clock(page) == step + 1
    page.hover('rect[data-op="0"]')
    assert answer(page)[-1].startswith("Its result goes to F0 of GPU1")
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    page.hover('rect[data-op="0"]')
    assert not any("Its result" in line for line in answer(page)), "that has not happened yet"


def test_keys_step_play_follow_and_ask_about_gpus(visit):
    page, plan = visit(), pipedream_of("default")
    for _ in range(5):
        page.keyboard.press("ArrowRight")
    assert clock(page) == 5
    for key, gpu, time in (("ArrowDown", 1, 4.5), ("ArrowRight", 1, 5.5), ("ArrowUp", 0, 5.5)):
        page.keyboard.press(key)
        assert answer(page)[0] == explain_moment(plan, gpu, time)[0]
    page.keyboard.press("ArrowLeft")
    assert clock(page) == 5
    page.keyboard.press("End")
    assert clock(page) == 46
    page.keyboard.press("Home")
    path = [e for e in critical_path(plan) if e.op.kind != "U"]
    for event in path[:7]:
        page.keyboard.press("f")
        assert clock(page) == event.end
        assert answer(page)[0].startswith(f"GPU{event.device} runs {short_name(event)} from")
    page.keyboard.press("Home")
    page.keyboard.press(" ")
    assert page.inner_text("#play") == "Pause"
    expect(page.locator("#clock")).to_have_text("t2")
    page.keyboard.press(" ")
    assert page.inner_text("#play") == "Play"


# --------------------------------------------------------------------------- what else it draws


def test_the_critical_path_is_the_one_that_python_finds(visit):
    page = visit("two")
    for plan in plans_of("two"):
        choose(page, plan.name)
        page.check("#critical")
        read = "found => found.map(x => +x.dataset.op)"
        marked = page.eval_on_selector_all(".critical .path", read)
        path = [e for e in critical_path(plan) if e.op.kind != "U"]
        assert [plan.events[i] for i in sorted(marked)] == sorted(path, key=plan.events.index)
        page.uncheck("#critical")
        assert page.locator(".critical").count() == 0


def test_two_ops_at_once_lie_one_below_the_other_and_both_can_be_pointed_at(visit):
    page = visit("pairs")
    plan = next(plan for plan in plans_of("pairs") if plan.name == "dualpipe-v")
    choose(page, "dualpipe-v")
    page.check("#future")
    spans = {}
    for number, event in enumerate(plan.events):
        if event.start < event.end:
            spans.setdefault(event[1:], []).append(number)
    pairs = [numbers for numbers in spans.values() if len(numbers) == 2]
    assert len(pairs) == len(plan.pairs) > 4
    for pair in pairs:
        boxes = [page.locator(f'rect[data-op="{number}"]').bounding_box() for number in pair]
        upper, lower = sorted(boxes, key=lambda box: box["y"])
        assert upper["y"] + upper["height"] <= lower["y"] + 1
        assert (upper["x"], upper["width"]) == (lower["x"], lower["width"])
        page.hover(f'rect[data-op="{pair[1]}"]')
        other = short_name(plan.events[pair[0]])
        assert f"It runs together with {other}, as a pair" in " ".join(answer(page))


def test_two_schedules_share_one_time_axis(visit):
    page, plans = visit(), plans_of("default")
    choose(page, "pipedream", below="gpipe")
    page.check("#future")
    boxes = page.evaluate(
        """() => [...document.querySelectorAll("svg")].map((svg) => Object.fromEntries(
          [...svg.querySelectorAll("rect[data-op]:not(.U)")].map((box) =>
            [box.dataset.op, [box.x, box.width].map((l) => l.baseVal.value)])))"""
    )
    scales = set()
    plan_of = {plan.name: plan for plan in plans}
    for name, found in zip(("pipedream", "gpipe"), boxes, strict=True):
        plan = plan_of[name]
        for place, (x, width) in found.items():
            event = plan.events[int(place)]
            scales.add(round(width / (event.end - event.start), 3))
            assert x == pytest.approx(event.start * width / (event.end - event.start), abs=0.02)
    assert len(scales) == 1
    page.keyboard.press("End")
    assert clock(page) == 70
    assert page.locator("h2").all_inner_texts() == [
        "pipedream: 87.0% busy in all, done at t46",
        "gpipe: 57.1% busy in all, done at t70",
    ]


def test_colors_tell_microbatches_or_versions_apart_and_forwards_are_dark(visit):
    page, plan = visit("M = 1"), pipedream_of("M = 1")
    fills = """found => Object.fromEntries(found.map((box) =>
      [box.dataset.op, box.getAttribute("fill")]))"""
    for choice, key in (("3", "microbatch"), ("4", "version")):
        page.select_option("#hue", choice)
        found = page.eval_on_selector_all("rect.op:not(.U)", fills)
        color = {}
        for place, fill in found.items():
            op = plan.events[int(place)].op
            assert color.setdefault((op.kind, getattr(op, key) % 6), fill) == fill
        assert len(set(color.values())) == len(color)


@pytest.mark.parametrize("gpu", [0, 3])
def test_a_guess_is_judged_by_what_the_gpu_really_does_next(visit, gpu):
    page, plan = visit(), pipedream_of("default")
    page.select_option("#which", str(gpu))
    score, found = 0, [*plan.events, *idle_times(plan.events, plan.links)]
    for turn in range(12):
        now = clock(page)
        mine = [e for e in found if e.device == gpu and e.end > e.start]
        busy = next((e.end for e in mine if isinstance(e, Event) and e.start < now < e.end), now)
        (truth,) = (e for e in mine if e.start <= busy < e.end)
        is_op = isinstance(truth, Event)
        page.click("#ask")
        names = page.locator("#choices button").all_inner_texts()
        right = short_name(truth) if is_op else "it is idle"
        assert right in names
        assert len(names) == len(set(names)) >= 2
        guess = right if turn % 3 else names[0]
        score += guess == right
        page.click(f"#choices button >> text={guess}")
        said = page.inner_text("#verdict")
        reason = explain_moment(plan, gpu, (max(truth.start, busy) + truth.end) / 2)[0]
        assert said == ("Right. " if guess == right else "No. ") + reason
        assert page.inner_text("#score") == f"{score} of {turn + 1} right"
        assert clock(page) == truth.end
    page.keyboard.press("End")
    page.click("#ask")
    assert "over" in page.inner_text("#verdict")


# ---------------------------------------------------------------------- any reader, any screen


@pytest.mark.parametrize("width", [360, 800, 1600])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_the_screen_and_its_text_can_be_read(visit, width, scheme):
    page = visit(viewport={"width": width, "height": 740}, color_scheme=scheme)
    choose(page, "interleaved", below="zb-h1")
    page.keyboard.press("End")
    page.keyboard.press("ArrowDown")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    read = """(pairs) => pairs.map(([what, ground]) => {
      const style = (name) => getComputedStyle(document.querySelector(name));
      return [style(what).color, style(ground).backgroundColor];
    })"""
    pairs = [["body", "body"], [".quiet", "body"], ["#answer", "#answer"], ["#quiz", "#quiz"]]
    for pair in page.evaluate(read, pairs):
        rgb = ([int(part) / 255 for part in re.findall(r"\d+", color)[:3]] for color in pair)
        assert contrast(*rgb) >= 4.5, pair
    small = page.eval_on_selector_all(
        "button, select", "found => found.map((b) => [b.offsetWidth, b.offsetHeight])"
    )
    assert all(min(size) >= 40 for size in small if size[0]), "too small for a finger"


def test_everything_is_there_in_words_and_by_name(visit):
    page, plan = visit(), pipedream_of("default")
    for _ in range(5):
        page.keyboard.press("ArrowRight")
    page.click("#words summary")
    expect(page.locator("#words li")).to_have_count(4)
    said = page.locator("#words li").all_inner_texts()
    assert said == [explain_moment(plan, device, 4.5)[0] for device in range(4)]
    page.keyboard.press("ArrowRight")
    assert page.locator("#words li").nth(3).inner_text() == explain_moment(plan, 3, 5.5)[0]
    label = page.get_by_role("img").get_attribute("aria-label")
    assert label == "pipedream: the lanes of 4 GPUs up to t6"
    nameless = "found => found.filter((x) => !(x.textContent || x.ariaLabel || x.labels?.length))"
    assert page.eval_on_selector_all("button, select, input", nameless) == []
    assert page.get_attribute("#scrub", "aria-valuetext") == "t6"


def test_eight_gpus_with_32_microbatches_can_be_read_on_a_phone_with_a_finger(visit):
    page = visit("8 x 32", viewport={"width": 360, "height": 740}, has_touch=True)
    choose(page, "interleaved", below="gpipe")
    page.tap("#forth")
    page.tap('rect[data-op="0"] >> nth=0')
    assert answer(page)[0].startswith("GPU0 runs F0 from")
    assert page.locator("svg").count() == 2
    assert "F0" in page.locator("svg text").all_text_contents()
    width = page.locator("rect.op").first.bounding_box()["width"]
    assert width > 20
    page.click("#wider")
    wider = page.locator("rect.op").first.bounding_box()["width"]
    assert wider == pytest.approx(1.5 * width, abs=1)


# ------------------------------------------------------------------------------------ the file


def test_the_page_holds_the_data_and_says_what_is_left_out(page_of):
    text = page_of("two").read_text()
    packed = re.search(r'id="data" type="text/plain">([^<]*)<', text)[1]
    data = json.loads(gzip.decompress(base64.b64decode(packed)))
    assert data == json.loads(json.dumps(page_data({**PLAN_CONFIG, **CONFIGS["two"]})))
    data = page_data({**PLAN_CONFIG, "num_stages": 8})
    assert "interleaved is left out" in data["left_out"]
    for name, switches in (("pipedream", {}), ("vertical sync", {"vertical_sync": True})):
        data = page_data({**PLAN_CONFIG, **switches})
        assert data["plans"][data["first"]]["name"] == name
    assert all(plan["about"].endswith(".") for plan in data["plans"])


def test_the_program_writes_one_file_and_says_where(run, tmp_path):
    assert run("page", "--num_batches", 1) == (0, "pipeline.html: open it in a browser\n", "")
    (tmp_path / "my.csv").write_text("0F0,0F1,0B0,0B1\n1F0,1B0,1F1,1B1\n")
    status, _, err = run("page", "--schedule", "my.csv", "--out", "new/pages")
    assert (status, err) == (0, "")
    assert sorted(p.name for p in tmp_path.rglob("*.html")) == ["pipeline.html"] * 2
    data = page_data({**PLAN_CONFIG, "schedule": str(tmp_path / "my.csv")})
    assert data["plans"][data["first"]]["name"] == "my"
    assert data["settings"].startswith("2 GPUs, 2 microbatches per batch")
