"""Videos that carry their frame numbers, files that are no videos, damaged ones, and machines without decord."""
import ctypes
import hashlib
import multiprocessing
import os
import subprocess
import sys
import warnings
from pathlib import Path

import av
import numpy as np
import pytest

from qualivision.data import colour, container as C, look as L, video as V
from qualivision.data.container import VideoWarning, write_video
from qualivision.data.look import decord_module, look_at
from qualivision.data.video import frame_times, probe, read_frames

sys.path.insert(0, str(Path(__file__).parent))
from video_zoo import (  # noqa: E402
    FLIP, H, MPEG, N, UNEVEN, VP9_10BIT, W, ZOO, build, copy, encode, number, numbers, picture, retag, x264, x265)

needs_decord = pytest.mark.skipif(decord_module() is None, reason="decord has no wheel here")
SAFE = [name for name, clip in ZOO.items() if clip.safe]
WRONG = [name for name, clip in ZOO.items() if clip.wrong]


@pytest.fixture(scope="session")
def zoo(tmp_path_factory): return build(tmp_path_factory.mktemp("zoo"))


def draws(n, count=5): return [np.random.default_rng(seed).integers(0, n, 20) for seed in range(count)]


def cut(source: Path, path: Path, share: float) -> Path:
    data = source.read_bytes()
    end = int(len(data) * share)
    if path.suffix == ".ts": end = end // 188 * 188 + 100     # not between two transport packets: nobody could tell
    path.write_bytes(data[:end])
    return path


def flip(source: Path, path: Path, packet=17, n=8, mask=0xFF) -> Path:
    "Damages n bytes in the middle of one packet."
    with av.open(str(source)) as c: p = [p for p in c.demux(c.streams.video[0]) if p.size][packet]
    data = bytearray(source.read_bytes())
    for k in range(p.pos + p.size // 2, p.pos + p.size // 2 + n): data[k] ^= mask
    path.write_bytes(data)
    return path


# ---------------------------------------------------------------- the frames that were asked for

@pytest.mark.parametrize("reader", ["auto", "pyav"])
@pytest.mark.parametrize("name", ZOO)
def test_every_frame_is_the_one_asked_for(zoo, name, reader):
    clip = ZOO[name]
    info, see = probe(zoo / name), lambda frames: numbers(frames[:, :, ::-1] if clip.mirror else frames)
    assert info.frames == len(clip.shown)
    everything = read_frames(zoo / name, range, reader)
    assert everything.shape == (info.frames, info.height, info.width, 3) and everything.dtype == np.uint8
    assert see(everything) == list(clip.shown)
    for wanted in draws(info.frames, 2):
        assert np.array_equal(read_frames(zoo / name, wanted, reader), everything[wanted])


@needs_decord
def test_decord_is_known_as_exact_for_the_safe_class_alone(zoo):
    assert [name for name in ZOO if probe(zoo / name).reader == "decord"] == SAFE


@pytest.mark.parametrize(("name", "why"), {
    "h264.avi": "avi", "h264.flv": "flv", "h264.ts": "mpegts", "hevc_closed.mp4": "hevc", "av1.mp4": "av1",
    "h264_10bit.mp4": "yuv420p10le", "odd.webm": "odd height", "mirrored.mp4": "turned", "interlaced.mp4": "interlaced",
    "trim_end.mp4": "edit list", "late.mkv": "not zero", "uneven.webm": "variable", "open.mkv": "no clean start",
    "refresh.mp4": "no clean start"}.items())
def test_the_reason_for_pyav_is_given(zoo, name, why): assert why in probe(zoo / name).why


@needs_decord
@pytest.mark.parametrize("name", SAFE)
def test_both_readers_return_equal_pixels(zoo, name):
    for wanted in draws(len(ZOO[name].shown)):
        assert np.array_equal(read_frames(zoo / name, wanted, "decord"), read_frames(zoo / name, wanted, "pyav"))


@pytest.mark.parametrize("name", SAFE)
def test_one_decode_is_enough(zoo, tmp_path, monkeypatch, name):
    "What decord reads rightly too is decoded once, by PyAV alone, and damage in it is seen all the same."
    passes, one = [], V._pass
    monkeypatch.setattr(V, "_pass", lambda *args, **how: passes.append(args) or one(*args, **how))
    monkeypatch.setattr(V, "_open_decord", lambda *args: pytest.fail("decord was asked"))
    for each in (None, lambda frame, at: number(frame)):
        passes.clear()
        read_frames(zoo / name, lambda n: [n - 1, 0, n // 3], each=each)
        assert len(passes) == 1
    if len(ZOO[name].shown) < N: return
    path = flip(zoo / name, tmp_path / name)
    with pytest.raises(C.CorruptVideo, match="frames are lost"): read_frames(path, [0])


@needs_decord
@pytest.mark.parametrize("name", WRONG)
def test_decord_alone_would_have_returned_other_frames(zoo, name):
    "When this fails, decord has been mended for this kind of file, and the safe class can grow."
    shown, right = ZOO[name].shown, []
    for wanted in draws(len(shown)):
        with pytest.warns(VideoWarning, match="decord may return other frames"):
            got = numbers(read_frames(zoo / name, wanted, "decord"))
        right.append(got == [shown[k] for k in wanted])
    with pytest.warns(VideoWarning): right.append(len(read_frames(zoo / name, range, "decord")) == len(shown))
    assert not all(right)


@needs_decord
@pytest.mark.parametrize("name", ["av1.mp4", "loop.gif"])
def test_decord_alone_would_have_refused(zoo, name):
    with pytest.warns(VideoWarning), pytest.raises(C.CorruptVideo, match="decord cannot read it"):
        read_frames(zoo / name, [0], "decord")


@needs_decord
def test_ten_bits_differ_in_decord(zoo):
    ours = read_frames(zoo / "h264_10bit.mp4", range)
    with pytest.warns(VideoWarning): theirs = read_frames(zoo / "h264_10bit.mp4", range, "decord")
    assert probe(zoo / "h264_10bit.mp4").bit_depth == 10
    assert numbers(theirs) == numbers(ours) and 0.1 < np.abs(ours.astype(int) - theirs).mean() < 3


@pytest.mark.parametrize(("name", "expected"), {
    "h264.mp4": (48, 24.0, W, H, 2.0, "h264", "yuv420p", 8), "hevc_10bit.mkv": (48, 24.0, W, H, 2.0, "hevc", "yuv420p10le", 10),
    "av1.webm": (48, 24.0, W, H, 2.0, "av1", "yuv420p", 8), "trim_both.mp4": (10, 24.0, W, H, 10 / 24, "h264", "yuv420p", 8),
    "loop.gif": (48, 24.0, W, H, 2.0, "gif", "bgra", 8), "odd.webm": (48, 24.0, 129, 97, 2.0, "vp9", "yuv420p", 8),
    "uneven.mp4": (48, 48 / 2.8, W, H, 2.8, "h264", "yuv420p", 8),
    "cut_mpeg2.ts": (36, 24.0, W, H, 1.5, "mpeg2video", "yuv420p", 8)}.items())
def test_probe(zoo, name, expected):
    i = probe(zoo / name)
    assert (i.frames, i.width, i.height, i.codec, i.pix_fmt, i.bit_depth) == (expected[0], *expected[2:4], *expected[5:])
    assert i.fps == pytest.approx(expected[1], rel=2e-3) and i.duration == pytest.approx(expected[4], abs=2e-3)


READ_PEAK = """
import re, sys
from qualivision.data.video import read_frames
taken = read_frames(sys.argv[1], range, sys.argv[2], **({"each": lambda frame, at: (at, float(frame.mean()))} if sys.argv[3] == "each" else {}))
print(len(taken), *re.findall(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read()))     # kB at the highest, of this process alone
"""


@pytest.mark.parametrize("reader", ["auto", "pyav", "decord"])
def test_each_is_given_every_frame_and_only_its_results_stay(zoo, reader):
    if reader == "decord" and decord_module() is None: pytest.skip("decord has no wheel here")
    for name in SAFE if reader == "decord" else ZOO:
        whole, n = read_frames(zoo / name, range, reader), len(ZOO[name].shown)
        wanted = [n - 1, *range(0, n, 3), 0, n - 1]
        taken = read_frames(zoo / name, wanted, reader, each=lambda frame, at: (at, frame, frame.flags.c_contiguous and frame.flags.writeable))
        assert [t[0] for t in taken] == list(range(len(wanted))) and all(t[2] for t in taken)
        assert np.array_equal(np.stack([t[1] for t in taken]), whole[wanted])
        assert len({id(t[1]) for t in taken}) == len(taken)         # nobody shares an array
        assert read_frames(zoo / name, [], reader, each=lambda frame, at: 1) == []


def test_an_error_in_each_is_its_own(zoo):
    def each(frame, at): raise RuntimeError("mine")
    for reader in ("auto", "pyav", *(["decord"] if decord_module() else [])):
        with pytest.raises(RuntimeError, match="mine"): read_frames(zoo / "h264.mp4", [3], reader, each=each)


def test_each_and_damage(zoo, tmp_path):
    path = flip(zoo / "h264.mp4", tmp_path / "a.mp4")
    with pytest.raises(C.CorruptVideo, match="frames are lost"): read_frames(path, [0], each=lambda frame, at: number(frame))
    with pytest.warns(VideoWarning): left = numbers(read_frames(path, range, damaged="warn"))
    with pytest.warns(VideoWarning): assert read_frames(path, range, damaged="warn", each=lambda frame, at: number(frame)) == left


@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells it on Linux alone")
def test_each_bounds_the_memory(tmp_path):
    scene = np.random.default_rng(0).integers(0, 256, (27, 48, 3), dtype=np.uint8).repeat(40, 0).repeat(40, 1)      # 6.2 MB a frame
    path = write_video(tmp_path / "a.mp4", np.stack([np.roll(scene, 8 * k, 1) for k in range(90)]), preset="ultrafast", crf=40)
    peak = {}
    for how in ("whole", "each"):
        out = subprocess.run([sys.executable, "-c", READ_PEAK, path, "auto", how], capture_output=True, text=True, timeout=300)
        assert out.returncode == 0, out.stderr
        frames, peak[how] = map(int, out.stdout.split())
        assert frames == 90
    assert peak["whole"] - peak["each"] > 60 * 6.2e3, peak                                                          # kB


@pytest.mark.parametrize("name", ZOO)
def test_times_are_those_of_the_frames(zoo, name):
    n, base = len(ZOO[name].shown), {"uneven": np.array(UNEVEN) / 600, "gaps": (np.arange(N) + 2 * (np.arange(N) > 9)) / 24,
                                     "skips": (np.arange(N) + np.arange(N) // 10) / 24}
    if name == "raw.h264":
        with pytest.warns(VideoWarning, match="have no times"): times = frame_times(zoo / name)
        assert np.allclose(times, np.arange(N) / probe(zoo / name).fps)
        return
    times, right = frame_times(zoo / name), base.get(name.split(".")[0], np.arange(N) / 24)[:n]
    assert times.shape == (n,) and times[0] == 0
    assert np.abs(times - right).max() < (0.011 if name == "loop.gif" else 0.002)      # containers round: GIF to 1/100 s
    steps = np.diff(times)
    if name.startswith("uneven"): assert steps.max() > 2 * steps.min()                # number / mean rate is wrong by 1.4 frames here


def test_times_of_what_is_left_of_a_damaged_file(zoo, tmp_path):
    path = flip(zoo / "uneven.mp4", tmp_path / "a.mp4")
    with pytest.raises(C.CorruptVideo): frame_times(path)
    with pytest.warns(VideoWarning): left = numbers(read_frames(path, range, damaged="warn"))
    with pytest.warns(VideoWarning): times = frame_times(path, damaged="warn")
    assert len(left) < N and np.allclose(times, np.array(UNEVEN)[left] / 600, atol=2e-3)


@pytest.mark.parametrize("turn", [90, 180, 270, "mirrored"])
def test_pictures_come_upright(tmp_path, turn):
    "A red corner, stored top left, ends where the display matrix sends it."
    s = 1 << 16
    matrix, corner = {90: ([0, -s, 0, s, 0, 0, 0, 0, 1 << 30], (-1, 0)), 180: ([-s, 0, 0, 0, -s, 0, 0, 0, 1 << 30], (-1, -1)),
                      270: ([0, s, 0, -s, 0, 0, 0, 0, 1 << 30], (0, -1)),
                      "mirrored": ([-s, 0, 0, 0, s, 0, 0, 0, 1 << 30], (0, -1))}[turn]
    stored = np.zeros((64, 96, 3), np.uint8)
    stored[:16, :16, 0] = 255
    with av.open(str(tmp_path / "a.mp4"), "w") as c:
        stream = c.add_stream("libx264", rate=24)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        stream.set_display_matrix(matrix)
        c.mux(stream.encode(av.VideoFrame.from_ndarray(stored, format="rgb24")))
        c.mux(stream.encode())
    frame, info = read_frames(tmp_path / "a.mp4", [0])[0], probe(tmp_path / "a.mp4")
    assert frame.shape[:2] == (info.height, info.width) == ((96, 64) if turn in (90, 270) else (64, 96))
    assert frame[corner][0] > 150 and (frame[..., 0] > 150).sum() == 256
    assert info.reader == "pyav"


@pytest.mark.parametrize("name", ["clip:12.mp4", "http:a.mp4", "-i.mp4", "a b%03d?.mp4", "видео.mp4", "clip.txt"])
def test_names_are_only_names(zoo, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    Path(name).write_bytes((zoo / ("open.mp4" if ":" in name else "h264.mp4")).read_bytes())
    assert numbers(read_frames(name, [40, 3])) == [40, 3]


def test_indices(zoo):
    seen = []
    frames = read_frames(zoo / "h264.mp4", lambda n: seen.append(n) or [n - 1, 0, 0])
    assert set(seen) == {N} and numbers(frames) == [N - 1, 0, 0]
    for reader in ("auto", "pyav"): assert read_frames(zoo / "h264.mp4", [], reader).shape == (0, H, W, 3)
    for wrong in ([N], [-1], [0.5], [[0]], 3, [True]):
        for reader in ("auto", "pyav"):
            with pytest.raises(C.VideoError): read_frames(zoo / "h264.mp4", wrong, reader)


@pytest.mark.parametrize("name", ["talk.mp4", "talk.mkv", "talk.mov"])
def test_sound_that_is_longer_than_the_pictures_is_no_damage(tmp_path, name):
    with av.open(str(tmp_path / name), "w") as c:
        a, v = c.add_stream("aac", rate=8000, layout="mono"), c.add_stream("libx264", rate=24)
        v.width, v.height, v.pix_fmt = W, H, "yuv420p"
        for k in range(24): c.mux(v.encode(av.VideoFrame.from_ndarray(picture(k), format="rgb24")))
        c.mux(v.encode())
        for k in range(30):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 8000, 1024 * k
            c.mux(a.encode(frame))
        c.mux(a.encode())
    assert probe(tmp_path / name).duration == pytest.approx(1, abs=2e-3)
    assert numbers(read_frames(tmp_path / name, range)) == list(range(24))


def test_a_picture_that_changes_its_size_is_refused(tmp_path):
    a = encode(tmp_path / "a.h264", "libx264", n=12, container="h264", options=x264())
    b = encode(tmp_path / "b.h264", "libx264", n=12, container="h264", size=(160, 96), options=x264())
    (tmp_path / "c.h264").write_bytes(a.read_bytes() + b.read_bytes())
    with pytest.raises(C.VideoError, match="changes its size at frame 12"): read_frames(tmp_path / "c.h264", [0])



# ---------------------------------------------------------------- colours and transparency

COLOURS = np.random.default_rng(3).integers(0, 256, (6, H // 8, W // 8, 3), dtype=np.uint8).repeat(8, 1).repeat(8, 2)
WEIGHTS = {1: (.2126, .0722), 2: (.299, .114), 3: (.299, .114), 4: (.30, .11), 5: (.299, .114), 6: (.299, .114), 7: (.212, .087), 9: (.2627, .0593)}


def by_the_standard(planes: np.ndarray, matrix: int, bits: int) -> np.ndarray:
    "(3,H,W) as stored, limited range -> (H,W,3) from 0 to 255, by the formulas of H.273."
    scale = 1 << bits - 8
    if matrix == 0: return planes[[2, 0, 1]].transpose(1, 2, 0) * (255 / ((1 << bits) - 1))       # green, blue, red
    y, b, r = (planes[0] / scale - 16) / 219, (planes[1] / scale - 128) / 224, (planes[2] / scale - 128) / 224
    if matrix == 8:
        b, r = b * 224 / 219, r * 224 / 219
        return 255 * np.stack([y - b + r, y + b, y - b - r], -1).clip(0, 1)
    kr, kb = WEIGHTS[matrix]
    red, blue = y + 2 * (1 - kr) * r, y + 2 * (1 - kb) * b
    return 255 * np.stack([red, (y - kr * red - kb * blue) / (1 - kr - kb), blue], -1).clip(0, 1)


@pytest.fixture(scope="module")
def lossless(tmp_path_factory):
    "The same colours as H.264 with 8 bits, as it is and turned, and as HEVC with 10; 4:4:4, nothing lost."
    folder = tmp_path_factory.mktemp("lossless")
    for name, codec, fmt, options, matrix in (("8", "libx264", "yuv444p", x264(":qp=0"), None), ("turned", "libx264", "yuv444p", x264(":qp=0"), FLIP),
                                              ("10", "libx265", "yuv444p10le", x265(":lossless=1"), None)):
        with av.open(str(folder / f"{name}.mp4"), "w") as c:
            s = c.add_stream(codec, rate=24, options={k: str(v) for k, v in options.items()})
            s.width, s.height, s.pix_fmt = W, H, fmt
            if matrix: s.set_display_matrix(matrix)
            for p in COLOURS: c.mux(s.encode(av.VideoFrame.from_ndarray(p, format="rgb24").reformat(format=fmt, threads=1)))
            c.mux(s.encode())
    return folder


def refilled(byte):
    "What the C library fills unused memory with, where it can: a buffer that nobody writes then shows."
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt: mallopt(-6, byte)                                                            # M_PERTURB; 0: not at all


@pytest.mark.parametrize(("source", "name"), [("8.mp4", "a.mp4"), ("turned.mp4", "b.mp4"), ("8.mp4", "c.avi"), ("8.mp4", "d.ts"),
                                              ("10.mp4", "e.mkv"), ("10.mp4", "f.ts"), ("10.mp4", "g.mp4")])
@pytest.mark.parametrize("matrix", range(18))
def test_every_colour_matrix_is_read_by_the_standard_or_refused(lossless, tmp_path, source, name, matrix):
    path, bits = retag(lossless / source, tmp_path / name, matrix), 10 if source == "10.mp4" else 8
    if matrix >= 10:
        for act in (lambda: probe(path), lambda: read_frames(path, [0]), lambda: read_frames(path, [0], damaged="warn"), lambda: frame_times(path)):
            with pytest.raises(C.VideoError, match=rf"colour matrix {matrix} \("): act()
        return
    with av.open(str(lossless / source)) as c: stored = [colour._planes(f) for f in c.decode(video=0)]
    right, got = np.stack([by_the_standard(p, matrix, bits) for p in stored]), []
    if source == "turned.mp4": right = right[:, :, ::-1]
    for fill in (1, 254):
        refilled(fill)
        try: got += [read_frames(path, range), read_frames(path, range, "pyav"), np.stack(read_frames(path, range, each=lambda frame, at: frame))]
        finally: refilled(0)
    assert all(np.array_equal(got[0], g) for g in got[1:])
    assert np.abs(got[0] - right).max() <= 2


@needs_decord
@pytest.mark.parametrize("matrix", range(10))
def test_both_readers_agree_on_every_colour_matrix_or_auto_avoids_decord(tmp_path, matrix):
    plain = encode(tmp_path / "a.mp4", "libx264", n=6, options=x264())
    path = retag(plain, tmp_path / "b.mp4", matrix)
    if probe(path).reader == "decord": assert np.array_equal(read_frames(path, range, "decord"), read_frames(path, range, "pyav"))
    else:
        with pytest.warns(VideoWarning, match="YCgCo"): theirs = read_frames(path, range, "decord")
        assert np.abs(theirs.astype(int) - read_frames(path, range)).mean() > 5
    assert (probe(path).reader == "pyav") == (matrix == 8)


def test_a_conversion_that_fails_is_an_error_and_no_picture(zoo, monkeypatch):
    "Whatever the reason, from whichever frame on: the pass must not take it for damage, nor hand on memory that nobody filled."
    class Fails:
        calls = 0
        def __init__(self): self.real = av.video.reformatter.VideoReformatter()
        def reformat(self, *args, **kwargs):
            Fails.calls += 1
            if Fails.calls % 7 == 0: raise av.error.OSError(95, "Operation not supported")
            return self.real.reformat(*args, **kwargs)
    monkeypatch.setattr(colour, "VideoReformatter", Fails)
    for name in ("hevc.mp4", "cut_hevc.mkv"):
        for damaged in ("error", "warn"):
            with pytest.raises(C.VideoError, match="cannot be turned into RGB"): read_frames(zoo / name, range, damaged=damaged)


def test_a_frame_that_was_counted_and_does_not_come_is_an_error(zoo, monkeypatch):
    real = V._pass
    def fewer(path, look, shelf=None, *args, **kwargs):
        if shelf is not None: shelf.places.pop(5)                                            # as if it had not come
        result = real(path, look, shelf, *args, **kwargs)
        if shelf is not None: shelf.places[5] = [5]
        return result
    monkeypatch.setattr(V, "_pass", fewer)
    for each in (None, lambda frame, at: at):
        with pytest.raises(C.CorruptVideo, match="frame 5 was counted, and did not come"): read_frames(zoo / "hevc.mp4", range, each=each)


def see_through(k: int, hidden: int) -> np.ndarray:
    "(96,128,4): picture k above; below, transparent from left to right, over a hidden colour where nothing can be seen."
    out = np.concatenate([picture(k), np.full((H, W, 1), 255, np.uint8)], -1)
    out[64:, :, 3] = np.linspace(0, 255, W).astype(np.uint8)
    out[64:, :, :3] = np.where(out[64:, :, 3:] == 0, hidden, 100)
    return out


@pytest.mark.parametrize(("name", "codec", "fmt"), [
    ("a.mov", "prores_ks", "yuva444p10le"), ("b.mov", "qtrle", "argb"), ("c.mkv", "ffv1", "bgra"), ("d.png", "apng", "rgba"),
    ("e.webm", "libvpx-vp9", "yuva420p"), ("f.webm", "libvpx", "yuva420p"), ("g.mov", "png", "rgba"), ("h.webp", "", "")])
def test_transparent_pixels_are_seen_on_white(tmp_path, name, codec, fmt):
    seen = []
    for hidden in (0, 255):
        path, frames = tmp_path / f"{hidden}{name}", [see_through(k, hidden) for k in range(6)]
        if not codec:
            from PIL import Image
            first, *rest = map(Image.fromarray, frames)
            first.save(path, save_all=True, append_images=rest, duration=40, lossless=True, exact=True)
        else:
            options = {"auto-alt-ref": "0", "crf": "4", "b": "4000000"} if "vpx" in codec else {}
            with av.open(str(path), "w", format="apng" if codec == "apng" else None) as c:
                s = c.add_stream(codec, rate=24, options=options)
                s.width, s.height, s.pix_fmt = W, H, fmt
                for f in frames: c.mux(s.encode(av.VideoFrame.from_ndarray(f, format="rgba").reformat(format=fmt, threads=1)))
                c.mux(s.encode())
        seen.append(read_frames(path, range))
        assert numbers(seen[-1]) == list(range(6)) and probe(path).reader != "decord"
    right = colour.over_background(np.stack([see_through(k, 0) for k in range(6)]))[:, 66:, 2:]
    rough = 40 if "420" in fmt else 4                                                       # lossy codecs blur colours over the rim
    for frames in seen: assert np.abs(frames[:, 66:, 8:].astype(int) - right[:, :, 6:]).max() <= rough, name
    for frames in seen: assert (frames[:, 68:, 0] >= 250).all()                              # nothing of the hidden colour


def test_transparency_of_a_gif_is_white_and_of_raw_avi_none(tmp_path):
    from PIL import Image
    frames = [Image.fromarray(see_through(k, 0)) for k in range(4)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:], duration=40)
    gif = read_frames(tmp_path / "a.gif", range)
    assert (gif[:, 66:, 0] == 255).all() and numbers(gif) == [0, 1, 2, 3]
    empty = np.concatenate([picture(3), np.zeros((H, W, 1), np.uint8)], -1)                  # as screen recorders write it
    with av.open(str(tmp_path / "a.avi"), "w") as c:
        s = c.add_stream("rawvideo", rate=24)
        s.width, s.height, s.pix_fmt = W, H, "bgra"
        for _ in range(3): c.mux(s.encode(av.VideoFrame.from_ndarray(empty, format="rgba").reformat(format="bgra", threads=1)))
        c.mux(s.encode())
    assert np.array_equal(read_frames(tmp_path / "a.avi", range), np.stack([picture(3)] * 3))


# ---------------------------------------------------------------- animations under the names of pictures

@pytest.mark.parametrize("name", ["a.png", "a.webp", "a.jpg", "a.mp4"])
def test_an_animation_is_a_video_whatever_its_name(tmp_path, name):
    from PIL import Image
    first, *rest = [Image.fromarray(picture(k)) for k in range(8)]
    for kind in ("PNG", "WEBP"):
        path = tmp_path / name
        first.save(path, kind, save_all=True, append_images=rest, duration=[40, 40, 80, 40, 40, 40, 40, 40], lossless=True)
        assert C.is_animation(path) and np.array_equal(read_frames(path, range), np.stack([picture(k) for k in range(8)]))
        assert np.allclose(frame_times(path), [0, .04, .08, .16, .2, .24, .28, .32], atol=1e-3) and probe(path).frames == 8
        assert read_frames(path, [7, 2], each=lambda frame, at: (number(frame), at)) == [(7, 0), (2, 1)]
        first.save(path, kind)
        assert not C.is_animation(path)
        with pytest.raises(C.NotAVideo, match="still picture"): read_frames(path, [0])


PROFILE = """
import gc, sys
from qualivision.data.video import read_frames
frames = read_frames(sys.argv[1], range)
gc.collect()
print(len(frames), "frames")
"""


def test_a_png_says_late_that_it_is_animated(tmp_path):
    "Colour profiles and texts may stand before the mark; they are stepped over."
    from PIL import Image, PngImagePlugin
    first, *rest = [Image.fromarray(picture(k)) for k in range(3)]
    first.save(tmp_path / "a.png", save_all=True, append_images=rest, duration=40, icc_profile=np.random.default_rng(0).bytes(5000))
    assert C.is_animation(tmp_path / "a.png")
    out = subprocess.run([sys.executable, "-c", PROFILE, tmp_path / "a.png"], capture_output=True, text=True, timeout=300)
    assert (out.returncode, out.stdout) == (0, "3 frames\n"), out.stderr                      # PyAV frees the name of a profile twice
    text = PngImagePlugin.PngInfo()
    text.add_text("note", "acTL")
    first.save(tmp_path / "b.png", pnginfo=text)
    assert not C.is_animation(tmp_path / "b.png")


def test_a_damaged_webp_is_an_error(tmp_path):
    from PIL import Image
    first, *rest = [Image.fromarray(np.random.default_rng(k).integers(0, 256, (H, W, 3), dtype=np.uint8)) for k in range(8)]
    first.save(tmp_path / "a.webp", save_all=True, append_images=rest, duration=40)
    data = bytearray((tmp_path / "a.webp").read_bytes())
    (tmp_path / "cut.webp").write_bytes(data[:len(data) // 2])
    with pytest.raises(C.TruncatedVideo, match="cut off"): read_frames(tmp_path / "cut.webp", [0])
    at = data.index(b"VP8 ", data.index(b"VP8 ", len(data) // 2) + 4)
    data[at + 8:at + 18] = bytes(10)                                                         # the head of one picture
    (tmp_path / "hurt.webp").write_bytes(data)
    with pytest.raises(C.CorruptVideo): read_frames(tmp_path / "hurt.webp", [0])


# ---------------------------------------------------------------- decoders that cannot

def test_vp9_with_ten_bits_is_read(tmp_path):
    (tmp_path / "a.webm").write_bytes(VP9_10BIT)
    assert not L._able("libvpx-vp9", "yuv420p10le") and probe(tmp_path / "a.webm").bit_depth == 10
    for reader in ("auto", "pyav"): assert numbers(read_frames(tmp_path / "a.webm", range, reader)) == [0, 1, 2, 3]


def test_a_decoder_that_refuses_everything_is_checked_against_the_other(zoo, tmp_path, monkeypatch):
    (tmp_path / "a.webm").write_bytes(VP9_10BIT)
    monkeypatch.setattr(L, "_able", lambda name, pix_fmt: True)                              # a list that claims too much
    assert numbers(read_frames(tmp_path / "a.webm", range)) == [0, 1, 2, 3] and len(frame_times(tmp_path / "a.webm")) == 4


def test_damage_to_the_only_clean_start_is_no_refusal(tmp_path):
    "FFmpeg's own VP9 decoder would read on without a word."
    path = encode(tmp_path / "a.webm", "libvpx-vp9", n=12, options={"deadline": "realtime", "cpu-used": 8, "crf": 20, "b": 0, "g": 99})
    hurt = flip(path, tmp_path / "b.webm", packet=0, n=8)
    with pytest.raises(C.CorruptVideo, match="12 of 12 frames are lost"): read_frames(hurt, [0])


# ---------------------------------------------------------------- joined streams, and cuts in open groups

@pytest.mark.parametrize("name", ["h264.ts", "hevc.ts", "mpeg2.ts", "mpeg2.mpg"])
def test_joined_streams_are_whole(zoo, tmp_path, name):
    "cat a.ts a.ts a.ts"
    path = tmp_path / name
    path.write_bytes((zoo / name).read_bytes() * 3)
    assert probe(path).frames == 3 * N
    for reader in ("auto", "pyav"):
        frames = read_frames(path, range, reader)
        assert numbers(frames) == [*range(N)] * 3
        assert np.array_equal(frames[:N], read_frames(zoo / name, range)) and np.array_equal(frames[:N], frames[N:2 * N])
    assert np.allclose(frame_times(path), np.arange(3 * N) / 24, atol=2e-3)                  # the clock goes on


def test_streams_whose_clock_goes_on_are_joined_too(zoo, tmp_path):
    "As the pieces of a stream are downloaded: each counts its packets anew, and keeps the time."
    pieces = []
    for k in range(4):
        with av.open(str(zoo / "h264.mp4")) as a, av.open(str(tmp_path / f"{k}.ts"), "w", options={"avoid_negative_ts": "disabled"}) as b:
            s = a.streams.video[0]
            t = b.add_stream_from_template(s)
            packets = [p for p in a.demux(s) if p.size]
            keys = [i for i, p in enumerate(packets) if p.is_keyframe] + [len(packets)]
            for p in packets[keys[k]:keys[k + 1]]:
                p.stream = t
                b.mux(p)
        pieces.append((tmp_path / f"{k}.ts").read_bytes())
    (tmp_path / "a.ts").write_bytes(b"".join(pieces))
    assert numbers(read_frames(tmp_path / "a.ts", range)) == [*range(N)]
    assert np.allclose(frame_times(tmp_path / "a.ts"), np.arange(N) / 24, atol=2e-3)


def video_rows(data: bytes) -> list[int]:
    "Where the transport packets of the pictures are; PyAV's muxer numbers them 256."
    return [k for k in range(len(data) // 188) if data[188 * k + 1] & 31 == 1 and data[188 * k + 2] == 0]


@pytest.mark.parametrize("name", ["h264.ts", "hevc.ts", "mpeg2.ts"])
@pytest.mark.parametrize("copies", [1, 2])
def test_a_hole_in_a_transport_stream_is_no_joint(zoo, tmp_path, name, copies):
    "Packets are missing, from within a picture or between two, in one stream or in two that were joined."
    data, rng = (zoo / name).read_bytes() * copies, np.random.default_rng(0)
    rows = video_rows(data)
    begins = [i for i, k in enumerate(rows) if data[188 * k + 1] & 64]
    holes = [(i, i + int(n)) for i, n in zip(rng.integers(begins[13], begins[40], 8), rng.integers(1, 15, 8))]
    holes += [(begins[j], begins[j + 3]) for j in (14, 20, 31)]
    for a, b in holes:
        if (b - a) % 16 == 0: continue                                                       # the count comes round: nothing shows
        gone = set(rows[a:b])
        path = tmp_path / name
        path.write_bytes(b"".join(data[188 * k:188 * k + 188] for k in range(len(data) // 188) if k not in gone))
        with pytest.raises(C.CorruptVideo, match="lost"): read_frames(path, [0])


def test_what_a_cut_in_an_open_group_leaves_behind_is_not_lost(zoo, tmp_path):
    "Copied from a key frame that becomes the time zero: what is shown before it has no time in Matroska, and nothing to lean on."
    path = copy(zoo / "hevc_hash.mp4", tmp_path / "a.mkv", key=1, zero=12)
    with av.open(str(path)) as c: assert [p.pts for p in c.demux(video=0) if p.size][:4] == [0, None, None, None]
    for reader in ("auto", "pyav"): assert numbers(read_frames(path, range, reader)) == [*range(12, N)]
    assert probe(path).frames == N - 12 and np.allclose(frame_times(path), np.arange(N - 12) / 24, atol=2e-3)
    with pytest.raises(C.CorruptVideo): read_frames(flip(path, tmp_path / "b.mkv", packet=20), [0])
    with av.open(str(path)) as a, av.open(str(tmp_path / "c.mkv"), "w") as b:               # a hole further on is a loss
        s = a.streams.video[0]
        t = b.add_stream_from_template(s)
        for k, p in enumerate(p for p in a.demux(s) if p.size):
            if p.pts is None: continue
            p.stream = t
            if k != 16: b.mux(p)
    with pytest.raises(C.CorruptVideo): read_frames(tmp_path / "c.mkv", [0])


# ---------------------------------------------------------------- endings

@pytest.mark.parametrize("name", ["a.m2v", "a.vob", "a.asf", "a.mxf", "a.h264", "a.3g2", "a.f4v", "a.apng", "a.m4v", "a.ogv", "a.mts", "a.nut",
                                  "a.ivf"])
def test_endings(tmp_path, name):
    codec, fmt, options, container = {
        "m2v": ("mpeg2video", "yuv420p", MPEG, "mpeg2video"), "vob": ("mpeg2video", "yuv420p", MPEG, "vob"), "asf": ("wmv2", "yuv420p", None, None),
        "mxf": ("mpeg2video", "yuv420p", MPEG, "mxf"), "apng": ("apng", "rgb24", None, "apng"), "ogv": ("libtheora", "yuv420p", None, None),
        "mts": ("libx264", "yuv420p", x264(), "mpegts"), "ivf": ("libvpx-vp9", "yuv420p", None, None),
        "f4v": ("libx264", "yuv420p", x264(), "f4v")}.get(name[2:], ("libx264", "yuv420p", x264(), None))
    if codec not in av.codecs_available: pytest.skip(f"no {codec} here to write it")
    path = encode(tmp_path / name, codec, n=24, fmt=fmt, options=options, container=container, rate=24 if name != "a.mxf" else 25)
    assert numbers(read_frames(path, range)) == [*range(24)] and probe(path).frames == 24


# ---------------------------------------------------------------- what is no video

def sound(path):
    with av.open(str(path), "w") as c:
        s = c.add_stream({".mp4": "aac", ".wav": "pcm_s16le"}[path.suffix], rate=44100, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32 if path.suffix == ".mp4" else np.int16),
                                           format="fltp" if path.suffix == ".mp4" else "s16", layout="mono")
        frame.sample_rate = 44100
        c.mux(s.encode(frame))
        c.mux(s.encode())


def pixmap(path): path.write_bytes(b"P6 96 64 255\n" + bytes(96 * 64 * 3))
def still(path): av.VideoFrame.from_ndarray(picture(3), format="rgb24").save(path)
def noise(path): path.write_bytes(np.random.default_rng(0).integers(0, 256, 60000, dtype=np.uint8).tobytes())


@pytest.mark.parametrize("reader", ["auto", "pyav", "decord"])
@pytest.mark.parametrize(("name", "make", "error", "cause"), [
    ("none.mp4", lambda p: None, "MissingVideo", "no such file"),
    ("folder.mp4", lambda p: p.mkdir(), "NotAVideo", "a folder"),
    ("empty.mp4", lambda p: p.touch(), "EmptyVideo", "no bytes"),
    ("text.mp4", lambda p: p.write_text("A boat on a lake.\n" * 50), "NotAVideo", "text"),
    ("short.mp4", lambda p: p.write_text("x"), "NotAVideo", "text"),
    ("page.mp4", lambda p: p.write_text("<!DOCTYPE html><title>404 – página</title>"), "NotAVideo", "text"),
    ("list.mp4", lambda p: p.write_text("ffconcat version 1.0\nfile h264.mp4\n"), "NotAVideo", "playlist"),
    ("list.m3u8", lambda p: p.write_text("#EXTM3U\n#EXTINF:2,\nh264.mp4\n#EXT-X-ENDLIST\n"), "NotAVideo", "playlist"),
    ("noise.mp4", noise, "NotAVideo", "no video format"),
    ("zeros.mp4", lambda p: p.write_bytes(bytes(9000)), "NotAVideo", "no video format"),
    ("still.png", still, "NotAVideo", "still picture"),
    ("still.jfif", lambda p: p.write_bytes(b"\xff\xd8\xff\xe0\0\x10JFIF\0" + bytes(90)), "NotAVideo", "still picture .JPEG."),
    ("pointer.mp4", lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n"), "NotAVideo", "Git LFS"),
    ("still.mp4", still, "NotAVideo", "still picture"),
    ("still.ppm", pixmap, "NotAVideo", "still picture"),
    ("sound.mp4", sound, "NoVideoStream", "audio"),
    ("sound.wav", sound, "NoVideoStream", "audio")])
def test_typed_errors(zoo, tmp_path, name, make, error, cause, reader):
    if reader == "decord" and decord_module() is None: pytest.skip("decord has no wheel here")
    path = tmp_path / name
    if make is still and name.endswith("mp4"):
        still(tmp_path / "a.png")
        (tmp_path / "a.png").rename(path)
    else: make(path)
    for act in (lambda: probe(path), lambda: read_frames(path, [0], reader), lambda: read_frames(path, [0], reader, "warn")):
        with pytest.raises(C.VideoError, match=cause) as e: act()
        assert type(e.value).__name__ == error and e.value.what == str(path) and e.value.remedy


def test_cover_art_is_no_video(tmp_path):
    still(tmp_path / "cover.png")
    with av.open(str(tmp_path / "song.mp4"), "w") as c:
        a, v = c.add_stream("aac", rate=44100, layout="mono"), c.add_stream("png", rate=1)
        v.width, v.height, v.pix_fmt, v.disposition = W, H, "rgb24", av.stream.Disposition.attached_pic
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 44100
        c.mux(v.encode(av.VideoFrame.from_ndarray(picture(0), format="rgb24")))
        c.mux(v.encode())
        c.mux(a.encode(frame))
        c.mux(a.encode())
    with av.open(str(tmp_path / "song.mp4")) as c: assert len(c.streams.video) == 1
    with pytest.raises(C.NoVideoStream, match="it holds audio, a cover picture and no video"): read_frames(tmp_path / "song.mp4", [0])


@pytest.mark.parametrize(("name", "error", "cause"), [
    ("https://example.org/a.mp4", "MissingVideo", "https://example.org/a.mp4: it is an address"), ("s3://bucket/a.mp4", "MissingVideo", "an address"),
    ("", "MissingVideo", "the path is empty"), ("link.mp4", "MissingVideo", "a link to gone.mp4, which is not there"),
    ("pipe.mp4", "NotAVideo", "a pipe"), ("/dev/null", "NotAVideo", "a device"), ("a" * 300 + ".mp4", "VideoError", "cannot be opened"),
    ("a\0.mp4", "VideoError", "cannot be opened"), ("a.mp4/b.mp4", "MissingVideo", "no such file")])
def test_what_is_no_file_is_said_to_be_what_it_is(zoo, tmp_path, monkeypatch, name, error, cause):
    "None of these may be waited for, either."
    if os.name != "posix" and name in ("pipe.mp4", "/dev/null", "link.mp4"): pytest.skip("no such things here")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.mp4").write_bytes((zoo / "h264.mp4").read_bytes())
    if name == "pipe.mp4": os.mkfifo(name)
    if name == "link.mp4": os.symlink("gone.mp4", name)
    for act in (probe, lambda path: read_frames(path, [0]), frame_times):
        with pytest.raises(C.VideoError, match=cause) as e: act(name)
        assert type(e.value).__name__ == error and e.value.remedy


@pytest.mark.skipif(os.name != "posix", reason="names are bytes on POSIX")
@pytest.mark.parametrize("reader", ["auto", "pyav", "decord"])
def test_a_name_that_is_not_utf8(zoo, tmp_path, reader):
    path = os.path.join(tmp_path, os.fsdecode(b"caf\xe9.mp4"))
    try: Path(path).write_bytes((zoo / "h264.mp4").read_bytes())
    except OSError: pytest.skip("this file system wants UTF-8")
    if reader != "decord": assert numbers(read_frames(path, [40, 3], reader)) == [40, 3] and probe(path).reader == "pyav"
    elif decord_module() is not None:
        with pytest.warns(VideoWarning, match="not UTF-8"), pytest.raises(C.ReaderUnavailable, match="not UTF-8"): read_frames(path, [0], reader)


# ---------------------------------------------------------------- damaged files

@pytest.mark.parametrize("name", ["h264.mp4", "h264.mov", "hevc.mp4", "vp9.mp4", "av1.mp4"])
@pytest.mark.parametrize("share", [0.05, 0.5, 0.95])
def test_without_its_index_an_mp4_is_gone(zoo, tmp_path, name, share):
    path = cut(zoo / name, tmp_path / name, share)
    for damaged in ("error", "warn"):
        with pytest.raises(C.TruncatedVideo, match="should have at least|index"): read_frames(path, [0], damaged=damaged)


@pytest.mark.parametrize("reader", ["auto", "pyav"])
@pytest.mark.parametrize("share", [0.5, 0.75, 0.97])
@pytest.mark.parametrize("name", ["faststart.mp4", "fragments.mp4", "h264.mkv", "open.mkv", "vp9.webm", "av1.webm", "mpeg4.avi",
                                  "h264.flv", "h264.ts", "loop.gif", "loop.png"])
def test_a_cut_file_is_an_error_and_on_request_a_warning(zoo, tmp_path, name, share, reader):
    path = cut(zoo / name, tmp_path / name, share)
    with pytest.raises(C.TruncatedVideo, match="cut off"): read_frames(path, [0], reader)
    with pytest.raises(C.TruncatedVideo, match="cut off"): probe(path)
    with pytest.warns(VideoWarning, match="lost") as seen: frames = read_frames(path, range, reader, damaged="warn")
    left, lost = len(frames), seen[0].message.lost
    assert 0 < left <= N and len(seen) == 1
    if name == "fragments.mp4": assert lost > 0                   # whole fragments that are gone are not promised anywhere
    elif name in ("h264.ts", "loop.gif", "loop.png"): assert lost is None
    else: assert left + lost == N
    whole = read_frames(zoo / name, range)
    if name != "h264.ts": assert all(np.array_equal(f, whole[number(f)]) for f in frames)
    assert numbers(frames[:-4]) == list(range(left - 4))      # among the last ones some may miss: coded later


@pytest.mark.parametrize("reader", ["auto", "pyav"])
@pytest.mark.parametrize("name", ["h264.mp4", "h264.mkv", "h264_444.mp4", "open.mp4", "vp9.webm", "vp9.mp4", "av1.mp4", "mpeg4.mp4",
                                  "hevc_hash.mp4", "loop.png", "h264.ts"])
def test_a_damaged_packet_is_an_error_and_on_request_a_warning(zoo, tmp_path, name, reader):
    path = flip(zoo / name, tmp_path / name) if name != "h264.ts" else tmp_path / name
    if name == "h264.ts":
        data = bytearray((zoo / name).read_bytes())
        for k in range(40 * 188 + 20, 44 * 188 + 20): data[k] ^= 0xFF
        path.write_bytes(data)
    with pytest.raises(C.CorruptVideo, match="frames are lost"): read_frames(path, [0], reader)
    with pytest.warns(VideoWarning) as seen: frames = read_frames(path, range, reader, damaged="warn")
    lost = seen[0].message.lost
    whole = read_frames(zoo / name, range)
    assert 1 <= lost < N and len(seen) == 1 and (name == "h264.ts" or len(frames) + lost == N)
    assert numbers(frames) == sorted(set(numbers(frames)))
    assert all(np.array_equal(f, whole[number(f)]) for f in frames)            # nothing spoiled comes back
    with pytest.warns(VideoWarning): again = read_frames(path, range, reader, damaged="warn")
    assert np.array_equal(frames, again)


@pytest.mark.parametrize("name", ["mpeg4.mp4", "mpeg4.avi", "h264.mp4", "hevc_hash.mp4", "av1.mp4", "vp9.webm"])
def test_damage_is_found_every_time(zoo, tmp_path, name):
    "MPEG-4 was not, on several threads: now and then, and more often in a process that had done much before."
    path = flip(zoo / name, tmp_path / name)
    look, found = look_at(path), set()
    for _ in range(25):
        times, lost, spoiled = V._count(path, look)
        found.add((len(times), lost, spoiled))
        V._pass(zoo / "h264.mp4", look_at(zoo / "h264.mp4"))                  # other memory comes and goes
    assert len(found) == 1 and found.pop()[1] > 0


@pytest.mark.parametrize("name", ["h264.mp4", "open.mkv", "hevc_hash.mp4", "loop.png"])
def test_one_flipped_bit_never_changes_a_frame_unseen(zoo, tmp_path, name):
    "Where the format lets a decoder notice: H.264 by its entropy code, HEVC by hashes that the encoder wrote, PNG by checksums."
    whole, noticed = read_frames(zoo / name, range), 0
    for packet in range(1, N, 5):
        try: assert np.array_equal(read_frames(flip(zoo / name, tmp_path / name, packet, 1, 1 << packet % 8), range), whole)
        except C.CorruptVideo: noticed += 1
    assert noticed >= 5


@needs_decord
def test_decord_alone_says_nothing_about_damage(zoo, tmp_path):
    path = flip(zoo / "vp9.webm", tmp_path / "a.webm")
    assert probe(path).reader == "decord"
    frames = read_frames(path, range, "decord")
    assert len(frames) == N and not np.array_equal(frames, read_frames(zoo / "vp9.webm", range))
    with pytest.raises(C.CorruptVideo): read_frames(path, range)


def test_a_cut_in_front_is_no_damage_but_a_hole_is(zoo, tmp_path):
    "Leading pictures of a stream that starts inside a group are not lost; a missing packet later is."
    path = copy(zoo / "open.mkv", tmp_path / "a.mkv", key=1)
    assert read_frames(path, range).shape[0] == N - 12
    refresh = read_frames(copy(zoo / "refresh.mkv", tmp_path / "c.mkv", key=1), range)   # the picture builds up, then it is whole
    assert N // 2 < len(refresh) < N - 12 and numbers(refresh) == list(range(N - len(refresh), N))
    with pytest.raises(C.CorruptVideo): read_frames(flip(path, tmp_path / "b.mkv", packet=20), [0])


def test_a_raw_stream_that_was_cut_lacks_frames(zoo, tmp_path):
    "It has no times and no length: only the pictures that wait for lost ones are missed."
    path = cut(zoo / "raw.h264", tmp_path / "a.h264", 0.6)
    with pytest.raises(C.CorruptVideo, match="lost"): read_frames(path, [0])
    with pytest.warns(VideoWarning) as seen: frames = read_frames(path, range, damaged="warn")
    assert numbers(frames) == sorted(set(numbers(frames))) and len(frames) + seen[0].message.lost == probe(path).frames


# ---------------------------------------------------------------- readers

BLOCKED = """
import sys; sys.modules["decord"] = None
from qualivision.data import video as V
path = sys.argv[1]
info = V.probe(path)
assert (info.reader, info.why) == ("pyav", "decord is not installed"), info
for reader in ("decord", "decord-gpu"):
    try: V.read_frames(path, [0], reader)
    except V.ReaderUnavailable as e: assert "pip install decord" in str(e)
    else: raise AssertionError("no error")
print(int(V.read_frames(path, [5, 40]).sum()))
"""


def test_everything_works_without_decord(zoo):
    out = subprocess.run([sys.executable, "-c", BLOCKED, zoo / "h264.mp4"], capture_output=True, text=True, timeout=300)
    assert out.returncode == 0, out.stderr
    assert int(out.stdout) == int(read_frames(zoo / "h264.mp4", [5, 40]).sum())


@needs_decord
def test_gpu_decoding_says_when_it_is_not_built_in(zoo):
    try: frames = read_frames(zoo / "h264.mp4", [5], "decord-gpu")
    except C.ReaderUnavailable as e: assert "GPU" in e.cause and e.remedy
    else: assert number(frames[0]) == 5


def test_auto_decodes_once_and_with_pyav(zoo, monkeypatch):
    "Also what decord reads exactly: a strict decode before decord's would take as long as reading."
    def fail(*args, **kwargs): raise AssertionError("a second look at the frames")
    monkeypatch.setattr(V, "_by_decord", fail)
    monkeypatch.setattr(V, "_count", fail)
    for name in ("h264.mp4", "hevc.mp4"): assert numbers(read_frames(zoo / name, [7, 30])) == [7, 30]


def test_wrong_options_are_named(zoo):
    with pytest.raises(C.VideoError, match="no reader 'opencv'"): read_frames(zoo / "h264.mp4", [0], "opencv")
    with pytest.raises(C.VideoError, match="damaged='ignore'"): read_frames(zoo / "h264.mp4", [0], damaged="ignore")


def _in_worker(path): return numbers(read_frames(path, [30, 2]))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_readers_work_in_worker_processes(zoo, method):
    if method not in multiprocessing.get_all_start_methods(): pytest.skip(f"no {method} here")
    read_frames(zoo / "h264.mp4", [0])                             # decord has been used in the parent
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)        # forking a process that has threads
        with multiprocessing.get_context(method).Pool(2) as pool:
            assert pool.map_async(_in_worker, [zoo / "h264.mp4", zoo / "hevc.mp4"]).get(300) == [[30, 2]] * 2


HEADERS = """
import sys, warnings
from pathlib import Path
import numpy as np
from qualivision.data.video import VideoError, read_frames
warnings.simplefilter("ignore")
folder = Path(sys.argv[1])
for k in range(140):
    r, name = np.random.default_rng(k), ("h264.mp4", "h264.mkv", "vp9.webm", "faststart.mp4")[k % 4]
    data = bytearray((folder / name).read_bytes())
    start = max(0, data.find(b"moov"))
    for _ in range(1 + k // 4 % 3):
        at = start + int(r.integers(0, 1200 if start else 600))
        data[at:at + 4] = [b"\\xff\\xff\\xff\\xff", b"\\x7f\\xff\\xff\\xff", r.bytes(4)][int(r.integers(3))]
    path = folder / f"header_{name}"
    path.write_bytes(data)
    try: read_frames(path, lambda n: range(0, min(n, 100), 9))
    except VideoError: pass
print("alive")
"""


def test_absurd_headers_end_in_typed_errors(zoo):
    "In a process of its own: one that aborts or hangs cannot take the others along."
    out = subprocess.run([sys.executable, "-c", HEADERS, zoo], capture_output=True, text=True, timeout=300)
    assert out.returncode == 0 and "alive" in out.stdout, out.stderr[-2000:]


# ---------------------------------------------------------------- the writer

@pytest.mark.parametrize("name", ["a.mp4", "b.mkv", "c.webm", "d.gif", "e.avi", "f:g.mp4"])
def test_the_writer_is_deterministic_and_readable(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    frames = np.stack([picture(k) for k in range(30)])
    codec = {"c.webm": "libvpx-vp9", "d.gif": "gif"}.get(name, "libx264")
    fmt = {"d.gif": "rgb8"}.get(name, "yuv420p")
    write_video(name, frames, fps=12.5, codec=codec, pix_fmt=fmt)
    first = Path(name).read_bytes()
    assert write_video(name, frames, fps=12.5, codec=codec, pix_fmt=fmt) == Path(name) and Path(name).read_bytes() == first
    assert numbers(read_frames(name, range)) == list(range(30)) and probe(name).fps == pytest.approx(12.5, rel=1e-2)


@pytest.mark.parametrize(("height", "width", "options"), [(256, 400, {"crf": 23}), (252, 392, {}), (144, 144, {"bf": 0, "crf": 23}),
                                                          (101, 143, {"pix_fmt": "yuv444p"}), (144, 144, {"codec": "libx265"})])
def test_the_writer_reads_no_memory_that_nobody_filled(tmp_path, height, width, options):
    "Five writes in one process. Where the C library can, it fills free memory differently before each: x264's macroblock tree read it."
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    rng = np.random.default_rng(0)
    scene = np.kron(rng.integers(0, 256, (60, 80, 3)), np.ones((8, 8, 1)))
    frames = np.stack([np.roll(scene, (3 * k, 5 * k), (0, 1))[:height, :width] for k in range(24)])
    frames, made = (frames + rng.normal(0, 4, frames.shape)).clip(0, 255).astype(np.uint8), []
    try:
        for fill in (0, 1, 64, 254, 0):
            if mallopt: mallopt(-6, fill)                                                    # M_PERTURB
            made.append(hashlib.sha256(write_video(tmp_path / "a.mp4", frames, **options).read_bytes()).hexdigest())
    finally:
        if mallopt: mallopt(-6, 0)
    assert len(set(made)) == 1, made


def test_the_writer_keeps_colours(tmp_path):
    colours = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255], [0, 0, 0], [99, 99, 99], [255, 255, 0]], np.uint8)
    frames = np.broadcast_to(colours[:, None, None], (7, 64, 64, 3))
    for fmt in ("yuv420p", "yuv444p"):
        got = read_frames(write_video(tmp_path / "a.mp4", frames, crf=1, g=1, pix_fmt=fmt), range)
        assert np.abs(got.astype(int) - frames).max() <= 3


@pytest.mark.parametrize(("name", "shape", "dtype", "codec"), [
    ("a.mp4", (0, 16, 16, 3), np.uint8, "libx264"), ("a.mp4", (2, 15, 16, 3), np.uint8, "libx264"),
    ("a.mp4", (16, 16, 3), np.uint8, "libx264"), ("a.mp4", (2, 16, 16, 3), float, "libx264"),
    ("a.mp4", (2, 16, 16, 3), np.uint8, "none"), ("a.webm", (2, 16, 16, 3), np.uint8, "libx264"),
    ("a.nothing", (2, 16, 16, 3), np.uint8, "libx264"), ("no/a.mp4", (2, 16, 16, 3), np.uint8, "libx264")])
def test_the_writer_refuses_what_it_cannot_write(tmp_path, name, shape, dtype, codec):
    with pytest.raises((C.VideoError, FileNotFoundError)): write_video(tmp_path / name, np.zeros(shape, dtype), codec=codec)
    assert not os.listdir(tmp_path)
