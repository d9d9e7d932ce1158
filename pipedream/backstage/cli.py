"""The command line of a command: the parameters of its main are its flags."""

import inspect
from collections.abc import Callable
from pathlib import Path

from pipedream_simple import parse_config, parse_value


def describe_flags(main: Callable, names: dict[str, str]) -> dict[str, dict]:
    """What argparse wants to know of the flags of main. (What --help says is in help.py.)

    "--gpu D" takes a value, "--gpus N ..." several, "--quick" none; "FILE" is an argument, and
    "[FILE]" one that may be missing. Whether one is required, its default and its type are those of
    main's parameter.
    """
    parameters, flags = inspect.signature(main).parameters, dict[str, dict]()
    for key in names:
        name, _, value = key.strip("[]").partition(" ")
        parameter = parameters[name.removeprefix("--").lower()]
        required = parameter.default is parameter.empty
        flag: dict = {"default": None if required else parameter.default}
        flag |= {"required": required} if name.startswith("--") else {"metavar": name}
        if name.startswith("--") and not value:
            flag["action"] = "store_true"
        else:
            flag["type"] = Path if parameter.annotation in (Path, Path | None) else parse_value
            flag["nargs"] = "+" if value.endswith("...") else "?" if key.startswith("[") else None
        flags[name.lower()] = flag
    return flags


def parse(command, config: dict, argv: list[str]) -> tuple[dict, dict]:
    """config with the flags of the command line on top; and the other arguments of main."""
    flags = describe_flags(command.main, getattr(command, "FLAGS", {}))
    return parse_config(command.__doc__, config, flags, argv)
