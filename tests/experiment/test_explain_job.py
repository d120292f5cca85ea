"""jobs/explain.py without Ray: its command line, the three sources of a model, the store, --verify, the sheet."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from impactx.approaches.checkpoint import save_checkpoint
from impactx.approaches.impactx import Impactx
from impactx.cli.options import explain_options
from impactx.configuration import ConfigurationError
from impactx.datasets import DataError, load_dataset
from impactx.experiment.model_source import timm_classifier
from impactx.experiment.steps.base import StepError
from impactx.experiment.steps.maps import ShardWorker
from impactx.explain.maps.sheet import SheetError
from impactx.models import build_classifier
from impactx.run import explain as explain_job
from impactx.run.local import LocalExecutor
from impactx.run.no_tracker import NoTracker
from impactx.settings import DatasetSettings, ModelSettings

ROOT = Path(__file__).resolve().parents[2]
JOB = str(ROOT / "jobs" / "explain.py")
LENET = ModelSettings(name="lenet5", architecture="lenet5")


@pytest.fixture(scope="module")
def data_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.fixture
def options(tmp_path, data_folder):
    """Parsed options of a small job on the digits, in 3 shards."""
    def parse(*arguments: str):
        return explain_options("", JOB, [
            *arguments, "dataset=digits", "datasets.digits.subset=60", "maps.shard_size=25", f"output={tmp_path}/out",
            f"data_root={data_folder}", "attribution=partition", "attribution.max_evals=20"])
    return parse


def prepared(options) -> explain_job.Explained:
    return explain_job.prepare(options.settings(), options.choice())


def explained(options) -> tuple[explain_job.Explained, str]:
    job = prepared(options)
    return job, explain_job.run(job, lambda: LocalExecutor(job.place, NoTracker()))


def checkpoint(folder: Path, seed: int = 0, name: str = "net.pt") -> str:
    model = build_classifier(LENET, 10, (32, 32), seed=seed)
    (folder / name).write_bytes(save_checkpoint(model, model_settings=LENET, class_names=list("0123456789")))
    return str(folder / name)


@pytest.mark.parametrize("arguments, said", [
    (["dataset=digits"], "which model?"), (["--timm", "resnet18"], "needs --weights"),
    (["--model", "a", "--timm", "b", "--weights", "random"], "not allowed with"),
    (["--model", "a", "--weights", "w.pth"], "goes with --timm"),
    (["--model", "a", "--sheet-images", "0"], "at least 1")])
def test_a_wrong_command_line(arguments, said, capsys):
    with pytest.raises(SystemExit) as caught:
        explain_options("", JOB, arguments)
    assert caught.value.code == 2 and said in capsys.readouterr().err


@pytest.mark.parametrize("overrides, said", [
    ([], "3 data sets (cifar10, cifar100, stl10): choose the one"),
    (["dataset=digits", "model=lenet5"], "model = lenet5: this job has no such setting"),
    (["dataset=digits", "training.epochs=3"], "training = {'epochs': 3}: no such setting"),
    (["dataset=digits", "attribution.windw=3"], "no such setting with method partition"),
    (["dataset=digits", "maps.shard_siz=3"], "did you mean 'shard_size'?")])
def test_wrong_settings(overrides, said):
    with pytest.raises(ConfigurationError) as caught:
        explain_options("", JOB, ["--model", "x", *overrides]).settings()
    assert said in str(caught.value)


def test_a_checkpoint_is_explained_resumed_verified_and_drawn(options, tmp_path):
    chosen = options("--model", checkpoint(tmp_path))
    job, said = explained(chosen)
    assert "60 maps in 3 shards" in said and job.address in said and explain_job.verify(job.address) == []
    assert "3, of which 3 are there" in explain_job.plan(chosen.settings(), job)
    # what an experiment would call these maps: its A is explained only once, whoever asks
    assert job.step.recipe["explained"] == {
        "architecture": "lenet5", "input_size": None, "kind": None, "code": None}

    shards = [Path(job.address, job.store().shard_name(k)) for k in range(3)]
    before = [shard.stat().st_mtime_ns for shard in shards]
    again = prepared(chosen)
    assert again.step.key == job.step.key and "60 maps" in explain_job.run(again, lambda: pytest.fail("nothing to do"))
    whole = shards[1].read_bytes()
    shards[1].unlink()
    assert "3, of which 2 are there" in explain_job.plan(chosen.settings(), job)
    explained(chosen)
    assert shards[1].read_bytes() == whole
    assert [shards[k].stat().st_mtime_ns for k in (0, 2)] == [before[0], before[2]]

    shards[2].write_bytes(whole)
    shards[0].write_bytes(shards[0].read_bytes()[:-100])
    problems = explain_job.verify(job.address)
    assert len(problems) == 2 and shards[0].name in problems[0] and "torn" in problems[0]
    assert shards[2].name in problems[1]
    done = subprocess.run([sys.executable, JOB, "--verify", job.address], capture_output=True, text=True)
    assert done.returncode == 1 and shards[0].name in done.stdout and shards[2].name in done.stdout


def pictures(folder: Path, parts: tuple[str, ...]) -> None:
    """Two classes of 10 grey images of 16x12 in each part."""
    for number, (part, name) in enumerate((p, n) for p in parts for n in ("cat", "dog")):
        (folder / part / name).mkdir(parents=True)
        for k in range(10):
            pixels = np.random.default_rng(10 * number + k).integers(0, 256, (16, 12), np.uint8)
            Image.fromarray(pixels).save(folder / part / name / f"{k}.png")


@pytest.mark.parametrize("parts, settings, images", [
    (("",), {}, 20), (("",), {"test_fraction": 0.2}, 16), (("train", "test"), {}, 20)])
def test_every_image_of_a_folder_is_explained_and_what_happened_to_it_told(parts, settings, images, tmp_path, caplog):
    pictures(tmp_path / "mine", parts)
    options = explain_options("", JOB, [
        "--timm", "test_efficientnet", "--weights", "random", "dataset=my_images", f"datasets.my_images.path={tmp_path}"
        "/mine", "datasets.my_images.image_size=32", f"output={tmp_path}/out", f"data_root={tmp_path}",
        *(f"datasets.my_images.{key}={value}" for key, value in settings.items())])
    with caplog.at_level(logging.INFO, "impactx"):
        job = prepared(options)
    assert len(job.data.train) == images and f"{images} train images of kind grey were converted" in caplog.text
    assert f"{images} train images of 16x12 were resized to 32x32" in caplog.text
    # what an experiment would call them, where it explains the same images
    experiments = load_dataset(DatasetSettings(name="my_images", path=f"{tmp_path}/mine", image_size=32), tmp_path)
    assert (job.step.recipe["data"] == experiments.fingerprint) == (settings != {} or len(parts) == 2)
    assert len(ShardWorker(job.step, job.place).images) == images  # of every process


def test_the_sheet(options, tmp_path):
    matplotlib = pytest.importorskip("matplotlib.image")
    job, _ = explained(options("--model", checkpoint(tmp_path)))
    chosen = explain_job.examples(job, 10)
    assert sorted(job.data.train.labels[chosen]) == list(range(10))
    np.testing.assert_array_equal(chosen, explain_job.examples(job, 10))
    explain_job.draw(job, tmp_path / "sheet.png", 5)
    picture = matplotlib.imread(tmp_path / "sheet.png")[..., :3]
    assert picture.shape[1] > 1000
    strongest = picture[..., 0] - picture[..., 2]
    assert strongest.max() > 0.3 and strongest.min() < -0.3  # red and blue: both signs are there
    for path in (tmp_path / "none" / "sheet.png", tmp_path / "sheet.jpg"):
        with pytest.raises(SheetError, match="a .png file in a folder that exists"):
            explain_job.draw(job, path, 2)


@pytest.mark.parametrize("more", [[], ["--dry-run"]])
def test_a_sheet_that_cannot_be_drawn_is_told_before_anything_is_made(options, tmp_path, more, monkeypatch):
    sheet = options("--model", checkpoint(tmp_path), "--sheet", f"{tmp_path}/none/x.jpg")
    done = subprocess.run([sys.executable, JOB, "--model", str(tmp_path / "net.pt"), "--sheet",
                           f"{tmp_path}/none/x.jpg", *more, *sheet.overrides], capture_output=True, text=True)
    assert done.returncode == 2 and "none/x.jpg: give a .png file in a folder that exists" in done.stderr
    assert not (tmp_path / "out").exists()
    for module in {"matplotlib", *(m for m in sys.modules if m.startswith("matplotlib."))}:
        monkeypatch.setitem(sys.modules, module, None)  # Python's own way to say that it is not there
    with pytest.raises(SheetError, match="needs matplotlib"):
        explain_job.prepare(sheet.settings(), sheet.choice(), tmp_path / "x.png")


def test_impactx_is_explained_by_its_own_logits(options, tmp_path):
    a = build_classifier(LENET, 10, (32, 32), seed=0)
    net = Impactx(latent=16).build(LENET, a, seed=0).eval()
    (tmp_path / "x.pt").write_bytes(save_checkpoint(
        net, model_settings=LENET, approach=Impactx(latent=16), class_names=list("0123456789")))
    job, _ = explained(options("--model", str(tmp_path / "x.pt")))
    scores = job.store().read_shard(0)["score"].to_numpy()
    x = torch.from_numpy(np.array(job.data.train.images[:25])).permute(0, 3, 1, 2) / 255
    with torch.no_grad():
        expected = net.classify(x)[range(25), job.data.train.labels[:25]].numpy()
    np.testing.assert_allclose(scores, expected, atol=1e-5)


def test_a_timm_model_with_a_file_of_weights(options, tmp_path):
    settings = ModelSettings(name="x", architecture="test_efficientnet")
    model = timm_classifier(settings, 10, (32, 32))
    torch.save(model[1].state_dict(), tmp_path / "w.pth")
    with torch.no_grad():
        model[1].classifier.weight.mul_(2)
    torch.save(model[1].state_dict(), tmp_path / "other.pth")
    parse = ["--timm", "test_efficientnet", "--weights"]
    jobs = [prepared(options(*parse, str(w))) for w in (tmp_path / "w.pth", tmp_path / "other.pth", "random")]
    assert jobs[0].step.key == jobs[2].step.key != jobs[1].step.key  # random: from seed 0, as the file was
    assert prepared(options(*parse, "random", "--mean", "0", "0", "0")).step.key != jobs[2].step.key
    ShardWorker(jobs[0].step, jobs[0].place).make(2)
    assert jobs[0].store().missing() == [0, 1]
    (tmp_path / "w.pth").write_bytes((tmp_path / "other.pth").read_bytes())
    with pytest.raises(StepError, match="give every node the same files"):
        ShardWorker(jobs[0].step, jobs[0].place)


def test_wrong_weights_of_a_timm_model(options, tmp_path):
    torch.save(timm_classifier(ModelSettings(name="x", architecture="test_efficientnet"), 7, (32, 32))[1].state_dict(),
               tmp_path / "seven.pth")
    for arguments, said in [(["test_efficientnet", "--weights", str(tmp_path / "seven.pth")], "classifier.weight"),
                            (["test_efficientnet", "--weights", str(tmp_path / "none.pth")], "none.pth"),
                            (["test_efficentnet", "--weights", "random"], "close to it: test_efficientnet"),
                            (["lenet5", "--weights", "random"], "no model of timm"),
                            (["resnet18", "--weights", "hub"], "have 1000 classes, the images have 10")]:
        with pytest.raises(StepError, match=said):
            prepared(options("--timm", *arguments))
    with pytest.raises(ConfigurationError, match="--input-size"):
        options("--timm", "resnet18", "--weights", "random", "--input-size", "2").choice()


def test_addresses_stay_addresses_and_paths_become_absolute(options, tmp_path, monkeypatch):
    asked = []

    def opened(dataset, *_, **__):
        asked.append(dataset.path)
        raise DataError("not read here")

    monkeypatch.setattr(explain_job, "opened", opened)
    monkeypatch.chdir(tmp_path)
    for path, weights, model in (("s3://b/images", "s3://b/w.safetensors", "s3://b/net.pt"),
                                 ("images", "w.safetensors", "net.pt")):
        timm = options("--timm", "resnet18", "--weights", weights, f"datasets.digits.path={path}")
        with pytest.raises(DataError, match="not read here"):
            prepared(timm)
        here = "" if "://" in path else f"{tmp_path}/"
        data = SimpleNamespace(num_classes=10, image_size=(32, 32))
        assert asked.pop() == here + path and timm.choice().source(data).model.weights == here + weights
        assert options("--model", model).choice().source(data).path == here + model


CODE = """
import torch
from torch import nn
class Nan(nn.Module):
    def forward(self, x): return x.mean((2, 3)).repeat(1, 4) * torch.nan
def good(): return nn.Sequential(nn.Conv2d(3, 4, 5, stride=4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 49, 10))
def few(): return nn.Sequential(nn.Flatten(), nn.Linear(3072, 4))
def small(): return nn.Sequential(nn.Flatten(), nn.Linear(30, 10))
def maps(): return nn.Conv2d(3, 10, 1)
def nan(): return Nan()
def text(): return "net"
"""


def test_an_import_path(options, tmp_path, monkeypatch):
    (tmp_path / "code_of_mine.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    job, said = explained(options("--import", "code_of_mine:good"))
    assert "60 maps" in said and job.step.recipe["explained"]["kind"] == "code_of_mine:good"
    worker = ShardWorker(prepared(options("--import", "code_of_mine:good")).step, job.place)
    assert isinstance(worker.model, nn.Sequential) and not worker.model.training
    for path, said in [("code_of_mine:few", "4 scores, the images have 10 classes"),
                       ("code_of_mine:small", "cannot take"),
                       ("code_of_mine:maps", r"\(1, 10, 32, 32\)"), ("code_of_mine:nan", "not finite"),
                       ("code_of_mine:text", "returned a str"), ("code_of_mine:none", "has no none"),
                       ("no_code_of_mine:good", "No module named"), ("code_of_mine", "package.module:function")]:
        with pytest.raises(StepError, match=said):
            prepared(options("--import", path))


ONE_IMAGE = """
import torch
from torch import nn
class One(nn.Module):
    def forward(self, x):
        this = (x.double().sum((1, 2, 3)) - {total}).abs() < 1e-6
        return torch.where(this[:, None], torch.nan, x[:, 0, :10, 16])
def net(): return One()
"""


def test_nan_for_one_image_names_it_and_loses_no_finished_map(options, tmp_path, monkeypatch):
    job = prepared(options("--model", checkpoint(tmp_path)))
    image = torch.from_numpy(job.place.dataset(job.step.dataset).train.images[40]).float() / 255
    (tmp_path / "one_of_mine.py").write_text(ONE_IMAGE.format(total=float(image.double().sum())))
    monkeypatch.chdir(tmp_path)
    job = prepared(options("--import", "one_of_mine:net"))
    with pytest.raises(Exception, match="NaN or infinite values for image 40: "):
        explain_job.run(job, lambda: LocalExecutor(job.place, NoTracker()))
    store = job.store()
    assert store.missing() == [1, 2], "image 40 is in the second shard; the first is whole"
    assert len(store.read_shard(0)) == 25
    assert not [path for path in Path(job.address).rglob("*") if path.name.startswith(".partial-")]


NET = """
from torch import nn
from {package}.numbers import MEAN
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3072, 10)
    def forward(self, x): return self.linear((x - MEAN).flatten(1))
"""


def test_other_code_around_the_same_weights_is_another_store(options, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))

    def key(folder: str, mean: float, more: str = "") -> str:
        for name in [m for m in sys.modules if m.partition(".")[0] in ("nets_of_mine", "start_of_mine")]:
            del sys.modules[name]
        package = tmp_path / folder / "nets_of_mine"
        package.mkdir(parents=True)
        (package / "__init__.py").write_text("")
        (package / "numbers.py").write_text(f"MEAN = {mean}\n")
        (package / "net.py").write_text(NET.format(package=""))  # from .numbers
        (package.parent / "start_of_mine.py").write_text(
            f"import json, numpy, impactx\nfrom nets_of_mine import net\ndef build(): return net.Net()\n{more}")
        monkeypatch.chdir(package.parent)
        job = prepared(options("--import", "start_of_mine:build"))
        assert job.step.key == prepared(options("--import", "start_of_mine:build")).step.key
        weights.add(job.step.recipe["weights"])
        return job.step.key

    weights: set[str] = set()
    first = key("a", 0.5)
    assert first == key("b", 0.5) == key("e", 0.5, "# a comment")
    assert len({first, key("c", 0.4), key("d", 0.5, "SIZE = 3")}) == 3
    assert len(weights) == 1


def test_absent_and_foreign_checkpoints(options, tmp_path):
    with pytest.raises(StepError, match="none.pt"):
        prepared(options("--model", str(tmp_path / "none.pt")))
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(StepError, match="no checkpoint"):
        prepared(options("--model", str(tmp_path / "text.pt")))
