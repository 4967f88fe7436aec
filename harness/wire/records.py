"""A record as L1 posted it, read in place."""

from __future__ import annotations

import struct
from typing import Final

from harness.wire.layout import CONTROL_BYTES, HOST, MAX_DIFFS, RECORD, RECORDS, REGS, SAVE_BYTES

_AT: Final = RECORD.offsets
_HEAD: Final = struct.Struct("<IIQIIQQ")
_BEFORE, _AFTER, _REGS = _AT["before"], _AT["after"], _AT["regs"]
_CONTROL, _SAVE, _RESULTS, _DIFFS = _AT["control"], _AT["save"], _AT["results"], _AT["diffs"]
_TSC: Final = HOST.offsets["tsc"]
_NO_TSC: Final = bytes(8)
_RESULT: Final = struct.Struct("<Q")
_EXIT: Final = struct.Struct("<QQQ")
_PAIR: Final = struct.Struct("<QQ")
_EXITCODE: Final = 0x70
_EXITINFO1: Final = 0x78
_EXITINFO2: Final = 0x80

KIND_NAMES: Final = {number: name for name, number in RECORDS.items()}


def host_registers(data: bytes) -> tuple[dict[str, int], dict[str, int]]:
    """What `Record.around` has, by name."""
    before, after = HOST.packer.iter_unpack(data)
    return dict(zip(HOST.names, before, strict=True)), dict(zip(HOST.names, after, strict=True))


class Record:
    """One slot of the record ring. It is live memory: read what is needed before it is released."""

    __slots__ = ("data", "diffs_found", "first_probe", "kind", "next_probe", "op", "sequence", "vmcb")

    def __init__(self, data: memoryview) -> None:
        self.data = data
        (self.kind, self.diffs_found, self.sequence, self.first_probe, self.next_probe,
         self.vmcb, self.op) = _HEAD.unpack_from(data)

    @property
    def control(self) -> bytes:
        """The VMCB's control area, from its first byte."""
        return bytes(self.data[_CONTROL : _CONTROL + CONTROL_BYTES])

    @property
    def save(self) -> bytes:
        """The VMCB's state-save area, from its first byte."""
        return bytes(self.data[_SAVE : _SAVE + SAVE_BYTES])

    @property
    def exitcode(self) -> int:
        """EXITCODE, all 64 bits."""
        return int(_RESULT.unpack_from(self.data, _CONTROL + _EXITCODE)[0])

    @property
    def fault_code(self) -> int:
        """EXITINFO1."""
        return int(_RESULT.unpack_from(self.data, _CONTROL + _EXITINFO1)[0])

    @property
    def fault_address(self) -> int:
        """EXITINFO2."""
        return int(_RESULT.unpack_from(self.data, _CONTROL + _EXITINFO2)[0])

    @property
    def exit(self) -> tuple[int, int, int]:
        """EXITCODE, EXITINFO1 and EXITINFO2."""
        code, info1, info2 = _EXIT.unpack_from(self.data, _CONTROL + _EXITCODE)
        return code, info1, info2

    @property
    def before(self) -> dict[str, int]:
        """L1's own registers right before VMRUN, by name."""
        return dict(zip(HOST.names, HOST.packer.unpack_from(self.data, _BEFORE), strict=True))

    @property
    def after(self) -> dict[str, int]:
        """L1's own registers right after the #VMEXIT, by name."""
        return dict(zip(HOST.names, HOST.packer.unpack_from(self.data, _AFTER), strict=True))

    @property
    def around(self) -> tuple[bytes, int, int]:
        """`before` and `after` as they lie there, their time stamp counters 0; and those."""
        data = self.data
        return (b"".join((data[_BEFORE : _BEFORE + _TSC], _NO_TSC, data[_BEFORE + _TSC + 8 : _AFTER + _TSC], _NO_TSC,
                          data[_AFTER + _TSC + 8 : _REGS])),
                _RESULT.unpack_from(data, _BEFORE + _TSC)[0], _RESULT.unpack_from(data, _AFTER + _TSC)[0])

    @property
    def regs(self) -> dict[str, int]:
        """The general registers that are not in the VMCB, by name."""
        return dict(zip(REGS.names, REGS.packer.unpack_from(self.data, _REGS), strict=True))

    def result(self, probe: int) -> int:
        """The 64-bit result of that probe, by its index in the run."""
        return int(_RESULT.unpack_from(self.data, _RESULTS + 8 * probe)[0])

    @property
    def diffs(self) -> dict[int, int]:
        """Watched quadwords that changed, by sPA. At most MAX_DIFFS: compare with `diffs_found`."""
        count = min(self.diffs_found, MAX_DIFFS)
        return dict(_PAIR.iter_unpack(self.data[_DIFFS : _DIFFS + count * _PAIR.size]))

    def __str__(self) -> str:
        kind = KIND_NAMES.get(self.kind, f"kind {self.kind}")
        text = f"#{self.sequence} {kind}, probe {self.first_probe}"
        if kind == "EXIT":
            text += f" to {self.next_probe}, exit code {self.exitcode:#x}"
        return text
