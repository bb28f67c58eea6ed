"""Per-pixel labels for photographs: score map, image-level prior, smoothing prior (section 4 of the paper).

    python infer.py out/toy/ckpt.pt photo.jpg            # photo.png (palette labels), photo_overlay.png in out/labels
    python infer.py CKPT DIR --prior sppxl --soft        # a whole folder; also the class scores as .npz
    python infer.py CKPT photo.jpg --panel demo.png      # a picture of how it came about
    python infer.py CKPT --voc VOC2012 --set val --out out/val        # a VOC set, ready for eval_voc.py score

No true label is read here. A large photograph is labelled at 1,000 px along its longer side, and the labels are enlarged.
Letters in shape comments: K classes, H W pixels, h w cells, D channels, N proposals, S superpixels.
"""
import argparse
import collections
import functools
import gzip
import math
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import scipy.io
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage
from scipy.cluster.hierarchy import linkage
from scipy.sparse.csgraph import shortest_path

import data
from data import InputError
from model import Net, dense_rows, has_bfloat16, load_trunk, memory, peak_bytes, pick_device, upsample


# ---------------------------------------------------------------- checkpoints

def read_checkpoint(path):
    """A checkpoint of train.py as a dict of plain values; never executes code from the file."""
    kinds = dict(format=int, step=int, settings=dict, classes=list, model=dict, thresholds=dict, optimizer=dict, pending=list)
    with data.reading(path, "a checkpoint of train.py"):
        ckpt = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(ckpt, dict):
            raise ValueError(f"holds a {type(ckpt).__name__}")
        names, delta = ckpt["classes"], ckpt["thresholds"].values()
        sound = dict(format=ckpt["format"] == 1, pending=all(isinstance(loss, float) for loss in ckpt["pending"]),
                     classes=2 <= len(set(names)) == len(names) < 256 and {*map(type, names)} == {str},
                     thresholds=all(np.shape(d) == (len(names),) and np.isfinite(d).all() for d in delta))
        wrong = [key for key, kind in kinds.items() if not isinstance(ckpt[key], kind) or not sound.get(key, True)]
        if wrong:
            raise ValueError(f"damaged: {', '.join(wrong)}")
    return ckpt


def checked(function, *arguments):
    """Call one of model.py's functions; its ValueError, which the user can mend, becomes an InputError."""
    try:
        return function(*arguments)
    except ValueError as e:
        raise InputError(e) from e


def numbers(text):
    """"512,256" -> [512, 256]. Raises ValueError where one is no positive number."""
    found = [int(n) for n in text.split(",") if text]
    if not all(0 < n < 100_000 for n in found):
        raise ValueError(f"{text}: expected numbers from 1 to 99,999, such as 288,432")
    return found


def build_net(s, classes, generator=None):
    """The Net of a run's settings (a dict), with what `predict` needs to know: classes, amp, cam, grid, sides."""
    net = Net(s["trunk"], len(classes), numbers(s["head"]) or None, numbers(s["kernel"]), s["aggregation"], float(s["r"]),
              float(s["dropout"]), s["train_convs"], generator)
    net.classes, net.amp = classes, bool(s["amp"])         # what was trained in bfloat16 also runs in it
    net.grid, net.sides = int(s["dense"]), numbers(s["sides"])
    net.cam = s["loss"] == "sigmoid" and not s["self_steps"] and not s["masks"]
    dense_rows(net.rows, net.grid)                         # raises ValueError where it does not divide the stride
    return net


def load_net(path, weights=None, device="cpu", dense=None, sides=None):
    """(net in eval mode, checkpoint). weights: the trunk's file, where it has none; dense, sides: in the place of its own."""
    ckpt = read_checkpoint(path)
    with data.reading(path, "settings that this code knows and tensors that fit them; train again"):
        net = build_net(ckpt["settings"], ckpt["classes"])
        if not 0 < net.r < math.inf or not all(x.is_floating_point() and x.isfinite().all() for x in ckpt["model"].values()):
            raise ValueError("NaN, Inf or no real numbers")
        missing, unexpected = net.load_state_dict(ckpt["model"], strict=False)
        if unexpected or any(not k.startswith("trunk.") for k in missing):
            raise ValueError(f"{(missing + unexpected)[0]} is missing or too much")
    if missing:
        checked(load_trunk, net, ckpt["settings"]["trunk"], weights or ckpt["settings"]["weights"])
        net.load_state_dict(ckpt["model"], strict=False)              # trained trunk layers win over the public ones
    net.grid, net.sides = net.grid if dense is None else dense, sides or net.sides
    checked(dense_rows, net.rows, net.grid)
    net.amp = net.amp and has_bfloat16(torch.device(device))
    return net.to(device).to(memory_format=torch.channels_last).eval(), ckpt


# ---------------------------------------------------------------- scores and the image-level prior

MAX_BYTES = 16e9                                           # of activations at a time; more is refused, with the estimate


@torch.no_grad()
def predict(net, image):
    """Eq. 2 of one image (H, W, 3) uint8: p (K, H, W) at every pixel, q (K,) of the aggregated scores.

    Scores are averaged over the image resized to each area side x side of net.sides (none: as it is), on a grid net.grid times
    finer than the stride. With net.cam p is class activation maps (Zhou et al., CVPR 2016) over their maxima, background 0.3.
    """
    (H, W), sides = image.shape[:2], net.sides or [math.sqrt(image[..., 0].size)]
    x = torch.from_numpy(image.copy()).permute(2, 0, 1)[None].to(next(net.parameters()).device).float()     # (1, 3, H, W)
    total, image_scores = 0, 0
    for side in sides:
        size = tuple(max(1, round(n * side / math.sqrt(H * W))) for n in (H, W))
        need = peak_bytes(dense_rows(net.rows, net.grid), *size) + 8 * len(net.classes) * H * W
        if need > MAX_BYTES:
            raise InputError(f"{size[1]}x{size[0]} pixels with --dense {net.grid} would take about {need / 1e9:.0f} GB; "
                             "reduce the photograph or --dense")
        seen = F.interpolate(x, size, mode="bilinear", antialias=True, align_corners=False) if net.sides else x
        with torch.autocast(x.device.type, torch.bfloat16, enabled=net.amp):
            scores, step, offset = net.dense(seen, net.grid)                         # (1, K, h, w)
        image_scores = image_scores + net.aggregate(scores)[0] / len(sides)
        total = total + upsample(scores, (H, W), step, offset, size)[0] / len(sides)
    if not net.cam:
        return total.softmax(0).cpu().numpy(), image_scores.softmax(0).cpu().numpy()
    p = F.relu(total)
    p /= p.amax((1, 2), keepdim=True).clamp(min=1e-6)
    p[0] = 0.3
    return p.cpu().numpy(), image_scores.sigmoid().cpu().numpy()


ILP_FORMS = {                                            # name: what multiplies each class's plane, of q (K,)
    "objects": lambda q: np.r_[1, q[1:]],                # Eq. 7 read literally: background is not in C
    "all": lambda q: q,                                  # background is multiplied too
    "square": lambda q: np.r_[1, q[1:] ** 2],
    "threshold": lambda q: np.r_[1, q[1:] > 0.05],       # a class is in the picture or not
}


def ilp(p, q, form="objects"):
    """Image-level prior, Eq. 7: p (K, H, W) times a function of q (K,), see ILP_FORMS."""
    return p * ILP_FORMS[form](q).astype(p.dtype)[:, None, None]


def overlapped(network, priors, items, ahead=2):
    """Yield priors(network(item)) in order; `priors` runs in threads while the network is at the next items (ahead 0: not)."""
    with ThreadPoolExecutor(max(1, ahead)) as pool:
        jobs = collections.deque()
        for item in items:
            jobs.append(pool.submit(priors, network(item)))
            if len(jobs) > ahead:
                yield jobs.popleft().result()
        yield from (job.result() for job in jobs)


# ---------------------------------------------------------------- superpixels

def _grid_edges(planes):
    """The edges between 8-neighbours of planes (C, H, W): arrays of their two pixels, cost and `light`, each (E,).

    cost: Euclidean distance. light: not the heaviest edge of any triangle of pixels (of equal ones the later is the heavier);
    only such an edge can be the lightest that leaves a set of pixels.
    """
    def ends(x):                                               # (..., H, W) -> its pairs right, down, down-right, down-left
        up, low = x[..., :-1, :], x[..., 1:, :]
        return (x[..., :-1], x[..., 1:]), (up, low), (up[..., :-1], low[..., 1:]), (up[..., 1:], low[..., :-1])
    right, down, *_ = costs = [np.sqrt(sum((b - a) ** 2)) for a, b in ends(planes)]
    light, head, tail = [np.ones(cost.shape, bool) for cost in costs], slice(None, -1), slice(1, None)
    for slope, row, column in (2, head, tail), (2, tail, head), (3, head, head), (3, tail, tail):
        h, v, s = right[row], down[:, column], costs[slope]    # (H-1, W-1): a triangle's legs and its slope
        light[0][row] &= (h <= v) | (h <= s)
        light[1][:, column] &= (v < h) | (v <= s)
        light[slope] &= (s < h) | (s < v)
    a, b = zip(*ends(np.arange(planes[0].size).reshape(planes[0].shape)))
    return [np.concatenate([x.ravel() for x in kinds]) for kinds in (a, b, costs, light)]


def superpixels(image, scale=100, sigma=0.5, min_size=50, rounds=24):
    """Felzenszwalb & Huttenlocher's graph-based segmentation (IJCV 2004) of an 8-connected pixel grid.

    image: (H, W, 3) uint8; scale: their k, in grey levels of 255 (larger = larger segments); sigma: pixels of Gaussian
    smoothing; min_size: pixels. Returns (H, W) int32 labels 0..n-1 in raster order of each segment's first pixel.

    Edges are visited by rising cost w and join A and B if w < Int(A) + k/|A| and w < Int(B) + k/|B|. Two shortcuts change
    nothing: to an edge that is the lightest leaving A and the lightest leaving B nothing happens before its turn, so `rounds`
    passes decide all such edges at once; and of the edges between A and B only the lightest can ever join them.
    """
    k, n = scale / 255, image[..., 0].size
    planes = ndimage.gaussian_filter(np.moveaxis(image / 255.0, 2, 0), (0, sigma, sigma))                  # (3, H, W)
    p, q, cost, light = _grid_edges(planes)
    labels, size, limit = np.arange(n), np.ones(n), np.full(n, k)           # of a segment C: its pixels, |C|, Int(C) + k/|C|

    def by_cost(chosen):                                                    # equal ones stay in grid order
        order = np.flatnonzero(chosen)
        order = order[np.argsort(cost[order], kind="stable")]
        return labels[p[order]], labels[q[order]], cost[order]

    a, b, w = by_cost(light)
    for _ in range(rounds):                                                 # all mutually lightest edges at once
        every, first = np.arange(len(w)), np.full((2, n), len(w))
        first[0, a[::-1]] = first[1, b[::-1]] = every[::-1]                 # a segment's first edge is written last
        first = first.min(0)
        e = np.flatnonzero((first[a] == every) & (first[b] == every))
        e = e[w[e] < np.minimum(limit[a[e]], limit[b[e]])]
        i, j, root = np.minimum(a[e], b[e]), np.maximum(a[e], b[e]), np.ones(n, bool)
        size[i] += size[j]
        limit[i] = w[e] + k / size[i]
        root[j] = False
        new = np.cumsum(root) - 1
        new[j] = new[i]
        labels, size, limit, n = new[labels], size[root], limit[root], n - len(j)
        a, b = new[a], new[b]
        live = np.flatnonzero(a != b)
        a, b, w = a[live], b[live], w[live]

    a, b, w = by_cost(labels[p] != labels[q])
    first = np.sort(np.unique(np.minimum(a, b) * n + np.maximum(a, b), return_index=True)[1])       # the lightest of each two
    edges = [x[first].tolist() for x in (a, b, w)]
    parent, limit, count = list(range(n)), limit.tolist(), size.tolist()
    for least in 0, min_size:                                               # one by one; then again, for those below min_size
        for i, j, w in zip(*edges):
            while i != parent[i]:
                parent[i] = i = parent[parent[i]]
            while j != parent[j]:
                parent[j] = j = parent[parent[j]]
            if i != j and (count[i] < least or count[j] < least if least else w < limit[i] and w < limit[j]):
                if i > j:                                                   # a segment is named after its first pixel
                    i, j = j, i
                parent[j] = i
                count[i] += count[j]
                limit[i] = w + k / count[i]
    for i, j in enumerate(parent):                                          # j <= i, so that its root is known
        parent[i] = parent[j]
    return np.unique(parent, return_inverse=True)[1].astype(np.int32)[labels].reshape(image.shape[:2])


# ---------------------------------------------------------------- proposals: our hierarchy, BING's boxes, MCG's file

def best_first(proposals, scores, n=None):
    """The n best (None: all) of proposals (N, ...) and their scores (N,), scaled to 0..1."""
    order = np.argsort(-scores, kind="stable")[:n]
    scores = scores[order]
    return proposals[order], (scores - scores[-1:]) / np.maximum(scores[:1] - scores[-1:], 1e-12)


def hierarchy(regions, image, least=0.002):
    """Candidate segments, nothing trained: nodes of a merge tree over superpixels, scored by contrast with the border.

    regions (H, W) int, every one of 0..S-1 present; image (H, W, 3) uint8. Returns segments (N, S) bool of at least the share
    `least` of the picture, and scores (N,) in [0, 1], best first. Neighbours are as far apart as their mean colours, others as
    the cheapest path between them; average linkage merges the closest. A score is the mean distance of a segment's pixels from
    the picture's border (geodesic saliency, Wei et al., ECCV 2012).
    """
    size = np.bincount(regions.ravel())
    colour = np.stack([np.bincount(regions.ravel(), c) for c in image.reshape(-1, 3).T / 255], 1) / size[:, None]   # (S, 3)
    cost = np.zeros((len(size), len(size)))                                 # 0: no neighbours
    for a, b in ((regions[:, 1:], regions[:, :-1]), (regions[1:], regions[:-1])):
        a, b = a[a != b], b[a != b]
        cost[a, b] = cost[b, a] = np.linalg.norm(colour[a] - colour[b], axis=1) + 1e-6
    far = shortest_path(cost, directed=False)                               # (S, S)
    tree = linkage(far[np.triu_indices(len(far), 1)], "average") if len(far) > 1 else np.empty((0, 4))
    segments = np.eye(len(far) + len(tree), len(far), dtype=bool)
    for new, pair in enumerate(tree[:, :2].astype(int), len(far)):
        segments[new] = segments[pair].any(0)
    segments = segments[segments @ size >= least * regions.size]
    border = np.concatenate([regions[0], regions[-1], regions[:, 0], regions[:, -1]])
    return best_first(segments, segments @ (size * far[:, np.unique(border)].min(1)) / (segments @ size))


def boxes_of(segments, regions):
    """Tight boxes (N, 4) x0 y0 x1 y1 (x1, y1 outside) of segments (N, S) bool over regions (H, W); empty ones: zeros."""
    ends = [(x.start, y.start, -x.stop, -y.stop) for y, x in ndimage.find_objects(regions + 1)]
    box = np.stack([np.where(segments, end, np.inf).min(1) for end in zip(*ends)], 1) * [1, 1, -1, -1]
    return np.where(np.isfinite(box), box, 0).astype(np.float32)


def cover_score(scores, shape, boxes=None, segments=None, regions=None):
    """p(ij in Obj), section 4: mean score of the proposals that cover pixel ij, 0 where there is none -> (H, W) float32.

    scores (N,); shape (H, W). Proposals are boxes (N, 4) x0 y0 x1 y1, pixels from round(x0) to before round(x1), or segments
    (N, S) bool over superpixels, regions (H, W).
    """
    one = np.stack([scores, np.ones(len(scores))]).astype(np.float64)       # (2, N): sums of scores, and how many
    if boxes is None:
        total = (one @ segments)[:, regions]                                # (2, H, W)
    else:
        (H, W), total = shape, np.zeros((2, shape[0] + 1, shape[1] + 1))
        x0, y0, x1, y1 = np.clip(np.round(np.asarray(boxes).T), 0, [[W], [H], [W], [H]]).astype(int)
        for y, x, sign in (y0, x0, 1), (y0, x1, -1), (y1, x0, -1), (y1, x1, 1):
            np.add.at(total, (slice(None), y, x), sign * one)               # corners; their running sums are the boxes
        total = total.cumsum(1).cumsum(2)[:, :H, :W]
    return np.divide(*total, out=np.zeros(shape), where=total[1] > 0.5).astype(np.float32)


def read_bing(model_dir):
    """BING's trained model, OpenCV's YAML -> filter (8, 8), box sizes (n, 2) (height, width), calibration (n, 2)."""
    with data.reading(model_dir, "BING's trained model, three matrices of OpenCV in gzipped YAML"):
        matrices = []
        for part, shape in ("wS1", (8, 8)), ("idx", -1), ("wS2", (-1, 2)):
            text = gzip.decompress(Path(model_dir, f"ObjNessB2W8MAXBGR.{part}.yml.gz").read_bytes()).decode()
            values = re.search(r"data:\s*\[(.*?)\]", text, re.S)[1].split(",")
            matrices.append(np.array(values, np.float32).reshape(shape))
        kernel, index, calibration = matrices
        if (len(index) != len(calibration) or not np.isin(index, range(36)).all()
                or not np.isfinite(kernel).all() or not np.isfinite(calibration).all()):
            raise ValueError("NaN, or numbers that do not fit each other")
    return kernel, 16 << np.stack([index // 6, index % 6], 1).astype(int), calibration         # B2: powers of two, 16 to 512


def normed_gradient(image):
    """BING's feature of image (h, w, C) uint8: |gx| + |gy|, at most 255, (h, w) float32, of differences between a pixel's two
    neighbours (at the border, twice that to the one), each the largest over the channels."""
    gy, gx = np.gradient(image.astype(np.float32), axis=(0, 1))
    return np.minimum(2 * (np.abs(gx).max(2) + np.abs(gy).max(2)), 255)


def non_maximum_suppression(score, n, reach=2):
    """The n best points of score (h, w) that no better kept one has within reach, as flat indices, best first."""
    free, kept = np.ones(score.shape, bool), []
    for i in np.argsort(-score, None, "stable").tolist():
        y, x = divmod(i, score.shape[1])
        if free[y, x] and len(kept) < n:
            kept.append(i)
            free[max(0, y - reach):y + reach + 1, max(0, x - reach):x + reach + 1] = False
    return np.array(kept)


def bing(image, model_dir, n=1000, per_size=130):
    """Class-free object boxes from a trained BING model (Cheng et al., CVPR 2014): a filter on 8x8 normed gradients.

    image: (H, W, 3) uint8; model_dir: folder of ObjNessB2W8MAXBGR.*.yml.gz; per_size: boxes kept per window size. Returns at
    most n boxes (N, 4) float32 x0 y0 x1 y1 (pixels, x1 and y1 outside) and scores (N,) in [0, 1], best first.
    """
    (H, W), boxes, scores = image.shape[:2], [np.zeros((0, 4))], [np.zeros(0, np.float32)]
    kernel, sizes, calibration = read_bing(model_dir)
    fit = (sizes <= [2 * H, 2 * W]).all(1)
    for (h, w), (gain, bias) in zip(np.minimum(sizes, [H, W])[fit], calibration[fit]):
        small = Image.fromarray(image).resize((round(8 * W / w), round(8 * H / h)), Image.BILINEAR)
        ng = torch.from_numpy(normed_gradient(np.asarray(small)))
        score = F.conv2d(ng[None, None], torch.from_numpy(kernel)[None, None])[0, 0].numpy()   # one per top left corner
        top = non_maximum_suppression(score, per_size)
        y, x = top // score.shape[1] * (h / 8), top % score.shape[1] * (w / 8)
        boxes.append(np.stack([x, y, np.minimum(x + w, W), np.minimum(y + h, H)], 1))
        scores.append(score.ravel()[top] * gain + bias)
    return best_first(np.concatenate(boxes).astype(np.float32), np.concatenate(scores), n)


def read_mcg(path):
    """MCG's released proposals, a .mat -> regions (H, W) int32 0..S-1, segments (N, S) bool, scores (N,) scaled to 0..1."""
    with data.reading(path, "MCG's superpixels, labels and scores"), open(path, "rb") as file:
        mat = scipy.io.loadmat(file)
        labels, scores = mat["superpixels"], np.asarray(mat["scores"], float).ravel()             # labels from 1
        if labels.ndim != 2 or not 1 <= labels.min() <= labels.max() <= labels.size or (labels % 1).any():
            raise ValueError("its superpixels do not count from 1")
        parts = [np.asarray(cell, int).ravel() - 1 for cell in mat["labels"].ravel()]
        if not len(parts) == len(scores) > 0 or not np.isfinite(scores).all() or min(p.min(initial=0) for p in parts) < 0:
            raise ValueError("not every candidate has one score")
        segments = np.zeros((len(parts), int(labels.max())), bool)
        for row, part in zip(segments, parts):
            row[part] = True
    return labels.astype(np.int32) - 1, segments, (scores - scores.min()) / max(np.ptp(scores), 1e-12)


# ---------------------------------------------------------------- smoothing priors (section 4)

def pixel_adaptive(planes, image, dilations=(1, 2, 4, 8), rounds=10, width=0.1):
    """Pixel-adaptive refinement (Araslanov & Roth, CVPR 2020): repeated averages over neighbours of like colour.

    planes (K, h, w) float, image (h, w, 3) uint8 -> (K, h, w) float32. A neighbour's weight is the softmax, over the 8
    directions at each dilation (pixels), of -mean over channels of |colour difference| / (width * local standard deviation).
    """
    def neighbours(x):                                                      # (C, h, w) -> (C, 8 * dilations, h, w)
        (h, w), m = x.shape[1:], max(dilations)
        y = F.pad(x[None], [m] * 4, "replicate")[0]
        offsets = [(m + i, m + j) for d in dilations for i in (-d, 0, d) for j in (-d, 0, d) if i or j]
        return torch.stack([y[:, i:i + h, j:j + w] for i, j in offsets], 1)
    guide = torch.tensor(image).permute(2, 0, 1).float() / 255              # (3, h, w)
    x, near = torch.from_numpy(np.asarray(planes, np.float32)), neighbours(guide)
    spread = torch.cat([near, guide[:, None]], 1).std(1, keepdim=True)
    weight = (-(near - guide[:, None]).abs() / (width * (spread + 1e-8))).mean(0).softmax(0)
    for _ in range(rounds):
        x = (neighbours(x) * weight).sum(1)
    return x.numpy()


def vote(labels, regions):
    """SP-sppxl: every superpixel takes its most frequent label. labels, regions (H, W) -> (H, W)."""
    classes = int(labels.max()) + 1
    counts = np.bincount(regions.ravel() * classes + labels.ravel(), minlength=(int(regions.max()) + 1) * classes)
    return counts.reshape(-1, classes).argmax(1)[regions]


def evidence(p, objectness):
    """The best object class k (H, W), 1.., and v (H, W): its share of p (K, H, W), which the ILP lowers, times objectness."""
    return p[1:].argmax(0) + 1, p[1:].max(0) / np.maximum(p.sum(0), 1e-30) * objectness


def thresholded(p, objectness, delta):
    """SP-bb and SP-seg: labels (H, W), the best object class where its `evidence` exceeds delta, (K,) or one, else background."""
    k, v = evidence(p, objectness)
    return np.where(v > np.broadcast_to(delta, len(p))[k], k, 0)


def relative(objectness):
    """Objectness (H, W) on any scale -> o / (o + mean of o), its minimum taken off: in [0, 1), 0.5 for the average pixel."""
    o = objectness - objectness.min() + 1e-12                 # a flat one becomes 0.5
    return o / (o + o.mean())


def saliency(image):
    """p(pixel in an object) of a small picture (h, w, 3) uint8 from its own hierarchy, (h, w) in [0, 1); see `hierarchy`."""
    regions = superpixels(image, 50, 0.5, 5)
    segments, scores = hierarchy(regions, image)
    return relative(cover_score(scores, regions.shape, segments=segments, regions=regions))


def weigh(p, objectness):
    """p (K, h, w) times the root of objectness (h, w), background times that of 1 - objectness; sums to 1 again."""
    p = p * np.sqrt(np.stack([1 - objectness, *[objectness] * (len(p) - 1)])).astype(p.dtype)
    return p / np.maximum(p.sum(0), 1e-30)


def refine(p, image, regions, cells=64):
    """Our own, nothing trained: saliency, pixel-adaptive refinement on so many cells along the longer side, superpixel means.

    p (K, H, W), image (H, W, 3) uint8, regions (H, W) -> (K, H, W).
    """
    def resized(planes, like, mode="bilinear"):
        return F.interpolate(torch.from_numpy(planes)[None], like.shape[:2], mode=mode)[0].numpy()
    cell = max(1, round(max(image.shape[:2]) / cells))                      # pixels
    coarse, small = (np.asarray(Image.fromarray(image).resize([-(-n // by) for n in image.shape[1::-1]], Image.BOX))
                     for by in (cell, max(1, cell // 2)))
    p = weigh(p, resized(saliency(small)[None], image)[0])
    p = resized(pixel_adaptive(resized(p, coarse, "area"), coarse), image)
    return np.stack([ndimage.mean(plane, regions, range(regions.max() + 1)) for plane in p])[:, regions]


def seeds(scores, features, present, image, threshold=0.3, sure=0.5):
    """Labels (4h, 4w) uint8 for a training image whose tags are known, for self-training; void where no class is sure.

    scores (K, h, w), features (D, h, w), present: indices of the tagged classes, image (3, H, W) uint8. A tagged class's
    map is its margin over the untagged ones, spread to places of like features, weighed against `threshold` (its maximum
    is 1) for background by saliency, and refined on the image at 4h x 4w.
    """
    (_, h, w), absent = scores.shape, torch.ones(len(scores), dtype=torch.bool)
    absent[present] = absent[0] = False
    margin = F.relu(scores[present] - (scores[absent].mean(0) if absent.any() else 0))
    margin = margin / margin.amax((1, 2), keepdim=True).clamp(min=1e-6)
    x = features.sqrt().flatten(1)                                                     # (D, cells); ReLU features
    x = F.normalize(x - x.mean(1, keepdim=True), dim=0)
    affinity = F.relu(x.T @ x) ** 2                                                    # (cells, cells)
    spread = (margin.flatten(1) @ affinity / affinity.sum(0)).view(-1, h, w)
    low, high = spread.amin((1, 2), keepdim=True), spread.amax((1, 2), keepdim=True)
    maps = F.pad((spread - low) / (high - low).clamp(min=1e-6), (0, 0, 0, 0, 1, 0), value=threshold)
    maps = F.interpolate(maps[None], (4 * h, 4 * w), mode="bilinear")[0].cpu().numpy()
    guide = F.interpolate(image[None].float(), (4 * h, 4 * w), mode="area")[0].permute(1, 2, 0).byte().numpy()
    share = pixel_adaptive(weigh(maps, saliency(guide)), guide)
    labels = np.concatenate([[0], present.cpu().numpy()])[share.argmax(0)]
    return np.where(share.max(0) > sure, labels, data.VOID).astype(np.uint8)


class Scene:
    """One image (H, W, 3) uint8 and what the priors derive from it, each at most once. delta: prior -> thresholds (K,).

    bing: folder of BING's model; mcg: of MCG's candidates, <name>.mat for this image; without them, our own hierarchy serves.
    """

    def __init__(self, image, delta=None, bing=None, mcg=None, name=""):
        self.image, self.delta, self.bing, self.mcg = image, delta or {}, bing, mcg and Path(mcg, f"{name}.mat")

    regions = functools.cached_property(lambda self: superpixels(self.image))
    segments = functools.cached_property(lambda self: hierarchy(self.regions, self.image))

    @functools.cached_property
    def bb(self):
        """p(pixel in an object) from boxes, (H, W): mean score of those that cover it, `relative` to the picture's."""
        boxes, scores = bing(self.image, self.bing) if self.bing else (boxes_of(self.segments[0], self.regions), self.segments[1])
        return relative(cover_score(scores, self.image.shape[:2], boxes))

    @functools.cached_property
    def seg(self):
        """The same from segments."""
        regions, segments, scores = read_mcg(self.mcg) if self.mcg else (self.regions, *self.segments)
        if regions.shape != self.image.shape[:2]:
            raise InputError(f"{self.mcg}: {regions.shape[1]}x{regions.shape[0]} pixels, but its image has "
                             f"{self.image.shape[1]}x{self.image.shape[0]}; is it another image's, or above 1,000 px?")
        return relative(cover_score(scores, regions.shape, segments=segments, regions=regions))


PRIORS = {                                               # name: f(p (K, H, W), Scene) -> labels (H, W)
    "none": lambda p, scene: p.argmax(0),
    "sppxl": lambda p, scene: vote(p.argmax(0), scene.regions),
    "bb": lambda p, scene: thresholded(p, scene.bb, scene.delta.get("bb", 0)),
    "seg": lambda p, scene: thresholded(p, scene.seg, scene.delta.get("seg", 0)),
    "refine": lambda p, scene: refine(p, scene.image, scene.regions).argmax(0),
}


# ---------------------------------------------------------------- pictures

def overlay(image, labels, alpha=0.6):
    """image (H, W, 3) uint8 under the palette's colours of labels (H, W); background stays clear."""
    mix = (image * (1 - alpha) + data.voc_palette()[labels] * alpha).astype(np.uint8)
    return np.where((labels > 0)[..., None], mix, image)


def heat(values):
    """(H, W) in 0..1 as a black-red-yellow-white picture, (H, W, 3) uint8."""
    return (np.stack([values * 3, values * 3 - 1, values * 3 - 2], -1).clip(0, 1) * 255).astype(np.uint8)


def panel(rows, classes, width=150):
    """A contact sheet as a PIL image, with the colours of the classes that occur below.

    rows: list of (list of (caption, picture (H, W, 3) uint8), set of class indices).
    """
    used, step, face = sorted(set().union(*[k for _, k in rows])), width + 4, ImageFont.load_default(18)
    heights = [min(max(1, round(len(x) * width / len(x[0]))), 4 * width) for ((_, x), *_), _ in rows]      # one size a row
    *tops, bottom = np.cumsum([0, *(height + 28 for height in heights)]).tolist()
    sheet_width = 4 + step * max(len(cells) for cells, _ in rows)
    per_line = max(1, sheet_width // 180)
    sheet = Image.new("RGB", (sheet_width, bottom + 8 + 26 * math.ceil(len(used) / per_line)), "white")
    draw = ImageDraw.Draw(sheet)
    for top, height, (cells, _) in zip(tops, heights, rows):
        for x, (caption, picture) in zip(range(4, sheet_width, step), cells):
            how = Image.LANCZOS if len(picture) > 200 else Image.NEAREST
            sheet.paste(Image.fromarray(picture).resize((width, height), how), (x, top + 24))
            draw.text((x, top + 1), caption, "black", face)
    for n, k in enumerate(used):
        x, y = 4 + n % per_line * 180, bottom + 4 + n // per_line * 26
        draw.rectangle((x, y, x + 20, y + 20), tuple(data.voc_palette()[k].tolist()), "black")
        draw.text((x + 26, y - 1), classes[k][:16] if k < len(classes) else "void", "black", face)
    return sheet


def save_panel(path, net, samples, maps=3):
    """Write a panel, a row for each of (name, image, truth or None): maps of the likeliest classes, labels prior by prior."""
    rows = []
    for _, image, truth in samples:
        p, q = predict(net, image)
        labels = {"base": p.argmax(0), "+ILP": ilp(p, q).argmax(0), "+ILP +refine": PRIORS["refine"](ilp(p, q), Scene(image))}
        labels |= {"truth": truth} if truth is not None else {}
        top = [k for k in np.argsort(-q) if k][:maps]
        cells = [("image", image), *((f"{net.classes[k][:11]} {q[k]:.2f}", heat(p[k])) for k in top),
                 *((name, data.voc_palette()[label]) for name, label in labels.items())]
        counts = np.bincount(np.ravel([*labels.values()]))
        rows.append((cells, set(np.flatnonzero(counts > 0.005 * labels["base"].size).tolist())))           # no specks
    sheet = panel(rows, net.classes, 150 if len(rows) > 3 else 250)
    data.write_atomically(path, lambda file: sheet.save(file, "png"))


# ---------------------------------------------------------------- command line

def add_options(parser):
    """What infer.py and `eval_voc.py ladder` both take."""
    add = parser.add_argument_group("network and priors").add_argument
    add("--weights", metavar="FILE", help="the trunk's weights, where the checkpoint does not hold them")
    add("--ilp-form", choices=list(ILP_FORMS), default="objects", help="what Eq. 7 multiplies [objects]")
    add("--bing", metavar="DIR", help="BING's model, for bb [boxes around our own segments]")
    add("--mcg", metavar="DIR", help="MCG's <image>.mat candidates, for seg [our own hierarchy]")
    add("--dense", type=int, metavar="F", help="score grid F times finer than the stride [the checkpoint's]")
    add("--panel", metavar="FILE", help="also draw the first 20 images: class maps, labels of base, ILP, refine")
    add("--device", type=pick_device, default="auto", help="auto, cpu, cuda, cuda:1, mps [auto]")


def main():
    parser = data.Parser(description=__doc__)
    add = parser.add_argument_group("what to label, and where to").add_argument
    add("checkpoint", help="ckpt.pt or head.pt of train.py")
    add("images", nargs="*", help="image files and folders")
    add("--voc", metavar="DIR", help="label a set of this devkit instead")
    add("--set", default="val", help="which set of --voc [val]")
    add("--out", default="out/labels", metavar="DIR", help="where to write [out/labels]")
    add("--soft", action="store_true", help="also write the class scores as .npz, at the labelled size")
    add_options(parser)
    add = parser.add_argument_group("labelling").add_argument
    add("--prior", choices=list(PRIORS), default="none", help="what smooths the label map, section 4 [none]")
    add("--ilp", action=argparse.BooleanOptionalAction, default=True, help="image-level prior, Eq. 7 [yes, as the paper]")
    add("--ahead", type=int, default=2, metavar="N", help="images the network may be ahead of the priors [2]")
    args = parser.parse_args()
    if bool(args.voc) == bool(args.images):
        parser.error("give images or folders, or --voc DIR --set NAME")
    files = ([Path(args.voc, "JPEGImages", f"{i}.jpg") for i in data.voc_ids(args.voc, args.set)] if args.voc else
             [f for p in args.images for f in (data.image_files(p) if Path(p).is_dir() else [Path(p)])])
    out, bad = Path(args.out), {}                                                   # bad: file -> what is wrong with it
    named = collections.defaultdict(list)                                           # path -> photographs, or what writes it
    for f in files:
        for path in (f, out / f"{f.stem}.png", out / f"{f.stem}_overlay.png"):
            named[path.resolve()].append(f)
    path, (first, *others) = max(named.items(), key=lambda item: len(item[1]))
    if others:
        raise InputError(f"{path}: would be written for {first} and {others[0]}; label folders apart, or give another --out")
    net, ckpt = load_net(args.checkpoint, args.weights, args.device, args.dense)
    begun = time.perf_counter()

    def network(file):
        try:
            photo = data.load_image(file)
            image = data.shrink(photo)
            return file, photo, image, *predict(net, image)
        except InputError as e:
            bad[file] = str(e) if str(file) in str(e) else f"{file}: {e}"

    def priors(predicted):
        if not predicted:
            return
        file, photo, image, p, q = predicted
        p = ilp(p, q, args.ilp_form) if args.ilp else p
        labels = PRIORS[args.prior](p, Scene(image, ckpt["thresholds"], args.bing, args.mcg, file.stem))
        labels = np.asarray(Image.fromarray(labels.astype(np.uint8)).resize(photo.shape[1::-1], Image.NEAREST))
        data.save_labels(out / f"{file.stem}.png", labels)
        if not args.voc:
            picture = Image.fromarray(overlay(photo, labels))
            data.write_atomically(out / f"{file.stem}_overlay.png", lambda f: picture.save(f, "png"))
        if args.soft:
            data.write_atomically(out / f"{file.stem}.npz", lambda f: np.savez_compressed(
                f, scores=p.astype(np.float16), image_scores=q, classes=np.array(net.classes)))
        if len(files) == 1:
            share = np.bincount(labels.ravel(), minlength=len(q)) / labels.size
            print(f"{file}: " + ", ".join(f"{net.classes[k]} {share[k]:.0%}" for k in np.argsort(-share) if share[k] >= 0.005))
    list(data.progress(overlapped(network, priors, files, args.ahead), "labelled", len(files)))
    good = [f for f in files if f not in bad]
    if args.panel and good:
        save_panel(args.panel, net, [(f.stem, data.shrink(data.load_image(f)), None) for f in good[:20]])
    print(f"wrote {len(good)} label maps to {out}/, {len(files) / (time.perf_counter() - begun):.2f} images/s, "
          f"most memory {memory(args.device):.2f} GB")
    if bad:
        raise InputError(f"{len(bad)} of {len(files)} images could not be read: {'; '.join(bad.values())}")


if __name__ == "__main__":
    data.run_cli(main)
