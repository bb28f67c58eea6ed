"""Per-pixel labels for photographs: score map, image-level prior, smoothing prior (section 4).

    python infer.py out/toy/ckpt.pt photo.jpg         # photo.png, photo_overlay.png in out/labels
    python infer.py CKPT DIR --prior sppxl --soft     # a folder; also the class scores as .npz
    python infer.py CKPT photo.jpg --panel demo.png   # a picture of how it came about
    python infer.py CKPT --voc VOC2012 --set val --out out/val    # ready for eval_voc.py score
    python infer.py CKPT --voc VOC2012 --set train --known-tags   # labels to train other networks

No mask is read here, and tags only for --known-tags. A photograph above 1,000 px is labelled at
that size, and its labels enlarged.
Letters in shape comments: K classes, C background and an image's tags, H W pixels, h w cells, N
proposals, S superpixels.
"""

import argparse
import collections
import contextlib
import functools
import math
import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

import data
import model
from data import VOID, InputError

SECONDS = collections.Counter()  # spent on each part of labelling


@contextlib.contextmanager
def timed(part):
    """Adds to SECONDS what the block, or the function it decorates, takes."""
    start = time.perf_counter()
    yield
    SECONDS[part] += time.perf_counter() - start


# ---------------------------------------------------------------- scores and the image-level prior
@timed("network")
@torch.no_grad()
def predict(net, image, tagged=None):
    """Eq. 2 of an image (H, W, 3) uint8: p (K, H, W) at every pixel, q (K,) of the whole image.

    p sees the learned foreground, q does not. tagged: where tags are known, their indices (C,),
    background's first; p is then (C, H, W).
    Scores are averaged over the sizes net.sides, on a grid net.dense times finer."""
    H, W = image.shape[:2]
    device = net.device
    sides = net.sides or (math.sqrt(H * W),)
    scores, image_scores = 0, 0
    for side in sides:
        ratio = side / math.sqrt(H * W)
        h = max(1, round(H * ratio))
        w = max(1, round(W * ratio))
        seen = np.array(Image.fromarray(image).resize((w, h), Image.BILINEAR))
        x = torch.from_numpy(seen).permute(2, 0, 1)[None].to(device)  # (1, 3, h, w)
        with torch.autocast(device.type, torch.bfloat16, enabled=net.amp):
            score_map, maps, stride, offset = net.score_map(x)
        if tagged is None:
            label_scores = net.pixel_scores(score_map, maps)
        else:
            label_scores = net.tagged_scores(score_map, maps, tagged)
        pixels = model.upsample(label_scores, (H, W), stride, offset, (h, w))[0]
        scores = scores + pixels / len(sides)
        image_scores = image_scores + net.aggregate(score_map)[0] / len(sides)
    p, q = scores.softmax(0), net.probabilities(image_scores)
    return p.cpu().numpy(), q.cpu().numpy()


def ilp(p, q, form="objects"):
    """Image-level prior, Eq. 7: p (K, H, W) times q (K,)."""
    factor = q.copy()
    if form == "objects":  # Eq. 7 read literally: the paper's classes lack background
        factor[0] = 1
    return p * factor.astype(p.dtype)[:, None, None]


# ---------------------------------------------------------------- superpixels
def superpixels(image, scale=100, sigma=0.5, min_size=12):
    """Felzenszwalb & Huttenlocher's graph-based segmentation (IJCV 2004), 8-connected.

    image (H, W, 3) uint8; scale: their k, in grey levels of 255 (larger: larger segments); sigma:
    of Gaussian smoothing, pixels; min_size: pixels. Returns (H, W) int32 labels 0..S-1 in raster
    order of each segment's first pixel."""
    H, W = image.shape[:2]
    k = scale / 255
    smooth = ndimage.gaussian_filter(image / 255.0, (sigma, sigma, 0)).reshape(-1, 3)
    pixels = np.arange(H * W).reshape(H, W)

    # Edges join each pixel to those right, below, below right and below left of it.
    costs, starts, ends = [], [], []
    for dy, dx in ((0, 1), (1, 0), (1, 1), (1, -1)):
        a = pixels[: H - dy, max(0, -dx) : W - max(0, dx)].ravel()
        b = a + dy * W + dx
        costs.append(np.sqrt(((smooth[a] - smooth[b]) ** 2).sum(1)))
        starts.append(a)
        ends.append(b)
    order = np.argsort(np.concatenate(costs), kind="stable")
    edges = [np.concatenate(part)[order] for part in (costs, starts, ends)]

    # By rising cost an edge joins A and B if its cost is below Int(A) + k/|A| and Int(B) + k/|B|;
    # in a second pass, if A or B is too small.
    parent = list(range(H * W))  # a segment is named after its first pixel
    size = [1] * (H * W)
    limit = [k] * (H * W)  # Int(C) + k / |C|
    for growing in (True, False):
        for cost, a, b in zip(*(column.tolist() for column in edges)):
            while a != parent[a]:
                parent[a] = parent[parent[a]]
                a = parent[a]
            while b != parent[b]:
                parent[b] = parent[parent[b]]
                b = parent[b]
            if growing:
                joins = cost < limit[a] and cost < limit[b]
            else:
                joins = size[a] < min_size or size[b] < min_size
            if a != b and joins:
                if a > b:
                    a, b = b, a
                parent[b] = a
                size[a] += size[b]
                limit[a] = cost + k / size[a]

        # Each pixel's segment. Few edges are left that the second pass could join.
        for pixel, before in enumerate(parent):  # before <= pixel: it has its root by now
            parent[pixel] = parent[before]
        segment = np.array(parent)
        small = np.array(size)[segment] < min_size
        a, b = edges[1:]
        left = (segment[a] != segment[b]) & (small[a] | small[b])
        edges = [column[left] for column in edges]
    labels = np.unique(segment, return_inverse=True)[1]
    return labels.astype(np.int32).reshape(H, W)


@timed("superpixels")
def coarse_superpixels(image, side=160):
    """Superpixels of an image (H, W, 3) uint8, found at about `side` pixels: (H, W) int32."""
    H, W = image.shape[:2]
    block = max(1, round(max(H, W) / side))
    labels = superpixels(np.asarray(Image.fromarray(image).reduce(block)))
    return labels.repeat(block, 0).repeat(block, 1)[:H, :W]


# ---------------------------------------------------------------- proposals: our own, boxes, MCG's
def scaled(scores, low=0.0):
    """Scores (N,) stretched to low..1. low is 0.5 for a file's: its worst exceeds none, 0."""
    if not len(scores):
        return scores
    share = (scores - scores.min()) / max(np.ptp(scores), 1e-12)
    return low + (1 - low) * share


def hierarchy(image, regions, least=0.002):
    """Candidate segments, nothing trained: nodes of a merge tree over superpixels.

    image (H, W, 3) uint8; regions (H, W) int, all of 0..S-1. Returns segments (N, S) bool, at least
    the share `least` of the picture, and scores (N,) in 0..1: mean distances from the border
    (geodesic saliency, Wei et al., ECCV 2012). Neighbours are as far apart as their mean colours,
    others as the cheapest path between them; average linkage merges the closest."""
    from scipy.cluster.hierarchy import linkage  # takes a while to import
    from scipy.sparse.csgraph import shortest_path

    flat = regions.ravel()
    size = np.bincount(flat)  # (S,) pixels
    S = len(size)
    planes = image.reshape(-1, 3).T / 255
    colour = np.stack([np.bincount(flat, plane) for plane in planes], 1) / size[:, None]  # (S, 3)
    cost = np.zeros((S, S))  # 0: no neighbours
    across, below = (regions[:, 1:], regions[:, :-1]), (regions[1:], regions[:-1])
    for first, second in (across, below):
        differ = first != second
        a, b = first[differ], second[differ]
        difference = np.linalg.norm(colour[a] - colour[b], axis=1) + 1e-6
        cost[a, b] = cost[b, a] = difference
    distance = shortest_path(cost, directed=False)  # (S, S)

    segments = np.eye(2 * S - 1, S, dtype=bool)  # the leaves, then the nodes that merge them
    tree = linkage(distance[np.triu_indices(S, 1)], "average") if S > 1 else np.zeros((0, 4))
    for node, (a, b) in enumerate(tree[:, :2].astype(int), S):
        segments[node] = segments[a] | segments[b]
    segments = segments[segments @ size >= least * regions.size]
    border = np.concatenate([regions[0], regions[-1], regions[:, 0], regions[:, -1]])
    from_border = distance[:, np.unique(border)].min(1)  # (S,)
    return segments, scaled(segments @ (size * from_border) / (segments @ size))


def boxes_of(segments, regions):
    """Tight boxes (N, 4) x0 y0 x1 y1 (x1, y1 outside) of segments (N, S) bool over regions."""
    slices = ndimage.find_objects(regions + 1)  # of each region: rows, columns
    first = np.array([(x.start, y.start) for y, x in slices])  # (S, 2)
    stop = np.array([(x.stop, y.stop) for y, x in slices])
    low = np.where(segments[:, :, None], first, regions.size).min(1)  # (N, 2)
    high = np.where(segments[:, :, None], stop, 0).max(1)
    return np.concatenate([low, high], 1)


def box_cover(boxes, scores, shape):
    """p(ij in Obj), section 4: mean score of the boxes that cover pixel ij, else 0 -> (H, W).

    boxes (N, 4) x0 y0 x1 y1, pixels round(x0) to before round(x1); scores (N,); shape (H, W)."""
    total, count = np.zeros(shape), np.zeros(shape)
    for (x0, y0, x1, y1), score in zip(np.round(boxes).clip(0).astype(int), scores):
        total[y0:y1, x0:x1] += score
        count[y0:y1, x0:x1] += 1
    return total / np.maximum(count, 1)


def segment_cover(segments, scores, regions):
    """p(ij in Obj), section 4, of segments (N, S) bool over regions (H, W); scores (N,)."""
    mean = (scores @ segments) / np.maximum(segments.sum(0), 1)  # (S,)
    return mean[regions]


def read_boxes(path, shape):
    """Lines x0 y0 x1 y1 score, of BING or any detector -> boxes (N, 4), scores (N,) in 0.5..1.

    shape: (H, W) of the photograph, which holds them."""
    expected = "a line x0 y0 x1 y1 score for every box, in pixels of the photograph, upright"
    with data.reading(path, expected):
        rows = data.read_rows(path, expected)
        values = np.array(rows, float) if rows else np.zeros((0, 5))
        if values.ndim != 2 or values.shape[1] != 5 or not np.isfinite(values).all():
            raise ValueError("not five numbers a line")
        boxes = values[:, :4]
        inside = (boxes >= -1).all() and (boxes[:, 2:] <= np.array(shape[::-1]) + 1).all()
        if not inside or (boxes[:, 2:] - boxes[:, :2] < 1).any():
            raise ValueError(f"not all boxes are a pixel or more of {shape[1]}x{shape[0]}")
    return boxes, scaled(values[:, 4], 0.5)


def read_mcg(path, shape):
    """MCG's .mat -> regions of this shape (H, W), segments (N, S) bool, scores (N,) in 0.5..1."""
    import scipy.io

    with data.reading(path, "MCG's superpixels, labels, scores for a photograph up to 1,000 px"):
        mat = scipy.io.loadmat(path)
        regions = mat["superpixels"].astype(int) - 1
        scores = np.ravel(mat["scores"]).astype(float)
        parts = [np.ravel(cell).astype(int) - 1 for cell in mat["labels"].ravel()]  # all from 1
        if regions.shape != shape or regions.min() < 0 or regions.max() >= regions.size:
            raise ValueError(f"its superpixels are not {shape[1]}x{shape[0]} numbers from 1")
        if not len(parts) == len(scores) > 0 or not np.isfinite(scores).all():
            raise ValueError("not every candidate has one score")
        if min(part.min(initial=0) for part in parts) < 0:
            raise ValueError("its labels are not numbers from 1")
        segments = np.zeros((len(parts), regions.max() + 1), bool)
        for row, part in zip(segments, parts):
            row[part] = True
    return regions, segments, scaled(scores, 0.5)


# ---------------------------------------------------------------- smoothing priors (section 4)
def vote(labels, regions):
    """SP-sppxl: every superpixel takes its most frequent label. labels, regions (H, W)."""
    K = int(labels.max()) + 1
    S = int(regions.max()) + 1
    pairs = regions.ravel() * K + labels.ravel()
    counts = np.bincount(pairs, minlength=S * K).reshape(S, K)
    return counts.argmax(1)[regions]


def evidence(p, objectness):
    """The best object class k (H, W), and v (H, W), its share of p (K, H, W) times objectness."""
    objects = p[1:]
    share = objects.max(0) / np.maximum(p.sum(0), 1e-30)  # the ILP lowers the sum
    return objects.argmax(0) + 1, share * objectness


def thresholded(p, objectness, delta):
    """SP-bb, SP-seg: the best object class where its `evidence` exceeds delta (K,), else 0."""
    k, v = evidence(p, objectness)
    return np.where(v > np.asarray(delta)[k], k, 0)


def relative(objectness):
    """Objectness (H, W) on any scale -> in 0..1, 0.5 for the average pixel."""
    o = objectness - objectness.min() + 1e-12  # a flat one becomes 0.5
    return o / (o + o.mean())


def pixel_adaptive(planes, image, rounds, dilations=(1, 2, 4, 8), width=0.1):
    """Pixel-adaptive refinement (Araslanov & Roth, CVPR 2020): means of neighbours of like colour.

    planes (K, h, w) float, image (h, w, 3) uint8 -> (K, h, w) float32. A pixel has 8 neighbours at
    each dilation (pixels); their weights are one softmax of minus the mean over channels of
    |colour difference| / (width * local standard deviation)."""
    (h, w), margin = image.shape[:2], max(dilations)
    around = [(-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 1), (1, -1), (1, 0), (1, 1)]
    corners = [(margin + d * dy, margin + d * dx) for d in dilations for dy, dx in around]

    def neighbours(x):  # (C, h, w) -> (C, 8 * dilations, h, w)
        padded = F.pad(x[None], [margin] * 4, "replicate")[0]
        return torch.stack([padded[:, top : top + h, left : left + w] for top, left in corners], 1)

    guide = torch.tensor(image).permute(2, 0, 1).float() / 255  # (3, h, w)
    near = neighbours(guide)
    deviation = torch.cat([near, guide[:, None]], 1).std(1, keepdim=True)
    difference = (near - guide[:, None]).abs() / (width * (deviation + 1e-8))
    weight = (-difference.mean(0)).softmax(0)  # (8 * dilations, h, w)
    x = torch.from_numpy(np.asarray(planes, np.float32))
    for _ in range(rounds):
        x = (neighbours(x) * weight).sum(1)
    return x.numpy()


@timed("refinement")
def refine(p, image, regions, rounds=5):
    """Our own prior, nothing trained: pixel-adaptive refinement, then superpixel means.

    p (K, H, W), image (H, W, 3) uint8, regions (H, W) int -> shares (K, H, W), which sum to 1."""
    H, W = image.shape[:2]
    block = max(1, round(max(H, W) / 64))  # to about 64 pixels along the longer side
    h, w = math.ceil(H / block), math.ceil(W / block)
    guide = np.asarray(Image.fromarray(image).resize((w, h), Image.BOX))
    shares = torch.from_numpy(p / np.maximum(p.sum(0), 1e-30))
    small = F.interpolate(shares[None], (h, w), mode="area")[0]
    refined = torch.from_numpy(pixel_adaptive(small, guide, rounds))
    planes = F.interpolate(refined[None], (H, W), mode="bilinear")[0].numpy()
    size = np.bincount(regions.ravel())
    means = [np.bincount(regions.ravel(), plane.ravel()) / size for plane in planes]
    return np.stack(means).astype(np.float32)[:, regions]


def labels_from_tags(p, tagged, image, regions, sure):
    """Labels (H, W) uint8 of an image whose tags are known; void where no share reaches `sure`.

    tagged (C,): indices of background and of its tags; p (C, H, W): theirs alone."""
    share = refine(p, image, regions, rounds=10)  # twice the prior's: fewer wrong, objects smaller
    labels = tagged[share.argmax(0)]
    return np.where(share.max(0) >= sure, labels, VOID).astype(np.uint8)


class Scene:
    """A photo (H', W', 3) uint8, the image (H, W, 3) that is labelled, and what priors make of it.

    delta: prior -> thresholds (K,). boxes: folder of <name>.txt; mcg: folder of <name>.mat; without
    them our own hierarchy serves."""

    def __init__(self, photo, delta=None, boxes=None, mcg=None, name=""):
        self.image, self.photo_shape = data.shrink(photo), photo.shape[:2]
        self.delta, self.boxes, self.mcg, self.name = delta, boxes, mcg, name

    @functools.cached_property
    def regions(self):
        return coarse_superpixels(self.image)

    @functools.cached_property
    def segments(self):
        return hierarchy(self.image, self.regions)

    @functools.cached_property
    def bb(self):
        """p(pixel in an object) from boxes, (H, W), made `relative`."""
        if self.boxes:
            path = Path(self.boxes, f"{self.name}.txt")
            boxes, scores = read_boxes(path, self.photo_shape)
            scale = np.divide(self.image.shape[1::-1], self.photo_shape[::-1])  # of x, of y
            boxes = boxes * np.tile(scale, 2)
        else:
            boxes, scores = boxes_of(self.segments[0], self.regions), self.segments[1]
        return relative(box_cover(boxes, scores, self.image.shape[:2]))

    @functools.cached_property
    def seg(self):
        """p(pixel in an object) from segments, (H, W), made `relative`."""
        if self.mcg:
            path = Path(self.mcg, f"{self.name}.mat")
            regions, segments, scores = read_mcg(path, self.image.shape[:2])
        else:
            regions, (segments, scores) = self.regions, self.segments
        return relative(segment_cover(segments, scores, regions))


FITTED = ("bb", "seg")  # priors that have thresholds; each is a property of Scene, too
PRIORS = {  # name: f(p (K, H, W) after Eq. 7, Scene) -> labels (H, W)
    "none": lambda p, scene: p.argmax(0),
    "sppxl": lambda p, scene: vote(p.argmax(0), scene.regions),
    "bb": lambda p, scene: thresholded(p, scene.bb, scene.delta["bb"]),
    "seg": lambda p, scene: thresholded(p, scene.seg, scene.delta["seg"]),
    "refine": lambda p, scene: refine(p, scene.image, scene.regions).argmax(0),
}


def fit_thresholds(net, tagged_images, borrowed=3, steps=50):
    """delta_k of section 4 by grid search, {"bb": K floats, "seg": K floats}, from tags alone.

    tagged_images: (image (H, W, 3), tags (K,) of 0/1); each class's IoU is with labels that the net
    makes from them. Each delta_k is the multiple of 1 / steps that maximises
    n_k * IoU_k + borrowed * (mean IoU of the objects), where n_k images show k. Returns {} if no
    image has an object."""
    K = len(net.classes)
    hits = np.zeros((len(FITTED), steps, K))  # right pixels above each threshold
    drawn = np.zeros((len(FITTED), steps, K))  # all pixels above it
    area, images = np.zeros(K), np.zeros(K)  # pixels of each class, and images with it
    objects = False  # whether any image has one
    for image, tags in tagged_images:
        objects |= bool(tags[1:].any())
        scene, (p, q) = Scene(image), predict(net, image)
        tagged = data.with_background(tags)
        known = predict(net, image, tagged)[0]
        labels = labels_from_tags(known, tagged, image, scene.regions, sure=0)
        counts = np.bincount(labels.ravel(), minlength=K)
        area, images = area + counts, images + (counts > 0)
        for n, prior in enumerate(FITTED):
            k, v = evidence(ilp(p, q), getattr(scene, prior))
            for step in range(steps):
                above = v > step / steps
                drawn[n, step] += np.bincount(k[above], minlength=K)
                hits[n, step] += np.bincount(k[above & (k == labels)], minlength=K)

    if not objects:
        return {}  # nothing to fit them on
    iou = hits / np.maximum(drawn + area - hits, 1)  # (2, steps, K)
    weighed = images * iou + borrowed * iou[..., 1:].mean(2, keepdims=True)
    deltas = weighed.argmax(1) / steps  # (2, K)
    return dict(zip(FITTED, deltas.tolist()))


# ---------------------------------------------------------------- pictures
def overlay(image, labels, alpha=0.6):
    """image (H, W, 3) uint8 under the colours of labels (H, W); background stays clear."""
    mix = image * (1 - alpha) + data.voc_palette()[labels] * alpha
    return np.where((labels > 0)[..., None], mix, image).astype(np.uint8)


def save_panel(path, net, scenes, prior="refine", ilp_form="objects", width=170):
    """A contact sheet, a row for each (Scene, truth (H, W), or None in all); ilp_form None: no ILP.

    The image; maps of the three likeliest classes, under their names in the labels' colours; the
    labels step by step."""
    colours, face, gap, line = data.voc_palette(), ImageFont.load_default(18), 4, 26
    heat = (np.arange(256)[:, None] * 3 - [0, 255, 510]).clip(0, 255).astype(np.uint8)  # row 255 p

    def cell(caption, picture, k=0):  # k: whose colour the caption has
        H, W = picture.shape[:2]
        height = max(1, min(round(H * width / W), 4 * width))
        image = Image.new("RGB", (gap + width, line + height), "white")
        ImageDraw.Draw(image).text((gap, 1), caption, tuple(colours[k].tolist()), face)
        small = Image.fromarray(picture).resize((width, height), Image.NEAREST)
        image.paste(small, (gap, line))
        return np.asarray(image)

    rows = []
    for scene, truth in scenes:
        p, q = predict(net, scene.image)
        cells = [cell("image", scene.image)]
        for k in [k for k in np.argsort(-q) if k > 0][:3]:
            picture = heat[(p[k] * 255).astype(np.uint8)]
            cells.append(cell(f"{net.classes[k][:12]} {q[k]:.2f}", picture, k))
        cells.append(cell("base", colours[p.argmax(0)]))
        if ilp_form:
            p = ilp(p, q, ilp_form)
            cells.append(cell("+ILP", colours[p.argmax(0)]))
        if prior != "none":
            cells.append(cell(f"+{prior}", colours[PRIORS[prior](p, scene)]))
        if truth is not None:
            cells.append(cell("truth", colours[truth]))
        rows.append(np.hstack(cells))
    margins = ((0, gap), (0, gap), (0, 0))  # below, and on the right
    sheet = Image.fromarray(np.pad(np.vstack(rows), margins, constant_values=255))
    data.save_png(path, sheet, net.classes)


def save_chart(path, lines, xlabel, style="-", size=(7, 3)):
    """A chart of {label: (x, y)} as a PNG of size inches, where matplotlib is installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print(f"{path} is not drawn: matplotlib is not installed")
        return
    figure = Figure(size, layout="constrained")
    axes = figure.subplots()
    for label, (x, y) in lines.items():
        axes.plot(x, y, style, label=label)
    axes.set_xlabel(xlabel)
    axes.grid(alpha=0.3)
    axes.legend()
    with data.writing(path) as file:
        figure.savefig(file, format="png")


# ---------------------------------------------------------------- priors beside the network
def overlapped(work, predictions, workers=0):
    """Yield work(prediction) in order, from a thread or `workers` processes, only a few ahead.

    work: a function of a module, its first arguments bound by functools.partial: it is pickled."""
    threads = torch.get_num_threads()
    if workers:
        context = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(workers, context, torch.set_num_threads, (1,))  # one core each
        torch.set_num_threads(max(1, threads - workers))  # the rest are the network's
    else:
        pool = ThreadPoolExecutor(1)
        sys.setswitchinterval(2e-4)  # seconds that the network waits for the other thread
    jobs = collections.deque()
    try:
        with pool:
            for prediction in predictions:
                jobs.append(pool.submit(in_pool, work, prediction))
                if len(jobs) > workers + 2:
                    yield collect(jobs.popleft())
            while jobs:
                yield collect(jobs.popleft())
    except BrokenProcessPool as e:
        why = "a process for the priors has died, for want of memory"
        raise InputError(f"--workers: {why}; give fewer, or none") from e
    finally:
        torch.set_num_threads(threads)


def in_pool(work, prediction):
    """(work(prediction), SECONDS spent)."""
    result = work(prediction)
    parts = SECONDS.keys() - {"network"}  # which another thread counts
    return result, {part: SECONDS.pop(part) for part in parts}


def collect(job):
    """The result of a job that in_pool does; counts the seconds spent."""
    result, spent = job.result()
    SECONDS.update(spent)  # a Counter: adds
    return result


# ---------------------------------------------------------------- command line
def numbers(text):
    """A flag's 512,256 -> (512, 256); raises ArgumentTypeError where one is no positive number."""
    words = text.split(",")
    if not all(word.isdecimal() and 0 < int(word) < 100_000 for word in words):
        raise argparse.ArgumentTypeError(f"'{text}'; expected numbers such as 288,432")
    return tuple(int(word) for word in words)


def add_options(parser):
    """What infer.py and `eval_voc.py ladder` both take."""
    add = parser.add_argument_group("network and priors").add_argument
    add("--weights", default="", metavar="FILE", help="the trunk's [the checkpoint's, or fetched]")
    forms = {"choices": ["objects", "all"], "default": "objects"}
    add("--ilp-form", help="what Eq. 7 multiplies: objects, or background too [objects]", **forms)
    add("--boxes", metavar="DIR", help="<image>.txt, lines x0 y0 x1 y1 score, for bb [our own]")
    add("--mcg", metavar="DIR", help="MCG's <image>.mat candidates, for seg [our own]")
    add("--dense", type=int, metavar="F", help="score grid F times finer [the checkpoint's]")
    add("--sides", type=numbers, metavar="M,M", help="see images at areas M x M [the checkpoint's]")
    add("--workers", type=int, choices=range(65), default=0, metavar="N", help="for the priors [0]")
    add("--device", type=model.pick_device, default="auto", help="auto, cpu, cuda, cuda:1, mps")


def open_net(path, args, priors):
    """(net, what makes a Scene of a photo and its name), for these priors. Raises InputError."""
    if (args.boxes and "bb" not in priors) or (args.mcg and "seg" not in priors):
        raise InputError("--boxes serves the prior bb, --mcg seg; ask for it, or leave it out")
    fitted = set(FITTED) & set(priors)
    with data.reading(path, "ckpt.pt or head.pt of train.py, and options that suit it"):
        net, ckpt = model.load_net(path, args.weights, args.device, args.dense, args.sides)
        if fitted and not ckpt["thresholds"]:
            why = "let its training end, --resume, or give it more --threshold-images"
            raise ValueError(f"no thresholds for bb, seg; {why}")
        run = ckpt["settings"]
        steps = run["steps"] + run["self_steps"] * run["self_rounds"]
    if ckpt["step"] < steps:
        print(f"{path}: its training has not ended, it is at step {ckpt['step']} of {steps}")
    other_scores = args.sides or args.dense or args.ilp_form == "all" or not args.ilp
    if fitted and (other_scores or args.boxes or args.mcg):
        print("bb, seg: their thresholds are for the checkpoint's sizes, our proposals and Eq. 7")
    return net, functools.partial(Scene, delta=ckpt["thresholds"], boxes=args.boxes, mcg=args.mcg)


def outputs(out, file):
    """The files that may be written for a photograph: labels, overlay, scores."""
    return [Path(out, file.stem + end) for end in (".png", "_overlay.png", ".npz")]


def is_ours(path):
    """Whether infer.py has written a file, as its notes or names say; not if it is damaged."""
    with contextlib.suppress(InputError, OSError), data.reading(path, "labels or scores"):
        if path.suffix == ".png":
            return bool(data.read_notes(path)[0])
        with np.load(path) as content:
            return content.files == ["p", "q", "classes"]
    return False


def files_to_label(args, tags):
    """The photographs asked for, but for pictures of ours among them."""
    if tags:
        files = list(tags)
    elif args.voc:
        files = [Path(args.voc, "JPEGImages", f"{i}.jpg") for i in data.voc_ids(args.voc, args.set)]
    else:
        files = []
        for path in map(Path, args.images):
            images = data.image_files(path) if path.is_dir() else [path]
            photos = [file for file in images if file.suffix != ".png" or not is_ours(file)]
            files += photos
            if len(photos) < len(images):
                print(f"{path}: left out: {len(images) - len(photos)} pictures that infer.py made")
        if not files:
            raise InputError(f"{args.images[0]}: no photograph, only labels")
    return files


def check_outputs(args, files):
    """Raises InputError where files to write would replace others', or proposals are missing."""
    taken = {file.resolve(): file for file in files}  # what is there, then what will be
    for file in files:
        for path in outputs(args.out, file):
            path = path.resolve()
            if path in taken:
                both = f"would be written for {file} and {taken[path]}"
                remedy = "label folders apart, rename one, or give another --out"
                raise InputError(f"{path}: {both}; {remedy}")
            if path.exists() and not is_ours(path):
                raise InputError(f"{path}: not written by infer.py; give another --out")
            taken[path] = file
        for folder, end in ((args.boxes, ".txt"), (args.mcg, ".mat")):
            proposals = Path(folder or "", file.stem + end)
            if folder and not proposals.is_file():
                raise InputError(f"{proposals}: no such file; expected one for each photograph")
    if args.panel and (Path(args.panel).resolve() in taken or Path(args.panel).suffix != ".png"):
        raise InputError(f"--panel {args.panel}: expected a .png beside photographs and labels")


def known_tags(args, classes):
    """{file: indices (C,) of background and its tags}: of --voc's set, or one folder's CSV."""
    if args.voc and (classes != data.VOC_CLASSES or args.known_tags is not True):
        raise InputError("--known-tags with --voc: no CSV, and a checkpoint of VOC's classes")
    if args.voc:
        photos = data.voc_photos(args.voc, args.set, with_masked=True)
        return dict(zip(photos.paths, map(data.with_background, photos.tags)))
    if len(args.images) != 1 or args.known_tags is True:
        raise InputError("--known-tags: give one folder of photographs, and the CSV of their tags")
    tags = data.read_tags(args.images[0], args.known_tags)
    unknown = set().union(*tags.values()) - set(classes)
    if unknown:
        known = f"its classes are {', '.join(classes)}"
        raise InputError(f"{args.known_tags}: {min(unknown)} is unknown to the checkpoint; {known}")
    indices = {}
    for file, names in tags.items():
        indices[file] = np.array(sorted([0] + [classes.index(name) for name in names]))
    return indices


def enlarged(labels, shape):
    """labels (h, w) uint8 at a photograph's own resolution, shape (H, W)."""
    return np.asarray(Image.fromarray(labels).resize(shape[::-1], Image.NEAREST))


def write_labels(args, classes, scene_of, predicted):
    """Smooth one photograph's p (K, H, W) and write its labels -> {class: share of the pixels}.

    predicted: file, photo (H', W', 3), p, q, and indices of background and known tags, or None."""
    file, photo, p, q, tagged = predicted
    labels_file, overlay_file, scores_file = outputs(args.out, file)
    comment = ""
    scene = scene_of(photo, name=file.stem)
    if tagged is None:
        p = ilp(p, q, args.ilp_form) if args.ilp else p
        labels = PRIORS[args.prior](p, scene).astype(np.uint8)
    else:
        labels = labels_from_tags(p, tagged, scene.image, scene.regions, args.sure)
        comment = "training label: made with known tags"
    with timed("writing"):
        labels = enlarged(labels, photo.shape[:2])
        data.save_labels(labels_file, labels, classes, comment)
        if not args.voc:
            picture = Image.fromarray(overlay(photo, labels))
            data.save_png(overlay_file, picture, classes, compress_level=1)  # in a third
        if args.soft:
            with data.writing(scores_file) as scores:
                np.savez_compressed(scores, p=p.astype(np.float16), q=q, classes=classes)
    counts = np.bincount(labels.ravel(), minlength=len(classes))
    return {classes[k]: counts[k] / labels.size for k in np.argsort(-counts[: len(classes)])}


def parse():
    """The command line; options that would do nothing are refused."""
    parser = data.Parser(description=__doc__)
    add = parser.add_argument_group("what to label, and where to").add_argument
    add("checkpoint", help="ckpt.pt or head.pt of train.py")
    add("images", nargs="*", help="image files and folders")
    add("--voc", metavar="DIR", help="label a set of this devkit instead")
    add("--set", metavar="NAME", help="which set of --voc [val]")
    add("--out", default="out/labels", metavar="DIR", help="where to write [out/labels]")
    add("--soft", action="store_true", help="also write p (after Eq. 7) and q as .npz")
    add("--panel", metavar="FILE", help="draw how the first 20 images came about")
    add("--prior", choices=list(PRIORS), help="what smooths the labels [refine]")
    add("--ilp", action=argparse.BooleanOptionalAction, default=True, help="use Eq. 7 [yes]")
    csv = {"nargs": "?", "const": True, "metavar": "FILE"}  # True: without a CSV
    add("--known-tags", help="training labels from true tags: of --voc's set, or this CSV's", **csv)
    add("--sure", type=float, metavar="P", help="with them: below it 255 [0.6]")
    add_options(parser)
    args = parser.parse_args()
    if bool(args.voc) == bool(args.images):
        parser.error("give images or folders, or --voc DIR --set NAME")
    if args.known_tags and (args.prior or not args.ilp or args.panel or args.soft):
        parser.error("--known-tags takes none of --prior, --no-ilp, --panel and --soft")
    if args.sure is not None and not (args.known_tags and 0 <= args.sure <= 1):
        parser.error("--sure goes with --known-tags; expected a share, 0 to 1")
    if args.set and not args.voc:
        parser.error("--set goes with --voc")
    if args.ilp_form == "all" and (args.known_tags or not args.ilp):
        parser.error("--ilp-form goes with the image-level prior")
    args.set, args.prior = args.set or "val", args.prior or "refine"
    args.sure = 0.6 if args.sure is None else args.sure
    return args


def main():
    args = parse()
    net, scene_of = open_net(args.checkpoint, args, [args.prior])
    tags = known_tags(args, net.classes) if args.known_tags else {}
    files = files_to_label(args, tags)
    check_outputs(args, files)
    lock = data.claim(args.out)
    targets = [path for file in files for path in outputs(args.out, file)]
    data.move_aside(args.out, targets)
    others = set(Path(args.out).glob("*.png")) - set(targets)
    if others:
        print(f"{args.out}: holds {len(others)} other pictures, such as {min(others)}")
    broken, start = {}, time.perf_counter()

    def predictions():
        for file in data.progress(files, "labelled"):
            try:
                photo = data.load_image(file)
            except (InputError, OSError) as e:
                broken[file] = data.one_line(e)
                continue
            tagged = tags.get(file)
            yield file, photo, *predict(net, data.shrink(photo), tagged), tagged

    work = functools.partial(write_labels, args, net.classes, scene_of)
    for shares in overlapped(work, predictions(), args.workers):
        if len(files) == 1:
            words = [f"{name} {share:.0%}" for name, share in shares.items() if share >= 0.005]
            print(f"{files[0]}: {', '.join(words)}")
    whole = [file for file in files if file not in broken]
    if args.panel and whole:
        scenes = []
        for file in whole[:20]:
            scenes.append((scene_of(data.load_image(file), name=file.stem), None))
        save_panel(args.panel, net, scenes, args.prior, args.ilp_form if args.ilp else None)
        print(f"drew {len(scenes)} of them in {args.panel}")
    speed = len(files) / (time.perf_counter() - start)
    kind = "training labels (known tags)" if tags else "label maps"
    print(f"wrote {len(whole)} {kind} to {args.out}/, {speed:.2f} images/s")
    parts = [f"{part} {seconds / len(files):.3f}" for part, seconds in SECONDS.items()]
    print(f"seconds an image: {', '.join(parts)}")
    lock.close()
    Path(lock.name).unlink(missing_ok=True)
    if broken:
        raise InputError(f"{len(broken)} of {len(files)} images: {'; '.join(broken.values())}")


if __name__ == "__main__":
    data.run_cli(main)
