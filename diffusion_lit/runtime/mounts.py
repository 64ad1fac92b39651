"""Whether a file lies on a network file system, by the table of mounts that Linux keeps in /proc/mounts."""

import os
import re
from pathlib import Path

TABLE = Path("/proc/mounts")
NETWORK = {
    *("nfs", "nfs4", "cifs", "smb3", "smbfs", "lustre", "ceph", "glusterfs", "beegfs", "gpfs", "pvfs2", "orangefs"),
    *("afs", "coda", "ncpfs", "9p", "wekafs", "panfs"),
}
LOCAL_FUSE = {"fuse.fuse-overlayfs", "fuse.ntfs-3g", "fuse.exfat", "fuse.lxcfs", "fuse.portal", "fuse.snapfuse"}


def network_mount(path: str | os.PathLike[str], table: str | None = None) -> str | None:
    """The network file system that a file lies on.

    Args:
        path: The file or folder; links are followed.
        table: The mounts as lines "device folder type ..."; by default those of this machine.

    Returns:
        Its type and folder, such as "nfs4 at /data"; None on a local disk, or where there is no table (not on Linux).
        FUSE file systems (sshfs, s3fs, ...) count as network file systems, except for a few that are known to be local.
    """
    if table is None:
        try:
            table = TABLE.read_text(errors="surrogateescape")
        except OSError:
            return None
    real = os.path.realpath(path)
    best, kind = "", ""
    for line in table.splitlines():
        fields = line.split(" ")
        if len(fields) < 3:
            continue
        folder = re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), fields[1])
        if f"{real}/".startswith(f"{folder.rstrip('/')}/") and len(folder) >= len(best):  # a later mount covers
            best, kind = folder, fields[2]
    slow = kind in NETWORK or (kind.startswith("fuse.") and kind not in LOCAL_FUSE)
    return f"{kind} at {best}" if slow else None
