"""Plan, simulate and run parallel training and serving of large language models.

A strategy is written once, as a schedule, and the same schedule is executed for real or simulated. What
most users need is here: `attention`, `linear_attention`, `SequenceLayout`, `Timeline`. Importing this
package imports nothing heavy; torch comes with the first use of a name that needs it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from counterpoint.runtime.attention import attention as attention
    from counterpoint.runtime.convolution import short_convolution as short_convolution
    from counterpoint.runtime.linear import linear_attention as linear_attention
    from counterpoint.runtime.relayout import relayout as relayout
    from counterpoint.schedule.timeline import Timeline as Timeline
    from counterpoint.strategies.sequence.layout import SequenceLayout as SequenceLayout

    __version__: str

_EXPORTS = {
    "attention": "counterpoint.runtime.attention",
    "short_convolution": "counterpoint.runtime.convolution",
    "linear_attention": "counterpoint.runtime.linear",
    "relayout": "counterpoint.runtime.relayout",
    "SequenceLayout": "counterpoint.strategies.sequence.layout",
    "Timeline": "counterpoint.schedule.timeline",
}

__all__ = [
    "SequenceLayout",
    "Timeline",
    "__version__",
    "attention",
    "linear_attention",
    "relayout",
    "short_convolution",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("counterpoint")
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'counterpoint' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
