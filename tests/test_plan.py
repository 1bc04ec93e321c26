"""The batch plan: every example as often as any other, whatever the hosts, and little padding."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparqle_jax.audio import SAMPLE_RATE
from sparqle_jax.data.plan import FRAME_SAMPLES, BatchPlan, choose_buckets

# Durations of LibriSpeech's 960 hours, in seconds, at these percentiles: from the statistics
# in icefall's display_manifest_statistics.py (of each subset with its recordings at speeds 0.9, 1 and
# 1.1), the speeds taken out by least squares. A handful of its recordings are longer, up to 35 s.
PERCENTILES = [*range(0, 100, 5), 99, 99.9, 99.99, 100]
LIBRISPEECH = [
    *(0.8, 3.84, 5.41, 7.05, 9.0, 10.68, 11.83, 12.59, 13.1, 13.48, 13.81, 14.09),
    *(14.35, 14.6, 14.83, 15.06, 15.28, 15.52, 15.76, 16.08, 16.68, 17.25, 18.78, 18.94),
]


def epoch_of(plan: BatchPlan, number: int) -> np.ndarray:
    first = number * plan.batches_per_epoch
    return np.concatenate([plan.batch(first + i).indices for i in range(plan.batches_per_epoch)])


@st.composite
def plans(draw) -> BatchPlan:
    """Plans of up to 300 recordings, sometimes all of one length, sometimes with a few far longer."""
    num = draw(st.integers(1, 300))
    rng = np.random.default_rng(draw(st.integers(0, 1000)))
    longest = draw(st.sampled_from([1.0, 5.0, 30.0]))
    skew = draw(st.sampled_from([0, 1, 2]))
    lengths = (rng.uniform(0.5, longest, num) ** skew * SAMPLE_RATE).astype(np.int32)
    batch_size = draw(st.integers(1, min(num, 16)))
    buckets = choose_buckets(lengths, draw(st.integers(1, 8)))
    return BatchPlan(lengths, buckets, batch_size, seed=draw(st.integers(0, 5)))


@settings(deadline=None, max_examples=100)
@given(plans())
def test_in_an_epoch_no_example_comes_twice_and_what_is_left_out_comes_first_in_the_next(plan):
    num, left_out = len(plan.num_samples), set()
    for number in range(3):
        epoch = epoch_of(plan, number)
        assert len(set(epoch)) == len(epoch)
        assert len(epoch) + plan.left_out == num
        assert left_out <= set(plan.batch(number * plan.batches_per_epoch).indices)
        left_out = set(range(num)) - set(epoch)


@settings(deadline=None, max_examples=50)
@given(plans())
def test_over_ten_epochs_every_example_comes_equally_often_to_within_one(plan):
    counts = np.bincount(
        np.concatenate([epoch_of(plan, i) for i in range(10)]), minlength=len(plan.num_samples)
    )
    assert counts.max() - counts.min() <= 1


@settings(deadline=None, max_examples=50)
@given(plans())
def test_there_are_as_many_shapes_as_buckets_and_recordings_fit(plan):
    batches = [plan.batch(i) for i in range(2 * plan.batches_per_epoch)]
    shapes = {(batch.num_samples, len(batch.indices)) for batch in batches}
    assert shapes == {(bucket.num_samples, bucket.batch_size) for bucket in plan.buckets}
    assert len(shapes) == len(plan.buckets)
    for batch in batches:
        assert plan.num_samples[batch.indices].max() <= batch.num_samples
    assert {(b.num_samples, len(b.indices)) for b in plan.one_of_each()} == shapes


def test_no_two_seeds_or_epochs_give_the_same_order():
    lengths = np.random.default_rng(0).integers(SAMPLE_RATE, 3 * SAMPLE_RATE, 200)
    buckets = choose_buckets(lengths, 4)
    orders = [
        tuple(epoch_of(BatchPlan(lengths, buckets, 4, seed=seed), epoch))
        for seed, epoch in itertools.product(range(5), range(5))
    ]
    assert len(set(orders)) == 25


def test_a_batch_is_a_function_of_seed_and_number_alone():
    lengths = np.random.default_rng(0).integers(SAMPLE_RATE, 9 * SAMPLE_RATE, 100)
    one, other = (BatchPlan(lengths, choose_buckets(lengths, 4), 4, seed=7) for _ in range(2))
    numbers = np.random.default_rng(1).permutation(5 * one.batches_per_epoch)
    asked = {number: one.batch(number) for number in range(5 * one.batches_per_epoch)}
    for number in numbers:  # in another order
        batch = other.batch(number)
        assert batch.bucket == asked[number].bucket
        np.testing.assert_array_equal(batch.indices, asked[number].indices)


def test_a_shorter_bucket_has_more_recordings_for_about_the_same_seconds():
    lengths = np.repeat([2 * SAMPLE_RATE, 5 * SAMPLE_RATE, 10 * SAMPLE_RATE], 200)
    plan = BatchPlan(lengths, [2 * SAMPLE_RATE, 5 * SAMPLE_RATE, 10 * SAMPLE_RATE], 6, seed=0, multiple=2)
    assert [bucket.batch_size for bucket in plan.buckets] == [30, 12, 6]


@pytest.mark.parametrize("number", [1, 2, 3])
def test_chosen_buckets_pad_least(number):
    rng = np.random.default_rng(number)
    frames = rng.integers(1, 12, 40)
    frames[0] = 12

    def padding(ends) -> int:
        return sum(min(end for end in ends if end >= length) - length for length in frames)

    chosen = [n // FRAME_SAMPLES for n in choose_buckets(frames * FRAME_SAMPLES, number)]
    options = itertools.combinations(range(1, 12), number - 1)
    assert padding(chosen) == min(padding((*some, 12)) for some in options)


def test_padding_of_librispeechs_training_data_is_at_most_7_percent_with_8_buckets():
    quantiles = np.random.default_rng(0).uniform(0, 100, 100_000)
    seconds = np.interp(quantiles, PERCENTILES, LIBRISPEECH)
    assert seconds.mean() == pytest.approx(12.3, abs=0.1)
    lengths = (seconds * SAMPLE_RATE).astype(np.int32)
    plan = BatchPlan(lengths, choose_buckets(lengths, 8), 64, seed=0, multiple=8)
    assert len(plan.buckets) == 8
    assert plan.padding() <= 0.07
    real = sum(lengths[plan.batch(i).indices].sum() for i in range(plan.batches_per_epoch))
    padded = sum(
        len(batch.indices) * batch.num_samples for batch in map(plan.batch, range(plan.batches_per_epoch))
    )
    assert plan.padding() == pytest.approx(1 - real / padded)


def test_data_sets_are_mixed_by_weight_and_all_of_their_examples_come():
    sizes, weights = [300, 60], [1.0, 3.0]
    lengths = np.random.default_rng(0).integers(SAMPLE_RATE, 5 * SAMPLE_RATE, sum(sizes))
    plan = BatchPlan(lengths, choose_buckets(lengths, 3), 4, seed=0, sizes=sizes, weights=weights)
    epochs = [epoch_of(plan, number) for number in range(40)]
    for epoch in epochs:
        assert len(set(epoch)) == len(epoch)
    counts = np.bincount(np.concatenate(epochs), minlength=sum(sizes))
    first, second = counts[:300], counts[300:]
    assert second.sum() / first.sum() == pytest.approx(3, rel=0.1)
    assert first.max() - first.min() <= 2  # each bucket's part goes round by itself
    assert second.max() - second.min() <= 4
    assert first.min() > 0
    by_size = BatchPlan(lengths, choose_buckets(lengths, 3), 4, seed=0, sizes=sizes)
    assert len(epoch_of(by_size, 0)) + by_size.left_out == 360


def test_no_example_of_a_mixture_is_never_drawn():
    lengths = np.repeat([1, 9, 1], [9950, 50, 100]) * SAMPLE_RATE
    buckets = [SAMPLE_RATE, 9 * SAMPLE_RATE]
    plan = BatchPlan(lengths, buckets, 1, seed=0, sizes=[10_000, 100], weights=[1.0, 1.0])
    seen = set(np.concatenate([epoch_of(plan, number) for number in range(60)]).tolist())
    assert set(range(9950, 10_000)) <= seen


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 1000), st.integers(20, 200), st.booleans())
def test_only_what_is_used_is_drawn_and_as_if_there_were_nothing_else(seed, num, mixed):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(SAMPLE_RATE, 9 * SAMPLE_RATE, num)
    used = rng.random(num) < 0.5
    used[[0, 1, -1]] = True
    sizes, weights = ([num // 3, num - num // 3], [1.0, 2.0]) if mixed else ([num], None)
    buckets = choose_buckets(lengths[used], 3)
    plan = BatchPlan(lengths, buckets, 2, seed=seed, sizes=sizes, weights=weights, used=used)
    of_used = [int(some.sum()) for some in np.split(used, np.cumsum(sizes)[:-1])]
    alone = BatchPlan(lengths[used], buckets, 2, seed=seed, sizes=of_used, weights=weights)
    assert plan.left_out == alone.left_out
    assert plan.padding() == alone.padding()
    for number in range(2 * plan.batches_per_epoch):
        batch, expected = plan.batch(number), alone.batch(number)
        assert batch.num_samples == expected.num_samples
        np.testing.assert_array_equal(batch.indices, np.flatnonzero(used)[expected.indices])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(buckets=[2 * SAMPLE_RATE]), "1 recordings are longer than the longest bucket, 2.00 s"),
        (dict(buckets=[3, 2]), "must be positive and ascend"),
        (dict(batch_size=4), "3 examples, fewer than a batch of 4"),
        (dict(batch_size=3, multiple=2), "batch_size=3 is not a multiple of data.batch_multiple=2"),
        (dict(sizes=[1, 1]), "do not add up to 3 examples"),
        (
            dict(sizes=[1, 2], used=np.array([False, True, True])),
            r"has no examples .* \[0, 2\]",
        ),
        (dict(sizes=[1, 2], weights=[1.0]), "2 data sets need as many weights"),
    ],
)
def test_what_does_not_fit_is_said(change, message):
    values = dict(buckets=[3 * SAMPLE_RATE], batch_size=2, seed=0) | change
    with pytest.raises(ValueError, match=message):
        BatchPlan(np.array([SAMPLE_RATE, SAMPLE_RATE, 3 * SAMPLE_RATE]), **values)
