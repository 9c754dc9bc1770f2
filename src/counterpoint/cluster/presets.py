"""The clusters that come with the package, and how a name or a path becomes a cluster."""

from __future__ import annotations

from pathlib import Path

from counterpoint.cluster.cluster import Cluster
from counterpoint.cluster.load import ClusterFileError, load_cluster
from counterpoint.cluster.schema import nearest

FOLDER = Path(__file__).parent / "presets"


def preset_names() -> tuple[str, ...]:
    """Names of the clusters that come with the package, sorted."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.yaml")))


def preset_path(name: str) -> Path:
    """The YAML file of a preset, to read or to copy.

    Raises:
        ValueError: no preset has this name.
    """
    if name not in preset_names():
        known = preset_names()
        raise ValueError(f"no preset cluster '{name}'{nearest(name, known)}; presets are {', '.join(known)}")
    return FOLDER / f"{name}.yaml"


def find_cluster(name_or_path: str | Path) -> Cluster:
    """The preset of this name, or the cluster in this file (anything with a slash or ending in .yaml, .yml).

    Raises:
        ValueError: neither a preset nor a file; ClusterFileError (a ValueError): a mistake in the file.
    """
    text = str(name_or_path)
    if text in preset_names():
        return load_cluster(FOLDER / f"{text}.yaml")
    path = Path(text)
    if path.is_file() or isinstance(name_or_path, Path) or "/" in text or path.suffix in (".yaml", ".yml"):
        return load_cluster(path)
    raise ClusterFileError(
        f"no cluster '{text}'{nearest(text, preset_names())}: give a YAML file or one of the presets "
        f"{', '.join(preset_names())}"
    )
