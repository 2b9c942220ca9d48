"""Files appear whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from ssod.files import replacing


def test_the_name_is_given_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with replacing(path) as file:
        file.write(b"new and longer")
        file.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new and longer"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_failure_leaves_what_was_there_and_nothing_else(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "a.bin"
    for before in ([], [path]):
        with pytest.raises(error):
            _break_off(path, error)
        assert list(tmp_path.iterdir()) == before
        path.write_bytes(b"old")
    assert path.read_bytes() == b"old"


def _break_off(path: Path, error: type[BaseException]) -> None:
    with replacing(path) as file:
        file.write(b"half")
        raise error


def test_two_files_take_their_names_in_the_order_of_their_ends(tmp_path: Path) -> None:
    """As an engine and what describes it do: where the second fails, the first is not there either."""
    (tmp_path / "inner").mkdir()
    with pytest.raises(IsADirectoryError), replacing(tmp_path / "outer"), replacing(tmp_path / "inner") as inner:
        inner.write(b"2")
    assert [p.name for p in tmp_path.iterdir()] == ["inner"]
