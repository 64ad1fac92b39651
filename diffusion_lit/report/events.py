"""What a run logged: TensorBoard's event files of all its sessions, read as one history.

A run that was stopped and continued has an event file per session. A later session replaces what earlier ones logged at
and after the step that it went on from, since those steps were trained again.
"""

import struct
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.util.tensor_util import make_ndarray

RECORD = struct.Struct("<Q4x")  # a record is its length (8 bytes) and that length's checksum, the data, its checksum


@dataclass
class Session:
    """One event file: from a start of the run to its next stop.

    Args:
        file: Name of the file.
        scalars: For each tag its points in the order they were logged: steps done, and the value. (Lightning logs the
            index of the last step, which counts from 0.)
        texts: For each tag its last text.
        start: Time of the first record, seconds since 1970; None where nothing could be read.
        end: Time of the last record.
        whole: Whether the file could be read to its end.
    """

    file: str
    scalars: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    start: float | None = None
    end: float | None = None
    whole: bool = True

    @property
    def first_step(self) -> int | None:
        """The number of steps done at the first record."""
        return min((points[0][0] for points in self.scalars.values()), default=None)


@dataclass
class History:
    """All that a run logged.

    Args:
        sessions: Its sessions, the oldest first.
        scalars: For each tag the steps done, rising, and the values, each an array of shape (N,).
    """

    sessions: list[Session]
    scalars: dict[str, tuple[np.ndarray, np.ndarray]]

    @property
    def last_step(self) -> int:
        """The number of steps done at the last record; 0 without records."""
        return max((int(steps[-1]) for steps, _ in self.scalars.values()), default=0)

    @property
    def seconds(self) -> float:
        """Time from the first to the last record of each session, summed: start-up is not in it."""
        return sum(session.end - session.start for session in self.sessions if session.start and session.end)

    @property
    def end(self) -> float | None:
        """Time of the last record, seconds since 1970."""
        return max((session.end for session in self.sessions if session.end), default=None)

    def last(self, tag: str) -> float | None:
        """The last value of a tag that is finite.

        Returns:
            The value, or None where there is none.
        """
        values = self.scalars[tag][1] if tag in self.scalars else np.empty(0)
        finite = values[np.isfinite(values)]
        return float(finite[-1]) if len(finite) else None


def read_history(folder: Path) -> History:
    """Reads all event files of a run.

    Returns:
        What they hold; of a damaged or truncated file, or one that is being written, what comes before the damage.
    """
    files = sorted(folder.glob("events.out.tfevents.*"), key=lambda path: (path.name.split(".")[3], path.name))
    sessions = [read_session(path) for path in files]
    merged: dict[str, list[tuple[int, float]]] = {}
    for session in sessions:
        first = session.first_step
        if first is not None:
            merged = {tag: [point for point in points if point[0] < first] for tag, points in merged.items()}
        for tag, points in session.scalars.items():
            merged.setdefault(tag, []).extend(points)
    scalars = {}
    for tag in sorted(merged):
        last = dict(merged[tag])  # of a step that was logged twice, the later value
        steps = sorted(last)
        if steps:
            scalars[tag] = (np.array(steps), np.array([last[step] for step in steps]))
    return History(sessions, scalars)


def read_session(path: Path) -> Session:
    """Reads one event file up to where it ends or is damaged."""
    session, count = Session(path.name), 0
    plugins: dict[str, str] = {}
    try:
        for event in EventFileLoader(str(path)).Load():
            count += 1
            session.start = event.wall_time if session.start is None else session.start
            session.end = event.wall_time
            for value in event.summary.value:
                kind = plugins.setdefault(value.tag, value.metadata.plugin_data.plugin_name)
                if kind == "scalars":
                    point = (event.step + 1, float(make_ndarray(value.tensor)))
                    session.scalars.setdefault(value.tag, []).append(point)
                elif kind == "text":
                    words = make_ndarray(value.tensor).reshape(-1)
                    session.texts[value.tag] = b"".join(words.tolist()).decode(errors="replace")
    except Exception:  # the kind of error depends on the damage
        session.whole = False
    session.whole = session.whole and count >= count_records(path)
    return session


def count_records(path: Path) -> float:
    """The number of records of an event file, by their recorded lengths.

    Returns:
        Their number; infinity where the last one is cut off, or a length is damaged.
    """
    size, place, count = path.stat().st_size, 0, 0
    with path.open("rb") as file:
        while place < size:
            header = file.read(RECORD.size)
            if len(header) < RECORD.size:
                return float("inf")
            place += RECORD.size + RECORD.unpack(header)[0] + 4
            count += 1
            if place > size:
                return float("inf")
            file.seek(place)
    return count
