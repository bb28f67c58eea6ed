"""python -m pytest -q test_model.py: comparisons with independent computations, and the README's commands as written."""
import functools
import gzip
import io
import json
import math
import os
import re
import subprocess
import sys
import tarfile
import time
from itertools import product
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
SHARED = HERE.parent / "shared"
TOY = "toy --toy-images 24 --toy-scenes 1 --threshold-images 2 --batch 4 --log-every 2 --schedule steps --device cpu"
GO = "--trunk tiny --size 32 --head 4 --batch 2 --steps 1 --self-steps 0 --threshold-images 1 --device cpu"
OPENED = []                                                                # every file that Python opens
sys.addaudithook(lambda event, args: OPENED.append(str(args[0])) if event == "open" else None)
torch.set_num_threads(2)
pytestmark = pytest.mark.filterwarnings("error")


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    """Every test starts in an empty folder of its own and draws the same numbers every time."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)


def ok(command, status=0):
    """Run "script arguments..." in this process, which has to end with this status; what it printed (or wrote to stderr)."""
    (script, *args), out, err = command.split(), io.StringIO(), io.StringIO()
    with mock.patch.multiple(sys, argv=[f"{script}.py", *args], stdout=out, stderr=err), pytest.raises(SystemExit) as end:
        data.run_cli(sys.modules[script].main)
    assert (end.value.code or 0) == status, (err.getvalue(), command)
    return (err if status else out).getvalue()


def refused(command, *words):
    """The one line on stderr, holding these words, of a command that has to end with status 2."""
    err = ok(command, status=2)
    assert err.count("\n") == 1 and all(word in err for word in words), (err, command)
    return err


def random_image(seed, height, width):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def photo(path, seed=0, height=24, width=30, kind=None):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(random_image(seed, height, width)).save(path, kind)


def test_geometry_is_the_papers_and_what_the_net_sees():
    trunk, head = model.TRUNKS["overfeat"].rows, [model.conv(k, 3) for k in (1024, 768, 512, 21)]
    rows, lines = trunk + head, model.table(trunk + head, 400)
    assert model.out_size(400, trunk) == 29 and model.out_size(231, model.TRUNKS["overfeat-fast"].rows) == 12
    assert [model.out_size(n, rows) for n in (388, 389, 400, 401)] == [20, 21, 21, 22] and model.geometry(rows) == (12, 245, 74)
    assert [line["cells"] for line in lines] == [197, 65, 59, 29, 29, 29, 29, 29, 27, 25, 23, 21]
    parameters = [line["parameters"] for line in lines]
    assert sum(parameters[:8]) == 18_916_480 and parameters[8:] == [9_438_208, 7_078_656, 3_539_456, 96_789]
    assert sum(line["GFLOPs"] for line in lines[:8]) == pytest.approx(39.2, abs=0.2)
    for trunk, n in product(model.TRUNKS.values(), (*range(1, 40), 333, 375, 500)):
        rows = trunk.rows + [model.conv(8, 3), model.conv(3, 3)]
        left, right, cells, offset = model.centring(n, rows)
        assert cells == math.ceil(n / model.geometry(rows)[0]) and offset in (0, 0.5)
        assert model.out_size(n + left + right, rows) >= cells > model.out_size(n + left + right - 1, rows) or right == 0
    net = model.Net("tiny", classes=2, head=[8]).double()
    for p in net.parameters():
        p.data.abs_()                                                      # no unit is dead
    stride, field, centre = model.geometry(net.rows)
    x = torch.full((1, 3, 99, 99), 128.0, dtype=torch.double, requires_grad=True)
    net.run(x, net.rows, [*net.trunk, *net.head])[0, :, 5, 5].sum().backward()
    seen = torch.where(x.grad.abs().sum((0, 1, 2)) > 0)[0] - (centre + 5 * stride)
    assert -(field - 1) / 2 <= seen.min() and seen.max() <= (field - 1) / 2


SLOW_OVERFEAT = {  # bytes; layers (out, in, kernel, stride, pad), or the side of a pool: from section 6, not from model.py
    "overfeat": (578_625_952, [(96, 3, 7, 2, 0), 3, (256, 96, 7, 1, 0), 2, (512, 256, 3, 1, 1), (512, 512, 3, 1, 1),
                               (1024, 512, 3, 1, 1), (1024, 1024, 3, 1, 1)]),
    "overfeat-fast": (583_683_488, [(96, 3, 11, 4, 0), 2, (256, 96, 5, 1, 0), 2, (512, 256, 3, 1, 1), (1024, 512, 3, 1, 1),
                                    (1024, 1024, 3, 1, 1)])}


@pytest.mark.parametrize("name, other", [("overfeat", "overfeat-fast"), ("overfeat-fast", "overfeat")])
def test_overfeat_file_loads_as_a_slow_numpy_net(name, other):
    """A sparse file of the official size that begins with random weights in the official order; wrong ones are named."""
    def each_window(f, x, kernel, stride):                                 # x (D, h, w) -> (values of f, h', w')
        h, w = (range(0, n - kernel + 1, stride) for n in x.shape[1:])
        return np.stack([f(x[:, i:i + kernel, j:j + kernel]) for i, j in product(h, w)], 1).reshape(-1, len(h), len(w))
    (size, layers), rng, values, net = SLOW_OVERFEAT[name], np.random.default_rng(0), [], model.Net(name)
    for out, channels, k, *_ in (layer for layer in layers if layer not in (2, 3)):
        fan_in = channels * k * k
        values += [rng.normal(0, math.sqrt(2 / fan_in), out * fan_in), rng.normal(0, 0.1, out)]
    values = np.concatenate(values).astype("<f4")
    assert name != "overfeat" or values.nbytes == 75_665_920
    for file, content in dict(whole=values, short=values[:-1], nan=np.append(np.float32("nan"), values[1:])).items():
        content.tofile(file)
    os.truncate("whole", size)
    for trunk, words in ((other, f"whole: .* bytes, but.*--trunk {name}"), (name, f"short: .*{values.nbytes - 4:,} bytes"),
                         (name, "nan: .*NaN or Inf")):
        with pytest.raises(ValueError, match=words):
            model.load_trunk(model.Net(trunk), trunk, words.split(":")[0])
    model.load_trunk(net, name, "whole")
    trunk, image = iter(net.trunk), random_image(1, 117, 129).transpose(2, 0, 1)
    slow, fast = (image.astype(np.float64) - 118.380948) / 61.896913, net.normalise(torch.from_numpy(image)[None])
    for layer, row in zip(layers, net.spec.rows, strict=True):
        if layer in (2, 3):
            slow, convs = each_window(lambda window: window.max((1, 2)), slow, layer, layer), []
        else:
            out, channels, k, stride, pad = layer
            weight, bias, values = np.split(values, [out * channels * k * k, out * channels * k * k + out])
            weight, slow = weight.reshape(out, -1).astype(np.float64), np.pad(slow, ((0, 0), (pad, pad), (pad, pad)))
            slow = np.maximum(each_window(lambda window: weight @ window.ravel() + bias, slow, k, stride), 0)
            convs = [next(trunk)]
        with torch.no_grad():
            fast = net.run(fast, [row], convs)
        assert np.abs(fast[0].numpy() - slow).max() <= 1e-4 * np.abs(slow).max(), layer


@pytest.mark.parametrize("trunk, factors", [("overfeat", (2, 3, 4, 6, 12)), ("overfeat-fast", (2, 4, 8, 16)), ("tiny", (2, 4))])
@torch.no_grad()
def test_dense_equals_shift_and_stitch(trunk, factors):
    """On odd sizes, borders included, in float64, with narrow layers in the place of the wide ones."""
    rows = [r._replace(out=min(r.out, 6)) for r in model.TRUNKS[trunk].rows] + [model.conv(5, 3), model.conv(3, 3)]
    layers = [row for row in rows if row.kind == "conv"]
    convs = [torch.nn.Conv2d(before, row.out, row.kernel, dtype=torch.double)
             for before, row in zip([3, *(row.out for row in layers)], layers)]
    net, x = model.Net("tiny", 2), torch.randn(1, 3, 317, 291, dtype=torch.double)
    for factor in factors:
        step, fast = model.geometry(rows)[0] // factor, net.run(x, model.dense_rows(rows, factor), convs)
        slow = torch.full_like(fast, math.nan)
        for dy, dx in product(range(factor), repeat=2):
            slow[:, :, dy::factor, dx::factor] = net.run(x[:, :, dy * step:, dx * step:], rows, convs)
        assert (fast - slow).abs().max() < 1e-12                           # NaN is not below


def test_upsampling_is_bilinear_between_cell_centres():
    scores, ramp = torch.tensor([[[[0.0, 4.0, 12.0]]]]), torch.arange(40.0)                # cells on pixels 0.5, 4.5, 8.5
    up, back = model.upsample(scores, (1, 12), 4, 0.5), model.upsample(ramp[None, None, None, :20], (1, 40), 1, 0, seen=(1, 20))
    assert torch.allclose(up, torch.tensor([0, 0.5, 1.5, 2.5, 3.5, 5, 7, 9, 11, 12, 12, 12]))
    assert torch.allclose(back, (ramp / 2 - 0.25).clamp(0, 19))


@pytest.mark.parametrize("name", model.AGGREGATIONS)
def test_aggregation_values_and_gradients(name):
    s, f = torch.randn(2, 3, 5, 7, dtype=torch.double, requires_grad=True), model.AGGREGATIONS[name]
    assert torch.autograd.gradcheck(lambda s: f(s, 5.0), s)                # finite differences in float64
    assert torch.allclose(f(s[:, :, :1, :1], 5.0), s[:, :, 0, 0])
    if name == "lse":
        assert torch.allclose(f(s, 5.0), (5 * s).exp().mean((2, 3)).log() / 5)             # Eq. 6 as it is written
        assert torch.allclose(f(s, 1e4), s.amax((2, 3)), atol=1e-3) and torch.allclose(f(s, 1e-6), s.mean((2, 3)), atol=1e-5)
        assert all(torch.allclose(f(torch.full((1, 1, 9, 9), big), 5.0), torch.tensor(big)) for big in (1e4, -1e4))


def test_loss_is_the_likelihood_of_the_tags():
    s, tags = torch.randn(4, 5), torch.eye(5)[[0, 2, 4, 1]]
    log_p, p = s - s.exp().sum(1, keepdim=True).log(), 1 / (1 + (-s).exp())
    assert model.tag_loss(s, tags).item() == pytest.approx(-log_p[range(4), [0, 2, 4, 1]].mean().item())
    tags[1, 3] = 1                                                         # two tags share one image's target
    assert model.tag_loss(s[1:2], tags[1:2]).item() == pytest.approx(-(log_p[1, 2] + log_p[1, 3]).item() / 2)
    assert torch.isclose(model.tag_loss(s, tags, "sigmoid"), -torch.where(tags > 0, p, 1 - p).log().mean(), rtol=1e-5)


@pytest.mark.parametrize("train_convs, frozen", [(0, 3), (1, 2), (-1, 0)])
def test_frozen_means_frozen(train_convs, frozen):
    net, image = model.Net("tiny", 4, [8], train_convs=train_convs).train(), torch.ones(1, 3, 96, 96)
    features, before = net.frozen(image), {k: v.clone() for k, v in net.state_dict().items()}
    assert torch.equal(net.frozen(image), features) and not features.requires_grad         # no dropout
    net.scores(features).sum().backward()
    torch.optim.SGD([p for p in net.parameters() if p.requires_grad], 0.1, weight_decay=0.1).step()
    changed = {k for k, v in net.state_dict().items() if not torch.equal(v, before[k])}
    assert {int(k.split(".")[1]) for k in changed if k[0] == "t"} == set(range(frozen, 3)) and "head.0.weight" in changed


def make_voc(masks=None, name="val", root="VOC2012"):
    """A small devkit with one set -> {id: mask (H, W)}: these, or four in both orientations with all classes, void on top."""
    if masks is None:
        cells = (np.arange(200, dtype=np.uint8) % 21).reshape(4, 5, 10).repeat(20, 1).repeat(20, 2)
        sizes, cells[:, :3] = [(60, 80), (80, 60), (64, 64), (50, 90)], 255
        masks = {f"{name}_{n}": cells[n, :height, :width] for n, (height, width) in enumerate(sizes)}
    sets = Path(root, "ImageSets/Main")
    sets.mkdir(parents=True, exist_ok=True)
    (sets / f"{name}.txt").write_text("\n".join(masks))                    # no newline at the end
    for k, label in enumerate(data.VOC_CLASSES[1:], 1):
        lines = (f"{i} {1 if (mask == k).any() else -1:2}\n" for i, mask in masks.items())
        (sets / f"{label}_{name}.txt").write_text("".join(lines))
    for n, (i, mask) in enumerate(masks.items()):
        data.save_labels(f"{root}/SegmentationClass/{i}.png", mask)
        photo(f"{root}/JPEGImages/{i}.jpg", n, *mask.shape)
    return masks


def test_scorer_worked_vector():
    """Two images, four classes, by hand: one class never occurs, so there is no official mean until a pixel is called it."""
    def score(**labels):
        for i, mask in labels.items():
            data.save_labels(f"pred/{i}.png", mask)
        out = ok("eval_voc score pred --voc VOC2012 --classes names.txt --variants --json s.json")
        return out, json.loads(Path("s.json").read_text())
    truth = dict(a=np.array([[0, 0, 1], [0, 1, 255]], np.uint8), b=np.array([[0, 2, 2, 0]], np.uint8))
    guess = dict(a=np.array([[0, 1, 1], [0, 1, 0]], np.uint8), b=np.array([[0, 2, 2, 2]], np.uint8))
    total = sum(eval_voc.confusion(truth[i], guess[i], 4) for i in "ab")
    assert total.dtype == np.int64 and total.tolist() == [[3, 1, 1, 0], [0, 2, 0, 0], [0, 0, 2, 0], [0] * 4]
    with pytest.raises(ValueError, match="index 2"):                            # the truth's
        eval_voc.confusion(truth["b"], guess["b"] // 2, 2)
    make_voc(truth)
    Path("names.txt").write_text("ground\ncat\ndog\nemu")
    (out, report), third = score(**guess), pytest.approx(200 / 3)
    assert "3 of 4 classes" in out and "NOT VOC" in out and report["mean_iou"] is None and report["classes_defined"] == 3
    assert report["iou"] == dict(ground=pytest.approx(60), cat=third, dog=third, emu=None)
    assert (report["mean_accuracy"], report["mean_iou_defined"]) == pytest.approx((100 * (3 / 5 + 1 + 1) / 3, 580 / 9))
    assert list(report["variants"].values()) == pytest.approx([62.50, 48.33, 64.44, 66.67], abs=0.01)
    report = score(b=[[3, 2, 2, 2]])[1]
    assert [*report["iou"].values(), report["mean_iou"]] == pytest.approx([40, 200 / 3, 200 / 3, 0, 130 / 3])
    assert list(report["variants"].values())[2] == pytest.approx(57.78, abs=0.01)
    # Average precision: hits at ranks 1, 3, 6 are already monotone; a miss first makes the later, better precision count.
    for hits, want in (([1, 0, 1, 0, 0, 1], 100 * (1 + 2 / 3 + 1 / 2) / 3), ([0, 1, 1, 0, 0, 0], 100 * 2 / 3), ([0] * 6, None)):
        assert eval_voc.average_precision(np.linspace(0.9, 0.4, 6), np.array(hits, bool)) == (want and pytest.approx(want))


def test_scorer_finds_truth_perfect_packs_it_and_lists_all_problems_at_once():
    command, masks = "eval_voc score pred --voc VOC2012 --json s.json", make_voc()
    for i, mask in masks.items():
        data.save_labels(f"pred/{i}.png", np.where(mask == 255, 0, mask))
    ok(command)
    report = json.loads(Path("s.json").read_text())
    assert report["mean_iou"] == 100 and list(report["iou"]) == data.VOC_CLASSES and report["images"] == 4
    ok("eval_voc submit pred --voc VOC2012 --set val --out r.tgz")
    with tarfile.open("r.tgz", "r:gz") as tar:
        images = {member.name: Image.open(tar.extractfile(member)) for member in tar}
        assert list(images) == [f"results/VOC2012/Segmentation/comp6_val_cls/{i}.png" for i in masks]
        for image, mask in zip(images.values(), masks.values()):
            assert image.mode == "P" and (np.asarray(image) == np.where(mask == 255, 0, mask)).all()
            assert image.getpalette() == data.voc_palette().ravel().tolist()
    palette = ("000000 800000 008000 808000 000080 800080 008080 808080 400000 c00000 408000 c08000 400080 c00080 408080 "
               "c08080 004000 804000 00c000 80c000 004080")
    assert data.voc_palette()[:21].tobytes().hex(" ", 3) == palette and tuple(data.voc_palette()[255]) == (224, 224, 192)
    data.save_labels("pred/val_1.png", np.zeros((60, 80)))                 # turned
    data.save_labels("pred/val_2.png", masks["val_2"])                     # 255, but only where the truth is void
    Path("pred/val_3.png").write_bytes(b"not a png")
    refused(command, "3 of 4", "val_1.png", "nothing is resized", "val_2.png", "255 is not allowed", "val_3.png")
    Path("pred/val_0.png").unlink()
    refused(command, "4 of 4", "val_0.png: No such file", "val_3.png")


def outcome(folder):
    """What equal runs have in common: log.csv but for its times, and hashes of all weights and moments."""
    ckpt = infer.read_checkpoint(f"{folder}/ckpt.pt")
    tensors = ckpt["model"] | {(i, k): v for i, moments in ckpt["optimizer"]["state"].items() for k, v in moments.items()}
    rows = [line.split(",")[:4] for line in Path(folder, "log.csv").read_text().splitlines()]
    return rows, {k: hash(torch.as_tensor(v).numpy().tobytes()) for k, v in tensors.items()}


def test_a_killed_run_leaves_a_whole_checkpoint_and_resumes_bit_exact():
    """SIGTERM, which saves and ends with one line; SIGKILL at random moments (KILLS=20 for more); loader processes."""
    args, rng = f"{TOY} --save-every 1 --out", np.random.default_rng()
    with mock.patch("torch.compile", functools.partial(torch.compile, backend="eager")):     # needs no C++ compiler
        ok(f"train {args} whole --steps 60 --compile")
    ok(f"train {args} killed --steps 3")
    assert outcome("whole") != outcome("killed")
    for kill in range(int(os.environ.get("KILLS", 3)) + 1):
        command = [sys.executable, HERE / "train.py", *args.split(), "killed", "--steps", "60", "--resume"]
        run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env={**os.environ, "OMP_NUM_THREADS": "2"})                 # as many threads as here
        next((line for line in run.stdout if "images/s" in line), None)
        time.sleep(rng.uniform(0.05, 0.6))
        (run.kill if kill else run.terminate)()
        err = run.communicate()[1]
        assert kill or run.returncode == 0 or run.returncode == 2 and err.count("\n") == 1 and "saved at step" in err, err
        assert infer.read_checkpoint("killed/ckpt.pt")["step"] >= 3
    with open("killed/log.csv", "a") as file:
        file.write("99,20,0.1,0.1,1\nhalf a l\0")                          # written after the last checkpoint
    refused(f"train {args} killed --steps 60 --resume --r 3 --seed 5", "r was 5.0 and is 3.0", "seed was 0 and is 5")
    for _ in range(2):                                                     # the second time there is nothing left to do
        ok(f"train {args} killed --steps 60 --resume --workers 2")
        assert outcome("whole") == outcome("killed")
    Path("killed/log.csv").unlink()                                        # no rows are left to draw
    ok(f"train {args} killed --steps 60 --resume")


def test_two_processes_train_as_one_and_resume():
    """The same global batch, shared by two gloo processes: equal losses over 20 steps, one writer, exact resume."""
    def torchrun(file, *args):
        command = "-m torch.distributed.run --standalone --local-addr 127.0.0.1 --nproc-per-node 2".split()
        return subprocess.run([sys.executable, *command, file, *args], capture_output=True, text=True,
                              env={**os.environ, "OMP_NUM_THREADS": "1"})
    Path("add.py").write_text("import os, torch\nos.environ.setdefault('GLOO_SOCKET_IFNAME', 'lo')\ntorch.distributed."
                              "init_process_group('gloo')\ntorch.distributed.all_reduce(torch.ones(1))\nos._exit(0)\n")
    if (alone := torchrun("add.py")).returncode:                           # some sandboxes allow no sockets
        pytest.skip(f"torch cannot join two processes here: {alone.stderr[-800:]}")
    args = f"{TOY} --steps 20 --dropout 0 --optimizer sgd --log-every 1 --out"
    ok(f"train {args} one")
    for rest in ("two", "parts --steps 8", "parts --resume"):
        done = torchrun(HERE / "train.py", *args.split(), *rest.split())
        assert done.returncode == 0, done.stderr[-3000:]
    one, two = (np.array([row[2] for row in outcome(run)[0][1:]], float) for run in ("one", "two"))
    assert len(one) == len(two) == 20 and np.abs(one - two).max() < 1e-5 and outcome("two") == outcome("parts")


def test_toy_masks_belong_to_their_images_and_augmentation_moves_both():
    photos, scenes = data.toy_photos(3, 60), data.toy_scenes(3, 12)
    masked = data.Masked.of(photos, "drawn")
    assert (photos.tags.sum(1) == 1).all() and 5 <= photos.tags[:, 0].sum() <= 20
    assert all(set(masked.labels(i).unique().tolist()) <= {0, int(photos.tags[i].argmax())} for i in range(60))
    assert {len(np.unique(labels)) for _, _, labels in scenes} == {2, 3}   # background, and one or two classes
    assert not any(np.array_equal(image, other) for _, image, _ in scenes for other in photos.paths)
    labels = torch.nn.functional.pad(torch.full((6, 20, 20), 7, dtype=torch.uint8), (10, 34, 20, 24))
    images = (labels[:, None] > 0).float().expand(-1, 3, -1, -1) * 200
    moved, moved_labels = data.augment(images, torch.rand(7, 6), labels, brightness=0, contrast=0)
    assert ((moved[:, 0] > 100) == (moved_labels == 7))[moved_labels != 255].float().mean() > 0.99
    still, same = data.augment(images, torch.full((7, 6), 0.5), labels, flip=0)            # the middle of every range
    assert torch.allclose(still, images, atol=1e-3) and torch.equal(same, labels) and not torch.equal(moved_labels, labels)


def test_cached_features_are_the_trunks_resume_and_refuse_strangers():
    def cached(**changed):
        settings = train.Settings(**dict(trunk="tiny", size=32, cache="c", views=2) | changed)
        return train.cached_features(net, photos, settings, torch.device("cpu"))
    photos = data.Photos([random_image(n, 24, 30) for n in range(100)] + ["gone"], torch.ones(101, 2), ["background", "a"], 32)
    net, state = model.Net("tiny", 2), Path("c/cache.json")
    features, want = np.array(cached()), net.frozen(torch.stack([photos[i, 0.5][0] for i in range(100)])).numpy()
    assert np.abs(features[:-1, 0] - want).max() < 2e-3 * want.max() and not (features[:-1, 0] == features[:-1, 1]).all()
    state.write_text(json.dumps(json.loads(state.read_text()) | dict(done=32)))            # killed in its second block
    np.load("c/features.npy", mmap_mode="r+")[35:] = 0
    assert np.array_equal(cached(), features, equal_nan=True)
    items = train.Cached(photos, features, range(101), True)
    assert items[100, 0.1][1] == 0                                         # one that cannot be read gives way, tags and all
    for i, (place, view, way) in product((0, 7), ((0.1, 0, 1), (0.3, 0, -1), (0.6, 1, 1), (0.9, 1, -1))):
        assert (items[i, place][0].numpy() == features[i, view, ..., ::way]).all()
    net.trunk[0].bias.data += 1
    with pytest.raises(data.InputError, match="c: made for another size, amp, weights"):
        cached(size=48, amp=True)


def test_bfloat16_only_where_the_device_has_it():
    for has in (True, False):
        with mock.patch("torch.cpu.get_capabilities", lambda: dict(amx_bf16=has)):
            assert (" in bfloat16:" in ok(f"train {TOY} --steps 1 --amp --out o")) == infer.load_net("o/ckpt.pt")[0].amp == has


def save_bing(folder, **changed):
    """BING's three files, of ones; changed: part=(rows, columns, value)."""
    Path(folder).mkdir(exist_ok=True)
    for part, (rows, cols, value) in (dict(wS1=(8, 8, 1), idx=(1, 1, 1), wS2=(1, 2, 1)) | changed).items():
        text = f"rows: {rows}\ncols: {cols}\ndata: [{','.join([str(value)] * rows * cols)}]"
        Path(folder, f"ObjNessB2W8MAXBGR.{part}.yml.gz").write_bytes(gzip.compress(text.encode()))


def test_photographs_of_every_kind_and_size_are_read_trained_on_and_labelled(monkeypatch):
    """One picture in six encodings, read within what they lose; with pictures of odd sizes, a folder of one's own."""
    ramp = np.stack(np.broadcast_arrays(np.linspace(0, 255, 40)[:, None], np.linspace(255, 0, 30), 128), -1).astype(np.uint8)
    image, exif, alpha = Image.fromarray(ramp), Image.Exif(), np.repeat([[[255]], [[0]]], 20, 0).repeat(30, 1).astype(np.uint8)
    exif[0x0112] = 6                                                       # the camera was turned
    for n, size in enumerate([(1, 1), (40, 1), (1, 40), (9, 9), (1, 20_000)]):
        photo(f"photos/{n}.png", n, *size)
    image.transpose(Image.Transpose.ROTATE_90).save("photos/turned.jpg", exif=exif, quality=95)
    image.convert("CMYK").save("photos/cmyk.jpg", quality=95)
    image.quantize(256).save("photos/palette.png")
    for name in ("photos/plain.bmp", "plain.bmp"):
        image.save(name)
    Image.fromarray(np.dstack([ramp, alpha])).save("photos/alpha.png")
    Image.fromarray(ramp[..., 0].astype(np.uint16) * 257).save("photos/deep.png")
    whole, broken = [f"photos/{name}" for name in ("turned.jpg", "cmyk.jpg", "palette.png", "plain.bmp")], Path("half.jpg")
    assert all(np.abs(data.load_image(file).astype(int) - ramp).mean() < 12 for file in whole)
    for name, want in (("alpha", np.where(alpha > 0, ramp, 255)), ("deep", ramp[..., :1].repeat(3, 2))):
        assert (data.load_image(f"photos/{name}.png") == want).all()
    broken.write_bytes(Path(whole[0]).read_bytes()[:-500])                 # gives way to the next, always the same
    photos = data.Photos([whole[3], broken, whole[0]], torch.eye(3), list("abc"), 16)
    assert [photos[i, 0.5][1] for i in range(3)] == [0, 2, 2]
    with pytest.raises(data.InputError, match="half.jpg"):
        train.note_broken(photos, [0, 1], [0, 2], set())
    tags = ["file,tags", "0.png,dog", "1.png,cat;dog", "2.png,", "3.png,background", "4.png,cat", "photos/deep.png,"]
    Path("tags.csv").write_text("\n".join([*tags, *(f"{Path(file).name},cat" for file in whole)]).replace("photos/", ""))
    photos = data.folder_photos("photos", "tags.csv")
    assert photos.classes == ["background", "cat", "dog"] and photos.tags[:4, 1:].tolist() == [[0, 1], [1, 1], [0, 0], [0, 0]]
    ok(f"train folder {GO} --out o --images photos --tags tags.csv --steps 2 --batch 4 --views 3")
    Path("two.csv").write_text("photos/plain.bmp,cat\nplain.bmp,dog")      # two of one name, each with a label of its own
    assert ok(f"train folder {GO} --self-steps 1 --images . --tags two.csv --out two") and len(os.listdir("two/self1")) == 2
    Path("two/self1").rename("labels")                                     # a run that has ended needs them no more
    ok(f"train folder {GO} --self-steps 1 --images . --tags two.csv --out two --resume")
    save_bing("bing")
    for prior in ("bb", "seg", "refine"):
        ok(f"infer o/ckpt.pt photos --prior {prior} --bing bing --soft --out l")
        assert data.read_labels("l/4.png").shape == (1, 20_000) and np.load("l/4.npz")["scores"].shape == (3, 1, 1000)
    assert data.load_image("l/turned_overlay.png").shape == (40, 30, 3) and Path("o/panel.png").exists()
    with np.load("l/turned.npz", allow_pickle=False) as soft:
        assert soft["scores"].shape == (3, 40, 30) and soft["classes"].tolist() == photos.classes
    monkeypatch.setattr(infer, "MAX_BYTES", 1e5)
    refused(f"infer o/ckpt.pt {whole[0]} --out m", whole[0], "would take about")


def test_losses_that_are_not_finite_and_full_disks_stop_a_run():
    refused(f"train {TOY} --steps 9 --lr 1e30 --optimizer sgd --out bad", "the loss is not finite", "toy ", "checkpoint: none")
    plain, disk = f"train {TOY} --steps 1 --out o", train.shutil.disk_usage(".")
    cached = f"{plain} --train-convs 0 --cache c --head 4"
    refused(f"{plain} --out bad/log.csv/o", "bad/log.csv/o", "check that")                   # a file is in the way
    for command, full in ((plain, "o"), (cached, "o"), (cached, "c")):
        with mock.patch.object(train.shutil, "disk_usage", lambda at: disk._replace(free=10 ** (5 if at.name == full else 9))):
            refused(command, f" {full}: ", "needed", "make room")
    assert {str(p) for p in Path().rglob("*") if p.is_file()} <= {"bad/log.csv", "bad/settings.json", "o/settings.json"}
    ok(cached)


def save_vgg(path):
    """A file in the public VGG16's layout, where ReLUs and pools count too, with random numbers."""
    layers = zip([0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28], model.Net("vgg16", 2).trunk, strict=True)
    torch.save({f"features.{n}.{k}": v.half() for n, layer in layers for k, v in layer.state_dict().items()}, path)


def test_weak_training_and_inference_open_no_mask():
    """Every file that Python opens is recorded; with --masks the same record shows them, so the test can fail."""
    def opens(folder, *commands):
        OPENED.clear()
        return [ok(command) for command in commands] and any(folder in path for path in OPENED)

    def ladder(more=""):
        out = ok(f"eval_voc ladder o/ckpt.pt --voc VOC2012 --json l.json --device cpu {more}")
        return json.loads(Path("l.json").read_text())["rows"], out
    masks = make_voc()
    save_vgg("vgg.pth")
    weak = ("train voc --voc VOC2012 --set val --weights vgg.pth --steps 2 --self-steps 2 --size 64 --head 8 --batch 2 "
            "--threshold-images 2 --device cpu --out")
    assert not opens("SegmentationClass", f"{weak} o", "infer o/ckpt.pt --voc VOC2012 --set val --out p")
    assert any("JPEGImages" in path for path in OPENED)
    assert opens("SegmentationClass", f"{weak} strong --masks VOC2012/SegmentationClass --cache no --no-jitter")
    assert sorted(path.stem for path in Path("p").iterdir()) == sorted(masks)
    (rows, out), (oracle, warned) = ladder(), ladder("--oracle-thresholds val")
    assert list(rows) == ["base", "ilp", "ilp+sppxl", "ilp+bb", "ilp+seg", "ilp+refine"] and "paper" in out
    assert "ORACLE" in warned and oracle["ilp"] == rows["ilp"] and {"ilp+bb*oracle", "ilp+seg*oracle"} < oracle.keys()


def slow_superpixels(image, scale, sigma, min_size):
    """Felzenszwalb-Huttenlocher, every edge in stable order, dictionaries of sets; labels in raster order."""
    (H, W), edges = image.shape[:2], []
    g = np.stack([ndimage.gaussian_filter(image[..., c] / 255.0, sigma) for c in range(3)], -1)
    for (dy, dx), y, x in product(((0, 1), (1, 0), (1, 1), (-1, 1)), range(H), range(W)):
        if 0 <= y + dy < H and x + dx < W:
            d = g[y + dy, x + dx] - g[y, x]
            edges.append((np.sqrt(d[0] * d[0] + d[1] * d[1] + d[2] * d[2]), y * W + x, (y + dy) * W + x + dx))
    edges.sort(key=lambda edge: edge[0])                                   # equal costs stay in this order
    home, sets, inner = list(range(H * W)), {i: {i} for i in range(H * W)}, [0.0] * (H * W)
    for growing, (w, p, q) in product((True, False), edges):
        a, b = home[p], home[q]
        light = all(w < inner[c] + scale / 255 / len(sets[c]) for c in (a, b))
        if a != b and (light if growing else min(len(sets[a]), len(sets[b])) < min_size):
            for i in sets[b]:
                home[i] = a
            sets[a] |= sets.pop(b)
            inner[a] = w
    names = {}
    return np.array([names.setdefault(h, len(names)) for h in home]).reshape(H, W)


@pytest.mark.parametrize("seed", range(24))
def test_superpixels_are_felzenszwalbs(seed):
    rng, levels = np.random.default_rng(seed), (2, 4, 16, 256)[seed % 4]   # few levels: many equal costs
    image = (rng.integers(0, levels, (*rng.integers(2, 26, 2), 3)) * (255 // (levels - 1))).astype(np.uint8)
    if seed % 3 == 0:                                                      # blobs, so that large segments form
        image = ndimage.zoom(image, (3, 3, 1), order=seed % 2)
    options = rng.choice([1, 30, 100, 400]), rng.choice([0, 0.5, 1.0]), rng.choice([1, 5, 20])
    slow = slow_superpixels(image, *options)
    assert all((infer.superpixels(image, *options, rounds) == slow).all() for rounds in (0, 3, 24))


@pytest.mark.parametrize("seed", range(5))
def test_proposals_equal_their_loops(seed):
    """Objectness is the mean score of the covering boxes or segments; MCG's file; BING's peaks and gradients."""
    rng = np.random.default_rng(seed)
    labels, segments, scores = rng.permutation(221).reshape(13, 17) % 9, rng.random((12, 9)) < 0.3, rng.random(12)
    segments[0] = False                                                    # an empty candidate
    boxes = np.sort(rng.integers(-3, 22, (12, 2, 2)), 1).reshape(12, 4).astype(float)
    by_box = infer.cover_score(scores, labels.shape, boxes=boxes)
    by_segment = infer.cover_score(scores, labels.shape, segments=segments, regions=labels)
    for (y, x), s in np.ndenumerate(labels):
        inside = (boxes[:, :2] <= (x, y)).all(1) & (boxes[:, 2:] > (x, y)).all(1)
        for got, hit in ((by_box, inside), (by_segment, segments[:, s])):
            assert np.isclose(got[y, x], scores[hit].mean() if hit.any() else 0, atol=1e-6)
    for row, box in zip(segments, infer.boxes_of(segments, labels)):
        y, x = np.nonzero(row[labels])
        assert list(box) == ([x.min(), y.min(), x.max() + 1, y.max() + 1] if len(x) else [0] * 4)
    cells = np.empty((len(scores), 1), object)                             # MCG's file of the same
    cells[:, 0] = [(np.flatnonzero(row) + 1).astype(np.uint16)[None] for row in segments]
    scipy.io.savemat("a.mat", dict(superpixels=(labels + 1).astype(np.uint16), labels=cells, scores=scores[:, None]))
    want = labels, segments, (scores - scores.min()) / np.ptp(scores)
    assert all(np.allclose(a, b) for a, b in zip(infer.read_mcg("a.mat"), want, strict=True))
    score, kept, image = rng.integers(0, 99, (20, 30)), [], random_image(seed, 9, 11).astype(int)
    for y, x in zip(*np.unravel_index(np.argsort(-score, None, "stable"), score.shape)):
        if all(max(abs(y - v), abs(x - u)) > 2 for v, u in kept):
            kept.append((y, x))
    assert infer.non_maximum_suppression(score, 9).tolist() == [y * 30 + x for y, x in kept[:9]]
    for (y, x), got in np.ndenumerate(infer.normed_gradient(image.astype(np.uint8))):
        up, down, left, right = max(y - 1, 0), min(y + 1, 8), max(x - 1, 0), min(x + 1, 10)
        gx, gy = abs(image[y, right] - image[y, left]).max(), abs(image[down, x] - image[up, x]).max()
        assert got == min(gx * 2 // (right - left) + gy * 2 // (down - up), 255)


def test_priors_of_pixels_equal_their_loops():
    """Eq. 7, votes of superpixels, thresholds, objectness against background, pixel-adaptive refinement."""
    rng, q = np.random.default_rng(0), np.array([0.1, 0.03, 0.3, 0.57], np.float32)
    p, o, delta, guess = rng.random((4, 9, 11), np.float32), rng.random((9, 11)), np.arange(4) / 10, rng.integers(0, 4, (9, 11))
    factors = dict(all=q, objects=[1, *q[1:]], square=[1, *q[1:] ** 2], threshold=[1, 0, 1, 1])
    assert all(np.allclose(infer.ilp(p, q, form), p * np.reshape(factors[form], (4, 1, 1))) for form in infer.ILP_FORMS)
    regions = rng.permutation(99).reshape(9, 11) % 9
    vote, labels = infer.vote(guess, regions), infer.thresholded(p, o, delta)
    for s in range(9):
        assert (vote[regions == s] == np.bincount(guess[regions == s]).argmax()).all()
    for y, x in np.ndindex(9, 11):
        k = 1 + np.argmax(p[1:, y, x])
        assert labels[y, x] == (k if p[k, y, x] / p[:, y, x].sum() * o[y, x] > delta[k] else 0)
    want = p * np.stack([1 - o, o, o, o]) ** 0.5
    assert np.allclose(infer.weigh(p, o), want / want.sum(0), atol=1e-5)
    assert np.allclose(infer.relative(o), (o - o.min()) / (o - o.min() + (o - o.min()).mean()), atol=1e-6)
    assert np.allclose(infer.relative(np.full((3, 3), 7.0)), 0.5)          # a flat picture decides nothing
    x, guide = rng.random((2, 9, 11), np.float32), rng.random((9, 11, 3), np.float32)
    want, steps = x.astype(float), np.array([(d * i, d * j) for d, i, j in product((1, 3), (-1, 0, 1), (-1, 0, 1)) if i or j])
    for _ in range(2):
        before, want = want, np.empty_like(want)
        for y, u in np.ndindex(9, 11):
            rows, columns = np.clip((y, u) + steps, 0, (8, 10)).T
            colours = guide[rows, columns].astype(float)                   # (16, 3)
            spread = np.concatenate([colours, guide[None, y, u]]).std(0, ddof=1) + 1e-8
            weight = np.exp(-(np.abs(colours - guide[y, u]) / (0.1 * spread)).mean(1))
            want[:, y, u] = before[:, rows, columns] @ weight / weight.sum()
    assert np.allclose(infer.pixel_adaptive(x, guide, (1, 3), 2), want, atol=1e-5)


@pytest.mark.parametrize("seed", range(4))
def test_hierarchy_equals_its_loops(seed):
    """Shortest paths by relaxation, average linkage by comparing all pairs of clusters, scores pixel by pixel."""
    image = random_image(seed, 24, 30)
    labels = infer.superpixels(image, 20, 0.5, 6)
    S = labels.max() + 1
    colour, far = [image[labels == s].mean(0) / 255 for s in range(S)], np.where(np.eye(S), 0.0, np.inf)
    for (y, x), a in np.ndenumerate(labels):
        for b in {*labels[y + 1:y + 2, x], *labels[y, x + 1:x + 2]} - {a}:
            far[a, b] = far[b, a] = np.linalg.norm(colour[a] - colour[b]) + 1e-6
    for via in range(S):
        far = np.minimum(far, far[:, via, None] + far[via])
    clusters, nodes = [[s] for s in range(S)], [[s] for s in range(S)]
    while len(clusters) > 1:
        _, i, j = min((far[np.ix_(clusters[i], clusters[j])].mean(), i, j) for i in range(len(clusters)) for j in range(i))
        clusters.append(clusters.pop(i) + clusters.pop(j))
        nodes.append(clusters[-1])
    saliency = far[:, [*labels[0], *labels[-1], *labels[:, 0], *labels[:, -1]]].min(1)[labels]
    want = {frozenset(map(int, node)): saliency[np.isin(labels, node)].mean() for node in nodes
            if np.isin(labels, node).mean() >= 0.02}
    low, high = min(want.values()), max(want.values())
    segments, scores = infer.hierarchy(labels, image, 0.02)
    got = {frozenset(np.flatnonzero(row).tolist()): score for row, score in zip(segments, scores)}
    assert len(segments) == len(want) > 5 and got.keys() == want.keys() and (np.diff(scores) <= 0).all()
    assert all(np.isclose(got[node], (value - low) / (high - low)) for node, value in want.items())


def test_a_bright_object_is_found_and_seeds_keep_to_the_tags():
    image = np.pad(np.full((32, 40, 3), 220, np.uint8), ((24, 24), (32, 28), (0, 0)), constant_values=40)
    for name, o in dict(bb=infer.Scene(image).bb, seg=infer.Scene(image).seg, own=infer.saliency(image)).items():
        assert o.min() < 1e-6 and o.max() < 1 and o[40, 52] > 0.6 > 0.4 > o[4, 4], name
    labels = infer.refine(np.full((2, 80, 100), 0.5, np.float32), image, infer.superpixels(image)).argmax(0)
    assert (labels == (image[..., 0] > 100)).mean() > 0.95                 # from scores that know nothing
    image, present = torch.from_numpy(image).permute(2, 0, 1), torch.tensor([2, 4])
    labels = infer.seeds(torch.randn(5, 8, 9), torch.rand(16, 8, 9), present, image)
    assert labels.shape == (32, 36) and {*labels.flat} <= {0, 2, 4, 255} and {2, 4} & {*labels.flat}


def test_thresholds_equal_a_search():
    """Without shrinking, no multiple of 1/50 gives a class a better IoU; with a huge one, all classes share the best mean."""
    def fit(labels, prior, shrink):
        with mock.patch.object(infer, "predict", side_effect=[(p, q) for p in planes]):
            return np.array(eval_voc.fit_thresholds(None, zip(scenes, labels), steps=steps, shrink=shrink)[prior])
    rng, K, steps, q = np.random.default_rng(0), 4, 50, np.array([0.4, 0.9, 0.5, 0.7], np.float32)
    scenes = [infer.Scene(random_image(i, 20, 24)) for i in range(5)]
    masks = [rng.choice([0, 1, 2, 3, 255], p=[.4, .2, .2, .1, .1], size=(20, 24)).astype(np.uint8) for _ in scenes]
    noise = [rng.normal(size=(K, 20, 24)) + 1.5 * (np.arange(K)[:, None, None] == mask) for mask in masks]
    planes = [torch.from_numpy(x).softmax(0).float().numpy() for x in noise]

    def iou(labels, prior, delta):
        drawn = [infer.thresholded(infer.ilp(p, q), getattr(s, prior), np.full(K, delta)) for s, p in zip(scenes, planes)]
        drawn, true = (np.arange(K)[:, None] == np.ravel(x)[np.ravel(labels) != 255] for x in (drawn, labels))
        return (drawn & true).sum(1) / np.maximum((drawn | true).sum(1), 1)
    own = [infer.refine(p * np.reshape([1, 1, 0, 1], (K, 1, 1)), s.image, s.regions).argmax(0) for s, p in zip(scenes, planes)]
    by_tags, by_masks = ([[0, 1, 0, 1]] * 5, own, [1, 3]), (masks, masks, [1, 2, 3])
    for (given, labels, known), prior in product((by_tags, by_masks), ("bb", "seg")):
        search = np.array([iou(labels, prior, i / steps - 1e-9) for i in range(steps)])    # (steps, K)
        alone, shared = (np.rint(fit(given, prior, shrink) * steps).astype(int) for shrink in (1e-9, 1e9))
        assert alone[0] == 0 and len(set(shared[1:])) == 1
        assert np.allclose(search[alone, range(K)][known], search.max(0)[known], atol=0.01)
        assert np.isclose(search[shared[1], 1:].mean(), search[:, 1:].mean(1).max(), atol=0.01)


def test_synsets_and_settings_are_the_papers():
    """788 of ILSVRC's 1,000 synsets have a class or are background; photographs of the others may show a class."""
    table = {wnid: data.VOC_CLASSES[k] for wnid, k in data.read_synsets(data.SYNSETS).items()}
    assert {*table.values()} == {*data.VOC_CLASSES} and len(table) == 788
    assert [list(table.values()).count(c) for c in ("dog", "bird", "cat", "background")] == [118, 59, 5, 551]
    assert [table.get(f"n0{n}") for n in (2123045, 2099601, 2403003, 1440764, 4344873)] == ["cat", "dog", "cow", None, "sofa"]
    paper = train.Settings(**train.PRESETS["paper"])
    assert (paper.lr, paper.momentum, paper.weight_decay, paper.dropout, paper.batch, paper.r) == (1e-3, 0.9, 5e-5, 0.5, 16, 5)
    assert (paper.optimizer, paper.schedule, paper.train_convs, model.TRUNKS[paper.trunk].size) == ("sgd", "steps", 0, 400)
    assert [train.learning_rate(paper, n, 0, 10 ** 6) for n in (312_499, 312_500, 625_000)] == pytest.approx([1e-3, 8e-4, 6.4e-4])


@pytest.mark.skipif(not SHARED.exists(), reason="no ../shared: nothing is run on real photographs")
def test_published_head_labels_real_photographs():
    photos, voc = data.imagenet_photos(SHARED / "data/imagenet-sample"), SHARED / "data/VOCdevkit/VOC2012"
    assert {p.parent.name for p in photos.paths} == set(data.read_synsets(data.SYNSETS))
    ok(f"eval_voc ladder {HERE}/assets/voc.pt --voc {voc} --weights {SHARED}/weights/vgg16_features_fp16.pth --limit 8 --json l")
    assert json.loads(Path("l").read_text())["rows"]["ilp+refine"]["mean_iou_defined"] > 35


LABEL, LADDER = "infer toy.pt photo.png --device cpu --out out", "eval_voc ladder toy.pt --voc VOC --set b --json out"
SCORE, SUBMIT = "eval_voc score masks --voc VOC --set b --json out", "eval_voc submit masks --voc VOC --out out --set b"
TRAIN, PHOTO = f"train voc {GO} --voc VOC --set b --out out", "VOC/JPEGImages/b.jpg"
WRONG_FLAGS = {                                    # command: what is added to it, one of these at a time
    f"train toy {GO} --out out --toy-images 2": "--batch 0|--lr nan|--lr -1|--r 0|--dropout 2|--momentum 1|--lo 1|--seed -1|"
    "--weight-decay -1|--seed 99999999999999999999|--train-convs 9|--train-convs -2|--device no|--no 1|--background .|--voc VOC|"
    "--stesp 5|--device cuda:99|--device cpu:-1|--device meta|--head 0|--head x|--head 1,,2|--head ²|--head 9999999999|"
    "--kernel ,|--kernel=|--kernel 99|--size 4|--sides 0|--sides 3,x|--dense 0|--dense 3|--steps 0|--balance nan|--trunk no|"
    "--views 0|--aggregation no|--workers -1|--masks x|--resume|--toy-images 0|--self-rounds 0|--self-steps 1|--limit -1",
    LABEL: "--dense 0|--dense 3|--dense -1|--device no|--prior no|--voc VOC|--set|photo.png|no.jpg|VOC/ImageSets|--out .",
    LADDER: "--sides x|--sides 9,-1|--limit -1|--limit x|--dense 3|--device no|--set no|--oracle-thresholds no|--set ../b|"
    "--set ..|--set=|--set /etc/passwd|--set a/b", "infer": " |no.pt photo.png|. photo.png|toy.pt",
    "eval_voc": " |pack|submit masks --voc no --out out", "model": "no|--no", "data": "--imagenet no|--no"}


def malformed():
    """Rows (command, file, contents, each of which is refused): bytes, text, or a value for torch.save or savemat."""
    class Evil:
        def __reduce__(self):                                              # unpickling it would write a file
            return open, ("executed", "w")

    def encoded(image, kind="png"):
        buffer = io.BytesIO()
        (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(buffer, kind)
        return buffer.getvalue()
    toy, run, rng = torch.load("toy.pt", weights_only=True), Path("toy.pt").read_bytes(), np.random.default_rng(0)
    noise, mask, head = random_image(0, 24, 30), Path("masks/b.png").read_bytes(), toy["model"]["head.0.weight"]
    png, others = encoded(noise), [encoded(noise, kind) for kind in ("JPEG", "GIF", "TIFF", "BMP", "WEBP", "PPM")]
    junk = [b"", b"hello", bytes(range(256)) * 9, bytes(3000), b"a\0b,cat\n"]
    pictures = [*junk, *(png[:n] for n in (1, 8, 20, 33, 40, 60, len(png) // 2, len(png) - 40)),
                *(png[:n] + bytes([png[n] ^ 0x55]) + png[n + 1:] for n in (1, 13, 17, 20, 24, 25, 28, 60)),
                *(png[:16] + bytes([0, 0, side, 99]) * 2 + png[24:] for side in (99, 120)),        # decompression bombs
                *(other[:n] for other in others for n in (12, len(other) // 2))]
    masks = [*junk, mask[:len(mask) // 2], png, mask.replace(b"PLTE", b"pLTE"), mask.replace(b"PLTE\0\0\0", b"PLTE\0\0\1"),
             encoded(Image.fromarray(noise).quantize()), encoded(noise[..., 0].astype(np.uint16))]
    above, turned, grey, void = (encoded(np.full(s, k, "B")) for *s, k in ((24, 30, 77), (30, 24, 0), (24, 30, 0), (24, 30, 255)))
    ids = ["", "..", "../..", "a\na", "a\0b", "a:b", "x\\y", "no", "/etc/..", b"\xff", "../../x", "/etc/x", "y" * 999]
    entities = "".join(f'<!ENTITY e{i} "{f"&e{i - 1};" * 10}">' for i in range(9))
    yield LABEL.replace("photo", "x"), "x.png", pictures
    yield from ((command, PHOTO, junk) for command in (LADDER, SUBMIT))
    yield from ((f"{TRAIN} --cache {cache}", PHOTO, pictures[:14]) for cache in ("no", "c"))
    yield f"{TRAIN} --masks masks", "masks/b.png", [*masks, above]
    yield f"train folder {GO} --out out --images . --tags t.csv --masks masks", "t.csv", ["x.jpg,cat\nn1/x.png,cat"]    # one name
    yield SCORE, "masks/b.png", [*masks, above, turned]
    yield SUBMIT, "masks/b.png", [*masks, above, turned, grey]
    for command, last in (SCORE, void), (LADDER, void), ("eval_voc proposals --voc VOC --set b", b""):
        yield command, "VOC/SegmentationClass/b.png", [*masks, above, turned, last]
    yield f"{SCORE} --classes n.txt", "n.txt", ["a", "a\na", "a\n" * 300, b"\xff", ""]
    yield f"{SUBMIT} --set bad", "VOC/ImageSets/Segmentation/bad.txt", ids
    yield f"{TRAIN} --set bad", "VOC/ImageSets/Main/bad.txt", ids
    yield TRAIN, "VOC/ImageSets/Main/cat_b.txt", ["b 7", "b", b"\xff"]
    yield f"{TRAIN} --set new", "VOC/Annotations/new.xml", [
        *junk, "<annotation>", "<a/>", "<annotation><object></annotation>", f"<!DOCTYPE a [{entities}]><a>&e8;</a>",
        *(f"<?xml version='1.0' encoding='{e}'?><annotation/>" for e in ("no", "shift_jis"))]
    yield f"train folder {GO} --out out --images VOC/JPEGImages --tags t.csv", "t.csv", [
        *junk, "b.jpg", "b.jpg,cat,dog", "no.jpg,cat", "../../x.jpg,cat", f"{Path.cwd()}/x.jpg,cat", ".,cat", ",cat", "b.jpg,",
        "file,tags", '"b.jpg,cat', "a\0b.jpg,cat", "y" * 140_000 + ",cat", "b.jpg," + ";".join(map(str, range(300)))]
    yield f"train paper {GO} --out o --imagenet . --synsets s.csv", "s.csv", [*junk[1:4], "n1", "n1,emu", "n1,a,b", "n,cat\nn"]
    changes = [{k: v} for k in toy if k not in ("optimizer", "step") for v in (None, 7.5, "x", [[]], {1: 2}, torch.zeros(2))]
    changes += [dict(format=2), dict(format=Evil()), dict(classes=["a", "a", "b"]), dict(thresholds={"bb": [0.0]}),
                dict(step="x"), dict(optimizer=None)]
    changes += [dict(settings=toy["settings"] | {k: v}) for k, v in [*product("r", (0, -1, math.nan, math.inf)), *product(
        ("trunk", "head", "kernel", "aggregation", "r", "dropout", "sides", "dense"), (None, "x", [1]))]]
    changes += [dict(model=toy["model"] | {"head.0.weight": v}) for v in (
        None, head[:2], head * math.nan, head.to(torch.complex64), 3, head.tolist())]
    cuts = [run[:n] for n in (*rng.integers(0, len(run), 16), len(run) - 1, len(run) - 22)]
    yield LABEL.replace("toy", "bad"), "bad.pt", [*junk, *cuts, [1], torch.zeros(3), 3, {}, *(toy | c for c in changes)]
    yield f"{TRAIN} --out run --resume --steps 2", "run/ckpt.pt", [*cuts[:3], *(toy | change for change in (
        dict(optimizer={}), dict(optimizer=dict(state={}, param_groups=[])), dict(pending=["x"]), dict(settings={}),
        dict(optimizer=toy["optimizer"] | dict(state={0: dict(exp_avg=head)})), dict(model={}),
        dict(model={"head.0.weight": head[:1]}), dict(classes=toy["classes"][::-1])))]
    yield f"{TRAIN} --trunk vgg16 --size 96 --weights w.pt", "w.pt", [
        *junk, *({key: 1} for key in ("features.0.weight", "features.x.weight", "features..weight", 1)), [], 3, [Evil()]]
    for part, matrix in product(("wS1", "idx", "wS2"), (None, (9, 9, 0), (2, 2, "x"), (2, 2, "nan"), (3, 2, 99))):
        save_bing("bing", **({part: matrix} if matrix else {}))
        file = f"bing/ObjNessB2W8MAXBGR.{part}.yml.gz"
        yield f"{LABEL} --prior bb --bing bing", file, [Path(file).read_bytes()] if matrix else [*junk, gzip.compress(b"\xff")]
    good = dict(superpixels=np.ones((24, 30)), labels=np.array([[np.ones(1)]], object), scores=np.ones((1, 1)))
    wrong = dict(superpixels=["x", np.ones((9, 9)), *(np.full((24, 30), v) for v in (0, 2.0 ** 40, math.nan, 2.5))],
                 labels=["x", np.array([[np.full(1, 99)]], object)],
                 scores=["x", np.full((1, 1), math.nan), np.ones((0, 1)), np.ones((2, 1))])
    yield f"{LABEL} --prior seg --mcg .", "photo.mat", [*junk, *({k: good[k]} for k in good),
                                                        *(good | {k: v} for k in wrong for v in wrong[k])]
    state, features = (Path("run/cache", name).read_bytes() for name in ("cache.json", "features.npy"))
    np.save("short", np.zeros((1, 2), np.float16))
    np.save("evil", np.array([Evil()]))
    yield f"{TRAIN} --cache run/cache", "run/cache/cache.json", [
        *junk, "[]", "3", "{}", '{"key": 1, "done": 1}', state.replace(b"tiny", b"no"),
        *(state.replace(b'"done": 1', b'"done": ' + v) for v in (b"9", b"0", b'"x"', b"true"))]
    yield f"{TRAIN} --cache run/cache", "run/cache/features.npy", [
        *junk, features[:50], features[:-9], *(features.replace(b"'<f2'", t) for t in (b"'<i2'", b"'|O' ")),
        *(Path(f"{name}.npy").read_bytes() for name in ("short", "evil"))]
    for command, flags in WRONG_FLAGS.items():                             # nothing is wrong with VOC's list here
        yield from ((f"{command} {flag}", "VOC/ImageSets/Main/b.txt", ["b"]) for flag in flags.split("|"))


def test_malformed_inputs_are_refused_in_one_line_and_leave_nothing(tmp_path, monkeypatch):
    """Whatever file or flag is wrong: one line with its name and the remedy, status 2, nothing written or read elsewhere."""
    path, wrong, count = tmp_path / "at/some/depth", [], 0
    path.mkdir(parents=True)
    monkeypatch.chdir(path)
    make_voc(dict(b=np.full((24, 30), 12, np.uint8)), "b", "VOC")
    Path("VOC/ImageSets/Main/new.txt").write_text("new")                   # its tags are in Annotations
    for file in ("masks/b.png", "masks/x.png"):
        data.save_labels(file, np.full((24, 30), 12))
    for file in ("x.jpg", "photo.png", "n1/x.png"):
        photo(file, kind="png")
    ok(f"{TRAIN} --out run")
    Path("toy.pt").write_bytes(Path("run/ckpt.pt").read_bytes())
    for command, name, contents in malformed():
        file, word = Path(name), "" if "ImageSets" in name else "bing" if "bing" in name else Path(name).stem
        file.parent.mkdir(exist_ok=True)
        original = file.read_bytes() if file.exists() else None
        for count, content in enumerate(contents, count + 1):
            if isinstance(content, (bytes, str)):
                file.write_bytes(content if isinstance(content, bytes) else content.encode())
            else:
                scipy.io.savemat(file, content) if file.suffix == ".mat" else torch.save(content, file)
            before = {(p, p.stat().st_mtime_ns) for p in tmp_path.rglob("*")}
            OPENED.clear()
            try:
                err = refused(command, word)
                assert any(sign in err for sign in (";", "expected", "--help", "must", "needed")), f"no remedy: {err}"
                new = {p.name for p in tmp_path.rglob("*") if p.is_file() and (p, p.stat().st_mtime_ns) not in before}
                assert new <= {"settings.json", "log.csv", "features.npy"}, new            # of a run that had begun
                assert str(path / "x.jpg") not in map(os.path.abspath, OPENED), "reads outside its folder"
            except Exception as e:
                wrong.append(f"{command} [{word}]: {type(e).__name__} {str(e)[:300]}")
        file.unlink() if original is None else file.write_bytes(original)
    assert count >= 450 and not wrong, f"{len(wrong)} of {count}:\n" + "\n".join(wrong)


def test_the_readmes_lesson_and_forks_run():
    """The three diffs, applied to a copy of the scripts, train and label; the lesson prints the tags of its scene."""
    def run(*args):
        return subprocess.run([sys.executable, *args], check=True, capture_output=True, text=True).stdout
    readme = (HERE / "README.md").read_text()
    for script in HERE.glob("*.py"):
        Path(script.name).write_text(script.read_text())
    for diff in re.findall(r"```diff\n(.*?)```", readme, re.S):
        lines, file = diff.splitlines(True)[3:], Path(re.search(r"\+\+\+ b/(\S+)", diff)[1])
        old, new = ("".join(line[1:] for line in lines if line[0] != sign) for sign in "+-")
        assert sum(line[0] in "+-" for line in lines) <= 8 and file.read_text().count(old) == 1, diff
        file.write_text(file.read_text().replace(old, new))
    assert "ilp+median" in run("train.py", *TOY.split(), "--steps", "2", "--aggregation", "top10", "--trunk", "wide")
    run("train.py", *TOY.split(), "--steps", "2")
    assert "speckle" in run("-c", re.search(r"```python\n(.*?)```", readme, re.S)[1])


def test_readme_commands_run_as_written():
    """Every command but the set-up lines (.ci/run runs those) and torchrun, in order, on tiny data of the README's names."""
    for name in ("train", "test", "val"):
        make_voc(name=name, root="VOCdevkit/VOC2012")
    for n, wnid in enumerate((1443537, 1484850, 1491361, 1494475)):        # fish: background
        photo(f"imagenet/n0{wnid}/x.JPEG", n, 60, 70)
        photo(f"photos/{n}.jpg", n, 70, 60)
    Path("tags.csv").write_text("0.jpg,cat\n1.jpg,cat;dog\n2.jpg,dog\n3.jpg,\n")
    save_vgg("vgg16_features.pth")
    Path("synsets.csv").write_text("n01443537,cat\nn00000001,dog\n")
    np.memmap("net_weight_1", mode="w+", shape=SLOW_OVERFEAT["overfeat"][0])
    Path("assets").symlink_to(HERE / "assets")
    small = dict.fromkeys(["voc", "folder"], "--size 64 --head 8 --self-rounds 1 --self-steps 1 --batch 4")
    small |= dict(toy="--toy-images 8 --toy-scenes 1 --batch 4", paper="--batch 1 --head 8 --workers 0 --synsets synsets.csv")
    lines = re.findall(r"^python (\w+)\.py *(\S*)(.*?)(?:  #.*)?$", (HERE / "README.md").read_text(), re.M)
    assert len(lines) >= 12
    for script, first, rest in lines:
        more = f"{small.get(first, small['toy'])} --steps 1 --threshold-images 1 --device cpu" if script == "train" else ""
        ok(f"{script} {first} {rest} {more}")
    assert all(Path(file).exists() for file in ("results.tgz", "out/voc/ladder.json", "out/voc/ladder.png", "out/toy/curves.png"))
    assert all(name.startswith("head.") for name in infer.read_checkpoint("out/paper/ckpt.pt")["model"])   # a licence matter
    ok("infer out/paper/ckpt.pt photos/0.jpg --weights net_weight_1 --dense 2 --device cpu --out l")
