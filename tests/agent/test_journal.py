"""The journal: one write for what is logged together, the same trials when read again, a torn end dropped."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import optuna
import pytest
from optuna.storages import JournalStorage

from autocompress.agent.journal import Journal
from autocompress.agent.profile import Profile
from autocompress.agent.study import JOURNAL
from autocompress.errors import RunError
from tests.agent.conftest import Outcome, drive
from tests.agent.test_study import study_of


def study_in(path: Path) -> tuple[Journal, optuna.Study]:
    journal = Journal(path)
    return journal, optuna.create_study(storage=JournalStorage(journal), study_name="s", load_if_exists=True)


def test_an_ask_waits_for_the_disk_once(
    profile: Profile, outcome: Outcome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = study_of(tmp_path, profile)
    waits: list[int] = []
    monkeypatch.setattr(os, "fsync", waits.append)
    spec = study.ask()
    assert spec is not None
    assert len(waits) == 1
    study.tell(spec.number, outcome(spec))
    assert len(waits) == 3, "its attributes, and its values"


def test_a_full_disk_is_one_sentence(profile: Profile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    study = study_of(tmp_path, profile)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match=f"^cannot write '.*{JOURNAL}': No space left on device$"):
        study.ask()


def test_what_was_written_at_once_is_read_again(profile: Profile, outcome: Outcome, tmp_path: Path) -> None:
    study = study_of(tmp_path, profile)
    drive(study, outcome)
    before = study.trials()
    study.close()
    assert study_of(tmp_path, profile).trials() == before


def test_what_is_logged_before_an_error_is_kept(tmp_path: Path) -> None:
    journal, study = study_in(tmp_path / "j")

    def interrupted() -> None:
        with journal.at_once():
            study.ask().set_user_attr("a", (1, 2))
            assert study.trials[0].user_attrs == {"a": [1, 2]}, "as it will be read from the file"
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    study.ask()
    assert [t.user_attrs for t in study.trials] == [{"a": [1, 2]}, {}]
    assert study_in(tmp_path / "j")[1].trials == study.trials


def test_what_a_crash_cut_short_is_dropped(profile: Profile, outcome: Outcome, tmp_path: Path) -> None:
    study = study_of(tmp_path, profile)
    spec = study.ask()
    assert spec is not None
    study.tell(spec.number, outcome(spec))
    study.close()
    with (tmp_path / JOURNAL).open("ab") as file:
        file.write(b'{"op_code":4,"worker_')
    study = study_of(tmp_path, profile)
    drive(study, outcome)
    study.close()
    assert len(study_of(tmp_path, profile).complete()) == 8


@pytest.mark.parametrize("interrupted", ["symlink", "rename", "unlink"])
def test_an_interrupt_is_one_wherever_it_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interrupted: str
) -> None:
    """Optuna's lock is taken and given back by these; interrupted, it complains that it does not have it."""
    path = tmp_path / "journal"
    path.touch()
    journal = Journal(path)
    do = getattr(os, interrupted)
    times = iter([True])

    def done_and_interrupted(*args: str) -> None:
        if next(times, False):
            if interrupted != "symlink":
                do(*args)
            raise KeyboardInterrupt
        do(*args)

    monkeypatch.setattr(os, interrupted, done_and_interrupted)
    with pytest.raises(KeyboardInterrupt):
        journal.append_logs([{"a": 1}])
    monkeypatch.undo()
    Journal(path).append_logs([{"a": 2}])
    assert path.read_text().endswith('{"a":2}\n')
