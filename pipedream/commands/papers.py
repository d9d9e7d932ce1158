"""Do the numbers agree with the papers?

    python -m pipedream papers

Figures of a simulation or a formula must come out to the last digit; if one does not, the exit
status is 1. Measured ones cannot, and their lines say how far off they are. Published figures are
in pipedream/published.py, or where ours are computed. The report also prints the docstrings of the
functions in the room "sources": where figures are from, and what was assumed.
"""

import functools
import inspect
import math
import sys
from collections.abc import Iterator
from fractions import Fraction
from typing import NamedTuple

from pipedream.backstage.audit import VersionCount
from pipedream.backstage.measures import idle_times, peak_in_flight
from pipedream.planning.profiles import read_graph
from pipedream.planning.search import best_partition
from pipedream.published import PROFILES, PUBLISHED, TABLE_5
from pipedream.schedules.halves import train_plan
from pipedream.schedules.plans import PLAN_CONFIG, Plan, make_plan
from pipedream_simple import Op, Step, format_per_gpu, format_table, inputs_of, makespan, simulate

TAKES = ""

# --------------------------------------------------------------------------------------- ours


class Figure(NamedTuple):
    """A published figure beside ours."""

    what: str
    published: str
    ours: str
    exact: bool = True  # must agree to the last digit

    @property
    def off(self) -> float:
        """How far ours is from the published one, as a share of that. nan: they are not numbers."""
        try:
            return float(self.ours) / float(self.published) - 1
        except (ValueError, ZeroDivisionError):
            return math.nan

    @property
    def difference(self) -> str:
        """= for figures that agree and must; otherwise how far ours is off."""
        if self.exact and self.ours == self.published:
            return "="
        share = "" if math.isnan(self.off) else f"{self.off:+.1%}"
        return f"{share}  NOT EXACT".strip() if self.exact else share


def digits(number: float, places: int = 4) -> str:
    """.2431, as the papers print it."""
    return f"{number:.{places}f}".removeprefix("0")


def plan_of(name: str, p, m, forward=1.0, backward=2.0, w=0.0, comm=0.0, v=1, **more) -> Plan:
    """One batch of m microbatches on p GPUs with v chunks each, if it has them (zb-v has two).

    Times are of a GPU; w is W's part of a backward, 0 half of it.
    """
    config = {"schedule": name, "num_stages": p, "num_microbatches": m, "num_batches": 1}
    config |= {"forward_time": forward, "backward_time": backward, "weight_gradient_time": w}
    config |= {"comm_time": comm, "batch_size": m, "layers_per_stage": 2 * v, "chunks_per_gpu": v}
    config |= {"recompute": False, "vertical_sync": False, "weight_stashing": True, "in_flight": 0}
    config |= {"network": "residual", "hidden_size": 12, "device": "cpu"}
    return make_plan({**PLAN_CONFIG, **config, **more})


def cost(plan: Plan) -> float:
    """The longest time that a GPU takes from its first op to its last.

    In a long run a batch takes as long: each GPU goes on after its own update.
    """
    first = {event.device: event.start for event in reversed(plan.events)}
    return max(event.end - first[event.device] for event in plan.events)


def shortcut(plan: Plan) -> float:
    """The time of 1F1B-I where most microbatches need not wait between GPU p - 1 and GPU 0.

    They go around the GPUs in groups of p. The first of a group starts its next round when it has
    arrived, the others as soon as the GPU is free. No GPU can do that.
    """
    p = len(plan.schedule)

    def needed(op: Op, num_stages: int) -> list[Step]:
        around = op.stage % p == (0 if op.kind == "F" else p - 1) and op.microbatch % p
        steps = inputs_of(op, num_stages)
        return [step for step in steps if step[0] == op.stage] if around else steps

    return max(event.end for event in simulate(plan.schedule, plan.config, inputs=needed))


@functools.cache  # of times that take seconds to simulate
def bubble_rates() -> list[tuple[str, dict[str, str], dict[str, float]]]:
    """A line of TABLE_5: what it is about, what its columns say, and what comes out."""
    columns, *lines = (line.split() for line in TABLE_5.splitlines())
    rows = []
    for line in lines:
        says = dict(zip(columns, line, strict=True))
        p, m, layers = (int(says[key]) for key in ("p", "m", "layers"))
        f, i, w, comm = (float(says[key]) for key in ("T_F", "T_B", "T_W", "T_comm"))
        setting = p, m, f, i + w, w, comm
        plan = plan_of("interleaved", *setting, layers // p)
        costs = {"all": cost(plan), "shortcut": shortcut(plan)}
        for name in ("1F1B", "ZB-H1", "ZB-H2"):
            costs[name] = cost(plan_of(name.lower(), *setting))
        rates = {name: 1 - m * (f + i + w) / time for name, time in costs.items()}
        rows.append((f"{says['model']} p={p} m={m}", says, rates))
    return rows


# ------------------------------------------------------------------------------------ sources


def table_5() -> Iterator[Figure]:
    """Zero Bubble (Qi et al., ICLR 2024, arXiv 2401.10241), Table 5: bubble rates

    From profiled times, simulated there and here. Assumed: an op starts when its
    GPU is free and its input has arrived (a link carries one message at a time,
    but here they are so short that none waits for another); the rate is
    1 - m (F + I + W) / cost, and the cost the time from a GPU's first op to its
    last (with ZB-H2, GPUs do not wait for each other between batches). The
    column ZB-1p is that of ZB-H1.
    """
    for name in ("1F1B", "ZB-H1", "ZB-H2"):
        for what, published, ours in bubble_rates():
            yield Figure(f"{name} {what}", published[name], digits(ours[name]))


def table_5_interleaved() -> Iterator[Figure]:
    """The same table, 1F1B-I: with all dependencies, and with a shortcut

    "all" is `interleaved` as it is here: every op waits for its input. The
    printed rates come out with a "shortcut": of a group of p microbatches that go
    from the last GPU back to GPU0 (backwards: the other way) only the first one
    waits for its input. No GPU can do that: the others may start too early.
    """
    for name, exact in (("all", False), ("shortcut", True)):
        for what, published, ours in bubble_rates():
            yield Figure(f"{name} {what}", published["1F1B-I"], digits(ours[name]), exact)


def table_4() -> Iterator[Figure]:
    """Zero Bubble, Table 4: throughput, measured on A100s, as a ratio to 1F1B

    Ours: the ratio of 1 - bubble rate, with all dependencies; ZB-H1 stands for
    ZB-1p. The profiled times leave out the optimizer and were taken in runs of
    ZB-2p. Not explained: why 1F1B-I gains so much less than simulated, more than
    the optimizer or the rounding of the published figures can account for.
    """
    for name, ours in (("ZB-1p", "ZB-H1"), ("1F1B-I", "all")):
        for what, says, rates in bubble_rates():
            published = digits(float(says[f"{name}/s"]) / float(says["1F1B/s"]), 3)
            gain = digits((1 - rates[ours]) / (1 - rates["1F1B"]), 3)
            yield Figure(f"{name} {what}", published, gain, exact=False)


def equal_times() -> Iterator[Figure]:
    """The repository of Zero Bubble, for F = I = W: multiples of 1F1B

    Assumed: p = 8, m = 32. ZB-1P is ZB-H1 here, ZB-2P ZB-H2; the first GPU's
    activations, where 2 stands for 2 - 1 / p. ZB-V has no bubble at the memory of
    1F1B. The price: two stages per GPU, so twice the messages; the first and the
    last stage of the network on one GPU; with other than equal times a bubble.
    Then, in forwards of a GPU, closed forms: one batch; each further one, which is
    3 m and the bubble; microbatches held.
    """
    closed = {"1f1b": "117 117 8", "zb-h1": "103 103 8", "zb-h2": "103 96 15", "zb-v": "99.5 96 8"}
    plans = {name: plan_of(name, 8, 32) for name in closed}
    idle = {name: cost(plan) - 32 * 3 for name, plan in plans.items()}
    held = {name: peak_in_flight(plan.schedule)[0] for name, plan in plans.items()}
    sent = {name: sum(map(len, plan.links.values())) for name, plan in plans.items()}
    for name, bubble, most in (("zb-h1", "1/3", "1"), ("zb-h2", "0", "2"), ("zb-v", "0", "1")):
        part = Fraction(idle[name] / idle["1f1b"]).limit_denominator(1000)
        yield Figure(f"bubble of {name}", bubble, str(part))
        times = f"{held[name] / held['1f1b']:g}"
        yield Figure(f"activations of {name}", most, times, exact=name != "zb-h2")
    yield Figure("messages of zb-v", "2", f"{sent['zb-v'] / sent['1f1b']:g}")
    for name, published in closed.items():
        one, two = (makespan(plan_of(name, 8, 32, num_batches=n).events) for n in (1, 2))
        yield Figure(name, published, f"{one:g} {two - one:g} {held[name]:g}")


def several_stages() -> Iterator[Figure]:
    """Several stages per GPU, for F = I = W: bubble and activations in closed form

    In forwards of a GPU, and in microbatches. interleaved (Megatron-LM):
    3 (p - 1) / v, and p + (p - 1) / v if m > p. looped-bfs (Lamy-Poirier, MLSys
    2023): the same bubble, and m. interleaved-zb: ZB1P's bubble over v, and p; it
    is PyTorch's, which publishes no formula.
    """
    for p, m, v in ((4, 8, 2), (8, 32, 4)):
        turns = (p - 1) / v
        closed = {"interleaved": (3 * turns, p + turns), "looped-bfs": (3 * turns, m)}
        for name, (bubble, most) in {**closed, "interleaved-zb": (turns, p)}.items():
            plan = plan_of(name, p, m, v=v)
            ours = f"{cost(plan) - 3 * m:g}, {max(peak_in_flight(plan.schedule)):g}"
            yield Figure(f"{name} p={p} m={m} v={v}", f"{bubble:g}, {most:g}", ours)


def dualpipe() -> Iterator[Figure]:
    """DeepSeek-V3 (arXiv 2412.19437), its table of bubbles: 1F1B and ZB1P

    (p - 1)(F + B) and (p - 1)(F + B - 2W), where B is a whole backward. Assumed:
    m = 3 p, F = 1. ZB1P is zb-h1.
    """
    for p, b, w in ((4, 2, 1), (8, 2, 1), (8, 2.5, 1), (16, 2, 0.75)):
        for name, formula in (("1f1b", (p - 1) * (1 + b)), ("zb-h1", (p - 1) * (1 + b - 2 * w))):
            idle = cost(plan_of(name, p, 3 * p, 1, b, w)) - 3 * p * (1 + b)
            yield Figure(f"{name} p={p} B={b:g} W={w:g}", f"{formula:g}", f"{idle:g}")


def in_pairs() -> Iterator[Figure]:
    """The same table, DualPipe, here dualpipe-v: PP stages on D = PP / 2 GPUs

    (PP/2 - 1)(F&B + B - 3W), where F&B is a pair that overlaps, and PP + 1 chunks
    of activations per GPU. Assumed: m = 3 D, times per stage, a pair is one op.
    Ours is the GPU that idles most, until the batch is done. That is the formula
    if I = F, W <= F and B <= F&B (I = B - W). With B <= F&B it is an upper bound if
    I is longer than F and than W, and too low if I is shorter than F.

    Which GPU idles most? All have 2 m forwards and 2 m backwards to run in the same
    time, and each pair saves F + B - F&B: the more pairs, the more idle time. GPU d
    has 2 (m - D) - (D - 1 - d) pairs, the last GPU one less. Backwards start on
    GPU0, which has the loss. Until the first one has been to the last GPU and back,
    GPU d runs D - 1 - d of them in halves, to pass on I early, and overlaps none.
    So the last two GPUs, at the bottom of the V, idle most, and GPU0 least.
    """
    times = [(2, 1, 2, 1, 2), (8, 1, 2, 1, 2.5), (16, 1, 2, 1, 2), (4, 1, 1.5, 0.5, 2)]
    times += [(4, 1, 3, 1, 3), (4, 2, 4, 1, 5), (4, 1, 1.5, 0.75, 2)]  # I longer, longer, shorter
    for d, f, b, w, both in [*times, *((4, 1, 2, 1, both) for both in (3, 2.5, 2))]:
        plan = plan_of("dualpipe-v", d, 3 * d, 2 * f, 2 * b, 2 * w, overlap_time=both / (f + b))
        waits = idle_times(plan.events, plan.links)
        idle = [sum(i.end - i.start for i in waits if i.device == gpu) for gpu in range(d)]
        what, formula = f"D={d} F={f} B={b} W={w} F&B={both}", f"{(d - 1) * (both + b - 3 * w):g}"
        yield Figure(what, formula, f"{max(idle):g}", exact=b - w == f)
    for gpu, row in enumerate(plan.schedule):  # of the last one
        pairs = sum(op[:3] in plan.pairs for op in row)
        yield Figure(f"   GPU{gpu}, {pairs} pairs", formula, f"{idle[gpu]:g}", exact=gpu >= d - 2)
    held = [f"{2 * number:g}" for number in peak_in_flight(plan.schedule)]
    yield Figure("   chunks held", format_per_gpu([2 * d + 1] * d), format_per_gpu(held))


def megatron() -> Iterator[Figure]:
    """Megatron-LM (Narayanan et al., SC 2021), section 2.2: bubble over ideal time

    (p - 1) / m, and (p - 1) / (v m) with v chunks per GPU. Assumed: backward = 2
    forward, free links. Measured there: recomputing costs up to 33 % of the
    throughput at small batches; ours is a batch that takes a third longer.
    """
    for p, m, v in ((4, 8, 1), (4, 8, 2), (8, 32, 1), (8, 32, 2), (8, 32, 4), (16, 16, 2)):
        name = "interleaved" if v > 1 else "1f1b"
        ours = cost(plan_of(name, p, m, v=v)) / (3 * m) - 1
        yield Figure(f"p={p} m={m} v={v}", digits((p - 1) / (v * m)), digits(ours))
    once, again = (cost(plan_of("1f1b", 8, 32, recompute=on)) for on in (False, True))
    yield Figure("throughput lost by recomputing", ".33", digits(1 - once / again, 2), exact=False)


def gpipe_throughput() -> Iterator[Figure]:
    """GPipe (Huang et al., NeurIPS 2019), Table 2: Transformer, M = 32, throughput

    Measured on TPUs, over K = 2 with M = 1, which is one GPU at a time. Assumed:
    equal stages and free links. Not explained: the difference; stages and links of
    theirs may not be like that. (Rows M = 1 and 4: their batches were fitted to the
    memory, so they are left out.)
    """
    for p, published in ((2, "1.8"), (4, "3.4"), (8, "6.3")):
        ours = cost(plan_of("naive", p, 32)) / cost(plan_of("gpipe", p, 32))
        yield Figure(f"K={p} M=32", published, f"{ours:.2f}", exact=False)


def two_versions() -> Iterator[Figure]:
    """PipeDream-2BW (Narayanan et al., ICML 2021), section 3.1: weight versions

    Two on every GPU, in `pipedream` with vertical sync, if M >= p: counted while
    training, as weights that exist in memory.
    """
    for p, m in ((4, 4), (4, 8), (8, 8)):
        versions = VersionCount()
        train_plan(plan_of("pipedream", p, m, num_batches=5, vertical_sync=True), watch=versions)
        ours = format_per_gpu(versions.peak, 8)
        yield Figure(f"p={p} M={m}", format_per_gpu([2] * p, 8), ours)


def planner() -> Iterator[Figure]:
    """PipeDream (Narayanan et al., SOSP 2019): what the authors' planner prints

    optimizer/optimizer_graph_hierarchical.py in msr-fiddle/pipedream, with its
    profiles and --activation_compression_ratio 1. The plans are also those of
    Table 1 or of the authors' configurations. The speed-ups that the paper measured
    are of other machines and batch sizes than the profiles, and not comparable.
    """
    for name, gpus, bandwidth, straight, speed, parallel, stages, seconds, cuts in PUBLISHED:
        plan = best_partition(read_graph(PROFILES[name], name), [gpus], [bandwidth], straight)
        what = f"{name}, {gpus} GPUs, {bandwidth / 1e9:g} GB/s{', straight' * straight}"
        slowest, (_, *later) = plan.slowest.seconds, plan.stages
        yield Figure(f"{what}: plan", stages, "-".join(str(s.replicas) for s in plan.stages))
        if cuts:
            ours = " ".join(str(stage.first) for stage in later)
            yield Figure("   cut before layer", " ".join(map(str, cuts)), ours)
        if seconds:
            yield Figure("   seconds", seconds, f"{slowest:.9f}")
        yield Figure("   speed-up", speed, f"{plan.one_gpu / slowest:.2f}")
        yield Figure("   data parallelism's", parallel, f"{plan.one_gpu / plan.data_parallel:.2f}")


NOT_COMPARED = """Not compared:
   ZB-2p (Tables 4, 5): its schedules come from a search that is not here.
   V-Half, V-Min (arXiv 2405.15362): less memory than ZB-V; not here.
   2BW's throughput, 1.6 and 1.15 times PipeDream-Flush's: at an M unknown here.
   ResNet-50's plan, data parallelism in the paper and 8-4-4 in the authors'
   configurations: needs its profile, which `python -m pipedream plan` reads."""

SOURCES = [table_5, table_5_interleaved, table_4, equal_times, several_stages, dualpipe]
SOURCES += [in_pairs, megatron, gpipe_throughput, two_versions, planner]

# ------------------------------------------------------------------------------------- report


def main(config: dict) -> None:
    print("=: must agree to the last digit, and does. Other figures may differ.\n")
    figures = []
    for source in SOURCES:
        found = [*source()]
        table = [[f.what, f.published, f.ours, f.difference] for f in found]
        lines = format_table([["", "published", "ours", "difference"], *table])
        print("\n".join([inspect.getdoc(source) or "", "", *lines, ""]))
        figures += found
    agree = [figure.ours == figure.published for figure in figures if figure.exact]
    shares = [abs(figure.off) for figure in figures if not figure.exact]
    within = (f"{sum(x <= most / 100 for x in shares)} within {most}%" for most in (2, 5, 10))
    print(
        f"""{NOT_COMPARED}

{len(figures)} figures: {sum(agree)} of the {len(agree)} that must agree to the last
digit do, and of the {len(shares)} others {", ".join(within)}.""",
        flush=True,
    )
    if not all(agree):
        sys.exit(1)
