"""Files that appear under their name when they are whole, as in part_file.h."""

import os
import tempfile
from contextlib import contextmanager


def check_replaceable(path):
    """Raises OSError, before the work, when `path` cannot be replaced: a device would be written without end."""
    if os.path.isdir(path):
        raise IsADirectoryError(f"cannot write {path}: it is a directory")
    if os.path.exists(path) and not os.path.isfile(path):
        raise OSError(f"cannot write {path}: it is there and no regular file")
    folder = os.path.dirname(os.path.realpath(path))
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OSError(f"cannot write {path}: {folder} is no folder to write in")


def check_apart(path, inputs):
    """Raises OSError when `path`, which is to be written, is one of the files that are read (None: none)."""
    for read in inputs:
        if read and os.path.exists(path) and os.path.exists(read) and os.path.samefile(path, read):
            raise OSError(f"cannot write {path}: it is a file that is read")


@contextmanager
def replacing(path):
    """A binary file that takes the place of `path` at the end. What was there stays when that is not reached."""
    check_replaceable(path)
    path = os.path.realpath(path)
    mask = os.umask(0)
    os.umask(mask)
    descriptor, part = tempfile.mkstemp(prefix=os.path.basename(path) + ".part-", dir=os.path.dirname(path))
    try:
        with open(descriptor, "wb") as file:
            os.fchmod(descriptor, 0o666 & ~mask)  # mkstemp lets only the owner read
            yield file
        os.replace(part, path)
    except BaseException:
        os.unlink(part)
        raise
