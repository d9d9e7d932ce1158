"""Text from values, beyond what pipedream_simple.py needs."""

import difflib
import math
import sys
from collections.abc import Iterable


def shorten(items: list, limit: int, what: str) -> list:
    """Of too many items the first and the last ones, and between them how many are left out."""
    if len(items) <= limit + 1:  # a line about one item is no shorter than the item
        return items
    first, last = limit - limit // 4, limit // 4
    return [*items[:first], f"... ({len(items) - limit} more {what})", *items[-last:]]


def shown(value: object) -> str:
    """The value as Python writes it, cut off where it is long."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def clock(time: float) -> str:
    """A time as it is told, with four digits, or all before the point: t4, t0.3333, t49.67."""
    digits = 3 - math.floor(math.log10(time)) if time > 0 else 0
    return f"t{round(float(time), max(0, digits)):.12g}"


def nearest(word: str, words: Iterable[str]) -> str:
    """A question that names the word most like this one; nothing where none is like it."""
    close = difflib.get_close_matches(word, words, n=1, cutoff=0.75)
    return f": did you mean {close[0]}?" if close else ""


def progress(text: str) -> None:
    """One line on stderr; on a terminal always the same one, and nothing clears it."""
    if text or sys.stderr.isatty():
        end = "\x1b[K\r" if sys.stderr.isatty() else "\n"
        print(text, end=end, file=sys.stderr, flush=True)


def format_loss(batch: int, losses: list[float]) -> str:
    """The one line that is left of a batch, as pipedream_simple.py prints it."""
    return f"Batch {batch + 1}: Loss {losses[batch]:.4f} (weights v{batch} → v{batch + 1})"


def diverged(losses: list[float]) -> bool:
    """As pipedream_simple.py tells it, where the last loss is no number, too."""
    return not losses[-1] < 10 * losses[0]
