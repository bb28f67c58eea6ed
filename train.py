"""Train from image tags alone: the hand-written loop of section 4.1, for the toy, VOC, ImageNet or your own folder.

    python train.py                                       # = python train.py toy: no data, no GPU, about a minute
    python train.py voc --voc VOC2012 --weights vgg16.pth --background DIR
    python train.py paper --imagenet DIR --weights net_weight_1
    python train.py folder --images DIR --tags tags.csv   # own classes: file,tag;tag;...
    torchrun --nproc_per_node 8 train.py paper ...        # the same on 8 GPUs (or CPU processes)

Writes out/<preset>/: ckpt.pt, head.pt (the same at half the precision, without paths and optimiser: to give away), log.csv,
settings.json, curves.png, panel.png, scores.json for the toy; for photographs cache/ (features) and self1/, ... (their own
labels). Every setting is a flag (--aggregation max --steps 200); `--help` lists them with the presets' and the paper's values.
"""
import argparse
import contextlib
import copy
import dataclasses
import datetime
import functools
import hashlib
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader

import data
import eval_voc
import infer
from data import InputError
from model import AGGREGATIONS, TRUNKS, has_bfloat16, in_size, load_trunk, memory, pick_device, pixel_loss, rate, tag_loss

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))        # which of how many: set by torchrun


# ---------------------------------------------------------------- settings: this block is the help

def opt(group, default, text, low=None, high=math.inf, choices=None, check=str, free=False):
    """A setting: low <= value < high, one of choices, or what check lets pass. free: may change when a run is resumed."""
    def convert(word):
        try:
            check(word)
            value = type(default)(word)
            if low is not None and not low <= value < high:
                raise ValueError(f"{value}; expected {low} or more" + f", below {high}" * (high < math.inf))
            return value
        except ValueError as e:
            raise argparse.ArgumentTypeError(e) from e
    flag = (dict(action=argparse.BooleanOptionalAction) if isinstance(default, bool) else
            dict(type=convert, choices=choices, metavar=None if choices else type(default).__name__.upper()))
    return dataclasses.field(default=default, metadata=dict(group=group, help=text, flag=flag, free=free))


@dataclasses.dataclass
class Settings:
    voc: str = opt("data", "", "the devkit's VOC2012 folder", free=True)
    set: str = opt("data", "train", "the VOC set to train on")
    imagenet: str = opt("data", "", "folder of <wnid>/ folders", free=True)
    synsets: str = opt("data", "", "CSV of wnid,class in place of assets/synsets.csv")
    images: str = opt("data", "", "folder of photographs", free=True)
    tags: str = opt("data", "", "CSV of file,tag;tag;...", free=True)
    background: str = opt("data", "", "ImageNet folder whose non-VOC photographs become background", free=True)
    masks: str = opt("data", "", "folder of label PNGs to learn per pixel: true ones, or infer.py's (toy: drawn)", free=True)
    cache: str = opt("data", "", "folder for the frozen trunk's features, computed once (voc, folder: OUT/cache; no: none)",
                     free=True)
    views: int = opt("data", 1, "cached views of an image: the first as it is, the others jittered", 1)
    limit: int = opt("data", 0, "use this many images at most, spread over the set (0: all)", 0)
    size: int = opt("data", 0, "side of a training image, pixels (0: the trunk's: vgg16 320, overfeat 400, tiny 96)", 0)
    threshold_images: int = opt("data", 100, "training images from whose tags delta is fitted", 1, free=True)
    toy_images: int = opt("data", 3000, "toy: training images drawn from the seed", 1)
    toy_scenes: int = opt("data", 30, "toy: scenes to label and score at the end", 1, free=True)

    trunk: str = opt("model", "vgg16", "feature extractor (paper: overfeat)", choices=list(TRUNKS))
    weights: str = opt("model", "", "the trunk's weights; vgg16's are fetched when not given", free=True)
    train_convs: int = opt("model", 0, "last trunk convolutions to train too (0: frozen, as the paper; -1: all)", -1)
    head: str = opt("model", "", "hidden widths of the head: 1024,768,512 (empty: the trunk's own)", check=infer.numbers)
    kernel: str = opt("model", "3", "kernel sides, the last for the rest (paper: 3)", check=lambda x: infer.numbers(x or "0"))
    dense: int = opt("model", 1, "at test time the score grid is so many times finer than the stride", 1, free=True)
    sides: str = opt("model", "", "at test time images get areas of side x side (empty: none; voc, folder: SIZE,1.5 SIZE)",
                     check=infer.numbers, free=True)
    aggregation: str = opt("model", "lse", "score map -> image scores, Eq. 4 to 6", choices=list(AGGREGATIONS))
    r: float = opt("model", 5.0, "sharpness of lse (paper: 5)", 1e-6)
    loss: str = opt("model", "softmax", "paper: softmax, Eq. 2", choices=["softmax", "sigmoid"])
    dropout: float = opt("model", 0.5, "in the head (paper: 0.5)", 0, 1)

    optimizer: str = opt("optimiser", "sgd", "adam is AdamW (paper: sgd)", choices=["sgd", "adam"])
    lr: float = opt("optimiser", 1e-3, "learning rate (paper: 0.001)", 0)
    schedule: str = opt("optimiser", "steps", "paper: steps, x0.8 every 5 million samples", choices=["steps", "cosine"])
    momentum: float = opt("optimiser", 0.9, "SGD's, and Adam's first (paper: 0.9)", 0, 1)
    weight_decay: float = opt("optimiser", 5e-5, "paper: 0.00005", 0)
    batch: int = opt("optimiser", 16, "images a step, over all processes (paper: 16)", 1)
    steps: int = opt("optimiser", 1000, "optimiser steps on tags (paper: about a week of them)", 1, free=True)
    self_steps: int = opt("optimiser", 0, "then steps on labels that the net gives the training images", 0, free=True)
    self_rounds: int = opt("optimiser", 1, "how often those labels are made and learned", 1, free=True)
    balance: float = opt("optimiser", 1.0, "with labels: shift scores by this times the log of the class frequencies", 0)
    jitter: bool = opt("optimiser", True, "flip, rotate, scale, brighten each image (cached features: flip)")

    out: str = opt("run", "", "output folder (empty: out/<preset>)", free=True)
    seed: int = opt("run", 0, "decides weights, order, jitter and dropout", 0, 2 ** 32)
    device: str = opt("run", "auto", "auto, cpu, cuda, cuda:1, mps", check=pick_device, free=True)
    amp: bool = opt("run", False, "bfloat16 autocast, where the device has it")
    compile: bool = opt("run", False, "torch.compile the head", free=True)
    workers: int = opt("run", 0, "loader processes", 0, free=True)
    log_every: int = opt("run", 20, "steps between lines of log.csv", 1)
    save_every: int = opt("run", 200, "steps between checkpoints", 1, free=True)
    resume: bool = opt("run", False, "continue the run in --out", free=True)
    bench: bool = opt("run", False, "train nothing; print images/s of loading, of the plain loop and of this one", free=True)


NEEDS = {"voc": ["voc"], "paper": ["imagenet"], "folder": ["images", "tags"]}          # what a preset needs and the others refuse
PATHS = ("voc", "imagenet", "synsets", "images", "tags", "background", "cache", "weights", "out")
PHOTOGRAPHS = dict(head="256", kernel="3,1", dense=2, optimizer="adam", schedule="cosine", weight_decay=1e-4, amp=True)
PRESETS = {
    "toy": dict(trunk="tiny", train_convs=-1, optimizer="adam", lr=2e-3, schedule="cosine", batch=8, steps=2200, dropout=0.0,
                weight_decay=1e-4, jitter=False, log_every=100, threshold_images=60),
    "voc": dict(PHOTOGRAPHS, size=288, batch=32, steps=800, self_steps=600, self_rounds=3),
    "paper": dict(trunk="overfeat", steps=1_000_000, workers=8, save_every=1000),
    "folder": dict(PHOTOGRAPHS, steps=500, self_steps=300, self_rounds=2),
}


def parse(argv):
    """Command line -> (preset, Settings, {what was given}); refuses unknown flags and values by name."""
    parser = data.Parser(description=__doc__, usage="train.py [toy|voc|paper|folder] [--setting value ...]",
                         argument_default=argparse.SUPPRESS)                # only what is given comes back
    parser.add_argument("preset", nargs="?", default="toy", help=f"which defaults: {', '.join(PRESETS)} [toy]")
    groups = {name: parser.add_argument_group(name) for name in ("data", "model", "optimiser", "run")}
    for f in dataclasses.fields(Settings):
        values = [str(f.default) or "none"] + [f"{name} {v[f.name]}" for name, v in PRESETS.items() if f.name in v]
        groups[f.metadata["group"]].add_argument("--" + f.name.replace("_", "-"), **f.metadata["flag"],
                                                 help=f"{f.metadata['help']} [{'; '.join(values)}]")
    given = vars(parser.parse_args(argv))
    preset = given.pop("preset")
    if preset not in PRESETS:                                       # not by choices: a misspelt flag's value may stand here
        parser.error(f"argument preset: '{preset}', not one of {', '.join(PRESETS)}")
    s = Settings(**{"out": f"out/{preset}", **PRESETS[preset], **given})

    whole = preset in ("voc", "folder")                             # whole photographs, squashed to size x size
    s.size = s.size or TRUNKS[s.trunk].size
    s.sides = s.sides or (f"{s.size},{s.size * 3 // 2}" if whole else "")
    s.cache = s.cache or (f"{s.out}/cache" if whole else "")
    s.cache = "" if s.cache == "no" or s.train_convs < 0 else s.cache         # -1: nothing is frozen
    s.self_steps = 0 if s.masks else s.self_steps                   # the labels are given
    for wrong, flag, why in [
            *((not getattr(s, name), name, f"{preset} needs it") for name in NEEDS.get(preset, ())),
            *((name in given, name, f"{preset} does not read it; did you mean  train.py {other} ...  ?")
              for other, names in NEEDS.items() if other != preset for name in names),
            (s.train_convs > sum(row.kind == "conv" for row in TRUNKS[s.trunk].rows), "train-convs", f"{s.trunk} has fewer"),
            (s.self_steps and (preset == "toy" or not s.cache), "self-steps",
             "needs image files (not toy), a --cache, and a trunk that is frozen in part; else give --self-steps 0"),
            (s.masks and preset == "paper", "masks", "not for paper, whose images are cropped"),
            (s.background and preset in ("toy", "folder"), "background", f"not for {preset}, whose classes are not VOC's"),
            (s.batch % WORLD, "batch", f"{s.batch} images cannot be shared by {WORLD} processes")]:
        if wrong:
            parser.error(f"argument --{flag}: {why}")
    return preset, s, given


def load_photos(preset, s):
    """The preset's tagged photographs."""
    photos = {"toy": lambda: data.toy_photos(s.seed, s.toy_images),
              "voc": lambda: data.voc_photos(s.voc, s.set),
              "paper": lambda: data.imagenet_photos(s.imagenet, s.synsets),
              "folder": lambda: data.folder_photos(s.images, s.tags)}[preset]()
    if s.background:
        extra = data.imagenet_photos(s.background, s.synsets)
        extra = extra.take(torch.where(extra.tags[:, 0] > 0)[0].tolist())
        photos = dataclasses.replace(photos, paths=photos.paths + extra.paths, tags=torch.cat([photos.tags, extra.tags]))
    if s.limit:
        photos = photos.take(data.spread(len(photos), s.limit))
    photos.size, photos.crop = s.size, preset == "paper"
    if s.masks:
        photos = data.Masked.of(photos, s.masks)
        if not photos.frequencies.any():                          # reads them all, before anything is written
            raise InputError(f"{s.masks}: every pixel is void; expected label PNGs with class indices")
    return photos


# ---------------------------------------------------------------- batches: functions of (seed, step) alone

@functools.lru_cache(2)
def shuffled(n, seed, epoch):
    """One pass over n images: their order and, for each, the place of the crop in 0..1."""
    rng = np.random.default_rng([seed, 2, epoch])
    return rng.permutation(n), rng.random(n)


def batch_keys(s, n, step):
    """A step's whole batch of n images, as (index, place): the same after resuming, with any workers and processes."""
    passes = ((*shuffled(n, s.seed, i // n), i % n) for i in range(step * s.batch, (step + 1) * s.batch))
    return [(int(order[i]), float(places[i])) for order, places, i in passes]


def draws(s, step, n):
    """Uniform numbers (7, n) for the augmentation of a step's n images."""
    return torch.rand(7, n, generator=torch.Generator().manual_seed(s.seed * 1_000_003 + step))


def learning_rate(s, step, begin, end):
    """Section 4.1: x0.8 after every 5 million samples; or a cosine from s.lr at step `begin` to 0 at `end`."""
    if s.schedule == "cosine":
        return s.lr * 0.5 * (1 + math.cos(math.pi * (step - begin) / (end - begin)))
    return s.lr * 0.8 ** (step * s.batch // 5_000_000)


def note_broken(photos, wanted, got, known):
    """Name the photos whose place another one took because they cannot be read; raises InputError above 1 % of all.

    wanted, got: indices; known: set of those already named, which grows.
    """
    for i in set(wanted) - set(got) - known:
        known.add(i)
        print(f"skipped, cannot be read: {photos.paths[i]}", file=sys.stderr)
    if len(known) > 0.01 * len(photos):
        raise InputError(f"{len(known)} of {len(photos)} training images cannot be read, the first {photos.paths[min(known)]}; "
                         "mend them, or take them out of the list")


# ---------------------------------------------------------------- features of the frozen trunk, computed once

def need_room(folder, size):
    """Make the folder; raises InputError where its disk has not so many bytes left."""
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if size > free:
        raise InputError(f"{folder}: {size / 1e9:.3f} GB are needed, {free / 1e9:.3f} are free; make room or give another")


@torch.no_grad()
def cached_features(net, photos, s, device):
    """Memory-mapped half-precision features of every photo, (N, views, D, h, w), made where they are not there yet.

    The folder's cache.json says for which trunk, weights, precision, size and list they are; others are refused. It can be
    killed at any moment: the next call goes on where the last whole block ended.
    """
    folder, n, done, broken = Path(s.cache), len(photos), 0, set()
    state, file = folder / "cache.json", folder / "features.npy"
    weights = b"".join(p.detach().float().cpu().numpy().tobytes() for p in net.trunk[:net.frozen_convs].parameters())
    names = b"\n".join(p.tobytes() if isinstance(p, np.ndarray) else os.fsencode(f"{Path(p).parent.name}/{Path(p).name}")
                       for p in photos.paths)
    weights, names = (hashlib.sha256(content).hexdigest() for content in (weights, names))
    shape = (n, s.views, *net.frozen(torch.zeros(1, 3, s.size, s.size, device=device)).shape[1:])
    key = dict(trunk=s.trunk, frozen_convs=net.frozen_convs, size=s.size, amp=s.amp, weights=weights, list=names,
               shape=list(shape), seed=s.seed if s.views > 1 else 0)
    with data.reading(folder, f"cache.json and features.npy as this code writes them; delete {folder}"):
        if state.exists():
            found = json.loads(state.read_text())
            differ = [k for k in key if found["key"].get(k) != key[k]]
            if differ:
                raise InputError(f"{folder}: made for another {', '.join(differ)}; delete it or give another --cache")
            done, there = found["done"], np.load(file, mmap_mode="r")           # "r+" would fill a short file up with zeros
            if type(done) is not int or not 0 < done <= n or (there.dtype, there.shape) != (np.float16, shape):
                raise ValueError(f"{done} of {n} images done, {there.dtype} {there.shape}")
        need_room(folder, 2 * math.prod(shape) * (n - done) // n)
        features = np.lib.format.open_memmap(file, "r+" if done else "w+", np.float16, shape)
    if done < n:
        print(f"caching {features.nbytes / 1e9:.2f} GB of features in {folder}")
    for start in data.progress(range(done, n, 32), "blocks cached"):
        block = range(start, min(start + 32, n))
        images, got = zip(*[photos[i, 0.5][:2] for i in block])
        note_broken(photos, block, got, broken)
        images = torch.stack(images).to(device)                   # (B, 3, size, size)
        for view in range(s.views):
            seen = data.augment(images, draws(s, start * s.views + view, len(block)))[0] if view else images
            with torch.autocast(device.type, torch.bfloat16, enabled=s.amp):
                maps = torch.cat([net.frozen(part) for part in seen.split(4)])                   # (B, D, h, w)
            features[block, view] = maps.half().cpu().numpy()
        features[[i for i, j in zip(block, got) if i != j]] = np.nan      # not this photo's: `Cached` goes on to the next one
        features.flush()
        eval_voc.write_json(state, dict(key=key, done=block.stop))
    return np.load(file, mmap_mode="r")


@dataclasses.dataclass
class Cached:
    """The photos' features in the place of their pixels; a key's place chooses the view, and whether it is mirrored.

    A mirrored map is nearly that of the mirrored image. Labels belong to the first view.
    """
    photos: data.Photos
    features: np.ndarray                       # (N, views, D, h, w) float16; NaN for photos that cannot be read
    indices: list                              # of the photos' features among these
    jitter: bool

    def __getitem__(self, key):
        i, place = key
        while np.isnan(self.features[self.indices[i], 0, 0, 0, 0]):
            i = (i + 1) % len(self.indices)
        masked = isinstance(self.photos, data.Masked)
        view, mirror = divmod(int(place * 2 * (1 if masked else self.features.shape[1])), 2)
        maps = [torch.from_numpy(self.features[self.indices[i], view].copy())] + ([self.photos.labels(i)] if masked else [])
        features, *labels = [x.flip(-1) for x in maps] if mirror and self.jitter else maps       # (D, h, w), (size, size)
        return features, i, *labels


# ---------------------------------------------------------------- checkpoints and the log

def commit():
    """The code's git commit, or "unknown"."""
    git = subprocess.run("git rev-parse --short HEAD", shell=True, cwd=Path(__file__).parent, capture_output=True, text=True)
    return git.stdout.strip() or "unknown"


def save_checkpoint(path, net, s, classes, step, optimizer, pending):
    """Plain tensors and values only. A frozen trunk with public weights is left out; its file is named instead."""
    public = tuple(f"trunk.{i}." for i in range(net.frozen_convs if net.spec.weights_url is not None else 0))
    model = {k: v.cpu() for k, v in net.state_dict().items() if not k.startswith(public)}
    data.write_atomically(path, lambda file: torch.save(
        dict(format=1, step=step, settings=dataclasses.asdict(s), classes=classes, model=model, pending=pending,
             optimizer=optimizer.state_dict(), thresholds={}), file))


def read_resumed(path, s, net):
    """The checkpoint to go on from; fills the net. Raises InputError listing the settings that differ."""
    ckpt = infer.read_checkpoint(path)
    was, now = dict(ckpt["settings"], classes=ckpt["classes"]), dict(dataclasses.asdict(s), classes=net.classes)
    free = {f.name for f in dataclasses.fields(Settings) if f.metadata["free"]}
    with data.reading(path, "a checkpoint to --resume; train again"):
        if ckpt["step"] > was["steps"]:                           # it learns from its own labels already
            free -= {"steps", "self_steps"}
        differ = [f"{k} was {was.get(k)} and is {now[k]}" for k in now if k not in free and was.get(k) != now[k]]
        if differ:
            raise InputError(f"{path}: --resume with other settings: {', '.join(differ)}; give those, or another --out")
        missing, _ = net.load_state_dict(ckpt["model"], strict=False)
        if not all(name.startswith("trunk.") for name in missing):
            raise ValueError(f"{missing[-1]} is missing")
    return ckpt


def begin_log(path, first, s):
    """Start log.csv; when resuming keep the rows that a run without a break has at step `first`."""
    rows = [row.split(",") for row in path.read_text(errors="replace").splitlines()] if first and path.exists() else []
    ends = {s.steps + turn * s.self_steps for turn in range(s.self_rounds + 1)}           # of the stages: logged, too
    steps = {str(n) for n in range(1, first + 1) if n % s.log_every == 0 or n in ends}
    rows = [",".join(row) for row in rows if len(row) == 6 and row[0] in steps]
    text = "\n".join(["step,samples,loss,lr,images_per_s,mean_iou", *rows, ""])
    data.write_atomically(path, lambda file: file.write(text.encode()))


def draw_curves(out):
    """log.csv as curves.png: the loss, and the mean IoU where it was watched (only the toy has masks to watch)."""
    log = np.genfromtxt(out / "log.csv", delimiter=",", names=True, ndmin=1)
    lines = {title: log[np.isfinite(log[name])][["step", name]].tolist()
             for title, name in (("loss by step", "loss"), ("mean IoU of base by step, %", "mean_iou"))}
    charts = [eval_voc.plot({title: line}) for title, line in lines.items() if line]
    if charts:                                                    # a log that was taken away leaves nothing to draw
        data.write_atomically(out / "curves.png", lambda file: Image.fromarray(np.vstack(charts)).save(file, "png"))


# ---------------------------------------------------------------- training

def train(net, items, s, device, begin, end, saved, watch=None):
    """The loop, from step `begin`, or from that of the checkpoint `saved`, to `end`; leaves ckpt.pt and log.csv in s.out.

    items: Photos, or Cached, for which no frozen layer runs; watch: a function of the net, logged with each checkpoint.
    """
    first, out = max(begin, saved["step"]), Path(s.out)
    if RANK == 0:
        begin_log(out / "log.csv", first, s)
    if first >= end:
        return
    cached = isinstance(items, Cached)
    photos = items.photos if cached else items
    masked, share = isinstance(photos, data.Masked), slice(RANK, None, WORLD)
    trained = [p for p in net.parameters() if p.requires_grad]
    common = dict(lr=s.lr, weight_decay=s.weight_decay, fused=device.type == "cuda")
    if s.optimizer == "sgd":
        optimizer = torch.optim.SGD(trained, momentum=s.momentum, **common)
    else:
        optimizer = torch.optim.AdamW(trained, betas=(s.momentum, 0.999), **common)
    pending = torch.zeros(0, device=device)                       # losses since the last line of log.csv
    if first > begin:
        pending = torch.tensor(saved["pending"], device=device)
        with data.reading(out / "ckpt.pt", "a checkpoint to --resume; train again"):
            optimizer.load_state_dict(saved["optimizer"])
            if any(v.dim() and v.shape != p.shape for p, state in optimizer.state.items() for v in state.values()):
                raise ValueError("the optimiser's moments have other shapes")
    if masked:                                                    # classes that are rare in the labels are not to be given up
        shift = s.balance * photos.frequencies.clamp(min=1e-4).log().to(device).view(1, -1, 1, 1)
    scores_of = torch.compile(net.scores) if s.compile else net.scores
    if RANK == 0:
        print(f"{'step':>8} {'loss':>8} {'lr':>9} {'images/s':>9} {'left':>7}")

    stop = []                                                     # Ctrl-C and SIGTERM end the loop after its step
    handlers = {n: signal.signal(n, lambda *_: stop.append(True)) for n in (signal.SIGINT, signal.SIGTERM)}
    loader = DataLoader(items, batch_sampler=(batch_keys(s, len(photos), step)[share] for step in range(first, end)),
                        num_workers=s.workers, pin_memory=device.type == "cuda")
    broken, waited, start = set(), 0.0, time.perf_counter()
    net, asked = net.train(), start
    for step, (images, index, *labels) in enumerate(loader, first):
        waited += time.perf_counter() - asked
        note_broken(photos, [i for i, _ in batch_keys(s, len(photos), step)[share]], index.tolist(), broken)
        lr = learning_rate(s, step, begin, end)
        for group in optimizer.param_groups:
            group["lr"] = lr
        torch.manual_seed((s.seed * 1_000_003 + step) * WORLD + RANK)     # dropout: a function of (seed, step) too
        images, tags, *labels = (x.to(device, non_blocking=True) for x in (images, photos.tags[index], *labels))
        if s.jitter and not cached:
            images, *labels = data.augment(images, draws(s, step, s.batch)[:, share], *labels)
        with torch.autocast(device.type, torch.bfloat16, enabled=s.amp):
            scores = scores_of(images.float() if cached else net.frozen(images))      # (B, K, h, w)
        loss = tag_loss(net.aggregate(scores), tags, s.loss)
        if masked:
            loss = loss + pixel_loss(scores.float() + shift, labels[0], net.rows)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        loss, stops = loss.detach(), torch.full_like(loss, len(stop))
        if WORLD > 1:
            for x in (*(p.grad for p in trained), loss, stops):
                dist.all_reduce(x.div_(WORLD))                    # the mean over all processes
        optimizer.step()

        done, pending = step + 1, torch.cat([pending, loss[None]])
        logs, saves = (done % every == 0 or done == end for every in (s.log_every, s.save_every))
        halt = bool(stop) if WORLD == 1 else logs and bool(stops)  # all processes stop at the same step, and look when they log
        if (logs or saves or halt) and not pending.isfinite().all():      # no other step waits for the device
            raise InputError(blame(photos, s, done, pending, out))
        if RANK == 0 and logs:
            mean, speed = np.mean(pending.tolist()), (done - first) * s.batch / (time.perf_counter() - start)
            watched = f"{watch(net.eval()):.2f}" if watch and saves else ""
            with open(out / "log.csv", "a") as file:
                file.write(f"{done},{done * s.batch},{mean:.6f},{lr:.3e},{speed:.1f},{watched}\n")
            print(f"{done:8} {mean:8.4f} {lr:9.2e} {speed:9.1f} {(end - done) * s.batch / speed:6.0f}s", flush=True)
            net.train()
        if done % s.log_every == 0:                               # not at another end: a longer run logs these losses as well
            pending = pending[:0]
        if RANK == 0 and (saves or halt):
            save_checkpoint(out / "ckpt.pt", net, s, photos.classes, done, optimizer, pending.tolist())
        if halt and done < end:
            raise InputError(f"{out / 'ckpt.pt'}: interrupted and saved at step {done}; go on with --resume")
        asked = time.perf_counter()
    for number, handler in handlers.items():
        signal.signal(number, handler)
    if RANK == 0:
        print(f"{waited / (time.perf_counter() - start):.0%} of the time waiting for the loader")


def blame(photos, s, done, losses, out):
    """One line for a loss that is not finite: the step, the files of its batch, the checkpoint to go back to."""
    step, saved = done - len(losses) + int(losses.isfinite().int().argmin()), out / "ckpt.pt"
    names = [f"toy {i}" if isinstance(photos.paths[i], np.ndarray) else Path(photos.paths[i]).name
             for i, _ in batch_keys(s, len(photos), step)]
    return (f"step {step}: the loss is not finite; lower --lr, or look at {', '.join(names)}; last good checkpoint: "
            f"{saved if saved.exists() else 'none'}")


@torch.no_grad()
def label_training_images(net, photos, features, device, folder, names):
    """Self-training: write <name>.png that net, features and tags give each training image that is not all background."""
    for i in data.progress(torch.where(photos.tags[:, 0] == 0)[0].tolist(), "training images labelled"):
        image, got = photos[i, 0.5][:2]                           # (3, H, W)
        if got == i:                                              # it can be read
            x = torch.from_numpy(features[i, 0].astype(np.float32)).to(device)
            x = net.run(x[None], net.tuned_rows, net.trunk[net.frozen_convs:])        # (1, D, h, w), of the whole trunk
            scores = net.run(x * net.spec.feature_scale, net.head_rows, net.head)[0].float()
            margin = (x.shape[2] - scores.shape[1]) // 2          # in cells: the head's convolutions are unpadded
            border = margin * image.shape[1] // x.shape[2]        # in pixels
            labels = infer.seeds(scores, F.pad(x[0], [-margin] * 4), torch.where(photos.tags[i])[0],
                                 F.pad(image, [-border] * 4))
            labels = np.pad(labels, 4 * margin, constant_values=data.VOID)
            data.save_labels(folder / f"{names[i]}.png", labels)


# ---------------------------------------------------------------- before and after

def bench(net, photos, s, device, batches=4):
    """Images/s of loading alone, of the plain loop (float32, trunk in the loop), of this one, and of this one from a cache."""
    loader = DataLoader(photos, batch_sampler=[batch_keys(s, len(photos), step) for step in range(batches)],
                        num_workers=s.workers, pin_memory=device.type == "cuda")
    start = time.perf_counter()
    held = [(images.to(device), photos.tags[index].to(device)) for images, index, *_ in loader]
    print(f"loading: {batches * s.batch / (time.perf_counter() - start):.1f} images/s, {s.workers} workers")

    plain = copy.deepcopy(net).to(memory_format=torch.contiguous_format)
    plain.normalise = lambda images: (images - plain.mean) / plain.std
    ways = [("plain loop, float32", plain, False, held), ("this loop", net, s.amp, held)]
    if net.frozen_rows:
        with torch.autocast(device.type, torch.bfloat16, enabled=s.amp):
            kept = [(net.frozen(x).half(), tags) for x, tags in held]
        ways += [("plain head from a cache, float32", plain, False, [(x.contiguous(), tags) for x, tags in kept]),
                 ("this head from a cache", net, s.amp, kept)]
    speeds = []
    for name, way, amp, inputs in ways:
        optimizer, turn = torch.optim.AdamW([p for p in way.parameters() if p.requires_grad], 1e-6), itertools.cycle(inputs)

        def step():
            x, tags = next(turn)
            with torch.autocast(device.type, torch.bfloat16, enabled=amp):
                scores = way(x) if inputs is held else way.scores(x.float())
            loss = tag_loss(way.aggregate(scores), tags, s.loss)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            return loss
        speeds.append(rate(step, device) * s.batch)
        print(f"{name}: {speeds[-1]:.1f} images/s, {speeds[-1] / speeds[0]:.2f} times the plain loop, loss {step().item():.3f}")
    print(f"most memory: {memory(device):.2f} GB")


def finish(net, photos, s, scenes):
    """What follows training: thresholds from tags into the checkpoint, pictures, and for the toy the scored ladder."""
    def readable(indices):
        for i in indices:
            with contextlib.suppress(InputError):                 # named during training
                yield i, data.shrink(photos.image(i))
    out, few = Path(s.out), data.spread(len(photos), s.threshold_images)
    tagged = ((infer.Scene(image), photos.tags[i]) for i, image in readable(data.progress(few, "thresholds")))
    ckpt = dict(infer.read_checkpoint(out / "ckpt.pt"), thresholds=eval_voc.fit_thresholds(net, tagged))
    head = dict(ckpt, optimizer={}, pending=[], model={k: v.half() for k, v in ckpt["model"].items()},      # to give away
                settings={**ckpt["settings"], **dict.fromkeys(PATHS, ""), "masks": "given" * bool(s.masks)})
    for name, content in (("ckpt.pt", ckpt), ("head.pt", head)):
        data.write_atomically(out / name, lambda file: torch.save(content, file))
    if scenes:
        report = eval_voc.ladder(net, scenes, ckpt["thresholds"])
        eval_voc.print_ladder(report)
        eval_voc.write_json(out / "scores.json", report)
    draw_curves(out)
    samples = scenes[:6] if scenes else [(i, image, None) for i, image in readable(data.spread(len(photos), 6))]
    infer.save_panel(out / "panel.png", net, samples)


def join_processes(device):
    """The device of this process, once it has met the others that torchrun started."""
    if WORLD > 1:
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        elif os.environ.get("LOCAL_WORLD_SIZE") == str(WORLD):    # one machine: its name may lead gloo elsewhere
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo",
                                timeout=datetime.timedelta(days=1))           # the others wait while one caches and labels
    return device


@contextlib.contextmanager
def first_process_first():
    """The first process runs the block, then the others, which find whole what it has written."""
    if RANK > 0:
        dist.barrier()
    yield
    if RANK == 0 and WORLD > 1:
        dist.barrier()


def main():
    preset, s, given = parse(sys.argv[1:])
    out, device, start = Path(s.out), join_processes(pick_device(s.device)), time.perf_counter()
    s.amp = s.amp and has_bfloat16(device)
    if s.resume and not (out / "ckpt.pt").exists():
        raise InputError(f"{out / 'ckpt.pt'}: no checkpoint to --resume; leave that out, or give the run's --out")
    photos = load_photos(preset, s)
    net = infer.checked(infer.build_net, dataclasses.asdict(s), photos.classes, torch.Generator().manual_seed(s.seed))
    if s.size < in_size(1, net.rows):
        raise InputError(f"--size {s.size}: a cell of the score map takes {in_size(1, net.rows)} pixels; give a larger --size")
    if net.spec.weights_url is not None:
        infer.checked(load_trunk, net, s.trunk, s.weights)
    net.to(device).to(memory_format=torch.channels_last)
    saved = read_resumed(out / "ckpt.pt", s, net) if s.resume else dict(step=0)
    if RANK == 0:
        trained = sum(p.numel() for p in net.parameters() if p.requires_grad)
        print(f"{preset} on {device}{' in bfloat16' * s.amp}: {len(photos):,} images, {len(photos.classes)} classes, "
              f"{trained:,} trained parameters" + ", random frozen ones" * (net.spec.weights_url is None and net.frozen_convs > 0)
              + "".join(f", {k}={v}" for k, v in given.items()))
        print("tags:", ", ".join(f"{name} {int(n):,}" for name, n in zip(photos.classes, photos.tags.sum(0))))
    if s.bench:
        return bench(net.train(), photos, s, device)
    if RANK == 0:
        need_room(out, 24 * sum(p.numel() for p in net.parameters()))     # two checkpoints with Adam's moments
        eval_voc.write_json(out / "settings.json", dict(dataclasses.asdict(s), commit=commit(), command=" ".join(sys.argv)))
    with first_process_first():
        features = cached_features(net, photos, s, device) if s.cache else None
    items = Cached(photos, features, range(len(photos)), s.jitter) if s.cache else photos
    scenes = data.toy_scenes(s.seed, s.toy_scenes) if preset == "toy" else None         # the one set with truth at hand
    watch = scenes and (lambda net: eval_voc.ladder(net, scenes, priors=())["rows"]["base"]["mean_iou_defined"])
    train(net, items, s, device, 0, s.steps, saved, watch)
    names = [f"{i:06}_{Path(path).stem}" for i, path in enumerate(photos.paths)] if s.self_steps else []
    for turn in range(s.self_rounds if s.self_steps else 0):
        own, begin = out / f"self{turn + 1}", s.steps + turn * s.self_steps
        if saved["step"] >= begin + s.self_steps:                 # done before this --resume, its labels may be gone
            continue
        with first_process_first():
            if RANK == 0 and saved["step"] <= begin:
                label_training_images(net.eval(), photos, features, device, own, names)
            labelled = data.Masked.of(photos, own, names)
        train(net, Cached(labelled, features, labelled.indices, s.jitter), s, device, begin, begin + s.self_steps, saved)
    if RANK == 0:
        finish(net.eval(), photos, s, scenes)
        print(f"wrote {out}/ in {time.perf_counter() - start:.0f} s")
    if WORLD > 1:
        dist.barrier()
        sys.stdout.flush()
        os._exit(0)                                               # the usual way out: gloo's threads abort it now and then


if __name__ == "__main__":
    data.run_cli(main)
