"""Parts of error messages: why a file failed, which known name is near an unknown one.

because(error)                      # "data.txt: permission denied; make it readable for this user"
did_you_mean("medua", ["medusa"])   # "; did you mean 'medusa'?"
"""

from __future__ import annotations

import difflib
import errno
import shlex
import sys
from collections.abc import Iterable
from pathlib import PurePath
from typing import NoReturn

_LONGEST = 80
# errno -> the rule that was broken, and the way out
_RULES = {
    errno.ENOENT: ("there is no such file or directory", "check the path"),
    errno.EACCES: ("this user may not open it", "change its permissions or choose another path"),
    errno.EPERM: ("this user may not change it", "change its permissions or choose another path"),
    errno.EROFS: ("the file system is read-only", "choose a directory that can be written"),
    errno.ENOSPC: ("No space left on the disk", "free some space or choose another disk"),
    errno.EDQUOT: ("the disk quota is used up", "free some space or choose another disk"),
    errno.EFBIG: ("the file would be too large for its file system", "choose another disk"),
    errno.EISDIR: ("it is a directory where a file is needed", "name a file"),
    errno.ENOTDIR: ("a part of the path is a file, not a directory", "check the path"),
    errno.EEXIST: ("it exists already", "remove it or choose another path"),
    errno.ENOTEMPTY: ("the directory is not empty", "choose an empty or new one"),
    errno.ENAMETOOLONG: ("the name is longer than the system allows", "choose a shorter one"),
    errno.ELOOP: ("its symbolic links form a loop", "name the file itself"),
    errno.EMFILE: ("too many files are open", "raise the limit with `ulimit -n`"),
    errno.ENFILE: ("too many files are open", "close other programs"),
    errno.EBUSY: ("it is in use", "wait, or choose another path"),
    errno.EXDEV: ("it would move to another disk", "choose a path on the same disk"),
    errno.EINVAL: ("the system does not accept this path or size", "choose another path"),
    errno.ENOMEM: ("the system has no memory left", "close other programs or ask for less"),
    errno.EAGAIN: ("the system has no threads or processes left", "use fewer threads"),
    errno.EIO: ("the disk reports an input/output error", "check the disk, copy the file again"),
    errno.EBADF: ("it is closed", "open it, or give a file"),
}


def because(error: OSError) -> str:
    """The file that an operating system error names, the rule that was broken, and the way out."""
    name = error.filename if error.filename is not None else error.filename2
    rule, way_out = _RULES.get(error.errno or 0, (error.strerror or str(error), "try another path"))
    if isinstance(name, bytes):
        name = name.decode(errors="replace")
    return f"{shown(name)}: {rule}; {way_out}" if name is not None else f"{rule}; {way_out}"


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """A clause for the end of a message about an unknown name; empty when nothing is near."""
    # in small letters, so that BF16 is near bf16
    words = {word.lower(): word for word in known}
    near = difflib.get_close_matches(str(name).lower(), list(words), n=1, cutoff=0.6)
    return f"; did you mean {words[near[0]]!r}?" if near else ""


def now_called(command: str) -> NoReturn:
    """Answer `python -m` of a module that is a verb now: the new command, and exit code 2."""
    words = shlex.join(sys.argv[1:])
    print(f"error: this command is now: {command} {words}".rstrip(), file=sys.stderr, flush=True)
    sys.exit(2)


def shown(value: object) -> str:
    """A value as a message shows it: on one line, with a long one cut."""
    text = str(value) if isinstance(value, str | PurePath) else _text(value)
    text = text.encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}… ({len(text)} characters)"


def quoted(value: object) -> str:
    """As `shown`, with a text in quotes: '"5"' is no number, which '5' would not say."""
    return shown(repr(value) if isinstance(value, str) else value)


def _text(value: object) -> str:
    try:
        return repr(value)
    except ValueError:
        # Python refuses to write whole numbers of thousands of digits
        return f"a {type(value).__name__} of thousands of digits"
