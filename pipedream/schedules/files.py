"""How is a schedule written to a file, and read again?

The format of torch.distributed.pipelining: one line per GPU, one cell per op (0F0, 1B3, 2I1, 2W1),
or per pair of ops at once, (0F4;7B0)OVERLAP_F_B. Empty cells, which are idle slots, and cells about
messages (0SEND_F0) or sharding (0UNSHARD) are skipped: the simulator finds idle times and messages.
"""

import csv
import io
import itertools
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from pipedream.backstage.text import shown
from pipedream_simple import Step, UserError, count

CELL = re.compile(r"([0-9]{1,6})([FBIW])([0-9]{1,6})")
PAIR = re.compile(r"\(([^;]+);([^;]+)\)OVERLAP_F_B")  # two ops at once, F and B in any order
SKIPPED = re.compile(r"[0-9]+(UNSHARD|RESHARD|REDUCE_GRAD|(SEND|RECV)_[FB][0-9]+)|")


def file_of(config: dict) -> Path | None:
    """The CSV file that the schedule is, if it is one."""
    name = config.get("schedule")
    return Path(name) if isinstance(name, str) and name.endswith(".csv") else None


def read_text(path: Path) -> str:
    """What is in a file. UserError: why it cannot be read."""
    name = str(path)[-200:]
    try:
        if not path.is_file():
            raise UserError(f"cannot read {name}: missing, or not a regular file")
        return path.read_bytes().decode().removeprefix("\ufeff")
    except OSError as error:
        raise UserError(f"cannot read {name}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{name} is not a text file: {error}") from None


def read_cells(text: str, path: Path) -> list[list[str]]:
    """The lines of a CSV file, each a list of its cells."""
    try:
        return [*csv.reader(io.StringIO(text, newline=""))]
    except csv.Error as error:
        raise UserError(f"{str(path)[-200:]} is not a CSV file: {error}") from None


def read_csv(path: Path) -> list[list[Step]]:
    """The rows of one batch in a CSV file. UserError: what is wrong with the file, and where."""
    name = str(path)[-200:]
    lines = enumerate(read_cells(read_text(path), path), start=1)
    rows = [[*read_row(line, f"{name}, line {number}")] for number, line in lines]
    while rows and not rows[-1]:
        rows.pop()  # empty lines at the end
    check_rows(rows, name)
    return rows


def read_row(line: list[str], place: str) -> Iterator[Step]:
    """The steps in the cells of one line. A pair is an F& and the backward that runs with it."""
    for column, cell in enumerate(map(str.strip, line), start=1):
        both = PAIR.fullmatch(cell)
        texts = both.groups() if both else () if SKIPPED.fullmatch(cell) else (cell,)
        steps = [CELL.fullmatch(text.strip()) for text in texts]
        kinds = sorted(step[2] for step in steps if step)
        if len(kinds) < len(steps) or (both and kinds not in (["B", "F"], ["F", "I"])):
            wrong = f"{place}, column {column}: {shown(cell)}"
            raise UserError(f"{wrong} is not an op such as 0F0 or 2W1, or (0F4;7B0)OVERLAP_F_B")
        for step in sorted(filter(None, steps), key=lambda step: step[2] != "F"):
            kind = "F&" if both and step[2] == "F" else step[2]
            yield int(step[1]), kind, int(step[3])


def check_rows(rows: list[list[Step]], name: str) -> None:
    """Raise a UserError unless each stage runs each microbatch once, on one GPU, in order.

    And an F& is followed by the backward with which it runs.
    """
    host: dict[int, int] = {}
    kinds: dict[tuple[int, int], str] = {}  # (stage, microbatch) -> F, then B or I and W
    for device, row in enumerate(rows):
        if not row:
            raise UserError(f"{name}: GPU{device} has nothing to do")
        for stage, kind, m in row:
            if host.setdefault(stage, device) != device:
                raise UserError(f"{name}: stage {stage} is on GPU{host[stage]} and on GPU{device}")
            kinds[stage, m] = kinds.get((stage, m), "") + kind.rstrip("&")
        for (stage, kind, m), (_, after, _) in itertools.pairwise([*row, (0, "", 0)]):
            if kind == "F&" and after not in ("B", "I"):
                raise UserError(f"{name}: {stage}F&{m} must come right before a backward")
    if not kinds:
        raise UserError(f"{name} has no ops")
    for stage, m in itertools.product(range(1 + max(host)), range(1 + max(m for _, m in kinds))):
        found = kinds.get((stage, m), "")
        if found not in ("FB", "FIW"):
            must = f"stage {stage} must run F B or F I W on microbatch {m}, in this order"
            raise UserError(f"{name}: {must}; it runs {' '.join(found[:9]) or 'nothing'}")


def write_csv(rows: Iterable[Iterable[tuple]], path: Path) -> None:
    """Rows of (stage, kind, microbatch, ...) of one batch, in PyTorch's format, without idles."""
    texts = (",".join(f"{stage}{kind}{m}" for stage, kind, m, *_ in row) for row in rows)
    joined = (re.sub(r"(\d+F)&(\d+),(\w+)", r"(\1\2;\3)OVERLAP_F_B", text) for text in texts)
    path.write_text("".join(f"{text}\n" for text in joined), "utf-8")


def what_was_skipped(path: Path) -> str:
    """A sentence about the cells of a file that read_csv does not need, if it has some."""
    cells = (cell.strip() for line in read_cells(read_text(path), path) for cell in line)
    number = sum(bool(cell) and SKIPPED.fullmatch(cell) is not None for cell in cells)
    cells_of = f"{count(number, 'cell')} about messages or sharding"
    return f"{cells_of} left out: the simulator finds messages itself." if number else ""
