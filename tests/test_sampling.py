"""Views of real files: the frames that a model sees are those of the file, whatever its kind, on any number of threads."""
import hashlib
import json
import struct
import subprocess
import sys
import tracemalloc
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, features

from qualivision.official.views import (
    COVER_VIEWS, DOVER_VIEWS, View, cover_views, dover_views, fragment_corners, fragment_offsets,
    fragment_view, is_picture, read_picture, segment_indices, view_indices)
from qualivision.data.sampling import (
    Sampling, SamplingError, processor_view, resize_square, resize_square8, uniform_indices, view_of)
from qualivision.data.container import EmptyVideo, VideoError, write_video
from qualivision.data.video import probe, read_frames
from qualivision.quality import QualiVisionError

sys.path.insert(0, str(Path(__file__).parent))
from video_zoo import H, N, W, ZOO, numbers, picture  # noqa: E402


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("views")
    for name in ("h264.mp4", "open.mp4", "hevc.mkv", "trim_start.mp4", "loop.gif"): ZOO[name].make(folder / name)
    return folder


@pytest.mark.parametrize("name", ["h264.mp4", "open.mp4", "hevc.mkv", "trim_start.mp4", "loop.gif"])
def test_a_view_shows_the_frames_of_the_file(zoo, name):
    view = Sampling(64, 96)(zoo / name)
    assert view.shape == (3, 64, 96, 96) and view.dtype == torch.uint8 and view.is_contiguous()
    shown = np.array(ZOO[name].shown)
    assert numbers(view.permute(1, 2, 3, 0).numpy()) == shown[uniform_indices(probe(zoo / name).frames)].tolist()
    assert torch.equal(view, Sampling(64, 96)(zoo / name, "pyav"))


def test_the_indices_are_the_documented_ones():
    for n in (1, 2, 3, 48, 63, 64, 65, 97, 150, 300, 1001):
        assert uniform_indices(n).tolist() == np.linspace(0, n - 1, 64).astype(int).tolist() and uniform_indices(n).dtype == np.int64
    for wrong in ((0, 64), (10, 0), (-1, 5)):
        with pytest.raises(SamplingError): uniform_indices(*wrong)


def test_errors_of_the_reader_come_through(tmp_path):
    (tmp_path / "a.mp4").touch()
    with pytest.raises(EmptyVideo): Sampling()(tmp_path / "a.mp4")
    with pytest.raises(SamplingError): Sampling(0, 640)


def test_memory_maps_and_turned_arrays_are_taken_as_they_are(tmp_path):
    frames = np.stack([picture(k) for k in range(4)])
    np.save(tmp_path / "a.npy", frames)
    for same in (np.load(tmp_path / "a.npy", mmap_mode="r"), frames[:, ::-1][:, ::-1], torch.from_numpy(frames)):
        assert torch.equal(resize_square(same, 40), resize_square(frames, 40))
    assert resize_square(frames[:, :, :H], H).shape == (4, 3, H, H) and W > H
    for wrong in (frames.astype(float), frames[0], frames[..., :2]):
        with pytest.raises(SamplingError): resize_square(wrong, 40)


@pytest.mark.parametrize("height,width,size", [(90, 160, 64), (67, 31, 48), (33, 40, 96)])
def test_whole_numbers_are_those_of_pillow(height, width, size):
    "At least 70 dB from Pillow's bicubic, rows first (Pillow 13 may take the columns first); rounding once from float is not as near."
    frames = np.stack([np.array(Image.fromarray(f).resize((width, height), Image.BICUBIC)) for f in formula(3, 20, 30)])
    rows = [Image.fromarray(f).resize((size, height), Image.BICUBIC) for f in frames]
    theirs = np.stack([np.array(r.resize((size, size), Image.BICUBIC)) for r in rows]).transpose(0, 3, 1, 2)
    error = {f: np.square(f(frames, size).numpy() - theirs.astype(float)).mean() for f in (resize_square8, resize_square)}
    assert error[resize_square8] <= 255 ** 2 / 1e7 < error[resize_square]
    assert torch.equal(resize_square8(frames[:, :, ::-1], size), torch.cat([resize_square8(f[None, :, ::-1], size) for f in frames]))


def test_a_file_in_whole_numbers(tmp_path):
    "Each frame in its places, in memory of the view's own order; new models take it from 256 pixels on, old ones never."
    frames = np.stack([picture(k) for k in range(5)])
    clip, sampling = write_video(tmp_path / "a.mp4", frames), Sampling(8, 40, "square8")
    view, n = sampling.counted(clip)
    assert n == 5 and view.is_contiguous()
    assert torch.equal(view, resize_square8(read_frames(clip, uniform_indices(5, 8)), 40).transpose(0, 1))
    assert (sampling.key(), Sampling(8, 40).key()) == ("uniform8-square40-bicubic8", "uniform8-square40-bicubic")
    assert [view_of(size) for size in (144, 224, 640)] == ["square", "square", "square8"] and Sampling().view == "square"


VIEW = """
import sys, hashlib, torch
torch.set_num_threads(int(sys.argv[2]))
from qualivision.data.sampling import Sampling
print(hashlib.sha256(Sampling(16, 75)(sys.argv[1]).numpy().tobytes()).hexdigest())
"""


def test_views_are_equal_on_any_number_of_threads(tmp_path):
    clip = write_video(tmp_path / "a.mp4", np.stack([picture(k) for k in range(N)]))
    runs = [subprocess.run([sys.executable, "-c", VIEW, clip, str(n)], capture_output=True, text=True, timeout=300) for n in (1, 4)]
    assert runs[0].returncode == 0 and runs[0].stdout == runs[1].stdout, runs[0].stderr


# ---------------------------------------------------------------- the view of V-JEPA 2's processor

def formula(frames, height, width):
    "Frames that any implementation can make: uint8 (3x + 5y + 7t + 85c + (x*y)//32) mod 256."
    t, y, x, c = (np.asarray(a, np.uint16) for a in np.ogrid[:frames, :height, :width, :3])
    return ((3 * x + 5 * y + 7 * t + 85 * c + (x * y) // 32) % 256).astype(np.uint8)


def fragments(frame, **more): return fragment_view(frame, fragment_corners(*frame.shape[:2], 1, torch.Generator().manual_seed(0), **more)[0])


def shapes(views): return {name: tuple(view.shape) for name, view in views.items()}


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


# ---------------------------------------------------------------- the views of DOVER and COVER

OFFICIAL = json.loads((Path(__file__).parent / "fixtures" / "dover_views_parity.json").read_text())["synthetic"]


@pytest.fixture(scope="module", params=OFFICIAL)
def official(request):
    "A recorded case of the official code, and its frames."
    case = OFFICIAL[request.param]
    return case, formula(case["num_frames"], case["height"], case["width"])


def same_as_recorded(view, recorded):
    "A view (T,3,H,W) uint8 against the official one, recorded as C,T,H,W in its own dtype."
    x = view.transpose(0, 1).contiguous().numpy().astype(recorded["dtype"])
    assert list(x.shape) == recorded["shape"]
    assert x.reshape(-1)[np.arange(16) * (x.size - 1) // 15].tolist() == recorded["at16"]
    assert x.mean((1, 2, 3), dtype=np.float64).tolist() == pytest.approx(recorded["channel_mean"], abs=1e-9)
    assert hashlib.sha256(x.tobytes()).hexdigest() == recorded["sha256_c_order"]


def test_official_draws(official):
    case, _ = official
    assert {k: v.tolist() for k, v in view_indices(DOVER_VIEWS, case["num_frames"], case["seed"]).items()} == case["frame_indices"]
    drawn = fragment_offsets(case["height"], case["width"], 3, torch.Generator().manual_seed(case["seed"]))
    recorded = [torch.tensor(o["values"]) for o in case["fragment_offsets"]] or [torch.zeros(7, 7, 3)] * 2     # none where there is no room
    assert all(torch.equal(a, b.long()) for a, b in zip(drawn, recorded, strict=True))


@pytest.mark.usefixtures("two_threads")
def test_official_pixels(official):
    case, frames = official
    views = dover_views(frames, case["seed"], raw=True, grid_before_enlarging=True)
    for name, view in views.items(): same_as_recorded(view, case["raw_views"][name])
    same_as_recorded(dover_views(frames, case["seed"], raw=True, antialias=False)["aesthetic"], case["aesthetic_raw_view_no_antialias"])
    ours, theirs = (fragments(frames[0], grid_before_enlarging=g) for g in (False, True))
    assert torch.equal(ours, theirs) == (min(frames.shape[1:3]) >= 224)                  # the option is about small frames alone


def test_views_are_normalised_and_cut_into_clips():
    "Three clips of two frames, against arithmetic in float64; the constants are the recorded ones."
    view, frames = View("technical", segments=3, length=2, clips=3), formula(6, 8, 9)
    x = view.normalise(torch.from_numpy(frames).permute(0, 3, 1, 2))
    assert x.shape == (3, 3, 2, 8, 9) and x.dtype == torch.float32 and x.is_contiguous()
    norm = json.loads((Path(__file__).parent / "fixtures" / "dover_views_parity.json").read_text())["normalisation"]
    for v in (view, *DOVER_VIEWS, *COVER_VIEWS[1:]): assert [list(v.mean), list(v.std)] == [norm["mean"], norm["std"]]
    exact = ((frames - np.array(norm["mean"])) / norm["std"]).reshape(3, 2, 8, 9, 3).transpose(0, 4, 1, 2, 3)
    assert np.abs(x.numpy() - exact).max() < 1e-6


def test_cover_takes_pairs_of_frames_and_each_branch_its_own():
    i = view_indices(COVER_VIEWS, 200, 5)
    assert list(i) == ["semantic", "technical", "aesthetic"] and [len(v) for v in i.values()] == [20, 40, 40]
    random = np.random.RandomState(5)                                  # by hand: L = 10, one frame of 10, pairs with room for 6 starts
    assert (i["semantic"] == np.arange(20) * 10 + random.randint(0, 8, 20)).all()
    for name in ("technical", "aesthetic"):
        start = np.arange(20) * 10 + random.randint(0, 6, 20)
        assert (i[name] == np.stack([start, start + 2], 1).reshape(-1)).all()
    views = cover_views(formula(45, 230, 240), 5, raw=True)
    assert shapes(views) == {"semantic": (20, 3, 512, 512), "technical": (40, 3, 224, 224), "aesthetic": (40, 3, 224, 224)}
    runs = views["technical"][:, :, :32, :32]                            # one run of 40 frames: a patch stands still in all of them
    top, left = (int(o[0, 0, 0]) for o in fragment_offsets(230, 240, 1, torch.Generator().manual_seed(5)))
    source = formula(45, 230, 240)[view_indices(COVER_VIEWS, 45, 5)["technical"], top:top + 32, left:left + 32]
    assert (runs.permute(0, 2, 3, 1).numpy() == source).all()


@pytest.mark.parametrize("height,width", [(224, 224), (120, 160), (90, 400), (33, 20), (9, 16), (223, 1000)])
def test_fragments_cover_all_of_a_small_frame(height, width):
    "In every frame, also an enlarged one, the patches reach from the first rows and columns to the last."
    y, x = np.mgrid[:height, :width]
    frame = np.stack([y * 255 // (height - 1), x * 255 // (width - 1), 0 * x], -1).astype(np.uint8)
    view = fragments(frame).int()
    assert view.shape == (3, 224, 224)
    step = 2 + 255 * 1.2 / 7                                             # a patch may lie anywhere in its cell
    for channel in (0, 1): assert view[channel].min() <= step and view[channel].max() >= 255 - step


def test_patches_that_do_not_fit_the_official_grid():
    with pytest.raises(SamplingError, match="no grid"): fragments(formula(1, 20, 40)[0], grid_before_enlarging=True)


@pytest.mark.parametrize("views", [dover_views, cover_views])
def test_a_file_gives_the_views_of_its_frames(tmp_path, views):
    frames = np.stack([picture(k % N) for k in range(75)])
    clip = write_video(tmp_path / "a.mp4", frames)
    files = [views(clip, seed, raw=True) for seed in (0, 0, 1)]
    arrays = views(read_frames(clip, range(75)), raw=True)
    for name in arrays:
        assert torch.equal(files[0][name], arrays[name]) and torch.equal(files[0][name], files[1][name])
    assert not torch.equal(files[0]["technical"], files[2]["technical"])


@pytest.mark.parametrize("make", [dover_views, cover_views, *(Sampling(64, 96, v) for v in ("square", "square8", "processor"))],
                         ids=lambda m: getattr(m, "view", m))
def test_no_video_stands_whole_in_memory(tmp_path, make):
    "48 frames are 133 MB. numpy tells of its arrays: whole frames, and the patches that are kept, 15 MB at most."
    frame = np.random.default_rng(0).integers(0, 256, (720, 1280, 3), dtype=np.uint8)
    clip = write_video(tmp_path / "large.mp4", np.broadcast_to(frame, (48, *frame.shape)), preset="ultrafast", crf=40)
    more = {} if isinstance(make, Sampling) else {"raw": True}
    make(write_video(tmp_path / "small.mp4", np.zeros((4, 240, 240, 3), np.uint8)), **more)                # what is loaded once
    tracemalloc.start()
    try: make(clip, **more)
    finally: most = tracemalloc.get_traced_memory()[1]; tracemalloc.stop()
    assert frame.nbytes / 2 <= most < 12 * frame.nbytes, f"{most / frame.nbytes:.1f} frames"


def test_pictures(tmp_path):
    frame = picture(3)
    Image.fromarray(frame).save(tmp_path / "a.png")
    views = cover_views(tmp_path / "a.png")
    assert shapes(views) == {"semantic": (1, 3, 1, 512, 512), "technical": (1, 3, 1, 224, 224), "aesthetic": (1, 3, 1, 224, 224)}
    assert torch.equal(cover_views(tmp_path / "a.png", raw=True)["aesthetic"], cover_views(frame[None], raw=True)["aesthetic"][:1])
    exif = Image.Exif()
    exif[0x0112] = 6                                                     # a camera held upright: to be turned by a quarter
    Image.fromarray(np.rot90(frame)).save(tmp_path / "turned.png", exif=exif)
    assert torch.equal(cover_views(tmp_path / "turned.png")["technical"], views["technical"])
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "b.png").write_bytes(whole[:len(whole) // 2])
    (tmp_path / "c.jpg").write_text("no picture")
    Image.fromarray(np.zeros((9, 9), np.int32), "I").save(tmp_path / "d.tif")
    for wrong, said in (("b.png", "cannot be read as a picture"), ("c.jpg", "it is text"), ("d.tif", "not 8-bit"), ("gone.png", "no such file")):
        with pytest.raises(QualiVisionError, match=wrong.replace(".", r"\.") + f".*{said}"): cover_views(tmp_path / wrong)
    with pytest.raises(VideoError): dover_views(tmp_path / "a.png")


def flat(*ks): return [Image.fromarray(np.full((48, 64, 3), 40 * k + 20, np.uint8)) for k in ks]


@pytest.mark.parametrize("kind", ["png", "webp", "gif", "avif"])
def test_what_moves_is_a_video_whatever_its_name(tmp_path, kind):
    "Five pictures in one file, and one, under wrong names. Of so short a video COVER sees the first and the third frame, as of any."
    if kind in ("webp", "avif") and not features.check(kind): pytest.skip(f"this Pillow writes no {kind}")
    flat(0)[0].save(tmp_path / "moving.jpg", kind, save_all=True, append_images=flat(1, 2, 3, 4), duration=40)
    flat(2)[0].save(tmp_path / "still.mp4", kind)
    assert not is_picture(tmp_path / "moving.jpg") and is_picture(tmp_path / "still.mp4")
    view = cover_views(tmp_path / "moving.jpg", raw=True)["aesthetic"]
    assert len(view) == 40 and {round(x) for x in (view.float().mean((1, 2, 3)) / 40 - .5).tolist()} == {0, 2}
    assert cover_views(tmp_path / "still.mp4", raw=True)["aesthetic"].float().mean().round() == 100


def test_pictures_are_told_by_content(tmp_path):
    "Endings of browsers, none, and wrong ones; the further pictures of a phone; pages are refused."
    for name, kind in (("a.jfif", "JPEG"), ("a.jpe", "JPEG"), ("a", "PNG"), ("a.mp4", "TIFF"), ("a.bin", "BMP")):
        flat(2)[0].save(tmp_path / name, kind)
        assert cover_views(tmp_path / name, raw=True)["aesthetic"].shape == (1, 3, 224, 224)
        with pytest.raises(VideoError): dover_views(tmp_path / name)
    flat(2)[0].save(tmp_path / "phone.jpg", "MPO", save_all=True, append_images=flat(3, 4))
    assert read_picture(tmp_path / "phone.jpg")[0, 0, 0].tolist() == [100] * 3
    flat(2)[0].save(tmp_path / "pages.tif", save_all=True, append_images=flat(3, 4))
    with pytest.raises(SamplingError, match="pages.tif: it holds 3 pages"): cover_views(tmp_path / "pages.tif")
    clip = write_video(tmp_path / "clip.mp4", np.zeros((30, 64, 64, 3), np.uint8))
    clip.rename(tmp_path / "clip.png")
    assert len(cover_views(tmp_path / "clip.png", raw=True)["aesthetic"]) == 40


def shows(path, picture, *, expected, **how):
    picture.save(path, **how)
    assert read_picture(path)[0, 4, 4].tolist() == pytest.approx(expected, abs=1), (picture.mode, path.suffix)


def test_hidden_colours_do_not_show(tmp_path):
    "Every way to say transparent, over white; what is half covered is mixed. The reader of videos shows the same."
    solid = lambda *pixel: np.tile(np.uint8(pixel), (16, 16, 1))
    for ending in (".png", ".webp", ".tif"):
        path = tmp_path / f"a{ending}"
        how = {"lossless": True, "exact": True} if ending == ".webp" else {}
        shows(path, Image.fromarray(solid(200, 20, 90, 0)), expected=[255] * 3, **how)
        shows(path, Image.fromarray(solid(200, 20, 90, 102)), expected=[233, 161, 189], **how)
        shows(path, Image.fromarray(solid(200, 20, 90, 255)), expected=[200, 20, 90], **how)
    path = tmp_path / "a.png"
    shows(path, Image.fromarray(solid(80, 51)), expected=[220] * 3)                                               # LA
    shows(path, Image.fromarray(solid(7, 8, 9)), expected=[255] * 3, transparency=(7, 8, 9))                       # one colour of RGB
    shows(path, Image.fromarray(solid(7)[..., 0]), expected=[255] * 3, transparency=7)                             # of grey
    palette = Image.fromarray(solid(1)[..., 0], "P")
    palette.putpalette([1, 2, 3, 40, 50, 60])
    shows(path, palette, expected=[40, 50, 60])
    shows(path, palette, expected=[212, 214, 216], transparency=bytes([255, 51]))                                 # of a palette, in part
    shows(tmp_path / "a.gif", palette, expected=[255] * 3, transparency=1)
    assert read_frames(tmp_path / "a.gif", [0])[0, 4, 4].tolist() == [255] * 3


def ink_profile(cyan):
    "An ICC profile for printing, version 2: cyan ink alone looks like this Lab colour (8 bit), and all else like paper."
    table = np.full((2, 2, 2, 2, 3), [255, 128, 128], np.uint8)
    table[1, 0, 0, 0] = cyan
    ramp, matrix = bytes(range(256)), struct.pack(">9i", *(np.eye(3, dtype=int) * 65536).ravel().tolist())
    lut = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + matrix + 4 * ramp + table.tobytes() + 3 * ramp
    tags = struct.pack(">I4sII", 1, b"A2B0", 144, len(lut))
    white = struct.pack(">3I", 0xf6d6, 0x10000, 0xd32d)
    head = struct.pack(">I4sI4s4s4s12s4s", 144 + len(lut), bytes(4), 0x2400000, b"prtr", b"CMYK", b"Lab ", bytes(12), b"acsp")
    return head + bytes(28) + white + bytes(48) + tags + lut


def test_inks_need_their_profile(tmp_path):
    cyan = Image.new("CMYK", (32, 32), (255, 0, 0, 0))
    cyan.save(tmp_path / "a.jpg", quality=100)
    with pytest.raises(SamplingError, match="CMYK.*Save it as RGB"): cover_views(tmp_path / "a.jpg")
    cyan.save(tmp_path / "b.jpg", quality=100, icc_profile=ink_profile([128, 192, 168]))
    red, green, blue = read_picture(tmp_path / "b.jpg")[0, 4, 4].tolist()
    assert red > 180 and green < 80 and blue < 90, "Lab 50, 64, 40 is a red"
    cyan.save(tmp_path / "c.jpg", icc_profile=b"no profile")
    with pytest.raises(SamplingError, match="profile"): cover_views(tmp_path / "c.jpg")


def test_sixteen_bits(tmp_path):
    grey = Image.fromarray(np.full((9, 9), 0x80ff, np.uint16))
    for name in ("a.png", "a.tif"): shows(tmp_path / name, grey, expected=[128] * 3)


def test_views_refuse_what_is_no_video():
    for wrong in (np.zeros((3, 9, 9, 3)), np.zeros((9, 9, 3), np.uint8), np.zeros((0, 9, 9, 3), np.uint8)):
        with pytest.raises(SamplingError): dover_views(wrong)
    for seed in (-1, 2 ** 32):
        with pytest.raises(SamplingError): dover_views(formula(2, 40, 40), seed)
    with pytest.raises(SamplingError): segment_indices(0, 3, 32, 2, np.random.RandomState(0))
    assert View("x", segments=1) == View("x", segments=1)
