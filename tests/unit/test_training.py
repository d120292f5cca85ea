"""The training loop: when it ends, what it keeps, and that an interruption leaves no trace in the numbers."""

from __future__ import annotations

import copy
import io

import numpy as np
import pytest
import timm
import torch
from torch import nn

from impactx.api import TrainedModel, train_impactx
from impactx.approaches.base import Bench, Candidate
from impactx.approaches.impactx import Impactx, impactx_loss
from impactx.approaches.wae import Wae
from impactx.datasets import Dataset, make_split
from impactx.datasets.batches import DeviceData
from impactx.datasets.entry import ImageSet
from impactx.models import build_classifier
from impactx.settings import AugmentationSettings, ModelSettings, TrainingSettings
from impactx.training import TrainingData, classification_loss, evaluate, fit
from impactx.training.loop import ResumeError, refuses_bfloat16

LENET = ModelSettings(name="lenet5", architecture="lenet5")
NORMED = ModelSettings(name="small", architecture="lcnet_035")  # a timm model with batch norm
HOW = {"learning_rate": 0.002, "batch_size": 16, "augmentation": AugmentationSettings(), "seed": 5}


def arrays(count=60, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 4, count)
    images = rng.integers(0, 150, (count, 32, 32, 3), dtype=np.uint8)
    for i, label in enumerate(labels):
        images[i, label * 6:label * 6 + 6, :, label % 3] += 100
    return images, labels, rng.normal(size=(count, 3, 32, 32)).astype(np.float32)


def data(with_maps=False, dtype=torch.float32, train=40) -> TrainingData:
    images, labels, maps = arrays()
    parts = [DeviceData(images, labels, part, maps=maps if with_maps else None, dtype=dtype)
             for part in (np.arange(train), np.arange(40, 60))]
    return TrainingData(*parts, np.arange(20) < 10)


def numbers(result):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in result.history]


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


class Scripted(nn.Module):
    """Gets the first script[epoch] of the 20 validation images right, and counts its epochs (one step each)."""

    def __init__(self, script, broken_at=None):
        super().__init__()
        self.script, self.broken_at = script, broken_at
        self.bias = nn.Parameter(torch.zeros(4))
        self.register_buffer("epoch", torch.zeros((), dtype=torch.int64))

    def forward(self, images):
        if self.training:
            self.epoch += 1
            return self.bias.expand(len(images), 4) * (float("nan") if self.broken_at == int(self.epoch) else 1.0)
        right = torch.arange(len(images)) < self.script[int(self.epoch) - 1]
        return torch.where(right[:, None], torch.tensor([9.0, 0, 0, 0]), torch.tensor([0.0, 9, 0, 0]))


def scripted(script, patience, epochs, broken_at=None):
    images = np.zeros((60, 8, 8, 3), np.uint8)
    parts = [DeviceData(images, np.zeros(60, np.int64), part) for part in (np.arange(40), np.arange(40, 60))]
    model = Scripted(script, broken_at)
    return fit(model, classification_loss, TrainingData(*parts, np.arange(20) < 10),
               TrainingSettings(patience=patience, epochs=epochs), **HOW | {"batch_size": 40})


@pytest.mark.parametrize("script, patience, epochs, length, best", [
    ([5, 6, 6, 6, 20], 2, 9, 4, 2),      # two epochs without a better one: over, and epoch 5 is never seen
    ([5, 6, 6, 6, 20, 0, 0, 0], 3, 9, 8, 5),  # patience 3 reaches it, and counts anew from there
    ([5, 4, 3, 2], 1, 9, 2, 1),
    ([1, 2, 3, 4], 1, 4, 4, 4),          # never worse: all epochs
    ([7, 7, 7], 5, 3, 3, 1),             # the first of equals
    ([0, 0, 0], 5, 3, 3, 1),             # nothing right is still a best epoch
])
def test_early_stopping_and_the_epoch_that_is_kept(script, patience, epochs, length, best):
    result = scripted([*script, *[0] * 9], patience, epochs)
    assert len(result.history) == length and result.best_epoch == best and not result.diverged
    assert int(result.best_state["epoch"]) == best and result.best["epoch"] == best
    assert [r["val_accuracy"] for r in result.history] == [k / 20 for k in script[:length]]
    assert [r["common_accuracy"] for r in result.history] == [min(k, 10) / 10 for k in script[:length]]
    assert [r["epoch"] for r in result.history] == list(range(1, length + 1))


def test_a_loss_that_is_not_finite_ends_the_training_and_keeps_the_best_before():
    result = scripted([5, 6, 4, 4, 4], 5, 5, broken_at=3)
    assert result.diverged and len(result.history) == 3 and result.best_epoch == 2
    assert int(result.best_state["epoch"]) == 2


@pytest.mark.parametrize("optimizer, lr", [("sgd", 1e6), ("adam", 1e30)])
def test_divergence_is_a_result_not_a_crash(optimizer, lr):
    store = []
    settings = TrainingSettings(epochs=6, optimizer=optimizer)
    model = build_classifier(LENET, 4, (32, 32), seed=0)
    result = fit(model, classification_loss, data(), settings, **HOW | {"learning_rate": lr}, save=store.append)
    assert result.diverged and len(result.history) == 1 and result.best_epoch == 0 and result.best_state is None
    with pytest.raises(ValueError, match="no best epoch"):
        _ = result.best
    again = fit(build_classifier(LENET, 4, (32, 32), seed=0), classification_loss, data(), settings,
                **HOW | {"learning_rate": lr}, load=lambda: store[-1])
    assert again.diverged and len(again.history) == 1


class Interrupted(Exception):
    pass


def stage1():
    return build_classifier(LENET, 4, (32, 32), seed=1), classification_loss, data()


def stage2():
    a = build_classifier(LENET, 4, (32, 32), seed=1)
    return Impactx(latent=16).build(LENET, a, seed=2), impactx_loss(0.8), data(with_maps=True)


def with_dropout():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = timm.create_model("lcnet_035", num_classes=4, drop_rate=0.5)
    return model, classification_loss, data()


@pytest.mark.parametrize("make", [stage1, stage2, with_dropout])
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_an_interruption_at_every_epoch_changes_nothing(make, optimizer):
    settings = TrainingSettings(epochs=4, patience=9, optimizer=optimizer)
    model, loss, images = make()
    undisturbed = fit(model, loss, images, settings, **HOW)
    assert len(undisturbed.history) == 4 and len({r["train_loss"] for r in undisturbed.history}) == 4
    kept: list[bytes] = []

    def stop(row):
        if row["epoch"] < 4:
            raise Interrupted

    for _ in range(3):
        other, loss, images = make()
        with pytest.raises(Interrupted):
            fit(other, loss, images, settings, **HOW, load=lambda: kept[-1] if kept else None, save=kept.append,
                on_epoch=stop)
        torch.rand(7)  # another process has another state of the global generator
    other, loss, images = make()
    resumed = fit(other, loss, images, settings, **HOW, load=lambda: kept[-1], save=kept.append, on_epoch=stop)
    assert len(kept) == 4 and numbers(resumed) == numbers(undisturbed)
    assert same(other.state_dict(), model.state_dict()) and same(resumed.best_state, undisturbed.best_state)
    assert resumed.best_epoch == undisturbed.best_epoch


def test_dropout_is_at_work_in_that_test():
    model, loss, images = with_dropout()
    settings = TrainingSettings(epochs=1)
    with_it = fit(model, loss, images, settings, **HOW)
    other, loss, images = with_dropout()
    other.drop_rate = 0.0
    assert numbers(fit(other, loss, images, settings, **HOW)) != numbers(with_it)


def test_a_finished_training_is_not_trained_further():
    kept = []
    settings = TrainingSettings(epochs=2)
    model, loss, images = stage1()
    first = fit(model, loss, images, settings, **HOW, save=kept.append)
    calls = []
    again = fit(stage1()[0], loss, images, settings, **HOW, load=lambda: kept[-1], on_epoch=calls.append)
    assert calls == [] and again.history == first.history and same(again.best_state, first.best_state)


@pytest.mark.parametrize("state", ["torn", "foreign", "empty"])
def test_a_state_that_cannot_be_used_is_said(state):
    kept = []
    model, loss, images = stage1()
    fit(model, loss, images, TrainingSettings(epochs=1), **HOW, save=kept.append)
    stream = io.BytesIO()
    torch.save({"model": {}, "optimizer": {}}, stream)
    content = {"torn": kept[0][:len(kept[0]) // 2], "foreign": stream.getvalue(), "empty": b""}[state]
    with pytest.raises(ResumeError, match="damaged or of another model"):
        fit(stage1()[0], loss, images, TrainingSettings(epochs=2), **HOW, load=lambda: content)


def test_equal_arguments_give_equal_numbers_and_the_global_generator_is_left_alone():
    settings = TrainingSettings(epochs=2)
    state = torch.get_rng_state()
    runs = []
    for seed in (5, 5, 6):
        model, loss, images = stage1()
        runs.append(numbers(fit(model, loss, images, settings, **HOW | {"seed": seed})))
    assert runs[0] == runs[1] != runs[2] and torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("model", [LENET, NORMED])
@pytest.mark.parametrize("weight", [0.0, 0.8])
def test_m_is_frozen_and_the_rest_learns(model, weight):
    a = build_classifier(model, 4, (32, 32), seed=1)
    net = Impactx(latent=16).build(model, a, seed=2)
    before = copy.deepcopy(net.state_dict())
    result = fit(net, impactx_loss(weight), data(with_maps=True), TrainingSettings(epochs=1), **HOW)
    after = net.state_dict()
    moved = {part: any(not torch.equal(before[k], after[k]) for k in before if k.startswith(f"{part}."))
             for part in ("a", "lep", "decoder", "c")}
    assert moved == {"a": False, "lep": True, "decoder": weight > 0, "c": True}
    assert result.history[0]["train_loss"] == pytest.approx(
        result.history[0]["train_ce"] + weight * result.history[0]["train_mse"], rel=1e-6)
    assert net.training and not net.a.training


def test_stage_2_without_maps_is_said():
    net, loss, _ = stage2()
    with pytest.raises(ValueError, match="needs a map for every image"):
        fit(net, loss, data(), TrainingSettings(epochs=1), **HOW)


BAD_MAPS = [
    (lambda m: m[:40], r"\(40, 3, 32, 32\) for 60 images"),
    (lambda m: np.concatenate([m, m]), r"\(120, 3, 32, 32\) for"),
    (lambda m: m[:, :1], r"\(60, 1, 32, 32\) for"), (lambda m: m[..., :28, :28], r"\(60, 3, 28, 28\) for"),
    (lambda m: np.full_like(m, np.nan), "maps of 60 images, the first of them image 0,.*not finite")]


def whole(tmp_path) -> tuple[Dataset, np.ndarray]:
    images, labels, maps = arrays()
    return Dataset("stripes", tuple("abcd"), (32, 32), "", "", [], "", tmp_path, ImageSet(images, labels)), maps


@pytest.mark.parametrize("change, says", BAD_MAPS)
def test_the_front_door_refuses_maps_of_other_images(tmp_path, change, says):
    stripes, maps = whole(tmp_path)
    a = TrainedModel(build_classifier(LENET, 4, (32, 32), seed=1).eval(), LENET, stripes.class_names)
    with pytest.raises(ValueError, match=says):
        train_impactx(a, stripes, change(maps), TrainingSettings(epochs=1))


@pytest.mark.parametrize("taught", ["own", "shuffled"])
@pytest.mark.parametrize("change, says", BAD_MAPS)
def test_stage_2_refuses_maps_of_other_images(tmp_path, taught, change, says):
    """The controls too, whose maps are other images'."""
    stripes, maps = whole(tmp_path)
    split = make_split(stripes.train.labels, 0.2, seed=0, common_fraction=0.2)
    says = says.replace("60 images, the first of them image 0,", ".*")  # of a part, in its order
    with pytest.raises(ValueError, match=says):
        Impactx(maps=taught).train(Bench(
            stripes, split, LENET, TrainingSettings(epochs=1), 0.01, 8, 0, candidate=Candidate(0.8),
            maps=lambda: (change(maps), 1.0), classifier=lambda: build_classifier(LENET, 4, (32, 32), seed=1)))


@pytest.mark.parametrize("maps, says", [
    ((), "none was given"), ((torch.zeros(2, 1, 32, 32),), r"\(2, 1, 32, 32\) were given")])
def test_wae_without_its_maps_says_so(maps, says):
    net = Wae(latent=16).build(LENET, build_classifier(LENET, 4, (32, 32), seed=1), seed=2).eval()
    for score in (net, net.classify):
        with pytest.raises(ValueError, match=rf"for every image, \(2, 3, 32, 32\) as the images are, and .*{says}"):
            score(torch.zeros(2, 3, 32, 32), *maps)


@pytest.mark.parametrize("settings", [{"optimizer": "adamw", "weight_decay": 0.1}, {"optimizer": "sgd"},
                                      {"precision": "bfloat16"}, {"precision": "float64"}])
def test_it_learns_with_every_optimizer_and_precision(settings):
    model, loss, _ = stage1()
    dtype = torch.float64 if settings.get("precision") == "float64" else torch.float32
    result = fit(model.to(dtype), loss, data(dtype=dtype), TrainingSettings(epochs=15, patience=15, **settings),
                 **HOW | {"learning_rate": 0.03 if settings.get("optimizer") == "sgd" else 0.004})
    assert result.best["val_accuracy"] > 0.6 and {t.dtype for t in model.parameters()} == {dtype}


class OnlyFloat32(nn.Module):
    """Adds scores of autocast's type into a buffer of float32, which torch refuses in bfloat16."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 4))

    def forward(self, images):
        scores = self.net(images)
        return torch.zeros(len(scores), 4).index_add(0, torch.arange(len(scores)), scores)


def test_a_network_that_cannot_run_in_bfloat16_is_trained_in_float32_and_says_so():
    found = {}
    for precision in ("bfloat16", "float32"):
        torch.manual_seed(0)
        found[precision] = fit(OnlyFloat32(), classification_loss, data(), TrainingSettings(
            epochs=2, precision=precision), **HOW)
    assert numbers(found["bfloat16"]) == numbers(found["float32"])
    assert "BFloat16" in found["bfloat16"].fallback and found["float32"].fallback is None


def test_to_ask_a_network_for_bfloat16_leaves_no_trace():
    net, part = build_classifier(NORMED, 4, (32, 32), seed=0).train(), data().train
    before, drawn = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    asked = TrainingSettings(precision="bfloat16")
    assert refuses_bfloat16(net, classification_loss, part, asked) is None
    assert same(before, net.state_dict()) and net.training and torch.equal(drawn, torch.get_rng_state())
    assert all(parameter.grad is None for parameter in net.parameters())
    assert fit(net, classification_loss, data(), asked.model_copy(update={"epochs": 1}), **HOW).fallback is None


def test_a_last_batch_of_one_image_is_no_obstacle_to_batch_norm():
    """lcnet has 1x1 pixels at its end here: torch refuses to normalise a single image."""
    model = build_classifier(NORMED, 4, (32, 32), seed=1)
    images = data(train=33)  # 16, 17
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        model.train()(torch.zeros(1, 3, 32, 32))
    assert not fit(model, classification_loss, images, TrainingSettings(epochs=1), **HOW).diverged


@pytest.mark.parametrize("size", [1, 7, 500])
def test_evaluation_is_the_plain_mean_whatever_the_batch_size(size):
    model, loss, images = stage1()
    model.train()
    found = evaluate(model, images.validation, loss, common=images.common, batch_size=size)
    pictures, labels, _ = arrays()
    with torch.no_grad():
        logits = copy.deepcopy(model).eval()(torch.from_numpy(pictures[40:]).permute(0, 3, 1, 2) / 255).double().numpy()
    hits = logits.argmax(1) == labels[40:]
    losses = np.log(np.exp(logits).sum(1)) - logits[np.arange(20), labels[40:]]
    assert found["accuracy"] == hits.mean() and found["common_accuracy"] == hits[:10].mean()
    assert found["loss"] == pytest.approx(losses.mean(), abs=1e-6) and model.training


def test_two_workers_take_the_steps_of_one(tmp_path):
    """Real processes over gloo, float64, with short last batches and a worker that gets no image of one."""
    import torch.multiprocessing

    torch.multiprocessing.spawn(_worker, (2, str(tmp_path)), nprocs=2)
    model, loss, _ = stage1()
    images = data(dtype=torch.float64, train=35)
    alone = fit(model.double(), loss, images, TrainingSettings(epochs=2, eval_batch_size=7), **HOW)
    for rank in (0, 1):
        history, state = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for mine, theirs in zip(alone.history, history, strict=True):
            for name in set(mine) - {"seconds"}:
                assert theirs[name] == pytest.approx(mine[name], abs=1e-9), name
        for name, tensor in model.state_dict().items():
            torch.testing.assert_close(state[name], tensor, rtol=0, atol=1e-9)


def _worker(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    model, loss, _ = stage1()
    images = data(dtype=torch.float64, train=35)
    result = fit(model.double(), loss, images, TrainingSettings(epochs=2, eval_batch_size=7), **HOW, rank=rank,
                 world_size=world)
    torch.save((result.history, model.state_dict()), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()
