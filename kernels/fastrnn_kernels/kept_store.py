"""Findings about the GPU at hand, kept on disk as JSON: measured tiles, verdicts of checks.

`$XDG_CACHE_HOME/fastrnn/NAME-VERSION.json` (`~/.cache/fastrnn/...`). VERSION is Triton's and a hash
of the sources that a finding depends on, for a change of either makes other machine code.

A file that cannot be read, or is not what it should be, is as good as none: the reason is logged as
a warning.

Limits: of two processes that write at the same time the later one may lose what the earlier found;
the file is whole at any time. A process sees what others write only when it starts, or saves.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar

import triton

Finding = TypeVar("Finding")

_log = logging.getLogger("fastrnn")


def cache_directory() -> Path:
    """Where findings are kept.

    Raises:
        RuntimeError: neither XDG_CACHE_HOME nor a home directory is known.
    """
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "fastrnn"


@functools.cache
def version_of(sources: tuple[str, ...]) -> str:
    """Triton's version and a hash of these files of the package."""
    digest = hashlib.sha256()
    for name in sources:
        digest.update((Path(__file__).parent / name).read_bytes())
    return f"{triton.__version__}-{digest.hexdigest()[:16]}"


class KeptStore(Generic[Finding]):
    """Findings by key, as this process found them on disk, and what it added.

    Args:
        name: of the file, and of the object in it that holds the entries.
        what: what they are, for the log.
        remedy: what to do about a file that cannot be read, for the log.
        sources: files of the package that they depend on.
        from_entry: makes a finding of an entry; raises ValueError, TypeError or KeyError where the
            entry is not one.
    """

    def __init__(
        self,
        name: str,
        what: str,
        remedy: str,
        sources: tuple[str, ...],
        from_entry: Callable[[Any], Finding],
    ) -> None:
        self.name = name
        self._what = what
        self._remedy = remedy
        self._sources = sources
        self._from_entry = from_entry
        self._findings: dict[str, Finding] | None = None

    @property
    def version(self) -> str:
        """Of Triton and the sources."""
        return version_of(self._sources)

    def path(self) -> Path:
        """The file.

        Raises:
            RuntimeError: see :func:`cache_directory`.
        """
        return cache_directory() / f"{self.name}-{self.version}.json"

    def findings(self) -> dict[str, Finding]:
        """All that is known, by key."""
        if self._findings is None:
            try:
                self._findings = self._read(self.path())[1]
            except (OSError, RuntimeError) as error:
                _log.warning("no place for %s: %s", self._what, error)
                self._findings = {}
        return self._findings

    def add(self, entries: Mapping[str, Any]) -> Path | None:
        """Adds entries, for this process and later ones.

        Returns:
            The file, or None where it could not be written; the reason is logged as a warning.
        """
        try:
            path = self.path()
            path.parent.mkdir(parents=True, exist_ok=True)
            kept = self._read(path)[0] | dict(entries)
            content = {"version": self.version, self.name: dict(sorted(kept.items()))}
            _replace(path, json.dumps(content, indent=1) + "\n")
        except (OSError, RuntimeError) as error:
            _log.warning("%s are not kept beyond this process: %s", self._what, error)
            new = {key: self._from_entry(entry) for key, entry in entries.items()}
            self._findings = self.findings() | new
            return None
        self._findings = None
        return path

    def forget(self) -> None:
        """Reads the file anew when it is next asked for."""
        self._findings = None

    def _read(self, path: Path) -> tuple[dict[str, Any], dict[str, Finding]]:
        """A file's entries and what they are; none where it is not what it should be."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["version"] != self.version:
                raise ValueError(f"it is of version {content['version']}, this is {self.version}")
            entries: dict[str, Any] = content[self.name]
            return entries, {key: self._from_entry(entry) for key, entry in entries.items()}
        except FileNotFoundError:
            return {}, {}
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            _log.warning(
                "%s in %s are ignored (%s: %s); delete the file, or %s",
                self._what,
                path,
                type(error).__name__,
                error,
                self._remedy,
            )
            return {}, {}


def _replace(path: Path, text: str) -> None:
    """Writes a file so that readers see the old one or the new one, and never a part."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
