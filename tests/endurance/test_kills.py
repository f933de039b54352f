"""A process that is killed loses nothing and leaves nothing for long."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mono_quant import load_model
from mono_quant.atomic import _MACHINE, replacing
from tests.endurance.kills import (
    kill_while_calibrating,
    kill_while_quantizing_in_place,
    kill_while_saving,
    network,
    result,
    save_at_once,
)
from tests.endurance.nursery import Nursery, nursery

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks, and reads /proc")


@pytest.fixture(scope="module")
def children() -> Iterator[Nursery]:
    """Yield what forks processes."""
    with nursery() as found:
        yield found


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_killed_while_it_saves_the_file_is_the_old_or_the_new_one(
    suffix: str, children: Nursery, tmp_path: Path
) -> None:
    survived = kill_while_saving(children, tmp_path, suffix, 20)
    assert survived.new
    assert survived.left, "no kill came while a file was being written: nothing was tried"


def test_killed_while_it_quantizes_in_place_no_file_is_touched(
    children: Nursery, tmp_path: Path
) -> None:
    survived = kill_while_quantizing_in_place(children, tmp_path, 5)
    assert survived.old


@pytest.mark.slow
def test_killed_while_it_calibrates_a_resumed_run_ends_in_the_same_bytes(
    children: Nursery, tmp_path: Path
) -> None:
    survived = kill_while_calibrating(children, tmp_path, 3)
    assert survived.kills, "each run was through before it was killed: nothing was tried"


def test_of_two_that_save_to_one_path_one_wins_whole(children: Nursery, tmp_path: Path) -> None:
    assert save_at_once(children, tmp_path, 40) > 3


def test_a_folder_that_may_not_be_written_to_is_an_error_that_names_the_file(
    children: Nursery, tmp_path: Path
) -> None:
    path = result(0).save(tmp_path / "model.pt")
    before = path.read_bytes()
    tmp_path.chmod(0o555)
    try:
        assert children.start("save_as_nobody", path).wait() == 0
    finally:
        tmp_path.chmod(0o755)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_living_process_is_writing_is_not_taken_for_abandoned(tmp_path: Path) -> None:
    """Nor what another machine left, whose processes nobody here can see."""
    path = tmp_path / "model.safetensors"
    elsewhere = tmp_path / f".{path.name}.00000000-11111111.tmp"
    elsewhere.mkdir()
    with replacing(path) as beside:
        beside.write_bytes(b"late")
        result(0).save(path)
        assert beside.exists()
        load_model(path, network(2))
    assert path.read_bytes() == b"late"
    assert sorted(tmp_path.iterdir()) == [elsewhere, path]


def test_what_was_abandoned_beside_one_file_is_left_alone_by_another(tmp_path: Path) -> None:
    names = [f".model.pt.{_MACHINE}-{number}{number}.tmp" for number in (1111, 2222, 3333)]
    left, file, link = (tmp_path / name for name in names)
    left.mkdir()
    (left / "model.pt").write_bytes(b"half")
    file.write_text("somebody's")
    link.symlink_to(tmp_path.parent)
    other = result(0).save(tmp_path / "other.pt")
    assert (left / "model.pt").exists()
    path = result(0).save(tmp_path / "model.pt")
    assert set(tmp_path.iterdir()) == {file, link, other, path}
