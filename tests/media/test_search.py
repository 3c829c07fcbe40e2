"""Finding videos in folders as people keep them."""

import pytest

from gnvc_jax.media.search import find_videos


@pytest.fixture
def make(tmp_path):
    """make(names, ...): empty files of these names; what is found, relative to their folder."""

    def find(*names):
        for name in names:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).touch()
        return [str(path.relative_to(tmp_path)) for path in find_videos(tmp_path)]

    return find


def test_videos_come_before_folders_of_frames(make):
    assert make("b.mkv", "a/1.png", "a/2.png", "c/d.MP4", "notes.txt", "v.mp4.part") == [
        "b.mkv",
        "c/d.MP4",
        "a",
    ]


@pytest.mark.parametrize("suffix", "flv wmv 3gp mpg mpeg ogv mts m2ts ts m4v avi webm gif".split())
def test_suffixes_of_cameras_and_the_web(make, suffix):
    assert make(f"a.{suffix}", f"b.{suffix.upper()}") == [f"a.{suffix}", f"b.{suffix.upper()}"]


@pytest.mark.parametrize(
    "hidden",
    [
        "._v.mp4",
        ".ipynb_checkpoints/v-checkpoint.mp4",
        ".thumbnails/1.png",
        "@eaDir/v.mp4/SYNOVIDEO_VIDEO_SCREENSHOT.png",
        "#recycle/old.mp4",
        "__MACOSX/v.mp4",
        "deep/.Trash-1000/files/v.mp4",
        "$RECYCLE.BIN/v.mp4",
    ],
)
def test_hidden_and_system_folders_are_skipped(make, hidden):
    assert make("v.mp4", hidden) == ["v.mp4"]


@pytest.mark.parametrize("video", ["a.mp4", "below/a.mp4"])
def test_pictures_beside_videos_are_left_out_with_a_warning(make, video, caplog, tmp_path):
    assert make("cover.png", "frames/1.png", video) == [video, "frames"]
    assert caplog.messages == [f"{tmp_path}: PNG pictures beside videos are left out (1)"]


def test_cyclic_links_end(make, tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "up").symlink_to(tmp_path)
    assert make("deep/a.mp4") == ["deep/a.mp4"]
