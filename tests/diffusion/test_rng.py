"""Keyed randomness: a function of the key alone, and of each row's seed alone."""

import pytest
import torch

from diffusion_lit.diffusion.rng import SeededNoise, keyed_generator, keyed_seed, seed_default_generators


def test_the_same_key_gives_the_same_draws_and_any_other_key_others():
    keys = [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), ("train", 0, 0), (0, 0), (00, 11), (0, 1, 1)]
    assert len({keyed_seed(*key) for key in keys}) == len(keys)
    first, again = (torch.randn(5, generator=keyed_generator("a", 1)) for _ in range(2))
    assert torch.equal(first, again)


def test_a_seed_is_the_same_in_every_process():
    first_eight_bytes = "8c44531c555cc376"  # of: printf "('train', 0)" | sha256sum
    assert keyed_seed("train", 0) == int.from_bytes(bytes.fromhex(first_eight_bytes), "little") // 2


def test_default_generators_are_seeded_as_torch_does_it(monkeypatch):
    torch.manual_seed(2**62 + 5)
    expected = torch.randn(3)
    torch.manual_seed(0)
    seed_default_generators(2**62 + 5, torch.device("cpu"))
    assert torch.equal(torch.randn(3), expected)
    told = []
    monkeypatch.setattr(torch.cuda, "manual_seed", told.append)
    seed_default_generators(7, torch.device("cuda", 1))
    assert told == [7] and torch.default_generator.initial_seed() == 7


def test_global_state_is_neither_read_nor_moved():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    SeededNoise([3])(torch.empty(1, 2))
    assert torch.equal(before, torch.get_rng_state())


def test_rows_do_not_depend_on_the_batch_they_sit_in():
    shape = (3, 4, 4)
    together = SeededNoise(range(10, 17))
    first, second = together(torch.empty(7, *shape)), together(torch.empty(7, *shape))
    for index, seed in enumerate(range(10, 17)):
        alone = SeededNoise([seed])
        assert torch.equal(alone(torch.empty(1, *shape))[0], first[index])
        assert torch.equal(alone(torch.empty(1, *shape))[0], second[index])
        generator = keyed_generator("sample", seed)
        assert torch.equal(first[index], torch.randn(shape, generator=generator))
        assert torch.equal(second[index], torch.randn(shape, generator=generator))
    assert not torch.equal(first, second)
    assert not torch.equal(first[0], first[1])


def test_noise_is_standard_normal():
    noise = SeededNoise(range(200))(torch.empty(200, 1000))
    assert abs(noise.mean()) < 0.01
    assert abs(noise.std() - 1) < 0.01


def test_noise_follows_dtype_and_counts_rows():
    assert SeededNoise([1])(torch.empty(1, 2, dtype=torch.float64)).dtype == torch.float64
    assert SeededNoise([1])(torch.empty(1, 2, dtype=torch.bfloat16)).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="2 samples was asked of 1 seed"):
        SeededNoise([1])(torch.empty(2, 2))
