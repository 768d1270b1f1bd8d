"""Views of real files: the frames that a model sees are those of the file, whatever its kind, on any number of threads."""
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from qualivision.data.sampling import Sampling, SamplingError, resize_square, uniform_indices, uniform_view
from qualivision.data.video import EmptyVideo, probe, write_video

sys.path.insert(0, str(Path(__file__).parent))
from video_zoo import H, N, W, ZOO, numbers, picture  # noqa: E402


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("views")
    for name in ("h264.mp4", "open.mp4", "hevc.mkv", "trim_start.mp4", "loop.gif"): ZOO[name].make(folder / name)
    return folder


@pytest.mark.parametrize("name", ["h264.mp4", "open.mp4", "hevc.mkv", "trim_start.mp4", "loop.gif"])
def test_a_view_shows_the_frames_of_the_file(zoo, name):
    view = uniform_view(zoo / name, 64, 96)
    assert view.shape == (3, 64, 96, 96) and view.dtype == torch.uint8 and view.is_contiguous()
    shown = np.array(ZOO[name].shown)
    assert numbers(view.permute(1, 2, 3, 0).numpy()) == shown[uniform_indices(probe(zoo / name).frames)].tolist()
    assert torch.equal(view, Sampling(64, 96)(zoo / name)) and torch.equal(view, uniform_view(zoo / name, 64, 96, reader="pyav"))


def test_the_indices_are_the_documented_ones():
    for n in (1, 2, 3, 48, 63, 64, 65, 97, 150, 300, 1001):
        assert uniform_indices(n).tolist() == np.linspace(0, n - 1, 64).astype(int).tolist() and uniform_indices(n).dtype == np.int64
    for wrong in ((0, 64), (10, 0), (-1, 5)):
        with pytest.raises(SamplingError): uniform_indices(*wrong)


def test_errors_of_the_reader_come_through(tmp_path):
    (tmp_path / "a.mp4").touch()
    with pytest.raises(EmptyVideo): uniform_view(tmp_path / "a.mp4")
    with pytest.raises(SamplingError): Sampling(0, 640)


def test_memory_maps_and_turned_arrays_are_taken_as_they_are(tmp_path):
    frames = np.stack([picture(k) for k in range(4)])
    np.save(tmp_path / "a.npy", frames)
    for same in (np.load(tmp_path / "a.npy", mmap_mode="r"), frames[:, ::-1][:, ::-1], torch.from_numpy(frames)):
        assert torch.equal(resize_square(same, 40), resize_square(frames, 40))
    assert resize_square(frames[:, :, :H], H).shape == (4, 3, H, H) and W > H
    for wrong in (frames.astype(float), frames[0], frames[..., :2]):
        with pytest.raises(SamplingError): resize_square(wrong, 40)


VIEW = """
import sys, hashlib, torch
torch.set_num_threads(int(sys.argv[2]))
from qualivision.data.sampling import uniform_view
print(hashlib.sha256(uniform_view(sys.argv[1], 16, 75).numpy().tobytes()).hexdigest())
"""


def test_views_are_equal_on_any_number_of_threads(tmp_path):
    clip = write_video(tmp_path / "a.mp4", np.stack([picture(k) for k in range(N)]))
    runs = [subprocess.run([sys.executable, "-c", VIEW, clip, str(n)], capture_output=True, text=True, timeout=300) for n in (1, 4)]
    assert runs[0].returncode == 0 and runs[0].stdout == runs[1].stdout, runs[0].stderr
