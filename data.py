"""Photographs and tags: VOC, ImageNet, a folder of your own, and the toy set; the palette; masks as PNG.

    python data.py                                        # draws toy examples into out/toy.png and prints their tags
    photos = voc_photos("VOCdevkit/VOC2012", "train")     # paths and tags; no way from here to a mask

Letters in shape comments: N images, B batch, K classes, H W pixels. Files that cannot be used raise InputError.
"""
import argparse
import contextlib
import csv
import dataclasses
import functools
import os
import sys
import time
import warnings
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from scipy import ndimage

VOID = 255
VOC_CLASSES = ["background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
               "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"]
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp"}
SYNSETS = Path(__file__).resolve().parent / "assets/synsets.csv"          # ILSVRC-2012, but for what is too like a VOC class
Image.MAX_IMAGE_PIXELS = 250_000_000           # Pillow takes 20,000 x 20,000, but twice this number is a decompression bomb
warnings.filterwarnings("ignore", module=r"PIL\.")               # a broken photograph is named in one line of ours


# ---------------------------------------------------------------- what every script needs

class InputError(ValueError):
    """Something the user gave cannot be used; the message is one line that names it and the remedy."""


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors and no abbreviated flags."""

    def __init__(self, **kwargs):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **kwargs)

    def error(self, message):
        self.exit(2, f"{self.prog}: {message} (--help lists the options)\n")


def run_cli(main):
    """Call main(). A mistake of the user ends as one line on stderr and status 2, Ctrl-C with 130; ours keep their traceback."""
    if hasattr(sys.stdout, "reconfigure"):                                  # file names need not be valid text
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        sys.exit(main())
    except (InputError, OSError) as e:
        if not isinstance(e, InputError):
            e = f"{e.filename or ''}: {e.strerror or e}; check that it exists, may be used, and that the disk has room"
        print(f"{Path(sys.argv[0]).name}: {e}".replace("\n", " "), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def progress(items, what, total=None):
    """Iterate with one line of done/total, rate and time left on stderr; silent when it is not a terminal."""
    total, start = total or len(items), time.perf_counter()
    for done, item in enumerate(items, 1):
        yield item
        if sys.stderr.isatty():
            rate = done / (time.perf_counter() - start)
            print(f"\r{what} {done}/{total}  {rate:.1f}/s  {(total - done) / rate:.0f} s left   ",
                  end="\n" if done == total else "", file=sys.stderr)


def spread(n, k):
    """k of n indices, evenly spread, or all of them."""
    return np.linspace(0, n - 1, min(n, k)).astype(int).tolist()


def write_atomically(path, write):
    """Call write(file) on a temporary file beside path, flush it to disk, then rename: path is whole or as before."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.{os.getpid()}"
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def reading(path, expected):
    """Whatever goes wrong inside, while a file is read, becomes one InputError: the file, why, and what was expected."""
    try:
        yield
    except InputError:
        raise
    except Exception as e:                                # decoders and parsers raise many kinds on damaged files
        why = getattr(e, "strerror", None) or str(e).replace(repr(str(path)), "it").partition("\n")[0]
        why = why if 0 < len(why) < 160 else type(e).__name__            # torch's advice there is to execute the file
        raise InputError(f"{path}: {why}; expected {expected}") from e


# ---------------------------------------------------------------- images: labels and photographs

@functools.cache
def voc_palette():
    """The devkit's colours, (256, 3) uint8: bits of the index, three at a time, fill R, G, B from the highest bit."""
    bits = np.arange(256)[:, None] >> np.arange(9) & 1                                     # lowest first
    return (bits.reshape(256, 3, 3) * [[128], [64], [32]]).sum(1).astype(np.uint8)


def read_labels(path):
    """A label PNG as class indices, (H, W) uint8. Palette files must carry the VOC palette; plain grey is accepted."""
    with reading(path, "a label PNG of class indices in VOC's palette"), Image.open(path) as image:
        if image.mode not in ("P", "L"):
            raise ValueError(f"mode {image.mode}, neither palette nor grey")
        labels = np.asarray(image)
        if image.mode == "P" and (np.asarray(image.convert("RGB")) != voc_palette()[labels]).any():
            raise ValueError("its colours are not VOC's; an adaptive palette has renumbered the classes")
    return labels


def save_labels(path, labels):
    """Write (H, W) class indices as a palette PNG in VOC's 256 colours."""
    image = Image.fromarray(np.asarray(labels, np.uint8))
    image.putpalette(voc_palette().tobytes())
    write_atomically(path, lambda file: image.save(file, "png"))


def load_image(path, near=None):
    """An image file of any mode as (H, W, 3) uint8 RGB, upright; near: a side in pixels to which JPEGs may be reduced."""
    with reading(path, "a whole image; leave it out, or save it again"), Image.open(path) as image:
        if near:
            image.draft("RGB", (near, near))                               # decodes no smaller than that, but faster
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I") or image.mode == "F":                # 16-bit and float: scale to 8
            values = np.asarray(image, np.float64)
            image = Image.fromarray((values / (257 if values.max() > 255 else 1)).clip(0, 255).astype(np.uint8))
        if image.has_transparency_data:                                    # over white
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return np.asarray(image.convert("RGB"))


def shrink(image, longest=1000):
    """image (H, W, 3) uint8 reduced, if need be, to so many pixels along its longer side: what the priors are made for."""
    small = Image.fromarray(image)
    small.thumbnail((longest, longest))
    return np.asarray(small)


@dataclasses.dataclass
class Photos:
    """Tagged photographs: all that weak training may see. Indexing by (i, place) reads image i at size x size."""
    paths: list                                # files, or arrays (H, W, 3) uint8 already in memory
    tags: torch.Tensor                         # (N, K) float32 of 0/1
    classes: list                              # K names
    size: int = 0                              # pixels
    crop: bool = False                         # squares cropped (the paper) instead of whole photographs squashed
    recipe: tuple = ()                         # (seed, n, size) of toy images

    def __len__(self):
        return len(self.paths)

    def image(self, i, near=None):
        """Photo i as it is, (H, W, 3) uint8."""
        return self.paths[i] if isinstance(self.paths[i], np.ndarray) else load_image(self.paths[i], near)

    def __getitem__(self, key):
        """(i, place of the crop in 0..1) -> image (3, size, size) uint8 and i; a broken file gives the next good one."""
        i, place = key
        square, linear = (self.size, self.size), Image.BILINEAR
        for j in range(i, i + len(self)):
            with contextlib.suppress(InputError):
                image = Image.fromarray(self.image(j % len(self), near=self.size))
                image = ImageOps.fit(image, square, linear, 0, (place, place)) if self.crop else image.resize(square, linear)
                return torch.from_numpy(np.array(image)).permute(2, 0, 1), j % len(self)
        raise InputError(f"{self.paths[0]}: none of {len(self)} images can be read; mend or remove them")

    def take(self, keep):
        """The photographs at these indices, in this order."""
        return dataclasses.replace(self, paths=[self.paths[i] for i in keep], tags=self.tags[keep])


@dataclasses.dataclass
class Masked(Photos):
    """Whole photos with labels: for supervision per pixel only, and the one way from training to a mask."""
    masks: list = ()                           # a label PNG or array (H, W) for each photo
    indices: list = ()                         # its index among the photos that it was chosen from

    @classmethod
    def of(cls, photos, folder, names=None):
        """The photos with a mask in the folder ("drawn" for toy images), and those that are all background.

        names: of the masks without .png, one a photo; by default the photos' own. Raises InputError where no photo has a
        mask, or two photos share one.
        """
        if photos.recipe and folder == "drawn":
            masks = {image.tobytes(): labels for _, image, labels in _toy_drawn(*photos.recipe)}
        else:
            masks = {p.stem: p for p in Path(folder).glob("*.png")}
        keys = names or [p.tobytes() if isinstance(p, np.ndarray) else Path(p).stem for p in photos.paths]
        held = [key for key in keys if key in masks]
        if len(set(held)) < max(1, len(held)):
            raise InputError(f"--masks {folder}: {len(set(held))} files <name>.png for {len(held)} of {len(keys)} images; "
                             "expected one each for some of them, or drawn for toy images")
        indices = [i for i, key in enumerate(keys) if key in masks or photos.tags[i, 0] > 0]
        masks = [masks.get(keys[i], np.zeros((1, 1), np.uint8)) for i in indices]
        kept = photos.take(indices)
        return cls(kept.paths, kept.tags, kept.classes, kept.size, masks=masks, indices=indices)

    def labels(self, i):
        """Labels (size, size) uint8 of photo i, squashed as the photo is (nearest)."""
        labels = self.masks[i] if isinstance(self.masks[i], np.ndarray) else read_labels(self.masks[i])
        highest = labels.max(where=labels != VOID, initial=0)
        if highest >= len(self.classes):
            raise InputError(f"{self.masks[i]}: holds index {highest}; expected 0..{len(self.classes) - 1}, or 255 for void")
        return torch.from_numpy(np.array(Image.fromarray(labels).resize((self.size, self.size), Image.NEAREST)))

    @functools.cached_property
    def frequencies(self):
        """Share of each class among all labelled pixels, (K,). Reads every mask."""
        counts = sum(torch.bincount(self.labels(i).flatten().long(), minlength=256) for i in range(len(self)))
        return counts[:len(self.classes)] / counts[:len(self.classes)].sum().clamp(min=1)

    def __getitem__(self, key):
        image, i = super().__getitem__(key)
        return image, i, self.labels(i)


def tagged(paths, tags, classes, **more):
    """Photos of these paths; tags: the set of class indices of each, an empty one means background."""
    matrix = [[float(k in (present or {0})) for k in range(len(classes))] for present in tags]
    return Photos(paths, torch.tensor(matrix), classes, **more)


# ---------------------------------------------------------------- sets of photographs: VOC, a folder of your own, ImageNet

def read_rows(path, expected, columns=0):
    """Non-blank rows of a text file as lists of cells, between white space, or between commas where columns says how many."""
    with reading(path, expected), open(path, newline="", encoding="utf-8-sig") as file:
        rows = [[cell.strip() for cell in row] for row in (csv.reader(file) if columns else map(str.split, file))]
        for line, row in enumerate(rows, 1):
            if columns and any(row) and len(row) != columns:
                raise ValueError(f"line {line}, '{','.join(row)[:60]}', has not {columns} cells with commas between")
        return [row for row in rows if any(row)]


def voc_ids(voc, name, kinds=("Segmentation", "Main")):
    """Ids in ImageSets/<kind>/<name>.txt, the first kind that exists: the stems of bare ids, image paths or SBD paths."""
    if Path(name).name != name:
        raise InputError(f"--set {name}: not the name of a list in {voc}/ImageSets; give one, such as val")
    lists = [Path(voc, "ImageSets", kind, f"{name}.txt") for kind in kinds]
    path = next((p for p in lists if p.exists()), lists[0])
    expected = "different image ids, one a line, in a devkit's VOC2012 folder"
    ids = [Path(row[0]).stem for row in read_rows(path, expected)]
    bad = [i for i in ids if not i.strip(".") or set(i) & set("\\:\0")]
    if not ids or bad or len(set(ids)) < len(ids):
        raise InputError(f"{path}: {len(ids)} lines, {len(set(ids))} different ids, bad: {bad[:1]}; expected {expected}")
    return ids


def voc_tags(voc, name):
    """{id: (classes present, classes only present as difficult)} of Main/<class>_<name>.txt, as class indices."""
    tags, expected = {}, "an id and 1, -1 or 0 a line"
    for k, label in enumerate(VOC_CLASSES[1:], 1):
        path = Path(voc, "ImageSets", "Main", f"{label}_{name}.txt")
        with reading(path, expected):
            for i, flag, *_ in read_rows(path, expected) if path.exists() else ():
                present, difficult = tags.setdefault(i, (set(), set()))
                {"1": present, "0": difficult, "-1": set()}[flag].add(k)
    return tags


def xml_tags(path):
    """Classes of one Annotations file, difficult ones too, as a set of class indices."""
    with reading(path, "VOC's XML of the tags, needed for images that ImageSets/Main does not list"):
        root = ElementTree.parse(path).getroot()
        if root.tag != "annotation":
            raise ValueError(f"<{root.tag}> instead of <annotation>")
        names = {o.findtext("name", "").strip() for o in root.findall("object")}
    return {k for k, name in enumerate(VOC_CLASSES) if k and name in names}


def voc_photos(voc, name):
    """Photos of a set with its tags, difficult objects included: from ImageSets/Main or, where not listed, Annotations."""
    listed, ids = voc_tags(voc, name), voc_ids(voc, name, ("Main", "Segmentation"))
    tags = [set.union(*listed[i]) if i in listed else xml_tags(Path(voc, "Annotations", f"{i}.xml")) for i in ids]
    return tagged([Path(voc, "JPEGImages", f"{i}.jpg") for i in ids], tags, VOC_CLASSES)


def image_files(folder):
    """All image files below a folder, sorted."""
    files = sorted(p for p in Path(folder).rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise InputError(f"{folder}: no such folder, or no image below it ({' '.join(sorted(IMAGE_SUFFIXES))})")
    return files


def folder_photos(folder, tags):
    """Photos of one's own: a CSV of file,tag;tag;... No tag, or `background`: background. Classes in alphabetical order."""
    expected = f"lines such as  photo.jpg,cat;dog  with 1 to {VOID - 1} classes and files inside {folder}"
    rows = read_rows(tags, expected, columns=2)
    if rows and rows[0][0].lower() in ("file", "image", "filename"):
        rows = rows[1:]
    paths = [Path(folder, name) for name, _ in rows]
    missing = [str(p) for p in paths if not p.is_file() or not p.resolve().is_relative_to(Path(folder).resolve())]
    names = [{tag.strip() for tag in cell.split(";")} - {"", "background"} for _, cell in rows]
    classes = ["background", *sorted(set().union(*names))]
    if missing or not 2 <= len(classes) <= VOID:
        raise InputError(f"{tags}: {len(classes) - 1} classes, {len(missing)} files missing {missing[:1]}; expected {expected}")
    return tagged(paths, [set(map(classes.index, present)) for present in names], classes)


def read_synsets(path):
    """CSV of wnid,class, where class is VOC's or background -> {wnid: class index}."""
    expected = "lines of a wnid and a VOC class or background, such as  n02123045,cat"
    with reading(path, expected):
        return {wnid: VOC_CLASSES.index(name) for wnid, name in read_rows(path, expected, columns=2)}


def imagenet_photos(folder, synsets=""):
    """Photos of <wnid>/ folders, one tag an image (section 4.1); synsets: a CSV of wnid,class, which leaves out all others."""
    table = read_synsets(synsets or SYNSETS)
    paths = sorted(p for p in Path(folder).glob("*/*") if p.parent.name in table and p.suffix.lower() in IMAGE_SUFFIXES)
    if not paths:
        raise InputError(f"{folder}: no image in a folder that {synsets or SYNSETS.name} lists; expected n02123045/x.JPEG")
    return tagged(paths, [{table[p.parent.name]} for p in paths], VOC_CLASSES)


# ---------------------------------------------------------------- the toy set

TOY_SHAPES = {                                 # outline (H, W) bool, in coordinates where the object's radius is 1
    "stripes": lambda u, v: u ** 2 + (v / 0.7) ** 2 < 1,                                    # ellipse
    "checker": lambda u, v: np.maximum(abs(u), abs(v)) < 0.8,                               # square
    "speckle": lambda u, v: (v > -0.6) & (v < 0.95 - 1.7 * abs(u)),                         # triangle
    "grid": lambda u, v: np.minimum(abs(u), abs(v)) < 0.5 * (np.hypot(u, v) < 1)}           # cross
TOY_TEXTURES = {                               # two tones (H, W) bool, in coordinates whose period is 2 pi; grain: noise
    "stripes": lambda u, v, grain: np.sin(u) > 0,
    "checker": lambda u, v, grain: (np.sin(u / 1.3) > 0) ^ (np.sin(v / 1.3) > 0),
    "speckle": lambda u, v, grain: ndimage.uniform_filter(grain, 2) > 0.5,
    "grid": lambda u, v, grain: np.maximum(np.cos(u / 1.2), np.cos(v / 1.2)) > 0.75}
TOY_CLASSES = ["background", *TOY_SHAPES]


def toy_scene(rng, size, kinds, distractors):
    """Draw objects of these classes, and distractors of none: image (size, size, 3) uint8, labels (size, size) uint8.

    Colours, sizes, places and rotations are random for all, so that only texture and shape tell a class.
    """
    coarse = Image.fromarray(rng.integers(0, 256, (6, 6), dtype=np.uint8)).resize((size, size), Image.BICUBIC)
    tone = np.asarray(coarse, float)[..., None] / 255 + 0.15 * rng.standard_normal((size, size, 1))
    first, second = rng.uniform(40, 215, (2, 3))
    image, labels = first + (second - first) * tone, np.zeros((size, size), np.uint8)
    y, x = np.mgrid[:size, :size].astype(float)
    for kind in rng.permutation(list(kinds) + [""] * distractors):
        radius, angle = rng.uniform(20, 32), rng.uniform(0, 2 * np.pi)
        for _ in range(20):                                                                # mostly free of the others
            cx, cy = rng.uniform(radius * 0.8, size - radius * 0.8, 2)
            u, v = (x - cx) * np.cos(angle) + (y - cy) * np.sin(angle), (y - cy) * np.cos(angle) - (x - cx) * np.sin(angle)
            inside = TOY_SHAPES[kind or str(rng.choice(TOY_CLASSES[1:]))](u / radius, v / radius)
            if (labels[inside] > 0).mean() < 0.1:
                break
        if kind:
            wave = 2 * np.pi / rng.uniform(5, 8)
            pattern = TOY_TEXTURES[kind](wave * u, wave * v, grain=rng.random(u.shape))
        else:                                                                              # plain, or two halves
            pattern = u > rng.choice([0, size])
        dark = rng.uniform(0, 255, 3)
        light = (dark + rng.choice([-1, 1], 3) * rng.uniform(70, 128, 3)) % 256
        image[inside] = np.where(pattern[..., None], light, dark)[inside]
        labels[inside] = TOY_CLASSES.index(kind) if kind else 0
    return (image + rng.normal(0, 8, image.shape)).clip(0, 255).astype(np.uint8), labels


def _toy_drawn(seed, n, size):
    """The n toy training images: list of (set of class indices, image, labels)."""
    rng = np.random.default_rng([seed, 0])
    kinds = [[str(rng.choice(TOY_CLASSES[1:]))] if rng.random() > 0.2 else [] for _ in range(n)]
    return [({TOY_CLASSES.index(name) for name in names},
             *toy_scene(rng, size, names * int(rng.integers(1, 3)), int(rng.integers(0, 3)))) for names in kinds]


def toy_photos(seed, n, size=96):
    """n images with one tag or, one in five, none (the paper's regime: a single label an image); no masks."""
    tags, images, _ = zip(*_toy_drawn(seed, n, size))
    return tagged(list(images), tags, TOY_CLASSES, size=size, recipe=(seed, n, size))


def toy_scenes(seed, n, size=144):
    """n test scenes: list of (name, image (H, W, 3) uint8, labels (H, W) uint8).

    Two to four objects each, of one or two classes, as in nearly all photographs of VOC.
    """
    rng = np.random.default_rng([seed, 1])
    kinds = (rng.permutation(TOY_CLASSES[1:])[:rng.integers(1, 3)] for _ in range(n))
    return [(f"scene{i}", *toy_scene(rng, size, rng.choice(few, rng.integers(2, 5)), 2)) for i, few in enumerate(kinds)]


def augment(images, random, labels=None, flip=0.5, rotate=10.0, scale=0.2, brightness=0.2, contrast=0.2):
    """Section 4.1's jitter, drawn afresh for every image: flip, rotation, scale, shift, brightness, contrast.

    images (B, 3, H, W) uint8 or float in 0..255, on any device; labels (B, H, W) uint8 or None move along, void where
    nothing is. random (7, B): uniform in 0..1, what is drawn. Returns float images and the labels, same shapes.
    flip: chance; then the largest turn in degrees, log of scale, share of 255, change of contrast (the paper gives none).
    """
    flips, turns, zooms, lights, gains, *shifts = random.to(images.device, non_blocking=True) * 2 - 1    # (B,) in -1..1
    sign, angle, zoom = torch.where(flips < 2 * flip - 1, -1.0, 1.0), turns * rotate * np.pi / 180, torch.exp(zooms * scale)
    dx, dy = (shift * (1 - 1 / zoom.clamp(min=1)) for shift in shifts)
    cos, sin = torch.cos(angle) / zoom, torch.sin(angle) / zoom
    theta = torch.stack([cos * sign, -sin, dx, sin * sign, cos, dy], 1).view(-1, 2, 3)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    images = F.grid_sample(images.float(), grid, padding_mode="reflection", align_corners=False)
    if labels is not None:
        moved = F.grid_sample(labels[:, None].float() - VOID, grid, mode="nearest", align_corners=False)
        labels = (moved[:, 0] + VOID).to(torch.uint8)
    mean = images.mean((1, 2, 3), keepdim=True)
    light, gain = (x.view(-1, 1, 1, 1) for x in (lights * brightness * 255, 1 + gains * contrast))
    return ((images - mean) * gain + mean + light).clamp(0, 255), labels


def main():
    Parser(description=__doc__).parse_args()
    _, images, labels = zip(*toy_scenes(0, 6))
    sheet = np.vstack([np.hstack(images), voc_palette()[np.hstack(labels)]])
    write_atomically("out/toy.png", lambda file: Image.fromarray(sheet).save(file, "png"))
    tags = (" ".join(TOY_CLASSES[k] for k in np.unique(scene) if k) for scene in labels)
    print(f"out/toy.png: {len(images)} scenes; tags:", " | ".join(tags))


if __name__ == "__main__":
    run_cli(main)
