"""All tests: comparisons with independent computations, and the scripts run as the README runs them.

    python -m pytest -q test_model.py             # a few minutes on two cores
    python -m pytest -q test_model.py -k scorer   # one group

Tests of real data read ../shared (see README.md) and are skipped, saying so, where it is absent.
"""
import csv
import dataclasses
import functools
import gzip
import importlib
import io
import json
import math
import os
import re
import socket
import subprocess
import sys
import tarfile
import time
import zlib
from pathlib import Path

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
from data import InputError

HERE = Path(__file__).resolve().parent
SHARED = HERE.parent / "shared"
VOC, VGG = SHARED / "data/VOCdevkit/VOC2012", SHARED / "weights/vgg16_features_fp16.pth"
IMAGENET = SHARED / "data/imagenet-sample"
real_data = pytest.mark.skipif(not VOC.exists(), reason="no ../shared: tests on real photographs are left out")
torch.set_num_threads(2)
pytestmark = pytest.mark.filterwarnings("error")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def call(script, *args, cwd=None):
    """Run a script's main() in this process: (exit status, what it wrote to stderr, to stdout)."""
    module, out, err = importlib.import_module(script), io.StringIO(), io.StringIO()
    before = sys.argv, sys.stdout, sys.stderr, os.getcwd()
    try:
        sys.argv, sys.stdout, sys.stderr = [f"{script}.py", *map(str, args)], out, err
        os.chdir(cwd or before[3])
        data.run_cli(module.main)
    except SystemExit as e:
        return e.code or 0, err.getvalue(), out.getvalue()
    finally:
        sys.argv, sys.stdout, sys.stderr = before[:3]
        os.chdir(before[3])


def refused(status, err, *words):
    """One line on stderr that holds these words, exit status 2."""
    assert status == 2 and err.count("\n") == 1 and "Traceback" not in err, (status, err)
    assert all(str(word) in err for word in words), err


def random_image(seed, height, width):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


# ---------------------------------------------------------------- model: geometry

def test_overfeat_has_the_papers_numbers():
    rows = model.TRUNKS["overfeat"].rows
    head = [model.conv(k, 3) for k in (1024, 768, 512, 21)]
    assert model.out_size(400, rows) == 29
    assert [model.out_size(n, rows + head) for n in (388, 389, 400, 401)] == [20, 21, 21, 22]
    assert model.geometry(rows + head) == (12, 245, 74)
    lines = model.table(rows + head, 400)
    assert sum(x["parameters"] for x in lines[:8]) == 18_916_480
    assert [x["parameters"] for x in lines[8:]] == [9_438_208, 7_078_656, 3_539_456, 96_789]
    assert [x["cells"] for x in lines] == [197, 65, 59, 29, 29, 29, 29, 29, 27, 25, 23, 21]
    assert sum(x["GFLOPs"] for x in lines[:8]) == pytest.approx(39.2, abs=0.2)
    assert model.out_size(231, model.TRUNKS["overfeat-fast"].rows) == 12


@pytest.mark.parametrize("trunk", model.TRUNKS)
def test_padding_puts_cells_on_pixels(trunk):
    rows = model.TRUNKS[trunk].rows + [model.conv(8, 3), model.conv(3, 3)]
    for n in (*range(1, 40), 333, 375, 500):
        left, right, cells, offset = model.centring(n, rows)
        assert cells == math.ceil(n / model.geometry(rows)[0]) and offset in (0, 0.5)
        assert model.out_size(n + left + right, rows) >= cells > model.out_size(n + left + right - 1, rows) or right == 0
    assert [model.centring(n, model.Net("overfeat").rows)[2] for n in (500, 375, 333)] == [42, 32, 28]


def test_the_receptive_field_is_what_the_net_sees():
    net = model.Net("tiny", classes=2, head=[8]).double().eval()
    for p in net.parameters():
        p.data.abs_()                                                      # no unit is dead
    stride, field, centre = model.geometry(net.rows)
    x = torch.full((1, 3, 99, 99), 128.0, dtype=torch.double, requires_grad=True)
    net.run(x, net.rows, [*net.trunk, *net.head])[0, :, 5, 5].sum().backward()
    seen = torch.where(x.grad.abs().sum((0, 1, 2)) > 0)[0]
    assert centre + 5 * stride - (field - 1) / 2 <= seen.min() and seen.max() <= centre + 5 * stride + (field - 1) / 2


# ---------------------------------------------------------------- model: OverFeat against a slow numpy forward pass

def slow_conv(x, weight, bias, stride, pad):
    """x (D, h, w), weight (out, D, k, k): cross-correlation in float64, one output place at a time."""
    x, k = np.pad(x, ((0, 0), (pad, pad), (pad, pad))), weight.shape[2]
    h, w = ((n - k) // stride + 1 for n in x.shape[1:])
    out, flat = np.empty((len(weight), h, w)), weight.reshape(len(weight), -1).astype(np.float64)
    for i in range(h):
        for j in range(w):
            out[:, i, j] = flat @ x[:, i * stride:i * stride + k, j * stride:j * stride + k].ravel() + bias
    return out


def slow_pool(x, k, stride):
    h, w = ((n - k) // stride + 1 for n in x.shape[1:])
    return np.array([[x[:, i * stride:i * stride + k, j * stride:j * stride + k].max((1, 2)) for j in range(w)]
                     for i in range(h)]).transpose(2, 0, 1)


SLOW_OVERFEAT = {                                  # written out from section 6.1 and 6.2, not from model.py's rows
    "overfeat": ([(96, 3, 7, 2, 0), "pool 3", (256, 96, 7, 1, 0), "pool 2", (512, 256, 3, 1, 1), (512, 512, 3, 1, 1),
                  (1024, 512, 3, 1, 1), (1024, 1024, 3, 1, 1)], 578_625_952),
    "overfeat-fast": ([(96, 3, 11, 4, 0), "pool 2", (256, 96, 5, 1, 0), "pool 2", (512, 256, 3, 1, 1),
                       (1024, 512, 3, 1, 1), (1024, 1024, 3, 1, 1)], 583_683_488)}


@pytest.fixture(scope="module", params=SLOW_OVERFEAT)
def overfeat_file(request, tmp_path_factory):
    """A sparse file of the official size whose first floats are random weights in the official order."""
    layers, size = SLOW_OVERFEAT[request.param]
    rng, path = np.random.default_rng(0), tmp_path_factory.mktemp("w") / "net_weight"
    with open(path, "wb") as file:
        for layer in layers:
            if not isinstance(layer, str):
                out, channels, k = layer[:3]
                std = math.sqrt(2 / (channels * k * k))
                for values in (rng.normal(0, std, out * channels * k * k), rng.normal(0, 0.1, out)):
                    file.write(values.astype("<f4").tobytes())
        needed = file.tell()
        file.truncate(size)
    return request.param, path, needed


def test_overfeat_file_loads_as_a_slow_numpy_net(overfeat_file):
    name, path, needed = overfeat_file
    assert name != "overfeat" or needed == 75_665_920
    net = model.Net(name)
    model.load_trunk(net, name, path)
    image, at, n = random_image(1, 117, 129), 0, 0
    x = (image.transpose(2, 0, 1).astype(np.float64) - 118.380948) / 61.896913
    fast = net.normalise(torch.from_numpy(image).permute(2, 0, 1)[None])
    values = np.fromfile(path, "<f4", needed // 4)
    for layer, row in zip(SLOW_OVERFEAT[name][0], net.spec.rows):
        if isinstance(layer, str):
            x = slow_pool(x, int(layer[-1]), int(layer[-1]))
        else:
            out, channels, k, stride, pad = layer
            weight = values[at:at + out * channels * k * k].reshape(out, channels, k, k)
            at += weight.size
            x = np.maximum(slow_conv(x, weight, values[at:at + out], stride, pad), 0)
            at += out
        convs = [net.trunk[n]] if row.kind == "conv" else []
        n += len(convs)
        with torch.no_grad():
            fast = net.run(fast, [row], convs)
        assert np.abs(fast[0].numpy() - x).max() <= 1e-4 * np.abs(x).max(), layer


def test_wrong_overfeat_files_are_named(overfeat_file, tmp_path):
    name, path, needed = overfeat_file
    other = next(n for n in SLOW_OVERFEAT if n != name)
    with pytest.raises(ValueError, match=f"bytes, but.*--trunk {name}"):
        model.load_trunk(model.Net(other), other, path)
    short = tmp_path / "short"
    with open(path, "rb") as file:
        head = file.read(needed)
    short.write_bytes(head[:-4])
    with pytest.raises(ValueError, match=f"{needed - 4:,} bytes"):
        model.load_trunk(model.Net(name), name, short)
    short.write_bytes(head[:400] + np.float32("nan").tobytes() + head[404:])
    with pytest.raises(ValueError, match="NaN or Inf"):
        model.load_trunk(model.Net(name), name, short)


# ---------------------------------------------------------------- model: dense

@pytest.mark.parametrize("trunk, factors", [("overfeat", (2, 3, 4, 6, 12)), ("overfeat-fast", (2, 4, 8, 16)), ("tiny", (2, 4))])
def test_dense_equals_shift_and_stitch(trunk, factors):
    """On odd sizes, borders included, in float64, with narrow layers in the place of the wide ones."""
    rows = [r._replace(out=min(r.out, 6)) for r in model.TRUNKS[trunk].rows] + [model.conv(5, 3), model.conv(3, 3)]
    generator, channels, convs = torch.Generator().manual_seed(0), 3, []
    for row in rows:
        if row.kind == "conv":
            convs.append(torch.nn.Conv2d(channels, row.out, row.kernel, dtype=torch.double))
            channels = row.out
    net = model.Net("tiny", 2)
    x = torch.randn(1, 3, 317, 291, generator=generator, dtype=torch.double)
    stride = model.geometry(rows)[0]
    for factor in factors:
        step = stride // factor
        with torch.no_grad():
            fast = net.run(x, model.dense_rows(rows, factor), convs)
            slow = torch.full_like(fast, float("nan"))
            for dy in range(factor):
                for dx in range(factor):
                    part = net.run(x[:, :, dy * step:, dx * step:], rows, convs)
                    slow[:, :, dy::factor, dx::factor] = part
        assert (fast - slow).abs().max() < 1e-12 and not slow.isnan().any()
    for factor in (5, 7, 2 * stride):
        with pytest.raises(ValueError, match="must divide"):
            model.dense_rows(rows, factor)


def test_upsampling_is_bilinear_between_cell_centres():
    scores = torch.tensor([[[[0.0, 4.0, 12.0]]]])                     # cells on pixels 0.5, 4.5, 8.5
    up = model.upsample(scores, (1, 12), step=4, offset=0.5)[0, 0, 0]
    assert up[0] == 0 and up[11] == 12
    assert torch.allclose(up[1:9], torch.tensor([0.5, 1.5, 2.5, 3.5, 5, 7, 9, 11.0]))
    ramp = torch.arange(20.0).view(1, 1, 1, 20)
    assert torch.allclose(model.upsample(ramp, (1, 40), 1, 0, seen=(1, 20))[0, 0, 0], (torch.arange(40.0) / 2 - 0.25).clamp(0, 19))


# ---------------------------------------------------------------- model: aggregation and freezing

def test_lse_limits_and_stability():
    s = torch.randn(2, 3, 5, 7, dtype=torch.double)
    assert torch.allclose(model.lse(s, 1e4), s.amax((2, 3)), atol=1e-3)
    assert torch.allclose(model.lse(s, 1e-6), s.mean((2, 3)), atol=1e-5)
    naive = ((5 * s).exp().mean((2, 3))).log() / 5                    # Eq. 6 as it is written, area term included
    assert torch.allclose(model.lse(s, 5.0), naive)
    for size in (1e4, -1e4):
        assert torch.allclose(model.lse(torch.full((1, 1, 9, 9), size), 5.0), torch.tensor(size))
    one = torch.randn(2, 3, 1, 1)
    assert all(torch.allclose(f(one, 5.0), one[:, :, 0, 0]) for f in model.AGGREGATIONS.values())


@pytest.mark.parametrize("name", model.AGGREGATIONS)
def test_aggregation_gradients(name):
    s = torch.randn(2, 3, 4, 5, dtype=torch.double, requires_grad=True)
    f = lambda s: model.AGGREGATIONS[name](s, 5.0)
    assert torch.autograd.gradcheck(f, s)                              # finite differences in float64
    f(s).sum().backward()
    if name == "lse":
        assert torch.allclose(s.grad, (5 * s).flatten(2).softmax(2).view_as(s))


def test_loss_is_the_likelihood_of_the_tags():
    s, tags = torch.randn(4, 5), torch.eye(5)[[0, 2, 4, 1]]
    assert model.tag_loss(s, tags).item() == pytest.approx(-s.log_softmax(1)[range(4), [0, 2, 4, 1]].mean().item())
    tags[1, 3] = 1
    p = s[1:2].log_softmax(1)[0]
    assert model.tag_loss(s[1:2], tags[1:2]).item() == pytest.approx(-(p[2] + p[3]).item() / 2)
    probability = s.sigmoid()
    sigmoid = -(tags * probability.log() + (1 - tags) * (1 - probability).log()).mean()
    assert model.tag_loss(s, tags, "sigmoid").item() == pytest.approx(sigmoid.item(), rel=1e-5)


def test_frozen_means_frozen():
    for train_convs, frozen in ((0, 3), (1, 2), (-1, 0)):
        net = model.Net("tiny", 4, [8], train_convs=train_convs)
        assert net.frozen_convs == frozen
        features = net.frozen(torch.zeros(1, 3, 96, 96))
        assert not features.requires_grad
        net.train()
        net.scores(features).sum().backward()
        assert [p.grad is not None for p in net.trunk.parameters()] == [p.requires_grad for p in net.trunk.parameters()]
        assert torch.equal(net.frozen(torch.ones(1, 3, 96, 96)), net.frozen(torch.ones(1, 3, 96, 96)))   # no dropout
        before = {k: v.clone() for k, v in net.state_dict().items()}
        torch.optim.SGD([p for p in net.parameters() if p.requires_grad], 0.1, weight_decay=0.1).step()
        changed = {k for k, v in net.state_dict().items() if not torch.equal(v, before[k])}
        assert {int(k.split(".")[1]) for k in changed if k.startswith("trunk")} == set(range(frozen, 3)) and "head.0.weight" in changed


# ---------------------------------------------------------------- scorer: VOC's rules (voc-conventions, worked vectors)

TRUTH_A, GUESS_A = np.array([[0, 0, 1], [0, 1, 255]], np.uint8), np.array([[0, 1, 1], [0, 1, 0]], np.uint8)
TRUTH_B, GUESS_B = np.array([[0, 2, 2, 0]], np.uint8), np.array([[0, 2, 2, 2]], np.uint8)


def test_scorer_worked_vector():
    matrices = [eval_voc.confusion(TRUTH_A, GUESS_A, 4), eval_voc.confusion(TRUTH_B, GUESS_B, 4)]
    total = sum(matrices)
    assert total.dtype == np.int64
    assert total.tolist() == [[3, 1, 1, 0], [0, 2, 0, 0], [0, 0, 2, 0], [0, 0, 0, 0]]
    report = eval_voc.summarise(total, list("abcd"), 2)
    assert report["iou"] == {"a": pytest.approx(60), "b": pytest.approx(200 / 3), "c": pytest.approx(200 / 3), "d": None}
    assert report["mean_iou"] is None and report["classes_defined"] == 3
    assert report["mean_iou_defined"] == pytest.approx(64.44, abs=0.01)
    assert report["mean_accuracy"] == pytest.approx(100 * (3 / 5 + 1 + 1) / 3)
    void = [eval_voc.confusion(np.where(t == 255, 0, t), g, 4) for t, g in ((TRUTH_A, GUESS_A), (TRUTH_B, GUESS_B))]
    values = list(eval_voc.variants(matrices, void).values())
    assert values == pytest.approx([62.50, 48.33, 64.44, 66.67], abs=0.01)
    changed = matrices[0] + eval_voc.confusion(TRUTH_B, np.array([[3, 2, 2, 2]], np.uint8), 4)
    assert eval_voc.measures(changed)[0] == pytest.approx([40, 200 / 3, 200 / 3, 0])
    report = eval_voc.summarise(changed, list("abcd"), 2)
    assert report["mean_iou"] == pytest.approx(43.33, abs=0.01)
    assert list(eval_voc.variants([changed], [changed]).values())[2] == pytest.approx(57.78, abs=0.01)


def test_scorer_refuses_what_the_devkit_refuses():
    with pytest.raises(ValueError, match="255 is not allowed"):
        eval_voc.confusion(TRUTH_A, np.array([[0, 1, 1], [0, 1, 255]], np.uint8), 4)      # under void too
    with pytest.raises(ValueError, match="nothing is resized"):
        eval_voc.confusion(TRUTH_A, GUESS_A.T, 4)
    with pytest.raises(ValueError, match="index 7"):
        eval_voc.confusion(np.full((2, 2), 7, np.uint8), np.zeros((2, 2), np.uint8), 4)


def test_average_precision_is_the_devkits_from_2010_on():
    """Hits at ranks 1, 3, 6: precision 1, 2/3, 1/2 there, already monotone; a miss first makes the later best count."""
    scores = np.array([0.9, 0.8, 0.7, 0.6, 0.5, 0.4])
    assert eval_voc.average_precision(scores, np.array([1, 0, 1, 0, 0, 1], bool)) == pytest.approx(100 * (1 + 2 / 3 + 1 / 2) / 3)
    assert eval_voc.average_precision(scores, np.array([0, 1, 1, 0, 0, 0], bool)) == pytest.approx(100 * (2 / 3 + 2 / 3) / 2)
    assert eval_voc.average_precision(scores, np.zeros(6, bool)) is None


def test_palette_is_the_devkits():
    first = [(0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0), (0, 0, 128), (128, 0, 128), (0, 128, 128), (128, 128, 128),
             (64, 0, 0), (192, 0, 0), (64, 128, 0), (192, 128, 0), (64, 0, 128), (192, 0, 128), (64, 128, 128),
             (192, 128, 128), (0, 64, 0), (128, 64, 0), (0, 192, 0), (128, 192, 0), (0, 64, 128)]
    assert [tuple(c) for c in data.voc_palette()[:21].tolist()] == first
    assert tuple(data.voc_palette()[255]) == (224, 224, 192)


def test_scorer_reads_index_images_only(tmp_path):
    labels = np.arange(21, dtype=np.uint8).repeat(21).reshape(21, 21)
    path = tmp_path / "x.png"
    data.save_labels(path, labels)
    assert (data.read_labels(path) == labels).all()
    with Image.open(path) as image:
        assert image.mode == "P" and len(image.getpalette()) == 768
    Image.fromarray(labels).save(path)                                                    # plain grey indices are fine
    assert (data.read_labels(path) == labels).all()
    picture = Image.fromarray(data.voc_palette()[labels])
    for broken in (picture, picture.convert("P", palette=Image.Palette.ADAPTIVE), Image.fromarray(labels.astype(np.uint16))):
        broken.save(path)
        with pytest.raises(InputError, match="x.png"):
            data.read_labels(path)
    picture.convert("L").save(path)                                                       # person 15 becomes 147
    with pytest.raises(ValueError, match="index"):
        eval_voc.confusion(labels, data.read_labels(path), 21)


def make_voc(root, masks, name="val", images=True):
    """A small devkit: {id: mask (H, W)} as one set."""
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation", "ImageSets/Main"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    (root / f"ImageSets/Segmentation/{name}.txt").write_text("\n".join(masks))            # no newline at the end
    (root / f"ImageSets/Main/{name}.txt").write_text("\n".join(masks))
    for k, label in enumerate(data.VOC_CLASSES[1:], 1):
        lines = (f"{i} {1 if (m == k).any() else -1:2}" for i, m in masks.items())
        (root / f"ImageSets/Main/{label}_{name}.txt").write_text("\n".join(lines) + "\n")
    for n, (i, mask) in enumerate(masks.items()):
        data.save_labels(root / f"SegmentationClass/{i}.png", mask)
        if images:
            Image.fromarray(random_image(n, *mask.shape)).save(root / f"JPEGImages/{i}.jpg")
    return root


@pytest.fixture
def voc(tmp_path):
    """Four images in both orientations; all 21 classes occur."""
    rng, masks = np.random.default_rng(0), {}
    for n, size in enumerate([(60, 80), (80, 60), (64, 64), (50, 90)]):
        masks[f"2007_00{n}"] = np.kron(rng.integers(0, 21, (5, 10)), np.ones((20, 20), int))[:size[0], :size[1]].astype(np.uint8)
        masks[f"2007_00{n}"][:3] = 255
    return make_voc(tmp_path / "VOC2012", masks)


def test_scorer_perfect_and_json(voc, tmp_path):
    truth = tmp_path / "pred"
    for path in (voc / "SegmentationClass").glob("*.png"):
        labels = data.read_labels(path)
        data.save_labels(truth / path.name, np.where(labels == 255, 0, labels))
    status, err, out = call("eval_voc", "score", truth, "--voc", voc, "--set", "val", "--json", tmp_path / "s.json", "--variants")
    report = json.loads((tmp_path / "s.json").read_text())
    assert status == 0 and "NOT VOC" in out and report["images"] == 4
    assert all(v in (None, 100) for v in report["iou"].values())
    assert list(report["iou"]) == data.VOC_CLASSES


def test_scorer_takes_other_classes(voc, tmp_path):
    pred, names = tmp_path / "pred", tmp_path / "names.txt"
    make_voc(voc, {"a": np.array([[0, 0, 1], [0, 1, 255]]), "b": np.array([[0, 2, 2, 0]])}, "few")
    data.save_labels(pred / "a.png", GUESS_A)
    data.save_labels(pred / "b.png", GUESS_B)
    names.write_text("ground\ncat\ndog\nemu")
    status, err, out = call("eval_voc", "score", pred, "--voc", voc, "--set", "few", "--classes", names, "--json", tmp_path / "s.json")
    report = json.loads((tmp_path / "s.json").read_text())
    assert status == 0 and "3 of 4 classes" in out and report["mean_iou"] is None and report["iou"]["emu"] is None, err
    assert report["mean_iou_defined"] == pytest.approx(64.44, abs=0.01)
    names.write_text("ground\nground\n")
    refused(*call("eval_voc", "score", pred, "--voc", voc, "--set", "few", "--classes", names)[:2], "names.txt", "different")


def test_scorer_lists_all_problems_at_once(voc, tmp_path):
    pred = tmp_path / "pred"
    status, err, _ = call("eval_voc", "score", pred, "--voc", voc)
    refused(status, err, "4 of 4 files cannot be used", "2007_000")
    for n in range(4):
        data.save_labels(pred / f"2007_00{n}.png", data.read_labels(voc / f"SegmentationClass/2007_00{n}.png") % 255)
    data.save_labels(pred / "2007_001.png", np.zeros((60, 80)))                           # wrong size
    data.save_labels(pred / "2007_002.png", np.full((64, 64), 255))
    (pred / "2007_003.png").write_bytes(b"not a png")
    status, err, _ = call("eval_voc", "score", pred, "--voc", voc, "--json", tmp_path / "s.json")
    refused(status, err, "3 of 4", "2007_001.png", "2007_002.png", "2007_003.png")
    (pred / "2007_000.png").unlink()                                                      # missing and unusable, in one list
    status, err, _ = call("eval_voc", "score", pred, "--voc", voc, "--json", tmp_path / "s.json")
    refused(status, err, "4 of 4", "2007_000.png: No such file", "2007_003.png")
    assert not (tmp_path / "s.json").exists()


def test_submission_archive(voc, tmp_path):
    pred, out = tmp_path / "pred", tmp_path / "r.tgz"
    make_voc(voc, {f"2012_{n}": np.zeros((40 + n, 50), np.uint8) for n in range(3)}, "test")
    for n in range(3):
        data.save_labels(pred / f"2012_{n}.png", np.full((40 + n, 50), n))
    status, err, text = call("eval_voc", "submit", pred, "--voc", voc, "--set", "test", "--out", out)
    assert status == 0 and out.read_bytes()[:2] == b"\x1f\x8b"
    with tarfile.open(out) as tar:
        assert tar.getnames() == [f"results/VOC2012/Segmentation/comp6_test_cls/2012_{n}.png" for n in range(3)]
        for n, member in enumerate(tar):
            image = Image.open(tar.extractfile(member))
            assert image.mode == "P" and (np.asarray(image) == n).all()
    out.unlink()
    Image.fromarray(np.zeros((40, 50), np.uint8)).save(pred / "2012_0.png")
    data.save_labels(pred / "2012_1.png", np.zeros((50, 41)))
    data.save_labels(pred / "2012_2.png", np.full((42, 50), 21))
    status, err, _ = call("eval_voc", "submit", pred, "--voc", voc, "--set", "test", "--out", out)
    refused(status, err, "3 of 3", "2012_0.png: mode L", "(41, 50)", "highest index 21")
    assert not out.exists()


# ---------------------------------------------------------------- training

TOY = ("--toy-images", 24, "--toy-scenes", 1, "--threshold-images", 2, "--batch", 4, "--log-every", 2, "--schedule", "steps", "--device", "cpu")


def tensors(path):
    ckpt = infer.read_checkpoint(path)
    moments = [v for state in ckpt["optimizer"]["state"].values() for v in state.values() if torch.is_tensor(v)]
    return {**ckpt["model"], **{f"moment{i}": v for i, v in enumerate(moments)}}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def log_rows(path):
    """Rows of a log.csv but for the time."""
    return [row[:4] for row in csv.reader((path / "log.csv").read_text().splitlines())]


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_is_bit_exact(tmp_path, workers):
    straight, broken = tmp_path / "a", tmp_path / "b"
    assert call("train", *TOY, "--steps", 8, "--out", straight)[0] == 0
    assert call("train", *TOY, "--steps", 3, "--out", broken, "--workers", workers)[0] == 0
    assert not same(tensors(straight / "ckpt.pt"), tensors(broken / "ckpt.pt"))
    with open(broken / "log.csv", "a") as file:
        file.write("5,20,0.1,0.1,1\nhalf a l\0")                                          # written after the checkpoint
    assert call("train", *TOY, "--steps", 8, "--out", broken, "--workers", workers, "--resume")[0] == 0
    assert same(tensors(straight / "ckpt.pt"), tensors(broken / "ckpt.pt"))
    assert log_rows(broken) == log_rows(straight)


def test_resume_refuses_other_settings(tmp_path):
    status, err, _ = call("train", *TOY, "--steps", 2, "--out", tmp_path / "a", "--resume")
    refused(status, err, "no checkpoint to --resume")
    assert call("train", *TOY, "--steps", 2, "--out", tmp_path / "a")[0] == 0
    status, err, _ = call("train", *TOY, "--steps", 4, "--r", 3, "--seed", 5, "--out", tmp_path / "a", "--resume")
    refused(status, err, "r was 5.0 and is 3.0", "seed was 0 and is 5")


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    status, err, _ = call("train", *TOY, "--steps", 20, "--lr", 1e30, "--optimizer", "sgd", "--out", tmp_path)
    refused(status, err, "the loss is not finite", "toy ", "last good checkpoint: none")


def torchrun(*args, file="train.py"):
    """Run a script in two processes on a free port of this machine; returns the finished process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_addr", "127.0.0.1",
                           "--master_port", str(port), str(file), *map(str, args)], cwd=HERE, capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """torchrun, where torch alone can add two numbers with it: some sandboxes allow no sockets."""
    script = tmp_path_factory.mktemp("gloo") / "add.py"
    script.write_text("import os, torch\nos.environ.setdefault('GLOO_SOCKET_IFNAME', 'lo')\n"
                      "torch.distributed.init_process_group('gloo')\ntorch.distributed.all_reduce(torch.ones(1))\n"
                      "os._exit(0)\n")
    done = torchrun(file=script)
    if done.returncode:
        pytest.skip(f"torchrun cannot join two processes here: {done.stderr[-800:]}")
    return torchrun


def test_two_processes_train_as_one_and_resume(tmp_path, two_processes):
    """The same global batch, shared by two gloo processes: equal losses over 20 steps, one writer, exact resume."""
    args = (*TOY, "--steps", 20, "--dropout", 0, "--optimizer", "sgd", "--log-every", 1)
    status, err, _ = call("train", *args, "--out", tmp_path / "one")
    assert status == 0, err
    for name, more in (("two", ()), ("parts", ("--steps", 8)), ("parts", ("--resume",))):
        done = two_processes(*args, "--out", tmp_path / name, *more)
        assert done.returncode == 0, done.stderr[-3000:]
    one, two = (np.array([row[2] for row in log_rows(tmp_path / n)[1:]], float) for n in ("one", "two"))
    assert len(one) == len(two) == 20 and np.abs(one - two).max() < 1e-5
    assert log_rows(tmp_path / "two") == log_rows(tmp_path / "parts")
    assert same(tensors(tmp_path / "two/ckpt.pt"), tensors(tmp_path / "parts/ckpt.pt"))


def test_toy_masks_belong_to_the_toy_images(tmp_path):
    photos = data.toy_photos(3, 12)
    masked = data.Masked.of(photos, "drawn")
    for i in range(12):
        assert set(masked.labels(i).unique().tolist()) <= {0, int(photos.tags[i].argmax())}
    status, err, _ = call("train", *TOY, "--steps", 2, "--masks", "drawn", "--out", tmp_path)
    assert status == 0, err


def test_toy_images_carry_one_tag_and_scenes_several():
    photos = data.toy_photos(0, 60)
    assert (photos.tags.sum(1) == 1).all() and 5 <= photos.tags[:, 0].sum() <= 20
    assert all((a == b).all() for a, b in zip(photos.paths, data.toy_photos(0, 60).paths))
    scenes = data.toy_scenes(0, 12)
    assert max(len(np.unique(labels)) for _, _, labels in scenes) >= 4
    assert not any((image == other).all() for _, image, _ in scenes for other in photos.paths if other.shape == image.shape)


def test_augmentation_moves_labels_with_the_image():
    labels = torch.zeros(6, 64, 64, dtype=torch.uint8)
    labels[:, 20:40, 10:30] = 7
    images = (labels[:, None] > 0).float().expand(-1, 3, -1, -1) * 200
    random = torch.rand(7, 6, generator=torch.Generator().manual_seed(3))
    moved, moved_labels = data.augment(images, random, labels, brightness=0, contrast=0)
    inside = (moved[:, 0] > 100) == (moved_labels == 7)
    assert inside[moved_labels != 255].float().mean() > 0.99
    still, labels2 = data.augment(images, torch.full((7, 6), 0.5), labels, flip=0)        # the middle of every range
    assert torch.allclose(still, images, atol=1e-3) and torch.equal(labels2, labels)


def test_cached_features_are_the_trunks_resume_and_refuse_strangers(tmp_path):
    for n, image in enumerate(data.toy_photos(0, 40).paths):
        Image.fromarray(image).save(tmp_path / f"{n}.png")
    photos = data.Photos(data.image_files(tmp_path), torch.eye(2)[[1] * 40], ["background", "a"], 32)
    net, device = model.Net("tiny", 2, generator=torch.Generator().manual_seed(0)), torch.device("cpu")
    s = train.Settings(trunk="tiny", size=32, cache=str(tmp_path / "c"), views=2)
    features = train.cached_features(net, photos, s, device)
    want = net.frozen(torch.stack([photos[i, 0.5][0] for i in range(40)]))
    assert np.abs(features[:, 0] - want.numpy()).max() < 2e-3 * want.max() and not (features[:, 0] == features[:, 1]).all()
    whole, state = np.array(features), tmp_path / "c/cache.json"
    known = json.loads(state.read_text())
    state.write_text(json.dumps(dict(known, done=32)))                        # killed in its second block
    torn = np.load(tmp_path / "c/features.npy", mmap_mode="r+")
    torn[35:] = 0
    assert (train.cached_features(net, photos, s, device) == whole).all()
    keys = {(i, v): train.Cached(photos, features, range(40), True)[i, v][0] for i in (0, 7) for v in (0.1, 0.3, 0.6, 0.9)}
    for i in (0, 7):
        for view, (plain, mirrored) in enumerate([(0.1, 0.3), (0.6, 0.9)]):
            assert (keys[i, plain].numpy() == whole[i, view]).all() and torch.equal(keys[i, plain].flip(2), keys[i, mirrored])
    net.trunk[0].bias.data += 1
    for other in (s, dataclasses.replace(s, size=48), dataclasses.replace(s, amp=True)):
        with pytest.raises(InputError, match="made for another .*(weights|size|amp)"):
            train.cached_features(net, photos, other, device)


def test_a_killed_run_leaves_a_whole_checkpoint_and_resumes_equal(tmp_path):
    """SIGKILL at random moments (KILLS=20 for more); then SIGTERM, which saves and ends with one line."""
    args = [sys.executable, HERE / "train.py", *map(str, TOY), "--steps", "60", "--save-every", "1"]
    assert call("train", *TOY, "--steps", 60, "--out", tmp_path / "whole")[0] == 0
    rng, out, resume = np.random.default_rng(), tmp_path / "killed", []
    for kill in range(int(os.environ.get("KILLS", 3)) + 1):
        run = subprocess.Popen([*args, "--out", out, *resume], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env={**os.environ, "OMP_NUM_THREADS": "2"})               # as many threads as here
        while "images/s" not in run.stdout.readline() and run.poll() is None:
            pass
        time.sleep(rng.uniform(0.05, 0.6))
        (run.terminate if kill == 0 else run.kill)()
        _, err = run.communicate()
        if kill == 0 and run.returncode:
            refused(run.returncode, err, "saved at step", "--resume")
        if (out / "ckpt.pt").exists():
            assert infer.read_checkpoint(out / "ckpt.pt")["step"] >= 1
            resume = ["--resume"]
    assert call("train", *TOY, "--steps", 60, "--out", out, *resume)[0] == 0
    assert same(tensors(tmp_path / "whole/ckpt.pt"), tensors(out / "ckpt.pt")) and log_rows(tmp_path / "whole") == log_rows(out)


def test_checkpoints_and_scores_never_execute_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)
    torch.save({"format": Evil(), "settings": {}, "classes": [], "model": {}, "thresholds": {}}, tmp_path / "evil.pt")
    status, err, _ = call("infer", tmp_path / "evil.pt", tmp_path / "x.jpg")
    refused(status, err, "evil.pt", "expected a checkpoint")
    args = ("train", *TOY, "--train-convs", 0, "--steps", 1, "--cache", tmp_path / "c", "--out")
    assert call(*args, tmp_path / "o")[0] == 0
    np.save(tmp_path / "c/features.npy", np.array([Evil()], object))
    refused(*call(*args, tmp_path / "p")[:2], "features.npy", "delete")
    torch.save({"features.0.weight": Evil()}, tmp_path / "vgg.pth")
    refused(*call(*args, tmp_path / "p", "--trunk", "vgg16", "--weights", tmp_path / "vgg.pth")[:2], "vgg.pth", "expected")
    assert not any(word in (HERE / f"{n}.py").read_text() for n in ("data", "model", "train", "infer", "eval_voc")
                   for word in ("allow_pickle=True", "weights_only=False", "import pickle"))
    assert not (tmp_path / "executed").exists()


def test_photographs_of_every_kind_are_read_upright_and_bad_ones_named(tmp_path):
    """The same scene in eight encodings, within what compression and bit depth lose; then files that are no images."""
    ramp = np.stack(np.broadcast_arrays(np.linspace(0, 255, 40)[:, None], np.linspace(255, 0, 30), 128), -1).astype(np.uint8)
    image, path = Image.fromarray(ramp), tmp_path
    exif = Image.Exif()
    exif[0x0112] = 6                                                       # the camera was turned
    image.transpose(Image.Transpose.ROTATE_90).save(path / "turned.jpg", exif=exif, quality=95)
    image.convert("CMYK").save(path / "cmyk.jpg", quality=95)
    image.quantize(256).save(path / "palette.png")
    image.save(path / "plain.bmp")
    clear = image.convert("RGBA")
    clear.putalpha(Image.fromarray(np.where(np.arange(40)[:, None] < 20, 255, 0).astype(np.uint8).repeat(30, 1)))
    clear.save(path / "alpha.png")
    for name in ("turned.jpg", "cmyk.jpg", "palette.png", "plain.bmp"):
        assert np.abs(data.load_image(path / name).astype(int) - ramp).mean() < 12, name
    assert (data.load_image(path / "alpha.png")[20:] == 255).all() and (data.load_image(path / "alpha.png")[:20] == ramp[:20]).all()
    grey = np.arange(1200).reshape(40, 30)
    Image.fromarray((grey * 50).astype(np.uint16)).save(path / "deep.png")
    assert np.abs(data.load_image(path / "deep.png")[..., 0] - grey * 50 / 257).max() <= 1
    Image.new("RGB", (20_000, 2)).save(path / "wide.png")
    assert data.load_image(path / "wide.png").shape == (2, 20_000, 3)
    whole = (path / "turned.jpg").read_bytes()
    png = (path / "palette.png").read_bytes()                              # its header now claims 40,000 x 30,000 pixels
    header = b"IHDR" + (40_000).to_bytes(4, "big") + (30_000).to_bytes(4, "big") + png[24:29]
    bomb = png[:12] + header + zlib.crc32(header).to_bytes(4, "big") + png[33:]
    for name, content in {"half.jpg": whole[:len(whole) // 2], "empty.jpg": b"", "text.jpg": b"hello", "bomb.png": bomb}.items():
        (path / name).write_bytes(content)
        with pytest.raises(InputError, match=name):
            data.load_image(path / name)
    photos = data.Photos([path / "plain.bmp", path / "half.jpg", path / "turned.jpg"], torch.eye(3), list("abc"), 16)
    assert [photos[i, 0.5][1] for i in range(3)] == [0, 2, 2]              # a broken one gives way to the next, always the same
    with pytest.raises(InputError, match="half.jpg"):
        train.note_broken(photos, [0, 1], [0, 2], set())


def test_photographs_of_every_size_and_kind_train_and_are_labelled(tmp_path):
    """1x1, one pixel wide, 20,000 px wide, CMYK, 16-bit, palette, turned: a run with a cache, then priors."""
    photos, exif = tmp_path / "photos", Image.Exif()
    photos.mkdir()
    exif[0x0112] = 6
    for n, size in enumerate([(1, 1), (40, 1), (1, 40), (9, 9), (1, 20_000), (30, 40)]):
        Image.fromarray(random_image(n, *size)).save(photos / f"{n}.png")
    image = Image.fromarray(random_image(9, 30, 40))
    image.convert("CMYK").save(photos / "cmyk.jpg")
    image.save(photos / "turned.jpg", exif=exif), image.quantize().save(photos / "palette.png")
    Image.fromarray(random_image(9, 30, 40)[..., 0].astype(np.uint16) * 200).save(photos / "deep.png")
    (tmp_path / "t.csv").write_text("\n".join(f"{p.name},{'dog' if i % 2 else 'cat'}" for i, p in enumerate(photos.iterdir())))
    status, err, _ = call("train", "folder", "--images", photos, "--tags", tmp_path / "t.csv", "--trunk", "tiny", "--size", 32,
                          "--steps", 2, "--batch", 4, "--head", 4, "--views", 3, "--device", "cpu", "--out", tmp_path / "o")
    assert status == 0 and (tmp_path / "o/panel.png").exists(), err
    for name, shape in (("wS1", (8, 8)), ("idx", (1, 1)), ("wS2", (1, 2))):
        (tmp_path / f"ObjNessB2W8MAXBGR.{name}.yml.gz").write_bytes(bing_matrix(*shape, 1))
    for prior in ("bb", "seg", "refine"):
        status, err, _ = call("infer", tmp_path / "o/ckpt.pt", photos, "--prior", prior, "--bing", tmp_path,
                              "--out", tmp_path / "l")
        assert status == 0 and data.read_labels(tmp_path / "l/4.png").shape == (1, 20_000), err


def test_what_cannot_be_written_is_said_before_the_first_step(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    args = ("--steps", 1, "--out", tmp_path / "file/o")
    refused(*call("train", *TOY, *args)[:2], tmp_path / "file", "check that")
    free = train.shutil.disk_usage(tmp_path)._replace(free=10 ** 5)
    monkeypatch.setattr(train.shutil, "disk_usage", lambda folder: free)
    refused(*call("train", *TOY, "--steps", 1, "--out", tmp_path / "o")[:2], tmp_path / "o", "needed", "make room")
    cache = ("--train-convs", 0, "--cache", tmp_path / "c", "--views", 1, "--steps", 1, "--head", "4", "--out", tmp_path / "o")
    refused(*call("train", *TOY, *cache)[:2], tmp_path / "o", "needed")
    monkeypatch.setattr(train.shutil, "disk_usage", lambda folder: free._replace(free=10 ** (5 if folder.name == "c" else 9)))
    refused(*call("train", *TOY, *cache)[:2], tmp_path / "c", "needed", "make room")
    assert [p.name for p in tmp_path.rglob("*") if p.is_file() and p.name != "settings.json"] == ["file"]
    monkeypatch.undo()
    status, err, _ = call("train", *TOY, *cache)
    assert status == 0, err


# ---------------------------------------------------------------- weak training sees tags only

OPENED = []
sys.addaudithook(lambda event, args: OPENED.append(str(args[0])) if event == "open" else None)


def test_weak_training_and_inference_open_no_mask(voc, tmp_path):
    """Every file that Python opens is recorded; with --masks the same record shows them, so the test can fail."""
    weights = tmp_path / "vgg.pth"
    save_vgg(weights)
    args = ("voc", "--voc", voc, "--set", "val", "--weights", weights, "--steps", 2, "--self-steps", 2, "--size", 64, "--head", "8", "--threshold-images", 2, "--device", "cpu",
            "--batch", 2, "--out", tmp_path / "o")
    OPENED.clear()
    assert call("train", *args)[0] == 0
    status, err, _ = call("infer", tmp_path / "o/ckpt.pt", "--voc", voc, "--set", "val", "--out", tmp_path / "p")
    assert status == 0, err
    assert any("JPEGImages" in p for p in OPENED) and not any("SegmentationClass" in p for p in OPENED)
    assert sorted(p.name for p in (tmp_path / "p").iterdir()) == [f"2007_00{n}.png" for n in range(4)]
    ladder = ("ladder", tmp_path / "o/ckpt.pt", "--voc", voc, "--json", tmp_path / "l.json", "--device", "cpu")
    status, err, out = call("eval_voc", *ladder)
    rows = json.loads((tmp_path / "l.json").read_text())["rows"]
    assert status == 0 and list(rows) == ["base", "ilp", "ilp+sppxl", "ilp+bb", "ilp+seg", "ilp+refine"] and "paper" in out, err
    status, err, out = call("eval_voc", *ladder, "--oracle-thresholds", "val")
    report = json.loads((tmp_path / "l.json").read_text())
    assert status == 0 and "ORACLE" in out and "oracle" in report and "ilp+bb*oracle" in report["rows"], err
    assert report["rows"]["ilp"] == rows["ilp"] and all(
        report["rows"][f"ilp+{p}*oracle"]["mean_iou_defined"] >= rows[f"ilp+{p}"]["mean_iou_defined"] - 0.5 for p in ("bb", "seg"))
    status, err, _ = call("train", *args, "--masks", voc / "SegmentationClass", "--cache", "no", "--no-jitter")
    assert status == 0 and any("SegmentationClass" in p for p in OPENED), err


def save_vgg(path):
    """A file in the public VGG16's layout, with random numbers."""
    net, n, state = model.Net("vgg16", 2), 0, {}
    convs = iter(net.trunk)
    for width in (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512):
        if width:
            layer = next(convs)
            state[f"features.{n}.weight"], state[f"features.{n}.bias"] = layer.weight.data.half(), layer.bias.data.half()
        n += 2 if width else 1
    torch.save(state, path)


# ---------------------------------------------------------------- a folder of one's own

def test_own_folder_from_tags_to_labels(tmp_path, monkeypatch):
    folder = tmp_path / "photos"
    folder.mkdir()
    for n in range(6):
        Image.fromarray(random_image(n, 40 + 9 * n, 70)).save(folder / f"{n}.jpg")
    (tmp_path / "tags.csv").write_text("file,tags\n0.jpg,zebra\n1.jpg,apple;zebra\n2.jpg,\n3.jpg,background\n4.jpg,apple\n")
    save_vgg(tmp_path / "vgg.pth")
    status, err, _ = call("train", "folder", "--images", folder, "--tags", tmp_path / "tags.csv", "--weights", tmp_path / "vgg.pth",
                          "--size", 64, "--steps", 2, "--batch", 2, "--head", "8", "--out", tmp_path / "o", "--device", "cpu")
    assert status == 0, err
    photos = data.folder_photos(folder, tmp_path / "tags.csv")
    assert photos.classes == ["background", "apple", "zebra"]
    assert photos.tags.tolist() == [[0, 0, 1], [0, 1, 1], [1, 0, 0], [1, 0, 0], [0, 1, 0]]
    status, err, out = call("infer", tmp_path / "o/ckpt.pt", folder / "5.jpg", "--soft", "--out", tmp_path / "l")
    assert status == 0 and "%" in out, err
    assert data.read_labels(tmp_path / "l/5.png").shape == (85, 70)
    assert data.load_image(tmp_path / "l/5_overlay.png").shape == (85, 70, 3)
    with np.load(tmp_path / "l/5.npz", allow_pickle=False) as soft:
        assert soft["scores"].shape == (3, 85, 70) and soft["classes"].tolist() == photos.classes
    refused(*call("infer", tmp_path / "o/ckpt.pt", folder / "5.jpg", "--dense", 7, "--out", tmp_path / "m")[:2], "must divide", "16")
    monkeypatch.setattr(infer, "MAX_BYTES", 1e5)
    refused(*call("infer", tmp_path / "o/ckpt.pt", folder / "5.jpg", "--out", tmp_path / "m")[:2], "would take about", "GB")
    assert not (tmp_path / "m").exists()


# ---------------------------------------------------------------- priors against brute force

def slow_superpixels(image, scale, sigma, min_size):
    """Felzenszwalb-Huttenlocher, every edge in stable order, dictionaries of sets; labels in raster order."""
    H, W = image.shape[:2]
    g = np.stack([ndimage.gaussian_filter(image[..., c] / 255.0, sigma) for c in range(3)], -1)
    kinds = [((0, 0), (0, 1)), ((0, 0), (1, 0)), ((0, 0), (1, 1)), ((1, 0), (0, 1))]
    edges = []
    for kind, ((py, px), (qy, qx)) in enumerate(kinds):
        for y in range(H - max(py, qy)):
            for x in range(W - max(px, qx)):
                d = g[y + qy, x + qx] - g[y + py, x + px]
                edges.append((np.sqrt(d[0] * d[0] + d[1] * d[1] + d[2] * d[2]), len(edges),
                              (y + py) * W + x + px, (y + qy) * W + x + qx))
    edges.sort()
    home, sets, inner = list(range(H * W)), {i: {i} for i in range(H * W)}, {i: 0.0 for i in range(H * W)}

    def join(a, b):
        for i in sets[b]:
            home[i] = a
        sets[a] |= sets.pop(b)
    for w, _, p, q in edges:
        a, b = home[p], home[q]
        if a != b and all(w < inner[c] + scale / 255 / len(sets[c]) for c in (a, b)):
            join(a, b)
            inner[a] = w
    for w, _, p, q in edges:
        a, b = home[p], home[q]
        if a != b and min(len(sets[a]), len(sets[b])) < min_size:
            join(a, b)
    names = {}
    return np.array([names.setdefault(h, len(names)) for h in home]).reshape(H, W)


@pytest.mark.parametrize("seed", range(24))
def test_superpixels_are_felzenszwalbs(seed):
    rng = np.random.default_rng(seed)
    levels = (2, 4, 16, 256)[seed % 4]                                    # few levels: many equal costs
    image = (rng.integers(0, levels, (*rng.integers(2, 26, 2), 3)) * (255 // (levels - 1))).astype(np.uint8)
    if seed % 3 == 0:                                                     # blobs, so that large segments form
        image = ndimage.zoom(image, (3, 3, 1), order=seed % 2)
    scale, sigma, least = rng.choice([1, 30, 100, 400]), rng.choice([0, 0.5, 1.0]), rng.choice([1, 5, 20])
    slow = slow_superpixels(image, scale, sigma, least)
    for rounds in (0, 3, 24):
        assert (infer.superpixels(image, scale, sigma, least, rounds) == slow).all()


def test_superpixels_of_thin_images():
    assert infer.superpixels(random_image(0, 1, 30)).shape == (1, 30)
    assert infer.superpixels(random_image(0, 1, 1)).tolist() == [[0]]


def test_image_level_prior_is_equation_7():
    p, q = np.random.default_rng(0).random((4, 3, 5)).astype(np.float32), np.array([0.1, 0.2, 0.3, 0.4], np.float32)
    want = {"all": p * q[:, None, None], "objects": np.array([p[0], *[p[k] * q[k] for k in (1, 2, 3)]]),
            "square": np.array([p[0], *[p[k] * q[k] ** 2 for k in (1, 2, 3)]]), "threshold": p}
    assert all(np.allclose(infer.ilp(p, q, form), want[form]) for form in infer.ILP_FORMS)


def test_overlapped_keeps_order_and_every_item():
    for ahead in (0, 1, 3):
        assert list(infer.overlapped(lambda i: i + 1, lambda i: (time.sleep(0.01 * (i % 3)), i * i)[1], range(7), ahead)) == \
            [i * i for i in range(1, 8)]


def random_parts(rng, H=13, W=17, S=9, N=12):
    labels = np.concatenate([np.arange(S), rng.integers(0, S, H * W - S)]).reshape(H, W).astype(np.int32)
    return labels, rng.random((N, S)) < 0.3, rng.random(N)


@pytest.mark.parametrize("seed", range(5))
def test_objectness_is_the_mean_score_of_covering_proposals(seed):
    rng = np.random.default_rng(seed)
    labels, segments, scores = random_parts(rng)
    (H, W), boxes = labels.shape, np.sort(rng.integers(-3, 22, (12, 2, 2)), 1).reshape(12, 4).astype(float)
    by_box, by_segment = np.zeros((H, W)), np.zeros((H, W))
    for y in range(H):
        for x in range(W):
            hit = [s for s, (a, b, c, d) in zip(scores, boxes) if a <= x < c and b <= y < d]
            by_box[y, x] = np.mean(hit) if hit else 0
            hit = scores[segments[:, labels[y, x]]]
            by_segment[y, x] = np.mean(hit) if len(hit) else 0
    assert np.allclose(infer.cover_score(scores, (H, W), boxes=boxes), by_box, atol=1e-6)
    assert np.allclose(infer.cover_score(scores, (H, W), segments=segments, labels=labels), by_segment, atol=1e-6)
    for row, box in zip(segments, infer.boxes_of(segments, labels)):
        y, x = np.nonzero(row[labels])
        assert list(box) == ([x.min(), y.min(), x.max() + 1, y.max() + 1] if len(x) else [0] * 4)


def test_votes_means_and_thresholds_equal_their_loops():
    rng = np.random.default_rng(0)
    p, guess = rng.random((4, 9, 11)).astype(np.float32), rng.integers(0, 4, (9, 11))
    regions, objectness, delta = random_parts(rng, 9, 11)[0], rng.random((9, 11)), np.array([0, 0.1, 0.2, 0.3])
    vote, labels = infer.vote(guess, regions), infer.thresholded(p, objectness, delta)
    for s in range(9):
        assert (vote[regions == s] == np.bincount(guess[regions == s]).argmax()).all()
    for y in range(9):
        for x in range(11):
            k = max((1, 2, 3), key=lambda k: p[k, y, x])
            assert labels[y, x] == (k if p[k, y, x] / p[:, y, x].sum() * objectness[y, x] > delta[k] else 0)


def test_objectness_weighs_objects_against_background():
    rng = np.random.default_rng(0)
    p, o = rng.random((3, 5, 6)).astype(np.float32), rng.random((5, 6))
    for trust in (0.5, 1):
        weighed = infer.weigh(p, o, trust)
        for y in range(5):
            for x in range(6):
                want = [p[0, y, x] * (1 - o[y, x]) ** trust] + [p[k, y, x] * o[y, x] ** trust for k in (1, 2)]
                assert np.allclose(weighed[:, y, x], np.array(want) / sum(want), atol=1e-5)
    assert np.allclose(infer.relative(o), (o - o.min()) / (o - o.min() + (o - o.min()).mean()), atol=1e-6)
    assert np.allclose(infer.relative(np.full((3, 3), 7.0)), 0.5)                          # a flat picture decides nothing
    image = np.full((80, 100, 3), 40, np.uint8)
    image[24:56, 32:72] = 220
    assert infer.saliency(image[::4, ::4])[10, 13] > 0.6 > 0.4 > infer.saliency(image[::4, ::4])[1, 1]
    p = np.full((2, 80, 100), 0.5, np.float32)                                             # scores that know nothing
    labels = infer.refine(p, image, infer.superpixels(image)).argmax(0)
    assert (labels == (image[..., 0] > 100)).mean() > 0.95


def test_pixel_adaptive_refinement_equals_its_loops():
    rng = np.random.default_rng(0)
    x, guide = rng.random((2, 9, 11)).astype(np.float32), rng.random((9, 11, 3)).astype(np.float32)
    want = x.astype(float)
    for _ in range(2):
        new = np.zeros_like(want)
        for y in range(9):
            for u in range(11):
                at = [(min(max(y + d * i, 0), 8), min(max(u + d * j, 0), 10)) for d in (1, 3)
                      for i in (-1, 0, 1) for j in (-1, 0, 1) if i or j]
                colours = np.array([guide[place] for place in at], float)
                spread = np.concatenate([colours, guide[None, y, u]]).std(0, ddof=1) + 1e-8
                weight = np.exp(-(np.abs(colours - guide[y, u]) / (0.1 * spread)).mean(1))
                new[:, y, u] = sum(v * want[(slice(None), *place)] for v, place in zip(weight / weight.sum(), at))
        want = new
    assert np.allclose(infer.pixel_adaptive(x, guide, (1, 3), 2), want, atol=1e-5)


@pytest.mark.parametrize("seed", range(4))
def test_hierarchy_equals_its_loops(seed):
    """Shortest paths by relaxation, average linkage by comparing all pairs of clusters, scores pixel by pixel."""
    image = random_image(seed, 24, 30)
    labels = infer.superpixels(image, 20, 0.5, 6)
    S, (H, W) = labels.max() + 1, labels.shape
    colour = [image[labels == s].mean(0) / 255 for s in range(S)]
    far = np.where(np.eye(S), 0.0, np.inf)
    for y in range(H):
        for x in range(W):
            for u, v in ((y + 1, x), (y, x + 1)):
                if u < H and v < W and labels[y, x] != labels[u, v]:
                    a, b = labels[y, x], labels[u, v]
                    far[a, b] = far[b, a] = np.linalg.norm(colour[a] - colour[b]) + 1e-6
    for via in range(S):
        far = np.minimum(far, far[:, via, None] + far[via])
    clusters, nodes = [{s} for s in range(S)], [{s} for s in range(S)]
    while len(clusters) > 1:
        _, i, j = min((np.mean([far[a, b] for a in clusters[i] for b in clusters[j]]), i, j)
                      for i in range(len(clusters)) for j in range(i))
        joined = clusters.pop(i) | clusters.pop(j)
        clusters.append(joined), nodes.append(joined)
    rim = {*labels[0], *labels[-1], *labels[:, 0], *labels[:, -1]}
    saliency = np.array([min(far[s, b] for b in rim) for s in range(S)])[labels]
    nodes = {frozenset(map(int, node)): saliency[np.isin(labels, list(node))].mean() for node in nodes
             if np.isin(labels, list(node)).mean() >= 0.02}
    low, high = min(nodes.values()), max(nodes.values())
    segments, scores = infer.hierarchy(labels, image, 0.02)
    got = {frozenset(np.flatnonzero(row).tolist()): score for row, score in zip(segments, scores)}
    assert len(segments) == len(nodes) > 5 and got.keys() == nodes.keys() and (np.diff(scores) <= 0).all()
    assert all(np.isclose(got[node], (value - low) / (high - low)) for node, value in nodes.items())


def test_hierarchy_finds_the_object():
    image = np.full((40, 60, 3), 30, np.uint8)
    image[10:30, 20:45], image[10:30, 32:45] = (200, 60, 40), (190, 70, 45)                # two similar halves
    labels = np.arange(6)[np.minimum(np.arange(60) // 20, 2)] + 3 * (np.arange(40) >= 20)[:, None]
    labels = np.where(image[..., 0] > 195, 6, np.where(image[..., 0] > 100, 7, labels)).astype(np.int32)
    segments, scores = infer.hierarchy(labels, image)
    at = [i for i, s in enumerate(segments) if (s == np.isin(np.arange(8), [6, 7])).all()]
    assert at and scores[at[0]] > 0.9 and scores.min() == 0 and scores.max() == 1 and (np.diff(scores) <= 0).all()
    for row in segments:
        assert ndimage.label(row[labels])[1] == 1
        assert all((row & other).sum() in (0, row.sum(), other.sum()) for other in segments)
    for name, o in infer.Scene(image).objectness.items():
        assert o.min() < 1e-6 and o.max() < 1 and o[20, 38] > 0.6 and o[2, 2] < 0.3, name
    assert [len(x) for x in infer.hierarchy(np.zeros((4, 5), np.int32), image[:4, :5])] == [1, 1]       # one superpixel


def test_spread_peaks_are_those_of_a_greedy_loop():
    score, kept = np.random.default_rng(0).random((20, 30)), []
    for i in np.argsort(-score.ravel()):
        y, x = divmod(int(i), 30)
        if all(max(abs(y - v), abs(x - u)) > 2 for v, u in kept):
            kept.append((y, x))
    assert sorted(infer.spread_peaks(score)) == sorted(y * 30 + x for y, x in kept)


def test_normed_gradient_equals_its_loop():
    x = random_image(0, 9, 11).astype(int)
    got = infer.normed_gradient(x.astype(np.uint8))
    for i in range(9):
        for j in range(11):
            up, down, left, right = max(i - 1, 0), min(i + 1, 8), max(j - 1, 0), min(j + 1, 10)
            gx = abs(x[i, right] - x[i, left]).max() * (2 if right - left == 1 else 1)
            gy = abs(x[down, j] - x[up, j]).max() * (2 if down - up == 1 else 1)
            assert got[i, j] == min(gx + gy, 255)


def test_mcg_files(tmp_path):
    labels, segments, scores = random_parts(np.random.default_rng(0))
    segments[0] = False                                                     # an empty candidate
    cells = np.empty((len(scores), 1), object)
    for i, row in enumerate(segments):
        cells[i, 0] = (np.flatnonzero(row) + 1).astype(np.uint16)[None]
    good, path = dict(superpixels=(labels + 1).astype(np.uint16), labels=cells, scores=scores[:, None]), tmp_path / "a.mat"
    scipy.io.savemat(path, good)
    regions, read, values = infer.read_mcg(path)
    assert (regions == labels).all() and (read == segments).all() and (np.argsort(values) == np.argsort(scores)).all()
    over = cells.copy()
    over[1, 0] = np.array([[99]])
    for bad in (dict(scores=None), dict(scores=scores[:3, None]), dict(labels=over), dict(superpixels=labels)):
        scipy.io.savemat(path, {k: v for k, v in {**good, **bad}.items() if v is not None})
        with pytest.raises(InputError, match="a.mat"):
            infer.read_mcg(path)
    for junk in (b"", b"no mat file"):
        path.write_bytes(junk)
        with pytest.raises(InputError, match="a.mat"):
            infer.read_mcg(path)


def test_thresholds_equal_a_search(monkeypatch):
    """Without shrinking, no multiple of 1/50 gives a class a better IoU; with a huge one, all classes share the best mean."""
    rng, K, steps = np.random.default_rng(0), 4, 50
    scenes = [infer.Scene(random_image(i, 20, 24)) for i in range(5)]
    masks = [rng.choice([0, 1, 2, 3, 255], p=[.4, .2, .2, .1, .1], size=(20, 24)).astype(np.uint8) for _ in scenes]
    outputs = []
    for mask in masks:
        p = torch.from_numpy(rng.normal(size=(K, 20, 24)) + 1.5 * (np.arange(K)[:, None, None] == mask)).softmax(0)
        outputs.append((p.numpy().astype(np.float32), np.array([0.4, 0.9, 0.5, 0.7], np.float32)))

    def fit(labels, **options):
        feed = iter(outputs)
        monkeypatch.setattr(infer, "predict", lambda *_: next(feed))
        return eval_voc.fit_thresholds(None, zip(scenes, labels), steps=steps, **options)

    def iou(labels, prior, delta):
        """(K,) of v >= delta, counted over all images."""
        both = either = np.zeros(K)
        for scene, truth, (p, q) in zip(scenes, labels, outputs):
            v = infer.ilp(p, q)[1:] / infer.ilp(p, q).sum(0) * scene.objectness[prior]
            drawn, keep = np.where(v.max(0) >= delta, v.argmax(0) + 1, 0), truth != 255
            # v.argmax is p's wherever objectness is not 0
            both = both + [((drawn == k) & (truth == k) & keep).sum() for k in range(K)]
            either = either + [(((drawn == k) | (truth == k)) & keep).sum() for k in range(K)]
        return both / np.maximum(either, 1)
    for labels in (masks, [infer.refine(p * np.array([1, 1, 0, 1])[:, None, None], s.image, s.regions).argmax(0)
                           for s, (p, q) in zip(scenes, outputs)]):
        for prior in ("bb", "seg"):
            table = np.array([iou(labels, prior, (i + 1e-9) / steps) for i in range(1, steps)])    # (steps - 1, K)
            given = masks if labels is masks else [[0, 1, 0, 1]] * 5
            alone, shared = fit(given, shrink=1e-9)[prior], fit(given, shrink=1e9)[prior]
            assert alone[0] == 0 and len(set(shared[1:])) == 1
            for k in ((1, 2, 3) if labels is masks else (1, 3)):
                i = max(1, round(alone[k] * steps))
                assert np.isclose(table[i - 1, k], table[:, k].max(), atol=0.01), (prior, k)
            i = max(1, round(shared[1] * steps))
            assert np.isclose(table[i - 1, 1:].mean(), table[:, 1:].mean(1).max(), atol=0.01)


def test_seeds_keep_to_the_tags():
    rng = torch.Generator().manual_seed(0)
    scores, features = torch.randn(5, 8, 9, generator=rng), torch.rand(16, 8, 9, generator=rng)
    image = torch.from_numpy(random_image(0, 72, 72)).permute(2, 0, 1)
    labels = infer.seeds(scores, features, torch.tensor([2, 4]), image)
    assert labels.shape == (32, 36) and set(np.unique(labels)) <= {0, 2, 4, 255} and {2, 4} & set(np.unique(labels))


# ---------------------------------------------------------------- ImageNet and the paper's preset

def test_wnid_table():
    table = {wnid: data.VOC_CLASSES[k] for wnid, k in data.read_synsets(data.SYNSETS).items()}
    assert [table.get(w) for w in ("n02123045", "n02099601", "n02403003", "n01440764", "n04344873")] == \
        ["cat", "dog", "cow", None, "sofa"]
    counts = [list(table.values()).count(name) for name in data.VOC_CLASSES]
    assert counts == [551, 2, 2, 59, 12, 4, 3, 9, 5, 4, 1, 1, 118, 1, 2, 3, 1, 1, 1, 5, 3]


@pytest.mark.skipif(not IMAGENET.exists(), reason="no ../shared: the wnid table is not counted on real folders")
def test_wnid_table_on_all_ilsvrc_classes():
    photos = data.imagenet_photos(IMAGENET)
    assert {p.parent.name for p in photos.paths} == set(data.read_synsets(data.SYNSETS))
    assert len(list(IMAGENET.glob("n*"))) == 1000 and (photos.tags.sum(1) == 1).all()


def test_paper_preset_takes_a_few_steps(overfeat_file, tmp_path):
    name, weights, _ = overfeat_file
    for n, wnid in enumerate(("n02123045", "n02099601", "n99999999")):
        (tmp_path / "net" / wnid).mkdir(parents=True)
        Image.fromarray(random_image(n, 90, 130)).save(tmp_path / "net" / wnid / "a.JPEG")
    (tmp_path / "synsets.csv").write_text("n02123045,cat\nn02099601,dog\nn99999999,background\n")
    args = ("paper", "--imagenet", tmp_path / "net", "--synsets", tmp_path / "synsets.csv", "--weights", weights, "--trunk", name,
            "--steps", 2, "--batch", 2, "--workers", 0, "--head", "16,8", "--threshold-images", 1, "--device", "cpu",
            "--out", tmp_path / "o")
    status, err, _ = call("train", *args)
    assert status == 0, err
    settings = json.loads((tmp_path / "o/settings.json").read_text())
    assert (settings["lr"], settings["momentum"], settings["weight_decay"], settings["dropout"], settings["size"], settings["r"],
            settings["optimizer"], settings["schedule"]) == (1e-3, 0.9, 5e-5, 0.5, 400, 5.0, "sgd", "steps")
    assert train.PRESETS["paper"].get("batch", train.Settings().batch) == 16
    paper = train.Settings(**train.PRESETS["paper"])
    rates = [train.learning_rate(paper, step, 0, 10 ** 6) for step in (0, 312_499, 312_500, 625_000)]
    assert rates == pytest.approx([1e-3, 1e-3, 8e-4, 6.4e-4])
    ckpt = infer.read_checkpoint(tmp_path / "o/ckpt.pt")
    assert not any(k.startswith("trunk.") for k in ckpt["model"])             # OverFeat's licence: never stored
    if name == "overfeat":
        status, err, _ = call("infer", tmp_path / "o/ckpt.pt", tmp_path / "net/n02123045/a.JPEG", "--weights", weights, "--dense", 2,
                              "--out", tmp_path / "l", "--device", "cpu")
        assert status == 0 and data.read_labels(tmp_path / "l/a.png").shape == (90, 130), err


# ---------------------------------------------------------------- malformed inputs, each refused in one line

GO = ("--trunk tiny --device cpu --steps 1 --batch 2 --head 4 --size 32 --self-steps 0 --threshold-images 1 --voc VOC --set b "
      "--out")
LABEL = "infer toy.pt photo.png --device cpu --out out"
WRONG_FLAGS = {                                    # command: what is added to it, one of these at a time
    f"train toy {GO} out --toy-images 2": "--batch 0|--lr nan|--lr -1|--lr inf|--r 0|--r x|--dropout 2|--momentum 1|--lo 1|"
    "--seed -1|--weight-decay -1|--seed 99999999999999999999|--train-convs 9|--train-convs -2|--device no|--device cuda:99|"
    "--device meta|--device cpu:x|--head 0|--head x|--head 1,,2|--head ²|--head 9999999999|--kernel ,|--kernel=|--kernel 99|"
    "--size 4|--sides 0|--sides 3,x|--dense 0|--dense 3|--steps 0|--balance nan|--trunk no|--aggregation no|--views 0|"
    "--workers -1|--no 1|--masks x|--resume|--toy-images 0|--toy-scenes 0|--self-rounds -1|--self-steps 1|--limit -1",
    LABEL: "--dense 0|--dense 3|--dense -1|--device no|--prior no|--voc VOC|--set|photo.png|no.jpg|VOC/ImageSets",
    "eval_voc ladder toy.pt --voc VOC --json out --set b": "--sides x|--sides 9,-1|--limit -1|--limit x|--dense 3|--device no|--set no|"
    "--oracle-thresholds no|--set ../b|--set ..|--set=|--set /etc/passwd|--set a/b",
    "infer": " |no.pt photo.png|. photo.png|toy.pt",
    "eval_voc": " |pack|submit masks --voc no --out out", "model": "no|--no", "data": "--imagenet no|--no"}


def malformed(path):
    """Rows (command, file, contents, each of which is refused): bytes, text, or a value for torch.save or savemat."""
    toy, run = torch.load(path / "toy.pt", weights_only=True), (path / "toy.pt").read_bytes()
    tensor, rng, array = toy["model"]["head.0.weight"], np.random.default_rng(0), io.BytesIO()
    junk, png = [b"", b"hello", bytes(range(256)) * 9, bytes(3000), b"a\0b,cat\n"], (path / "photo.png").read_bytes()
    pictures = [*junk, *(png[:n] for n in (1, 8, 20, 33, 40, 60, len(png) // 2, len(png) - 40)),
                *(png[:n] + bytes([png[n] ^ 0x55]) + png[n + 1:] for n in (1, 13, 17, 20, 24, 25, 28, 60)),
                *(png[:16] + bytes([0, 0, side, 99]) * 2 + png[24:] for side in (99, 120))]                   # bombs
    for kind in ("JPEG", "GIF", "TIFF", "BMP", "WEBP", "PPM"):
        buffer = io.BytesIO()
        Image.fromarray(random_image(0, 24, 30)).save(buffer, kind)
        pictures += [buffer.getvalue()[:12], buffer.getvalue()[:len(buffer.getvalue()) // 2]]
    mask = (path / "masks/b.png").read_bytes()
    masks = [*junk, mask[:len(mask) // 2], png, mask.replace(b"PLTE", b"pLTE"), mask.replace(b"PLTE\0\0\0", b"PLTE\0\0\1")]
    ids = ["", "..", "../..", "a\na", "a\0b", "a:b", "x\\y", "no", "/etc/..", b"\xff", "../../x", "/etc/x", "y" * 999]
    yield LABEL.replace("photo", "x"), "x.png", pictures
    yield "eval_voc ladder toy.pt --voc VOC --set b --json out", "VOC/JPEGImages/b.jpg", junk
    yield "eval_voc submit masks --voc VOC --set b --out out", "VOC/JPEGImages/b.jpg", junk
    for cache in ("no", "c"):
        yield f"train voc {GO} out --cache {cache}", "VOC/JPEGImages/b.jpg", pictures[:14]
    yield f"train voc {GO} out --masks masks", "masks/b.png", masks
    yield "eval_voc submit masks --voc VOC --set b --out out", "masks/b.png", masks
    for file in ("masks/b.png", "VOC/SegmentationClass/b.png"):
        yield "eval_voc score masks --voc VOC --set b --json out", file, masks
    yield "eval_voc score masks --voc VOC --set b --json out --classes n.txt", "n.txt", ["a", "a\na", "a\n" * 300, b"\xff", ""]
    yield "eval_voc submit masks --voc VOC --set bad --out out", "VOC/ImageSets/Segmentation/bad.txt", ids
    yield "infer toy.pt --voc VOC --set bad --out out", "VOC/ImageSets/Segmentation/bad.txt", ids
    yield f"train voc {GO} out --set bad", "VOC/ImageSets/Main/bad.txt", ids
    yield f"train voc {GO} out", "VOC/ImageSets/Main/cat_b.txt", ["b 7", "b", b"\xff"]
    entities = "".join(f'<!ENTITY e{i} "{f"&e{i - 1};" * 10}">' for i in range(9))
    yield f"train voc {GO} out --set new", "VOC/Annotations/new.xml", [
        *junk, "<annotation>", "<a/>", "<annotation><object></annotation>",
        f"<!DOCTYPE a [{entities}]><annotation>&e8;</annotation>",
        *(f"<?xml version='1.0' encoding='{e}'?><annotation/>" for e in ("no", "shift_jis"))]
    yield f"train folder {GO} out --images VOC/JPEGImages --tags t.csv", "t.csv", [
        *junk, "b.jpg", "b.jpg,cat,dog", "no.jpg,cat", "../../x.jpg,cat", f"{path}/x.jpg,cat", ".,cat", ",cat",
        "b.jpg,", "file,tags", '"b.jpg,cat', "a\0b.jpg,cat", "y" * 140_000 + ",cat", "b.jpg," + ";".join(map(str, range(300)))]
    yield f"train paper {GO} out --imagenet . --synsets s.csv", "s.csv", [*junk[1:4], "n1", "n1,emu", "n1,cat,dog", "n1,cat\nn"]

    changes = [{k: v} for k in toy if k not in ("optimizer", "step") for v in (None, 7.5, "x", [[]], {1: 2}, torch.zeros(2))]
    changes += [dict(format=2), dict(classes=["a", "a", "b"]), dict(thresholds={"bb": [0.0]})]
    changes += [{"settings": {**toy["settings"], k: v}} for v in (None, "x", [1])
                for k in ("trunk", "head", "kernel", "aggregation", "r", "dropout", "sides", "dense")]
    changes += [{"settings": {**toy["settings"], "r": v}} for v in (0, -1, math.nan, math.inf)]
    changes += [{"model": {**toy["model"], "head.0.weight": v}} for v in (
        None, tensor[:2], tensor * math.nan, tensor.to(torch.complex64), 3, tensor.tolist())]
    cuts = [run[:n] for n in (*rng.integers(0, len(run), 16), len(run) - 1, len(run) - 22)]
    yield LABEL.replace("toy", "bad"), "bad.pt", [*junk, *cuts, [1], torch.zeros(3), 3, {}, *({**toy, **c} for c in changes),
                                                  *({j: v for j, v in toy.items() if j != k} for k in toy)]
    yield f"train voc {GO} run --resume --steps 2", "run/ckpt.pt", [*cuts[:3], *({**toy, **bad} for bad in (
        dict(optimizer={}), dict(optimizer={"state": {}, "param_groups": []}), dict(pending=["x"]), dict(step="x"),
        dict(settings={}), dict(optimizer={**toy["optimizer"], "state": {0: {"exp_avg": torch.zeros(7)}}}),
        dict(model={"head.0.weight": tensor[:1]})))]
    yield f"train voc {GO} out --trunk vgg16 --size 96 --weights w.pt", "w.pt", [
        *junk, *({key: 1} for key in ("features.0.weight", "features.x.weight", "features..weight", 1)), [], 3]
    yield f"train voc {GO} out --trunk overfeat-fast --size 96 --weights w.pt", "w.pt", junk
    for part in ("wS1", "idx", "wS2"):
        yield LABEL + " --prior bb --bing bing", f"bing/ObjNessB2W8MAXBGR.{part}.yml.gz", [
            *junk, gzip.compress(b"\xff"), *(bing_matrix(*m) for m in ((9, 9), (2, 2, "x"), (2, 2, "nan"), (3, 2, 99)))]
    good = dict(superpixels=np.ones((24, 30)), labels=np.array([[np.ones(1)]], object), scores=np.ones((1, 1)))
    yield LABEL + " --prior seg --mcg .", "photo.mat", [*junk, *({**good, k: v} for k, v in [
        *((k, "x") for k in good), *(("superpixels", np.full((24, 30), v)) for v in (0, 2.0 ** 40, math.nan, 2.5)),
        ("superpixels", np.ones((9, 9))), ("scores", np.full((1, 1), math.nan)), ("scores", np.ones((0, 1)))])]
    state, features = ((path / "run/cache" / n).read_bytes() for n in ("cache.json", "features.npy"))
    np.save(array, np.zeros((1, 2), np.float16))
    yield f"train voc {GO} out --cache run/cache", "run/cache/cache.json", [
        *junk, "[]", "3", "{}", '{"key": 1, "done": 1}', state.replace(b"tiny", b"no"),
        *(state.replace(b'"done": 1', b'"done": ' + v) for v in (b"9", b"0", b'"x"', b"true"))]
    yield f"train voc {GO} out --cache run/cache", "run/cache/features.npy", [
        *junk, features[:50], features[:-9], array.getvalue(), *(features.replace(b"'<f2'", t) for t in (b"'<i2'", b"'|O' "))]


def bing_matrix(rows, cols, value=0):
    return gzip.compress(f"rows: {rows}\ncols: {cols}\ndata: [{','.join([str(value)] * rows * cols)}]".encode())


def test_malformed_inputs_are_refused_in_one_line_and_leave_nothing(tmp_path):
    """Whatever file or flag is wrong: one line with its name and the remedy, status 2, nothing written or read elsewhere."""
    path, wrong, count = tmp_path / "at/some/depth", [], 0
    for name in ("new", "b"):
        voc = make_voc(path / "VOC", {name: np.full((24, 30), 12, np.uint8)}, name)
    for file in (voc / "ImageSets/Main").glob("*_new.txt"):
        file.unlink()
    data.save_labels(path / "masks/b.png", np.full((24, 30), 12))
    for file in (path / "x.jpg", path / "photo.png", path / "n1/x.png", path / "bing/x.png"):
        file.parent.mkdir(exist_ok=True)
        Image.fromarray(random_image(0, 24, 30)).save(file, "png")
    for part, shape in dict(wS1=(8, 8), idx=(2, 1), wS2=(2, 2)).items():
        (path / f"bing/ObjNessB2W8MAXBGR.{part}.yml.gz").write_bytes(bing_matrix(*shape))
    assert call(*f"train voc {GO} run".split(), cwd=path)[0] == 0
    (path / "toy.pt").write_bytes((path / "run/ckpt.pt").read_bytes())
    tree = lambda: {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()}

    def check(command, word=""):
        before = tree()
        OPENED.clear()
        try:
            status, err, _ = call(*command.split(), cwd=path)
            refused(status, err, word)
            assert any(sign in err for sign in (";", "expected", "--help", "must", "needed")), f"no remedy: {err}"
            new = {p for p, time in tree().items() if before.get(p) != time}       # broken photographs stop a begun run
            assert not {p for p in new if p.name not in ("settings.json", "log.csv", "features.npy")}, new
            assert str(path / "x.jpg") not in {os.path.normpath(path / p) for p in OPENED}, "reads outside its folder"
        except (Exception, AssertionError) as e:
            wrong.append(f"{command} [{word}]: {type(e).__name__} {str(e)[:300]}")
    for command, name, contents in malformed(path):
        file = path / name
        file.parent.mkdir(exist_ok=True)
        before = file.read_bytes() if file.exists() else None
        for count, content in enumerate(contents, count + 1):
            if isinstance(content, (bytes, str)):
                file.write_bytes(content if isinstance(content, bytes) else content.encode())
            else:
                scipy.io.savemat(file, content) if file.suffix == ".mat" else torch.save(content, file)
            check(command, "" if "ImageSets" in name else "bing" if "bing" in name else file.stem)
        file.unlink() if before is None else file.write_bytes(before)
    for command, flags in WRONG_FLAGS.items():
        for count, flag in enumerate(flags.split("|"), count + 1):
            check(f"{command} {flag}")
    assert count >= 450 and not wrong, f"{len(wrong)} of {count}:\n" + "\n".join(wrong)


# ---------------------------------------------------------------- the README

def test_the_readmes_lesson_and_forks_run(tmp_path):
    """The three diffs, applied to a copy of the scripts, train and label; the lesson prints the tags of its scene."""
    text = (HERE / "README.md").read_text()
    for script in HERE.glob("*.py"):
        (tmp_path / script.name).write_text(script.read_text())
    for diff in re.findall(r"```diff\n(.*?)```", text, re.S):
        assert sum(line[0] in "+-" for line in diff.splitlines()) <= 10
        name = re.search(r"\+\+\+ b/(\S+)", diff)[1]
        old = "".join(line[1:] for line in diff.splitlines(True)[3:] if line[0] != "+")
        new = "".join(line[1:] for line in diff.splitlines(True)[3:] if line[0] != "-")
        code = (tmp_path / name).read_text()
        assert code.count(old) == 1, diff
        (tmp_path / name).write_text(code.replace(old, new))
    run = functools.partial(subprocess.run, cwd=tmp_path, check=True, capture_output=True, text=True)
    out = run([sys.executable, "train.py", *map(str, TOY), "--steps", "2", "--aggregation", "top10", "--trunk", "wide"]).stdout
    assert "ilp+median" in out
    lesson = re.search(r"```python\n(.*?)```", text, re.S)[1]
    run([sys.executable, "train.py", *map(str, TOY), "--steps", "2"])
    assert "speckle" in run([sys.executable, "-c", lesson]).stdout


def test_readme_commands_run_as_written(tmp_path, voc):
    """Every command but the two set-up lines (.ci/run runs those) and torchrun, in order, on tiny data under the README's names."""
    for n, wnid in enumerate(("n01443537", "n01484850", "n01491361", "n01494475")):              # fish: background
        (tmp_path / "imagenet" / wnid).mkdir(parents=True)
        Image.fromarray(random_image(n, 60, 70)).save(tmp_path / "imagenet" / wnid / "x.JPEG")
        (tmp_path / "photos").mkdir(exist_ok=True)
        Image.fromarray(random_image(n, 70, 60)).save(tmp_path / f"photos/{n}.jpg")
    (tmp_path / "tags.csv").write_text("0.jpg,cat\n1.jpg,cat;dog\n2.jpg,dog\n3.jpg,\n")
    save_vgg(tmp_path / "vgg16_features.pth")
    with open(tmp_path / "net_weight_1", "wb") as file:
        file.truncate(578_625_952)
    masks = {p.stem: data.read_labels(p) for p in (voc / "SegmentationClass").iterdir()}
    for name in ("train", "test"):
        make_voc(voc, {f"{name}_{i}": m for i, m in masks.items()}, name)
    (tmp_path / "VOCdevkit").mkdir()
    (tmp_path / "assets").symlink_to(HERE / "assets")
    voc.rename(tmp_path / "VOCdevkit/VOC2012")
    small = {"toy": "--toy-images 8 --toy-scenes 1 --batch 4", "voc": "--size 64 --head 8 --self-rounds 1 --self-steps 1 --batch 4",
             "folder": "--size 64 --head 8 --batch 2", "paper": "--batch 1 --head 8 --workers 0"}
    commands = [line.split("  #")[0].split() for line in (HERE / "README.md").read_text().splitlines() if line.startswith("python ")]
    assert len(commands) >= 12
    for _, script, *args in commands:
        if script == "train.py":
            preset = args[0] if args and args[0] in train.PRESETS else "toy"
            args += [*small[preset].split(), "--steps", "1", "--threshold-images", "1", "--device", "cpu"]
        status, err, _ = call(script[:-3], *args, cwd=tmp_path)
        assert status == 0, (script, args, err)
    assert (tmp_path / "results.tgz").exists() and (tmp_path / "out/voc/ladder.json").exists()
