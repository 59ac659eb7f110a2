"""The results of a run on the disk: each line once, whatever dies on the way.

What lies where: the output and the error file, named `Batch.output_id` and `Batch.error_id`, which only grow; and in the catalog, the
batch's progress (the lines that are done, as intervals, and how many bytes of each file hold them) and its charges that may not be
booked yet.

A group of results is taken down in this order:

1. Append its texts to the two files, each from the byte on that the progress names; flush them.
2. In one transaction: the new progress, and the charges of the group in place of those of the group before. From here on its lines
   are done.
3. Book the charges. The next group's transaction, or that of the batch's end, takes them out of the catalog.

A run that takes over, after a kill or a power cut at any point, first cuts both files to the bytes that the progress names, and flushes
that: what is beyond is a torn tail, whole or not, of lines that are not done. It needs no marks in the files, since the progress names no byte that
was not flushed before. Then it books the charges that it finds, and goes on with the lines that are not done. Therefore

- no line is lost: it is done only once its text is on the disk;
- none is twice in the results: texts of lines that are not done are cut off before those lines are sent again;
- none is booked twice: a charge's id depends on nothing but batch and line, and `book` takes an id once;
- what is booked is what stands in the output: a charge is noted together with its line, and never one of an attempt whose text was cut.

One process at a time does this: it holds a lock of the system on the output (`Shelf.claim`), which goes when the process does. A line
may be sent again whose answer was not taken down; the engine does that work twice, the owner pays once.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace

from headrace.errors import StorageError
from headrace.gateway.batches.depot import Depot
from headrace.gateway.batches.lines import Result
from headrace.gateway.batches.records import Batch, Charge
from headrace.gateway.batches.shelf import Sheet


class Results:
    """Takes down the results of a batch whose output is claimed. Its methods wait for the disk."""

    def __init__(self, depot: Depot, batch: Batch, output: Sheet) -> None:
        """Cut what is torn.

        Raises:
            StorageError: the disk refused, or another process has the error file.
        """
        errors = depot.shelf.claim(batch.error_id)
        if errors is None:
            raise StorageError(f"the error file of {batch.id} is locked, and its output was not")
        self._output, self._errors = output, errors
        self._depot, self._batch = depot, batch
        self._writing = threading.Lock()
        self._closed = False
        self.progress = batch.progress
        self._output.cut(self.progress.output_bytes)
        self._errors.cut(self.progress.error_bytes)

    def add(self, group: Sequence[Result]) -> list[Charge]:
        """Take down a group, of lines that are not done; what is to be booked for it.

        Raises:
            StorageError: the disk refused. Nothing of the group counts, and it can be added again.
        """
        with self._writing:
            if self._closed:
                raise StorageError("the run has let go of its results")
            before = self.progress
            output = b"".join(result.text for result in group if result.good)
            errors = b"".join(result.text for result in group if not result.good)
            if output:
                self._output.end_with(before.output_bytes, output)
            if errors:
                self._errors.end_with(before.error_bytes, errors)
            charges = [result.charge for result in group if result.charge is not None]
            done = type(before.done).of(before.done.flat)
            for result in group:
                done.add(result.number, result.number + 1)
            completed = sum(result.good for result in group)
            after = replace(
                before,
                completed=before.completed + completed,
                failed=before.failed + len(group) - completed,
                output_bytes=before.output_bytes + len(output),
                error_bytes=before.error_bytes + len(errors),
                usage=sum((charge.usage for charge in charges), start=before.usage),
                done=done,
            )
            self._depot.catalog.settle(self._batch.id, after, charges)
            self.progress = after
            return charges

    def close(self) -> None:
        """Let go of the files. A group that is being added is waited for, and none can be added any more."""
        with self._writing:
            self._closed = True
            self._errors.close()
            self._output.close()
