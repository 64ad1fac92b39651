"""Network file systems are known by a table of mounts."""

import os

import pytest

from diffusion_lit.runtime.mounts import network_mount

MOUNTS = r"""sysfs /sys sysfs rw 0 0
/dev/vda1 / ext4 rw,relatime 0 0
server:/export /data nfs4 rw,vers=4.2 0 0
/dev/nvme0n1 /data/local xfs rw 0 0
//nas/share /mnt/my\040share cifs rw 0 0
mgs@tcp:/fs /scratch lustre rw 0 0
host: /home/me/far fuse.sshfs rw 0 0
overlay /run/containers fuse.fuse-overlayfs rw 0 0
10.0.0.1:/old /mnt/twice nfs rw 0 0
/dev/sdb1 /mnt/twice ext4 rw 0 0
broken line
"""


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("/data/images/images.u8", "nfs4 at /data"),
        ("/data", "nfs4 at /data"),
        ("/database/images.u8", None),
        ("/data/local/images.u8", None),
        ("/mnt/my share/images.u8", "cifs at /mnt/my share"),
        ("/scratch/a/b", "lustre at /scratch"),
        ("/home/me/far/images.u8", "fuse.sshfs at /home/me/far"),
        ("/run/containers/images.u8", None),
        ("/mnt/twice/images.u8", None),
        ("/home/me/images.u8", None),
    ],
)
def test_the_longest_mount_decides(path, found):
    assert network_mount(path, MOUNTS) == found


def test_links_are_followed_and_a_root_on_the_network_counts(tmp_path):
    (tmp_path / "far").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "far")
    table = f"/dev/sda / ext4 rw 0 0\nserver:/ {os.path.realpath(tmp_path / 'far')} nfs rw 0 0\n"
    assert network_mount(tmp_path / "link" / "images.u8", table)
    assert network_mount("/images.u8", "server:/ / nfs rw 0 0\n") == "nfs at /"


def test_without_a_table_nothing_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr("diffusion_lit.runtime.mounts.TABLE", tmp_path / "none")
    assert network_mount("/data") is None
