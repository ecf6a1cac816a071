"""When does something change in a folder? File events from watchdog, kept alive over moves and deletions."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from watchdog.events import FileSystemEvent, FileSystemEventHandler
from watchdog.observers import Observer
from watchdog.observers.api import BaseObserver, ObservedWatch

log = logging.getLogger(__name__)

# Two harmless races inside watchdog: a folder that it sees twice while it is made, and an event read during stop.
warnings.filterwarnings("ignore", "Callback with id", RuntimeWarning)
logging.getLogger("watchdog.observers.inotify").addFilter(
    lambda record: "called when the thread is inactive" not in str(record.msg)
)

_READS = frozenset({"opened", "closed_no_write"})
_STRUCTURE = frozenset({"created", "deleted", "moved"})


class FolderWatch(FileSystemEventHandler):
    """Calls `on_event` from a thread of its own whenever a model file or a folder changed.

    `follow` and `stop` block (they walk the tree): call them from a worker thread, one at a time.
    """

    def __init__(self, on_event: Callable[[], None]) -> None:
        self._on_event = on_event
        self._observer: BaseObserver | None = None
        self._watches: dict[tuple[Path, int, int], ObservedWatch] = {}
        self._failed: str | None = None

    def follow(self, folders: Sequence[Path]) -> bool:
        """Watch exactly these real folders, sub-folders included. Returns whether a watch was added.

        A folder that was deleted and made again is watched again. Where events cannot be had, a warning is
        logged once and `working` turns false.
        """
        wanted = {key for folder in folders if (key := _identity(folder))}
        for key, watch in list(self._watches.items()):
            if key not in wanted or not self._is_alive(watch):
                del self._watches[key]
                if self._observer:
                    self._observer.unschedule(watch)
        added = False
        try:
            for key in sorted(wanted - self._watches.keys()):
                if self._observer is None:
                    self._observer = Observer()
                    self._observer.start()
                self._watches[key] = self._observer.schedule(self, str(key[0]), recursive=True)
                added = True
            self._failed = None
        except (OSError, RuntimeError) as error:
            if self._failed != str(error):
                log.warning("no file events, the models folder is polled instead: %s", error)
            self._failed = str(error)
            self.stop()
            return False
        return added

    @property
    def working(self) -> bool:
        """Whether events come for every folder that was asked for, and there is at least one."""
        return bool(self._watches)

    def stop(self) -> None:
        """End all watches and their threads."""
        observer, self._observer = self._observer, None
        self._watches.clear()
        if observer:
            observer.stop()
            if observer.is_alive():
                observer.join()

    def _is_alive(self, watch: ObservedWatch) -> bool:
        emitters = self._observer.emitters if self._observer else ()
        return any(emitter.watch == watch and emitter.is_alive() for emitter in emitters)

    def on_any_event(self, event: FileSystemEvent) -> None:
        """Pass on what may change the list of models; called by watchdog in its thread."""
        if event.event_type in _READS:
            return
        paths = (os.fsdecode(event.src_path), os.fsdecode(event.dest_path))
        is_model = any(path.casefold().endswith(".gguf") for path in paths)
        if is_model or event.event_type in _STRUCTURE or (event.is_directory and event.event_type == "attrib"):
            self._on_event()


def _identity(folder: Path) -> tuple[Path, int, int] | None:
    try:
        status = folder.stat()
    except OSError:
        return None
    return folder, status.st_dev, status.st_ino
