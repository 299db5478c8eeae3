"""Captioned pictures: shards, data sets and COCO as they come, what is damaged or lacks a partner, states beside their pictures, damage, and crops that match."""
import importlib.util
import io
import json
import os
import subprocess
import sys
import tarfile
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from extras import BARE, need
from torch.nn import functional as F

need("train", "data")

from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset

from diffusion_papers.core.pictures import to_square
from diffusion_papers.core.training import Draws, TrainingConfig, collate, fit
from diffusion_papers.topics import captioned_pictures
from diffusion_papers.topics.captioned_pictures import (
    BLUR, DAMAGES, GRAIN, NO_CAPTION, NO_PICTURE, OTHER, UNREADABLE, WORST, CaptionedDataset, CaptionedTars, EncodedPictures, Member, StoredStates, blurred, coco_captions,
    coco_prompts, compressed, degraded, enlarged, find_shards, grainy, matching_crops, noisy_condition, read_shard, resized, shard_index, split_name, tar_members)
from diffusion_papers.topics.corruptions import gaussian_blur, jpeg
from diffusion_papers.topics.text import Cached, TextEncoder, TextStates

ROOT = Path(__file__).resolve().parents[1]
library = pytest.mark.skipif(importlib.util.find_spec("datasets") is None, reason="needs datasets: pip install datasets")


def seeded(number=0): return torch.Generator().manual_seed(number)


def at(step=0, pieces=1, piece=0): return Draws(seeded(step), pieces, piece)


def plain(level, kind="png", size=(9, 7)):
    "A file of one grey level."
    buffer = io.BytesIO()
    Image.new("RGB", size, (level,) * 3).save(buffer, kind)
    return buffer.getvalue()


def write_tar(path, files, form=tarfile.PAX_FORMAT):
    "Files, (name, content), in their order; a name may come twice."
    with tarfile.open(path, "w", format=form) as archive:
        for name, content in files.items() if isinstance(files, dict) else files:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return path


def shards(folder, counts=(3, 2, 4), kinds=("png", "webp", "png")):
    "Pictures whose grey level their caption says, numbered through all shards; members in several orders."
    number = 0
    for shard, (count, kind) in enumerate(zip(counts, kinds)):
        files = []
        for _ in range(count):
            key, text = f"{number:04d}", f"level {20 * number}"
            picture = (f"{key}.{kind}", plain(20 * number, "png" if kind == "png" else "webp"))
            said = (f"{key}.json", json.dumps({"caption": text, "width": 9}).encode()) if shard == 1 else (f"{key}.txt", text.encode())
            files += [said, picture] if number % 2 else [picture, said]
            number += 1
        write_tar(folder / f"{shard:05d}.tar", files)
    return folder


def level(data, index): return round((data[index]["x0"].mean().item() + 1) * 127.5)


# ---- archives


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_lie_where_they_are_said_to_lie(tmp_path, form):
    long = "folder/" + "n" * 90 + ".txt"
    files = {"a.txt": b"first", "empty.txt": b"", long: b"x" * 512, "b.jpg": os.urandom(1500), "c.txt": b"last"}
    if form != tarfile.USTAR_FORMAT: files["l" * 300 + ".txt"], files["süß.txt"] = b"long", b"umlaut"
    path = write_tar(tmp_path / "a.tar", files, form)
    raw, found = path.read_bytes(), tar_members(path)
    assert {name: raw[offset:offset + length] for name, offset, length in found} == files and [member.name for member in found] == list(files)


def test_members_are_plain_files_only(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name, kind in (("folder", tarfile.DIRTYPE), ("soft.jpg", tarfile.SYMTYPE), ("hard.jpg", tarfile.LNKTYPE), ("pipe.jpg", tarfile.FIFOTYPE), ("sparse.jpg", tarfile.GNUTYPE_SPARSE), ("plain.jpg", tarfile.REGTYPE)):
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = kind, "plain.jpg" if kind in (tarfile.SYMTYPE, tarfile.LNKTYPE) else ""
            archive.addfile(entry, io.BytesIO())
    assert [member.name for member in tar_members(tmp_path / "a.tar")] == ["plain.jpg"]
    with tarfile.open(tmp_path / "none.tar", "w"): pass
    assert tar_members(tmp_path / "none.tar") == []
    with pytest.raises(FileNotFoundError): tar_members(tmp_path / "nowhere.tar")


def test_an_archive_that_is_cut_off_anywhere_is_refused_by_name(tmp_path):
    raw = write_tar(tmp_path / "whole.tar", {"a.jpg": b"x" * 700, "a.txt": b"words", "b.jpg": b"y" * 512}).read_bytes()
    end = max(member.offset + -(-member.length // 512) * 512 for member in tar_members(tmp_path / "whole.tar"))
    for size in sorted({*range(0, end + 512, 64), *range(511, end + 512, 512), end, end + 511}):
        (tmp_path / "cut.tar").write_bytes(raw[:size])
        with pytest.raises(ValueError, match=r"folder: .*cut\.tar is (cut off|damaged)"): tar_members(tmp_path / "cut.tar")
    (tmp_path / "cut.tar").write_bytes(raw[:end + 512])  # one block of zeros is enough
    assert len(tar_members(tmp_path / "cut.tar")) == 3


def test_an_archive_that_is_damaged_is_refused_by_name(tmp_path):
    raw = write_tar(tmp_path / "whole.tar", {"a.jpg": b"x" * 700, "a.txt": b"words", "b.jpg": b"y" * 512}).read_bytes()
    starts = [member.offset - 512 for member in tar_members(tmp_path / "whole.tar")]
    for start in starts:
        for place, value in ((start + 3, b"?"), (start + 124, b"9999"), (start + 150, b"zz")):
            (tmp_path / "bad.tar").write_bytes(raw[:place] + value + raw[place + len(value):])
            with pytest.raises(ValueError, match=r"bad\.tar is (cut off|damaged)"): tar_members(tmp_path / "bad.tar")
    for content in (b"", b"\x1f\x8b" + os.urandom(2000), b"no archive at all" * 100):
        (tmp_path / "bad.tar").write_bytes(content)
        with pytest.raises(ValueError, match=r"bad\.tar"): tar_members(tmp_path / "bad.tar")


# ---- what belongs together


@pytest.mark.parametrize("name, key, ending", [
    ("0001.jpg", "0001", ".jpg"), ("0001.JPG", "0001", ".jpg"), ("a/b.c/0001.png", "a/b.c/0001", ".png"), ("0001.seg.png", "0001", ".seg.png"), ("a.b/readme", "a.b/readme", ""),
    (".hidden", "", ".hidden"), ("a/._0001.jpg", "a/", "._0001.jpg"), ("./0001.txt", "./0001", ".txt")])
def test_a_name_parts_at_the_first_dot_of_the_file(name, key, ending): assert split_name(name) == (key, ending)


@pytest.mark.parametrize("names, told", [
    (["a.jpg", "a.txt", "a.jpg"], "twice: a.jpg and a.jpg"), (["a.jpg", "a.txt", "a.png"], "twice: a.jpg and a.png"), (["a.txt", "b.jpg", "a.jpg", "a.TXT"], "twice: a.txt and a.TXT"),
    (["a.jpeg", "a.JPG"], "'a' twice")])
def test_a_key_that_is_there_twice_is_refused(tmp_path, names, told):
    path = write_tar(tmp_path / "twice.tar", [(name, b"1") for name in names])
    for read in (read_shard, shard_index, lambda _: CaptionedTars(tmp_path, 8)):
        with pytest.raises(ValueError, match=rf"twice\.tar has the key .*{told}"): read(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["twice.tar"]


@pytest.mark.parametrize("files, wanted", [
    ({"txt": b" a dog \n"}, "a dog"), ({"txt": b"\xef\xbb\xbfa dog"}, "a dog"), ({"txt": "ein süßer Hund".encode()}, "ein süßer Hund"), ({"json": b'{"caption": "a dog\\n", "url": 3}'}, "a dog"),
    ({"txt": b"a dog", "json": b'{"caption": "a cat"}'}, "a dog"), ({"txt": b"\n", "json": b'{"caption": "a cat"}'}, "a cat"), ({"txt": b"\xff", "json": b'{"caption": "a cat"}'}, "a cat"),
    ({"txt": b"a dog", "json": b"["}, "a dog"),
    ({}, NO_CAPTION), ({"txt": b""}, NO_CAPTION), ({"json": b'{"caption": null}'}, NO_CAPTION), ({"json": b'{"caption": ["a"]}'}, NO_CAPTION), ({"json": b'{"text": "a dog"}'}, NO_CAPTION),
    ({"json": b'["a dog"]'}, NO_CAPTION), ({"txt": b"\xff\xfe"}, UNREADABLE), ({"json": b"{"}, UNREADABLE), ({"json": b"[" * 100_000}, UNREADABLE)])
def test_captions_in_all_their_forms(tmp_path, files, wanted):
    path = write_tar(tmp_path / "a.tar", {"k.jpg": b"1", **{f"k.{ending}": content for ending, content in files.items()}})
    found = read_shard(path)
    if wanted in (NO_CAPTION, UNREADABLE): assert found["captions"] == found["keys"] == [] and found["left_out"] == {wanted: [1, ["k.jpg"]]}
    else: assert found["captions"] == [wanted] and found["keys"] == ["k"] and found["names"] == ["k.jpg"] and not found["left_out"]


def test_the_caption_may_have_another_name(tmp_path):
    path = write_tar(tmp_path / "a.tar", {"k.jpg": plain(40), "k.json": b'{"caption": "a", "alt": "b"}'})
    assert read_shard(path, "alt")["captions"] == ["b"] and CaptionedTars(tmp_path, 8).captions == ["a"] and CaptionedTars(tmp_path, 8, field="alt").captions == ["b"]


def test_what_has_no_partner_is_counted_and_told(tmp_path):
    write_tar(tmp_path / "0.tar", {"a.jpg": b"1", "b.jpg": b"1", "c.txt": b"words", "d.png": plain(60), "d.txt": b"kept", "d.cls": b"3", "__index__": b"", "._d.png": b""})
    write_tar(tmp_path / "1.tar", {"a.jpg": b"1", "e.jpg": b"1", "f.json": b"{}", "g.jpg": b"1", "g.txt": b"\xff"})
    with pytest.warns(UserWarning, match="4 left out") as told: data = CaptionedTars(tmp_path, 8)
    assert data.left_out == {OTHER: (3, ["d.cls", "__index__", "._d.png"]), NO_CAPTION: (4, ["a.jpg", "b.jpg", "a.jpg"]), NO_PICTURE: (2, ["c.txt", "f.json"]), UNREADABLE: (1, ["g.jpg"])}
    report = str(told[0].message)
    assert "1 pictures with captions in 2 shards" in report and f"4 left out ({NO_CAPTION}: a.jpg, b.jpg, a.jpg, ...)" in report and f"1 left out ({UNREADABLE}: g.jpg)" in report
    assert data.captions == ["kept"] and len(data) == 1 and data.report in repr(data) and told[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_tar(tmp_path / "0.tar", {"d.png": plain(60), "d.txt": b"kept", "d.cls": b"3"})
        (tmp_path / "1.tar").unlink()
        assert CaptionedTars(tmp_path, 8).left_out == {OTHER: (1, ["d.cls"])}  # a class beside a picture is nothing to worry about


# ---- the index


def test_an_index_is_read_again_only_where_its_shard_has_changed(tmp_path, monkeypatch):
    path, reads = shards(tmp_path) / "00000.tar", []
    monkeypatch.setattr(captioned_pictures, "read_shard", lambda *given: reads.append(given) or read_shard(*given))
    first = shard_index(path)
    kept = tmp_path / "00000.tar.index.json"
    assert shard_index(path) == first and len(reads) == 1 and first["captions"] == ["level 0", "level 20", "level 40"]
    assert shard_index(path, field="alt")["captions"] == first["captions"] and len(reads) == 2  # captions are in .txt files here
    assert shard_index(path) == first and len(reads) == 3
    write_tar(path, {"n.png": plain(10), "n.txt": b"new"})
    assert shard_index(path)["captions"] == ["new"] and len(reads) == 4
    os.utime(path, ns=(0, 10**18))
    assert shard_index(path)["captions"] == ["new"] and len(reads) == 5
    whole = json.loads(kept.read_text())
    for damage in ("", "{", "[]", "null", "\x00", json.dumps(whole | {"offsets": []}), json.dumps(whole | {"keys": None}), json.dumps(whole | {"version": 0}), json.dumps(whole | {"left_out": []})):
        kept.write_text(damage)
        before = len(reads)
        assert shard_index(path)["captions"] == ["new"] and len(reads) == before + 1 and json.loads(kept.read_text()) == whole, damage
    assert not [entry for entry in tmp_path.iterdir() if entry.name.endswith(".tmp")]


def test_an_index_may_lie_elsewhere_and_need_not_be_kept(tmp_path):
    (tmp_path / "in").mkdir()
    folder = shards(tmp_path / "in")
    before = sorted(folder.iterdir())
    data = CaptionedTars(folder, 8, index=tmp_path / "indices")
    assert sorted(folder.iterdir()) == before and len(list((tmp_path / "indices").iterdir())) == 3
    (tmp_path / "file").touch()
    with pytest.warns(UserWarning, match="index is not kept") as told: other = CaptionedTars(folder, 8, index=tmp_path / "file")
    assert len(told) == 3 and other.captions == data.captions and sorted(folder.iterdir()) == before


def test_several_processes_may_index_at_once(tmp_path):
    folder = shards(tmp_path, (40, 40, 40), ("png",) * 3)
    program = ("import sys, time\nfrom diffusion_papers.topics.captioned_pictures import CaptionedTars\n"
               "time.sleep(max(0, float(sys.argv[2]) - time.time()))\ndata = CaptionedTars(sys.argv[1], 8)\nprint(len(data), hash(tuple(data.offset.tolist())), *data.captions)")
    started = [subprocess.Popen([sys.executable, "-c", program, str(folder), str(time.time() + 4)], stdout=subprocess.PIPE, text=True,
                                env=os.environ | {"PYTHONPATH": str(ROOT), "TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1"}) for _ in range(3)]
    said = [process.communicate()[0] for process in started]
    assert [process.returncode for process in started] == [0, 0, 0] and len(set(said)) == 1 and said[0].startswith("120 ")
    assert sorted(entry.name for entry in folder.iterdir()) == sorted(f"{number:05d}.tar{ending}" for number in range(3) for ending in ("", ".index.json"))


# ---- shards as a data set


def test_every_caption_is_beside_its_own_picture(tmp_path):
    data = CaptionedTars(shards(tmp_path), 8)
    for _ in range(2):  # the second time from the indices
        assert data.captions == [f"level {20 * number}" for number in range(9)] and data.keys == [f"{number:04d}" for number in range(9)] and len(data) == 9
        for number in (8, 0, 3, 5, 1, 2, 7, 4, 6): assert abs(level(data, number) - int(data.captions[number].split()[1])) <= 2  # webp is not exact
        data = CaptionedTars(tmp_path, 8)
    assert data[0]["x0"].shape == (3, 8, 8) and set(data[0]) == {"x0"} and data[4]["x0"].dtype == torch.float32
    data.offset[1:3] = data.offset[[2, 1]]
    assert level(data, 1) != 20  # this test would see it


def test_captions_and_lengths_need_no_picture(tmp_path, monkeypatch):
    write_tar(tmp_path / "a.tar", {f"{number}.jpg": b"no picture" for number in range(3)} | {f"{number}.txt": b"words" for number in range(3)})
    data = CaptionedTars(tmp_path, 8)
    assert data.captions == 3 * ["words"]
    with pytest.raises(ValueError, match=r"a\.tar, 1\.jpg: .* cannot be read as a picture"): data[1]


def test_pictures_are_cut_to_the_middle_and_scaled_without_aliases(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (60, 100, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
    write_tar(tmp_path / "a.tar", {"k.png": buffer.getvalue(), "k.txt": b"noise"})
    found = CaptionedTars(tmp_path, 12)[0]["x0"]
    middle = torch.from_numpy(pixels[:, 20:80]).permute(2, 0, 1)[None] / 127.5 - 1
    wanted = F.interpolate(middle, size=(12, 12), mode="bicubic", antialias=True)[0]  # a = -1/2, as Pillow has it
    assert (found - wanted)[:, 2:-2, 2:-2].abs().max() < 0.02 and found.std() < 0.3 * middle.std()  # Pillow's filter reaches beyond the cut at its edges


@pytest.mark.parametrize("prepare, kind, told", [
    (lambda folder: None, ValueError, r"folder: .* holds no shards"), (lambda folder: folder.rmdir(), FileNotFoundError, "folder: .* is not a folder"),
    (lambda folder: (folder / "a.tar").write_bytes(b""), ValueError, r"a\.tar is cut off or damaged"), (lambda folder: (folder / "a.tar.gz").touch(), ValueError, r"compressed shards \(a\.tar\.gz\)"),
    (lambda folder: (write_tar(folder / "a.tar", {"a.jpg": b"1", "a.txt": b"b"}), (folder / "b.tgz").touch()), ValueError, r"compressed shards \(b\.tgz\)"),
    (lambda folder: write_tar(folder / "a.tar", {"a.jpg": b"1", "b.txt": b"b"}), ValueError, "no picture with a caption; 1 left out .*a.jpg.*; 1 left out .*b.txt"),
    (lambda folder: write_tar(folder / "a.tar", {}), ValueError, "no picture with a caption")])
def test_a_folder_that_cannot_be_used_says_why(tmp_path, prepare, kind, told):
    folder = tmp_path / "data"
    folder.mkdir()
    prepare(folder)
    with pytest.raises(kind, match=told): CaptionedTars(folder, 8)


def test_a_damaged_shard_among_sound_ones_is_named(tmp_path):
    folder = shards(tmp_path)
    raw = (folder / "00001.tar").read_bytes()
    (folder / "00001.tar").write_bytes(raw[:1200])
    with pytest.raises(ValueError, match=r"00001\.tar is (cut off|damaged)"): CaptionedTars(folder, 8)


def test_a_picture_that_is_too_large_or_no_longer_there_is_named(tmp_path):
    folder = shards(tmp_path)
    with pytest.raises(ValueError, match=r"00001\.tar, 0004\.webp: .* 9 x 7 = 63 pixels, above the limit of max_pixels=62"): CaptionedTars(folder, 8, max_pixels=62)[4]
    data = CaptionedTars(folder, 8, 63)
    assert level(data, 8) == 160
    os.truncate(folder / "00002.tar", int(data.offset[8]) + 20)
    with pytest.raises(ValueError, match=r"00002\.tar is shorter than it was: 0008\.png"): data[8]
    for index in (-1, 9):
        with pytest.raises(IndexError, match="expected 0 to 8"): data[index]
    for wrong in ({"size": 0}, {"size": 8, "max_pixels": 0}):
        with pytest.raises(ValueError, match="size|max_pixels"): CaptionedTars(folder, **wrong)


def test_shards_come_in_alphabetical_order_and_hidden_ones_do_not(tmp_path):
    for name in ("b.tar", "a.tar", ".c.tar", "a.tar.index.json", "00000.parquet"): (tmp_path / name).touch()
    assert [path.name for path in find_shards(str(tmp_path))] == ["a.tar", "b.tar"]


def test_loaders_with_workers_and_threads_read_the_same(tmp_path):
    data = CaptionedTars(shards(tmp_path), 8)
    wanted = torch.stack([data[number]["x0"] for number in range(9)])
    loaded = torch.cat([batch["x0"] for batch in DataLoader(data, 2, num_workers=2)])
    assert torch.equal(loaded, wanted)
    wrong = []
    def read(seed):
        for number in torch.randint(9, (60,), generator=seeded(seed)).tolist():
            if not torch.equal(data[number]["x0"], wanted[number]): wrong.append(number)
    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    assert not wrong


# ---- data sets of Hugging Face


class Rows:
    "What such a data set looks like from outside."
    def __init__(self, named=True, **columns):
        self.columns = columns
        if named: self.column_names = list(columns)
    def __len__(self): return len(next(iter(self.columns.values())))
    def __getitem__(self, key): return self.columns[key] if isinstance(key, str) else {name: values[key] for name, values in self.columns.items()}


def test_rows_of_every_kind(tmp_path):
    (tmp_path / "4.png").write_bytes(plain(80))
    rows = Rows(image=[Image.open(io.BytesIO(plain(0))), {"bytes": plain(20), "path": "gone.png"}, plain(40), {"bytes": plain(60), "path": None}, {"bytes": None, "path": str(tmp_path / "4.png")}, str(tmp_path / "4.png")],
                caption=[f"level {20 * number} " for number in range(5)] + ["level 80"])
    data = CaptionedDataset(rows, 8)
    assert data.captions == [f"level {value}" for value in (0, 20, 40, 60, 80, 80)] and [level(data, number) for number in range(6)] == [0, 20, 40, 60, 80, 80]
    assert "6 pictures with captions" in repr(data) and set(data[0]) == {"x0"}
    unnamed = CaptionedDataset(Rows(False, photo=[plain(20)], said=["a"]), 8, "photo", "said")
    assert unnamed.captions == ["a"] and level(unnamed, 0) == 20
    with pytest.raises(ValueError, match="text: the data set has no column 'caption'"): CaptionedDataset(Rows(False, image=[plain(20)]), 8)


def test_rows_without_a_caption_are_counted_and_the_others_keep_their_pictures():
    rows = Rows(image=[plain(20 * number) for number in range(6)], caption=[None, "level 20", "", "level 60", " ", "level 100"])
    with pytest.warns(UserWarning, match=r"3 pictures with captions; 3 left out \(a picture without a caption: row 0, row 2, row 4\)"): data = CaptionedDataset(rows, 8)
    assert [level(data, number) for number in range(3)] == [20, 60, 100] and data.captions == ["level 20", "level 60", "level 100"] and data.rows.tolist() == [1, 3, 5]


def test_of_several_captions_one_is_chosen_aloud():
    rows = Rows(image=[plain(0), plain(20), plain(40)], caption=[["a", "b"], ["c", "d", "e"], "f"])
    with pytest.raises(ValueError, match="text: row 0 has 2 captions; say with `which`"): CaptionedDataset(rows, 8)
    assert CaptionedDataset(rows, 8, which=1).captions == ["b", "d", "f"]
    with pytest.warns(UserWarning, match="1 left out .*row 0"): assert CaptionedDataset(rows, 8, which=2).captions == ["e", "f"]


@pytest.mark.parametrize("dataset, options, kind, told", [
    (Rows(image=[plain(0)], caption=["a"]), {"size": 0}, ValueError, "size"), (Rows(image=[plain(0)], caption=["a"]), {"picture": "photo"}, ValueError, "picture: expected a column .* image, caption; got 'photo'"),
    (Rows(image=[plain(0)], caption=["a"]), {"text": "prompt"}, ValueError, "text: expected a column .* got 'prompt'"), (Rows(image=[plain(0)], caption=["a"]), {"which": -1}, ValueError, "which"),
    (Rows(image=[plain(0)], caption=[3]), {}, TypeError, "text: expected texts, got 3 in row 0"), (Rows(image=[plain(0)], caption=[None]), {}, ValueError, "no picture with a caption"),
    ({"train": 1, "test": 2}, {}, ValueError, "expected one data set, got splits: train, test"), (3, {}, TypeError, "dataset: expected a path or a data set"), (iter([1]), {}, TypeError, "dataset"),
    ("nowhere", {}, FileNotFoundError, "dataset: nowhere is not a folder")])
def test_a_data_set_that_cannot_be_used_says_why(dataset, options, kind, told):
    with pytest.raises(kind, match=told): CaptionedDataset(dataset, **{"size": 8} | options)


def test_a_picture_of_a_row_that_cannot_be_read_is_named():
    data = CaptionedDataset(Rows(image=[None, b"no picture", plain(20)], caption=["a", "b", "c"]), 8, max_pixels=62)
    for number, told in ((0, "row 0, image: expected a picture, got None"), (1, "row 1, image: .* cannot be read"), (2, "row 2, image: .* 63 pixels")):
        with pytest.raises(ValueError, match=told): data[number]
    with pytest.raises(IndexError, match="expected 0 to 2"): data[3]


def test_without_the_library_a_folder_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"datasets is needed here .* pip install 'diffusion_papers\[datasets\]'"): CaptionedDataset(tmp_path, 8)


@library
def test_the_library_itself(tmp_path):
    import datasets
    files = [tmp_path / f"{number}.png" for number in range(4)]
    for number, file in enumerate(files): file.write_bytes(plain(20 * number))
    columns = {"image": [str(file) for file in files], "caption": [f"level {20 * number}" for number in range(3)] + [None], "all": [["a", "b"]] * 4}
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string"), "all": datasets.Sequence(datasets.Value("string"))})
    made = datasets.Dataset.from_dict(columns, features=features)
    made.save_to_disk(str(tmp_path / "saved"))
    for dataset in (tmp_path / "saved", str(tmp_path / "saved"), made, made.select([0, 1, 2, 3])):
        with pytest.warns(UserWarning, match="row 3"): data = CaptionedDataset(dataset, 8)
        assert data.captions == ["level 0", "level 20", "level 40"] and [level(data, number) for number in range(3)] == [0, 20, 40]
    assert CaptionedDataset(made, 8, text="all", which=1).captions == 4 * ["b"]
    turned = CaptionedDataset(made.select([2, 0]), 8)
    assert turned.captions == ["level 40", "level 0"] and level(turned, 0) == 40
    with pytest.raises(ValueError, match="63 pixels, above the limit"): CaptionedDataset(made.select([1]), 8, max_pixels=62)[0]
    with pytest.raises(ValueError, match="got splits: train"): CaptionedDataset(datasets.DatasetDict(train=made), 8)
    with pytest.raises(ValueError, match="cannot be read as a data set"): CaptionedDataset(tmp_path, 8)


# ---- COCO


def coco(folder, pictures=5, captions=3, **changes):
    "A file in the form of captions_val2014.json, entries out of order."
    numbers = [42 + 7 * number for number in range(pictures)]
    content = {"info": {"description": "COCO 2014 Dataset", "url": "http://cocodataset.org", "version": "1.0", "year": 2014, "contributor": "COCO Consortium", "date_created": "2017/09/01"},
               "images": [{"license": 3, "file_name": f"COCO_val2014_{number:012d}.jpg", "coco_url": "", "height": 400, "width": 640, "date_captured": "2013-11-14 16:28:13", "flickr_url": "", "id": number} for number in numbers][::-1],
               "licenses": [{"url": "", "id": 3, "name": "Attribution-NonCommercial-NoDerivs License"}],
               "annotations": [{"image_id": number, "id": 1000 * (captions - k) + number, "caption": f"Caption {captions - k} of {number}. \n"} for k in range(captions) for number in numbers]}
    path = folder / "captions_val2014.json"
    path.write_text(json.dumps(content | changes))
    (folder / "val2014").mkdir(exist_ok=True)
    for number in numbers: (folder / "val2014" / f"COCO_val2014_{number:012d}.jpg").touch()
    return path, numbers


def test_coco_pictures_and_captions_are_in_the_order_of_their_numbers(tmp_path):
    path, numbers = coco(tmp_path)
    found = coco_captions(path, tmp_path / "val2014")
    assert [file for file, _ in found] == [tmp_path / "val2014" / f"COCO_val2014_{number:012d}.jpg" for number in numbers]
    assert [captions for _, captions in found] == [[f"Caption {k} of {number}." for k in (1, 2, 3)] for number in numbers]


def test_coco_pictures_that_lack_something(tmp_path):
    path, numbers = coco(tmp_path)
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"annotations": [note for note in content["annotations"] if note["image_id"] != 49] + [{"image_id": 49, "id": 9, "caption": "  "}]}))
    with pytest.warns(UserWarning, match="1 pictures have no caption and are left out: COCO_val2014_000000000049.jpg"): found = coco_captions(path, tmp_path / "val2014")
    assert len(found) == 4 and len(coco_prompts(path, 4)) == 4
    with pytest.raises(ValueError, match="count: expected at most the 4 pictures with captions"): coco_prompts(path, 5)
    (tmp_path / "val2014" / "COCO_val2014_000000000056.jpg").unlink()
    with pytest.raises(FileNotFoundError, match="lacks 1 of 5 pictures: COCO_val2014_000000000056.jpg"): coco_captions(path, tmp_path / "val2014")
    with pytest.raises(FileNotFoundError, match="is not a folder"): coco_captions(path, tmp_path / "val2015")


@pytest.mark.parametrize("changes, told", [
    ({"annotations": 3}, "has not the form"), ({"images": [{"id": 1}]}, "has not the form.*file_name"), ({"annotations": [{"image_id": 42, "id": 1}]}, "has not the form.*caption"),
    ({"annotations": [{"image_id": 42, "id": 1, "caption": None}]}, "has not the form"), ({"annotations": [{"image_id": 1, "id": 5, "caption": "a"}]}, "1 captions of pictures that it does not list, for instance annotation 5"),
    ({"images": [{"id": 1, "file_name": "a"}, {"id": 1, "file_name": "b"}], "annotations": []}, "twice"), ({"images": [{"id": 1, "file_name": "../a.jpg"}], "annotations": []}, "names of files without folders")])
def test_another_file_than_cocos_is_refused(tmp_path, changes, told):
    path, _ = coco(tmp_path, **changes)
    for read in (lambda: coco_captions(path, tmp_path / "val2014"), lambda: coco_prompts(path, 1)):
        with pytest.raises(ValueError, match=told): read()
    for content in ("", "[]", "{"):
        path.write_text(content)
        with pytest.raises(ValueError, match="damaged"): coco_prompts(path, 1)
    with pytest.raises(FileNotFoundError): coco_prompts(tmp_path / "nowhere.json", 1)


def test_prompts_are_random_pictures_with_one_of_their_captions(tmp_path):
    path, numbers = coco(tmp_path, 200)
    found = coco_prompts(path, 120, 3)
    own = {f"COCO_val2014_{number:012d}.jpg": {f"Caption {k} of {number}." for k in (1, 2, 3)} for number in numbers}
    assert len({prompt.file for prompt in found}) == 120 and all(prompt.caption in own[prompt.file] for prompt in found)
    assert found == coco_prompts(path, 120, 3) != coco_prompts(path, 120, 4) and found[:50] == coco_prompts(path, 50, 3)
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"images": content["images"][::-1], "annotations": content["annotations"][::-1]}))
    assert coco_prompts(path, 120, 3) == found  # the order of the file does not matter
    gone = int(found[7].file[-16:-4])
    path.write_text(json.dumps(content | {"images": [image for image in content["images"] if image["id"] != gone], "annotations": [note for note in content["annotations"] if note["image_id"] != gone]}))
    assert coco_prompts(path, 119, 3) == found[:7] + found[8:]  # one picture less changes nothing else


def test_prompts_choose_evenly(tmp_path):
    path, numbers = coco(tmp_path, 6)
    many = [prompt for seed in range(300) for prompt in coco_prompts(path, 2, seed)]
    files, nth = [sum(prompt.file.endswith(f"{number}.jpg") for prompt in many) for number in numbers], [sum(prompt.caption.startswith(f"Caption {k}") for prompt in many) for k in (1, 2, 3)]
    assert all(abs(count - 100) < 40 for count in files) and all(abs(count - 200) < 50 for count in nth)  # about four standard deviations
    for wrong in ({"count": 0}, {"seed": -1}, {"count": 7}):
        with pytest.raises(ValueError, match="count|seed"): coco_prompts(path, **{"count": 1} | wrong)


def test_thirty_thousand_prompts_come_soon(tmp_path):
    path, _ = coco(tmp_path, 1)
    images = [{"id": number, "file_name": f"{number}.jpg"} for number in range(40_504)]
    path.write_text(json.dumps({"images": images, "annotations": [{"id": number, "image_id": number // 5, "caption": str(number)} for number in range(5 * 40_504)]}))
    start = time.process_time()
    found = coco_prompts(path)
    assert len(found) == 30_000 and time.process_time() - start < 20
    assert all(int(prompt.caption) // 5 == int(prompt.file[:-4]) for prompt in found)


# ---- states beside pictures


class Spelled(TextEncoder):
    "One state for each letter: its number, its place, and how often the encoder was asked so far does not matter."
    def __init__(self, name="spelled", width=3, sign=1): self.name, self.width, self.longest, self.sign, self.asked = name, width, 40, sign, []

    def encode(self, captions):
        self.asked += captions
        tokens = torch.zeros(len(captions), self.longest, self.width)
        for row, text in zip(tokens, captions): row[:len(text), 0], row[:len(text), 1] = self.sign * torch.tensor([float(ord(letter)) for letter in text]), torch.arange(float(len(text)))
        return TextStates(tokens, torch.arange(self.longest) < torch.tensor([[len(text)] for text in captions]))

    def spans(self, caption): return [(place, place + 1) for place in range(len(caption))]


class Few(Dataset):
    "Pictures whose value is their number."
    def __init__(self, captions): self.captions = captions
    def __len__(self): return len(self.captions)
    def __getitem__(self, index): return {"x0": torch.full((3, 4, 4), index / 100)}


def spelled(states, there): return ["".join(chr(round(abs(value))) for value in row[mask, 0].tolist()) for row, mask in zip(states, there)]


SAID = ["dog", "a cat", "bird", "", "a cat", "an elephant", "x"]


def test_states_are_encoded_once_and_read_in_any_order(tmp_path):
    encoder = Spelled()
    stored = StoredStates(SAID, Cached(encoder, tmp_path), chunk=2)
    assert encoder.asked == ["dog", "a cat", "bird", "", "an elephant", "x"] and stored.computed == 6 and (stored.name, stored.width, stored.pooling) == ("spelled", 3, "mean")
    assert len(list(tmp_path.glob("*/*.safetensors"))) == 3
    for asked in (["x", "an elephant", "dog", "x"], ["a cat"], [""], SAID[::-1], ["", "bird"]):
        found, wanted = stored.rows(asked), Spelled().encode(asked)
        longest = max(1, *map(len, asked), *[1])
        assert spelled(found.tokens, found.there) == asked and torch.equal(found.tokens, wanted.tokens[:, :longest]) and torch.equal(found.there, wanted.there[:, :longest])
        assert found.tokens.dtype == torch.float32
    again = StoredStates(SAID + ["new"], Cached(encoder, tmp_path))
    assert encoder.asked[6:] == ["new"] and again.computed == 1 and spelled(*(lambda s: (s.tokens, s.there))(again.rows(["new", "bird"]))) == ["new", "bird"]
    assert StoredStates(["x"], Cached(Spelled("other"), tmp_path)).computed == 1  # another encoder has other files
    with pytest.raises(ValueError, match="'a dog' is not among the 6 captions"): stored.rows(["dog", "a dog"])


def test_open_files_are_few_and_do_not_go_to_other_processes(tmp_path, monkeypatch):
    monkeypatch.setattr(captioned_pictures, "_FILES_AT_ONCE", 2)
    stored = StoredStates(SAID, Cached(Spelled(), tmp_path), chunk=1)
    found = stored.rows(SAID)
    assert spelled(found.tokens, found.there) == SAID and len(stored._open) <= 2 and stored.__getstate__()["_open"] == {} and stored._open


@pytest.mark.parametrize("damage", [lambda file: file.write_bytes(file.read_bytes()[:-40]), lambda file: file.write_bytes(b""), lambda file: file.write_bytes(b"\x00" * 500)])
def test_a_damaged_file_of_states_is_named(tmp_path, damage):
    StoredStates(SAID, Cached(Spelled(), tmp_path))
    [file] = tmp_path.glob("*/*.safetensors")
    damage(file)
    with pytest.raises(ValueError, match=rf"{file.name} is damaged .* delete it"): StoredStates(SAID, Cached(Spelled(), tmp_path))


def test_a_batch_has_pictures_and_states_in_one_order(tmp_path):
    data = EncodedPictures(Few(SAID), {"t5": Spelled(), "clip": Spelled("negative", 5, -1)}, tmp_path)
    assert len(data) == 7 and "__getitem__" not in vars(EncodedPictures)
    for chosen in ([5, 0, 2], [1, 4], [6], [3], [6, 5, 4, 3, 2, 1, 0]):
        batch, longest = data.__getitems__(chosen), max(1, max(len(SAID[number]) for number in chosen))
        assert list(batch) == ["x0", "t5", "t5_there", "clip", "clip_there"]
        assert batch["t5"].shape == (len(chosen), longest, 3) and batch["clip"].shape == (len(chosen), longest, 5) and batch["t5_there"].dtype == torch.bool
        for name in ("t5", "clip"): assert spelled(batch[name], batch[f"{name}_there"]) == [SAID[number] for number in chosen]
        assert [round(100 * picture.mean().item()) for picture in batch["x0"]] == chosen and (batch["clip"][..., 0] <= 0).all()


def test_a_batch_keeps_what_else_pictures_have(tmp_path):
    data = Few(SAID)
    data.__class__ = type("Labelled", (Few,), {"__getitem__": lambda self, index: Few.__getitem__(self, index) | {"class_label": index}})
    assert EncodedPictures(data, {"t5": Spelled()}, tmp_path).__getitems__([4, 2])["class_label"].tolist() == [4, 2]


def test_a_cached_encoder_is_taken_as_it_is(tmp_path):
    cached = Cached(Spelled(), tmp_path / "mine")
    EncodedPictures(Few(SAID), {"t5": cached}, tmp_path / "other")
    assert cached.computed == 6 and not (tmp_path / "other").exists()


@pytest.mark.parametrize("data, encoders, kind, told", [
    (Few(SAID), {}, ValueError, "encoders"), (Few(SAID), [Spelled()], TypeError, "encoders: expected names and encoders"), (Few(SAID), {"x0": Spelled()}, ValueError, "'x0'"),
    (Few(SAID), {"a_there": Spelled()}, ValueError, "'a_there'"), (Few(SAID), {"a b": Spelled()}, ValueError, "'a b'"), (Few(SAID), {3: Spelled()}, ValueError, "got 3"), (Few(SAID), {"a": 3}, TypeError, "expected a TextEncoder as 'a'"),
    ([1, 2], {"a": Spelled()}, ValueError, "data: expected `captions`, one for each of its 2 pictures")])
def test_data_and_encoders_are_checked_before_any_work(tmp_path, data, encoders, kind, told):
    with pytest.raises(kind, match=told): EncodedPictures(data, {"good": Spelled(), **encoders} if isinstance(encoders, dict) and encoders else encoders, tmp_path / "states")
    assert not (tmp_path / "states").exists()
    uneven = Few(SAID)
    uneven.__class__ = type("Uneven", (Few,), {"__len__": lambda self: 3})
    with pytest.raises(ValueError, match="one for each of its 3 pictures"): EncodedPictures(uneven, {"a": Spelled()}, tmp_path / "states")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_model_can_be_trained_on_it(tmp_path, workers):
    shards(tmp_path)
    data, seen = EncodedPictures(CaptionedTars(tmp_path, 8), {"t5": Spelled()}, tmp_path / "states"), []
    def loss(model, batch, draws):
        said = [int(text.split()[1]) for text in spelled(batch["t5"], batch["t5_there"])]
        seen.extend(zip(said, ((batch["x0"].mean((1, 2, 3)) + 1) * 127.5).round().tolist()))
        return (model(batch["x0"].mean((2, 3))) - draws.normal(batch["x0"])[:, 0, 0, :1]).square().mean(1)
    fit(nn.Linear(3, 1), loss, data, TrainingConfig(steps=3, batch_size=6), workers=workers)
    assert len(seen) == 18 and len({said for said, _ in seen}) == 9 and all(abs(said - found) <= 2 for said, found in seen)
    [first] = [batch for batch in DataLoader(data, batch_sampler=[[8, 0]], collate_fn=collate)]
    assert spelled(first["t5"], first["t5_there"]) == ["level 160", "level 0"]


# ---- conditions for super-resolution


def pictures(count=4, height=32, width=32, seed=0):
    coarse = torch.rand(count, 3, height // 4 + 1, width // 4 + 1, generator=seeded(seed)) * 2 - 1
    return F.interpolate(coarse, size=(height, width), mode="bilinear").clamp(-1, 1)


def test_enlarging_is_bilinear_between_centres():
    low = torch.tensor([[[[0.0, 1.0]]]])
    assert enlarged(low, (1, 8))[0, 0, 0].tolist() == [0, 0, 0.125, 0.375, 0.625, 0.875, 1, 1]
    some = pictures(2, 8, 12)
    assert torch.equal(enlarged(some, (8, 12)), some) and enlarged(some, (16, 30)).shape == (2, 3, 16, 30) and enlarged(some, 12).shape == (2, 3, 12, 12)
    assert torch.allclose(enlarged(some, (32, 48)), F.interpolate(some, size=(32, 48), mode="bilinear", antialias=True), atol=1e-5)  # what `conditioning_image` does
    for size in (11, (7, 12), (8,), (8, 11)):
        with pytest.raises(ValueError, match="size: expected height and width of at least"): enlarged(some, size)
    with pytest.raises(ValueError, match="low"): enlarged(some[0], 16)


def test_noise_has_the_level_that_is_asked_for_and_none_is_none():
    low, noise = pictures(), torch.randn(4, 3, 32, 32, generator=seeded())
    levels = torch.tensor([0.0, 0.1, 0.5, 80.0])
    found = noisy_condition(low, levels, noise)
    assert torch.equal(found[0], low[0]) and torch.equal(noisy_condition(low, 0.0, noise), low) and torch.equal(noisy_condition(low, 0, noise), low)
    assert torch.allclose(found, low + levels[:, None, None, None] * noise) and torch.allclose(noisy_condition(low, 0.1, noise)[1], found[1])
    for level in (-0.1, float("nan"), float("inf"), torch.ones(3), torch.tensor([0, 0, 0, -1.0]), torch.ones(4, 1)):
        with pytest.raises(ValueError, match="level"): noisy_condition(low, level, noise)
    with pytest.raises(ValueError, match="noise: expected the shape of low"): noisy_condition(low, 0.1, noise[:2])
    with pytest.raises(ValueError, match="low: expected values in"): noisy_condition(low * 200, 0.1, noise)


KINDS = {"blur": blurred, "resize": lambda images, amount: resized(images, amount, (torch.arange(len(images)) % 2).float()), "jpeg": compressed,
         "noise": lambda images, amount: grainy(images, amount, torch.randn(images.shape, generator=seeded(7), dtype=images.dtype))}


@pytest.mark.parametrize("kind", DAMAGES)
@pytest.mark.parametrize("shape", [(32, 32), (20, 33)])
def test_every_kind_of_damage_starts_at_none_and_grows(kind, shape):
    images, damage = pictures(1, *shape).expand(6, -1, -1, -1).contiguous(), KINDS[kind]
    before = images.clone()
    assert torch.equal(damage(images, torch.zeros(6)), images)
    if kind == "resize": damage = lambda images, amount: resized(images, amount, torch.zeros(6))
    found = damage(images, torch.linspace(0, 1, 6))
    lost = (found - images).square().mean((1, 2, 3))
    assert found.shape == images.shape and found.abs().max() <= 1 and lost[0] == 0 and (lost.diff() > 0).all() and torch.equal(images, before)
    assert damage(images.double(), torch.linspace(0, 1, 6)).dtype == torch.float64


@pytest.mark.parametrize("kind", DAMAGES)
def test_what_happens_to_an_image_does_not_depend_on_the_others(kind):
    images, amount, chance = pictures(6), torch.tensor([0.9, 0.0, 0.35, 1.0, 0.02, 0.6]), torch.tensor([0.1, 0.9, 0.7, 0.2, 0.6, 0.4])
    noise = torch.randn(images.shape, generator=seeded(1))
    damage = {"blur": lambda k: blurred(images[k], amount[k]), "resize": lambda k: resized(images[k], amount[k], chance[k]), "noise": lambda k: grainy(images[k], amount[k], noise[k]), "jpeg": lambda k: compressed(images[k], amount[k])}[kind]
    assert torch.allclose(damage(slice(0, 6)), torch.cat([damage(slice(k, k + 1)) for k in range(6)]), atol=1e-4)


def test_damage_of_one_is_what_the_constants_say():
    images, full = pictures(2), torch.ones(2)
    noise = torch.randn(images.shape, generator=seeded())
    assert torch.allclose(blurred(images, full), gaussian_blur(images, torch.full((2,), BLUR)), atol=1e-6) and torch.allclose(compressed(images, full), jpeg(images, WORST).clamp(-1, 1), atol=1e-5)
    assert torch.allclose(grainy(images, full, noise), (images + GRAIN * noise).clamp(-1, 1)) and torch.allclose(compressed(images, full / 7), jpeg(images, 90).clamp(-1, 1), atol=1e-5)
    half = F.interpolate(images, size=(16, 16), mode="bilinear", antialias=True)
    back = [F.interpolate(half, size=(32, 32), mode=mode).clamp(-1, 1) for mode in ("bilinear", "bicubic")]
    assert torch.allclose(resized(images, full, torch.tensor([0.0, 1.0])), torch.stack([back[0][0], back[1][1]]), atol=1e-6) and not torch.allclose(*back, atol=1e-3)
    flat = torch.full((1, 3, 20, 20), 0.3)
    for damage in (KINDS["blur"], KINDS["resize"]): assert torch.allclose(damage(flat, torch.ones(1)), flat, atol=1e-5)


@pytest.mark.parametrize("amount", [torch.ones(3), torch.tensor([0.5, 1.5]), torch.tensor([-0.1, 0]), torch.tensor([float("nan"), 0]), 0.5])
def test_an_amount_is_a_number_from_0_to_1_for_each_image(amount):
    for damage in (*KINDS.values(), lambda images, amount: resized(images, torch.ones(2), amount)):
        with pytest.raises(ValueError, match="amount: expected 2 numbers from 0 to 1"): damage(pictures(2), amount)


def test_random_damage_is_repeatable_and_none_at_0():
    images = pictures(8)
    found = degraded(images, at(1))
    assert torch.equal(found, degraded(images, at(1))) and not torch.equal(found, degraded(images, at(2))) and found.abs().max() <= 1
    assert torch.equal(degraded(images, at(1), 0.0), images) and torch.equal(degraded(images, at(1), 0), images) and torch.equal(degraded(images, at(1), kinds=()), images)
    lost = [(degraded(images, at(1), strength) - images).square().mean().item() for strength in (0.1, 0.3, 0.6, 1.0)]
    assert lost == sorted(lost) and lost[0] > 0 and len({round(value, 6) for value in (found - images).square().mean((1, 2, 3)).tolist()}) == 8
    pieces = torch.cat([degraded(images[2 * piece:2 * piece + 2], at(1, 4, piece)) for piece in range(4)])
    assert (pieces - found).square().mean() < 1e-4


def test_each_kind_alone_is_what_was_drawn_for_it():
    images, draws = pictures(5, 20, 24), at(3)
    like = images[:, 0, 0, 0]
    amount = {kind: draws.uniform(like) for kind in DAMAGES}
    chance, noise = draws.uniform(like), draws.normal(images)
    step = {"blur": lambda x, s: blurred(x, s * amount["blur"]), "resize": lambda x, s: resized(x, s * amount["resize"], chance), "noise": lambda x, s: grainy(x, s * amount["noise"], noise), "jpeg": lambda x, s: compressed(x, s * amount["jpeg"])}
    for strength in (0.5, 1.0):
        for kind in DAMAGES: assert torch.equal(degraded(images, at(3), strength, (kind,)), step[kind](images, strength))
        whole = images
        for kind in DAMAGES: whole = step[kind](whole, strength)
        assert torch.equal(degraded(images, at(3), strength), whole) and torch.equal(degraded(images, at(3), strength, DAMAGES[::-1]), whole)


@pytest.mark.parametrize("images, options, told", [
    (pictures(2), {"strength": -0.1}, "strength"), (pictures(2), {"strength": 1.1}, "strength"), (pictures(2), {"kinds": ("blur", "rain")}, "kinds: expected one of blur, resize, noise, jpeg; got 'rain'"),
    (pictures(2)[:, :1], {}, "low: expected colour images"), (pictures(2) * 9, {}, "low: expected values in"), (pictures(2)[0], {}, "low: expected 4 dimensions")])
def test_damage_that_cannot_be_says_why(images, options, told):
    with pytest.raises(ValueError, match=told): degraded(images, at(), **options)


# ---- crops


def coordinates(count, height, width, factor):
    "Images that say where their pixels are, in small pixels, and which image it is."
    rows, columns = torch.arange(height) // factor, torch.arange(width) // factor
    return torch.stack([torch.stack([rows[:, None].expand(height, width), columns.expand(height, width), torch.full((height, width), number)]) for number in range(count)]).float()


@pytest.mark.parametrize("shape, factor, size", [((12, 12), 4, 8), ((8, 20), 2, 6), ((9, 9), 3, 3), ((16, 16), 1, 5)])
def test_crops_are_of_the_same_place(shape, factor, size):
    high, low = coordinates(64, *shape, factor), coordinates(64, shape[0] // factor, shape[1] // factor, 1)
    large, small = matching_crops(high, low, size, at(1))
    assert large.shape == (64, 3, size, size) and small.shape == (64, 3, size // factor, size // factor)
    assert torch.equal(large, small.repeat_interleave(factor, 2).repeat_interleave(factor, 3)) and (small[:, 2] == torch.arange(64.0)[:, None, None]).all()
    for axis, room in ((0, (shape[0] - size) // factor), (1, (shape[1] - size) // factor)): assert set(small[:, axis, 0, 0].tolist()) == set(range(room + 1)), "every place, both ends too"
    assert (small[:, 0].diff(dim=1) == 1).all() and (small[:, 1].diff(dim=2) == 1).all()
    again = matching_crops(high, low, size, at(1))
    assert torch.equal(large, again[0]) and not torch.equal(large, matching_crops(high, low, size, at(2))[0])
    pieces = [matching_crops(high[32 * k:32 * k + 32], low[32 * k:32 * k + 32], size, at(1, 2, k))[0] for k in range(2)]
    assert torch.equal(torch.cat(pieces), large)


def test_a_crop_of_everything_is_everything():
    high, low = pictures(2, 16, 16), pictures(2, 4, 4)
    assert all(torch.equal(a, b) for a, b in zip(matching_crops(high, low, 16, at()), (high, low)))
    assert matching_crops(high, low[:, :1], 8, at())[1].shape == (2, 1, 2, 2)  # the small one may have other channels


@pytest.mark.parametrize("high, low, size, told", [
    ((2, 3, 16, 16), (2, 3, 5, 5), 8, "low: expected sides"), ((2, 3, 16, 16), (2, 3, 4, 8), 8, "low: expected sides"), ((2, 3, 16, 16), (1, 3, 4, 4), 8, "low: expected as many images"), ((2, 3, 16, 16), (2, 3, 4, 4), 6, "multiple of 4"),
    ((2, 3, 16, 16), (2, 3, 4, 4), 20, "size"), ((2, 3, 16, 16), (2, 3, 4, 4), 0, "size"), ((2, 3, 4, 4), (2, 3, 16, 16), 4, "low: expected sides"), ((3, 16, 16), (2, 3, 4, 4), 8, "high")])
def test_crops_that_cannot_match_are_refused(high, low, size, told):
    with pytest.raises(ValueError, match=told): matching_crops(torch.zeros(high), torch.zeros(low), size, at())


# ---- the module


def test_the_module_needs_torch_and_numpy_alone():
    done = subprocess.run([sys.executable, "-c", BARE + "import diffusion_papers.topics.captioned_pictures as found\nprint(found.split_name('a/b.JPG'))"], capture_output=True, text=True, cwd="/", env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "('a/b', '.jpg')"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_damage_and_crops_on_a_gpu():
    images, here = pictures(4), "cuda"
    draws = Draws(torch.Generator(here).manual_seed(0))
    found = degraded(images.to(here), draws)
    assert found.device.type == here and found.abs().max() <= 1 and torch.equal(degraded(images.to(here), draws, 0.0), images.to(here))
    high, low = coordinates(8, 16, 16, 4).to(here), coordinates(8, 4, 4, 1).to(here)
    large, small = matching_crops(high, low, 8, draws)
    assert torch.equal(large, small.repeat_interleave(4, 2).repeat_interleave(4, 3)) and noisy_condition(images.to(here), torch.ones(4), images.to(here)).device.type == here
