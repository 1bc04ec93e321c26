"""Plans which examples are in which batch: a pure function of the lengths, the seed and the batch's number.

Recordings of about the same length share a batch, padded to the length of their bucket. There is no state but
the number of the batch, so training goes on anywhere, also on another number of hosts.
"""

import dataclasses
import functools
import threading
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from sparqle_jax.audio import SAMPLE_RATE

FRAME_SAMPLES = 320  # buckets chosen from the data end at whole frames of 20 ms
LEFT_OUT = 10  # at most a tenth of the largest bucket, so that in ten epochs no example is left out twice
_LOCK = threading.Lock()


def choose_buckets(num_samples: np.ndarray, number: int) -> list[int]:
    """The lengths of up to `number` buckets with which least is padded: samples, ascending.

    num_samples: int [N], of all recordings. The last bucket holds the longest of them. Exact, up to a
    frame, by dynamic programming over the histogram of lengths.
    """
    counts = np.bincount(-(-np.asarray(num_samples) // FRAME_SAMPLES))
    ends = np.flatnonzero(counts)  # a bucket that ends elsewhere could end earlier
    # What examples after end i and up to end j would take, all padded to the length of j.
    up_to = np.concatenate([[0], np.cumsum(counts[ends])])
    cost = np.where(
        np.arange(len(ends) + 1)[:, None] <= np.arange(len(ends)),
        (up_to[None, 1:] - up_to[:, None]) * ends[None, :],
        np.inf,
    )  # [i, j]
    best, choices = cost[0], []
    for _ in range(min(number, len(ends)) - 1):
        total = np.concatenate([[np.inf], best])[:, None] + cost  # the bucket before ends at i
        choices.append(total.argmin(0))
        best = total.min(0)
    chosen = [len(ends) - 1]
    for choice in reversed(choices):
        chosen.append(choice[chosen[-1]] - 1)
    return [int(ends[j]) * FRAME_SAMPLES for j in reversed(chosen)]


class Batch(NamedTuple):
    """One global batch. indices: int32 [B], of examples; num_samples: to which its recordings are padded."""

    number: int
    bucket: int
    num_samples: int
    indices: np.ndarray


@dataclasses.dataclass(frozen=True)
class Bucket:
    """Recordings of up to `num_samples`, `batch_size` of them in a batch."""

    num_samples: int
    batch_size: int


def batch_sizes(
    lengths: Sequence[int], batch_size: int, multiple: int, longest: int | None = None
) -> list[Bucket]:
    """Buckets of these lengths in samples, each with a batch of about as many seconds as `batch_size` of the
    longest are, and a multiple of `multiple`."""
    longest = longest or lengths[-1]
    return [Bucket(n, max(batch_size * longest // n // multiple * multiple, multiple)) for n in lengths]


class BatchPlan:
    """Batches without end, in epochs.

    In an epoch no example comes twice. Each bucket's examples are cut into batches. Up to the bucket with
    most examples, those that fill no batch join the next longer bucket; beyond it, a batch that is not full
    is filled from the next shorter one. So less than one batch of the largest bucket is left out of an
    epoch: `left_out` counts it. It comes first in the next epoch. Every epoch has its own order, a function
    of seed and epoch.

    num_samples: int [N], lengths of the recordings. buckets: their lengths in samples, ascending. batch_size:
    of the longest bucket; a shorter one holds more, for about as many seconds, a multiple of `multiple`.
    A bucket with too few examples is joined with the next longer one: `buckets` has those that are left.

    sizes, weights: for a mixture, how many of the N examples each data set has, one after the other, and how
    often each is drawn. An epoch ends when the first of them is exhausted; the others go on where they were.
    used: bool [N], which of the examples are drawn at all; the others count nowhere.

    Raises ValueError for recordings longer than the longest bucket, for weights that do not fit, and for
    fewer examples than fill a batch.
    """

    def __init__(
        self,
        num_samples: np.ndarray,
        buckets: Sequence[int],
        batch_size: int,
        *,
        seed: int,
        multiple: int = 1,
        sizes: Sequence[int] | None = None,
        weights: Sequence[float] | None = None,
        used: np.ndarray | None = None,
    ):
        num_samples = np.asarray(num_samples)
        self.num_samples, self.seed = num_samples, seed
        sizes = [len(num_samples)] if sizes is None else list(sizes)
        examples = np.arange(len(num_samples), dtype=np.int32)
        if used is not None:
            sizes = [int(some.sum()) for some in np.split(used, np.cumsum(sizes)[:-1])]
            examples = examples[used]
            num_samples = num_samples[used]
        self.total_samples = int(num_samples.sum(dtype=np.int64))  # of the examples that are used
        _check(num_samples, buckets, batch_size, multiple, sizes, weights)
        data_set = np.repeat(np.arange(len(sizes), dtype=np.uint16), sizes)
        shares = np.ones(len(sizes))
        if weights is not None:
            shares = np.asarray(weights) / np.asarray(sizes)
            shares = shares / shares.max()

        lengths = list(buckets)
        while True:
            self.buckets = batch_sizes(lengths, batch_size, multiple, longest=buckets[-1])
            group = np.searchsorted(lengths, num_samples).astype(np.uint16) * len(sizes) + data_set
            counts = np.bincount(group, minlength=len(lengths) * len(sizes)).reshape(len(lengths), -1)
            # In an epoch, by bucket and data set; of a bucket that has any, one at least.
            drawn = np.where(counts, np.maximum(np.rint(counts * shares), 1), 0).astype(int)
            few = self._fill(drawn.sum(1))
            if few is None or len(lengths) == 1:
                break
            del lengths[min(few, len(lengths) - 2)]
        if not sum(self._num_batches):
            raise ValueError(
                f"an epoch has {drawn.sum()} examples, fewer than a batch of "
                f"{self.buckets[-1].batch_size}: make batch_size smaller."
            )
        # Each data set's part of each bucket, in an order that stays: epochs are windows of it.
        order = np.random.default_rng(seed).permutation(np.arange(len(num_samples), dtype=np.int32))
        order = order[np.argsort(group[order], kind="stable")]
        parts = np.split(examples[order], np.cumsum(counts.ravel())[:-1])
        self._parts = [parts[i : i + len(sizes)] for i in range(0, len(parts), len(sizes))]
        self._windows = drawn
        self._windows[self._largest] = _shares(
            drawn[self._largest], drawn[self._largest].sum() - self.left_out
        )

    @property
    def batches_per_epoch(self) -> int:
        return sum(self._num_batches)

    def padding(self, bucket: int | None = None) -> float:
        """The share of samples in the batches of an epoch, or of one bucket, that is padding."""
        chosen = range(len(self.buckets)) if bucket is None else [bucket]
        rows = self.epoch(0)
        real = sum(int(self.num_samples[rows[i]].sum(dtype=np.int64)) for i in chosen)
        return 1 - real / sum(rows[i].size * self.buckets[i].num_samples for i in chosen)

    def batch(self, number: int) -> Batch:
        """Batch `number`, from 0."""
        epoch, place = divmod(number, self.batches_per_epoch)
        with _LOCK:  # or each thread that reads makes the epoch for itself
            bucket, row = self._order(epoch)[place]
            indices = self.epoch(epoch)[bucket][row]
        return Batch(number, int(bucket), self.buckets[bucket].num_samples, indices)

    def one_of_each(self) -> list[Batch]:
        """A batch of each bucket: together, all shapes that there are."""
        _, first = np.unique(self._order(0)[:, 0], return_index=True)
        return [self.batch(int(number)) for number in first]

    def _fill(self, drawn: np.ndarray) -> int | None:
        """Sets how many batches each bucket has in an epoch that draws so many examples of each.

        Returns the number of a bucket that has too few, or None.
        """
        sizes = [bucket.batch_size for bucket in self.buckets]
        self._num_batches, self._largest = [0] * len(sizes), int(drawn.argmax())
        shorter = longer = 0  # examples at hand beyond the largest bucket's own: not yet batched, and batched
        for i in range(self._largest):
            self._num_batches[i], shorter = divmod(shorter + int(drawn[i]), sizes[i])
        for i in range(len(sizes) - 1, self._largest, -1):
            own = int(drawn[i]) - longer
            self._num_batches[i] = max(-(-own // sizes[i]), 0)
            longer = self._num_batches[i] * sizes[i] - own
        rest = int(drawn[self._largest]) - longer + shorter
        self._num_batches[self._largest], self.left_out = divmod(max(rest, 0), sizes[self._largest])
        if 0 in self._num_batches:
            return self._num_batches.index(0)
        too_few = longer + LEFT_OUT * self.left_out > drawn[self._largest]
        return int(drawn.argmin()) if too_few else None

    def _rng(self, epoch: int, *use: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, epoch, *use])

    @functools.lru_cache(maxsize=2)  # noqa: B019  a plan lives as long as the process
    def epoch(self, epoch: int) -> list[np.ndarray]:
        """The batches of each bucket in an epoch: int32 [batches, B]."""
        own = []
        for i, (parts, windows) in enumerate(zip(self._parts, self._windows, strict=True)):
            drawn = [_window(part, epoch * size, size) for part, size in zip(parts, windows, strict=True)]
            rows = np.concatenate(drawn)
            self._rng(epoch, 0, i).shuffle(rows)
            own.append(rows)
        first = self._left_out(epoch - 1)
        # In front for now, as the longer buckets take from the end.
        own[self._largest] = _to_front(own[self._largest], first)

        shorter = np.concatenate([first[:0], *own[: self._largest]])
        longer = np.concatenate(own[self._largest :])[::-1]
        rows: dict[int, np.ndarray] = {}
        for i in range(self._largest):
            rows[i], shorter = np.split(shorter, [self._num_rows(i)])
        for i in range(len(own) - 1, self._largest, -1):
            rows[i], longer = np.split(longer, [self._num_rows(i)])
        rows[self._largest] = np.concatenate([shorter, longer])
        for i, some in rows.items():
            self._rng(epoch, 1, i).shuffle(some)
        rows[self._largest] = _to_front(rows[self._largest], first)
        return [rows[i].reshape(self._num_batches[i], -1) for i in range(len(own))]

    def _num_rows(self, bucket: int) -> int:
        return self._num_batches[bucket] * self.buckets[bucket].batch_size

    def _left_out(self, epoch: int) -> np.ndarray:
        """The examples that an epoch leaves out; before the first, none."""
        drawn = zip(self._parts[self._largest], self._windows[self._largest], strict=True)
        number = self.left_out if epoch >= 0 else 0
        return np.concatenate(
            [_window(part, (epoch + 1) * size, min(number, len(part) - size)) for part, size in drawn]
        )

    @functools.lru_cache(maxsize=2)  # noqa: B019
    def _order(self, epoch: int) -> np.ndarray:
        """The batches of an epoch in their order: int32 [batches, 2], bucket and number in it."""
        order = np.concatenate(
            [
                np.stack([np.full(number, bucket), np.arange(number)], 1)
                for bucket, number in enumerate(self._num_batches)
            ]
        ).astype(np.int32)
        self._rng(epoch, 2).shuffle(order)
        # The batch with what the epoch before has left out comes first.
        first = np.flatnonzero((order[:, 0] == self._largest) & (order[:, 1] == 0))[0]
        order[[0, first]] = order[[first, 0]]
        return order


def _shares(sizes: np.ndarray, total: int) -> np.ndarray:
    """`total` in proportion to `sizes`, in whole numbers that are no larger than they."""
    exact = sizes * (total / sizes.sum())
    shares = np.floor(exact).astype(int)
    shares[np.argsort(shares - exact, kind="stable")[: total - shares.sum()]] += 1
    return shares


def _window(part: np.ndarray, start: int, size: int) -> np.ndarray:
    """`size` entries from `start` on, going round."""
    return np.take(part, np.arange(start, start + size), mode="wrap") if size else part[:0]


def _to_front(rows: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """`rows`, those of them that are wanted first."""
    there = np.isin(rows, wanted)
    return np.concatenate([rows[there], rows[~there]])


def _check(
    num_samples: np.ndarray,
    buckets: Sequence[int],
    batch_size: int,
    multiple: int,
    sizes: Sequence[int],
    weights: Sequence[float] | None,
) -> None:
    if list(buckets) != sorted(set(buckets)) or not len(buckets) or buckets[0] <= 0:
        raise ValueError(f"the buckets' lengths must be positive and ascend, not {list(buckets)}.")
    if batch_size % multiple:
        raise ValueError(f"batch_size={batch_size} is not a multiple of data.batch_multiple={multiple}.")
    if not len(num_samples):
        raise ValueError("there are no examples to make batches of.")
    if sum(sizes) != len(num_samples):
        raise ValueError(f"the data sets' sizes {list(sizes)} do not add up to {len(num_samples)} examples.")
    if not all(sizes):
        raise ValueError(f"a data set has no examples that are used, of data sets with {list(sizes)}.")
    if weights is not None and (len(weights) != len(sizes) or not all(w > 0 for w in weights)):
        raise ValueError(f"{len(sizes)} data sets need as many weights above 0, not {list(weights)}.")
    if (too_long := num_samples > buckets[-1]).any():
        raise ValueError(
            f"{too_long.sum()} recordings are longer than the longest bucket, "
            f"{buckets[-1] / SAMPLE_RATE:.2f} s (the longest: {num_samples.max() / SAMPLE_RATE:.2f} s): give "
            "longer data.buckets, or leave them out."
        )
