"""C steps against brute force, k-means against dynamic programming, codebook storage."""

import itertools

import pytest
import torch

from diffq_fx.functional import clustering, codebooks
from diffq_fx.functional.clustering import cluster_vectors, levels, nearest, nearest_vectors, optimal_levels
from diffq_fx.methods import LC
from diffq_fx.storage.codebook import CodebookWeight, code_bits, look_up_rows, to_blocks
from diffq_fx.weights import WeightSpec


def error(values, entries):
    """Squared error of the nearest entries, by trying all."""
    return float((values.double().unsqueeze(1) - entries.double()).square().min(1).values.sum())


def partitions_error(values, k):
    """The best k-means error, by trying every way to cut the sorted values."""
    ordered = values.double().sort().values
    cuts = itertools.combinations(range(1, len(ordered)), k - 1)
    runs = ([ordered[a:b] for a, b in itertools.pairwise((0, *cut, len(ordered)))] for cut in cuts)
    return min(sum(float((run - run.mean()).square().sum()) for run in each) for each in runs)


@pytest.mark.parametrize("k", [1, 2, 3, 5])
@pytest.mark.parametrize("n", [5, 9, 14])
@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_dynamic_programming_finds_the_best_partition(n, k, offset):
    values = torch.randn(n, dtype=torch.float64) + offset
    centres = optimal_levels(values, k)
    assert centres.shape == (k,)
    assert bool((centres.diff() >= 0).all())
    assert error(values, centres) == pytest.approx(partitions_error(values, k), rel=1e-6, abs=1e-12)


def test_dynamic_programming_counts_how_often_a_value_is_there():
    values, counts = torch.tensor([0.0, 1.0, 5.0, 9.0]), torch.tensor([10, 1, 2, 3])
    torch.testing.assert_close(optimal_levels(values, 2, counts), optimal_levels(values.repeat_interleave(counts), 2))


@pytest.mark.parametrize("k", [2, 3, 4, 8, 16])
@pytest.mark.parametrize("shape", ["normal", "laplace", "two peaks"])
def test_fast_levels_are_as_good_as_the_optimum(shape, k):
    values = {  # more than the fast method draws together
        "normal": torch.randn(1200),
        "laplace": torch.distributions.Laplace(0, 1).sample((1200,)),
        "two peaks": torch.cat([torch.randn(400) - 5, 0.1 * torch.randn(800) + 5]),
    }[shape]
    best = error(values, optimal_levels(values, k))
    assert error(values, levels(values, k)) <= best * 1.01


def test_a_warm_start_keeps_what_is_optimal_and_follows_what_moves():
    values = torch.randn(2000)
    centres = levels(values, 4)
    assert torch.equal(levels(values, 4, start=centres), centres)
    moved = levels(values * 1.1, 4, start=centres)
    assert error(values * 1.1, moved) <= error(values * 1.1, levels(values * 1.1, 4)) * 1.001


def test_levels_of_values_with_fewer_distinct_ones_than_entries():
    assert levels(torch.full((20,), 0.25), 4).tolist() == [0.25] * 4
    found = levels(torch.tensor([1.0, 1.0, 2.0, 2.0, 2.0]), 4)
    assert error(torch.tensor([1.0, 2.0]), found) == 0


def test_an_empty_cluster_is_filled_again():
    values = torch.cat([torch.randn(100), torch.randn(100) + 50])
    found = levels(values, 3, start=torch.tensor([-1000.0, 0.0, 1.0]))
    assert error(values, found) < 1.2 * error(values, optimal_levels(values, 3)), "two entries alone have 1.5 times as much"


def brute_scale(values, base):
    """Best error of ``a * base`` over a fine grid of scales."""
    scales = torch.linspace(1e-3, 1.5 * float(values.abs().max() / base.abs().max()), 3000, dtype=torch.float64)
    return min(error(values, base * a) for a in scales)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("kind", ["scaled_binary", "scaled_ternary"])
def test_scaled_codebooks_are_optimal(kind, seed):
    values = torch.randn(40, generator=torch.Generator().manual_seed(seed)) ** (1 + 2 * (seed % 2))
    base = torch.tensor([-1.0, 1.0] if kind == "scaled_binary" else [-1.0, 0.0, 1.0], dtype=torch.float64)
    found = getattr(codebooks, kind)(values)
    assert error(values, found) <= brute_scale(values, base) + 1e-5


OWN = {
    "lopsided": (-2.0, -1.0, 0.5, 1.0),
    "powers of two": codebooks.powers_of_two(3),
    "quantiles": tuple(torch.special.ndtri((torch.arange(16) + 0.5) / 16).tolist()),
}


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("base", OWN.values(), ids=OWN)
def test_a_scaled_codebook_of_ones_own_is_as_good_as_a_search(base, seed):
    values = torch.randn(8 if seed % 2 else 400, generator=torch.Generator().manual_seed(seed)) ** (1 + 2 * (seed % 3 == 2))
    found = codebooks.scaled(values, base)
    assert error(values, found) <= brute_scale(values, torch.tensor(sorted(base), dtype=torch.float64)) * 1.0001
    torch.testing.assert_close(found / found[-1], torch.tensor(sorted(base)) / max(base))


@pytest.mark.parametrize("size", [1.0, 1e-4])
def test_an_empty_cluster_goes_to_the_run_with_the_largest_error(size):
    values = size * torch.tensor([0.0, 0.1, 0.2, 10.0, 10.1, 10.2, 50.0, 60.0])
    found = levels(values, 4, start=size * torch.tensor([0.0, 10.0, 55.0, 1000.0]))
    torch.testing.assert_close(found, size * torch.tensor([0.1, 10.1, 50.0, 60.0]))
    values, bounds, errors = size * torch.tensor([-4.0, 1.0, 3.0, 9.0]), torch.tensor([0, 3, 4, 4]), torch.tensor([size, 0.0, 0.0])
    found = clustering._refill(values, bounds, size * torch.tensor([2.0, 9.0, 20.0]), errors)
    assert torch.equal(found, size * torch.tensor([-4.0, 2.0, 9.0])), "the value furthest out is not the largest one"


def test_a_scaled_codebook_of_nothing_and_one_that_was_there_before():
    entries = (1.0, -1.0, 0.0, 4.0)
    assert torch.equal(codebooks.scaled(torch.zeros(9), entries), torch.tensor(sorted(entries)))
    values = torch.tensor([1.0, -1.0]).repeat(21_000)
    values[0] = 205.0  # the others are further from it than any other start
    start = torch.tensor([-1.0, 0.0, 1.0])
    alone, started = codebooks.scaled(values, (-2.0, 0.0, 2.0)), codebooks.scaled(values, (-2.0, 0.0, 2.0), start=start)
    assert error(values, started) <= error(values, start) < error(values, alone)
    assert error(values, codebooks.scaled(values, (-2.0, 0.0, 2.0), start=torch.zeros(3))) <= error(values, alone)


@pytest.mark.parametrize("size", [0.01, 1.0, 64.0])
def test_entries_of_any_size_are_scaled_to_the_values(size):
    entries = [-size, 0.0, size]
    torch.testing.assert_close(codebooks.scaled(torch.tensor([3.0, -3.0, 0.0]), entries), torch.tensor([-3.0, 0.0, 3.0]))
    values = torch.tensor([1.0, -1.0] * 50 + [10.0])  # a start near the largest one would leave all others at 0
    assert error(values, codebooks.scaled(values, entries)) <= brute_scale(values, torch.tensor(entries, dtype=torch.float64)) + 1e-3


def test_powers_of_two_follow_the_papers_closed_form():
    smallest = 3
    values = torch.cat([torch.randn(20000), 0.1 * torch.randn(20000)])
    entries = torch.tensor(codebooks.powers_of_two(smallest))
    f = -values.abs().log2()
    size = torch.exp2(-torch.floor(f + torch.log2(torch.tensor(1.5))))
    size = torch.where(f > smallest, torch.tensor(2.0**-smallest), size)
    size = torch.where(f > smallest + 1, torch.tensor(0.0), torch.where(f <= 0, torch.tensor(1.0), size))
    torch.testing.assert_close(entries[nearest(values, entries)], size * values.sign(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("kind", "function"),
    [
        ("binary", lambda w: torch.where(w >= 0, 1.0, -1.0)),
        ("ternary", lambda w: torch.where(w.abs() < 0.5, torch.zeros_like(w), w.sign())),
    ],
)
def test_fixed_codebooks_follow_the_papers_closed_form(kind, function):
    values = torch.cat([torch.randn(500), torch.zeros(1)])
    entries = LC(codebook=kind).fit(values)
    assert torch.equal(entries[nearest(values, entries)], function(values))


def test_nearest_is_nearest():
    values, entries = torch.randn(500), torch.randn(7).sort().values
    assert torch.equal(nearest(values, entries), (values.unsqueeze(1) - entries).abs().argmin(1))


def test_clusters_are_what_the_iterations_have_come_to():
    values = torch.tensor([0.0, 1.0, 2.0, 30.0])
    torch.testing.assert_close(levels(values, 2, start=torch.tensor([0.0, 1.0]), iterations=1), torch.tensor([0.0, 11.0]))
    points = values[:, None]
    centres, codes = cluster_vectors(points, 2, start=torch.tensor([[0.0], [1.0]]), iterations=1)
    torch.testing.assert_close(centres, torch.tensor([[0.0], [11.0]]))
    assert codes.tolist() == [0, 0, 0, 1], "of the centres as they are now"
    assert cluster_vectors(points, 2, start=torch.tensor([[0.0], [1.0]]))[0].flatten().tolist() == [1.0, 30.0]


def test_nearest_warns_of_no_layout(recwarn):
    before = torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    try:
        values = torch.randn(3, 5).t()
        assert torch.equal(nearest(values, torch.tensor([-1.0, 1.0])), (values >= 0).long())
    finally:
        torch.set_warn_always(before)
    assert not recwarn.list


def test_nearest_vectors_in_pieces(monkeypatch):
    points, centres = torch.randn(100, 3), torch.randn(9, 3)
    monkeypatch.setattr("diffq_fx.functional.clustering._CHUNK", 50)
    codes, distances = nearest_vectors(points, centres)
    expected = torch.cdist(points, centres).square().min(1)
    assert torch.equal(codes, expected.indices)
    torch.testing.assert_close(distances, expected.values, rtol=1e-4, atol=1e-5)


def test_vector_clusters_find_the_groups_and_leave_none_empty():
    points = torch.cat([torch.randn(30, 4) * 0.01 + 3 * i for i in range(5)])[torch.randperm(150)]
    start = points[:1].repeat(5, 1)  # four of five centres begin empty
    centres, codes = cluster_vectors(points, 5, start=start, iterations=30)
    assert torch.bincount(codes, minlength=5).tolist() == [30] * 5
    assert float((points - centres[codes]).square().mean()) < 1e-3


def test_vector_clusters_with_as_many_centres_as_points():
    points = torch.randn(8, 3)
    centres, codes = cluster_vectors(points, 8)
    torch.testing.assert_close(centres[codes], points)
    centres, codes = cluster_vectors(torch.ones(8, 3), 4)  # all the same
    assert torch.equal(centres[codes], torch.ones(8, 3))


# Storage


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("entries", [1, 2, 5, 16, 17, 300])
@pytest.mark.parametrize("block", [1, 3, 8])
def test_stored_codes_give_the_weight_back(axis, entries, block):
    spec = WeightSpec(name="w", shape=(6, 10, 2), axis=axis)
    codebook = torch.randn(entries, block)
    blocks = spec.rows * -(-spec.columns // block)
    codes = torch.randint(entries, (spec.rows, blocks // spec.rows))
    stored = CodebookWeight(spec, codes, codebook)
    assert torch.equal(stored.codes_OC(), codes.int())
    expected = look_up_rows(codes, codebook, spec.shape, axis)
    assert torch.equal(stored(), expected)
    back = to_blocks(expected, axis, block)
    assert torch.equal(back[:, 0], codebook[codes.flatten()][:, 0])
    parts = stored.footprint()
    assert parts.payload_bits == parts.packed_bits - 32 * entries * block == blocks * code_bits(entries)
    assert parts.container_payload_bits == stored.num_codes * stored.container_bits
    assert stored.codes.numel() == -(-parts.container_payload_bits // 8)


@pytest.mark.parametrize(
    ("entries", "width"),
    [
        ([-0.3, 0.3], 2),
        ([-0.7, 0.0, 0.7], 2),
        ([-1.0, 0.0, 1.0], 2),
        ([-1.0, -0.5, 0.0, 0.5, 1.0], 4),
        ([-1.0, -0.125, 0.0, 0.125, 0.875], 4),
        ([-0.3, 0.4], None),
        ([-0.2, 0.1, 0.2, 0.4], None),  # 4 does not fit into the codes' two bits
        ([0.0, 0.0], None),
    ],
)
def test_codebooks_that_are_integers(entries, width):
    spec = WeightSpec(name="w", shape=(4, 6), axis=0)
    stored = CodebookWeight(spec, torch.randint(len(entries), (4, 6)), torch.tensor(entries).unsqueeze(1))
    integers = stored.as_integers()
    assert (integers and integers.container_bits) == width
    if integers is not None:
        assert torch.equal(integers(), stored())
        assert integers.spec.scale_layout.shape == integers.spec.bits_layout.shape == integers.bits.shape == (1, 1)
        assert repr(integers) == f"IntegerWeight('w', shape=(4, 6), container_bits={width})"


def test_blocks_of_a_codebook_are_no_integers():
    stored = CodebookWeight(WeightSpec(name="w", shape=(4, 6), axis=0), torch.randint(2, (4, 3)), torch.tensor([[-1.0, 1.0], [1.0, 1.0]]))
    assert stored.as_integers() is None
