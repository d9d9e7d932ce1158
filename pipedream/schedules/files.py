"""How is a schedule written to a file, and read again?

The format of torch.distributed.pipelining, without sends and receives: one line per GPU, one cell
per op (0F0, 1B3, 2I1, 2W1). An empty cell is an idle slot, and skipped: the simulator finds them.
"""

import csv
import io
import itertools
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from pipedream.backstage.text import shown
from pipedream_simple import Step, UserError

CELL = re.compile(r"([0-9]{1,6})([FBIW])([0-9]{1,6})")
OVERLAPPED = re.compile(r"\((.+);(.+)\)OVERLAP_F_B")  # two ops at once: here one after the other


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
    """The steps in the cells of one line."""
    for column, cell in enumerate(map(str.strip, line), start=1):
        both = OVERLAPPED.fullmatch(cell)
        for text in both.groups() if both else [cell] if cell else []:
            step = CELL.fullmatch(text)
            if not step:
                wrong = f"{place}, column {column}: {shown(text)}"
                raise UserError(f"{wrong} is not an op such as 0F0 or 2W1")
            yield int(step[1]), step[2], int(step[3])


def check_rows(rows: list[list[Step]], name: str) -> None:
    """Raise a UserError unless each stage runs each microbatch once, on one GPU, in order."""
    host: dict[int, int] = {}
    kinds: dict[tuple[int, int], str] = {}  # (stage, microbatch) -> F, then B or I and W
    for device, row in enumerate(rows):
        if not row:
            raise UserError(f"{name}: GPU{device} has nothing to do")
        for stage, kind, m in row:
            if host.setdefault(stage, device) != device:
                raise UserError(f"{name}: stage {stage} is on GPU{host[stage]} and on GPU{device}")
            kinds[stage, m] = kinds.get((stage, m), "") + kind
    if not kinds:
        raise UserError(f"{name} has no ops")
    for stage, m in itertools.product(range(1 + max(host)), range(1 + max(m for _, m in kinds))):
        found = kinds.get((stage, m), "")
        if found not in ("FB", "FIW"):
            must = f"stage {stage} must run F B or F I W on microbatch {m}, in this order"
            raise UserError(f"{name}: {must}; it runs {' '.join(found[:9]) or 'nothing'}")


def write_csv(rows: Iterable[Iterable[tuple]], path: Path) -> None:
    """Rows of (stage, kind, microbatch, ...) of one batch, in PyTorch's format, without idles."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        lines = csv.writer(file, lineterminator="\n")
        lines.writerows([f"{stage}{kind}{m}" for stage, kind, m, *_ in row] for row in rows)
