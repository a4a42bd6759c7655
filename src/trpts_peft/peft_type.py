"""The member that TR-PTS adds to PEFT's enumeration of methods."""

from __future__ import annotations

from aenum import extend_enum
from peft import PeftType

__all__ = ["TRPTS"]


def _member() -> PeftType:
    return PeftType["TRPTS"]


def _reduce(_protocol: object) -> tuple[object, tuple[()]]:
    return _member, ()


if "TRPTS" not in PeftType.__members__:  # the package may be imported again, or reloaded
    extend_enum(PeftType, "TRPTS", "TRPTS")
    # Pickled by way of this module, so that a process that never imported the package finds the member.
    setattr(PeftType["TRPTS"], "__reduce_ex__", _reduce)  # noqa: B010

TRPTS: PeftType = _member()
