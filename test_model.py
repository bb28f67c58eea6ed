"""python -m pytest -q test_model.py

Nearly every expected value is computed here a second time, by slow and obvious loops. The rest are
the paper's numbers, a vector worked by hand, and commands that must end well or in one clear line.
"""

import gc
import io
import itertools
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
from contextlib import redirect_stderr, redirect_stdout
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
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start
gc.freeze()  # what is imported is never searched for garbage
pytestmark = [
    pytest.mark.filterwarnings("error"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # the lock of a run that was refused
]

# Short runs: of the toy, and on photographs (a preset's name and its folders are added).
TOY = "train toy --toy-images 24 --toy-scenes 1 --threshold-images 2 --batch 4 --schedule steps"
TOY += " --log-every 2 --save-every 2 --device cpu"
SMALL = "--trunk tiny --size 32 --head 4 --batch 2 --steps 2 --self-steps 0 --device cpu"
SMALL += " --threshold-images 1"
FOLDER = f"train folder {SMALL} --images photos --tags tags.csv --out o"
TRAIN_VOC = f"train voc {SMALL} --voc VOC2012 --set val --out o"

OPENED = []  # every file that Python opens


def record_opened(event, args):
    if event == "open":
        OPENED.append(str(args[0]))


sys.addaudithook(record_opened)


# ---------------------------------------------------------------- helpers
@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    """Every test starts in an empty folder of its own and draws the same numbers every time."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)


def run(command):
    """Status, stdout and stderr of "script argument ...", in this process."""
    script, *args = shlex.split(command)
    argv, out, err = [f"{script}.py", *args], io.StringIO(), io.StringIO()
    with mock.patch("sys.argv", argv), redirect_stdout(out), redirect_stderr(err):
        try:
            data.run_cli(sys.modules[script].main)
        except SystemExit as e:
            status = e.code or 0
    gc.collect()  # with the error's frames goes a refused run's lock on its folder
    return status, out.getvalue(), err.getvalue()


def ok(command):
    """What a command that has to end well prints."""
    status, out, err = run(command)
    assert status == 0, (command, err)
    return out


def refused(command, *words):
    """A command has to end with status 2 and one line on stderr, with these words."""
    status, _, err = run(command)
    assert status == 2, command
    err = re.sub("^left out: .*\n", "", err, flags=re.MULTILINE)  # photographs, each named once
    assert err.count("\n") == 1, err
    for word in words:
        assert word in err, (word, err)


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
        for n in range(4):
            mask = np.random.default_rng(n).integers(0, 21, (60, 80 - n), dtype=np.uint8)
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


@pytest.fixture
def toy_run():
    """out/toy, a finished run, and a photograph to label."""
    ok(f"{TOY} --steps 2 --out out/toy")
    save_photo("photo.png", 0, 60, 80)


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
    rows = model.TRUNKS["overfeat"].rows + [model.conv(maps, 3) for maps in (1024, 768, 512, 21)]
    assert model.geometry(rows) == (12, 245, 74)
    assert [model.out_size(n, rows) for n in (388, 389, 400, 401)] == [20, 21, 21, 22]
    lines = model.layer_table(rows, 400)
    parameters = [line["params"] for line in lines]
    assert [line["cells"] for line in lines] == [197, 65, 59, 29, 29, 29, 29, 29, 27, 25, 23, 21]
    assert sum(parameters[:8]) == 18_916_480
    assert parameters[8:] == [9_438_208, 7_078_656, 3_539_456, 96_789]
    assert sum(line["GFLOPs"] for line in lines[:8]) == pytest.approx(39.2, abs=0.2)

    # One pass over all shifts takes the dilations of the paper's section 1.3.
    dense = model.dense_rows(rows, 12)
    assert [row.dilation for row in dense] == [1, 2, 6, 6] + [12] * 8


def test_layer_table_and_rates_are_printed(monkeypatch):
    out = ok("model overfeat")
    assert "stride 12, receptive field 245, trunk 18,916,480 parameters and 39.2 GFLOPs" in out

    def one_a_second(function, tensor):
        return 1.0

    monkeypatch.setattr(model, "rate", one_a_second)
    out = ok("model tiny --bench")
    assert "float32: 4.00 images/s" in out and "bfloat16: 4.00 images/s" in out


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


def test_a_padded_pool_gives_the_cells_of_its_table():
    rows = [model.conv(4, 7, stride=2, pad=3), model.pool(3, 2, pad=1)]  # as a ResNet begins
    net = model.Net("tiny", ["background", "cat"])
    for n in (63, 64):
        cells = net.run_rows(torch.zeros(1, 3, n, n), rows, [torch.nn.Conv2d(3, 4, 7)])
        assert cells.shape[2] == model.out_size(n, rows)


# Bytes of OverFeat's files, and their layers (out, in, kernel, stride, pad) or the side of a pool:
# from the released sources, not from model.py.
SLOW_OVERFEAT = {
    "overfeat": (578_625_952, [
        (96, 3, 7, 2, 0), 3, (256, 96, 7, 1, 0), 2, (512, 256, 3, 1, 1), (512, 512, 3, 1, 1),
        (1024, 512, 3, 1, 1), (1024, 1024, 3, 1, 1)]),
    "overfeat-fast": (583_683_488, [
        (96, 3, 11, 4, 0), 2, (256, 96, 5, 1, 0), 2, (512, 256, 3, 1, 1), (1024, 512, 3, 1, 1),
        (1024, 1024, 3, 1, 1)]),
}  # fmt: skip


def slow_layer(layer, x, values):
    """One layer of OverFeat in numpy, x (D, h, w); returns its output and the values left over."""
    if isinstance(layer, int):
        windows = np.lib.stride_tricks.sliding_window_view(x, (layer, layer), (1, 2))
        return windows[:, ::layer, ::layer].max((3, 4)), values
    out, channels, kernel, stride, pad = layer
    count = out * channels * kernel * kernel
    weight = values[:count].reshape(out, channels, kernel, kernel).astype(np.float64)
    bias = values[count : count + out, None, None]
    padded = np.pad(x, ((0, 0), (pad, pad), (pad, pad)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (kernel, kernel), (1, 2))
    y = np.tensordot(weight, windows[:, ::stride, ::stride], ((1, 2, 3), (0, 3, 4)))
    return np.maximum(y + bias, 0), values[count + out :]


@pytest.mark.parametrize("name", SLOW_OVERFEAT)
@torch.no_grad()
def test_overfeats_file_gives_the_features_of_a_slow_numpy_net(name):
    size, layers = SLOW_OVERFEAT[name]
    values = np.random.default_rng(0).normal(0, 0.03, 19_000_000).astype("<f4")
    values.tofile("weights")
    os.truncate("weights", size)  # a sparse file of the official size
    net = model.Net(name, ["background", "cat"])
    model.load_trunk(net, "weights")

    image = random_image(1, 117, 125).transpose(2, 0, 1)
    slow = (image.astype(np.float64) - 118.380948) / 61.896913
    fast = net.normalise(torch.from_numpy(image)[None])
    convs = iter(net.trunk)
    for layer, row in zip(layers, net.spec.rows, strict=True):
        slow, values = slow_layer(layer, slow, values)
        fast = net.run_rows(fast, [row], convs)  # a convolution takes the next
        assert np.abs(fast[0].numpy() - slow).max() <= 1e-4 * np.abs(slow).max(), layer


@pytest.mark.parametrize("value, size, why", [
    (0.1, 75_665_916, "75,665,916 bytes"), (0.1, 583_683_488, "583,683,488.*--trunk overfeat-fast"),
    (0, 578_625_952, "zeros"), (math.nan, 578_625_952, "NaN or Inf"),
])  # fmt: skip
def test_other_weight_files_are_named(value, size, why):
    np.full(18_916_480, value, "<f4").tofile("weights")
    os.truncate("weights", size)
    with pytest.raises(OSError, match=why) as e:
        model.load_trunk(model.Net("overfeat", ["background", "cat"]), "weights")
    assert e.value.filename == "weights"


@pytest.mark.parametrize("name, factor", [("overfeat", 3), ("overfeat", 12), ("tiny", 2)])
@torch.no_grad()
def test_dense_equals_shift_and_stitch(name, factor, monkeypatch):
    """In float64, on odd sizes, with narrow layers in the place of the wide ones."""
    spec = model.TRUNKS[name]
    narrow = [row._replace(out=min(row.out, 4)) for row in spec.rows]
    monkeypatch.setitem(model.TRUNKS, name, spec._replace(rows=narrow))
    net = model.Net(name, ["background", "cat"], (5,)).double()
    layers = [*net.trunk, *net.head]
    x = torch.randn(1, 3, 233, 215, dtype=torch.double)
    step = model.geometry(net.rows)[0] // factor
    fast = net.run_rows(x, model.dense_rows(net.rows, factor), layers)
    slow = torch.full_like(fast, math.nan)
    for dy, dx in np.ndindex(factor, factor):
        shifted = x[:, :, dy * step :, dx * step :]
        slow[:, :, dy::factor, dx::factor] = net.run_rows(shifted, net.rows, layers)
    assert (fast - slow).abs().max() < 1e-12  # not so if one is left NaN


def test_upsampling_is_bilinear_between_cell_centres():
    scores = torch.tensor([[[[0.0, 4.0, 12.0]]]])  # cells on pixels 0.5, 4.5 and 8.5
    want = torch.tensor([0, 0.5, 1.5, 2.5, 3.5, 5, 7, 9, 11, 12, 12, 12])
    assert torch.allclose(model.upsample(scores, (1, 12), 4, 0.5), want)
    ramp = torch.arange(20.0).view(1, 1, 1, 20)  # the net has seen 20 pixels of 40
    want = (torch.arange(40.0) / 2 - 0.25).clamp(0, 19)
    assert torch.allclose(model.upsample(ramp, (1, 40), 1, 0, seen=(1, 20)), want)


# ---------------------------------------------------------------- aggregation and losses
@pytest.mark.parametrize("name", ["lse", "max", "mean", "sum"])
def test_aggregations_have_the_papers_values_and_right_gradients(name):
    f = model.AGGREGATIONS[name]
    scores = torch.randn(2, 3, 5, 7, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: f(s, 5.0), scores)  # finite differences in float64
    cells = scores.detach().numpy().reshape(2, 3, 35)
    want = {
        "lse": np.log(np.exp(5 * cells).mean(2)) / 5,  # Eq. 6
        "max": cells.max(2),
        "mean": cells.mean(2),
        "sum": cells.sum(2),
    }
    assert np.allclose(f(scores, 5.0).detach(), want[name])
    if name == "lse":  # neither over- nor underflows
        assert f(torch.full((1, 1, 9, 9), 1e4), 5.0).item() == pytest.approx(1e4)
        assert f(torch.full((1, 1, 9, 9), -1e4), 5.0).item() == pytest.approx(-1e4)


def test_losses_are_of_each_images_probabilities_of_its_tags():
    scores = torch.randn(4, 5)
    tags = torch.eye(5)[[0, 2, 4, 1]]
    tags[1, 3] = 1  # the second image has two
    softmax_loss, softmax = model.LOSSES["softmax"]
    sigmoid_loss, sigmoid = model.LOSSES["sigmoid"]
    for b, present in enumerate([[0], [2, 3], [4], [1]]):
        powers = np.exp(scores[b].double().numpy())
        shares = powers / powers.sum()
        alone = powers / (1 + powers)
        assert np.allclose(softmax(scores[b]), shares)
        assert np.allclose(sigmoid(scores[b]), alone)
        want = -np.log(shares[present]).mean()
        assert softmax_loss(scores, tags)[b].item() == pytest.approx(want, rel=1e-5)
        want = -np.log(np.where(tags[b] > 0, alone, 1 - alone)).mean()
        assert sigmoid_loss(scores, tags)[b].item() == pytest.approx(want, rel=1e-5)


def test_pixel_loss_is_half_of_objects_and_half_of_background():
    scores = torch.randn(2, 3, 2, 2)
    labels = torch.tensor([[[0, 1], [2, 0]], [[255, 2], [255, 255]]], dtype=torch.uint8)
    losses = model.pixel_loss(scores, labels)
    cost = -scores.log_softmax(1)  # of image, class, row, column
    background = (cost[0, 0, 0, 0] + cost[0, 0, 1, 1]) / 2
    objects = (cost[0, 1, 0, 1] + cost[0, 2, 1, 0]) / 2
    alone = cost[1, 2, 0, 1]  # of the second image one cell has a label
    assert torch.allclose(losses, torch.stack([background + objects, alone]) / 2)


# ---------------------------------------------------------------- the measure
def test_scorer_gives_the_worked_vector():
    """Four classes by hand: the fourth never occurs, until a pixel is called it."""
    truth = np.array([0, 0, 1, 0, 1, 255, 0, 2, 2, 0], np.uint8)
    guess = np.array([0, 1, 1, 0, 1, 0, 0, 2, 2, 2], np.uint8)
    pixels = eval_voc.confusion(truth, guess, 4)
    assert pixels.tolist() == [[3, 1, 1, 0], [0, 2, 0, 0], [0, 0, 2, 0], [0, 0, 0, 0]]

    classes = ["ground", "cat", "dog", "emu"]
    report = eval_voc.summarise(pixels, classes, 1)
    third = pytest.approx(200 / 3)
    assert report["iou"] == {"ground": pytest.approx(60), "cat": third, "dog": third, "emu": None}
    assert report["mean_iou"] is None
    assert report["mean_iou_defined"] == pytest.approx(100 * 29 / 45)
    assert report["mean_accuracy"] == pytest.approx(100 * (3 / 5 + 1 + 1) / 3)

    guess[0] = 3
    report = eval_voc.summarise(eval_voc.confusion(truth, guess, 4), classes, 1)
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
        mask[mask == 255] = 0
        data.save_labels(f"pred/{i}.png", mask)
    score = "eval_voc score pred --voc VOC2012 --json s.json"
    ok(score)
    report = json.loads(Path("s.json").read_text())
    assert (report["mean_iou"], report["images"]) == (100, 4)
    assert list(report["iou"]) == data.VOC_CLASSES

    ok("eval_voc submit pred --voc VOC2012 --set val --out r.tgz")
    with tarfile.open("r.tgz", "r:gz") as tar:
        for name, (i, mask) in zip(tar.getnames(), masks.items(), strict=True):
            assert name == f"results/VOC2012/Segmentation/comp6_val_cls/{i}.png"
            image = Image.open(tar.extractfile(name))
            assert image.getpalette() == data.voc_palette().ravel().tolist()
            assert np.array_equal(image, mask)
    Path("pred/val_3.png").unlink()  # no image may be left out
    refused(score, "1 of 4", "val_3.png")


def test_ladder_scores_what_infer_writes(monkeypatch):
    """Photographs that are labelled at a lower resolution, too."""

    def predict(net, image, tagged=None):
        """A stub: red and green name two classes, and the image-level prior decides."""
        planes = np.eye(21, dtype=np.float32)[image // 13]  # (H, W, 3, 21)
        p = 0.6 * planes[:, :, 0] + 0.4 * planes[:, :, 1]
        return p.transpose(2, 0, 1), np.linspace(0.1, 1, 21)

    make_voc()
    ok(TRAIN_VOC)
    shrink = data.shrink
    monkeypatch.setattr(data, "shrink", lambda image: shrink(image, 40))
    monkeypatch.setattr(infer, "predict", predict)
    ok("eval_voc ladder o/ckpt.pt --voc VOC2012 --json l.json --priors none")
    ok("infer o/ckpt.pt --voc VOC2012 --prior none --out p")
    ok("eval_voc score p --voc VOC2012 --classes o/ckpt.pt --json s.json")
    rows = json.loads(Path("l.json").read_text())["rows"]
    assert rows["ilp"]["iou"] == json.loads(Path("s.json").read_text())["iou"]
    assert rows["ilp"]["iou"] != rows["base"]["iou"]


def test_scorer_lists_all_problems_at_once():
    masks = make_voc()
    data.save_labels("pred/val_0.png", masks["val_0"])  # 255, where the truth is void
    data.save_labels("pred/val_1.png", np.zeros((60, 80)))  # turned
    write("pred/val_2.png", "not a png")
    command = "eval_voc score pred --voc VOC2012"
    refused(command, "4 of 4", "val_0.png: ", "255", "val_1.png: ", "resized", "val_2", "val_3")


def test_average_precision_by_hand():
    def of(*hits):
        return eval_voc.average_precision(np.linspace(0.9, 0.4, 6), np.array(hits, bool))

    assert of(1, 0, 1, 0, 0, 1) == pytest.approx(100 * (1 + 2 / 3 + 1 / 2) / 3)
    assert of(0, 1, 1, 0, 0, 0) == pytest.approx(100 * 2 / 3)  # which counts for both
    assert of(0, 0, 0, 0, 0, 0) is None


# ---------------------------------------------------------------- superpixels and proposals
def slow_superpixels(image, scale, sigma, min_size):
    """Felzenszwalb-Huttenlocher, where every join relabels the whole picture."""
    H, W = image.shape[:2]
    planes = [ndimage.gaussian_filter(image[..., c] / 255.0, sigma) for c in range(3)]
    smooth = np.stack(planes, -1)
    edges = []
    for dy, dx in ((0, 1), (1, 0), (1, 1), (1, -1)):
        for y, x in np.ndindex(H - dy, W):
            if 0 <= x + dx < W:
                d = smooth[y, x] - smooth[y + dy, x + dx]
                edges.append((math.sqrt(sum(d * d)), (y, x), (y + dy, x + dx)))
    edges.sort(key=lambda edge: edge[0])  # equal costs stay in this order

    segments = np.arange(H * W).reshape(H, W)
    inner = np.zeros(H * W)  # Int(C): the largest cost inside
    for growing in (True, False):
        for cost, p, q in edges:
            a, b = segments[p], segments[q]
            size_a, size_b = (segments == a).sum(), (segments == b).sum()
            if growing:
                limit_a = inner[a] + scale / 255 / size_a
                limit_b = inner[b] + scale / 255 / size_b
                joins = cost < limit_a and cost < limit_b
            else:
                joins = size_a < min_size or size_b < min_size
            if joins and a != b:
                segments[segments == b] = a
                inner[a] = cost
    return in_raster_order(segments)


def in_raster_order(labels):
    """The same segments, numbered by their first pixels."""
    names = list(dict.fromkeys(labels.ravel()))  # each once, in the order of its first pixel
    return np.vectorize(names.index)(labels)


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


def test_superpixels_of_a_photograph_are_found_at_about_160_pixels():
    image = random_image(0, 330, 500) // 4  # to be seen at a third
    small = np.asarray(Image.fromarray(image).reduce(3))
    regions = infer.coarse_superpixels(image)
    assert regions.shape == (330, 500)
    assert np.array_equal(regions[::3, ::3], infer.superpixels(small))


@pytest.fixture
def proposals():
    """9 regions (13, 17), 12 random segments of them and their scores; region 0 is in all."""
    rng = np.random.default_rng(0)
    regions = rng.permutation(221).reshape(13, 17) % 9
    segments = rng.random((12, 9)) < 0.3
    segments[:, 0] = True
    return regions, segments, rng.random(12)


def test_covers_are_mean_scores_of_what_covers_a_pixel(proposals):
    regions, segments, scores = proposals
    segments[:, 1] = False  # nothing covers this one
    corners = np.sort(np.random.default_rng(0).uniform(-3, 20, (12, 2, 2)), 1)
    boxes = corners.reshape(12, 4)  # some reach beyond the picture
    by_box = infer.box_cover(boxes, scores, regions.shape)
    by_segment = infer.segment_cover(segments, scores, regions)
    for y, x in np.ndindex(regions.shape):
        around = []
        for (x0, y0, x1, y1), score in zip(boxes, scores):
            if round(x0) <= x < round(x1) and round(y0) <= y < round(y1):
                around.append(score)
        assert by_box[y, x] == pytest.approx(np.mean(around) if around else 0)
        around = scores[segments[:, regions[y, x]]]
        assert by_segment[y, x] == pytest.approx(np.mean(around) if len(around) else 0)


def mcg_content(regions, segments, scores, first=1):
    """What MCG writes into a .mat: regions counted from 1, a list of them for each candidate."""
    labels = np.empty((len(segments), 1), object)
    for n, segment in enumerate(segments):
        labels[n, 0] = (np.flatnonzero(segment) + first).astype(np.uint16)[None]
    return {"superpixels": (regions + 1).astype(np.uint16), "labels": labels, "scores": scores}


def test_files_of_proposals_are_read(proposals):
    regions, segments, scores = proposals
    scipy.io.savemat("a.mat", mcg_content(regions, segments, scores[:, None]))
    read_regions, read_segments, read_scores = infer.read_mcg("a.mat", regions.shape)
    assert np.array_equal(read_regions, regions)
    assert np.array_equal(read_segments, segments)
    assert read_scores == pytest.approx(np.interp(scores, [min(scores), max(scores)], [0.5, 1]))

    write("a.txt", "1 2 30 40 0.5\n\n0 0 9.4 9.6 -1.5\n5 5 6 6 2.5\n")
    boxes, scores = infer.read_boxes("a.txt", (40, 30))
    assert boxes.tolist() == [[1, 2, 30, 40], [0, 0, 9.4, 9.6], [5, 5, 6, 6]]
    assert scores.tolist() == [0.75, 0.5, 1]


def test_boxes_are_in_pixels_of_the_photograph():
    """Of one that is labelled at a third of its width, but at its height, too."""
    write("long.txt", "0 0 1500 1 1\n0 0 3000 1 0")
    scene = infer.Scene(np.zeros((1, 3000, 3), np.uint8), boxes=".", name="long")
    assert scene.bb.shape == (1, 1000)
    assert np.array_equal(scene.bb[0] > scene.bb.min(), np.arange(1000) < 500)
    write("long.txt", "")  # where a detector found nothing
    assert (infer.Scene(random_image(0, 40, 30), boxes=".", name="long").bb == 0.5).all()


def test_hierarchy_by_hand():
    """A frame, a ring and a light centre, whose way to the border leads through the ring."""
    regions = np.zeros((12, 12), int)
    regions[2:10, 1:9] = 1
    regions[4:8, 3:7] = 2
    image = np.array([0, 51, 255], np.uint8)[regions][..., None].repeat(3, 2)
    segments, scores = infer.hierarchy(image, regions, least=0)
    nodes = [set(np.flatnonzero(segment)) for segment in segments]
    assert nodes == [{0}, {1}, {2}, {0, 1}, {0, 1, 2}]
    # Of 80, 48 and 16 pixels; as far from the border as 0, 1 and 5.
    want = [0, 1, 5, 48 / 128, (48 + 5 * 16) / 144]
    assert scores == pytest.approx(np.divide(want, 5), abs=1e-5)
    boxes = infer.boxes_of(segments, regions).tolist()
    assert boxes[:3] == [[0, 0, 12, 12], [1, 2, 9, 10], [3, 4, 7, 8]]
    assert boxes[3:] == [[0, 0, 12, 12], [0, 0, 12, 12]]
    assert len(infer.hierarchy(image, regions, least=0.12)[0]) == 4  # the centre is too small


# ---------------------------------------------------------------- priors and thresholds
def test_image_level_prior_is_eq_7():
    p = np.random.default_rng(0).random((3, 4, 5), np.float32)
    q = np.array([0.1, 0.3, 0.6], np.float32)
    assert np.allclose(infer.ilp(p, q, "all"), [p[0] * 0.1, p[1] * 0.3, p[2] * 0.6])
    assert np.allclose(infer.ilp(p, q), [p[0], p[1] * 0.3, p[2] * 0.6])  # not of background


def test_a_superpixel_takes_its_most_frequent_label():
    rng = np.random.default_rng(0)
    labels, regions = rng.integers(0, 4, (9, 11)), rng.permutation(99).reshape(9, 11) % 9
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
        k = 1 + p[1:, y, x].argmax()
        v = p[k, y, x] / p[:, y, x].sum() * objectness[y, x]
        assert label == (k if v > delta[k] else 0)
    assert 0.1 < (labels > 0).mean() < 0.9


def test_pixel_adaptive_refinement_equals_its_loops():
    planes = np.random.default_rng(0).random((2, 9, 11))
    image = random_image(1, 9, 11)
    guide = np.pad(image / 255, ((3, 3), (3, 3), (0, 0)), "edge")
    want = planes
    for _ in range(2):
        before = np.pad(want, ((0, 0), (3, 3), (3, 3)), "edge")
        want = np.empty_like(planes)
        for y, x in np.ndindex(9, 11):
            here = guide[3 + y, 3 + x]
            values, colours = [], []
            for d, dy, dx in itertools.product((1, 3), (-1, 0, 1), (-1, 0, 1)):
                if dy or dx:
                    values.append(before[:, 3 + y + d * dy, 3 + x + d * dx])
                    colours.append(guide[3 + y + d * dy, 3 + x + d * dx])
            deviation = np.std([here, *colours], 0, ddof=1) + 1e-8
            differences = np.abs(colours - here) / (0.1 * deviation)
            want[:, y, x] = np.average(values, 0, np.exp(-differences.mean(1)))
    assert np.allclose(infer.pixel_adaptive(planes, image, 2, (1, 3)), want, atol=1e-5)


def test_our_own_priors_find_a_bright_object():
    image = np.full((80, 100, 3), 40, np.uint8)
    image[24:56, 32:72] = 220
    scene = infer.Scene(image)
    for objectness in (scene.bb, scene.seg):
        assert objectness[4, 4] < 0.4
        assert objectness[40, 52] > 0.6
    beside = np.full((80, 100), 0.1, np.float32)
    beside[18:50, 40:80] = 0.9  # a score map's place is not exact
    labels = infer.PRIORS["refine"](np.stack([1 - beside, beside]), scene)
    assert (labels == (image[..., 0] > 100)).mean() > 0.99


@pytest.mark.parametrize("prior", ["bb", "seg"])
def test_fitted_thresholds_equal_a_search(prior, monkeypatch):
    """No multiple of 1/50 gives a class a better IoU with the labels that come from the tags."""
    rng = np.random.default_rng(0)
    planes = rng.dirichlet([4, 2, 1, 1], (3, 20, 20)).transpose(0, 3, 1, 2)  # of images 0, 1, 2
    q = np.array([0.4, 0.9, 0.5, 0.7])
    scenes = [mock.Mock(bb=rng.random((20, 20)), seg=rng.random((20, 20))) for _ in planes]

    def predict(net, i, tagged=(0, 1, 2, 3)):
        return planes[i, tagged], q

    monkeypatch.setattr(infer, "predict", predict)
    monkeypatch.setattr(infer, "Scene", lambda i: scenes[i])
    monkeypatch.setattr(infer, "refine", lambda p, image, regions, rounds: p)
    tagged = np.array([0, 1, 3])  # background and the tags
    truth = tagged[planes[:, tagged].argmax(1)]

    iou = np.zeros((50, 4))
    for step in range(50):
        drawn = []
        for p, scene in zip(planes, scenes):
            weighed = infer.ilp(p, q)
            drawn.append(infer.thresholded(weighed, getattr(scene, prior), [step / 50] * 4))
        matrix = eval_voc.confusion(truth, np.stack(drawn), 4)
        iou[step] = np.nan_to_num(eval_voc.measures(matrix)[0])

    # Every class its own best; if they borrow much, all share that of the mean over the objects.
    net = mock.Mock(classes=["background", "a", "b", "c"])
    samples = [(i, np.array([0, 1, 0, 1])) for i in range(3)]
    alone = infer.fit_thresholds(net, samples, borrowed=0)[prior]
    shared = infer.fit_thresholds(net, samples, borrowed=1e9)[prior]
    assert [alone[1], alone[3]] == [iou[:, 1].argmax() / 50, iou[:, 3].argmax() / 50]
    assert shared == [iou[:, 1:].mean(1).argmax() / 50] * 4
    assert infer.fit_thresholds(net, [(0, np.array([1, 0, 0, 0]))]) == {}


# ---------------------------------------------------------------- photographs
TURNED = Image.Exif()
TURNED[0x0112] = 6  # what a camera writes that was turned by 90 degrees


def test_photographs_of_every_mode_are_read():
    """Each within what its encoding loses: turned by the camera, CMYK, palette, transparent."""
    smooth = np.full((40, 30, 3), 128, np.uint8)  # which JPEG keeps nearly as it is
    smooth[..., 0] = np.linspace(0, 255, 40)[:, None]
    smooth[..., 1] = np.linspace(255, 0, 30)
    image = Image.fromarray(smooth)
    image.transpose(Image.Transpose.ROTATE_90).save("turned.jpg", exif=TURNED, quality=95)
    image.convert("CMYK").save("cmyk.jpg", quality=95)
    image.quantize(256).save("palette.png")
    for file in ("turned.jpg", "cmyk.jpg", "palette.png"):
        got = data.load_image(file)
        assert np.abs(got.astype(int) - smooth).mean() < 12, file
    fourth = np.full((40, 30), 60, np.uint8)  # another channel's values, no transparency
    image.putalpha(Image.fromarray(fourth))
    image.save("infrared.png")
    assert np.array_equal(data.load_image("infrared.png"), smooth)
    fourth[:20], fourth[20:] = 0, 255
    image.putalpha(Image.fromarray(fourth))
    image.save("clear.png")
    assert (data.load_image("clear.png")[:20] == 255).all()  # over white
    dark = random_image(0, 40, 30) // 20
    Image.fromarray(dark).save("dark.png")
    assert np.array_equal(data.load_image("dark.png"), dark)


@pytest.mark.parametrize("largest, full", [(1.0, 1), (255.0, 255), (4095, 4095), (260, 1023)])
def test_deep_photographs_keep_their_range(largest, full):
    """12 bits in 16, floats in 0..1; beyond 255 it is taken for 10 bits; one pixel is hot."""
    ramp = np.linspace(largest, 0, 1200).reshape(40, 30)
    ramp = ramp.astype(np.float32 if isinstance(largest, float) else np.uint16)
    ramp[0, 0] = 15 * largest
    Image.fromarray(ramp).save("deep.tiff")
    got = data.load_image("deep.tiff")[..., 0].astype(int)
    assert np.abs(got - ramp / full * 255)[1:].max() <= 1


def test_folders_give_all_that_pillow_reads_and_count_the_rest(capsys):
    """A telephone's and a camera's endings; what is no picture is counted."""
    names = ["photo.JPG", "photo.gif", "photo.jfif", "photo.mpo", "photo.tif", "photo.webp"]
    for name in (*names, "notes.txt", "h.heic", ".hidden.jpg"):
        write(name, "not opened yet")
    assert [file.name for file in data.image_files(".")] == names
    assert "2 other files are left out: .heic .txt" in capsys.readouterr().out


def test_small_and_long_photographs_train_and_are_labelled():
    make_folder(["0.png,cat", "long.png,dog", "dot.png,"])
    save_photo("photos/long.png", 0, 1, 3000)
    save_photo("photos/dot.png", 0, 1, 1)
    ok(f"{FOLDER} --cache no")
    for prior in ("bb", "seg", "sppxl", "refine"):
        ok(f"infer o/ckpt.pt photos --prior {prior} --soft --panel p.png --out {prior}")
        assert data.read_labels(f"{prior}/long.png").shape == (1, 3000)
    with np.load("bb/long.npz", allow_pickle=False) as soft:
        assert soft["p"].shape == (3, 1, 1000)
        assert soft["classes"].tolist() == ["background", "cat", "dog"]


@pytest.mark.parametrize("cache", ["no", "c"])
def test_missing_and_broken_photographs_are_left_out_and_named_once(cache):
    make_voc()
    Path("VOC2012/JPEGImages/val_1.jpg").unlink()
    os.truncate("VOC2012/JPEGImages/val_2.jpg", 300)
    status, _, err = run(f"{TRAIN_VOC} --batch 1 --steps 6 --cache {cache}")
    assert status == 0  # though all photographs of some batches are broken
    for n in (1, 2):
        assert len(re.findall(rf"left out: .*val_{n}\.jpg: ", err)) == 1


def test_more_than_one_broken_photograph_in_100_ends_the_run():
    photos = data.tagged_photos([""] * 200, [{1}] * 200, ["background", "cat"])
    known = {}
    data.note_broken(photos, {3: "3.png: cut", 5: "5.png: cut"}, known)
    with pytest.raises(data.InputError, match="3 of 200 photographs cannot be read"):
        data.note_broken(photos, {9: "9.png: cut"}, known)


# ---------------------------------------------------------------- augmentation and batches
def test_augmentation_moves_flips_and_lightens():
    """A horizontal ramp tells from where each pixel was taken."""
    ramp = torch.arange(81.0).expand(1, 3, 81, 81)
    draws = torch.full((7, 1), 0.5)  # the middle of every range: nothing moves
    assert torch.allclose(data.augment(ramp, draws, flip=0), ramp, atol=1e-3)
    assert torch.allclose(data.augment(ramp, draws, flip=1), ramp.flip(3), atol=1e-3)
    draws[1], draws[2], draws[5] = 1, 1, 1  # 10 degrees, twice as large, to the right
    moved = data.augment(ramp, draws, flip=0, rotate=10, scale=math.log(2))
    for y, x in ((40, 40), (35, 42), (44, 30)):
        turned = (x - 40) * math.cos(math.radians(10)) - (y - 40) * math.sin(math.radians(10))
        want = 40 + turned / 2 + 0.5 * 81 / 2
        assert moved[0, 0, y, x].item() == pytest.approx(want, abs=0.1)

    draws = torch.full((7, 1), 0.5)
    draws[3], draws[4] = 1, 1  # 20 % of 255 lighter, contrast x1.2
    want = ((ramp - 40) * 1.2 + 40 + 51).clamp(0, 255)
    assert torch.allclose(data.augment(ramp, draws, flip=0), want, atol=1e-2)


def test_every_epoch_sees_every_image_once_in_another_order():
    order = []
    for step in range(6):
        order += [i for i, _ in train.batch_keys(train.Settings(batch=4), 12, step)]
    assert sorted(order[:12]) == sorted(order[12:]) == list(range(12))
    assert order[:12] != order[12:]


# ---------------------------------------------------------------- labels under the scores' cells
@pytest.mark.parametrize("trunk, size", [("overfeat", 400), ("overfeat", 353), ("vgg16", 288),
                                         ("vgg16", 333), ("tiny", 97)])  # fmt: skip
def test_own_labels_are_made_and_learned_at_the_pixels_that_cells_see(trunk, size, monkeypatch):
    """By the scores there is a cat right of x = size / 3. Labels to learn are columns' numbers."""
    net = model.Net(trunk, ["background", "cat"], (2,))
    cells = model.out_size(size, net.rows)
    places = np.array([middle_of_field(net.rows, cell) for cell in range(cells)])
    ramp = torch.tensor(places - size / 3).float().expand(1, 1, cells, cells)
    scores = torch.cat([torch.zeros_like(ramp), ramp], 1)
    monkeypatch.setattr(train, "scores_and_maps", lambda *given: (scores, None))
    monkeypatch.setattr(net, "tagged_scores", lambda scores, maps, tagged: scores)
    found = []

    def columns(p, *others):
        found.append(p.argmax(0))
        height, width = found[0].shape
        return np.tile(np.arange(width), (height, 1))

    monkeypatch.setattr(infer, "labels_from_tags", columns)
    photos = data.tagged_photos([random_image(0, 180, 250)], [{1}], net.classes)
    learned = train.own_labels(net, photos, train.Settings(size=size))[0]
    width = found[0].shape[1]
    pixels = (np.arange(width) + 0.5) * size / width - 0.5  # where the net has seen each column
    assert (found[0] == (pixels > size / 3)).all()
    assert learned.shape == (cells, cells)
    assert np.abs(learned - ((places + 0.5) * width / size - 0.5)).max() <= 0.51


@pytest.mark.parametrize("factor, kernel", [(1, 1), (1, 2), (1, 3), (2, 3), (4, 3), (4, 5)])
def test_foreground_lies_under_the_cells_of_the_scores(factor, kernel):
    """The head's middle weights are the foreground's: the two maps are one, but for its scale."""
    net = model.Net("tiny", ["background", "cat"], kernel=(kernel,)).eval()
    middle = (kernel - 1) // 2
    net.head[0].weight.data.zero_()
    net.head[0].weight.data[1, :, middle, middle] = torch.rand(64)
    net.foreground.weight[0, :, 0, 0] = net.head[0].weight.data[1, :, middle, middle]
    image = torch.from_numpy(random_image(0, 75, 110)).permute(2, 0, 1)[None]
    features = net.features(image)
    in_training = net.scores(features), net.maps_beneath(features)
    net.dense = factor
    dense = net.score_map(image)[:2]
    for scores, beneath in (in_training, dense):
        foreground = scores[:, 0] - net.pixel_scores(scores, beneath)[:, 0]
        ratio = foreground / scores[:, 1]
        assert foreground.shape[1:] == scores.shape[2:]
        assert torch.allclose(ratio, ratio.mean(), rtol=1e-3)


def test_pixels_see_the_foreground_and_the_whole_image_does_not():
    net = model.Net("tiny", ["background", "cat"], loss="sigmoid").eval()
    image = random_image(0, 60, 80)
    p, q = infer.predict(net, image)
    net.foreground.bias.fill_(2.0)
    lowered, same_q = infer.predict(net, image)
    odds = np.log(lowered[1] / lowered[0]) - np.log(p[1] / p[0])
    assert np.allclose(odds, 2, atol=1e-3)
    score_map = net.score_map(torch.from_numpy(image).permute(2, 0, 1)[None])[0]
    assert np.allclose(q, net.aggregate(score_map)[0].sigmoid(), atol=1e-5)
    assert np.array_equal(q, same_q)


def test_affinity_is_that_of_each_pair():
    maps = torch.randn(1, 5, 3, 4)
    cells = maps[0].flatten(1).T.double().numpy()  # (h * w, D)
    roots = np.sign(cells) * np.sqrt(abs(cells))
    vectors = roots - roots.mean(0)
    lengths = np.linalg.norm(vectors, axis=1)
    cosines = vectors @ vectors.T / np.outer(lengths, lengths)
    wanted = np.maximum(cosines, 0) ** 2
    assert np.allclose(model.affinity(maps), wanted / wanted.sum(0), atol=1e-6)


def test_a_weak_tag_has_its_place_beside_a_strong_one():
    """The rider's score is the highest; the horse has the label where it is at its best."""
    net = model.Net("tiny", ["background", "horse", "person", "sofa"]).eval()
    place = torch.linspace(-1, 1, 8).expand(8, 8)  # of the horse: on the right, the rider left
    flat = torch.zeros(8, 8)
    scores = torch.stack([flat - 9, 1 + place, 5 - place, flat - 9])[None]
    maps = torch.eye(64).view(1, 64, 8, 8)  # no cell looks like another
    assert (net.pixel_scores(scores, maps).argmax(1) == 2).all()  # without tags
    labels = net.tagged_scores(scores, maps, np.array([0, 1, 2])).argmax(1)[0]
    assert (labels[:, :3] == 2).all()
    assert (labels[:, -3:] == 1).all()


def test_foreground_is_found_without_labels(monkeypatch):
    """Maps of two textures, of which the scores only hint at the objects'."""
    textures = torch.rand(2, 24)
    objects = torch.zeros(40, 8, 8, dtype=torch.long)
    for i in range(40):
        y, x = torch.randint(0, 5, (2,))
        objects[i, y : y + 4, x : x + 4] = 1
    maps = textures[objects].permute(0, 3, 1, 2) + 0.2 * torch.rand(40, 24, 8, 8)
    hint = 0.2 * objects[:, None] + torch.randn(40, 1, 8, 8)
    scores = torch.cat([torch.zeros_like(hint), hint], 1)
    monkeypatch.setattr(train, "scores_and_maps", lambda net, photos, i: (scores[[i]], maps[[i]]))
    net = model.Net("tiny", ["background", "cat"])
    net.foreground = torch.nn.Conv2d(24, 1, 1).requires_grad_(False)
    photos = data.tagged_photos([""] * 40, [{1}] * 40, net.classes)
    train.learn_foreground(net, photos, train.Settings(foreground=2.0))
    foreground = net.foreground(model.of_mean_one(maps))[:, 0]
    assert ((foreground > 0) == (objects > 0)).float().mean() > 0.95


def test_the_trunk_learns_from_labels_where_there_are_some(monkeypatch):
    """Only its last convolutions do: --train-convs of its three."""
    loop, changes = train.train, []

    def watched(net, *rest):
        before = [layer.weight.clone() for layer in net.trunk]
        loop(net, *rest)
        changes.append([not torch.equal(before[i], net.trunk[i].weight) for i in range(3)])

    monkeypatch.setattr(train, "train", watched)
    make_folder()
    ok(f"{FOLDER} --train-convs 1 --self-steps 2")
    assert changes == [[False, False, False], [False, False, True]]  # on tags; on its own labels
    ok(f"{FOLDER} --train-convs 1 --out tags")
    assert changes[2] == [False, False, True]
    ok(f"{TOY} --steps 2")
    assert changes[3] == [True, True, True]


# ---------------------------------------------------------------- the feature cache
def cached(net, photos):
    photos.size = 32
    return train.cached(net, photos, train.Settings(trunk="tiny", size=32, cache="c"))


def test_cached_features_are_the_trunks():
    """Each photograph keeps its own, and its labels, where a broken one is left out."""
    make_folder()
    net = model.Net("tiny", ["background", "cat", "dog"])
    photos = data.folder_photos("photos", "tags.csv")
    photos.labels = np.arange(4, dtype=np.uint8)[:, None, None]
    write("photos/1.png", "broken")
    with_features = cached(net, photos)
    for place, i in enumerate((0, 2, 3)):
        want = net.features(photos[i, 0.5][1][None])[0].numpy()
        _, plain, label = with_features[place, 0.1]
        mirrored = with_features[place, 0.9][1]
        assert label == i
        assert np.allclose(plain, want, atol=2e-3 * want.max())
        assert torch.equal(mirrored, plain.flip(-1))


def test_cache_knows_what_its_features_are_of():
    save_photo("one/images/0.png", 0)
    save_photo("two/images/0.png", 1)
    net = model.Net("tiny", ["background", "cat"])

    def caches(folder):
        """How many there are when one has been asked for."""
        photos = data.tagged_photos([f"{folder}/images/0.png"], [{1}], net.classes)
        cached(net, photos)
        return len(list(Path("c").glob("*.npy")))

    assert [caches("one"), caches("one")] == [1, 1]  # computed, then read
    assert caches("two") == 2  # the same name in another project
    save_photo("one/images/0.png", 2)  # another photograph
    assert caches("one") == 3
    net.trunk[0].bias.data += 1  # other weights
    assert caches("one") == 4
    net.spec = net.spec._replace(mean=(137,))  # another normalisation
    assert caches("one") == 5
    net.amp = True  # another precision
    assert caches("one") == 6


def test_a_full_disk_leaves_nothing_half_written():
    """Neither of the cache nor of the checkpoint: the system refuses to let a file grow."""
    resource = pytest.importorskip("resource", reason="no resource limits on this system")
    make_folder()
    before, files = resource.getrlimit(resource.RLIMIT_FSIZE), there()
    toy = f"{TOY} --steps 2 --out o"
    for command, file, room in ((FOLDER, "o/cache/", 9_000), (toy, "o/ckpt.pt", 50_000)):
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
        try:
            refused(command, file, "make room")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert there() == files


def test_loader_processes_that_die_end_in_one_line(monkeypatch):
    collate = data.collate

    def dies(items):
        if torch.utils.data.get_worker_info():
            os._exit(1)
        return collate(items)

    monkeypatch.setattr(data, "collate", dies)
    make_folder()
    for cache in ("no", "new"):  # the loop's processes, and those that read for the cache
        refused(f"{FOLDER} --workers 1 --cache {cache}", "--workers 1", "/dev/shm", "--workers 0")


# ---------------------------------------------------------------- tags and lists
@pytest.mark.parametrize("rows, tags", [
    (["file,tags", "0.png,dog", "1.png,cat;dog", "2.png,"], [{2}, {1, 2}, {0}]),
    (["0.png,Background", "1.png,cat", "2.png,BACKGROUND;cat"], [{0}, {1}, {1}]),
    (["0.png,dog", "./0.png,cat", "1.png,"], [{1, 2}, {0}]),
    (["0.png,sea lion", "1.png,sea \t lion", "2.png,sea\u00a0lion "], [{1}] * 3),
    (["0.png,caf\u00e9", "1.png,cafe\u0301", "2.png,caf\u00e9;"], [{1}] * 3),
])  # fmt: skip
def test_one_meaning_is_one_class(rows, tags):
    make_folder(rows)
    photos = data.folder_photos("photos", "tags.csv")
    assert [set(np.flatnonzero(row)) for row in photos.tags] == tags


def test_a_run_says_what_its_photographs_are():
    make_folder(["0.png,cat", "1.png,dog", "link.png,dog"])
    os.symlink("0.png", "photos/link.png")  # is the same photograph
    out = ok(FOLDER)
    assert "2 images, 2 with objects, 0 of background alone" in out
    assert "background 0, cat 1, dog 2" in out
    assert "warning: no photograph without objects" in out
    assert "warning: a frozen trunk of random weights" in out
    assert "tags.csv: 1 rows name a file again" in out
    assert "left out: 2 photographs without a line, photos/2.png first" in out
    make_folder()
    assert "without objects" not in ok(FOLDER)


def test_lists_of_ids_and_of_paths_name_the_same_images():
    for line in ("{}", "JPEGImages/{}.jpg SegmentationClass/{}.png", "/JPEGImages/{}.jpg"):
        write("VOC/ImageSets/Segmentation/val.txt", line.replace("{}", "2007_000033") + "\n\n")
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
    write("VOC2012/ImageSets/Main/val.txt", "val_0")
    write("VOC2012/ImageSets/Segmentation/val.txt", "val_0\n2007_1")  # as in the devkit
    photos = data.voc_photos("VOC2012", "val", with_masked=True)
    assert [Path(path).stem for path in photos.paths] == ["val_0", "2007_1"]


# ---------------------------------------------------------------- masks
MASKED = f"{FOLDER} --masks masks"


def make_masks():
    """masks/0.png ...: on the left the tags of make_folder's photographs, above ever more void."""
    make_folder()
    for n, k in enumerate((1, 2, 2)):
        mask = np.zeros((24, 30), np.uint8)
        mask[:, :15] = k
        mask[: 1 + 11 * n] = 255  # under every cell of the last
        data.save_labels(f"masks/{n}.png", mask)


def test_masks_are_counted_whatever_their_ending():
    """.PNG is a mask; a photograph of background alone needs none; others are left out."""
    make_masks()
    Path("masks/1.png").rename("masks/1.PNG")
    Path("masks/2.png").unlink()
    stored = Image.fromarray(random_image(0, 30, 24))  # the mask is of the upright photograph
    stored.save("photos/0.png", exif=TURNED)
    out = ok(MASKED)
    assert "EXIF turns 1 photographs" in out  # a half turn leaves no other sign
    assert "2 of 4 photographs have a mask, 1 others are background alone, 1 left out" in out


def test_a_class_whose_masks_are_of_others_is_named():
    """Most masks may be right: those of 0 and 1 for "object" are, but for the other classes."""
    make_masks()
    for n in (1, 2):
        mask = data.read_labels(f"masks/{n}.png")
        data.save_labels(f"masks/{n}.png", np.where(mask == 2, 1, mask))
    write("tags.csv", "0.png,cat\n1.png,dog\n2.png,cat\n3.png,")
    refused(MASKED, "other classes than their tags", "1 of 1 of dog")


def test_weak_training_and_inference_open_no_mask():
    """Every file that Python opens is recorded; with --masks the record shows them."""
    masks = make_voc()
    OPENED.clear()
    ok(f"{TRAIN_VOC} --self-steps 2")
    ok("infer o/ckpt.pt --voc VOC2012 --set val --out p --prior refine")
    assert sorted(path.stem for path in Path("p").iterdir()) == sorted(masks)
    assert "JPEGImages" in str(OPENED)
    assert "SegmentationClass" not in str(OPENED)
    ok(f"{TRAIN_VOC} --masks VOC2012/SegmentationClass --out strong")
    assert "SegmentationClass" in str(OPENED)


# ---------------------------------------------------------------- runs and their folders
@pytest.mark.parametrize("out", ["o", ".", "photos"])  # where photographs stay as they are
def test_a_new_run_moves_the_earlier_one_aside(out):
    """Nothing is lost, and labels of its own making are not learned again."""
    again = f"{FOLDER} --self-steps 2 --out {out}"
    make_folder()
    ok(again)
    first = Path(out, "ckpt.pt").read_bytes()
    write("tags.csv", "0.png,cat\n1.png,\n2.png,\n3.png,")  # a class fewer, too
    assert f"the run that was there is now in {Path(out, 'run1')}" in ok(again)
    labels = np.load(f"{out}/self1.npy")
    assert set(np.unique(labels[1:])) <= {0, 255}
    refused(f"{again} --lo 3", "--lo")  # moves nothing
    assert f"is now in {Path(out, 'run2')}" in ok(again)
    assert Path(out, "run1/ckpt.pt").read_bytes() == first
    assert Path("photos/0.png").exists()


def test_two_live_runs_never_share_a_folder():
    """Nor does one resume a run that is still alive."""
    ok(f"{TOY} --steps 2 --out o")
    save_photo("photos/a.png")
    lock = data.claim("o")
    for command in (TOY, f"{TOY} --steps 4 --resume", "infer o/ckpt.pt photos"):
        refused(f"{command} --out o", "o: another run writes there", "--out")
    lock.close()
    ok(f"{TOY} --steps 4 --out o --resume")


@pytest.mark.parametrize("first, then", [(True, False), (False, True)])
def test_a_run_goes_on_at_another_precision(first, then, monkeypatch):
    """A checkpoint of a machine with bfloat16 on one without, and back; the cache follows."""
    make_folder()
    able = {"amx_bf16": first}
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: able, raising=False)
    ok(f"{FOLDER} --amp")
    able["amx_bf16"] = then
    for amp in ("--amp", ""):
        out = ok(f"{FOLDER} --steps 4 {amp} --resume")
        assert ("in bfloat16" in out) == then
    assert model.load_net("o/ckpt.pt")[0].amp == then


def test_a_run_that_would_learn_something_else_is_not_resumed():
    make_masks()
    write("other.csv", "0.png,cat\n1.png,dog\n2.png,cat\n3.png,")
    command = f"{FOLDER} --train-convs 1"
    ok(command)
    for more, words in {
        "--r 3 --seed 5": "--resume with other r was 5.0 and is 3.0, seed was 0 and is 5",
        "--steps 1": "steps was 2",
        "--steps 4 --cache no": "cached was True",
        "--steps 4 --masks masks": "masks was  and is given, photos, tags or masks was",
        "--tags other.csv": "masks was",
        "--self-steps 2": "self_steps was 0 and is 2",  # the tags have tuned the trunk
    }.items():
        refused(f"{command} --resume {more}", "o/ckpt.pt", words)
    ok(f"{command} --resume --sides 40")  # which is for labelling alone
    assert model.load_net("o/ckpt.pt")[0].sides == (40,)
    content = Path("photos/0.png").read_bytes()  # then another of the same name and size
    Path("photos/0.png").write_bytes(content[:-50] + b"?" + content[-49:])
    refused(f"{command} --resume --steps 4", "masks was")


def test_a_head_is_refused_on_other_trunk_weights():
    """Half-precision copies of the same weights are the same trunk."""
    make_voc()
    state = save_vgg("vgg.pth")
    torch.save({name: tensor.half() for name, tensor in state.items()}, "half.pth")
    save_vgg("other.pth", seed=1)
    train_vgg = f"{TRAIN_VOC} --trunk vgg16 --size 64"
    assert "not the public weights of vgg16" in ok(f"{train_vgg} --weights vgg.pth")
    assert b"VOC2012" not in Path("o/head.pt").read_bytes()  # to give away: nothing of its maker
    label = "infer o/head.pt VOC2012/JPEGImages/val_0.jpg --out l"
    for command, file in ((label, "o/head.pt"), (f"{train_vgg} --steps 4 --resume", "o/ckpt.pt")):
        refused(f"{command} --weights other.pth", file, "other trunk weights")
        ok(f"{command} --weights half.pth")

    # A trunk that was trained is in the checkpoint, and needs no weights beside it.
    ok(f"{train_vgg} --weights vgg.pth --train-convs -1")
    Path("vgg.pth").unlink()
    ok(label)


def outcome(folder):
    """What equal runs have in common: log.csv but for its times, all weights and moments."""
    ckpt = model.read_checkpoint(f"{folder}/ckpt.pt")
    tensors = list(ckpt["model"].values())
    for moments in ckpt["optimizer"]["state"].values():
        tensors += moments.values()
    hashes = [hash(torch.as_tensor(tensor).numpy().tobytes()) for tensor in tensors]
    lines = Path(folder, "log.csv").read_text().splitlines()
    return [line.split(",")[:4] for line in lines], hashes


def test_a_killed_run_resumes_bit_exact():
    """SIGKILL at random moments (KILLS=20 for more): a whole checkpoint each time, the same end."""
    ok(f"{TOY} --out whole --steps 60")
    ok(f"{TOY} --out killed --steps 2")
    assert outcome("whole") != outcome("killed")
    command = [HERE / "train.py", *f"{TOY} --out killed --steps 60 --resume".split()[1:]]
    for _ in range(int(os.environ.get("KILLS", "3"))):
        going = subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, text=True)
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
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_two_processes_train_as_one():
    """The same losses in float32, where one image has no label; the two are stopped and resumed."""
    try:
        socket.create_server(("127.0.0.1", 0)).close()
    except OSError as e:
        pytest.skip(f"no sockets here: {e}")
    make_masks()
    command = f"{MASKED} --batch 4 --log-every 1 --dropout 0 --optimizer sgd --lr 0.03 --no-amp"
    ok(f"{command} --schedule steps --out one --steps 20")
    torchrun(f"{command} --schedule steps --out two --steps 8")
    torchrun(f"{command} --schedule steps --out two --steps 20 --resume")
    one = np.genfromtxt("one/log.csv", delimiter=",", names=True)["loss"]
    two = np.genfromtxt("two/log.csv", delimiter=",", names=True)["loss"]
    assert len(one) == len(two) == 20
    assert np.abs(one - two).max() < 1e-5
    assert one[0] - one[-1] > 1e-3  # there is something to compare


def test_the_chosen_device_is_asked_and_no_other(monkeypatch):
    capability = {torch.device("cuda:0"): (7, 5), torch.device("cuda:1"): (8, 0)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", capability.get)
    assert [model.has_bfloat16(device) for device in capability] == [False, True]
    monkeypatch.delattr("torch.cpu.get_capabilities", raising=False)  # an older torch
    assert not model.has_bfloat16(torch.device("cpu"))


def test_presets_are_the_papers_and_ours():
    paper = train.parse(["paper", "--imagenet", "."])[1]
    assert (paper.lr, paper.momentum, paper.weight_decay) == (1e-3, 0.9, 5e-5)
    assert (paper.batch, paper.dropout, paper.r, paper.size) == (16, 0.5, 5, 400)
    assert (paper.optimizer, paper.train_convs) == ("sgd", 0)
    for step, factor in ((312_499, 1), (312_500, 0.8), (625_000, 0.64)):
        assert train.schedule(paper, step, None) == pytest.approx(factor)
    for more, convs in (([], 3), (["--self-steps", "0"], 0), (["--masks", "."], 3)):
        voc = train.parse(["voc", "--voc", ".", *more])[1]
        assert (voc.train_convs, voc.trunk_lr) == (convs, 3e-5)


# ---------------------------------------------------------------- trunks of torch.hub
HUBCONF = """
import torch

class dinov2_vits14(torch.nn.Module):
    def __init__(self, pretrained):
        super().__init__()
        self.patch = torch.nn.Conv2d(3, 384, 14, 14)

    def get_intermediate_layers(self, images, n, reshape):
        assert images.shape[2] % 14 == 0 and images.shape[3] % 14 == 0
        return [self.patch(images)]
"""


@pytest.fixture
def hub(monkeypatch):
    """A local torch.hub, with a stand-in of DINOv2's repository and weights."""
    monkeypatch.setattr(torch.hub, "_hub_dir", str(Path("hub").absolute()))
    write("hub/facebookresearch_dinov2_main/hubconf.py", HUBCONF)
    Path("hub/checkpoints").mkdir()
    module = model.hub_module(model.TRUNKS["dinov2_vits14"].hub)
    torch.save(module.state_dict(), "hub/checkpoints/dinov2_vits14_pretrain.pth")


def test_a_module_of_torch_hub_trains_and_labels(hub):
    make_folder()
    ok(f"{FOLDER} --trunk dinov2_vits14 --size 64 --self-steps 2")
    ckpt = model.read_checkpoint("o/ckpt.pt")
    assert not any(name.startswith("trunk.") for name in ckpt["model"])
    ok("infer o/head.pt photos --prior refine --device cpu --out l")
    assert data.read_labels("l/0.png").shape == (24, 30)
    refused("infer o/head.pt photos --dense 2 --device cpu --out l2", "--sides")


def test_a_modules_cells_lie_on_the_right_pixels(hub):
    net = model.Net("dinov2_vits14", ["background", "bright"], kernel=(1,), head=(1,)).eval()
    for layer in [net.trunk[0].patch, *net.head]:  # every layer adds up what it sees
        layer.weight.data.fill_(0.01)
        layer.bias.data.zero_()
    image = torch.zeros(1, 3, 100, 130)  # 14 divides neither side
    image[:, :, 28:70, 56:98] = 255  # around pixel (48.5, 76.5)
    scores, _, stride, offset = net.score_map(image)
    pixels = model.upsample(scores, (100, 130), stride, offset)[0, 1]
    bright = pixels > (pixels.min() + pixels.max()) / 2
    y, x = bright.nonzero().float().mean(0)
    assert abs(y - 48.5) <= 2 and abs(x - 76.5) <= 2


# ---------------------------------------------------------------- labels that infer.py writes
def test_labels_of_an_earlier_run_do_not_stay(toy_run):
    """Nor are they taken for photographs, where they lie among these."""
    save_photo("photos/a.png")
    save_photo("photos/b.png")
    label, out = "infer out/toy/ckpt.pt photos --device cpu --out photos/l", Path("photos/l")
    ok(f"{label} --soft")
    refused(f"{label} --prior bb --boxes typo", "typo/a.txt")
    assert {path.name for path in out.glob("a*")} == {"a.npz", "a.png", "a_overlay.png"}
    os.truncate("photos/a.png", 300)
    refused(label, "1 of 2 images", "photos/a.png")
    assert {path.name for path in out.iterdir()} == {"b.png", "b_overlay.png", "run1"}
    assert len(list(Path(out, "run1").iterdir())) == 6  # nothing is lost
    save_photo("photos/a.png")
    for _ in range(2):
        said = ok(f"{label} --panel photos/panel.png")
        assert "wrote 2 label maps" in said
    said = ok("infer out/toy/ckpt.pt photo.png --out photos/l")
    assert "holds 4 other pictures, such as photos/l/a.png" in said


def test_what_does_not_fit_a_checkpoint_is_told_of(toy_run):
    ckpt = model.read_checkpoint("out/toy/ckpt.pt")
    torch.save({**ckpt, "step": 1}, "early.pt")
    assert "it is at step 1 of 2" in ok("infer early.pt photo.png --device cpu")
    command = "infer out/toy/ckpt.pt photo.png --device cpu --prior bb"
    write("photo.txt", "0 0 30 30 1")
    for more in ("--no-ilp", "--ilp-form all", "--dense 2", "--sides 96", "--boxes ."):
        assert "thresholds are for" in ok(f"{command} {more}")
    assert "thresholds" not in ok(command)


def test_the_panel_shows_the_prior_and_the_form_that_were_asked_for(toy_run):
    pictures = set()
    for more in ("", "--no-ilp", "--ilp-form all", "--prior sppxl"):
        ok(f"infer out/toy/ckpt.pt photo.png --panel p.png {more}")
        pictures.add(Path("p.png").read_bytes())
    assert len(pictures) == 4


def test_training_labels_keep_to_the_tags_and_say_so(toy_run):
    save_photo("photos/0.png", 0, 60, 80)
    save_photo("photos/1.png")
    write("tags.csv", "0.png,grid\n1.png,")
    command = "infer out/toy/ckpt.pt photos --device cpu --known-tags tags.csv"
    assert "known tags" in ok(f"{command} --sure 0.9 --out l")
    image = Image.open("l/0.png")
    assert "known tags" in image.text["Comment"]
    grid = data.TOY_CLASSES.index("grid")
    labels = set(np.unique(image))  # as another network reads them
    assert 255 in labels and labels <= {0, grid, 255}
    assert not data.read_labels("l/1.png").any()  # no tag: all background
    ok(f"{command} --sure 0 --out all")
    assert set(np.unique(data.read_labels("all/0.png"))) == {0, grid}
    write("tags.csv", "0.png,zebra")
    refused(f"{command} --out l2", "zebra")
    refused("infer out/toy/ckpt.pt --voc VOC2012 --known-tags --out l2", "VOC's classes")


def test_training_labels_are_scored_apart_from_vocs_measure():
    truth = np.array([[0, 0, 8, 8], [255, 0, 8, 8]], np.uint8)
    make_voc({"a": truth})
    data.save_labels("pred/a.png", np.array([[0, 255, 8, 255], [0, 0, 0, 8]], np.uint8))
    out = ok("eval_voc score pred --voc VOC2012 --void-allowed --json s.json")
    report = json.loads(Path("s.json").read_text())
    assert "not VOC's measure" in out and "not VOC's measure" in report["what"]
    assert "no true pixel of aeroplane" in out
    assert report["coverage"] == pytest.approx(100 * 5 / 7)  # of 7 that are not void in the truth
    # Covered: background 2 right, 1 that is a cat; cat 2 right, 1 missed. In all: 3 and 4 are true.
    assert report["iou"]["background"] == pytest.approx(100 * 2 / 3)
    assert report["iou"]["cat"] == pytest.approx(100 * 2 / 3)
    assert report["mean_iou_void_wrong"] == pytest.approx(100 * (2 / 4 + 2 / 4) / 2)


def test_priors_in_processes_give_the_same_in_order(toy_run):
    make_folder()
    for workers in (0, 2):
        ok(f"infer out/toy/ckpt.pt photos --prior refine --out l{workers} --workers {workers}")
    for n in range(4):
        assert Path(f"l0/{n}.png").read_bytes() == Path(f"l2/{n}.png").read_bytes()
    with pytest.raises(data.InputError, match="--workers: a process"):
        list(infer.overlapped(os._exit, [1], workers=1))  # which dies


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


def png(array):
    return as_bytes(Image.fromarray(array).save, "png")


def label_png(labels, classes=(), comment=""):
    data.save_labels("made.png", labels, classes, comment)
    return Path("made.png").read_bytes()


LABEL = "infer toy.pt photo.png --device cpu --out out"
SCORE = "eval_voc score masks --voc VOC --set b --json out"
LADDER = "eval_voc ladder toy.pt --voc VOC --set b --json out"
SUBMIT = "eval_voc submit masks --voc VOC --set b --out out"
VOC = f"train voc {SMALL} --voc VOC --set b --out out"
MASKS = f"{VOC} --masks masks"
CSV = f"train folder {SMALL} --images VOC/JPEGImages --tags t.csv --out out"
BACKGROUND = f"{VOC} --background . --synsets s.csv"


def malformed_files():
    """(command, a file that it reads, wrong contents of it, what the line says if not its name)."""
    cache = next(Path("run/cache").glob("*.npy"))
    evil = as_bytes(np.save, np.array([Evil()]))
    yield f"{VOC} --cache run/cache", cache, [cache.read_bytes()[:-9], evil]
    picture = png(random_image(0, 24, 30))
    bomb = picture[:16] + bytes([0, 0, 120, 99]) * 2 + picture[24:]  # 30,819 x 30,819 pixels
    flat = png(np.full((24, 30, 3), 90, np.uint8))
    yield LABEL.replace("photo", "x"), "x.png", [picture[:-99], bomb, flat]
    yield VOC, "VOC/JPEGImages/b.jpg", [picture[:60]]

    # Labels, of which class 12 is right.
    plain = np.full((24, 30), 12, np.uint8)
    void, other, above = label_png(plain + 243), label_png(plain - 1), label_png(plain + 65)
    turned, of_pears = label_png(plain.T), label_png(plain, ["background", "pear"])
    from_tags = label_png(plain, comment="made with known tags")
    coloured = as_bytes(Image.fromarray(plain).quantize(4).save, "png")
    yield MASKS, "masks/b.png", [void, other], "other classes than their tags"
    yield MASKS, "masks/b.png", [label_png(plain)], "no mask of an object has a pixel of background"
    yield MASKS, "masks/b.png", [above, turned, coloured]
    yield MASKS, "masks/b.png", [of_pears], "labels of background;pear"
    yield SCORE, "VOC/SegmentationClass/b.png", [of_pears], "infer.py made"
    yield SCORE, "VOC/SegmentationClass/b.png", [void], "no object"
    yield SCORE, "masks/b.png", [picture, above, turned, void]
    yield SCORE, "masks/b.png", [of_pears], "--classes"
    yield SCORE, "masks/b.png", [from_tags], "--void-allowed"
    yield f"{SCORE} --void-allowed", "masks/b.png", [label_png(plain + 9)], "index 21"
    yield SUBMIT, "masks/b.png", [png(plain), above, turned]

    yield CSV, "t.csv", [b"file,tags", b"b.jpg,cat,dog", b"no.jpg,cat", b"../../x.jpg,cat"]
    yield CSV, "t.csv", [b"b.jpg,dog|cat", b"b.jpg,Dog;dog", b"b.jpg,dog cat;dog;cat"]
    yield CSV, "t.csv", [b"b.jpg,1", b"b.jpg,nan", b"b\0.jpg,cat"]
    yield f"{VOC} --set bad", "VOC/ImageSets/Main/bad.txt", [b"", b"..", b"a\na", b"b -1"]
    yield VOC, "VOC/ImageSets/Main/cat_b.txt", [b"b 7", b"c 1"]
    helmet = b"<annotation><object><name>helmet</name></object></annotation>"
    yield f"{VOC} --set new", "VOC/Annotations/new.xml", [b"<a/>", helmet]
    yield BACKGROUND, "s.csv", [b"n1,emu"]
    yield BACKGROUND, "s.csv", [b"n1,cat"], "of no VOC class"

    toy, whole = model.read_checkpoint("toy.pt"), Path("toy.pt").read_bytes()
    evil = saved({**toy, "format": Evil()})
    nan = {**toy["model"], "head.0.bias": toy["model"]["head.0.bias"] * math.nan}
    damaged = [saved({**toy, "settings": {}}), saved({**toy, "model": nan})]
    label = LABEL.replace("toy", "bad")
    yield label, "bad.pt", [whole[:-100], evil, *damaged]
    early = saved({**toy, "thresholds": {}})  # of a run that has not ended
    yield f"{label} --prior bb", "bad.pt", [early], "bad.pt: no thresholds"
    head = Path("run/head.pt").read_bytes()
    yield f"{VOC} --out run --resume --steps 4", "run/ckpt.pt", [head], "keeps no optimiser"
    weights = [saved([Evil()]), saved({"features.0.weight": 1})]
    yield f"{VOC} --trunk vgg16 --size 96 --weights w.pt", "w.pt", weights

    region, segment = np.zeros((24, 30), int), np.ones((1, 1), bool)
    two_scores = mcg_content(region, segment, np.ones((2, 1)))
    from_zero = mcg_content(region, segment, np.ones((1, 1)), first=0)
    mats = [as_bytes(scipy.io.savemat, content) for content in (two_scores, from_zero)]
    yield f"{LABEL} --prior seg --mcg .", "photo.mat", mats
    yield f"{LABEL} --prior bb --boxes .", "photo.txt", [b"1 2 3 4", b"9 2 3 4 1", b"0 0 99 9 1"]


# Values that are wrong, and options that would do nothing.
WRONG_FLAGS = {
    f"{TOY} --out out": "--batch 0|--lr nan|--train-convs 9|--head x|--size 4|--dense 3|--stesp 5"
    "|--limit 3|--images photos|--resume|--device no|--lr 1e30 --optimizer sgd --steps 9",
    VOC: "--trunk-lr 1|--r 3 --aggregation max",
    MASKS: "--self-steps 3",
    LABEL: "no.jpg|--voc VOC|--boxes .|--mcg .|--boxes=|--weights no|--panel photo.png|--out ."
    "|--out drawn|--out mine|--out sums|photo.png",  # the last: two labels in one file
    LADDER: "--limit -1|--set ../b|--json x.png",
}


def there():
    """{file: time of its last change}, without those that a run begins with."""
    times = {}
    for path in Path().rglob("*"):
        if path.is_file() and path.name not in ("settings.json", "log.csv", ".lock", "made.png"):
            times[path] = path.stat().st_mtime_ns
    return times


def test_malformed_inputs_are_refused_in_one_line_and_leave_nothing():
    """Each names its file or flag; nothing is half written, nothing in a file executed."""
    make_voc({"b": np.full((24, 30), 12, np.uint8)}, "b", "VOC")
    data.save_labels("masks/b.png", np.full((24, 30), 12))
    write("VOC/ImageSets/Main/new.txt", "new")  # its tags are in Annotations
    write("VOC/Annotations/new.xml", "")
    for file in ("photo.png", "n1/x.png", "x.jpg"):  # the last is outside of the folder of CSV
        save_photo(file)
    data.save_labels("drawn/photo.png", np.full((24, 30), 12))  # files of others
    save_photo("mine/photo_overlay.png")
    Path("sums").mkdir()
    np.savez("sums/photo.npz", mine=np.zeros(3))
    ok(f"{VOC} --out run")
    shutil.copy("run/ckpt.pt", "toy.pt")

    for command, name, contents, *words in malformed_files():
        file = Path(name)
        whole = file.read_bytes() if file.exists() else b""
        for content in contents:
            file.write_bytes(content)
            before = there()
            refused(command, *words or [file.name])
            assert there() == before, command
        file.write_bytes(whole)
    for command, flags in WRONG_FLAGS.items():
        for flag in flags.split("|"):
            before = there()
            refused(f"{command} {flag}", flag.split()[0].strip("-"))
            assert there() == before, (command, flag)


# ---------------------------------------------------------------- the README and what is published
@pytest.mark.skipif(not SHARED.exists(), reason="no ../shared: no real photographs")
def test_published_head_labels_real_photographs():
    assert len(data.imagenet_photos(SHARED / "data/imagenet-sample")) >= 788
    voc = f"--voc {SHARED}/data/VOCdevkit/VOC2012 --limit 4 --sides 288 --priors refine"
    weights = f"--weights {SHARED}/weights/vgg16_features_fp16.pth"
    ok(f"eval_voc ladder {HERE}/assets/voc.pt {voc} {weights} --json l.json")
    rows = json.loads(Path("l.json").read_text())["rows"]
    assert rows["ilp+refine"]["mean_iou_defined"] > 35


def readme_parts(kind):
    return re.findall(rf"```{kind}\n(.*?)```", (HERE / "README.md").read_text(), re.DOTALL)


def test_the_readmes_forks_and_snippets_run():
    """Its diffs, applied to a copy of the scripts, train and label; so does its Python."""

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
    assert "ilp+smooth" in out
    python("train.py", *toy)
    lesson, names = readme_parts("python")
    assert "speckle" in python("-c", lesson)

    # Its lines that turn a label PNG back into names.
    save_photo("street.png", 0, 60, 80)
    ok("infer out/toy/ckpt.pt street.png --device cpu")
    counts = eval(python("-c", names.replace("out/folder", "out/toy")))  # a printed dictionary
    assert sum(counts.values()) == 60 * 80 and set(counts) <= set(data.TOY_CLASSES)


def test_the_readmes_commands_run_as_written():
    """Every line that starts with `python `, in order, on tiny data that is called as there."""
    for name in ("train", "test", "val"):
        make_voc(name=name, root="VOCdevkit/VOC2012")
    for wnid in ("n01443537", "n02123045"):  # a fish, which is background, and a cat
        save_photo(f"imagenet/{wnid}/x.JPEG", 0, 60, 70)
    make_folder()
    save_vgg("vgg16_features.pth")
    np.full(18_916_480, 0.01, "<f4").tofile("net_weight_1")
    os.truncate("net_weight_1", SLOW_OVERFEAT["overfeat"][0])

    photographs = "--size 64 --head 8 --batch 4 --self-steps 1"
    toy, paper = "--toy-images 8 --toy-scenes 1 --batch 4", "--batch 1 --head 8 --workers 0"
    short = {"toy": toy, "voc": photographs, "folder": photographs, "paper": paper}
    ends = "--steps 1 --threshold-images 1 --device cpu"
    ok(f"train voc --voc VOCdevkit/VOC2012 --weights vgg16_features.pth {photographs} {ends}")
    Path("assets").mkdir()
    shutil.move("out/voc/head.pt", "assets/voc.pt")  # the published one is of other weights

    text = (HERE / "README.md").read_text()
    lines = re.findall(r"^python (?!-m)(.*?)(?:  #.*)?$", text, re.MULTILINE)
    assert len(lines) >= 10
    for line in ["train.py", *lines]:  # the first one: how the set-up command ends
        command = line.replace(".py", "", 1)
        script, preset = [*command.split(), "toy"][:2]
        if script == "train":
            command = f"{command} {short[preset]} {ends}"
        if "--masks" in command:
            command = command.replace("--self-steps 1", "")  # which masks replace
        ok(command)
    for file in ("results.tgz", "out/toy/scores.json", "out/folder/panel.png"):
        assert Path(file).exists()
    rungs = json.loads(Path("out/ladder.json").read_text())["rows"]
    assert list(rungs) == ["base", "ilp", "ilp+sppxl", "ilp+bb", "ilp+seg", "ilp+refine"]
    weights = model.read_checkpoint("out/paper/ckpt.pt")["model"]
    assert not any(name.startswith("trunk.") for name in weights)  # OverFeat's licence
    weights = model.read_checkpoint("out/masks/ckpt.pt")["model"]
    assert weights["foreground.weight"].any()  # without self-training, too
