"""The live page in a real browser: its values are the metrics, and nothing that it shows or loads breaks its own rules."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.support.browser import CHROMIUM, Browser, BrowserError
from tests.support.busy_cluster import BusyCluster
from tests.support.http_service import CHAT, COMPLETIONS, Client, samples, serving

pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium is installed (apt-get install chromium): the page's data is tested without one"
)
FRAMES = "Number(document.documentElement.dataset.frames ?? 0)"
HOSTILE = "<img src=x onerror=alert(1)> says the model"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    try:
        found = Browser(tmp_path_factory.mktemp("profile"))
        found.call("Browser.getVersion")
    except (BrowserError, OSError) as error:
        pytest.skip(f"chromium can't start here: {error}")
    yield found
    found.close()


def test_the_page_shows_the_metrics_and_chats(browser: Browser):
    """One visit: with a key, a wrong one first; texts of the model stay texts."""
    roles = BusyCluster((64, 1, 384), says=HOSTILE, roles=("prefill", "decode"))
    with roles as cluster, serving(cluster, keys=("first-key-1",)) as client:
        client.headers = {"Authorization": "Bearer first-key-1"}
        client.post(COMPLETIONS, {"prompt": [5, 6], "max_tokens": 4})
        with browser.page() as page:
            page.open(client.url + "/")
            for key in ("wrong-key-1", "first-key-1"):
                page.wait_for("document.getElementById('key-dialog').open && !document.getElementById('key').value")
                page.type("key", key)
                page.press("Enter")
            page.wait_for(f"{FRAMES} >= 2")
            page.run("document.getElementById('heat').focus()")
            page.press("ArrowRight")
            page.press("ArrowRight")
            assert page.text("heat-readout").startswith("Rank 0, expert 1: ")
            page.type("chat-text", "hello")
            page.press("Enter")
            page.wait_for("document.querySelector('.said.model .facts')?.textContent")
            assert page.run("document.querySelector('.said.model').textContent").startswith(HOSTILE)
            assert page.run("document.querySelectorAll('main img').length") == 0
            before = page.run(FRAMES)
            page.wait_for(f"{FRAMES} > {before}")
            shown = page.run(
                "Object.fromEntries([...document.querySelectorAll('[id^=tile-],[id^=note-]')].map(e => [e.id, e.textContent]))"
            )
            found = samples(client)
            assert shown["tile-balance"] == f"{found['epslots:expert_balance']:.3f}"
            assert shown["tile-kv"] == f"{100 * found['epslots:kv_cache_usage_perc']:.1f}"
            hits, misses = found["epslots:expert_hits_total"], found["epslots:expert_misses_total"]
            assert shown["note-hits"] == f"{100 * hits / (hits + misses):.1f} % since the start"
            assert shown["tile-requests"] == "0 / 0"
            assert page.text("group") == "64 ranks in 2 groups, epoch 3"
            assert page.run("[...document.querySelectorAll('#groups tr')].map(row => row.innerText)") == [
                "0\tprefill\tserving\t32\t128\t0\t3\t7, watching",
                "1\tdecode\tserving\t32\t128\t1\t4\t8, watching",
            ]
            assert page.text("groups-note") == "9 hand-overs, 2 failed; 30 ms and 1.0 MiB each"
            assert page.run("document.querySelector('#ranks tr:last-child').children[1].textContent") == "1, decode"
            assert page.run("document.querySelectorAll('#ranks tr').length") == 64
            assert page.run("document.documentElement.scrollWidth") <= 1440
            assert page.run("sessionStorage.length") == 1
            assert all(url.startswith(client.url) and "first-key" not in url for url in page.requested)
            complaints = [text for text in page.complaints if "401" not in text]
            assert complaints == []
            page.resize(390, 844)
            assert page.run("document.documentElement.scrollWidth") <= 390


SHOTS = os.environ.get("EPSLOTS_SCREENSHOTS")
VIEWS = {  # of a service: ranks, layers, experts; then pages: width, height, dark, device pixels
    (8, 24, 128): {"light": (1440, 948, False, 1.0), "dark": (1440, 948, True, 1.0), "phone": (390, 1000, False, 1.5)},
    (64, 8, 384): {"large": (1440, 985, False, 1.0)},
}
FRAMES_IN_A_SHOT = 40
ANSWER = "As many experts as it has slots. Those that are asked for most stay; the others come when a token needs them."


@pytest.mark.skipif(SHOTS is None, reason="EPSLOTS_SCREENSHOTS names no folder for the pictures of examples/serve")
def test_screenshots_can_be_made_again(browser: Browser):
    """``EPSLOTS_SCREENSHOTS=examples/serve pytest tests/serve/test_browser.py``: ranks are scripted, all else is real."""
    for shape, views in VIEWS.items():
        with (
            BusyCluster(shape, says=ANSWER, held=True) as cluster,
            serving(cluster, names=("scripted-ranks",)) as client,
            traffic(cluster, client),
            ExitStack() as pages,
        ):
            opened = {}
            for name, (width, height, dark, scale) in views.items():
                opened[name] = page = pages.enter_context(browser.page(width, height, dark=dark, scale=scale))
                page.open(client.url + "/")
            for name, page in opened.items():
                page.wait_for(f"{FRAMES} >= {FRAMES_IN_A_SHOT}")
                page.type("chat-text", "What does a slot pool hold?")
                page.run("document.getElementById('chat-form').requestSubmit()")
                page.wait_for("document.querySelector('.said.model .facts')?.textContent")
                page.run("document.activeElement.blur()")
                page.run("window.scrollTo(0, 0)")
                page.shoot(Path(str(SHOTS)) / f"page-{name}.png")
                assert page.complaints == []


@contextmanager
def traffic(cluster: BusyCluster, client: Client) -> Iterator[None]:
    """A dozen users who ask again and again, of ranks that take 25 ms for a step."""
    over = threading.Event()

    def steps() -> None:
        while not over.wait(0.025):
            cluster.go_on(1)
        cluster.held = False
        cluster.go_on()

    def ask(user: int) -> None:
        while not over.wait(0.3 + 0.1 * user):
            client.post(CHAT, {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 20 + 7 * user})

    with ThreadPoolExecutor(13) as threads:
        threads.submit(steps)
        threads.map(ask, range(12))
        try:
            yield
        finally:
            over.set()
