"""Pictures and masks as people bring them: every mode, orientation, profile, opacity and habit of an editor, drawn at random, with the right answer beside."""
import gc
import io
import os
import struct
import tempfile
import warnings
import zlib
from pathlib import Path

from extras import need

need("train", "data", "plots", "dev")

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from PIL import Image, ImageCms, ImageFilter
from test_i2sb import PICTURES

from diffusion_papers import i2sb
from diffusion_papers.__main__ import main
from diffusion_papers.core.data import ImageFolder, RowsOfImages
from diffusion_papers.core.pictures import MAX_PIXELS, Picture, fill_hidden, read_mask, read_picture, to_square, write_picture

TURNED = {1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1], 5: lambda a: a.swapaxes(0, 1),
          6: lambda a: np.rot90(a, 1), 7: lambda a: a[::-1, ::-1].swapaxes(0, 1), 8: lambda a: np.rot90(a, -1)}  # upright -> as a camera stores it


def many(count): return settings(max_examples=count, deadline=None, derandomize=True)


def levels(colour): return (colour.double() + 1).mul(127.5).permute(1, 2, 0).numpy()


def with_note(orientation):
    exif = Image.Exif()
    if orientation != 1: exif[0x0112] = orientation
    return exif


def drawn(draw, mode, shape):
    "Random pixels of a mode: what is stored (H, W, ...), the levels that are meant (H, W, 3), the opacity (H, W) or None, a palette."
    rng = np.random.default_rng(draw(st.integers(0, 10**6), label="pixels"))
    grey, colour, alpha = (rng.integers(0, 256, shape + more, dtype=np.uint8) for more in ((), (3,), ()))
    alpha[rng.random(shape) < 0.3] = 0
    as_colour = lambda values: np.repeat(np.asarray(values, dtype=np.float64)[..., None], 3, axis=-1)
    if mode == "1": return grey > 99, as_colour(255 * (grey > 99)), None
    if mode == "L": return grey, as_colour(grey), None
    if mode == "LA": return np.stack([grey, alpha], -1), as_colour(grey), alpha / 255
    if mode == "RGB": return colour, colour.astype(float), None
    if mode == "RGBA": return np.concatenate([colour, alpha[..., None]], -1), colour.astype(float), alpha / 255
    if mode == "CMYK": return np.concatenate([255 - colour, np.zeros_like(grey)[..., None]], -1), colour.astype(float), None
    if mode == "P": return grey % 5, rng.integers(0, 256, (5, 3), dtype=np.uint8), None
    if mode in ("I;16", "I"):
        values = rng.integers(0, 65536, shape)
        return values.astype(np.uint16 if mode == "I;16" else np.int32), as_colour(values / 257), None
    top = draw(st.sampled_from([1, 255]), label="white")
    values = rng.random(shape).astype(np.float32) * top
    values.flat[0] = top
    return values, as_colour(values.astype(np.float64) * 255 / top), None


def stored(values, mode, palette=None):
    if mode == "1": return Image.fromarray(values)
    image = Image.fromarray(np.ascontiguousarray(values), mode) if mode in ("P", "CMYK") else Image.fromarray(np.ascontiguousarray(values))
    if mode == "P": image.putpalette(palette.tobytes())
    assert image.mode == mode
    return image


@many(120)
@given(data=st.data())
def test_pictures_of_every_mode_and_orientation_come_in_as_they_are_meant(data):
    mode, ending = data.draw(st.sampled_from([(m, "png") for m in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")]
                                             + [(m, "tif") for m in ("1", "L", "LA", "RGB", "RGBA", "CMYK", "I;16", "I", "F")]
                                             + [("RGB", "webp"), ("RGBA", "webp")]), label="mode")
    shape = (data.draw(st.integers(2, 9), label="height"), data.draw(st.integers(2, 9), label="width"))
    orientation = data.draw(st.integers(1, 8), label="orientation")
    dpi = data.draw(st.sampled_from([None, (72, 72), (300, 150)]), label="dpi") if ending != "webp" else None
    raw, right, alpha = drawn(data.draw, mode, shape)
    palette = right if mode == "P" else None
    if mode == "P": right = palette[raw].astype(float)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"a.{ending}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            image = stored(TURNED[orientation](raw), mode, palette)
        image.save(path, exif=with_note(orientation), **({"dpi": dpi} if dpi else {}), **({"lossless": True, "exact": True} if ending == "webp" else {}))
        found = read_picture(path)
        found_levels = levels(found.colour)
        visible = np.ones(shape, dtype=bool) if alpha is None else alpha > 0
        assert found_levels.shape == right.shape and np.abs(found_levels - right)[visible].max(initial=0) < 1e-3
        if alpha is None: assert found.alpha is None
        else:
            assert np.abs(found.alpha[0].numpy() - alpha).max() < 1e-6
            if visible.any():  # nothing hidden surfaces: what stands there is between the visible values
                low, high = right[visible].min(0), right[visible].max(0)
                assert (found_levels > low - 1e-2).all() and (found_levels < high + 1e-2).all()
        wanted = None if dpi is None else dpi[::-1] if orientation > 4 else dpi
        assert found.dpi is None if wanted is None else np.allclose(found.dpi, wanted, atol=0.02)

        # the same picture in training, on a background, and written and read again
        side, background = min(shape), np.array([200, 40, 90])
        if shape[0] == shape[1]:
            on = right if alpha is None else background + alpha[..., None] * (right - background)
            assert np.abs(levels(to_square(path, side, tuple(background))) - on).max() < (1e-3 if alpha is None else 0.01)
        write_picture(Path(folder, "b.png"), found)
        again = read_picture(Path(folder, "b.png"))
        assert np.abs(levels(again.colour) - found_levels)[visible].max(initial=0) < 0.51 and (again.alpha is None) == (alpha is None)
        if alpha is not None: assert torch.equal(again.alpha, found.alpha)
        assert (again.dpi is None) == (wanted is None) and (wanted is None or np.allclose(again.dpi, wanted, atol=0.05))


def icc(primaries, gamma, space=b"RGB "):
    "A profile by hand (ICC version 2): columns of XYZ under D50 and one gamma; None for grey."
    fixed = lambda numbers: b"".join(struct.pack(">i", round(float(number) * 65536)) for number in numbers)
    curve = b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256)) + bytes(2)
    xyz = lambda numbers: b"XYZ " + bytes(4) + fixed(numbers)
    tags = {b"desc": b"desc" + bytes(4) + struct.pack(">I", 5) + b"test\0" + bytes(79), b"cprt": b"text" + bytes(4) + b"none\0" + bytes(3),
            b"wtpt": xyz((0.9642, 1.0, 0.8249))}
    if primaries is None: tags[b"kTRC"] = curve
    else:
        for name, column in zip((b"r", b"g", b"b"), np.transpose(primaries)): tags |= {name + b"TRC": curve, name + b"XYZ": xyz(column)}
    place, table, content = 132 + 12 * len(tags), b"", b""
    for name, part in tags.items():
        part += bytes(-len(part) % 4)
        table, content = table + name + struct.pack(">II", place + len(content), len(part)), content + part
    head = struct.pack(">I4sI4s4s4s", place + len(content), b"lcms", 0x02100000, b"mntr", b"GRAY" if primaries is None else space, b"XYZ ")
    head += struct.pack(">6H", 2020, 1, 1, 0, 0, 0) + b"acsp" + bytes(28) + fixed((0.9642, 1.0, 0.8249)) + bytes(48)
    return head + struct.pack(">I", len(tags)) + table + content


SRGB_XYZ = np.array([[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]])
WIDE = {"Display P3": np.array([[0.51512, 0.29198, 0.15710], [0.24120, 0.69225, 0.06657], [-0.00105, 0.04189, 0.78407]]),
        "Adobe RGB": np.array([[0.60974, 0.20528, 0.14919], [0.31111, 0.62567, 0.06322], [0.01947, 0.06087, 0.74457]]), "sRGB primaries": SRGB_XYZ}


def encoded(light):
    light = np.clip(light, 0, 1)
    return 255 * np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)


@many(40)
@given(space=st.sampled_from([*WIDE, "grey", "grey 16"]), gamma=st.sampled_from([1.0, 1.8, 2.2]), seed=st.integers(0, 10**6), alpha=st.booleans())
def test_colours_come_in_as_their_profile_means_them(space, gamma, seed, alpha):
    rng = np.random.default_rng(seed)
    if space.startswith("grey"):
        values = rng.integers(0, 65536, (6, 6)).astype(np.uint16) if space == "grey 16" else rng.integers(0, 256, (6, 6), dtype=np.uint8)
        right = encoded((values[..., None] / (65535 if space == "grey 16" else 255)) ** gamma).repeat(3, -1)
        image, profile = Image.fromarray(values), icc(None, gamma)
    else:
        values = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
        right = encoded((values / 255.0) ** gamma @ WIDE[space].T @ np.linalg.inv(SRGB_XYZ).T)
        image, profile = Image.fromarray(values), icc(WIDE[space], gamma)
    if alpha and space != "grey 16": image.putalpha(128)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.png")
        image.save(path, icc_profile=profile)
        found = levels(read_picture(path).colour)
        bright = right > 30  # where a step of a level in what is stored is not many levels in the result
        assert np.abs(found - right)[bright].max(initial=0) < 2 and np.abs(found - right).max() < 12
        write_picture(Path(folder, "b.png"), read_picture(path))
        with Image.open(Path(folder, "b.png")) as written: assert "srgb" in written.info
        assert np.abs(levels(read_picture(Path(folder, "b.png")).colour) - found).max() < 0.51  # what is written is read as it is
        os.mkdir(Path(folder, "train")); image.save(Path(folder, "train", "a.png"), icc_profile=profile)
        if not alpha: assert np.abs(levels(ImageFolder(Path(folder, "train"), 6)[0]["x0"]) - found).max() < 1e-3


def test_srgb_itself_changes_nothing_and_a_broken_profile_is_a_warning_that_names_the_file(tmp_path):
    values = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    image, own = Image.fromarray(values), ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for name, profile in {"own": own, "none": None}.items():
        image.save(tmp_path / f"{name}.png", **({"icc_profile": profile} if profile else {}))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert np.abs(levels(read_picture(tmp_path / f"{name}.png").colour) - values).max() < 1e-4
    for name, profile in {"broken": b"no profile at all", "cut": icc(SRGB_XYZ, 2.2)[:200], "of another kind": icc(None, 1.8)}.items():
        image.save(tmp_path / f"{name}.png", icc_profile=profile)
        with pytest.warns(UserWarning, match=f"{name}.png: its colour profile cannot be used"): found = read_picture(tmp_path / f"{name}.png")
        assert np.abs(levels(found.colour) - values).max() < 1e-4
    image.convert("L").save(tmp_path / "grey.png", icc_profile=own)  # common, and harmless
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.abs(levels(read_picture(tmp_path / "grey.png").colour)[..., 0] - np.asarray(image.convert("L"))).max() < 1e-4


def test_a_display_p3_photograph_costs_no_more_than_its_gamut(tmp_path):
    light = np.random.default_rng(3).random((16, 16, 3)) * 0.8 + 0.1  # colours of sRGB, stored for Display P3
    in_p3 = np.clip(light @ SRGB_XYZ.T @ np.linalg.inv(WIDE["Display P3"]).T, 0, 1) ** (1 / 2.2)
    Image.fromarray((255 * in_p3).round().astype(np.uint8)).save(tmp_path / "p3.png", icc_profile=icc(WIDE["Display P3"], 2.2))
    error = np.abs(levels(read_picture(tmp_path / "p3.png").colour) - encoded(light)).mean()
    assert error < 0.6


def identity(monkeypatch):
    "Restoring changes nothing: what comes out is what was read."
    monkeypatch.setattr(i2sb, "_restore_piece", lambda model, x1, *rest: x1)
    return i2sb.build(PICTURES)


def test_restoring_keeps_opacity_resolution_and_visible_colours_and_shows_nothing_hidden(tmp_path, monkeypatch):
    model, rng = identity(monkeypatch), np.random.default_rng(0)
    colour = rng.integers(100, 156, (20, 24, 3), dtype=np.uint8)
    alpha = np.full((20, 24), 255, dtype=np.uint8)
    alpha[5:12, 6:15], alpha[12:14] = 0, 100
    colour[alpha == 0] = (255, 0, 255)  # hidden
    Image.fromarray(np.dstack([colour, alpha])).save(tmp_path / "in.png", dpi=(240, 240))
    for task, scale in (("jpeg", 1), ("sr4x", 4)):
        restored = i2sb.restore(tmp_path / "in.png", task, model=model, calls=1, progress=False, output=tmp_path / "out.png")
        with Image.open(tmp_path / "out.png") as out:
            assert out.mode == "RGBA" and [round(number) for number in out.info["dpi"]] == [240, 240] and "srgb" in out.info
            pixels = np.asarray(out)
        assert restored.shape == (3, 20 * scale, 24 * scale) and pixels.shape[:2] == (20 * scale, 24 * scale)
        assert pixels[..., :3].max() < 160 and pixels[..., :3].min() > 95  # pink surfaces nowhere
        if scale == 1: assert (pixels[..., 3] == alpha).all() and (pixels[alpha > 0][:, :3] == colour[alpha > 0]).all()
        else: assert pixels[30, 40, 3] == 0 and pixels[2, 2, 3] == 255


def test_colours_behind_full_transparency_come_from_the_nearest_visible_ones():
    colour, alpha = torch.zeros(3, 16, 16), torch.zeros(1, 16, 16)
    colour[:, :, :3], alpha[:, :, :3] = 0.5, 1
    colour[:, :, 13:], alpha[:, :, 13:] = -0.5, 0.2
    colour[:, :, 3:13] = 99.0
    filled = fill_hidden(colour, alpha)
    assert torch.equal(filled[:, :, :3], colour[:, :, :3]) and filled.abs().max() <= 0.5 + 1e-6
    assert (filled[:, :, 4] > 0.2).all() and (filled[:, :, 11] < 0.2).all()
    assert (fill_hidden(colour, torch.zeros(1, 16, 16)) == 0).all()


def test_animated_and_paged_files_give_their_first_frame_and_say_so(tmp_path):
    frames = [Image.new("RGB", (9, 7), colour) for colour in ("red", "blue", "green")]
    (tmp_path / "train").mkdir()
    for ending in ("gif", "png", "webp", "tif", "mpo"):
        path = tmp_path / "train" / f"a.{ending}" if ending != "mpo" else tmp_path / "a.mpo"
        frames[0].save(path, save_all=True, append_images=frames[1:], **({"lossless": True} if ending == "webp" else {}))
        with pytest.warns(UserWarning, match=f"a.{ending}: of 3 pages or frames one is read, number 1"): found = read_picture(path)
        assert np.abs(levels(found.colour) - (255, 0, 0)).max() < 2
    data = ImageFolder(tmp_path / "train", 7)
    with pytest.warns(UserWarning, match="of 3 pages"): assert all(data[index]["x0"][0].min() > 0.98 for index in range(len(data)))


def test_files_are_closed(tmp_path):
    for ending in ("png", "jpg", "gif", "tif", "webp", "bmp"):
        Image.new("RGB", (8, 8), "red").save(tmp_path / f"a.{ending}")
    frames = [Image.new("L", (8, 8), level) for level in (0, 9)]
    frames[0].save(tmp_path / "pages.tif", save_all=True, append_images=frames[1:])
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:50])
    (tmp_path / "text.png").write_text("no picture")
    opened = lambda: len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    before, kept = opened(), []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        warnings.simplefilter("error", ResourceWarning)
        for path in sorted(tmp_path.iterdir()):
            for read in (read_picture, read_mask, lambda path: to_square(path, 4)):
                try: kept.append(read(path))
                except ValueError as error: kept.append(error)
        assert opened() == before
        gc.collect()


def test_what_lies_above_pillows_limit_has_a_way_in_that_names_itself(tmp_path, monkeypatch):
    limit = Image.MAX_IMAGE_PIXELS
    (tmp_path / "train").mkdir()
    path = tmp_path / "train" / "large.png"
    Image.new("L", (40, 30)).save(path)
    for allowed in (1199, 700):
        for read in (lambda: read_picture(path, max_pixels=allowed), lambda: ImageFolder(tmp_path / "train", 8, max_pixels=allowed)[0],
                     lambda: read_mask(path, max_pixels=allowed),
                     lambda: RowsOfImages([{"image": path}], 8, max_pixels=allowed)[0],
                     lambda: i2sb.restore(path, "jpeg", model=i2sb.build(PICTURES), max_pixels=allowed, progress=False)):
            with pytest.raises(ValueError, match=f"40 x 30 = 1,200 pixels, .*max_pixels={allowed}"): read()
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)  # as if it were a panorama
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_picture(path, max_pixels=1200).colour.shape == (3, 30, 40)
    assert Image.MAX_IMAGE_PIXELS == 500 and MAX_PIXELS == 2 * limit
    huge = tmp_path / "huge.png"  # 20,000 x 20,000 by its header, with nothing behind it
    head = struct.pack(">II5B", 20_000, 20_000, 8, 0, 0, 0, 0)
    chunk = lambda kind, content: struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    huge.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b""))
    with pytest.raises(ValueError, match=f"picture: .*huge.png has 20000 x 20000 = 400,000,000 pixels, .*max_pixels={MAX_PIXELS}; raise"): read_picture(huge)
    assert Image.MAX_IMAGE_PIXELS == 500


def test_the_limit_is_an_option_of_the_command_line(tmp_path, monkeypatch, capsys):
    i2sb.save_model(tmp_path / "model.safetensors", i2sb.build(PICTURES))
    Image.new("RGB", (40, 30), "red").save(tmp_path / "a.png")
    words = ["restore", "i2sb", str(tmp_path / "a.png"), "--task", "jpeg", "--model", str(tmp_path / "model.safetensors"),
             "--output", str(tmp_path / "out.png"), "--set", "calls=1"]
    assert main([*words, "max_pixels=1000"]) == 1 and "max_pixels=1000" in capsys.readouterr().err
    assert main([*words, "max_pixels=1200"]) == 0


@pytest.mark.parametrize("wrong, words", [
    (torch.zeros(1, 9, 8), r"\(3, H, W\), got shape \(1, 9, 8\)"), (torch.zeros(9, 8), r"got shape \(9, 8\)"), (torch.zeros(4, 9, 8), r"got shape \(4, 9, 8\)"),
    (torch.zeros(2, 3, 9, 8), r"one colour image.*got shape \(2, 3, 9, 8\)"), (torch.zeros(0, 3, 9, 8), r"got shape \(0, 3, 9, 8\)"),
    (torch.zeros(3, 0, 8), "at least one pixel"), (torch.zeros(()), "got shape"), (torch.full((3, 9, 8), 99.0), r"values in \[-1, 1\], got \[99, 99\]"),
    (torch.full((3, 9, 8), float("nan")), "finite"), (torch.zeros(3, 9, 8, dtype=torch.uint8), "floating-point"),
    (np.zeros((90, 80, 3)), r"a path.*got numpy.ndarray of shape \(90, 80, 3\)"), ([[0.5] * 80] * 90, "got a list of 90 values"),
    (None, "got None"), (7, "got 7"), (b"PNG" * 1000, "got a bytes")])
def test_pictures_that_do_not_fit_are_refused_by_name_without_their_content(wrong, words, tmp_path):
    with pytest.raises((ValueError, TypeError), match=words) as caught:
        i2sb.restore(wrong, "jpeg", model=i2sb.build(PICTURES), calls=1, progress=False, output=tmp_path / "out.png")
    assert str(caught.value).startswith("picture: ") and len(str(caught.value)) < 250 and not list(tmp_path.iterdir())


def test_models_and_masks_that_do_not_fit_are_refused_by_name(tmp_path):
    model, picture = i2sb.build(PICTURES), torch.zeros(3, 20, 30)
    with pytest.raises(ValueError, match="model: expected one for colour pictures, 3 channels, got 1"):
        i2sb.restore(picture, "sr2x-pool", model=i2sb.build(i2sb.CONFIGS["cpu"]), calls=1, progress=False)
    for mask, words in ((torch.zeros(2, 20, 30), r"mask: .*got shape \(2, 20, 30\)"), (torch.ones(20, 30), "mask: it takes every pixel"),
                        (torch.zeros(20, 30), "mask: it takes no pixel"), (torch.eye(20), "mask: expected 30 x 20 pixels.*got 20 x 20"),
                        (np.zeros((200, 300)), r"mask: .*numpy.ndarray of shape \(200, 300\)"), (torch.full((20, 30), 0.5), "mask: expected zeros and ones.*0.5"),
                        (torch.rand(20, 30), "600 values from"), (torch.zeros(()), r"mask: .*got shape \(\)"), ([[0] * 30] * 20, "mask: .*a list of 20 values")):
        with pytest.raises((ValueError, TypeError), match=words) as caught: i2sb.restore(picture, "inpaint", mask, model=model, calls=1, progress=False)
        assert len(str(caught.value)) < 250
    with pytest.raises(ValueError, match="task: expected one of .*numpy.ndarray"): i2sb.restore(picture, np.zeros(500), model=model)
    with pytest.raises(ValueError, match=r"x1: .*\(0, 3, 8, 8\)"): i2sb.restore_images(model, torch.zeros(0, 3, 8, 8))
    with pytest.raises(TypeError, match=r"mask: .*numpy.ndarray of shape \(1, 1, 8, 8\)"): i2sb.restore_images(model, torch.zeros(1, 3, 8, 8), np.zeros((1, 1, 8, 8)))


def test_an_output_that_cannot_be_written_is_refused_before_the_work(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(i2sb, "_restore_piece", lambda *anything: pytest.fail("the work began"))
    monkeypatch.setattr(i2sb, "shipped", lambda *anything: pytest.fail("the work began"))
    for output in (tmp_path / "a.jpg", tmp_path, tmp_path / "file" / "a.png"):
        with pytest.raises(ValueError, match="output: "): i2sb.restore(torch.zeros(3, 20, 30), "jpeg", output=output)


# ---- masks


def hole_of(rng, shape):
    "A random hole: a disc or a rectangle that is neither empty nor everything."
    rows, columns = np.mgrid[:shape[0], :shape[1]]
    centre, reach = rng.uniform(0.3, 0.7, 2) * shape, rng.uniform(4, 8)
    if rng.random() < 0.5: return np.hypot(rows - centre[0], columns - centre[1]) < reach
    return (np.abs(rows - centre[0]) < reach) & (np.abs(columns - centre[1]) < reach * 0.7)


def photograph(rng, shape): return rng.integers(0, 256, shape + (3,), dtype=np.uint8)


def as_values(low, high):
    return lambda hole, rng: Image.fromarray(np.where(hole, np.uint8(high), np.uint8(low)))


def as_paint(colour, opacity=255):
    return lambda hole, rng: Image.fromarray(np.dstack([np.full(hole.shape + (3,), colour, dtype=np.uint8),
                                                        np.where(hole, opacity, 0).astype(np.uint8)]))


def as_erased(hole, rng): return Image.fromarray(np.dstack([photograph(rng, hole.shape), np.where(hole, 0, 255).astype(np.uint8)]))


def as_labels(colours):
    def make(hole, rng):
        image = Image.fromarray(hole.astype(np.uint8)).convert("P")
        image.putdata(hole.astype(int).ravel().tolist()); image.putpalette(colours)
        return image
    return make


def as_palette_of_white_first(hole, rng):
    image = as_labels([255, 255, 255, 0, 0, 0])(~hole, rng)
    return image


WAYS = {"0 and 255": as_values(0, 255), "0 and 1": as_values(0, 1), "3 and 7": as_values(3, 7), "0 and 128": as_values(0, 128),
        "bits": lambda hole, rng: Image.fromarray(hole), "16 bits": lambda hole, rng: Image.fromarray(np.where(hole, 65535, 0).astype(np.uint16)),
        "16 bits, 0 and 1": lambda hole, rng: Image.fromarray(hole.astype(np.uint16)), "floats": lambda hole, rng: Image.fromarray(hole.astype(np.float32)),
        "RGB": lambda hole, rng: as_values(0, 255)(hole, rng).convert("RGB"), "opaque RGBA": lambda hole, rng: as_values(0, 255)(hole, rng).convert("RGBA"),
        "black and red": lambda hole, rng: Image.fromarray(hole[..., None] * np.array([200, 0, 0], dtype=np.uint8)),
        "black paint": as_paint((0, 0, 0)), "red paint": as_paint((255, 0, 0)), "white paint": as_paint((255, 255, 255)), "faint paint": as_paint((0, 90, 0), 90),
        "erased": as_erased, "labels": as_labels([0, 0, 0, 128, 0, 0]), "labels, white first": as_labels([255, 255, 255, 0, 0, 200]),
        "labels without colours": as_labels([7, 7, 7, 7, 7, 7]), "palette, white first": as_palette_of_white_first,
        "grey paint": lambda hole, rng: Image.merge("LA", [Image.new("L", hole.shape[::-1], 30), as_values(0, 255)(hole, rng)])}


@many(150)
@given(way=st.sampled_from(sorted(WAYS)), seed=st.integers(0, 10**6), orientation=st.integers(1, 8))
def test_masks_of_every_editor_give_the_hole_that_was_painted(way, seed, orientation):
    rng = np.random.default_rng(seed)
    hole = hole_of(rng, (24, 30))
    image = WAYS[way](TURNED[orientation](hole), rng)
    buffer = io.BytesIO()
    image.save(buffer, "tiff" if image.mode == "F" else "png", exif=with_note(orientation))
    found = read_mask(io.BytesIO(buffer.getvalue()), hole.shape)
    assert found.shape == (1, 1, *hole.shape) and (found[0, 0].numpy() == hole).all()
    with pytest.raises(ValueError, match="mask: expected 31 x 24 pixels, as the picture has, got 30 x 24"): read_mask(io.BytesIO(buffer.getvalue()), (24, 31))


@many(40)
@given(seed=st.integers(0, 10**6), way=st.sampled_from(["brush", "brush on transparent", "lossy paint", "eraser", "jpeg", "jpeg as png", "gif"]), quality=st.integers(40, 95))
def test_soft_edges_and_jpeg_noise_are_cut_at_half(seed, way, quality):
    rng = np.random.default_rng(seed)
    hole = hole_of(rng, (48, 56))
    share = Image.fromarray((255 * hole).astype(np.uint8)).filter(ImageFilter.GaussianBlur(0.6))  # as a brush is drawn
    right, buffer = np.asarray(share) > 127.5, io.BytesIO()
    colour = Image.new("RGB", share.size, (230, 20, 20))
    if way.endswith("transparent"): colour.putalpha(share); share = colour
    elif way == "eraser":
        share, alpha = Image.fromarray(photograph(rng, hole.shape)), share.point(lambda level: 255 - level)
        share.putalpha(alpha)
    elif way == "lossy paint":
        right, colour = hole, Image.new("RGBA", share.size)
        colour.paste((220, 30, 40, 255), mask=Image.fromarray((255 * hole).astype(np.uint8)))
        share = colour
    elif way.startswith("jpeg"):
        right, quality = hole, max(quality, 70) if way == "jpeg as png" else quality
        Image.fromarray((255 * hole).astype(np.uint8)).convert("RGB").save(buffer, "jpeg", quality=quality)
        share = Image.open(io.BytesIO(buffer.getvalue()))
        buffer = io.BytesIO()
    if way == "jpeg": share.save(buffer, "jpeg", quality="keep")
    elif way == "lossy paint": share.save(buffer, "webp", quality=quality)
    else: share.save(buffer, "gif" if way == "gif" else "png")
    found = read_mask(io.BytesIO(buffer.getvalue()))[0, 0].numpy() > 0
    assert (found != right).sum() <= (3 if way.startswith("jpeg") or way in ("gif", "lossy paint") else 0)


def grey(values): return Image.fromarray(np.asarray(values, dtype=np.uint8))


@many(40)
@given(seed=st.integers(0, 10**6), way=st.sampled_from(["photograph", "grey photograph", "gradient", "three labels", "a palette of three", "trimap", "0, 1 and 255",
                                                        "blurred", "empty", "full", "black", "transparent", "two paints", "constant opaque alpha"]))
def test_whatever_is_no_mask_is_refused_with_what_was_found(seed, way):
    rng, shape = np.random.default_rng(seed), (40, 50)
    hole, columns = hole_of(rng, shape), np.mgrid[:40, :50][1]
    third = columns > 42
    paints = np.dstack([np.where(columns[..., None] < 25, (255, 0, 0), (0, 0, 255)), 255 * hole]).astype(np.uint8)
    image = {"photograph": lambda: Image.fromarray(photograph(rng, shape)), "grey photograph": lambda: grey(rng.integers(0, 256, shape)),
             "gradient": lambda: grey(columns * 5), "three labels": lambda: grey(hole + 2 * (third & ~hole)),
             "a palette of three": lambda: as_labels([0, 0, 0, 128, 0, 0, 0, 128, 0])(hole + 2 * (third & ~hole), rng),
             "trimap": lambda: grey(np.where(hole, 255, np.where(third, 128, 0))), "0, 1 and 255": lambda: grey(np.where(third, 255, hole)),
             "blurred": lambda: grey(255 * hole).filter(ImageFilter.GaussianBlur(6)), "empty": lambda: grey(np.zeros(shape)), "full": lambda: grey(np.full(shape, 255)),
             "black": lambda: Image.new("1", (50, 40)), "transparent": lambda: Image.new("RGBA", (50, 40), (255, 255, 255, 0)),
             "two paints": lambda: Image.fromarray(paints) if len(np.unique(columns[hole] < 25)) == 2 else Image.new("L", (50, 40)),
             "constant opaque alpha": lambda: Image.new("RGBA", (50, 40), (9, 9, 9, 200))}[way]()
    with pytest.raises(ValueError, match="^mask: ") as caught: read_mask(image)
    text = str(caught.value)
    assert len(text) < 250 and any(word in text for word in ("values", "value", "transparent", "colours")), text


def test_the_command_says_how_many_pixels_it_takes_for_the_hole(tmp_path, monkeypatch, capsys):
    model = identity(monkeypatch)
    i2sb.save_model(tmp_path / "model.safetensors", model)
    hole = np.zeros((20, 30), dtype=bool); hole[3:8, 4:10] = True
    Image.new("RGB", (30, 20), "red").save(tmp_path / "a.png")
    as_paint((0, 0, 0))(hole, None).save(tmp_path / "mask.png")
    words = ["restore", "i2sb", str(tmp_path / "a.png"), "--task", "inpaint", "--mask", str(tmp_path / "mask.png"), "--model",
             str(tmp_path / "model.safetensors"), "--output", str(tmp_path / "out.png"), "--set", "calls=1"]
    assert main(words) == 0 and "mask.png: 30 of 600 pixels are taken for the hole" in capsys.readouterr().out
    Image.new("L", (30, 20)).save(tmp_path / "mask.png")
    (tmp_path / "out.png").unlink()
    assert main(words) == 1 and "mask: " in capsys.readouterr().err and not (tmp_path / "out.png").exists()


def test_a_written_tensor_has_neither_opacity_nor_resolution(tmp_path):
    write_picture(tmp_path / "a.png", torch.zeros(3, 4, 5))
    with Image.open(tmp_path / "a.png") as written: assert written.mode == "RGB" and "dpi" not in written.info and "srgb" in written.info
    with pytest.raises(ValueError, match="picture: "): write_picture(tmp_path / "b.png", Picture(torch.zeros(1, 4, 5)))
    assert not (tmp_path / "b.png").exists()


def test_twelve_bits_are_twelve_bits(tmp_path):
    right = np.array([0, 2048, 4095]) * 255 / 4095
    packed = bytes(b for first, second in [(0, 2048), (4095, 0)] for b in (first >> 4, (first & 15) << 4 | second >> 8, second & 255))
    tags = [(256, 3, 1, 4), (257, 3, 1, 1), (258, 3, 1, 12), (259, 3, 1, 1), (262, 3, 1, 1), (273, 4, 1, 8), (277, 3, 1, 1), (278, 3, 1, 1), (279, 4, 1, len(packed))]
    entries = b"".join(struct.pack("<HHI", tag, kind, count) + (struct.pack("<HH", value, 0) if kind == 3 else struct.pack("<I", value)) for tag, kind, count, value in tags)
    (tmp_path / "a.tif").write_bytes(b"II*\0" + struct.pack("<I", 8 + len(packed)) + packed + struct.pack("<H", len(tags)) + entries + bytes(4))
    assert np.allclose(levels(read_picture(tmp_path / "a.tif").colour)[0, :3, 0], right, atol=1e-3)


def write_tiff(path, values, photometric, planes=False):
    "An uncompressed TIFF by hand: grey (H, W), or colours (H, W, 3), perhaps each in a plane of its own."
    height, width, channels = (*values.shape, 1)[:3]
    content = (np.moveaxis(values, 2, 0) if planes else values).astype(values.dtype.newbyteorder("<")).tobytes()
    size, parts = values.dtype.itemsize, channels if planes else 1
    starts, lengths = [400 + number * len(content) // parts for number in range(parts)], [len(content) // parts] * parts
    tags, extra = {256: [width], 257: [height], 258: [8 * size] * channels, 259: [1], 262: [photometric], 273: starts, 277: [channels], 278: [height],
                   279: lengths, 284: [2 if planes else 1], 339: [3 if values.dtype.kind == "f" else 1] * channels}, b""
    entries = b""
    for tag, numbers in tags.items():
        packed = struct.pack(f"<{len(numbers)}I", *numbers)
        if len(packed) > 4: packed, extra = struct.pack("<I", 200 + len(extra)), extra + packed
        entries += struct.pack("<HHI", tag, 4, len(numbers)) + packed
    head = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4)
    path.write_bytes(head.ljust(200, b"\0") + extra.ljust(200, b"\0") + content)


@pytest.mark.parametrize("kind, white", [(np.uint8, 255), (np.uint16, 65535), (np.float32, 1)])
def test_white_is_white_whether_a_tiff_has_it_at_zero_or_at_the_top(tmp_path, kind, white):
    share = np.random.default_rng(0).integers(0, 256, (5, 6)) / 255
    share.flat[:2] = 0, 1
    for photometric, values in ((1, share), (0, 1 - share)):
        write_tiff(tmp_path / "a.tif", (values * white).round(6).astype(kind), photometric)
        assert np.abs(levels(read_picture(tmp_path / "a.tif").colour) - 255 * share[..., None]).max() < (1.01 if kind == np.uint8 else 0.01)
        assert np.abs(levels(to_square(tmp_path / "a.tif", 5)).mean() - 255 * share.mean()) < 20
        write_tiff(tmp_path / "mask.tif", (white * ((share > 0.5) == photometric)).astype(kind), photometric)
        assert (read_mask(tmp_path / "mask.tif")[0, 0].numpy() == (share > 0.5)).all()


def test_channels_in_planes_are_read_as_they_are_meant_or_refused(tmp_path):
    colour = np.random.default_rng(0).integers(0, 256, (5, 6, 3))
    for planes in (False, True):
        write_tiff(tmp_path / "a.tif", colour.astype(np.uint8), 2, planes)
        assert np.abs(levels(read_picture(tmp_path / "a.tif").colour) - colour).max() < 1e-3
    write_tiff(tmp_path / "a.tif", (257 * colour).astype(np.uint16), 2)
    assert np.abs(levels(read_picture(tmp_path / "a.tif").colour) - colour).max() < 1e-3
    write_tiff(tmp_path / "a.tif", (257 * colour).astype(np.uint16), 2, planes=True)  # Pillow would take halves of numbers for whole ones
    with pytest.raises(ValueError, match="picture: .*a.tif cannot be read as a picture .its channels have more than 8 bits and lie apart"): read_picture(tmp_path / "a.tif")


def write_png(path, values, depth, *chunks):
    "A grey or colour PNG of few or 8 bits by hand, with chunks (kind, content) before its pixels."
    chunk = lambda kind, content: struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    bits = np.unpackbits(values.astype(np.uint8).reshape(len(values), -1, 1), axis=2)[..., 8 - depth:].reshape(len(values), -1)
    rows = b"".join(b"\0" + np.packbits(row).tobytes() for row in bits)
    head = struct.pack(">II5B", values.shape[1], values.shape[0], depth, 2 if values.ndim == 3 else 0, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in [(b"IHDR", head), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]))


@pytest.mark.parametrize("depth", [1, 2, 4, 8])
def test_a_level_that_is_transparent_is_so_at_every_depth(tmp_path, depth):
    top = 2**depth - 1
    values = np.arange(32).reshape(4, 8) * 5 % (top + 1)
    for clear in {0, 1, top}:
        write_png(tmp_path / "a.png", values, depth, (b"tRNS", struct.pack(">H", clear)))
        found = read_picture(tmp_path / "a.png")
        assert (found.alpha is None) == (not (values == clear).any()) and (found.alpha is None or ((found.alpha[0].numpy() == 0) == (values == clear)).all())
        assert np.abs(levels(found.colour)[..., 0] - values * 255 / top)[values != clear].max() < 1e-3


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_tensors_of_every_precision_are_restored_and_carry_no_gradient(tmp_path, kind):
    colour = (torch.rand(3, 20, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1).to(kind).requires_grad_()
    found = i2sb.restore(colour, "jpeg", model=i2sb.build(PICTURES), calls=1, progress=False, output=tmp_path / "a.png")
    assert found.dtype == torch.float32 and not found.requires_grad and (tmp_path / "a.png").exists()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes with a name")
def test_what_is_no_file_is_refused_without_waiting_for_it(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")  # opening it would wait for a writer that never comes
    for name, place, words in (("pipe", tmp_path / "pipe.png", "a pipe or a device"), ("folder", tmp_path, "a folder")):
        for read in (read_picture, read_mask, lambda place: to_square(place, 4)):
            with pytest.raises(ValueError, match=f"^(picture|mask): .* cannot be read as a picture .it is {words}"): read(place)
    with pytest.raises(FileNotFoundError, match="picture: there is no ''"): read_picture("")


def soft_disc(shape=(48, 56)):
    "A disc with an antialiased edge, levels from 0 to 255, and where it is."
    rows, columns = np.mgrid[:8 * shape[0], :8 * shape[1]] / 8
    soft = Image.fromarray((255 * (np.hypot(rows - 24, columns - 28) < 12.3)).astype(np.uint8)).resize(shape[::-1], Image.Resampling.BOX)
    return np.asarray(soft), np.asarray(soft) > 127.5


@many(20)
@given(colour=st.sampled_from([(255, 255, 255), (255, 0, 0), (0, 0, 0), (20, 160, 60)]), behind=st.sampled_from([0, 255, None]), radius=st.integers(0, 6))
def test_paint_whose_edges_fade_into_black_or_white_is_paint(colour, behind, radius):
    soft, _ = soft_disc()
    alpha = np.asarray(Image.fromarray(soft).filter(ImageFilter.GaussianBlur(radius)))
    share = alpha[..., None] / 255
    levels = np.array(colour) * share + behind * (1 - share) if behind is not None else np.broadcast_to(colour, share.shape[:2] + (3,))
    found = read_mask(Image.fromarray(np.dstack([levels.round().astype(np.uint8), alpha])))[0, 0].numpy() > 0
    assert (found == (alpha > alpha.max() / 2)).all()


def test_a_black_and_white_mask_that_is_partly_transparent_has_two_readings_and_is_refused():
    soft, hole = soft_disc()
    stray, margin = np.full(hole.shape, 255), np.full(hole.shape, 255)
    stray[3, 3], margin[:, :5] = 0, 0
    for bright in (soft, 255 * hole):
        for alpha in (stray, margin):
            image = Image.fromarray(np.dstack([bright] * 3 + [alpha]).astype(np.uint8))
            with pytest.raises(ValueError, match="mask: .*what is opaque is black and white, and the rest is transparent"): read_mask(image)


@pytest.mark.parametrize("colour", [(255, 0, 0), (0, 0, 255), (0, 128, 0), (255, 0, 255)])
@pytest.mark.parametrize("form", ["two values", "soft", "jpeg", "palette"])
def test_a_colour_on_a_white_page_is_paint_and_so_is_one_on_black(colour, form):
    soft, hole = soft_disc()
    share = (soft if form in ("soft", "jpeg") else 255 * hole)[..., None] / 255
    for page in (255, 0):
        image, buffer = Image.fromarray((page + share * (np.array(colour) - page)).round().astype(np.uint8)), io.BytesIO()
        if form == "palette":
            image = as_labels([page, page, page, *colour])(hole, None)
        image.save(buffer, "jpeg" if form == "jpeg" else "png", **({"quality": 90, "subsampling": 0} if form == "jpeg" else {}))
        assert ((read_mask(buffer)[0, 0].numpy() > 0) != hole).mean() < 0.01


def test_two_values_are_a_mask_in_every_deep_mode():
    _, hole = soft_disc()
    for low, high, kind in ((0, 1000, np.float32), (-0.0, 0.25, np.float32), (5, 100_000, np.int32), (7, 4095, np.uint16), (0, 65535, np.float32)):
        assert (read_mask(Image.fromarray(np.where(hole, high, low).astype(kind)))[0, 0].numpy() == hole).all()
    for low, high in ((0, -1), (0, np.nan), (0, np.inf)):
        with pytest.raises(ValueError, match="mask: "): read_mask(Image.fromarray(np.where(hole, high, low).astype(np.float32)))


def points_of(space): return {"Display P3": (0.3127, 0.329, 0.68, 0.32, 0.265, 0.69, 0.15, 0.06), "Adobe RGB": (0.3127, 0.329, 0.64, 0.33, 0.21, 0.71, 0.15, 0.06),
                              "sRGB primaries": (0.3127, 0.329, 0.64, 0.33, 0.3, 0.6, 0.15, 0.06)}[space]


@many(40)
@given(space=st.sampled_from([None, *WIDE]), gamma=st.sampled_from([None, 1.0, 1.8, 2.2]), seed=st.integers(0, 10**6), grey=st.booleans())
def test_colours_that_a_png_describes_in_numbers_come_in_as_they_are_meant(space, gamma, seed, grey):
    values = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    if grey: values = values[..., 0]
    chunks = [(b"gAMA", struct.pack(">I", round(100_000 / gamma)))] if gamma else []
    if space: chunks.append((b"cHRM", struct.pack(">8I", *(round(100_000 * number) for number in points_of(space)))))
    decoded = (values[..., None].repeat(3, -1) if grey else values) / 255.0
    light = np.where(decoded <= 0.04045, decoded / 12.92, ((decoded + 0.055) / 1.055) ** 2.4) if gamma in (None, 2.2) else decoded**gamma
    right = encoded(light @ WIDE[space or "sRGB primaries"].T @ np.linalg.inv(SRGB_XYZ).T)
    with tempfile.TemporaryDirectory() as folder:
        write_png(Path(folder, "a.png"), values, 8, *chunks)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = levels(read_picture(Path(folder, "a.png")).colour)
        assert np.abs(found - right)[right > 30].max(initial=0) < 2 and np.abs(found - right).max() < 12
        if gamma in (None, 2.2) and space in (None, "sRGB primaries"): assert np.abs(found - 255 * decoded).max() < 1e-3  # as ever
        write_png(Path(folder, "b.png"), values, 8, (b"sRGB", b"\0"), *chunks)  # which counts more
        assert np.abs(levels(read_picture(Path(folder, "b.png")).colour) - 255 * decoded).max() < 1e-3


def test_numbers_that_mean_no_colours_are_a_warning_that_names_the_file(tmp_path):
    values = np.random.default_rng(0).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    for points in ((0,) * 8, (31270, 32900) * 4):
        write_png(tmp_path / "a.png", values, 8, (b"cHRM", struct.pack(">8I", *points)), (b"gAMA", struct.pack(">I", 100_000)))
        with pytest.warns(UserWarning, match="a.png: its colour profile cannot be used"): found = read_picture(tmp_path / "a.png")
        assert np.abs(levels(found.colour) - values).max() < 1e-3


def test_a_camera_that_notes_adobe_rgb_means_it(tmp_path):
    values = np.broadcast_to(np.array([[[90, 160, 70]], [[200, 120, 60]]], dtype=np.uint8).repeat(16, 0), (32, 16, 3))
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0xA001] = 0xFFFF
    exif.get_ifd(0x8769)[0xA005] = {1: "R03", 2: b"0100"}
    Image.fromarray(values).save(tmp_path / "a.jpg", quality=100, subsampling=0, exif=exif)
    right = encoded((values / 255.0) ** 2.2 @ WIDE["Adobe RGB"].T @ np.linalg.inv(SRGB_XYZ).T)
    assert np.abs(levels(read_picture(tmp_path / "a.jpg").colour) - right).max() < 5 and np.abs(values - right).max() > 20
    exif.get_ifd(0x8769)[0xA005] = {1: "R98", 2: b"0100"}
    Image.fromarray(values).save(tmp_path / "a.jpg", quality=100, subsampling=0, exif=exif)
    assert np.abs(levels(read_picture(tmp_path / "a.jpg").colour) - values).max() < 5


@pytest.mark.parametrize("wrong", ["8", None, (1, 2), torch.zeros(3), np.zeros(3), 1j])
def test_what_is_no_number_is_refused_by_its_arguments_name(tmp_path, wrong):
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    for name, call in {"size": lambda: to_square(tmp_path / "a.png", wrong), "max_pixels": lambda: read_picture(tmp_path / "a.png", max_pixels=wrong),
                       "background": lambda: to_square(tmp_path / "a.png", 4, (1, 2, wrong)),
                       "calls": lambda: i2sb.restore(tmp_path / "a.png", "jpeg", model=i2sb.build(PICTURES), calls=wrong)}.items():
        with pytest.raises(TypeError, match=f"^{name}: expected a number, got"): call()
    with pytest.raises(ValueError, match="background: expected red, green and blue, got 255"): to_square(tmp_path / "a.png", 4, 255)
