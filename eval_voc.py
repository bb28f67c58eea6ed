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

# Mean IoU on VOC 2012 val, the paper's Table 4.
PAPER = {"base": 17.8, "ilp": 32.6, "ilp+sppxl": 36.6, "ilp+bb": 37.8, "ilp+seg": 42.0}


# ---------------------------------------------------------------- the measure
def confusion(truth, prediction, K):
    """Joint histogram of one image, (K, K) int64; pixels whose truth is 255 (void) are left out.

    truth, prediction: (H, W) uint8. Raises ValueError where the sizes differ or an index is no
    class, even one predicted under void, as in the devkit."""
    if truth.shape != prediction.shape:
        sizes = f"{prediction.shape[::-1]} pixels, but the truth has {truth.shape[::-1]}"
        raise ValueError(f"{sizes}; nothing is resized")
    labelled = truth != VOID
    true, predicted = truth[labelled].astype(np.int64), prediction[labelled]
    highest = max(prediction.max(), true.max(initial=0))
    if highest >= K:
        wanted = f"expected 0..{K - 1}, 255 is not allowed"
        raise ValueError(f"it or its truth holds index {highest}; {wanted}")
    return np.bincount(true * K + predicted, minlength=K * K).reshape(K, K)


def measures(matrix):
    """Per-class IoU, precision and recall, percent, from a confusion (K, K); 0/0 is NaN."""
    hit, true, predicted = np.diag(matrix), matrix.sum(1), matrix.sum(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return 100 * hit / (true + predicted - hit), 100 * hit / predicted, 100 * hit / true


def summarise(matrix, classes, images):
    """A confusion (K, K) as JSON-ready percentages; mean_iou is VOC's: None if one is undefined.

    mean_iou_defined: over the classes that occur; mean_accuracy: mean recall, as in Table 2.
    matrix may have a column K, of pixels without a label. Raises InputError where no true mask has
    an object."""
    if not matrix[1:].any():
        raise InputError(f"{images} true masks hold no object; expected class indices, not 255")
    report = {"images": images}
    iou, precision, recall = measures(matrix[:, : len(classes)])
    for what, values in (("iou", iou), ("precision", precision), ("recall", recall)):
        defined = [None if math.isnan(v) else float(v) for v in values]
        report[what] = dict(zip(classes, defined))
    report["mean_iou_defined"] = float(np.nanmean(iou))
    report["mean_iou"] = None if np.isnan(iou).any() else report["mean_iou_defined"]
    report["classes_defined"] = int(np.isfinite(iou).sum())
    report["mean_accuracy"] = float(np.nanmean(recall))
    return report


def say_absent(report):
    """Print the classes of which no true mask has a pixel: others may be in their place."""
    absent = [name for name, recall in report["recall"].items() if recall is None]
    if absent:
        print(f"no true pixel of {', '.join(absent)}")


def average_precision(scores, present):
    """Area under the monotone precision-recall curve (VOC from 2010), %. scores, present (N,)."""
    hits = present[np.argsort(-scores, kind="stable")]
    if not hits.any():
        return None
    precision = hits.cumsum() / np.arange(1, len(hits) + 1)
    best = np.maximum.accumulate(precision[::-1])[::-1]  # at this recall or a larger one
    return 100 * float(best[hits].mean())


# ---------------------------------------------------------------- the ladder
def ladder(net, samples, scene_of, ilp_form, priors, workers=0):
    """Score every rung in one pass over (name, image (H, W, 3), truth (H, W)) samples.

    scene_of(image, name=...): an infer.Scene; ilp_form: of Eq. 7; priors: names. Returns a
    JSON-ready dict and {name: q (K,)}."""
    matrices, scores = {}, {}
    count = functools.partial(rung_counts, scene_of, ilp_form, priors)

    def predictions():
        for name, image, truth in samples:
            yield name, image, truth, *infer.predict(net, data.shrink(image))

    for name, q, counts in infer.overlapped(count, predictions(), workers):
        scores[name] = q
        for rung, matrix in counts.items():
            matrices[rung] = matrices.get(rung, 0) + matrix
    rungs = {}
    for rung, matrix in matrices.items():
        rungs[rung] = summarise(matrix, net.classes, len(scores))
    return {"rows": rungs, "classes": net.classes}, scores


def rung_counts(scene_of, ilp_form, priors, predicted):
    """(name, q (K,), {rung: confusion (K, K)}) of one image; the rest as for ladder.

    predicted: name, photo (H', W', 3), truth (H', W'), p (K, H, W) and q."""
    name, photo, truth, p, q = predicted
    scene = scene_of(photo, name=name)
    weighed = infer.ilp(p, q, ilp_form)
    labels = {"base": p.argmax(0)}
    for prior in priors:
        rung = "ilp" if prior == "none" else f"ilp+{prior}"
        labels[rung] = infer.PRIORS[prior](weighed, scene)
    counts = {}
    expected = "a mask of the photograph's size, of the checkpoint's classes"
    with data.reading(f"{name}.png", expected):
        for rung, prediction in labels.items():
            whole = infer.enlarged(prediction.astype(np.uint8), photo.shape[:2])
            counts[rung] = confusion(truth, whole, len(p))
    return name, q, counts


def score_tags(report, scores, tags):
    """Add each class's average precision to the report, and their mean, by data.voc_tags.

    scores: {id: q (K,)}; an image in which a class is only difficult does not count for it."""
    tagged = [i for i in scores if i in tags]
    values = {}
    for k in range(1, len(data.VOC_CLASSES)):
        known = [i for i in tagged if k not in tags[i][1]]
        present = np.array([k in tags[i][0] for i in known], bool)
        image_scores = np.array([scores[i][k] for i in known])
        values[data.VOC_CLASSES[k]] = average_precision(image_scores, present)
    defined = [value for value in values.values() if value is not None]
    if defined:
        report["average_precision"] = values
        report["mean_average_precision"] = float(np.mean(defined))
        report["images_with_tags"] = len(tagged)


def print_ladder(report):
    """One column a rung; for VOC's classes the paper's val mean below ours."""
    rungs, classes = report["rows"], report["classes"]
    table = {}  # line: a value for each rung
    for name in classes:
        table[name] = [scores["iou"][name] for scores in rungs.values()]
    table["mean IoU"] = [scores["mean_iou_defined"] for scores in rungs.values()]
    if classes == data.VOC_CLASSES:
        table["paper, val"] = [PAPER.get(rung) for rung in rungs]
    width = max(map(len, table))
    print(" " * width, " ".join(f"{rung:>11}" for rung in rungs))
    for name, values in table.items():
        words = ["-" if value is None else f"{value:.1f}" for value in values]
        print(f"{name:{width}}", " ".join(f"{word:>11}" for word in words))
    if any(scores["mean_iou"] is None for scores in rungs.values()):
        print("(means are over the classes that a column or its masks hold: do not compare them)")
    say_absent(rungs["base"])
    if "mean_average_precision" in report:
        what = f"of the {report['images_with_tags']} images whose tags are listed"
        print(f"tags: mean average precision {report['mean_average_precision']:.1f}, {what}")


def draw_ladder(path, report):
    """Every class's IoU on every rung as a chart."""
    names, lines = ["mean IoU"] + report["classes"], {}
    names.reverse()  # a chart's first one is at its bottom
    for rung, scores in report["rows"].items():
        values = [scores["mean_iou_defined"]] + list(scores["iou"].values())
        values.reverse()
        lines[rung] = np.array(values, float), names  # None becomes NaN
    infer.save_chart(path, lines, "IoU, %", "o", (9, 0.3 * len(names) + 1))


def voc_samples(voc, name, limit=0):
    """Yield (id, image, truth) of a VOC set, or of `limit` images spread over it."""
    ids = data.voc_ids(voc, name)
    ids = [ids[i] for i in data.spread(len(ids), limit or len(ids))]
    photos = [Path(voc, "JPEGImages", f"{i}.jpg") for i in ids]
    masks = [Path(voc, "SegmentationClass", f"{i}.png") for i in ids]
    for path in photos + masks:  # before the work
        if not path.is_file():
            raise InputError(f"{path}: no such file; --set {name} needs its photographs and masks")
    data.say_turned(photos)
    for i, photo, mask in zip(data.progress(ids, "images"), photos, masks):
        yield i, data.load_image(photo), data.read_truth(mask)


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


def read_prediction(path, classes, known_tags_allowed=False):
    """Labels (H, W) of a PNG; raises InputError if of other classes, or made with known tags."""
    labels = data.read_labels(path)
    meant, comment = data.read_notes(path)
    if meant and meant != ";".join(classes):
        raise InputError(f"{path}: labels of {meant}; score takes them with --classes CKPT")
    if "known tags" in comment and not known_tags_allowed:
        raise InputError(f"{path}: made with known tags; score it with --void-allowed")
    return labels


def run_score(args):
    """Compare a folder of label PNGs with a set's true masks."""
    classes, start = data.VOC_CLASSES, time.perf_counter()
    if args.classes:
        with data.reading(args.classes, "a checkpoint of train.py"):
            classes = list(model.read_checkpoint(args.classes)["classes"])
    K = len(classes)

    def compare(i):
        path = Path(args.folder, f"{i}.png")
        labels = read_prediction(path, classes, args.void_allowed)
        truth = data.read_truth(Path(args.voc, "SegmentationClass", f"{i}.png"))
        with data.reading(path, "labels as infer.py writes them"):
            if not args.void_allowed:
                return confusion(truth, labels, K)
            # Below void is counted as class K: refuse first an index K, here or in the truth.
            confusion(truth, np.where(labels == VOID, 0, labels), K)
            return confusion(truth, np.where(labels == VOID, K, labels), K + 1)

    matrices = attempt(compare, data.voc_ids(args.voc, args.set))
    total = sum(matrices)
    if total[:, K:].any() and not total[:, :K].any():
        raise InputError(f"{args.folder}: no pixel has a label; expected class indices, not 255")
    report = summarise(total[:K], classes, len(matrices))
    if args.void_allowed:  # void is counted as class K
        iou = measures(total)[0][:K]
        wrong = float(iou[total[:K].sum(1) > 0].mean())
        coverage = float(100 * total[:K, :K].sum() / total[:K].sum())
        what = "training labels, known tags: not VOC's measure"
        report.update(coverage=coverage, mean_iou_void_wrong=wrong, what=what)
        print(f"{what}; mean IoU with void as wrong {wrong:.2f}")
        print(f"{coverage:.1f} % of the pixels have a label; of these:")
    width = max(map(len, classes))
    print(f"{'':{width}} {'IoU':>7} {'precision':>10} {'recall':>7}")
    for name, iou, precision, recall in zip(classes, *measures(total[:K, :K])):
        print(f"{name:{width}} {iou:7.2f} {precision:10.2f} {recall:7.2f}")
    whose = "where labelled" if args.void_allowed else "VOC"
    if report["mean_iou"] is None:
        whose = f"of {report['classes_defined']} of {K} classes, which occur: not VOC's"
    mean, accuracy = report["mean_iou_defined"], report["mean_accuracy"]
    print(f"mean IoU ({whose}) {mean:.2f}   mean class accuracy {accuracy:.2f}")
    say_absent(report)
    speed = len(matrices) / (time.perf_counter() - start)
    print(f"{len(matrices)} images, {speed:.0f} images/s")
    if args.json:
        data.write_json(args.json, report)


def run_ladder(args):
    """Score every prior, from a checkpoint."""
    samples = voc_samples(args.voc, args.set, args.limit)
    net, scene_of = infer.open_net(args.checkpoint, args, args.priors)
    if net.classes != data.VOC_CLASSES:
        print("indices of the masks are read as:", ", ".join(net.classes))
    tags = data.voc_tags(args.voc, args.set)  # {id: (present, only difficult)}
    start = time.perf_counter()
    report, scores = ladder(net, samples, scene_of, args.ilp_form, args.priors, args.workers)
    if net.classes == data.VOC_CLASSES:
        score_tags(report, scores, tags)
    print_ladder(report)
    speed = len(scores) / (time.perf_counter() - start)
    print(f"{len(scores)} images, {speed:.2f} images/s")
    if args.json:
        data.write_json(args.json, report)
        draw_ladder(Path(args.json).with_suffix(".png"), report)


def run_submit(args):
    """Check every label file of a test set (id, size, palette, range) and pack them."""
    files = {i: Path(args.folder, f"{i}.png") for i in data.voc_ids(args.voc, args.set)}

    def check(i):
        highest = read_prediction(files[i], data.VOC_CLASSES).max()
        photo = Path(args.voc, "JPEGImages", f"{i}.jpg")
        with data.reading(files[i], "a palette PNG of the photograph's size, of classes 0..20"):
            with Image.open(files[i]) as image, Image.open(photo) as picture:
                mode, size, wanted = image.mode, image.size, picture.size
            if mode != "P" or size != wanted or highest >= len(data.VOC_CLASSES):
                raise ValueError(f"mode {mode}, {size} pixels for {wanted}, up to {highest}")

    attempt(check, files)
    packed = {"mode": "w:gz", "dereference": True}  # files, not links
    with data.writing(args.out) as file, tarfile.open(fileobj=file, **packed) as tar:
        for i, path in files.items():
            tar.add(path, f"results/VOC2012/Segmentation/comp6_{args.set}_cls/{i}.png")
    print(f"{args.out}: {len(files)} label maps; upload as comp6")


def main():
    parser = data.Parser(description=__doc__)
    commands = parser.add_subparsers(required=True)
    parsers = []
    for name, run in (("score", run_score), ("ladder", run_ladder), ("submit", run_submit)):
        sub = commands.add_parser(name, help=run.__doc__, description=run.__doc__)
        sub.set_defaults(run=run, json=None, limit=0, ilp=True)  # ilp: infer.open_net asks
        sub.add_argument("--voc", required=True, metavar="DIR", help="the devkit's VOC2012 folder")
        default = "test" if name == "submit" else "val"
        sub.add_argument("--set", default=default, metavar="NAME", help=f"its set [{default}]")
        parsers.append(sub)
    score, ladder_parser, submit = parsers
    score.add_argument("folder", help="<image id>.png of every image, as infer.py writes them")
    score.add_argument("--json", metavar="FILE", help="also write the numbers here")
    score.add_argument("--classes", metavar="CKPT", help="whose classes these are [VOC's]")
    score.add_argument("--void-allowed", action="store_true", help="255: no training label there")
    add, every = ladder_parser.add_argument, list(infer.PRIORS)
    add("checkpoint", help="ckpt.pt or head.pt of train.py")
    add("--json", metavar="FILE", help="also write the numbers, a chart beside them")
    add("--limit", type=int, metavar="N", help="use N images, spread over the set")
    add("--priors", nargs="+", choices=every, default=every, help="rungs [all]")
    infer.add_options(ladder_parser)
    submit.add_argument("folder", help="<image id>.png of every image, as infer.py writes them")
    submit.add_argument("--out", required=True, metavar="FILE.tgz")
    args = parser.parse_args()
    if args.limit < 0 or (args.json and args.json.lower().endswith(".png")):
        parser.error("--limit takes 0 or more, and --json a name that does not end in .png")
    args.run(args)


if __name__ == "__main__":
    data.run_cli(main)
