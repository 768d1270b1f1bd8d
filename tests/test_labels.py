"Label files: every make is read, every bad line is told by its number."
import numpy as np
import pandas as pd
import pytest

from qualivision.official.known_sets import SETS, check_set, find_set, known_set
from qualivision.data.opinions import OPINION_COLUMNS, VALUES, LabelError, dimensions, place_of, places, read_labels
from qualivision.files import FileError


@pytest.fixture
def read(tmp_path):
    def read(text, name="labels.csv", **rest):
        (tmp_path/name).parent.mkdir(exist_ok=True)
        (tmp_path/name).write_text(text, encoding="utf-8")
        return read_labels(tmp_path/name, **rest)
    return read


def test_lines_of_dover(read):
    table = read("a, b.mp4, -1, -1, 3.5\r\n\r\nc.mp4,-1,-1,2\r\n", "KoNViD/labels.txt")
    assert table.to_dict("list") == {"line": [1, 3], "video": ["a, b.mp4", "c.mp4"], "overall": [3.5, 2]}
    assert table.attrs == {"left_out": 0, "scores": False}


@pytest.mark.parametrize("given", [dict(columns="name,aesthetic,technical,overall"), dict(known=SETS["DIVIDE-3k"])])
def test_lines_of_divide(read, given):
    table = read("a, b.mp4, 1, 2, 3\nc.mp4,2,,4\nd.mp4,3,1,5\n", **given)
    assert table.overall.tolist() == [3, 4, 5] and table.aesthetic.tolist() == [1, 2, 3] and table.video[0] == "a, b.mp4"
    assert table.technical[[0, 2]].tolist() == [2, 1] and np.isnan(table.technical[1])


@pytest.mark.parametrize("name", ["divided/labels.txt", "DIVIDE_MaxWell/val_labels.txt", "MaxWell.txt"])
def test_a_path_says_nothing_of_columns(read, name):
    "Lengths and frame rates are no opinions, wherever the file lies."
    table = read("v1.mp4,207,25,5.1\nv2.mp4,214,26,4.2\n", name)
    assert table.columns.tolist() == ["line", "video", "overall"] and table.overall.tolist() == [5.1, 4.2]


def test_headers(read):
    table = read('\ufeffFilename,bitrate,MOS,Prompt\n"a, b.mp4",9,1.5,"a cat,\na dog"\nc.mp4,8,2,x\n')
    assert table.to_dict("list") == {"line": [2, 4], "video": ["a, b.mp4", "c.mp4"], "overall": [1.5, 2], "group": ["a cat,\na dog", "x"]}
    five = read('video_name,Prompt,Traditional_MOS,Alignment_MOS,Aesthetic_MOS,Temporal_MOS,Overall_MOS\na.mp4,x,1,2,3,4,5\n')
    assert five[["technical", "aesthetic", "overall"]].to_numpy().tolist() == [[1, 3, 5]]


SCORES = {"own": "video,technical,aesthetic,fused,error,sha256\na,.1,.2,.6,,ff\nb,,,,gone,\nc,.2,.3,.7,,ee\n",
          "with heads": "video,technical,aesthetic,fused,mos,error,sha256\na,.1,.2,.1,.6,,ff\nb,,,,,gone,\nc,.2,.3,.1,.7,,ee\n",
          "dover": "path, aesthetic score, technical score, overall/final score\na, .2, .1, .6\nc, .3, .2, .7\n",
          "cover": "Filename,Semantic,Technical,Aesthetic,Overall\na,.5,.1,.2,.6\nc,.5,.2,.3,.7\n"}


@pytest.mark.parametrize("form", SCORES)
def test_tables_of_scores_are_labels(read, form, tmp_path):
    table = read(SCORES[form])
    assert table[["video", "technical", "aesthetic", "overall"]].to_numpy().tolist() == [["a", .1, .2, .6], ["c", .2, .3, .7]]
    assert table.attrs == {"left_out": int("gone" in SCORES[form]), "scores": True}
    stored = pd.read_csv(tmp_path/"labels.csv", skipinitialspace=True)
    stored.to_parquet(tmp_path/"s.parquet")
    assert read_labels(tmp_path/"s.parquet")[["video", *VALUES]].equals(table[["video", *VALUES]])


BAD = {"a,-1,-1,3\nb,-1,-1,x\nc,-1,-1,nan\n": "line 2: overall is 'x', no number .bad lines too: 3",
       "a,-1,-1,inf\n": "line 1: overall is inf, no finite",
       "a,-1,-1,\n": "line 1: overall is '', no number", "a,3\n": "line 1: it has 2 cells, not 4", " , 1, 1, 3\n": "line 1: there is no name",
       "name,mos\na,3\n\na,4\n": "line 4: 'a' stands in line 2 already", "name,mos\na,3\nb,3,3\n": "line 3: it has 3 cells, not 2",
       "name,mos,score\na,3,4\n": "line 1: two columns hold the overall", "name,mos,technical\na,3,bad\n": "line 2: technical is 'bad'",
       "name,mos,MOS\na,3,4\n": "line 1: the column 'mos' is there twice", 'name,mos\n"a,3\n': "no CSV",
       '"a"b,1,1,3\n': "no CSV", "": "it is empty", "name,mos\n": "0 usable lines",
       "video,fused,error\na,,gone\n": "0 usable lines, 1 more were not scored"}


@pytest.mark.parametrize("text", BAD)
def test_bad_lines_are_told(read, text):
    with pytest.raises((LabelError, FileError), match=f"labels.csv.*{BAD[text]}") as e: read(text)
    assert e.value.remedy


def test_files_that_are_no_labels(read, tmp_path):
    (tmp_path/"a.csv").write_bytes(b"a,1,1,3\nb,1,\xff,4\n")
    (tmp_path/"a.parquet").write_bytes(b"no parquet")
    for name, said in {"a.csv": "line 2: it is not text in UTF-8.*--encoding",
                       "gone.csv": "cannot be read", ".": "cannot be read", "a.parquet": "as Parquet"}.items():
        with pytest.raises(FileError, match=said): read_labels(tmp_path/name)
    with pytest.raises(LabelError, match="no column of names"): read("a,1\n", columns="video,technical")
    with pytest.raises(LabelError, match="1 usable lines. Here it takes 3"): read("name,mos\na,1\n", least=3)


def test_known_sets(read):
    "By name, by preset, by the place of a file; labels that cannot be theirs are refused."
    assert {s.preset: s.name for s in SETS.values() if s.preset} == {"val-kv1k": "KoNViD-1k", "val-livevqc": "LIVE-VQC", "val-ytugc": "YouTube-UGC",
                                                                     "val-cvd2014": "CVD2014"}
    for s in SETS.values(): assert known_set(s.name.lower()) is s and (not s.preset or known_set(s.preset) is s)
    with pytest.raises(LabelError, match="LSVQ_test"): known_set("nothing")
    with pytest.raises(LabelError): known_set("")
    table = read("a,-1,-1,3\nb,-1,-1,5.5\n")
    with pytest.raises(LabelError, match="f.txt line 2: MOS of KoNViD-1k lie from 1 to 5, this is 5.5"):
        check_set(known_set("val-kv1k"), table, "f.txt")
    many = read("".join(f"{i},-1,-1,{i % 5}\n" for i in range(235)))
    with pytest.raises(LabelError, match="CVD2014 has 234 videos, these are 235"): check_set(known_set("CVD2014"), many)
    check_set(known_set("DIVIDE-3k"), table)


SPREAD = "".join(f"v{k}.mp4,0,0,{m}\n" for k, m in enumerate((5.1, 4.2, 3.3, 2.4, 1.5, .6)))
FOUND = {"KoNViD/labels.txt": "KoNViD-1k", "LSVQ/labels_1080p.txt": "LSVQ_1080p", "lsvq_test.txt": "LSVQ_test", "my CVD-2014/labels.txt": "CVD2014",
         "AIGC_VD/labels.txt": None, "divided/labels.txt": None, "my/labels.txt": None, "ugc/labels.txt": None}


@pytest.mark.parametrize("path", FOUND)
def test_a_set_is_known_by_whole_words_counts_and_ranges(read, path):
    "A word within a word is none; a right word is not believed where the opinions are not that set's, and the answer says why."
    scale = SETS[FOUND[path]] if FOUND[path] else SETS["LSVQ"]
    own = pd.DataFrame({"line": range(6), "overall": np.linspace(max(scale.low, 0), min(scale.high, 100), 6)})
    found, why = find_set(path, own)
    assert (found and found.name) == FOUND[path] and (f"6 of {found.videos} videos" in why if found else "names no known data set" in why)
    other, why = find_set(path, read(SPREAD, path))
    assert other is None and ("but MOS of" in why if found else "names no known data set" in why)
    if found: assert find_set(path, pd.concat([own] * 9999)) [0] is None


@pytest.mark.parametrize("name", SETS)
def test_lines_of_every_known_set(read, name):
    "Three lines as the set has them, by its name alone; the overall opinion is the last column."
    known = SETS[name]
    assert known.columns == ("name,aesthetic,technical,overall" if name == "DIVIDE-3k" else "name,_,_,mos")
    table = read("a.mp4,1,2,3\nb.mp4,2,3,4\nc.mp4,3,4,5\n", known=known)
    check_set(known, table)
    assert table.overall.tolist() == [3, 4, 5] and ("technical" in table) == (name == "DIVIDE-3k")


def test_places(tmp_path):
    "By the whole of the name: a folder in it is never left out, and two lines never share a film."
    for name in ("one/a.mp4", "two/b.mp4", "two/deep/a.mp4"):
        (tmp_path/name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path/name).write_bytes(b"x")
    folders = [tmp_path/"one", tmp_path/"two"]
    assert place_of("a.mp4", folders) == str(tmp_path/"one"/"a.mp4") and place_of("b.mp4", folders) == str(tmp_path/"two"/"b.mp4")
    assert place_of("deep/a.mp4", folders) == str(tmp_path/"two"/"deep"/"a.mp4")
    assert place_of("deep/b.mp4", folders) == str(tmp_path/"one"/"deep"/"b.mp4"), "not two/b.mp4"
    assert place_of("https://x.org/a.mp4", folders) == "https://x.org/a.mp4"
    (tmp_path/"two"/"link").symlink_to("deep")
    for names in (["b.mp4", "./b.mp4"], ["b.mp4", "../two/b.mp4"], ["deep/a.mp4", "link/a.mp4"], ["b.mp4", str(tmp_path/"two"/"b.mp4")]):
        table = pd.DataFrame({"line": [3, 7], "video": names})
        with pytest.raises(LabelError, match="l.csv line 7: .* as .* in line 3 is"): places(table, folders, "l.csv")
    assert len(set(places(pd.DataFrame({"line": [1, 2], "video": ["a.mp4", "deep/a.mp4"]}), folders))) == 2


@pytest.mark.parametrize("dimension, names", {
    "traditional": ["Traditional_MOS", "visual_quality", "static_quality", "technical_quality", "spatial_quality"],
    "temporal": ["Temporal_MOS", "temporal_quality", "temporal_consistency", "consistency", "persistence"],
    "alignment": ["Alignment_MOS", "alignment", "text_alignment", "text-to-video alignment", "element_presence", "SA"],
    "aesthetic": ["Aesthetic_MOS", "aesthetic"], "overall": ["Overall_MOS", "overall", "mos"]}.items())
def test_names_of_dimensions(dimension, names):
    for name in names: assert dimensions(["video", "prompt", " " + name.upper(), "index"]) == {dimension: " " + name.upper()}
    with pytest.raises(LabelError, match=f"x.csv: the columns {names[0]} and {names[1]} are both {dimension}"): dimensions(names[:2], "x.csv")


def test_dimensions_have_an_order_and_names_no_two_meanings():
    assert list(dimensions(["overall", "consistency", "sa", "video"])) == ["alignment", "temporal", "overall"]
    names = [n for known in OPINION_COLUMNS.values() for n in known]
    assert len(names) == len(set(names)) and names == [n.lower() for n in names]
