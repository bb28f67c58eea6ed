"""Train from image tags alone: the hand-written loop of section 4.1.

    python train.py                                       # = train.py toy: no data, minutes
    python train.py voc --voc VOC2012 --weights vgg16_features.pth --background DIR
    python train.py paper --imagenet DIR --weights net_weight_1
    python train.py folder --images DIR --tags tags.csv   # own classes: file,tag;tag;...
    torchrun --nproc_per_node 8 train.py paper ...        # the same on 8 GPUs (or CPU processes)

Writes out/<preset>/: ckpt.pt, head.pt (the same at half the precision, without paths and optimiser:
to give away), log.csv, settings.json, curves.png, panel.png; toy: scores.json; voc and folder:
cache/ (features) and self1.npy, ... (labels of its own making).
"""

import argparse
import contextlib
import dataclasses
import datetime
import functools
import hashlib
import inspect
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.fusion import fuse_linear_bn_eval

import data
import eval_voc
import infer
import model
from data import VOID, InputError
from model import AGGREGATIONS, LOSSES, TRUNKS, fingerprint, pixel_loss

WORLD = int(os.environ.get("WORLD_SIZE", "1"))  # processes, set by torchrun
RANK = int(os.environ["RANK"]) if WORLD > 1 else 0  # this one


# ---------------------------------------------------------------- settings
TAKES = "N: 0, 1, ...; M: 1, 2, ...; M,M: several; K: N or -1; X: 0 or more; P: X below 1"


@dataclasses.dataclass
class Settings:
    """Every setting is a flag; its comment is its help, whose first word says what it takes.

    A comment with [...] tells its own default; to others the default is appended."""

    # what a preset needs
    voc: str = ""  # DIR: voc: the devkit's VOC2012 folder
    imagenet: str = ""  # DIR: paper: folder of <wnid>/ folders
    images: str = ""  # DIR: folder: your photographs
    tags: str = ""  # FILE: folder: CSV of file,tag;tag;...
    weights: str = ""  # FILE: the trunk's weights [overfeat needs it; others are fetched]

    # data
    set: str = "train"  # NAME: the VOC set to train on
    background: str = ""  # DIR: voc: ImageNet folder whose non-VOC photographs become background
    synsets: str = ""  # FILE: CSV of wnid,class in place of assets/synsets.csv
    masks: str = ""  # DIR: label PNGs to learn per pixel, true or infer.py's; no self-training
    cache: str = ""  # DIR: the frozen trunk's features [voc, folder: OUT/cache; no: none]
    limit: int = 0  # N: use this many images at most, spread over the set [all]
    size: int = 0  # N: side of a training image, pixels [vgg16 320, overfeat 400, tiny 96]
    toy_images: int = 3000  # M: toy: training images
    toy_scenes: int = 30  # M: toy: scenes to label and score at the end

    # network
    trunk: str = "vgg16"  # NAME: feature extractor (paper: overfeat)
    train_convs: int = 0  # K: last trunk convolutions to learn labels (paper: 0; -1: all) [vgg16 3]
    head: tuple = ()  # M,M: hidden widths (paper: 1024,768,512) [the trunk's own]
    kernel: tuple = (3,)  # M,M: kernel sides of the head, the last for the rest (paper: 3)
    aggregation: str = "lse"  # NAME: score map -> image scores, Eq. 4 to 6
    r: float = 5.0  # X: sharpness of lse (paper: 5)
    loss: str = "softmax"  # NAME: of the tags (paper: softmax, Eq. 2)
    dropout: float = 0.5  # P: in the head (paper: 0.5)
    dense: int = 1  # M: labelling: score grid so many times finer than the stride
    sides: tuple = ()  # M,M: labelling: see images at areas M x M [voc, folder: SIZE]

    # optimiser
    optimizer: str = "sgd"  # NAME: adam is AdamW (paper: sgd)
    lr: float = 1e-3  # X: learning rate (paper: 0.001)
    trunk_lr: float = 0.0  # X: of the trunk's convolutions [LR]
    schedule: str = "steps"  # NAME: steps: x0.8 every 5 million samples (paper), or cosine
    momentum: float = 0.9  # P: SGD's, and Adam's first (paper: 0.9)
    weight_decay: float = 5e-5  # X: pull of the weights to 0 (paper: 0.00005)
    batch: int = 16  # M: images a step, over all processes (paper: 16)
    steps: int = 1000  # M: steps on tags (paper: about a week of them)
    self_steps: int = 0  # N: then steps on labels that the net gives the training images
    self_rounds: int = 1  # M: how often those labels are made and learned
    sure: float = 0.6  # P: share of a pixel's best class below which it gets no such label
    foreground: float = 1.5  # X: weight of the learned foreground, in labels and at test
    jitter: bool = True  # flip, rotate, scale, brighten each image (cached features: flip)

    # run
    out: str = ""  # DIR: where to write [out/PRESET]
    seed: int = 0  # N: decides weights, order, jitter and dropout
    device: str = "auto"  # NAME: auto, cpu, cuda, cuda:1, mps
    amp: bool = False  # bfloat16 autocast, where the device computes in it
    compile: bool = False  # torch.compile the head
    workers: int = 0  # N: processes that load photographs, and label them
    threshold_images: int = 100  # M: training images from whose tags delta is fitted
    log_every: int = 20  # M: steps between lines of log.csv
    save_every: int = 200  # M: steps between checkpoints
    resume: bool = False  # continue the run in OUT


# fmt: off
PHOTOGRAPHS = {"head": (256,), "kernel": (3, 1), "optimizer": "adam", "schedule": "cosine",
               "weight_decay": 1e-4, "dropout": 0.1, "trunk_lr": 3e-5, "amp": True}
PRESETS = {
    "toy": {"trunk": "tiny", "train_convs": -1, "optimizer": "adam", "lr": 2e-3,
            "schedule": "cosine", "weight_decay": 1e-4, "batch": 8, "steps": 2200, "dropout": 0.0,
            "jitter": False, "log_every": 100, "threshold_images": 60},
    "voc": {**PHOTOGRAPHS, "size": 288, "batch": 32, "steps": 800, "self_steps": 600},
    "paper": {"trunk": "overfeat", "steps": 1_000_000, "workers": 8, "save_every": 1000},
    "folder": {**PHOTOGRAPHS, "steps": 500, "self_steps": 300},
}
SOURCES = {  # preset: its tagged photographs; the settings that it alone reads, and needs
    "toy": (lambda s: data.toy_photos(s.seed, s.toy_images), ["toy_images", "toy_scenes"]),
    "voc": (lambda s: data.voc_photos(s.voc, s.set), ["voc", "set"]),
    "paper": (lambda s: data.imagenet_photos(s.imagenet, s.synsets), ["imagenet"]),
    "folder": (lambda s: data.folder_photos(s.images, s.tags), ["images", "tags"]),
}
CHOICES = {"trunk": list(TRUNKS), "aggregation": list(AGGREGATIONS), "loss": list(LOSSES),
           "optimizer": ["sgd", "adam"], "schedule": ["steps", "cosine"]}
RANGES = {"N": (0, 2**32), "M": (1, 2**32), "X": (0, math.inf), "P": (0, 1)}  # low <= x < high
MAY_CHANGE = ["device", "compile", "workers", "threshold_images", "toy_scenes", "dense", "sides",
              "log_every", "save_every", "steps", "self_steps", "self_rounds",
              "resume"]  # what --resume lets differ; so may paths()
RUN_FILES = ["ckpt.pt", "head.pt", "log.csv", "settings.json", "scores.json", "curves.png",
             "panel.png"]
# fmt: on


# ---------------------------------------------------------------- the loop
def train(net, batches, optimizer, s, stage, first, record):
    """Optimiser steps of one stage; keeps log.csv and ckpt.pt in s.out. record: plain_settings.

    batches: of each step (inputs: images, or cached features; tags (B, K); cell labels (B, h, w)
    or None).
    stage: a range, steps that share a schedule; first: the first to do, later on if resumed."""
    out, device = Path(s.out), net.device
    trained = [p for p in net.parameters() if p.requires_grad]
    scores_of = torch.compile(net.scores) if s.compile else net.scores
    losses, start = [], time.perf_counter()
    net.head.train()  # with dropout; whatever the trunk is, it keeps to inference
    for step, (inputs, tags, labels) in enumerate(batches, first):
        # Learning rate: each group's peak, times what the schedule says.
        factor = schedule(s, step, stage)
        for group in optimizer.param_groups:
            group["lr"] = factor * group["peak"]

        # Forward: the frozen trunk or its cached features, then what is trained. Dropout, too, is a
        # function of (seed, step).
        torch.manual_seed((s.seed * 1_000_003 + step) * WORLD + RANK)
        with torch.autocast(device.type, torch.bfloat16, enabled=net.amp):
            features = inputs.float() if s.cache else net.features(inputs)
            scores = scores_of(net.maps(features))  # (B, K, h, w), Eq. 1

        # Loss: of the tags and of the images' labelled cells; means over all processes.
        image_scores = net.aggregate(scores)  # (B, K), Eq. 6
        tag_losses = net.loss(image_scores, tags)  # (B,), Eq. 3
        count = total(tags.any(1))  # every image has a tag: so many in all processes
        loss = tag_losses.sum() / count
        if labels is not None:
            labelled = (labels != VOID).any(2).any(1)  # (B,)
            image_losses = pixel_loss(scores.float(), labels)
            loss = loss + image_losses.sum() / total(labelled)

        # Backward and step.
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for p in trained:
            summed(p.grad)
        optimizer.step()
        losses.append(summed(loss.detach()))

        # Log. No other step waits for the device.
        done = step + 1
        saves = done % s.save_every == 0 or done == stage.stop
        if done % s.log_every == 0 or saves:
            mean_loss = torch.stack(losses).mean().item()
            losses = []
            if not math.isfinite(mean_loss):
                raise InputError(f"{out}: the loss before step {done} is not finite; lower --lr")
            if RANK == 0:
                lr = factor * s.lr
                rate = (done - first) * s.batch / (time.perf_counter() - start)
                left = (stage.stop - done) * s.batch / rate
                print(f"{done:8} {mean_loss:8.4f} {lr:9.2e} {rate:9.1f} {left:6.0f}s", flush=True)
                with open(out / "log.csv", "a") as file:
                    file.write(f"{done},{done * s.batch},{mean_loss:.6f},{lr:.3e},{rate:.1f}\n")

        # Save, whole or not at all.
        if saves and RANK == 0:
            with data.writing(out / "ckpt.pt") as file:
                torch.save(model.checkpoint(net, record, done, optimizer), file)


def summed(x):
    """x, a tensor, summed in place over all processes."""
    if WORLD > 1:
        dist.all_reduce(x)
    return x


def total(there):
    """How many of a bool tensor are true, in all processes: a float tensor of at least 1."""
    return summed(there.sum().float()).clamp(min=1)


def schedule(s, step, stage):
    """Section 4.1: x0.8 after every 5 million samples; or a cosine from 1 to 0 over the stage."""
    if s.schedule == "cosine":
        share = (step - stage.start) / len(stage)
        return 0.5 * (1 + math.cos(math.pi * share))
    return 0.8 ** (step * s.batch // 5_000_000)


def make_optimizer(net, s):
    """SGD (section 4.1) or AdamW, with a peak learning rate for the trunk and one for the head."""
    groups = []
    for layers, peak in ((net.trunk, s.trunk_lr), (net.head, s.lr)):
        params = [p for p in layers.parameters() if p.requires_grad]
        if params:
            groups.append({"params": params, "peak": peak})
    common = {"lr": s.lr, "weight_decay": s.weight_decay, "fused": net.device.type == "cuda"}
    if s.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=s.momentum, **common)
    return torch.optim.AdamW(groups, betas=(s.momentum, 0.999), **common)


# ---------------------------------------------------------------- batches, of (seed, step) alone
@functools.lru_cache(2)
def shuffled(n, seed, epoch):
    """One pass over n images: their order and a draw in 0..1 for each (see data.Photos)."""
    rng = np.random.default_rng([seed, 2, epoch])
    return rng.permutation(n), rng.random(n)


def batch_keys(s, n, step):
    """A step's whole batch as (index, draw): the same after resuming, with any processes."""
    keys = []
    for i in range(step * s.batch, (step + 1) * s.batch):
        order, draws = shuffled(n, s.seed, i // n)
        keys.append((int(order[i % n]), float(draws[i % n])))
    return keys


def make_batches(photos, s, device, steps):
    """Yield each step's (images or features, tags, labels or None): this process's share of it."""
    known_broken, waited, start = {}, 0.0, time.perf_counter()
    keys = (batch_keys(s, len(photos), step)[RANK::WORLD] for step in steps)
    workers = 0 if s.cache else s.workers  # features need no decoding
    batches = data.read_batches(photos, keys, workers, device.type == "cuda")
    for step in steps:
        asked = time.perf_counter()
        indices, images, labels, broken = next(batches)
        waited += time.perf_counter() - asked
        data.note_broken(photos, broken, known_broken)
        if images is None:  # all of them broken: the other processes count on this one
            images = torch.zeros(0, 3, s.size, s.size)
            labels = None if photos.labels is None else torch.from_numpy(photos.labels[:0])
        images = images.to(device, non_blocking=True)
        if s.jitter and not s.cache and indices:
            generator = torch.Generator().manual_seed(s.seed * 1_000_003 + step)
            random = torch.rand(7, s.batch, generator=generator)[:, RANK::WORLD]
            images = data.augment(images, random[:, : len(images)])
        labels = None if labels is None else labels.to(device, non_blocking=True)
        yield images, photos.tags[indices].to(device, non_blocking=True), labels
    if RANK == 0:
        share = waited / (time.perf_counter() - start)
        print(f"{share:.0%} of the time waiting for the loader")


# ---------------------------------------------------------------- labels for the score map's cells
def at_cells(labels, places, size):
    """Labels (H, W) of a photograph -> (h, w): at its score map's places, Net.cell_places(size)."""
    shares = (places + 0.5) / size  # 0..1 along either side
    rows = (shares * labels.shape[0]).long().numpy()
    columns = (shares * labels.shape[1]).long().numpy()
    return labels[rows][:, columns]


def mask_labels(net, photos, masks, s):
    """(N, h, w) uint8 under the cells, from masks: a path each, None: all background."""
    places = net.cell_places(s.size)
    cell_labels = np.zeros((len(masks), len(places), len(places)), np.uint8)
    K = len(photos.classes)
    seen, strange = np.zeros((2, K), int)  # masks of each tag; of them, those of other classes
    background = False  # whether any mask of an object has some
    for i, mask in enumerate(data.progress(masks, "masks read")):
        if mask is None:
            continue
        labels, made = data.read_mask(mask, photos.paths[i], photos.classes)
        cell_labels[i] = at_cells(labels, places, s.size)
        tags = np.flatnonzero(photos.tags[i])
        has_object = tags[0] > 0
        alien = np.setdiff1d(labels, [*tags, 0, VOID]).size > 0
        missing = has_object and not np.isin(tags, labels).any()
        seen[tags] += 1
        strange[tags] += alien or (missing and not made)  # infer.py's need not find every tag
        background |= has_object and not labels.all()

    counts = []
    for name, wrong, n in zip(photos.classes, strange, seen):
        if wrong:
            counts.append(f"{wrong} of {n} of {name}")
    what = f"--masks {s.masks}: masks that hold other classes than their tags: {', '.join(counts)}"
    if ((strange > 0) & (strange >= seen / 2)).any():
        raise InputError(f"{what}; expected class indices, 255 only as void")
    if not background:
        raise InputError(f"--masks {s.masks}: no mask of an object has a pixel of background, 0")
    if counts and RANK == 0:
        print(what)
    return cell_labels


# ---------------------------------------------------------------- labels of the net's own making
@torch.no_grad()
def scores_and_maps(net, photos, i):
    """What the net gives for photo i: scores (1, K, h, w), the maps beneath them (1, D, h, w)."""
    _, features, _ = photos[i, 0.0]  # cached, not mirrored
    features = features[None].to(net.device).float()
    with torch.autocast(features.device.type, torch.bfloat16, enabled=net.amp):
        maps = net.maps(features)
        scores = net.scores(maps)
    return scores.float(), net.maps_beneath(maps).float()


def learn_foreground(net, photos, s, steps=250, batch=32, most=1600):
    """C2AM (Xie et al., CVPR 2022): fills net.foreground, a linear map of a cell's D maps to 1.

    photos: with cached features; at most so many are used, and held in half precision. No label
    says what foreground is: over a batch, the mean vectors of foregrounds shall be alike, those of
    backgrounds, too, and those of the one unlike those of the other. Which is which is told by the
    scores of background and the tagged classes."""
    net.eval()
    used, vectors, objects = data.spread(len(photos), most), [], []
    for i in data.progress(used, "training images looked at"):
        scores, maps = scores_and_maps(net, photos, i)
        shares = scores[0, data.with_background(photos.tags[i])].softmax(0)  # (C, h, w)
        objects.append(1 - shares[0].flatten())
        vectors.append(model.of_mean_one(maps)[0].flatten(1).T.half())  # (h * w, D)
    vectors, objects = torch.stack(vectors), torch.stack(objects)

    torch.manual_seed(s.seed)
    layers = nn.Sequential(nn.Linear(vectors.shape[2], 1, bias=False), nn.BatchNorm1d(1))
    layers = layers.to(vectors.device)
    nn.init.constant_(layers[1].weight, 2)
    optimizer = torch.optim.AdamW(layers.parameters(), 1e-2, weight_decay=1e-4)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        chosen = torch.randperm(len(used))[:batch]
        cells = vectors[chosen.to(vectors.device)].float()  # (B, h * w, D)
        share = layers(cells.flatten(0, 1)).sigmoid().view(len(chosen), 1, -1)  # (B, 1, h * w)
        front = F.normalize((share @ cells)[:, 0], dim=1)  # (B, D)
        back = F.normalize(((1 - share) @ cells)[:, 0], dim=1)
        unlike = -torch.log(1 - cosines(front, back)).mean()
        loss = unlike + alike(front) + alike(back)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()

    # The normalisation becomes part of the map, and so does what `--foreground` asks for.
    fused = fuse_linear_bn_eval(*layers.eval().requires_grad_(False))
    logits = torch.cat([fused(cells.float()) for cells in vectors])[:, 0]  # (N * h * w,)
    agreement = torch.stack([logits, objects.flatten()]).cov()[0, 1]
    factor = s.foreground * agreement.sign()
    net.foreground.weight.copy_((factor * fused.weight)[:, :, None, None])
    net.foreground.bias.copy_(factor * fused.bias)


def cosines(a, b):
    """Of unit vectors (N, D) and (M, D): (N, M), in 0..1, and log(x) and log(1 - x) finite."""
    return (a @ b.T).clamp(1e-4, 1 - 1e-4)


def alike(vectors, alpha=0.25):
    """Small where unit vectors (N, D) are alike; the most alike pairs count most (C2AM)."""
    similarity = cosines(vectors, vectors).sort(1, descending=True).values
    others = similarity[:, 1:]  # (N, N - 1): each is the most alike to itself
    rank = torch.arange(others.shape[1], device=vectors.device)
    return -(torch.exp(-alpha * rank) * torch.log(others)).mean()


def own_labels(net, photos, s):
    """Self-training: (N, h, w) uint8 under the cells, made by net from each photo and its tags."""
    net.eval()

    def scored_photos():
        for i in data.progress(range(len(photos)), "training images labelled"):
            tagged = data.with_background(photos.tags[i])
            scores, maps = scores_and_maps(net, photos, i)
            yield photos.paths[i], tagged, net.tagged_scores(scores, maps, tagged).cpu()

    stride, _, centre = model.geometry(net.rows)
    label = functools.partial(label_cells, stride, centre, s.size, s.sure)
    return np.stack(list(infer.overlapped(label, scored_photos(), s.workers)))


def label_cells(stride, centre, size, sure, scored):
    """Labels (h, w) of one photograph, of (path, tagged classes (C,), their scores (1, C, h, w)).

    Cell i sits on pixel centre + stride * i of the size x size pixels that the net has seen."""
    path, tagged, scores = scored
    image = data.shrink(data.load_image(path, near=size), size)
    p = model.upsample(scores, image.shape[:2], stride, centre, (size, size)).softmax(1)[0]
    regions = infer.coarse_superpixels(image)
    labels = infer.labels_from_tags(p.numpy(), tagged, image, regions, sure)
    places = centre + stride * torch.arange(scores.shape[2])
    return at_cells(labels, places, size)


# ---------------------------------------------------------------- the command line
def settings_help():
    """{setting: (group, what it takes or "", help)}, read from the comments of Settings."""
    described, group = {}, ""
    for line in inspect.getsource(Settings).splitlines():
        heading = re.fullmatch(r"    # (.*)", line)
        setting = re.fullmatch(r"    (\w+): .*?  # (?:([A-Z,]+): )?(.*)", line)
        if heading:
            group = heading[1]
        elif setting:
            described[setting[1]] = group, setting[2] or "", setting[3]
    return described


def paths():
    """Names of the settings that are a file or a folder, and so may move."""
    names = [name for name, (_, takes, _) in settings_help().items() if takes in ("DIR", "FILE")]
    names.remove("masks")  # of which a run's record keeps whether there are any
    return names


def as_flag(value):
    """A setting's value as its flag takes it: (3, 1) as 3,1."""
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def parse(argv):
    """Command line -> (preset, Settings, {what was given}); refuses unknown flags and values."""
    usage = f"train.py [{'|'.join(PRESETS)}] [--setting value ...]"
    options = {"usage": usage, "epilog": TAKES, "argument_default": argparse.SUPPRESS}
    parser = data.Parser(description=__doc__, **options)
    parser.add_argument("preset", nargs="?", default="toy", help=f"{', '.join(PRESETS)} [toy]")
    described, groups = settings_help(), {}
    for field in dataclasses.fields(Settings):
        group, takes, text = described[field.name]
        default = as_flag(field.default)
        values = [default] if default and "[" not in text else []
        for name, preset in PRESETS.items():
            if field.name in preset:
                values.append(f"{name} {as_flag(preset[field.name])}")
        if values:
            text = f"{text} [{'; '.join(values)}]"
        if field.type is bool:
            options = {"action": argparse.BooleanOptionalAction}
        else:
            kind = infer.numbers if field.type is tuple else field.type
            options = {"type": kind, "choices": CHOICES.get(field.name), "metavar": takes}
        if group not in groups:
            groups[group] = parser.add_argument_group(group)
        groups[group].add_argument(flag(field.name), help=text, **options)

    given = vars(parser.parse_args(argv))
    preset = given.pop("preset")
    if preset not in PRESETS:  # not by choices: a misspelt flag's value may stand here
        parser.error(f"argument preset: '{preset}', not one of {', '.join(PRESETS)}")
    s = Settings(**{"out": f"out/{preset}", **PRESETS[preset], **given})
    for name, (_, takes, _) in described.items():
        low, high = RANGES.get(takes, (None, None))
        value = getattr(s, name)
        if low is not None and not low <= value < high:
            parser.error(f"argument {flag(name)}: {value}; expected {low} or more, below {high}")
    fill_in(preset, s, given)
    wrong = problem(preset, s, given)
    if wrong:
        parser.error(f"argument {wrong}")
    return preset, s, given


def fill_in(preset, s, given):
    """What depends on other settings, where it is not given."""
    trunk = TRUNKS[s.trunk]
    photographs = preset not in ("toy", "paper")  # whole ones, squashed to size x size
    s.size = s.size or trunk.size
    if photographs and not s.sides:
        s.sides = (s.size,)
    if s.masks and "self_steps" not in given:
        s.self_steps = 0
    if photographs and (s.self_steps or s.masks) and "train_convs" not in given:
        s.train_convs = trunk.tuned
    if "trunk_lr" not in given and not (photographs and trunk.weights):  # else the preset's
        s.trunk_lr = s.lr
    if s.cache == "no":
        s.cache = ""
    elif not s.cache and photographs and s.train_convs >= 0:
        s.cache = f"{s.out}/cache"


def flag(name):
    return "--" + name.replace("_", "-")


def problem(preset, s, given):
    """The first thing wrong with the settings, or given in vain; "" if nothing is."""
    _, needed = SOURCES[preset]
    for name in needed:
        if not getattr(s, name):
            return f"{flag(name)}: {preset} needs it"
    for other, (_, names) in SOURCES.items():
        for name in names:
            if name in given and name not in needed:
                return f"{flag(name)}: {preset} does not read it; did you mean  train.py {other}  ?"
    convs = sum(row.kind != "pool" for row in TRUNKS[s.trunk].rows)
    widths = len(s.head or TRUNKS[s.trunk].head)
    toy, paper = preset == "toy", preset == "paper"
    if not -1 <= s.train_convs <= convs:
        return f"--train-convs: {s.trunk} has {convs}"
    if s.batch % WORLD:
        return f"--batch: it cannot be shared by {WORLD} processes"
    if not s.r:
        return "--r: expected more than 0"
    if s.self_steps and (toy or not s.cache or s.masks):
        return "--self-steps: needs photographs, a --cache and no --masks; else give 0"
    if s.masks and (paper or (s.jitter and not s.cache)):
        return "--masks: labels are not cropped or turned; add --no-jitter or --cache, not paper"
    if s.cache and (paper or s.train_convs < 0):
        return "--cache: nothing is frozen, or images are cropped afresh; give --cache no"
    try:
        model.dense_rows(TRUNKS[s.trunk].rows, s.dense)
    except ValueError as e:  # "dense 3: ..."
        return f"--{e}"
    in_vain = {
        "weights": not TRUNKS[s.trunk].weights, "kernel": len(s.kernel) > widths + 1,
        "dropout": not widths, "r": s.aggregation in ("max", "mean", "sum"),
        "trunk_lr": not s.train_convs, "self_rounds": not s.self_steps, "sure": not s.self_steps,
        "foreground": not s.cache or not (s.self_steps or s.masks),
        "background": preset != "voc", "synsets": not s.imagenet and not s.background,
        "limit": toy, "masks": toy,
    }  # fmt: skip
    for name in given:
        if in_vain.get(name):
            return f"{flag(name)}: does nothing with these settings; leave it out"
    return ""


# ---------------------------------------------------------------- the run's folder
def plain_settings(s, photos):
    """The settings as a checkpoint keeps them, with a digest of the photographs and labels."""
    digest = hashlib.sha256(photos.tags.numpy().tobytes())
    files = [path for path in photos.paths if not isinstance(path, np.ndarray)]
    for path in files:
        digest.update(os.fsencode(Path(path).name))
        if os.path.exists(path):
            with open(path, "rb") as file:  # its size and last bytes tell it from others
                size = file.seek(0, os.SEEK_END)
                file.seek(max(0, size - 4096))
                digest.update(f"{size}".encode() + file.read())
    if photos.labels is not None:
        digest.update(photos.labels.tobytes())
    settings = dataclasses.asdict(s)
    settings["masks"] = "given" if s.masks else ""
    return {**settings, "photos": digest.hexdigest()[:12], "cached": bool(s.cache)}


def git_commit():
    """The code's, or "unknown"."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.check_output(command, stderr=subprocess.DEVNULL, text=True).strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def read_resumed(path, record, net):
    """The checkpoint to go on from; fills the net. Raises InputError listing what differs."""
    with data.reading(path, "a checkpoint of this run, or a new run without --resume"):
        ckpt = model.read_checkpoint(path)
        was = {**ckpt["settings"], "classes": ckpt["classes"]}
        now = {**record, "classes": net.classes}
        may_change = MAY_CHANGE + paths()
        fixed = [name for name in now if name not in may_change]
        if not ckpt["optimizer"]:
            raise ValueError("a head.pt, which keeps no optimiser")
        self_training = ckpt["step"] > min(was["steps"], now["steps"])  # by either count
        if self_training:
            fixed += ["steps", "self_steps"]
        elif bool(was["self_steps"]) != bool(now["self_steps"]) and now["train_convs"]:
            fixed += ["self_steps"]  # whether tags have tuned the trunk
        differ = []
        for name in fixed:
            what = "photos, tags or masks" if name == "photos" else name
            if was.get(name) != now[name]:
                differ.append(f"{what} was {was.get(name)} and is {now[name]}")
        if differ:
            raise InputError(f"{path}: --resume with other {', '.join(differ)}; give the former")
        if ckpt["step"] > now["steps"] + now["self_steps"] * now["self_rounds"]:
            raise ValueError(f"at step {ckpt['step']}, past the end of these settings")
        model.load_weights(net, ckpt)
    if was["steps"] != now["steps"] and now["schedule"] == "cosine" and RANK == 0:
        print("other --steps: the learning rate follows their cosine from here on")
    return ckpt


def begin_log(path, step):
    """Start log.csv; when a run is resumed keep the rows that it had at its checkpoint."""
    text = "step,samples,loss,lr,images_per_s\n"
    if step and path.exists():
        for row in path.read_text(errors="replace").splitlines()[1:]:
            number = row.split(",")[0]
            if row.count(",") == 4 and number.isdigit() and int(number) <= step:
                text += row + "\n"
    with data.writing(path) as file:
        file.write(text.encode())


# ---------------------------------------------------------------- several processes
def join_processes(device):
    """The device of this process, once it has met the others that torchrun started."""
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    elif os.environ.get("LOCAL_WORLD_SIZE") == str(WORLD):  # one machine, whose name may mislead
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    wait = datetime.timedelta(days=1)  # for the one that caches and labels
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=wait)
    return device


@contextlib.contextmanager
def first_process_first():
    """The first process runs the block, then the others, which find whole what it has written."""
    if RANK > 0:
        dist.barrier()
    yield
    if RANK == 0 and WORLD > 1:
        dist.barrier()


# ---------------------------------------------------------------- from photographs to a checkpoint
def load_photos(preset, s):
    """(the preset's tagged photographs, and with --masks a path or None for each).

    Raises InputError where a file cannot be used, or no photograph has an object."""
    read_photos, _ = SOURCES[preset]
    photos = read_photos(s)
    if s.background:
        extra = data.imagenet_photos(s.background, s.synsets)
        extra = extra.take(torch.nonzero(extra.tags[:, 0]).flatten().tolist())
        if not len(extra):
            raise InputError(f"--background {s.background}: no photograph of no VOC class there")
        tags = torch.cat([photos.tags, extra.tags])
        photos = data.Photos(photos.paths + extra.paths, tags, photos.classes)
    if s.limit:
        photos = photos.take(data.spread(len(photos), s.limit))
    if photos.tags[:, 0].all():
        raise InputError("no photograph has an object; expected some of each class")
    photos.size, photos.crop = s.size, preset == "paper"
    if s.masks:
        return data.find_masks(photos, s.masks)
    return photos, None


def describe(preset, s, given, net, photos):
    """Print what the run uses: photographs, classes, network, and what was asked for."""
    none = int(photos.tags[:, 0].sum())  # of background alone
    kinds = f"{len(photos) - none:,} with objects, {none:,} of background alone"
    precision = " in bfloat16" if net.amp else ""
    print(f"{preset} on {net.device}{precision}: {len(photos):,} images, {kinds}")
    counts = dict(zip(photos.classes, photos.tags.sum(0).int().tolist()))
    print(f"tags: {', '.join(f'{name} {count:,}' for name, count in counts.items())}")
    absent = [name for name in photos.classes[1:] if not counts[name]]
    if absent:
        print(f"warning: no photograph of {', '.join(absent)}")
    if not none:
        print("warning: no photograph without objects: what surrounds one may be learned as it")
    trained = sum(p.numel() for p in net.parameters() if p.requires_grad)
    frozen = f", frozen trunk {fingerprint(net.frozen_layers)}" if net.frozen_convs else ""
    print(f"{s.trunk}: {trained:,} trained parameters{frozen}")
    if frozen and not net.spec.weights:
        print("warning: a frozen trunk of random weights; give --train-convs -1 --self-steps 0")
    print(f"given: {', '.join(f'{name}={value}' for name, value in given.items()) or 'nothing'}")


def prepare_net(s, classes, device):
    """The network with its public weights, on the device."""
    generator = torch.Generator().manual_seed(s.seed)
    net = model.build_net(dataclasses.asdict(s), classes, generator)
    least = model.in_size(1, net.rows)
    if s.size < least:
        raise InputError(f"--size {s.size}: one cell takes {least} pixels; give a larger --size")
    if net.spec.weights:
        model.load_trunk(net, s.weights)
    net = net.to(device).to(memory_format=torch.channels_last)
    net.amp = model.has_bfloat16(net.device) and s.amp
    return net


def cached(net, photos, s):
    """The photos with their frozen features, computed where the cache does not hold them."""

    def compute(images):
        images = images.to(net.device)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=net.amp):
            return torch.cat([net.features(part) for part in images.split(4)])

    made_of = (fingerprint(net.frozen_layers), net.frozen_rows, net.spec.mean, net.spec.std)
    network = f"{s.trunk} {made_of} bfloat16 {net.amp}"
    with first_process_first():
        return data.with_features(photos, compute, network, s.cache, s.workers, s.jitter)


def round_labels(net, photos, s, file, made):
    """Labels (N, h, w) to learn in a round of self-training, read from a file.

    Unless it is made, the first process learns the foreground and writes it; then all read it."""
    with first_process_first():
        if RANK == 0 and not made:
            learn_foreground(net, photos, s)
            labels = own_labels(net, photos, s)
            with data.writing(file) as out:
                np.save(out, labels)
        with data.reading(file, "labels of this run's photographs; train again"):
            labels = np.load(file)
            if len(labels) != len(photos):
                raise ValueError(f"{len(labels)} labels")
    if WORLD > 1:  # what the first process has learned
        for p in net.foreground.parameters():
            dist.broadcast(p, 0)
    return labels


def run_stages(net, photos, s, record, saved):
    """The first stage learns the tags, and masks if given; later ones labels of the net's own, too.

    saved: the checkpoint to go on from, or {"step": 0}."""
    stages = [range(s.steps)]
    for _ in range(s.self_rounds if s.self_steps else 0):
        end = stages[-1].stop
        stages.append(range(end, end + s.self_steps))

    for number, stage in enumerate(stages):
        first = max(stage.start, saved["step"])
        if first >= stage.stop:
            continue  # done before this --resume
        resumed = first > stage.start
        if number > 0:
            file = Path(s.out, f"self{number}.npy")
            photos.labels = round_labels(net, photos, s, file, made=resumed)

        # If labels will come the trunk waits for them: tuned on tags it finds objects less well.
        trunk_learns = number > 0 or len(stages) == 1
        net.trunk[net.frozen_convs :].requires_grad_(trunk_learns)
        optimizer = make_optimizer(net, s)
        if resumed:
            optimizer.load_state_dict(saved["optimizer"])
        if RANK == 0:
            what = "tags and masks" if s.masks else "tags"
            if number > 0:
                what = f"its own labels, round {number}"
            print(f"steps {first} to {stage.stop}: learning {what}")
            print(f"{'step':>8} {'loss':>8} {'lr':>9} {'images/s':>9} {'left':>7}")
        batches = make_batches(photos, s, net.device, range(first, stage.stop))
        train(net, batches, optimizer, s, stage, first, record)


def readable(photos, indices):
    """Yield (photo, tags) of those that can be read, as inference sees them."""
    for i in indices:
        with contextlib.suppress(InputError, OSError):  # named during training
            yield data.shrink(data.load_image(photos.paths[i])), photos.tags[i]


def finish(net, photos, s, record, scenes):
    """What follows training: foreground, thresholds, head.pt, pictures; for the toy the ladder."""
    out = Path(s.out)
    net.eval()
    ckpt = model.read_checkpoint(out / "ckpt.pt")
    if s.cache and s.masks:  # there was no self-training, in which the foreground is learned
        learn_foreground(net, photos, s)
        ckpt["model"]["foreground.weight"] = net.foreground.weight.cpu()
        ckpt["model"]["foreground.bias"] = net.foreground.bias.cpu()
    used = data.progress(data.spread(len(photos), s.threshold_images), "thresholds")
    thresholds = infer.fit_thresholds(net, readable(photos, used))
    ckpt.update(settings=record, thresholds=thresholds)
    with data.writing(out / "ckpt.pt") as file:
        torch.save(ckpt, file)
    halved = {name: tensor.half() for name, tensor in ckpt["model"].items()}
    settings = {**record, **dict.fromkeys(paths(), "")}
    head = {**ckpt, "model": halved, "optimizer": {}, "settings": settings}
    with data.writing(out / "head.pt") as file:
        torch.save(head, file)

    if scenes:
        scene_of = functools.partial(infer.Scene, delta=thresholds)
        priors = [name for name in infer.PRIORS if thresholds or name not in infer.FITTED]
        report, _ = eval_voc.ladder(net, scenes, scene_of, "objects", priors)
        eval_voc.print_ladder(report)
        data.write_json(out / "scores.json", report)
        rows = [(infer.Scene(image), labels) for _, image, labels in scenes[:6]]
    else:
        six = readable(photos, data.spread(len(photos), 6))
        rows = [(infer.Scene(image), None) for image, _ in six]
    log = np.genfromtxt(out / "log.csv", delimiter=",", names=True, ndmin=1)
    infer.save_chart(out / "curves.png", {"loss": (log["step"], log["loss"])}, "step")
    infer.save_panel(out / "panel.png", net, rows)


def main():
    preset, s, given = parse(sys.argv[1:])
    start, out = time.perf_counter(), Path(s.out)
    if s.resume and not (out / "ckpt.pt").exists():
        raise InputError(f"{out / 'ckpt.pt'}: no checkpoint; leave out --resume, or give its --out")

    device = model.pick_device(s.device)
    if WORLD > 1:
        device = join_processes(device)
    photos, masks = load_photos(preset, s)
    net = prepare_net(s, photos.classes, device)
    if masks:
        photos.labels = mask_labels(net, photos, masks, s)
    record = plain_settings(s, photos)
    saved = read_resumed(out / "ckpt.pt", record, net) if s.resume else {"step": 0}

    if RANK == 0:
        lock = data.claim(out)
        describe(preset, s, given, net, photos)
    if s.cache:
        asked = len(photos)
        photos = cached(net, photos, s)
        if RANK == 0 and len(photos) < asked:
            describe(preset, s, given, net, photos)
    if RANK == 0:
        if not s.resume:
            data.move_aside(out, [*(out / name for name in RUN_FILES), *out.glob("self*.npy")])
        how = {"commit": git_commit(), "command": " ".join(sys.argv)}
        data.write_json(out / "settings.json", {**record, **how})
        begin_log(out / "log.csv", saved["step"])

    run_stages(net, photos, s, record, saved)
    if RANK == 0:
        scenes = data.toy_scenes(s.seed, s.toy_scenes) if preset == "toy" else None
        finish(net, photos, s, record, scenes)
        print(f"wrote {out}/ in {time.perf_counter() - start:.0f} s")
        lock.close()
    if WORLD > 1:
        dist.barrier()
        sys.stdout.flush()
        os._exit(0)  # the usual way out: gloo's threads abort it now and then


if __name__ == "__main__":
    data.run_cli(main)
