"""The command line: quick answers, one line for a mistake, exit codes."""

import subprocess
import sys
import time

import pytest


def counterpoint(*arguments: str, **kwargs) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "counterpoint", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, **kwargs)


def test_version_is_quick():
    def seconds() -> float:
        began = time.perf_counter()
        assert counterpoint("--version").stdout.startswith("counterpoint 0.")
        return time.perf_counter() - began

    assert min(seconds() for _ in range(5)) < 0.3


def test_help_lists_every_command_and_needs_no_torch():
    code = "import sys; sys.argv = ['counterpoint', '--help']\nfrom counterpoint.cli.main import main\n"
    code += "try: main()\nexcept SystemExit as end: assert not end.code\nassert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert all(command in done.stdout for command in ("train", "generate", "export"))


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["nonsense"], "No such command 'nonsense'"),
        (["train", "--stes"], "No such option"),
        (["train", "missing.yaml"], "no configuration file missing.yaml"),
        (["train", "-s", "optimizer.learning_rate=1"], "the nearest known one is optimizer.lr"),
        (["train", "-s", "training.steps=-3"], "training.steps = -3: allowed is greater than or equal to 1"),
        (["train", "-s", "model=llama"], "model = llama: not a preset (tiny, demo"),
        (["train", "-s", "model.hiden_size=32"], "unknown key model.hiden_size; .* model.hidden_size"),
        (["train", "-s", "parallel.sequence=2", "--nproc", "3"], "3 processes do not fit"),
        (
            ["train", "-s", "model=tiny", "-s", "parallel.sequence=8", "-s", "parallel.forward=ulysses"],
            "4 query heads",
        ),
        (
            ["train", "-s", "parallel.forward=tokenring(packts=2)", "-s", "parallel.sequence=2"],
            "no option 'packts'",
        ),
        (["generate", "missing"], "missing: no such directory"),
        (["export", "missing", "out"], "missing: no such directory"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments, error, tmp_path):
    done = counterpoint(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert all(part in done.stderr for part in error.split(" .* "))
    assert not list(tmp_path.iterdir()), "nothing may be written"


def test_a_mistake_that_every_worker_finds_is_told_once(tmp_path):
    (tmp_path / "empty.txt").touch()
    done = counterpoint("train", "-s", "data.paths=empty.txt", "-s", "parallel.sequence=2", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == "error: empty.txt: the file is empty; fill it or leave it out\n"


def test_the_printed_configuration_is_one(tmp_path):
    done = counterpoint("train", "--print-config", "-s", "optimizer.lr=0.5", "-s", "parallel.data=2")
    assert done.returncode == 0
    (tmp_path / "again.yaml").write_text(done.stdout)
    again = counterpoint("train", str(tmp_path / "again.yaml"), "--print-config")
    assert again.stdout == done.stdout and "lr: 0.5" in done.stdout
