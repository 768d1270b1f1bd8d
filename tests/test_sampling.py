"""Views of real files: the frames that a model sees are those of the file, whatever its kind, on any number of threads."""
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

from qualivision.data.sampling import Sampling, SamplingError, processor_view, resize_square, uniform_indices, uniform_view
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


# ---------------------------------------------------------------- the view of V-JEPA 2's processor

def formula(frames, height, width):
    "Frames that any implementation can make: uint8 (3x + 5y + 7t + 85c + (x*y)//32) mod 256."
    t, y, x, c = np.ogrid[:frames, :height, :width, :3]
    return ((3 * x + 5 * y + 7 * t + 85 * c + (x * y) // 32) % 256).astype(np.uint8)


PROCESSOR = json.loads((Path(__file__).parent / "fixtures" / "vjepa2_processor_pixels.json").read_text())["cases"]


@pytest.mark.parametrize("case", PROCESSOR, ids=lambda c: f"{c['height']}x{c['width']}to{c['size']}")
def test_processor_view_has_the_recorded_pixels(case):
    view = processor_view(formula(case["frames"], case["height"], case["width"]), case["size"])
    assert view.shape == (case["frames"], 3, case["size"], case["size"]) and view.dtype == torch.uint8
    assert view.flatten()[np.arange(240) * (view.numel() - 1) // 239].tolist() == case["values"]
    assert view.long().sum((0, 2, 3)).tolist() == case["channel_sum"]


@pytest.mark.parametrize("height,width,size", [(90, 161, 64), (240, 135, 96), (50, 50, 64), (31, 77, 40)])
def test_processor_view_is_the_processor(height, width, size):
    "Against transformers itself, where its torchvision is there and loads; this project does not need torchvision."
    try: import torchvision
    except (ImportError, RuntimeError) as e: pytest.skip(f"torchvision does not load: {e}")
    from transformers import VJEPA2VideoProcessor
    frames = formula(3, height, width)
    theirs = VJEPA2VideoProcessor(crop_size=size)([frames], return_tensors="pt", do_rescale=False, do_normalize=False)["pixel_values_videos"][0]
    assert torchvision.__version__ and torch.equal(processor_view(frames, size), theirs.to(torch.uint8))


def test_a_file_in_the_view_of_the_processor(tmp_path):
    frames = np.stack([picture(k) for k in range(4)])
    clip = write_video(tmp_path / "a.mp4", frames)
    sampling = Sampling(4, 32, "processor")
    view = sampling(clip)
    assert view.shape == (3, 4, 32, 32) and view.is_contiguous() and not torch.equal(view, Sampling(4, 32)(clip))
    assert sampling.key() != Sampling(4, 32).key() == "uniform4-square32-bicubic"                    # caches that exist stay valid
    assert Sampling(**asdict(sampling)) == sampling and Sampling(**dict(count=4, size=32)) == Sampling(4, 32)    # as older checkpoints say it
    with pytest.raises(SamplingError): Sampling(4, 32, "centre")
    with pytest.raises(SamplingError): processor_view(frames.astype(float), 32)
