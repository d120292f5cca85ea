"""The tracker's protocol, the tracker that keeps nothing, and how settings become flat parameters."""

import pickle
import signal
from pathlib import Path

import numpy as np
import pytest

from impactx.run.no_tracker import ContextRun, NoRun, NoTracker
from impactx.run.tracker import RunIdentity, check_key
from impactx.run.values import clean_key, epochs, flatten, numbers
from impactx.settings import GridSettings


def test_flatten_is_complete_and_dotted():
    nested = {"a": {"b": {"c": 1}}, "lr": 1e-4, "none": None, "on": True, "list": [0.2, 0.4], "empty": {},
              "no": [], "path": Path("x/y"), "objects": [{"k": 1}, [2, 3]], 5: "five"}
    assert flatten(nested) == {
        "a.b.c": "1", "lr": "0.0001", "none": "None", "on": "True", "list": "[0.2, 0.4]", "empty": "{}",
        "no": "[]", "path": "x/y", "objects.0.k": "1", "objects.1": "[2, 3]", "5": "five"}


def test_flatten_takes_settings_as_they_are():
    flat = flatten({"grid": GridSettings()})
    assert flat["grid.batch_size"] == "[16, 32, 64]" and flat["grid.select_on"] == "common"
    assert len(flat) == len(GridSettings.model_fields)


def test_flatten_of_nothing_is_empty():
    assert flatten({}) == {}


def test_flatten_refuses_two_values_for_one_name():
    with pytest.raises(ValueError, match="a.b.*1.*2"):
        flatten({"a.b": 1, "a": {"b": 2}})


@pytest.mark.parametrize("key", ["lr", "a.b-c_d", "stage 1: lr", "a/b", "λ"])
def test_good_names_stay(key):
    assert clean_key(key) == key


@pytest.mark.parametrize("key", ["a+b", "a=b", "../../etc", "a//b", "", "x" * 400, "/a", "."])
def test_bad_names_become_accepted_ones(key):
    from mlflow.utils.validation import _validate_metric_name, _validate_param_name

    clean = clean_key(key)
    _validate_param_name(clean)
    _validate_metric_name(clean)
    assert len(clean) <= 250 and clean == clean_key(key)


def test_different_bad_names_stay_different():
    assert clean_key("a+b") != clean_key("a*b")
    assert clean_key("x" * 300 + "1") != clean_key("x" * 300 + "2")


def test_numbers_takes_scalars_and_names_what_is_none():
    assert numbers({"a": np.float32(0.5), "b": 2, "c": True}) == {"a": 0.5, "b": 2.0, "c": 1.0}
    with pytest.raises(TypeError, match="'acc'.*None"):
        numbers({"acc": None})


def test_epochs_count_from_one_or_by_their_own_number():
    assert epochs([{"acc": 0.1}, {"acc": 0.2}]) == [(1, {"acc": 0.1}), (2, {"acc": 0.2})]
    assert epochs([{"epoch": 7, "acc": 0.1}]) == [(7, {"acc": 0.1})]


@pytest.mark.parametrize("key", ["", "it's", 'a"b', "a`b", "a\nb", "a\\b", "x" * 251])
def test_keys_that_cannot_be_searched_are_refused(key):
    with pytest.raises(ValueError, match="run key"):
        check_key(key)


def test_no_tracker_does_everything_and_keeps_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tracker = pickle.loads(pickle.dumps(NoTracker()))
    tracker.prepare()
    with tracker.run(RunIdentity("job", "job", parameters={"a": {"b": 1}}, tags={"t": 1})) as job, \
            tracker.run(RunIdentity("job/1", "trial", parent="job")) as run:
        run.log_metrics({"acc": 0.5}, step=1)
        run.log_history([{"acc": 0.5}])
        run.log_params({"x": [1]})
        run.set_tags({"x": 1})
        run.log_text("text", "a.txt")
        run.log_bytes(b"\x89PNG", "a.png")
        run.log_file("nowhere", "folder")
        job.finish()
    tracker.replay(RunIdentity("job/2", "reused", parent="job"), history=[{"acc": 0.5}], final={"best": 0.5})
    assert tracker.close_unfinished("job") == 0
    assert "tracking.enabled" in tracker.describe()[0]
    assert not list(tmp_path.iterdir())


def test_no_tracker_sees_the_same_mistakes():
    with pytest.raises(TypeError, match="acc"):
        NoRun().log_metrics({"acc": "high"})
    with pytest.raises(ValueError, match="run key"):
        NoTracker().run(RunIdentity("it's", "x"))
    with pytest.raises(TypeError, match="best"):
        NoTracker().replay(RunIdentity("k", "x"), final={"best": None})


def test_no_run_lets_exceptions_through():
    with pytest.raises(ZeroDivisionError), NoTracker().run(RunIdentity("job", "job")):
        raise ZeroDivisionError


class Ended(ContextRun):
    """A run that remembers how it ended."""

    def finish(self, status="FINISHED", error=None):
        self.ended = (status, error)


@pytest.mark.parametrize("error, status", [
    (ValueError("lost it"), "FAILED"), (KeyboardInterrupt(), "KILLED"), (SystemExit(143), "KILLED"),
    (SystemExit(0), "FINISHED")])
def test_the_way_a_block_ends_decides_the_status(error, status):
    run = Ended()
    with pytest.raises(type(error)), run:
        raise error
    assert run.ended[0] == status
    if status == "FAILED":
        assert "Traceback" in run.ended[1] and "lost it" in run.ended[1]


def test_sigterm_kills_the_run_and_the_default_comes_back():
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        outer, inner = Ended(), Ended()
        with pytest.raises(SystemExit) as ended, outer, inner:
            signal.raise_signal(signal.SIGTERM)
        assert ended.value.code == 143
        assert outer.ended[0] == inner.ended[0] == "KILLED"
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)


def test_somebody_elses_sigterm_handler_is_left_alone():
    def mine(number, frame):
        pass

    before = signal.signal(signal.SIGTERM, mine)
    try:
        with Ended():
            assert signal.getsignal(signal.SIGTERM) is mine
        assert signal.getsignal(signal.SIGTERM) is mine
    finally:
        signal.signal(signal.SIGTERM, before)
