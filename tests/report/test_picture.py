"""Pictures are read as pixels: the share of a lane that has a colour is the share of time it stands for."""

import subprocess
import sys
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from counterpoint.report.bars import coalesce
from counterpoint.report.figure import DPI, tint
from counterpoint.report.lanes import COMPUTE_COLOUR, PALETTE, channel_colours
from counterpoint.report.links import draw_links
from counterpoint.report.picture import PLOT_WIDTH, draw_timeline

image = pytest.importorskip("matplotlib.image", reason="pictures need the extra report")


def bands(path, colour):
    """Columns filled with this colour, for each run of rows with bars of it (a wait is only a thin line)."""
    pixels = np.rint(image.imread(path)[:, :, :3] * 255).astype(int)
    wanted = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
    same = np.abs(pixels - wanted).max(axis=2) <= 2
    same = same[int(1.02 * DPI) :]  # below title and legend
    rows = same.sum(axis=1) >= 12
    edges = np.flatnonzero(np.diff(np.concatenate([[False], rows, [False]]).astype(int)))
    return [(same[a:b].mean(axis=0) > 0.25).sum() for a, b in zip(edges[::2], edges[1::2]) if b - a > 6]


def test_the_share_of_coloured_pixels_is_the_share_of_time(tokenring, tmp_path):
    timeline = tokenring(4, jitter=0.1)
    path = draw_timeline(timeline, tmp_path / "t.png")
    assert image.imread(path).shape[1] == 1600
    found = bands(path, COMPUTE_COLOUR)
    assert len(found) == 4
    for rank, columns in enumerate(found):
        share = timeline.categories(rank)["compute"] / timeline.seconds
        assert columns / (PLOT_WIDTH * DPI) == pytest.approx(share, abs=0.02)


def test_each_channel_has_a_lane_per_direction_and_rank(tokenring, tmp_path):
    timeline = tokenring(3)
    path = draw_timeline(timeline, tmp_path / "t.png")
    for channel, colour in channel_colours([timeline]).items():
        for shade, kind in ((colour, "send"), (tint(colour, 0.45), "recv")):
            found = bands(path, shade)
            assert len(found) == 3, (channel, kind)
            seconds = sum(s.seconds for s in timeline.spans if s.stream == f"{channel}.send") / 3
            drawn = np.mean(found) / (PLOT_WIDTH * DPI) * timeline.seconds
            assert drawn == pytest.approx(seconds, rel=0.12), (channel, kind)


def test_two_timelines_stand_one_above_the_other_on_one_axis(tokenring, tmp_path):
    slow, fast = tokenring(2, source="measured"), tokenring(2, flops_per_second=240e9)
    path = draw_timeline(slow, tmp_path / "t.png", other=fast)
    found = bands(path, COMPUTE_COLOUR)
    assert len(found) == 4
    assert found[1] == pytest.approx(found[0] / 2, rel=0.03)


def test_the_rank_limit_and_the_window_choose_what_is_drawn(tokenring, tmp_path):
    timeline = tokenring(6)
    few = draw_timeline(timeline, tmp_path / "few.png", max_ranks=2)
    assert len(bands(few, COMPUTE_COLOUR)) == 2
    early = draw_timeline(timeline, tmp_path / "early.png", window=(0.0, timeline.seconds * 0.05))
    colours = channel_colours([timeline])
    assert bands(early, colours["q"])
    assert not bands(early, colours["dq"])


def test_memory_adds_a_strip_for_each_rank(tokenring, tmp_path):
    timeline = tokenring(2)
    plain = image.imread(draw_timeline(timeline, tmp_path / "plain.png"))
    strips = image.imread(draw_timeline(timeline, tmp_path / "strips.png", memory=True))
    assert strips.shape[0] > plain.shape[0] + 2 * 0.215 * DPI


def test_an_svg_parses_and_is_the_same_each_time(tokenring, tmp_path):
    timeline = tokenring(2)
    first = draw_timeline(timeline, tmp_path / "a.svg", title="A < B & C")
    root = ElementTree.parse(first).getroot()
    assert len(root.findall(".//{http://www.w3.org/2000/svg}path")) > len(timeline.spans)
    links = draw_links(timeline, tmp_path / "links.svg")
    assert ElementTree.parse(links).getroot().tag.endswith("svg")


def test_links_shade_their_bytes(tokenring, tmp_path):
    timeline = tokenring(4)
    largest = max(timeline.bytes_by_link().values())
    path = draw_links(timeline, tmp_path / "links.png")
    pixels = np.rint(image.imread(path)[:, :, :3] * 255).astype(int)
    darkest = np.array([int(PALETTE[0][i : i + 2], 16) for i in (1, 3, 5)])
    cell = (0.78 * 0.94 * DPI) ** 2
    filled = (np.abs(pixels - darkest).max(axis=2) <= 2).sum() / cell
    heavy = sum(n == largest for n in timeline.bytes_by_link().values())
    assert 0.85 * heavy < filled <= 1.05 * heavy  # the numbers in the cells are white


def test_degenerate_timelines_are_drawn(degenerate, tmp_path):
    for index, timeline in enumerate(degenerate.values()):
        for path in (tmp_path / f"{index}.png", tmp_path / f"{index}.svg"):
            assert draw_timeline(timeline, path, memory=True, title="$x_").stat().st_size > 1000
        assert draw_links(timeline, tmp_path / f"links{index}.png", other=timeline).stat().st_size > 1000


def test_what_cannot_be_drawn_is_said(tokenring, tmp_path):
    with pytest.raises(ValueError, match=r"\.png or \.svg"):
        draw_timeline(tokenring(1), tmp_path / "t.jpeg")
    with pytest.raises(ValueError, match="at least 1 rank"):
        draw_timeline(tokenring(1), tmp_path / "t.png", max_ranks=0)
    with pytest.raises(ValueError, match="start < stop"):
        draw_timeline(tokenring(1), tmp_path / "t.png", window=(1.0, 0.0))
    assert not list(tmp_path.iterdir())


def test_a_missing_extra_is_named(tokenring, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'counterpoint\[report\]'"):
        draw_timeline(tokenring(1), tmp_path / "t.png")


def test_drawing_leaves_pyplot_and_torch_alone(tokenring, tmp_path):
    recorded = tmp_path / "t.json"
    tokenring(2).write(recorded)
    script = (
        "import sys; from counterpoint.report.picture import draw_timeline; "
        "from counterpoint.schedule.timeline import Timeline; "
        f"draw_timeline(Timeline.read({str(recorded)!r}), {str(tmp_path / 't.png')!r}); "
        "sys.exit(' '.join(m for m in ('torch', 'matplotlib.pyplot') if m in sys.modules) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@given(
    st.lists(st.tuples(st.floats(0, 100), st.floats(0, 3)), max_size=60).map(sorted),
    st.floats(0.01, 2),
)
def test_coalesced_bars_cover_the_same_time_to_within_the_resolution(bars, resolution):
    intervals = [(a, a + width) for a, width in bars]
    drawn = coalesce(intervals, resolution)
    assert all(width >= resolution * (1 - 1e-9) for _, width in drawn)
    for a, b in intervals:
        assert any(left - 1e-9 <= a and b <= left + width + 1e-9 for left, width in drawn)
    for left, width in drawn:
        inside = [(a, b) for a, b in intervals if left - 1e-9 <= a <= left + width + 1e-9]
        assert inside
        reached = left
        for a, b in inside:
            assert a - reached <= 2 * resolution + 1e-9
            reached = max(reached, b)


def test_twenty_thousand_bars_become_no_more_shapes_than_pixels():
    bars = [(i * 1e-3, i * 1e-3 + 9e-4) for i in range(20_000)]
    pixel = 20 / 1184
    assert len(coalesce(bars, pixel)) <= 1184
