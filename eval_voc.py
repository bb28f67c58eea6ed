"""Score label maps by VOC's rules to the letter, print the ladder of priors, pack a submission.

    python eval_voc.py score  PRED_DIR --voc VOC2012 --set val      # IoU per class and their mean
    python eval_voc.py ladder CKPT     --voc VOC2012 --set val      # base, +ILP, +ILP+sppxl, ... in one pass
    python eval_voc.py submit PRED_DIR --voc VOC2012 --set test --out results.tgz

One 21 x 21 histogram over the whole set, void pixels left out, the plain mean over all 21 classes: VOCevalseg.m.
"""
import json
import math
import sys
from pathlib import Path

import numpy as np

import data
import infer
from data import InputError


# ---------------------------------------------------------------- the measure

def confusion(truth, prediction, classes):
    """Joint histogram of one image, (K, K) int64, rows truth and columns prediction; truth 255 (void) is left out.

    truth, prediction: (H, W) uint8. Raises ValueError where sizes differ or any index is not a class; a predicted
    void is an error even under void, as in the devkit.
    """
    if truth.shape != prediction.shape:
        raise ValueError(f"it is {prediction.shape[1]}x{prediction.shape[0]}, the truth is {truth.shape[1]}x{truth.shape[0]}; "
                         "nothing is resized, save labels at the photograph's size")
    if prediction.max(initial=0) >= classes:
        raise ValueError(f"index {prediction.max()} in a prediction of {classes} classes; label every pixel 0..{classes - 1}")
    keep = truth != data.VOID
    if truth[keep].max(initial=0) >= classes:
        raise ValueError(f"index {truth[keep].max()} in the truth of {classes} classes")
    joint = truth[keep].astype(np.int64) * classes + prediction[keep]
    return np.bincount(joint, minlength=classes ** 2).reshape(classes, classes)


def measures(matrix):
    """Per-class iou, precision, recall in percent, from a (K, K) confusion; 0/0 is NaN, as in the devkit."""
    hit, rows, columns = np.diag(matrix).astype(float), matrix.sum(1), matrix.sum(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return 100 * hit / (rows + columns - hit), 100 * hit / columns, 100 * hit / rows


def summarise(matrix, classes, images):
    """The JSON form of a score: percent, mean_iou over all classes (None where one is undefined), and over the defined."""
    iou, precision, recall = measures(matrix)

    def plain(values):
        return {name: None if math.isnan(v) else float(v) for name, v in zip(classes, values)}
    defined = ~np.isnan(iou)
    return dict(mean_iou=float(iou.mean()) if defined.all() else None,
                mean_iou_defined=float(iou[defined].mean()) if defined.any() else None,
                classes_defined=int(defined.sum()), images=images, iou=plain(iou), precision=plain(precision),
                recall=plain(recall), mean_accuracy=float(np.nanmean(recall)) if defined.any() else None)


def mean_of(report):
    return report["mean_iou"] if report["mean_iou"] is not None else report["mean_iou_defined"]


# ---------------------------------------------------------------- the ladder

def ladder(net, samples, classes, settings):
    """Score every rung in one pass; samples: iterable of (name, image (H, W, 3), truth (H, W)). JSON-ready dict."""
    matrices = {}
    images = 0
    for name, image, truth in samples:
        p, q = infer.predict(net, image)
        rows = {"base": p.argmax(0), "ilp": infer.ilp(p, q).argmax(0), "ilpnobg": infer.ilp(p, q, False).argmax(0)}
        for row, labels in rows.items():
            matrices[row] = matrices.get(row, 0) + confusion(truth, labels.astype(np.uint8), len(classes))
        images += 1
    return dict(rows={row: summarise(m, classes, images) for row, m in matrices.items()}, classes=classes)


def print_ladder(report):
    rows, classes = report["rows"], report["classes"]
    width = max(map(len, classes))
    print(f"{'':{width}} " + " ".join(f"{row:>10}" for row in rows))
    for name in classes:
        print(f"{name:{width}} " + " ".join(f"{r['iou'][name] if r['iou'][name] is not None else math.nan:10.1f}"
                                            for r in rows.values()))
    print(f"{'mean IoU':{width}} " + " ".join(f"{mean_of(r):10.1f}" for r in rows.values()))


def main():
    pass


if __name__ == "__main__":
    data.run_cli(main)
