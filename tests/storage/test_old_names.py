"""Classes by the names that version 0.1.0 gave them, which lie in checkpoints and in users' configs."""

import pytest

from diffusion_lit import diffusion, modules
from diffusion_lit.callbacks.resume import differences
from diffusion_lit.storage.trust import find_class

OLD = {
    "diffusion_lit.diffusion.scaling.Scaling": diffusion.Preconditioning,
    "diffusion_lit.diffusion.Scaling": diffusion.Preconditioning,
    "diffusion_lit.diffusion.scaling.EDMScaling": diffusion.EDMPreconditioning,
    "diffusion_lit.diffusion.EDMScaling": diffusion.EDMPreconditioning,
    "diffusion_lit.diffusion.EpsScaling": diffusion.EpsPreconditioning,
    "diffusion_lit.diffusion.VScaling": diffusion.VPreconditioning,
    "diffusion_lit.diffusion.X0Scaling": diffusion.X0Preconditioning,
    "diffusion_lit.diffusion.scaling.FlowScaling": diffusion.FlowPreconditioning,
    "diffusion_lit.diffusion.noise.LinearSchedule": diffusion.LinearSchedule,
    "diffusion_lit.diffusion.PaperWeight": diffusion.PredictionWeight,
    "diffusion_lit.diffusion.loss.PaperWeight": diffusion.PredictionWeight,
    "diffusion_lit.modules.Trapezoid": modules.WarmupStableDecay,
    "diffusion_lit.modules.optim.Trapezoid": modules.WarmupStableDecay,
}


@pytest.mark.parametrize("path", OLD)
def test_a_file_may_give_the_old_name(path):
    assert find_class(path) is OLD[path]


def test_a_run_of_the_old_name_goes_on_under_the_new_one_without_a_difference():
    for old, new in (
        ("diffusion_lit.modules.Trapezoid", "diffusion_lit.modules.WarmupStableDecay"),
        ("diffusion_lit.diffusion.scaling.X0Scaling", "diffusion_lit.diffusion.preconditioning.X0Preconditioning"),
        ("diffusion_lit.diffusion.noise.ContinuousVP", "diffusion_lit.diffusion.schedules.ContinuousVP"),
        ("diffusion_lit.diffusion.FlowScaling", "diffusion_lit.diffusion.FlowPreconditioning"),
    ):
        before, now = ({"part": {"class_path": path, "init_args": {"steps": 1}}} for path in (old, new))
        assert not list(differences(before, now)) and not list(differences(now, before))
        assert list(differences(before, {"part": {"class_path": "torch.nn.ReLU"}}))
