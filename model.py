"""The network of Pinheiro & Collobert (CVPR 2015): trunk -> head -> aggregation, and the same net made dense.

    python model.py                        # the four trunks: stride, receptive field, parameters, GFLOPs
    python model.py overfeat               # its layer table at 400x400, as in Table 1 of the paper
    python model.py vgg16 --bench          # and images per second here, in fp32 and bf16

    net = Net("tiny", classes=5)
    scores = net(images)                   # images (B, 3, H, W) in 0..255 -> score map (B, K, h, w)
    image_scores = net.aggregate(scores)   # (B, K), Eq. 6; softmax of it is Eq. 2

Letters in shape comments: B batch, K classes, H W pixels, h w cells, D channels.
"""
import argparse
import math
import os
import sys
import time
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


# ---------------------------------------------------------------- rows: one list describes a net

class Row(NamedTuple):
    kind: str                                # "conv" (a ReLU follows, except after the head's last) or "pool" (max)
    out: int                                 # output channels; unused by a pool
    kernel: int
    stride: int = 1
    pad: int = 0                             # zeros, on all four sides
    dilation: int = 1


def conv(out, kernel, stride=1, pad=0):
    return Row("conv", out, kernel, stride, pad)


def pool(kernel, stride):
    return Row("pool", 0, kernel, stride)


class Trunk(NamedTuple):
    rows: list                               # rows whose spatial arithmetic is all this file needs to know
    mean: tuple                              # its own input normalisation, of RGB in 0..255
    std: tuple
    head: tuple                              # default hidden widths of the head
    size: int                                # side of a training crop, pixels
    feature_scale: float = 1.0               # multiplies the features, so that a fresh head sees values around 1
    weights_url: str | None = None           # where its public weights are; "": a file that the user has; None: there are none


_VGG16 = [row for width, times in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))
          for row in [conv(width, 3, pad=1)] * times + [pool(2, 2)]][:-1]
TRUNKS = {
    # Section 3: OverFeat's "accurate" net up to its sixth convolution, before the third pool; 18,916,480 parameters.
    "overfeat": Trunk([conv(96, 7, 2), pool(3, 3), conv(256, 7), pool(2, 2), conv(512, 3, pad=1), conv(512, 3, pad=1),
                       conv(1024, 3, pad=1), conv(1024, 3, pad=1)],
                      (118.380948,) * 3, (61.896913,) * 3, (1024, 768, 512), 400, weights_url=""),
    "overfeat-fast": Trunk([conv(96, 11, 4), pool(2, 2), conv(256, 5), pool(2, 2), conv(512, 3, pad=1),
                            conv(1024, 3, pad=1), conv(1024, 3, pad=1)],
                           (118.380948,) * 3, (61.896913,) * 3, (1024, 768, 512), 400, weights_url=""),
    # VGG16's 13 convolutions, without its fifth pool. --dense 2 sees pool 4 and conv5 at stride 8.
    "vgg16": Trunk(_VGG16, (123.0, 117.0, 104.0), (1.0, 1.0, 1.0), (256,), 320, 0.1,
                   "https://download.pytorch.org/models/vgg16_features-amdegroot-88682ab5.pth"),
    # For the toy: small enough to train from scratch on a laptop.
    "tiny": Trunk([conv(24, 5, 2), conv(32, 3), pool(2, 2), conv(64, 3, pad=1)],
                  (128.0,) * 3, (64.0,) * 3, (), 96),
}


def out_size(n, rows):
    """Cells along one side for an input of n pixels (floor division throughout, as Torch7 and PyTorch do)."""
    for row in rows:
        n = (n + 2 * row.pad - row.dilation * (row.kernel - 1) - 1) // row.stride + 1
    return n


def in_size(cells, rows):
    """Smallest input side, in pixels, that gives this many cells."""
    for row in reversed(rows):
        cells = (cells - 1) * row.stride + row.dilation * (row.kernel - 1) + 1 - 2 * row.pad
    return cells


def geometry(rows):
    """(stride, receptive field, centre): cell i looks at a window of that many pixels centred on centre + stride * i.

    All in pixels of the input, 0-based; the centre is a half-integer where a window has an even side.
    """
    stride, field, centre = 1, 1, 0.0
    for row in rows:
        reach = row.dilation * (row.kernel - 1)
        field += reach * stride
        centre += (reach / 2 - row.pad) * stride
        stride *= row.stride
    return stride, field, centre


def centring(n, rows):
    """(left, right, cells, offset): zero padding in pixels after which cell i sits on pixel stride * i + offset.

    n: side of the image in pixels. There are ceil(n / stride) cells. offset is 0, or 0.5 where windows are even.
    """
    stride, _, centre = geometry(rows)
    cells, left = -(-n // stride), max(0, math.floor(centre))
    return left, max(0, in_size(cells, rows) - n - left), cells, centre - left


def dense_rows(rows, factor):
    """The same net on a grid `factor` times finer: strides removed, later rows dilated (section 4, shift-and-stitch).

    One pass of these rows equals the factor**2 passes over shifted inputs that the paper stitches together.
    Raises ValueError where factor does not divide the stride.
    """
    left = factor
    removed = []
    for row in reversed(rows):                            # take the factor out of the last strides first
        removed.insert(0, math.gcd(left, row.stride))
        left //= removed[0]
    if left != 1 or factor < 1:
        raise ValueError(f"dense {factor}: it must divide the stride, {geometry(rows)[0]}")
    dense, dilation = [], 1
    for row, gone in zip(rows, removed):
        dense.append(row._replace(stride=row.stride // gone, pad=row.pad * dilation, dilation=row.dilation * dilation))
        dilation *= gone
    return dense


def peak_bytes(rows, height, width):
    """Estimate of the largest two neighbouring float32 activations of one image, in bytes."""
    sizes, channels = [3 * height * width], 3
    for row in rows:
        height, width, channels = out_size(height, [row]), out_size(width, [row]), row.out or channels
        sizes.append(channels * height * width)
    return 4 * max(a + b for a, b in zip(sizes, sizes[1:]))


def table(rows, n):
    """One dict per row for an input of n x n pixels: cells, channels, parameters, multiply-adds (GMAC)."""
    channels, lines = 3, []
    for i, row in enumerate(rows):
        n = out_size(n, [row])
        stride, field, centre = geometry(rows[:i + 1])
        weights = row.out * channels * row.kernel ** 2 if row.kind == "conv" else 0
        channels = row.out or channels
        lines.append(dict(row=row, cells=n, channels=channels, parameters=weights and weights + row.out,
                          gmac=weights * n * n / 1e9, stride=stride, field=field, centre=centre))
    return lines


# ---------------------------------------------------------------- aggregation: score map -> image scores (section 3)

def lse(scores, r):
    """Log-Sum-Exp over the cells, Eq. 6: (1/r) log mean exp(r s). Large r tends to max, small r to mean.

    scores (B, K, h, w) -> (B, K). logsumexp subtracts the maximum, so scores of any size are safe.
    """
    return (torch.logsumexp(r * scores.flatten(2), dim=2) - math.log(scores[0, 0].numel())) / r


AGGREGATIONS = {                                           # name: f(scores (B, K, h, w), r) -> (B, K)
    "lse": lse,
    "max": lambda scores, r: scores.amax((2, 3)),          # Eq. 5
    "mean": lambda scores, r: scores.mean((2, 3)),
    "sum": lambda scores, r: scores.sum((2, 3)),           # Eq. 4
}


def tag_loss(image_scores, tags, form="softmax"):
    """Eq. 2 and 3: minus the mean log-likelihood of the tags.

    image_scores (B, K); tags (B, K) of 0/1, at least one per image. "softmax": the paper's, one label an image;
    several tags share the target equally. "sigmoid": every class on its own. Returns a scalar.
    """
    if form == "sigmoid":
        return F.binary_cross_entropy_with_logits(image_scores, tags)
    return F.cross_entropy(image_scores, tags / tags.sum(1, keepdim=True))


# ---------------------------------------------------------------- the network

class Net(nn.Module):
    """Trunk, head and aggregation. Freezes the trunk but for its last `train_convs` convolutions (-1: trains all).

    trunk: a key of TRUNKS. head: widths of its hidden convolutions; one with `classes` outputs follows. kernels: their
    sides, the last for all that remain.
    generator: a CPU torch.Generator for the initial weights.
    """

    def __init__(self, trunk="overfeat", classes=21, head=None, kernels=(3,), aggregation="lse", r=5.0, dropout=0.5,
                 train_convs=0, generator=None):
        super().__init__()
        self.spec, self.r, self.dropout = TRUNKS[trunk], r, dropout
        self.pool_scores = AGGREGATIONS[aggregation]
        widths = list(self.spec.head if head is None else head) + [classes]
        kernels = list(kernels) + [kernels[-1]] * len(widths)
        self.head_rows = [conv(width, kernel) for width, kernel in zip(widths, kernels)]   # Table 1: unpadded, 3x3
        convs, channels = nn.ModuleList(), 3
        for row in self.rows:
            if row.kind == "conv":
                convs.append(nn.utils.skip_init(nn.Conv2d, channels, row.out, row.kernel))
                nn.init.kaiming_normal_(convs[-1].weight, nonlinearity="relu", generator=generator)
                nn.init.zeros_(convs[-1].bias)
                channels = row.out
        convs[-1].weight.data *= 0.1                               # near-uniform class probabilities at the start
        self.trunk, self.head = convs[:-len(widths)], convs[-len(widths):]
        places = [i for i, row in enumerate(self.spec.rows) if row.kind == "conv"] + [len(self.spec.rows)]
        self.cut = places[-1 - train_convs] if train_convs >= 0 else 0    # rows before it are frozen
        self.frozen_convs = sum(row.kind == "conv" for row in self.spec.rows[:self.cut])
        self.trunk[:self.frozen_convs].requires_grad_(False)
        self.register_buffer("mean", torch.tensor(self.spec.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(self.spec.std).view(1, 3, 1, 1), persistent=False)

    @property
    def rows(self):
        return self.spec.rows + self.head_rows

    def run(self, x, rows, convs):
        """Apply rows, with the convolutions' weights in order. Dilated rows reuse the weights as they are."""
        convs = iter(convs)
        for row in rows:
            if row.kind == "pool":
                x = F.max_pool2d(x, row.kernel, row.stride, dilation=row.dilation)
            else:
                layer = next(convs)
                x = F.conv2d(x, layer.weight, layer.bias, row.stride, row.pad, row.dilation)
                x = x if layer is self.head[-1] else F.relu_(x)    # Eq. 1: none after the last
        return x

    def normalise(self, images):
        """images (B, 3, H, W), uint8 or float in 0..255 -> zero-mean float, laid out for the convolutions."""
        return ((images - self.mean) / self.std).contiguous(memory_format=torch.channels_last)

    @torch.no_grad()
    def frozen(self, images):
        """What no gradient reaches and a cache may hold: images (B, 3, H, W) in 0..255 -> features (B, D, h, w)."""
        return self.run(self.normalise(images), self.spec.rows[:self.cut], self.trunk)

    def scores(self, features):
        """features from `frozen` -> score map s (B, K, h, w), Eq. 1."""
        x = self.run(features, self.spec.rows[self.cut:], self.trunk[self.frozen_convs:]) * self.spec.feature_scale
        for row, layer in zip(self.head_rows, self.head):
            x = self.run(x, [row], [layer])
            if layer is not self.head[-1]:
                x = F.dropout(x, self.dropout, self.training)
        return x

    def forward(self, images):
        return self.scores(self.frozen(images))

    def aggregate(self, scores):
        """score map (B, K, h, w) -> image scores (B, K)."""
        return self.pool_scores(scores.float(), self.r)

    @torch.no_grad()
    def dense(self, images, factor=1):
        """Score map of whole images of any size, padded so that cell (i, j) sits on pixel (step*i, step*j) + offset.

        images (B, 3, H, W) in 0..255; factor: how many times finer than the stride (any divisor of it).
        Returns scores (B, K, ceil(H/step), ceil(W/step)), step and offset in pixels.
        """
        rows = dense_rows(self.rows, factor)
        (top, bottom, h, offset), (left, right, w, _) = (centring(n, rows) for n in images.shape[2:])
        x = F.pad(self.normalise(images), (left, right, top, bottom)).contiguous(memory_format=torch.channels_last)
        n = len(self.spec.rows)
        x = self.run(x, rows[:n], self.trunk) * self.spec.feature_scale
        return self.run(x, rows[n:], self.head)[:, :, :h, :w].float(), geometry(rows)[0], offset


def upsample(scores, size, step, offset, seen=None):
    """Bilinear interpolation from cells to pixels, exact for any step and offset; constant beyond the outer cells.

    scores (B, K, h, w), cell i on pixel step * i + offset of the image that the net has seen, of size `seen` (H', W');
    size: (H, W) wanted, the same picture at another resolution. Returns (B, K, H, W).
    """
    def matrix(n, cells, n_seen):
        at = ((torch.arange(n, device=scores.device) + 0.5) * (n_seen / n) - 0.5 - offset) / step
        gap = at.clamp(0, cells - 1)[:, None] - torch.arange(cells, device=scores.device)
        return (1 - gap.abs()).clamp(min=0).to(scores.dtype)
    rows, columns = (matrix(*sides) for sides in zip(size, scores.shape[2:], seen or size))           # (H, h), (W, w)
    return rows @ scores @ columns.T


# ---------------------------------------------------------------- weights of the public trunks

OVERFEAT_BYTES = {"overfeat": 578_625_952, "overfeat-fast": 583_683_488}     # net_weight_1 and net_weight_0, whole


def load_overfeat(net, name, path):
    """Fill the trunk from OverFeat's headerless little-endian float32 file: per layer the weight, then the bias.

    Reads the first bytes only. Raises ValueError if the size is that of no OverFeat file, or a value is not finite.
    """
    need, found = 4 * sum(p.numel() for p in net.trunk.parameters()), os.path.getsize(path)
    whole = OVERFEAT_BYTES[name]
    if found not in (need, whole):
        other = next((f"; this is the size of the file for --trunk {k}" for k, v in OVERFEAT_BYTES.items() if v == found), "")
        raise ValueError(f"{path}: {found:,} bytes, but the weights of {name} have {whole:,} "
                         f"(or the first {need:,} of them){other}; give that --weights")
    values, at = np.memmap(path, "<f4", "r", shape=(need // 4,)), 0
    for layer in net.trunk:
        for p in (layer.weight, layer.bias):
            block = np.array(values[at:at + p.numel()], np.float32)
            if not np.isfinite(block).all():
                raise ValueError(f"{path}: NaN or Inf among the floats {at:,} to {at + p.numel():,}; damaged file?")
            p.data.copy_(torch.from_numpy(block).view_as(p))
            at += p.numel()


def load_trunk(net, name, path=None):
    """Load public weights into the trunk: OverFeat's raw file, or a VGG16 state dict with keys features.N.weight.

    path: a file; None fetches VGG16's from its public address (checked against the hash in its name).
    Raises ValueError naming the file, what was found and what was expected.
    """
    if not path and not net.spec.weights_url:
        raise ValueError(f"trunk {name} needs --weights FILE (see 'Weights' in README.md)")
    if path and not os.path.isfile(path):
        raise ValueError(f"{path}: no such weights file; give the right --weights (vgg16's are fetched without one)")
    if name in OVERFEAT_BYTES:
        return load_overfeat(net, name, path)
    if path:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as e:                        # torch raises half a dozen kinds, with pages of text
            raise ValueError(f"{path}: not a PyTorch state dict ({type(e).__name__}); expected {name}'s") from e
    else:
        try:
            state = torch.hub.load_state_dict_from_url(net.spec.weights_url, map_location="cpu", check_hash=True,
                                                       weights_only=True)
        except OSError as e:
            raise ValueError(f"{net.spec.weights_url}: cannot fetch ({e}); give the file with --weights FILE") from e
    try:
        keys = [k.removesuffix(".weight") for k in state if k.startswith("features.") and k.endswith(".weight")]
        keys.sort(key=lambda k: int(k.split(".")[1]))
        shapes = [tuple(state[f"{k}.{part}"].shape) for k in keys for part in ("weight", "bias")]
    except (AttributeError, KeyError, TypeError, ValueError) as e:
        raise ValueError(f"{path}: not a state dict of {name} ({e}); expected features.N.weight and features.N.bias") from e
    if shapes != [tuple(p.shape) for layer in net.trunk for p in (layer.weight, layer.bias)]:
        raise ValueError(f"{path}: {len(keys)} convolutions {shapes[:2]}..., expected the {len(net.trunk)} of {name}")
    for key, layer in zip(keys, net.trunk):
        layer.weight.data.copy_(state[key + ".weight"])
        layer.bias.data.copy_(state[key + ".bias"])
        if not (layer.weight.isfinite().all() and layer.bias.isfinite().all()):
            raise ValueError(f"{path}: NaN or Inf in {key}; damaged file?")


def pick_device(name="auto"):
    """The one place that chooses: "auto" takes CUDA, then MPS (Apple), then the CPU; or a torch device by name."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    known = dict(cpu=1, cuda=torch.cuda.device_count(), mps=int(torch.backends.mps.is_available()))
    kind, _, index = name.partition(":")
    if int(index or 0) >= known.get(kind, 0):                     # argparse turns the ValueError of int() into its own line
        raise argparse.ArgumentTypeError(f"there is no device '{name}' here; give auto, or one of {known} (name: how many)")
    return torch.device(name)


# ---------------------------------------------------------------- the table

def summary(name):
    """(stride, field, parameters of trunk and of head, GFLOPs of trunk and of head) with the default head and 21 classes."""
    spec = TRUNKS[name]
    lines = table(Net(name).rows, spec.size)
    parts = lines[:len(spec.rows)], lines[len(spec.rows):]
    return (lines[-1]["stride"], lines[-1]["field"], *(sum(x["parameters"] for x in part) for part in parts),
            *(2 * sum(x["gmac"] for x in part) for part in parts))


def describe(name):
    """Print the layer table of a trunk with its default head, at its training size (Table 1 of the paper for overfeat)."""
    spec = TRUNKS[name]
    print(f"\n{name}: input {spec.size}x{spec.size}\n{'':10} {'kernel':>6} {'stride':>6} {'pad':>4} {'cells':>9} {'channels':>8} "
          f"{'parameters':>11} {'GFLOPs':>7} {'step':>5} {'field':>5} {'centre':>6}")
    for i, line in enumerate(table(Net(name).rows, spec.size)):
        row, part = line["row"], "trunk" if i < len(spec.rows) else "head"
        print(f"{part + ' ' + row.kind:10} {row.kernel:6} {row.stride:6} {row.pad:4} {line['cells']:4}x{line['cells']:<4} "
              f"{line['channels']:8} {line['parameters']:11,} {2 * line['gmac']:7.2f} {line['stride']:5} {line['field']:5} "
              f"{line['centre']:6g}")


def stitched(net, images, factor):
    """What the paper does, for comparison: factor**2 passes over shifted inputs, interleaved. Shapes as Net.dense."""
    rows = dense_rows(net.rows, factor)
    step = geometry(rows)[0]
    (top, bottom, h, _), (left, right, w, _) = (centring(n, rows) for n in images.shape[2:])
    x = F.pad(net.normalise(images), (left, right, top, bottom))
    out = x.new_zeros(len(x), net.head_rows[-1].out, h, w)
    for dy in range(factor):
        for dx in range(factor):
            features = net.run(x[:, :, dy * step:, dx * step:], net.spec.rows, net.trunk) * net.spec.feature_scale
            part, place = net.run(features, net.head_rows, net.head), out[:, :, dy::factor, dx::factor]
            place.copy_(part[:, :, :place.shape[2], :place.shape[3]])
    return out


def memory(device):
    """Most memory this process has held so far, GB: on the GPU if there is one, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    import resource                                                   # not on Windows
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def rate(f, device, seconds=3.0):
    """Calls of f per second, after a first one that is not counted."""
    f()
    n, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        f()
        n += 1
        if device.type == "cuda":
            torch.cuda.synchronize()
    return n / (time.perf_counter() - start)


def bench(name, batch=4):
    """Measured images/s of the trunk alone, fp32 and bf16, each beside a matrix product's rate in the same process;
    and seconds of one dense pass over a 500x375 image beside the shifted passes that it replaces.
    """
    device, spec = pick_device(), TRUNKS[name]
    net = Net(name).to(device).to(memory_format=torch.channels_last)
    images = torch.randint(0, 256, (batch, 3, spec.size, spec.size), dtype=torch.uint8, device=device)
    flops = summary(name)[4] * 1e9

    for dtype in (torch.float32, torch.bfloat16):
        a = torch.randn(2048, 2048, device=device).to(dtype)
        peak = rate(lambda: a @ a, device) * 2 * 2048 ** 3
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype is torch.bfloat16):
            speed = rate(lambda: net.frozen(images), device) * batch
        print(f"{name} trunk on {device}, {str(dtype)[6:]}: {speed:.2f} images/s, {speed * flops / 1e9:.0f} GFLOP/s, "
              f"{speed * flops / peak:.2f} of a matrix product's {peak / 1e9:.0f}")
    photo = torch.randint(0, 256, (1, 3, 375, 500), dtype=torch.uint8, device=device)
    with torch.no_grad():
        for factor in (f for f in (2, 3, 4) if geometry(net.rows)[0] % f == 0):
            fast, slow = rate(lambda: net.dense(photo, factor), device), rate(lambda: stitched(net, photo, factor), device)
            print(f"{name} dense {factor}: {1 / fast:.2f} s for 500x375, shift-and-stitch {1 / slow:.2f} s, "
                  f"{fast / slow:.1f} times as fast")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trunk", nargs="?", choices=list(TRUNKS), help="print its layer table; without it, list all")
    parser.add_argument("--bench", action="store_true", help="also measure images per second on this machine")
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message} (--help lists the options)\n")
    args = parser.parse_args()
    print(f"{'trunk':14} {'stride':>6} {'field':>6} {'trunk parameters':>17} {'head parameters':>16} {'GFLOPs trunk':>13} "
          f"{'head':>6} {'images/s':>9}")
    for name in [args.trunk] if args.trunk else TRUNKS:
        stride, field, p_trunk, p_head, f_trunk, f_head = summary(name)
        device, size = pick_device(), TRUNKS[name].size
        net, image = Net(name).to(device).to(memory_format=torch.channels_last).eval(), torch.zeros(1, 3, size, size, device=device)
        with torch.no_grad():
            speed = rate(lambda: net(image), device, 1.0)
        print(f"{name:14} {stride:6} {field:6} {p_trunk:17,} {p_head:16,} {f_trunk:13.2f} {f_head:6.2f} {speed:9.2f}")
    if args.trunk:
        describe(args.trunk)
    for name in [args.trunk] if args.trunk else TRUNKS:
        if args.bench:
            bench(name)


if __name__ == "__main__":
    main()
