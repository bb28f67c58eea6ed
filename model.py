"""The network of Pinheiro & Collobert (CVPR 2015): trunk -> head -> aggregation.

    python model.py                        # the trunks: stride, field with the head, GFLOPs
    python model.py overfeat               # its layer table at 400x400, as in Table 1 of the paper
    python model.py vgg16 --bench          # and images per second here, in fp32 and bf16

    net = Net("tiny", ["background", "cat", "dog"])
    scores = net(images)                   # images (B, 3, H, W) in 0..255 -> score map (B, K, h, w)
    image_scores = net.aggregate(scores)   # (B, K), Eq. 6; softmax of it is Eq. 2

Letters in shape comments: B batch, K classes, C background and an image's tags, H W pixels, h w
cells, D channels.
"""

import argparse
import functools
import hashlib
import math
import os
import sys
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

VOID = 255  # a pixel or cell without a label


# ---------------------------------------------------------------- rows: one list describes a net
class Row(NamedTuple):
    """One layer. A ReLU follows every convolution but the head's last."""

    kind: str  # "conv", "pool" (max), or "module": a whole network of torch.hub
    out: int  # output channels; 0 in a pool
    kernel: int  # side of the window
    stride: int = 1
    pad: int = 0  # zeros (in a pool: -inf) on all four sides
    dilation: int = 1


class Trunk(NamedTuple):
    """A feature extractor, as a rule a pretrained one."""

    rows: list  # all that this file needs to know of its arithmetic
    mean: tuple  # its own input normalisation, of RGB in 0..255: one number, or three
    std: tuple
    head: tuple  # hidden widths of the head, unless a preset has its own
    size: int  # side of a training image, pixels
    tuned: int = 0  # last convolutions that labels train, unless --train-convs says otherwise
    feature_scale: float = 1.0  # multiplies the features, so that a fresh head sees values around 1
    weights: str = ""  # its public weights: an address; "file": the user's, as OverFeat's; "": none
    public: str = ""  # their fingerprint; others are used, but told of
    hub: tuple = ()  # of a module: repository, its entry, f(module, images) -> (B, D, h, w)


def patch_tokens(module, images):
    """What DINOv2's last layer says of each patch, after its norm, as maps (B, D, h, w)."""
    return module.get_intermediate_layers(images, n=1, reshape=True)[0]


conv = functools.partial(Row, "conv")  # (out, kernel, stride=1, pad=0)
pool = functools.partial(Row, "pool", 0)  # (kernel, stride)

IMAGENET = {"mean": (123.675, 116.28, 103.53), "std": (58.395, 57.12, 57.375)}

TRUNKS = {
    # Section 3: OverFeat's larger net, "accurate" or "slow", up to its sixth convolution.
    "overfeat": Trunk([
        conv(96, 7, stride=2), pool(3, 3),
        conv(256, 7), pool(2, 2),
        conv(512, 3, pad=1), conv(512, 3, pad=1), conv(1024, 3, pad=1), conv(1024, 3, pad=1),
    ], mean=(118.380948,), std=(61.896913,), head=(1024, 768, 512), size=400, weights="file"),

    "overfeat-fast": Trunk([
        conv(96, 11, stride=4), pool(2, 2),
        conv(256, 5), pool(2, 2),
        conv(512, 3, pad=1), conv(1024, 3, pad=1), conv(1024, 3, pad=1),
    ], mean=(118.380948,), std=(61.896913,), head=(1024, 768, 512), size=400, weights="file"),

    # VGG16's 13 convolutions, without its fifth pool. --dense 2 sees pool 4 and conv5 at stride 8.
    "vgg16": Trunk([
        conv(64, 3, pad=1), conv(64, 3, pad=1), pool(2, 2),
        conv(128, 3, pad=1), conv(128, 3, pad=1), pool(2, 2),
        conv(256, 3, pad=1), conv(256, 3, pad=1), conv(256, 3, pad=1), pool(2, 2),
        conv(512, 3, pad=1), conv(512, 3, pad=1), conv(512, 3, pad=1), pool(2, 2),
        conv(512, 3, pad=1), conv(512, 3, pad=1), conv(512, 3, pad=1),
    ], mean=(123, 117, 104), std=(1,), head=(256,), size=320, tuned=3, feature_scale=0.1,
        weights="https://download.pytorch.org/models/vgg16_features-amdegroot-88682ab5.pth",
        public="bf3033a8a4c4"),

    # For the toy: small enough to train from scratch on a laptop.
    "tiny": Trunk([
        conv(24, 5, stride=2), conv(32, 3), pool(2, 2), conv(64, 3, pad=1),
    ], mean=(128,), std=(64,), head=(), size=96),

    # DINOv2 (Oquab et al., 2023): transformers of torch.hub, one cell a patch of 14 x 14 pixels.
    "dinov2_vits14": Trunk([Row("module", 384, 14, 14)], **IMAGENET, head=(256,), size=322,
        hub=("facebookresearch/dinov2:main", "dinov2_vits14", patch_tokens),
        weights="https://dl.fbaipublicfiles.com/dinov2/dinov2_vits14/dinov2_vits14_pretrain.pth"),
    "dinov2_vitb14": Trunk([Row("module", 768, 14, 14)], **IMAGENET, head=(256,), size=322,
        hub=("facebookresearch/dinov2:main", "dinov2_vitb14", patch_tokens),
        weights="https://dl.fbaipublicfiles.com/dinov2/dinov2_vitb14/dinov2_vitb14_pretrain.pth"),
}  # fmt: skip
OVERFEAT_BYTES = {"overfeat": 578_625_952, "overfeat-fast": 583_683_488}  # whole files


def out_size(n, rows):
    """Cells along one side for an input of n pixels (floor division, as Torch7 and PyTorch do)."""
    for row in rows:
        n = (n + 2 * row.pad - row.dilation * (row.kernel - 1) - 1) // row.stride + 1
    return n


def geometry(rows):
    """(stride, receptive field, centre): cell i sees `field` pixels around centre + stride * i."""
    stride, field, centre = 1, 1, 0.0  # a half integer if windows are even: between two pixels
    for row in rows:
        reach = row.dilation * (row.kernel - 1)
        field += reach * stride
        centre += (reach / 2 - row.pad) * stride
        stride *= row.stride
    return stride, field, centre


def in_size(cells, rows):
    """Smallest input side, in pixels, that gives this many cells, with the rows' own padding."""
    stride, _, centre = geometry(rows)
    return int(stride * (cells - 1) + 2 * centre + 1)


def centring(n, rows):
    """(left, right, cells, offset): zero padding that puts cell i on pixel stride * i + offset.

    n: side of the image in pixels; ceil(n / stride) cells; offset: 0, or 0.5 of even windows."""
    stride, _, centre = geometry(rows)
    cells, left = math.ceil(n / stride), max(0, math.floor(centre))
    return left, max(0, in_size(cells, rows) - n - left), cells, centre - left


def dense_rows(rows, factor):
    """The same net on a grid `factor` times finer: strides removed, later rows dilated (section 4).

    One pass equals the factor**2 passes over shifted inputs that the paper stitches together."""
    stride = geometry(rows)[0]
    if factor < 1 or stride % factor:
        raise ValueError(f"dense {factor}: it must divide the stride, {stride}")
    if factor > 1 and any(row.kind == "module" for row in rows):
        raise ValueError(f"dense {factor}: not for this trunk; give a larger --size, --sides")
    remaining, dilation, dense = stride // factor, 1, []
    for row in rows:
        kept = math.gcd(remaining, row.stride)  # until the product is stride // factor
        pad = row.pad * dilation
        dense.append(row._replace(stride=kept, pad=pad, dilation=row.dilation * dilation))
        remaining //= kept
        dilation *= row.stride // kept
    return dense


def layer_table(rows, n):
    """A dict for each row, of an input of n x n pixels; lengths in pixels."""
    maps, lines = 3, []
    for i, row in enumerate(rows):
        n = out_size(n, [row])
        weights = row.out * maps * row.kernel**2  # 0 in a pool
        maps = row.out or maps
        step, field, centre = geometry(rows[: i + 1])
        line = {"kernel": row.kernel, "stride": row.stride, "pad": row.pad, "cells": n}
        line |= {"maps": maps, "params": weights + row.out, "GFLOPs": 2e-9 * weights * n * n}
        line |= {"step": step, "field": field, "centre": centre}
        lines.append(line)
    return lines


# ---------------------------------------------------------------- aggregation and losses
def lse(scores, r):
    """Log-Sum-Exp over the cells, Eq. 6: (1/r) log mean exp(r s). scores (B, K, h, w) -> (B, K).

    Large r tends to max, small r to mean. torch subtracts the maximum: any scores are safe."""
    cells = scores.flatten(2)  # (B, K, h * w)
    return (torch.logsumexp(r * cells, dim=2) - math.log(cells.shape[2])) / r


AGGREGATIONS = {  # name: f(scores (B, K, h, w), r) -> (B, K)
    "lse": lse,
    "max": lambda scores, r: scores.amax((2, 3)),  # Eq. 5
    "mean": lambda scores, r: scores.mean((2, 3)),
    "sum": lambda scores, r: scores.sum((2, 3)),  # Eq. 4
}


def tag_loss(image_scores, tags):
    """Eq. 2 and 3: minus the log-likelihood of each image's tags, which share the target equally.

    image_scores (B, K); tags (B, K) of 0/1 -> (B,)."""
    return F.cross_entropy(image_scores, tags / tags.sum(1, keepdim=True), reduction="none")


def sigmoid_loss(image_scores, tags):
    """Binary cross-entropy of each class on its own, background too: the mean over them (B,)."""
    return F.binary_cross_entropy_with_logits(image_scores, tags, reduction="none").mean(1)


LOSSES = {  # name: f(image_scores (B, K), tags) -> (B,); f(image_scores (K,)) -> q (K,)
    "softmax": (tag_loss, lambda image_scores: image_scores.softmax(0)),
    "sigmoid": (sigmoid_loss, torch.sigmoid),
}


def pixel_loss(scores, labels):
    """Cross-entropy of each image's labelled cells, those of background and of objects halves each.

    scores (B, K, h, w), labels (B, h, w), void left out -> (B,). Balanced as the seeding loss of
    Huang et al. (CVPR 2018): however small an object is, it counts as much as what surrounds it.
    An image of background alone counts half."""
    losses = F.cross_entropy(scores, labels.long(), ignore_index=VOID, reduction="none")
    halves = []
    for cells in (labels == 0, (labels > 0) & (labels != VOID)):
        count = cells.sum((1, 2)).clamp(min=1)
        halves.append((losses * cells).sum((1, 2)) / count)
    return (halves[0] + halves[1]) / 2


# ---------------------------------------------------------------- the network (section 3)
class Net(nn.Module):
    """Trunk, head and aggregation. The trunk is frozen but for its last `train_convs` convolutions.

    trunk: a key of TRUNKS. classes: K names, background first. head: widths of its hidden
    convolutions (empty: the trunk's own); one with K outputs follows. kernel: their sides, the last
    for all that remain. loss: a key of LOSSES. train_convs: -1 trains the whole trunk. generator:
    a CPU torch.Generator for the first weights. What `infer.predict` goes by: dense: how many times
    finer than the stride the score map is; sides: an image is seen at each area side x side (empty:
    as it is); amp: in bfloat16."""

    def __init__(self, trunk, classes, head=(), kernel=(3,), aggregation="lse", r=5.0,
                 loss="softmax", dropout=0.5, train_convs=0, dense=1, sides=(), amp=False,
                 generator=None):  # fmt: skip
        super().__init__()
        self.trunk_name, self.spec, self.classes = trunk, TRUNKS[trunk], classes
        self.aggregation, self.r, self.dropout = AGGREGATIONS[aggregation], r, dropout
        self.loss, self.probabilities = LOSSES[loss]
        self.dense, self.sides, self.amp = dense, sides, amp

        # Table 1: unpadded convolutions, the last with an output for every class.
        widths = list(head or self.spec.head) + [len(classes)]
        kernels = list(kernel) + [kernel[-1]] * len(widths)
        self.head_rows = [conv(width, side) for width, side in zip(widths, kernels)]
        self.rows = self.spec.rows + self.head_rows

        convs, channels = nn.ModuleList(), 3  # a module counts as one
        for row in self.rows:
            if row.kind == "pool":
                continue
            if row.kind == "module":
                layer = hub_module(self.spec.hub)
            else:
                layer = nn.Conv2d(channels, row.out, row.kernel)
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu", generator=generator)
                nn.init.zeros_(layer.bias)
            convs.append(layer)
            channels = row.out
        convs[-1].weight.data *= 0.1  # near-uniform class probabilities at the start
        self.trunk = convs[: -len(widths)]
        self.head = convs[-len(widths) :]
        self.foreground = nn.Conv2d(self.head[0].in_channels, 1, 1)
        for p in self.foreground.parameters():
            nn.init.zeros_(p.requires_grad_(False))  # none, until it is learned

        # The trunk's rows are cut before the first convolution that is trained.
        self.frozen_convs = len(self.trunk) - train_convs if train_convs >= 0 else 0
        places = [i for i, row in enumerate(self.spec.rows) if row.kind != "pool"]
        places.append(len(self.spec.rows))
        cut = places[self.frozen_convs]
        self.frozen_rows, self.tuned_rows = self.spec.rows[:cut], self.spec.rows[cut:]
        self.frozen_layers.requires_grad_(False)
        for name, value in (("mean", self.spec.mean), ("std", self.spec.std)):
            constant = torch.tensor(value).float().view(1, -1, 1, 1)
            self.register_buffer(name, constant, persistent=False)

    @property
    def frozen_layers(self):
        """Those of the trunk that nothing trains."""
        return self.trunk[: self.frozen_convs]

    @property
    def device(self):
        """The torch.device that it is on."""
        return self.mean.device

    def run_rows(self, x, rows, convs, dropout=0.0):
        """Apply rows to x (B, D, h, w), with the convolutions' weights in order."""
        convs = iter(convs)
        for row in rows:
            if row.kind == "pool":
                x = F.max_pool2d(x, row.kernel, row.stride, row.pad, row.dilation)
            elif row.kind == "module":
                h, w = (n // row.stride * row.stride for n in x.shape[2:])
                x = self.spec.hub[2](next(convs), x[:, :, :h, :w])
            else:
                layer = next(convs)
                x = F.conv2d(x, layer.weight, layer.bias, row.stride, row.pad, row.dilation)
                if layer is not self.head[-1]:  # Eq. 1: nothing after the last
                    x = F.dropout(F.relu_(x), dropout)
        return x

    def normalise(self, images):
        """images (B, 3, H, W), uint8 or float in 0..255 -> zero-mean float, channels last."""
        return ((images - self.mean) / self.std).contiguous(memory_format=torch.channels_last)

    @torch.no_grad()
    def features(self, images):
        """What no gradient reaches and a cache may hold: images (B, 3, H, W) -> (B, D, h, w)."""
        return self.run_rows(self.normalise(images), self.frozen_rows, self.trunk)

    def maps(self, features):
        """Features -> the trunk's maps (B, D, h, w), by what is trained of it."""
        return self.run_rows(features, self.tuned_rows, self.trunk[self.frozen_convs :])

    def scores(self, maps, rows=None):
        """The trunk's maps (B, D, h', w') -> score map s (B, K, h, w), Eq. 1; rows: the head's."""
        scaled = maps * self.spec.feature_scale
        dropout = self.dropout if self.head.training else 0.0
        return self.run_rows(scaled, rows or self.head_rows, self.head, dropout)

    def maps_beneath(self, maps, rows=None):
        """The trunk's maps (B, D, h', w'), cropped to the cells of `scores`: (B, D, h, w)."""
        rows = rows or self.head_rows
        h, w = (out_size(n, rows) for n in maps.shape[2:])
        first = int(geometry(rows)[2])
        return maps[:, :, first : first + h, first : first + w]

    def pixel_scores(self, scores, maps):
        """Scores to label by (B, K, h, w): the background's less the learned foreground.

        maps: the trunk's beneath them (B, D, h, w); the foreground: train.learn_foreground."""
        foreground = self.foreground(of_mean_one(maps)).float()
        return torch.cat([scores[:, :1] - foreground, scores[:, 1:]], 1)

    def tagged_scores(self, scores, maps, tagged, background=0.3, sharpness=3):
        """Scores of the labels of one image whose tags are known: (1, C, h, w).

        tagged: indices (C,) of background and its tags. The mean of two log-softmaxes: of the
        scores, where a frequent class suppresses a rare one (a rider the horse), and of `tag_maps`,
        where it cannot. There `background` is what an object has to exceed, `sharpness` a power;
        both were chosen on train masks (README.md, Results)."""
        by_scores = self.pixel_scores(scores, maps)[:, tagged].log_softmax(1)
        objects = tag_maps(scores, maps, tagged[1:]).clamp(min=1e-3).log()
        elsewhere = torch.full_like(scores[:, :1], math.log(background))
        map_scores = sharpness * torch.cat([elsewhere, objects], 1)
        by_maps = self.pixel_scores(map_scores, maps).log_softmax(1)
        return (by_scores + by_maps) / 2

    def forward(self, images):
        return self.scores(self.maps(self.features(images)))

    def aggregate(self, scores):
        """score map (B, K, h, w) -> image scores (B, K)."""
        return self.aggregation(scores.float(), self.r)

    def cell_places(self, size):
        """Where an unpadded score map's cells lie along a side of `size` pixels: (h,), pixels."""
        stride, _, centre = geometry(self.rows)
        return centre + stride * torch.arange(out_size(size, self.rows))

    @torch.no_grad()
    def score_map(self, images):
        """Scores of whole images, padded so that cell i sits on pixel stride * i + offset.

        images (B, 3, H, W) in 0..255 -> scores (B, K, h, w), of ceil(H / stride) and ceil(W /
        stride) cells; the trunk's maps beneath them (B, D, h, w); stride and offset in pixels."""
        rows, depth = dense_rows(self.rows, self.dense), len(self.spec.rows)
        top, bottom, h, offset = centring(images.shape[2], rows)
        left, right, w, _ = centring(images.shape[3], rows)
        x = F.pad(self.normalise(images), (left, right, top, bottom))
        maps = self.run_rows(x, rows[:depth], self.trunk)
        scores = self.scores(maps, rows[depth:])[:, :, :h, :w].float()
        maps = self.maps_beneath(maps, rows[depth:])[:, :, :h, :w].float()
        return scores, maps, geometry(rows)[0], offset


def of_mean_one(maps):
    """Each image's maps (B, D, h, w) divided by their mean magnitude."""
    return maps / maps.abs().mean((1, 2, 3), keepdim=True).clamp(min=1e-12)


def tag_maps(scores, maps, tags):
    """Where each tag is, in 0..1, whatever the others' scores: (1, C, h, w) of indices tags (C,).

    scores (1, K, h, w), the trunk's maps beneath them (1, D, h, w). A tag's score less the mean
    over all classes, where it is above its median; averaged over cells that look alike."""
    margin = (scores[:, tags] - scores.mean(1, keepdim=True)).flatten(2)
    above = F.relu(margin - margin.median(2, keepdim=True).values)
    averaged = above @ affinity(maps)  # (1, C, h * w)
    low = averaged.amin(2, keepdim=True)
    high = averaged.amax(2, keepdim=True)
    share = (averaged - low) / (high - low).clamp(min=1e-6)
    return share.unflatten(2, scores.shape[2:])


def affinity(maps, power=2):
    """How alike the cells of maps (1, D, h, w) are: (h * w, h * w), of columns that sum to 1.

    x @ affinity averages x (..., h * w) over like cells. Signed square roots, less their mean over
    the cells; their cosines, where they are positive, to a power."""
    vectors = maps[0].flatten(1)  # (D, h * w)
    roots = vectors.sign() * vectors.abs().sqrt()
    cells = F.normalize(roots - roots.mean(1, keepdim=True), dim=0)
    similarity = F.relu(cells.T @ cells) ** power
    return similarity / similarity.sum(0).clamp(min=1e-6)


def upsample(scores, size, stride, offset, seen=None):
    """Bilinear interpolation from cells to pixels, exact at any stride, offset; constant outside.

    scores (B, K, h, w), cell i on pixel stride * i + offset -> (B, K, *size); seen: (H', W') of the
    image that the net has seen, if it was at another resolution than size, (H, W)."""
    matrices = []  # (H, h) and (W, w): weights of the cells in each pixel
    for n, cells, n_seen in zip(size, scores.shape[2:], seen or size):
        pixels = torch.arange(n, device=scores.device)
        at = ((pixels + 0.5) * (n_seen / n) - 0.5 - offset) / stride  # in cells
        distance = at.clamp(0, cells - 1)[:, None] - torch.arange(cells, device=scores.device)
        matrices.append((1 - distance.abs()).clamp(min=0).to(scores.dtype))
    return matrices[0] @ scores @ matrices[1].T


# ---------------------------------------------------------------- weights of the public trunks
def hub_module(hub):
    """A module of torch.hub (Trunk.hub), whose code runs here, without weights. Raises OSError."""
    repository, name, _ = hub
    try:
        options = {"pretrained": False, "trust_repo": True, "verbose": False}
        return torch.hub.load(repository, name, **options).eval()
    except Exception as e:  # of the connection, and whatever foreign code raises
        why = f"no code of torch.hub's {repository} ({e}); needs the internet, or a checkout of it"
        raise OSError(None, why, name) from e


def read_overfeat(path, name, params):
    """OverFeat's headerless little-endian float32, weight then bias of each layer, as tensors."""
    sizes, length = [p.numel() for p in params], os.path.getsize(path)
    if length not in (4 * sum(sizes), OVERFEAT_BYTES[name]):
        known = [f"{size:,} (--trunk {trunk})" for trunk, size in OVERFEAT_BYTES.items()]
        raise ValueError(f"{length:,} bytes, but OverFeat's files have {' and '.join(known)}")
    values = np.fromfile(path, "<f4", sum(sizes)).astype(np.float32)
    blocks = torch.from_numpy(values).split(sizes)
    if not all(block.any() for block in blocks):
        raise ValueError("zeros in the place of weights")
    return [block.view_as(p) for block, p in zip(blocks, params)]


def read_state(path, url):
    """A state dict from a file or, where there is no path, fetched from its public address."""
    options = {"map_location": "cpu", "weights_only": True}
    if path:
        return torch.load(path, **options)
    return torch.hub.load_state_dict_from_url(url, check_hash=True, **options)


def load_trunk(net, path=""):
    """Fill the trunk from a file, or from its public address. Raises OSError that names it."""
    name, source = net.trunk_name, net.spec.weights
    params = list(net.trunk.parameters())
    expected = f"expected {name}'s {len(params)} tensors by --weights FILE (README.md, Weights)"
    if not path and source == "file":
        raise OSError(None, f"no weights; {expected}", name)
    try:
        if net.spec.hub:
            net.trunk[0].load_state_dict(read_state(path, source))
            blocks = params  # filled already, only checked below
        elif source == "file":
            blocks = read_overfeat(path, name, params)
        else:
            state = read_state(path, source)
            blocks = [x for name, x in state.items() if name.startswith("features.")]
        if [b.shape for b in blocks] != [p.shape for p in params]:
            raise ValueError(f"{len(blocks)} tensors, or of other shapes")
        if not all(b.isfinite().all() for b in blocks):
            raise ValueError("NaN or Inf among its weights")
    except Exception as e:  # torch raises half a dozen kinds, with pages of text
        why = e if isinstance(e, (OSError, ValueError)) else type(e).__name__
        raise OSError(None, f"cannot be used ({why}); {expected}", path or source) from e
    for p, block in zip(params, blocks):
        p.data.copy_(block)
    if path and net.spec.public and fingerprint(net.trunk) != net.spec.public:
        print(f"{path}: not the public weights of {name}; they have to expect the same input")


def fingerprint(layers):
    """12 hex digits of these layers' weights, the same for their half-precision copies."""
    digest = hashlib.sha256()
    for p in layers.parameters():
        digest.update(p.detach().half().cpu().numpy().tobytes())
    return digest.hexdigest()[:12]


# ---------------------------------------------------------------- checkpoints
FORMAT = 2  # of a checkpoint; one of another edition is refused


def left_out(net):
    """Prefixes of the weights that a checkpoint leaves out: frozen ones that are public."""
    return tuple(f"trunk.{i}." for i in range(net.frozen_convs if net.spec.weights else 0))


def checkpoint(net, settings, step, optimizer):
    """What train.py saves: plain values, so that weights_only=True reads it."""
    kept, prefixes = {}, left_out(net)
    for name, tensor in net.state_dict().items():
        if not name.startswith(prefixes):
            kept[name] = tensor.cpu()
    return {
        "format": FORMAT,
        "step": step,  # optimiser steps done
        "settings": settings,  # train.plain_settings
        "classes": net.classes,  # names, background first
        "trunk": fingerprint(net.frozen_layers),  # those on which the rest was trained
        "model": kept,
        "optimizer": optimizer.state_dict(),
        "thresholds": {},  # delta_k, {"bb": K floats, "seg": K floats}, when training has ended
    }


def read_checkpoint(path):
    """The dict that `checkpoint` makes; executes nothing. Raises ValueError or torch's errors."""
    ckpt = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(ckpt, dict) or ckpt.get("format") != FORMAT:
        raise ValueError("of another program, or of another edition of this one")
    return ckpt


def build_net(settings, classes, generator=None):
    """The Net of a run's settings, a dict. Raises ValueError; KeyError, TypeError if damaged."""
    names = "trunk head kernel train_convs aggregation r loss dropout dense sides amp"
    chosen = {name: settings[name] for name in names.split()}
    return Net(classes=classes, generator=generator, **chosen)


def load_weights(net, ckpt):
    """Fill net, its public trunk apart, from a checkpoint. Raises ValueError, RuntimeError."""
    missing, unexpected = net.load_state_dict(ckpt["model"], strict=False)
    prefixes = left_out(net)
    odd = unexpected + [name for name in missing if not name.startswith(prefixes)]
    odd += [name for name, tensor in ckpt["model"].items() if not tensor.isfinite().all()]
    if odd:
        raise ValueError(f"{len(odd)} damaged tensors, such as {odd[0]}")
    actual = fingerprint(net.frozen_layers)
    if actual != ckpt["trunk"]:
        wanted = f"those of fingerprint {ckpt['trunk']} with --weights FILE, not {actual}"
        raise ValueError(f"its head was trained on other trunk weights; give {wanted}")


def load_net(path, weights="", device="cpu", dense=None, sides=None):
    """(net in eval mode, checkpoint). weights: the trunk's file; dense, sides: in place of its own.

    Raises what the functions above raise."""
    ckpt = read_checkpoint(path)
    settings = dict(ckpt["settings"])
    if dense is not None:
        settings["dense"] = dense
    if sides:
        settings["sides"] = sides
    net = build_net(settings, ckpt["classes"])
    dense_rows(net.rows, net.dense)  # raises ValueError where it does not divide the stride
    if left_out(net):
        load_trunk(net, weights or ckpt["settings"]["weights"])
    elif weights:
        raise ValueError(f"it holds the whole trunk, {net.trunk_name}; leave out --weights")
    load_weights(net, ckpt)
    net.amp = net.amp and has_bfloat16(torch.device(device))
    return net.to(device).to(memory_format=torch.channels_last).eval(), ckpt


# ---------------------------------------------------------------- devices and their rates
def pick_device(name="auto"):
    """The one place that chooses: "auto" takes CUDA, then MPS (Apple), then the CPU."""
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    known = ["cuda", *gpus] if gpus else []
    known += ["mps", "cpu"] if torch.backends.mps.is_available() else ["cpu"]
    if name not in ("auto", *known):
        raise argparse.ArgumentTypeError(f"no device '{name}'; expected auto, {', '.join(known)}")
    return torch.device(known[0] if name == "auto" else name)


def has_bfloat16(device):
    """Whether a torch.device computes in bfloat16 itself; emulated it is slower than float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type != "cpu":
        return False  # MPS: nobody has tried
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # older than torch 2.11: {}
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def rate(function, tensor):
    """Calls of function(tensor) per second; torch's timer warms up and waits for the device."""
    from torch.utils.benchmark import Timer

    names = {"function": function, "tensor": tensor}
    timer = Timer("function(tensor)", globals=names, num_threads=torch.get_num_threads())
    return 1 / timer.blocked_autorange(min_run_time=3).median


def bench(net, device, gflops, batch=4):
    """Print images/s of the trunk in fp32 and bf16, beside a matrix product's rate in that mode."""
    # The product may use TF32 on a GPU where the convolutions do.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32
    images = torch.zeros(batch, 3, net.spec.size, net.spec.size, device=device)
    for dtype in (torch.float32, torch.bfloat16):
        square = torch.randn(2048, 2048, device=device, dtype=dtype)
        peak = rate(square.matmul, square) * 2e-9 * 2048**3
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype is torch.bfloat16):
            speed = rate(net.features, images) * batch
        share = f"{speed * gflops:.0f} of a matrix product's {peak:.0f} GFLOP/s"
        print(f"{net.trunk_name} trunk on {device}, {dtype}: {speed:.2f} images/s, {share}")
    if device.type == "cuda":
        print(f"most memory held: {torch.cuda.max_memory_allocated(device) / 1e9:.2f} GB")


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("trunk", nargs="?", choices=list(TRUNKS), help="its layer table [list all]")
    parser.add_argument("--bench", action="store_true", help="measure the trunk in fp32 and bf16")
    parser.error = lambda message: parser.exit(2, f"model.py: {message} (see --help)\n")
    args, device = parser.parse_args(), pick_device()
    rows_alone = [name for name in TRUNKS if not TRUNKS[name].hub]  # hub's need the internet
    for name in [args.trunk] if args.trunk else rows_alone:
        net = Net(name, ["background"] * 21).to(device)
        net = net.to(memory_format=torch.channels_last).eval()
        size, depth = net.spec.size, len(net.spec.rows)
        with FlopCounterMode(display=False) as counter:
            net.features(torch.zeros(1, 3, size, size, device=device))
        gflops, lines = counter.get_total_flops() / 1e9, layer_table(net.rows, size)
        params = sum(p.numel() for p in net.trunk.parameters())
        head = sum(p.numel() for p in net.head.parameters())
        print(f"{name}: stride {lines[-1]['step']}, receptive field {lines[-1]['field']}", end=", ")
        print(f"trunk {params:,} parameters and {gflops:.1f} GFLOPs at {size}x{size}", end=", ")
        print(f"head {head:,}")
        if args.trunk:
            print(f"{'':12}", *(f"{column:>10}" for column in lines[0]))
            for i, line in enumerate(lines):
                kind = f"{'trunk' if i < depth else 'head'} {net.rows[i].kind}"
                print(f"{kind:12}", *(f"{round(value, 2):>10,}" for value in line.values()))
        if args.bench:
            bench(net, device, gflops)


if __name__ == "__main__":
    try:
        main()
    except OSError as e:
        sys.exit(f"model.py: {e.filename}: {e.strerror}")
