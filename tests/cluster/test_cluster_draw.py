import io
import subprocess
import sys

import pytest
from rich.console import Console

from counterpoint.cluster.draw import list_clusters, show
from counterpoint.cluster.picture import draw
from counterpoint.cluster.presets import find_cluster, preset_names


def printed(action, width=120):
    out = io.StringIO()
    action(Console(file=out, width=width))
    return out.getvalue()


def test_the_list_has_every_preset_with_its_ranks():
    text = printed(list_clusters, width=200)
    for name in preset_names():
        [line] = [line for line in text.splitlines() if line.split()[0] == name]
        assert f"{find_cluster(name).world_size:,}" in line.split()


@pytest.mark.parametrize("name", preset_names())
@pytest.mark.parametrize("width", [80, 140])
def test_show_prints_levels_devices_rates_and_sources_within_the_width(name, width):
    text = printed(lambda console: show(name, console), width)
    cluster = find_cluster(name)
    for word in [level.level for level in cluster.levels] + list(cluster.devices) + list(cluster.sources):
        assert word in text
    assert max(len(line) for line in text.splitlines()) <= width


def test_the_matrix_shows_what_the_cluster_computes():
    text = printed(lambda console: show("a10x4-pcie", console))
    assert text.splitlines()[0].startswith("a10x4-pcie")
    rows = [line.split() for line in text.splitlines() if "·" in line]
    cluster = find_cluster("a10x4-pcie")
    for source, row in enumerate(rows):
        for destination in set(range(4)) - {source}:
            expected = cluster.bandwidth(source, destination, 64 * 2**20) / 1e9
            assert float(row[1 + destination]) == pytest.approx(expected, rel=5e-3)


def test_names_with_brackets_are_printed_as_they_are(tmp_path):
    text = (
        "name: '[red]x'\nabout: a [b] c\nsources: {s: '[/] 1'}\n"
        "devices:\n  '[g]': {memory: {m: {size: 1, bandwidth: 1}}, rates: {matmul: {int8: 1}}, launch: 0}\n"
        "levels: []\n"
    )
    path = tmp_path / "odd.yaml"
    path.write_text(text)
    shown = printed(lambda console: show(path, console))
    assert "[red]x  a [b] c" in shown
    assert "[g]" in shown
    assert "1 rank" in shown


@pytest.mark.parametrize(
    "name", ["a10x4-pcie", "dgx-h100-pod", "frontier-pod", "ascend-full-mesh", "edge-wifi"]
)
def test_a_drawing_names_every_level_and_the_drawn_ranks(name, tmp_path):
    path = draw(find_cluster(name), tmp_path / f"{name}.svg")
    text = path.read_text()
    cluster = find_cluster(name)
    # matplotlib keeps each text as a comment in front of its glyphs
    listed = next((tier for tier, level in enumerate(cluster.levels) if level.link == "pairs"), 0)
    for level in cluster.levels[listed:]:  # what is inside listed pairs is drawn as cables, not as boxes
        assert f"{level.level}  {level.name}" in text
    for rank in range(min(cluster.sizes[0], 8)):
        assert f"<!-- {rank} -->" in text
    assert cluster.name in text


def test_the_same_cluster_gives_the_same_svg(tmp_path):
    first, second = (draw(find_cluster("dgx-h100"), tmp_path / f"{n}.svg").read_bytes() for n in range(2))
    assert first == second


def test_a_png_is_written_and_an_unknown_suffix_is_refused(tmp_path):
    cluster = find_cluster("dgx-h100")
    assert draw(cluster, tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(ValueError, match=r"cannot draw to 'x\.doc'; end the name in \.svg, \.png or \.pdf"):
        draw(cluster, tmp_path / "x.doc")


def test_the_room_needs_no_torch():
    code = (
        "import sys, counterpoint.cluster.draw, counterpoint.cluster.picture, counterpoint.cluster.dump;"
        "sys.exit(any(m in sys.modules for m in ('torch', 'matplotlib')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
