"""What the checker must know of the guest image: every address comes from its ELF symbols."""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from functools import lru_cache
from typing import Final, NamedTuple

PAGE: Final = 4096

DATA_PAGES_TAG: Final = 0x90E3_FF00_0000_00B8
"""`mov $imm32, %eax; jmp *%rbx; nop`: see `tag`."""


class Region(NamedTuple):
    """System-physical addresses from `start` up to, not including, `end`."""

    start: int
    end: int

    def __contains__(self, address: object) -> bool:
        return isinstance(address, int) and self.start <= address < self.end


class Stub(NamedTuple):
    """One of L2's code pages: its sPA, and the offsets in it of its labels."""

    page: int
    labels: Mapping[str, int]


class Image(NamedTuple):
    """L1's memory map, in sPAs, and the symbols of its L2.

    VMCBs, tables and data lie above 4 GiB, where an address that was cut to 32 bits leads elsewhere; the `low_`
    ones are for what hardware addresses with 32 bits only. RAM has a hole from `low_end` to 4 GiB.
    """

    ram_end: int
    low_end: int
    shared: int
    op_ring: int
    record_ring: int
    mailbox: int
    vmcbs: Region
    arena: Region
    data: Region
    low_vmcbs: Region
    low_arena: Region
    low_data: Region
    mirror_offset: int
    stubs: Mapping[str, Stub]
    """L2's code, by the kind of code: long, prot, real."""

    @classmethod
    def from_symbols(cls, symbols: Mapping[str, int]) -> Image:
        """Raises KeyError, naming the symbol, for an image that is not L1's."""
        return cls(
            ram_end=symbols["tw_ram_end"],
            shared=symbols["tw_shared_page"],
            op_ring=symbols["tw_op_ring"],
            record_ring=symbols["tw_record_ring"],
            mailbox=symbols["tw_mailbox"],
            low_end=symbols["tw_low_end"],
            **{f"{low}{name}s" if name == "vmcb" else f"{low}{name}":
               Region(symbols[f"tw_{high}{name}"], symbols[f"tw_{high}{name}_end"])
               for low, high in (("", "high_"), ("low_", "")) for name in ("vmcb", "arena", "data")},
            mirror_offset=symbols["tw_mirror_offset"],
            stubs={kind: _stub(symbols, f"l2_{kind}_") for kind in ("long", "prot", "real")},
        )

    @property
    def ram_bytes(self) -> int:
        """How much RAM that is."""
        return self.offset(self.ram_end)

    def offset(self, spa: int) -> int:
        """Where `spa` is in the file that backs L1's RAM: what lies above the hole follows on what lies below."""
        return spa if spa < 1 << 32 else spa - (1 << 32) + self.low_end

    @property
    def pieces(self) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
        """The RAM on either side of the hole: sPA, bytes, offset in the file."""
        high = 1 << 32
        return (0, self.low_end, 0), (high, self.ram_end - high, self.low_end)

    def in_arena(self, spa: int) -> bool:
        """Whether `spa` is one of page tables."""
        return spa in self.arena or spa in self.low_arena

    def in_data(self, spa: int) -> bool:
        """Whether `spa` is one of data pages."""
        return spa in self.data or spa in self.low_data


def _stub(symbols: Mapping[str, int], prefix: str) -> Stub:
    page = symbols[f"{prefix}page"]
    return Stub(page, {n.removeprefix(prefix): a - page for n, a in symbols.items() if n.startswith(prefix)})


def tag(spa: int) -> int:
    """What the quadword at `spa` of the data pages holds at first: its own name, as a value that a
    read returns, and as code that a fetch lands on and that returns spa / 8 to L2's stub."""
    return DATA_PAGES_TAG | (spa >> 3) << 8


@lru_cache(maxsize=4)  # the machine and the model each begin with it, of two regions
def tags(region: Region) -> bytes:
    """The initial content of a whole region of data pages."""
    first, last = tag(region.start), tag(region.end)
    return array("Q", range(first, last, 0x100)).tobytes()
