"""The page is opened in a real browser: no errors, no network, and the timeline's own numbers in its DOM."""

import math
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from counterpoint.report.chart import LineChart, thin, ticks
from counterpoint.report.page import viewer_data, write_report
from counterpoint.report.sections import Section, Table
from counterpoint.schedule.timeline import Span, Timeline

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(1)>"


@pytest.fixture(scope="session")
def browse(tmp_path_factory):
    """Opens a page and returns its DOM after the scripts have run, and what they wrote on the console."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip("no chromium on this machine")
    profile = tmp_path_factory.mktemp("profile")

    def browse(page):
        flags = "--no-sandbox --disable-gpu --headless --disable-background-networking --no-first-run"
        more = [
            "--virtual-time-budget=2000",
            "--enable-logging=stderr",
            f"--user-data-dir={profile}",
            "--dump-dom",
        ]
        command = [browser, *flags.split(), *more, page.as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=True)
        return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]

    return browse


class Elements(HTMLParser):
    """All start tags of a page, as (tag, attributes)."""

    def __init__(self, html):
        super().__init__()
        self.found = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def having(self, name):
        return [attrs for _, attrs in self.found if name in attrs]


def with_script(page, script):
    changed = page.with_name("scripted.html")
    changed.write_text(page.read_text().replace("</body>", f"<script>{script}</script></body>"))
    return changed


def check_numbers(dom, timelines):
    elements = Elements(dom)
    for name, timeline in timelines.items():
        several = len(timelines) > 1
        cells = [e for e in elements.having("data-category") if not several or e["data-timeline"] == name]
        shown = {(int(e["data-rank"]), e["data-category"]): float(e["data-seconds"]) for e in cells}
        assert shown == {(r, c): s for r in timeline.ranks for c, s in timeline.categories(r).items()}
    links = [
        ((int(e["data-source"]), int(e["data-destination"])), int(e["data-bytes"]))
        for e in elements.having("data-bytes")
    ]
    assert links == [pair for t in timelines.values() for pair in t.bytes_by_link().items()]


def test_a_page_in_a_browser_shows_the_timelines_own_numbers(tokenring, tmp_path, browse):
    timelines = {"measured": tokenring(4, jitter=0.1)}
    dom, console = browse(write_report(tmp_path / "r.html", timelines, title="One"))
    assert console == []
    check_numbers(dom, timelines)
    (viewer,) = Elements(dom).having("data-bars")
    assert int(viewer["data-bars"]) == len(timelines["measured"].spans)
    steps = re.findall(r'<td class="number" data-seconds="([^"]+)"', dom)
    longest = sorted((s.seconds for s in timelines["measured"].spans if s.kind == "compute"), reverse=True)
    assert [float(x) for x in steps] == longest[: len(steps)]


def test_two_timelines_in_a_browser_are_compared(tokenring, tmp_path, browse):
    timelines = {"run": tokenring(3, jitter=0.2, source="measured"), "forecast": tokenring(3)}
    changed = Span(0, "q.send", "send", "extra", 0.0, 0.1, peer=1, nbytes=1000)
    timelines["run"].spans.append(changed)
    page = write_report(tmp_path / "r.html", timelines, title="Two")
    walk = """
      const canvas = document.querySelector("canvas");
      const press = (key) => canvas.dispatchEvent(new KeyboardEvent("keydown", { key }));
      ["ArrowRight", "ArrowDown", "ArrowRight", "+"].forEach(press);
      const ink = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
      const seen = new Set();
      for (let i = 0; i < ink.length; i += 4) seen.add(`${ink[i]},${ink[i + 1]},${ink[i + 2]},${ink[i + 3]}`);
      const colours = JSON.parse(document.querySelector(".viewer script").textContent).colours;
      const rgb = (hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
      document.body.dataset.drawn = Object.values(colours).every((hex) => seen.has(`${rgb(hex)},255`));
    """
    dom, console = browse(with_script(page, walk))
    assert console == []
    check_numbers(dom, timelines)
    assert 'data-drawn="true"' in dom
    (spoken,) = re.findall(r"<output[^>]*>(.*?)</output>", dom)
    sent = sorted(
        (s for s in timelines["run"].spans if (s.rank, s.stream) == (0, "q.send")), key=lambda s: s.start
    )
    assert spoken.startswith(f"{sent[1].name}, rank 0 · q send · run")
    assert "1 of 6 links differ" in dom
    differences = [float(e["data-difference"]) for e in Elements(dom).having("data-difference")]
    first = timelines["forecast"].categories(0)["compute"] - timelines["run"].categories(0)["compute"]
    assert differences[0] == pytest.approx(first)
    assert -1000.0 in differences


def test_degenerate_timelines_open_without_errors(degenerate, tmp_path, browse):
    together = write_report(tmp_path / "all.html", degenerate, title="Degenerate")
    dom, console = browse(together)
    assert console == []
    bars = [int(e["data-bars"]) for e in Elements(dom).having("data-bars")]
    assert bars == [len(t.spans) for t in degenerate.values()]
    for name, timeline in degenerate.items():
        pair = {name: timeline, "other": degenerate["one span"]}
        assert write_report(tmp_path / "pair.html", pair, title=name).exists()


def test_a_page_refers_to_nothing_outside_itself(tokenring, tmp_path):
    html = write_report(tmp_path / "r.html", {"run": tokenring(2)}, title="Alone").read_text()
    assert "://" not in html
    assert not re.search(r"\b(?:href|src|action|data|poster|srcset)\s*=\s*[\"'](?!data:)", html)
    assert "@import" not in html and "url(" not in html
    assert "default-src 'none'" in html


def test_everything_a_caller_passes_is_escaped(tmp_path):
    spans = [Span(0, HOSTILE, "send", HOSTILE, 0.0, 1.0, peer=1, nbytes=5)]
    timeline = Timeline(HOSTILE, spans, meta={HOSTILE: HOSTILE})
    section = Section(
        HOSTILE,
        HOSTILE,
        Table([HOSTILE], [[HOSTILE]], caption=HOSTILE),
        LineChart({HOSTILE: [(0, 1), (1, 2)]}, HOSTILE, HOSTILE),
        preformatted=HOSTILE,
    )
    for timelines in (
        {HOSTILE: timeline},
        {HOSTILE: timeline, "b": timeline},
        {HOSTILE: timeline, "b": timeline, "c": timeline},
    ):
        html = write_report(tmp_path / "r.html", timelines, title=HOSTILE, sections=[section]).read_text()
        tags = [tag for tag, _ in Elements(html).found]
        viewers = 1 if len(timelines) < 3 else 3
        assert tags.count("script") == viewers + 1
        assert "img" not in tags
        assert "alert(1)</script>" not in html


def test_sections_stand_where_they_were_asked_for(tokenring, tmp_path):
    picture = b"\x89PNG\r\n\x1a\n" + b"0" * 30
    sections = [
        Section("Later", preformatted="a sample", png=picture),
        Section(
            "Sooner",
            "One.\n\nTwo.",
            chart=LineChart({"loss": [(0, 3.0), (1, math.nan), (2, 1.0)]}),
            before_timelines=True,
        ),
    ]
    html = write_report(tmp_path / "r.html", {"run": tokenring(2)}, title="T", sections=sections).read_text()
    order = [html.index(f"<h2>{heading}</h2>") for heading in ("Sooner", "Timeline", "Memory", "Later")]
    assert order == sorted(order)
    assert "<p>One.</p><p>Two.</p>" in html
    assert "data:image/png;base64,iVBORw0KGgo" in html
    curve = re.findall(r'class="line".*? d="([^"]*)"', html)[0]
    assert len(re.findall(r"M[\d.]+ ", curve)) == 2  # a gap where the loss is not a number


def test_a_section_that_cannot_be_shown_leaves_the_old_page(tokenring, tmp_path):
    page = write_report(tmp_path / "r.html", {"run": tokenring(1)}, title="Before")
    with pytest.raises(ValueError, match="must be a PNG"):
        write_report(page, {}, title="After", sections=[Section("x", png=b"GIF89a")])
    with pytest.raises(ValueError, match="1 cells for 2 columns"):
        write_report(page, {}, title="After", sections=[Section("x", table=Table(["a", "b"], [[1]]))])
    assert "<title>Before</title>" in page.read_text()
    assert [p.name for p in tmp_path.iterdir()] == ["r.html"]


def test_a_page_without_timelines_has_its_sections(tmp_path):
    html = write_report(
        tmp_path / "sub" / "r.html", {}, title="T", sections=[Section("Only", "text")]
    ).read_text()
    assert "<h2>Only</h2><p>text</p>" in html


def test_viewer_pairs_bars_and_keeps_times(tokenring):
    timeline = tokenring(3, jitter=0.2)
    data = viewer_data({"a": timeline, "b": tokenring(3)})
    bars = [bar for group in data["groups"] for lane in group["lanes"] for bar in lane["bars"]]
    for index, bar in enumerate(bars):
        if bar[4] in ("send", "recv"):
            other = bars[bar[9]]
            assert {bar[4], other[4]} == {"send", "recv"}
            assert (other[9], other[3], other[6]) == (index, bar[3], bar[6])
    assert data["stop"] == pytest.approx(timeline.seconds * 1e6, abs=1e-3)
    ends = [
        bar[2]
        for group in data["groups"]
        if group["source"] == 0
        for lane in group["lanes"]
        for bar in lane["bars"]
    ]
    assert max(ends) == data["stop"]


@pytest.mark.parametrize(("low", "high"), [(0, 1), (1.4, 7.1), (-3e-7, 2e-6), (0, 33_800_000), (5, 5.001)])
def test_ticks_are_round_and_inside(low, high):
    found = ticks(low, high, 5)
    assert 3 <= len(found) <= 11
    assert all(low - 1e-9 * abs(high) <= value <= high * (1 + 1e-9) for value in found)
    step = found[1] - found[0]
    assert float(f"{step:.6e}".split("e")[0]) in (1, 2, 5)


def test_thinning_keeps_the_extremes():
    line = [(float(i), math.sin(i / 50)) for i in range(20_000)]
    line[7777] = (7777.0, 9.0)
    line[123] = (123.0, -9.0)
    kept = thin(line, 500)
    assert len(kept) <= 510
    assert {(7777.0, 9.0), (123.0, -9.0)} <= set(kept)
    assert kept == sorted(kept)
