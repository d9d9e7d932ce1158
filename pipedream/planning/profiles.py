"""What do the layers of a network cost? Files that say so: our CSV, and PipeDream's profiles."""

import heapq
import itertools
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

from pipedream.backstage.text import shorten, shown
from pipedream.schedules.files import read_cells, read_text
from pipedream_simple import UserError, check_value, count, parse_value


class Layer(NamedTuple):
    """What a layer costs on one GPU, for one minibatch."""

    name: str
    forward: float  # seconds
    backward: float  # seconds
    activation: float  # bytes of its output
    weights: float  # bytes
    kept: float | None = None  # bytes kept from its forward until its backward; None: its output
    input_gradient: float | None = None  # seconds, where a backward is split; None: half of it
    weight_gradient: float | None = None
    update: float = 0.0  # seconds, once per batch
    message: float | None = None  # seconds to send its output; None: not measured
    sent: float | None = None  # bytes that a cut right after it sends; None: its output
    feeds_next: bool = True  # False: the network branches here


COLUMNS = ["layer", "forward_ms", "backward_ms", "activation_bytes", "weight_bytes", "kept_bytes"]
COLUMNS += ["input_gradient_ms", "weight_gradient_ms", "update_ms", "message_ms"]
WIDTHS = 5, 6, 10  # so many of them may be there
COSTS = ["forward_compute_time", "backward_compute_time", "activation_size", "parameter_size"]
AMOUNT = (float, 0, 1e18)  # of seconds or bytes; as in RULES: type, least, most
Edge = tuple[str, str]  # ids of two nodes: the second one needs the output of the first


def sent_after(layer: Layer) -> float:
    """Bytes that a cut right after this layer sends."""
    return layer.activation if layer.sent is None else layer.sent


def read_profile(path: Path) -> list[Layer]:
    """The layers in a CSV file with these COLUMNS, or in a file of PipeDream's own profiler.

    UserError: what is wrong with the file, and where.
    """
    text, name = read_text(path).strip(), str(path)[-200:]
    is_graph = " -- " in text.partition("\n")[0]
    layers = read_graph(text, name) if is_graph else read_chain(read_cells(text, path), name)
    if not layers:
        raise UserError(f"{name} has no layers")
    return layers


def read_layer(name: str, costs: dict[str, str], place: str) -> Layer:
    """A Layer from texts: times in ms, and sizes. A list, [8; 4], is added up."""
    amounts = []
    for what, text in costs.items():
        values = [parse_value(part) for part in text.strip("[] ").split(";")]
        for value in values:
            check_value(f"{place}: {what}", value, AMOUNT)
        unit = 1000 if what.endswith(("_ms", "_time")) else 1
        amounts.append(sum(map(float, values)) / unit)  # type: ignore[arg-type]
    return Layer(name, *amounts)  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------- CSV files


def read_chain(lines: list[list[str]], name: str) -> list[Layer]:
    """The layers of a CSV file, in which each feeds the next one."""
    layers = []
    header, *rows = [[cell.strip() for cell in line] for line in lines] or [[]]
    if header not in ([], *(COLUMNS[:number] for number in WIDTHS)):
        rule = f"a CSV file's is {','.join(COLUMNS)}, of which the last four or five may be missing"
        raise UserError(f"{name}, line 1, is {shown(','.join(header))}: {rule}")
    for number, cells in enumerate(rows, start=2):
        place = f"{name}, line {number}"
        if len(cells) not in (0, len(header)):
            raise UserError(f"{place} has {count(len(cells), 'cell')}, not {len(header)}")
        if cells:
            costs = dict(zip(header[1:], cells[1:], strict=True))
            layers.append(read_layer(cells[0], costs, place))
    return layers


def write_chain(layers: list[Layer]) -> str:
    """The text of a CSV file from which read_profile reads these layers."""
    lines = [",".join(COLUMNS)]
    for layer in layers:
        amounts = zip(COLUMNS[1:], layer[1:], strict=False)
        cells = (f"{1000 * (x or 0):.6g}" if "_ms" in what else f"{x}" for what, x in amounts)
        lines.append(",".join([layer.name, *cells]))
    return "\n".join([*lines, ""])


# ----------------------------------------------------------------------- PipeDream's profiles


def read_graph(text: str, name: str) -> list[Layer]:
    """The layers of a PipeDream profile: lines `id -- description -- costs`, and edges `id -- id`.

    The network may branch, so its nodes are put in a row, each after those it needs, and cut like a
    chain. A cut sends every output from before it that is needed after it. Inputs are not part of
    the network. Where each layer feeds the next one, these are all cuts there are; elsewhere the
    authors' program also tries cuts that no place in this row stands for.
    """
    nodes, edges = read_nodes(text, name)
    inputs = {key for key, layer in nodes.items() if layer.name.startswith("Input")}
    edges = [edge for edge in edges if not inputs & {*edge}]
    place = {k: i for i, k in enumerate(in_order([*(nodes.keys() - inputs)], edges, name))}
    last_reader = dict(sorted(edges, key=lambda edge: place[edge[1]]))  # of an output
    change = [0.0] * len(place)  # of what a cut after a layer sends
    for key, reader in last_reader.items():
        change[place[key]] += nodes[key].activation
        change[place[reader]] -= nodes[key].activation
    feeds_next = {key for key, reader in edges if place[reader] == place[key] + 1}
    return [
        nodes[key]._replace(sent=sent, feeds_next=key in feeds_next)
        for key, sent in zip(place, itertools.accumulate(change), strict=True)
    ]


def read_nodes(text: str, name: str) -> tuple[dict[str, Layer], list[Edge]]:
    """The nodes of a profile by their ids, and the edges between them."""
    nodes, edges = dict[str, Layer](), list[Edge]()
    for number, line in enumerate(text.splitlines(), start=1):
        place, (key, *rest) = f"{name}, line {number}", line.strip().split(" -- ")
        if len(rest) == 1:
            edges.append((key, rest[0]))
        elif rest:
            costs = dict(re.findall(r"(\w+)=(\[.*?\]|[^,\s]*)", rest[-1]))
            if key in nodes:
                raise UserError(f"{place}: a second {shown(key)}")
            nodes[key] = read_layer(rest[0], {what: costs.get(what, "") for what in COSTS}, place)
        elif key:
            raise UserError(f"{place}: {shown(key)} is neither a node nor an edge")
    return nodes, edges


def in_order(keys: list[str], edges: list[Edge], name: str) -> list[str]:
    """Keys in an order in which they can run: of those that can, the lowest comes next.

    PipeDream numbers the nodes as they ran, so this is that order.
    """
    known = dict.fromkeys(keys, ())
    sorter = TopologicalSorter(known)
    for key, reader in edges:
        if key not in known or reader not in known:
            raise UserError(f"{name}: the edge {shown(f'{key} -- {reader}')} lacks a node")
        sorter.add(reader, key)
    try:
        sorter.prepare()
    except CycleError as error:
        cycle = " -- ".join(shorten(error.args[1], 6, "nodes"))
        raise UserError(f"{name}: the graph has a cycle, {cycle[:200]}") from None
    ready, order = list[tuple[int, str]](), list[str]()
    while sorter.is_active():
        for key in sorter.get_ready():
            heapq.heappush(ready, (len(key), key))
        order.append(heapq.heappop(ready)[1])
        sorter.done(order[-1])
    return order
