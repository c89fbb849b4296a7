"""The live page's files: nothing from elsewhere, nothing inline, no markup from text, and names that exist."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.serve import page_files
from cluster.serve.live_frame import LiveFrame, LiveLayer, LiveRank, LiveRates, LiveTotals
from cluster.serve.page_files import PAGE_FILES
from tests.support.http_service import Client, serving
from tests.support.scripted_cluster import ScriptedCluster

STATIC = Path(page_files.__file__).parent / "static"
SCRIPTS = sorted(STATIC.glob("*.js"))
# Of the package uplot 1.6.32 in npm's registry, as published.
VENDORED = {
    "uPlot.iife.min.js": "19c8d4c6ad88929a79f4ae49d6f7161566dfd0ba3d15cc495e974f787eb78f1f",
    "uPlot.min.css": "df630c6a8d6f8eeaff264b50f73ce5b114f646ffd9a0bb74f049b0a00135fa04",
    "uPlot.LICENSE": "8f989229699b4fe2f1a0432d0e9edc338a8a911e250e2d1b01ecd770a5f5b1bd",
}
PAGE = (STATIC / "index.html").read_text()


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with ScriptedCluster() as cluster, serving(cluster, keys=("first-key-1",)) as client:
        yield client


def test_files_come_without_a_key(client: Client):
    """As what they are, under a policy that lets nothing else in."""
    kinds = {"": "text/html", "html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
    assert {"/", "/page/main.js", "/page/style.css", "/page/vendor/uPlot.iife.min.js"} <= PAGE_FILES.keys()
    for path, file in PAGE_FILES.items():
        reply = client.get(path)
        assert (reply.status, reply.body) == (200, file.body)
        assert reply.headers["content-type"] == f"{kinds[path.rpartition('.')[2] if '.' in path else '']}; charset=utf-8"
        policy = reply.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "require-trusted-types-for 'script'" in policy
        assert "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy
        assert "http" not in policy
        assert reply.headers["x-content-type-options"] == "nosniff"
        assert reply.headers["referrer-policy"] == "no-referrer"


@pytest.mark.parametrize(
    "path", ["/page/", "/page/none.js", "/page/../auth.py", "/page/%2e%2e/auth.py", "/page/vendor/uPlot.LICENSE"]
)
def test_other_files_arent_there(client: Client, path: str):
    assert client.get(path).status == 401
    assert client.get(path, Authorization="Bearer first-key-1").status == 404


def test_nothing_comes_from_elsewhere_or_stands_inline():
    assert not re.search(r"https?:|//[a-z]", PAGE)
    assert not re.search(r"\sstyle=|\son\w+=|<style|javascript:", PAGE)
    assert re.findall(r"<script[^>]*>([^<]*)</script>", PAGE) == [""] * PAGE.count("<script")
    for file in (*SCRIPTS, STATIC / "style.css"):
        assert not re.search(r"https?://|@import|url\(", file.read_text()), file.name


def test_text_never_becomes_markup():
    """Words of the model, of users and of other machines are set as text alone."""
    for file in (*SCRIPTS, STATIC / "vendor/uPlot.iife.min.js"):
        code = file.read_text()
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", code), file.name


def test_the_vendored_library_is_as_published():
    found = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in (STATIC / "vendor").iterdir()}
    assert found == VENDORED


def test_scripts_name_what_there_is():
    """Elements by their ids, files, and colours."""
    ids = set(re.findall(r'\bid="([\w-]+)"', PAGE))
    style = (STATIC / "style.css").read_text()
    for file in SCRIPTS:
        code = file.read_text()
        named = set(re.findall(r"getElementById\('([\w-]+)'\)", code)) | set(re.findall(r"id: '([\w-]+)'", code))
        assert named <= ids, (file.name, named - ids)
        for other in re.findall(r"from '\./([\w./]+)'", code):
            assert (STATIC / other).is_file(), (file.name, other)
        for colour in re.findall(r"(?<!function )colour\('([\w-]+)'\)", code):
            assert f"--{colour}:" in style, (file.name, colour)
    for path in re.findall(r'(?:src|href)="([^"]+)"', PAGE):
        assert (STATIC / path.removeprefix("page/")).is_file(), path


def test_scripts_read_fields_that_frames_have():
    fields = {kind: set(kind.__struct_fields__) for kind in (LiveFrame, LiveRates, LiveTotals, LiveRank, LiveLayer)}
    code = "\n".join(file.read_text() for file in SCRIPTS)
    assert set(re.findall(r"\b(?:frame|f)\.(\w+)", code)) <= fields[LiveFrame]
    assert set(re.findall(r"\.rates\??\.(\w+)", code)) <= fields[LiveRates]
    assert set(re.findall(r"\.totals\??\.(\w+)", code)) <= fields[LiveTotals]
    assert set(re.findall(r"\blayer\??\.(\w+)", code)) <= fields[LiveLayer]
    assert set(re.findall(r"\brank\.(\w+)", code)) <= fields[LiveRank]


@pytest.mark.skipif(shutil.which("node") is None, reason="node isn't installed; it checks the page's scripts")
def test_scripts_can_be_read_and_numbers_formatted(tmp_path: Path):
    for file in SCRIPTS:
        subprocess.run(["node", "--check", file], check=True, timeout=60)
    shutil.copy(STATIC / "format.js", tmp_path / "format.mjs")
    shutil.copy(STATIC / "sse.js", tmp_path / "sse.mjs")
    (tmp_path / "test.mjs").write_text(
        """
        import { bytes, count, milliseconds, percent, speed } from './format.mjs';
        import { events } from './sse.mjs';
        const text = 'data: {"a":"\\u00e9"}\\n\\n: keep-alive\\n\\ndata: 2\\n\\ndata: [DONE]\\n\\ndata: 3\\n\\n';
        const all = new TextEncoder().encode(text);
        const found = [];
        for (let size = 1; size <= all.length; size += 1) {
          const parts = [];
          for (let at = 0; at < all.length; at += size) parts.push(all.slice(at, at + size));
          const read = [];
          for await (const value of events(new Response(ReadableStream.from(parts)))) read.push(value);
          found.push(JSON.stringify(read));
        }
        console.log(JSON.stringify({
          counts: [0, 999, 1234, 2.5e6, 3e9].map(count), speeds: [0, 0.25, 9.96, 10, 1234.4].map(speed),
          shares: [0, 0.5, 0.9996, 0.99999, 1].map(percent), times: [0, 0.0005, 0.0123, 0.1, 1.5, 16.1].map(milliseconds),
          bytes: [0, 1023, 1536, 2 ** 30, 150 * 2 ** 20].map(bytes), events: [...new Set(found)],
        }));
        """
    )
    found = json.loads(subprocess.run(["node", tmp_path / "test.mjs"], check=True, timeout=60, capture_output=True).stdout)
    assert found == {
        "counts": ["0", "999", "1,234", "2.50M", "3.00G"],
        "speeds": ["0", "0.3", "10.0", "10", "1,234"],
        "shares": ["0.0", "50.0", "99.9", "99.9", "100.0"],
        "times": ["0", "0.5", "12.3", "100", "1,500", "16,100"],
        "bytes": ["0 B", "1023 B", "1.5 KiB", "1.0 GiB", "150 MiB"],
        "events": ['[{"a":"\u00e9"},2]'],
    }
