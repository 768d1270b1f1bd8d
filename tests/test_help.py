"Help as a person reads it: every command and option explained, whole, within a window of 60 columns."
import pytest
import typer
from typer.testing import CliRunner

from qualivision.cli import app


def commands(group, path=()):
    "The words of every command and of every group of commands."
    yield path
    for name, command in getattr(group, "commands", {}).items(): yield from commands(command, (*path, name))


ALL = list(commands(typer.main.get_command(app)))


def help_of(path, columns) -> str:
    r = CliRunner().invoke(app, [*path, "--help"], terminal_width=columns)
    assert r.exit_code == 0 and not r.stderr
    return r.stdout


@pytest.mark.parametrize("path", ALL, ids=" ".join)
def test_sixty_columns(path):
    text = help_of(path, 60)
    assert max(map(len, text.splitlines())) <= 60, text
    command = typer.main.get_command(app)
    for name in path: command = command.commands[name]
    lines = text.splitlines()
    lines = lines[next(i for i, line in enumerate(lines) if line.endswith(":")):]      # of the first part
    for p in command.params:
        if p.param_type_name == "option":
            assert p.help, f"{p.name} is not explained"
            at = next(i for i, line in enumerate(lines) if line.startswith(f"  {p.opts[0]}"))
            assert lines[at + 1].startswith("    ") and lines[at + 1].split()[0] == p.help.split()[0], lines[at:at + 2]    # its words begin below it
    words = " ".join(text.split())
    assert all(" ".join((p.help or "").split()) in words for p in command.params), "something was cut off"
    assert command.help and " ".join(command.help.split()) in words


def test_a_wide_window_has_both_side_by_side():
    wide = help_of(("transfer",), 120)
    assert max(map(len, wide.splitlines())) <= 120 and len(wide.splitlines()) < .7 * len(help_of(("transfer",), 60).splitlines())
    assert any("--epochs" in line and "Passes over" in line for line in wide.splitlines())
    parts = [line[:-1] for line in wide.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert parts == ["Opinions and videos", "Training", "Options"]


def test_wrong_use_fits_too():
    r = CliRunner().invoke(app, ["dover", "a.mp4", "--fused", "best"])
    assert r.exit_code == 2 and "'best' is not one of 'official', 'corrected'" in " ".join(r.stderr.split())
