"""The configuration: what is refused and how, what files and overrides mean."""

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from counterpoint.training.config import TrainConfig, load_config, make_config
from counterpoint.training.config_errors import known_keys, nearest

KEYS = sorted(known_keys(TrainConfig))


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("optimizer.learning_rate=1", "optimizer.lr"),
        ("lr=1e-3", "optimizer.lr"),
        ("training.stpes=10", "training.steps"),
        ("steps=10", "training.steps"),
        ("parallel.foward=ring", "parallel.forward"),
        ("data.seq_length=64", "data.sequence_length"),
        ("seed=3", "training.seed"),
    ],
)
def test_unknown_key_names_the_nearest(wrong, right):
    with pytest.raises(ValueError, match=rf"unknown key {wrong.split('=')[0]}; .* known one is {right}$"):
        load_config(None, [wrong])


def test_unknown_section_names_the_nearest_section():
    with pytest.raises(ValueError, match=r"unknown key trainig; the nearest known one is training$"):
        load_config(None, ["trainig.steps=10"])


@given(st.sampled_from([k for k in KEYS if "." in k]), st.data())
def test_a_dropped_letter_finds_its_key(key, data):
    last = key.rpartition(".")[2]
    if len(last) < 5:
        return
    i = data.draw(st.integers(1, len(last) - 1))
    wrong = key[: len(key) - len(last)] + last[:i] + last[i + 1 :]
    assert wrong in KEYS or nearest(wrong, known_keys(TrainConfig)) == key


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (["optimizer.lr=-1"], "optimizer.lr = -1: allowed is greater than 0"),
        (["optimizer.lr=fast"], "optimizer.lr = fast: allowed is a number"),
        (["optimizer.lr=.nan"], "optimizer.lr = .nan: allowed is a finite number"),
        (["parallel.layout=zigzga"], "allowed is one of contiguous, zigzag, striped, document-zigzag"),
        (
            ["parallel.forward=ring/tokenrng", "parallel.sequence=[2, 2]"],
            "parallel.forward: strategy 'tokenrng' is unknown; use one of ring",
        ),
        (["parallel.forward=[ring, ring]"], "give one, or one per entry of parallel.sequence"),
        (["parallel.data=2", "training.global_batch=3"], "does not divide over parallel.data = 2"),
        (["optimizer.min_lr=1", "optimizer.lr=0.1"], "optimizer.min_lr = 1 is above optimizer.lr = 0.1"),
        (["optimizer.warmup=9", "training.steps=5"], "optimizer.warmup = 9 exceeds training.steps = 5"),
        (["training.steps=0"], "training.steps = 0: allowed is greater than or equal to 1"),
        (["optimizer=3"], "optimizer = 3: allowed is a section with lr"),
        (["optimizer.lr"], "expected key=value"),
        (["training.steps=[1"], "the value is not YAML"),
    ],
)
def test_impossible_values_say_what_is_allowed(overrides, text):
    with pytest.raises(ValueError) as error:
        load_config(None, overrides)
    assert text in str(error.value)
    assert "\n" not in str(error.value)


def test_overrides_win_over_the_file_and_leave_the_rest(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("optimizer: {lr: 0.01, warmup: 3}\ndata: {paths: a.txt}\n")
    config = load_config(file, ["optimizer.lr=3e-4", "parallel.sequence=4"])
    assert (config.optimizer.lr, config.optimizer.warmup) == (3e-4, 3)
    assert config.data.paths == ("a.txt",)
    assert config.parallel.sequence == (4,)


def test_python_file_equals_yaml_file(tmp_path):
    values = {"training": {"steps": 7}, "optimizer": {"warmup": 1}, "model": {"preset": "tiny"}}
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(values))
    (tmp_path / "b.py").write_text(f"steps = 7\nconfig = {values!r}\nconfig['training']['steps'] = steps\n")
    assert load_config(tmp_path / "a.yaml") == load_config(tmp_path / "b.py")


@pytest.mark.parametrize(
    ("name", "text", "error"),
    [
        ("a.yaml", "a: [", "is not YAML"),
        ("b.yaml", "- 1", "holds a list"),
        ("c.py", "x = 1", "does not define `config`"),
        ("d.toml", "", "a configuration is a .yaml, .yml or .py file"),
    ],
)
def test_files_that_are_no_configuration(tmp_path, name, text, error):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=error):
        load_config(tmp_path / name)


def test_the_written_configuration_reads_back_equal():
    config = load_config(
        None,
        ["model={preset: tiny, rope_theta: 5.0e+4}", "parallel.sequence=[2, 2]", "data.paths=[a b, 'c: d']"],
    )
    assert make_config(yaml.safe_load(config.to_yaml(comments=True))) == config


def test_world_size_fills_in_or_refuses():
    config = load_config(None, ["parallel.sequence=2"])
    assert config.with_world_size(4).parallel.data == 2
    with pytest.raises(ValueError, match="3 processes do not fit data x sequence = auto x 2"):
        config.with_world_size(3)
    with pytest.raises(ValueError, match=r"training.global_batch = 4 .* parallel.data = 3"):
        config.with_world_size(6)
