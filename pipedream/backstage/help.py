"""What the commands say about themselves, read from their source: torch is not imported."""

import ast
import inspect
import re
from importlib.util import find_spec


def source_of(name: str) -> str:
    """The text of a module of ours, from a folder or from a zip file, without running it."""
    spec = find_spec(name)
    return spec.loader.get_source(name) if spec and spec.loader else ""  # type: ignore[attr-defined]


def command_source(name: str) -> str:
    return source_of(f"pipedream.commands.{name}")


def literal(source: str, name: str, default: object = None):
    """What the module sets this name to, if that is a literal."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            return ast.literal_eval(node.value)
    return default


def docstring(source: str) -> str:
    return inspect.cleandoc(ast.get_docstring(ast.parse(source)) or "")


def question(name: str) -> str:
    """The first line of a command's docstring."""
    return docstring(command_source(name)).partition("\n")[0]


def key_lines(source: str, block: str) -> dict[str, str]:
    """The keys of a dict in the source -> their lines, with the comments."""
    text = source.partition(f"\n{block} = {{\n")[2].partition("\n}")[0]
    return {line.split('"')[1]: line for line in re.findall(r'    "\w+": .*', text)}


def help_of(name: str) -> str:
    """The docstring of a command, its own flags, and its keys with this command's defaults."""
    source = command_source(name)
    flags, keys = literal(source, "FLAGS", {}), key_lines(source, "KEYS")
    if not keys:
        keys = key_lines(source_of("pipedream_simple"), "CONFIG")
        keys |= key_lines(source_of("pipedream.schedules.plans"), "PLAN_CONFIG")
    for key, default in literal(source, "DEFAULTS", {}).items():
        value = repr(default).replace("'", '"')
        line, *_ = keys[key].partition(". Try")  # which is for another default
        keys[key] = re.sub(r": .*?,(?=  #|$)", f": {value},", line, count=1)
    takes = {*literal(source, "TAKES", " ".join(keys)).split()}
    takes -= {*literal(source, "REFUSES", "").split()}
    shown = [line for key, line in keys.items() if key in takes]
    width = 2 + max(map(len, flags), default=0)
    parts = [docstring(source), "\n".join(f"    {f:<{width}}{flags[f]}" for f in flags)]
    parts += ["Each of these keys is also a flag:", "\n".join(shown)] if shown else []
    if "schedule" in takes:  # every one
        names = re.findall(r'^    "([\w-]+)": \(', source_of("pipedream.schedules.rows"), re.M)
        parts.append(f"schedule may also be {', '.join(names)},\nor a FILE.csv.")
    return "\n\n".join(filter(None, parts))
