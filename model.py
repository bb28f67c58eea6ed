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
import functools
import math
import os
import sys
import time
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

try:
    import resource
except ImportError:                          # Windows
    resource = None


# ---------------------------------------------------------------- rows: one list describes a net

class Row(NamedTuple):
    kind: str                                # "conv" (a ReLU follows, except after the head's last) or "pool" (max)
    out: int                                 # output channels; 0 in a pool
    kernel: int
    stride: int = 1
    pad: int = 0                             # zeros, on all four sides
    dilation: int = 1


class Trunk(NamedTuple):
    rows: list                               # rows whose spatial arithmetic is all this file needs to know
    mean: tuple                              # its own input normalisation, of RGB in 0..255
    std: tuple
    head: tuple                              # default hidden widths of the head
    size: int                                # side of a training image, pixels
    feature_scale: float = 1.0               # multiplies the features, so that a fresh head sees values around 1
    weights_url: str | None = None           # where its public weights are; "": a file that the user has; None: there are none


conv = functools.partial(Row, "conv")        # (out, kernel, stride=1, pad=0)
pool = functools.partial(Row, "pool", 0)     # (kernel, stride)
_VGG16 = [row for width, times in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))
          for row in [conv(width, 3, pad=1)] * times + [pool(2, 2)]][:-1]
_OVERFEAT = dict(mean=(118.380948,) * 3, std=(61.896913,) * 3, head=(1024, 768, 512), size=400, weights_url="")
OVERFEAT_BYTES = {"overfeat": 578_625_952, "overfeat-fast": 583_683_488}     # of net_weight_1 and net_weight_0, whole
TRUNKS = {
    # Section 3: OverFeat's "accurate" net up to its sixth convolution, before the third pool; 18,916,480 parameters.
    "overfeat": Trunk([conv(96, 7, 2), pool(3, 3), conv(256, 7), pool(2, 2), conv(512, 3, pad=1), conv(512, 3, pad=1),
                       conv(1024, 3, pad=1), conv(1024, 3, pad=1)], **_OVERFEAT),
    "overfeat-fast": Trunk([conv(96, 11, 4), pool(2, 2), conv(256, 5), pool(2, 2), conv(512, 3, pad=1),
                            conv(1024, 3, pad=1), conv(1024, 3, pad=1)], **_OVERFEAT),
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


def geometry(rows):
    """(stride, receptive field, centre) in pixels: cell i sees the window of side field around pixel centre + stride * i."""
    stride, field, centre = 1, 1, 0.0                      # a half-integer centre: even windows lie between two pixels
    for row in rows:
        reach = row.dilation * (row.kernel - 1)
        field += reach * stride
        centre += (reach / 2 - row.pad) * stride
        stride *= row.stride
    return stride, field, centre


def in_size(cells, rows):
    """Smallest input side, in pixels, that gives this many cells, with the rows' own padding around it."""
    stride, _, centre = geometry(rows)
    return int(stride * (cells - 1) + 2 * centre + 1)


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
    stride, dilation, dense = geometry(rows)[0], 1, []
    if factor < 1 or stride % factor:
        raise ValueError(f"dense {factor}: it must divide the stride, {stride}")
    step = stride // factor                               # what remains to stride over: the last strides are removed
    for row in rows:
        kept = math.gcd(step, row.stride)
        dense.append(row._replace(stride=kept, pad=row.pad * dilation, dilation=row.dilation * dilation))
        step, dilation = step // kept, dilation * row.stride // kept
    return dense


def peak_bytes(rows, height, width):
    """Estimate of the largest two neighbouring float32 activations of one image, in bytes, as if it were square."""
    n = round(math.sqrt(height * width))
    sizes = [3 * n * n, *(line["channels"] * line["cells"] ** 2 for line in table(rows, n))]
    return 4 * max(a + b for a, b in zip(sizes, sizes[1:]))


def table(rows, n):
    """The layer table for an input of n x n pixels: one dict per row, whose keys are the column heads; lengths in pixels."""
    channels, lines = 3, []
    for i, row in enumerate(rows, 1):
        n = out_size(n, [row])
        weights = row.out * channels * row.kernel ** 2             # 0 in a pool
        channels = row.out or channels
        step, field, centre = geometry(rows[:i])
        lines.append(dict(kernel=row.kernel, stride=row.stride, pad=row.pad, cells=n, channels=channels,
                          parameters=weights + row.out, GFLOPs=2e-9 * weights * n * n, step=step, field=field, centre=centre))
    return lines


# ---------------------------------------------------------------- the network (section 3)

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


def pixel_loss(scores, labels, rows, void=255):
    """Cross-entropy at the pixel under each cell; void is ignored. scores (B, K, h, w), labels (B, H, W) uint8."""
    stride, _, centre = geometry(rows)
    at = round(centre) + stride * torch.arange(max(scores.shape[2:]), device=labels.device)
    target = labels[:, at[:scores.shape[2]]][:, :, at[:scores.shape[3]]].long()
    return F.cross_entropy(scores, target, ignore_index=void, reduction="sum") / (target != void).sum().clamp(min=1)


class Net(nn.Module):
    """Trunk, head and aggregation. Freezes the trunk but for its last `train_convs` convolutions (-1: trains all).

    trunk: a key of TRUNKS. head: widths of its hidden convolutions; one with `classes` outputs follows. kernels: their
    sides, the last for all that remain. generator: a CPU torch.Generator for the initial weights.
    """

    def __init__(self, trunk="overfeat", classes=21, head=None, kernels=(3,), aggregation="lse", r=5.0, dropout=0.5,
                 train_convs=0, generator=None):
        super().__init__()
        self.spec, self.dropout, self.pool_scores, self.r = TRUNKS[trunk], dropout, AGGREGATIONS[aggregation], r
        widths = [*(self.spec.head if head is None else head), classes]
        self.head_rows = [conv(width, kernels[min(i, len(kernels) - 1)]) for i, width in enumerate(widths)]      # Table 1
        self.rows = self.spec.rows + self.head_rows
        convs, channels = nn.ModuleList(), 3
        for row in self.rows:
            if row.kind == "conv":
                convs.append(nn.utils.skip_init(nn.Conv2d, channels, row.out, row.kernel))      # drawn here, from generator
                nn.init.kaiming_normal_(convs[-1].weight, nonlinearity="relu", generator=generator)
                nn.init.zeros_(convs[-1].bias)
                channels = row.out
        convs[-1].weight.data *= 0.1                               # near-uniform class probabilities at the start
        self.trunk, self.head = convs[:-len(widths)], convs[-len(widths):]
        self.frozen_convs = len(self.trunk) - train_convs if train_convs >= 0 else 0
        places = [i for i, row in enumerate(self.spec.rows) if row.kind == "conv"] + [len(self.spec.rows)]
        cut = places[self.frozen_convs]
        self.frozen_rows, self.tuned_rows = self.spec.rows[:cut], self.spec.rows[cut:]
        self.trunk[:self.frozen_convs].requires_grad_(False)
        self.register_buffer("mean", torch.tensor(self.spec.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(self.spec.std).view(1, 3, 1, 1), persistent=False)

    def run(self, x, rows, convs, dropout=0.0):
        """Apply rows, with the convolutions' weights in order. Dilated rows reuse the weights as they are."""
        convs = iter(convs)
        for row in rows:
            if row.kind == "pool":
                x = F.max_pool2d(x, row.kernel, row.stride, dilation=row.dilation)
                continue
            layer = next(convs)
            x = F.conv2d(x, layer.weight, layer.bias, row.stride, row.pad, row.dilation)
            if layer is not self.head[-1]:                         # Eq. 1: nothing after the last
                x = F.dropout(F.relu_(x), dropout)
        return x

    def normalise(self, images):
        """images (B, 3, H, W), uint8 or float in 0..255 -> zero-mean float, laid out for the convolutions."""
        return ((images - self.mean) / self.std).contiguous(memory_format=torch.channels_last)

    @torch.no_grad()
    def frozen(self, images):
        """What no gradient reaches and a cache may hold: images (B, 3, H, W) in 0..255 -> features (B, D, h, w)."""
        return self.run(self.normalise(images), self.frozen_rows, self.trunk)

    def scores(self, features):
        """features from `frozen` -> score map s (B, K, h, w), Eq. 1."""
        x = self.run(features, self.tuned_rows, self.trunk[self.frozen_convs:]) * self.spec.feature_scale
        return self.run(x, self.head_rows, self.head, self.dropout if self.training else 0.0)

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
        rows, n = dense_rows(self.rows, factor), len(self.spec.rows)
        (top, bottom, h, offset), (left, right, w, _) = (centring(side, rows) for side in images.shape[2:])
        x = F.pad(self.normalise(images), (left, right, top, bottom))
        x = self.run(x, rows[:n], self.trunk) * self.spec.feature_scale
        return self.run(x, rows[n:], self.head)[:, :, :h, :w].float(), geometry(rows)[0], offset


def upsample(scores, size, step, offset, seen=None):
    """Bilinear interpolation from cells to pixels, exact for any step and offset; constant beyond the outer cells.

    scores (B, K, h, w), cell i on pixel step * i + offset of the image that the net has seen, of size `seen` (H', W');
    size: (H, W) wanted, the same picture at another resolution. Returns (B, K, H, W).
    """
    matrices = []                                              # (H, h) and (W, w)
    for n, cells, n_seen in zip(size, scores.shape[2:], seen or size):
        at = ((torch.arange(n, device=scores.device) + 0.5) * (n_seen / n) - 0.5 - offset) / step
        gap = at.clamp(0, cells - 1)[:, None] - torch.arange(cells, device=scores.device)
        matrices.append((1 - gap.abs()).clamp(min=0).to(scores.dtype))
    return matrices[0] @ scores @ matrices[1].T


# ---------------------------------------------------------------- weights of the public trunks

def read_overfeat(path, name, params):
    """OverFeat's headerless little-endian float32 file, per layer the weight, then the bias -> tensors like params."""
    need, found = 4 * sum(p.numel() for p in params), os.path.getsize(path)
    if found not in (need, OVERFEAT_BYTES[name]):
        sizes = ", ".join(f"{size:,} (--trunk {trunk})" for trunk, size in OVERFEAT_BYTES.items())
        raise ValueError(f"{found:,} bytes, but OverFeat's files have {sizes}, and the part for {name} {need:,}")
    values = torch.from_numpy(np.fromfile(path, "<f4", need // 4).astype(np.float32))
    return [block.view_as(p) for block, p in zip(values.split([p.numel() for p in params]), params)]


def read_vgg(path, url):
    """The tensors features.N.weight and features.N.bias of a state dict, in order; N counts ReLUs and pools too."""
    state = (torch.load(path, map_location="cpu", weights_only=True) if path else
             torch.hub.load_state_dict_from_url(url, map_location="cpu", check_hash=True, weights_only=True))
    return [state[f"features.{n}.{part}"] for n in range(99) if f"features.{n}.weight" in state for part in ("weight", "bias")]


def load_trunk(net, name, path=None):
    """Fill the trunk from OverFeat's raw file or a VGG16 state dict; path None fetches VGG16's and checks its hash.

    Raises ValueError naming the file, what was found and what was expected.
    """
    params, url = list(net.trunk.parameters()), net.spec.weights_url
    if not path and not url:
        raise ValueError(f"trunk {name} needs --weights FILE (see 'Weights' in README.md)")
    try:
        blocks = read_overfeat(path, name, params) if name in OVERFEAT_BYTES else read_vgg(path, url)
        if [b.shape for b in blocks] != [p.shape for p in params]:
            raise ValueError(f"{len(blocks) // 2} convolutions, of other shapes")
        if not all(b.isfinite().all() for b in blocks):
            raise ValueError("NaN or Inf among its weights: damaged?")
    except Exception as e:                            # torch raises half a dozen kinds, with pages of text
        why = e if isinstance(e, (OSError, ValueError)) else type(e).__name__
        raise ValueError(f"{path or url}: cannot {'read' if path else 'fetch'} ({why}); expected the {len(params) // 2} "
                         f"convolutions of {name}, give the file with --weights FILE") from e
    for p, block in zip(params, blocks):
        p.data.copy_(block)


# ---------------------------------------------------------------- devices, and rates on this machine

def pick_device(name="auto"):
    """The one place that chooses: "auto" takes CUDA, then MPS (Apple), then the CPU; or a torch device by name."""
    counts = dict(cuda=torch.cuda.device_count(), mps=int(torch.backends.mps.is_available()), cpu=1)
    known = [word for kind, n in counts.items() if n for word in (kind, *(f"{kind}:{i}" for i in range(n)))]
    if name not in ("auto", *known):
        raise argparse.ArgumentTypeError(f"there is no device '{name}' here; expected auto or one of {', '.join(known)}")
    return torch.device(known[0] if name == "auto" else name)


def has_bfloat16(device):
    """Whether a torch.device computes in bfloat16 itself: where that is emulated it is several times slower than float32."""
    if device.type == "cpu":
        return any(torch.cpu.get_capabilities().get(name) for name in ("avx512_bf16", "amx_bf16"))
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)      # MPS: nobody has tried


def memory(device):
    """Most memory this process has held so far, GB: on the GPU if there is one, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    if resource is None:
        return math.nan
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def rate(f, device, seconds=3.0):
    """Calls of f per second, after a first one that is not counted."""
    f()
    n, spent, start = 0, 0.0, time.perf_counter()
    while spent < seconds:
        f()
        if device.type != "cpu":
            torch.accelerator.synchronize()
        n, spent = n + 1, time.perf_counter() - start
    return n / spent


def print_row(name, *cells):
    """A name and right-aligned columns: integers with thousands separated, floats to two places."""
    form = {str: "", int: ",", float: ",.2f"}
    print(f"{name:13}", *(f"{cell:>10{form[type(cell)]}}" for cell in cells))


def bench(name, net, device, gflops, batch=4):
    """Print images/s of the trunk in fp32 and bf16, beside a matrix product's rate, and of dense beside shifted passes."""
    images, scores = torch.randint(0, 256, (batch, 3, net.spec.size, net.spec.size), dtype=torch.uint8, device=device), []
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.randn(2048, 2048, device=device).to(dtype)
        peak = rate(lambda: a @ a, device) * 2e-9 * 2048 ** 3
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype is torch.bfloat16):
            speed = rate(lambda: net.frozen(images), device) * batch
            scores.append(net(images).float())
        print(f"{name} trunk on {device}, {str(dtype)[6:]}: {speed:.2f} images/s, {speed * gflops:.0f} GFLOP/s, "
              f"{speed * gflops / peak:.2f} of a matrix product's {peak:.0f}")
    exact, rounded = scores
    print(f"{name} scores in bfloat16: within {(rounded - exact).abs().max() / exact.abs().max():.1%} of the largest")
    stride, photo = geometry(net.rows)[0], images.new_zeros(1, 3, 375, 500)
    for factor in (f for f in (2, 3, 4) if stride % f == 0):
        shifts = range(0, stride, stride // factor)
        dense = rate(lambda: net.dense(photo, factor), device)
        stitch = rate(lambda: [net.dense(photo[:, :, dy:, dx:]) for dy in shifts for dx in shifts], device)
        print(f"{name} dense {factor}: {1 / dense:.2f} s for 500x375, shift-and-stitch {1 / stitch:.2f} s, "
              f"{dense / stitch:.1f} times as fast")


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trunk", nargs="?", choices=list(TRUNKS), help="print its layer table; without it, list all")
    parser.add_argument("--bench", action="store_true", help="also measure bfloat16, and dense against shifted passes")
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message} (--help lists the options)\n")
    args, device = parser.parse_args(), pick_device()
    print_row("trunk", "stride", "field", "parameters", "+ head", "GFLOPs", "+ head", "images/s")
    for name in [args.trunk] if args.trunk else TRUNKS:
        net = Net(name).to(device).to(memory_format=torch.channels_last).eval()
        size, n = net.spec.size, len(net.spec.rows)
        lines, image = table(net.rows, size), torch.zeros(1, 3, size, size, device=device)
        sums = [sum(x[key] for x in part) for key in ("parameters", "GFLOPs") for part in (lines[:n], lines[n:])]
        print_row(name, lines[-1]["step"], lines[-1]["field"], *sums, rate(lambda: net(image), device, 1.0))
        if args.trunk:
            print_row(f"\n{size}x{size} px in", *lines[0])
            for i, line in enumerate(lines):
                print_row(f"{'trunk' if i < n else 'head'} {net.rows[i].kind}", *line.values())
        if args.bench:
            bench(name, net, device, sums[2])


if __name__ == "__main__":
    main()
