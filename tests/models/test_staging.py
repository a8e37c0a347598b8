"""A staged folder is in place whole, or nothing has changed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from octavo.errors import ArtifactError
from octavo.models.staging import StagedFolder


def stage(target: Path, mine: bool = False) -> StagedFolder:
    return StagedFolder(target, replaceable=lambda folder: mine, error=ArtifactError)


def fill(staged: StagedFolder) -> Path:
    (staged.folder / "new").write_text("new")
    return staged.commit()


def test_a_new_folder_and_an_empty_one_are_filled(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for target in (tmp_path / "empty", tmp_path / "a" / "b"):
        with stage(target) as staged:
            assert staged.folder.parent == target.parent
            assert not (target / "new").exists()
            assert fill(staged) == target
        assert (target / "new").read_text() == "new"
        assert target.stat().st_mode & 0o777 == 0o777 & ~current_umask()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "empty"]


def current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_without_commit_nothing_stays(tmp_path: Path) -> None:
    with stage(tmp_path / "out") as staged:
        (staged.folder / "new").write_text("new")
    assert list(tmp_path.iterdir()) == []


def test_a_relative_target_follows_no_later_chdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with stage(Path("out")) as staged:
        monkeypatch.chdir("/")
        assert fill(staged) == tmp_path / "out"


@pytest.mark.parametrize("what", ["file", "link", "dangling link", "foreign folder"])
def test_anything_else_in_the_place_is_refused_before_writing(what: str, tmp_path: Path) -> None:
    target, other = tmp_path / "out", tmp_path / "other"
    other.mkdir()
    match what:
        case "file":
            target.write_text("x")
        case "link":
            target.symlink_to(other)
        case "dangling link":
            target.symlink_to(tmp_path / "nothing")
        case "foreign folder":
            target.mkdir()
            (target / "x").write_text("x")
    before = sorted(path.name for path in tmp_path.rglob("*"))
    with pytest.raises(ArtifactError) as caught, stage(target):
        pytest.fail("entered")
    assert caught.value.hint
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


def test_a_failed_rename_puts_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").write_text("old")
    rename = os.replace

    def fail_into_place(source: Any, destination: Any) -> None:
        if str(source).endswith(".writing"):
            raise OSError(28, "No space left on device")
        rename(source, destination)

    monkeypatch.setattr(os, "replace", fail_into_place)
    with pytest.raises(ArtifactError, match="No space left"), stage(target, mine=True) as staged:
        fill(staged)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (target / "old").read_text() == "old"


def test_a_target_that_appears_while_writing_is_not_overwritten(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with pytest.raises(ArtifactError, match="other files"), stage(target) as staged:
        target.mkdir()
        (target / "theirs").write_text("theirs")
        fill(staged)
    assert (target / "theirs").read_text() == "theirs"


def test_a_place_that_cannot_be_written_is_an_error_of_the_kind_asked_for(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ArtifactError), stage(tmp_path / "file" / "out"):
        pytest.fail("entered")
    with pytest.raises(ArtifactError), stage(Path("/")):
        pytest.fail("entered")
