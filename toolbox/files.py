"""Files that are whole or not there, and errors in one sentence."""

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give a temporary name to write to. It becomes `path` when all went well, and is removed when something failed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)  # a rename is all or nothing
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def errors_in_one_sentence() -> Iterator[None]:
    """What the user can mend (ValueError: a wrong word or number, OSError: files) ends the program without a traceback."""
    try:
        yield
    except (ValueError, OSError) as error:
        place = traceback.extract_tb(error.__traceback__)[-1]  # for those who change the code
        print(f"error: {error} ({Path(place.filename).name}:{place.lineno})", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
