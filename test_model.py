"""python -m pytest -q test_model.py

Nearly every expected value is computed here a second time, by slow and obvious loops. The rest are
the paper's numbers, a vector worked by hand, and commands that must end well or in one clear line.
"""

import contextlib
import errno
import gc
import io
import json
import math
import os
import re
import shlex
import shutil
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


def note_opened(event, args):
    if event == "open":
        OPENED.append(str(args[0]))


sys.addaudithook(note_opened)


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
    gc.collect()  # the lock on a refused run's folder goes with its frames
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
    numbers = [0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28]
    state = {}
    for n, layer in zip(numbers, layers, strict=True):
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
    cells = [line["cells"] for line in lines]
    parameters = [line["params"] for line in lines]
    assert cells == [197, 65, 59, 29, 29, 29, 29, 29, 27, 25, 23, 21]
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


def test_a_cell_sees_the_pixels_of_its_receptive_field():
    """Gradients of one cell reach the field that `geometry` tells, and no pixel beside it."""
    net = model.Net("tiny", ["background", "cat"], [8]).double()
    for p in net.parameters():
        p.data.abs_()  # no unit is dead
    x = torch.rand(1, 3, 99, 99, dtype=torch.double, requires_grad=True)
    scores = net.run(x, net.rows, [*net.trunk, *net.head])
    scores[0, :, 5, 5].sum().backward()
    seen = torch.where(x.grad.abs().sum((0, 1, 2)) > 0)[0]
    stride, field, centre = model.geometry(net.rows)
    assert middle_of_field(net.rows, 5) == centre + 5 * stride
    assert seen.min() >= centre + 5 * stride - (field - 1) / 2
    assert seen.max() <= centre + 5 * stride + (field - 1) / 2
    assert seen.max() - seen.min() > field - 6  # a pool passes on its largest input alone


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


def each_window(function, x, kernel, stride):
    """x (D, h, w) -> (values, h', w') of function(window), for one window after the other."""
    rows = []
    for top in range(0, x.shape[1] - kernel + 1, stride):
        row = []
        for left in range(0, x.shape[2] - kernel + 1, stride):
            row.append(function(x[:, top : top + kernel, left : left + kernel]))
        rows.append(np.stack(row, 1))
    return np.stack(rows, 1)


def slow_layer(layer, x, values):
    """One layer of OverFeat in numpy; returns its output and the values that are left."""
    if isinstance(layer, int):
        return each_window(lambda window: window.max((1, 2)), x, layer, layer), values
    out, channels, kernel, stride, pad = layer
    count = out * channels * kernel * kernel
    weight = values[:count].reshape(out, -1).astype(np.float64)
    bias = values[count : count + out]
    padded = np.pad(x, ((0, 0), (pad, pad), (pad, pad)))
    y = each_window(lambda window: weight @ window.ravel() + bias, padded, kernel, stride)
    return np.maximum(y, 0), values[count + out :]


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


def test_other_weight_files_are_named():
    values = random_overfeat("overfeat")
    assert values.nbytes == 75_665_920
    values[:-1].tofile("short")
    values[7] = np.nan
    values.tofile("nan")
    Path("fast").touch()
    os.truncate("fast", SLOW_OVERFEAT["overfeat-fast"][0])
    net = model.Net("overfeat", ["background", "cat"])
    for file, why in (
        ("short", "75,665,916 bytes"),
        ("nan", "NaN or Inf"),
        ("fast", "583,683,488 bytes, .*--trunk overfeat-fast"),
        ("gone", "No such file"),
    ):
        with pytest.raises(OSError, match=why) as e:
            model.load_trunk(net, file)
        assert e.value.filename == file


@pytest.mark.parametrize("name, factors", [("overfeat", (2, 3, 12)), ("overfeat-fast", (4, 16)),
                                           ("vgg16", (2, 4)), ("tiny", (2, 4))])  # fmt: skip
@torch.no_grad()
def test_dense_equals_shift_and_stitch(name, factors):
    """In float64, on odd sizes, with narrow layers in the place of the wide ones."""
    rows = [row._replace(out=min(row.out, 4)) for row in model.TRUNKS[name].rows]
    if name == "vgg16":  # zeros that pad a shifted input are other pixels' there
        rows = [row._replace(pad=0) for row in rows]
    rows += [model.conv(5, 3), model.conv(3, 3)]
    convs, channels = [], 3
    for row in rows:
        if row.kind == "conv":
            convs.append(torch.nn.Conv2d(channels, row.out, row.kernel, dtype=torch.double))
            channels = row.out
    net = model.Net("tiny", ["background", "cat"])
    x = torch.randn(1, 3, 317, 291, dtype=torch.double)
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


def test_upsampling_reaches_pixels_of_another_resolution():
    ramp = torch.arange(20.0)  # the net has seen 20 pixels of 40
    up = model.upsample(ramp.view(1, 1, 1, 20), (1, 40), 1, 0, seen=(1, 20))
    want = (torch.arange(40.0) / 2 - 0.25).clamp(0, 19)
    assert torch.allclose(up, want)


def test_whole_images_are_scored_with_cells_on_their_pixels():
    """`dense` at pixel step * i + offset is what the net says of a picture cut out around it."""
    net = model.Net("tiny", ["background", "cat"], [8]).eval()
    image = torch.from_numpy(random_image(0, 101, 133).transpose(2, 0, 1).copy())[None]
    scores, step, offset = net.dense(image)
    assert (step, offset, scores.shape) == (4, 0, (1, 2, 26, 34))
    centre = int(model.geometry(net.rows)[2])
    top, left = 4 * (12 - 3) - centre, 4 * (16 - 3) - centre  # cell 3 of the cut is on (48, 64)
    cut = image[:, :, top : top + 70, left : left + 70]
    assert torch.allclose(net(cut)[0, :, 3, 3], scores[0, :, 12, 16], atol=1e-4)


# ---------------------------------------------------------------- aggregation and losses
@pytest.mark.parametrize("name", model.AGGREGATIONS)
def test_aggregations_have_right_gradients(name):
    f = model.AGGREGATIONS[name]
    scores = torch.randn(2, 3, 5, 7, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: f(s, 5.0), scores)  # finite differences in float64
    assert torch.allclose(f(scores[:, :, :1, :1], 5.0), scores[:, :, 0, 0])


def test_aggregations_have_the_papers_values():
    scores = torch.randn(2, 3, 5, 7, dtype=torch.double)
    results = {name: f(scores, 5.0) for name, f in model.AGGREGATIONS.items()}
    for b in range(2):
        for k in range(3):
            cells = scores[b, k].flatten().tolist()
            mean_exp = sum(math.exp(5 * s) for s in cells) / 35
            want = {
                "lse": math.log(mean_exp) / 5,  # Eq. 6
                "max": max(cells),
                "mean": sum(cells) / 35,
                "sum": sum(cells),
            }
            for name, value in want.items():
                assert results[name][b, k].item() == pytest.approx(value)


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


def test_pixel_loss_is_each_cells_and_void_has_none():
    scores = torch.randn(2, 3, 2, 2)
    labels = torch.tensor([[[0, 1], [2, 255]], [[255, 2], [1, 0]]], dtype=torch.uint8)
    losses = model.pixel_loss(scores, labels)
    for (b, y, x), loss in np.ndenumerate(losses):
        label = labels[b, y, x].item()
        want = 0 if label == 255 else -scores[b, :, y, x].log_softmax(0)[label].item()
        assert loss == pytest.approx(want)


@pytest.mark.parametrize("train_convs, frozen", [(0, 3), (1, 2), (-1, 0)])
def test_frozen_means_frozen(train_convs, frozen):
    net = model.Net("tiny", ["background", "cat"], [8], train_convs=train_convs).train()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    image = torch.ones(1, 3, 96, 96)
    features = net.frozen(image)
    assert torch.equal(net.frozen(image), features)  # no dropout
    assert not features.requires_grad
    net.scores(features).sum().backward()
    trained = [p for p in net.parameters() if p.requires_grad]
    torch.optim.SGD(trained, 0.1, weight_decay=0.1).step()
    for name, tensor in net.state_dict().items():
        part, number, _ = name.split(".")
        is_frozen = part == "trunk" and int(number) < frozen
        assert torch.equal(tensor, before[name]) == is_frozen, name


@pytest.mark.parametrize("has", [True, False])
def test_bfloat16_only_where_the_device_has_it(has, monkeypatch):
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {"amx_bf16": has}, raising=False)
    out = ok(f"{TOY} --steps 2 --amp --out o")
    assert ("in bfloat16" in out) == has
    assert model.load_net("o/ckpt.pt")[0].amp == has


# ---------------------------------------------------------------- the measure
def score(folder="pred", more=""):
    out = ok(f"eval_voc score {folder} --voc VOC2012 --json s.json {more}")
    return out, json.loads(Path("s.json").read_text())


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


def test_scorer_refuses_255_other_sizes_and_unknown_classes():
    truth = np.array([[0, 2, 255]], np.uint8)
    for guess, classes, why in (
        ([[0, 2, 255]], 3, "255 is not allowed"),  # though the truth is void there
        ([[0, 2, 3]], 3, "holds index 3"),
        ([[0, 2]], 3, "nothing is resized"),
        ([[0, 0, 0]], 2, "its truth holds index 2"),
    ):
        with pytest.raises(ValueError, match=why):
            eval_voc.confusion(truth, np.array(guess, np.uint8), classes)


def test_truth_scores_100_and_is_packed_as_the_server_wants_it():
    masks = make_voc()
    for i, mask in masks.items():
        data.save_labels(f"pred/{i}.png", np.where(mask == 255, 0, mask))
    _, report = score()
    assert report["mean_iou"] == 100
    assert report["images"] == 4
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


def test_palette_is_the_devkits():
    colours = (
        "000000 800000 008000 808000 000080 800080 008080 808080 400000 c00000 408000 c08000"
        " 400080 c00080 408080 c08080 004000 804000 00c000 80c000 004080"
    )
    assert data.voc_palette()[:21].tobytes().hex(" ", 3) == colours
    assert data.voc_palette()[255].tolist() == [224, 224, 192]


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


def test_superpixels_at_half_resolution_cover_the_image():
    image = random_image(0, 21, 33)
    regions = infer.superpixels_at_half(image)
    half = infer.superpixels(np.asarray(Image.fromarray(image).reduce(2)))
    for (y, x), region in np.ndenumerate(regions):
        assert region == half[y // 2, x // 2]
    assert regions.shape == (21, 33)


@pytest.fixture
def proposals():
    """9 regions (13, 17), 12 random segments of them, of which one is empty, and their scores."""
    rng = np.random.default_rng(0)
    regions = rng.permutation(221).reshape(13, 17) % 9
    segments = rng.random((12, 9)) < 0.3
    segments[0] = False
    segments[1:, 0] = True
    return regions, segments, rng.random(12)


def test_box_cover_is_the_mean_score_of_the_boxes_around_a_pixel():
    rng = np.random.default_rng(0)
    corners = np.sort(rng.uniform(-3, 20, (12, 2, 2)), 1)  # some reach beyond the picture
    boxes, scores = corners.reshape(12, 4), rng.random(12)
    cover = infer.box_cover(boxes, scores, (13, 17))
    for (y, x), got in np.ndenumerate(cover):
        around = []
        for (x0, y0, x1, y1), s in zip(np.round(boxes), scores):
            if x0 <= x < x1 and y0 <= y < y1:
                around.append(s)
        assert got == pytest.approx(np.mean(around) if around else 0)


def test_segment_cover_is_the_mean_score_of_the_segments_around_a_pixel(proposals):
    regions, segments, scores = proposals
    cover = infer.segment_cover(segments, scores, regions)
    for (y, x), got in np.ndenumerate(cover):
        around = [s for segment, s in zip(segments, scores) if segment[regions[y, x]]]
        assert got == pytest.approx(np.mean(around) if around else 0)


def test_boxes_of_segments_are_tight(proposals):
    regions, segments, _ = proposals
    boxes = infer.boxes_of(segments, regions)
    for segment, box in list(zip(segments, boxes))[1:]:  # the first is empty
        y, x = np.nonzero(segment[regions])
        assert box.tolist() == [x.min(), y.min(), x.max() + 1, y.max() + 1]


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


def test_our_proposals_find_a_bright_object(bright_object):
    scene = infer.Scene(bright_object)
    for objectness in (scene.bb, scene.seg, infer.saliency(bright_object)):
        assert objectness[4, 4] < 0.4
        assert objectness[40, 52] > 0.6


def test_refine_finds_a_bright_object_from_scores_that_know_nothing(bright_object):
    p = np.full((2, 80, 100), 0.5, np.float32)
    labels = infer.refine(p, bright_object, infer.superpixels_at_half(bright_object)).argmax(0)
    assert (labels == (bright_object[..., 0] > 100)).mean() > 0.95


def test_labels_from_tags_hold_no_other_class(bright_object):
    p = np.random.default_rng(0).random((5, 80, 100), np.float32)
    present = np.array([False, False, True, False, True])
    regions = infer.superpixels_at_half(bright_object)
    some = infer.labels_from_tags(p, present, bright_object, regions, sure=0.5)
    all_ = infer.labels_from_tags(p, present, bright_object, regions, sure=0, background=-9)
    assert set(np.unique(some)) <= {0, 2, 4, 255}
    assert set(np.unique(all_)) <= {2, 4}
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


def test_transparency_is_white():
    ramp = ramp_image()
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


def test_too_many_broken_photographs_stop_a_run():
    photos = data.tagged([f"{n}.png" for n in range(200)], [{1}] * 200, ["background", "cat"])
    known = {}
    data.note_broken(photos, {3: "3.png: cut", 5: "5.png: cut"}, known)
    with pytest.raises(data.InputError, match="3 of 200 photographs cannot be read"):
        data.note_broken(photos, {9: "9.png: cut"}, known)


# ---------------------------------------------------------------- augmentation and the toy
def test_augmentation_turns_magnifies_and_shifts():
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


def test_augmentation_flips_brightens_and_raises_contrast():
    image = torch.from_numpy(random_image(0, 20, 20).transpose(2, 0, 1).copy())[None] / 4 + 90
    draws = torch.full((7, 1), 0.5)
    draws[0] = 0
    assert torch.allclose(data.augment(image, draws), image.flip(3), atol=1e-3)
    draws[0], draws[3], draws[4] = 1, 1, 1  # no flip; 20 % of 255 lighter, contrast x1.2
    mean = image.mean()
    want = ((image - mean) * 1.2 + mean + 51).clamp(0, 255)
    assert torch.allclose(data.augment(image, draws), want, atol=1e-2)


def test_toy_images_hold_their_tags_alone():
    tags, images, masks = data.toy_drawn(3, 60)
    assert 5 <= tags.count(set()) <= 20
    for present, image, mask in zip(tags, images, masks):
        assert set(np.unique(mask)) == {0} | present
        assert image.shape == (96, 96, 3)


def test_toy_scenes_hold_one_or_two_classes_and_are_no_training_images():
    scenes = data.toy_scenes(3, 12)
    assert {len(np.unique(labels)) for _, _, labels in scenes} == {2, 3}
    drawn = data.toy_drawn(3, 12, size=144)[1]
    for _, image, _ in scenes:
        assert not any(np.array_equal(image, other) for other in drawn)


def test_every_epoch_sees_every_image_once():
    s = train.Settings(batch=4)
    keys = []
    for step in range(6):
        keys += train.batch_keys(s, 12, step)
    first = [i for i, _ in keys[:12]]
    second = [i for i, _ in keys[12:]]
    assert sorted(first) == sorted(second) == list(range(12))
    assert first != second
