"""Small video files of every kind that carry their frame numbers in the picture, so that no reader can return another unseen."""
import base64
import os
import zlib
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Callable

import av
import numpy as np
from av.bitstream import BitStreamFilterContext

os.environ.setdefault("SVT_LOG", "1")   # the AV1 encoder talks otherwise
BITS, W, H, N = 8, 128, 96, 48


def picture(k: int, w: int = W, h: int = H) -> np.ndarray:
    "Frame k as (h,w,3) uint8: its number as white and black blocks, below them the inverse, and then a moving colour ramp."
    out = np.zeros((h, w, 3), np.uint8)
    row = np.repeat((k >> np.arange(BITS)) & 1, w // BITS) * 255
    out[:h // 3, :len(row)], out[h // 3:2 * h // 3, :len(row)] = row[None, :, None], 255 - row[None, :, None]
    ramp = (np.arange(w) * 2 + 4 * k) % 256
    out[2 * h // 3:] = np.stack([ramp, ramp[::-1], np.full(w, 5 * k % 256)], -1)
    return out


def number(frame: np.ndarray) -> int:
    "The number that a frame carries; −1 where the two rows of blocks contradict each other."
    h, w = frame.shape[:2]
    cell = w // BITS
    mid = frame[:, cell // 2:cell * BITS:cell].astype(float).mean(-1)
    up, down = mid[h // 9:2 * h // 9].mean(0), mid[4 * h // 9:5 * h // 9].mean(0)
    if (np.abs(up - down) < 100).any(): return -1
    return int(((up > down) << np.arange(BITS)).sum())


def numbers(frames) -> list[int]: return [number(f) for f in frames]


def encode(path, codec, n=N, fmt="yuv420p", pts=None, container=None, size=(W, H), rate=24, options=None, mux=None, matrix=None,
           sar=None):
    "Writes pictures 0…n−1; `pts` in 1/600 s for uneven timing."
    base = Fraction(1, 600) if pts is not None else Fraction(1, rate)
    with av.open(f"file:{path}", "w", format=container, options=mux or {}) as c:
        s = c.add_stream(codec, rate=rate, options={k: str(v) for k, v in (options or {}).items()})
        s.width, s.height, s.pix_fmt = *size, fmt
        s.codec_context.time_base, s.codec_context.thread_count = base, 1
        if sar: s.codec_context.sample_aspect_ratio = Fraction(sar)
        if matrix: s.set_display_matrix(matrix)
        for k in range(n):
            frame = av.VideoFrame.from_ndarray(picture(k, *size), format="rgb24").reformat(format=fmt, threads=1)
            frame.pts, frame.time_base = (k if pts is None else pts[k]), base
            c.mux(s.encode(frame))
        c.mux(s.encode())
    usual_turn()
    return Path(path)


def usual_turn():
    "libsvtav1, run as root, makes the thread that calls it a real-time one, before which nothing else has its turn."
    if hasattr(os, "sched_setscheduler") and os.sched_getscheduler(0) != os.SCHED_OTHER:
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


def copy(source, path, key=0, drop=0, zero=None, mux=None):
    "Copies packets from a key frame on (or `drop` packets after it), undecoded; what is before frame `zero` gets a negative time."
    with av.open(f"file:{source}") as a, av.open(f"file:{path}", "w", options=mux or {}) as b:
        s = a.streams.video[0]
        t = b.add_stream_from_template(s)
        packets = [p for p in a.demux(s) if p.size]
        first = [i for i, p in enumerate(packets) if p.is_keyframe][key] + drop
        shift = 0 if zero is None else round(zero / 24 / s.time_base)
        for p in packets[first:]:
            p.pts, p.dts, p.stream = p.pts - shift, None if p.dts is None else p.dts - shift, t
            b.mux(p)
    return Path(path)


def edit(source, path, first: int, count: int):
    "Rewrites the edit list of an mp4 in place: shows `count` frames from `first` on."
    data, size = bytearray(Path(source).read_bytes()), 4
    at = data.find(b"elst") + 12
    start = int.from_bytes(data[at + size:at + 2 * size])
    duration = int.from_bytes(data[at:at + size])
    data[at:at + size] = (duration * count // N).to_bytes(size)
    with av.open(str(source)) as c: tick = round(1 / 24 / c.streams.video[0].time_base)
    data[at + size:at + 2 * size] = (start + tick * first).to_bytes(size)
    Path(path).write_bytes(data)
    return Path(path)


def skips(source, path):
    "Adds a packet that shows nothing after every tenth: MPEG-4 has pictures that are coded as absent."
    with av.open(str(source)) as a, av.open(str(path), "w") as b:
        s, extra = a.streams.video[0], 0
        t = b.add_stream_from_template(s)
        for k, p in enumerate(p for p in a.demux(s) if p.size):
            p.pts, p.dts, p.stream = k + extra, k + extra, t
            b.mux(p)
            if k % 10 < 9: continue
            extra += 1
            bits = "01" "0" "1" + format((k + extra) % 24, "05b") + "1" "0" "01111"   # P, no full second, time, absent, stuffing
            absent = av.Packet(b"\0\0\1\xb6" + int(bits, 2).to_bytes(2))
            absent.pts = absent.dts = k + extra
            absent.time_base, absent.stream = p.time_base, t
            b.mux(absent)
    return Path(path)


def retag(source, path, matrix: int):
    "The same stored numbers, labelled with another colour matrix of H.273."
    with av.open(f"file:{source}") as a, av.open(f"file:{path}", "w") as b:
        s = a.streams.video[0]
        t = b.add_stream_from_template(s)
        label = BitStreamFilterContext(f"{s.codec_context.codec.canonical_name}_metadata=matrix_coefficients={matrix}", s, t)
        for p in a.demux(s):
            for q in label.filter(p if p.size else None):
                q.stream = t
                b.mux(q)
    return Path(path)


# Pictures 0 to 3 as VP9 with 10 bits, a clean start at 0 and 2, in WebM: the encoder in PyAV's wheel cannot write it.
VP9_10BIT = zlib.decompress(base64.b85decode("""
c-oV4y}x+AQ(GgW({~{L)X3uWxsk)EsiizMDc7mJk;$pGkx3%BA)S!{1elHr`pz!d<-5B(cy)`Y=gPF;HH`})Jh6~<*+AYg-
`zbxo>0i)^x!p3jKUDEOz>`?WE0c8HxP3eA{l4}K(1P#b$w$qzmtP+LyJ#hSz5Rwm~!dta7cLoRs?eFiFHu7*k5mCEI!%+)z3JmkwIzeoaWNJl#WJ*w$`xtumH>EMn>hw%
`HsTC$b()*wEOpt1)3#BU9*xme8Gzj3B>WEiS&4e4slSVNCjoIj)P_UHzQ>U0j1)+WUbnNLI+nOe!m=&@C&lOh2*6b#aGFXpm!wr@x;|`xFBMD=^YCG&45<0|o|p=WV5q+
Rqyq7N2NjU}%`++3du?{DbK?i;NH-&vFI^i3A1)J^%kddKK#bA8=sQ7LRxS|G)d4_y7MKfs-CzxflQL=VZU-qKp5gOgpox_Rjf-Wh)kMX=Ko1n8x5RNroqmfq@xlLe0y`_
Z&o7=I}1q>#{Coe(3B)U(VZZYiN<$Y1ie{UY>pV55r=IhDL^9gaeq698j_I|DB24^FKNGpH}?;a`NQg|NqD~nE(Hh*u^CA`vF5&xwie^$@<6lJ^bYO<?bZ=8P~2S@g4Kmd
=?>T_xb$x8`u7NKfHf_oz4D9=Q?KAcrv=rJ23sfDfce>{aa2dy!Tvj_X5|RJ3km07B6mOsD(J31?upsA1sq!+h%V(`P97rPJ5T776T}qE!y3`xshRe7cf14Y+}s)(8vrD2
u2cU1^^KB7aI
""".replace("\n", "")))


def x264(params="", **more):
    return {"preset": "veryfast", "crf": 18, **more,
            "x264-params": "threads=1:keyint=12:min-keyint=12:scenecut=0:bframes=3" + params}


def x265(params=""):
    return {"preset": "ultrafast", "crf": 18,
            "x265-params": "log-level=none:pools=none:frame-threads=1:keyint=12:min-keyint=12:bframes=3" + params}


VP9 = {"deadline": "realtime", "cpu-used": 8, "crf": 20, "b": 0, "g": 16}
ALT = {"deadline": "good", "cpu-used": 4, "auto-alt-ref": 1, "lag-in-frames": 16, "crf": 20, "b": 0, "g": 16}   # hidden frames
AV1 = {"preset": 11, "crf": 30, "svtav1-params": "lp=1"}
MPEG = {"bf": 2, "g": 12}
UNEVEN = np.cumsum([0] + [25 if k % 3 else 55 for k in range(N - 1)]).tolist()
LATE = [600 + 25 * k for k in range(N)]
FLIP = [-65536, 0, 0, 0, 65536, 0, W << 16, 0, 1 << 30]   # mirrored left to right


@dataclass
class Clip:
    "How a clip is made, what is in it, and what decord does with it."
    make: Callable              # path -> file
    safe: bool = False          # decord is exact on it
    wrong: bool = False         # decord alone returns other frames, or another number of them, without an error
    shown: tuple = tuple(range(N))   # the numbers of the frames that a player shows
    mirror: bool = False        # a player turns left and right round


def _h264(path, **k): return encode(path, "libx264", options=x264(), **k)


ZOO = {
    "h264.mp4": Clip(_h264, safe=True),
    "h264.mov": Clip(_h264, safe=True),
    "h264.mkv": Clip(_h264, safe=True),
    "one_group.mp4": Clip(lambda p: encode(p, "libx264", options=x264(":keyint=250:bframes=0")), safe=True),
    "faststart.mp4": Clip(lambda p: _h264(p, mux={"movflags": "faststart"}), safe=True),
    "fragments.mp4": Clip(lambda p: _h264(p, mux={"movflags": "frag_keyframe+delay_moov"}), safe=True),
    "h264_444.mp4": Clip(lambda p: _h264(p, fmt="yuv444p"), safe=True),
    "full_range.mp4": Clip(lambda p: _h264(p, fmt="yuvj420p"), safe=True),
    "wide_pixels.mp4": Clip(lambda p: _h264(p, sar=2), safe=True),
    "single.mp4": Clip(lambda p: _h264(p, n=1), safe=True, shown=(0,)),
    "vp9.webm": Clip(lambda p: encode(p, "libvpx-vp9", options=VP9), safe=True),
    "vp9_hidden.webm": Clip(lambda p: encode(p, "libvpx-vp9", options=ALT), safe=True),
    "vp9.mp4": Clip(lambda p: encode(p, "libvpx-vp9", options=VP9), safe=True),
    "cut_at_key.mkv": Clip(lambda p: copy(p.parent / "h264.mkv", p, key=1, zero=12), safe=True, shown=tuple(range(12, N))),
    # open groups, intra refresh
    "open.mp4": Clip(lambda p: encode(p, "libx264", options=x264(":open-gop=1")), wrong=True),
    "open.mkv": Clip(lambda p: encode(p, "libx264", options=x264(":open-gop=1")), wrong=True),
    "refresh.mp4": Clip(lambda p: encode(p, "libx264", options=x264(":intra-refresh=1:bframes=0")), wrong=True),
    "refresh.mkv": Clip(lambda p: encode(p, "libx264", options=x264(":intra-refresh=1:bframes=0")), wrong=True),
    # other codecs
    "hevc.mp4": Clip(lambda p: encode(p, "libx265", options=x265()), wrong=True),
    "hevc.mkv": Clip(lambda p: encode(p, "libx265", options=x265()), wrong=True),
    "hevc_closed.mp4": Clip(lambda p: encode(p, "libx265", options=x265(":open-gop=0"))),
    "hevc_hash.mp4": Clip(lambda p: encode(p, "libx265", options=x265(":hash=1")), wrong=True),
    "hevc_10bit.mkv": Clip(lambda p: encode(p, "libx265", fmt="yuv420p10le", options=x265()), wrong=True),
    "h264_10bit.mp4": Clip(lambda p: _h264(p, fmt="yuv420p10le")),
    "av1.mp4": Clip(lambda p: encode(p, "libsvtav1", options=AV1)),
    "av1.webm": Clip(lambda p: encode(p, "libsvtav1", options=AV1)),
    "av1_10bit.mkv": Clip(lambda p: encode(p, "libsvtav1", fmt="yuv420p10le", options=AV1)),
    "vp8.webm": Clip(lambda p: encode(p, "libvpx", options={**ALT, "b": 1000000})),
    "mpeg4.mp4": Clip(lambda p: encode(p, "mpeg4", options=MPEG), wrong=True),
    "ffv1.mkv": Clip(lambda p: encode(p, "ffv1", fmt="yuv444p")),
    "prores.mov": Clip(lambda p: encode(p, "prores_ks", fmt="yuv422p10le")),
    "h264_rgb.mp4": Clip(lambda p: encode(p, "libx264rgb", fmt="rgb24", options=x264())),
    # other containers
    "loop.gif": Clip(lambda p: encode(p, "gif", fmt="rgb8")),
    "loop.png": Clip(lambda p: encode(p, "apng", fmt="rgb24", container="apng")),
    "mpeg4.avi": Clip(lambda p: encode(p, "mpeg4", options=MPEG), wrong=True),
    "mpeg4_no_b.avi": Clip(lambda p: encode(p, "mpeg4", options={"g": 12})),
    "skips.avi": Clip(lambda p: skips(p.parent / "mpeg4_no_b.avi", p), wrong=True),
    "h264.avi": Clip(lambda p: encode(p, "libx264", options=x264(":bframes=0")), wrong=True),
    "mjpeg.avi": Clip(lambda p: encode(p, "mjpeg", fmt="yuvj420p")),
    "gaps.avi": Clip(lambda p: encode(p, "mpeg4", pts=[25 * k + 50 * (k > 9) for k in range(N)], options={"g": 12})),
    "h264.ts": Clip(_h264, wrong=True),
    "hevc.ts": Clip(lambda p: encode(p, "libx265", options=x265()), wrong=True),
    "mpeg2.ts": Clip(lambda p: encode(p, "mpeg2video", options=MPEG), wrong=True),
    "mpeg2.mpg": Clip(lambda p: encode(p, "mpeg2video", options=MPEG, container="mpeg"), wrong=True),
    "wmv2.wmv": Clip(lambda p: encode(p, "wmv2"), wrong=True),
    "h264.flv": Clip(_h264),
    "raw.h264": Clip(lambda p: _h264(p, container="h264")),
    "plain.y4m": Clip(lambda p: encode(p, "wrapped_avframe", container="yuv4mpegpipe")),
    # timing
    "uneven.mp4": Clip(lambda p: _h264(p, pts=UNEVEN)),
    "uneven.webm": Clip(lambda p: encode(p, "libvpx-vp9", options=VP9, pts=UNEVEN)),
    "late.mp4": Clip(lambda p: _h264(p, pts=LATE)),
    "late.mkv": Clip(lambda p: _h264(p, pts=LATE)),
    # trimmed without decoding
    "trim_start.mp4": Clip(lambda p: copy(p.parent / "h264.mp4", p, key=1, zero=17), wrong=True, shown=tuple(range(17, N))),
    "trim_vp9.mp4": Clip(lambda p: copy(p.parent / "vp9_hidden.webm", p, zero=5), wrong=True, shown=tuple(range(5, N))),
    "trim_end.mp4": Clip(lambda p: edit(p.parent / "h264.mp4", p, 0, 30), wrong=True, shown=tuple(range(30))),
    "trim_both.mp4": Clip(lambda p: edit(p.parent / "h264.mp4", p, 20, 10), wrong=True, shown=tuple(range(20, 30))),
    # cut in the middle of a group: what comes before the first key frame is gone
    "cut_open.mkv": Clip(lambda p: copy(p.parent / "open.mkv", p, key=1), shown=tuple(range(12, N))),
    "cut_hevc.mkv": Clip(lambda p: copy(p.parent / "hevc.mkv", p, key=1), wrong=True, shown=tuple(range(12, N))),
    "cut.ts": Clip(lambda p: copy(p.parent / "h264.ts", p, drop=5), wrong=True, shown=tuple(range(12, N))),
    "cut_mpeg2.ts": Clip(lambda p: copy(p.parent / "mpeg2.ts", p, drop=5), wrong=True, shown=tuple(range(12, N))),
    # pictures
    "odd.webm": Clip(lambda p: encode(p, "libvpx-vp9", options=VP9, size=(129, 97))),
    "interlaced.mp4": Clip(lambda p: encode(p, "libx264", options=x264(":interlaced=1"))),
    "mirrored.mp4": Clip(lambda p: _h264(p, matrix=FLIP), mirror=True),
}


def build(folder: Path) -> Path:
    "The whole zoo in one folder."
    for name, clip in ZOO.items(): clip.make(Path(folder) / name)
    return Path(folder)
