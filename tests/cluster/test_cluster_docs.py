import re
from pathlib import Path

import pytest

from counterpoint.cluster import schema
from counterpoint.cluster.load import parse_cluster
from counterpoint.cluster.presets import preset_names

PAGE = (Path(__file__).parents[2] / "docs" / "cluster.md").read_text()
EXAMPLES = re.findall(r"```yaml\n(.*?)```", PAGE, flags=re.DOTALL)


def test_the_example_by_hand_is_the_cluster_that_the_text_describes():
    cluster = parse_cluster(EXAMPLES[0])
    assert cluster.world_size == 4
    assert [cluster.level(0, rank) for rank in (1, 2, 3)] == ["node", "cluster", "cluster"]
    assert cluster.route(0, 2).resources[0] == cluster.route(1, 3).resources[0]  # the node's one port
    assert cluster.bandwidth(0, 2, 2**20) == pytest.approx(2.2e9)


def test_the_example_of_listed_pairs_is_connected():
    head = EXAMPLES[0][: EXAMPLES[0].index("levels:")]
    cluster = parse_cluster(head + EXAMPLES[1])
    assert len(cluster.route(0, 3).resources) == 2


def test_every_key_of_the_format_and_every_preset_is_on_the_page():
    models = (schema.ClusterFile, schema.DeviceFile, schema.LevelFile, schema.LinkFile, schema.TierFile)
    keys = {key for model in models for key in model.model_fields}
    words = set(re.findall(r"`(\w+)[:`]", PAGE))
    assert keys - words == set()
    assert [name for name in preset_names() if f"`{name}`" not in PAGE] == []


def test_python_on_the_page_runs():
    [code] = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    names: dict[str, object] = {}
    exec(code, names)
    assert names["route"].level == "island"  # type: ignore[attr-defined]
