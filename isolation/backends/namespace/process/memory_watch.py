"""An eye on a sandbox's memory, of its supervisor: no process inside can name that one, and so none can blind it (a guest
that may lower the limits of who watches, by prlimit(2), keeps it from opening what it looks at).

Where a cgroup holds the limit, the kernel kills at once, and no stack could be written any more: so it is
written when the limit is near. Where there is none (an ordinary user without a delegated cgroup), the watch adds up
what the sandbox's processes hold, and the sandbox is ended by who watches. What cannot be looked at counts as over the
limit.
"""

from __future__ import annotations

from isolation.linux.cgroup import oom_kills
from isolation.plain import os, time

_INTERVAL = 5  # ms; an allocating process touches some 1 to 2 GB/s, and so is 10 MB further at the next look
_SELDOM = 250  # ms between two looks, where the limit is too far away to be reached meanwhile
_FASTEST = (8 << 30) * (os.cpu_count() or 1)  # bytes/s: no processor clears pages faster than that
_HEADROOM = 64 << 20  # "near" is this much below the limit: time enough to write stacks
_PAGE = os.sysconf("SC_PAGE_SIZE")
_UNSEEN = 1 << 62  # bytes, of a process that is there, but cannot be looked at
_GONE = (FileNotFoundError, ProcessLookupError)


class Watch:
    """Looks the oftener, the nearer the limit is.

    `cgroup_files` are those of Cgroup.open_memory_files; without them, `proc` (the sandbox's /proc) and `store`
    (its file store) tell: of the processes of its own PID namespace only, with `own_only`. The forks of a template are in
    others, and have limits of their own.
    """

    def __init__(
        self, limit: int, cgroup_files: tuple[int, int] | None, proc: int, store: int, *, kills: bool, own_only: bool = False
    ) -> None:
        self._limit = limit
        self._near = max(limit // 2, min(limit * 85 // 100, limit - _HEADROOM))
        self._files = cgroup_files
        self._proc = proc
        self._store = store
        self._kills = kills
        self._own_only = own_only
        self._next = 0.0
        self.idle = False  # there is no process to watch

    @property
    def interval(self) -> float:
        """Milliseconds until there is something to look at."""
        return max(1.0, (self._next - time.monotonic()) * 1000)

    def look(self) -> str:
        """ "low", "near" the limit or "over" it (only where nobody else holds it); "unknown" between two looks."""
        now = time.monotonic()
        if now < self._next:
            return "unknown"
        try:
            used = self._used()
        except OSError:
            used = _UNSEEN
        self._next = now + min(max(_INTERVAL / 1000, (self._near - used) / _FASTEST), _SELDOM / 1000)
        if used > self._limit and self._kills:
            return "over"
        return "near" if used > self._near else "low"

    def kernel_killed(self) -> bool:
        """Whether the kernel has killed something of this sandbox for want of memory."""
        return self._files is not None and oom_kills(os.pread(self._files[1], 4096, 0).decode()) > 0

    def close(self) -> None:
        """Close what it looks at."""
        for fd in (self._proc, self._store, *(self._files or ())):
            if fd >= 0:
                os.close(fd)

    def _used(self) -> int:
        if self._files is not None:
            return int(os.pread(self._files[0], 64, 0))
        filesystem = os.fstatvfs(self._store)
        stored = (filesystem.f_blocks - filesystem.f_bfree) * filesystem.f_frsize
        # Resident sizes count a page once for each process that shares it: a bound that costs 10 µs a process. Only
        # when it says "near" is the kernel asked for the exact share, which walks page tables.
        processes = [name for name in os.listdir(self._proc) if name.isdigit() and name != "1"]
        self.idle = not processes
        bound = stored + sum(map(self._resident, processes))
        if bound >= self._near and self._own_only:
            processes = list(filter(self._is_own, processes))
            bound = stored + sum(map(self._resident, processes))
        return bound if bound < self._near else stored + sum(map(self._share, processes))

    def _is_own(self, pid: str) -> bool:
        """One number in all: that in the PID namespace of this /proc (proc_pid_status(5), NSpid)."""
        try:
            lines = self._read(f"{pid}/status").split(b"\n")
        except _GONE:
            return False
        return any(line.startswith(b"NSpid:") and len(line.split()) == 2 for line in lines)

    def _read(self, name: str) -> bytes:
        fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=self._proc)
        try:
            return os.read(fd, 4096)
        finally:
            os.close(fd)

    def _resident(self, pid: str) -> int:
        try:
            pages = int(self._read(f"{pid}/statm").split()[1])
            if not pages:  # its first thread has ended, and the memory is the others'
                pages = max((self._pages_of(pid, task) for task in self._tasks(pid)), default=0)
        except _GONE:
            return 0
        except (OSError, IndexError, ValueError):
            return _UNSEEN
        return pages * _PAGE

    def _pages_of(self, pid: str, task: str) -> int:
        try:
            return int(self._read(f"{pid}/task/{task}/statm").split()[1])
        except _GONE:
            return 0

    def _tasks(self, pid: str) -> list[str]:
        fd = os.open(f"{pid}/task", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self._proc)
        try:
            return os.listdir(fd)
        finally:
            os.close(fd)

    def _share(self, pid: str) -> int:
        """Proportional anonymous and shared memory; for a process that made itself undumpable, all it has."""
        try:
            lines = self._read(f"{pid}/smaps_rollup").split(b"\n")[1:]
            fields = dict(line.split(b":") for line in lines if line)
            return sum(int(fields[name].split()[0]) << 10 for name in (b"Pss_Anon", b"Pss_Shmem"))
        except (OSError, KeyError, ValueError):
            return self._resident(pid)
