"""Folders and labels as people bring them: litter, links, classes, other archives, labels that count from 1; drawn at random, with the right answer beside."""
import os
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path

from extras import need

need("train", "data", "dev")

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from PIL import Image
from torch.utils.data import Subset

from diffusion_papers import dpdm, genie, i2sb
from diffusion_papers.core.data import ImageFolder, Mirrored, RowsOfImages, TensorSet, cifar_folder, cifar_images, check_data_labels, find_pictures
from diffusion_papers.core.diffusion import MODELS, DiffusionConfig, load_data, train_denoiser
from diffusion_papers.topics.shapes_world import SCENES

LITTER = (".DS_Store", "Thumbs.db", "desktop.ini", "._cat.jpg", ".cat.png", ".ipynb_checkpoints/cat.png", ".ipynb_checkpoints/deep/cat.png",
          "__MACOSX/cat.png", "@eaDir/cat.jpg", ".git/cat.png")
OTHERS = ("list.txt", "labels.csv", "README", "cat.jpg.bak", "cat.jpg~", "cat.mp4")


def many(count): return settings(max_examples=count, deadline=None, derandomize=True)


def picture(path, level=128):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (4, 4), level).save(path, "png")


def quietly(*arguments, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ImageFolder(*arguments, **options)


@many(80)
@given(data=st.data())
def test_a_folder_is_its_pictures_and_classes_whatever_else_lies_in_it(data):
    draw = lambda strategy, label: data.draw(strategy, label=label)
    with tempfile.TemporaryDirectory() as place:
        root, store = Path(place, draw(st.sampled_from(["photos", ".cache", "album.jpg"]), "root")), Path(place, "store")
        root.mkdir(), store.mkdir()
        classes = draw(st.lists(st.sampled_from(["album.jpg", "cats", "dogs", "Zebras", "a b", "10", "9"]), max_size=4, unique=True), "classes")
        linked = {name for name in classes if draw(st.booleans(), f"{name} is a link")}
        right = []  # path as it is found, class, level
        for name in classes or [""]:
            home = root if not name else store / name if name in linked else root / name
            home.mkdir(parents=True, exist_ok=True)
            if name in linked: (root / name).symlink_to(home, target_is_directory=True)
            for number in range(draw(st.integers(1, 3), "pictures")):
                inner = draw(st.sampled_from(["", "deep/", "deep.png/deeper/"]), "depth") if name else ""
                ending = draw(st.sampled_from([".png", ".JPG", ".jpeg", ".tif", ".WebP", ".bmp", ".gif"]), "ending")
                level = draw(st.integers(0, 255), "level")
                picture(home / f"{inner}{number}{ending}", level)
                right.append((root / name / f"{inner}{number}{ending}", name, level))
            for litter in draw(st.lists(st.sampled_from(LITTER + OTHERS), max_size=4, unique=True), "litter"): picture(home / litter)
        for litter in draw(st.lists(st.sampled_from(LITTER + OTHERS), max_size=3, unique=True), "litter beside"): picture(root / litter)
        empty = draw(st.booleans(), "an empty class")
        if empty and classes: (root / "empty").mkdir()
        if draw(st.booleans(), "a circle"): (root / (classes[0] if classes else "")/ "back").symlink_to(root, target_is_directory=True)
        if draw(st.booleans(), "a link to a link") and classes: (root / classes[-1] / "again").symlink_to(root / classes[0], target_is_directory=True)

        found = quietly(root, 4)
        right.sort(key=lambda item: item[0])
        assert found.paths == [path for path, _, _ in right]
        assert found.classes == sorted(classes) and found.labels == [sorted(classes).index(name) if name else None for _, name, _ in right]
        assert found.counts == {name: sum(name == other for _, other, _ in right) for name in sorted(classes)}
        for index, (_, _, level) in enumerate(right):
            sample = found[index]
            assert (sample["x0"] - (level / 127.5 - 1)).abs().max() < 1e-6 and sample.get("class_label") == found.labels[index]
        assert (root / "empty" in found.ignored) == bool(empty and classes)
        assert str(len(right)) in found.report and all(name in repr(found) for name in classes)


def test_links_to_nowhere_are_named_and_circles_end(tmp_path):
    picture(tmp_path / "data" / "cats" / "0.png")
    for link in ("dogs", "cats/1.png", "cats/notes.txt"):
        (tmp_path / "data" / link).symlink_to(tmp_path / "gone")
        with pytest.raises(FileNotFoundError, match=f"folder: .*{link} is a link to .*gone, where nothing is"): ImageFolder(tmp_path / "data", 4)
        (tmp_path / "data" / link).unlink()
    (tmp_path / "data" / ".hidden").symlink_to(tmp_path / "gone")
    (tmp_path / "data" / "up").symlink_to(tmp_path)
    (tmp_path / "data" / "cats" / "self").symlink_to(tmp_path / "data" / "cats")
    with pytest.warns(UserWarning, match="2 left out .a link to what is read already: up, self"): data = ImageFolder(tmp_path / "data", 4)
    assert len(data) == 1 and data.classes == ["cats"]
    own = tmp_path / "data" / "loop"
    own.symlink_to(own)
    with pytest.raises(FileNotFoundError, match="loop is a link"): ImageFolder(tmp_path / "data", 4)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes with a name")
def test_pipes_are_left_out_and_said(tmp_path):
    picture(tmp_path / "cats" / "0.png")
    os.mkfifo(tmp_path / "cats" / "1.png"); os.mkfifo(tmp_path / "cats" / "notes")
    with pytest.warns(UserWarning, match="2 left out .a pipe or a device: 1.png, notes"): data = ImageFolder(tmp_path, 4)
    assert len(data) == 1 and data[0]["x0"].shape == (3, 4, 4)


def test_waste_baskets_of_servers_are_no_classes_and_every_ending_that_pillow_reads_is_a_picture(tmp_path):
    for number, name in enumerate(("#recycle", "@Recycle", "#snapshot", "RECYCLER", "Network Trash Folder", "cats")): picture(tmp_path / name / f"{number}.png")
    endings = ("apng", "mpo", "JPE", "j2k", "pbm", "pnm", "tga", "dib", "jpx")
    for ending in endings: picture(tmp_path / "dogs" / f"0.{ending}")
    (tmp_path / "dogs" / "1.RAF").touch()
    with pytest.warns(UserWarning, match="1 left out .a kind of picture that is not read: 1.RAF"): data = ImageFolder(tmp_path, 4)
    assert data.counts == {"cats": 1, "dogs": len(endings)} and all(len(data[index]["x0"]) == 3 for index in range(len(data)))


def test_two_links_to_one_folder_are_read_once(tmp_path):
    picture(tmp_path / "store" / "0.png")
    (tmp_path / "data").mkdir()
    for name in ("a", "b"): (tmp_path / "data" / name).symlink_to(tmp_path / "store")
    paths, ignored = find_pictures(tmp_path / "data")
    assert [path.parent.name for path in paths] == ["a"] and [path.name for path in ignored] == ["b"]


def test_what_is_no_folder_of_pictures_is_refused_by_what_was_found(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "litter" / ".ipynb_checkpoints").mkdir(parents=True)
    picture(tmp_path / "litter" / "._0.png")
    picture(tmp_path / "mixed" / "0.png")
    picture(tmp_path / "mixed" / "cats" / "1.png")
    for name, words in (("nowhere", "is not a folder"), ("empty", "holds no pictures"), ("litter", "holds no pictures.*2 left out .hidden.*_0.png"),
                        ("mixed", "both directly .1, for instance 0.png. and in subfolders .cats")):
        with pytest.raises((ValueError, FileNotFoundError), match=f"folder: .*{words}"): ImageFolder(tmp_path / name, 4)
    picture(tmp_path / "phone" / "cats" / "0.png")
    (tmp_path / "phone" / "cats" / "1.HEIC").touch()
    (tmp_path / "phone" / "dogs").mkdir()
    with pytest.warns(UserWarning, match="a kind of picture that is not read: 1.HEIC.*a folder without pictures: dogs"): ImageFolder(tmp_path / "phone", 4)


def test_litter_puts_nobody_into_a_private_data_set_twice(tmp_path):
    for name in ("cats/0.png", "cats/1.png", "dogs/0.png", "cats/._0.png", "cats/.ipynb_checkpoints/0-checkpoint.png", ".Trash/0.png", "__MACOSX/cats/._0.png"):
        picture(tmp_path / name)
    data = dpdm.load_data(dpdm.DpdmConfig(data="images", data_path=str(tmp_path)))
    assert len(data) == 3 and data.classes == ["cats", "dogs"]


def test_a_list_that_could_mean_several_pictures_is_refused(tmp_path):
    for name in ("cats/0.png", "dogs/0.png", "dogs/1.png"): picture(tmp_path / "data" / name)
    data = ImageFolder(tmp_path / "data", 4)
    (tmp_path / "list.txt").write_text("1.png 7\n")
    assert list(i2sb.listed(data, tmp_path / "list.txt").indices) == [2]
    (tmp_path / "list.txt").write_text("1.png\nelsewhere/0.png\n")
    with pytest.raises(ValueError, match="path: list.txt names 0.png, and 2 folders"): i2sb.listed(data, tmp_path / "list.txt")


# ---- labels


@many(60)
@given(data=st.data())
def test_a_label_outside_is_refused_with_its_place_before_the_first_step(data):
    classes, count = data.draw(st.integers(2, 26), label="classes"), data.draw(st.integers(1, 12), label="samples")
    labels = data.draw(st.lists(st.integers(0, classes - 1), min_size=count, max_size=count), label="labels")
    wrong = data.draw(st.sampled_from([None, -1, classes, classes + 3]), label="wrong")
    place = data.draw(st.integers(0, count - 1), label="place")
    if wrong is not None: labels[place] = wrong
    x0 = torch.zeros(count, 1, 4, 4)
    tensors = TensorSet(x0, class_label=torch.tensor(labels))
    rows = RowsOfImages([{"image": Image.new("L", (4, 4)), "label": label} for label in labels], 4, label="label")
    for data_set, where in ((tensors, place), (Mirrored(tensors), place), (rows, place), (Subset(tensors, list(range(count))[::-1]), count - 1 - place)):
        if wrong is None: assert check_data_labels(data_set, classes) is data_set
        else:
            with pytest.raises(ValueError, match=f"class_label: expected 0 to {classes - 1}, got {wrong} at place {where}"): check_data_labels(data_set, classes)
    assert check_data_labels(tensors, 0) is tensors  # a network without classes looks at none


def test_letters_that_count_from_one_say_how_to_mend_them():
    letters = TensorSet(torch.zeros(26, 1, 4, 4), class_label=torch.arange(1, 27))
    with pytest.raises(ValueError, match="got 26 at place 25; these count from 1, as those of EMNIST's letters do: subtract 1"): check_data_labels(letters, 26)
    with pytest.raises(ValueError, match="got 10 at place 1; in a network 10 means 'no class', in data only None does"):
        check_data_labels(TensorSet(torch.zeros(2, 1), class_label=torch.tensor([0, 10])), 10)
    with pytest.raises(ValueError, match="class_label: expected whole numbers .int64., got torch.float32"):
        check_data_labels(TensorSet(torch.zeros(2, 1), class_label=torch.zeros(2)), 10)


TINY = MODELS["digits"].override(**{"mlp.width": 8, "mlp.blocks": 1, "mlp.fourier": 4, "training.steps": 1, "training.batch_size": 4})


def wrong_batch():
    class OneByOne(torch.utils.data.Dataset):  # knows its labels only with its samples
        def __len__(self): return 4
        def __getitem__(self, index): return {"x0": torch.zeros(1, 8, 8), "class_label": torch.tensor(10 if index == 2 else 0)}
    return OneByOne()


def test_every_paper_that_trains_with_classes_refuses_such_labels(monkeypatch, tmp_path):
    from diffusion_papers.core import diffusion
    monkeypatch.setattr(diffusion, "load_data", lambda config: wrong_batch())
    monkeypatch.setattr(genie, "load_data", lambda config: wrong_batch())
    with pytest.raises(ValueError, match="class_label: expected 0 to 9, got 10 at place"): train_denoiser(TINY, device="cpu")
    config = genie.GenieConfig(diffusion=TINY, head_blocks=1).override(**{"head.steps": 1, "head.batch_size": 4})
    with pytest.raises(ValueError, match="class_label: expected 0 to 9, got 10 at place"):
        genie.train_head(config, diffusion.build_denoiser(TINY), device="cpu")
    private = TensorSet(torch.zeros(8, 1, 8, 8), class_label=torch.tensor([0, 1, 2, 10, 4, 5, 6, 7]))
    for public in (True, False):
        with pytest.raises(ValueError, match="class_label: expected 0 to 9, got 10 at place 3"):
            dpdm.train(dpdm.DpdmConfig(public=public), tmp_path / str(public), device="cpu", data=private)
        assert not (tmp_path / str(public) / "ledger.json").exists()
    with pytest.raises(ValueError, match="class_label: expected 0 to 9, got 10 at place 2"): dpdm.fetch(wrong_batch(), torch.arange(4), dpdm.DpdmConfig())


def test_a_folder_with_more_classes_than_the_network_is_refused_before_training(tmp_path):
    for number in range(3): picture(tmp_path / str(number) / "0.png")
    config = replace(SCENES, data="images", data_path=str(tmp_path)).override(**{"unet.classes": 2})
    with pytest.raises(ValueError, match="class_label: expected 0 to 1, got 2 at place 2"): load_data(config)
    assert len(load_data(config.override(**{"unet.classes": 3}))) == 3


def test_a_row_without_a_class_is_refused_by_its_number():
    rows = RowsOfImages([{"image": Image.new("L", (4, 4)), "label": label} for label in (0, None)], 4, label="label")
    with pytest.raises(ValueError, match="label: row 1 has no class"): rows[1]
    with pytest.raises(ValueError, match="got None at place 1; either all"): check_data_labels(rows, 3)
    with pytest.raises(ValueError, match="row 0: what came cannot be read|row 0: expected"):
        try: RowsOfImages([{"image": np.zeros((400, 400))}], 4)[0]
        except TypeError as error: raise ValueError(str(error)) from error
    with pytest.raises(ValueError, match="rows: expected one or more"): RowsOfImages([], 4)


# ---- CIFAR


def records(count, ahead=1): return np.concatenate([np.full((count, ahead), 3, dtype=np.uint8), np.zeros((count, 3072), dtype=np.uint8)], 1).tobytes()


def test_a_folder_without_the_binary_archive_says_which_is_read_and_the_other_way_in(tmp_path):
    right = "binary version.*cifar-10-binary.tar.gz.*{}.*datasets.*RowsOfImages"
    for number, (name, words) in enumerate({"data_batch_1": "pickled", "train.bin": "CIFAR-100", "cifar-10-batches-bin/data_batch_1.bin": "it lies in .*cifar-10-batches-bin",
                                            "cifar-10-binary.tar.gz": "must be unpacked", "train.parquet": "nothing of that"}.items()):
        path = tmp_path / str(number) / name
        path.parent.mkdir(parents=True)
        path.write_bytes(b"anything")
        for read in (lambda folder: load_data(DiffusionConfig(data="cifar10", data_path=folder)), lambda folder: dpdm.load_data(dpdm.DpdmConfig(data="cifar", data_path=folder)),
                     cifar_folder):
            with pytest.raises(ValueError, match="data_path: .*holds no data_batch_1.bin.*" + right.format(words)): read(str(tmp_path / str(number)))
    with pytest.raises(ValueError, match="data_path: .*it is not a folder"): cifar_folder(tmp_path / "nowhere")
    (tmp_path / "data_batch_1.bin").write_bytes(records(2)); (tmp_path / "._data_batch_2.bin").write_bytes(b"litter")
    assert len(cifar_folder(tmp_path)) == 2


def test_batches_of_the_other_cifar_and_cut_ones_are_refused(tmp_path):
    for name, content in {"ten": records(3), "hundred": records(3, 2), "cut": records(3)[:-5], "empty": b""}.items(): (tmp_path / name).write_bytes(content)
    assert len(cifar_images([tmp_path / "ten"])) == 3 and len(cifar_images([tmp_path / "hundred"], classes=100)) == 3
    for paths, classes, words in (([], 10, "paths: expected a list of files"), (str(tmp_path / "ten"), 10, "paths: expected a list of files"),
                                  ([tmp_path / "hundred"], 10, "CIFAR-100 has such records, read it with classes=100"),
                                  ([tmp_path / "ten"], 100, "CIFAR-10 has such records, read it with classes=10"),
                                  ([tmp_path / "ten", tmp_path / "cut"], 10, "cut: expected records of 3073 bytes, got 9214"), ([tmp_path / "empty"], 10, "got 0 bytes")):
        with pytest.raises(ValueError, match=words): cifar_images(paths, classes)


def test_labels_that_are_no_whole_numbers_one_a_sample_are_refused():
    for label, words in ((1.5, "1.5"), ("cat", "'cat'"), ("1", "'1'"), ((1, 2), r"\(1, 2\)")):
        with pytest.raises(ValueError, match=f"label: row 0 has the class {words}, expected a whole number"):
            RowsOfImages([{"image": Image.new("L", (4, 4)), "label": label}], 4, label="label")[0]
    for label in (1, np.int64(1), torch.tensor(1)):
        assert RowsOfImages([{"image": Image.new("L", (4, 4)), "label": label}], 4, label="label")[0]["class_label"] == 1
    for labels in (torch.eye(4).long(), torch.zeros(4, 1).long()):  # one-hot, or with a dimension too many
        with pytest.raises(ValueError, match="class_label: expected one number a sample"): check_data_labels(TensorSet(torch.zeros(4, 1), class_label=labels), 4)
