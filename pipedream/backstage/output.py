"""Files that a command writes: whole, or not at all."""

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryFile

from pipedream_simple import UserError

from .text import shown


def write(path: Path, content: Callable, read: Path | None = None, suffix: str = "") -> None:
    """Save what content(path) writes. UserError: another suffix, or the file that it has read."""
    from pipedream_visual import save  # here: it imports matplotlib

    check_suffix(path, suffix)
    save({path: content}, read=[read] if read else [])


def check_suffix(path: Path, suffix: str) -> None:
    if not path.name.endswith(suffix):
        raise UserError(f"cannot write {shown(str(path))}: the name must end in {suffix}")


def check_output(path: Path, suffix: str = "") -> None:
    """Raise a UserError now, and not after minutes, where a file cannot be written."""
    check_suffix(path, suffix)
    folder = next(folder for folder in path.absolute().parents if folder.exists())
    if (path.exists() and not path.is_file()) or not folder.is_dir():
        what = "it is not a regular file" if folder.is_dir() else f"{path.parent} is not a folder"
        raise UserError(f"cannot write {path}: {what}")
    try:
        TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None


def draw_and_write(draw: Callable, path: Path, read: Path | None = None) -> str:
    """Draw a picture in the house style, save it, and return its title. draw gets the module."""
    import pipedream_visual as visual

    with visual.house_style():
        figure = draw(visual)
        write(path, figure.savefig, read)
    return figure.texts[0].get_text()
