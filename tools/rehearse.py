"""The commands that a paper's page prints, rehearsed: `make rehearse PAPER=slug`, or `python tools/rehearse.py SLUG [PRESET ...]`.

A chain is a block of commands on the page whose first line names a preset; a table below it names further ones. For each, tiny files are
written in the formats that the real data have, and the commands are run as they stand, but for what `rehearsal.toml` lists. The first
training is killed when it has written its first checkpoint; the next command resumes it. What ran is stored in data/benchmarks.
"""
import functools
import gzip
import inspect
import io
import json
import os
import re
import shlex
import signal
import string
import subprocess
import sys
import tarfile
import tempfile
import time
import tomllib
import warnings
from itertools import pairwise
from pathlib import Path

import numpy as np
import psutil
import torch
from PIL import Image
from torch import nn

from diffusion_papers import dfno, i2sb
from diffusion_papers.core.networks import authors_keys
from diffusion_papers.topics.flax_weights import flax_tensors, write_msgpack
from diffusion_papers.topics.landmarks import write_video
from diffusion_papers.workbench.files import whole_file
from diffusion_papers.workbench.registry import evidence, paper, papers
from diffusion_papers.workbench.timing import measure, table_path

ROOT = Path(__file__).resolve().parents[1]
LIST = tomllib.loads((ROOT / "tools" / "rehearsal.toml").read_text(encoding="utf-8"))


# ---- what a page prints

def page(slug):
    "The text of a paper's notebook, without its code."
    [path] = (ROOT / "nbs" / "papers").glob(f"[0-9][0-9]_{slug}.ipynb")
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")


def chains(
    text: str,                            # of a page
) -> list[tuple[dict, list[str]]]:        # values of the words with a $, and commands
    "The chains of commands of a page, one for each row of the table below a block."
    found, blocks = [], list(re.finditer(r"^```\n(\w+=\S+(?: \w+=\S+)*)\n(.*?)\n```$", text, re.MULTILINE | re.DOTALL))
    for block, following in pairwise([*blocks, None]):
        values = dict(pair.split("=", 1) for pair in block[1].split())
        between = text[block.end():following.start() if following else len(text)].split("\n```", 1)[0]
        lines = re.findall(r"^\| (.*) \|$", between[:between.find("\n#") if "\n#" in between else None], re.MULTILINE)
        rows = [line.split(" | ") for line in lines]
        names = rows[0] if rows and rows[0][0] == "preset" else []
        found += [(values | dict(zip(names, row)), block[2].splitlines()) for row in (rows[1:] if names else [[]])]
    return found


def title(values): return " ".join(values[name] for name in ("preset", "task") if name in values)


# ---- what is changed in a command

def overrides(slug, command, preset):
    "The values of the list, as words for --set; those of a preset come last, so they count."
    listed = LIST[slug].get(command, {})
    chosen = {name: value for name, value in listed.items() if not isinstance(value, dict)} | listed.get(preset, listed.get(preset.split("_")[0], {}))
    return [f"{name}={json.dumps(value)}" for name, value in chosen.items()]


def takes(slug, words):
    "The values that a command would take, of those that are listed for several."
    if words[0] != "evaluate": return lambda name: True
    metric = evidence(slug).METRICS[words[words.index("--metric") + 1]]
    return lambda name: name in inspect.signature(metric.function).parameters


def rehearsed(
    line: str,       # a command as it is printed
    values: dict,    # of the words with a $
) -> list[str]:      # the program and its words
    "A printed command as it is rehearsed."
    line = string.Template(line).substitute(values).replace(LIST["launch"]["folder"] + "/", "data/")
    launcher, _, rest = line.partition("diffusion_papers ")
    words = shlex.split(rest)
    if "--device" in words: words[words.index("--device") + 1] = LIST["launch"]["device"]
    else: words += ["--device", LIST["launch"]["device"]]
    fits = takes(words[1], words)
    more = [pair for pair in overrides(words[1], words[0], values["preset"]) if fits(pair.split("=")[0])]
    several = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(LIST["launch"]["processes"])]
    return [sys.executable, *(several if launcher.startswith("accelerate launch") else []), "-m", "diffusion_papers", *words, *(["--set", *more] if more else [])]


# ---- tiny files in the formats of the real ones

def pictures(count, size, seed=0):
    "Smooth pictures, no two alike (N, H, W, 3), bytes."
    rough = np.random.default_rng(seed).integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)
    return [np.asarray(Image.fromarray(each).resize((size, size), Image.BICUBIC)) for each in rough]


def write_picture_folder(place, classes=("",), each=6):
    "JPEG files, in one subfolder a class; names as ImageNet's validation images have them."
    for number, name in enumerate(classes):
        (place / name).mkdir(parents=True, exist_ok=True)
        for index, pixels in enumerate(pictures(each, 96, number)):
            with whole_file(place / name / f"picture_{number * each + index:08d}.JPEG") as unfinished: Image.fromarray(pixels).save(unfinished, "JPEG")


def write_cifar(place):
    "The binary batches: a label and 3,072 bytes, channel by channel."
    place.mkdir(parents=True)
    for number, name in enumerate([*(f"data_batch_{batch}.bin" for batch in range(1, 6)), "test_batch.bin"]):
        records = [bytes([index % 10]) + pixels.transpose(2, 0, 1).tobytes() for index, pixels in enumerate(pictures(4, 32, number))]
        with whole_file(place / name) as unfinished: unfinished.write_bytes(b"".join(records))


def write_idx(place):
    "MNIST's four files, compressed: light strokes on black."
    place.mkdir(parents=True)
    for part, count in (("train", 40), ("t10k", 20)):
        images = np.zeros((count, 28, 28), np.uint8)
        for index in range(count): images[index, 4 + index % 5:24 - index % 7, 10:16] = 255
        for what, content in (("images-idx3", images), ("labels-idx1", np.arange(count, dtype=np.uint8) % 10)):
            head = bytes([0, 0, 8, content.ndim]) + b"".join(length.to_bytes(4, "big") for length in content.shape)
            with whole_file(place / f"{part}-{what}-ubyte.gz") as unfinished: unfinished.write_bytes(gzip.compress(head + content.tobytes()))


class Shades(nn.Module):
    "In the place of Inception: means and spreads of the channels; it knows the word that the real file knows."
    def forward(self, images, return_features: bool=False):
        levels = images.float() / 255
        return torch.cat([levels.mean((2, 3)), levels.std((2, 3))], dim=1)


class Colours(nn.Module):
    "In the place of a classifier: two classes."
    def forward(self, images): return images.mean((2, 3))[:, :2]


class Maps(nn.Module):
    "In the place of a VGG: the picture, and half of it."
    def forward(self, images): return [images, nn.functional.avg_pool2d(images, 2)]


def write_script(network, place):
    "A network as TorchScript."
    with warnings.catch_warnings(), whole_file(place) as unfinished:
        warnings.simplefilter("ignore")
        torch.jit.script(network).save(unfinished)


def write_arrays(place, **arrays):
    "Arrays by name, as NumPy packs them."
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    with whole_file(place) as unfinished: unfinished.write_bytes(buffer.getvalue())


def write_teacher(place, config):
    "A released teacher: flax's file, with the averaged weights."
    network = dfno.build_teacher(config).network
    with whole_file(place) as unfinished: write_msgpack(unfinished, {"ema_params": flax_tensors(getattr(network, "network", network))})


def write_adm(place, config):
    "An unconditional ADM: twice as many channels in the output, for the variance."
    network = i2sb.build(config.override(start="", conditional=False)).network
    state = {theirs: network.state_dict()[ours] for ours, theirs in authors_keys(network, "adm")}
    with whole_file(place) as unfinished: torch.save({name: torch.cat([value, value]) if name.startswith("out.2") else value for name, value in state.items()}, unfinished)


def write_list(place, folder):
    "The names of some pictures of a folder, which lie elsewhere on another machine."
    names = sorted(path.name for path in folder.rglob("*.JPEG"))[:8]
    with whole_file(place) as unfinished: unfinished.write_text("".join(f"/elsewhere/{name}\n" for name in names))


def radar(): return np.exp(1j * np.cumsum(np.random.default_rng(0).normal(size=(6, 128, 128)), axis=2)).astype(np.complex64)


def write_flow(place):
    "A file of tensors: forces x, vorticity y."
    fields = torch.randn(6, 128, 128, generator=torch.Generator().manual_seed(0))
    with whole_file(place) as unfinished: torch.save({"x": fields, "y": fields.cumsum(1) / 8}, unfinished)


def write_wflw(place):
    "WFLW in its own layout: pictures, and lines of 98 points, a box, six attributes and a name."
    numbers, folder = np.random.default_rng(0), place / "WFLW_annotations" / "list_98pt_rect_attr_train_test"
    folder.mkdir(parents=True); (place / "WFLW_images").mkdir()
    for split, count in (("train", 6), ("test", 4)):
        for index, pixels in enumerate(pictures(count, 120, len(split))):
            with whole_file(place / "WFLW_images" / f"{split}_{index}.jpg") as unfinished: Image.fromarray(pixels).save(unfinished, "JPEG")
        lines = [" ".join([*(f"{value:.3f}" for value in numbers.uniform(20, 100, 196)), "20 20 100 100", *map(str, numbers.integers(0, 2, 6)), f"{split}_{index}.jpg"]) for index in range(count)]
        with whole_file(folder / f"list_98pt_rect_attr_{split}.txt") as unfinished: unfinished.write_text("\n".join(lines) + "\n")


def write_wflw_videos(place):
    "WFLW-V's layout: two films, with boxes and 98 points for each frame."
    for name in ("videos", "bboxes", "landmarks"): (place / name).mkdir(parents=True)
    for name in ("17", "4711"):
        frames = torch.from_numpy(np.stack(pictures(6, 96, int(name)))).permute(0, 3, 1, 2).float() / 127.5 - 1
        write_video(place / "videos" / f"{name}.mp4", frames)
        for what, content in (("bboxes", np.tile([10.0, 12.0, 80.0, 84.0], (6, 1))), ("landmarks", np.random.default_rng(0).uniform(10, 80, (6, 98, 2)))):
            with whole_file(place / what / f"{name}.npy") as unfinished, unfinished.open("wb") as buffer: np.save(buffer, content)


LINES = ["a red apple and a green pear", "two dogs on grass", "a boat, seen from above", "a street at night"]


def write_shards(place):
    "Two shards of webdataset: pictures and their captions."
    place.mkdir(parents=True)
    for shard in range(2):
        with whole_file(place / f"{shard:05d}.tar") as unfinished, tarfile.open(unfinished, "w") as archive:
            for number, pixels in enumerate(pictures(4, 96, shard)):
                buffer = io.BytesIO()
                Image.fromarray(pixels).save(buffer, "JPEG")
                for ending, content in (("jpg", buffer.getvalue()), ("txt", LINES[number].encode())):
                    entry = tarfile.TarInfo(f"{shard}{number:04d}.{ending}")
                    entry.size = len(content)
                    archive.addfile(entry, io.BytesIO(content))


def write_coco(place):
    "COCO's validation: pictures in a folder, captions in a JSON file."
    write_picture_folder(place / "val2014", each=4)
    names = sorted(path.name for path in (place / "val2014").iterdir())
    content = {"images": [{"id": number, "file_name": name} for number, name in enumerate(names)],
               "annotations": [{"id": number, "image_id": number, "caption": LINES[number]} for number in range(len(names))]}
    with whole_file(place / "captions_val2014.json") as unfinished: unfinished.write_text(json.dumps(content))


def write_tokenizer(place, start=""):
    "A tokenizer of whole words."
    import tokenizers
    import transformers
    words = ["<pad>", "</s>", "<unk>", "<s>", *sorted({word for line in LINES for word in line.replace(",", "").split()})]
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    core.post_processor = tokenizers.processors.TemplateProcessing(single=f"{start} $A </s>".strip(), special_tokens=[("</s>", 1), ("<s>", 3)])
    transformers.PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=77).save_pretrained(place)
    return len(words)


def write_t5(place):
    "A T5 encoder of 16 numbers a token."
    import transformers
    words = write_tokenizer(place)
    transformers.T5EncoderModel(transformers.T5Config(vocab_size=words, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)).save_pretrained(place)


def write_clip(place):
    "A CLIP of 12 numbers a token, and 8 a picture."
    import transformers
    words = dict(vocab_size=write_tokenizer(place, "<s>"), hidden_size=12, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, eos_token_id=1, bos_token_id=3, pad_token_id=0)
    eyes = dict(hidden_size=20, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=7)
    transformers.CLIPModel(transformers.CLIPConfig(text_config=words, vision_config=eyes, projection_dim=8)).save_pretrained(place)


def write_stable_diffusion(place):
    "A Stable Diffusion of small widths, in the format of diffusers."
    import diffusers
    import transformers
    torch.manual_seed(0)
    diffusers.AutoencoderKL(block_out_channels=(8, 8, 16, 16), down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=2, norm_num_groups=4,
                            latent_channels=4, sample_size=64).save_pretrained(place / "vae")
    diffusers.UNet2DConditionModel(block_out_channels=(8, 16, 24, 32), layers_per_block=2, cross_attention_dim=16, attention_head_dim=8, norm_num_groups=4, sample_size=8).save_pretrained(place / "unet")
    letters = "abcdefghijklmnopqrstuvwxyz"
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    (place / "tokenizer").mkdir()
    with whole_file(place / "tokenizer" / "vocab.json") as unfinished: unfinished.write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
    with whole_file(place / "tokenizer" / "merges.txt") as unfinished: unfinished.write_text("#version: 0.2\n")
    words = transformers.CLIPTextConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=len(tokens), bos_token_id=0, eos_token_id=1)
    transformers.CLIPTextModel(words).save_pretrained(place / "text_encoder")


def write_coco_panoptic(place):
    "COCO's panoptic labels: pictures, ids as colours, and JSON files with a table for each; captions beside them."
    categories = [{"id": 1, "name": "person", "isthing": 1}, {"id": 72, "name": "tv", "isthing": 1}, {"id": 190, "name": "floor-wood", "isthing": 0}]
    for split, count in (("train2017", 4), ("val2017", 3)):
        maps = place / "annotations" / f"panoptic_{split}"
        maps.mkdir(parents=True); (place / split).mkdir()
        images, notes, lines = [], [], []
        for index, pixels in enumerate(pictures(count, 96, len(split))):
            number = 139 + index
            with whole_file(place / split / f"{number:012d}.jpg") as unfinished: Image.fromarray(pixels).save(unfinished, "JPEG")
            ids = np.full((96, 96), 70000, np.int64)
            ids[10:60, 10:40], ids[20:50, 50:90], ids[80:90, 80:90] = 5, 300, 9
            with whole_file(maps / f"{number:012d}.png") as unfinished: Image.fromarray(np.stack([ids % 256, ids // 256 % 256, ids // 65536], -1).astype(np.uint8)).save(unfinished, "PNG")
            rows = [{"id": 70000, "category_id": 190}, {"id": 5, "category_id": 1}, {"id": 300, "category_id": 72}, {"id": 9, "category_id": 1, "iscrowd": 1}]
            images.append({"id": number, "file_name": f"{number:012d}.jpg"})
            notes.append({"image_id": number, "file_name": f"{number:012d}.png", "segments_info": [{"iscrowd": 0} | row for row in rows]})
            lines.append({"id": index, "image_id": number, "caption": LINES[index]})
        for name, content in ((f"panoptic_{split}", {"categories": categories, "images": images, "annotations": notes}), (f"captions_{split}", {"annotations": lines})):
            with whole_file(place / "annotations" / f"{name}.json") as unfinished: unfinished.write_text(json.dumps(content))


def write_ade(place):
    "ADE20K's scene parsing: pictures, label pictures of one channel (0 is void), and the table of classes."
    for what in ("images", "annotations"): (place / what / "validation").mkdir(parents=True)
    for index, pixels in enumerate(pictures(3, 96, 5)):
        labels = np.zeros((96, 96), np.uint8)
        labels[:48], labels[48:, 30:] = 1, 2 + index % 2
        with whole_file(place / "images" / "validation" / f"ADE_val_{index + 1:08d}.jpg") as unfinished: Image.fromarray(pixels).save(unfinished, "JPEG")
        with whole_file(place / "annotations" / "validation" / f"ADE_val_{index + 1:08d}.png") as unfinished: Image.fromarray(labels).save(unfinished, "PNG")
    lines = ["Idx\tRatio\tTrain\tVal\tStuff\tName", "1\t0.2\t10\t2\t1\twall", "2\t0.1\t10\t2\t1\tbuilding, edifice", "3\t0.1\t10\t2\t0\tperson, individual"]
    with whole_file(place / "objectInfo150.txt") as unfinished: unfinished.write_text("\n".join(lines) + "\n")


def masks(): return {name: np.packbits(np.random.default_rng(0).random((8, 256, 256)) < 0.15) for name in ("10-20% freeform", "20-30% freeform")}


WRITERS = {  # how a file or a folder is called on the pages -> what writes it, given the place and the configuration
    r"cifar-10-batches-bin": lambda place, config: write_cifar(place),
    r"mnist": lambda place, config: write_idx(place),
    r"imagenet/(train|val)": lambda place, config: write_picture_folder(place, ("n01440764", "n01443537")),
    r"(lsun/|afhqv2/|celeba).*": lambda place, config: write_picture_folder(place, each=12),
    r"inception.*\.pt": lambda place, config: write_script(Shades(), place),
    r"resnet.*\.pt": lambda place, config: write_script(Colours(), place),
    r"vgg.*\.pt": lambda place, config: write_script(Maps(), place),
    r".*\.msgpack": write_teacher,
    r"256x256.*\.pt": write_adm,
    r"val10k\.txt": lambda place, config: write_list(place, place.parent / "imagenet/val"),
    r"imagenet256-train\.npz": lambda place, config: write_arrays(place, mu=np.zeros(6), sigma=np.eye(6)),
    r".*masks\.npz": lambda place, config: write_arrays(place, **masks()),
    r"insar\.npz": lambda place, config: write_arrays(place, insar=radar()),
    r"nsforcing.*\.pt": lambda place, config: write_flow(place),
    r"shards": lambda place, config: write_shards(place),
    r"coco": lambda place, config: write_coco(place),
    r"t5-.*": lambda place, config: write_t5(place),
    r"COCO": lambda place, config: write_coco_panoptic(place),
    r"ADEChallengeData2016": lambda place, config: write_ade(place),
    r"stable-diffusion-.*": lambda place, config: write_stable_diffusion(place),
    r"clip-.*": lambda place, config: write_clip(place),
    r"WFLW": lambda place, config: write_wflw(place),
    r"WFLW_V": lambda place, config: write_wflw_videos(place),
}


def write_files(folder, values, config):
    "Whatever files the values of a chain name."
    for name, value in values.items():
        if name in ("preset", "task", "before"): continue
        short = value.removeprefix(LIST["launch"]["folder"] + "/")
        place = folder / ("data" if short != value else "") / short
        [writer] = [writer for pattern, writer in WRITERS.items() if re.fullmatch(pattern, short)]
        if not place.exists(): place.parent.mkdir(parents=True, exist_ok=True); writer(place, config)


# ---- the rehearsal

def environment(): return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", "PYTHONWARNINGS": "ignore"}


def run(words, folder):
    "Run a command to its end; what it says on the way (`RuntimeError` where it fails)."
    done = subprocess.run(words, cwd=folder, env=environment(), capture_output=True, text=True)
    if done.returncode: raise RuntimeError(f"{shlex.join(words[1:])}: exit code {done.returncode}\n{(done.stdout + done.stderr)[-3000:]}")
    return done.stdout


def kill(process):
    "Kill a process and all that it started, at once, as a power cut would."
    family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for each in family: each.send_signal(signal.SIGSTOP)  # nobody sees the others die
    for each in family: each.kill()
    psutil.wait_procs(family[:-1])


def run_until_checkpoint(words, folder, run_folder):
    "Run a training, and kill it, with all its processes, as soon as it has written a checkpoint."
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(words, cwd=folder, env=environment(), stdout=said, stderr=subprocess.STDOUT)
        while process.poll() is None and not list((folder / run_folder).rglob("run.safetensors")): time.sleep(0.01)
        killed = process.poll() is None
        if killed: kill(process)
        process.wait()
        said.seek(0)
        if not killed: raise RuntimeError(f"{shlex.join(words[1:])}: ended before it could be killed (exit code {process.returncode})\n{said.read()[-3000:]}")


def rehearse(
    slug: str,             # the paper
    values: dict,          # of the words with a $
    commands: list[str],   # as the page prints them
    folder: Path,          # where everything happens
) -> dict:                 # a row
    "Run a chain of commands: train, killed; resume; sample; measure."
    began, told = time.perf_counter(), []
    sets = [pair.split("=", 1) for pair in overrides(slug, "train", values["preset"])]
    write_files(folder, values, paper(slug).CONFIGS[values["preset"]].override(**dict(sets)))
    for line in commands:
        words = rehearsed(line, values)
        kind, resumed = words[words.index("diffusion_papers") + 1], "--resume" in words
        if kind == "train" and not resumed: run_until_checkpoint(words, folder, words[words.index("--folder") + 1])
        else: said = run(words, folder)
        told.append("killed" if kind == "train" and not resumed else "resumed" if kind == "train" else
                    words[words.index("--metric") + 1] if kind == "evaluate" else kind)
    return {"preset": title(values), "ran": ", ".join(told), "on": time.strftime("%Y-%m-%d"), "seconds": round(time.perf_counter() - began, 1)}


def rehearse_all(
    slug: str,              # the paper
    chosen: tuple=(),       # titles of chains; all by default
):
    "Rehearse the chains of a page; the table is stored when all ran."
    found = {title(values): (values, commands) for values, commands in chains(page(slug))}
    missing = {preset for preset in paper(slug).CONFIGS if paper_scale(slug, preset)} - {values["preset"] for values, _ in found.values()}
    if missing: raise RuntimeError(f"{slug}: the page prints no commands for {', '.join(sorted(missing))}")
    with tempfile.TemporaryDirectory() as folder:
        parts = {name: functools.partial(rehearse, slug, *found[name], Path(folder)) for name in chosen or found}
        if chosen: return [part() for part in parts.values()]
        return measure(table_path(f"{slug}_rehearsal"), parts, f"make rehearse PAPER={slug}", (f"diffusion_papers.{slug}.train", f"diffusion_papers.{slug}.generate_data"))


def paper_scale(slug, preset):
    "Whether a preset is a published one: the others train from what ships."
    config = paper(slug).CONFIGS[preset]
    data = getattr(config, "diffusion", config).data
    return data in ("cifar10", "images", "idx", "cifar", "file", "distances", "wflw", "tars", "coco")


if __name__ == "__main__":
    try:
        slug, *chosen = sys.argv[1:]
        if slug not in papers(): raise ValueError(f"PAPER: expected one of {', '.join(papers())}, got {slug!r}")
        for row in rehearse_all(slug, tuple(chosen)): print(row)
    except (ValueError, RuntimeError) as error: sys.exit(f"error: {error}")
