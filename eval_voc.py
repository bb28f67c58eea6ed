"""Score label maps by VOC's rules to the letter, print the ladder of priors, pack a submission.

    python eval_voc.py score  PRED_DIR --voc VOC2012 --set val    # IoU per class and their mean
    python eval_voc.py ladder CKPT     --voc VOC2012 --set val    # base, +ILP, +ILP+sppxl, ...
    python eval_voc.py submit PRED_DIR --voc VOC2012 --set test --out results.tgz

One 21 x 21 histogram over the whole set, void left out, the mean over all 21 classes: VOCevalseg.m.
Letters in shape comments: K classes, H W pixels. A matrix has a row per true class, a column per
predicted one.
"""

import functools
import math
import tarfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

import data
import infer
import model
from data import VOID, InputError

# IoU per class on VOC 2012 val in the paper's Table 4, in devkit order.
# fmt: off
PAPER = {
    "base": [37.0, 10.4, 12.4, 10.8, 5.3, 5.7, 25.2, 21.1, 25.15, 4.8, 21.5,
             8.6, 29.1, 25.1, 23.6, 25.5, 12.0, 28.4, 8.9, 22.0, 11.6],
    "ilp": [73.2, 25.4, 18.2, 22.7, 21.5, 28.6, 39.5, 44.7, 46.6, 11.9, 40.4,
            11.8, 45.6, 40.1, 35.5, 35.2, 20.8, 41.7, 17.0, 34.7, 30.4],
    "ilp+sppxl": [77.2, 37.3, 18.4, 25.4, 28.2, 31.9, 41.6, 48.1, 50.7, 12.7, 45.7,
                  14.6, 50.9, 44.1, 39.2, 37.9, 28.3, 44.0, 19.6, 37.6, 35.0],
    "ilp+bb": [78.6, 46.9, 18.6, 27.9, 30.7, 38.4, 44.0, 49.6, 49.8, 11.6, 44.7,
               14.6, 50.4, 44.7, 40.8, 38.5, 26.0, 45.0, 20.5, 36.9, 34.8],
    "ilp+seg": [79.6, 50.2, 21.6, 40.6, 34.9, 40.5, 45.9, 51.5, 60.6, 12.6, 51.2,
                11.6, 56.8, 52.9, 44.8, 42.7, 31.2, 55.4, 21.5, 38.8, 36.9],
}
# fmt: on


# ---------------------------------------------------------------- the measure
def confusion(truth, prediction, classes):
    """Joint histogram of one image, (K, K) int64; pixels whose truth is 255 (void) are left out.

    truth, prediction: (H, W) uint8. Raises ValueError where the sizes differ or an index is no
    class; a predicted index that is too large is an error even under void, as in the devkit.
    """
    if truth.shape != prediction.shape:
        sizes = f"{prediction.shape[::-1]} pixels, but the truth has {truth.shape[::-1]}"
        raise ValueError(f"{sizes}; nothing is resized")
    if prediction.max() >= classes:
        found = f"holds index {prediction.max()}"
        raise ValueError(f"{found}; every pixel must be 0..{classes - 1}, 255 is not allowed")
    labelled = truth != VOID
    true, predicted = truth[labelled].astype(np.int64), prediction[labelled]
    if true.max(initial=0) >= classes:
        raise ValueError(f"its truth holds index {true.max()}, beyond the {classes} classes")
    counts = np.bincount(true * classes + predicted, minlength=classes * classes)
    return counts.reshape(classes, classes)


def measures(matrix):
    """Per-class IoU, precision and recall, percent, from a confusion (K, K); 0/0 is NaN."""
    hit, true, predicted = np.diag(matrix), matrix.sum(1), matrix.sum(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return 100 * hit / (true + predicted - hit), 100 * hit / predicted, 100 * hit / true


def with_void(matrix, classes):
    """What to say of training labels, whose confusion (K + 1, K + 1) counts their void as class K.

    Percent: the share of pixels that have a label, and the mean IoU where void counts as wrong.
    """
    K = len(classes)
    true, predicted, hit = matrix[:K].sum(1), matrix[:K, :K].sum(0), np.diag(matrix)[:K]
    iou = hit / np.maximum(true + predicted - hit, 1)
    coverage = 100 * matrix[:K, :K].sum() / matrix[:K].sum()
    return {"coverage": float(coverage), "mean_iou_void_wrong": float(100 * iou[true > 0].mean())}


def mean_defined(values):
    """Mean of the values that are not None; None where there are none."""
    known = [v for v in values if v is not None]
    return float(np.mean(known)) if known else None


def summarise(matrix, classes, images):
    """A confusion (K, K) as JSON-ready percentages; mean_iou is VOC's: None if one is undefined.

    mean_iou_defined: over the classes_defined classes that occur; mean_accuracy: mean recall, as in
    Table 2. Raises InputError where the truth holds no object.
    """
    if not matrix[1:].any():
        why = "no true mask holds an object pixel; expected class indices, 255 is void"
        raise InputError(f"{images} images: {why}")
    report = {"images": images}
    for what, values in zip(("iou", "precision", "recall"), measures(matrix)):
        defined = [None if math.isnan(v) else float(v) for v in values]
        report[what] = dict(zip(classes, defined))
    ious = list(report["iou"].values())
    report["mean_iou_defined"] = mean_defined(ious)
    report["mean_iou"] = None if None in ious else report["mean_iou_defined"]
    report["classes_defined"] = len(classes) - ious.count(None)
    report["mean_accuracy"] = mean_defined(report["recall"].values())
    return report


def average_precision(scores, present):
    """Area under the monotone precision-recall curve (VOC from 2010), %. scores, present (N,)."""
    hits = present[np.argsort(-scores, kind="stable")]
    if not hits.any():
        return None
    precision = hits.cumsum() / np.arange(1, len(hits) + 1)
    best = np.maximum.accumulate(precision[::-1])[::-1]  # at this recall or a larger one
    return 100 * float(best[hits].mean())


# ---------------------------------------------------------------- the ladder
def ladder(net, samples, options, priors=None, workers=0):
    """Score every rung in one pass over (name, image (H, W, 3), truth (H, W)) samples.

    options: of infer.Scene and Eq. 7, a dict; priors: names, by default all; workers: as for
    infer.overlapped. Returns a JSON-ready dict and {name: q (K,)}.
    """
    matrices, scores = {}, {}
    names = list(infer.PRIORS) if priors is None else priors

    def network(sample):
        return *sample, *infer.predict(net, sample[1])

    rungs = functools.partial(rung_counts, options, names)
    for name, q, counts in infer.overlapped(network, rungs, samples, workers):
        scores[name] = q
        for row, matrix in counts.items():
            matrices[row] = matrices.get(row, 0) + matrix
    rows = {row: summarise(m, net.classes, len(scores)) for row, m in matrices.items()}
    return {"rows": rows, "classes": net.classes}, scores


def rung_counts(options, priors, predicted):
    """(name, q (K,), {rung: confusion (K, K)}) of one image; options and priors as for ladder."""
    name, image, truth, p, q = predicted
    scene = infer.Scene(image, options["thresholds"], options["boxes"], options["mcg"], name)
    weighed = infer.ilp(p, q, options["ilp_form"])
    labels = {"base": p.argmax(0)}
    for prior in priors:
        labels["ilp" if prior == "none" else f"ilp+{prior}"] = infer.PRIORS[prior](weighed, scene)
    with data.reading(name, "a mask of the photograph's size and of the checkpoint's classes"):
        return name, q, {row: confusion(truth, x, len(p)) for row, x in labels.items()}


def print_ladder(report):
    """One column a rung; for VOC's classes the paper's val mean below ours."""
    rows, classes = report["rows"], report["classes"]
    lines = {"": rows}
    for name in classes:
        lines[name] = [r["iou"][name] for r in rows.values()]
    lines["mean IoU"] = [r["mean_iou_defined"] for r in rows.values()]
    if classes == data.VOC_CLASSES:
        lines["paper, val"] = [np.mean(PAPER[row]) if row in PAPER else None for row in rows]
    width = max(map(len, lines))
    for name, values in lines.items():
        words = [v if isinstance(v, str) else "-" if v is None else f"{v:.1f}" for v in values]
        print(f"{name:{width}} {' '.join(f'{word:>11}' for word in words)}")
    if any(r["mean_iou"] is None for r in rows.values()):
        print(
            "(means are over the classes that a column or the masks hold: do not compare columns)"
        )
    if "mean_average_precision" in report:
        print(f"tags: mean average precision {report['mean_average_precision']:.1f}")


def draw_ladder(path, report):
    """Every class's IoU on every rung as a chart."""
    names, lines = ["mean IoU", *report["classes"]][::-1], {}
    for row, r in report["rows"].items():
        values = [r["mean_iou_defined"], *r["iou"].values()][::-1]
        lines[row] = [math.nan if v is None else v for v in values], names
    infer.save_chart(path, lines, "IoU, %", "o", (9, 0.3 * len(names) + 1))


def voc_samples(voc, name, limit=0):
    """Yield (id, image, truth) of a VOC set, or of `limit` images spread over it.

    Raises InputError where a file is missing, at once, or where sizes differ.
    """
    ids = data.voc_ids(voc, name)
    if limit:
        ids = [ids[i] for i in data.spread(len(ids), limit)]
    photos = [Path(voc, "JPEGImages", f"{i}.jpg") for i in ids]
    masks = [Path(voc, "SegmentationClass", f"{i}.png") for i in ids]
    for path in photos + masks:
        if not path.is_file():
            raise InputError(f"{path}: no such file; --set {name} needs its photographs and masks")
    for i, photo, mask in zip(data.progress(ids, "images"), photos, masks):
        image, truth = data.load_image(photo), data.read_labels(mask)
        if truth.shape != image.shape[:2]:
            sizes = f"{truth.shape[::-1]} pixels, its photograph {image.shape[1::-1]}"
            raise InputError(f"{mask}: {sizes}; expected the same")
        yield i, image, truth


# ---------------------------------------------------------------- commands
def attempt(function, items):
    """[function(item) for item in items]; raises all that is wrong with them as one InputError."""
    results, wrong = [], []
    for item in data.progress(items, "checked"):
        try:
            results.append(function(item))
        except (InputError, OSError) as e:
            wrong.append(data.one_line(e))
    if wrong:
        shown = "; ".join(wrong[:20]) + " ..." * (len(wrong) > 20)
        raise InputError(f"{len(wrong)} of {len(items)} cannot be used: {shown}")
    return results


def run_score(args):
    """Compare a folder of label PNGs with a set's true masks."""
    classes, start = data.VOC_CLASSES, time.perf_counter()
    if args.classes:
        with data.reading(args.classes, "a checkpoint of train.py"):
            classes = model.read_checkpoint(args.classes)["classes"]

    K = len(classes)

    def compare(i):
        path, mask = Path(args.folder, f"{i}.png"), Path(args.voc, "SegmentationClass", f"{i}.png")
        truth, labels = data.read_labels(mask), data.read_labels(path)
        with data.reading(path, "labels as infer.py writes them"):
            if args.void_allowed:
                return confusion(truth, np.where(labels == VOID, K, labels), K + 1)
            return confusion(truth, labels, K)

    matrices = attempt(compare, data.voc_ids(args.voc, args.set))
    total = sum(matrices)
    report = summarise(total[:K, :K], classes, len(matrices))
    if args.void_allowed:
        void = with_void(total, classes)
        report.update(void, what="training labels, known tags: not VOC's measure")
        print(report["what"])
        print(f"{void['coverage']:.1f} % of the pixels have a label, to which the table belongs; "
              f"mean IoU with void as wrong {void['mean_iou_void_wrong']:.2f}")  # fmt: skip
    width = max(map(len, classes))
    print(f"{'':{width}} {'IoU':>7} {'precision':>10} {'recall':>7}")
    for name, iou, precision, recall in zip(classes, *measures(total[:K, :K])):
        print(f"{name:{width}} {iou:7.2f} {precision:10.2f} {recall:7.2f}")
    mean = math.nan if report["mean_iou"] is None else report["mean_iou"]
    whose = "where labelled" if args.void_allowed else "VOC"
    print(f"mean IoU ({whose}) {mean:.2f}   mean class accuracy {report['mean_accuracy']:.2f}")
    if report["mean_iou"] is None:
        occur = f"{report['classes_defined']} of {len(classes)} classes that occur"
        print(f"mean IoU over the {occur} {report['mean_iou_defined']:.2f}   (not VOC's)")
    speed = len(matrices) / (time.perf_counter() - start)
    print(f"{len(matrices)} images, {speed:.0f} images/s")
    if args.json:
        data.write_json(args.json, report)


def run_ladder(args):
    """Score every prior, from a checkpoint."""
    samples = voc_samples(args.voc, args.set, args.limit)
    net, thresholds = infer.open_net(args.checkpoint, args, args.priors)
    if net.classes != data.VOC_CLASSES:
        print("indices of the masks are read as:", ", ".join(net.classes))
    start = time.perf_counter()
    options = {**vars(args), "thresholds": thresholds}
    report, scores = ladder(net, samples, options, args.priors, args.workers)
    tags = data.voc_tags(args.voc, args.set)  # {id: (present, only difficult)}
    if net.classes == data.VOC_CLASSES and scores.keys() <= tags.keys():
        values = report["average_precision"] = {}
        for k, label in enumerate(net.classes[1:], 1):
            known = [i for i in scores if k not in tags[i][1]]
            present = np.array([k in tags[i][0] for i in known])
            values[label] = average_precision(np.array([scores[i][k] for i in known]), present)
        report["mean_average_precision"] = mean_defined(values.values())
    print_ladder(report)
    print(f"{len(scores)} images, {len(scores) / (time.perf_counter() - start):.2f} images/s")
    if args.json:
        data.write_json(args.json, report)
        draw_ladder(Path(args.json).with_suffix(".png"), report)


def run_submit(args):
    """Check every label file of a test set (id, size, palette, range) and pack them."""
    files = {i: Path(args.folder, f"{i}.png") for i in data.voc_ids(args.voc, args.set)}

    def check(i):
        labels, photo = data.read_labels(files[i]), Path(args.voc, "JPEGImages", f"{i}.jpg")
        with data.reading(files[i], "a palette PNG of the photograph's size, of classes 0..20"):
            with Image.open(files[i]) as image, Image.open(photo) as picture:
                mode, size, wanted = image.mode, image.size, picture.size
            if mode != "P" or size != wanted or labels.max() >= len(data.VOC_CLASSES):
                raise ValueError(f"mode {mode}, {size} pixels for {wanted}, up to {labels.max()}")

    def pack(file):
        with tarfile.open(fileobj=file, mode="w:gz", dereference=True) as tar:
            for i, path in files.items():
                tar.add(path, f"results/VOC2012/Segmentation/comp6_{args.set}_cls/{i}.png")

    attempt(check, files)
    data.write_atomically(args.out, pack)
    print(f"{args.out}: {len(files)} label maps; upload as comp6")


def main():
    parser = data.Parser(description=__doc__)
    commands = parser.add_subparsers(required=True)
    parsers = []
    for run, default in ((run_score, "val"), (run_ladder, "val"), (run_submit, "test")):
        sub = commands.add_parser(run.__name__[4:], help=run.__doc__, description=run.__doc__)
        sub.set_defaults(run=run, json=None, limit=0)
        sub.add_argument("--voc", required=True, metavar="DIR", help="the devkit's VOC2012 folder")
        sub.add_argument("--set", default=default, metavar="NAME", help=f"its set [{default}]")
        parsers.append(sub)
    score, rungs, submit = parsers
    score.add_argument("folder", help="<image id>.png of every image, as infer.py writes them")
    score.add_argument("--json", metavar="FILE", help="also write the numbers here")
    score.add_argument("--classes", metavar="CKPT", help="whose classes these are [VOC's]")
    text = "score training labels: 255 is no label"
    score.add_argument("--void-allowed", action="store_true", help=text)
    rungs.add_argument("checkpoint", help="ckpt.pt or head.pt of train.py")
    rungs.add_argument("--json", metavar="FILE", help="also write the numbers, a chart beside them")
    rungs.add_argument("--limit", type=int, metavar="N", help="use N images, spread over the set")
    every = list(infer.PRIORS)
    rungs.add_argument("--priors", nargs="+", choices=every, default=every, help="rungs [all]")
    infer.add_options(rungs)
    submit.add_argument("folder", help="<image id>.png of every image, as infer.py writes them")
    submit.add_argument("--out", required=True, metavar="FILE.tgz")
    args = parser.parse_args()
    if args.limit < 0 or args.json and args.json.endswith(".png"):
        parser.error("--limit takes 0 or more, and --json a name that does not end in .png")
    args.run(args)


if __name__ == "__main__":
    data.run_cli(main)
