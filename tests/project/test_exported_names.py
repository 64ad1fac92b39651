"""What the package hands on may be named by a file by its short path too: a typed option of sampling writes it so."""

import pytest

from diffusion_lit.diffusion import Sampling
from diffusion_lit.storage.trust import Untrusted, find_class


def test_an_exported_class_may_be_named_and_a_function_or_module_may_not():
    assert find_class("diffusion_lit.Sampling") is Sampling
    for path in (
        "diffusion_lit.load_model",
        "diffusion_lit.import_module",
        "diffusion_lit.Any",
        "diffusion_lit.nothing",
    ):
        with pytest.raises(Untrusted):
            find_class(path)


def test_a_checkpoint_of_a_run_with_a_typed_option_of_sampling_is_sampled(lightning):
    from helpers.runs import FIT, LAST

    lightning(*FIT, "--trainer.max_steps=1", "--model.init_args.sampling.num_steps=2")
    lightning("sample", "--ckpt_path", LAST, "--num_samples=1", "--device=cpu")
