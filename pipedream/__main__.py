"""How does pipeline parallelism really work? Optional commands, one question each.

    python pipedream_simple.py             the story itself; pipedream_visual.py draws it
    python -m pipedream COMMAND            one of the commands below
    python -m pipedream COMMAND --help     more about it, and its flags

CONFIG at the top of pipedream_simple.py holds for every command; its keys are also flags.
"""

import importlib
import os
import signal
import sys
import threading
from functools import partial
from pathlib import Path

if not __package__:  # python path/to/pipedream
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from pipedream.backstage.help import help_of, question
from pipedream.backstage.text import nearest

COMMANDS = (
    *("audit", "compare", "why", "in_flight", "export", "trace", "page", "papers", "worth"),
    *("staleness", "search", "profile", "plan", "train", "fit", "distributed", "neighbours"),
)


def main() -> int:
    """List the commands, or run one. Only that one is imported, and only then torch."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during a slow import: no traceback
    name, *argv = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        questions = (f"    {command:<13}{question(command)}" for command in COMMANDS)
        return tell("\n".join([__doc__ or "", *questions]))
    if name not in COMMANDS:
        hint = nearest(name, COMMANDS) or f": it must be one of {', '.join(COMMANDS)}"
        print(f"pipedream: unknown command {name!r}{hint}", file=sys.stderr)
        return 2
    return tell(help_of(name)) if {"-h", "--help"} & {*argv} else start(name, argv)


def tell(text: str) -> int:
    """Print it, as run_main would: quietly where | head has seen enough."""
    try:
        print(text, flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            print(f"pipedream: {error.strerror}", file=sys.stderr)
            return 2
    return 0


def start(name: str, argv: list[str]) -> int:
    """Run a command; the exit status."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # what fails is told in one line
    if "PIPEDREAM_LAUNCHED" in os.environ:  # its launcher holds stdin: end with it, at any time
        threading.Thread(target=lambda: os._exit(1 + len(os.read(0, 1))), daemon=True).start()
    sys.argv = [f"pipedream {name}", *argv]
    try:
        command = importlib.import_module(f"pipedream.commands.{name}")
    except ModuleNotFoundError as error:
        missing = f"{error.name} is missing: pip install -r requirements.txt"
        print(f"pipedream {name}: {missing}", file=sys.stderr)
        return 2
    from pipedream_simple import run_main

    return run_main(partial(run_as_rank, command, argv))


def run_as_rank(command, argv: list[str]) -> None:
    """Where torchrun has started several processes, rank 0 alone says what is wrong."""
    from pipedream_simple import UserError

    try:
        run(command, argv)
    except UserError:
        if "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("RANK") != "0":
            sys.exit(2)
        raise


def run(command, argv: list[str]) -> None:
    """Parse the flags of a command, check its config, and call its main."""
    from pipedream.backstage.cli import parse
    from pipedream.schedules.plans import PLAN_CONFIG, describe_file, file_of, settle
    from pipedream_simple import UserError

    defaults = {**PLAN_CONFIG, **getattr(command, "DEFAULTS", {})}
    takes = command.TAKES.split() if hasattr(command, "TAKES") else defaults
    own = getattr(command, "KEYS", None)  # a config of its own, which its main checks
    config, flags = parse(command, own or {key: defaults[key] for key in takes}, argv)
    if not own:
        named = {flag.removeprefix("--").partition("=")[0] for flag in argv}
        for key in getattr(command, "REFUSES", "").split():  # it sets them; a file is one more
            if key in named and not (key == "schedule" and file_of(config)):
                raise UserError(f"{key}={config[key]!r} changes nothing here: leave out --{key}")
        config = settle({**defaults, **config}, named & {*takes})
    command.main(config, **flags)
    if not own and os.environ.get("RANK", "0") == "0":
        print(end="".join(f"{line}\n" for line in describe_file(config)))


if __name__ == "__main__":
    sys.exit(main())
