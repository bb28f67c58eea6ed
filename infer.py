"""Per-pixel labels for photographs: score map, image-level prior, smoothing prior (section 4 of the paper).

    python infer.py out/toy/ckpt.pt photo.jpg            # photo.png (palette labels) and photo_panel.png in out/labels
    python infer.py CKPT DIR --prior sppxl --soft        # a whole folder; also the class scores as .npz
    python infer.py CKPT --voc VOC2012 --set val --out out/val        # a VOC set, ready for eval_voc.py score

No true label is read here. Letters in shape comments: K classes, H W pixels, h w cells.
"""
import math
import pickle
import sys
import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

import data
from data import InputError
from model import TRUNKS, Net, load_trunk, pick_device, upsample


# ---------------------------------------------------------------- checkpoints

def read_checkpoint(path):
    """A checkpoint of train.py as a dict of plain values. Raises InputError; never executes code from the file."""
    try:
        ckpt = torch.load(path, map_location="cpu", weights_only=True)
        missing = {"format", "settings", "classes", "model"} - set(ckpt)
    except (RuntimeError, EOFError, pickle.UnpicklingError, zipfile.BadZipFile, ValueError, KeyError, TypeError,
            AttributeError) as e:
        raise InputError(f"{path}: not a checkpoint of train.py, or a damaged one ({type(e).__name__})") from e
    if missing:
        raise InputError(f"{path}: not a checkpoint of train.py (it lacks {', '.join(sorted(missing))})")
    return ckpt


def load_weights(net, trunk, path):
    """model.load_trunk, with its complaints as InputError."""
    try:
        load_trunk(net, trunk, path or None)
    except ValueError as e:
        raise InputError(e) from e


def load_net(path, weights=None, device="cpu"):
    """(net in eval mode on the device, checkpoint). weights: the public trunk's file, where the checkpoint lacks it."""
    ckpt = read_checkpoint(path)
    s, classes = ckpt["settings"], ckpt["classes"]
    head = [int(w) for w in s["head"].split(",")] if s["head"] else None
    net = Net(s["trunk"], len(classes), head, s["aggregation"], s["r"], s["dropout"], s["train_convs"])
    missing, unexpected = net.load_state_dict(ckpt["model"], strict=False)
    if unexpected or any(not k.startswith("trunk.") for k in missing):
        raise InputError(f"{path}: its tensors do not fit its settings ({(missing + unexpected)[0]})")
    if missing:
        load_weights(net, s["trunk"], weights or s["weights"])
        net.load_state_dict(ckpt["model"], strict=False)              # trained trunk layers win over the public ones
    return net.to(device).to(memory_format=torch.channels_last).eval(), ckpt


# ---------------------------------------------------------------- scores and the image-level prior

@torch.no_grad()
def predict(net, image, dense=1):
    """Probabilities of one image: p (K, H, W), Eq. 2 at every pixel, and q (K,), Eq. 2 of the aggregated scores.

    image (H, W, 3) uint8. dense: grid so many times finer than the stride. Returns float32 arrays.
    """
    device = next(net.parameters()).device
    x = torch.from_numpy(image.copy()).permute(2, 0, 1)[None].to(device)
    scores, step, offset = net.dense(x, dense)                                       # (1, K, h, w)
    q = net.aggregate(scores)[0].softmax(0)
    p = upsample(scores, image.shape[:2], step, offset)[0].softmax(0)                # (K, H, W)
    return p.cpu().numpy(), q.cpu().numpy()


def ilp(p, q, background=False):
    """Image-level prior, Eq. 7: p (K, H, W) times q (K,). background: whether class 0 is multiplied as well.

    Eq. 7 read literally covers the object classes alone, and that measures better (see README.md).
    """
    q = q if background else np.concatenate([[1], q[1:]]).astype(q.dtype)
    return p * q[:, None, None]


PRIORS = {"none": lambda p, image: p.argmax(0)}          # name: f(p (K, H, W), image (H, W, 3) uint8) -> labels (H, W)


def rungs(net, image, dense=1):
    """Yield (row of the ladder, labels (H, W)) for one image; the network runs once."""
    p, q = predict(net, image, dense)
    yield "base", p.argmax(0)
    p = ilp(p, q)
    yield "ilp", p.argmax(0)
    for name, prior in list(PRIORS.items())[1:]:
        yield f"ilp+{name}", prior(p, image)


# ---------------------------------------------------------------- pictures

def font(size):
    """Pillow's own scalable face."""
    return ImageFont.load_default(size)


def overlay(image, labels, alpha=0.6):
    """image (H, W, 3) uint8 under the palette's colours of labels (H, W); background stays clear."""
    colours = data.voc_palette()[labels]
    mix = (image * (1 - alpha) + colours * alpha).astype(np.uint8)
    return np.where((labels > 0)[..., None], mix, image)


def heat(values):
    """(H, W) in 0..1 as a black-red-yellow-white picture, (H, W, 3) uint8."""
    return (np.stack([values * 3, values * 3 - 1, values * 3 - 2], -1).clip(0, 1) * 255).astype(np.uint8)


def panel(rows, classes, width=150):
    """A contact sheet: rows of (caption, picture (H, W, 3)) cells, with the colours of the classes that occur below.

    rows: list of (list of (caption, picture), set of class indices). Returns a PIL image.
    """
    face, caption_height = font(13), 18
    heights = [max(round(p.shape[0] * width / p.shape[1]) for _, p in cells) for cells, _ in rows]
    used = sorted(set().union(*[k for _, k in rows]))
    columns = max(len(cells) for cells, _ in rows)
    per_line = max(1, columns * (width + 4) // 130)
    legend = 8 + 20 * -(-len(used) // per_line)
    sheet = Image.new("RGB", (columns * (width + 4) + 4, sum(heights) + len(rows) * (caption_height + 4) + legend), "white")
    draw, y = ImageDraw.Draw(sheet), 0
    for (cells, _), height in zip(rows, heights):
        for i, (caption, picture) in enumerate(cells):
            x = 4 + i * (width + 4)
            draw.text((x, y + 1), caption, "black", face)
            size = (width, round(picture.shape[0] * width / picture.shape[1]))
            sheet.paste(Image.fromarray(picture).resize(size, Image.LANCZOS if picture.shape[0] > 200 else Image.NEAREST),
                        (x, y + caption_height))
        y += height + caption_height + 4
    for n, k in enumerate(used):
        x, line = 4 + n % per_line * 130, y + 4 + n // per_line * 20
        draw.rectangle((x, line, x + 14, line + 14), tuple(map(int, data.voc_palette()[k])), "black")
        draw.text((x + 20, line - 1), classes[k], "black", face)
    return sheet


def explain(net, image, truth, classes, maps=4):
    """One row of a panel: image, truth if known, base, +ILP, and heat maps of the classes with the largest q."""
    p, q = predict(net, image)
    labels = {"base": p.argmax(0), "+ILP": ilp(p, q).argmax(0)}
    cells = [("image", image)] + ([("truth", data.voc_palette()[truth])] if truth is not None else [])
    cells += [(name, data.voc_palette()[label]) for name, label in labels.items()]
    top = [int(k) for k in np.argsort(-q) if k][:maps]
    cells += [(f"{classes[k]} {q[k]:.2f}", heat(p[k])) for k in top]
    used = set(np.unique(np.concatenate([x.ravel() for x in [*labels.values()] + ([truth] if truth is not None else [])])))
    return cells, {int(k) for k in used}


def save_panel(path, net, samples, classes):
    """Write a panel of (name, image, truth or None) samples."""
    sheet = panel([explain(net, image, truth, classes) for _, image, truth in samples], classes)
    data.write_atomically(path, lambda file: sheet.save(file, "png"))


# ---------------------------------------------------------------- command line

def main():
    parser = data.Parser(description=__doc__)
    parser.add_argument("checkpoint")
    parser.add_argument("images", nargs="*", help="image files and folders")
    parser.add_argument("--voc", metavar="DIR", help="label a set of this devkit instead")
    parser.add_argument("--set", default="val", help="which set of --voc [val]")
    parser.add_argument("--weights", metavar="FILE", help="the trunk's weights, where the checkpoint does not hold them")
    parser.add_argument("--prior", choices=list(PRIORS), default="none", help="what smooths the label map [none]")
    parser.add_argument("--ilp", action=data.argparse.BooleanOptionalAction, default=True, help="image-level prior, Eq. 7")
    parser.add_argument("--dense", type=int, default=1, metavar="F", help="score grid F times finer than the stride [1]")
    parser.add_argument("--soft", action="store_true", help="also write the class scores as .npz")
    parser.add_argument("--out", default="out/labels", metavar="DIR", help="where to write [out/labels]")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, mps [auto]")
    args = parser.parse_args()
    if bool(args.voc) == bool(args.images):
        parser.error("give images or folders, or --voc DIR --set NAME")
    if args.voc:
        files = [Path(args.voc, "JPEGImages", f"{i}.jpg") for i in data.voc_ids(args.voc, args.set)]
    else:
        files = [f for p in args.images for f in (data.image_files(p) if Path(p).is_dir() else [Path(p)])]
    twice = {f.stem for f in files if sum(g.stem == f.stem for g in files) > 1} if len(files) < 5000 else ()
    if twice:
        raise InputError(f"{sorted(twice)[0]}: two images of this name would write the same label file; run them apart")
    device = pick_device(args.device)
    net, ckpt = load_net(args.checkpoint, args.weights, device)
    bad, out = [], Path(args.out)
    for file in data.progress(files, "labelled"):
        try:
            image = data.load_image(file)
        except InputError as e:
            bad.append(str(e))
            continue
        p, q = predict(net, image, args.dense)
        p = ilp(p, q) if args.ilp else p
        labels = PRIORS[args.prior](p, image)
        data.save_labels(out / f"{file.stem}.png", labels)
        if not args.voc:
            data.write_atomically(out / f"{file.stem}_overlay.png",
                                  lambda f: Image.fromarray(overlay(image, labels)).save(f, "png"))
        if args.soft:
            data.write_atomically(out / f"{file.stem}.npz", lambda f: np.savez_compressed(
                f, scores=p.astype(np.float16), image_scores=q, classes=np.array(ckpt["classes"])))
        if len(files) == 1:
            share = np.bincount(labels.ravel(), minlength=len(q)) / labels.size
            print(f"{file}: " + ", ".join(f"{ckpt['classes'][k]} {100 * share[k]:.0f}%" for k in np.argsort(-share)
                                          if share[k] > 0))
    print(f"wrote {len(files) - len(bad)} label maps to {out}/")
    if bad:
        raise InputError(f"{len(bad)} of {len(files)} images could not be read: {'; '.join(bad)}")


if __name__ == "__main__":
    data.run_cli(main)
