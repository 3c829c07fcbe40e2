"""Output that is whole or not there, whatever lies at its place."""

import os
import stat
import threading

import numpy as np
import pytest

from gnvc_jax.files import atomic_output, keyed_name, would_overwrite, write_json, write_whole
from gnvc_jax.media.writer import open_writer


def test_failure_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.txt"
    write_whole(path, "old")
    with pytest.raises(KeyError), atomic_output(path) as temporary:
        temporary.write_text("half")
        raise KeyError
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]


def test_two_writers_with_one_process_id_do_not_collide(tmp_path):
    path = tmp_path / "a.txt"
    with atomic_output(path) as one, atomic_output(path) as other:
        one.write_text("one")
        other.write_text("other")
        assert one.read_text() == "one"
    assert path.read_text() == "one" and os.listdir(tmp_path) == ["a.txt"]


def test_permissions_are_those_of_a_plainly_written_file(tmp_path):
    (tmp_path / "plain").write_text("")
    write_whole(tmp_path / "ours", "")
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plain", "ours")]
    assert modes[0] == modes[1]


@pytest.mark.parametrize("length", [240, 255])
def test_the_longest_names_of_the_file_system(tmp_path, length):
    name = "ü" * ((length - 4) // 2) + "." + "a" * (3 + (length - 4) % 2)
    assert len(os.fsencode(name)) == length
    write_whole(tmp_path / name, "text")
    assert (tmp_path / name).read_text() == "text"
    write_whole(tmp_path / f"{keyed_name(name, '0123456789ab')}.array_record", "")
    video = tmp_path / f"{'v' * (length - 4)}.mkv"
    with open_writer(video, 16, 16, 25) as out:
        out.write(np.zeros((16, 16, 3), np.uint8))
    assert video.stat().st_size


def test_keyed_names_keep_dots_and_what_is_not_text():
    assert keyed_name("clip.v1", "ab") == "clip.v1-ab"
    assert keyed_name(os.fsdecode(b"\xff\xfea"), "ab") == "a-ab"


def test_a_link_stays_and_what_it_names_is_replaced(tmp_path):
    (tmp_path / "real").mkdir()
    write_whole(tmp_path / "real" / "a.txt", "old")
    (tmp_path / "link").symlink_to("real/a.txt")
    write_whole(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "a.txt").read_text() == "new"
    assert os.listdir(tmp_path / "real") == ["a.txt"]


def test_a_pipe_is_written_through(tmp_path):
    pipe, got = tmp_path / "pipe", []
    os.mkfifo(pipe)
    assert not would_overwrite(pipe)
    reader = threading.Thread(target=lambda: got.append(pipe.read_bytes()))
    reader.start()
    write_json(pipe, {"a": 1})
    reader.join()
    assert got == [b'{\n "a": 1\n}\n'] and stat.S_ISFIFO(pipe.stat().st_mode)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root makes devices")
def test_a_device_stays_a_device(tmp_path):
    node = tmp_path / "null"
    try:
        os.mknod(node, stat.S_IFCHR | 0o600, os.makedev(1, 3))
    except OSError:
        pytest.skip("devices cannot be made here")
    (tmp_path / "link").symlink_to(node)
    for path in (node, tmp_path / "link"):
        write_whole(path, "lost")
    assert stat.S_ISCHR(node.stat().st_mode) and (tmp_path / "link").is_symlink()


def test_pictures_go_into_a_folder_behind_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with open_writer(tmp_path / "link", 16, 16, 25) as out:
        out.write(np.zeros((16, 16, 3), np.uint8))
    assert os.listdir(tmp_path / "real") == ["000001.png"]
