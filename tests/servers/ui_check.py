"""Screenshots of MLflow's pages as a user of the experiment sees them; run by hand, then look at them.

  python tests/servers/ui_check.py URI OUT_DIR [EXPERIMENT]

URI is the tracking address whose runs to show (it is served on a free port, unless it is a server's).
Needs chromium (`apt-get install --no-install-recommends chromium`) and `pip install playwright`.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import quote

from mlflow import MlflowClient
from playwright.sync_api import Page, TimeoutError, sync_playwright


@contextlib.contextmanager
def served(uri: str) -> Iterator[str]:
    """The address of the pages for a tracking address."""
    if uri.startswith("http"):
        yield uri.rstrip("/")
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", uri, "--port", str(port)],
        env=os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true"}, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL)
    try:
        while server.poll() is None:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health"):
                break
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait()


def shoot(page: Page, address: str, file: Path, ready: str, clicks: Sequence[str] = ()) -> None:
    """Open an address, click on texts, and save what is seen a little after the text `ready` is there."""
    page.goto("about:blank")
    page.goto(address)
    missing = ""
    try:
        for text in clicks:
            page.get_by_text(text, exact=True).first.click(timeout=30_000)
        page.get_by_text(ready).first.wait_for(timeout=30_000)
    except TimeoutError:
        missing = f" (WITHOUT {ready!r})"
    page.wait_for_timeout(12_000)  # the pages poll for ever, so there is no quiet to wait for
    page.screenshot(path=str(file))
    print(f"{file}: {address}{missing}", flush=True)


def unfold(page: Page, names: Sequence[str], file: Path) -> None:
    """Open the parents of these names in the list of runs that is shown, one below the other, and save what is seen."""
    for name in names:
        cell = page.locator("[role=row] [col-id='attributes.`Run Name`']", has_text=name).first
        cell.locator("button").first.click()
        page.wait_for_timeout(3_000)
    page.screenshot(path=str(file))
    print(f"{file}: unfolded {', '.join(names)}", flush=True)


def main(uri: str, out: str, experiment: str = "impactx") -> None:
    """Save the pages of the newest job."""
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    client = MlflowClient(tracking_uri=uri)
    identity = client.get_experiment_by_name(experiment).experiment_id
    newest = client.search_runs([identity], "tags.`impactx.role` = 'job'", max_results=1)[0]
    root = newest.data.tags["impactx.root"]
    views = sorted(((key, value) for key, value in client.get_experiment(identity).tags.items()
                    if key.startswith("mlflow.sharedViewState.impactx-") and f'"job {root}"' in value))
    trials = f"tags.`impactx.root` = '{root}' and tags.`impactx.role` = 'trial'"
    trial = client.search_runs([identity], trials, max_results=1)[0]
    search = quote(f"tags.`impactx.root` = '{root}'")
    with served(uri) as base, sync_playwright() as play:
        browser = play.chromium.launch(executable_path=shutil.which("chromium"), args=[
            "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"])
        page = browser.new_page(viewport={"width": 1700, "height": 1000})
        page.goto(base)
        page.get_by_label("Close").first.click()  # the assistant's panel
        runs = f"{base}/#/experiments/{identity}/runs"
        listed = f"{runs}?workflowType=machine_learning"
        shoot(page, f"{listed}&searchFilter={search}", folder / "all-runs.png", newest.info.run_name)
        cell = client.search_runs([identity], f"tags.`impactx.root` = '{root}' and tags.`impactx.role` = 'cell'",
                                  max_results=1)[0]
        unfold(page, [newest.info.run_name, cell.info.run_name], folder / "unfolded.png")
        for key, _ in views:
            view = f"{listed}&viewStateShareKey={key.removeprefix('mlflow.sharedViewState.')}"
            shoot(page, view, folder / "trials.png", trial.info.run_name)
            shoot(page, f"{view}&compareRunsMode=CHART", folder / "comparison.png", "val_accuracy")
        shoot(page, f"{runs}/{trial.info.run_id}", folder / "trial.png", "Parameters")
        shoot(page, f"{runs}/{trial.info.run_id}/model-metrics", folder / "trial-curves.png", "val_accuracy")
        figures = sorted(file.path for file in client.list_artifacts(newest.info.run_id, "report")
                         if "/examples-" in file.path and "impactx" in file.path)
        shoot(page, f"{runs}/{newest.info.run_id}/artifacts", folder / "job-artifacts.png", "report.html",
              ["report", *(Path(figure).name for figure in figures[:1])])
        shoot(page, f"{base}/#/models", folder / "models.png", "impactx.")
        for model in client.search_registered_models(max_results=1):
            shoot(page, f"{base}/#/models/{model.name}/versions/1", folder / "model.png", "Schema")
        browser.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
