"""Score label maps by VOC's rules to the letter, print the ladder of priors, pack a submission.

    python eval_voc.py score  PRED_DIR --voc VOC2012 --set val      # IoU per class and their mean
    python eval_voc.py ladder CKPT     --voc VOC2012 --set val      # base, +ILP, +ILP+sppxl, ... in one pass
    python eval_voc.py submit PRED_DIR --voc VOC2012 --set test --out results.tgz
    python eval_voc.py proposals       --voc VOC2012 --set val      # how good superpixels and boxes are, against true masks

One 21 x 21 histogram over the whole set, void pixels left out, the plain mean over all 21 classes: VOCevalseg.m.
Letters in shape comments: K classes, H W pixels. Matrices have a row per true and a column per predicted class.
"""
import json
import math
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

import data
import infer
from data import InputError, VOID
from model import memory

# IoU per class on VOC 2012 val in the paper's Table 4, background first, in devkit order.
PAPER = {name: [float(value) for value in values] for name, *values in map(str.split, """
base      37.0 10.4 12.4 10.8  5.3  5.7 25.2 21.1 25.15  4.8 21.5  8.6 29.1 25.1 23.6 25.5 12.0 28.4  8.9 22.0 11.6
ilp       73.2 25.4 18.2 22.7 21.5 28.6 39.5 44.7 46.6 11.9 40.4 11.8 45.6 40.1 35.5 35.2 20.8 41.7 17.0 34.7 30.4
ilp+sppxl 77.2 37.3 18.4 25.4 28.2 31.9 41.6 48.1 50.7 12.7 45.7 14.6 50.9 44.1 39.2 37.9 28.3 44.0 19.6 37.6 35.0
ilp+bb    78.6 46.9 18.6 27.9 30.7 38.4 44.0 49.6 49.8 11.6 44.7 14.6 50.4 44.7 40.8 38.5 26.0 45.0 20.5 36.9 34.8
ilp+seg   79.6 50.2 21.6 40.6 34.9 40.5 45.9 51.5 60.6 12.6 51.2 11.6 56.8 52.9 44.8 42.7 31.2 55.4 21.5 38.8 36.9
""".strip().splitlines())}


# ---------------------------------------------------------------- the measure

def confusion(truth, prediction, classes):
    """Joint histogram of one image, (K, K) int64; pixels whose truth is 255 (void) are left out.

    truth, prediction: (H, W) uint8. Raises ValueError where the sizes differ or an index is no class; a predicted
    index that is too large is an error even under void, as in the devkit.
    """
    if truth.shape != prediction.shape:
        raise ValueError(f"{prediction.shape} pixels, but the truth has {truth.shape}; nothing is resized")
    if prediction.max(initial=0) >= classes:
        raise ValueError(f"holds index {prediction.max()}; every pixel must be labelled 0..{classes - 1}, 255 is not allowed")
    truth, prediction = truth.ravel(), prediction.ravel()
    rows = np.bincount(truth.astype(np.intp) * classes + prediction, minlength=256 * classes).reshape(256, classes)
    if rows[classes:VOID].any():
        raise ValueError(f"its truth holds index {classes + rows[classes:VOID].any(1).argmax()}, beyond the {classes} classes")
    return rows[:classes].copy()                           # a view would keep all 256 rows


def measures(matrix):
    """Per-class IoU, precision and recall in percent from a confusion (K, K); 0/0 is NaN, as in the devkit."""
    hit, true, predicted = np.diag(matrix).astype(float), matrix.sum(1), matrix.sum(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return 100 * hit / (true + predicted - hit), 100 * hit / predicted, 100 * hit / true


def summarise(matrix, classes, images):
    """A confusion (K, K) as JSON-ready percentages. mean_iou is the official mean: None where a class is undefined.

    mean_iou_defined: over the classes_defined classes that occur; mean_accuracy: mean recall, Table 2's measure.
    """
    if not matrix.any():
        raise InputError("every pixel of the truth is void; expected label PNGs with class indices")
    iou, precision, recall = ([None if math.isnan(v) else float(v) for v in values] for values in measures(matrix))
    return dict(mean_iou=None if None in iou else mean_defined(iou), mean_iou_defined=mean_defined(iou),
                classes_defined=len(classes) - iou.count(None), images=images, mean_accuracy=mean_defined(recall),
                iou=dict(zip(classes, iou)), precision=dict(zip(classes, precision)), recall=dict(zip(classes, recall)))


def mean_defined(values):
    """Mean of the values that are not None; None where there are none."""
    known = [v for v in values if v is not None]
    return float(np.mean(known)) if known else None


def variants(matrices, void_matrices):
    """Means of IoU that others report and that are not VOC's, from the confusions of single images, in percent.

    void_matrices: the same with void pixels counted as background in the truth.
    """
    total = sum(matrices)
    iou = measures(total)[0]
    return {"mean over images of the mean over their classes": np.mean([np.nanmean(measures(m)[0]) for m in matrices]),
            "epsilon in the fraction (absent classes count 0)": np.nan_to_num(iou).mean(),
            "mean over the classes of the truth": iou[total.sum(1) > 0].mean(),
            "void counted as background": np.nanmean(measures(sum(void_matrices))[0])}


def attempt(function, items):
    """Map over items in threads -> results; what is wrong with any of them is raised as one InputError."""
    with ThreadPoolExecutor() as pool:
        jobs = [pool.submit(function, item) for item in items]
        wrong = [str(job.exception()) for job in data.progress(jobs, "checked") if isinstance(job.exception(), InputError)]
    if wrong:
        raise InputError(f"{len(wrong)} of {len(items)} cannot be used: {'; '.join(wrong[:20])}{' ...' * (len(wrong) > 20)}")
    return [job.result() for job in jobs]


def score(folder, voc, name, classes, void=VOID):
    """A folder of label PNGs against a set's truth: confusions of single images; void: what its void pixels count as."""
    def compare(i):
        path, truth = Path(folder, f"{i}.png"), data.read_labels(Path(voc, "SegmentationClass", f"{i}.png"))
        labels = data.read_labels(path)
        with data.reading(path, "labels as infer.py writes them"):
            return confusion(np.where(truth == VOID, void, truth).astype(np.uint8), labels, len(classes))
    return attempt(compare, data.voc_ids(voc, name))


def print_score(report, matrix, classes):
    width = max(map(len, classes))
    print(f"{'':{width}} {'IoU':>7} {'precision':>10} {'recall':>7}")
    for name, *values in zip(classes, *measures(matrix)):
        print(f"{name:{width}} {values[0]:7.2f} {values[1]:10.2f} {values[2]:7.2f}")
    print(f"mean IoU (VOC) {report['mean_iou'] if report['mean_iou'] is not None else math.nan:.2f}"
          f"   mean class accuracy {report['mean_accuracy']:.2f}   {report['images']} images")
    if report["mean_iou"] is None:
        print(f"mean IoU over the {report['classes_defined']} of {len(classes)} classes that occur "
              f"{report['mean_iou_defined']:.2f}   (not VOC's: the others are 0/0)")


# ---------------------------------------------------------------- the ladder

def average_precision(scores, present):
    """Area under the monotone precision-recall curve (VOC from 2010), percent, or None. scores (N,), present (N,) bool."""
    hits = present[np.argsort(-scores, kind="stable")]
    precision = hits.cumsum() / np.arange(1, len(hits) + 1)
    precision = np.maximum.accumulate(precision[::-1])[::-1]               # the best at this recall or a larger one
    return 100 * float(precision[hits].mean()) if hits.any() else None


def ladder(net, samples, delta=None, bing=None, mcg=None, tags=None, form="objects", priors=tuple(infer.PRIORS), forms=()):
    """Score every rung in one pass over (name, image (H, W, 3), truth (H, W)) samples: a JSON-ready dict.

    delta: thresholds per prior, as in a checkpoint; bing, mcg: folders, see infer.Scene; tags: {name: (classes present, only
    difficult)}, gives the average precision of the image scores; form: Eq. 7's; forms: more of them, a row each.
    """
    def network(sample):
        return *sample, *infer.predict(net, sample[1])

    def labelled(predicted):
        name, image, truth, p, q = predicted
        scene, weighed = infer.Scene(image, delta, bing, mcg, name), infer.ilp(p, q, form)
        rows = {"base": p.argmax(0)}
        rows |= {"ilp" if prior == "none" else f"ilp+{prior}": infer.PRIORS[prior](weighed, scene) for prior in priors}
        rows |= {f"ilp {form}": infer.ilp(p, q, form).argmax(0) for form in forms}
        with data.reading(name, "a mask of the photograph's size and of the checkpoint's classes"):
            return name, q, {row: confusion(truth, x.astype(np.uint8), len(classes)) for row, x in rows.items()}
    matrices, scores, classes = {}, {}, net.classes
    for name, q, counts in infer.overlapped(network, labelled, samples):
        scores[name] = q
        for row, matrix in counts.items():
            matrices[row] = matrices.get(row, 0) + matrix
    report = dict(rows={row: summarise(m, classes, len(scores)) for row, m in matrices.items()}, classes=classes)
    if tags:
        report["average_precision"] = {}
        for k, label in enumerate(classes[1:], 1):
            known = [name for name in scores if k not in tags[name][1]]         # difficult only: contributes nothing
            present = np.array([k in tags[name][0] for name in known], bool)
            report["average_precision"][label] = average_precision(np.array([scores[name][k] for name in known]), present)
        report["mean_average_precision"] = mean_defined(report["average_precision"].values())
    return report


def fit_thresholds(net, samples, shrink=3, steps=1000):
    """delta per prior, {"bb": K floats, "seg": K floats}: each class's best IoU with the labels of some images.

    samples: iterable of (Scene, labels). labels: tags (K,) of 0/1, from which the net makes labels itself (`refine` of its
    tagged classes: nothing but tags is used), or true masks (H, W) (an upper bound, never a result). shrink: a class seen in
    n images weighs its own IoU n against `shrink` times the mean of all classes. Thresholds are multiples of 1 / steps.
    """
    counts, pixels, images = {"bb": 0, "seg": 0}, 0, 0
    for scene, labels in samples:
        p, q = infer.predict(net, scene.image)
        K, labels = len(p), np.asarray(labels)
        if labels.ndim == 1:
            tagged = (labels > 0) | (np.arange(K) == 0)
            labels = infer.refine(p * tagged[:, None, None], scene.image, scene.regions).argmax(0)
        p, keep, here = infer.ilp(p, q), labels != VOID, np.bincount(labels.ravel(), minlength=K)[:K]
        pixels, images = pixels + here, images + (here > 0)
        for prior, objectness in (("bb", scene.bb), ("seg", scene.seg)):
            k, v = infer.evidence(p, objectness)
            bins = np.minimum(v * steps, steps - 1).astype(int)
            cell = (((labels == k) * K + k) * steps + bins)[keep]
            counts[prior] = counts[prior] + np.bincount(cell, minlength=2 * K * steps).reshape(2, K, steps)  # wrong, right
    deltas = {}
    for prior, table in counts.items():
        wrong, right = table[:, :, ::-1].cumsum(2)[:, :, ::-1]                 # drawn where v is in this bin or above
        iou = right / np.maximum(wrong + pixels[:, None], 1)                   # (K, steps)
        delta = (images[:, None] * iou + shrink * iou[1:].mean(0)).argmax(1) / steps
        deltas[prior] = [0.0, *delta[1:].tolist()]
    return deltas


def print_ladder(report):
    """One column a rung; for VOC's classes the paper's val mean below ours."""
    rows, classes = report["rows"], report["classes"]
    width = max(12, *map(len, classes))

    def line(name, values):
        print(f"{name:{width}} " + " ".join(f"{'-' if v is None else f'{v:.1f}':>{max(10, len(row))}}"
                                            for row, v in zip(rows, values)))
    print(f"{'':{width}} " + " ".join(f"{row:>10}" for row in rows))
    for name in classes:
        line(name, [r["iou"][name] for r in rows.values()])
    line("mean IoU", [r["mean_iou_defined"] for r in rows.values()])
    if any(r["mean_iou"] is None for r in rows.values()):
        print("(a column's mean is over the classes that it or the masks hold: do not compare columns)")
    if classes == data.VOC_CLASSES:
        line("paper, val", [np.mean(PAPER[row]) if row in PAPER else None for row in rows])
    if report.get("mean_average_precision") is not None:
        print(f"tags: mean average precision {report['mean_average_precision']:.1f}")


def plot(series, rows=None):
    """A chart as a PIL image: {name: [(x, y), ...]}, all >= 0, as lines, or as dots on named rows (y is a row's index)."""
    colours = ["#4c78a8", "#9e9e9e", "#54a24b", "#eeca3b", "#b279a2", "#e45756", "#000000"]
    left, top, width, height = 300 if rows else 130, 70, 1180, 44 * len(rows or [0] * 10)           # at twice the size: smooth
    sheet, face = Image.new("RGB", (left + width + 120, top + height + 60), "white"), ImageFont.load_default(30)
    draw, (x_high, y_high) = ImageDraw.Draw(sheet), np.max([point for line in series.values() for point in line], 0) * 1.02 + 1e-9

    def at(x, y):
        return left + width * x / x_high, top + (44 * (y + 0.5) if rows else height * (1 - y / y_high))

    def ticks(high):
        step = next(10.0 ** e * m for e in range(-9, 40) for m in (1, 2, 5) if 10.0 ** e * m * 6 >= high)
        return np.arange(0, high, step)
    for x in ticks(x_high):
        draw.line([(at(x, 0)[0], top), (at(x, 0)[0], top + height)], "#e0e0e0", 2)
        draw.text((at(x, 0)[0], top + height + 8), f"{x:g}", "black", face, anchor="ma")
    for y, name in enumerate(rows) if rows else [(y, f"{y:g}") for y in ticks(y_high)]:
        draw.line([at(0, y), at(x_high, y)], "#e0e0e0", 2)
        draw.text((left - 14, at(0, y)[1]), name, "black", face, anchor="rm")
    x = left
    for colour, (name, line) in zip(colours * len(series), series.items()):
        points = [at(*point) for point in line]
        if not rows:
            draw.line(points, colour, 5, "curve")
        for px, py in [*(points if rows or len(points) == 1 else []), (x, 34)]:                    # the last one: legend
            draw.ellipse((px - 10, py - 10, px + 10, py + 10), colour, "white", 2)
        draw.text((x + 20, 34), name, "black", face, anchor="lm")
        x += 70 + draw.textlength(name, face)
    return sheet.resize((sheet.width // 2, sheet.height // 2), Image.LANCZOS)


def draw_ladder(path, report):
    """Write every class's IoU on every rung as a picture, for VOC with the paper's best row."""
    rungs = {row: [r["mean_iou_defined"], *r["iou"].values()] for row, r in report["rows"].items() if "ilp " not in row}
    if report["classes"] == data.VOC_CLASSES:
        rungs["paper, +seg"] = [np.mean(PAPER["ilp+seg"]), *PAPER["ilp+seg"]]
    dots = {row: [(v, y) for y, v in enumerate(values) if v is not None] for row, values in rungs.items()}
    picture = plot(dots, ["mean IoU, %", *report["classes"]])
    data.write_atomically(path, lambda file: picture.save(file, "png"))


def print_runs(reports, settings):
    """One line for runs that differ only in their seed: mean and range of each rung's mean IoU, and of the tags' mAP.

    reports, settings: {checkpoint: report of `ladder`}, {checkpoint: settings of its run}.
    """
    every, groups = list(settings.values()), {}
    differ = [k for k in every[0] if k not in ("seed", "out", "cache", "weights") and any(s.get(k) != every[0][k] for s in every)]
    for path, report in reports.items():
        values = [*(r["mean_iou_defined"] for r in report["rows"].values()), report.get("mean_average_precision") or math.nan]
        groups.setdefault(", ".join(f"{k} {settings[path].get(k)}" for k in differ) or "all", []).append(values)
    width = max(map(len, groups))
    print(f"{'':{width}} {'runs':>4} " + " ".join(f"{row:>18}" for row in [*next(iter(reports.values()))["rows"], "tags, mAP"]))
    for name, rows in groups.items():
        cells = (f"{np.mean(v):.1f} ({min(v):.1f} to {max(v):.1f})" for v in zip(*rows))
        print(f"{name:{width}} {len(rows):4} " + " ".join(f"{cell:>18}" for cell in cells))


def voc_samples(voc, name, limit=0):
    """[(id, photograph's path, truth's path)] of a VOC set, or of `limit` images spread over it."""
    ids = data.voc_ids(voc, name)
    if limit < 0:
        raise InputError(f"--limit {limit}: expected 0 or more")
    ids = [ids[i] for i in data.spread(len(ids), limit)] if limit else ids
    samples = [(i, Path(voc, "JPEGImages", f"{i}.jpg"), Path(voc, "SegmentationClass", f"{i}.png")) for i in ids]
    gone = next((path for sample in samples for path in sample[1:] if not path.is_file()), None)
    if gone:
        raise InputError(f"{gone}: no such file; --set {name} needs all its photographs and masks")
    return samples


def loaded(samples):
    """Yield (id, image, truth) of `voc_samples`; raises InputError where the two have not the same size."""
    for i, photo, mask in data.progress(samples, "images"):
        image, truth = data.load_image(photo), data.read_labels(mask)
        if truth.shape != image.shape[:2]:
            raise InputError(f"{mask}: {truth.shape} pixels, but its photograph has {image.shape[:2]}; expected the same")
        yield i, image, truth


# ---------------------------------------------------------------- commands

def read_classes(path):
    """Class names, background first: VOC's, those of a checkpoint (.pt), or one a line of a text file."""
    if not path:
        return data.VOC_CLASSES
    expected = f"2 to {VOID} different class names, one a line, background first"
    names = (infer.read_checkpoint(path)["classes"] if path.endswith(".pt") else
             [" ".join(row) for row in data.read_rows(path, expected)])
    if not 2 <= len(set(names)) == len(names) <= VOID:
        raise InputError(f"{path}: {len(names)} class names, {len(set(names))} of them different; expected {expected}")
    return names


def write_json(path, report):
    if path:
        data.write_atomically(path, lambda file: file.write(json.dumps(report, indent=1).encode()))


def run_score(args):
    classes, start = read_classes(args.classes), time.perf_counter()
    matrices = score(args.folder, args.voc, args.set, classes)
    report = summarise(sum(matrices), classes, len(matrices))
    print_score(report, sum(matrices), classes)
    print(f"{len(matrices) / (time.perf_counter() - start):.0f} images/s")
    if args.variants:
        report["variants"] = variants(matrices, score(args.folder, args.voc, args.set, classes, void=0))
        print("\nvariants: NOT VOC's measure, for comparison with papers that used them")
        for name, value in report["variants"].items():
            print(f"{value:7.2f}  {name}")
    write_json(args.json, report)


def run_ladder(args):
    samples, tags = voc_samples(args.voc, args.set, args.limit), data.voc_tags(args.voc, args.set)
    reports, settings, start = {}, {}, time.perf_counter()
    for path in args.checkpoint:
        net, ckpt = infer.load_net(path, args.weights, args.device, args.dense, args.sides)
        known = tags if net.classes == data.VOC_CLASSES and all(i in tags for i, _, _ in samples) else None
        if net.classes != data.VOC_CLASSES:
            print("indices of the masks are read as:", ", ".join(net.classes))
        delta, oracle = ckpt["thresholds"], args.oracle_thresholds
        if oracle:
            scenes = ((infer.Scene(image, None, args.bing, args.mcg, i), mask)
                      for i, image, mask in loaded(voc_samples(args.voc, oracle)))
            delta = fit_thresholds(net, scenes, shrink=1e-9)
        report = ladder(net, loaded(samples), delta, args.bing, args.mcg, known, args.ilp_form, args.priors,
                        infer.ILP_FORMS if args.forms else ())
        if oracle:
            report["oracle"] = f"thresholds of bb and seg fitted on the true masks of {oracle}: an upper bound, not a result"
            print(f"ORACLE: {report['oracle']}")
            report["rows"] = {row + "*oracle" * row.endswith(("bb", "seg")): r for row, r in report["rows"].items()}
        reports[path], settings[path] = report, ckpt["settings"]
        print_ladder(report)
        if args.panel:
            infer.save_panel(args.panel, net, loaded(samples[:20]))
    print(f"{len(samples) * len(reports) / (time.perf_counter() - start):.2f} images/s, "
          f"most memory {memory(args.device):.2f} GB")
    if len(reports) > 1:
        print_runs(reports, settings)
    write_json(args.json, dict(report, checkpoints=reports) if len(reports) > 1 else report)
    draw_ladder(args.chart or Path(args.json or "out/ladder").with_suffix(".png"), report)


def run_proposals(args):
    """What the priors could reach at best: superpixels that take their most frequent TRUE label; the best box of each object."""
    matrix, whole, regions = 0, [], []                             # of objects: (area in pixels, best IoU with a proposed box)
    for name, image, truth in loaded(voc_samples(args.voc, args.set, args.limit)):
        scene = infer.Scene(image)
        boxes = infer.bing(image, args.bing)[0] if args.bing else infer.boxes_of(scene.segments[0], scene.regions)
        best = infer.vote(np.where(truth == VOID, 0, truth), scene.regions)
        with data.reading(name, "a mask of VOC's classes"):
            matrix = matrix + confusion(truth, best.astype(np.uint8), len(data.VOC_CLASSES))
        for k in set(np.unique(truth)) - {0, VOID}:
            for objects, parts in ((whole, (truth == k).astype(int)), (regions, ndimage.label(truth == k)[0])):
                for area, (y, x) in zip(np.bincount(parts.ravel())[1:], ndimage.find_objects(parts)):
                    low, high = np.maximum(boxes[:, :2], (x.start, y.start)), np.minimum(boxes[:, 2:], (x.stop, y.stop))
                    both, one = np.prod(np.maximum(high - low, 0), 1), (x.stop - x.start) * (y.stop - y.start)
                    objects.append((area, (both / (np.prod(boxes[:, 2:] - boxes[:, :2], 1) + one - both)).max(initial=0)))
    print(f"superpixels with their most frequent true label: {100 * np.trace(matrix) / matrix.sum():.1f} % of the pixels, "
          f"mean IoU {np.nanmean(measures(matrix)[0]):.1f}")
    for what, objects in (("all of a class in an image", whole), ("connected regions of a class", regions)):
        for least in (100, 400, 1000, 4000):
            best = np.array([iou for area, iou in objects if area >= least])
            print(f"{what}, {least} pixels or more: {100 * (best >= 0.5).sum() / max(1, len(best)):.1f} % of {len(best)} "
                  "have a box of IoU 0.5")


def run_submit(args):
    """Check every label file of a test set (id, size, palette, range) and pack them for the evaluation server."""
    def check(i):
        path = Path(args.folder, f"{i}.png")
        labels = data.read_labels(path)
        with data.reading(path, "palette PNGs of the photographs' sizes, as infer.py writes them"):
            with Image.open(path) as image, Image.open(Path(args.voc, "JPEGImages", f"{i}.jpg")) as photo:
                if image.mode != "P" or image.size != photo.size or labels.max() >= len(data.VOC_CLASSES):
                    raise ValueError(f"mode {image.mode}, size {image.size} where the photograph has {photo.size}, "
                                     f"highest index {labels.max()} of 20")
    ids = data.voc_ids(args.voc, args.set)
    attempt(check, ids)

    def pack(file):
        with tarfile.open(fileobj=file, mode="w:gz", dereference=True) as tar:
            for i in ids:
                tar.add(Path(args.folder, f"{i}.png"), f"results/VOC2012/Segmentation/comp6_{args.set}_cls/{i}.png")
    data.write_atomically(args.out, pack)
    print(f"{args.out}: {len(ids)} label maps; upload as comp6")


def main():
    parser = data.Parser(description=__doc__)
    commands = parser.add_subparsers(required=True)

    def command(run, text, set="val"):
        sub = commands.add_parser(run.__name__[4:], help=text, description=text)
        sub.set_defaults(run=run)
        sub.add_argument("--voc", required=True, metavar="DIR", help="the devkit's VOC2012 folder")
        sub.add_argument("--set", default=set, help="its set [%(default)s]")
        return sub
    add = command(run_score, "IoU of a folder of label PNGs").add_argument
    add("folder", help="<image id>.png of every image, as infer.py writes them")
    add("--json", metavar="FILE", help="also write the numbers here")
    add("--classes", metavar="FILE", help="class names, one a line, or a checkpoint [VOC's]")
    add("--variants", action="store_true", help="also the means that others report, not VOC's")

    sub = command(run_ladder, "every prior, from a checkpoint")
    add = sub.add_argument
    add("checkpoint", nargs="+", help="ckpt.pt or head.pt of train.py; several: also a table over seeds, pictures of the last")
    add("--json", metavar="FILE", help="also write the numbers here")
    add("--chart", metavar="FILE", help="where to draw every class's IoU [the JSON's name with .png; without it, out/ladder.png]")
    add("--limit", type=int, default=0, metavar="N", help="score N images spread over the set [all]")
    add("--forms", action="store_true", help="also a row for every form of Eq. 7")
    add("--priors", nargs="+", choices=list(infer.PRIORS), default=list(infer.PRIORS), help="which rungs [all]")
    add("--sides", type=infer.numbers, metavar="N,N", help="images are brought to side*side pixels, e.g. 288,432")
    add("--oracle-thresholds", metavar="SET", help="fit delta on the TRUE MASKS of this set: no result")
    infer.add_options(sub)

    add = command(run_submit, "pack label PNGs for the evaluation server", "test").add_argument
    add("folder", help="<image id>.png of every image, as infer.py writes them")
    add("--out", required=True, metavar="FILE.tgz")

    add = command(run_proposals, "what superpixels and boxes could reach at best, from the TRUE MASKS").add_argument
    add("--limit", type=int, default=0, metavar="N", help="use N images spread over the set [all]")
    add("--bing", metavar="DIR", help="BING's model [boxes around our own segments]")
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    data.run_cli(main)
