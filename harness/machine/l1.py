"""What all machines have in common: a booted L1, and what it says of itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final, NamedTuple

from harness.errors import LaunchFailed, MachineLost
from harness.machine import guests
from harness.machine.l0_kvm import L0Kvm
from harness.machine.trace import Trace
from harness.model.liberties import Liberties
from harness.model.registers import Cpu
from harness.wire.channel import Channel
from harness.wire.image import Image, tags
from harness.wire.layout import FEATURES, PROTOCOL

HANG_TIMEOUT: Final = 5.0
"""Seconds without a record after which L1 or L2 is said to hang."""


class Layer(NamedTuple):
    """A part of a machine that errata are of."""

    name: str
    version: tuple[int, ...]


@dataclass(frozen=True)
class Identity:
    """What was tested, for reports and errata. `kernel` and what belongs to it are of L0, and empty where there
    is none; `layers` are those that errata may be of, that under test first."""

    machine: str
    qemu: str
    qemu_version: tuple[int, int, int]
    cpu_model: str
    layers: tuple[Layer, ...] = ()
    kernel: str = ""
    kernel_version: tuple[int, ...] = ()
    kvm_parameters: tuple[str, ...] = ()
    l1_pages: str = ""
    contexts: str = ""
    """Whether the MMU contexts of the KVM under L1 are observed, or why not."""
    microcode: int = 0
    """MSR 8Bh."""
    maxphyaddr: int = 0
    svm_revision: int = 0
    asids: int = 0
    svm_features: int = 0
    features: tuple[str, ...] = ()
    host: str = ""
    """The host that it was on, where that is another one than this."""


WITHOUT_NPT: Final = "kvm-without-npt"
"""The layer of a KVM that gives L1 no nested paging, having none itself."""


class L1Machine:
    """A booted L1, ready for programs; `liberties` are those that the machine takes."""

    def __init__(self, image: Image, memory: memoryview, identity: Identity, liberties: Liberties) -> None:
        self.image = image
        self.memory = memory
        self.channel: Channel = Channel(memory, image)
        self.identity = identity
        self.liberties = liberties
        self.trace: Trace | None = None
        self.kvm: L0Kvm | None = None
        """The KVM under L1 as it lies in memory, where that is to be audited."""
        self.cpu = Cpu()

    def greet(self, hello: Mapping[str, int]) -> None:
        """Take L1's word for its CPU, and fill the data pages. Raises LaunchFailed if it speaks another protocol."""
        if hello["protocol"] != PROTOCOL:
            raise LaunchFailed(
                f"the guest speaks protocol {hello['protocol']}, this is {PROTOCOL}: delete {guests.cache_dir()}"
            )
        features = tuple(name for bit, name in enumerate(FEATURES) if hello["features"] >> bit & 1)
        self.identity = replace(
            self.identity, maxphyaddr=hello["maxphyaddr"], svm_revision=hello["svm_revision"], asids=hello["asids"],
            svm_features=hello["svm_features"], features=features,
        )
        under = self.identity.layers[:1]
        if under and under[0].name == "kvm" and not hello["svm_features"] & 1:
            self.identity = replace(self.identity, layers=(*self.identity.layers, Layer(WITHOUT_NPT, under[0].version)))
        self.cpu = Cpu(hello["maxphyaddr"], "page1g" in features, hello["asids"], frozenset(features),
                       npt=bool(hello["svm_features"] & 1), vgif=bool(hello["svm_features"] >> 16 & 1))
        for region in (self.image.data, self.image.low_data):
            data = tags(region)
            for start in (region.start, region.start + self.image.mirror_offset):
                self.memory[start : start + len(data)] = data

    def idle(self, waited: float) -> None:
        """See harness.lockstep.driver.Machine."""
        self._see_whether_it_lives(waited)
        if panic := self.channel.panic():
            raise self.lost(panic)
        if waited > HANG_TIMEOUT:
            raise self.lost(f"no record for {HANG_TIMEOUT:.0f} s: L1 or L2 hangs")

    def rest(self) -> None:
        """L1 has nothing to do for a while, until something is posted."""

    def _see_whether_it_lives(self, waited: float) -> None:
        """Raises MachineLost if it does not."""
        raise NotImplementedError

    def _lost(self, reason: str) -> MachineLost:
        raise NotImplementedError

    def lost(self, reason: str) -> MachineLost:
        """See harness.lockstep.driver.Machine."""
        return replace(self._lost(reason), last_record=self.channel.last_record())

    def close(self) -> None:
        """Let go of the guest's memory; it is unmapped with the last view of it."""
        self.channel.close()
