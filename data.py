"""Photographs and tags: VOC, ImageNet, a folder of your own, toys; label PNGs; the feature cache.

    photos = voc_photos("VOCdevkit/VOC2012", "train")     # paths and tags, no masks

Letters in shape comments: N images, B batch, K classes, H W pixels, h w cells, D channels.
Files that cannot be used raise InputError.
"""

import argparse
import contextlib
import csv
import dataclasses
import functools
import hashlib
import json
import os
import re
import shutil
import sys
import time
import unicodedata
import warnings
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image, ImageOps
from PIL.PngImagePlugin import PngInfo
from scipy import ndimage

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

VOID = 255
VOC_CLASSES = [
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair",
    "cow", "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa",
    "train", "tvmonitor",
]  # fmt: skip
SYNSETS = Path(__file__).resolve().parent / "assets/synsets.csv"  # one VOC class or none, each
Image.MAX_IMAGE_PIXELS = 250_000_000  # twice this number is a decompression bomb
warnings.filterwarnings("ignore", module=r"PIL\.")  # a broken photograph is named by us


# ---------------------------------------------------------------- errors and files
class InputError(ValueError):
    """Something the user gave cannot be used: one line that names it and the remedy."""


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors and no abbreviated flags."""

    def __init__(self, **kwargs):
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(formatter_class=formatter, allow_abbrev=False, **kwargs)

    def error(self, message):
        raise InputError(f"{message} (--help lists the options)")


def run_cli(main):
    """Call main(). What the user can mend ends as one line on stderr and status 2."""
    if hasattr(sys.stdout, "reconfigure"):  # file names need not be valid text
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        for word in sys.argv[1:]:
            unset = word.startswith("--") and word.endswith("=")  # a shell variable
            if not word or unset:
                raise InputError(f"argument '{word}': empty; expected a value")
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
    except (InputError, OSError, argparse.ArgumentTypeError) as e:
        message = one_line(e)
    except (MemoryError, RuntimeError) as e:
        if isinstance(e, RuntimeError) and not re.search("out of memory|allocate", str(e)):
            raise
        message = "memory is used up; give a smaller --batch, --size or --sides, fewer --workers"
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    sys.exit(2)


def one_line(e):
    """What an InputError or OSError says."""
    message = f"{e.filename}: {e.strerror}" if getattr(e, "filename", None) else str(e)
    if isinstance(e, (FileExistsError, NotADirectoryError)):
        message += "; expected a folder there"
    elif getattr(e, "errno", None):
        message += "; check that it exists, may be used, and that the disk has room"
    return message.replace("\n", " ")


def progress(items, what):
    """Iterate, with a line of done/total, rate and time left on stderr if that is a terminal."""
    total, start = len(items), time.perf_counter()
    for done, item in enumerate(items, 1):
        yield item
        if sys.stderr.isatty():
            rate = done / (time.perf_counter() - start)
            left = f"{rate:.1f}/s  {(total - done) / rate:.0f} s left   "
            end = "\n" if done == total else ""
            print(f"\r{what} {done}/{total}  {left}", end=end, file=sys.stderr)


def spread(n, k):
    """k of n indices, evenly spread, or all of them."""
    return np.linspace(0, n - 1, min(n, k)).astype(int).tolist()


def claim(out):
    """Make a folder this run's own as long as it lives. Returns its open lock."""
    Path(out).mkdir(parents=True, exist_ok=True)
    lock = open(Path(out, ".lock"), "w")  # noqa: SIM115 (open, and so locked, as long as the run)
    try:
        if fcntl:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        raise InputError(f"{out}: another run writes there; wait, or give another --out") from e
    return lock


def move_aside(folder, files):
    """Put those files of an earlier run that there are into a folder of their own, run<n>."""
    files = [path for path in files if path.exists()]
    if not files:
        return
    number = 1
    while (aside := Path(folder, f"run{number}")).exists():
        number += 1
    aside.mkdir()
    for path in files:
        path.rename(aside / path.name)
    print(f"{folder}: the run that was there is now in {aside}")


@functools.cache
def say_once(text):
    """A line on stderr, if this process has not printed it before."""
    print(text, file=sys.stderr)


@contextlib.contextmanager
def writing(path):
    """A file that takes path's place when the block has ended: path is whole, or as before."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.{os.getpid()}"
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as e:  # torch hides a full disk behind the latter
        if isinstance(e, RuntimeError) and "memory" in str(e):
            raise
        why = getattr(e, "strerror", None) or "disk full?"
        raise InputError(f"{path}: cannot be written ({why}); make room, or write elsewhere") from e
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path, report):
    """Write a dict or list as JSON."""
    with writing(path) as file:
        file.write(json.dumps(report, indent=1).encode())


@contextlib.contextmanager
def reading(path, expected):
    """What goes wrong inside, while a file is read, becomes one InputError: file, why, expected."""
    try:
        yield
    except Exception as e:  # decoders and parsers raise many kinds on damaged files
        if isinstance(e, InputError) or getattr(e, "filename", None):
            raise  # it names its file
        why = str(e).partition("\n")[0]
        if not 0 < len(why) < 160:  # torch's long message advises to execute the file
            why = type(e).__name__
        raise InputError(f"{path}: {why}; expected {expected}") from e


def read_rows(path, expected, columns=0):
    """Non-blank rows of a text file: lists of `columns` cells between commas, or (0) of words."""
    with reading(path, expected), open(path, newline="", encoding="utf-8-sig") as file:
        lines = csv.reader(file) if columns else [line.split() for line in file]
        rows = [[cell.strip() for cell in cells] for cells in lines]
        rows = [row for row in rows if any(row)]
        wrong = [row for row in rows if (columns and len(row) != columns) or "\0" in "".join(row)]
        if wrong:
            raise ValueError(f"a line of {len(wrong[0])} cells, {wrong[0][0][:40]!r}")
        return rows


# ---------------------------------------------------------------- label PNGs and photographs
@functools.cache
def voc_palette():
    """The devkit's colours, (256, 3) uint8: bits 0, 3, 6 of an index are R's 128, 64, 32; so on."""
    bits = np.arange(256)[:, None] >> np.arange(9) & 1  # lowest first
    return (bits.reshape(256, 3, 3) * [[128], [64], [32]]).sum(1).astype(np.uint8)


def read_labels(path):
    """A label PNG as class indices, (H, W) uint8: VOC's palette, or plain grey."""
    expected = "class indices in VOC's palette; if its numbers are that, save them as plain grey"
    with reading(path, expected), Image.open(path) as image:
        grey_levels = image.tile and image.tile[0][3] in ("L;2", "L;4")  # 2 or 4 bits, stretched
        if image.mode not in ("P", "L") or grey_levels:
            raise ValueError(f"mode {image.mode}, neither palette nor 8-bit grey")
        labels = np.asarray(image)
        colours = np.asarray(image.convert("RGB"))
        if image.mode == "P" and (colours != voc_palette()[labels]).any():
            raise ValueError("a palette of other colours")
    return labels


def read_notes(path):
    """What infer.py has noted in a PNG: (its classes, a comment); "" in any other's place."""
    with reading(path, "a PNG"), Image.open(path) as image:
        return image.info.get("Classes", ""), str(image.info.get("Comment", ""))


def read_truth(path):
    """A true mask as class indices, (H, W) uint8; raises InputError if it is infer.py's."""
    if read_notes(path)[0]:
        raise InputError(f"{path}: labels that infer.py made; expected a true mask")
    return read_labels(path)


def save_labels(path, labels, classes=(), comment=""):
    """Write (H, W) class indices as a palette PNG in VOC's 256 colours, with its notes."""
    image = Image.fromarray(np.asarray(labels, np.uint8))
    image.putpalette(voc_palette().tobytes())
    save_png(path, image, classes, comment)


def save_png(path, image, classes, comment="", **options):
    """Write a picture of infer.py's with its notes (see read_notes); options: Pillow's."""
    notes = PngInfo()
    notes.add_text("Classes", ";".join(classes))
    notes.add_text("Comment", comment)
    with writing(path) as file:
        image.save(file, "png", pnginfo=notes, **options)


def to_8_bits(values):
    """(H, W) of a 16-bit or float image -> float 0..255; its full scale is told by the values."""
    if not 0 <= values.min() <= values.max() < 2**16:
        raise ValueError("values below 0, above 16 bits, or NaN")
    largest = np.percentile(values, 99.5)  # but for a few: a hot pixel, a highlight
    full = min(2**bits - 1 for bits in (8, 10, 12, 14, 16) if largest < 2**bits)
    if values.dtype.kind == "f" and largest < 2:  # 0..1, and what overshoots it
        full = 1
    advice = "if another range is named, too, save all as 8 bits in one"
    say_once(f"16-bit or float photographs: some have the range 0..{full}; {advice}")
    return (values.astype(np.float64) * 255 / full).clip(0, 255)


def load_image(path, near=None):
    """An image file of any mode as (H, W, 3) uint8 RGB, upright, its first frame; or an array.

    near: a side in pixels to which a JPEG may be reduced while it is decoded, but not below it."""
    if isinstance(path, np.ndarray):
        return path
    expected = "a whole image that Pillow reads; leave it out, or save it as JPEG or PNG"
    with reading(path, expected), Image.open(path) as image:
        if getattr(image, "n_frames", 1) > 1 and image.format in ("TIFF", "GIF"):
            say_once("photographs of several pages or frames: the first one is read")
        deep = image.mode[0] not in "IF" and image.tile and ";16" in str(image.tile[0][3])
        if near:
            image.draft("RGB", (near, near))
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I") or image.mode == "F":
            image = Image.fromarray(to_8_bits(np.asarray(image)).astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            # A fourth channel that does not span 0..255 is another one, such as infrared.
            if image.getchannel("A").getextrema() == (0, 255):
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        pixels = np.asarray(image.convert("RGB"))
        if deep and pixels.max() < 64:  # 12 or 14 bits, of which Pillow takes the upper 8 of 16
            raise ValueError(f"black: no value is above {pixels.max()} of 255")
        # Nearly every photograph differs in its first row already.
        flat = (pixels[0] == pixels[0, 0]).all() and (pixels == pixels[0, 0]).all()
        if flat and pixels.size > 3:
            raise ValueError(f"one colour everywhere, {pixels[0, 0].tolist()}")
        return pixels


def shrink(image, longest=1000):
    """image (H, W, 3) uint8 reduced, if need be, to so many pixels along its longer side."""
    small = Image.fromarray(image)
    small.thumbnail((longest, longest))
    return np.asarray(small)


@dataclasses.dataclass
class Photos:
    """Tagged photographs: all that weak training may see. Indexing by (i, draw) reads image i.

    draw: random, 0..1: where to crop, or from 0.5 on to mirror. Cached features, if any, come in
    the place of pixels; mirrored, they are nearly those of the mirrored photograph."""

    paths: list  # files, or arrays (H, W, 3) uint8 already in memory
    tags: torch.Tensor  # (N, K) float32 of 0/1; background only where there is no object
    classes: list  # K names
    size: int = 0  # pixels along each side of what indexing gives
    crop: bool = False  # squares cropped (the paper) instead of whole photographs squashed
    labels: np.ndarray | None = None  # (N, h, w) uint8: under the score map's cells, if any
    features: np.ndarray | None = None  # (rows, D, h, w) float16: cached, if any
    feature_rows: list = ()  # the row of each photo's features
    mirror: bool = False  # mirror features where draw >= 0.5

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, key):
        """(i, draw) -> i, image (3, size, size) uint8 or features, labels (h, w) or None.

        A broken photograph gives what is wrong with it, a string, in the place of its pixels."""
        i, draw = key
        labels = None if self.labels is None else torch.from_numpy(self.labels[i])
        if self.features is not None:
            x = torch.from_numpy(self.features[self.feature_rows[i]].copy())
            if self.mirror and draw >= 0.5:
                x = x.flip(-1)
                labels = None if labels is None else labels.flip(-1)
            return i, x, labels
        try:
            image = Image.fromarray(load_image(self.paths[i], near=self.size))
        except (InputError, OSError) as e:
            return i, one_line(e), None
        square = (self.size, self.size)
        if self.crop:
            image = ImageOps.fit(image, square, Image.BILINEAR, 0, (draw, draw))
        else:
            image = image.resize(square, Image.BILINEAR)
        return i, torch.from_numpy(np.array(image)).permute(2, 0, 1), labels

    def take(self, keep):
        """The photographs at these indices, in this order; before features are cached."""
        paths = [self.paths[i] for i in keep]
        labels = None if self.labels is None else self.labels[keep]
        return dataclasses.replace(self, paths=paths, tags=self.tags[keep], labels=labels)


def collate(items):
    """What indexing gives, as a batch: indices, pixels, labels or None, {index: what is wrong}."""
    broken = {i: pixels for i, pixels, _ in items if isinstance(pixels, str)}
    whole = [item for item in items if item[0] not in broken]
    if not whole:
        return [], None, None, broken
    indices, pixels, labels = zip(*whole)
    labels = None if labels[0] is None else torch.stack(labels)
    return list(indices), torch.stack(pixels), labels, broken


def read_batches(photos, keys, workers=0, pin=False):
    """Yield a batch (see collate) for each list of (i, draw) in keys. Raises InputError."""
    options = {"num_workers": workers, "collate_fn": collate, "pin_memory": pin}
    loader = torch.utils.data.DataLoader(photos, batch_sampler=keys, **options)
    try:
        yield from loader
    except RuntimeError as e:  # torch's, when one of its processes is gone
        why = "a loader process has died, for want of shared memory (/dev/shm) or memory"
        raise InputError(f"--workers {workers}: {why}; give --workers 0") from e


def note_broken(photos, broken, known):
    """Name each broken photo once: broken {index: why}, known: those named, which grows.

    Raises InputError where more than 1 % of 100 or more photographs are broken, or all of them."""
    for i in broken.keys() - known.keys():
        known[i] = broken[i]
        print(f"left out: {broken[i]}", file=sys.stderr)
    many = len(photos) >= 100 and len(known) > 0.01 * len(photos)
    if many or len(known) == len(photos):
        count = f"{len(known)} of {len(photos)} photographs cannot be read"
        raise InputError(f"{count}, such as {known[min(known)]}")


# ---------------------------------------------------------------- the feature cache
def identity(path):
    """What a photograph's features depend on, but for the network: file, size, time of change."""
    if isinstance(path, np.ndarray):
        return hashlib.sha256(path.tobytes()).hexdigest()
    if not os.path.exists(path):
        return f"{path} is missing"  # so it will be named when it is read
    stat = os.stat(path)
    return f"{Path(path).resolve()} {stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns}"


def with_features(photos, compute, network, folder, workers, mirror):
    """The photos, less the broken ones, with their features; computed where the folder has none.

    compute: images (B, 3, size, size) uint8 -> (B, D, h, w); network: a string that says all it
    depends on. A cache is named after all it was made from: a folder holds many."""
    shape = compute(torch.zeros(1, 3, photos.size, photos.size)).shape[1:]
    content = [network, photos.size, shape, [identity(path) for path in photos.paths]]
    key = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
    file, note = Path(folder, f"{key}.npy"), Path(folder, f"{key}.json")
    full_shape = (len(photos), *shape)
    if not file.exists() or not note.exists():
        write_features(file, note, photos, compute, full_shape, workers)

    with reading(file, "features as this code writes them; delete it"):
        features = np.load(file, mmap_mode="r")
        broken = set(json.loads(note.read_text()))
        if features.shape != full_shape or features.dtype != np.float16:
            raise ValueError(f"{features.dtype} {features.shape}")
    if broken:
        print(f"{len(broken)} photographs could not be read when {file} was made; left out")
    whole = [i for i in range(len(photos)) if i not in broken]
    kept = photos.take(whole)
    return dataclasses.replace(kept, features=features, feature_rows=whole, mirror=mirror)


def write_features(file, note, photos, compute, full_shape, workers, block=16):
    """Write an .npy file block by block, and the broken photos' indices to the file note."""
    file.parent.mkdir(parents=True, exist_ok=True)
    needed, free = 2 * np.prod(full_shape), shutil.disk_usage(file.parent).free
    sizes = f"{needed / 1e9:.3f} GB are needed, {free / 1e9:.3f} are free"
    if needed > free:
        raise InputError(f"{file.parent}: {sizes}; make room, or give another --cache")
    print(f"caching features in {file}: {sizes}", flush=True)

    keys = [(i, 0.5) for i in range(len(photos))]
    blocks = [keys[start : start + block] for start in range(0, len(keys), block)]
    known_broken, batches = {}, read_batches(photos, blocks, workers)
    with writing(file) as out:
        header = {"descr": "<f2", "fortran_order": False, "shape": full_shape}
        np.lib.format.write_array_header_1_0(out, header)
        for part, (indices, images, _, broken) in zip(progress(blocks, "blocks cached"), batches):
            note_broken(photos, broken, known_broken)
            features = np.zeros((len(part), *full_shape[1:]), np.float16)
            if indices:
                features[np.array(indices) - part[0][0]] = compute(images).half().cpu().numpy()
            out.write(features.tobytes())
    write_json(note, sorted(known_broken))


# ---------------------------------------------------------------- masks: for --masks only
def find_masks(photos, folder):
    """(photos, files): those to learn from per pixel, each one's mask; None: background.

    A mask is <photograph's name>.png; a photo without one counts if its only tag is background."""
    files = {}
    for path in sorted(Path(folder).glob("*")):
        if path.suffix.lower() == ".png":
            files[path.stem] = path
    masks = [files.get(Path(path).stem) for path in photos.paths]
    masked = [i for i, mask in enumerate(masks) if mask]
    counts = f"{len(masked)} of {len(photos)} photographs have a mask"
    if not masked or len({masks[i] for i in masked}) < len(masked):
        wanted = "expected <photograph's name>.png, and no two photographs of one name"
        raise InputError(f"--masks {folder}: {counts}; {wanted}")
    say_turned([photos.paths[i] for i in masked])
    kept = [i for i, mask in enumerate(masks) if mask or photos.tags[i, 0] > 0]
    plain, left_out = len(kept) - len(masked), len(photos) - len(kept)
    print(f"--masks {folder}: {counts}, {plain} others are background alone, {left_out} left out")
    return photos.take(kept), [masks[i] for i in kept]


def say_turned(paths):
    """Print how many photographs with a true mask EXIF turns: half a turn leaves the size alone."""
    turned = 0
    for path in paths:
        with reading(path, "an image"), Image.open(path) as image:
            turned += image.getexif().get(ExifTags.Base.Orientation, 1) != 1
    if turned:
        print(f"EXIF turns {turned} photographs; their masks have to be of the upright ones")


def read_mask(path, photo, classes):
    """(labels (H, W) uint8, whether infer.py made them) of a photograph.

    Raises InputError if they are of another photograph or of other classes."""
    meant = read_notes(path)[0]
    if meant not in ("", ";".join(classes)):
        raise InputError(f"{path}: labels of {meant}; expected those of {';'.join(classes)}")
    labels, shape = read_labels(path), load_image(photo).shape[:2]
    if labels.shape != shape:
        raise InputError(f"{path}: {labels.shape[::-1]} pixels, its photo, upright, {shape[::-1]}")
    highest = labels.max(where=labels != VOID, initial=0)
    if highest >= len(classes):
        raise InputError(f"{path}: holds index {highest}; expected below {len(classes)}, or 255")
    return labels, bool(meant)


# ---------------------------------------------------------------- names and tags
# What tables and tools write where there is no class, or where a column is no list of tags.
NO_CLASS = [
    "nan", "na", "null", "yes", "no", "true", "false", "empty", "blank", "unknown", "unlabeled",
    "unlabelled", "negative",
]  # fmt: skip


def class_name(text, where):
    """A name with single spaces, composed; raises InputError where it looks like several."""
    text = unicodedata.normalize("NFKC", text)
    name = " ".join(text.split())
    if letters(name) in ("background", "bg", "none", ""):
        return "background"
    plain = all(unicodedata.category(c)[0] in "LNM" or c in " \t-_.'" for c in text)
    value = letters(name).isnumeric() or letters(name) in NO_CLASS
    if value or not plain:
        expected = "expected plain names, with ';' between tags, or nothing for background"
        raise InputError(f"{where}: class {text!r}; {expected}")
    return name


def letters(name):
    """What two spellings of one name have in common: letters and digits, in lower case."""
    return "".join(c for c in name.casefold() if unicodedata.category(c)[0] in "LNM")


def with_background(tags):
    """Indices (C,) of background and of an image's tags (K,) of 0/1."""
    return np.union1d(0, np.flatnonzero(tags))


def tagged_photos(paths, tags, classes):
    """Photos of these paths; tags: the set of each one's class indices, empty for background."""
    matrix = torch.zeros(len(paths), len(classes))
    for row, present in zip(matrix, tags):
        row[list(present) or [0]] = 1
    return Photos(list(paths), matrix, classes)


def read_tags(folder, path):
    """A CSV of file,tag;tag;... -> {file in folder: set of names}, empty for background alone.

    Rows of one file are united; photographs without a row are left out. Raises InputError where a
    file is missing or outside the folder."""
    expected = f"UTF-8 lines such as  photo.jpg,cat;dog  of files inside {folder}"
    rows = read_rows(path, expected, columns=2)
    headings = ("file", "filename", "image", "img", "photo", "path", "name", "id")
    if rows and rows[0][0].lower() in headings:
        rows = rows[1:]
    if not rows:
        raise InputError(f"{path}: names no photograph; expected {expected}")
    tags, files = {}, {}
    for name, cell in rows:
        inside = os.path.relpath(Path(folder, name), folder)  # one spelling of each file
        file = Path(folder, inside)
        if inside.split(os.sep)[0] == ".." or not file.is_file():
            raise InputError(f"{path}: {file} is no file there; expected {expected}")
        names = {class_name(word, path) for word in cell.split(";")} - {"background"}
        first = files.setdefault(os.path.realpath(file), file)  # a link is the same photograph
        tags.setdefault(first, set()).update(names)
    if len(tags) < len(rows):
        print(f"{path}: {len(rows) - len(tags)} rows name a file again; its tags are united")
    unlisted = [file for file in image_files(folder) if os.path.realpath(file) not in files]
    if unlisted:
        print(f"{path}: left out: {len(unlisted)} photographs without a line, {unlisted[0]} first")
    return tags


# ---------------------------------------------------------------- VOC, a folder, ImageNet
def voc_ids(voc, name, kinds=("Segmentation", "Main")):
    """Ids in ImageSets/<kind>/<name>.txt, the first kind there is: bare, image or SBD paths."""
    if Path(name).name != name:
        raise InputError(f"--set {name}: no list's name; give one of {voc}/ImageSets, such as val")
    lists = [Path(voc, "ImageSets", kind, f"{name}.txt") for kind in kinds]
    path = next((p for p in lists if p.exists()), lists[0])
    expected = "different image ids, one a line, in a devkit's VOC2012 folder"
    rows = read_rows(path, expected)
    files = [Path(row[0]) for row in rows]
    ids = [file.stem if file.suffix in (".jpg", ".png") else file.name for file in files]
    bad = [i for i in ids if not i.strip(".") or set(i) & set("\\:\0")]
    bad += [row[1] for row in rows if len(row) > 1 and "/" not in row[1]]  # no mask's path
    if not ids or bad or len(set(ids)) < len(ids):
        why = f"{len(ids)} ids, {len(set(ids))} different ones, bad: {bad[:1]}"
        raise InputError(f"{path}: {why}; expected {expected}")
    return ids


def voc_tags(voc, name):
    """{id: (classes present, classes only present as difficult)} of Main/<class>_<name>.txt."""
    expected = "an id and 1, -1 or 0 a line, the same ids in all 20 classes' files"
    tags = {}
    for k in range(1, len(VOC_CLASSES)):
        path = Path(voc, "ImageSets", "Main", f"{VOC_CLASSES[k]}_{name}.txt")
        if not tags and not path.exists():
            continue  # a set that Main does not know has none of the 20
        with reading(path, expected):
            rows = read_rows(path, expected)
            flags = {row[0]: row[1] for row in rows}
            if len(flags) < len(rows) or (k > 1 and flags.keys() != tags.keys()):
                raise ValueError("an id twice, or other ids than the classes before it")
            for i, flag in flags.items():
                present, difficult = tags.setdefault(i, (set(), set()))
                if flag == "1":
                    present.add(k)
                elif flag == "0":
                    difficult.add(k)
                elif flag != "-1":
                    raise ValueError(f"{i} has {flag}")
    return tags


def xml_tags(path):
    """Classes of one Annotations file, difficult ones too, as a set of class indices."""
    present = set()
    with reading(path, "VOC's XML of an image whose tags ImageSets/Main does not list"):
        root = ElementTree.parse(path).getroot()
        if root.tag != "annotation":
            raise ValueError(f"<{root.tag}> instead of <annotation>")
        for thing in root.iter("object"):
            name = thing.findtext("name", "").strip()
            if name not in VOC_CLASSES[1:]:
                raise ValueError(f"'{name}' is no VOC class (own classes: train.py folder)")
            present.add(VOC_CLASSES.index(name))
    return present


def voc_photos(voc, name, with_masked=False):
    """Photos of a set with its tags, difficult objects too: of ImageSets/Main, else Annotations.

    with_masked: those of ImageSets/Segmentation, too, which Main need not list."""
    listed = voc_tags(voc, name)
    paths, tags = [], []
    ids = voc_ids(voc, name, ("Main", "Segmentation"))
    if with_masked:
        masked = voc_ids(voc, name)
        ids += sorted(set(masked) - set(ids))
    for i in ids:
        xml = Path(voc, "Annotations", f"{i}.xml")
        tags.append(set.union(*listed[i]) if i in listed else xml_tags(xml))
        paths.append(Path(voc, "JPEGImages", f"{i}.jpg"))
    return tagged_photos(paths, tags, VOC_CLASSES)


def image_files(folder):
    """All image files below a folder that Pillow reads, sorted; what is left out is printed."""
    Image.init()
    kinds = set(Image.OPEN) | {"MPO"}  # which its JPEG reader opens
    known = {suffix for suffix, kind in Image.EXTENSION.items() if kind in kinds}
    all_files = []
    for path in sorted(Path(folder).rglob("*")):
        hidden = any(part[0] == "." for part in path.relative_to(folder).parts)
        if not hidden and (path.is_symlink() or not path.is_dir()):
            all_files.append(path)
    files = [p for p in all_files if p.suffix.lower() in known and p.is_file()]
    if not files:
        expected = "expected images that Pillow reads, such as JPEG or PNG (not HEIC)"
        raise InputError(f"{folder}: no such folder, or no image below it; {expected}")
    others = sorted(set(all_files) - set(files))
    if others:
        endings = " ".join(sorted({path.suffix or path.name for path in others}))
        print(f"{folder}: {len(others)} other files are left out: {endings}")
    return files


def folder_photos(folder, tags):
    """Photos of one's own, tagged by a CSV (see read_tags). Classes are in alphabetical order."""
    names = read_tags(folder, tags)
    classes = ["background"] + sorted(set().union(*names.values()))
    spelt = {letters(name): name for name in classes}
    for name in classes:
        other = spelt[letters(name)]
        words = re.split("[ _.'-]", name)
        if other != name:
            remedy = "spell one class alike, or rename one"
            raise InputError(f"{tags}: classes '{other}' and '{name}'; {remedy}")
        if len(words) > 1 and set(words) <= set(classes):
            remedy = "put ';' between tags, or rename it"
            raise InputError(f"{tags}: class '{name}' beside its words; {remedy}")
    if not 2 <= len(classes) <= VOID:
        raise InputError(f"{tags}: {len(classes) - 1} classes; expected 1 to {VOID - 1}")
    indices = [{classes.index(name) for name in present} for present in names.values()]
    return tagged_photos(names, indices, classes)


def imagenet_photos(folder, synsets=""):
    """Photos of the <wnid>/ folders that a CSV of wnid,class lists and tags (section 4.1)."""
    path = synsets or SYNSETS
    expected = "lines of a wnid and a VOC class or background, such as  n02123045,cat"
    with reading(path, expected):
        rows = read_rows(path, expected, columns=2)
        table = {wnid: VOC_CLASSES.index(name) for wnid, name in rows}
        if len(table) < len(rows):
            raise ValueError("a wnid twice")
    paths, tags = [], []
    for wnid in sorted(table):
        if Path(folder, wnid).is_dir():
            files = image_files(Path(folder, wnid))
            paths += files
            tags += [{table[wnid]}] * len(files)
    if not paths:
        raise InputError(f"{folder}: no folder that {path} lists; expected n02123045/x.JPEG")
    return tagged_photos(paths, tags, VOC_CLASSES)


# ---------------------------------------------------------------- the toy set
TOY_SHAPES = {  # outline (H, W) bool, in coordinates where the object's radius is 1
    "stripes": lambda u, v: u**2 + (v / 0.7) ** 2 < 1,  # ellipse
    "checker": lambda u, v: np.maximum(abs(u), abs(v)) < 0.8,  # square
    "speckle": lambda u, v: (v > -0.6) & (v < 0.95 - 1.7 * abs(u)),  # triangle
    "grid": lambda u, v: np.minimum(abs(u), abs(v)) < 0.5 * (np.hypot(u, v) < 1),  # cross
}
TOY_TEXTURES = {  # two tones (H, W) bool, in coordinates whose period is 2 pi; grain: noise
    "stripes": lambda u, v, grain: np.sin(u) > 0,
    "checker": lambda u, v, grain: (np.sin(u / 1.3) > 0) ^ (np.sin(v / 1.3) > 0),
    "speckle": lambda u, v, grain: ndimage.uniform_filter(grain, 2) > 0.5,
    "grid": lambda u, v, grain: np.maximum(np.cos(u / 1.2), np.cos(v / 1.2)) > 0.75,
}
TOY_CLASSES = ["background", *TOY_SHAPES]


def toy_scene(rng, size, kinds, distractors):
    """Objects of these classes, distractors of none: image (size, size, 3), labels, both uint8.

    Colours, sizes, places and turns are random, so that only texture and shape tell a class."""
    noise = Image.fromarray(rng.integers(0, 256, (6, 6), dtype=np.uint8))
    coarse = np.asarray(noise.resize((size, size), Image.BICUBIC), float)
    tone = coarse[..., None] / 255 + 0.15 * rng.standard_normal((size, size, 1))
    first, second = rng.uniform(40, 215, (2, 3))
    image = first + (second - first) * tone
    labels = np.zeros((size, size), np.uint8)
    y, x = np.mgrid[:size, :size].astype(float)

    for kind in rng.permutation(list(kinds) + [""] * distractors):
        radius, angle = rng.uniform(20, 32), rng.uniform(0, 2 * np.pi)
        for _ in range(20):  # until it is mostly free of the others
            cx, cy = rng.uniform(radius * 0.8, size - radius * 0.8, 2)
            u = (x - cx) * np.cos(angle) + (y - cy) * np.sin(angle)
            v = (y - cy) * np.cos(angle) - (x - cx) * np.sin(angle)
            shape = kind or str(rng.choice(TOY_CLASSES[1:]))
            inside = TOY_SHAPES[shape](u / radius, v / radius)
            if (labels[inside] > 0).mean() < 0.1:
                break
        if kind:
            wave = 2 * np.pi / rng.uniform(5, 8)
            pattern = TOY_TEXTURES[kind](wave * u, wave * v, grain=rng.random(u.shape))
        else:  # plain, or two halves
            pattern = u > rng.choice([0, size])
        dark = rng.uniform(0, 255, 3)
        light = (dark + rng.choice([-1, 1], 3) * rng.uniform(70, 128, 3)) % 256
        image[inside] = np.where(pattern[..., None], light, dark)[inside]
        labels[inside] = TOY_CLASSES.index(kind) if kind else 0
    noisy = image + rng.normal(0, 8, image.shape)
    return noisy.clip(0, 255).astype(np.uint8), labels


def toy_photos(seed, n, size=96):
    """Photos of n drawn images of one class or, one in five, of none."""
    rng = np.random.default_rng([seed, 0])
    names = []
    for _ in range(n):
        names.append([str(rng.choice(TOY_CLASSES[1:]))] if rng.random() > 0.2 else [])
    images = []
    for kinds in names:
        objects, distractors = int(rng.integers(1, 3)), int(rng.integers(0, 3))
        images.append(toy_scene(rng, size, kinds * objects, distractors)[0])
    tags = [set(map(TOY_CLASSES.index, kinds)) for kinds in names]
    return tagged_photos(images, tags, TOY_CLASSES)


def toy_scenes(seed, n, size=144):
    """n test scenes: list of (name, image (H, W, 3) uint8, labels (H, W) uint8).

    Two to four objects each, of one or two classes, as in nearly all photographs of VOC."""
    rng = np.random.default_rng([seed, 1])
    scenes = []
    for i in range(n):
        shuffled = rng.permutation(TOY_CLASSES[1:])
        chosen = shuffled[: rng.integers(1, 3)]
        objects = rng.integers(2, 5)
        image, labels = toy_scene(rng, size, rng.choice(chosen, objects), 2)
        scenes.append((f"scene{i}", image, labels))
    return scenes


# ---------------------------------------------------------------- augmentation
def augment(images, random, flip=0.5, rotate=10.0, scale=0.2, brightness=0.2, contrast=0.2):
    """Section 4.1's jitter, afresh for every image: flip, rotation, scale, shift, light, contrast.

    images (B, 3, H, W) in 0..255, on any device; random (7, B): uniform in 0..1, what is drawn.
    flip: chance; then the largest turn in degrees, log of scale, share of 255, change of contrast
    (the paper gives none). Returns float images of the same shape."""
    draws = random.to(images.device, non_blocking=True) * 2 - 1  # (7, B) in -1..1
    flips, turns, zooms, lights, gains, right, down = draws
    sign = torch.where(flips < 2 * flip - 1, -1.0, 1.0)
    angle = turns * rotate * np.pi / 180
    zoom = torch.exp(zooms * scale)
    room = 1 - 1 / zoom.clamp(min=1)  # how far a magnified image may be shifted

    cos, sin = torch.cos(angle) / zoom, torch.sin(angle) / zoom
    theta = torch.stack([cos * sign, -sin, right * room, sin * sign, cos, down * room], 1)
    grid = F.affine_grid(theta.view(-1, 2, 3), list(images.shape), align_corners=False)
    moved = F.grid_sample(images.float(), grid, padding_mode="reflection", align_corners=False)

    mean = moved.mean((1, 2, 3), keepdim=True)
    light = (lights * brightness * 255).view(-1, 1, 1, 1)
    gain = (1 + gains * contrast).view(-1, 1, 1, 1)
    return ((moved - mean) * gain + mean + light).clamp(0, 255)
