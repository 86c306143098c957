"""The command line as people use it: what it prints, what it refuses, how it exits."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

from autocompress import __version__
from autocompress.cli import main
from autocompress.task import Task
from tests.conftest import trials_run_here


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one finished run, runs/demo, made by the command itself."""
    folder = tmp_path_factory.mktemp("cli")
    options = "--task tests.mini:brief_task --budget 6 --workers 1 --run demo --max-size 1MB"
    done = process(folder, "search", *options.split())
    assert done.returncode == 0, done.stderr
    (folder / "search.out").write_text(done.stdout)
    (folder / "search.err").write_text(done.stderr)
    return folder


def process(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    command = [sys.executable, "-m", "autocompress", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def cli(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command in this process, which has imported everything already."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["autocompress", *arguments])
        try:
            main()
        except SystemExit as ended:
            code = ended.code
        else:
            code = 0
    assert isinstance(code, int)
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())


def front_of(place: Path) -> dict[str, list[dict[str, object]]]:
    read: dict[str, list[dict[str, object]]] = json.loads((place / "runs" / "demo" / "front.json").read_text())
    return read


def test_a_search_shows_progress_and_ends_with_the_table(place: Path) -> None:
    out, err = (place / "search.out").read_text(), (place / "search.err").read_text()
    assert "state_dict" in out
    assert "run folder: runs/demo" in out
    assert (place / str(re.search(r"asked for: +(\S+)", out)[1])).is_file()
    assert "6/6 trials" in err
    assert "left" in err
    assert "Traceback" not in err
    for noise in ("ray", "Ray is", "INFO", "WARNING", "optuna"):
        assert noise not in err.replace("starting Ray", "")


def test_show_plot_and_pick(place: Path) -> None:
    assert json.loads(cli(place, "show", "demo", "--json").stdout) == front_of(place)
    assert "files on the front" in cli(place, "show", "runs/demo").stdout
    picture = cli(place, "plot", "demo", "-o", "mine.svg")
    assert picture.stdout.strip() == "mine.svg"
    assert "<svg" in (place / "mine.svg").read_text()
    largest = front_of(place)["front"][-1]
    picked = json.loads(cli(place, "pick", "demo", "--max-size", "1MB", "-o", "best.acz", "--json").stdout)
    assert picked["size_bytes"] == largest["size_bytes"] == (place / "best.acz").stat().st_size
    assert "bytes, validation accuracy" in cli(place, "pick", "demo").stdout


def test_a_page_is_left_by_the_search_and_written_again_on_request(place: Path) -> None:
    assert "report:     runs/demo/report.html" in (place / "search.out").read_text()
    left = (place / "runs" / "demo" / "report.html").read_text()
    assert cli(place, "report", "demo").stdout.strip() == "runs/demo/report.html"
    assert (place / "runs" / "demo" / "report.html").read_text() == left


def test_evaluate_says_what_the_front_says(place: Path) -> None:
    for point in front_of(place)["front"]:
        file = str(Path("runs") / "demo" / str(point["artifact"]))
        measured = json.loads(cli(place, "evaluate", file, "--task", "tests.mini:task", "--json").stdout)
        assert set(measured.pop("activation_sparsity")) == {"2", "4"}
        assert measured == {key: point[key] for key in ("size_bytes", "val_accuracy", "test_accuracy")}


def test_export_tells_what_was_written(place: Path) -> None:
    point = front_of(place)["front"][0]
    file = str(Path("runs") / "demo" / str(point["artifact"]))
    told = json.loads(cli(place, "export", file, "--task", "tests.mini:task", "-o", "small.pt2", "--json").stdout)
    assert told["size_bytes"] == (place / "small.pt2").stat().st_size
    assert (told["val_accuracy"], told["test_accuracy"]) == (point["val_accuracy"], point["test_accuracy"])


def test_the_inside_of_a_file(place: Path) -> None:
    file = str(Path("runs") / "demo" / str(front_of(place)["front"][0]["artifact"]))
    shown = cli(place, "show", file).stdout
    assert "bits/w" in shown
    assert "header" in shown
    data = json.loads(cli(place, "show", file, "--json").stdout)
    assert data["header_bytes"] + sum(t["size_bytes"] for t in data["tensors"].values()) == data["size_bytes"]
    assert cli(place, "plot", file, "-o", "inside.svg").stdout.strip() == "inside.svg"
    assert f"{data['size_bytes']:,} bytes" in (place / "inside.svg").read_text().replace("<!-- ", "").replace(
        " -->", ""
    )


def test_two_files_side_by_side(place: Path) -> None:
    small, large = (str(Path("runs") / "demo" / str(front_of(place)["front"][i]["artifact"])) for i in (0, -1))
    shown = cli(place, "diff", small, large).stdout
    sizes = [(place / file).stat().st_size for file in (small, large)]
    assert all(f"{size:,}" in shown for size in sizes)
    assert f"{100 * (sizes[1] / sizes[0] - 1):+,.1f}%" in shown
    assert "+0.0%" in cli(place, "diff", small, small).stdout


def test_inspect_and_spaces(place: Path) -> None:
    shown = cli(place, "inspect", "--task", "tests.mini:task", "--space", "prune-only").stdout
    assert "3 layers" in shown
    assert "groups of channels" in shown
    assert "joint space of about 10^" in shown
    listed = cli(place, "spaces").stdout
    for name in ("default", "prune-only", "quantize-only", "activation_bits", "rate_penalty"):
        assert name in listed


def test_resume_with_a_larger_budget(place: Path) -> None:
    with trials_run_here():
        done = cli(place, "search", "--resume", "demo", "--budget", "7", "--json")
        again = cli(place, "search", "--resume", "demo")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    printed = json.loads(done.stdout)
    assert printed.pop("run") == "runs/demo"
    assert printed == front_of(place)
    assert len(list((place / "runs" / "demo" / "trials").iterdir())) == 7
    assert (place / str(re.search(r"asked for: +(\S+)", again.stdout)[1])).is_file()


def test_a_process_of_its_own_exits_the_same(place: Path) -> None:
    for arguments in (["show", "nothing"], ["show", "demo"]):
        alone, here = process(place, *arguments), cli(place, *arguments)
        assert (alone.returncode, alone.stdout, alone.stderr) == (here.returncode, here.stdout, here.stderr)


def test_what_needs_no_torch_does_not_wait_for_it(place: Path) -> None:
    for command in (["--help"], ["show", "demo"], ["pick", "demo"]):
        code = f"""
import sys
sys.argv = ["autocompress", *{command}]
from autocompress.cli import main
try:
    main()
finally:
    assert "torch" not in sys.modules and "numba" not in sys.modules
"""
        done = subprocess.run([sys.executable, "-c", code], cwd=place, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout


def test_a_search_that_is_stopped_before_it_began_leaves_nothing(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Task, "as_given", stop)
    done = cli(in_tmp, "search", "--task", "tests.mini:task", "--quiet")
    assert (done.returncode, done.stderr) == (130, "stopped\n")
    assert not [*(in_tmp / "runs").iterdir()]


def test_version_and_help() -> None:
    assert cli(Path(), "--version").stdout == f"autocompress {__version__}\n"
    for command in ("search", "show", "diff", "plot", "report", "pick", "evaluate", "inspect", "spaces"):
        shown = cli(Path(), command, "--help")
        assert shown.returncode == 0
        assert "Usage: " in shown.stdout


@pytest.mark.usefixtures("without_ray")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("search --task digit", "unknown task 'digit'; did you mean 'digits'?"),
        ("search --task no.such:thing", "there is no module 'no.such'"),
        ("search --sampler tpee", "did you mean 'tpe'?"),
        ("search --space defalt", "did you mean 'default'?"),
        ("search --space broken.yaml", "broken.yaml:2: not valid YAML"),
        ("search --space typo.yaml", "typo.yaml:3: unknown dimension 'wieghts' in layers.*; did you mean 'weights'?"),
        ("search --space choice.yaml", "choice.yaml:1: layers.*.weights: choice 'int99' does not exist"),
        ("search --task tests.mini:task --space nowhere.yaml", "pattern 'conf*' matches no layer"),
        ("search --space noise.yaml", "cannot be read"),
        ("search --budget 0", "budget 0 is not enough"),
        ("search --epochs -1", "epochs -1 is not enough"),
        ("search --max-size 10XB", "size '10XB' is not understood"),
        ("search --task tests.mini:task --max-size 10B", "the smallest is about"),
        ("search --task tests.mini:task --min-accuracy 95", "minimum accuracy 95 cannot be reached"),
        ("search --run demo", "run 'runs/demo' exists"),
        ("search --resume demo --max-size 2KB", "--max-size cannot be given with --resume"),
        ("search --resume dema", "did you mean 'demo'?"),
        ("show nothing", "there is no run 'nothing'"),
        ("show none.acz", "cannot read 'none.acz': No such file"),
        ("evaluate none.acz", "cannot read 'none.acz': No such file"),
        ("evaluate noise.yaml", "is not an autocompress artifact"),
        ("evaluate cut.acz", "is damaged"),
        ("evaluate whole.acz", "another architecture"),
        ("pick demo --max-size 10B", "the smallest of this run is"),
        ("pick demo --min-accuracy 2", "no file with validation accuracy of at least 2"),
        ("pick demo -o /proc/none/x.acz", "cannot write '/proc/none/x.acz'"),
        ("diff whole.acz none.acz", "cannot read 'none.acz': No such file"),
        ("diff whole.acz noise.yaml", "is not an autocompress artifact"),
        ("plot whole.acz -o x.gif", "ends in .png, .svg or .pdf"),
        ("plot demo -o x.gif", "ends in .png, .svg or .pdf"),
        ("plot demo -o /proc/none/x.png", "cannot write"),
        ("report demo -o /proc/none/x.html", "cannot write"),
        ("report dema", "did you mean 'demo'?"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(arguments: str, message: str, place: Path) -> None:
    (place / "broken.yaml").write_text("layers:\n  '*': {weights: [int4")
    (place / "typo.yaml").write_text("layers:\n  '*':\n    wieghts: [int4]\n")
    (place / "choice.yaml").write_text("layers: {'*': {weights: [int4, int99]}}\n")
    (place / "nowhere.yaml").write_text("layers: {'conf*': {weights: [int4]}}\n")
    (place / "noise.yaml").write_bytes(bytes(range(128, 256)))
    whole = place / "runs" / "demo" / str(front_of(place)["front"][0]["artifact"])
    (place / "whole.acz").write_bytes(whole.read_bytes())
    (place / "cut.acz").write_bytes(whole.read_bytes()[:-9])
    before = sorted(p.name for p in (place / "runs").iterdir())
    done = cli(place, *arguments.split())
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("autocompress: ")
    assert sorted(p.name for p in (place / "runs").iterdir()) == before, "no half-made run is left behind"


def test_profile_tells_and_draws_sensitivities(place: Path) -> None:
    told = cli(place, "profile", "--task", "tests.mini:task", "--space", "quantize-only", "-o", "heat.svg")
    assert "int2" in told.stdout
    assert "heat map: heat.svg" in told.stdout
    assert "reading the model ..." in told.stderr
    assert "<svg" in (place / "heat.svg").read_text()
    told = cli(place, "profile", "--task", "tests.mini:task", "--json")
    assert told.stderr == ""
    effects = json.loads(told.stdout)
    assert effects["1:weights"]["int2"] > effects["1:weights"]["int8"]


def test_techniques_are_listed(place: Path) -> None:
    told = cli(place, "techniques").stdout
    assert all(name in told for name in ("lowrank-0.25", "RigL", "codebook-16"))
