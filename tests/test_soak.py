"""Killing a run does no harm: the short form of `scripts/soak.sh`."""

import pytest

from data import InputError
from scripts import soak


@pytest.mark.slow
def test_a_run_that_is_killed_ends_the_same(tmp_path, capsys):
    soak.main(["--kills", "3", "--during_save", "2", "--max_steps", "60", "--folder", str(tmp_path)])
    shown = capsys.readouterr().out
    assert "PASSED: 3 kills, " in shown
    assert shown.count("during a save; last checkpoint") >= 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--kills", "0"], "--kills is 0, but has to be at least 1"),
        (["--kills", "3", "--during_save", "4"], "--during_save is 4, but has to be between 0 and the kills, 3"),
        (["--model", "models/none"], "--model models/none: no such folder"),
    ],
)
def test_bad_flags_are_named(flags, message):
    with pytest.raises(InputError, match=message):
        soak.main(flags)
