import pytest
from hypothesis import given
from hypothesis import strategies as st

from counterpoint.cluster.curves import Curve
from counterpoint.cluster.device import Device, MemoryTier

DEVICE = Device(
    name="gpu",
    peak_flops_per_second={"bfloat16": 1e14},
    rates={
        "matmul": {"bfloat16": Curve.of([(1e9, 1e13), (1e12, 9e13)]), "float32": Curve.constant(1e13)},
        "attention_forward": {"bfloat16": Curve.constant(5e13)},
    },
    memory=(
        MemoryTier("hbm", 24 * 10**9, 6e11, Curve.constant(5e11)),
        MemoryTier("host", 256 * 10**9, 3e10, Curve.constant(2.5e10)),
    ),
    launch_seconds=5e-6,
)


@given(st.floats(0, 1e15), st.floats(0, 1e12))
def test_a_kernel_takes_its_launch_and_the_slower_of_computing_and_moving(flops, nbytes):
    seconds = DEVICE.seconds("matmul", flops, nbytes, "bfloat16")
    alone = [DEVICE.seconds("matmul", flops, 0, "bfloat16"), DEVICE.seconds("matmul", 0, nbytes, "bfloat16")]
    assert seconds == max(alone) >= 5e-6


def test_large_kernels_attain_a_larger_share():
    small, large = (f / (DEVICE.seconds("matmul", f, 0, "bfloat16") - 5e-6) for f in (1e9, 1e12))
    assert small == pytest.approx(1e13)
    assert large == pytest.approx(9e13)


def test_the_nearest_kind_of_work_stands_in():
    backward = DEVICE.seconds("attention_backward", 1e12, 0, "bfloat16")
    assert backward == DEVICE.seconds("attention_forward", 1e12, 0, "bfloat16")
    assert DEVICE.seconds("attention_forward", 1e12, 0, "float32") == DEVICE.seconds(
        "matmul", 1e12, 0, "float32"
    )


def test_elementwise_work_is_bound_by_memory():
    assert DEVICE.seconds("elementwise", 1e9, 5e11, "int8") == pytest.approx(1.0, abs=1e-5)


def test_an_unknown_dtype_names_the_known_ones_and_the_key_to_add():
    with pytest.raises(ValueError, match=r"knows bfloat16, float32: add devices\.gpu\.rates\.matmul\.float8"):
        DEVICE.seconds("matmul", 1e9, 0, "float8")


def test_an_unknown_work_class_or_tier_is_refused():
    with pytest.raises(ValueError, match="work class 'conv' is unknown; use one of matmul"):
        DEVICE.seconds("conv", 1e9, 0, "bfloat16")  # type: ignore[arg-type]
    assert DEVICE.tier("host").size_bytes == 256 * 10**9
    with pytest.raises(ValueError, match="no memory tier 'disk'; it has hbm, host"):
        DEVICE.tier("disk")
