"""The page in a real browser: what it shows and says is what the Python functions give."""

import base64
import gzip
import itertools
import json
import os
import re
import shutil
from functools import cache
from xml.etree import ElementTree

import pytest
from playwright.sync_api import expect, sync_playwright
from test_pictures import contrast

from pipedream.backstage.measures import idle_times, peak_in_flight, short_name
from pipedream.commands import page
from pipedream.commands.page import CHOICES, page_data, sizes, write_page
from pipedream.schedules.plans import PLAN_CONFIG, all_plans
from pipedream.schedules.reasons import Reasons, critical_path, explain_moment, explain_op
from pipedream.schedules.rows import LIBRARY
from pipedream_simple import NAMES, Event, makespan, utilization

PROGRESS = "page: 1 of 2 sizes\npage: 2 of 2 sizes\n"
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
    "6 and 4": {"num_stages": 6, "schedule": "gpipe"},
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
    """page_of(name) -> the file of the page at that config, or with all sizes, written once."""

    @cache
    def get(name):
        file = tmp_path_factory.mktemp("page") / "pipeline.html"
        own = {**PLAN_CONFIG, **CONFIGS[name]} if name in CONFIGS else None
        more = {"sizes": sizes(), "6 and 4": sizes()[12:13]}.get(name, [])
        write_page(own, more, file)
        return file

    return get


@pytest.fixture
def visit(browser, page_of):
    """visit(name) -> the page in the browser, at the start of the run, with all its controls.

    With fresh=True as it opens. Nothing goes wrong in it, and nothing leaves it.
    """
    complaints, requests, contexts = [], [], []

    def opens(name="default", fresh=False, address="", **settings):
        context = browser.new_context(**{"viewport": {"width": 1200, "height": 900}, **settings})
        page = context.new_page()
        page.set_default_timeout(10_000)
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(page_of(name).as_uri() + address)
        page.wait_for_selector("svg")
        contexts.append(context)
        if not fresh:
            page.click("text=Explore")
            page.evaluate("document.activeElement.blur()")
            page.keyboard.press("Home")
        return page

    yield opens
    for context in contexts:
        context.close()
    assert complaints == []
    assert not [url for url in requests if not url.startswith(("data:", "file:"))]


@cache
def plans_of(name):
    return [plan.rounded() for plan in all_plans({**PLAN_CONFIG, **CONFIGS[name]})[0]]


def plan_of(name, schedule="pipedream"):
    return next(plan for plan in plans_of(name) if plan.name == schedule)


def in_page(plan):
    """The events of a plan as the page counts them: GPU by GPU."""
    return sorted(plan.events, key=lambda event: event.device)


def short(text):
    """Its times with four digits."""
    return re.sub(r"t\d+\.\d{3,}", lambda found: f"t{float(found[0][1:]):.4g}", text)


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
            assert idle[str(place)] == [short(reasons.explain_idle(gap))]
        for place in range(0, len(plan.events), max(1, len(plan.events) // 25)):
            event = in_page(plan)[place]
            if event.op.kind == "U":
                assert ops[str(place)] == [reasons.reads(event.op)]
            else:
                first, *more = map(short, explain_op(reasons, event))
                assert ops[str(place)][0] == first
                assert sorted(ops[str(place)][1:]) == sorted(more)


# ------------------------------------------------------------------------------ the time so far


def count_held(plan, device, row, time):
    """Microbatches in flight on a GPU at that time, and its versions: counted from ops and ends."""
    ended = {e.op for e in plan.events if e.device == device and e.end <= time}
    weights = {"F": 1, "B": -1, "W": -1}
    in_flight = sum(weights.get(op.kind, 0) for op in ended) / len({op.stage for op in row})
    made = {0} | {op.version + 1 for op in ended if op.kind == "U"}
    used = {op.version for op in row if op not in ended} | {max(made)}
    return in_flight, " ".join(f"v{v}" for v in sorted(made & used))


@pytest.mark.parametrize(
    ("name", "schedule"),
    [("default", "zb-h2"), ("two", "interleaved"), ("M = 1", "zb-h2"), ("pairs", "dualpipe-v")],
)
def test_every_step_shows_what_was_computed_and_held_until_then(visit, name, schedule):
    page, plan = visit(name), plan_of(name, schedule)
    choose(page, schedule)
    times = sorted({time for e in plan.events for time in (e.start, e.end)})
    assert clock(page) == 0
    for time in times[1:40]:
        page.click("#forth")
        assert clock(page) == pytest.approx(time, rel=5e-4)
        cut = [e._replace(end=min(e.end, time)) for e in plan.events if e.start < time]
        heading = page.inner_text("h2")
        spans = {e[1:] for e in cut}  # two ops at once are one
        busy = sum(end - start for _, start, end in spans) / time / len(plan.schedule)
        (shown,) = re.findall(r": ([\d.]+)% busy", heading)
        assert float(shown) == pytest.approx(100 * busy, abs=0.0501)
        for device, row in enumerate(plan.schedule):
            in_flight, kept = count_held(plan, device, row, time)
            text = page.locator(".names > div").nth(device).inner_text()
            assert f"{in_flight:.3g} in flight" in text
            assert kept in text.splitlines()
    page.keyboard.press("End")
    done = short(f"t{makespan(plan.events):.12g}")
    assert f"{utilization(plan.events):.1%} busy, done at {done}" in page.inner_text("h2")


STRIPS = """() => ["held", "kept"].map((kind) =>
  [...document.querySelectorAll("." + kind)].map((box) => [+box.dataset.gpu,
    +box.dataset.value, box.x.baseVal.value, box.width.baseVal.value]))"""


@pytest.mark.parametrize("schedule", ["gpipe", "pipedream", "interleaved", "zb-h2"])
def test_the_strips_are_what_each_gpu_holds_at_every_time(visit, schedule):
    page, plan = visit(viewport={"width": 1200, "height": 1100}), plan_of("default", schedule)
    choose(page, schedule)
    times = sorted({time for e in plan.events for time in (e.start, e.end)})
    last = page.locator("rect.unknown").first.evaluate("box => box.width.baseVal.value")
    scale = last / times[-1]
    memory, versions = page.evaluate(STRIPS)

    def at(strip, device, time):
        (value,) = (v for gpu, v, x, w in strip if gpu == device and x <= time * scale < x + w)
        return value

    for (since, until), (device, row) in itertools.product(
        itertools.pairwise(times), enumerate(plan.schedule)
    ):
        in_flight, kept = count_held(plan, device, row, since)
        assert at(memory, device, (since + until) / 2) == pytest.approx(in_flight, rel=0.005)
        assert at(versions, device, (since + until) / 2) == len(kept.split())
    most = [max(v for gpu, v, *_ in memory if gpu == device) for device in range(4)]
    assert most == pytest.approx(peak_in_flight(plan.schedule), rel=0.005)


def test_the_future_is_hidden_until_it_is_asked_for(visit):
    page, plan = visit(), plan_of("default")
    choose(page, "pipedream")
    visible = """() => [...document.querySelectorAll("[data-op], [data-idle]")].filter((box) => {
      const { left, top, width, height } = box.getBoundingClientRect();
      return document.elementFromPoint(left + width / 2, top + height / 2) === box;
    }).map((box) => box.dataset.op ?? "idle " + box.dataset.idle)"""
    gaps = idle_times(plan.events, plan.links)
    boxes = {str(i): event for i, event in enumerate(in_page(plan)) if event.op.kind != "U"}
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
    page, plan = visit(), plan_of("default")
    choose(page, "pipedream")
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
        assert [in_page(plan)[i] for i in sorted(marked)] == sorted(path, key=in_page(plan).index)
        page.uncheck("#critical")
        assert page.locator(".critical").count() == 0


def test_two_ops_at_once_lie_one_below_the_other_and_both_can_be_pointed_at(visit):
    page = visit("pairs")
    plan = plan_of("pairs", "dualpipe-v")
    choose(page, "dualpipe-v")
    page.check("#future")
    spans = {}
    for number, event in enumerate(in_page(plan)):
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
        other = short_name(in_page(plan)[pair[0]])
        assert f"It runs together with {other}, as a pair" in " ".join(answer(page))


def test_two_schedules_share_one_time_axis(visit):
    page = visit()
    choose(page, "pipedream", below="gpipe")
    page.check("#future")
    boxes = page.evaluate(
        """() => [...document.querySelectorAll("svg")].map((svg) => Object.fromEntries(
          [...svg.querySelectorAll("rect[data-op]:not(.U)")].map((box) =>
            [box.dataset.op, [box.x, box.width].map((l) => l.baseVal.value)])))"""
    )
    scales = set()
    for name, found in zip(("pipedream", "gpipe"), boxes, strict=True):
        plan = plan_of("default", name)
        for place, (x, width) in found.items():
            event = in_page(plan)[int(place)]
            scales |= {width / (event.end - event.start), x / (event.start or 1)} - {0}
    assert max(scales) - min(scales) < 0.02
    page.keyboard.press("End")
    assert clock(page) == 70
    assert page.locator("h2").all_inner_texts() == [
        "PipeDream: 87.0% busy, done at t46",
        "GPipe: 57.1% busy, done at t70",
    ]


def test_colors_tell_microbatches_or_versions_apart_and_forwards_are_dark(visit):
    page, plan = visit("M = 1"), plan_of("M = 1")
    fills = """found => Object.fromEntries(found.map((box) =>
      [box.dataset.op, box.getAttribute("fill")]))"""
    choose(page, "pipedream")
    for key, hues in (("microbatch", 6), ("version", 4)):
        page.select_option("#hue", key)
        found = page.eval_on_selector_all("rect.op:not(.U)", fills)
        color = {}
        for place, fill in found.items():
            op = in_page(plan)[int(place)].op
            assert color.setdefault((op.kind, getattr(op, key) % hues), fill) == fill
        assert len(set(color.values())) == len(color)


@pytest.mark.parametrize("gpu", [0, 3])
def test_a_guess_is_judged_by_what_the_gpu_really_does_next(visit, gpu):
    page, plan = visit(), plan_of("default")
    choose(page, "pipedream")
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
        said = answer(page)[0]
        reason = explain_moment(plan, gpu, (max(truth.start, busy) + truth.end) / 2)[0]
        assert said == ("Right. " if guess == right else "No. ") + reason
        assert page.inner_text("#score") == f"{score} of {turn + 1} right"
        assert clock(page) == truth.end
    page.keyboard.press("End")
    page.click("#ask")
    assert "over" in answer(page)[0]


# ---------------------------------------------------------------------- any reader, any screen


TEXTS = """() => {
  const found = [], walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  const style = (of, name) => getComputedStyle(of)[name];
  const opaque = (color) => !/, 0\\)$|none/.test(color);
  while (walk.nextNode()) {
    const of = walk.currentNode.parentElement, text = walk.currentNode.textContent.trim();
    if (!text || !of.checkVisibility() || of.closest("script, style, noscript")) continue;
    let ground = of;
    if (of.closest("svg")) {
      const box = of.getBoundingClientRect();
      const under = document.elementsFromPoint(box.x + box.width / 2, box.y + box.height / 2);
      const fills = under.filter((each) => each.matches("rect")).map((each) => style(each, "fill"));
      if (under.includes(of))  // not scrolled away
        found.push([text, style(of, "fill"), fills.find(opaque) ?? "rgb(255, 255, 255)"]);
      continue;
    }
    while (ground !== document.body && !opaque(style(ground, "backgroundColor")))
      ground = ground.parentElement;
    found.push([text, style(of, "color"), style(ground, "backgroundColor")]);
  }
  return found;
}"""
BOXES = """() => [...document.querySelectorAll(
  "h1, h2, h2 + p, button, select, input, #legend > span, .names b, .names span, #answer p, text")]
  .filter((each) => each.checkVisibility() && each.closest("#app") && each.textContent + each.id)
  .map((each) => [each, each.getBoundingClientRect()]).filter(([each, box]) => {
    const clip = (each.closest(".scroll, #answer, #panels") ?? each).getBoundingClientRect();
    const within = each.closest("#panels")?.getBoundingClientRect() ?? clip;
    return box.width && box.left >= clip.left && box.right <= clip.right &&
      box.top >= within.top && box.bottom <= Math.min(within.bottom, clip.bottom);
  }).map(([each, { left, top, right, bottom }]) =>
    [each.textContent.trim() || each.id, left, top, right, bottom])"""


def assert_nothing_overlaps(page):
    panels, said = (page.locator(name).bounding_box() for name in ("#panels", "#answer"))
    assert panels["y"] + panels["height"] <= said["y"] + 1, "the answer covers a lane"
    boxes = page.evaluate(BOXES)
    assert len(boxes) > 20
    for (a, *one), (b, *other) in itertools.combinations(boxes, 2):
        wide = min(one[2], other[2]) - max(one[0], other[0])
        high = min(one[3], other[3]) - max(one[1], other[1])
        assert wide < 1.5 or high < 3, (a, one, b, other)


@pytest.mark.parametrize("width", [360, 390, 800, 1600])
def test_it_fits_the_screen_and_its_text_can_be_read(visit, width):
    page = visit("pairs", viewport={"width": width, "height": 844}, color_scheme="dark")
    choose(page, "dualpipe-v", below="zb-h1")
    page.keyboard.press("End")
    page.keyboard.press("ArrowDown")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.add_style_tag(content="* { pointer-events: auto !important }")
    for choice in ("microbatch", "version"):
        page.select_option("#hue", choice)
        texts = page.evaluate(TEXTS)
        assert len(texts) > 50
        for text, *pair in texts:
            rgb = ([int(part) / 255 for part in re.findall(r"\d+", color)[:3]] for color in pair)
            assert contrast(*rgb) >= 4.5, (text, pair)
    small = page.eval_on_selector_all(
        "button, select", "found => found.map((b) => [b.offsetWidth, b.offsetHeight])"
    )
    assert all(min(size) >= 40 for size in small if size[0]), "too small for a finger"


def test_on_a_phone_nothing_overlaps_and_the_lanes_have_the_room(visit):
    phone = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}
    page = visit("sizes", fresh=True, **phone)
    assert_nothing_overlaps(page)
    assert page.locator("#panels").bounding_box()["height"] > 844 / 2
    assert page.locator("#app").bounding_box()["height"] <= 844
    assert not page.locator(".keys").is_visible()
    for name in NAMES:
        page.tap(f"#story [data-name={name!r}]")
        assert_nothing_overlaps(page)
        page.tap("#choices button >> nth=0")
        assert_nothing_overlaps(page)
    page.tap("text=Explore >> nth=0")
    for size in (("2", "4"), ("8", "16")):
        for place, value in enumerate(size):
            page.select_option(f"#sizes select >> nth={place}", value)
        for below in ("", "gpipe"):
            choose(page, "zb-v", below=below)
            page.keyboard.press("End")
            assert_nothing_overlaps(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


@pytest.mark.parametrize("schedule", ["zb-v", "interleaved-zb", "pipedream"])
def test_labels_keep_apart_and_a_stripe_tells_the_chunk(visit, schedule):
    page = visit("sizes", address="#size=4+8+1+0")
    choose(page, schedule)
    page.check("#future")
    assert_nothing_overlaps(page)
    config = next(c for c in sizes() if [c[key] for key in CHOICES] == [4, 8, 1, 0])
    plan = next(plan for plan in all_plans(config)[0] if plan.name == schedule)
    stages = [sorted({op.stage for op in row}) for row in plan.schedule]
    second = sum(e.op.kind != "U" and e.op.stage != stages[e.device][0] for e in plan.events)
    assert page.locator(".chunk").count() == second
    assert (second == 0) == (schedule == "pipedream")


def test_everything_is_there_in_words_and_by_name(visit):
    page, plan = visit(), plan_of("default")
    choose(page, "pipedream")
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
    page.tap("#fit")
    ends = page.evaluate("[...document.querySelectorAll('svg')].map((svg) => svg.clientWidth)")
    assert max(ends) <= 360 - 80 - 16
    page.evaluate("zoomTo(1)")
    page.click("#wider")
    wider = page.locator("rect.op").first.bounding_box()["width"]
    assert wider == pytest.approx(1.5 * width, abs=1)


# ------------------------------------------------------------- the first screen and the story


def test_it_opens_on_an_idle_gpu_in_the_first_batch_of_1f1b_and_says_why(visit):
    page, plan = visit("sizes", fresh=True), plan_of("default", "1f1b")
    first_batch = max(e.end for e in plan.events if e.op.microbatch < 4)
    assert page.locator("h2").inner_text().startswith("1F1B")
    assert 0.25 < clock(page) / first_batch < 0.75
    spot = page.locator("rect.why")
    assert spot.is_visible()
    gaps = [gap for gap in idle_times(plan.events, plan.links) if gap.end == clock(page)]
    reasons = [Reasons(plan).explain_idle(gap) for gap in gaps if gap.cause == "wait"]
    assert answer(page)[0] in reasons
    assert page.locator("#panels").bounding_box()["height"] > 500
    lane = page.locator("rect.idle").first.bounding_box()["height"]
    assert lane > 60, "as tall as the window allows"
    assert page.locator("#story [aria-current]").inner_text() == "3 1F1B"


def test_the_story_is_a_path_of_four_steps_for_the_keyboard_alone(visit):
    page = visit("sizes", fresh=True)
    page.keyboard.press("Tab")
    for number, (name, title) in enumerate(NAMES.items(), 1):
        focus = "document.activeElement.textContent"
        assert page.evaluate(focus) in (f"{number} {title}", f"Next: {title}")
        page.keyboard.press("Enter")
        assert page.locator("h2").inner_text().startswith(title)
        assert page.locator("#story [aria-current]").inner_text() == f"{number} {title}"
        sentence = page.locator("h2 + p").inner_text()
        assert sentence.endswith(".")
        assert name == "pipedream" or sentence in LIBRARY[name][0].__doc__
        plan, now = plan_of("default", name), clock(page)
        (gpu,) = re.fullmatch(r"What does GPU(\d) do next, at t[\d.]+\?", answer(page)[0]).groups()
        assert now < max(e.end for e in plan.events if e.op.microbatch < 4)
        runs = [e for e in plan.events if e.device == int(gpu) and e.start == now]
        right = short_name(runs[0]) if runs else "it is idle"
        names = page.locator("#choices button").all_inner_texts()
        for _ in range(names.index(right)):
            page.keyboard.press("Tab")
        page.keyboard.press(" ")
        said = explain_moment(plan, int(gpu), now)[0]
        assert answer(page)[0] == f"Right. {said}"
        assert page.locator("text=" + said[:40]).count() == 1, "said once"
    assert page.inner_text("#score") == "4 of 4 right"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "first"
    page.keyboard.type("zb-v")
    assert page.locator("h2").inner_text().startswith("zb-v")
    reached = set()
    for _ in range(60):
        page.keyboard.press("Tab")
        reached.add(
            page.evaluate("[...document.querySelectorAll('*')].indexOf(document.activeElement)")
        )
    every = """[...document.querySelectorAll('button, select, input, summary')]
      .filter((each) => each.checkVisibility())
      .map((each) => [...document.querySelectorAll('*')].indexOf(each))"""
    assert {*page.evaluate(every)} <= reached


SHOWN = """() => ["panels", "answer", "clock", "settings"].map((id) => $(id).textContent)
  .concat([...document.querySelectorAll("rect, line")].map((each) => each.outerHTML))
  .concat([...document.querySelectorAll("select, input")].map((i) => i.value + i.checked))"""


def test_the_address_shows_another_reader_the_same(visit):
    page = visit("sizes")
    page.select_option("#sizes select >> nth=0", "8")
    page.select_option("#sizes select >> nth=3", "0.5")
    choose(page, "zb-h1", below="gpipe")
    states = [
        lambda: page.click("#wider"),
        lambda: page.locator('svg >> nth=1 >> [data-op="3"]').dispatch_event("click"),
        lambda: page.select_option("#hue", "version"),
        lambda: page.check("#critical"),
        lambda: page.click("#ask"),
        lambda: page.check("#future"),
    ]
    page.evaluate("goTo(9)")
    for change in states:
        change()
        page.wait_for_timeout(200)
        other = visit("sizes", fresh=True, address="#" + page.url.partition("#")[2])
        assert other.evaluate(SHOWN) == page.evaluate(SHOWN)
        other.context.close()
    for nonsense in ("#size=9+9+9+9&t=x&op=-1", "#schedule=my&with=1", "#t=1e99&zoom=-3", "#%"):
        assert visit("sizes", fresh=True, address=nonsense).locator("svg").count() == 1


# --------------------------------------------------------------------------- sizes and pictures


def test_sizes_are_chosen_in_the_page_and_are_what_python_computes(visit):
    page = visit("sizes")
    for values in ([2, 4, 1, 0], [8, 8, 2, 0.5], [4, 16, 2, 0], [8, 16, 1, 0.5]):
        for place, value in enumerate(values):
            page.select_option(f"#sizes select >> nth={place}", str(value))
        (config,) = (c for c in sizes() if [c[key] for key in CHOICES] == values)
        plans, left_out = all_plans(config)
        options = page.locator("#first option").all_inner_texts()
        assert options == [plan.name.strip() for plan in plans]
        assert len(options) == (13 if config["num_microbatches"] >= 2 * values[0] else len(plans))
        assert page.inner_text("#left-out") == " ".join(" ".join(left_out).split())
        for plan in plans[:: len(plans) // 3]:
            choose(page, plan.name)
            page.keyboard.press("End")
            assert f": {utilization(plan.events):.1%} busy" in page.inner_text("h2")
            assert page.locator("rect[data-op]").count() == len(plan.events)


def test_it_opens_on_the_readers_own_run_beside_the_sizes(visit):
    page = visit("6 and 4", fresh=True)
    assert page.locator("h2").inner_text().startswith("GPipe")
    assert page.locator(".names > div").count() == 6
    page.click("text=Explore >> nth=0")
    assert page.is_checked("#own")
    choose(page, "gpipe", below="1f1b")
    page.uncheck("#own")
    expect(page.locator(".names > div")).to_have_count(2 * 4)
    page.check("#own")
    expect(page.locator(".names > div")).to_have_count(2 * 6)
    assert page.locator("h2").all_inner_texts()[1].startswith("1F1B")


def test_each_schedule_is_found_by_name_with_a_sentence(visit):
    page = visit("sizes")
    rows = page.locator("#all li").all_inner_texts()
    names = page.locator("#first option").all_inner_texts()
    assert len(rows) == len(names)
    for name, row in zip(names, rows, strict=True):
        assert row.startswith(name)
        assert len(row) > len(name) + 20
        page.click(f"#all button >> text=/^{name}$/")
        assert page.locator(".panel").get_attribute("data-name") == name


def test_the_picture_is_a_file_with_as_many_ops_as_the_lanes(visit):
    page = visit()
    choose(page, "interleaved", below="pipedream")
    page.check("#future")
    with page.expect_download() as download:
        page.click("#save")
    assert download.value.suggested_filename == "interleaved-pipedream.svg"
    root = ElementTree.parse(download.value.path()).getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    found = [each for each in root.iter() if "data-op" in each.attrib]
    assert len(found) == page.locator("[data-op]").count() > 200
    words = " ".join("".join(each.itertext()) for each in root.iter())
    assert "PipeDream" in words
    assert "GPU3" in words


# ------------------------------------------------------------------------------------ the file


def unpacked(text):
    """The run, from columns of differences."""
    run = json.loads(gzip.decompress(base64.b64decode(text)))
    for key in ("ops", "idle"):
        rows = zip(*map(itertools.accumulate, run.pop(key)), strict=True)
        for plan in run["plans"]:
            plan[key] = [[*row] for row in itertools.islice(rows, plan[key])]
    return run


def test_the_page_holds_the_data_and_says_what_is_left_out(page_of):
    text = page_of("two").read_text()
    shared = json.loads(re.search(r'id="data" type="application/json">([^<]*)<', text)[1])
    own = page_data({**PLAN_CONFIG, **CONFIGS["two"]})
    assert unpacked(shared["runs"]["own"]) == json.loads(json.dumps(own))
    data = page_data({**PLAN_CONFIG, "num_stages": 8})
    assert "interleaved is left out" in data["left_out"]
    for name, switches in (("1f1b", {}), ("vertical sync", {"vertical_sync": True})):
        data = page_data({**PLAN_CONFIG, **switches})
        assert data["plans"][data["first"]]["name"] == name
    assert all(plan["about"].endswith(".") for plan in data["plans"])


def test_the_page_with_all_sizes_is_one_small_file(page_of):
    text = page_of("sizes").read_text()
    assert len(text.encode()) < 1_000_000
    assert not re.findall(r"(?:src|href)=\"(?!data:)", text)
    assert text.count('"4 4 1 0"') == 3  # a run; the default; and what it opens on


def test_the_program_writes_one_file_and_says_where(run, tmp_path, monkeypatch):
    monkeypatch.setattr(page, "sizes", lambda: sizes()[:2])
    assert run("page") == (0, "pipeline.html: open it in a browser\n", PROGRESS)
    assert run("page", "--num_batches", 1).status == 0
    (tmp_path / "my.csv").write_text("0F0,0F1,0B0,0B1\n1F0,1B0,1F1,1B1\n")
    status, _, err = run("page", "--schedule", "my.csv", "--out", "new/pages")
    assert (status, err) == (0, PROGRESS)
    assert sorted(p.name for p in tmp_path.rglob("*.html")) == ["pipeline.html"] * 2
    data = page_data({**PLAN_CONFIG, "schedule": str(tmp_path / "my.csv")})
    assert data["plans"][data["first"]]["name"] == "my"
    assert data["settings"].startswith("2 GPUs, 2 microbatches per batch")
