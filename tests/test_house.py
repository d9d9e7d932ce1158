"""The house: two scripts that stand alone, rooms on top of them, and who may import whom."""

import ast
import os
import re
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

import pipedream.__main__ as program
from pipedream.backstage import help as helps

ROOT = Path(__file__).parent.parent
FILES = [ROOT / "pipedream_simple.py", ROOT / "pipedream_visual.py"]
FILES += sorted((ROOT / "pipedream").rglob("*.py"))

# From the ground floor up: a module imports from rooms below its own, and from its own.
FLOORS = [
    {"pipedream_simple"},
    {"pipedream_visual"},
    {"pipedream.backstage", "pipedream.networks"},
    {"pipedream.schedules", "pipedream.published"},
    {"pipedream.planning", "pipedream.staleness", "pipedream.processes"},
    {"pipedream.commands"},
    {"pipedream.__main__"},
]


def name_of(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def room_of(module):
    return ".".join(module.split(".")[:2])


def floor_of(module):
    return next(floor for floor, rooms in enumerate(FLOORS) if room_of(module) in rooms)


def imports_of(path):
    """The modules of ours that this file imports, anywhere in it."""
    found, package = set(), name_of(path).rpartition(".")[0]
    names = {name_of(file) for file in FILES}
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            base = ".".join(filter(None, [package if node.level else "", node.module]))
            deeper = {f"{base}.{alias.name}" for alias in node.names} & names
            found |= deeper or {base}
    return {name for name in found if name.startswith("pipedream")} - {"pipedream"}


def test_imports_go_down_only_and_never_from_command_to_command():
    for path in FILES:
        name = name_of(path)
        if name == "pipedream":
            continue
        for imported in imports_of(path):
            below = floor_of(imported) < floor_of(name)
            same_room = room_of(imported) == room_of(name) != "pipedream.commands"
            clock = imported == "pipedream.planning.clock" and "processes" in name
            clock |= imported == "pipedream.planning.clock" and "distributed" in name
            assert below or same_room or clock, f"{name} imports {imported}"


def test_no_module_imports_itself_through_others():
    graph = {name_of(path): imports_of(path) for path in FILES}
    done = set()

    def visit(name, path):
        assert name not in path, " -> ".join([*path, name])
        if name not in done:
            for imported in graph[name]:
                visit(imported, [*path, name])
            done.add(name)

    for name in graph:
        visit(name, [])


def test_the_scripts_import_nothing_of_the_package():
    assert imports_of(FILES[0]) == set()
    assert imports_of(FILES[1]) == {"pipedream_simple"}


def test_sizes():
    lines = {name_of(path): len(path.read_text("utf-8").splitlines()) for path in FILES}
    story = FILES[0].read_text("utf-8").splitlines()
    (end,) = (number for number, line in enumerate(story, 1) if "the story ends here" in line)
    assert end <= 530
    assert lines["pipedream_simple"] <= 855
    assert lines["pipedream_visual"] <= 805
    rooms = [number for name, number in lines.items() if "." in name and number > 1]
    assert max(rooms) <= 450
    assert sorted(rooms)[len(rooms) // 2] < 200
    examples = sum(len(path.read_text().splitlines()) for path in ROOT.glob("examples/*.py"))
    assert sum(lines.values()) + examples <= 10_600


def test_no_public_name_is_defined_in_two_places():
    """A name means one thing in the whole house (a command's main is the exception)."""
    places = {}
    for path in FILES:
        for node in ast.parse(path.read_text("utf-8")).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                places.setdefault(node.name, []).append(name_of(path))
    twice = {name: files for name, files in places.items() if len(files) > 1}
    assert twice.keys() <= {"main", "rounded", "make_layers"}, twice


# ------------------------------------------------------------------------------- its commands


@pytest.mark.parametrize("name", program.COMMANDS)
def test_every_command_has_a_question_a_main_and_a_help_without_torch(name):
    source = helps.command_source(name)
    question, *text = helps.docstring(source).splitlines()
    assert "?" in question
    assert len(question) + 17 <= 80, question
    assert f"python -m pipedream {name}" in "\n".join(text)
    assert "main" in {n.name for n in ast.parse(source).body if isinstance(n, ast.FunctionDef)}
    assert helps.help_of(name).startswith(question)


def test_the_commands_are_the_files():
    files = {path.stem for path in (ROOT / "pipedream/commands").glob("[a-z]*.py")}
    assert files == set(program.COMMANDS)


def test_the_list_and_help_come_without_torch():
    code = "import sys, pipedream.__main__ as program; sys.argv[1:] = {}; program.main(); "
    code += "print('torch' in sys.modules)"
    for flags in ([], ["--help"], ["why", "--help"], ["fit", "-h"]):
        done = subprocess.run(
            [sys.executable, "-c", code.format(flags)], cwd=ROOT, capture_output=True, text=True
        )
        assert done.stdout.splitlines()[-1] == "False", done.stderr


def test_an_unknown_command_names_the_nearest(run):
    assert run("wy") == (2, "", "pipedream: unknown command 'wy': did you mean why?\n")
    assert run("xyz").err.startswith("pipedream: unknown command 'xyz': it must be one of audit, ")


def test_other_peoples_modules_may_use_the_package(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "__init__.py").write_text("import pipedream.schedules.rows\n")
    (tmp_path / "mine" / "tool.py").write_text("print('mine')\n")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    for flags in (["-m", "mine.tool"], ["-Bmpipedream"], ["-m", "pipedream.__main__"]):
        done = subprocess.run([sys.executable, *flags], env=env, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout


def test_a_file_that_is_no_command_says_what_is():
    rooms = ["pipedream.commands.why", "pipedream.planning.search", "pipedream.networks"]
    for module in rooms:
        done = subprocess.run(
            [sys.executable, "-m", module], cwd=ROOT, capture_output=True, text=True
        )
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr == "this file is not a command: python -m pipedream lists them\n"


def test_a_flag_that_the_command_sets_by_itself_is_refused(run, tmp_path):
    for command, key, value in (
        *(("compare", "schedule", "'1f1b'"), ("compare", "weight_stashing", False)),
        *(("compare", "vertical_sync", True), ("in_flight", "in_flight", 3)),
        *(("in_flight", "schedule", "'gpipe'"), ("worth", "schedule", "'gpipe'")),
    ):
        status, out, err = run(command, f"--{key}", str(value).strip("'"))
        line = f"{key}={value} changes nothing here: leave out --{key}\n"
        assert (status, out, err) == (2, "", f"pipedream {command}: {line}")
        assert f'"{key}"' not in helps.help_of(command)
    (tmp_path / "one.csv").write_text("0F0,0B0\n")  # a file is one schedule more, or has sizes
    assert "\n* 1 " in run("in_flight", "--schedule", "one.csv").out


def test_a_flag_says_what_main_takes(run):
    assert run("why", "--gpu", 1).err.startswith("pipedream why: --gpu and --time go together")
    assert run("why", "--gpux", 1).err == "pipedream why: unrecognized arguments: --gpux 1\n"
    assert run("plan", "my.csv").err.endswith("arguments are required: --gpus\n")
    assert run("train").err == "pipedream train: the following arguments are required: PLAN\n"
    assert run("papers", "--seed", 1).status == 2


# ------------------------------------------------------------------------ where it is run from


def test_it_runs_from_another_folder_and_from_a_zip(tmp_path):
    archive = tmp_path / "checkout.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in [*FILES, ROOT / "pipedream/commands/page.html", ROOT / "digits.npz"]:
            file.write(path, path.relative_to(ROOT))
    by_folder = [sys.executable, str(ROOT / "pipedream"), "why", "--gpu", "1", "--time", "4"]
    zipped = [sys.executable, "-m", "pipedream"]
    environment = {**os.environ, "PYTHONPATH": str(archive)}
    for command, env, out, err in (
        (by_folder, os.environ, "GPU1 waits", ""),
        ([*zipped, "why"], environment, "A critical path", ""),
        ([*zipped, "why", "--help"], environment, "--gpu D", ""),
        ([*zipped, "audit"], environment, "", "digits.npz"),
    ):
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
        assert out in done.stdout
        assert err in done.stderr
        assert done.stderr.count("\n") == bool(err)
        assert done.returncode == (2 if err else 0)


def test_a_wheel_brings_it_all(tmp_path):
    """Built, installed into a fresh environment, and run elsewhere. (torch is this one's.)"""
    pip = [sys.executable, "-m", "pip", "--quiet"]
    subprocess.run([*pip, "wheel", "--no-deps", "-w", tmp_path, ROOT], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv/bin/python"
    subprocess.run([*pip, "--python", python, "install", "--no-deps", wheel], check=True)
    (packages,) = tmp_path.glob("venv/lib/*/site-packages")
    ours = [path for path in sys.path if path.endswith("site-packages")]
    (packages / "torch_of_the_tests.pth").write_text("\n".join(ours))
    for command, expected in (
        (["venv/bin/pipedream"], "audit"),
        (["venv/bin/pipedream", "page", "--num_batches", "1"], "pipeline.html: open it"),
        (["venv/bin/pipedream", "audit"], "160 of 160"),
        (["venv/bin/python", "-m", "pipedream_visual"], "weight_versioning.png"),
    ):
        done = subprocess.run(
            [tmp_path / command[0], *command[1:]], cwd=tmp_path, capture_output=True, text=True
        )
        assert expected in done.stdout, done.stderr
    assert (tmp_path / "pipeline.html").stat().st_size > 10_000


def test_what_it_needs_is_said_once():
    about = (ROOT / "pyproject.toml").read_text("utf-8")
    needed = re.findall('"(.*?)"', re.search(r"\ndependencies = \[(.*)\]", about)[1])
    assert needed == (ROOT / "requirements.txt").read_text().split()
    citation = (ROOT / "CITATION.cff").read_text("utf-8")
    assert re.search('version: (".*")', citation)[1] == re.search('\nversion = (".*")', about)[1]
