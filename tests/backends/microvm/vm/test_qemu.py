"""The command line of a machine: each word that is there for a reason which was found the hard way."""

from __future__ import annotations

import pytest

from isolation.backends.microvm.artifacts.cache import Cache
from isolation.backends.microvm.vm import accel, qemu
from isolation.backends.microvm.vm.qemu import Boot, Descriptors, Hardware, Qemu
from isolation.errors import BackendUnavailable

pytestmark = pytest.mark.once

HARDWARE = Hardware("microvm", "tcg", 512 << 20, 1, layers=2, slots=1)


def command(*, boot: bool, hardware: Hardware = HARDWARE) -> list[str]:
    return qemu.command(
        Qemu("qemu", (7, 2, 0), "x"), hardware, Descriptors(), qmp=10, agent=11, console=12, memory=13, drives=[14, 15, 16],
        shared=boot, boot=Boot(17, 18, "words") if boot else None,
    )  # fmt: skip


def devices(words: list[str]) -> list[str]:
    return [words[place + 1] for place, word in enumerate(words) if word == "-device"]


def test_a_fork_has_the_hardware_of_its_template() -> None:
    """Same devices in the same order, or the saved state does not fit; but neither kernel nor initramfs."""
    booted, forked = command(boot=True), command(boot=False)
    assert devices(booted) == devices(forked)
    assert booted[booted.index("-M") : booted.index("-sandbox")] == forked[forked.index("-M") : forked.index("-sandbox")]
    assert "-kernel" in booted
    assert not {"-kernel", "-initrd", "-append"} & set(forked)
    assert forked[forked.index("-incoming") + 1] == "defer"  # capabilities are set before the state is read


def test_memory_is_shared_by_the_template_and_private_to_forks() -> None:
    def share(words: list[str]) -> str:
        return next(word for word in words if word.startswith("memory-backend-file")).rpartition("share=")[2]

    assert (share(command(boot=True)), share(command(boot=False))) == ("on", "off")


def test_everything_is_a_descriptor() -> None:
    """No path that QEMU would have to find in its sandbox, and drives that it cannot write."""
    words = command(boot=True)
    assert not [word for word in words if "/" in word and "/proc/self/fd/" not in word and "/dev/fdset/" not in word]
    drives = [words[place + 1] for place, word in enumerate(words) if word == "-drive"]
    assert len(drives) == 3
    assert all("readonly=on" in drive for drive in drives)


def test_qemu_confines_itself() -> None:
    words = command(boot=False)
    assert words[words.index("-sandbox") + 1] == "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"
    assert {"-nodefaults", "-no-user-config", "-no-reboot"} <= set(words)
    assert not [word for word in words if "netdev" in word or "virtio-net" in word]


def test_acpi_stays_on() -> None:
    """Distributions' kernels find virtio-mmio devices by it: CONFIG_VIRTIO_MMIO_CMDLINE_DEVICES is off."""
    assert "acpi" not in " ".join(command(boot=True))


def test_the_clock_of_an_emulated_machine_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no timer to calibrate it with, and the boot would hang on a loaded host; a KVM guest has the host's."""
    monkeypatch.setattr(qemu, "tsc_khz", lambda: 2300000)
    assert "tsc_early_khz=2300000 tsc=reliable" in qemu.kernel_arguments(HARDWARE)
    assert "tsc" not in qemu.kernel_arguments(Hardware("microvm", "kvm", 1 << 29, 1, 1, 0))
    monkeypatch.setattr(qemu, "tsc_khz", lambda: 0)
    assert "tsc" not in qemu.kernel_arguments(HARDWARE)


def test_a_panic_is_an_end() -> None:
    assert "panic=-1 " in qemu.kernel_arguments(HARDWARE)


def test_the_cache_of_translated_code_is_small() -> None:
    assert "tcg,tb-size=32" in command(boot=False)


def test_other_hardware() -> None:
    kvm = command(boot=True, hardware=Hardware("q35", "kvm", 1 << 30, 2, 1, 0, nat=True))
    assert kvm[kvm.index("-accel") + 1] == "kvm"
    assert kvm[kvm.index("-cpu") + 1] == "host"
    assert "virtio-net-pci,netdev=n" in devices(kvm)


@pytest.mark.parametrize("boots", [True, False])
def test_kvm_is_tried_once(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, boots: bool) -> None:
    cache = Cache(tmp_path_factory.mktemp("cache"))
    tries = []

    def attempt() -> bool:
        tries.append(1)
        return boots

    monkeypatch.delenv(accel.VARIABLE, raising=False)
    monkeypatch.setattr(accel, "why_not", lambda: "")
    monkeypatch.setattr(accel, "_boot_id", lambda: "this boot")
    wanted = "kvm" if boots else "tcg"
    assert [accel.choose(cache, attempt) for _ in range(3)] == [wanted] * 3
    assert len(tries) == 1
    monkeypatch.setattr(accel, "_boot_id", lambda: "the next boot")
    accel.choose(cache, attempt)
    assert len(tries) == 2
    monkeypatch.setattr(accel, "why_not", lambda: "there is no /dev/kvm")
    assert accel.choose(cache, attempt) == "tcg"
    assert len(tries) == 2
    monkeypatch.setenv(accel.VARIABLE, "kvm")
    assert accel.choose(cache, attempt) == "kvm"
    monkeypatch.setenv(accel.VARIABLE, "fast")
    with pytest.raises(BackendUnavailable, match="ISOLATION_ACCEL"):
        accel.choose(cache, attempt)
