"""Photographs and tags: VOC, ImageNet, a folder of your own, and the toy set; the palette; masks as PNG.

    python data.py                          # draws toy examples into out/toy.png and prints their tags
    python data.py --imagenet DIR           # images per VOC class that the wnid table finds below DIR

    photos = voc_photos("VOCdevkit/VOC2012", "train")     # paths and tags; no way from here to a mask
    labels = read_labels("SegmentationClass/2007_000032.png")         # (H, W) uint8: 0..20, 255 void

Letters in shape comments: N images, B batch, K classes, H W pixels.
"""
import argparse
import contextlib
import csv
import dataclasses
import functools
import math
import os
import sys
import tempfile
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
Image.MAX_IMAGE_PIXELS = 500_000_000           # a 20,000 x 20,000 photograph is fine, a decompression bomb is not
warnings.filterwarnings("ignore", module=r"PIL\.")               # a broken photograph is named in one line of ours
warnings.simplefilter("error", Image.DecompressionBombWarning)


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
    """Call main(); the user's mistakes end as one line on stderr and exit status 2, ours keep their traceback."""
    if hasattr(sys.stdout, "reconfigure"):                                  # file names need not be valid text
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        sys.exit(main())
    except (InputError, OSError) as e:
        if not isinstance(e, InputError):
            e = f"{e.filename or ''}: {e.strerror or e}; check that it exists, may be used, and that the disk has room"
        print(f"{Path(sys.argv[0]).name}: {e}".replace("\n", " "), file=sys.stderr)
        sys.exit(2)


def progress(items, what, total=None):
    """Iterate with one line of done/total, rate and time left on stderr; silent when it is not a terminal."""
    total, start = total or len(items), time.perf_counter()
    for done, item in enumerate(items):
        yield item
        if sys.stderr.isatty():
            rate = (done + 1) / (time.perf_counter() - start)
            print(f"\r{what} {done + 1}/{total}  {rate:.1f}/s  {(total - done - 1) / rate:.0f} s left   ",
                  end="\n" if done + 1 == total else "", file=sys.stderr)


def write_atomically(path, write):
    """Call write(file) on a temporary file beside path, flush it to disk, then rename: path is whole or as before."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


@contextlib.contextmanager
def reading(path, expected):
    """Whatever goes wrong inside, while a file is read, becomes one InputError: the file, why, and what was expected."""
    try:
        yield
    except InputError:
        raise
    except Exception as e:                                # decoders and parsers raise many kinds on damaged files
        why = getattr(e, "strerror", None) or str(e).replace(str(path), "it").partition("\n")[0]
        why = why if 0 < len(why) < 160 else type(e).__name__            # torch's advice there is to execute the file
        raise InputError(f"{path}: {why}; expected {expected}") from e


# ---------------------------------------------------------------- masks and the palette

@functools.cache
def voc_palette():
    """The devkit's colours, (256, 3) uint8: bits of the index, three at a time, fill R, G, B from the highest bit."""
    bits = np.arange(256)[:, None] >> np.arange(9) & 1                                     # lowest first
    return (bits.reshape(256, 3, 3) * [[128], [64], [32]]).sum(1).astype(np.uint8)


def read_labels(path):
    """A label PNG as class indices, (H, W) uint8. Palette files must carry the VOC palette; plain grey is accepted.

    Raises InputError for RGB, 16-bit, re-coloured palettes and unreadable files.
    """
    with reading(path, "a whole label PNG"), Image.open(path) as image:
        if image.mode not in ("P", "L"):
            raise InputError(f"{path}: mode {image.mode}, but labels are palette or grey indices; save class indices")
        labels = np.asarray(image)
        palette = np.array(image.getpalette() if image.mode == "P" else voc_palette(), np.uint8).reshape(-1, 3)
    used = np.flatnonzero(np.bincount(labels.ravel()))
    if used[-1] >= len(palette) or (palette[used] != voc_palette()[used]).any():
        raise InputError(f"{path}: its colours are not VOC's; an adaptive palette has renumbered the classes, save with VOC's")
    return labels


def save_labels(path, labels):
    """Write (H, W) class indices as a palette PNG in VOC's 256 colours."""
    image = Image.fromarray(np.asarray(labels, np.uint8)).convert("L")
    image.putpalette(voc_palette().tobytes())
    write_atomically(path, lambda file: image.save(file, "png"))


# ---------------------------------------------------------------- photographs

def load_image(path, near=None):
    """An image file as (H, W, 3) uint8 RGB: EXIF rotation applied, alpha over white, CMYK, grey, palette, 16-bit read.

    near: a side in pixels that is enough; JPEGs are then decoded at a reduced size that is no smaller (faster).
    Raises InputError naming the file if it is not a whole image.
    """
    with reading(path, "a whole image; leave it out, or save it again"), Image.open(path) as image:
        if near:
            image.draft("RGB", (near, near))
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I") or image.mode == "F":                # 16-bit and float: scale to 8
            values = np.asarray(image, np.float64)
            image = Image.fromarray((values / (257 if values.max() > 255 else 1)).clip(0, 255).astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return np.asarray(image.convert("RGB"))


@dataclasses.dataclass
class Photos:
    """Tagged photographs: all that weak training may see. Indexing by (i, crop) reads image i at size x size.

    paths: files, or arrays (H, W, 3) uint8 already in memory. tags: (N, K) float32 of 0/1. classes: K names.
    """
    paths: list
    tags: torch.Tensor
    classes: list
    size: int = 0
    cut: bool = False                          # squares cut out (the paper) instead of whole photographs squashed

    def __len__(self):
        return len(self.paths)

    def image(self, i):
        """Photo i as it is, (H, W, 3) uint8."""
        return self.paths[i] if isinstance(self.paths[i], np.ndarray) else load_image(self.paths[i])

    def __getitem__(self, key):
        """(i, place of the cut in 0..1) -> image (3, size, size) uint8 and i; a broken file gives the next good one."""
        i, place = key
        for j in range(i, i + len(self)):
            path = self.paths[j % len(self)]
            try:
                image = path if isinstance(path, np.ndarray) else load_image(path, near=self.size)
            except InputError:
                continue
            (height, width), short = image.shape[:2], min(image.shape[:2])
            x, y = (width - short) * place, (height - short) * place           # a square with the short side, slid along
            image = Image.fromarray(image).resize((self.size, self.size), Image.BILINEAR,
                                                  (x, y, x + short, y + short) if self.cut else None)
            return torch.from_numpy(np.array(image)).permute(2, 0, 1), j % len(self)
        raise InputError(f"{self.paths[0]}: none of {len(self)} images can be read; mend or remove them")

    def take(self, keep):
        """The photographs at these indices, in this order."""
        return dataclasses.replace(self, paths=[self.paths[i] for i in keep], tags=self.tags[torch.as_tensor(keep)])


class Masked(Photos):
    """Photos that come with a label PNG each: for supervision per pixel only, and the one way from training to a mask."""

    @classmethod
    def of(cls, photos, folder):
        """Keep the photos with a mask <stem>.png in the folder, and those tagged background (background everywhere).

        For toy images the folder is the word "drawn": they are drawn with their masks.
        """
        if isinstance(photos.paths[0], np.ndarray):
            if folder != "drawn":
                raise InputError(f"--masks {folder}: toy images are in memory; their masks are --masks drawn")
            masked = cls(photos.paths, photos.tags, photos.classes, photos.size)
            masked.files, masked.rows = toy_masks(*photos.recipe), range(len(photos))
            return masked
        files = [Path(folder, f"{Path(p).stem}.png") for p in photos.paths]
        keep = [i for i, f in enumerate(files) if f.is_file() or photos.tags[i, 0] > 0]
        if not any(files[i].is_file() for i in keep):
            raise InputError(f"{folder}: no <image name>.png for any of the {len(photos)} training images")
        kept = photos.take(keep)
        masked = cls(kept.paths, kept.tags, kept.classes, kept.size)
        masked.files, masked.rows = [files[i] if files[i].is_file() else None for i in keep], keep
        return masked

    def labels(self, i):
        """Labels (size, size) uint8 of photo i, squashed as the photo is (nearest)."""
        if self.files[i] is None:
            return torch.zeros(self.size, self.size, dtype=torch.uint8)
        labels = self.files[i] if isinstance(self.files[i], np.ndarray) else read_labels(self.files[i])
        beyond = labels[(labels >= len(self.classes)) & (labels != VOID)]
        if len(beyond):
            raise InputError(f"{self.files[i]}: holds index {beyond[0]}; expected 0..{len(self.classes) - 1}, or 255 for void")
        image = Image.fromarray(labels)
        return torch.from_numpy(np.array(image.resize((self.size, self.size), Image.NEAREST)))

    @functools.cached_property
    def frequencies(self):
        """Share of each class among all labelled pixels, (K,). Reads every mask."""
        counts = sum(torch.bincount(self.labels(i).flatten().long(), minlength=256) for i in range(len(self)))
        counts = counts[:len(self.classes)].float()
        return counts / counts.sum().clamp(min=1)

    def __getitem__(self, key):
        image, i = super().__getitem__(key)
        return image, i, self.labels(i)


def one_hot(tags, classes):
    """List of sets of class indices -> (N, K) float32."""
    matrix = torch.zeros(len(tags), len(classes))
    for row, indices in zip(matrix, tags):
        row[list(indices)] = 1
    return matrix


def join(a, b):
    """Photos of a followed by those of b, which has the same classes."""
    return dataclasses.replace(a, paths=a.paths + b.paths, tags=torch.cat([a.tags, b.tags]))


# ---------------------------------------------------------------- VOC

def read_lines(path, what):
    """Non-empty lines of a text file. Raises InputError that says what was expected."""
    try:
        return [line.strip() for line in Path(path).read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as e:
        raise InputError(f"{path}: cannot read this file ({getattr(e, 'strerror', 'not text')}); expected {what}") from e


def voc_ids(voc, name, kinds=("Segmentation", "Main")):
    """Ids of a set: of ImageSets/<kind>/<name>.txt, the first kind that exists.

    Lists in any usual form: bare ids, image and mask paths, or SBD paths; the stem counts. Raises InputError.
    """
    if Path(name).name != name:
        raise InputError(f"--set {name}: not the name of a list in {voc}/ImageSets; give one, such as val")
    lists = [Path(voc, "ImageSets", kind, f"{name}.txt") for kind in kinds]
    path = next((p for p in lists if p.exists()), lists[0])
    ids = [Path(line.split()[0]).stem for line in read_lines(path, "one image id a line, in a devkit's VOC2012 folder")]
    bad = [i for i in ids if not i.strip(".") or set(i) & set("\\:\0")]
    if not ids or bad or len(set(ids)) < len(ids):
        raise InputError(f"{path}: {'no ids' if not ids else f'bad id {bad[0]!r}' if bad else 'an id is listed twice'}; "
                         "expected different image ids, one a line")
    return ids


def voc_tags(voc, name):
    """{id: (classes present, classes only present as difficult)} of Main/<class>_<name>.txt, as class indices."""
    tags = {}
    for k, label in enumerate(VOC_CLASSES[1:], 1):
        path = Path(voc, "ImageSets", "Main", f"{label}_{name}.txt")
        for line in read_lines(path, "an id and 1, -1 or 0 a line") if path.exists() else ():
            i, flag = (line.split() + [""])[:2]
            if flag not in ("1", "-1", "0"):
                raise InputError(f"{path}: '{line[:40]}'; expected an id and 1, -1 or 0")
            present, difficult = tags.setdefault(i, (set(), set()))
            {"1": present, "0": difficult, "-1": set()}[flag].add(k)
    return tags


def xml_tags(path):
    """(classes present, classes only present as difficult) of one Annotations file, as sets of class indices."""
    present, difficult = set(), set()
    try:
        root = ElementTree.parse(path).getroot()
        if root.tag != "annotation":
            raise ValueError(f"it holds <{root.tag}>, not <annotation>")
        for obj in root.findall("object"):                                    # its own name, not those of its parts
            name = obj.findtext("name", "").strip()
            if name in VOC_CLASSES[1:]:
                (difficult if obj.findtext("difficult", "0").strip() == "1" else present).add(VOC_CLASSES.index(name))
    except (OSError, ElementTree.ParseError, ValueError, LookupError) as e:
        raise InputError(f"{path}: cannot read these tags ({e}); needed for images that ImageSets/Main does not list") from e
    return present, difficult - present


def voc_photos(voc, name):
    """Photos of a VOC set with its tags: from ImageSets/Main where listed there, else from Annotations/*.xml.

    A class present only as difficult objects counts as present. An image with no class is tagged background.
    """
    listed, ids = voc_tags(voc, name), voc_ids(voc, name, ("Main", "Segmentation"))
    pairs = [listed.get(i) or xml_tags(Path(voc, "Annotations", f"{i}.xml")) for i in ids]
    images = [Path(voc, "JPEGImages", f"{i}.jpg") for i in ids]
    return Photos(images, one_hot([a | b or {0} for a, b in pairs], VOC_CLASSES), VOC_CLASSES)


# ---------------------------------------------------------------- a folder with tags.csv

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp"}


def image_files(folder):
    """All image files below a folder, sorted. Raises InputError if there are none."""
    files = sorted(p for p in Path(folder).rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise InputError(f"{folder}: no such folder, or no image below it ({' '.join(sorted(IMAGE_SUFFIXES))})")
    return files


def read_csv(path, example):
    """Rows of a CSV text file, blank lines left out. Raises InputError."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            return [row for row in csv.reader(file) if row]
    except (UnicodeDecodeError, csv.Error) as e:
        raise InputError(f"{path}: not a CSV text file ({e}); expected lines such as  {example}") from e


def folder_photos(folder, tags):
    """Photos of one's own: a CSV of file,tag;tag;... with paths inside the folder. No tag, or `background`: background.

    Classes are background and then the tags in alphabetical order. Raises InputError naming file and line.
    """
    rows = read_csv(tags, "photo.jpg,cat;dog")
    if rows and rows[0][0].strip().lower() in ("file", "image", "filename"):
        rows = rows[1:]
    paths, sets = [], []
    for number, row in enumerate(rows, 1):
        if len(row) != 2:
            raise InputError(f"{tags}: line {number} has {len(row)} columns; expected  file,tag;tag;...")
        path = Path(folder, row[0].strip().replace("\0", "?"))
        if not path.resolve().is_relative_to(Path(folder).resolve()) or not path.is_file():
            raise InputError(f"{tags}: line {number}: no file '{row[0].strip()}'; expected one inside {folder}")
        paths.append(path)
        sets.append({t.strip() for t in row[1].split(";") if t.strip()} - {"background"})
    classes = ["background"] + sorted(set().union(*sets))
    if not 2 <= len(classes) <= VOID:
        raise InputError(f"{tags}: {len(classes) - 1} classes; expected 1 to {VOID - 1}, as in  photo.jpg,cat;dog")
    return Photos(paths, one_hot([{classes.index(t) for t in s} or {0} for s in sets], classes), classes)


# ---------------------------------------------------------------- ImageNet

# The ILSVRC-2012 classes below each VOC class: eight digits of a wnid, or an inclusive range of them.
VOC_WNIDS = {
    "aeroplane": "02690373 04552348", "bicycle": "02835271 03792782",
    "bird": "01514668-01622779 01795545-01860187 02002556-02058221",
    "boat": "02951358 02981792 03095699 03344393 03447447 03662601 03673027 03947888 04147183 04273569 04483307 04612504",
    "bottle": "02823428 03983396 04557648 04591713", "bus": "03769881 04146614 04487081",
    "car": "02814533 02930766 03100240 03594945 03670208 03770679 03777568 04037443 04285008",
    "cat": "02123045-02124075", "chair": "02791124 03376595 04099969 04429376", "cow": "02403003",
    "diningtable": "03201208", "dog": "02085620-02113978", "horse": "02389026", "motorbike": "03785016 03791053",
    "person": "09835506-10565667", "pottedplant": "03991062", "sheep": "02412080", "sofa": "04344873",
    "train": "02917067 03272562 03393912 03895866 04310018", "tvmonitor": "03782006 04152593 04404412"}
# In neither: the photograph usually holds a VOC object, or shows something too much like one to be background.
AMBIGUOUS_WNIDS = """
01440764 02114367-02116738 02119022-02120505 02125311-02130308 02391049 02408429 02410509 02415577 02417914 02514041
02536864 02640242 02641379 02667093-02687172 02701002 02704792 02730930 02749479 02769748 02777292 02786058 02787622
02790996 02791270 02799071 02802426 02804610 02807133 02817516 02834397 02837789 02859443 02860847 02869837 02879718
02883205 02892767 02916936 02927161 02963159-02966193 02974003 02992211 03000247 03045698 03085013 03110669 03124170
03125729 03127747 03141823 03179701 03180011 03188531 03216828 03218198 03249569-03255030 03272010 03290653 03325584
03345487 03372029 03379051 03394916 03404251-03425413 03444034 03445924 03450230 03457902-03461385 03476684 03476991
03494278 03495258 03529860 03534580-03538406 03594734 03595614 03599486 03617480 03623198 03630383 03642806 03661043
03676483 03690938 03710637 03710721 03721384 03724870 03733131 03759954 03763968 03770439 03787032 03793489 03796401
03803284 03814639-03832673 03838899 03857828-03868863 03873416 03874293 03877472 03884397 03888605-03891332 03899768
03916031 03929855 03930630 03937543 03942813 03977966-03982430 03992509 04019541 04023962 04039381 04065272 04081281
04090263 04118538 04133789-04141076 04162706 04209133 04228054-04235860 04251144 04252077 04254680 04254777 04259630
04266014 04296562 04311174-04325704 04335435 04336792 04347754 04350905 04355933-04357314 04370456-04371774 04409515
04418357 04456115 04461696 04467665 04479046 04482393 04487394 04493381 04507155 04509417 04522168 04532106 04536866
04540053 04560804 04579145 04584207 04590129 04591157 04592741 04606251 06359193 07892512"""

def wnid_class(wnid):
    """VOC class of an ILSVRC-2012 wnid such as n02123045, "background", or None where it is ambiguous."""
    def listed(spans):
        return any(int(span[:8]) <= int(wnid[1:]) <= int(span[-8:]) for span in spans.split())
    if listed(AMBIGUOUS_WNIDS):
        return None
    return next((name for name, spans in VOC_WNIDS.items() if listed(spans)), "background")


def read_synsets(path):
    """CSV of wnid,class -> {wnid: class index}, for other trees than ILSVRC. Raises InputError naming the line."""
    table = {}
    for number, row in enumerate(read_csv(path, "n02123045,cat"), 1):
        if len(row) != 2 or row[1].strip() not in VOC_CLASSES:
            raise InputError(f"{path}: line {number}: '{','.join(row)[:60]}'; expected a wnid and a VOC class or background")
        table[row[0].strip()] = row[1].strip()
    return table


def imagenet_photos(folder, synsets=""):
    """Photos of <wnid>/ folders, one tag an image (section 4.1). Folders whose wnid has no class are left out.

    synsets: a CSV of wnid,class in place of the built-in table of the 1,000 ILSVRC classes.
    """
    table, paths, tags = read_synsets(synsets) if synsets else None, [], []
    wnids = sorted(p for p in Path(folder).glob("n[0-9]*") if p.is_dir() and p.name[1:].isdigit())
    for wnid in wnids:
        name = table.get(wnid.name) if table else wnid_class(wnid.name)
        if name:
            found = sorted(p for p in wnid.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
            paths += found
            tags += [{VOC_CLASSES.index(name)}] * len(found)
    if not paths:
        raise InputError(f"{folder}: no image of a known class in its {len(wnids)} <wnid>/ folders; expected n02123045/x.JPEG")
    return Photos(paths, one_hot(tags, VOC_CLASSES), VOC_CLASSES)


# ---------------------------------------------------------------- the toy set

TOY_CLASSES = ["background", "stripes", "checker", "speckle", "grid"]


def _toy_texture(kind, u, v, period, rng):
    """Two-tone pattern (H, W) bool in an object's own rotated coordinates, pixels."""
    wave = 2 * np.pi / period
    return {"stripes": np.sin(wave * u) > 0,
            "checker": (np.sin(wave * u / 1.3) > 0) ^ (np.sin(wave * v / 1.3) > 0),
            "speckle": ndimage.uniform_filter(rng.random(u.shape), 2) > 0.5,
            "grid": np.maximum(np.cos(wave * u / 1.2), np.cos(wave * v / 1.2)) > 0.75}[kind]


def _toy_shape(kind, u, v):
    """Outline (H, W) bool in coordinates where the object's radius is 1."""
    return {"stripes": u ** 2 + (v / 0.7) ** 2 < 1,                                        # ellipse
            "checker": np.maximum(abs(u), abs(v)) < 0.8,                                   # square
            "speckle": (v > -0.6) & (v < 0.95 - 1.7 * abs(u)),                                # triangle
            "grid": np.minimum(abs(u), abs(v)) < 0.5 * (np.hypot(u, v) < 1)}[kind]       # cross


def toy_scene(rng, size, kinds, distractors):
    """Draw objects of these classes, and distractors that belong to none, on a textured background.

    rng: numpy Generator. kinds: list of class names. Returns image (size, size, 3) uint8, labels (size, size) uint8.
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
            inside = _toy_shape(kind or str(rng.choice(TOY_CLASSES[1:])), u / radius, v / radius)
            if (labels[inside] > 0).mean() < 0.1:
                break
        if kind:
            pattern = _toy_texture(kind, u, v, rng.uniform(5, 8), rng)
        else:                                                                              # plain, or two halves
            pattern = u > rng.choice([0, size])
        dark = rng.uniform(0, 255, 3)
        light = (dark + rng.choice([-1, 1], 3) * rng.uniform(70, 128, 3)) % 256
        image[inside] = np.where(pattern[..., None], light, dark)[inside]
        labels[inside] = TOY_CLASSES.index(kind) if kind else 0
    noisy = image + rng.normal(0, 8, image.shape)
    return noisy.clip(0, 255).astype(np.uint8), labels


def _toy_drawn(seed, n, size):
    """The n toy training images: list of (class names, image, labels)."""
    rng = np.random.default_rng([seed, 0])
    kinds = [[str(rng.choice(TOY_CLASSES[1:]))] if rng.random() > 0.2 else [] for _ in range(n)]
    return [(k, *toy_scene(rng, size, k * int(rng.integers(1, 3)), int(rng.integers(0, 3)))) for k in kinds]


def toy_photos(seed, n, size=96):
    """n images with one tag or, one in five, none (the paper's regime: a single label an image); no masks."""
    kinds, images, _ = zip(*_toy_drawn(seed, n, size))
    tags = one_hot([{TOY_CLASSES.index(k[0])} if k else {0} for k in kinds], TOY_CLASSES)
    photos = Photos(list(images), tags, TOY_CLASSES, size)
    photos.recipe = seed, n, size
    return photos


def toy_masks(seed, n, size):
    """Labels (size, size) uint8 of the same n images, for the fully supervised upper bound only."""
    return [labels for _, _, labels in _toy_drawn(seed, n, size)]


def toy_scenes(seed, n, size=144):
    """n test scenes with two to four objects each: list of (name, image (H, W, 3) uint8, labels (H, W) uint8)."""
    rng = np.random.default_rng([seed, 1])
    return [(f"scene{i}", *toy_scene(rng, size, rng.choice(TOY_CLASSES[1:], rng.integers(2, 5)), 2)) for i in range(n)]


# ---------------------------------------------------------------- augmentation, on the batch and its device

def augment(images, random, labels=None, flip=0.5, rotate=10.0, scale=0.2, brightness=0.2, contrast=0.2):
    """Section 4.1's jitter, drawn afresh for every image: flip, rotation, scale, shift, brightness, contrast.

    images (B, 3, H, W) uint8 or float in 0..255, on any device; labels (B, H, W) uint8 or None move along, void where
    nothing is. random (7, B): uniform in 0..1, what is drawn. Returns float images and the labels, same shapes.
    flip: chance; rotate: degrees; scale, brightness, contrast: largest relative change (ranges: the paper gives none).
    """
    spread = iter(random.to(images.device, non_blocking=True) * 2 - 1)                    # each (B,), in -1..1
    sign, angle, zoom = torch.where(next(spread) < 2 * flip - 1, -1.0, 1.0), next(spread) * rotate * math.pi / 180, \
        torch.exp(next(spread) * scale)
    light, gain = (x.view(-1, 1, 1, 1) for x in (next(spread) * brightness * 255, 1 + next(spread) * contrast))
    shift = torch.stack([next(spread), next(spread)], 1) * (1 - 1 / zoom.clamp(min=1))[:, None]
    cos, sin = torch.cos(angle) / zoom, torch.sin(angle) / zoom
    theta = torch.stack([torch.stack([cos * sign, -sin], 1), torch.stack([sin * sign, cos], 1)], 1)       # (B, 2, 2)
    grid = F.affine_grid(torch.cat([theta, shift[:, :, None]], 2), list(images.shape), align_corners=False)
    images = F.grid_sample(images.float(), grid, padding_mode="reflection", align_corners=False)
    if labels is not None:
        moved = F.grid_sample(labels[:, None].float() - VOID, grid, mode="nearest", align_corners=False)
        labels = (moved[:, 0] + VOID).to(torch.uint8)
    mean = images.mean((1, 2, 3), keepdim=True)
    return ((images - mean) * gain + mean + light).clamp(0, 255), labels


def main():
    parser = Parser(description=__doc__)
    parser.add_argument("--imagenet", metavar="DIR", help="count the images per VOC class below this folder instead")
    args = parser.parse_args()
    if args.imagenet:
        photos = imagenet_photos(args.imagenet)
        for name, count in zip(VOC_CLASSES, photos.tags.sum(0)):
            print(f"{name:12} {int(count):8,}")
        return
    scenes = toy_scenes(0, 6)
    sheet = Image.fromarray(np.vstack([np.hstack([s[1] for s in scenes]),
                                       np.hstack([voc_palette()[s[2]] for s in scenes])]))
    write_atomically("out/toy.png", lambda file: sheet.save(file, "png"))
    print(f"out/toy.png: {len(scenes)} scenes; tags: "
          + " | ".join(" ".join(TOY_CLASSES[k] for k in np.unique(s[2]) if k) for s in scenes))


if __name__ == "__main__":
    run_cli(main)
