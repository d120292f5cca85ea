"""Single-stage training: whose maps are learnt when, and that an interruption leaves no trace in the numbers."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch

from impactx.approaches.base import Bench, Candidate
from impactx.approaches.single_stage import SingleStage, single_stage_loss
from impactx.datasets import load_dataset, make_split
from impactx.datasets.batches import Batch
from impactx.explain.partition.engine import partition_shap
from impactx.settings import (
    AugmentationSettings,
    DatasetSettings,
    ModelSettings,
    TrainingSettings,
    extensions,
)
from impactx.training import LoopArguments
from impactx.training.loop import ResumeError

LENET = ModelSettings(name="lenet5", architecture="lenet5")
# With a fixed context the engine takes the module as it is: nothing is frozen and compiled in each round.
ATTRIBUTION = extensions.attribution.parse({"method": "partition", "max_evals": 10, "batch_size": 4, "fixed_context": 1})


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits")
    return load_dataset(DatasetSettings(name="digits", source="digits", subset=60), folder, folder)


class Folder(dict):
    """Files in memory."""

    def write(self, name, content):
        self[name] = content

    def read(self, name):
        if name not in self:
            raise FileNotFoundError(name)
        return self[name]

    def delete(self, name):
        self.pop(name, None)


class Interrupted(Exception):
    pass


def train(data, *, epochs=4, weight=0.8, precision="float32", files=None, state=None, stop_at=None, scale="std",
          memory_mb=4096, seed=3, **approach):
    """files and state hold what a process leaves behind; stop_at: an epoch after which it dies."""
    files, state = Folder() if files is None else files, {} if state is None else state

    def on_epoch(row):
        if row["epoch"] == stop_at:
            raise Interrupted

    training = TrainingSettings(epochs=epochs, patience=9, precision=precision).model_copy(
        update={"memory_mb": memory_mb})
    trained = SingleStage(latent=16, **approach).train(Bench(
        data, make_split(data.train.labels, 0.2, common_fraction=0.2, seed=0), LENET, training, 0.003, 16, seed,
        AugmentationSettings(flip=False, shift=1), Candidate(weight), ATTRIBUTION, scale, LoopArguments(
            load=lambda: state.get("state"), save=lambda content: state.update(state=content), on_epoch=on_epoch),
        files=files))
    return trained.model, trained.fit


def numbers(result):
    return [{k: v for k, v in row.items() if "seconds" not in k} for row in result.history]


def kept_maps(files) -> tuple[str, np.ndarray, np.ndarray]:
    [name] = files
    with np.load(io.BytesIO(files[name])) as held:
        return name, held["indices"], held["maps"]


def test_the_loss_is_equation_1_over_the_images_that_have_a_map():
    net = SingleStage(latent=16).build(LENET, 4, (32, 32), seed=0).double()
    generator = torch.Generator().manual_seed(0)
    images, maps = (torch.rand(5, 3, 32, 32, generator=generator, dtype=torch.float64) for _ in range(2))
    labels, weights = torch.tensor([0, 1, 2, 3, 0]), torch.full((5,), 0.2, dtype=torch.float64)
    maps[1], maps[3, :, 4:] = float("nan"), float("nan")  # of the last, a border was moved in as zeros
    logits, drawn, own = net(images)
    ce = -logits.log_softmax(1)[torch.arange(5), labels].mean()
    mse = sum(((drawn[i] - maps[i]) ** 2).mean() for i in (0, 2, 4)) / 5
    extra = -own.log_softmax(1)[torch.arange(5), labels].mean()
    found, terms = single_stage_loss(0.7, 0.3)(net, Batch(images, labels, maps, weights, 5))
    assert torch.equal(found, logits) and terms.keys() == {"loss", "ce", "mse", "auxiliary_ce"}
    torch.testing.assert_close(terms["loss"], ce + 0.7 * mse + 0.3 * extra)
    terms["loss"].backward()
    assert all(torch.isfinite(p.grad).all() for p in net.parameters() if p.grad is not None)
    _, without = single_stage_loss(0.7, 0.0)(net, Batch(images, labels, None, weights, 5))
    assert without.keys() == {"loss", "ce", "mse"} and without["mse"] == 0
    torch.testing.assert_close(without["loss"], ce)
    gradients = torch.autograd.grad(without["loss"], list(net.decoder.parameters()))
    assert all((g == 0).all() for g in gradients)  # takes part, as data-parallel workers need, and learns nothing


@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_a_round_explains_the_networks_own_score_of_the_true_class(data, precision):
    files, state = Folder(), {}
    with pytest.raises(Interrupted):
        train(data, files=files, state=state, stop_at=1, precision=precision)
    name, indices, maps = kept_maps(files)
    split = make_split(data.train.labels, 0.2, common_fraction=0.2, seed=0)
    assert name == "running-maps-00001.npz" and (indices == split.train).all()
    net = SingleStage(latent=16).build(LENET, 10, (32, 32), seed=9)
    found = torch.load(io.BytesIO(state["state"]), weights_only=True)["model"]
    net.to(found["c.weight"].dtype).load_state_dict(found)
    net.eval().float()
    images, labels = data.train.images[split.train], data.train.labels[split.train]
    with torch.no_grad():
        alone = partition_shap(lambda x: net.classify(x).gather(1, torch.zeros(len(x), 1, dtype=torch.int64)),
                               np.array(images[labels == 0]), "all", max_evals=10, batch_size=4, fixed_context=1)
    np.testing.assert_allclose(maps[labels == 0], alone.values[:, 0], atol=0.01 * np.abs(alone.values).max())
    assert np.abs(alone.values).max() > 1e-6
    assert float(net.factor) == pytest.approx(1 / maps.astype(np.float64).std(), rel=1e-6)


def test_maps_are_learnt_from_the_round_after_the_first_and_only_then(data):
    _, result = train(data, explain_every=2, epochs=5)
    assert [row["train_mse"] > 0 for row in result.history] == [False, False, True, True, True]
    count = len(make_split(data.train.labels, 0.2, common_fraction=0.2, seed=0).train)
    assert [row.get("explained_images") for row in result.history] == [None, count, None, count, None]
    assert all("val_mse" not in row and row["val_loss"] > 0 for row in result.history)
    spent = sum(row["explain_seconds"] for row in result.history if "explain_seconds" in row)
    assert 0 < spent < sum(row["seconds"] for row in result.history)
    without, _ = train(data, explain_every=2, epochs=2)
    assert float(without.factor) == 0.0  # the network of epochs that had no map


def test_a_share_is_drawn_anew_and_the_others_keep_their_maps(data):
    files, state = Folder(), {}
    covered, seen = set(), []
    for epoch in (1, 2, 3):
        with pytest.raises(Interrupted):
            train(data, files=files, state=state, stop_at=epoch, explain_share=0.25)
        name, indices, maps = kept_maps(files)
        assert name == f"running-maps-{epoch:05d}.npz" and covered <= set(indices) and len(indices) <= 12 * epoch
        covered, seen = set(indices), [*seen, len(indices)]
        assert np.isfinite(maps).all()
    assert seen[0] == 12 and seen[2] > seen[1] > 12


@pytest.mark.parametrize("approach", [{}, {"explain_every": 2}, {"explain_share": 0.4, "auxiliary": 0.5},
                                      {"m": "penultimate"}, {"scale": "max_abs"}], ids=str)
def test_an_interruption_at_every_epoch_changes_nothing(data, approach):
    undisturbed_files = Folder()
    net, undisturbed = train(data, files=undisturbed_files, **approach)
    assert undisturbed_files == {} and len(undisturbed.history) == 4
    files, state = Folder(), {}
    for epoch in (1, 2, 3):
        with pytest.raises(Interrupted):
            train(data, files=files, state=state, stop_at=epoch, **approach)
        assert len(files) == (epoch >= approach.get("explain_every", 1))
    other, resumed = train(data, files=files, state=state, **approach)
    assert numbers(resumed) == numbers(undisturbed) and files == {}
    assert all(torch.equal(t, other.state_dict()[n]) for n, t in net.state_dict().items())


def test_a_process_that_dies_between_its_maps_and_its_checkpoint_goes_on_from_the_round_before(data):
    _, undisturbed = train(data)
    files, state = Folder(), {}
    with pytest.raises(Interrupted):
        train(data, files=files, state=state, stop_at=1)
    before, old = dict(files), dict(state)
    with pytest.raises(Interrupted):
        train(data, files=files, state=state, stop_at=2)
    both = Folder(before | files)  # the maps of epoch 2 are written, its checkpoint is not
    _, resumed = train(data, files=both, state=old)
    assert numbers(resumed) == numbers(undisturbed) and both == {}


@pytest.mark.parametrize("damage", ["missing", "torn", "foreign"])
def test_maps_that_cannot_be_had_again_are_named(data, damage):
    files, state = Folder(), {}
    with pytest.raises(Interrupted):
        train(data, files=files, state=state, stop_at=2)
    name = "running-maps-00002.npz"
    if damage == "missing":
        files.clear()
    else:
        files[name] = files[name][:1000] if damage == "torn" else b"something else"
    with pytest.raises(ResumeError, match=f"its maps, {name}, are missing or damaged"):
        train(data, files=files, state=state)


def test_m_learns_and_a_finished_training_is_left_alone(data):
    state, files = {}, Folder()
    net, result = train(data, epochs=2, files=files, state=state)
    start = SingleStage(latent=16).build(LENET, 10, (32, 32), seed=3).state_dict()
    last = torch.load(io.BytesIO(state["state"]), weights_only=True)["model"]  # the best epoch may be the first
    for part in ("a.trunk", "a.head", "lep", "decoder", "c"):
        assert any(not torch.equal(start[n], last[n]) for n in start if n.startswith(part)), part
    _, again = train(data, epochs=2, files=files, state=state)
    assert again.history == result.history and files == {}


def test_a_data_set_above_the_memory_budget_trains_to_the_same_numbers(data):
    assert numbers(train(data, explain_share=0.5)[1]) == numbers(train(data, explain_share=0.5, memory_mb=0)[1])


class Kept(Folder):
    """Deletes nothing."""

    def delete(self, name):
        pass


def test_two_workers_share_the_maps_and_take_the_steps_of_one(data, tmp_path):
    import torch.multiprocessing

    torch.multiprocessing.spawn(_worker, (2, str(tmp_path)), nprocs=2)
    alone, files = _two_epochs(tmp_path / "alone", 0, 1)
    (tmp_path / "alone.npz").write_bytes(files["running-maps-00001.npz"])
    ours, theirs = np.load(tmp_path / "alone.npz"), np.load(tmp_path / "0.npz")
    assert (ours["indices"] == theirs["indices"]).all()
    # Made in float32 and in groups of other sizes: rounding is all that differs, and each image has its own map.
    np.testing.assert_allclose(theirs["maps"], ours["maps"], atol=0.02 * np.abs(ours["maps"]).max())
    assert np.abs(ours["maps"][0] - ours["maps"][1]).max() > 0.1 * np.abs(ours["maps"]).max()
    for rank in (0, 1):
        history = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for mine, other in zip(alone.history, history, strict=True):
            for name in mine:
                if "seconds" not in name:
                    assert other[name] == pytest.approx(mine[name], rel=1e-9 if mine["epoch"] == 1 else 0.02), name


def _two_epochs(folder, rank: int, world: int):
    data = load_dataset(DatasetSettings(name="digits", source="digits", subset=60), folder, folder)
    files = Kept()
    trained = SingleStage(latent=16).train(Bench(
        data, make_split(data.train.labels, 0.2, common_fraction=0.2, seed=0), LENET,
        TrainingSettings(epochs=2, precision="float64"), 0.02, 16, 3, AugmentationSettings(flip=False, shift=1),
        Candidate(0.8), ATTRIBUTION, "std", LoopArguments(rank=rank, world_size=world), files=files))
    return trained.fit, files


def _worker(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    result, files = _two_epochs(f"{folder}/{rank}", rank, world)
    torch.save(result.history, f"{folder}/{rank}.pt")
    for content in files.values():  # rank 0 has one file, the other none
        Path(folder, f"{rank}.npz").write_bytes(content)
    torch.distributed.destroy_process_group()
