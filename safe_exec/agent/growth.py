"""Attributes the growth of the kernel's memory to the lines that ran meanwhile.

If a sample finds more memory than the previous one, the difference is charged to the running line.
The end of a top-level statement charges the rest to the statement. A decrease is subtracted from
the latest growth: temporary objects are freed first. So the lines with the most bytes are those
whose memory is still there. The cost is one read of ``/proc/self/statm`` for each sample and
statement.
"""

LEAST_BYTES = 128 << 10
MOST_PIECES = 400
MOST_FRAMES = 8
MOST_LINES = 10


class Growth:
    """The increments of the memory in order, each with the frames of cells that ran meanwhile."""

    def __init__(self):
        self.last_bytes = None
        self.pieces = []
        self.frames = ()

    def begin(self, current):
        """Set the memory that growth is measured against."""
        self.last_bytes = current

    def at_statement(self, current, row):
        """Charge the previous statement for its allocations; make ``row`` the current frame."""
        self.charge(current)
        self.frames = (row,)

    def at_sample(self, current, rows):
        """Charge the growth since the last sample to the running line."""
        frames = tuple((name, line, cell) for name, line, _, cell in rows if cell)[:MOST_FRAMES]
        if frames:
            self.frames = frames
        self.charge(current)

    def charge(self, current):
        """Charge a change of the memory to the current frames."""
        if current is None or self.last_bytes is None:
            return
        change = current - self.last_bytes
        if -LEAST_BYTES < change < LEAST_BYTES:
            return
        self.last_bytes = current
        if change < 0:
            self.release(-change)
        elif self.pieces and self.pieces[-1][0] == self.frames:
            self.pieces[-1][1] += change
        else:
            self.pieces.append([self.frames, change])
            if len(self.pieces) > MOST_PIECES:
                self.merge()

    def release(self, size):
        """Subtract freed memory from the latest increments."""
        while size and self.pieces:
            piece = self.pieces[-1]
            part = min(size, piece[1])
            piece[1] -= part
            size -= part
            if not piece[1]:
                self.pieces.pop()

    def by_frames(self):
        """Add up the bytes for each stack of frames."""
        sums = {}
        for frames, size in self.pieces:
            sums[frames] = sums.get(frames, 0) + size
        return sums

    def merge(self):
        """Merge the increments of the same frames; keep the largest if there are too many."""
        sums = sorted(self.by_frames().items(), key=lambda item: -item[1])
        self.pieces = [list(item) for item in sums[: MOST_PIECES // 2]][::-1]

    def report(self):
        """Return rows of bytes and frames (innermost first), the largest rows first."""
        rows = sorted(self.by_frames().items(), key=lambda item: -item[1])
        return [[size, list(frames)] for frames, size in rows[:MOST_LINES] if frames]
