"""Train from image tags alone: the hand-written loop of section 4.1, for the toy, VOC, ImageNet or your own folder.

    python train.py                                       # = python train.py toy: no data, no GPU, about a minute
    python train.py voc --voc VOC2012 --weights vgg16.pth --background DIR
    python train.py paper --imagenet DIR --weights net_weight_1
    python train.py folder --images DIR --tags tags.csv   # own classes: file,tag;tag;...
    torchrun --nproc_per_node 8 train.py paper ...        # the same on 8 GPUs (or CPU processes)

Writes out/<preset>/: ckpt.pt, head.pt (the same at half the precision, without paths and optimiser: to give away), log.csv,
settings.json, curves.png, panel.png, and scores.json for the toy. Every setting is a flag (--aggregation max --steps 200);
`--help` lists them with the presets' and the paper's values in brackets.
"""
import contextlib
import copy
import csv
import dataclasses
import datetime
import hashlib
import io
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

import data
import eval_voc
import infer
from data import InputError
from model import AGGREGATIONS, TRUNKS, geometry, in_size, load_trunk, memory, pick_device, rate, tag_loss


# ---------------------------------------------------------------- settings: this block is the help

def opt(group, default, text, choices=None, free=False, low=None, high=math.inf):
    """A setting with its range; free ones may change when a run is resumed."""
    metadata = dict(group=group, help=text, choices=choices, free=free, low=low, high=high)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass
class Settings:
    voc: str = opt("data", "", "the devkit's VOC2012 folder", free=True)
    set: str = opt("data", "train", "the VOC set to train on")
    imagenet: str = opt("data", "", "folder of <wnid>/ folders", free=True)
    synsets: str = opt("data", "", "CSV of wnid,class in place of assets/synsets.csv")
    images: str = opt("data", "", "folder of photographs", free=True)
    tags: str = opt("data", "", "CSV of file,tag;tag;...", free=True)
    background: str = opt("data", "", "ImageNet folder whose non-VOC photographs become background", free=True)
    masks: str = opt("data", "", "folder of label PNGs to learn per pixel: true ones, or the net's own (toy: drawn)", free=True)
    cache: str = opt("data", "", "folder for the frozen trunk's features, computed once (no: none)", free=True)
    views: int = opt("data", 1, "cached views of an image: the first as it is, the others jittered", low=1)
    limit: int = opt("data", 0, "use this many images at most, spread over the set (0: all)", low=0)
    size: int = opt("data", 0, "side of a training image, pixels (0: the trunk's own; paper 400)", low=0)
    threshold_images: int = opt("data", 100, "training images from whose tags delta is fitted", free=True, low=1)
    toy_images: int = opt("data", 3000, "toy: training images drawn from the seed", low=1)
    toy_scenes: int = opt("data", 30, "toy: scenes to label and score at the end", free=True, low=1)

    trunk: str = opt("model", "vgg16", "feature extractor (paper: overfeat)", list(TRUNKS))
    weights: str = opt("model", "", "the trunk's weights; vgg16's are fetched when not given", free=True)
    train_convs: int = opt("model", 0, "last trunk convolutions to train too (0: frozen, as the paper; -1: all)", low=-1)
    head: str = opt("model", "", "hidden widths of the head, e.g. 1024,768,512 (empty: the trunk's own)")
    kernel: str = opt("model", "3", "sides of the head's kernels, the last for all that remain (paper: 3)")
    dense: int = opt("model", 1, "at test time the score grid is so many times finer than the stride", free=True, low=1)
    sides: str = opt("model", "", "at test time images are brought to side*side pixels, scores averaged (empty: as they are)",
                     free=True)
    aggregation: str = opt("model", "lse", "score map -> image scores, Eq. 4 to 6", list(AGGREGATIONS))
    r: float = opt("model", 5.0, "sharpness of lse (paper: 5)", low=1e-6)
    loss: str = opt("model", "softmax", "paper: softmax, Eq. 2", ["softmax", "sigmoid"])
    dropout: float = opt("model", 0.5, "in the head (paper: 0.5)", low=0, high=1)

    optimizer: str = opt("optimiser", "sgd", "paper: sgd", ["sgd", "adam"])
    lr: float = opt("optimiser", 1e-3, "learning rate (paper: 0.001)", low=0)
    schedule: str = opt("optimiser", "steps", "steps: x0.8 every 5 million samples (paper); cosine: to 0 at the last step",
                        ["steps", "cosine"])
    momentum: float = opt("optimiser", 0.9, "SGD's, and Adam's first (paper: 0.9)", low=0, high=0.9999)
    weight_decay: float = opt("optimiser", 5e-5, "paper: 0.00005", low=0)
    batch: int = opt("optimiser", 16, "images a step, over all processes (paper: 16)", low=1)
    steps: int = opt("optimiser", 1000, "optimiser steps on tags (paper: about a week of them)", free=True, low=1)
    self_steps: int = opt("optimiser", 0, "then steps on labels that the net gives the training images", free=True, low=0)
    self_rounds: int = opt("optimiser", 1, "how often those labels are made and learned", free=True, low=0)
    balance: float = opt("optimiser", 1.0, "with labels: shift scores by this times the log of the class frequencies", low=0)
    jitter: bool = opt("optimiser", True, "flip, rotate, scale, brighten each image (cached features: flip)")

    out: str = opt("run", "", "output folder (empty: out/<preset>)", free=True)
    seed: int = opt("run", 0, "decides weights, order, jitter and dropout", low=0, high=2 ** 32)
    device: str = opt("run", "auto", "auto, cpu, cuda, cuda:1, mps", free=True)
    amp: bool = opt("run", False, "bfloat16 autocast")
    compile: bool = opt("run", False, "torch.compile the head", free=True)
    workers: int = opt("run", 0, "loader processes", free=True, low=0)
    log_every: int = opt("run", 20, "steps between lines of log.csv", low=1)
    save_every: int = opt("run", 200, "steps between checkpoints", free=True, low=1)
    resume: bool = opt("run", False, "continue the run in --out", free=True)
    bench: bool = opt("run", False, "train nothing; print images/s of loading, of the plain loop and of this one", free=True)


PATHS = ("voc", "imagenet", "synsets", "images", "tags", "background", "cache", "weights", "out")
PRESETS = {
    "toy": dict(trunk="tiny", train_convs=-1, optimizer="adam", lr=2e-3, schedule="cosine", batch=8, steps=2200, dropout=0.0,
                weight_decay=1e-4, jitter=False, log_every=100, threshold_images=60),
    "voc": dict(head="256", kernel="3,1", dense=2, optimizer="adam", lr=1e-3, schedule="cosine", batch=32, steps=800,
                self_steps=600, self_rounds=3, weight_decay=1e-4, amp=True, size=288),
    "paper": dict(trunk="overfeat", steps=1_000_000, workers=8, save_every=1000),
    "folder": dict(head="256", kernel="3,1", dense=2, optimizer="adam", lr=1e-3, schedule="cosine", batch=16, steps=500,
                   weight_decay=1e-4),
}


def parse(argv):
    """Command line -> (preset, Settings, {what was given}); refuses unknown flags and values by name."""
    parser = data.Parser(description=__doc__, usage="train.py [toy|voc|paper|folder] [--setting value ...]")
    parser.add_argument("preset", nargs="?", default="toy", choices=list(PRESETS), help="which defaults [toy]")
    groups, fields = {}, {f.name: f for f in dataclasses.fields(Settings)}
    for f in fields.values():
        m = f.metadata
        group = groups.setdefault(m["group"], parser.add_argument_group(m["group"]))
        presets = ", ".join(f"{p} {v[f.name]}" for p, v in PRESETS.items() if f.name in v)
        metavar = {int: "N", float: "X", str: "PATH" if f.name in (*PATHS, "masks") else "TEXT"}
        kind = dict(action=data.argparse.BooleanOptionalAction) if f.type is bool else dict(
            type=f.type, choices=m["choices"], metavar=None if m["choices"] else metavar[f.type])
        group.add_argument("--" + f.name.replace("_", "-"), dest=f.name, default=None, **kind,
                           help=f"{m['help']} [{f.default if f.default != '' else 'none'}{'; ' if presets else ''}{presets}]")
    given = {k: v for k, v in vars(parser.parse_args(argv)).items() if v is not None}
    preset = given.pop("preset")
    s = Settings(**{"out": f"out/{preset}", **PRESETS[preset], **given})

    def refuse(flag, why):
        parser.error(f"argument --{flag.replace('_', '-')}: {why}")
    for name, f in fields.items():
        low, high, value = f.metadata["low"], f.metadata["high"], getattr(s, name)
        if low is not None and not low <= value <= high or value == math.inf:
            refuse(name, f"{value}; expected {low} " + (f"to {high}" if high < math.inf else "or more"))
    for flag in {"voc": ["voc"], "paper": ["imagenet"], "folder": ["images", "tags"]}.get(preset, []):
        if not getattr(s, flag):
            parser.error(f"{preset} needs --{flag} ({fields[flag].metadata['help']})")
    for flag, check in (("head", infer.numbers), ("kernel", lambda text: infer.numbers(text)[0]), ("sides", infer.numbers),
                        ("device", pick_device)):
        try:
            check(getattr(s, flag))
        except (data.argparse.ArgumentTypeError, ValueError, IndexError) as e:
            refuse(flag, e)
    if s.train_convs > sum(row.kind == "conv" for row in TRUNKS[s.trunk].rows):
        refuse("train_convs", f"{s.trunk} has not so many convolutions")
    if s.train_convs < 0:
        s.cache = ""                                                # nothing is frozen
    elif preset in ("voc", "folder"):
        s.cache = s.cache or f"{s.out}/cache"
    s.cache = "" if s.cache == "no" else s.cache
    s.self_steps = 0 if s.masks else s.self_steps                   # the labels are given
    if s.self_steps and (preset == "toy" or not s.cache):
        refuse("self_steps", "needs image files (not toy), a --cache, and a trunk that is frozen in part")
    if s.masks and preset == "paper":
        refuse("masks", "not for paper, whose images are cut")
    if s.batch % int(os.environ.get("WORLD_SIZE", 1)):
        refuse("batch", f"{s.batch} images cannot be shared by {os.environ['WORLD_SIZE']} processes")
    s.size = s.size or TRUNKS[s.trunk].size
    if preset in ("voc", "folder"):                                 # whole photographs, squashed to size x size
        s.sides = s.sides or f"{s.size},{s.size * 3 // 2}"
    return preset, s, given


def load_photos(preset, s):
    """The preset's tagged photographs."""
    if preset == "toy":
        photos = data.toy_photos(s.seed, s.toy_images)
    elif preset == "voc":
        photos = data.voc_photos(s.voc, s.set)
    elif preset == "folder":
        photos = data.folder_photos(s.images, s.tags)
    else:
        photos = data.imagenet_photos(s.imagenet, s.synsets)
    if s.background:
        extra = data.imagenet_photos(s.background, s.synsets)
        photos = data.join(photos, extra.take(torch.where(extra.tags[:, 0] > 0)[0].tolist()))
    if s.limit and s.limit < len(photos):
        photos = photos.take(np.linspace(0, len(photos) - 1, s.limit).astype(int).tolist())
    photos.size, photos.cut = s.size, preset == "paper"
    if s.masks:
        photos = data.Masked.of(photos, s.masks)
        if not photos.frequencies.any():                          # reads them all, before anything is written
            raise InputError(f"{s.masks}: every pixel is void; expected label PNGs with class indices")
    return photos


# ---------------------------------------------------------------- batches

class Stream(torch.utils.data.Sampler):
    """Endless shuffled passes over n images, as batches of (index, place of the cut) keys from one seed.

    Any step's batch is a function of (seed, step) alone, so resuming, workers and processes change nothing.
    """

    def __init__(self, n, batch, seed, steps, rank=0, world=1):
        self.n, self.batch, self.seed, self.steps, self.share = n, batch, seed, steps, slice(rank, None, world)

    def keys(self, step):
        """The whole batch of a step, before it is shared among processes."""
        keys = []
        for position in range(step * self.batch, (step + 1) * self.batch):
            epoch, i = divmod(position, self.n)
            if getattr(self, "epoch", None) != epoch:
                rng = np.random.default_rng([self.seed, 2, epoch])
                self.epoch, self.order, self.places = epoch, rng.permutation(self.n), rng.random(self.n)
            keys.append((int(self.order[i]), float(self.places[i])))
        return keys

    def __iter__(self):
        for step in self.steps:
            yield self.keys(step)[self.share]


def learning_rate(s, step, begin, end):
    """Section 4.1: x0.8 after every 5 million samples; or a cosine from s.lr at step `begin` to 0 at `end`."""
    if s.schedule == "cosine":
        return s.lr * 0.5 * (1 + math.cos(math.pi * (step - begin) / (end - begin)))
    return s.lr * 0.8 ** (step * s.batch // 5_000_000)


# ---------------------------------------------------------------- features of the frozen trunk, computed once

def draws(s, step, n, share=slice(None)):
    """Uniform numbers (7, n)[:, share] for the augmentation of a step's n images: a function of (seed, step) alone."""
    return torch.rand(7, n, generator=torch.Generator().manual_seed(s.seed * 1_000_003 + step))[:, share]


def note_broken(photos, wanted, got, known):
    """Name the photos whose place another one took because they cannot be read; raises InputError above 1 % of all.

    wanted, got: indices; known: set of those already named, which grows.
    """
    for i in set(wanted) - set(got) - known:
        known.add(i)
        print(f"skipped, cannot be read: {photos.paths[i]}", file=sys.stderr)
    if len(known) > 0.01 * len(photos):
        raise InputError(f"{len(known)} of {len(photos)} training images cannot be read, the first {photos.paths[min(known)]}; "
                         "mend or remove them")


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
    folder = Path(s.cache)
    frozen = net.trunk[:net.frozen_convs].parameters()
    weights = hashlib.sha256(b"".join(p.detach().float().cpu().numpy().tobytes() for p in frozen))
    names = hashlib.sha256(b"\n".join(p.tobytes() if isinstance(p, np.ndarray) else os.fsencode(
        f"{Path(p).parent.name}/{Path(p).name}") for p in photos.paths))
    sample = net.frozen(torch.zeros(1, 3, s.size, s.size, device=device))
    key = dict(trunk=s.trunk, frozen_convs=net.frozen_convs, size=s.size, amp=s.amp, weights=weights.hexdigest(),
               list=names.hexdigest(), shape=[len(photos), s.views, *sample.shape[1:]], seed=s.seed if s.views > 1 else 0)
    state, first = folder / "cache.json", 0
    with data.reading(folder, f"cache.json and features.npy as this code writes them; delete {folder}"):
        if state.exists():
            found = json.loads(state.read_text())
            differ = [k for k in key if found["key"].get(k) != key[k]]
            if differ:
                raise InputError(f"{folder}: made for another {', '.join(differ)}; delete it or give another --cache")
            first = found["done"]
            if type(first) is not int or not 0 < first <= len(photos):
                raise ValueError(f"cache.json: {first} images done")
            np.load(folder / "features.npy", mmap_mode="r", allow_pickle=False)     # "r+" fills a short file up with zeros
        need_room(folder, 2 * math.prod(key["shape"]) * (len(photos) - first) // len(photos))
        features = np.lib.format.open_memmap(folder / "features.npy", "r+" if first else "w+", np.float16, tuple(key["shape"]))
        if features.dtype != np.float16 or list(features.shape) != key["shape"]:
            raise ValueError(f"features.npy: {features.dtype} {features.shape}, not float16 {key['shape']}")
    block, broken = 32, set()
    if first < len(photos):
        print(f"caching {features.nbytes / 1e9:.1f} GB of features in {folder}")
    for start in data.progress(range(first, len(photos), block), "blocks cached"):
        part = range(start, min(start + block, len(photos)))
        images, got = zip(*[photos[i, 0.5][:2] for i in part])
        note_broken(photos, part, got, broken)
        images = torch.stack(images).to(device)
        for view in range(s.views):
            seen = data.augment(images, draws(s, start * s.views + view, len(images)))[0] if view else images
            with torch.autocast(device.type, torch.bfloat16, enabled=s.amp):
                parts = [net.frozen(part) for part in seen.split(4)]
            features[start:start + len(seen), view] = torch.cat(parts).half().cpu().numpy()
        features.flush()
        data.write_atomically(state, lambda f: f.write(json.dumps(dict(key=key, done=start + len(images))).encode()))
    return np.load(folder / "features.npy", mmap_mode="r", allow_pickle=False)


class Cached(torch.utils.data.Dataset):
    """The photos' features in the place of their pixels; a key's place chooses the view, and whether it is mirrored.

    A mirrored map is nearly that of the mirrored image. Labels belong to the first view.
    """

    def __init__(self, photos, features, rows, jitter):
        self.photos, self.features, self.rows, self.jitter = photos, features, rows, jitter

    def __getitem__(self, key):
        i, place = key
        masked = isinstance(self.photos, data.Masked)
        view, mirror = divmod(int(place * 2 * (1 if masked else self.features.shape[1])), 2)
        features = torch.from_numpy(self.features[self.rows[i], view].copy())                  # (D, h, w)
        item = [features, i] + ([self.photos.labels(i)] if masked else [])
        if mirror and self.jitter:
            item[::2] = [x.flip(-1) for x in item[::2]]
        return item


# ---------------------------------------------------------------- checkpoints

def commit():
    """The code's git commit, or "unknown" outside a repository."""
    try:
        return subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, capture_output=True,
                              text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def save_checkpoint(path, net, s, classes, step, optimizer, pending):
    """Plain tensors and values only. A frozen trunk with public weights is left out; its file is named instead."""
    keep = {k: v.cpu() for k, v in net.state_dict().items()
            if not (k.startswith("trunk.") and int(k.split(".")[1]) < net.frozen_convs and net.spec.weights_url is not None)}
    data.write_atomically(path, lambda file: torch.save(
        dict(format=1, step=step, settings=dataclasses.asdict(s), classes=classes, model=keep, pending=pending,
             optimizer=optimizer.state_dict(), thresholds={}), file))


def resume(path, s, net, optimizer, begin):
    """Fill net and, past step `begin`, optimizer from a checkpoint; returns (step, pending losses).

    Raises InputError listing the settings that differ.
    """
    ckpt = infer.read_checkpoint(path)
    was = ckpt["settings"]
    differ = [f"{f.name} was {was.get(f.name)} and is {getattr(s, f.name)}" for f in dataclasses.fields(Settings)
              if not f.metadata["free"] and was.get(f.name) != getattr(s, f.name)]
    if differ:
        raise InputError(f"{path}: --resume with other settings: {'; '.join(differ)}")
    with data.reading(path, "a checkpoint to --resume; train again"):
        net.load_state_dict(ckpt["model"], strict=False)
        if ckpt["step"] <= begin:                                 # saved by an earlier stage
            return begin, []
        optimizer.load_state_dict(ckpt["optimizer"])
        if any(v.dim() and v.shape != p.shape for p, state in optimizer.state.items() for v in state.values()):
            raise ValueError("the optimiser's moments have other shapes")
    return ckpt["step"], ckpt["pending"]


# ---------------------------------------------------------------- training

def train(net, photos, features, rows, s, device, begin, end, rank=0, world=1, monitor=None):
    """The loop, from step `begin` (or the checkpoint's) to `end`; leaves ckpt.pt and log.csv in s.out.

    features: those of `cached_features`, or None to run the trunk on the pixels; rows: where each photo's are; monitor: a
    function of the net whose number is logged with each checkpoint.
    """
    main, out = rank == 0, Path(s.out)
    trained = [p for p in net.parameters() if p.requires_grad]
    if s.optimizer == "sgd":
        optimizer = torch.optim.SGD(trained, s.lr, s.momentum, weight_decay=s.weight_decay, fused=device.type == "cuda")
    else:
        optimizer = torch.optim.AdamW(trained, s.lr, (s.momentum, 0.999), weight_decay=s.weight_decay,
                                      fused=device.type == "cuda")
    first, pending = resume(out / "ckpt.pt", s, net, optimizer, begin) if s.resume else (begin, [])
    if first >= end:
        return
    if isinstance(photos, data.Masked):                           # classes that are rare in the labels are not to be given up
        shift = s.balance * photos.frequencies.clamp(min=1e-4).log().to(device).view(1, -1, 1, 1)
    scores_of = torch.compile(net.scores) if s.compile else net.scores
    log = Log(out / "log.csv", first, s.log_every) if main else None

    stop = []                                                     # Ctrl-C and SIGTERM end the loop after its step
    handlers = {n: signal.signal(n, lambda *_: stop.append(True)) for n in (signal.SIGINT, signal.SIGTERM)}
    stream = Stream(len(photos), s.batch, s.seed, range(first, end), rank, world)
    items = photos if features is None else Cached(photos, features, rows, s.jitter)
    loader = torch.utils.data.DataLoader(items, batch_sampler=stream, num_workers=s.workers, pin_memory=device.type == "cuda")
    start, net, broken = time.perf_counter(), net.train(), set()
    batches, waited = iter(loader), 0.0
    for step in range(first, end):
        asked = time.perf_counter()
        images, index, *labels = next(batches)
        waited += time.perf_counter() - asked
        note_broken(photos, [i for i, _ in stream.keys(step)[stream.share]], index.tolist(), broken)
        lr = learning_rate(s, step, begin, end)
        for group in optimizer.param_groups:
            group["lr"] = lr
        torch.manual_seed((s.seed * 1_000_003 + step) * world + rank)     # dropout: a function of (seed, step) too
        images, tags = images.to(device, non_blocking=True), photos.tags[index].to(device, non_blocking=True)
        labels = labels[0].to(device, non_blocking=True) if labels else None
        if s.jitter and features is None:
            images, labels = data.augment(images, draws(s, step, s.batch, stream.share), labels)
        with torch.autocast(device.type, torch.bfloat16, enabled=s.amp):
            scores = scores_of(net.frozen(images) if features is None else images.float())     # (B, K, h, w)
        loss = tag_loss(net.aggregate(scores), tags, s.loss)
        if labels is not None:
            loss = loss + pixel_loss(scores.float() + shift, labels, net.rows)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if world > 1:
            loss = average(trained, loss)
        optimizer.step()

        pending.append(loss.detach())
        done = step + 1
        logs, halt = done % s.log_every == 0 or done == end, bool(stop)
        if world > 1:                                             # all processes stop at the same step, asked at logging only
            halt = logs and agree(halt, device)
        saves = done % s.save_every == 0 or done == end or halt
        if logs or saves:                                         # the only synchronisation with the device
            pending = torch.stack([torch.as_tensor(x, device=device) for x in pending]).tolist()
            if not np.isfinite(pending).all():
                raise InputError(blame(photos, stream, done, pending, out))
        if main and logs:
            rate = (done - first) * s.batch / (time.perf_counter() - start)
            watched = monitor(net.eval()) if monitor and (done % s.save_every == 0 or done == end) else ""
            log.write(done, done * s.batch, float(np.mean(pending)), lr, rate, watched, end)
            net.train()
        if done % s.log_every == 0:
            pending = []
        if main and saves:
            save_checkpoint(out / "ckpt.pt", net, s, photos.classes, done, optimizer, pending)
        if halt and done < end:
            raise InputError(f"{out / 'ckpt.pt'}: interrupted and saved at step {done}; go on with --resume")
    for number, handler in handlers.items():
        signal.signal(number, handler)
    if main:
        print(f"{waited / (time.perf_counter() - start):.0%} of the time waiting for the loader")


def agree(flag, device):
    """True on every process if it is on any."""
    flag = torch.tensor(float(flag), device=device)
    dist.all_reduce(flag)
    return flag.item() > 0


def pixel_loss(scores, labels, rows):
    """Cross-entropy at the pixel under each cell; void is ignored. scores (B, K, h, w), labels (B, H, W) uint8."""
    stride, _, centre = geometry(rows)
    at = round(centre) + stride * torch.arange(max(scores.shape[2:]), device=labels.device)
    target = labels[:, at[:scores.shape[2]]][:, :, at[:scores.shape[3]]].long()
    return F.cross_entropy(scores, target, ignore_index=data.VOID, reduction="sum") / (target != data.VOID).sum().clamp(min=1)


@torch.no_grad()
def label_training_images(net, photos, features, device, folder):
    """Self-training: write labels that net, features and tags give each training image (background images: none)."""
    for i in data.progress(range(len(photos)), "training images labelled"):
        present = torch.where(photos.tags[i, 1:] > 0)[0] + 1
        if len(present):
            x = torch.from_numpy(features[i, 0].astype(np.float32)).to(device)
            scores = net.scores(x[None])[0].float()
            margin = (x.shape[1] - scores.shape[1]) // 2                      # the head's convolutions are unpadded
            x = x[:, margin:x.shape[1] - margin, margin:x.shape[2] - margin]
            image, got = photos[i, 0.5][:2]
            if got != i:                                          # cannot be read
                continue
            cut = margin * image.shape[1] // (x.shape[1] + 2 * margin)
            labels = infer.seeds(scores, x, present, image[:, cut:image.shape[1] - cut, cut:image.shape[2] - cut])
            data.save_labels(folder / f"{Path(photos.paths[i]).stem}.png",
                             np.pad(labels, 4 * margin, constant_values=data.VOID))


def average(parameters, loss):
    """Average gradients, and the loss that is logged, over all processes in one message."""
    flat = torch.cat([p.grad.flatten() for p in parameters] + [loss.detach().view(1)])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for p, grad in zip(parameters, flat[:-1].split([p.numel() for p in parameters])):
        p.grad.copy_(grad.view_as(p))
    return flat[-1]


def blame(photos, stream, done, losses, out):
    """One line for a loss that is not finite: the step, the files of its batch, the checkpoint to go back to."""
    bad = done - len(losses) + int(np.argmin(np.isfinite(losses)))
    names = ", ".join(Path(photos.paths[i]).name if not isinstance(photos.paths[i], np.ndarray) else f"toy {i}"
                      for i, _ in stream.keys(bad))
    saved = out / "ckpt.pt"
    return (f"step {bad}: the loss is not finite; lower --lr, or look at {names}; last good checkpoint: "
            f"{saved if saved.exists() else 'none'}")


class Log:
    """log.csv and a fixed-width line on stdout. Resuming drops the rows that the run will write again."""
    columns = ["step", "samples", "loss", "lr", "images_per_s", "mean_iou"]

    def __init__(self, path, first, every):
        rows = list(csv.reader(path.read_text(errors="replace").splitlines())) if first and path.exists() else []
        kept = [row for row in rows[1:] if len(row) == len(self.columns) and row[0].isdecimal() and int(row[0]) <= first
                and int(row[0]) % every == 0]
        text = io.StringIO(newline="")
        csv.writer(text).writerows([self.columns, *kept])
        data.write_atomically(path, lambda file: file.write(text.getvalue().encode()))
        self.path = path
        print(f"{'step':>8} {'loss':>8} {'lr':>9} {'images/s':>9} {'left':>7}")

    def write(self, step, samples, loss, lr, rate, iou, steps):
        with open(self.path, "a", newline="") as file:
            csv.writer(file).writerow([step, samples, f"{loss:.6f}", f"{lr:.3e}", f"{rate:.1f}", iou and f"{iou:.2f}"])
        left = (steps - step) * samples / step / rate
        print(f"{step:8} {loss:8.4f} {lr:9.2e} {rate:9.1f} {left:6.0f}s", flush=True)


def draw_curves(out):
    """log.csv as curves.png: the loss, and the mean IoU where it was watched (only the toy has masks to watch)."""
    rows = list(csv.DictReader((out / "log.csv").read_text().splitlines()))
    curves = {"loss": "loss by step", "mean_iou": "mean IoU of base by step, %"}
    points = {name: [(int(row["step"]), float(row[name])) for row in rows if row[name]] for name in curves}
    sheet = Image.fromarray(np.vstack([eval_voc.plot({curves[name]: line}) for name, line in points.items() if line]))
    data.write_atomically(out / "curves.png", lambda file: sheet.save(file, "png"))


def bench(net, photos, s, device, batches=4):
    """Images/s of loading alone, of the plain loop (float32, trunk in the loop), of this one, and of this one from a cache."""
    loader = torch.utils.data.DataLoader(photos, batch_sampler=Stream(len(photos), s.batch, s.seed, range(batches)),
                                         num_workers=s.workers, pin_memory=device.type == "cuda")
    start = time.perf_counter()
    held = [(images.to(device), photos.tags[index].to(device)) for images, index, *_ in loader]
    print(f"loading: {batches * s.batch / (time.perf_counter() - start):.1f} images/s, {s.workers} workers")

    def speed(net, amp, inputs, forward):
        optimizer, turn = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], 1e-6), iter(inputs * 1000)

        def step():
            x, tags = next(turn)
            with torch.autocast(device.type, torch.bfloat16, enabled=amp):
                loss = tag_loss(net.aggregate(forward(x)), tags, s.loss)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            return loss
        return rate(step, device) * s.batch, step().item()
    plain = copy.deepcopy(net).to(memory_format=torch.contiguous_format)
    plain.normalise = lambda images: (images - plain.mean) / plain.std
    with torch.autocast(device.type, torch.bfloat16, enabled=s.amp):
        kept = [(net.frozen(x).half(), tags) for x, tags in held]
    ways = [("plain loop, float32", plain, False, held, plain), ("this loop", net, s.amp, held, net)]
    if net.cut:                                                   # something is frozen
        ways += [("plain head from a cache, float32", plain, False, [(x.contiguous(), t) for x, t in kept],
                  lambda x: plain.scores(x.float())),
                 ("this head from a cache", net, s.amp, kept, lambda x: net.scores(x.float()))]
    base = None
    for name, *arguments in ways:
        images, loss = speed(*arguments)
        base = base or images
        print(f"{name}: {images:.1f} images/s, {images / base:.2f} times the plain loop, loss {loss:.3f}")
    print(f"most memory: {memory(device):.2f} GB")


def finish(preset, net, photos, s):
    """What follows training: thresholds from tags into the checkpoint, the panel, and for the toy the scored ladder."""
    def readable(indices):
        for i in indices:
            with contextlib.suppress(InputError):                 # named during training
                yield i, photos.image(i)
    out = Path(s.out)
    few = np.linspace(0, len(photos) - 1, min(s.threshold_images, len(photos))).astype(int)
    tagged = ((infer.Scene(image), photos.tags[i]) for i, image in readable(data.progress(few, "thresholds")))
    ckpt = dict(infer.read_checkpoint(out / "ckpt.pt"), thresholds=eval_voc.fit_thresholds(net, tagged))
    data.write_atomically(out / "ckpt.pt", lambda f: torch.save(ckpt, f))
    shared = dict(ckpt, optimizer={}, pending=[], model={k: v.half() for k, v in ckpt["model"].items()},    # to give away
                  settings={**ckpt["settings"], **dict.fromkeys(PATHS, ""), "masks": "given" * bool(s.masks)})
    data.write_atomically(out / "head.pt", lambda f: torch.save(shared, f))
    samples = [(i, image, None) for i, image in readable(few[::max(1, len(few) // 8)])]
    if preset == "toy":
        samples = data.toy_scenes(s.seed, s.toy_scenes)
        report = eval_voc.ladder(net, samples, ckpt["thresholds"])
        eval_voc.print_ladder(report)
        eval_voc.write_json(out / "scores.json", report)
    draw_curves(out)
    infer.save_panel(out / "panel.png", net, samples[:6])


def main():
    preset, s, given = parse(sys.argv[1:])
    rank, world, device = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)), pick_device(s.device)
    if world > 1:
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        elif os.environ.get("LOCAL_WORLD_SIZE") == str(world):    # one machine: its name may lead gloo elsewhere
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo",
                                timeout=datetime.timedelta(days=1))           # the others wait while one caches and labels
    out = Path(s.out)
    if s.resume and not (out / "ckpt.pt").exists():
        raise InputError(f"{out / 'ckpt.pt'}: no checkpoint to --resume; leave that out, or give the run's --out")
    start = time.perf_counter()
    photos = load_photos(preset, s)
    net = infer.checked(infer.build_net, dataclasses.asdict(s), photos.classes, torch.Generator().manual_seed(s.seed))
    if s.size < in_size(1, net.rows):
        raise InputError(f"--size {s.size}: the net looks at {in_size(1, net.rows)} pixels; give a larger --size")
    if net.spec.weights_url is not None:
        infer.checked(load_trunk, net, s.trunk, s.weights)
    net.to(device).to(memory_format=torch.channels_last)
    if s.resume:                                                  # refuse before anything is written
        resume(out / "ckpt.pt", s, net, None, math.inf)
    if rank == 0:
        need_room(out, 24 * sum(p.numel() for p in net.parameters()))     # two checkpoints with Adam's moments
        trained = sum(p.numel() for p in net.parameters() if p.requires_grad)
        print(f"{preset} on {device}: {len(photos):,} images, {len(photos.classes)} classes, {trained:,} trained parameters"
              + "".join(f", {k}={v}" for k, v in given.items()))
    if s.bench:
        return bench(net.train(), photos, s, device)
    if rank == 0:
        data.write_atomically(out / "settings.json", lambda f: f.write(json.dumps(
            dict(dataclasses.asdict(s), commit=commit(), command=" ".join(sys.argv)), indent=1).encode()))
    features = None
    if s.cache:                                                   # rank 0 first; the others then find it whole
        features = cached_features(net, photos, s, device) if rank == 0 else None
        if world > 1:
            dist.barrier()
        features = cached_features(net, photos, s, device) if rank else features
    scenes = data.toy_scenes(s.seed, s.toy_scenes) if preset == "toy" else None         # the one set with truth at hand
    watch = scenes and (lambda net: eval_voc.ladder(net, scenes, priors=())["rows"]["base"]["mean_iou_defined"])
    train(net, photos, features, range(len(photos)), s, device, 0, s.steps, rank, world, watch)
    for turn in range(s.self_rounds if s.self_steps else 0):
        own, begin = out / f"self{turn + 1}", s.steps + turn * s.self_steps
        if rank == 0 and not (s.resume and infer.read_checkpoint(out / "ckpt.pt")["step"] > begin):
            label_training_images(net.eval(), photos, features, device, own)
        if world > 1:
            dist.barrier()
        labelled = data.Masked.of(photos, own)
        train(net, labelled, features, labelled.rows, s, device, begin, begin + s.self_steps, rank, world)
    if rank == 0:
        finish(preset, net.eval(), photos, s)
        print(f"wrote {out}/ in {time.perf_counter() - start:.0f} s")
    if world > 1:
        dist.barrier()
        sys.stdout.flush()
        os._exit(0)                                               # the usual way out: gloo's threads abort it now and then


if __name__ == "__main__":
    data.run_cli(main)
