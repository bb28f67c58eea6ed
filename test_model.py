"""python -m pytest -q test_model.py

Nearly every expected value is computed here a second time, by slow and obvious loops. The rest are
the paper's numbers, a vector worked by hand, and commands that must end well or in one clear line.
"""

import contextlib
import gc
import io
import json
import math
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tarfile
import time
import types
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import scipy.io
import torch
from PIL import Image
from scipy import ndimage

import data
import eval_voc
import infer
import model
import train

HERE = Path(__file__).resolve().parent
SHARED = HERE.parent / "shared"  # a devkit and weights, where the project is developed
needs_shared = pytest.mark.skipif(not SHARED.exists(), reason="no ../shared: no real photographs")
torch.set_num_threads(1)
gc.freeze()  # what is imported is never searched for garbage
pytestmark = [
    pytest.mark.filterwarnings("error"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # the lock of a run that was refused
]

# Short runs: of the toy, and on photographs (a preset's name and its folders are added).
TOY = (
    "train toy --toy-images 24 --toy-scenes 1 --threshold-images 2 --batch 4 --schedule steps"
    " --log-every 2 --save-every 2 --device cpu"
)
SMALL = (
    "--trunk tiny --size 32 --head 4 --batch 2 --steps 2 --self-steps 0 --threshold-images 1"
    " --device cpu"
)
FOLDER = f"train folder {SMALL} --images photos --tags tags.csv --out o"

OPENED = []  # every file that Python opens


sys.addaudithook(lambda event, args: OPENED.append(str(args[0])) if event == "open" else None)


# ---------------------------------------------------------------- helpers
@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    """Every test starts in an empty folder of its own and draws the same numbers every time."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)


def run(command):
    """Status, stdout and stderr of "script argument ...", in this process."""
    script, *args = shlex.split(command)
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", [f"{script}.py", *args]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.raises(SystemExit) as end,
    ):
        data.run_cli(sys.modules[script].main)
    status = end.value.code or 0
    del end
    gc.collect()  # with its frames goes a refused run's lock on its folder
    return status, out.getvalue(), err.getvalue()


def ok(command):
    """What a command that has to end well prints."""
    status, out, err = run(command)
    assert status == 0, (command, err)
    return out


def refused(command, *words):
    """The one line on stderr, with these words, of a command that has to end with status 2."""
    status, _, err = run(command)
    assert status == 2, command
    err = re.sub("^left out: .*\n", "", err, flags=re.MULTILINE)  # photographs, each named once
    assert err.count("\n") == 1, err
    for word in words:
        assert word in err, (word, err)
    return err


def random_image(seed, height, width):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def save_photo(path, seed=0, height=24, width=30):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(random_image(seed, height, width)).save(path)


def write(path, text):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(text)


def make_folder(rows=("0.png,cat", "1.png,dog", "2.png,cat;dog", "3.png,")):
    """photos/0.png ... and tags.csv with these rows."""
    for n in range(4):
        save_photo(f"photos/{n}.png", n)
    write("tags.csv", "\n".join(rows))


def make_voc(masks=None, name="val", root="VOC2012"):
    """A devkit with one set of these {id: mask}; by default of 4 that hold all classes and void."""
    if masks is None:
        masks = {}
        for n, (height, width) in enumerate([(60, 80), (80, 60), (64, 64), (50, 90)]):
            numbers = np.arange(50 * n, 50 * n + 50, dtype=np.uint8).reshape(5, 10) % 21
            mask = numbers.repeat(20, 0).repeat(20, 1)[:height, :width]
            mask[:3] = 255
            masks[f"{name}_{n}"] = mask
    write(f"{root}/ImageSets/Main/{name}.txt", "\n".join(masks))
    for k, label in enumerate(data.VOC_CLASSES[1:], 1):
        lines = [f"{i} {1 if (mask == k).any() else -1}" for i, mask in masks.items()]
        write(f"{root}/ImageSets/Main/{label}_{name}.txt", "\n".join(lines))
    for n, (i, mask) in enumerate(masks.items()):
        data.save_labels(f"{root}/SegmentationClass/{i}.png", mask)
        save_photo(f"{root}/JPEGImages/{i}.jpg", n, *mask.shape)
    return masks


def save_vgg(path, seed=0):
    """A file in the public VGG16's layout, where ReLUs and pools count too, with random numbers."""
    torch.manual_seed(seed)
    layers = model.Net("vgg16", ["background", "cat"]).trunk
    state = {}
    for n, layer in zip([0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28], layers, strict=True):
        state[f"features.{n}.weight"] = layer.weight.detach()
        state[f"features.{n}.bias"] = layer.bias.detach()
    torch.save(state, path)
    return state


# ---------------------------------------------------------------- geometry and trunks
def test_overfeats_geometry_is_the_papers():
    trunk = model.TRUNKS["overfeat"].rows
    head = [model.conv(width, 3) for width in (1024, 768, 512, 21)]
    rows = trunk + head
    assert model.out_size(400, trunk) == 29
    assert model.out_size(231, model.TRUNKS["overfeat-fast"].rows) == 12
    assert [model.out_size(n, rows) for n in (388, 389, 400, 401)] == [20, 21, 21, 22]
    assert model.geometry(rows) == (12, 245, 74)

    lines = model.layer_table(rows, 400)
    parameters = [line["params"] for line in lines]
    assert [line["cells"] for line in lines] == [197, 65, 59, 29, 29, 29, 29, 29, 27, 25, 23, 21]
    assert sum(parameters[:8]) == 18_916_480
    assert parameters[8:] == [9_438_208, 7_078_656, 3_539_456, 96_789]
    assert sum(line["GFLOPs"] for line in lines[:8]) == pytest.approx(39.2, abs=0.2)

    # One pass over all shifts takes the dilations of the paper's section 1.3.
    dense = model.dense_rows(rows, 12)
    assert [row.dilation for row in dense] == [1, 2, 6, 6] + [12] * 8
    assert {row.stride for row in dense} == {1}


def middle_of_field(rows, cell):
    """The middle pixel of what a cell sees: the window's two ends, followed back layer by layer."""
    first = last = cell
    for row in reversed(rows):
        first = first * row.stride - row.pad
        last = last * row.stride - row.pad + row.dilation * (row.kernel - 1)
    return (first + last) / 2


@pytest.mark.parametrize("name", model.TRUNKS)
def test_padding_centres_cells_on_multiples_of_the_stride(name):
    rows = model.TRUNKS[name].rows + [model.conv(8, 3), model.conv(3, 3)]
    stride = model.geometry(rows)[0]
    for n in (*range(1, 40), 333, 375, 500):
        left, right, cells, offset = model.centring(n, rows)
        assert cells == math.ceil(n / stride)
        assert model.out_size(n + left + right, rows) >= cells
        assert offset in (0, 0.5)
        for cell in (0, cells - 1):
            assert middle_of_field(rows, cell) - left == stride * cell + offset


# Bytes of OverFeat's files, and their layers (out, in, kernel, stride, pad) or the side of a pool:
# from the released sources, not from model.py.
# fmt: off
SLOW_OVERFEAT = {
    "overfeat": (578_625_952, [
        (96, 3, 7, 2, 0), 3, (256, 96, 7, 1, 0), 2, (512, 256, 3, 1, 1), (512, 512, 3, 1, 1),
        (1024, 512, 3, 1, 1), (1024, 1024, 3, 1, 1)]),
    "overfeat-fast": (583_683_488, [
        (96, 3, 11, 4, 0), 2, (256, 96, 5, 1, 0), 2, (512, 256, 3, 1, 1), (1024, 512, 3, 1, 1),
        (1024, 1024, 3, 1, 1)]),
}
# fmt: on


def random_overfeat(name):
    """Random float32 values of all its convolutions, in the file's order."""
    rng = np.random.default_rng(0)
    values = []
    for layer in SLOW_OVERFEAT[name][1]:
        if isinstance(layer, tuple):
            out, channels, kernel, _, _ = layer
            fan_in = channels * kernel * kernel
            values.append(rng.normal(0, math.sqrt(2 / fan_in), out * fan_in))
            values.append(rng.normal(0, 0.1, out))
    return np.concatenate(values).astype("<f4")


def slow_layer(layer, x, values):
    """One layer of OverFeat in numpy, x (D, h, w); returns its output and the values left over."""
    if isinstance(layer, int):
        windows = np.lib.stride_tricks.sliding_window_view(x, (layer, layer), (1, 2))
        return windows[:, ::layer, ::layer].max((3, 4)), values
    out, channels, kernel, stride, pad = layer
    count = out * channels * kernel * kernel
    weight = values[:count].reshape(out, channels, kernel, kernel).astype(np.float64)
    bias = values[count : count + out]
    padded = np.pad(x, ((0, 0), (pad, pad), (pad, pad)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (kernel, kernel), (1, 2))
    y = np.tensordot(weight, windows[:, ::stride, ::stride], ((1, 2, 3), (0, 3, 4)))
    return np.maximum(y + bias[:, None, None], 0), values[count + out :]


@pytest.mark.parametrize("name", SLOW_OVERFEAT)
@torch.no_grad()
def test_overfeats_file_gives_the_features_of_a_slow_numpy_net(name):
    values = random_overfeat(name)
    values.tofile("weights")
    os.truncate("weights", SLOW_OVERFEAT[name][0])  # a sparse file of the official size
    net = model.Net(name, ["background", "cat"])
    model.load_trunk(net, "weights")

    image = random_image(1, 117, 125).transpose(2, 0, 1)
    slow = (image.astype(np.float64) - 118.380948) / 61.896913
    fast = net.normalise(torch.from_numpy(image)[None])
    convs = list(net.trunk)
    for layer, row in zip(SLOW_OVERFEAT[name][1], net.spec.rows, strict=True):
        slow, values = slow_layer(layer, slow, values)
        fast = net.run(fast, [row], convs[:1])
        if row.kind == "conv":
            convs = convs[1:]
        assert np.abs(fast[0].numpy() - slow).max() <= 1e-4 * np.abs(slow).max(), layer


@pytest.mark.parametrize("size, why", [(75_665_916, "75,665,916 bytes"), (75_665_920, "NaN or Inf"),
                                       (583_683_488, "583,683,488.*--trunk overfeat-fast")])  # fmt: skip
def test_other_weight_files_are_named(size, why):
    np.full(9, np.nan, np.float32).tofile("weights")
    os.truncate("weights", size)
    with pytest.raises(OSError, match=why) as e:
        model.load_trunk(model.Net("overfeat", ["background", "cat"]), "weights")
    assert e.value.filename == "weights"


@pytest.mark.parametrize("name, factors", [("overfeat", (2, 3, 12)), ("overfeat-fast", (16,)),
                                           ("tiny", (2, 4))])  # fmt: skip
@torch.no_grad()
def test_dense_equals_shift_and_stitch(name, factors):
    """In float64, on odd sizes, with narrow layers in the place of the wide ones."""
    rows = [row._replace(out=min(row.out, 4)) for row in model.TRUNKS[name].rows]
    rows += [model.conv(5, 3), model.conv(3, 3)]
    convs, channels = [], 3
    for row in rows:
        if row.kind == "conv":
            convs.append(torch.nn.Conv2d(channels, row.out, row.kernel, dtype=torch.double))
            channels = row.out
    net = model.Net("tiny", ["background", "cat"])
    x = torch.randn(1, 3, 233, 215, dtype=torch.double)
    stride = model.geometry(rows)[0]
    for factor in factors:
        step = stride // factor
        fast = net.run(x, model.dense_rows(rows, factor), convs)
        slow = torch.full_like(fast, math.nan)
        for dy in range(factor):
            for dx in range(factor):
                shifted = x[:, :, dy * step :, dx * step :]
                slow[:, :, dy::factor, dx::factor] = net.run(shifted, rows, convs)
        assert (fast - slow).abs().max() < 1e-12  # not so if one is left NaN
    with pytest.raises(ValueError, match="must divide the stride"):
        model.dense_rows(rows, 5)


def test_upsampling_is_bilinear_between_cell_centres():
    scores = torch.tensor([[[[0.0, 4.0, 12.0]]]])  # cells on pixels 0.5, 4.5 and 8.5
    want = torch.tensor([0, 0.5, 1.5, 2.5, 3.5, 5, 7, 9, 11, 12, 12, 12])
    assert torch.allclose(model.upsample(scores, (1, 12), 4, 0.5), want)
    ramp = torch.arange(20.0).view(1, 1, 1, 20)  # the net has seen 20 pixels of 40
    want = (torch.arange(40.0) / 2 - 0.25).clamp(0, 19)
    assert torch.allclose(model.upsample(ramp, (1, 40), 1, 0, seen=(1, 20)), want)


# ---------------------------------------------------------------- aggregation and losses
@pytest.mark.parametrize("name", model.AGGREGATIONS)
def test_aggregations_have_the_papers_values_and_right_gradients(name):
    f = model.AGGREGATIONS[name]
    scores = torch.randn(2, 3, 5, 7, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: f(s, 5.0), scores)  # finite differences in float64
    for b in range(2):
        for k in range(3):
            cells = scores[b, k].flatten().tolist()
            want = {
                "lse": math.log(sum(math.exp(5 * s) for s in cells) / 35) / 5,  # Eq. 6
                "max": max(cells),
                "mean": sum(cells) / 35,
                "sum": sum(cells),
            }
            assert f(scores, 5.0)[b, k].item() == pytest.approx(want[name])


def test_lse_lies_between_mean_and_max_and_never_overflows():
    scores = torch.randn(2, 3, 5, 7, dtype=torch.double)
    assert torch.allclose(model.lse(scores, 1e4), scores.amax((2, 3)), atol=1e-3)
    assert torch.allclose(model.lse(scores, 1e-6), scores.mean((2, 3)), atol=1e-5)
    for big in (1e4, -1e4):
        assert model.lse(torch.full((1, 1, 9, 9), big), 5.0).item() == pytest.approx(big)


def test_tag_loss_is_each_images_likelihood_of_its_tags():
    scores = torch.randn(4, 5)
    tags = torch.eye(5)[[0, 2, 4, 1]]
    tags[1, 3] = 1  # the second image has two
    softmax = model.tag_loss(scores, tags)
    sigmoid = model.tag_loss(scores, tags, "sigmoid")
    for b, present in enumerate([[0], [2, 3], [4], [1]]):
        total = sum(math.exp(s) for s in scores[b])
        log_p = [s - math.log(total) for s in scores[b].tolist()]
        assert softmax[b].item() == pytest.approx(-sum(log_p[k] for k in present) / len(present))
        loss = 0
        for k in range(5):
            p = 1 / (1 + math.exp(-scores[b, k]))
            loss -= math.log(p if k in present else 1 - p) / 5
        assert sigmoid[b].item() == pytest.approx(loss, rel=1e-4)


def test_pixel_loss_is_half_of_objects_and_half_of_background():
    scores = torch.randn(2, 3, 2, 2)
    labels = torch.tensor([[[0, 1], [2, 0]], [[255, 2], [1, 255]]], dtype=torch.uint8)
    losses = model.pixel_loss(scores, labels)
    cells = -scores.log_softmax(1).gather(1, labels.long()[:, None] % 255)[:, 0]  # void too
    background = (cells[0, 0, 0] + cells[0, 1, 1]) / 2
    objects = (cells[0, 0, 1] + cells[0, 1, 0]) / 2
    assert losses[0].item() == pytest.approx((background + objects).item() / 2)
    objects = (cells[1, 0, 1] + cells[1, 1, 0]) / 2
    assert losses[1].item() == pytest.approx(objects.item() / 2)


@pytest.mark.parametrize("train_convs, frozen", [(0, 3), (1, 2), (-1, 0)])
def test_frozen_means_frozen(train_convs, frozen):
    net = model.Net("tiny", ["background", "cat"], [8], train_convs=train_convs).train()
    features = net.frozen(torch.ones(1, 3, 96, 96))
    assert torch.equal(net.frozen(torch.ones(1, 3, 96, 96)), features)  # no dropout
    net.scores(features)[0].sum().backward()
    frozen_names = ["foreground", *(f"trunk.{i}" for i in range(frozen))]
    for name, p in net.named_parameters():
        layer = name.rpartition(".")[0]
        assert (p.grad is None) == (layer in frozen_names), name


# ---------------------------------------------------------------- the measure
def test_scorer_gives_the_worked_vector():
    """Two images and four classes by hand: the fourth never occurs, until a pixel is called it."""
    truth_a = np.array([[0, 0, 1], [0, 1, 255]], np.uint8)
    truth_b = np.array([[0, 2, 2, 0]], np.uint8)
    guess_a = np.array([[0, 1, 1], [0, 1, 0]], np.uint8)
    guess_b = np.array([[0, 2, 2, 2]], np.uint8)
    both = eval_voc.confusion(truth_a, guess_a, 4) + eval_voc.confusion(truth_b, guess_b, 4)
    assert both.dtype == np.int64
    assert both.tolist() == [[3, 1, 1, 0], [0, 2, 0, 0], [0, 0, 2, 0], [0, 0, 0, 0]]

    report = eval_voc.summarise(both, ["ground", "cat", "dog", "emu"], 2)
    third = pytest.approx(200 / 3)
    assert report["iou"] == {"ground": pytest.approx(60), "cat": third, "dog": third, "emu": None}
    assert report["mean_iou"] is None
    assert report["classes_defined"] == 3
    assert report["mean_iou_defined"] == pytest.approx(100 * 29 / 45)
    assert report["mean_accuracy"] == pytest.approx(100 * (3 / 5 + 1 + 1) / 3)

    guess_b[0, 0] = 3
    both = eval_voc.confusion(truth_a, guess_a, 4) + eval_voc.confusion(truth_b, guess_b, 4)
    report = eval_voc.summarise(both, ["ground", "cat", "dog", "emu"], 2)
    assert list(report["iou"].values()) == pytest.approx([40, 200 / 3, 200 / 3, 0])
    assert report["mean_iou"] == pytest.approx(130 / 3)


def test_truth_scores_100_and_is_packed_as_the_server_wants_it():
    colours = (
        "000000 800000 008000 808000 000080 800080 008080 808080 400000 c00000 408000 c08000"
        " 400080 c00080 408080 c08080 004000 804000 00c000 80c000 004080"
    )
    assert data.voc_palette()[:21].tobytes().hex(" ", 3) == colours
    assert data.voc_palette()[255].tolist() == [224, 224, 192]
    masks = make_voc()
    for i, mask in masks.items():
        data.save_labels(f"pred/{i}.png", np.where(mask == 255, 0, mask))
    ok("eval_voc score pred --voc VOC2012 --json s.json")
    report = json.loads(Path("s.json").read_text())
    assert (report["mean_iou"], report["images"]) == (100, 4)
    assert list(report["iou"]) == data.VOC_CLASSES

    ok("eval_voc submit pred --voc VOC2012 --set val --out r.tgz")
    with tarfile.open("r.tgz", "r:gz") as tar:
        names = tar.getnames()
        assert names == [f"results/VOC2012/Segmentation/comp6_val_cls/{i}.png" for i in masks]
        for name, mask in zip(names, masks.values()):
            image = Image.open(tar.extractfile(name))
            assert image.mode == "P"
            assert image.getpalette() == data.voc_palette().ravel().tolist()
            assert np.array_equal(image, np.where(mask == 255, 0, mask))


def test_scorer_lists_all_problems_at_once():
    masks = make_voc()
    data.save_labels("pred/val_0.png", masks["val_0"])  # 255, where the truth is void
    data.save_labels("pred/val_1.png", np.zeros((60, 80)))  # turned
    write("pred/val_2.png", "not a png")
    command = "eval_voc score pred --voc VOC2012 --json s.json"
    refused(command, "4 of 4", "val_0.png: ", "255", "val_1.png: ", "resized", "val_2", "val_3")
    assert not Path("s.json").exists()


def test_average_precision_by_hand():
    scores = np.linspace(0.9, 0.4, 6)
    # Hits at ranks 1, 3, 6: their precisions fall already. A miss first: 2/3 counts for both.
    for hits, want in (
        ([1, 0, 1, 0, 0, 1], 100 * (1 + 2 / 3 + 1 / 2) / 3),
        ([0, 1, 1, 0, 0, 0], 100 * 2 / 3),
    ):
        assert eval_voc.average_precision(scores, np.array(hits, bool)) == pytest.approx(want)
    assert eval_voc.average_precision(scores, np.zeros(6, bool)) is None


# ---------------------------------------------------------------- superpixels and proposals
def slow_superpixels(image, scale, sigma, min_size):
    """Felzenszwalb-Huttenlocher with a set of pixels for every segment."""
    H, W = image.shape[:2]
    planes = [ndimage.gaussian_filter(image[..., c] / 255.0, sigma) for c in range(3)]
    smooth = np.stack(planes, -1)
    edges = []
    for dy, dx in ((0, 1), (1, 0), (1, 1), (1, -1)):
        for y in range(H):
            for x in range(W):
                if y + dy < H and 0 <= x + dx < W:
                    d = smooth[y, x] - smooth[y + dy, x + dx]
                    cost = math.sqrt(d[0] * d[0] + d[1] * d[1] + d[2] * d[2])
                    edges.append((cost, y * W + x, (y + dy) * W + x + dx))
    edges.sort(key=lambda edge: edge[0])  # equal costs stay in this order

    home = list(range(H * W))
    segments = {i: {i} for i in home}
    inner = [0.0] * (H * W)  # Int(C): the largest cost inside
    for growing in (True, False):
        for cost, p, q in edges:
            a, b = home[p], home[q]
            if a == b:
                continue
            if growing:
                joins = True
                for c in (a, b):
                    joins = joins and cost < inner[c] + scale / 255 / len(segments[c])
            else:
                joins = len(segments[a]) < min_size or len(segments[b]) < min_size
            if joins:
                for pixel in segments[b]:
                    home[pixel] = a
                segments[a] |= segments.pop(b)
                inner[a] = cost
    return in_raster_order(np.reshape(home, (H, W)))


def in_raster_order(labels):
    """The same segments, numbered by their first pixels."""
    names = {}
    for label in labels.ravel().tolist():
        names.setdefault(label, len(names))
    return np.vectorize(names.get)(labels)


@pytest.mark.parametrize("seed", range(16))
def test_superpixels_are_felzenszwalbs(seed):
    rng = np.random.default_rng(seed)
    levels = (2, 4, 16, 256)[seed % 4]  # few levels: many equal costs
    height, width = rng.integers(2, 22, 2)
    image = rng.integers(0, levels, (height, width, 3)) * (255 // (levels - 1))
    if seed % 3 == 0:  # blobs, so that large segments form
        image = image.repeat(3, 0).repeat(3, 1)
    image = image.astype(np.uint8)
    scale, sigma, least = rng.choice([1, 30, 100, 400]), rng.choice([0, 0.5, 1]), rng.choice([1, 9])
    slow = slow_superpixels(image, scale, sigma, least)
    assert np.array_equal(infer.superpixels(image, scale, sigma, least), slow)


def test_superpixels_are_scikit_images():
    segmentation = pytest.importorskip("skimage.segmentation", reason="scikit-image is missing")
    image = random_image(0, 12, 16).repeat(8, 0).repeat(8, 1) // 2 + random_image(1, 96, 128) // 8
    for scale, sigma, least in ((100, 0.5, 12), (50, 0.8, 5), (400, 0.5, 50)):
        theirs = segmentation.felzenszwalb(image, scale, sigma, least)
        ours = infer.superpixels(image, scale, sigma, least)
        assert ours.max() > 20
        assert np.array_equal(ours, in_raster_order(theirs))


@pytest.fixture
def proposals():
    """9 regions (13, 17), 12 random segments of them, of which one is empty, and their scores."""
    rng = np.random.default_rng(0)
    regions = rng.permutation(221).reshape(13, 17) % 9
    segments = rng.random((12, 9)) < 0.3
    segments[0] = False
    segments[1:, 0] = True  # and of which no other is
    return regions, segments, rng.random(12)


def mean_score_around(y, x, boxes, scores):
    """Of the boxes that cover a pixel; 0 where none does."""
    around = []
    for (x0, y0, x1, y1), s in zip(boxes, scores):
        if round(x0) <= x < round(x1) and round(y0) <= y < round(y1):
            around.append(s)
    return np.mean(around) if around else 0


def test_covers_are_mean_scores_of_what_covers_a_pixel(proposals):
    regions, segments, scores = proposals
    corners = np.sort(np.random.default_rng(0).uniform(-3, 20, (12, 2, 2)), 1)
    boxes = corners.reshape(12, 4)  # some reach beyond the picture
    by_box = infer.box_cover(boxes, scores, regions.shape)
    by_segment = infer.segment_cover(segments, scores, regions)
    for y, x in np.ndindex(regions.shape):
        assert by_box[y, x] == pytest.approx(mean_score_around(y, x, boxes, scores))
        around = scores[segments[:, regions[y, x]]]
        assert by_segment[y, x] == pytest.approx(around.mean() if len(around) else 0)


def test_boxes_of_segments_are_tight(proposals):
    regions, segments, _ = proposals
    boxes = infer.boxes_of(segments, regions)
    for n in range(1, len(segments)):  # the first is empty
        y, x = np.nonzero(segments[n][regions])
        assert boxes[n].tolist() == [x.min(), y.min(), x.max() + 1, y.max() + 1]


def mcg_content(regions, segments, scores):
    """What MCG writes into a .mat: regions counted from 1, a list of them for each candidate."""
    labels = np.empty((len(segments), 1), object)
    for n, segment in enumerate(segments):
        labels[n, 0] = (np.flatnonzero(segment) + 1).astype(np.uint16)[None]
    return {"superpixels": (regions + 1).astype(np.uint16), "labels": labels, "scores": scores}


def test_mcgs_file_is_read(proposals):
    regions, segments, scores = proposals
    scipy.io.savemat("a.mat", mcg_content(regions, segments, scores[:, None]))
    read_regions, read_segments, read_scores = infer.read_mcg("a.mat", regions.shape)
    assert np.array_equal(read_regions, regions)
    assert np.array_equal(read_segments, segments)
    low, high = min(scores), max(scores)
    assert read_scores == pytest.approx([(s - low) / (high - low) for s in scores])


def test_boxes_files_are_read():
    write("a.txt", "1 2 30 40 0.5\n\n0 0 9.4 9.6 -1.5\n5 5 6 6 2.5\n")
    boxes, scores = infer.read_boxes("a.txt")
    assert boxes.tolist() == [[1, 2, 30, 40], [0, 0, 9.4, 9.6], [5, 5, 6, 6]]
    assert scores.tolist() == [0.5, 0, 1]


def slow_hierarchy(regions, image, least):
    """{frozenset of regions: mean distance from the border}, by relaxation and comparing all pairs."""
    S = regions.max() + 1
    colours = [image[regions == s].mean(0) / 255 for s in range(S)]
    far = np.full((S, S), np.inf)
    np.fill_diagonal(far, 0)
    H, W = regions.shape
    for y in range(H):
        for x in range(W):
            for v, u in ((y + 1, x), (y, x + 1)):
                if v < H and u < W and regions[y, x] != regions[v, u]:
                    a, b = regions[y, x], regions[v, u]
                    far[a, b] = far[b, a] = np.linalg.norm(colours[a] - colours[b]) + 1e-6
    for via in range(S):
        for a in range(S):
            far[a] = np.minimum(far[a], far[a, via] + far[via])

    clusters = [[s] for s in range(S)]
    nodes = [[s] for s in range(S)]
    while len(clusters) > 1:
        best = (np.inf, 0, 0)
        for i in range(len(clusters)):
            for j in range(i):
                best = min(best, (far[np.ix_(clusters[i], clusters[j])].mean(), i, j))
        _, i, j = best
        clusters.append(clusters.pop(i) + clusters.pop(j))
        nodes.append(clusters[-1])

    on_border = {*regions[0], *regions[-1], *regions[:, 0], *regions[:, -1]}
    from_border = far[:, sorted(on_border)].min(1)[regions]  # (H, W)
    found = {}
    for node in nodes:
        inside = np.isin(regions, node)
        if inside.mean() >= least:
            found[frozenset(map(int, node))] = from_border[inside].mean()
    return found


@pytest.mark.parametrize("seed", range(3))
def test_hierarchy_equals_its_loops(seed):
    image = random_image(seed, 20, 26)
    regions = infer.superpixels(image, 20, 0.5, 6)
    want = slow_hierarchy(regions, image, 0.02)
    segments, scores = infer.hierarchy(regions, image, 0.02)
    assert len(segments) == len(want) > 5
    low, high = min(want.values()), max(want.values())
    for segment, s in zip(segments, scores):
        node = frozenset(np.flatnonzero(segment).tolist())
        assert s == pytest.approx((want[node] - low) / (high - low))


# ---------------------------------------------------------------- priors and thresholds
def test_image_level_prior_is_eq_7():
    p = np.random.default_rng(0).random((3, 4, 5), np.float32)
    q = np.array([0.1, 0.3, 0.6], np.float32)
    for k in range(3):
        assert np.allclose(infer.ilp(p, q, "all")[k], p[k] * q[k])
        assert np.allclose(infer.ilp(p, q)[k], p[k] * (q[k] if k else 1))


def test_a_superpixel_takes_its_most_frequent_label():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, (9, 11))
    regions = rng.permutation(99).reshape(9, 11) % 9
    voted = infer.vote(labels, regions)
    for region in range(9):
        inside = labels[regions == region].tolist()
        most = max(range(4), key=inside.count)  # the first of equals
        assert set(voted[regions == region]) == {most}


def test_thresholded_is_the_best_object_above_its_delta():
    rng = np.random.default_rng(0)
    p, objectness, delta = rng.random((4, 9, 11)), rng.random((9, 11)), [0, 0.1, 0.2, 0.3]
    labels = infer.thresholded(p, objectness, delta)
    for (y, x), label in np.ndenumerate(labels):
        k = max((1, 2, 3), key=lambda k: p[k, y, x])
        v = p[k, y, x] / p[:, y, x].sum() * objectness[y, x]
        assert label == (k if v > delta[k] else 0)
    assert 0.1 < (labels > 0).mean() < 0.9


def test_relative_objectness_is_half_at_the_average():
    o = np.random.default_rng(0).random((9, 11))
    above = o - o.min()
    assert np.allclose(infer.relative(o), above / (above + above.mean()))
    assert np.allclose(infer.relative(7 * o - 3), infer.relative(o))  # on any scale
    assert np.allclose(infer.relative(np.full((3, 3), 7.0)), 0.5)  # a flat one decides nothing


def test_pixel_adaptive_refinement_equals_its_loops():
    planes = np.random.default_rng(0).random((2, 9, 11))
    image = random_image(1, 9, 11)
    guide = image / 255
    want = planes.copy()
    for _ in range(2):
        before = want.copy()
        for y in range(9):
            for x in range(11):
                weights, values, colours = [], [], [guide[y, x]]
                for d in (1, 3):
                    for dy in (-d, 0, d):
                        for dx in (-d, 0, d):
                            if dy or dx:
                                v, u = min(max(y + dy, 0), 8), min(max(x + dx, 0), 10)
                                colours.append(guide[v, u])
                                values.append(before[:, v, u])
                deviation = np.std(colours, 0, ddof=1) + 1e-8
                for colour in colours[1:]:
                    difference = np.abs(colour - guide[y, x]) / (0.1 * deviation)
                    weights.append(math.exp(-difference.mean()))
                want[:, y, x] = np.average(values, 0, weights)
    assert np.allclose(infer.pixel_adaptive(planes, image, (1, 3), 2), want, atol=1e-5)


@pytest.fixture
def bright_object():
    """A light rectangle on dark ground, (80, 100, 3)."""
    image = np.full((80, 100, 3), 40, np.uint8)
    image[24:56, 32:72] = 220
    return image


def test_our_own_priors_find_a_bright_object(bright_object):
    scene = infer.Scene(bright_object)
    for objectness in (scene.bb, scene.seg, infer.saliency(bright_object)):
        assert objectness[4, 4] < 0.4
        assert objectness[40, 52] > 0.6
    nothing_known = np.full((2, 80, 100), 0.5, np.float32)
    labels = infer.refine(nothing_known, bright_object, scene.regions).argmax(0)
    assert (labels == (bright_object[..., 0] > 100)).mean() > 0.95


def test_labels_from_tags_hold_no_other_class(bright_object):
    p = np.random.default_rng(0).random((5, 80, 100), np.float32)
    present = np.array([False, False, True, False, True])
    regions = infer.superpixels_at_half(bright_object)
    some = infer.labels_from_tags(p, present, bright_object, regions, sure=0.5)
    all_ = infer.labels_from_tags(p, present, bright_object, regions, sure=0)
    assert set(np.unique(some)) <= {0, 2, 4, 255}
    assert set(np.unique(all_)) <= {0, 2, 4}
    none = infer.labels_from_tags(p, np.zeros(5, bool), bright_object, regions, sure=0.5)
    assert not none.any()  # an image of background alone


@pytest.mark.parametrize("prior", ["bb", "seg"])
def test_fitted_thresholds_equal_a_search(prior):
    """No multiple of 1/50 gives a class a better IoU with the labels that come from the tags."""
    rng = np.random.default_rng(0)
    tags, q = np.array([0, 1, 0, 1]), np.array([0.4, 0.9, 0.5, 0.7], np.float32)
    scenes, planes, truths = [], [], []
    for i in range(4):
        scene = infer.Scene(random_image(i, 20, 24))
        mask = rng.choice(4, p=[0.4, 0.3, 0.1, 0.2], size=(20, 24))
        scores = rng.normal(size=(4, 20, 24)) + 1.5 * (np.arange(4)[:, None, None] == mask)
        p = torch.from_numpy(scores).softmax(0).float().numpy()
        tagged = p * np.array([1, 1, 0, 1])[:, None, None]  # the background, and the tags
        truths.append(infer.refine(tagged, scene.image, scene.regions).argmax(0))
        scenes.append(scene)
        planes.append(p)

    iou = np.zeros((50, 4))
    for step in range(50):
        labels = []
        for scene, p in zip(scenes, planes):
            delta = np.full(4, step / 50)
            labels.append(infer.thresholded(infer.ilp(p, q), getattr(scene, prior), delta))
        for k in range(4):
            drawn, true = np.stack(labels) == k, np.stack(truths) == k
            iou[step, k] = (drawn & true).sum() / max((drawn | true).sum(), 1)

    def fit(shrink):
        net = types.SimpleNamespace(classes=["background", "a", "b", "c"])
        samples = [(scene.image, tags) for scene in scenes]
        with mock.patch.object(infer, "predict", side_effect=[(p, q) for p in planes]):
            deltas = infer.fit_thresholds(net, samples, shrink)[prior]
        return np.rint(np.array(deltas) * 50).astype(int)

    # Every class its own best; with much shrinking all share that of the mean over the objects.
    alone, shared = fit(shrink=0), fit(shrink=1e9)
    for k in (1, 3):
        assert iou[alone[k], k] == pytest.approx(iou[:, k].max())
    assert len(set(shared[1:])) == 1
    assert iou[shared[1], 1:].mean() == pytest.approx(iou[:, 1:].mean(1).max())


# ---------------------------------------------------------------- photographs
def ramp_image():
    """A smooth picture (40, 30, 3) that JPEG keeps nearly as it is."""
    image = np.full((40, 30, 3), 128.0)
    image[..., 0] = np.linspace(0, 255, 40)[:, None]
    image[..., 1] = np.linspace(255, 0, 30)
    return image.astype(np.uint8)


def test_photographs_of_every_mode_are_read():
    """Each within what its encoding loses: turned by the camera, CMYK, palette."""
    ramp = ramp_image()
    image, exif = Image.fromarray(ramp), Image.Exif()
    exif[0x0112] = 6
    image.transpose(Image.Transpose.ROTATE_90).save("turned.jpg", exif=exif, quality=95)
    image.convert("CMYK").save("cmyk.jpg", quality=95)
    image.quantize(256).save("palette.png")
    image.save("plain.bmp")
    for file in ("turned.jpg", "cmyk.jpg", "palette.png", "plain.bmp"):
        got = data.load_image(file)
        assert np.abs(got.astype(int) - ramp).mean() < 12, file

    # What is transparent shows white.
    alpha = np.zeros((40, 30, 1), np.uint8)
    alpha[:20] = 255
    Image.fromarray(np.concatenate([ramp, alpha], 2)).save("a.png")
    got = data.load_image("a.png")
    assert np.array_equal(got[:20], ramp[:20])
    assert (got[20:] == 255).all()


@pytest.mark.parametrize("full", [1.0, 255.0, 255, 1023, 4095, 65535, 256, 300.0])
def test_deep_photographs_keep_their_range(full):
    """Fault 14: 12 bits in 16, floats in 0..1; a maximum of 256 is as bright as one of 300."""
    ramp = np.linspace(0, full, 1200).reshape(40, 30)
    ramp = ramp.astype(np.float32 if isinstance(full, float) else np.uint16)
    Image.fromarray(ramp).save("deep.tiff")
    got = data.load_image("deep.tiff")[..., 0].astype(int)
    full_scale = {256: 1023, 300.0: 1023}.get(full, full)
    assert np.abs(got - ramp / full_scale * 255).max() <= 1
    assert full_scale != full or got.max() == 255


def test_folders_give_all_that_pillow_reads_and_count_the_rest():
    """Fault 15: a telephone's and a camera's endings; what is no picture is counted."""
    image = Image.fromarray(ramp_image())
    for name, kind in (
        ("a.jfif", "jpeg"), ("b.jpe", "jpeg"), ("c.mpo", "mpo"), ("d.JPG", "jpeg"),
        ("e.webp", "webp"), ("f.tif", "tiff"), ("g.gif", "gif"),
    ):  # fmt: skip
        image.save(name, kind)
    for name in ("notes.txt", "h.heic", ".hidden.jpg"):
        write(name, "no picture")
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        files = data.image_files(".")
    assert [file.name[0] for file in files] == list("abcdefg")
    assert "2 other files are left out: .heic .txt" in out.getvalue()


def test_small_and_long_photographs_train_and_are_labelled():
    make_folder(["0.png,cat", "long.png,dog", "dot.png,"])
    save_photo("photos/long.png", 0, 1, 3000)
    save_photo("photos/dot.png", 0, 1, 1)
    ok(f"{FOLDER} --cache no")
    for prior in ("bb", "seg", "sppxl", "refine"):
        ok(f"infer o/ckpt.pt photos --prior {prior} --soft --out {prior}")
        assert data.read_labels(f"{prior}/long.png").shape == (1, 3000)
        with np.load(f"{prior}/long.npz", allow_pickle=False) as soft:
            assert soft["scores"].shape == (3, 1, 1000)
            assert soft["classes"].tolist() == ["background", "cat", "dog"]


def test_a_missing_photograph_is_left_out_and_named_once():
    make_voc()
    Path("VOC2012/JPEGImages/val_1.jpg").unlink()
    for more in ("--cache no", "--cache c"):
        status, _, err = run(f"train voc {SMALL} --voc VOC2012 --set val --steps 4 {more} --out o")
        assert status == 0
        assert err.count("left out: VOC2012/JPEGImages/val_1.jpg") == 1


def test_photographs_that_have_no_line_of_tags_are_counted():
    make_folder(["0.png,cat", "1.png,"])
    assert "2 photographs are not listed, such as photos/2.png" in ok(f"{FOLDER} --cache no")


def test_broken_photographs_are_left_out_and_named_once():
    make_folder()
    whole = Path("photos/1.png").read_bytes()
    Path("photos/1.png").write_bytes(whole[:-300])
    for more in ("--cache no", "--cache c"):
        status, _, err = run(f"{FOLDER} --steps 6 {more}")
        assert status == 0
        assert err.count("left out: photos/1.png") == 1
    refused("infer o/ckpt.pt photos --out l", "1 of 4 images", "photos/1.png")
    assert sorted(p.name for p in Path("l").glob("?.png")) == ["0.png", "2.png", "3.png"]

    # More than 1 % of 100 or more end the run.
    photos = data.tagged([f"{n}.png" for n in range(200)], [{1}] * 200, ["background", "cat"])
    known = {}
    data.note_broken(photos, {3: "3.png: cut", 5: "5.png: cut"}, known)
    with pytest.raises(data.InputError, match="3 of 200 photographs cannot be read"):
        data.note_broken(photos, {9: "9.png: cut"}, known)


# ---------------------------------------------------------------- augmentation and batches
def test_augmentation_moves_flips_and_lightens():
    """A horizontal ramp tells from where each pixel was taken."""
    ramp = torch.arange(81.0).expand(1, 3, 81, 81)
    draws = torch.full((7, 1), 0.5)  # the middle of every range: nothing moves
    still = data.augment(ramp, draws, flip=0)
    assert torch.allclose(still, ramp, atol=1e-3)
    draws[1], draws[2], draws[5] = 1, 1, 1  # 10 degrees, twice as large, to the right
    moved = data.augment(ramp, draws, flip=0, rotate=10, scale=math.log(2))
    for y, x in ((40, 40), (35, 42), (44, 30)):
        turned = (x - 40) * math.cos(math.radians(10)) - (y - 40) * math.sin(math.radians(10))
        want = 40 + turned / 2 + 0.5 * 81 / 2
        assert moved[0, 0, y, x].item() == pytest.approx(want, abs=0.1)

    image = torch.from_numpy(random_image(0, 20, 20).transpose(2, 0, 1).copy())[None] / 4 + 90
    draws = torch.full((7, 1), 0.5)
    draws[0] = 0  # flipped
    assert torch.allclose(data.augment(image, draws), image.flip(3), atol=1e-3)
    draws[0], draws[3], draws[4] = 1, 1, 1  # 20 % of 255 lighter, contrast x1.2
    mean = image.mean()
    want = ((image - mean) * 1.2 + mean + 51).clamp(0, 255)
    assert torch.allclose(data.augment(image, draws), want, atol=1e-2)


def test_every_epoch_sees_every_image_once_in_another_order():
    keys = []
    for step in range(6):
        keys += train.batch_keys(train.Settings(batch=4), 12, step)
    order = [i for i, _ in keys]
    assert sorted(order[:12]) == sorted(order[12:]) == list(range(12))
    assert order[:12] != order[12:]


# ---------------------------------------------------------------- labels under the score map's cells
SIZES = [("overfeat", 400), ("overfeat", 353), ("vgg16", 288), ("vgg16", 333), ("tiny", 97)]


def places_of_cells(net, size):
    """The middle of each cell's field along a side of `size` pixels: a slow loop, not `geometry`."""
    cells = model.out_size(size, net.rows)
    return np.array([middle_of_field(net.rows, cell) for cell in range(cells)])


@pytest.mark.parametrize("trunk, size", SIZES)
def test_cells_learn_the_labels_of_the_pixels_that_they_see(trunk, size):
    """Fault 21: a map that holds at every pixel its own column (or row), at another resolution."""
    net = model.Net(trunk, ["background", "cat"], (2,))
    columns = np.tile(np.arange(250, dtype=np.uint8), (180, 1))  # (180, 250)
    rows = np.tile(np.arange(180, dtype=np.uint8)[:, None], (1, 250))
    places = places_of_cells(net, size)
    want_x = (places + 0.5) * 250 / size - 0.5
    want_y = (places + 0.5) * 180 / size - 0.5
    got_x = train.at_cells(columns, net.cells(size), size)
    got_y = train.at_cells(rows, net.cells(size), size)
    assert got_x.shape == got_y.shape == (len(places), len(places))
    assert np.abs(got_x.astype(float) - want_x).max() <= 0.51
    assert np.abs(got_y.astype(float) - want_y[:, None]).max() <= 0.51


@pytest.mark.parametrize("trunk, size", SIZES)
def test_own_labels_change_where_the_scores_do(trunk, size, monkeypatch):
    """A stub net is sure of a cat to the right of x = size / 3: so say the labels of the photograph
    (twice as wide as high) and those that the cells learn."""
    net = model.Net(trunk, ["background", "cat"], (2,))
    places = places_of_cells(net, size)
    ramp = torch.tensor(places - size / 3).float().expand(1, 1, len(places), len(places))
    scores = torch.cat([torch.zeros_like(ramp), ramp], 1)
    monkeypatch.setattr(train, "look", lambda *given: (None, scores, torch.zeros_like(ramp)))

    labels = []

    def without_smoothing(p, present, image, regions, sure):
        labels.append(p.argmax(0).astype(np.uint8))
        return labels[0]

    monkeypatch.setattr(infer, "labels_from_tags", without_smoothing)
    photos = data.tagged([random_image(0, size, 2 * size)], [{1}], net.classes)
    photos.features, photos.rows = np.zeros((1, 1, 1, 1), np.float16), [0]
    cells = train.own_labels(net, photos, train.Settings(size=size), torch.device("cpu"))
    in_photo = (np.arange(size) + 0.5) * size / labels[0].shape[1] - 0.5  # of each column
    assert np.array_equal(labels[0], np.tile(in_photo > size / 3, (len(labels[0]), 1)))
    assert np.array_equal(cells[0], np.tile(places > size / 3, (len(places), 1)))


def test_foreground_is_found_without_labels(monkeypatch):
    """Maps of two textures, of which the scores only hint at the objects'."""
    rng = torch.Generator().manual_seed(0)
    textures = torch.rand(2, 24, generator=rng)
    objects = torch.zeros(40, 8, 8, dtype=torch.long)
    for i in range(40):
        y, x = torch.randint(0, 5, (2,), generator=rng)
        objects[i, y : y + 4, x : x + 4] = 1
    maps = textures[objects].permute(0, 3, 1, 2) + 0.2 * torch.rand(40, 24, 8, 8, generator=rng)
    hint = 0.2 * objects[:, None] + torch.randn(40, 1, 8, 8, generator=rng)
    scores = torch.cat([torch.zeros_like(hint), hint], 1)

    def look(net, photos, i, device):
        return maps[i : i + 1], scores[i : i + 1], None

    monkeypatch.setattr(train, "look", look)
    net = model.Net("tiny", ["background", "cat"])
    net.foreground = torch.nn.Conv2d(24, 1, 1).requires_grad_(False)
    photos = data.tagged([""] * 40, [{1}] * 40, net.classes)
    train.learn_foreground(net, photos, train.Settings(foreground=2.0), torch.device("cpu"))
    foreground = net.foreground(model.of_mean_one(maps))[:, 0]
    assert ((foreground > 0) == (objects > 0)).float().mean() > 0.95


# ---------------------------------------------------------------- the feature cache
def cached(net, photos):
    settings = train.Settings(trunk="tiny", size=32, cache="c")
    return train.cached(net, photos, settings, torch.device("cpu"))


def test_cached_features_are_the_trunks():
    make_folder()
    net = model.Net("tiny", ["background", "cat", "dog"])
    photos = data.folder_photos("photos", "tags.csv")
    photos.size = 32
    pixels = torch.stack([photos[i, 0.5][1] for i in range(4)])
    want = net.frozen(pixels).numpy()
    with_features = cached(net, photos)
    for i in range(4):
        i_again, plain, _ = with_features[i, 0.1]
        _, mirrored, _ = with_features[i, 0.9]
        assert i_again == i
        assert np.allclose(plain, want[i], atol=2e-3 * want.max())
        assert torch.equal(mirrored, plain.flip(-1))


def test_cache_knows_photographs_by_their_content():
    """Fault 4: the same names in another project, and a photograph that has been replaced."""
    net = model.Net("tiny", ["background", "cat"])
    features = []
    for folder, seed in (("one", 0), ("two", 1), ("one", 2)):
        save_photo(f"{folder}/images/0.png", seed)
        photos = data.tagged([f"{folder}/images/0.png"], [{1}], net.classes)
        photos.size = 32
        features.append(np.array(cached(net, photos).features))
        again = cached(net, photos).features
        assert np.array_equal(features[-1], again)
    assert not np.array_equal(features[0], features[1])
    assert not np.array_equal(features[0], features[2])
    assert len(list(Path("c").glob("*.npy"))) == 3

    # So does it know other weights and another precision.
    net.trunk[0].bias.data += 1
    assert not np.array_equal(cached(net, photos).features, features[2])
    net.amp = True
    cached(net, photos)
    assert len(list(Path("c").glob("*.npy"))) == 5


@pytest.mark.parametrize("command, file, room", [
    (FOLDER, "o/cache/", 9_000),
    (f"{TOY} --steps 2 --out o", "o/ckpt.pt", 50_000),
])  # fmt: skip
def test_a_full_disk_leaves_nothing_half_written(command, file, room, monkeypatch):
    """Fault 6, for the cache and the checkpoint: the system refuses to let a file grow. What a
    cache needs is compared with what is free before the work."""
    resource = pytest.importorskip("resource", reason="no resource limits on this system")
    make_folder()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        refused(command, file, "make room")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    left = {path.name for path in Path("o").rglob("*") if path.is_file()}
    assert left <= {"settings.json", "log.csv", ".lock"}
    usage = shutil.disk_usage(".")._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    refused(FOLDER, "o/cache", "are needed", "make room")


def test_loader_processes_that_die_end_in_one_line(monkeypatch):
    """Fault 7, for the loop and the cache. Fault 24: features, once cached, need none."""
    load_image = data.load_image

    def dies(path, near=None):
        if torch.utils.data.get_worker_info():
            os._exit(1)
        return load_image(path, near)

    make_folder()
    ok(f"{FOLDER} --cache whole")
    monkeypatch.setattr(data, "load_image", dies)
    for cache in ("no", "new"):
        refused(f"{FOLDER} --workers 1 --cache {cache}", "--workers 1", "/dev/shm", "--workers 0")
    ok(f"{FOLDER} --workers 1 --cache whole")


# ---------------------------------------------------------------- tags and lists
@pytest.mark.parametrize("rows, tags", [
    (["file,tags", "0.png,dog", "1.png,cat;dog", "2.png,"], [{2}, {1, 2}, {0}]),
    (["0.png,Background", "1.png,cat", "2.png,BACKGROUND;cat"], [{0}, {1}, {1}]),  # fault 9
    (["0.png,dog", "./0.png,cat", "1.png,"], [{1, 2}, {0}]),  # fault 10
    (["0.png,sea lion", "1.png,sea \t lion", "2.png,sea\u00a0lion "], [{1}] * 3),  # fault 11
    (["0.png,caf\u00e9", "1.png,cafe\u0301", "2.png,caf\u00e9;"], [{1}] * 3),
])  # fmt: skip
def test_one_meaning_is_one_class(rows, tags):
    make_folder(rows)
    photos = data.folder_photos("photos", "tags.csv")
    assert [set(np.flatnonzero(row)) for row in photos.tags] == tags


def test_photographs_without_background_are_warned_of():
    """Fault 13, and what a run says of its photographs before it starts."""
    make_folder()
    out = ok(FOLDER)
    assert "4 images, 3 with objects, 1 of background alone" in out
    assert "background 1, cat 2, dog 2" in out
    assert "warning" not in out
    make_folder(["0.png,cat", "1.png,dog", "0.png,dog"])
    out = ok(FOLDER)
    assert "warning: no photograph without objects" in out
    assert "tags.csv: 1 rows name a file again" in out


@pytest.mark.parametrize("line", ["{i}", "JPEGImages/{i}.jpg SegmentationClass/{i}.png",
                                  "/JPEGImages/{i}.jpg", "img/{i}.jpg"])  # fmt: skip
def test_lists_of_ids_and_of_paths_name_the_same_images(line):
    write("VOC/ImageSets/Segmentation/val.txt", f"{line.format(i='2007_000033')}\n\n")
    assert data.voc_ids("VOC", "val") == ["2007_000033"]


def test_voc_tags_are_mains_else_the_annotations():
    make_voc()
    write("VOC2012/ImageSets/Main/val.txt", "val_0\n2007_1")
    write("VOC2012/ImageSets/Main/cat_val.txt", "val_0  1\nval_1 -1\nval_2 0\nval_3 -1")
    thing = "<object><name>{}</name><part><name>head</name></part></object>"
    xml = f"<annotation>{thing.format('person')}{thing.format('dog')}</annotation>"
    write("VOC2012/Annotations/2007_1.xml", xml)
    assert data.voc_tags("VOC2012", "val")["val_2"][1] == {8}  # only as a difficult object
    photos = data.voc_photos("VOC2012", "val")
    assert np.flatnonzero(photos.tags[1]).tolist() == [12, 15]


def test_synsets_are_those_of_ilsvrc_that_are_clear():
    """788 of its 1,000 have a class or are background; photographs of others may show a class."""
    names = list(dict(data.read_rows(data.SYNSETS, "synsets", columns=2)).values())
    assert len(names) == 788
    assert set(names) == set(data.VOC_CLASSES)
    for name, count in (("dog", 118), ("bird", 59), ("cat", 5), ("background", 551)):
        assert names.count(name) == count


# ---------------------------------------------------------------- masks
MASKED = f"{FOLDER} --masks masks --cache no --no-jitter"


def make_masks():
    """masks/0.png ...: the tags of make_folder's photographs on the left, void at the border."""
    make_folder()
    for n, k in enumerate((1, 2, 2)):
        mask = np.zeros((24, 30), np.uint8)
        mask[:, :15] = k
        mask[0] = 255
        data.save_labels(f"masks/{n}.png", mask)


def test_masks_are_counted_whatever_their_ending():
    """Fault 18: .PNG is a mask; a photograph of background alone needs none; others are left out."""
    make_masks()
    Path("masks/1.png").rename("masks/1.PNG")
    Path("masks/2.png").unlink()
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying; the mask is of the upright photograph
    Image.fromarray(random_image(0, 30, 24)).save("photos/0.png", exif=exif)
    out = ok(MASKED)
    assert "2 of 4 photographs have a mask, 1 others are background alone, 1 left out" in out


def test_weak_training_and_inference_open_no_mask():
    """Every file that Python opens is recorded; with --masks the record shows them, so it can fail."""

    def opened(folder, *commands):
        OPENED.clear()
        for command in commands:
            ok(command)
        return any(folder in path for path in OPENED)

    masks = make_voc()
    save_vgg("vgg.pth")
    weak = (
        "train voc --voc VOC2012 --set val --weights vgg.pth --steps 2 --size 64 --head 8"
        " --batch 2 --threshold-images 2 --device cpu"
    )
    label = "infer o/ckpt.pt --voc VOC2012 --set val --out p --prior refine"
    rounds = "--self-steps 2 --self-rounds 1 --out o"
    assert not opened("SegmentationClass", f"{weak} {rounds}", label)
    assert any("JPEGImages" in path for path in OPENED)
    assert sorted(path.stem for path in Path("p").iterdir()) == sorted(masks)
    assert opened("SegmentationClass", f"{weak} --masks VOC2012/SegmentationClass --out strong")

    # The ladder has all the rungs, and the published form of a model says nothing of its maker.
    out = ok("eval_voc ladder o/head.pt --voc VOC2012 --weights vgg.pth --json l.json")
    rows = json.loads(Path("l.json").read_text())["rows"]
    assert list(rows) == ["base", "ilp", "ilp+sppxl", "ilp+bb", "ilp+seg", "ilp+refine"]
    assert "paper, val" in out
    assert b"VOC2012" not in Path("o/head.pt").read_bytes()


# ---------------------------------------------------------------- runs and their folders
def test_a_new_run_moves_the_earlier_one_aside():
    """Faults 1 and 3: nothing is lost, and labels of its own making are not learned again."""
    again = f"{FOLDER} --self-steps 2 --self-rounds 1"
    make_folder()
    ok(again)
    first = Path("o/ckpt.pt").read_bytes()
    write("tags.csv", "0.png,cat\n1.png,\n2.png,\n3.png,")  # a class fewer, too
    assert "the run that was there is now in o/run1" in ok(again)
    assert Path("o/run1/ckpt.pt").read_bytes() == first
    labels = np.load("o/self1.npy")
    assert set(np.unique(labels[1:])) <= {0, 255}
    refused(f"{again} --lo 3", "--lo")  # moves nothing
    assert "is now in o/run2" in ok(again)
    assert Path("o/run1/ckpt.pt").read_bytes() == first


def test_two_live_runs_never_share_a_folder():
    """Fault 2, and its sibling: resuming a run that is still alive."""
    ok(f"{TOY} --steps 2 --out o")
    lock = train.claim(Path("o"))
    for more in ("", "--resume"):
        refused(f"{TOY} --steps 4 --out o {more}", "o: another run writes there", "--out")
    lock.close()
    ok(f"{TOY} --steps 4 --out o --resume")


@pytest.mark.parametrize("first, then", [(True, False), (False, True)])
def test_a_run_goes_on_at_another_precision(first, then, monkeypatch):
    """Fault 5: a checkpoint of a machine with bfloat16 on one without, and back; the cache follows."""
    make_folder()
    able = {"amx_bf16": first}
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: able, raising=False)
    ok(f"{FOLDER} --amp")
    able["amx_bf16"] = then
    for amp in ("--amp", ""):
        out = ok(f"{FOLDER} --steps 4 {amp} --resume")
        assert ("in bfloat16" in out) == then
    assert model.load_net("o/ckpt.pt")[0].amp == then


def test_resuming_with_other_tags_or_settings_is_refused():
    make_folder()
    ok(FOLDER)
    refused(f"{FOLDER} --resume --r 3 --seed 5", "r was 5.0 and is 3.0", "seed was 0 and is 5")
    write("tags.csv", "0.png,cat\n1.png,dog\n2.png,cat\n3.png,")
    refused(f"{FOLDER} --resume", "o/ckpt.pt", "photos", "give the former")
    refused(f"{FOLDER.replace('out o', 'out gone')} --resume", "gone/ckpt.pt", "no checkpoint")
    assert not Path("gone").exists()


def test_a_head_is_refused_on_other_trunk_weights():
    """Fault 8; half-precision copies of the same weights are the same trunk."""
    make_voc()
    state = save_vgg("vgg.pth")
    torch.save({name: tensor.half() for name, tensor in state.items()}, "half.pth")
    save_vgg("other.pth", seed=1)
    voc = f"train voc {SMALL} --trunk vgg16 --size 64 --voc VOC2012 --set val --out o"
    ok(f"{voc} --weights vgg.pth")
    label = "infer o/ckpt.pt VOC2012/JPEGImages/val_0.jpg --out l"
    ok(f"{label} --weights half.pth")
    ok(f"{voc} --weights half.pth --steps 4 --resume")
    refused(f"{label} --weights other.pth", "o/ckpt.pt", "other trunk weights", "--weights FILE")
    refused(f"{voc} --weights other.pth --steps 6 --resume", "o/ckpt.pt", "other trunk weights")


def outcome(folder):
    """What equal runs have in common: log.csv but for its times, all weights and moments."""
    ckpt = model.read_checkpoint(f"{folder}/ckpt.pt")
    tensors = dict(ckpt["model"])
    for i, moments in ckpt["optimizer"]["state"].items():
        for name, value in moments.items():
            tensors[f"{i} {name}"] = value
    hashes = {}
    for name, value in tensors.items():
        hashes[name] = hash(torch.as_tensor(value).numpy().tobytes())
    lines = Path(folder, "log.csv").read_text().splitlines()
    return [line.split(",")[:4] for line in lines], hashes


def test_a_killed_run_resumes_bit_exact():
    """SIGKILL at random moments (KILLS=20 for more): a whole checkpoint each time, the same end."""
    ok(f"{TOY} --out whole --steps 60")
    ok(f"{TOY} --out killed --steps 2")
    assert outcome("whole") != outcome("killed")
    command = [HERE / "train.py", *f"{TOY} --out killed --steps 60 --resume".split()[1:]]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for _ in range(int(os.environ.get("KILLS", "3"))):
        options = {"stdout": subprocess.PIPE, "text": True, "env": environment}
        going = subprocess.Popen([sys.executable, *command], **options)
        for line in going.stdout:
            if "images/s" in line:  # the log's heading: training starts
                break
        time.sleep(np.random.default_rng().uniform(0.02, 0.5))
        going.kill()
        going.communicate()
        assert model.read_checkpoint("killed/ckpt.pt")["step"] >= 2
    with open("killed/log.csv", "a") as file:
        file.write("99,20,0.1,0.1,1\nhalf a l\0")  # written after the last checkpoint
    for workers in (0, 2):  # the second time there is nothing left to do
        ok(f"{TOY} --out killed --steps 60 --resume --workers {workers}")
        assert outcome("whole") == outcome("killed")


def torchrun(command):
    """Run "train argument ..." as two processes on this machine."""
    launcher = "-m torch.distributed.run --standalone --local-addr 127.0.0.1 --nproc-per-node 2"
    arguments = [*launcher.split(), HERE / "train.py", *command.split()[1:]]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    options = {"capture_output": True, "text": True, "env": environment}
    done = subprocess.run([sys.executable, *arguments], check=False, **options)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("kind", ["tags", "labels"])
def test_two_processes_train_as_one(kind):
    """Fault 25: the same losses, where masks have more void in one image than in another; those two
    are stopped at step 8 and resumed."""
    try:
        socket.create_server(("127.0.0.1", 0)).close()
    except OSError as e:
        pytest.skip(f"no sockets here: {e}")
    make_masks()
    for n in range(3):
        mask = data.read_labels(f"masks/{n}.png").copy()
        mask[: 6 * n] = 255
        data.save_labels(f"masks/{n}.png", mask)
    command = f"{FOLDER if kind == 'tags' else MASKED} --log-every 1 --dropout 0 --optimizer sgd"
    command += " --schedule steps --lr 0.01 --out"
    ok(f"{command} one --steps 20")
    if kind == "labels":
        torchrun(f"{command} two --steps 8")
    torchrun(f"{command} two --steps 20 {'--resume' if kind == 'labels' else ''}")
    one = [float(row[2]) for row in outcome("one")[0][1:]]
    two = [float(row[2]) for row in outcome("two")[0][1:]]
    assert len(one) == len(two) == 20
    assert np.abs(np.subtract(one, two)).max() < 1e-5
    assert one[0] - one[-1] > 1e-3  # there is something to compare


# ---------------------------------------------------------------- options
def test_settings_of_the_paper_preset_are_the_papers():
    paper = train.parse(["paper", "--imagenet", "."])[1]
    assert (paper.lr, paper.momentum, paper.weight_decay) == (1e-3, 0.9, 5e-5)
    assert (paper.batch, paper.dropout, paper.r, paper.size) == (16, 0.5, 5, 400)
    assert (paper.optimizer, paper.schedule, paper.train_convs) == ("sgd", "steps", 0)
    stage = train.Stage(0, 10**6, 0)
    for step, factor in ((312_499, 1), (312_500, 0.8), (625_000, 0.64)):
        assert train.schedule(paper, step, stage) == pytest.approx(factor)


def test_the_panel_shows_the_prior_and_the_form_that_were_asked_for():
    ok(f"{TOY} --steps 2 --out o")
    save_photo("photo.png", 0, 60, 80)
    pictures = set()
    for more in ("", "--no-ilp", "--ilp-form all", "--prior sppxl", "--prior bb", "--prior seg"):
        ok(f"infer o/ckpt.pt photo.png --panel p.png {more}")
        pictures.add(Path("p.png").read_bytes())
    assert len(pictures) == 6


# ---------------------------------------------------------------- trunks of torch.hub, training labels
@pytest.fixture
def toy_run():
    """out/toy, a finished run, and a photograph to label."""
    ok(f"{TOY} --steps 2 --out out/toy")
    save_photo("photo.png", 0, 60, 80)


HUBCONF = """
import torch

class Patches(torch.nn.Module):
    def __init__(self, maps):
        super().__init__()
        self.patch = torch.nn.Conv2d(3, maps, 14, 14)

    def get_intermediate_layers(self, images, n, reshape):
        assert images.shape[2] % 14 == 0 and images.shape[3] % 14 == 0
        return [self.patch(images)]

def dinov2_vits14(pretrained):
    return Patches(384)
"""


@pytest.fixture
def hub(monkeypatch):
    """A local torch.hub with a stand-in of DINOv2's repository and weights, as a network leaves them."""
    monkeypatch.setattr(torch.hub, "_hub_dir", str(Path("hub").absolute()))
    write("hub/facebookresearch_dinov2_main/hubconf.py", HUBCONF)
    Path("hub/checkpoints").mkdir()
    module = model.hub_module("facebookresearch/dinov2:main", "dinov2_vits14")
    torch.save(module.state_dict(), "hub/checkpoints/dinov2_vits14_pretrain.pth")


def test_a_module_of_torch_hub_trains_and_labels(hub):
    make_folder()
    small = SMALL.replace("--trunk tiny --size 32", "--trunk dinov2_vits14 --size 64")
    ok(f"train folder {small} --self-steps 2 --images photos --tags tags.csv --out o")
    ckpt = model.read_checkpoint("o/ckpt.pt")
    assert not any(name.startswith("trunk.") for name in ckpt["model"])
    ok("infer o/head.pt photos --prior refine --device cpu --out l")
    assert data.read_labels("l/0.png").shape == (24, 30)
    refused("infer o/head.pt photos --dense 2 --device cpu --out l2", "--sides")


def test_a_modules_cells_lie_on_the_right_pixels(hub):
    net = model.Net("dinov2_vits14", ["background", "bright"], kernel=(1,), head=(1,))
    for layer in [net.trunk[0].patch, *net.head]:  # every layer adds up what it sees
        layer.weight.data.fill_(0.01)
        layer.bias.data.zero_()
    image = torch.zeros(1, 3, 100, 130)  # 14 divides neither side
    image[:, :, 28:70, 56:98] = 255  # around pixel (48.5, 76.5)
    scores, _, step, offset = net.dense(image)
    pixels = model.upsample(scores, (100, 130), step, offset)[0, 1]
    bright = pixels > (pixels.min() + pixels.max()) / 2
    y, x = bright.nonzero().float().mean(0)
    assert abs(y - 48.5) <= 2 and abs(x - 76.5) <= 2


def test_a_module_that_cannot_be_had_is_one_line(monkeypatch):
    monkeypatch.setattr(torch.hub, "_hub_dir", str(Path("nowhere").absolute()))
    make_folder()
    small = SMALL.replace("--trunk tiny", "--trunk dinov2_vits14")
    refused(f"train folder {small} --images photos --tags tags.csv --out o", "dinov2")


def test_training_labels_keep_to_the_tags_and_say_so(toy_run):
    scenes = data.toy_scenes(0, 2)
    for name, image, _ in scenes:
        Path("photos").mkdir(exist_ok=True)
        Image.fromarray(image).save(f"photos/{name}.png")
    write("tags.csv", "scene0.png,grid\nscene1.png,")
    command = "infer out/toy/ckpt.pt photos --device cpu --known-tags tags.csv"
    assert "known tags" in ok(f"{command} --sure 0.9 --out l")
    labels = data.read_labels("l/scene0.png")
    assert labels.shape == scenes[0][1].shape[:2]
    assert set(np.unique(labels)) <= {0, data.TOY_CLASSES.index("grid"), 255}
    assert (data.read_labels("l/scene1.png") == 0).all()  # no tag: all background
    assert "known tags" in Image.open("l/scene0.png").text["Comment"]
    write("tags.csv", "scene0.png,zebra")
    refused(f"{command} --out l2", "zebra")
    refused(f"{command} --prior sppxl --out l2", "--prior")


def test_training_labels_are_scored_apart_from_vocs_measure():
    truth = np.array([[0, 0, 8, 8], [255, 0, 8, 8]], np.uint8)
    make_voc({"a": truth})
    data.save_labels("pred/a.png", np.array([[0, 255, 8, 255], [0, 0, 0, 8]], np.uint8))
    refused("eval_voc score pred --voc VOC2012", "255 is not allowed")
    out = ok("eval_voc score pred --voc VOC2012 --void-allowed --json s.json")
    report = json.loads(Path("s.json").read_text())
    assert "not VOC's measure" in out and "not VOC's measure" in report["what"]
    assert report["coverage"] == pytest.approx(100 * 5 / 7)  # of 7 that are not void in the truth
    # Covered: background 2 right, 1 that is a cat; cat 2 right, 1 missed. In all: 3 and 4 are true.
    assert report["iou"]["background"] == pytest.approx(100 * 2 / 3)
    assert report["iou"]["cat"] == pytest.approx(100 * 2 / 3)
    assert report["mean_iou_void_wrong"] == pytest.approx(100 * (2 / 4 + 2 / 4) / 2)


def test_priors_in_processes_give_the_same_in_order(toy_run):
    for n in range(3):
        save_photo(f"photos/{n}.png", n)
    write("photos/broken.png", "not a photograph")
    for workers in (0, 2):
        command = f"infer out/toy/ckpt.pt photos --prior refine --device cpu --out l{workers}"
        refused(f"{command} --workers {workers}", "broken.png")
    for n in range(3):
        assert Path(f"l0/{n}.png").read_bytes() == Path(f"l2/{n}.png").read_bytes()


def test_masks_stay_with_their_photographs():
    """What is left out takes its labels along."""
    photos = data.tagged(["a", "b", "c"], [set(), {1}, {1}], ["background", "cat"])
    photos.cells = np.arange(3, dtype=np.uint8).reshape(3, 1, 1)
    assert photos.take([0, 2]).cells.ravel().tolist() == [0, 2]


def test_labels_of_other_classes_are_not_scored_as_vocs(toy_run):
    """A label PNG says what its indices mean, and whether true tags entered."""
    make_voc({"a": np.full((20, 30), 3, np.uint8)})
    ok("infer out/toy/ckpt.pt --voc VOC2012 --set val --device cpu --out l")
    refused("eval_voc score l --voc VOC2012", "a.png", "stripes", "--classes")
    refused("eval_voc submit l --voc VOC2012 --set val --out r.tgz", "a.png", "stripes")
    ok("eval_voc score l --voc VOC2012 --classes out/toy/ckpt.pt")
    refused("infer out/toy/ckpt.pt --voc VOC2012 --known-tags --out l2", "VOC's classes")
    data.save_labels("k/a.png", np.full((20, 30), 3), comment="made with known tags")
    refused("eval_voc score k --voc VOC2012", "known tags", "--void-allowed")
    data.save_labels("v/a.png", np.full((20, 30), 21))
    refused("eval_voc score v --voc VOC2012 --void-allowed", "index 21")


def test_a_run_moves_only_its_own_files():
    """Photographs in the folder of the run, and the working folder, stay where they are."""
    make_folder()
    run = f"train folder {SMALL} --images photos --tags tags.csv --out photos"
    for _ in range(2):
        ok(run)
    assert Path("photos/0.png").exists() and Path("photos/run1/ckpt.pt").exists()
    for _ in range(2):
        ok(f"{TOY} --steps 2 --out .")


def test_a_resumed_run_learns_the_same():
    make_folder()
    for n in range(4):
        data.save_labels(f"m/{n}.png", np.full((24, 30), [1, 2, 2, 0][n]))
    ok(FOLDER)
    refused(f"{FOLDER} --steps 4 --resume --masks m", "photos was")
    refused(f"{FOLDER} --steps 4 --resume --cache no", "cached was True")
    refused(f"{FOLDER} --steps 1 --resume", "steps was 2")


def test_labels_of_an_earlier_run_are_not_taken_for_these(toy_run):
    for n in range(2):
        save_photo(f"photos/{n}.png", n)
    command = "infer out/toy/ckpt.pt photos --device cpu --out l"
    ok(command)
    write("photos/1.png", "broken meanwhile")
    refused(command, "photos/1.png")
    assert Path("l/0.png").exists() and not Path("l/1.png").exists()
    refused(f"{command} --panel photos/0.png", "--panel")


def test_the_readmes_names_of_classes(toy_run):
    """Its lines that turn a label PNG back into names."""
    code = readme_parts("python")[1]
    ok("infer out/toy/ckpt.pt photo.png --device cpu --out out/labels")
    code = code.replace("out/folder/ckpt.pt", "out/toy/ckpt.pt").replace("street", "photo")
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(code, {})  # noqa: S102
    counts = eval(out.getvalue())
    assert sum(counts.values()) == 60 * 80 and set(counts) <= set(data.TOY_CLASSES)


# ---------------------------------------------------------------- malformed files and flags
class Evil:
    """What writes a file when it is unpickled."""

    def __reduce__(self):
        return open, ("executed", "w")


def as_bytes(save, *content):
    """What save(file, *content) writes."""
    buffer = io.BytesIO()
    save(buffer, *content)
    return buffer.getvalue()


def saved(content):
    return as_bytes(lambda file: torch.save(content, file))


def png(array, colour=None):
    """An array as a PNG, grey or RGB; colour: of all 256 entries of its palette."""
    image = Image.fromarray(array)
    if colour:
        image.putpalette(colour * 256)
    return as_bytes(image.save, "png")


LABEL = "infer toy.pt photo.png --device cpu --out out"
SCORE = "eval_voc score masks --voc VOC --set b --json out"
LADDER = "eval_voc ladder toy.pt --voc VOC --set b --json out"
SUBMIT = "eval_voc submit masks --voc VOC --set b --out out"
VOC = f"train voc {SMALL} --voc VOC --set b --out out"
CSV = f"train folder {SMALL} --images VOC/JPEGImages --tags t.csv --out out"
PAPER = f"train paper {SMALL} --imagenet . --synsets s.csv --out out"


MASKS = f"{VOC} --masks masks --no-jitter --cache no"


def malformed_files():
    """(command, a file that it reads, wrong contents of it, and what the line says but its name)."""
    cache = next(Path("run/cache").glob("*.npy"))
    arrays = [cache.read_bytes()[:-9], as_bytes(np.save, np.ones(3))]
    arrays.append(as_bytes(np.save, np.array([Evil()])))
    yield f"{VOC} --cache run/cache", cache, arrays
    yield f"{VOC} --cache run/cache", cache.with_suffix(".json"), [b"", b"3"], cache.name

    picture = png(random_image(0, 24, 30))
    bomb = picture[:16] + bytes([0, 0, 120, 99]) * 2 + picture[24:]  # 30,819 x 30,819 pixels
    yield LABEL.replace("photo", "x"), "x.png", [b"", picture[:-99], bomb]
    yield VOC, "VOC/JPEGImages/b.jpg", [b"hello", picture[:60]]

    # Faults 16, 17 and 19: 255 for objects, none, another size, other colours; class 12 is right.
    plain = np.full((24, 30), 12, np.uint8)
    void, empty, other, above = png(plain + 243), png(plain * 0), png(plain - 1), png(plain + 65)
    turned, colours, deep = png(plain.T), png(plain, [9, 8, 7]), png(plain.astype(np.uint16))
    yield MASKS, "masks/b.png", [void, empty, other], "other classes than their tags"
    yield MASKS, "masks/b.png", [colours], "save them as plain grey"
    yield MASKS, "masks/b.png", [b"", picture, above, turned]
    yield SCORE, "masks/b.png", [b"", picture, above, turned, deep, void]
    yield SCORE, "VOC/SegmentationClass/b.png", [void, empty], "no object"
    yield LADDER, "VOC/SegmentationClass/b.png", [above, turned]
    yield SUBMIT, "masks/b.png", [above, turned, empty]

    # Faults 11 and 12: several names in one, other spellings.
    rows = [b"", b"b.jpg,cat,dog", b"no.jpg,cat", b"../../x.jpg,cat", b"\xff"]
    names = [b'b.jpg,"dog,cat"', b"b.jpg,[dog]", b"b.jpg,dog|cat", b"b.jpg,Dog;dog"]
    yield CSV, "t.csv", rows + names
    yield f"{VOC} --set bad", "VOC/ImageSets/Main/bad.txt", [b"", b"..", b"a\na", b"a\0b"]
    yield VOC, "VOC/ImageSets/Main/cat_b.txt", [b"b 7", b"c 1"]
    thing = "<annotation><object><name>{}</name></object></annotation>"
    xmls = [thing.format(name).encode() for name in ("helmet", "Person", "tv monitor", "")]
    yield f"{VOC} --set new", "VOC/Annotations/new.xml", [b"<annotation>", b"<a/>", *xmls]
    yield PAPER, "s.csv", [b"n1", b"n1,emu"]

    toy, whole = model.read_checkpoint("toy.pt"), Path("toy.pt").read_bytes()
    nan = {**toy["model"], "head.0.bias": toy["model"]["head.0.bias"] * math.nan}
    checkpoints = [b"hello", whole[:-100], saved([1])]
    for change in ({"format": 1}, {"format": Evil()}, {"classes": 3}, {"settings": {}},
                   {"model": {}}, {"model": nan}):  # fmt: skip
        checkpoints.append(saved({**toy, **change}))
    early = [saved({**toy, "thresholds": {}})]  # of a run that has not ended
    yield LABEL.replace("toy", "bad"), "bad.pt", checkpoints
    yield f"{LABEL} --prior bb".replace("toy", "bad"), "bad.pt", early, "bad.pt: no thresholds"
    yield f"{VOC} --out run --resume --steps 4", "run/ckpt.pt", checkpoints[:3]
    weights = [b"hello", saved([Evil()]), saved({"features.0.weight": 1})]
    yield f"{VOC} --trunk vgg16 --size 96 --weights w.pt", "w.pt", weights

    mat = mcg_content(np.zeros((24, 30), int), np.ones((1, 1), bool), np.ones((1, 1)))
    mats = [b"hello"]
    for name, value in (("scores", "x"), ("scores", np.ones((2, 1))), ("superpixels", plain[1:])):
        mats.append(as_bytes(scipy.io.savemat, {**mat, name: value}))
    yield f"{LABEL} --prior seg --mcg .", "photo.mat", mats
    yield f"{LABEL} --prior bb --boxes .", "photo.txt", [b"", b"1 2 3 4", b"1 2 3 4 x", b"\xff"]


# Values that are wrong and, of fault 20, options that would do nothing.
WRONG_FLAGS = {
    f"{TOY} --out out": "--batch 0|--lr nan|--dropout 2|--seed -1|--train-convs 9|--head x|--size 4"
    "|--kernel ,|--dense 3|--device no|--stesp 5|--r 0|--save-every 3|--limit 3|--images photos"
    "|--foreground 2|--self-steps 3|--masks photos|--lr 1e30 --optimizer sgd --steps 9",
    VOC: "--self-rounds 2|--toy-images 3|--sure 0.3|--trunk-lr 1|--r 3 --aggregation max",
    MASKS: "--self-steps 3",
    LABEL: "--dense 3|--sides 0|--prior no|--device cuda:99|no.jpg|--voc VOC|--boxes .|--mcg ."
    "|--weights no|--out .|photo.png",  # a label in the place of a photograph, two in one file
    LADDER: "--limit -1|--set ../b|--priors no|--json x.png",
}


def malformed_inputs():
    """(command, what its line has to say), one after the other, with the wrong file in its place."""
    for command, name, contents, *words in malformed_files():
        file = Path(name)
        original = file.read_bytes() if file.exists() else None
        for content in contents:
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(content)
            yield command, words[0] if words else file.name
        file.unlink()
        if original is not None:
            file.write_bytes(original)
    for command, flags in WRONG_FLAGS.items():
        for flag in flags.split("|"):
            yield f"{command} {flag}", flag.split()[0].strip("-")


def test_malformed_inputs_are_refused_in_one_line_and_leave_nothing(tmp_path):
    """Each names its file or flag; nothing is half written, nothing in a file executed."""
    make_voc({"b": np.full((24, 30), 12, np.uint8)}, "b", "VOC")
    data.save_labels("masks/b.png", np.full((24, 30), 12))
    write("VOC/ImageSets/Main/new.txt", "new")  # its tags are in Annotations
    for file in ("photo.png", "n1/x.png", "../../x.jpg"):  # the last is outside of the folder
        save_photo(file)
    ok(f"{VOC} --out run")
    shutil.copy("run/ckpt.pt", "toy.pt")

    wrong = []
    for command, word in malformed_inputs():
        before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
        try:
            refused(command, word)
        except (Exception, pytest.fail.Exception) as e:  # noqa: BLE001 (all are listed at the end)
            wrong.append(f"{command} [{word}]: {type(e).__name__} {str(e)[:300]}")
        for path in tmp_path.rglob("*"):
            begun = path.name in ("settings.json", "log.csv", ".lock") or path.is_dir()
            if not begun and path.stat().st_mtime_ns != before.get(path):
                wrong.append(f"{command} [{word}] wrote {path}")
        shutil.rmtree("out", ignore_errors=True)
    assert not wrong, "\n".join(wrong)


# ---------------------------------------------------------------- the README and what is published
@needs_shared
def test_published_head_labels_real_photographs():
    photos = data.imagenet_photos(SHARED / "data/imagenet-sample")
    assert len(photos) >= 788
    voc = SHARED / "data/VOCdevkit/VOC2012"
    weights = SHARED / "weights/vgg16_features_fp16.pth"
    head = HERE / "assets/voc.pt"
    ok(
        f"eval_voc ladder {head} --voc {voc} --weights {weights} --limit 4 --sides 288 --priors refine --json l.json"
    )
    rows = json.loads(Path("l.json").read_text())["rows"]
    assert rows["ilp+refine"]["mean_iou_defined"] > 35


def readme_parts(kind):
    return re.findall(rf"```{kind}\n(.*?)```", (HERE / "README.md").read_text(), re.DOTALL)


def test_the_readmes_forks_and_lesson_run():
    """Its diffs, applied to a copy of the scripts, train and label; its lesson runs."""

    def python(*arguments):
        return subprocess.check_output([sys.executable, *arguments], text=True)

    for script in HERE.glob("*.py"):
        shutil.copy(script, ".")
    for diff in readme_parts("diff"):
        file = Path(re.search(r"\+\+\+ b/(\S+)", diff)[1])
        lines = diff.splitlines(keepends=True)[3:]  # after the names and the place
        old = "".join(line[1:] for line in lines if line[0] != "+")
        new = "".join(line[1:] for line in lines if line[0] != "-")
        assert file.read_text().count(old) == 1, diff
        file.write_text(file.read_text().replace(old, new))
    toy = f"{TOY} --steps 2".split()[1:]
    out = python("train.py", *toy, "--aggregation", "top10", "--trunk", "wide")
    assert "ilp+median" in out
    python("train.py", *toy)
    assert "speckle" in python("-c", readme_parts("python")[0])


def test_the_readmes_commands_run_as_written(monkeypatch):
    """Every line that starts with `python `, in order, on tiny data that is called as there."""
    monkeypatch.setattr(model, "rate", lambda function, tensor: 1.0)  # which takes its time
    for name in ("train", "test", "val"):
        make_voc(name=name, root="VOCdevkit/VOC2012")
    for n, wnid in enumerate(("n01443537", "n01484850", "n01491361")):  # fish: background
        save_photo(f"imagenet/{wnid}/x.JPEG", n, 60, 70)
    for n in range(4):
        save_photo(f"photos/{n}.jpg", n)
    write("tags.csv", "0.jpg,cat\n1.jpg,cat;dog\n2.jpg,dog\n3.jpg,\n")
    write("synsets.csv", "n01443537,cat\n")  # one photograph, to be quick
    save_vgg("vgg16_features.pth")
    Path("net_weight_1").touch()
    os.truncate("net_weight_1", SLOW_OVERFEAT["overfeat"][0])

    photographs = "--size 64 --head 8 --self-rounds 1 --self-steps 1 --batch 4"
    masked = "--size 64 --head 8 --batch 4"
    small = {"voc": photographs, "folder": photographs,
             "paper": "--batch 1 --head 8 --workers 0 --synsets synsets.csv"}  # fmt: skip
    ends = "--steps 1 --threshold-images 1 --device cpu"
    ok(f"train voc --voc VOCdevkit/VOC2012 --weights vgg16_features.pth {photographs} {ends}")
    Path("assets").mkdir()
    shutil.move("out/voc/head.pt", "assets/voc.pt")  # the published one is of other weights

    text = (HERE / "README.md").read_text()
    lines = re.findall(r"^python (?!-m)(.*?)(?:  #.*)?$", text, re.MULTILINE)
    assert len(lines) >= 10
    for line in ["train.py", *lines]:  # the first one: how the set-up command ends
        command = line.replace(".py", "", 1)
        script, first = [*command.split(), "toy"][:2]
        if script == "train":
            more = small.get(first, "--toy-images 8 --toy-scenes 1 --batch 4")
            more = masked if "--masks VOC" in command else more
            command = f"{command} {more} {ends}"
        ok(command)
    for file in ("results.tgz", "out/toy/scores.json", "out/folder/panel.png"):
        assert Path(file).exists()
    weights = model.read_checkpoint("out/paper/ckpt.pt")["model"]
    assert not any(name.startswith("trunk.") for name in weights)  # OverFeat's licence
