"""The notebook runs from top to bottom, and with the values to try; what it shows holds."""

import base64
import math
import os
import re
import shutil
import subprocess
import sys

import nbformat
import pytest
from conftest import ROOT
from nbclient import NotebookClient

PATH = ROOT / "pipedream.ipynb"
NOTEBOOK = nbformat.read(PATH, as_version=4)
CODE = {cell.id: cell.source for cell in NOTEBOOK.cells if cell.cell_type == "code"}
TEXT = [cell.source for cell in NOTEBOOK.cells if cell.cell_type == "markdown"]
README = (ROOT / "README.md").read_text("utf-8")

NEEDED = "pipedream", "examples", "pipedream_simple.py", "pipedream_visual.py", "digits.npz"
TRY = re.compile(r"^([\w, ]+) = (.+?)  # try (.+)$", re.M)  # names = values  # try these or those


def values_to_try(name):
    """The values in the line of a cell that has a `# try`: first its own, then the others."""
    found = TRY.search(CODE[name])
    return [found[2], *found[3].split(" or ")] if found else [None]


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """cell -> [its outputs with each of its values], from one kernel, in a copy of the folder.

    First the notebook as it is, and then once more the cells in which there is something to try.
    """
    folder = tmp_path_factory.mktemp("copy")
    for name in NEEDED:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / name)
    notebook = nbformat.read(PATH, as_version=4)
    again = []
    for name, source in CODE.items():
        for value in values_to_try(name)[1:]:
            changed = TRY.sub(lambda line, value=value: f"{line[1]} = {value}", source)
            again.append((name, nbformat.v4.new_code_cell(changed)))
    notebook.cells += [cell for _, cell in again]
    env = {
        key: value for key, value in os.environ.items() if key not in ("MPLBACKEND", "PYTHONPATH")
    }
    env |= {"OMP_NUM_THREADS": "1", "IPYTHONDIR": str(tmp_path_factory.mktemp("ipython"))}
    client = NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(folder)}})
    client.execute(env=env)
    outputs = {cell.id: [cell.outputs] for cell in notebook.cells if cell.id in CODE}
    for name, cell in again:
        outputs[name].append(cell.outputs)
    return outputs


def printed(shown, name):
    """value -> what the cell prints with it."""
    texts = ("".join(each.get("text", "") for each in outputs) for outputs in shown[name])
    return dict(zip(values_to_try(name), texts, strict=True))


def percents(text):
    return re.findall(r"[\d.]+%", text)


# ------------------------------------------------------------------------------- what it shows


def test_it_runs_from_top_to_bottom_without_a_warning(shown):
    for name, runs in shown.items():
        for outputs in runs:
            kinds = {each.get("name", each.output_type) for each in outputs}
            assert kinds <= {"stdout", "execute_result"}, f"{name}: {outputs}"
            assert outputs or name == "setup", name


def test_pictures_appear_in_the_notebook(shown):
    results = {
        name: [each for outputs in runs for each in outputs if each.output_type == "execute_result"]
        for name, runs in shown.items()
    }
    drawn = {name: pictures for name, pictures in results.items() if pictures}
    assert list(drawn) == ["wait", "gpipe", "stream", "stash", "yours"]
    for name, pictures in drawn.items():
        assert len(pictures) == len(values_to_try(name))
        for picture in pictures:
            assert base64.b64decode(picture.data["image/png"]).startswith(b"\x89PNG")


def test_one_gpu_is_too_few_and_eight_are_enough(shown):
    answers = printed(shown, "fit")
    assert "Answer: nothing fits" in answers["1"]
    assert "Answer: nothing fits" not in answers["8"]


def test_a_cut_does_not_change_the_losses(shown):
    for text in printed(shown, "cut").values():
        assert float(re.search(r"difference of a loss: (.*)", text)[1]) < 1e-5
        assert len(set(re.findall(r"Run\(.*\)", text))) == 1


def test_utilization_is_that_of_the_closed_forms(shown):
    for stages, text in printed(shown, "wait").items():
        assert percents(text) == [f"{1 / int(stages):.1%}"]
        assert f"Op(stage={int(stages) - 1}, kind='F', microbatch=0, version=0)" in text
    for stages, text in printed(shown, "gpipe").items():
        for m, line in zip((1, 2, 4, 8, 16, 32), text.splitlines(), strict=True):
            assert percents(line) == [f"{m / (m + int(stages) - 1):.1%}"] * 2
    for batches, text in printed(shown, "stream").items():
        k = 4 * int(batches)
        assert percents(text) == [f"{k / (k + 3):.1%}"] * 2


def test_1f1b_holds_less_than_gpipe_and_is_slower_where_links_are_slow(shown):
    free, slow = printed(shown, "memory").values()
    for text in (free, slow):
        held = re.findall(r"in flight, GPU by GPU: (.*)", text)
        assert held == ["8 8 8 8", "4 3 2 1"]
        assert re.search(r"^GPU\d waits until t", text, re.M)
    gpipe, one_f_one_b = percents(free)
    assert gpipe == one_f_one_b == f"{8 / 11:.1%}"
    times = [float(time) for time in re.findall(r"([\d.]+) time units", slow)]
    assert times[0] < times[1]


def test_only_the_stash_makes_every_gradient_right(shown):
    errors = {value: re.findall(r"\S+% off", text) for value, text in printed(shown, "bug").items()}
    assert {*errors["False"]} > {"0.0% off"}
    assert {*errors["True"]} == {"0.0% off"}


def test_versions_are_as_many_as_the_formula_says(shown):
    for value, text in printed(shown, "stash").items():
        m, sync = value.split(", ")
        late = [math.ceil((3 - stage * (sync == "False")) / int(m)) for stage in range(4)]
        kept = re.search(r"Versions kept, GPU by GPU: (.*)", text)[1]
        assert kept == " ".join(str(1 + d) for d in late)


def test_the_fastest_is_the_one_with_the_least_time(shown):
    for text in printed(shown, "which").values():
        rows = re.findall(r"^ *(\S.*?)  +([\d.]+) +[\d.]+x ", text, re.M)
        name, time = re.search(r"The fastest: (\S.*): ([\d.]+) time units", text).groups()
        assert len(rows) == 13
        assert (name, time) in rows
        assert float(time) == min(float(other) for _, other in rows)


def test_a_schedule_of_ones_own_runs_and_trains(shown):
    for m, text in printed(shown, "yours").items():
        assert percents(text)[::2] == [f"{int(m) / (int(m) + 3):.1%}"] * 2
        gpipe, mine = re.findall(r"last loss (\S+),", text)
        assert float(gpipe) == pytest.approx(float(mine), abs=2e-4)
        assert re.findall(r"GPU by GPU: (.*)", text) == [" ".join([m] * 4)] * 2


# --------------------------------------------------------------------------------- the file


def test_the_file_has_no_outputs_and_nothing_of_a_machine():
    nbformat.validate(NOTEBOOK)
    assert (NOTEBOOK.nbformat, NOTEBOOK.nbformat_minor) == (4, 5)
    for cell in NOTEBOOK.cells:
        assert cell.metadata == {}
        assert cell.get("outputs", []) == []
        assert cell.get("execution_count") is None
    python = {"display_name": "Python 3", "language": "python", "name": "python3"}
    assert NOTEBOOK.metadata == {"kernelspec": python, "language_info": {"name": "python"}}
    assert PATH.read_text("utf-8") == nbformat.writes(NOTEBOOK) + "\n"  # as Jupyter saves it


def test_it_asks_the_readmes_questions_and_each_before_it_answers():
    questions = re.findall(r"^## \d\. .*", "\n".join(TEXT), re.M)
    assert questions == re.findall(r"^## [1-5]\. .*", README, re.M)
    kinds = [cell.cell_type for cell in NOTEBOOK.cells]
    assert kinds == ["markdown", "code"] * len(CODE) + ["markdown"]
    assert all("**Predict" in text for text in TEXT[1:-1])
    assert [name for name in CODE if not TRY.search(CODE[name])] == ["setup"]


def test_cells_are_short():
    assert max(len(text.split()) for text in TEXT) <= 60
    assert max(len(source.splitlines()) for source in CODE.values()) <= 16


def test_its_text_has_names_and_no_figures():
    names = r"```.*?```|`[^`]*`|\]\([^)]*\)|^## \d\.|Llama 2 7B|GPU[01]\b|1F1B|section \d"
    for text in TEXT:
        assert not re.search(r"\d", re.sub(names, "", text, flags=re.M | re.S)), text


def test_its_links_and_commands_are_there():
    pages = "".join(path.read_text("utf-8") for path in ROOT.glob("*.md"))
    text = "\n".join(TEXT)
    for link in re.findall(r"\]\(([^)]*)\)", text):
        assert (ROOT / link).exists()
    (block,) = re.findall(r"^```bash\n(.*?)^```", text, re.M | re.S)
    for command in [*block.splitlines(), *re.findall(r"`(python .*?)`", text)]:
        assert command in pages or command.replace("examples/", "") in pages, command


def test_elsewhere_the_first_cell_says_in_a_line_what_to_do(tmp_path):
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, "-c", CODE["setup"]]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 1
    *_, last = done.stderr.splitlines()
    assert last.startswith(
        "ModuleNotFoundError: No module named 'pipedream_simple': open this note"
    )
