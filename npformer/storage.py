"""Files: written whole or not at all, by one writer at a time, and read only if they are files.

    write(path, data)           whole, under its name, in one rename
    stage(path, data) .put()    the same in two steps: what may fail, and then the rename
    read(path)                  all of a regular file of a sane size
    with lock(folder):          the one training that may run there
    with in_turn(folder):       the one writer of several files that belong together
    sweep(folder)               removes what writers that died have left

A writer that died has left a file whose name nobody else uses, and which nobody has locked: the
kernel lets go of a dead process's locks, whatever killed it and whoever has its number now.

What becomes of modes, links, devices and FIFOs: docs/files.md.  Standard library only.
"""

import errno
import os
import re
import stat
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows: nobody is locked out
    fcntl = None

PART = re.compile(r"\.npformer\.[0-9a-f]{16}\.part")  # a file that is being written
LOCK = ".npformer.lock"
PATIENCE = 3.0  # seconds that a FIFO has to find a reader
LARGEST = 16 << 20  # bytes of a text that is read: parsed, it takes up to 30 times as much
KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a disk",
    stat.S_IFSOCK: "a socket",
}
# Not waiting for whoever is at the other end, and not becoming whose terminal it is
AT_ONCE = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0)
NO_LINK = getattr(os, "O_NOFOLLOW", 0)


# --- Reading ----------------------------------------------------------------------------------


def read(path: str | Path, largest: int = LARGEST) -> bytes:
    """All of a file.  Raises OSError, with the true reason, for what cannot be read to an end."""
    with os.fdopen(_open_regular(path), "rb") as file:
        data = file.read(largest + 1)
    if len(data) > largest:
        raise OSError(errno.EFBIG, f"larger than {largest / 2**20:g} MiB, this is something else")
    return data


def check_regular(path: str | Path) -> None:
    """Raises OSError, with the true reason, unless it is a file that can be read to an end."""
    os.close(_open_regular(path))


def _open_regular(path: str | Path) -> int:
    file = os.open(path, os.O_RDONLY | AT_ONCE)
    kind = KINDS.get(stat.S_IFMT(os.fstat(file).st_mode))
    if kind:
        os.close(file)
        raise OSError(errno.EINVAL, f"this is {kind}, not a file")
    return file


# --- Writing ----------------------------------------------------------------------------------


def write(path: str | Path, *data: Any) -> None:
    """Whole, in one rename.  Raises OSError, and then nothing has changed."""
    file = stage(path, *data)
    try:
        file.put()
    finally:
        file.drop()


def stage(path: str | Path, *data: Any) -> "Staged | Special":
    """The data, in one piece or several, on disk beside its place: `put` moves it, `drop` does not.

    So that what is likely to fail, as on a full disk, has been done before anything is replaced.
    """
    with _made(Path(path).parent):
        return _stage(Path(path), data)


def _stage(path: Path, data: tuple[Any, ...]) -> "Staged | Special":
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return Staged(path, data)
    kind = KINDS.get(stat.S_IFMT(mode))
    if kind in ("a FIFO", "a device") or _descriptor(path) is not None:
        return Special(path, data)
    if kind == "a folder":
        raise IsADirectoryError(errno.EISDIR, "Is a directory")
    if kind:
        raise OSError(errno.EINVAL, f"this is {kind}, not a file")
    return Staged(path, data)


class Staged:
    """A file that is written and not yet in its place."""

    def __init__(self, path: Path, data: tuple[Any, ...]):
        self.target = os.path.realpath(path)  # a link stays, what it leads to is replaced
        self.before: os.stat_result | None = None  # of the file that is to be replaced
        folder = os.path.dirname(self.target)
        sweep(folder)
        with suppress(FileNotFoundError):
            self._check_writable()
        self.file, self.name = _create(folder, 0o666 if self.before is None else 0o600)
        try:
            with open(self.file, "wb", closefd=False) as file:
                file.writelines(data)
                file.flush()
                if self.before is not None:
                    self._be_like(self.before)
                os.fsync(self.file)
        except BaseException:
            self.drop()
            raise

    def _check_writable(self) -> None:
        """What may not be written may not be replaced either, though the folder would allow it."""
        file = os.open(self.target, os.O_WRONLY | AT_ONCE)  # one question: it may go at any time
        self.before = os.fstat(file)
        os.close(file)

    def _be_like(self, before: os.stat_result) -> None:
        now = os.fstat(self.file)
        if (now.st_uid, now.st_gid) != (before.st_uid, before.st_gid):
            with suppress(OSError):  # who is not root cannot give files away
                os.fchown(self.file, before.st_uid, before.st_gid)
        os.fchmod(self.file, stat.S_IMODE(before.st_mode))

    def put(self) -> None:
        os.replace(self.name, self.target)
        self.name = ""

    def drop(self) -> None:
        """Gives the file up, unless it is in its place."""
        if self.name:
            with suppress(OSError):
                os.unlink(self.name)
        if self.file >= 0:
            os.close(self.file)
            self.file = -1


class Special:
    """A device, a FIFO or an open descriptor: it is written to and stays what it is."""

    def __init__(self, path: Path, data: tuple[Any, ...]):
        self.path, self.data = path, data

    def put(self) -> None:
        file = _descriptor(self.path)
        file = self._open() if file is None else os.dup(file)
        with os.fdopen(file, "wb") as stream:
            stream.writelines(self.data)

    def _open(self) -> int:
        end = time.monotonic() + PATIENCE
        while True:
            try:
                file = os.open(self.path, os.O_WRONLY | AT_ONCE)
            except OSError as error:
                if error.errno != errno.ENXIO:
                    raise
                if time.monotonic() > end:
                    raise OSError(errno.ENXIO, "nobody reads from the other end") from None
                time.sleep(0.02)
            else:
                os.set_blocking(file, True)
                return file

    def drop(self) -> None: ...


def _descriptor(path: Path) -> int | None:
    """1 of /dev/stdout: to open that again would be to write from its beginning once more."""
    found = re.fullmatch(r"/dev/(stdout|stderr)|/(?:dev|proc/self)/fd/(\d+)", str(path))
    return found and (("stdout", "stderr").index(found[1]) + 1 if found[1] else int(found[2]))


def _create(folder: str, mode: int) -> tuple[int, str]:
    """A new file of a name that nobody can have guessed, open and locked."""
    while True:
        name = os.path.join(folder, f".npformer.{os.urandom(8).hex()}.part")
        with suppress(FileExistsError):
            file = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | NO_LINK, mode)
            _flock(file)
            if os.fstat(file).st_nlink:  # else somebody swept before we had locked it
                return file, name
            os.close(file)


def sweep(folder: str | Path) -> None:
    """Removes from a folder what writers of ours left there when they died."""
    try:
        with os.scandir(folder) as entries:
            left = [entry.path for entry in entries if PART.fullmatch(entry.name)]
    except OSError:
        return
    for path in left:
        with suppress(OSError):
            file = os.open(path, os.O_RDWR | NO_LINK | AT_ONCE)
            try:
                about = os.fstat(file)
                is_ours = stat.S_ISREG(about.st_mode) and about.st_uid == os.geteuid()
                if is_ours and fcntl and _flock(file, wait=False):
                    os.unlink(path)
            finally:
                os.close(file)


# --- One at a time ----------------------------------------------------------------------------


def _flock(file: int, wait: bool = True) -> bool:
    """False where somebody else has the lock; OSError where the file system has none."""
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:  # some network file systems: all are alone there
        if not wait:
            raise
    return True


@contextmanager
def in_turn(folder: str | Path) -> Iterator[None]:
    """Writers of several files that belong together wait for each other."""
    file = os.open(folder, os.O_RDONLY)
    try:
        _flock(file)
        yield
    finally:
        os.close(file)


_held = threading.local()  # .folders: what this thread has locked


@contextmanager
def lock(folder: str | Path) -> Iterator[None]:
    """The folder is this thread's to train in; made if need be, removed again if nothing came.

    Raises BlockingIOError where another has it.  Who has it may lock it again.
    """
    folder, held = Path(folder), _held.__dict__.setdefault("folders", set())
    place = os.path.realpath(folder)
    if place in held:
        yield
        return
    with _made(folder):
        file = _take(folder)
        held.add(place)
        try:
            sweep(folder)
            yield
        finally:
            held.remove(place)
            with suppress(OSError):
                os.unlink(folder / LOCK)
            os.close(file)


@contextmanager
def _made(folder: Path) -> Iterator[None]:
    """The folder is there; of those that were made for it, the ones that stay empty go again."""
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        with suppress(OSError):  # something is in it
            for each in made:
                each.rmdir()


def _take(folder: Path) -> int:
    while True:
        file = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | NO_LINK | AT_ONCE, 0o666)
        try:
            is_free = _flock(file, wait=False)
        except OSError:
            is_free = True
        if not is_free:
            owner = os.read(file, 20).decode("ascii", "replace").strip()
            os.close(file)
            reason = f"another training is at work there (process {owner})"
            raise BlockingIOError(errno.EAGAIN, reason, str(folder))
        if os.fstat(file).st_nlink:  # else its owner removed it just now
            with suppress(OSError):  # it is locked all the same where a full disk has no room
                os.ftruncate(file, 0)
                os.write(file, f"{os.getpid()}\n".encode())
            return file
        os.close(file)
