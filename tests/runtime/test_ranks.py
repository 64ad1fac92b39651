"""Several ranks on the CPU: the same training, the same images, and an end when one of them dies."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.runs import DIGITS, FIT, LAST, logged, read

import diffusion_lit

TWO = ["--trainer.devices=2", "--trainer.strategy=ddp_fork"]
PLAIN = [
    *["--model.init_args.net.init_args.dropout=0.0", "--trainer.max_steps=12", "--trainer.val_check_interval=6"],
    "--trainer.precision=32-true",  # in bf16 another order of sums shows in the third digit
    "--trainer.limit_val_batches=1.0",  # a number of them would be so many on each rank
]


pytestmark = pytest.mark.usefixtures("one_thread")


def test_two_ranks_train_as_one(lightning):
    """The same global batches and draws: the losses agree up to the order of sums; so does a run that changes ranks."""
    lightning(*FIT, *PLAIN)
    lightning(*FIT, *PLAIN, *TWO, "--name=two")
    lightning(*FIT, *PLAIN, *TWO, "--name=changed", "--trainer.max_steps=6")
    lightning(*FIT, *PLAIN, "--name=changed", "--ckpt_path=last")
    one = LAST.parent.parent
    for name in ("two", "changed"):
        other = Path(f"runs/{name}/version_0")
        for tag in ("train/loss", "val/loss"):
            mine, theirs = logged(one, tag), logged(other, tag)
            assert mine.keys() == theirs.keys()
            assert list(theirs.values()) == pytest.approx(list(mine.values()), rel=2e-4), (name, tag)
        weights, others = read(LAST)["state_dict"], read(other / "checkpoints/last.ckpt")["state_dict"]
        for key, value in weights.items():
            assert torch.allclose(value, others[key], atol=2e-3), key


COUNTING = """
from pathlib import Path
from lightning.pytorch import Callback
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

class Reductions(Callback):
    def on_train_start(self, trainer, module):
        self.count = 0
        trainer.strategy.model.register_comm_hook(None, self.hook)

    def hook(self, state, bucket):
        self.count += bucket.is_last()
        return allreduce_hook(None, bucket)

    def on_train_end(self, trainer, module):
        Path(f"reductions_{trainer.global_rank}").write_text(str(self.count))
"""


@pytest.mark.medium
def test_accumulated_batches_share_one_reduction_of_gradients(lightning, tmp_path):
    (tmp_path / "counting.py").write_text(COUNTING)
    steps = ["--trainer.accumulate_grad_batches=4", "--trainer.max_steps=3", "--trainer.val_check_interval=12"]
    lightning(*FIT, *TWO, *steps, "--trainer.callbacks=counting.Reductions")
    assert [Path(f"reductions_{rank}").read_text() for rank in (0, 1)] == ["3", "3"]


@pytest.mark.medium
def test_the_command_starts_its_ranks(tmp_path):
    """As the installed command does: the further rank is another start of the same file."""
    command = [sys.executable, str(Path(diffusion_lit.__file__).with_name("__main__.py")), *FIT]
    command += ["--trainer.devices=2", "--trainer.strategy=ddp", "--trainer.max_steps=2"]
    env = {**os.environ, "PYTHONPATH": str(DIGITS.parent.parent), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert "GLOBAL_RANK: 1, MEMBER: 2/2" in run.stderr + run.stdout
    assert read(tmp_path / LAST)["global_step"] == 2


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    from diffusion_lit.commands.main import main

    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        main([*FIT, "--trainer.max_steps=20", "--model.init_args.optimizer.init_args.lr=0.01"])
    return folder / LAST


def drawn(lightning, checkpoint, out, *options):
    lightning(
        *["sample", "--ckpt_path", checkpoint, "--num_samples=20", "--labels=0,1,2", "--device=cpu", "--out", out],
        *options,
    )
    arrays = np.load(f"{out}/samples.npz")
    return arrays["arr_0"].astype(int), arrays["labels"].tolist()


@pytest.mark.medium
@pytest.mark.parametrize(
    "sampler",
    [["--sampler=heun", '--sampler_options={"S_churn": 20}'], ["--sampler=ddpm", "--cfg_scale=2"]],
    ids=["heun with churn", "ddpm"],
)
def test_samples_do_not_depend_on_ranks_or_batch_size(lightning, trained, sampler):
    whole, labels = drawn(lightning, trained, "whole", *sampler, "--num_steps=5")
    assert whole.std() > 10  # they are no flat images
    for ranks, batch in ((1, 1), (1, 7), (2, 7), (4, 20)):
        more = [] if ranks == 1 else [f"--devices={ranks}", "--strategy=ddp_fork"]
        again, same = drawn(
            lightning, trained, f"o{ranks}_{batch}", *sampler, "--num_steps=5", f"--batch_size={batch}", *more
        )
        assert np.abs(again - whole).max() <= 1
        assert same == labels


def test_more_ranks_than_samples(lightning, trained):
    more = ["--devices=3", "--strategy=ddp_fork", "--num_samples=2", "--labels=0,1", "--trajectory"]
    images, _ = drawn(lightning, trained, "few", "--num_steps=2", *more)
    alone, _ = drawn(lightning, trained, "alone", "--num_steps=2", "--num_samples=2", "--labels=0,1", "--trajectory")
    assert len(images) == 2
    assert np.abs(images - alone).max() <= 1
    assert Path("few/trajectory.png").is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--devices=0"], "devices is 0"),
        (["--devices=2", "--device=cuda:1"], "device is 'cuda:1'"),
        (["--devices=2", "--strategy=dp"], "no strategy 'dp'"),
    ],
)
def test_ranks_that_cannot_be(lightning, trained, capsys, options, message):
    with pytest.raises(SystemExit):
        lightning("sample", "--ckpt_path", trained, *options)
    assert message in capsys.readouterr().err


def test_a_batch_that_does_not_divide_over_ranks(lightning, capfd):
    with pytest.raises(BaseException) as caught:
        lightning(*FIT, *TWO, "--data.init_args.batch_size=15")
    captured = capfd.readouterr()
    assert "does not divide over 2 ranks" in str(caught.value) + captured.err + captured.out


@pytest.mark.slow
def test_a_rank_that_dies_takes_the_run_down(tmp_path):
    """Within a minute, with a message, and the last checkpoint whole."""
    command = [
        sys.executable,
        "-c",
        "from diffusion_lit.commands.main import main; main()",
        *FIT,
        "--trainer.max_steps=100000",
    ]
    command += ["--trainer.devices=2", "--trainer.strategy=ddp", "--checkpoint.every_n_train_steps=5"]
    root = str(DIGITS.parent.parent)
    env = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    with open(tmp_path / "log", "wb") as log:
        run = subprocess.Popen(command, cwd=tmp_path, stdout=log, stderr=log, env=env, start_new_session=True)
    try:
        deadline = time.monotonic() + 400
        while not (tmp_path / LAST).exists():
            assert time.monotonic() < deadline and run.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.5)
        children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
        ranks = [child for child in children if b"LOCAL_RANK=1" in Path(f"/proc/{child}/environ").read_bytes()]
        started = time.monotonic()
        os.kill(int(ranks[0]), signal.SIGKILL)
        assert run.wait(120) != 0
        print(f"down {time.monotonic() - started:.1f} s after the rank died, status {run.returncode}")
    finally:
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)
    said = (tmp_path / "log").read_text()
    assert "Another rank of the run is gone" in said or "terminated with code" in said
    assert read(tmp_path / LAST)["global_step"] >= 5


TURNS = """
import sys, time
from pathlib import Path
import torch, torch.distributed as dist
from diffusion_lit.runtime.ranks import gather, rank_zero_alone, rank_zero_first, share_rows
from diffusion_lit.runtime.stopping import RunStopped

def rank(number, world, port, out):
    store = dist.TCPStore("127.0.0.1", port, world, number == 0)
    dist.init_process_group("gloo", store=store, rank=number, world_size=world)
    said = [rank_zero_alone(lambda: (time.sleep(0.5), "made")[1], "work")]
    done = []
    said.append(rank_zero_first(lambda: done.append(time.monotonic()) or number, "both"))
    turns = gather(torch.tensor([done[0]], dtype=torch.float64)).flatten().tolist()
    said.append(turns[0] == min(turns))
    class Module:
        device = torch.device("cpu")
        class trainer:
            world_size, global_rank = world, number
    for count in (1, 2, 7):
        whole = share_rows(Module(), count, lambda rows: torch.arange(rows.start, rows.stop).float()[:, None])
        said.append(torch.equal(whole, torch.arange(count).float()[:, None]))
    try:
        rank_zero_alone(lambda: open("/no/such/file"), "the index")
    except (OSError, RunStopped) as error:
        said.append(f"{type(error).__name__}: {error}")
    Path(f"said_{number}").write_text(str(said))  # a file each: lines that ranks print at once may run into one

if __name__ == "__main__":
    import torch.multiprocessing as mp
    mp.start_processes(rank, (3, int(sys.argv[1]), None), nprocs=3, start_method="fork")
"""


@pytest.mark.medium
def test_work_of_rank_zero_and_shared_work(tmp_path):
    """What rank 0 does alone reaches nobody else, its errors reach all, and shares make up the whole."""
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (tmp_path / "turns.py").write_text(TURNS)
    env = {**os.environ, "PYTHONPATH": str(DIGITS.parent.parent), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "turns.py", str(port)], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    said = [(tmp_path / f"said_{rank}").read_text() for rank in range(3)]
    assert said[0].startswith("['made', 0, True, True, True, True, \"FileNotFoundError:")
    for rank in (1, 2):
        expected = (
            f'[None, {rank}, True, True, True, True, "RunStopped: Rank 0 could not go on with the index: FileNotF'
        )
        assert said[rank].startswith(expected)
