"""The live page in a real browser: its values are the metrics, and nothing that it shows or loads breaks its own rules."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.browser import CHROMIUM, Browser
from tests.support.busy_cluster import BusyCluster
from tests.support.http_service import COMPLETIONS, samples, serving

pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium is installed (apt-get install chromium): the page's data is tested without one"
)
FRAMES = "Number(document.documentElement.dataset.frames ?? 0)"
HOSTILE = "<img src=x onerror=alert(1)> says the model"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    found = Browser(tmp_path_factory.mktemp("profile"))
    yield found
    found.close()


def test_the_page_shows_the_metrics_and_chats(browser: Browser):
    """One visit: with a key, a wrong one first; texts of the model stay texts."""
    with BusyCluster((64, 1, 384), says=HOSTILE) as cluster, serving(cluster, keys=("first-key-1",)) as client:
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
            assert page.text("group") == "64 ranks, epoch 3"
            assert page.run("document.querySelectorAll('#ranks tr').length") == 64
            assert page.run("document.documentElement.scrollWidth") <= 1440
            assert page.run("sessionStorage.length") == 1
            assert all(url.startswith(client.url) and "first-key" not in url for url in page.requested)
            complaints = [text for text in page.complaints if "401" not in text]
            assert complaints == []
            page.resize(390, 844)
            assert page.run("document.documentElement.scrollWidth") <= 390
